"""Are the reasons true, and do they help? Five demo worlds, three downstream seeds each, pooled
with intervals.

    python tests/bench/bench_reasons.py worlds      the whole demo with --seed 0 .. 4: judge, truth,
                                                    ranking, correction, hacking
    python tests/bench/bench_reasons.py baselines   PPO with a critic, with a group baseline, and
                                                    after an alignment without knowledge tasks
    python tests/bench/bench_reasons.py curve       NDCG@10 over the truth of reasons: the oracle's
                                                    drivers, made wrong step by step
    python tests/bench/bench_reasons.py limit       the best possible ranking, by exact filtering

    python tests/bench/bench_reasons.py PART --quick --worlds 0         minutes: does it run?

Results go to bench_reasons.json beside this file; figures.py draws them. Resumable: what lies in
runs/bench/reasons is not repeated. Delete that folder after a change of code. --quick writes to
runs/bench/quick alone, and checks the filter of `limit` by brute force.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from dataclasses import replace

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np
import torch

import curec
import data as D
import recommender as rec
import reward
import rl

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by number of worlds
METRICS = ("ndcg@10", "hr@50", "ndcg@50")
FAMILIES = {"with IDs": "", "without IDs": "-only"}  # how the names of their arms end
KINDS = ("aligned", "rl", "bestof", "curec")
# differences of the judge's figures, and of the truth of reasons beside those to counted ones
OF_JUDGE = (
    ("auc_heldout", "auc_untrained"),
    ("driver_choice", "driver_choice_untrained"),
    ("best_pairs", "best_pairs_untrained"),
    ("driver_choice", "driver_choice_round_1"),
    ("best_pairs", "best_pairs_round_1"),
    ("best_pairs", "best_pairs_round_2"),
)
OF_TRUTH = (("rl", "aligned"), ("curec", "rl"), ("curec", "bestof"))
WAYS = (
    "truth",
    "echo of a history",
    "the title alone",
    "every aspect",
    "empty",
    "another item's reason",
)
# --baseline, and the alignment samples
VARIANTS = {
    "group": ("group", curec.ALIGNMENT),
    "without tasks": ("critic", replace(curec.ALIGNMENT, reason_share=1.0)),
}
TRUTHS = (0.4, 0.65, 0.78, 0.9, 1.0)  # of the curve; two of five at random: .4


# ----------------------------------------------------------------------------------- finished runs
def finished_run(args, seed: int) -> pathlib.Path:
    """The folder of a finished run of the demo, made or taken up where it stopped. In a process of
    its own: its peak memory is that of the run."""
    out = args.folder / f"world-{seed}"
    if not (out / "metrics.json").exists():
        command = [sys.executable, str(HERE.parents[2] / "curec.py"), "--dataset", "demo"]
        command += ["--seed", str(seed), "--out", str(out), "--resume"]
        if args.quick:
            command.append("--quick")
        subprocess.run(command, check=True)
    return out


def finished_worlds(args) -> list:
    return [finished_run(args, seed) for seed in args.worlds]


def read(out: pathlib.Path, name: str):
    """A file of a run: JSON, or a list of a JSON value a line."""
    text = (out / name).read_text()
    if name.endswith(".json"):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


def stage(out: pathlib.Path, name: str, key: str = "value"):
    """What a stage of a run gave, or its "seconds"."""
    return torch.load(out / f"state/{name}.pt", weights_only=True)[key]


@functools.cache
def per_user(out: pathlib.Path, arm: str, metric: str = "ndcg@10") -> np.ndarray:
    """A metric of each user in a run's arm, mean of the seeds."""
    fits = sorted((out / "state").glob(f"arm-{arm}.*.pt"))
    ranks = np.stack([stage(out, fit.stem)["ranks"].numpy() for fit in fits])
    return rec.metrics(ranks)[metric].mean(0)


def of_users(runs: list, arm: str, metric: str = "ndcg@10") -> list:
    """per_user, of every run."""
    return [per_user(out, arm, metric) for out in runs]


