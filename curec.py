"""CURec on one GPU: an LLM writes why people choose an item, a recommender judges the reasons, and
they help an ordinary recommender to rank and to say why.

    python curec.py --dataset demo            everything offline on a laptop's CPU, in minutes

     1. data: a chronological sequence per user -> train | valid (last but one) | test (last)
     2. align: teach a 4-bit LLM with LoRA the form of reasons (of sentences, on its own best
        ones), and recommendation knowledge
     3. reward model: train a small sequential recommender that sees an item by its reason alone,
        in rounds (with reviews one), each from reasons that the round before has chosen
     4. PPO: sample reasons, reward them, update the adapter `policy`; `align` is the reference
     5. correction: cut train time into windows; an item starts with a reason from its text alone
     6.    at the end of a window: show the LLM the reason and a third of the item's new choosers
     7.    it proposes corrections; the other new choosers (the audience) judge the best of them
     8. accept it if well-formed, no worse grounded, and their paired gain exceeds a margin; the
        timeline keeps what happened
     9. downstream: train SASRec with the last reasons as item features, beside control arms
    10. evaluate: rank the whole catalogue for each test user; compare arms with paired intervals

An event is a train choice that has a history (see data.Dataset); the people of an item, shown and
audience, are event numbers. Each stage leaves its result in the run folder, from where --resume
goes on. The demo's hidden truth is read by `add_truth` and the arms `oracle` alone.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data as D
import recommender
import reward
import rl
from data import DataError
from recommender import ARMS, METHODS, REASON_TEXTS

# Apache-2.0; for real data where there is CUDA; Qwen/Qwen3-0.6B for 6 to 8 GB
DEFAULT_LLM = "Qwen/Qwen3-1.7B"
# weak targets: which phrases matter is left to the reward
ALIGNMENT = D.Mixture(reason_share=0.8, follow=0.0)
# style "sentence": answers of the base LLM for an item, the best of which it is aligned on; their
# tokens: a sentence of 24 words, and what is cut off
OWN_ANSWERS, OWN_TOKENS = 4, 40
# of an answer's advantage: two answers of `align` and a value head, or the mean of GROUP answers
BASELINES, GROUP = ("critic", "group"), 8
HELD_OUT_ANSWERS = 400  # about, before and after PPO: fewer prompts are asked several times
DTYPES = ("float32", "bfloat16", "float16")
# the mark of a run folder of ours; the adapter that a stage trains
PROGRAM = "CURec"
ADAPTERS = {"align": "align", "ppo": "policy", "knowledge": "knowledge"}
# a run folder's subfolders and files
CLEARED = ("state", *ADAPTERS.values())
OUTPUTS = "config.json metrics.json reasons.jsonl ppo.jsonl report.md".split()
# names of files in the subfolders, and of files that a killed run was writing
OURS = re.compile(r"state/(adapter/.*|[\w.-]+\.(pt|unit(\.\d)?))|\w+/adapter_(config|model)\.\w+")
PART = re.compile(rf"({'|'.join(OUTPUTS)}|[\w.-]+\.(pt|unit(\.\d)?))\.\d+\.part")
MIN_GAIN = 1e-3  # nats; two reasons that name the same things differ by rounding only
TITLE_NORM = 0.5  # initial norm of ID embeddings made from titles; random ones have 0.16
ARM_NAMES = ",".join(arm for arm in ARMS if ARMS[arm].ids) + ",content-only,..."


def option(default, text, group="", choices=None):
    """A field of Settings, and a flag of the command line; group: of the flags from here on."""
    text += "" if default == "" or default is False else f" [{default}]"
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass(frozen=True)
class Settings:
    dataset: str = option("demo", "demo | beauty | other Amazon category | folder", "data")
    data_dir: str = option("data", "folder that holds or receives downloaded files")
    ties: str = option("file", "within a timestamp: the files' order or drawn", choices=D.TIES)
    k_core: int = option(-1, "fewest interactions a user, item; -1: 5, or 0 for Amazon's 5-cores")
    limit_items: int = option(0, "keep the N items chosen most, then a 5-core; 0: all")
    limit_users: int = option(0, "then keep N users drawn by seed; 0: all")
    llm: str = option("", f"tiny (demo and CPU) | name or path [{DEFAULT_LLM}]", "LLM")
    style: str = option("", "of reasons; default: pair for tiny, else sentence", choices=D.STYLES)
    evidence: str = option("", "of people; both: reviews too [sentence]", choices=D.EVIDENCE)
    dtype: str = option("", "of 4-bit computation; default: by the device", choices=DTYPES)
    encoder: str = option("", "Hugging Face text encoder; default: the LLM's own states")
    tiny_steps: int = option(0, "of the tiny LLM; 0: one an item, 1000 at least, 4000 at most")
    align_steps: int = option(200, "supervised LoRA steps, 32 prompts each")
    temperature: float = option(0.7, "of reasons and of PPO's answers; of proposals it is 1")
    max_new: int = option(0, "longest answer in tokens; 0: 24 for tiny, else 96")
    micro_batch: int = option(0, "rows a pass; fewer save memory; 0: 16 tiny, else 4")
    knowledge_steps: int = option(600, "supervised LoRA steps of the arm knowledge")
    ppo_updates: int = option(
        0, "PPO updates; 0: 60 for tiny, else 20, and fewer for a small catalogue", "method"
    )
    ppo_batch: int = option(192, "answers sampled for each PPO update")
    baseline: str = option("critic", "of PPO's advantages", choices=BASELINES)
    ppo_lr: float = option(0.0, "first PPO learning rate; 0: 3e-3 tiny, else 5e-5")
    windows: int = option(2, "windows of the correction, equal in train events")
    proposals: int = option(0, "for an item and window; 0: 24 for tiny, else 4")
    margin: float = option(0.25, "standard errors that the gain of a correction exceeds")
    method: str = option("curec", "whose arms: CURec's or a relative's", "evaluation", METHODS)
    arms: str = option("", "instead: all, or some of " + ARM_NAMES)
    seeds: int = option(3, "downstream repeats of every arm")
    epochs: int = option(60, "most downstream epochs; validation stops earlier")
    out: str = option("", "run folder; default runs/DATASET", "run")
    seed: int = option(0, "seed of everything, the demo world included")
    device: str = option("", "cpu | cuda | cuda:1; default: cuda where there is one")
    quick: bool = option(False, "a tiny run of every stage: its figures mean nothing")
    resume: bool = option(False, "go on after the last finished unit of work, or start")
    overwrite: bool = option(False, "replace the run that the run folder holds")
    dry_run: bool = option(False, "only print what would be downloaded, asked and learnt")
    tokens_per_second: float = option(0.0, "for the hours of --dry-run")
    debug: bool = option(False, "show the traceback of an error")
    run: str = option("", "the run folder to look at", "look back")
    explain: str = option("", "USER: top items with their reasons")
    history: str = option("", "ID,ID,...: the same for items of yours, oldest first")
    score: str = option("", "TEXT: the reward of a reason of yours ...")
    item: str = option("", "ID: ... about this item")


def whole_method(run: "Run"):
    """From the data to the report."""
    s = run.settings
    needs = needed(s)
    data = load_data(s)
    cuts = window_cuts(data, s.windows)
    run.open(data)
    llm = encode = None
    reasons = {}
    lines = []
    tiny = needs["LLM"] and s.llm == "tiny"
    # what can fail early comes before an older run is cleared
    if tiny:
        check_cache()
    elif needs["LLM"]:
        llm, encode = open_llm(s, s.llm)
        check_context(s, data, llm)
    # the encoder given counts, whatever the LLM's own is
    encoder = reward.load_encoder(s.encoder, s.device) if s.encoder else None
    run.begin(data, cuts)
    if tiny:
        llm, encode = open_llm(s, llm_path(run, data))
    encode = encoder or encode
    if needs["reasons"]:
        if s.style == "sentence":
            data.sentences = own_sentences(run, data, llm)
        train_adapter(run, data, llm, "align", s.align_steps, ALIGNMENT)
        judge, weights = fit_reward_model(run, data, encode)
        reinforce(run, data, llm, judge, cuts)
        reasons, lines = write_reasons(run, data, llm, judge, cuts)
        run.metrics["reasons"] = reason_figures(data, llm, judge, reasons)
    preferences = ask_preferences(run, data, llm) if needs["preferences"] else None
    rank_score = teach_knowledge(run, data, llm) if needs["knowledge"] else None
    inputs = arm_inputs(s, data, encode, reasons, preferences)
    train_and_test_arms(run, data, inputs, rank_score)
    if reasons and data.reviews:
        add_confirmed(run.metrics, data, reasons, s.seed)
    if reasons and data.truth:
        add_truth(run.metrics, data, judge, weights, reasons)
    if llm:
        data.notes = [*data.notes, *rl.memory_notes(llm[0])]
    write_report(run, data, lines)


# ----------------------------------------------------- algorithm, 1 to 4: the LLM and its judge
def needed(s):
    """What the arms need."""
    names = s.arms.split(",")
    texts = {text for name in names for text in ARMS[name].texts}
    needs = {
        "reasons": not texts.isdisjoint(REASON_TEXTS),
        "preferences": any(ARMS[name].preferences for name in names),
        "knowledge": "knowledge" in names,
    }
    embeddings = texts or any(ARMS[name].titles for name in names)
    return needs | {"LLM": any(needs.values()) or (embeddings and not s.encoder)}


def asks_for(s, text):
    """Does an arm take this text (see recommender.Arm)?"""
    return any(text in ARMS[arm].texts for arm in s.arms.split(","))


def load_data(s):
    """The data set, large enough for what the arms need."""
    subset = D.Subset(s.ties, s.k_core, s.limit_items, s.limit_users)
    data = D.load(s.dataset, s.data_dir, s.seed, s.quick, subset)
    data.style = s.style or "pair"
    data.evidence = s.evidence if data.reviews else "histories"
    if not data.reviews and (s.evidence == "both" or asks_for(s, "reviews")):
        data.notes = [*data.notes, "no reviews: none are shown, the arm reviews is left out"]
    if needed(s)["reasons"]:
        data.check_reasons()
    return data


def llm_path(run, data):
    """Name or path of the LLM; the tiny one is trained from scratch on this data set's own texts
    and prompts, and cached by what it depends on."""
    s = run.settings
    if s.llm != "tiny":
        return s.llm
    path = run.load("tiny_llm")
    if path and rl.is_whole(path):
        return path
    lessons = tiny_lessons(s, data)
    # 9: raise it when the training changes
    digest = hashlib.sha256(json.dumps([lessons, s.seed, 9]).encode()).hexdigest()[:12]
    path = os.path.abspath(f"cache/tiny-{data.name}-{digest}")
    if not rl.is_whole(path):
        texts = [D.item_text(item) for item in data.items[1:]]
        config = rl.TinyConfig(lowercase=s.dataset != "demo", device=s.device)
        rl.train_tiny(path, texts, lessons, D.TAGS, config, s.seed, run.checkpoint())
    return run.save(path)


def tiny_lessons(s, data):
    """What the tiny LLM is trained on, one after the other: (name, (prompt, answer) pairs, steps).
    For LANE its answers are among all prompts: a model from scratch must learn their form."""
    steps = s.tiny_steps or min(max(1000, data.n_items), 4000)
    rng = np.random.default_rng([s.seed, 41])
    # no more samples than the steps can see
    short = D.alignment_samples(data, min(10_000, 10 * steps), rng, D.Mixture(1.0, people=1))
    every = D.alignment_samples(data, min(20_000, 20 * steps), rng, D.Mixture(1.0))
    if needed(s)["preferences"]:
        every += D.lane_samples(data, min(3000, 3 * steps), rng)
    lessons = [("short prompts", short, 0.4), ("all prompts", every, 0.6)]
    if s.dataset != "demo":
        # the words of a real catalogue first
        words = map(" ".join, data.phrases[1:])
        spelling = list(zip(first_prompts(data), words, strict=True))
        lessons = [("spelling", spelling, 0.25), ("short prompts", short, 0.3)]
        lessons.append(("all prompts", every, 0.45))
    return [(name, samples, round(share * steps)) for name, samples, share in lessons]


def first_prompts(data, shown=None):
    """A prompt an item that has no reason yet. shown: the people of each item, else nobody."""
    shown = shown or [()] * (data.n_items + 1)
    return [D.reason_prompt(data, i, "", shown[i]) for i in range(1, data.n_items + 1)]


def open_llm(s, path):
    """((model, tokenizer), encode): the LLM in 4 bits with a new adapter; its text embeddings."""
    dtype = getattr(torch, s.dtype) if s.dtype else None
    # of a pretrained LLM a pass without it takes gigabytes more, and no less time
    checkpointing = s.device != "cpu" or s.llm != "tiny"
    llm = rl.load(path, s.device, checkpointing=checkpointing, compute=dtype, seed=s.seed)
    encode = functools.partial(rl.encode, *llm, budget=sampling(s).budget)
    # a tiny LLM knows words, and little of sentences
    return llm, reward.word_means(encode) if s.llm == "tiny" else encode


def check_context(s, data, llm):
    """Refuses an LLM whose context is too short for the longest prompts."""
    prompts = []
    # the reason so far may be as long as an answer
    longest = "x " * s.max_new
    for i in range(1, data.n_items + 1):
        prompts.append(D.reason_prompt(data, i, longest, data.events_by_item[i]))
    if needed(s)["preferences"] or needed(s)["knowledge"]:
        prompts += [D.history_question(data, seq, "prefer") for seq in data.train]
    rl.check_context(*llm, sorted(prompts, key=len)[-20:], max(64, s.max_new))


def check_cache():
    """Refuses a working directory that could not take the tiny LLM."""
    with contextlib.suppress(OSError):
        os.makedirs("cache", exist_ok=True)
    if not os.path.isdir("cache") or not os.access("cache", os.W_OK):
        raise DataError("cache/ cannot be written: start it in a folder that you may write to")


def sampling(s) -> rl.Sampling:
    """How reasons are sampled."""
    budget = s.micro_batch * (2048 if s.llm == "tiny" else 8192)
    return rl.Sampling(s.max_new, s.temperature, budget, s.seed)


def ask(llm, adapter, prompts, how: rl.Sampling, name):
    """The texts that an adapter answers."""
    rl.use(llm[0], adapter)
    return rl.generate(*llm, prompts, how, name)[0]


def own_sentences(run, data, llm):
    """What the base LLM writes of each item (see Dataset.sentences), to be aligned on: it keeps its
    language and learns the form (rejection sampling, as in STaR, arXiv 2203.14465). Sentences with
    most grounded phrases, less ungrounded ones, stand first. Users held out from the reward model
    are not shown: it learns from these sentences."""
    s = run.settings
    kept = run.load("sentences", "align")
    if kept is None:
        rng = np.random.default_rng([s.seed, 103])
        held_users, _ = reward.held_out(data, s.seed)
        shown = []
        for events in data.events_by_item:
            events = rng.permutation(events[~held_users[data.events["user"][events]]])
            # some with fewer users, or nobody
            shown.append(events[: rng.integers(D.PEOPLE + 1)].tolist())
        asked = np.repeat(np.arange(1, data.n_items + 1), OWN_ANSWERS)
        prompts = [D.reason_prompt(data, i, "", shown[i]) for i in asked]
        how = replace(sampling(s), start=D.ASKED_START, max_new=OWN_TOKENS)
        with llm[0].disable_adapter():
            texts, _ = rl.generate(*llm, prompts, how, "the LLM's own sentences")
        found = [{} for _ in shown]
        for i, text in zip(asked, texts, strict=True):
            sound = D.own_sentence(data, i, text, shown[i])
            if sound:
                share, reason = sound
                phrases = len(D.sentence_phrases(reason))
                # by their share alone, the shortest would be the best
                found[i][reason] = share * phrases - (1 - share) * phrases
        best_first = [sorted(mine, key=lambda reason: -mine[reason]) for mine in found]
        kept = run.save(list(zip(shown, best_first, strict=True)))
    written = sum(bool(sentences) for _, sentences in kept)
    run.metrics["own_sentences"] = {"items_with": written, "items": data.n_items}
    return kept


def train_adapter(run, data, llm, name, steps, mix):
    """Supervised training of an adapter on alignment samples, kept in the run folder."""
    s = run.settings
    # the adapter `knowledge` is to know titles by heart
    lr = 2e-4 if s.llm != "tiny" else 1e-3 if name == "align" else 3e-3
    if run.load(name) is None:
        rl.use(llm[0], name, trainable=True)
        samples = D.alignment_samples(data, 32 * steps, np.random.default_rng([s.seed, 59]), mix)
        config = rl.SupervisedConfig(steps, 32, s.micro_batch, lr, s.seed)
        loss = rl.supervise(*llm, samples, config, name, run.checkpoint())
        rl.save_adapter(llm[0], s.out, name)
        run.save(loss)
    rl.restore_adapter(llm[0], s.out, name)


def fit_reward_model(run, data, encode):
    """The reward model, trained, with the states of all train events; its weights before training
    and after each round."""
    judge = reward.Judge(data, encode, run.settings.seed)
    fit = run.load("reward")
    if fit is None:
        rounds, weights = judge.fit()
        fit = run.save({"rounds": rounds, "weights": weights})
    judge.load_weights(fit["weights"][-1])
    run.metrics["reward"] = fit["rounds"][-1]
    return judge, fit["weights"]


class Question(NamedTuple):
    """A prompt about an item, and the event numbers of those who judge its answers."""

    item: int
    prompt: str
    shown: np.ndarray
    audience: np.ndarray


def practice_questions(data, cuts, seed):
    """PPO's questions, two an item, as in one-shot reasons (all train choosers, no reason yet) and
    as in correction (choosers of one window, a random reason). Returns two lists, to train on and
    of a tenth of the items, held out. Without people shown nothing judges answers: left out."""
    rng = np.random.default_rng([seed, 47])
    # others than those whose reasons are compared later
    shown, audience = one_shot_people(data, seed + 1)
    questions = []
    for i, events in enumerate(data.events_by_item[1:], 1):
        w = rng.integers(len(cuts) - 1)
        times = data.events["time"][events]
        in_window = events[(times >= cuts[w]) & (times < cuts[w + 1])]
        few, others = split_people(in_window, rng)
        current = D.random_reason(data, i, rng)
        for reason, some, rest in (("", shown[i], audience[i]), (current, few, others)):
            if len(some):
                prompt = D.reason_prompt(data, i, reason, some)
                questions.append(Question(i, prompt, some, rest))
    held_items = rng.permutation(data.n_items)[: max(1, data.n_items // 10)] + 1
    rng.shuffle(questions)
    train = [q for q in questions if q.item not in held_items]
    return train, [q for q in questions if q.item in held_items]


def ppo_questions(s, data, cuts):
    """(The number of PPO updates, the questions they draw from, the held-out ones)."""
    train, held_out = practice_questions(data, cuts, s.seed)
    usual = 60 if s.llm == "tiny" else 20
    # of a question that is asked more than 13 times the good answers are learnt by heart
    updates = s.ppo_updates or min(usual, 1 + 13 * len(train) // s.ppo_batch)
    train = train[: updates * s.ppo_batch]  # more is never drawn
    held_out = held_out or train
    # few are asked several times: with an answer each, noise hides what PPO changed
    times = max(1, HELD_OUT_ANSWERS // max(1, len(held_out)))
    return updates, train, held_out * times


def reinforce(run, data, llm, judge, cuts):
    """PPO on the adapter `policy`. The score of an answer is its reward less the mean
    reward of two answers of `align` to the same prompt; with --baseline group the reward alone."""
    s = run.settings
    updates, train, held_out = ppo_questions(s, data, cuts)
    rl.add_policy(llm[0])

    def rewards_of(questions, texts) -> reward.Rewards:
        items, _, shown, audience = zip(*questions, strict=True)
        return reward.rewards(judge, items, texts, shown, audience, reward.TRAIN_TIME)

    def sampled_rewards(stage, adapter, questions, name):
        # a stage of its own
        kept = run.load(stage, "ppo")
        if kept is None:
            texts = ask(llm, adapter, [q.prompt for q in questions], sampling(s), name)
            kept = run.save(torch.from_numpy(rewards_of(questions, texts).total))
        return kept

    before = sampled_rewards("before", "align", held_out, "held-out prompts before PPO")
    reference = torch.zeros(len(train))
    if s.baseline == "critic":
        twice = [q for q in train for _ in range(2)]
        two = sampled_rewards("reference", "align", twice, "reference: two answers a prompt")
        reference = two.view(-1, 2).mean(1)

    def centred_reward(texts, rows):
        found = rewards_of([train[k] for k in rows], texts)
        logged = {"grounded": float(found.grounded.mean())}
        logged |= {"format_ok": float(found.format_ok.mean()), "distinct": len(set(texts))}
        return torch.from_numpy(found.total) - reference[rows], logged

    log = run.load("ppo", "ppo")
    if log is None:
        third = -(-s.ppo_batch // 3)
        sizes = {"batch": s.ppo_batch, "minibatch": third, "micro_batch": s.micro_batch}
        how = {"lr": s.ppo_lr, "sampling": sampling(s), "seed": s.seed, "log": f"{s.out}/ppo.jsonl"}
        if s.baseline == "group":
            how |= {"group": GROUP, "lam": 1.0, "value_coef": 0.0}
        config = rl.PPOConfig(updates, **sizes, **how)
        prompts = [q.prompt for q in train]
        log = rl.ppo(*llm, prompts, centred_reward, config, run.checkpoint())
        rl.save_adapter(llm[0], s.out, "policy")
        run.save(log)
    rl.restore_adapter(llm[0], s.out, "policy")
    after = sampled_rewards("after", "policy", held_out, "held-out prompts after PPO")
    change = {"reward_before": before.mean().item(), "reward_after": after.mean().item()}
    run.metrics["ppo"] = change | {"kl": log[-1]["kl"], "updates": len(log)}


# -------------------------------------------- algorithm, 5 to 8: chronological correction
class Window(NamedTuple):
    """The items that step in a window, and by whom: arrays of event numbers an item."""

    number: int
    period: tuple  # [start, end)
    items: list
    shown: list  # in the prompt
    audience: list  # who judges


def window_cuts(data, windows):
    """Absolute timestamps c_0 < .. < c_W: window w is [c_w, c_w+1). Quantiles of train events;
    equal times stay together."""
    times = data.events["time"]
    starts = np.quantile(times, np.arange(windows) / windows, method="lower").astype(times.dtype)
    return sorted({*starts.tolist(), (times.max() + 1).item()})


def one_shot_people(data, seed):
    """For every item a seeded sample of all its train choosers: shown and audience."""
    rng = np.random.default_rng([seed, 43])
    mixed = [rng.permutation(events) for events in data.events_by_item]
    shown = [events[: D.PEOPLE] for events in mixed]
    return shown, [events[D.PEOPLE :][: reward.MAX_AUDIENCE] for events in mixed]


def split_people(events, rng):
    """A third of the choosers is shown, the others are the audience; of both as many as their
    limits allow."""
    mixed = rng.permutation(events)
    third = max(1, round(len(events) / 3))
    return mixed[:third][: D.PEOPLE], mixed[third:][: reward.MAX_AUDIENCE]


def correction_windows(data, cuts, seed):
    """Yields a Window after another. An item with fewer than 4 new choosers waits: they join its
    next window, and are judged beside its states. Nobody who came after its end is in a window."""
    # an item's choosers from then on are new
    since = [cuts[0]] * (data.n_items + 1)
    for number, (start, end) in enumerate(pairwise(cuts), 1):
        rng = np.random.default_rng([seed, 53, number - 1])
        steps = []
        for i, events in enumerate(data.events_by_item):
            times = data.events["time"][events]
            new = events[(times >= since[i]) & (times < end)]
            if len(new) >= 4:
                steps.append((i, *split_people(new, rng)))
                since[i] = end
        if steps:
            yield Window(number, (start, end), *map(list, zip(*steps, strict=True)))


def propose(s, llm, prompts, seed, name):
    """An answer a prompt, at temperature 1, for the audience to choose from; every third prompt's
    by `align`, whose guesses PPO has not narrowed down."""
    hot = replace(sampling(s), temperature=1.0, seed=seed)
    by_align = ask(llm, "align", prompts[::3], hot, f"{name}, by align")
    others = [prompt for k, prompt in enumerate(prompts) if k % 3]
    answers = ask(llm, "policy", others, hot, f"{name}, by policy")
    for k, text in enumerate(by_align):
        answers.insert(3 * k, text)
    return answers


def accept(judge, window: Window, current, proposals, margin):
    """Judges K proposals for each item of a window, item by item: (answers from now on, an entry of
    the timeline each, a row of metrics.json)."""
    people = (window.shown, window.audience, window.period)
    new = reward.rewards(judge, window.items, proposals, *people)
    old = reward.rewards(judge, window.items, current, *people)
    rng = np.random.default_rng([judge.seed, 37, len(window.items)])
    answers = []
    entries = []
    lucky = 0
    for k, item in enumerate(window.items):
        shown = window.shown[k]
        judges = len(window.audience[k])
        best, accepted = choose(new, old, k, np.ones(judges), margin)
        answers.append(proposals[best] if accepted else current[k])
        # what passes by luck: each user may as well have liked the current answer more by as much
        lucky += choose(new, old, k, rng.choice([-1.0, 1.0], judges), margin)[1]
        entry = {
            "window_end": window.period[1],
            "people": [judge.data.users[u] for u in judge.data.events["user"][shown]],
            "judges": judges,
            "shared": D.shared_phrases(judge.data, item, shown)[:3],
            "proposal": D.parse_answer(proposals[best])[0],
            "reward_before": float(old.audience_values(k).mean()),
            "reward_after": float(new.by_audience[best].mean()),
            "accepted": accepted,
        }
        entries.append(entry)
    return answers, entries, window_row(entries, len(proposals), lucky)


def choose(new: reward.Rewards, old: reward.Rewards, k, signs, margin):
    """(Number of the proposal of highest reward for the k-th item, is it accepted?). It must be
    well-formed, penalised no more for what is not said, and convince the audience. signs: -1 flips
    a user's gain."""
    K = len(new.total) // len(old.total)
    mine = range(k * K, (k + 1) * K)
    gains = {j: new.by_audience[j] - old.audience_values(k) for j in mine}
    # a flipped gain moves the mean, and so the reward, by (sign - 1) gain
    moves = [new.audience_weight[j] * ((signs - 1) * gains[j]).mean() for j in mine]
    best = mine[np.argmax(new.total[mine] + moves)]
    sound = new.format_ok[best] and new.ungrounded[best] <= old.ungrounded[k]
    return best, bool(sound and is_convincing(signs * gains[best], margin))


