"""SASRec with fused item features, the two counting baselines, and evaluation over the full catalogue.

    v_i  = unit(E_i + W f_i)                    item vector = ID + projected features (text, reasons)
    h_t  = unit(SASRec(x_1 .. x_t)) / tau       causal self-attention, pre-norm;  x_j = sqrt(D) v[i_j] + pos_(t - j)
    loss = -log softmax_i(h_t . v_i)            full softmax over the catalogue, i = the item after x_t; tau is learnt

Every history (x_1 .. x_t) is a training sample of its own: SASRec's usual loss over all positions of a person at once validates worse (README).
Sequences are padded on the right: behind a causal mask the last real position never sees the padding, item 0, so no key mask is needed. The fused
table v is computed once, so features cost nothing at ranking. Weights are averaged over about the last epoch; validation and test see the average.

Left out: negative sampling (the full softmax is stronger and simpler at this size), sampled metrics (they rank models differently: Krichene & Rendle
2020). Sources: SASRec (Kang & McAuley 2018), with cross-entropy (Klenitskiy & Vasilev 2023).  Try it alone: pytest tests/test_recommender.py"""
import copy, itertools, os, signal, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

WIDTH = 64                         # of item vectors and states
MAX_LEN = 50                       # longest history the model sees, in items
LENGTH = 1.6                       # first length of projected features; ID vectors start at 0.16
LEAST_STEPS = 250                  # no early stopping before: long features can start with a dip
EVERY = 2                          # epochs from one look at validation to the next: averaged weights change slowly
LOCAL = 4                          # items that the convolution of a block looks at
SCORES_AT_ONCE = 800_000           # scores ranked in one batch: larger ones leave the processor's cache
MISS = -1e9                        # score of an item that an arm did not consider: behind all others, in no list
CUTOFFS = (5, 10, 20)              # k of HR@k and NDCG@k
FRESH = SimpleNamespace(state=None, seconds=0.0, save=lambda state: None)      # of units of work: nothing done so far, and nothing is kept
BARS = {"unit": "epoch", "mininterval": 1, "disable": None}        # of progress; None: on a terminal only
ARMS = tuple("popularity markov id text-init content placebo aligned rl bestof curec lane-placebo lane knowledge oracle".split())
METHODS = {"curec": "popularity markov id content placebo aligned rl bestof curec oracle".split(), "lane": "id text-init lane-placebo lane".split(),
           "knowledge": "popularity markov id knowledge".split()}
REASON_ARMS = {"placebo", "aligned", "rl", "bestof", "curec"}      # these need the whole method
COMPARISONS = [pair.split(":") for pair in ("text-init:id lane:id lane:text-init lane:lane-placebo knowledge:id knowledge:markov content:id "
    "aligned:content rl:content rl:aligned bestof:content curec:content curec:placebo curec:rl curec:bestof placebo:content oracle:content").split()]
