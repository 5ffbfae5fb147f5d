from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.algorithms import ALGORITHMS
from fastrl.losses.presets import PREFERENCE_PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench" / "results" / "amd-epyc-2c" / "2026-11-30.jsonl"
PROVIDERS = ("fastrl", "trl", "trl+fastrl", "trl+fastrl-loss")  # the columns of its first table


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


def table(text):
    """Rows of the first table of whole steps: first cell -> (number, ratio in brackets or None) of each other cell."""
    rows = re.findall(r"^\| ((?:GRPO|DPO), (?:seconds|peak)[^|]*) \|(.*)\|$", text, flags=re.MULTILINE)
    pattern = re.compile(r"([\d.]+)(?: \(([\d.]+)x\))?")
    return {name: [pattern.fullmatch(cell.strip()) for cell in cells.split("|")] for name, cells in rows}


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_the_numbers_of_whole_steps_are_medians_of_the_committed_results(page):
    text, measured = (ROOT / page).read_text(), {}
    for line in map(json.loads, RESULTS.read_text().splitlines()):
        name, key = {"step": "GRPO", "dpo": "DPO"}[line["op"]], PROVIDERS.index(line["provider"])
        measured[f"{name}, seconds per step", key] = median(step["seconds"] for step in line["steps"])
        measured[f"{name}, peak memory, MiB", key] = median(line["peak_bytes"]) / 2**20
        assert line["environment"]["commit"] in text
        assert all(line["environment"][package].split("+")[0] in text for package in ("torch", "trl", "transformers"))
    shown = table(text)
    assert len(shown) == 4
    for (row, column), value in measured.items():
        cell = shown[row][column]
        assert float(cell[1]) == pytest.approx(value, abs=0.05 if "seconds" in row else 0.5)
        if cell[2]:
            assert float(cell[2]) == pytest.approx(value / measured[row, 0], abs=0.05)
    assert sum(cell is not None for cells in shown.values() for cell in cells) == len(measured)


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
