"""The LLM: 4-bit QLoRA loading, generation, supervised alignment, and a hand-written PPO.

    pytest tests/test_rl.py                              try it alone

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
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import transformers as hf
from tqdm import tqdm

# no second progress bar, and no warning without a remedy: peft's own call, and bitsandbytes' wish
# for a package that would fetch remote code
hf.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels" not in record.getMessage()
)


# ----------------------------------------------------------------- files that are whole at any time
def write_atomically(path, value):
    """Writes a text, or what torch.save takes. Whatever ends the process, the old file or the new
    one is there as a whole."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as file:
        if isinstance(value, str):
            file.write(value.encode())
        else:
            torch.save(value, file)
    os.replace(part, path)


class Checkpoint:
    """What an interrupted loop goes on from. `state`: what was saved last, or None. Without a path
    nothing is kept."""

    def __init__(self, path=""):
        self.path = path
        self.state = None
        if path and os.path.exists(path):
            self.state = torch.load(path, "cpu", weights_only=True)

    def save(self, state):
        if self.path:
            write_atomically(self.path, state)

    def part(self, name) -> "Checkpoint":
        """The checkpoint of a loop that is one of several."""
        return Checkpoint(self.path and f"{self.path}.{name}")


# -------------------------------------------------------------------- loading, modes, adapters
# of models that change their logits after the head: Granite, Cohere, Gemma 2, Falcon-H1
LOGIT_CHANGES = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")


@contextlib.contextmanager
def loading(name):
    """Whatever transformers raises inside becomes one OSError that says what to do."""
    try:
        yield
    except Exception as e:
        # the last word often hides what happened first
        cause = e
        while cause.__context__:
            cause = cause.__context__
        said = "; ".join(dict.fromkeys(str(error).strip().split("\n")[0] for error in (e, cause)))
        raise OSError(
            f"the LLM '{name}' could not be loaded ({said}). Check name and network: the same "
            "command takes an interrupted download up again, a gated model needs `hf auth login`, "
            "a damaged file must be deleted. Or give --llm PATH, or --llm tiny."
        ) from e


def load(name, device="cpu", rank=16, checkpointing=False, compute=None, seed=0):
    """Any Hugging Face causal LM in NF4, the rest of it in dtype compute, with a new LoRA adapter
    `align`: (PeftModel, tokenizer). checkpointing: gradient checkpointing, for small GPUs."""
    from peft import LoraConfig, get_peft_model

    compute = compute or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
    # load_in_4bit is no longer a model argument, and this config's defaults are still fp4, single
    nf4 = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    nf4.bnb_4bit_compute_dtype = compute
    how = {"quantization_config": nf4, "dtype": compute, "device_map": {"": device}}
    # nothing of a hub's that could run: no code, no pickled weights
    how |= {"trust_remote_code": False, "use_safetensors": True}
    with loading(name):
        # AutoTokenizer would split text by the rules of the model's type; the tiny LLM has its own
        config = hf.models.auto.tokenization_auto.get_tokenizer_config(name)
        own = config.get("tokenizer_class") == "TokenizersBackend"
        tokenizers = hf.PreTrainedTokenizerFast if own else hf.AutoTokenizer
        tokenizer = tokenizers.from_pretrained(name, trust_remote_code=False)
        base = hf.AutoModelForCausalLM.from_pretrained(name, **how)
    for change in LOGIT_CHANGES:
        if getattr(base.config, change, None) not in (None, 1):
            raise OSError(
                f"the LLM '{name}' changes its logits after the head ({change}): PPO would train "
                "another distribution than it samples; choose another --llm"
            )
    # every dropout 0: sampling, reference and update must be the same function
    for module in base.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in key or key == "p"):
                setattr(module, key, 0.0)
    torch.manual_seed(seed)
    # peft freezes the base by itself; prepare_model_for_kbit_training would also turn embeddings
    # and head into float32. LoRA weights are float32: at a learning rate of 1e-5 most steps would
    # be lost in the rounding of bfloat16
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora, adapter_name="align", autocast_adapter_dtype=True)
    if checkpointing:
        # reentrant checkpointing drops every gradient where its input needs none, as here
        how = {"use_reentrant": False}
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    # padding is carried in masks, so pad may equal eos
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    set_mode(model, training=False)
    return model, tokenizer


