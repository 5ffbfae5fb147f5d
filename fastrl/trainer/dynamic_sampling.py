"""Dynamic sampling: prompts that teach nothing give way to new ones."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fastrl import env
from fastrl.rollout.collect import collect
from fastrl.trainer.log import RunLog
from fastrl.trainer.setup import Run
from fastrl.types import Group


def refill(run: Run, log: RunLog, step: int, groups: Sequence[Group]) -> tuple[list[Group], dict[str, float]]:
    """Scored groups whose rewards differ, new ones in the place of those whose rewards are all equal: DAPO,
    arXiv:2503.14476 eq. 11.

    A round draws as many new prompts as are missing, at most `rollout.dynamic_sampling` times. What is missing still is
    filled up with the first groups that were set aside, so the batch keeps its size; their gradient is zero. Where the
    setting is 0, the groups are returned as they are and nothing is reported.

    Returns:
        As many groups as there were, and metrics: `rounds` taken, `groups` sampled in all, and `reward`, the mean over
        all of these, because that of the groups that are kept does not measure the policy.
    """
    rounds, sampled, taken = run.config.rollout.dynamic_sampling, list(groups), 0
    if not rounds:
        return sampled, {}
    while taken < rounds and (missing := len(groups) - sum(map(rewards_differ, sampled))) > 0:
        taken += 1
        sampled += _draw(run, log, step, taken, missing)
    kept = sorted(sampled, key=rewards_differ, reverse=True)[: len(groups)]  # stable: in the order of their rounds
    scored = [sample.reward for group in sampled for sample in group.samples if sample.reward is not None]
    reward = fmean(scored) if scored else float("nan")
    report = {"rounds": float(taken), "groups": float(len(sampled)), "reward": reward}
    return kept, {f"dynamic_sampling/{name}": value for name, value in report.items()}


def rewards_differ(group: Group) -> bool:
    """Whether two of a group's scored samples have different rewards, be they 0 and 1 or not."""
    return len({sample.reward for sample in group.samples if sample.reward is not None}) > 1


def _draw(run: Run, log: RunLog, step: int, turn: int, number: int) -> list[Group]:
    """Scored groups of new prompts, from other random numbers than those of the step's other rounds."""
    with log.stage("rollout", f"tokens of round {turn + 1}") as progress:
        params = run.sampling(seed=run.config.seed + step + (turn << 32))
        prompts = run.prompts.next(number)
        groups = collect(prompts, run.sampler, run.tokenizer, run.config.rollout.samples, params, progress)
        env.return_freed_memory()
    with log.stage("reward", "rewards") as progress:
        for failure in run.rewards.score(groups, progress=progress):
            log.warn(f"Step {step}: {failure}")
    return groups
