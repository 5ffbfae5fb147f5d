"""A run that stops, whenever and however, goes on as if it had not."""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer.tiny import in_step, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrl import files
from fastrl.cli import main
from fastrl.monitor.log import RunLog
from fastrl.monitor.records import read_run
from fastrl.rewards import RewardFailure
from fastrl.sources import Rollouts
from fastrl.trainer import checkpoint
from fastrl.trainer.config import EvalConfig, OptimizerConfig, RewardConfig, RolloutConfig
from fastrl.trainer.evaluate import OnPrompts
from fastrl.trainer.learner import Learner
from fastrl.trainer.resume import resumable
from fastrl.trainer.setup import train

# A seventh of a file's bytes from its start: inside the tensors of a safetensors file, inside the text of a JSON file.
SOMEWHERE = 7


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


class Crash(BaseException):
    """The process dies: nothing that is written to catch errors may catch this."""


def crash_in_step(monkeypatch, number):
    def crash(run):
        raise Crash

    in_step(monkeypatch, number, crash)


def run_until_crash(config, number):
    with pytest.MonkeyPatch.context() as patch:
        crash_in_step(patch, number)
        with pytest.raises(Crash):
            train(config)


def config_for(tmp_path, name="run", **changes):
    """Three and a third steps are an epoch; every random number generator has a part in the rewards."""
    fields = {
        "steps": 7,
        "save_every": 5,
        "show_every": 0,
        "run_dir": str(tmp_path / name),
        "rewards": (RewardConfig("trainer.tiny:noisy_words"),),
        "rollout": RolloutConfig(prompts_per_step=6, group_size=3, max_new_tokens=5),
        "optimizer": OptimizerConfig(lr=1e-2, warmup_steps=3, schedule="cosine", weight_decay=0.01),
        "eval": EvalConfig(every=2),
    }
    return tiny_config(tmp_path, **(fields | changes))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(record):
    timed = ("time", "step_time", "tokens_per_second", "seconds")
    return {name: value for name, value in record.items() if name not in timed and not name.startswith("time/")}


def everything(run_dir, last="step_000007"):
    """What a run wrote that does not depend on the clock, to the bit."""
    logged = {path.name: [untimed(r) for r in lines(path)] for path in run_dir.glob("*.jsonl")}
    saved = run_dir / "checkpoints" / last
    bits = {path.relative_to(saved): path.read_bytes() for path in saved.rglob("*.safetensors")}
    assert len(bits) > 3  # the model's and one for each tensor of the optimizer
    return logged, bits, (run_dir / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "steps_per_rollout", "kl", "saved"),
    [("float32", 1, None, 2), ("bfloat16", 1, "k3", 5), ("float32", 3, "k3", 5), ("bfloat16", 2, None, 2)],
)
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(tmp_path, dtype, steps_per_rollout, kl, saved):
    changes = {"dtype": dtype, "loss": {"kl": {"kind": kl} if kl else None}, "save_every": saved}
    config = config_for(tmp_path, "whole", **changes)
    config = replace(config, optimizer=replace(config.optimizer, steps_per_rollout=steps_per_rollout))
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    run_until_crash(stopped, saved + 2)
    # A step and, but for the odd one, an evaluation were logged after the checkpoint, and the last line was cut short.
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    assert [line["step"] for line in lines(metrics)] == list(range(1, saved + 2))
    metrics.write_bytes(metrics.read_bytes()[:-9])
    outcome = train(replace(stopped, resume=stopped.run_dir))
    assert (outcome.status, outcome.steps) == ("finished", 7)
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")
    assert [line["step"] for line in lines(metrics)] == list(range(1, 8))
    assert read_run(tmp_path / "stopped").steps == list(range(1, 8))


