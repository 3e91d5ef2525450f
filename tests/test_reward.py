"""reward.py: the judge, the people it asks, and what must not pay. A bag-of-words encoder keeps it fast and exact."""
import copy
import dataclasses
import io
import json

import numpy as np
import pytest
import torch

import data as D
import reward


def bag_of_words(texts):
    """One dimension an aspect of the demo world: the ideal frozen encoder."""
    return torch.tensor([[float(a in t.split()) for a in D.ASPECTS] for t in texts])


def say(*phrases):
    return "<think> x </think> <reason> " + D.REASON.format(*phrases) + " </reason>"


@pytest.fixture(scope="module")
def shop():
    return D.demo(1, n_users=500, n_items=150)


@pytest.fixture(scope="module")
def judge(shop):
    j = reward.Judge(shop, bag_of_words)
    j.remember(j.model.state_dict())
    return j


def tiny_encoder(path):
    """A BERT of eight dimensions with a word-level tokenizer, as a model hub would give it: no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["[PAD]", "[UNK]", *D.ASPECTS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64).save_pretrained(path)
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(D.ASPECTS) + 2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    model.save_pretrained(path)
    return model.eval()


def test_an_encoder_gives_the_mean_of_its_last_states(tmp_path):
    """Guards: padding in the mean, rows that come back in the order of their lengths."""
    model, (a, b, c) = tiny_encoder(tmp_path), D.ASPECTS[:3]
    vectors = reward.load_encoder(str(tmp_path), batch=2)([f"{a} {b} {c}", a, f"{c} {b}"])
    with torch.no_grad():
        for vector, ids in zip(vectors, ([2, 3, 4], [2], [4, 3])):
            assert torch.allclose(vector, model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0), atol=1e-5)


def test_an_encoder_that_would_run_code_is_refused(tmp_path):
    """Guards: pickled weights or Python files of a model hub that are loaded, a prompt that waits for an answer, a ValueError as a traceback."""
    model = tiny_encoder(tmp_path)
    reward.load_encoder(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="^the encoder '.*' could not be loaded .*check --encoder"):
        reward.load_encoder(str(tmp_path))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import BertConfig as C, BertModel as M\n")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.M"}}))
    with pytest.raises(OSError, match="^the encoder '.*' could not be loaded .*check --encoder"):
        reward.load_encoder(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def everyone(data):
    return (int(data.events["time"].min()), int(data.events["time"].max()) + 1)


def test_whitening_centres_and_keeps_unit_scale():
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 21) + 3
    z = reward.whitening(x)(x)
    assert z.mean(0).abs().max() < 1e-4
    assert z.norm(dim=1).mean().item() == pytest.approx(1, abs=1e-5)


def test_features_of_arms_keep_384_dimensions_of_the_text():
    """Guards: an encoder's vectors cut to the 128 that the judge reads (worse on Beauty)."""
    x = torch.randn(500, 400)
    assert reward.whitening(x)(x).shape == (500, 384)


def test_padding_does_not_change_a_state(judge, shop):
    """Guards the last-position gather: a state read from a padding position would depend on the batch."""
    model = copy.deepcopy(judge.model)
    torch.nn.init.normal_(model.out.weight)                         # it starts at nothing, and stays so where epoch 0 wins
    alone = model.states(judge.histories([3]), judge.items)
    longest = int(shop.events["pos"].argmax())
    batch = model.states(judge.histories([3, longest]), judge.items)
    assert torch.allclose(alone[0], batch[0], atol=1e-5)


def test_states_hold_the_past_only(shop, judge):
    """h(e) must not see the choice itself or anything after it."""
    e = 40
    u, p = shop.events["user"][e], shop.events["pos"][e]
    assert shop.history(e).tolist() == shop.seqs[u][:p].tolist()
    seqs = [s.copy() for s in shop.seqs]
    seqs[u][p:] = seqs[u][p:][::-1]
    other = dataclasses.replace(shop, seqs=seqs)
    assert np.array_equal(shop.history(e), other.history(e))


def test_advantage_equals_its_formula(judge, shop):
    """A(S, r) = mean s - logmeanexp over the period's pool: against the definition written out."""
    period, people = everyone(shop), np.array([3, 7, 11])
    got = judge.judge([D.REASON.format("grip", "calm")], [people], period, seed=5)[0]
    z = judge.model.reasons(judge.encode([D.REASON.format("grip", "calm")]))[0]
    tau = judge.model.log_tau.exp().item()
    s = lambda e: torch.dot(judge.states[e], z).item() / tau
    pool = judge.pool(period, 5).tolist()
    level = np.log(np.mean([np.exp(s(e)) for e in pool]))
    assert np.allclose(got, [s(e) - level for e in people], atol=1e-4)


