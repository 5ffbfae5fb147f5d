"""Policy gradients: from a batch of rewarded groups to optimizer steps, and the policy loss of a micro-batch.

`group_policy_gradient.py` and `ppo.py` have what differs between these algorithms, mainly the advantages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from fastrl.algorithms.base import Learner
from fastrl.algorithms.masks import TokenMasks, masked
from fastrl.check import require
from fastrl.data.pack import Counts, count, minibatches
from fastrl.distributed import World
from fastrl.losses.aggregate import token_weights
from fastrl.losses.linear_policy import linear_policy_loss
from fastrl.losses.metrics import Metrics, mismatch
from fastrl.losses.token_masks import kl_cov_penalty
from fastrl.model.policy import Policy
from fastrl.model.scalar import Critic
from fastrl.ops.linear_token_loss import linear_token_loss
from fastrl.progress import Progress, Watch, tracked, unseen
from fastrl.spec import PolicyLoss
from fastrl.types import Batch, Group, LossOutput, MicroBatch

if TYPE_CHECKING:
    from fastrl.algorithms.offline import Answers

# (log-probabilities (N,) with gradient, micro-batch) -> (N,), added to the loss of each token.
LossTerm = Callable[[torch.Tensor, MicroBatch], torch.Tensor]


class Part(NamedTuple):
    """One optimizer step's share of a batch."""

    batches: list[MicroBatch]
    normalizer: float  # divisor of the loss
    label: str = ""
    only_critic: bool = False
    ptx: Answers | None = None  # PPO-ptx's pretraining rows

    def share(self, world: World) -> Part:
        """As `Step`."""
        return self._replace(batches=world.share(self.batches), ptx=self.ptx and self.ptx.share(world))


@dataclass(frozen=True)
class Schedule:
    """How often, and on which parts, a batch is trained on."""

    updates: int = 1  # optimizer steps per pass over the batch, each on its own part of it
    epochs: int = 1  # passes over the batch
    mask_truncated: bool = False  # leave completions that hit the length limit out of loss and normaliser
    filter_zero_variance: bool = False  # leave groups without a gradient out of the normaliser too
    critic_warmup: int = 0  # first training steps in which only the critic learns


