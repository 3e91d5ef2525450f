"""Devices, on an emulated card: whole trainings, as on the CPU, or an error where tensors mix.

    pytest tests/test_device.py                   seconds, without a GPU

A tensor "on the card" says that its device is `meta`, and holds its numbers in a tensor of the CPU.
So .item(), boolean indices and sampling work, a result equals the CPU's, and an operation on
tensors of both devices is refused as CUDA refuses it. Not reached: the 4-bit layers (float32 takes
their place), CUDA's own kernels, streams and memory, and files (a checkpoint stays in memory).
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_curec import open_run
from test_recommender import features_of, ring
from test_reward import tiny_encoder
from test_rl import PROMPTS, Rewards, figures, pairs, small_tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import curec
import data as D
import recommender as rec
import reward
import rl

# a device that any build of torch knows, and no code of ours
CARD = "meta"


# ------------------------------------------------------------------------------- the emulated card
class OnCard(torch.Tensor):
    """A tensor on the card; `held`: its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = cls._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=CARD, **shape)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_card(func, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()

    def __setitem__(self, places, value):
        # torch's own would put an empty tensor of the device meta there
        if isinstance(value, (int, float)):
            places = tree_map_only(OnCard, lambda x: x.held, places)
            self.held[places] = value
        else:
            super().__setitem__(places, value)


class Card(TorchDispatchMode):
    """Where tensors can be made on the card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_card(func, args, kwargs or {})


def on_card(func, args, kwargs):
    """What an operation does where there is a card: with tensors of the card its result is there,
    or where it is told to be."""
    name = func._schema.name
    refuse_a_mixture(name, args, kwargs)
    is_card = any(isinstance(x, OnCard) for x in tree_leaves((args, kwargs)))
    if kwargs.get("device") is not None:
        is_card = str(kwargs["device"]) == CARD
        kwargs = kwargs | {"device": "cpu"}
    held_args, held_kwargs = tree_map_only(OnCard, lambda x: x.held, (args, kwargs))
    made = func(*held_args, **held_kwargs)
    if name.endswith("_") and made is not None:
        return args[0]
    return tree_map_only(torch.Tensor, OnCard, made) if is_card else made


def refuse_a_mixture(name, args, kwargs):
    """RuntimeError where CUDA has one. A copy goes from one device to the other, a single number of
    the CPU goes anywhere, and indices of the CPU do; those of the card into the card alone."""
    if name == "aten::copy_":
        return
    if "aten::index" in name and isinstance(args[1], list) and isinstance(args[0], OnCard):
        args = (args[0], *args[2:])
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    assert all(isinstance(x, OnCard) or not x.is_meta for x in tensors), "made without numbers"
    on_cpu = [x for x in tensors if not isinstance(x, OnCard)]
    if len(on_cpu) < len(tensors) and any(x.dim() for x in on_cpu):
        raise RuntimeError(f"{name}: tensors on the CPU and on the card")


def with_a_card(make):
    """torch.tensor or torch.as_tensor, which would make an empty tensor of the device meta."""

    def made(values, *args, device=None, **how):
        tensor = make(values, *args, **how)
        return tensor if device is None else tensor.to(device)

    return made


@pytest.fixture
def card(monkeypatch):
    """The name of the card, while there is one."""
    monkeypatch.setattr(torch, "tensor", with_a_card(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", with_a_card(torch.as_tensor))
    adam = torch.optim.AdamW
    # the fused kernel knows no device meta
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused=0, **how: adam(*args, **how))
    # a module that is moved keeps its tied weights tied
    torch.__future__.set_swap_module_params_on_conversion(True)
    # attention of one kernel, or results would differ in their last digits
    with Card(), sdpa_kernel(SDPBackend.MATH):
        yield CARD
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_the_card_refuses_what_cuda_refuses(card):
    """Guards: an emulation that lets everything pass, and so tests nothing."""
    x = torch.ones(3, device=card)
    here = torch.arange(3.0)
    mixtures = [
        lambda: x + here,
        lambda: x @ here,
        lambda: torch.stack([x, here]),
        lambda: here[x.long()],
        lambda: x.index_put_([here.long()], here),
        lambda: here.masked_fill(x > 0, 1.0),
    ]
    for mixture in mixtures:
        with pytest.raises(RuntimeError, match="on the card"):
            mixture()
    with pytest.raises((RuntimeError, TypeError)):
        x.numpy()
    assert (x * torch.tensor(2.0))[here.long()].cpu().numpy().tolist() == [2.0, 2.0, 2.0]
    assert str(x.device) == card


# ------------------------------------------------------------------------------ the recommender
def inputs_of(kind, data):
    """What an arm gets, on the CPU: of LANE's layer two preferences at each of two cuts."""
    torch.manual_seed(3)
    if kind == "features":
        return rec.Inputs(features_of(data.n_items))
    if kind == "lane":
        users = len(data.train)
        named = torch.randint(7, (users, 2, 2))
        since = torch.tensor([[2, 4]]).repeat(users, 1)
        initial = 0.1 * torch.randn(data.n_items + 1, 16)
        return rec.Inputs(initial=initial, preferences=(features_of(6), named, since))
    return rec.Inputs()


@pytest.mark.parametrize("kind", ["ids", "features", "lane"])
def test_an_arm_on_the_card_is_the_same_arm(card, kind):
    """Guards: histories, targets, positions or preferences that stay on the CPU in training or in
    ranking; scores, features or weights that stay on the card where the transition term, the ranks
    or a file need them."""
    data = ring(n_users=16)
    inputs = inputs_of(kind, data)
    fits = []
    for device in ("cpu", card):
        config = rec.TrainConfig(epochs=2, width=16, batch=16, device=device)
        fits.append(rec.fit_arm("id", data, inputs, config, seed=0))
    ours, theirs = fits
    for key in ("ranks", "valid_ranks"):
        assert torch.equal(ours[key], theirs[key])
    assert ours["transition_weight"] == theirs["transition_weight"]
    for name, weight in ours["model"].items():
        assert torch.equal(weight, theirs["model"][name]), name


def test_all_of_a_recommender_is_on_the_card(card):
    """Guards: a part that .to(device) does not reach, and so a table or a gradient on the CPU."""
    for kind in ("ids", "features", "lane"):
        data = ring()
        model = rec.SASRec(data.n_items, inputs_of(kind, data), width=16).to(card)
        known = model.align.known([0, 1], [[1, 2, 3], [4]]) if model.align else None
        ids = torch.tensor([[1, 2, 3], [4, 0, 0]], device=card)
        rec.next_item_loss(model, ids, torch.tensor([4, 5], device=card), known).backward()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert str(tensor.device) == card, name
            if tensor.requires_grad:
                assert str(tensor.grad.device) == card, name


# ------------------------------------------------------------------------------- the reward model
def test_a_reward_model_learns_on_the_card(card):
    """Guards: a tensor that states, reasons or scores make on the CPU. (The judge itself is on the
    CPU on every machine.)"""
    learnt = []
    for device in ("cpu", card):
        torch.manual_seed(0)
        model = reward.RewardModel(8, dropout=0.0).to(device)
        vectors = features_of(9, 8).to(device)
        histories = torch.tensor([[1, 2, 0], [3, 4, 5]], device=device)
        scores = model.scores(model.states(histories, vectors), model.reasons(vectors))
        torch.nn.functional.cross_entropy(scores, torch.tensor([1, 2], device=device)).backward()
        torch.optim.AdamW(model.parameters(), lr=0.1).step()
        learnt.append(torch.cat([weight.flatten() for weight in model.parameters()]).cpu())
    assert torch.equal(*learnt)


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """The folder of a text encoder, which is read before there is a card."""
    tiny_encoder(tmp_path)
    model = hf.AutoModel.from_pretrained(tmp_path)
    monkeypatch.setattr(hf.AutoModel, "from_pretrained", lambda *_, **how: copy.deepcopy(model))
    return str(tmp_path)


def test_an_encoder_on_the_card_gives_embeddings_on_the_cpu(encoder, card):
    """Guards: tokens that stay on the CPU; embeddings that stay on the card."""
    texts = [" ".join(D.ASPECTS[:3]), D.ASPECTS[4]]
    ours = reward.load_encoder(encoder)(texts)
    assert torch.equal(ours, reward.load_encoder(encoder, card)(texts))


# ------------------------------------------------------------------------------------------ the LLM
@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """(model, tokenizer) as rl.load makes them, in float32 for 4 bits, with both adapters."""
    path = str(tmp_path_factory.mktemp("llm") / "tiny")
    small_tiny(path, [("a few", pairs(60), 2)])
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(path)
    base = hf.Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
    base.generation_config.eos_token_id = [tokenizer.eos_token_id]
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(base, lora, adapter_name="align").eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    rl.add_policy(model)
    return model, tokenizer


@pytest.fixture
def llm(on_cpu, card):
    """device -> (model, tokenizer) of its own on that device, once there is a card."""

    def on(device):
        model, tokenizer = copy.deepcopy(on_cpu)
        return model.to(device), tokenizer

    return on


def on_both(llm, work):
    """What work(model, tokenizer) gives on the CPU and on the card."""
    return work(*llm("cpu")), work(*llm(CARD))


def test_a_sound_llm_on_the_card_has_no_flaw(llm):
    """Guards: the prompt of the first look at an LLM on the CPU."""
    model, tokenizer = llm(CARD)
    assert rl.flaw(model, tokenizer, rl.prompt_ids(tokenizer, "a")) is None


@pytest.mark.parametrize("most", [rl.MAX_LOGITS, 3 * 512])
def test_log_probabilities_and_gradients_are_the_same_on_the_card(llm, monkeypatch, most):
    """Guards: ids, starts, masks or positions on the CPU, also where logits come in parts."""
    monkeypatch.setattr(rl, "MAX_LOGITS", most)

    def gradients(model, tokenizer):
        rl.use(model, "align", trainable=True)
        prompts = [rl.prompt_ids(tokenizer, prompt) for prompt, _ in pairs(5)]
        answers = [rl.answer_ids(tokenizer, answer) for _, answer in pairs(5)]
        found = []
        for batch in rl.micro_batches(range(5), prompts, answers, model.device, 3):
            assert {str(x.device) for x in batch} == {str(model.device)}
            logp, states = rl.logps_and_states(model, batch, temperature=0.7)
            ((logp * batch.mask).sum() + states.sum()).backward()
            found.append((logp * batch.mask).detach().cpu().flatten())
        grads = [p.grad.cpu().flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(found + grads)

    assert torch.equal(*on_both(llm, gradients))


def test_supervised_training_is_the_same_on_the_card(llm):
    """Guards: micro-batches that stay on the CPU."""

    def work(model, tokenizer):
        rl.use(model, "align", trainable=True)
        return rl.supervise(model, tokenizer, pairs(20), rl.SupervisedConfig(3, 8, 4))

    ours, theirs = on_both(llm, work)
    assert ours == theirs


def test_answers_and_beams_are_the_same_on_the_card(llm):
    """Guards: prompts that stay on the CPU; a cache of prompts whose rows are picked from there."""

    def work(model, tokenizer):
        rl.use(model, "policy")
        # equal prompts share their keys
        texts, ids = rl.generate(model, tokenizer, PROMPTS[:3] * 2, rl.Sampling(5, budget=60))
        tries = rl.title_trie(tokenizer, ["red green", "blue", "old calm"])
        return texts, ids, rl.retrieve(model, tokenizer, PROMPTS[:2], tries, beams=2).tolist()

    ours, theirs = on_both(llm, work)
    assert ours == theirs


def test_text_embeddings_come_back_to_the_cpu(llm):
    """Guards: texts that stay on the CPU; embeddings that stay on the card, of which the judge and
    the arms' features are made."""

    def work(model, tokenizer):
        return rl.encode(model, tokenizer, PROMPTS[:4])

    assert torch.equal(*on_both(llm, work))


def test_speed_is_measured_on_the_card(llm):
    """Guards: its batch on the CPU."""
    for speed in rl.measure_speed(*llm(CARD), PROMPTS[:4], micro_batch=2, max_new=3):
        assert 0 < speed < np.inf


def test_a_tiny_llm_is_trained_on_the_card(tmp_path, card, monkeypatch):
    """Guards: a model that stays on the CPU; the biases that it starts with lost on the way."""
    devices = []

    def save(model, path):
        devices.append(str(model.device))
        keep(model.to("cpu"), path)

    keep = hf.PreTrainedModel.save_pretrained
    # a file is written of the CPU's tensors here, of any on a real card
    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", save)
    small_tiny(tmp_path / "tiny", [("a few", pairs(30), 2)], device=card)
    assert devices == [card]
    weights = load_file(tmp_path / "tiny/model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    bias = weights["model.layers.0.self_attn.k_proj.bias"]
    assert bias[:3].tolist() == pytest.approx([5.0] * 3, abs=0.1)
    assert bias[3:].abs().max() < 0.1


# --------------------------------------------------------------------------------------------- PPO
class Kept:
    """A checkpoint in memory: as torch.load gives it, on the CPU."""

    state = None

    def save(self, state):
        self.state = tree_map_only(torch.Tensor, lambda x: x.detach().cpu().clone(), state)


def ppo(model, tokenizer, checkpoint, **settings):
    """Two small updates; their log."""
    sampling = rl.Sampling(5)
    sizes = {"batch": 8, "minibatch": 4, "micro_batch": 2, "lr": 5e-3}
    config = rl.PPOConfig(2, **sizes, sampling=sampling, **settings)
    return figures(rl.ppo(model, tokenizer, PROMPTS, Rewards(1.0), config, checkpoint))


@pytest.mark.parametrize("group", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_ppo_is_the_same_on_the_card(llm, group):
    """Guards: masks, rewards, ends of answers, the value head, or the log-probabilities that an
    update looks back at, on the CPU."""

    def work(model, tokenizer):
        return ppo(model, tokenizer, rl.Checkpoint(), group=group)

    ours, theirs = on_both(llm, work)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_ppo_goes_on_on_the_card(llm):
    """Guards: a checkpoint's weights or Adam's moments, read on the CPU, that stay there."""
    checkpoint = Kept()
    first = ppo(*llm(CARD), checkpoint)
    checkpoint.state["log"] = checkpoint.state["log"][:1]
    model, tokenizer = llm(CARD)
    again = ppo(model, tokenizer, checkpoint)
    assert [row["update"] for row in again] == [row["update"] for row in first]
    assert {str(weight.device) for weight in model.parameters()} == {CARD}


def test_ppo_mathematics_stays_on_the_card(card):
    """Guards: a tensor that is made on the CPU among advantages, losses or their statistics."""
    found = []
    for device in ("cpu", card):
        torch.manual_seed(0)
        x = [torch.randn(4, 5).to(device) for _ in range(6)]
        mask = (torch.arange(5) < torch.tensor([[5], [3], [1], [4]])).to(device)
        advantages, returns = rl.gae(x[0], x[1], mask)
        rollout = rl.Rollout(x[2] * mask, x[3] * mask, rl.standardize(advantages, mask), returns)
        logp = x[4].requires_grad_()
        loss, stats = rl.ppo_loss(logp, x[5], rollout, mask, mask.sum())
        loss.backward()
        scores = rl.group_advantages(x[0][:, 0], 2)
        assert {str(t.device) for t in (*rollout, loss, logp.grad, scores)} == {device}
        parts = [*rollout, logp.grad, scores, torch.tensor(list(stats.values()))]
        found.append(torch.cat([part.detach().cpu().flatten() for part in parts]))
    assert torch.equal(*found)


def test_a_value_head_is_where_the_llm_is(llm):
    """Guards: a head on the CPU, under hidden states on the card."""
    model, _ = llm(CARD)
    assert {str(weight.device) for weight in rl.value_head(model).parameters()} == {CARD}


# ---------------------------------------------------------------------------------------- the run
def test_the_peak_is_that_of_the_device_in_use(tmp_path, world, monkeypatch):
    """Guards: the peak memory of the first card where another one has done the work."""
    run = open_run(world, tmp_path / "run")
    run.settings = dataclasses.replace(run.settings, device="cuda:1")
    run.metrics["comparisons"] = []
    peaks = {"cuda:1": 5 * 2**20}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=0: peaks.get(device, 0))
    curec.write_report(run, world, [])
    assert run.metrics["peak_memory_mb"]["gpu"] == 5


def test_the_dtype_follows_the_cards_age(monkeypatch):
    """Guards: bfloat16 that an older card emulates, slowly; the age of another card than asked."""
    ages = {"cuda": (9, 0), "cuda:1": (7, 5), "cuda:2": (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", ages.get)
    dtypes = [rl.default_dtype(device) for device in ("cpu", *ages)]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]
