"""recommender.py: metrics against brute force, causality, selection, baselines and audit by hand.

pytest tests/test_recommender.py              some seconds; -m slow: worker processes, floods
"""

import dataclasses
import functools
import inspect
import io
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import SemLock
from pathlib import Path
from threading import Event, RLock, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import curec
import recommender as rec


# ---------------------------------------------------------------------------------------- helpers
def fixed(scores):
    """A score function that gives prepared rows, one a user."""
    table = torch.tensor(np.array(scores), dtype=torch.float32)

    def score(sequences, users):
        return table[list(users)]

    return score


def ring(n=12, n_users=48, length=5, seed=0):
    """Everyone walks round a ring of n items: the next item is known once the last is."""
    starts = np.random.default_rng(seed).integers(0, n, n_users)
    walks = [(start + np.arange(length + 2)) % n + 1 for start in starts]
    train = [walk[:-2] for walk in walks]
    return SimpleNamespace(
        n_items=n,
        train=train,
        valid=np.array([walk[-2] for walk in walks]),
        test=np.array([walk[-1] for walk in walks]),
        times=[np.arange(length + 2)] * n_users,
        counts=np.bincount(np.concatenate(train), minlength=n + 1),
    )


def config(**changes):
    """Of a training that takes a moment."""
    return rec.TrainConfig(**{"epochs": 3, "width": 16, "batch": 16, **changes})


def quick(data, inputs=rec.Inputs(), seed=0, **changes):
    return rec.train(data, inputs, config(**changes), seed)


def features_of(n_items, size=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n_items + 1, size, generator=generator)
    features[0] = 0
    return features


def assert_same_weights(a, b):
    """Are two models, or two state dicts, the same bit for bit?"""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    assert list(a) == list(b)
    for name, weights in a.items():
        assert torch.equal(weights, b[name]), name


def stub_validation(monkeypatch, values):
    """Validation NDCG@10 is values, one a look."""
    left = iter(values)

    def metrics(rank):
        return {"ndcg@10": np.array([next(left)])}

    monkeypatch.setattr(rec, "metrics", metrics)


@pytest.fixture
def steps(monkeypatch):
    """One entry for every step of an optimizer: the first weights after it."""
    made, real = [], torch.optim.AdamW.step

    def step(self, *args, **settings):
        result = real(self, *args, **settings)
        made.append(self.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return made


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return rec.SASRec(30, rec.Inputs(torch.randn(31, 5)), width=16).eval()


# ------------------------------------------------------------------------------ ranks and metrics
def metrics_of_user(scores, seen, target, k):
    """HR, NDCG and reciprocal rank the long way: sort every unseen item, the target behind all it
    ties with."""
    items = [i for i in range(1, len(scores)) if i not in seen]
    order = sorted(items, key=lambda i: (-scores[i], i == target))
    gains = [float(i == target) for i in order]
    found = sum(gain / math.log2(place + 1) for place, gain in enumerate(gains[:k], 1))
    ideal = 1 / math.log2(1 + 1)
    return sum(gains[:k]), found / ideal, 1 / (order.index(target) + 1)


def assert_ranks_equal_brute_force(seed, n, users):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, (users, n + 1)).astype(np.float32)  # few levels: ties everywhere
    scores[:, 0] = 100  # padding must never count
    seen, targets = [], []
    for u in range(users):
        order = rng.permutation(n) + 1
        seen.append(order[: rng.integers(1, n)])
        targets.append(order[-1])
        scores[u, seen[u]] += 50 * (u % 2)  # seen items would be on top
    found = rec.metrics(rec.ranks(fixed(scores), seen, targets))
    for u in range(users):
        for k in rec.CUTOFFS:
            hr, ndcg, mrr = metrics_of_user(scores[u], set(seen[u]), targets[u], k)
            assert found[f"hr@{k}"][u] == hr
            assert found[f"ndcg@{k}"][u] == pytest.approx(ndcg)
            assert found["mrr"][u] == pytest.approx(mrr)


def test_ranks_and_metrics_equal_brute_force_with_ties_and_seen_items():
    """Guards: ties for us, seen items or the padding item in the ranking, log2(rank) off by one,
    k off by one."""
    assert_ranks_equal_brute_force(seed=0, n=40, users=300)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_ranks_and_metrics_equal_brute_force_on_many_catalogues(seed):
    """Guards: the same on catalogues smaller than a list and larger than a batch of scores."""
    assert_ranks_equal_brute_force(seed, n=5 * seed, users=200)


def test_metrics_are_all_that_is_reported():
    """Guards: a cut-off that is missing from the tables."""
    names = {"mrr"}
    for k in (5, 10, 20, 50):
        names |= {f"hr@{k}", f"ndcg@{k}"}
    assert set(rec.metrics(np.array([1, 30]))) == names


def test_metrics_deep_in_the_list_by_hand():
    """Guards: recall that is lost between rank 20 and 50, where nobody looks; a cut-off that is off
    by one."""
    found = rec.metrics(np.array([20, 21, 50, 51]))
    assert found["hr@20"].tolist() == [1, 0, 0, 0]
    assert found["hr@50"].tolist() == [1, 1, 1, 0]
    gains = [1 / math.log2(rank + 1) for rank in (20, 21, 50)]
    assert found["ndcg@50"].tolist() == pytest.approx([*gains, 0])
    assert found["ndcg@20"].tolist() == pytest.approx([gains[0], 0, 0, 0])


def test_all_ties_are_the_last_rank():
    """Guards: a constant model looking perfect."""
    assert rec.ranks(fixed(np.ones((1, 31))), [np.array([1, 2])], [5]).tolist() == [28]


def test_ranks_do_not_depend_on_the_batch_size(monkeypatch):
    """Guards: rows that see their neighbours' padding or seen items; users numbered anew in each
    batch."""
    rng = np.random.default_rng(1)
    scores = rng.random((50, 21))
    seen = [np.arange(1, rng.integers(3, 10)) for _ in range(50)]
    targets = np.full(50, 15)
    at_once = rec.ranks(fixed(scores), seen, targets).tolist()
    # 16 and 23 users at once
    for number in (0, 80):
        monkeypatch.setattr(rec, "SCORES_AT_ONCE", number)
        assert rec.ranks(fixed(scores), seen, targets).tolist() == at_once


def test_items_seen_long_ago_are_masked_too():
    """Guards: masking only the last MAX_LEN items, those that the model reads."""
    n = rec.MAX_LEN + 30
    scores = np.arange(n + 1, 0, -1)  # item 1 best, item n worst
    assert rec.ranks(fixed([scores]), [np.arange(1, n)], [n]).tolist() == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_target_score_that_is_not_finite_raises(value):
    """Guards: NaN compares false with everything, so a diverged model would rank every target
    first or last."""
    scores = np.ones((2, 6))
    scores[1, 5] = value
    with pytest.raises(ValueError, match="finite"):
        rec.ranks(fixed(scores), [np.array([1])] * 2, [5, 5])


