"""What a policy loss reports: a (K, 2) table of (sum, count) over masked-in tokens, one row per name."""

from __future__ import annotations

import torch

METRICS: tuple[str, ...] = (
    # Clip, Dppo, Gmpo: A < 0 (Gmpo: or 0) and no gradient; Cispo: ratio below its bound, whatever the sign of A
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",  # Clip, Dppo, Gmpo: A > 0 and no gradient; Cispo: ratio above its bound, likewise
    "ratio/mean",
    "ratio/max",
    "kl",  # k3 to the reference
    "old_kl",  # k3 from the old policy: ratio - 1 - log ratio, token level
    "entropy",
    "sampling/sampling_logp_difference/mean",  # |old_logps - sampling_logps|
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/mean",  # as the correction applies it; as it is where there is none
    "sampling/kept_fraction",  # tokens whose correction weight was neither truncated nor zeroed
    "gradient_fraction",  # tokens that send a gradient to logps or entropy
    "log_ratio_clamped",  # tokens with a log-ratio beyond the bound at which it stops growing
    "nonfinite_rows",  # tokens with a NaN or infinite log-probability or loss
)


def is_max(name: str) -> bool:
    """True for a maximum, of a quantity that is never negative: its row is (value, 1), or (0, 0) without tokens."""
    return name.endswith("/max")


def metric_table(rows: dict[str, torch.Tensor], mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(K, 2) from per-token values, float or bool; a name without values is (0, 0)."""
    count, zero = mask.sum(dtype=dtype), torch.zeros((), dtype=dtype, device=mask.device)
    table = []
    for name in METRICS:
        row = rows.get(name)
        if row is None or row.numel() == 0:
            table += [zero, zero]
            continue
        seen = mask & row if row.dtype == torch.bool else torch.where(mask, row, 0)  # (N,)
        table += [seen.amax(), (count > 0).to(dtype)] if is_max(name) else [seen.sum(dtype=dtype), count]
    return torch.stack(table).view(-1, 2)


def merge_metrics(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The tables of two disjoint sets of tokens together: sums and counts add, a maximum's row keeps the larger."""
    merged = a + b
    for k, name in enumerate(METRICS):
        if is_max(name):
            torch.maximum(a[k], b[k], out=merged[k])
    return merged
