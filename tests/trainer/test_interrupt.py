"""A signal takes effect at the next token or micro-batch, and nothing of what it cut short is left.

It arrives from inside the run, in a chosen call of a chosen function, so that no test depends on the time.
"""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from trainer.fabricated import FakeClock
from trainer.test_resume import config_for, everything, lines
from trainer.tiny import in_step, offline_config

from fastrl.algorithms.masks import TokenMasks
from fastrl.model.policy import Policy
from fastrl.model.scalar import ScalarModel
from fastrl.monitor.interrupt import HEARD, Interrupt
from fastrl.monitor.log import RunLog
from fastrl.rewards import RewardFailure, call
from fastrl.rollout.transformers_sampler import TransformersSampler
from fastrl.trainer import loop, models, reference
from fastrl.trainer.config import EvalConfig, OptimizerConfig, PPOConfig, RewardConfig, RolloutConfig
from fastrl.trainer.evaluate import OnPrompts, OnRows
from fastrl.trainer.learner import Learner
from fastrl.trainer.setup import train

REWARDS = (RewardConfig("trainer.tiny:noisy_words"), RewardConfig("trainer.tiny:short"))
PPO = {
    "algorithm": "ppo",
    "ppo": PPOConfig(critic="separate", critic_lr=1e-2, kl_coef=0.05, kl_target=0.5, kl_horizon=50),
}


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


@pytest.fixture
def optimizers(monkeypatch):
    """Those of every run of the test, in order."""
    made = []

    class Kept(models.MasterOptimizer):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(models, "MasterOptimizer", Kept)
    return made


def arrives_in(patch, owner, name, at, number=signal.SIGINT):
    """The signal arrives in call `at` of a function, counted from now; returns the calls."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    patch.setattr(owner, name, counted)
    return calls


def interrupted(train, config, patching):
    """(outcome, calls) of a run in which a signal arrives; `patching` has a monkeypatch and gives the list of calls."""
    with pytest.MonkeyPatch.context() as patch:
        calls = patching(patch)
        return train(config), calls


def in_third_step(patch, owner, name, at):
    calls = []
    in_step(patch, 3, lambda run: calls.append(arrives_in(patch, owner, name, at)))
    return calls


def what_stopped(resumed, whole):
    """The only warning that the resumed run has and the whole one has not; takes those of both away."""
    usual = [line["message"] for line in whole[0].pop("warnings.jsonl", [])]
    (message,) = [line["message"] for line in resumed[0].pop("warnings.jsonl") if line["message"] not in usual]
    return message


@pytest.mark.parametrize(
    ("changes", "hook", "at", "saved"),
    [
        ({}, (TransformersSampler, "_forward_prompts"), 1, "step_000002"),
        ({}, (TransformersSampler, "_step"), 2, "step_000002"),
        ({"algorithm": "remax"}, (TransformersSampler, "_decode"), 2, "step_000002"),
        ({"rewards": REWARDS}, (call, "_finish"), 1, "step_000002"),
        ({"loss": {"kl": {}}}, (Policy, "score"), 2, "step_000002_update_0"),
        ({"masks": TokenMasks(top_entropy=0.5)}, (Policy, "outputs"), 2, "step_000002_update_0"),
        ({}, (Policy, "hidden"), 1, "step_000002_update_0"),
        ({"dtype": "bfloat16"}, (Policy, "hidden"), 1, "step_000002_update_0"),
        (PPO, (ScalarModel, "values"), 1, "step_000002_update_0"),
    ],
    ids=["prefill", "decode", "greedy", "rewards", "score", "masks", "train", "bfloat16", "critic"],
)
def test_a_run_goes_on_bit_for_bit_from_where_a_signal_cut_its_step_short(
    tmp_path, optimizers, changes, hook, at, saved
):
    config = config_for(tmp_path, "whole", **({"steps": 4} | changes))
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    optimizers.clear()
    outcome, (calls,) = interrupted(train, stopped, lambda patch: in_third_step(patch, *hook, at))
    assert (outcome.status, outcome.steps, len(calls)) == ("interrupted", 2, at)
    assert (tmp_path / "stopped" / "checkpoints" / "latest").read_text() == f"{saved}\n"
    assert optimizers
    assert all(not optimizer.grad.any() for optimizer in optimizers)
    assert train(replace(stopped, resume=stopped.run_dir)).status == "finished"
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    begun = " and the rollout of the next" if "update" in saved else ""
    assert what_stopped(resumed, whole) == f"Stopped by SIGINT after step 2{begun}; saving."
    assert resumed == whole


@pytest.fixture
def heard():
    """Hangups are not ignored, whoever started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_what_schedulers_and_closed_terminals_send_saves_as_ctrl_c_does(tmp_path, number, heard):
    before = signal.getsignal(number)
    config = config_for(tmp_path, "stopped", steps=4)

    def patching(patch):
        calls = []
        in_step(patch, 2, lambda run: calls.append(arrives_in(patch, Policy, "hidden", 1, number)))
        return calls

    outcome, _ = interrupted(train, config, patching)
    assert (outcome.status, outcome.steps) == ("interrupted", 1)
    said = [line["message"] for line in lines(tmp_path / "stopped" / "warnings.jsonl")]
    assert f"Stopped by {number.name} after step 1 and the rollout of the next; saving." in said
    assert signal.getsignal(number) is (signal.SIG_IGN if number == signal.SIGHUP else before)


