"""Are the reasons true, and do they help? Five demo worlds, three downstream seeds each, pooled
with intervals.

    python tests/bench/bench_reasons.py worlds     the whole demo with --seed 0 .. 4: judge, truth,
                                                   ranking, correction, hacking
    python tests/bench/bench_reasons.py windows    1, 2, 4 and 8 windows with each world's policy
    python tests/bench/bench_reasons.py think      everything again without <think>, from the tiny
                                                   LLM on: same seeds and steps
    python tests/bench/bench_reasons.py reader     the arm `rl` if its LLM read the prompt
                                                   perfectly: counted instead of written
    python tests/bench/bench_reasons.py accepts    how many corrections made a reason truer, of
                                                   those accepted and of those rejected

    python tests/bench/bench_reasons.py PART --quick --worlds 0        minutes: does it run?

Results go to bench_reasons.json beside this file; those of worlds also without world 0, on which
choices were made. Resumable: what lies in runs/bench/reasons is not repeated. Delete that folder
after a change of code. --quick writes to runs/bench/quick alone.
"""

import argparse
import json
import os
import pathlib
import platform
import re
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
WAYS = (
    "truth",
    "echo of a history",
    "the title alone",
    "every aspect",
    "empty",
    "another item's reason",
)
TRUE_FIGURES = ("truth_precision", "mean_reward", "grounded", "format_ok", "mean_tokens")


# ----------------------------------------------------------------------------------- finished runs
def finished_run(args, name: str, seed: int, *flags) -> pathlib.Path:
    """The folder of a finished run of the demo, made or taken up where it stopped."""
    out = args.folder / name
    if not (out / "metrics.json").exists():
        command = ["--dataset", "demo", "--seed", str(seed), "--out", str(out), *flags]
        command += ["--quick"] * args.quick + ["--resume"] * (out / "config.json").exists()
        assert curec.command_line(command) == 0
    return out


def finished_worlds(args) -> list:
    return [finished_run(args, f"world-{seed}", seed) for seed in args.worlds]


def read(out: pathlib.Path, name: str):
    """A file of a run: JSON, or a list of a JSON value a line."""
    text = (out / name).read_text()
    if name.endswith(".json"):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


def stage(out: pathlib.Path, name: str):
    """What a stage of a run gave."""
    return torch.load(out / f"state/{name}.pt", weights_only=True)["value"]


def per_user(out: pathlib.Path, arm: str) -> np.ndarray:
    """NDCG@10 of each user in a run's arm, mean of the seeds."""
    fits = sorted((out / "state").glob(f"arm-{arm}.*.pt"))
    ranks = np.stack([stage(out, fit.stem)["ranks"].numpy() for fit in fits])
    return rec.metrics(ranks)["ndcg@10"].mean(0)


def open_data(out: pathlib.Path) -> D.Dataset:
    return curec.load_data(curec.Settings(**read(out, "config.json")["settings"]))


def truth_of(data) -> dict:
    """The demo's truth without index 0."""
    return {name: values[1:] for name, values in data.truth.items()}


def phrases_of(answers) -> list:
    """The phrases that each answer names, without index 0."""
    return [D.parse_answer(answer)[1] for answer in answers[1:]]


class World:
    """A finished run opened again: data, LLM with its adapters, judge."""

    def __init__(self, out: pathlib.Path):
        config = read(out, "config.json")
        self.settings = curec.Settings(**config["settings"])
        self.data, cuts = curec.load_data(self.settings), config["windows"]
        self.period = (cuts[0], cuts[-1])
        path = curec.llm_path(curec.Run(self.settings), self.data)
        self.llm, self.encode = curec.open_llm(self.settings, path)
        self.judge = reward.Judge(self.data, self.encode, self.settings.seed)
        self.judge.load_weights(stage(out, "reward")["weights"])
        rl.add_policy(self.llm[0])
        for adapter in ("align", "policy"):
            rl.restore_adapter(self.llm[0], out, adapter)

    def truth(self, answers) -> dict:
        return reward.truth_figures(phrases_of(answers), truth_of(self.data))


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
    """The differences of arrays, world by world."""
    return [x - y for x, y in zip(a, b, strict=True)]


