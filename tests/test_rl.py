"""rl.py: parity with plain transformers and peft first, then invariants, then small trainings.

    pytest tests/test_rl.py            no GPU, no download; one tiny model serves nearly all tests
    pytest tests/test_rl.py -m slow    more model families, a hub of our own, longer trainings

Each docstring names the bug that the test guards against.
"""

import copy
import hashlib
import http.server
import importlib
import itertools
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
from typing import NamedTuple

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers as hf
from bitsandbytes.nn import Linear4bit

import rl

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
HERE = pathlib.Path(__file__).parent
WORDS = "red green blue old calm loud warm dark".split()
TAG = "<reason>"
EOS = 1  # of the tiny model; its padding is 0
GREEDY = 1e-6  # the temperature at which the likeliest token is always drawn
NF4 = hf.BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


# ------------------------------------------------------------------------------- what tests share
def some_words(rng, most):
    return " ".join(rng.choice(WORDS, int(rng.integers(1, most + 1))))


def pairs(n, seed=0):
    """Prompts of 1 to 12 words with answers of 1 to 4: ragged on both sides."""
    rng = np.random.default_rng(seed)
    return [(some_words(rng, 12), some_words(rng, 4)) for _ in range(n)]


PROMPTS = [prompt for prompt, _ in pairs(24, seed=1)]


def small_tiny(path, lessons, lr=1e-2, batch=16, vocab=512, checkpoint=rl.Checkpoint(), **settings):
    """train_tiny with the smallest widths that the 4-bit kernels take."""
    config = rl.TinyConfig(lr=lr, batch=batch, width=64, vocab=vocab, **settings)
    texts = [prompt for prompt, _ in lessons[0][1]]
    rl.train_tiny(str(path), texts, lessons, [TAG], config, checkpoint=checkpoint)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a Qwen2-shaped model that has learnt a little."""
    path = str(tmp_path_factory.mktemp("llm") / "tiny")
    samples = pairs(200)
    small_tiny(path, [("a few", samples, 3), ("more", samples, 6)])
    return path


def fresh(path, policy=True, noise=0.05, **settings):
    """(model, tokenizer) of its own for a test that changes weights; `align` is made non-zero, so
    that an adapter matters."""
    torch.manual_seed(0)
    model, tokenizer = rl.load(path, rank=4, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=noise)
    if policy:
        rl.add_policy(model)
    return model, tokenizer


def fresh_align(path):
    """(model, tokenizer) whose adapter `align` is about to be trained."""
    model, tokenizer = fresh(path, policy=False)
    rl.use(model, "align", trainable=True)
    return model, tokenizer


@pytest.fixture(scope="session")
def shared_model(tiny):
    return fresh(tiny)


@pytest.fixture
def shared(shared_model):
    """(model, tokenizer) for tests that change no weight: adapter `policy`, evaluation mode."""
    model, tokenizer = shared_model
    rl.use(model, "policy")
    return model, tokenizer


def layers_4bit(model):
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def keep_4bit_layers_in_training_mode(model):
    for layer in layers_4bit(model):
        layer.training = True


def trainable(model):
    """The parameters that take gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def adapter(model, name):
    """A copy of an adapter's weights; two adapters have the same keys."""
    weights = {}
    for key, value in model.named_parameters():
        if f".{name}." in key:
            weights[key.replace(f".{name}.", ".")] = value.detach().clone()
    return weights


def all_but(model, name):
    """A copy of everything in the model but one adapter."""
    return {k: v.clone() for k, v in model.state_dict().items() if f".{name}." not in k}


def same(a, b):
    """Are two dictionaries of tensors the same, bit for bit?"""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def adapter_bytes(model, folder, name):
    """The bytes of an adapter's file."""
    rl.save_adapter(model, str(folder), name)
    return (folder / name / "adapter_model.safetensors").read_bytes()


def folder_bytes(folder):
    """{name: bytes} of the files in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def answer_with_eos(tokenizer, answer):
    return tokenizer(" " + answer, add_special_tokens=False)["input_ids"] + [EOS]


def batch_of(tokenizer, n=8):
    """n ragged pairs as one micro-batch."""
    samples = pairs(n, seed=3)
    prompts = [rl.prompt_ids(tokenizer, prompt) for prompt, _ in samples]
    answers = [answer_with_eos(tokenizer, answer) for _, answer in samples]
    return rl.micro_batches(range(n), prompts, answers, "cpu", n)[0]


def token_logps(model, batch, temperature=1.0):
    """Log-probabilities of the answer tokens."""
    return rl.logps_and_states(model, batch, temperature)[0]


def logps_and_values(model, head, batch):
    """Log-probabilities and values of the answer tokens."""
    logp, states = rl.logps_and_states(model, batch)
    return logp, head(states.float()).squeeze(-1)


def row_alone(batch, i):
    """Row i without its padding."""
    n = int(batch.mask[i].sum())
    one = slice(i, i + 1)
    ids = batch.ids[one, : batch.starts[i] + n]
    return rl.MicroBatch(batch.rows[one], ids, batch.starts[one], batch.mask[one, :n])


def sample(model, tokenizer, prompts, **settings):
    """(texts, lists of ids) of rl.generate."""
    return rl.generate(model, tokenizer, prompts, rl.Sampling(**settings))


def greedy(model, tokenizer, prompts, max_new=6, budget=32_768):
    """The answers of the likeliest tokens, as lists of ids."""
    settings = rl.Sampling(max_new=max_new, temperature=GREEDY, budget=budget)
    return rl.generate(model, tokenizer, prompts, settings)[1]


def by_row(texts, rows):
    """A reward with a known spread that depends on no text."""
    return torch.tensor([float(i % 5) for i in rows]), {}


def says_red(texts, rows):
    """A bandit: one word is worth 1."""
    return torch.tensor([float("red" in text) for text in texts]), {}


class Rewards:
    """by_row times a factor for each update, the last for all that follow; keeps what it saw."""

    def __init__(self, *factors):
        self.factors, self.seen, self.given = factors, [], []

    def __call__(self, texts, rows):
        factor = self.factors[min(len(self.given), len(self.factors) - 1)]
        self.seen.append((texts, list(rows)))
        self.given.append(by_row(texts, rows)[0] * factor)
        return self.given[-1], {}


def run(model, tokenizer, reward=by_row, checkpoint=rl.Checkpoint(), max_new=6, **settings):
    """One small PPO run; returns its log. temperature: of the sampling."""
    sampling = rl.Sampling(max_new=max_new, temperature=settings.pop("temperature", 1.0))
    settings = {"updates": 1, "batch": 8, "minibatch": 4, "micro_batch": 4, "lr": 5e-3} | settings
    config = rl.PPOConfig(sampling=sampling, **settings)
    return rl.ppo(model, tokenizer, PROMPTS, reward, config, checkpoint)


def figures(log):
    """A log without the one figure that a clock makes."""
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in log]


def close(a, b):
    """Are two logs the same but for rounding?"""
    for x, y in zip(figures(a), figures(b), strict=True):
        if x != pytest.approx(y, rel=1e-3, abs=1e-5):
            return False
    return True


def mean_of(log, key):
    return float(np.mean([row[key] for row in log]))


class Call(NamedTuple):
    args: tuple
    settings: dict
    result: object


def record(monkeypatch, owner, name):
    """The list of a function's calls from now on; it works as before."""
    calls, original = [], getattr(owner, name)

    def recorder(*args, **settings):
        result = original(*args, **settings)
        calls.append(Call(args, settings, result))
        return result

    monkeypatch.setattr(owner, name, recorder)
    return calls


def kill_at_save(monkeypatch, n):
    """Whatever writes its n-th checkpoint from now on is interrupted right after it."""
    original, saves = rl.Checkpoint.save, []

    def save(self, state):
        original(self, state)
        saves.append(self.path)
        if len(saves) == n:
            raise KeyboardInterrupt

    monkeypatch.setattr(rl.Checkpoint, "save", save)


# ------------------------------------------------------------------------------ files on the disk
class Interrupting:
    """An object in the middle of whose writing somebody presses Ctrl-C."""

    def __reduce__(self):
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    """Guards: a checkpoint cut off in its middle, which the next run cannot read."""
    path = str(tmp_path / "new" / "folder" / "file")
    rl.write_atomically(path, {"step": 1})
    with pytest.raises(KeyboardInterrupt):
        rl.write_atomically(path, {"weights": torch.zeros(100_000), "last": Interrupting()})
    assert torch.load(path, weights_only=True) == {"step": 1}
    rl.write_atomically(path, "a text, \u00fc\n")
    assert pathlib.Path(path).read_bytes() == "a text, \u00fc\n".encode()


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    """Guards: a moment in which neither the old nor the new file is there."""
    path = str(tmp_path / "file")
    rl.write_atomically(path, "old")
    whole = []

    def replace(part, final):
        whole.append((pathlib.Path(part).read_text(), pathlib.Path(final).read_text()))

    monkeypatch.setattr(os, "replace", replace)
    rl.write_atomically(path, "new")
    assert whole == [("new", "old")]


def test_a_checkpoint_keeps_its_last_state(tmp_path):
    """Guards: a loop that starts from an older state."""
    path = str(tmp_path / "unit")
    assert rl.Checkpoint(path).state is None
    checkpoint = rl.Checkpoint(path)
    checkpoint.save({"step": 1})
    checkpoint.save({"step": 2})
    assert rl.Checkpoint(path).state == {"step": 2}


def test_a_checkpoint_without_a_path_writes_nothing(tmp_path, monkeypatch):
    """Guards: files in whatever folder the process stands in."""
    monkeypatch.chdir(tmp_path)
    rl.Checkpoint().save({"step": 1})
    assert rl.Checkpoint().state is None
    assert list(tmp_path.iterdir()) == []


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path):
    """Guards: a run folder from somebody else that does as it likes here."""
    torch.save(Evil(str(tmp_path / "made")), tmp_path / "unit")
    assert rl.Checkpoint(str(tmp_path / "unit")).state is None
    assert not (tmp_path / "made").exists()


