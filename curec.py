"""CURec on one GPU: an LLM writes why people choose an item, a recommender judges it, and the reasons help to rank.

    python curec.py --dataset demo                        everything offline on a laptop CPU, minutes
    python curec.py --dataset beauty --arms id,content    only these arms of a real data set

    data -> LLM (align) -> reward model -> PPO (policy) -> chronological correction -> SASRec with reasons -> report

The five stages run one after another; each leaves its result in the run folder, from where --resume goes on. The hidden
truth of the demo world is read in two places only: `truth_figures` and the `oracle` arm, both after everything else.
Reading order: this file, reward.py, rl.py, recommender.py, data.py.
"""
import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

import data as D
import recommender
import reward
import rl

ARMS = ("popularity", "markov", "id", "content", "placebo", "aligned", "rl", "bestof", "curec", "oracle")
LLM_ARMS = {"content", "placebo", "aligned", "rl", "bestof", "curec", "oracle"}      # these need text vectors
REASON_ARMS = {"placebo", "aligned", "rl", "bestof", "curec"}                        # these need the whole method
COMPARISONS = (("content", "id"), ("aligned", "content"), ("rl", "content"), ("rl", "aligned"), ("bestof", "content"),
               ("curec", "content"), ("curec", "placebo"), ("curec", "rl"), ("curec", "bestof"), ("placebo", "content"),
               ("oracle", "content"))
DEFAULT_LLM = "Qwen/Qwen2.5-1.5B-Instruct"         # Apache-2.0; the default for real data where CUDA is at hand


# -------------------------------------------------------------------------------------------------------- settings
def opt(default, group, text):
    return field(default=default, metadata={"group": group, "help": text})


@dataclass(frozen=True)
class Settings:
    dataset: str = opt("demo", "data", "demo | beauty | toys | sports | another Amazon category | a folder of your own")
    data_dir: str = opt("data", "data", "folder that holds, or receives, the downloaded files")
    ties: str = opt("file", "data", "order within a timestamp: file (as published numbers) | shuffle (honest)")
    k_core: int = opt(-1, "data", "fewest interactions a user and an item must have; -1: 5 for a folder, else 0")
    limit_items: int = opt(0, "data", "keep the N items with most train interactions, then a 5-core; 0: all")
    limit_users: int = opt(0, "data", "then keep N users drawn by seed; 0: all")
    llm: str = opt("", "LLM", f"tiny | Hugging Face name or path; default: tiny for demo or CPU, else {DEFAULT_LLM}")
    encoder: str = opt("", "LLM", "Hugging Face text encoder, name or path; default: the LLM's own hidden states")
    tiny_steps: int = opt(600, "LLM", "training steps of the tiny LLM, 32 prompts each")
    align_steps: int = opt(120, "LLM", "supervised LoRA steps, 16 prompts each")
    max_new: int = opt(0, "LLM", "longest answer in tokens; 0: 32 for tiny, else 128")
    micro_batch: int = opt(0, "LLM", "rows a forward-backward pass holds; lower it if memory runs out; 0: 48 tiny, else 4")
    ppo_updates: int = opt(40, "method", "PPO updates (sample, score, learn)")
    ppo_batch: int = opt(96, "method", "answers sampled for each PPO update")
    ppo_lr: float = opt(0.0, "method", "PPO learning rate; 0: 1e-3 for tiny, else 1e-5")
    windows: int = opt(4, "method", "time windows of the correction, equal in train events")
    proposals: int = opt(4, "method", "corrections proposed for an item and window")
    margin: float = opt(1.0, "method", "accept a correction if its paired gain exceeds this many standard errors")
    arms: str = opt("all", "evaluation", "comma-separated arms, or all: " + ",".join(ARMS))
    seeds: int = opt(3, "evaluation", "downstream repeats of every arm")
    epochs: int = opt(60, "evaluation", "most downstream epochs; validation stops earlier")
    out: str = opt("", "run", "run folder; default runs/DATASET")
    seed: int = opt(0, "run", "seed of everything, the demo world included")
    device: str = opt("", "run", "cpu | cuda | cuda:1; default: cuda where there is one")
    quick: bool = opt(False, "run", "a tiny run of every stage, for CI: its figures mean nothing")
    resume: bool = opt(False, "run", "go on with the run folder from its last finished stage")


QUICK = {"tiny_steps": 90, "align_steps": 12, "ppo_updates": 2, "ppo_batch": 32, "windows": 2, "proposals": 2, "seeds": 1,
         "epochs": 3}