def save(args, part: str, value, runs: list) -> None:
    """Into the JSON, with the commits that the runs were made at, and the epoch of each reward
    model (0: the untrained one won on held-out people and items)."""
    known = json.loads(args.json.read_text()) if args.json.exists() else {}
    known[part] = {
        "command": f"python tests/bench/bench_reasons.py {part}",
        "commits": sorted({read(out, "config.json")["git_commit"] for out in runs}),
        "judge": [stage(out, "reward")["report"]["best_epoch"] for out in runs],
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "results": value,
    }
    rl.write_atomically(args.json, json.dumps(known, indent=1) + "\n")
    print(json.dumps(value, indent=1))


# ------------------------------------------------------------------------------------ part: worlds
def worlds(args) -> None:
    runs = finished_worlds(args)
    hacks = [hacking(World(out)) for out in runs]
    value = {"all": everything(runs, hacks)}
    fresh = [k for k, seed in enumerate(args.worlds) if seed]
    if fresh:
        rest = everything([runs[k] for k in fresh], [hacks[k] for k in fresh])
        value["without world 0"] = rest
    save(args, "worlds", value, runs)


def hacking(world: World) -> dict:
    """Mean reward of true reasons, and of five ways to cheat, for the same items and people; how
    often the truth earns more; and both without the penalties for format and for words that the
    item does not say ("bare")."""
    data, seed = world.data, world.settings.seed
    shown, audience = curec.one_shot_people(data, seed)
    items = [i for i in range(1, data.n_items + 1) if len(shown[i]) >= 2]
    people = [shown[i] for i in items], [audience[i] for i in items], world.period
    drivers, rng = data.truth["late"], np.random.default_rng(0)
    reasons, earned, out = {way: [] for way in WAYS}, {}, {}
    for i in items:
        last = data.history(shown[i][0])[-1]
        other = next(j for j in rng.permutation(items) if set(drivers[j]) != set(drivers[i]))
        texts = (
            D.REASON.format(*drivers[i]),
            D.REASON.format(*data.phrases[last][:2]),
            data.titles[i],
            "people choose it for " + " and ".join(data.phrases[i]),
            "",
            D.REASON.format(*drivers[other]),
        )
        for way, text in zip(WAYS, texts, strict=True):
            reasons[way].append(D.ANSWER.format("by hand", text))
    for way, answers in reasons.items():
        found = reward.rewards(world.judge, items, answers, *people)
        earned[way] = {"reward": found.total, "bare": (found.shown + found.audience) / 2}
        out[way] = {}
        for kind, values in earned[way].items():
            out[way][f"{kind} mean"] = float(values.mean())
            if way != "truth":
                more = earned["truth"][kind] > values
                out[way][f"{kind} truth earns more"] = float(more.mean())
    return out


def everything(runs: list, hacks: list) -> dict:
    """All figures of the part worlds for these runs."""
    metrics = [read(out, "metrics.json") for out in runs]
    users = {arm: [per_user(out, arm) for out in runs] for arm in metrics[0]["arms"]}
    differences = {f"{a} - {b}": pooled(minus(users[a], users[b])) for a, b in pairs(users)}
    kinds, names = {}, [names_new_driver(out) for out in runs]
    for kind in metrics[0]["reasons"]:
        kinds[kind] = each_over_worlds([m["reasons"][kind] for m in metrics])
    return {
        "ndcg@10": {arm: over_worlds([x.mean() for x in by]) for arm, by in users.items()},
        "differences": differences,
        "headroom": pooled(minus(users["oracle"], users["content"])),
        "recovered": recovered(users, metrics),
        "reasons": kinds,
        "new driver named, curec - bestof": pooled([a - b for a, b in names]),
        "reward": each_over_worlds([m["reward"] for m in metrics]),
        "hacking": {way: each_over_worlds([h[way] for h in hacks]) for way in WAYS},
        "correction": [m["correction"] for m in metrics],
        "ppo": [ppo_figures(out, m) for out, m in zip(runs, metrics, strict=True)],
        "time_s": [m["time_s"] for m in metrics],
    }


