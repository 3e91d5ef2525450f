"""data.py: the demo world and its firewall, splits blind to the future, prompts and parser, files good and bad.

    pytest tests/test_data.py            about ten seconds; the real files are read from ../shared/data if they are there
"""
import gzip
import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import recommender

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
QUESTIONS = {"Which item is blank": "mim", "Which word is blank": "mlm", "Which is preferred": "bpr", "What comes next": "next",
             "Which of these": "rank", "Which rating": "rate", "Why do people choose": "reason"}
TAGS = ("<think>", "</think>", "<reason>", "</reason>")


# ------------------------------------------------------------------------------------------------------- helpers
def task_of(prompt):
    """Which task a sample is, read off its question (the last line)."""
    return next(kind for asked, kind in QUESTIONS.items() if asked in prompt.splitlines()[-1])


def tokens(text):
    """The items named in a text, for data sets whose titles carry their number as tok017."""
    return [int(t) for t in re.findall(r"tok(\d+)", text)]


def named_world(world):
    """The demo world with each item's number in its title, so that a prompt can be read back."""
    return replace(world, items=[{}] + [{**it, "title": f"tok{i:03d} {it['title']}"} for i, it in enumerate(world.items[1:], 1)])


def blocks(n_users=6, length=8, rated=False):
    """User u chooses the items of block u only, in order: any item of its block is the user's own, any other is not."""
    says = "soft warm quiet strong light bright".split()
    n = n_users * length
    items = [{}] + [data.record(f"I{i}", {"title": f"tok{i:03d} {says[i % 6]} {says[(i + 1) % 6]}", "brand": "Acme", "categories": ["Things"]}) for i in range(1, n + 1)]
    seqs = [np.arange(u * length, (u + 1) * length) + 1 for u in range(n_users)]
    return data.Dataset("blocks", items, [f"PERSON-{u}" for u in range(n_users)], seqs, [np.arange(length) for _ in seqs],
                        [s % 5 + 1.0 for s in seqs] if rated else None)


def samples_of(dataset, n=400, seed=3):
    return data.alignment_samples(dataset, n, np.random.default_rng(seed))


