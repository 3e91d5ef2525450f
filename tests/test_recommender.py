"""recommender.py: metrics against brute force, causality, selection, baselines and audit by hand.

    pytest tests/test_recommender.py             a few seconds
"""
import inspect
import io
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import recommender as rec


# ------------------------------------------------------------------------------------------------------- helpers
def fixed(scores):
    """A score function that gives prepared rows, one a user, in order of calling."""
    rows = iter(torch.tensor(np.array(scores), dtype=torch.float32))
    return lambda sequences, users: torch.stack([next(rows) for _ in sequences])


def ring(n=12, n_users=48, length=5, seed=0):
    """Everyone walks round a ring of n items: the next item is known once the last is. n_items, train, valid, test."""
    starts = np.random.default_rng(seed).integers(0, n, n_users)
    walks = [(s + np.arange(length + 2)) % n + 1 for s in starts]
    return SimpleNamespace(n_items=n, train=[w[:-2] for w in walks], valid=np.array([w[-2] for w in walks]),
                           test=np.array([w[-1] for w in walks]))


def quick(d, features=None, **kw):
    return rec.train(d.n_items, d.train, d.valid, features, **{"epochs": 3, "width": 16, "blocks": 1, "batch": 16, **kw})


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def through_disk(state):
    """What a killed run finds: the state as it was when it was saved, and nothing that torch.load would have to trust."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(a, b):
    """Are two states the same bit for bit, dicts and lists inside them too?"""
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


class Keeper:
    """Keeps a run's states in a folder, one an epoch, as a worker process does: it can be pickled."""
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def save(self, state):
        torch.save(state, self.folder / f"{state['epoch']}.pt")

    def states(self):
        return [torch.load(path, weights_only=True) for path in sorted(self.folder.iterdir())]


def worker_shows_bars():
    return rec.BARS["disable"] is not True


@pytest.fixture
def steps(monkeypatch):
    """One entry for every step that an optimizer makes."""
    made, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **kw: (made.append(1), step(self, *a, **kw))[1])
    return made


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return rec.SASRec(30, torch.randn(31, 5), width=16, heads=2, blocks=2, dropout=0.3).eval()


# ------------------------------------------------------------------------------------------------ ranks and metrics
def brute_force(scores, seen, target, k):
    """HR, NDCG and reciprocal rank the long way: sort every unseen item, the target behind all it ties with."""
    items = [i for i in range(1, len(scores)) if i not in seen]
    order = sorted(items, key=lambda i: (-scores[i], i == target))
    gain = [float(i == target) for i in order]
    dcg = sum(g / np.log2(place + 2) for place, g in enumerate(gain[:k]))
    ideal = sum(g / np.log2(place + 2) for place, g in enumerate(sorted(gain, reverse=True)[:k]))
    return sum(gain[:k]), dcg / ideal, 1 / (order.index(target) + 1)


def test_ranks_and_metrics_equal_brute_force_with_ties_and_seen_items():
    """Guards: ties for us, seen items or the padding item in the ranking, log2(rank) off by one, k off by one."""
    rng, n, users = np.random.default_rng(0), 40, 300
    scores = rng.integers(0, 8, (users, n + 1)).astype(np.float32)           # few levels: ties everywhere
    scores[:, 0] = 100                                                       # padding must never count
    orders = [rng.permutation(n) + 1 for _ in range(users)]
    seen, targets = [o[: rng.integers(1, 12)] for o in orders], np.array([o[-1] for o in orders])
    for u in range(users):
        scores[u, seen[u]] += 50 * (u % 2)                                   # seen items would be on top
    m = rec.metrics(rec.ranks(fixed(scores), seen, targets, batch=64))
    for u in range(users):
        for k in rec.CUTOFFS:
            expected = brute_force(scores[u], set(seen[u]), targets[u], k)
            assert np.allclose((m[f"hr@{k}"][u], m[f"ndcg@{k}"][u], m["mrr"][u]), expected)
    assert {f"{x}@{k}" for x in ("hr", "ndcg") for k in (5, 10, 20)} | {"mrr"} == set(m)


def test_all_ties_are_the_last_rank():
    """Guards: a constant model looking perfect."""
    assert rec.ranks(fixed(np.ones((1, 31))), [np.array([1, 2])], [5]).tolist() == [28]


def test_ranks_do_not_depend_on_the_batch_size():
    """Guards: rows that see their neighbours' padding or seen items."""
    rng = np.random.default_rng(1)
    scores, seen = rng.random((50, 21)), [np.arange(1, rng.integers(3, 10)) for _ in range(50)]
    by = {b: rec.ranks(fixed(scores), seen, np.full(50, 15), batch=b).tolist() for b in (1, 7, 512)}
    assert by[1] == by[7] == by[512]


def test_items_seen_long_ago_are_masked_too():
    """Guards: masking only the last MAX_LEN items, those that the model reads."""
    n = rec.MAX_LEN + 30
    scores = np.arange(n + 1, 0, -1)                                         # item 1 best, item n worst
    assert rec.ranks(fixed([scores]), [np.arange(1, n)], [n]).tolist() == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_target_score_that_is_not_finite_raises(value):
    """Guards: NaN compares false with everything, so a diverged model would rank every target first or last."""
    scores = np.ones((2, 6))
    scores[1, 5] = value
    with pytest.raises(ValueError, match="finite"):
        rec.ranks(fixed(scores), [np.array([1])] * 2, [5, 5])


