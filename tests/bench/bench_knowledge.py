"""Which of the tasks told in plain language make the LLM a better recommender? (Aligning LLMs with
Recommendation Knowledge, arXiv 2404.00245)

    python tests/bench/bench_knowledge.py       five demo worlds: 1.5 hours on one core

One adapter a mixture: recommendation tasks alone (three of four samples ask for the next items, the
others for the best of three, or a rating), or beside them masked items (MIM), masked words (MLM),
pairwise preference (BPR), or all three; with the same steps, share of next items and seeds. Results
go to bench_knowledge.json beside this file; resumable: what lies in runs/bench/knowledge is not
repeated.
"""

import argparse
import json
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np
import torch
from bench_reasons import pooled

import curec
import recommender as rec

REC = ("rank", "rate")
MIXTURES = {
    "recommendation": REC,
    "all": (*REC, "mim", "mlm", "bpr"),
    "+ MIM": (*REC, "mim"),
    "+ MLM": (*REC, "mlm"),
    "+ BPR": (*REC, "bpr"),
}


def open_run(world: int, name: str, steps: int) -> curec.Run:
    """The run folder of a mixture in a world."""
    folder = name.strip("+ ").lower()
    flags = ["--dataset", "demo", "--seed", str(world), "--knowledge-steps", str(steps)]
    out = f"runs/bench/knowledge/{world}-{steps}/{folder}"
    return curec.Run(curec.resolve(curec.parse_args([*flags, "--out", out])))


def hits(run: curec.Run, tasks: tuple) -> np.ndarray:
    """HR@10 of each user on test, by beam search with the adapter trained on these tasks."""
    rank = run.load("ranks")
    if rank is None:
        data = curec.load_data(run.settings)
        llm, _ = curec.open_llm(run.settings, curec.llm_path(run, data))
        score = curec.teach_knowledge(run, data, llm, tasks)
        known = [np.append(s, v) for s, v in zip(data.train, data.valid, strict=True)]
        rank = rec.ranks(score, known, data.test)
        run.load("ranks")  # the stage that is saved is not knowledge
        run.save(torch.from_numpy(rank))
    return rec.metrics(np.asarray(rank))["hr@10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=curec.Settings.knowledge_steps)
    several = "worlds of the mixtures `recommendation` and `all` [5]"
    parser.add_argument("--worlds", type=int, default=5, choices=range(1, 6), help=several)
    single = "of these, worlds of one auxiliary task alone [5]"
    parser.add_argument("--single", type=int, default=5, choices=range(6), help=single)
    parser.add_argument("--json", default=HERE.with_suffix(".json"), help="where results go")
    args = parser.parse_args()
    found, rows = {name: [] for name in MIXTURES}, {}
    for name, tasks in MIXTURES.items():
        for world in range(min(args.single, args.worlds) if "+" in name else args.worlds):
            run = open_run(world, name, args.steps)
            found[name].append(hits(run, tasks))
            print(f"world {world}, {name}: HR@10 {found[name][-1].mean():.4f}", flush=True)
    for name, mine in found.items():
        if mine:
            base = found["recommendation"][: len(mine)]
            less = pooled([a - b for a, b in zip(mine, base, strict=True)])
            rows[name] = {"hr@10": float(np.mean(np.concatenate(mine))), "less base": less}
    table = []
    for name, row in rows.items():
        table.append({"tasks": name, "HR@10": row["hr@10"]} | row["less base"])
    print(curec.markdown(table))
    result = {"command": "python tests/bench/bench_knowledge.py", "steps": args.steps}
    result |= {"torch": torch.__version__, "cpus": os.cpu_count()}
    result |= {"commit": curec.description(run.settings, [])["git_commit"], "results": rows}
    pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
