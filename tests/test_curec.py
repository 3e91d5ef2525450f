"""curec.py: correction in time order, the truth firewall, and the real command line as a subprocess."""
import ast
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

import curec
import data as D
import reward
import rl

ROOT = Path(curec.__file__).parent
sys.path.insert(0, str(ROOT / "tests/bench"))

import bench_kill  # noqa: E402

SMALL = ["--tiny-steps", "30", "--align-steps", "2", "--ppo-updates", "1", "--ppo-batch", "12", "--epochs", "1", "--device", "cpu"]
QUICK = ["--dataset", "demo", "--quick", *SMALL, "--knowledge-steps", "3"]


ENV = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}


def run(*args, cwd, largest=None):
    """The real command line. largest: bytes a file may have; the kernel refuses more, as a full disk does."""
    limit = largest and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)))
    return subprocess.run([sys.executable, str(ROOT / "curec.py"), *args], cwd=cwd, capture_output=True, text=True, timeout=400, env=ENV, preexec_fn=limit)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One quick run of the real command line; every test below looks at its folder."""
    cwd = tmp_path_factory.mktemp("cwd")
    done = run("--dataset", "demo", "--quick", *SMALL, cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    return cwd, done


def metrics_of(cwd, name="demo"):
    return json.loads((cwd / "runs" / name / "metrics.json").read_text())


def test_quick_run_prints_every_arm_and_the_report(finished):
    cwd, done = finished
    assert all(f"| {arm} |" in done.stdout for arm in curec.METHODS["curec"])
    assert "mean nothing" in done.stdout and "Traceback" not in done.stderr
    assert str(Path("runs/demo/report.md")) in done.stdout
    report = (cwd / "runs/demo/report.md").read_text()
    assert "mean nothing" in report and "Two reasons and how they came about" in report


def test_output_is_plain_text_when_piped(finished):
    """Guards: progress bars, carriage returns and colours in log files."""
    done = finished[1]
    assert not re.search(r"[\r\x1b]|it/s|%\|", done.stdout + done.stderr), done.stderr
    assert re.findall(r"^\[(\d)/(\d)\] (.*)", done.stdout, re.M) == [
        ("1", "5", "LLM"), ("2", "5", "reward model"), ("3", "5", "PPO"), ("4", "5", "reasons"), ("5", "5", "arms")]


def test_the_same_command_makes_the_same_bytes_and_another_seed_others(finished, tmp_path):
    """Guards: gradients that add up in another order on two threads, sets that are walked in another order; a seed that is not used."""
    assert run("--dataset", "demo", "--quick", *SMALL, cwd=tmp_path).returncode == 0
    expected = bench_kill.outcome(finished[0] / "runs/demo")
    assert bench_kill.outcome(tmp_path / "runs/demo") == expected
    assert run("--dataset", "demo", "--quick", *SMALL, "--seed", "1", "--out", "runs/other", cwd=tmp_path).returncode == 0
    assert all(x != expected[name] for name, x in bench_kill.outcome(tmp_path / "runs/other").items())


# ------------------------------------------------------------------------------- killed, interrupted, twice, no space left
def test_killed_at_six_random_moments_a_run_ends_as_if_nothing_had_happened(tmp_path_factory):
    """Guards: any random state, finished unit or half-written file that a kill loses or doubles. Twenty kills: tests/bench/bench_kill.py."""
    flags, cwd = [*SMALL, "--ppo-updates", "3", "--epochs", "6", "--windows", "3"], tmp_path_factory.mktemp("undisturbed")
    assert run("--dataset", "demo", "--quick", *flags, cwd=cwd).returncode == 0
    killed = bench_kill.survive(flags, 6, bench_kill.outcome(cwd / "runs/demo"), seed=int.from_bytes(os.urandom(4), "big"))
    assert len(killed) == 6 and len({last for _, last, _ in killed}) >= 4, killed


def begin(cwd, *flags, until):
    """A run in the background, as soon as it has written that file."""
    process, end = subprocess.Popen([sys.executable, str(ROOT / "curec.py"), "--dataset", "demo", "--quick", *SMALL, *flags], cwd=cwd, env=ENV, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE), time.monotonic() + 200
    while not (cwd / until).exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    return process


@pytest.mark.parametrize("until", ["align.pt", "bestof.pt"])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, until):
    """Guards: a traceback, a hang behind worker processes, a command that cannot be copied."""
    process = begin(tmp_path, "--out", "runs/a b", until=f"runs/a b/state/{until}")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err
    assert re.search(r"--out 'runs/a b' --resume$", err, re.M) and err.count("--resume") == 1


def test_a_run_folder_in_use_refuses_a_second_process(tmp_path):
    """Guards: two runs that write one folder; a lock that outlives a killed run."""
    process = begin(tmp_path, until="runs/demo/config.json")
    second = run("--dataset", "demo", "--quick", *SMALL, cwd=tmp_path)
    assert second.returncode == 2 and "another run is at work there" in second.stderr and len(second.stderr.splitlines()) == 1
    assert process.poll() is None and (tmp_path / "runs/demo/config.json").exists(), "the first goes on"
    process.kill(), process.communicate()
    assert run("--dataset", "demo", "--quick", *SMALL, "--arms", "id", cwd=tmp_path).returncode == 0


def test_what_a_full_disk_refuses_leaves_the_old_file(tmp_path):
    """Guards: a checkpoint that is emptied before the new one is written; errors of torch's zip writer that name no disk."""
    for value in ("text", {"a": torch.zeros(10)}, {"a": torch.zeros(10 ** 6)}):
        path = tmp_path / "state.pt"
        curec.keep(str(path), {"old": torch.ones(2)})
        (full := Path(f"{path}.{os.getpid()}.part")).symlink_to("/dev/full")
        with pytest.raises((OSError, RuntimeError)) as e:
            curec.keep(str(path), value)
        assert "the disk is full" in curec.told(e.value, None) and torch.load(path, weights_only=True)["old"].sum() == 2
        full.unlink()