def cut(whole):
    return whole[: len(whole) // 2]


def emptied(whole):
    return b""


def of_something_else(whole):
    return b"somebody's notes"


def with_another_byte(whole):
    """Of the right length, as after a fault of the disk; the byte is a weight's."""
    at = whole.index(b"\x00\x00\xc0\x40")
    return whole[:at] + b"\xff" + whole[at + 1 :]


DAMAGES = [cut, emptied, of_something_else]


@pytest.mark.parametrize("damage", [*DAMAGES, with_another_byte])
def test_a_damaged_checkpoint_starts_again_and_says_so(damage, tmp_path, capsys):
    """Guards: an EOFError without a file's name, at every resume again; weights that are not those
    that were saved."""
    path = tmp_path / "unit"
    rl.Checkpoint(str(path)).save({"weights": torch.full((100,), 6.0)})
    path.write_bytes(damage(path.read_bytes()))
    checkpoint = rl.Checkpoint(str(path))
    assert checkpoint.state is None
    assert capsys.readouterr().out == f"{path} is damaged: this stage starts again\n"
    checkpoint.save({"step": 1})
    assert rl.read_state(str(path)) == {"step": 1}
    assert rl.read_state(str(tmp_path / "missing")) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", rl.LLM_FILES)
@pytest.mark.parametrize("damage", [*DAMAGES, None])
def test_a_model_folder_is_whole_or_not(damage, name, tiny, tmp_path):
    """Guards: half of a model, cut off by a full disk or tidied away, taken for one (None: the file
    is gone)."""
    assert rl.is_whole(tiny)
    path = shutil.copytree(tiny, tmp_path / "llm")
    whole = (path / name).read_bytes()
    (path / name).unlink()
    if damage:
        (path / name).write_bytes(damage(whole))
    assert not rl.is_whole(str(path))


# ---------------------------------------------------------------------------------------- loading
def test_the_tiny_model_fits_the_4bit_kernels(shared):
    """Guards: layer shapes that the packed CPU kernel refuses; markup split into many tokens."""
    model, tokenizer = shared
    assert len(layers_4bit(model)) == 2 * 7
    for layer in layers_4bit(model):
        assert layer.out_features % 32 == 0
        assert layer.in_features % 64 == 0
    assert len(tokenizer(TAG)["input_ids"]) == 1
    assert tokenizer.eos_token_id == EOS
    assert tokenizer.pad_token_id == 0


def test_the_base_is_nf4_double_quantised(shared):
    """Guards: the defaults of bitsandbytes, which are fp4 without double quantisation."""
    model, _ = shared
    for layer in layers_4bit(model):
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.float32


def test_lora_weights_are_float32_and_nothing_else_trains(shared):
    """Guards: LoRA weights in bfloat16, whose steps are lost in rounding; a base that trains."""
    model, _ = shared
    rl.use(model, "policy", trainable=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name and ".policy." in name), name
        if "lora_" in name:
            assert parameter.dtype == torch.float32, name
    rl.use(model, "align")
    assert not trainable(model)


def test_bfloat16_stays_where_it_belongs(tiny):
    """Guards, as on a GPU: LoRA weights in bfloat16, embeddings and head in float32,
    log-probabilities in bfloat16."""
    model, tokenizer = fresh(tiny, compute=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32, name
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    batch, head = batch_of(tokenizer), torch.nn.Linear(64, 1)
    logp, values = logps_and_values(model, head, batch)
    assert values.dtype == torch.float32
    assert logp.dtype == torch.float32
    assert not torch.equal(logp, logp.bfloat16().float())
    (row,) = run(model, tokenizer, epochs=1)
    assert row["first_ratio"] == pytest.approx(1, abs=1e-2)
    assert not row["skipped"]


SIZE = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None}
INNER = SIZE | {"intermediate_size": 128}
BLOOM = {"vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4}
BLOOM |= {"eos_token_id": EOS, "pad_token_id": 0}
OPT = {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 256}


def qwen2(**settings):
    return hf.Qwen2Config(**INNER, num_key_value_heads=2, **settings)


def llama(**settings):
    return hf.LlamaConfig(**INNER, num_key_value_heads=2, **settings)


def gpt2(**settings):
    sizes = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return hf.GPT2Config(**sizes, eos_token_id=EOS, bos_token_id=EOS, **settings)


def untrained(config, tiny, folder):
    """A model of another kind with random weights, from a folder on disk; the tokenizer is the tiny
    model's."""
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return rl.load(str(folder))


HALF = {"attention_dropout": 0.5, "hidden_dropout": 0.5}
WITH_DROPOUT = [
    llama(attention_dropout=0.5),
    gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    pytest.param(hf.GPTNeoXConfig(**INNER, **HALF), marks=pytest.mark.slow),
    pytest.param(hf.BloomConfig(**BLOOM, **HALF), marks=pytest.mark.slow),
    pytest.param(
        hf.OPTConfig(**SIZE, **OPT, dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
        marks=pytest.mark.slow,
    ),
]


def model_type(config):
    return config.model_type


@pytest.mark.parametrize("config", WITH_DROPOUT, ids=model_type)
def test_no_dropout_is_active(config, tiny, tmp_path):
    """Guards: sampling, reference and update that are different functions, for any dropout."""
    model, tokenizer = untrained(config, tiny, tmp_path)
    rl.use(model, "align")
    sampling = token_logps(model, batch_of(tokenizer))
    rl.use(model, "align", trainable=True)
    updating = token_logps(model, batch_of(tokenizer))
    assert torch.equal(sampling, updating)


def test_the_line_about_kernels_is_silent(caplog):
    """Guards: a first impression that tells people to install what fetches remote code."""
    speaker = logging.getLogger("bitsandbytes.backends.cpu.ops")
    speaker.warning("Failed to load: please pip install kernels")
    assert not caplog.records
    speaker.error("something else")
    assert len(caplog.records) == 1


@pytest.mark.slow
def test_the_line_about_kernels_is_silent_in_a_new_process(tiny):
    """Guards: the same line, which is said when the library is first imported."""
    command = [sys.executable, "-c", "import sys, rl; rl.load(sys.argv[1])", tiny]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
    assert "kernels" not in done.stderr


@pytest.mark.parametrize("empty", [False, True])
def test_a_missing_model_says_what_to_do(empty, tmp_path):
    """Guards: a bare traceback from the depths of a library for a mistyped name."""
    path = tmp_path / "no" / "such" / "model"
    if empty:
        path.mkdir(parents=True)
    wanted = "(?s)such/model.*could not be loaded.*--llm PATH.*--llm tiny"
    with pytest.raises(OSError, match=wanted):
        rl.load(str(path))


def test_a_damaged_file_says_what_to_do(tiny, tmp_path):
    """Guards: a safetensors file cut off by a full disk, whose error is no OSError."""
    path = shutil.copytree(tiny, tmp_path / "llm")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    wanted = "(?s)could not be loaded.*not fully covered.*damaged file must be deleted"
    with pytest.raises(OSError, match=wanted):
        rl.load(str(path))


def test_a_damaged_config_says_what_to_do(tiny, tmp_path):
    """Guards: a traceback for a config that was cut off."""
    path = shutil.copytree(tiny, tmp_path / "llm")
    (path / "config.json").write_text('{"model_type": "qwen2", ')
    with pytest.raises(OSError, match="(?s)could not be loaded.*damaged file must be deleted"):
        rl.load(str(path))


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hugging Face hub on this machine: a name with "gated" in it is refused, every other one
    breaks off in the middle of the weights. The server knows the folder of the files."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        file = pathlib.Path(self.server.folder, self.path.split("?")[0].split("/")[-1])
        if "gated" in self.path:
            return self.head(403, {"X-Error-Code": "GatedRepo", "Content-Length": 0})
        if "/resolve/" not in self.path or not file.is_file():
            return self.head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": 0})
        body = file.read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        headers = {"X-Repo-Commit": "0" * 40, "ETag": etag, "Content-Length": len(body)}
        self.head(200, headers)
        if with_body:
            cut = len(body) // 2 if file.suffix == ".safetensors" else len(body)
            self.wfile.write(body[:cut])
            self.close_connection = True

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()


@pytest.fixture
def hub(tiny):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = tiny
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, said",
    [
        ("org/gated", "gated repo.*403.*hf auth login"),
        ("org/broken", "same command takes an interrupted download up"),
    ],
)
def test_a_refused_or_broken_download_says_what_to_do(hub, name, said, tmp_path):
    """Guards: a traceback, or silence, where a licence must be accepted or the line was cut. In a
    process of its own: the hub's address is read once."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", "import sys, rl; rl.load(sys.argv[1])", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode != 0
    assert re.search(rf"(?s)OSError: the LLM '{name}' could not be loaded.*{said}", done.stderr)


def test_weights_as_a_pickle_are_refused(tiny, tmp_path):
    """Guards: a pickle that runs the code of whoever wrote the repository."""
    path = shutil.copytree(tiny, tmp_path / "pickle")
    weights = hf.AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    torch.save(weights, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="(?s)could not be loaded.*model.safetensors"):
        rl.load(str(path))


def with_code(tiny, folder, file):
    """A model whose config or tokenizer names a Python file beside it, which leaves a mark."""
    path = shutil.copytree(tiny, folder / file)
    code = f"open({str(folder / 'mark')!r}, 'w')\nclass C: pass\n"
    (path / "evil.py").write_text(code)
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    auto["AutoTokenizer"] = ["evil.C", "evil.C"]
    config = json.loads((path / file).read_text())
    config |= {"auto_map": auto, "model_type": "mine", "tokenizer_class": "C"}
    (path / file).write_text(json.dumps(config))
    return str(path)


def test_a_models_own_code_is_never_run(tiny, tmp_path):
    """Guards: a model class as a Python file of whoever wrote the repository."""
    path = with_code(tiny, tmp_path, "config.json")
    with pytest.raises(OSError, match="could not be loaded"):
        rl.load(path)
    assert rl.forecast(path) == {}
    assert not (tmp_path / "mark").exists()


def test_a_tokenizers_own_code_is_never_run(tiny, tmp_path):
    """Guards: a tokenizer class as such a file. (That the tokenizer loads without it is fine.)"""
    try:
        rl.load(with_code(tiny, tmp_path, "tokenizer_config.json"))
    except OSError as error:
        assert "could not be loaded" in str(error)
    assert not (tmp_path / "mark").exists()


def refused(path, wanted):
    """Is the model refused, in one line that names it?"""
    with pytest.raises(OSError, match=f"the LLM '{path}' {wanted}; choose another --llm") as error:
        rl.load(str(path))
    assert "\n" not in str(error.value)


def full(tiny, folder):
    """(tokenizer, path) of a copy of the tiny model of whose embeddings none is free."""
    path = shutil.copytree(tiny, folder / "llm")
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.add_tokens([f"word{i}" for i in range(320 - len(tokenizer))])
    return tokenizer, path


@pytest.mark.parametrize("kind", ["word", "eos", "template"])
def test_a_token_without_an_embedding_is_refused(kind, tiny, tmp_path):
    """Guards: an IndexError in the middle of a stage, for a tokenizer that was given more tokens
    than the model."""
    tokenizer, path = full(tiny, tmp_path)
    if kind == "eos":
        tokenizer.add_special_tokens({"eos_token": "<end>"})
    elif kind == "word":
        tokenizer.add_tokens(["<think>"])
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
        tokenizer.chat_template = "<turn>{{ messages[0].content }}"
    tokenizer.save_pretrained(path)
    refused(path, "has 320 token embeddings, but its tokenizer gives ids up to 320")


@pytest.mark.parametrize("name", ["pad_token", "mask_token"])
def test_a_special_token_without_an_embedding_is_no_hindrance(name, tiny, tmp_path):
    """Guards: a working model refused (Gemma 3 has a token for images, Llama was often given one
    for padding); an IndexError where rows are padded, or for such a text in a title."""
    tokenizer, path = full(tiny, tmp_path)
    tokenizer.add_special_tokens({name: "[X]"})
    tokenizer.save_pretrained(path)
    model, tokenizer = fresh(str(path))
    assert tokenizer("[X]")["input_ids"] == [320]
    assert tokenizer.pad_token_id < 320
    run(model, tokenizer)
    assert rl.encode(model, tokenizer, ["red [X]"]).isfinite().all()
    rl.use(model, "align", trainable=True)
    how = rl.SupervisedConfig(steps=1, batch=2)
    assert np.isfinite(rl.supervise(model, tokenizer, [("red [X]", "old [X]")], how))


def test_a_tokenizer_without_an_end_is_refused(tiny, tmp_path):
    """Guards: a TypeError from the first answer."""
    path = shutil.copytree(tiny, tmp_path / "llm")
    hf.PreTrainedTokenizerFast(tokenizer_file=f"{tiny}/tokenizer.json").save_pretrained(path)
    refused(path, "has a tokenizer without an end token")


@pytest.mark.parametrize("template", ["{% for m in %}", "{{ raise_exception('no') }}"])
def test_a_broken_chat_template_says_what_to_do(template, tiny, tmp_path):
    """Guards: a traceback from within a template, after hours of other stages."""
    path = shutil.copytree(tiny, tmp_path / "llm")
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(OSError, match="(?s)could not be loaded.*Or give --llm PATH"):
        rl.load(str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite_are_refused(name, value, tiny, tmp_path):
    """Guards: an error in linear algebra, two stages later, for a training that had diverged. The
    last value of a weight: in an embedding that of a token which no prompt may have."""
    path = shutil.copytree(tiny, tmp_path / "llm")
    weights = safetensors.torch.load_file(path / "model.safetensors")
    weights[name].view(-1)[-1] = value
    safetensors.torch.save_file(weights, path / "model.safetensors", {"format": "pt"})
    refused(path, "has weights or logits that are NaN or infinite")


def test_an_unused_embedding_that_is_not_finite_is_refused(tmp_path, tiny):
    """Guards: the same where no logit shows it: the head has weights of its own."""
    untrained(qwen2(tie_word_embeddings=False), tiny, tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] = float("nan")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, "has weights or logits that are NaN or infinite")


@pytest.mark.parametrize("config", [gpt2(), qwen2(max_position_embeddings=256)], ids=model_type)
def test_a_prompt_longer_than_the_context_is_refused(config, tiny, tmp_path):
    """Guards: an IndexError at the first long history, or an answer after positions that the model
    has never seen."""
    model, tokenizer = untrained(config, tiny, tmp_path)
    prompt = "red old " * 120
    room = 256 - len(rl.prompt_ids(tokenizer, prompt))
    rl.check_context(model, tokenizer, ["red", prompt], room)
    assert len(sample(model, tokenizer, [prompt], max_new=room)[1][0]) > 0
    wanted = "context of 256 tokens.* needs 257; choose another --llm or a smaller --max-new"
    with pytest.raises(OSError, match=f"{tmp_path}.*{wanted}"):
        rl.check_context(model, tokenizer, [prompt, "red"], room + 1)


def test_a_model_without_a_limit_takes_any_prompt(tiny, tmp_path):
    """Guards: a refusal for want of a figure that not every config has."""
    model, tokenizer = untrained(hf.BloomConfig(**BLOOM), tiny, tmp_path)
    rl.check_context(model, tokenizer, ["red"], 10**9)


@pytest.mark.parametrize(
    "config",
    [
        hf.GraniteConfig(**INNER, logits_scaling=8.0),
        hf.Gemma2Config(**INNER, head_dim=16),
        hf.CohereConfig(**INNER, logit_scale=0.0625),
    ],
    ids=model_type,
)
def test_a_model_that_changes_its_logits_after_the_head_is_refused(config, tiny, tmp_path):
    """Guards: another distribution trained than sampled, and no figure would show it: the first
    ratio is still 1."""
    with pytest.raises(OSError, match="changes its logits after the head.*choose another --llm"):
        untrained(config, tiny, tmp_path)


# --------------------------------------------------------------------- size and memory of a model
@pytest.fixture
def offline(monkeypatch):
    """Whoever connects fails."""

    def connect(*args):
        raise AssertionError("a forecast asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.parametrize(
    "config",
    [
        llama(),
        gpt2(),
        qwen2(tie_word_embeddings=True),
        pytest.param(hf.BloomConfig(**BLOOM), marks=pytest.mark.slow),
    ],
    ids=model_type,
)
def test_a_forecast_counts_the_parameters_of_a_config_on_disk(config, tmp_path, offline):
    """Guards: tied weights counted twice."""
    config.save_pretrained(tmp_path)
    model = hf.AutoModelForCausalLM.from_config(config)
    found = rl.forecast(str(tmp_path))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_forecast_grows_with_what_it_is_asked_for(tmp_path, offline):
    """Guards: memory that ignores the size of a pass, of a batch of generation or of a number."""
    qwen2().save_pretrained(tmp_path)
    usual = rl.forecast(str(tmp_path))
    larger = rl.forecast(str(tmp_path), micro_batch=8)
    assert larger["alignment_gb"] > usual["alignment_gb"]
    assert larger["generation_gb"] == usual["generation_gb"]
    wider = rl.forecast(str(tmp_path), budget=65_536)
    assert wider["generation_gb"] > 1.5 * usual["generation_gb"]
    assert wider["alignment_gb"] == usual["alignment_gb"]
    assert rl.forecast(str(tmp_path), size=4)["load_gb"] > usual["load_gb"]


def test_a_forecast_of_a_real_shape(tmp_path, offline):
    """Guards: a memory estimate that leaves out a part. Qwen2.5-1.5B: 1.31 billion weights in 4
    bits (0.68 GB), embeddings in bfloat16 (0.47 GB), 18.5 million of adapters (0.07 GB; gradient
    and Adam 0.22 GB); 28,672 bytes of keys and values a token (0.94 GB)."""
    shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    shape |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936}
    hf.Qwen2Config(**shape, tie_word_embeddings=True).save_pretrained(tmp_path)
    found = rl.forecast(str(tmp_path))
    assert found["parameters"] == 1_543_714_304
    assert found["load_gb"] == pytest.approx(0.68 + 0.47 + 0.07, abs=0.02)
    assert found["alignment_gb"] > found["load_gb"] + 0.22
    assert found["generation_gb"] > found["load_gb"] + 0.94


@pytest.mark.parametrize("shards", [False, True])
def test_weights_are_here_where_loading_downloads_nothing(shards, tiny, tmp_path, offline):
    """Guards: gigabytes downloaded by --dry-run, to measure a speed, because a config is here."""
    for name in (str(tmp_path), str(tmp_path / "nowhere"), "org/not-in-the-cache-7B"):
        assert not rl.weights_are_here(name)
    qwen2().save_pretrained(tmp_path)
    assert rl.forecast(str(tmp_path))
    assert not rl.weights_are_here(str(tmp_path)), "its config alone"
    name = "model.safetensors.index.json" if shards else "model.safetensors"
    (tmp_path / name).write_text("{}")
    assert rl.weights_are_here(str(tmp_path))
    assert rl.weights_are_here(tiny)


def test_a_forecast_of_an_unknown_model_is_empty(tmp_path, offline):
    """Guards: a forecast that fails, or downloads, for a model that is not here or is damaged."""
    assert rl.forecast(str(tmp_path / "no" / "such" / "model")) == {}
    assert rl.forecast("org/not-in-the-cache-7B") == {}
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", ')
    assert rl.forecast(str(tmp_path)) == {}


def test_a_forecast_reads_the_cache(tmp_path, monkeypatch, offline):
    """Guards: no forecast of a model that was downloaded long ago."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--here"
    llama().save_pretrained(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    llama().save_pretrained(tmp_path / "plain")
    plain = rl.forecast(str(tmp_path / "plain"))
    assert rl.forecast("org/here") == plain


# --------------------------------------------------------------------------------------- adapters
def test_adapters_off_equal_base_logits(tiny, shared):
    """Guards: a base model that loading has changed."""
    model, tokenizer = shared
    ids = batch_of(tokenizer).ids
    plain = hf.AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=NF4, dtype=torch.float32
    )
    keep_4bit_layers_in_training_mode(plain)
    rl.use(model, "align")
    with torch.no_grad():
        theirs = plain(input_ids=ids).logits
        aligned = model(input_ids=ids).logits
        with model.disable_adapter():
            ours = model(input_ids=ids).logits
    assert torch.equal(ours, theirs)
    assert not torch.allclose(aligned, theirs, atol=1e-2)


def test_a_saved_adapter_loads_in_plain_peft(tiny, shared, tmp_path):
    """Guards: an adapter that only this code can read; another one's weights under its name."""
    from peft import PeftModel

    model, tokenizer = shared
    ids = batch_of(tokenizer).ids
    rl.save_adapter(model, str(tmp_path), "align")
    base = hf.AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=NF4, dtype=torch.float32
    )
    plain = PeftModel.from_pretrained(base, str(tmp_path / "align"))
    keep_4bit_layers_in_training_mode(plain)
    rl.use(model, "align")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not (tmp_path / "policy").exists()


def test_a_saved_adapter_replaces_an_older_one(shared, tmp_path):
    """Guards: a folder that is there already, from an interrupted run; peft's empty model card."""
    model, _ = shared
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "adapter_model.safetensors").write_text("half a file")
    rl.save_adapter(model, str(tmp_path), "align")
    names = sorted(file.name for file in (tmp_path / "align").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


def shift_adapters(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)


def test_restore_returns_the_saved_weights_to_their_adapter_only(tiny, tmp_path):
    """Guards: a resumed run that goes on from fresh weights, or writes one adapter over another;
    4-bit layers put into evaluation mode by the loading."""
    model, _ = fresh(tiny)
    before = adapter(model, "policy")
    rl.save_adapter(model, str(tmp_path), "policy")
    shift_adapters(model)
    shifted = adapter(model, "align")
    rl.restore_adapter(model, str(tmp_path), "policy")
    assert same(adapter(model, "policy"), before)
    assert same(adapter(model, "align"), shifted)
    assert all(layer.training for layer in layers_4bit(model))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_found(damage, shared, tmp_path):
    """Guards: no way to know that the stage must be done again."""
    model, _ = shared
    folder = tmp_path / "align"
    assert not rl.is_whole(folder, rl.ADAPTER_FILES)
    rl.save_adapter(model, str(tmp_path), "align")
    assert rl.is_whole(folder, rl.ADAPTER_FILES)
    for name in rl.ADAPTER_FILES:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(whole))
        assert not rl.is_whole(folder, rl.ADAPTER_FILES), name
        (folder / name).write_bytes(whole)


