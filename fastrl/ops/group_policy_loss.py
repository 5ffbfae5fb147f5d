"""The operator `fastrl::group_policy_loss`: `group_advantages` and `policy_loss` in one, with no extra CUDA launch."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.kernels import registry
from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.precision import answer
from fastrl.ops.policy_loss import Outputs, fake, register_gradient
from fastrl.spec import decode

SCHEMA = (
    "(Tensor logps, Tensor rewards, Tensor group_ids, Tensor weights, Tensor mask, Tensor? old_logps, "
    "Tensor? ref_logps, Tensor? sampling_logps, Tensor? entropy, Tensor seq_ids, str baseline, str scale, float eps, "
    "str spec, str backend) -> (Tensor loss, Tensor dlogps, Tensor dentropy, Tensor metrics)"
)


@torch.library.custom_op("fastrl::group_policy_loss", mutates_args=(), schema=SCHEMA)
def group_policy_loss(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    old_logps: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    sampling_logps: torch.Tensor | None,
    entropy: torch.Tensor | None,
    seq_ids: torch.Tensor,
    baseline: str,
    scale: str,
    eps: float,
    spec: str,
    backend: str,
) -> Outputs:
    """`fastrl::policy_loss` with the advantages that `fastrl::group_advantages` computes from the sequences' rewards.

    rewards (S,) and group_ids (S,) int64, one per sequence; seq_ids (N,) int64, never decreasing; everything else as in
    `fastrl::policy_loss`. A backend with `forward_from_rewards` does both steps in one launch if that gives the same
    bits. It does not for scale="batch", which needs every advantage first, or if rewards and logps differ in precision.

    Returns:
        As `fastrl::policy_loss`.
    """
    what = decode(spec)
    loss = registry.resolve("policy_loss", backend, logps.device)
    tokens = LossTokens(None, weights, mask, old_logps, ref_logps, sampling_logps)
    at_once = getattr(loss, "forward_from_rewards", None)
    if at_once is not None and scale != "batch" and answer(rewards) == logps.dtype and len(rewards) > 0:
        estimator = {"baseline": baseline, "scale": scale, "eps": eps}
        return at_once(logps, rewards, group_ids, tokens, entropy, seq_ids, what, **estimator)
    groups = registry.resolve("group_advantages", backend, logps.device)
    advantages = groups.forward(rewards, group_ids, baseline, scale, eps).to(logps.dtype)
    if len(rewards) == 0:  # packed tokens may all be padding
        advantages = advantages.new_zeros(1)
    ids, sequences = (None, 0) if what.separable else (seq_ids, len(advantages))
    return loss.forward(logps, tokens._replace(advantages=advantages[seq_ids]), entropy, ids, sequences, what)


@group_policy_loss.register_fake
def _(logps: torch.Tensor, *inputs: Any) -> Outputs:
    return fake(logps)


register_gradient(group_policy_loss, logps=0, entropy=8, inputs=15)