@pytest.mark.parametrize("largest, redone", [(100_000, None), (20_000, "arm-*")])
def test_a_full_disk_costs_one_line_and_no_finished_work(finished, tmp_path, largest, redone):
    """Guards: a traceback, a folder that --resume cannot go on with; in the first stage and in worker processes."""
    flags, expected = ["--dataset", "demo", "--quick", *SMALL], bench_kill.outcome(finished[0] / "runs/demo")
    if redone:
        shutil.copytree(finished[0] / "runs", tmp_path / "runs"), shutil.copytree(finished[0] / "cache", tmp_path / "cache")
        for f in (tmp_path / "runs/demo/state").glob(redone):
            f.unlink()
    full = run(*flags, *["--resume"] * bool(redone), cwd=tmp_path, largest=largest)
    assert full.returncode == 2 and "the disk is full" in full.stderr and len(full.stderr.splitlines()) == 1, full.stderr
    assert all(torch.load(f, weights_only=True) for f in (tmp_path / "runs/demo/state").glob("*.pt"))
    done = run(*flags, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and bench_kill.outcome(tmp_path / "runs/demo") == expected, done.stderr
    assert not list((tmp_path / "runs").rglob("*.part"))


# ------------------------------------------------------------------------------------------- before a run, and for safety
def test_a_dry_run_tells_prompts_and_writes_nothing(finished, tmp_path):
    """Guards: counts that are not those of the run."""
    done = run("--dataset", "demo", "--quick", *SMALL, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
    asked = {row[0]: int(row[2].replace(",", "")) for row in (line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")) if row[0] != "stage"}
    count = lambda *names: sum(int(n.replace(",", "")) for name, n in re.findall(r"  (.+): ([\d,]+) answers", finished[1].stdout) if name.startswith(names))
    assert asked["reasons"] == count("reasons", "first", "correction", "best of") > 100
    assert asked["PPO"] == count("held-out", "reference") + 12, "what PPO samples is printed by no line: one update of 12"


def test_a_dry_run_lists_downloads_first(tmp_path, monkeypatch, capsys):
    """Guards: a download, or a question to a network, by a command that promises none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(D.urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked the network"))
    assert curec.main(["--dataset", "beauty", "--dry-run", "--llm", "somebody/some-1.5B"]) == 0
    said = capsys.readouterr().out
    assert "reviews_Beauty_5.json.gz" in said and "https://" in said and "somebody/some-1.5B" in said and " GB" in said and not list(tmp_path.iterdir())


def test_errors_are_told_in_one_line_and_shown_with_debug(monkeypatch, capsys):
    def broken(s):
        raise KeyError("a bug")
    monkeypatch.setattr(curec, "pipeline", broken)
    assert curec.main(["--device", "cpu"]) == 2
    assert re.fullmatch(r"curec.py: error: KeyError: 'a bug' .*--debug.*\n", capsys.readouterr().err)
    with pytest.raises(KeyError):
        curec.main(["--device", "cpu", "--debug"])


FLAGS = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(curec.Settings)] + ["--nothing", "-x", "loose"]
VALUES = st.one_of(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=12), st.integers().map(str), st.floats().map(str),
                   st.sampled_from(["demo", "beauty", "id,curec", "all", "cuda:99", "cpu", "shuffle", "lane", "nan", "-1", "1e99", "tiny"]))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FLAGS), st.one_of(st.none(), VALUES)), max_size=6))
def test_any_command_line_is_taken_or_refused_in_one_line(pairs):
    """Guards: tracebacks of a mistyped command line; a look at a run that starts one and deletes the old."""
    args, went, err = [x for flag, value in pairs for x in ([flag] if value is None else [f"{flag}={value}"])], [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        for name in ("pipeline", "plan", "look"):
            patch.setattr(curec, name, lambda s, name=name: went.append((name, s)))
        patch.setattr(sys, "stdout", None)                      # closed, as by >&-
        try:
            status = curec.main([a for a in args if not a.startswith("--debug")])
        except SystemExit as e:
            status = e.code
    assert (status, len(went)) in ((0, 1), (2, 0)) and (status == 0 or re.fullmatch("curec.py: error: [^\n]*(\n[^\n]*)*\n", err.getvalue()))
    assert not (any(a.startswith("--run") for a in args) and went and went[0][0] != "look")


@pytest.mark.parametrize("people, seed", [(1, 0), (4, 1), (12, 2), (12, 3)])
def test_very_few_people_end_in_one_line_or_in_a_report(finished, tmp_path, people, seed):
    """Guards: a PPO that looks for ever for a prompt to train on, means of nothing, stacks of nothing; an explanation that offers what is there already."""
    (tmp_path / "few").mkdir()
    (tmp_path / "few/interactions.csv").write_text("user,item,timestamp\n" + "".join(f"u{u},i{(u + k * (1 + u % 3)) % 11},{k}\n" for u in range(people) for k in range(9)))
    (tmp_path / "few/items.jsonl").write_text("".join(json.dumps({"id": f"i{i}", "title": " ".join(D.ASPECTS[i: i + 3])}) + "\n" for i in range(11)))
    done = run("--dataset", "few", "--k-core", "0", "--quick", *SMALL, "--arms", "content,curec", "--seed", str(seed), cwd=tmp_path)
    if people < 10:
        assert done.returncode == 2 and "at least 10 people" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "NaN" not in (tmp_path / "runs/few/metrics.json").read_text()
    done = run("--run", "runs/few", "--explain", "u3", cwd=tmp_path)
    assert done.returncode == 0 and "-inf" not in done.stdout and done.stdout.count("** (i") == 11 - 8, "what is left"


def test_the_readmes_python_runs(finished, tmp_path):
    """Your own data, reward and encoder, the adapters, metrics.json: as a reader would paste them."""
    for name in ("runs", "cache"):
        shutil.copytree(finished[0] / name, tmp_path / name)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 5 and [len(b.splitlines()) <= n for b, n in zip(blocks[1:4], (5, 10, 10))] == [True] * 3
    (tmp_path / "pasted.py").write_text("\n".join(["import json\nllm_path = json.load(open('runs/demo/config.json'))['llm_path']", *blocks]))
    done = subprocess.run([sys.executable, "pasted.py"], cwd=tmp_path, env={**ENV, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run("--dataset", "mine", "--arms", "popularity,id", "--epochs", "2", "--seeds", "1", cwd=tmp_path).returncode == 0
    assert metrics_of(tmp_path, "mine")["dataset"] == {"name": "mine", "users": 40, "items": 8, "interactions": 240, "ties": "file"}


def test_nothing_in_the_tree_runs_foreign_code():
    """No eval, exec, pickle, unsafe torch.load, remote code or shell; every address is https. (Tests may name what they refuse.)"""
    seen = 0
    for path in (p for p in [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]):
        tree, ours = ast.parse(path.read_text()), path.parent == ROOT
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, path
            if ours and isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "http://" not in node.value and "ftp://" not in node.value, (path, node.lineno)
            if not isinstance(node, ast.Call):
                continue
            name, given_ = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"), (path, node.lineno)
            assert given_.get("shell", "False") == "False" and given_.get("allow_pickle", "False") == "False", (path, node.lineno)
            assert given_.get("trust_remote_code", "False") == "False", (path, node.lineno)
            if name == "torch.load":
                assert given_.get("weights_only") == "True", (path, node.lineno)
            if ours and name.endswith("from_pretrained") and "Model" in name:
                assert given_.get("use_safetensors") == "True" and given_.get("trust_remote_code") == "False", (path, node.lineno)
            seen += name.startswith(("torch.load", "subprocess."))
    assert seen > 5, "the scan looks at calls"


def test_run_folder_keeps_the_contract(finished):
    """DESIGN section 9: other tools read these names."""
    cwd, _ = finished
    m, folder = metrics_of(cwd), cwd / "runs/demo"
    assert set(m) == {"dataset", "arms", "comparisons", "headroom", "reasons", "correction", "reward", "ppo", "time_s", "peak_memory_mb"}
    assert set(m["dataset"]) == {"name", "users", "items", "interactions", "ties"}
    for arm in m["arms"].values():
        assert set(arm) == {"seeds", "valid", "test", "slices", "audit", "train_s", "rank_ms_per_user"}
        assert {"hr@10", "ndcg@10", "mrr"} <= set(arm["test"]) and len(arm["test"]["mrr"]) == len(arm["seeds"])
    assert set(m["reasons"]) == {"aligned", "rl", "bestof", "curec"}
    assert {"truth_precision", "truth_recall", "new_driver", "grounded", "format_ok", "mean_tokens", "mean_reward"} == set(m["reasons"]["curec"])
    assert {"reward_before", "reward_after", "kl", "updates"} == set(m["ppo"]) and {"auc_heldout", "epochs", "best_epoch", "driver_choice", "driver_items"} == set(m["reward"])
    assert set(m["time_s"]) == {"load", "tiny_llm", "align", "reward", "ppo", "correct", "downstream", "total"}
    rows = [json.loads(x) for x in (folder / "reasons.jsonl").read_text().splitlines()]
    assert len(rows) == m["dataset"]["items"] and {"item", "title", "aligned", "rl", "timeline", "reason"} == set(rows[0])
    config = json.loads((folder / "config.json").read_text())
    assert {"settings", "windows", "versions", "git_commit", "hardware", "llm_path"} <= set(config)
    assert {p.name for p in folder.iterdir()} == {".lock", "config.json", "metrics.json", "reasons.jsonl", "ppo.jsonl", "report.md", "align", "policy", "state"}
    assert not list(folder.rglob("*.part")) and {p.name for p in (folder / "align").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_run_that_cannot_start_leaves_the_old_one_alone_and_a_new_one_clears_it(tmp_path, monkeypatch, capsys):
    """Guards: hours of work deleted by a mistyped --data-dir; figures of an older run beside the new ones; other people's folders."""
    monkeypatch.chdir(tmp_path)
    s = curec.resolve(curec.Settings(dataset="demo", out="runs/x"))
    old = [tmp_path / "runs/x" / name for name in ("state/arm-id.pt", "align/a", "metrics.json", "reasons.jsonl", "config.json", "own.txt", "own.part", "sub/9.part")]
    for p in old:
        p.parent.mkdir(parents=True, exist_ok=True), p.write_text('{"settings": {}}')
    assert curec.main(["--dataset", "no_such_folder/here", "--data-dir", "nowhere", "--out", "runs/x"]) == 2
    assert all(p.exists() for p in old), capsys.readouterr().err
    curec.open_run(s)
    assert [p.name for p in old if p.exists()] == ["config.json", "own.txt", "own.part", "9.part"] and not (tmp_path / "runs/x/state").exists()
    (tmp_path / "runs/x/config.json").write_text('{"model_type": "qwen2"}'), (tmp_path / "runs/x/align").mkdir()
    for resume in (False, True):                                # somebody's model, then somebody's state
        with pytest.raises(D.DataError, match="another folder|does not exist"):
            curec.open_run(replace(s, resume=resume))
    (tmp_path / "runs/x/config.json").unlink(), (tmp_path / "runs/x/state").mkdir()
    with pytest.raises(D.DataError, match="another folder"):
        curec.open_run(s)
    assert (tmp_path / "runs/x/align").exists() and (tmp_path / "runs/x/own.part").exists()


def test_a_run_gone_on_with_at_another_commit_says_so(tmp_path, monkeypatch):
    """Guards: figures half made by older code under the name of the newest commit."""
    s, git = curec.resolve(curec.Settings(dataset="demo", out=str(tmp_path))), lambda out: lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout=out + "\n")
    for begun, now, told in (("", "aaa", "aaa"), ("aaa", "aaa", "aaa"), ("aaa", "bbb-dirty", "aaa, bbb-dirty"), ("aaa, bbb-dirty", "bbb", "aaa, bbb-dirty"),
                             ("", "", "unknown"), ("aaa", "", "aaa, unknown")):                   # no repository: git says nothing
        monkeypatch.setattr(curec.subprocess, "run", git(now))
        config = curec.describe(s, [1, 2], begun)
        assert config["git_commit"] == told
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert curec.open_run(dataclasses.replace(s, resume=True)) == told


@pytest.mark.parametrize("adapter", ["align", "policy"])
def test_adapters_load_with_plain_transformers_and_peft(finished, adapter):
    """The README's five lines."""
    cwd, _ = finished
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    path = cwd / json.loads((cwd / "runs/demo/config.json").read_text())["llm_path"]
    tokenizer, base = PreTrainedTokenizerFast.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    before = base(**tokenizer("Item: grip", return_tensors="pt")).logits
    model = PeftModel.from_pretrained(base, cwd / "runs/demo" / adapter)
    after = model(**tokenizer("Item: grip", return_tensors="pt")).logits
    assert torch.isfinite(after).all() and not torch.equal(before, after)


def test_resume_does_no_finished_stage_again_and_changes_no_figure(finished):
    cwd, _ = finished
    before = metrics_of(cwd)
    (cwd / "runs/demo/state/arm-curec.pt").unlink()                                 # as if killed in the last but one arm
    done = run("--dataset", "demo", "--quick", *SMALL, "--resume", cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    after = metrics_of(cwd)
    assert all(before["time_s"][k] == after["time_s"][k] for k in ("tiny_llm", "align", "reward", "ppo", "correct"))
    waited = sum(torch.load(f, weights_only=True)["seconds"] for f in (cwd / "runs/demo/state").glob("arm-*.pt"))
    assert waited < after["time_s"]["downstream"] < waited + 60, "arms of both processes, and the features"
    for m in (before, after):
        assert m["time_s"].pop("total") == pytest.approx(sum(m["time_s"].values()))
        m.pop("time_s"), m.pop("peak_memory_mb")
        for arm in m["arms"].values():
            arm.pop("train_s"), arm.pop("rank_ms_per_user")
    assert before == after


def test_every_ppo_answer_is_used_for_one_pass(finished):
    """Guards: --ppo-batch answers learnt from twice: 12 in minibatches of 4 are 3 steps an update."""
    cwd, _ = finished
    log = [json.loads(line) for line in (cwd / "runs/demo/ppo.jsonl").read_text().splitlines()]
    assert [r["steps"] for r in log] == [3]


def test_score_prints_the_reward_of_a_reason_written_by_hand(finished):
    """The same reason must earn the same as the run's own; a bad one less; an unknown item gets one line."""
    cwd, _ = finished
    row = next(r for r in map(json.loads, (cwd / "runs/demo/reasons.jsonl").read_text().splitlines()) if D.REASON_PATTERN.fullmatch(r["reason"]))
    look = lambda *args: run("--run", "runs/demo", *args, cwd=cwd)
    done = look("--score", row["reason"], "--item", row["item"])
    mine, theirs = [line.split("|")[2:] for line in done.stdout.splitlines() if line.startswith("| people")]
    assert done.returncode == 0 and mine == theirs and row["title"] in done.stdout
    empty = look("--score", "nothing", "--item", row["item"]).stdout.splitlines()
    rewards = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in empty if line.startswith(("| people", "| nothing"))}
    assert rewards["nothing"] < rewards[row["reason"]] - 1, "the format penalty at least"
    wrong = look("--score", "x", "--item", "D9999")
    assert wrong.returncode == 2 and "D9999" in wrong.stderr and "D0001" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
    assert look("--score", "x").returncode == 2 and look("--item", "D0001").returncode == 2


def test_resume_refuses_other_settings(finished):
    cwd, _ = finished
    done = run("--dataset", "demo", "--quick", *SMALL, "--seed", "3", "--resume", cwd=cwd)
    assert done.returncode == 2 and "--seed" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    RuntimeError("CUDA error: an illegal memory access was encountered")], ids=["cuda", "python", "cpu", "cublas", "other"])
def test_out_of_memory_is_told_from_other_errors(error, tmp_path, monkeypatch, capsys):
    """A traceback where a flag would help, inside a stage or after it; a real fault that is taken for full memory."""
    def full(s):
        Path("runs/demo/state").mkdir(parents=True)
        curec.stage(s, "align", {}, lambda _: 0)
        raise error
    monkeypatch.chdir(tmp_path), monkeypatch.setattr(curec, "pipeline", full)
    assert curec.main(["--device", "cpu", "--micro-batch", "6"]) == 2
    said = "RuntimeError: .*illegal.*--debug" if "illegal" in str(error) else "stage align with --micro-batch 6.*--resume --micro-batch 3"
    assert re.search(said, capsys.readouterr().err)


def test_out_of_memory_in_ppo_loses_no_finished_update(finished, tmp_path, monkeypatch, capsys):
    """Hours of PPO done again; a smaller micro-batch refused as another setting; ppo.jsonl without its first lines."""
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    args = ["--dataset", "demo", "--quick", *SMALL, "--ppo-updates", "3", "--proposals", "1", "--arms", "curec"]
    original, calls, log = rl.learn, [], tmp_path / "runs/demo/ppo.jsonl"

    def full(*args, **settings):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*args, **settings)
    monkeypatch.setattr(rl, "learn", full)
    assert curec.main(args) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "stage ppo" in said and "--micro-batch 16" in said and "--resume --micro-batch 8" in said
    before = log.read_text().splitlines()
    assert len(before) == 2 and {"align.pt", "reward.pt", "ppo.units.pt"} <= {p.name for p in log.with_name("state").iterdir()}
    assert curec.main([*args, "--resume", "--micro-batch", "8"]) == 0
    assert log.read_text().splitlines()[:2] == before and len(log.read_text().splitlines()) == 3 and len(calls) == 4


