"""Metrics that go to trackers besides metrics.jsonl."""

from __future__ import annotations

import json
import sys
import typing
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from trainer.tiny import tiny_config

from fastrl.cli import EXIT_ENVIRONMENT, main
from fastrl.monitor import trackers
from fastrl.trainer.setup import train


@pytest.fixture(autouse=True)
def _all_are_installed(monkeypatch):
    monkeypatch.setattr(trackers, "require_installed", lambda names: None)
    monkeypatch.setattr("fastrl.trainer.setup.require_installed", lambda names: None)
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


class Recorder:
    """What reached a tracker, in order."""

    made: typing.ClassVar = []

    def __init__(self, run_dir, config, done):
        self.run_dir, self.config, self.done, self.logged, self.closed = run_dir, config, done, [], False
        Recorder.made.append(self)

    def log(self, values, step):
        self.logged.append((step, values))

    def close(self):
        self.closed = True


@pytest.fixture
def recorders(monkeypatch):
    Recorder.made = []
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Recorder)
    return Recorder.made


def test_a_tracker_gets_every_finite_number_of_metrics_jsonl_and_the_evaluations(tmp_path, recorders):
    config = tiny_config(tmp_path, steps=2, log_to=("wandb",))
    train(config)
    (tracker,) = recorders
    assert tracker.closed
    assert tracker.config["steps"] == 2
    steps = [(step, values) for step, values in tracker.logged if "loss" in values]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line, (step, values) in zip(lines, steps, strict=True):
        assert step == line.pop("step")
        assert values == line
    evaluations = [(step, name) for step, values in tracker.logged for name in values if name.startswith("eval/")]
    assert (0, "eval/greedy/reward") in evaluations
    assert (2, "eval/sampled/reward") in evaluations


def test_a_resumed_run_tells_its_tracker_how_far_it_is(tmp_path, recorders):
    config = tiny_config(tmp_path, steps=2, log_to=("wandb",), save_every=1)
    train(config)
    train(replace(config, steps=3, resume=config.run_dir))
    assert [tracker.done for tracker in recorders] == [0, 2]
    assert [step for step, values in recorders[1].logged if "loss" in values] == [3]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, recorders, monkeypatch):
    def fail(self, values, step):
        raise ConnectionError("no network")

    monkeypatch.setattr(Recorder, "log", fail)
    assert train(tiny_config(tmp_path, log_to=("wandb",))).status == "finished"
    warnings = (tmp_path / "run" / "warnings.jsonl").read_text()
    assert warnings.count("wandb failed and is off from now on: ConnectionError: no network") == 1


def test_a_missing_package_is_an_environment_error_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run_dir: {tmp_path / 'run'}\nlog_to: [trackio]\n")
    assert main(["train", str(recipe)]) == EXIT_ENVIRONMENT
    assert "log_to: trackio is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_what_trackio_and_wandb_are_called_with(tmp_path, monkeypatch, name):
    calls = []
    module = ModuleType(name)
    for function in ("init", "log", "finish"):
        setattr(module, function, lambda *args, _f=function, **kwargs: calls.append((_f, args, kwargs)) or module)
    monkeypatch.setitem(sys.modules, name, module)
    tracker = trackers.TRACKERS[name](tmp_path / "grpo-2", {"steps": 3}, 0)
    tracker.log({"loss": 0.5}, 7)
    tracker.close()
    (_, _, begun), (_, logged, at), _ = calls
    assert [call[0] for call in calls] == ["init", "log", "finish"]
    assert SimpleNamespace(**begun).project == "fastrl"
    assert (begun["name"], begun["config"], begun["resume"]) == ("grpo-2", {"steps": 3}, "allow")
    assert (logged, at) == (({"loss": 0.5},), {"step": 7})
