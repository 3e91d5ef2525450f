"""The LLM: 4-bit QLoRA loading, generation, supervised alignment, and a hand-written PPO.

    score_t = [t is last] s - beta (logp_t - ref_logp_t)       s = reward / its first spread
    A_t     = sum_k lambda^k (score_{t+k} + V_{t+k+1} - V_{t+k})  GAE, gamma = 1, V = 0 at the end
    ratio_t = exp(logp_t - old_logp_t)
    L       = mean_t max(-A_t ratio_t, -A_t clip(ratio_t)) + c_v (clipped value loss)

One base model in memory, with named LoRA adapters: `align` (frozen after the alignment: PPO's
reference), `policy`, and `knowledge` of a relative. Padding comes last, where a causal model never
sees it; only generation pads on the left:

    ids    [ p p p r r r eos pad ]      answer tokens at `starts`, `starts` + 1, ...; the hidden
                   3 = starts           state before each one predicts it

Left out: vLLM, several GPUs, a value model of its own, reward-model training (see reward.py).
Source: "The N Implementation Details of RLHF with PPO" (arXiv 2403.17031).
"""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import transformers as hf
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
from torch.utils.checkpoint import checkpoint as checkpoint_part
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

# no second progress bar, no warning without a remedy
hf.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


# times the loss in float16, whose small gradients would be rounded to 0
LOSS_SCALE = 1024.0
# logits in float32 that are in memory at once: 32 MB
MAX_LOGITS = 1 << 23


# ----------------------------------------------------------------- files that are whole at any time
def write_atomically(path, value):
    """Writes a text, or what torch.save takes; the old file or the new one is always whole."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as file:
        if isinstance(value, str):
            file.write(value.encode())
        else:
            torch.save(value, file)
    os.replace(part, path)


def read_state(path):
    """What torch.save wrote at path; None if the file is missing or, said in a line, damaged."""
    if not os.path.exists(path):
        return None
    try:
        with zipfile.ZipFile(path) as file:
            # torch itself compares no checksum
            if file.testzip() is None:
                return torch.load(path, "cpu", weights_only=True)
    # it may be whole, and cannot be read now
    except (OSError, MemoryError):
        raise
    # a damaged file raises whatever its parser does, one with code in it UnpicklingError
    except Exception:
        pass
    print(f"{path} is damaged: this stage starts again")
    return None


LLM_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def is_whole(folder, names=LLM_FILES):
    """Are these files there and readable, to a cheap look? Safetensors know their own length."""
    try:
        for name in names:
            if name.endswith(".json"):
                with open(f"{folder}/{name}", encoding="utf-8") as file:
                    json.load(file)
            else:
                with safetensors.safe_open(f"{folder}/{name}", "pt"):
                    pass
    except (OSError, ValueError, safetensors.SafetensorError):
        return False
    return True


class Checkpoint:
    """What an interrupted loop goes on from: `state`, saved last. Without a path always None."""

    def __init__(self, path=""):
        self.path = path
        self.state = read_state(path)

    def save(self, state):
        if self.path:
            write_atomically(self.path, state)


# -------------------------------------------------------------------- loading, modes, adapters
def load(name, device="cpu", rank=16, checkpointing=False, compute=None, seed=0):
    """Any Hugging Face causal LM in NF4, the rest of it in dtype compute, with a new LoRA adapter
    `align`: (PeftModel, tokenizer). checkpointing: gradient checkpointing, for small GPUs."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    compute = compute or default_dtype(device)
    check_layers(name)
    # load_in_4bit is no longer a model argument, and this config's defaults are still fp4, single
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = hf.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=compute)
    how = {"quantization_config": nf4, "dtype": compute, "device_map": {"": device}}
    # nothing of a hub's that could run: no code, no pickled weights
    how |= {"trust_remote_code": False, "use_safetensors": True}
    try:
        # AutoTokenizer would split text by the rules of the model's type; the tiny LLM has its own
        kind = get_tokenizer_config(name).get("tokenizer_class")
        tokenizers = hf.PreTrainedTokenizerFast if kind == "TokenizersBackend" else hf.AutoTokenizer
        tokenizer = tokenizers.from_pretrained(name, trust_remote_code=False)
        prompt = prompt_ids(tokenizer, "a")
        base = hf.AutoModelForCausalLM.from_pretrained(name, **how)
    # a damaged file raises whatever its parser does
    except Exception as e:
        raise OSError(
            f"the LLM '{name}' could not be loaded: {e}\nCheck name and network: the same command "
            "takes an interrupted download up again, a gated model needs `hf auth login`, a "
            "damaged file must be deleted. Or give --llm PATH, or --llm tiny."
        ) from e
    # every dropout 0: sampling, reference and update must be the same function
    for module in base.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in key or key == "p"):
                setattr(module, key, 0.0)
    torch.manual_seed(seed)
    # prepare_model_for_kbit_training would turn embeddings and head into float32. LoRA weights are
    # float32: at a learning rate of 1e-5 most steps would be lost in the rounding of bfloat16
    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora), adapter_name="align")
    if checkpointing:
        base.activation_checkpointing_enable()
    # evaluation mode for good. But on some CPUs a 4-bit layer in evaluation mode repacks its
    # weight, for good, for a kernel without autograd: LoRA gradients are silently wrong by 90 %
    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True
    # padding is carried in masks, so pad may equal eos
    size = len(base.get_input_embeddings().weight)
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token
    # a chat model ends its turn with a token of its own
    listed = base.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    base.generation_config.eos_token_id = list({tokenizer.eos_token_id, *listed} - {None})
    found = flaw(model, tokenizer, prompt)
    if found:
        raise OSError(f"the LLM '{name}' {found}; choose another --llm")
    return model, tokenizer


