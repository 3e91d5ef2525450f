"""Kills the demo in its quick form (SIGKILL) at random moments over all stages and resumes it each time: it must end as if nothing had happened.

    python tests/bench/bench_kill.py               20 kills; the tests do six of a smaller run

A round starts in a folder of its own, tiny LLM included, and ends with a run that nobody killed; another follows if kills are left.
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


STAGES = "tiny_llm align reward before reference ppo after aligned rl curec bestof arm-popularity arm-id arm-content arm-rl arm-curec".split()


def survive(flags, kills: int, expected: dict, seed: int) -> list:
    """Rounds of killed and resumed runs until there were `kills` kills; each round's outcome must be the one expected. A kill comes at random within two
    seconds after a stage has written something: a unit of work or its result; which stages, is spread evenly over all.
    Returns what was killed: (the stage that was waited for, what was written last, seconds after that)."""
    rng, killed = random.Random(seed), []
    while len(killed) < kills:
        with tempfile.TemporaryDirectory() as cwd:
            state, resume = pathlib.Path(cwd, "runs/demo/state"), []
            while True:
                run, begun = start(cwd, [*flags, *resume]), time.monotonic()
                goal = STAGES[len(killed) * len(STAGES) // kills] if len(killed) < kills else "nothing"
                early = 7 if list(state.glob(f"{goal}.*pt")) else 0            # from an earlier process: packages and LLM are loaded first
                while run.poll() is None and not (list(state.glob(f"{goal}.*pt")) and time.monotonic() > begun + early):
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 2) if run.poll() is None else 0)
                if run.poll() is not None:
                    error = run.stderr.read()
                    assert run.returncode == 0, f"seed {seed}, killed {killed}: {error}"
                    break
                run.kill()
                run.wait()
                run.stderr.close()
                last = max(state.glob("*.pt"), key=lambda p: p.stat().st_mtime_ns)
                killed.append((goal, last.name.removesuffix(".pt"), round(time.time() - last.stat().st_mtime, 1)))
                resume = ["--resume"]
            found = outcome(state.parent)
            assert [name for name in FILES if found[name] != expected[name]] == [], f"seed {seed}, killed {killed}"
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
    killed = survive([], args.kills, expected, args.seed)
    print(*(f"killed in or after {goal}, {after} s after {last} was written" for goal, last, after in killed), sep="\n")
    print(f"{len(killed)} kills of a run of {seconds:.0f} s, and every round ended byte for byte like the undisturbed run")
    HERE.with_suffix(".json").write_text(json.dumps({"command": f"python tests/bench/bench_kill.py --kills {args.kills} --seed {args.seed}", "cpus": os.cpu_count(),
                                                     "run_s": seconds, "killed": killed, "equal": True}, indent=1) + "\n")


if __name__ == "__main__":
    main()
