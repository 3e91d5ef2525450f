"""rl.py: parity with plain transformers and peft first, then invariants, then small training runs.

    pytest tests/test_rl.py        no GPU, no download; one tiny model, trained for nine steps, serves every test

Each docstring names the bug that the test guards against; TRAPS n is the entry of that number in the notes on QLoRA and PPO.
"""
import contextlib
import copy
import hashlib
import http.server
import importlib.util
import io
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import warnings

import huggingface_hub
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import (AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, BloomConfig, Gemma2Config, GenerationConfig, GPT2Config,
                          GPTNeoXConfig, GraniteConfig, Lfm2Config, LlamaConfig, OPTConfig, PreTrainedTokenizerFast, Qwen2Config)

import rl

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
WORDS = "red green blue old calm loud warm dark".split()
TAG = "<reason>"


def pairs(n, seed=0):
    """Prompts of 1 to 12 words with answers of 1 to 4: ragged on both sides."""
    rng = np.random.default_rng(seed)
    some = lambda most: " ".join(rng.choice(WORDS, int(rng.integers(1, most + 1))))
    return [(some(12), some(4)) for _ in range(n)]


PROMPTS = [p for p, _ in pairs(24, seed=1)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("llm") / "tiny")
    samples = pairs(200)
    rl.train_tiny(path, [p for p, _ in samples], [("a few", samples, 3), ("more", samples, 6)], [TAG], batch=16, lr=1e-2, width=64, vocab=512)
    return path


def test_a_model_in_lower_case_reads_a_title_as_its_reason_says_it(tmp_path):
    """Guards: capitals that hide from a model of nothing that 'Nail Brush' is what 'nail brush' names."""
    rl.train_tiny(str(tmp_path / "low"), ["Nail Brush nail brush"] * 9, [("one", [("Nail", "nail")], 1)], [TAG], lower=True, width=64, vocab=300)
    _, tokenizer = rl.load(str(tmp_path / "low"))
    assert tokenizer(" Nail Brush")["input_ids"] == tokenizer(" nail brush")["input_ids"] and tokenizer(TAG)["input_ids"] == tokenizer.convert_tokens_to_ids([TAG])


def fresh(path, policy=True, noise=0.05, **settings):
    """(model, tokenizer) of its own for a test that changes weights; `align` made non-zero, so that an adapter matters."""
    torch.manual_seed(0)
    model, tokenizer = rl.load(path, rank=4, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=noise)
    if policy:
        rl.add_policy(model)
    return model, tokenizer


@pytest.fixture(scope="session")
def shared(tiny):
    """For tests that change no weight. They choose adapter and mode themselves."""
    return fresh(tiny)


