"""Datasets, splits, prompts and answers: what turns interactions into arrays and text.

    python -c "import data; print(data.demo(0).items[1])"        look at the demo world

    interactions -> one chronological sequence a user -> train | valid (last but one) | test (last)
    event e      =  a train interaction that has a history: user, position >= 1, item, time
    history(e)   =  what that user had chosen before event e, oldest first

Items are numbered 1..n; 0 is padding. Sources: the made-up `demo` world, Amazon files of 2014,
2018 and 2023, a folder of your own. What trains a model reads `train`, `events`, `items` and the
reviews of events; the demo's hidden truth (why each item is chosen) is read by the truth figures
and by the arms `oracle` and `oracle-only` alone, reviews of held-out choices by `reward.confirmed`.

A reason of the style "pair" names two of the words that its item offers (Dataset.phrases); the
phrases of a "sentence" are its own content words, stemmed (sentence_phrases).
Every random stream is default_rng([seed, salt, ...]), with a salt of its own for each use.
"""

import ast
import csv
import gzip
import html
import json
import os
import re
import shutil
import tempfile
import unicodedata
import urllib.request
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from glob import glob
from itertools import pairwise
from os.path import basename, exists, isdir, join

import numpy as np
from tqdm import tqdm

# prompts: items shown of each history (what was chosen just before says most); users shown; words
# of a title, of an item's text and of a review; words kept of a review
PROMPT_HISTORY, PEOPLE = 1, 8
TITLE_WORDS, TEXT_WORDS, REVIEW_WORDS = 12, 40, 12
KEPT_WORDS = 60
SENTENCE_WORDS = 24  # most words of a reason of the style "sentence"
# a word that fewer items have tells which item it is: the reward's encoder never sees it
MIN_ITEMS = 5
# a title or description that more items share, and more than 5 % of them, is none: markup
MAX_NAMESAKES = 10
TIES = ("file", "shuffle")  # order within a timestamp
# of reasons: two phrases of the item, or a sentence free in its words
STYLES = ("pair", "sentence")
EVIDENCE = ("both", "histories")  # of the people shown: reviews too, or not
# LANE's m preferences a user; items of a history that the two relatives show
PREFERENCES, RELATIVES_HISTORY = 5, 10

# the last two lines: words that every reason has, and sizes
STOPWORDS = frozenset(
    "a about above all also an and any are as at be been by can de for from has have how in into "
    "is it its la le me more most new no none not of off on one or other our out over per so than "
    "that the their them these they this to too two up use used very was we what when which who "
    "will with you your "
    "people choose "
    "count fl fluid inch inches ml ounce ounces oz pack pcs set size value".split()
)
# and in sentences
SENTENCE_STOPWORDS = STOPWORDS | frozenset(
    "because but buy buyers could do does don't he her his i i'm i've if it's item items just like "
    "made make makes many me much my perfect product products really she some such then there "
    "things thing those use uses want were while would".split()
)


class DataError(ValueError):
    """Bad or missing input; the message says what to do."""


