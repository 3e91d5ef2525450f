"""PPO side by side with TRL's: samples a second, peak memory, and reward after as many samples.

    python -m venv trl_env                                                       TRL lives apart
    trl_env/bin/pip install -r requirements.txt trl==1.12.0
    python tests/bench/bench_ppo.py --trl-python trl_env/bin/python              speed and reward
    python tests/bench/bench_ppo.py --trl-python trl_env/bin/python --size large --updates 4
                                                                                 speed and memory

Both sides have the same checkpoint in float32, LoRA (rank 8), prompts (64 tokens), answers (32
tokens), batch (64), PPO epochs (4, one minibatch), learning rate, fixed weight of the KL and reward
(how often one word occurs); ours in NF4 is a row of its own. `small` has 3 layers of width 128,
`large` 57 M weights. Every run is a process of its own on one thread, and rounds alternate between
the sides (`large`: one round); times are medians over the updates. Without --trl-python, TRL is
left out. Results go to bench_ppo.json beside this file.

Not the same, each side as it is built: TRL's value model is a second model trained in full, ours a
head on the policy's states (learning rate 1e-2 against TRL's 1e-3); ours clips the gradient, and
values by 0.2 of scaled returns where TRL's are raw.
"""

import argparse
import importlib
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np
import torch
import transformers as hf

import rl

WORD = "red"
WORDS = "green blue old calm loud warm dark soft tall thin wide cold dry new odd".split()
RANK, PROMPT, ANSWER, EPOCHS, LR = 8, 64, 32, 4, 1e-3
# weight of the KL against the raw reward; ours divides rewards by their first spread, so its KL too
KL, SPREAD = 0.05, 1.225
SIZES = {
    "small": {"width": 128, "layers": 3, "batch": 64, "micro_batch": 16},
    "large": {"width": 640, "layers": 14, "batch": 16, "micro_batch": 4},
}
KINDS = ("ours, float32", "ours, NF4", "trl")


