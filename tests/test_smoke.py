"""Every recipe of the repository runs from its first line to its last, on a model of one small layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from trainer.tiny import write_answers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastrl.cli import main
from fastrl.model.packaged import PACKAGED, converted

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MODELS = ("smollm2-135m-instruct", "runs/seal_pre/model")
SMALL = {
    "steps": 1, "rows_per_step": 2, "held_out": 4, "prompts_per_step": 2, "group_size": 2, "size": 100, "every": 0,
    "steps_per_rollout": 1, "prompts": 4, "threads": 1, "save_every": 0, "max_tokens": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with the vocabulary and the chat template that the recipes are written for."""
    folder, packaged = tmp_path_factory.mktemp("model"), converted(PACKAGED[MODELS[0]])
    tokenizer = AutoTokenizer.from_pretrained(packaged)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_answers(folder / "pairs.jsonl")
    return folder


def smaller(values, folder):
    """A recipe at smoke size, and with the small model in place of the packaged one."""
    if isinstance(values, dict):
        return {
            name: min(value, SMALL[name]) if name in SMALL and isinstance(value, int) else smaller(value, folder)
            for name, value in values.items()
        }
    if isinstance(values, list):
        return [smaller(value, folder) for value in values]
    return {"seal_train.jsonl": str(folder / "pairs.jsonl")}.get(values, str(folder) if values in MODELS else values)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_at_smoke_size(path, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])  # they would take half of the time
    recipe = smaller(yaml.safe_load(path.read_text()), folder) | {"run_dir": str(tmp_path / "run")}
    if "thresholds" in recipe.get("rounds", ()):
        recipe["rounds"]["thresholds"] = [-1.0]  # nothing that this model writes is right
    for one in (recipe, *recipe.get("stages", {}).values()):
        for reward in one.get("rewards", ()):
            if reward["name"] == "code":
                reward["options"]["verify"] = False  # of all 600 tasks, which is a test of its own
            if reward["name"] == "judge":
                reward["options"]["how"] = "direct"  # this model ends no grading with a score
    written = tmp_path / path.name
    written.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert main(["train", str(written)]) == 0
    folders = [f"{at}-{name}" for at, name in enumerate(recipe.get("stages", ()), 1)] or ["."]
    for run in (tmp_path / "run" / name for name in folders):
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1] >= 1
        assert (run / "model").is_dir()
