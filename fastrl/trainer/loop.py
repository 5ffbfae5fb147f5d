"""The training loop, which is the picture of the data flow:

prompts -> rollout -> rewards -> advantages -> drop what cannot contribute -> pack
        -> score (old, ref, critic's values) -> estimate (GAE, with a critic) -> select tokens -> loss -> step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastrl import env
from fastrl.data.pack import minibatches
from fastrl.model.adapter import merged
from fastrl.progress import tracked
from fastrl.rewards import RewardFailure
from fastrl.rollout.collect import collect
from fastrl.trainer.batch import RolloutBatch
from fastrl.trainer.checkpoint import has_checkpoint, save_model
from fastrl.trainer.config import TrainConfig
from fastrl.trainer.doctor import environment
from fastrl.trainer.dynamic_sampling import refill
from fastrl.trainer.evaluate import evaluate, mean_reward
from fastrl.trainer.interrupt import Interrupted
from fastrl.trainer.lock import only_writer
from fastrl.trainer.log import RunLog
from fastrl.trainer.optimizer import MasterOptimizer
from fastrl.trainer.report import write_report
from fastrl.trainer.resume import back_to, how_to, position, reached, restore, resume_log, save
from fastrl.trainer.setup import Run, make_optimizers, prepare
from fastrl.trainer.step import NonFiniteLoss, optimise
from fastrl.trainer.summary import step_metrics
from fastrl.types import Group

if TYPE_CHECKING:
    from fastrl.trainer.resume import AnyConfig, AnyRun

Optimizers = dict[str, MasterOptimizer]  # by the name of their file in a checkpoint


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

    With `config.resume` it goes on in that run's directory, and what follows is what would have followed.

    Raises:
        ValueError: something in the configuration cannot work; the message says what.
    """
    run = prepare(config)
    config = run.config  # with what `auto` stands for
    with only_writer(run.directory, config) as directory:
        run = replace(run, directory=directory)
        optimizers = make_optimizers(run)
        done, batch = restore(run, optimizers) if run.resumed else (0, None)
        log = RunLog(directory, total_steps=config.steps, show_every=config.show_every)
        about = environment() | {"speed": run.speed.about()}
        log.start(asdict(replace(config, resume="")), about, trackers=config.log_to, done=done)
        if run.resumed:
            resume_log(run, log, done, batch)
        for message in [] if run.resumed else (*run.speed.warnings(), *run.said):
            log.warn(message)
        with log.interrupt.listening():
            status, steps = _steps(run, log, optimizers, done, batch)
        return conclude(run, log, status, steps)


def conclude(run: AnyRun, log: RunLog, status: str, steps: int) -> Outcome:
    """Saves what was trained, writes the report and closes the log."""
    with log.stage("save"):
        env.return_freed_memory()
        save_result(run)
    before, after = log.evaluated(0), log.evaluated(steps) if status == "finished" else {}
    report = write_report(run.directory)
    again = {"resume": how_to(run.directory)} if status != "finished" and has_checkpoint(run.directory) else {}
    log.close(status, {"before": before, "after": after, "steps": steps, "report": str(report)} | again)
    return Outcome(status, steps, before, after, report)


def save_result(run: AnyRun) -> None:
    """Writes what was trained to the run's directory; an adapter alone, or merged into its model."""
    for name, model in run.models().items():
        whole = model is run.adapted and run.config.adapter.save == "merged"
        save_model(merged(run.adapted) if whole else model, run.tokenizer, run.directory / name)


def _steps(run: Run, log: RunLog, optimizers: Optimizers, done: int, batch: RolloutBatch | None) -> tuple[str, int]:
    """Every step after the first `done`, of which `batch` is the next one's when it has begun.

    Returns (status, completed steps).
    """
    config = run.config
    while True:
        trains, at, start = False, f"Evaluation after step {done}", position(run, log)
        try:
            log.interrupt.check()
            if evaluates(config, done) and not log.evaluated(done):
                evaluate(run, log, step=done)
            log.interrupt.check()
            if done == config.steps:
                return "finished", done
            trains, at, start = True, f"Step {done + 1}", position(run, log)
            batch = _step(run, log, optimizers, done + 1, batch)
        except Interrupted as signal:
            back_to(run, log, start)
            log.warn(f"Stopped by {signal} after {reached(done, batch)}; saving.")
            save_or_warn(run, log, optimizers, done, batch=batch)
            return "interrupted", done
        except NonFiniteLoss as error:
            path = error.save(run.directory)
            log.warn(f"{at}: {error}. Nothing was updated; the batch is in {path}.")
            return "diverged", done
        except FloatingPointError as error:  # the sampler met logits that are not finite
            log.warn(f"{at}: {error}")
            return "diverged", done
        except RewardFailure as error:  # the weights are those of the step before, and a judge may be repaired
            if not trains and not done:
                raise  # nothing was trained that could be lost
            back_to(run, log, start)
            log.warn(f"{at}: {error}")
            save_or_warn(run, log, optimizers, done, batch=batch)
            return "rewards failed", done
        if batch is None:
            done += 1
            if config.save_every and (done % config.save_every == 0 or done == config.steps):
                save_or_warn(run, log, optimizers, done)


def evaluates(config: AnyConfig, step: int) -> bool:
    """Whether a run is evaluated after `step` steps."""
    return step in (0, config.steps) or bool(config.eval.every and step % config.eval.every == 0)


