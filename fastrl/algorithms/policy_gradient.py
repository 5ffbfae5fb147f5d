"""The policy loss of one micro-batch, which every algorithm that samples shares."""

from __future__ import annotations

import torch

from fastrl.losses.linear_policy import linear_policy_loss
from fastrl.model.policy import Policy
from fastrl.spec import PolicyLoss
from fastrl.types import LossOutput, MicroBatch

Part = tuple[list[MicroBatch], float]  # the micro-batches of one optimizer step, and what their loss is divided by


def policy_gradient_loss(
    policy: Policy,
    batch: MicroBatch,
    spec: PolicyLoss,
    normalizer: float,
    *,
    temperature: float,
    entropy: bool,
    hidden: torch.Tensor | None = None,
) -> LossOutput:
    """One micro-batch's share of the step's loss, from hidden states, with its metrics.

    `hidden` is `policy.hidden(batch)`, for a caller that has it already. Where the head's weight has a `main_grad`, its
    gradient is there when this returns.
    """
    if spec.aggregate == "prompt_mean":  # a group may lie in several micro-batches
        normalizer = normalizer * batch.group_tokens
    weight = policy.head.weight
    return linear_policy_loss(
        policy.hidden(batch) if hidden is None else hidden,
        weight,
        batch.targets,
        batch.advantages,
        spec,
        mask=batch.mask,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        sampling_logps=batch.sampling_logps,
        group_ids=batch.group_ids,
        normalizer=normalizer,
        cu_seqlens=batch.cu_seqlens,
        bias=policy.head.bias,
        temperature=temperature,
        softcap=policy.head.softcap,
        logit_scale=policy.head.logit_scale,
        main_grad=getattr(weight, "main_grad", None) if spec.separable else None,
        entropy=entropy,
        backend=policy.backend,
    )