def folder(path, rows, header="user,item,timestamp", items=None):
    """Writes a folder of your own; rows: tuples; items default to one titled record for each item named."""
    (path / "interactions.csv").write_text("\n".join([header, *(",".join(map(str, r)) for r in rows)]) + "\n")
    records = [{"id": i, "title": f"Thing {i}"} for i in sorted({str(r[1]) for r in rows})] if items is None else items
    (path / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def gz(path, lines):
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(line + "\n" for line in lines)


def amazon(path, meta, year=2014, name="Toy", reviews=None):
    """Writes a tiny category: three people choose A, B, C, in this order, unless reviews are given."""
    reviews = reviews or [{"reviewerID": f"u{u}", "asin": a, "unixReviewTime": t, "overall": 4.0}
                          for t, a in enumerate("ABC") for u in range(3)]
    gz(path / (f"reviews_{name}_5.json.gz" if year == 2014 else f"{name}_5.json.gz"), map(json.dumps, reviews))
    gz(path / f"meta_{name}.json.gz", meta)
    return str(path)


def item_named(dataset, id):
    return next(it for it in dataset.items[1:] if it["id"] == id)


def ids_of(dataset, user):
    return [dataset.items[i]["id"] for i in dataset.seqs[dataset.users.index(user)]]


# ------------------------------------------------------------------------------------------------ the made-up world
@pytest.fixture(scope="module")
def big_world():
    return data.load("demo", seed=0)


def test_demo_drivers_are_among_the_five_said_and_a_quarter_change(big_world):
    """Guards: a driver that the text never says could not be found by any reason; without drift nothing needs correcting."""
    w = big_world
    assert (len(w.users), w.n_items) == (1000, 500)
    said = [set(data.words(it["title"])) & set(data.ASPECTS) for it in w.items[1:]]
    early, late = ([set(x) for x in w.truth[half][1:]] for half in ("early", "late"))
    assert all(len(s) == 5 for s in said)
    assert all(len(d) == 2 and d <= s for half in (early, late) for d, s in zip(half, said))
    assert 0.19 < np.mean([e != l for e, l in zip(early, late)]) < 0.31
    assert all(len(e & l) >= 1 for e, l in zip(early, late)), "at most one driver is swapped"


def test_demo_title_order_does_not_give_the_drivers_away(big_world):
    """Guards: drivers written first in the title would let an LLM win by position."""
    w = big_world
    at = np.array([[word in w.truth["late"][i] for word in w.items[i]["title"].split()[:5]] for i in range(1, w.n_items + 1)])
    assert (abs(at.mean(0) - 0.4) < 0.08).all()


def test_demo_people_choose_for_the_drivers(big_world):
    """Guards: a world whose choices do not follow the drivers gives the reward nothing to learn: their own history's
    drivers must predict the next item better than the decoys do."""
    w = big_world
    drivers, hits = w.truth["early"], Counter()
    for s, t in zip(w.seqs, w.times):
        s = s[t <= 1_450_000_000]                                          # the first half: nothing has drifted
        for a, b in zip(s[:-1], s[1:]):
            liked, decoys = set(drivers[a]), set(w.items[a]["title"].split()[:5]) - set(drivers[a])
            hits["liked"] += len(liked & set(drivers[b])) / 2              # a share a word
            hits["decoys"] += len(decoys & set(drivers[b])) / 3
    assert hits["liked"] > 2 * hits["decoys"]


def test_demo_same_seed_same_world_another_seed_differs(world):
    """Guards: a hidden global random state (a rerun or --resume would meet another world)."""
    again, other = (data.load("demo", seed=s, small=True) for s in (0, 1))
    assert again.items == world.items and again.truth == world.truth
    assert all((a == b).all() for a, b in zip(again.seqs, world.seqs))
    assert all((a == b).all() for a, b in zip(again.times, world.times))
    assert other.items != world.items and any(len(a) != len(b) or (a != b).any() for a, b in zip(other.seqs, world.seqs))


def test_demo_is_chronological_and_split_leaves_one_out(world):
    """Guards: valid or test inside train, repeated choices, histories out of order."""
    for s, t, train, valid, test in zip(world.seqs, world.times, world.train, world.valid, world.test):
        assert (np.diff(t) >= 0).all() and len(set(s)) == len(s) == len(t) >= 3
        assert [*train, valid, test] == list(s)
    events = world.events
    assert (np.diff(events["time"]) >= 0).all()
    assert len(events["user"]) == sum(len(s) - 1 for s in world.train)
    for e in range(0, len(events["user"]), 50):
        u, p = events["user"][e], events["pos"][e]
        assert events["item"][e] == world.train[u][p] and events["time"][e] == world.times[u][p]
        assert list(world.history(e)) == list(world.seqs[u][:p])


# ---------------------------------------------------------------------------------------- firewalls of the samples
def everything(d):
    """All that data.py hands to training, as comparable values."""
    prompts = [data.reason_prompt(d, i, "", who) for i, who in enumerate(data.choosers(d)) if i]
    return {"items": d.items, "phrases": d.phrases, "masked": d.masked_words, "common": d.common_words,
            "events": {k: v.tolist() for k, v in d.events.items()}, "prompts": prompts, "samples": samples_of(d)}


def test_firewall_truth_changes_nothing_that_training_reads(world):
    """Guards: any use of the hidden truth in items, phrases, events, prompts or alignment samples."""
    rng = np.random.default_rng(0)
    order = [0, *(rng.permutation(world.n_items) + 1)]
    permuted = {half: [world.truth[half][i] for i in order] for half in world.truth}
    assert permuted != world.truth
    assert everything(replace(world, truth=permuted)) == everything(replace(world, truth=None)) == everything(world)


def test_firewall_samples_are_blind_to_valid_and_test(world):
    """Guards: leakage of the evaluation into stage 1: every valid and test item is replaced, the samples stay the same."""
    other = lambda i: int(i) % world.n_items + 1
    changed = replace(world, seqs=[np.append(s[:-2], [other(s[-2]), other(s[-1])]) for s in world.seqs],
                      times=[np.append(t[:-2], t[-2:] + 5) for t in world.times])
    assert (changed.test != world.test).all() and (changed.valid != world.valid).all()
    assert everything(changed) == everything(world)
    train_changed = replace(world, seqs=[np.append(s[:-3], [other(s[-3]), *s[-2:]]) for s in world.seqs])
    assert samples_of(train_changed) != samples_of(world), "the comparison can fail"


def test_negatives_are_never_in_the_users_train_items_but_may_be_held_out():
    """Guards: a train item called not preferred; and the opposite leak: sparing the test item tells which one it is."""
    d, own_held_out, seen = blocks(), 0, 0
    for prompt, _ in samples_of(d, 3000):
        if task_of(prompt) in ("bpr", "rank"):
            shown, candidates = tokens(prompt.splitlines()[0]), tokens(prompt.splitlines()[-1])
            user = (shown[0] - 1) // 8
            assert sum(c in d.train[user] for c in candidates) == 1, prompt    # the choice itself, no other
            own_held_out += sum(c in (d.valid[user], d.test[user]) for c in candidates)
            seen += 1
    assert seen > 200 and own_held_out > 5


def test_every_task_appears_and_rating_only_with_ratings():
    """Guards: a task lost behind a fall-through; made-up ratings where the source has none (Beauty here)."""
    kinds = lambda rated: {task_of(p) for p, _ in samples_of(blocks(rated=rated), 600)}
    assert kinds(False) == {"reason", "mim", "mlm", "bpr", "next", "rank"}
    assert kinds(True) == kinds(False) | {"rate"}


def test_answers_of_the_recommendation_tasks_are_what_the_person_did():
    """Guards: off-by-one in the choice to be told, a choice that stands first always, wrong blank, another event's rating."""
    d = blocks(rated=True)
    runs = lambda shown, goal: shown == list(range(shown[0], shown[0] + len(shown))) and goal == shown[-1] + 1
    seen, places = Counter(), Counter()
    for prompt, answer in samples_of(d, 1500):
        kind, first, last = task_of(prompt), prompt.splitlines()[0], prompt.splitlines()[-1]
        seen[kind] += 1
        if kind == "next":
            assert runs(tokens(first), tokens(answer)[0])
        elif kind in ("bpr", "rank"):
            assert runs(tokens(first), tokens(answer)[0]) and len(tokens(last)) == {"bpr": 2, "rank": 3}[kind] and len(tokens(answer)) == 1
            places[kind, tokens(last).index(tokens(answer)[0])] += 1
        elif kind == "rate":
            goal = tokens(last)[0]
            assert runs(tokens(first), goal) and int(answer) == goal % 5 + 1
        elif kind in ("mim", "mlm"):
            assert prompt.count("____") == 1
            told = tokens(first.replace("____", answer))
            assert told == list(range(told[0], told[0] + len(told))) and max(told) in d.train[(told[0] - 1) // 8]
    assert min(seen[k] for k in ("next", "bpr", "rank", "rate", "mim", "mlm")) > 20 and len(places) == 5 and min(places.values()) > 10


def test_next_goes_on_for_some_items_and_every_choice_comes_before_any_comes_again():
    """Guards: an answer that runs into validation, items joined to one title, choices that are never told."""
    d = blocks()
    samples = data.alignment_samples(d, 90, np.random.default_rng(0), reason_share=0.0, next_share=1.0, longest=10, ahead=4)
    for prompt, answer in samples:
        shown, told = tokens(prompt), tokens(answer)
        assert shown + told == list(range(shown[0], told[-1] + 1)) and len(answer.split("\n")) == len(told)
        assert len(told) == 4 or told[-1] == d.train[(shown[0] - 1) // 8][-1], "to the end of train and no further"
    first = [tokens(answer)[0] for _, answer in samples]
    assert sorted(first[:30]) == sorted(int(i) for s in d.train for i in s[1:]) == sorted(first[30:60])
    half = [task_of(p) for p, _ in data.alignment_samples(d, 1000, np.random.default_rng(0), reason_share=0.0, tasks=("rank", "rate", "mim"), next_share=0.5)]
    assert 430 < half.count("next") < 570 and {*half} == {"next", "rank", "mim"}


def test_weak_reasons_name_their_thought_and_are_filled_up_at_random(world):
    """Guards: a target that no reader of the prompt could give; a fixed pair for items nobody is shown for."""
    who, rng, filled = data.choosers(world), np.random.default_rng(0), set()
    for item in range(1, world.n_items + 1):
        for people in (who[item][:3], ()):
            _, answer = data.reason_sample(world, item, people, rng)
            think, named = data.ANSWER_PATTERN.fullmatch(answer)[1].split()[2::2], data.parse_answer(answer)[1]
            assert set(think) <= set(named) <= set(world.phrases[item]) and len(set(named)) == 2
            if not think:
                filled.add(tuple(world.phrases[item].index(w) for w in named))
    assert len(filled) == 10, "all pairs of five words come up"


def test_reason_samples_show_histories_cut_just_before_the_choice(world):
    """Guards: a history that holds the item itself or anything after it; a weak target that the item does not say."""
    d, shown_any = named_world(world), 0
    allowed = {(tuple(s[max(0, p - data.HISTORY): p]), s[p]) for s in d.train for p in range(1, len(s))}
    for prompt, answer in samples_of(d):
        if task_of(prompt) == "reason":
            item = tokens(prompt.split("Item:")[1])[0]
            people = [tuple(tokens(line)) for line in prompt.splitlines() if line.startswith("- tok")]
            assert len(people) <= data.PEOPLE and all((p, item) in allowed for p in people)
            shown_any += len(people)
            reason, named, ok = data.parse_answer(answer)
            assert ok and set(named) <= set(d.phrases[item]) and data.grounded(d, item, reason) == 1
    assert shown_any > 100


def test_reason_think_names_the_overlap_only(world):
    """Guards: a chain of thought that claims overlaps the shown titles do not have."""
    for item, who in list(enumerate(data.choosers(world)))[1:40]:
        prompt, answer = data.reason_sample(world, item, who[:3], np.random.default_rng(0))
        told = re.search(r"<think> most shared (.*?) </think>", answer)
        shown = set(data.words(prompt.split("Reason so far")[0]))
        assert set(data.words(told[1]) if told else []) - {"and"} <= shown & set(world.phrases[item])
        assert told or not shown & set(world.phrases[item])


def test_the_thought_is_the_two_words_most_shared_with_what_the_prompt_shows(world):
    """Guards: words counted over people or items that the prompt does not show; the first shared words instead of the
    most shared; another order than the item's; reasons that do not name the thought."""
    many = 0
    for item, who in list(enumerate(data.choosers(world)))[1:]:
        events = who[world.events["pos"][who] > data.HISTORY]
        prompt, answer = data.reason_sample(world, item, events, np.random.default_rng(0))
        lines, own = [x for x in prompt.splitlines() if x.startswith("- ")], world.phrases[item]
        count = {w: sum(data.words(line).count(w) for line in lines) for w in own}
        best = sorted([w for w in own if count[w]], key=lambda w: (-count[w], own.index(w)))[:2]
        told = data.ANSWER_PATTERN.fullmatch(answer)[1].split()
        assert [w for w in told if w != "and"] == (["most", "shared", *sorted(best, key=own.index)] if best else ["nothing", "shared"])
        assert len(best) < 2 or data.parse_answer(answer)[1] == told[2::2]
        many += len(events) > data.PEOPLE
    assert many > 20, "more people than a prompt shows"


def test_a_share_of_the_reasons_follows_the_thought(world):
    """Guards: weak targets that already name what reinforcement is to find, or never do."""
    who, rng, hits = data.choosers(world), np.random.default_rng(0), []
    for item in [i for i in range(1, world.n_items + 1) if len(data.shared_words(world, i, who[i])) >= 2] * 5:
        _, answer = data.reason_sample(world, item, who[item], rng, follow=0.25)
        _, named, ok = data.parse_answer(answer)
        assert ok and set(named) <= set(world.phrases[item])
        hits.append(named == data.ANSWER_PATTERN.fullmatch(answer)[1].split()[2::2])
    assert abs(np.mean(hits) - (0.25 + 0.75 / 10)) < 0.08, "at random one of ten pairs"


def test_no_user_id_in_any_sample(world):
    """Guards: ids that the LLM would memorise in place of reasons."""
    rated = blocks(rated=True)
    assert not any(re.search(r"user\d|PERSON|I\d", p + a) for p, a in samples_of(world) + samples_of(rated))


# --------------------------------------------------------------------------------------------- prompts and parsing
def test_reason_prompt_shows_only_the_people_given_and_only_what_they_had_chosen_before(world):
    """Guards: other people, later choices or the choice itself in the prompt (the causality of correction rests on it)."""
    d = named_world(world)
    events = np.flatnonzero(d.events["pos"] > data.HISTORY)[[3, 1, 7, 20, 5, 6]]
    past = [d.train[d.events["user"][e]][d.events["pos"][e] - data.HISTORY: d.events["pos"][e]].tolist() for e in events]
    prompt = data.reason_prompt(d, 3, "people choose it for charm and calm", events[:2])
    assert tokens(prompt) == [*past[0], *past[1], 3], "the last HISTORY items of each person, oldest first, then the item"
    assert "people choose it for charm and calm" in prompt and data.item_text(d.items[3]) in prompt
    assert tokens(data.reason_prompt(d, 3, "", events)) == [*sum(past[: data.PEOPLE], []), 3], "at most PEOPLE of them"


def test_reason_prompt_renders(world):
    """Guards: unfilled slots and 'None' in the text a model reads; prints one prompt (pytest -s) with its word count."""
    item = int(world.counts.argmax())
    prompt, alone = (data.reason_prompt(world, item, "", who) for who in (data.choosers(world)[item][-2:], []))
    print(f"\n{prompt}\n[{len(prompt.split())} words]")
    assert prompt.splitlines()[-1] == "Why do people choose it?" and len(prompt.split()) < 90
    assert "nobody" in alone and not re.search(r"[{}]|None|nan\b|\[\]", prompt + alone)


GOOD = "<think> both name grip </think> <reason> people choose it for grip and calm </reason>"


def test_parse_answer_reads_its_own_format():
    """Guards: a parser and a template that drift apart."""
    assert data.parse_answer(GOOD) == ("people choose it for grip and calm", ["grip", "calm"], True)
    assert data.parse_answer("\n" + GOOD + " \n")[2], "white space around is the tokenizer's business"
    made = data.ANSWER.format("x", data.REASON.format("soft grip", "deep calm"))
    assert data.parse_answer(made)[1:] == (["soft grip", "deep calm"], True)


@pytest.mark.parametrize("bad", [
    "", "people choose it for grip and calm", GOOD.replace("</reason>", ""), GOOD.replace("<think>", ""), GOOD + GOOD,
    GOOD.replace("</reason>", "</reason> <reason> people choose it for shine and shade </reason>"),
    GOOD.replace("</reason>", "</reason> and more"), GOOD.replace("<think>", "<think> <think>"),
    GOOD.replace("grip and calm", "grip and grip"),
    GOOD.replace("grip and calm", "grip and Grip"), GOOD.replace("grip and calm", "brush and Brushes"),
    GOOD.replace("grip and calm", "grip"), GOOD.replace("grip and calm", "grip and ..."),
    GOOD.replace("people choose it for ", ""), "<reason> people choose it for grip and calm </reason> <think> x </think>"])
def test_parse_answer_refuses(bad):
    """Guards: a broken format that would escape the format penalty (missing, doubled or swapped tags, a phrase named twice)."""
    assert data.parse_answer(bad)[2] is False


def test_parse_answer_survives_long_garbage():
    """Guards: catastrophic backtracking on what an untrained policy writes."""
    start = time.perf_counter()
    for junk in ("<think>" * 50_000, "<think> " + "a " * 100_000, GOOD * 5_000, "<think>x</think><reason>" + "people choose it for a and " * 9_000):
        assert data.parse_answer(junk)[2] is False
    assert time.perf_counter() - start < 2


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*TAGS, " ", "people choose it for ", "grip", " and ", "calm", "\n", "<", "é"]), max_size=14))
def test_parse_answer_accepts_only_one_think_one_reason_two_phrases(parts):
    """Guards: any accepted text that is not the format."""
    text = "".join(parts)
    reason, named, ok = data.parse_answer(text)
    if ok:
        assert all(text.count(tag) == 1 for tag in TAGS)
        assert len(named) == 2 and named[0] != named[1] and all(n in reason for n in named)