def default_dtype(device):
    """bfloat16 on CUDA cards that compute it in hardware, from Ampere on (is_bf16_supported says
    yes to emulation too, which is slow), float16 on older ones, float32 on a CPU."""
    if not str(device).startswith("cuda"):
        return torch.float32
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if ampere else torch.float16


def check_layers(name):
    """Refuses an LLM with layers of linear attention, before anything of it is downloaded."""
    try:
        config = hf.AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    # whatever is wrong with it, the loading itself says in full
    except Exception:
        return
    if "linear_attention" in (getattr(config, "layer_types", None) or ()):
        raise OSError(
            f"the LLM '{name}' has layers of linear attention, which 4-bit loading breaks; choose "
            "an --llm with full attention, such as Qwen/Qwen3-1.7B"
        )


@torch.no_grad()
def flaw(model, tokenizer, prompt):
    """Why an LLM is of no use although it could be loaded; None of a sound one. prompt: ids."""
    # Granite, Cohere, Gemma 2, Falcon-H1
    for key in ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier"):
        if getattr(model.config, key, None) not in (None, 1):
            why = "PPO would train another distribution than it samples"
            return f"changes its logits after the head ({key}): {why}"
    if tokenizer.eos_token is None:
        return "has a tokenizer without an end token"
    # no text becomes a special token (Gemma 3's for images has no embedding), but a template may
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = set(tokenizer.get_vocab().values()) - special
    largest = max(ids.union(prompt, [tokenizer.eos_token_id]))
    size = len(model.get_input_embeddings().weight)
    if largest >= size:
        return f"has {size:,} token embeddings, but its tokenizer gives ids up to {largest:,}"
    logits = model(input_ids=torch.tensor([prompt], device=model.device)).logits
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    if not all(x.isfinite().all() for x in [logits, *weights]):
        advice = " in float16: give --dtype float32" if logits.dtype == torch.float16 else ""
        return "has weights or logits that are NaN or infinite" + advice
    return None


def check_context(model, tokenizer, prompts, max_new):
    """OSError where a prompt and an answer of max_new tokens are longer than the LLM's context."""
    llm = causal_lm(model)
    # models without the figure have no limit
    context = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
    needed = max(len(prompt_ids(tokenizer, prompt)) for prompt in prompts) + max_new
    if context and needed > context:
        raise OSError(
            f"the LLM '{llm.name_or_path}' has a context of {context:,} tokens, the longest prompt "
            f"with its answer needs {needed:,}; choose another --llm or a smaller --max-new"
        )


def causal_lm(model):
    """The causal LM within its adapters, or without any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def end_tokens(model):
    """The ids that end an answer; `load` has collected them."""
    return causal_lm(model).generation_config.eos_token_id


def use(model, adapter, trainable=False):
    """Makes one adapter active; its LoRA weights take gradients if trainable, nothing else ever."""
    model.set_adapter(adapter, inference_mode=not trainable)
    for module in model.modules():
        # they recompute in training mode alone, where generation would lose its cache
        if isinstance(module, GradientCheckpointingLayer):
            module.training = trainable


def add_policy(model):
    """The adapter `policy`, a copy of `align`: PPO starts at its own reference, which is the
    aligned model and not the base with its adapters off."""
    model.add_adapter("policy", model.peft_config["align"])
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if ".policy." in name:
            weight.data.copy_(weights[name.replace(".policy.", ".align.")])


def save_adapter(model, folder, name):
    """Writes folder/name, which plain peft loads; atomic, without peft's empty model card."""
    part = f"{folder}/state/adapter"
    # the default "auto" would ask the hub whether the vocabulary was changed
    model.save_pretrained(part, selected_adapters=[name], save_embedding_layers=False)
    shutil.rmtree(f"{folder}/{name}", ignore_errors=True)
    os.replace(f"{part}/{name}", f"{folder}/{name}")


def restore_adapter(model, folder, name):
    """Loads folder/name into the adapter of that name. (peft's load_adapter ends in model.eval(),
    which would repack the 4-bit weights: see load.)"""
    from peft import set_peft_model_state_dict

    weights = safetensors.torch.load_file(f"{folder}/{name}/adapter_model.safetensors")
    set_peft_model_state_dict(model, weights, name)


# --------------------------------------------------------------- tokens, batches, log-probabilities
class MicroBatch(NamedTuple):
    """Prompts with their answers, as drawn above."""

    rows: torch.Tensor  # (b,) their numbers
    ids: torch.Tensor  # (b, T)
    starts: torch.Tensor  # (b,)
    mask: torch.Tensor  # (b, R) answer tokens, True = real


def prompt_ids(tokenizer, prompt, start=""):
    """Token ids of a prompt, in the tokenizer's chat template where it has one, and of the words
    that the answer is to start with. A title is anybody's text: a control token in it (the end of a
    turn, say) becomes a space."""
    begun = text_ids(tokenizer, start) if start else []
    control = []
    for token in tokenizer.added_tokens_decoder.values():
        # words, blanks and single letters are harmless
        if token.special or not re.fullmatch(r"\w+|\s+|.", token.content):
            control.append(token.content)
    # again: what is left may join into another one
    while any(text in prompt for text in control):
        for text in control:
            prompt = prompt.replace(text, " ")
    if not tokenizer.chat_template:
        return tokenizer(prompt + "\n")["input_ids"] + begun
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # the template of a model that thinks opens its thought, or adds an empty one: ours comes here
    text = re.sub(r"<think>\s*(</think>\s*)?$", "", text)
    return tokenizer(text, add_special_tokens=False)["input_ids"] + begun


