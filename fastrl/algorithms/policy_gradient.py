"""The policy loss of one micro-batch, which every algorithm that samples shares."""

from __future__ import annotations

import torch

from fastrl.losses.aggregate import token_weights
from fastrl.losses.linear_policy import linear_policy_loss
from fastrl.losses.token_masks import kl_cov_penalty
from fastrl.model.policy import Policy
from fastrl.ops.linear_token_loss import linear_token_loss
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
    to_sampler: bool = False,
    hidden: torch.Tensor | None = None,
) -> LossOutput:
    """One micro-batch's share of the step's loss, from hidden states, with its metrics.

    With `to_sampler` the ratio is to `sampling_logps` instead of `old_logps`; its metrics tell how far the sampler is.
    What the batch asks for beside the policy loss, `held` and `nll_weights`, is added. `hidden` is
    `policy.hidden(batch)`, for a caller that has it already. Where the head's weight has a `main_grad`, its gradient by
    the policy loss is there when this returns.
    """
    if spec.aggregate == "prompt_mean":  # a group may lie in several micro-batches
        normalizer = normalizer * batch.group_tokens
    weight = policy.head.weight
    hidden = policy.hidden(batch) if hidden is None else hidden
    old_logps = batch.sampling_logps if to_sampler else batch.old_logps
    out = linear_policy_loss(
        hidden,
        weight,
        batch.targets,
        batch.advantages,
        spec,
        mask=batch.mask,
        old_logps=old_logps,
        ref_logps=batch.ref_logps,
        sampling_logps=None if to_sampler else batch.sampling_logps,
        group_ids=batch.group_ids,
        normalizer=normalizer,
        cu_seqlens=batch.cu_seqlens,
        temperature=temperature,
        main_grad=getattr(weight, "main_grad", None) if spec.separable else None,
        entropy=entropy,
        backend=policy.backend,
        **policy.head.options,
    )
    if batch.held is not None and old_logps is not None:  # else the distance is 0, and so is its gradient
        out = _plus(out, _held(policy, hidden, batch, spec, normalizer, old_logps, temperature))
    if batch.nll_weights is not None:
        out = _plus(out, _nll(policy, hidden, batch, temperature))
    return out


def _plus(one: LossOutput, other: LossOutput) -> LossOutput:
    return LossOutput(one.loss + other.loss, one.metrics | other.metrics)


def _held(
    policy: Policy,
    hidden: torch.Tensor,
    batch: MicroBatch,
    spec: PolicyLoss,
    normalizer: float | torch.Tensor,
    old_logps: torch.Tensor,
    temperature: float,
) -> LossOutput:
    """KL-Cov's penalty, from the few rows that it is about."""
    selected = batch.held != 0
    weights = token_weights(
        batch.mask, spec.aggregate, normalizer=normalizer, group_ids=batch.group_ids, cu_seqlens=batch.cu_seqlens
    )
    logps = policy.outputs(hidden[selected], batch.targets[selected], temperature=temperature).logps
    old_logps, every = old_logps[selected], torch.ones_like(logps, dtype=torch.bool)
    loss = kl_cov_penalty(logps, old_logps, every, (weights * batch.held)[selected])
    distance = (logps.detach() - old_logps).abs().sum()
    return LossOutput(loss, {"masks/held_distance": (distance, selected.sum().to(distance.dtype))})


def _nll(policy: Policy, hidden: torch.Tensor, batch: MicroBatch, temperature: float) -> LossOutput:
    """sum_t w_t (-log pi_t) with the weights that the batch brings."""
    head = policy.head
    out = linear_token_loss(
        hidden,
        head.weight,
        batch.targets,
        torch.neg,
        weights=batch.nll_weights,
        temperature=temperature,
        backend=policy.backend,
        **head.options,
    )
    total, count = out.metrics["logps"]
    return LossOutput(out.loss, {"positive_nll": (-total, count.to(total.dtype))})