def is_convincing(gains, margin):
    """Does the mean of the paired gains exceed zero by more than margin standard errors?"""
    if len(gains) < 2:
        return False
    error = gains.std(ddof=1) / len(gains) ** 0.5
    return gains.mean() > margin * error + MIN_GAIN


def window_row(entries, proposed, false_accepts):
    """A window in metrics.json."""
    gains = [e["reward_after"] - e["reward_before"] for e in entries if e["accepted"]]
    return {
        "items": len(entries),
        "proposed": proposed,
        "accepted": len(gains),
        "rejected": len(entries) - len(gains),
        "mean_gain": float(np.mean(gains or [0.0])),
        "false_accept_rate": false_accepts / len(entries),
        "reward_before": float(np.mean([e["reward_before"] for e in entries])),
        "reward_after": float(np.mean([standing(e) for e in entries])),
    }


def standing(entry):
    """The reward, by its audience, of the reason that an entry of the timeline leaves."""
    return entry["reward_after" if entry["accepted"] else "reward_before"]


def correct(run, data, llm, judge, windows):
    """Corrects every item's reason at the end of each window; nothing after it is in a prompt or a
    judgement: (answers at first, at last, index 0 empty; timelines; rows of metrics.json)."""
    s = run.settings
    state = run.load("curec", "correct") or run.checkpoint().state
    if state is None:
        name = "first reasons, from the text alone"
        first = ask(llm, "policy", first_prompts(data), sampling(s), name)
        state = {"first": ["", *first], "windows": []}
        run.checkpoint().save(state)
    answers = list(state["first"])
    timelines = [[] for _ in answers]
    for n, window in enumerate(windows):
        if n == len(state["windows"]):
            prompts = []
            for i, shown in zip(window.items, window.shown, strict=True):
                reason = D.parse_answer(answers[i])[0]
                prompts += [D.reason_prompt(data, i, reason, shown)] * s.proposals
            name = f"correction, window {window.number} of {s.windows}"
            proposals = propose(s, llm, prompts, s.seed + window.number, name)
            current = [answers[i] for i in window.items]
            chosen, entries, row = accept(judge, window, current, proposals, s.margin)
            state["windows"].append((chosen, entries, {"window": window.number} | row))
            run.checkpoint().save(state)
        chosen, entries, _ = state["windows"][n]
        for i, answer, entry in zip(window.items, chosen, entries, strict=True):
            answers[i] = answer
            timelines[i].append(entry)
    if not run.has("curec"):
        run.save(state)
    return state["first"], answers, timelines, [row for _, _, row in state["windows"]]