def test_another_items_score_that_is_no_number_raises():
    """Guards: an item of score NaN, which is never counted as better than the target."""
    scores = np.ones((1, 6))
    scores[0, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        rec.ranks(fixed(scores), [np.array([1])], [5])


def test_a_target_among_the_seen_items_raises():
    """Guards: a split that repeats an item is an error of the data, not a rank."""
    with pytest.raises(ValueError, match="seen"):
        rec.ranks(fixed(np.ones((1, 6))), [np.array([1, 2])], [2])


def test_top_items_are_the_ten_best_unseen_items():
    """Guards: seen items or padding in the recommended lists (the audit and --explain read
    them)."""
    scores = np.arange(31.0)
    scores[0] = 99
    top = rec.top_items(fixed([scores]), [np.array([30, 28])])
    assert top.tolist() == [[29, 27, 26, 25, 24, 23, 22, 21, 20, 19]]


def test_lists_are_filled_up_with_0_where_few_items_are_left():
    """Guards: seen items at the end of a list that is longer than what is left to recommend."""
    (top,) = rec.top_items(fixed([[0, 5, 4, 3, 2]]), [np.array([1, 3])])
    assert top.tolist() == [2, 4, 0, 0]


def test_items_that_an_arm_did_not_consider_stand_behind_all_others_and_in_no_list():
    """Guards: a miss that beats something, a list filled up with misses in the order of their
    numbers."""
    scores = np.full((1, 31), rec.MISS)
    scores[0, [4, 9]] = 2, 1
    seen = [np.array([1, 2])]
    assert rec.ranks(fixed(scores), seen, [9]).tolist() == [2]
    # thirty items but the two seen, ties against us
    assert rec.ranks(fixed(scores), seen, [5]).tolist() == [28]
    assert rec.top_items(fixed(scores), seen).tolist() == [[4, 9] + [0] * 8]


# ------------------------------------------------------------------------------------------ model
@torch.no_grad()
def test_a_block_sees_nothing_after_its_position():
    """Guards: attention or a convolution that reads the padding, or the answer."""
    x, last = torch.randn(4, 10, 16), torch.tensor([0, 1, 5, 9])
    block = rec.Block(16, 2, 0.3).eval()
    block.local.copy_(torch.randn(rec.LOCAL, 16))
    changed = x.clone()
    for row, place in enumerate(last):
        changed[row, place + 1 :] = torch.randn(9 - place, 16)
    assert torch.equal(block(x, last), block(changed, last))


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_block_is_attention_and_convolution_by_brute_force(heads):
    """Guards: heads that are mixed up, a scale or a norm left out, an offset in the convolution,
    the state of a neighbour."""
    block = rec.Block(8, heads, 0.3).eval()
    block.local.copy_(torch.randn(rec.LOCAL, 8))
    x, last = torch.randn(3, 7, 8), [6, 0, 3]
    for row, place in enumerate(last):
        y = block.norm1(x[row])
        q, kv = block.q(y[place]), block.kv(y)
        heard = []
        for part in torch.arange(8).chunk(heads):
            keys, values = kv[: place + 1, part], kv[: place + 1, 8 + part]
            shares = (keys @ q[part] / len(part) ** 0.5).softmax(0)
            heard.append(shares @ values)
        local = torch.zeros(8)
        for ago in range(min(rec.LOCAL, place + 1)):
            local += block.local[rec.LOCAL - 1 - ago] * y[place - ago]
        state = x[row, place] + block.out(torch.cat(heard)) + local
        state = state + block.down(F.gelu(block.up(block.norm2(state))))
        assert torch.allclose(block(x, torch.tensor(last))[row], state, atol=1e-5)


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_padded_batch(small_model):
    """Guards: padding that shifts positions or is attended to."""
    short, long = np.array([3, 1, 4]), np.arange(1, 21)
    ids = rec.pad([short, long])
    assert ids[0].tolist() == [3, 1, 4] + [0] * 17
    table = small_model.table()
    both, alone = small_model(ids, table), small_model(rec.pad([short]), table)
    assert torch.allclose(both[0], alone[0], atol=1e-5)
    score = rec.scorer(small_model)
    assert torch.allclose(score([short, long])[0], score([short])[0], atol=1e-5)


@torch.no_grad()
def test_scorer_reads_the_last_real_position_of_long_and_short_histories(small_model):
    """Guards: the state at a padded position, or MAX_LEN counted from the wrong end."""
    long = np.random.default_rng(0).integers(1, 31, rec.MAX_LEN + 25)
    scores, table = rec.scorer(small_model)([long, long[-4:]]), small_model.table()
    assert scores.shape == (2, 31)
    for row, read in zip(scores, (long[-rec.MAX_LEN :], long[-4:]), strict=True):
        state = small_model(torch.tensor(read)[None], table)[0]
        assert torch.allclose(row, table @ state, atol=1e-5)


def test_the_table_is_id_embeddings_plus_projected_features():
    """Guards: features that reach the input but not the output table, dropout left on when
    ranking, a padding row that moves."""
    features = features_of(30, 5)
    model = rec.SASRec(30, rec.Inputs(features), width=16).eval()
    content = features @ model.project.weight.T
    expected = F.normalize(model.item.weight + content, dim=-1)
    assert torch.allclose(model.table(), expected, atol=1e-6)
    assert torch.equal(model.table(), model.table())
    assert model.table()[0].abs().max() == 0


def test_the_arms_share_their_first_weights_and_the_shape_of_their_scores():
    """Guards: arms that start from different random numbers, which looks like an effect; two ways
    to score that drift apart."""
    models = []
    for features in (None, torch.randn(31, 5)):
        torch.manual_seed(3)
        models.append(rec.SASRec(30, rec.Inputs(features), width=16))
    plain, content = (model.state_dict() for model in models)
    assert set(content) - set(plain) == {"features", "project.weight"}
    for name, weights in plain.items():
        assert torch.equal(weights, content[name]), name
    for model in models:
        scores = rec.scorer(model)([np.array([1, 2])])
        assert model.table().shape == (31, 16)
        assert scores.shape == (1, 31)
        assert scores.dtype == torch.float32


@torch.no_grad()
def test_states_and_table_have_fixed_norms(small_model):
    """Guards: a popular item that wins by the length of its vector; a temperature that reaches one
    side only."""
    table = small_model.table()
    assert torch.allclose(table[1:].norm(dim=1), torch.ones(30), atol=1e-5)
    state = small_model(torch.tensor([[1, 2, 3]]), table)
    assert state.norm().item() == pytest.approx(1 / small_model.log_tau.exp().item(), rel=1e-5)


def test_inputs_are_item_vectors_of_norm_sqrt_width_plus_positions_from_the_last_item():
    """Guards: item vectors drowned by the positions, or a position counted from the first item or
    from the padding; a block that is asked at another place than the last item's."""
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, last):
            seen.append((x, last))
            return x[:, -1]

    model = rec.SASRec(5, width=8).eval()
    model.block = Spy()
    ids, table = torch.tensor([[3, 1, 4], [2, 5, 0]]), model.table()
    model(ids, table)
    # of a padded position nothing is read
    positions = model.pos.weight[torch.tensor([[2, 1, 0], [1, 0, 0]])]
    ((x, last),) = seen
    assert torch.allclose(x, table[ids] * 8**0.5 + positions, atol=1e-5)
    assert last.tolist() == [2, 1]


def test_projected_features_lose_dimensions_to_dropout():
    """Guards: dropout of raw features (a dense product for every step, and worse on Beauty)."""
    model = rec.SASRec(400, rec.Inputs(torch.randn(401, 16)), dropout=0.3).train()
    torch.nn.init.zeros_(model.item.weight)
    lost = (model.table()[1:] == 0).float().mean().item()
    assert lost == pytest.approx(0.3, abs=0.02)


def test_the_convolution_starts_at_nothing():
    """Guards: the noise of a random filter over the last items."""
    assert rec.SASRec(5).block.local.abs().max() == 0


@pytest.mark.parametrize("norm", [0.2, 3.0])
def test_projected_features_start_at_their_norm(monkeypatch, norm):
    """Guards: features so short that the ID embeddings, which learn faster, leave them nothing to
    say."""
    monkeypatch.setattr(rec, "FEATURE_NORM", norm)
    model = rec.SASRec(400, rec.Inputs(F.normalize(torch.randn(401, 32), dim=-1)))
    found = model.project(model.features).norm(dim=-1).mean().item()
    assert found == pytest.approx(norm, rel=0.2)


def test_id_embeddings_start_as_those_given_and_train_on():
    """Guards: a fair baseline that starts at random, or whose titles are frozen."""
    inputs = rec.Inputs(initial=torch.randn(13, 16))
    start = rec.SASRec(12, inputs, width=16).item.weight
    assert torch.equal(start[1:], inputs.initial[1:])
    assert start[0].abs().max() == 0
    trained, _ = quick(ring(), inputs)
    assert not torch.equal(trained.item.weight[1:], inputs.initial[1:])


# --------------------------------------------------------------------------------- arms without IDs
def test_an_arm_without_ids_knows_an_item_by_its_features_alone():
    """Guards: IDs that are zero at first and then learnt, averaged in, or given by titles; items of
    equal features that a model can tell apart."""
    features = features_of(12)
    features[7] = features[3]
    inputs = rec.Inputs(features, initial=torch.randn(13, 16), ids=False)
    start = rec.SASRec(12, inputs, width=16).eval()
    trained, _ = quick(ring(), inputs)
    for model in (start, trained.eval()):
        assert not model.item.weight.any()
        content = F.normalize(features @ model.project.weight.T, dim=-1)
        assert torch.allclose(model.table(), content, atol=1e-6)
        assert torch.equal(model.table()[7], model.table()[3])
    assert not torch.equal(start.project.weight, trained.project.weight), "the features are trained"


def test_an_arm_without_ids_shares_its_first_weights_with_the_arm_with_ids():
    """Guards: two families of arms that differ in more than their IDs."""
    models = []
    for ids in (True, False):
        torch.manual_seed(3)
        models.append(rec.SASRec(12, rec.Inputs(features_of(12), ids=ids), width=16))
    own, without = (model.state_dict() for model in models)
    assert list(own) == list(without)
    for name, weights in own.items():
        assert torch.equal(weights, without[name]) == (name != "item.weight"), name