def test_pool_is_fixed_and_of_the_period(judge, shop):
    low, high = everyone(shop)
    middle = (low + high) // 2
    first = judge.pool((low, middle), 1)
    assert torch.equal(first, judge.pool((low, middle), 1))
    assert (shop.events["time"][first.numpy()] < middle).all()


def test_true_drivers_beat_decoys_with_the_audience(judge, shop):
    """If this falls to chance the reward is blind and nothing downstream can work."""
    low, high = everyone(shop)
    late = [w[shop.events["time"][w] >= (low + high) // 2] for w in D.choosers(shop)]
    assert reward.driver_choice(judge, shop.truth["late"], late, (low, high), 0)["driver_choice"] > 0.75


def test_gaming_the_reward_does_not_pay(judge, shop):
    """Echo of a history, another item's reason, the title, all aspects at once and nothing earn less than the truth."""
    who, period = D.choosers(shop), everyone(shop)
    shown, audience = reward.one_shot_people(who, 0)
    items = [i for i in range(1, shop.n_items + 1) if len(shown[i]) >= 3]
    rng = np.random.default_rng(0)
    other = lambda i: next(int(j) for j in rng.permutation(items) if set(shop.truth["late"][j]) != set(shop.truth["late"][i]))

    def mean(answer):
        total, _ = judge.rewards(items, [answer(i) for i in items], [shown[i] for i in items], [audience[i] for i in items], period, 0)
        return total.mean()
    truth = mean(lambda i: say(*shop.truth["late"][i]))
    for name, answer in {"echo of a history": lambda i: say(*shop.phrases[shop.history(shown[i][0])[-1]][:2]),
                         "another item's reason": lambda i: say(*shop.truth["late"][other(i)]),
                         "the title": lambda i: f"<think> x </think> <reason> {shop.items[i]['title']} </reason>",
                         "all aspects": lambda i: f"<think> x </think> <reason> people choose it for {' and '.join(shop.phrases[i])} </reason>",
                         "empty": lambda i: "<think> x </think> <reason> </reason>", "nothing": lambda i: ""}.items():
        assert mean(answer) < truth - 0.2, name


def test_audience_weighs_half_and_stands_alone_when_nobody_is_shown(judge, shop):
    period, a, b = everyone(shop), np.array([1, 2]), np.array([3, 4, 5])
    reason = say(*shop.phrases[1][:2])
    both, parts = judge.rewards([1], [reason], [a], [b], period, 0)
    assert both[0] == pytest.approx(0.5 * parts["shown"][0] + 0.5 * parts["audience"][0])
    alone, parts = judge.rewards([1], [reason], [a], [np.zeros(0, int)], period, 0)
    assert alone[0] == pytest.approx(parts["shown"][0])


def test_the_epoch_is_chosen_on_a_sample_of_all_held_out_events(shop, monkeypatch):
    """Guards: the first events of a time-sorted list, all of them early."""
    monkeypatch.setattr(reward, "HELD_OUT", 40)
    judge, seen, real = reward.Judge(shop, bag_of_words), [], reward.Judge.auc
    monkeypatch.setattr(reward.Judge, "auc", lambda self, events, *rest: (seen.append(events), real(self, events, *rest))[1])
    judge.fit(epochs=1, seed=2)
    assert all(len(e) == 40 and np.array_equal(e, seen[0]) for e in seen)
    assert 0.35 < (seen[0] > len(shop.events["time"]) / 2).mean() < 0.65


def test_a_figure_that_was_not_measured_is_absent(judge, shop, monkeypatch):
    assert reward.driver_choice(judge, shop.truth["late"], [np.zeros(0, int)] * (shop.n_items + 1), everyone(shop), 0) == {}
    monkeypatch.setattr(reward, "HELD_OUT", 0)
    assert "auc_heldout" not in reward.Judge(shop, bag_of_words).fit(epochs=1)


def test_fit_keeps_the_best_epoch_on_held_out_people_and_items(shop, monkeypatch):
    looks, auc = [], reward.Judge.auc
    monkeypatch.setattr(reward.Judge, "auc", lambda self, *on: (looks.append((auc(self, *on), on)), looks[-1][0])[1])

    def fitted():
        j = reward.Judge(shop, bag_of_words)
        looks.clear()
        return j, j.fit(epochs=3, seed=2)
    (a, first), (b, again) = fitted(), fitted()
    values = [value for value, _ in looks]
    assert first["auc_heldout"] == max(values) == auc(b, *looks[0][1]) and values[first["best_epoch"]] == max(values) > min(values)
    assert first == again and first["auc_heldout"] > 0.5
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))


