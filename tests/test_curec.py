"""curec.py: run folder, command line, correction in time order, and truth that feeds nothing.

Most tests look at one small finished run of the demo, or at a copy of it. What needs many processes
or minutes is marked slow.
"""

import ast
import contextlib
import csv
import dataclasses
import functools
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
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import curec
import data as D
import recommender
import reward
import rl

ROOT = Path(curec.__file__).parent
sys.path.insert(0, str(ROOT / "tests/bench"))

import bench_kill

AMAZON = ROOT.parent / "shared/data/amazon2014"
QUICK = (
    "--dataset demo --quick --device cpu --tiny-steps 20 --align-steps 2 --max-new 18 "
    "--ppo-updates 1 --ppo-batch 12 --ppo-lr .0015 --proposals 1 --epochs 1 --knowledge-steps 3"
).split()
# five fits: too few for worker processes
SMALL = [*QUICK, "--arms", "content,placebo,bestof,curec,oracle"]
# one thread, as in this process: the same sums, bit for bit
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
DEMO_CPU = {"dataset": "demo", "device": "cpu"}


def command(*args):
    """The command line as a list, to be run as a process of its own."""
    return [sys.executable, str(ROOT / "curec.py"), *args]


def run_process(*args, cwd, largest=0):
    """Runs the real command line. largest: bytes that a file may have; the kernel refuses to write
    more, as a full disk does."""

    def limit():
        if largest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    pipes = {"capture_output": True, "text": True}
    return subprocess.run(command(*args), cwd=cwd, env=ENV, preexec_fn=limit, **pipes)


def start_process(cwd, *args, until):
    """A run in the background, as soon as it has written a file."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(*args), cwd=cwd, env=ENV, **pipes)
    while not (cwd / until).exists() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    return process


def json_of(path):
    return json.loads(path.read_text())


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def values_of(path):
    """What a stage left in the run folder."""
    return torch.load(path, weights_only=True)["value"]


class Recorder:
    """A function that also keeps the arguments of its calls."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args, **kwargs):
        self.calls.append(args)
        return self.function(*args, **kwargs)


class Finished(NamedTuple):
    cwd: Path
    folder: Path
    out: str
    err: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One finished run. Nobody may write into its folder: see `copied`."""
    cwd, out, err = tmp_path_factory.mktemp("finished"), io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = curec.main(SMALL)
    assert status == 0, err.getvalue()
    return Finished(cwd, cwd / "runs/demo", out.getvalue(), err.getvalue())


@pytest.fixture
def fresh(finished, tmp_path, monkeypatch):
    """The run folder of a run that was not started yet, where the tiny LLM is cached already."""
    (tmp_path / "cache").symlink_to(finished.cwd / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/demo"


@pytest.fixture
def copied(finished, fresh):
    """A copy of the finished run's folder."""
    shutil.copytree(finished.folder, fresh)
    return fresh


# ------------------------------------------------------------------- what a run leaves and prints
def test_a_run_folder_holds_these_files(finished):
    """Guards: half-written files that stay; a file that other tools read under another name."""
    files = {".lock", "config.json", "metrics.json", "reasons.jsonl", "ppo.jsonl", "report.md"}
    assert {p.name for p in finished.folder.iterdir()} == files | {"align", "policy", "state"}
    assert list(finished.folder.rglob("*.part")) == []
    assert list(finished.folder.rglob("*.unit*")) == []


def test_config_json_says_how_to_repeat_the_run(finished):
    config = json_of(finished.folder / "config.json")
    assert set(config) >= {"program", "settings", "data", "windows", "git_commit", "versions"}
    assert set(config["versions"]) >= {"torch", "transformers", "peft", "numpy"}
    assert config["settings"]["tiny_steps"] == 20
    assert config["settings"]["llm"] == "tiny"
    assert "resume" not in config["settings"]
    assert len(config["windows"]) == 3
    assert config["windows"] == sorted(config["windows"])


def test_config_json_without_git_or_a_repository(monkeypatch):
    """Guards: a traceback, or an empty commit, where there is no git."""
    s = curec.resolve(curec.Settings(**DEMO_CPU))
    monkeypatch.setattr(curec.shutil, "which", lambda name: None)
    assert curec.description(s, [1, 2])["git_commit"] == "unknown"


def test_metrics_json_keeps_its_names(finished):
    m = json_of(finished.folder / "metrics.json")
    names = "dataset arms comparisons headroom reasons counted_reasons correction reward ppo"
    assert set(m) == {*names.split(), "time_s", "peak_memory_mb"}
    assert set(m["dataset"]) == {"name", "users", "items", "interactions", "ties"}
    assert set(m["ppo"]) == {"reward_before", "reward_after", "kl", "updates"}
    judged = {"auc_heldout", "auc_untrained", "epochs", "best_epoch"}
    for figure in ("driver_choice", "best_pairs"):
        judged |= {figure + ending for ending in ("_untrained", "_round_1", "_round_2", "")}
    assert set(m["reward"]) == judged
    assert set(m["headroom"]) == {"ndcg@10", "recovered"}
    assert set(m["headroom"]["recovered"]) == {"placebo", "bestof", "curec"}
    assert set(m["peak_memory_mb"]) == {"ram"}


def test_metrics_json_of_each_arm(finished):
    m = json_of(finished.folder / "metrics.json")
    assert list(m["arms"]) == "content placebo bestof curec oracle".split()
    keys = {"seeds", "valid", "test", "slices", "audit", "train_s", "rank_ms_per_user"}
    keys |= {"transition_weight", "likeness"}
    for arm in m["arms"].values():
        assert set(arm) == keys
        assert {"hr@10", "ndcg@10", "hr@50", "ndcg@50", "mrr"} <= set(arm["test"])
        assert len(arm["test"]["mrr"]) == len(arm["seeds"])
    for row in m["comparisons"]:
        assert set(row) == {"a", "b", "metric", "seeds", "delta", "ci95"}
    pairs = {(row["a"], row["b"], row["metric"]) for row in m["comparisons"]}
    assert ("curec", "placebo", "ndcg@10") in pairs
    assert ("curec", "bestof", "new_driver") in pairs


def test_metrics_json_of_reasons_and_correction(finished):
    m = json_of(finished.folder / "metrics.json")
    assert set(m["reasons"]) == {"aligned", "rl", "bestof", "curec"}
    truth = {"truth_precision", "truth_recall", "new_driver"}
    names = "grounded format_ok mean_tokens mean_reward distinct distinct_phrases"
    for figures in m["reasons"].values():
        assert set(figures) == truth | {*names.split()}
    assert set(m["counted_reasons"]) == {"shared, shown", "shared, all", "most shared", "frequent"}
    for figures in m["counted_reasons"].values():
        assert set(figures) == truth
    names = "window items proposed accepted rejected mean_gain false_accept_rate"
    for number, row in enumerate(m["correction"], 1):
        assert set(row) == {*names.split(), "reward_before", "reward_after"}
        assert row["window"] == number
        assert row["accepted"] + row["rejected"] == row["items"]


def test_counting_writes_reasons_of_the_same_people_as_the_llm(finished, world):
    """Guards: controls that were shown others than the prompts of `aligned` and `rl` show."""
    shown, _ = curec.one_shot_people(world, 0)
    m = json_of(finished.folder / "metrics.json")
    for control, named in reward.counted_reasons(world, shown).items():
        assert m["counted_reasons"][control] == reward.truth_figures(named, world.truth)


def test_distinct_is_the_share_of_reasons_that_differ(finished):
    """Guards: a policy whose answers collapse into one, and nobody sees it."""
    lines = json_lines(finished.folder / "reasons.jsonl")
    reasons = json_of(finished.folder / "metrics.json")["reasons"]
    for kind, name in (("aligned", "aligned"), ("rl", "rl"), ("curec", "reason")):
        assert reasons[kind]["distinct"] == len({line[name] for line in lines}) / 120
    (row,) = json_lines(finished.folder / "ppo.jsonl")
    assert 1 <= row["distinct"] <= 12


def test_a_stage_that_is_read_again_is_counted_once(finished):
    """Guards: a report that says a stage took twice its time, because what it gave was read by a
    later one too."""
    seconds = json_of(finished.folder / "metrics.json")["time_s"]
    for stage in ("tiny_llm", "align", "reward"):
        kept = torch.load(finished.folder / f"state/{stage}.pt", weights_only=True)
        assert seconds[stage] == pytest.approx(kept["seconds"]), stage


def test_the_times_of_the_stages_add_up(finished):
    seconds = json_of(finished.folder / "metrics.json")["time_s"]
    total = seconds.pop("total")
    assert set(seconds) == set("load tiny_llm align reward ppo correct downstream".split())
    assert total == pytest.approx(sum(seconds.values()))


def test_reasons_jsonl_has_a_line_for_each_item(finished):
    lines = json_lines(finished.folder / "reasons.jsonl")
    rows = json_of(finished.folder / "metrics.json")["correction"]
    assert [line["item"] for line in lines] == [f"D{i:04d}" for i in range(1, 121)]
    entries = []
    for line in lines:
        assert set(line) == {"item", "title", "aligned", "rl", "timeline", "reason"}
        entries += line["timeline"]
    keys = "window_end people judges shared proposal reward_before reward_after accepted".split()
    for entry in entries:
        assert set(entry) == set(keys)
    assert len(entries) == sum(row["items"] for row in rows)
    accepted = sum(entry["accepted"] for entry in entries)
    assert accepted == sum(row["accepted"] for row in rows)
    assert accepted > 0


def test_the_last_reason_is_the_last_one_accepted(finished):
    """Guards: a timeline that tells another story than the reason that features are made of."""
    seen = 0
    for line in json_lines(finished.folder / "reasons.jsonl"):
        accepted = [entry for entry in line["timeline"] if entry["accepted"]]
        if accepted:
            assert line["reason"] == accepted[-1]["proposal"]
            seen += 1
    assert seen > 10


def test_every_ppo_answer_is_used_for_two_passes(finished):
    """Guards: --ppo-batch answers learnt from once, or more often than twice: 12 in minibatches of
    4 are 3 steps a pass."""
    log = json_lines(finished.folder / "ppo.jsonl")
    assert [row["steps"] for row in log] == [6]
    assert {"reward", "kl", "grounded", "format_ok", "distinct", "tokens_per_s"} <= set(log[0])


@pytest.mark.parametrize("adapter", ["align", "policy"])
def test_adapters_load_with_plain_transformers_and_peft(finished, adapter):
    """Guards: an adapter that only our own code can read, or that changes nothing."""
    path = values_of(finished.folder / "state/tiny_llm.pt")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer("Item: grip", return_tensors="pt")
    before = base(**inputs).logits
    after = PeftModel.from_pretrained(base, finished.folder / adapter)(**inputs).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


def test_the_report_has_its_sections(finished):
    report = (finished.folder / "report.md").read_text()
    headings = re.findall(r"^## (\w+)", report, re.M)
    tables = "Arms Differences Headroom Reasons Correction Reasons".split()
    assert headings == [*tables, "Differences", "PPO", "Best", "Worst"]
    assert "mean nothing" in report
    for arm in ("content", "placebo", "bestof", "curec", "oracle"):
        assert f"| {arm} |" in report
    assert "| curec - placebo | ndcg@10 |" in report
    assert "| curec - bestof | new_driver |" in report
    assert "nan" not in report


class Chart(NamedTuple):
    """A mermaid chart, as its parser reads it."""

    x_axis: str
    unit: str
    series: list  # (kind, numbers)


def mermaid(text):
    """The charts of a report; fails where mermaid would, or where a series has not a value for each
    place of the x axis."""
    found = []
    for block in re.findall(r"```mermaid\n(.*?)\n```", text, re.S):
        head, x_axis, y_axis, *series = block.splitlines()
        assert head == "xychart-beta"
        name, places = re.fullmatch(r'  x-axis "(.*)" 1 --> (\d+)', x_axis).groups()
        unit = re.fullmatch(r'  y-axis "(.*)"', y_axis)[1]
        numbers = []
        for line in series:
            kind, values = re.fullmatch(r"  (bar|line) \[([-+.\d, ]+)\]", line).groups()
            numbers.append((kind, [float(value) for value in values.split(", ")]))
            assert len(numbers[-1][1]) == int(places)
        found.append(Chart(name, unit, numbers))
    return found