class World:
    """A finished run opened again: settings, data, windows, LLM, encoder, judge."""

    def __init__(self, out: pathlib.Path):
        config = read(out, "config.json")
        self.settings = curec.Settings(**config["settings"])
        self.cuts = config["windows"]
        self.data = curec.load_data(self.settings)
        path = curec.llm_path(curec.Run(self.settings), self.data)
        self.llm, self.encode = curec.open_llm(self.settings, path)
        self.judge = reward.Judge(self.data, self.encode, self.settings.seed)
        self.judge.load_weights(stage(out, "reward")["weights"][-1])


def phrases_of(answers: list) -> list:
    """The phrases that each answer names."""
    return [D.parse_answer(answer)[1] for answer in answers]


# -------------------------------------------------------------------------------------- statistics
def over_worlds(values) -> dict:
    """Mean and 95 % t-interval over worlds, without the interval for one."""
    x = np.array(values, float)
    out = {"mean": float(x.mean())}
    if len(x) in T_975:
        half = T_975[len(x)] * x.std(ddof=1) / len(x) ** 0.5
        out["t95"] = [float(x.mean() - half), float(x.mean() + half)]
    return out | {"worlds": x.tolist()}


def each_over_worlds(rows: list) -> dict:
    """Dicts of numbers, one a world, as one dict."""
    return {name: over_worlds([row[name] for row in rows]) for name in rows[0]}


def pooled(differences: list) -> dict:
    """Mean of per-user (or per-item) differences of all worlds, an array each, its 95 % bootstrap
    interval, and the t-interval over worlds."""
    every = np.concatenate(differences)[None]
    delta, ci = rec.paired_bootstrap(every, np.zeros_like(every)).values()
    by_world = over_worlds([d.mean() for d in differences])
    del by_world["mean"]
    return {"delta": delta, "ci95": ci} | by_world


def minus(a: list, b: list) -> list:
    """The differences of numbers or arrays, world by world."""
    return [x - y for x, y in zip(a, b, strict=True)]


def save(args, part: str, value, runs: list) -> None:
    """Into the JSON, with the commits that the runs were made at, and the epochs that the rounds of
    each judge chose (0: the untrained one won on held-out people and items)."""
    known = json.loads(args.json.read_text()) if args.json.exists() else {}
    chosen = {}
    for out in runs:
        chosen[out.name] = [row["best_epoch"] for row in stage(out, "reward")["rounds"]]
    known[part] = {
        "command": f"python tests/bench/bench_reasons.py {part}",
        "commit": curec.description(curec.Settings(device="cpu"), [])["git_commit"],
        "commits of the runs": sorted({read(out, "config.json")["git_commit"] for out in runs}),
        "best epochs of the judge": chosen,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "results": value,
    }
    rl.write_atomically(args.json, json.dumps(known, indent=1) + "\n")
    print(json.dumps(value, indent=1))


# ------------------------------------------------------------------------------------ part: worlds
def worlds(args) -> None:
    """All figures of whole runs."""
    runs = finished_worlds(args)
    metrics = [read(out, "metrics.json") for out in runs]
    hacks = [hacking(World(out)) for out in runs]
    rounds = [stage(out, "reward")["rounds"] for out in runs]
    value = {
        "arms": arm_figures(metrics),
        "differences": arm_differences(runs, metrics[0]["arms"]),
        "headroom": {family: headroom(runs, ending) for family, ending in FAMILIES.items()},
        "reasons": of_each([m["reasons"] for m in metrics]),
        "counted reasons": of_each([m["counted_reasons"] for m in metrics]),
        "truth, differences": truth_differences(metrics),
        "new driver, curec - bestof": pooled([new_driver_gains(out) for out in runs]),
        "judge": each_over_worlds([m["reward"] for m in metrics]),
        "judge, rounds": [each_over_worlds(rows) for rows in zip(*rounds, strict=True)],
        "judge, differences": judge_differences(metrics),
        "hacking": of_each(hacks),
        "correction": [m["correction"] for m in metrics],
        "ppo": each_over_worlds([m["ppo"] for m in metrics]),
        "ppo, fifths": [fifths_of_ppo(out) for out in runs],
        "ppo course": ppo_course(runs[0]),
        "time_s": each_over_worlds([m["time_s"] for m in metrics]),
        "peak_memory_mb": each_over_worlds([m["peak_memory_mb"] for m in metrics]),
    }
    save(args, "worlds", value, runs)