@pytest.mark.parametrize(("updates", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_sigterm_between_two_optimizer_steps_of_a_rollout_saves_the_rest_of_it(tmp_path, monkeypatch, updates, dtype):
    optimizer = OptimizerConfig(lr=1e-2, steps_per_rollout=3)
    changes = {"dtype": dtype, "loss": {"kl": {}}, "optimizer": optimizer, "steps": 4}
    train(config_for(tmp_path, "whole", **changes))
    config = config_for(tmp_path, "stopped", **changes)
    calls, original = [], Learner.step

    def step(*args, **kwargs):
        update = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3 + updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return update

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", step)
        outcome = train(config)
    assert (outcome.status, outcome.steps, len(calls)) == ("interrupted", 1, 3 + updates)
    saved = tmp_path / "stopped" / "checkpoints" / f"step_000001_update_{updates}"
    batch = json.loads((saved / "state.json").read_text())["batch"]
    assert len(batch["updates"]) == updates
    assert all("old_logps" in sample for group in batch["groups"] for sample in group["samples"])
    assert train(replace(config, resume=config.run_dir)).status == "finished"
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    # The other one, of both runs, is of a machine that is slow at bfloat16.
    whole[0].pop("warnings.jsonl", None)
    *_, warning = resumed[0].pop("warnings.jsonl")
    assert warning["message"] == f"Stopped by SIGTERM after step 1 and {updates} optimizer steps of the next; saving."
    assert resumed == whole


def test_ctrl_c_saves_a_checkpoint_and_the_command_it_prints_goes_on(tmp_path, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        in_step(patch, 3, lambda run: os.kill(os.getpid(), signal.SIGINT))
        outcome = train(config_for(tmp_path, "stopped", save_every=0, eval=EvalConfig()))
    assert (outcome.status, outcome.steps) == ("interrupted", 2)
    stopped = tmp_path / "stopped"
    command = shlex.join(["fastrl", "train", str(stopped / "config.yaml"), "--resume", str(stopped)])
    assert f"To resume: {command}\n" in capsys.readouterr().out
    assert main(shlex.split(command)[1:]) == 0
    assert f"resumed after step 2, from {stopped / 'checkpoints' / 'step_000002'}" in capsys.readouterr().out
    logged, _, model = whole
    assert lines(stopped / "completions.jsonl") == logged["completions.jsonl"]
    assert (stopped / "model" / "model.safetensors").read_bytes() == model


def test_rewards_that_fail_cost_no_step_that_was_done(tmp_path, whole, monkeypatch):
    config = config_for(tmp_path, "stopped", save_every=0, eval=EvalConfig())
    original = Rollouts.next

    def failing(source, learner, watch):
        batch = original(source, learner, watch)
        if learner.steps == 3:
            raise RewardFailure("no judge at home")
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(Rollouts, "next", failing)
        assert train(config).status == "rewards failed"
    train(replace(config, resume=config.run_dir))
    for name in ("completions.jsonl", "evaluation_completions.jsonl"):
        assert lines(tmp_path / "stopped" / name) == whole[0][name]


def test_rewards_that_fail_in_an_evaluation_cost_no_step_that_was_done(tmp_path, whole, monkeypatch):
    config = config_for(tmp_path, "stopped", save_every=0)
    original = OnPrompts.run

    def failing(evaluation, learner, log, step):
        if step:
            random.random()  # what the next step draws must not depend on this
            raise RewardFailure("no judge at home")
        return original(evaluation, learner, log, step)

    with monkeypatch.context() as patch:
        patch.setattr(OnPrompts, "run", failing)
        outcome = train(config)
        assert (outcome.status, outcome.steps) == ("rewards failed", 2)
    assert "no judge at home" in (tmp_path / "stopped" / "warnings.jsonl").read_text()
    train(replace(config, resume=config.run_dir, eval=EvalConfig()))
    for name in ("completions.jsonl", "evaluation_completions.jsonl"):
        assert lines(tmp_path / "stopped" / name) == whole[0][name]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from trainer.test_resume import config_for
from fastrl.trainer import checkpoint
from fastrl.trainer.setup import train
original = checkpoint.write_json
def write_json(values, path):
    if path.name == "manifest.json" and path.parent.name.startswith(".step_000004"):
        os.kill(os.getpid(), signal.SIGKILL)
    original(values, path)
checkpoint.write_json = write_json
train(config_for(Path(sys.argv[2]), "killed", save_every=2, linear="torch"))
"""


def test_after_kill_9_in_the_middle_of_a_save_another_process_goes_on_bit_for_bit(tmp_path):
    # By name: each process measures for itself which layers are faster on fastrl's products, and may find otherwise.
    config = config_for(tmp_path, "whole", save_every=2, linear="torch")
    train(config)
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}"}
    result = subprocess.run([sys.executable, "-c", KILLED, str(tests), str(tmp_path)], env=environment, timeout=200)
    assert result.returncode == -signal.SIGKILL
    saves = tmp_path / "killed" / "checkpoints"
    (half,) = (path for path in saves.iterdir() if files.ASIDE in path.name)
    assert (half / "optimizer" / "exp_avg.safetensors").is_file()
    train(replace(config, run_dir=str(tmp_path / "killed"), resume=str(tmp_path / "killed")))
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")
    assert sorted(path.name for path in saves.iterdir()) == ["latest", "step_000006", "step_000007"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run that crashed in step 5 with checkpoints of steps 2 and 4; (its folder, its configuration)."""
    tmp_path = tmp_path_factory.mktemp("template")
    config = config_for(tmp_path, save_every=2, eval=EvalConfig())
    run_until_crash(config, 5)
    return tmp_path / "run", config


@pytest.fixture(scope="module")
def whole(template):
    """Everything that the same run writes when it does not crash."""
    folder = template[0].with_name("whole")
    train(replace(template[1], run_dir=str(folder)))
    return everything(folder)


@pytest.fixture
def stopped(template, tmp_path):
    """A copy of that run, to damage; (its folder, the configuration that resumes it)."""
    shutil.copytree(template[0], tmp_path / "run")
    return tmp_path / "run", replace(template[1], run_dir=str(tmp_path / "run"), resume=str(tmp_path / "run"))


def test_wherever_a_save_is_killed_the_run_has_a_whole_checkpoint(stopped, monkeypatch):
    """The process dies at each call that touches the disk, in turn: the older or the newer checkpoint is found."""
    directory, _ = stopped
    source = directory / "checkpoints" / "step_000004"
    manifest = json.loads((source / "manifest.json").read_text())

    def save_and_die(at):
        calls = []
        for name in ("fsync", "rename", "replace"):
            original = getattr(os, name)

            def dying(*args, original=original):
                calls.append(1)
                if len(calls) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args)

            setattr(os, name, dying)
        about = checkpoint.about(step=6, update=None, model=manifest["model"], recipe=manifest["recipe"])
        writers = {name: partial(shutil.copy, source / name) for name in manifest["files"]}
        checkpoint.write_checkpoint(directory, "step_000006", writers, about)
        checkpoint.keep(directory, last=2, every=0)

    found = []
    while True:
        child = os.fork()
        if child == 0:
            save_and_die(at=len(found) + 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        newest = checkpoint.find(directory)
        assert not newest.skipped
        found.append(newest.folder.name)
        if newest.folder.name == "step_000006":  # start again from the older one
            checkpoint.point_to(source)
            shutil.rmtree(newest.folder)
    assert len(found) > 10
    assert found == sorted(found)
    assert set(found) == {"step_000004", "step_000006"}
    assert sorted(path.name for path in source.parent.iterdir()) == ["latest", "step_000004", "step_000006"]


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // SOMEWHERE] ^= 0x04
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncated, flipped, Path.unlink])
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "state.json", "optimizer/weights.safetensors", "model/model.safetensors", "model/config.json"],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(stopped, damage, name):
    directory, config = stopped
    damage(directory / "checkpoints" / "step_000004" / name)
    found = resumable(config)
    assert found.folder.name == "step_000002"
    (reason,) = found.skipped
    assert "step_000004" in reason
    assert name in reason


