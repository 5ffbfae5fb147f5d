"""Held-out prompts, greedily and sampled, before, during and after training."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from fastrl.check import require
from fastrl.rollout.base import SamplingParams
from fastrl.rollout.collect import collect
from fastrl.trainer.config import TrainConfig
from fastrl.trainer.log import RunLog
from fastrl.trainer.setup import Run, prepare
from fastrl.types import Group

EVALUATION_SEED = 2**40  # far from every training step's seed, and the same at every evaluation


def evaluate(run: Run, log: RunLog, *, step: int) -> dict[str, float]:
    """Mean held-out reward of one greedy completion and of `eval.samples` sampled ones; empty without held-out prompts.

    Sampling uses the training temperature and the same random numbers every time, so that two evaluations differ by
    the weights only.
    """
    if not run.held_out:
        return {}
    results = {}
    for name, params, samples in _modes(run):
        with log.stage("eval", f"tokens, {name}") as progress:
            groups = collect(run.held_out, run.sampler, run.tokenizer, samples, params, progress)
        with log.stage("eval", f"rewards, {name}") as progress:
            for failure in run.rewards.score(groups, progress=progress):
                log.warn(f"Evaluation at step {step}: {failure}")
        results[name] = mean_reward(groups)
        log.evaluation(step, name, {"reward": results[name], "prompts": float(len(groups))}, groups)
    return results


def _modes(run: Run) -> tuple[tuple[str, SamplingParams, int], ...]:
    greedy, sampled = run.greedy(seed=EVALUATION_SEED), run.sampling(seed=EVALUATION_SEED)
    return ("greedy", greedy, 1), ("sampled", sampled, run.config.eval.samples)


def mean_reward(groups: list[Group]) -> float:
    """Mean over the samples that could be scored."""
    rewards = [sample.reward for group in groups for sample in group.samples if sample.reward is not None]
    return fmean(rewards) if rewards else float("nan")


def evaluate_model(config: TrainConfig) -> dict[str, float]:
    """Held-out reward of `config.model` on the recipe's task, printed; writes nothing.

    The held-out prompts are those of a training run with the same task, seed and size.

    Raises:
        ValueError: the recipe holds nothing out.
    """
    require(config.task.held_out > 0, "evaluate_model", "task.held_out", "at least 1", config.task.held_out)
    run = prepare(replace(config, resume=""), trains=False)
    run.speed.show()
    for message in run.said:
        print(message)
    results = {}
    for name, params, samples in _modes(run):
        groups = collect(run.held_out, run.sampler, run.tokenizer, samples, params)
        for failure in run.rewards.score(groups):
            print(failure)
        results[name] = mean_reward(groups)
        print(f"held-out {name}: {results[name]:.3f} over {len(groups)} prompts x {samples}")
    return results
