"""SASRec with item features, two counting baselines, and evaluation over the whole catalogue.

    pytest tests/test_recommender.py                                     try it alone

    v_i  = unit(E_i + W f_i)             item vector = ID embedding + projected features of text
    h_t  = unit(SASRec(x_1 .. x_t)) / tau    one query, at t; x_j = sqrt(D) v[i_j] + pos_(t-j)
    loss = -log softmax_i(h_t . v_i)         over the whole catalogue, i = the item after x_t
    score_i = h_t . v_i + w log(1 + C_i)     C: what followed the last items in train, and z times
                                             what is like them; w, z: by validation

    ids    [ 3 7 5 0 0 ]      right-padded with item 0; only the last real item asks (one query),
                 h_t          and it sees itself and what came before

Every history (x_1 .. x_t) is a training sample of its own; SASRec's usual loss over all positions
of a user at once validates worse. The table of all v is computed once, so features cost nothing
when ranking. The learning rate falls, and weights are averaged over about the last epoch:
validation and test see the average.
The transition term C is added after training, to arms with IDs: inside, without a sample's own
transition, it validated worse.

Left out: negative sampling (the full softmax is stronger and simpler at this size) and sampled
metrics (they rank models differently: Krichene & Rendle 2020). Sources: SASRec (Kang & McAuley
2018), with cross-entropy (Klenitskiy & Vasilev 2023).
"""

import copy
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.reduction import ForkingPickler
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