def of_each(rows: list) -> dict:
    """Dicts of dicts of numbers, one a world, as one."""
    return {name: each_over_worlds([row[name] for row in rows]) for name in rows[0]}


def arm_figures(metrics: list) -> dict:
    """Each arm's metrics on test."""
    out = {}
    for arm in metrics[0]["arms"]:
        out[arm] = {}
        for name in METRICS:
            means = [np.mean(m["arms"][arm]["test"][name]) for m in metrics]
            out[arm][name] = over_worlds(means)
    return out


def arm_differences(runs: list, arms) -> dict:
    """What the arms are better by than those that ARMS compares them with."""
    pairs = [(a, b) for a in arms for b in rec.ARMS[a].against if b in arms]
    out = {}
    for metric in METRICS[:2]:
        out[metric] = {}
        for a, b in [*pairs, ("rl", "placebo"), ("rl-only", "placebo-only")]:
            gains = minus(of_users(runs, a, metric), of_users(runs, b, metric))
            out[metric][f"{a} - {b}"] = pooled(gains)
    return out


def headroom(runs: list, ending: str) -> dict:
    """oracle - content of a family of arms, and the share of it that each arm with reasons
    recovers: of all worlds' users together, with a 95 % bootstrap interval, and by world."""
    content = of_users(runs, "content" + ending)
    room = minus(of_users(runs, "oracle" + ending), content)
    out = {"oracle - content": pooled(room), "recovered": {}}
    for arm in ("placebo", *KINDS):
        gain = minus(of_users(runs, arm + ending), content)
        out["recovered"][arm + ending] = share(gain, room)
    return out


def share(gain: list, room: list) -> dict:
    """gain / room, arrays a world of a value a user."""
    by_world = [float(g.mean() / r.mean()) for g, r in zip(gain, room, strict=True)]
    gain, room = np.concatenate(gain), np.concatenate(room)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(2000):
        rows = rng.integers(len(room), size=len(room))
        draws.append(gain[rows].mean() / room[rows].mean())
    ci95 = np.percentile(draws, [2.5, 97.5]).tolist()
    pooled_share = {"share": float(gain.mean() / room.mean()), "ci95": ci95}
    return pooled_share | {"over worlds": over_worlds(by_world)}


def truth_differences(metrics: list) -> dict:
    """How much truer one kind of reasons is than another, and than what counting writes."""
    truth = {}
    for kind in KINDS:
        truth[kind] = [m["reasons"][kind]["truth_precision"] for m in metrics]
    controls = list(metrics[0]["counted_reasons"])
    for name in controls:
        truth[name] = [m["counted_reasons"][name]["truth_precision"] for m in metrics]
    pairs = [*OF_TRUTH, *(("rl", name) for name in controls)]
    return {f"{a} - {b}": over_worlds(minus(truth[a], truth[b])) for a, b in pairs}


def judge_differences(metrics: list) -> dict:
    """What training, and its later rounds, taught the judge."""
    out = {}
    for a, b in OF_JUDGE:
        out[f"{a} - {b}"] = over_worlds([m["reward"][a] - m["reward"][b] for m in metrics])
    return out


def new_driver_gains(out: pathlib.Path) -> np.ndarray:
    """For every item of a run whose driver changed: does its reason name the new one? That of
    curec less that of bestof."""
    truth = curec.load_data(curec.Settings(**read(out, "config.json")["settings"])).truth
    written = [D.ANSWER.format("", line["reason"]) for line in read(out, "reasons.jsonl")]
    curec_names = reward.names_new_driver(phrases_of(["", *written]), truth)
    bestof_names = reward.names_new_driver(phrases_of(stage(out, "bestof")), truth)
    return np.array(curec_names, float) - np.array(bestof_names, float)