def test_explain_shows_items_reasons_and_their_history(finished):
    cwd, _ = finished
    done = run("--run", "runs/demo", "--explain", "user3", cwd=cwd)
    assert done.returncode == 0 and "user3 chose:" in done.stdout and "until 20" in done.stdout
    assert "-inf" not in done.stdout and "** rejected" not in done.stdout
    done = run("--run", "runs/demo", "--explain", "nobody", cwd=cwd)
    assert done.returncode == 2 and "user0" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("args, hint", [
    (["--no-such-flag"], "--no-such-flag"), (["--seeds", "many"], "--seeds"), (["--arms", "id,magic"], "magic"), (["--method", "lane", "--arms", "id"], "--arms"),
    (["--knowledge-steps", "0"], "knowledge-steps"),
    (["--dataset", "demo", "--ties", "shuffle"], "--ties"), (["--dataset", "beauty", "--arms", "oracle"], "oracle"),
    (["--run", "runs/x"], "--explain"), (["--run", "", "--explain", "u"], "--run"), (["--run", ""], "--run"), (["--run", "runs/x", "--explain", ""], "--explain"), (["--run", "nowhere", "--explain", "u"], "config.json"), (["--seeds", "0"], "--seeds"),
    (["--resume", "--out", "nowhere"], "--resume"), (["--ties", "random"], "--ties"), (["--windows", "-1"], "--windows"), (["--temperature", "0"], "--temperature")])
