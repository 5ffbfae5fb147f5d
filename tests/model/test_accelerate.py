"""accelerate_cpu: the same model, on the quicker products; and as it was when it is undone."""

from __future__ import annotations

import copy
import io
import logging

import peft
import pytest
import torch
from backends import NATIVE, using
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import fastrl
from fastrl.model import accelerate, attention, race
from fastrl.model.accelerate import NativeLinear, Probe, accelerate_cpu, probe
from fastrl.model.head import split_head

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen2, with biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "gemma2, eager with softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, attn_implementation="eager")
    ),
}
IDS = torch.arange(3 * 20).view(3, 20) % 64
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def make(family="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return FAMILIES[family]().to(dtype)


def with_lora(model, **options):
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options), autocast_adapter_dtype=False
    )
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    return adapted


def loss_and_gradients(model):
    model.zero_grad()
    logits = model(input_ids=IDS).logits.float()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, want, dtype):
    """Two orders of summation through a few layers: within a few roundings of the largest gradient of each tensor."""
    units = 64 if dtype == torch.float32 else 8
    torch.testing.assert_close(got[0], want[0], rtol=units * torch.finfo(dtype).eps, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        scale = gradient.float().abs().max().item()
        atol = units * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("family", FAMILIES)
@each_dtype
def test_a_whole_models_gradients_are_those_without(backend, family, dtype):
    model = make(family, dtype)
    want = loss_and_gradients(model)
    with using(backend), accelerate_cpu(model, linear="native") as handle:
        assert handle.covered == sum(isinstance(module, nn.Linear) for module in model.modules()) > 0
        assert_close(loss_and_gradients(model), want, dtype)


@pytest.mark.parametrize("native", [True, False])
def test_the_probes_choice_is_what_runs(monkeypatch, native):
    race = Probe([1.0], [2.0]) if native else Probe([2.0], [1.0])
    monkeypatch.setattr(accelerate, "probe", lambda shape, dtypes, rows: dict.fromkeys(dtypes, race))
    monkeypatch.setattr(accelerate, "choose", accelerate.choose.__wrapped__)
    calls = []
    original = accelerate.native_linear
    monkeypatch.setattr(accelerate, "native_linear", lambda *tensors: calls.append(1) or original(*tensors))
    model = make()
    want = loss_and_gradients(model)
    with accelerate_cpu(model) as handle:
        got = loss_and_gradients(model)
    assert len(calls) == (handle.covered if native else 0)
    assert {choice for of in handle.choices.values() for choice in of.values()} == {(native,) * 3}
    assert_close(got, want, torch.float32)
    if not native:
        assert torch.equal(got[0], want[0])


def test_what_was_measured_once_is_not_measured_again(monkeypatch):
    model = make()
    with accelerate_cpu(model) as handle:
        known = copy.deepcopy(handle.choices)
    monkeypatch.setattr(accelerate, "choose", lambda *_: pytest.fail("measured again"))
    with accelerate_cpu(model, known=known) as handle:
        assert handle.choices is known
        model(input_ids=IDS)


def test_the_number_of_rows_picks_the_race_that_stands_for_it():
    layer = nn.Linear(8, 8)
    for index, sizes in enumerate([(1, 8, 15), (16, 64, 127), (128, 256, 5000)]):
        choices = {torch.float32: {(8, 8): tuple(place == index for place in range(3))}}
        with accelerate_cpu(layer, known=choices):
            assert [accelerate.served(layer, torch.float32, rows) for rows in sizes] == [True] * 3
            assert not accelerate.served(layer, torch.float32, {0: 64, 1: 256, 2: 8}[index])


@each_dtype
def test_a_race_times_both_ways_and_leaves_the_random_numbers_alone(dtype):
    before = torch.get_rng_state()
    for rows in accelerate.ROWS:
        race = probe((48, 40), (dtype,), rows, rounds=2)[dtype]
        assert all(seconds > 0 for way in race for seconds in way)
        assert 1 <= len(race.native) <= 2
        assert 1 <= len(race.torch) <= 2
    assert torch.equal(torch.get_rng_state(), before)


def test_native_is_kept_where_the_difference_is_noise():
    assert Probe([1.04], [1.0]).prefers_native()
    assert not Probe([1.1, 1.1, 0.2], [1.0, 1.0, 1.0]).prefers_native()


def test_undone_the_model_is_what_it_was():
    model = make()
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    want = loss_and_gradients(model)
    handle = accelerate_cpu(model)
    handle.undo()
    handle.undo()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.config._attn_implementation == "sdpa"
    got = loss_and_gradients(model)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in want[1].items())