def test_a_hangup_that_was_ignored_before_still_is_as_under_nohup(tmp_path, heard):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    config = config_for(tmp_path, "whole", steps=2)
    patching = lambda patch: [arrives_in(patch, Policy, "hidden", 1, signal.SIGHUP)]  # noqa: E731
    outcome, (calls,) = interrupted(train, config, patching)
    assert (outcome.status, outcome.steps) == ("finished", 2)
    assert len(calls) > 1


def test_after_a_hangup_nothing_is_written_to_the_terminal_that_is_gone_and_a_second_one_stops_nothing():
    """In a process of its own, whose terminal is closed under it."""
    master, terminal = pty.openpty()
    code = (
        "import os, signal, sys, time\n"
        "from fastrl.monitor.interrupt import Interrupt, Interrupted\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "interrupt = Interrupt()\n"
        "with interrupt.listening():\n"
        "    print('ready', flush=True)\n"
        "    while not interrupt: time.sleep(0.01)\n"
        "    print('saving', flush=True)\n"
        "    open(sys.argv[1], 'w').write(interrupt.signal.name)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "saved"
        process = subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=terminal, stderr=terminal)
        os.close(terminal)
        assert os.read(master, 5) == b"ready"
        os.close(master)
        while process.poll() is None:  # the kernel sends one, the shell another, at any time until the end
            process.send_signal(signal.SIGHUP)
            time.sleep(0.01)
        assert process.returncode == 0
        assert place.read_text() == "SIGHUP"


