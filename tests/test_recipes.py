"""The table of algorithms, and what shows it."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.registry import ROWS
from fastrl.cli import main
from fastrl.data.sources import read_rows
from fastrl.losses.presets import PREFERENCE_PRESETS, PRESETS
from fastrl.menu import about_recipes, page
from fastrl.spec import Cispo, Clip
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import TrainConfig
from fastrl.trainer.recipe import load_recipe
from fastrl.trainer.stages import is_staged, load_stages

ROOT = Path(__file__).resolve().parents[1]


def test_every_preset_is_an_algorithm():
    specs = [entry.spec for entry in ALGORITHMS.values()]
    assert [name for name, preset in (PRESETS | PREFERENCE_PRESETS).items() if preset not in specs] == []


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_table_says_what_the_algorithm_that_is_built_reads(name):
    entry, built = ALGORITHMS[name], build_algorithm(TrainConfig(algorithm=name))
    assert built.kind == entry.kind in ROWS
    assert built.needs_ref == ("reference" in entry.needs)
    assert built.needs_critic == ("critic" in entry.needs)
    assert built.needs_greedy == ("greedy completions" in entry.needs)
    assert getattr(built, "ratio_to_sampler", False) == ("sampling log-probabilities" in entry.needs)


def test_every_algorithm_has_a_paper_and_a_line_of_its_own():
    for entry in ALGORITHMS.values():
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|https://\S+", entry.paper)
    lines = [entry.line for entry in ALGORITHMS.values()]
    assert len(set(lines)) == len(lines)
    assert max(map(len, lines)) <= 60


def test_the_page_of_algorithms_is_the_table():
    assert (ROOT / "docs" / "algorithms.md").read_text() == page()
    for name in ALGORITHMS:
        assert f"| `{name}` |" in page()


def test_the_command_shows_every_recipe_and_every_algorithm(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(ROOT)
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    for path, algorithm, about in about_recipes(Path("recipes")):
        stages = load_stages(path).each.values() if is_staged(path) else [load_recipe(path)]
        assert ", ".join(config.algorithm for config in stages) == algorithm
        assert len(about) > 10
        assert f"\n{path.stem} " in shown
    for name, entry in ALGORITHMS.items():
        assert name in shown
        assert entry.paper in shown
    assert main(["recipes", "--markdown"]) == 0
    assert capsys.readouterr().out == page()


@pytest.mark.parametrize(
    ("name", "surrogate", "aggregate", "scale", "ahead", "updates", "filtered"),
    [
        ("scale_rl", Cispo(5.0), "prompt_mean", "batch", True, 1, True),
        ("scale_rl_deepseek_grpo", Clip(0.2, 0.2), "seq_mean_token_mean", "group", False, 8, False),
        ("scale_rl_qwen_dapo", Clip(0.2, 0.26), "prompt_mean", "group", False, 8, True),
        ("scale_rl_magistral", Clip(0.2, 0.26), "prompt_mean", "batch", True, 1, True),
        ("scale_rl_minimax_m1", Cispo(5.0), "prompt_mean", "group", False, 8, True),
    ],
)
def test_scale_rl_and_what_it_compares_with_have_the_settings_of_its_page(
    name, surrogate, aggregate, scale, ahead, updates, filtered
):
    config = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    algorithm = build_algorithm(config)
    assert algorithm.spec.surrogate == surrogate
    assert algorithm.spec.aggregate == aggregate
    assert algorithm.spec.kl is None
    assert (algorithm.estimator.baseline, algorithm.estimator.scale) == ("mean", scale)
    assert (config.source == "ahead") is ahead
    assert config.optimizer.steps_per_rollout == updates
    assert config.policy_gradient.filter_zero_variance is filtered


SWITCHES = re.findall(r"\| `(--[^`]+)` \|", (ROOT / "docs" / "recipes" / "scale_rl.md").read_text())


@pytest.mark.parametrize("flags", SWITCHES)
def test_a_switch_of_scale_rls_page_changes_the_recipe(flags, capsys):
    assert len(SWITCHES) >= 8
    recipe = str(ROOT / "recipes" / "scale_rl.yaml")
    assert main(["train", recipe, "--print"]) == 0
    whole = capsys.readouterr().out
    assert main(["train", recipe, *shlex.split(flags), "--print"]) == 0
    assert capsys.readouterr().out != whole


def test_grpo_lora_is_grpo_but_for_its_adapter_and_learning_rate():
    full, lora = load_recipe("grpo"), load_recipe("grpo_lora")
    assert lora.adapter != full.adapter
    optimizer = replace(lora.optimizer, lr=full.optimizer.lr)
    assert replace(lora, adapter=full.adapter, optimizer=optimizer, run_dir=full.run_dir) == full


def test_a_recipe_is_found_by_its_name_and_with_its_data_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"\n{path.stem} " in shown
    assert load_recipe("grpo") == load_recipe("recipes/grpo.yaml") == load_recipe(ROOT / "recipes" / "grpo.yaml")
    stages = load_stages("rlhf")  # which checks that its data and rewards exist
    assert (stages.each, stages.run_dir) == (load_stages("recipes/rlhf.yaml").each, "runs/rlhf")
    assert main(["train", "language_adaptation", "--print"]) == 0
    assert "source: recipes/data/german_sft.jsonl" in capsys.readouterr().out
    assert len(read_rows("recipes/data/german_test.jsonl", size=0, seed=0, options={})) > 31


def test_a_file_here_comes_before_one_that_comes_with_fastrl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "data").mkdir(parents=True)
    (tmp_path / "recipes" / "grpo.yaml").write_text("algorithm: rloo\n")
    (tmp_path / "recipes" / "data" / "german_test.jsonl").write_text('{"prompt": "mine"}\n')
    (tmp_path / "grpo").write_text("algorithm: dapo\n")
    assert load_recipe("recipes/grpo.yaml").algorithm == "rloo"
    assert load_recipe("grpo").algorithm == "dapo"
    (row,) = read_rows("recipes/data/german_test.jsonl", size=0, seed=0, options={})
    assert row.values["prompt"] == "mine"
