"""The trainer as a Python user calls it."""

from __future__ import annotations

import json
import random
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from trainer.tiny import short, small_trainers, tiny_config, wanted_words, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastrl
from fastrl import Trainer
from fastrl.losses import presets
from fastrl.model.load import load_model
from fastrl.trainer.setup import train

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LOOPS = ("hf_sft", "own_grpo_loop")  # of which the trainer is somebody else's
OTHERS = (*LOOPS, "trl_grpo")  # tested with TRL
OWN = sorted(path for path in EXAMPLES.glob("*.py") if path.stem not in OTHERS)
ROWS = [{"prompt": " ".join([f"w{i}"] * (1 + i % 3)), "wanted": "w7"} for i in range(24)]
SMALL = {
    "dtype": "float32",
    "device": "cpu",
    "steps": 3,
    "max_tokens_per_microbatch": 64,
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 6},
    "optimizer": {"lr": 1e-2},
    "eval": {"samples": 2},
}


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def settings(tmp_path, **changes):
    return {**SMALL, "run_dir": tmp_path / "run", "task": {"held_out": 4, "chat": False}, **changes}


def completions(run_dir):
    return [(line["prompt"], line["completion"], line["reward"]) for line in lines(run_dir / "completions.jsonl")]


def test_a_trainer_does_what_the_recipe_of_the_same_settings_does(tmp_path):
    recipe = train(tiny_config(tmp_path, run_dir=str(tmp_path / "recipe")))
    trainer = Trainer(str(tmp_path / "model"), ROWS, rewards=wanted_words, **settings(tmp_path))
    outcome = trainer.train()
    assert (outcome.before, outcome.after) == (recipe.before, recipe.after)
    assert completions(tmp_path / "run") == completions(tmp_path / "recipe")
    assert trainer.evaluate() == pytest.approx(outcome.after)
    saved = AutoModelForCausalLM.from_pretrained(trainer.save(tmp_path / "saved")).state_dict()
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["task"]["source"] == "24 rows, given"
    assert config["rewards"][0]["name"] == "wanted_words"


def test_a_loaded_model_is_trained_in_place(tmp_path):
    folder = write_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Trainer((model, tokenizer), ROWS, rewards=wanted_words, **settings(tmp_path)).train()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_rewards_sync_and_async_have_their_weights(tmp_path):
    async def later(completions, **_):
        return short(completions)

    rewards = [(wanted_words, 1.0), (later, 0.5)]
    Trainer(str(write_model(tmp_path / "model")), ROWS, rewards=rewards, **settings(tmp_path)).train()
    for line in lines(tmp_path / "run" / "completions.jsonl"):
        assert line["reward"] == pytest.approx(line["rewards"]["wanted_words"] + 0.5 * line["rewards"]["later"])


