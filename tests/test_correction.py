"""Chronological correction in curec.py: who is asked, in which window, and what is accepted.

pytest tests/test_correction.py               some seconds
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch

import curec
import data as D
import reward


def bag_of_words(texts):
    """One dimension an aspect of the demo world: the ideal frozen encoder."""
    rows = []
    for text in texts:
        said = text.split()
        rows.append([float(aspect in said) for aspect in D.ASPECTS])
    return torch.tensor(rows)


def say(*phrases):
    """A well-formed answer that names two phrases."""
    return f"<think> x </think> <reason> {D.REASON.format(*phrases)} </reason>"


@pytest.fixture(scope="module")
def shop():
    return D.demo(1, n_users=500, n_items=150)


@pytest.fixture(scope="module")
def small_shop():
    """Few choosers an item: in eight windows many items wait."""
    return D.demo(1, n_users=300, n_items=60)


@pytest.fixture(scope="module")
def judge(shop):
    made = reward.Judge(shop, bag_of_words)
    made.load_weights(made.model.state_dict())
    return made


# ------------------------------------------------------------------------------ what is convincing
@pytest.mark.filterwarnings("error")  # such as a standard deviation of nothing
@pytest.mark.parametrize(
    ("gains", "margin", "convincing"),
    [
        # mean .5, standard error .289
        ([1.0, 0.0, 1.0, 0.0], 1.5, True),
        ([1.0, 0.0, 1.0, 0.0], 2.0, False),
        ([-1.0, 0.0, -1.0, 0.0], 0.0, False),
        # an identical proposal must never be accepted, nor its rounding count as a gain
        ([0.0] * 8, 0.0, False),
        ([1.2e-7] * 4, 0.5, False),
        # of equal gains the standard error is zero
        ([0.1] * 4, 5.0, True),
        # one judge has no standard error
        ([3.0], 0.0, False),
        ([], 0.0, False),
    ],
)
def test_convincing_asks_for_more_than_margin_standard_errors(gains, margin, convincing):
    """Guards: a standard deviation for a standard error, a gain accepted for its rounding."""
    assert curec.is_convincing(np.array(gains), margin) == convincing


# -------------------------------------------------------------------------------- what is accepted
class FakeJudge:
    """Likes each reason as it is told: likes[reason][k] is the advantage of event k."""

    def __init__(self, data, likes):
        self.data, self.seed, self.likes = data, 0, likes

    def lifts(self, reasons, people, period):
        rows = []
        for reason, events in zip(reasons, people, strict=True):
            values = np.broadcast_to(np.array(self.likes[reason], float), 6)
            rows.append(values[events])
        return rows


ITEM = 5
SHOWN, AUDIENCE = np.array([0, 1]), np.array([2, 3, 4, 5])


class Case(NamedTuple):
    """A current answer, a proposal, and by how much the audience likes them: one value for all, or
    a list of six, of the two users shown and of the four of the audience. A, B, C, D stand for the
    item's phrases."""

    name: str
    current: str
    proposal: str
    likes_current: object
    likes_proposal: object
    accepted: bool
    margin: float = 0.0
    audience: int = 4


SOUND, BROKEN, MADE_UP, HALF = say("A", "B"), "broken", say("quantum", "unicorn"), say("C", "quirk")
BETTER = say("C", "D")
CASES = [
    Case("liked more by all", SOUND, BETTER, 0, 1, True),
    Case("liked less by all", SOUND, BETTER, 1, 0, False),
    Case("liked as much", SOUND, BETTER, 1, 1, False),
    Case("liked more by rounding only", SOUND, BETTER, 1, 1 + 1e-7, False),
    Case("liked by the users shown alone", SOUND, BETTER, 0, [9, 9, 0, 0, 0, 0], False),
    Case("liked by the audience alone", SOUND, BETTER, 0, [-9, -9, 1, 1, 1, 1], True),
    Case("mixed gains, small margin", SOUND, BETTER, 0, [0, 0, 1, 0, 1, 0], True, 1.5),
    Case("mixed gains, large margin", SOUND, BETTER, 0, [0, 0, 1, 0, 1, 0], False, 2.0),
    Case("identical proposal", SOUND, SOUND, 5, 5, False),
    Case("malformed proposal", SOUND, BROKEN, 0, 9, False),
    Case("malformed proposal of a liked reason", SOUND, BETTER + " more", 0, 9, False),
    Case("ungrounded proposal", SOUND, MADE_UP, 0, 9, False),
    Case("half grounded proposal", SOUND, HALF, 0, 9, False),
    Case("half grounded as the current one", say("A", "quirk"), HALF, 0, 1, True),
    Case("malformed current answer, liked a bit more", BROKEN, BETTER, 1, 0, True),
    Case("malformed current answer, liked much more", BROKEN, BETTER, 3, 0, False),
    Case("malformed current answer and proposal", BROKEN, BROKEN, 0, 0, False),
    Case("one judge", SOUND, BETTER, 0, 9, False, audience=1),
    Case("two judges", SOUND, BETTER, 0, 9, True, audience=2),
]


