"""dtype: auto: what is chosen, what is said of it, and that a run and its resumption compute in the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from trainer.tiny import offline_config, tiny_config, write_model

from fastrl.model import accelerate, race
from fastrl.model.accelerate import NativeLinear, Probe
from fastrl.model.load import linear_shapes
from fastrl.model.race import DTYPES, bfloat16_ratio, from_json, to_json
from fastrl.trainer import precision
from fastrl.trainer.config import TrainConfig
from fastrl.trainer.precision import resolve_dtype
from fastrl.trainer.setup import evaluate_model, prepare, train

CPU = torch.device("cpu")


def at_ratio(monkeypatch, ratio):
    monkeypatch.setattr(precision, "bfloat16_ratio", lambda shapes, native=True: ratio)


def messages(run_dir):
    path = run_dir / "warnings.jsonl"
    return [json.loads(line)["message"] for line in path.read_text().splitlines()] if path.exists() else []


def test_auto_is_the_default_of_every_kind_of_run():
    assert TrainConfig().dtype == "auto"
    assert TrainConfig().dtype == "auto"


@pytest.mark.parametrize(
    ("ratio", "chosen"), [(0.5, "bfloat16"), (0.9, "bfloat16"), (0.95, "float32"), (20.0, "float32")]
)
def test_a_cpu_computes_in_bfloat16_only_where_that_is_clearly_quicker(monkeypatch, tmp_path, ratio, chosen):
    at_ratio(monkeypatch, ratio)
    config, found = resolve_dtype(tiny_config(tmp_path, dtype="auto"), CPU)
    assert (config.dtype, found.ratio) == (chosen, ratio)
    assert str(found) == f"{chosen} (bfloat16 takes {ratio:.2f} times as long as float32 here)"


@pytest.mark.parametrize(("has_it", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_computes_in_bfloat16_where_it_has_it(monkeypatch, has_it, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_it)
    config, found = resolve_dtype(TrainConfig(), torch.device("cuda"))
    assert (config.dtype, str(found)) == (chosen, chosen)


def test_another_device_computes_in_float32():
    assert resolve_dtype(TrainConfig(), torch.device("mps"))[0].dtype == "float32"


def test_a_dtype_by_name_is_kept_and_a_slow_one_is_warned_of_once(monkeypatch, tmp_path):
    at_ratio(monkeypatch, 3.0)
    train(tiny_config(tmp_path, dtype="bfloat16", steps=1, save_every=1))
    said = [message for message in messages(tmp_path / "run") if message.startswith("dtype")]
    assert said == ["dtype: bfloat16 takes 3.0 times as long as float32 on this machine; auto takes float32."]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("dtype", "ratio"), [("float32", 3.0), ("bfloat16", 0.5), ("auto", 3.0)])
def test_nothing_is_said_where_the_dtype_is_the_quicker_one(monkeypatch, tmp_path, dtype, ratio):
    at_ratio(monkeypatch, ratio)
    run = prepare(tiny_config(tmp_path, dtype=dtype))
    assert run.speed.warnings() == []


@pytest.mark.parametrize(("ratio", "dtype"), [(0.5, "bfloat16"), (2.0, "float32")])
def test_a_run_records_what_auto_stood_for_and_its_resumption_keeps_it(monkeypatch, tmp_path, capsys, ratio, dtype):
    at_ratio(monkeypatch, ratio)
    config = tiny_config(tmp_path, dtype="auto", steps=2, save_every=1)
    train(replace(config, steps=1))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dtype"] == dtype
    assert json.loads((tmp_path / "run" / "env.json").read_text())["speed"]["dtype"].startswith(
        f"{dtype} (bfloat16 takes"
    )
    header = " ".join(capsys.readouterr().out.split())  # the screen folds long lines
    assert f"{ratio:.2f} times as long" in header
    assert "4 prompts held out" in header
    assert "1 steps of 4 prompts x 4 completions" in header
    at_ratio(monkeypatch, 1 / ratio)  # another machine, or a busy one
    run = prepare(replace(config, resume=str(tmp_path / "run")))
    assert run.config.dtype == dtype
    assert {p.dtype for p in run.learner.policy.model.parameters()} == {DTYPES[dtype]}
    assert train(replace(config, resume=str(tmp_path / "run"))).status == "finished"


def test_an_offline_run_resolves_it_too(monkeypatch, tmp_path):
    at_ratio(monkeypatch, 0.5)
    train(offline_config(tmp_path, "sft", dtype="auto", steps=1))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dtype"] == "bfloat16"


def test_an_evaluation_says_what_it_computes_in(monkeypatch, tmp_path, capsys):
    at_ratio(monkeypatch, 2.0)
    evaluate_model(tiny_config(tmp_path, dtype="auto"))
    assert "dtype: float32 (bfloat16 takes 2.00 times as long as float32 here)\n" in capsys.readouterr().out


def test_a_resumed_run_computes_on_the_products_that_it_began_with(monkeypatch, tmp_path):
    """Whatever a second race would say: two products round differently."""
    config = tiny_config(tmp_path, steps=2, save_every=1)
    train(replace(config, steps=1))
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step_000001" / "state.json").read_text())["linear"]
    assert saved["float32"]
    monkeypatch.setattr(accelerate, "choose", lambda *_: pytest.fail("raced again"))
    run = prepare(replace(config, resume=str(tmp_path / "run")))
    assert to_json(run.speed.choices) == saved
    assert from_json(saved) == run.speed.choices


@pytest.mark.parametrize("linear", ["auto", "native", "torch"])
def test_the_recipe_says_whose_products_the_layers_take(tmp_path, linear):
    run = prepare(tiny_config(tmp_path, linear=linear))
    layers = [m for m in run.learner.policy.model.modules() if isinstance(m, torch.nn.Linear)]
    assert all((type(layer) is NativeLinear) == (linear != "torch") for layer in layers)
    assert run.speed.layers == (0 if linear == "torch" else len(layers))
    assert ("linear" in run.speed.about()) == (linear != "torch")
    if linear != "torch":
        assert all((layer.choices is None) == (linear == "native") for layer in layers)


def test_the_ratio_weighs_each_shape_by_its_number_and_takes_the_quicker_products(monkeypatch):
    seconds = {
        (torch.float32, (4, 2)): Probe([1.0], [2.0]),
        (torch.bfloat16, (4, 2)): Probe([0.5], [50.0]),
        (torch.float32, (2, 4)): Probe([9.0], [4.0]),
        (torch.bfloat16, (2, 4)): Probe([9.0], [8.0]),
    }
    monkeypatch.setattr(race, "probe", lambda shape, dtypes, rows: {d: seconds[d, shape] for d in dtypes})
    monkeypatch.setattr(race, "_ratio", race._ratio.__wrapped__)
    assert bfloat16_ratio({(4, 2): 6, (2, 4): 1}) == pytest.approx((6 * 0.5 + 8) / (6 * 1 + 4))
    assert bfloat16_ratio({(4, 2): 6, (2, 4): 1}, native=False) == pytest.approx((6 * 50 + 8) / (6 * 2 + 4))


def test_the_shapes_are_those_of_the_model_and_no_model_has_none(tmp_path):
    shapes = linear_shapes(write_model(tmp_path / "model"))
    assert shapes == {(32, 32): 2 * 2 + 1, (16, 32): 4, (64, 32): 4, (32, 64): 2}
    assert linear_shapes(tmp_path / "nothing") == {}