def test_grounded_counts_the_items_own_words(world):
    """Guards: template words counted as content, words of other items counted as grounded."""
    a, b = world.phrases[1][:2]
    foreign = next(w for w in data.ASPECTS if w not in world.phrases[1])
    assert data.grounded(world, 1, data.REASON.format(a, b)) == 1.0
    assert data.grounded(world, 1, data.REASON.format(a, foreign)) == 0.5
    assert data.grounded(world, 1, data.REASON.format(foreign, foreign)) == 0.0


def test_mask_identity_hides_brands_numbers_and_rare_words(world):
    """Guards: a reason that earns reward by naming which item it is instead of why it is chosen."""
    d = replace(world, items=[{}, {**world.items[1], "title": world.items[1]["title"] + " zyxwoq 500"}, *world.items[2:]])
    brand, (a, b) = d.items[1]["brand"], d.phrases[1][:2]
    low, high = sorted([a, b])
    assert data.mask_identity(d, f"{brand} {high} zyxwoq 500 12ml the {low}") == f"{low} {high}", "in an order that no reason can choose"
    assert data.mask_identity(d, f"{brand} 500") == data.mask_identity(d, "zyxwoq"), "nothing left: the same neutral text"
    assert data.mask_identity(d, brand).strip(), "an encoder needs at least one token"