def fifths_of_ppo(out: pathlib.Path) -> dict:
    """The course of PPO: means of a fifth of the updates each; least values."""
    log = read(out, "ppo.jsonl")
    found = {}
    for name in ("reward", "kl", "entropy", "distinct", "grounded", "format_ok"):
        fifths = np.array_split([row[name] for row in log], 5)
        found[name] = [float(np.mean(part)) for part in fifths if len(part)]
    found["least"] = {name: min(row[name] for row in log) for name in ("grounded", "format_ok")}
    return found


def hacking(world: World) -> dict:
    """Mean reward of true reasons, and of five ways to cheat, for the same items and people; how
    often and by how much the truth earns more; and all without the penalties for format and for
    words that the item does not say ("bare")."""
    data = world.data
    shown, audience = curec.one_shot_people(data, world.settings.seed)
    items = [i for i in range(1, data.n_items + 1) if len(shown[i]) >= 2]
    people = [shown[i] for i in items], [audience[i] for i in items], reward.TRAIN_TIME
    drivers = data.truth["late"]
    rng = np.random.default_rng(0)
    reasons = {way: [] for way in WAYS}
    for i in items:
        last = data.history(shown[i][0])[-1]
        other = next(j for j in rng.permutation(items) if set(drivers[j]) != set(drivers[i]))
        texts = (
            D.REASON.format(*drivers[i]),
            D.REASON.format(*data.phrases[last][:2]),
            data.titles[i],
            D.REASON_START + " and ".join(data.phrases[i]),
            "",
            D.REASON.format(*drivers[other]),
        )
        for way, text in zip(WAYS, texts, strict=True):
            reasons[way].append(D.ANSWER.format("by hand", text))
    earned = {}
    out = {}
    for way, answers in reasons.items():
        found = reward.rewards(world.judge, items, answers, *people)
        earned[way] = {"reward": found.total, "bare": (found.shown + found.audience) / 2}
        out[way] = {}
        for name, values in earned[way].items():
            out[way][f"{name} mean"] = float(values.mean())
            if way != "truth":
                less = earned["truth"][name] - values
                out[way][f"{name} truth earns more, share"] = float((less > 0).mean())
                out[way][f"{name} truth earns more, by"] = float(less.mean())
    return out


# --------------------------------------------------------------------------------- part: baselines
def baselines(args) -> None:
    """PPO alone, otherwise as in the finished worlds: with a group baseline in place of the critic,
    and with a critic after an alignment that had no tasks of recommendation knowledge."""
    runs = finished_worlds(args)
    rows = {"critic": [policy_figures(out) for out in runs]}
    for variant in VARIANTS:
        rows[variant] = [policy_figures(taught(out, variant)) for out in runs]
    value = {variant: each_over_worlds(mine) for variant, mine in rows.items()}
    for variant in VARIANTS:
        differences = []
        for one, critic in zip(rows[variant], rows["critic"], strict=True):
            differences.append({name: one[name] - critic[name] for name in one})
        value[f"{variant} - critic"] = each_over_worlds(differences)
    save(args, "baselines", value, runs)


def begin_again(world: World, out: pathlib.Path, folder: str, copied: tuple, **other) -> curec.Run:
    """A run folder beside that of a finished run, with its config.json, other settings and some of
    its stages."""
    new = out.with_name(folder)
    (new / "state").mkdir(parents=True, exist_ok=True)
    for name in copied:
        shutil.copytree(out / name, new / name, dirs_exist_ok=True)
        shutil.copy(out / f"state/{name}.pt", new / f"state/{name}.pt")
    run = curec.Run(replace(world.settings, out=str(new), **other))
    description = curec.description(run.settings, world.cuts)
    rl.write_atomically(new / "config.json", json.dumps(description, indent=1))
    return run