def best_of(run, data, llm, judge, windows, first):
    """The control for correction: the first reason and as many proposals as correction made, to the
    same users shown, but with no reason so far, and judged by all their audiences at once."""
    s = run.settings
    kept = run.load("bestof", "correct")
    if kept:
        return kept
    shown = [np.zeros(0, int)] * (data.n_items + 1)
    audience = list(shown)
    asked = []
    for window in windows:
        for i, some, others in zip(window.items, window.shown, window.audience, strict=True):
            shown[i] = np.append(shown[i], some)
            audience[i] = np.append(audience[i], others)
            asked += [(i, D.reason_prompt(data, i, "", some))] * s.proposals
    asked.sort(key=lambda pair: pair[0])
    prompts = [prompt for _, prompt in asked]
    proposals = propose(s, llm, prompts, s.seed + 91, "best of one-shot proposals")
    candidates = [*first[1:], *proposals]
    # the item of each candidate
    items = np.array([*range(1, data.n_items + 1), *(i for i, _ in asked)])
    people = [shown[i] for i in items], [audience[i] for i in items]
    total = reward.rewards(judge, items, candidates, *people, reward.TRAIN_TIME).total
    best = [""]
    for i in range(1, data.n_items + 1):
        mine = np.flatnonzero(items == i)
        best.append(candidates[mine[np.argmax(total[mine])]])
    return run.save(best)