def test_phrases_are_what_an_item_says_and_others_say_too(world):
    """Guards: brands, common words or another item's words offered as a reason."""
    assert world.phrases[0] == []
    for item, phrases in zip(world.items[1:], world.phrases[1:]):
        assert set(phrases) == set(item["title"].split()[:5]), "the five aspects, not the brand"


def test_phrases_name_a_word_once(world):
    """Guards: the weak target 'people choose it for nail and nails', which the format refuses."""
    titles = ["Nail Brush, Nails and Brushes 3 pcs de luxe"] * data.MIN_ITEMS
    d = replace(world, items=[{}, *({**item, "title": t} for item, t in zip(world.items[1:], titles)), *world.items[1 + len(titles):]])
    assert d.phrases[1] == ["nails", "brushes", "luxe"]
    for same in (("nail", "nails"), ("brush", "brushes"), ("box", "boxes"), ("glass", "glasses"), ("base", "bases"), ("eye", "eyes")):
        assert data.stem(same[0]) == data.stem(same[1]), same
    for other in (("bar", "bare"), ("car", "care"), ("tub", "tube"), ("bass", "base"), ("see", "s"), ("clean", "cleanse")):
        assert data.stem(other[0]) != data.stem(other[1]), other


# --------------------------------------------------------------------------------------------------- Amazon files
def test_amazon_2014_meta_is_read_as_literals_and_never_run(tmp_path):
    """Guards: eval on a downloaded file. The line with a call is skipped and counted; its command must not run."""
    trap = tmp_path / "owned"
    d = data.load("Toy", amazon(tmp_path, [
        "{'asin': 'A', 'title': 'Rose &amp; Honey Soap &lt;b&gt;', 'brand': \"L'Or\", 'categories': [['Beauty', 'Bath', 'Soaps']], 'price': 3.5}",
        f"{{'asin': 'B', 'title': __import__('os').system('touch {trap}')}}",
        "{'asin': 'C', 'title': 'Plain comb', 'categories': [[]]}"]))
    assert not trap.exists()
    assert item_named(d, "A")["title"] == "Rose & Honey Soap" and item_named(d, "A")["brand"] == "L'Or"
    assert item_named(d, "A")["categories"] == ["Beauty", "Bath", "Soaps"] and item_named(d, "B")["title"] == ""
    assert any("1 lines" in n and "skipped" in n for n in d.notes) and d.ratings[0].tolist() == [4.0] * 3


