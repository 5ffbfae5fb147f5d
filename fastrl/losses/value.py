"""The critic's loss."""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.losses.aggregate import check_layout, check_normalizer, token_weights
from fastrl.types import LossOutput

OP = "value_loss"


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor | None,
    returns: torch.Tensor,
    *,
    mask: torch.Tensor,
    clip: float | None = 0.2,
    normalizer: float | torch.Tensor | None = None,
) -> LossOutput:
    """The mean over masked-in tokens of max((V - R)^2, (V_c - R)^2) / 2, V_c = V held within `clip` of V_old.

    PPO's clipped value loss (arXiv:1707.06347, in the form of its authors' code). A token whose clipped error is larger
    has no gradient. With an explicit `normalizer` the losses of any split add up to the loss of the whole.

    Args:
        values: (B, T) or (N,), V of each token under the current critic; the only input that gets a gradient.
        old_values: like `values`, V_old at the time of the rollout; None if `clip` is None.
        returns: like `values`, R: advantages plus V_old, as `fastrl.gae` gives them.
        mask: like `values`, bool or integer; where False, the gradient is exactly 0 whatever the token holds.
        clip: distance, in units of the return; None: only the squared error.
        normalizer: divisor of the sum; None: the number of masked-in tokens.

    Returns:
        The scalar loss, float32 (float64 for float64 `values`). Metrics: `value/clip_fraction`, the share of tokens
        without gradient; `value/mean` and `return/mean`; and `value/explained_variance`, 1 - Var(R - V) / Var(R). Its
        sum and count are the difference of the variances and Var(R), each about the mean of the given tokens, so
        micro-batches add up to the variance within them. It has no value if all returns are equal.

    Raises:
        ValueError: a shape, a device or `clip` is wrong, or `old_values` is missing.
        TypeError: a dtype is wrong.
    """
    check.floating(OP, "values", values)
    check.shape(OP, "mask", mask, values.shape, "as values")
    check.device(OP, "mask", mask, values.device, "values")
    check_layout(OP, mask, None)
    check_normalizer(OP, "token_mean", normalizer)
    check.require(clip is None or clip > 0, OP, "clip", "a number above 0, or None", clip)
    check.require(clip is None or old_values is not None, OP, "old_values", "a tensor, which clip needs", None)
    for name, tensor in (("old_values", old_values), ("returns", returns)):
        if tensor is not None:
            check.floating(OP, name, tensor)
            check.shape(OP, name, tensor, values.shape, "as values")
            check.device(OP, name, tensor, values.device, "values")
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    live = mask.bool()
    v, r = (torch.where(live, x.to(dtype), 0.0) for x in (values, returns.detach()))
    error = (v - r) ** 2
    clipped = torch.zeros_like(live)
    if clip is not None:
        old = torch.where(live, old_values.detach().to(dtype), 0.0)
        bounded = (v.clamp(old - clip, old + clip) - r) ** 2
        clipped = bounded > error
        error = torch.where(clipped, bounded, error)
    weights = token_weights(live, "token_mean", normalizer=normalizer, dtype=dtype)
    loss = 0.5 * (weights * error).sum()

    count = live.sum().to(dtype)
    v = v.detach()
    unexplained, total = _squares(r - v, live, count), _squares(r, live, count)
    metrics = {
        "value/clip_fraction": (clipped.sum().to(dtype), count),
        "value/mean": (v.sum(), count),
        "return/mean": (r.sum(), count),
        "value/explained_variance": (total - unexplained, total),
    }
    return LossOutput(loss, metrics)


def _squares(x: torch.Tensor, live: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Squared deviations from the mean, summed over live tokens.

    The largest value is subtracted first; otherwise a constant whose mean rounds would have a variance.
    """
    lowest = x.new_full((1,), -torch.inf)
    anchor = torch.cat([torch.where(live, x, -torch.inf).reshape(-1), lowest]).max()
    x = torch.where(live, x - anchor, 0.0)
    return torch.where(live, (x - x.sum() / count.clamp(min=1)) ** 2, 0.0).sum()
