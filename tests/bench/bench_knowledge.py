"""Which of the tasks told in plain language make the LLM a better recommender? (Aligning LLMs with Recommendation Knowledge, arXiv 2404.00245)

    python tests/bench/bench_knowledge.py               five demo worlds, the tiny LLM, one adapter a mixture: an hour and a half on one core

Recommendation tasks alone (three of four samples ask for the next items, the others for the best of three, or a rating), or masked items (MIM), masked
words (MLM), pairwise preference (BPR) or all of them beside the latter: the same steps, share of next items and seeds. Chosen by hand on validation of world 5.
Results go to bench_knowledge.json beside this file; resumable: what lies in runs/bench/knowledge is not repeated.
"""
import argparse
import json
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import curec  # noqa: E402
import recommender as rec  # noqa: E402
from bench_reasons import T_975  # noqa: E402

REC = ("rank", "rate")
MIXTURES = {"recommendation": REC, "+ MIM": (*REC, "mim"), "+ MLM": (*REC, "mlm"), "+ BPR": (*REC, "bpr"), "all": (*REC, "mim", "mlm", "bpr")}


def measured(s, data, path, name: str, tasks) -> dict:
    """Ranks of the test items by beam search, and what else the adapter trained on these tasks knows."""
    s, m = curec.replace(s, out=os.path.join(s.out, name.strip("+ ").lower())), {"time_s": {}}
    done = os.path.join(s.out, "state", "measured.pt")
    if not os.path.exists(done):
        model, tokenizer, _ = curec.open_llm(s, path)
        score = curec.know(s, data, model, tokenizer, m, tasks=tasks)
        known = [np.append(h, v) for h, v in zip(data.train, data.valid)]
        curec.keep(done, {"ranks": torch.from_numpy(rec.ranks(score, known, data.test)), **m["knowledge"]})
    return torch.load(done, weights_only=True)


def row(fits: dict, base: dict) -> dict:
    """HR@10 over these worlds, and how much more it is than the base's in the same worlds. fits, base: {world: what measured gives}"""
    hits, others = ([rec.metrics(x[w]["ranks"].numpy())["hr@10"] for w in fits] for x in (fits, base))               # by world, (users,)
    delta, people = rec.paired_bootstrap(*(np.concatenate(x)[None] for x in (hits, others)))
    by_world = [float(a.mean() - b.mean()) for a, b in zip(hits, others)]
    half = T_975[len(fits)] * np.std(by_world, ddof=1) / len(fits) ** 0.5 if len(fits) > 1 else None
    return {"worlds": len(fits), "hr@10": float(np.mean(np.concatenate(hits))), "less_recommendation": delta, "people_95": people, "worlds_95": half and [delta - half, delta + half],
            "by_world": by_world, **{k: float(np.mean([f[k] for f in fits.values()])) for k in ("ranking_accuracy", "bpr_accuracy")}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=curec.Settings.knowledge_steps)
    parser.add_argument("--worlds", type=int, default=5, choices=range(1, 6), help="worlds for recommendation tasks alone and for all tasks, each with its own tiny LLM [5]")
    parser.add_argument("--single", type=int, default=5, choices=range(1, 6), help="of these, worlds for one auxiliary task alone [5]")
    args, found = parser.parse_args(), {name: {} for name in MIXTURES}
    for name, seed in [*((n, w) for w in range(args.worlds) for n in ("recommendation", "all")), *((n, w) for w in range(args.single) for n in MIXTURES if "+" in n)]:
        s = curec.resolve(curec.parse_args(["--dataset", "demo", "--seed", str(seed), "--knowledge-steps", str(args.steps), "--out", f"runs/bench/knowledge/{seed}-{args.steps}"]))
        data = curec.load_data(s)
        found[name][seed] = measured(s, data, curec.tiny_llm(s, data), name, MIXTURES[name])
        print(f"world {seed}, {name}: HR@10 {np.mean(found[name][seed]['ranks'].numpy() <= 10):.4f}", flush=True)
    rows, interval = {name: row(fits, found["recommendation"]) for name, fits in found.items() if fits}, "{:+.4f} .. {:+.4f}".format
    print(rec.markdown(["tasks", "worlds", "HR@10", "less recommendation alone", "people: 95 %", "worlds: 95 %", "best of five (.2)", "BPR (.5)"],
                       [[k, r["worlds"], r["hr@10"], f"{r['less_recommendation']:+.4f}", interval(*r["people_95"]), interval(*r["worlds_95"]) if r["worlds_95"] else "", r["ranking_accuracy"], r["bpr_accuracy"]]
                        for k, r in rows.items()]))
    HERE.with_suffix(".json").write_text(json.dumps({"command": "python tests/bench/bench_knowledge.py", "steps": args.steps, "torch": torch.__version__, "cpus": os.cpu_count(),
                                                     "commit": curec.describe(s, [], "")["git_commit"], "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