def adapter(model, name):
    return {k.replace(f".{name}.", "."): v.detach().clone() for k, v in model.named_parameters() if f".{name}." in k}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def batch_of(tokenizer, n=8):
    """n ragged pairs as one micro-batch; answers end with EOS."""
    samples = pairs(n, seed=3)
    prompts = [rl.prompt_ids(tokenizer, p) for p, _ in samples]
    answers = [tokenizer(" " + a, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for _, a in samples]
    return rl.micro_batches(range(n), prompts, answers, tokenizer.pad_token_id, "cpu", n)[0]


def cut(batch, size):
    """The same rows in smaller micro-batches of the same width."""
    return [rl.MicroBatch(*x) for x in zip(*(x.split(size) for x in batch))]


def alone(batch, i):
    """Row i without its padding."""
    n = int(batch.mask[i].sum())
    return rl.MicroBatch(batch.rows[i: i + 1], batch.ids[i: i + 1, : batch.starts[i] + n], batch.starts[i: i + 1], batch.mask[i: i + 1, :n])


def by_row(texts, rows):
    """A reward with a known spread that depends on no text."""
    return torch.tensor([float(i % 5) for i in rows])


def run(model, tokenizer, reward=by_row, **settings):
    """One small PPO run; returns its log."""
    settings = dict(updates=1, batch=8, minibatch=4, micro_batch=4, max_new=6, lr=5e-3) | settings
    return rl.ppo(model, tokenizer, PROMPTS, reward, **settings)


def spy(monkeypatch, name):
    """Records (arguments, result) of every call of a function of rl."""
    calls, original = [], getattr(rl, name)

    def wrapper(*args, **settings):
        result = original(*args, **settings)
        calls.append((args, settings, result))
        return result
    monkeypatch.setattr(rl, name, wrapper)
    return calls


# ------------------------------------------------------------------------------------------------------------ loading
def test_tiny_model_fits_the_4bit_kernels(tiny, shared):
    """Layer shapes that the packed CPU kernel refuses (TRAPS 1); markup split into many tokens."""
    model, tokenizer = shared
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 2 * 7 and all(m.out_features % 32 == 0 and m.in_features % 64 == 0 for m in layers)
    assert len(tokenizer(TAG)["input_ids"]) == 1
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_base_is_nf4_double_quantised_and_lora_is_fp32(shared):
    """bitsandbytes' defaults: fp4, no double quantisation (TRAPS 6); bf16 LoRA weights (TRAPS 4); a base that trains."""
    model, _ = shared
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            assert state.quant_type == "nf4" and state.nested and module.compute_dtype == torch.float32
    rl.use(model, "policy", trainable=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name and ".policy." in name), name
        if "lora_" in name:
            assert parameter.dtype == torch.float32, name
    rl.use(model, "align")
    assert not rl.trainable(model)


def test_bfloat16_stays_where_it_belongs(tiny):
    """On a GPU: LoRA weights in bfloat16 (TRAPS 4), embeddings and head in float32 (TRAPS 5), log-probabilities in bfloat16 (TRAPS 8)."""
    model, tokenizer = fresh(tiny, compute=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32, name
    assert model.get_input_embeddings().weight.dtype == model.get_output_embeddings().weight.dtype == torch.bfloat16
    logp, values = rl.token_logps(model, batch_of(tokenizer), value_head=torch.nn.Linear(64, 1))
    assert logp.dtype == values.dtype == torch.float32 and not torch.equal(logp, logp.bfloat16().float())
    row, = run(model, tokenizer, epochs=1)
    assert row["first_ratio"] == pytest.approx(1, abs=1e-2) and not row["skipped"]


SIZE = dict(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, eos_token_id=1, pad_token_id=0,
            bos_token_id=None)
GPT2 = dict(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=256, eos_token_id=1, bos_token_id=1)
HALF = dict(attention_dropout=0.5, hidden_dropout=0.5)


def untrained(config, tiny, folder):
    """A model of another kind with random weights, from a folder on disk; the tokenizer is the tiny model's."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return rl.load(str(folder))


@pytest.mark.parametrize("config", [
    LlamaConfig(**SIZE, intermediate_size=128, attention_dropout=0.5),
    GPT2Config(**GPT2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    GPTNeoXConfig(**SIZE, intermediate_size=128, **HALF),
    pytest.param(OPTConfig(**SIZE, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=256, dropout=0.5,
                           attention_dropout=0.5, layerdrop=0.5)),
    BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4, eos_token_id=1, pad_token_id=0, **HALF),
], ids=lambda c: c.model_type)
def test_no_dropout_is_left(config, tiny, tmp_path):
    """Sampling, reference and update become different functions where any dropout survives (TRAPS 14)."""
    model, tokenizer = untrained(config, tiny, tmp_path)
    assert all(m.p == 0.0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    out = []
    for training in (False, True):
        rl.set_mode(model, training)
        out.append(rl.token_logps(model, batch_of(tokenizer))[0])
    assert torch.equal(*out)


def test_the_line_about_kernels_is_silent(tiny, caplog):
    """A first impression that tells people to install a package that fetches remote code (TRAPS 9)."""
    rl.load(tiny)
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load: please pip install kernels")
    assert not caplog.records
    code = "import sys, rl; rl.load(sys.argv[1])"       # speaks, where it does, when it is first imported
    assert "kernels" not in subprocess.run([sys.executable, "-c", code, tiny], capture_output=True, text=True, check=True,
                                        cwd=pathlib.Path(rl.__file__).parent).stderr


@pytest.mark.parametrize("empty", [False, True])
def test_a_missing_model_says_what_to_do(empty, tmp_path):
    """A bare traceback from the depths of a library for a mistyped name."""
    path = tmp_path / "no" / "such" / "model"
    if empty:
        path.mkdir(parents=True)
    with pytest.raises(OSError, match="(?s)such/model.*could not be loaded.*--llm PATH.*--llm tiny"):
        rl.load(str(path))


def test_a_damaged_file_says_what_to_do(tiny, tmp_path):
    """A safetensors file cut off by a full disk: its error is no OSError."""
    path = shutil.copytree(tiny, tmp_path / "llm")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="could not be loaded.*not fully covered.*damaged file must be deleted"):
        rl.load(str(path))


@pytest.fixture
def hub(tiny):
    """A Hugging Face hub on this machine: org/gated is refused, org/broken breaks off in the middle of the weights."""
    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            file = pathlib.Path(tiny, self.path.split("?")[0].split("/")[-1])
            data = file.read_bytes() if "/resolve/" in self.path and file.is_file() else b""
            gated = "gated" in self.path
            self.send_response(403 if gated else 200 if data else 404)
            headers = {"X-Error-Code": "GatedRepo" if gated else "EntryNotFound"} if gated or not data else {
                "X-Repo-Commit": "0" * 40, "ETag": hashlib.sha256(data).hexdigest(), "Content-Length": len(data)}
            for k, v in ({"Content-Length": 0} | headers).items():
                self.send_header(k, str(v))
            self.end_headers()
            if body and not gated:
                self.wfile.write(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
                self.close_connection = True
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("name, said", [("org/gated", "gated repo.*403.*hf auth login"), ("org/broken", "same command takes an interrupted download up")])
def test_a_refused_or_broken_download_says_what_to_do(hub, name, said, tmp_path):
    """A traceback, or silence, where a licence must be accepted or the line was cut. A process of its own: the hub's address is read once."""
    code = f"import sys; sys.path.insert(0, {str(pathlib.Path(rl.__file__).parent)!r}); import rl; rl.load({name!r})"
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and re.search(rf"OSError: the LLM '{name}' could not be loaded.*{said}", last), done.stderr[-3000:]


def test_a_pickle_or_code_from_a_repository_is_never_run(tiny, tmp_path):
    """Guards: weights as a pickle, or a model class as a Python file beside the config: whoever wrote the repository runs code here."""
    path = shutil.copytree(tiny, tmp_path / "pickle")
    torch.save(AutoModelForCausalLM.from_pretrained(tiny).state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="could not be loaded.*model.safetensors"):
        rl.load(str(path))
    for file in ("config.json", "tokenizer_config.json"):
        path = shutil.copytree(tiny, tmp_path / file)
        (path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass C: pass\n")
        auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"]}
        kept = json.loads((path / file).read_text()) | {"auto_map": auto, "model_type": "mine", "tokenizer_class": "C"}
        (path / file).write_text(json.dumps(kept))
        with pytest.raises(OSError, match="could not be loaded") if file == "config.json" else contextlib.suppress(OSError):
            rl.load(str(path))
    with pytest.raises(OSError, match="could not be loaded"):
        rl.forecast(str(tmp_path / "config.json"))
    assert not (tmp_path / "run").exists()


BIG = Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, vocab_size=151_936,
                  tie_word_embeddings=True)                                                               # Qwen2.5-1.5B


@pytest.fixture
def offline(monkeypatch):
    """Whoever connects fails."""
    def connect(*_):
        raise AssertionError("a forecast asked the network")
    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.parametrize("config", [
    LlamaConfig(**SIZE, intermediate_size=128), GPT2Config(**GPT2), Qwen2Config(**SIZE, intermediate_size=128, tie_word_embeddings=True),
    BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4)], ids=lambda c: c.model_type)
def test_a_forecast_counts_the_parameters_of_a_model_on_disk(config, tmp_path, offline):
    """Guards: tied weights counted twice; a folder without weights, or with one shard of two, that counts as there."""
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards, n = sorted(tmp_path.glob("*.safetensors")), sum(p.numel() for p in model.parameters())
    found = rl.forecast(str(tmp_path))
    assert found | {"memory_gb": 0} == {"here": True, "parameters": n, "download_gb": 0.0, "memory_gb": 0}
    assert len(shards) > 1 and rl.forecast(str(tmp_path), budget=65_536)["memory_gb"] > 1.5 * found["memory_gb"]
    shards[-1].unlink()
    assert rl.forecast(str(tmp_path)) == found | {"here": False, "download_gb": pytest.approx(2e-9 * n)}


def test_a_forecast_from_a_config_alone_agrees_with_one_from_the_name(tmp_path, offline):
    """Guards: a memory estimate that leaves out a part (README: 0.7 + 0.5 + 0.4 + 3.5 GB), or two rules that contradict each other."""
    BIG.save_pretrained(tmp_path)
    found, said = rl.forecast(str(tmp_path)), rl.forecast("Qwen/Qwen2.5-1.5B-Instruct")
    assert not found["here"] and found["parameters"] == 1_543_714_304 and found["download_gb"] == pytest.approx(3.1, abs=0.02)
    assert found["memory_gb"] == pytest.approx(4.9, abs=0.5) and said["memory_gb"] == pytest.approx(found["memory_gb"], rel=0.05)
    assert said["parameters"] == 1_500_000_000 and said["download_gb"] == pytest.approx(3.0) and not said["here"]
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", ')
    for look in (rl.forecast, rl.load):
        with pytest.raises(OSError, match="could not be loaded.*damaged file must be deleted"):
            look(str(tmp_path))


@pytest.mark.parametrize("name, billions", [
    ("org/Mistral-7b-v0.1", 7), ("bloom-560m", 0.56), ("SmolLM2_135M_x", 0.135), ("org/phi-2", None), ("org-7B/phi", None), ("Qwen3-30B-A3B", 30),
    ("opt-1.3b", 1.3), ("mini-4bit", None), ("v1.5B", None), ("x-500Mb", None)])
def test_a_size_is_read_from_a_name_that_tells_it(name, billions, offline):
    """Guards: a version, a number of bits or an organisation taken for a size."""
    found = rl.forecast(name)
    assert not found["here"] and found["parameters"] == (None if billions is None else round(billions * 1e9))
    assert (found["memory_gb"] is None) == (found["download_gb"] is None) == (billions is None)


def test_a_forecast_sees_what_the_cache_holds(tiny, tmp_path, monkeypatch, offline):
    """Guards: a download announced for a model that is there, or none for one whose weights are missing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for repo, files in (("whole-7B", ("config.json", "model.safetensors")), ("half-7B", ("config.json",))):
        snapshot = tmp_path / f"models--org--{repo}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (tmp_path / f"models--org--{repo}" / "refs").mkdir()
        (tmp_path / f"models--org--{repo}" / "refs" / "main").write_text("0" * 40)
        for file in files:
            shutil.copy(f"{tiny}/{file}", snapshot / file)
    whole, half, none = (rl.forecast(f"org/{repo}-7B") for repo in ("whole", "half", "none"))
    assert whole["here"] and whole["download_gb"] == 0.0 and whole["parameters"] == half["parameters"] < 1e6
    assert not half["here"] and half["download_gb"] > 0 and not none["here"] and none["parameters"] == 7e9
    with pytest.raises(OSError, match="could not be loaded"):
        rl.forecast(str(tmp_path / "no" / "such" / "model"))


@pytest.mark.parametrize("config", [GraniteConfig(**SIZE, intermediate_size=128, logits_scaling=8.0),
                                    Gemma2Config(**SIZE, intermediate_size=128, head_dim=16)], ids=lambda c: c.model_type)
def test_a_model_that_changes_its_logits_after_the_head_is_refused(config, tiny, tmp_path):
    """token_logps would train another distribution than it samples, and no figure would show it: the first ratio is still 1."""
    with pytest.raises(OSError, match="changes its logits after the head.*choose another --llm"):
        untrained(config, tiny, tmp_path)


def test_a_recurrent_model_generates_without_copied_keys(tiny, tmp_path):
    """A crash on models that have no keys and values to copy."""
    model, tokenizer = untrained(Lfm2Config(**SIZE, intermediate_size=128, num_key_value_heads=2, layer_types=["conv", "full_attention"]), tiny, tmp_path)
    ids, mask = rl.padded([rl.prompt_ids(tokenizer, p) for p in PROMPTS[:2]], 0, left=True)
    assert rl.read_once(model, ids, mask) is None and len(rl.generate(model, tokenizer, PROMPTS[:2] * 2, max_new=3)[1]) == 4


def test_adapters_off_equal_base_logits(tiny, shared):
    """Loading or set_mode changed the base model."""
    model, tokenizer = shared
    batch = dict(input_ids=batch_of(tokenizer).ids)
    plain = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=nf4(), dtype=torch.float32)
    rl.use(model, "align"), rl.set_mode(model, training=False), rl.set_mode(plain, training=False)
    with torch.no_grad(), model.disable_adapter():
        ours, theirs = model(**batch).logits, plain(**batch).logits
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, theirs, atol=1e-2)


def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.float32)


def test_saved_adapter_loads_in_plain_peft(tiny, shared, tmp_path):
    """A checkpoint that only this code can read; `policy` weights saved under the name `align`."""
    from peft import PeftModel
    model, tokenizer = shared
    model.save_pretrained(str(tmp_path), selected_adapters=["align"])
    assert not (tmp_path / "policy").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=nf4(), dtype=torch.float32)
    rl.set_mode(plain := PeftModel.from_pretrained(base, str(tmp_path / "align")), training=False)
    rl.use(model, "align"), rl.set_mode(model, training=False)
    with torch.no_grad():
        ours, theirs = (m(input_ids=batch_of(tokenizer).ids).logits for m in (model, plain))
    assert torch.equal(ours, theirs)


def test_restore_returns_the_saved_weights_to_their_adapter_only(tiny, tmp_path):
    """A resumed run that continues from fresh weights, or writes one adapter over the other."""
    model, _ = fresh(tiny)
    before = adapter(model, "policy")
    model.save_pretrained(str(tmp_path), selected_adapters=["policy"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)
    shifted = adapter(model, "align")
    rl.restore(model, str(tmp_path), "policy")
    assert same(adapter(model, "policy"), before) and same(adapter(model, "align"), shifted)


def test_add_policy_copies_exactly_and_shares_nothing(tiny):
    """PPO that starts away from its reference, or a reference that moves along with the policy."""
    model, _ = fresh(tiny)
    assert len(adapter(model, "align")) == 2 * 14 and same(adapter(model, "align"), adapter(model, "policy"))
    before = adapter(model, "align")
    rl.use(model, "policy", trainable=True)
    with torch.no_grad():
        for parameter in rl.trainable(model):
            parameter.add_(1.0)
    assert same(adapter(model, "align"), before) and not same(adapter(model, "policy"), before)


def test_add_policy_asks_nothing_of_disk_or_hub(tiny, tmp_path):
    """peft's default looks whether the vocabulary was changed, on the hub where the model came from there: a wait, or a warning."""
    model, _ = fresh(str(shutil.copytree(tiny, tmp_path / "llm")), policy=False)
    shutil.rmtree(tmp_path / "llm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.add_policy(model)


def test_a_new_tiny_llm_copies_and_looks_one_token_back():
    """Guards: a head start that rotary positions or another order of the heads has turned into noise."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=4, attn_implementation="eager")).eval()
    rl.head_start(model)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert torch.allclose(second.o_proj.weight @ second.v_proj.weight, torch.eye(64), atol=1e-5), "what is looked at is written as it is"
    kept = torch.linalg.eigvals(first.o_proj.weight @ first.v_proj.weight).real.sort().values
    assert torch.allclose(kept, torch.cat([-torch.ones(16), torch.ones(48)]), atol=1e-4), "but head 0 takes it away"
    with torch.no_grad():
        looks = model(torch.randint(64, (2, 40)), output_attentions=True).attentions[0][:, 0]                  # head 0: (2, 40, 40)
    assert (looks.diagonal(-1, 1, 2) > .5).all() and (looks.argmax(-1)[:, 1:] == torch.arange(39)).all()


# ----------------------------------------------------------------------------------------------- gradients, TRAPS 1
def lora_gradients(model, batch):
    rl.use(model, "policy", trainable=True)
    rl.set_mode(model, training=True)
    model.zero_grad(set_to_none=True)
    rl.token_logps(model, batch)[0].mean().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}


def test_4bit_layers_stay_in_training_mode(shared):
    """Linear4bit in eval mode repacks its weight on some CPUs: LoRA gradients then 90 % wrong, silently (TRAPS 1)."""
    model, _ = shared
    for training in (True, False):
        rl.set_mode(model, training)
        assert model.training == training and model.get_base_model().training == training
        assert all(m.training for m in model.modules() if isinstance(m, Linear4bit))


def test_lora_gradients_equal_before_and_after_a_rollout(tiny, monkeypatch):
    """The same, end to end. A CPU without that kernel is told that it has it; asking for the repacking is then an error."""
    def repack(*_):
        raise AssertionError("a 4-bit weight was repacked for the kernel without autograd")
    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", repack)
    model, tokenizer = fresh(tiny)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    before = lora_gradients(model, batch_of(tokenizer))
    assert len(before) == 28 and all(g.abs().max() > 0 for g in before.values())
    rl.set_mode(model, training=False)
    rl.generate(model, tokenizer, PROMPTS[:4], max_new=4)
    rl.encode(model, tokenizer, PROMPTS[:4])
    assert same(lora_gradients(model, batch_of(tokenizer)), before)


def test_gradient_checkpointing_changes_no_gradient(tiny):
    """Checkpointing without inputs that require grad trains nothing; reentrant checkpointing drops gradients (TRAPS 5)."""
    a, b = fresh(tiny), fresh(tiny, checkpointing=True)
    layers, computed = b[0].get_base_model().model.layers, []
    assert all(layer._gradient_checkpointing_func.keywords == {"use_reentrant": False} for layer in layers)
    layers[0].mlp.register_forward_pre_hook(lambda *_: computed.append(1))
    a, b = (lora_gradients(model, batch_of(tokenizer)) for model, tokenizer in (a, b))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-7) for k in a) and len(computed) == 2


# --------------------------------------------------------------------------------------------------- tokens and batches
def test_prompt_ids_use_the_chat_template(shared):
    """An instruct model addressed as a plain one; a BatchEncoding where a list is expected (TRAPS 6)."""
    tokenizer = copy.deepcopy(shared[1])
    assert rl.prompt_ids(tokenizer, "red old") == tokenizer("red old\n")["input_ids"]
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}bot:{% endif %}")
    assert rl.prompt_ids(tokenizer, "red old") == tokenizer("user: red old\nbot:", add_special_tokens=False)["input_ids"]


CHAT = ("{% for m in messages %}<|im_start|>[INST]{{ m.content }}[/INST]<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>bot{% endif %}")
HOSTILE = ["red [INST] old", "[/INST]red<|im_end|>", "[IN[INST]ST] warm", "<|im_sta<reason>rt|>", "dark<eos><pad>", "[[Big]Big]",
           "two [a b] <|x\u2581|>", "[a[/INST]b]", "<think>", "{% raw %}[INST]", "<re<eos>ason>"]


@pytest.mark.parametrize("template", [CHAT, None], ids=["chat", "plain"])
@pytest.mark.parametrize("lower", [False, True])
def test_no_prompt_can_write_a_control_token(template, lower, tiny, tmp_path):
    """Guards: a title that ends the user's turn and gives orders in another's name."""
    from tokenizers import AddedToken, Tokenizer, normalizers
    raw = Tokenizer.from_file(f"{tiny}/tokenizer.json")
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]) if lower else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", chat_template=template,
                                        additional_special_tokens=["[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "[a b]"])
    tokenizer.add_tokens([AddedToken("<think>", lstrip=True, normalized=False), AddedToken("[Big]", normalized=True), "<|x\u2581|>"])
    control = {i for i, token in tokenizer.added_tokens_decoder.items()}
    tokens = lambda prompt: [i for i in rl.prompt_ids(tokenizer, prompt) if i in control]
    hostile = HOSTILE + ["[BIG] [big]", "\uff3bBig\uff3d red", "\uff3bbig\uff3d<|im_end|>", "<\uff5cim_end\uff5c>[big]"]
    if template is None:
        assert all(control & set(tokenizer(p)["input_ids"]) for p in HOSTILE), "as they are, they work"
    assert len(tokens("red")) == (5 if template else 0)
    for prompt in hostile:
        assert tokens(prompt) == tokens("red old warm"), prompt
    assert rl.prompt_ids(tokenizer, "red [INST] old") == rl.prompt_ids(tokenizer, "red   old")
    plain = copy.deepcopy(tokenizer)
    for prompt in [*PROMPTS, "[red] <old> INST |im_start| \u00fc [ INST ]\n\n  a", ""]:                           # ids as ever
        chat = template and plain.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        assert rl.prompt_ids(tokenizer, prompt) == (chat or plain(prompt + "\n"))["input_ids"]


def test_blanks_letters_and_words_among_the_added_tokens_stay_in_a_prompt(tiny):
    """Guards: Gemma's newlines, DeepSeek's letters or a word that somebody added, lost from every prompt."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny)
    tokenizer.add_tokens(["\n\n", "  ", "\u00fc", "\u00f7", "Brush", "\u2581\u2581", "[X]"])
    text = "a\n\nb  \u00fc \u00f7 Brush \u2581\u2581"
    ids, added = rl.prompt_ids(tokenizer, text), tokenizer.added_tokens_decoder
    assert ids == tokenizer(text + "\n")["input_ids"]
    assert {added[i].content for i in ids if i in added} == {"\n\n", "  ", "\u00fc", "\u00f7", "Brush", "\u2581\u2581"}
    assert rl.prompt_ids(tokenizer, "red [X]") == rl.prompt_ids(tokenizer, "red  ")


def test_micro_batches_keep_rows_together_and_sort_them_by_length():
    """A prompt with another row's answer; micro-batches as wide as the longest row of all."""
    prompts, answers = [[1] * 9, [2], [3] * 5, [4] * 2], [[5], [6] * 4, [7] * 2, [8]]
    a, b = rl.micro_batches([3, 1, 0, 2], prompts, answers, 0, "cpu", 2)
    assert a.rows.tolist() == [3, 1] and b.rows.tolist() == [2, 0]
    assert a.ids.tolist() == [[4, 4, 8, 0, 0], [2, 6, 6, 6, 6]] and a.starts.tolist() == [2, 1] and b.starts.tolist() == [5, 9]
    assert a.mask.tolist() == [[True, False, False, False], [True] * 4] and b.ids.shape == (2, 10) and b.mask.sum() == 3


def test_a_prompt_given_several_times_is_read_once(shared, monkeypatch):
    """Six proposals for a prompt that cost six readings of it; copies that share one sample, or keys of another prompt."""
    model, tokenizer = shared
    rl.use(model, "policy"), rl.set_mode(model, training=False)
    read, base = [], model.get_base_model().base_model
    handle = base.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True)
    answers = rl.generate(model, tokenizer, [p for p in PROMPTS[:4] for _ in range(6)], max_new=4)[1]
    handle.remove()
    assert read[0][0] == 4 and read[1] == (24, 1), "four prompts are read, then 24 rows go on a token at a time"
    assert all(len({tuple(a) for a in answers[k: k + 6]}) > 1 for k in range(0, 24, 6))
    greedy = lambda prompts: rl.generate(model, tokenizer, prompts, max_new=4, temperature=1e-6)[1]
    assert greedy([p for p in PROMPTS[:4] for _ in range(2)]) == [greedy([p])[0] for p in PROMPTS[:4] for _ in range(2)]


def test_by_length_covers_each_row_once_within_budget():
    """A row lost or answered twice; a batch that outgrows the memory it was promised."""
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist() + [500]
    groups = list(rl.by_length(lengths, 300))
    assert sorted(i for g in groups for i in g) == list(range(201)) and len(groups) < 60
    assert all(len(g) * max(lengths[i] for i in g) <= 300 for g in groups if len(g) > 1)
    assert [200] in groups and list(rl.by_length([], 300)) == []


def test_padded_on_either_side():
    rows = [[5], [6, 7, 8], []]
    ids, mask = rl.padded(rows, 9)
    assert ids.tolist() == [[5, 9, 9], [6, 7, 8], [9, 9, 9]] and mask.sum(1).tolist() == [1, 3, 0] and mask[0, 0]
    ids, mask = rl.padded(rows, 9, left=True)
    assert ids.tolist() == [[9, 9, 5], [6, 7, 8], [9, 9, 9]] and mask.sum(1).tolist() == [1, 3, 0] and mask[0, 2]


@pytest.mark.parametrize("config", [LlamaConfig(**SIZE, intermediate_size=128), GPT2Config(**GPT2)], ids=lambda c: c.model_type)
def test_a_padded_row_equals_the_same_row_alone(config, tiny, tmp_path):
    """Padding that is seen, or positions that count it (rotary ones hide it: they are relative) (TRAPS 10)."""
    model, tokenizer = untrained(config, tiny, tmp_path)
    batch, head = batch_of(tokenizer), torch.nn.Linear(64, 1)
    prompts = [row[:n].tolist() for row, n in zip(batch.ids, batch.starts)]
    with torch.no_grad():
        logp, values = rl.token_logps(model, batch, value_head=head)
        keys = rl.read_once(model, *rl.padded(prompts, tokenizer.pad_token_id, left=True)).layers[1].keys
        for i, n in enumerate(batch.mask.sum(1)):
            own, value = rl.token_logps(model, alone(batch, i), value_head=head)
            assert torch.allclose(logp[i, :n], own[0], atol=1e-5) and torch.allclose(values[i, :n], value[0], atol=1e-5)
            if config.model_type == "gpt2" and len(prompts[i]) > 1:     # absolute positions: the keys themselves must agree
                own = rl.read_once(model, *rl.padded([prompts[i]], 0)).layers[1].keys[0]
                assert torch.allclose(keys[i, :, 1 - len(prompts[i]):], own, atol=1e-5)


@pytest.mark.parametrize("config", [
    LlamaConfig(**SIZE, intermediate_size=128), GPT2Config(**GPT2),
], ids=lambda c: c.model_type)
def test_token_logps_equal_transformers(config, tiny, tmp_path):
    """Off-by-one positions; a temperature left out: 0.7 nats (TRAPS 3); a model that scales its logits after the head."""
    model, tokenizer = untrained(config, tiny, tmp_path)
    batch = batch_of(tokenizer)
    with torch.no_grad():
        logp, values = rl.token_logps(model, batch, 0.7)
        for i, n in enumerate(batch.mask.sum(1).tolist()):
            row = alone(batch, i).ids[0]
            whole = (model(input_ids=row[None]).logits[0, :-1] / 0.7).log_softmax(-1).gather(-1, row[1:, None])[:, 0]
            assert torch.allclose(logp[i, :n], whole[-n:], atol=1e-5)
    assert values is None


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_ratio_is_one_between_rollout_and_update(shared, micro_batch):
    """Old log-probabilities from another function, mode or temperature than the update's (TRAPS 3)."""
    model, tokenizer = shared
    batch = batch_of(tokenizer)
    pieces = lambda size: torch.cat([rl.token_logps(model, part, 0.7)[0] for part in cut(batch, size)])[batch.mask]
    rl.use(model, "policy"), rl.set_mode(model, training=False)
    with torch.no_grad():
        old, whole = pieces(micro_batch), pieces(8)
    rl.use(model, "policy", trainable=True), rl.set_mode(model, training=True)
    new = pieces(micro_batch)
    assert new.requires_grad and torch.equal((new - old).exp(), torch.ones(len(new)))
    assert ((new - whole).exp() - 1).abs().max() < 5e-6                # other batch shapes add up in another order


def test_tokens_after_eos_change_no_log_probability(shared):
    """Attention or positions that see what follows the EOS (TRAPS 11)."""
    model, tokenizer = shared
    batch = batch_of(tokenizer)
    rl.use(model, "policy"), rl.set_mode(model, training=False)
    real = torch.arange(batch.ids.shape[1]) < (batch.starts + batch.mask.sum(1))[:, None]
    garbage = torch.where(real, batch.ids, torch.randint(3, 300, real.shape, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        a, b = (rl.token_logps(model, x)[0][batch.mask] for x in (batch, batch._replace(ids=garbage)))
    assert not torch.equal(batch.ids, garbage) and torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------- supervise
def test_supervise_is_the_token_mean_whatever_the_micro_batch(tiny, monkeypatch):
    """A mean of micro-batch means: wrong weights for ragged lengths (TRAPS 15); prompts or padding in the loss; no EOS in it."""
    found, original = [], torch.nn.utils.clip_grad_norm_
    samples = pairs(6, seed=5)

    def record(parameters, *args, **settings):
        found.append([p.grad.clone() for p in parameters])
        return original(parameters, *args, **settings)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    losses = []
    for micro_batch in (6, 1, 4):
        model, tokenizer = fresh(tiny, policy=False)
        rl.use(model, "align", trainable=True)
        losses.append(rl.supervise(model, tokenizer, samples, steps=1, batch=6, micro_batch=micro_batch))
    model, tokenizer = fresh(tiny, policy=False)                          # transformers' own loss, row by row
    rl.use(model, "align", trainable=True)
    total, tokens = 0.0, 0
    for prompt, text in samples:
        p, a = rl.prompt_ids(tokenizer, prompt), tokenizer(" " + text)["input_ids"] + [tokenizer.eos_token_id]
        total += len(a) * model(input_ids=torch.tensor([p + a]), labels=torch.tensor([[-100] * len(p) + a])).loss
        tokens += len(a)
    (total / tokens).backward()
    expected = [p.grad for p in rl.trainable(model)]
    for loss, gradients in zip(losses, found, strict=True):
        assert loss == pytest.approx((total / tokens).item(), abs=1e-5)
        assert all(torch.allclose(g, e, atol=1e-6, rtol=1e-4) for g, e in zip(gradients, expected, strict=True))


def test_supervise_learns_and_leaves_the_base_alone(tiny):
    """An adapter that gets no gradient, or a base that does."""
    model, tokenizer = fresh(tiny)
    base = {k: v.clone() for k, v in model.state_dict().items() if "align" not in k}
    rl.use(model, "align", trainable=True)
    copied = [(p, p.split()[0]) for p, _ in pairs(64, seed=8)]
    losses = [rl.supervise(model, tokenizer, copied, steps=s, batch=16, lr=1e-2) for s in (1, 40)]
    assert losses[1] < 0.7 * losses[0] and not model.training
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items() if k in base)


def through_a_file(state):
    """What comes back from disk; refuses what weights_only refuses."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("steps, saves", [(7, [*range(1, 8)]), (43, [*range(2, 43, 2), 43])])
def test_supervise_goes_on_after_any_save_as_if_never_interrupted(tiny, monkeypatch, steps, saves):
    """Guards: a state without moments, warm-up or order of the rows; a last step that is not saved; rows of a finished step learnt twice."""
    def trained(**settings):
        model, tokenizer = fresh(tiny, policy=False)
        rl.use(model, "align", trainable=True)
        return adapter(model, "align"), rl.supervise(model, tokenizer, pairs(24), steps=steps, batch=4, lr=1e-2, **settings), adapter(model, "align")
    states, bars, passes = [], spy(monkeypatch, "tqdm"), spy(monkeypatch, "micro_batches")
    start, loss, whole = trained(save=lambda state: states.append(through_a_file(state)))
    assert [s["step"] for s in states] == saves and [len(s["losses"]) for s in states] == saves and len(passes) == steps
    assert trained()[1] == loss and not same(start, whole)
    for state in (states[0], states[len(states) // 2], states[-1]):
        passes.clear(), bars.clear()
        kept, again = copy.deepcopy(state), []
        torch.manual_seed(5), np.random.seed(5)
        _, loss_again, weights = trained(state=state, save=again.append)
        assert loss_again == loss and same(weights, whole) and len(passes) == steps - state["step"]
        assert [s["step"] for s in again] == [k for k in saves if k > state["step"]]
        assert bars[0][1]["initial"] == state["step"] and bars[0][1]["total"] == steps
        assert torch.equal(kept["weights"], state["weights"]) and kept["losses"] == state["losses"], "a state is only read"


def test_a_tiny_llm_interrupted_in_its_second_lesson_becomes_the_same_file(tmp_path, monkeypatch):
    """Guards: lessons done again, weights made anew after the first, or moments of one lesson carried into the next."""
    states, passes, samples = [], spy(monkeypatch, "micro_batches"), pairs(60)

    def train(path, **settings):
        passes.clear()
        rl.train_tiny(str(tmp_path / path), [p for p, _ in samples], [("a", samples, 4), ("b", samples[:30], 5), ("c", samples, 3)], [TAG], batch=4,
                      lr=1e-2, width=64, vocab=320, **settings)
        return {f.name: f.read_bytes() for f in (tmp_path / path).iterdir()}, len(passes)

    def save(state):
        states.append(through_a_file(state))
        if (state["lesson"], state["step"]) == (1, 2):
            raise KeyboardInterrupt
    whole, steps = train("whole")
    assert steps == 12 and {"model.safetensors", "tokenizer.json", "config.json"} <= whole.keys()
    with pytest.raises(KeyboardInterrupt):
        train("cut", save=save)
    assert [(s["lesson"], s["step"]) for s in states] == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)] and not (tmp_path / "cut").exists()
    later = []
    assert train("cut", state=states[-1], save=later.append) == (whole, 6)
    assert [(s["lesson"], s["step"]) for s in later] == [(1, 3), (1, 4), (1, 5), (2, 1), (2, 2), (2, 3)]
    assert train("between", state=states[3]) == (whole, 8) and train("last", state=through_a_file(later[-1])) == (whole, 0)


# ------------------------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("temperature, expected", [(1.0, []), (0.7, ["TemperatureLogitsWarper"])])
def test_only_the_temperature_shapes_the_samples(tiny, tmp_path, monkeypatch, temperature, expected):
    """A checkpoint's repetition_penalty and top_k, or the default top_k = 50, change the distribution sampled (TRAPS 2)."""
    path = shutil.copytree(tiny, tmp_path / "llm")
    odd = GenerationConfig(do_sample=True, repetition_penalty=1.3, top_k=5, top_p=0.9, eos_token_id=1, pad_token_id=0)
    odd.save_pretrained(path)
    model, tokenizer = rl.load(str(path))
    base, seen = model.get_base_model(), []
    assert base.generation_config.repetition_penalty == 1.3
    original = base._get_logits_processor

    def record(*args, **settings):
        seen.append(original(*args, **settings))
        return seen[-1]
    monkeypatch.setattr(base, "_get_logits_processor", record)
    rl.generate(model, tokenizer, PROMPTS[:2], max_new=2, temperature=temperature)
    assert [[type(p).__name__ for p in processors] for processors in seen] == [expected]


def test_samples_follow_token_logps(shared):
    """The same without a look inside: 4096 first tokens against their probabilities."""
    model, tokenizer = shared
    rl.use(model, "policy"), rl.set_mode(model, training=False)
    prompt, n = "red old warm", 4096
    _, answers = rl.generate(model, tokenizer, [prompt] * n, max_new=1, temperature=0.7, budget=10 ** 6)
    row = rl.prompt_ids(tokenizer, prompt)
    with torch.no_grad():
        ids = torch.cat([torch.tensor([row]).repeat(320, 1), torch.arange(320)[:, None]], 1)              # every first token
        some = rl.MicroBatch(torch.arange(320), ids, torch.full((320,), len(row)), torch.ones(320, 1).bool())
        p = rl.token_logps(model, some, 0.7)[0][:, 0].exp()
    counts = torch.bincount(torch.tensor(answers)[:, 0], minlength=len(p))
    likely = p * n >= 5
    assert ((counts - p * n)[likely].abs() < 5 * (n * p * (1 - p))[likely].sqrt()).all() and likely.sum() >= 8


def test_answers_end_at_eos(shared):
    """Padding or words after the EOS that reach reward or loss (TRAPS 11); an EOS dropped or counted as text."""
    model, tokenizer = shared
    rl.use(model, "policy"), rl.set_mode(model, training=False)
    eos, prompts = tokenizer.eos_token_id, PROMPTS * 4
    texts, answers = rl.generate(model, tokenizer, prompts, max_new=6, seed=1)
    finished = [a[-1] == eos for a in answers]
    assert 0 < sum(finished) < len(prompts)
    for text, a, done in zip(texts, answers, finished):
        assert eos not in a[:-1] and (1 <= len(a) <= 6 if done else len(a) == 6)
        assert "<eos>" not in text and "<pad>" not in text
        assert text == tokenizer.decode(a[:-1] if done else a).strip()
    assert rl.generate(model, tokenizer, prompts, max_new=6, seed=1)[1] == answers
    assert rl.generate(model, tokenizer, prompts, max_new=6, seed=2)[1] != answers


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_mixed_lengths_answer_as_alone_and_in_order(pad, tiny, tmp_path):
    """Left padding that changes answers, pad = eos included (TRAPS 10); answers handed back in sorted order."""
    path = str(shutil.copytree(tiny, tmp_path / "llm"))
    PreTrainedTokenizerFast(tokenizer_file=f"{tiny}/tokenizer.json", eos_token="<eos>", pad_token=pad).save_pretrained(path)
    assert AutoTokenizer.from_pretrained(path).pad_token == pad
    model, tokenizer = fresh(path, noise=1.0)
    assert tokenizer.pad_token == (pad or "<eos>")
    greedy = dict(max_new=6, temperature=1e-6)
    together = rl.generate(model, tokenizer, PROMPTS, **greedy)[1]
    assert len({tuple(a) for a in together}) >= 8 and len({a[-1] == 1 for a in together}) == 2
    assert together == rl.generate(model, tokenizer, PROMPTS, budget=60, **greedy)[1]
    assert together == [rl.generate(model, tokenizer, [p], **greedy)[1][0] for p in PROMPTS]


def test_encode_ignores_adapters_batch_and_padding(tiny, shared):
    """Text vectors that move with the alignment or with their neighbours in the batch."""
    model, tokenizer = shared
    rl.use(model, "policy"), rl.set_mode(model, training=False)
    texts = PROMPTS[:8] + [""]
    vectors = rl.encode(model, tokenizer, texts)
    alone = torch.cat([rl.encode(model, tokenizer, [t]) for t in texts])
    bare = rl.encode(*rl.load(tiny), texts)
    assert vectors.shape == (9, 64) and torch.allclose(vectors, alone, atol=1e-5) and torch.allclose(vectors, bare, atol=1e-5)
    assert model.active_adapter == "policy"


def test_encode_leaves_frozen_weights_frozen(shared):
    """A reference that would take gradients."""
    model, tokenizer = shared
    rl.use(model, "align")
    rl.encode(model, tokenizer, PROMPTS[:2])
    assert not rl.trainable(model)


# -------------------------------------------------------------------------------------------------- the maths of PPO
def ragged(B=5, R=7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(R) < torch.tensor([7, 1, 3, 6, 2])[:B, None]
    return mask, lambda: torch.randn(B, R, generator=rng)


def spoiled(x, mask):
    return torch.where(mask, x, 1e3 * x + 100)


def test_gae_lambda_1_is_return_minus_value_and_lambda_0_the_td_error():
    """A bootstrap after the last token; a reward from another row or from padding."""
    mask, draw = ragged()
    rewards, values = draw(), draw()
    td, (one, one_returns), (zero, _) = torch.zeros(5, 7), rl.gae(rewards, values, mask, 1.0), rl.gae(rewards, values, mask, 0.0)
    future = torch.zeros(5, 7)
    for i in range(5):
        n = int(mask[i].sum())
        for t in range(n):
            future[i, t] = rewards[i, t:n].sum()
            td[i, t] = rewards[i, t] + (values[i, t + 1] if t + 1 < n else 0.0) - values[i, t]
    assert torch.allclose(one, (future - values) * mask, atol=1e-5) and torch.allclose(one_returns, future, atol=1e-5)
    assert torch.allclose(zero, td, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_gae_equals_a_second_implementation(seed):
    """The recursion against the sum of its definition, row by row in float64, with garbage in the padding."""
    mask, draw = ragged(seed=seed)
    lam, rewards, values = float(np.random.default_rng(seed).random()), draw(), draw()
    advantages, returns = rl.gae(spoiled(rewards, mask), spoiled(values, mask), mask, lam)
    for i in range(5):
        n = int(mask[i].sum())
        r, v = rewards[i, :n].double().numpy(), np.append(values[i, :n].double().numpy(), 0.0)
        delta = r + v[1:] - v[:-1]
        expected = np.array([sum(lam ** k * delta[t + k] for k in range(n - t)) for t in range(n)])
        assert np.allclose(advantages[i, :n], expected, atol=1e-5) and np.allclose(returns[i, :n], expected + v[:-1], atol=1e-5)
        assert not advantages[i, n:].any() and not returns[i, n:].any()


def test_whiten_uses_real_tokens_only():
    """Statistics over padding (TRAPS 11)."""
    mask, draw = ragged()
    x = draw() * 3 + 2
    white, real = rl.whiten(spoiled(x, mask), mask), x[mask]
    assert torch.allclose(white[mask], (real - real.mean()) / real.std(unbiased=False), atol=1e-5) and not white[~mask].any()
    assert torch.isfinite(rl.whiten(torch.ones(5, 7), mask)).all()


def test_ppo_loss_equals_its_definition_token_by_token():
    """min for max, a clip on the wrong side, a value clip around the return, a mean over rows or padding (TRAPS 11, 15)."""
    mask, draw = ragged()
    old, advantages, old_values, returns = draw(), draw(), draw(), draw()
    logp, values = old + 0.4 * draw(), old_values + 0.4 * draw()
    total, ratios = 0.0, []
    for i, t in mask.nonzero().tolist():
        ratio, A = (logp[i, t] - old[i, t]).exp().item(), advantages[i, t].item()
        v, v0, G = values[i, t].item(), old_values[i, t].item(), returns[i, t].item()
        surrogate = min(ratio * A, min(max(ratio, 0.8), 1.2) * A)
        total += -surrogate + 0.1 * 0.5 * max((v - G) ** 2, (v0 + min(max(v - v0, -0.2), 0.2) - G) ** 2)
        ratios.append(ratio)
    n, ratios = int(mask.sum()), np.array(ratios)
    args = [spoiled(x, mask) for x in (logp, values, old, advantages, old_values, returns)]
    args[0] = torch.where(mask, args[0], -args[0]).requires_grad_()
    args[1].requires_grad_()
    loss, stats = rl.ppo_loss(*args, mask, mask.sum())
    assert loss.item() == pytest.approx(total / n, abs=1e-5)
    assert stats["ratio"] == pytest.approx(ratios.mean(), abs=1e-5)
    assert stats["approx_kl"] == pytest.approx((ratios - 1 - np.log(ratios)).mean(), abs=1e-5)
    assert stats["clipfrac"] == pytest.approx((abs(ratios - 1) > 0.2).mean(), abs=1e-6) and 0 < stats["clipfrac"] < 1
    loss.backward()
    assert not args[0].grad[~mask].any() and not args[1].grad[~mask].any() and args[0].grad[mask].any()
    parts = [rl.ppo_loss(*(x[rows] for x in args), mask[rows], mask.sum()) for rows in torch.arange(5).split(2)]
    assert sum(p[0].item() for p in parts) == pytest.approx(loss.item(), abs=1e-5)
    assert {k: pytest.approx(sum(p[1][k] for p in parts), abs=1e-5) for k in stats} == stats


def test_an_absurd_log_ratio_stays_finite():
    """exp of an unbounded log-ratio: inf, then nan in every weight (TRAPS 16)."""
    one = torch.ones(1, 1)
    loss, stats = rl.ppo_loss(500 * one, one, 0 * one, one, one, one, one.bool(), one.sum())
    assert torch.isfinite(loss) and np.isfinite(list(stats.values())).all()


# --------------------------------------------------------------------------------------------------------------- PPO
def recorded(raws):
    def reward(texts, rows):
        raws.append(by_row(texts, rows) * (1 + len(raws)))       # a spread that grows
        return raws[-1]
    return reward


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_first_update_starts_at_its_reference(tiny, monkeypatch, micro_batch):
    """Ratio != 1 or KL != 0 before the first step: other function, adapter or temperature (TRAPS 3); the score on another
    token than the last real one (TRAPS 12); an unfinished answer that pays nothing, or a mask without the EOS (TRAPS 11)."""
    raws, calls, made = [], spy(monkeypatch, "gae"), spy(monkeypatch, "generate")
    row, = run(*fresh(tiny), recorded(raws), batch=16, minibatch=16, micro_batch=micro_batch, epochs=1, max_new=4,
               temperature=0.7, no_eos_penalty=3.0)
    rewards, values, mask = calls[0][0][:3]
    answers = made[0][2][1]
    assert row["first_ratio"] == row["ratio"] == pytest.approx(1, abs=1e-6) and row["kl"] == 0.0
    assert row["approx_kl"] == row["clipfrac"] == 0.0                       # not nearly: the very same figures
    assert mask.sum(1).tolist() == [len(a) for a in answers] and not values.any()
    unfinished = torch.tensor([a[-1] != 1 for a in answers])
    assert 0 < unfinished.sum() < 16 and row["eos_rate"] == pytest.approx(1 - unfinished.float().mean().item())
    scores = raws[0] / raws[0].std() - 3.0 * unfinished
    assert row["score"] == pytest.approx(scores.mean().item(), abs=1e-5) and row["reward"] == pytest.approx(raws[0].mean().item())
    last = mask.sum(1, keepdim=True) - 1
    assert torch.allclose(rewards, torch.zeros_like(rewards).scatter(1, last, scores[:, None]), atol=1e-5)


def test_later_rewards_carry_the_kl_to_align(tiny, monkeypatch):
    """A KL with the wrong sign, of the wrong adapters or at another temperature (TRAPS 3, 7, 12); a scale that moves (13)."""
    raws, calls, looks = [], spy(monkeypatch, "gae"), spy(monkeypatch, "look_back")
    model, tokenizer = fresh(tiny)
    log = run(model, tokenizer, recorded(raws), updates=2, epochs=1, minibatch=8, micro_batch=8, beta=0.5, temperature=0.7,
              no_eos_penalty=0.0)
    rewards, _, mask = calls[1][0][:3]
    (_, _, (part,), _), _, (reference, old, _) = looks[1]                   # of the second update
    rl.use(model, "align")
    with torch.no_grad():
        again = rl.token_logps(model, part, 0.7)[0]
    assert torch.equal(again * mask[part.rows], reference[part.rows])
    kl = old - reference
    scores = raws[1] / raws[0].std()
    last = torch.zeros_like(rewards).scatter(1, mask.sum(1, keepdim=True) - 1, scores[:, None])
    assert torch.allclose(rewards - last, -log[1]["beta"] * kl, atol=1e-5)
    assert log[1]["kl"] == pytest.approx(kl.sum(1).mean().item(), abs=1e-5) and abs(log[1]["kl"]) > 1e-3
    assert log[1]["beta"] < 0.5                                             # KL below its target: the leash gets longer


def test_ppo_trains_on_the_sampled_ids(tiny, monkeypatch):
    """Re-tokenised text is another answer (TRAPS 17); a reward that sees the prompts of other rows."""
    seen, made, looks, learnt = [], spy(monkeypatch, "generate"), spy(monkeypatch, "look_back"), spy(monkeypatch, "learn")
    model, tokenizer = fresh(tiny)

    def reward(texts, rows):
        seen.append((texts, list(rows)))
        return by_row(texts, rows)
    run(model, tokenizer, reward, updates=3, micro_batch=3, minibatch=8, epochs=1)
    for k, (texts, rows) in enumerate(seen):
        (_, _, prompts), _, (made_texts, answers) = made[k]
        assert texts == made_texts and prompts == [PROMPTS[i] for i in rows]
        wanted = [rl.prompt_ids(tokenizer, p) for p in prompts]
        parts = looks[k][0][2]
        assert all(a is b for a, b in zip(parts, sum(learnt[k][0][4], []), strict=True)), "same shapes in every pass (TRAPS 3)"
        assert sorted(i for part in parts for i in part.rows.tolist()) == list(range(8)) and len(parts) == 3
        advantages = learnt[k][0][3][1][looks[k][0][3]]
        assert abs(advantages.mean()) < 1e-5 and abs(advantages.square().mean() - 1) < 1e-4, "whitened over the whole rollout (TRAPS 13)"
        for part in parts:
            assert part.mask.sum(1).tolist() == [len(answers[i]) for i in part.rows]
            for i, ids, start in zip(part.rows, part.ids.tolist(), part.starts):
                assert ids == wanted[i] + answers[i] + [0] * (len(ids) - start - len(answers[i])) and start == len(wanted[i])
    assert sorted(i for _, rows in seen for i in rows) == list(range(24))   # every prompt once before any comes again


def test_ppo_moves_the_policy_and_nothing_else(tiny):
    """A reference that drifts with the policy (TRAPS 7); a base that trains; a model left trainable."""
    model, tokenizer = fresh(tiny)
    before, policy = {k: v.clone() for k, v in model.state_dict().items() if ".policy." not in k}, adapter(model, "policy")
    log = run(model, tokenizer, updates=3)
    assert same({k: v for k, v in model.state_dict().items() if ".policy." not in k}, before)
    assert all(not torch.equal(v, policy[k]) for k, v in adapter(model, "policy").items())
    assert log[1]["kl"] != 0 and log[1]["first_ratio"] == pytest.approx(1, abs=1e-6) and log[2]["explained_variance"] != 0
    assert model.active_adapter == "policy" and not rl.trainable(model) and not model.training


def figures(log):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in log]


def close(a, b):
    return all(x.keys() == y.keys() and all(x[k] == pytest.approx(y[k], rel=1e-3, abs=1e-5) for k in x)
               for x, y in zip(figures(a), figures(b), strict=True))


def test_ppo_is_decided_by_its_seed(tiny):
    """A random state that leaks in from outside."""
    a = run(*fresh(tiny), updates=2, seed=3)
    torch.manual_seed(99), np.random.seed(99)
    b, c = run(*fresh(tiny), updates=2, seed=3), run(*fresh(tiny), updates=2, seed=4)
    assert figures(a) == figures(b) and not close(a, c)


def test_ppo_does_not_depend_on_the_micro_batch(tiny):
    """Means of means (TRAPS 15); a divisor of the micro-batch where the minibatch's belongs."""
    settings = dict(batch=12, minibatch=12, epochs=1, beta=0.5)
    whole = run(*fresh(tiny), micro_batch=12, **settings)
    for micro_batch in (1, 5):
        assert close(run(*fresh(tiny), micro_batch=micro_batch, **settings), whole)


@pytest.mark.parametrize("n, batch", [(7, 3), (3, 8), (5, 5)])
def test_draw_gives_every_row_once_before_any_comes_again(n, batch):
    """Guards: rows drawn twice while others wait; a batch cut short where there are fewer rows than it holds; rows in file order."""
    some = rl.draw(n, batch, np.random.default_rng(0))
    seen = [next(some) for _ in range(2 * n)]
    assert all(len(rows) == batch for rows in seen)
    rounds = np.array(sum(seen, [])).reshape(-1, n)
    assert (np.sort(rounds) == np.arange(n)).all() and len({tuple(r) for r in rounds.tolist()}) > 1


@pytest.mark.parametrize("quality", [1.0, 0.0])
def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones(quality):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    returns = torch.tensor([[1., 2., 4.], [0., -3., 99.], [5., 99., 99.]])
    values = returns * quality * mask + 7.0
    row = rl.summary(torch.ones(3), torch.ones(3), mask * 0.5, mask * -2.0, returns, values, mask,
                     torch.tensor([True, True, False]), [{"ratio": 1.0, "skipped": 0}, {"ratio": 1.5, "skipped": 1}])
    assert row["explained_variance"] == pytest.approx(quality, abs=1e-6)
    assert (row["kl"], row["ratio"], row["first_ratio"], row["skipped"], row["length"]) == (1.0, 1.25, 1.0, 1, 2.0)
    assert row["eos_rate"] == pytest.approx(2 / 3) and row["entropy"] == 2.0


def test_tokens_after_eos_change_no_metric(tiny):
    """Padding in any loss, mean, whitening or metric; masks computed as ids != pad, which drop the EOS where pad = eos
    (TRAPS 10, 11). The pad token is drawn nowhere, so another one must not show in any figure."""
    logs = []
    for pad in ("<pad>", "z", "<eos>"):
        model, tokenizer = fresh(tiny)
        tokenizer.pad_token = pad
        logs.append(run(model, tokenizer, updates=2, max_new=8))
    assert 0 < logs[0][0]["eos_rate"] and logs[0][0]["length"] < 8
    assert close(logs[0], logs[1]) and close(logs[0], logs[2])


def test_kl_stop_ends_the_epochs_before_the_step(tiny):
    """Epochs that go on after the policy has left its rollout, or the step that left it still taken (TRAPS 16)."""
    model, tokenizer = fresh(tiny)
    row, = run(model, tokenizer, kl_stop=-1.0)
    assert row["steps"] == 1 and same(adapter(model, "policy"), adapter(model, "align"))
    free, held = run(*fresh(tiny), lr=0.05, epochs=6, kl_stop=float("inf"))[0], run(*fresh(tiny), lr=0.05, epochs=6)[0]
    assert free["steps"] == 12 and 1 < held["steps"] < 12 and held["skipped"] == 0


def test_adam_shrinks_nothing_and_no_step_is_larger_than_its_clip(tiny, monkeypatch):
    """Weight decay that pulls the policy away from align without any reward; a gradient clipped in the log only (TRAPS 16)."""
    model, tokenizer = fresh(tiny)
    states, norms, original = [], [], torch.optim.AdamW.step

    def step(self, *args, **settings):
        norms.append(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]).norm().item())
        return original(self, *args, **settings)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(model, tokenizer, lambda texts, rows: torch.zeros(len(rows)), beta=0.0, no_eos_penalty=0.0, save=states.append)
    assert same(adapter(model, "policy"), adapter(model, "align"))
    assert all(g["eps"] == 1e-5 for g in states[0]["optimizer"]["param_groups"])
    count = iter(range(9))                                   # the first spread sets the scale: later rewards are a hundred times as large
    log = run(*fresh(tiny), lambda texts, rows: by_row(texts, rows) * (100 if next(count) else 1), updates=3)
    assert max(row["grad_norm"] for row in log) > 2 and max(norms) < 1.001


@pytest.mark.parametrize("kind", ["nan", "ratio"])
def test_a_broken_step_is_skipped_and_counted(tiny, monkeypatch, kind):
    """One nan in a loss destroys every weight; a ratio above 10 means that rollout and update disagree (TRAPS 16)."""
    original, model, tokenizer = rl.ppo_loss, *fresh(tiny)

    def broken(*args, **settings):
        loss, stats = original(*args, **settings)
        return (loss * float("nan"), stats) if kind == "nan" else (loss, stats | {"ratio": 11.0})
    monkeypatch.setattr(rl, "ppo_loss", broken)
    row, = run(model, tokenizer)
    assert row["steps"] == row["skipped"] == 4 and same(adapter(model, "policy"), adapter(model, "align"))
    monkeypatch.setattr(rl, "ppo_loss", original)
    row, = run(model, tokenizer)
    assert row["skipped"] == 0 and not same(adapter(model, "policy"), adapter(model, "align"))


@pytest.mark.parametrize("at", [1, 0])
def test_an_infinite_reward_costs_one_update(tiny, at):
    """A reward that overflows once and poisons the run."""
    count = iter(range(9))
    reward = lambda texts, rows: by_row(texts, rows) + (float("inf") if next(count) == at else 0.0)
    model, tokenizer = fresh(tiny)
    log = run(model, tokenizer, reward, updates=3)
    assert [row["skipped"] == row["steps"] for row in log] == [update == at for update in range(3)]
    assert all(torch.isfinite(p).all() for p in adapter(model, "policy").values())


def test_equal_first_rewards_do_not_blow_up_the_scale(tiny):
    """A rare reward, absent from the first rollout: scores of 1e6, and a value loss that takes the whole gradient norm."""
    count = iter(range(9))
    log = run(*fresh(tiny), lambda texts, rows: by_row(texts, rows) * (next(count) > 0), updates=3)
    assert max(abs(row["score"]) for row in log) < 100


def test_a_row_of_the_log_has_every_figure(tiny):
    """A run whose health nobody can read afterwards (TRAPS 18)."""
    log = run(*fresh(tiny), updates=3)
    assert json.loads(json.dumps(log)) == log and [row["update"] for row in log] == [0, 1, 2]
    for row in log:
        assert row.keys() >= {"reward", "reward_std", "score", "kl", "beta", "approx_kl", "clipfrac", "ratio", "first_ratio",
                              "entropy", "explained_variance", "eos_rate", "length", "grad_norm", "loss", "steps", "skipped",
                              "tokens_per_s"}
        assert all(np.isfinite(v) for v in row.values()) and 0 < row["entropy"] < np.log(320) and 1 <= row["length"] <= 6


def test_resume_after_any_update_equals_the_uninterrupted_run(tiny, tmp_path):
    """A state that lacks value head, optimiser, beta, scale, random state or order of the prompts (TRAPS 19)."""
    states = []

    def save(state):
        torch.save(state, tmp_path / str(len(states)))
        states.append(torch.load(tmp_path / str(len(states)), weights_only=True))
    settings = dict(updates=4, epochs=2, batch=10, kl_target=0.5)
    model, tokenizer = fresh(tiny)
    log = run(model, tokenizer, save=save, **settings)
    assert len({row["beta"] for row in log}) == 4
    for k in (0, 2, 3):
        again, _ = fresh(tiny)
        torch.manual_seed(5), np.random.seed(5)
        assert figures(run(again, tokenizer, state=states[k], **settings)) == figures(log)
        assert same(adapter(again, "policy"), adapter(model, "policy"))


def test_a_state_of_the_last_update_trains_nothing(tiny, monkeypatch):
    """Guards: one update too many for a run that was killed between PPO's end and its adapter's file."""
    states, bars, made = [], spy(monkeypatch, "tqdm"), spy(monkeypatch, "generate")
    model, tokenizer = fresh(tiny)
    log = run(model, tokenizer, updates=2, save=lambda state: states.append(through_a_file(state)))
    made.clear()
    again, _ = fresh(tiny)
    assert run(again, tokenizer, updates=2, state=states[-1], save=states.append) == log and not made and len(states) == 2
    assert same(adapter(again, "policy"), adapter(model, "policy")) and not same(adapter(again, "policy"), adapter(again, "align"))
    assert [(s["initial"], s["total"]) for _, s, _ in bars if s["desc"] == "PPO"] == [(0, 2), (2, 2)]
    assert not again.training and not rl.trainable(again)


def test_bandit_reward_rises(tiny):
    """Any sign, mask or index that is wrong somewhere: one word is worth 1, and the policy must find it in 20 updates."""
    model, tokenizer = fresh(tiny)
    log = run(model, tokenizer, lambda texts, rows: torch.tensor([float("red" in t) for t in texts]), updates=20, batch=24,
              minibatch=12, micro_batch=12, max_new=4, beta=0.02)
    first, last = (np.mean([row["reward"] for row in part]) for part in (log[:1], log[-3:]))
    assert first < 0.4 and last > 0.8, [row["reward"] for row in log]
    assert np.isfinite(log[-1]["kl"]) and log[-1]["kl"] > 0.5 and log[-1]["entropy"] < log[0]["entropy"] + 1
    assert np.mean(["red" in t for t in rl.generate(model, tokenizer, PROMPTS, max_new=4)[0]]) > 0.6


def test_a_keyword_reaches_nine_tenths_of_its_reward(tiny):
    """Guards: a policy that rises and stays half-way: clipping, whitening or the KL weight gone wrong."""
    model, tokenizer = fresh(tiny)
    log = run(model, tokenizer, lambda texts, rows: torch.tensor([float("red" in t) for t in texts]), updates=30, batch=24,
              minibatch=12, micro_batch=12, max_new=4, beta=0.02)
    assert np.mean([row["reward"] for row in log[-5:]]) >= 0.9, [row["reward"] for row in log]
    assert 0 < log[-1]["kl"] < 20


def test_a_length_target_reaches_nine_tenths_of_its_reward(tiny):
    """Guards: credit that does not reach EOS: the token that ends an answer decides here."""
    model, tokenizer = fresh(tiny)
    log = run(model, tokenizer, lambda texts, rows: torch.tensor([max(0.0, 1 - abs(len(t.split()) - 6) / 6) for t in texts]),
              updates=60, batch=64, minibatch=32, micro_batch=16, max_new=8, beta=0.02, lr=3e-3)
    first, last = (np.mean([row["reward"] for row in part]) for part in (log[:5], log[-10:]))
    assert first < 0.6 and last >= 0.9, [row["reward"] for row in log]
    assert 0 < log[-1]["kl"] < 30 and log[-1]["eos_rate"] > 0.9


def test_kl_and_penalty_keep_the_text_readable_where_repetition_pays(tiny):
    """Guards: a KL weight or a penalty of unfinished answers that does not bite. `pytest -s` shows both kinds of text."""
    def hacked(**guard):
        model, tokenizer = fresh(tiny)
        log = run(model, tokenizer, lambda texts, rows: torch.tensor([float(t.split().count("red")) for t in texts]), updates=40,
                  batch=24, minibatch=12, micro_batch=12, max_new=12, **guard)
        texts = rl.generate(model, tokenizer, PROMPTS, max_new=12)[0]
        row = {k: np.mean([r[k] for r in log[-5:]]) for k in ("reward", "kl", "eos_rate")}
        row["different"] = np.mean([len(set(t.split())) / max(1, len(t.split())) for t in texts])
        print(f"\n{guard}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.items()), *texts[:4], sep="\n    ")
        return log[0]["reward"], row
    _, free = hacked(beta=0.0, no_eos_penalty=0.0)
    start, kept = hacked(beta=2.0, no_eos_penalty=4.0)
    assert free["reward"] > 8 and free["kl"] > 10 and free["eos_rate"] < 0.2 and free["different"] < 0.4
    assert kept["reward"] > start and kept["kl"] < 2 and kept["eos_rate"] > 0.8 and kept["different"] > 0.6


def test_the_benchmark_at_real_shapes_runs_on_a_cpu_at_a_tiny_one(tmp_path):
    """A script for a GPU that nobody has run before the GPU is there."""
    spec = importlib.util.spec_from_file_location("bench_llm", pathlib.Path(__file__).parent / "bench" / "bench_llm.py")
    spec.loader.exec_module(bench := importlib.util.module_from_spec(spec))
    found = bench.main(["shapes", "--sizes", "tiny", "--device", "cpu", "--prompt", "24", "--answer", "8", "--rows", "8",
                        "--json", str(tmp_path / "x.json")])
    assert found["tiny"].keys() == {"load", "align", "generation", "one PPO update"} and found["tiny"].pop("load") == {}
    assert all(0 < row["tokens_per_s"] < 1e7 for row in found["tiny"].values())
    assert json.loads((tmp_path / "x.json").read_text())["shapes"]["result"]["tiny"].keys() > found["tiny"].keys()


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"


@pytest.mark.parametrize("template, pad", [(TEMPLATE, "<eos>"), (None, None), (None, "<pad>")], ids=["chat,pad=eos", "no pad", "plain"])
@pytest.mark.parametrize("config", [
    Qwen2Config(**SIZE, intermediate_size=128, num_key_value_heads=2), LlamaConfig(**SIZE, intermediate_size=128, num_key_value_heads=2),
    GPT2Config(**GPT2)], ids=lambda c: c.model_type)
def test_any_causal_lm_goes_through_align_generate_and_ppo(config, template, pad, tiny, tmp_path, monkeypatch):
    """A model family, template, pad token or checkpoint setting for which a stage breaks or changes the distribution."""
    untrained(config, tiny, tmp_path)
    GenerationConfig(do_sample=True, repetition_penalty=1.3, eos_token_id=1, pad_token_id=0).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_file=f"{tiny}/tokenizer.json", eos_token="<eos>", pad_token=pad,
                            chat_template=template).save_pretrained(tmp_path)
    model, tokenizer = rl.load(str(tmp_path), rank=4)
    assert tokenizer.pad_token == (pad or "<eos>") and ("user: red" in tokenizer.decode(rl.prompt_ids(tokenizer, "red"))) == bool(template)
    rl.use(model, "align", trainable=True)
    losses = [rl.supervise(model, tokenizer, pairs(64), steps=steps, batch=16, lr=1e-2) for steps in (1, 20)]
    assert losses[1] < losses[0]
    rl.add_policy(model)
    processors, original = [], model.get_base_model()._get_logits_processor
    monkeypatch.setattr(model.get_base_model(), "_get_logits_processor",
                        lambda *a, **k: processors.append(original(*a, **k)) or processors[-1])
    log = run(model, tokenizer, updates=3, micro_batch=1)
    assert log[0]["first_ratio"] == pytest.approx(1, abs=1e-5) and log[0]["kl"] == 0 and log[2]["kl"] != 0
    together = rl.generate(model, tokenizer, PROMPTS[:6] * 2, max_new=5, temperature=1e-6)[1]
    assert together == [rl.generate(model, tokenizer, [p], max_new=5, temperature=1e-6)[1][0] for p in PROMPTS[:6]] * 2
    assert not any(processors[:3]) and all(np.isfinite(v) for row in log for v in row.values()) and not log[-1]["skipped"]


# ------------------------------------------------------------------------------------------- the LLM as a recommender
TITLES = ["red green", "red", "blue old calm", "loud", "warm dark red", "green", "green red", "old", "old calm blue dark"]


@pytest.mark.parametrize("beams", [3, 9, 12])
def test_beam_search_finds_the_titles_that_brute_force_finds(shared, beams):
    """Guards: scores averaged over a title's length, a title cut off at its longest prefix, prompts padded on the wrong side."""
    model, tokenizer = shared
    rl.use(model, "align")
    found = rl.retrieve(model, tokenizer, PROMPTS[:6], *rl.title_trie(tokenizer, TITLES), beams=beams).numpy()
    scores = rl.likelihood(model, tokenizer, [(p, t) for p in PROMPTS[:6] for t in TITLES]).view(6, -1)
    want = scores.argsort(1, descending=True)[:, :beams].numpy()
    if beams < len(TITLES):           # a beam as wide as the catalogue misses nothing; a narrow one may
        assert (found[:, 0] == want[:, 0]).mean() > 0.8 and (found >= 0).all()
    else:
        assert (found[:, :len(TITLES)] == want).all() and (found[:, len(TITLES):] == -1).all()


def test_every_line_of_an_answer_ends_with_eos(tiny):
    """Guards: an answer of several titles that is learnt as one, so that generation runs on."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny)
    assert rl.answer_ids(tokenizer, "red green\nblue") == rl.answer_ids(tokenizer, "red green") + rl.answer_ids(tokenizer, "blue")
    assert rl.answer_ids(tokenizer, "blue").count(tokenizer.eos_token_id) == 1 and rl.answer_ids(tokenizer, "blue")[-1] == tokenizer.eos_token_id


def test_the_trie_admits_exactly_the_catalogue(tiny):
    """Guards: a prefix that passes for a title, a title that another hides, an end that may come anywhere."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny)
    paths, trie = rl.title_trie(tokenizer, TITLES)

    def walk(seen=()):
        return [p for token in trie[seen] for p in ([seen + (token,)] if token == tokenizer.eos_token_id else walk(seen + (token,)))]
    assert sorted(walk()) == sorted(paths) and sorted(paths.values()) == list(range(len(TITLES)))
    with pytest.raises(ValueError, match="never be retrieved"):
        rl.title_trie(tokenizer, ["red", "red"])
