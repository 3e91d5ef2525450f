"""What the LLM costs: generation beside plain loops of `generate`, and memory and speed at the shapes of real models.

    python tests/bench/bench_llm.py generation [--rounds 5]                CPU, minutes: tokens a second on the demo's prompts
    python tests/bench/bench_llm.py shapes [--sizes 0.5B,1.5B,7B]          one CUDA GPU, 20 GB of free disk for 7B
    python tests/bench/bench_llm.py shapes --sizes tiny --device cpu --prompt 24 --answer 8          seconds: does it run?

generation: rounds alternate between ours and loops over fixed-size batches in the order of the prompts, all with the same
model, temperature and longest answer. Two kinds of work: every prompt once, and every prompt six times (a correction's proposals).
shapes: randomly initialised models with the shapes of Qwen2.5, written to disk and loaded in NF4 by rl.load, prompts of 512
and answers of 128 tokens; random weights end no answer early. Tokens a second: prompt and answer for align, answer tokens for
generation and for a whole PPO update (sample, two looks back, one pass of updates). Peak: torch.cuda.max_memory_reserved of each piece of work,
the weights included. Results: bench_llm.json beside this file, one entry a command.
"""
import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data as D  # noqa: E402
import reward  # noqa: E402
import rl  # noqa: E402

SHAPES = {     # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings: Qwen2.5's config.json
    "tiny": (64, 128, 2, 4, 2, 512, True), "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True), "7B": (3584, 18_944, 28, 28, 4, 152_064, False)}
WORDS = "red green blue old calm loud warm dark soft tall thin wide cold dry new odd".split()


def generation(args) -> dict:
    torch.set_num_threads(args.threads)
    shop = D.demo(0)
    who, cuts = D.choosers(shop), reward.window_cuts(shop, 2)
    prompts = reward.practice(shop, who, cuts, 0)[1]
    some = [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]
    with tempfile.TemporaryDirectory() as folder:
        path = args.llm or f"{folder}/tiny"
        if not args.llm:
            samples = D.alignment_samples(shop, 6000, np.random.default_rng(1), reason_share=1.0)
            rl.train_tiny(path, [D.item_text(item) for item in shop.items[1:]], [("all prompts", samples, args.steps)], D.TAGS)
        model, tokenizer = rl.load(path)

    def plain(asked, size):
        """What one would write first: batches in order, everything decoded after EOS is thrown away too."""
        torch.manual_seed(0)
        start, tokens, eos = time.perf_counter(), 0, tokenizer.eos_token_id
        for k in range(0, len(asked), size):
            ids, mask = rl.padded([rl.prompt_ids(tokenizer, p) for p in asked[k: k + size]], tokenizer.pad_token_id, left=True)
            with torch.no_grad():
                made = model.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=24)[:, ids.shape[1]:].tolist()
            tokens += sum(a.index(eos) + 1 if eos in a else len(a) for a in made)
        return tokens / (time.perf_counter() - start)

    def ours(asked):
        start = time.perf_counter()
        _, answers = rl.generate(model, tokenizer, asked, max_new=24)
        return sum(map(len, answers)) / (time.perf_counter() - start)
    result = {}
    for work, asked in (("every prompt once", some[:800]), ("every prompt six times", [p for p in some[:150] for _ in range(6)])):
        ours(asked[:8])                                                  # sets the sampling that the plain loop shares
        rounds = [{"ours": ours(asked)} | {f"plain, {size} a batch": plain(asked, size) for size in args.batches} for _ in range(args.rounds)]
        result[work] = {"tokens_per_s": {k: float(np.median([r[k] for r in rounds])) for k in rounds[0]},
                        "ours_over": {k: float(np.median([r["ours"] / r[k] for r in rounds])) for k in rounds[0] if k != "ours"},
                        "prompt_tokens": np.percentile([len(rl.prompt_ids(tokenizer, p)) for p in asked], [0, 10, 50, 90, 100]).tolist()}
    return result


def checkpoint(folder: str, size: str, device: str):
    """A random model of that shape and a small tokenizer, in Hugging Face format on disk."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(WORDS * 9)] * 9, vocab_size=400, special_tokens=["<pad>", "<eos>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    D, I, layers, heads, kv, V, tied = SHAPES[size]
    config = Qwen2Config(hidden_size=D, intermediate_size=I, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
                         vocab_size=V, tie_word_embeddings=tied, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def shapes(args) -> dict:
    cuda, result, rng, rows = args.device.startswith("cuda"), {}, np.random.default_rng(0), args.rows
    text = lambda n: " ".join(rng.choice(WORDS, n))
    prompts = [text(args.prompt - 1) for _ in range(rows)]                         # and the line's end
    samples, budget = [(p, text(args.answer - 1)) for p in prompts], 8192 * args.micro_batch

    def measured(found, name, tokens, work):
        if cuda:
            torch.cuda.synchronize(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        out = work()
        torch.cuda.synchronize() if cuda else None
        found[name] = {"tokens_per_s": tokens / (time.perf_counter() - start)} if tokens else {}
        if cuda:
            found[name]["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
        return out
    for size in args.sizes.split(","):
        result[size] = found = {}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint(folder, size, args.device)
            model, tokenizer = measured(found, "load", 0, lambda: rl.load(folder, args.device, checkpointing=cuda))
        rl.use(model, "align", trainable=True)
        measured(found, "align", 2 * rows * (args.prompt + args.answer), lambda: rl.supervise(
            model, tokenizer, samples, steps=2, batch=rows, micro_batch=args.micro_batch))
        rl.add_policy(model)
        rl.use(model, "policy")
        measured(found, "generation", rows * args.answer, lambda: rl.generate(model, tokenizer, prompts, max_new=args.answer, budget=budget))
        measured(found, "one PPO update", rows * args.answer, lambda: rl.ppo(
            model, tokenizer, prompts, lambda answers, _: torch.tensor([float(len(a)) for a in answers]), updates=1, batch=rows,
            minibatch=rows // 2, micro_batch=args.micro_batch, epochs=1, max_new=args.answer, lr=1e-5, budget=budget))
        print(size, json.dumps(found), flush=True)
        del model
    return result


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("generation", "shapes"))
    parser.add_argument("--llm", default="", help="generation: a local model; default: a tiny one, trained for --steps steps")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="generation: sizes of the plain loops")
    parser.add_argument("--sizes", default="0.5B,1.5B,7B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--rows", type=int, default=32, help="shapes: prompts a piece of work")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--json", default=str(HERE.with_suffix(".json")))
    args = parser.parse_args(argv)
    result = {"generation": generation, "shapes": shapes}[args.what](args)
    device = torch.cuda.get_device_name() if args.what == "shapes" and args.device.startswith("cuda") else f"CPU, {platform.machine()}"
    entry = {"device": device, "cpus": os.cpu_count(), "torch": torch.__version__,
             "command": " ".join(["python tests/bench/bench_llm.py", *(argv or sys.argv[1:])]), "result": result}
    path = pathlib.Path(args.json)
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {args.what: entry}, indent=1) + "\n")
    print(json.dumps(entry, indent=1))
    return result


if __name__ == "__main__":
    main()