def spell(shop, item, text):
    """A, B, C and D as the phrases of an item."""
    for letter, phrase in zip("ABCD", shop.phrases[item][:4], strict=True):
        text = text.replace(f" {letter} ", f" {phrase} ")
    return text


def accept(shop, current, proposals, likes, margin=0.0, audience=4):
    """curec.accept in a window of one item. likes: answer -> advantages."""
    told = {}
    for text, liked in likes.items():
        told[D.parse_answer(spell(shop, ITEM, text))[0]] = liked
    window = curec.Window(1, (10, 20), [ITEM], [SHOWN], [AUDIENCE[:audience]])
    texts = [spell(shop, ITEM, text) for text in proposals]
    judge = FakeJudge(shop, told)
    return curec.accept(judge, window, [spell(shop, ITEM, current)], texts, margin)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_is_accepted(shop, case):
    """Guards: proposals that are malformed, ungrounded, or liked by luck; a malformed answer that
    outlives a sound one which the audience likes a bit less."""
    likes = {case.current: case.likes_current, case.proposal: case.likes_proposal}
    answers, (entry,), row = accept(
        shop, case.current, [case.proposal], likes, case.margin, case.audience
    )
    assert entry["accepted"] == case.accepted
    stays = case.proposal if case.accepted else case.current
    assert answers == [spell(shop, ITEM, stays)]
    assert row["accepted"] == case.accepted
    assert row["rejected"] == 1 - case.accepted


def test_the_proposal_of_highest_reward_is_put_to_the_test(shop):
    """Guards: the first proposal, or the one that the audience alone likes best, in place of the
    one of highest reward; another proposal tried where that one is refused."""
    other = say("B", "D")
    likes = {SOUND: 0, BETTER: [0, 0, 2, 2, 2, 2], other: [9, 9, -1, -1, -1, -1], MADE_UP: 3}
    # rewards 1 and 4; the audience does not like the latter
    _, (entry,), row = accept(shop, SOUND, [BETTER, other], likes)
    assert entry["proposal"] == D.parse_answer(spell(shop, ITEM, other))[0]
    assert not entry["accepted"]
    assert row["proposed"] == 2
    # rewards 1 and 3 - 2
    _, (entry,), _ = accept(shop, SOUND, [BETTER, MADE_UP], likes)
    assert entry["accepted"]
    _, (entry,), _ = accept(shop, SOUND, [SOUND, BETTER, SOUND], likes)
    assert entry["accepted"]


def test_an_entry_of_the_timeline_by_hand(shop):
    """Guards: rewards of the users shown in place of the audience's, numbers in place of ids."""
    likes = {BROKEN: [9, 9, 1, 1, 1, 1], BETTER: [9, 9, 1, 2, 3, 2]}
    _, (entry,), _ = accept(shop, BROKEN, [BETTER], likes)
    users = shop.events["user"][SHOWN]
    assert entry == {
        "window_end": 20,
        "people": [f"user{u}" for u in users],
        "judges": 4,
        "shared": D.shared_phrases(shop, ITEM, SHOWN)[:3],
        "proposal": D.parse_answer(spell(shop, ITEM, BETTER))[0],
        # a malformed answer pays the penalty
        "reward_before": 1 - reward.FORMAT_PENALTY,
        "reward_after": 2.0,
        "accepted": True,
    }


def test_a_window_of_the_metrics_by_hand():
    """Guards: gains of what was rejected, rewards of proposals that nobody took."""
    entries = [
        {"accepted": True, "reward_before": 1.0, "reward_after": 2.0},
        {"accepted": False, "reward_before": 0.0, "reward_after": 9.0},
        {"accepted": True, "reward_before": 0.0, "reward_after": 3.0},
        {"accepted": False, "reward_before": 5.0, "reward_after": 4.0},
    ]
    assert curec.window_row(entries, 24, 1) == {
        "items": 4,
        "proposed": 24,
        "accepted": 2,
        "rejected": 2,
        "mean_gain": 2.0,
        "false_accept_rate": 0.25,
        "reward_before": 1.5,
        "reward_after": 2.5,
    }


