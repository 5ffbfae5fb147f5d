"""What a policy loss reports: a (K, 2) table of (sum, count) over masked-in tokens, one row per name."""

from __future__ import annotations

import torch

METRICS: tuple[str, ...] = (
    "clip_ratio/low_mean",  # Clip: A < 0 and no gradient; Cispo: ratio below its bound, whatever the sign of A
    "clip_ratio/high_mean",  # Clip: A > 0 and no gradient; Cispo: ratio above its bound, whatever the sign of A
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
    """(K, 2) from per-token values; a name without values is (0, 0)."""
    table = torch.zeros(len(METRICS), 2, dtype=dtype, device=mask.device)
    count = mask.sum()
    for name, row in rows.items():
        seen = torch.where(mask, row, 0).to(dtype)  # (N,)
        k = METRICS.index(name)
        if not is_max(name):
            table[k, 0], table[k, 1] = seen.sum(), count
        elif seen.numel() > 0:
            table[k, 0], table[k, 1] = seen.amax(), count > 0
    return table


def merge_metrics(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The tables of two disjoint sets of tokens together: sums and counts add, a maximum's row keeps the larger."""
    maxima = torch.tensor([is_max(name) for name in METRICS], device=a.device)[:, None]  # (K, 1)
    return torch.where(maxima, torch.maximum(a, b), a + b)
