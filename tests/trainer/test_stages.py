"""Recipes of stages: what is checked before the first, what runs again after a stop, and PPO-ptx."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from trainer.tiny import tiny_config, write_answers, write_model, write_task

from fastrl.algorithms.offline import Answers
from fastrl.algorithms.policy_gradient import Part
from fastrl.algorithms.ppo import Pretraining
from fastrl.cli import EXIT_DIVERGED, EXIT_OK, EXIT_USAGE, main
from fastrl.monitor.units import number
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import DataConfig, OptimizerConfig, PPOConfig, TrainConfig
from fastrl.trainer.learner import Learner, NonFiniteLoss
from fastrl.trainer.loop import Run
from fastrl.trainer.setup import prepare, train
from fastrl.trainer.stages import load_stages

ROOT = Path(__file__).resolve().parents[2]
CRASH = """
import os, sys
sys.path[:0] = [{tests!r}]
from fastrl.cli import main
from fastrl.trainer.loop import Run
step, done = Run._step, []
def counted(run):
    if run.config.algorithm == {algorithm!r} and run.learner.steps == {steps}:
        os.kill(os.getpid(), 9)
    return step(run)
Run._step = counted
main({arguments!r})
"""


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the recipe and its finished run; tests copy the run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastrl.monitor.report.charts", lambda run: [])
        assert main(["train", str(write_recipe(folder))]) == EXIT_OK
    return folder


@pytest.fixture
def recipe(finished, tmp_path):
    """The recipe on the same rows and model, with another folder to run in."""
    values = yaml.safe_load((finished / "rlhf.yaml").read_text())
    return write(tmp_path / "rlhf.yaml", {**values, "run_dir": str(tmp_path / "run")})


@pytest.fixture
def run(finished, tmp_path):
    """The finished run, where the recipe would run."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def write_recipe(tmp_path):
    """RLHF on the tiny model."""
    write_model(tmp_path / "model")
    write_task(tmp_path / "task.jsonl")
    for kind in ("completions", "ranked"):
        write_answers(tmp_path / f"{kind}.jsonl", kind)
    rows = {"held_out": 4, "chat": False}
    stages = {
        "sft": {"algorithm": "sft", "data": {"source": str(tmp_path / "completions.jsonl"), **rows}},
        "reward": {
            "model": "${sft}",
            "algorithm": "reward_model",
            "data": {"source": str(tmp_path / "ranked.jsonl"), "ranked": True, **rows},
        },
        "ppo": {
            "model": "${sft}",
            "algorithm": "ppo",
            "rows_per_step": 3,
            "data": {"source": str(tmp_path / "completions.jsonl"), **rows},
            "task": {"source": str(tmp_path / "task.jsonl"), **rows},
            "rewards": [{"name": "model", "options": {"path": "${reward}", "dtype": "float32"}}],
            "rollout": {"prompts_per_step": 2, "group_size": 3, "max_new_tokens": 4},
            "ppo": {"critic_model": "${reward}", "ptx_coef": 0.5},
            "optimizer": {"steps_per_rollout": 2},
        },
    }
    whole = {"run_dir": str(tmp_path / "run"), "model": str(tmp_path / "model"), "dtype": "float32", "linear": "torch"}
    whole |= {"device": "cpu", "steps": 3, "save_every": 1, "max_tokens_per_microbatch": 64}
    return write(tmp_path / "rlhf.yaml", {**whole, "optimizer": {"lr": 1e-2}, "stages": stages})


def write(path, values):
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def changed(recipe, **stages):
    """The recipe with changes to stages, by name; None removes one."""
    values = yaml.safe_load(recipe.read_text())
    for name, change in stages.items():
        values["stages"][name] = {**values["stages"].get(name, {}), **change}
    return write(recipe.with_name("other.yaml"), values)


def weights(run):
    return {path.relative_to(run): path.read_bytes() for path in sorted(run.glob("*-*/model/*.safetensors"))}


def killed(recipe, algorithm, steps, *flags):
    """Trains in another process, which kills itself with SIGKILL when a stage has done `steps` steps."""
    arguments = ["train", str(recipe), *flags]
    tests = str(ROOT / "tests")
    code = CRASH.format(tests=tests, algorithm=algorithm, steps=steps, arguments=arguments)
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert found.returncode == -9


