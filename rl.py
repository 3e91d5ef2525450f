"""The LLM: a tiny one from nothing, 4-bit QLoRA loading, generation, supervised alignment, and a hand-written PPO.

    score_t  = [t is last] * s - beta * (logp_t - ref_logp_t)        s = reward_fn(texts, rows), scaled once
    A_t      = sum_k lambda^k (score_{t+k} + V_{t+k+1} - V_{t+k})    GAE, gamma = 1, V after the last token = 0
    L        = mean_t max(-A_t ratio_t, -A_t clip(ratio_t)) + c_v * clipped value loss,  ratio_t = exp(logp_t - old_t)

One base model in memory, named LoRA adapters: `align` (frozen after alignment: PPO's reference), `policy`; `knowledge` of a relative.
Layout of a batch: padding comes last, where a causal model never sees it; only generation pads on the left.

    ids    [ p p p r r r eos pad ]      answer tokens at `starts`, `starts` + 1, ...; the logits before each predict it
             0     3 = starts
Left out: vLLM, several GPUs, a separate value backbone, reward-model training (reward.py).  Try it alone: pytest tests/test_rl.py
Source of the details: "The N Implementation Details of RLHF with PPO" (arXiv 2403.17031).
"""
import collections, contextlib, copy, functools, itertools, json, logging, os, pathlib, re, shutil, time, warnings

import huggingface_hub, safetensors.torch
import numpy as np
import torch
import torch.nn as nn
import transformers as hf                             # lazy: what is not named costs no time
from tqdm import tqdm

# no second progress bar, and no warning without a remedy: peft's own call, and bitsandbytes' wish for a package of remote code (TRAPS 9)
hf.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in record.getMessage())

