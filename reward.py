"""The reward model: how well a reason alone tells who will choose the item.

    z(x)   = P . enc(x)                              enc: frozen text encoder, whitened; P starts as the identity
    h(e)   = mean_j z(item_j) + SASRec(z(item_1) .. z(item_t))        texts of what the person of event e had chosen before
    s(e,r) = cos(h(e), z(r)) / tau                   tau is learnt; the target item is represented by its reason alone
    A(S,r) = mean_{e in S} s(e,r) - logmeanexp_{e in N} s(e,r)        N: states of 256 events of the same period, one draw
    R(r)   = (1 - l) A(shown,r) + l A(audience,r) - format penalty - ungrounded penalty

If the score also saw the item's ID or content, the reason would tell it nothing new and the reward would ignore the text. Training: softmax over
all train items' reasons, each epoch a fresh random grounded subset of every item's phrases, so that no reason can become an item ID. The epoch is
chosen on held-out people x held-out items.

Left out: an LLM as judge, pairwise preference data.  Try it alone: pytest tests/test_reward.py"""
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import data as D
from recommender import REASON_ARMS, WIDTH, Block, early_stopping, markdown, pad, paired_bootstrap, top

FORMAT_PENALTY, UNGROUNDED_PENALTY = 2.0, 2.0      # in units of A (nats); the second is times the ungrounded share
AUDIENCE_WEIGHT = 0.5                              # lambda: weight of the audience
STATES, AUDIENCE = 256, 16                         # |N|; most people of an audience
HELD_OUT = 2000                                    # most held-out events that choose the epoch
LEAST_GAIN = 1e-3                                  # nats; two reasons that name the same things differ by rounding only
START = 0.5                                        # length of first ID vectors made from titles; random ones have 0.16
MAX_HISTORY = 20                                   # items of a history the user tower reads

def whitening(vectors: torch.Tensor, k: int = 384):
    """PCA whitening fitted on text vectors (M, D): a function (m, D) -> (m, k or fewer) after which they have mean length 1."""
    mean = vectors.mean(0)
    _, s, v = torch.linalg.svd(vectors - mean, full_matrices=False)
    keep = min(k, int((s > 1e-3 * s[0]).sum()))
    matrix = v[:keep].T / (s[:keep] + 0.2 * s[0])                          # shrunk: noise is not blown up
    matrix = matrix / ((vectors - mean) @ matrix).norm(dim=1).mean()
    return lambda x: (x - mean) @ matrix

def load_encoder(name, device="cpu", batch: int = 64):
    """Any Hugging Face text encoder as a function: list of texts -> mean of its last hidden states (len(texts), D)."""
    from transformers import AutoModel, AutoTokenizer
    try:                                                  # nothing of a hub's that could run: no pickled weights, no code
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False).to(device).eval()
    except (OSError, ValueError) as e:
        raise OSError(f"the encoder '{name}' could not be loaded ({str(e).partition(chr(10))[0]}); check --encoder and the network") from e
    @torch.no_grad()
    def encode(texts):
        out, order = torch.zeros(len(texts), model.config.hidden_size), sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for some in (order[k: k + batch] for k in range(0, len(texts), batch)):                     # by length: little padding
            x = tokenizer([texts[i] for i in some], padding=True, truncation=True, max_length=128, return_tensors="pt").to(device)
            mask = x["attention_mask"][..., None].float()
            out[some] = ((model(**x).last_hidden_state * mask).sum(1) / mask.sum(1)).float().cpu()
        return out
    return encode

def at_once(encode, texts) -> torch.Tensor:
    """encode(texts), equal texts only once: proposals are often equal, and then their vectors are, to the last bit."""
    once, place = np.unique(texts, return_inverse=True)
    return encode(once.tolist())[torch.from_numpy(place)]

standing = lambda entry: entry["reward_after" if entry["accepted"] else "reward_before"]       # of the reason that a timeline's entry leaves

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
        z, real = F.embedding(items, self.P(vectors)), (items > 0).float()[..., None]
        mean = (z * real).sum(1) / real.sum(1).clamp(min=1)
        return F.normalize(mean + self.out(self.norm(self.block(z, (items > 0).sum(1) - 1))), dim=-1)

    def reasons(self, vectors: torch.Tensor) -> torch.Tensor:
        """Whitened vectors of reasons (M, width) -> unit vectors (M, width)."""
        return F.normalize(self.P(vectors), dim=-1)

    def scores(self, states, reasons) -> torch.Tensor:
        """Unit states (B, width), unit reasons (M, width) -> s (B, M), in nats."""
        return states @ reasons.T / self.log_tau.exp()