def taught(out: pathlib.Path, variant: str) -> pathlib.Path:
    """The folder of a variant's PPO in a finished world: its metrics.json holds what policy_figures
    needs. Data, tiny LLM and judge are those of the world, and so is the adapter `align` where it
    had the same samples."""
    baseline, mix = VARIANTS[variant]
    same = mix == curec.ALIGNMENT
    folder = out.name.replace("world", variant.replace(" ", "-"))
    if (out.with_name(folder) / "metrics.json").exists():
        return out.with_name(folder)
    world = World(out)
    data, llm, judge = world.data, world.llm, world.judge
    run = begin_again(world, out, folder, ("align",) if same else (), baseline=baseline)
    s = run.settings
    curec.train_adapter(run, data, llm, "align", s.align_steps, mix)
    curec.reinforce(run, data, llm, judge, world.cuts)
    shown, _ = curec.one_shot_people(data, s.seed)
    prompts = [D.reason_prompt(data, i, "", shown[i]) for i in range(1, data.n_items + 1)]
    reasons = {}
    for kind, adapter in (("aligned", "align"), ("rl", "policy")):
        reasons[kind] = ["", *curec.ask(llm, adapter, prompts, curec.sampling(s), kind)]
    figures = curec.reason_figures(data, llm, judge, reasons)
    for kind, answers in reasons.items():
        figures[kind] |= reward.truth_figures(phrases_of(answers), data.truth)
    found = {"ppo": run.metrics["ppo"], "reasons": figures}
    rl.write_atomically(run.folder / "metrics.json", json.dumps(found, indent=1))
    return run.folder


def policy_figures(out: pathlib.Path) -> dict:
    """What PPO of a run taught, and what it took."""
    m = read(out, "metrics.json")
    log = read(out, "ppo.jsonl")
    row = m["reasons"]["rl"] | {"aligned truth": m["reasons"]["aligned"]["truth_precision"]}
    row |= {"heldout before": m["ppo"]["reward_before"], "heldout after": m["ppo"]["reward_after"]}
    row |= {"kl": m["ppo"]["kl"], "entropy at the end": log[-1]["entropy"]}
    row["explained_variance"] = float(np.mean([update["explained_variance"] for update in log]))
    row["answers"] = len(log) * read(out, "config.json")["settings"]["ppo_batch"]
    row["ppo_s"] = stage(out, "ppo", "seconds")
    # a critic's scores are less the rewards of answers of `align` to the same prompts
    row["reference answers"] = row["reference_s"] = 0
    if (out / "state/reference.pt").exists():
        row["reference answers"] = len(stage(out, "reference"))
        row["reference_s"] = stage(out, "reference", "seconds")
    gain = row["heldout after"] - row["heldout before"]
    every = row["answers"] + row["reference answers"]
    row["gain"] = gain
    row["gain per 1,000 answers"] = 1000 * gain / row["answers"]
    row["gain per 1,000 answers, reference too"] = 1000 * gain / every
    row["gain per minute"] = 60 * gain / (row["ppo_s"] + row["reference_s"])
    return row


def ppo_course(out: pathlib.Path) -> dict:
    """PPO of a finished world once more, now with the truth of the answers it samples, which feeds
    nothing: a list of a figure an update each."""
    new = out.with_name(out.name.replace("world", "course"))
    if not (new / "state/after.pt").exists():
        world = World(out)
        run = begin_again(world, out, new.name, ("align",))
        rl.restore_adapter(world.llm[0], new, "align")
        train, _ = curec.practice_questions(world.data, world.cuts, world.settings.seed)
        plain = rl.ppo
        rl.ppo = functools.partial(watched_ppo, plain, train, world.data.truth)
        try:
            curec.reinforce(run, world.data, world.llm, world.judge, world.cuts)
        finally:
            rl.ppo = plain
    log = read(new, "ppo.jsonl")
    names = ("reward", "kl", "truth_precision", "distinct")
    columns = {name: [row[name] for row in log] for name in names}
    same = columns["reward"] == [row["reward"] for row in read(out, "ppo.jsonl")]
    return {"world": out.name, "rewards equal those of its run": same} | columns