# --------------------------------------------------------------------------------------------------------- loading
def train_tiny(path, texts, lessons, tags, *, lower=False, batch=16, lr=2e-3, width=128, layers=2, vocab=4096, seed=0, device="cpu",
               state=None, save=lambda state: None):
    """A Qwen2-shaped model and BPE tokenizer made from nothing, saved in Hugging Face format at path.
    texts: a list for the tokenizer, which reads the last lesson too. lessons: (name, (prompt, answer) pairs, steps). tags: markup kept as single
    tokens. lower: all in lower case: a word is the same tokens in title and reason. state, save: as in supervise; all else is made anew, the same."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
    bpe = ByteLevelBPETokenizer(lowercase=lower)
    bpe.train_from_iterator(texts + [t for s in lessons[-1][1] for t in s], vocab_size=vocab - len(tags), min_frequency=2,
                            special_tokens=["<pad>", "<eos>"], show_progress=False)
    bpe.add_tokens([AddedToken(t, lstrip=True, normalized=False) for t in tags])
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), pad_token="<pad>", eos_token="<eos>")
    # out_features % 32 == 0 and in_features % 64 == 0, or the 4-bit kernels refuse the layer (TRAPS 1)
    config = hf.Qwen2Config(vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
                            initializer_range=width ** -0.5, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(seed)
    model = hf.Qwen2ForCausalLM(config).to(device)
    head_start(model)
    done = state["lesson"] if state else 0
    for k, (name, samples, steps) in enumerate(lessons[done:], done):
        supervise(model, tokenizer, samples, steps=steps, batch=batch, lr=lr, seed=seed, name=f"tiny LLM from nothing, {name}",
                  state=state if k == done else None, save=lambda inner: save(inner | {"lesson": k}))
    part = f"{path}.{os.getpid()}.part"                         # two runs may make the same model at once
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(part) if os.path.exists(path) else os.replace(part, path)

@torch.no_grad()
def head_start(model, sharp: float = 5.0):
    """Attention of a new model starts by copying what it looks at; it learns to copy words from its prompt in half the steps.
    Head 0 of the first layer looks at the token before and takes it away, or a second word would often be the first again: its query
    and key are biases, a position apart (rotary embedding). After "Mimetic Initialization of Self-Attention Layers" (arXiv 2305.09828)."""
    for layer in model.model.layers:
        nn.init.orthogonal_(layer.self_attn.v_proj.weight)
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
    first, size = model.model.layers[0].self_attn, model.config.hidden_size // model.config.num_attention_heads
    first.q_proj.weight[:size], first.k_proj.weight[:size], first.o_proj.weight[:, :size] = 0, 0, -first.o_proj.weight[:, :size]
    turn = 10_000.0 ** (-2 * torch.arange(3) / size)                # radians a position of the three fastest pairs of dimensions
    first.k_proj.bias[:3] = sharp
    first.q_proj.bias[:3], first.q_proj.bias[size // 2: size // 2 + 3] = sharp * turn.cos(), -sharp * turn.sin()

@contextlib.contextmanager
def loading(name):
    """Whatever transformers raises inside becomes one OSError that says what to do."""
    root = lambda e: root(e.__context__) if e.__context__ else e             # transformers' last word often hides what happened
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, safetensors.SafetensorError, huggingface_hub.errors.StrictDataclassError) as e:
        said = "; ".join(dict.fromkeys(str(x).strip().split("\n")[0] for x in (e, root(e))))
        raise OSError(f"the LLM '{name}' could not be loaded ({said}). Check name and network: the same command takes an interrupted download "
                      "up again, a gated model needs `hf auth login`, a damaged file must be deleted. Or give --llm PATH, or --llm tiny.") from e

def load(name, device="cpu", *, rank=16, checkpointing=False, compute=None, seed=0):
    """Any Hugging Face causal LM in NF4, the rest of it in dtype compute, with a new LoRA adapter `align`: (PeftModel, tokenizer)."""
    from peft import LoraConfig, get_peft_model
    compute = compute or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
    # load_in_4bit as a model argument is gone, and the config's defaults are fp4 without double quantisation (TRAPS 6)
    nf4 = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)
    with loading(name):
        # AutoTokenizer would silently split text by the rules of the model's type: the tiny LLM's are its own
        own = hf.models.auto.tokenization_auto.get_tokenizer_config(name).get("tokenizer_class") == "TokenizersBackend"
        tokenizer = (hf.PreTrainedTokenizerFast if own else hf.AutoTokenizer).from_pretrained(name, trust_remote_code=False)
        base = hf.AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4, dtype=compute, device_map={"": device},
                                                       trust_remote_code=False, use_safetensors=True)      # a pickle could run code
    later = "logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier"       # Granite, Cohere, Gemma 2, Falcon-H1
    if changed := [k for k in later if getattr(base.config, k, None) not in (None, 1)]:
        raise OSError(f"the LLM '{name}' changes its logits after the head ({changed[0]}); that is not supported, choose another --llm")
    # not prepare_model_for_kbit_training: it upcasts embeddings and head (TRAPS 5); peft freezes the base by itself
    for module in base.modules():    # every dropout 0: sampling, reference and update must be the same function (TRAPS 14)
        for rate in [n for n, v in vars(module).items() if ("drop" in n or n == "p") and isinstance(v, float)]:
            setattr(module, rate, 0.0)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear",
                                            task_type="CAUSAL_LM"), adapter_name="align", autocast_adapter_dtype=True)    # float32 LoRA (TRAPS 4)
    if checkpointing:   # reentrant, it drops every gradient where its input needs none, as here (TRAPS 5)
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token   # masks are carried, so pad may equal eos (TRAPS 10)
    set_mode(model, training=False)
    return model, tokenizer

def forecast(name, budget=32_768) -> dict:
    """{"here": on disk or whole in the cache, "parameters", "download_gb", "memory_gb"} of an LLM for load; nothing is fetched; None: unknown.
    Memory on CUDA by arithmetic, not measured: 0.9 GB a billion weights in 4 bits with adapters and Adam; 2 GB, and 0.75 GB a billion weights, for a
    pass of 32,768 tokens (keys, values, states): a line through Qwen2.5's shapes, 0.5B to 14B."""
    at = lambda file: pathlib.Path(name, file) if os.path.isdir(name) else pathlib.Path(str(huggingface_hub.try_to_load_from_cache(name, file) or ""))
    with loading(name), torch.device("meta"):
        if here := at("config.json").is_file():
            config, index = hf.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False), at("model.safetensors.index.json")
            files = {*json.loads(index.read_text())["weight_map"].values()} if index.is_file() else {"model.safetensors"}
            n, here = hf.AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters(), all(at(f).is_file() for f in files)
        else:
            said = re.search(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", os.path.basename(name), re.I)
            n = said and round(float(said[1]) * (1e9 if said[2] in "Bb" else 1e6))
    memory = n and 0.9e-9 * n + (2 + 0.75e-9 * n) * budget / 32768
    return {"here": here, "parameters": n, "download_gb": 0.0 if here else n and 2e-9 * n, "memory_gb": memory}

def set_mode(model, training: bool):
    """Training or evaluation mode, with the 4-bit layers always in training mode: one that runs once without repacks its weight on some CPUs for
    a kernel without autograd and stays so, LoRA gradients are then silently wrong by 90 % (TRAPS 1). It has no other use for the flag."""
    from bitsandbytes.nn import Linear4bit
    model.train(training)
    for module in (m for m in model.modules() if isinstance(m, Linear4bit)):
        module.training = True

causal_lm = lambda model: model.get_base_model() if hasattr(model, "get_base_model") else model       # within its adapters or without any
trainable = lambda model: [p for p in model.parameters() if p.requires_grad]

def use(model, adapter: str, trainable: bool = False):
    """Makes one adapter active; its LoRA weights take gradients only if trainable, everything else never does."""
    model.set_adapter(adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and "lora_" in name and f".{adapter}." in name)

def add_policy(model):
    """The adapter `policy`, a copy of `align`: PPO starts at its own reference."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    model.add_adapter("policy", model.peft_config["align"])
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="align", save_embedding_layers=False), "policy")

def save_adapter(model, out: str, name: str):
    """OUT/NAME, atomic, and without the empty model card that peft puts beside it."""
    part = os.path.join(out, "state", "adapter")
    model.save_pretrained(part, selected_adapters=[name], save_embedding_layers=False)          # "auto" would ask the hub
    shutil.rmtree(os.path.join(out, name), ignore_errors=True)
    os.replace(os.path.join(part, name), os.path.join(out, name))

def restore(model, folder: str, adapter: str):
    """Loads a saved adapter's weights into the adapter of that name (peft's load_adapter would end in model.eval(): TRAPS 1)."""
    from peft import set_peft_model_state_dict
    set_peft_model_state_dict(model, safetensors.torch.load_file(os.path.join(folder, adapter, "adapter_model.safetensors")), adapter)

# ------------------------------------------------------------------------------------------------- tokens and batches
MicroBatch = collections.namedtuple("MicroBatch", "rows ids starts mask")     # (b,), (b, T) and (b,) as drawn above, (b, R) answer tokens

@functools.lru_cache(maxsize=4)
def control_tokens(tokenizer):
    """A pattern of the special and added tokens, and the function that normalises a text before the tokenizer looks for some of them.
    Blanks (Gemma's newlines) are none, nor single characters (DeepSeek's letters) or words that are not special."""
    view = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None), "normalize_str", str)
    added = [t for t in tokenizer.added_tokens_decoder.values() if t.special or len(t.content) > 1 and not t.content.isalnum()]
    texts = [text for t in added for text in (t.content, view(t.content) if t.normalized else "") if re.search(r"[^\s\u2581]", text)]
    return re.compile("|".join(map(re.escape, texts)) or "(?!)"), view

def prompt_ids(tokenizer, prompt: str) -> list:
    """Token ids of a prompt, in the tokenizer's chat template where it has one. Titles are anybody's: a control token in them becomes a space."""
    pattern, view = control_tokens(tokenizer)
    while found := next(filter(pattern.search, (prompt, view(prompt))), None):
        prompt = pattern.sub(" ", found)
    if tokenizer.chat_template:
        return list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True)["input_ids"])
    return tokenizer(prompt + "\n")["input_ids"]

def draw(n: int, batch: int, rng):
    """Endless batches of row numbers below n: each comes once before any comes again."""
    rows = itertools.chain.from_iterable(rng.permutation(n).tolist() for _ in itertools.count())
    return iter(lambda: [*itertools.islice(rows, batch)], None)

def by_length(lengths, budget: int):
    """Index lists of similar length, each of at most `budget` padded tokens: little padding, bounded memory."""
    order, start = np.argsort(lengths, kind="stable").tolist(), 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[end]] * (end + 1 - start) > budget:
            yield order[start:end]
            start = end

def padded(rows: list, pad: int, left: bool = False):
    """Lists of token ids -> ids (B, T) padded at the end, or on the left; mask (B, T), True = real token."""
    fill = lambda rows, value: nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True, value, "left" if left else "right")
    return fill(rows, pad), fill([[True] * len(r) for r in rows], False)

def micro_batches(rows, prompts, answers, pad: int, device, size: int) -> list:
    """These rows of the tokenised prompts and answers; a micro-batch has rows of similar length: little padding."""
    rows = sorted(rows, key=lambda i: len(prompts[i]) + len(answers[i]))
    return [MicroBatch(*(x.to(device) for x in (
        torch.tensor(part), padded([prompts[i] + answers[i] for i in part], pad)[0], torch.tensor([len(prompts[i]) for i in part]),
        padded([answers[i] for i in part], pad)[1]))) for part in (rows[k: k + size] for k in range(0, len(rows), size))]

def token_logps(model, batch: MicroBatch, temperature: float = 1.0, value_head=None):
    """Log-probabilities (b, R) of the answer tokens, and their values (b, R) if a value head is given; padding means nothing.
    The one function for rollout, reference and update, or the first ratio is not 1 (TRAPS 3). Head on answers alone; float32 logsumexp (TRAPS 8)."""
    at = (batch.starts[:, None] + torch.arange(batch.mask.shape[1], device=batch.ids.device)).clamp(max=batch.ids.shape[1] - 1)
    states = causal_lm(model).base_model(input_ids=batch.ids, use_cache=False).last_hidden_state.take_along_dim(at[..., None] - 1, 1) # (b, R, D)
    logits = causal_lm(model).get_output_embeddings()(states).float() / temperature                        # (b, R, V)
    logp = logits.gather(-1, batch.ids.gather(1, at)[..., None]).squeeze(-1) - logits.logsumexp(-1)
    return logp, value_head(states.float()).squeeze(-1) if value_head is not None else None

# ----------------------------------------------------------------------------------- supervised training, generation
def supervise(model, tokenizer, samples, *, steps, batch=16, micro_batch=16, lr=1e-3, seed=0, name="align", state=None, save=lambda state: None):
    """Next-token training of the trainable weights on the answers of (prompt, answer) pairs, linear warm-up and decay: the last tenth's mean loss.
    A step's loss is summed over micro-batches and divided by its tokens. state, save: as in ppo, each twentieth of the way (TRAPS 19)."""
    device, parameters, losses = next(model.parameters()).device, trainable(model), []
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    if state:
        losses = [*state["losses"]]
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        nn.utils.vector_to_parameters(state["weights"].to(device, copy=True), parameters)
    prompts, answers = [prompt_ids(tokenizer, p) for p, _ in samples], [answer_ids(tokenizer, a) for _, a in samples]
    set_mode(model, training=True)
    todo = list(zip(range(steps), draw(len(samples), batch, np.random.default_rng([seed, 17]))))[len(losses):]
    for step, rows in (bar := tqdm(todo, desc=name, unit="step", initial=len(losses), total=steps, mininterval=1, disable=None)):
        tokens, total = sum(len(answers[i]) for i in rows), 0.0
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / max(1, min(20, steps // 10)), (steps - step) / (0.5 * steps))
        for part in micro_batches(rows, prompts, answers, tokenizer.pad_token_id, device, micro_batch):
            loss = -(token_logps(model, part)[0] * part.mask).sum() / tokens     # a sum over real tokens (TRAPS 15)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}")
        if len(losses) % max(1, steps // 20) == 0 or len(losses) == steps:
            save({"step": len(losses), "losses": losses, "weights": nn.utils.parameters_to_vector(parameters).detach(),
                  "optimizer": optimizer.state_dict()})
    set_mode(model, training=False)
    return float(np.mean(losses[-max(1, steps // 10):]))

def read_once(model, ids, mask):
    """Keys and values of left-padded prompts (B, P) but for their last tokens; equal rows are computed once and copied."""
    if ids.shape[1] == 1 or not all(hasattr(x, "batch_select_indices") for x in hf.DynamicCache(config=causal_lm(model).config).layers):
        return None                                      # a recurrent model has no keys to copy: generate reads every row
    once, back = torch.cat([ids, mask.long()], 1).unique(dim=0, return_inverse=True)
    ids, mask = (x[:, :-1] for x in once.chunk(2, 1))
    positions = (mask.cumsum(1) - 1).clamp(min=0)        # a left-padded row must equal the same row unpadded (TRAPS 10)
    cache = causal_lm(model).base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    cache.batch_select_indices(back)
    return cache

@torch.no_grad()
def answered(model, tokenizer, prompts, *, budget, name, beams=1, max_new=48, trie=None, **how):
    """Yields (prompt number, answers as token-id lists up to EOS) in batches of similar length, of at most `budget` padded tokens.
    how: of the GenerationConfig, replaced whole: checkpoints would fill what is unset (repetition_penalty, top_k = 50: TRAPS 2). trie: title_trie."""
    eos, pad, device = tokenizer.eos_token_id, tokenizer.pad_token_id, next(model.parameters()).device
    causal_lm(model).generation_config = hf.GenerationConfig(eos_token_id=eos, pad_token_id=pad, max_new_tokens=max_new, num_beams=beams,
                                                             num_return_sequences=beams, **how)
    rows = [prompt_ids(tokenizer, p) for p in prompts]
    with tqdm(total=len(rows), desc=name, unit="prompt", leave=False, mininterval=1, disable=None if name else True) as bar:
        for group in by_length([beams * (len(r) + max_new) for r in rows], budget):
            ids, mask = (x.to(device) for x in padded([rows[i] for i in group], pad, left=True))
            start, many = ids.shape[1], (x.repeat_interleave(beams, 0) for x in (ids, mask))
            allowed = trie and (lambda _, seen: [*trie.get(tuple(seen[start:].tolist()), [eos])])
            made = model.generate(input_ids=ids, attention_mask=mask.long(), past_key_values=read_once(model, *many), use_cache=True,
                                  prefix_allowed_tokens_fn=allowed)
            for i, answers in zip(group, made[:, start:].view(len(group), beams, -1).tolist()):
                yield i, [a[: a.index(eos) + 1] if eos in a else a for a in answers]     # nothing after EOS is real (TRAPS 11)
            bar.update(len(group))

def generate(model, tokenizer, prompts, *, max_new=48, temperature=1.0, budget=32_768, seed=0, name=None):
    """Samples one answer a prompt with the active adapter: (list of texts, list of sampled token-id lists).
    A prompt given several times is read once. A list ends with EOS unless max_new cut it off. name: for progress bar and throughput."""
    torch.manual_seed(seed)
    start, how = time.perf_counter(), {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    out = [answer for _, (answer,) in sorted(answered(model, tokenizer, prompts, max_new=max_new, budget=budget, name=name, **how))]
    if name:
        print(f"  {name}: {len(out):,} answers, {sum(map(len, out)) / (time.perf_counter() - start):,.0f} tokens/s")
    # a reward may see the texts up to EOS; the policy trains on the sampled ids themselves (TRAPS 17)
    return [t.strip() for t in tokenizer.batch_decode([[i for i in a if i != tokenizer.eos_token_id] for a in out])], out

def ask(model, tokenizer, adapter, prompts, **how) -> list:
    """The texts that an adapter answers; how: see generate."""
    use(model, adapter)
    return generate(model, tokenizer, prompts, **how)[0]

@torch.no_grad()
def encode(model, tokenizer, texts, *, budget=32_768) -> torch.Tensor:
    """Text vectors (len(texts), D) on CPU, adapters off: token means of the base model's input embeddings + 0.3 of its last hidden states', each of
    length 1: first and last layer (Su et al. 2021, arXiv 2103.15316) keep the words that the last one has traded for its guess of the next."""
    rows = [tokenizer(" " + t, add_special_tokens=False)["input_ids"][:256] or [tokenizer.eos_token_id] for t in texts]
    found, device = {}, next(model.parameters()).device
    with model.disable_adapter():
        for group in tqdm([*by_length([len(r) for r in rows], budget)], desc="text vectors", unit="batch", leave=False, delay=2, disable=None):
            ids, mask = (x.to(device) for x in padded([rows[i] for i in group], tokenizer.pad_token_id))
            first, last = model.get_input_embeddings()(ids), causal_lm(model).base_model(input_ids=ids, use_cache=False).last_hidden_state
            both = torch.cat([first, last], -1).float() * mask[..., None]
            found.update(zip(group, (both.sum(1) / mask.sum(1, keepdim=True)).cpu()))
    use(model, model.active_adapter)              # disable_adapter has left it trainable; PPO makes it so where it learns
    first, last = torch.stack([found[i] for i in range(len(rows))]).chunk(2, -1)
    return nn.functional.normalize(first, dim=-1) + 0.3 * nn.functional.normalize(last, dim=-1)

# ------------------------------------------------------------------------------------------- the LLM as a recommender
def answer_ids(tokenizer, answer: str) -> list:
    """Token ids of an answer, EOS after each of its lines: generation stops at the first."""
    return [i for line in answer.split("\n") for i in (*tokenizer(" " + line, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)]

@torch.no_grad()
def likelihood(model, tokenizer, samples, size=64) -> torch.Tensor:
    """log p(answer | prompt) of (prompt, answer) pairs with the active adapter, `size` pairs a pass: (len(samples),) on CPU."""
    prompts, answers, out = [prompt_ids(tokenizer, p) for p, _ in samples], [answer_ids(tokenizer, a) for _, a in samples], torch.empty(len(samples))
    for part in micro_batches(range(len(samples)), prompts, answers, tokenizer.pad_token_id, next(model.parameters()).device, size):
        out[part.rows.cpu()] = (token_logps(model, part)[0] * part.mask).sum(1).cpu()
    return out

def title_trie(tokenizer, titles):
    """({token ids of a title with its end: its number}, {ids so far: ids that may follow}). A title that reads like another is refused."""
    paths, trie = {tuple(answer_ids(tokenizer, t)): k for k, t in enumerate(titles)}, {}
    if len(paths) < len(titles):
        raise ValueError("two titles are the same tokens: one of them could never be retrieved")
    for path, k in ((path, k) for path in paths for k in range(len(path))):
        trie.setdefault(path[:k], set()).add(path[k])
    return paths, trie

def retrieve(model, tokenizer, prompts, paths, trie, *, beams=20, budget=32_768, name=None) -> torch.Tensor:
    """The likeliest titles of a title_trie by beam search: their numbers, best first, (len(prompts), beams); -1: none left.
    No other text can come out: a beam outside the trie has probability 0, but has to go on. Scores are log-probabilities as in likelihood."""
    out = torch.full((len(prompts), beams), -1)
    for i, answers in answered(model, tokenizer, prompts, budget=budget, name=name, beams=beams, max_new=max(map(len, paths)),
                               trie=trie, do_sample=False, length_penalty=0.0):
        found = dict.fromkeys(paths.get(tuple(a), -1) for a in answers)        # with few titles left, beams repeat some
        out[i, : len(found)] = torch.tensor([*found])
    return out

# ------------------------------------------------------------------------------------ PPO: its maths, then its loop
def whiten(x, mask):
    """Zero mean, unit variance over real tokens; padding stays 0."""
    x = (x - x[mask].mean()).masked_fill(~mask, 0)
    return x * (x[mask].square().mean() + 1e-8).rsqrt()

def gae(rewards, values, mask, lam: float = 0.95):
    """Advantages and returns (B, R) with gamma = 1; the value after a row's last real token is 0, padding stays 0."""
    advantages, last, after = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        last = (rewards[:, t] + after - values[:, t] + lam * last) * mask[:, t]
        after, advantages[:, t] = values[:, t] * mask[:, t], last
    return advantages, (advantages + values) * mask      # returns from unwhitened advantages (TRAPS 13)

def ppo_loss(logp, values, old_logp, advantages, old_values, returns, mask, tokens, clip=0.2, value_coef=0.1):
    """Clipped policy and value losses as a sum over real tokens / `tokens` (of the whole minibatch); and statistics."""
    logratio = ((logp - old_logp) * mask).clamp(-20, 20)
    ratio = logratio.exp()
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    value = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    loss = ((policy + value_coef * value) * mask).sum() / tokens
    stats = {"ratio": ratio, "approx_kl": ratio - 1 - logratio, "clipfrac": (ratio - 1).abs() > clip}
    return loss, {k: ((v * mask).sum() / tokens).item() for k, v in stats.items()}

@torch.no_grad()
def look_back(model, forward, parts, mask):
    """Before any update: reference and old log-probabilities and old values, each (B, R), padding 0."""
    out = torch.zeros(3, *mask.shape, device=mask.device)
    for k, adapter in enumerate(("align", "policy")):                    # the values that stay are the policy's
        use(model, adapter, trainable=adapter == "policy")
        for part in parts:
            out[k, part.rows, : part.mask.shape[1]], out[2, part.rows, : part.mask.shape[1]] = forward(part)
    return out * mask

def learn(forward, parameters, optimizer, rollout, minibatches, rng, epochs, kl_stop):
    """Several epochs of clipped updates on one rollout, (old_logp, advantages, old_values, returns); one dict a step."""
    steps = []
    for parts in (minibatches[k] for _ in range(epochs) for k in rng.permutation(len(minibatches))):
        tokens, stats = sum(part.mask.sum() for part in parts), []
        for part in parts:
            logp, values = forward(part)
            loss, found = ppo_loss(logp, values, *(x[part.rows, : logp.shape[1]] for x in rollout), part.mask, tokens)
            loss.backward()
            stats.append(found | {"loss": loss.item()})
        step = {k: sum(s[k] for s in stats) for k in stats[0]}
        step["grad_norm"] = nn.utils.clip_grad_norm_(parameters, 1.0).item()
        step["skipped"] = not np.isfinite(step["loss"] + step["grad_norm"]) or step["ratio"] > 10
        if not (step["skipped"] or step["approx_kl"] > kl_stop):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(step)
        if step["approx_kl"] > kl_stop:                                                          # TRAPS 16
            break
    return steps

def summary(raw, scores, kl, old_logp, returns, old_values, mask, finished, steps) -> dict:
    """A line of ppo.jsonl: means over an update's answers (kl: nats a sequence, entropy: -log p of a sampled token) and steps."""
    return {"reward": raw.mean().item(), "reward_std": raw.std().item(), "score": scores.mean().item(), "kl": kl.sum(1).mean().item(),
            "entropy": -old_logp[mask].mean().item(), "explained_variance": 1 - ((returns - old_values)[mask].var() / returns[mask].var().clamp(min=1e-8)).item(),
            **{k: float(np.mean([s[k] for s in steps])) for k in steps[0]}, "first_ratio": steps[0]["ratio"], "steps": len(steps),
            "skipped": sum(s["skipped"] for s in steps), "eos_rate": finished.float().mean().item(), "length": mask.sum(1).float().mean().item()}

def ppo(model, tokenizer, prompts, reward_fn, *, updates, batch=64, minibatch=32, micro_batch=32, epochs=2, lr=5e-4,
        value_lr=1e-2, beta=0.05, kl_target=6.0, kl_stop=0.03, no_eos_penalty=1.0, max_new=32, temperature=1.0, lam=0.95,
        budget=32_768, seed=0, state=None, save=lambda state: None):
    """Trains the adapter `policy` (see add_policy) on reward_fn(texts, rows) -> (B,) tensor; rows index prompts.
    beta: weight of the per-token KL to `align`, adapted towards kl_target nats a sequence, fixed if that is 0. kl_stop: per-token KL to the
    rollout policy at which an update ends. no_eos_penalty: taken from an unfinished answer's scaled score. budget: see generate. save: called
    after every update with all that it takes to go on, live: store it at once; it comes back as `state` (TRAPS 19). Returns the log, a dict an update."""
    device, encoded, log, scale = next(model.parameters()).device, [prompt_ids(tokenizer, p) for p in prompts], [], None
    use(model, "policy", trainable=True)
    head = nn.Linear(model.config.hidden_size, 1).to(device)     # float32; zero: values start unbiased (TRAPS 14)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    parameters = [*trainable(model), *head.parameters()]         # Adam as in TRAPS 16
    optimizer = torch.optim.AdamW([{"params": parameters[:-2], "lr": lr}, {"params": parameters[-2:], "lr": value_lr}], eps=1e-5, weight_decay=0.0)
    if state:
        log, beta, scale = [*state["log"]], state["beta"], state["scale"]
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        nn.utils.vector_to_parameters(state["weights"].to(device, copy=True), parameters)
    todo = list(zip(range(updates), draw(len(prompts), batch, np.random.default_rng([seed, 19]))))[len(log):]
    for update, rows in (bar := tqdm(todo, desc="PPO", unit="update", initial=len(log), total=updates, mininterval=1, disable=None)):
        rng, start = np.random.default_rng([seed, 19, update]), time.perf_counter()      # so no random state needs saving (TRAPS 19)
        set_mode(model, training=False)                          # 1. sample answers
        texts, answers = generate(model, tokenizer, [prompts[i] for i in rows], max_new=max_new, temperature=temperature, budget=budget,
                                  seed=int(rng.integers(2 ** 31)))
        raw = reward_fn(texts, rows).float().to(device)          # 2. score them
        if scale is None and 1e-6 < raw.std().item() < float("inf"):
            scale = 1.0 / raw.std().item()                       # once, by the first spread there is (TRAPS 13)
        finished = torch.tensor([a[-1] == tokenizer.eos_token_id for a in answers], device=device)
        scores = raw * (scale or 1.0) - no_eos_penalty * ~finished
        mask = padded(answers, 0)[1].to(device)                  # 3. old and reference log-probabilities, values; same micro-batches always (TRAPS 3)
        minibatches = [micro_batches(some, [encoded[i] for i in rows], answers, tokenizer.pad_token_id, device, micro_batch)
                       for some in np.split(rng.permutation(batch), range(minibatch, batch, minibatch))]
        forward = lambda part: token_logps(model, part, temperature, head)
        ref_logp, old_logp, old_values = look_back(model, forward, sum(minibatches, []), mask)
        kl = old_logp - ref_logp         # 4. per-token rewards: the KL penalty everywhere, the score on the last real token (TRAPS 12)
        rewards = -beta * kl
        rewards[torch.arange(batch), mask.sum(1) - 1] += scores
        advantages, returns = gae(rewards, old_values, mask, lam)
        set_mode(model, training=True)                           # 5. several epochs of clipped updates
        steps = learn(forward, parameters, optimizer, (old_logp, whiten(advantages, mask), old_values, returns), minibatches, rng, epochs, kl_stop)
        row = summary(raw, scores, kl, old_logp, returns, old_values, mask, finished, steps)             # 6. log, adapt beta
        log.append({"update": update, "beta": beta, **row, "tokens_per_s": mask.sum().item() / (time.perf_counter() - start)})
        beta *= 1 + float(np.clip(row["kl"] / kl_target - 1, -0.2, 0.2)) * 0.1 if kl_target else 1
        save({"log": log, "beta": beta, "scale": scale, "weights": nn.utils.parameters_to_vector(parameters).detach(), "optimizer": optimizer.state_dict()})
        bar.set_postfix_str(f"reward {row['reward']:+.3f} KL {row['kl']:.2f}")
    set_mode(model, training=False)
    use(model, "policy")
    return log
