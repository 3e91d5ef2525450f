"""The reward model: how well a reason, alone, tells who will choose the item.

    pytest tests/test_reward.py                          try it alone

    z(x)   = P enc(x)                              enc: frozen text encoder, whitened
    h(e)   = unit(mean_j z(item_j) + SASRec(z(item_1) .. z(item_t)))   chosen before event e
    s(e,r) = cos(h(e), z(r)) / tau                 tau is learnt, P starts as the identity
    A(S,r) = mean_{e in S} s(e,r) - logmeanexp_{e in N} s(e,r)     the lift of r for users S
    R(r)   = (1 - w) A(shown, r) + w A(audience, r) - 2 [malformed] - 2 u(r)

    shown:    users in the prompt that wrote the reason, each as an event (see data.py)
    audience: other users who chose the item; N: the states of 256 events of the same period
    u(r):     of a pair the share of its words that the item does not say; of a sentence 1 if it
              names what neither the item nor its people so far say (see data.grounding)

The target item is represented by its reason alone: if the score also saw its ID or its text, the
reason would tell it nothing new, and the reward would ignore the reason. The task of
training is to pick the chosen item's reason among those of all train items, a softmax. In round 1
every item gets a new random reason each epoch (some of its phrases; of sentences also what its
people wrote, or one of the LLM's own), or its reason would become an item ID. Later rounds, where
no review is read, mix
(hard EM): in four of five draws the reason that the judge of the round before chose, else a random
one, so that better reasons teach more and the item's other words still occur. That this makes no ID
is checked where the epoch is chosen: held-out users x held-out items.

Left out: an LLM as judge, preference data in pairs.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data as D
from recommender import Block, pad

FORMAT_PENALTY = 2.0  # in units of A: nats
UNGROUNDED_PENALTY = 2.0  # times u(r)
AUDIENCE_WEIGHT = 0.5  # w
STATES = 256  # |N|
MAX_AUDIENCE = 16  # most users of an audience
JUDGE_HISTORY = 20  # items of a history that the user tower reads
EMBEDDING_SIZE = 128  # of whitened embeddings
BATCH, LEARNING_RATE = 256, 2e-3
ROUNDS = 3  # of training; each learns from the reasons that the round before has chosen ...
CHOSEN_SHARE, CANDIDATES = 0.8, 16  # ... in so many draws, the best of so many
REVIEW_SHARE = 2 / 3  # of a sentence judge's random reasons: what people wrote
TRAIN_TIME = (-np.inf, np.inf)  # the period of what all train events judge
HELD_OUT = 2000  # most held-out events that choose the epoch


# ------------------------------------------------------------------------------------- embeddings
def whitening(vectors, k=384):
    """PCA whitening fitted on text embeddings (M, D): a function (m, D) -> (m, k or fewer) after
    which they have mean norm 1."""
    mean = vectors.mean(0)
    _, sigma, v = torch.linalg.svd(vectors - mean, full_matrices=False)
    size = min(k, int((sigma > 1e-3 * sigma[0]).sum()))
    # 0.2: small directions are shrunk, or their noise would be blown up
    matrix = v[:size].T / (sigma[:size] + 0.2 * sigma[0])
    matrix = matrix / ((vectors - mean) @ matrix).norm(dim=1).mean()
    return lambda x: (x - mean) @ matrix


def load_encoder(name, device="cpu", batch=64):
    """Any Hugging Face text encoder as a function: texts -> means of last states (len, D)."""
    from transformers import AutoModel, AutoTokenizer

    # nothing of a hub's that could run: no pickled weights, no code
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    # a damaged file raises whatever its parser does
    except Exception as e:
        raise OSError(f"the text encoder '{name}' could not be loaded: {e}") from e
    model = model.to(device).eval()
    longest = min(128, getattr(model.config, "max_position_embeddings", 128))
    form = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}

    @torch.no_grad()
    def encode(texts):
        out = torch.zeros(len(texts), model.config.hidden_size)
        # by length: little padding
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), batch):
            rows = order[start : start + batch]
            x = tokenizer([texts[i] for i in rows], **form).to(device)
            mask = x["attention_mask"][..., None].float()
            states = model(**x).last_hidden_state * mask
            out[rows] = (states.sum(1) / mask.sum(1)).float().cpu()
        return out

    try:
        sound = encode(["a word", "and some more words"]).isfinite().all()
    except (IndexError, RuntimeError, ValueError) as e:
        raise OSError(f"the text encoder '{name}' cannot encode a text: {e}") from e
    if not sound:
        raise OSError(f"the text encoder '{name}' has weights that are NaN or infinite")
    return encode


def word_means(encode):
    """An encoder of texts as the means of their words, each encoded once and alone: nothing is left
    of a text that could tell which item it is, but its words."""
    known = {}

    def encode_words(texts):
        means = []
        for text in texts:
            vectors = []
            # a text without words is one
            for word in D.words(text) or [text]:
                if word not in known:
                    # alone: beside others its last digits would depend on them
                    known[word] = encode([word])[0]
                vectors.append(known[word])
            means.append(torch.stack(vectors).mean(0))
        return torch.stack(means)

    return encode_words


# ------------------------------------------------------------------------------- the reward model
class RewardModel(nn.Module):
    """User tower over text embeddings and the shared projection P, all of one width."""

    def __init__(self, width, dropout=0.2):
        super().__init__()
        self.P = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.P.weight)
        heads = next(h for h in (4, 2, 1) if width % h == 0)
        self.block = Block(width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width, bias=False)
        # the tower starts as the plain mean of the history's embeddings
        nn.init.zeros_(self.out.weight)
        self.log_tau = nn.Parameter(torch.tensor(0.2).log())

    def states(self, items, vectors):
        """items (B, T), right-padded with 0; vectors (n + 1, width) -> unit states (B, width)."""
        z = F.embedding(items, self.P(vectors))
        real = (items > 0).float()[..., None]
        mean = (z * real).sum(1) / real.sum(1)
        last = self.block(z, (items > 0).sum(1) - 1)
        return F.normalize(mean + self.out(self.norm(last)), dim=-1)

    def reasons(self, vectors):
        """Whitened embeddings of reasons (M, width) -> unit vectors (M, width)."""
        return F.normalize(self.P(vectors), dim=-1)

    def scores(self, states, reasons):
        """Unit states (B, width), unit reasons (M, width) -> s (B, M), in nats."""
        return states @ reasons.T / self.log_tau.exp()


class Judge:
    """A reward model with the states of all train events. encode: texts -> raw embeddings (M, D),
    frozen. Ready after `fit`, or `load_weights` of a model fitted before."""

    def __init__(self, data, encode, seed=0):
        self.data = data
        self.seed = seed
        self.raw_encode = encode
        self.reads_reviews = data.style == "sentence" and data.evidence == "both"
        self.held_users, self.held_items = held_out(data, seed)
        texts = [D.mask_identity(data, D.item_text(item)) for item in data.items[1:]]
        raw = encode(texts)
        self.whiten = whitening(raw, EMBEDDING_SIZE)
        self.items = F.pad(self.whiten(raw), (0, 0, 1, 0))  # (n_items + 1, width)
        torch.manual_seed(seed)
        self.model = RewardModel(self.items.shape[1])

    def encode(self, reasons):
        """Whitened embeddings (M, width) of reasons without what tells the item. Equal reasons are
        encoded once: proposals often are equal, and then their embeddings are to the last bit."""
        masked = [D.mask_identity(self.data, reason) for reason in reasons]
        once, place = np.unique(masked, return_inverse=True)
        return self.whiten(self.raw_encode(once.tolist())[torch.from_numpy(place)])

    def fit(self, **how):
        """Trains in rounds, each from scratch, most of the time from the reasons that the judge of
        the round before chooses: better reasons make a better judge. The last model stays: (a dict
        of figures a round, the weights before training and after each round)."""
        # with reviews, later rounds were no better: the chosen ones may be learnt by heart
        rounds = 1 if self.reads_reviews else ROUNDS
        figures = []
        weights = [copy.deepcopy(self.model.state_dict())]
        for number in range(1, rounds + 1):
            chosen = self.choose_reasons(number - 1) if number > 1 else None
            figures.append(self.fit_round(number, chosen, **how))
            weights.append(copy.deepcopy(self.model.state_dict()))
        return figures, weights

    def draw_reasons(self, items, chosen, rng):
        """A reason for each of these items: in most draws the chosen one, where there are, else a
        random one, of two or three phrases if it names phrases."""
        reasons = []
        for i in items:
            if chosen and rng.random() < CHOSEN_SHARE:
                reasons.append(chosen[i])
            else:
                reasons.append(self.random_reason(i, rng, rng.integers(2, 4)))
        return reasons

    def random_reason(self, item, rng, size=2):
        """D.random_reason or, of sentences, mostly what some of the item's people
        wrote: a sentence of the LLM's says little of its item, and little is learnt from it."""
        data = self.data
        if self.reads_reviews and rng.random() < REVIEW_SHARE:
            # of held-out users, a review would tell what they are asked about
            people = data.events_by_item[item]
            people = rng.permutation(people[~self.held_users[data.events["user"][people]]])
            wrote = D.reviews_shown(data, people[: rng.integers(1, D.PEOPLE + 1)])
            if wrote:
                return wrote
        return D.random_reason(data, item, rng, size)

    def fit_round(self, number, chosen=None, epochs=60, patience=6, per_epoch=20_000):
        """Trains on the train events of users and items that are not held out; the best epoch on
        held-out users x items stays, the untrained model being epoch 0. chosen: a reason an item
        (index 0 empty). Returns {"auc_heldout", "auc_untrained", "epochs", "best_epoch"}; the AUCs
        of different rounds are over different reasons."""
        data = self.data
        torch.manual_seed(self.seed)
        self.model = model = RewardModel(self.items.shape[1])
        rng = np.random.default_rng([self.seed, 23, number])
        held_user = self.held_users[data.events["user"]]  # of each event
        held_item = self.held_items[data.events["item"]]
        train = np.flatnonzero(~held_user & ~held_item)
        train_items = np.flatnonzero(~self.held_items[1:]) + 1
        held = np.flatnonzero(held_user & held_item)
        tested_items = np.flatnonzero(self.held_items)
        if not len(train):
            raise D.DataError(f"{data.name}: too few events to train the reward model; take more")
        # of all of them: they are sorted by time
        held = np.random.default_rng([self.seed, 71]).permutation(held)[:HELD_OUT]
        draws = []
        # of few people nothing can be held out: then the untrained model stays
        for _ in range(4 if len(held) and len(tested_items) > 1 else 0):
            draws.append(self.encode(self.draw_reasons(tested_items, chosen, rng)))
        others = [p for p in model.parameters() if p is not model.P.weight]
        optimizer = torch.optim.AdamW(others, LEARNING_RATE, weight_decay=0.01)
        # the shared space may turn slowly only
        optimizer.add_param_group({"params": [model.P.weight], "lr": LEARNING_RATE * 0.1})
        untrained = best = self.auc(held, tested_items, draws)
        best_epoch, best_weights = 0, copy.deepcopy(model.state_dict())
        name = f"reward model, round {number}"
        bar = tqdm(range(1, epochs + 1), name, unit="epoch", disable=None)
        for epoch in bar:
            rng = np.random.default_rng([self.seed, 23, number, epoch])
            torch.manual_seed(int(rng.integers(2**31)))
            model.train()
            vectors = self.encode(self.draw_reasons(train_items, chosen, rng))
            order = rng.permutation(train)[:per_epoch]
            for events in np.split(order, range(BATCH, len(order), BATCH)):
                loss = F.cross_entropy(*self.choices(events, train_items, vectors))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            value = self.auc(held, tested_items, draws)
            bar.set_postfix_str(f"loss {loss.item():.3f}, held-out AUC {value:.3f}")
            if value > best:
                best, best_epoch, best_weights = value, epoch, copy.deepcopy(model.state_dict())
            if epoch >= best_epoch + patience:
                break
        self.load_weights(best_weights)
        measured = {"auc_heldout": best, "auc_untrained": untrained} if draws else {}
        return measured | {"epochs": epoch, "best_epoch": best_epoch}

    def choose_reasons(self, number):
        """For every item the best of CANDIDATES random reasons, by the users who chose it and are
        not held out (index 0 empty)."""
        data = self.data
        rng = np.random.default_rng([self.seed, 67, number])
        chosen = [""]
        # some items at once: the vectors of all reasons of a large catalogue take gigabytes
        for part in np.split(np.arange(1, data.n_items + 1), range(500, data.n_items, 500)):
            reasons, people = [], []
            for i in part:
                events = rng.permutation(data.events_by_item[i])
                events = events[~self.held_users[data.events["user"][events]]][:MAX_AUDIENCE]
                reasons += [self.random_reason(i, rng) for _ in range(CANDIDATES)]
                people += [events] * CANDIDATES
            liked = mean_of_each(self.lifts(reasons, people, TRAIN_TIME))
            best = liked.reshape(-1, CANDIDATES).argmax(1)
            chosen += [reasons[k * CANDIDATES + j] for k, j in enumerate(best)]
        return chosen

    def choices(self, events, items, vectors):
        """What B events give each of these items, known by a reason each (whitened embeddings):
        scores (B, items), and the column (B,) of the item that was chosen."""
        states = self.model.states(self.histories(events), self.items)
        column = np.searchsorted(items, self.data.events["item"][events])
        return self.model.scores(states, self.model.reasons(vectors)), torch.from_numpy(column)

    @torch.no_grad()
    def auc(self, events, items, draws):
        """How often the chosen item's reason scores above another's: mean over draws of a reason an
        item; chance .5, also without draws."""
        self.model.eval()
        if not draws:
            return 0.5
        values = []
        for vectors in draws:
            scores, column = self.choices(events, items, vectors)
            goal = scores.gather(1, column[:, None])
            below = (scores < goal).float() + 0.5 * (scores == goal).float()
            values.append((below.sum(1) - 0.5).mean().item() / (len(items) - 1))
        return float(np.mean(values))

    def histories(self, events):
        """What the users of these events had chosen before, (B, T), right-padded with 0."""
        return pad([self.data.history(e) for e in events], JUDGE_HISTORY)

    @torch.no_grad()
    def load_weights(self, weights, batch=1024):
        """Takes a reward model's weights and computes the state of every train event, once."""
        self.model.load_state_dict(weights)
        self.model.eval()
        n = len(self.data.events["user"])
        parts = np.split(np.arange(n), range(batch, n, batch))
        states = [self.model.states(self.histories(events), self.items) for events in parts]
        self.states = torch.cat(states)  # (E, width)

    def pool(self, period):
        """N of A(S, r): STATES event numbers of the period [start, end), drawn once by seed."""
        times = self.data.events["time"]
        inside = np.flatnonzero((times >= period[0]) & (times < period[1]))
        rng = np.random.default_rng([self.seed, 29, len(inside)])
        return torch.from_numpy(rng.permutation(inside)[:STATES])

    @torch.no_grad()
    def lifts(self, reasons, people, period):
        """s(e, r) - logmeanexp_{N} s(., r) of each event e in people (M arrays of event numbers):
        M arrays, in nats; the mean of each is A(people, r)."""
        z = self.model.reasons(self.encode(reasons))  # (M, width)
        others = self.model.scores(self.states[self.pool(period)], z)  # (N, M)
        levels = others.logsumexp(0) - np.log(len(others))
        out = []
        for events, reason, level in zip(people, z, levels, strict=True):
            scores = self.states[torch.as_tensor(events)] @ reason / self.model.log_tau.exp()
            out.append((scores - level).numpy())
        return out


