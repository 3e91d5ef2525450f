"""Kills the demo in its quick form (SIGKILL) at random moments over all stages and resumes it each time: it must end as if nothing had happened.

    python tests/bench/bench_kill.py               20 kills; the tests do six of a smaller run

A round starts in a folder of its own, tiny LLM included, and ends with a run that nobody killed; rounds follow each other until all kills are done.
metrics.json (times and memory apart), reasons.jsonl, ppo.jsonl (apart from its speed) and both adapters must equal those of an undisturbed run, byte for byte.
"""
import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve()
CLOCKS = {"time_s", "peak_memory_mb", "train_s", "rank_ms_per_user", "tokens_per_s"}
FILES = "metrics.json", "reasons.jsonl", "ppo.jsonl", "align/adapter_model.safetensors", "policy/adapter_model.safetensors"


def timeless(x):
    """A JSON value without what a clock or a memory gauge said."""
    if isinstance(x, dict):
        return {k: timeless(v) for k, v in x.items() if k not in CLOCKS}
    return [timeless(v) for v in x] if isinstance(x, list) else x


def outcome(folder: pathlib.Path) -> dict:
    """The files of a finished run as bytes, without clocks."""
    plain = lambda name, raw: raw if name.endswith(".safetensors") else "\n".join(json.dumps(timeless(json.loads(part))) for part in (
        [raw] if name == "metrics.json" else raw.splitlines())).encode()
    return {name: plain(name, (folder / name).read_bytes()) for name in FILES}


def start(cwd: pathlib.Path, flags) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, str(HERE.parents[2] / "curec.py"), "--dataset", "demo", "--quick", *flags], cwd=cwd, env=env,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def survive(flags, kills: int, expected: dict, seconds: float, seed: int) -> list:
    """Rounds of killed and resumed runs until there were `kills` kills, spread over the `seconds` that a run takes; each round's outcome must be the
    one expected. Returns what was killed: (seconds after the start, the stage that was finished last)."""
    rng, killed = random.Random(seed), []
    while len(killed) < kills:
        with tempfile.TemporaryDirectory() as cwd:
            out, resume = pathlib.Path(cwd, "runs/demo"), []
            while True:
                run, begun = start(cwd, [*flags, *resume]), time.monotonic()
                delay = rng.uniform(0, 2 * seconds / max(6, kills / 3)) if len(killed) < kills else float("inf")
                while run.poll() is None and not (out / "config.json").exists():
                    time.sleep(0.01)
                warm = time.monotonic() + (4 if resume else 0)          # packages and the LLM are loaded again: no progress yet
                while run.poll() is None and time.monotonic() < warm + delay:
                    time.sleep(0.01)
                if run.poll() is not None:
                    error = run.stderr.read()
                    assert run.returncode == 0, error
                    break
                run.kill()
                run.wait()
                run.stderr.close()
                done = sorted((out / "state").glob("*.pt"), key=lambda p: p.stat().st_mtime_ns) if out.exists() else []
                killed.append((round(time.monotonic() - begun, 1), done[-1].stem if done else "nothing"))
                resume = ["--resume"]
            found = outcome(out)
            assert [name for name in FILES if found[name] != expected[name]] == [], killed
    return killed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cwd:
        begun, run = time.monotonic(), start(cwd, [])
        error = run.communicate()[1]
        assert run.returncode == 0, error
        seconds, expected = time.monotonic() - begun, outcome(pathlib.Path(cwd, "runs/demo"))
    killed = survive([], args.kills, expected, seconds, args.seed)
    print(f"an undisturbed run takes {seconds:.0f} s; killed after (s, finished last): {killed}")
    print(f"{len(killed)} kills, and every round ended byte for byte like the undisturbed run")
    HERE.with_suffix(".json").write_text(json.dumps({"command": f"python tests/bench/bench_kill.py --kills {args.kills} --seed {args.seed}", "cpus": os.cpu_count(),
                                                     "run_s": seconds, "killed": killed, "equal": True}, indent=1) + "\n")


if __name__ == "__main__":
    main()