class Judge:
    """A trained reward model with the states of all train events: turns reasons into rewards.
    encode: list of texts -> raw vectors (M, D), frozen. Ready after `fit`, or after `remember` of saved weights."""
    def __init__(self, data, encode, whitening_size: int = 128):
        self.data, raw = data, encode([D.mask_identity(data, D.item_text(item)) for item in data.items[1:]])
        whiten = whitening(raw, whitening_size)
        self.encode = lambda texts: whiten(at_once(encode, [D.mask_identity(data, t) for t in texts]))
        self.items = F.pad(whiten(raw), (0, 0, 1, 0))                                                  # (n + 1, width)
        self.model = RewardModel(self.items.shape[1])

    def fit(self, *, epochs: int = 30, patience: int = 6, batch: int = 256, lr: float = 2e-4, per_epoch: int = 20_000, seed: int = 0,
            state=None, save=lambda state: None) -> dict:
        """Trains on train events of the kept people and items (see held_out); the epoch that is best on held-out people x items stays.
        state, save: see early_stopping. Returns {"auc_heldout", "epochs", "best_epoch"}, without the first where nothing could be held out."""
        torch.manual_seed(seed)
        self.model = model = RewardModel(self.items.shape[1])            # anew: what was drawn before must not matter to a resumed run
        data, rng, (people, things) = self.data, np.random.default_rng([seed, 23]), held_out(self.data, seed)
        user, item = data.events["user"], data.events["item"]
        train = np.flatnonzero(~people[user] & ~things[item])
        held = np.random.default_rng([seed, 71]).permutation(np.flatnonzero(people[user] & things[item]))[:HELD_OUT]
        train_items, held_items = (np.flatnonzero(x[1:]) + 1 for x in (~things, things))
        checks = [self.encode([D.random_reason(data, i, rng) for i in held_items]) for _ in range(4 if len(held_items) else 0)]
        rest = [p for n, p in model.named_parameters() if n != "P.weight"]               # P: the shared space may turn slowly only
        optimizer = torch.optim.AdamW([{"params": [model.P.weight], "lr": lr * 0.1}, {"params": rest, "lr": lr}], weight_decay=0.01)
        validate = lambda: self.auc(held, np.searchsorted(held_items, item[held]), checks)
        def losses(rng):
            vectors = self.encode([D.random_reason(data, i, rng, size=int(rng.integers(2, 4))) for i in train_items])
            order = rng.permutation(train)[:per_epoch]
            for events in (order[k: k + batch] for k in range(0, len(order), batch)):
                s = model.scores(model.states(self.histories(events), self.items), model.reasons(vectors))
                yield F.cross_entropy(s, torch.from_numpy(np.searchsorted(train_items, item[events])))
        log, best = early_stopping(model, optimizer, losses, validate, [seed, 23], epochs, patience, best=validate(), name="reward model",
                                   text="loss {loss:.3f}, held-out AUC {value:.3f}", state=state, save=save)
        self.remember(model.state_dict())
        return log | ({"auc_heldout": best} if len(held) and len(held_items) > 1 else {})

    def histories(self, events) -> torch.Tensor:
        return pad([self.data.history(e) for e in events], MAX_HISTORY)

    @torch.no_grad()
    def auc(self, events, columns, checks) -> float:
        """How often the chosen item's random reason scores above another held-out item's: mean over draws; chance .5."""
        if not len(events) or checks[0].shape[0] < 2:
            return 0.5
        self.model.eval()
        states, values = self.model.states(self.histories(events), self.items), []
        for s in (self.model.scores(states, self.model.reasons(vectors)) for vectors in checks):
            goal = s.gather(1, torch.from_numpy(columns)[:, None])
            below = (s < goal).float() + 0.5 * (s == goal).float()
            values.append((below.sum(1) - 0.5).mean().item() / (s.shape[1] - 1))
        return float(np.mean(values))

    @torch.no_grad()
    def remember(self, weights: dict, batch: int = 1024):
        """Takes the reward model's weights and computes the state of every train event once: what rewards are made of."""
        self.model.load_state_dict(weights)
        self.model.eval()
        E = len(self.data.events["user"])
        self.states = torch.cat([self.model.states(self.histories(range(k, min(k + batch, E))), self.items) for k in range(0, E, batch)])

    def pool(self, period: tuple, seed: int) -> torch.Tensor:
        """STATES event numbers of the period [start, end), drawn once by seed: the N of A(S, r)."""
        inside = np.flatnonzero((self.data.events["time"] >= period[0]) & (self.data.events["time"] < period[1]))
        return torch.from_numpy(np.random.default_rng([seed, 29, len(inside)]).permutation(inside)[:STATES])

    @torch.no_grad()
    def judge(self, reasons, people, period, seed):
        """How much more than others each set of people goes with its reason: a list of (|people|,) arrays, in nats,
        s(e, r) - logmeanexp over the period's pool. The mean of each is A(people, r). people: arrays of event numbers."""
        z = self.model.reasons(self.encode(reasons))                                              # (M, width)
        others = self.model.scores(self.states[self.pool(period, seed)], z)                       # (N, M)
        level = others.logsumexp(0) - np.log(len(others))
        tau = self.model.log_tau.exp()
        return [(self.states[torch.as_tensor(p)] @ v / tau - b).numpy() if len(p) else np.zeros(0) for p, v, b in zip(people, z, level)]

    def rewards(self, items, answers, shown, audience, period, seed):
        """R of decoded LLM answers, (M,), and its parts {"shown", "audience", "grounded", "format_ok"} as arrays.
        items: (M,) numbers; shown, audience: M arrays of event numbers."""
        parsed = [D.parse_answer(a) for a in answers]
        reasons, ok = [p[0] for p in parsed], np.array([p[2] for p in parsed], bool)
        mean = lambda values: np.array([v.mean() if len(v) else 0.0 for v in values])
        a_shown, a_audience = (mean(self.judge(reasons, people, period, seed)) for people in (shown, audience))
        weight = np.array([AUDIENCE_WEIGHT if len(a) and len(s) else float(len(a) > 0) for s, a in zip(shown, audience)])
        ground = np.array([D.grounded(self.data, i, r) for i, r in zip(items, reasons)])
        total = (1 - weight) * a_shown + weight * a_audience - FORMAT_PENALTY * ~ok - UNGROUNDED_PENALTY * (1 - ground)
        return total, {"shown": a_shown, "audience": a_audience, "grounded": ground, "format_ok": ok}

    def choose(self, items, current, proposals, shown, judges, period, seed, margin):
        """For each item the proposal of highest reward, and whether it may replace the current answer. proposals: K answers an item, item by item.
        Accepted if well-formed, no less grounded than the old one, and its mean paired gain over the judges exceeds margin standard errors; a
        malformed old one pays the penalty. Returns (answers from now on, a timeline's entry an item, all of it in figures: a row of metrics.json).
        False-accept rate: the same with a sign drawn for each judge, who may as well have liked the old one better by as much."""
        K, rng = len(proposals) // len(items), np.random.default_rng([seed, 37, len(items)])
        spread = lambda xs: [x for x in xs for _ in range(K)]
        reasons, old_reasons = ([D.parse_answer(a)[0] for a in answers] for answers in (proposals, current))
        total, parts = self.rewards(spread(items), proposals, spread(shown), spread(judges), period, seed)
        old = [x - FORMAT_PENALTY * (not D.parse_answer(a)[2]) for a, x in zip(current, self.judge(old_reasons, judges, period, seed))]
        new = self.judge(reasons, spread(judges), period, seed)
        answers, entries, false = [], [], 0
        for k, before in enumerate(old):
            mine, signs = range(k * K, (k + 1) * K), rng.choice([-1.0, 1.0], len(before))
            least = D.grounded(self.data, items[k], old_reasons[k])
            passes = lambda j, gain: bool(parts["format_ok"][j] and parts["grounded"][j] >= least) and convincing(gain, margin)
            best = max(mine, key=lambda j: total[j])
            people, shared = self.data.events["user"][shown[k]], D.shared_words(self.data, items[k], shown[k])[:3]
            entries.append({"window_end": period[1], "people": [self.data.users[u] for u in people], "judges": len(before), "shared": shared,
                            "proposal": reasons[best], "reward_before": float(before.mean()), "reward_after": float(new[best].mean()),
                            "accepted": passes(best, new[best] - before)})
            answers.append(proposals[best] if entries[-1]["accepted"] else current[k])
            lucky = max(mine, key=lambda j: total[j] + AUDIENCE_WEIGHT * ((signs - 1) * (new[j] - before)).mean())
            false += passes(lucky, signs * (new[lucky] - before))
        gains, mean = [e["reward_after"] - e["reward_before"] for e in entries if e["accepted"]], lambda values: float(np.mean([*values]))
        return answers, entries, {"items": len(items), "proposed": len(proposals), "accepted": len(gains), "rejected": len(items) - len(gains),
                                  "mean_gain": mean(gains or [0.0]), "false_accept_rate": false / len(items),
                                  "reward_before": mean(e["reward_before"] for e in entries), "reward_after": mean(map(standing, entries))}

    def figures(self, answers, shown, audience, period, seed) -> dict:
        """Share grounded and well-formed and mean reward of one kind of reasons (index 0 unused), items with choosers."""
        items = [i for i in range(1, len(answers)) if len(shown[i])]
        total, parts = self.rewards(items, *([x[i] for i in items] for x in (answers, shown, audience)), period, seed)
        return {k: float(parts[k].mean()) for k in ("grounded", "format_ok")} | {"mean_reward": float(total.mean())}

    def table(self, i, reasons, who, cuts, seed) -> str:
        """Markdown: the rewards of these reasons for item i, part by part, before those who chose it."""
        (shown, audience), n = (x[i] for x in one_shot_people(who, seed)), len(reasons)
        total, parts = self.rewards([i] * n, [D.ANSWER.format("by hand", r) for r in reasons], [shown] * n, [audience] * n, (cuts[0], cuts[-1]), seed)
        return f"{len(shown)} people as shown, {len(audience)} as audience\n\n" + markdown(
            ["reason", "reward", *parts], [[r, float(x), *(v[k].item() for v in parts.values())] for k, (r, x) in enumerate(zip(reasons, total))])