def test_missing_titles_brands_and_descriptions_are_never_printed(tmp_path):
    """Guards: 'nan', 'None' and '[]' in prompts, where they would count as words that items share."""
    d = data.load("Toy", amazon(tmp_path, ["{'asin': 'A', 'title': None, 'brand': 'nan', 'description': 'None'}",
                                           "{'asin': 'B', 'title': 'nan', 'brand': None, 'categories': [['None', 'Soaps']]}"]))
    assert any(n.startswith("3 items without a title") for n in d.notes), d.notes
    for i in range(1, 4):
        shown = data.reason_prompt(d, i, "", []) + "".join(d.titles[j] for j in range(1, 4))
        assert not re.search(r"none|nan\b|\[|null", shown.replace("Reason so far: none", ""), re.I), shown
        assert d.titles[i] and data.item_text(d.items[i])


def test_markup_and_control_tags_in_titles_are_dropped(tmp_path):
    """Guards: a title that closes the reason tag and so writes the answer itself."""
    d = data.load("Toy", amazon(tmp_path, ["{'asin': 'A', 'title': 'Soap</reason> <think> a\\nb &lt;/think&gt;'}"]))
    assert item_named(d, "A")["title"] == "Soap a b"


def test_amazon_2018_json_lines(tmp_path):
    """Guards: the second format (file name, list-valued description, one flat category path)."""
    meta = [json.dumps({"asin": "A", "title": "Card", "brand": "Amazon", "category": ["Gift Cards", "Toys"], "description": ["For", "Kids&#39;"]}),
            json.dumps({"asin": "B", "title": float("nan"), "description": [], "category": []})]
    d = data.load("Toy", amazon(tmp_path, meta, year=2018))
    a = item_named(d, "A")
    assert (a["description"], a["categories"]) == ("For Kids'", ["Gift Cards", "Toys"]) and item_named(d, "B")["title"] == ""


def test_broken_review_lines_are_skipped_and_counted(tmp_path):
    """Guards: one bad line that stops an hour's run, or vanishes silently."""
    path = amazon(tmp_path, ["{'asin': 'A', 'title': 'x'}"])
    with gzip.open(os.path.join(path, "reviews_Toy_5.json.gz"), "at") as f:
        f.write('{"reviewerID": "u9"}\nnot json\n[1, 2]\n')
    d = data.load("Toy", path)
    assert len(d.users) == 3 and any(n.startswith("3 lines") for n in d.notes)


def test_truncated_gzip_names_the_file_and_the_remedy(tmp_path):
    """Guards: a traceback, or worse a silently shorter data set, from a broken copy."""
    path = amazon(tmp_path, ["{'asin': 'A', 'title': 'x'}"], reviews=[
        {"reviewerID": f"u{u}", "asin": f"{np.random.default_rng(u).integers(10 ** 9)}", "unixReviewTime": t} for u in range(200) for t in range(3)])
    file = Path(path) / "reviews_Toy_5.json.gz"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(data.DataError, match="reviews_Toy_5.json.gz.*(?s:.)*download"):
        data.load("Toy", path)


def test_corrupt_gzip_names_the_file_and_the_remedy(tmp_path):
    """Guards: zlib.error, which is no OSError, ending in a traceback."""
    path = amazon(tmp_path, ["{'asin': 'A', 'title': 'x'}"])
    file = Path(path) / "reviews_Toy_5.json.gz"
    file.write_bytes(corrupt(file.read_bytes()))
    with pytest.raises(data.DataError, match="reviews_Toy_5.json.gz"):
        data.load("Toy", path)


# ------------------------------------------------------------------------------------------------ a folder of your own
def test_own_folder_loads_with_ratings_and_a_5_core(tmp_path):
    """Guards: columns by position instead of by name; the 5-core default; ids that look like numbers."""
    rows = [(t, f"p{u}", i, 3 + u % 2) for t, i in enumerate(range(101, 107)) for u in range(6)]
    rows += [(9, "p0", "once", 5), (9, "loner", 101, 5)]                   # fall out of the 5-core
    items = [{"id": i, "title": f"Thing {i}", "categories": "Tools", "brand": "Acme"} for i in range(101, 107)]
    path = folder(tmp_path, rows, "timestamp,user,item,rating", items)
    d = data.load(path)
    assert d.users == [f"p{u}" for u in range(6)] and d.n_items == 6 and d.name == tmp_path.name
    assert ids_of(d, "p0") == [str(i) for i in range(101, 107)] and d.ratings[1].tolist() == [4.0] * 6
    assert item_named(d, "103") == {"id": "103", "title": "Thing 103", "brand": "Acme", "description": "", "categories": ["Tools"]}
    loose = data.load(path, k_core=0)
    assert ids_of(loose, "p0")[-1] == "once" and "loner" not in loose.users


