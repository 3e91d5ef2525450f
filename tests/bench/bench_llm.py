"""What the LLM costs: generation beside plain loops of `generate`; memory and speed at the shapes
of real models.

    python tests/bench/bench_llm.py generation [--rounds 5]              CPU, minutes
    python tests/bench/bench_llm.py generation --llm Qwen3-0.6B --layers 8 --prompts 64
    python tests/bench/bench_llm.py shapes [--sizes Qwen3-0.6B]          one CUDA GPU, 20 GB of disk
    python tests/bench/bench_llm.py memory [--sizes Qwen3-0.6B,Qwen3-8B]  a CPU, minutes: simulated
    python tests/bench/bench_llm.py shapes --sizes tiny --device cpu --prompt 24 --answer 8
                                                                         seconds: does it run?

generation: tokens a second on the demo's prompts or, of a shape (random weights, bfloat16), on
random words of 50 to 500 tokens. Rounds alternate between ours and loops over fixed-size batches
in the order of the prompts, all with the same model, temperature and longest answer. Two kinds of
work: every prompt once, and every prompt six times, as proposals are sampled.

shapes: randomly initialised models with the shapes of Qwen2.5 or Qwen3, written to disk and loaded
in NF4 by rl.load; prompts of 512 and answers of 128 tokens; random weights end no answer early.
Tokens a second: of prompt and answer for align, of answers for generation and for a whole PPO
update.
Peak: torch.cuda.max_memory_reserved of each piece of work, the weights included; on a CPU the most
bytes of tensors that were alive at once, counted after every operation: what a card would hold too,
but for its allocator and libraries (the counting slows it: no speed). Beside it what rl.forecast
says.

memory: the same shapes with 2 and 4 layers, a micro-batch of such prompts, in bfloat16 as on a
card. Weights are real, all else are fake tensors: shapes without numbers, nothing is computed;
the bytes alive at once are counted after every operation. What follows for all layers (memory is
linear in them) stands beside what rl.forecast says. Attention is PyTorch's for CPUs, which like a
card's holds no scores. Adam's state and PPO's second adapter are added.

Results go to bench_llm.json beside this file, one entry a command.
"""

import argparse
import gc
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
import weakref
from multiprocessing import get_context

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np
import torch
import transformers as hf
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import curec
import data as D
import rl

# config.json of Qwen2.5 and Qwen3, whose heads are 128 wide: hidden, intermediate, layers, heads,
# key-value heads, vocabulary, tied
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512, True),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "Qwen3-tiny": (64, 128, 2, 4, 2, 512, True),
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 151_936, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 151_936, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 151_936, True),
    "Qwen3-8B": (4096, 12_288, 36, 32, 8, 151_936, False),
}
WORDS = "red green blue old calm loud warm dark soft tall thin wide cold dry new odd".split()
MAX_NEW = 24  # of the part generation


