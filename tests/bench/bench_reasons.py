"""Are the reasons true, and do they help? Five demo worlds, three downstream seeds each, pooled with intervals.

    python tests/bench/bench_reasons.py worlds     the whole demo with --seed 0 .. 4: judge, truth, ranking, correction, hacking
    python tests/bench/bench_reasons.py windows    1, 2, 4 and 8 windows with each world's policy and judge
    python tests/bench/bench_reasons.py think      everything again without <think>, from the tiny LLM on: same seeds and steps
    python tests/bench/bench_reasons.py reader     the arm `rl` if its LLM read the prompt perfectly: counted instead of written
    python tests/bench/bench_reasons.py accepts    how many corrections made a reason truer, of those accepted and of those rejected

Results go to bench_reasons.json beside this file; those of worlds also without world 0, on which choices were made. Resumable:
what lies in runs/bench/reasons is not repeated. Delete that folder after a change of code. The others need the runs of worlds.
"""
import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import curec  # noqa: E402
import data as D  # noqa: E402
import recommender as rec  # noqa: E402
import reward  # noqa: E402
import rl  # noqa: E402

WORLDS, RUNS, OUT = range(5), pathlib.Path("runs/bench/reasons"), HERE.with_suffix(".json")
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}                  # Student's t by number of worlds
WAYS = "truth", "echo of a history", "the title alone", "every aspect", "empty", "another item's reason"
PAIRS = [p for p in (*rec.COMPARISONS, ("rl", "placebo")) if {*p} <= {*curec.METHODS["curec"]}]


def run(name: str, seed: int, *flags) -> pathlib.Path:
    """A finished run of curec.py, made or taken up where it stopped."""
    out = RUNS / name
    if not (out / "metrics.json").exists():
        resume = ["--resume"] * (out / "config.json").exists()
        subprocess.run([sys.executable, HERE.parents[2] / "curec.py", "--dataset", "demo", "--seed", str(seed), "--out", out, *flags, *resume], check=True)
    return out


def save(part: str, value, runs):
    """Into the JSON, with the commits that the runs were made at."""
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    commits = sorted({json.loads((out / "config.json").read_text())["git_commit"] for out in runs})
    known[part] = {"command": f"python tests/bench/bench_reasons.py {part}", "commits": commits, "judge": [judge_epoch(out) for out in runs], "torch": torch.__version__, "cpus": os.cpu_count(),
                   "machine": platform.machine(), "results": value}
    OUT.with_suffix(".part").write_text(json.dumps(known, indent=1) + "\n")
    os.replace(OUT.with_suffix(".part"), OUT)
    print(json.dumps(value, indent=1))


def judge_epoch(out: pathlib.Path) -> int:
    """The epoch of a run's reward model; 0: the untrained one won on held-out people and items."""
    return torch.load(out / "state/reward.pt", weights_only=True)["value"]["report"]["best_epoch"]


def over_worlds(values) -> dict:
    """Mean and 95 % t-interval over worlds, without the interval for one."""
    x = np.array(values, float)
    half = T_975[len(x)] * x.std(ddof=1) / len(x) ** 0.5 if len(x) in T_975 else None
    return {"mean": float(x.mean()), **({"t95": [float(x.mean() - half), float(x.mean() + half)]} if half is not None else {}), "worlds": x.tolist()}


def pooled(differences, draws=2000) -> dict:
    """Mean of per-user (or per-item) differences of all worlds, its 95 % bootstrap interval, and the t-interval over worlds."""
    delta, ci = rec.paired_bootstrap(np.concatenate(differences)[None], np.zeros((1, sum(map(len, differences)))), draws)
    return {"delta": delta, "ci95": ci, **{k: v for k, v in over_worlds([d.mean() for d in differences]).items() if k != "mean"}}