def write_reasons(run, data, llm, judge, cuts):
    """All kinds of reasons, {kind: decoded answers, index 0 empty}, and the lines of reasons.jsonl,
    which it writes."""
    s = run.settings
    reasons = {}
    lines = []
    shown, _ = one_shot_people(data, s.seed)
    for kind, adapter in (("aligned", "align"), ("rl", "policy")):
        reasons[kind] = run.load(kind, "correct")
        if reasons[kind] is None:
            texts = ask(llm, adapter, first_prompts(data, shown), sampling(s), f"reasons: {kind}")
            reasons[kind] = run.save(["", *texts])
    windows = list(correction_windows(data, cuts, s.seed))
    first, reasons["curec"], timelines, rows = correct(run, data, llm, judge, windows)
    # half of the correction's cost: only where its arm is asked for
    if asks_for(s, "bestof"):
        reasons["bestof"] = best_of(run, data, llm, judge, windows, first)
    run.metrics["correction"] = rows
    for i, item in enumerate(data.items[1:], 1):
        # a reason of an item that says nothing is made up
        if len(data.phrases[i]) < 2:
            timelines[i] = []
            for answers in reasons.values():
                answers[i] = ""
        said = {kind: D.parse_answer(answers[i])[0] for kind, answers in reasons.items()}
        line = {
            "item": item["id"],
            "title": item["title"] or item["id"],
            "aligned": said["aligned"],
            "rl": said["rl"],
            "timeline": timelines[i],
            "reason": said["curec"],
        }
        lines.append(line)
    texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    rl.write_atomically(f"{s.out}/reasons.jsonl", "".join(texts))
    return reasons, lines


def reason_figures(data, llm, judge, reasons):
    """Shares of each kind of reasons that are grounded, well-formed and different, of different
    phrases and (sentences) of foreign names; mean reward and length. Rewards by the one-shot
    people, of items that have them."""
    shown, audience = one_shot_people(data, judge.seed)
    items = [i for i in range(1, data.n_items + 1) if len(shown[i])]
    people, others = [shown[i] for i in items], [audience[i] for i in items]
    out = {}
    for kind, answers in reasons.items():
        texts = [answers[i] for i in items]
        found = reward.rewards(judge, items, texts, people, others, reward.TRAIN_TIME)
        said = [D.parse_answer(answer)[0] for answer in answers[1:]]
        phrases = [phrase for reason in said for phrase in D.sentence_phrases(reason)]
        out[kind] = {
            "grounded": float(found.grounded.mean()),
            "format_ok": float(found.format_ok.mean()),
            "mean_reward": float(found.total.mean()),
            "distinct": len(set(said)) / data.n_items,
            "distinct_phrases": len(set(phrases)) / max(1, len(phrases)),
            "mean_tokens": float(np.mean([len(ids) for ids in llm[1](answers[1:])["input_ids"]])),
        }
        if data.style == "sentence":
            out[kind]["foreign_names"] = float((found.ungrounded * found.format_ok).mean())
    return out


def add_confirmed(metrics, data, reasons, seed):
    """Of sources with reviews: how much of each kind of reasons the reviews of held-out choices
    say, beside three controls, with paired intervals over these reviews. Feeds nothing."""
    named = {}
    for kind, answers in reasons.items():
        named[kind] = [D.sentence_phrases(D.parse_answer(answer)[0]) for answer in answers]
    controls = reward.confirmed_controls(data, named["curec"], seed)
    shares = {name: reward.confirmed(data, said) for name, said in (named | controls).items()}
    if not len(shares["curec"]):
        return
    metrics["confirmed"] = {"reviews": len(shares["curec"])}
    for kind in named:
        metrics["reasons"][kind]["confirmed"] = float(shares[kind].mean())
    for name in controls:
        metrics["confirmed"][name] = float(shares[name].mean())
    pairs = [("rl", "aligned"), ("curec", "rl")]
    pairs += [("curec", name) for name in ("bestof", *controls) if name in shares]
    for a, b in pairs:
        row = {"a": a, "b": b, "metric": "confirmed", "seeds": 1}
        row |= recommender.paired_bootstrap(shares[a][None], shares[b][None])
        metrics["comparisons"].append(row)


# --------------------------------------------------------- algorithm, 9 and 10: the arms
def arm_inputs(s, data, encode, reasons, preferences):
    """What the SASRec of each arm gets: {arm: recommender.Inputs}, as its row of ARMS says. The
    features of a text: its embeddings, whitened. preferences: LANE's (see ask_preferences)."""
    inputs = {}
    vectors = {}
    for arm in s.arms.split(","):
        row = ARMS[arm]
        if "reviews" in row.texts and not data.reviews:
            continue
        parts = []
        for kind in row.texts:
            if kind not in vectors:
                vectors[kind] = encode(item_texts(s, data, reasons, kind))
            # many dimensions of a text are an ID in disguise
            whiten = reward.whitening(vectors[kind], 384 if row.ids else 32)
            parts.append(F.pad(whiten(vectors[kind]), (0, 0, 1, 0)))
        own = torch.cat(parts, 1) if parts else None
        titles = title_inputs(s, data, encode, row, preferences) if row.titles else (None, None)
        inputs[arm] = recommender.Inputs(own, *titles, row.ids)
    return inputs


