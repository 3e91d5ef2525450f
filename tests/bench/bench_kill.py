"""Kills the quick demo (SIGKILL) at random moments of all stages and resumes it each time: it must
end as if nothing had happened.

    python tests/bench/bench_kill.py               20 kills, ten minutes or more

A round starts in a folder of its own, tiny LLM included, and ends with a run that nobody killed;
another follows if kills are left. metrics.json, reasons.jsonl, ppo.jsonl (all without times and
memory) and both adapters must equal those of an undisturbed run, byte for byte. Results go to
bench_kill.json beside this file.
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
CUREC = HERE.parents[2] / "curec.py"
CLOCKS = {"time_s", "peak_memory_mb", "train_s", "rank_ms_per_user", "tokens_per_s"}
ADAPTERS = ("align/adapter_model.safetensors", "policy/adapter_model.safetensors")
FILES = ("metrics.json", "reasons.jsonl", "ppo.jsonl", *ADAPTERS)
# waited for in turn; the kills are spread evenly over them
STAGES = (
    "tiny_llm align reward before reference ppo after aligned rl curec bestof "
    "arm-popularity arm-id arm-content arm-rl arm-curec"
).split()
IMPORTS_S = 7  # seconds until a resumed process has loaded packages and LLM


def timeless(value):
    """A JSON value without what a clock or a memory gauge said."""
    if isinstance(value, list):
        return [timeless(v) for v in value]
    if isinstance(value, dict):
        return {name: timeless(v) for name, v in value.items() if name not in CLOCKS}
    return value


def outcome(folder: pathlib.Path) -> dict:
    """The files of a finished run, without clocks."""
    found = {name: (folder / name).read_bytes() for name in FILES}
    found["metrics.json"] = json.dumps(timeless(json.loads(found["metrics.json"])))
    for name in ("reasons.jsonl", "ppo.jsonl"):
        lines = found[name].splitlines()
        found[name] = "\n".join(json.dumps(timeless(json.loads(line))) for line in lines)
    return found


def start(cwd, flags: list) -> subprocess.Popen:
    """A process of the quick demo in the folder cwd."""
    command = [sys.executable, str(CUREC), "--dataset", "demo", "--quick", *flags]
    env = {"OMP_NUM_THREADS": "2"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, **pipes)


def finish(run: subprocess.Popen, told: str = "") -> None:
    """Waits for a process to end well."""
    error = run.communicate()[1]
    assert run.returncode == 0, f"{told}{error}"


def written(state: pathlib.Path, stage: str = "*") -> list:
    """The results and units of work of a stage."""
    return [path for path in state.glob(f"{stage}.*") if path.suffix != ".part"]


def kill(run: subprocess.Popen, state: pathlib.Path, goal: str, rng) -> tuple:
    """Kills a process within two seconds after the stage `goal` has written something: (goal, what
    was written last, seconds after that). () if the process ends before."""
    ready = time.monotonic() + (IMPORTS_S if written(state, goal) else 0)
    while not (written(state, goal) and time.monotonic() > ready):
        if run.poll() is not None:
            return ()
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 2))
    if run.poll() is not None:
        return ()
    run.kill()
    run.wait()
    run.stderr.close()
    last = max(written(state), key=lambda path: path.stat().st_mtime_ns)
    return goal, last.name.removesuffix(".pt"), round(time.time() - last.stat().st_mtime, 1)


def survive(flags: list, kills: int, expected: dict, seed: int) -> list:
    """Rounds of killed and resumed runs until there were so many kills; each round's outcome must
    be the one expected. Returns what was killed (see kill)."""
    rng, killed = random.Random(seed), []
    while len(killed) < kills:
        with tempfile.TemporaryDirectory() as cwd:
            folder = pathlib.Path(cwd, "runs/demo")
            run, alive = start(cwd, flags), True
            while alive and len(killed) < kills:
                goal = STAGES[len(killed) * len(STAGES) // kills]
                how = kill(run, folder / "state", goal, rng)
                if how:
                    killed.append(how)
                    run = start(cwd, [*flags, "--resume"])
                else:
                    alive = False
            told = f"seed {seed}, killed {killed}: "
            finish(run, told)
            found = outcome(folder)
            different = [name for name in FILES if found[name] != expected[name]]
            assert different == [], told
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", default=HERE.with_suffix(".json"), help="where results go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cwd:
        begun = time.monotonic()
        finish(start(cwd, []))
        seconds = time.monotonic() - begun
        expected = outcome(pathlib.Path(cwd, "runs/demo"))
    killed = survive([], args.kills, expected, args.seed)
    for goal, last, after in killed:
        print(f"killed in or after {goal}, {after} s after {last} was written")
    print(f"{len(killed)} kills of a run of {seconds:.0f} s, and every round ended byte for byte")
    print("like the undisturbed run")
    command = f"python tests/bench/bench_kill.py --kills {args.kills} --seed {args.seed}"
    result = {"command": command, "cpus": os.cpu_count(), "run_s": seconds}
    result |= {"killed": killed, "equal": True}
    pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