class UsageError(ValueError):
    """Contradictory or impossible flags; the message says what to change."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="curec.py", description="CURec on one GPU: LLM reasons for recommendation, judged, reinforced, corrected in time.",
        epilog="Outputs in the run folder: report.md (read this), metrics.json, reasons.jsonl, ppo.jsonl, align/, policy/.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=118), allow_abbrev=False)
    parser.error = lambda message: (print(f"curec.py: error: {message} (see --help)", file=sys.stderr), sys.exit(2))
    groups = {}
    for f in fields(Settings):
        group = groups.setdefault(f.metadata["group"], parser.add_argument_group(f.metadata["group"]))
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            group.add_argument(flag, action="store_true", help=text)
        else:
            default = "" if f.default == "" else f" [{f.default}]"
            group.add_argument(flag, type=f.type, default=None, metavar=f.name.split("_")[-1].upper(), help=text + default)
    look = parser.add_argument_group("look at a finished run")
    look.add_argument("--run", metavar="DIR", help="the run folder to look at")
    look.add_argument("--explain", metavar="USER", help="this user's top items, each with its reason and the reason's history")
    args = vars(parser.parse_args(argv))
    run, user = args.pop("run"), args.pop("explain")
    given = {k: v for k, v in args.items() if v is not None and v is not False}
    if (run is None) != (user is None):
        raise UsageError("--run DIR and --explain USER go together")
    return Settings(**{**(QUICK if args["quick"] else {}), **given}), run, user


def resolve(s: Settings) -> Settings:
    """Fills what depends on the machine and refuses what contradicts itself."""
    cuda = torch.cuda.is_available()
    device = s.device or ("cuda" if cuda else "cpu")
    if device.startswith("cuda") and not cuda:
        raise UsageError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    if s.ties not in ("file", "shuffle"):
        raise UsageError(f"--ties {s.ties}: file or shuffle")
    if s.dataset == "demo" and (s.limit_items or s.limit_users or s.ties != "file"):
        raise UsageError("--limit-items, --limit-users and --ties are for real data; the demo world has no ties")
    arms = [a for a in ARMS if a != "oracle" or s.dataset == "demo"] if s.arms == "all" else s.arms.split(",")
    unknown = [a for a in arms if a not in ARMS]
    if unknown:
        raise UsageError(f"--arms: unknown {', '.join(unknown)}; choose from {', '.join(ARMS)}")
    if "oracle" in arms and s.dataset != "demo":
        raise UsageError("--arms oracle: only the demo world knows its truth")
    low = [f.name for f in fields(Settings) if f.type in (int, float) and getattr(s, f.name) < (-1 if f.name == "k_core" else 0)]
    low += [n for n in ("seeds", "windows", "proposals", "ppo_updates", "epochs", "tiny_steps", "align_steps") if getattr(s, n) < 1]
    if low or s.ppo_batch < 8:
        raise UsageError(f"--{(low or ['ppo_batch'])[0].replace('_', '-')}: too small")
    llm = s.llm or ("tiny" if s.dataset == "demo" or device == "cpu" else DEFAULT_LLM)
    tiny = llm == "tiny"
    name = os.path.basename(os.path.normpath(s.dataset)).lower()
    return Settings(**{**asdict(s), "device": device, "llm": llm, "arms": ",".join(arms), "out": s.out or f"runs/{name}",
                       "max_new": s.max_new or (32 if tiny else 128), "micro_batch": s.micro_batch or (48 if tiny else 4),
                       "ppo_lr": s.ppo_lr or (1e-3 if tiny else 1e-5)})


# ------------------------------------------------------------------------------------------------------ run folder
def write(path: str, text: str):
    """Atomic: a reader, or a killed run, sees the old file or the new one."""
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".part", path)


def stage(run: str, name: str, times: dict, work):
    """The result of work() (tensors and plain values), kept in state/NAME.pt: a finished stage is never done again."""
    path = os.path.join(run, "state", name + ".pt")
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        print(f"  {name}: done before, read from {path}")
    else:
        start = time.perf_counter()
        saved = {"value": work(), "seconds": 0.0}
        saved["seconds"] = time.perf_counter() - start
        torch.save(saved, path + ".part")
        os.replace(path + ".part", path)
    times[name] = saved["seconds"]
    return saved["value"]


def open_run(s: Settings) -> str:
    """Makes the run folder, or checks that the one to resume was made with the same settings."""
    mine = {k: v for k, v in asdict(s).items() if k != "resume"}
    path = os.path.join(s.out, "config.json")
    if s.resume:
        if not os.path.exists(path):
            raise UsageError(f"--resume: {path} does not exist; leave --resume out to start")
        with open(path) as f:
            old = json.load(f)["settings"]
        changed = [k for k in mine if old.get(k) != mine[k]]
        if changed:
            raise UsageError(f"--resume: {s.out} was made with another --{changed[0].replace('_', '-')} "
                             f"({old.get(changed[0])!r}, not {mine[changed[0]]!r})")
    elif os.path.exists(path):
        for folder, _, names in os.walk(os.path.join(s.out, "state")):
            for n in names:
                os.remove(os.path.join(folder, n))
    os.makedirs(os.path.join(s.out, "state"), exist_ok=True)
    return s.out


def git_commit() -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        out = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        return out.stdout.strip() if out.returncode == 0 else "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# -------------------------------------------------------------------------------------------- stages 1 to 4: the LLM
def tiny_llm(s: Settings, data) -> str:
    """Path of the tiny LLM trained from nothing on this data set's texts and prompts; cached by what it depends on."""
    rng = np.random.default_rng([s.seed, 41])
    easy = D.alignment_samples(data, 6000, rng, reason_share=1.0, people=0)
    samples = D.alignment_samples(data, 12_000, rng, reason_share=0.7)
    key = hashlib.sha256(json.dumps([easy, samples, s.tiny_steps, s.seed, 2]).encode()).hexdigest()[:12]
    path = os.path.join("cache", f"tiny-{data.name}-{key}")
    if not os.path.exists(path):
        os.makedirs("cache", exist_ok=True)
        texts = [D.item_text(item) for item in data.items[1:]]
        rl.train_tiny(path, texts, easy, samples, D.SYSTEM_TAGS, steps=s.tiny_steps, seed=s.seed, device=s.device)
    return path


