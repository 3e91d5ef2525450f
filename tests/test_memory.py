"""What happens where memory runs out, in float16, and how long a run will take.

    pytest tests/test_memory.py               seconds, without a GPU; -m slow: a run, bench/gpu.sh

Memory runs out where a test says so: a pass with gradients of more rows than fit raises what CUDA
raises.
"""

import dataclasses
import os
import re
import subprocess
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from test_curec import QUICK
from test_rl import (
    PROMPTS,
    adapter,
    close,
    fresh,
    fresh_align,
    greedy,
    pairs,
    run,
    same,
    small_tiny,
    trainable,
)
from torch.utils._python_dispatch import TorchDispatchMode

import curec
import rl

ROOT = Path(curec.__file__).parent


# ------------------------------------------------------------------------------- what tests share
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a Qwen2-shaped model that has learnt a little."""
    path = str(tmp_path_factory.mktemp("llm") / "tiny")
    small_tiny(path, [("a few", pairs(200), 6)])
    return path


def fits(monkeypatch, most):
    """From now on passes with gradients have memory for so many rows: the rows of those tried."""
    whole, tried = rl.logps_and_states, []

    def logps_and_states(model, batch, *args):
        if torch.is_grad_enabled():
            tried.append(len(batch.rows))
            if len(batch.rows) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, batch, *args)

    monkeypatch.setattr(rl, "logps_and_states", logps_and_states)
    return tried


def gradients(model, tokenizer, rows=8):
    """(gradients of the adapter as one vector, what was kept, the micro-batches that fitted) of one
    micro-batch of ragged pairs."""
    prompts = [rl.prompt_ids(tokenizer, prompt) for prompt, _ in pairs(rows)]
    answers = [rl.answer_ids(tokenizer, answer) for _, answer in pairs(rows)]

    def loss_of(model, batch, tokens):
        logp, _ = rl.logps_and_states(model, batch)
        loss = -(logp * batch.mask).sum() / 50
        return loss, loss.item()

    batches = rl.micro_batches(range(rows), prompts, answers, model.device, rows)
    kept, batches = rl.accumulate_gradients(model, trainable(model), batches, loss_of)
    found = torch.cat([weight.grad.flatten() for weight in trainable(model)])
    return found, kept, batches


# ------------------------------------------------------------------------- where memory runs out
def test_halves_give_the_gradients_of_the_whole(tiny, monkeypatch, capsys):
    """Guards: gradients of a failed pass that stay and count twice; rows lost, or weighed anew,
    where a micro-batch is cut; a note for every step."""
    llm = fresh_align(tiny)
    whole, (loss,), _ = gradients(*llm)
    assert rl.memory_notes(llm[0]) == []
    capsys.readouterr()
    tried = fits(monkeypatch, most=2)
    for _ in range(2):
        found, kept, batches = gradients(*llm)
        assert torch.allclose(found, whole, atol=1e-5)
        assert sum(kept) == pytest.approx(loss, abs=1e-5)
        assert [len(batch.rows) for batch in batches] == [2, 2, 2, 2]
        assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(8))
    assert tried == [8, 4, 2, 2, 2, 2] * 2
    assert capsys.readouterr().out.count("note: memory ran out") == 1
    (note,) = rl.memory_notes(llm[0])
    assert "micro-batches of 2 " in note
    assert "--micro-batch" in note


def test_a_pass_that_fails_in_its_middle_counts_for_nothing(tiny, monkeypatch):
    """Guards: the gradients of the micro-batches before the one that did not fit."""
    llm = fresh_align(tiny)
    whole, (loss,), _ = gradients(*llm, rows=7)
    forward, calls = rl.logps_and_states, []

    def logps_and_states(*args):
        calls.append(1)
        # 7 rows; 4 of them, then the other 3
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args)

    monkeypatch.setattr(rl, "logps_and_states", logps_and_states)
    found, kept, batches = gradients(*llm, rows=7)
    assert [len(batch.rows) for batch in batches] == [2, 2, 2, 1]
    assert sum(kept) == pytest.approx(loss, abs=1e-5)
    assert torch.allclose(found, whole, atol=1e-5)


def test_a_row_that_does_not_fit_is_an_error(tiny, monkeypatch):
    """Guards: halves of one row, for ever."""
    fits(monkeypatch, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(*fresh_align(tiny))


def test_what_a_failed_pass_holds_is_free_before_the_next():
    """Guards: the activations of a pass that did not fit, kept by its loss while its half is tried,
    which then does not fit either."""
    alive = weakref.WeakSet()

    class Activations:
        pass

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, rows):
            ctx.rows, ctx.activations = rows, Activations()
            alive.add(ctx.activations)
            return weight.sum()

        @staticmethod
        def backward(ctx, gradient):
            if ctx.rows > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradient.expand(2), None

    def loss_of(model, batch, tokens):
        before = len(alive)
        return Layer.apply(model.weight, len(batch.rows)), before

    model = torch.nn.Module()
    model.weight, model.dtype = torch.nn.Parameter(torch.ones(2)), torch.float32
    parts = (torch.arange(2), torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 1))
    kept, _ = rl.accumulate_gradients(model, [model.weight], [rl.MicroBatch(*parts)], loss_of)
    assert kept[0] == 0
    assert model.weight.grad.tolist() == [2.0, 2.0]


def test_supervised_training_goes_on_with_halves(tiny, monkeypatch):
    """Guards: every step failing again where the first one has; another loss than without."""
    how = rl.SupervisedConfig(3, batch=8, micro_batch=8)
    expected = rl.supervise(*fresh_align(tiny), pairs(20), how)
    llm = fresh_align(tiny)
    tried = fits(monkeypatch, most=4)
    assert rl.supervise(*llm, pairs(20), how) == pytest.approx(expected, rel=1e-3)
    assert tried == [8, 4, 4, 4, 4, 4, 4]
    assert len(rl.memory_notes(llm[0])) == 1


def test_training_starts_with_what_fitted_before(tiny, monkeypatch, capsys):
    """Guards: a stage after another that runs out of memory again; a limit of rows that cuts what
    is smaller, or generation."""
    llm = fresh_align(tiny)
    how = rl.SupervisedConfig(2, batch=8, micro_batch=8)
    tried = fits(monkeypatch, most=3)
    rl.supervise(*llm, pairs(20), how)
    assert tried == [8, 4, *[2] * 8]
    tried.clear()
    rl.supervise(*llm, pairs(20), how)
    assert tried == [2] * 8
    tried.clear()
    rl.supervise(*llm, pairs(20), dataclasses.replace(how, steps=1, micro_batch=1))
    assert tried == [1] * 8, "a smaller size stays what it is"
    tried.clear()
    rl.add_policy(llm[0])
    run(*llm)
    assert set(tried) == {2}
    assert capsys.readouterr().out.count("note: memory ran out") == 1
    assert len(rl.memory_notes(llm[0])) == 1
    assert rl.within_limit(llm[0], "budget", 32_768) == 32_768
    assert rl.within_limit(fresh_align(tiny)[0], "rows", 8) == 8, "another model"


def test_ppo_goes_on_with_halves(tiny, monkeypatch):
    """Guards: an update that ends, or learns something else, where memory runs out; the second pass
    over its answers failing again."""
    expected = run(*fresh(tiny))
    llm = fresh(tiny)
    tried = fits(monkeypatch, most=2)
    assert close(run(*llm), expected)
    # two minibatches of 4, twice
    assert sorted(tried) == [2] * 8 + [4] * 2
    assert len(rl.memory_notes(llm[0])) == 1
    tried.clear()
    run(*llm)
    assert tried == [2] * 8


def groups_fit(monkeypatch, most):
    """From now on generation has memory for so many rows: the rows of the groups tried."""
    whole, tried = rl.decode_group, []

    def decode_group(model, rows, *args):
        tried.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, rows, *args)

    monkeypatch.setattr(rl, "decode_group", decode_group)
    return tried


def test_answers_go_on_with_halves_in_their_order(tiny, monkeypatch, capsys):
    """Guards: answers lost, made twice or given to another prompt where a group is cut."""
    llm = fresh(tiny)
    expected = greedy(*llm, PROMPTS[:9])
    tried = groups_fit(monkeypatch, most=3)
    capsys.readouterr()
    assert greedy(*llm, PROMPTS[:9]) == expected
    assert tried[:2] == [9, 5]
    assert sum(rows for rows in tried if rows <= 3) == 9
    assert capsys.readouterr().out.count("note: memory ran out") == 1
    assert "generation in batches of" in rl.memory_notes(llm[0])[0]
    assert "--micro-batch" in rl.memory_notes(llm[0])[0]


@pytest.mark.parametrize("budget", ["full", "ample"])
def test_generation_starts_with_what_fitted_before(budget, tiny, monkeypatch):
    """Guards: each call running out of memory again, where its answers fill the budget or where
    they were fewer; a limit that cuts other answers; one that a new model keeps."""
    llm = fresh(tiny)
    prompts = [PROMPTS[0]] * 8
    tokens = 8 * (len(rl.prompt_ids(llm[1], prompts[0])) + 6)
    budget = tokens if budget == "full" else 32_768
    expected = greedy(*llm, prompts, budget=budget)
    tried = groups_fit(monkeypatch, most=2)
    assert greedy(*llm, prompts, budget=budget) == expected
    assert tried == [8, 4, 2, 2, 2, 2]
    tried.clear()
    assert greedy(*llm, prompts, budget=budget) == expected
    assert tried == [2, 2, 2, 2]
    tried.clear()
    # a smaller budget stays what it is
    assert greedy(*llm, prompts, budget=1) == expected
    assert tried == [1] * 8
    assert rl.within_limit(fresh(tiny)[0], "budget", budget) == budget


def test_an_answer_that_does_not_fit_is_an_error(tiny, monkeypatch):
    """Guards: groups of one prompt cut for ever."""

    def decode_group(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rl, "decode_group", decode_group)
    with pytest.raises(torch.OutOfMemoryError):
        greedy(*fresh(tiny), PROMPTS[:3])


# ---------------------------------------------------------------------------------------- float16
def small_gradients(dtype):
    """The gradients of a layer in dtype, about 1e-8: float16 ends at 6e-8."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.weight, model.dtype = torch.nn.Parameter(torch.randn(5, 4)), dtype
    parts = (torch.arange(3), torch.zeros(3, 1), torch.zeros(3), torch.zeros(3, 1))
    inputs = torch.rand(3, 5) + 0.5

    def loss_of(model, batch, tokens):
        states = inputs[batch.rows].to(dtype) @ model.weight.to(dtype)
        return 1e-8 * states.float().sum(), None

    rl.accumulate_gradients(model, [model.weight], [rl.MicroBatch(*parts)], loss_of)
    return model.weight.grad


