"""The policy loss in one pass over the tokens, in C++; csrc/cpu/policy_loss.h, formulas in csrc/math."""

from __future__ import annotations

from functools import lru_cache

import torch

from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.native import DTYPES, address, dense, extension
from fastrl.kernels.policy_loss.metrics import METRICS, merge_metrics
from fastrl.spec import Cispo, Clip, Dppo, Gmpo, PolicyLoss, Reinforce, Sapo, Vespo

__all__ = ["METRICS", "forward", "merge_metrics"]

# As in csrc/math/policy_spec.h.
SURROGATES: dict[type, int] = {Clip: 0, Cispo: 1, Sapo: 2, Reinforce: 3, Dppo: 4, Gmpo: 5, Vespo: 6}
KLS = {"k1": 1, "k2": 2, "k3": 3, "k3_ratio": 4, "k1+": 5, "k3+": 6}
CORRECTIONS = {"truncate": 1, "mask": 2}
NONE = 0


def spec_arguments(spec: PolicyLoss) -> tuple[float, ...]:
    """The fields of PolicySpec, csrc/math/policy_spec.h, in order."""
    s, correction = spec.surrogate, spec.correction
    low, high, dual, tau_pos, tau_neg = 0.0, 0.0, 0.0, 1.0, 1.0
    if isinstance(s, Clip):
        low, high, dual = 1 - s.low, 1 + s.high, s.dual or 0.0
    elif isinstance(s, Cispo):
        low, high = s.ratio_min, s.ratio_max
    elif isinstance(s, Dppo | Gmpo):
        low, high = s.low, s.high
    elif isinstance(s, Sapo):
        tau_pos, tau_neg = s.tau_pos, s.tau_neg
    elif isinstance(s, Vespo):
        low, high, tau_pos, tau_neg = s.k_pos, s.k_neg, s.lam_pos, s.lam_neg
    return (
        SURROGATES[type(s)],
        *(low, high, dual),
        *(tau_pos, tau_neg),
        *(spec.ratio != "token", spec.ratio == "sequence"),
        *((KLS[spec.kl.kind], spec.kl.coef) if spec.needs_ref else (NONE, 0.0)),
        CORRECTIONS[correction.kind] if correction else NONE,
        correction is not None and correction.level == "sequence",
        *((correction.low, correction.high) if correction else (0.0, 0.0)),
        spec.entropy_coef,
    )


@lru_cache
def _spec(spec: PolicyLoss) -> object:
    """The spec as the extension reads it."""
    return extension().PolicySpec(*spec_arguments(spec))


def forward(
    logps: torch.Tensor,
    tokens: LossTokens,
    entropy: torch.Tensor | None,
    seq_ids: torch.Tensor | None,
    num_seqs: int,
    spec: PolicyLoss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, dlogps (N,), dentropy (N,), metrics (K, 2): the contract is in `fastrl.kernels.policy_loss`."""
    inputs = tuple(map(dense, (logps, *tokens, entropy, seq_ids)))
    logps = inputs[0]
    loss, table = logps.new_empty(()), logps.new_empty(len(METRICS), 2)
    dlogps, dentropy = torch.empty_like(logps), torch.empty_like(logps)
    extension().policy_loss(
        _spec(spec),
        DTYPES[logps.dtype],
        len(logps),
        *map(address, inputs),
        num_seqs,
        torch.get_num_threads(),
        *map(address, (loss, dlogps, dentropy, table)),
    )
    return loss, dlogps, dentropy, table
