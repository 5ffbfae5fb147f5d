"""The plan's formulas against what is allocated, at toy size, and its words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.cli import main
from fastrl.plan import BYTES, SHAPES, Shape, Work, arithmetic, exchanged, layer_bytes, memory, peak, shape_of, table
from fastrl.rollout.base import SamplingParams
from fastrl.rollout.cache import RolloutCache
from fastrl.rollout.transformers_sampler import TransformersSampler
from fastrl.trainer.config import OptimizerConfig
from fastrl.trainer.optimizer import MasterOptimizer

TOY = Shape(64, 4, 192, 4, 2, 16, 96, tied=True)
WIDE = replace(TOY, head_size=32, key_heads=4, tied=False)  # queries wider than the hidden state, as Qwen3's
SIZES = pytest.mark.parametrize("shape", [TOY, WIDE, replace(TOY, hidden=128, inner=320, heads=8)], ids=str)


def model_of(shape, dtype=torch.float32):
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size, tie_word_embeddings=shape.tied, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def kept_for_backward(shape, dtype, tokens):
    """Bytes of all storages that autograd keeps, weights and buffers aside."""
    model = model_of(shape, dtype).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(torch.arange(tokens)[None] % shape.vocabulary).last_hidden_state
    del hidden
    return sum(size for size, _ in seen.values())


@SIZES
def test_parameters_are_the_models(shape):
    assert shape.parameters == sum(p.numel() for p in model_of(shape).parameters())


@pytest.mark.parametrize(("name", "billions"), [("smollm2-135m", 0.1345), ("qwen3-8b", 8.19), ("llama-3.1-70b", 70.55)])
def test_known_shapes_have_their_published_sizes(name, billions):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=2e-3)


@SIZES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_as_many_bytes_as_the_formula_says(shape, dtype):
    kind, tokens = getattr(torch, dtype), 128
    deep, flat = (kept_for_backward(replace(shape, layers=layers), kind, tokens) for layers in (4, 2))
    assert (deep - flat) / 2 == layer_bytes(shape, dtype) * tokens


@SIZES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_masters_gradients_and_moments_are_the_optimizers_to_the_byte(shape, dtype):
    optimizer = MasterOptimizer(model_of(shape, getattr(torch, dtype)).parameters(), OptimizerConfig(), 1)
    parts, tensors = memory(shape, Work(dtype=dtype)), optimizer.tensors()
    assert parts["weights"] == tensors["weights"].nbytes
    assert parts["masters"] == (tensors["low_bits"].nbytes if "low_bits" in tensors else 0)
    assert parts["moments"] == tensors["exp_avg"].nbytes + tensors["exp_avg_sq"].nbytes
    assert parts["gradients"] == optimizer.grad.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_of_a_rollout_is_allocated_to_the_byte(dtype, monkeypatch):
    found, fill = [], RolloutCache.fill

    def noted(cache, *args):
        fill(cache, *args)
        found.append(sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values)))

    monkeypatch.setattr(RolloutCache, "fill", noted)
    params = SamplingParams(max_new_tokens=5, min_new_tokens=5, stop_token_ids=(0,))
    TransformersSampler(model_of(TOY, getattr(torch, dtype))).sample([[1, 2, 3]] * 2, 4, params)
    work = Work(prompt_tokens=3, completion_tokens=5, at_once=8, dtype=dtype)
    assert found == [memory(TOY, work)["cache"]]


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer_and_the_peak_is_of_the_larger_stage():
    work = Work(microbatch_tokens=100, dtype="float32")
    layer = layer_bytes(TOY, "float32") * 100
    assert memory(TOY, replace(work, checkpointing=False))["activations"] == 4 * layer
    assert memory(TOY, work)["activations"] == 4 * 100 * 4 * 64 + layer
    parts = {"weights": 10, "gradients": 20, "cache": 7, "activations": 3, "logits": 5}
    assert peak(parts) - peak(parts | {"cache": 0}) == 0
    assert peak(parts | {"cache": 9}) - peak(parts) == 1


def test_what_is_exchanged_and_computed_are_the_textbook_counts():
    assert exchanged(TOY, 1) == 0
    assert exchanged(TOY, 4) == 6 * TOY.parameters  # 2 * 3/4 * 4 bytes
    work = Work(prompts=2, samples=3, prompt_tokens=5, completion_tokens=7, reference=True)
    assert arithmetic(TOY, work) == {
        "sampling": 2.0 * TOY.parameters * (42 + 10),
        "reference": 2.0 * TOY.parameters * 72,
        "training": 6.0 * TOY.parameters * 72,
    }
    assert arithmetic(WIDE, work)["training"] == 6.0 * (WIDE.parameters - 96 * 64) * 72


def test_the_command_plans_a_folder_and_a_known_model_and_says_what_would_fit(tmp_path, capsys):
    model_of(WIDE).save_pretrained(tmp_path / "toy")
    assert shape_of(str(tmp_path / "toy")) == WIDE
    assert main(["plan", str(tmp_path / "toy"), "--gpus", "2"]) == 0
    assert "fits in 80 GiB" in capsys.readouterr().out
    assert main(["plan", "qwen3-8b", "--memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "does not fit in 80 GiB" in said
    assert "An adapter would leave 15.3 GiB" in said
    assert main(["plan", "llama-3.1-70b"]) == 0
    assert "no process can hold a part of a model yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "plan: MODEL: expected one of smollm2-135m"),
        (["qwen3-8b", "--gpus", "0"], "plan: gpus: expected at least 1, got 0"),
        (["MOE"], "expected a dense decoder's configuration"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 4, "hidden_size": 4}))
    assert main(["plan", *(str(tmp_path) if one == "MOE" else one for one in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_the_page_has_the_table():
    page = (Path(__file__).resolve().parents[1] / "docs" / "scale.md").read_text()
    assert table() in page
    assert set(BYTES) == {"bfloat16", "float32"}