def test_a_window_in_which_nothing_is_accepted_gains_nothing():
    """Guards: NaN as the mean of no gains."""
    entries = [{"accepted": False, "reward_before": 0.0, "reward_after": 9.0}]
    assert curec.window_row(entries, 6, 0)["mean_gain"] == 0


def test_accept_with_a_judge_takes_the_best_pair_and_not_the_worst(judge, shop):
    """Guards: an order of proposals, people or answers that gets lost on the way to the judge."""
    item = max(range(1, shop.n_items + 1), key=lambda i: len(shop.events_by_item[i]))
    shown, audience = curec.split_people(shop.events_by_item[item], np.random.default_rng(0))
    period = shop.events["time"].min(), shop.events["time"].max() + 1
    window = curec.Window(1, period, [item], [shown], [audience])
    pairs = [say(a, b) for a in shop.phrases[item] for b in shop.phrases[item] if a < b]
    people = [audience] * len(pairs)
    reasons = [D.parse_answer(pair)[0] for pair in pairs]
    liked = reward.mean_of_each(judge.lifts(reasons, people, period))
    worst, best = pairs[np.argmin(liked)], pairs[np.argmax(liked)]
    answers, (entry,), _ = curec.accept(judge, window, [worst], [best, worst], 0.0)
    assert answers == [best]
    assert entry["reward_after"] == pytest.approx(liked.max(), abs=1e-5)
    assert entry["reward_before"] == pytest.approx(liked.min(), abs=1e-5)
    answers, _, _ = curec.accept(judge, window, [best], [best, best], 0.0)
    assert answers == [best]
    answers, _, _ = curec.accept(judge, window, [best], [worst], 0.0)
    assert answers == [best]


# --------------------------------------------------------------------------------- false accepts
@pytest.fixture(scope="module")
def full_window(shop):
    """A window of all train time with every item that eight or more people chose."""
    period = int(shop.events["time"].min()), int(shop.events["time"].max()) + 1
    rng = np.random.default_rng(0)
    items, shown, audience = [], [], []
    for item, events in enumerate(shop.events_by_item):
        if len(events) >= 8:
            some, others = curec.split_people(events, rng)
            items.append(item)
            shown.append(some)
            audience.append(others)
    assert len(items) > 20
    return curec.Window(1, period, items, shown, audience)


def of_items(shop, window, *places):
    """For each item of a window an answer that names two of its phrases."""
    return [say(*(shop.phrases[item][k] for k in places)) for item in window.items]


def interleaved(*lists):
    """K answers an item, item by item."""
    return [text for mine in zip(*lists, strict=True) for text in mine]


def false_accept_rate(judge, window, current, proposals, margin=0.0):
    _, _, row = curec.accept(judge, window, current, proposals, margin)
    return row["false_accept_rate"]


def mean_gain_and_gains(judge, window, k, old, new):
    """How much more the users shown like a new answer (mean), and each user of the audience."""
    reasons = [D.parse_answer(text)[0] for text in (old, new)]
    people = [window.shown[k]] * 2 + [window.audience[k]] * 2
    values = judge.lifts(reasons * 2, people, window.period)
    return values[1].mean() - values[0].mean(), values[3] - values[2]


def test_false_accepts_equal_a_computation_by_hand(judge, shop, full_window):
    """Guards: a rate of another test than the one in use: other conditions, other signs for the
    choice than for the test, luck drawn anew for every proposal."""
    old, new = of_items(shop, full_window, 0, 1), of_items(shop, full_window, 2, 3)
    luck = np.random.default_rng([0, 37, len(full_window.items)])
    alone, against_old = [], []
    for k, audience in enumerate(full_window.audience):
        of_the_shown, gains = mean_gain_and_gains(judge, full_window, k, old[k], new[k])
        lucky = luck.choice([-1.0, 1.0], len(audience)) * gains
        convincing = curec.is_convincing(lucky, 0.0)
        # the higher reward of the two: both groups weigh a half
        chosen = of_the_shown + lucky.mean() > 0
        alone.append(convincing)
        against_old.append(chosen and convincing)
    rate = false_accept_rate(judge, full_window, old, new)
    # one proposal, no margin: a coin
    assert 0.25 < rate < 0.75
    assert rate == pytest.approx(np.mean(alone))
    rate = false_accept_rate(judge, full_window, old, interleaved(new, old))
    assert rate == pytest.approx(np.mean(against_old))
    assert np.mean(alone) != np.mean(against_old)