def watched_ppo(ppo, questions, truth, *given):
    """rl.ppo(*given) with the truth of an update's answers in its log: the share of the phrases
    named that are drivers at the end of train."""
    *first, reward_fn, config, checkpoint = given

    def watched(texts, rows):
        total, figures = reward_fn(texts, rows)
        drivers = [truth["late"][questions[k].item] for k in rows]
        named = [set(phrases) for phrases in phrases_of(texts)]
        hits = sum(len(n & set(d)) for n, d in zip(named, drivers, strict=True))
        return total, figures | {"truth_precision": hits / max(1, sum(map(len, named)))}

    return ppo(*first, watched, config, checkpoint)


# ------------------------------------------------------------------------------------- part: curve
def curve(args) -> None:
    """NDCG@10 over the truth of reasons, in both families of arms, one downstream seed a world;
    beside it the arms without reasons and with the reasons of the finished runs, three seeds."""
    runs = finished_worlds(args)
    fits = [corrupted_fits(args, out) for out in runs]
    value = {"truth": {}, "kinds": {}}
    for q in TRUTHS:
        value["truth"][q] = over_worlds([mine[q]["truth_precision"] for mine in fits])
    for kind in KINDS:
        figures = [read(out, "metrics.json")["reasons"][kind] for out in runs]
        value["kinds"][kind] = {"truth": over_worlds([row["truth_precision"] for row in figures])}
    for family, ending in FAMILIES.items():
        content = mean_ndcg(runs, "content" + ending)
        room = minus(mean_ndcg(runs, "oracle" + ending), content)
        value[family] = {"content": over_worlds(content)}
        for name in ("ndcg@10", "less content", "share of oracle - content"):
            value[family][name] = {}
        for q in TRUTHS:
            ndcg = [mine[q]["oracle" + ending] for mine in fits]
            gain = minus(ndcg, content)
            value[family]["ndcg@10"][q] = over_worlds(ndcg)
            value[family]["less content"][q] = over_worlds(gain)
            shares = over_worlds(np.divide(gain, room))
            value[family]["share of oracle - content"][q] = shares
        for kind in KINDS:
            value["kinds"][kind][family] = over_worlds(mean_ndcg(runs, kind + ending))
    save(args, "curve", value, runs)


def mean_ndcg(runs: list, arm: str) -> list:
    return [float(users.mean()) for users in of_users(runs, arm)]


def corrupted_fits(args, out: pathlib.Path) -> dict:
    """{q: {"truth_precision", NDCG@10 of "oracle" and of "oracle-only"}} in a finished world."""
    files = {q: args.folder / f"curve/{out.name}-{q}.json" for q in TRUTHS}
    todo = [q for q in TRUTHS if not files[q].exists()]
    if todo:
        world = World(out)
        s = replace(world.settings, arms="oracle,oracle-only")
        config = rec.TrainConfig(epochs=s.epochs, device=s.device)
        truths = {q: corrupted_truth(world.data, q, s.seed) for q in todo}
        inputs = {}
        for q, truth in truths.items():
            patched = replace(world.data, truth=truth)
            inputs[q] = curec.arm_inputs(s, patched, world.encode, {}, None)
        for q in todo:
            found = reward.truth_figures(truths[q]["late"], world.data.truth)
            row = {"truth_precision": found["truth_precision"]}
            jobs = [(arm, world.data, inputs[q][arm], config, s.seed) for arm in inputs[q]]
            for (arm, *_), fit in rec.fit_all(jobs, s.device, 2 * len(todo)):
                rank = fit()["ranks"].numpy()
                row[arm] = float(rec.metrics(rank)["ndcg@10"].mean())
            rl.write_atomically(files[q], json.dumps(row, indent=1))
    return {q: json.loads(file.read_text()) for q, file in files.items()}


def corrupted_truth(data: D.Dataset, q: float, seed: int) -> dict:
    """The truth with late drivers each of which is replaced, with probability 1 - q, by a decoy of
    the item. The same draws for every q: what is wrong at one is wrong at all that are lower."""
    rng = np.random.default_rng([seed, 101])
    named = [()]
    for drivers, phrases in zip(data.truth["late"][1:], data.phrases[1:], strict=True):
        decoys = rng.permutation([word for word in phrases if word not in drivers])
        wrong = rng.random(len(drivers)) >= q
        own = zip(drivers, decoys, wrong, strict=False)
        named.append(tuple(str(decoy) if is_wrong else driver for driver, decoy, is_wrong in own))
    return data.truth | {"late": named}