# --------------------------------------------------------------------------------------- training
def test_training_samples_are_every_history_with_its_next_item():
    """Guards: a history that runs into another user's or that is missed; a target beside its
    history."""
    sequences = [np.array([1, 2, 3]), np.array([6]), np.array([7, 8])]
    histories, targets, users = rec.training_samples(sequences)
    assert [history.tolist() for history in histories] == [[1], [1, 2], [7]]
    assert targets == (2, 3, 8)
    assert users == (0, 0, 2)


def test_the_loss_is_over_every_real_next_item_and_nothing_else(monkeypatch):
    """Guards: loss on padding, the first item as a target, the valid item in training, a history
    left out, a softmax over less than the catalogue."""
    data, told, widths, real = ring(), [], set(), F.cross_entropy
    # longer than the model reads, and nothing to predict
    data.train.append(np.random.default_rng(0).integers(1, 13, rec.MAX_LEN + 9))
    data.train.append(np.array([7]))
    data.valid = np.append(data.valid, [0, 0])

    def cross_entropy(logits, targets):
        widths.add(logits.shape[1])
        told.extend((targets + 1).tolist())
        return real(logits, targets)

    def no_ranks(score, sequences, targets):
        return np.ones(1, dtype=int)

    monkeypatch.setattr(rec.F, "cross_entropy", cross_entropy)
    monkeypatch.setattr(rec, "ranks", no_ranks)  # selection is not looked at here
    quick(data, epochs=1)
    expected = np.concatenate([sequence[1:] for sequence in data.train])
    assert sorted(told) == sorted(expected.tolist())
    assert 0 not in told
    assert widths == {data.n_items}


@torch.no_grad()
def test_the_loss_equals_its_formula(small_model):
    """Guards: a target shifted by the padding item, a sum in place of the mean."""
    ids, targets = torch.tensor([[3, 1, 4], [2, 5, 0]]), torch.tensor([9, 30])
    table = small_model.table()
    logits = small_model(ids, table) @ table.T
    losses = []
    for row, target in zip(logits, targets, strict=True):
        shares = row[1:].exp() / row[1:].exp().sum()
        losses.append(-shares[target - 1].log())
    found = rec.next_item_loss(small_model, ids, targets)
    assert found.item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)


def test_training_learns_a_deterministic_ring_and_carries_on_to_test():
    """Guards: shifted targets, a table that is not trained, scores of the wrong position: any of
    them ends near chance (.3)."""
    data = ring()
    model, log = quick(data, epochs=30, width=32, lr=1e-2, dropout=0.1)
    known = [np.append(s, v) for s, v in zip(data.train, data.valid, strict=True)]
    rank = rec.ranks(rec.scorer(model), known, data.test)
    assert log["valid_ndcg@10"] > 0.97
    assert rec.metrics(rank)["ndcg@10"].mean() > 0.9


def test_features_count_in_the_history_and_in_the_ranking_and_are_trained():
    """Guards: features that are stored but reach only one side, or a projection that never gets a
    gradient."""
    inputs = rec.Inputs(features_of(12))
    model, _ = quick(ring(), inputs)
    torch.manual_seed(0)
    fresh = rec.SASRec(12, inputs, width=16)
    assert not torch.equal(model.project.weight, fresh.project.weight)
    histories = [np.array([5]), np.array([1])]
    before = rec.scorer(model)(histories)
    model.features[5] += 1
    change = (rec.scorer(model)(histories) - before).abs()
    # in the history item 5 moves every item's score, as a candidate its own alone
    assert change[0, 1:].min() > 0
    assert torch.nonzero(change[1]).flatten().tolist() == [5]


def test_same_seed_same_model_bit_for_bit_and_another_seed_differs():
    """Guards: initial weights, order or dropout drawn outside the seed, or from whatever ran
    before."""
    data, inputs = ring(), rec.Inputs(features_of(12))
    first, _ = quick(data, inputs, seed=5)
    # somebody else draws
    torch.rand(7)
    np.random.rand(7)
    again, _ = quick(data, inputs, seed=5)
    other, _ = quick(data, inputs, seed=6)
    assert_same_weights(first, again)
    assert not torch.equal(first.item.weight, other.item.weight)


def test_few_users_still_make_eight_steps_an_epoch(steps):
    """Guards: a batch as large as the data, two steps an epoch and an early stop before anything
    is learnt."""
    quick(ring(n_users=400), epochs=1, batch=10_000)
    assert len(steps) == 8


def test_the_best_epoch_is_given_back_and_training_stops_early(monkeypatch):
    """Guards: the last epoch's weights under the best epoch's figure; patience that never ends."""
    monkeypatch.setattr(rec, "MIN_STEPS", 0)
    monkeypatch.setattr(rec, "EVERY", 1)

    def run(values, **changes):
        stub_validation(monkeypatch, values)
        return quick(ring(), **changes)

    stopped, log = run([0.2, 0.5, *[0.1] * 6], epochs=8, patience=2)
    assert log == {"epochs": 4, "best_epoch": 2, "valid_ndcg@10": 0.5}
    two, _ = run([0.2, 0.5], epochs=2)
    three, _ = run([0.2, 0.5, 0.6], epochs=3)
    assert_same_weights(stopped, two)
    assert not torch.equal(stopped.item.weight, three.item.weight)
    assert not stopped.training


@pytest.mark.slow
@pytest.mark.parametrize("n_users, steps_an_epoch", [(32, 8), (100, 25)])
def test_no_early_stop_before_the_least_steps(monkeypatch, n_users, steps_an_epoch):
    """Guards: a run that stops in the dip with which large features start, before the rise behind
    it; a least number of epochs instead of steps, which small data (eight steps an epoch) is
    through with before the rise."""
    monkeypatch.setattr(rec, "EVERY", 1)
    data, least = ring(n_users=n_users), math.ceil(rec.MIN_STEPS / steps_an_epoch)

    def run(values):
        stub_validation(monkeypatch, values)
        _, log = quick(data, epochs=60, patience=2)
        return log

    dip = [0.3] + [0.1] * (least - 3)
    assert run([*dip, 0.5, *[0.1] * 9])["best_epoch"] == least - 1
    assert run([*dip, *[0.1] * 10]) == {"epochs": least, "best_epoch": 1, "valid_ndcg@10": 0.3}


@pytest.mark.parametrize("epochs, expected", [(1, 1), (2, 1), (5, 3)])
def test_validation_is_looked_at_every_second_epoch_and_after_the_last(
    monkeypatch, epochs, expected
):
    """Guards: a last epoch that nobody looks at, so that its weights can never be the best."""
    looks, real = [], rec.metrics

    def metrics(rank):
        looks.append(rank)
        return real(rank)

    monkeypatch.setattr(rec, "metrics", metrics)
    quick(ring(), epochs=epochs)
    assert len(looks) == expected


@pytest.mark.parametrize(
    "batch, fall_epochs, fall_steps, expected",
    # of 192 samples: eight steps an epoch, and ten of which the last is a part of one
    [(24, 3, 5, 24), (24, 2, 24, 24), (20, 3, 5, 30), (20, 2, 30, 30)],
)
def test_the_learning_rate_falls_to_nothing_over_the_longer_of_both(
    monkeypatch, batch, fall_epochs, fall_steps, expected
):
    """Guards: a rate that rises again or stays; epochs of a rate of 0; small data whose rate is
    gone before it has learnt."""
    monkeypatch.setattr(rec, "FALL_EPOCHS", fall_epochs)
    monkeypatch.setattr(rec, "FALL_STEPS", fall_steps)
    rates, real = [], torch.optim.AdamW.step

    def step(self, *args, **settings):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    _, log = quick(ring(), epochs=60, batch=batch, patience=9, lr=0.3)
    assert log["epochs"] == 3
    assert rates == pytest.approx([0.3 * (1 - k / expected) for k in range(expected)])


def test_validation_sees_the_average_of_the_weights(monkeypatch, steps):
    """Guards: an average that is kept but never used, or one that forgets everything but the last
    step."""
    seen, real = [], rec.scorer

    def scorer(model):
        seen.append(next(model.parameters()).detach().clone())
        return real(model)

    monkeypatch.setattr(rec, "scorer", scorer)
    kept, _ = quick(ring(), epochs=1, batch=24)  # 8 steps; the average reaches back as far
    weights = torch.stack(steps)
    assert len(steps) == 8
    assert torch.equal(next(kept.parameters()), seen[0])
    assert not torch.equal(seen[0], weights[-1])
    assert (seen[0] >= weights.amin(0) - 1e-6).all()
    assert (seen[0] <= weights.amax(0) + 1e-6).all()


