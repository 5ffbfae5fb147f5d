"""The training loop, which is the picture of the data flow:

prompts -> rollout -> rewards -> advantages -> drop what cannot contribute -> pack -> score (old, ref) -> loss -> step
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch

from fastrl import env
from fastrl.data.pack import minibatches
from fastrl.model.policy import score_old_and_ref
from fastrl.rewards import RewardFailure
from fastrl.rollout.collect import collect
from fastrl.trainer.checkpoint import save_model
from fastrl.trainer.config import TrainConfig
from fastrl.trainer.doctor import environment
from fastrl.trainer.evaluate import evaluate
from fastrl.trainer.log import RunLog
from fastrl.trainer.optimizer import MasterOptimizer
from fastrl.trainer.report import write_report
from fastrl.trainer.setup import Run, prepare
from fastrl.trainer.step import NonFiniteLoss, optimise
from fastrl.trainer.summary import step_metrics


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str  # finished, interrupted, diverged or rewards failed
    steps: int  # completed
    before: dict[str, float]  # evaluation name -> accuracy on held-out prompts
    after: dict[str, float]
    report: Path


def train(config: TrainConfig) -> Outcome:
    """Trains as `config` says and returns how it ended. Nothing is written until model, prompts and rewards are ready.

    Raises:
        ValueError: something in the configuration cannot work; the message says what.
    """
    run = prepare(config)
    directory = run.directory
    log = RunLog(directory, total_steps=config.steps, show_every=config.show_every)
    log.start(asdict(config), environment())
    with _interruptible() as interrupt:
        before = evaluate(run, log, step=0)
        status, steps = _steps(run, log, interrupt)
        after = evaluate(run, log, step=steps) if status == "finished" else {}
    with log.stage("save"):
        env.return_freed_memory()
        save_model(run.policy.model, run.tokenizer, directory / "model")
    report = write_report(directory)
    log.close(status, {"before": before, "after": after, "steps": steps, "report": str(report)})
    return Outcome(status, steps, before, after, report)


def _steps(run: Run, log: RunLog, interrupt: list[int]) -> tuple[str, int]:
    """Every step of the run; returns (status, completed steps)."""
    config = run.config
    optimizer = MasterOptimizer(run.policy.model.parameters(), config.optimizer, config.steps)
    for step in range(1, config.steps + 1):
        try:
            _step(run, log, optimizer, step)
        except NonFiniteLoss as error:
            path = error.save(run.directory)
            log.warn(f"Step {step}: {error}. Nothing was updated; the batch is in {path}.")
            return "diverged", step - 1
        except FloatingPointError as error:  # the sampler met logits that are not finite
            log.warn(f"Step {step}: {error}")
            return "diverged", step - 1
        except RewardFailure as error:
            log.warn(f"Step {step}: {error}")
            return "rewards failed", step - 1
        if config.save_every and step % config.save_every == 0:
            with log.stage("save"):
                save_model(run.policy.model, run.tokenizer, run.directory / "checkpoints" / f"step_{step:06d}")
        if config.eval.every and step % config.eval.every == 0 and step < config.steps:
            evaluate(run, log, step=step)
        if interrupt:
            log.warn(f"Stopped by {signal.Signals(interrupt[0]).name} after step {step}; saving.")
            return "interrupted", step
    return "finished", config.steps


def _step(run: Run, log: RunLog, optimizer: MasterOptimizer, step: int) -> None:
    """One rollout batch, from prompts to updated weights."""
    config, algorithm, temperature = run.config, run.algorithm, run.config.rollout.temperature

    with log.stage("rollout"):
        env.return_freed_memory()  # neither are the activations of training a shape for the rollout
        prompts = run.prompts.next(config.rollout.prompts)
        params = run.sampling(seed=config.seed + step)
        groups = collect(prompts, run.sampler, run.tokenizer, config.rollout.samples, params)
        env.return_freed_memory()  # nor the caches of the rollout one for training
    with log.stage("reward"):
        for failure in run.rewards.score(groups):
            log.warn(f"Step {step}: {failure}")
    algorithm.advantages(groups)
    contributing = algorithm.contributing(groups)  # the others have a gradient of exactly zero
    counted = contributing if config.loss.filter_zero_variance else groups
    with log.stage("pack"):
        order = torch.Generator().manual_seed(config.seed + step)
        parts = [
            (run.pack(algorithm.contributing(part)), algorithm.normalizer(run.count(part)))
            for part in minibatches(counted, config.optimizer.steps_per_rollout, order)
        ]
    with log.stage("score"):
        off_policy = len(parts) > 1
        parts = [
            (
                score_old_and_ref(run.policy, run.reference, batches, temperature=temperature, old=off_policy),
                normalizer,
            )
            for batches, normalizer in parts
            if batches
        ]
    with log.stage("train"):
        updates = [
            optimise(run.policy, optimizer, algorithm, batches, normalizer, temperature=temperature)
            for batches, normalizer in parts
        ]
    # The sampler runs the very weights that were just updated, so there is nothing to publish.
    log.step(step, step_metrics(groups, contributing, updates))
    log.completions(step, groups)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM asks the loop to stop after the current step; the second stops at once."""
    asked: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
