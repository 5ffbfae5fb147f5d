"""Curricula in a run: settings reach the sampler, every group reaches it, it resumes, and buckets are evaluated."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace

import pytest
import yaml
from trainer.tiny import tiny_config

from fastrl.data.curriculum import Curriculum, DifficultyPools, EasyToHard, Learnability, Rule, Waker, cvar
from fastrl.data.sampler import PromptSampler
from fastrl.monitor.alarms import Alarms
from fastrl.trainer.config import (
    AheadConfig,
    CurriculumConfig,
    EvalConfig,
    RewardConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
)
from fastrl.trainer.recipe import load_recipe
from fastrl.trainer.rows import sampler_of
from fastrl.trainer.setup import evaluate_model, prepare, train
from fastrl.types import Group, Prompt, Sample


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def config_for(tmp_path, name="run", curriculum=None, **changes):
    """Rows in three buckets, whose rewards differ: the wanted word is one the model never writes, rarely, or often."""
    path = tmp_path / "buckets.jsonl"
    rows = [{"prompt": f"w{i}", "wanted": f"w{i % 3}", "task": "abc"[i % 3], "level": i % 2} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "run_dir": str(tmp_path / name),
        "task": TaskConfig(source=str(path), held_out=6, chat=False),
        "curriculum": curriculum or CurriculumConfig("waker_m", by=("task",), interval=2),
        "rollout": RolloutConfig(prompts_per_step=4, group_size=4, max_new_tokens=6, threshold=0.1),
    }
    return tiny_config(tmp_path, **(fields | changes))


@pytest.mark.parametrize(
    ("curriculum", "rule"),
    [
        (CurriculumConfig("domain_randomisation", by=("task",)), Rule),
        (CurriculumConfig("waker_m", by=("task",)), Waker),
        (CurriculumConfig("waker_r", by=("task",)), Waker),
        (CurriculumConfig("learnability", by=("task",)), Learnability),
        (CurriculumConfig("difficulty_pools"), DifficultyPools),
        (CurriculumConfig("easy_to_hard", by=("level",)), EasyToHard),
        (CurriculumConfig(leave_out=0.9), Rule),
    ],
)
def test_every_kind_trains_and_its_settings_reach_the_sampler(tmp_path, curriculum, rule):
    config = config_for(tmp_path, curriculum=curriculum, steps=2)
    run = prepare(config)
    sampler = run.source.prompts
    assert type(sampler.rule) is rule
    assert sampler.leave_out == curriculum.leave_out
    assert sampler.threshold == 0.1
    if rule is Waker:
        reduction = curriculum.kind == "waker_r"
        assert (sampler.rule.reduction, sampler.rule.temperature) == (reduction, 0.5 if reduction else 1.0)
        group = Group(sampler.prompts[0], [Sample([1], [0.0], True, reward=reward) for reward in (0.1, 0.05)])
        assert sampler.rule.error(group) == 0.25  # passes from rollout.threshold on
    names = {"difficulty_pools": 24, "epochs": 1, "easy_to_hard": 2}
    assert len(sampler.buckets) == names.get(curriculum.kind, 3)
    assert run.train().status == "finished"
    step = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    told = {name for name in step if name.startswith("curriculum/")}
    left_out = {"curriculum/left_out", "curriculum/restarts"} if curriculum.leave_out else set()
    assert told == left_out | {f"curriculum/probability/{name}" for name in sampler.buckets if len(sampler.buckets) > 1}


def test_without_a_curriculum_prompts_come_in_plain_epochs(tmp_path):
    for curriculum in (CurriculumConfig(), CurriculumConfig(by=("task",))):
        assert type(sampler_of(config_for(tmp_path, curriculum=curriculum), [Prompt(0, "", (1,))])) is PromptSampler


def test_an_ensemble_of_rewards_is_an_error_and_one_reward_is_none(tmp_path):
    curriculum = CurriculumConfig("waker_m", by=("task",), error="disagreement")
    with pytest.raises(ValueError, match=r"curriculum\.error: expected pass_variance or advantage with one reward"):
        config_for(tmp_path, curriculum=curriculum)
    rewards = (RewardConfig("trainer.tiny:wanted_words"), RewardConfig("trainer.tiny:short"))
    run = prepare(config_for(tmp_path, curriculum=curriculum, rewards=rewards, steps=1))
    run.train()
    errors = run.source.prompts.rule.errors
    assert errors
    assert all(0 < error < 1 for error in errors.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "waker"}, r"expected one of .* got 'waker'. Did you mean 'waker_"),
        ({"kind": "easy_to_hard", "by": ["task", "level"]}, "curriculum.by: expected one column of numbers"),
        ({"temperature": 0}, "curriculum.temperature: expected more than 0"),
        ({"random_share": 1.5}, "curriculum.random_share: expected a share from 0 to 1"),
        ({"interval": 0}, "curriculum.interval: expected 1 or more"),
        ({"power": 0}, "curriculum.power: expected more than 0"),
        ({"leave_out": 0}, "curriculum.leave_out: expected a share above 0"),
        ({"leave_out": 90}, "curriculum.leave_out: expected a share above 0, or null"),
        ({"pool_thresholds": [0.5, 0.5]}, "curriculum.pool_thresholds: expected ascending numbers"),
        ({"pool_weights": [1.0]}, "curriculum.pool_weights: expected 3 numbers from 0"),
        ({"pool_weights": [0, 0, 0]}, "curriculum.pool_weights: expected 3 numbers from 0"),
    ],
)
def test_settings_that_make_no_curriculum_are_refused(tmp_path, changes, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"algorithm": "grpo", "curriculum": changes}))
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_a_curriculum_for_written_rows_is_refused():
    with pytest.raises(ValueError, match="curriculum: expected its defaults, as dpo reads written rows"):
        TrainConfig(algorithm="dpo", curriculum=CurriculumConfig("waker_m", by=("task",)))


@pytest.mark.parametrize("name", ["curriculum", "eval"])
def test_a_column_that_rows_lack_is_refused_by_the_name_of_its_setting(tmp_path, name):
    changes = (
        {"curriculum": CurriculumConfig(by=("tusk",))} if name == "curriculum" else {"eval": EvalConfig(by=("tusk",))}
    )
    with pytest.raises(
        ValueError, match=f"{name}.by: expected columns of every row; row 0 has 'wanted', .* got 'tusk'"
    ):
        prepare(config_for(tmp_path, **changes))


def test_refilled_groups_are_observed_too_and_before_the_next_round(tmp_path, monkeypatch):
    events, observe, draw = [], Curriculum.observe, Curriculum.next
    monkeypatch.setattr(Curriculum, "observe", lambda s, groups: events.append(len(groups)) or observe(s, groups))
    monkeypatch.setattr(Curriculum, "next", lambda s, n: events.append(f"draw {n}") or draw(s, n))
    rollout = RolloutConfig(prompts_per_step=3, group_size=2, max_new_tokens=3, dynamic_sampling=2)
    rewards = (RewardConfig("trainer.tiny:always_one"),)
    train(config_for(tmp_path, rollout=rollout, rewards=rewards, steps=1, task=replace_held_out(tmp_path)))
    assert events == ["draw 3", 3, "draw 3", 3, "draw 3", 3]


def replace_held_out(tmp_path):
    return replace(config_for(tmp_path).task, held_out=0)


@pytest.mark.parametrize("kind", ["waker_m", "waker_r"])
def test_a_run_with_a_curriculum_that_stops_goes_on_to_the_bit(tmp_path, kind):
    curriculum = CurriculumConfig(kind, by=("task",), interval=1, leave_out=0.9)
    whole = config_for(tmp_path, "whole", curriculum=curriculum, steps=6, save_every=3, task=replace_held_out(tmp_path))
    train(whole)
    stopped = replace(whole, run_dir=str(tmp_path / "stopped"))
    outcome = train(replace(stopped, steps=3))
    assert outcome.steps == 3
    assert train(replace(stopped, resume=stopped.run_dir)).steps == 6
    states = [
        json.loads((tmp_path / n / "checkpoints/step_000006/state.json").read_text()) for n in ("whole", "stopped")
    ]
    assert states[0]["source"] == states[1]["source"]
    assert states[0]["source"]["rule"]["changes"]
    texts = [(tmp_path / name / "completions.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert texts[0] == texts[1]
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_a_second_process_that_samples_in_turn_draws_and_observes_as_the_run_itself_would(tmp_path):
    curriculum = CurriculumConfig("waker_m", by=("task",), interval=2, leave_out=0.9)
    plain = config_for(tmp_path, "plain", curriculum=curriculum, steps=4, threads=1, linear="torch")
    ahead = replace(plain, run_dir=str(tmp_path / "ahead"), source="ahead", ahead=AheadConfig(0, threads=1))
    runs = [prepare(config) for config in (plain, ahead)]
    assert [run.train().status for run in runs] == ["finished", "finished"]
    states = [run.source.state_dict() for run in runs]
    assert states[0] == states[1]
    assert states[0]["rule"]["observed"] == 16
    told = [
        [line[name] for name in line if name.startswith("curriculum/")]
        for line in lines(tmp_path / "ahead/metrics.jsonl")
    ]
    assert told == [
        [line[name] for name in line if name.startswith("curriculum/")]
        for line in lines(tmp_path / "plain/metrics.jsonl")
    ]


def test_a_run_that_has_used_up_its_prompts_says_so_once_and_goes_on(tmp_path):
    curriculum = CurriculumConfig(leave_out=0.9)
    rollout = RolloutConfig(prompts_per_step=8, group_size=2, max_new_tokens=2)
    rewards = (RewardConfig("trainer.tiny:always_one"),)
    config = config_for(tmp_path, curriculum=curriculum, rollout=rollout, rewards=rewards, steps=7)
    assert train(config).status == "finished"
    said = [line["message"] for line in lines(tmp_path / "run" / "warnings.jsonl")]
    (text,) = (text for text in said if "curriculum.leave_out" in text)
    assert text.startswith(
        "Step 3: every training prompt has reached the pass rate of curriculum.leave_out, so none is"
    )
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert [step["curriculum/left_out"] for step in steps] == [8.0, 16.0, 0.0, 8.0, 16.0, 0.0, 8.0]
    assert [step["curriculum/restarts"] for step in steps] == [0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0]


def test_no_restart_is_no_alarm():
    assert not list(Alarms().check(1, {"curriculum/restarts": 0.0, "curriculum/left_out": 20.0}))


# Evaluation by bucket


def test_evaluation_reports_every_bucket_their_mean_and_the_worst_tenth(tmp_path, capsys):
    config = config_for(tmp_path, steps=1)
    train(config)
    samples = lines(tmp_path / "run" / "evaluation_completions.jsonl")
    for result in lines(tmp_path / "run" / "evaluations.jsonl"):
        own = [s for s in samples if (s["step"], s["name"]) == (result["step"], result["name"])]
        by_task = {task: [s["reward"] for s in own if "abc"[s["prompt_index"] % 3] == task] for task in "abc"}
        rewards = [result[f"reward/{task}"] for task in "abc"]
        assert rewards == pytest.approx([sum(values) / len(values) for values in by_task.values()])
        assert result["reward/mean_of_buckets"] == pytest.approx(sum(rewards) / 3)
        assert result["reward/cvar_0.1"] == pytest.approx(cvar(rewards, 0.1)) == pytest.approx(min(rewards))
    printed = evaluate_model(config)
    assert {"greedy", "sampled", "reward/cvar_0.1", "reward/a"} <= printed.keys()
    assert "reward/cvar_0.1" in capsys.readouterr().out


def test_eval_by_names_other_buckets_than_the_curriculums(tmp_path):
    config = config_for(tmp_path, steps=1, eval=EvalConfig(by=("task", "level")))
    train(config)
    result = lines(tmp_path / "run" / "evaluations.jsonl")[0]
    assert {f"reward/{task}/{level}" for task in "abc" for level in (0, 1)} <= result.keys()
    assert "reward/a" not in result


def test_buckets_hold_out_equally_many_prompts_and_no_small_one_more_than_half(tmp_path):
    path = tmp_path / "uneven.jsonl"
    sizes = {"a": 40, "b": 20, "c": 4}
    rows = [{"prompt": f"{name} {i}", "task": name} for name, size in sizes.items() for i in range(size)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskConfig(source=str(path), held_out=18, chat=False)
    run = prepare(config_for(tmp_path, task=task, rewards=(RewardConfig("trainer.tiny:short"),)))
    held_out = Counter(prompt.columns["task"] for prompt in run.evaluations[0].prompts)
    assert held_out == {"a": 8, "b": 8, "c": 2}
    kept = Counter(prompt.columns["task"] for prompt in run.source.prompts.prompts)
    assert kept == {"a": 32, "b": 12, "c": 2}


def test_buckets_of_which_nothing_is_held_out_are_named_at_the_start(tmp_path):
    config = config_for(tmp_path)
    assert prepare(config).said == ()
    (said,) = prepare(replace(config, task=replace(config.task, held_out=2))).said
    assert said == "No prompt of c is held out: evaluation says nothing of them. Raise task.held_out."
    assert prepare(replace(config, task=replace(config.task, held_out=0))).said == ()


def test_the_sampler_takes_less_than_a_hundredth_of_the_shortest_step(tmp_path):
    """Of a step on the tiny model, some tens of milliseconds: any other is longer."""
    config = config_for(tmp_path, curriculum=CurriculumConfig("waker_m", by=("task",), leave_out=0.9), steps=2)
    train(config)
    step = min(line["step_time"] for line in lines(tmp_path / "run" / "metrics.jsonl"))
    curriculum = prepare(replace(config, run_dir=str(tmp_path / "other"))).source.prompts
    groups = [Group(p, [Sample([1], [0.0], True, reward=i % 2) for i in range(4)]) for p in curriculum.next(4)]
    took = []
    for _ in range(50):
        began = time.perf_counter()
        curriculum.next(4)
        curriculum.observe(groups)
        took.append(time.perf_counter() - began)
    assert sorted(took)[25] < 0.01 * step