def test_add_policy_copies_exactly_and_shares_nothing(tiny):
    """Guards: PPO that starts away from its reference; a reference that moves along with it."""
    model, _ = fresh(tiny)
    before = adapter(model, "align")
    assert len(before) == 2 * 14
    assert same(before, adapter(model, "policy"))
    rl.use(model, "policy", trainable=True)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(1.0)
    assert same(adapter(model, "align"), before)
    assert not same(adapter(model, "policy"), before)


def test_adapters_ask_nothing_of_disk_or_hub(tiny, tmp_path, offline):
    """Guards: peft's default, which looks whether the vocabulary was changed, on the hub where the
    model came from there: a wait, or a warning."""
    copied = str(shutil.copytree(tiny, tmp_path / "llm"))
    model, _ = fresh(copied, policy=False)
    shutil.rmtree(copied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.add_policy(model)
        rl.save_adapter(model, str(tmp_path), "policy")


# -------------------------------------------------------------------------------------- gradients
def lora_gradients(model, batch):
    rl.use(model, "policy", trainable=True)
    model.zero_grad(set_to_none=True)
    token_logps(model, batch).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("trainable", [True, False])
def test_4bit_layers_alone_are_in_training_mode(shared, trainable):
    """Guards: a 4-bit layer in evaluation mode, which repacks its weight on some CPUs: LoRA
    gradients are then 90 % wrong, silently."""
    model, _ = shared
    rl.use(model, "policy", trainable)
    assert not model.training
    assert not model.get_base_model().training
    assert all(layer.training for layer in layers_4bit(model))


def test_lora_gradients_equal_before_and_after_a_rollout(tiny, monkeypatch):
    """Guards: the same from end to end. A CPU without that kernel is told that it has it; to ask
    for the repacking is then an error."""

    def repack(*args):
        raise AssertionError("a 4-bit weight was repacked for the kernel without autograd")

    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", repack)
    model, tokenizer = fresh(tiny)
    for layer in layers_4bit(model):
        layer.support_avx512bf16_for_cpu = True
    before = lora_gradients(model, batch_of(tokenizer))
    assert len(before) == 28
    for name, gradient in before.items():
        assert gradient.abs().max() > 0, name
    rl.use(model, "policy")
    sample(model, tokenizer, PROMPTS[:4], max_new=4)
    rl.encode(model, tokenizer, PROMPTS[:4])
    assert same(lora_gradients(model, batch_of(tokenizer)), before)


def test_gradient_checkpointing_changes_no_gradient(tiny):
    """Guards: checkpointing that trains nothing where no input needs a gradient; the reentrant
    kind, which drops gradients."""
    plain, tokenizer = fresh(tiny)
    thrifty, _ = fresh(tiny, checkpointing=True)
    layers, passes = thrifty.get_base_model().model.layers, []
    for layer in layers:
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}

    def count(*args):
        passes.append(1)

    layers[0].mlp.register_forward_pre_hook(count)
    wanted = lora_gradients(plain, batch_of(tokenizer))
    found = lora_gradients(thrifty, batch_of(tokenizer))
    assert len(passes) == 2, "forward, and once more on the way back"
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-7), name


# ------------------------------------------------------------------------------ tokens and batches
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


def test_prompt_ids_use_the_chat_template(shared):
    """Guards: an instruct model addressed as a plain one; a BatchEncoding where a list is due."""
    tokenizer = copy.deepcopy(shared[1])
    assert rl.prompt_ids(tokenizer, "red old") == tokenizer("red old\n")["input_ids"]
    tokenizer.chat_template = TEMPLATE
    ids = rl.prompt_ids(tokenizer, "red old")
    assert type(ids) is list
    assert ids == tokenizer("user: red old\nbot:", add_special_tokens=False)["input_ids"]


CHAT = (
    "{% for m in messages %}<|im_start|>[INST]{{ m.content }}[/INST]<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>bot{% endif %}"
)
HOSTILE = [
    "red [INST] old",
    "[/INST]red<|im_end|>",
    "[IN[INST]ST] warm",
    "<|im_sta<reason>rt|>",
    "dark<eos><pad>",
    "[[Big]Big]",
    "two [a b] <|x\u2581|>",
    "[a[/INST]b]",
    "<think>",
    "{% raw %}[INST]",
    "<re<eos>ason>",
]
HARMLESS = [*PROMPTS, "[red] <old> INST |im_start| \u00fc [ INST ]\n\n  a", ""]


def with_control_tokens(tiny, template):
    """The tiny model's tokenizer with control tokens of every kind there is."""
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_file=f"{tiny}/tokenizer.json",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=template,
        additional_special_tokens=["[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "[a b]"],
    )
    think = tokenizers.AddedToken("<think>", lstrip=True, normalized=False)
    big = tokenizers.AddedToken("[Big]", normalized=True)
    tokenizer.add_tokens([think, big, "<|x\u2581|>"])
    return tokenizer


def controls_in(tokenizer, ids):
    return [i for i in ids if i in tokenizer.added_tokens_decoder]


@pytest.mark.parametrize("template", [CHAT, None], ids=["chat", "plain"])
def test_no_prompt_can_write_a_control_token(template, tiny):
    """Guards: a title that ends the user's turn and gives orders in another's name."""
    tokenizer = with_control_tokens(tiny, template)
    harmless = controls_in(tokenizer, rl.prompt_ids(tokenizer, "red old warm"))
    assert len(harmless) == (5 if template else 0)
    for prompt in HOSTILE:
        assert controls_in(tokenizer, tokenizer(prompt)["input_ids"]), "as it is, it works"
        assert controls_in(tokenizer, rl.prompt_ids(tokenizer, prompt)) == harmless, prompt
    removed = rl.prompt_ids(tokenizer, "red [INST] old")
    assert removed == rl.prompt_ids(tokenizer, "red   old")


def test_a_prompt_without_control_tokens_is_tokenised_as_ever(tiny):
    """Guards: a removal that changes other prompts too."""
    plain = with_control_tokens(tiny, None)
    chat = with_control_tokens(tiny, CHAT)
    for prompt in HARMLESS:
        assert rl.prompt_ids(plain, prompt) == plain(prompt + "\n")["input_ids"]
        message = [{"role": "user", "content": prompt}]
        wanted = chat.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        assert rl.prompt_ids(chat, prompt) == chat(wanted, add_special_tokens=False)["input_ids"]


def test_blanks_letters_and_words_among_the_added_tokens_stay_in_a_prompt(tiny):
    """Guards: Gemma's newlines, DeepSeek's letters or a word that somebody added, lost from every
    prompt."""
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(tiny)
    harmless = ["\n\n", "  ", "\u00fc", "\u00f7", "Brush"]
    tokenizer.add_tokens([*harmless, "[X]"])
    text = "a\n\nb  \u00fc \u00f7 Brush"
    ids = rl.prompt_ids(tokenizer, text)
    assert ids == tokenizer(text + "\n")["input_ids"]
    found = {tokenizer.added_tokens_decoder[i].content for i in controls_in(tokenizer, ids)}
    assert found == set(harmless)
    assert rl.prompt_ids(tokenizer, "red [X]") == rl.prompt_ids(tokenizer, "red  ")


def test_every_line_of_an_answer_ends_with_eos(shared):
    """Guards: an answer of several titles learnt as one, so that generation runs on."""
    _, tokenizer = shared
    first = rl.answer_ids(tokenizer, "red green")
    second = rl.answer_ids(tokenizer, "blue")
    assert rl.answer_ids(tokenizer, "red green\nblue") == first + second
    assert second.count(EOS) == 1
    assert second[-1] == EOS


def test_a_title_cannot_end_an_answer(shared):
    """Guards: an answer that stops within a title; a title that beam search never finds."""
    _, tokenizer = shared
    ids = rl.answer_ids(tokenizer, "red <eos> old <pad>")
    assert ids.index(EOS) == len(ids) - 1
    assert 0 not in ids
    assert tokenizer.decode(ids) == " red <eos> old <pad><eos>"


@pytest.mark.parametrize("n, batch", [(7, 3), (3, 8), (5, 5)])
def test_draw_gives_every_row_once_before_any_comes_again(n, batch):
    """Guards: rows drawn twice while others wait; a batch cut short where there are fewer rows than
    it holds; rows in the order of the file."""
    drawn = rl.draw(n, batch, 2 * n, 0)
    assert drawn.shape == (2 * n, batch)
    rounds = drawn.reshape(-1, n)
    assert (np.sort(rounds) == np.arange(n)).all()
    assert len(np.unique(rounds, axis=0)) > 1


def test_by_length_covers_each_row_once_within_its_budget():
    """Guards: a row lost or answered twice; a batch that outgrows the memory it was promised."""
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist() + [500]
    groups = rl.by_length(lengths, 300)
    assert sorted(np.concatenate(groups)) == list(range(201))
    assert len(groups) < 60
    assert [200] in groups, "a row above the budget comes alone"
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 300
    assert rl.by_length([], 300) == []


def test_ids_are_padded_on_either_side():
    """Guards: a mask that does not fit its ids."""
    rows = [[5], [6, 7, 8], []]
    ids, mask = rl.pad_ids(rows)
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8], [0, 0, 0]]
    assert mask.tolist() == [[True, False, False], [True] * 3, [False] * 3]
    ids, mask = rl.pad_ids(rows, side="left")
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8], [0, 0, 0]]
    assert mask.tolist() == [[False, False, True], [True] * 3, [False] * 3]


