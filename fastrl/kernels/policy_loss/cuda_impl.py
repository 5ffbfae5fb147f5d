"""The policy loss in one launch, or three where the spec looks at whole sequences; csrc/cuda/policy_loss.cu."""

from __future__ import annotations

from functools import lru_cache

import torch

from fastrl import check
from fastrl.kernels.cuda import DTYPES, address, extension, launch, scratch
from fastrl.kernels.group_advantages import cuda_impl as group_advantages
from fastrl.kernels.group_advantages.cuda_impl import rewards_of_groups
from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.native import dense
from fastrl.kernels.policy_loss.metrics import METRICS, merge_metrics
from fastrl.kernels.policy_loss.native import spec_arguments
from fastrl.spec import Gmpo, PolicyLoss

__all__ = ["METRICS", "forward", "forward_from_rewards", "merge_metrics"]


@lru_cache
def packed_spec(spec: PolicyLoss, device: torch.device) -> object:
    """The spec as the extension reads it."""
    return extension(device).PolicySpec(*spec_arguments(spec))


def forward(
    logps: torch.Tensor,
    tokens: LossTokens,
    entropy: torch.Tensor | None,
    seq_ids: torch.Tensor | None,
    num_seqs: int,
    spec: PolicyLoss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, dlogps (N,), dentropy (N,), metrics (K, 2): the contract is in `fastrl.kernels.policy_loss`.

    Where the spec looks at whole sequences, the tokens of each lie together, in the order of the ids.
    """
    no_rewards = extension(logps.device).GroupRewards(DTYPES[logps.dtype], 0, 0, 0, 0, 0, 0.0)
    return _run((logps, *tokens, entropy, seq_ids), num_seqs, spec, no_rewards)


def forward_from_rewards(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    tokens: LossTokens,
    entropy: torch.Tensor | None,
    seq_ids: torch.Tensor,
    spec: PolicyLoss,
    *,
    baseline: str,
    scale: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`forward` with the `group_advantages` of the sequences' rewards, in the same launch.

    Args: rewards and group_ids (S,), one per sequence; `tokens` without advantages; seq_ids (N,) in [0, S), also for a
    separable spec; scale "group" or "none", because the spread of the batch is known only when every advantage is.
    """
    check.choice("policy_loss", "scale", scale, ("group", "none"))
    if isinstance(spec.surrogate, Gmpo):  # what it clips depends on the advantages, so these come first
        advantages = group_advantages.forward(rewards, group_ids, baseline, scale, eps).to(logps.dtype)
        return forward(logps, tokens._replace(advantages=advantages[seq_ids]), entropy, seq_ids, len(rewards), spec)
    x, group = dense(rewards.to(logps.dtype)), dense(group_ids)
    return _run((logps, *tokens, entropy, seq_ids), len(x), spec, rewards_of_groups(x, group, baseline, scale, eps))


def _run(
    given: tuple[torch.Tensor | None, ...], num_seqs: int, spec: PolicyLoss, rewards: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = tuple(map(dense, given))
    logps, device = inputs[0], inputs[0].device
    loss, table = logps.new_empty(()), logps.new_empty(len(METRICS), 2)
    dlogps, dentropy = torch.empty_like(logps), torch.empty_like(logps)
    module = extension(device)
    call = module.PolicyLossCall(
        packed_spec(spec, device),
        DTYPES[logps.dtype],
        len(logps),
        *map(address, inputs),
        num_seqs,
        *map(address, (loss, dlogps, dentropy, table)),
    )
    memory = scratch(module.policy_loss_scratch(call), device)
    launch("policy_loss", device, call, rewards, address(memory))
    return loss, dlogps, dentropy, table