def test_the_average_reaches_back_about_an_epoch(monkeypatch):
    """Guards: an average over the whole run or over a step."""
    averages = []

    class Spy(AveragedModel):
        def __init__(self, model, avg_fn):
            super().__init__(model, avg_fn=avg_fn)
            averages.append(avg_fn)

    monkeypatch.setattr(rec, "AveragedModel", Spy)
    quick(ring(n_users=24, length=8), epochs=1, batch=16)
    samples = 24 * 7
    zero, one = torch.zeros(1), torch.ones(1)
    assert averages[0](zero, one, 10**6).item() == pytest.approx(16 / samples, abs=1e-6)
    assert averages[0](zero, one, 0).item() == pytest.approx(0.9)


def test_batches_are_made_by_the_length_that_the_model_sees(monkeypatch):
    """Guards: batches sorted by the length of a whole history, which the model cuts at MAX_LEN."""
    seen, real = [], rec.batches

    def batches(lengths, batch, rng):
        seen.append(lengths.tolist())
        return real(lengths, batch, rng)

    monkeypatch.setattr(rec, "batches", batches)
    data = ring(n_users=24, length=8)
    data.train[0] = np.tile(data.train[0], 10)
    quick(data, epochs=1)
    expected = []
    for sequence in data.train:
        expected += [min(t, rec.MAX_LEN) for t in range(1, len(sequence))]
    assert seen == [expected]


def test_batches_visit_every_sample_once_and_pad_little():
    """Guards: samples left out or trained twice; batches sorted by length, short ones first."""
    lengths = np.random.default_rng(1).integers(2, 51, 1000)
    found = list(rec.batches(lengths, 32, np.random.default_rng(0)))
    assert sorted(np.concatenate(found)) == list(range(1000))
    assert max(map(len, found)) == 32
    padded = sum(len(rows) * lengths[rows].max() for rows in found)
    assert padded < 1.2 * lengths.sum()
    means = [lengths[rows].mean() for rows in found[:16]]
    assert means != sorted(means)
    other = list(rec.batches(lengths, 32, np.random.default_rng(1)))
    assert not np.array_equal(found[0], other[0])


def test_every_epoch_draws_its_own_numbers_from_seed_and_epoch(monkeypatch):
    """Guards: the same batches in every epoch or for every seed; dropout that goes on from
    whatever ran before."""
    orders, torch_seeds, real = [], [], rec.batches

    def batches(lengths, batch, rng):
        rows = list(real(lengths, batch, rng))
        orders.append(np.concatenate(rows).tolist())
        torch_seeds.append(torch.initial_seed())
        return rows

    monkeypatch.setattr(rec, "batches", batches)
    quick(ring(), epochs=2, seed=1)
    quick(ring(), epochs=2, seed=2)
    # two seeds, two epochs
    assert len(set(map(str, orders))) == 4
    assert len(set(torch_seeds)) == 4
    torch.manual_seed(99)
    quick(ring(), epochs=2, seed=1)
    assert orders[4:] == orders[:2]
    assert torch_seeds[4:] == torch_seeds[:2]


def test_test_items_are_not_read_before_training_has_ended(monkeypatch):
    """Guards: the epoch chosen on test. `train` is given no test items, `fit_arm` looks at them
    only after `train` has returned, and other test items leave the model and its validation
    figures bit for bit as they were."""
    trained, real = [], rec.train

    class Sealed(SimpleNamespace):
        @property
        def test(self):
            assert trained, "test items read before training ended"
            return self.answers

    def train(data, *args):
        result = real(data, *args)
        trained.append(data)
        return result

    def run(answers):
        trained.clear()
        fields = {name: value for name, value in vars(ring()).items() if name != "test"}
        data = Sealed(**fields, answers=answers)
        return rec.fit_arm("id", data, rec.Inputs(), config(epochs=2), 0)

    assert not any("test" in name for name in inspect.signature(real).parameters)
    assert not any("test" in field.name for field in dataclasses.fields(rec.TrainConfig))
    monkeypatch.setattr(rec, "train", train)
    data, others = ring(), []
    for sequence, valid, test in zip(data.train, data.valid, data.test, strict=True):
        free = set(range(1, 13)) - {*sequence.tolist(), int(valid), int(test)}
        others.append(min(free))
    first, second = run(data.test), run(np.array(others))
    assert torch.equal(first["valid_ranks"], second["valid_ranks"])
    assert not torch.equal(first["ranks"], second["ranks"])
    assert first["model"]
    assert_same_weights(first["model"], second["model"])


# ---------------------------------------------------------------------------------- the baselines
def toy():
    """Four short sequences over items 1..6; counts 3, 3, 2, 2, 1, 0."""
    train = [np.array(s) for s in ([1, 2, 3], [1, 2, 4], [3, 2, 4], [1, 5])]
    return SimpleNamespace(n_items=6, train=train, counts=np.array([0, 3, 3, 2, 2, 1, 0]))


def test_popularity_by_hand():
    """Guards: counts of padding, of valid or of distinct users only."""
    data = toy()
    scores = rec.popularity(data)([data.train[0], data.train[3]])
    assert scores.tolist() == [[0, 3, 3, 2, 2, 1, 0]] * 2


def test_markov_by_hand():
    """Guards: reversed transitions, popularity that outweighs a transition, state kept from one
    user to the next."""
    after_2, after_6, again = rec.markov(toy())([np.array(s) for s in ([5, 2], [6], [2])])
    assert torch.equal(after_2, again)
    # 2 -> 4 twice, 2 -> 3 once, then popularity
    assert after_2.argsort(descending=True)[:2].tolist() == [4, 3]
    assert after_2[3] > after_2[1]
    assert after_2[1] == after_2[2]
    # nothing follows 6: popularity alone
    assert after_6.argsort(descending=True, stable=True)[:5].tolist() == [1, 2, 3, 4, 5]
    assert after_6.max() < 1
    assert after_6[6] == 0


def test_markov_equals_a_count_of_transitions():
    """Guards: a transition counted once where it came twice, popularity of the wrong scale."""
    rng = np.random.default_rng(0)
    train = [rng.integers(1, 9, rng.integers(1, 12)) for _ in range(60)]
    counts = Counter(int(i) for sequence in train for i in sequence)
    pairs = Counter()
    for sequence in train:
        for before, after in zip(sequence[:-1], sequence[1:], strict=True):
            pairs[int(before), int(after)] += 1
    data = SimpleNamespace(n_items=9, train=train, counts=np.array([counts[i] for i in range(10)]))
    scores = rec.markov(data)([np.array([4, last]) for last in range(1, 10)])
    most = max(counts.values())
    for last in range(1, 10):
        for item in range(10):
            expected = pairs[last, item] + counts[item] / (most + 1)
            assert scores[last - 1, item].item() == pytest.approx(expected)


def zeros(sequences, users=None):
    """A score function that knows nothing of the seven items of `toy`."""
    return torch.zeros(len(sequences), 7)


def test_the_transition_term_by_hand():
    """Guards: reversed transitions, steps that all count alike, sums of logarithms, more than three
    items back."""
    score = rec.with_transitions(zeros, rec.followers(toy()), 2.0)
    long, short, nothing = score([np.array(s) for s in ([3, 1, 3, 2], [1], [6])])
    # 2 was followed by 3 and twice by 4; 3 by 2, then 4; 1 twice by 2, by 5, then 3 and 4
    after_2 = torch.tensor([0, 0, 0, 1, 2, 0, 0])
    after_3 = torch.tensor([0, 0, 1, 0, 1 / 2, 0, 0])
    after_1 = torch.tensor([0, 0, 2, 1 / 2, 1 / 2, 1, 0])
    assert torch.allclose(long, 2 * torch.log(1 + after_2 + after_3 / 2 + after_1 / 4))
    assert torch.allclose(short, 2 * torch.log(1 + after_1))
    assert not nothing.any()


def test_the_transition_term_equals_a_dense_sum():
    """Guards: transitions of one user in another's row, doubles that are lost, sums of a batch that
    are still there in the next."""
    rng = np.random.default_rng(0)
    train = [rng.integers(1, 9, rng.integers(1, 12)) for _ in range(60)]
    T = np.zeros((10, 10))
    for sequence in train:
        for step in (1, 2, 3):
            for before, after in zip(sequence[:-step], sequence[step:], strict=True):
                T[before, after] += 2 / 2**step
    base = torch.rand(60, 10)

    def score(sequences, users):
        return base.clone()

    followed = rec.followers(SimpleNamespace(train=train, counts=np.zeros(10)))
    term = rec.with_transitions(score, followed, 0.7)
    term(train[:20])
    scores = term(train).numpy()
    for row, sequence in enumerate(train):
        recent = zip(sequence[::-1], (1, 1 / 2, 1 / 4), strict=False)
        expected = 0.7 * np.log1p(sum(T[item] * share for item, share in recent))
        assert np.allclose(scores[row], base[row].numpy() + expected, atol=1e-6)


