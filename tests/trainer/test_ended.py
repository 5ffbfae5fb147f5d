"""However a run ends, what it trained is not lost, and its folder says how it ended."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from trainer.test_resume import config_for, everything, lines
from trainer.tiny import in_step, tiny_config, wanted_words, write_model, write_task

from fastrl.cli import main
from fastrl.monitor.log import RunLog
from fastrl.rewards import RewardSuite
from fastrl.trainer import checkpoint, loop
from fastrl.trainer.config import EvalConfig, OptimizerConfig, RewardConfig
from fastrl.trainer.learner import Learner
from fastrl.trainer.optimizer import MasterOptimizer
from fastrl.trainer.setup import evaluate_model, prepare, train


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def raising(error):
    def arm(run):
        raise error

    return arm


@pytest.mark.parametrize(
    ("error", "ended", "said"),
    [
        (TypeError("no such thing"), "failed", "Step 3: TypeError: no such thing (" + __file__),
        (SystemError("gone"), "failed", "Step 3: SystemError: gone"),
        (MemoryError(), "failed", "Out of memory: lower max_tokens_per_microbatch, or set gradient_checkpointing."),
        (RuntimeError("CUDA out of memory"), "failed", "Out of memory: lower max_tokens_per_microbatch"),
        (OSError(28, "No space left on device", "x"), "failed", "No space left on device"),
        (KeyboardInterrupt(), "interrupted", "Step 3: KeyboardInterrupt"),
    ],
    ids=["code", "system", "memory", "gpu memory", "disk", "second signal"],
)
def test_whatever_ends_a_run_saves_it_where_it_was_and_it_goes_on_bit_for_bit(tmp_path, capsys, error, ended, said):
    config = config_for(tmp_path, "whole", steps=4)
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 3, raising(error))
        outcome = train(stopped)
    assert (outcome.status, outcome.steps, outcome.problems) == (ended, 2, ())
    assert outcome.report.is_file()
    values = status(tmp_path / "stopped")
    assert (values["status"], values["steps"], values["total_steps"]) == (ended, 2, 4)
    assert values["resume"] in capsys.readouterr().out
    messages = [line["message"] for line in lines(tmp_path / "stopped" / "warnings.jsonl")]
    assert any(said in message for message in messages), messages
    train(replace(stopped, resume=stopped.run_dir))
    assert status(tmp_path / "stopped") == {"status": "finished", "steps": 4, "total_steps": 4}
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    whole[0].pop("warnings.jsonl", None)
    resumed[0].pop("warnings.jsonl")
    assert resumed == whole


def test_an_error_before_anything_was_trained_is_the_callers(tmp_path, monkeypatch):
    in_step(monkeypatch, 1, raising(TypeError("no such thing")))
    with pytest.raises(TypeError, match="no such thing"):
        train(tiny_config(tmp_path))


def test_an_update_that_is_cut_short_in_the_weights_is_not_saved_as_if_it_were_whole(tmp_path, monkeypatch):
    config = config_for(tmp_path, "stopped", steps=4, save_every=1)
    original = MasterOptimizer._update

    def cut(optimizer, piece):
        original(optimizer, piece)
        if optimizer.steps == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MasterOptimizer, "_update", cut)
        outcome = train(config)
    assert (outcome.status, outcome.steps) == ("interrupted", 2)
    assert "An update was cut short" in outcome.problems[0]
    assert not (tmp_path / "stopped" / "model").exists()
    assert checkpoint.find(tmp_path / "stopped").folder.name == "step_000002"
    assert train(replace(config, resume=config.run_dir)).status == "finished"


def test_a_disk_that_is_full_to_the_end_is_said_without_a_traceback(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "run" / "metrics.jsonl"))

    def arm(run):
        for owner, name in ((RunLog, "_append"), (checkpoint, "write_model"), (loop, "write_report")):
            monkeypatch.setattr(owner, name, full)

    in_step(monkeypatch, 3, arm)
    outcome = train(tiny_config(tmp_path, steps=4))
    assert (outcome.status, outcome.steps) == ("failed", 2)
    assert len(outcome.problems) == 2
    said = "".join(capsys.readouterr().out.split())  # the screen folds long lines
    assert f"Themodelcouldnotbewrittento{tmp_path / 'run'}:" in said
    assert "metrics.jsonl" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_does_not_exit_as_if_it_had_finished(tmp_path, monkeypatch, number, code):
    write_model(tmp_path / "model")
    write_task(tmp_path / "task.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tmp_path / 'model'}\ndtype: float32\ndevice: cpu\nsteps: 3\nrun_dir: {tmp_path / 'run'}\n"
        f"task: {{source: {tmp_path / 'task.jsonl'}, held_out: 0, chat: false}}\n"
        "rewards: [{name: trainer.tiny:short}]\n"
        "rollout: {prompts_per_step: 2, group_size: 2, max_new_tokens: 4}\n"
    )
    with monkeypatch.context() as patch:
        in_step(patch, 2, lambda run: os.kill(os.getpid(), number))
        assert main(["train", str(recipe)]) == code
    assert status(tmp_path / "run")["signal"] == number
    assert main(["train", str(recipe), "--resume", str(tmp_path / "run")]) == 0
    assert status(tmp_path / "run")["status"] == "finished"


def test_weights_that_are_not_finite_do_not_lie_where_a_model_is_looked_for(tmp_path):
    outcome = train(tiny_config(tmp_path, steps=1, optimizer=OptimizerConfig(lr=1e38)))
    assert outcome.status == status(tmp_path / "run")["status"] == "diverged"
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run" / "model_not_finite" / "model.safetensors").is_file()


def test_what_a_checkpoint_has_written_is_not_written_twice(tmp_path, monkeypatch):
    config = config_for(tmp_path, steps=2, save_every=2, eval=EvalConfig())
    train(config)
    folders = [tmp_path / "run" / "model", tmp_path / "run" / "checkpoints" / "step_000002" / "model"]
    one, other = (folder / "model.safetensors" for folder in folders)
    assert one.samefile(other)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    copied = checkpoint.copy_model(folders[1].parent, tmp_path / "copy") / "model.safetensors"
    assert not copied.samefile(other)
    assert copied.read_bytes() == other.read_bytes()


def test_a_reward_is_told_of_the_step_and_its_numbers_are_logged(tmp_path, monkeypatch):
    seen = []

    def told(completions, wanted, trainer_state, log_metric, **_):
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("judged", 7.0)
        return wanted_words(completions, wanted)

    original = RewardSuite.__init__
    monkeypatch.setattr(RewardSuite, "__init__", lambda self, funcs, *a, **k: original(self, [told], *a, **k))
    train(tiny_config(tmp_path, steps=2))
    assert seen == [(0, 2)] * 2 + [(0, 2), (1, 2)] + [(2, 2)] * 2  # evaluations are of two kinds
    assert [line["judged"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [7.0, 7.0]


def test_gradients_of_an_update_that_fails_are_gone(tmp_path, monkeypatch):
    kept = []
    original = Learner.step

    def failing(learner, algorithm, step, progress):
        kept.append(learner)
        if learner.steps == 1:
            algorithm = type("Failing", (), {"accumulate": lambda *_: accumulate(learner, step, progress)})
        return original(learner, algorithm, step, progress)

    def accumulate(learner, step, progress):
        learner.policy.score(step.batches[0], temperature=1.0)
        learner.policy.outputs(learner.policy.hidden(step.batches[0]), step.batches[0].targets).logps.sum().backward()
        raise ValueError("half way")

    monkeypatch.setattr(Learner, "step", failing)
    assert train(tiny_config(tmp_path)).status == "failed"
    assert all(not optimizer.grad.any() for optimizer in kept[0].optimizers.values())


def test_a_run_and_a_checkpoint_are_names_of_their_model(tmp_path, capsys):
    rewards = (RewardConfig("trainer.tiny:wanted_words"),)
    config = config_for(tmp_path, steps=4, save_every=2, eval=EvalConfig(), rewards=rewards)
    outcome = train(config)
    run_dir = tmp_path / "run"
    for name in (run_dir, run_dir / "model", run_dir / "checkpoints" / "step_000004"):
        assert evaluate_model(config, str(name)) == pytest.approx(outcome.after)
    between = run_dir / "checkpoints" / "step_000002"
    got = prepare(replace(config, model=str(between))).learner.policy.model.state_dict()
    expected = load_file(between / "model" / "model.safetensors")
    assert all(got[name].equal(weight) for name, weight in expected.items())


def test_a_record_that_lost_the_end_of_its_last_line_is_not_glued_to_the_next(tmp_path):
    config = config_for(tmp_path, steps=3, save_every=2, eval=EvalConfig())
    train(replace(config, steps=2))
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    assert train(replace(config, resume=config.run_dir)).status == "finished"
    assert [line["step"] for line in lines(metrics)] == [1, 3]
    assert "metrics.jsonl is shorter than it was" in (tmp_path / "run" / "warnings.jsonl").read_text()


@pytest.mark.parametrize("broken", ["format", "files"])
def test_a_manifest_without_format_or_files_is_refused_in_a_sentence(tmp_path, broken):
    config = config_for(tmp_path, steps=1, save_every=1, eval=EvalConfig())
    train(config)
    path = tmp_path / "run" / "checkpoints" / "step_000001" / "manifest.json"
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name not in (broken, "sha256")}
    path.write_text(json.dumps(checkpoint._sealed(manifest)))
    with pytest.raises(ValueError, match="has format none" if broken == "format" else "lists no files"):
        checkpoint.find(tmp_path / "run")


def test_a_checkpoint_of_the_old_format_is_refused_in_a_sentence(tmp_path):
    config = config_for(tmp_path, steps=1, save_every=1, eval=EvalConfig())
    train(config)
    path = tmp_path / "run" / "checkpoints" / "step_000001" / "manifest.json"
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    path.write_text(json.dumps(checkpoint._sealed(manifest | {"format": 1})))
    with pytest.raises(ValueError, match=r"has format 1; this fastrl reads format 4\. Start over"):
        train(replace(config, resume=config.run_dir))
