"""The recommender on all of Amazon Beauty: quality, speed, growth with the catalogue, serving.

    python tests/bench/bench_recommender.py quality --data-dir DIR --encoder PATH     RUNS; hours
    python tests/bench/bench_recommender.py speed --data-dir DIR     beside a plain loop
    python tests/bench/bench_recommender.py scale                    10 k, 100 k, 1 M made-up items
    python tests/bench/bench_recommender.py serving --data-dir DIR   with features, transitions

Results go to bench_recommender.json beside this file. quality is resumable: what lies in runs/bench
is not repeated. Delete that folder after a change of code, data or encoder.
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
from types import SimpleNamespace

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np
import torch
import torch.nn.functional as F

import curec
import data as D
import recommender as rec
import reward
import rl

# arm, order within a timestamp, seed
RUNS = (
    *(("id", "file", seed) for seed in range(3)),
    *(("content", "file", seed) for seed in range(3)),
    *((arm, "shuffle", 0) for arm in ("id", "content")),
    *((arm, "file", 0) for arm in ("popularity", "markov")),
)
CATALOGUES = (10_000, 100_000, 1_000_000)


def save(args, value) -> None:
    """Puts one part of the results into the JSON, beside the machine it was measured on."""
    path = pathlib.Path(args.json)
    known = json.loads(path.read_text()) if path.exists() else {}
    flags = map(os.path.basename, sys.argv[1:])
    known[args.part] = {
        "command": " ".join(["python", "tests/bench/bench_recommender.py", *flags]),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "results": value,
    }
    rl.write_atomically(path, json.dumps(known, indent=1) + "\n")


def beauty(args, ties: str = "file") -> D.Dataset:
    return D.load("beauty", args.data_dir, seed=0, subset=D.Subset(ties))


def in_a_process(args, worker, *flags) -> dict:
    """What this script, started as a worker, prints in its last line."""
    command = [sys.executable, str(HERE), args.part, "--data-dir", args.data_dir]
    command += ["--worker", str(worker), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def resident_mb() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ----------------------------------------------------------------------------------------- quality
def quality(args) -> None:
    """Metrics, slices and audit of every run; paired intervals content - id in both tie orders."""
    entries, ranks, rows = {}, {}, []
    for arm, ties, seed in RUNS:
        fit = fitted(args, arm, ties, seed)
        slices = rec.user_slices(beauty(args, ties))
        entries[f"{arm}-{ties}-{seed}"] = rec.arm_entry([fit], slices)
        ranks.setdefault((arm, ties), []).append(fit["ranks"].numpy())
        test = rec.mean_metrics(fit["ranks"].numpy())
        figures = f"HR@10 {test['hr@10']:.4f}  NDCG@10 {test['ndcg@10']:.4f}"
        print(f"{arm:10s} {ties:8s} {seed}  {figures}", flush=True)
    for ties in ("file", "shuffle"):
        data = beauty(args, ties)
        pair = [np.stack(ranks[arm, ties]) for arm in ("content", "id")]
        slices = {"all": np.ones(len(data.users), bool)} | rec.user_slices(data)
        for name, users in slices.items():
            for metric in ("hr@10", "ndcg@10"):
                a, b = (rec.metrics(rank[:, users])[metric] for rank in pair)
                delta, ci = rec.paired_bootstrap(a, b).values()
                row = {"content - id": f"{ties}, {name}, {metric}", "delta": delta}
                rows.append(row | {"low": ci[0], "high": ci[1]})
    save(args, {"runs": entries, "differences": rows})
    print(curec.markdown(rows))


def fitted(args, arm: str, ties: str, seed: int) -> dict:
    """A run of RUNS (see recommender.fit_arm), kept."""
    path = f"runs/bench/{arm}-{ties}-{seed}.pt"
    if not os.path.exists(path):
        inputs = content(args) if arm == "content" else rec.Inputs()
        config = rec.TrainConfig(device=args.device)
        rl.write_atomically(path, rec.fit_arm(arm, beauty(args, ties), inputs, config, seed))
    return torch.load(path, weights_only=True)


def content(args) -> rec.Inputs:
    """The inputs of the arm content, kept."""
    path = "runs/bench/features.pt"
    if not os.path.exists(path):
        encode, s = reward.load_encoder(args.encoder), curec.Settings(arms="content")
        inputs = curec.arm_inputs(s, beauty(args), encode, {}, None)["content"]
        rl.write_atomically(path, inputs.features)
    return rec.Inputs(torch.load(path, weights_only=True))


# ------------------------------------------------------------------------------------------- speed
def speed(args) -> None:
    """An epoch of `id` in a process of its own, ours and the plain loop in turn; the largest
    difference of their first 50 losses; full evaluation."""
    if args.worker:
        print(json.dumps(one_epoch(args.worker, beauty(args), args.dropout, args.steps)))
        return
    seconds, mb, losses = {"ours": [], "plain": []}, {"ours": [], "plain": []}, []
    for _ in range(args.rounds):
        for kind in ("ours", "plain"):
            found = in_a_process(args, kind)
            seconds[kind].append(found["seconds"])
            mb[kind].append(found["mb"])
    for kind in ("ours", "agree"):
        found = in_a_process(args, kind, "--dropout", "0", "--steps", "50")
        losses.append(found["losses"])
    data = beauty(args)
    score, known = rec.scorer(rec.SASRec(data.n_items)), known_items(data)
    start = time.perf_counter()
    rec.ranks(score, known, data.test)
    value = {
        "epoch_s": seconds,
        "epoch_mb": mb,
        "largest_loss_difference": float(np.abs(np.subtract(*losses)).max()),
        "evaluation_s": time.perf_counter() - start,
    }
    save(args, value)
    print(json.dumps(value, indent=1))


def known_items(data) -> list:
    """What is known of each user at test."""
    return [np.append(s, v) for s, v in zip(data.train, data.valid, strict=True)]


def one_epoch(kind: str, data, dropout: float, steps: int) -> dict:
    """One epoch of `id`, or its first steps: losses, seconds, MB above what was resident before.

    ours: 256 histories with their next item a step. plain: 128 users a step, every position of
    them. agree: the plain loss on our batches, to compare losses.
    """
    torch.manual_seed(0)
    model, rng = rec.SASRec(data.n_items, dropout=dropout), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    histories, goals, _ = rec.training_samples(data.train)
    goals = torch.tensor(goals)
    if kind == "plain":
        histories = [seq[:-1] for seq in data.train if len(seq) > 1]
        following = [seq[1:] for seq in data.train if len(seq) > 1]
    lengths, losses = np.array([min(len(h), rec.MAX_LEN) for h in histories]), []
    before, start = resident_mb(), time.perf_counter()
    for rows in rec.batches(lengths, 128 if kind == "plain" else 256, rng):
        ids = rec.pad([histories[k] for k in rows])
        if kind == "ours":
            loss = rec.next_item_loss(model, ids, goals[rows])
        elif kind == "agree":
            last = F.one_hot(torch.from_numpy(lengths[rows] - 1), rec.MAX_LEN)
            loss = plain_loss(model, ids, last * goals[rows][:, None])
        else:
            loss = plain_loss(model, ids, to_longest(rec.pad([following[k] for k in rows])))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == steps:
            break
    seconds = time.perf_counter() - start
    return {"losses": losses, "seconds": seconds, "mb": resident_mb() - before}


def plain_loss(model, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Plain: padded to the longest history, all logits held at once. ids (B, T); targets (B,
    MAX_LEN), 0 where there is none."""
    table, ids = model.table(), to_longest(ids)
    ago = ((ids > 0).sum(1, keepdim=True) - 1 - torch.arange(rec.MAX_LEN)).clamp(min=0)
    x = model.drop(table[ids] * table.shape[1] ** 0.5 + model.pos(ago))
    x = plain_block(model.block, x)
    logits = F.normalize(model.norm(x), dim=-1) / model.log_tau.exp() @ table.T
    logits[..., 0] = -torch.inf
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)