def test_a_target_among_the_seen_items_raises():
    """Guards: a split that repeats an item is an error of the data, not a rank."""
    with pytest.raises(ValueError):
        rec.ranks(fixed(np.ones((1, 6))), [np.array([1, 2])], [2])


def test_ranks_lists_the_ten_best_unseen_items():
    """Guards: seen items in the recommended lists (the audit and --explain read them)."""
    scores, lists = np.arange(31.0), []
    rec.ranks(fixed([scores]), [np.array([30, 28])], [1], lists=lists)
    assert lists[0].tolist() == [[29, 27, 26, 25, 24, 23, 22, 21, 20, 19]]


# ----------------------------------------------------------------------------------------------------------- model
def test_blocks_are_causal(small_model):
    """Guards: attention that sees the answer: changing later items must leave earlier states as they were."""
    x = torch.randn(4, 10, 16)
    changed = x.clone()
    changed[:, 6:] = torch.randn(4, 4, 16)
    with torch.no_grad():
        a, b = (small_model.blocks[0](y) for y in (x, changed))
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.allclose(a[:, 6:], b[:, 6:])


def test_a_block_gives_the_last_states_alone_as_among_all(small_model):
    """Guards: the state of a neighbour, or of the padding, where only the last position goes on."""
    x, last = torch.randn(3, 7, 16), torch.tensor([6, 0, 3])
    with torch.no_grad():
        assert torch.allclose(small_model.blocks[0](x, last), small_model.blocks[0](x)[torch.arange(3), last], atol=1e-6)


def test_states_go_through_every_block(small_model, monkeypatch):
    """Guards: a block that is left out, or one before the last that gives a single position on."""
    seen = []
    monkeypatch.setattr(rec.Block, "forward", lambda self, x, last=None: seen.append((tuple(x.shape), last)) or (
        x if last is None else x[torch.arange(len(x)), last]))
    small_model(torch.tensor([[3, 1, 4], [2, 5, 0]]), small_model.table())
    assert [shape for shape, _ in seen] == [(2, 3, 16)] * 2 and seen[0][1] is None and seen[1][1].tolist() == [2, 1]


def test_a_row_alone_equals_the_row_in_a_padded_batch(small_model):
    """Guards: padding that shifts positions or is attended to."""
    short, long = np.array([3, 1, 4]), np.arange(1, 21)
    ids = rec.pad([short, long])
    assert ids.tolist()[0] == [3, 1, 4] + [0] * 17
    with torch.no_grad():
        both, alone = (small_model(x, small_model.table()) for x in (ids, rec.pad([short])))
    assert torch.allclose(both[0], alone[0], atol=1e-5)
    score = rec.scorer(small_model)
    assert torch.allclose(score([short, long])[0], score([short])[0], atol=1e-5)


def test_scorer_reads_the_last_real_position_of_long_and_short_histories(small_model):
    """Guards: the state at a padded position, or MAX_LEN counted from the wrong end."""
    long = np.random.default_rng(0).integers(1, 31, rec.MAX_LEN + 25)
    scores = rec.scorer(small_model)([long, long[-4:]])
    assert scores.shape == (2, 31)
    for row, s in zip(scores, (long[-rec.MAX_LEN:], long[-4:])):
        with torch.no_grad():
            state = small_model(torch.tensor(s)[None], small_model.table())[0]
        assert torch.allclose(row, small_model.table().detach() @ state, atol=1e-5)


def test_the_fused_table_is_id_plus_projected_features():
    """Guards: features that reach the input but not the output table, dropout left on when ranking, a padding row that moves."""
    features = torch.randn(31, 5, dtype=torch.float64)
    features[0] = 0
    m = rec.SASRec(30, features, width=16).eval()
    expected = F.normalize(m.item.weight + features.float() @ m.project.weight.T, dim=-1)
    assert torch.allclose(m.table(), expected, atol=1e-6) and torch.equal(m.table(), m.table())
    assert m.table()[0].abs().max() == 0


def test_id_and_content_arms_have_tables_of_one_shape_and_share_their_first_weights():
    """Guards: two scorer paths that drift apart; arms that start from different random numbers, which looks like an effect."""
    made = []
    for features in (None, torch.randn(31, 5)):
        torch.manual_seed(3)
        made.append(rec.SASRec(30, features, width=16))
    a, b = made
    assert a.table().shape == b.table().shape == (31, 16) and a.table().dtype == b.table().dtype == torch.float32
    x, y = (rec.scorer(m)([np.array([1, 2])]) for m in made)
    assert x.shape == y.shape == (1, 31) and x.dtype == y.dtype
    shared = a.state_dict()
    assert all(torch.equal(shared[k], b.state_dict()[k]) for k in shared) and len(b.state_dict()) == len(shared) + 2


# -------------------------------------------------------------------------------------------------------- training
def test_samples_are_every_history_with_its_next_item():
    """Guards: a history that runs into another person's or that is missed; a target beside its history."""
    histories, targets, users = rec.samples([np.array([1, 2, 3]), np.array([6]), np.array([7, 8])])
    assert [h.tolist() for h in histories] == [[1], [1, 2], [7]] and targets.tolist() == [2, 3, 8] and users.tolist() == [0, 0, 2]