def test_twice_is_once_and_only_the_first_undoes():
    model = make()
    first = accelerate_cpu(model)
    with accelerate_cpu(model) as second:
        assert second.covered == 0
    assert type(model.lm_head) is NativeLinear
    first.undo()
    assert type(model.lm_head) is nn.Linear


def test_state_dict_saving_and_loading_do_not_notice(tmp_path):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with accelerate_cpu(model):
        during = model.state_dict()
        model.load_state_dict(before)
        model.save_pretrained(tmp_path)
    assert before.keys() == during.keys()
    other = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())
    assert other.config._attn_implementation == "sdpa"
    assert all(type(module) is not NativeLinear for module in other.modules())


@pytest.mark.parametrize("adapted", [False, True])
def test_a_deep_copy_and_a_pickled_model_compute_by_themselves(adapted):
    model = with_lora(make()) if adapted else make()
    with accelerate_cpu(model, linear="native"):
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        want = model(input_ids=IDS).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(input_ids=IDS).logits, want)
    assert torch.equal(loaded(input_ids=IDS).logits, want)


def test_hooks_and_parameters_are_the_same_objects():
    model, seen = make(), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    before = dict(model.named_parameters())
    with accelerate_cpu(model):
        model(input_ids=IDS)
        assert all(p is before[name] for name, p in model.named_parameters())
    assert seen == [1]


