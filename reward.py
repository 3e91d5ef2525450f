"""The reward model: how well a reason alone tells who will choose the item.

    z(x)   = P . enc(x)                              enc: frozen text encoder, whitened; P starts as the identity
    h(e)   = mean_j z(title_j) + SASRec(z(title_1) .. z(title_t))     what the person of event e had chosen before
    s(e,r) = cos(h(e), z(r)) / tau                   tau is learnt; the target item is represented by its reason alone
    A(S,r) = mean_{e in S} s(e,r) - logmeanexp_{e in N} s(e,r)        N: states of other people of the same period
    R(r)   = (1 - l) A(shown,r) + l A(audience,r) - format penalty - ungrounded penalty

If the score also saw the item's ID or content, the reason would tell it nothing new and the reward would ignore the
text. Training: softmax over all train items' reasons, each epoch a fresh random grounded subset of every item's phrases,
so that no reason can become an item ID. The epoch is chosen on held-out people x held-out items.

Left out: an LLM as judge, pairwise preference data.  Try it alone: pytest tests/test_reward.py
"""
import copy

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data as D
from recommender import Block, pad

FORMAT_PENALTY, UNGROUNDED_PENALTY = 2.0, 2.0      # in units of A (nats); the second is times the ungrounded share
SHARED_WEIGHT = 0.5                                # lambda: weight of the audience
STATES, AUDIENCE = 256, 16                         # |N|; most people of an audience
MAX_HISTORY = 20                                   # items of a history the user tower reads


class Whitening:
    """PCA whitening fitted on item texts: raw text vectors (M, D) -> (M, k), zero mean, unit average norm."""

    def __init__(self, vectors: torch.Tensor, k: int = 128):
        self.mean = vectors.mean(0)
        _, s, v = torch.linalg.svd(vectors - self.mean, full_matrices=False)
        keep = min(k, int((s > 1e-3 * s[0]).sum()))
        self.matrix = v[:keep].T / (s[:keep] + 0.02 * s[0]) * len(vectors) ** 0.5    # shrunk: noise is not blown up

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        z = (vectors - self.mean) @ self.matrix
        return z / self.matrix.shape[1] ** 0.5


