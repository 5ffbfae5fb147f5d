"""The documentation: its links lead somewhere, its Python runs, its generated pages are up to date."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from trainer.tiny import small_trainers
from transformers import LlamaConfig, LlamaForCausalLM

import fastrl
from fastrl.kernels.registry import TABLE

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
MOST_LINES = 15
BLOCK = re.compile(r"```python(?: title=\"(\S+)\")?\n(.*?)```", re.DOTALL)


def blocks(page):
    """(file name or "", code) of each Python block."""
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def run(page, names, folder=None):
    """Runs a page's blocks one after the other on the same names; a block with a file's name becomes that file."""
    for number, (file, code) in enumerate(blocks(page), 1):
        if file:
            (folder / file).write_text(code)
        else:
            exec(compile(code, f"{page}, block {number}", "exec"), names)
    return names


@pytest.fixture
def trainers(monkeypatch, tmp_path):
    made = small_trainers(monkeypatch, tmp_path)
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])  # they would take half of the time
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    return made


@pytest.mark.parametrize("page", PAGES)
def test_a_page_links_to_files_that_exist(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (DOCS / page).read_text(encoding="utf-8")):
        assert link.startswith("https://") or (DOCS / page).parent.joinpath(link).is_file(), link


@pytest.mark.parametrize("page", PAGES)
def test_a_page_s_python_blocks_are_short(page):
    for _, code in blocks(page):
        assert len([line for line in code.splitlines() if line.strip()]) <= MOST_LINES, code


def test_the_site_has_every_page_once():
    def leaves(node):
        if isinstance(node, dict):
            node = list(node.values())
        return [node] if isinstance(node, str) else [leaf for item in node for leaf in leaves(item)]

    assert sorted(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == PAGES


def test_the_generated_pages_are_those_that_the_code_gives():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, make in module.PAGES.items():
        assert (DOCS / name).read_text(encoding="utf-8") == make(), "run: python docs/generate.py"


@pytest.mark.parametrize("page", ["ops.md", "losses.md"])
def test_the_examples_of_functions_run_and_equal_what_they_say(page):
    torch.manual_seed(0)
    names = run(page, {})
    assert names["out"].loss.isfinite()


def test_the_drop_in_examples_give_gradients_and_undo():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model, seen = LlamaForCausalLM(config), []
    classes = [type(module) for module in model.modules()]
    completion_mask = torch.arange(9).expand(16, 9) >= 4
    names = {
        "model": model,
        "ids": torch.randint(0, 40, (16, 9)),
        "completion_mask": completion_mask,
        "rewards": torch.rand(16),
        "old_logps": torch.randn(16, 8) - 3,
        "train": lambda model: seen.append([type(module) for module in model.modules()]),
    }
    run("drop_in.md", names)
    assert model.lm_head.weight.grad.abs().max() > 0
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    assert names["logps"].shape == (16, 8)
    assert [type(module) for module in model.modules()] == classes
    assert len(seen) == 1


@pytest.mark.parametrize(
    "page", ["quickstart.md", "extending/loss_term.md", "extending/estimator.md", "extending/source.md"]
)
def test_the_examples_with_a_trainer_train(page, trainers, tmp_path):
    names = run(page, {})
    (trainer,) = trainers
    assert trainer.run.learner.steps == 2
    if page == "quickstart.md":
        assert (tmp_path / "sums" / "model.safetensors").is_file()
    if page == "extending/source.md":
        assert names["source"].asked == 2


def test_the_documented_engine_samples_what_it_says_it_did(trainers):
    names = run("extending/engine.md", {})
    (trainer,) = trainers
    engine, model = trainer.run.source.sampling.engine, trainer.run.learner.policy.model
    assert isinstance(engine, names["Engine"])
    assert engine.version == 1
    prompts = [[3, 4, 5], [6]]
    samples = engine.sample(prompts, 2, trainer.run.source.sampling.params)
    for prompt, of_prompt in zip(prompts, samples, strict=True):
        for sample in of_prompt:
            ids = torch.tensor([prompt + sample.token_ids])
            expected = fastrl.logps(model, ids).logps[0, len(prompt) :].tolist()
            assert sample.sampling_logps == pytest.approx(expected, abs=1e-3)


def test_the_documented_op_has_the_gradient_and_refuses_as_shown(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        run("extending/op.md", {}, tmp_path)
        assert list(TABLE["segment_sum"]) == ["reference"]
    finally:
        TABLE.pop("segment_sum", None)
        sys.modules.pop("segment_sum_reference", None)


def test_every_preset_that_the_page_of_losses_names_exists():
    from fastrl.losses import presets

    (sentence,) = re.findall(r"`fastrl\.presets` has (.*?), each with", (DOCS / "losses.md").read_text(), re.DOTALL)
    assert set(re.findall(r"[A-Z][A-Z_0-9]+", sentence)) == set(presets.PRESETS)
