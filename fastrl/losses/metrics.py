"""Metrics as name -> (sum, count), so that they add up over micro-batches and ranks without bias.

A name ending in `/max` is the maximum of a non-negative quantity: its count is 1, or 0 without tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastrl.kernels.policy_loss.metrics import METRICS, is_max
from fastrl.spec import Cispo, Clip, Dppo, Gmpo, PolicyLoss

Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]
OUTSIDE = (0.9, 1.1)  # ratios of trainer to sampler that count as equal


def available(spec: PolicyLoss, *, ref: bool, sampling: bool, entropy: bool) -> tuple[str, ...]:
    """The metrics that a loss reports, given its optional inputs; known without reading a tensor."""
    present = {
        "clip_ratio": isinstance(spec.surrogate, (Clip, Cispo, Dppo, Gmpo)),
        "kl": ref,
        "entropy": entropy,
        "sampling": sampling,
        "sampling/kept_fraction": sampling and spec.correction is not None,
    }
    return tuple(name for name in METRICS if present.get(name, present.get(name.split("/")[0], True)))


def named(table: torch.Tensor, names: Iterable[str]) -> Metrics:
    """The rows of a kernel's (K, 2) table with these names."""
    sums, counts = (column.unbind() for column in table.unbind(1))
    return {name: (sums[METRICS.index(name)], counts[METRICS.index(name)]) for name in names}


def merge(parts: Iterable[Metrics]) -> Metrics:
    """Combines the metrics of disjoint sets of tokens; a name may be missing from some."""
    merged: Metrics = {}
    for part in parts:
        for name, row in part.items():
            if name in merged:
                combine = torch.maximum if is_max(name) else torch.add
                row = tuple(combine(a, b) for a, b in zip(merged[name], row, strict=True))
            merged[name] = row
    return merged


def finish(metrics: Metrics) -> dict[str, float]:
    """sum / count as numbers, in one host synchronisation; metrics with count 0 are left out."""
    if not metrics:
        return {}
    rows = torch.stack([torch.stack([total, count]) for total, count in metrics.values()]).tolist()
    return {name: total / count for name, (total, count) in zip(metrics, rows, strict=True) if count != 0}


@torch.no_grad()
def mismatch(logps: torch.Tensor, sampling_logps: torch.Tensor, mask: torch.Tensor) -> Metrics:
    """How far the trainer's probabilities of sampled tokens are from the sampler's, d_t = logps - sampling_logps.

        sampling/mismatch_kl     mean of e^d - 1 - d, the k3 estimate of KL(sampler || trainer), as in prime-rl
        sampling/mismatch_kl_k1  mean of -d: the same without bias from a bound, and with more noise
        sampling/outside_share   share of tokens with e^d outside [0.9, 1.1]

    Estimators: http://joschu.net/blog/kl-approx.html. At the same weights all are 0 but for rounding; what is left is
    another kernel, dtype, temperature or truncation, or older weights.

    Args:
        logps, sampling_logps, mask: (N,); masked tokens count nowhere.
    """
    valid = mask != 0
    d = torch.where(valid, logps.detach().float() - sampling_logps.float(), 0.0)
    count, ratio = valid.sum().float(), d.exp()
    outside = ((ratio < OUTSIDE[0]) | (ratio > OUTSIDE[1])) & valid
    return {
        "sampling/mismatch_kl": ((torch.expm1(d) - d).sum(), count),
        "sampling/mismatch_kl_k1": (-d.sum(), count),
        "sampling/outside_share": (outside.sum().float(), count),
    }
