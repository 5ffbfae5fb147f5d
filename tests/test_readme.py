from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import page
from fastrl.algorithms import ALGORITHMS
from fastrl.losses.presets import PREFERENCE_PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_fits_on_a_screen():
    assert len(README.splitlines()) <= 90


def test_the_drop_in_example_runs_and_gives_a_gradient():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
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
    exec(code, names)
    assert model.lm_head.weight.grad.abs().max() > 0
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    assert names["out"].metrics["ratio/mean"][1] == completion_mask[:, 1:].sum()


def test_the_numbers_of_a_step_are_those_of_the_newest_committed_results():
    lines, _ = page.read(page.RESULTS)
    (steps,) = [of for (_, isa), _, of in page.for_picture(lines) if isa == "avx512_bf16"]
    seconds = {name: f"{line.seconds:.1f} s" for name, line in steps.items()}
    memory = {name: f"{line.peak / 2**20:.0f} MiB" for name, line in steps.items()}
    text = " ".join(README.split())
    assert f"TRL 1.16 takes {seconds['trl']} and {memory['trl']}" in text
    assert f"with one line of fastrl {seconds['trl+fastrl']}, with `loss=True` {seconds['trl+fastrl-loss']}" in text
    assert f"own trainer {seconds['fastrl']} and {memory['fastrl']}" in text
    assert steps["trl"].about["trl"].startswith("1.16")


def test_the_counts_of_algorithms_are_those_of_the_table():
    rewarded = [name for name, entry in ALGORITHMS.items() if entry.kind == "rewarded" and name != "ppo"]
    assert f"| GRPO and its relatives | {len(rewarded)} algorithms |" in README
    assert f"| DPO and its relatives | {len(PREFERENCE_PRESETS)} losses |" in README


def test_every_file_and_heading_that_the_readme_links_exists():
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", README)
    assert len(links) > 15
    for path, heading in links:
        text = (ROOT / path).read_text()
        headings = [re.sub(r"[^\w -]", "", line).strip().lower() for line in text.splitlines() if line.startswith("#")]
        assert not heading or heading in [name.replace(" ", "-") for name in headings], heading