class World:
    """A finished run opened again: data, judge and, if asked for, the LLM with the adapter `policy`."""

    def __init__(self, out: pathlib.Path):
        self.config = json.loads((out / "config.json").read_text())
        self.s = curec.Settings(**{**self.config["settings"], "llm": "tiny"})
        self.data, self.cuts = curec.load_data(self.s), self.config["windows"]
        self.who, self.period = D.choosers(self.data), (self.config["windows"][0], self.config["windows"][-1])
        self.model, self.tokenizer, self.encode = curec.open_llm(self.s, self.config["llm_path"])
        self.judge = reward.Judge(self.data, self.encode)
        self.judge.remember(torch.load(out / "state/reward.pt", weights_only=True)["value"]["weights"])
        rl.restore(self.model, out, "align")
        rl.add_policy(self.model)
        rl.restore(self.model, out, "policy")

    def truth(self, answers) -> dict:
        return reward.truth_figures([D.parse_answer(a)[1] for a in answers[1:]], {k: v[1:] for k, v in self.data.truth.items()})

    def hacks(self) -> dict:
        """Mean reward of true reasons, and of five ways to cheat, for the same items and people; how often the truth earns more; and
        both again without the penalties for format and words that the item does not say."""
        shown, audience = reward.one_shot_people(self.who, self.s.seed)
        items, truth, phrases = [i for i in range(1, self.data.n_items + 1) if len(shown[i]) >= 2], self.data.truth["late"], self.data.phrases
        say, rng = lambda text: D.ANSWER.format("by hand", text), np.random.default_rng(0)
        other = {i: next(int(j) for j in rng.permutation(items) if set(truth[j]) != set(truth[i])) for i in items}
        said = (lambda i: D.REASON.format(*truth[i]), lambda i: D.REASON.format(*phrases[self.data.history(shown[i][0])[-1]][:2]),
                lambda i: self.data.titles[i], lambda i: "people choose it for " + " and ".join(phrases[i]), lambda i: "", lambda i: D.REASON.format(*truth[other[i]]))
        people, found = ([shown[i] for i in items], [audience[i] for i in items]), {}
        for name, way in zip(WAYS, said):
            total, parts = self.judge.rewards(items, [say(way(i)) for i in items], *people, self.period, self.s.seed)
            found[name] = {"reward": total, "bare": (parts["shown"] + parts["audience"]) / 2}
        return {name: {f"{k} {what}": float((v if what == "mean" else found["truth"][k] > v).mean()) for k, v in x.items()
                       for what in ("mean", "truth earns more")[: 1 if name == "truth" else 2]} for name, x in found.items()}


def per_user(out: pathlib.Path, arm: str) -> np.ndarray:
    """NDCG@10 of each user in a run's arm, mean of the seeds."""
    return rec.metrics(torch.load(out / f"state/arm-{arm}.pt", weights_only=True)["value"]["ranks"].numpy())["ndcg@10"].mean(0)