def test_what_is_alike_counts_like_what_followed():
    """Guards: an item as its own neighbour, padding as one, opposites, neighbours without end."""
    features = torch.tensor([[0.0, 0], [3, 0], [1, 0], [1, 1], [0, 2], [-1, 0], [0, -1]])
    followed = rec.followers(toy(), features)
    plain = rec.followers(toy())
    assert followed.starts[:2].tolist() == plain.starts[:2].tolist() == [0, 0]
    counted = plain.starts[2]
    assert followed.items[:counted].tolist() == plain.items[:counted].tolist()
    assert followed.weights[:counted].tolist() == plain.weights[:counted].tolist()
    mine = slice(counted, followed.starts[2])
    pairs = zip(followed.items[mine].tolist(), followed.weights[mine].tolist(), strict=True)
    alike = dict(pairs)
    near = {item: weight for item, weight in alike.items() if weight}
    assert near == {2: 1.0, 3: pytest.approx(0.5**0.5)}
    assert followed.alike.sum() == len(followed.items) - len(plain.items)
    assert followed.alike[mine].all()
    assert not plain.alike.any()


def test_likeness_weighs_what_is_alike_alone():
    """Guards: likeness that weighs transitions too, or nothing, or outside the logarithm."""
    features = torch.tensor([[0.0, 0], [3, 0], [1, 0], [1, 1], [0, 2], [-1, 0], [0, -1]])
    followed = rec.followers(toy(), features)
    (scores,) = rec.with_transitions(zeros, followed, 2.0, likeness=4.0)([np.array([1])])
    # 1 was followed twice by 2, by 5, then 3 and 4; 2 and 3 are like it
    sums = torch.tensor([0, 0, 2 + 4 * 1, 1 / 2 + 4 * 0.5**0.5, 1 / 2, 1, 0])
    assert torch.allclose(scores, 2 * torch.log(1 + sums))


def test_few_neighbours_are_the_nearest(monkeypatch):
    """Guards: the first items in place of the nearest; parts of a large catalogue mixed up."""
    features = features_of(12)
    cosines = F.normalize(features, dim=-1) @ F.normalize(features, dim=-1).T
    data = SimpleNamespace(train=[np.array([3])], counts=np.zeros(13))
    monkeypatch.setattr(rec, "NEIGHBOURS", 3)
    monkeypatch.setattr(rec, "SCORES_AT_ONCE", 6)
    followed = rec.followers(data, features)
    assert followed.starts.tolist() == [0, *range(0, 37, 3)]
    for item in range(1, 13):
        mine = slice(3 * item - 3, 3 * item)
        others = [k for k in range(1, 13) if k != item]
        best = sorted(others, key=lambda k: -cosines[item, k])[:3]
        assert followed.items[mine].tolist() == best
        assert np.allclose(followed.weights[mine], cosines[item, best].clamp(min=0))


def test_validation_alone_weighs_the_transition_term():
    """Guards: a weight chosen on test, or kept where it does harm."""
    data = ring()
    del data.test
    n = data.n_items
    followed = rec.followers(data)

    def knows_nothing(sequences, users):
        return torch.zeros(len(sequences), n + 1)

    def knows_better(sequences, users):
        scores = torch.zeros(len(sequences), n + 1)
        scores[range(len(sequences)), data.valid[list(users)]] = 1e-3
        return scores

    assert rec.best_term(knows_nothing, data, followed)[0] > 0
    # now everybody jumps over two items: the ring misleads
    data.valid = np.array([(sequence[-1] + 2) % n + 1 for sequence in data.train])
    assert rec.best_term(knows_better, data, followed)[0] == 0


@pytest.mark.parametrize("best", rec.LIKENESS)
def test_validation_chooses_weight_and_likeness_together(best, monkeypatch):
    """Guards: likeness that is chosen before the weight, or for arms without features."""
    data, tried = ring(), []

    def with_transitions(score, followed, weight, likeness):
        tried.append((weight, likeness))

        def scores(sequences, users):
            table = torch.zeros(len(sequences), data.n_items + 1)
            good = (weight, likeness) == (0.7, best)
            table[range(len(sequences)), data.valid[list(users)]] = 1.0 if good else -1.0
            return table

        return scores

    monkeypatch.setattr(rec, "with_transitions", with_transitions)
    with_features = rec.followers(data, features_of(12))
    assert rec.best_term(None, data, with_features) == (0.7, best)
    assert len(set(tried)) == len(rec.WEIGHTS) * len(rec.LIKENESS)
    tried.clear()
    rec.best_term(None, data, rec.followers(data))
    assert len(tried) == len(rec.WEIGHTS)


@pytest.mark.parametrize("ids", [True, False])
def test_an_arm_without_ids_has_no_transition_term(ids, monkeypatch):
    """Guards: counts of an item's ID in an arm that stands for items that are new."""
    monkeypatch.setattr(rec, "best_term", lambda score, data, followed: (0.5, 4.0))
    inputs = rec.Inputs(features_of(12), ids=ids)
    fit = rec.fit_arm("content", ring(), inputs, config(epochs=1), 0)
    assert fit["transition_weight"] == 0.5 * ids
    assert fit["likeness"] == 4.0 * ids


def test_the_ranks_of_an_arm_have_the_transition_term(monkeypatch):
    """Guards: a term that validation has chosen and test goes without."""
    monkeypatch.setattr(rec, "best_term", lambda score, data, followed: (100.0, 1.0))
    fit = rec.fit_arm("id", ring(), rec.Inputs(), config(epochs=1), 0)
    assert fit["ranks"].tolist() == fit["valid_ranks"].tolist() == [1] * 48


@pytest.mark.parametrize("baseline", [rec.popularity, rec.markov])
def test_baselines_do_not_keep_what_ranking_masks(baseline):
    """Guards: items seen by one user that are masked for the next one too."""
    data = toy()
    score = baseline(data)
    before = score(data.train)
    rec.ranks(score, data.train, [6, 6, 6, 6])
    assert torch.equal(score(data.train), before)


# ------------------------------------------------------------------- intervals, audit and slices
@pytest.fixture(scope="module")
def differences():
    """(seeds, users) values and differences of mean zero."""
    rng = np.random.default_rng(0)
    values = rng.random((3, 400))
    # mostly the users', the same with every seed: three seeds are not three times the users
    noise = rng.normal(0, 0.05, 400) + rng.normal(0, 0.02, (3, 400))
    return values, noise - noise.mean()


def test_the_bootstrap_of_equal_values_is_zero(differences):
    """Guards: unpaired resampling, an interval as wide as the users differ."""
    values, _ = differences
    assert rec.paired_bootstrap(values, values) == {"delta": 0, "ci95": [0, 0]}


def test_the_bootstrap_tells_a_difference_from_none(differences):
    """Guards: a - b the wrong way round, an interval that does not hold its own mean."""
    values, noise = differences
    delta, (low, high) = rec.paired_bootstrap(values + noise, values).values()
    assert abs(delta) < 1e-9
    assert low < 0 < high
    delta, (low, high) = rec.paired_bootstrap(values + 0.02 + noise, values).values()
    assert delta == pytest.approx(0.02)
    assert 0 < low < delta < high


def test_the_bootstrap_equals_a_second_implementation(differences):
    """Guards: seeds taken for users, a percentile of the wrong side: against resampling by
    multinomial counts, and against 3.92 standard errors."""
    values, noise = differences
    _, (low, high) = rec.paired_bootstrap(values + noise, values).values()
    per_user, n = noise.mean(0), noise.shape[1]
    drawn = np.random.default_rng(5).multinomial(n, np.full(n, 1 / n), size=4000)
    means = np.sort(drawn @ per_user / n)
    width = high - low
    assert low == pytest.approx(means[100], abs=0.07 * width)
    assert high == pytest.approx(means[-101], abs=0.07 * width)
    assert width == pytest.approx(3.92 * per_user.std() / n**0.5, rel=0.1)


def test_the_bootstrap_is_drawn_by_its_seed(differences):
    """Guards: draws that change from one report to the next."""
    values, noise = differences
    first = rec.paired_bootstrap(values + noise, values)
    assert rec.paired_bootstrap(values + noise, values) == first
    assert rec.paired_bootstrap(values + noise, values, seed=1) != first


@pytest.mark.slow
def test_nineteen_of_twenty_intervals_hold_the_truth():
    """Guards: an interval that is honest about its width but not about its place."""
    held = 0
    for seed in range(400):
        skewed = np.random.default_rng(seed).exponential(1.0, (1, 150))
        _, (low, high) = rec.paired_bootstrap(
            skewed, np.zeros((1, 150)), draws=600, seed=seed
        ).values()
        held += low < 1 < high
    # .95 less what 150 skewed users cost, and three standard errors of 400 repeats
    assert 0.89 < held / 400 < 0.985