def test_small_gradients_survive_float16(monkeypatch):
    """Guards: gradients rounded to 0 on a card without bfloat16; a scale that stays in them."""
    expected = small_gradients(torch.float32)
    assert torch.allclose(small_gradients(torch.float16), expected, rtol=1e-2, atol=0)
    monkeypatch.setattr(rl, "LOSS_SCALE", 1.0)
    assert small_gradients(torch.float16).count_nonzero() == 0


def test_an_llm_in_float16_has_the_gradients_of_float32(tiny):
    """Guards: a model in float16 that is taken for float32 by its adapters' dtype."""
    found = []
    for dtype in (torch.float32, torch.float16):
        model, tokenizer = fresh(tiny, policy=False, compute=dtype)
        rl.use(model, "align", trainable=True)
        assert model.dtype == dtype
        found.append(gradients(model, tokenizer)[0])
    expected, ours = found
    assert ours.dtype == torch.float32
    assert (ours - expected).norm() < 0.05 * expected.norm()


def nan_loss(monkeypatch):
    whole = rl.logps_and_states
    nan = float("nan")
    monkeypatch.setattr(rl, "logps_and_states", lambda *args: (nan * whole(*args)[0], None))


def infinite_gradients(monkeypatch):
    whole = rl.accumulate_gradients

    def accumulate_gradients(model, weights, *args):
        found = whole(model, weights, *args)
        weights[0].grad[0] = torch.inf
        return found

    monkeypatch.setattr(rl, "accumulate_gradients", accumulate_gradients)