# ------------------------------------------------------------------------------------- the dataset
@dataclass
class Dataset:
    """Items, and one chronological sequence of interactions a user."""

    name: str
    items: list  # of dicts: id, title, brand, categories, description; items[0] is padding
    users: list  # source ids
    seqs: list  # a user: item numbers in time order, (L,) int64
    times: list  # a user: seconds since 1970, (L,) int64; float64 where a source has fractions
    ratings: list | None = None  # a user: (L,) float; None where the source has none
    reviews: list | None = None  # a user: L texts, "" where none; None where the source has none
    style: str = "pair"  # of reasons: one of STYLES
    evidence: str = "histories"  # shown in prompts: one of EVIDENCE
    # style "sentence": an item's people shown and what the LLM wrote of them, best first (see
    # curec.own_sentences); index 0 empty
    sentences: list = ()
    # demo only: drivers an item, "early" and "late"; "since": when; "popularity" of an item and
    # "follower" of an aspect are for tests/bench alone
    truth: dict | None = None
    notes: list | tuple = ()  # what was skipped and why
    fields: list | tuple = ()  # names of the fields that the source's items have

    def __post_init__(self):
        self.n_items = len(self.items) - 1
        self.train = [s[:-2] for s in self.seqs]
        self.valid, self.test = np.array([s[-2:] for s in self.seqs]).T

    @cached_property
    def events(self):
        """Train interactions with a history: (E,) arrays user, pos, item, time, sorted by time."""
        rows = []
        for u, seq in enumerate(self.train):
            rows += [(u, p, seq[p], self.times[u][p]) for p in range(1, len(seq))]
        if not rows:
            raise DataError(f"{self.name}: no user has 4 interactions; lower --k-core or limits")
        rows.sort(key=lambda row: row[3])
        columns = map(np.array, zip(*rows, strict=True))
        return dict(zip(("user", "pos", "item", "time"), columns, strict=True))

    @cached_property
    def events_by_item(self):
        """The events in which each item was chosen: n_items + 1 arrays, the first one empty."""
        items = self.events["item"]
        order = np.argsort(items, kind="stable")
        return np.split(order, np.searchsorted(items[order], range(1, self.n_items + 1)))

    def history(self, event):
        """What the user of a train event had chosen before it, oldest first."""
        return self.train[self.events["user"][event]][: self.events["pos"][event]]

    def review(self, event):
        """What the user of a train event wrote about its item; "" where there is nothing."""
        if not self.reviews:
            return ""
        return self.reviews[self.events["user"][event]][self.events["pos"][event]]

    @cached_property
    def counts(self):
        """Train interactions of each item, (n_items + 1,)."""
        return np.bincount(np.concatenate(self.train), minlength=self.n_items + 1)

    @cached_property
    def titles(self):
        """Each item's title in a prompt; equal ones get a number: a title names one item."""
        titles = [""]
        seen = Counter()
        for item in self.items[1:]:
            title = " ".join((item["title"] or item["id"]).split()[:TITLE_WORDS])
            seen[title.lower()] += 1
            number = seen[title.lower()]
            titles.append(f"{title} ({number})" if number > 1 else title)
        return titles

    @cached_property
    def document_frequency(self):
        """Number of items whose text has a word."""
        return Counter(w for item in self.items[1:] for w in set(words(item_text(item))))

    @cached_property
    def common_words(self):
        """Words that say nothing: those of more than half of the items, and stop words."""
        return STOPWORDS | {w for w, n in self.document_frequency.items() if n > self.n_items / 2}

    @cached_property
    def vocabulary(self):
        """Number of items whose text has a word or, where reviews are shown, an event's review."""
        if self.evidence != "both":
            return self.document_frequency
        said = [set(words(item_text(item))) for item in self.items[1:]]
        for i, events in enumerate(self.events_by_item[1:]):
            said[i].update(*(words(self.review(e)) for e in events))
        return Counter(w for item_words in said for w in item_words)

    @cached_property
    def identifying_words(self):
        """Words that tell an item: those of fewer than MIN_ITEMS items, and of brands."""
        branded = Counter(w for item in self.items[1:] for w in set(words(item["brand"])))
        told = self.document_frequency
        brands = {w for w, n in branded.items() if n > told[w] / 2}
        return brands | {w for w, n in self.vocabulary.items() if n < MIN_ITEMS}

    @cached_property
    def masked_words(self):
        """Hidden from the reward: common words, and what tells an item."""
        return self.common_words | self.identifying_words

    @cached_property
    def phrases(self):
        """What an item says of itself and a reason may name: its words, each in one form, without
        common ones (with masked ones and emoji only where fewer than two would be left)."""
        phrases = [[]]
        for item in self.items[1:]:
            said = [w for w in words(item_text(item)) if w not in self.common_words]
            own = {stem(w): w for w in said if not w[0].isdigit()}.values()
            clear = [w for w in own if w[0].isalpha() and w not in self.masked_words]
            phrases.append(clear if len(clear) >= 2 else list(own))
        return phrases

    def check_reasons(self):
        """Raises DataError where users are few, or most items have too few phrases for a reason."""
        if min(len(self.users), self.n_items) < 10:
            raise DataError(f"{self.name}: reasons need at least 10 users and 10 items; see --arms")
        poor = []
        for item, phrases in zip(self.items[1:], self.phrases[1:], strict=True):
            if len(phrases) < 2 or mask_identity(self, " ".join(phrases)) == "item":
                poor.append(item)
        silent = sum(len(phrases) < 2 for phrases in self.phrases[1:])
        if silent:
            self.notes = [*self.notes, f"{silent} items say too little: they get no reason"]
        if len(poor) > self.n_items / 2:
            raise DataError(
                f"{self.name}: {len(poor)} of {self.n_items} items say nothing that a reason could "
                f'name and {MIN_ITEMS} items share, such as "{item_text(poor[0])[:80]}"; check '
                f"`title` and `description` (fields found: {listed(self.fields)}), or see --arms"
            )