def test_compare_pairs_the_arms_that_ran():
    """Guards: a - b the wrong way round, arms that did not run, the number of seeds."""
    ranks = {"curec": np.ones((2, 50), dtype=int), "content": np.full((2, 50), 2)}
    (row,) = rec.compare(ranks)
    delta = 1 - 1 / np.log2(3)
    assert row == {
        "a": "curec",
        "b": "content",
        "metric": "ndcg@10",
        "seeds": 2,
        "delta": pytest.approx(delta),
        "ci95": pytest.approx([delta, delta]),
    }


def entries_of(**values):
    """Of metrics.json: two seeds' test NDCG@10 an arm."""
    return {arm: {"test": {"ndcg@10": value}} for arm, value in values.items()}


def test_headroom_by_hand():
    """Guards: shares of the wrong difference; an arm without reasons that recovers something."""
    entries = entries_of(
        id=[0.01, 0.01], content=[0.05, 0.07], curec=[0.08, 0.10], oracle=[0.10, 0.10]
    )
    found = rec.headroom(entries)["headroom"]
    assert found["ndcg@10"] == pytest.approx(0.04)
    assert found["recovered"] == {"curec": pytest.approx(0.75)}


def test_headroom_of_both_families_by_hand():
    """Guards: an arm without IDs measured by the room of those with IDs, or the other way round;
    one family that hides the other."""
    entries = entries_of(content=[0.26, 0.28], curec=[0.27, 0.29], oracle=[0.31, 0.31])
    own = rec.headroom(entries)
    without = entries_of(
        **{"content-only": [0.08, 0.06], "curec-only": [0.25, 0.25], "oracle-only": [0.3, 0.32]}
    )
    alone = rec.headroom(without)
    assert own == {
        "headroom": {"ndcg@10": pytest.approx(0.04), "recovered": {"curec": pytest.approx(0.25)}}
    }
    assert alone == {
        "headroom_without_ids": {
            "ndcg@10": pytest.approx(0.24),
            "recovered": {"curec-only": pytest.approx(0.75)},
        }
    }
    assert rec.headroom(entries | without) == own | alone
    assert list(rec.headroom(entries | without)) == ["headroom", "headroom_without_ids"]


@pytest.mark.parametrize("oracle", [0.06, 0.05])
def test_where_there_is_no_room_nothing_recovers_a_share_of_it(oracle):
    """Guards: a division by nothing, or by less than nothing."""
    entries = entries_of(content=[0.05, 0.07], curec=[0.08, 0.10], oracle=[oracle, oracle])
    assert rec.headroom(entries)["headroom"]["recovered"] == {}


@pytest.mark.parametrize("missing", ["oracle", "content"])
def test_a_headroom_that_was_not_measured_is_absent(missing):
    """Guards: a headroom of zero in the report of a run without an oracle."""
    entries = entries_of(content=[0.05], curec=[0.08], oracle=[0.1])
    del entries[missing]
    assert rec.headroom(entries) == {}


def gini(shown):
    """Mean absolute difference of all pairs over twice the mean."""
    pairs = [abs(a - b) for a in shown for b in shown]
    return sum(pairs) / len(shown) ** 2 / (2 * sum(shown) / len(shown))


def test_audit_by_hand():
    """Guards: padding counted as an item, Gini of the wrong sign, popularity ranks off by one."""
    counts = np.array([0, 4, 3, 2, 1])  # popularity ranks 1, 2, 3, 4
    equal = rec.popularity_audit(np.array([[1, 2], [3, 4]]), counts)
    assert equal["coverage@10"] == 1
    assert equal["gini@10"] == pytest.approx(0)
    assert equal["mean_popularity_rank@10"] == 2.5
    one = rec.popularity_audit(np.array([[1, 0], [1, 0]]), counts)
    assert one["coverage@10"] == 0.25
    assert one["gini@10"] == pytest.approx(0.75)
    assert one["mean_popularity_rank@10"] == 1
    uneven = rec.popularity_audit(np.array([[1, 2], [1, 3]]), counts)
    assert uneven["gini@10"] == pytest.approx(gini([2, 1, 1, 0]))
    assert uneven["mean_popularity_rank@10"] == 1.75


def test_gini_equals_the_mean_difference_of_all_pairs():
    """Guards: a formula for sorted exposures that is used on unsorted ones."""
    rng = np.random.default_rng(0)
    top = np.minimum(rng.geometric(0.2, (50, 10)), 25)
    found = rec.popularity_audit(top, rng.permutation(26))
    shown = [int((top == item).sum()) for item in range(1, 26)]
    assert found["gini@10"] == pytest.approx(gini(shown))
    assert found["coverage@10"] == np.mean([n > 0 for n in shown])


def test_slices_by_hand():
    """Guards: counting valid or test choices as train; 'later' measured against the wrong event of
    the user."""
    data = SimpleNamespace(
        n_items=4,
        train=[np.array(s) for s in ([1, 2], [2, 3], [4, 1], [1, 2])],
        times=[np.array(t) for t in ([1, 5, 6, 7], [2, 8, 9, 10], [1, 2, 3, 4], [0, 1, 2, 8])],
        test=np.array([3, 4, 2, 3]),
        counts=np.array([0, 6, 9, 5, 6]),
    )
    slices = rec.user_slices(data)
    assert slices["train<=5"].tolist() == [True, False, False, True]
    # item 3 was chosen in train at 8, after user 0's test event at 7; item 4 at 1, before 10;
    # item 2 at 5, after 4; item 3 at 8, which is no later than 8
    assert slices["no_later_train"].tolist() == [False, True, False, True]


# ------------------------------------------------------------------------------------------- arms
def test_arms_compare_themselves_with_arms_that_exist_and_read_texts_that_exist():
    """Guards: a misspelt name in a row of ARMS, whose comparison then never appears."""
    texts = {"item", "reviews", "truth", *rec.REASON_TEXTS}
    for name, arm in rec.ARMS.items():
        assert set(arm.against) <= set(rec.ARMS) - {name}, name
        assert set(arm.texts) <= texts, name
        assert set(arm.methods.split()) <= {*rec.METHODS, "demo"}, name
        assert arm.preferences in ("", "own", "shuffled"), name


def test_arms_with_reasons_add_them_to_content():
    """Guards: an arm that is no content + reasons, and yet has a share of oracle - content."""
    for name, arm in rec.ARMS.items():
        if set(arm.texts) & set(rec.REASON_TEXTS):
            assert arm.texts[0] == "item", name


def test_the_arms_without_ids_read_what_the_same_arms_with_ids_read():
    """Guards: a family that differs in more than its IDs, so that its room and what is recovered of
    it say something else; an arm compared with one of the other family. The demo has no
    reviews."""
    without = [name for name, arm in rec.ARMS.items() if not arm.ids]
    kinds = "content placebo aligned rl bestof curec oracle".split()
    assert without == [f"{kind}-only" for kind in kinds]
    for name in without:
        arm, same = rec.ARMS[name], rec.ARMS[name.removesuffix("-only")]
        assert arm.texts == same.texts, name
        assert arm.methods == "demo", name
        expected = [f"{other}-only" for other in same.against if other not in ("id", "reviews")]
        assert list(arm.against) == expected, name


@pytest.mark.parametrize("texts, recovers", [(("item",), False), (("item", "rl"), True)])
def test_a_new_arm_is_one_row_of_the_table(monkeypatch, texts, recovers):
    """Guards: an arm that has to be named in more than one place; one without reasons that slips
    into the recovered headroom."""
    monkeypatch.setitem(rec.ARMS, "mine", rec.Arm(texts, ("content", "id", "oracle")))
    ranks = {"content": np.full((2, 50), 2), "mine": np.full((2, 50), 1), "id": np.full((2, 50), 3)}
    pairs = [(found["a"], found["b"]) for found in rec.compare(ranks)]
    assert pairs == [("content", "id"), ("mine", "content"), ("mine", "id")]
    entries = entries_of(content=[0.1], oracle=[0.3], curec=[0.2], mine=[0.25])
    recovered = rec.headroom(entries)["headroom"]["recovered"]
    assert recovered["curec"] == pytest.approx(0.5)
    assert ("mine" in recovered) == recovers
    if recovers:
        assert recovered["mine"] == pytest.approx(0.75)


def test_a_baseline_of_ones_own_is_asked(monkeypatch):
    """Guards: a new arm's baseline that is not asked."""
    data = ring()

    def backwards(data):
        def score(sequences, users=None):
            scores = torch.zeros(len(sequences), data.n_items + 1)
            for row, sequence in zip(scores, sequences, strict=True):
                row[(int(sequence[-1]) - 2) % data.n_items + 1] = 1
            return scores

        return score

    monkeypatch.setitem(rec.ARMS, "backwards", rec.Arm(baseline=backwards))
    fit = rec.fit_arm("backwards", data, rec.Inputs(), config(), 0)
    assert rec.arm_entry([fit], rec.user_slices(data))["test"]["hr@5"] == [0]
    assert fit["model"] == {}


