from __future__ import annotations

import re
from pathlib import Path

import torch
from trainer.tiny import small_trainers
from transformers import LlamaConfig, LlamaForCausalLM

import fastrl

README = (Path(__file__).parents[1] / "README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
(TRAINER,) = (block for block in BLOCKS if "Trainer(" in block)
LOSS, ACCELERATION = (block for block in BLOCKS if block != TRAINER)


def tiny_model():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_the_drop_in_example_runs_and_gives_a_gradient():
    model = tiny_model()
    ids = torch.randint(0, 40, (16, 9))
    completion_mask = torch.arange(9).expand(16, 9) >= 4
    names = {
        "model": model,
        "ids": ids,
        "completion_mask": completion_mask,
        "rewards": torch.rand(16),
        "old_logps": torch.randn(16, 8) - 3,
    }
    exec(LOSS, names)
    assert model.lm_head.weight.grad.abs().max() > 0
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    assert names["out"].metrics["ratio/mean"][1] == completion_mask[:, 1:].sum()


def test_the_acceleration_example_gives_the_same_gradient_and_is_undone():
    model, ids = tiny_model(), torch.arange(12)[None]
    classes, gradients = [type(module) for module in model.modules()], []

    def train(model):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])

    train(model)
    exec(ACCELERATION, {"fastrl": fastrl, "model": model, "train": train})
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(*gradients)


def test_the_trainer_example_trains_and_saves(tmp_path, monkeypatch):
    made = small_trainers(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(TRAINER, {})
    assert made[0].run.learner.steps == 2
    assert (tmp_path / "sums" / "model.safetensors").is_file()


def test_every_preset_that_the_readme_names_exists():
    from fastrl.losses import presets

    (sentence,) = re.findall(r"`fastrl\.presets` has (.*?), each with", README, flags=re.DOTALL)
    named = set(re.findall(r"[A-Z][A-Z_0-9]+", sentence))
    assert named == set(presets.PRESETS)


def test_every_file_that_the_readme_links_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (Path(__file__).parents[1] / link).exists(), link