def test_each_stage_starts_from_the_weights_of_the_one_it_names_and_nothing_finished_runs_again(
    finished, recipe, run, capsys
):
    record, was = json.loads((run / "stages.json").read_text()), finished / "run"
    names = ["sft", "reward", "ppo"]
    assert [(name, one["status"], one["steps"]) for name, one in record.items()] == [(n, "finished", 3) for n in names]
    of = {name: yaml.safe_load((run / f"{n}-{name}" / "config.yaml").read_text()) for n, name in enumerate(record, 1)}
    assert of["reward"]["model"] == of["ppo"]["model"] == str(was / "1-sft" / "model")
    assert of["ppo"]["ppo"]["critic_model"] == of["ppo"]["rewards"][0]["options"]["path"] == str(was / "2-reward/model")
    metrics = [json.loads(line) for line in (run / "3-ppo" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # the reference is where the policy begins
    assert all(line["loss/ptx"] > 0 for line in metrics)
    evaluations = [json.loads(line) for line in (run / "3-ppo" / "evaluations.jsonl").read_text().splitlines()]
    assert {one["name"] for one in evaluations} == {"greedy", "sampled", "ptx"}

    before = weights(run)
    assert main(["train", str(run / "stages.yaml"), "--resume", str(run), "--run_dir", str(run)]) == EXIT_OK
    out = capsys.readouterr().out
    assert out.count("finished before, in") == 3
    first, last = record["sft"]["before"]["loss"], record["sft"]["after"]["loss"]
    assert last < first
    assert f"sft: loss {number(first)} -> {number(last)}" in out.split("All stages finished")[1]
    assert weights(run) == before


def test_after_kill_9_in_a_stage_the_stages_resume_bit_for_bit(finished, recipe, run, tmp_path, capsys):
    shutil.rmtree(run / "3-ppo")
    killed(recipe, "ppo", 2, "--resume", "latest")
    assert main(["train", str(recipe), "--resume", "latest"]) == EXIT_OK
    out = capsys.readouterr().out
    assert out.count("finished before, in") == 2
    assert "resumed after step 2" in " ".join(out.split())
    assert weights(run) == weights(finished / "run")


def test_a_stage_that_was_stopped_before_its_first_checkpoint_begins_again(finished, recipe, run, capsys):
    stopped = run / "3-ppo"
    shutil.rmtree(stopped / "checkpoints")
    shutil.rmtree(stopped / "model")
    (stopped / "status.json").unlink()
    assert main(["train", str(recipe), "--resume", "latest"]) == EXIT_OK
    assert "was stopped before its first checkpoint and begins again" in capsys.readouterr().out
    assert (run / "3-ppo-stopped" / "metrics.jsonl").is_file()
    assert {k: v for k, v in weights(run).items() if "stopped" not in str(k)} == weights(finished / "run")


def test_a_finished_stage_that_was_changed_is_refused_and_can_be_run_again_with_all_that_follow(recipe, run, capsys):
    before = weights(run)
    for flags, named in [
        (["--stages.reward.optimizer.lr", "0.02"], "stages.reward.optimizer.lr: expected 0.01 as in"),
        (["--stages.reward.steps", "4"], "stages.reward.steps: expected 3"),  # PPO has used its result
    ]:
        assert main(["train", str(recipe), "--resume", str(run), *flags]) == EXIT_USAGE
        error = capsys.readouterr().err
        assert named in error
        assert "add --stage reward to run reward and all stages after it again" in error
        assert weights(run) == before
    again = ["--stages.reward.optimizer.lr", "0.02", "--stage", "reward", "--resume", "latest"]
    assert main(["train", str(recipe), *again]) == EXIT_OK
    after = weights(run)
    sft, reward = (Path(folder) / "model" / "model.safetensors" for folder in ("1-sft", "2-reward"))
    assert after[sft] == before[sft]
    assert after[reward] != before[reward]
    assert after[Path("2-reward-before/model/model.safetensors")] == before[reward]
    assert (run / "3-ppo-before").is_dir()


def test_the_last_stage_may_go_on_for_more_steps(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    write(recipe, {**values, "stages": {"sft": values["stages"]["sft"]}})
    assert main(["train", str(recipe)]) == EXIT_OK
    assert main(["train", str(recipe), "--resume", "latest", "--stages.sft.steps", "4"]) == EXIT_OK
    assert json.loads((tmp_path / "run" / "stages.json").read_text())["sft"]["steps"] == 4


def test_a_stage_that_diverges_stops_the_rest_and_says_what_to_do(recipe, run, tmp_path, capsys, monkeypatch):
    for folder in ("2-reward", "3-ppo"):
        shutil.rmtree(run / folder)
    step = Learner.step

    def diverging(self, algorithm, update, progress):
        if type(algorithm).__name__ == "RewardModelling" and self.steps == 1:
            raise NonFiniteLoss("the loss", float("nan"), update.batches)
        return step(self, algorithm, update, progress)

    monkeypatch.setattr(Learner, "step", diverging)
    assert main(["train", str(recipe), "--resume", "latest"]) == EXIT_DIVERGED
    out = capsys.readouterr().out
    assert "Stage reward: diverged; no later stage has begun." in out
    assert "--stage reward --stages.reward.optimizer.lr 0.005" in out
    assert not (tmp_path / "run" / "3-ppo").exists()
    monkeypatch.setattr(Learner, "step", step)
    told = out.split("resume with: fastrl ")[1].split("\n")[0].split()
    assert main(told) == EXIT_OK


def test_a_model_that_could_not_be_written_stops_the_rest_and_is_written_on_resume(
    recipe, run, tmp_path, capsys, monkeypatch
):
    for folder in ("2-reward", "3-ppo"):
        shutil.rmtree(run / folder)
    save = Run._save_models

    def full(self, ended):
        if self.config.algorithm == "reward_model":
            raise OSError(28, "No space left on device")
        save(self, ended)

    monkeypatch.setattr(Run, "_save_models", full)
    assert main(["train", str(recipe), "--resume", "latest"]) == 1
    assert "Stage reward finished, but not all could be written, so no later stage begins" in capsys.readouterr().out
    assert not (tmp_path / "run" / "3-ppo").exists()
    monkeypatch.setattr(Run, "_save_models", save)
    assert main(["train", str(recipe), "--resume", "latest"]) == EXIT_OK
    assert capsys.readouterr().out.count("finished before, in") == 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"reward": {"model": "${ppo}"}}, "stages.reward: model: expected a stage before it (sft), got ${ppo}"),
        ({"sft": {"model": "${sft}"}}, "stages.sft: model: expected a stage before it (none: it is the first stage)"),
        ({"ppo": {"model": "${stf}"}}, "stages.ppo: model: expected a stage before it (sft, reward), got ${stf}"),
        ({"ppo": {"model": "${reward}"}}, "stages.ppo: model: expected a stage that trains a policy, got ${reward}"),
        (
            {"ppo": {"rewards": [{"name": "model", "options": {"path": "${sft}"}}]}},
            "stages.ppo: rewards.0.options.path: expected a stage of algorithm reward_model, got ${sft}",
        ),
        ({"sft": {"adapter": {"rank": 4}}}, "stages.reward: model: expected a whole model, got ${sft}, which saves an"),
        ({"ppo": {"optimizer": {"lrr": 1}}}, "stages.ppo: optimizer: lrr: "),
        ({"ppo": {"rollout": {"top_k": -1, "group_size": 0}}}, "rollout.group_size: expected at least 1"),
        ({"ppo": {"run_dir": "x"}}, "stages.ppo: run_dir: expected nothing: it belongs beside stages"),
        ({"ppo": {"data": {"source": "no/such.jsonl"}}}, "stages.ppo: data.source: expected a file that exists"),
        (
            {"reward": {"data": {"source": "completions.jsonl"}}},
            "stages.reward: load_preferences: columns of kind='pairs'",
        ),
        ({"ppo": {"rewards": [{"name": "no.such:function"}]}}, "stages.ppo: resolve_reward: name: 'no.such:function'"),
        (
            {"ppo": {"data": {"source": "${sft}"}}},
            "data.source: expected a file of sft, as in ${sft/completions.jsonl}",
        ),
        ({"a-b": {"algorithm": "sft"}}, "stages: expected names of letters, digits and _, got 'a-b'"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(
    recipe, tmp_path, capsys, stages, message, monkeypatch, finished
):
    monkeypatch.chdir(finished)
    assert main(["train", str(changed(recipe, **stages))]) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_stage_named_twice_is_refused_with_its_line(tmp_path, capsys):
    path = tmp_path / "twice.yaml"
    path.write_text("stages:\n  sft: {algorithm: sft}\n  sft: {algorithm: dpo}\n")
    assert main(["train", str(path)]) == EXIT_USAGE
    assert "line 3: sft: a second time" in capsys.readouterr().err


def test_flags_go_to_one_stage_or_to_all_and_print_is_the_same_recipe(recipe, tmp_path, capsys):
    flags = ["--steps", "7", "--stages.ppo.steps=2", "--stages.sft.optimizer.lr", "0.5"]
    assert main(["train", str(recipe), "--print", *flags]) == EXIT_OK
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    each = load_stages(printed).each
    assert {name: config.steps for name, config in each.items()} == {"sft": 7, "reward": 7, "ppo": 2}
    assert each["sft"].optimizer == OptimizerConfig(lr=0.5)
    assert each["ppo"].optimizer == OptimizerConfig(lr=1e-2, steps_per_rollout=2)  # a section is merged key by key
    assert load_stages(recipe, flags).each == each
    for wrong, message in [
        (["--stages.pppo.steps", "1"], "'pppo'"),
        (["--stage", "ppo"], "--stage: expected --resume with it"),
        (["--stages.ppo.stepz", "1"], "--stepz: no such flag"),
    ]:
        assert main(["train", str(recipe), "--print", *wrong]) == EXIT_USAGE
        assert message in capsys.readouterr().err


def test_other_commands_say_that_a_recipe_has_stages(recipe, capsys):
    assert main(["eval", "model", str(recipe)]) == EXIT_USAGE
    assert "stages: expected a recipe of one run, got several" in capsys.readouterr().err


def ptx_config(tmp_path, **changes):
    rows = DataConfig(source=str(write_answers(tmp_path / "rows.jsonl", "completions")), held_out=4, chat=False)
    ppo = PPOConfig(critic_lr=1e-2, kl_coef=0.02, ptx_coef=27.8)
    optimizer = OptimizerConfig(lr=1e-3, steps_per_rollout=2)
    fields = {"algorithm": "ppo", "ppo": ppo, "data": rows, "rows_per_step": 5, "optimizer": optimizer}
    return tiny_config(tmp_path, **(fields | changes))


def test_ptx_adds_the_gradient_of_the_mean_negative_log_likelihood_at_temperature_1(tmp_path):
    config = ptx_config(tmp_path, max_tokens_per_microbatch=20)
    run = prepare(replace(config, rollout=replace(config.rollout, temperature=0.7)))
    ptx, model, learner = run.algorithm.ptx, run.learner.policy.model, run.learner
    groups = ptx.rows.next(5)
    answers = Answers.of(learner, groups)
    assert len(answers.batches) > 1

    def gradient(loss=None):
        found = torch.cat([p.grad.flatten().double() for p in model.parameters()]) if loss is None else None
        if loss is not None:
            found = torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, list(model.parameters()))])
        model.zero_grad()
        return found

    nats = 0.0
    for group in groups:  # in plain torch, one row at a time
        prompt, answer = list(group.prompt.token_ids), group.samples[0].token_ids
        logits = model(torch.tensor([prompt + answer])).logits[0]
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        nats = nats - logps.gather(1, torch.tensor(answer)[:, None]).sum()
    wanted = 27.8 * nats / sum(len(group.samples[0].token_ids) for group in groups)
    expected = gradient(wanted)
    model.zero_grad()
    loss, metrics = run.algorithm.accumulate(learner, Part([], 1.0, ptx=answers))
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-5)
    total, tokens = metrics[-1]["loss/ptx"]
    assert float(total / tokens) == pytest.approx(wanted.item() / 27.8, rel=1e-5)
    torch.testing.assert_close(gradient(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_ptx_keeps_the_likelihood_of_its_rows_while_ppo_trains(tmp_path):
    outcomes = {}
    for coef in (0.0, 27.8):
        config = ptx_config(tmp_path, run_dir=str(tmp_path / f"{coef}"), steps=6)
        config = replace(config, optimizer=replace(config.optimizer, lr=3e-3))
        plain = {"ppo": replace(config.ppo, ptx_coef=0.0), "data": DataConfig()}
        run = prepare(replace(config, **plain) if coef == 0 else config)
        watch = prepare(config).evaluations[-1]
        run.evaluations = [*run.evaluations, watch] if coef == 0 else run.evaluations
        outcomes[coef] = run.train()
    assert outcomes[0.0].before["loss"] == pytest.approx(outcomes[27.8].before["loss"], rel=1e-6)
    assert outcomes[27.8].after["loss"] < outcomes[0.0].after["loss"] - 0.5


def test_a_critic_that_is_warmed_up_draws_no_pretraining_rows(tmp_path, monkeypatch):
    drawn, following = [], Pretraining.next
    monkeypatch.setattr(Pretraining, "next", lambda self, learner: drawn.append(1) or following(self, learner))
    config = ptx_config(tmp_path)
    assert train(replace(config, ppo=replace(config.ppo, critic_warmup=2))).status == "finished"
    assert len(drawn) == 2  # of three steps with two updates each, only the last trains the policy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo": PPOConfig(ptx_coef=-1.0), "data": DataConfig(source="x")}, "ppo.ptx_coef: expected 0 or more"),
        ({"ppo": PPOConfig(ptx_coef=float("nan")), "data": DataConfig(source="x")}, "ppo.ptx_coef: expected 0 or more"),
        ({"ppo": PPOConfig(ptx_coef=1.0)}, "data: expected the rows that ppo.ptx_coef weighs, got none"),
        ({"data": DataConfig(source="x")}, "data: expected nothing, as ppo learns from completions"),
        ({"ppo": PPOConfig(ptx_coef=1.0), "data": DataConfig(ranked=True)}, "data.unpair, data.ranked: expected false"),
        ({"algorithm": "grpo", "ppo": PPOConfig(ptx_coef=1.0), "data": DataConfig(source="x")}, "ppo: expected its d"),
    ],
)
def test_a_pretraining_term_without_rows_or_rows_without_a_term_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        build_algorithm(TrainConfig(**({"algorithm": "ppo"} | changes)))