def test_the_run_after_a_damaged_checkpoint_warns_and_is_the_run_that_never_stopped(stopped, whole):
    directory, config = stopped
    truncated(directory / "checkpoints" / "step_000004" / "optimizer" / "exp_avg.safetensors")
    train(config)
    resumed = everything(directory)
    (warning,) = resumed[0].pop("warnings.jsonl")
    assert "bytes instead of" in warning["message"]
    assert resumed == whole


def test_without_any_whole_checkpoint_the_run_is_refused_with_every_reason(stopped):
    directory, config = stopped
    truncated(directory / "checkpoints" / "step_000002" / "state.json")
    (directory / "checkpoints" / "step_000004" / "manifest.json").unlink()
    message = (
        r"got none that is undamaged: .*no manifest.json.* state.json has \d+ bytes [^.]*\. [^.]*\. Leave resume out"
    )
    with pytest.raises(ValueError, match=message):
        resumable(config)


def test_a_damaged_checkpoint_asked_for_by_name_is_refused(stopped):
    directory, config = stopped
    folder = directory / "checkpoints" / "step_000004"
    flipped(folder / "state.json")
    with pytest.raises(ValueError, match=r"step_000004 is damaged: state.json is not what was written"):
        resumable(replace(config, resume=str(folder)))


def test_a_manifest_cannot_name_files_outside_its_folder(stopped):
    directory, config = stopped
    folder = directory / "checkpoints" / "step_000004"
    (folder / "state.json").rename(directory / "state.json")
    (folder / "state.json").symlink_to(directory / "state.json")
    with pytest.raises(ValueError, match=r"state\.json is outside it"):
        resumable(replace(config, resume=str(folder)))