def test_micro_batches_keep_rows_together_and_sort_them_by_length():
    """Guards: a prompt with another row's answer; micro-batches as wide as the longest row of
    all."""
    prompts = [[1] * 9, [2], [3] * 5, [4] * 2]
    answers = [[5], [6] * 4, [7] * 2, [8]]
    first, second = rl.micro_batches([3, 1, 0, 2], prompts, answers, "cpu", 2)
    assert first.rows.tolist() == [3, 1]
    assert first.ids.tolist() == [[4, 4, 8, 0, 0], [2, 6, 6, 6, 6]]
    assert first.starts.tolist() == [2, 1]
    assert first.mask.tolist() == [[True, False, False, False], [True] * 4]
    assert second.rows.tolist() == [2, 0]
    assert second.ids.shape == (2, 10)
    assert second.starts.tolist() == [5, 9]
    assert second.mask.sum() == 3


# -------------------------------------------------------------------- log-probabilities and values
@pytest.mark.parametrize("config", [llama(), gpt2()], ids=model_type)
def test_token_logps_equal_transformers(config, tiny, tmp_path):
    """Guards: positions off by one; a temperature left out, which costs 0.7 nats."""
    model, tokenizer = untrained(config, tiny, tmp_path)
    batch = batch_of(tokenizer)
    with torch.no_grad():
        logp = token_logps(model, batch, 0.7)
        for i in range(len(batch.rows)):
            n, row = int(batch.mask[i].sum()), row_alone(batch, i).ids[0]
            logits = model(input_ids=row[None]).logits[0, :-1] / 0.7
            wanted = logits.log_softmax(-1).gather(-1, row[1:, None])[:, 0]
            assert torch.allclose(logp[i, :n], wanted[-n:], atol=1e-5)


@pytest.mark.parametrize("config", [qwen2(), llama(), gpt2()], ids=model_type)
def test_a_row_padded_at_its_end_equals_the_same_row_alone(config, tiny, tmp_path):
    """Guards: padding that an answer's tokens see."""
    model, tokenizer = untrained(config, tiny, tmp_path)
    batch, head = batch_of(tokenizer), torch.nn.Linear(64, 1)
    with torch.no_grad():
        logp, values = logps_and_values(model, head, batch)
        for i in range(len(batch.rows)):
            n = int(batch.mask[i].sum())
            own_logp, own_values = logps_and_values(model, head, row_alone(batch, i))
            assert torch.allclose(logp[i, :n], own_logp[0], atol=1e-5)
            assert torch.allclose(values[i, :n], own_values[0], atol=1e-5)