def test_the_reports_charts_can_be_read(finished):
    """Guards: a chart that is no chart to mermaid, or has a value too many or too few; another
    difference in the place of an arm's."""
    m = json_of(finished.folder / "metrics.json")
    differences, course = mermaid((finished.folder / "report.md").read_text())
    rows = [row for row in m["comparisons"] if row["metric"] == "ndcg@10"]
    (_, deltas), (_, lows), (_, highs) = differences.series
    assert [kind for kind, _ in differences.series] == ["bar", "line", "line"]
    assert deltas == pytest.approx([row["delta"] for row in rows], abs=1e-4)
    assert lows == pytest.approx([row["ci95"][0] for row in rows], abs=1e-4)
    assert highs == pytest.approx([row["ci95"][1] for row in rows], abs=1e-4)
    log = json_lines(finished.folder / "ppo.jsonl")
    assert course.x_axis == "update"
    (_, rewards), (_, nats) = course.series
    assert rewards == pytest.approx([row["reward"] for row in log], abs=1e-4)
    assert nats == pytest.approx([row["kl"] for row in log], abs=1e-4)


def test_a_chart_reads_back_as_what_was_drawn():
    """Guards: small or negative numbers in a form that mermaid does not read; bars of nothing."""
    (chart,) = mermaid(curec.chart("row", "nats", [], [[1.5, -2.25, 1e-9]]))
    assert chart == ("row", "nats", [("line", [1.5, -2.25, 0.0])])
    (chart,) = mermaid(curec.chart("row", "a - b", range(80), [range(80), range(80)]))
    assert [kind for kind, _ in chart.series] == ["bar", "line", "line"]


def questions_of(monkeypatch, train, held_out, **given):
    """What `ppo_questions` makes of these questions."""
    monkeypatch.setattr(curec, "practice_questions", lambda data, cuts, seed: (train, held_out))
    return curec.ppo_questions(settled("demo", **given), None, None)


def test_few_held_out_questions_are_asked_several_times(monkeypatch):
    """Guards: a change of reward read off a few answers; many questions asked again for nothing; no
    held-out questions and no figure."""
    *_, few = questions_of(monkeypatch, ["t"], ["a", "b", "c"])
    assert few == ["a", "b", "c"] * 133
    many = list(range(401))
    assert questions_of(monkeypatch, ["t"], many)[2] == many
    assert questions_of(monkeypatch, many, [])[2] == many


def test_a_run_prints_stages_tables_and_where_the_report_is(finished):
    stages = re.findall(r"^\[(.*)\]$", finished.out, re.M)
    method = "tiny_llm align reward before reference ppo after aligned rl curec bestof".split()
    arms = [f"arm-{arm}.0" for arm in "content placebo bestof curec oracle".split()]
    assert stages == method + arms
    assert "| curec |" in finished.out
    assert "mean nothing" in finished.out
    assert finished.out.strip().endswith("report: runs/demo/report.md")


def test_output_is_plain_text_where_nobody_watches(finished):
    """Guards: progress bars, carriage returns and colours in log files."""
    assert not re.search(r"[\r\x1b]|it/s|%\|", finished.out + finished.err)
    assert "Traceback" not in finished.err


def test_a_run_without_reasons_reports_its_arms(fresh, capsys):
    """Guards: tables of reasons and a headroom that were never measured; a start that was killed
    before config.json was written, and blocks its own folder; more seeds where nothing is drawn."""
    fresh.mkdir(parents=True)
    (fresh / ".lock").touch()
    arms = ["--arms", "popularity,id", "--seeds", "2", "--seed", "3"]
    assert curec.main([*QUICK, *arms]) == 0
    report, m = (fresh / "report.md").read_text(), json_of(fresh / "metrics.json")
    assert "| id |" in capsys.readouterr().out
    assert "| id |" in report
    assert "## Reasons" not in report
    assert "Headroom" not in report
    assert mermaid(report) == [], "nothing to compare, no PPO"
    assert m["arms"]["popularity"]["seeds"] == [3]
    assert m["arms"]["id"]["seeds"] == [3, 4]
    absent = {"reasons", "counted_reasons", "correction", "headroom", "ppo", "reward"}
    assert not absent & set(m)


def test_a_new_row_of_arms_is_all_that_a_new_arm_takes(copied, monkeypatch, capsys):
    """Guards: an arm that a table, the comparisons or the report must be told of too. The reasons
    are the finished run's: its config.json is made to say that it was run with these arms."""
    row = recommender.Arm(texts=("curec",), against=("content",))
    monkeypatch.setitem(recommender.ARMS, "mine", row)
    arms, config = "content,mine,oracle", json_of(copied / "config.json")
    config["settings"]["arms"] = arms
    (copied / "config.json").write_text(json.dumps(config))
    assert curec.main([*SMALL, "--arms", arms, "--resume"]) == 0
    m, report = json_of(copied / "metrics.json"), (copied / "report.md").read_text()
    assert list(m["arms"]) == ["content", "mine", "oracle"]
    assert ("mine", "content") in {(c["a"], c["b"]) for c in m["comparisons"]}
    assert list(m["headroom"]["recovered"]) == ["mine"]
    assert "| mine |" in capsys.readouterr().out
    assert report.count("| mine |") == 2, "arms and headroom"
    assert "| mine - content |" in report
    weights = values_of(copied / "state/arm-mine.0.pt")["model"]
    content = values_of(copied / "state/arm-content.0.pt")["model"]
    assert weights["features"].shape[0] == content["features"].shape[0]
    assert not torch.equal(weights["features"][:, :8], content["features"][:, :8])