def item_texts(s, data, reasons, kind):
    """A text an item of one kind (see recommender.Arm); of reasons, without what tells the item."""
    if kind == "item":
        return [D.item_text(item) for item in data.items[1:]]
    if kind == "reviews":
        shown, _ = one_shot_people(data, s.seed)
        return [D.reviews_shown(data, events) for events in shown[1:]]
    if kind == "truth":
        texts = [" ".join(drivers) for drivers in data.truth["late"][1:]]
    else:
        answers = reasons["curec" if kind == "shuffled" else kind]
        texts = [D.parse_answer(answer)[0] for answer in answers[1:]]
    texts = [D.mask_identity(data, text) for text in texts]
    if kind == "shuffled":
        np.random.default_rng([s.seed, 61]).shuffle(texts)
    return texts


def train_and_test_arms(run, data, inputs, rank_score):
    """Trains every arm with every seed and fills the metrics arms, comparisons and headroom.
    rank_score: of the arm `knowledge`, which is no SASRec."""
    s = run.settings
    config = recommender.TrainConfig(epochs=s.epochs, device=s.device)
    fits = {}
    jobs = []
    for arm in inputs:
        for seed in range(s.seed, s.seed + (1 if ARMS[arm].one_seed else s.seeds)):
            job = (arm, data, inputs[arm], config, seed)
            if arm != "knowledge" and not run.has(f"arm-{arm}.{seed}"):
                jobs.append(job)
                continue
            fit = run.load(f"arm-{arm}.{seed}", "downstream")
            # it is no SASRec, and was trained already
            fits[arm, seed] = fit or run.save(recommender.fit_arm(*job, rank_score))
    start = time.perf_counter()
    # closed, it ends what is still at work: the first error is not kept waiting
    with contextlib.closing(recommender.fit_all(jobs, s.device, len(inputs) * s.seeds)) as finished:
        for (arm, *_, seed), fit in finished:
            run.load(f"arm-{arm}.{seed}", "downstream")
            # it took what has passed since the fit before
            run.start = start
            fits[arm, seed] = run.save(fit())
            start = time.perf_counter()
    ranks = {}
    entries = run.metrics["arms"]
    slices = recommender.user_slices(data)
    for arm in inputs:
        mine = [fits[key] for key in sorted(fits) if key[0] == arm]
        ranks[arm] = np.stack([fit["ranks"] for fit in mine])
        entries[arm] = recommender.arm_entry(mine, slices)
    if rank_score:
        entries["knowledge"]["train_s"] += run.times["knowledge"]
    run.metrics["comparisons"] = recommender.compare(ranks)
    run.metrics |= recommender.headroom(entries)


def add_truth(metrics, data, judge, weights, reasons):
    """Demo only: how true the reasons are, beside those that counting writes, and how well the
    judge knows it. Read after everything else; feeds nothing."""
    truth = data.truth
    named = {}
    for kind, answers in reasons.items():
        named[kind] = []
        for own, answer in zip(data.phrases, answers, strict=True):
            phrases = D.parse_answer(answer, data.style)[1]
            if data.style == "sentence":
                # of all its words the aspects
                phrases = [w for w in own if D.stem(w) in phrases]
            named[kind].append(phrases)
        metrics["reasons"][kind] |= reward.truth_figures(named[kind], truth)
    shown, _ = one_shot_people(data, judge.seed)
    counted = reward.counted_reasons(data, shown).items()
    metrics["counted_reasons"] = {name: reward.truth_figures(said, truth) for name, said in counted}
    if "bestof" in named:
        kinds = ("curec", "bestof")
        new = [np.array([reward.names_new_driver(named[kind], truth)]) for kind in kinds]
        row = {"a": "curec", "b": "bestof", "metric": "new_driver", "seeds": 1}
        metrics["comparisons"].append(row | recommender.paired_bootstrap(*new))
    metrics["reward"] |= reward.judge_figures(judge, truth, weights)


# ------------------------------------------------------------------------------- the run folder
class Run:
    """The run folder: what each finished stage gave, state/STAGE.pt, and how long it took. Stages
    are never nested: `load` starts one (unless it is finished), the next `save` finishes it."""

    def __init__(self, settings):
        self.settings = settings
        self.folder = Path(settings.out)
        self.stage = "load"
        self.start = time.perf_counter()
        self.times = {}
        self.metrics = {"dataset": {}, "arms": {}}

    def open(self, data):
        """Locks the folder and refuses one that is not ours or holds another run; changes nothing
        that is there."""
        s = self.settings
        begun = read_config(self.folder)
        foreign = foreign_file(self.folder, begun)
        if foreign:
            why = "" if begun else " (there is no whole config.json of ours)"
            raise DataError(f"--out {s.out}: {foreign} there is not ours{why}; name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "a")  # noqa: SIM115 (it goes with the process)
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"--out {s.out}: another run is at work there; wait") from None
        self.resumed = begun and s.resume
        other = changed(begun, s, data) if self.resumed else ""
        if other:
            advice = "give the same again, or --overwrite, or another --out"
            raise DataError(f"--resume: {s.out} was made with {other}; {advice}")
        if begun and not (s.resume or s.overwrite):
            raise DataError(
                f"{s.out} holds a run: --resume goes on with it, --overwrite replaces it, "
                "--out names another folder"
            )
        if s.resume and not begun:
            print(f"--resume: nothing to go on with in {s.out}; starting")

    def begin(self, data, cuts):
        """Clears an older run out of the folder, or what is damaged of the run to resume, which is
        then made again; writes config.json."""
        s = self.settings
        self.times["load"] = time.perf_counter() - self.start
        config = description(s, cuts) | {"data": fingerprint(data)}
        for part in [*self.folder.glob("*.part"), *self.folder.glob("state/*.part")]:
            if PART.fullmatch(part.name):
                part.unlink()
        if self.resumed:
            for path in self.folder.glob("state/*.*"):
                adapter = ADAPTERS.get(path.name.removesuffix(".pt"))
                if adapter and not rl.is_whole(self.folder / adapter, rl.ADAPTER_FILES):
                    print(f"{self.folder / adapter} is damaged: this stage starts again")
                    path.unlink()
                elif rl.read_state(path) is None:
                    path.unlink()
        else:
            for folder in CLEARED:
                shutil.rmtree(self.folder / folder, ignore_errors=True)
            for file in OUTPUTS:
                (self.folder / file).unlink(missing_ok=True)
        rl.write_atomically(self.folder / "config.json", json.dumps(config, indent=1))
        sizes = {"users": len(data.users), "items": data.n_items}
        sizes["interactions"] = sum(map(len, data.seqs))
        self.metrics["dataset"] = {"name": data.name, **sizes, "ties": s.ties}
        print(figures(self.metrics["dataset"]), *data.notes, sep="\n  note: ")
        print(f"arms: {s.arms}")

    def has(self, stage):
        """Is the stage finished?"""
        return Path(f"{self.folder}/state/{stage}.pt").exists()

    def load(self, stage, time_as=""):
        """What a finished stage gave; None starts it. Its time counts as time_as, or its name."""
        self.stage = stage
        self.time_as = time_as or stage
        self.start = time.perf_counter()
        kept = rl.read_state(f"{self.folder}/state/{stage}.pt")
        if kept:
            return self.finish(kept)
        print(f"[{stage}]")
        return None

    def save(self, value):
        """Keeps what the stage that was started gave, and gives it back."""
        kept = {"value": value, "seconds": time.perf_counter() - self.start}
        rl.write_atomically(f"{self.folder}/state/{self.stage}.pt", kept)
        for unit in self.folder.glob(f"state/{self.stage}.unit*"):
            unit.unlink()
        return self.finish(kept)

    def finish(self, kept):
        """Counts the time of a stage, and gives back what it gave."""
        self.times[self.time_as] = self.times.get(self.time_as, 0.0) + kept["seconds"]
        return kept["value"]

    def checkpoint(self) -> rl.Checkpoint:
        """Keeps units of work of the stage that was started."""
        return rl.Checkpoint(f"{self.folder}/state/{self.stage}.unit")