@pytest.mark.parametrize("held_out", [reward.HELD_OUT, 0])
def test_a_fit_killed_after_any_epoch_ends_as_if_it_had_not_been(shop, monkeypatch, held_out):
    """Guards: Adam's moments, the best epoch so far or a random number that is not what it would have been, other reasons to validate on, epochs
    trained twice or left out; with nobody held out, where epoch 0 wins and early stopping ends it, a finished fit that goes on."""
    monkeypatch.setattr(reward, "HELD_OUT", held_out)
    states, looks, steps, auc, step = [], [], [], reward.Judge.auc, torch.optim.AdamW.step
    monkeypatch.setattr(reward.Judge, "auc", lambda self, *on: (looks.append(auc(self, *on)), looks[-1])[1])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **kw: (steps.append(1), step(self, *a, **kw))[1])

    def through_disk(state):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def fitted(**kw):
        looks.clear(), steps.clear()
        j = reward.Judge(shop, bag_of_words)
        return j, j.fit(epochs=3 if held_out else 9, patience=2, per_epoch=700, seed=2, **kw), looks[:], len(steps)
    whole, report, values, made = fitted(save=lambda state: states.append(through_disk(state)))
    epochs = report["epochs"]
    assert len(states) == epochs == (3 if held_out else 2) and report["best_epoch"] > 0 or not held_out and report == {"epochs": 2, "best_epoch": 0}
    assert not states[0]["over"] and states[-1]["over"] and made == 3 * epochs
    for k, state in enumerate(states, 1):
        later = []
        j, again, seen, made = fitted(state=state, save=lambda state: later.append(through_disk(state)))
        assert again == report and seen == [values[0], *values[k + 1:]] and made == 3 * (epochs - k) and len(later) == epochs - k
        assert all(torch.equal(a, b) for a, b in zip(j.model.parameters(), whole.model.parameters())) and torch.equal(j.states, whole.states)
    reward.Judge(shop, bag_of_words).fit(epochs=1, per_epoch=700, seed=3)
    assert torch.initial_seed() == np.random.default_rng([3, 23, 1]).integers(2 ** 31), "numbers made of seed, stage and epoch"


def test_convincing_asks_for_more_than_margin_standard_errors():
    gain = np.array([1.0, 0.0, 1.0, 0.0])                    # mean .5, standard error .289
    assert reward.convincing(gain, 1.5) and not reward.convincing(gain, 2.0)
    assert not reward.convincing(np.zeros(8), 0.0), "an identical proposal must never be accepted"
    assert not reward.convincing(np.full(4, 1.2e-7), 0.5), "the rounding of an identical proposal must not count as a gain"
    assert not reward.convincing(np.array([3.0]), 0.0), "one judge has no standard error"


def test_choose_accepts_only_sound_proposals_that_judges_prefer(judge, shop):
    who = D.choosers(shop)
    i = max(range(1, shop.n_items + 1), key=lambda k: len(who[k]))
    people = who[i]
    shown, judges = reward.divide(people, np.random.default_rng(0))
    pairs = [(a, b) for a in shop.phrases[i] for b in shop.phrases[i] if a < b]
    values = [x.mean() for x in judge.judge([D.REASON.format(*p) for p in pairs], [judges] * len(pairs), everyone(shop), 0)]
    worst, best = pairs[int(np.argmin(values))], pairs[int(np.argmax(values))]
    run = lambda old, new, margin=0.0: judge.choose([i], [say(*old)], [say(*p) if p else "broken" for p in new], [shown], [judges],
                                                    everyone(shop), 0, margin)[1][0]
    assert run(worst, [best, worst])["accepted"] and run(worst, [best, worst])["proposal"] == D.REASON.format(*best)
    assert not run(best, [best, best])["accepted"]
    assert not run(worst, [None])["accepted"], "a malformed proposal"
    broken = judge.choose([i], ["broken"], [say(*worst)], [shown], [judges], everyone(shop), 0, 0.0)[1][0]
    assert broken["accepted"] and broken["reward_before"] < -1, "a malformed answer must not outlive a sound one that the judges like less"
    assert not run(worst, [("quantum", "unicorn")])["accepted"], "an ungrounded proposal"