@pytest.mark.parametrize("break_it, says", [
    (lambda p: (p / "interactions.csv").write_text("user,item\na,b\n"), ("interactions.csv", "timestamp")),
    (lambda p: (p / "interactions.csv").write_text(""), ("interactions.csv", "timestamp")),
    (lambda p: (p / "interactions.csv").unlink(), ("interactions.csv", "user,item,timestamp")),
    (lambda p: (p / "items.jsonl").unlink(), ("items.jsonl", "id,title")),
    (lambda p: (p / "items.jsonl").write_text('{"id": 1, "title": "x"}\n{"title": "y"}\n'), ("items.jsonl", "line 2", "id"))])
def test_own_folder_errors_name_the_file_and_the_remedy(tmp_path, break_it, says):
    """Guards: KeyError and friends where a person needs to know which file to mend, and how."""
    folder(tmp_path, [("a", "b", 1)])
    break_it(tmp_path)
    with pytest.raises(data.DataError) as e:
        data.load(str(tmp_path))
    assert all(s in str(e.value) for s in (str(tmp_path), *says)), str(e.value)


def test_unreadable_timestamps_are_named_in_the_error(tmp_path):
    """Guards: dates like 2020-01-31 end in advice about --k-core, though no line could be read at all."""
    (mine := tmp_path / "mine").mkdir()                                    # the test's own name must not satisfy the match
    folder(mine, [("a", i, f"2020-01-0{i}") for i in range(1, 6)])
    with pytest.raises(data.DataError) as e:
        data.load(str(mine))
    assert "timestamp" in str(e.value).replace(str(tmp_path), "")


def test_equal_times_keep_the_file_order_and_shuffle_changes_it_by_seed(tmp_path):
    """Guards: an unstable sort (9,719 of Beauty's users have tied last items); a shuffle that moves untied items."""
    names = [f"i{k:02d}" for k in range(12)]
    order = np.random.default_rng(5).permutation(names)
    path = folder(tmp_path, [(u, i, 100 if k < 10 else 50) for u in "abc" for k, i in enumerate(order)])
    load = lambda **kw: data.load(path, k_core=0, **kw)
    expected = [*order[10:], *order[:10]]
    assert all(ids_of(load(), u) == expected for u in "abc")
    shuffled = load(ties="shuffle")
    assert all(ids_of(shuffled, u) != expected and set(ids_of(shuffled, u)[:2]) == set(order[10:]) for u in "abc")
    assert [ids_of(load(ties="shuffle"), u) for u in "abc"] == [ids_of(shuffled, u) for u in "abc"]
    assert [ids_of(load(ties="shuffle", seed=1), u) for u in "abc"] != [ids_of(shuffled, u) for u in "abc"]


def test_duplicates_keep_the_first_and_short_users_are_counted(tmp_path):
    """Guards: the last of a repeated pair kept (moves the item towards test); users without valid and test kept or lost silently."""
    rows = [("a", "x", 1, 5), ("a", "y", 2, 4), ("a", "x", 3, 1), ("a", "z", 4, 2), ("b", "x", 1, 3), ("b", "y", 2, 3),
            ("c", "x", 1, 3), ("c", "x", 2, 3), ("c", "y", 3, 3)]
    d = data.load(folder(tmp_path, rows, "user,item,timestamp,rating"), k_core=0)
    assert d.users == ["a"] and ids_of(d, "a") == ["x", "y", "z"] and d.ratings[0].tolist() == [5, 4, 2]
    assert any(n.startswith("2 repeated") for n in d.notes) and any(n.startswith("2 users with fewer than 3") for n in d.notes)


@pytest.mark.parametrize("odd", ["4.5", "", "0"])
def test_ratings_that_are_not_one_to_five_are_left_out_and_told(tmp_path, odd):
    """Guards: a rating task without its answer; ratings that vanish without a word."""
    d = data.load(folder(tmp_path, [("a", x, k, r) for k, (x, r) in enumerate(zip("xyz", (5, 4, odd)))], "user,item,timestamp,rating"), k_core=0)
    assert d.ratings is None and any("ratings are left out" in n for n in d.notes)


def test_nothing_left_is_an_error_with_advice(tmp_path):
    """Guards: an empty data set that fails later in numpy."""
    with pytest.raises(data.DataError, match="k-core"):
        data.load(folder(tmp_path, [("a", "x", 1), ("a", "y", 2), ("a", "z", 3)]))


def crowd(path, n_users=30, n_items=20, each=12):
    """Random choices, everyone's last item is 'late': popular, but never in train."""
    rng = np.random.default_rng(0)
    rows = [(f"u{u:02d}", f"i{i:02d}", t) for u in range(n_users) for t, i in enumerate(rng.permutation(n_items)[:each])]
    return folder(path, rows + [(f"u{u:02d}", "late", 99) for u in range(n_users)])


def test_k_core_is_repeated_until_nothing_falls_out():
    """Guards: one pass in place of many: item w falls, then user c, then item z, and only then is it a core."""
    rows = [(user, item, 1) for user, item in "ax ay az bx by cz cw".split()]
    assert data.core(rows, 2) == [("a", "x", 1), ("a", "y", 1), ("b", "x", 1), ("b", "y", 1)]
    assert data.core(rows, 0) == data.core(rows, 1) == rows


def test_limit_items_counts_train_only_and_is_deterministic(tmp_path):
    """Guards: choosing the catalogue by valid and test items ('late' is the most chosen item, but only as a test item)."""
    path = crowd(tmp_path)
    whole, d, again = data.load(path), data.load(path, limit_items=10), data.load(path, limit_items=10)
    ids = lambda x: {it["id"] for it in x.items[1:]}
    assert "late" in ids(whole) and "late" not in ids(d) and ids(d) == ids(again) and d.n_items <= 10
    top = sorted(range(1, whole.n_items + 1), key=lambda i: (-whole.counts[i], whole.items[i]["id"]))[:10]
    assert ids(d) <= {whole.items[i]["id"] for i in top}
    assert all((a == b).all() for a, b in zip(d.seqs, again.seqs)) and min(map(len, d.seqs)) >= 5