def text_ids(tokenizer, text):
    """Token ids of words. None is special: "<eos>" in a title is letters and ends nothing."""
    return tokenizer(" " + text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def answer_ids(tokenizer, answer):
    """Token ids of an answer, EOS after each of its lines: generation stops at the first."""
    ids = []
    for line in answer.split("\n"):
        ids += text_ids(tokenizer, line) + [tokenizer.eos_token_id]
    return ids


def draw(n, batch, times, seed):
    """Row numbers below n, (times, batch): each comes once before any comes again."""
    rng = np.random.default_rng(seed)
    rounds = -(-times * batch // n)
    rows = np.concatenate([rng.permutation(n) for _ in range(rounds)])
    return rows[: times * batch].reshape(times, batch)


def by_length(lengths, budget):
    """Index lists of similar length (little padding), of at most `budget` padded tokens each."""
    groups = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if not groups or lengths[i] * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def pad_ids(rows, device="cpu", side="right"):
    """Lists of token ids -> ids (B, T), padded with 0 at that side; mask (B, T)."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = nn.utils.rnn.pad_sequence(ids, True, -1, side).to(device)
    return ids.clamp(min=0), ids >= 0


def micro_batches(rows, prompts, answers, device, size):
    """These rows of prompts and answers (token ids), by length, at most `size` a micro-batch."""
    rows = sorted(rows, key=lambda i: len(prompts[i]) + len(answers[i]))
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids, _ = pad_ids([prompts[i] + answers[i] for i in part], device)
        starts = torch.tensor([len(prompts[i]) for i in part], device=device)
        _, mask = pad_ids([answers[i] for i in part], device)
        batches.append(MicroBatch(torch.tensor(part, device=device), ids, starts, mask))
    return batches


def halves(batch):
    """A micro-batch as two, of half its rows each; of one row itself."""
    chunks = zip(*(x.chunk(2) for x in batch), strict=True)
    return [MicroBatch(*chunk) for chunk in chunks]


def accumulate_gradients(model, weights, batches, loss_of):
    """Gradients of the sum of the losses of micro-batches. loss_of: model, micro-batch, number of
    answer tokens of all -> (its share of the loss, what to keep of it). Where memory runs out the
    step starts again with halves, which give the same gradients: (what was kept, the micro-batches
    that fitted)."""
    tokens = sum(batch.mask.sum() for batch in batches)
    scale = LOSS_SCALE if model.dtype == torch.float16 else 1.0
    while True:
        for weight in weights:
            weight.grad = None
        kept = []
        try:
            for batch in batches:
                loss, stats = loss_of(model, batch, tokens)
                (loss * scale).backward()
                kept.append(stats)
            break
        except torch.OutOfMemoryError:
            if max(len(batch.rows) for batch in batches) == 1:
                raise
        # what the failed pass holds would stay in memory: its loss, and within the except its
        # traceback
        loss = None
        batches = [half for batch in batches for half in halves(batch)]
        rows = max(len(batch.rows) for batch in batches)
        note_halving(model, "rows", rows, "micro-batches")
    for weight in weights:
        if weight.grad is not None:
            weight.grad /= scale
    return kept, batches


def note_halving(model, limit, value, what):
    """Says once that memory ran out, and keeps with the model the limit that later work starts at
    ("rows" of a micro-batch, "budget" of generation), and a note for the report."""
    torch.cuda.empty_cache()
    smaller = f"{what} of {value}"
    if not memory_notes(model):
        print(f"note: memory ran out; going on with {smaller}")
    model.memory_notes = [f"memory ran out: at last {smaller} (--micro-batch starts smaller)"]
    model.memory_limits = getattr(model, "memory_limits", {}) | {limit: value}


def within_limit(model, limit, value):
    """A size that is asked for, or the smaller one that note_halving has kept."""
    return min(value, getattr(model, "memory_limits", {}).get(limit, value))


def memory_notes(model):
    """What note_halving keeps; empty where memory was enough."""
    return getattr(model, "memory_notes", [])


def logps_and_states(model, batch: MicroBatch, temperature=1.0):
    """Log-probabilities (b, R) of the answer tokens, and the hidden states (b, R, D) that predict
    them; those of padding mean nothing. The one function for rollout, reference and update, at the
    temperature that the answers were sampled at: else the first ratio would not be 1."""
    llm = causal_lm(model)
    offsets = torch.arange(batch.mask.shape[1], device=batch.ids.device)
    positions = (batch.starts[:, None] + offsets).clamp(max=batch.ids.shape[1] - 1)[..., None]
    states = llm.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    # the head sees the states of answers alone, never those of prompts
    states = states.take_along_dim(positions - 1, 1)
    chosen = batch.ids[..., None].gather(1, positions)
    head = llm.get_output_embeddings()
    return token_logps(head, states, chosen, temperature), states


def token_logps(head, states, chosen, temperature=1.0):
    """Log-probabilities (b, R) of the tokens chosen (b, R, 1) after these states (b, R, D). The
    logits of a vocabulary of 151,936 are most of a pass's memory: never more than MAX_LOGITS of
    them are there at once, and backward computes them again, part by part."""

    def part_logps(states, chosen):
        # logits keep the precision of the LLM; the sum over the vocabulary needs float32
        logits = head(states).float() / temperature  # (rows, V)
        return logits.gather(-1, chosen).squeeze(-1) - logits.logsumexp(-1)

    rows = max(1, MAX_LOGITS // len(head.weight))
    parts = zip(states.flatten(0, 1).split(rows), chosen.flatten(0, 1).split(rows), strict=True)
    if chosen[..., 0].numel() <= rows:
        logps = [part_logps(*part) for part in parts]
    else:
        logps = [checkpoint_part(part_logps, *part, use_reentrant=False) for part in parts]
    return torch.cat(logps).view(chosen.shape[:2])


# -------------------------------------------------------------------------------------- generation
@dataclass(frozen=True)
class Sampling:
    max_new: int = 48  # longest answer in tokens
    temperature: float = 1.0
    budget: int = 32_768  # padded tokens of a batch
    seed: int = 0
    start: str = ""  # words that every answer is made to start with


def generate(model, tokenizer, prompts, sampling=Sampling(), name=""):
    """Samples one answer a prompt with the active adapter: (texts, lists of the sampled ids). A
    list ends with an end token unless max_new cut it off. name: of the progress bar."""
    torch.manual_seed(sampling.seed)
    how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    how["max_new_tokens"] = sampling.max_new
    rows = [prompt_ids(tokenizer, prompt, sampling.start) for prompt in prompts]
    ids = [one for (one,) in decode(model, tokenizer, rows, how, sampling.budget, name)]
    if name:
        print(f"  {name}: {len(ids):,} answers")
    # for the reward; the policy trains on the sampled ids: to tokenise a text may give others
    ends = end_tokens(model)
    texts = tokenizer.batch_decode([one[:-1] if one[-1] in ends else one for one in ids])
    return [text.strip() for text in texts], ids


@torch.no_grad()
def decode(model, tokenizer, rows, how, budget, name="", trie=None):
    """The answers to each prompt, lists of ids up to an end token. rows: token ids of prompts. how:
    of the GenerationConfig. trie: ids that may follow each list of ids."""
    ends = end_tokens(model)
    # replaced as a whole: a checkpoint's own would fill in what is unset (repetition_penalty,
    # top_k = 50), and answers would come from another distribution than PPO trains
    config = hf.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, **how)
    causal_lm(model).generation_config = config
    beams = config.num_beams or 1
    budget = within_limit(model, "budget", budget)
    groups = by_length([beams * (len(row) + config.max_new_tokens) for row in rows], budget)
    out = [[]] * len(rows)
    bar = tqdm(total=len(rows), desc=name, leave=False, disable=None if name else True)
    while groups:
        group = groups[0]
        try:
            made = decode_group(model, [rows[i] for i in group], beams, trie)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
        else:
            for i, answers in zip(groups.pop(0), made, strict=True):
                # nothing after an end is real
                out[i] = [up_to_end(answer, ends) for answer in answers]
            bar.update(len(group))
            continue
        # after the except clause, which would keep what did not fit
        groups = [half for group in groups for half in (group[::2], group[1::2]) if half]
        # of the tokens that did not fit, which may be fewer than were allowed
        longest = beams * (max(len(rows[i]) for i in group) + config.max_new_tokens)
        budget = min(budget, len(group) * longest) // 2
        note_halving(model, "budget", budget, "generation in batches of tokens")
    bar.close()
    return out


def decode_group(model, rows, beams, trie):
    """Answers to some prompts (lists of ids) in one batch, lists of ids (len(rows), beams, R)."""
    ids, mask = pad_ids(rows, model.device, "left")
    prompt_length = ids.shape[1]

    def allowed(_, seen):
        """A beam that has left the trie has probability 0, but has to go on: to EOS."""
        return list(trie.get(tuple(seen[prompt_length:].tolist()), end_tokens(model)))

    made = model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        past_key_values=prompt_cache(model, ids, mask, beams),
        prefix_allowed_tokens_fn=allowed if trie else None,
    )
    return made[:, prompt_length:].view(len(rows), beams, -1).tolist()


def up_to_end(ids, ends):
    """The ids up to their first end token."""
    for k, token in enumerate(ids):
        if token in ends:
            return ids[: k + 1]
    return ids


def prompt_cache(model, ids, mask, copies=1):
    """Keys and values of left-padded prompts (B, P) but for their last tokens, `copies` of each;
    equal rows are computed once. None of a model without keys: generate then reads every row."""
    layers = hf.DynamicCache(config=causal_lm(model).config).layers
    if not all(hasattr(layer, "batch_select_indices") for layer in layers):
        return None
    once, back = torch.cat([ids, mask.long()], 1).unique(dim=0, return_inverse=True)
    ids, mask = (x[:, :-1] for x in once.chunk(2, 1))
    # a left-padded row must equal the same row without padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    how = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
    cache = causal_lm(model).base_model(input_ids=ids, **how).past_key_values
    cache.batch_select_indices(back.repeat_interleave(copies))
    return cache


# ----------------------------------------------------------------------------- supervised training
@dataclass(frozen=True)
class SupervisedConfig:
    """Supervised training: linear warm-up, a constant rate, linear decay."""

    steps: int
    batch: int = 16
    micro_batch: int = 16  # rows a pass with gradients holds
    lr: float = 1e-3
    seed: int = 0


def supervise(model, tokenizer, samples, config, name="align", checkpoint=Checkpoint()):
    """Next-token training of the trainable weights on the answers of (prompt, answer) pairs: the
    mean loss of the last tenth. Kept in the checkpoint each twentieth of the way."""
    steps = config.steps
    weights = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.01, betas=(0.9, 0.98))
    losses = []
    if checkpoint.state:
        losses = checkpoint.state["losses"]
        weights.load_state_dict(checkpoint.state["weights"])
        optimizer.load_state_dict(checkpoint.state["optimizer"])
    todo = draw(len(samples), config.batch, steps, [config.seed, 17])[len(losses) :]
    bar = tqdm(todo, name, steps, initial=len(losses), unit="step", mininterval=1, disable=None)
    for step, rows in enumerate(bar, len(losses)):
        prompts = [prompt_ids(tokenizer, samples[i][0]) for i in rows]
        answers = [answer_ids(tokenizer, samples[i][1]) for i in rows]
        warm_up = (step + 1) / max(1, min(20, steps // 10))
        decay = (steps - step) / (0.5 * steps)
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, warm_up, decay)
        size = within_limit(model, "rows", config.micro_batch)
        batches = micro_batches(range(config.batch), prompts, answers, model.device, size)
        found, _ = accumulate_gradients(model, weights, batches, supervised_loss)
        losses.append(sum(found))
        norm = nn.utils.clip_grad_norm_(weights, 1.0).item()
        # float16 may overflow in the gradient alone: a step would make every weight NaN
        if not np.isfinite(losses[-1] + norm):
            raise OSError(f"{name}: the loss is not finite; --dtype float32 may help")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}")
        if len(losses) % max(1, steps // 20) == 0 or len(losses) == steps:
            state = {"weights": weights.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(state | {"losses": losses})
    return float(np.mean(losses[-max(1, steps // 10) :]))


def supervised_loss(model, batch, tokens):
    """A micro-batch's share of the mean loss of so many answer tokens, as a tensor and a number. A
    mean of micro-batches' means would weigh the tokens of short ones more."""
    logp, _ = logps_and_states(model, batch)
    loss = -(logp * batch.mask).sum() / tokens
    return loss, loss.item()


# ----------------------------------------------------------------------------- PPO: its mathematics
def standardize(x, mask):
    """Mean 0 and variance 1 over real tokens, of all rows together; padding stays 0."""
    x = (x - x[mask].mean()).masked_fill(~mask, 0)
    return x * (x[mask].square().mean() + 1e-8).rsqrt()


def group_advantages(scores, size):
    """Scores (B,) of `size` answers a prompt, prompt by prompt: how far each is above its prompt's
    mean, in units of their spread (at least a tenth of the scores' unit: equal answers teach
    nothing). Of one answer a prompt the scores themselves."""
    if size == 1:
        return scores
    groups = scores.view(-1, size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / groups.std(1, keepdim=True).clamp(min=0.1)).flatten()


def gae(rewards, values, mask, lam=0.95):
    """Generalised advantage estimation with gamma = 1: advantages and returns (B, R). The value
    after a row's last real token is 0; padding stays 0. Returns come from unwhitened advantages."""
    advantages = torch.zeros_like(rewards)
    advantage = 0.0
    next_value = 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        advantage = (delta + lam * advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = advantage
    return advantages, (advantages + values) * mask


class Rollout(NamedTuple):
    """What an update learns from; (B, R) each, padding 0."""

    old_logp: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def ppo_loss(logp, values, rollout: Rollout, mask, tokens, value_coef=0.1, clip=0.2):
    """Clipped policy and value losses of a micro-batch, as a sum over its real tokens divided by
    `tokens`, those of the whole minibatch; and statistics, divided alike."""
    # clamped: one wild token must not make the exponential overflow
    logratio = ((logp - rollout.old_logp) * mask).clamp(-20, 20)
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    policy = torch.max(-rollout.advantages * ratio, -rollout.advantages * clipped_ratio)
    clipped = rollout.old_values + (values - rollout.old_values).clamp(-clip, clip)
    value = 0.5 * torch.max((values - rollout.returns) ** 2, (clipped - rollout.returns) ** 2)
    loss = ((policy + value_coef * value) * mask).sum() / tokens
    # the estimator k3: never negative, of low variance
    kl = ratio - 1 - logratio
    stats = {"ratio": ratio, "approx_kl": kl, "clipfrac": (ratio - 1).abs() > clip}
    return loss, {name: ((x * mask).sum() / tokens).item() for name, x in stats.items()}


# ------------------------------------------------------------------------------- PPO: its loop
@dataclass(frozen=True)
class PPOConfig:
    updates: int
    batch: int = 64  # answers sampled an update
    minibatch: int = 32  # answers a step, at most
    micro_batch: int = 32  # answers a pass with gradients holds
    epochs: int = 2  # passes over an update's answers
    lr: float = 5e-4  # at first; it falls linearly to 0, and with it the noise of large steps
    value_lr: float = 1e-2  # at most: see value_rate
    beta: float = 0.05  # weight of the per-token KL to `align` ...
    kl_target: float = 6.0  # ... adapted towards so many nats a sequence; 0: fixed
    kl_stop: float = 0.03  # per-token KL to the rollout's policy at which an update ends
    no_eos_penalty: float = 1.0  # taken from the scaled score of an unfinished answer
    lam: float = 0.95
    value_coef: float = 0.1  # weight of the value loss
    # answers a prompt. More than 1: their mean is the baseline (GRPO, arXiv 2402.03300); without a
    # critic (value_coef 0, values stay 0) and with lam 1 all tokens then share one score, less the
    # KL penalties still to come
    group: int = 1
    sampling: Sampling = Sampling()
    seed: int = 0
    log: str = ""  # a file for the log, a line of JSON an update

    def __post_init__(self):
        if self.batch % self.group:
            raise ValueError(f"a batch of {self.batch} is no multiple of groups of {self.group}")


def ppo(model, tokenizer, prompts, reward_fn, config, checkpoint=Checkpoint()):
    """Trains the adapter `policy` (see add_policy) on reward_fn(texts, rows of prompts) -> (rewards
    (B,), {figures to log}); returns the log, a dict an update, which config.log holds as well."""
    use(model, "policy", trainable=True)
    lora = [p for p in model.parameters() if p.requires_grad]
    head = value_head(model)
    optimizer = torch.optim.AdamW(lora, lr=config.lr, eps=1e-5, weight_decay=0.0)
    value_lr = value_rate(model, tokenizer, prompts[0], config.value_lr)
    optimizer.add_param_group({"params": head.parameters(), "lr": value_lr})
    weights = nn.ParameterList([*lora, *head.parameters()])
    begun = checkpoint.state or {"log": [], "beta": config.beta, "scale": None}
    log, beta, scale = (begun[key] for key in ("log", "beta", "scale"))
    if checkpoint.state:
        weights.load_state_dict(begun["weights"])
        optimizer.load_state_dict(begun["optimizer"])
    order = draw(len(prompts), config.batch // config.group, config.updates, [config.seed, 19])
    todo = order.repeat(config.group, 1)[len(log) :]
    bar = tqdm(todo, "PPO", config.updates, initial=len(log), unit="update", disable=None)
    for update, rows in enumerate(bar, len(log)):
        # made of seed and update: no random state needs to be saved
        rng = np.random.default_rng([config.seed, 19, update])
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = config.lr * (1 - update / config.updates)
        # 1. sample answers
        use(model, "policy")
        asked = [prompts[i] for i in rows]
        sampling = replace(config.sampling, seed=int(rng.integers(2**31)))
        texts, answers = generate(model, tokenizer, asked, sampling)
        finished = torch.tensor([a[-1] in end_tokens(model) for a in answers]).to(model.device)
        _, mask = pad_ids(answers, model.device)  # (B, R), the EOS included
        # 2. score them, in units of the first spread there is; fixed, or it would hide growth
        raw, figures = reward_fn(texts, rows)
        raw = raw.float().to(model.device)
        scale = scale or (1.0 / raw.std().item() if raw.std() > 1e-6 else None)
        scores = raw * (scale or 1.0) - config.no_eos_penalty * ~finished
        scores = group_advantages(scores, config.group)
        # 3. reference and old log-probabilities, old values
        minibatches = shuffled_minibatches(model, tokenizer, asked, answers, rng, config)
        ref_logp, old_logp, old_values = look_back(model, head, minibatches, mask, config)
        # 4. per-token rewards: the KL penalty everywhere, the score on the last real token
        kl = old_logp - ref_logp
        rewards = -beta * kl
        rewards[torch.arange(config.batch), mask.sum(1) - 1] += scores
        advantages, returns = gae(rewards, old_values, mask, config.lam)
        # 5. several epochs of clipped updates
        use(model, "policy", trainable=True)
        rollout = Rollout(old_logp, old_values, standardize(advantages, mask), returns)
        steps = update_policy(model, head, optimizer, rollout, minibatches, rng, config)
        # 6. log, adapt beta by at most 2 %
        means = {"score": scores, "reward": raw, "kl": kl.sum(1), "eos_rate": finished.float()}
        row = {"update": update, "beta": beta, "reward_std": raw.std().item()}
        row |= {name: x.mean().item() for name, x in means.items()}
        row |= update_stats(steps, rollout, mask) | figures
        row["tokens_per_s"] = mask.sum().item() / (time.perf_counter() - start)
        log.append(row)
        if config.log:
            write_atomically(config.log, "".join(json.dumps(row) + "\n" for row in log))
        beta = adapted_beta(beta, row["kl"], config.kl_target)
        state = {"weights": weights.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save(state | {"log": log, "beta": beta, "scale": scale})
        bar.set_postfix_str(f"reward {row['reward']:+.3f} KL {row['kl']:.2f}")
    use(model, "policy")
    return log


def value_head(model):
    """Values as a linear function of the policy's own states, in float32; 0 at first: unbiased."""
    head = nn.Linear(model.config.hidden_size, 1).to(model.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def value_rate(model, tokenizer, prompt, most, step=1.25):
    """The value head's learning rate. Adam's first step moves each weight by it, so a value by it
    times the L1 norm of its state: 110 in the tiny LLM, but 750 in SmolLM2-135M, where at 1e-2
    values jump by several spreads of the scores. Lowered until a mean state's value moves by
    `step` spreads."""
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=model.device)
    states = causal_lm(model).base_model(input_ids=ids, use_cache=False).last_hidden_state
    return min(most, step / states.float().abs().sum(-1).mean().item())


def adapted_beta(beta, kl, target):
    """The weight of the KL penalty, moved by 2 % at most towards so many nats; 0: left fixed."""
    return beta * (1 + 0.1 * float(np.clip(kl / target - 1, -0.2, 0.2))) if target else beta


def shuffled_minibatches(model, tokenizer, prompts, answers, rng, config):
    """The rows of a rollout, shuffled into minibatches whose sizes differ by one at most (a tiny
    one would make as long a step, from a noisier gradient): lists of micro-batches. The same ones
    for old, reference and new log-probabilities, or rounding would move the first ratio from 1."""
    encoded = [prompt_ids(tokenizer, prompt, config.sampling.start) for prompt in prompts]
    size = within_limit(model, "rows", config.micro_batch)
    shuffled = rng.permutation(len(prompts))
    parts = np.array_split(shuffled, -(-len(prompts) // config.minibatch))
    return [micro_batches(rows, encoded, answers, model.device, size) for rows in parts]


@torch.no_grad()
def look_back(model, head, minibatches, mask, config):
    """Before any update: reference and old log-probabilities and old values, recomputed by the
    function of the update and not taken from generate: (B, R) each, padding 0."""
    ref_logp, old_logp, old_values = torch.zeros(3, *mask.shape, device=mask.device)
    for batch in itertools.chain(*minibatches):
        tokens = (batch.rows, slice(batch.mask.shape[1]))
        use(model, "align")
        ref_logp[tokens], _ = logps_and_states(model, batch, config.sampling.temperature)
        use(model, "policy")
        old_logp[tokens], states = logps_and_states(model, batch, config.sampling.temperature)
        old_values[tokens] = head(states.float()).squeeze(-1)
    return ref_logp * mask, old_logp * mask, old_values * mask


def update_policy(model, head, optimizer, rollout, minibatches, rng, config):
    """Epochs of clipped updates on one rollout; the statistics of each step."""
    parameters = [*model.parameters(), *head.parameters()]
    steps = []

    def loss_of(model, batch, tokens):
        logp, states = logps_and_states(model, batch, config.sampling.temperature)
        values = head(states.float()).squeeze(-1)
        part = Rollout(*(x[batch.rows, : batch.mask.shape[1]] for x in rollout))
        loss, stats = ppo_loss(logp, values, part, batch.mask, tokens, config.value_coef)
        return loss, stats | {"loss": loss.item()}

    for k in np.concatenate([rng.permutation(len(minibatches)) for _ in range(config.epochs)]):
        step = Counter()
        found, minibatches[k] = accumulate_gradients(model, parameters, minibatches[k], loss_of)
        for stats in found:
            # Counter.update adds up
            step.update(stats)
        step["grad_norm"] = nn.utils.clip_grad_norm_(parameters, 1.0).item()
        # a step that would do harm: not finite, or ratios out of all proportion
        step["skipped"] = not np.isfinite(step["loss"] + step["grad_norm"]) or step["ratio"] > 10
        # far from the rollout's policy its answers say little
        too_far = step["approx_kl"] > config.kl_stop
        if not (step["skipped"] or too_far):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(step)
        if too_far:
            break
    return steps


def update_stats(steps, rollout, mask):
    """Means over an update's steps, the number skipped and the first ratio (1 but for rounding);
    entropy (mean -log p of a sampled token), how well values foretell returns, mean length."""
    row = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
    returns = rollout.returns[mask]
    error = (rollout.returns - rollout.old_values)[mask]
    return row | {
        "skipped": sum(step["skipped"] for step in steps),
        "steps": len(steps),
        "first_ratio": steps[0]["ratio"],
        "entropy": -rollout.old_logp[mask].mean().item(),
        "explained_variance": 1 - (error.var() / returns.var().clamp(min=1e-8)).item(),
        "length": mask.sum(1).float().mean().item(),
    }


# ---------------------------------------------------------------------------------- text embeddings
@torch.no_grad()
def encode(model, tokenizer, texts, budget=32_768):
    """Text embeddings (len(texts), D) on the CPU, of the base model: token means of its input
    embeddings + 0.3 (chosen on the demo) of its last hidden states, each of norm 1. The last layer
    guesses the next word, the first still holds the word (Su et al. 2021, arXiv 2103.15316)."""
    rows = [text_ids(tokenizer, text)[:256] or [tokenizer.eos_token_id] for text in texts]
    means = torch.empty(len(rows), 2 * causal_lm(model).config.hidden_size)
    groups = by_length([len(row) for row in rows], budget)
    with model.disable_adapter():
        for group in tqdm(groups, "text embeddings", leave=False, delay=2, disable=None):
            ids, mask = pad_ids([rows[i] for i in group], model.device)
            first = model.get_input_embeddings()(ids)
            last = causal_lm(model).base_model(input_ids=ids, use_cache=False).last_hidden_state
            both = torch.cat([first, last], -1).float() * mask[..., None]
            means[group] = (both.sum(1) / mask.sum(1, keepdim=True)).cpu()
    # disable_adapter has left the adapter trainable
    use(model, model.active_adapter)
    first, last = means.chunk(2, -1)
    return nn.functional.normalize(first, dim=-1) + 0.3 * nn.functional.normalize(last, dim=-1)


# ----------------------------------------------------------------- a tiny LLM trained from scratch
@dataclass(frozen=True)
class TinyConfig:
    """Shape and training of the tiny LLM. Widths are multiples of 64: the 4-bit kernels refuse
    layers whose outputs do not divide by 32 or whose inputs do not divide by 64."""

    lowercase: bool = False  # a word is the same tokens in a title and in a reason
    batch: int = 16
    lr: float = 2e-3
    width: int = 128
    layers: int = 2
    vocab: int = 4096
    device: str = "cpu"


def train_tiny(path, texts, lessons, tags, config, seed=0, checkpoint=Checkpoint()):
    """Saves a Qwen2-shaped model and its own byte-level BPE tokenizer in Hugging Face format at
    path. texts: of the tokenizer, beside the last lesson. lessons: (name, (prompt, answer) pairs,
    steps). tags: markup kept as single tokens."""
    # two runs may make the same model at once
    part = f"{path}.{os.getpid()}.part"
    # a folder that cannot be written to is found out before the training
    os.makedirs(part, exist_ok=True)
    shutil.rmtree(part)
    bpe = ByteLevelBPETokenizer(lowercase=config.lowercase)
    read = itertools.chain(texts, *lessons[-1][1])
    size = config.vocab - len(tags)
    bpe.train_from_iterator(read, size, special_tokens=["<pad>", "<eos>"], show_progress=False)
    bpe.add_tokens([AddedToken(tag, lstrip=True, normalized=False) for tag in tags])
    ends = {"pad_token": "<pad>", "eos_token": "<eos>"}
    raw = Tokenizer.from_str(bpe.to_str())
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=raw, **ends)
    width = config.width
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "num_hidden_layers": config.layers}
    sizes |= {"vocab_size": -(-len(tokenizer) // 64) * 64, "initializer_range": width**-0.5}
    shape = hf.Qwen2Config(**sizes, pad_token_id=0, eos_token_id=1, tie_word_embeddings=True)
    torch.manual_seed(seed)
    model = hf.Qwen2ForCausalLM(shape).to(config.device)
    initialize_to_copy(model)
    for k, (name, samples, steps) in enumerate(lessons):
        how = SupervisedConfig(steps, config.batch, lr=config.lr, seed=seed)
        unit = Checkpoint(f"{checkpoint.path}.{k}" if checkpoint.path else "")
        supervise(model, tokenizer, samples, how, f"tiny LLM, {name}", unit)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if not is_whole(path):
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    shutil.rmtree(part, ignore_errors=True)


@torch.no_grad()
def initialize_to_copy(model):
    """Attention that starts by copying what it looks at learns to copy words from a prompt in half
    the steps ("Mimetic Initialization of Self-Attention Layers", arXiv 2305.09828). Head 0 of the
    first layer looks at the token before and takes it away, or a second word would often be the
    first one again: its query and key are biases, a position apart (rotary)."""
    for layer in model.model.layers:
        nn.init.orthogonal_(layer.self_attn.v_proj.weight)
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
    first = model.model.layers[0].self_attn
    size = model.config.hidden_size // model.config.num_attention_heads
    first.q_proj.weight[:size] = 0
    first.k_proj.weight[:size] = 0
    first.o_proj.weight[:, :size] *= -1
    # radians a position of the three fastest pairs of dimensions
    turn = 10_000.0 ** (-2 * torch.arange(3) / size)
    first.k_proj.bias[:3] = 5.0
    first.q_proj.bias[:3] = 5.0 * turn.cos()
    first.q_proj.bias[size // 2 : size // 2 + 3] = -5.0 * turn.sin()


# ------------------------------------------------------------ before a run: its time and its memory
def measure_speed(model, tokenizer, prompts, micro_batch, max_new=16):
    """Tokens a second of generation (of answers) and of training (of prompts and answers), each
    measured once; draws some answers and changes no weight."""
    sampling = Sampling(max_new)
    # the first call pays for what is loaded once
    generate(model, tokenizer, prompts[:1], sampling)
    start = time.perf_counter()
    _, answers = generate(model, tokenizer, prompts, sampling)
    written = sum(map(len, answers)) / (time.perf_counter() - start)
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts[:micro_batch]]
    use(model, model.active_adapter, trainable=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    batches = micro_batches(range(len(rows)), rows, answers, model.device, micro_batch)
    start = time.perf_counter()
    accumulate_gradients(model, weights, batches, supervised_loss)
    # a card computes on after backward has returned: waits for it
    weights[0].grad.sum().item()
    tokens = sum(len(row) for row in rows) + sum(map(len, answers[: len(rows)]))
    return written, tokens / (time.perf_counter() - start)


def weights_are_here(name):
    """Are an LLM's weights on disk or in the cache, so that loading it downloads nothing?"""
    for file in ("model.safetensors", "model.safetensors.index.json"):
        with contextlib.suppress(OSError):
            if hf.utils.cached_file(name, file, local_files_only=True):
                return True
    return False


def forecast(name, micro_batch=4, length=640, budget=32_768, size=2, rank=16, answer=128):
    """{"parameters", "load_gb", "alignment_gb", "generation_gb", "ppo_gb"} of an LLM whose config
    is on disk or in the cache, else {}: the most bytes of tensors at once, without an allocator's
    and libraries' own (tests/bench/bench_llm.py memory simulates them). length: tokens of a prompt
    with its answer; answer: of these; budget: of a batch of generation; size: bytes of the dtype of
    computation."""
    try:
        config = hf.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = hf.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError):
        return {}
    text = config.get_text_config()
    layers, width = text.num_hidden_layers, text.hidden_size
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    weights = sum(m.weight.numel() for m in linear)
    inputs = sum(m.in_features for m in linear)
    outputs = sum(m.out_features for m in linear)
    adapter = rank * (inputs + outputs)
    n = model.num_parameters()
    # NF4 with its double-quantised scales; a LoRA weight in float32, and as much each for its
    # gradient and Adam's two means
    load = 0.52 * weights + size * (n - weights) + 4 * adapter
    # checkpoints of all layers; then a vocabulary's logits, or one layer as backward needs it: the
    # outputs of its linear maps, and in float32 what the adapters read and add
    tokens = micro_batch * length
    checkpoints = tokens * size * layers * width
    logits = 3 * 4 * min(MAX_LOGITS, micro_batch * answer * len(head.weight))
    layer = tokens * (4 * inputs + (size + 4) * outputs) / layers
    training = load + 12 * adapter + checkpoints + max(logits, layer)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or width // text.num_attention_heads
    cache = budget * 2 * layers * heads * head_size * size
    # of the prompts beside their keys and values: the widest output, and three times in float32
    # what is added to it
    widest = max((m.out_features for m in linear), default=0)
    prompts = budget * (1 - answer / length)
    reading = prompts * (size + 3 * 4) * widest
    generation = load + max(cache, prompts / budget * cache + reading)
    stages = {"load": load, "alignment": training, "generation": generation}
    # a second adapter, and Adam's means while it answers too
    stages["ppo"] = max(training, generation + 8 * adapter) + 4 * adapter
    return {"parameters": n} | {f"{stage}_gb": 1e-9 * value for stage, value in stages.items()}


# ===================================================== the two relatives: the LLM as a recommender
def title_trie(tokenizer, titles):
    """({token ids of a title with its end: its number}, {ids so far: ids that may follow})."""
    paths = {tuple(answer_ids(tokenizer, title)): k for k, title in enumerate(titles)}
    if len(paths) < len(titles):
        raise ValueError("two titles are the same tokens: one of them could never be retrieved")
    trie = {}
    for path in paths:
        for k, token in enumerate(path):
            trie.setdefault(path[:k], set()).add(token)
    return paths, trie


def retrieve(model, tokenizer, prompts, tries, beams=20, budget=32_768):
    """The likeliest titles of tries (see title_trie) by beam search: their numbers, best first,
    (len(prompts), beams); -1 where none is left."""
    paths, trie = tries
    how = {"do_sample": False, "length_penalty": 0.0, "num_beams": beams}
    how |= {"num_return_sequences": beams, "max_new_tokens": max(map(len, paths))}
    out = []
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    for answers in decode(model, tokenizer, rows, how, budget, "beam search", trie):
        # where few titles are left, beams repeat some
        found = list(dict.fromkeys(paths.get(tuple(answer), -1) for answer in answers))
        out.append(found + [-1] * (beams - len(found)))
    return torch.tensor(out)