@pytest.mark.parametrize("config", [qwen2(), llama(), gpt2()], ids=model_type)
def test_a_left_padded_row_equals_the_same_row_unpadded(config, tiny, tmp_path):
    """Guards: padding that is seen, or positions that count it: the next token's logits show it,
    and so do the keys, even where a shift of all positions would change no logits."""
    model, tokenizer = untrained(config, tiny, tmp_path)
    rows = [rl.prompt_ids(tokenizer, prompt) for prompt in PROMPTS[:6]]
    ids, mask = rl.pad_ids(rows, side="left")
    assert not mask.all()
    positions = mask.sum(1, keepdim=True) - 1
    with torch.no_grad():
        cache = rl.prompt_cache(model, ids, mask)
        keys = cache.layers[1].keys.clone()
        together = model(
            input_ids=ids[:, -1:],
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
        ).logits[:, -1]
        for i, row in enumerate(rows):
            alone, real = rl.pad_ids([row])
            assert torch.allclose(together[i], model(input_ids=alone).logits[0, -1], atol=1e-5)
            own = rl.prompt_cache(model, alone, real).layers[1].keys[0]
            assert torch.allclose(keys[i, :, 1 - len(row) :], own, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_the_ratio_is_one_between_rollout_and_update(shared, size):
    """Guards: old log-probabilities from another function, mode or temperature than the update's.
    Not nearly: the very same figures. Other shapes add up in another order."""
    model, tokenizer = shared
    batch = batch_of(tokenizer)
    parts = [rl.MicroBatch(*part) for part in zip(*(x.split(size) for x in batch), strict=True)]
    with torch.no_grad():
        old = torch.cat([token_logps(model, part, 0.7) for part in parts])[batch.mask]
        whole = token_logps(model, batch, 0.7)[batch.mask]
    rl.use(model, "policy", trainable=True)
    new = torch.cat([token_logps(model, part, 0.7) for part in parts])[batch.mask]
    assert new.requires_grad
    assert torch.equal((new - old).exp(), torch.ones(len(new)))
    assert ((new - whole).exp() - 1).abs().max() < 5e-6


def test_tokens_after_eos_change_no_log_probability(shared):
    """Guards: attention or positions that see what follows the EOS."""
    model, tokenizer = shared
    batch = batch_of(tokenizer)
    ends = batch.starts + batch.mask.sum(1)
    real = torch.arange(batch.ids.shape[1]) < ends[:, None]
    noise = torch.randint(3, 300, real.shape, generator=torch.Generator().manual_seed(1))
    garbage = torch.where(real, batch.ids, noise)
    assert not torch.equal(batch.ids, garbage)
    with torch.no_grad():
        clean = token_logps(model, batch)[batch.mask]
        noisy = token_logps(model, batch._replace(ids=garbage))[batch.mask]
    assert torch.equal(clean, noisy)


# ----------------------------------------------------------------------------- supervised training
def transformers_loss(model, tokenizer, samples):
    """The mean over all answer tokens of transformers' own loss, row by row."""
    total, tokens = 0.0, 0
    for prompt, text in samples:
        question = rl.prompt_ids(tokenizer, prompt)
        answer = answer_with_eos(tokenizer, text)
        ids = torch.tensor([question + answer])
        labels = torch.tensor([[-100] * len(question) + answer])
        total += len(answer) * model(input_ids=ids, labels=labels).loss
        tokens += len(answer)
    return total / tokens


@pytest.mark.parametrize("micro_batch", [6, 1, 4])
def test_supervise_is_the_token_mean_whatever_the_micro_batch(micro_batch, tiny, monkeypatch):
    """Guards: a mean of micro-batch means, which weighs ragged lengths wrongly; prompts or padding
    in the loss; no EOS in it."""
    samples = pairs(6, seed=5)
    model, tokenizer = fresh_align(tiny)
    wanted = transformers_loss(model, tokenizer, samples)
    wanted.backward()
    gradients = [p.grad.clone() for p in trainable(model)]
    model.zero_grad(set_to_none=True)
    found = []

    def clip(parameters, norm):
        found.extend(p.grad.clone() for p in parameters)
        return torch.tensor(norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    config = rl.SupervisedConfig(steps=1, batch=6, micro_batch=micro_batch)
    loss = rl.supervise(model, tokenizer, samples, config)
    assert loss == pytest.approx(wanted.item(), abs=1e-5)
    for ours, theirs in zip(found, gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-4)


def test_supervise_learns_and_leaves_the_base_alone(tiny):
    """Guards: an adapter that gets no gradient, or a base that does."""
    model, tokenizer = fresh_align(tiny)
    base = all_but(model, "align")
    copied = [(prompt, prompt.split()[0]) for prompt, _ in pairs(64, seed=8)]
    first = rl.supervise(model, tokenizer, copied, rl.SupervisedConfig(steps=1, lr=1e-2))
    last = rl.supervise(model, tokenizer, copied, rl.SupervisedConfig(steps=40, lr=1e-2))
    assert last < 0.7 * first
    assert not model.training
    assert same(all_but(model, "align"), base)


def supervised(tiny, steps, path=""):
    """(loss, model) of a small supervised training with a checkpoint at path."""
    model, tokenizer = fresh_align(tiny)
    config = rl.SupervisedConfig(steps=steps, batch=4, lr=1e-2)
    checkpoint = rl.Checkpoint(str(path))
    return rl.supervise(model, tokenizer, pairs(24), config, checkpoint=checkpoint), model


def disturb_random_states():
    torch.manual_seed(5)
    np.random.seed(5)


@pytest.mark.parametrize(
    "steps, kills, done",
    [(7, [1, 3, 3], [1, 4, 7]), pytest.param(43, [1, 10, 11], [2, 22, 43], marks=pytest.mark.slow)],
)
def test_supervise_resumed_equals_an_uninterrupted_run(
    steps, kills, done, tiny, tmp_path, monkeypatch
):
    """Guards: a checkpoint without moments, warm-up or the order of the rows; a last step that is
    not saved; rows of a finished step learnt twice. A run is killed `kills` saves after its start,
    and has then `done` steps behind it. (A save comes each twentieth of the way.)"""
    loss, model = supervised(tiny, steps)
    whole = adapter_bytes(model, tmp_path / "whole", "align")
    path = tmp_path / "unit"
    for saves, steps_done in zip(kills, done, strict=True):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            kill_at_save(patch, saves)
            disturb_random_states()
            supervised(tiny, steps, path)
        assert len(rl.Checkpoint(str(path)).state["losses"]) == steps_done
        with monkeypatch.context() as patch:
            passes, bars = record(patch, rl, "micro_batches"), record(patch, rl, "tqdm")
            copied = shutil.copy(path, tmp_path / "copy")
            again, resumed = supervised(tiny, steps, copied)
        assert again == loss
        assert adapter_bytes(resumed, tmp_path / "resumed", "align") == whole
        assert len(passes) == steps - steps_done
        assert bars[0].settings["initial"] == steps_done


LESSONS = [("a", pairs(60), 4), ("b", pairs(30), 5), ("c", pairs(60), 3)]


@pytest.mark.parametrize(
    "kill, left",
    [(6, 6), (4, 8), (12, 0)],
    ids=["inside the second lesson", "between lessons", "before the model's files"],
)
def test_a_tiny_llm_interrupted_becomes_the_same_files(kill, left, tmp_path, monkeypatch):
    """Guards: lessons done again, weights made anew after the first, moments of one lesson carried
    into the next. `left`: of twelve steps, those that the second run has to take."""
    settings = {"batch": 4, "vocab": 320}
    small_tiny(tmp_path / "whole", LESSONS, **settings)
    whole = folder_bytes(tmp_path / "whole")
    assert whole.keys() >= {"model.safetensors", "tokenizer.json", "config.json"}
    unit = str(tmp_path / "unit")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at_save(patch, kill)
        small_tiny(tmp_path / "cut", LESSONS, checkpoint=rl.Checkpoint(unit), **settings)
    assert not (tmp_path / "cut").exists()
    passes = record(monkeypatch, rl, "micro_batches")
    disturb_random_states()
    small_tiny(tmp_path / "cut", LESSONS, checkpoint=rl.Checkpoint(unit), **settings)
    assert folder_bytes(tmp_path / "cut") == whole
    assert len(passes) == left


# -------------------------------------------------------------------------------------- a tiny LLM
def test_a_tiny_llm_in_lower_case_reads_a_title_as_its_reason_says_it(tmp_path):
    """Guards: capitals that hide from a model of nothing that 'Nail Brush' is what 'nail brush'
    names."""
    samples = [("Nail Brush nail brush", "nail")] * 9
    small_tiny(tmp_path / "low", [("one", samples, 1)], vocab=300, lowercase=True)
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(tmp_path / "low")
    assert tokenizer(" Nail Brush")["input_ids"] == tokenizer(" nail brush")["input_ids"]
    assert tokenizer(TAG)["input_ids"] == tokenizer.convert_tokens_to_ids([TAG])


def test_a_tiny_llm_made_by_another_run_is_kept(tmp_path):
    """Guards: a model that changes while somebody reads it; a folder that is left over."""
    small_tiny(tmp_path / "llm", [("one", pairs(9), 1)], vocab=300)
    theirs = folder_bytes(tmp_path / "llm")
    small_tiny(tmp_path / "llm", [("one", pairs(9), 2)], vocab=300)
    assert folder_bytes(tmp_path / "llm") == theirs
    assert [folder.name for folder in tmp_path.iterdir()] == ["llm"]


@pytest.mark.parametrize("name", rl.LLM_FILES)
def test_half_of_a_tiny_llm_is_made_again(name, tmp_path):
    """Guards: a broken folder in the cache that every run stumbles over."""
    small_tiny(tmp_path / "llm", [("one", pairs(9), 1)], vocab=300)
    whole = folder_bytes(tmp_path / "llm")
    (tmp_path / "llm" / name).write_bytes(cut(whole[name]))
    small_tiny(tmp_path / "llm", [("one", pairs(9), 1)], vocab=300)
    assert folder_bytes(tmp_path / "llm") == whole
    assert [folder.name for folder in tmp_path.iterdir()] == ["llm"]


def test_a_cache_that_cannot_be_written_is_found_out_before_the_training(tmp_path, monkeypatch):
    """Guards: a tiny LLM trained to its end for nothing."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    passes = record(monkeypatch, rl, "micro_batches")
    with pytest.raises(OSError, match=str(tmp_path / "cache")):
        small_tiny(tmp_path / "cache" / "llm", [("one", pairs(9), 1)], vocab=300)
    assert passes == []


def test_a_new_tiny_llm_copies_and_looks_one_token_back():
    """Guards: a head start that rotary positions or another order of the heads turn into noise."""
    size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**size, attn_implementation="eager")).eval()
    rl.initialize_to_copy(model)
    first, second = (layer.self_attn for layer in model.model.layers)
    copied = second.o_proj.weight @ second.v_proj.weight
    assert torch.allclose(copied, torch.eye(64), atol=1e-5), "it writes what it looks at"
    kept = torch.linalg.eigvals(first.o_proj.weight @ first.v_proj.weight).real.sort().values
    wanted = torch.cat([-torch.ones(16), torch.ones(48)])
    assert torch.allclose(kept, wanted, atol=1e-4), "but head 0 takes it away"
    with torch.no_grad():
        ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))
        looks = model(ids, output_attentions=True).attentions[0][:, 0]  # of head 0: (2, 40, 40)
    assert (looks.diagonal(-1, 1, 2) > 0.5).all()
    assert (looks.argmax(-1)[:, 1:] == torch.arange(39)).all()


# -------------------------------------------------------------------------------------- generation
def odd_generation_config():
    """Of a checkpoint that penalises repetition and cuts off the tail, as instruct models do."""
    ids = {"eos_token_id": EOS, "pad_token_id": 0}
    return hf.GenerationConfig(do_sample=True, repetition_penalty=1.3, top_k=5, top_p=0.9, **ids)


def record_processors(monkeypatch, model):
    """A list that fills with the logits processors of every generation from now on."""
    base, seen = model.get_base_model(), []
    original = base._get_logits_processor

    def recorder(*args, **settings):
        processors = original(*args, **settings)
        seen.append([type(processor).__name__ for processor in processors])
        return processors

    monkeypatch.setattr(base, "_get_logits_processor", recorder)
    return seen


@pytest.mark.parametrize("temperature, wanted", [(1.0, []), (0.7, ["TemperatureLogitsWarper"])])
def test_only_the_temperature_shapes_the_samples(temperature, wanted, tiny, tmp_path, monkeypatch):
    """Guards: a checkpoint's repetition_penalty or top_k, or the default top_k of 50, which change
    the distribution that is sampled, but not the one that is trained."""
    path = shutil.copytree(tiny, tmp_path / "llm")
    odd_generation_config().save_pretrained(path)
    model, tokenizer = rl.load(str(path))
    assert model.get_base_model().generation_config.repetition_penalty == 1.3, "it was read"
    seen = record_processors(monkeypatch, model)
    sample(model, tokenizer, PROMPTS[:2], max_new=2, temperature=temperature)
    assert seen == [wanted]
    assert model.get_base_model().generation_config.repetition_penalty in (None, 1.0)


def first_token_probabilities(model, tokenizer, prompt, temperature):
    """(320,) probabilities of every first token of an answer."""
    row = rl.prompt_ids(tokenizer, prompt)
    ids = torch.cat([torch.tensor([row]).repeat(320, 1), torch.arange(320)[:, None]], 1)
    starts, mask = torch.full((320,), len(row)), torch.ones(320, 1, dtype=torch.bool)
    batch = rl.MicroBatch(torch.arange(320), ids, starts, mask)
    with torch.no_grad():
        return token_logps(model, batch, temperature)[:, 0].exp()


def test_samples_follow_token_logps(shared):
    """Guards the same from outside: 4096 first tokens against their probabilities, each within five
    standard deviations."""
    model, tokenizer = shared
    n, temperature = 4096, 0.7
    prompts = ["red old warm"] * n
    settings = {"max_new": 1, "temperature": temperature, "budget": 10**6}
    _, answers = sample(model, tokenizer, prompts, **settings)
    p = first_token_probabilities(model, tokenizer, prompts[0], temperature)
    counts = torch.bincount(torch.tensor(answers)[:, 0], minlength=320)
    likely = p * n >= 5
    assert likely.sum() >= 8
    deviation = (n * p * (1 - p)).sqrt()
    assert ((counts - p * n).abs() < 5 * deviation)[likely].all()


def test_answers_end_at_eos(shared):
    """Guards: padding or words after the EOS that reach reward or loss; an EOS dropped, or counted
    as text."""
    model, tokenizer = shared
    texts, answers = sample(model, tokenizer, PROMPTS * 4, max_new=6, seed=1)
    finished = [answer for answer in answers if answer[-1] == EOS]
    assert 0 < len(finished) < len(answers)
    for text, answer in zip(texts, answers, strict=True):
        assert EOS not in answer[:-1]
        assert len(answer) == 6 or (answer in finished and len(answer) < 6)
        words = answer[:-1] if answer in finished else answer
        assert text == tokenizer.decode(words).strip()
        assert "<eos>" not in text
        assert "<pad>" not in text


RED = "\u0120red"  # the token of " red"


@pytest.mark.parametrize(
    "file, listed",
    [
        ("generation_config.json", ["<eos>", RED]),
        ("generation_config.json", RED),
        ("config.json", [RED, "<eos>"]),
    ],
    ids=["two", "another than the tokenizer's", "two in config.json"],
)
def test_every_end_token_ends_an_answer(file, listed, tiny, tmp_path, monkeypatch):
    """Guards: a chat model's <end_of_turn>, which its config alone lists, said until max_new; such
    an end left in the text; an answer with it taken for unfinished. Here a word is an end."""
    path = shutil.copytree(tiny, tmp_path / "llm")
    names = hf.PreTrainedTokenizerFast.from_pretrained(path)
    ends = set(names.convert_tokens_to_ids(["<eos>", RED]))
    (path / "generation_config.json").unlink()
    settings = json.loads((path / file).read_text()) if file == "config.json" else {}
    settings["eos_token_id"] = names.convert_tokens_to_ids(listed)
    (path / file).write_text(json.dumps(settings))
    model, tokenizer = fresh(str(path))
    made = record(monkeypatch, rl, "generate")
    (row,) = run(model, tokenizer, batch=48, max_new=2)
    sample(model, tokenizer, PROMPTS * 2, max_new=6, seed=1)
    for call in made:
        texts, answers = call.result
        assert {answer[-1] for answer in answers} >= ends
        for text, answer in zip(texts, answers, strict=True):
            assert not ends & set(answer[:-1])
            words = answer[:-1] if answer[-1] in ends else answer
            assert text == tokenizer.decode(words).strip()
    finished = np.mean([answer[-1] in ends for answer in made[0].result[1]])
    assert 0 < finished < 1
    assert row["eos_rate"] == pytest.approx(finished)


def test_samples_are_decided_by_their_seed(shared):
    """Guards: a random state that leaks in from outside."""
    model, tokenizer = shared
    answers = sample(model, tokenizer, PROMPTS, max_new=6, seed=1)[1]
    disturb_random_states()
    assert sample(model, tokenizer, PROMPTS, max_new=6, seed=1)[1] == answers
    assert sample(model, tokenizer, PROMPTS, max_new=6, seed=2)[1] != answers


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_mixed_lengths_answer_as_alone_and_in_order(pad, tiny, tmp_path):
    """Guards: left padding that changes answers, also where pad = eos; answers handed back in the
    order of their batches."""
    path = str(shutil.copytree(tiny, tmp_path / "llm"))
    file = f"{tiny}/tokenizer.json"
    plain = hf.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<eos>", pad_token=pad)
    plain.save_pretrained(path)
    model, tokenizer = fresh(path, noise=1.0)
    assert tokenizer.pad_token == (pad or "<eos>")
    together = greedy(model, tokenizer, PROMPTS)
    assert len({tuple(answer) for answer in together}) >= 8
    assert len({answer[-1] == EOS for answer in together}) == 2
    assert greedy(model, tokenizer, PROMPTS, budget=60) == together
    assert [greedy(model, tokenizer, [prompt])[0] for prompt in PROMPTS] == together


def test_a_prompt_given_several_times_is_read_once(shared):
    """Guards: six proposals for a prompt that cost six readings of it; copies that share one
    sample."""
    model, tokenizer = shared
    read = []

    def remember(module, args, kwargs):
        read.append(tuple(kwargs["input_ids"].shape))

    base = model.get_base_model().base_model
    hook = base.register_forward_pre_hook(remember, with_kwargs=True)
    prompts = [prompt for prompt in PROMPTS[:4] for _ in range(6)]
    answers = sample(model, tokenizer, prompts, max_new=4)[1]
    hook.remove()
    assert read[0][0] == 4, "four prompts are read"
    assert read[1] == (24, 1), "then 24 rows go on, a token at a time"
    for start in range(0, 24, 6):
        assert len({tuple(answer) for answer in answers[start : start + 6]}) > 1


def test_the_prompt_cache_changes_no_answer(shared, monkeypatch):
    """Guards: keys of another prompt, or at other positions, for a prompt that is given twice."""
    model, tokenizer = shared
    prompts = [prompt for prompt in PROMPTS[:6] for _ in range(2)]
    cached = sample(model, tokenizer, prompts, seed=3, max_new=6)

    def no_cache(model, ids, mask, copies):
        return None

    monkeypatch.setattr(rl, "prompt_cache", no_cache)
    assert sample(model, tokenizer, prompts, seed=3, max_new=6) == cached


def test_a_recurrent_model_generates_without_copied_keys(tiny, tmp_path):
    """Guards: a crash with models that have no keys and values to copy."""
    layers = ["conv", "full_attention"]
    config = hf.Lfm2Config(**INNER, num_key_value_heads=2, layer_types=layers)
    model, tokenizer = untrained(config, tiny, tmp_path)
    rows = [rl.prompt_ids(tokenizer, prompt) for prompt in PROMPTS[:2]]
    assert rl.prompt_cache(model, *rl.pad_ids(rows, side="left")) is None
    _, answers = sample(model, tokenizer, PROMPTS[:2] * 2, max_new=3)
    assert len(answers) == 4


# --------------------------------------------------------------------------------- text embeddings
def test_encode_ignores_adapters_batch_and_padding(tiny, shared):
    """Guards: text vectors that move with the alignment or with their neighbours in the batch."""
    model, tokenizer = shared
    texts = [*PROMPTS[:8], ""]
    vectors = rl.encode(model, tokenizer, texts)
    assert vectors.shape == (9, 64)
    one_by_one = torch.cat([rl.encode(model, tokenizer, [text]) for text in texts])
    assert torch.allclose(vectors, one_by_one, atol=1e-5)
    bare = rl.encode(*rl.load(tiny), texts)
    assert torch.allclose(vectors, bare, atol=1e-5)
    assert model.active_adapter == "policy"


def test_encode_adds_first_and_last_layer(tiny):
    """Guards: a layer left out or weighed otherwise: of each text the token mean of the input
    embeddings, and 0.3 of that of the last hidden states, each of norm 1."""
    model, tokenizer = rl.load(tiny)
    ids = torch.tensor([tokenizer(" red old")["input_ids"]])
    plain = model.get_base_model()
    with torch.no_grad(), model.disable_adapter():
        states = plain(ids, output_hidden_states=True).hidden_states
    first = torch.nn.functional.normalize(plain.get_input_embeddings()(ids)[0].mean(0), dim=0)
    last = torch.nn.functional.normalize(states[-1][0].mean(0), dim=0)
    found = rl.encode(model, tokenizer, ["red old"])[0]
    assert torch.allclose(found, first + 0.3 * last, atol=1e-5)


def test_encode_leaves_frozen_weights_frozen(shared):
    """Guards: a reference that would take gradients."""
    model, tokenizer = shared
    rl.use(model, "align")
    rl.encode(model, tokenizer, PROMPTS[:2])
    assert not trainable(model)


# -------------------------------------------------------------------------- the mathematics of PPO
LENGTHS = torch.tensor([7, 1, 3, 6, 2])
MASK = torch.arange(7) < LENGTHS[:, None]


def draws(n, seed=0):
    """n random tensors of the shape of MASK."""
    return torch.randn(n, 5, 7, generator=torch.Generator().manual_seed(seed)).unbind()


def spoiled(x):
    """The same with garbage in its padding."""
    return torch.where(MASK, x, 1e3 * x + 100)


def test_gae_with_lambda_1_is_return_minus_value():
    """Guards: a bootstrap after the last token; a reward from another row or from padding."""
    rewards, values = draws(2)
    advantages, returns = rl.gae(rewards, values, MASK, 1.0)
    wanted = torch.zeros(5, 7)
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            wanted[i, t] = rewards[i, t:n].sum()
    assert torch.allclose(returns, wanted, atol=1e-5)
    assert torch.allclose(advantages, (wanted - values) * MASK, atol=1e-5)


def test_gae_with_lambda_0_is_the_td_error():
    """Guards: a next value from beyond the last token, or of another token."""
    rewards, values = draws(2)
    advantages, _ = rl.gae(rewards, values, MASK, 0.0)
    wanted = torch.zeros(5, 7)
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            following = values[i, t + 1] if t + 1 < n else 0.0
            wanted[i, t] = rewards[i, t] + following - values[i, t]
    assert torch.allclose(advantages, wanted, atol=1e-6)


def definition_of_gae(rewards, values, lam):
    """The sum of the definition for one row, in float64."""
    n, values = len(rewards), np.append(values, 0.0)
    delta = rewards + values[1:] - values[:-1]
    return np.array([sum(lam**k * delta[t + k] for k in range(n - t)) for t in range(n)])


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_gae_equals_its_definition(lam):
    """Guards: a recursion that differs from the sum it stands for; garbage in the padding that
    comes through."""
    rewards, values = draws(2, seed=1)
    advantages, returns = rl.gae(spoiled(rewards), spoiled(values), MASK, lam)
    for i, n in enumerate(LENGTHS):
        own = values[i, :n].double().numpy()
        wanted = definition_of_gae(rewards[i, :n].double().numpy(), own, lam)
        assert np.allclose(advantages[i, :n], wanted, atol=1e-5)
        assert np.allclose(returns[i, :n], wanted + own, atol=1e-5)
        assert not advantages[i, n:].any()
        assert not returns[i, n:].any()


def test_whiten_uses_real_tokens_only():
    """Guards: statistics over padding; a division by zero where all advantages are equal."""
    x = 3 * draws(1)[0] + 2
    white, real = rl.standardize(spoiled(x), MASK), x[MASK]
    wanted = (real - real.mean()) / real.std(unbiased=False)
    assert torch.allclose(white[MASK], wanted, atol=1e-5)
    assert not white[~MASK].any()
    assert torch.isfinite(rl.standardize(torch.ones(5, 7), MASK)).all()


def test_group_advantages_by_hand():
    """Guards: answers of another prompt in the mean; a spread over all prompts; equal answers whose
    rounding is blown up; a baseline that favours one prompt over another."""
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0], [7.0, 7.0, 7.0, 7.0], [0.0, 0.0, 0.0, 0.02]])
    found = rl.group_advantages(scores.flatten(), 4)
    assert found.shape == (12,)
    spread = (2 / 3) ** 0.5  # of 1, 3, 2, 2
    assert found[:4].tolist() == pytest.approx([-1 / spread, 1 / spread, 0, 0])
    assert found[4:8].tolist() == [0] * 4
    # a spread of .01, taken for a tenth
    assert found[8:].tolist() == pytest.approx([-0.05, -0.05, -0.05, 0.15], abs=1e-5)
    several = rl.group_advantages(draws(1)[0].flatten(), 7).view(5, 7)
    assert several.mean(1).tolist() == pytest.approx([0] * 5, abs=1e-6)
    assert several.std(1).tolist() == pytest.approx([1] * 5, abs=1e-5)


def test_one_answer_a_prompt_keeps_its_score():
    """Guards: a critic's scores that a group of one turns into nothing, or into NaN."""
    scores = draws(1)[0].flatten()
    assert torch.equal(rl.group_advantages(scores, 1), scores)


def clipped(x, low, high):
    return min(max(x, low), high)


def definition_of_the_loss(logp, values, rollout):
    """(policy and value loss, ratio) of one token, in plain Python."""
    old_logp, old_value, advantage, wanted = (x.item() for x in rollout)
    ratio = (logp - old_logp).exp().item()
    policy = -min(ratio * advantage, clipped(ratio, 0.8, 1.2) * advantage)
    near = old_value + clipped(values.item() - old_value, -0.2, 0.2)
    value = 0.5 * max((values.item() - wanted) ** 2, (near - wanted) ** 2)
    return policy + 0.1 * value, ratio


def random_update():
    """New log-probabilities and values that take gradients, and the rollout; garbage in padding."""
    old_logp, old_values, advantages, returns, a, b = draws(6)
    rollout = rl.Rollout(*map(spoiled, (old_logp, old_values, advantages, returns)))
    logp = spoiled(old_logp + 0.4 * a)
    logp = torch.where(MASK, logp, -logp).requires_grad_()
    values = spoiled(old_values + 0.4 * b).requires_grad_()
    return logp, values, rollout


def test_the_ppo_loss_equals_its_definition_token_by_token():
    """Guards: min for max, a clip on the wrong side, a value clip around the return, a mean over
    rows or padding."""
    logp, values, rollout = random_update()
    total, ratios = 0.0, []
    for i, t in MASK.nonzero().tolist():
        token = rl.Rollout(*(x[i, t] for x in rollout))
        loss, ratio = definition_of_the_loss(logp[i, t], values[i, t], token)
        total += loss
        ratios.append(ratio)
    ratios = np.array(ratios)
    loss, stats = rl.ppo_loss(logp, values, rollout, MASK, MASK.sum())
    assert loss.item() == pytest.approx(total / len(ratios), abs=1e-5)
    assert stats["ratio"] == pytest.approx(ratios.mean(), abs=1e-5)
    assert stats["approx_kl"] == pytest.approx((ratios - 1 - np.log(ratios)).mean(), abs=1e-5)
    assert stats["clipfrac"] == pytest.approx((abs(ratios - 1) > 0.2).mean(), abs=1e-6)
    assert 0 < stats["clipfrac"] < 1


def test_padding_gets_no_gradient_of_the_ppo_loss():
    """Guards: tokens after EOS that are learnt."""
    logp, values, rollout = random_update()
    rl.ppo_loss(logp, values, rollout, MASK, MASK.sum())[0].backward()
    assert logp.grad[MASK].any()
    assert values.grad[MASK].any()
    assert not logp.grad[~MASK].any()
    assert not values.grad[~MASK].any()


def test_a_value_loss_of_weight_0_moves_no_value():
    """Guards: a critic that learns behind the back of a group baseline, and takes its share of the
    gradient's norm."""
    logp, values, rollout = random_update()
    rl.ppo_loss(logp, values, rollout, MASK, MASK.sum(), value_coef=0.0)[0].backward()
    assert logp.grad[MASK].any()
    assert not values.grad.any()
    with_critic, _ = rl.ppo_loss(logp, values, rollout, MASK, MASK.sum(), value_coef=0.1)
    policy_alone, _ = rl.ppo_loss(logp, values, rollout, MASK, MASK.sum(), value_coef=0.0)
    (gradient,) = torch.autograd.grad(with_critic, logp, retain_graph=True)
    (own,) = torch.autograd.grad(policy_alone, logp)
    assert torch.equal(gradient[MASK], own[MASK]), "the policy's loss is the same"


def test_the_ppo_losses_of_micro_batches_add_up():
    """Guards: means of means."""
    logp, values, rollout = random_update()
    whole, stats = rl.ppo_loss(logp, values, rollout, MASK, MASK.sum())
    total, sums = 0.0, dict.fromkeys(stats, 0.0)
    for rows in torch.arange(5).split(2):
        part = rl.Rollout(*(x[rows] for x in rollout))
        loss, own = rl.ppo_loss(logp[rows], values[rows], part, MASK[rows], MASK.sum())
        total += loss.item()
        for name, value in own.items():
            sums[name] += value
    assert total == pytest.approx(whole.item(), abs=1e-5)
    assert sums == pytest.approx(stats, abs=1e-5)


def test_an_absurd_log_ratio_stays_finite():
    """Guards: exp of an unbounded log-ratio: inf, and then nan in every weight."""
    one = torch.ones(1, 1)
    rollout = rl.Rollout(0 * one, one, one, one)
    loss, stats = rl.ppo_loss(500 * one, one, rollout, one.bool(), one.sum())
    assert torch.isfinite(loss)
    assert np.isfinite(list(stats.values())).all()


STEPS = [{"ratio": 1.0, "skipped": 0}, {"ratio": 1.5, "skipped": 1}]


@pytest.mark.parametrize("quality", [1.0, 0.0])
def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones(quality):
    """Guards: padding in the statistics of a rollout."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    returns = torch.tensor([[1.0, 2.0, 4.0], [0.0, -3.0, 99.0], [5.0, 99.0, 99.0]])
    values = returns * quality * mask + 7.0
    row = rl.update_stats(STEPS, rl.Rollout(mask * -2.0, values, returns, returns), mask)
    assert row["explained_variance"] == pytest.approx(quality, abs=1e-6)
    assert row["entropy"] == 2.0
    assert row["length"] == 2.0


def test_the_figures_of_steps_are_means_but_for_the_first_ratio_and_the_number_skipped():
    """Guards: a first ratio that later steps hide."""
    row = rl.update_stats(STEPS, rl.Rollout(*draws(4)), MASK)
    assert row["ratio"] == 1.25
    assert row["first_ratio"] == 1.0
    assert row["skipped"] == 1
    assert row["steps"] == 2


# ---------------------------------------------------------------------------------------- PPO
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_first_update_starts_at_its_reference(micro_batch, tiny, monkeypatch):
    """Guards: ratio != 1 or KL != 0 before the first step, through another function, adapter or
    temperature. Exactly, in float32: not nearly, the very same figures."""
    losses = record(monkeypatch, rl, "ppo_loss")
    settings = {"batch": 16, "minibatch": 16, "epochs": 1, "temperature": 0.7}
    (row,) = run(*fresh(tiny), micro_batch=micro_batch, **settings)
    assert len(losses) == 16 // micro_batch
    for call in losses:
        logp, _, rollout, mask = call.args[:4]
        assert torch.equal((logp - rollout.old_logp)[mask].exp(), torch.ones(int(mask.sum())))
    assert row["first_ratio"] == row["ratio"] == pytest.approx(1, abs=1e-6)
    assert row["approx_kl"] == 0.0
    assert row["clipfrac"] == 0.0
    assert row["kl"] == 0.0


def last_tokens(mask, scores):
    """(B, R) scores on each row's last real token, 0 elsewhere."""
    return torch.zeros(mask.shape).scatter(1, mask.sum(1, keepdim=True) - 1, scores[:, None])


def test_the_reward_is_the_score_while_the_policy_is_its_reference(tiny, monkeypatch):
    """Guards: a score on another token than the last real one; an unfinished answer that pays
    nothing; a mask without the EOS."""
    calls, made = record(monkeypatch, rl, "gae"), record(monkeypatch, rl, "generate")
    reward = Rewards(1.0)
    settings = {"batch": 16, "minibatch": 16, "max_new": 4, "no_eos_penalty": 3.0}
    (row,) = run(*fresh(tiny), reward, **settings)
    rewards, values, mask = calls[0].args[:3]
    answers = made[0].result[1]
    assert mask.sum(1).tolist() == [len(answer) for answer in answers]
    assert not values.any()
    unfinished = torch.tensor([answer[-1] != EOS for answer in answers])
    assert 0 < unfinished.sum() < 16
    scores = reward.given[0] / reward.given[0].std() - 3.0 * unfinished
    assert torch.allclose(rewards, last_tokens(mask, scores), atol=1e-5)
    assert row["score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert row["reward"] == pytest.approx(reward.given[0].mean().item())
    assert row["reward_std"] == pytest.approx(reward.given[0].std().item())
    assert row["eos_rate"] == pytest.approx(1 - unfinished.float().mean().item())


def test_later_rewards_carry_the_kl_to_align(tiny, monkeypatch):
    """Guards: a KL with the wrong sign, of the wrong adapters or at another temperature; a scale
    that moves with the spread of the rewards."""
    calls, looks = record(monkeypatch, rl, "gae"), record(monkeypatch, rl, "look_back")
    model, tokenizer = fresh(tiny)
    reward = Rewards(1.0, 2.0)
    settings = {"minibatch": 8, "micro_batch": 8, "beta": 0.5, "no_eos_penalty": 0.0}
    log = run(model, tokenizer, reward, updates=2, epochs=1, temperature=0.7, **settings)
    rewards, _, mask = calls[1].args[:3]
    reference, old, _ = looks[1].result
    kl = old - reference
    scores = reward.given[1] / reward.given[0].std()
    rest = rewards - last_tokens(mask, scores)
    assert torch.allclose(rest, -log[1]["beta"] * kl, atol=1e-5)
    assert log[1]["kl"] == pytest.approx(kl.sum(1).mean().item(), abs=1e-5)
    assert abs(log[1]["kl"]) > 1e-3
    ((part,),) = looks[1].args[2]
    rl.use(model, "align")
    with torch.no_grad():
        again = token_logps(model, part, 0.7)
    assert torch.equal(again * mask[part.rows], reference[part.rows])


def test_ppo_trains_on_the_sampled_ids(tiny, monkeypatch):
    """Guards: re-tokenised text, which is another answer; a reward that sees the prompts of other
    rows; a prompt that comes again while others wait."""
    made, looks = record(monkeypatch, rl, "generate"), record(monkeypatch, rl, "look_back")
    model, tokenizer = fresh(tiny)
    reward = Rewards(1.0)
    run(model, tokenizer, reward, updates=3, micro_batch=3, minibatch=8, epochs=1)
    assert len(reward.seen) == 3
    for (texts, rows), making, look in zip(reward.seen, made, looks, strict=True):
        prompts, (made_texts, answers) = making.args[2], making.result
        assert texts == made_texts
        assert prompts == [PROMPTS[i] for i in rows]
        (parts,) = look.args[2]
        assert len(parts) == 3
        assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(8))
        for part in parts:
            for k, i in enumerate(part.rows.tolist()):
                question, ids = rl.prompt_ids(tokenizer, prompts[i]), part.ids[k].tolist()
                padding = [0] * (len(ids) - len(question) - len(answers[i]))
                assert ids == question + answers[i] + padding
                assert part.starts[k] == len(question)
                assert part.mask[k].sum() == len(answers[i])
    assert sorted(np.concatenate([rows for _, rows in reward.seen])) == list(range(24))


def test_ppo_trains_answers_behind_the_start_that_they_go_on_from(tiny, monkeypatch):
    """Guards: log-probabilities of the answers after the bare prompt, which are those of another
    distribution: the first ratio is 1 all the same."""
    looks = record(monkeypatch, rl, "look_back")
    model, tokenizer = fresh(tiny)
    start = "red old warm"
    for temperature in (1.0, 1e-3):
        sampling = rl.Sampling(max_new=6, temperature=temperature, start=start)
        config = rl.PPOConfig(1, 8, 4, 4, lr=0.0, value_lr=0.0, sampling=sampling)
        (row,) = rl.ppo(model, tokenizer, PROMPTS, by_row, config)
        assert row["first_ratio"] == pytest.approx(1, abs=1e-5)
        minibatches = looks[-1].args[2]
        begun = {tuple(rl.prompt_ids(tokenizer, prompt, start)) for prompt in PROMPTS}
        for part in itertools.chain(*minibatches):
            for ids, end in zip(part.ids.tolist(), part.starts.tolist(), strict=True):
                assert tuple(ids[:end]) in begun
    # each token was by far the likeliest one
    assert row["entropy"] < 1


def test_every_pass_of_an_update_has_the_same_shapes_and_whitened_advantages(tiny, monkeypatch):
    """Guards: other micro-batches for old and new log-probabilities, which move the first ratio;
    advantages whitened by minibatch, or with their padding."""
    looks = record(monkeypatch, rl, "look_back")
    learnt = record(monkeypatch, rl, "update_policy")
    run(*fresh(tiny), micro_batch=3)
    minibatches, mask = looks[0].args[2], looks[0].args[3]
    _, _, _, rollout, updated = learnt[0].args[:5]
    assert updated is minibatches
    assert len(minibatches) == 2
    advantages = rollout.advantages[mask]
    assert abs(advantages.mean()) < 1e-5
    assert advantages.square().mean() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("batch", "minibatch", "sizes"), [(10, 3, [3, 3, 2, 2]), (12, 4, [4] * 3)])
def test_minibatches_are_of_one_size(tiny, monkeypatch, batch, minibatch, sizes):
    """Guards: what is left over as a minibatch of one answer, whose step is as long as any."""
    looks = record(monkeypatch, rl, "look_back")
    run(*fresh(tiny), batch=batch, minibatch=minibatch, micro_batch=2)
    minibatches = looks[0].args[2]
    assert [sum(len(part.rows) for part in parts) for parts in minibatches] == sizes
    rows = torch.cat([part.rows for parts in minibatches for part in parts])
    assert sorted(rows.tolist()) == list(range(batch))


@pytest.mark.parametrize("size", [1, 100])
def test_values_move_slowly_whatever_the_size_of_the_states(tiny, monkeypatch, size):
    """Guards: a rate chosen for small states, at which a wide LLM's values jump by many spreads of
    the scores, and advantages are noise."""
    model, tokenizer = fresh(tiny)
    with torch.no_grad():
        rl.causal_lm(model).base_model.norm.weight.mul_(size)
    looks = record(monkeypatch, rl, "look_back")
    # logits grow with the states
    run(model, tokenizer, updates=2, batch=4, epochs=1, temperature=float(size), value_lr=1.0)
    _, _, values = looks[1].result
    # after one step, whose length Adam makes the rate; states differ in size
    assert 0 < values.abs().max() < 1.25 * 1.5


def test_small_states_learn_values_at_the_rate_asked_for(tiny):
    """Guards: a bound that raises the rate, or that ignores what is asked for."""
    assert rl.value_rate(*fresh(tiny), PROMPTS[0], 1e-4) == 1e-4


def test_ppo_moves_the_policy_and_nothing_else(tiny):
    """Guards: a reference that drifts along with the policy; a base that trains; a model left
    trainable; a value head that learns nothing."""
    model, tokenizer = fresh(tiny)
    rest, policy = all_but(model, "policy"), adapter(model, "policy")
    log = run(model, tokenizer, updates=3)
    assert same(all_but(model, "policy"), rest)
    for name, value in adapter(model, "policy").items():
        assert not torch.equal(value, policy[name]), name
    assert log[1]["kl"] != 0
    assert log[1]["first_ratio"] == pytest.approx(1, abs=1e-6)
    assert log[2]["explained_variance"] != 0
    assert model.active_adapter == "policy"
    assert not trainable(model)
    assert not model.training


def test_ppo_is_decided_by_its_seed(tiny):
    """Guards: a random state that leaks in from outside."""
    log = run(*fresh(tiny), updates=2, seed=3)
    model, tokenizer = fresh(tiny)
    disturb_random_states()
    assert figures(run(model, tokenizer, updates=2, seed=3)) == figures(log)
    assert not close(run(*fresh(tiny), updates=2, seed=4), log)


def test_ppo_does_not_depend_on_the_micro_batch(tiny):
    """Guards: means of means; a divisor of the micro-batch where the minibatch's belongs."""
    settings = {"batch": 12, "minibatch": 12, "epochs": 1, "beta": 0.5}
    whole = run(*fresh(tiny), micro_batch=12, **settings)
    assert close(run(*fresh(tiny), micro_batch=1, **settings), whole)
    assert close(run(*fresh(tiny), micro_batch=5, **settings), whole)


@pytest.mark.parametrize("pad", ["z", "<eos>"])
def test_tokens_after_eos_change_no_metric(pad, tiny):
    """Guards: padding in any loss, mean, whitening or metric; masks computed as ids != pad, which
    drop the EOS where pad = eos. No answer contains the pad token, so another one must show in no
    figure."""
    log = run(*fresh(tiny), updates=2, max_new=8)
    assert log[0]["eos_rate"] > 0
    assert log[0]["length"] < 8
    model, tokenizer = fresh(tiny)
    tokenizer.pad_token = pad
    assert close(run(model, tokenizer, updates=2, max_new=8), log)


def test_kl_stop_ends_an_update_before_the_step(tiny):
    """Guards: the step that has left its rollout still taken."""
    model, tokenizer = fresh(tiny)
    (row,) = run(model, tokenizer, kl_stop=-1.0)
    assert row["steps"] == 1
    assert same(adapter(model, "policy"), adapter(model, "align"))


def test_kl_stop_ends_the_epochs(tiny):
    """Guards: epochs that go on after the policy has left its rollout."""
    settings = {"lr": 0.05, "epochs": 6}
    (free,) = run(*fresh(tiny), kl_stop=float("inf"), **settings)
    (held,) = run(*fresh(tiny), **settings)
    assert free["steps"] == 12
    assert 1 < held["steps"] < 12
    assert held["skipped"] == 0


def test_ppo_with_gradient_checkpointing_is_the_same(tiny):
    """Guards: checkpointing that takes the cache from generation, or works in no update."""
    plain = run(*fresh(tiny), updates=2)
    assert close(run(*fresh(tiny, checkpointing=True), updates=2), plain)


@pytest.mark.parametrize("target", [6.0, 1e-6])
def test_beta_adapts_to_the_kl(target, tiny):
    """Guards: a leash that gets longer where it has to get shorter, or a step of it above 2 %."""
    log = run(*fresh(tiny), says_red, updates=4, lr=2e-2, beta=0.5, kl_target=target)
    assert log[0]["beta"] == 0.5
    assert log[1]["beta"] == pytest.approx(0.5 * 0.98), "the KL of the first update is 0"
    for before, after in zip(log[:-1], log[1:], strict=True):
        error = min(max(before["kl"] / target - 1, -0.2), 0.2)
        assert after["beta"] == pytest.approx(before["beta"] * (1 + 0.1 * error))
    assert (log[3]["beta"] > log[2]["beta"]) == (target < 1)


def test_beta_is_fixed_without_a_target(tiny):
    """Guards: a division by a target of 0."""
    log = run(*fresh(tiny), updates=3, beta=0.5, kl_target=0.0)
    assert [row["beta"] for row in log] == [0.5] * 3


def equal(texts, rows):
    """A reward that teaches nothing."""
    return torch.zeros(len(rows)), {}


def test_adam_shrinks_nothing(tiny, tmp_path):
    """Guards: weight decay that pulls the policy away from align without any reward; an epsilon of
    1e-8, at which the first steps are as large as the rate whatever the gradient."""
    model, tokenizer = fresh(tiny)
    unit = str(tmp_path / "unit")
    run(model, tokenizer, equal, rl.Checkpoint(unit), beta=0.0, no_eos_penalty=0.0)
    assert same(adapter(model, "policy"), adapter(model, "align"))
    for group in rl.Checkpoint(unit).state["optimizer"]["param_groups"]:
        assert group["eps"] == 1e-5
        assert group["weight_decay"] == 0.0


def test_no_step_is_larger_than_its_clip(tiny, monkeypatch):
    """Guards: a gradient clipped in the log only. The first spread sets the scale; later rewards
    are a hundred times as large."""
    norms, original = [], torch.optim.AdamW.step

    def step(self, *args, **settings):
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad.norm() for p in parameters if p.grad is not None]
        norms.append(torch.stack(gradients).norm().item())
        return original(self, *args, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    log = run(*fresh(tiny), Rewards(1.0, 100.0), updates=3)
    assert max(row["grad_norm"] for row in log) > 2
    assert max(norms) < 1.001


@pytest.mark.parametrize("kind", ["nan", "ratio"])
def test_a_broken_step_is_skipped_and_counted(kind, tiny, monkeypatch):
    """Guards: one nan in a loss destroys every weight; a ratio above 10 means that rollout and
    update disagree."""
    original = rl.ppo_loss

    def broken(*args):
        loss, stats = original(*args)
        if kind == "ratio":
            return loss, stats | {"ratio": 11.0}
        return loss * float("nan"), stats

    model, tokenizer = fresh(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(rl, "ppo_loss", broken)
        (row,) = run(model, tokenizer)
    assert row["steps"] == 4
    assert row["skipped"] == 4
    assert same(adapter(model, "policy"), adapter(model, "align"))
    (row,) = run(model, tokenizer)
    assert row["skipped"] == 0
    assert not same(adapter(model, "policy"), adapter(model, "align"))


@pytest.mark.parametrize("factors", [(1.0, float("inf"), 1.0), (float("inf"), 1.0, 1.0)])
def test_an_infinite_reward_costs_one_update(factors, tiny):
    """Guards: a reward that overflows once and poisons the run."""
    model, tokenizer = fresh(tiny)
    log = run(model, tokenizer, Rewards(*factors), updates=3)
    for row, factor in zip(log, factors, strict=True):
        assert row["skipped"] == (0 if np.isfinite(factor) else row["steps"])
    for name, value in adapter(model, "policy").items():
        assert torch.isfinite(value).all(), name


def test_equal_first_rewards_do_not_blow_up_the_scale(tiny):
    """Guards: a rare reward, absent from the first rollout: scores of 1e6, and a value loss that
    takes the whole gradient norm."""
    log = run(*fresh(tiny), Rewards(0.0, 1.0), updates=3)
    assert max(abs(row["score"]) for row in log) < 100


FIGURES = {"update", "reward", "reward_std", "score", "kl", "beta", "approx_kl", "clipfrac"}
FIGURES |= {"ratio", "first_ratio", "entropy", "explained_variance", "eos_rate", "length"}
FIGURES |= {"grad_norm", "loss", "steps", "skipped", "tokens_per_s"}


def with_a_figure(texts, rows):
    rewards, _ = by_row(texts, rows)
    return rewards, {"read": len(texts)}


def test_a_row_of_the_log_has_every_figure(tiny, tmp_path):
    """Guards: a run whose health nobody can read afterwards; a log that differs from its file."""
    path = tmp_path / "ppo.jsonl"
    log = run(*fresh(tiny), with_a_figure, updates=3, log=str(path))
    assert [json.loads(line) for line in path.read_text().splitlines()] == log
    assert [row["update"] for row in log] == [0, 1, 2]
    for row in log:
        assert row.keys() >= FIGURES
        assert np.isfinite(list(row.values())).all()
        assert row["read"] == 8, "the reward's own figure"
        assert 0 < row["entropy"] < np.log(320)
        assert 1 <= row["length"] <= 6


# four updates of ten prompts: 24 prompts run out in the middle of the third
RESUMED = {"updates": 4, "batch": 10, "kl_target": 0.5}


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """(log, bytes of the policy) of the run that the tests of resuming must reach."""
    model, tokenizer = fresh(tiny)
    log = run(model, tokenizer, **RESUMED)
    assert len({row["beta"] for row in log}) == 4
    return log, adapter_bytes(model, tmp_path_factory.mktemp("whole"), "policy")


@pytest.mark.parametrize("updates", [1, 3, 4])
def test_ppo_resumed_equals_the_uninterrupted_run(
    updates, uninterrupted, tiny, tmp_path, monkeypatch
):
    """Guards: a checkpoint without value head, optimiser, beta, scale, random state or order of the
    prompts; after the last update, one update too many."""
    unit = str(tmp_path / "unit")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at_save(patch, updates)
        run(*fresh(tiny), by_row, rl.Checkpoint(unit), **RESUMED)
    assert len(rl.Checkpoint(unit).state["log"]) == updates
    model, tokenizer = fresh(tiny)
    disturb_random_states()
    made, bars = record(monkeypatch, rl, "generate"), record(monkeypatch, rl, "tqdm")
    log = run(model, tokenizer, by_row, rl.Checkpoint(unit), **RESUMED)
    assert figures(log) == figures(uninterrupted[0])
    assert adapter_bytes(model, tmp_path, "policy") == uninterrupted[1]
    assert len(made) == 4 - updates
    assert bars[0].settings["initial"] == updates
    assert model.active_adapter == "policy"
    assert not trainable(model)
    assert not model.training


class Interrupted(Rewards):
    """by_row, until Ctrl-C in the middle of the third update."""

    def __call__(self, texts, rows):
        if len(self.given) == 2:
            raise KeyboardInterrupt
        return super().__call__(texts, rows)


def test_ppo_killed_within_an_update_does_it_again(uninterrupted, tiny, tmp_path):
    """Guards: an answer of the interrupted update that counts twice, or not at all."""
    unit = str(tmp_path / "unit")
    with pytest.raises(KeyboardInterrupt):
        run(*fresh(tiny), Interrupted(1.0), rl.Checkpoint(unit), **RESUMED)
    model, tokenizer = fresh(tiny)
    log = run(model, tokenizer, by_row, rl.Checkpoint(unit), **RESUMED)
    assert figures(log) == figures(uninterrupted[0])
    assert adapter_bytes(model, tmp_path, "policy") == uninterrupted[1]


# ------------------------------------------------------------------------- PPO: a group baseline
GROUP = {"group": 4, "lam": 1.0, "value_coef": 0.0}


def by_length(texts, rows):
    """A reward that differs from answer to answer."""
    return torch.tensor([float(len(text)) for text in texts]), {}


def test_the_answers_of_a_group_share_their_prompt(tiny, monkeypatch):
    """Guards: answers compared with those to another prompt; prompts that come again while others
    wait."""
    made = record(monkeypatch, rl, "generate")
    reward = Rewards(1.0)
    run(*fresh(tiny), reward, updates=3, epochs=1, **{"batch": 16, **GROUP})
    asked = []
    for (texts, rows), making in zip(reward.seen, made, strict=True):
        assert making.args[2] == [PROMPTS[i] for i in rows]
        assert len(texts) == 16
        groups = np.reshape(rows, (4, 4))
        assert (groups == groups[:, :1]).all()
        asked += groups[:, 0].tolist()
    assert len(set(asked)) == 12


def test_the_score_of_a_group_is_its_advantage_at_every_token(tiny, monkeypatch):
    """Guards: a baseline over the whole batch; a penalty of unfinished answers that comes after the
    comparison; tokens of one answer with different credit."""
    calls, made = record(monkeypatch, rl, "gae"), record(monkeypatch, rl, "generate")
    settings = {"batch": 16, "minibatch": 16, "max_new": 4, "no_eos_penalty": 3.0}
    (row,) = run(*fresh(tiny), by_length, **settings, **GROUP)
    rewards, _, mask, lam = calls[0].args
    texts, answers = made[0].result
    raw, _ = by_length(texts, None)
    unfinished = torch.tensor([answer[-1] != EOS for answer in answers])
    assert 0 < unfinished.sum() < 16
    expected = rl.group_advantages(raw / raw.std() - 3.0 * unfinished, 4)
    assert torch.allclose(rewards, last_tokens(mask, expected), atol=1e-5)
    assert lam == 1.0
    advantages, _ = calls[0].result
    assert torch.allclose(advantages, expected[:, None] * mask, atol=1e-5)
    assert row["reward"] == pytest.approx(raw.mean().item(), rel=1e-5)
    assert row["score"] == pytest.approx(0, abs=1e-5)


def test_without_a_critic_the_values_stay_zero_and_the_policy_moves(tiny, tmp_path, monkeypatch):
    """Guards: a value head that learns although nobody asks it, or moves by weight decay."""
    looks = record(monkeypatch, rl, "look_back")
    model, tokenizer = fresh(tiny)
    unit = str(tmp_path / "unit")
    log = run(model, tokenizer, by_length, rl.Checkpoint(unit), updates=3, **GROUP)
    *_, weight, bias = rl.Checkpoint(unit).state["weights"].values()
    assert weight.shape == (1, 64)
    assert not weight.any()
    assert not bias.any()
    for look in looks:
        assert not look.result[2].any(), "old values"
    assert not same(adapter(model, "policy"), adapter(model, "align"))
    assert log[2]["kl"] != 0
    assert log[2]["explained_variance"] == pytest.approx(0, abs=1e-5)


def test_a_reward_that_differs_between_prompts_alone_teaches_a_group_nothing(tiny):
    """Guards: a prompt of which every answer pays, learnt from as if the answers were good."""
    model, tokenizer = fresh(tiny)
    run(model, tokenizer, by_row, updates=2, no_eos_penalty=0.0, beta=0.0, **GROUP)
    assert same(adapter(model, "policy"), adapter(model, "align"))


# --------------------------------------------------------------------- PPO: does it learn anything
BANDIT = {"batch": 24, "minibatch": 12, "micro_batch": 12, "beta": 0.02}


@pytest.fixture(scope="module", params=["critic", "group"])
def bandit(tiny, request):
    """(log, model, tokenizer) of thirty updates in which one word is worth 1."""
    model, tokenizer = fresh(tiny)
    settings = BANDIT | (GROUP if request.param == "group" else {})
    log = run(model, tokenizer, says_red, updates=30, max_new=4, **settings)
    return log, model, tokenizer


def test_the_bandits_reward_rises(bandit):
    """Guards: any sign, mask or index that is wrong somewhere; a policy that rises and stays half
    way: clipping, whitening, the KL weight or a baseline gone wrong."""
    log, _, _ = bandit
    assert log[0]["reward"] < 0.4
    assert mean_of(log[17:20], "reward") > 0.8
    assert mean_of(log[-5:], "reward") >= 0.9
    assert 0.5 < log[-1]["kl"] < 20
    assert log[-1]["entropy"] < log[0]["entropy"] + 1


def test_the_trained_policy_says_what_pays(bandit):
    """Guards: a reward that rises in the log while another adapter answers."""
    _, model, tokenizer = bandit
    texts, _ = sample(model, tokenizer, PROMPTS, max_new=4)
    assert np.mean(["red" in text for text in texts]) > 0.6


def six_words(texts, rows):
    """1 for an answer of six words, less for another length."""
    errors = [abs(len(text.split()) - 6) / 6 for text in texts]
    return torch.tensor([max(0.0, 1 - error) for error in errors]), {}


@pytest.mark.slow
def test_a_length_target_reaches_nine_tenths_of_its_reward(tiny):
    """Guards: credit that does not reach EOS: the token that ends an answer decides here."""
    settings = {"batch": 64, "minibatch": 32, "micro_batch": 16, "beta": 0.02, "lr": 3e-3}
    log = run(*fresh(tiny), six_words, updates=60, max_new=8, **settings)
    assert mean_of(log[:5], "reward") < 0.6
    assert mean_of(log[-10:], "reward") >= 0.9
    assert 0 < log[-1]["kl"] < 30
    assert log[-1]["eos_rate"] > 0.9


def count_red(texts, rows):
    """A reward that repetition pays."""
    return torch.tensor([float(text.split().count("red")) for text in texts]), {}


def hacked(tiny, **guard):
    """(log, share of different words in an answer) of a run whose reward can be hacked."""
    model, tokenizer = fresh(tiny)
    settings = {"batch": 24, "minibatch": 12, "micro_batch": 12} | guard
    log = run(model, tokenizer, count_red, updates=40, max_new=12, **settings)
    texts = sample(model, tokenizer, PROMPTS, max_new=12)[0]
    words = [text.split() for text in texts]
    return log, np.mean([len(set(x)) / max(1, len(x)) for x in words])


@pytest.mark.slow
def test_without_a_leash_repetition_wins(tiny):
    """Guards: the next test, which says nothing where the reward cannot be hacked."""
    log, different = hacked(tiny, beta=0.0, no_eos_penalty=0.0)
    assert mean_of(log[-5:], "reward") > 8
    assert mean_of(log[-5:], "kl") > 10
    assert mean_of(log[-5:], "eos_rate") < 0.2
    assert different < 0.4


@pytest.mark.slow
def test_kl_and_penalty_keep_the_text_readable_where_repetition_pays(tiny):
    """Guards: a KL weight or a penalty of unfinished answers that does not bite."""
    log, different = hacked(tiny, beta=2.0, no_eos_penalty=4.0)
    assert mean_of(log[-5:], "reward") > log[0]["reward"]
    assert mean_of(log[-5:], "kl") < 2
    assert mean_of(log[-5:], "eos_rate") > 0.8
    assert different > 0.6


# ---------------------------------------------------------------- other models, from start to end
def combination(config, template, pad, slow):
    name = f"{config.model_type}, {'chat' if template else 'plain'}, pad={pad}"
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(config, template, pad, id=name, marks=marks)


COMBINATIONS = [
    combination(qwen2(), TEMPLATE, "<eos>", slow=False),
    combination(qwen2(), None, None, slow=True),
    combination(qwen2(), None, "<pad>", slow=True),
    combination(llama(), TEMPLATE, "<eos>", slow=True),
    combination(llama(), None, None, slow=False),
    combination(llama(), None, "<pad>", slow=True),
    combination(gpt2(), TEMPLATE, "<eos>", slow=True),
    combination(gpt2(), None, None, slow=True),
    combination(gpt2(), None, "<pad>", slow=False),
]


@pytest.mark.parametrize("config, template, pad", COMBINATIONS)
def test_any_causal_lm_goes_through_align_generate_and_ppo(
    config, template, pad, tiny, tmp_path, monkeypatch
):
    """Guards: a model family, template, pad token or checkpoint setting for which a stage breaks or
    the distribution changes."""
    untrained(config, tiny, tmp_path)
    odd_generation_config().save_pretrained(tmp_path)
    hf.PreTrainedTokenizerFast(
        tokenizer_file=f"{tiny}/tokenizer.json",
        eos_token="<eos>",
        pad_token=pad,
        chat_template=template,
    ).save_pretrained(tmp_path)
    model, tokenizer = rl.load(str(tmp_path), rank=4)
    assert tokenizer.pad_token == (pad or "<eos>")
    said = tokenizer.decode(rl.prompt_ids(tokenizer, "red"))
    assert ("user: red" in said) == bool(template)
    # align
    rl.use(model, "align", trainable=True)
    first = rl.supervise(model, tokenizer, pairs(64), rl.SupervisedConfig(steps=1, lr=1e-2))
    last = rl.supervise(model, tokenizer, pairs(64), rl.SupervisedConfig(steps=20, lr=1e-2))
    assert last < first
    # PPO
    rl.add_policy(model)
    processors = record_processors(monkeypatch, model)
    log = run(model, tokenizer, updates=3, micro_batch=1)
    assert processors == [[]] * 3
    assert log[0]["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert log[0]["kl"] == 0
    assert log[2]["kl"] != 0
    assert log[2]["skipped"] == 0
    for row in log:
        assert np.isfinite(list(row.values())).all()
    # generate
    together = greedy(model, tokenizer, PROMPTS[:6] * 2, max_new=5)
    alone = [greedy(model, tokenizer, [prompt], max_new=5)[0] for prompt in PROMPTS[:6]]
    assert together == alone * 2


@pytest.mark.slow
def test_the_benchmark_at_real_shapes_runs_on_a_cpu_at_a_tiny_one(tmp_path, monkeypatch):
    """Guards: a script for a GPU that nobody has run before the GPU is there."""
    monkeypatch.syspath_prepend(HERE / "bench")
    # by its name: the process that writes the model imports it anew
    bench = importlib.import_module("bench_llm")
    sizes = ["--sizes", "tiny", "--prompt", "24", "--answer", "8", "--rows", "8"]
    results = tmp_path / "results.json"
    found = bench.main(["shapes", "--device", "cpu", *sizes, "--json", str(results)])["tiny"]
    for row in found.values():
        assert row["peak_gb"] > 0 and row["forecast_gb"] > 0
    assert "tokens_per_s" not in found.pop("load")
    assert found.keys() == {"align", "generation", "one PPO update"}
    for row in found.values():
        assert 0 < row["tokens_per_s"] < 1e7
    assert "shapes" in json.loads(results.read_text())


def test_the_forecast_is_what_a_simulation_counts(tmp_path, monkeypatch):
    """Guards: a forecast that nothing confirms: tensors that it leaves out or counts twice."""
    monkeypatch.syspath_prepend(HERE / "bench")
    bench = importlib.import_module("bench_llm")
    sizes = ["--sizes", "Qwen3-tiny", "--prompt", "96", "--answer", "32"]
    found = bench.main(["memory", *sizes, "--json", str(tmp_path / "results.json")])["Qwen3-tiny"]
    assert found.keys() == {"load", "alignment", "generation", "ppo"}
    for stage, row in found.items():
        # a shape so small that what is left out counts
        assert row["forecast_gb"] == pytest.approx(row["simulated_gb"], rel=0.3), stage
    assert found["alignment"]["simulated_gb"] > 5 * found["load"]["simulated_gb"]


def test_live_bytes_are_those_of_tensors_that_are_alive(monkeypatch):
    """Guards: views counted as memory; what was freed still counted; a peak that is forgotten."""
    monkeypatch.syspath_prepend(HERE / "bench")
    live = importlib.import_module("bench_llm").LiveBytes()
    held = torch.zeros(10)
    live.count([held])
    with live:
        first = held.view(5, 2) + 1.0
        second = torch.cat([first, first])
        views = [first.t(), first[0], second.view(-1)]
        assert live.now == 40 + 40 + 80
        del first, second, views
        third = held * 2
    assert live.now == 40 + third.nbytes
    assert live.peak == 160


# ------------------------------------------------------------------------ the LLM as a recommender
TITLES = ["red green", "red", "blue old calm", "loud", "warm dark red", "green", "green red"]
TITLES += ["old", "old calm blue dark"]


def log_likelihoods(model, tokenizer, prompt):
    """(len(TITLES),) log p(title | prompt), from all its tokens and its end."""
    question = rl.prompt_ids(tokenizer, prompt)
    prompts = [question] * len(TITLES)
    answers = [rl.answer_ids(tokenizer, title) for title in TITLES]
    scores = torch.empty(len(TITLES))
    with torch.no_grad():
        for batch in rl.micro_batches(range(len(TITLES)), prompts, answers, "cpu", 4):
            scores[batch.rows] = (token_logps(model, batch) * batch.mask).sum(1)
    return scores


def both_rankings(shared, beams):
    """Titles by beam search and by exhaustive scoring, best first: (6, beams) and (6, 9)."""
    model, tokenizer = shared
    rl.use(model, "align")
    tries = rl.title_trie(tokenizer, TITLES)
    found = rl.retrieve(model, tokenizer, PROMPTS[:6], tries, beams=beams)
    scores = torch.stack([log_likelihoods(model, tokenizer, prompt) for prompt in PROMPTS[:6]])
    return found, scores.argsort(1, descending=True)


@pytest.mark.parametrize("beams", [9, 12])
def test_a_beam_as_wide_as_the_catalogue_finds_what_exhaustive_scoring_finds(shared, beams):
    """Guards: scores averaged over a title's length, a title cut off at its longest prefix, prompts
    padded on the wrong side; a title invented where none is left."""
    found, wanted = both_rankings(shared, beams)
    assert torch.equal(found[:, :9], wanted)
    assert (found[:, 9:] == -1).all()


def test_a_narrow_beam_finds_the_best_title(shared):
    """Guards: the same, for a beam that may miss some titles, but hardly the best."""
    found, wanted = both_rankings(shared, 3)
    assert found.shape == (6, 3)
    assert (found >= 0).all()
    assert (found[:, 0] == wanted[:, 0]).float().mean() > 0.8


def walk(trie, seen=()):
    """Every path through the trie, each up to its EOS."""
    for token in trie[seen]:
        path = (*seen, token)
        if token == EOS:
            yield path
        else:
            yield from walk(trie, path)


def test_the_trie_admits_exactly_the_catalogue(shared):
    """Guards: a prefix that passes for a title, a title that another hides, an end that may come
    anywhere."""
    _, tokenizer = shared
    paths, trie = rl.title_trie(tokenizer, TITLES)
    assert sorted(walk(trie)) == sorted(paths)
    for title, path in zip(TITLES, paths, strict=True):
        assert list(path) == rl.answer_ids(tokenizer, title)
    assert list(paths.values()) == list(range(9))


def test_two_titles_of_the_same_tokens_are_refused(shared):
    """Guards: a title that could never be retrieved."""
    with pytest.raises(ValueError, match="never be retrieved"):
        rl.title_trie(shared[1], ["red", "red"])
