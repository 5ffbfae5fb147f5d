"""Adapters on a model in 4 bits: what is quantised, what trains and what stays, and what cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from trainer.tiny import offline_config, tiny_config, write_model
from transformers import AutoModelForCausalLM

from fastrl.model import load
from fastrl.model.adapter import add_adapter
from fastrl.model.head import split_head
from fastrl.model.load import load_model
from fastrl.rollout.base import SamplingParams
from fastrl.rollout.transformers_sampler import TransformersSampler
from fastrl.trainer import setup
from fastrl.trainer.config import AdapterConfig, OptimizerConfig
from fastrl.trainer.learner import Learner
from fastrl.trainer.recipe import load_recipe
from fastrl.trainer.setup import evaluate_model, train
from fastrl.typed import ConfigError

IDS = torch.tensor([[3, 4, 5, 6]])
NF4 = AdapterConfig(rank=8, quantize="nf4")


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


def test_without_bitsandbytes_the_refusal_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(ModuleNotFoundError, match="quantize: bitsandbytes is not installed: pip install bitsandbytes"):
        train(offline_config(tmp_path, adapter=NF4))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter: {quantize: nf4}", "adapter.quantize: expected none without an adapter, rank 0, got nf4"),
        ("adapter: {rank: 4, quantize: nf4, save: merged}", "adapter.save: expected adapter with adapter.quantize"),
        ("adapter: {rank: 4, quantize: int3}", "quantize: expected one of none, nf4, got 'int3'"),
    ],
)
@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_what_cannot_be_quantised_is_refused(tmp_path, algorithm, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"algorithm: {algorithm}\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def quantised(tmp_path, dtype=torch.float32):
    pytest.importorskip("bitsandbytes")
    return load_model(write_model(tmp_path / "model"), dtype, quantize="nf4")[0]


def layers(model):
    """The quantised layers' bytes, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_layer_but_the_head_is_held_in_4_bits_and_adapters_in_the_models_dtype(tmp_path, dtype):
    model = quantised(tmp_path, dtype)
    plain, _ = load_model(tmp_path / "model", dtype)
    linear = {name for name, module in plain.named_modules() if type(module) is torch.nn.Linear}
    held = layers(model)
    assert {name.removesuffix(".weight") for name in held} == linear - {"lm_head"}
    sizes = {name: module.weight.numel() for name, module in plain.named_modules() if name in linear}
    assert all(2 * held[f"{name}.weight"].numel() == sizes[name] for name in linear - {"lm_head"})
    assert split_head(model).weight.equal(split_head(plain).weight)
    difference = (model(IDS).logits - plain(IDS).logits).float()
    assert 0 < difference.norm() < 0.2 * plain(IDS).logits.float().norm()
    add_adapter(model, rank=4, alpha=8.0, targets=("all-linear", "lm_head"))
    trained = [param for param in model.parameters() if param.requires_grad]
    assert {param.dtype for param in trained} == {dtype}
    assert len(trained) == 2 * 14


def test_sampling_changes_no_weight_and_gradients_are_those_of_the_dequantised_model(tmp_path):
    """bitsandbytes would lay the weights out anew when a layer is first called without a gradient."""
    dequantize_4bit = pytest.importorskip("bitsandbytes").functional.dequantize_4bit
    model = quantised(tmp_path)
    before = layers(model)
    params = SamplingParams(4, 1.0, 1.0, 0, (0,), seed=0)
    TransformersSampler(model).sample([[3, 4, 5]], 2, params)
    with torch.no_grad():
        model(IDS)
    after = layers(model)
    assert all(after[name].equal(weight) for name, weight in before.items())
    plain, _ = load_model(tmp_path / "model")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in before:
                plain.get_parameter(name).copy_(dequantize_4bit(param.data, param.quant_state))
    gradients = []
    for each in (model, plain):
        add_adapter(each, rank=4, alpha=8.0)
        generator = torch.Generator().manual_seed(0)
        trained = [param for param in each.parameters() if param.requires_grad]
        for param in trained:
            torch.nn.init.normal_(param, std=0.2, generator=generator)
        each(IDS).logits.log_softmax(-1)[..., 5].sum().backward()
        gradients.append(torch.cat([param.grad.flatten() for param in trained]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 1e-2


def test_dpo_on_a_model_in_4_bits_learns_and_saves_an_adapter_that_is_judged_the_same(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = offline_config(tmp_path, steps=12, dtype="bfloat16", adapter=NF4)
    outcome = train(config)
    # How many of the six held-out pairs 12 steps in bfloat16 put right depends on the machine's rounding; not that more
    # than the half do that the model, as its own reference, begins with.
    assert outcome.after["accuracy"] > outcome.before["accuracy"] == 0.5
    assert outcome.after["loss"] < outcome.before["loss"] - 0.02
    saved = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    judged = evaluate_model(config, str(tmp_path / "run" / "model"))
    assert judged == pytest.approx(outcome.after, rel=1e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")  # by itself it goes on the whole weights
    assert any("lora_" in name for name, _ in again.named_parameters())


def test_grpo_on_a_model_in_4_bits_leaves_its_weights_alone(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    seen = []
    prepared = setup.prepare
    monkeypatch.setattr(setup, "prepare", lambda config: seen.append(prepared(config)) or seen[-1])
    held = []
    first = Learner.begin
    monkeypatch.setattr(Learner, "begin", lambda learner: held.append(layers(learner.policy.model)) or first(learner))
    config = tiny_config(tmp_path, steps=10, adapter=NF4, loss={"kl.coef": 0.001}, optimizer=OptimizerConfig(lr=3e-2))
    outcome = train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["kl"] > 0.01
    assert outcome.status == "finished"
    after = layers(seen[0].learner.policy.model)
    assert len(after) == 14
    assert all(after[name].equal(weight) for name, weight in held[0].items())


def test_a_resumed_run_in_4_bits_is_bit_for_bit_the_one_that_never_stopped(tmp_path):
    pytest.importorskip("bitsandbytes")
    saved = {}
    for name, stops in (("whole", ()), ("stopped", (2,))):
        path = str(tmp_path / name)
        for steps in (*stops, 4):
            resume = path if stops and steps == 4 else ""
            train(offline_config(tmp_path, steps=steps, adapter=NF4, save_every=2, run_dir=path, resume=resume))
        saved[name] = (tmp_path / name / "model" / "adapter_model.safetensors").read_bytes()
    assert saved["whole"] == saved["stopped"]
