"""reward.py: the judge, its formula by hand, and what must not pay. A bag-of-words encoder keeps
it fast and exact.

    pytest tests/test_reward.py                   some seconds; -m slow: a judge that is trained
"""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import data as D
import reward

NOBODY = np.zeros(0, int)


def bag_of_words(texts):
    """One dimension an aspect of the demo world: the ideal frozen encoder."""
    rows = []
    for text in texts:
        said = text.split()
        rows.append([float(aspect in said) for aspect in D.ASPECTS])
    return torch.tensor(rows)


def answer(reason):
    return f"<think> x </think> <reason> {reason} </reason>"


def say(*phrases):
    """A well-formed answer that names two phrases."""
    return answer(D.REASON.format(*phrases))


@pytest.fixture(scope="module")
def shop():
    return D.demo(1, n_users=500, n_items=150)


@pytest.fixture(scope="module")
def judge(shop):
    """An untrained judge: a state is the plain mean of a history's embeddings."""
    made = reward.Judge(shop, bag_of_words)
    made.load_weights(made.model.state_dict())
    return made


@pytest.fixture(scope="module")
def period(shop):
    """All of train time."""
    return int(shop.events["time"].min()), int(shop.events["time"].max()) + 1


@pytest.fixture
def spied_auc(monkeypatch):
    """One entry for every look at the held-out events: (what was asked, the AUC)."""
    looks, real = [], reward.Judge.auc

    def auc(self, *asked):
        value = real(self, *asked)
        looks.append((asked, value))
        return value

    monkeypatch.setattr(reward.Judge, "auc", auc)
    return looks


# ------------------------------------------------------------------------------------- embeddings
def tiny_encoder(path):
    """A BERT of eight dimensions with a word-level tokenizer, as a model hub would give it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *D.ASPECTS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 64}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(words), intermediate_size=8, **size))
    model.save_pretrained(path)
    return model.eval()


@torch.no_grad()
def test_an_encoder_gives_the_mean_of_its_last_states(tmp_path):
    """Guards: padding in the mean, rows that come back in the order of their lengths."""
    model, (a, b, c) = tiny_encoder(tmp_path), D.ASPECTS[:3]
    encode = reward.load_encoder(str(tmp_path), batch=2)
    vectors = encode([f"{a} {b} {c}", a, f"{c} {b}"])
    for vector, ids in zip(vectors, ([2, 3, 4], [2], [4, 3]), strict=True):
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert torch.allclose(vector, states.mean(0), atol=1e-5)


def test_an_encoder_with_pickled_weights_is_refused(tmp_path):
    """Guards: weights of a model hub that can run code when they are read."""
    model = tiny_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        reward.load_encoder(str(tmp_path))


def test_an_encoder_with_code_of_its_own_is_refused(tmp_path):
    """Guards: Python files of a model hub that are run, a prompt that waits for an answer."""
    tiny_encoder(tmp_path)
    ran, path = tmp_path / "ran", tmp_path / "config.json"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import BertConfig as C, BertModel as M\n"
    (tmp_path / "mine.py").write_text(code)
    classes = {"AutoConfig": "mine.C", "AutoModel": "mine.M"}
    config = json.loads(path.read_text()) | {"model_type": "mine", "auto_map": classes}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="custom code"):
        reward.load_encoder(str(tmp_path))
    assert not ran.exists()


def test_whitening_centres_and_keeps_unit_scale():
    """Guards: a mean that all embeddings share, which makes every cosine large."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 20, generator=generator) * torch.arange(1, 21) + 3
    z = reward.whitening(x)(x)
    assert z.mean(0).abs().max() < 1e-4
    assert z.norm(dim=1).mean().item() == pytest.approx(1, abs=1e-5)


def test_features_of_arms_keep_384_dimensions_of_the_text():
    """Guards: an encoder's embeddings cut to the 128 that the judge reads (worse on Beauty)."""
    x = torch.randn(500, 400)
    assert reward.whitening(x)(x).shape == (500, 384)
    assert reward.whitening(x, reward.EMBEDDING_SIZE)(x).shape == (500, 128)


def test_whitening_leaves_out_dimensions_without_variance():
    """Guards: a division by nothing where fewer dimensions are used than there are."""
    x = torch.randn(50, 3) @ torch.randn(3, 10)
    z = reward.whitening(x)(x)
    assert z.shape == (50, 3)
    assert torch.isfinite(z).all()