def test_the_loss_is_over_every_real_next_item_and_nothing_else(monkeypatch):
    """Guards: loss on padding, the first item as a target, the valid item in training, a history left out."""
    d, told = ring(), []
    d.train.append(np.random.default_rng(0).integers(1, 13, rec.MAX_LEN + 9))    # longer than the model reads
    d.train.append(np.array([7]))                                                # nothing to predict
    real = F.cross_entropy

    def spy(logits, targets):
        assert logits.shape == (len(targets), d.n_items), "a full softmax over the catalogue, without padding"
        told.extend((targets + 1).tolist())
        return real(logits, targets)
    monkeypatch.setattr(rec.F, "cross_entropy", spy)
    d.valid = np.append(d.valid, [0, 0])
    monkeypatch.setattr(rec, "ranks", lambda *_, **__: np.ones(1, dtype=int))     # selection is not looked at here
    quick(d, epochs=1)
    expected = [i for s in d.train for i in s[1:]]
    assert sorted(told) == sorted(expected) and 0 not in told


def test_training_learns_a_deterministic_ring_and_carries_on_to_test():
    """Guards: shifted targets, a table that is not trained, scores of the wrong position: any of them ends near chance (.3)."""
    d = ring()
    model, log = quick(d, epochs=30, width=32, lr=1e-2, dropout=0.1)
    rank = rec.ranks(rec.scorer(model), [np.append(s, v) for s, v in zip(d.train, d.valid)], d.test)
    assert log["valid_ndcg@10"] > 0.97 and rec.metrics(rank)["ndcg@10"].mean() > 0.9


def test_features_count_in_the_history_and_in_the_ranking_and_are_trained():
    """Guards: features that are stored but reach only one side, or a projection that never gets a gradient."""
    d, features = ring(), torch.randn(13, 4)
    model, _ = quick(d, features)
    torch.manual_seed(0)
    assert not torch.equal(model.project.weight, rec.SASRec(12, features, width=16, blocks=1).project.weight)
    histories = [np.array([5]), np.array([1])]
    before = rec.scorer(model)(histories)
    model.features[5] += 1
    change = (rec.scorer(model)(histories) - before).abs()
    assert change[0].min() > 0, "item 5 in the history moves every score"
    assert change[1, 5] > 0 and change[1, [i for i in range(13) if i != 5]].max() == 0, "as a candidate only its own"


def test_same_seed_same_model_bit_for_bit_and_another_seed_differs():
    """Guards: initial weights, order or dropout drawn outside the seed, or from whatever ran before."""
    d, features = ring(), torch.randn(13, 4)
    a, _ = quick(d, features, seed=5)
    torch.rand(7), np.random.rand(7)                                           # somebody else draws
    assert same(a, quick(d, features, seed=5)[0]) and not same(a, quick(d, features, seed=6)[0])


def test_few_users_still_make_eight_steps_an_epoch(steps):
    """Guards: a batch as large as the data, two steps an epoch and an early stop before anything is learnt."""
    quick(ring(n_users=400), epochs=1, batch=256)
    assert len(steps) == 8


def test_the_best_epoch_is_given_back_and_training_stops_early(monkeypatch):
    """Guards: the last epoch's weights under the best epoch's figure; patience that never ends."""
    monkeypatch.setattr(rec, "LEAST_STEPS", 0), monkeypatch.setattr(rec, "EVERY", 1)
    d = ring()

    def run(values, **kw):
        values = iter(values)
        monkeypatch.setattr(rec, "metrics", lambda rank: {"ndcg@10": np.array([next(values)])})
        return quick(d, **kw)
    stopped, log = run([.2, .5, .1, .1, .1, .1, .1, .1], epochs=8, patience=2)
    assert log == {"epochs": 4, "best_epoch": 2, "valid_ndcg@10": .5}
    assert same(stopped, run([.2, .5], epochs=2)[0]) and not same(stopped, run([.2, .5, .6], epochs=3)[0])


@pytest.mark.parametrize("n_users, steps", [(32, 8), (100, 25)])
def test_no_early_stop_before_the_least_steps(monkeypatch, n_users, steps):
    """Guards: a run that stops in the dip with which long features start, before the rise behind it; a least number of
    epochs instead of steps, which small data (eight steps an epoch) is through with before the rise."""
    monkeypatch.setattr(rec, "EVERY", 1)
    d, least = ring(n_users=n_users), int(np.ceil(rec.LEAST_STEPS / steps))

    def run(values):
        values = iter(values)
        monkeypatch.setattr(rec, "metrics", lambda rank: {"ndcg@10": np.array([next(values)])})
        return quick(d, epochs=60, patience=2)[1]
    dip = [.3] + [.1] * (least - 3)
    assert run([*dip, .5, *[.1] * 9])["best_epoch"] == least - 1
    assert run([*dip, *[.1] * 10]) == {"epochs": least, "best_epoch": 1, "valid_ndcg@10": .3}


def test_validation_is_looked_at_every_second_epoch_and_after_the_last(monkeypatch):
    looks, real = [], rec.metrics
    monkeypatch.setattr(rec, "metrics", lambda rank: looks.append(1) or real(rank))
    assert [(looks.clear(), quick(ring(), epochs=n), len(looks))[2] for n in (1, 2, 5)] == [1, 1, 3]


