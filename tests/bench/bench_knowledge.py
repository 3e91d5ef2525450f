"""Which of the tasks told in plain language make the LLM a better recommender? (Aligning LLMs with Recommendation Knowledge, arXiv 2404.00245)

    python tests/bench/bench_knowledge.py               five demo worlds, the tiny LLM, one adapter a mixture; about an hour on one core

Recommendation tasks alone (three of four samples ask for the next items, the others for the best of three, or a rating), or masked items (MIM), masked
words (MLM), pairwise preference (BPR) or all of them beside the latter: the same steps, share of next items and seeds. Chosen on validation of another world.
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

REC = ("rank", "rate")
MIXTURES = {"recommendation": REC, "+ MIM": (*REC, "mim"), "+ MLM": (*REC, "mlm"), "+ BPR": (*REC, "bpr"), "all": (*REC, "mim", "mlm", "bpr")}
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}                  # Student's t by number of worlds


def measured(s, data, path, name: str, tasks) -> dict:
    """Ranks of the valid and test items by beam search, and what else the adapter trained on these tasks knows."""
    s, m = curec.replace(s, out=os.path.join(s.out, name.strip("+ ").lower())), {"time_s": {}}
    done = os.path.join(s.out, "state", "measured.pt")
    if not os.path.exists(done):
        model, tokenizer, _ = curec.open_llm(s, path)
        score = curec.know(s, data, model, tokenizer, m, tasks=tasks)
        known = [np.append(h, v) for h, v in zip(data.train, data.valid)]
        curec.keep(done, {"valid": torch.from_numpy(rec.ranks(score, data.train, data.valid)), "test": torch.from_numpy(rec.ranks(score, known, data.test)), **m["knowledge"]})
    return torch.load(done, weights_only=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=curec.Settings.knowledge_steps)
    parser.add_argument("--worlds", type=int, nargs="+", default=range(5), help="seeds of the worlds, each with its own tiny LLM")
    args, found = parser.parse_args(), {name: [] for name in MIXTURES}
    for seed in args.worlds:
        s = curec.resolve(curec.parse_args(["--dataset", "demo", "--seed", str(seed), "--knowledge-steps", str(args.steps), "--out", f"runs/bench/knowledge/{seed}-{args.steps}"]))
        data = curec.load_data(s)
        path = curec.tiny_llm(s, data)
        for name, tasks in MIXTURES.items():
            found[name].append(measured(s, data, path, name, tasks))
            print(seed, name, {k: round(float(rec.metrics(found[name][-1][k].numpy())["hr@10"].mean()), 4) for k in ("valid", "test")}, flush=True)
    hits = {name: [rec.metrics(f["test"].numpy())["hr@10"] for f in fits] for name, fits in found.items()}          # by world, (users,)
    rows, n = {}, len(args.worlds)
    for name, fits in found.items():
        delta, people = rec.paired_bootstrap(*(np.concatenate(hits[x])[None] for x in (name, "recommendation")))
        by_world = np.array([a.mean() - b.mean() for a, b in zip(hits[name], hits["recommendation"])])
        half = T_975[n] * by_world.std(ddof=1) / n ** 0.5 if n > 1 else float("nan")
        rows[name] = {"hr@10": float(np.mean([h.mean() for h in hits[name]])), "less_recommendation": delta, "people_95": people, "worlds_95": [delta - half, delta + half],
                      "by_world": by_world.tolist(), "valid_hr@10": float(np.mean([rec.metrics(f["valid"].numpy())["hr@10"].mean() for f in fits])),
                      **{k: float(np.mean([f[k] for f in fits])) for k in ("ranking_accuracy", "bpr_accuracy")}}
    interval = "{:+.4f} .. {:+.4f}".format
    print(rec.markdown(["tasks", "HR@10", "less recommendation alone", "people: 95 %", "worlds: 95 %", "best of five (.2)", "BPR (.5)"],
                       [[k, r["hr@10"], f"{r['less_recommendation']:+.4f}", interval(*r["people_95"]), interval(*r["worlds_95"]), r["ranking_accuracy"], r["bpr_accuracy"]]
                        for k, r in rows.items()]))
    HERE.with_suffix(".json").write_text(json.dumps({"command": "python tests/bench/bench_knowledge.py", "steps": args.steps, "worlds": list(args.worlds), "torch": torch.__version__,
                                                     "cpus": os.cpu_count(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