def test_equal_reasons_are_encoded_once_and_to_the_last_bit(shop):
    """Guards: the rounding of a batch that makes a proposal better than the same current one."""
    asked = []

    def encode(texts):
        asked.append(list(texts))
        # as a batched encoder does: the rounding depends on the place in the batch
        return bag_of_words(texts) + 1e-6 * torch.randn(len(texts), len(D.ASPECTS))

    judge = reward.Judge(shop, encode)
    one, other = D.REASON.format("grip", "calm"), D.REASON.format("calm", "shade")
    swapped = D.REASON.format("calm", "grip")
    vectors = judge.encode([one, other, one, swapped])
    assert sorted(asked[-1]) == ["calm grip", "calm shade"]
    assert torch.equal(vectors[0], vectors[2])
    assert torch.equal(vectors[0], vectors[3])
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-3)


def test_the_encoder_never_reads_what_tells_the_item(shop):
    """Guards: brands, from which a judge could learn which item a reason is about."""
    asked = []

    def encode(texts):
        asked.extend(texts)
        return bag_of_words(texts)

    judge = reward.Judge(shop, encode)
    judge.encode([D.REASON.format("grip", shop.items[1]["brand"])])
    assert asked[-1] == "grip"
    read = {word for text in asked for word in text.split()}
    assert read == set(D.ASPECTS)


# ------------------------------------------------------------------------------------- the states
@torch.no_grad()
def test_padding_does_not_change_a_state(judge, shop):
    """Guards: a state read from a padding position, which depends on the rest of the batch."""
    model = copy.deepcopy(judge.model)
    # it starts at nothing, and stays so where epoch 0 wins
    torch.nn.init.normal_(model.out.weight)
    longest = int(shop.events["pos"].argmax())
    alone = model.states(judge.histories([3]), judge.items)
    batch = model.states(judge.histories([3, longest]), judge.items)
    assert torch.allclose(alone[0], batch[0], atol=1e-5)


def test_states_hold_the_past_only(shop):
    """Guards: a history that sees the choice itself or anything after it."""
    event = 40
    user, position = shop.events["user"][event], shop.events["pos"][event]
    assert shop.history(event).tolist() == shop.seqs[user][:position].tolist()
    seqs = [sequence.copy() for sequence in shop.seqs]
    seqs[user][position:] = seqs[user][position:][::-1]
    other = dataclasses.replace(shop, seqs=seqs)
    assert np.array_equal(history_read(other, event), history_read(shop, event))


def history_read(data, event):
    """What the user tower reads of an event."""
    judge = reward.Judge(data, bag_of_words)
    return judge.histories([event])[0].tolist()


def test_a_history_is_read_from_its_end(judge, monkeypatch):
    """Guards: the first items of a long history in place of the last ones."""
    monkeypatch.setattr(reward, "JUDGE_HISTORY", 2)
    event = int(judge.data.events["pos"].argmax())
    assert judge.histories([event])[0].tolist() == judge.data.history(event)[-2:].tolist()