def variant(name, d):
    """What SASRec is given, as train's arguments."""
    return {"id": {}, "features": {"features": torch.randn(13, 40, generator=torch.Generator().manual_seed(1))},
            "lane": {"start": torch.randn(13, 16, generator=torch.Generator().manual_seed(2)),
                     "preferences": told(len(d.train)) | {"since": torch.tensor([[2, 4]] * len(d.train))}}}[name]


@pytest.mark.parametrize("name", ["id", "features", "lane"])
def test_a_run_killed_after_any_epoch_ends_as_if_it_had_not_been(name, steps):
    """Guards: Adam's moments, the average, its age, the best epoch so far or a random number that is not what it would have been;
    epochs trained twice or left out; features that are stored with every state."""
    d, states = ring(), []
    given = variant(name, d) | {"epochs": 5, "lr": 3e-4}               # so slow that validation rises at every look
    whole, log = quick(d, **given, save=lambda state: states.append(through_disk(state)))
    an_epoch = len(steps) // 5
    assert [state["epoch"] for state in states] == [1, 2, 3, 4, 5] and an_epoch == 12 and [state["over"] for state in states] == [False] * 4 + [True]
    buffers = {key for key, _ in whole.named_buffers()}
    assert not any(key.removeprefix("module.") in buffers for weights in states[0]["weights"] for key in weights)
    for k, state in enumerate(states, 1):
        later = []
        steps.clear()
        model, again = quick(d, **given, state=state, save=lambda state: later.append(through_disk(state)))
        assert same(model, whole) and again == log and not model.training
        assert len(steps) == (5 - k) * an_epoch and equal(later, states[k:])
    assert [state["best_epoch"] for state in states] == [0, 2, 2, 4, 5] and len(states[0]["optimizer"]["state"]) == len(list(whole.parameters()))


def test_a_run_that_early_stopping_ended_trains_no_further(monkeypatch, steps):
    """Guards: a finished run that goes on when it is resumed; patience that starts anew; the last epoch's weights for the best one's."""
    monkeypatch.setattr(rec, "LEAST_STEPS", 0)
    d, states = ring(), []
    how = variant("features", d) | {"epochs": 60, "patience": 2, "lr": 3e-4}
    whole, log = quick(d, **how, save=lambda state: states.append(through_disk(state)))
    assert 2 < log["best_epoch"] == log["epochs"] - 2 == len(states) - 2 < 20 and states[-1]["over"] and not states[-2]["over"]
    for k in (log["best_epoch"] - 1, log["best_epoch"], log["epochs"] - 1, log["epochs"]):
        steps.clear()
        model, again = quick(d, **how, state=states[k - 1])
        assert same(model, whole) and again == log and len(steps) == 12 * (log["epochs"] - k)


def test_every_epoch_draws_its_own_numbers_from_seed_and_epoch(monkeypatch):
    """Guards: the same batches in every epoch or for every seed; dropout that goes on from whatever ran before; all of it after a kill."""
    drawn, real = [], rec.batches

    def spy(lengths, batch, rng):
        rows = list(real(lengths, batch, rng))
        drawn.append((torch.initial_seed(), np.concatenate(rows).tolist()))
        return rows
    monkeypatch.setattr(rec, "batches", spy)
    states = []
    quick(ring(), epochs=2, seed=1, save=lambda state: states.append(through_disk(state)))
    quick(ring(), epochs=2, seed=2)
    assert all(len({str(x) for x in part}) == 4 for part in zip(*drawn)), "two seeds, two epochs: four orders, four seeds of dropout"
    torch.manual_seed(99)
    quick(ring(), epochs=2, seed=1, state=states[0])
    assert drawn[4] == drawn[1] and len(drawn) == 5


def test_a_state_in_memory_is_not_trained_on(steps):
    """Guards: an optimizer that goes on in the tensors of the state it was given: the second run from there would be another."""
    states = []
    quick(ring(), lr=3e-4, save=lambda state: states.append(through_disk(state)))
    before = through_disk(states[0])
    steps.clear()
    a, b = (quick(ring(), lr=3e-4, state=states[0])[0] for _ in range(2))
    assert len(steps) == 2 * 2 * 12 and same(a, b) and equal(states[0], before)


def test_test_items_are_not_read_before_training_has_ended(monkeypatch):
    """Guards: the epoch chosen on test. train() has no way to see it, run_arm looks at data.test only after train()
    has returned, and other test items leave the model and its validation figures bit for bit as they were."""
    assert not [p for p in inspect.signature(rec.train).parameters if "test" in p]

    class Sealed(SimpleNamespace):
        trained = False
        test = property(lambda self: self.answers if self.trained else pytest.fail("test read before training ended"))

    def run(answers):
        d = ring()
        sealed = Sealed(n_items=d.n_items, train=d.train, valid=d.valid, answers=answers)
        monkeypatch.setattr(rec, "train", lambda *a, **k: (train(*a, **k), setattr(sealed, "trained", True))[0])
        return rec.together([rec.run_arm("id", sealed, {}, {}, epochs=2)])
    train, d = rec.train, ring()
    others = np.array([next(i for i in range(1, 13) if i not in (*s, v, t)) for s, v, t in zip(d.train, d.valid, d.test)])
    a, b = run(d.test), run(others)
    assert a["entry"]["valid"] == b["entry"]["valid"] and (a["ranks"] != b["ranks"]).any()
    assert a["model"] and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


# --------------------------------------------------------------------------------------------------- the baselines
TOY = [np.array(s) for s in ([1, 2, 3], [1, 2, 4], [3, 2, 4], [1, 5])]       # counts 0, 3, 3, 2, 2, 1


