"""Evaluation on held-out prompts or rows, before, during and after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Protocol

from fastrl import env
from fastrl.algorithms.offline import Answers, Objective
from fastrl.data.curriculum import bucket_of, cvar
from fastrl.monitor.log import RunLog
from fastrl.monitor.units import number
from fastrl.progress import Unwatched, tracked
from fastrl.rewards import RewardSuite
from fastrl.sources.collect import Judge, Sampling, judged, mean_reward, pass_at_k
from fastrl.trainer.learner import Learner
from fastrl.types import Group, Prompt

EVALUATION_SEED = 2**40  # far from every training step's seed, and the same for every evaluation
TAIL = 0.1  # share of the buckets in the CVaR, as in WAKER
SHOWN_ROWS = 6  # held-out rows in the report, each measured on its own at every evaluation


class Evaluation(Protocol):
    """A measurement of the current weights."""

    def run(self, learner: Learner, log: RunLog, step: int) -> None:
        """Measures and logs."""
        ...


class Printed(Unwatched):
    """Prints results, if `aloud`, and keeps them by name: rewards under the evaluation's name, pass@k under its own."""

    def __init__(self, *, aloud: bool) -> None:
        self.results: dict[str, float] = {}
        self.aloud = aloud

    def evaluation(self, step: int, name: str, result: dict[str, float], samples: list[Group]) -> None:
        """As `RunLog.evaluation`."""
        if "reward" in result:
            self.results[name] = result["reward"]
            passed = {key: value for key, value in result.items() if key.startswith(("pass@", "reward/"))}
            self.results |= passed
            size = f"{len(samples)} prompts x {len(samples[0].samples)}"
            rest = "".join(f", {key} {number(value)}" for key, value in passed.items())
            line = f"held-out {name}: {number(result['reward'])} over {size}{rest}"
        else:
            values = {key: value for key, value in result.items() if key != "rows"}
            self.results |= values
            shown = ", ".join(f"{key} {number(value)}" for key, value in values.items())
            line = f"held out: {shown}, {result['rows']:.0f} rows"
        if self.aloud:
            print(line)


@dataclass(frozen=True)
class OnPrompts:
    """Mean held-out reward of one greedy completion and of `samples` sampled ones, and pass@k of the sampled ones.

    Sampling uses the training temperature and the same random numbers every time, so two evaluations differ only by
    the weights.

    Args:
        pass_at_k: the values of k.
        threshold: minimum reward of a completion that passes.
        by: columns that name a prompt's bucket; with them, `by_bucket` is reported too.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    rewards: RewardSuite
    samples: int = 1
    total_steps: int = 0
    pass_at_k: tuple[int, ...] = ()
    threshold: float = 0.5
    by: tuple[str, ...] = ()

    def run(self, learner: Learner, log: RunLog, step: int) -> None:
        """As `Evaluation`."""
        modes = {"greedy": (self.sampling.greedy(), 1), "sampled": (self.sampling, self.samples)}
        for name, (sampling, samples) in modes.items():
            numbers: dict[str, float] = {}
            groups = judged(
                self.prompts,
                samples,
                EVALUATION_SEED,
                sampling,
                Judge(self.rewards, step + 1, self.total_steps, numbers),
                log,
                stages=("eval", "eval"),
                units=(f"tokens, {name}", f"rewards, {name}"),
                about=f"Evaluation at step {step}",
            )
            result = {"reward": mean_reward(groups), "prompts": float(len(groups)), **_each(groups), **numbers}
            if name == "sampled":
                result |= {f"pass@{k}": pass_at_k(groups, k, self.threshold) for k in self.pass_at_k}
            if self.by:
                result |= by_bucket(groups, self.by)
            log.evaluation(step, name, result, groups)


def by_bucket(groups: Sequence[Group], by: Sequence[str]) -> dict[str, float]:
    """The mean reward of each bucket, their mean and the CVaR_0.1 over buckets, which weighs all buckets the same.

    WAKER's robustness measure, arXiv:2306.09205 section 5. A bucket without a scored sample is NaN, and so are both.
    """
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(bucket_of(group.prompt, by), []).append(group)
    rewards = {name: mean_reward(found[name]) for name in sorted(found)}
    values = list(rewards.values())
    overall = {"reward/mean_of_buckets": fmean(values), f"reward/cvar_{TAIL}": cvar(values, TAIL)}
    return overall | {f"reward/{name}": value for name, value in rewards.items()}


def _each(groups: Sequence[Group]) -> dict[str, float]:
    """The mean of each reward, where there are several: one of weight 0 is only watched."""
    values: dict[str, list[float]] = {}
    for name, value in (pair for group in groups for sample in group.samples for pair in sample.rewards.items()):
        values.setdefault(name, []).extend([] if value is None else [value])
    return {f"rewards/{name}": fmean(of) for name, of in values.items() if of} if len(values) > 1 else {}


@dataclass(frozen=True)
class OnRows:
    """An objective's measurements on all held-out rows together, and on a few of them one by one."""

    rows: Sequence[Group]
    objective: Objective
    kind: str

    def run(self, learner: Learner, log: RunLog, step: int) -> None:
        """As `Evaluation`."""
        with log.stage("eval", "micro-batches") as progress:
            env.return_freed_memory()
            values = self.objective.measure(learner.policy, Answers.of(learner, self.rows), progress)
        with log.stage("eval", "rows by themselves") as progress:
            shown = [self._judged(learner, group) for group in tracked(self.rows[:SHOWN_ROWS], progress)]
        log.evaluation(step, self.kind, values | {"rows": float(len(self.rows))}, shown)
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss on the held-out rows is {values['loss']}. Lower optimizer.lr.")

    def _judged(self, learner: Learner, group: Group) -> Group:
        """The group with the objective's measurements on it alone in place of its rewards.

        Accuracy is left out: on one pair it is only the sign of the margin, which before training is rounding error.
        So is anything not finite: a single labelled answer has no margin.
        """
        values = self.objective.measure(learner.policy, Answers.of(learner, [group]))
        kept = {name: value for name, value in values.items() if name != "accuracy" and math.isfinite(value)}
        return replace(group, samples=[replace(sample, rewards=kept) for sample in group.samples])
