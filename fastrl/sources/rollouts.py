"""Fresh completions: prompts, a sampler and rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastrl.algorithms.base import Kind, Learner
from fastrl.data.sampler import PromptSampler
from fastrl.progress import Watch
from fastrl.rewards import RewardFailure, RewardSuite
from fastrl.sources.collect import Judge, Sampling, judged, mean_reward
from fastrl.types import Batch, Group, Prompt


@dataclass
class Rollouts:
    """Completions of the next prompts under the current weights.

    Args:
        refills: DAPO's dynamic sampling, arXiv:2503.14476 eq. 11: up to this many times a step, new prompts replace
            those whose rewards are all equal; 0 is off.
        greedy: give every group the reward of its prompt's greedy completion, for estimators that read it.
        seed: seed of the run; step s samples with seed + s.
    """

    prompts: PromptSampler[Prompt]
    sampling: Sampling
    rewards: RewardSuite
    number: int = 8  # prompts per step
    samples: int = 8  # completions per prompt
    refills: int = 0
    greedy: bool = False
    seed: int = 0
    total_steps: int = 0
    kind: ClassVar[Kind] = "rewarded"
    replays: ClassVar[bool] = False

    def next(self, learner: Learner, watch: Watch) -> Batch:
        """As `Source`.

        Raises:
            RewardFailure: rewards failed on too many completions, or no reward applies to any of them.
        """
        step = learner.steps + 1
        batch = Batch([], seed=self.seed + step)
        self.sampling.engine.version = learner.updates
        judge = Judge(self.rewards, step, self.total_steps, batch.numbers)
        groups = judged(self.prompts.next(self.number), self.samples, batch.seed, self.sampling, judge, watch)
        batch.numbers |= self.prompts.observe(groups)
        batch.groups = self._refilled(groups, batch, judge, watch) if self.refills else groups
        _require_rewards(batch, judge)
        if self.greedy:
            self._baseline(batch, judge, watch)
        for sample in (sample for group in batch.groups for sample in group.samples):
            if sample.versions is None:  # of a sampler that does not record them
                sample.versions = [learner.updates] * len(sample.token_ids)
        return batch

    def publish(self, learner: Learner) -> None:
        """Does nothing: the sampler shares the weights that were just updated."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompts."""
        return self.prompts.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `Source`."""
        self.prompts.load_state_dict(state)

    def _refilled(self, groups: Sequence[Group], batch: Batch, judge: Judge, watch: Watch) -> list[Group]:
        """The same number of groups, with new ones in place of those whose rewards are all equal.

        A round draws as many new prompts as are missing. If some are still missing at the end, the first groups set
        aside fill the batch up; their gradient is zero. Reports the `rounds` taken, the `groups` sampled in all, and
        `reward`, the mean over all of them: the kept groups alone do not measure the policy.
        """
        sampled, taken = list(groups), 0
        while taken < self.refills and (missing := len(groups) - sum(map(rewards_differ, sampled))) > 0:
            taken += 1
            # A different seed for each round of the step.
            fresh = judged(
                self.prompts.next(missing),
                self.samples,
                batch.seed + (taken << 32),
                self.sampling,
                judge,
                watch,
                units=(f"tokens of round {taken + 1}", "rewards"),
            )
            batch.numbers |= self.prompts.observe(fresh)
            sampled += fresh
        report = {"rounds": float(taken), "groups": float(len(sampled)), "reward": mean_reward(sampled)}
        batch.numbers |= {f"dynamic_sampling/{name}": value for name, value in report.items()}
        return sorted(sampled, key=rewards_differ, reverse=True)[: len(groups)]  # stable: keeps the order of rounds

    def _baseline(self, batch: Batch, judge: Judge, watch: Watch) -> None:
        """Fills in `Group.greedy_reward` and reports the mean."""
        units, about = ("tokens of greedy completions", "rewards"), f"Step {judge.step}, greedy"
        prompts, sampling = [group.prompt for group in batch.groups], self.sampling.greedy()
        greedy = judged(prompts, 1, batch.seed, sampling, judge, watch, units=units, about=about)
        for group, other in zip(batch.groups, greedy, strict=True):
            group.greedy_reward = other.samples[0].reward
        batch.numbers["greedy/reward"] = mean_reward(greedy)


def _require_rewards(batch: Batch, judge: Judge) -> None:
    """Refuses a batch to which no reward applies. Failed rewards are the suite's business.

    Raises:
        RewardFailure: all rewards of all completions are None, and none failed.
    """
    samples = [sample for group in batch.groups for sample in group.samples]
    if not judge.failures and all(sample.reward is None for sample in samples):
        raise RewardFailure(
            f"{' and '.join(judge.rewards.names)} returned None for all {len(samples)} completions. None means that a "
            "reward does not apply, so there is nothing to learn from. Return a number where it applies."
        )


def rewards_differ(group: Group) -> bool:
    """Whether any two scored samples of a group have different rewards."""
    return len({sample.reward for sample in group.samples if sample.reward is not None}) > 1