@pytest.mark.parametrize("overflow", [nan_loss, infinite_gradients])
def test_an_overflow_names_the_flag_that_helps(tiny, monkeypatch, overflow):
    """Guards: weights of NaN after hours, which a checkpoint keeps; an error without a remedy."""
    llm = fresh_align(tiny)
    before = adapter(llm[0], "align")
    overflow(monkeypatch)
    with pytest.raises(OSError, match="--dtype float32"):
        rl.supervise(*llm, pairs(20), rl.SupervisedConfig(3, 8, 8))
    assert same(adapter(llm[0], "align"), before)


# ------------------------------------------------------------------------------ hours of a run
LINE = (
    r"^(.+): ([\d,]+) prompts learnt, at most ([\d,]+) answers, ([\d.]+) hours; fewer with (\S+)$"
)


@pytest.mark.parametrize("arms", ["curec", "lane,knowledge"])
def test_hours_are_tokens_by_their_speed(arms, tmp_path, monkeypatch, capsys):
    """Guards: hours that are off by a factor; a flag that does not exist; a total without a stage.
    0.05 tokens a second: hours of which two decimals say enough."""
    monkeypatch.chdir(tmp_path)
    args = [*QUICK, "--arms", arms, "--dry-run", "--tokens-per-second", "0.05"]
    assert curec.main(args) == 0
    said = capsys.readouterr().out
    s = curec.resolve(curec.parse_args(args))
    works = curec.planned_work(s, curec.load_data(s))
    prompt = int(re.search(r"a prompt has about (\d+) tokens", said)[1])
    lines = re.findall(LINE, said, re.M)
    assert len(lines) == len(works)
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(curec.Settings)}
    hours = 0.0
    for work, (stage, learnt, answers, told, flag) in zip(works, lines, strict=True):
        assert stage == work.stage
        assert int(learnt.replace(",", "")) == work.learnt
        assert int(answers.replace(",", "")) == work.answers
        assert flag in flags
        # answers end at 0.6 of --max-new 18 tokens; training reads 0.1 a second
        seconds = work.answers * 10.8 / 0.05 + work.passes * (prompt + 10.8) / 0.1
        assert float(told) == pytest.approx(seconds / 3600, rel=0.02, abs=0.01)
        hours += float(told)
    assert float(re.search(r"about ([\d.]+) hours", said)[1]) == pytest.approx(hours, abs=0.05)