def plain_block(block, x: torch.Tensor) -> torch.Tensor:
    """A block's states at all positions: x (B, T, D) -> (B, T, D)."""
    B, T, D = x.shape
    y = block.norm1(x)
    parts = block.q(y), *block.kv(y).chunk(2, dim=-1)
    q, k, v = (part.view(B, T, block.heads, -1).transpose(1, 2) for part in parts)
    p = block.dropout if block.training else 0.0
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
    past = F.pad(y, (0, 0, rec.LOCAL - 1, 0))
    local = sum(past[:, at : at + T] * weight for at, weight in enumerate(block.local))
    x = x + block.drop(block.out(a.transpose(1, 2).reshape(B, T, D)) + local)
    return x + block.drop(block.down(F.gelu(block.up(block.norm2(x)))))


def to_longest(ids: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B, MAX_LEN), padded with 0."""
    return F.pad(ids, (0, rec.MAX_LEN - ids.shape[1]))


# ---------------------------------------------------------------------------------- growth, serving
def scale(args) -> None:
    """A training step (128 users of 8 items) and a ranking of 128 users, by catalogue size."""
    if args.worker:
        print(json.dumps(one_catalogue(int(args.worker))))
        return
    rows = [in_a_process(args, n_items) for n_items in CATALOGUES]
    save(args, rows)
    print(curec.markdown(rows))


def one_catalogue(n_items: int) -> dict:
    """A row of the part scale."""
    rng, steps = np.random.default_rng(0), []
    seqs = [1 + rng.choice(n_items, 9, replace=False) for _ in range(128)]
    known, targets = [seq[:-1] for seq in seqs], torch.tensor([seq[-1] for seq in seqs])
    before = resident_mb()
    model = rec.SASRec(n_items)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(4):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        rec.next_item_loss(model, rec.pad(known), targets).backward()
        optimizer.step()
        steps.append(time.perf_counter() - start)
    trained, score = resident_mb(), rec.scorer(model)
    start = time.perf_counter()
    rec.ranks(score, known, targets)
    ranked = time.perf_counter()
    followed = rec.followers(SimpleNamespace(train=known, counts=range(n_items + 1)))
    score = rec.with_transitions(score, followed, 1.0)
    # the first makes its buffer
    rec.ranks(score, known, targets)
    with_term = time.perf_counter()
    rec.ranks(score, known, targets)
    return {
        "items": n_items,
        "parameters": sum(p.numel() for p in model.parameters()),
        # the first makes the optimiser's state
        "step_s": float(np.median(steps[1:])),
        "rank_128_users_s": ranked - start,
        "with_transitions_s": time.perf_counter() - with_term,
        "train_mb": trained - before,
    }


def serving(args, repeats: int = 20) -> None:
    """Ranking with and without 256 features an item and the transition term: interleaved passes
    over 4,096 users."""
    data = beauty(args)
    known, goal = known_items(data)[:4096], data.test[:4096]
    inputs = rec.Inputs(torch.randn(data.n_items + 1, 256))
    score = {"id": rec.scorer(rec.SASRec(data.n_items))}
    score["features"] = rec.scorer(rec.SASRec(data.n_items, inputs))
    score["transitions"] = rec.with_transitions(score["id"], rec.followers(data), 1.0)
    seconds, value = {kind: [] for kind in score}, {}
    for _ in range(repeats):
        for kind in score:
            start = time.perf_counter()
            rec.ranks(score[kind], known, goal)
            seconds[kind].append(time.perf_counter() - start)
    for kind, times in seconds.items():
        quartiles = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
        value[kind] = dict(zip(("q25", "median", "q75"), quartiles, strict=True))
    for kind in ("features", "transitions"):
        value[f"ratio, {kind}"] = value[kind]["median"] / value["id"]["median"]
    save(args, value)
    print(json.dumps(value, indent=1))


PARTS = {part.__name__: part for part in (quality, speed, scale, serving)}


if __name__ == "__main__":
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--encoder", default="", help="Hugging Face text encoder, name or path")
    parser.add_argument("--device", default="cpu", help="of quality's training")
    parser.add_argument("--rounds", type=int, default=2, help="of speed")
    parser.add_argument("--json", default=HERE.with_suffix(".json"), help="where results go")
    own = "for the script itself: what a child process measures"
    parser.add_argument("--worker", default="", help=own)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=0)
    arguments = parser.parse_args()
    PARTS[arguments.part](arguments)