def test_every_event_gets_its_own_state(judge):
    """Guards: a last batch that is cut off, states in another order than events."""
    n = len(judge.data.events["user"])
    whole = judge.states.clone()
    other = reward.Judge(judge.data, bag_of_words)
    other.load_weights(judge.model.state_dict(), batch=n // 3 + 1)
    assert whole.shape == (n, judge.items.shape[1])
    assert torch.allclose(other.states, whole, atol=1e-5)


# ------------------------------------------------------------------------------------- the reward
def unit(x):
    return x / np.linalg.norm(x)


def advantages_by_hand(judge, reason, events, period):
    """s(e, r) - logmeanexp over the pool, with states and reasons from nothing but embeddings: the
    judge is untrained, its P the identity and tau .2."""
    masked = D.mask_identity(judge.data, reason)
    z = unit(judge.whiten(bag_of_words([masked]))[0].numpy())
    items = judge.items.numpy()

    def s(event):
        h = unit(items[judge.data.history(event)].mean(0))
        return float(h @ z) / 0.2

    level = math.log(np.mean([math.exp(s(e)) for e in judge.pool(period).tolist()]))
    return [s(e) - level for e in events]


def test_advantages_equal_their_formula(judge, period):
    """Guards: a level over the wrong states, a sum in place of a mean, another temperature."""
    reasons = [D.REASON.format("grip", "calm"), D.REASON.format("shade", "scent")]
    people = [np.array([3, 7, 11]), np.array([5])]
    found = judge.lifts(reasons, people, period)
    for values, reason, events in zip(found, reasons, people, strict=True):
        expected = advantages_by_hand(judge, reason, events, period)
        assert values.tolist() == pytest.approx(expected, abs=1e-4)


def test_nobody_has_no_advantage(judge, period):
    """Guards: NaN as the mean of nobody."""
    found = judge.lifts(["grip", "calm"], [NOBODY, np.array([3])], period)
    assert found[0].tolist() == []
    assert len(found[1]) == 1
    assert reward.mean_of_each(found)[0] == 0


def test_the_pool_is_fixed_and_of_the_period(judge, shop, period):
    """Guards: rewards that change from call to call; people of the future in a comparison."""
    middle = sum(period) // 2
    pool = judge.pool((period[0], middle)).numpy()
    assert np.array_equal(pool, judge.pool((period[0], middle)).numpy())
    assert len(pool) == len(set(pool)) == reward.STATES
    assert shop.events["time"][pool].max() < middle
    late = judge.pool((middle, period[1])).numpy()
    assert shop.events["time"][late].min() >= middle


SHOWN, AUDIENCE = np.array([3, 7, 11]), np.array([20, 30, 31, 40])
PEOPLE = {
    "both": (SHOWN, AUDIENCE, 0.5),
    "nobody is in the audience": (SHOWN, NOBODY, 0.0),
    "nobody is shown": (NOBODY, AUDIENCE, 1.0),
    "nobody at all": (NOBODY, NOBODY, 0.0),
}


def answers_about(shop, item):
    """(answer, its reason, format penalty, ungrounded penalty) of answers about an item."""
    a, b, c = shop.phrases[item][:3]
    return {
        "sound": (say(a, b), f"people choose it for {a} and {b}", 0, 0),
        "half made up": (say(a, "unicorn"), f"people choose it for {a} and unicorn", 0, 1),
        "made up": (say("quantum", "unicorn"), "people choose it for quantum and unicorn", 0, 2),
        "twice the same": (say(a, a), f"people choose it for {a} and {a}", 2, 0),
        "words of the item alone": (answer(f"{a} {b} {c}"), f"{a} {b} {c}", 2, 0),
        "no sentence and half made up": (answer(f"{a} unicorn"), f"{a} unicorn", 2, 1),
        "no reason": (answer(""), "", 2, 2),
        "no tags": (f"people choose it for {a} and {b}", "", 2, 2),
        "nothing": ("", "", 2, 2),
    }


@pytest.mark.parametrize("people", PEOPLE)
def test_the_reward_equals_its_formula(judge, shop, period, people):
    """Guards: a penalty that is left out or counted twice, weights of the wrong group, a group of
    nobody that halves the reward. R = (1 - l) A(shown) + l A(audience) - 2 [malformed] - 2 (1 -
    grounded), where a group of nobody leaves the other all the weight."""
    shown, audience, weight = PEOPLE[people]
    item = 5
    for name, (text, reason, format_penalty, ungrounded) in answers_about(shop, item).items():
        found = reward.rewards(judge, [item], [text], [shown], [audience], period)
        a_shown = np.mean(advantages_by_hand(judge, reason, shown, period) or [0])
        a_audience = np.mean(advantages_by_hand(judge, reason, audience, period) or [0])
        mean = (1 - weight) * a_shown + weight * a_audience
        assert found.shown[0] == pytest.approx(a_shown, abs=1e-4), name
        assert found.audience[0] == pytest.approx(a_audience, abs=1e-4), name
        assert found.audience_weight[0] == weight, name
        assert found.format_ok[0] == (format_penalty == 0), name
        assert 2 * (1 - found.grounded[0]) == pytest.approx(ungrounded), name
        assert len(found.by_audience[0]) == len(audience), name
        expected = mean - format_penalty - ungrounded
        assert found.total[0] == pytest.approx(expected, abs=1e-4), name


def test_k_answers_an_item_are_rewarded_as_each_alone(judge, shop, period):
    """Guards: answers beside the people or the text of another item."""
    items = [5, 9]
    shown, audience = [SHOWN, np.array([50])], [AUDIENCE, NOBODY]
    answers = []
    for item in items:
        a, b, c = shop.phrases[item][:3]
        answers += [say(a, b), say(c, "unicorn"), answer(a)]
    found = reward.rewards(judge, items, answers, shown, audience, period)
    assert len(found.total) == 6
    for j, text in enumerate(answers):
        k = j // 3
        alone = reward.rewards(judge, [items[k]], [text], [shown[k]], [audience[k]], period)
        for field in dataclasses.fields(reward.Rewards):
            mine, expected = getattr(found, field.name)[j], getattr(alone, field.name)[0]
            assert np.allclose(mine, expected, atol=1e-5), field.name


# --------------------------------------------------------------------------- what must not pay
def true_answer(shop, item, rng):
    return say(*shop.truth["late"][item])


def echo_of_a_history(shop, item, rng):
    event = shop.events_by_item[item][0]
    return say(*shop.phrases[shop.history(event)[-1]][:2])


def reason_of_another_item(shop, item, rng):
    for other in rng.permutation(shop.n_items) + 1:
        if set(shop.truth["late"][other]) != set(shop.truth["late"][item]):
            return say(*shop.truth["late"][other])
    raise AssertionError("all items have the same drivers")


def title_alone(shop, item, rng):
    return answer(shop.items[item]["title"])


def all_aspects(shop, item, rng):
    return answer("people choose it for " + " and ".join(shop.phrases[item]))


def empty_reason(shop, item, rng):
    return answer("")


def nothing(shop, item, rng):
    return ""


GAMES = (echo_of_a_history, reason_of_another_item, title_alone, all_aspects, empty_reason, nothing)


def mean_reward(judge, write, period):
    """Of answers that `write` gives to all items that three or more people chose."""
    shop, rng = judge.data, np.random.default_rng(0)
    items = [i for i in range(1, shop.n_items + 1) if len(shop.events_by_item[i]) >= 6]
    answers = [write(shop, i, rng) for i in items]
    shown = [shop.events_by_item[i][:3] for i in items]
    audience = [shop.events_by_item[i][3:19] for i in items]
    assert len(items) > 100
    return reward.rewards(judge, items, answers, shown, audience, period).total.mean()


@pytest.mark.parametrize("game", GAMES)
def test_gaming_the_reward_does_not_pay(judge, period, game):
    """Guards: a reward that PPO can raise without a true reason."""
    true = mean_reward(judge, true_answer, period)
    assert mean_reward(judge, game, period) < true - 0.2


def two_decoys(shop, item, rng):
    return say(*[p for p in shop.phrases[item] if p not in shop.truth["late"][item]][:2])


def test_true_drivers_earn_more_than_decoys(judge, period):
    """Guards: a blind reward: both reasons are well-formed and grounded."""
    true = mean_reward(judge, true_answer, period)
    assert mean_reward(judge, two_decoys, period) < true - 0.2


# -------------------------------------------------------------------------------- fitting a judge
def fitted(shop, seed=2, **settings):
    """A judge after a short fit, and the fit's report."""
    judge = reward.Judge(shop, bag_of_words, seed)
    return judge, judge.fit(**{"epochs": 2, "per_epoch": 700} | settings)


def nobody_held_out(data, seed):
    return np.zeros(len(data.users), bool), np.zeros(data.n_items + 1, bool)


def everybody_held_out(data, seed):
    return np.ones(len(data.users), bool), np.ones(data.n_items + 1, bool)


def test_fit_keeps_the_best_epoch_on_held_out_users_and_items(shop, spied_auc):
    """Guards: the last epoch's weights under the best epoch's figure."""
    judge, report = fitted(shop, epochs=3, per_epoch=20_000)
    values = [value for _, value in spied_auc]
    assert len(values) == 4
    assert max(values) > min(values)
    assert report == {"epochs": 3, "best_epoch": int(np.argmax(values)), "auc_heldout": max(values)}
    assert report["auc_heldout"] > 0.5
    assert judge.auc(*spied_auc[0][0]) == max(values)
    # the states are those of the weights that stayed
    states = judge.model.states(judge.histories(range(5)), judge.items)
    assert torch.allclose(states, judge.states[:5], atol=1e-5)


def test_fit_is_drawn_by_its_seed(shop):
    """Guards: random numbers from whatever ran before."""
    first, report = fitted(shop)
    torch.rand(7)
    np.random.rand(7)
    again, same = fitted(shop)
    other, _ = fitted(shop, seed=3)
    assert same == report
    for name, weights in first.model.state_dict().items():
        assert torch.equal(weights, again.model.state_dict()[name]), name
    assert not torch.equal(first.model.P.weight, other.model.P.weight)


def test_the_numbers_of_an_epoch_are_made_of_seed_and_epoch(shop):
    """Guards: the same dropout in every epoch, or one that goes on from whatever ran before."""
    fitted(shop, seed=3, epochs=1)
    expected = np.random.default_rng([3, 23, 1]).integers(2**31)
    assert torch.initial_seed() == expected


def test_fit_ends_where_patience_does(shop, monkeypatch):
    """Guards: patience that never ends; a judge that is worse than the untrained one."""
    values = iter([0.9, 0.5, 0.6, 0.7])

    def auc(self, events, items, draws):
        return next(values)

    monkeypatch.setattr(reward.Judge, "auc", auc)
    judge, report = fitted(shop, epochs=9, patience=2)
    assert report["epochs"] == 2
    assert report["best_epoch"] == 0
    assert torch.equal(judge.model.P.weight, torch.eye(judge.items.shape[1]))


def test_held_out_users_and_items_are_not_trained_on(shop, monkeypatch):
    """Guards: an AUC on what was trained on; reasons of held-out items in the softmax."""
    events, items = [], []

    class Spy(reward.Judge):
        def histories(self, numbers):
            if self.model.training:
                events.extend(numbers)
            return super().histories(numbers)

    judge, real = Spy(shop, bag_of_words, seed=2), D.random_reason

    def random_reason(data, item, rng, size=2):
        # of training after the first epoch: a new model is in training mode too
        if judge.model.training and events:
            items.append(item)
        return real(data, item, rng, size)

    monkeypatch.setattr(D, "random_reason", random_reason)
    judge.fit(epochs=2, per_epoch=20_000)
    held_users, held_items = reward.held_out(shop, 2)
    used = np.array(events)
    assert 0.1 < held_users.mean() < 0.3
    assert 0.1 < held_items.mean() < 0.3
    assert not held_users[shop.events["user"][used]].any()
    assert not held_items[shop.events["item"][used]].any()
    assert items
    assert not held_items[items].any()
    # two epochs, all others once in each
    allowed = ~held_users[shop.events["user"]] & ~held_items[shop.events["item"]]
    assert sorted(events) == sorted([*np.flatnonzero(allowed)] * 2)


def test_every_epoch_draws_new_reasons(shop, monkeypatch):
    """Guards: a reason that stays with its item, and so becomes its ID."""
    epochs, real = [], reward.Judge.encode

    def encode(self, reasons):
        if self.model.training:
            epochs.append(list(reasons))
        return real(self, reasons)

    monkeypatch.setattr(reward.Judge, "encode", encode)
    fitted(shop, epochs=2)
    first, second = epochs[-2:]
    assert len(first) == len(second) > 100
    same = np.mean([a == b for a, b in zip(first, second, strict=True)])
    # of five phrases two or three: one of ten each
    assert same < 0.25


def test_the_epoch_is_chosen_on_a_sample_of_all_held_out_events(shop, monkeypatch, spied_auc):
    """Guards: the first events of a time-sorted list, all of them early; others at each look."""
    monkeypatch.setattr(reward, "HELD_OUT", 40)
    fitted(shop, epochs=1)
    ((events, _, _), _), ((again, _, _), _) = spied_auc
    assert events is again
    assert len(events) == 40
    late = (events > len(shop.events["time"]) / 2).mean()
    assert 0.35 < late < 0.65


def test_auc_equals_a_count_of_pairs(judge, shop):
    """Guards: ties that count as won, an event's reason compared with itself."""
    users, items = reward.held_out(shop, 0)
    events = np.flatnonzero(users[shop.events["user"]] & items[shop.events["item"]])
    numbers, rng = np.flatnonzero(items), np.random.default_rng(0)
    draws = [judge.encode([D.random_reason(shop, i, rng) for i in numbers]) for _ in range(4)]
    won = []
    for vectors in draws:
        z = judge.model.reasons(vectors).detach().double()
        for event in events:
            # rounded: equal reasons tie
            scores = (judge.states[event].double() @ z.T).numpy().round(5)
            mine = scores[numbers == shop.events["item"][event]]
            others = scores[numbers != shop.events["item"][event]]
            won.append(np.mean((others < mine) + 0.5 * (others == mine)))
    assert judge.auc(events, numbers, draws) == pytest.approx(np.mean(won), abs=2e-3)
    assert np.mean(won) > 0.6


@pytest.mark.parametrize("held", [nobody_held_out, everybody_held_out])
def test_data_without_events_to_train_or_to_choose_on_are_refused(shop, monkeypatch, held):
    """Guards: a loss over nothing, NaN weights, a chance figure under the name of a measurement."""
    monkeypatch.setattr(reward, "held_out", held)
    with pytest.raises(D.DataError, match="too few events"):
        fitted(shop)


@pytest.mark.slow
def test_a_trained_judge_still_tells_truth_from_games(shop, period):
    """Guards: training that unlearns what the embeddings say, or finds a shortcut."""
    judge, report = fitted(shop, seed=0, epochs=30, per_epoch=20_000)
    # chance and three standard errors: reasons of random phrases tell little, events are few
    held_users, held_items = reward.held_out(shop, 0)
    held = held_users[shop.events["user"]] & held_items[shop.events["item"]]
    assert report["auc_heldout"] > 0.5 + 3 * 12**-0.5 / held.sum() ** 0.5
    true = mean_reward(judge, true_answer, period)
    for game in (*GAMES, two_decoys):
        assert mean_reward(judge, game, period) < true - 0.2, game.__name__
    assert reward.driver_choice(judge, shop.truth, period)["driver_choice"] > 0.75


# ---------------------------------------------------------------------------- figures of the truth
def test_the_audience_prefers_true_drivers_to_decoys(judge, shop, period):
    """Guards: a reward that fell to chance: nothing downstream could work."""
    found = reward.driver_choice(judge, shop.truth, period)
    assert found["driver_choice"] > 0.75
    assert found["driver_items"] > 15


class DriverJudge:
    """Likes a reason by the number of true drivers that it names, and remembers who was asked."""

    def __init__(self, data):
        self.data, self.seed, self.asked, self.reasons = data, 0, [], []

    def lifts(self, reasons, people, period):
        self.asked.append(people)
        self.reasons.append(reasons)
        return [np.full(len(events), float(len(self.asked) == 1)) for events in people]


def test_driver_choice_asks_users_who_know_the_driver_and_were_not_trained_on(shop):
    """Guards: an audience that the judge was trained on; people who chose an item for its old
    driver; decoys among the drivers."""
    judge = DriverJudge(shop)
    found = reward.driver_choice(judge, shop.truth, (0, 1))
    held_users, held_items = reward.held_out(shop, 0)
    people, same = judge.asked
    assert people == same
    assert found == {"driver_choice": 1.0, "driver_items": len(people)}
    changed = 0
    for events, true, decoy in zip(people, *judge.reasons, strict=True):
        item = int(shop.events["item"][events[0]])
        drivers = set(shop.truth["late"][item])
        assert held_items[item]
        assert (shop.events["item"][events] == item).all()
        assert held_users[shop.events["user"][events]].all()
        assert 2 <= len(events) <= reward.MAX_AUDIENCE
        assert set(D.parse_answer(answer(true))[1]) == drivers
        assert not set(D.parse_answer(answer(decoy))[1]) & drivers
        if set(shop.truth["early"][item]) != drivers:
            changed += 1
            assert (shop.events["time"][events] > shop.truth["since"][item]).all()
    assert changed > 0


TRUTH = {
    "early": [("a", "b"), ("c", "d"), ("e", "z")],
    "late": [("b", "a"), ("c", "x"), ("e", "f")],
}


def test_truth_figures_by_hand():
    """Guards: recall for precision; phrases named twice that count twice; the old driver for the
    new one."""
    assert reward.truth_figures([["a", "b"], ["c", "x"], ["f"]], TRUTH) == {
        "truth_precision": 5 / 5,
        "truth_recall": 5 / 6,
        "new_driver": 2 / 2,
    }
    assert reward.truth_figures([["a", "b"], ["c", "d"], []], TRUTH) == {
        "truth_precision": 3 / 4,
        "truth_recall": 3 / 6,
        "new_driver": 0 / 2,
    }
    assert reward.truth_figures([[], ["c", "c"], ["z", "f"]], TRUTH) == {
        "truth_precision": 2 / 3,
        "truth_recall": 2 / 6,
        "new_driver": 1 / 2,
    }


def test_the_order_of_two_drivers_is_no_change():
    """Guards: an item that counts as changed because its drivers are listed the other way round."""
    assert reward.names_new_driver([["a"], ["x"], ["e"]], TRUTH) == [True, False]