# accents and vowel signs: they belong to the letter before them
MARKS = "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] == "M")
# scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han
UNSPACED = (
    "\u0e01-\u0e4e\u0e81-\u0ece\u1000-\u103f\u1780-\u17d3\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff"
    "\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
UNSPACED_LETTER = re.compile(rf"(?=[{UNSPACED}])[^\W\d_][{MARKS}]*")
# other letters and digits, but no fractions; a flag is two signs, emoji may be coloured or joined
LETTER = rf"[^\W_\xbc-\xbe{UNSPACED}]"
FLAG = "[\U0001f1e6-\U0001f1ff]{2}"
EMOJI = "[\u231a-\u23ff\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]"
WORD = re.compile(
    rf"{LETTER}(?:{LETTER}|[{MARKS}\xad]|[\u200c\u200d'-]+(?={LETTER}))*"
    rf"|(?:{UNSPACED_LETTER.pattern})+"
    rf"|{FLAG}|{EMOJI}(?:[{MARKS}\U0001f3fb-\U0001f3ff]|\u200d{EMOJI})*"
)


def words(text):
    """The words of a text in lower case. In scripts without spaces each two neighbouring letters
    are a word; an emoji is one."""
    text = unicodedata.normalize("NFC", text.lower().replace("\u2019", "'"))
    found = []
    for word in WORD.findall(text):
        letters = UNSPACED_LETTER.findall(word)
        found += map("".join, pairwise(letters)) if len(letters) > 1 else [word]
    return found


def stem(word):
    """Singular and plural as one: nail and nails, brush and brushes."""
    return re.sub(r"(?<=ss|sh|ch)es$|(?<=x)es$|(?<=[^s])s$", "", word)


def item_text(item):
    """All that an item says of itself, one line of at most TEXT_WORDS words."""
    brand = f"by {item['brand']}" if item["brand"] else ""
    parts = [item["title"], brand, ", ".join(item["categories"][-2:]), item["description"]]
    said = " . ".join(filter(None, parts)).split()
    return " ".join(said[:TEXT_WORDS]) or "no description"


# -------------------------------------------------------------------------------- the demo world
ASPECTS = np.array(
    "pockets wheels warmth silence colour scent storage grip comfort speed shade privacy elegance "
    "humour calm".split()
)
# chosen once, on world seeds that no table uses: at .5 counting shared words is nearly as true as
# what PPO learns, at .7 PPO learns too slowly for a demo
MOVES_ON = 0.55
BRANDS = "Velora Nordel Quisp Tamber Ostrel Brinda Kelmo Farrow Zintra Palou Merith Dovane".split()


def demo(seed, n_users=1000, n_items=500) -> Dataset:
    """A shop in which needs move on: what people look for next is often not what their history
    says, but what follows it. Every item says five aspects and is chosen for two of them (the
    drivers; the rest are decoys); 25 % of the items swap one driver half-way through time. A user
    has two needs. When a choice meets one, it moves on with probability MOVES_ON to the need that
    follows it on a hidden circle of all aspects: after the tent comes the sleeping bag. A user
    picks item i at time t with probability proportional to exp(6 m + 2 [m = 2] + popularity_i),
    where m = |drivers(i, t) & needs(u, t)|."""
    rng = np.random.default_rng([seed, 7])
    n_aspects = len(ASPECTS)
    # seconds since 1970: about three years
    start, middle, end = 1_400_000_000, 1_450_000_000, 1_500_000_000
    said = np.array([rng.permutation(n_aspects)[:5] for _ in range(n_items)])
    early = np.array([rng.permutation(aspects)[:2] for aspects in said])
    drivers = np.stack([early, early])  # in the first and in the second half of time
    for i in np.flatnonzero(rng.random(n_items) < 0.25):
        new = rng.choice([a for a in said[i] if a not in early[i]])
        drivers[1, i, rng.integers(2)] = new
    drives = (drivers[..., None] == np.arange(n_aspects)).any(2)  # (2, n_items, n_aspects)
    popularity = rng.normal(0, 0.3, n_items)
    circle = rng.permutation(n_aspects)
    follower = np.roll(circle, -1)[np.argsort(circle)]  # of an aspect: the one that comes next
    seqs, times = [], []
    for _ in range(n_users):
        needs = rng.permutation(n_aspects)[:2]
        when = np.sort(rng.integers(start, end, rng.integers(9, 14)))
        chosen = []
        for t in when:
            met = drives[int(t > middle)][:, needs]  # (n_items, 2)
            matches = met.sum(1)
            utility = 6 * matches + 2 * (matches == 2) + popularity + rng.gumbel(size=n_items)
            utility[chosen] = -np.inf
            chosen.append(utility.argmax())
            needs = next_needs(needs, met[chosen[-1]] & (rng.random(2) < MOVES_ON), follower)
        seqs.append(np.array(chosen) + 1)
        times.append(when)
    items = [{}]
    for i, aspects in enumerate(said, 1):
        fields = {"title": " ".join(ASPECTS[aspects]), "brand": str(rng.choice(BRANDS))}
        items.append(item_record(f"D{i:04d}", fields))
    early, late = ([(), *map(tuple, half)] for half in ASPECTS[drivers].tolist())
    truth = {"since": [middle] * (n_items + 1), "early": early, "late": late}
    truth |= {"popularity": [0.0, *popularity.tolist()], "follower": follower.tolist()}
    users = [f"user{u}" for u in range(n_users)]
    return Dataset("demo", items, users, seqs, times, truth=truth)


def next_needs(needs, moving, follower):
    """A user's two needs, those that move replaced by their followers; two different needs, so a
    follower that the user has already is passed over."""
    needs = needs.copy()
    for k in np.flatnonzero(moving):
        needs[k] = follower[needs[k]]
        if needs[k] == needs[1 - k]:
            needs[k] = follower[needs[k]]
    return needs


# ------------------------------------------------------------------------- prompts and answers
PROMPT = (
    "Buyers of an item had chosen before:\n{}\nReason so far: {}\nItem: {}\n"
    "Why do people choose it?"
)
SENTENCE_PROMPT = (
    "Buyers had chosen before:\n{}\nReason so far: {}\nItem: {}\n"
    "In one short sentence, why do people choose it?"
)
# what the LLM that is asked for a sentence goes on from, and how that sentence then starts
ASKED_START, SENTENCE_START = "People choose it because it", "It"
REASON_START = "people choose it for "
REASON = REASON_START + "{} and {}"
ANSWER = "<think> {} </think> <reason> {} </reason>"
TAGS = ("<think>", "</think>", "<reason>", "</reason>")
ANSWER_PATTERN = re.compile(r"\s*<think>([^<>]*)</think>\s*<reason>([^<>]*)</reason>\s*")
REASON_PATTERN = re.compile(r"people choose it for (.{1,80}?) and (.{1,80}?)")


def people_shown(data, events):
    """A line for each of these train events: what its user had chosen before and, where reviews are
    shown, the first words of what that user wrote of this item."""
    lines = []
    for e in events:
        line = "- " + "; ".join(data.titles[i] for i in data.history(e)[-PROMPT_HISTORY:])
        if data.evidence == "both" and data.review(e):
            line += f"; wrote: {reviews_shown(data, [e])}"
        lines.append(line)
    return "\n".join(lines)


def reviews_shown(data, events):
    """The first words of these events' reviews, as prompts with --evidence both show them."""
    shown = [" ".join(data.review(e).split()[:REVIEW_WORDS]) for e in events]
    return " . ".join(filter(None, shown))


def reason_prompt(data, item, reason, events):
    """The one prompt for reasons: the people shown, the reason so far ("" = none), the item."""
    people = people_shown(data, events[:PEOPLE]) or "- nobody yet"
    prompt = SENTENCE_PROMPT if data.style == "sentence" else PROMPT
    return prompt.format(people, reason or "none", item_text(data.items[item]))


def parse_answer(text, style="pair"):
    """Decoded answer -> (reason, the phrases it names, format_ok). The format: one think, one
    reason; two different phrases, or a sentence of at most SENTENCE_WORDS words with two phrases or
    more, none of them twice."""
    answer = ANSWER_PATTERN.fullmatch(text[:10_000])
    if not answer:
        return "", [], False
    reason = " ".join(answer[2].split())
    if style == "sentence":
        phrases = sentence_phrases(reason)
        return reason, phrases, is_sentence(reason, phrases)
    found = REASON_PATTERN.fullmatch(reason)
    if not found or " and " in found[2]:
        return reason, [], False
    phrases = list(found.groups())
    first, second = ([*map(stem, words(phrase))] for phrase in phrases)
    return reason, phrases, bool(first and second and first != second)


def sentence_phrases(reason):
    """The phrases of a sentence: its content words, stemmed."""
    return [stem(w) for w in words(reason) if w not in SENTENCE_STOPWORDS]


def is_sentence(reason, phrases):
    """One sentence of a fitting length, of two different phrases or more and none twice? A single
    one, as in "It is great.", tells nothing of its item."""
    one = not re.search(r"[.!?;:]\s|[.!?]{2}", reason)
    fits = len(phrases) >= 2 and len(words(reason)) <= SENTENCE_WORDS
    return bool(one and fits and len(set(phrases)) == len(phrases))


def said_of(data, item, until=np.inf):
    """The words that an item's own text says; of the style "sentence", stemmed, and with what
    prompts show of the people who chose it before the time `until`."""
    said = set(words(item_text(data.items[item])))
    if data.style == "pair":
        return said
    events = data.events_by_item[item]
    told = people_shown(data, events[data.events["time"][events] < until])
    return {stem(w) for w in said.union(words(told))}


def grounding(data, reason, said):
    """(Share of the reason's phrases that are said, see said_of; penalty of the others, 0 to 1). Of
    a pair the penalty is the rest of the share. In a sentence words that no item says are free (an
    LLM may know that almond oil soothes): it is 1 for a possible name, or without a phrase."""
    if data.style == "pair":
        content = [w for w in words(reason) if w not in STOPWORDS]
        share = sum(w in said for w in content) / len(content) if content else 0.0
        return share, 1 - share
    phrases = sentence_phrases(reason)
    share = sum(w in said for w in phrases) / len(phrases) if phrases else 0.0
    foreign = any(stem(w) not in said for w in possible_names(data, reason))
    return share, float(foreign or not phrases)


def possible_names(data, reason):
    """A sentence's words that could name another item: words of few items, brands, numbers, and
    words with a capital letter within it that most items do not say."""
    found = []
    for k, token in enumerate(reason.split()):
        capital = k > 0 and token.lstrip("\"'([{\u201c\u2018\u00ab")[:1].isupper()
        for w in words(token):
            named = capital and w not in data.common_words
            telling = named or w[0].isdigit() or w in data.identifying_words
            if telling and w not in SENTENCE_STOPWORDS:
                found.append(w)
    return found


def mask_identity(data, text):
    """What the reward's encoder reads of a text: its words without brands, numbers, common ones
    and those of few items. Of a pair sorted, or a causal encoder would pay "A and B" unlike "B and
    A"."""
    kept = [w for w in words(text) if w not in data.masked_words and not w[0].isdigit()]
    return " ".join(kept if data.style == "sentence" else sorted(kept)) or "item"


def random_reason(data, item, rng, size=2):
    """A reason drawn at random: one that names grounded phrases of the item or, half of the time,
    a sentence of the LLM's where there are some."""
    if data.sentences and data.sentences[item][1] and rng.random() < 0.5:
        return rng.choice(data.sentences[item][1])
    own = data.phrases[item]
    drawn = sorted(rng.permutation(own)[:size], key=own.index)
    return REASON_START + (" and ".join(drawn) or "itself")


def own_sentence(data, item, text, shown):
    """The first sentence of what an LLM wrote after ASKED_START, of the people shown: (its
    groundedness, the reason). None where it is too long or short, repeats itself or the question,
    is in a script that neither the item nor these people write, or names what neither the item nor
    anybody who chose it says."""
    first = re.split(r"(?<=[.!?])\s|\n", text.strip())[0].rstrip(" .!?,;:")
    reason = f"{SENTENCE_START} {first}."
    fields = data.items[item]
    told = [fields["title"], fields["description"], *(data.review(e) for e in shown)]
    readable = scripts(first) <= scripts(" ".join(told)) and not re.search(r'[<>"]', first)
    phrases = sentence_phrases(reason)
    sound = is_sentence(reason, phrases) and len(words(reason)) >= 4
    echo = {"choose", "sentence", "short"}.intersection(words(reason))
    share, foreign = grounding(data, reason, said_of(data, item))
    return (share, reason) if sound and readable and not (foreign or echo) else None


def scripts(text):
    """The scripts that a text's letters are of: LATIN, CYRILLIC, ..."""
    return {unicodedata.name(c, "").partition(" ")[0] for c in text if c.isalpha()}


def shared_phrases(data, item, events):
    """The item's phrases that the prompt of these events shows too, most shared first."""
    said = Counter(words(people_shown(data, events[:PEOPLE])))
    return sorted((w for w in data.phrases[item] if said[w]), key=lambda w: -said[w])


# ---------------------------------------------------------------------------- alignment samples
# the tasks of "Aligning LLMs with Recommendation Knowledge" (arXiv 2404.00245), in our words
TASKS = {
    "mim": "Which item is blank?",
    "mlm": "Which word is blank?",
    "bpr": "Which is preferred: {}?",
    "next": "What comes next?",
    "rank": "Which of these comes next: {}?",
    "rate": "Which rating from 1 to 5 for {}?",
}


@dataclass(frozen=True)
class Mixture:
    """What alignment samples are made of. A reason's target is weak, as in "<think> most shared
    grip and calm </think> <reason> people choose it for grip and shade </reason>": the thought
    counts what the users shown had in common, the reason may name any phrases of the item."""

    reason_share: float = 0.5  # the others are tasks
    people: int = PEOPLE  # most users shown to a reason
    follow: float = 1.0  # share of reasons that name what their thought names; others: at random
    tasks: tuple = tuple(TASKS)
    next_share: float = 0.0  # more of the task `next`
    longest: int = PROMPT_HISTORY  # items of a history in a task
    ahead: int = 1  # items that the answer of `next` names, a line each


def alignment_samples(data, n, rng, mix):
    """n (prompt, answer) pairs from the train split alone: reasons with weak targets and tasks of
    recommendation knowledge, each train event once before any comes again."""
    nameable = np.flatnonzero([len(phrases) >= 2 for phrases in data.phrases])
    samples, waiting = [], []
    for _ in range(n):
        if len(nameable) and rng.random() < mix.reason_share:
            item = rng.choice(nameable)
            # some with fewer users: shorter, easier
            shown = rng.permutation(data.events_by_item[item])[: rng.integers(mix.people + 1)]
            current = random_reason(data, item, rng) if rng.random() < 0.5 else ""
            samples.append(reason_sample(data, item, shown, rng, current, mix.follow))
        else:
            waiting = waiting or rng.permutation(len(data.events["user"])).tolist()
            samples.append(task_sample(data, waiting.pop(), rng, mix))
    return samples


def reason_sample(data, item, events, rng, current="", follow=1.0):
    """(prompt, answer) with a weak target. The thought names the item's two phrases most shared
    with the histories shown. The reason names them in a share `follow` of the samples, else two at
    random: which of them matter is left to the reward. Phrases stand in the item's order. Of the
    style "sentence" the reason is the best that the LLM itself wrote, where there is one."""
    own = data.phrases[item]
    answers = []
    if data.style == "sentence":
        # of the people that the LLM was shown
        events, answers = data.sentences[item]
    shared = sorted(shared_phrases(data, item, events)[:2], key=own.index)
    found = "they mention" if data.style == "sentence" else "most shared"
    thought = f"{found} {' and '.join(shared)}" if shared else "nothing shared"
    if answers:
        # a reason so far that is the answer would teach to copy it
        current = "" if current == answers[0] else current
        return reason_prompt(data, item, current, events), ANSWER.format(thought, answers[0])
    kept = shared if rng.random() < follow else []
    named = list(dict.fromkeys([*kept, *rng.permutation(own)]))[:2]
    answer = ANSWER.format(thought, REASON.format(*sorted(named, key=own.index)))
    return reason_prompt(data, item, current, events), answer


def task_sample(data, event, rng, mix):
    """(prompt, answer) of a task drawn at random, about one train event."""
    tasks = [t for t in mix.tasks if t != "rate" or data.ratings]
    user, end = data.events["user"][event], data.events["pos"][event]
    seq = data.train[user]
    task = "next" if rng.random() < mix.next_share else rng.choice(tasks)
    past = [data.titles[i] for i in data.history(event)[-mix.longest :]]
    goal = data.titles[seq[end]]
    others = [i for i in dict.fromkeys(rng.integers(1, data.n_items + 1, 8)) if i not in seq]
    chosen = "; ".join(past)
    about = ""
    answer = goal
    if task in ("mim", "mlm"):
        # blank an item of the history, or a word of its titles
        parts = past if task == "mim" else chosen.split()
        hidden = rng.integers(len(parts))
        answer = parts[hidden].strip(";") or ";"
        parts[hidden] = "____"
        chosen = "; ".join([*parts, goal]) if task == "mim" else " ".join(parts)
    elif task in ("bpr", "rank") and others:
        candidates = [seq[end], *others[: 1 if task == "bpr" else 2]]
        about = "; ".join(data.titles[i] for i in rng.permutation(candidates))
    elif task == "rate":
        about = goal
        answer = f"{data.ratings[user][end]:.0f}"
    else:
        task = "next"
        answer = "\n".join(data.titles[i] for i in seq[end : end + mix.ahead])
    return f"Chosen in order: {chosen}\n{TASKS[task].format(about)}", answer


# ------------------------------------------------------------------------------ real data: loading
@dataclass(frozen=True)
class Subset:
    """Which interactions of a source are kept, and in which order."""

    ties: str = "file"  # within a timestamp: the source's order, or "shuffle": drawn by seed
    # fewest interactions of users and items; -1: 5, but 0 for Amazon's 5-cores of 2014 and 2018
    k_core: int = -1
    limit_items: int = 0  # the items with most train interactions, then a 5-core; 0: all
    limit_users: int = 0  # drawn by seed; 0: all


# time: seconds since 1970; rating: nan where there is none; review: "" where there is none
Row = namedtuple("Row", "user item time rating review")


def load(name, data_dir="data", seed=0, small=False, subset=Subset()) -> Dataset:
    """`demo`, an Amazon category (its files found in data_dir, or downloaded there) or the path of
    a folder. Raises DataError, which says what to do."""
    if name == "demo":
        return demo(seed, 200, 120) if small else demo(seed)
    skipped = Counter()
    if isdir(name):
        interactions, described = find_file(name, INTERACTIONS), find_file(name, ITEMS)
    else:
        files = amazon_files(name, data_dir)
        for path, url in files.items():
            if not exists(path):
                download(path, url)
        interactions, described = files
    rows = read_interactions(interactions, skipped)
    if subset.ties == "shuffle":
        np.random.default_rng([seed, 11]).shuffle(rows)
    rows.sort(key=lambda row: (row.user, row.time))  # stable: equal times keep their order
    first = {}
    for row in rows:
        first.setdefault((row.user, row.item), row)
    skipped["repeated user-item pairs: the first is kept"] = len(rows) - len(first)
    default = 0 if "_5.json" in basename(interactions) else 5
    k_core = subset.k_core if subset.k_core >= 0 else default
    rows = core(first.values(), k_core)
    skipped[f"interactions outside the {k_core}-core: left out"] = len(first) - len(rows)
    if subset.limit_items:
        # a user's last two, those with no row of the user two rows on, are for validation and test
        pairs = zip(rows, rows[2:], strict=False)
        train = sorted(row.item for row, later in pairs if row.user == later.user)
        kept = dict(Counter(train).most_common(subset.limit_items))  # of equal ones the first ids
        rows = core([row for row in rows if row.item in kept], 5)
    if subset.limit_users:
        users = np.random.default_rng([seed, 13]).permutation(sorted({row.user for row in rows}))
        kept = set(users[: subset.limit_users])
        rows = [row for row in rows if row.user in kept]
    return from_rows(basename(os.path.normpath(name)), rows, described, skipped)


def core(rows, k):
    """The k-core: every user and every item left has at least k interactions."""
    before = None
    while len(rows) != before:
        before = len(rows)
        users = Counter(row.user for row in rows)
        items = Counter(row.item for row in rows)
        rows = [row for row in rows if users[row.user] >= k and items[row.item] >= k]
    return rows


def from_rows(name, rows, described, skipped) -> Dataset:
    """rows: by user, time. described: path of the items. skipped: what was left out -> how many."""
    sizes = Counter(row.user for row in rows)
    users = [user for user in sizes if sizes[user] >= 3]
    skipped["users with fewer than 3 interactions: left out"] = len(sizes) - len(users)
    if not users:
        notes = [f"{count} {what}" for what, count in skipped.items() if count]
        problem = f"{name}: no user has 3 interactions left; lower --k-core or the limits"
        raise DataError("; ".join([problem, *notes]))
    kept = [row for row in rows if sizes[row.user] >= 3]
    _, chosen, times, ratings, reviews = zip(*kept, strict=True)
    number = {item: i for i, item in enumerate(sorted(set(chosen)), 1)}
    records, fields = read_items(described, number.keys(), skipped)
    items = [item_record(item, records.get(item, {})) for item in number]
    most = max(MAX_NAMESAKES, len(items) // 20)
    for field in ("title", "description"):
        namesakes = Counter(item[field].lower() for item in items)
        for item in items:
            if item[field] and namesakes[item[field].lower()] > most:
                item[field] = ""
                skipped[f"{field}s that more than {most} items share: taken for none"] += 1
    broken = ["\ufffd" in item["title"] + item["description"] for item in items]
    skipped["items with letters that are no UTF-8"] = sum(broken)
    skipped["items without a title"] = sum(not item["title"] for item in items)
    notes = [f"{count} {what}" for what, count in skipped.items() if count]
    early, late = min(times), max(times)
    # years and days as numbers
    if 1900 <= early <= late <= 2100 or 19_000_101 <= early <= late <= 21_001_231:
        notes.append("times look like dates, but numbers are seconds since 1970: write 2020-09-13")
    unit = np.int64 if all(map(float.is_integer, times)) else np.float64
    whole = np.cumsum([sizes[user] for user in users])
    ends = whole[:-1]
    seqs = np.split(np.array([number[item] for item in chosen]), ends)
    times = np.split(np.array(times, unit), ends)
    ratings = np.split(np.array(ratings), ends) if set(ratings) <= {1, 2, 3, 4, 5} else None
    texts = None
    if any(reviews):
        texts = [list(reviews[end - sizes[u] : end]) for u, end in zip(users, whole, strict=True)]
    entries = (users, seqs, times, ratings, texts)
    return Dataset(name, [{}, *items], *entries, notes=notes, fields=fields)


# ---------------------------------------------------------------------- real data: files and fields
ALIASES = {"beauty": "Beauty", "toys": "Toys_and_Games", "sports": "Sports_and_Outdoors"}
AMAZON_2014 = (
    "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_{}_5.json.gz",
    "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/meta_{}.json.gz",
)
UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_"
AMAZON_2018 = (UCSD + "v2/categoryFilesSmall/{}_5.json.gz", UCSD + "v2/metaFiles2/meta_{}.json.gz")
AMAZON_2023 = (
    UCSD + "2023/raw/review_categories/{}.jsonl.gz",
    UCSD + "2023/raw/meta_categories/meta_{}.jsonl.gz",
)
CATEGORIES_2014 = """
    Amazon_Instant_Video Apps_for_Android Automotive Baby Beauty Books CDs_and_Vinyl
    Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics
    Grocery_and_Gourmet_Food Health_and_Personal_Care Home_and_Kitchen Kindle_Store
    Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies
    Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games
""".split()
# the files of a folder: the first that is there, or its .gz
INTERACTIONS = "interactions.csv interactions.tsv interactions.jsonl *.inter ratings.csv".split()
ITEMS = "items.jsonl items.csv items.tsv *.item movies.csv".split()
# what sources call a field, the best name first; see plain()
ITEM = "itemid item parentasin asin movieid productid bookid businessid sku"
FIELDS = {
    "user": "userid user uid reviewerid customerid",
    "item": ITEM,
    "time": "timestamp time unixreviewtime datetime date reviewdate",
    "rating": "rating overall stars starrating",
    "review": "review reviewtext text comment",
    "summary": "summary headline",
    "id": "id " + ITEM,
    "title": "title name itemname productname producttitle movietitle",
    "brand": "brand store",
    "categories": "categories category genres genre class maincategory",
    "description": "description desc features",
}
ASIN = re.compile(r"""['"](?:parent_)?asin['"]\s*:\s*['"](.*?)['"]""")
# characters of a line of a file (more is taken for a decompression bomb), of a word of a text
MAX_LINE, MAX_WORD = 1 << 20, 60
LATEST = 1e11  # seconds since 1970, of the year 5138
# tags and angle brackets of any width (a title must not close our <reason>), control characters
MARKUP = re.compile(r"<[^<>]*>|[<>\uff1c\uff1e\ufe64\ufe65\0-\x1f\x7f-\x9f\ud800-\udfff]")


def amazon_files(name, data_dir):
    """{path: address} of a category's reviews and items: of the latest edition whose reviews are
    there, else of the one to download."""
    category = ALIASES.get(name.lower(), name)
    if not re.fullmatch(r"[A-Za-z0-9_]+", category):
        raise DataError(f"{name}: no such folder; it needs interactions.csv and items.jsonl")
    default = AMAZON_2014 if category in CATEGORIES_2014 else AMAZON_2023
    for edition in (AMAZON_2023, AMAZON_2018, AMAZON_2014, default):
        files = {}
        for address in edition:
            url = address.format(category)
            path = join(data_dir, basename(url))
            unpacked = path.removesuffix(".gz")
            files[unpacked if exists(unpacked) else path] = url
        if exists(next(iter(files))):
            break
    return files


def find_file(folder, patterns):
    """The file of a folder that the first of the patterns fits."""
    for pattern in patterns:
        found = glob(pattern, root_dir=folder) + glob(pattern + ".gz", root_dir=folder)
        if len({name.removesuffix(".gz") for name in found}) > 1:
            raise DataError(f"{folder}: has several files {pattern}; leave one")
        if found:
            return join(folder, found[0])
    found = listed(sorted(glob("*", root_dir=folder)))
    raise DataError(f"{folder}: needs {' or '.join(patterns)}, or one with .gz; found: {found}")


def listed(names):
    """Some names out of a file or folder, for a message."""
    return ", ".join(clean(name)[:30] for name in names[:12]) or "nothing"


def read_records(path, chosen=()):
    """(line number, record) of each line of a file of JSON lines or of a table with a header. Of
    Amazon's items only the chosen ones and those in doubt."""
    name = basename(path)
    if ".json" in name:
        for number, line in read_lines(path):
            # parsing is slow, and Amazon describes ten times the items that were chosen
            named = ASIN.findall(line) if chosen and name.startswith("meta_") else []
            if not named or not chosen.isdisjoint(named):
                yield number, parse_line(line)
        return
    csv.field_size_limit(MAX_LINE)
    delimiter = names = None
    for number, line in read_lines(path):
        delimiter = delimiter or max("\t;,", key=line.count)
        # a line at a time: a quote that is never closed spoils one line only
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        if names:
            yield number, dict(zip(names, cells, strict=False))
        names = names or cells


@lru_cache
def plain(name):
    """A field's name in one form: userId, user_id and RecBole's user_id:token are userid."""
    return re.sub(r":.*|[\W_]", "", str(name).lower())


def pick(fields, name):
    """A field's value, under the first of its names that has one; else None."""
    for synonym in FIELDS[name].split():
        value = fields.get(synonym)
        if value not in (None, "", []):
            return value
    return None


def read_file(path, parse, needed, skipped, chosen=()):
    """What parse makes of each record of a file, and the names of the records' fields. A record
    that parse refuses is skipped and counted."""
    made, names, first = [], {}, None
    for number, record in read_records(path, chosen):
        try:
            fields = {plain(name): value for name, value in record.items()}
            names |= record
            made.append(parse(fields))
        except (AttributeError, TypeError, ValueError, OverflowError):
            first = first or number
            skipped[f"lines of {path} without {needed} (the first: line {first}): skipped"] += 1
    return made, list(names)


def read_interactions(path, skipped):
    """The rows of a file."""
    needed = "user, item, timestamp (in seconds or a date)"
    rows, names = read_file(path, parse_row, needed, skipped)
    if not rows:
        problem = f"no line has {needed}; is it the right file?"
        raise DataError(f"{path}: {problem} Fields found: {listed(names)}")
    # one unit a file: no second of ours is that late
    unit, middle = 1, np.median([abs(row.time) for row in rows])
    while middle / unit > LATEST:
        unit *= 1000
    kept = [row._replace(time=row.time / unit) for row in rows if abs(row.time / unit) <= LATEST]
    skipped["times in milliseconds or finer: converted to seconds"] = len(kept) * (unit > 1)
    skipped[f"lines of {path} with a time of another unit: skipped"] = len(rows) - len(kept)
    return kept


def parse_row(fields):
    """The interaction that a record tells of."""
    user, item, time, rating, review = (pick(fields, name) for name in Row._fields)
    try:
        rating = float(rating)
    except (TypeError, ValueError):
        rating = float("nan")
    review = clean(review).strip(" .")
    if review:
        # Amazon's reviews of 2023 call it title; elsewhere that is the item's
        of_2023 = fields.get("title") if "parentasin" in fields else ""
        headline = clean(pick(fields, "summary") or of_2023)
        review = " . ".join(filter(None, [headline, review]))
        review = " ".join(review.split()[:KEPT_WORDS])
    return Row(parse_id(user), parse_id(item), parse_time(time), rating, review)


def parse_id(value):
    """A user's or an item's id as text."""
    text = str(value).strip()
    if type(value) not in (str, int) or not text or not text.isprintable():
        raise ValueError(f"no id: {value!r}")
    return text


def parse_time(value):
    """A number, or the seconds since 1970 of an ISO date (of UTC if it names no zone)."""
    try:
        time = float(value)
    except ValueError:
        date = datetime.fromisoformat(value.strip().replace("/", "-").removesuffix(" UTC"))
        time = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if not abs(time) < 1e20:
        raise ValueError("not a time")
    return time


def read_items(path, chosen, skipped):
    """{item id: fields} of the chosen items, the first of several; the fields' names."""
    described, names = read_file(path, parse_item, "a readable id", skipped, chosen)
    described = [pair for pair in described if pair[0] in chosen]
    records = dict(reversed(described))
    skipped["items described again: the first is kept"] = len(described) - len(records)
    if not records:
        problem = "describes none of the items chosen; is it the right file?"
        raise DataError(f"{path}: {problem} Fields found: {listed(names)}")
    return records, names


def parse_item(fields):
    """(id, fields) of an item."""
    return parse_id(pick(fields, "id")), fields


def item_record(item_id, fields):
    """An item from any source's fields; Amazon's categories are a list of paths, or one path."""
    path = pick(fields, "categories") or []
    path = path if isinstance(path, list) else [path]
    path = path[0] if path and isinstance(path[0], list) else path
    record = {name: clean(pick(fields, name)) for name in ("title", "brand", "description")}
    return {"id": item_id, **record, "categories": [c for c in map(clean, path) if c]}


def clean(value):
    """One line of plain text of a text, a number or a list of them: entities unescaped, markup
    dropped, words cut at MAX_WORD (one could be a million tokens), "nan" and "None" as empty."""
    parts = value if isinstance(value, list) else [value]
    text = " ".join(str(part) for part in parts if type(part) in (str, int, float))
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)))
    text = " ".join(word[:MAX_WORD] for word in MARKUP.sub(" ", text).split())
    return "" if text.lower() in ("nan", "none", "null") else text