def pairs(arms) -> list:
    """The arms that are compared with each other."""
    found = [(a, b) for a in arms for b in rec.ARMS[a].against if b in arms]
    return [*found, ("rl", "placebo")]


def recovered(users: dict, metrics: list) -> dict:
    """The share of the headroom that each arm recovers: of all worlds' users together, with a 95 %
    bootstrap interval, and by world."""
    room, rng = np.concatenate(minus(users["oracle"], users["content"])), np.random.default_rng(0)
    out = {}
    for arm in users:
        if set(rec.ARMS[arm].texts) & set(rec.REASON_TEXTS):
            gain = np.concatenate(minus(users[arm], users["content"]))
            draws = []
            for _ in range(2000):
                rows = rng.integers(len(room), size=len(room))
                draws.append(gain[rows].mean() / room[rows].mean())
            known = [m["headroom"]["recovered"] for m in metrics]
            out[arm] = {
                "share": float(gain.mean() / room.mean()),
                "ci95": np.percentile(draws, [2.5, 97.5]).tolist(),
                "over worlds": over_worlds([shares[arm] for shares in known if arm in shares]),
            }
    return out


def names_new_driver(out: pathlib.Path) -> tuple:
    """For every item of a run whose driver changed: does its reason name the new one? Of curec and
    of bestof."""
    written = [D.ANSWER.format("", line["reason"]) for line in read(out, "reasons.jsonl")]
    truth, named = truth_of(open_data(out)), []
    for answers in (["", *written], stage(out, "bestof")):
        named.append(np.array(reward.names_new_driver(phrases_of(answers), truth), float))
    return tuple(named)


def ppo_figures(out: pathlib.Path, metrics: dict) -> dict:
    """The course of PPO: means of a fifth of the updates each; first and least values."""
    log, sound = read(out, "ppo.jsonl"), ("grounded", "format_ok")
    found = {"before": metrics["ppo"]["reward_before"], "after": metrics["ppo"]["reward_after"]}
    for name in ("reward", "kl", *sound):
        fifths = np.array_split([row[name] for row in log], 5)
        found[name] = [float(np.mean(part)) for part in fifths if len(part)]
    found["first"] = {name: log[0][name] for name in sound}
    found["least"] = {name: min(row[name] for row in log) for name in sound}
    return found


# ----------------------------------------------------------------------------------- part: windows
def windows(args) -> None:
    """The correction alone, with as many windows: truth of the final reasons, proposals, seconds.
    (PPO has practised prompts of the run's own windows.)"""
    found, runs = {1: [], 2: [], 4: [], 8: []}, finished_worlds(args)
    for out in runs:
        world = World(out)
        for count, rows in found.items():
            rows.append(corrected(world, count))
    save(args, "windows", {n: each_over_worlds(rows) for n, rows in found.items()}, runs)


def corrected(world: World, count: int) -> dict:
    """Figures of a world corrected in so many windows."""
    s, data = world.settings, world.data
    run = curec.Run(replace(s, out=f"{s.out}/windows-{count}", windows=count))
    cuts = curec.window_cuts(data, count)
    steps = list(curec.correction_windows(data, cuts, s.seed))
    _, answers, _, rows = curec.correct(run, data, world.llm, world.judge, steps)
    items = [row["items"] for row in rows]
    return world.truth(answers) | {
        "proposals": sum(row["proposed"] for row in rows),
        "seconds": run.times["correct"],
        "accepted": sum(row["accepted"] for row in rows) / sum(items),
        "false_accept_rate": float(
            np.average([row["false_accept_rate"] for row in rows], weights=items)
        ),
    }


# ------------------------------------------------------------------------------------- part: think
def think(args) -> None:
    """Without <think>: the same stages with answers that are the reason alone; the tiny LLM is
    trained anew for them."""
    runs, plain = finished_worlds(args), []
    D.ANSWER = "<reason> {1} </reason>"
    D.ANSWER_PATTERN = re.compile(r"\s*()<reason>([^<>]{0,2000})</reason>\s*")
    for seed in args.worlds:
        arms = ("--arms", "content,rl,curec,oracle")
        plain.append(finished_run(args, f"plain-{seed}", seed, *arms))
    found = {"with": think_figures(runs), "without": think_figures(plain)}
    value = {name: each_over_worlds(rows) for name, rows in found.items()}
    differences = []
    for a, b in zip(*found.values(), strict=True):
        differences.append({name: a[name] - b[name] for name in a})
    save(args, "think", value | {"with - without": each_over_worlds(differences)}, runs)