class RewardModel(nn.Module):
    """User tower over text vectors and the shared projection P. width: of the whitened text vectors."""

    def __init__(self, width: int, dropout: float = 0.2):
        super().__init__()
        self.P = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.P.weight)
        self.block = Block(width, next(h for h in (4, 2, 1) if width % h == 0), dropout)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)                      # the tower starts as the plain mean of the history's vectors
        self.log_tau = nn.Parameter(torch.tensor(0.2).log())

    def states(self, items: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """items (B, T) right-padded with 0, vectors (n + 1, width) -> unit state after the last real item, (B, width)."""
        z, real = self.P(vectors)[items], (items > 0).float()[..., None]
        mean = (z * real).sum(1) / real.sum(1).clamp(min=1)
        last = real.sum(1).long().expand(-1, z.shape[2])[:, None] - 1
        return F.normalize(mean + self.out(self.norm(self.block(z).gather(1, last).squeeze(1))), dim=-1)

    def reasons(self, vectors: torch.Tensor) -> torch.Tensor:
        """Whitened vectors of reasons (M, width) -> unit vectors (M, width)."""
        return F.normalize(self.P(vectors), dim=-1)

    def scores(self, states, reasons) -> torch.Tensor:
        """Unit states (B, width), unit reasons (M, width) -> s (B, M), in nats."""
        return states @ reasons.T / self.log_tau.exp()


class Judge:
    """A trained reward model with the states of all train events: turns reasons into rewards.

    encode: list of texts -> raw vectors (M, D), frozen. Build with `fit`, or from a saved state_dict.
    """

    def __init__(self, data, encode, whitening_size: int = 128):
        self.data = data
        titles = [D.mask_identity(data, D.item_text(item)) for item in data.items[1:]]
        raw = encode(titles)
        self.whiten = Whitening(raw, whitening_size)
        self.encode = lambda texts: self.whiten(encode([D.mask_identity(data, t) for t in texts]))
        self.items = torch.cat([torch.zeros(1, self.whiten.matrix.shape[1]), self.whiten(raw)])       # (n + 1, width)
        self.model = RewardModel(self.items.shape[1])
        self.pools = {}

    # ------------------------------------------------------------------------------------------------- training
    def fit(self, *, epochs: int = 30, patience: int = 6, batch: int = 256, lr: float = 2e-4, per_epoch: int = 20_000,
            seed: int = 0) -> dict:
        """Trains on train events of the kept people and items; the best epoch on held-out people x held-out items stays.

        A fifth of the people and a fifth of the items are held out. Returns {"auc_heldout", "epochs", "best_epoch"}.
        """
        torch.manual_seed(seed)
        data, rng = self.data, np.random.default_rng([seed, 23])
        user, item = data.events["user"], data.events["item"]
        people = rng.random(len(data.users)) < 0.2
        things = rng.random(data.n_items + 1) < 0.2
        train = np.flatnonzero(~people[user] & ~things[item])
        held = np.flatnonzero(people[user] & things[item])[:2000]
        train_items, held_items = (np.flatnonzero(x[1:]) + 1 for x in (~things, things))
        column = np.zeros(data.n_items + 1, dtype=np.int64)
        column[train_items], column[held_items] = np.arange(len(train_items)), np.arange(len(held_items))
        checks = [self.encode([D.random_reason(data, i, rng) for i in held_items]) for _ in range(4)]
        model = self.model
        small = [model.P.weight]                             # the shared space may turn slowly only
        rest = [p for n, p in model.named_parameters() if n != "P.weight"]
        optimizer = torch.optim.AdamW([{"params": small, "lr": lr * 0.1}, {"params": rest, "lr": lr}], weight_decay=0.01)
        best, best_epoch, best_state = self.auc(held, column[item[held]], checks), 0, copy.deepcopy(model.state_dict())
        bar = tqdm(range(1, epochs + 1), desc="reward model", unit="epoch", mininterval=1, disable=None)
        for epoch in bar:
            vectors = self.encode([D.random_reason(data, i, rng, size=int(rng.integers(2, 4))) for i in train_items])
            model.train()
            order = rng.permutation(train)[:per_epoch]
            for k in range(0, len(order), batch):
                events = order[k: k + batch]
                s = model.scores(model.states(self.histories(events), self.items), model.reasons(vectors))
                loss = F.cross_entropy(s, torch.from_numpy(column[item[events]]))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            value = self.auc(held, column[item[held]], checks)
            bar.set_postfix_str(f"loss {loss.item():.3f}, held-out AUC {value:.3f}")
            if value > best:
                best, best_epoch, best_state = value, epoch, copy.deepcopy(model.state_dict())
            if epoch - best_epoch >= patience:
                break
        bar.close()
        model.load_state_dict(best_state)
        self.remember()
        return {"auc_heldout": best, "epochs": epoch, "best_epoch": best_epoch}

    def histories(self, events) -> torch.Tensor:
        return pad([self.data.history(e) for e in events], MAX_HISTORY)

    @torch.no_grad()
    def auc(self, events, columns, checks) -> float:
        """How often the chosen item's random reason scores above another held-out item's: mean over draws; chance .5."""
        if not len(events) or checks[0].shape[0] < 2:
            return 0.5
        self.model.eval()
        states, values = self.model.states(self.histories(events), self.items), []
        for vectors in checks:
            s = self.model.scores(states, self.model.reasons(vectors))
            goal = s.gather(1, torch.from_numpy(columns)[:, None])
            below = (s < goal).float() + 0.5 * (s == goal).float()
            values.append((below.sum(1) - 0.5).mean().item() / (s.shape[1] - 1))
        return float(np.mean(values))

    @torch.no_grad()
    def remember(self, batch: int = 1024):
        """Computes the state of every train event once: what rewards are made of."""
        self.model.eval()
        E = len(self.data.events["user"])
        self.states = torch.cat([self.model.states(self.histories(range(k, min(k + batch, E))), self.items)
                                 for k in range(0, E, batch)])

    # -------------------------------------------------------------------------------------------------- rewards
    def pool(self, period: tuple, seed: int) -> torch.Tensor:
        """STATES event numbers of the period [start, end), drawn once by seed: the N of A(S, r)."""
        key = (*period, seed)
        if key not in self.pools:
            inside = np.flatnonzero((self.data.events["time"] >= period[0]) & (self.data.events["time"] < period[1]))
            rng = np.random.default_rng([seed, 29, len(inside)])
            self.pools[key] = torch.from_numpy(rng.permutation(inside)[:STATES].copy())
        return self.pools[key]

    @torch.no_grad()
    def judge(self, reasons, people, period, seed):
        """How much more than others each set of people goes with its reason.

        reasons: list of str; people: list of arrays of event numbers. Returns a list of (|people|,) arrays, in nats:
        s(e, r) - logmeanexp over the period's pool. The mean of each is A(people, r).
        """
        z = self.model.reasons(self.encode(reasons))                                              # (M, width)
        others = self.model.scores(self.states[self.pool(period, seed)], z)                       # (N, M)
        level = others.logsumexp(0) - np.log(len(others))
        tau = self.model.log_tau.exp()
        return [(self.states[torch.as_tensor(p)] @ v / tau - b).numpy() if len(p) else np.zeros(0)
                for p, v, b in zip(people, z, level)]

    def rewards(self, items, answers, shown, audience, period, seed):
        """R of decoded answers: (M,) array, and the parts {"shown", "audience", "grounded", "format_ok"} as arrays.

        items: item numbers; answers: decoded LLM answers; shown, audience: lists of arrays of event numbers.
        """
        parsed = [D.parse_answer(a) for a in answers]
        reasons = [p[0] for p in parsed]
        mean = lambda values: np.array([v.mean() if len(v) else 0.0 for v in values])
        a_shown = mean(self.judge(reasons, shown, period, seed))
        a_audience = mean(self.judge(reasons, audience, period, seed))
        weight = np.array([SHARED_WEIGHT if len(a) and len(s) else float(len(a) > 0) for s, a in zip(shown, audience)])
        ground = np.array([D.grounded(self.data, i, r) for i, r in zip(items, reasons)])
        ok = np.array([p[2] for p in parsed])
        total = (1 - weight) * a_shown + weight * a_audience - FORMAT_PENALTY * ~ok - UNGROUNDED_PENALTY * (1 - ground)
        return total, {"shown": a_shown, "audience": a_audience, "grounded": ground, "format_ok": ok}


def driver_choice(judge: Judge, truth: list, who: list, period, seed: int, items) -> float:
    """Demo only, a figure of the report: how often a true driver pair beats a decoy pair with the item's audience."""
    rng, wins = np.random.default_rng([seed, 31]), []
    items = [i for i in items if len(who[i]) >= 2]
    pairs = []
    for i in items:
        decoys = [p for p in judge.data.phrases[i] if p not in truth[i]]
        pairs.append((D.REASON.format(*truth[i]), D.REASON.format(*rng.permutation(decoys)[:2])))
    people = [who[i][:AUDIENCE] for i in items]
    a, b = (judge.judge([p[k] for p in pairs], people, period, seed) for k in (0, 1))
    wins = [float(x.mean() > y.mean()) for x, y in zip(a, b)]
    return float(np.mean(wins)) if wins else float("nan")