def read_config(folder):
    """config.json of a run folder; {} where there is none of ours."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        config = json.loads(Path(folder, "config.json").read_text())
        if config["program"] == PROGRAM and {"settings", "data"} <= set(config):
            return config
    return {}


def foreign_file(folder, ours):
    """The first thing in a run folder that no run has written: of all in a folder that is not ours,
    else of the files in the folders that a new run would clear."""
    paths = folder.glob("*")
    if ours:
        paths = [path for name in CLEARED for path in (folder / name).rglob("*")]
        paths = [path for path in paths if path.is_symlink() or path.is_file()]
    for path in sorted(paths):
        # a killed run may leave no more than .lock and a part
        passing = path.name == ".lock" or PART.fullmatch(path.name)
        if not passing and not OURS.fullmatch(path.relative_to(folder).as_posix()):
            return path
    return None


def changed(begun, s, data):
    """What of a run to resume is not as it was, as text; "" where all is. Places may change: of
    the data its fingerprint counts, of a folder with a model its name."""
    other = {}
    for name, value in begun["settings"].items():
        now = getattr(s, name, None)
        same = value == now
        if name in ("llm", "encoder") and os.path.isabs(value) and os.path.isabs(now):
            same = Path(value).name == Path(now).name
        # another micro-batch is the same method
        if not same and name not in ("dataset", "data_dir", "out", "micro_batch"):
            other[name] = value
    if not other and begun["data"] != fingerprint(data):
        return f"other data than {s.dataset} is now"
    return figures(other)


def fingerprint(data):
    """A short digest of all that a run takes from its data."""
    told = [data.items, data.users, [data.seqs, data.times, data.ratings or []]]
    if data.reviews:
        told.append(data.reviews)
    text = json.dumps(told, default=np.ndarray.tolist)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def description(s, cuts):
    """config.json: what it takes to repeat the run."""
    commit = ""
    if shutil.which("git"):
        git = "git describe --always --dirty --abbrev=40 --exclude=*".split()
        here = Path(__file__).resolve().parent
        with contextlib.suppress(OSError):
            commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name(s.device) if s.device != "cpu" else None
    packages = "torch transformers peft bitsandbytes accelerate numpy tqdm".split()
    return {
        "program": PROGRAM,
        "settings": {name: value for name, value in asdict(s).items() if name not in NOT_KEPT},
        "windows": cuts,
        "git_commit": commit or "unknown",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "hardware": {"cpus": os.cpu_count(), "machine": platform.platform(), "gpu": gpu},
    }


# --------------------------------------------------------------------------------- the report
def markdown(rows):
    """A Markdown table of dicts with the columns of the first one; floats with four digits."""
    names = list(rows[0]) if rows else ["nothing"]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append([f"{x:.4f}" if isinstance(x, float) else str(x) for x in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(values):
    """Named numbers and texts as one line."""
    texts = []
    for name, x in values.items():
        texts.append(f"{name} {x:,.4g}" if isinstance(x, float) else f"{name} {x}")
    return ", ".join(texts)


def tables(m):
    """metrics.json in short: {heading: rows of a table}."""
    arms = []
    differences = []
    for arm, entry in m["arms"].items():
        row = {"arm": arm, "seeds": len(entry["seeds"]), "hr@10": np.mean(entry["test"]["hr@10"])}
        for name, values in {"test": entry["test"], **entry["slices"]}.items():
            row[f"ndcg@10, {name}"] = np.mean(values["ndcg@10"])
        arms.append(row | entry["audit"])
    for c in m["comparisons"]:
        low, high = c["ci95"]
        row = {"a - b": f"{c['a']} - {c['b']}", "metric": c["metric"], "delta": c["delta"]}
        differences.append(row | {"95 % interval": f"{low:+.4f} .. {high:+.4f}"})
    out = {"Arms: test, whole catalogue, slices of users, popularity audit of the top 10": arms}
    out["Differences, paired over users, or items"] = differences
    for key in m:
        if key.startswith("headroom"):
            name = key.replace("_", " ").capitalize()
            row = {"oracle - content": m[key]["ndcg@10"]} | m[key]["recovered"]
            out[f"{name}, and the share of it recovered"] = [row]
    if "reasons" in m:
        out["Reasons"] = [{"reasons": kind} | row for kind, row in m["reasons"].items()]
        out["Correction"] = m["correction"]
    if "counted_reasons" in m:
        controls = m["counted_reasons"].items()
        out["Reasons that counting writes"] = [{"control": name} | row for name, row in controls]
    return out


def charts(run):
    """The differences of the arms and the course of PPO as mermaid charts, each after a heading."""
    out = []
    rows = [row for row in run.metrics["comparisons"] if row["metric"] == "ndcg@10"]
    if rows:
        intervals = list(zip(*(row["ci95"] for row in rows), strict=True))
        out.append("## Differences of NDCG@10, by row of the table above: bars; intervals: lines")
        out.append(chart("row", "a - b", [row["delta"] for row in rows], intervals))
    if "ppo" in run.metrics:
        log = rl.read_state(run.folder / "state/ppo.pt")["value"]
        lines = [[row["reward"] for row in log], [row["kl"] for row in log]]
        out.append("## PPO: the rewards of ppo.jsonl, and the KL to `align`, which starts at 0")
        out.append(chart("update", "nats", [], lines))
    return out


def chart(x_axis, y_axis, bars, lines):
    """A mermaid chart of equally long series, which GitHub and many editors draw."""
    out = ["```mermaid", "xychart-beta", f'  x-axis "{x_axis}" 1 --> {len(lines[0])}']
    out.append(f'  y-axis "{y_axis}"')
    for kind, values in [("bar", bars), *(("line", line) for line in lines)]:
        if values:
            out.append(f"  {kind} [{', '.join(f'{x:.4f}' for x in values)}]")
    return "\n".join([*out, "```"])


def write_report(run, data, lines):
    """Writes metrics.json and report.md, and prints the tables. lines: of reasons.jsonl."""
    s = run.settings
    m = run.metrics
    m["time_s"] = run.times | {"total": sum(run.times.values())}
    # of this process: the arms' workers come on top of it
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    m["peak_memory_mb"] = {"ram": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if s.device != "cpu":
        m["peak_memory_mb"]["gpu"] = torch.cuda.max_memory_allocated(s.device) / 2**20
    rl.write_atomically(f"{s.out}/metrics.json", json.dumps(m, indent=1))
    parts = [f"# CURec on {data.name}", f"LLM: {s.llm}", *data.notes]
    for name in "dataset own_sentences ppo reward confirmed lane time_s peak_memory_mb".split():
        if name in m:
            parts.append(f"{name}: {figures(m[name])}")
    if s.quick:
        parts.append("**Quick run: these figures mean nothing.**")
    for heading, rows in tables(m).items():
        parts.append(f"## {heading}\n\n{markdown(rows)}")
    print("", *parts, f"report: {run.folder / 'report.md'}", sep="\n\n")
    parts += charts(run)
    judged = [line for line in lines if line["timeline"]]
    judged.sort(key=lambda line: -standing(line["timeline"][-1]))
    if judged:
        parts += ["## Best reasons, by their last audience", *map(timeline_text, judged[:5])]
        parts += ["## Worst reasons", *map(timeline_text, judged[-5:])]
    rl.write_atomically(f"{s.out}/report.md", "\n\n".join(parts) + "\n")


def timeline_text(line):
    """How a reason came about, of a line of reasons.jsonl: a line a window says what was proposed,
    what the audience said, who came and what they share."""
    out = [f"**{line['title']}** ({line['item']}): {line['reason']}"]
    for entry in line["timeline"]:
        day = time.strftime("%Y-%m-%d", time.gmtime(entry["window_end"]))
        verdict = "accepted" if entry["accepted"] else "rejected"
        proposal = entry["proposal"].removeprefix(D.REASON_START)
        rewards = "{reward_before:+.2f} -> {reward_after:+.2f} for {judges} others".format(**entry)
        shared = ", ".join(entry["shared"]) or "nothing"
        came = f"{', '.join(entry['people'])} came, who share {shared}"
        out.append(f"- until {day} {came}; {verdict}: {proposal} ({rewards})")
    return "\n".join(out)


# -------------------------------------------------------------- before a run, and after it
def dry_run(s):
    """--dry-run: prints downloads, memory, and what each stage learns and asks; writes nothing."""
    absent = []
    if s.dataset != "demo" and not os.path.isdir(s.dataset):
        files = D.amazon_files(s.dataset, s.data_dir)
        absent = [path for path in files if not os.path.exists(path)]
    for path in absent:
        print(f"download {files[path]} to {path}; prompts are counted when it is there")
    if s.llm != "tiny":
        dtype = getattr(torch, s.dtype) if s.dtype else rl.default_dtype(s.device)
        sizes = (512 + s.max_new, sampling(s).budget, dtype.itemsize)
        size = rl.forecast(s.llm, s.micro_batch, *sizes, answer=s.max_new)
        print(f"{s.llm}: {figures(size) or 'its size is known when its config is here'}")
    if absent:
        return
    data = load_data(s)
    print(f"{len(data.users)} users, {data.n_items} items", *data.notes, sep="\n  note: ")
    print(f"arms: {s.arms}")
    works = planned_work(s, data)
    prompts = first_prompts(data, one_shot_people(data, s.seed)[0])
    speed = speed_of(s, prompts) if works else None
    # about 1.5 tokens a word; answers end before their limit
    prompt_tokens = 1.5 * np.mean([len(prompt.split()) for prompt in prompts])
    answer_tokens = 0.6 * s.max_new
    total = 0.0
    for work in works:
        text = f"{work.stage}: {work.learnt:,} prompts learnt, at most {work.answers:,} answers"
        if speed:
            seconds = work.answers * answer_tokens / speed[0]
            seconds += work.passes * (prompt_tokens + answer_tokens) / speed[1]
            total += seconds / 3600
            text += f", {seconds / 3600:.2f} hours; fewer with {work.flag}"
        print(text)
    print(f"a prompt has about {prompt_tokens:.0f} tokens, an answer at most {s.max_new}")
    if speed:
        rates = "{:,.0f} tokens/s of generation and {:,.0f} of training".format(*speed)
        print(f"about {total:.2f} hours at {rates}; the arms' recommenders come on top")
    elif works and s.llm != "tiny":
        print("hours are known with --tokens-per-second N, or when the LLM is here")


class Work(NamedTuple):
    """What a stage of a run asks of the LLM."""

    stage: str
    learnt: int  # prompts with answers, in training
    passes: float  # of training, forward and backward, a prompt with its answer each
    answers: int  # at most
    flag: str  # makes it shorter


def planned_work(s, data):
    """The stages that ask the LLM, in their order."""
    needs = needed(s)
    n = data.n_items
    works = []
    if needs["reasons"]:
        updates, train, held_out = ppo_questions(s, data, window_cuts(data, s.windows))
        drawn = updates * s.ppo_batch
        references = 2 * len(train) if s.baseline == "critic" else 0
        asked = drawn + references + 2 * len(held_out)
        learnt = 32 * s.align_steps
        if s.style == "sentence":
            works.append(Work("own sentences", 0, 0, OWN_ANSWERS * n, "--limit-items"))
        works.append(Work("alignment", learnt, learnt, 0, "--align-steps"))
        # two epochs; old and reference log-probabilities, a third of a pass each
        works.append(Work("PPO", drawn, drawn * 8 / 3, asked, "--ppo-updates"))
        works.append(Work("one-shot reasons", 0, 0, 3 * n, "--limit-items"))
        proposals = (1 + asks_for(s, "bestof")) * s.windows * s.proposals * n
        works.append(Work("correction", 0, 0, proposals, "--proposals"))
    if needs["preferences"]:
        works.append(Work("preferences", 0, 0, 2 * len(data.users), "--limit-users"))
    if needs["knowledge"]:
        learnt = 32 * s.knowledge_steps
        asked = 2 * len(data.users)
        works.append(Work("knowledge", learnt, learnt, asked, "--knowledge-steps"))
    return works


def speed_of(s, prompts):
    """Tokens a second of generation and of training: as given (training reads twice as many as
    generation writes), or measured for some seconds where the LLM is here; else None."""
    if s.tokens_per_second:
        return s.tokens_per_second, 2 * s.tokens_per_second
    if s.llm == "tiny" or not rl.weights_are_here(s.llm):
        return None
    llm, _ = open_llm(s, s.llm)
    return rl.measure_speed(*llm, prompts[:64], s.micro_batch)


def look(flags):
    """Looks at the finished run in the folder --run: see explain and score."""
    config = read_config(flags.run)
    if not config:
        raise DataError(f"--run {flags.run}: no run of ours is there")
    # what has moved since may be given again
    places = {name: getattr(flags, name) for name in ("dataset", "data_dir", "device")}
    moved = {name: value for name, value in places.items() if value != getattr(Settings, name)}
    s = replace(Settings(**config["settings"]), out=flags.run, **moved)
    if not os.path.isdir(s.data_dir):
        s = replace(s, data_dir=flags.data_dir)
    if s.dataset != "demo" and not os.path.isdir(s.dataset):
        named = os.path.isabs(s.dataset)
        files = [s.dataset] if named else D.amazon_files(s.dataset, s.data_dir)
        if not all(map(os.path.exists, files)):
            raise DataError(f"{next(iter(files))}: has moved; give --dataset or --data-dir")
    data = load_data(s)
    if config["data"] != fingerprint(data):
        raise DataError(f"--run {s.out}: was made with other data than {s.dataset} is now")
    lines = read_reasons(s, data)
    stage = "reward" if flags.score else f"arm-curec.{s.seed}"
    kept = rl.read_state(f"{s.out}/state/{stage}.pt")
    if kept is None:
        raise DataError(f"--run {s.out}: {stage} is missing; it takes a finished run of curec")
    if flags.score:
        score(Run(s), data, kept["value"]["weights"][-1], lines, flags)
    else:
        explain(data, kept["value"], lines, flags)


def read_reasons(s, data):
    """The lines of reasons.jsonl in the order of the items."""
    try:
        lines = map(json.loads, Path(s.out, "reasons.jsonl").read_text().splitlines())
        by_item = {line["item"]: line for line in lines}
        return [by_item[item["id"]] for item in data.items[1:]]
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(
            f"{s.out}/reasons.jsonl: missing or damaged; the run's command with --resume ends the "
            "run, or writes the file again (of arms with reasons)"
        ) from None


def position(name, ids):
    """Where a name stands among ids."""
    if name not in ids:
        raise DataError(f"{name}: not in the data; some there are: {', '.join(ids[:5])}")
    return ids.index(name)


def explain(data, fit, lines, flags):
    """--explain, --history: the top items after a user's history, or one that was typed, each with
    its reason and that reason's history. fit: see recommender.fit_arm."""
    if flags.explain:
        history = data.seqs[position(flags.explain, data.users)][:-1]
    else:
        ids = [line["item"] for line in lines]
        typed = list(filter(None, map(str.strip, flags.history.split(",")))) or [flags.history]
        history = 1 + np.array([position(name, ids) for name in typed])
    print(f"{flags.explain or 'you'} chose: " + "; ".join(data.titles[i] for i in history[-10:]))
    features = fit["model"]["features"]
    model = recommender.SASRec(data.n_items, recommender.Inputs(features))
    model.load_state_dict(fit["model"])
    score = recommender.scorer(model)
    followed = recommender.followers(data, features)
    term = fit["transition_weight"], fit["likeness"]
    score = recommender.with_transitions(score, followed, *term)
    best = recommender.top_items(score, [history])[0, :5]
    # 0: nothing is left
    print("", *(timeline_text(lines[item - 1]) for item in best if item), sep="\n\n")


