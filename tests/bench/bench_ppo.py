"""PPO side by side with TRL's: samples a second, peak memory, and reward after the same number of samples.

    python -m venv trl_env && trl_env/bin/pip install -r requirements.txt trl==1.12.0       TRL lives apart
    python tests/bench/bench_ppo.py --trl-python trl_env/bin/python [--updates 30] [--seeds 3]         speed and reward
    python tests/bench/bench_ppo.py --trl-python trl_env/bin/python --size large --updates 4           speed and memory

The same checkpoint in float32, LoRA (rank 8), prompts (64 tokens), answers (32 tokens), batch (64), PPO epochs (4, one
minibatch), learning rate, fixed weight of the KL and reward (how often one word occurs) on both sides; ours in NF4 is a row
of its own. `small` has 3 layers of width 128, `large` 57 M weights. Every run is a process of its own on one thread, and rounds
alternate between the sides (`large`: one round); times are medians over the updates. Results: bench_ppo.json beside this file.

Not the same, each side as it is built: TRL's value model is a second model trained in full, ours a head on the policy's states
(learning rate 1e-2 against TRL's 1e-3); ours clips the gradient, and values by 0.2 of scaled returns where TRL's are raw.
"""
import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))
WORD, WORDS = "red", "green blue old calm loud warm dark soft tall thin wide cold dry new odd".split()
RANK, PROMPT, ANSWER, EPOCHS, LR = 8, 64, 32, 4, 1e-3
KL, SPREAD = 0.05, 1.225           # weight of the KL against the raw reward; ours divides rewards by their first spread, so its KL too
SIZES = {"small": {"width": 128, "layers": 3, "batch": 64, "micro_batch": 16},            # speed and reward
         "large": {"width": 640, "layers": 14, "batch": 16, "micro_batch": 4}}            # memory: 57 M weights


def texts(seed: int, n: int, words: int, with_word: bool) -> list:
    import numpy as np
    rng, some = np.random.default_rng(seed), WORDS + [WORD] * with_word
    return [" ".join(rng.choice(some, words)) for _ in range(n)]


def make(folder: str):
    """Both checkpoints. The small one has seen a few answers, so that samples are words and the reward can be found."""
    import rl
    from transformers import AutoModelForCausalLM
    for size, shape in SIZES.items():
        samples = list(zip(texts(0, 400, PROMPT - 1, False), texts(1, 400, 2 * ANSWER, True)))
        rl.train_tiny(f"{folder}/{size}", [p for p, _ in samples], [("answers", samples, 30 if size == "small" else 3)], [],
                      batch=8, width=shape["width"], layers=shape["layers"])
    assert AutoModelForCausalLM.from_pretrained(f"{folder}/large").num_parameters() > 50e6


def lora():
    from peft import LoraConfig
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


class Watch:
    """Times of the reward's calls (one an update), seconds spent in generation, mean reward of every update."""

    def __init__(self):
        self.calls, self.generating, self.rewards = [], [], []

    def reward(self, value):
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


def ours(kind, path, prompts, watch, shape, updates, seed):
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    import rl
    torch.manual_seed(seed)
    if kind == "ours, NF4":
        model, tokenizer = rl.load(path, rank=RANK)
    else:
        base, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
        model = get_peft_model(base.requires_grad_(False), lora(), adapter_name="align")
    rl.add_policy(model)
    rl.generate = watch.timed(rl.generate)
    log = rl.ppo(model, tokenizer, prompts, lambda answers, rows: watch.reward(torch.tensor([float(t.count(WORD)) for t in answers])),
                 updates=updates, batch=shape["batch"], minibatch=shape["batch"], micro_batch=shape["micro_batch"], epochs=EPOCHS,
                 lr=LR, beta=KL / SPREAD, kl_target=0, kl_stop=float("inf"), no_eos_penalty=0.0, max_new=ANSWER, seed=seed)
    return sum(row["length"] for row in log) / len(log)