WIDTH, HEADS = 64, 2  # of item vectors and states; attention heads
MAX_LEN = 50  # longest history the model sees, in items
LOCAL = 4  # items that the convolution of a block looks at
FEATURE_NORM = 1.6  # initial norm of projected features; that of ID embeddings is 0.16
# the learning rate falls to 0 over the longer of both: on little data it hardly falls before
# training ends
FALL_EPOCHS, FALL_STEPS = 16, 8_000
MIN_STEPS = 250  # no early stopping before: large features can start with a dip
EVERY = 2  # epochs from one validation to the next: averaged weights change slowly
SCORES_AT_ONCE = 800_000  # scores ranked in one batch: more leave the processor's cache
MISS = -1e9  # score of an item that an arm did not consider: behind all others, in no list
START_SECONDS = 120  # that a worker process may take to import torch on a busy machine
REACH = 3  # places that the transition term looks back in a history, and ahead in train
NEIGHBOURS = 40  # items of nearest features that count like items that followed
# w and z of the transition term: validation chooses
WEIGHTS = (0.0, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
LIKENESS = (1.0, 4.0)
CUTOFFS = (5, 10, 20, 50)  # k of HR@k and NDCG@k


# ------------------------------------------------------------------------------------------ model
class Block(nn.Module):
    """A pre-norm transformer block beside a convolution (depthwise, over the last LOCAL items,
    starting at 0), at the last position alone, which is all that is used. The convolution stands in
    for BSARec's frequency filter (arXiv 2312.10325), which raises what changes from item to
    item."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.local = nn.Parameter(torch.zeros(LOCAL, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, last):
        """x (B, T, D) -> its states at the positions last (B,), which see no later ones: (B, D)."""
        B, T, D = x.shape
        rows, places = torch.arange(B, device=x.device), torch.arange(T, device=x.device)
        y = self.norm1(x)
        q = self.q(y[rows, last]).view(B, self.heads, 1, D // self.heads)
        kv = self.kv(y).view(B, T, 2, self.heads, D // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads) each
        seen = (places <= last[:, None])[:, None, None]  # (B, 1, 1, T)
        p = self.dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=p).reshape(B, D)
        recent = last[:, None] + torch.arange(1 - LOCAL, 1, device=x.device)  # (B, LOCAL)
        # zeros where a history has no such item: (B, LOCAL, D)
        near = y[rows[:, None], recent.clamp(min=0)] * (recent >= 0)[..., None]
        x = x[rows, last] + self.drop(self.out(a) + (near * self.local).sum(1))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


@dataclass(frozen=True)
class Inputs:
    """What an arm's SASRec gets beside the interactions."""

    features: torch.Tensor | None = None  # (n_items + 1, F), of mean norm 1, row 0 zeros
    initial: torch.Tensor | None = None  # (n_items + 1, width): ID embeddings before training
    preferences: tuple | None = None  # what LANE's layer knows of the users (see Alignment)
    ids: bool = True  # False: an item's vector is its features alone


class SASRec(nn.Module):
    """SASRec whose item vectors are ID embeddings plus projected item features."""

    def __init__(self, n_items, inputs=Inputs(), width=WIDTH, dropout=0.3):
        super().__init__()
        self.item = nn.Embedding(n_items + 1, width, padding_idx=0)
        self.pos = nn.Embedding(MAX_LEN, width)
        self.block = Block(width, HEADS, dropout)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.log_tau = nn.Parameter(torch.tensor(0.07).log())
        self.project = self.align = None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        if inputs.initial is not None:
            self.item.weight.data.copy_(inputs.initial)
        nn.init.zeros_(self.item.weight[0] if inputs.ids else self.item.weight)
        self.item.weight.requires_grad_(inputs.ids)
        # made last: every arm draws the same random numbers for the shared parts
        if inputs.features is not None:
            self.register_buffer("features", inputs.features)
            self.project = nn.Linear(inputs.features.shape[1], width, bias=False)
            nn.init.normal_(self.project.weight, std=FEATURE_NORM * width**-0.5)
        if inputs.preferences is not None:
            self.align = Alignment(width, *inputs.preferences)

    def table(self):
        """The unit vectors of all items, (n_items + 1, D): what input and output share."""
        content = 0.0 if self.project is None else self.drop(self.project(self.features))
        return F.normalize(self.item.weight + content, dim=-1)

    def forward(self, ids, table, known=None):
        """ids (B, T), right-padded with 0; table (n_items + 1, D) -> last states (B, D) of norm
        1 / tau, aligned with the preferences known (B, M) where the arm has them."""
        last = (ids > 0).sum(1) - 1
        ago = (last[:, None] - torch.arange(ids.shape[1], device=ids.device)).clamp(min=0)
        # not table[ids], whose gradient adds up in another order each time
        x = F.embedding(ids, table)
        x = self.drop(x * table.shape[1] ** 0.5 + self.pos(ago))
        h = self.norm(self.block(x, last))
        if self.align is not None:
            h = self.align(h, known)
        return F.normalize(h, dim=-1) / self.log_tau.exp()


def pad(sequences, max_len=MAX_LEN):
    """The last max_len items of each sequence, right-padded with 0: (B, longest)."""
    rows = [torch.as_tensor(seq[-max_len:]) for seq in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


# --------------------------------------------------------------------------------------- training
@dataclass(frozen=True)
class TrainConfig:
    """How a SASRec is trained; chosen on validation of all of Amazon Beauty and of the demo."""

    epochs: int = 60  # at most
    patience: int = 4  # epochs without a better validation NDCG@10
    batch: int = 256
    lr: float = 3e-3  # at first (see FALL_EPOCHS)
    width: int = WIDTH
    dropout: float = 0.3
    device: str = "cpu"


def next_item_loss(model, ids, targets, known=None):
    """Mean cross-entropy of the next items targets (B,) after the histories ids (B, T)."""
    table = model.table()
    # padding is never predicted
    return F.cross_entropy(model(ids, table, known) @ table[1:].T, targets - 1)


def training_samples(sequences):
    """Three columns: every history, its next item, its user."""
    samples = []
    for user, seq in enumerate(sequences):
        samples += [(seq[:t], seq[t], user) for t in range(1, len(seq))]
    return zip(*samples, strict=True)


def batches(lengths, batch, rng):
    """Random batches of histories of similar length, which need little padding: 16 random batches
    are sorted by length, cut, and shuffled."""
    order = rng.permutation(len(lengths))
    for rows in np.split(order, range(16 * batch, len(order), 16 * batch)):
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        cut = np.split(rows, range(batch, len(rows), batch))
        for k in rng.permutation(len(cut)):
            yield cut[k]


def train(data, inputs=Inputs(), config=TrainConfig(), seed=0, name="SASRec"):
    """Trains until validation NDCG@10 has not risen for `patience` epochs or the learning rate is
    0: (the model of the best epoch, {"epochs", "best_epoch", "valid_ndcg@10"}). data: n_items,
    train, valid (see Dataset)."""
    torch.manual_seed(seed)
    model = SASRec(data.n_items, inputs, config.width, dropout=config.dropout).to(config.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    histories, targets, users = training_samples(data.train)
    targets = torch.tensor(targets)
    known = model.align.known(users, histories) if model.align else None
    padded = pad(histories)
    lengths = (padded > 0).sum(1).numpy()
    # few samples: eight steps an epoch all the same
    batch = min(config.batch, -(-len(targets) // 8))
    steps = len(targets) / batch
    batches_each = math.ceil(steps)  # the last of an epoch is a part of one
    falls = max(FALL_EPOCHS * batches_each, FALL_STEPS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, falls)
    # at a rate of 0 nothing more is learnt
    epochs = min(config.epochs, math.ceil(falls / batches_each))

    def moving_average(old, new, n):
        # over about an epoch's steps; shorter at the start, or the random weights would stay in it
        return old.lerp(new, max(1 / steps, 9 / (10 + float(n))))

    average = AveragedModel(model, avg_fn=moving_average)
    best, best_epoch, best_model = -1.0, 0, None
    # bars of worker processes would run over one another
    bar = tqdm(range(1, epochs + 1), name, disable=True if parent_process() else None)
    for epoch in bar:
        rng = np.random.default_rng([seed, 89, epoch])
        torch.manual_seed(int(rng.integers(2**31)))
        model.train()
        for rows in batches(lengths, batch, rng):
            ids = padded[rows, : lengths[rows].max()].to(config.device)
            wishes = None if known is None else known[rows]
            loss = next_item_loss(model, ids, targets[rows].to(config.device), wishes)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        if epoch % EVERY and epoch < epochs:
            continue
        rank = ranks(scorer(average.module), data.train, data.valid)
        value = float(metrics(rank)["ndcg@10"].mean())
        if value > best:
            best, best_epoch, best_model = value, epoch, copy.deepcopy(average.module)
        bar.set_postfix_str(f"loss {loss.item():.3f}, valid NDCG@10 {value:.4f}, best {best:.4f}")
        if epoch >= max(best_epoch + config.patience, MIN_STEPS / steps):
            break
    return best_model, {"epochs": epoch, "best_epoch": best_epoch, "valid_ndcg@10": best}


# ------------------------------------------- scores: sequences and user numbers -> (B, n_items + 1)
def scorer(model: SASRec):
    """The scores of a model, its table of item vectors computed once."""
    table = model.eval().table().detach()

    @torch.no_grad()
    def score(sequences, users=None):
        known = model.align.known(users, sequences) if model.align else None
        return (model(pad(sequences).to(table.device), table, known) @ table.T).cpu()

    return score


def popularity(data):
    """Scores every item by its number of train interactions."""
    counts = torch.from_numpy(data.counts).float()

    def score(sequences, users=None):
        return counts.repeat(len(sequences), 1)

    return score


def markov(data):
    """First-order transition counts from the last item; popularity breaks ties, fills the rest."""
    followers = [[] for _ in data.counts]
    for seq in data.train:
        for item, after in pairwise(seq):
            followers[item].append(after)
    fill = data.counts / (data.counts.max() + 1.0)  # < 1: less than a transition

    def score(sequences, users=None):
        rows = [np.bincount(followers[s[-1]], minlength=len(fill)) for s in sequences]
        return torch.from_numpy(np.stack(rows) + fill)

    return score


# ---------------------------------------------------------------------------- the transition term
class Followers(NamedTuple):
    """What followed each item, or is like it: items and weights of all items, one after another."""

    starts: np.ndarray  # (n_items + 2,): those of item i are starts[i] to starts[i + 1]
    items: np.ndarray
    weights: np.ndarray
    alike: np.ndarray  # bool: of an item that is like it


def followers(data, features=None) -> Followers:
    """What followed each item in train; with features (n_items + 1, F) also its nearest items: what
    is alike might as well have followed."""
    pairs = transitions(data)
    n_transitions = sum(len(items) for items, _, _ in pairs)
    if features is not None:
        pairs += neighbours(features)
    before, items, weights = map(np.concatenate, zip(*pairs, strict=True))
    # places in pairs: those of transitions come first
    order = np.argsort(before, kind="stable")
    starts = np.searchsorted(before[order], np.arange(len(data.counts) + 1))
    return Followers(starts, items[order], weights[order], order >= n_transitions)


def transitions(data):
    """What came up to REACH places after an item in train, weighing 1, 1/2, 1/4: a list of (items,
    those that came after, weights), arrays (M,) each."""
    chosen = np.concatenate(data.train)
    users = np.repeat(np.arange(len(data.train)), list(map(len, data.train)))
    pairs = []
    for ahead in range(1, REACH + 1):
        same = users[:-ahead] == users[ahead:]
        weights = np.full(same.sum(), 2.0 ** (1 - ahead))
        pairs.append((chosen[:-ahead][same], chosen[ahead:][same], weights))
    return pairs


def neighbours(features):
    """The NEIGHBOURS items of nearest features (n_items + 1, F), weighing their cosine: a list as
    of `transitions`. All pairs of items are compared: seconds at 12,000 items, hours at 1 M."""
    units = F.normalize(features[1:], dim=-1)
    k = min(NEIGHBOURS, len(units))
    pairs = []
    # a part at a time: all cosines of a large catalogue take gigabytes
    for part in torch.arange(len(units)).split(10 * SCORES_AT_ONCE // len(units) + 1):
        cosines = units[part] @ units.T
        # no item is its own neighbour
        cosines[torch.arange(len(part)), part] = -torch.inf
        nearest = cosines.topk(k)
        weights = nearest.values.clamp(min=0.0)
        columns = (1 + part.repeat_interleave(k), 1 + nearest.indices.flatten(), weights.flatten())
        pairs.append(tuple(column.numpy() for column in columns))
    return pairs


def with_transitions(score, followed: Followers, weight, likeness=1.0):
    """A score function plus weight x log(1 + C): C adds up what followed the last item of a history
    in train, or likeness times what is like it, half of that for the one before, and a quarter.
    Such counts are what vectors of 64 numbers blur. What followed none of the three costs
    nothing."""
    strengths = np.where(followed.alike, likeness, 1.0) * followed.weights
    sizes = np.diff(followed.starts)
    halves = 0.5 ** np.arange(REACH)
    sums = np.zeros(0)  # C of all cells of a batch: zeros between two batches

    def score_both(sequences, users=None):
        nonlocal sums
        scores = score(sequences, users)
        # the last items of all histories, the last one first
        recent = [seq[: -REACH - 1 : -1] for seq in sequences]
        rows = np.repeat(np.arange(len(recent)), list(map(len, recent)))
        shares = np.concatenate([halves[: len(items)] for items in recent])
        recent = np.concatenate(recent)
        # where the followers of each of them stand
        size = sizes[recent]
        first = followed.starts[recent] - (size.cumsum() - size)
        places = np.repeat(first, size) + np.arange(size.sum())
        cells = np.repeat(rows * len(sizes), size) + followed.items[places]
        counts = np.repeat(shares, size) * strengths[places]
        if len(sums) < scores.numel():
            sums = np.zeros(scores.numel())
        np.add.at(sums, cells, counts)
        terms = weight * np.log1p(sums[cells])
        sums[cells] = 0.0
        # a cell that stands here twice is set to the same value twice
        scores.view(-1).numpy()[cells] += terms.astype(np.float32)
        return scores

    return score_both


def best_term(score, data, followed):
    """(weight, likeness) of the transition term that validate best; the weight is 0 where the term
    helps nothing."""
    found = {}
    # where nothing is alike, likeness weighs nothing
    choices = LIKENESS if followed.alike.any() else (1.0,)
    for likeness in choices:
        for weight in WEIGHTS:
            with_term = with_transitions(score, followed, weight, likeness)
            rank = ranks(with_term, data.train, data.valid)
            found[weight, likeness] = metrics(rank)["ndcg@10"].mean()
    return max(found, key=found.get)


# ------------------------------------------------------------------------------------- evaluation
def masked_scores(score, sequences):
    """Yields (slice of users, scores (B, n_items + 1)): padding and what was seen at -inf."""
    largest = max(int(s.max()) for s in sequences)  # about the size of the catalogue
    batch = SCORES_AT_ONCE // (largest + 1) + 16
    for start in range(0, len(sequences), batch):
        users = slice(start, start + batch)
        scores = score(sequences[users], range(len(sequences))[users])
        scores.scatter_(1, pad(sequences[users], max_len=10**9), -torch.inf)
        scores[:, 0] = -torch.inf
        yield users, scores


def ranks(score, sequences, targets):
    """Rank (1 = best) of each user's target among all items that are not in the user's sequence,
    (users,). Ties count against us."""
    out = []
    for users, scores in masked_scores(score, sequences):
        goal = scores.gather(1, torch.as_tensor(targets)[users, None])
        if not torch.isfinite(goal).all() or torch.isnan(scores).any():
            raise ValueError("a score is not finite: the target was seen, or training diverged")
        out.append((scores >= goal).sum(1))
    return torch.cat(out).numpy()


def top_items(score, sequences):
    """Each user's 10 best items, (users, 10); 0 where none is left to show."""
    lists = []
    for _, scores in masked_scores(score, sequences):
        best = scores.topk(min(10, scores.shape[1] - 1))
        lists.append(best.indices.masked_fill(best.values <= MISS, 0))
    return torch.cat(lists).numpy()


def metrics(rank):
    """HR@k, NDCG@k (one target: DCG = 1 / log2(rank + 1)) and MRR of each user, of rank's shape."""
    out = {"mrr": 1.0 / rank}
    for k in CUTOFFS:
        out[f"hr@{k}"] = (rank <= k).astype(np.float64)
        out[f"ndcg@{k}"] = (rank <= k) / np.log2(rank + 1.0)
    return out


def mean_metrics(rank):
    """metrics, averaged over users: rank (users,) gives a number each, (seeds, users) a list."""
    return {name: values.mean(-1).tolist() for name, values in metrics(rank).items()}


def paired_bootstrap(a, b, draws=2000, seed=0):
    """Mean of a - b over users and its 95 % interval. a, b: (seeds, users), averaged over seeds."""
    difference = a.mean(0) - b.mean(0)
    rng = np.random.default_rng(seed)
    n = len(difference)
    means = [difference[rng.integers(n, size=n)].mean() for _ in range(draws)]
    ci95 = np.percentile(means, [2.5, 97.5]).tolist()
    return {"delta": float(difference.mean()), "ci95": ci95}


def user_slices(data):
    """Test users whose target has at most 5 train interactions, and those whose target nobody
    chose in train after the test event: {name: (users,) bool}."""
    latest = np.full(data.n_items + 1, -np.inf)
    for seq, times in zip(data.train, data.times, strict=True):
        np.maximum.at(latest, seq, times[: len(seq)])
    tested = np.array([times[-1] for times in data.times])
    return {"train<=5": data.counts[data.test] <= 5, "no_later_train": latest[data.test] <= tested}


def popularity_audit(top, counts):
    """Do lists top (users, 10) push popular items? Coverage, Gini of exposure, popularity rank."""
    n = len(counts) - 1
    listed = top[top > 0] - 1
    place = np.argsort(np.argsort(-counts[1:], kind="stable")) + 1
    shown = np.sort(np.bincount(listed, minlength=n))
    gini = (2 * np.arange(1, n + 1) - n - 1) @ shown / (n * shown.sum())
    return {
        "coverage@10": float((shown > 0).mean()),
        "gini@10": float(gini),
        "mean_popularity_rank@10": float(place[listed].mean()),
    }


# ------------------------------------------------------------------------------------------- arms
@dataclass(frozen=True)
class Arm:
    """One row of ARMS: what an arm's recommender gets, and what it is compared with."""

    texts: tuple = ()  # what its item features are embeddings of, side by side
    against: tuple = ()  # arms that it is compared with, where both run
    methods: str = ""  # the --method that run it by default; demo: beside curec's, on the demo
    ids: bool = True  # False: an item's vector is its features alone
    baseline: Callable | None = None  # counts in place of SASRec
    titles: bool = False  # ID embeddings start as the embeddings of titles
    preferences: str = ""  # LANE's layer over "own" preferences, or another user's: "shuffled"
    one_seed: bool = False  # draws nothing, or is taught once


# besides "item", an item's own text, "truth", the demo's drivers, and "reviews" as prompts show
# them (the control for evidence): reasons, of the LLM after alignment, after PPO, the control for
# correction, corrected, the corrected shuffled among items
REASON_TEXTS = ("aligned", "rl", "bestof", "curec", "shuffled")

AGAINST_CUREC_ONLY = ("content-only", "placebo-only", "rl-only", "bestof-only")

# texts, against, methods
ARMS = {
    "popularity": Arm((), (), "curec knowledge", baseline=popularity, one_seed=True),
    "markov": Arm((), (), "curec knowledge", baseline=markov, one_seed=True),
    "id": Arm((), (), "curec lane knowledge"),
    "text-init": Arm((), ("id",), "lane", titles=True),
    "content": Arm(("item",), ("id",), "curec"),
    "reviews": Arm(("item", "reviews"), ("content",), "curec"),
    "placebo": Arm(("item", "shuffled"), ("content",), "curec"),
    "aligned": Arm(("item", "aligned"), ("content",), "curec"),
    "rl": Arm(("item", "rl"), ("content", "aligned"), "curec"),
    "bestof": Arm(("item", "bestof"), ("content",), "curec"),
    "curec": Arm(("item", "curec"), ("content", "reviews", "placebo", "rl", "bestof"), "curec"),
    "lane-placebo": Arm((), (), "lane", titles=True, preferences="shuffled"),
    "lane": Arm((), ("id", "text-init", "lane-placebo"), "lane", titles=True, preferences="own"),
    "knowledge": Arm((), ("id", "markov"), "knowledge", one_seed=True),
    "oracle": Arm(("item", "truth"), ("content",), "curec"),
    # what an ID learns from twenty choices hides a reason that is right nine times in ten: the
    # same without IDs, as for a new item, where text has to carry everything
    "content-only": Arm(("item",), (), "demo", ids=False),
    "placebo-only": Arm(("item", "shuffled"), ("content-only",), "demo", ids=False),
    "aligned-only": Arm(("item", "aligned"), ("content-only",), "demo", ids=False),
    "rl-only": Arm(("item", "rl"), ("content-only", "aligned-only"), "demo", ids=False),
    "bestof-only": Arm(("item", "bestof"), ("content-only",), "demo", ids=False),
    "curec-only": Arm(("item", "curec"), AGAINST_CUREC_ONLY, "demo", ids=False),
    "oracle-only": Arm(("item", "truth"), ("content-only",), "demo", ids=False),
}
METHODS = ("curec", "lane", "knowledge")


def fit_arm(arm, data, inputs, config, seed, score=None):
    """Trains one arm with one seed, then reads test, once: {"ranks": on test, (users,); ...;
    "model": its state dict}. score: of an arm that was trained elsewhere."""
    start = time.perf_counter()
    model = None
    weight = likeness = 0.0
    if ARMS[arm].baseline:
        score = ARMS[arm].baseline(data)
    elif score is None:
        model, _ = train(data, inputs, config, seed, f"{arm}, seed {seed}")
        score = scorer(model)
        # without IDs items are new ones: nothing has followed them yet
        if inputs.ids:
            followed = followers(data, inputs.features)
            weight, likeness = best_term(score, data, followed)
            score = with_transitions(score, followed, weight, likeness)
    trained = time.perf_counter()
    known = [np.append(s, v) for s, v in zip(data.train, data.valid, strict=True)]
    rank = ranks(score, known, data.test)
    return {
        "rank_ms_per_user": 1000 * (time.perf_counter() - trained) / len(known),
        "train_s": trained - start,
        "seed": seed,
        "ranks": torch.from_numpy(rank),
        "valid_ranks": torch.from_numpy(ranks(score, data.train, data.valid)),
        "audit": popularity_audit(top_items(score, known), data.counts),
        "transition_weight": weight,
        "likeness": likeness,
        "model": model.cpu().state_dict() if model else {},
    }


def arm_entry(fits, slices):
    """An arm's entry in metrics.json, of its fits: a value a seed, but for cost and audit. slices:
    see user_slices."""
    test = np.stack([fit["ranks"] for fit in fits])
    by_slice = {}
    for name, users in slices.items():
        if users.any():
            by_slice[name] = mean_metrics(test.compress(users, 1))
    audit = {}
    for name in fits[0]["audit"]:
        audit[name] = float(np.mean([fit["audit"][name] for fit in fits]))
    return {
        "seeds": [fit["seed"] for fit in fits],
        "train_s": sum(fit["train_s"] for fit in fits),
        "transition_weight": [fit["transition_weight"] for fit in fits],
        "likeness": [fit["likeness"] for fit in fits],
        "rank_ms_per_user": float(np.median([fit["rank_ms_per_user"] for fit in fits])),
        "valid": mean_metrics(np.stack([fit["valid_ranks"] for fit in fits])),
        "test": mean_metrics(test),
        "slices": by_slice,
        "audit": audit,
    }


def compare(ranks_by_arm):
    """Paired differences of the arms that ARMS compares. ranks_by_arm: (seeds, users) each."""
    values = {arm: metrics(rank)["ndcg@10"] for arm, rank in ranks_by_arm.items()}
    rows = []
    for a in values:
        for b in ARMS[a].against:
            if b in values:
                row = {"a": a, "b": b, "metric": "ndcg@10", "seeds": len(values[a])}
                rows.append(row | paired_bootstrap(values[a], values[b]))
    return rows


def headroom(entries):
    """oracle - content, with IDs and without, and how much of it each arm that adds reasons
    recovers; {} without these arms."""
    out = {}
    value = {arm: np.mean(entry["test"]["ndcg@10"]).item() for arm, entry in entries.items()}
    for key, ending in (("headroom", ""), ("headroom_without_ids", "-only")):
        if not {"oracle" + ending, "content" + ending} <= set(entries):
            continue
        room = value["oracle" + ending] - value["content" + ending]
        recovered = {}
        for arm in entries:
            reasons = set(ARMS[arm].texts) & set(REASON_TEXTS)
            if room > 0 and reasons and ARMS[arm].ids == (ending == ""):
                recovered[arm] = (value[arm] - value["content" + ending]) / room
        out[key] = {"ndcg@10": room, "recovered": recovered}
    return out


def fit_all(jobs, device, fits):
    """Yields (job, a function that gives its fit) as they finish; jobs: arguments of fit_arm. On a
    CPU processes of one thread each train them, which beat one process of many threads; for few
    fits, on a GPU and where no process can be started this one does, one after another."""
    count = min(4, os.cpu_count(), fits // 3) if device == "cpu" else 1
    pool = start_workers(count) if count > 1 and jobs else None
    if pool is None:
        for job in jobs:
            yield job, functools.partial(fit_arm, *job)
        return
    futures = {pool.submit(fit_arm, *job): job for job in jobs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result
    finally:
        stop_workers()


def start_workers(count):
    """An executor with so many processes; None where they cannot be started."""
    ForkingPickler.register(torch.Tensor, by_value)
    context = get_context("spawn")
    try:
        # with a limit on processes or threads any of this raises an error, or waits for ever
        everyone = context.Barrier(count)
        pool = ProcessPoolExecutor(count, context, start_worker, [everyone])
        for ready in [pool.submit(int) for _ in range(count)]:
            ready.result(timeout=START_SECONDS)
        return pool
    except (OSError, RuntimeError):
        stop_workers()
        print("note: no process can be started beside this one: the arms train one after another")
        torch.set_num_threads(1)  # the same sums as a worker's
        return None


def stop_workers():
    """Ends them at once, also what they are at. Their executor ends with them."""
    for process in active_children():
        process.kill()


def start_worker(everyone):
    """A worker process: one thread, silent on Ctrl-C, gone when its parent is; at work when
    everyone has started."""

    def end_with_parent():
        parent_process().join()
        os._exit(1)

    torch.set_num_threads(1)
    # its own is a semaphore of the system, which a kill leaves behind
    tqdm.set_lock(threading.RLock())
    ForkingPickler.register(torch.Tensor, by_value)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    everyone.wait()


def by_value(tensor):
    """How a tensor is pickled for another process: torch's own way needs room in /dev/shm, of which
    a container has 64 MB."""
    return torch.from_numpy, (tensor.numpy(),)


# =============================================================================== a relative: LANE
class Alignment(nn.Module):
    """LANE's layer (arXiv 2407.02833): a state asks the M preferences that an LLM named for its
    user which of them it follows. vectors (K, F): embeddings of all preferences, row 0 zeros;
    named (U, C, M): rows of vectors that each user had named by each cut; since (U, C): how long
    the history was by then, ascending. A shorter history knows nothing of that cut."""

    def __init__(self, width, vectors, named, since, heads=4):
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.register_buffer("named", named)
        self.register_buffer("since", since)
        sizes = {"kdim": vectors.shape[1], "vdim": vectors.shape[1]}
        self.attention = nn.MultiheadAttention(width, heads, 0.3, batch_first=True, **sizes)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop = nn.Dropout(0.3)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def known(self, users, sequences):
        """The preferences that these histories of these users (B,) may know: the latest cut's
        (B, M), 0 where there is none."""
        users = torch.as_tensor(users, device=self.since.device)
        lengths = torch.tensor([[len(seq)] for seq in sequences], device=self.since.device)
        cut = (self.since[users] <= lengths).sum(1) - 1
        return self.named[users, cut] * (cut >= 0)[:, None]

    def forward(self, states, known):
        """states (B, D), known (B, M) -> states (B, D)."""
        wishes = F.embedding(known, self.vectors)
        found, _ = self.attention(states[:, None], wishes, wishes)
        x = self.norm1(states + self.drop(found[:, 0]) * (known[:, :1] > 0))
        return self.norm2(x + self.drop(self.down(F.gelu(self.up(x)))))