def set_mode(model, training):
    """Training or evaluation mode, but for the 4-bit layers, which stay in training mode. On some
    CPUs a 4-bit layer that runs in evaluation mode repacks its weight for a kernel that has no
    autograd, for good: from then on LoRA gradients are silently wrong by 90 %. Such a layer has no
    other use for the flag."""
    from bitsandbytes.nn import Linear4bit

    model.train(training)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True


def causal_lm(model):
    """The causal LM within its adapters, or without any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trainable(model):
    """The parameters that take gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def use(model, adapter, trainable=False):
    """Makes one adapter active; its LoRA weights take gradients if trainable, nothing else ever."""
    model.set_adapter(adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and "lora_" in name and f".{adapter}." in name)


def add_policy(model):
    """The adapter `policy`, a copy of `align`: PPO starts at its own reference, which is the
    aligned model and not the base with its adapters off."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model.add_adapter("policy", model.peft_config["align"])
    weights = get_peft_model_state_dict(model, adapter_name="align", save_embedding_layers=False)
    set_peft_model_state_dict(model, weights, "policy")


def save_adapter(model, folder, name):
    """Writes folder/name, which plain peft loads; atomic, without peft's empty model card."""
    part = os.path.join(folder, "state", "adapter")
    # the default "auto" would ask the hub whether the vocabulary was changed
    model.save_pretrained(part, selected_adapters=[name], save_embedding_layers=False)
    shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    os.replace(os.path.join(part, name), os.path.join(folder, name))


def restore_adapter(model, folder, name):
    """Loads folder/name into the adapter of that name. (peft's load_adapter ends in model.eval(),
    which would repack the 4-bit weights: see set_mode.)"""
    from peft import set_peft_model_state_dict

    path = os.path.join(folder, name, "adapter_model.safetensors")
    set_peft_model_state_dict(model, safetensors.torch.load_file(path), name)


# ------------------------------------------------------------------------------ tokens and batches
class MicroBatch(NamedTuple):
    """Prompts with their answers, as drawn above."""

    rows: torch.Tensor  # (b,) their numbers
    ids: torch.Tensor  # (b, T)
    starts: torch.Tensor  # (b,)
    mask: torch.Tensor  # (b, R) answer tokens, True = real


