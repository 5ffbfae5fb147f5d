from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_drop_in_example_runs_and_gives_a_gradient():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 40, (16, 9))
    completion_mask = torch.arange(9).expand(16, 9) >= 4
    names = {
        "model": model,
        "ids": ids,
        "completion_mask": completion_mask,
        "rewards": torch.rand(16),
        "old_logps": torch.randn(16, 8) - 3,
    }
    exec(example, names)
    assert model.lm_head.weight.grad.abs().max() > 0
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    assert names["out"].metrics["ratio/mean"][1] == completion_mask[:, 1:].sum()


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
