"""Reasons of the style "sentence" and reviews as evidence, from the files to the report.

    pytest tests/test_sentence.py            seconds; one Qwen3-shaped LLM of a single layer
    pytest tests/test_sentence.py -m slow    a whole run with it

Each docstring names the bug that the test guards against.
"""

import contextlib
import copy
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import curec
import data as D
import reward
import rl

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
WORDS = "soft warm calm bright light quiet strong clean fresh".split()
GREEDY = 1e-6  # the temperature at which the likeliest token is always drawn


# ------------------------------------------------------------------------------- what tests share
def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path, text):
    """Writes a text, packed where the name ends in .gz."""
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_table(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def by_ids(dataset):
    """{(user, item): review} by the ids of the source."""
    found = {}
    for user, seq, reviews in zip(dataset.users, dataset.seqs, dataset.reviews, strict=True):
        for item, review in zip(seq, reviews, strict=True):
            found[user, dataset.items[item]["id"]] = review
    return found


def answer(reason):
    return D.ANSWER.format("x", reason)


# ------------------------------------------------------------------------------ reviews from files
# what became of user and item in time; u0 chose A twice, x and E are outside the 2-core
CHOICES = [(user, item, time) for time, item in enumerate("DBAC") for user in ("u2", "u0", "u1")]
CHOICES = [("u0", "A", 90), ("x", "E", 1), *CHOICES[::-1]]
SAID = {(user, item): f"{user} says {item}" for user, item, _ in CHOICES[1:]}
INSIDE = {pair: review for pair, review in SAID.items() if pair != ("x", "E")}
OLD = "reviewerID asin unixReviewTime summary reviewText"
AMAZON = {
    "2014": ("reviews_Toy_5.json.gz", "meta_Toy.json.gz", OLD),
    "2018": ("Toy_5.json.gz", "meta_Toy.json.gz", OLD),
    "2023": ("Toy.jsonl.gz", "meta_Toy.jsonl.gz", "user_id parent_asin timestamp title text"),
}


def review_of(k, user, item):
    """The review of the k-th of CHOICES; only the second one about A of u0's is another."""
    return "changed my mind" if k == 0 else SAID[user, item]


@pytest.mark.parametrize("edition", AMAZON)
def test_amazons_reviews_stand_beside_their_choices(edition, tmp_path):
    """Guards: reviews in the order of the file beside choices in the order of time; the review of a
    repeated choice in the place of the first one; reviews shifted by choices outside the k-core; a
    headline that is lost."""
    reviews, meta, names = AMAZON[edition]
    rows, names = [], names.split()
    for k, (user, item, time) in enumerate(CHOICES):
        fields = (user, item, time, f"On {item}", review_of(k, user, item))
        rows.append(dict(zip(names, fields, strict=True)))
    write(tmp_path / reviews, json_lines(rows))
    items = [{names[1]: item, "title": f"Thing {item}"} for item in "ABCDE"]
    write(tmp_path / meta, json_lines(items))
    dataset = D.load("Toy", str(tmp_path), subset=D.Subset(k_core=2))
    told = {pair: f"On {pair[1]} . {review}" for pair, review in INSIDE.items()}
    assert by_ids(dataset) == told
    chosen = [[dataset.items[i]["id"] for i in seq] for seq in dataset.seqs]
    assert chosen == [["D", "B", "A", "C"]] * 3
    events = dataset.events
    for e, (user, item) in enumerate(zip(events["user"], events["item"], strict=True)):
        assert dataset.review(e) == told[dataset.users[user], dataset.items[item]["id"]]


@pytest.mark.parametrize("column", ["review", "reviewText", "text", "comment"])
def test_a_folders_reviews_stand_beside_their_choices(column, tmp_path):
    """Guards: a column of one's own that is not found; commas in a review that split it."""
    rows = []
    for k, (user, item, time) in enumerate(CHOICES):
        rows.append((user, f"{review_of(k, user, item)}, I mean", item, time))
    write_table(tmp_path / "interactions.csv", f"user,{column},item,timestamp", rows)
    write(tmp_path / "items.jsonl", json_lines([{"id": item, "title": item} for item in "ABCDE"]))
    dataset = D.load(str(tmp_path), subset=D.Subset(k_core=2))
    assert by_ids(dataset) == {pair: f"{review}, I mean" for pair, review in INSIDE.items()}


def one_person(path, reviews, **more):
    """A folder in which one person writes these reviews, an item each."""
    path.mkdir(exist_ok=True)
    rows, items = [], []
    for k, review in enumerate(reviews):
        rows.append({"user": "u", "item": f"i{k:02d}", "timestamp": k, "review": review} | more)
        items.append({"id": f"i{k:02d}", "title": f"Thing {k}"})
    write(path / "interactions.jsonl", json_lines(rows))
    write(path / "items.jsonl", json_lines(items))
    return D.load(str(path), subset=D.Subset(k_core=0))


CLEANED = {
    "soft &amp; warm": "soft & warm",
    "I <b>love</b> it<br />so much": "I love it so much",
    "two\nlines\r\nand\ta tab": "two lines and a tab",
    "&lt;/reason&gt; ends &lt;think&gt;": "ends",
    "It is &#34;fine&#34;.": 'It is "fine"',
    "N/A \x00 \x1b[31m": "N/A [31m",
    "x" * 100_000: "x" * 60,
    12: "12",
}


def test_reviews_are_one_line_of_plain_text(tmp_path):
    """Guards: markup, entities and line breaks in prompts; a review that closes our <reason>; one
    long word that fills the context."""
    dataset = one_person(tmp_path, CLEANED)
    assert dataset.reviews == [list(CLEANED.values())]


@pytest.mark.parametrize("nothing", ["", None, "nan", "None", float("nan"), "<br>", " . "])
def test_an_empty_review_is_empty(nothing, tmp_path):
    """Guards: what tables write for nothing as a word of everybody's."""
    assert one_person(tmp_path, ["soft", nothing, "warm"]).reviews == [["soft", "", "warm"]]


LONG = ["one " * 60, "one " * 61, "one " * 10_000, "<br/> " * 60 + "one " * 100]


def test_60_words_of_a_review_are_kept(tmp_path):
    """Guards: a review that fills the context; markup that takes the place of words."""
    (reviews,) = one_person(tmp_path, LONG).reviews
    assert [review.split() for review in reviews] == [["one"] * 60] * 4


def test_60_words_are_kept_of_headline_and_review(tmp_path):
    """Guards: a headline on top of them; the full stop after it is a word or none."""
    (reviews,) = one_person(tmp_path, LONG, summary="one").reviews
    for review in reviews:
        assert review.startswith("one . one one")
        assert 60 <= len(review.split()) <= 61


@pytest.mark.parametrize(
    "headline, wanted", [("Thing", "Thing . soft"), ("", "soft"), (None, "soft"), ("nan", "soft")]
)
def test_a_headline_without_a_review_is_none(headline, wanted, tmp_path):
    """Guards: a headline alone taken for a review; "nan" before what was written."""
    dataset = one_person(tmp_path, ["", "soft", ""], summary=headline)
    assert dataset.reviews == [["", wanted, ""]]


@pytest.mark.parametrize(
    "more, wanted",
    [
        ({}, "soft"),
        ({"parent_asin": "x"}, "Thing . soft"),
        ({"headline": "On it"}, "On it . soft"),
        ({"parent_asin": "x", "summary": "On it"}, "On it . soft"),
    ],
)
def test_a_title_is_a_headline_of_amazons_2023_alone(more, wanted, tmp_path):
    """Guards: item titles, which tables of one's own repeat beside each choice, before each review;
    the headlines of Amazon's reviews of 2023 lost."""
    dataset = one_person(tmp_path, ["soft", "", "soft"], title="Thing", **more)
    assert dataset.reviews == [[wanted, "", wanted]]


@pytest.mark.parametrize("reviews", [["", "", ""], [" ", None, "<br>"]])
def test_a_source_without_reviews_has_none(reviews, tmp_path, world):
    """Guards: evidence and an arm made of empty texts."""
    assert one_person(tmp_path, reviews).reviews is None
    assert world.reviews is None
    assert world.review(0) == ""


# ------------------------------------------------------------------------------- a shop to read in
ITEMS = [
    ("argan oil soft warm", "Velora"),
    ("jojoba oil soft warm 500", "Nordel"),
    ("oil soft warm brush", "Kelmo"),
    ("oil soft warm brush", "Kelmo"),
    ("soft warm brush", "Kelmo"),
    ("brush", "Kelmo"),
    ("oil", "Kelmo"),
    ("brush", ""),
    ("\u043c\u044f\u0433\u043a\u0438\u0439 \u043a\u0440\u0435\u043c", ""),
    ("lamp", ""),
    ("lamp", ""),
    ("lamp", ""),
]
LAVENDER = "Smells of lavender like Zyx did, I bought it for my dear old mother"


def small_shop(style="sentence", evidence="both"):
    """Events 0 and 1 are about item 1, after items 2 and 5; the first user wrote about it."""
    items = [{}]
    for k, (title, brand) in enumerate(ITEMS, 1):
        items.append(D.item_record(f"I{k}", {"title": title, "brand": brand}))
    seqs = [np.array([2, 1, 3, 4]), np.array([5, 1, 6, 7])]
    reviews = [["", LAVENDER, "grease", "grease"], ["unread", "", "", ""]]
    times = [np.arange(4), np.arange(4) + 10]
    shop = D.Dataset("small", items, ["a", "b"], seqs, times, reviews=reviews)
    shop.style, shop.evidence = style, evidence
    return shop


def test_people_shown_by_hand():
    """Guards: another person's review, or one about another item; a whole review in a prompt; empty
    quotes where nothing was written; reviews shown although --evidence says histories."""
    wrote = "; wrote: Smells of lavender like Zyx did, I bought it for my dear"
    lines = ["- jojoba oil soft warm 500", "- soft warm brush"]
    assert D.people_shown(small_shop(), [0, 1]) == f"{lines[0]}{wrote}\n{lines[1]}"
    for style in D.STYLES:
        shop = small_shop(style, evidence="histories")
        assert D.people_shown(shop, [0, 1]) == "\n".join(lines)
        assert "wrote" not in D.reason_prompt(shop, 1, "", [0, 1])
    assert "wrote" in D.reason_prompt(small_shop("pair"), 1, "", [0, 1])


def test_a_prompt_cuts_at_people_and_what_was_said_does_not():
    """Guards: prompts that grow with an item's people; those that other windows show, forgotten."""
    titles = [{"title": f"thing{k} soft"} for k in range(1, 16)]
    items = [{}, *(D.item_record(f"I{k}", fields) for k, fields in enumerate(titles))]
    seqs = [np.array([k, 1, 14, 15]) for k in range(2, 14)]
    people = [f"u{u}" for u in range(12)]
    shop = D.Dataset("crowd", items, people, seqs, [np.arange(4) + 10 * u for u in range(12)])
    shop.style = "sentence"
    events = shop.events_by_item[1]
    lines = [f"- thing{k} soft" for k in range(2, 14)]
    assert D.people_shown(shop, events).splitlines() == lines
    prompt = D.reason_prompt(shop, 1, "", events)
    assert [line for line in prompt.splitlines() if line.startswith("- ")] == lines[: D.PEOPLE]
    assert {f"thing{k}" for k in range(1, 14)} < D.said_of(shop, 1)
    assert "thing14" not in D.said_of(shop, 1)


def test_the_question_follows_the_style():
    """Guards: a sentence asked for where two phrases are, and the other way round."""
    asked = {style: D.reason_prompt(small_shop(style), 1, "", [0]) for style in D.STYLES}
    assert "In one short sentence" in asked["sentence"]
    assert "In one short sentence" not in asked["pair"]


def test_the_vocabulary_counts_items_whose_train_reviews_say_a_word():
    """Guards: words that only a review says, unknown and so never hidden from the judge; held-out
    reviews, or reviews that no prompt can show, counted."""
    both, histories = small_shop().vocabulary, small_shop(evidence="histories").vocabulary
    assert both["lavender"] == 1
    assert both["soft"] == histories["soft"] == 5
    assert "lavender" not in histories
    assert "grease" not in both
    assert "unread" not in both, "of a choice without a history"
    assert "lavender" in small_shop().masked_words


def test_a_brand_that_many_reviews_mention_is_still_a_name():
    """Guards: a brand that other items' reviews compare them with, free to be named and read by the
    judge; a word that brands and titles share, taken for one."""
    shop = small_shop()
    others = [1, 2, 8, 9, 10, 11]  # none of them Kelmo's
    seqs = [np.array([6, item, 12, 3]) for item in others]
    times = [np.arange(4) + 10 * u for u in range(6)]
    reviews = [["", "much better than Kelmo", "", ""]] * 6
    shop = D.Dataset("loud", shop.items, [*"abcdef"], seqs, times, reviews=reviews)
    shop.style, shop.evidence = "sentence", "both"
    assert shop.document_frequency["kelmo"] == 5
    assert shop.vocabulary["kelmo"] == 11, "more than twice as many"
    assert "kelmo" in shop.identifying_words
    assert D.mask_identity(shop, "soft kelmo warm") == "soft warm"
    assert grounded(shop, 12, "It is a lamp like kelmo.") == (1 / 2, 1)
    assert grounded(shop, 3, "It is soft kelmo.") == (1, 0)
    # "soft" is in five titles, and now somebody's brand
    shop.items[10]["brand"] = "Soft"
    again = D.Dataset("loud", shop.items, shop.users, seqs, times, reviews=reviews)
    assert "soft" not in again.identifying_words


# ------------------------------------------------------------------------- the format of a sentence
ROSES = "It soothes dry skin and smells of roses."
PHRASES = {
    ROSES: "soothe dry skin smell rose",
    "It is good for nails, brushes and boxes": "good nail brush box",
    "People choose it because it is their perfect product.": "",
    "Don't worry: it's sugar-free": "worry sugar-free",
}


@pytest.mark.parametrize("reason", PHRASES)
def test_the_phrases_of_a_sentence_are_its_content_words(reason):
    """Guards: "It" and "because" as phrases, which everything says; plurals that differ."""
    assert D.sentence_phrases(reason) == PHRASES[reason].split()


HAN = "".join(map(chr, range(0x4E00, 0x4E20)))  # 32 different letters
SOUND = {
    ROSES: True,
    "soft": False,
    "It is great.": False,
    "soft and warm": True,
    "It costs 3.5 dollars": True,
    "It is soft, warm - and calm!": True,
    "soft warm" + " the" * 22: True,
    "soft warm" + " the" * 23: False,
    "It is soft. It is warm.": False,
    "It is soft; warm": False,
    "It is soft...": False,
    "Why: it is soft": False,
    "It is good for a nail and all nails": False,
    "It is soft and Soft": False,
    "It is what it is": False,
    "": False,
    "...": False,
    # signs are no words
    "soft warm" + " -" * 24: True,
    # scripts without spaces: each two letters are a word
    "\u67d4\u8f6f\u6e29\u6696": True,
    HAN[:25]: True,
    HAN[:26]: False,
}


@pytest.mark.parametrize("reason", SOUND)
def test_a_sentence_is_one_short_and_repeats_no_phrase(reason):
    """Guards: lists and stories paid like sentences; one word said again and again, which the judge
    may like; no words at all; "It is great.", which holds for every item."""
    assert D.parse_answer(answer(reason), "sentence") == (
        reason,
        D.sentence_phrases(reason),
        SOUND[reason],
    )


MALFORMED = [
    "",
    ROSES,
    f"<reason> {ROSES} </reason>",
    f"<think> x </think> {ROSES}",
    f"<think> x </think> <reason> {ROSES}",
    f"<think> x <reason> {ROSES} </reason>",
    f"{answer(ROSES)} and more",
    answer(ROSES) * 2,
    answer(f"<b>{ROSES}"),
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_answer_names_nothing(text):
    """Guards: an answer without its thought that is paid like a whole one."""
    assert D.parse_answer(text, "sentence") == ("", [], False)


def test_a_sentence_is_read_across_lines_and_a_pair_is_no_sentence_by_default():
    """Guards: spaces that an LLM adds, as a failure; sentences accepted where pairs are asked."""
    text = "\n<think> \n </think>\n\n<reason>\n It is\n soft, warm </reason> "
    assert D.parse_answer(text, "sentence") == ("It is soft, warm", ["soft", "warm"], True)
    assert D.parse_answer(text) == ("It is soft, warm", [], False)


# -------------------------------------------------------------------------- what a sentence may say
def grounded(shop, item, reason, until=np.inf):
    """(share, penalty) of a reason about an item at the time `until`."""
    return D.grounding(shop, reason, D.said_of(shop, item, until))


# about item 1: (share grounded, penalty) before anybody chose it, after event 0, and after event 1
GROUNDED = {
    "It soothes tired feet.": ((0, 0), (0, 0), (0, 0)),
    "It is soft argan oil by Velora.": ((1, 0), (1, 0), (1, 0)),
    "It is soft and soothes.": ((1 / 2, 0), (1 / 2, 0), (1 / 2, 0)),
    "Soothing oil.": ((1 / 2, 0), (1 / 2, 0), (1 / 2, 0)),
    "It is for brushes.": ((0, 0), (0, 0), (1, 0)),
    "It is for quux fans.": ((0, 0), (0, 0), (0, 0)),
    # a capital letter within it makes a name, unless the word is said or common
    "It is a Brush.": ((0, 1), (0, 1), (1, 0)),
    "Brushes love it.": ((0, 0), (0, 0), (1 / 2, 0)),
    "It is Soft and Of Use.": ((1, 0), (1, 0), (1, 0)),
    "It is for Quux fans.": ((0, 1), (0, 1), (0, 1)),
    # a brand, of one item or of five
    "It is soft like Nordel.": ((1 / 2, 1), (1 / 2, 1), (1 / 2, 1)),
    "It is soft like nordel's Nordel.": ((1 / 3, 1), (1 / 3, 1), (1 / 3, 1)),
    "It is soft like kelmo.": ((1 / 2, 1), (1 / 2, 1), (1 / 2, 1)),
    # the title of what was chosen before says it
    "It is soft like jojoba.": ((1 / 2, 1), (1, 0), (1, 0)),
    "It lasts 500 days.": ((0, 1), (1 / 3, 0), (1 / 3, 0)),
    "It lasts 501 days.": ((0, 1), (0, 1), (0, 1)),
    # the review says it
    "It smells of lavender.": ((0, 1), (1, 0), (1, 0)),
    "It beats Zyx.": ((0, 1), (1 / 2, 0), (1 / 2, 0)),
    "It helps a mother.": ((0, 1), (0, 1), (0, 1)),
    # no phrase at all
    "It is what it is.": ((0, 1), (0, 1), (0, 1)),
}
# just before event 0, between the two, and after both
UNTIL = (1, 11, np.inf)


@pytest.mark.parametrize("reason", GROUNDED)
def test_grounded_by_hand(reason):
    """Guards: words of an LLM's own punished, so that it only copies; another item's brand, rare
    word or number, or a name of nothing we know, that goes unpunished; what people so far wrote
    taken for foreign, or what is yet to come, or only the hidden rest of a review says, for
    grounded."""
    shop = small_shop()
    for until, wanted in zip(UNTIL, GROUNDED[reason], strict=True):
        assert grounded(shop, 1, reason, until) == pytest.approx(wanted)


@pytest.mark.parametrize("style", D.STYLES)
@pytest.mark.parametrize("evidence", D.EVIDENCE)
def test_what_is_said_grows_and_never_shrinks(style, evidence, tmp_path):
    """Guards: a reason of an earlier window that is foreign in a later one, because it shows
    others; of a pair, words that its item does not say."""
    write_shop(tmp_path / "shop", told)
    data = curec.load_data(settled(tmp_path / "shop", style=style, evidence=evidence))
    assert (data.style, data.evidence) == (style, evidence)
    sizes = []
    for item in range(1, data.n_items + 1):
        times = sorted(data.events["time"][data.events_by_item[item]])
        said = [D.said_of(data, item, until) for until in (-np.inf, *times, np.inf)]
        assert all(a <= b for a, b in pairwise(said))
        assert said[-1] == D.said_of(data, item)
        sizes.append((len(said[0]), len(said[-1])))
        own = set(D.words(D.item_text(data.items[item])))
        assert said[0] == (own if style == "pair" else {D.stem(w) for w in own})
    grown = sum(last > first for first, last in sizes)
    assert grown == (0 if style == "pair" else 18)


def test_an_old_reason_is_not_foreign_in_a_later_window():
    """Guards: a sound reason that a later window replaces, because the people whom it shows do not
    say what those before them said."""
    judge = SimpleNamespace(data=small_shop())
    judge.lifts = lambda reasons, people, period: [np.zeros(len(events)) for events in people]
    old, found = answer("It smells of lavender like Zyx."), []
    for period in ((-np.inf, 1), (1, 11), (11, np.inf)):
        # the last window shows event 1 alone
        r = reward.rewards(judge, [1], [old], [np.array([1])], [np.array([], int)], period)
        found.append((r.grounded[0], r.ungrounded[0], r.total[0]))
    assert found == [(0, 1, -2), (1, 0, 0), (1, 0, 0)]


@pytest.mark.parametrize("reason", ["It beats (Quux).", "It beats \u201cQuux\u201d."])
def test_a_name_within_brackets_or_quotes_is_a_name(reason):
    """Guards: a foreign name that goes unpunished for the sign before it."""
    assert grounded(small_shop(), 1, reason) == (0, 1)


def test_a_capital_word_that_most_items_say_is_no_name():
    """Guards: a catalogue of Brushes in which nobody may praise a Brush."""
    items = [{}, *(D.item_record(f"I{k}", {"title": f"brush {k}"}) for k in range(11))]
    items += [D.item_record("L", {"title": "lamp oil"})]
    seqs = [np.array([1, 2, 3, 4])]
    shop = D.Dataset("brushes", items, ["a"], seqs, [np.arange(4)], style="sentence")
    assert D.possible_names(shop, "It is a Brush with a Lamp.") == ["lamp"]
    assert D.possible_names(shop, "Lamp, it is a brush.") == ["lamp"], "of fewer than MIN_ITEMS"
    assert D.possible_names(shop, "Quux, it is a brush.") == [], "of no item, where all begin so"
    assert grounded(shop, 12, "It is a Brush.") == (0, 0)


def test_grounded_without_reviews_as_evidence():
    """Guards: reviews that no prompt showed as evidence; a free word taken for a rare one."""
    shop = small_shop(evidence="histories")
    assert grounded(shop, 1, "It smells of lavender.") == (0, 0)
    assert grounded(shop, 1, "It beats Zyx.") == (0, 1)
    assert grounded(shop, 1, "It is like jojoba.") == (1, 0)
    assert grounded(shop, 1, "It is like jojoba.", until=1) == (0, 1)


def test_a_pair_is_still_punished_for_each_foreign_word():
    """Guards: the reward of the demo changed by what sentences are allowed."""
    shop = small_shop("pair", "histories")
    # jojoba was chosen before: no pair may name it
    said = [grounded(shop, 1, f"people choose it for soft and {w}") for w in ("oil", "jojoba")]
    assert said == [(1, 0), (1 / 2, 1 / 2)]


def test_the_reward_takes_off_as_much_as_is_foreign():
    """Guards: an ungrounded sentence punished like a foreign name; a foreign name that the people
    of another item said."""
    judge = SimpleNamespace(data=small_shop())
    judge.lifts = lambda reasons, people, period: [np.zeros(len(events)) for events in people]
    texts = ["It soothes tired feet.", "It is soft like jojoba.", "It is soft like jojoba."]
    answers = [answer(texts[0]), answer(texts[1]), answer(texts[2]), "nothing"]
    people = [np.array([0, 1]), np.array([0, 1])]
    found = reward.rewards(judge, [1, 5], answers, people, people, reward.TRAIN_TIME)
    assert found.grounded.tolist() == [0, 1, 1 / 2, 0]
    assert found.ungrounded.tolist() == [0, 0, 1, 1]
    assert found.format_ok.tolist() == [True, True, True, False]
    assert found.total.tolist() == [0, 0, -reward.UNGROUNDED_PENALTY, -4]


def choose(old, new):
    """Is a new sentence about item 1, which all judges like more, accepted for an old one?"""
    judge = SimpleNamespace(data=small_shop())

    def lifts(reasons, people, period):
        pairs = zip(reasons, people, strict=True)
        return [np.full(len(events), float(reason == new)) for reason, events in pairs]

    judge.lifts = lifts
    people = [np.array([0])], [np.array([0, 1, 1])]
    rated = (
        reward.rewards(judge, [1], [answer(r)], *people, reward.TRAIN_TIME) for r in (new, old)
    )
    return curec.choose(*rated, 0, np.ones(3), 0.25)[1]


@pytest.mark.parametrize(
    "old, new, accepted",
    [
        ("It is soft argan oil.", "It soothes tired feet.", True),
        ("It is soft argan oil.", "It is soft like Nordel.", False),
        ("It is for Quux fans.", "It is soft like Nordel.", True),
        ("It is for Quux fans.", "It is soft.", False),
        ("It is for Quux fans.", "It is soft argan oil.", True),
        ("It is soft argan oil.", "It is soft. It is warm.", False),
    ],
)
def test_a_correction_in_words_of_its_own_may_be_accepted(old, new, accepted):
    """Guards: copies of the item's text that no better sentence replaces; a foreign name that a
    sound sentence is replaced by."""
    assert choose(old, new) == accepted


def test_the_judge_reads_a_sentence_in_its_order_and_a_pair_sorted():
    """Guards: a sentence turned into a bag of words; "A and B" paid unlike "B and A"; brands,
    numbers and rare words that tell the judge which item it is."""
    text = "It is warm, soft argan oil of Velora, 500 a brush"
    assert D.mask_identity(small_shop("sentence"), text) == "warm soft oil brush"
    assert D.mask_identity(small_shop("pair"), text) == "brush oil soft warm"
    assert D.mask_identity(small_shop("sentence"), "It is argan by Velora") == "item"


KEPT = {
    "is soft and smells of lavender. And more": (1, "It is soft and smells of lavender."),
    "  is soft like jojoba!\nPeople": (1, "It is soft like jojoba."),
    "soothes the tired feet": (0, "It soothes the tired feet."),
    "is soft, warm and calm,": (2 / 3, "It is soft, warm and calm."),
}
DROPPED = {
    "too long": "is soft" + " the" * 22,
    "too short": "is soft",
    "a repetition": "is soft oil for soft skin",
    "a foreign brand": "is soft like Nordel oil",
    "an unknown name": "is soft oil for Quux fans",
    "a number": "is soft for 501 days",
    "another script": "is soft and \u043c\u044f\u0433\u043a\u0438\u0439",
    "a third script": "is soft \u5f88\u597d",
    "quotes": 'is "soft" oil for me',
    "brackets": "is soft oil </think> for me",
    "a second sentence": "is soft; warm oil too",
    "no words": "...",
    "nothing": "",
    "nothing but stop words": "is what it is to me",
    "signs in place of words": "is soft - -",
    "an echo of the question": "is soft and people choose it",
    "an echo of its form": "is a short and warm one",
    "an echo of what is asked": "is one Sentence of oil",
}


@pytest.mark.parametrize("text", KEPT)
def test_a_sound_sentence_of_the_llms_is_kept(text):
    """Guards: filters that drop all; what comes after the first sentence; a wrong groundedness."""
    share, reason = D.own_sentence(small_shop(), 1, text, [0])
    assert (share, reason) == (pytest.approx(KEPT[text][0]), KEPT[text][1])
    assert D.parse_answer(answer(reason), "sentence")[2], "its form is what align learns"


@pytest.mark.parametrize("fault", DROPPED)
def test_an_unsound_sentence_of_the_llms_is_dropped(fault):
    """Guards: an LLM that is aligned on its own slips."""
    assert D.own_sentence(small_shop(), 1, DROPPED[fault], [0]) is None


def test_a_sentence_in_the_items_own_script_is_kept():
    """Guards: a catalogue in another script that never has a sentence."""
    text = "\u043e\u0447\u0435\u043d\u044c \u043c\u044f\u0433\u043a\u0438\u0439 \u0442\u0443\u0442"
    assert D.own_sentence(small_shop(), 9, text, []) == (pytest.approx(1 / 3), f"It {text}.")
    assert D.own_sentence(small_shop(), 10, text, []) is None


def test_a_sentence_may_say_what_any_of_the_items_people_said():
    """Guards: a target of `align` that the reward calls grounded and the filter foreign."""
    for shown in ([], [0], [1], [0, 1]):
        found = D.own_sentence(small_shop(), 1, "is soft like jojoba", shown)
        assert found == (1, "It is soft like jojoba.")
    assert D.own_sentence(small_shop(), 2, "is soft like argan", [0]) is None, "of another item"


def test_the_script_is_that_of_the_item_or_of_the_reviews_shown():
    """Guards: Cyrillic in a catalogue in Latin, because one title of a history, a brand or a review
    that was not shown is."""
    shop = small_shop()
    soft = "\u043c\u044f\u0433\u043a\u0438\u0439"
    text = f"is soft and {soft}"
    for where, readable in (("brand", False), ("title", True), ("description", True)):
        changed = {**shop.items[1], where: f"{shop.items[1][where]} {soft}"}
        items = [{}, changed, *shop.items[2:]]
        other = replace(shop, items=items)
        assert bool(D.own_sentence(other, 1, text, [0])) == readable, where
    other = replace(shop, seqs=[np.array([9, 1, 3, 4]), shop.seqs[1]])
    assert soft in D.people_shown(other, [0])
    assert D.own_sentence(other, 1, text, [0]) is None, "a title of the history"
    other = replace(shop, reviews=[["", f"It is {soft}", "", ""], shop.reviews[1]])
    assert D.own_sentence(other, 1, text, [0]) == (1, f"It is soft and {soft}.")
    assert D.own_sentence(other, 1, text, [1]) is None, "it was not shown"


# ------------------------------------------------------------------- held-out reviews feed nothing
def write_shop(folder, review):
    """A folder of 30 people who choose 9 of 18 items each; review(user, k): what they write of
    their k-th choice. A word is said by 8 items: neither rare nor common."""
    folder.mkdir()
    rows = []
    for u in range(30):
        step = (1, 5, 7, 11)[u % 4]
        rows += [(f"u{u:02d}", f"i{(u + k * step) % 18:02d}", k, review(u, k)) for k in range(9)]
    write_table(folder / "interactions.csv", "user,item,timestamp,review", rows)
    items = []
    for i in range(18):
        title = " ".join(WORDS[(i + shift) % 9] for shift in (0, 1, 3, 6))
        items.append({"id": f"i{i:02d}", "title": title})
    write(folder / "items.jsonl", json_lines(items))


def told(u, k):
    """Some frequent words, a rare one, and more than a prompt shows."""
    return f"{WORDS[(u + k) % 9]} and {WORDS[u * k % 9]}, my friend says t{u}k{k}" + " and on" * 5


def other_review(u, k):
    return f"zebras {WORDS[k]} quartz Brandnew 77 o{u}k{k}"


def other_held_out(u, k):
    return other_review(u, k) if k >= 7 else told(u, k)


def other_train(u, k):
    return other_review(u, k) if k < 7 else told(u, k)


def no_held_out(u, k):
    return "" if k >= 7 else told(u, k)


def settled(dataset, llm="some/llm", **given):
    """Settings, filled in, of a run on a CPU."""
    return curec.resolve(curec.Settings(dataset=str(dataset), device="cpu", llm=llm, **given))


class PlainModel:
    """What own_sentences takes of a model: that its adapters can be switched off."""

    adapters = "on"

    @contextlib.contextmanager
    def disable_adapter(self):
        self.adapters = "off"
        yield
        self.adapters = "on"


class Writer:
    """In the place of rl.generate: texts drawn by the prompt and by how often it came before."""

    def __init__(self):
        self.prompts, self.how, self.adapters = [], None, None

    def __call__(self, model, tokenizer, prompts, how, name=""):
        count, texts = Counter(), []
        for prompt in prompts:
            draw = zlib.crc32(f"{prompt}{count[prompt]}".encode())
            count[prompt] += 1
            a, b, c = np.random.default_rng(draw).permutation(WORDS)[:3]
            texts.append(f"is {a} like {c}, isn't {a} it" if draw % 3 == 0 else f"is {a} and {b}.")
        self.prompts += prompts
        self.how, self.adapters = how, model.adapters
        return texts, None


@pytest.fixture
def writer(monkeypatch):
    made = Writer()
    monkeypatch.setattr(rl, "generate", made)
    return made


def own_sentences(data, s):
    return curec.own_sentences(curec.Run(s), data, (PlainModel(), None))


def lengths(texts):
    """In the place of a text encoder."""
    return torch.tensor([[len(text), text.count("a"), text.count(" ")] for text in texts]).float()


def all_that_reviews_can_reach(folder, **given):
    """{what: value} of all that a run makes of a data set's texts before anything is trained."""
    s = settled(folder, out=f"{folder}-run", **given)
    data = curec.load_data(s)
    data.sentences = own_sentences(data, s)
    cuts = curec.window_cuts(data, 2)
    windows = []
    for window in curec.correction_windows(data, cuts, 0):
        for i, shown in zip(window.items, window.shown, strict=True):
            windows.append(D.reason_prompt(data, i, "It is soft.", shown))
    questions = []
    for part in curec.practice_questions(data, cuts, 0):
        questions.append([(q.item, q.prompt, list(q.shown), list(q.audience)) for q in part])
    rng = np.random.default_rng(0)
    judge = reward.Judge(data, lengths)
    return {
        "read by the judge": [judge.random_reason(i, rng) for i in range(1, 19) for _ in range(9)],
        "prompts": curec.first_prompts(data, data.events_by_item),
        "sentences": data.sentences,
        "samples": D.alignment_samples(data, 300, rng, curec.ALIGNMENT),
        "vocabulary": data.vocabulary,
        "masked": data.masked_words,
        "phrases": data.phrases,
        "windows": windows,
        "questions": questions,
        "reasons": [D.random_reason(data, i, rng) for i in range(1, 19)],
        "arm": curec.item_texts(s, data, {}, "reviews"),
        "confirmed": reward.confirmed(data, [*map(D.sentence_phrases, data.titles)]).tolist(),
    }


def test_held_out_reviews_reach_one_figure_only(tmp_path, writer):
    """Guards: an answer that was known before it was asked for: what a user wrote about the choice
    that is to be foretold, in a prompt, a target, a feature or in what the judge is not told."""
    found = {}
    for review in (told, other_held_out, no_held_out, other_train):
        write_shop(tmp_path / review.__name__, review)
        found[review] = all_that_reviews_can_reach(tmp_path / review.__name__)
    same = found[told].keys() - {"confirmed"}
    for name in same:
        assert found[other_held_out][name] == found[told][name], name
        assert found[no_held_out][name] == found[told][name], name
    assert found[other_held_out]["confirmed"] != found[told]["confirmed"]
    assert found[no_held_out]["confirmed"] == []
    # the test can fail
    for name in same - {"phrases"}:
        assert found[other_train][name] != found[told][name], name
    assert found[other_train]["confirmed"] == found[told]["confirmed"]
    assert "wrote: zebras" in found[other_train]["prompts"][0]


def test_without_evidence_no_review_reaches_a_prompt(tmp_path, writer):
    """Guards: --evidence histories that shows reviews, or takes the judge's words from them."""
    found = []
    for review in (told, other_train):
        write_shop(tmp_path / review.__name__, review)
        folder = tmp_path / review.__name__
        found.append(all_that_reviews_can_reach(folder, evidence="histories"))
        assert found[-1].pop("arm"), "the control for evidence"
    assert found[0] == found[1]
    assert "wrote" not in "".join(found[0]["prompts"])


def test_the_arm_reviews_reads_what_prompts_show(tmp_path):
    """Guards: a control that has read other people's reviews, another item's, or more of one than
    a prompt shows."""

    def some_say(u, k):
        return told(u, k) if (u + k) % 3 else ""

    write_shop(tmp_path / "shop", some_say)
    s = settled(tmp_path / "shop")
    data = curec.load_data(s)
    texts = curec.item_texts(s, data, {}, "reviews")
    shown, _ = curec.one_shot_people(data, s.seed)
    assert len(texts) == 18
    for i, text in enumerate(texts, 1):
        wrote = []
        for e in shown[i]:
            user = data.events["user"][e]
            review = some_say(user, data.seqs[user].tolist().index(i))
            wrote.append(" ".join(review.split()[: D.REVIEW_WORDS]))
        parts = [part.strip(" .") for part in text.split(" . ")]
        assert list(filter(None, parts)) == list(filter(None, wrote))
        prompt = D.reason_prompt(data, i, "", shown[i])
        assert all(part in prompt for part in parts)


# ------------------------------------------------------------------ confirmed by held-out reviews
def small_reviews(**changed):
    """Two people, three items: the last two reviews of each are held out, the first has no event
    before it."""
    titles = ["Soft brushes", "Warm oil", "A calm lamp"]
    items = [{}, *(D.item_record(f"I{k}", {"title": title}) for k, title in enumerate(titles))]
    seqs = [np.array([1, 2, 3, 2, 3]), np.array([2, 3, 1, 3, 1])]
    reviews = {
        "a": ["first first", "soft soft calm", "calm soft", "Smells nice", "soft brushes, soft"],
        "b": ["first", "calm", "warm oil", "...", "nice nice nice"],
    }
    reviews |= changed
    times = [np.arange(5), np.arange(5)]
    return D.Dataset("few", items, ["a", "b"], seqs, times, reviews=[*reviews.values()])


NAMED = [[], ["soft"], ["smell", "warm"], ["brush", "soft", "calm"]]


def test_confirmed_by_hand():
    """Guards: train reviews counted, or one held-out review of two; plurals that differ; a review
    without words as one that denies; the review beside another item's phrases."""
    assert reward.confirmed(small_reviews(), NAMED) == pytest.approx([1 / 2, 2 / 3, 0])
    assert reward.confirmed(small_reviews(), [[]] * 4).tolist() == [0, 0, 0]
    silent = small_reviews(a=[""] * 5)
    assert reward.confirmed(silent, NAMED).tolist() == [0]


def test_the_controls_of_confirmed_by_hand():
    """Guards: frequent words of held-out reviews, which no method may read; words counted as often
    as one review repeats them; controls that say more or fewer words than the reasons."""
    controls = reward.confirmed_controls(small_reviews(), NAMED, 0)
    assert list(controls) == ["shuffled", "title", "frequent"]
    assert controls["title"] == [[], ["soft", "brush"], ["warm", "oil"], ["calm", "lamp"]]
    # calm is in three train reviews, soft in two; reasons name two words on average
    assert controls["frequent"] == [["calm", "soft"]] * 4
    assert sorted(controls["shuffled"]) == sorted(NAMED)
    orders = {str(reward.confirmed_controls(small_reviews(), NAMED, n)["shuffled"]) for n in "0123"}
    assert len(orders) > 1


def reasons_of(*kinds):
    """Answers an item: `curec` names what NAMED does, the others nothing that anybody wrote."""
    good = ["", answer("soft"), answer("It smells warm."), answer("A brush, soft and calm")]
    return {kind: good if kind == "curec" else [""] + [answer("zebras")] * 3 for kind in kinds}


def confirmed_metrics(data):
    metrics = {"reasons": {kind: {} for kind in ("aligned", "rl", "bestof", "curec")}}
    metrics["comparisons"] = []
    curec.add_confirmed(metrics, data, reasons_of(*metrics["reasons"]), 0)
    return metrics


def test_confirmed_stands_in_the_metrics_with_its_comparisons():
    """Guards: a figure under another name; a control among the reasons; intervals over other
    reviews, or a difference of the wrong sign."""
    m = confirmed_metrics(small_reviews())
    share = (1 / 2 + 2 / 3) / 3
    wanted = {"aligned": 0, "rl": 0, "bestof": 0, "curec": pytest.approx(share)}
    assert m["reasons"] == {kind: {"confirmed": value} for kind, value in wanted.items()}
    assert set(m["confirmed"]) == {"reviews", "shuffled", "title", "frequent"}
    assert m["confirmed"]["reviews"] == 3
    # Warm oil: Smells nice, 0; A calm lamp: soft brushes, 0; Soft brushes: nice, 0
    assert m["confirmed"]["title"] == 0
    assert m["confirmed"]["frequent"] == pytest.approx((0 + 1 / 2 + 0) / 3)
    rows = {(row["a"], row["b"]): row for row in m["comparisons"]}
    others = ["rl", "bestof", "shuffled", "title", "frequent"]
    assert set(rows) == {("rl", "aligned"), *(("curec", other) for other in others)}
    for row in m["comparisons"]:
        assert set(row) == {"a", "b", "metric", "seeds", "delta", "ci95"}
        assert row["metric"] == "confirmed"
    assert rows["curec", "rl"]["delta"] == pytest.approx(share)
    assert rows["rl", "aligned"]["delta"] == 0
    low, high = rows["curec", "rl"]["ci95"]
    assert 0 <= low < share < high <= 2 / 3


def test_train_reviews_alone_confirm_nothing_and_are_no_nan():
    """Guards: metrics.json that no JSON reader takes, and warnings, where the last two reviews of
    everybody are empty."""
    data = small_reviews(a=["x", "soft", "calm", "", ""], b=["x", "calm", "", "", ""])
    m = confirmed_metrics(data)
    assert "NaN" not in json.dumps(m)


# -------------------------------------------------------------------------- a Qwen3-shaped LLM
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}"
TEMPLATES = {
    "Qwen3": f"{TURNS}{OPENED}{SWITCH}{EMPTY}{{% endif %}}{{% endif %}}",
    "always empty": f"{TURNS}{OPENED}{EMPTY}{{% endif %}}",
    "always opened": f"{TURNS}{OPENED}<think>\n{{% endif %}}",
}
SENTENCE = "It is soft and feels warm."


def write_qwen3(folder, template, texts, train=()):
    """A Qwen3-shaped checkpoint in Hugging Face format whose tokenizer has read some texts; train:
    (prompt, answer) pairs that it learns in full precision."""
    bpe = ByteLevelBPETokenizer()
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, 500, special_tokens=ends, show_progress=False)
    # as Qwen3 has them: added, but not special
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 64}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512}
    config = hf.Qwen3Config(**sizes, pad_token_id=0, eos_token_id=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = hf.Qwen3ForCausalLM(config)
    if train:
        rl.supervise(model, tokenizer, train, rl.SupervisedConfig(60, 16, 16, 1e-2), "base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """The folder of an untrained Qwen3-shaped model."""
    texts = [" ".join(WORDS), SENTENCE, D.SENTENCE_PROMPT, answer(ROSES), D.ASKED_START] * 3
    return write_qwen3(tmp_path_factory.mktemp("qwen3"), TEMPLATES["Qwen3"], texts)


@pytest.fixture(scope="module")
def loaded(qwen3):
    """(model, tokenizer) for tests that change no weight."""
    return rl.load(qwen3, rank=4)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_leaves_the_thought_to_the_answer(template, loaded):
    """Guards: answers after a thought that the template has opened or closed already, so that
    theirs is a second one and malformed."""
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.chat_template = TEMPLATES[template]
    text = "<|im_start|>user\nsoft and warm<|im_end|>\n<|im_start|>assistant\n"
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert rl.prompt_ids(tokenizer, "soft and warm") == wanted
    start = tokenizer(" People choose", add_special_tokens=False)["input_ids"]
    assert rl.prompt_ids(tokenizer, "soft and warm", "People choose") == wanted + start
    # of the user's own words none is a thought
    assert rl.prompt_ids(tokenizer, "soft <think>\n") == rl.prompt_ids(tokenizer, "soft  \n")


def test_an_answer_survives_its_tokens(loaded):
    """Guards: tags that the tokenizer joins with a word or loses, so that no answer is read."""
    tokenizer = loaded[1]
    ids = rl.answer_ids(tokenizer, answer(ROSES))
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    assert ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids[:-1])
    assert D.parse_answer(text, "sentence") == (ROSES, D.sentence_phrases(ROSES), True)


@pytest.mark.parametrize("template", ["Qwen3", "always opened"])
def test_a_qwen3_goes_through_align_generate_and_ppo(template, qwen3):
    """Guards: a model family whose query and key norms, or whose template, break a stage."""
    model, tokenizer = rl.load(qwen3, rank=4)
    tokenizer.chat_template = TEMPLATES[template]
    prompts = [f"Item: {word}" for word in WORDS]
    samples = [(prompt, answer(SENTENCE)) for prompt in prompts]
    rl.use(model, "align", trainable=True)
    first = rl.supervise(model, tokenizer, samples, rl.SupervisedConfig(1, 8, 8, 2e-2))
    last = rl.supervise(model, tokenizer, samples, rl.SupervisedConfig(12, 8, 8, 2e-2))
    assert last < first - 0.5
    rl.add_policy(model)

    def by_row(texts, rows):
        return torch.tensor([float(i % 3) for i in rows]), {}

    sampling = rl.Sampling(max_new=6)
    config = rl.PPOConfig(1, 8, 4, 4, lr=5e-3, sampling=sampling)
    (row,) = rl.ppo(model, tokenizer, prompts, by_row, config)
    assert row["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert row["kl"] == 0
    assert row["skipped"] == 0
    assert np.isfinite(list(row.values())).all()
    texts, ids = rl.generate(model, tokenizer, prompts, sampling)
    assert len(texts) == len(ids) == len(prompts)
    assert max(map(len, ids)) <= 6


def test_answers_go_on_from_their_start(loaded):
    """Guards: a start that is left out of what the LLM reads, or returned as its own words; one
    that is padded between a short prompt and itself."""
    model, tokenizer = loaded
    prompts = ["soft", "Item: soft warm calm bright"]
    how = rl.Sampling(max_new=5, temperature=GREEDY)
    start = "People choose it because it"
    _, plain = rl.generate(model, tokenizer, prompts, how)
    _, started = rl.generate(model, tokenizer, prompts, replace(how, start=start))
    for prompt, found, other in zip(prompts, started, plain, strict=True):
        ids = rl.prompt_ids(tokenizer, prompt) + rl.text_ids(tokenizer, start)
        for token in found:
            # one after the other, without a cache
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert logits.argmax() == token
            ids.append(token)
        assert found != other


# ----------------------------------------------------------- what the loading refuses and chooses
def linear_configs():
    """Configurations with layers of linear attention."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2}
    kinds = ["linear_attention", "full_attention"]
    inner = hf.Qwen3_5TextConfig(**sizes, layer_types=kinds)
    return {
        "qwen3_next": hf.Qwen3NextConfig(**sizes, layer_types=kinds),
        "within a text_config": hf.Qwen3_5Config(text_config=inner.to_dict()),
        "qwen3": hf.Qwen3Config(**sizes, layer_types=kinds),
    }


@pytest.mark.parametrize("kind", ["qwen3_next", "within a text_config", "qwen3"])
def test_layers_of_linear_attention_are_refused_before_a_download(kind, tmp_path):
    """Guards: gigabytes downloaded for a model that answers noise in 4 bits."""
    linear_configs()[kind].save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(OSError, match="linear attention.*choose an --llm") as refused:
        rl.check_layers(str(tmp_path))
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(OSError, match="linear attention"):
        rl.load(str(tmp_path))


def test_other_layers_are_accepted(qwen3, tmp_path):
    """Guards: full attention refused; a name that is wrong told here and not by the loading."""
    rl.check_layers(qwen3)
    rl.check_layers(str(tmp_path))
    rl.check_layers(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 5), "float16"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_the_dtype_follows_the_card(capability, dtype, monkeypatch):
    """Guards: bfloat16 emulated on a T4, several times slower; float16, which overflows, where
    bfloat16 is there."""
    asked = []

    def get_device_capability(device):
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    assert rl.default_dtype("cuda:1") == getattr(torch, dtype)
    assert asked == ["cuda:1"], "and no other card"
    assert rl.default_dtype("cpu") == torch.float32
    assert asked == ["cuda:1"], "a CPU is no card"


# ------------------------------------------------------------------------ logits, part by part
V, WIDTH = 40, 6


def logits_case():
    """A head, states (3, 7, WIDTH) and tokens (3, 7, 1) of a vocabulary of V."""
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, V, bias=False)
    states = torch.randn(3, 7, WIDTH, requires_grad=True)
    return head, states, torch.randint(V, (3, 7, 1))


def gradients_of(logps, head, states):
    """Gradients of a sum in which each token weighs otherwise."""
    (logps * torch.linspace(-1, 1, 21).view(3, 7)).sum().backward()
    return head.weight.grad.clone(), states.grad.clone()


class Largest(TorchDispatchMode):
    """The most elements of a tensor whose last dimension is a vocabulary, of all that are made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if torch.is_tensor(x) and x.shape[-1:] == (V,):
                self.elements = max(self.elements, x.numel())
        return made


# rows at once: all, some with a remainder, one, and fewer logits than one row has
LIMITS = {1 << 23: 21 * V, 8 * V: 8 * V, 20 * V + 1: 20 * V, 9 * V - 1: 8 * V}


@pytest.mark.parametrize("limit", [*LIMITS, V, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_a_log_softmax_whatever_is_at_once(limit, temperature, monkeypatch):
    """Guards: parts joined in another order, a remainder that is lost, gradients of one part only,
    a temperature that backward forgets."""
    head, states, chosen = logits_case()
    logits = torch.log_softmax(head(states) / temperature, -1)
    wanted = logits.gather(-1, chosen)[..., 0]
    gradients = gradients_of(wanted, head, states)
    head, states, chosen = logits_case()
    monkeypatch.setattr(rl, "MAX_LOGITS", limit)
    found = rl.token_logps(head, states, chosen, temperature)
    assert found.shape == (3, 7)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
    for mine, theirs in zip(gradients_of(found, head, states), gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", LIMITS)
def test_no_more_logits_are_made_at_once_than_allowed(limit, monkeypatch):
    """Guards: the logits of a whole micro-batch in memory, in forward or in backward."""
    head, states, chosen = logits_case()
    monkeypatch.setattr(rl, "MAX_LOGITS", limit)
    with Largest() as seen:
        logps = rl.token_logps(head, states, chosen)
        assert seen.elements == LIMITS[limit]
        seen.elements = 0
        gradients_of(logps, head, states)
    assert 0 < seen.elements == LIMITS[limit] <= limit


def test_no_logits_wait_for_backward_where_there_are_parts(monkeypatch):
    """Guards: parts that are all kept in memory until backward."""
    head, states, chosen = logits_case()
    monkeypatch.setattr(rl, "MAX_LOGITS", 8 * V)
    kept = []

    def pack(x):
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rl.token_logps(head, states, chosen)
        assert not [shape for shape in kept if shape[-1:] == (V,)]
        head(states).logsumexp(-1)
        assert (3, 7, V) in kept, "this is how they are counted"


def test_log_probabilities_without_gradients_are_the_same(monkeypatch):
    """Guards: another value before the update than in it, so that the first ratio is not 1."""
    head, states, chosen = logits_case()
    monkeypatch.setattr(rl, "MAX_LOGITS", 8 * V)
    with_gradients = rl.token_logps(head, states, chosen)
    with torch.no_grad():
        without = rl.token_logps(head, states, chosen)
    assert torch.equal(with_gradients.detach(), without)


# --------------------------------------------------------------------------- the command line
@pytest.mark.parametrize("dataset", ["demo", "beauty"])
def test_the_tiny_llm_writes_no_sentences(dataset, tmp_path, monkeypatch, capsys):
    """Guards: minutes of training for a model that never learns the language."""
    monkeypatch.chdir(tmp_path)
    args = f"--dataset {dataset} --llm tiny --style sentence --device cpu"
    assert curec.main(args.split()) == 2
    said = capsys.readouterr().err
    assert "--style sentence" in said
    assert "--llm" in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


DEFAULTS = [
    ({"llm": "tiny"}, "pair histories 24"),
    ({"llm": ""}, "pair histories 24"),
    ({"llm": "some/llm"}, "sentence both 96"),
    ({"llm": "some/llm", "style": "pair"}, "pair histories 96"),
    ({"llm": "some/llm", "evidence": "histories"}, "sentence histories 96"),
    ({"llm": "tiny", "evidence": "both"}, "pair both 24"),
    ({"llm": "some/llm", "max_new": 30}, "sentence both 30"),
]


@pytest.mark.parametrize("given, wanted", DEFAULTS)
def test_style_and_evidence_follow_the_llm(given, wanted):
    """Guards: sentences of the tiny LLM, two phrases of a large one; a flag that is overruled."""
    s = settled("beauty", **given)
    assert f"{s.style} {s.evidence} {s.max_new}" == wanted


def test_evidence_follows_the_data(tmp_path):
    """Guards: prompts that promise reviews where there are none."""
    write_shop(tmp_path / "told", told)
    assert curec.load_data(settled(tmp_path / "told")).evidence == "both"

    def nothing(u, k):
        return ""

    write_shop(tmp_path / "silent", nothing)
    data = curec.load_data(settled(tmp_path / "silent"))
    assert (data.style, data.evidence, data.reviews) == ("sentence", "histories", None)


NO_REVIEWS = "no reviews: none are shown, the arm reviews is left out"


@pytest.mark.parametrize(
    "given, noted",
    [
        ({}, True),
        ({"style": "pair"}, True),
        ({"style": "pair", "arms": "curec"}, False),
        ({"style": "pair", "arms": "curec", "evidence": "both"}, True),
        ({"evidence": "histories", "arms": "reviews,content"}, True),
        ({"evidence": "histories", "arms": "content"}, False),
    ],
)
def test_a_report_notes_that_there_are_no_reviews(given, noted, tmp_path):
    """Guards: an arm, or evidence that was asked for, missing without a word; a word on reviews to
    those who asked for none, or have some."""
    write_shop(tmp_path / "told", told)
    assert NO_REVIEWS not in curec.load_data(settled(tmp_path / "told", **given)).notes
    write_shop(tmp_path / "silent", lambda u, k: "")
    notes = curec.load_data(settled(tmp_path / "silent", **given)).notes
    assert (NO_REVIEWS in notes) == noted


def test_a_fingerprint_tells_other_reviews(tmp_path):
    """Guards: --resume that goes on with other reviews than it began with."""
    digests = set()
    for review in (told, other_held_out, other_train):
        write_shop(tmp_path / review.__name__, review)
        digests.add(curec.fingerprint(curec.load_data(settled(tmp_path / review.__name__))))
    assert len(digests) == 3


# ----------------------------------------------------------------------- the LLM's own sentences
@pytest.fixture
def shop_run(tmp_path):
    """(data, settings) of a run on the shop."""
    write_shop(tmp_path / "shop", told)
    s = settled(tmp_path / "shop", out=str(tmp_path / "run"))
    return curec.load_data(s), s


def test_own_sentences_are_asked_of_the_base_about_each_item(shop_run, writer):
    """Guards: sentences of an adapter; one item's sentences under another; answers that start
    elsewhere than their reason does; a sentence twice; the worst one learnt."""
    data, s = shop_run
    sentences = own_sentences(data, s)
    assert writer.adapters == "off"
    assert writer.how.start == D.ASKED_START
    assert writer.how.temperature == s.temperature
    assert len(sentences) == 19
    assert sentences[0] == ([], [])
    asked = []
    for i, (shown, kept) in enumerate(sentences[1:], 1):
        asked += [D.reason_prompt(data, i, "", shown)] * curec.OWN_ANSWERS
        assert len(shown) <= D.PEOPLE
        assert set(shown) <= set(data.events_by_item[i].tolist())
        shares = [grounded(data, i, reason)[0] for reason in kept]
        assert shares == sorted(shares, reverse=True)
    assert writer.prompts == asked
    texts, _ = Writer()(PlainModel(), None, asked, None)
    for k, (_, kept) in enumerate(sentences[1:]):
        mine = texts[k * curec.OWN_ANSWERS : (k + 1) * curec.OWN_ANSWERS]
        sound = [f"It {text}" for text in mine if "isn't" not in text]
        assert set(kept) == set(sound)
        assert len(kept) == len(set(kept))
    assert any(len(kept) > 1 for _, kept in sentences)
    sizes = {len(shown) for shown, _ in sentences[1:]}
    assert sizes > {0, D.PEOPLE}, "some with fewer people, or nobody"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_users_held_out_from_the_judge_are_not_among_the_people_shown(seed, shop_run, writer):
    """Guards: a judge tested on users whose reviews it has learnt from, in sentences."""
    data, s = shop_run
    s = replace(s, seed=seed)
    held_users, _ = reward.held_out(data, seed)
    assert held_users.any()
    shown = [e for events, _ in own_sentences(data, s) for e in events]
    assert shown
    assert not held_users[data.events["user"][shown]].any()


def test_the_sentence_learnt_says_most_of_its_item(shop_run, monkeypatch):
    """Guards: the shortest sentences, which are grounded most easily, as what align learns."""
    data, s = shop_run
    written = ["is {} and {}.", "is {}, {} and {}.", "is {}, {}, quick and easy.", "is {}."]

    def generate(model, tokenizer, prompts, how, name=""):
        texts = []
        for k, prompt in enumerate(prompts):
            said = prompt.split("Item: ")[1].split()
            texts.append(written[k % 4].format(*said))
        return texts, None

    monkeypatch.setattr(rl, "generate", generate)
    for i, (_, kept) in enumerate(own_sentences(data, s)[1:], 1):
        first, second, third = data.titles[i].split()[:3]
        best = [f"It is {first}, {second} and {third}.", f"It is {first} and {second}."]
        assert kept == [*best, f"It is {first}, {second}, quick and easy."]


def test_the_judge_learns_from_what_people_wrote(shop_run):
    """Guards: a judge that never reads a review; one that reads those of the users that it is
    tested on; reviews read where the flags leave them out."""
    data, _ = shop_run
    judge = reward.Judge(data, lengths)
    held_users, _ = reward.held_out(data, judge.seed)
    rng = np.random.default_rng(0)
    authors = set()
    for i in range(1, 19):
        reviews = 0
        for _ in range(60):
            found = re.findall(r"t(\d+)k\d", judge.random_reason(i, rng))
            assert len(found) <= D.PEOPLE
            reviews += bool(found)
            authors.update(map(int, found))
        assert 28 < reviews < 52
    assert authors == {int(data.users[u][1:]) for u in np.flatnonzero(~held_users)}
    for changed in ({"evidence": "histories"}, {"style": "pair"}, {"reviews": None}):
        judge = reward.Judge(replace(data, **changed), lengths)
        for i in range(1, 19):
            drawn = judge.random_reason(i, rng)
            assert drawn.startswith(D.REASON_START), changed


def test_a_judge_that_reads_reviews_is_trained_once(shop_run, monkeypatch):
    """Guards: rounds in which the reviews chosen by the one before are learnt by heart."""
    data, _ = shop_run
    monkeypatch.setattr(reward.Judge, "fit_round", lambda judge, number, chosen: {"round": number})
    monkeypatch.setattr(reward.Judge, "choose_reasons", lambda judge, number: [])
    assert reward.Judge(data, lengths).fit()[0] == [{"round": 1}]
    for changed in ({"evidence": "histories"}, {"style": "pair"}):
        rounds, weights = reward.Judge(replace(data, **changed), lengths).fit()
        assert len(rounds) == len(weights) - 1 == reward.ROUNDS


def test_own_sentences_are_asked_for_once(shop_run, writer):
    """Guards: a resumed run that is aligned on other sentences, or pays for them again."""
    data, s = shop_run
    first = own_sentences(data, s)
    asked = len(writer.prompts)
    assert own_sentences(data, s) == first
    assert len(writer.prompts) == asked


def test_reasons_are_aligned_on_the_llms_own_sentences(shop_run, writer):
    """Guards: a prompt that shows others than the sentence was written of; the weak target of two
    phrases where there is a sentence; no target where there is none."""
    data, s = shop_run
    data.sentences = own_sentences(data, s)
    rng = np.random.default_rng(0)
    seen = Counter()
    for i in range(1, 19):
        shown, kept = data.sentences[i]
        prompt, target = D.reason_sample(data, i, [0, 1, 2], rng, "It is so.", follow=0.0)
        assert prompt == D.reason_prompt(data, i, "It is so.", shown)
        shared = sorted(D.shared_phrases(data, i, shown)[:2], key=data.phrases[i].index)
        thought = f"they mention {' and '.join(shared)}" if shared else "nothing shared"
        assert target.startswith(f"<think> {thought} </think>")
        reason, _, sound = D.parse_answer(target, "sentence" if kept else "pair")
        assert sound
        assert reason == kept[0] if kept else reason.startswith(D.REASON_START)
        seen[bool(kept)] += 1
    assert seen[True] > 9
    drawn = [D.random_reason(data, 1, rng) for _ in range(200)]
    own = [reason for reason in drawn if reason in data.sentences[1][1]]
    assert 60 < len(own) < 140
    assert set(own) == set(data.sentences[1][1])


def test_a_reason_so_far_that_is_the_target_is_not_shown(shop_run, writer):
    """Guards: an `align` that learns to copy the reason so far: half of the samples show one of the
    LLM's own, the best of which is the target."""
    data, s = shop_run
    data.sentences = own_sentences(data, s)
    rng = np.random.default_rng(0)
    (i, shown, best, other) = next(
        (i, shown, *kept[:2]) for i, (shown, kept) in enumerate(data.sentences) if len(kept) > 1
    )
    for current, seen in ((best, ""), (other, other), ("", "")):
        prompt, target = D.reason_sample(data, i, [], rng, current)
        assert prompt == D.reason_prompt(data, i, seen, shown)
        assert D.parse_answer(target, "sentence")[0] == best
    so_far = 0
    mix = replace(curec.ALIGNMENT, reason_share=1.0)
    for prompt, target in D.alignment_samples(data, 500, rng, mix):
        current = prompt.split("Reason so far: ")[1].split("\n")[0]
        assert current not in target
        so_far += current != "none"
    assert so_far > 150


# ---------------------------------------------------------------------------------- a whole run
@pytest.mark.slow
def test_a_whole_run_writes_sentences_and_confirms_them(tmp_path, monkeypatch, capsys):
    """Guards: a stage that breaks on sentences, reviews or a Qwen3; figures that reach no file."""
    write_shop(tmp_path / "shop", told)
    monkeypatch.chdir(tmp_path)
    s = settled("shop")
    data = curec.load_data(s)
    prompts = curec.first_prompts(data) + curec.first_prompts(data, data.events_by_item)
    # both what it is asked for: a sentence of its own, and an answer
    lessons = [(prompt, f"{D.ASKED_START}{SENTENCE.removeprefix('It')}") for prompt in prompts]
    lessons += [(prompt, answer(SENTENCE)) for prompt in prompts]
    texts = prompts + [text for _, text in lessons]
    llm = write_qwen3(tmp_path / "qwen3", TEMPLATES["Qwen3"], texts, lessons)
    small = "--align-steps 8 --ppo-updates 1 --ppo-batch 12 --proposals 2 --epochs 1 --max-new 40"
    args = ["--dataset", "shop", "--llm", llm, "--device", "cpu", "--quick", *small.split()]
    arms = ["--arms", "curec,reviews,content"]
    assert curec.main([*args, *arms]) == 0, capsys.readouterr().err
    run = tmp_path / "runs/shop"
    m = json.loads((run / "metrics.json").read_text())
    assert list(m["arms"]) == ["curec", "reviews", "content"]
    assert {("curec", "reviews"), ("reviews", "content")} <= {
        (row["a"], row["b"]) for row in m["comparisons"]
    }
    assert m["confirmed"]["reviews"] == 60
    for name in ("shuffled", "title", "frequent"):
        assert 0 <= m["confirmed"][name] <= 1
    for kind in ("aligned", "rl", "curec"):
        assert 0 <= m["reasons"][kind]["confirmed"] <= 1
        assert m["reasons"][kind]["foreign_names"] <= 1
    assert m["reasons"]["curec"]["format_ok"] > 0.3
    assert m["reasons"]["curec"]["confirmed"] > 0
    kept = torch.load(run / "state/sentences.pt", weights_only=True)["value"]
    written = sum(bool(mine) for _, mine in kept)
    assert m["own_sentences"] == {"items_with": written, "items": 18}
    assert sum(SENTENCE in mine for _, mine in kept) > 9
    lines = [json.loads(line) for line in (run / "reasons.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == [f"i{i:02d}" for i in range(18)]
    assert any(line["reason"] == SENTENCE for line in lines)
    report = (run / "report.md").read_text()
    assert "confirmed: reviews 60" in report
    assert "own_sentences: items_with" in report
    assert "| curec - reviews | ndcg@10 |" in report
    assert "nan" not in report
    # it is taken up again, and looked at
    assert curec.main([*args, *arms, "--resume"]) == 0, capsys.readouterr().err
    again = json.loads((run / "metrics.json").read_text())
    assert again["reasons"] == m["reasons"]
    look = ["--run", str(run), "--item", "i03", "--score", SENTENCE]
    assert curec.main(look) == 0, capsys.readouterr().err