@pytest.mark.parametrize("pointer", ["step_999999\n", "../../../etc\n", "\x00\xff", "", None])
def test_without_a_pointer_that_makes_sense_the_newest_checkpoint_is_taken(stopped, pointer):
    directory, config = stopped
    path = directory / "checkpoints" / "latest"
    path.unlink() if pointer is None else path.write_text(pointer)
    assert resumable(config).folder.name == "step_000004"


def test_a_checkpoint_that_a_resumed_run_has_left_behind_is_not_gone_back_to(stopped, whole):
    directory, config = stopped
    older = replace(config, resume=str(directory / "checkpoints" / "step_000002"), save_every=3)
    run_until_crash(older, 3)  # before the next checkpoint
    assert resumable(config).folder.name == "step_000002"
    train(config)
    assert everything(directory) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"resume: seed: expected 0 as in .*step_000004, got 1\."),
        ({"dtype": "bfloat16"}, r"resume: dtype: expected 'float32'"),
        (
            {"rollout": RolloutConfig(prompts_per_step=6, group_size=4, max_new_tokens=5)},
            r"resume: rollout.group_size: expected 3",
        ),
        ({"optimizer": OptimizerConfig(lr=1e-3)}, r"resume: optimizer.lr: .* So do .*optimizer.schedule"),
        ({"rewards": (RewardConfig("trainer.tiny:wanted_words"),)}, r"resume: rewards: expected .*noisy_words"),
        ({"steps": 3}, r"resume: steps: expected at least 4, .* got 3\."),
        ({"resume": "nowhere"}, r"resume: nowhere: expected a run directory with a checkpoint, .* got none\."),
    ],
)
def test_another_recipe_is_refused_by_the_field_that_differs_and_nothing_is_written(stopped, changes, message):
    directory, config = stopped
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    with pytest.raises(ValueError, match=message):
        train(replace(config, **changes))
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_another_model_is_refused_and_the_same_weights_under_another_name_are_not(stopped, tmp_path):
    _, config = stopped
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(config.model, moved)
    shutil.copytree(config.model, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight[0] += 1.0
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=r"resume: model: expected '.*/model', got '.*/other'"):
        train(replace(config, model=str(other)))
    assert train(replace(config, model=str(moved), steps=5)).steps == 5


def test_other_prompts_under_the_same_name_are_refused_and_nothing_is_written(stopped, tmp_path):
    directory, config = stopped
    task = Path(config.task.source)
    rows = task.read_text()
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    task.write_text(rows.replace("w5", "w9"))
    try:
        with pytest.raises(ValueError, match="expected the state of the same prompts"):
            train(config)
    finally:
        task.write_text(rows)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_what_may_change_is_said_and_steps_are_added(stopped, capsys):
    directory, config = stopped
    rollout = replace(config.rollout, max_num_seqs=4)
    outcome = train(replace(config, steps=9, max_tokens_per_microbatch=48, rollout=rollout, eval=EvalConfig(every=3)))
    assert outcome.steps == 9
    said = capsys.readouterr().out
    assert "resumed after step 4, from" in said
    changes = "steps 7 -> 9; max_tokens_per_microbatch 64 -> 48; rollout.max_num_seqs 0 -> 4; eval.every 0 -> 3"
    assert f"; {changes}" in " ".join(said.split())
    (warning,) = lines(directory / "warnings.jsonl")
    assert "cosine schedule now ends at step 9 instead of 7" in warning["message"]
    assert [line["step"] for line in lines(directory / "metrics.jsonl")] == list(range(1, 10))
    assert sorted({line["step"] for line in lines(directory / "evaluations.jsonl")}) == [0, 6, 9]