# ---------------------------------------------------------------------------------------------- work that can go on
def keep(path: str, value):
    """Writes a text or what torch.save takes; atomic: a reader, a killed run or a full disk leaves the old file or the new one."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(part := f"{path}.{os.getpid()}.part", "wb") as file:
        file.write(value.encode()) if isinstance(value, str) else torch.save(value, file)
    os.replace(part, path)

def stage(s, name: str, times: dict, work, of=""):
    """The result of work(units) (tensors and plain values), kept in state/NAME.pt: a finished stage is never done again. Adds its time to
    times[of or name]. units: state, what an unfinished one had kept of its units of work, or None; save, called after each; seconds they took."""
    start, stage.now, (path, part) = time.perf_counter(), name, (os.path.join(s.out, "state", name + x) for x in (".pt", ".units.pt"))
    if not os.path.exists(path):
        units = SimpleNamespace(**torch.load(part, "cpu", weights_only=True) if os.path.exists(part) else {"state": None, "seconds": 0.0})
        spent = lambda: units.seconds + time.perf_counter() - start
        units.save = lambda state: keep(part, {"state": state, "seconds": spent()})
        keep(path, {"value": work(units), "seconds": spent()})
    for made_of in Path(s.out, "state").glob(f"{name}.*.pt"):
        made_of.unlink(missing_ok=True)
    value, seconds = torch.load(path, weights_only=True).values()
    times[of or name] = times.get(of or name, 0.0) + seconds
    return value
# ------------------------------------------------------------------------------------------------------------ model
class Block(nn.Module):
    """One pre-norm transformer block beside a causal convolution (depthwise, over LOCAL items, starting at 0): position t sees items 1..t only.
    The convolution stands in for BSARec's frequency filter (arXiv 2312.10325), which raises what changes from item to item against what stays."""
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        assert width % heads == 0, "width must be a multiple of heads"
        self.heads, self.p = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.local, self.drop = nn.Parameter(torch.zeros(LOCAL, width)), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, last=None) -> torch.Tensor:
        """x (B, T, D) -> (B, T, D), or where last (B,) is given the states at these positions alone, (B, D)."""
        B, T, D = x.shape
        y = self.norm1(x)
        q, k, v = self.qkv(y).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.p if self.training else 0.0).transpose(1, 2).reshape(B, T, D)
        past = F.pad(y, (0, 0, LOCAL - 1, 0))                                              # (B, LOCAL - 1 + T, D)
        local = sum(past[:, k: k + T] * weight for k, weight in enumerate(self.local))
        if last is not None:
            x, a, local = (z[torch.arange(B, device=x.device), last] for z in (x, a, local))
        x = x + self.drop(self.out(a) + local)
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))

class Alignment(nn.Module):
    """LANE's layer (arXiv 2407.02833): a state asks M preferences, which an LLM named, by which of them it goes.
    vectors (K, F): of all preferences, row 0 zeros. named (U, C, M): each user's by cut, row numbers of vectors.
    since (U, C): length of the history that each cut had seen, ascending; shorter histories know nothing of it."""
    def __init__(self, width: int, vectors, named, since, heads: int = 4, dropout: float = 0.3):
        super().__init__()
        self.register_buffer("vectors", vectors), self.register_buffer("named", named), self.register_buffer("since", since)
        self.attention = nn.MultiheadAttention(width, heads, dropout, kdim=vectors.shape[1], vdim=vectors.shape[1], batch_first=True)
        self.norm1, self.norm2, self.drop = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def known(self, users, lengths) -> torch.Tensor:
        """The preferences that histories of these lengths (B,) of these users (B,) may know: the latest cut's (B, M), 0: none."""
        users, lengths = (torch.as_tensor(x, device=self.since.device) for x in (users, lengths))
        cut = (self.since[users] <= lengths[:, None]).sum(1) - 1
        return self.named[users, cut] * (cut >= 0)[:, None]

    def forward(self, states: torch.Tensor, known: torch.Tensor):
        """states (B, D), known (B, M) -> states (B, D) and the attention's weights, mean of the heads (B, M)."""
        wishes = F.embedding(known, self.vectors)
        found, weights = self.attention(states[:, None], wishes, wishes)
        x = self.norm1(states + self.drop(found[:, 0]) * (known[:, :1] > 0))
        return self.norm2(x + self.drop(self.down(F.gelu(self.up(x))))), weights[:, 0]