@dataclass(frozen=True)
class PolicyGradient:
    """Everything but the advantages.

    Subclasses define the `advantages` of samples, the `contributing` groups, the `normalizer`, what to `estimate` once
    the samples are scored, and the `losses` of a micro-batch.
    """

    spec: PolicyLoss
    kind: ClassVar[str] = "rewarded"
    masks: TokenMasks = field(default_factory=TokenMasks, kw_only=True)
    ratio_to_sampler: bool = field(default=False, kw_only=True)
    """The ratio is to the sampler's log-probabilities, not to the trainer's under the same weights."""
    schedule: Schedule = field(default_factory=Schedule, kw_only=True)
    terms: tuple[LossTerm, ...] = field(default=(), kw_only=True)
    """Added to the loss of each token, with the token's weight."""
    sampled: bool = field(default=True, kw_only=True)
    """Whether completions come with their sampler's log-probabilities."""

    def updates(self, learner: Learner, batch: Batch, watch: Watch) -> Iterator[Part]:
        """As `Algorithm`. Advantages, parts and estimates are recomputed from the groups, so they are never saved."""
        plan = self.schedule
        require(batch.kind == self.kind, type(self).__name__, "groups", "completions with rewards", batch.kind)
        self.advantages(batch.groups)
        batch.contributing = self.contributing(batch.groups)  # the rest have a gradient of exactly zero
        counted = batch.contributing if plan.filter_zero_variance else batch.groups
        with watch.stage("pack"):
            order = torch.Generator().manual_seed(batch.seed)
            parts = [self._part(learner, groups) for groups in minibatches(counted, plan.updates, order)]
        with watch.stage("score", "micro-batches") as progress:
            # Not needed with one update, where the policy is still the rollout's, nor with a ratio to the sampler.
            old = (len(parts) * plan.epochs > 1 and not self.ratio_to_sampler) or self.needs_old
            parts = [part for part in parts if part.batches]
            if not batch.scored:
                scored = iter(learner.score([one for part in parts for one in part.batches], progress, old=old))
                parts = [part._replace(batches=[*islice(scored, len(part.batches))]) for part in parts]
            parts, numbers = self.estimate(parts)
        batch.numbers |= numbers
        batch.scored = True
        every = parts * plan.epochs
        for done, part in islice(enumerate(every), len(batch.updates), None):
            label = f" of update {done + 1}/{len(every)}" if len(every) > 1 else ""
            yield part._replace(label=label, only_critic=learner.steps < plan.critic_warmup)
        self.observe(parts, numbers)

    def accumulate(
        self, learner: Learner, part: Part, progress: Progress = unseen
    ) -> tuple[torch.Tensor, list[Metrics]]:
        """As `Algorithm`. The normaliser covers the whole step, so every split into micro-batches gives the same
        gradient."""
        batches, metrics, policy = part.batches, [], None if part.only_critic else learner.policy
        selects = self.masks.on and policy is not None  # in a separate pass
        if policy is not None:
            # Checkpoints keep the number of updates, so a resumed run draws the same tokens.
            options = {
                "temperature": learner.temperature,
                "ratio_to_sampler": self.ratio_to_sampler,
                "seed": learner.updates,
            }
            batches, noted = masked(policy, batches, self.masks, self.spec, **options, progress=progress)
            metrics.append(noted)
        loss = 0.0
        for batch in tracked(batches, progress, before=len(batches) if selects else 0):
            options = {"temperature": learner.temperature, "entropy": True}
            for out in self.losses(policy, learner.critic, batch, part.normalizer, **options):
                out.loss.backward()
                loss = loss + out.loss.detach()
                metrics.append(out.metrics)
        return loss, metrics

    def _part(self, learner: Learner, groups: Sequence[Group]) -> Part:
        cut = self.schedule.mask_truncated
        batches = learner.pack(self.contributing(groups), mask_truncated=cut)
        return Part(batches, self.normalizer(count(groups, mask_truncated=cut)))

    def advantages(self, groups: Sequence[Group]) -> None:
        """Sets `Sample.advantage` of every sample."""
        raise NotImplementedError

    def contributing(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that can have a gradient."""
        raise NotImplementedError

    def normalizer(self, counts: Counts) -> float:
        """The divisor of an optimizer step's loss, counted before the split into micro-batches."""
        raise NotImplementedError

    def estimate(self, parts: Sequence[Part]) -> tuple[list[Part], dict[str, float]]:
        """The parts unchanged, and no numbers: their advantages came with the rewards."""
        return list(parts), {}

    def observe(self, parts: Sequence[Part], numbers: Mapping[str, float]) -> None:
        """Called with the numbers of `estimate` after a batch was trained on, to adapt to it; does nothing here."""

    def losses(
        self,
        policy: Policy | None,
        critic: Critic | None,
        batch: MicroBatch,
        normalizer: float,
        *,
        temperature: float,
        entropy: bool,
    ) -> Iterator[LossOutput]:
        """One micro-batch's shares of the loss. Backpropagate each before asking for the next."""
        raise NotImplementedError

    @property
    def needs_old(self) -> bool:
        """Never: before the first update the policy is still the rollout's."""
        return False

    @property
    def needs_critic(self) -> bool:
        """Never: the other samples of a prompt are the baseline."""
        return False

    @property
    def needs_greedy(self) -> bool:
        """Not by default."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


def policy_gradient_loss(
    policy: Policy,
    batch: MicroBatch,
    spec: PolicyLoss,
    normalizer: float,
    *,
    temperature: float,
    entropy: bool,
    ratio_to_sampler: bool = False,
    hidden: torch.Tensor | None = None,
    terms: Sequence[LossTerm] = (),
) -> LossOutput:
    """One micro-batch's share of the step's loss, from hidden states, with its metrics.

    With `ratio_to_sampler` the ratio is to `sampling_logps` instead of `old_logps`; its metrics then show the distance
    to the sampler. The terms for the batch's `kl_cov_weights` and `nll_weights` are added. `hidden` is
    `policy.hidden(batch)`, if the caller has it already. If the head's weight has a `main_grad`, the policy loss's
    gradient is already in it on return. A batch with a `support` is scored under it.
    """
    if spec.aggregate == "prompt_mean":  # a group may lie in several micro-batches
        normalizer = normalizer * batch.group_tokens
    weight = policy.head.weight
    hidden = policy.hidden(batch) if hidden is None else hidden
    old_logps = batch.sampling_logps if ratio_to_sampler else batch.old_logps
    tokens: dict[str, Any] = {
        "mask": batch.mask,
        "old_logps": old_logps,
        "ref_logps": batch.ref_logps,
        "sampling_logps": None if ratio_to_sampler else batch.sampling_logps,
        "group_ids": batch.group_ids,
        "normalizer": normalizer,
        "cu_seqlens": batch.cu_seqlens,
        "backend": policy.backend,
    }
    out = linear_policy_loss(
        hidden,
        weight,
        batch.targets,
        batch.advantages,
        spec,
        temperature=temperature,
        support=batch.support,
        main_grad=getattr(weight, "main_grad", None) if spec.separable else None,
        entropy=entropy,
        **tokens,
        **policy.head.options,
    )
    before = batch.old_logps if batch.old_logps is not None else out.logps
    if batch.sampling_logps is not None and before is not None:
        out = out._replace(metrics=out.metrics | mismatch(before, batch.sampling_logps, batch.mask))
    if batch.kl_cov_weights is not None and old_logps is not None:  # else distance and gradient are 0
        out = _plus(out, _kl_cov(policy, hidden, batch, spec, normalizer, old_logps, temperature))
    if batch.nll_weights is not None:
        out = _plus(out, _nll(policy, hidden, batch, temperature))
    if terms:
        out = _plus(out, _own(policy, hidden, batch, spec, normalizer, temperature, terms))
    return out


def _own(
    policy: Policy,
    hidden: torch.Tensor,
    batch: MicroBatch,
    spec: PolicyLoss,
    normalizer: float | torch.Tensor,
    temperature: float,
    terms: Sequence[LossTerm],
) -> LossOutput:
    """The caller's custom terms, with the token weights of the policy loss."""
    weights = token_weights(
        batch.mask, spec.aggregate, normalizer=normalizer, group_ids=batch.group_ids, cu_seqlens=batch.cu_seqlens
    )
    logps = policy.of(hidden, batch, temperature=temperature).logps
    loss, metrics = 0.0, {}
    for term in terms:
        values, name = term(logps, batch), getattr(term, "__name__", type(term).__name__)
        require(
            values.shape == logps.shape, name, "the result", f"one number per token, {tuple(logps.shape)}", values.shape
        )
        loss = loss + (weights * values).sum()
        metrics[f"loss/{name}"] = ((values.detach() * batch.mask).sum(), batch.mask.sum().to(values.dtype))
    return LossOutput(loss, metrics)


def _plus(one: LossOutput, other: LossOutput) -> LossOutput:
    return LossOutput(one.loss + other.loss, one.metrics | other.metrics)


def _kl_cov(
    policy: Policy,
    hidden: torch.Tensor,
    batch: MicroBatch,
    spec: PolicyLoss,
    normalizer: float | torch.Tensor,
    old_logps: torch.Tensor,
    temperature: float,
) -> LossOutput:
    """KL-Cov's penalty, computed on the few selected rows."""
    selected = batch.kl_cov_weights != 0
    weights = token_weights(
        batch.mask, spec.aggregate, normalizer=normalizer, group_ids=batch.group_ids, cu_seqlens=batch.cu_seqlens
    )
    if batch.support is None:
        logps = policy.outputs(hidden[selected], batch.targets[selected], temperature=temperature).logps
    else:  # only the rows of the mask are computed
        logps = policy.of(hidden, replace(batch, mask=selected), temperature=temperature).logps[selected]
    old_logps, every = old_logps[selected], torch.ones_like(logps, dtype=torch.bool)
    loss = kl_cov_penalty(logps, old_logps, every, (weights * batch.kl_cov_weights)[selected])
    distance = (logps.detach() - old_logps).abs().sum()
    return LossOutput(loss, {"masks/kl_cov_distance": (distance, selected.sum().to(distance.dtype))})


def _nll(policy: Policy, hidden: torch.Tensor, batch: MicroBatch, temperature: float) -> LossOutput:
    """sum_t w_t (-log pi_t) with w = `batch.nll_weights`."""
    head = policy.head
    out = linear_token_loss(
        hidden,
        head.weight,
        batch.targets,
        torch.neg,
        weights=batch.nll_weights,
        temperature=temperature,
        support=batch.support,
        backend=policy.backend,
        **head.options,
    )
    total, count = out.metrics["logps"]
    return LossOutput(out.loss, {"positive_nll": (-total, count.to(total.dtype))})