@pytest.mark.slow
def test_a_group_baseline_runs_through_and_asks_no_reference(copied, capsys):
    """Guards: answers of `align` to every prompt that nothing reads; groups whose mean advantage is
    not 0; a critic beside them. Alignment and judge are the finished run's: its config.json is made
    to say that it was run with these flags."""
    config = json_of(copied / "config.json")
    config["settings"] |= {"baseline": "group", "ppo_batch": 16}
    (copied / "config.json").write_text(json.dumps(config))
    critic = (copied / "policy/adapter_model.safetensors").read_bytes()
    for stage in "reference ppo after rl curec bestof arm-placebo.0 arm-curec.0".split():
        (copied / f"state/{stage}.pt").unlink()
    flags = ["--baseline", "group", "--ppo-batch", "16"]
    assert curec.main([*SMALL, *flags, "--resume"]) == 0, capsys.readouterr().err
    assert "reference" not in capsys.readouterr().out
    assert not (copied / "state/reference.pt").exists()
    (row,) = json_lines(copied / "ppo.jsonl")
    assert row["score"] == pytest.approx(0, abs=1e-5)
    assert row["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert abs(row["reward"]) > 1e-3
    assert (copied / "policy/adapter_model.safetensors").read_bytes() != critic
    assert "ppo" in json_of(copied / "metrics.json")


# ---------------------------------------------------------------------- a look at a finished run
def test_explain_shows_items_reasons_and_their_history(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.cwd)
    assert curec.main(["--run", "runs/demo", "--explain", "user3"]) == 0
    said = capsys.readouterr().out
    assert "user3 chose:" in said
    assert len(re.findall(r"\*\* \(D\d{4}\): people choose", said)) == 5
    assert "until 20" in said
    assert "-inf" not in said


def test_a_typed_history_is_explained_as_a_users(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.cwd)
    shop = D.load("demo", small=True)
    history = [shop.items[i]["id"] for i in shop.seqs[3][:-1]]
    said = []
    for flags in (["--explain", "user3"], ["--history", ", ,".join(history) + ","]):
        assert curec.main(["--run", "runs/demo", *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[1] == said[0].replace("user3 chose", "you chose")


def test_an_explanation_ranks_with_the_arms_transition_term(copied, capsys):
    """Guards: a look that recommends other items than the arm that was tested."""
    shop = D.load("demo", small=True)
    state = copied / "state" / "arm-curec.0.pt"
    kept = torch.load(state, weights_only=True)
    # so much that the counts alone decide
    kept["value"]["transition_weight"] = 1000.0
    torch.save(kept, state)
    first = int(shop.train[0][0])
    assert curec.main(["--run", "runs/demo", "--history", shop.items[first]["id"]]) == 0
    named = re.findall(r"\*\* \((D\d{4})\)", capsys.readouterr().out)
    features = kept["value"]["model"]["features"]
    followed = recommender.followers(shop, features)
    own = slice(followed.starts[first], followed.starts[first + 1])
    counts = np.bincount(followed.items[own], followed.weights[own], shop.n_items + 1)
    counts[first] = 0
    assert counts[[int(name[1:]) for name in named]].tolist() == sorted(counts)[:-6:-1]


def test_an_explanation_is_a_line_a_window(finished):
    """Guards: a reader who has to find the news among repeated words."""
    for line in json_lines(finished.folder / "reasons.jsonl"):
        first, *rest = curec.timeline_text(line).splitlines()
        assert first.count(line["title"]) == 1
        assert len(rest) == len(line["timeline"])
        assert all(D.REASON_START not in text for text in rest)


def test_a_look_from_another_folder_finds_the_data(own_run, tmp_path, monkeypatch, capsys):
    """Guards: a question to the internet for reviews_base_5.json.gz."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert curec.main(["--run", "../runs/few", "--history", "i1,i2"]) == 0
    # moved since
    (tmp_path / "few").rename(tmp_path / "moved")
    look = ["--run", "../runs/few", "--history", "i1,i2"]
    assert curec.main(look) == 2
    assert "few" in capsys.readouterr().err
    assert curec.main([*look, "--dataset", "../moved"]) == 0


def test_a_look_at_data_that_changed_is_refused(own_run, tmp_path, capsys):
    """Guards: items that carry another item's reason."""
    items = tmp_path / "few/items.jsonl"
    items.write_text(items.read_text().replace("wheels", "anchor"))
    assert curec.main(["--run", "runs/few", "--history", "i1,i2"]) == 2
    said = capsys.readouterr().err
    assert "other data" in said
    assert len(said.splitlines()) == 1


def test_explain_recommends_nothing_that_was_chosen(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.cwd)
    shop = D.load("demo", small=True)
    for user in range(5):
        assert curec.main(["--run", "runs/demo", "--explain", f"user{user}"]) == 0
        shown = re.findall(r"\((D\d{4})\)", capsys.readouterr().out)
        chosen = {shop.items[i]["id"] for i in shop.seqs[user][:-1]}
        assert len(shown) == 5
        assert not set(shown) & chosen


def test_score_prints_the_reward_of_a_reason_written_by_hand(finished, monkeypatch, capsys):
    """Guards: a reason that earns another reward here than the same one did in the run; a bad one
    that earns as much."""
    monkeypatch.chdir(finished.cwd)
    judges, load_weights = [], reward.Judge.load_weights

    def remember(self, weights):
        judges.append(weights)
        load_weights(self, weights)

    monkeypatch.setattr(reward.Judge, "load_weights", remember)
    lines = json_lines(finished.folder / "reasons.jsonl")
    line = next(line for line in lines if D.REASON_PATTERN.fullmatch(line["reason"]))

    def rewards(text):
        args = ["--run", "runs/demo", "--score", text, "--item", line["item"]]
        assert curec.main(args) == 0
        said = capsys.readouterr().out
        assert line["title"] in said
        rows = [row.strip("| ").split(" | ") for row in said.splitlines() if row.startswith("|")]
        assert rows[0] == ["reason", *"total shown audience grounded ungrounded format_ok".split()]
        mine, own = rows[2:]
        assert mine[0] == text
        assert own[0] == line["reason"]
        return mine, own

    mine, own = rewards(line["reason"])
    assert mine == own
    mine, own = rewards("nothing")
    assert float(mine[1]) < float(own[1]) - 1, "the format penalty at least"
    assert mine[-1] == "False"
    last = values_of(finished.folder / "state/reward.pt")["weights"][-1]
    assert torch.equal(judges[-1]["P.weight"], last["P.weight"]), "of the last round"


@pytest.mark.parametrize(
    ("args", "hints"),
    [
        (["--explain", "nobody"], ["nobody", "user1"]),
        (["--history", "D0001,nothing"], ["nothing", "D0002"]),
        (["--history", " ,"], ["not in the data", "D0002"]),
        (["--score", "x", "--item", "D9999"], ["D9999", "D0001"]),
        (["--score", "x"], ["--item"]),
        (["--item", "D0001"], ["--score"]),
    ],
)
def test_a_look_at_what_is_not_there_ends_in_one_line(finished, monkeypatch, capsys, args, hints):
    monkeypatch.chdir(finished.cwd)
    assert curec.main(["--run", "runs/demo", *args]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for hint in hints:
        assert hint in said


def test_a_look_needs_a_finished_run_with_the_arm_curec(copied, capsys):
    (copied / "state/arm-curec.0.pt").unlink()
    assert curec.main(["--run", "runs/demo", "--explain", "user3"]) == 2
    said = capsys.readouterr().err
    assert "arm-curec.0 is missing" in said
    assert len(said.splitlines()) == 1


def test_a_look_does_not_mind_the_order_of_reasons_jsonl(copied, capsys):
    """Guards: the wrong item's reason after somebody has sorted the file."""
    look = ["--run", "runs/demo", "--explain", "user3"]
    assert curec.main(look) == 0
    expected = capsys.readouterr().out
    path = copied / "reasons.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert curec.main(look) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("damage", [None, "", "half", '{"item": "D0001"}', "[1]"])
def test_damaged_reasons_are_named_with_what_helps(copied, capsys, damage):
    """Guards: half an answer and an IndexError; advice to download the file again."""
    path = copied / "reasons.jsonl"
    path.unlink() if damage is None else path.write_text(damage)
    assert curec.main(["--run", "runs/demo", "--explain", "user3"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "reasons.jsonl: missing or damaged" in said.err
    assert "--resume" in said.err
    assert len(said.err.splitlines()) == 1


def test_a_look_changes_no_file(copied):
    """Guards: a look at a run that starts one, and so clears or changes what is there."""

    def state():
        return {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file()}

    before = state()
    assert curec.main(["--run", "runs/demo", "--explain", "user3"]) == 0
    score = ["--score", "people choose it for grip and calm", "--item", "D0003"]
    assert curec.main(["--run", "runs/demo", *score]) == 0
    assert state() == before


# ------------------------------------------------------------------------------- before a run
def asked_at_most(said):
    """{part of the method: most answers} as --dry-run prints them."""
    found = re.findall(r"^(\w[\w -]*): .* at most ([\d,]+) answers", said, re.M)
    return {stage: int(number.replace(",", "")) for stage, number in found}


def answers_printed(said, *names):
    """The answers that a run printed under names that begin so."""
    total = 0
    for name, number in re.findall(r"^  (.+): ([\d,]+) answers", said, re.M):
        if name.startswith(names):
            total += int(number.replace(",", ""))
    return total


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert curec.main([*SMALL, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    stages = ["alignment", "PPO", "one-shot reasons", "correction"]
    assert list(asked_at_most(capsys.readouterr().out)) == stages


def test_a_dry_run_tells_as_many_answers_as_are_asked(finished, capsys):
    """Guards: counts that are not those of the run. No line of the run tells what PPO itself
    samples: one update of 12."""
    assert curec.main([*SMALL, "--dry-run"]) == 0
    most = sum(asked_at_most(capsys.readouterr().out).values())
    names = ("held-out", "reference", "reasons", "first", "correction", "best of")
    asked = answers_printed(finished.out, *names) + 12
    assert 100 < asked <= most
    assert most < 1.3 * asked


def test_a_dry_run_lists_downloads_and_asks_no_network(tmp_path, monkeypatch, capsys):
    """Guards: a download, or a question to a network, by a command that promises none."""

    def refuse(*args, **kwargs):
        pytest.fail("asked the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(D.urllib.request, "urlopen", refuse)
    args = ["--dataset", "beauty", "--dry-run", "--llm", "somebody/some-1.5B", "--device", "cpu"]
    assert curec.main(args) == 0
    said = capsys.readouterr().out
    assert "reviews_Beauty_5.json.gz" in said
    assert "meta_Beauty.json.gz" in said
    assert "https://" in said
    assert "somebody/some-1.5B" in said
    assert list(tmp_path.iterdir()) == []


BAD_FLAGS = [
    ("--no-such-flag", "--no-such-flag"),
    ("--seeds many", "--seeds"),
    ("--ties random", "--ties"),
    ("--method lane --arms id", "--arms"),
    ("--seeds 0", "--seeds"),
    ("--windows -1", "--windows"),
    ("--temperature 0", "--temperature"),
    ("--temperature nan", "--temperature"),
    ("--knowledge-steps 0", "knowledge-steps"),
    ("--dataset demo --ties shuffle", "--ties"),
    ("--dataset demo --limit-items 50", "--limit-items"),
    ("--baseline mean", "--baseline"),
    ("--baseline group --ppo-batch 100", "a multiple of 8"),
    ("--dataset beauty --arms oracle-only", "oracle-only"),
    ("--arms id,magic", "magic"),
    ("--dataset beauty --arms oracle", "oracle"),
    ("--device tpu", "--device"),
    ("--device cuda:99", "--device"),
    ("--resume --overwrite", "contradict"),
    ("--run runs/x", "--explain"),
    ("--run= --explain u", "--run"),
    ("--run=", "--run"),
    ("--run runs/x --explain=", "--explain"),
    ("--run runs/x --history=", "--history"),
    ("--run nowhere --explain u", "no run of ours"),
    ("--run nowhere --history a,b", "no run of ours"),
]


@pytest.mark.parametrize(("args", "hint"), BAD_FLAGS)
def test_bad_flags_end_in_one_line_and_status_2(args, hint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert curec.main(args.split()) == 2
    said = capsys.readouterr().err
    assert hint in said
    assert len(said.splitlines()) == 1


def settled(dataset, **given):
    """Settings, filled in, of a run on a CPU."""
    return curec.resolve(curec.Settings(dataset=dataset, device="cpu", **given))


def test_the_demo_alone_runs_the_arms_without_ids_by_default():
    """Guards: hours of arms on real data that nobody asked for; a demo that shows one family, or
    an arm of reviews, which it has not."""
    own = settled("beauty").arms.split(",")
    demo = settled("demo").arms.split(",")
    assert own == "popularity markov id content reviews placebo aligned rl bestof curec".split()
    without = [arm for arm, row in recommender.ARMS.items() if not row.ids]
    assert len(without) == 7
    own.remove("reviews")
    assert demo == [*own, "oracle", *without]
    for method in ("lane", "knowledge"):
        arms = settled("demo", method=method).arms
        assert arms == settled("beauty", method=method).arms
        assert "only" not in arms


def test_arms_without_ids_run_on_real_data_where_they_are_asked_for():
    """Guards: a family that real data cannot have; an oracle where the truth is unknown."""
    assert settled("beauty", arms="content-only,curec-only").arms == "content-only,curec-only"
    everything = settled("beauty", arms="all").arms.split(",")
    assert "curec-only" in everything
    assert not {"oracle", "oracle-only"} & set(everything)


@pytest.mark.parametrize(
    ("given", "questions", "updates"),
    [
        ({}, 900, 60),  # the demo's
        ({}, 253, 18),
        ({}, 10, 1),
        ({"llm": "somebody/some-1.5B"}, 900, 20),
        ({"llm": "somebody/some-1.5B"}, 100, 7),
        ({"ppo_updates": 90}, 10, 90),
    ],
)
def test_ppo_updates_follow_llm_and_catalogue(monkeypatch, given, questions, updates):
    """Guards: sixty updates of a large LLM by default; a small shop that waits for those of a large
    one, and learns its few questions by heart; a number asked for that is not kept to."""
    assert questions_of(monkeypatch, list(range(questions)), [0], **given)[0] == updates


def test_proposals_depend_on_the_llm():
    """Guards: as many proposals of a large LLM by default as of a tiny one."""
    assert settled("demo").proposals == 24
    assert settled("beauty", llm="somebody/some-1.5B").proposals == 4
    assert settled("demo", proposals=5).proposals == 5


@pytest.fixture
def help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        curec.main(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_flag_and_its_choices(help_text):
    for field in dataclasses.fields(curec.Settings):
        assert "--" + field.name.replace("_", "-") in help_text
        for choice in field.metadata["choices"] or ():
            assert choice in help_text


def test_help_fits_two_screens(help_text):
    assert len(help_text.splitlines()) <= 80


NAMES = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(curec.Settings)]
NAMES = [name for name in NAMES if name != "--debug"] + ["--nothing", "-x", "loose"]
ANY_CHARACTERS = st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])
KNOWN = "demo beauty id,curec all cuda:99 cpu shuffle lane nan -1 1e99 tiny".split()
VALUES = st.one_of(
    st.text(ANY_CHARACTERS, max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(KNOWN),
)
FLAGS = st.tuples(st.sampled_from(NAMES), st.one_of(st.none(), VALUES))


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.lists(FLAGS, max_size=6))
def test_any_command_line_is_taken_or_refused(flags):
    """Guards: tracebacks of a mistyped command line; a look at a run that starts one and deletes
    the old; an error where standard output is closed."""
    args, err = [], io.StringIO()
    for name, value in flags:
        args.append(name if value is None else f"{name}={value}")
    main, dry_run, look = (Recorder(lambda s: None) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.setattr(curec, "whole_method", main)
        patch.setattr(curec, "dry_run", dry_run)
        patch.setattr(curec, "look", look)
        patch.setattr(sys, "stdout", None)
        try:
            status = curec.main(args)
        except SystemExit as end:
            status = end.code
    calls = len(main.calls) + len(dry_run.calls) + len(look.calls)
    assert (status, calls) in ((0, 1), (2, 0))
    if status:
        assert "curec.py: error: " in err.getvalue()
    if any(arg.startswith("--run") for arg in args):
        assert main.calls == []


# -------------------------------------------------------------------------------------- errors
def test_errors_are_told_in_one_line_and_shown_with_debug(monkeypatch, capsys):
    def broken(run):
        raise KeyError("a bug")

    monkeypatch.setattr(curec, "whole_method", broken)
    assert curec.main(["--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said == "curec.py: error: KeyError: 'a bug'\n", "nothing was begun: no --resume"
    assert len(said.splitlines()) == 1
    with pytest.raises(KeyError):
        curec.main(["--device", "cpu", "--debug"])


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError(OUT_OF_MEMORY), True),
        (MemoryError(), True),
        (curec.BrokenProcessPool("terminated abruptly"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, is_memory, tmp_path, monkeypatch, capsys):
    """Guards: a traceback where a flag would help; a real fault that is taken for full memory."""

    def full(run):
        run.load("align")
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curec, "whole_method", full)
    assert curec.main(["--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "stage align" in said
    assert "--resume" in said
    assert ("--micro-batch" in said) == is_memory


def test_logits_that_are_not_finite_name_the_flag_that_helps(monkeypatch, capsys):
    """Guards: what torch says of a float16 that overflowed, without a remedy."""

    def overflow(run):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    monkeypatch.setattr(curec, "whole_method", overflow)
    assert curec.main(["--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "--dtype float32" in said
    assert "probability tensor" in said
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_out_of_memory_in_ppo_loses_no_finished_update(fresh, monkeypatch, capsys):
    """Guards: hours of PPO done again; a smaller micro-batch refused as another setting; ppo.jsonl
    without its first lines."""

    def full(*args):
        if len(update.calls) == 3:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return update_policy(*args)

    def far_enough(*args):
        raise RuntimeError("far enough")

    update_policy, update = rl.update_policy, Recorder(full)
    monkeypatch.setattr(rl, "update_policy", update)
    args = [*SMALL, "--ppo-updates", "3", "--ppo-batch", "9"]
    assert curec.main(args) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "stage ppo" in said
    assert "--micro-batch" in said
    before = (fresh / "ppo.jsonl").read_text().splitlines()
    assert len(before) == 2
    assert (fresh / "state/ppo.unit").exists()
    monkeypatch.setattr(curec, "write_reasons", far_enough)
    assert curec.main([*args, "--resume", "--micro-batch", "8"]) == 2
    assert "far enough" in capsys.readouterr().err
    after = (fresh / "ppo.jsonl").read_text().splitlines()
    assert after[:2] == before
    assert len(after) == 3
    assert len(update.calls) == 4
    assert not (fresh / "state/ppo.unit").exists()


@pytest.mark.parametrize("size", [10, 10**6])
def test_what_a_full_disk_refuses_leaves_the_old_file(tmp_path, size):
    """Guards: a checkpoint that is emptied before the new one is written. /dev/full refuses every
    byte."""
    path = tmp_path / "state.pt"
    rl.write_atomically(str(path), {"old": torch.ones(2)})
    Path(f"{path}.{os.getpid()}.part").symlink_to("/dev/full")
    for value in ("text" * size, {"new": torch.zeros(size)}):
        with pytest.raises((OSError, RuntimeError)):
            rl.write_atomically(str(path), value)
        assert torch.load(path, weights_only=True)["old"].sum() == 2


def test_missing_files_say_what_to_put_where(capsys, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(D.urllib.request, "urlopen", offline)
    monkeypatch.chdir(tmp_path)
    assert curec.main(["--dataset", "beauty", "--arms", "id", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    for hint in ("reviews_Beauty_5.json.gz", "https://", "--data-dir"):
        assert hint in said


def write_small_world(folder, people):
    """A folder with so many people and 11 items."""
    folder.mkdir()
    with open(folder / "interactions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp"])
        for u in range(people):
            for k in range(9):
                writer.writerow([f"u{u}", f"i{(u + k * (1 + u % 3)) % 11}", k])
    with open(folder / "items.jsonl", "w") as file:
        for i in range(11):
            # a word of fewer than 5 items would be hidden from the judge, one of 6 says nothing
            title = " ".join(D.ASPECTS[(i + np.array([0, 1, 3, 6])) % 9])
            file.write(json.dumps({"id": f"i{i}", "title": title}) + "\n")


@pytest.fixture
def own_run(finished, tmp_path, monkeypatch):
    """What a look needs of a finished run on a folder of 12 people, in runs/few; its reasons are
    made up."""
    write_small_world(tmp_path / "few", 12)
    (tmp_path / "cache").symlink_to(finished.cwd / "cache")
    monkeypatch.chdir(tmp_path)
    args = ["--dataset", "few", "--k-core", "0", "--device", "cpu", "--epochs", "1"]
    s = curec.resolve(curec.parse_args([*args, "--arms", "curec", "--seeds", "1"]))
    data = curec.load_data(s)
    run = curec.Run(s)
    run.open(data)
    run.begin(data, curec.window_cuts(data, s.windows))
    vectors = torch.randn(data.n_items + 1, 8, generator=torch.Generator().manual_seed(0))
    inputs = recommender.Inputs(vectors)
    run.load("arm-curec.0")
    run.save(recommender.fit_arm("curec", data, inputs, recommender.TrainConfig(epochs=1), 0))
    lines = []
    for item in data.items[1:]:
        line = {"item": item["id"], "title": item["title"], "reason": "r", "timeline": []}
        lines.append(json.dumps(line) + "\n")
    (run.folder / "reasons.jsonl").write_text("".join(lines))
    return run.folder


@pytest.mark.parametrize("people", [1, 4])
def test_too_few_people_are_refused_before_an_llm_is_trained(people, tmp_path, monkeypatch, capsys):
    """Guards: a PPO that looks for ever for a prompt to train on, means of nothing."""
    write_small_world(tmp_path / "few", people)
    monkeypatch.chdir(tmp_path)
    args = [*QUICK, "--dataset", "few", "--k-core", "0", "--arms", "content,curec"]
    assert curec.main(args) == 2
    said = capsys.readouterr().err
    assert "at least 10 users" in said
    assert len(said.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["few"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_folder_of_few_people_ends_in_a_report(seed, tmp_path, monkeypatch, capsys):
    """Guards: means of nothing, stacks of nothing; an explanation that offers what the user has."""
    write_small_world(tmp_path / "few", 12)
    monkeypatch.chdir(tmp_path)
    args = [*QUICK, "--dataset", "few", "--k-core", "0", "--arms", "content,curec"]
    assert curec.main([*args, "--seed", str(seed)]) == 0, capsys.readouterr().err
    assert "NaN" not in (tmp_path / "runs/few/metrics.json").read_text()
    capsys.readouterr()
    assert curec.main(["--run", "runs/few", "--explain", "u3"]) == 0
    said = capsys.readouterr().out
    assert "-inf" not in said
    assert said.count("** (i") == 11 - 8, "what is left"


# ------------------------------------------------------------- the run folder: resumed, cleared
def open_run(world, folder, **settings):
    """A Run whose folder was locked, cleared or checked."""
    s = curec.resolve(curec.Settings(out=str(folder), **DEMO_CPU, **settings))
    run = curec.Run(s)
    run.open(world)
    run.begin(world, curec.window_cuts(world, s.windows))
    return run


def test_resume_after_some_stages_were_lost_makes_the_same_bytes(finished, copied):
    """Guards: a finished stage done again, or a lost one done otherwise."""
    lost = ("before", "ppo", "after", "arm-content.0", "arm-curec.0")
    for stage in lost:
        (copied / f"state/{stage}.pt").unlink()
    for file in ("metrics.json", "reasons.jsonl", "report.md"):
        (copied / file).unlink()
    (copied / "state/ppo.pt.4711.part").write_text("of a process that was killed")
    kept = {p: p.stat().st_mtime_ns for p in copied.glob("state/*.pt")}
    assert curec.main([*SMALL, "--resume"]) == 0
    assert bench_kill.outcome(copied) == bench_kill.outcome(finished.folder)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert list(copied.rglob("*.part")) == []
    before, after = (json_of(f / "metrics.json")["time_s"] for f in (finished.folder, copied))
    for stage in ("tiny_llm", "align", "reward", "correct"):
        assert after[stage] == before[stage], "what the process that did it measured"
    assert after.pop("total") == pytest.approx(sum(after.values()))


@pytest.mark.slow
@pytest.mark.parametrize("stage", "tiny_llm align reward reference aligned rl curec bestof".split())
def test_resume_without_any_one_stage_makes_the_same_bytes(finished, copied, stage):
    (copied / f"state/{stage}.pt").unlink()
    assert curec.main([*SMALL, "--resume"]) == 0
    assert bench_kill.outcome(copied) == bench_kill.outcome(finished.folder)


@pytest.mark.parametrize(
    ("args", "hint"),
    [(["--seed", "3"], "seed 0"), (["--margin", "0"], "margin"), (["--windows", "3"], "windows 2")],
)
def test_resume_refuses_other_settings(copied, capsys, args, hint):
    """Guards: one run folder with the halves of two runs."""
    before = bench_kill.outcome(copied)
    assert curec.main([*SMALL, *args, "--resume"]) == 2
    said = capsys.readouterr().err
    assert hint in said
    assert len(said.splitlines()) == 1
    assert bench_kill.outcome(copied) == before


def test_a_run_that_cannot_start_leaves_the_old_one_alone(copied, capsys):
    """Guards: hours of work deleted by a mistyped --dataset."""
    before = sorted(copied.rglob("*"))
    args = ["--dataset", "no_such_folder/here", "--data-dir", "nowhere", "--out", "runs/demo"]
    assert curec.main([*args, "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.splitlines()) >= 1
    assert sorted(copied.rglob("*")) == before


def test_a_new_run_clears_the_older_one_and_nothing_else(copied, world):
    """Guards: figures of an older run beside the new ones; other people's files."""
    (copied / "sub").mkdir()
    for name in ("own.txt", "own.part", "thesis.2024.part", "sub/9.part", "sub/metrics.json"):
        (copied / name).write_text("mine")
    open_run(world, copied, overwrite=True)
    left = {str(p.relative_to(copied)) for p in copied.rglob("*")}
    own = {"own.txt", "own.part", "thesis.2024.part", "sub", "sub/9.part", "sub/metrics.json"}
    assert left == own | {".lock", "config.json"}


def files_of(folder):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


SETTINGS = '{"settings": {"dataset": "demo"}}'
FOREIGN = [
    ("config.json", '{"program": "CURec"}'),
    ("backup.7z.1.part", "mine"),
    ("config.json", '{"model_type": "qwen2"}'),
    ("config.json", SETTINGS),
    ("config.json", "settings"),
    ("config.json", '["settings"]'),
    ("state/weights.pt", "mine"),
    ("policy/mywork.txt", "mine"),
    ("report.md", "mine"),
    ("sub/thesis.tex", "mine"),
]


@pytest.mark.parametrize("flag", ["", "--resume", "--overwrite"])
@pytest.mark.parametrize(("file", "text"), FOREIGN)
def test_a_foreign_folder_is_refused_and_left_alone(fresh, capsys, file, text, flag):
    """Guards: somebody's model, state or report deleted as if it were an older run."""
    (fresh / file).parent.mkdir(parents=True, exist_ok=True)
    (fresh / file).write_text(text)
    before = files_of(fresh)
    assert curec.main([*SMALL, *flag.split()]) == 2
    said = capsys.readouterr().err
    assert f"{file.split('/')[0]} there is not ours" in said
    assert len(said.splitlines()) == 1
    assert files_of(fresh) == before


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
@pytest.mark.parametrize(
    "file",
    [
        "policy/mywork.txt",
        "policy/adapter_notes.txt",
        "state/notes.md",
        "state/sub/mine.pt",
        "align/sub/data.csv",
    ],
)
def test_somebodys_file_among_ours_is_named(copied, capsys, file, flag):
    """Guards: a file that goes with the folder in which it was put."""
    (copied / file).parent.mkdir(exist_ok=True)
    (copied / file).write_text("mine")
    before = files_of(copied)
    assert curec.main([*SMALL, flag]) == 2
    assert file in capsys.readouterr().err
    assert files_of(copied) == before


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ([], "--overwrite replaces it"),
        (["--overwrite", "--llm", "broken"], "broken"),
        (["--overwrite", "--encoder", "broken"], "broken"),
        (["--overwrite", "--arms", "id", "--dataset", "no_such_folder/x"], "no_such_folder"),
        (["--overwrite", "--arms", "magic"], "magic"),
        (["--llm", "broken"], "--overwrite replaces it"),
    ],
)
def test_a_finished_run_outlives_a_run_that_cannot_start(copied, capsys, args, hint):
    """Guards: hours of work deleted by a mistyped name, or by the same command given twice."""
    Path("broken").mkdir()
    before = files_of(copied)
    assert curec.main([*SMALL, "--out", "runs/demo", *args]) == 2
    said = capsys.readouterr().err
    assert hint in said
    assert len(said.splitlines()) == 1
    assert "--resume goes on)" not in said
    assert files_of(copied) == before


def test_two_folders_of_one_name_do_not_share_a_run(tmp_path, monkeypatch, capsys):
    """Guards: the second shop erases the first one's run, or goes on with it."""
    monkeypatch.chdir(tmp_path)
    for parent, people in (("A", 12), ("B", 13)):
        (tmp_path / parent).mkdir()
        write_small_world(tmp_path / parent / "shop", people)
    args = ["--k-core", "0", "--arms", "popularity", "--device", "cpu"]
    assert curec.main(["--dataset", "A/shop", *args]) == 0
    before = files_of(tmp_path / "runs/shop")
    for flags, hint in (([], "--out"), (["--resume"], "other data")):
        assert curec.main(["--dataset", "B/shop", *args, *flags]) == 2
        assert hint in capsys.readouterr().err
    assert files_of(tmp_path / "runs/shop") == before
    assert curec.main(["--dataset", "B/shop", *args, "--overwrite"]) == 0


def test_resume_starts_where_there_is_nothing_to_go_on_with(fresh, capsys):
    """Guards: a job that is started again by a scheduler and needs two commands."""
    args = [*QUICK, "--arms", "popularity", "--resume"]
    assert curec.main(args) == 0
    assert "nothing to go on with" in capsys.readouterr().out
    kept = (fresh / "state/arm-popularity.0.pt").stat().st_mtime_ns
    assert curec.main(args) == 0
    assert "nothing to go on with" not in capsys.readouterr().out
    assert (fresh / "state/arm-popularity.0.pt").stat().st_mtime_ns == kept


@pytest.mark.parametrize("change", ["title", "item", "time"])
def test_resume_refuses_data_that_changed(tmp_path, monkeypatch, capsys, change):
    """Guards: reasons of one catalogue on another, twenty lines about tensor sizes."""
    monkeypatch.chdir(tmp_path)
    write_small_world(tmp_path / "few", 12)
    args = ["--dataset", "few", "--k-core", "0", "--arms", "popularity", "--device", "cpu"]
    assert curec.main(args) == 0
    items, rows = tmp_path / "few/items.jsonl", tmp_path / "few/interactions.csv"
    if change == "title":
        items.write_text(items.read_text().replace("wheels", "anchor"))
    elif change == "item":
        rows.write_text(rows.read_text() + "u1,new,99\n")
    else:
        rows.write_text(rows.read_text().replace("u1,i1,0", "u1,i1,7"))
    capsys.readouterr()
    assert curec.main([*args, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "other data" in said
    assert len(said.splitlines()) == 1


def test_resume_does_not_mind_how_places_are_spelt(tmp_path, monkeypatch, capsys):
    """Guards: a run refused because its folder moved."""
    monkeypatch.chdir(tmp_path)
    write_small_world(tmp_path / "few", 12)
    args = ["--k-core", "0", "--arms", "popularity", "--device", "cpu"]
    assert curec.main(["--dataset", "few", *args, "--out", "runs/base"]) == 0
    again = ["--dataset", str(tmp_path / "few"), *args, "--resume"]
    for out in ("./runs/base", str(tmp_path / "runs/base")):
        assert curec.main([*again, "--out", out]) == 0, capsys.readouterr().err
    (tmp_path / "runs/base").rename(tmp_path / "moved")
    assert curec.main([*again, "--out", "moved"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state/ppo.pt", b""),
        ("state/arm-content.0.pt", b"half"),
        ("state/tiny_llm.pt", b""),
        ("policy/adapter_model.safetensors", b"half"),
        ("align/adapter_config.json", b""),
    ],
)
def test_what_is_damaged_is_made_again(finished, copied, capsys, file, damage):
    """Guards: an EOFError that names no file, a run that is stuck for good."""
    (copied / file).write_bytes(damage)
    assert curec.main([*SMALL, "--resume"]) == 0, capsys.readouterr().err
    assert bench_kill.outcome(copied) == bench_kill.outcome(finished.folder)


@pytest.mark.parametrize("lost", ["all", "model.safetensors", "tokenizer.json"])
def test_a_cache_that_was_deleted_is_made_again(finished, copied, capsys, lost):
    cache = copied.parents[1] / "cache"
    cache.unlink()
    if lost != "all":
        shutil.copytree(finished.cwd / "cache", cache)
        next(cache.glob(f"*/{lost}")).write_bytes(b"half")
    (copied / "state/aligned.pt").unlink()
    assert curec.main([*SMALL, "--resume"]) == 0, capsys.readouterr().err
    assert bench_kill.outcome(copied) == bench_kill.outcome(finished.folder)


def test_a_cache_that_cannot_be_written_costs_no_older_run(copied, capsys):
    """Guards: a run cleared for one that cannot start."""
    cache = copied.parents[1] / "cache"
    cache.unlink()
    cache.write_text("a file, where a folder should be")
    before = files_of(copied)
    assert curec.main([*SMALL, "--overwrite"]) == 2
    assert "cache/ cannot be written" in capsys.readouterr().err
    assert files_of(copied) == before


@pytest.mark.parametrize(
    ("was", "now", "is_same"),
    [("/a/model", "/b/model", True), ("Qwen/x", "unsloth/x", False), ("tiny", "/my/tiny", False)],
)
def test_another_llm_is_another_run(world, was, now, is_same):
    """Guards: one run folder with the reasons of two models."""
    s = settled("demo", llm=was)
    begun = {"settings": dataclasses.asdict(s), "data": curec.fingerprint(world)}
    assert bool(curec.changed(begun, dataclasses.replace(s, llm=now), world)) != is_same


def test_a_cache_that_cannot_be_written_is_told_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").write_text("a file, where a folder should be")
    monkeypatch.setattr(rl, "supervise", None)
    assert curec.main(SMALL) == 2
    said = capsys.readouterr().err
    assert "cache" in said
    assert len(said.splitlines()) == 1


def test_a_run_folder_in_use_refuses_a_second_process(fresh, capsys):
    """Guards: two runs that write one folder; a lock that outlives a killed run."""
    first = start_process(fresh.parents[1], *SMALL, until="runs/demo/config.json")
    try:
        assert curec.main(SMALL) == 2
        said = capsys.readouterr().err
        assert "another run is at work there" in said
        assert len(said.splitlines()) == 1
        assert first.poll() is None, "the first goes on"
        assert (fresh / "config.json").exists()
    finally:
        first.kill()
        first.communicate()
    assert curec.main([*QUICK, "--arms", "popularity", "--overwrite"]) == 0


# ------------------------------------------------------------------------- correction, in process
def fake_generate(model, tokenizer, prompts, sampling=None, name=""):
    """Answers with two words of the prompt's item, drawn by the prompt alone and by how often it
    came before: fast, and blind to all else."""
    texts, count = [], Counter()
    for prompt in prompts:
        count[prompt] += 1
        digest = hashlib.sha256(f"{prompt}{count[prompt]}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:4], "big"))
        said = set(D.words(prompt.rsplit("Item: ", 1)[1].split("\n")[0])) - D.STOPWORDS
        own = said & set(D.ASPECTS)
        if len(own) < 2:
            own = said | {"this", "that"}
        texts.append(D.ANSWER.format("x", D.REASON.format(*rng.permutation(sorted(own))[:2])))
    return texts, None


@pytest.fixture
def fake_llm(monkeypatch):
    monkeypatch.setattr(rl, "generate", fake_generate)
    monkeypatch.setattr(rl, "use", lambda model, adapter: None)
    return None, None


def bag_of_words(texts):
    rows = []
    for text in texts:
        said = text.split()
        rows.append([float(aspect in said) for aspect in D.ASPECTS])
    return torch.tensor(rows)


def hashed_words(texts, width=96):
    vectors = torch.zeros(len(texts), width)
    for row, text in zip(vectors, texts, strict=True):
        for word in text.split():
            row[zlib.crc32(word.encode()) % width] += 1
    return vectors


def random_vectors(texts, width=12):
    """A vector a text, the same at each call."""
    rows = []
    for text in texts:
        rng = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        rows.append(torch.randn(width, generator=rng))
    return torch.stack(rows)


def judge_of(shop, encode=bag_of_words, weights=None):
    judge = reward.Judge(shop, encode)
    judge.load_weights(weights or judge.model.state_dict())
    return judge


class Corrected(NamedTuple):
    first: list
    answers: list
    timelines: list
    rows: list


def corrected(shop, judge, cuts, llm, folder, margin=0.0, proposals=12):
    s = curec.Settings(out=str(folder), margin=margin, proposals=proposals, **DEMO_CPU)
    s = curec.resolve(s)
    windows = list(curec.correction_windows(shop, cuts, s.seed))
    return Corrected(*curec.correct(curec.Run(s), shop, llm, judge, windows))


def with_another_future(shop, start):
    """The same people, but the item of every event from `start` on is another one."""
    rng, seqs = np.random.default_rng(0), []
    for seq, times in zip(shop.seqs, shop.times, strict=True):
        changed, later = seq.copy(), np.flatnonzero(times >= start)
        others = np.setdiff1d(np.arange(1, shop.n_items + 1), seq)
        changed[later] = rng.choice(others, len(later), replace=False)
        seqs.append(changed)
    return dataclasses.replace(shop, seqs=seqs)


def entries_until(timelines, end):
    kept = []
    for timeline in timelines:
        kept.append([entry for entry in timeline if entry["window_end"] <= end])
    return kept


BEAUTY = pytest.param("beauty", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["demo", BEAUTY])
def shop_and_encoder(request):
    """A world, and an encoder of its texts. Beauty has real timestamps, many of them equal."""
    if request.param == "demo":
        return D.demo(0, n_users=600, n_items=80), bag_of_words
    if not AMAZON.exists():
        pytest.skip("the data are not here")
    return D.load("beauty", str(AMAZON), subset=D.Subset(limit_items=150)), hashed_words


@pytest.mark.parametrize("windows", [1, 2])
def test_no_event_after_a_window_changes_what_came_before(
    fake_llm, tmp_path, shop_and_encoder, windows
):
    """Guards: a correction that sees the future. With weights and boundaries fixed, earlier entries
    stay identical: also of people who waited, and of reasons corrected before."""
    shop, encode = shop_and_encoder
    cuts, judge = curec.window_cuts(shop, 3), judge_of(shop, encode)
    few = {"proposals": 3}
    before = corrected(shop, judge, cuts, fake_llm, tmp_path / "a", **few).timelines
    other = with_another_future(shop, cuts[windows])
    judge = judge_of(other, encode, judge.model.state_dict())
    after = corrected(other, judge, cuts, fake_llm, tmp_path / "b", **few).timelines
    early = entries_until(before, cuts[windows])
    assert early == entries_until(after, cuts[windows])
    assert sum(map(len, early)) > 20
    assert before != after, "later windows must differ, or the test replaced nothing"


def test_an_interrupted_correction_goes_on_after_its_last_window(fake_llm, tmp_path, monkeypatch):
    """Guards: windows done again after a kill, or done otherwise; a reason that forgets what it was
    corrected to before."""
    shop = D.demo(0, n_users=600, n_items=80)
    cuts, judge = curec.window_cuts(shop, 3), judge_of(shop)
    expected = corrected(shop, judge, cuts, fake_llm, tmp_path / "whole")
    assert len(expected.rows) == 3

    def stops_in_window_2(*args):
        if "window 2" in args[-1]:
            raise MemoryError
        return fake_generate(*args)

    monkeypatch.setattr(rl, "generate", stops_in_window_2)
    with pytest.raises(MemoryError):
        corrected(shop, judge, cuts, fake_llm, tmp_path / "torn")
    assert (tmp_path / "torn/state/curec.unit").exists()
    again = Recorder(fake_generate)
    monkeypatch.setattr(rl, "generate", again)
    assert corrected(shop, judge, cuts, fake_llm, tmp_path / "torn") == expected
    names = [args[-1] for args in again.calls]
    assert len(names) == 4, "by align and by policy, windows 2 and 3"
    assert names[0].startswith("correction, window 2")
    assert not (tmp_path / "torn/state/curec.unit").exists()
    assert corrected(shop, judge, cuts, fake_llm, tmp_path / "torn") == expected
    assert len(again.calls) == 4, "a finished stage asks nothing"


@pytest.mark.slow
def test_correction_moves_reasons_towards_the_truth(fake_llm, tmp_path):
    """With random proposals and an ideal encoder, corrected reasons name drivers more often than
    first ones; a judge that has learnt what follows what moves them further than one that only
    compares texts."""
    first, compared, learnt = [], [], []

    def precision(answers, shop):
        named = [D.parse_answer(answer)[1] for answer in answers]
        return reward.truth_figures(named, shop.truth)["truth_precision"]

    # one world says too little: either gain is .10 with a deviation of .04 over twelve worlds
    for world in range(4):
        shop, folder = D.demo(world, n_users=400, n_items=120), tmp_path / str(world)
        cuts, judge = curec.window_cuts(shop, 2), judge_of(shop)
        before = corrected(shop, judge, cuts, fake_llm, folder / "untrained", margin=0.5)
        judge.fit(epochs=12)
        after = corrected(shop, judge, cuts, fake_llm, folder / "trained", margin=0.5)
        assert before.first == after.first
        first.append(precision(before.first, shop))
        compared.append(precision(before.answers, shop))
        learnt.append(precision(after.answers, shop))
    assert np.mean(compared) > np.mean(first) + 0.05
    assert np.mean(learnt) > np.mean(compared) + 0.05


def test_every_third_proposal_is_by_align_and_all_are_hot(monkeypatch):
    """Guards: answers in another order than their prompts; proposals that PPO has narrowed down to
    one; a temperature of proposals that reasons and PPO get too."""
    asked, active = set(), []

    def use(model, adapter):
        active.append(adapter)

    def generate(model, tokenizer, prompts, sampling, name):
        asked.add((active[-1], sampling.temperature))
        return [f"{active[-1]} {prompt}" for prompt in prompts], None

    monkeypatch.setattr(rl, "use", use)
    monkeypatch.setattr(rl, "generate", generate)
    s = curec.resolve(curec.Settings(temperature=0.3, **DEMO_CPU))
    for n in (1, 2, 7):
        made = curec.propose(s, (None, None), [f"p{k}" for k in range(n)], 0, "x")
        assert made == [f"{'policy' if k % 3 else 'align'} p{k}" for k in range(n)]
    assert asked == {("align", 1.0), ("policy", 1.0)}
    assert curec.sampling(s).temperature == 0.3


class Control(NamedTuple):
    """What the control for correction was asked and judged by."""

    settings: curec.Settings
    windows: list
    timelines: list
    prompts: list  # by align, by policy
    items: np.ndarray
    shown: list
    audience: list


@pytest.fixture
def control(fake_llm, tmp_path, monkeypatch):
    generate, rewards = Recorder(rl.generate), Recorder(reward.rewards)
    monkeypatch.setattr(rl, "generate", generate)
    monkeypatch.setattr(reward, "rewards", rewards)
    shop, s = D.demo(0, 600, 80), curec.resolve(curec.Settings(out=str(tmp_path), **DEMO_CPU))
    cuts = curec.window_cuts(shop, 2)
    _, lines = curec.write_reasons(curec.Run(s), shop, fake_llm, judge_of(shop), cuts)
    windows, timelines = curec.correction_windows(shop, cuts, s.seed), []
    for line in lines:
        timelines.append(line["timeline"])
    prompts = [args[2] for args in generate.calls[-2:]]
    _, items, _, shown, audience, _ = rewards.calls[-1]
    return Control(s, list(windows), timelines, prompts, items, shown, audience)


def test_an_item_that_says_nothing_has_no_reason(fake_llm, tmp_path):
    """Guards: a reason out of nowhere, accepted and praised; an item without a name."""
    shop, s = D.demo(0, 600, 80), curec.resolve(curec.Settings(out=str(tmp_path), **DEMO_CPU))
    shop.items[3] = D.item_record("D3", {})
    cuts = curec.window_cuts(shop, 2)
    run = curec.Run(s)
    reasons, lines = curec.write_reasons(run, shop, fake_llm, judge_of(shop), cuts)
    assert {answers[3] for answers in reasons.values()} == {""}
    assert all(answers[4] for answers in reasons.values())
    assert (lines[2]["title"], lines[2]["reason"], lines[2]["timeline"]) == ("D3", "", [])


def test_bestof_gets_as_many_answers_as_correction(control):
    """Guards: a control for correction that may choose among more, or fewer, or of others."""
    expected = [1 + control.settings.proposals * len(t) for t in control.timelines]
    assert np.bincount(control.items)[1:].tolist() == expected
    shop, asked = D.demo(0, 600, 80), [[] for _ in range(81)]
    for window in control.windows:
        for i, shown in zip(window.items, window.shown, strict=True):
            asked[i] += [D.reason_prompt(shop, i, "", shown)] * control.settings.proposals
    prompts = [prompt for mine in asked for prompt in mine]
    by_align, by_policy = control.prompts
    assert by_align == prompts[::3]
    assert by_policy == [prompt for k, prompt in enumerate(prompts) if k % 3]


def test_a_dry_run_counts_ppos_answers_by_baseline():
    """Guards: hours of answers of `align` that a group baseline never asks for."""
    shop = D.demo(0, 600, 80)
    s = settled("demo", arms="curec", ppo_updates=2, ppo_batch=16)
    cuts = curec.window_cuts(shop, s.windows)
    assert len(curec.practice_questions(shop, cuts, s.seed)[0]) > 32
    _, train, held_out = curec.ppo_questions(s, shop, cuts)
    assert len(train) == 32
    measured = 2 * len(held_out)
    for baseline, references in (("critic", 2 * 32), ("group", 0)):
        works = curec.planned_work(dataclasses.replace(s, baseline=baseline), shop)
        (answers,) = [work.answers for work in works if work.stage == "PPO"]
        assert answers == 32 + references + measured


def test_bestof_is_asked_for_by_its_arms_alone(fake_llm, tmp_path, monkeypatch):
    """Guards: half of the correction's hours for a control that no arm and no table shows."""
    shop, asked = D.demo(0, 600, 80), {}
    for arms in ("curec", "curec,bestof", "bestof-only"):
        s = settled("demo", arms=arms, out=str(tmp_path / arms), proposals=2)
        assert curec.asks_for(s, "bestof") == ("bestof" in arms)
        answers = [work.answers for work in curec.planned_work(s, shop)]
        asked[arms] = answers[-1]
    assert asked["curec,bestof"] == asked["bestof-only"] == 2 * asked["curec"] > 0
    s, cuts = settled("demo", arms="curec", out=str(tmp_path)), curec.window_cuts(shop, 2)
    monkeypatch.setattr(curec, "best_of", lambda *args: pytest.fail("nobody asked for it"))
    reasons, _ = curec.write_reasons(curec.Run(s), shop, fake_llm, judge_of(shop), cuts)
    assert set(reasons) == {"aligned", "rl", "curec"}
    monkeypatch.setattr(reward, "judge_figures", lambda *args: {})
    m = {"reasons": {kind: {} for kind in reasons}, "comparisons": [], "reward": {}}
    curec.add_truth(m, shop, judge_of(shop), [], reasons)
    assert m["comparisons"] == []


def test_the_judges_of_bestof_are_in_no_prompt_of_it(control):
    """Guards: the control picked by the people whose histories its prompt echoes."""
    both = 0
    for i, shown, audience in zip(control.items, control.shown, control.audience, strict=True):
        prompted = []
        for window in control.windows:
            if i in window.items:
                prompted += window.shown[window.items.index(i)].tolist()
        assert sorted(shown) == sorted(prompted)
        assert not set(shown) & set(audience)
        both += len(shown) > 0 and len(audience) > 0
    assert both > 0.9 * len(control.items)


def test_the_placebo_shuffles_the_reasons_among_the_items(world):
    """Guards: a placebo that is the arm it is to be compared with, or that has other texts."""
    s = curec.resolve(curec.Settings(arms="placebo,curec", **DEMO_CPU))
    rng, answers = np.random.default_rng(0), [""]
    for i in range(1, world.n_items + 1):
        answers.append(D.ANSWER.format("x", D.random_reason(world, i, rng)))
    own = curec.item_texts(s, world, {"curec": answers}, "curec")
    mixed = curec.item_texts(s, world, {"curec": answers}, "shuffled")
    assert sorted(own) == sorted(mixed)
    moved = sum(a != b for a, b in zip(own, mixed, strict=True))
    assert moved > 0.9 * world.n_items
    inputs = curec.arm_inputs(s, world, bag_of_words, {"curec": answers}, None)
    curec_features, placebo = inputs["curec"].features, inputs["placebo"].features
    assert curec_features.shape == placebo.shape
    assert not curec_features[0].any(), "padding"
    item = curec_features.shape[1] // 2
    torch.testing.assert_close(curec_features[:, :item], placebo[:, :item])
    assert not torch.equal(curec_features, placebo)


KINDS = ("aligned", "rl", "bestof", "curec")


def random_answers(shop):
    """Answers of each kind, {kind: answers, index 0 empty}."""
    rng, reasons = np.random.default_rng(0), {}
    for kind in KINDS:
        reasons[kind] = [""]
        for i in range(1, shop.n_items + 1):
            reasons[kind].append(D.ANSWER.format("x", D.random_reason(shop, i, rng)))
    return reasons


def inputs_of_arms(shop, encode, reasons):
    """{arm: its inputs}, of all arms that the demo runs by default and that have features."""
    inputs = curec.arm_inputs(settled("demo"), shop, encode, reasons, None)
    return {arm: one for arm, one in inputs.items() if one.features is not None}


def test_arms_without_ids_get_few_dimensions_of_a_text(world):
    """Guards: an item's text that tells which item it is: an ID in disguise; a family of arms whose
    items have IDs all the same."""

    def wide_vectors(texts):
        return random_vectors(texts, 96)

    inputs = inputs_of_arms(world, wide_vectors, random_answers(world))
    for arm, one in inputs.items():
        row = recommender.ARMS[arm]
        assert one.ids == row.ids == (not arm.endswith("-only")), arm
        if not one.ids:
            assert one.features.shape == (121, 32 * len(row.texts)), arm
            assert not one.features[0].any(), arm
    assert inputs["content"].features.shape == (121, 96)
    narrow = inputs_of_arms(world, bag_of_words, random_answers(world))
    assert narrow["content-only"].features.shape == (121, 14), "five of fifteen aspects an item"


def test_the_truth_reaches_no_features_but_the_oracles(world):
    """Guards: an arm of either family that knows the answer."""
    other = dataclasses.replace(world, truth=truth_of_other_items(world))
    reasons = random_answers(world)
    before = inputs_of_arms(world, bag_of_words, reasons)
    after = inputs_of_arms(other, bag_of_words, reasons)
    changed = [arm for arm in before if not torch.equal(before[arm].features, after[arm].features)]
    assert changed == ["oracle", "oracle-only"]


# ----------------------------------------------------------------------- truth that feeds nothing
def truth_of_other_items(shop):
    """The hidden truth, dealt out to the items anew, and another circle of needs."""
    order = [0, *(np.random.default_rng(1).permutation(shop.n_items) + 1)]
    permuted = {}
    for name, values in shop.truth.items():
        permuted[name] = [values[i] for i in order] if name != "follower" else values[::-1]
    return permuted


def without_truth(m):
    """metrics.json without clocks, truth figures and the arm oracle."""
    m = bench_kill.timeless(m)
    m["arms"].pop("oracle")
    m.pop("headroom")
    m["comparisons"] = [
        c for c in m["comparisons"] if c["a"] != "oracle" and c["metric"] != "new_driver"
    ]
    m.pop("counted_reasons")
    for name in [name for name in m["reward"] if name.startswith(("driver_choice", "best_pairs"))]:
        m["reward"].pop(name)
    for figures in m["reasons"].values():
        for name in ("truth_precision", "truth_recall", "new_driver"):
            figures.pop(name)
    return m


def test_truth_feeds_nothing(finished, fresh, monkeypatch):
    """Guards: an answer that was known before it was asked for. The truth is permuted among the
    items, the interactions stay: all is identical but truth figures and the oracle."""
    demo = D.demo

    def permuted(*args):
        shop = demo(*args)
        return dataclasses.replace(shop, truth=truth_of_other_items(shop))

    monkeypatch.setattr(D, "demo", permuted)
    assert curec.main(SMALL) == 0
    before, after = bench_kill.outcome(finished.folder), bench_kill.outcome(fresh)
    a, b = json.loads(before.pop("metrics.json")), json.loads(after.pop("metrics.json"))
    assert before == after
    fits = [values_of(f / "state/reward.pt") for f in (finished.folder, fresh)]
    assert fits[0]["rounds"] == fits[1]["rounds"]
    for mine, same in zip(fits[0]["weights"], fits[1]["weights"], strict=True):
        for name, tensor in mine.items():
            assert torch.equal(tensor, same[name])
    figures = [m["reasons"]["curec"]["truth_precision"] for m in (a, b)]
    assert figures[0] != figures[1], "the truth was permuted"
    assert a["reward"]["best_pairs"] != b["reward"]["best_pairs"]
    assert a["arms"]["oracle"] != b["arms"]["oracle"]
    assert without_truth(a) == without_truth(b)


# ------------------------------------------------------------------------------- the tiny LLM
def test_a_catalogue_is_spelt_before_it_is_reasoned_about(monkeypatch, tmp_path):
    """Guards: spelling lessons for the demo, whose figures were measured without; lessons that do
    not add up to --tiny-steps, or that show valid or test, or depend on the truth."""
    monkeypatch.chdir(tmp_path)
    taught = Recorder(lambda *args: None)
    monkeypatch.setattr(rl, "train_tiny", taught)
    shop = D.demo(0, n_users=60, n_items=40)
    unknown = dataclasses.replace(shop, truth=None)
    others = [np.append(seq[:-2], [1, 2]) for seq in shop.seqs]
    other_test = dataclasses.replace(unknown, seqs=others)
    (tmp_path / "things").mkdir()
    cases = (("demo", shop), ("demo", unknown), ("things", unknown), ("things", other_test))
    for number, (name, data) in enumerate(cases):
        s = curec.Settings(dataset=name, tiny_steps=100, device="cpu", out=f"runs/{number}")
        curec.llm_path(curec.Run(curec.resolve(s)), data)
    demo, blind, things, same = (args[:5] for args in taught.calls)
    assert blind == demo, "whether the truth is known does not matter"
    assert same == things, "nor do validation and test"
    assert demo[0] != things[0], "cached by what they were taught"
    lessons = demo[2]
    assert [(name, steps) for name, _, steps in lessons] == [
        ("short prompts", 40),
        ("all prompts", 60),
    ]
    assert not demo[4].lowercase
    lessons = things[2]
    assert [(name, steps) for name, _, steps in lessons] == [
        ("spelling", 25),
        ("short prompts", 30),
        ("all prompts", 45),
    ]
    assert things[4].lowercase
    prompt, answer = lessons[0][1][4]
    assert answer.split() == shop.phrases[5]
    assert "- nobody yet" in prompt
    assert shop.titles[5] in prompt


@pytest.mark.parametrize("method", ["curec", "knowledge", "lane"])
def test_lanes_form_is_taught_only_where_preferences_are_asked_for(method):
    """Guards: seconds of the demo spent on answers that nobody asks for; a LANE whose tiny LLM has
    never seen the form of its answers."""
    shop = D.demo(0, n_users=60, n_items=40)
    short, every = curec.tiny_lessons(settled("demo", method=method, tiny_steps=60), shop)
    asked = ["as JSON" in prompt for prompt, _ in every[1]]
    assert any(asked) == (method == "lane")
    assert not all(asked)
    assert not any("as JSON" in prompt for prompt, _ in short[1])


def test_a_tiny_llm_embeds_words_and_another_one_texts(finished):
    """Guards: embeddings of a tiny LLM that tell by the order of the words which item a text is
    about; a pretrained one that is made to read single words."""
    settings = json_of(finished.folder / "config.json")["settings"]
    path = values_of(finished.folder / "state/tiny_llm.pt")
    texts = ["grip calm shade", "shade grip calm", "grip", "calm", "shade"]
    for llm, by_words in (("tiny", True), (path, False)):
        _, encode = curec.open_llm(curec.Settings(**settings | {"llm": llm}), path)
        one, other, *words = encode(texts)
        mean = torch.stack(words).mean(0)
        assert torch.allclose(one, other, atol=1e-5) == by_words
        assert torch.allclose(one, mean, atol=1e-5) == by_words


@pytest.mark.parametrize(("items", "steps"), [(120, 1000), (1400, 1400), (4500, 4000)])
def test_the_tiny_llms_steps_follow_the_catalogue(items, steps):
    """Guards: a small shop that waits for the steps of a large one."""
    shop = D.demo(0, n_users=60, n_items=items)
    s = settled("demo")
    assert sum(share for _, _, share in curec.tiny_lessons(s, shop)) == steps
    given = dataclasses.replace(s, tiny_steps=100)
    assert sum(share for _, _, share in curec.tiny_lessons(given, shop)) == 100


# ------------------------------------------------------------------------------ the two relatives
class PlainModel:
    """A model whose adapters can be switched off, and that says whether they are."""

    def __init__(self):
        self.adapters = True

    @contextlib.contextmanager
    def disable_adapter(self):
        self.adapters = False
        yield
        self.adapters = True


def lane_run(folder):
    s = curec.Settings(method="lane", out=str(folder), **DEMO_CPU)
    return curec.Run(curec.resolve(s))


GOOD = '{"preferences": ["a", "b", "c", "d", "E"]}'


@pytest.fixture
def stubborn(monkeypatch):
    """An LLM that answers malformed lists, but for the first prompt of the second attempt."""
    model = PlainModel()

    def generate(llm, tokenizer, prompts, sampling, name):
        assert llm is model
        assert not model.adapters, "the untuned LLM is asked"
        texts = ['{["a", "b", "c", "d", "e"]}'] + ["{" * sampling.seed] * (len(prompts) - 1)
        if sampling.seed == 2:
            texts[0] = GOOD
        return texts, None

    recorder = Recorder(generate)
    monkeypatch.setattr(rl, "generate", recorder)
    return model, recorder


def test_malformed_preferences_are_asked_for_five_times_and_dropped(stubborn, tmp_path):
    """Guards: an answer that stops the run; a user asked again who had answered; a tuned LLM."""
    model, generate = stubborn
    run = lane_run(tmp_path)
    told = curec.ask_preferences(run, D.demo(0, 30, 20), (model, None))
    assert [len(args[2]) for args in generate.calls] == [60, 60, 59, 59, 59]
    assert told["names"][0] == list("abcdE")
    assert told["names"].count([]) == 59
    assert run.metrics["lane"] == {"lists_asked": 60, "lists_dropped": 59}


def test_preferences_are_asked_for_with_past_alone(stubborn, tmp_path):
    """Guards: a history that shows what is to be predicted; a name that tells who is asked for."""
    model, generate = stubborn
    shop = D.demo(0, 30, 20)
    told = curec.ask_preferences(lane_run(tmp_path), shop, (model, None))
    prompts = generate.calls[0][2]
    assert prompts == generate.calls[1][2]
    for u, seq in enumerate(shop.train):
        assert told["since"][u].tolist() == [max(1, len(seq) // 2), max(1, len(seq) - 1)]
        for cut, length in enumerate(told["since"][u]):
            assert prompts[2 * u + cut] == D.history_question(shop, seq[:length], "prefer")
    assert "user" not in prompts[0]


def test_interrupted_preferences_are_asked_for_five_times_in_all(stubborn, tmp_path, monkeypatch):
    """Guards: answers lost by a kill, or asked for again from the first attempt on."""
    model, generate = stubborn

    def stops_at_the_third(llm, tokenizer, prompts, sampling, name):
        if sampling.seed == 3:
            raise MemoryError
        return generate(llm, tokenizer, prompts, sampling, name)

    shop = D.demo(0, 30, 20)
    expected = curec.ask_preferences(lane_run(tmp_path / "whole"), shop, (model, None))
    generate.calls.clear()
    monkeypatch.setattr(rl, "generate", stops_at_the_third)
    with pytest.raises(MemoryError):
        curec.ask_preferences(lane_run(tmp_path / "torn"), shop, (model, None))
    model.adapters = True
    monkeypatch.setattr(rl, "generate", generate)
    told = curec.ask_preferences(lane_run(tmp_path / "torn"), shop, (model, None))
    assert told["names"] == expected["names"]
    assert [args[3].seed for args in generate.calls] == [1, 2, 3, 4, 5]


def preferences_of(shop, names, arm):
    """The preferences in the inputs of an arm."""
    s = curec.resolve(curec.Settings(arms=arm, **DEMO_CPU))
    since = torch.tensor([[len(seq) // 2, len(seq) - 1] for seq in shop.train])
    told = {"names": names, "since": since}
    return curec.arm_inputs(s, shop, random_vectors, {}, told)[arm].preferences


def test_a_dropped_list_keeps_the_earlier_ones_preferences():
    shop = D.demo(0, 30, 20)
    names = [list("abcdE")] + [[]] * 59
    _, named, _ = preferences_of(shop, names, "lane")
    assert named.shape == (30, 2, 5)
    assert named[0].tolist() == [[1, 2, 3, 4, 5]] * 2
    assert not named[1:].any(), "no preference at all"


def test_lanes_placebo_has_the_same_preferences_of_other_users():
    shop, names = D.demo(0, 30, 20), []
    for u in range(30):
        mine = list("abcde")[u % 5 :] + list("fghij")[: u % 5]
        names += [mine, mine[::-1]]
    vectors, own, since = preferences_of(shop, names, "lane")
    same_vectors, mixed, same_since = preferences_of(shop, names, "lane-placebo")
    assert not torch.equal(own, mixed)
    assert sorted(own.tolist()) == sorted(mixed.tolist())
    assert torch.equal(vectors, same_vectors)
    assert torch.equal(since, same_since)


def test_a_users_future_changes_no_preference_and_no_earlier_score(monkeypatch, tmp_path):
    """Guards: LANE's original fault, preferences drawn from the whole train history and told to
    early positions."""

    def generate(model, tokenizer, prompts, sampling, name):
        """What is preferred depends on all that is shown."""
        texts = []
        for prompt in prompts:
            digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
            texts.append(json.dumps({"preferences": [f"{k}{digest}" for k in range(5)]}))
        return texts, None

    def scores(world, ago, folder):
        """By the preferences that a world's users have, after the same histories: those of `shop`,
        without that many items at their end."""
        run = lane_run(tmp_path / folder)
        told = curec.ask_preferences(run, world, (PlainModel(), None))
        torch.manual_seed(0)
        inputs = curec.arm_inputs(run.settings, world, random_vectors, {}, told)["lane"]
        model = recommender.SASRec(world.n_items, inputs).eval()
        histories = [seq[: len(seq) - ago] for seq in shop.train]
        return recommender.scorer(model)(histories, range(30))

    monkeypatch.setattr(rl, "generate", generate)
    shop, seqs = D.demo(0, 30, 20), []
    for seq in shop.seqs:
        half = len(seq) // 2
        seqs.append(np.append(seq[:half], seq[half:][::-1]))
    other = dataclasses.replace(shop, seqs=seqs)
    # just before the second cut, and at it
    torch.testing.assert_close(scores(shop, 2, "a"), scores(other, 2, "b"))
    early, late = scores(shop, 1, "c"), scores(other, 1, "d")
    assert not torch.allclose(early, late, atol=1e-3), "later positions know more"


def test_the_beams_titles_become_scores_and_all_others_a_miss(monkeypatch, tmp_path):
    """Guards: an item number off by one; the worst beam in front; a beam without a title that
    scores an item."""
    shop = D.demo(0, 30, 20)

    def title_trie(tokenizer, titles):
        assert titles == shop.titles[1:]

    def retrieve(model, tokenizer, prompts, tries, beams, budget):
        return torch.tensor([[3, 0, -1]] * len(prompts))

    def nothing(*args):
        pass

    monkeypatch.setattr(curec, "train_adapter", nothing)
    monkeypatch.setattr(rl, "use", nothing)
    monkeypatch.setattr(rl, "title_trie", title_trie)
    monkeypatch.setattr(rl, "retrieve", retrieve)
    model = SimpleNamespace(add_adapter=nothing, peft_config={"align": LoraConfig()})
    s = curec.resolve(curec.Settings(method="knowledge", out=str(tmp_path), **DEMO_CPU))
    score = curec.teach_knowledge(curec.Run(s), shop, (model, None), beams=3)
    found = score(shop.train[:2], range(2))
    assert found.shape == (2, 21)
    for row in found:
        assert row[4] > row[1] > 0
        missed = [row[i].item() for i in range(1, 21) if i not in (4, 1)]
        assert missed == [recommender.MISS] * 18


@pytest.fixture(scope="session")
def relatives(finished, tmp_path_factory):
    """Finished runs of the two relatives: {method: (run folder, what it printed)}."""
    cwd, runs = tmp_path_factory.mktemp("relatives"), {}
    (cwd / "cache").symlink_to(finished.cwd / "cache")
    for method in ("lane", "knowledge"):
        out = io.StringIO()
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out):
            status = curec.main([*QUICK, "--method", method, "--out", f"runs/{method}"])
        assert status == 0
        runs[method] = cwd / "runs" / method, out.getvalue()
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lane", "knowledge"])
def test_relatives_stand_in_table_and_report_beside_their_arms(relatives, method):
    folder, printed = relatives[method]
    report = (folder / "report.md").read_text()
    arms = [arm for arm, row in recommender.ARMS.items() if method in row.methods.split()]
    assert list(json_of(folder / "metrics.json")["arms"]) == arms
    for arm in arms:
        assert f"| {arm} |" in printed
        assert f"| {arm} |" in report


@pytest.mark.slow
def test_lane_reports_its_lists_and_is_compared_with_the_same_start(relatives):
    folder, _ = relatives["lane"]
    m = json_of(folder / "metrics.json")
    assert m["lane"]["lists_asked"] == 400
    assert 0 <= m["lane"]["lists_dropped"] <= 400
    assert ("lane", "text-init") in {(c["a"], c["b"]) for c in m["comparisons"]}
    assert "lists_dropped" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_all_arms_run_together_and_are_taken_up_again(relatives, fresh):
    """Guards: an adapter of one method that is on while another speaks; a finished stage of a
    relative that is done again, or otherwise; the cost of an arm without its own training. (With
    LANE the tiny LLM is another one: knowledge is compared with a run of these two alone.)"""
    args = [*QUICK, "--arms", "curec,text-init,lane,knowledge"]
    assert curec.main(args) == 0
    two = [*QUICK, "--arms", "lane,knowledge", "--out", "runs/two"]
    assert curec.main(two) == 0
    first = json_of(fresh / "metrics.json")
    alone = json_of(relatives["lane"][0] / "metrics.json")["arms"]
    pair = json_of(fresh.parent / "two/metrics.json")["arms"]
    assert first["arms"]["lane"]["test"] == alone["lane"]["test"] == pair["lane"]["test"]
    assert first["arms"]["knowledge"]["test"] == pair["knowledge"]["test"]
    assert first["arms"]["knowledge"]["train_s"] >= first["time_s"]["knowledge"]
    kept = {name: (fresh / "state" / name).stat().st_mtime_ns for name in STAGES_OF_RELATIVES}
    for name in ("state/arm-lane.0.pt", "state/arm-knowledge.0.pt", "metrics.json"):
        (fresh / name).unlink()
    assert curec.main([*args, "--resume"]) == 0
    again = json_of(fresh / "metrics.json")
    for arm, entry in first["arms"].items():
        assert again["arms"][arm]["test"] == entry["test"]
    for name, written in kept.items():
        assert (fresh / "state" / name).stat().st_mtime_ns == written


STAGES_OF_RELATIVES = ("prefer.pt", "knowledge.pt")


# ------------------------------------------------------------------------------ real processes
@pytest.fixture(scope="session")
def all_arms(tmp_path_factory):
    """A run of all of CURec's arms as a process whose output is piped: (working directory, what
    it returned). Its arms are trained by worker processes."""
    cwd = tmp_path_factory.mktemp("all_arms")
    done = run_process(*QUICK, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd, done


@pytest.mark.slow
def test_a_process_prints_every_arm_as_plain_text(all_arms):
    cwd, done = all_arms
    report = (cwd / "runs/demo/report.md").read_text()
    for arm in recommender.ARMS:
        shown = arm in settled("demo").arms.split(",")
        assert (f"| {arm} |" in done.stdout) == shown
        assert (f"| {arm} |" in report) == shown
    assert not re.search(r"[\r\x1b]|it/s|%\|", done.stdout + done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_same_command_makes_the_same_bytes_and_another_seed_others(all_arms, tmp_path):
    """Guards: sums in another order, sets walked in another order; a seed that is not used."""
    expected = bench_kill.outcome(all_arms[0] / "runs/demo")
    assert run_process(*QUICK, cwd=tmp_path).returncode == 0
    assert bench_kill.outcome(tmp_path / "runs/demo") == expected
    other = ["--seed", "1", "--out", "runs/other"]
    assert run_process(*QUICK, *other, cwd=tmp_path).returncode == 0
    for name, value in bench_kill.outcome(tmp_path / "runs/other").items():
        assert value != expected[name]


@pytest.mark.slow
def test_a_process_makes_the_same_bytes_as_a_call(finished, tmp_path):
    """Guards: results that depend on what ran before in the same process."""
    assert run_process(*SMALL, cwd=tmp_path).returncode == 0
    assert bench_kill.outcome(tmp_path / "runs/demo") == bench_kill.outcome(finished.folder)


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    """Guards: any random state, finished unit or half-written file that a kill loses or doubles.
    More kills: tests/bench/bench_kill.py."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [*QUICK, "--ppo-updates", "3", "--epochs", "6", "--windows", "3"]
    assert run_process(*flags, cwd=tmp_path).returncode == 0
    expected = bench_kill.outcome(tmp_path / "runs/demo")
    seed = int.from_bytes(os.urandom(4), "big")
    killed = bench_kill.survive(flags, 6, expected, seed)
    assert len(killed) == 6
    assert len({last for _, last, _ in killed}) >= 4, killed


@pytest.mark.slow
@pytest.mark.parametrize("until", ["align.pt", "bestof.pt"])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, until):
    """Guards: a traceback, a hang behind worker processes, a command that cannot be copied."""
    args = [*QUICK, "--out", "runs/a b"]
    process = start_process(tmp_path, *args, until=f"runs/a b/state/{until}")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"go on with: {sys.executable} " in said
    assert re.search(r"--out 'runs/a b' --resume$", said, re.M)
    assert said.count("--resume") == 1


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ("--dataset demo --overwrite", "curec.py --dataset demo --resume"),
        ("--run runs/demo --explain user3", "interrupted"),
        ("--dry-run", "interrupted"),
    ],
)
def test_ctrl_c_offers_a_command_that_goes_on(monkeypatch, capsys, args, hint):
    """Guards: --resume offered where nothing was begun; another interpreter than the one in use;
    --overwrite, which would begin anew."""
    monkeypatch.setattr(sys, "argv", ["curec.py", *args.split()])
    monkeypatch.setattr(os, "_exit", lambda status: None)
    curec.stop(signal.SIGINT, None)
    said = capsys.readouterr().err
    assert said.strip().endswith(hint)
    assert (sys.executable in said) == ("--resume" in hint)


@pytest.mark.slow
def test_a_notebook_runs_it(finished, tmp_path):
    """Guards: 'OutStream' object has no attribute 'reconfigure'; Ctrl-C that ends the kernel."""
    code = "import io, runpy, signal, sys; sys.stdout = io.StringIO(); before = signal.getsignal(2)"
    code += "; sys.modules['IPython'] = sys"
    code += f"; sys.argv = ['curec.py', '--dry-run', *{QUICK}]; sys.path.insert(0, {str(ROOT)!r})"
    run = f"    runpy.run_path({str(ROOT / 'curec.py')!r}, run_name='__main__')"
    end = "    assert e.code == 0 and signal.getsignal(2) == before"
    text = "\n".join([code, "try:", run, "except SystemExit as e:", end])
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=ENV, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
def test_a_terminal_that_cannot_print_a_title_ends_no_look(own_run, monkeypatch):
    lines = [line | {"title": "Жар 🎧"} for line in json_lines(own_run / "reasons.jsonl")]
    (own_run / "reasons.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setitem(ENV, "PYTHONIOENCODING", "ascii")
    args = ["--run", "runs/few", "--history", "i1"]
    done = run_process(*args, cwd=own_run.parents[1])
    assert done.returncode == 0, done.stderr
    assert "??? ?" in done.stdout


@pytest.mark.parametrize(("system", "unit"), [("linux", 2**10), ("darwin", 2**20)])
def test_peak_memory_is_in_megabytes(tmp_path, world, monkeypatch, system, unit):
    """Guards: bytes taken for KiB on macOS."""
    usage = SimpleNamespace(ru_maxrss=500 * unit)
    monkeypatch.setattr(curec.resource, "getrusage", lambda who: usage)
    run = open_run(world, tmp_path / "run")
    run.metrics["comparisons"] = []
    monkeypatch.setattr(curec.sys, "platform", system)
    curec.write_report(run, world, [])
    assert json_of(tmp_path / "run/metrics.json")["peak_memory_mb"]["ram"] == 500


def one_line_of_a_full_disk(cwd, *args, largest):
    full = run_process(*SMALL, *args, cwd=cwd, largest=largest)
    assert full.returncode == 2
    assert len(full.stderr.splitlines()) == 1, full.stderr
    assert "in stage" in full.stderr
    assert "--resume" in full.stderr
    for file in (cwd / "runs/demo/state").glob("*.pt"):
        torch.load(file, weights_only=True)


@pytest.mark.slow
def test_a_full_disk_in_the_first_stage_costs_one_line(finished, tmp_path):
    """Guards: a traceback, a folder that --resume cannot go on with."""
    one_line_of_a_full_disk(tmp_path, largest=100_000)
    done = run_process(*SMALL, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert bench_kill.outcome(tmp_path / "runs/demo") == bench_kill.outcome(finished.folder)
    assert list((tmp_path / "runs").rglob("*.part")) == []


@pytest.mark.slow
def test_a_full_disk_in_the_last_stage_costs_no_finished_work(finished, copied):
    cwd, expected = copied.parents[1], bench_kill.outcome(finished.folder)
    for file in copied.glob("state/arm-*"):
        file.unlink()
    one_line_of_a_full_disk(cwd, "--resume", largest=20_000)
    done = run_process(*SMALL, "--resume", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert bench_kill.outcome(copied) == expected


# -------------------------------------------------------------------------- the source and README
CODE_FROM_DATA = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FOREIGN_CODE = set("eval exec compile __import__ os.system os.popen torch.hub.load".split())
MODULES = sorted(ROOT.glob("*.py"))
SOURCES = MODULES + sorted(ROOT.glob("tests/**/*.py"))


@functools.cache
def all_nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def nodes(path, kind):
    return [node for node in all_nodes(path) if isinstance(node, kind)]


def keywords(call):
    """{name: source text} of the keyword arguments of a call."""
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_runs_foreign_code(path):
    """Guards: data, weights or a hub's files that are run as code."""
    imported = set()
    for node in nodes(path, ast.Import):
        imported |= {alias.name.split(".")[0] for alias in node.names}
    for node in nodes(path, ast.ImportFrom):
        imported.add((node.module or "").split(".")[0])
    assert not imported & CODE_FROM_DATA
    for call in nodes(path, ast.Call):
        name, given = ast.unparse(call.func), keywords(call)
        assert name not in FOREIGN_CODE, call.lineno
        for unsafe in ("shell", "allow_pickle", "trust_remote_code"):
            assert given.get(unsafe, "False") == "False", call.lineno
        if name == "torch.load":
            assert given.get("weights_only") == "True", call.lineno
    for table in nodes(path, ast.Dict):
        # what becomes keyword arguments
        for unsafe in ("shell", "allow_pickle", "trust_remote_code"):
            assert f"'{unsafe}': True" not in ast.unparse(table), table.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_ask_for_safetensors_and_https(path):
    """Guards: pickled weights of a hub; an address that anybody on the way can answer."""
    for function in nodes(path, ast.FunctionDef):
        text = ast.unparse(function)
        if re.search(r"AutoModel\w*\.from_pretrained", text):
            # a keyword argument, or an entry of the dict that becomes them
            assert re.search(r"use_safetensors\W+True", text), function.name
            assert re.search(r"trust_remote_code\W+False", text), function.name
    for node in nodes(path, ast.Constant):
        if isinstance(node.value, str):
            assert "http://" not in node.value, node.lineno
            assert "ftp://" not in node.value, node.lineno


def test_the_scan_of_the_source_looks_at_calls():
    """Guards: a scan that passes because it finds nothing."""
    assert [path.name for path in MODULES] == [
        "curec.py",
        "data.py",
        "recommender.py",
        "reward.py",
        "rl.py",
    ]
    names = []
    for path in MODULES:
        names += [ast.unparse(call.func) for call in nodes(path, ast.Call)]
    assert names.count("torch.load") >= 1
    assert sum("from_pretrained" in name for name in names) >= 4


@pytest.mark.slow
def test_the_readmes_python_runs(copied):
    """Guards: examples of an older version. All in one script, as a reader would paste them; those
    for a GPU, or for files that only the reader has, are left out."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    here = [block for block in blocks if "cuda" not in block and "path/to" not in block]
    assert here
    script, cwd = copied.parents[1] / "pasted.py", copied.parents[1]
    script.write_text("\n".join(here))
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    pipes = {"capture_output": True, "text": True}
    done = subprocess.run([sys.executable, script.name], cwd=cwd, env=env, **pipes)
    assert done.returncode == 0, done.stderr[-2000:]