def needed(s) -> dict:
    """The stages of curec.py that the arms of these settings need, in their order, each with its headline."""
    arms, texts = set(s.arms.split(",")), {"text-init", "content", "oracle"} if s.encoder else set()      # these need text vectors only
    own = {"LLM": arms - {"popularity", "markov", "id"} - texts, "preferences": {"lane", "lane-placebo"} & arms, "knowledge": {"knowledge"} & arms, "arms": arms}
    names = [name for name in ("LLM", "reward model", "PPO", "reasons", "preferences", "knowledge", "arms") if own.get(name, REASON_ARMS & arms)]
    return {name: f"[{k}/{len(names)}] {name}" for k, name in enumerate(names, 1)}

def features(arm, data, encode, kinds, seed, preferences=None) -> dict:
    """What an arm's SASRec is given, as its arguments: whitened vectors of the item's text beside those of its reason; first ID vectors, from titles;
    LANE's preferences (see curec.prefer). kinds: decoded answers by kind, index 0 unused. The placebos shuffle reasons among items, preferences among users."""
    if arm in ("popularity", "markov", "id", "knowledge"):
        return {}
    if arm in ("text-init", "lane-placebo", "lane"):
        titles = encode(data.titles[1:])
        start = (whiten := whitening(titles, WIDTH))(titles)
        inputs = {"start": START * F.pad(start, (0, WIDTH - start.shape[1], 1, 0))}
        if arm != "text-init":
            names = [mine or preferences["names"][k - k % 2] for k, mine in enumerate(preferences["names"])]         # dropped: the earlier cut's stay
            number = {n: k + 1 for k, n in enumerate(sorted({n.lower() for mine in names for n in mine}))}
            named = torch.tensor([[number[n.lower()] for n in mine] or [0] * D.PREFERENCES for mine in names]).view(len(data.users), 2, -1)
            inputs["preferences"] = {"vectors": F.pad(whiten(encode([*number] or ["none"])), (0, 0, 1, 0)), "since": preferences["since"],
                                     "named": named if arm == "lane" else named[np.random.default_rng([seed, 83]).permutation(len(named))]}
        return inputs
    texts = [[D.item_text(item) for item in data.items[1:]]]
    if arm == "oracle":
        texts.append([D.mask_identity(data, " ".join(t)) for t in data.truth["late"][1:]])
    elif arm != "content":
        texts.append([D.mask_identity(data, D.parse_answer(a)[0]) for a in kinds["curec" if arm == "placebo" else arm][1:]])
    if arm == "placebo":
        np.random.default_rng([seed, 61]).shuffle(texts[1])
    return {"features": F.pad(torch.cat([whitening(x)(x) for x in map(encode, texts)], 1), (0, 0, 1, 0))}