def score(run, data, weights, lines, flags):
    """--score: the reward of a reason written by hand, part by part, beside that of the item's
    own."""
    s = run.settings
    item = 1 + position(flags.item, [line["item"] for line in lines])
    _, encode = open_llm(s, llm_path(run, data))
    if s.encoder:
        encode = reward.load_encoder(s.encoder, s.device)
    judge = reward.Judge(data, encode, s.seed)
    judge.load_weights(weights)
    shown, audience = (people[item] for people in one_shot_people(data, s.seed))
    reasons = [flags.score, lines[item - 1]["reason"]]
    answers = [D.ANSWER.format("by hand", reason) for reason in reasons]
    found = reward.rewards(judge, [item], answers, [shown], [audience], reward.TRAIN_TIME)
    parts = "total shown audience grounded ungrounded format_ok".split()
    rows = []
    for k, reason in enumerate(reasons):
        rows.append({"reason": reason} | {part: getattr(found, part)[k].item() for part in parts})
    judges = f"judged by {len(shown)} people shown and an audience of {len(audience)}"
    print(D.item_text(data.items[item]), judges, markdown(rows), sep="\n\n")


# ------------------------------------------------------------------------------ the command line
QUICK = {"tiny_steps": 90, "align_steps": 12, "ppo_updates": 2, "ppo_batch": 32, "proposals": 2}
QUICK |= {"knowledge_steps": 12, "seeds": 1, "epochs": 3}
LOOK_FLAGS = set("run explain history score item".split())
# flags that are no setting of a run
NOT_KEPT = LOOK_FLAGS | set("resume overwrite dry_run debug tokens_per_second".split())
# the least that is allowed, 0 else
LEAST = {"k_core": -1, "temperature": 0.01, "ppo_batch": 8, "align_steps": 1, "knowledge_steps": 1}
LEAST |= {"seeds": 1, "windows": 1, "epochs": 1}
# defaults that depend on --llm; those of PPO's updates: see ppo_questions
TINY = {"style": "pair", "max_new": 24, "micro_batch": 16, "proposals": 24, "ppo_lr": 3e-3}
PRETRAINED = {"style": "sentence", "max_new": 96, "micro_batch": 4, "proposals": 4, "ppo_lr": 5e-5}


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message):
        raise DataError(f"{message} (see --help)")