def test_bad_flags_end_with_one_line_and_status_2(args, hint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = curec.main(args)
    except SystemExit as e:
        status = e.code
    err = capsys.readouterr().err
    assert status == 2 and hint in err and len(err.strip().splitlines()) == 1, err


def test_a_catalogue_is_spelt_before_it_is_reasoned_about(monkeypatch, tmp_path):
    """Guards: spelling lessons for the demo, whose figures were measured without, or there by whether the truth is known; lessons that do not
    add up to --tiny-steps; valid or test in them."""
    monkeypatch.chdir(tmp_path)
    made, shop = [], D.demo(0, n_users=60, n_items=40)
    monkeypatch.setattr(rl, "train_tiny", lambda path, texts, lessons, tags, lower, **_: made.append((path, lower, lessons)))
    unknown, other = (dataclasses.replace(shop, truth=None, seqs=seqs) for seqs in (shop.seqs, [np.append(s[:-2], [1, 2]) for s in shop.seqs]))
    for name, data in (("demo", shop), ("demo", unknown), ("things", unknown), ("things", other)):
        curec.tiny_llm(curec.resolve(curec.Settings(dataset=name, tiny_steps=100, device="cpu")), data)
    (demo, *others), blind, (real, *plan), (_, *same) = made
    assert blind == (demo, *others), "whether the truth is known must not matter to what the LLM is taught"
    assert [others[0], [(name, n) for name, _, n in others[1]]] == [False, [("short prompts", 40), ("all prompts", 60)]] and demo != real
    assert [plan[0], [(name, n) for name, _, n in plan[1]]] == [True, [("spelling", 25), ("short prompts", 30), ("all prompts", 45)]] and same == plan
    prompt, answer = plan[1][0][1][4]
    assert answer.split() == shop.phrases[5] and "- nobody yet" in prompt and shop.titles[5] in prompt
    assert [curec.resolve(curec.Settings(dataset=d)).tiny_steps for d in ("demo", "beauty")] == [1000, 4000]


def test_a_run_without_reasons_or_headroom_reports_its_arms(tmp_path, monkeypatch, capsys):
    """Guards: tables of reasons and a headroom that were never measured; a killed start that blocks its own folder; seeds for nothing."""
    monkeypatch.chdir(tmp_path)
    curec.open_run(curec.resolve(curec.Settings()))                                # killed before config.json was written
    assert curec.main(["--dataset", "demo", "--quick", "--arms", "popularity,id", "--seeds", "2", "--seed", "3", "--device", "cpu"]) == 0
    report, m = Path("runs/demo/report.md").read_text(), metrics_of(tmp_path)
    assert "| id |" in capsys.readouterr().out and "## Reasons" not in report and "Headroom" not in report
    assert {arm: e["seeds"] for arm, e in m["arms"].items()} == {"popularity": [3], "id": [3, 4]} and not {"reasons", "headroom", "ppo", "reward"} & set(m)


def test_missing_files_say_what_to_put_where(capsys, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(D.urllib.request, "urlopen", offline)
    monkeypatch.chdir(tmp_path)
    assert curec.main(["--dataset", "beauty", "--arms", "id"]) == 2
    err = capsys.readouterr().err
    assert all(x in err for x in ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz", "https://", "--data-dir", "--dataset demo"))


def test_help_fits_two_screens():
    done = run("--help", cwd=ROOT)
    assert done.returncode == 0 and len(done.stdout.splitlines()) <= 80
    assert all("--" + f.name.replace("_", "-") in done.stdout for f in dataclasses.fields(curec.Settings))


# ------------------------------------------------------------------------------------------ correction, in process
@pytest.fixture
def fake_llm(monkeypatch):
    """An LLM that answers with two phrases of the prompt's item, drawn by the prompt alone: fast, and blind to all else."""
    def generate(model, tokenizer, prompts, **_):
        out, count = [], {}
        for p in prompts:
            count[p] = count.get(p, 0) + 1
            seed = int.from_bytes(hashlib.sha256(f"{p}{count[p]}".encode()).digest()[:4], "big")
            said = set(D.words(p.rsplit("Item: ", 1)[1].split("\n")[0])) - D.STOPWORDS
            own = sorted(said & set(D.ASPECTS) if len(said & set(D.ASPECTS)) > 1 else said | {"this", "that"})
            a, b = np.random.default_rng(seed).permutation(own)[:2]
            out.append(f"<think> x </think> <reason> {D.REASON.format(a, b)} </reason>")
        return out, None
    monkeypatch.setattr(rl, "generate", generate)
    monkeypatch.setattr(rl, "use", lambda *_: None)


def bag_of_words(texts):
    return torch.tensor([[float(a in t.split()) for a in D.ASPECTS] for t in texts])


def hashed_words(texts, width=96):
    place = lambda w: int.from_bytes(hashlib.sha256(w.encode()).digest()[:4], "big") % width
    return torch.from_numpy(np.stack([np.bincount([place(w) for w in t.split()], minlength=width) for t in texts])).float()


def corrected(shop, cuts, judge_weights=None, settings=None, encode=bag_of_words):
    judge = reward.Judge(shop, encode)
    judge.remember(judge_weights or judge.model.state_dict())
    s = curec.resolve(settings or curec.Settings(margin=0.0, windows=3))
    return curec.correct(s, shop, None, None, judge, D.choosers(shop), cuts), judge


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("source", ["demo", "beauty"])
def test_correction_is_causal(fake_llm, source, windows):
    """With weights and boundaries fixed, replacing the item of every event after so many windows leaves earlier timeline entries
    identical: also of people who waited, and of reasons that were corrected before. Beauty: real timestamps, many of them equal."""
    if source == "beauty" and not (files := ROOT.parent / "shared/data/amazon2014").exists():
        pytest.skip("../shared/data is not here")
    shop = D.demo(0, n_users=600, n_items=80) if source == "demo" else D.load("beauty", str(files), limit_items=300)
    cuts, encode = reward.window_cuts(shop, 3), bag_of_words if source == "demo" else hashed_words
    (_, _, before, *_), judge = corrected(shop, cuts, encode=encode)
    rng = np.random.default_rng(0)
    seqs = []
    for s, t in zip(shop.seqs, shop.times):
        fresh = s.copy()
        later = np.flatnonzero(t >= cuts[windows])
        fresh[later] = rng.choice(np.setdiff1d(np.arange(1, shop.n_items + 1), s), len(later), replace=False)
        seqs.append(fresh)
    (_, _, after, *_), _ = corrected(dataclasses.replace(shop, seqs=seqs), cuts, judge.model.state_dict(), encode=encode)
    first = lambda timelines: [[e for e in t if e["window_end"] <= cuts[windows]] for t in timelines]
    assert first(before) == first(after) and sum(map(len, first(before))) > 20
    assert before != after, "later windows must differ, or the test replaced nothing"


def test_every_third_proposal_is_by_align_and_all_are_hot(monkeypatch):
    """Guards: answers in another order than their prompts; proposals that PPO has narrowed down to one."""
    calls, active = [], []
    monkeypatch.setattr(rl, "use", lambda model, adapter: active.append(adapter))
    monkeypatch.setattr(rl, "generate", lambda model, tokenizer, p, **kw: (calls.append((active[-1], kw["temperature"])), ([f"{active[-1]} {x}" for x in p], None))[1])
    for n in (1, 2, 7):
        assert curec.sampling(curec.resolve(curec.Settings(temperature=0.3)))["temperature"] == 0.3, "reasons and PPO stay as asked for"
        made = curec.propose(curec.resolve(curec.Settings()), None, None, [f"p{k}" for k in range(n)], 0, "x")
        assert made == [f"{'policy' if k % 3 else 'align'} p{k}" for k in range(n)]
    assert set(calls) == {("align", 1.0), ("policy", 1.0)}


def test_judges_of_bestof_are_in_no_prompt_of_it(fake_llm, monkeypatch, tmp_path):
    """Guards: the control for correction picked by the people whose histories its prompt echoes."""
    shop, seen, prompts, fake = D.demo(0, n_users=600, n_items=80), [], [], rl.generate
    monkeypatch.setattr(rl, "generate", lambda model, tokenizer, p, **kw: (prompts.append(p), fake(model, tokenizer, p, **kw))[1])
    judge, cuts = reward.Judge(shop, bag_of_words), reward.window_cuts(shop, 2)
    judge.remember(judge.model.state_dict())
    real = reward.Judge.rewards
    monkeypatch.setattr(reward.Judge, "rewards", lambda self, items, answers, shown, audience, *rest: (
        seen.append((items, shown, audience)), real(self, items, answers, shown, audience, *rest))[1])
    s = curec.resolve(curec.Settings())
    monkeypatch.chdir(tmp_path)
    timelines = [[]] + [r["timeline"] for r in curec.write_reasons(s, shop, None, None, judge, D.choosers(shop), cuts, {})[1]]
    items, shown, judges = seen[-1]
    groups = [[] for _ in range(shop.n_items + 1)]
    for _, _, some, people, _ in reward.windows(shop, D.choosers(shop), cuts, s.seed):
        for i, p in zip(some, people):
            groups[i].append(p)
    assert np.bincount(items)[1:].tolist() == [1 + s.proposals * len(t) for t in timelines[1:]], "as many as curec made"
    asked = [D.reason_prompt(shop, i, "", p) for i, mine in enumerate(groups) for p in mine for _ in range(s.proposals)]
    assert prompts[-2] == asked[::3] and prompts[-1] == [p for k, p in enumerate(asked) if k % 3], "to the people that curec was shown"
    assert all(sorted(a) == sorted(e for p in groups[i] for e in p) for i, a in zip(items, shown)), "and what is shown is what it is judged by"
    assert len(items) > 5 * shop.n_items and not any(set(a) & set(b) for a, b in zip(shown, judges))
    assert sum(len(a) > 0 and len(b) > 0 for a, b in zip(shown, judges)) > 0.9 * len(items)


def test_correction_moves_reasons_towards_the_truth(fake_llm):
    """With random proposals and an ideal encoder, accepted corrections must name drivers more often than first reasons."""
    shop = D.demo(0, n_users=900, n_items=80)
    (_, answers, timelines, _, judged, rows), _ = corrected(shop, reward.window_cuts(shop, 2), settings=curec.Settings(windows=2, margin=0.5))
    named = lambda texts: reward.truth_figures([D.parse_answer(a)[1] for a in texts], {k: v[1:] for k, v in shop.truth.items()})["truth_precision"]
    first = rl.generate(None, None, [D.reason_prompt(shop, i, "", ()) for i in range(1, shop.n_items + 1)])[0]
    assert named(answers[1:]) > named(first) + 0.1
    assert sum(r["accepted"] for r in rows) == sum(e["accepted"] for t in timelines for e in t) > 0


def test_truth_feeds_nothing(finished, tmp_path, monkeypatch):
    """Permute the truth with the interactions fixed: every file stays identical except truth figures and the oracle arm."""
    cwd, _ = finished
    original = D.demo

    def permuted(*args, **kwargs):
        world = original(*args, **kwargs)
        rng = np.random.default_rng(1)
        shuffled = {k: [()] + [v[i] for i in 1 + rng.permutation(len(v) - 1)] for k, v in world.truth.items()}
        return dataclasses.replace(world, truth=shuffled)
    monkeypatch.setattr(D, "demo", permuted)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").symlink_to(cwd / "cache")
    torch.set_num_threads(2)                                                        # as the subprocess: same sums, bit for bit
    assert curec.main(["--dataset", "demo", "--quick", *SMALL]) == 0
    torch.set_num_threads(1)
    a, b = metrics_of(cwd), metrics_of(tmp_path)
    for x, y in zip(*((c / "runs/demo/reasons.jsonl").read_text().splitlines() for c in (cwd, tmp_path))):
        assert x == y
    truth = {"truth_precision", "truth_recall", "new_driver"}
    read = lambda cwd, name: (cwd / "runs/demo" / name).read_bytes()
    for name in ("align/adapter_model.safetensors", "policy/adapter_model.safetensors"):
        assert read(cwd, name) == read(tmp_path, name)
    ppo = lambda cwd: [{k: v for k, v in json.loads(x).items() if k != "tokens_per_s"} for x in read(cwd, "ppo.jsonl").splitlines()]
    weights = lambda cwd: torch.load(cwd / "runs/demo/state/reward.pt", weights_only=True)["value"]["weights"]
    assert ppo(cwd) == ppo(tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(weights(cwd).values(), weights(tmp_path).values()))
    strip = lambda m: ({arm: {k: v for k, v in e.items() if k not in ("train_s", "rank_ms_per_user")} for arm, e in m["arms"].items()
                        if arm != "oracle"}, [c for c in m["comparisons"] if c["a"] != "oracle" and c["metric"] != "new_driver"], m["correction"], m["ppo"], m["reward"]["auc_heldout"],
                       {k: {n: x for n, x in v.items() if n not in truth} for k, v in m["reasons"].items()})
    assert strip(a) == strip(b)
    assert a["reasons"]["curec"]["truth_precision"] != b["reasons"]["curec"]["truth_precision"]


# ----------------------------------------------------------------------------------------------- the two relatives
def test_malformed_preferences_are_asked_for_five_times_and_dropped(monkeypatch):
    """Guards: an answer that stops the run; a user asked again who had answered; a history that shows what is to be predicted; a tuned LLM."""
    shop, asked, adapters = D.demo(0, 30, 20), [], ["on"]
    good, s = '{"preferences": ["a", "b", "c", "d", "E"]}', curec.resolve(curec.Settings(method="lane"))

    @contextmanager
    def off():
        adapters[0] = "off"
        yield
        adapters[0] = "on"

    def answers(model, tokenizer, prompts, **how):
        assert adapters == ["off"]
        asked.append(prompts)
        texts = ['{["a", "b", "c", "d", "e"]}'] + ["{" * len(asked)] * (len(prompts) - 1)
        return [good, *texts[1:]] if len(asked) == 2 else texts, None                # at the second time of asking the first list comes
    monkeypatch.setattr(rl, "generate", answers)
    told = curec.prefer(s, shop, SimpleNamespace(disable_adapter=off), None)
    assert [len(prompts) for prompts in asked] == [60, 60, 59, 59, 59] and told["names"][0] == list("abcdE") and told["names"].count([]) == 59
    for u, seq in enumerate(shop.train):
        assert told["since"][u].tolist() == [max(1, len(seq) // 2), max(1, len(seq) - 1)]
        for cut in (0, 1):
            assert asked[0][2 * u + cut] == D.question(shop, seq[: told["since"][u][cut]], "prefer", longest=D.LONGEST)
    assert asked[0] == asked[1] and "user" not in asked[0][0]
    inputs = reward.features("lane", shop, lambda texts: torch.randn(len(texts), 12), {}, 0, told)
    named = inputs["preferences"]["named"]
    assert named.shape == (30, 2, 5) and named[0].tolist() == [[1, 2, 3, 4, 5]] * 2 and (named[1:] == 0).all(), "a dropped cut keeps the earlier one's"
    told["names"] = [list("abcde")[u % 5:] + list("fghij")[: u % 5] for u in range(30) for _ in range(2)]
    mixed, own = (reward.features(arm, shop, lambda texts: torch.randn(len(texts), 12), {}, 0, told)["preferences"]["named"] for arm in ("lane-placebo", "lane"))
    assert not torch.equal(mixed, own) and sorted(mixed.tolist()) == sorted(own.tolist()), "the placebo: the same preferences, of other users"


def test_a_users_future_changes_no_preference_and_no_earlier_score(monkeypatch):
    """Guards: LANE's original fault, preferences drawn from the whole train history, told to early positions."""
    shop = D.demo(0, 30, 20)
    later = replace(shop, seqs=[np.append(s[: len(s) // 2], s[len(s) // 2:][::-1]) for s in shop.seqs])          # the second half in another order
    def answers(model, tokenizer, prompts, **how):                                        # what is preferred depends on all that is shown
        return [json.dumps({"preferences": [f"{k}{hashlib.sha256(p.encode()).hexdigest()[:8]}" for k in range(5)]}) for p in prompts], None
    monkeypatch.setattr(rl, "generate", answers)
    encode = lambda texts: torch.stack([torch.randn(12, generator=torch.Generator().manual_seed(zlib.crc32(t.encode()))) for t in texts])

    def scores(world, lengths):
        told = curec.prefer(curec.resolve(curec.Settings(method="lane")), world, SimpleNamespace(disable_adapter=nullcontext), None)
        torch.manual_seed(0)
        model = curec.recommender.SASRec(world.n_items, **reward.features("lane", world, encode, {}, 0, told)).eval()
        return curec.recommender.scorer(model)([s[:n] for s, n in zip(shop.train, lengths)], range(30))
    early, late = ([len(s) - 2 for s in shop.train], [len(s) - 1 for s in shop.train])               # just before the second cut, and at it
    torch.testing.assert_close(scores(shop, early), scores(later, early))
    assert not torch.allclose(scores(shop, late), scores(later, late), atol=1e-3), "the comparison can fail: later positions know more"


def test_the_beams_titles_become_scores_and_all_others_a_miss(monkeypatch):
    """Guards: an item number off by one, the worst beam in front, a beam without a title that scores an item."""
    shop, s = D.demo(0, 30, 20), curec.resolve(curec.Settings(method="knowledge"))
    monkeypatch.setattr(curec, "taught", lambda *a, **k: None)
    monkeypatch.setattr(curec, "stage", lambda *a: {})
    monkeypatch.setattr(rl, "use", lambda *a: None)
    monkeypatch.setattr(rl, "title_trie", lambda tokenizer, titles: (titles == shop.titles[1:] or 1 / 0, None))
    monkeypatch.setattr(rl, "retrieve", lambda model, tokenizer, prompts, *trie, **how: torch.tensor([[3, 0, -1]] * len(prompts)))
    model = SimpleNamespace(add_adapter=lambda *a: None, peft_config={"align": LoraConfig()})
    score = curec.know(s, shop, model, None, {"time_s": {}}, beams=3)(shop.train[:2], range(2))
    assert score.shape == (2, 21) and score[0, 4] > score[0, 1] > 0 and (score[:, [k for k in range(1, 21) if k not in (4, 1)]] == curec.recommender.MISS).all()


@pytest.fixture(scope="module")
def relatives(finished):
    cwd, _ = finished
    done = [run(*QUICK, "--method", "lane", "--out", "runs/lane", cwd=cwd), run(*QUICK, "--method", "knowledge", "--out", "runs/knowledge", cwd=cwd)]
    assert all(d.returncode == 0 for d in done), done[0].stderr[-2000:] + done[1].stderr[-2000:]
    return cwd, done


def test_all_arms_run_together_and_are_taken_up_again(relatives):
    """Guards: an adapter of one method that is on while another speaks; a finished stage of a relative that is done again, or otherwise."""
    cwd, _ = relatives
    flags = *QUICK, "--arms", "curec,text-init,lane,knowledge", "--out", "runs/together"
    assert (done := run(*flags, cwd=cwd)).returncode == 0, done.stderr[-2000:]
    alone, first, out = metrics_of(cwd, "knowledge"), metrics_of(cwd, "together"), cwd / "runs/together"
    assert first["arms"]["lane"]["test"] == metrics_of(cwd, "lane")["arms"]["lane"]["test"] and first["knowledge"] == alone["knowledge"]
    assert first["arms"]["knowledge"]["test"] == alone["arms"]["knowledge"]["test"] and first["arms"]["knowledge"]["train_s"] >= first["time_s"]["knowledge"]
    kept = {name: (out / "state" / name).stat().st_mtime_ns for name in ("prefer.pt", "knowledge.pt")}
    for name in ("state/arm-lane.pt", "state/arm-knowledge.pt", "state/knows.pt", "metrics.json"):
        (out / name).unlink()
    assert (done := run(*flags, "--resume", cwd=cwd)).returncode == 0, done.stderr[-2000:]
    again = metrics_of(cwd, "together")
    assert all(again["arms"][arm]["test"] == e["test"] for arm, e in first["arms"].items()) and again["knowledge"] == first["knowledge"]
    assert kept == {name: (out / "state" / name).stat().st_mtime_ns for name in kept}


def test_relatives_run_beside_the_arms_and_stand_in_table_and_report(relatives):
    cwd, done = relatives
    for method, out in zip(("lane", "knowledge"), done):
        assert all(f"| {arm} |" in out.stdout for arm in curec.METHODS[method])
        assert f"| {method} |" in (cwd / f"runs/{method}/report.md").read_text()
    lane, knowledge = metrics_of(cwd, "lane"), metrics_of(cwd, "knowledge")
    assert lane["lane"]["lists_asked"] == 400 and 0 <= lane["lane"]["lists_dropped"] <= 400
    assert ("lane", "text-init") in {(c["a"], c["b"]) for c in lane["comparisons"]}
    assert 0 <= knowledge["knowledge"]["bpr_accuracy"] <= 1 and "rmse" not in knowledge["knowledge"], "the demo has no ratings"


def test_lane_explains_with_the_trained_weights(relatives):
    cwd, _ = relatives
    done = run("--run", "runs/lane", "--method", "lane", "--explain", "user3", cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "user3 chose:" in done.stdout and "Preferences and their weights:" in done.stdout


def test_the_question_shows_each_preference_with_the_weight_that_ranked():
    """Guards: weights of another head, user or cut (the released code of LANE shows another head's); weights of names that do not exist."""
    shop = D.demo(0, 30, 20)
    told = {"names": [list("abcde"), list("fghij")] * 30, "since": torch.tensor([[len(s) // 2, len(s) - 1] for s in shop.train])}
    encode = lambda texts: torch.stack([torch.randn(12, generator=torch.Generator().manual_seed(zlib.crc32(t.encode()))) for t in texts])
    model = curec.recommender.SASRec(shop.n_items, **reward.features("lane", shop, encode, {}, 0, told)).eval()
    question, history = reward.lane_question(shop, model.state_dict(), told, 7), shop.seqs[7][:-1]
    seen = []
    model.align.attention.register_forward_hook(lambda module, given, out: seen.append(out[1][0, 0]))
    best = curec.recommender.scorer(model)([history], [7])[0].index_fill(0, torch.tensor([0, *history]), -torch.inf).argmax()
    assert "weights: " + ", ".join(f"{n} {w:.2f}" for n, w in zip("fghij", seen[0].tolist())) + "\n" in question
    assert D.item_text(shop.items[best]) in question
    told["names"][14:16] = [], []
    assert "weights: none known\n" in reward.lane_question(shop, model.state_dict(), told, 7)
