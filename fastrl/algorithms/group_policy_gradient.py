"""GRPO and its variants: advantages relative to the other samples of a prompt, then one policy loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import torch

from fastrl.advantages import GroupAdvantage
from fastrl.algorithms.masks import require_token_advantages
from fastrl.algorithms.policy_gradient import PolicyGradient, policy_gradient_loss
from fastrl.check import require
from fastrl.data.pack import Counts, own_tokens
from fastrl.model.policy import Policy
from fastrl.types import Group, LossOutput, MicroBatch, Sample


@dataclass(frozen=True)
class Estimator:
    """A function of `fastrl.advantages`, called with (B,) rewards and group ids, and the other inputs it reads."""

    function: Callable[..., torch.Tensor]
    lengths: bool = False  # also the number of tokens that the policy wrote of each completion
    each_reward: bool = False  # (B, K) rewards and the recipe's (K,) weights, instead of their sum
    greedy: bool = False  # the reward of each prompt's greedy completion, instead of the group ids


@dataclass(frozen=True)
class GroupPolicyGradient(PolicyGradient):
    """An advantage estimator and a loss; the group-relative algorithms of `ALGORITHMS` are such pairs."""

    estimator: GroupAdvantage | Estimator
    max_new_tokens: int = 0  # the constant length that `token_sum` divides by: Dr. GRPO, arXiv:2503.20783
    reward_weights: tuple[float, ...] = ()  # in the order of `Sample.rewards`, for estimators with `each_reward`
    turn_discount: float | None = None  # credit by turn, with this discount; None: by completion

    def __post_init__(self) -> None:
        self.masks.require_fits(self.spec)
        if self.turn_discount is None:
            return
        op, name, estimator = "GroupPolicyGradient", "turn_discount", self.estimator
        reads = isinstance(estimator, Estimator) and (estimator.lengths or estimator.each_reward or estimator.greedy)
        require(
            not reads, op, name, "None for an estimator that reads more than rewards and groups", self.turn_discount
        )
        require_token_advantages(op, name, self.spec, self.masks)

    @property
    def needs_ref(self) -> bool:
        """True when the loss reads the reference's log-probabilities."""
        return self.spec.needs_ref

    @property
    def needs_greedy(self) -> bool:
        """True when the baseline is each prompt's greedy completion, `Group.greedy_reward`."""
        return isinstance(self.estimator, Estimator) and self.estimator.greedy

    def advantages(self, groups: Sequence[Group]) -> None:
        """Sets `Sample.advantage` of every sample. Samples without a reward get 0 and enter no baseline."""
        if self.turn_discount is not None:
            self._credit_turns(groups, self.turn_discount)
            return
        samples = [sample for group in groups for sample in group.samples]
        rewards = torch.tensor([_number(sample.reward) for sample in samples], dtype=torch.float64)
        group_ids = torch.tensor([index for index, group in enumerate(groups) for _ in group.samples])
        result = self._estimate(groups, samples, rewards, group_ids)
        for sample, advantage in zip(samples, result.tolist(), strict=True):
            sample.advantage = advantage

    def _credit_turns(self, groups: Sequence[Group], discount: float) -> None:
        """Sets `Sample.turn_advantages`: the estimator on the return of each turn, G_ik = r_ik + discount G_i,k+1.

        Turn k is compared with turn k of the prompt's other samples, as far as they got there: a discounted return per
        turn as in arXiv:2511.14846, and the baseline of the return from turn k on, which the policy's choices from k on
        do not move. Baselines of each turn's own reward, added up over the turns that a sample took, would favour short
        conversations (https://github.com/verl-project/verl/issues/7244).
        """
        returns: list[float] = []
        turns: dict[tuple[int, int], int] = {}  # a group of samples in one turn -> its id
        group_ids: list[int] = []
        samples = [(index, sample) for index, group in enumerate(groups) for sample in group.samples]
        for index, sample in samples:
            rewards = sample.turn_rewards or [float("nan")]  # it was not scored
            to_go = accumulate(reversed(rewards), lambda later, reward: reward + discount * later)
            returns += reversed([*to_go])
            group_ids += [turns.setdefault((index, turn), len(turns)) for turn in range(len(rewards))]
        values = torch.tensor(returns, dtype=torch.float64)
        of = {"group_ids": torch.tensor(group_ids)}
        function = self.estimator if isinstance(self.estimator, GroupAdvantage) else self.estimator.function
        result = iter(function(values, **of).tolist())
        for _, sample in samples:
            sample.turn_advantages = [*islice(result, len(sample.turn_rewards or [0.0]))]
            sample.advantage = sample.turn_advantages[0]  # of all that follows

    def _estimate(
        self, groups: Sequence[Group], samples: Sequence[Sample], rewards: torch.Tensor, group_ids: torch.Tensor
    ) -> torch.Tensor:
        if isinstance(self.estimator, GroupAdvantage):
            return self.estimator(rewards, group_ids=group_ids)
        if self.estimator.greedy:
            greedy = [_number(group.greedy_reward) for group in groups for _ in group.samples]
            return self.estimator.function(rewards, torch.tensor(greedy, dtype=torch.float64))
        inputs: dict[str, torch.Tensor] = {"group_ids": group_ids}
        if self.estimator.lengths:
            inputs["lengths"] = torch.tensor([own_tokens(sample) for sample in samples])
        if self.estimator.each_reward:
            inputs["weights"] = torch.tensor(self.reward_weights, dtype=torch.float64)
            each = [[_number(reward) for reward in sample.rewards.values()] for sample in samples]
            unscored = rewards.isnan()[:, None]  # one reward failed, so the rest cannot stand for the sum
            rewards = torch.tensor(each, dtype=torch.float64).masked_fill(unscored, torch.nan)
        return self.estimator.function(rewards, **inputs)

    def contributing(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that can have a gradient: with a KL, entropy or custom term all, else those with an advantage.

        A group whose rewards are all equal has advantages of exactly 0 and costs neither forward nor backward pass.
        """
        if self.needs_ref or self.spec.needs_entropy or self.terms:
            return list(groups)
        return [group for group in groups if any(map(_has_advantage, group.samples))]

    def normalizer(self, counts: Counts) -> float:
        """The loss's divisor, counted over a whole optimizer step before the split into micro-batches."""
        per_sequence = counts.sequences
        return float(
            {
                "token_mean": counts.tokens,
                "prompt_mean": counts.groups,
                "seq_mean_token_mean": per_sequence,
                "seq_mean_token_sum": per_sequence,
                "token_sum": per_sequence * self.max_new_tokens,
            }[self.spec.aggregate]
        )

    def losses(
        self, policy: Policy, critic: None, batch: MicroBatch, normalizer: float, *, temperature: float, entropy: bool
    ) -> Iterator[LossOutput]:
        """As `policy_gradient_loss`."""
        options: dict[str, Any] = {"temperature": temperature, "entropy": entropy}
        options["ratio_to_sampler"] = self.ratio_to_sampler
        batch = batch if self.sampled else replace(batch, sampling_logps=None)
        yield policy_gradient_loss(policy, batch, self.spec, normalizer, terms=self.terms, **options)


def _has_advantage(sample: Sample) -> bool:
    return any(value != 0.0 for value in sample.turn_advantages or (sample.advantage,))


def _number(reward: float | None) -> float:
    return float("nan") if reward is None else reward