def test_latest_is_the_run_that_saved_last(stopped):
    directory, config = stopped
    run_until_crash(replace(config, resume="", save_every=1), 2)
    assert (
        resumable(replace(config, resume="latest")).folder
        == directory.with_name("run-2") / "checkpoints" / "step_000001"
    )


def test_a_finished_run_that_is_resumed_finishes_again_without_a_step(stopped):
    directory, config = stopped
    train(config)
    before = everything(directory)
    outcome = train(config)
    assert (outcome.status, outcome.steps) == ("finished", 7)
    assert outcome.before.keys() == outcome.after.keys() == {"greedy", "sampled"}
    assert everything(directory) == before


def test_a_full_disk_costs_neither_the_run_nor_the_checkpoint_before(stopped, monkeypatch):
    """The system refuses to write more than some bytes to a file, as a full disk would."""
    directory, config = stopped
    original = checkpoint.write_checkpoint

    def no_space(*args):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            return original(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint, "write_checkpoint", no_space)
    assert train(config).status == "finished"
    messages = [line["message"] for line in lines(directory / "warnings.jsonl")]
    assert [message.split(":")[0] for message in messages] == [
        f"The checkpoint after step {step} could not be written to {directory}" for step in (6, 7)
    ]
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "latest",
        "step_000002",
        "step_000004",
    ]
    assert resumable(config).folder.name == "step_000004"


def test_the_last_and_every_so_many_checkpoints_stay(tmp_path):
    train(config_for(tmp_path, save_every=1, keep_last=2, keep_every=3, eval=EvalConfig()))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["latest", "step_000003", "step_000006", "step_000007"]


def test_a_checkpoint_is_safetensors_and_json_and_transformers_loads_its_model(stopped):
    directory, _ = stopped
    folder = directory / "checkpoints" / "step_000004"
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} == {".json", ".safetensors"}
    for path in paths:
        load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(folder / "model")
    weights = load_file(folder / "optimizer" / "weights.safetensors")["weights"]
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), weights)


def test_a_resumed_log_counts_time_on_and_repeats_no_alarm(tmp_path):
    now = [0.0]
    quiet = {"reward": 0.5, "frac_reward_zero_std": 1.0}
    log = RunLog(tmp_path, total_steps=9, clock=lambda: now[0])
    for step in range(1, 5):
        now[0] += 10.0
        log.step(step, quiet)
    assert len(lines(tmp_path / "warnings.jsonl")) == 1
    now[0] += 1.0
    with log.stage("rollout"):
        now[0] += 2.0
    state = json.loads(json.dumps(log.state()))
    log.warn("of a future that will not be")
    log.evaluation(4, "greedy", {"reward": 1.0}, [])
    now[0] = 1000.0
    again = RunLog(tmp_path, total_steps=9, clock=lambda: now[0])
    again.resume(state, "resumed")
    assert again.evaluated(4) == {}
    now[0] += 5.0
    again.step(5, quiet)
    assert len(lines(tmp_path / "warnings.jsonl")) == 1
    last = lines(tmp_path / "metrics.jsonl")[-1]
    assert (last["step"], last["time"], last["step_time"], last["time/rollout"]) == (5, 48.0, 8.0, 2.0)


def test_a_log_that_lost_lines_says_so(tmp_path):
    log = RunLog(tmp_path, total_steps=9)
    log.step(1, {"reward": 0.5})
    state = log.state()
    (tmp_path / "metrics.jsonl").write_text("")
    RunLog(tmp_path, total_steps=9).resume(state, "resumed")
    (line,) = lines(tmp_path / "warnings.jsonl")
    assert line["message"].startswith("metrics.jsonl is shorter than it was")
