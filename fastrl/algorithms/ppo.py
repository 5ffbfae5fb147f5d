"""PPO with a critic: GAE over a reward at every token, a clipped policy loss and a clipped value loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastrl.advantages import kl_in_reward, whiten
from fastrl.algorithms.policy_gradient import policy_gradient_loss
from fastrl.check import require
from fastrl.losses.value import value_loss
from fastrl.model.policy import Policy
from fastrl.ops.gae import gae
from fastrl.spec import PolicyLoss
from fastrl.types import LossOutput, MicroBatch


class KLController:
    """The weight of the KL in the reward: fixed, or adapted so that the KL of a sequence approaches a target.

    coef <- coef (1 + clip(KL / target - 1, -0.2, 0.2) sequences / horizon): arXiv:1909.08593 section 2.2, in the form
    of its reference code.
    """

    def __init__(self, coef: float, *, target: float | None = None, horizon: int = 10_000) -> None:
        require(coef >= 0.0, "KLController", "coef", "at least 0", coef)
        require(target is None or target > 0.0, "KLController", "target", "above 0, or None", target)
        require(horizon >= 1, "KLController", "horizon", "at least 1", horizon)
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, sequences: int) -> None:
        """After a rollout of `sequences` with a mean KL of `kl` nats a sequence."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * sequences / self.horizon


@dataclass(frozen=True)
class ActorCritic:
    """PPO, arXiv:1707.06347, as RLHF uses it, arXiv:2203.02155: section 1.3 of both papers' formulas in one place.

    r_t = -kl_coef (old_logps_t - ref_logps_t) + [t is the last token] score
    A, R = gae(r, V), A whitened over the valid tokens of the rollout
    loss = policy loss(A) + value_coef 0.5 max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2)
    """

    spec: PolicyLoss
    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.1
    value_clip: float | None = 0.2
    whiten: bool = True

    def estimate(self, batches: Sequence[MicroBatch], kl_coef: float) -> list[MicroBatch]:
        """The micro-batches of a whole rollout with token `advantages` and `returns`, from scores, logps and values.

        Whitening takes mean and deviation over all of them, so that it does not depend on how they were packed.
        """
        estimated = []
        for batch in batches:
            ref = batch.old_logps if batch.ref_logps is None else batch.ref_logps
            rewards = kl_in_reward(batch.scores, batch.old_logps, ref, batch.mask, kl_coef, batch.cu_seqlens)
            advantages, returns = gae(
                rewards, batch.values, batch.mask, gamma=self.gamma, lam=self.lam, cu_seqlens=batch.cu_seqlens
            )
            estimated.append(replace(batch, advantages=advantages, returns=returns))
        if not self.whiten or not estimated:
            return estimated
        flat = whiten(torch.cat([b.advantages for b in estimated]), torch.cat([b.mask for b in estimated]))
        parts = flat.split([len(batch.mask) for batch in estimated])
        return [replace(batch, advantages=part) for batch, part in zip(estimated, parts, strict=True)]

    def loss(
        self, policy: Policy, batch: MicroBatch, normalizer: float, *, temperature: float, entropy: bool
    ) -> LossOutput:
        """As `policy_gradient_loss`."""
        return policy_gradient_loss(policy, batch, self.spec, normalizer, temperature=temperature, entropy=entropy)

    def value_loss(self, values: torch.Tensor, batch: MicroBatch, normalizer: float) -> LossOutput:
        """One micro-batch's share of the value loss, `value_coef` in it; the metrics are those of `value_loss`."""
        out = value_loss(
            values, batch.values, batch.returns, mask=batch.mask, clip=self.value_clip, normalizer=normalizer
        )
        return LossOutput(self.value_coef * out.loss, out.metrics)
