"""Backends of the policy loss.

A backend is a module with one function:

    forward(logps (N,), advantages (N,), weights (N,), mask (N,) bool, old_logps | None, ref_logps | None,
            sampling_logps | None, entropy | None, seq_ids (N,) int64 | None, num_seqs, spec)
        -> loss scalar, dlogps (N,), dentropy (N,), metrics (K, 2)

`dlogps` and `dentropy` are the loss's derivatives. `old_logps=None` means on-policy: the ratio is exactly 1. `seq_ids`
is read only where the spec is not separable. `metrics` is described in `fastrl.kernels.policy_loss.metrics`.
"""

from __future__ import annotations

from fastrl.kernels.policy_loss.metrics import METRICS, merge_metrics

__all__ = ["METRICS", "merge_metrics"]