# ------------------------------------------------------------------------------------- part: limit
def limit(args) -> None:
    """The best possible ranking of the test events, and two that know less: what a dot product
    of a user's and an item's vector could know, and what the last item alone tells."""
    rows = []
    for seed in args.worlds:
        data = D.load("demo", seed=seed, small=args.quick)
        if args.quick:
            check_filter(data)
        row = {}
        for name, scores in informed_scores(data).items():
            values = rec.metrics(ranks_of(data, scores))
            row[name] = {metric: values[metric].mean() for metric in METRICS}
        rows.append(row)
    save(args, "limit", of_each(rows), [])


class Needs:
    """The hidden needs of the demo's users, as what it is possible to believe of them: (210,)
    probabilities of all ordered pairs of aspects. Knows circle, drivers and utility."""

    def __init__(self, data: D.Dataset):
        truth = data.truth
        aspects = len(D.ASPECTS)
        self.since = truth["since"][1]
        self.popularity = np.array(truth["popularity"])
        self.pairs = np.array(list(itertools.permutations(range(aspects), 2)))  # (210, 2)
        self.drives = []  # of each half of time: (n_items + 1, aspects)
        self.met = []  # which needs of a pair an item meets: (210, 2, n_items + 1)
        self.weight = []  # exp of the utility that data.demo describes: (210, n_items + 1)
        for half in ("early", "late"):
            drives = np.array([np.isin(D.ASPECTS, list(drivers)) for drivers in truth[half]])
            met = drives.T[self.pairs]
            matches = met.sum(1)
            weight = np.exp(6 * matches + 2 * (matches == 2) + self.popularity)
            weight[:, 0] = 0.0
            self.drives.append(drives)
            self.met.append(met)
            self.weight.append(weight)
        number = {tuple(pair): k for k, pair in enumerate(self.pairs.tolist())}
        follower = np.array(truth["follower"])
        self.moves = []  # which of the two move, and the pairs that they move to: (210,)
        for moving in itertools.product((False, True), repeat=2):
            after = [D.next_needs(pair, np.array(moving), follower) for pair in self.pairs]
            self.moves.append((moving, np.array([number[tuple(pair.tolist())] for pair in after])))

    def half(self, time) -> int:
        return int(time > self.since)

    def open_weight(self, time, seen):
        """The weight of what is left to choose: (210, n_items + 1), and its sum (210,)."""
        weight = self.weight[self.half(time)]
        return weight, weight.sum(1) - weight[:, seen].sum(1)

    def after(self, belief, item, time, seen):
        """The belief (210,) after a choice: Bayes' rule, then needs that were met may move on."""
        weight, total = self.open_weight(time, seen)
        belief = belief * weight[:, item] / total
        met = self.met[self.half(time)][:, :, item]
        moved = np.zeros(len(belief))
        for moving, places in self.moves:
            chance = np.where(moving, D.MOVES_ON, 1 - D.MOVES_ON)
            chance = np.where(met, chance, np.logical_not(moving)).prod(1)
            moved += np.bincount(places, belief * chance, len(belief))
        return moved / moved.sum()

    def predict(self, belief, time, seen):
        """The probability of each item, (n_items + 1,); what was seen is to be masked."""
        weight, total = self.open_weight(time, seen)
        return (belief / total) @ weight