def pool(runs, metrics, hacks) -> dict:
    """Everything of worlds for these runs."""
    users = {arm: [per_user(out, arm) for out in runs] for arm in metrics[0]["arms"]}
    room, rng, recovered = np.concatenate([o - c for o, c in zip(users["oracle"], users["content"])]), np.random.default_rng(0), {}
    for arm in ("placebo", "aligned", "rl", "bestof", "curec"):
        gain = np.concatenate([x - y for x, y in zip(users[arm], users["content"])])
        draws = [gain[k].mean() / room[k].mean() for k in (rng.integers(len(room), size=len(room)) for _ in range(2000))]
        recovered[arm] = {"share": float(gain.mean() / room.mean()), "ci95": np.percentile(draws, [2.5, 97.5]).tolist(),
                          "over worlds": over_worlds([m["headroom"]["recovered"][arm] for m in metrics if m["headroom"]["ndcg@10"] > 0])}
    named = {kind: [named_new(out, kind) for out in runs] for kind in ("curec", "bestof")}
    logs = [[json.loads(line) for line in (out / "ppo.jsonl").read_text().splitlines()] for out in runs]
    fifths = lambda log: {k: [float(np.mean([r[k] for r in part])) for part in np.array_split(log, 5)] for k in ("reward", "kl", "grounded", "format_ok")}
    return {"ndcg@10": {arm: over_worlds([x.mean() for x in v]) for arm, v in users.items()},
            "differences": {f"{a} - {b}": pooled([x - y for x, y in zip(users[a], users[b])]) for a, b in PAIRS},
            "headroom": pooled([o - c for o, c in zip(users["oracle"], users["content"])]), "recovered": recovered,
            "reasons": {k: {f: over_worlds([m["reasons"][k][f] for m in metrics]) for f in metrics[0]["reasons"][k]} for k in metrics[0]["reasons"]},
            "new driver named, curec - bestof": pooled([a - b for a, b in zip(named["curec"], named["bestof"])]),
            "reward": {k: over_worlds([m["reward"][k] for m in metrics]) for k in metrics[0]["reward"]},
            "hacking": {name: {k: over_worlds([h[name][k] for h in hacks]) for k in hacks[0][name]} for name in WAYS},
            "correction": [m["correction"] for m in metrics],
            "ppo": [{"before": m["ppo"]["reward_before"], "after": m["ppo"]["reward_after"], **fifths(log),
                     "first": {k: log[0][k] for k in ("grounded", "format_ok")}, "least": {k: min(r[k] for r in log) for k in ("grounded", "format_ok")}}
                    for m, log in zip(metrics, logs)],
            "time_s": [m["time_s"] for m in metrics]}


def named_new(out: pathlib.Path, kind: str) -> np.ndarray:
    """For every item of a run whose driver changed: does its reason name the new one?"""
    kept = torch.load(out / f"state/{kind}.pt", weights_only=True)["value"]
    answers = kept[1] if kind == "curec" else kept               # see curec.correct
    truth = D.demo(json.loads((out / "config.json").read_text())["settings"]["seed"]).truth
    return np.array(reward.names_new([D.parse_answer(a)[1] for a in answers[1:]], {k: v[1:] for k, v in truth.items()}), float)


def worlds(args):
    runs = [run(f"world-{seed}", seed) for seed in args.worlds]
    metrics, hacks = [json.loads((out / "metrics.json").read_text()) for out in runs], [World(out).hacks() for out in runs]
    fresh = [k for k, seed in enumerate(args.worlds) if seed]
    save("worlds", {"all": pool(runs, metrics, hacks)} | ({"without world 0": pool(*([x[k] for k in fresh] for x in (runs, metrics, hacks)))} if fresh else {}), runs)


def windows(args):
    """The correction alone, with as many windows: truth of the final reasons, proposals, seconds. (PPO has practised prompts of the run's own windows.)"""
    found, runs = {}, [run(f"world-{seed}", seed) for seed in args.worlds]
    for out in runs:
        for count in (1, 2, 4, 8):
            kept = out / f"windows-{count}.json"
            if not kept.exists():
                world, start = World(out), time.perf_counter()
                _, answers, *_, rows = curec.correct(world.s, world.data, world.model, world.tokenizer, world.judge, world.who,
                                                     reward.window_cuts(world.data, count))
                share = lambda k: sum(r[k] for r in rows) / sum(r["items"] for r in rows)
                kept.write_text(json.dumps(world.truth(answers) | {
                    "proposals": sum(r["proposed"] for r in rows), "seconds": time.perf_counter() - start, "accepted": share("accepted"),
                    "false_accept_rate": sum(r["false_accept_rate"] * r["items"] for r in rows) / sum(r["items"] for r in rows)}))
            found.setdefault(count, []).append(json.loads(kept.read_text()))
    save("windows", {count: {k: over_worlds([x[k] for x in rows]) for k in rows[0]} for count, rows in found.items()}, runs)