def test_only_different_proposals_give_luck_more_chances(judge, shop, full_window):
    """Guards: signs drawn for every proposal, so that six equal ones pass more often than one."""
    old, new = of_items(shop, full_window, 0, 1), of_items(shop, full_window, 2, 3)
    once = false_accept_rate(judge, full_window, old, new)
    assert false_accept_rate(judge, full_window, old, interleaved(*[new] * 6)) == once
    others = of_items(shop, full_window, 1, 2), of_items(shop, full_window, 0, 4)
    assert false_accept_rate(judge, full_window, old, interleaved(new, *others)) > once


def test_what_can_never_be_accepted_is_no_false_accept(judge, shop, full_window):
    """Guards: luck that passes where the form, the grounding or the margin would not let it."""
    n = len(full_window.items)
    old, new = of_items(shop, full_window, 0, 1), of_items(shop, full_window, 2, 3)
    assert false_accept_rate(judge, full_window, old, new, margin=9.0) == 0
    assert false_accept_rate(judge, full_window, old, old) == 0
    assert false_accept_rate(judge, full_window, old, ["broken"] * n) == 0
    assert false_accept_rate(judge, full_window, old, [say("quantum", "unicorn")] * n) == 0


# -------------------------------------------------------------------------------------- the people
def test_a_third_is_shown_and_the_others_judge():
    """Guards: people who judge what they were shown for; prompts or audiences without limit."""
    for n in (4, 5, 9, 40):
        events = np.arange(100, 100 + n)
        shown, audience = curec.split_people(events, np.random.default_rng(0))
        third = max(1, round(n / 3))
        assert len(shown) == min(third, D.PEOPLE)
        assert len(audience) == min(n - third, reward.MAX_AUDIENCE)
        people = [*shown, *audience]
        assert len(set(people)) == len(people)
        assert set(people) <= set(events)


def test_one_chooser_is_shown_and_nobody_judges():
    """Guards: an error, or a user who judges themselves, where there is one chooser or none."""
    shown, audience = curec.split_people(np.array([7]), np.random.default_rng(0))
    assert shown.tolist() == [7]
    assert audience.tolist() == []
    shown, audience = curec.split_people(np.zeros(0, int), np.random.default_rng(0))
    assert len(shown) == len(audience) == 0


def test_one_shot_people_are_choosers_of_the_item_in_one_group_each(shop):
    """Guards: an audience that is in the prompt; people of another item."""
    shown, audience = curec.one_shot_people(shop, 0)
    assert len(shown) == len(audience) == shop.n_items + 1
    for item, events in enumerate(shop.events_by_item):
        people = [*shown[item], *audience[item]]
        assert len(set(people)) == len(people)
        assert set(people) <= set(events)
        assert len(shown[item]) == min(len(events), D.PEOPLE)
        rest = len(events) - len(shown[item])
        assert len(audience[item]) == min(rest, reward.MAX_AUDIENCE)


def test_one_shot_people_are_drawn_by_their_seed(shop):
    """Guards: the earliest choosers alone; other people in a resumed run."""
    first, again, other = (curec.one_shot_people(shop, seed)[0] for seed in (0, 0, 1))
    late = 0
    for item in range(1, shop.n_items + 1):
        assert np.array_equal(first[item], again[item])
        late += (np.sort(first[item]) != shop.events_by_item[item][: D.PEOPLE]).any()
    assert late > shop.n_items / 2
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


# ------------------------------------------------------------------------------------- the windows
def windows_of(data, number=8):
    return list(curec.correction_windows(data, curec.window_cuts(data, number), 0))


def test_nobody_is_asked_before_they_chose_or_twice(small_shop):
    """Guards: people from after the end of a window, people asked twice, people in two groups."""
    times, asked = small_shop.events["time"], []
    for window in windows_of(small_shop):
        for item, *groups in zip(window.items, window.shown, window.audience, strict=True):
            people = np.concatenate(groups)
            assert (times[people] < window.period[1]).all()
            assert (small_shop.events["item"][people] == item).all()
            asked += people.tolist()
    assert len(asked) > 500
    assert len(set(asked)) == len(asked)