def test_popularity_by_hand():
    """Guards: counts of padding, of valid or of distinct users only."""
    assert rec.popularity(6, TOY)([TOY[0], TOY[3]]).tolist() == [[0, 3, 3, 2, 2, 1, 0]] * 2


def test_markov_by_hand():
    """Guards: reversed transitions, popularity that outweighs a transition, state kept from one user to the next."""
    score = rec.markov(6, TOY)
    after_2, after_6, after_2_again = score([np.array([5, 2]), np.array([6]), np.array([2])])
    assert torch.equal(after_2, after_2_again)
    assert after_2.argsort(descending=True)[:2].tolist() == [4, 3], "2 -> 4 twice, 2 -> 3 once"
    assert after_2[3] > after_2[[1, 2]].max() and after_2[1] == after_2[2]
    assert torch.equal(after_6.argsort(descending=True, stable=True)[:5], torch.tensor([1, 2, 3, 4, 5])), "popularity fills"
    assert after_6.max() < 1 and after_6[1] == after_6[2] > after_6[3] == after_6[4] > after_6[5] > after_6[6] == 0


# ------------------------------------------------------------------------------------- intervals, audit and slices
def test_paired_bootstrap():
    """Guards: unpaired resampling (an interval as wide as the users differ), seeds taken for users, unseeded draws."""
    rng = np.random.default_rng(0)
    users = rng.random((3, 400))
    noise = rng.normal(0, .05, (3, 400))
    delta, (low, high) = rec.paired_bootstrap(users, users)
    assert delta == low == high == 0
    delta, (low, high) = rec.paired_bootstrap(users + noise - noise.mean(), users)
    assert low < 0 < high and abs(delta) < 1e-9
    delta, (low, high) = rec.paired_bootstrap(users + .02 + noise - noise.mean(), users)
    assert 0 < low < delta < high and abs(delta - .02) < 1e-9
    spread = noise.mean(0).std() / 20                                          # standard error of 400 users' means
    assert 3.4 < (high - low) / spread < 4.5, "95 % are 3.92 standard errors of the paired, seed-averaged differences"
    assert rec.paired_bootstrap(users + noise, users) == rec.paired_bootstrap(users + noise, users)
    assert rec.paired_bootstrap(users + noise, users, seed=1) != rec.paired_bootstrap(users + noise, users)


def test_compare_pairs_the_arms_that_ran():
    """Guards: a - b the wrong way round, arms that did not run, the number of seeds."""
    r = {"curec": np.ones((2, 50), dtype=int), "content": np.full((2, 50), 2)}
    (row,) = rec.compare(r, [("curec", "content"), ("curec", "oracle")])
    assert (row["a"], row["b"], row["metric"], row["seeds"]) == ("curec", "content", "ndcg@10", 2)
    assert row["delta"] == pytest.approx(1 - 1 / np.log2(3)) and row["ci95"] == pytest.approx([row["delta"]] * 2)


def test_headroom_by_hand():
    """Guards: shares of the wrong difference; an arm without reasons that recovers something."""
    arms = {a: {"test": {"ndcg@10": v}} for a, v in {"id": [.01, .01], "content": [.05, .07], "curec": [.08, .10], "oracle": [.10, .10]}.items()}
    assert rec.headroom(arms) == {"headroom": {"ndcg@10": pytest.approx(.04), "recovered": {"curec": pytest.approx(.75)}}}
    for oracle in (.06, .05):                                                      # no room, or less than none: no share of it
        arms["oracle"]["test"]["ndcg@10"] = [oracle] * 2
        assert rec.headroom(arms)["headroom"]["recovered"] == {}
    del arms["oracle"]
    assert rec.headroom(arms) == {}, "what was not measured is absent"


def test_audit_by_hand():
    """Guards: padding counted as an item, Gini of the wrong sign, popularity ranks off by one."""
    train = [np.array([1, 2, 3, 4])] * 2 + [np.array([1, 2]), np.array([1])]   # popularity ranks 1, 2, 3, 4
    equal = rec.audit(np.array([[1, 2], [3, 4]]), 4, train)
    assert equal == {"coverage@10": 1.0, "gini@10": pytest.approx(0), "mean_popularity_rank@10": 2.5}
    one = rec.audit(np.array([[1], [1]]), 4, train)
    assert one == {"coverage@10": .25, "gini@10": pytest.approx(.75), "mean_popularity_rank@10": 1.0}
    uneven = rec.audit(np.array([[1, 2], [1, 3]]), 4, train)                    # exposures 2, 1, 1, 0
    pairs = sum(abs(a - b) for a in (2, 1, 1, 0) for b in (2, 1, 1, 0)) / (2 * 4 * 4)
    assert uneven["gini@10"] == pytest.approx(pairs / 1.0) and uneven["mean_popularity_rank@10"] == 1.75


def test_slices_by_hand():
    """Guards: counting valid or test choices as train; 'later' measured against the wrong event of the user."""
    train, times, test = [[1, 2], [2, 3], [4, 1]], [[1, 5, 6, 7], [2, 8, 9, 10], [1, 2, 3, 4]], np.array([3, 4, 2])
    d = SimpleNamespace(n_items=4, train=[np.array(s) for s in train], times=[np.array(t) for t in times], test=test,
                        counts=np.array([0, 6, 9, 5, 6]))
    s = rec.slices_of(d)
    assert s["train<=5"].tolist() == [True, False, False]
    # item 3 was chosen in train at 8, after user 0's test event at 7; item 4 at 1, before 10; item 2 at 5, after 4
    assert s["no_later_train"].tolist() == [False, True, False]