def think(args):
    """Without <think>: the same stages with answers that are the reason alone; the tiny LLM is trained anew for them."""
    found, runs = {"with": [], "without": []}, [run(f"world-{seed}", seed) for seed in args.worlds]
    D.ANSWER, D.ANSWER_PATTERN = "<reason> {1} </reason>", re.compile(r"\s*()<reason>([^<>]{0,2000})</reason>\s*")
    for seed, out in zip(args.worlds, runs):
        plain = RUNS / f"plain-{seed}"
        if not (plain / "metrics.json").exists():
            resume = ["--resume"] * (plain / "config.json").exists()
            assert curec.main(["--dataset", "demo", "--seed", str(seed), "--arms", "content,rl,curec,oracle", "--out", str(plain), *resume]) == 0
        for name, folder in (("with", out), ("without", plain)):
            m = json.loads((folder / "metrics.json").read_text())
            found[name].append({f"{kind} {k}": m["reasons"][kind][k] for kind in ("aligned", "rl", "curec")
                                for k in ("truth_precision", "mean_reward", "grounded", "format_ok", "mean_tokens")} | {
                f"recovered {arm}": m["headroom"]["recovered"][arm] for arm in ("rl", "curec")} | {"ppo_s": m["time_s"]["ppo"], "correct_s": m["time_s"]["correct"]})
    differences = {k: over_worlds([a[k] - b[k] for a, b in zip(found["with"], found["without"])]) for k in found["with"][0]}
    save("think", {name: {k: over_worlds([x[k] for x in rows]) for k in rows[0]} for name, rows in found.items()} | {"with - without": differences}, runs)


def reader(args):
    """Names the two words of each item that the people shown to `rl` had most often chosen before; what is shared by none, at random."""
    truth, gains, runs = [], [], [run(f"world-{seed}", seed) for seed in args.worlds]
    for out in runs:
        world, rng = World(out), np.random.default_rng(0)
        shown = reward.one_shot_people(world.who, world.s.seed)[0]
        named = [[*D.shared_words(world.data, i, shown[i]), *rng.permutation(world.data.phrases[i])] for i in range(1, world.data.n_items + 1)]
        answers = ["", *(D.ANSWER.format("counted", D.REASON.format(*list(dict.fromkeys(words))[:2])) for words in named)]
        told = reward.features("rl", world.data, world.encode, {"rl": answers}, world.s.seed)
        fits = [rec.run_arm("rl", world.data, told, {}, seed=world.s.seed + k)["ranks"].numpy() for k in range(world.s.seeds)]
        truth.append(world.truth(answers)), gains.append(rec.metrics(np.stack(fits))["ndcg@10"].mean(0))
    minus = lambda arm: pooled([x - per_user(out, arm) for x, out in zip(gains, runs)])
    room = [per_user(out, "oracle") - per_user(out, "content") for out in runs]
    save("reader", {"reasons": {k: over_worlds([t[k] for t in truth]) for k in truth[0]}, "reader - content": minus("content"), "reader - rl": minus("rl"),
                    "recovered": minus("content")["delta"] / float(np.concatenate(room).mean())}, runs)


def accepts(args):
    """Corrections of a reason that had been accepted in an earlier window: do more of its words name drivers at the end of the window than before?"""
    found, runs = {"accepted": [], "rejected": []}, [run(f"world-{seed}", seed) for seed in args.worlds]
    for out in runs:
        config = json.loads((out / "config.json").read_text())
        truth = D.demo(config["settings"]["seed"]).truth
        for i, line in enumerate((out / "reasons.jsonl").read_text().splitlines(), 1):
            standing = ""
            for t in json.loads(line)["timeline"]:
                drivers = truth["early" if t["window_end"] <= truth["since"][i] else "late"][i]
                hits = lambda reason: len({*drivers} & {*D.words(reason)})
                if standing:
                    found["accepted" if t["accepted"] else "rejected"].append(hits(t["proposal"]) - hits(standing))
                standing = t["proposal"] if t["accepted"] else standing
    save("accepts", {k: {"truer": sum(x > 0 for x in v), "equal": v.count(0), "worse": sum(x < 0 for x in v)} for k, v in found.items()}, runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("worlds", "windows", "think", "reader", "accepts"))
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS), help="seeds of the demo worlds")
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    globals()[args.part](args)