def one_shot(data, who, seed):
    """For every item a seeded sample of its train choosers: shown (at most PEOPLE) and audience (the others)."""
    rng = np.random.default_rng([seed, 43])
    mixed = [rng.permutation(w) for w in who]
    return [w[: D.PEOPLE] for w in mixed], [w[D.PEOPLE:][: reward.AUDIENCE] for w in mixed]


def prompts_for(data, items, reasons, shown):
    return [D.reason_prompt(data, i, r, [data.history(e) for e in p]) for i, r, p in zip(items, reasons, shown)]


def reinforce(s: Settings, data, model, tokenizer, judge, who, cuts, log_path):
    """PPO on both kinds of prompt; 10 % of the items are held out. Returns rewards before and after on those."""
    rng = np.random.default_rng([s.seed, 47])
    period = (cuts[0], cuts[-1])
    shown, audience = one_shot(data, who, s.seed + 1)
    items, reasons, people, ears = [], [], [], []
    for i in range(1, data.n_items + 1):
        items += [i, i]
        reasons += ["", D.random_reason(data, i, rng)]                   # one-shot kind; correction kind
        w = int(rng.integers(len(cuts) - 1))
        inside = rng.permutation(who[i][(data.events["time"][who[i]] >= cuts[w]) & (data.events["time"][who[i]] < cuts[w + 1])])
        half = (len(inside) + 1) // 2
        people += [shown[i], inside[:half][: D.PEOPLE]]
        ears += [audience[i], inside[half:][: reward.AUDIENCE]]
    held_items = set((rng.permutation(data.n_items)[: max(1, data.n_items // 10)] + 1).tolist())
    judged = np.array([k for k in range(len(items)) if len(people[k])])  # without choosers there is nothing to judge by
    held = np.array([k for k in judged if items[k] in held_items])
    train = np.array([k for k in judged if items[k] not in held_items])
    train = train[rng.permutation(len(train))[: s.ppo_updates * s.ppo_batch]]      # more prompts would never be drawn
    prompts = prompts_for(data, items, reasons, people)

    def total(texts, rows):
        take = lambda xs: [xs[k] for k in rows]
        return judge.rewards(take(items), texts, take(people), take(ears), period, s.seed)[0]

    def sample(rows, adapter, name):
        rl.use(model, adapter)
        return total(rl.generate(model, tokenizer, [prompts[k] for k in rows], max_new=s.max_new, seed=s.seed, name=name)[0], rows)
    before = sample(held, "align", "held-out prompts before PPO")
    baseline = np.zeros(len(items))
    baseline[train] = sample(train, "align", "reference reasons")
    score = lambda texts, rows: torch.from_numpy(total(texts, train[rows]) - baseline[train[rows]])
    log = rl.ppo(model, tokenizer, [prompts[k] for k in train], score, updates=s.ppo_updates, batch=s.ppo_batch,
                 minibatch=s.ppo_batch // 2, micro_batch=s.micro_batch, lr=s.ppo_lr, max_new=s.max_new, seed=s.seed,
                 log_path=log_path)
    after = sample(held, "policy", "held-out prompts after PPO")
    return {"reward_before": float(before.mean()), "reward_after": float(after.mean()), "kl": log[-1]["kl"], "updates": len(log)}


def window_cuts(data, windows: int) -> list:
    """Absolute timestamps c_0 < .. < c_W: window w is [c_w, c_w+1). Quantiles of train events; equal times stay together."""
    times = data.events["time"]
    inner = np.quantile(times, np.arange(1, windows) / windows, method="lower")
    return sorted({int(times.min()), *(int(c) for c in inner), int(times.max()) + 1})


# ----------------------------------------------------------------------------- stage 5: chronological correction
def correct(s: Settings, data, model, tokenizer, judge, who, cuts):
    """Corrects every item's reason at the end of each window; nothing after the window is in a prompt or a judgement.

    Half of a window's choosers of an item (at most PEOPLE) are shown to the LLM, the other half judge. The proposal with
    the highest reward replaces the reason if its mean paired gain over the judges exceeds margin standard errors.
    Returns (reasons, timelines, judges a item, proposals a item, one row a window).
    """
    n, rows = data.n_items, []
    rl.use(model, "policy")
    texts, _ = rl.generate(model, tokenizer, prompts_for(data, range(1, n + 1), [""] * n, [()] * n), max_new=s.max_new,
                           seed=s.seed, name="first reasons, from the item's text alone")
    answers, timelines = [""] + texts, [[] for _ in range(n + 1)]
    judges_of, made, waiting = [[] for _ in range(n + 1)], [1] * (n + 1), [np.zeros(0, int)] * (n + 1)
    for w, (start, end) in enumerate(zip(cuts[:-1], cuts[1:])):
        rng = np.random.default_rng([s.seed, 53, w])
        items, shown, ears = [], [], []
        for i in range(1, n + 1):
            times = data.events["time"][who[i]]
            waiting[i] = np.append(waiting[i], who[i][(times >= start) & (times < end)])
            mixed = rng.permutation(waiting[i])
            if len(mixed) >= 4:                                          # fewer join the next window
                half = len(mixed) // 2
                items.append(i), shown.append(mixed[:half][: D.PEOPLE]), ears.append(mixed[half:][: reward.AUDIENCE])
                waiting[i] = np.zeros(0, int)
        if not items:
            continue
        K = s.proposals
        prompts = prompts_for(data, items, [D.parse_answer(answers[i])[0] for i in items], shown)
        proposals, _ = rl.generate(model, tokenizer, [p for p in prompts for _ in range(K)], max_new=s.max_new,
                                   seed=s.seed + 1 + w, name=f"correction, window {w + 1} of {len(cuts) - 1}")
        spread = lambda xs: [x for x in xs for _ in range(K)]
        total, _ = judge.rewards(spread(items), proposals, spread(shown), spread(ears), (start, end), s.seed)
        old = judge.judge([D.parse_answer(answers[i])[0] for i in items], ears, (start, end), s.seed)
        new = judge.judge([D.parse_answer(p)[0] for p in proposals], spread(ears), (start, end), s.seed)
        gains, accepted, false = [], 0, 0
        for k, i in enumerate(items):
            best = k * K + int(total[k * K: (k + 1) * K].argmax())
            yes = convincing(new[best] - old[k], s.margin) and D.parse_answer(proposals[best])[2]
            null = [(new[j] - old[k]) * rng.choice([-1.0, 1.0], len(old[k])) for j in range(k * K, (k + 1) * K)]
            false += convincing(max(null, key=np.mean), s.margin)        # signs at random: as if old and new were alike
            timelines[i].append({"window_end": end, "proposal": D.parse_answer(proposals[best])[0], "accepted": bool(yes),
                                 "reward_before": float(old[k].mean()), "reward_after": float(new[best].mean())})
            answers[i] = proposals[best] if yes else answers[i]
            gains.append((old[k].mean(), (new[best] if yes else old[k]).mean()))
            accepted += bool(yes)
            judges_of[i] += ears[k].tolist()
            made[i] += K
        before, after = np.mean(gains, axis=0)
        rows.append({"window": w + 1, "window_end": end, "proposed": len(items) * K, "items": len(items), "accepted": accepted,
                     "reward_before": float(before), "reward_after": float(after), "false_accept_rate": false / len(items)})
    return answers, timelines, judges_of, made, rows


def convincing(gain: np.ndarray, margin: float) -> bool:
    """Is the mean paired gain above zero by more than margin standard errors?"""
    return bool(gain.mean() > margin * gain.std(ddof=1) / len(gain) ** 0.5 + 1e-9) if len(gain) > 1 else False


def best_of(s: Settings, data, model, tokenizer, judge, who, judges_of, made, period):
    """The control for correction: as many one-shot proposals as curec made, the same judges, no time order."""
    shown, _ = one_shot(data, who, s.seed)
    items = [i for i in range(1, data.n_items + 1) for _ in range(made[i])]
    rl.use(model, "policy")
    prompts = prompts_for(data, items, [""] * len(items), [shown[i] for i in items])
    texts, _ = rl.generate(model, tokenizer, prompts, max_new=s.max_new, seed=s.seed + 91, name="best of one-shot proposals")
    total, _ = judge.rewards(items, texts, [shown[i] for i in items], [np.array(judges_of[i], int) for i in items], period, s.seed)
    best = {}
    for k, i in enumerate(items):
        if i not in best or total[k] > total[best[i]]:
            best[i] = k
    return [""] + [texts[best[i]] for i in range(1, data.n_items + 1)]


def write_reasons(s: Settings, data, model, tokenizer, judge, who, cuts):
    """All kinds of reasons: {KIND: decoded answers, index 0 empty}, timelines and the rows of the correction."""
    shown, _ = one_shot(data, who, s.seed)
    items = list(range(1, data.n_items + 1))
    prompts, kinds = prompts_for(data, items, [""] * len(items), [shown[i] for i in items]), {}
    for kind, adapter in (("aligned", "align"), ("rl", "policy")):
        rl.use(model, adapter)
        kinds[kind] = [""] + rl.generate(model, tokenizer, prompts, max_new=s.max_new, seed=s.seed, name=f"reasons: {kind}")[0]
    kinds["curec"], timelines, judges_of, made, rows = correct(s, data, model, tokenizer, judge, who, cuts)
    kinds["bestof"] = best_of(s, data, model, tokenizer, judge, who, judges_of, made, (cuts[0], cuts[-1]))
    return {"kinds": kinds, "timelines": timelines, "correction": rows}


# -------------------------------------------------------------------------------------- figures, features, report
def reason_figures(data, judge, who, answers, period, seed, tokenizer):
    """Groundedness, format, length and mean reward of one kind of reasons, all items; no truth."""
    shown, audience = one_shot(data, who, seed)
    items = [i for i in range(1, data.n_items + 1) if len(who[i])]
    total, parts = judge.rewards(items, [answers[i] for i in items], [shown[i] for i in items], [audience[i] for i in items],
                                 period, seed)
    return {"grounded": float(parts["grounded"].mean()), "format_ok": float(parts["format_ok"].mean()),
            "mean_tokens": float(np.mean([len(tokenizer(a)["input_ids"]) for a in answers[1:]])),
            "mean_reward": float(total.mean())}


def truth_figures(data, answers) -> dict:
    """Demo: of the aspects named, how many are drivers at the end of train (chance .4); of the drivers, how many are named."""
    named = [set(D.parse_answer(a)[1]) for a in answers[1:]]
    hits = sum(len(n & set(t)) for n, t in zip(named, data.truth["late"][1:]))
    return {"truth_precision": hits / max(1, sum(map(len, named))),
            "truth_recall": hits / sum(map(len, data.truth["late"][1:]))}


def features_of(arm, data, encode, kinds, seed):
    """Item features (n_items + 1, F) of an arm: whitened vectors of the item's text, beside those of its reason."""
    def table(texts):
        raw = encode(texts)
        return torch.cat([torch.zeros(1, (w := reward.Whitening(raw)(raw)).shape[1]), w])
    content = table([D.item_text(item) for item in data.items[1:]])
    if arm == "content":
        return content
    if arm == "oracle":
        reasons = [D.REASON.format(*t) for t in data.truth["late"][1:]]
    else:
        reasons = [D.parse_answer(a)[0] for a in kinds["curec" if arm == "placebo" else arm][1:]]
    if arm == "placebo":
        reasons = [reasons[i] for i in np.random.default_rng([seed, 61]).permutation(len(reasons))]
    return torch.cat([content, table([D.mask_identity(data, r) for r in reasons])], 1)


def arms_table(m: dict) -> str:
    columns = ("hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")
    rows = ["| arm | seeds | " + " | ".join(c.upper() for c in columns) + " | valid NDCG@10 | ms/user |",
            "|---|---|" + "---|" * (len(columns) + 2)]
    for arm, e in m["arms"].items():
        rows.append(f"| {arm} | {len(e['seeds'])} | " + " | ".join(f"{np.mean(e['test'][c]):.4f}" for c in columns)
                    + f" | {np.mean(e['valid']['ndcg@10']):.4f} | {e['rank_ms_per_user']:.3f} |")
    return "\n".join(rows)


def report(s: Settings, data, m: dict, reasons: list, log: list) -> str:
    d, parts = m["dataset"], []
    parts.append(f"# CURec on {d['name']}\n\n{d['users']:,} users, {d['items']:,} items, {d['interactions']:,} interactions, ties: "
                 f"{d['ties']}. LLM: {s.llm}" + (" (trained from nothing on this data set's own texts)" if s.llm == "tiny" else "")
                 + ("\n\n**Quick run: these figures mean nothing.**" if s.quick else ""))
    parts += [f"- {note}" for note in data.notes]
    parts.append("## Ranking, test, whole catalogue, seen items masked, mean of the seeds\n\n" + arms_table(m))
    if m["comparisons"]:
        parts.append("## Differences in NDCG@10, paired over users, 95 % interval\n\n| a - b | delta | interval |\n|---|---|---|\n" + "\n".join(
            f"| {c['a']} - {c['b']} | {c['delta']:+.4f} | {c['ci95'][0]:+.4f} .. {c['ci95'][1]:+.4f} |" for c in m["comparisons"]))
    if "headroom" in m:
        parts.append(f"Headroom (oracle - content): {m['headroom']['ndcg@10']:+.4f}; recovered: "
                     + ", ".join(f"{a} {r:.0%}" for a, r in m["headroom"]["recovered"].items()))
    sliced = [(arm, n, e["slices"][n]) for arm, e in m["arms"].items() for n in e["slices"]]
    parts.append("## Slices and popularity audit\n\n| arm | slice | NDCG@10 |\n|---|---|---|\n" + "\n".join(
        f"| {a} | {n} | {np.mean(v['ndcg@10']):.4f} |" for a, n, v in sliced)
        + "\n\n| arm | coverage@10 | Gini@10 | mean popularity rank@10 |\n|---|---|---|---|\n" + "\n".join(
        f"| {a} | " + " | ".join(f"{x:.3f}" for x in e["audit"].values()) + " |" for a, e in m["arms"].items()))
    if reasons:
        keys = sorted({k for v in m["reasons"].values() for k in v})
        parts.append("## Reasons\n\n| kind | " + " | ".join(keys) + " |\n|---|" + "---|" * len(keys) + "\n" + "\n".join(
            f"| {kind} | " + " | ".join(f"{v[k]:.3f}" for k in keys) + " |" for kind, v in m["reasons"].items()))
        parts.append("Reward model: " + ", ".join(f"{k} {v:.3f}" for k, v in m["reward"].items()) + ". PPO on held-out prompts: reward "
                     f"{m['ppo']['reward_before']:+.3f} before, {m['ppo']['reward_after']:+.3f} after {m['ppo']['updates']} updates.")
        step = max(1, len(log) // 20)
        low, high = min(r["reward"] for r in log), max(r["reward"] for r in log)
        parts.append("PPO, mean reward over the reference reason, by update:\n\n```\n" + "\n".join(
            f"{r['update']:4d} {r['reward']:+.3f} {'#' * round(1 + 40 * (r['reward'] - low) / max(high - low, 1e-9))}" for r in log[::step]) + "\n```")
        parts.append("## Correction, window by window\n\n| window | items | accepted | reward before | after | false-accept rate |\n|---|---|---|---|---|---|\n"
                     + "\n".join(f"| {c['window']} | {c['items']} | {c['accepted']} | {c['reward_before']:+.3f} | {c['reward_after']:+.3f} | "
                                 f"{c['false_accept_rate']:.2f} |" for c in m["correction"])
                     + "\n\nFalse-accept rate: the same test with the signs of the paired gains drawn at random.")
        moved = sorted((r for r in reasons if r["timeline"]), key=lambda r: -sum(t["accepted"] for t in r["timeline"]))[:2]
        parts.append("## Two reasons and how they came about\n\n" + "\n\n".join(timeline(r) for r in moved))
        gain = lambda r: r["timeline"][-1]["reward_after"]
        ranked = sorted((r for r in reasons if r["timeline"]), key=gain)
        parts.append("## Best and worst last proposals, by reward\n\n" + "\n".join(
            f"- {gain(r):+.2f} **{r['title']}**: {r['timeline'][-1]['proposal']}" for r in ranked[::-1][:5] + ranked[:5]))
    parts.append("## Time\n\n" + ", ".join(f"{k} {v:.0f} s" for k, v in m["time_s"].items()) + f"; peak memory {m['peak_memory_mb']}")
    return "\n\n".join(parts) + "\n"


def timeline(r: dict) -> str:
    steps = [f"- until {time.strftime('%Y-%m-%d', time.gmtime(t['window_end']))}: {'accepted' if t['accepted'] else 'rejected'} "
             f"\"{t['proposal']}\" (reward {t['reward_before']:+.2f} -> {t['reward_after']:+.2f})" for t in r["timeline"]]
    return f"**{r['title']}** ({r['item']}): {r['reason']}\n" + "\n".join(steps)


# --------------------------------------------------------------------------------------------------------- the run
def pipeline(s: Settings):
    begin, times = time.perf_counter(), {}
    run, arms, log = open_run(s), s.arms.split(","), []
    data = D.load(s.dataset, s.data_dir, seed=s.seed, ties=s.ties, k_core=None if s.k_core < 0 else s.k_core,
                  limit_items=s.limit_items, limit_users=s.limit_users, small=s.quick)
    times["load"] = time.perf_counter() - begin
    interactions = sum(map(len, data.seqs))
    print(f"{data.name}: {len(data.users):,} users, {data.n_items:,} items, {interactions:,} interactions")
    for note in data.notes:
        print(f"  note: {note}")
    cuts, who, period = window_cuts(data, s.windows), D.choosers(data), None
    period = (cuts[0], cuts[-1])
    versions = {p: __import__("importlib.metadata").metadata.version(p) for p in
                ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "tqdm")}
    config = {"settings": {k: v for k, v in asdict(s).items() if k != "resume"}, "windows": cuts, "versions": versions,
              "git_commit": git_commit(), "hardware": {"machine": platform.machine(), "processor": platform.processor(), "cpus": os.cpu_count(),
              "gpu": torch.cuda.get_device_name() if s.device.startswith("cuda") else None}, "python": platform.python_version()}
    write(os.path.join(run, "config.json"), json.dumps(config, indent=1))
    m = {"dataset": {"name": data.name, "users": len(data.users), "items": data.n_items, "interactions": interactions, "ties": s.ties},
         "arms": {}, "comparisons": []}
    encode, kinds, reasons = None, {}, []
    with_reasons = bool(REASON_ARMS & set(arms))
    if LLM_ARMS & set(arms) and (with_reasons or not s.encoder):
        print("[1/5] LLM: base and supervised alignment")
        start = time.perf_counter()
        path = tiny_llm(s, data) if s.llm == "tiny" else s.llm
        times["tiny_llm"] = time.perf_counter() - start
        torch.manual_seed(s.seed)
        model, tokenizer = rl.load(path, s.device, checkpointing=s.device.startswith("cuda"))
        write(os.path.join(run, "config.json"), json.dumps(config | {"llm_path": os.path.abspath(path) if s.llm == "tiny" else path}, indent=1))
        encode = lambda texts: rl.encode(model, tokenizer, texts)
    if s.encoder:
        encode = rl.load_encoder(s.encoder, s.device)
    if with_reasons:
        kinds, timelines, log, judge = method(s, data, model, tokenizer, encode, who, cuts, times, run, m)
        for i in range(1, data.n_items + 1):
            reasons.append({"item": data.items[i]["id"], "title": data.items[i]["title"],
                            **{k: D.parse_answer(kinds[k][i])[0] for k in ("aligned", "rl")}, "timeline": timelines[i],
                            "reason": D.parse_answer(kinds["curec"][i])[0]})
        write(os.path.join(run, "reasons.jsonl"), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in reasons))
    print("[5/5] downstream: the arms, same seeds and budget")
    features = lambda arm: features_of(arm, data, encode, kinds, s.seed) if arm in LLM_ARMS else None
    slices, ranks = recommender.slices_of(data), {}
    start = time.perf_counter()
    for arm in arms:
        def work(arm=arm):
            r, entry, first = recommender.run_arm(arm, data, features(arm), slices, seeds=s.seeds, base_seed=s.seed, epochs=s.epochs,
                                                  device=s.device)
            return {"ranks": torch.from_numpy(r), "entry": entry, "model": first.state_dict() if first else {}}
        done = stage(run, f"arm-{arm}", {}, work)
        ranks[arm], m["arms"][arm] = done["ranks"].numpy(), done["entry"]
        print(f"  {arm:10s} NDCG@10 {np.mean(done['entry']['test']['ndcg@10']):.4f}")
    times["downstream"] = time.perf_counter() - start
    m["comparisons"] = recommender.compare(ranks, COMPARISONS)
    if {"oracle", "content"} <= set(arms):
        value = {a: float(np.mean(e["test"]["ndcg@10"])) for a, e in m["arms"].items()}
        room = value["oracle"] - value["content"]
        m["headroom"] = {"ndcg@10": room, "recovered": {a: (value[a] - value["content"]) / room for a in REASON_ARMS & set(arms)}}
    if with_reasons and data.truth:                                      # the truth, read last, feeds nothing
        for kind in m["reasons"]:
            m["reasons"][kind] |= truth_figures(data, kinds[kind])
        late = [w[data.events["time"][w] >= (cuts[0] + cuts[-1]) // 2] for w in who]
        m["reward"]["driver_choice"] = reward.driver_choice(judge, data.truth["late"], late, period, s.seed, range(1, data.n_items + 1))
    times["total"] = time.perf_counter() - begin
    m["time_s"] = times
    m["peak_memory_mb"] = {"ram": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if s.device.startswith("cuda"):
        m["peak_memory_mb"]["gpu"] = torch.cuda.max_memory_allocated() / 2 ** 20
    write(os.path.join(run, "metrics.json"), json.dumps(m, indent=1))
    write(os.path.join(run, "report.md"), report(s, data, m, reasons, log))
    print("\n" + arms_table(m) + (f"\n\nquick run: these figures mean nothing" if s.quick else ""))
    print(f"\nreport: {os.path.join(run, 'report.md')}")


def method(s, data, model, tokenizer, encode, who, cuts, times, run, m):
    """Stages 1 to 4 and the reasons; fills m["reward"], m["ppo"], m["correction"] and m["reasons"]."""
    def align():
        rl.use(model, "align", trainable=True)
        samples = D.alignment_samples(data, 8000, np.random.default_rng([s.seed, 59]), reason_share=0.7)
        loss = rl.supervise(model, tokenizer, samples, rl.trainable(model), steps=s.align_steps, micro_batch=s.micro_batch,
                            lr=1e-3 if s.llm == "tiny" else 2e-4, seed=s.seed)
        model.save_pretrained(run, selected_adapters=["align"])
        return loss
    stage(run, "align", times, align)
    rl.restore(model, run, "align")
    print("[2/5] reward model")
    judge = reward.Judge(data, encode)
    fit = stage(run, "reward", times, lambda: {"report": judge.fit(seed=s.seed), "weights": judge.model.state_dict()})
    judge.model.load_state_dict(fit["weights"])
    judge.remember()
    m["reward"] = {"auc_heldout": fit["report"]["auc_heldout"]}
    print("[3/5] PPO")
    rl.add_policy(model)
    log_path = os.path.join(run, "ppo.jsonl")

    def learn():
        write(log_path, "")
        out = reinforce(s, data, model, tokenizer, judge, who, cuts, log_path)
        model.save_pretrained(run, selected_adapters=["policy"])
        return out
    m["ppo"] = stage(run, "ppo", times, learn)
    rl.restore(model, run, "policy")
    with open(log_path) as f:
        log = [json.loads(line) for line in f]
    print("[4/5] reasons and chronological correction")
    out = stage(run, "correct", times, lambda: write_reasons(s, data, model, tokenizer, judge, who, cuts))
    m["correction"] = out["correction"]
    m["reasons"] = {k: reason_figures(data, judge, who, v, (cuts[0], cuts[-1]), s.seed, tokenizer) for k, v in out["kinds"].items()}
    return out["kinds"], out["timelines"], log, judge


def main(argv=None) -> int:
    try:
        s, run, user = parse_args(argv)
        if run:
            explain(run, user)
        else:
            pipeline(resolve(s))
        return 0
    except (UsageError, D.DataError) as e:
        print(f"curec.py: error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"curec.py: error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