def test_output_to_a_terminal_that_is_gone_is_dropped_also_where_no_hangup_tells_of_it():
    """As of a job that its shell has disowned."""
    master, terminal = pty.openpty()
    code = (
        "import sys\n"
        "from fastrl.monitor.interrupt import Interrupt\n"
        "with Interrupt().listening():\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    for _ in range(3):\n"
        "        print('a line', flush=True)\n"
        "        print('a line', file=sys.stderr)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert os.read(master, 5) == b"ready"
    os.close(master)
    process.communicate(b"go on\n", timeout=60)
    assert process.returncode == 0


def test_a_pipe_that_nobody_reads_is_an_error_as_ever():
    class Pipe(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    with redirect_stdout(Pipe()) as out, pytest.raises(BrokenPipeError), Interrupt().listening():
        print("a line", flush=True)
    assert out.getvalue() == "a line\n"


def test_the_first_signal_is_answered_at_once_and_the_second_ends_what_hangs(tmp_path):
    """In a process of its own, which hangs in a reward."""
    code = (
        "import sys, time\n"
        "from fastrl.monitor.interrupt import Interrupt\n"
        "with Interrupt().listening():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline() == "Stopping at the next safe point; once more stops at once.\n"
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert rest.endswith("KeyboardInterrupt\n")
    assert "safe point" not in rest


def test_a_live_display_shows_the_answer_in_the_place_of_standard_error(tmp_path, capfd):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    log = RunLog(tmp_path, total_steps=5, console=console, clock=FakeClock())
    with log.interrupt.listening():
        with log.stage("rollout"):
            assert HEARD not in shown(console, log)
            signal.raise_signal(signal.SIGINT)
            assert HEARD in shown(console, log)
        log.close("interrupted", {})
    assert capfd.readouterr().err == ""
    again = RunLog(tmp_path, total_steps=5, console=console, clock=FakeClock())
    with again.interrupt.listening():
        with again.stage("rollout"):
            pass
        again.close("finished", {})  # its display is gone by now
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == f"\n{HEARD}\n"


def shown(console, log):
    """What the live display would draw now."""
    with console.capture() as capture:
        console.print(log._screen._status())
    return capture.get()


def test_where_standard_error_is_closed_a_signal_is_heard_all_the_same():
    code = (
        "import os, signal\n"
        "from fastrl.monitor.interrupt import Interrupt\n"
        "interrupt = Interrupt()\n"
        "os.close(2)\n"
        "with interrupt.listening():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "print(interrupt.signal.name)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout == "SIGINT\n"


def test_the_second_of_three_updates_that_is_cut_short_is_done_again(tmp_path, optimizers):
    config = config_for(tmp_path, "whole", steps=4, optimizer=OptimizerConfig(lr=1e-2, epochs_per_rollout=3))
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    optimizers.clear()

    def second_update(patch):
        calls, original, updates = [], Learner.step, []

        def step(*args, **kwargs):
            updates.append(1)
            if len(updates) == 3 + 2:
                calls.append(arrives_in(patch, Policy, "hidden", 1))
            return original(*args, **kwargs)

        patch.setattr(Learner, "step", step)
        return calls

    outcome, (calls,) = interrupted(train, stopped, second_update)
    assert (outcome.status, outcome.steps, len(calls)) == ("interrupted", 1, 1)
    assert (tmp_path / "stopped" / "checkpoints" / "latest").read_text() == "step_000001_update_1\n"
    assert not optimizers[0].grad.any()
    assert optimizers[0].steps == 3 + 1
    train(replace(stopped, resume=stopped.run_dir))
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    assert what_stopped(resumed, whole) == "Stopped by SIGINT after step 1 and 1 optimizer steps of the next; saving."
    assert resumed == whole


def test_a_run_that_is_stopped_again_before_it_goes_on_keeps_the_rest_of_its_batch(tmp_path, monkeypatch):
    config = config_for(tmp_path, "whole", steps=4, optimizer=OptimizerConfig(lr=1e-2, epochs_per_rollout=3))
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    original, updates = Learner.step, []

    def step(*args, **kwargs):
        updates.append(1)
        if len(updates) == 3 + 2:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", step)
        train(stopped)
    with monkeypatch.context() as patch:  # before its first step, and before the evaluation that may come first
        arrives_in(patch, loop.resume, "resume_log", 1)
        outcome = train(replace(stopped, resume=stopped.run_dir))
    assert (outcome.status, outcome.steps) == ("interrupted", 1)
    assert (tmp_path / "stopped" / "checkpoints" / "latest").read_text() == "step_000001_update_1\n"
    train(replace(stopped, resume=stopped.run_dir))
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    assert resumed[1:] == whole[1:]


def test_prompts_drawn_for_a_round_of_dynamic_sampling_that_is_cut_short_are_drawn_again(tmp_path):
    rollout = RolloutConfig(prompts_per_step=6, group_size=2, max_new_tokens=2, dynamic_sampling=3)
    rewards = (RewardConfig("trainer.tiny:wanted_words"),)
    config = config_for(tmp_path, "whole", steps=4, rollout=rollout, rewards=rewards)
    train(config)
    assert lines(tmp_path / "whole" / "metrics.jsonl")[2]["dynamic_sampling/rounds"] >= 2
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    arm = partial(in_third_step, owner=TransformersSampler, name="_decode", at=3)  # the rollout's, and two rounds
    outcome, (calls,) = interrupted(train, stopped, arm)
    assert (outcome.status, outcome.steps, len(calls)) == ("interrupted", 2, 3)
    train(replace(stopped, resume=stopped.run_dir))
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    assert what_stopped(resumed, whole) == "Stopped by SIGINT after step 2; saving."
    assert resumed == whole


@pytest.mark.parametrize("step", [0, 2, 4])
def test_an_evaluation_that_is_cut_short_is_done_again_as_a_whole(tmp_path, step):
    """The signal arrives in the sampled part: the greedy one was logged by then, and drew from the random numbers."""
    config = config_for(tmp_path, "whole", steps=4)
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))

    def in_evaluation(patch):
        calls, original = [], OnPrompts.run

        def evaluate(evaluation, learner, log, at):
            if at == step:
                calls.append(arrives_in(patch, TransformersSampler, "_decode", 2, signal.SIGTERM))
            return original(evaluation, learner, log, at)

        patch.setattr(OnPrompts, "run", evaluate)
        return calls

    outcome, (calls,) = interrupted(train, stopped, in_evaluation)
    assert (outcome.status, outcome.steps, len(calls)) == ("interrupted", step, 2)
    kept = [line["step"] for line in lines(tmp_path / "stopped" / "evaluations.jsonl")] if step else []
    assert sorted(set(kept)) == list(range(0, step, 2))
    assert train(replace(stopped, resume=stopped.run_dir)).status == "finished"
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    assert what_stopped(resumed, whole) == f"Stopped by SIGTERM after step {step}; saving."
    assert resumed == whole


def test_rewards_that_fail_in_the_second_part_of_an_evaluation_leave_nothing_of_the_first(tmp_path, monkeypatch):
    config = config_for(tmp_path, "whole", steps=4)
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))

    def failing(patch):
        original, calls = OnPrompts.run, []

        def finish(*args):
            calls.append(1)
            if len(calls) == 2:
                raise RewardFailure("no judge at home")
            return finished(*args)

        def evaluate(evaluation, learner, log, step):
            if step == 2:
                patch.setattr(call, "_finish", finish)
            return original(evaluation, learner, log, step)

        finished = call._finish
        patch.setattr(OnPrompts, "run", evaluate)
        return calls

    outcome, _ = interrupted(train, stopped, failing)
    assert (outcome.status, outcome.steps) == ("rewards failed", 2)
    train(replace(stopped, resume=stopped.run_dir))
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    assert what_stopped(resumed, whole) == "Evaluation after step 2: no judge at home"
    assert resumed == whole


