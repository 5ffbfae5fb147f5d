"""Fresh completions: prompts, an engine and rewards."""

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
    """Some completions of the next prompts, under the weights as they are.

    Args:
        refills: DAPO's dynamic sampling, arXiv:2503.14476 eq. 11: up to so many times a step, new prompts take the
            place of those whose rewards are all equal; 0 is off.
        greedy: give every group the reward of its prompt's greedy completion, for estimators that read it.
        seed: of the whole run; step s samples with seed + s.
    """

    prompts: PromptSampler[Prompt]
    sampling: Sampling
    rewards: RewardSuite
    number: int = 8  # prompts of a step
    samples: int = 8  # completions of a prompt
    refills: int = 0
    greedy: bool = False
    seed: int = 0
    total_steps: int = 0
    kind: ClassVar[Kind] = "rewarded"
    replays: ClassVar[bool] = False

    def next(self, learner: Learner, watch: Watch) -> Batch:
        """As `Source`.

        Raises:
            RewardFailure: rewards failed on too many completions, or none of them applies to any.
        """
        step = learner.steps + 1
        batch = Batch([], seed=self.seed + step)
        judge = Judge(self.rewards, step, self.total_steps, batch.numbers)
        groups = judged(self.prompts.next(self.number), self.samples, batch.seed, self.sampling, judge, watch)
        batch.groups = self._refilled(groups, batch, judge, watch) if self.refills else groups
        _require_rewards(batch, judge)
        if self.greedy:
            self._baseline(batch, judge, watch)
        for sample in (sample for group in batch.groups for sample in group.samples):
            sample.versions = [learner.updates] * len(sample.token_ids)
        return batch

    def publish(self, learner: Learner) -> None:
        """Nothing: the engine runs the very weights that were just updated."""

    def state_dict(self) -> dict[str, Any]:
        """Where the prompts are."""
        return self.prompts.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `Source`."""
        self.prompts.load_state_dict(state)

    def _refilled(self, groups: Sequence[Group], batch: Batch, judge: Judge, watch: Watch) -> list[Group]:
        """As many groups, new ones in the place of those whose rewards are all equal.

        A round draws as many new prompts as are missing. What is missing still is filled up with the first groups that
        were set aside, so the batch keeps its size; their gradient is zero. Reported are the `rounds` taken, the
        `groups` sampled in all, and `reward`, the mean over all of these, because that of the groups that are kept does
        not measure the policy.
        """
        sampled, taken = list(groups), 0
        while taken < self.refills and (missing := len(groups) - sum(map(rewards_differ, sampled))) > 0:
            taken += 1
            # From other random numbers than those of the step's other rounds.
            sampled += judged(
                self.prompts.next(missing),
                self.samples,
                batch.seed + (taken << 32),
                self.sampling,
                judge,
                watch,
                units=(f"tokens of round {taken + 1}", "rewards"),
            )
        report = {"rounds": float(taken), "groups": float(len(sampled)), "reward": mean_reward(sampled)}
        batch.numbers |= {f"dynamic_sampling/{name}": value for name, value in report.items()}
        return sorted(sampled, key=rewards_differ, reverse=True)[: len(groups)]  # stable: in the order of their rounds

    def _baseline(self, batch: Batch, judge: Judge, watch: Watch) -> None:
        """Fills in `Group.greedy_reward`, and reports their mean."""
        units, about = ("tokens of greedy completions", "rewards"), f"Step {judge.step}, greedy"
        prompts, sampling = [group.prompt for group in batch.groups], self.sampling.greedy()
        greedy = judged(prompts, 1, batch.seed, sampling, judge, watch, units=units, about=about)
        for group, other in zip(batch.groups, greedy, strict=True):
            group.greedy_reward = other.samples[0].reward
        batch.numbers["greedy/reward"] = mean_reward(greedy)


def _require_rewards(batch: Batch, judge: Judge) -> None:
    """Refuses a batch to which no reward applies. What failed is the suite's to weigh.

    Raises:
        RewardFailure: all rewards of all completions are None, and none failed.
    """
    samples = [sample for group in batch.groups for sample in group.samples]
    if not judge.failures and all(sample.reward is None for sample in samples):
        raise RewardFailure(
            f"{' and '.join(judge.rewards.names)} returned None for all {len(samples)} completions. None says that a "
            "reward does not apply, so there is nothing to learn from. Return a number where it does apply."
        )


def rewards_differ(group: Group) -> bool:
    """Whether two of a group's scored samples have different rewards, be they 0 and 1 or not."""
    return len({sample.reward for sample in group.samples if sample.reward is not None}) > 1