def informed_scores(data: D.Dataset) -> dict:
    """Scores (users, n_items + 1) of the test events. "limit": probabilities, given all that came
    before; "additive": how probably the user needs each driver of an item, summed, which a dot
    product can say, while a pair that fits together is worth more than its parts; "last item": the
    probabilities given it alone."""
    needs = Needs(data)
    uniform = np.full(len(needs.pairs), 1 / len(needs.pairs))
    scores = {"limit": [], "additive": [], "last item": []}
    for seq, times in zip(data.seqs, data.times, strict=True):
        belief = uniform
        for k in range(len(seq) - 1):
            belief = needs.after(belief, seq[k], times[k], seq[:k])
        scores["limit"].append(needs.predict(belief, times[-1], seq[:-1]))
        needed = sum(np.bincount(column, belief, len(D.ASPECTS)) for column in needs.pairs.T)
        # of items with equal drivers the more popular first
        popular = 0.01 * needs.popularity
        scores["additive"].append(needs.drives[needs.half(times[-1])] @ needed + popular)
        belief = needs.after(uniform, seq[-2], times[-2], [])
        scores["last item"].append(needs.predict(belief, times[-1], []))
    return {name: torch.from_numpy(np.stack(rows)) for name, rows in scores.items()}


def ranks_of(data: D.Dataset, scores: torch.Tensor) -> np.ndarray:
    """The ranks of the test items, as of any arm."""

    def score(sequences, users):
        return scores[list(users)]

    return rec.ranks(score, [seq[:-1] for seq in data.seqs], data.test)


def check_filter(data: D.Dataset) -> None:
    """Needs against brute force: every path of the needs behind three choices of a user, just
    before and after drivers change, and the probabilities that it leaves for the fourth."""
    needs = Needs(data)
    late = data.times[0] > data.truth["since"][1]
    start = min(max(0, late.argmax() - 2), len(late) - 4)
    chosen = data.seqs[0][start : start + 4]
    times = data.times[0][start : start + 4]
    belief = np.full(len(needs.pairs), 1 / len(needs.pairs))
    paths = [(1.0, pair) for pair in needs.pairs]
    for k in range(3):
        belief = needs.after(belief, chosen[k], times[k], chosen[:k])
        longer = []
        for probability, pair in paths:
            chances, met = choice_chances(data, pair, times[k], chosen[:k])
            probability *= chances[chosen[k]]
            for moving in itertools.product((False, True), repeat=2):
                own = met[chosen[k]]
                if not any(move and not m for move, m in zip(moving, own, strict=True)):
                    follower = np.array(data.truth["follower"])
                    after = D.next_needs(pair, np.array(moving), follower)
                    longer.append((probability * D.MOVES_ON ** sum(own), after))
        paths = longer
    expected = np.zeros(data.n_items + 1)
    for probability, pair in paths:
        expected += probability * choice_chances(data, pair, times[3], chosen[:3])[0]
    expected /= sum(probability for probability, _ in paths)
    found = needs.predict(belief, times[3], chosen[:3])
    found[chosen[:3]] = 0.0
    assert np.allclose(found, expected, rtol=1e-9)


def choice_chances(data: D.Dataset, pair, time, seen) -> tuple:
    """What a user with these needs picks, as data.demo says it: (the probability of each item, with
    index 0; which of the needs each item meets)."""
    half = "late" if time > data.truth["since"][1] else "early"
    first, second = D.ASPECTS[pair]
    met = [(first in drivers, second in drivers) for drivers in data.truth[half]]
    matches = np.array([sum(own) for own in met])
    popularity = np.array(data.truth["popularity"])
    chances = np.exp(6 * matches + 2 * (matches == 2) + popularity)
    chances[[0, *seen]] = 0.0
    return chances / chances.sum(), met


# ------------------------------------------------------------------------------------ command line
PARTS = {part.__name__: part for part in (worlds, baselines, curve, limit)}


def main() -> None:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("part", choices=PARTS)
    seeds = "seeds of the demo worlds [0 1 2 3 4]"
    parser.add_argument("--worlds", type=int, nargs="+", default=list(range(5)), help=seeds)
    parser.add_argument("--quick", action="store_true", help="tiny runs; figures mean nothing")
    args = parser.parse_args()
    args.folder = pathlib.Path("runs/bench", "quick" if args.quick else "reasons")
    args.json = args.folder / "results.json" if args.quick else HERE.with_suffix(".json")
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