def parse_args(argv=None):
    """The settings given."""
    about = __doc__.partition("\n\n")[0]
    outputs = "Outputs in the run folder: report.md (read this), metrics.json, reasons.jsonl"
    parser = Parser("curec.py", "curec.py [flags]", about, outputs, allow_abbrev=False)
    for f in fields(Settings):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": "store_true"}
        elif f.type is not str:
            kind["metavar"] = "N"
        flag = f"--{f.name.replace('_', '-')}"
        group.add_argument(flag, help=f.metadata["help"], default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    looked = sorted(given.keys() & LOOK_FLAGS)
    together = ("", "explain run", "history run", "item run score")
    if " ".join(looked) not in together or not all(given[name] for name in looked):
        raise DataError(
            "--run DIR goes with --explain USER, or --history ID,ID, or --score TEXT and --item ID"
        )
    if given.get("resume") and given.get("overwrite"):
        raise DataError("--resume and --overwrite contradict each other")
    return Settings(**(QUICK if given.get("quick") else {}) | given)


def resolve(s):
    """Fills what depends on data and machine, and refuses what contradicts itself."""
    demo = s.dataset == "demo"
    devices = ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count())), "cpu"]
    if not torch.cuda.is_available():
        devices = ["cpu"]
    device = s.device or devices[0]
    missing = "reviews" if demo else "truth"
    known = [arm for arm, row in ARMS.items() if missing not in row.texts]
    # arms of the method "demo" run there beside those of curec
    methods = {s.method, "demo"} if demo and s.method == "curec" else {s.method}
    arms = [arm for arm in known if methods & set(ARMS[arm].methods.split())]
    if s.arms:
        arms = known if s.arms == "all" else s.arms.split(",")
    if s.arms and s.method != "curec":
        raise DataError("--method and --arms both choose arms: give one of them")
    unknown = sorted(set(arms) - set(known))
    if unknown:
        raise DataError(f"--arms: unknown here: {unknown}; choose from {', '.join(known)}")
    if device not in devices:
        raise DataError(f"--device {device}: choose from {', '.join(devices)}")
    if demo and (s.limit_items or s.limit_users or s.ties != "file"):
        raise DataError("--limit-items, --limit-users and --ties are for real data")
    if s.baseline == "group" and s.ppo_batch % GROUP:
        raise DataError(f"--ppo-batch {s.ppo_batch}: with --baseline group a multiple of {GROUP}")
    for f in fields(Settings):
        value = getattr(s, f.name)
        # "not" before the comparison: nan is refused too
        if f.type in (int, float) and not LEAST.get(f.name, 0) <= value < 2**31:
            raise DataError(f"--{f.name.replace('_', '-')} {value}: too small or too large")
    llm = s.llm or ("tiny" if demo or device == "cpu" else DEFAULT_LLM)
    # a folder is found again from elsewhere
    filled = {"device": device, "llm": llm, "data_dir": os.path.abspath(s.data_dir)}
    for name, value in (("dataset", s.dataset), ("llm", llm), ("encoder", s.encoder)):
        if value not in ("demo", "tiny") and os.path.isdir(value):
            filled[name] = os.path.abspath(value)
    usual = dict(TINY if llm == "tiny" else PRETRAINED)
    style = s.style or usual["style"]
    if llm == "tiny" and style == "sentence":
        raise DataError("--style sentence needs a pretrained --llm: the tiny one writes pairs only")
    usual["evidence"] = "histories" if style == "pair" else "both"
    usual["out"] = f"runs/{Path(s.dataset).resolve().name.lower()}"
    filled |= {name: getattr(s, name) or value for name, value in usual.items()}
    return replace(s, arms=",".join(dict.fromkeys(arms)), **filled)


def stop(number, frame):
    """Ctrl-C: every file is whole at any time, so nothing needs to be put in order."""
    text = "interrupted"
    if not any(arg.startswith(("--run", "--dry-run")) for arg in sys.argv):
        kept = [arg for arg in sys.argv if arg not in ("--resume", "--overwrite")]
        text += f"; go on with: {shlex.join([sys.executable, *kept])} --resume"
    print(f"\n{text}", file=sys.stderr, flush=True)
    os._exit(128 + number)


def main(argv=None):
    """Does what the command line says. Returns 0, or 2 after an error in one line."""
    run = s = None
    if hasattr(sys.stdout, "reconfigure"):
        # a title that a terminal cannot print ends no run; progress in a log file too
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        s = parse_args(argv)
        if s.run:
            look(s)
        elif s.dry_run:
            dry_run(resolve(s))
        else:
            run = Run(resolve(s))
            whole_method(run)
        return 0
    except BrokenPipeError:
        # `| head` reads no more
        os._exit(128 + signal.SIGPIPE)
    except Exception as e:
        if s and s.debug:
            raise
        text = str(e) if isinstance(e, (DataError, OSError)) else f"{type(e).__name__}: {e}"
        if run and run.stage != "load" and not isinstance(e, DataError):
            text += f" (in stage {run.stage}; what is finished is kept: --resume goes on)"
        if "probability tensor" in text:
            text = f"the LLM's logits are not finite; --dtype float32 may help ({text})"
        # a worker process that is gone was most likely killed for its memory
        if isinstance(e, (MemoryError, BrokenProcessPool)) or "out of memory" in text:
            text += "; less memory: --micro-batch 1, a smaller --llm, --max-new or --limit-items"
        print(f"curec.py: error: {' '.join(text.split())}", file=sys.stderr)
        return 2


# ================================================================================ the two relatives
def title_inputs(s, data, encode, row, preferences):
    """ID embeddings that start as whitened embeddings of titles and, for LANE, the preferences that
    an LLM named; its placebo shuffles them among the users."""
    titles = encode(data.titles[1:])
    width = recommender.WIDTH
    whiten = reward.whitening(titles, width)
    start = whiten(titles)
    initial = TITLE_NORM * F.pad(start, (0, width - start.shape[1], 1, 0))
    if not row.preferences:
        return initial, None
    names = preferences["names"]
    told = [""]
    for k, mine in enumerate(names):
        # where a cut's answer was dropped, the earlier cut's stays
        told += mine or names[k - k % 2] or [""] * D.PREFERENCES
    # "" is number 0, the padding
    known, numbers = np.unique([name.lower() for name in told], return_inverse=True)
    named = torch.from_numpy(numbers[1:]).view(len(data.users), 2, -1)
    if row.preferences == "shuffled":
        named = named[np.random.default_rng([s.seed, 83]).permutation(len(named))]
    vectors = F.pad(whiten(encode(known[1:].tolist() or ["none"])), (0, 0, 1, 0))
    return initial, (vectors, named, preferences["since"])


def ask_preferences(run, data, llm):
    """LANE: what the untuned LLM says each user prefers, at two cuts of the train history: {"names"
    (two lists a user, [] where five answers in a row were malformed), "since" (users, 2), lengths
    of the histories it saw}."""
    s = run.settings
    kept = run.load("prefer")
    if kept is None:
        cuts = [(seq, max(1, n)) for seq in data.train for n in (len(seq) // 2, len(seq) - 1)]
        prompts = [D.history_question(data, seq[:n], "prefer") for seq, n in cuts]
        checkpoint = run.checkpoint()
        asked, names = checkpoint.state or (0, [[]] * len(prompts))
        for attempt in range(asked + 1, 6):
            todo = [k for k, named in enumerate(names) if not named]
            how = replace(sampling(s), max_new=max(64, s.max_new), seed=s.seed + attempt)
            with llm[0].disable_adapter():
                texts, _ = rl.generate(*llm, [prompts[k] for k in todo], how, "preferences")
            for k, text in zip(todo, texts, strict=True):
                names[k] = D.parse_preferences(text)
            checkpoint.save((attempt, names))
        since = torch.tensor([n for _, n in cuts]).view(-1, 2)
        kept = run.save({"names": names, "since": since})
    names = kept["names"]
    run.metrics["lane"] = {"lists_asked": len(names), "lists_dropped": names.count([])}
    return kept


def teach_knowledge(run, data, llm, tasks=("rank", "rate", "mim", "mlm", "bpr"), beams=20):
    """Recommendation knowledge: trains the adapter `knowledge` (three of four samples ask what
    comes next). Returns a score function for recommender.ranks: the titles that beam search finds,
    in their order; all others are a miss."""
    s = run.settings
    model, tokenizer = llm
    tries = rl.title_trie(tokenizer, data.titles[1:])
    torch.manual_seed(s.seed)
    # it is to know the titles by heart
    model.add_adapter("knowledge", replace(model.peft_config["align"], r=64, lora_alpha=128))
    mix = D.Mixture(
        0.0, tasks=tasks, next_share=0.75, longest=D.RELATIVES_HISTORY, ahead=D.RELATIVES_HISTORY
    )
    train_adapter(run, data, llm, "knowledge", s.knowledge_steps, mix)
    rl.use(model, "knowledge")

    def score(sequences, users):
        prompts = [D.history_question(data, seq, "next") for seq in sequences]
        found = 1 + rl.retrieve(model, tokenizer, prompts, tries, beams, sampling(s).budget)
        misses = torch.full((len(found), data.n_items + 1), recommender.MISS)
        return misses.scatter_(1, found, torch.arange(beams, 0, -1.0).expand(found.shape))

    return score


if __name__ == "__main__":
    # not in a notebook, whose kernel must outlive Ctrl-C
    if "IPython" not in sys.modules:
        signal.signal(signal.SIGINT, stop)
    sys.exit(main())