def test_run_arm_reports_each_seed_and_slice():
    """Guards: seeds overwritten by one another, slices averaged over all users."""
    d = ring()
    keep = np.arange(len(d.train)) < 5
    fits = [rec.run_arm("id", d, {}, {"first": keep, "nobody": keep & False}, seed=k, epochs=2) for k in (7, 8)]
    ranks_, entry, model = rec.together(fits).values()
    assert all(torch.equal(v, fits[0]["model"][k]) for k, v in model.items()) and not torch.equal(model["pos.weight"], fits[1]["model"]["pos.weight"])
    assert ranks_.shape == (2, len(d.train)) and entry["seeds"] == [7, 8] and "item.weight" in model
    per_user = [rec.metrics(r) for r in ranks_.numpy()]
    for m in per_user[0]:
        assert entry["test"][m] == pytest.approx([p[m].mean() for p in per_user])
        assert entry["slices"]["first"][m] == pytest.approx([p[m][keep].mean() for p in per_user])
    assert list(entry["slices"]) == ["first"], "a slice without users is absent, not zero"
    once = rec.together([rec.run_arm("markov", d, {}, {})])
    assert once["ranks"].shape[0] == 1 == len(once["entry"]["seeds"]) and once["entry"]["test"]["ndcg@10"][0] > .99 and not once["model"]
    assert entry["train_s"] > 0 and entry["rank_ms_per_user"] > 0 and 0 <= entry["audit"]["gini@10"] <= 1


def test_batches_visit_every_user_once_and_pad_little():
    lengths = np.random.default_rng(1).integers(2, 51, 1000)
    seen = list(rec.batches(lengths, 32, np.random.default_rng(0)))
    assert sorted(np.concatenate(seen)) == list(range(1000)) and max(map(len, seen)) == 32
    padded = sum(len(rows) * lengths[rows].max() for rows in seen)
    assert padded < 1.2 * lengths.sum(), "batches of similar length pad less than a fifth"
    means = [lengths[rows].mean() for rows in seen[:16]]
    assert means != sorted(means), "short and long batches come in random order"
    again = list(rec.batches(lengths, 32, np.random.default_rng(1)))
    assert not np.array_equal(seen[0], again[0]), "another seed, another order"


def test_states_and_table_have_fixed_lengths(small_model):
    """Guards: a popular item that wins by the length of its vector; a temperature that reaches one side only."""
    table = small_model.table()
    assert torch.allclose(table[1:].norm(dim=1), torch.ones(len(table) - 1), atol=1e-5)
    states = small_model(torch.tensor([[1, 2, 3]]), table)
    assert torch.allclose(states.norm(dim=-1), (1 / small_model.log_tau.exp()).expand(1), atol=1e-4)


def test_the_local_convolution_looks_back_exactly_its_length():
    """Guards: an offset of one in the causal padding."""
    block = rec.Block(8, 2, 0.0).eval()
    with torch.no_grad():
        block.qkv.weight.zero_(), block.down.weight.zero_(), block.local.copy_(torch.randn(rec.LOCAL, 8))
    x = torch.randn(1, 9, 8)
    moved = x.clone()
    moved[0, 3] += torch.randn(8)
    changed = (block(x) - block(moved)).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [3 <= t < 3 + rec.LOCAL for t in range(9)]


def test_validation_sees_the_average_of_the_weights(monkeypatch):
    """Guards: an average that is kept but never used, or one that forgets everything but the last step."""
    steps, real, seen = [], rec.scorer, []
    step = torch.optim.AdamW.step

    def spy_step(self, *args, **settings):
        step(self, *args, **settings)
        steps.append(self.param_groups[0]["params"][0].detach().clone())
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    monkeypatch.setattr(rec, "scorer", lambda model, device="cpu": seen.append(model.log_tau.detach().clone()) or real(model, device))
    kept, _ = quick(ring(), epochs=1, batch=24)                                  # 8 steps; the average reaches back as far
    weights = torch.stack(steps)
    assert torch.equal(kept.log_tau, seen[0]), "what validation saw is what is given back"
    assert len(steps) == 8 and not torch.equal(seen[0], steps[-1])
    assert ((weights.amin(0) - 1e-6 <= seen[0]) & (seen[0] <= weights.amax(0) + 1e-6)).all()


def test_the_average_reaches_back_about_an_epoch_and_batches_hold_histories_of_similar_length(monkeypatch):
    """Guards: an average over the whole run or over a step; batches sorted by anything but the length the model sees."""
    told, batches = {}, rec.batches
    monkeypatch.setattr(rec, "AveragedModel", lambda model, avg_fn: told.update(mean=avg_fn) or AveragedModel(model, avg_fn=avg_fn))
    monkeypatch.setattr(rec, "batches", lambda lengths, *rest: told.update(lengths=lengths) or batches(lengths, *rest))
    d = ring(n_users=24, length=8)
    d.train[0] = np.tile(d.train[0], 10)
    quick(d, epochs=1, batch=16)
    steps = len(told["lengths"]) / 16
    assert told["mean"](torch.zeros(1), torch.ones(1), 10 ** 6).item() == pytest.approx(1 / steps, abs=1e-6)
    assert told["mean"](torch.zeros(1), torch.ones(1), 0).item() == pytest.approx(0.9)
    assert told["lengths"].tolist() == [min(t, rec.MAX_LEN) for s in d.train for t in range(1, len(s))]