def prompt_ids(tokenizer, prompt):
    """Token ids of a prompt, in the tokenizer's chat template where it has one. A title is
    anybody's text: a control token in it (the end of a turn, say) becomes a space."""
    control = []
    for token in tokenizer.added_tokens_decoder.values():
        text = token.content
        if text.strip() and (token.special or (len(text) > 1 and not text.isalnum())):
            control.append(re.escape(text))
    pattern = re.compile("|".join(control) or "(?!)")
    while pattern.search(prompt):
        prompt = pattern.sub(" ", prompt)
    if not tokenizer.chat_template:
        return tokenizer(prompt + "\n")["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def answer_ids(tokenizer, answer):
    """Token ids of an answer, EOS after each of its lines: generation stops at the first."""
    ids = []
    for line in answer.split("\n"):
        ids += tokenizer(" " + line, add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return ids


def draw(n, batch, rng):
    """Yields endless batches of row numbers below n: each comes once before any comes again."""
    rows = []
    while True:
        while len(rows) < batch:
            rows += rng.permutation(n).tolist()
        yield rows[:batch]
        rows = rows[batch:]


def by_length(lengths, budget):
    """Yields index lists of similar length, each of at most `budget` padded tokens: little
    padding, bounded memory."""
    order = np.argsort(lengths, kind="stable").tolist()
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[end]] * (end + 1 - start) > budget:
            yield order[start:end]
            start = end


def pad_ids(rows, pad, left=False):
    """Lists of token ids -> ids (B, T) padded at the end, or on the left; mask (B, T)."""
    side = "left" if left else "right"
    ids = [torch.tensor(row) for row in rows]
    real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    padded = nn.utils.rnn.pad_sequence(ids, True, pad, side)
    return padded, nn.utils.rnn.pad_sequence(real, True, False, side)


def micro_batches(rows, prompts, answers, pad, device, size):
    """These rows of the tokenised prompts and answers in micro-batches of at most `size` rows of
    similar length: little padding."""
    rows = sorted(rows, key=lambda i: len(prompts[i]) + len(answers[i]))
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids, _ = pad_ids([prompts[i] + answers[i] for i in part], pad)
        starts = torch.tensor([len(prompts[i]) for i in part])
        _, mask = pad_ids([answers[i] for i in part], pad)
        tensors = (torch.tensor(part), ids, starts, mask)
        batches.append(MicroBatch(*(tensor.to(device) for tensor in tensors)))
    return batches


# ------------------------------------------------------------------- log-probabilities and values
def answer_positions(batch: MicroBatch):
    """Where the answer tokens stand in batch.ids, (b, R)."""
    offsets = torch.arange(batch.mask.shape[1], device=batch.ids.device)
    return (batch.starts[:, None] + offsets).clamp(max=batch.ids.shape[1] - 1)


def answer_states(model, batch: MicroBatch):
    """The hidden states that predict the answer tokens, (b, R, D); those of padding mean nothing.
    The backbone runs once; the head sees the states of answers alone, never those of prompts."""
    out = causal_lm(model).base_model(input_ids=batch.ids, use_cache=False)
    return out.last_hidden_state.take_along_dim(answer_positions(batch)[..., None] - 1, 1)


def state_logps(model, states, batch: MicroBatch, temperature=1.0):
    """Log-probabilities (b, R) of the answer tokens after these states (b, R, D). In float32: in
    bfloat16 they would be 1e-2 apart. Divided by the temperature that the answers were sampled
    at, or the ratio would compare two distributions."""
    logits = causal_lm(model).get_output_embeddings()(states).float() / temperature  # (b, R, V)
    chosen = batch.ids.gather(1, answer_positions(batch))
    return logits.gather(-1, chosen[..., None]).squeeze(-1) - logits.logsumexp(-1)


def token_logps(model, batch: MicroBatch, temperature=1.0):
    """Log-probabilities (b, R) of the answer tokens; those of padding mean nothing."""
    return state_logps(model, answer_states(model, batch), batch, temperature)


def logps_and_values(model, head, batch: MicroBatch, temperature):
    """Log-probabilities and values (b, R) of the answer tokens, from the same states. The one
    function for rollout, reference and update: else the first ratio would not be 1."""
    states = answer_states(model, batch)
    return state_logps(model, states, batch, temperature), head(states.float()).squeeze(-1)


# -------------------------------------------------------------------------------------- generation
@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    max_new: int = 48  # longest answer in tokens
    temperature: float = 1.0
    budget: int = 32_768  # padded tokens of a batch
    seed: int = 0


def generate(model, tokenizer, prompts, sampling=Sampling(), name=""):
    """Samples one answer a prompt with the active adapter: (texts, lists of the sampled ids). A
    list ends with EOS unless max_new cut it off. name: of the progress bar."""
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    how["max_new_tokens"] = sampling.max_new
    out = [[]] * len(prompts)
    for i, (answer,) in decode(model, tokenizer, prompts, how, sampling.budget, name):
        out[i] = answer
    if name:
        speed = sum(map(len, out)) / (time.perf_counter() - start)
        print(f"  {name}: {len(out):,} answers, {speed:,.0f} tokens/s")
    # a reward sees the texts up to EOS; the policy trains on the sampled ids themselves, for
    # tokenising a text again may give others
    texts = []
    for answer in out:
        said = [i for i in answer if i != tokenizer.eos_token_id]
        texts.append(tokenizer.decode(said).strip())
    return texts, out


@torch.no_grad()
def decode(model, tokenizer, prompts, how, budget, name="", trie=None):
    """Yields (number of a prompt, its answers as lists of ids up to EOS), in batches of similar
    length. how: of the GenerationConfig. trie: ids that may follow each list of ids."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    device = next(model.parameters()).device
    # replaced as a whole: a checkpoint's own would fill in what is unset (repetition_penalty,
    # top_k = 50), and answers would come from another distribution than PPO trains
    config = hf.GenerationConfig(eos_token_id=eos, pad_token_id=pad, **how)
    causal_lm(model).generation_config = config
    beams = config.num_beams or 1
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    costs = [beams * (len(row) + config.max_new_tokens) for row in rows]
    quiet = None if name else True
    with tqdm(total=len(rows), desc=name, unit="prompt", leave=False, disable=quiet) as bar:
        for group in by_length(costs, budget):
            ids, mask = pad_ids([rows[i] for i in group], pad, left=True)
            ids, mask = ids.to(device), mask.to(device)
            prompt_length = ids.shape[1]

            def allowed(_, seen, start=prompt_length):
                """A beam that has left the trie has probability 0, but has to go on: to EOS."""
                return list(trie.get(tuple(seen[start:].tolist()), [eos]))

            many = [x.repeat_interleave(beams, 0) for x in (ids, mask)]
            made = model.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                past_key_values=prompt_cache(model, *many),
                use_cache=True,
                prefix_allowed_tokens_fn=allowed if trie else None,
            )
            made = made[:, prompt_length:].view(len(group), beams, -1).tolist()
            for i, answers in zip(group, made, strict=True):
                # nothing after EOS is real
                yield i, [a[: a.index(eos) + 1] if eos in a else a for a in answers]
            bar.update(len(group))


def prompt_cache(model, ids, mask):
    """Keys and values of left-padded prompts (B, P) but for their last tokens: equal rows are
    computed once and copied. None where a model keeps no keys: generate then reads every row."""
    layers = hf.DynamicCache(config=causal_lm(model).config).layers
    if ids.shape[1] == 1 or not all(hasattr(x, "batch_select_indices") for x in layers):
        return None
    once, back = torch.cat([ids, mask.long()], 1).unique(dim=0, return_inverse=True)
    ids, mask = (x[:, :-1] for x in once.chunk(2, 1))
    # a left-padded row must equal the same row without padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    how = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
    cache = causal_lm(model).base_model(input_ids=ids, **how).past_key_values
    cache.batch_select_indices(back)
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
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    steps = config.steps
    parameters = trainable(model)
    losses = []
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01, betas=(0.9, 0.98))
    if checkpoint.state:
        losses = checkpoint.state["losses"]
        restore_training(checkpoint.state, parameters, optimizer)
    order = draw(len(samples), config.batch, np.random.default_rng([config.seed, 17]))
    todo = itertools.islice(zip(range(steps), order, strict=False), len(losses), None)
    set_mode(model, training=True)
    bar = tqdm(todo, name, steps, initial=len(losses), unit="step", mininterval=1, disable=None)
    for step, rows in bar:
        prompts = [prompt_ids(tokenizer, samples[i][0]) for i in rows]
        answers = [answer_ids(tokenizer, samples[i][1]) for i in rows]
        tokens = sum(map(len, answers))
        total = 0.0
        warm_up = (step + 1) / max(1, min(20, steps // 10))
        decay = (steps - step) / (0.5 * steps)
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, warm_up, decay)
        part = range(len(rows))
        size = config.micro_batch
        for batch in micro_batches(part, prompts, answers, pad, device, size):
            # a sum over the tokens of all micro-batches: a mean of their means would weigh the
            # tokens of short ones more
            loss = -(token_logps(model, batch) * batch.mask).sum() / tokens
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}")
        if len(losses) % max(1, steps // 20) == 0 or len(losses) == steps:
            checkpoint.save({"losses": losses} | training_state(parameters, optimizer))
    set_mode(model, training=False)
    return float(np.mean(losses[-max(1, steps // 10) :]))


def training_state(parameters, optimizer):
    """Weights and optimizer of a training, to be stored at once: they are live."""
    weights = nn.utils.parameters_to_vector(parameters).detach()
    return {"weights": weights, "optimizer": optimizer.state_dict()}


def restore_training(state, parameters, optimizer):
    """The opposite."""
    optimizer.load_state_dict(state["optimizer"])
    weights = state["weights"].to(parameters[0].device, copy=True)
    nn.utils.vector_to_parameters(weights, parameters)


# ----------------------------------------------------------------------------- PPO: its mathematics
def standardize(x, mask):
    """Mean 0 and variance 1 over real tokens, of all rows together; padding stays 0."""
    x = (x - x[mask].mean()).masked_fill(~mask, 0)
    return x * (x[mask].square().mean() + 1e-8).rsqrt()


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


def ppo_loss(logp, values, rollout: Rollout, mask, tokens, clip=0.2, value_coef=0.1):
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
    stats = {
        "ratio": ratio,
        "approx_kl": ratio - 1 - logratio,  # the estimator k3: never negative, of low variance
        "clipfrac": (ratio - 1).abs() > clip,
    }
    return loss, {name: ((x * mask).sum() / tokens).item() for name, x in stats.items()}


# ------------------------------------------------------------------------------- PPO: its loop
@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO."""

    updates: int
    batch: int = 64  # answers sampled an update
    minibatch: int = 32  # answers a step
    micro_batch: int = 32  # answers a pass with gradients holds
    epochs: int = 2  # passes over an update's answers
    lr: float = 5e-4
    value_lr: float = 1e-2
    beta: float = 0.05  # weight of the per-token KL to `align` ...
    kl_target: float = 6.0  # ... adapted towards so many nats a sequence; 0: fixed
    kl_stop: float = 0.03  # per-token KL to the rollout's policy at which an update ends
    no_eos_penalty: float = 1.0  # taken from the scaled score of an unfinished answer
    lam: float = 0.95
    sampling: Sampling = Sampling()
    seed: int = 0
    log: str = ""  # a file for the log, a line of JSON an update


def ppo(model, tokenizer, prompts, reward_fn, config, checkpoint=Checkpoint()):
    """Trains the adapter `policy` (see add_policy) on reward_fn(texts, rows) -> (rewards (B,),
    {figures to log}), where rows index prompts. Kept in the checkpoint, and the log in config.log,
    after every update. Returns the log, a dict an update."""
    device = next(model.parameters()).device
    use(model, "policy", trainable=True)
    head = value_head(model, device)
    lora = trainable(model)
    own = list(head.parameters())
    groups = [{"params": lora, "lr": config.lr}, {"params": own, "lr": config.value_lr}]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
    begun = checkpoint.state or {"log": [], "beta": config.beta, "scale": None}
    log, beta, scale = (begun[key] for key in ("log", "beta", "scale"))
    if checkpoint.state:
        restore_training(checkpoint.state, lora + own, optimizer)
    order = draw(len(prompts), config.batch, np.random.default_rng([config.seed, 19]))
    todo = itertools.islice(zip(range(config.updates), order, strict=False), len(log), None)
    bar = tqdm(todo, "PPO", config.updates, initial=len(log), unit="update", disable=None)
    for update, rows in bar:
        # made of seed and update: no random state needs to be saved
        rng = np.random.default_rng([config.seed, 19, update])
        start = time.perf_counter()
        # 1. sample answers
        set_mode(model, training=False)
        asked = [prompts[i] for i in rows]
        sampling = replace(config.sampling, seed=int(rng.integers(2**31)))
        texts, answers = generate(model, tokenizer, asked, sampling)
        finished = torch.tensor([a[-1] == tokenizer.eos_token_id for a in answers], device=device)
        mask = pad_ids(answers, 0)[1].to(device)  # (B, R), the EOS included
        # 2. score them, in units of the first spread there is
        raw, figures = reward_fn(texts, rows)
        raw = raw.float().to(device)
        if scale is None and 1e-6 < raw.std().item() < float("inf"):
            scale = 1.0 / raw.std().item()
        scores = raw * (scale or 1.0) - config.no_eos_penalty * ~finished
        # 3. reference and old log-probabilities, old values
        minibatches = shuffled_minibatches(tokenizer, asked, answers, rng, config, device)
        ref_logp, old_logp, old_values = look_back(model, head, minibatches, mask, config)
        # 4. per-token rewards: the KL penalty everywhere, the score on the last real token
        kl = old_logp - ref_logp
        rewards = -beta * kl
        rewards[torch.arange(config.batch), mask.sum(1) - 1] += scores
        advantages, returns = gae(rewards, old_values, mask, config.lam)
        # 5. several epochs of clipped updates
        set_mode(model, training=True)
        rollout = Rollout(old_logp, old_values, standardize(advantages, mask), returns)
        steps = update_policy(model, head, optimizer, rollout, minibatches, rng, config)
        # 6. log, adapt beta by at most 2 %
        row = {"update": update, "beta": beta, "score": scores.mean().item()}
        row |= {"reward": raw.mean().item(), "reward_std": raw.std().item()}
        row |= {"kl": kl.sum(1).mean().item(), "eos_rate": finished.float().mean().item()}
        row |= update_stats(steps, rollout, mask)
        row["tokens_per_s"] = mask.sum().item() / (time.perf_counter() - start)
        log.append(row | figures)
        if config.log:
            write_atomically(config.log, "".join(json.dumps(row) + "\n" for row in log))
        if config.kl_target:
            beta *= 1 + 0.1 * float(np.clip(row["kl"] / config.kl_target - 1, -0.2, 0.2))
        state = training_state(lora + own, optimizer)
        checkpoint.save(state | {"log": log, "beta": beta, "scale": scale})
        bar.set_postfix_str(f"reward {row['reward']:+.3f} KL {row['kl']:.2f}")
    set_mode(model, training=False)
    use(model, "policy")
    return log


def value_head(model, device) -> nn.Linear:
    """Values are a linear function of the policy's own states, in float32. It starts at zero, so
    that values start unbiased."""
    head = nn.Linear(model.config.hidden_size, 1).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def shuffled_minibatches(tokenizer, prompts, answers, rng, config, device):
    """The rows of a rollout, shuffled into minibatches: lists of micro-batches. The same ones for
    old, reference and new log-probabilities, or rounding would move the first ratio from 1."""
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    pad = tokenizer.pad_token_id
    shuffled = rng.permutation(len(prompts))
    minibatches = []
    for start in range(0, len(prompts), config.minibatch):
        rows = shuffled[start : start + config.minibatch]
        minibatches.append(micro_batches(rows, encoded, answers, pad, device, config.micro_batch))
    return minibatches


@torch.no_grad()
def look_back(model, head, minibatches, mask, config):
    """Before any update: reference and old log-probabilities and old values, recomputed by the
    function of the update and not taken from generate: (B, R) each, padding 0."""
    ref_logp, old_logp, old_values = torch.zeros(3, *mask.shape, device=mask.device)
    temperature = config.sampling.temperature
    batches = list(itertools.chain(*minibatches))
    use(model, "align")
    for batch in batches:
        length = batch.mask.shape[1]
        ref_logp[batch.rows, :length] = token_logps(model, batch, temperature)
    use(model, "policy", trainable=True)
    for batch in batches:
        length = batch.mask.shape[1]
        logp, values = logps_and_values(model, head, batch, temperature)
        old_logp[batch.rows, :length] = logp
        old_values[batch.rows, :length] = values
    return ref_logp * mask, old_logp * mask, old_values * mask


def update_policy(model, head, optimizer, rollout, minibatches, rng, config):
    """Epochs of clipped updates on one rollout; the statistics of each step."""
    parameters = trainable(model) + list(head.parameters())
    steps = []
    order = itertools.chain(*(rng.permutation(len(minibatches)) for _ in range(config.epochs)))
    for k in order:
        tokens = sum(batch.mask.sum() for batch in minibatches[k])
        step = Counter()
        for batch in minibatches[k]:
            logp, values = logps_and_values(model, head, batch, config.sampling.temperature)
            part = Rollout(*(x[batch.rows, : batch.mask.shape[1]] for x in rollout))
            loss, stats = ppo_loss(logp, values, part, batch.mask, tokens)
            loss.backward()
            # Counter.update adds up
            step.update(stats | {"loss": loss.item()})
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
    guesses the next word, the first one still holds the word itself (Su et al. 2021, arXiv
    2103.15316)."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    device = next(model.parameters()).device
    rows = []
    for text in texts:
        rows.append(tokenizer(" " + text, add_special_tokens=False)["input_ids"][:256] or [eos])
    means = torch.empty(len(rows), 2 * causal_lm(model).config.hidden_size)
    groups = list(by_length([len(row) for row in rows], budget))
    with model.disable_adapter():
        for group in tqdm(groups, "text embeddings", leave=False, delay=2, disable=None):
            ids, mask = pad_ids([rows[i] for i in group], pad)
            ids, mask = ids.to(device), mask.to(device)
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
    """Saves a Qwen2-shaped model and its own BPE tokenizer in Hugging Face format at path. texts:
    a list for the tokenizer, which reads the last lesson too. lessons: (name, (prompt, answer)
    pairs, steps). tags: markup kept as single tokens."""
    tokenizer = train_tokenizer(texts, lessons[-1][1], tags, config)
    width = config.width
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "num_hidden_layers": config.layers}
    sizes |= {"vocab_size": -(-len(tokenizer) // 64) * 64, "max_position_embeddings": 2048}
    sizes |= {"tie_word_embeddings": True, "initializer_range": width**-0.5}
    shape = hf.Qwen2Config(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(seed)
    model = hf.Qwen2ForCausalLM(shape).to(config.device)
    initialize_to_copy(model)
    for k, (name, samples, steps) in enumerate(lessons):
        how = SupervisedConfig(steps, config.batch, lr=config.lr, seed=seed)
        title = f"tiny LLM from scratch, {name}"
        supervise(model, tokenizer, samples, how, title, checkpoint.part(k))
    # two runs may make the same model at once
    part = f"{path}.{os.getpid()}.part"
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if os.path.exists(path):
        shutil.rmtree(part)
    else:
        os.replace(part, path)


def train_tokenizer(texts, samples, tags, config: TinyConfig):
    """A byte-level BPE tokenizer of these texts."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer

    bpe = ByteLevelBPETokenizer(lowercase=config.lowercase)
    bpe.train_from_iterator(
        [*texts, *itertools.chain(*samples)],
        vocab_size=config.vocab - len(tags),
        min_frequency=2,
        special_tokens=["<pad>", "<eos>"],
        show_progress=False,
    )
    bpe.add_tokens([AddedToken(tag, lstrip=True, normalized=False) for tag in tags])
    raw = Tokenizer.from_str(bpe.to_str())
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


@torch.no_grad()
def initialize_to_copy(model, sharp=5.0):
    """Attention of a new model starts by copying what it looks at; it learns to copy words from its
    prompt in half the steps ("Mimetic Initialization of Self-Attention Layers", arXiv 2305.09828).
    Head 0 of the first layer looks at the token before and takes it away, or a second word would
    often be the first one again: its query and key are biases, a position apart (rotary)."""
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
    first.k_proj.bias[:3] = sharp
    first.q_proj.bias[:3] = sharp * turn.cos()
    first.q_proj.bias[size // 2 : size // 2 + 3] = -sharp * turn.sin()


def forecast(name, budget):
    """{"parameters", "memory_gb"} of an LLM whose config is on disk or in the cache; {} of another.
    Memory on CUDA by arithmetic, not measured: 0.9 GB a billion weights in 4 bits with adapters and
    Adam; 2 GB, and 0.75 GB a billion weights, for a pass of 32,768 tokens."""
    try:
        config = hf.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = hf.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError):
        return {}
    n = model.num_parameters()
    memory = 0.9e-9 * n + (2 + 0.75e-9 * n) * budget / 32_768
    return {"parameters": n, "memory_gb": memory}


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
    out = torch.full((len(prompts), beams), -1)
    for i, answers in decode(model, tokenizer, prompts, how, budget, "beam search", trie):
        # where few titles are left, beams repeat some
        found = dict.fromkeys(paths.get(tuple(answer), -1) for answer in answers)
        out[i, : len(found)] = torch.tensor(list(found))
    return out