def test_an_optimizer_step_is_seen_at_once():
    """Nothing is kept of a weight that could be out of date."""
    model = make()
    with accelerate_cpu(model, linear="native"):
        model(input_ids=IDS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        got = model(input_ids=IDS).logits
    torch.testing.assert_close(got, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, make()(input_ids=IDS).logits, rtol=1e-2)


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_activation_checkpointing_gives_the_same_gradients(options):
    model = make().train()
    want = loss_and_gradients(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)
    model.enable_input_require_grads()
    with accelerate_cpu(model, linear="native"):
        assert_close(loss_and_gradients(model), want, torch.float32)


def test_autocast_gives_the_logits_and_gradients_of_autocast():
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = loss_and_gradients(model)
        with accelerate_cpu(model, linear="native"):
            got = loss_and_gradients(model)
    assert {g.dtype for g in got[1].values()} == {torch.float32}
    assert_close(got, want, torch.bfloat16)


def test_a_dtype_that_came_later_is_measured_when_it_comes():
    model = make()
    with accelerate_cpu(model) as handle:
        assert set(handle.choices) == {torch.float32}
        model.bfloat16()
        assert model(input_ids=IDS).logits.dtype == torch.bfloat16
        assert set(handle.choices) == {torch.float32, torch.bfloat16}


def test_a_compiled_model_computes_the_same():
    model = make()
    want = model(input_ids=IDS).logits
    with accelerate_cpu(model, linear="native"):
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_generation_draws_the_same_tokens():
    model = make()
    want = model.generate(IDS[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
    with accelerate_cpu(model, linear="native"):
        got = model.generate(IDS[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)


def test_an_accelerated_model_can_be_cut_and_one_that_is_cut_can_be_accelerated():
    model = make()
    with accelerate_cpu(model):
        assert split_head(model).weight is model.lm_head.weight


@each_dtype
@pytest.mark.parametrize("backend", NATIVE)
def test_an_adapted_models_gradients_are_those_without(backend, dtype):
    model = with_lora(make(dtype=dtype))
    want = loss_and_gradients(model)
    with using(backend), accelerate_cpu(model, linear="native"):
        got = loss_and_gradients(model)
    assert all("lora" in name for name in got[1])
    assert_close(got, want, dtype)


def test_a_plain_adapter_is_one_call_and_what_is_not_plain_is_pefts(monkeypatch):
    calls = []
    original = accelerate.native_lora_linear
    monkeypatch.setattr(accelerate, "native_lora_linear", lambda *a: calls.append(1) or original(*a))

    def fused(adapted, **inputs):
        calls.clear()
        with accelerate_cpu(adapted, linear="native"):
            got = adapted(input_ids=IDS, **inputs).logits
        torch.testing.assert_close(got, adapted(input_ids=IDS, **inputs).logits, rtol=1e-4, atol=1e-5)
        return len(calls)

    plain = with_lora(make())
    assert fused(plain) == 14
    with plain.disable_adapter():
        assert fused(plain) == 0
    plain.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    assert fused(plain) == 13
    plain.merge_adapter()
    assert fused(plain) == 0
    assert fused(with_lora(make(), use_dora=True)) == 0
    assert fused(with_lora(make(), lora_dropout=0.5).eval()) == 14
    two = with_lora(make())
    two.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    two.base_model.set_adapter(["default", "other"])
    assert fused(two) == 0


def test_dropout_in_an_adapter_that_trains_is_pefts():
    adapted = with_lora(make(), lora_dropout=0.5).train()
    torch.manual_seed(3)
    want = adapted(input_ids=IDS).logits
    with accelerate_cpu(adapted, linear="native"):
        torch.manual_seed(3)
        torch.testing.assert_close(adapted(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_merging_and_unloading_an_accelerated_adapter_gives_its_model():
    adapted = with_lora(make())
    want = adapted(input_ids=IDS).logits
    with accelerate_cpu(adapted):
        whole = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(whole(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_layers_that_are_not_covered_are_named_once_and_stay(caplog):
    class Odd(nn.Linear):
        """A subclass may do anything in its forward."""

    layers = {
        "conv": nn.Conv1d(4, 4, 1),
        "odd": Odd(4, 4),
        "fp16": nn.Linear(4, 4).half(),
        "fp16 too": nn.Linear(4, 4).half(),
        "meta": nn.Linear(4, 4, device="meta"),
        "fp64": nn.Linear(4, 4).double(),
        "plain": nn.Linear(4, 4),
        "embedding": nn.Embedding(4, 4),
        "norm": nn.LayerNorm(4),
    }
    model = nn.ModuleDict(layers)
    classes = {name: type(module) for name, module in layers.items()}
    with caplog.at_level(logging.INFO, "fastrl"), accelerate_cpu(model) as handle:
        assert {name for name, module in layers.items() if type(module) is not classes[name]} == {"plain", "embedding"}
        assert layers["fp16"](torch.ones(1, 4).half()).dtype == torch.float16
    assert handle.covered == 1
    assert handle.others == {
        "Conv1d": 1,
        "Odd": 1,
        "Linear (dtype torch.float16)": 2,
        "Linear (a tensor on meta)": 1,
        "Linear (dtype torch.float64)": 1,
    }
    (record,) = caplog.records
    assert record.getMessage().count("Conv1d") == 1


def test_models_without_linear_layers_or_attention_of_their_own_are_left_alone():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)).eval()
    bert = BertModel(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).eval()
    for model in (gpt2, bert):
        want = model(input_ids=IDS)[0]
        with accelerate_cpu(model, linear="native"):
            torch.testing.assert_close(model(input_ids=IDS)[0], want, rtol=1e-4, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("padding", [None, 3])
def test_an_embeddings_gradient_goes_straight_into_main_grad(dtype, padding):
    torch.manual_seed(0)
    layer = nn.Embedding(16, 8, padding_idx=padding).to(dtype)
    ids, dy = torch.tensor([[3, 5, 3], [0, 15, 5]]), torch.randn(2, 3, 8).to(dtype)
    whole = nn.Embedding(16, 8, padding_idx=padding)
    whole(ids).backward(dy.float())
    layer.weight.main_grad = torch.ones(16, 8)
    with accelerate_cpu(layer):
        layer(ids).backward(dy)
        assert not layer(ids).isnan().any()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.weight.main_grad, 1 + whole.weight.grad, rtol=1e-6, atol=1e-6)


def test_an_embedding_without_main_grad_is_torchs():
    layer, ids = nn.Embedding(16, 8), torch.tensor([1, 2, 1])
    with accelerate_cpu(layer):
        layer(ids).sum().backward()
    assert layer.weight.grad[:3].tolist() == [[0.0] * 8, [2.0] * 8, [1.0] * 8]


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_bfloat16_is_computed_in_float32_where_that_is_slow(monkeypatch, slow, masked):
    monkeypatch.setattr(attention, "slow_bfloat16", lambda: slow)
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *a, **k: seen.append(q.dtype) or original(q, *a, **k),
    )
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    model = make(dtype=torch.bfloat16)
    inputs = {"input_ids": IDS, "attention_mask": mask if masked else None}
    want = model(**inputs).logits
    seen.clear()
    with accelerate_cpu(model):
        got = model(**inputs).logits
    assert set(seen) == {torch.float32 if slow else torch.bfloat16}
    torch.testing.assert_close(got[:, 3:], want[:, 3:], rtol=2**-5, atol=2**-5)


def test_another_choice_of_products_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"accelerate_cpu: linear: expected one of auto, native, got 'nativ'\. Did you"
    ):
        fastrl.accelerate_cpu(nn.Linear(2, 2), linear="nativ")


def test_without_native_kernels_the_benchmark_prefers_torch(monkeypatch):
    monkeypatch.setattr("fastrl.kernels.native.load", lambda: (None, "the extension is not built"))
    race._ratio.cache_clear()
    try:
        found = probe((24, 16), (torch.float32, torch.bfloat16), 8, rounds=1)
        assert not any(one.prefers_native() for one in found.values())
        assert 0 < race.bfloat16_ratio({(24, 16): 2}) < float("inf")
    finally:
        race._ratio.cache_clear()