def test_an_estimator_of_ones_own_gives_the_advantages(tmp_path):
    def signs(rewards, *, group_ids):
        assert group_ids.tolist() == [i // 4 for i in range(16)]
        return (rewards - rewards.mean()).sign()

    Trainer(str(write_model(tmp_path / "model")), ROWS, rewards=short, estimator=signs, **settings(tmp_path)).train()
    assert {line["advantage"] for line in lines(tmp_path / "run" / "completions.jsonl")} <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("algorithm", ["dr_grpo", "ppo"])
def test_a_loss_term_of_ones_own_is_added_with_the_weight_of_its_token(tmp_path, algorithm):
    """With rewards that are all equal it is all that there is: what is probable gets more so."""

    def nothing(completions, **_):
        return [0.0] * len(completions)

    def sharpen(logps, batch):
        assert logps.shape == batch.targets.shape
        return -logps.exp()

    more = {"ppo": {"kl_coef": 0.0}} if algorithm == "ppo" else {}
    options = settings(tmp_path, steps=8, algorithm=algorithm, **more)
    Trainer(str(write_model(tmp_path / "model")), ROWS, rewards=nothing, terms=[sharpen], **options).train()
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["loss/sharpen"] < 1.3 * metrics[0]["loss/sharpen"] < 0
    if algorithm == "dr_grpo":  # token_sum: over sequences and the longest length
        tokens = metrics[0]["completions/mean_length"] * 16
        assert metrics[0]["loss"] == pytest.approx(metrics[0]["loss/sharpen"] * tokens / (16 * 6), rel=1e-4)


def test_a_term_of_the_wrong_shape_is_refused_by_name(tmp_path):
    def total(logps, batch):
        return logps.sum()

    trainer = Trainer(str(write_model(tmp_path / "model")), ROWS, rewards=short, terms=[total], **settings(tmp_path))
    with pytest.raises(ValueError, match="total: the result: expected one number per token"):
        trainer.train()


def test_callbacks_see_every_step_and_evaluation_and_end_the_run_when_they_raise(tmp_path):
    seen = []

    def watch(step, numbers):
        seen.append((step, "eval/greedy/reward" in numbers, "loss" in numbers))
        if step == 2 and "loss" in numbers:
            raise RuntimeError("good enough")

    model = str(write_model(tmp_path / "model"))
    outcome = Trainer(model, ROWS, rewards=wanted_words, callbacks=[watch], **settings(tmp_path)).train()
    assert seen == [(0, True, False), (0, False, False), (1, False, True), (2, False, True)]
    assert outcome.status == "failed"
    assert "good enough" in (tmp_path / "run" / "warnings.jsonl").read_text()


@pytest.mark.parametrize("spec", [presets.DAPO, presets.DPO, presets.KTO], ids=lambda spec: type(spec).__name__)
def test_an_algorithm_may_be_a_spec(tmp_path, spec):
    pairs = [{"prompt": f"w{i}", "chosen": "w7 w7", "rejected": f"w{(i + 9) % 30}"} for i in range(24)]
    labelled = [{"prompt": f"w{i}", "completion": "w7", "label": i % 2 == 0} for i in range(24)]
    rows = {"PolicyLoss": ROWS, "PreferenceLoss": pairs, "UnpairedPreferenceLoss": labelled}[type(spec).__name__]
    more = {} if spec is presets.DAPO else {"data": {"chat": False}, "rows_per_step": 4}
    base = {"dtype": "float32", "device": "cpu", "steps": 2, "max_tokens_per_microbatch": 64}
    options = settings(tmp_path) if spec is presets.DAPO else {**base, "run_dir": tmp_path / "run", **more}
    model = str(write_model(tmp_path / "model"))
    trainer = Trainer(model, rows, rewards=wanted_words if spec is presets.DAPO else None, algorithm=spec, **options)
    assert trainer.run.algorithm.spec == spec
    assert trainer.train().status == "finished"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 3}, r"Trainer: stepz: unknown key. Did you mean 'steps'\?"),
        ({"algorithm": "grop"}, "algorithm: expected one of .* Did you mean 'grpo'"),
        ({"rollout": {"samples": 4}}, "it is called 'group_size' now"),
        ({"algorithm": "dpo", "terms": [lambda *_: None], "data_": None}, "unknown key"),
    ],
)
def test_settings_that_do_not_exist_are_refused_as_in_a_recipe(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        Trainer("nowhere", ROWS, rewards=short, **given)


@pytest.mark.parametrize("name", LOOPS)
def test_examples_with_another_loop_train(tmp_path, monkeypatch, name):
    folder = write_model(tmp_path / "model")
    monkeypatch.setattr("fastrl.model.load.load_model", lambda name, dtype: load_model(folder, dtype))
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    model = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")["model"]
    before, _ = load_model(folder)
    moved = [not torch.equal(*pair) for pair in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(moved)
    assert all(one.isfinite().all() for one in model.parameters())
    assert "forward" not in vars(model)


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_examples_run(tmp_path, monkeypatch, path):
    made = small_trainers(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    (trainer,) = made
    assert trainer.run.learner.steps == 2
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_under_40_lines(path):
    assert len(path.read_text().splitlines()) < 40


def test_the_first_example_is_as_short_as_promised():
    code = [line for line in (EXAMPLES / "grpo_from_python.py").read_text().splitlines() if line.strip()]
    assert len(code) - 1 <= 12  # but for its docstring
    assert fastrl.Trainer is Trainer


def test_a_reward_may_refuse_the_prompts_before_anything_is_written(tmp_path):
    class Picky:
        __name__ = "picky"

        def check_prompts(self, prompts):
            assert len(prompts) == len(ROWS)  # those held out too
            raise ValueError(f"prompt {prompts[0].index} cannot be judged")

        def __call__(self, completions, **_):
            return [0.0] * len(completions)

    write_model(tmp_path / "model")
    with pytest.raises(ValueError, match="cannot be judged"):
        Trainer(str(tmp_path / "model"), ROWS, rewards=Picky(), **settings(tmp_path))
    assert not (tmp_path / "run").exists()
