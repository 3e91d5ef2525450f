"""The recommender on all of Amazon Beauty: quality, speed, growth with the catalogue, serving.

    python tests/bench/bench_recommender.py quality --data-dir DIR --encoder PATH    every run of RUNS; hours on two cores
    python tests/bench/bench_recommender.py speed --data-dir DIR                     side by side with a plain loop
    python tests/bench/bench_recommender.py scale                                    10 k, 100 k and 1 M made-up items
    python tests/bench/bench_recommender.py serving --data-dir DIR                   ranking with features against without

Results go to bench_recommender.json beside this file. quality is resumable: what lies in
runs/bench is not repeated. Delete that folder after a change of code, data or encoder.
"""
import argparse
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import data as D  # noqa: E402
import recommender as rec  # noqa: E402
import reward  # noqa: E402

RUNS = [("id", "file", s) for s in range(3)] + [("content", "file", s) for s in range(3)] + [
    (arm, "shuffle", 0) for arm in ("id", "content")] + [(arm, "file", 0) for arm in ("popularity", "markov")]
OUT = HERE.with_suffix(".json")


def save(part: str, value):
    """Puts one part of the results into the JSON, beside the machine it was measured on."""
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    known[part] = {"command": " ".join(["python", "tests/bench/bench_recommender.py", *map(os.path.basename, sys.argv[1:])]), "torch": torch.__version__,
                   "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine(), "results": value}
    OUT.with_suffix(".part").write_text(json.dumps(known, indent=1) + "\n")
    os.replace(OUT.with_suffix(".part"), OUT)


def beauty(args, ties="file"):
    return D.load("beauty", args.data_dir, seed=0, ties=ties)


def kept(name: str, work):
    """The result of work(), kept in runs/bench/NAME.pt: nothing is done twice."""
    path = pathlib.Path("runs/bench", name + ".pt")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(work(), f"{path}.part")
        os.replace(f"{path}.part", path)
    return torch.load(path, weights_only=True)


def trained(args, arm: str, ties: str, seed: int) -> dict:
    """Weights and training log of one run, kept."""
    def work():
        data, start = beauty(args, ties), time.perf_counter()
        features = content(args) if arm == "content" else None
        model, log = rec.train(data.n_items, data.train, data.valid, features, seed=seed, device=args.device,
                               name=f"{arm} {ties} {seed}")
        return {"model": model.cpu().state_dict(), "log": log | {"train_s": time.perf_counter() - start}}
    return kept(f"{arm}-{ties}-{seed}", work)


def content(args) -> torch.Tensor:
    return kept("features", lambda: reward.features("content", beauty(args), reward.load_encoder(args.encoder), {}, 0)["features"])


def quality(args):
    """Test metrics, slices and audit of every run, and paired intervals content - id in both tie orders."""
    entries, ranks = {}, {}
    for arm, ties, seed in RUNS:
        data, log = beauty(args, ties), {}
        if arm in ("popularity", "markov"):
            score = getattr(rec, arm)(data.n_items, data.train)
        else:
            weights, log = trained(args, arm, ties, seed).values()
            model = rec.SASRec(data.n_items, weights.get("features"))
            model.load_state_dict(weights)
            score = rec.scorer(model)
        rank, row, _ = rec.run_arm(arm, data, {}, rec.slices_of(data), seed=seed, score=score).values()
        entries[f"{arm}-{ties}-{seed}"] = log | row
        ranks.setdefault((arm, ties), []).append(rank.numpy())
        print(f"{arm:10s} {ties:8s} {seed}  " + "  ".join(f"{m} {row['test'][m]:.4f}" for m in ("hr@10", "ndcg@10")), flush=True)
    ranks, differences = {k: np.stack(v) for k, v in ranks.items()}, {}
    for ties in ("file", "shuffle"):
        data = beauty(args, ties)
        for name, keep in ({"all": np.ones(len(data.users), dtype=bool)} | rec.slices_of(data)).items():
            for metric in ("hr@10", "ndcg@10"):
                a, b = (rec.metrics(ranks[arm, ties][:, keep])[metric] for arm in ("content", "id"))
                differences[f"content - id, {ties}, {name}, {metric}"] = rec.paired_bootstrap(a, b)
    save("quality", {"runs": entries, "differences": differences})
    print(rec.markdown(["difference", "delta", "95 % interval"], [[k, d, "{:+.4f} .. {:+.4f}".format(*ci)] for k, (d, ci) in differences.items()]))


# ------------------------------------------------------------------------------------------------------------- speed
def plain_loss(model, ids, targets):
    """Plain: padded to length 50, all logits held at once. ids, targets (B, 50); targets 0 count for nothing."""
    table, ids = model.table(), F.pad(ids, (0, rec.MAX_LEN - ids.shape[1]))
    ago = ((ids > 0).sum(1, keepdim=True) - 1 - torch.arange(rec.MAX_LEN)).clamp(min=0)
    x = model.drop(table[ids] * table.shape[1] ** 0.5 + model.pos(ago))
    for block in model.blocks:
        x = block(x)
    logits = F.normalize(model.norm(x), dim=-1) / model.log_tau.exp() @ table.T
    logits[..., 0] = -torch.inf
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)