def test_false_accepts_are_what_the_same_test_lets_through_by_luck(judge, shop):
    """Guards: a rate of another test than the one in use: other conditions, or luck drawn anew for every proposal."""
    who, period, rng = D.choosers(shop), everyone(shop), np.random.default_rng(0)
    items = [i for i in range(1, shop.n_items + 1) if len(who[i]) >= 8]
    shown, judges = zip(*(reward.divide(who[i], rng) for i in items))
    old = [say(*shop.phrases[i][:2]) for i in items]
    other = [say(*shop.phrases[i][2:4]) for i in items]
    rate = lambda proposals, margin=0.0: judge.choose(items, old, proposals, shown, judges, period, 0, margin)[2]["false_accept_rate"]
    luck, by_hand = np.random.default_rng([0, 37, len(items)]), []
    for i, a, b, some, ears in zip(items, old, other, shown, judges):
        reason = lambda text: [D.parse_answer(text)[0]]
        gain = judge.judge(reason(b), [ears], period, 0)[0] - judge.judge(reason(a), [ears], period, 0)[0]
        signs = luck.choice([-1.0, 1.0], len(ears))
        of_the_shown = judge.judge(reason(b), [some], period, 0)[0].mean() - judge.judge(reason(a), [some], period, 0)[0].mean()
        wins = of_the_shown + (signs * gain).mean() > 0                            # the higher reward of the two, half by either
        by_hand.append((reward.convincing(signs * gain, 0.0), wins and reward.convincing(signs * gain, 0.0)))
    alone, against_old = np.mean(by_hand, 0)
    assert len(items) > 20 and 0.25 < rate(other) < 0.75 and rate(other) == pytest.approx(alone), "one proposal, no margin: a coin"
    assert rate([x for pair in zip(other, old) for x in pair]) == pytest.approx(against_old) != alone
    assert rate([x for x in other for _ in range(6)]) == rate(other), "identical proposals give luck no further chance"
    assert rate([x for i, o in zip(items, other) for x in (o, say(*shop.phrases[i][1:3]), say(shop.phrases[i][0], shop.phrases[i][4]))]) > rate(other)
    assert rate(other, margin=9.0) == rate(old) == rate(["broken"] * len(items)) == rate([say("quantum", "unicorn")] * len(items)) == 0


def test_windows_show_a_third_let_the_others_judge_and_lose_nobody():
    """Guards: people from after the window, people asked twice, people who waited and never came back."""
    shop = D.demo(1, n_users=300, n_items=60)
    who, cuts, times = D.choosers(shop), reward.window_cuts(shop, 8), shop.events["time"]
    left, waited = [set(w) for w in who], 0
    for _, (start, end), items, shown, judges in reward.windows(shop, who, cuts, 0):
        for i, a, b in zip(items, shown, judges):
            came = {e for e in left[i] if times[e] < end}
            third = max(1, round(len(came) / 3))
            assert len(came) >= 4 and {*a, *b} <= came and not {*a} & {*b}
            assert len(a) == min(third, D.PEOPLE) and len(b) == min(len(came) - third, reward.AUDIENCE)
            waited += any(times[e] < start for e in {*a, *b})
            left[i] -= came
    assert waited > 10 and max(map(len, left)) < 4, "who is left over are too few for a window"


def test_window_cuts_never_split_equal_times(shop):
    times = [np.sort(t // 20_000_000) for t in shop.times]    # five distinct days
    coarse = dataclasses.replace(shop, times=times)
    cuts = reward.window_cuts(coarse, 4)
    assert cuts == sorted(set(cuts)) and cuts[0] == coarse.events["time"].min() and cuts[-1] == coarse.events["time"].max() + 1


def test_data_that_nobody_can_be_trained_on_is_refused(shop):
    three = dataclasses.replace(shop, seqs=[s[:3] for s in shop.seqs], times=[t[:3] for t in shop.times])
    with pytest.raises(D.DataError, match="no user has 4 interactions"):
        reward.window_cuts(three, 2)


def test_practice_holds_out_items_and_never_judges_by_nobody(shop):
    items, prompts, people, ears, held, train = reward.practice(shop, D.choosers(shop), reward.window_cuts(shop, 2), 0)
    assert not {items[k] for k in held} & {items[k] for k in train}
    assert all(len(people[k]) and not set(people[k]) & set(ears[k]) for k in [*held, *train])
    assert any("Reason so far: none" in prompts[k] for k in train) and any("Reason so far: people" in prompts[k] for k in train)


def test_truth_figures_by_hand():
    early = [("a", "b"), ("c", "d"), ("e", "z")]
    out = reward.truth_figures([["a", "b"], ["c", "x"], ["f"]], {"early": early, "late": [("b", "a"), ("c", "x"), ("e", "f")]})
    assert out == {"truth_precision": 1.0, "truth_recall": 5 / 6, "new_driver": 1.0}
    out = reward.truth_figures([["a", "b"], ["c", "d"], []], {"early": early, "late": [("b", "a"), ("c", "x"), ("e", "f")]})
    assert out == {"truth_precision": 3 / 4, "truth_recall": 3 / 6, "new_driver": 0.0}, "the order of two drivers is no change"