@pytest.mark.parametrize(
    ("algorithm", "hook", "at"),
    [
        ("dpo", (Policy, "hidden"), 2),
        ("aot", (Policy, "hidden"), 5),  # in the second pass
        ("kto", (Policy, "score"), 2),  # in the pass over other prompts' answers
        ("kto", (Policy, "hidden"), 5),
        ("sft", (Policy, "hidden"), 1),
        ("reward_model", (ScalarModel, "scores"), 2),
    ],
)
def test_an_offline_step_that_is_cut_short_is_done_again_bit_for_bit(tmp_path, optimizers, algorithm, hook, at):
    changes = {"dtype": "bfloat16", "save_every": 4, "rows_per_step": 6, "max_tokens_per_microbatch": 24}
    config = offline_config(tmp_path, algorithm, run_dir=str(tmp_path / "whole"), **changes)
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    optimizers.clear()
    patching = partial(in_third_step, owner=hook[0], name=hook[1], at=at)
    outcome, (calls,) = interrupted(train, stopped, patching)
    assert (outcome.status, outcome.steps, len(calls)) == ("interrupted", 2, at)
    assert len(optimizers) == 1
    assert not optimizers[0].grad.any()
    assert train(replace(stopped, resume=stopped.run_dir)).status == "finished"
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    assert what_stopped(resumed, whole) == "Stopped by SIGINT after step 2; saving."
    assert resumed == whole


@pytest.mark.parametrize("algorithm", ["dpo", "kto", "sft", "reward_model"])
def test_an_offline_evaluation_that_is_cut_short_is_done_again(tmp_path, algorithm):
    changes = {"save_every": 4, "eval": EvalConfig(every=2), "max_tokens_per_microbatch": 24}
    config = offline_config(tmp_path, algorithm, run_dir=str(tmp_path / "whole"), **changes)
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))

    def in_evaluation(patch):
        calls, original = [], OnRows.run

        def evaluate(evaluation, learner, log, step):
            if step == 2:
                owner, name = (ScalarModel, "scores") if algorithm == "reward_model" else (Policy, "hidden")
                calls.append(arrives_in(patch, owner, name, 2))
            original(evaluation, learner, log, step)

        patch.setattr(OnRows, "run", evaluate)
        return calls

    outcome, (calls,) = interrupted(train, stopped, in_evaluation)
    assert (outcome.status, outcome.steps, len(calls)) == ("interrupted", 2, 2)
    train(replace(stopped, resume=stopped.run_dir))
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    assert what_stopped(resumed, whole) == "Stopped by SIGINT after step 2; saving."
    assert resumed == whole


def test_a_reference_that_is_cut_short_is_asked_again_and_the_run_goes_on_from_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "AT_ONCE", 4)
    config = offline_config(tmp_path, "dpo", run_dir=str(tmp_path / "whole"), save_every=4)
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    outcome, calls = interrupted(train, stopped, lambda patch: arrives_in(patch, Policy, "score", 3))
    assert (outcome.status, outcome.steps, len(calls)) == ("interrupted", 0, 3)
    assert not (tmp_path / "stopped" / "reference").exists()
    train(replace(stopped, resume=stopped.run_dir))
    whole, resumed = (everything(tmp_path / name, "step_000004") for name in ("whole", "stopped"))
    assert what_stopped(resumed, whole) == "Stopped by SIGINT after step 0; saving."
    assert resumed == whole


def test_the_next_step_does_not_pay_for_what_was_cut_short(tmp_path):
    """A run whose clock moves by an hour in the rollout that is discarded."""
    config = config_for(tmp_path, steps=4)
    with pytest.MonkeyPatch.context() as patch:
        now, original = [0.0], TransformersSampler._step

        def slow(*args):
            now[0] += 3600.0
            signal.raise_signal(signal.SIGINT)
            return original(*args)

        patch.setattr(loop, "RunLog", partial(loop.RunLog, clock=lambda: now[0]))
        in_step(patch, 3, lambda run: patch.setattr(TransformersSampler, "_step", slow))
        assert train(config).status == "interrupted"
    train(replace(config, resume=config.run_dir))
    third = lines(tmp_path / "run" / "metrics.jsonl")[2]
    assert third["time"] > 3600.0
    assert third["step_time"] < 600.0
    assert third["time/rollout"] < 600.0
