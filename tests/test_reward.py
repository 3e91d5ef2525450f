"""reward.py: the judge, its formula by hand, and what must not pay. A bag-of-words encoder keeps
it fast and exact.

    pytest tests/test_reward.py                                              some seconds
"""

import copy
import dataclasses
import json
import math
import zlib
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
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


class Trained(NamedTuple):
    """A judge after all its rounds, what `fit` gave, and what it knows of the truth."""

    judge: reward.Judge
    rounds: list
    weights: list
    figures: dict


@pytest.fixture(scope="module")
def trained(shop):
    made = reward.Judge(shop, bag_of_words)
    rounds, weights = made.fit(epochs=12)
    return Trained(made, rounds, weights, reward.judge_figures(made, shop.truth, weights))


@pytest.fixture(params=["untrained", "trained"])
def either(request):
    """A judge before and after its training."""
    if request.param == "untrained":
        return request.getfixturevalue("judge")
    return request.getfixturevalue("trained").judge


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
    with pytest.raises(OSError, match="custom code"):
        reward.load_encoder(str(tmp_path))
    assert not ran.exists()


def test_an_encoder_with_broken_weights_is_refused_when_loaded(tmp_path):
    """Guards: an error of linear algebra after hours of training."""
    tiny_encoder(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    for name, weight in weights.items():
        if "word_embeddings" in name:
            weight[:] = torch.nan
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(OSError, match="NaN"):
        reward.load_encoder(str(tmp_path))


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


class RandomVectors:
    """An encoder that gives every text a vector of its own, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        rows = []
        for text in texts:
            generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
            rows.append(torch.randn(6, generator=generator))
        return torch.stack(rows)


def test_a_text_is_the_mean_of_its_words():
    """Guards: an encoder that sees sentences, whose vectors tell which item a text is about; a
    vector that depends on the order of the words; a word lost, or one said twice that counts once;
    rows in another order than the texts."""
    grip, calm, shade = RandomVectors()(["grip", "calm", "shade"])
    encode = reward.word_means(RandomVectors())
    texts = ["calm", "Grip, calm and", "and calm grip", "shade grip grip"]
    alone, one, other, twice = encode([text.replace("and", "shade") for text in texts])
    assert torch.equal(alone, calm)
    assert torch.allclose(one, (grip + calm + shade) / 3, atol=1e-6)
    assert torch.allclose(other, one, atol=1e-6)
    assert torch.allclose(twice, (shade + 2 * grip) / 3, atol=1e-6)


def test_every_word_is_encoded_once_and_alone():
    """Guards: an LLM that reads the same thirty words for every proposal."""
    vectors = RandomVectors()
    encode = reward.word_means(vectors)
    encode(["grip calm", "calm shade"])
    encode(["shade grip"])
    encode(["scent grip", "scent"])
    assert sorted(vectors.asked) == ["calm", "grip", "scent", "shade"]


def test_a_words_vector_does_not_depend_on_what_was_encoded_before():
    """Guards: a resumed run, which meets words in another order, with other last digits: the
    rounding of a batched encoder depends on the batch."""

    def encode(texts):
        return RandomVectors()(texts) + 1e-7 * len(texts)

    together = reward.word_means(encode)(["grip", "calm shade"])
    one_by_one = reward.word_means(encode)
    for row, text in zip(together, ["grip", "calm shade"], strict=True):
        assert torch.equal(one_by_one([text])[0], row)


@pytest.mark.parametrize("text", ["", " ... ", "\u65e5\u672c"])
def test_a_text_without_words_has_a_vector_too(text):
    """Guards: a run that ends at a title of signs, or of letters that `words` does not read."""
    vectors = reward.word_means(RandomVectors())(["grip calm", text])
    assert vectors.shape == (2, 6)
    assert torch.isfinite(vectors).all()


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
def test_gaming_the_reward_does_not_pay(either, period, game):
    """Guards: a reward that PPO can raise without a true reason; training that unlearns what the
    embeddings say, or finds a shortcut."""
    true = mean_reward(either, true_answer, period)
    assert mean_reward(either, game, period) < true - 0.2


def two_decoys(shop, item, rng):
    return say(*[p for p in shop.phrases[item] if p not in shop.truth["late"][item]][:2])


def test_true_drivers_earn_more_than_decoys(either, period):
    """Guards: a blind reward: both reasons are well-formed and grounded."""
    true = mean_reward(either, true_answer, period)
    assert mean_reward(either, two_decoys, period) < true - 0.2


# ----------------------------------------------------------------------------- one round of fitting
def fitted(shop, seed=2, number=1, chosen=None, **settings):
    """A judge after a short round, and the round's report."""
    judge = reward.Judge(shop, bag_of_words, seed)
    return judge, judge.fit_round(number, chosen, **{"epochs": 2, "per_epoch": 700} | settings)


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
    assert report == {
        "auc_heldout": max(values),
        "auc_untrained": values[0],
        "epochs": 3,
        "best_epoch": int(np.argmax(values)),
    }
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


@pytest.mark.parametrize("number", [1, 2])
def test_the_numbers_of_an_epoch_are_made_of_seed_round_and_epoch(shop, number):
    """Guards: the same dropout in every epoch or round, or one that goes on from whatever ran
    before."""
    fitted(shop, seed=3, number=number, epochs=1)
    expected = np.random.default_rng([3, 23, number, 1]).integers(2**31)
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


@pytest.mark.parametrize("number", [1, 2])
def test_held_out_users_and_items_are_not_trained_on(shop, monkeypatch, number):
    """Guards: an AUC on what was trained on; reasons of held-out items in the softmax."""
    events, items = [], []

    class Spy(reward.Judge):
        def histories(self, numbers):
            if self.model.training:
                events.extend(numbers)
            return super().histories(numbers)

        def draw_reasons(self, numbers, chosen, rng):
            # of training after the first epoch: a new model is in training mode too
            if self.model.training and events:
                items.extend(numbers)
            return super().draw_reasons(numbers, chosen, rng)

    judge = Spy(shop, bag_of_words, seed=2)
    chosen = judge_of(shop).choose_reasons(1) if number > 1 else None
    judge.fit_round(number, chosen, epochs=2, per_epoch=20_000)
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


def test_auc_equals_a_count_of_pairs(trained, shop):
    """Guards: ties that count as won, an event's reason compared with itself."""
    judge = trained.judge
    users, items = reward.held_out(shop, 0)
    events = np.flatnonzero(users[shop.events["user"]] & items[shop.events["item"]])
    numbers, rng = np.flatnonzero(items), np.random.default_rng(0)
    chosen = judge.choose_reasons(1)
    draws = [judge.encode(judge.draw_reasons(numbers, chosen, rng)) for _ in range(4)]
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


def test_data_without_events_to_train_on_are_refused(shop, monkeypatch):
    """Guards: a loss over nothing, NaN weights."""
    monkeypatch.setattr(reward, "held_out", everybody_held_out)
    with pytest.raises(D.DataError, match="too few events"):
        fitted(shop)


@pytest.mark.filterwarnings("error")  # such as a mean of nothing
def test_where_nothing_can_be_held_out_the_untrained_judge_stays(shop, monkeypatch):
    """Guards: a small shop without reasons at all; an epoch that nothing has chosen; a figure of
    chance under the name of a measurement."""
    monkeypatch.setattr(reward, "held_out", nobody_held_out)
    judge, report = fitted(shop, epochs=3)
    assert report == {"epochs": 3, "best_epoch": 0}
    assert torch.equal(judge.model.P.weight, torch.eye(judge.items.shape[1]))


# ------------------------------------------------------------------------ rounds: its own choices
def judge_of(shop, seed=0):
    """An untrained judge of its own, for a test that changes it."""
    made = reward.Judge(shop, bag_of_words, seed)
    made.load_weights(made.model.state_dict())
    return made


def phrases_of(reason):
    """The phrases of a reason, which may name two or three."""
    return reason.removeprefix(D.REASON_START).split(" and ")


def test_reasons_are_drawn_at_random_before_anything_is_chosen(judge, shop):
    """Guards: reasons of another item; always as many phrases."""
    items = [5, 9, 5] * 200
    reasons = judge.draw_reasons(items, None, np.random.default_rng(0))
    sizes = set()
    for item, reason in zip(items, reasons, strict=True):
        named = phrases_of(reason)
        sizes.add(len(named))
        assert set(named) <= set(shop.phrases[item])
        assert len(set(named)) == len(named)
    assert sizes == {2, 3}
    # ten pairs and ten triples of five phrases
    assert len(set(reasons[::3])) == 20


def test_most_draws_are_the_chosen_reason_and_the_others_random(judge, shop):
    """Guards: a chosen reason that always stands for its item, and so becomes its ID; one of
    another item; a choice that nothing is learnt from."""
    chosen = [""] + [f"the choice for {i}" for i in range(1, shop.n_items + 1)]
    items = [*range(1, shop.n_items + 1)] * 20
    reasons = judge.draw_reasons(items, chosen, np.random.default_rng(0))
    is_chosen = []
    for item, reason in zip(items, reasons, strict=True):
        is_chosen.append(reason == chosen[item])
        if not is_chosen[-1]:
            assert set(phrases_of(reason)) <= set(shop.phrases[item])
    assert np.mean(is_chosen) == pytest.approx(reward.CHOSEN_SHARE, abs=0.03)


class Asked(NamedTuple):
    """What a judge was asked while it chose, and what it chose."""

    reasons: list
    people: list
    period: tuple
    liked: list
    chosen: list


def choice_of(judge, number=1):
    asked = []

    class Spy(reward.Judge):
        def lifts(self, reasons, people, period):
            liked = super().lifts(reasons, people, period)
            asked.append((reasons, people, period, liked))
            return liked

    spy = Spy(judge.data, judge.raw_encode, judge.seed)
    spy.load_weights(judge.model.state_dict())
    chosen = spy.choose_reasons(number)
    ((reasons, people, period, liked),) = asked
    return Asked(reasons, people, period, liked, chosen)


def test_a_judge_chooses_what_an_items_own_users_like_most(judge, shop):
    """Guards: the worst candidate, or one of another item; an index that is off by one; candidates
    that are no different from round to round."""
    made = choice_of(judge)
    assert len(made.chosen) == shop.n_items + 1
    assert made.chosen[0] == ""
    for i in range(1, shop.n_items + 1):
        mine = range((i - 1) * reward.CANDIDATES, i * reward.CANDIDATES)
        for k in mine:
            assert set(phrases_of(made.reasons[k])) <= set(shop.phrases[i])
            assert (shop.events["item"][made.people[k]] == i).all()
        means = [made.liked[k].mean() if len(made.liked[k]) else 0.0 for k in mine]
        assert made.chosen[i] == made.reasons[mine[np.argmax(means)]]
    assert judge.choose_reasons(1) == made.chosen
    assert choice_of(judge, 2).reasons != made.reasons


def test_held_out_users_have_no_say_in_what_is_chosen(judge, shop):
    """Guards: an AUC on held-out users, of reasons that these users have chosen themselves; a few
    users who choose for all."""
    made = choice_of(judge)
    held_users, _ = reward.held_out(shop, judge.seed)
    assert made.period == reward.TRAIN_TIME
    assert max(map(len, made.people)) <= reward.MAX_AUDIENCE
    asked = np.unique(np.concatenate(made.people))
    assert not held_users[shop.events["user"][asked]].any()
    assert len(asked) > 0.5 * (~held_users[shop.events["user"]]).sum()


def test_every_round_learns_from_what_the_round_before_has_chosen(shop):
    """Guards: rounds that start from one another's weights or forget the choice; weights in another
    order, or the same ones several times, because they were not copied."""
    rounds = []

    class Spy(reward.Judge):
        def fit_round(self, number, chosen=None, **how):
            rounds.append((number, chosen, how))
            self.model.log_tau.data += 1.0
            return {"round": number}

        def choose_reasons(self, number):
            return [f"choice {number}"]

    judge = Spy(shop, bag_of_words)
    start = judge.model.log_tau.item()
    figures, weights = judge.fit(epochs=7)
    assert rounds == [
        (1, None, {"epochs": 7}),
        (2, ["choice 1"], {"epochs": 7}),
        (3, ["choice 2"], {"epochs": 7}),
    ]
    assert figures == [{"round": 1}, {"round": 2}, {"round": 3}]
    found = [one["log_tau"].item() - start for one in weights]
    assert found == pytest.approx([0, 1, 2, 3], abs=1e-5)


def test_a_round_starts_from_scratch(shop):
    """Guards: a second round that only goes on with the first one's weights, and so keeps its
    mistakes."""
    first, report = fitted(shop)
    other = reward.Judge(shop, bag_of_words, 2)
    torch.nn.init.normal_(other.model.P.weight)
    assert other.fit_round(1, epochs=2, per_epoch=700) == report
    for name, weights in first.model.state_dict().items():
        assert torch.equal(weights, other.model.state_dict()[name]), name


def test_fit_gives_the_weights_before_and_after_every_round(trained, shop):
    """Guards: an untrained judge that is reported as it was after training; last weights that are
    not the judge's."""
    assert len(trained.rounds) == reward.ROUNDS
    assert len(trained.weights) == reward.ROUNDS + 1
    for report in trained.rounds:
        assert set(report) == {"auc_heldout", "auc_untrained", "epochs", "best_epoch"}
    for name, weights in reward.Judge(shop, bag_of_words).model.state_dict().items():
        assert torch.equal(weights, trained.weights[0][name]), name
    for name, weights in trained.judge.model.state_dict().items():
        assert torch.equal(weights, trained.weights[-1][name]), name
    projections = {str(weights["P.weight"].tolist()) for weights in trained.weights}
    assert len(projections) == reward.ROUNDS + 1


def test_training_teaches_what_follows_what(trained, shop):
    """Guards: a reward model that the text similarity of an untrained one beats or equals, so that
    nothing had to be learnt; rounds that add nothing."""
    figures = trained.figures
    assert figures["best_pairs"] > figures["best_pairs_untrained"] + 0.1
    assert figures["best_pairs"] > figures["best_pairs_round_1"]
    last = trained.rounds[-1]
    assert last["auc_heldout"] > last["auc_untrained"] + 0.05
    # chance and three standard errors
    held_users, held_items = reward.held_out(shop, 0)
    held = held_users[shop.events["user"]] & held_items[shop.events["item"]]
    assert last["auc_heldout"] > 0.5 + 3 * 12**-0.5 / held.sum() ** 0.5


# ---------------------------------------------------------------------------- figures of the truth
def test_the_audience_prefers_true_drivers_to_decoys(trained, shop):
    """Guards: a reward that fell to chance: nothing downstream could work."""
    assert reward.driver_choice(trained.judge, shop.truth) > 0.75


def test_judge_figures_tell_of_every_round(trained, judge, shop):
    """Guards: figures of one round under the name of another; a judge that is left with the weights
    of an earlier one."""
    names = []
    for figure in ("driver_choice", "best_pairs"):
        names += [figure + ending for ending in ("_untrained", "_round_1", "_round_2", "")]
    assert set(trained.figures) == set(names)
    for ending, one in (("_untrained", judge), ("", trained.judge)):
        pairs = reward.truth_figures(reward.best_pairs(one, shop.truth), shop.truth)
        assert trained.figures["best_pairs" + ending] == pairs["truth_precision"]
        choice = reward.driver_choice(one, shop.truth)
        assert trained.figures["driver_choice" + ending] == choice


class DriverJudge:
    """Likes a reason by the number of true drivers that it names, and remembers who was asked."""

    def __init__(self, data):
        self.data, self.seed, self.calls = data, 0, []
        self.held_users, self.held_items = reward.held_out(data, 0)

    def lifts(self, reasons, people, period):
        self.calls.append((reasons, people, period))
        rows = []
        for reason, events in zip(reasons, people, strict=True):
            liked = 0
            if len(events):
                drivers = self.data.truth["late"][self.data.events["item"][events[0]]]
                liked = len(set(drivers) & set(phrases_of(reason)))
            rows.append(np.full(len(events), float(liked)))
        return rows


def test_driver_choice_asks_users_who_know_the_driver_and_were_not_trained_on(shop):
    """Guards: an audience that the judge was trained on; people who chose an item for its old
    driver; decoys among the drivers."""
    judge = DriverJudge(shop)
    assert reward.driver_choice(judge, shop.truth) == 1.0
    (pairs, people, period), (decoys, same, _) = judge.calls
    held_users, held_items = reward.held_out(shop, 0)
    assert people == same
    assert period == reward.TRAIN_TIME
    assert len(people) > 15
    changed = 0
    for events, true, decoy in zip(people, pairs, decoys, strict=True):
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


def test_best_pairs_are_those_that_users_of_the_second_half_like_most(shop):
    """Guards: people who chose an item for its old driver; a pair left out, or liked by another
    item's users; an item that few know, judged all the same."""
    judge = DriverJudge(shop)
    named = reward.best_pairs(judge, shop.truth)
    since = shop.truth["since"][1]
    assert len(named) == shop.n_items + 1
    assert named[0] == ()
    judged = 0
    for i in range(1, shop.n_items + 1):
        reasons, people, period = judge.calls[i - 1]
        late = shop.events_by_item[i][shop.events["time"][shop.events_by_item[i]] > since]
        if len(late) < 4:
            assert named[i] == ()
            continue
        judged += 1
        assert set(named[i]) == set(shop.truth["late"][i])
        assert period[0] == since
        assert len(set(reasons)) == len(reasons) == 10
        for events in people:
            assert events.tolist() == late[:8].tolist()
    assert judged > 100


def tiny_shop():
    """Item 1 is chosen by five users, after item 3, 3, 2, 4 and 2."""
    titles = ["calm shade grip", "grip scent", "grip calm", "shade speed", "scent speed warmth"]
    items = [{}]
    for number, title in enumerate([*titles, "warmth silence", "silence speed"]):
        items.append(D.item_record(f"I{number}", {"title": title}))
    seqs = [[3, 1, 6, 7], [3, 1, 6, 7], [4, 2, 1, 6, 7], [4, 1, 6, 7], [4, 2, 1, 6, 7]]
    times = [np.arange(len(seq)) for seq in seqs]
    return D.Dataset("tiny", items, list("abcde"), [np.array(seq) for seq in seqs], times)


def test_counted_reasons_by_hand():
    """Guards: a control that counts whole histories where the last item tells most, counts those of
    users it was not shown, or names what the item does not say."""
    shop = tiny_shop()
    shown = [np.zeros(0, int)] * 8
    by_d = [e for e in shop.events_by_item[1] if shop.events["user"][e] == 3]
    shown[1] = np.array(by_d)
    found = reward.counted_reasons(shop, shown)
    assert set(found) == {"shared, shown", "shared, all", "most shared", "frequent"}
    for control, named in found.items():
        assert len(named) == 8, control
        assert named[0] == [], control
    # only d is shown, who came from "shade speed"; then in the item's own order
    assert found["shared, shown"][1] == ["shade", "calm"]
    # grip four times, calm twice, shade once: what stood before item 2 does not count
    assert found["shared, all"][1] == ["grip", "calm"]
    assert found["most shared"][1] == ["grip"]
    # three items say grip, two say calm, two say shade
    assert found["frequent"][1] == ["grip", "calm"]
    # nobody shown, nothing shared
    assert found["shared, shown"][6] == ["warmth", "silence"]


def test_counting_words_knows_some_of_the_truth_and_far_from_all(shop):
    """Guards: a demo world that a perfect counter of shared words solves; a corpus whose frequent
    words give the drivers away."""
    found = reward.counted_reasons(shop, [events[:8] for events in shop.events_by_item])
    truth = {}
    for control, named in found.items():
        truth[control] = reward.truth_figures(named, shop.truth)["truth_precision"]
    assert 0.5 < truth["shared, shown"] < 0.75
    assert 0.5 < truth["shared, all"] < 0.75
    assert truth["most shared"] < 0.8
    assert 0.3 < truth["frequent"] < 0.5, "chance .4"


TRUTH = {
    "early": [(), ("a", "b"), ("c", "d"), ("e", "z")],
    "late": [(), ("b", "a"), ("c", "x"), ("e", "f")],
}


def test_truth_figures_by_hand():
    """Guards: recall for precision; phrases named twice that count twice; the old driver for the
    new one."""
    assert reward.truth_figures([[], ["a", "b"], ["c", "x"], ["f"]], TRUTH) == {
        "truth_precision": 5 / 5,
        "truth_recall": 5 / 6,
        "new_driver": 2 / 2,
    }
    assert reward.truth_figures([[], ["a", "b"], ["c", "d"], []], TRUTH) == {
        "truth_precision": 3 / 4,
        "truth_recall": 3 / 6,
        "new_driver": 0 / 2,
    }
    assert reward.truth_figures([[], [], ["c", "c"], ["z", "f"]], TRUTH) == {
        "truth_precision": 2 / 3,
        "truth_recall": 2 / 6,
        "new_driver": 1 / 2,
    }


def test_the_order_of_two_drivers_is_no_change():
    """Guards: an item that counts as changed because its drivers are listed the other way round."""
    assert reward.names_new_driver([[], ["a"], ["x"], ["e"]], TRUTH) == [True, False]