def test_fit_arm_measures_test_and_valid_after_what_is_known_of_a_user():
    """Guards: the valid item left out of the history that ranks test, or left in that for valid."""
    data, asked = ring(), []

    def score(sequences, users):
        asked.append([s.tolist() for s in sequences])
        return torch.rand(len(sequences), data.n_items + 1)

    rec.fit_arm("knowledge", data, None, config(), 0, score)
    train = [s.tolist() for s in data.train]
    with_valid = [[*s, int(v)] for s, v in zip(train, data.valid, strict=True)]
    # test, valid, lists
    assert asked == [with_valid, train, with_valid]


def test_an_arms_entry_reports_each_slice(monkeypatch):
    """Guards: slices averaged over all users, a slice without users as zeros."""
    data = ring()
    first = np.arange(len(data.train)) < 5

    def user_slices(data):
        return {"first": first, "nobody": np.zeros(len(data.train), bool)}

    monkeypatch.setattr(rec, "user_slices", user_slices)
    fit = rec.fit_arm("id", data, rec.Inputs(), config(epochs=2), 7)
    entry = rec.arm_entry([fit], rec.user_slices(data))
    assert list(entry["slices"]) == ["first"]
    for name, values in rec.metrics(fit["ranks"].numpy()).items():
        assert entry["test"][name] == [pytest.approx(values.mean())]
        assert entry["slices"]["first"][name] == [pytest.approx(values[first].mean())]
    assert fit["ranks"].shape == (len(data.train),)
    assert "item.weight" in fit["model"]


def test_an_arms_entry_has_a_value_a_seed():
    """Guards: seeds overwritten by one another, the cost of one seed for that of all."""
    data, fits = ring(), []
    for seed in (7, 8):
        fits.append(rec.fit_arm("id", data, rec.Inputs(), config(epochs=2), seed))
    entry = rec.arm_entry(fits, rec.user_slices(data))
    assert entry["seeds"] == [7, 8]
    for k, fit in enumerate(fits):
        test, valid = (rec.mean_metrics(fit[name].numpy()) for name in ("ranks", "valid_ranks"))
        assert entry["test"]["ndcg@10"][k] == test["ndcg@10"]
        assert entry["valid"]["mrr"][k] == valid["mrr"]
    assert entry["train_s"] == pytest.approx(fits[0]["train_s"] + fits[1]["train_s"])
    assert entry["rank_ms_per_user"] > 0
    gini_of_each = [fit["audit"]["gini@10"] for fit in fits]
    assert entry["audit"]["gini@10"] == pytest.approx(np.mean(gini_of_each))
    assert not torch.equal(fits[0]["model"]["pos.weight"], fits[1]["model"]["pos.weight"])


def test_a_baseline_needs_no_training():
    """Guards: a SASRec under the name of a baseline."""
    data = ring()
    fit = rec.fit_arm("markov", data, rec.Inputs(), config(), 0)
    entry = rec.arm_entry([fit], rec.user_slices(data))
    assert fit["model"] == {}
    assert entry["seeds"] == [0]
    assert entry["test"]["ndcg@10"][0] > 0.99


def test_a_fit_is_kept_on_disk_as_plain_tensors_and_figures():
    """Guards: a fit that a resumed run could not load without trusting the file."""
    fit = rec.fit_arm("id", ring(), rec.Inputs(features_of(12)), config(epochs=1), 0)
    file = io.BytesIO()
    torch.save(fit, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    for name in ("seed", "audit", "train_s", "rank_ms_per_user"):
        assert again[name] == fit[name]
    for name in ("ranks", "valid_ranks"):
        assert torch.equal(again[name], fit[name])
    assert_same_weights(again["model"], fit["model"])


# ------------------------------------------------------------------------------- worker processes
def some_jobs(*arms):
    """Arguments of fit_arm for each of these arms."""
    data, inputs = ring(), rec.Inputs(features_of(12))
    return [(arm, data, inputs, config(epochs=1), 0) for arm in arms]


def assert_same_fit(fit, expected):
    assert fit["audit"] == expected["audit"]
    for name in ("ranks", "valid_ranks"):
        assert torch.equal(fit[name], expected[name])
    assert_same_weights(dict(fit["model"]), dict(expected["model"]))


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(rec.os, "cpu_count", lambda: 2)


@pytest.mark.parametrize(("device", "fits"), [("cpu", 5), ("cuda", 99)])
def test_small_runs_and_cuda_need_no_worker_processes(device, fits, monkeypatch, two_cores):
    """Guards: processes for a run that is too small for them, or several processes on one GPU."""
    monkeypatch.delattr(rec, "start_workers")
    jobs = some_jobs("markov", "popularity")
    assert [job for job, _ in rec.fit_all(jobs, device, fits)] == jobs


class Tell:
    """Data that cannot be used: the error says by whom."""

    @property
    def n_items(self):
        raise ValueError(os.getpid(), torch.get_num_threads(), type(rec.tqdm.get_lock()))


class Kill:
    """Data that ends who uses it, as the kernel does where memory is short."""

    @property
    def n_items(self):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def from_worker():
    """(job, function that gives its fit) from a worker process: two good jobs, one that ends in an
    error, one that ends the process, one behind it. No file can grow, as on a full disk; nor can
    shared memory, which is files in /dev/shm. (So few items need one thread only.)"""
    data = ring()
    large = rec.Inputs(features_of(12, size=2000), ids=False)
    lane = rec.Inputs(None, features_of(12, size=16), told(len(data.train)))
    jobs = [("content-only", data, large, config(), 1), ("lane", data, lane, config(), 2)]
    jobs += [("id", bad, large, config(), 0) for bad in (Tell(), Kill(), data)]
    start_workers = rec.start_workers
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "3")
        patch.setattr(rec.os, "cpu_count", lambda: 2)
        # one is enough to see
        patch.setattr(rec, "start_workers", lambda count: start_workers(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        try:
            done = list(rec.fit_all(jobs, "cpu", 6))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [job[:2] for job, _ in done] == [job[:2] for job in jobs]
    return done


def test_arms_in_worker_processes_equal_those_in_this_process(from_worker):
    """Guards: workers that draw other random numbers; tensors that need room in /dev/shm, of which
    a container has 64 MB."""
    for job, fit in from_worker[:2]:
        assert_same_fit(fit(), rec.fit_arm(*job))


def test_an_error_in_a_worker_process_is_told_with_its_place(from_worker):
    """Guards: also workers of many threads each, and locks that a killed one leaves behind."""
    _, fit = from_worker[2]
    with pytest.raises(ValueError) as error:
        fit()
    process, threads, lock = error.value.args
    assert process != os.getpid()
    assert threads == 1
    assert lock is type(RLock())
    assert "in n_items" in str(error.value.__cause__)


def test_a_killed_worker_is_an_error_of_its_arm_and_of_those_behind_it(from_worker):
    """Guards: an arm that is waited for for ever, or left out, after the kernel's OOM killer."""
    for _, fit in from_worker[3:]:
        with pytest.raises(BrokenProcessPool, match="terminated abruptly"):
            fit()


def no_more(*args, **settings):
    raise BlockingIOError(11, "Resource temporarily unavailable")


def no_thread(thread):
    raise RuntimeError("can't start new thread")


def assert_workers_end():
    # not join: the executor's thread joins as well, and one of the two comes too late to know
    end = time.monotonic() + 20
    while active_children() and time.monotonic() < end:
        time.sleep(0.05)
    assert active_children() == []


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (SemLock, "__init__", no_more),
        (SpawnProcess, "start", no_more),
        (Thread, "start", no_thread),
        # as of workers that wait for ever
        (rec, "START_SECONDS", 0.1),
    ],
)
def test_where_no_worker_can_be_started_the_arms_train_in_this_process(
    owner, name, value, monkeypatch, two_cores, capsys
):
    """Guards: an error, or a run that waits for ever, where a limit, as of `ulimit -u`, forbids
    processes or threads."""
    jobs = some_jobs("popularity", "id")
    torch.set_num_threads(2)
    with monkeypatch.context() as limit:
        limit.setattr(owner, name, value)
        done = list(rec.fit_all(jobs, "cpu", 6))
    assert capsys.readouterr().out.count("no process can be started") == 1
    assert torch.get_num_threads() == 1
    assert [job for job, _ in done] == jobs
    assert_same_fit(done[1][1](), rec.fit_arm(*jobs[1]))
    assert_workers_end()