def think_figures(runs: list) -> list:
    """What is compared with and without <think>, a dict a run."""
    rows = []
    for out in runs:
        m, row = read(out, "metrics.json"), {}
        for kind in ("aligned", "rl", "curec"):
            row |= {f"{kind} {name}": m["reasons"][kind][name] for name in TRUE_FIGURES}
        for arm in ("rl", "curec"):
            row[f"recovered {arm}"] = m["headroom"]["recovered"].get(arm, float("nan"))
        rows.append(row | {"ppo_s": m["time_s"]["ppo"], "correct_s": m["time_s"]["correct"]})
    return rows


# ------------------------------------------------------------------------------------ part: reader
def reader(args) -> None:
    """Reasons that name the two words of each item that the people shown to `rl` had most often
    chosen before; where fewer are shared, others at random."""
    truth, gains, runs = [], [], finished_worlds(args)
    for out in runs:
        world = World(out)
        s, answers = replace(world.settings, arms="rl"), counted_answers(world)
        kinds = {"rl": answers}
        inputs = curec.arm_inputs(s, world.data, world.encode, kinds, None)["rl"]
        config, ranks = rec.TrainConfig(epochs=s.epochs), []
        for seed in range(s.seed, s.seed + s.seeds):
            ranks.append(rec.fit_arm("rl", world.data, inputs, config, seed)["ranks"].numpy())
        truth.append(world.truth(answers))
        gains.append(rec.metrics(np.stack(ranks))["ndcg@10"].mean(0))
    arms = ("content", "rl", "oracle")
    users = {arm: [per_user(out, arm) for out in runs] for arm in arms}
    over_content = pooled(minus(gains, users["content"]))
    room = np.concatenate(minus(users["oracle"], users["content"])).mean()
    value = {
        "reasons": each_over_worlds(truth),
        "reader - content": over_content,
        "reader - rl": pooled(minus(gains, users["rl"])),
        "recovered": over_content["delta"] / float(room),
    }
    save(args, "reader", value, runs)


def counted_answers(world: World) -> list:
    """The answers of a perfect reader, index 0 empty."""
    data, rng, answers = world.data, np.random.default_rng(0), [""]
    shown, _ = curec.one_shot_people(data, world.settings.seed)
    for i in range(1, data.n_items + 1):
        named = [*D.shared_phrases(data, i, shown[i]), *rng.permutation(data.phrases[i])]
        two = list(dict.fromkeys(named))[:2]
        answers.append(D.ANSWER.format("counted", D.REASON.format(*two)))
    return answers


# ----------------------------------------------------------------------------------- part: accepts
def accepts(args) -> None:
    """Corrections of a reason that had been accepted in an earlier window: do more of its words
    name drivers at the end of the window than before?"""
    found, runs = {"accepted": [], "rejected": []}, finished_worlds(args)
    for out in runs:
        truth = truth_of(open_data(out))
        for k, line in enumerate(read(out, "reasons.jsonl")):
            before = ""
            for entry in line["timeline"]:
                half = "early" if entry["window_end"] <= truth["since"][k] else "late"
                drivers, now = set(truth[half][k]), entry["proposal"]
                change = len(drivers & set(D.words(now))) - len(drivers & set(D.words(before)))
                if before:
                    found["accepted" if entry["accepted"] else "rejected"].append(change)
                if entry["accepted"]:
                    before = now
    value = {}
    for verdict, changes in found.items():
        signs = [int(np.sign(change)) for change in changes]
        value[verdict] = {name: signs.count(s) for name, s in (("truer", 1), ("worse", -1))}
        value[verdict]["equal"] = signs.count(0)
    save(args, "accepts", value, runs)


# ------------------------------------------------------------------------------------ command line
PARTS = {part.__name__: part for part in (worlds, windows, think, reader, accepts)}


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