def one_epoch(kind: str, data, dropout: float, steps: int = 0):
    """One epoch of `id` (or its first steps): losses, seconds, memory above what was resident before, in MB.

    ours: 256 histories with their next item a step. plain: 128 people a step, every position of them. agree: the plain
    loss on our batches, for comparing losses.
    """
    torch.manual_seed(0)
    model, rng, losses = rec.SASRec(data.n_items, dropout=dropout), np.random.default_rng(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    histories, goals, _ = rec.samples(data.train)
    if kind == "plain":
        histories, following = zip(*((s[:-1], s[1:]) for s in data.train if len(s) > 1))
    lengths = np.array([min(len(h), rec.MAX_LEN) for h in histories])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for rows in rec.batches(lengths, 128 if kind == "plain" else 256, rng):
        ids = rec.pad([histories[k] for k in rows])
        if kind == "ours":
            loss = rec.next_item_loss(model, ids, torch.from_numpy(goals[rows]))
        elif kind == "agree":
            last = F.one_hot(torch.from_numpy(lengths[rows] - 1), rec.MAX_LEN)
            loss = plain_loss(model, ids, last * torch.from_numpy(goals[rows])[:, None])
        else:
            loss = plain_loss(model, ids, F.pad(rec.pad([following[k] for k in rows]), (0, rec.MAX_LEN - ids.shape[1])))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == steps:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"losses": losses[:50], "seconds": time.perf_counter() - start, "mb": peak / 1024}


def speed(args):
    """An epoch of `id` in a process of its own, ours and the plain loop in turn; the first 50 losses; full evaluation."""
    if args.worker:
        return print(json.dumps(one_epoch(args.worker, beauty(args), args.dropout, args.steps)))

    def ask(kind, **settings):
        flags = [f for k, v in settings.items() for f in (f"--{k}", str(v))]
        command = [sys.executable, str(HERE), "speed", "--data-dir", args.data_dir, "--worker", kind, *flags]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    rounds = [{kind: ask(kind) for kind in ("ours", "plain")} for _ in range(args.rounds)]
    exact = {kind: ask(kind, dropout=0.0, steps=50)["losses"] for kind in ("ours", "agree")}
    data = beauty(args)
    model = rec.SASRec(data.n_items)
    start = time.perf_counter()
    rec.ranks(rec.scorer(model), [np.append(s, v) for s, v in zip(data.train, data.valid)], data.test)
    value = {"epoch_s": {k: [r[k]["seconds"] for r in rounds] for k in ("ours", "plain")},
             "epoch_mb": {k: [r[k]["mb"] for r in rounds] for k in ("ours", "plain")},
             "largest_loss_difference": float(np.abs(np.subtract(exact["ours"], exact["agree"])).max()),
             "evaluation_s": time.perf_counter() - start}
    save("speed", value)
    print(json.dumps(value, indent=1))


# ------------------------------------------------------------------------------------------------- growth and serving
def scale(args):
    """One training step (128 users of 8 items) and one ranking pass of 128 users, at made-up catalogue sizes."""
    if args.worker:
        n, rng = int(args.worker), np.random.default_rng(0)
        seqs = [rng.integers(1, n + 1, 9) for _ in range(128)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = rec.SASRec(n)
        optimizer, steps = torch.optim.AdamW(model.parameters(), fused=True), []
        for _ in range(4):                                        # the first makes the optimiser's state
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            rec.next_item_loss(model, rec.pad([s[:-1] for s in seqs]), torch.tensor([s[-1] for s in seqs])).backward()
            optimizer.step()
            steps.append(time.perf_counter() - start)
        trained = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        score, start = rec.scorer(model), time.perf_counter()
        rec.ranks(score, [s[:-1] for s in seqs], [s[-1] for s in seqs])
        return print(json.dumps({"items": n, "parameters": sum(p.numel() for p in model.parameters()), "step_s": float(np.median(steps[1:])),
                                 "rank_128_users_s": time.perf_counter() - start, "train_mb": (trained - before) / 1024}))
    rows = [json.loads(subprocess.run([sys.executable, str(HERE), "scale", "--worker", str(n)], capture_output=True, text=True,
                                      check=True).stdout.splitlines()[-1]) for n in (10_000, 100_000, 1_000_000)]
    save("scale", rows)
    print(rec.markdown(list(rows[0]), [r.values() for r in rows]))


def serving(args, repeats: int = 20):
    """The same ranking function with and without 256 features an item: median of interleaved passes over 4,096 users."""
    data = beauty(args)
    known, goal = [np.append(s, v) for s, v in zip(data.train, data.valid)][:4096], data.test[:4096]
    score = {"id": rec.scorer(rec.SASRec(data.n_items)),
             "features": rec.scorer(rec.SASRec(data.n_items, torch.randn(data.n_items + 1, 256)))}
    seconds = {k: [] for k in score}
    for _ in range(repeats):
        for k, s in score.items():
            start = time.perf_counter()
            rec.ranks(s, known, goal)
            seconds[k].append(time.perf_counter() - start)
    value = {k: {q: float(np.quantile(v, p)) for q, p in (("q25", 0.25), ("median", 0.5), ("q75", 0.75))} for k, v in seconds.items()}
    value["ratio"] = value["features"]["median"] / value["id"]["median"]
    save("serving", value)
    print(json.dumps(value, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "speed", "scale", "serving"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--encoder", default="", help="Hugging Face text encoder, name or path")
    parser.add_argument("--device", default="cpu", help="of quality's training")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", default="", help="for the script itself: what one child process measures")
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=0)
    arguments = parser.parse_args()
    globals()[arguments.part](arguments)