def save_or_warn(run: AnyRun, log: RunLog, optimizers: Optimizers, step: int, **where: Any) -> None:
    """A checkpoint after `step` steps; one that cannot be written costs neither the run nor the one before it."""
    try:
        with log.stage("save"):
            env.return_freed_memory()
            save(run, optimizers, log, step, **where)
    except OSError as error:
        log.warn(f"The checkpoint after step {step} could not be written: {error}. Earlier ones are as they were.")


def _step(run: Run, log: RunLog, optimizers: Optimizers, step: int, batch: RolloutBatch | None) -> RolloutBatch | None:
    """One rollout batch, from prompts to updated weights, or the rest of one that an interrupt had cut short.

    Returns the batch if it is interrupted once its completions have their rewards: what it lacks is done again.
    """
    batch = batch or _rollout(run, log, step)
    while batch.parts or not batch.scored:
        start = position(run, log)
        try:
            if batch.scored:
                _update(run, log, optimizers, step, batch)
            else:
                _score(run, log, batch)
        except Interrupted:
            back_to(run, log, start)
            return batch
    # The sampler runs the very weights that were just updated, so there is nothing to publish.
    log.step(step, step_metrics(batch.groups, batch.contributing, batch.updates) | batch.numbers)
    log.completions(step, batch.groups)
    return None


def _rollout(run: Run, log: RunLog, step: int) -> RolloutBatch:
    """Completions of the next prompts, with rewards, and packed."""
    config, algorithm = run.config, run.algorithm

    with log.stage("rollout", "tokens") as progress:
        env.return_freed_memory()  # neither are the activations of training a shape for the rollout
        prompts = run.prompts.next(config.rollout.prompts)
        params = run.sampling(seed=config.seed + step)
        groups = collect(prompts, run.sampler, run.tokenizer, config.rollout.samples, params, progress)
        env.return_freed_memory()  # nor the caches of the rollout one for training
    with log.stage("reward", "rewards") as progress:
        for failure in run.rewards.score(groups, progress=progress):
            log.warn(f"Step {step}: {failure}")
    groups, sampled = refill(run, log, step, groups)
    if algorithm.needs_greedy:
        sampled |= _score_greedy(run, log, step, groups)
    algorithm.advantages(groups)
    contributing = algorithm.contributing(groups)  # the others have a gradient of exactly zero
    counted = contributing if config.loss.filter_zero_variance else groups
    with log.stage("pack"):
        order = torch.Generator().manual_seed(config.seed + step)
        parts = [
            (run.pack(algorithm.contributing(part)), algorithm.normalizer(run.count(part)))
            for part in minibatches(counted, config.optimizer.steps_per_rollout, order)
        ]
    return RolloutBatch(groups, contributing, parts, sampled)


def _score(run: Run, log: RunLog, batch: RolloutBatch) -> None:
    """What the algorithm reads of the weights that sampled the completions, and what it estimates from it."""
    config, algorithm, epochs = run.config, run.algorithm, run.config.optimizer.epochs_per_rollout
    with log.stage("score", "micro-batches") as progress:
        # With one update the policy is that of the rollout, and a ratio to the sampler has its numbers from it.
        old = (len(batch.parts) * epochs > 1 and not algorithm.to_sampler) or algorithm.needs_old
        options = {"old": old, "temperature": config.rollout.temperature}
        rest = tracked([one for batches, _ in batch.parts for one in batches], progress)
        parts = [
            ([run.score(one, **options) for one in islice(rest, len(batches))], normalizer)
            for batches, normalizer in batch.parts
            if batches
        ]
        parts, numbers = algorithm.estimate(parts)
    batch.parts, batch.numbers, batch.scored = parts * epochs, batch.numbers | numbers, True


def _update(run: Run, log: RunLog, optimizers: Optimizers, step: int, batch: RolloutBatch) -> None:
    """One optimizer step, on the first of the batch's parts."""
    done, total = len(batch.updates), len(batch.updates) + len(batch.parts)
    with log.stage("train", "micro-batches" + (f" of update {done + 1}/{total}" if total > 1 else "")) as progress:
        batches, normalizer = batch.parts[0]
        update = optimise(
            run.policy,
            run.critic,
            optimizers,
            run.algorithm,
            batches,
            normalizer,
            temperature=run.config.rollout.temperature,
            only_critic=step <= run.config.ppo.critic_warmup,
            progress=progress,
        )
        batch.updates.append(update)
        del batch.parts[0]


def _score_greedy(run: Run, log: RunLog, step: int, groups: Sequence[Group]) -> dict[str, float]:
    """Fills in `greedy_reward`, the reward of the prompt's greedy completion, of each group; returns their mean."""
    with log.stage("rollout", "tokens of greedy completions") as progress:
        prompts, params = [group.prompt for group in groups], run.greedy(seed=run.config.seed + step)
        greedy = collect(prompts, run.sampler, run.tokenizer, 1, params, progress)
        env.return_freed_memory()
    with log.stage("reward", "rewards") as progress:
        for failure in run.rewards.score(greedy, progress=progress):
            log.warn(f"Step {step}, greedy: {failure}")
    for group, other in zip(groups, greedy, strict=True):
        group.greedy_reward = other.samples[0].reward
    return {"greedy/reward": mean_reward(greedy)}