def texts(seed: int, n: int, length: int, choices: list) -> list:
    """n texts of words drawn at random."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(choices, length)) for _ in range(n)]


def make_model(folder: str, size: str) -> None:
    """A checkpoint that has seen a few answers, so that samples are words and the reward can be
    found; the large one is for speed and memory only."""
    prompts = texts(0, 400, PROMPT - 1, WORDS)
    samples = list(zip(prompts, texts(1, 400, 2 * ANSWER, [*WORDS, WORD]), strict=True))
    steps, shape = 30 if size == "small" else 3, SIZES[size]
    config = rl.TinyConfig(batch=8, width=shape["width"], layers=shape["layers"])
    rl.train_tiny(folder, prompts, [("answers", samples, steps)], [], config)


def lora():
    from peft import LoraConfig

    how = {"lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, **how)


class Watch:
    """Times of the reward's calls (one an update), the mean reward of every update, and the seconds
    spent in generation."""

    def __init__(self):
        self.calls, self.generating, self.rewards = [], [], []

    def reward(self, value: torch.Tensor) -> torch.Tensor:
        self.calls.append(time.perf_counter())
        self.rewards.append(float(value.mean()))
        return value

    def timed(self, function):
        def wrapper(*args, **settings):
            start = time.perf_counter()
            out = function(*args, **settings)
            self.generating.append(time.perf_counter() - start)
            return out

        return wrapper


# -------------------------------------------------------------------------- the sides, in a process
def train_ours(args, prompts: list, watch: Watch) -> None:
    from peft import get_peft_model

    shape = SIZES[args.size]
    torch.manual_seed(args.seed)
    if args.worker == "ours, NF4":
        model, tokenizer = rl.load(args.folder, rank=RANK)
    else:
        base = hf.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
        tokenizer = hf.AutoTokenizer.from_pretrained(args.folder)
        model = get_peft_model(base.requires_grad_(False), lora(), adapter_name="align")
    rl.add_policy(model)
    rl.generate = watch.timed(rl.generate)

    def count_word(answers, rows) -> tuple:
        counts = [float(answer.count(WORD)) for answer in answers]
        return watch.reward(torch.tensor(counts)), {}

    config = rl.PPOConfig(
        args.updates,
        batch=shape["batch"],
        minibatch=shape["batch"],
        micro_batch=shape["micro_batch"],
        epochs=EPOCHS,
        lr=LR,
        beta=KL / SPREAD,
        kl_target=0.0,
        kl_stop=float("inf"),
        no_eos_penalty=0.0,
        sampling=rl.Sampling(ANSWER),
        seed=args.seed,
    )
    rl.ppo(model, tokenizer, prompts, count_word, config)


def train_trl(args, prompts: list, watch: Watch) -> None:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    shape, path = SIZES[args.size], args.folder
    tokenizer = hf.AutoTokenizer.from_pretrained(path, padding_side="left")
    # more than the tokenizer has: a multiple of 64
    vocabulary = range(hf.AutoConfig.from_pretrained(path).vocab_size)
    counts = torch.tensor([float(tokenizer.decode([i]).count(WORD)) for i in vocabulary])

    class Backbone(torch.nn.Module):
        def forward(self, input_ids, **_):
            return SimpleNamespace(hidden_states=[counts[input_ids].cumsum(1)[..., None]])

    class Count(torch.nn.Module):
        """TRL takes the reward at a row's last token: there the running count is that of the whole
        answer."""

        base_model_prefix = "backbone"

        def __init__(self):
            super().__init__()
            self.backbone = Backbone()

        def score(self, hidden):
            watch.reward(hidden[:, -1])
            return hidden

    ppo_trainer.batch_generation = watch.timed(ppo_trainer.batch_generation)
    rows = [tokenizer(prompt + "\n")["input_ids"] for prompt in prompts]
    with tempfile.TemporaryDirectory() as out:
        config = PPOConfig(
            output_dir=out,
            per_device_train_batch_size=shape["micro_batch"],
            num_mini_batches=1,
            gradient_accumulation_steps=shape["batch"] // shape["micro_batch"],
            num_ppo_epochs=EPOCHS,
            response_length=ANSWER,
            temperature=1.0,
            kl_coef=KL,
            total_episodes=args.updates * shape["batch"],
            learning_rate=LR,
            lr_scheduler_type="constant",
            stop_token="eos",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            num_sample_generations=0,
            local_rollout_forward_batch_size=shape["batch"],
            disable_tqdm=True,
            seed=args.seed,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            ref_model=None,
            reward_model=Count(),
            value_model=hf.AutoModelForSequenceClassification.from_pretrained(
                path, dtype=torch.float32, num_labels=1
            ),
            peft_config=lora(),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            eval_dataset=Dataset.from_dict({"input_ids": rows[:64]}),
        )
        trainer.train()


def memory(which: str) -> float:
    """MB: VmRSS now, VmHWM at most since this process began. (The kernel's ru_maxrss counts the
    parent's too.)"""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+) kB", status)[1]) / 1024


def worker(args) -> None:
    """One process: prints its figures as the last line."""
    train = train_trl if args.worker == "trl" else train_ours
    # what a side imports is none of its memory
    names = ["datasets", "trl.experimental.ppo"] if args.worker == "trl" else ["bitsandbytes"]
    for name in ["peft", *names]:
        importlib.import_module(name)
    torch.set_num_threads(1)
    before, watch = memory("VmRSS"), Watch()
    train(args, texts(2, 512, PROMPT - 1, WORDS), watch)
    # from one reward to the next
    update = float(np.median(np.diff(watch.calls)))
    generation = float(np.median(watch.generating[1:]))
    figures = {
        "samples_per_s": SIZES[args.size]["batch"] / update,
        "generation_s": generation,
        "update_s": update - generation,
        "peak_mb": memory("VmHWM") - before,
        "rewards": watch.rewards,
    }
    print(json.dumps(figures))


# ------------------------------------------------------------------------------------ both together
def measure(args, kind: str, folder: str, seed: int) -> dict:
    """The figures of a side, trained in a process of its own."""
    python = args.trl_python if kind == "trl" else sys.executable
    command = [python, str(HERE), "--worker", kind, "--folder", folder, "--size", args.size]
    command += ["--updates", str(args.updates), "--seed", str(seed)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"samples')]
    return json.loads(lines[-1])


def main(args) -> None:
    kinds = KINDS if args.trl_python else KINDS[:-1]
    runs, table = {kind: [] for kind in kinds}, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = f"{folder}/model"
        make_model(folder, args.size)
        for seed in range(args.seeds if args.size == "small" else 1):
            for kind in kinds:
                found = measure(args, kind, folder, seed)
                runs[kind].append(found)
                reward = np.mean(found["rewards"][-3:])
                line = (
                    f"{args.size} {kind:14s} seed {seed}  {found['samples_per_s']:6.2f} samples/s"
                )
                print(f"{line}  {found['peak_mb']:5.0f} MB  last reward {reward:.2f}", flush=True)
    for kind, mine in runs.items():
        table[kind] = {}
        for name in ("samples_per_s", "generation_s", "update_s", "peak_mb"):
            table[kind][name] = float(np.median([found[name] for found in mine]))
        last = [float(np.mean(found["rewards"][-3:])) for found in mine]
        table[kind]["last_rewards"] = last
    command = " ".join(["python", "tests/bench/bench_ppo.py", *sys.argv[1:]])
    result = {"command": command, "torch": torch.__version__, "cpus": os.cpu_count(), "threads": 1}
    result |= {"machine": platform.machine(), "table": table, "runs": runs}
    path = pathlib.Path(args.json)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {args.size: result}, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument(
        "--trl-python", default="", help="python of an environment with trl==1.12.0"
    )
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--json", default=HERE.with_suffix(".json"), help="where results go")
    own = "for the script itself: what a child process trains"
    parser.add_argument("--worker", default="", choices=("", *KINDS), help=own)
    parser.add_argument("--folder", default="", help="... from which checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="... with which seed")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
    else:
        main(arguments)