def test_inputs_are_item_vectors_of_length_sqrt_width_plus_positions_from_the_last_item():
    """Guards: item vectors drowned by the positions, or a position counted from the first item or from the padding."""
    model, ids = rec.SASRec(5, width=8, blocks=0).eval(), torch.tensor([[3, 1, 4], [2, 5, 0]])
    table = model.table()
    block, seen = rec.Block(8, 2, 0.0), []
    block.forward = lambda x, last: seen.append(x) or x[:, -1]
    model.blocks.append(block)
    model(ids, table)
    expected = table[ids] * 8 ** .5 + model.pos.weight[torch.tensor([[2, 1, 0], [1, 0, 0]])]
    assert torch.allclose(seen[0], expected, atol=1e-5)


def test_features_lose_projected_dimensions_to_dropout_and_convolutions_start_at_nothing():
    """Guards: dropout of raw features (a dense product for every step, and worse on Beauty); noise of a random filter."""
    model = rec.SASRec(400, torch.randn(401, 16), dropout=.3).train()
    with torch.no_grad():
        model.item.weight.zero_()
    assert (model.table()[1:] == 0).float().mean().item() == pytest.approx(.3, abs=.02)
    assert all((b.local == 0).all() for b in model.blocks)


def test_projected_features_start_at_their_length(monkeypatch):
    """Guards: features so short that the ID vectors, which learn faster, leave them nothing to say."""
    for length in (.2, 3.):
        monkeypatch.setattr(rec, "LENGTH", length)
        model = rec.SASRec(400, F.normalize(torch.randn(401, 32), dim=-1))
        assert model.project(model.features).norm(dim=-1).mean().item() == pytest.approx(length, rel=0.2)


def test_arms_in_worker_processes_equal_those_in_this_process(monkeypatch, tmp_path):
    """Guards: workers that draw other random numbers, show bars on top of one another or cannot save their states; an arm that forgets how far
    it was or how long it took; a pool for a run that is too small for it. (So few items need one thread only.)"""
    monkeypatch.setattr(rec.os, "cpu_count", lambda: 2)
    assert isinstance(rec.workers("cpu", 5), ThreadPoolExecutor) and isinstance(rec.workers("cuda", 99), ThreadPoolExecutor)
    assert rec.BARS["disable"] is None, "this process shows bars on a terminal"
    found, kept, arm = [], [], ("id", ring(), {}, {})
    for fits in (6, 1):
        whole, rest = (Keeper(tmp_path / f"{fits}-{part}") for part in ("whole", "rest"))
        with rec.workers("cpu", fits) as pool:
            assert pool.submit(worker_shows_bars).result() == (fits == 1)
            found.append(pool.submit(rec.run_arm, *arm, SimpleNamespace(state=None, seconds=0.0, save=whole.save), seed=1, epochs=3).result())
            units = SimpleNamespace(state=whole.states()[0], seconds=1e6, save=rest.save)
            found.append(pool.submit(rec.run_arm, *arm, units, seed=1, epochs=3).result())
        kept.append(whole.states())
        assert [state["epoch"] for state in kept[-1]] == [1, 2, 3] and equal(rest.states(), kept[-1][1:])
    assert equal(*kept) and [fit["row"]["train_s"] > 1e6 for fit in found] == [False, True] * 2
    assert all(torch.equal(fit["ranks"], found[0]["ranks"]) and equal(dict(fit["model"]), dict(found[0]["model"])) for fit in found)
    assert rec.BARS["disable"] is None


@pytest.mark.skipif(rec.os.cpu_count() < 2, reason="one CPU: no worker processes")
def test_a_worker_ends_when_its_parent_is_gone(tmp_path):
    """Guards: processes left behind by a killed run, each with half a gigabyte."""
    code = (f"import sys; sys.path.insert(0, {str(Path(rec.__file__).parent)!r})\n"
            "import recommender, os, time\nif __name__ == '__main__':\n"
            "    pool = recommender.workers('cpu', 6)\n    print(pool.submit(os.getpid).result(), flush=True)\n    time.sleep(60)")
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    assert worker != parent.pid
    parent.kill(), parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}/stat").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.2)


# ------------------------------------------------------------------------------------------------------------- LANE
def told(users=4, n=12, width=6, seed=0):
    """Preferences of users at two cuts, after 2 and 4 items: what Alignment takes."""
    g = torch.Generator().manual_seed(seed)
    vectors = torch.cat([torch.zeros(1, width), torch.randn(9, width, generator=g)])
    return {"vectors": vectors, "named": torch.randint(1, 10, (users, 2, 5), generator=g), "since": torch.tensor([[2, 4]] * users)}


