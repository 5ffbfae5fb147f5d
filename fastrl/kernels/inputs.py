"""What kernels are given together: the head, what is known of its tokens, and what a policy loss takes of each."""

from __future__ import annotations

from typing import NamedTuple

import torch


class HeadInputs(NamedTuple):
    """Checked, flattened arguments of an op that contains the LM head."""

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    targets: torch.Tensor  # (N,) int64
    bias: torch.Tensor | None  # (V,)
    temperature: torch.Tensor  # (1,) or (N,), in the accumulation dtype
    softcap: float  # NO_SOFTCAP when there is none
    logit_scale: float
    ignore_index: int


class Read(NamedTuple):
    """What `linear_logprob` gives: its two results, and what its backward pass reads beside them; (0,) when unused."""

    logps: torch.Tensor  # (N,)
    entropy: torch.Tensor  # (N,) or (0,)
    lse: torch.Tensor  # (2, N), or (N,) of the reference
    saved: torch.Tensor
    saved_entropy: torch.Tensor
    summaries: torch.Tensor  # (3, N): log sum_v p_v^2, the mean finished logit, 1.0 where the target is the argmax


class Needs(NamedTuple):
    """Which of the head's tensors get a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class LossTokens(NamedTuple):
    """What a policy loss takes of each token besides its log-probability and entropy, (N,) or None."""

    advantages: torch.Tensor | None  # None where they follow from rewards, in the same kernel
    weights: torch.Tensor
    mask: torch.Tensor
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    sampling_logps: torch.Tensor | None