class SASRec(nn.Module):
    """SASRec whose item vectors are ID embeddings plus projected item features.
    n_items: catalogue size without padding. features: (n_items + 1, F) float tensor of mean length 1, row 0 zeros, or None.
    start: (n_items + 1, width) first ID vectors, or None: random. preferences: what Alignment takes, or None: no such layer."""
    def __init__(self, n_items, features=None, start=None, preferences=None, width=WIDTH, blocks=1, heads=2, dropout=0.3):
        super().__init__()
        self.item, self.pos = nn.Embedding(n_items + 1, width, padding_idx=0), nn.Embedding(MAX_LEN, width)
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(blocks)])
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.log_tau = nn.Parameter(torch.tensor(0.07).log())
        self.project = self.align = None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        if start is not None:
            self.item.weight.data.copy_(start)
        nn.init.zeros_(self.item.weight[0])
        if features is not None:       # made last: every arm draws the same random numbers for the shared parts
            self.register_buffer("features", features.float())
            self.project = nn.Linear(features.shape[1], width, bias=False)
            nn.init.normal_(self.project.weight, std=LENGTH * width ** -0.5)
        if preferences is not None:
            self.align = Alignment(width, **preferences)

    def table(self) -> torch.Tensor:
        """The fused item table of unit vectors, (n_items + 1, D): what input and output share."""
        content = self.drop(self.project(self.features)) if self.project is not None else 0.0
        return F.normalize(self.item.weight + content, dim=-1)

    def states(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """ids (B, T), right-padded with 0; table (n_items + 1, D) -> states after the last item (B, D)."""
        last = (ids > 0).sum(1) - 1
        ago = (last[:, None] - torch.arange(ids.shape[1], device=ids.device)).clamp(min=0)       # 0: the last item
        x = F.embedding(ids, table)      # not table[ids], whose gradient adds up in another order each time
        x = self.drop(x * table.shape[1] ** 0.5 + self.pos(ago))
        for block in self.blocks:
            x = block(x, last if block is self.blocks[-1] else None)
        return self.norm(x)

    def forward(self, ids: torch.Tensor, table: torch.Tensor, known=None) -> torch.Tensor:
        """What states gives, aligned with the preferences known (B, M) where there are any, of length 1 / tau."""
        h = self.states(ids, table)
        return F.normalize(h if self.align is None else self.align(h, known)[0], dim=-1) / self.log_tau.exp()

def pad(sequences, max_len: int = MAX_LEN) -> torch.Tensor:
    """The last max_len items of each sequence, right-padded with 0: (B, longest)."""
    return nn.utils.rnn.pad_sequence([torch.as_tensor(s[-max_len:]) for s in sequences], batch_first=True)
# --------------------------------------------------------------------------------------------------------- training
def next_item_loss(model, ids: torch.Tensor, targets: torch.Tensor, known=None) -> torch.Tensor:
    """Mean cross-entropy of the next items, targets (B,), after the histories ids (B, T); see SASRec.forward."""
    table = model.table()
    return F.cross_entropy(model(ids, table, known) @ table[1:].T, targets - 1)             # padding is never predicted

def samples(sequences):
    """Every history with its next item, each a sample of its own: list of arrays, (samples,) item and user numbers."""
    users = np.repeat(np.arange(len(sequences)), [len(s) - 1 for s in sequences])
    return [s[:t] for s in sequences for t in range(1, len(s))], np.concatenate([s[1:] for s in sequences]), users

def batches(lengths: np.ndarray, batch: int, rng, pool: int = 16):
    """Random batches of histories of similar length: `pool` random batches are sorted, cut, and shuffled, to pad little."""
    for some in np.split(rng.permutation(len(lengths)), range(batch * pool, len(lengths), batch * pool)):
        some = some[np.argsort(lengths[some], kind="stable")]
        cut = np.split(some, range(batch, len(some), batch))
        yield from (cut[k] for k in rng.permutation(len(cut)))

def early_stopping(model, optimizer, losses, validate, seed, epochs, patience, *, least=0.0, every=1, best=-1.0, clip=float("inf"), average=None,
                   name, text, state=None, save=lambda state: None):
    """Trains until validate() has not risen above `best` for `patience` epochs (and `least` are done); model ends with the best epoch's weights.
    losses(rng): yields the losses of an epoch's batches, each made with the weights of its time. rng, the epoch's own, comes from (*seed, epoch)
    as dropout's numbers do: no random state needs saving. every: epochs from one validation to the next. average: an AveragedModel to validate and
    keep in the model's stead. name, text (may show loss, value, best): of the bar. save: called after every epoch with all that it takes to go on,
    the optimizer's part live: store it at once; it comes back as `state`. Returns {"epochs", "best_epoch"} and the best value."""
    nets, seen = ([model, average], average.module) if average else ([model], model)
    given = dict(model.named_buffers())                         # item features and the like: large, and they come back from the arguments
    weights = lambda net: {k: v.clone() for k, v in net.state_dict().items() if k.removeprefix("module.") not in given}
    epoch, best_epoch, best_weights, over = 0, 0, weights(seen), False
    if state:
        epoch, best, best_epoch, best_weights, over = (state[k] for k in ("epoch", "best", "best_epoch", "best_weights", "over"))
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for net, kept in zip(nets, state["weights"]):
            net.load_state_dict(kept, strict=False)
    todo = itertools.takewhile(lambda _: not over, range(epoch + 1, epochs + 1))
    for epoch in (bar := tqdm(todo, name, epochs, initial=epoch, leave=None, **BARS)):
        rng = np.random.default_rng([*seed, epoch])
        torch.manual_seed(int(rng.integers(2 ** 31)))
        model.train()
        for loss in losses(rng):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if average:
                average.update_parameters(model)
        if epoch % every == 0 or epoch == epochs:
            value = float(validate())
            bar.set_postfix_str(text.format(loss=loss.item(), value=value, best=max(best, value)))
            if value > best:
                best, best_epoch, best_weights = value, epoch, weights(seen)
            over = epoch == epochs or epoch >= max(best_epoch + patience, least)
        save({"epoch": epoch, "best": best, "best_epoch": best_epoch, "best_weights": best_weights, "over": over,
              "weights": [weights(net) for net in nets], "optimizer": optimizer.state_dict()})
    model.load_state_dict(best_weights, strict=False)
    return {"epochs": epoch, "best_epoch": best_epoch}, best

def train(n_items, train_seqs, valid_items, features=None, start=None, preferences=None, *, seed=0, epochs=60, patience=4, batch=256, lr=3e-3,
          weight_decay=0.0, width=WIDTH, blocks=1, dropout=0.3, device="cpu", name="SASRec", state=None, save=lambda state: None):
    """Trains until validation NDCG@10 has not risen for `patience` epochs (and LEAST_STEPS steps); gives back the best epoch's model.
    train_seqs: item numbers of each user, chronological. valid_items: (users,) the next. features, start, preferences: see SASRec.
    state, save: see early_stopping. Returns (model, {"epochs", "best_epoch", "valid_ndcg@10"})."""
    torch.manual_seed(seed)
    model = SASRec(n_items, features, start, preferences, width=width, blocks=blocks, dropout=dropout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    histories, targets, users = samples(train_seqs)
    known = model.align.known(users, [len(h) for h in histories]) if model.align else None
    lengths, padded, targets = np.array([min(len(h), MAX_LEN) for h in histories]), pad(histories), torch.from_numpy(targets)
    batch = min(batch, -(-len(targets) // 8))                                        # few events: eight steps an epoch all the same
    steps = len(targets) / batch                                                     # of an epoch; the average reaches back as far, less at the start
    average = AveragedModel(model, avg_fn=lambda old, new, n: old.lerp(new, max(1 / steps, 9 / (10 + float(n)))))
    losses = lambda rng: (next_item_loss(model, padded[rows, : lengths[rows].max()].to(device), targets[rows].to(device),
                                         None if known is None else known[rows]) for rows in batches(lengths, batch, rng))
    validate = lambda: metrics(ranks(scorer(average.module, device), train_seqs, valid_items))["ndcg@10"].mean()
    log, best = early_stopping(model, optimizer, losses, validate, [seed, 89], epochs, patience, least=LEAST_STEPS / steps, every=EVERY, clip=5.0,
                               average=average, name=name, text="valid NDCG@10 {value:.4f}, best {best:.4f}", state=state, save=save)
    return model.eval(), log | {"valid_ndcg@10": best}
# ------------------------------------------------------------------ scores: sequences and their users -> (B, n + 1)
def scorer(model: SASRec, device="cpu"):
    """A function from sequences and their users to the scores of every item, (B, n_items + 1), with the table fused once."""
    table = model.eval().table().detach()
    @torch.no_grad()
    def score(sequences, users=None):
        known = model.align.known(users, [len(s) for s in sequences]) if model.align else None
        return (model(pad(sequences).to(device), table, known) @ table.T).float().cpu()
    return score

def ranker(n_items, weights: dict) -> SASRec:
    """A trained model from its state dict."""
    parts = {k[6:]: v for k, v in weights.items() if k in ("align.vectors", "align.named", "align.since")}
    model = SASRec(n_items, weights.get("features"), preferences=parts or None, width=weights["item.weight"].shape[1])
    model.load_state_dict(weights)
    return model.eval()

def top(data, weights, user: int, k: int = 5):
    """A trained arm's model, what the user had chosen, and the k best items with their scores."""
    history, model = data.seqs[user][:-1], ranker(data.n_items, weights)
    best = scorer(model)([history], [user])[0].index_fill(0, torch.tensor([0, *history]), -torch.inf).topk(min(k, data.n_items - len({*history})))
    return model, history, best.indices.tolist(), best.values.tolist()

def explain(data, weights, user: int, tell) -> str:
    """What a user had chosen, and the top items of a trained arm with what tell(item) says of each."""
    _, history, items, scores = top(data, weights, user)
    chose = f"{data.users[user]} chose: " + "; ".join(data.titles[i] for i in history[-10:])
    return "\n\n".join([chose] + [f"{x:+.2f}  {tell(i)}" for x, i in zip(scores, items)])

def popularity(n_items, train_seqs):
    """Scores every item by its number of train interactions."""
    counts = torch.from_numpy(np.bincount(np.concatenate(train_seqs), minlength=n_items + 1)).float()
    return lambda sequences, users=None: counts.repeat(len(sequences), 1)

def markov(n_items, train_seqs):
    """First-order transition counts from the last item; popularity breaks ties and fills the rest."""
    counts = np.bincount(np.concatenate(train_seqs), minlength=n_items + 1)
    fill = torch.from_numpy(counts / (counts.max() + 1.0))                 # < 1: less than any transition
    pairs = torch.from_numpy(np.concatenate([np.stack([s[:-1], s[1:]]) for s in train_seqs], 1))
    follow = torch.sparse_coo_tensor(pairs, torch.ones(pairs.shape[1]).to(fill), 2 * (n_items + 1,), check_invariants=True).coalesce()
    return lambda sequences, users=None: follow.index_select(0, torch.tensor([int(s[-1]) for s in sequences])).to_dense() + fill

COUNTING = {"popularity": popularity, "markov": markov}            # these arms draw nothing: one seed is enough
# ------------------------------------------------------------------------------------------------------- evaluation
def ranks(score, sequences, targets, batch: int = 0, lists=None) -> np.ndarray:
    """Rank (1 = best) of each user's target among all items that the user has not seen; ties count against us. score: sequences and user numbers ->
    (B, n + 1). sequences: what is known of each user. targets: (users,) item numbers. batch: users at once; 0 chooses. lists: if a list is given,
    each user's ten best items are appended, (users, 10)."""
    out, batch = np.empty(len(sequences), dtype=np.int64), batch or SCORES_AT_ONCE // (max(map(int, targets)) + 1) + 16
    for start in range(0, len(sequences), batch):
        part = sequences[start: start + batch]
        scores = score(part, range(start, start + len(part)))
        scores.scatter_(1, pad(part, max_len=10 ** 9), -torch.inf)         # everything seen; padding hits item 0
        scores[:, 0] = -torch.inf
        goal = scores.gather(1, torch.as_tensor(np.asarray(targets[start: start + batch]))[:, None])
        if not torch.isfinite(goal).all() or torch.isnan(scores).any():
            raise ValueError("a score is not finite: the target is among the items seen, or training diverged")
        out[start: start + len(part)] = (scores >= goal).sum(1).numpy()
        if lists is not None:
            best = scores.topk(min(10, scores.shape[1] - 1))
            lists.append(best.indices.masked_fill(best.values <= MISS, 0).numpy())         # 0: nothing left to show
    return out

def metrics(rank: np.ndarray) -> dict:
    """Per-user HR@k, NDCG@k (one target: DCG = 1 / log2(rank + 1)) and reciprocal rank, each (users,)."""
    hits = {k: (rank <= k).astype(np.float64) for k in CUTOFFS}
    return {f"hr@{k}": hit for k, hit in hits.items()} | {f"ndcg@{k}": hit / np.log2(rank + 1.0) for k, hit in hits.items()} | {"mrr": 1.0 / rank}

def paired_bootstrap(a: np.ndarray, b: np.ndarray, draws: int = 2000, seed: int = 0):
    """Mean of a - b over users and its 95 % interval. a, b: (seeds, users), averaged over seeds first."""
    diff, rng = a.mean(0) - b.mean(0), np.random.default_rng(seed)
    means = [diff[rng.integers(len(diff), size=len(diff))].mean() for _ in range(draws)]
    return float(diff.mean()), [float(x) for x in np.percentile(means, [2.5, 97.5])]

def audit(top: np.ndarray, n_items: int, train_seqs) -> dict:
    """Do the lists push popular items? top (users, 10) -> coverage@10, Gini of exposure, mean popularity rank."""
    counts, top = np.bincount(np.concatenate(train_seqs), minlength=n_items + 1)[1:], top[top > 0]
    place = np.argsort(np.argsort(-counts, kind="stable")) + 1
    shown = np.sort(np.bincount(top, minlength=n_items + 1)[1:])
    gini = (2 * np.arange(1, n_items + 1) - n_items - 1) @ shown / (n_items * shown.sum())
    return {"coverage@10": float((shown > 0).mean()), "gini@10": float(gini), "mean_popularity_rank@10": float(place[top - 1].mean())}

def knows(data, ask, likelihood, seed: int = 0, people: int = 500) -> dict:
    """What an LLM knows of held-out choices. ask(history, task, *about) -> prompt; likelihood(list of (prompt, answer)) -> log-probabilities.
    ranking_accuracy: of five titles, four of them never chosen, the test item's is the likeliest to come next (chance .2). bpr_accuracy: asked which
    of two is preferred, it is the likelier answer (.5). Where there are ratings: errors of its expected rating, and of the mean train rating."""
    rng, everything = np.random.default_rng([seed, 79]), np.arange(1, data.n_items + 1)
    users = [u for u in rng.permutation(len(data.seqs))[:people] if len(data.seqs[u]) < data.n_items]
    known = [data.seqs[u][:-1] for u in users]
    titles = [[data.titles[i] for i in (data.test[u], *rng.choice(np.setdiff1d(everything, data.seqs[u]), 4))] for u in users]
    pairs = [(ask(h, "bpr", "; ".join(pair)), t) for h, some in zip(known, titles) for pair in [rng.permutation(some[:2])] for t in some[:2]]
    likely = likelihood([(ask(h, "next"), t) for h, some in zip(known, titles) for t in some]).view(-1, 5)
    out = {"ranking_accuracy": (likely[:, :1] > likely[:, 1:]).all(1).float().mean().item(),
           "bpr_accuracy": likelihood(pairs).view(-1, 2).diff(dim=1).lt(0).float().mean().item()}
    if data.ratings:
        p = likelihood([(ask(h, "rate", some[0]), str(r)) for h, some in zip(known, titles) for r in range(1, 6)]).view(-1, 5).softmax(1)
        true, mean = np.array([data.ratings[u][-1] for u in users]), np.concatenate([r[:-2] for r in data.ratings]).mean()
        for name, error in (("", (p @ torch.arange(1.0, 6.0)).numpy() - true), ("_of_mean", mean - true)):
            out |= {"rmse" + name: float((error ** 2).mean() ** 0.5), "mae" + name: float(np.abs(error).mean())}
    return out
# --------------------------------------------------------------------------------------- arms: train, test, compare
def run_arm(arm, data, inputs, slices, units=FRESH, *, seed=0, epochs=60, device="cpu", score=None):
    """Trains one arm with one seed, then reads test, once: {"ranks" (users,) on test, "row": of the arm's entry, "model": its state dict}.
    data: n_items, train, valid, test (see data.Dataset). inputs: the arm's arguments of SASRec. slices: {name: (users,) bool}. score: of an arm
    trained elsewhere. units: seconds that training took before, there or in a process that was killed; state, save: see early_stopping."""
    start, model = time.perf_counter(), None
    if arm in COUNTING:
        score = COUNTING[arm](data.n_items, data.train)
    elif score is None:
        model, _ = train(data.n_items, data.train, data.valid, **inputs, seed=seed, epochs=epochs, device=device, name=f"{arm}, seed {seed}",
                         state=units.state, save=units.save)
        score = scorer(model, device)
    known, tops, trained = [np.append(s, v) for s, v in zip(data.train, data.valid)], [], time.perf_counter()
    rank, mean = ranks(score, known, data.test, lists=tops), lambda rank: {m: float(v.mean()) for m, v in metrics(rank).items()}
    row = {"train_s": units.seconds + trained - start, "rank_ms_per_user": 1000 * (time.perf_counter() - trained) / len(known), "seeds": seed}
    row |= {"valid": mean(ranks(score, data.train, data.valid)), "test": mean(rank),
            "slices": {name: mean(rank[some]) for name, some in slices.items() if some.any()},
            "audit": audit(np.concatenate(tops), data.n_items, data.train)}
    return {"ranks": torch.from_numpy(rank), "row": row, "model": model.cpu().state_dict() if model else {}}

def together(fits) -> dict:
    """One arm's fits: {"ranks" (seeds, users), "entry": the arm's of metrics.json, "model": the first one's state dict}."""
    collect = lambda rows: {k: collect([r[k] for r in rows]) for k in rows[0]} if isinstance(rows[0], dict) else rows
    entry = collect([f["row"] for f in fits])
    entry |= {"audit": {m: float(np.mean(v)) for m, v in entry["audit"].items()}, "train_s": sum(entry["train_s"]),
              "rank_ms_per_user": float(np.median(entry["rank_ms_per_user"]))}
    return {"ranks": torch.stack([f["ranks"] for f in fits]), "entry": entry, "model": fits[0]["model"]}

def alone():
    """A worker process: one thread, no bars, silent on Ctrl-C, gone when its parent is."""
    BARS["disable"] = True
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()        # join() gives back None

def workers(device: str, fits: int):
    """An executor for arms. On a CPU and for many fits: processes of one thread each, which beat one process of many threads."""
    count = min(4, os.cpu_count(), fits // 3) if device == "cpu" else 1
    return ProcessPoolExecutor(count, get_context("spawn"), alone) if count > 1 else ThreadPoolExecutor(1)

def slices_of(data) -> dict:
    """Test users whose target has at most 5 train interactions, and whose target nobody chose in train after the test event."""
    last = np.full(data.n_items + 1, np.iinfo(np.int64).min)
    np.maximum.at(last, np.concatenate(data.train), np.concatenate([t[: len(s)] for s, t in zip(data.train, data.times)]))
    return {"train<=5": data.counts[data.test] <= 5, "no_later_train": last[data.test] <= np.array([t[-1] for t in data.times])}

def compare(ranks_: dict, pairs=COMPARISONS, metric: str = "ndcg@10") -> list:
    """Paired differences a - b with 95 % bootstrap intervals over users, each user's metric averaged over seeds."""
    both = [(a, b, *paired_bootstrap(*(metrics(ranks_[x])[metric] for x in (a, b)))) for a, b in pairs if {a, b} <= set(ranks_)]
    return [{"a": a, "b": b, "metric": metric, "seeds": len(ranks_[a]), "delta": delta, "ci95": ci} for a, b, delta, ci in both]

def headroom(arms: dict, metric: str = "ndcg@10") -> dict:
    """{"headroom"}: oracle - content, and how much of it each arm that adds reasons recovers; {} without these two."""
    value = {a: float(np.mean(e["test"][metric])) for a, e in arms.items()}
    if not {"oracle", "content"} <= set(value):
        return {}
    room = value["oracle"] - value["content"]
    return {"headroom": {metric: room, "recovered": {a: (value[a] - value["content"]) / room for a in arms if a in REASON_ARMS and room > 0}}}

def markdown(header: list, rows) -> str:
    """A Markdown table; floats with four digits."""
    cells = lambda row: "| " + " | ".join(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row) + " |"
    return "\n".join([cells(header), "|" + "---|" * len(header), *map(cells, rows)])