@pytest.mark.slow
def test_no_worker_is_at_work_before_all_have_started(monkeypatch):
    """Guards: a worker that cannot start when another has begun: an error, for which all end."""
    start, started = SpawnProcess.start, []

    def start_and_stop_the_second(process):
        start(process)
        started.append(process)
        if len(started) == 2:
            os.kill(process.pid, signal.SIGSTOP)

    monkeypatch.setattr(SpawnProcess, "start", start_and_stop_the_second)
    # more than the first needs
    monkeypatch.setattr(rec, "START_SECONDS", 30)
    assert rec.start_workers(2) is None
    assert len(started) == 2
    assert_workers_end()


@pytest.mark.parametrize("cores", [1, 2])
def test_the_first_error_ends_the_arms_at_once_and_what_is_finished_is_kept(
    cores, monkeypatch, tmp_path
):
    """Guards: an arm that fails in its first second and is reported after all others, or under the
    name of another; finished arms that go with it."""
    fit_arm, stopped = rec.fit_arm, Event()

    def second_fails(*job):
        if job[-1] == 0:
            return fit_arm(*job)
        if job[-1] == 1:
            raise ValueError("a bug")
        stopped.wait(60)

    monkeypatch.setattr(rec, "fit_arm", second_fails)
    monkeypatch.setattr(rec.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(rec, "start_workers", lambda count: ThreadPoolExecutor(1))
    monkeypatch.setattr(rec, "stop_workers", stopped.set)
    run = curec.Run(SimpleNamespace(out=tmp_path, device="cpu", seed=0, seeds=6, epochs=1))
    (tmp_path / "state").mkdir()
    with pytest.raises(ValueError, match="a bug"):
        curec.train_and_test_arms(run, ring(), {"id": rec.Inputs()}, None)
    assert stopped.is_set() == (cores == 2)
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["arm-id.0.pt"]
    assert run.stage == "arm-id.1"


def test_fits_are_compared_in_the_order_of_their_seeds(monkeypatch, tmp_path):
    """Guards: seeds in the order in which they happened to finish; a finished fit made again."""

    def backwards(jobs, device, fits):
        for job in reversed(jobs):
            yield job, functools.partial(rec.fit_arm, *job)

    monkeypatch.setattr(rec, "fit_all", backwards)
    settings = SimpleNamespace(out=tmp_path, device="cpu", seed=4, seeds=3, epochs=1)
    (tmp_path / "state").mkdir()
    entries = []
    for _ in range(2):
        run = curec.Run(settings)
        curec.train_and_test_arms(run, ring(), {"id": rec.Inputs()}, None)
        entries.append(run.metrics["arms"]["id"])
        (tmp_path / "state/arm-id.5.pt").unlink()
    assert entries[0]["seeds"] == entries[1]["seeds"] == [4, 5, 6]
    assert entries[0]["test"] == entries[1]["test"]


def bars_disabled():
    """What a training tells its progress bar: None shows one on a terminal only."""
    told, real = [], rec.tqdm

    def tqdm(*args, disable, **settings):
        told.append(disable)
        return real(*args, disable=True, **settings)

    rec.tqdm = tqdm
    quick(ring(), epochs=1)
    rec.tqdm = real
    return told


def test_bars_are_shown_on_a_terminal_only_and_by_no_worker(monkeypatch):
    """Guards: bars in a log file, or none at all; several workers' bars on top of one another."""
    assert bars_disabled() == [None]
    monkeypatch.setattr(rec, "parent_process", object)
    assert bars_disabled() == [True]


PARENT = """
import os, sys, time
sys.path[:0] = {folders!r}
import recommender
from test_recommender import config, ring
if __name__ == "__main__":
    pool = recommender.start_workers(1)
    print(pool.submit(os.getpid).result(), flush=True)
    endless = config(epochs=10**9, patience=10**9)
    pool.submit(recommender.fit_arm, "id", ring(), recommender.Inputs(), endless, 0)
    time.sleep(300)
"""


def is_running(process):
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to look at")
def test_a_worker_ends_when_its_parent_is_gone(tmp_path):
    """Guards: processes left behind by a killed run, each with half a gigabyte."""
    code = tmp_path / "parent.py"
    folders = [str(Path(file).parent) for file in (rec.__file__, __file__)]
    code.write_text(PARENT.format(folders=folders))
    with subprocess.Popen([sys.executable, code], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.kill()
    assert worker != parent.pid
    deadline = time.monotonic() + 120
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not is_running(worker)


# ------------------------------------------------------------------------------------------- LANE
def told(n_users=4, size=6):
    """Preferences of users at two cuts, after 2 and 4 items."""
    generator = torch.Generator().manual_seed(0)
    vectors = F.pad(torch.randn(9, size, generator=generator), (0, 0, 1, 0))
    named = torch.randint(1, 10, (n_users, 2, 5), generator=generator)
    return vectors, named, torch.tensor([[2, 4]] * n_users)


def attention_of(m, state, wishes, head):
    """Outcome of one head (a slice of the width) of an attention layer, by hand."""
    q_bias, k_bias, v_bias = m.in_proj_bias.chunk(3)
    q = m.q_proj_weight @ state + q_bias
    keys = wishes @ m.k_proj_weight.T + k_bias
    values = wishes @ m.v_proj_weight.T + v_bias
    width = head.stop - head.start
    logits = [q[head] @ key[head] / width**0.5 for key in keys]
    shares = torch.stack(logits).softmax(0)
    return (shares[:, None] * values[:, head]).sum(0)


@torch.no_grad()
def test_alignment_is_attention_over_the_preferences_by_brute_force():
    """Guards: keys for values, a scale of the wrong width, weights of another head, a norm before
    the residual."""
    torch.manual_seed(0)
    layer, states = rec.Alignment(8, *told(), heads=2).eval(), torch.randn(3, 8)
    torch.nn.init.normal_(layer.attention.in_proj_bias)
    known = layer.known([0, 1, 3], [[1] * n for n in (2, 5, 4)])
    got = layer(states, known)
    for b in range(3):
        wishes = layer.vectors[known[b]]  # (5, 6)
        low = attention_of(layer.attention, states[b], wishes, slice(0, 4))
        high = attention_of(layer.attention, states[b], wishes, slice(4, 8))
        found = layer.attention.out_proj(torch.cat([low, high]))
        x = layer.norm1(states[b] + found)
        expected = layer.norm2(x + layer.down(F.gelu(layer.up(x))))
        assert torch.allclose(got[b], expected, atol=1e-5)


def test_a_history_knows_the_latest_cut_before_it_and_no_later_one():
    """Guards: preferences that were drawn from what is to be predicted."""
    layer = rec.Alignment(8, *told())
    known = layer.known([1] * 5, [[1] * n for n in (1, 2, 3, 4, 9)])
    assert known[0].tolist() == [0] * 5
    first, second = layer.named[1]
    for row, expected in zip(known[1:], (first, first, second, second), strict=True):
        assert torch.equal(row, expected)


@torch.no_grad()
def test_without_preferences_attention_adds_nothing():
    """Guards: a bias, or the average of nothing, that is added to a state without preferences."""
    layer, states = rec.Alignment(8, *told()).eval(), torch.randn(2, 8)
    torch.nn.init.normal_(layer.attention.out_proj.bias)
    known = torch.zeros(2, 5, dtype=torch.long)
    x = layer.norm1(states)
    expected = layer.norm2(x + layer.down(F.gelu(layer.up(x))))
    assert torch.allclose(layer(states, known), expected, atol=1e-6)


@pytest.fixture(scope="module")
def lane():
    """A trained model of the arm lane, and its data."""
    data = ring()
    inputs = rec.Inputs(initial=torch.randn(13, 16), preferences=told(len(data.train)))
    model, _ = quick(data, inputs)
    return model, data


def test_lane_ranks_each_user_by_their_own_preferences(lane):
    """Guards: preferences that reach training but not ranking, or another user's."""
    model, data = lane
    score, histories = rec.scorer(model), data.train[:6]
    together = score(histories, range(6))
    for u, history in enumerate(histories):
        assert torch.allclose(together[u], score([history], [u])[0], atol=1e-5)
    assert not torch.allclose(together, score(histories, range(6, 12)), atol=1e-3)


def test_lanes_layer_is_trained(lane):
    """Guards: a layer that stands beside the loss."""
    model, data = lane
    inputs = rec.Inputs(initial=torch.randn(13, 16), preferences=told(len(data.train)))
    torch.manual_seed(0)  # as `train` does
    fresh = rec.SASRec(12, inputs, width=16)
    assert not torch.equal(model.align.up.weight, fresh.align.up.weight)
    mine, other = model.align.attention, fresh.align.attention
    assert not torch.equal(mine.v_proj_weight, other.v_proj_weight)