def test_alignment_is_attention_over_the_preferences_by_brute_force():
    """Guards: keys for values, a scale of the wrong width, weights of another head, a norm before the residual."""
    torch.manual_seed(0)
    layer, states = rec.Alignment(8, **told(), heads=2).eval(), torch.randn(3, 8)
    known = layer.known([0, 1, 3], [2, 5, 4])
    got, weights = layer(states, known)
    m, given = layer.attention, layer.vectors[known]                                       # (3, 5, 6)
    bias = m.in_proj_bias.chunk(3)
    for b in range(3):
        q, k, v = m.q_proj_weight @ states[b] + bias[0], given[b] @ m.k_proj_weight.T + bias[1], given[b] @ m.v_proj_weight.T + bias[2]
        heads, shares = [], []
        for h in (slice(0, 4), slice(4, 8)):
            share = torch.stack([q[h] @ key[h] / 4 ** 0.5 for key in k]).softmax(0)
            heads.append(sum(s * value[h] for s, value in zip(share, v))), shares.append(share)
        x = layer.norm1(states[b] + m.out_proj(torch.cat(heads)))
        torch.testing.assert_close(got[b], layer.norm2(x + layer.down(F.gelu(layer.up(x)))), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights[b], sum(shares) / 2, atol=1e-5, rtol=1e-5)


def test_a_position_knows_the_latest_cut_before_it_and_no_later_one():
    """Guards: preferences that were drawn from what is to be predicted."""
    given = told()
    layer = rec.Alignment(8, **given)
    known = layer.known([1] * 5, [1, 2, 3, 4, 9])
    assert (known[0] == 0).all() and torch.equal(known[1:], given["named"][1][[0, 0, 1, 1]])
    states, m = torch.randn(2, 8), layer.eval().attention
    torch.nn.init.normal_(m.out_proj.bias)                                                 # without preferences attention adds nothing, not even a bias
    x = layer.norm1(states)
    torch.testing.assert_close(layer(states, known[[0, 0]])[0], layer.norm2(x + layer.down(F.gelu(layer.up(x)))))


def test_lane_trains_ranks_and_comes_back_from_its_weights():
    """Guards: preferences that reach training but not ranking, or another user's; an arm that cannot be looked at later."""
    d = ring()
    given = told(len(d.train)) | {"since": torch.tensor([[2, 4]] * len(d.train))}
    model, _ = quick(d, start=torch.randn(13, 16), preferences=given)
    assert model.align.up.weight.grad is not None
    score = rec.scorer(model)
    histories = d.train[:6]
    together, apart = score(histories, range(6)), torch.cat([score([h], [u]) for u, h in enumerate(histories)])
    assert torch.allclose(together, apart, atol=1e-5) and not torch.allclose(together, score(histories, range(6, 12)), atol=1e-3)
    assert torch.equal(together, rec.scorer(rec.ranker(12, model.state_dict()))(histories, range(6)))


def test_first_id_vectors_are_those_given_and_train_on():
    """Guards: a fair baseline that starts at random, or whose titles are frozen."""
    start = torch.randn(13, 16)
    assert torch.equal(rec.SASRec(12, start=start, width=16).item.weight[1:], start[1:])
    assert not torch.equal(quick(ring(), start=start)[0].item.weight[1:], start[1:])


# --------------------------------------------------------------------------------------------- recommendation knowledge
def test_what_an_llm_knows_by_hand():
    """Guards: a negative the person has chosen, a choice that always stands first, an expected rating of unnormalised shares, errors of train."""
    d = ring(n_users=60)
    d.seqs = [np.concatenate([s, [v, t]]) for s, v, t in zip(d.train, d.valid, d.test)]
    d.titles, d.ratings = [f"t{i}" for i in range(13)], [np.array([1.0] * (len(s) - 2) + [5.0, 4.0]) for s in d.seqs]
    goals, firsts = {f"{s[:-1]}": s[-1] for s in d.seqs}, []

    def likelihood(pairs):
        out = []
        for (history, task, *about), answer in pairs:
            goal = f"t{goals[history]}"
            if task == "bpr":
                firsts.append(about[0].split("; ")[0] == goal)
            right = answer == goal or (task == "rate" and answer == "4")
            seen = answer[1:] in re.findall(r"\d+", history) and task != "rate"
            assert not seen, "a negative that the person has chosen"
            out.append(-1.0 if right else -3.0)
        return torch.tensor(out)
    found = rec.knows(d, lambda history, *task: (f"{history}", *task), likelihood)
    assert found["ranking_accuracy"] == found["bpr_accuracy"] == 1 and 0.3 < np.mean(firsts[::2]) < 0.7 and firsts[::2] == firsts[1::2]
    p = np.exp(-3.0 + 2.0 * (np.arange(1, 6) == 4))
    assert found["rmse"] == pytest.approx(abs(p @ np.arange(1, 6) / p.sum() - 4), abs=1e-5) == found["mae"] and found["rmse_of_mean"] == pytest.approx(3)
    d.ratings = None
    assert set(rec.knows(d, lambda history, *task: (f"{history}", *task), likelihood)) == {"ranking_accuracy", "bpr_accuracy"}


def test_items_that_an_arm_did_not_consider_stand_behind_all_others_and_in_no_list():
    """Guards: a miss that beats something, a list filled up with misses in the order of their numbers."""
    scores, lists = np.full((1, 31), rec.MISS), []
    scores[0, [4, 9]] = 2, 1
    assert rec.ranks(fixed(scores), [np.array([1, 2])], [9], lists=lists).tolist() == [2] and sorted(lists[0][0])[-2:] == [4, 9] and sum(lists[0][0] > 0) == 2
    assert rec.ranks(fixed(scores), [np.array([1, 2])], [5]).tolist() == [28], "all thirty but the two seen, ties against us"