def held_out(data, seed):
    """A fifth of the users (users,) and of the items (n_items + 1,), bool: never trained on."""
    rng = np.random.default_rng([seed, 73])
    users = rng.random(len(data.users)) < 0.2
    items = rng.random(data.n_items + 1) < 0.2
    items[0] = False
    return users, items


# -------------------------------------------------------------------------------------- the reward
@dataclass
class Rewards:
    """Rewards of M answers and their parts, (M,) each."""

    total: np.ndarray
    shown: np.ndarray  # A(shown, r)
    audience: np.ndarray  # A(audience, r)
    audience_weight: np.ndarray
    grounded: np.ndarray  # share of the reason's phrases that are said, see data.grounding
    ungrounded: np.ndarray  # u(r)
    format_ok: np.ndarray
    by_audience: list  # of M arrays: the lift of each user of the audience

    def audience_values(self, k):
        """What each user of the audience gives a current answer: its lift less the format
        penalty, so that a malformed one does not outlive a sound one that is liked less."""
        return self.by_audience[k] - (0.0 if self.format_ok[k] else FORMAT_PENALTY)


def rewards(judge: Judge, items, answers, shown, audience, period) -> Rewards:
    """R of decoded answers about these items: what PPO, correction, its control and all figures
    ask. answers: K an item, item by item; shown, audience: an array of event numbers an item."""
    item_of = np.repeat(np.arange(len(items)), len(answers) // len(items))
    parsed = [D.parse_answer(answer, judge.data.style) for answer in answers]
    reasons, _, format_ok = zip(*parsed, strict=True)
    format_ok = np.array(format_ok)
    by_shown = judge.lifts(reasons, [shown[k] for k in item_of], period)
    by_audience = judge.lifts(reasons, [audience[k] for k in item_of], period)
    weight = np.full(len(answers), AUDIENCE_WEIGHT)
    # where one of them is nobody, the other has all the weight
    weight[[len(values) == 0 for values in by_shown]] = 1.0
    weight[[len(values) == 0 for values in by_audience]] = 0.0
    a_shown, a_audience = mean_of_each(by_shown), mean_of_each(by_audience)
    # of an item once: it may be asked about many times
    said = {item: D.said_of(judge.data, item, period[1]) for item in set(items)}
    found = []
    for reason, k in zip(reasons, item_of, strict=True):
        found.append(D.grounding(judge.data, reason, said[items[k]]))
    grounded, ungrounded = np.array(found).T
    total = (1 - weight) * a_shown + weight * a_audience
    total = total - FORMAT_PENALTY * ~format_ok - UNGROUNDED_PENALTY * ungrounded
    parts = (a_shown, a_audience, weight, grounded, ungrounded)
    return Rewards(total, *parts, format_ok, by_audience)


def mean_of_each(arrays):
    """The mean of each array, 0 of an empty one."""
    return np.array([values.mean() if len(values) else 0.0 for values in arrays])


# ------------------------------------------ confirmed: held-out reviews, which feed nothing else
def confirmed(data, phrases):
    """For each held-out choice (valid and test) whose user wrote a review, user by user: the share
    of the item's phrases, stemmed, that the review says, 0 where it has none: (reviews,). phrases:
    a list an item, index 0 empty."""
    shares = []
    for seq, reviews in zip(data.seqs, data.reviews, strict=True):
        for item, review in zip(seq[-2:], reviews[-2:], strict=True):
            said = {D.stem(w) for w in D.words(review)}
            named = phrases[item]
            if said:
                shares.append(sum(w in said for w in named) / max(1, len(named)))
    return np.array(shares)


def confirmed_controls(data, phrases, seed):
    """What else could stand in a reason, {control: phrases an item, index 0 empty}: these phrases
    shuffled among items, the title's, and as many of the most frequent of the train reviews."""
    rng = np.random.default_rng([seed, 97])
    shuffled = [phrases[0], *(phrases[i] for i in 1 + rng.permutation(data.n_items))]
    titles = [D.sentence_phrases(title) for title in data.titles]
    said = Counter()
    for events in data.events_by_item:
        for e in events:
            said.update(set(D.sentence_phrases(data.review(e))))
    size = round(np.mean([len(named) for named in phrases[1:]]))
    frequent = [word for word, _ in said.most_common(size)]
    return {"shuffled": shuffled, "title": titles, "frequent": [frequent] * len(phrases)}


# ------------------------------------------------- truth: figures of the demo, which feed nothing
def truth_figures(named, truth):
    """Of the phrases named, the share that are drivers (chance .4); of the drivers, the share
    named; of the new drivers, too. named: phrases an item, index 0 empty; truth: see
    data.Dataset."""
    hits = sum(len(set(n) & set(t)) for n, t in zip(named, truth["late"], strict=True))
    return {
        "truth_precision": hits / max(1, sum(len(set(phrases)) for phrases in named)),
        "truth_recall": hits / sum(map(len, truth["late"])),
        "new_driver": float(np.mean(names_new_driver(named, truth))),
    }


def names_new_driver(named, truth):
    """Of each item whose driver changed: does its reason name the new one?"""
    out = []
    for phrases, early, late in zip(named, truth["early"], truth["late"], strict=True):
        new = set(late) - set(early)
        if new:
            out.append(bool(new & set(phrases)))
    return out


def counted_reasons(data, shown):
    """Controls for truth: reasons that counting writes, {control: phrases an item, index 0 empty}.
    "shared": the two phrases said most often by what users had chosen just before, the users shown
    or all train users; "most shared": one phrase, by all; "frequent": the two that most items say.
    """
    out = {"shared, shown": [], "shared, all": [], "most shared": [], "frequent": []}
    for i in range(data.n_items + 1):
        by_all = ranked_by_sharing(data, i, data.events_by_item[i])
        out["shared, shown"].append(ranked_by_sharing(data, i, shown[i])[:2])
        out["shared, all"].append(by_all[:2])
        out["most shared"].append(by_all[:1])
        frequent = sorted(data.phrases[i], key=lambda w: -data.document_frequency[w])
        out["frequent"].append(frequent[:2])
    return out


def ranked_by_sharing(data, item, events):
    """The item's phrases, first those said most often by what users had chosen just before these
    events."""
    said = Counter()
    for e in events:
        said.update(D.words(data.titles[data.history(e)[-1]]))
    return sorted(data.phrases[item], key=lambda w: -said[w])


def judge_figures(judge: Judge, truth, weights):
    """What the judge knows of the truth before its training ("_untrained"), after earlier rounds
    ("_round_1") and at last. weights: as Judge.fit returns them."""
    out = {}
    names = ["_untrained", *(f"_round_{n}" for n in range(1, len(weights) - 1)), ""]
    for name, weight in zip(names, weights, strict=True):
        judge.load_weights(weight)
        choice = driver_choice(judge, truth)
        if choice is not None:
            out["driver_choice" + name] = choice
        out["best_pairs" + name] = truth_figures(best_pairs(judge, truth), truth)["truth_precision"]
    return out


def driver_choice(judge: Judge, truth):
    """How often the audience prefers two true drivers to two decoys, of items held out from the
    judge's training, with two or more users held out too; where a driver changed, users of the
    second half. None where there are no such items."""
    data = judge.data
    people, pairs, decoys = [], [], []
    rng = np.random.default_rng([judge.seed, 31])
    second_half = data.events["time"] > truth["since"][1]
    for i in np.flatnonzero(judge.held_items):
        early, late = truth["early"][i], truth["late"][i]
        events = data.events_by_item[i]
        events = events[judge.held_users[data.events["user"][events]]]
        if set(early) != set(late):
            events = events[second_half[events]]
        if len(events) >= 2:
            people.append(events[:MAX_AUDIENCE])
            pairs.append(D.REASON.format(*late))
            others = rng.permutation([p for p in data.phrases[i] if p not in late])
            decoys.append(D.REASON.format(*others[:2]))
    if not people:
        return None
    true = mean_of_each(judge.lifts(pairs, people, TRAIN_TIME))
    false = mean_of_each(judge.lifts(decoys, people, TRAIN_TIME))
    return float(np.mean(true > false))


def best_pairs(judge: Judge, truth):
    """Of all pairs of an item's phrases the one that its users of the second half (up to 8, at
    least 4) like most: its phrases, none without these users; an item each, index 0 empty."""
    data = judge.data
    second_half = data.events["time"] > truth["since"][1]
    named = [()]
    for i in range(1, data.n_items + 1):
        events = data.events_by_item[i]
        events = events[second_half[events]][:8]
        pairs = list(combinations(data.phrases[i], 2)) if len(events) >= 4 else [()]
        reasons = [D.REASON_START + " and ".join(pair) for pair in pairs]
        liked = judge.lifts(reasons, [events] * len(pairs), (truth["since"][1], np.inf))
        named.append(pairs[mean_of_each(liked).argmax()])
    return named