def test_items_with_fewer_than_four_new_choosers_wait_and_lose_nobody(small_shop):
    """Guards: an item judged by one or two people; people who waited and never came back; people
    whose window an item did not step in, and who are asked later than need be."""
    times, waited = small_shop.events["time"], 0
    left = [set(events) for events in small_shop.events_by_item]
    windows = windows_of(small_shop)
    assert [window.number for window in windows] == list(range(1, 9))
    for window in windows:
        start, end = window.period
        shown_to = dict(zip(window.items, window.shown, strict=True))
        judged_by = dict(zip(window.items, window.audience, strict=True))
        for item in range(1, small_shop.n_items + 1):
            came = {e for e in left[item] if times[e] < end}
            assert (item in shown_to) == (len(came) >= 4)
            if item in shown_to:
                shown, audience = shown_to[item], judged_by[item]
                third = max(1, round(len(came) / 3))
                assert {*shown, *audience} <= came
                assert len(shown) == min(third, D.PEOPLE)
                assert len(audience) == min(len(came) - third, reward.MAX_AUDIENCE)
                waited += any(times[e] < start for e in [*shown, *audience])
                left[item] -= came
    assert waited > 10
    assert max(map(len, left)) < 4


def test_the_people_of_a_window_do_not_depend_on_later_ones(small_shop):
    """Guards: a future that changes who is asked about the past."""
    cuts = curec.window_cuts(small_shop, 8)
    whole = list(curec.correction_windows(small_shop, cuts, 0))
    short = list(curec.correction_windows(small_shop, cuts[:4], 0))
    assert len(short) == 3
    for mine, expected in zip(short, whole, strict=False):
        assert mine.items == expected.items
        for a, b in zip(mine.audience, expected.audience, strict=True):
            assert np.array_equal(a, b)


def test_window_cuts_have_about_equal_numbers_of_events(shop):
    """Guards: windows of equal length in time, most of them nearly empty."""
    cuts, times = curec.window_cuts(shop, 5), shop.events["time"]
    sizes, _ = np.histogram(times, cuts)
    assert len(cuts) == 6
    assert sizes.sum() == len(times)
    assert sizes.max() - sizes.min() < 0.02 * len(times)


def test_window_cuts_never_split_equal_times(shop):
    """Guards: events of one moment in two windows; a cut that is there twice."""
    times = [np.sort(t // 20_000_000) for t in shop.times]  # a handful of distinct times
    coarse = dataclasses.replace(shop, times=times)
    for windows in (2, 4, 50):
        cuts = curec.window_cuts(coarse, windows)
        assert cuts == sorted(set(cuts))
        assert cuts[0] == coarse.events["time"].min()
        assert cuts[-1] == coarse.events["time"].max() + 1


def test_data_that_nobody_can_be_trained_on_are_refused(shop):
    """Guards: a traceback where every history is too short."""
    three = dataclasses.replace(
        shop, seqs=[s[:3] for s in shop.seqs], times=[t[:3] for t in shop.times]
    )
    with pytest.raises(D.DataError, match="no user has 4 interactions"):
        curec.window_cuts(three, 2)


# ------------------------------------------------------------------------------------- practice
@pytest.fixture(scope="module")
def practice(small_shop):
    return curec.practice_questions(small_shop, curec.window_cuts(small_shop, 8), 0)


def test_practice_holds_out_items(practice, small_shop):
    """Guards: a reward after PPO that is measured on what was practised."""
    trained, held = ({question.item for question in part} for part in practice)
    assert len(held) == small_shop.n_items // 10
    assert not held & trained


def test_practice_leaves_out_prompts_that_show_nobody_and_no_others(practice, small_shop):
    """Guards: answers that are judged by nobody; prompts that are lost or used twice."""
    train, held_out = practice
    prompts = [question.prompt for question in train + held_out]
    assert len(set(prompts)) == len(prompts)
    # one-shot ones of all items, and those of the items that somebody chose in the window drawn
    one_shot = [prompt for prompt in prompts if "Reason so far: none" in prompt]
    assert len(one_shot) == small_shop.n_items
    assert small_shop.n_items < len(prompts) < 2 * small_shop.n_items
    for question in train + held_out:
        assert len(question.shown)
        assert not set(question.shown) & set(question.audience)


def test_practice_asks_in_both_ways_about_its_items(practice, small_shop):
    """Guards: a policy that never saw a reason to correct, or never wrote a first one."""
    for part in practice:
        prompts = [question.prompt for question in part]
        assert any("Reason so far: none" in prompt for prompt in prompts)
        assert any("Reason so far: people choose it for" in prompt for prompt in prompts)
        for question in part:
            assert D.item_text(small_shop.items[question.item]) in question.prompt


def test_prompts_for_correction_are_of_one_window(practice, small_shop):
    """Guards: practice on more people than a window of the correction has."""
    cuts = np.array(curec.window_cuts(small_shop, 8))
    train, held_out = practice
    for question in train + held_out:
        if "Reason so far: none" not in question.prompt:
            people = np.array([*question.shown, *question.audience], int)
            times = small_shop.events["time"][people]
            assert len(set(np.searchsorted(cuts, times, side="right"))) == 1
