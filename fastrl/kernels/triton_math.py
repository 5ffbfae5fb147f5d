"""Functions that Triton lacks or only approximates, in the dtype of their argument."""

from __future__ import annotations

import triton.language as tl

from fastrl.kernels.triton_jit import device_function


@device_function
def exp(x: tl.tensor) -> tl.tensor:
    """e^x, rounded once: Triton's own in float32 is 2^(x log2 e) of a rounded product, ten roundings off at x = 20."""
    return tl.exp(x.to(tl.float64)).to(x.dtype)


@device_function
def expm1(x: tl.tensor) -> tl.tensor:
    """e^x - 1, with its digits where x is small: x (1 + x/2 (1 + x/3 (... (1 + x/15)))) for |x| < 1/2."""
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(14):
        series = 1.0 + series * (x * (1.0 / (15 - i)))
    return tl.where(tl.abs(x) < 0.5, x * series, exp(x) - 1.0)


@device_function
def is_finite(x: tl.tensor) -> tl.tensor:
    """False for NaN and the infinities."""
    return x - x == 0.0


@device_function
def max_or_nan(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The maximum along an axis of numbers that are never negative; NaN where one of them is, which `tl.max` skips."""
    broken = tl.max((x != x).to(tl.int32), axis)
    return tl.where(broken > 0, float("nan"), tl.max(tl.where(x == x, x, 0.0), axis))
