"""Which of the tasks told in plain language make the LLM a better recommender? (Aligning LLMs with Recommendation Knowledge, arXiv 2404.00245)

    python tests/bench/bench_knowledge.py               the demo world, the tiny LLM, one adapter a mixture, same steps and seeds

Recommendation tasks (next item, ranking, rating) alone, with masked items (MIM), masked words (MLM), pairwise preference (BPR), and all.
Results go to bench_knowledge.json beside this file; resumable: what lies in runs/bench-knowledge is not repeated.
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

import curec as C  # noqa: E402
import data as D  # noqa: E402
import recommender as rec  # noqa: E402

REC = ("next", "rank", "rate")
MIXTURES = {"recommendation": REC, "+ MIM": (*REC, "mim"), "+ MLM": (*REC, "mlm"), "+ BPR": (*REC, "bpr"), "all": tuple(D.TASKS)}


def measured(s, data, path, name: str, tasks) -> dict:
    """Ranks of the test items by beam search, and what else the adapter trained on these tasks knows."""
    s = C.replace(s, out=os.path.join(s.out, name.strip("+ ").lower()))
    model, tokenizer, _ = C.open_llm(s, path)
    torch.manual_seed(s.seed)
    model.add_adapter("knowledge", model.peft_config["align"])
    C.taught(s, data, model, tokenizer, "knowledge", s.knowledge_steps, {}, reason_share=0.0, longest=D.LONGEST, tasks=tasks)

    def work():
        score, knows = C.know(s, data, model, tokenizer)
        known = [np.append(h, v) for h, v in zip(data.train, data.valid)]
        return {"ranks": torch.from_numpy(rec.ranks(score, known, data.test)), "knows": knows()}
    return C.stage(s, "measured", {}, work)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=C.Settings.knowledge_steps)
    parser.add_argument("--seeds", type=int, default=1, help="worlds, each with its own tiny LLM")
    args, found = parser.parse_args(), {}
    for seed in range(args.seeds):
        s = C.resolve(C.parse_args(["--dataset", "demo", "--seed", str(seed), "--knowledge-steps", str(args.steps), "--out", f"runs/bench-knowledge/{seed}-{args.steps}"]))
        data = C.load_data(s)
        path = C.tiny_llm(s, data)
        for name, tasks in MIXTURES.items():
            found.setdefault(name, []).append(measured(s, data, path, name, tasks))
    hits = {name: np.concatenate([rec.metrics(f["ranks"].numpy())["hr@10"] for f in fits])[None] for name, fits in found.items()}
    rows = {}
    for name, fits in found.items():
        delta, ci = rec.paired_bootstrap(hits[name], hits["recommendation"])
        rows[name] = {"hr@10": float(hits[name].mean()), "less_recommendation": delta, "ci95": ci, "ndcg@10": float(np.mean(
            [rec.metrics(f["ranks"].numpy())["ndcg@10"].mean() for f in fits])), "bpr_accuracy": float(np.mean([f["knows"]["bpr_accuracy"] for f in fits]))}
    print(rec.markdown(["tasks", "HR@10", "less recommendation alone", "95 % interval", "NDCG@10", "BPR accuracy"],
                       [[n, r["hr@10"], r["less_recommendation"], "{:+.4f} .. {:+.4f}".format(*r["ci95"]), r["ndcg@10"], r["bpr_accuracy"]] for n, r in rows.items()]))
    HERE.with_suffix(".json").write_text(json.dumps({"steps": args.steps, "worlds": args.seeds, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