def parse_line(line):
    """JSON or, in Amazon's item files of 2014, a Python literal (literal_eval runs no code)."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(line)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def read_lines(path):
    """Yields the lines of a text or gzip file that are not blank, numbered, with progress."""
    opened = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            lines = iter(lambda: file.readline(MAX_LINE + 1), "")
            lines = tqdm(lines, path, unit=" lines", leave=False, disable=None, delay=1)
            for number, line in enumerate(lines, 1):
                if len(line) > MAX_LINE:
                    raise OSError(f"a line is longer than {MAX_LINE:,} characters")
                if not line.isspace():
                    yield number, line
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read ({e}); mend it or download it again") from e


def download(path, url):
    """Fetches a file, which is under its name only once it is whole."""
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            part = join(unfinished, name)
            with urllib.request.urlopen(url, timeout=20) as source, open(part, "wb") as out:
                if not source.url.startswith("https://"):
                    raise OSError(f"it leads to {source.url}, which is not https")
                size = int(source.headers.get("Content-Length") or 0)  # 0: not known
                with tqdm.wrapattr(source, "read", size, desc=f"downloading {url}") as stream:
                    shutil.copyfileobj(stream, out)
            # to the end, where the checksum is
            for _ in read_lines(part):
                pass
            os.replace(part, path)
    except (OSError, ValueError) as e:
        advice = f"put it there by hand, from {url}, or name its folder with --data-dir"
        raise DataError(f"{path} could not be downloaded ({e}); {advice}") from e


# =================================================================== the two relatives: samples
# a prompt after LANE (arXiv 2407.02833)
PREFER = (
    f"You know what people look for. Name {PREFERENCES} different preferences, names only, that "
    'explain best what this person chooses next, as JSON: {"preferences": ["...", "..."]}'
)


def history_question(data, history, task):
    """A question of one of the two relatives, `next` or `prefer`, about the end of a history."""
    chosen = "; ".join(data.titles[i] for i in history[-RELATIVES_HISTORY:])
    return f"Chosen in order: {chosen}\n{PREFER if task == 'prefer' else TASKS[task]}"


def parse_preferences(text):
    """The PREFERENCES different names of an answer's JSON object; [] where it is malformed."""
    found = re.search(r'\{\s*"preferences"\s*:\s*(\[[^][{}]*\])\s*\}', text[:10_000])
    names = parse_line(found[1]) if found else None
    names = [clean(name)[:80] for name in names or [] if isinstance(name, str)]
    different = {name.lower() for name in names} - {""}
    return names if len(different) == len(names) == PREFERENCES else []


def lane_samples(data, n, rng):
    """n (prompt, answer) pairs that teach a model trained from scratch the form of LANE's answers;
    a pretrained LLM needs none. Weak targets: the most frequent phrases of the history's items."""
    samples = []
    # of a poor catalogue fewer, or none
    for user in rng.integers(len(data.train), size=4 * n):
        seq = data.train[user]
        past = seq[: rng.integers(1, len(seq) + 1)]
        said = Counter(w for i in past[-RELATIVES_HISTORY:] for w in data.phrases[i])
        # in alphabetical order: a model that has learnt to go on in it repeats nothing
        names = sorted(dict(said.most_common(PREFERENCES)))
        if len(names) == PREFERENCES:
            question = history_question(data, past, "prefer")
            samples.append((question, json.dumps({"preferences": names})))
    return samples[:n]