# -------------------------------------------------------------------------------------- generation
def generation(args) -> dict:
    torch.set_num_threads(args.threads)
    shop, rng = D.demo(0), np.random.default_rng(0)
    train, held_out = curec.practice_questions(shop, curec.window_cuts(shop, 2), 0)
    prompts = [question.prompt for question in train + held_out]
    prompts = [prompts[i] for i in rng.permutation(len(prompts))]
    if args.llm in SHAPES:
        prompts = [" ".join(rng.choice(WORDS, rng.integers(50, 501))) for _ in prompts]
    llm = open_llm(args, shop)
    six_times = [prompt for prompt in prompts[: args.prompts // 5] for _ in range(6)]
    works = {"every prompt once": prompts[: args.prompts], "every prompt six times": six_times}
    result = {}
    for work, asked in works.items():
        our_speed(llm, asked[:8])  # warm
        rounds = []
        for _ in range(args.rounds):
            speeds = {"ours": our_speed(llm, asked)}
            for size in args.batches:
                speeds[f"plain, {size} a batch"] = plain_speed(llm, asked, size)
            rounds.append(speeds)
        medians, ratios = {}, {}
        for name in rounds[0]:
            medians[name] = float(np.median([r[name] for r in rounds]))
            ratios[name] = float(np.median([r["ours"] / r[name] for r in rounds]))
        lengths = [len(rl.prompt_ids(llm[1], prompt)) for prompt in asked]
        result[work] = {
            "tokens_per_s": medians,
            "ours_over": ratios,
            "prompt_tokens": np.percentile(lengths, [0, 10, 50, 90, 100]).tolist(),
        }
    return result


def open_llm(args, shop) -> tuple:
    """The local model or the shape args.llm, or a tiny one trained for a few steps."""
    if args.llm in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            write_model(folder, config_of(args.llm, args.layers), "cpu")
            return rl.load(folder, compute=torch.bfloat16)
    if args.llm:
        return rl.load(args.llm)
    mix = D.Mixture(reason_share=1.0)
    samples = D.alignment_samples(shop, 20 * args.steps, np.random.default_rng(1), mix)
    texts = [D.item_text(item) for item in shop.items[1:]]
    lessons = [("all prompts", samples, args.steps)]
    with tempfile.TemporaryDirectory() as folder:
        rl.train_tiny(f"{folder}/tiny", texts, lessons, D.TAGS, rl.TinyConfig())
        return rl.load(f"{folder}/tiny")


def our_speed(llm, prompts: list) -> float:
    """Tokens a second of rl.generate."""
    start = time.perf_counter()
    _, answers = rl.generate(*llm, prompts, rl.Sampling(MAX_NEW))
    return sum(map(len, answers)) / (time.perf_counter() - start)


def plain_speed(llm, prompts: list, size: int) -> float:
    """The same of what one would write first: batches in the order of the prompts, and everything
    decoded after EOS is thrown away."""
    torch.manual_seed(0)
    model, tokenizer = llm
    start, tokens, eos = time.perf_counter(), 0, tokenizer.eos_token_id
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": MAX_NEW}
    ends = {"eos_token_id": [eos], "pad_token_id": tokenizer.pad_token_id}
    rl.causal_lm(model).generation_config = hf.GenerationConfig(**how, **ends)
    # of a slice that is not contiguous, PyTorch's CPU kernels copy the whole embedding a row
    output = model.get_output_embeddings()
    hook = output.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    for k in range(0, len(prompts), size):
        rows = [rl.prompt_ids(tokenizer, prompt) for prompt in prompts[k : k + size]]
        ids, mask = rl.pad_ids(rows, side="left")
        with torch.no_grad():
            made = model.generate(input_ids=ids, attention_mask=mask.long())
        for answer in made[:, ids.shape[1] :].tolist():
            tokens += answer.index(eos) + 1 if eos in answer else len(answer)
    hook.remove()
    return tokens / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------ shapes
def shapes(args) -> dict:
    result, rng = {}, np.random.default_rng(0)
    samples = []
    for _ in range(args.rows):
        # a prompt's line end and an answer's EOS are tokens too
        prompt, answer = rng.choice(WORDS, args.prompt - 1), rng.choice(WORDS, args.answer - 1)
        samples.append((" ".join(prompt), " ".join(answer)))
    for size in args.sizes.split(","):
        result[size] = shape(args, size, samples)
        print(size, json.dumps(result[size]), flush=True)
    return result


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that are alive, `now` and at their `peak`."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0

    def count(self, tensors) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                self.known[key] = storage.nbytes()
                self.now += self.known[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.known.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.count(x for x in tree_leaves(made) if isinstance(x, torch.Tensor))
        return made


def weights_of(model) -> list:
    """All that a loaded model holds: parameters, buffers, and the scales of its 4-bit weights."""
    found = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state:
            scales = [state.absmax, state.code, state.offset]
            scales += [state.state2.absmax, state.state2.code]
            found += [x for x in scales if isinstance(x, torch.Tensor)]
    return found


class Meter:
    """Tokens a second and peak memory of each piece of work."""

    def __init__(self, device: str):
        self.cuda, self.found = device.startswith("cuda"), {}

    def start(self, model=None) -> None:
        """model: what is loaded already."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live = LiveBytes()
            self.live.count(weights_of(model) if model else [])
            self.live.__enter__()
        self.begun = time.perf_counter()

    def stop(self, name: str, tokens: int = 0) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        else:
            self.live.__exit__(None, None, None)
        seconds, self.found[name] = time.perf_counter() - self.begun, {}
        if tokens:
            self.found[name]["tokens_per_s"] = tokens / seconds
        peak = torch.cuda.max_memory_reserved() if self.cuda else self.live.peak
        self.found[name]["peak_gb"] = peak / 1e9


def shape(args, size: str, samples: list) -> dict:
    """One model of the part shapes."""
    rows, micro_batch = args.rows, args.micro_batch
    prompts = [prompt for prompt, _ in samples]
    sampling = rl.Sampling(args.answer, budget=8192 * micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own: the memory that it takes is no longer there
        with get_context("spawn").Pool(1) as pool:
            pool.apply(write_model, (folder, config_of(size), args.device))
        compute = getattr(torch, args.dtype) if args.dtype else rl.default_dtype(args.device)
        length = args.prompt + args.answer
        budget = min(sampling.budget, rows * length)
        how = (min(rows, micro_batch), length, budget, compute.itemsize)
        told = rl.forecast(folder, *how, answer=args.answer)
        meter = Meter(args.device)
        meter.start()
        llm = rl.load(folder, args.device, checkpointing=True, compute=compute)
        meter.stop("load")
    if not meter.cuda:
        # what loading reads comes from the file, without an operation
        meter.found["load"]["peak_gb"] = sum(x.nbytes for x in weights_of(llm[0])) / 1e9
    rl.use(llm[0], "align", trainable=True)
    meter.start(llm[0])
    rl.supervise(*llm, samples, rl.SupervisedConfig(2, rows, micro_batch))
    meter.stop("align", 2 * rows * (args.prompt + args.answer))
    rl.add_policy(llm[0])
    rl.use(llm[0], "policy")
    meter.start(llm[0])
    rl.generate(*llm, prompts, sampling)
    meter.stop("generation", rows * args.answer)
    sizes = {"batch": rows, "minibatch": rows // 2, "micro_batch": micro_batch}
    config = rl.PPOConfig(1, **sizes, epochs=1, lr=1e-5, sampling=sampling)
    meter.start(llm[0])
    rl.ppo(*llm, prompts, by_length, config)
    meter.stop("one PPO update", rows * args.answer)
    works = {"load": "load", "align": "alignment", "generation": "generation"}
    for work, stage in (works | {"one PPO update": "ppo"}).items():
        meter.found[work]["forecast_gb"] = told[f"{stage}_gb"]
    return meter.found


def by_length(texts, rows) -> tuple:
    """A reward."""
    return torch.tensor([float(len(text)) for text in texts]), {}


def config_of(size: str, layers: int = 0):
    """The configuration of a shape; layers: only so many."""
    hidden, intermediate, all_layers, heads, kv_heads, vocabulary, tied = SHAPES[size]
    qwen3 = size.startswith("Qwen3")
    return (hf.Qwen3Config if qwen3 else hf.Qwen2Config)(
        **({"head_dim": 128} if qwen3 else {}),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )


def write_model(folder: str, config, device: str) -> None:
    """A random model and a small tokenizer, in Hugging Face format on disk."""
    bpe, special = ByteLevelBPETokenizer(), ["<pad>", "<eos>"]
    text = " ".join(WORDS * 9)
    bpe.train_from_iterator([text] * 9, 400, special_tokens=special, show_progress=False)
    raw = Tokenizer.from_str(bpe.to_str())
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = hf.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


# ---------------------------------------------------------------------------------------- memory
def memory(args) -> dict:
    """{shape: {stage: {"simulated_gb", "forecast_gb"}}}, of all layers."""
    result = {}
    for size in args.sizes.split(","):
        few, some = (simulated(args, size, layers) for layers in (2, 4))
        config = config_of(size)
        of_all = {}
        for piece, two in few.items():
            of_all[piece] = two + (some[piece] - two) / 2 * (config.num_hidden_layers - 2)
        adapter = of_all["adapter"]
        # Adam's two means, from its first step on
        training = of_all["training"] + 2 * adapter
        generation = max(of_all["reading"], of_all["writing"])
        stages = {"load": of_all["load"], "alignment": training, "generation": generation}
        stages["ppo"] = max(training, generation + 2 * adapter) + adapter
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            length = args.prompt + args.answer
            budget = generated_at_once(args) * length
            told = rl.forecast(folder, args.micro_batch, length, budget, 2, answer=args.answer)
        result[size] = {}
        for stage, simulated_bytes in stages.items():
            row = {"simulated_gb": simulated_bytes / 1e9, "forecast_gb": told[f"{stage}_gb"]}
            result[size][stage] = row
        print(size, json.dumps(result[size]), flush=True)
    return result


def generated_at_once(args) -> int:
    """Answers of a batch of generation, see curec.sampling."""
    return max(1, 8192 * args.micro_batch // (args.prompt + args.answer))


def simulated(args, size: str, layers: int) -> dict:
    """{piece of work: most bytes alive at once} of one model, and the bytes of its adapter."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, config_of(size, layers), "cpu")
        model, _ = rl.load(folder, "cpu", checkpointing=True, compute=torch.bfloat16)
    rl.use(model, "align", trainable=True)
    adapter = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    pieces = {"adapter": adapter, "load": sum(x.nbytes for x in weights_of(model))}
    pieces["training"] = alive(model, train, args)
    rl.use(model, "align")
    pieces["reading"] = alive(model, read, args)
    pieces["writing"] = alive(model, write, args)
    return pieces


def alive(model, work, args) -> int:
    """The most bytes alive at once, the model's weights included, while work(fake, live, model,
    args) runs; fake: what makes a tensor a fake one, which has no number to compute with."""
    # a real weight that is met becomes the fake one that was made, and counted, of it before
    mode, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    weights = [mode.from_tensor(weight) for weight in weights_of(model)]
    live.count(weights)
    with mode, live:
        work(mode.from_tensor, live, model, args)
    # checkpoints of a pass hold each other
    gc.collect()
    return live.peak


def train(fake, live, model, args) -> None:
    """Two passes with gradients: those of a micro-batch are kept while the next one runs."""
    rows = args.micro_batch
    ids = torch.randint(5, 300, (rows, args.prompt + args.answer))
    starts = torch.full((rows,), args.prompt)
    mask = torch.ones(rows, args.answer, dtype=torch.bool)
    batch = rl.MicroBatch(*map(fake, (torch.arange(rows), ids, starts, mask)))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    kept = []
    for _ in range(2):
        logp, _ = rl.logps_and_states(model, batch)
        kept.append(torch.autograd.grad(-logp.sum(), weights))


@torch.no_grad()
def read(fake, live, model, args):
    """The keys and values of prompts."""
    ids = fake(torch.randint(5, 300, (generated_at_once(args), args.prompt)))
    how = {"use_cache": True, "logits_to_keep": 1}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **how).past_key_values


@torch.no_grad()
def write(fake, live, model, args) -> None:
    """Those of answers too, all tokens at once; what reading took before does not count."""
    known = read(fake, live, model, args)
    live.peak = live.now
    ids = fake(torch.randint(5, 300, (generated_at_once(args), args.answer)))
    mask = torch.ones_like(torch.cat([ids[:, :1]] * (args.prompt + args.answer), 1))
    how = {"use_cache": True, "logits_to_keep": 1, "past_key_values": known}
    model(input_ids=ids, attention_mask=mask, **how)


# ------------------------------------------------------------------------------------ command line
def main(argv=None) -> dict:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("what", choices=("generation", "shapes", "memory"))
    parser.add_argument("--llm", default="", help="generation: a model or a shape; default: tiny")
    parser.add_argument("--layers", type=int, default=0, help="generation: of a shape; 0: all")
    parser.add_argument(
        "--steps", type=int, default=300, help="generation: of the tiny one's training"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=800, help="generation: of every round")
    parser.add_argument("--threads", type=int, default=1)
    sizes, of = [8, 16, 32, 64, 128, 256], "generation: batches of the plain loops"
    parser.add_argument("--batches", type=int, nargs="+", default=sizes, help=of)
    parser.add_argument("--sizes", default="Qwen3-0.6B,Qwen3-1.7B,Qwen3-4B,Qwen3-8B")
    parser.add_argument("--device", default="cuda", help="of shapes")
    parser.add_argument("--dtype", default="", help="of shapes; default: the device's")
    parser.add_argument("--prompt", type=int, default=512, help="shapes, memory: tokens")
    parser.add_argument("--answer", type=int, default=128, help="shapes, memory: tokens")
    parser.add_argument("--rows", type=int, default=32, help="shapes: prompts a piece of work")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--json", default=HERE.with_suffix(".json"), help="where results go")
    args = parser.parse_args(argv)
    result = {"generation": generation, "shapes": shapes, "memory": memory}[args.what](args)
    device = f"CPU, {platform.machine()}"
    if args.what == "shapes" and args.device.startswith("cuda"):
        device = torch.cuda.get_device_name(args.device)
    entry = {"device": device, "cpus": os.cpu_count(), "torch": torch.__version__}
    entry["command"] = " ".join(["python tests/bench/bench_llm.py", *(argv or sys.argv[1:])])
    entry["result"] = result
    path = pathlib.Path(args.json)
    known = json.loads(path.read_text()) if path.exists() else {}
    name = f"{args.what} {args.llm}".strip()
    path.write_text(json.dumps(known | {name: entry}, indent=1) + "\n")
    print(json.dumps(entry, indent=1))
    return result


if __name__ == "__main__":
    main()