def test_limit_users_draws_by_seed(tmp_path):
    """Guards: the first N users (sorted ids) in place of a draw; a draw that another seed repeats."""
    path = crowd(tmp_path)
    load = lambda seed: data.load(path, limit_users=8, seed=seed).users
    assert len(load(0)) == 8 and load(0) == load(0) and load(0) != load(1)
    assert load(0) != data.load(path).users[:8]


def test_short_histories_still_give_alignment_samples(tmp_path):
    """Guards: people with three choices have one train item and so no next item to tell; the mixture must not crash."""
    items = [{"id": f"i{k}", "title": " ".join(data.ASPECTS[k:k + 3])} for k in range(9)]
    d = data.load(folder(tmp_path, [(u, f"i{(u + k) % 9}", k) for u in range(9) for k in range(3)], items=items), k_core=0)
    assert {task_of(p) for p, _ in samples_of(d, 20)} == {"reason"}


def test_a_mistyped_folder_is_not_looked_up_on_the_internet(tmp_path, monkeypatch):
    """Guards: `--dataset ./shpo` ending in advice to download reviews_./shpo_5.json.gz from Stanford."""
    asked = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: asked.append(a) or (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(data.DataError) as e:
        data.load(str(tmp_path / "shpo"), str(tmp_path / "data"))
    assert not asked and str(tmp_path / "shpo") in str(e.value) and "reviews_" not in str(e.value)


# ------------------------------------------------------------------------------------------------------ downloads
def corrupt(packed):
    """A gzip file with a good header and a spoilt body (an impossible block type: zlib.error)."""
    plain = gzip.compress(gzip.decompress(packed))                         # without a file name the header has ten bytes
    return plain[:10] + b"\xff" + plain[11:]


class Answer(io.BytesIO):
    """What urlopen gives back: a body and its headers; notes which finished files exist while it is being read."""

    def __init__(self, body, length, folder):
        super().__init__(body)
        self.headers, self.folder = {"Content-Length": str(length)}, folder

    def read(self, *size):
        Answer.seen = Answer.seen | {f for f in os.listdir(self.folder) if f.endswith(".gz")}
        return super().read(*size)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A fake server with a tiny Beauty; .serve(spoil) puts it in place, .asked lists the addresses."""
    (source := tmp_path / "server").mkdir()
    amazon(source, ["{'asin': 'A', 'title': 'Soap'}"], name="Beauty")
    shop = type("Shop", (), {"asked": [], "folder": tmp_path / "data"})
    Answer.seen = frozenset()

    def serve(spoil=lambda body: (body, len(body))):
        def urlopen(request, *_, **__):
            url = getattr(request, "full_url", request)
            shop.asked.append(url)
            body, length = spoil((source / url.rsplit("/", 1)[1]).read_bytes())
            return Answer(body, length, shop.folder)
        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        monkeypatch.setattr(data, "urlopen", urlopen, raising=False)
    shop.serve = staticmethod(serve)
    return shop


def test_download_is_atomic_and_happens_once(shop):
    """Guards: a half-written file under its final name; a download at every start."""
    shop.serve()
    d = data.load("beauty", str(shop.folder))
    assert len(d.users) == 3 and item_named(d, "A")["title"] == "Soap"
    assert sorted(os.listdir(shop.folder)) == ["meta_Beauty.json.gz", "reviews_Beauty_5.json.gz"], "no .part left"
    assert Answer.seen <= {"reviews_Beauty_5.json.gz"}, "only the first, finished file was there while reading"
    assert len(shop.asked) == 2 and len(set(shop.asked)) == 2
    data.load("beauty", str(shop.folder))
    assert len(shop.asked) == 2


@pytest.mark.parametrize("spoil", [
    lambda body: (body, len(body) + 1), lambda body: (body[: len(body) // 2], len(body)),
    lambda body: (b"<html>moved</html>", 18), lambda body: (body[:-9], len(body) - 9),
    lambda body: (corrupt(body), len(corrupt(body)))],
    ids=["size differs", "cut off", "a web page", "gzip without its end", "gzip with a spoilt body"])
def test_download_that_came_broken_leaves_nothing(shop, spoil):
    """Guards: a broken file that is found, and believed, at the next start."""
    shop.serve(spoil)
    with pytest.raises(data.DataError, match="reviews_Beauty_5.json.gz"):
        data.load("beauty", str(shop.folder))
    assert os.listdir(shop.folder) == []


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), TimeoutError("timed out"), ConnectionResetError("reset"),
                                   urllib.error.HTTPError("http://x", 404, "Not Found", {}, None),
                                   http.client.BadStatusLine("hello")], ids=lambda e: type(e).__name__)
def test_download_refused_says_which_files_from_where_and_where_to(tmp_path, monkeypatch, error):
    """Guards: bar 3: no internet must end with one message that tells a person all that is needed, and no debris
    (BadStatusLine: what a captive portal gives; http.client's errors are no OSError)."""
    def refuse(*_, **__):
        raise error
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(data.DataError) as e:
        data.load("beauty", str(tmp_path))
    message = str(e.value)
    for file in ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"):
        assert re.search(rf"https?://\S+/{file}", message) and message.count(file) >= 2
    assert str(tmp_path) in message and "--dataset demo" in message
    assert list(tmp_path.iterdir()) == []


def test_a_missing_2018_meta_file_is_asked_of_the_2018_address(tmp_path, monkeypatch):
    """Guards: 2018 reviews joined with the 2014 meta file of the same name (other items, or a 404)."""
    amazon(tmp_path, [], year=2018)
    (tmp_path / "meta_Toy.json.gz").unlink()

    def refuse(url, *_, **__):
        raise OSError(f"asked {getattr(url, 'full_url', url)}")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(data.DataError, match="asked http.*v2.*meta_Toy.json.gz"):
        data.load("Toy", str(tmp_path))


# ---------------------------------------------------------------------------------------------------- the real files
needs = lambda file: pytest.mark.skipif(not (SHARED / file).exists(), reason="../shared/data is not here")


@pytest.fixture(scope="module")
def beauty():
    return data.load("beauty", str(SHARED / "amazon2014"))


@needs("amazon2014/reviews_Beauty_5.json.gz")
def test_beauty_has_the_published_counts_and_clean_titles(beauty):
    """Guards: any filter or parser that moves Beauty away from every published table."""
    assert (len(beauty.users), beauty.n_items, sum(map(len, beauty.seqs))) == (22_363, 12_101, 198_502)
    titles = [it["title"] for it in beauty.items[1:]]
    assert sum(map(bool, titles)) == 12_094 and sum(bool(it["brand"]) for it in beauty.items[1:]) > 9_900
    assert not any("&amp;" in t or t.lower() in ("nan", "none") for t in titles) and any("&" in t for t in titles)
    assert beauty.ratings is None


@needs("amazon2014/reviews_Beauty_5.json.gz")
@pytest.mark.parametrize("name, hr, ndcg", [("popularity", .0110, .0053), ("markov", .0665, .0438)])
def test_beauty_counting_baselines_come_out_as_published(beauty, name, hr, ndcg):
    """Guards: loader, tie order, split and full-ranking evaluation at once (NUMBERS.md)."""
    score = getattr(recommender, name)(beauty.n_items, beauty.train)
    known = [np.append(s, v) for s, v in zip(beauty.train, beauty.valid)]
    m = recommender.metrics(recommender.ranks(score, known, beauty.test, batch=64))
    assert abs(m["hr@10"].mean() - hr) < .0003 and abs(m["ndcg@10"].mean() - ndcg) < .0003


@needs("amazon2018/Gift_Cards_5.json.gz")
def test_gift_cards_has_its_counts_and_ratings():
    """Guards: the 2018 reader on real lines; repeated pairs."""
    d = data.load("Gift_Cards", str(SHARED / "amazon2018"))
    assert (len(d.users), d.n_items, sum(map(len, d.seqs))) == (458, 148, 2_965)
    assert all(1 <= r.min() and r.max() <= 5 for r in d.ratings) and any("7 repeated" in n for n in d.notes)
    assert {task_of(p) for p, _ in samples_of(d)} >= {"reason", "rate"}


# ----------------------------------------------------------------------------------------------- the two relatives
@pytest.mark.parametrize("text, names", [
    ('{"preferences": ["a", "b", "c", "d", "e"]}', list("abcde")),
    ('Sure! {"preferences": ["a", "b", "c", "d", "<b>e</b>"]} Hope it helps.', list("abcde")),
    ('{"preferences": ["a", "b", "c", "d"]}', []), ('{"preferences": ["a", "b", "c", "d", "e", "f"]}', []),
    ('{"preferences": ["a", "b", "c", "d", "A"]}', []), ('{"preferences": ["a", "b", "c", "d", ""]}', []),
    ('{"preferences": ["a", "b", "c", "d", 5]}', []), ('{"preferences": "abcde"}', []), ('{"other": 1}', []), ('["a", "b", "c", "d", "e"]', []),
    ('{["a", "b", "c", "d", "e"]}', []), ("{[1]: 2}", []), ("", []), ("{" * 10 ** 6, []), ('{"preferences": ["a", "b", "c", "d", "e"', []), ("{__import__('os').system('true')}", [])])
def test_preferences_are_read_or_refused_and_nothing_raises(text, names):
    """Guards: a list cut short or padded that passes; an answer that stops the run."""
    assert data.parse_preferences(text) == names


def test_equal_titles_get_a_number():
    """Guards: a title that names two items, so that one of them can never be retrieved."""
    d = data.demo(3, 60, 40)
    for i, t in enumerate(("Comb", "comb", "Soap", "COMB", "Comb (2)", "", "Cr\u00e8me", "Cre\u0300me"), 1):
        d.items[i]["title"] = t
    assert d.titles[1:9] == ["Comb", "comb (2)", "Soap", "COMB (3)", "Comb (2) (2)", "untitled", "Cr\u00e8me", "Cre\u0300me (2)"] and len(set(map(str.lower, d.titles[1:]))) == d.n_items


@pytest.mark.parametrize("tasks", [("mim",), ("mlm",), ("bpr",), ("next", "rank"), ("rate",)])
def test_recommendation_knowledge_names_no_user_and_reads_train_alone(tasks):
    """Guards: user ids in a prompt; valid or test items that leak into what the LLM is taught."""
    d = data.demo(3, 60, 40)
    other = data.demo(3, 60, 40)
    other.seqs = [np.append(s[:-2], [1, 2]) for s in other.seqs]
    other.valid, other.test = (np.array([s[k] for s in other.seqs]) for k in (-2, -1))
    d.ratings = [np.arange(len(s)) % 5 + 1.0 for s in d.seqs]
    other.ratings = [np.append(r[:-2], [9.0, 9.0]) for r in d.ratings]
    make = lambda d: data.alignment_samples(d, 200, np.random.default_rng(0), reason_share=0.0, tasks=tasks, longest=data.LONGEST, ahead=4)
    assert make(d) == make(other) and not any("user" in p + a for p, a in make(d))
    assert data.lane_samples(d, 50, np.random.default_rng(0)) == data.lane_samples(other, 50, np.random.default_rng(0))


def test_lane_samples_are_what_the_parser_reads_and_the_prompt_asks():
    """Guards: a lesson in another form than its parser's; preferences that the history does not say."""
    d = data.demo(3, 60, 40)
    samples = data.lane_samples(d, 60, np.random.default_rng(0))
    asked = [(p, data.parse_preferences(a)) for p, a in samples if "as JSON" in p]
    assert len(samples) == 60 and len(asked) > 20
    for prompt, names in asked:
        assert names == sorted(names) and all(n in prompt.splitlines()[0] for n in names)
    assert all("fit 1" in a or "fit 0" in a for p, a in samples if "Explain" in p)