def test_the_work_of_lane_and_knowledge_by_hand(tmp_path, monkeypatch):
    """Guards: a stage that is left out, or whose answers are not those of its users."""
    monkeypatch.chdir(tmp_path)
    s = curec.resolve(curec.parse_args([*QUICK, "--arms", "lane,knowledge"]))
    data = curec.load_data(s)
    twice = 2 * len(data.users)
    rows = [tuple(work)[:4] for work in curec.planned_work(s, data)]
    assert rows == [("preferences", 0, 0, twice), ("knowledge", 96, 96, twice)]


def test_speed_is_measured_and_changes_no_weight(tiny):
    """Guards: speeds of nothing; an adapter that has learnt from a dry run."""
    model, tokenizer = fresh_align(tiny)
    before = adapter(model, "align")
    speeds = rl.measure_speed(model, tokenizer, PROMPTS[:6], micro_batch=2, max_new=4)
    assert len(speeds) == 2
    assert all(0 < speed < np.inf for speed in speeds)
    assert same(adapter(model, "align"), before)


def test_the_clock_waits_for_the_card(tiny, monkeypatch):
    """Guards: a speed of training many times too high: backward returns before a card is done, and
    only a number that is read waits for it."""
    events = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            events.append("read" if "_local_scalar_dense" in str(func) else "computed")
            return func(*args, **(kwargs or {}))

    clock = rl.time.perf_counter
    monkeypatch.setattr(rl.time, "perf_counter", lambda: events.append("clock") or clock())
    llm = fresh_align(tiny)
    with Reads():
        rl.measure_speed(*llm, PROMPTS[:2], micro_batch=2, max_new=2)
    last = len(events) - 1 - events[::-1].index("clock")
    assert events[last - 1] == "read"


# ---------------------------------------------------------------------------------- whole programs
@pytest.mark.slow
def test_the_report_says_that_memory_ran_out(tmp_path, monkeypatch, capsys):
    """Guards: a run that was slow for a reason that nobody is told."""
    monkeypatch.chdir(tmp_path)
    fits(monkeypatch, most=5)
    # the tiny LLM's own training does not count: its model is another one
    assert curec.main([*QUICK, "--arms", "content,rl"]) == 0, capsys.readouterr().err
    report = Path("runs/demo/report.md").read_text()
    assert report.count("memory ran out: at last micro-batches of") == 1


def gpu_script(folder, **settings):
    """bench/gpu.sh at tiny shapes on the CPU."""
    env = os.environ | {"DEVICE": "cpu", "QUICK": "1", "OMP_NUM_THREADS": "1", "OUT": str(folder)}
    script = ["bash", str(ROOT / "tests/bench/gpu.sh")]
    return subprocess.run(script, env=env | settings, capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_for_a_card_runs_on_a_cpu(tmp_path):
    """Guards: a script that breaks on the day that there is a card."""
    done = gpu_script(tmp_path, SIZES="tiny,Qwen3-tiny")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(re.findall(r"^\[ *\d+ s\] ok: ", done.stdout, re.M)) == 7
    assert "test NDCG@10" in done.stdout
    assert "one PPO update" in done.stdout


@pytest.mark.slow
def test_a_failed_step_of_the_script_stops_no_other(tmp_path):
    """Guards: minutes on a card lost to the first error; an error that the exit status hides."""
    done = gpu_script(tmp_path, SIZES="huge", LIMIT="1")
    assert done.returncode == 1
    assert "FAILED: shapes of huge" in done.stdout
    assert "FAILED: demo in full" in done.stdout