def held_out(data, seed) -> tuple:
    """A fifth of the people (users,) and a fifth of the items (n_items + 1,), as bool: the reward model never trains on them."""
    rng = np.random.default_rng([seed, 73])
    return rng.random(len(data.users)) < 0.2, rng.random(data.n_items + 1) < 0.2

def window_cuts(data, windows: int) -> list:
    """Absolute timestamps c_0 < .. < c_W: window w is [c_w, c_w+1). Quantiles of train events; equal times stay together."""
    times = data.events["time"]
    if not len(times):
        raise D.DataError(f"{data.name}: no user has 4 interactions (2 to train on, 1 to validate, 1 to test); lower --k-core or the limits")
    return sorted({*map(int, np.quantile(times, np.arange(windows) / windows, method="lower")), int(times.max()) + 1})

def one_shot_people(who, seed):
    """For every item a seeded sample of its train choosers: shown (at most PEOPLE) and audience (others, at most AUDIENCE)."""
    mixed = list(map(np.random.default_rng([seed, 43]).permutation, who))
    return [w[: D.PEOPLE] for w in mixed], [w[D.PEOPLE:][:AUDIENCE] for w in mixed]

def divide(events, rng):
    """A third of the people for the prompt (at most PEOPLE), the others (at most AUDIENCE) to judge."""
    mixed, third = rng.permutation(events), max(1, round(len(events) / 3))
    return mixed[:third][: D.PEOPLE], mixed[third:][:AUDIENCE]