def trl(path, prompts, watch, shape, updates, seed):
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    rows = AutoConfig.from_pretrained(path).vocab_size                        # more than the tokenizer has: a multiple of 64
    counts = torch.tensor([float(tokenizer.decode([i]).count(WORD)) for i in range(rows)])

    class Backbone(torch.nn.Module):
        def forward(self, input_ids, **_):
            return type("Output", (), {"hidden_states": [counts[input_ids].cumsum(1)[..., None]]})

    class Count(torch.nn.Module):
        """TRL takes the reward at a row's last token: there the running count is that of the whole answer."""
        base_model_prefix = "backbone"

        def __init__(self):
            super().__init__()
            self.backbone = Backbone()

        def score(self, hidden):
            watch.reward(hidden[:, -1])
            return hidden

    load = lambda kind, **settings: kind.from_pretrained(path, dtype=torch.float32, **settings)
    ppo_trainer.batch_generation = watch.timed(ppo_trainer.batch_generation)
    with tempfile.TemporaryDirectory() as out:
        config = PPOConfig(
            output_dir=out, per_device_train_batch_size=shape["micro_batch"], num_mini_batches=1,
            gradient_accumulation_steps=shape["batch"] // shape["micro_batch"], num_ppo_epochs=EPOCHS, response_length=ANSWER,
            temperature=1.0, kl_coef=KL, total_episodes=updates * shape["batch"], learning_rate=LR, lr_scheduler_type="constant", stop_token="eos",
            bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no", num_sample_generations=0,
            local_rollout_forward_batch_size=shape["batch"], disable_tqdm=True, seed=seed)
        rows = [tokenizer(p + "\n")["input_ids"] for p in prompts]
        PPOTrainer(args=config, processing_class=tokenizer, model=load(AutoModelForCausalLM), ref_model=None, reward_model=Count(),
                   value_model=load(AutoModelForSequenceClassification, num_labels=1), peft_config=lora(),
                   train_dataset=Dataset.from_dict({"input_ids": rows}), eval_dataset=Dataset.from_dict({"input_ids": rows[:64]})).train()
    return None


def memory(which: str) -> float:
    """MB: VmRSS now, VmHWM at most since this process began. (The kernel's ru_maxrss counts the parent's too.)"""
    return int(re.search(rf"{which}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024


def worker(args):
    import numpy as np
    import torch
    import peft, transformers  # noqa: E401, F401
    if args.worker == "trl":
        import datasets, trl.experimental.ppo  # noqa: E401, F401
    else:
        import bitsandbytes, rl  # noqa: E401, F401
    torch.set_num_threads(1)
    before, shape, watch = memory("VmRSS"), SIZES[args.size], Watch()
    prompts = texts(2, 512, PROMPT - 1, False)
    settings = f"{args.folder}/{args.size}", prompts, watch, shape, args.updates, args.seed
    length = (globals()["trl"] if args.worker == "trl" else lambda *s: ours(args.worker, *s))(*settings)
    update, generation = (float(np.median(x)) for x in (np.diff(watch.calls), watch.generating[1:]))   # from one reward to the next
    print(json.dumps({"samples_per_s": shape["batch"] / update, "generation_s": generation, "update_s": update - generation,
                      "peak_mb": memory("VmHWM") - before, "rewards": watch.rewards,
                      "length": length}))


def main(args):
    import numpy as np
    import torch
    folder = tempfile.mkdtemp()
    make(folder)
    python = {"ours, float32": sys.executable, "ours, NF4": sys.executable, "trl": args.trl_python}

    def ask(kind, size, updates, seed=0):
        command = [python[kind], str(HERE), "--worker", kind, "--folder", folder, "--size", size, "--updates", str(updates), "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return json.loads([line for line in done.stdout.splitlines() if line.startswith("{\"samples")][-1])
    runs = {kind: {} for kind in python}
    for seed in range(args.seeds) if args.size == "small" else [0]:
        for kind in python:
            runs[kind][seed] = found = ask(kind, args.size, args.updates, seed)
            print(f"{args.size} {kind:14s} seed {seed}  {found['samples_per_s']:6.2f} samples/s  {found['peak_mb']:5.0f} MB  "
                  f"last reward {np.mean(found['rewards'][-3:]):.2f}", flush=True)
    middle = lambda kind, what: float(np.median([r[what] for r in runs[kind].values()]))
    table = {kind: {**{what: middle(kind, what) for what in ("samples_per_s", "generation_s", "update_s", "peak_mb")},
                    "last_rewards": [float(np.mean(r["rewards"][-3:])) for r in runs[kind].values()]} for kind in python}
    path = HERE.with_suffix(".json")
    result = {"command": " ".join(["python", "tests/bench/bench_ppo.py", *sys.argv[1:]]), "torch": torch.__version__, "cpus": os.cpu_count(),
              "threads": 1, "machine": platform.machine(), "table": table, "runs": runs}
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {args.size: result}, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default="", help="python of an environment with trl==1.12.0")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worker", default="", help="for the script itself: what a child process measures")
    parser.add_argument("--folder", default="")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    worker(arguments) if arguments.worker else main(arguments)
