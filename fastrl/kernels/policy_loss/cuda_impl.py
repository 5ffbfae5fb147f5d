"""The policy loss in one launch, or three where the spec looks at whole sequences; csrc/cuda/policy_loss.cu."""

from __future__ import annotations

from functools import lru_cache

import torch

from fastrl.kernels.cuda import DTYPES, address, extension, launch, scratch
from fastrl.kernels.native import dense
from fastrl.kernels.policy_loss.metrics import METRICS, merge_metrics
from fastrl.kernels.policy_loss.native import spec_arguments
from fastrl.spec import PolicyLoss

__all__ = ["METRICS", "forward", "merge_metrics"]


@lru_cache
def _spec(spec: PolicyLoss, device: torch.device) -> object:
    """The spec as the extension reads it."""
    return extension(device).PolicySpec(*spec_arguments(spec))


def forward(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    old_logps: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    sampling_logps: torch.Tensor | None,
    entropy: torch.Tensor | None,
    seq_ids: torch.Tensor | None,
    num_seqs: int,
    spec: PolicyLoss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, dlogps (N,), dentropy (N,), metrics (K, 2): the contract is in `fastrl.kernels.policy_loss`.

    Where the spec looks at whole sequences, the tokens of each lie together, in the order of the ids.
    """
    inputs = tuple(
        map(dense, (logps, advantages, weights, mask, old_logps, ref_logps, sampling_logps, entropy, seq_ids))
    )
    logps, device = inputs[0], logps.device
    loss, table = logps.new_empty(()), logps.new_empty(len(METRICS), 2)
    dlogps, dentropy = torch.empty_like(logps), torch.empty_like(logps)
    module = extension(device)
    call = module.PolicyLossCall(
        _spec(spec, device),
        DTYPES[logps.dtype],
        len(logps),
        *map(address, inputs),
        num_seqs,
        *map(address, (loss, dlogps, dentropy, table)),
    )
    memory = scratch(module.policy_loss_scratch(call), device)
    launch("policy_loss", device, call, address(memory))
    return loss, dlogps, dentropy, table