def windows(data, who, cuts, seed):
    """Yields (number, (start, end), items, shown, judges) a window: an item's new choosers, divided.
    An item with fewer than 4 new choosers waits: they join its next window. Nobody who came after `end` is in a window."""
    waiting = [np.zeros(0, int)] * len(who)
    for number, (start, end) in enumerate(zip(cuts[:-1], cuts[1:])):
        rng, items, split = np.random.default_rng([seed, 53, number]), [], []
        for i, events in enumerate(who):
            times = data.events["time"][events]
            waiting[i] = np.append(waiting[i], events[(times >= start) & (times < end)])
            if len(waiting[i]) >= 4:
                items.append(i), split.append(divide(waiting[i], rng))
                waiting[i] = waiting[i][:0]
        if items:
            yield number + 1, (start, end), items, *zip(*split)

def practice(data, who, cuts, seed):
    """PPO's prompts, for every item one of each kind: tuples (items, prompts, shown people, audiences), rows held out, rows to train.
    One-shot kind: all train choosers, no reason yet. Correction kind: the people of one window and a random reason. A tenth of
    the items is held out; rows whose prompt shows nobody are in neither set: there is nothing to judge them by."""
    rng = np.random.default_rng([seed, 47])
    (shown, audience), rows = one_shot_people(who, seed + 1), []
    for i in range(1, data.n_items + 1):
        w, times = int(rng.integers(len(cuts) - 1)), data.events["time"][who[i]]
        few, others = divide(who[i][(times >= cuts[w]) & (times < cuts[w + 1])], rng)
        rows += [(i, D.reason_prompt(data, i, reason, some), some, rest)
                 for reason, some, rest in (("", shown[i], audience[i]), (D.random_reason(data, i, rng), few, others))]
    items, prompts, people, ears = zip(*rows)
    kept_out = np.isin(items, rng.permutation(data.n_items)[: max(1, data.n_items // 10)] + 1)
    judged = rng.permutation([k for k in range(len(items)) if len(people[k])])
    return items, prompts, people, ears, judged[kept_out[judged]], judged[~kept_out[judged]]

def convincing(gain: np.ndarray, margin: float) -> bool:
    """Is the mean paired gain above zero by more than margin standard errors? Under LEAST_GAIN is no gain at all."""
    return len(gain) > 1 and bool(gain.mean() > margin * gain.std(ddof=1) / len(gain) ** 0.5 + LEAST_GAIN)

def truth_figures(named: list, truth: dict) -> dict:
    """Demo only: of the phrases named, the share that are drivers (chance .4); of the drivers, the share named; of the items with
    a new driver, the share whose reason names it. named: phrases an item, truth: see data.Dataset, without index 0."""
    hits, said = sum(len({*n} & {*t}) for n, t in zip(named, truth["late"])), sum(len({*n}) for n in named)
    return {"truth_precision": hits / max(1, said), "truth_recall": hits / sum(map(len, truth["late"])), "new_driver": float(np.mean(names_new(named, truth)))}

def names_new(named: list, truth: dict) -> list:
    """Of the items whose driver changed: does the reason name the new one?"""
    return [bool((set(late) - set(early)) & set(n)) for n, early, late in zip(named, truth["early"], truth["late"]) if set(early) != set(late)]

def driver_choice(judge: Judge, truth: list, who: list, period, seed: int) -> dict:
    """Demo only: how often a true driver pair beats a decoy pair with these people, and for how many items: at least two people each; {}: none."""
    rng, items = np.random.default_rng([seed, 31]), [i for i in range(1, len(who)) if len(who[i]) >= 2]
    if not items:
        return {}
    decoys = [rng.permutation([p for p in judge.data.phrases[i] if p not in truth[i]])[:2] for i in items]
    a, b = (judge.judge([D.REASON.format(*p) for p in pairs], [who[i][:AUDIENCE] for i in items], period, seed)
            for pairs in ([truth[i] for i in items], decoys))
    return {"driver_choice": float(np.mean([x.mean() > y.mean() for x, y in zip(a, b)])), "driver_items": len(items)}

def tell_truth(data, judge, who, cuts, kinds, m, seed):
    """Demo only: how true the reasons are and how well the judge knows it, into m. Read after everything else; feeds nothing."""
    truth, named = {k: v[1:] for k, v in data.truth.items()}, {k: [D.parse_answer(a)[1] for a in v[1:]] for k, v in kinds.items()}
    for kind in kinds:
        m["reasons"][kind] |= truth_figures(named[kind], truth)
    if {"curec", "bestof"} <= set(kinds):
        delta, ci = paired_bootstrap(*(np.array([names_new(named[k], truth)], float) for k in ("curec", "bestof")))
        m["comparisons"].append({"a": "curec", "b": "bestof", "metric": "new_driver", "seeds": 1, "delta": delta, "ci95": ci})
    # the judge has seen neither these people nor these items; of items whose driver changed, the people of the second half
    (people, things), late = held_out(data, seed), data.events["time"] > truth["since"][0]
    stays = [set(a) == set(b) for a, b in zip(data.truth["early"], data.truth["late"])]
    ears = [w[people[data.events["user"][w]] & (late[w] | stays[i])] if things[i] else w[:0] for i, w in enumerate(who)]
    m["reward"] |= driver_choice(judge, data.truth["late"], ears, (cuts[0], cuts[-1]), seed)

def timeline(r: dict) -> str:
    """How a reason came about: who came, what they share, what was proposed, why it was taken; r: a line of reasons.jsonl."""
    day = lambda t: time.strftime("%Y-%m-%d", time.gmtime(t))
    return "\n".join([f"**{r['title']}** ({r['item']}): {r['reason']}", *(
        f"- until {day(t['window_end'])} came {', '.join(t['people'])}, who had chosen {', '.join(t['shared']) or 'nothing of it'}: *{t['proposal'] or 'malformed'}* "
        + "{}; for {judges} others the reward {reward_before:+.2f} -> {reward_after:+.2f}".format("accepted" if t["accepted"] else "rejected", **t)
        for t in r["timeline"])])

@torch.no_grad()
def lane_question(data, weights, preferences, user: int) -> str:
    """LANE's prompt for why a user's top item is recommended, with the trained attention's weights of the preferences."""
    model, history, items, _ = top(data, weights, user)
    state, known = model.states(pad([history]), model.table()), model.align.known([user], [len(history)])
    names = preferences["names"][2 * user + 1] or preferences["names"][2 * user]
    weighted = ", ".join(f"{n} {w:.2f}" for n, w in zip(names, model.align(state, known)[1][0].tolist())) or "none known"
    return D.question(data, history, "explain", weighted, D.item_text(data.items[items[0]]), longest=D.LONGEST)

def tables(m: dict) -> dict:
    """metrics.json in short, as Markdown: the arms and, where they are known, the headroom and the kinds of reasons, truth first."""
    columns = [("test", k) for k in ("hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")] + [("valid", "ndcg@10")]
    rows = [[arm, len(e["seeds"]), *(np.mean(e[part][k]) for part, k in columns), e["rank_ms_per_user"]] for arm, e in m["arms"].items()]
    out = {"arms": markdown(["arm", "seeds", *(k.upper() for _, k in columns[:-1]), "valid NDCG@10", "ms/user"], rows)}
    if "headroom" in m:
        shares = ", ".join(f"{a} {r:.0%}" for a, r in m["headroom"]["recovered"].items()) or "no share of nothing"
        out["headroom"] = f"Headroom (oracle - content): {m['headroom']['ndcg@10']:+.4f}. Recovered: {shares}."
    if "reasons" in m:
        keys = sorted({k for v in m["reasons"].values() for k in v}, key=lambda k: (k[:5] not in ("truth", "new_d"), k))
        out["reasons"] = markdown(["reasons", *keys], [[kind, *(v[k] for k in keys)] for kind, v in m["reasons"].items()]) + "".join(
            "\n\nNew driver named where one changed, curec - bestof: {:+.3f} [{:+.3f}, {:+.3f}].".format(c["delta"], *c["ci95"])
            for c in m["comparisons"] if c["metric"] == "new_driver")
    return out

def report(m: dict, reasons: list, notes: list) -> list:
    """metrics.json and reasons.jsonl as Markdown paragraphs."""
    short, comparisons = tables(m), [c for c in m["comparisons"] if c["metric"] == "ndcg@10"]
    figures = lambda values, form: ", ".join(f"{k} {v:{form if isinstance(v, float) else ''}}" for k, v in values.items())
    relatives = [f"`{k}`: {figures(m[k], '.4g')}" for k in ("lane", "knowledge") if k in m]
    cost = "Time: {}. Peak memory: {}.".format(*(", ".join(f"{k} {v:,.0f} {u}" for k, v in m[x].items()) for x, u in (("time_s", "s"), ("peak_memory_mb", "MB"))))
    slices, audits = (list(dict.fromkeys(n for e in m["arms"].values() for n in e[k])) for k in ("slices", "audit"))
    out = ["# CURec on {name}: {users:,} users, {items:,} items, {interactions:,} interactions, ties: {ties}".format(**m["dataset"]),
           "\n".join(f"- {n}" for n in [*notes, *relatives, cost]), "## Ranking\n\nTest, whole catalogue, seen items masked, mean of the seeds."
           + " `knowledge`: a title outside its beams is a miss, ranked last." * ("knowledge" in m["arms"]),
           short["arms"], "## Differences in NDCG@10\n\nPaired over users, each averaged over seeds first.",
           markdown(["a - b", "delta", "95 % interval"], [
               [f"{c['a']} - {c['b']}", f"{c['delta']:+.4f}", "{:+.4f} .. {:+.4f}".format(*c["ci95"])] for c in comparisons]),
           *[short[k] for k in ("headroom",) if k in short], "## Slices and popularity audit",
           markdown(["arm", *(f"NDCG@10, {n}" for n in slices), *audits], [
               [arm, *(np.mean(e["slices"][n]["ndcg@10"]) for n in slices), *(e["audit"][k] for k in audits)] for arm, e in m["arms"].items()])]
    if not reasons:
        return out
    judged = sorted((r for r in reasons if r["timeline"]), key=lambda r: standing(r["timeline"][-1]), reverse=True)
    moved = sorted(judged, key=lambda r: -sum(t["accepted"] for t in r["timeline"]))[:2]
    return out + ["## Reasons", short["reasons"], f"Reward model: {figures(m['reward'], '.3f')}. PPO, held-out prompts: "
                  "reward {reward_before:+.3f} before, {reward_after:+.3f} after {updates} updates.".format(**m["ppo"]),
                  "## Correction", *([markdown(list(m["correction"][0]), [c.values() for c in m["correction"]])] if m["correction"] else []),
                  "False-accept rate: what would be accepted if every old reason were as good (each judge's gains with a random sign), no share of mistakes.",
                  "## Two reasons and how they came about", *map(timeline, moved),
                  "## Best and worst reasons, by what the judges of their last window gave (no penalties, but for an old reason that is malformed)",
                  "\n".join(f"- {standing(r['timeline'][-1]):+.2f} **{r['title']}**: {r['reason']}" for r in judged[:5] + judged[5:][-5:])]
