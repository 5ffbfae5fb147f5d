"""Log-softmax of one row of logits, value and derivative: the Triton copy of `softmax_row`, and its three kernels.

A program has one row, or one tile of a matmul, and goes through its columns in blocks of one size and one order: no
other row changes a bit of it. Arithmetic is in the dtype of the temperatures, float32 or float64. The running maximum
starts at the lowest finite number, so that a first block of -inf alone leaves no -inf - -inf behind.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastrl import env
from fastrl.kernels.softmax_row import NO_SOFTCAP
from fastrl.kernels.triton_jit import Build, device_function
from fastrl.kernels.triton_math import expm1
from fastrl.kernels.tuning import tuned

INTERPRETED = tl.constexpr(env.triton_interpreted())
LOWEST_32 = tl.constexpr(-3.4028234663852886e38)
LOWEST_64 = tl.constexpr(-1.7976931348623157e308)

# Without contraction: fused with the product that made it, a row's maximum minus itself would not be 0. With a limit of
# registers, the highest, the assembler makes no limit of its own, for which it spills some to have one more block run.
OPTIONS = {"maxnreg": 255, "enable_fp_fusion": False}


# Device functions.


@device_function
def divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x / y correctly rounded, which `/` of float32 is not: with z near 100 its rounding would show in exp(z)."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@device_function
def tanh(x: tl.tensor) -> tl.tensor:
    """tanh x and its derivative 4 u / (1 + u)^2, where u = e^a, a = -2 |x|: 1 - tanh^2 has no digits left near 1.

    Each form below is a number plus a smaller correction, so that little more than the last rounding is lost: a softcap
    of 30 makes 30 times the error one of the logit. Far from 0, 1 - 2 u / (1 + u). Near 0, with e^a = 1 + a + a^2 r and
    r = 1/2 + a s, |x| - a^3 (s - r/2) / (2 + a + a^2 r).
    """
    a = -2 * tl.abs(x)
    u = tl.exp(a)
    TERMS: tl.constexpr = 20 if x.dtype == tl.float64 else 12
    series = x * 0 + 1
    for k in tl.static_range(TERMS, 3, -1):
        series = 1 + series * a * (1.0 / k)
    s = series * (1 / 6)
    r = 0.5 + a * s
    near = tl.abs(x) - a * a * a * (s - 0.5 * r) / (2 + a + a * a * r)
    t = tl.where(a > -1.1, near, 1 - 2 * u / (1 + u))
    return tl.where(x < 0, -t, t), 4 * u / ((1 + u) * (1 + u))


@device_function
def cap(z: tl.tensor, softcap: tl.tensor, logit_scale: tl.tensor, HAS_SOFTCAP: tl.constexpr) -> tl.tensor:
    """(cap(logit_scale z), cap') with cap(x) = softcap tanh(x / softcap)."""
    z = z * logit_scale
    if HAS_SOFTCAP:
        t, slope = tanh(divide(z, softcap))
        return softcap * t, slope
    else:
        return z, tl.full((), 1, z.dtype)


@device_function
def over(z: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """z / temperature, a scalar: a branch, because a division per logit is not free and mostly it is 1."""
    if temperature != 1:
        z = divide(z, temperature)
    return z


@device_function
def load_finished(
    row_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    cols: tl.tensor,
    V: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    logit_scale: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """Finished logits at some columns, -inf beyond the vocabulary; and cap' there."""
    inside = cols < V
    z = tl.load(row_ptr + cols, mask=inside, other=0).to(temperature.dtype)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=inside, other=0).to(temperature.dtype)
    z, slope = cap(z, softcap, logit_scale, HAS_SOFTCAP)
    return tl.where(inside, over(z, temperature), float("-inf")), slope


@device_function
def lowest(dtype: tl.constexpr) -> tl.tensor:
    """The lowest finite number."""
    value: tl.constexpr = LOWEST_64 if dtype == tl.float64 else LOWEST_32
    return tl.full((), value, dtype)


@device_function
def below(top: tl.tensor, total: tl.tensor, moment: tl.tensor, higher: tl.tensor) -> tl.tensor:
    """The sums of e and e (z - top), e = exp(z - top), relative to a higher maximum; csrc/math/softmax.h.

    What falls away entirely has no moment: 0 times its shift could be NaN.
    """
    shift = top - higher
    factor = tl.exp(shift)
    scaled = total * factor
    return scaled, tl.where(factor > 0, moment * factor + scaled * shift, 0)


@device_function
def statistics(
    row_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    V: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    logit_scale: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """(largest logit, logarithm of what is left, entropy) of a row, which is read once."""
    top = lowest(temperature.dtype)
    total = tl.full((BLOCK,), 0, temperature.dtype)
    moment = tl.full((BLOCK,), 0, temperature.dtype)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_finished(row_ptr, bias_ptr, cols, V, temperature, softcap, logit_scale, HAS_SOFTCAP)
        higher = tl.maximum(top, tl.max(z, 0))  # a NaN is passed over here and found by the sum
        total, moment = below(top, total, moment, higher)
        top = higher
        shifted = z - top
        e = tl.exp(shifted)
        total += e
        if ENTROPY:
            moment += tl.where(e == 0, 0, e * shifted)
    sum_of_all = tl.sum(total, 0)
    log_total = tl.log(sum_of_all)
    return top, log_total, log_total - divide(tl.sum(moment, 0), sum_of_all)


@device_function
def logp_at(
    row_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    target: tl.tensor,
    V: tl.tensor,
    top: tl.tensor,
    log_total: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    logit_scale: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """log p of a column; NaN for an id outside the vocabulary, which is never read."""
    known = (target >= 0) & (target < V)
    column = tl.where(known, target, 0)
    z, _ = load_finished(row_ptr, bias_ptr, column, V, temperature, softcap, logit_scale, HAS_SOFTCAP)
    return tl.where(known, (z - top) - log_total, float("nan"))


@device_function
def summaries(
    row_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    target: tl.tensor,
    V: tl.tensor,
    top: tl.tensor,
    log_total: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    logit_scale: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """(log sum of p^2, mean logit, 1 where the target is the first of the largest) of a row, read once more."""
    squared = tl.full((BLOCK,), 0, temperature.dtype)
    total = tl.full((BLOCK,), 0, temperature.dtype)
    first = tl.full((BLOCK,), 0, tl.int32) + V
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_finished(row_ptr, bias_ptr, cols, V, temperature, softcap, logit_scale, HAS_SOFTCAP)
        e = tl.exp(z - top)
        squared += e * e
        total += tl.where(cols < V, z, 0)
        first = tl.minimum(first, tl.where(z == top, cols, V))
    squares = tl.log(tl.sum(squared, 0)) - 2 * log_total
    mean = divide(tl.sum(total, 0), tl.full((), 0, temperature.dtype) + V)
    is_top1 = (tl.min(first, 0) == target) & (log_total == log_total)
    return squares, mean, is_top1.to(temperature.dtype)


@device_function
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """x rounded to the nearest; the interpreter cuts off the bits of a bfloat16: there the rounding goes first."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


# Kernels: one program per row.


@triton.jit(do_not_specialize=["ignore_index"])
def statistics_kernel(
    logits_ptr: tl.tensor,  # (n, V), rows `stride` apart
    stride: tl.int64,
    bias_ptr: tl.tensor,  # (V,) or None
    targets_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    logps_ptr: tl.tensor,
    lse_ptr: tl.tensor,  # (2, n) or None
    entropy_ptr: tl.tensor,  # (n,) or None
    summaries_ptr: tl.tensor,  # (3, n) or None
    V: tl.int32,
    softcap: tl.float64,
    logit_scale: tl.float64,
    ignore_index: tl.int64,
    HAS_SOFTCAP: tl.constexpr,
    PER_ROW_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Log-probability of each row's target, log-sum-exp and entropy; exactly 0 where the target is ignored."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    temperature = tl.load(temperature_ptr + row if PER_ROW_TEMPERATURE else temperature_ptr)
    ACC: tl.constexpr = temperature_ptr.dtype.element_ty
    softcap_, scale = tl.full((), softcap, ACC), tl.full((), logit_scale, ACC)
    logp = tl.full((), 0, ACC)
    top = tl.full((), 0, ACC)
    log_total = tl.full((), 0, ACC)
    entropy = tl.full((), 0, ACC)
    if target != ignore_index:
        row_ptr = logits_ptr + row * stride
        ENTROPY: tl.constexpr = entropy_ptr is not None
        top, log_total, entropy = statistics(
            row_ptr, bias_ptr, V, temperature, softcap_, scale, HAS_SOFTCAP, ENTROPY, BLOCK
        )
        logp = logp_at(row_ptr, bias_ptr, target, V, top, log_total, temperature, softcap_, scale, HAS_SOFTCAP)
    tl.store(logps_ptr + row, logp)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, top)
        tl.store(lse_ptr + tl.num_programs(0) + row, log_total)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)
    if summaries_ptr is not None:
        row_ptr = logits_ptr + row * stride
        squares, mean, is_top1 = summaries(
            row_ptr, bias_ptr, target, V, top, log_total, temperature, softcap_, scale, HAS_SOFTCAP, BLOCK
        )
        tl.store(summaries_ptr + row, squares)
        tl.store(summaries_ptr + tl.num_programs(0) + row, mean)
        tl.store(summaries_ptr + 2 * tl.num_programs(0) + row, is_top1)


@triton.jit(do_not_specialize=["ignore_index"])
def gradient_kernel(
    logits_ptr: tl.tensor,  # logits, or with KEPT their probabilities
    stride: tl.int64,
    rows_ptr: tl.tensor,  # (n,): in which row of logits each program finds its own; None: in the same
    bias_ptr: tl.tensor,  # (V,) or None
    targets_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    logps_ptr: tl.tensor,  # (n,); None: taken from the target's logit
    lse_ptr: tl.tensor,  # (2, n)
    entropy_ptr: tl.tensor,  # (n,) or None
    grad_logps_ptr: tl.tensor,
    grad_entropy_ptr: tl.tensor,  # (n,) or None
    out_ptr: tl.tensor,  # (n, V)
    V: tl.int32,
    softcap: tl.float64,
    logit_scale: tl.float64,
    ignore_index: tl.int64,
    HAS_SOFTCAP: tl.constexpr,
    PER_ROW_TEMPERATURE: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """grad_logps d logp/dz + grad_entropy dH/dz by the raw logits; a row without either is exactly 0 and never read."""
    row = tl.program_id(0).to(tl.int64)
    source = row if rows_ptr is None else tl.load(rows_ptr + row)
    target = tl.load(targets_ptr + row)
    temperature = tl.load(temperature_ptr + row if PER_ROW_TEMPERATURE else temperature_ptr)
    ACC: tl.constexpr = temperature_ptr.dtype.element_ty
    softcap_, scale = tl.full((), softcap, ACC), tl.full((), logit_scale, ACC)
    grad_logp = tl.load(grad_logps_ptr + row).to(ACC)
    grad_entropy = tl.full((), 0, ACC) if grad_entropy_ptr is None else tl.load(grad_entropy_ptr + row).to(ACC)
    row_ptr = logits_ptr + source * stride
    to_ptr = out_ptr + row * V
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    if (target == ignore_index) | ((grad_logp == 0) & (grad_entropy == 0)):
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(to_ptr + cols, tl.full((BLOCK,), 0, OUT), mask=cols < V)
    else:
        top = tl.load(lse_ptr + row)
        log_total = tl.load(lse_ptr + tl.num_programs(0) + row)
        entropy = tl.full((), 0, ACC) if entropy_ptr is None else tl.load(entropy_ptr + row)
        if logps_ptr is None:
            logp = logp_at(row_ptr, bias_ptr, target, V, top, log_total, temperature, softcap_, scale, HAS_SOFTCAP)
        else:
            logp = tl.load(logps_ptr + row)
        # From the target's logp, not from its p: with p near 1, or rounded to 16 bits, 1 - p would be lost.
        p_target = tl.exp(logp)
        at_target = -grad_logp * expm1(logp)
        if grad_entropy_ptr is not None:
            at_target -= grad_entropy * tl.where(p_target == 0, 0, p_target * (logp + entropy))
        chain = divide(scale, temperature)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            if KEPT:
                p = tl.load(row_ptr + cols, mask=cols < V, other=0).to(ACC)
                log_p = tl.where(cols == target, logp, tl.log(p))
                slope = tl.full((), 1, ACC)
                if HAS_SOFTCAP:  # from the finished logit, which is log p + lse
                    capped = divide((log_p + (top + log_total)) * temperature, softcap_)
                    capped = tl.minimum(tl.maximum(capped, -1), 1)
                    slope = 1 - capped * capped
            else:
                z, slope = load_finished(row_ptr, bias_ptr, cols, V, temperature, softcap_, scale, HAS_SOFTCAP)
                log_p = (z - top) - log_total
                p = tl.exp(log_p)
            dz = -p * grad_logp
            if grad_entropy_ptr is not None:
                dz -= grad_entropy * tl.where(p == 0, 0, p * (log_p + entropy))
            dz = tl.where(cols == target, at_target, dz) * chain * slope
            tl.store(to_ptr + cols, narrow(dz, OUT), mask=cols < V)


@triton.jit
def probabilities_kernel(
    logits_ptr: tl.tensor,  # (n, V)
    rows_ptr: tl.tensor,  # (n,): to which row of `out` each goes
    bias_ptr: tl.tensor,  # (V,) or None
    temperature_ptr: tl.tensor,
    lse_ptr: tl.tensor,  # (2, n)
    out_ptr: tl.tensor,  # (N, V)
    V: tl.int32,
    softcap: tl.float64,
    logit_scale: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    PER_ROW_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The softmax of each row, from its statistics."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row if PER_ROW_TEMPERATURE else temperature_ptr)
    ACC: tl.constexpr = temperature_ptr.dtype.element_ty
    softcap_, scale = tl.full((), softcap, ACC), tl.full((), logit_scale, ACC)
    top, log_total = tl.load(lse_ptr + row), tl.load(lse_ptr + tl.num_programs(0) + row)
    row_ptr = logits_ptr + row * V
    to_ptr = out_ptr + tl.load(rows_ptr + row) * V
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_finished(row_ptr, bias_ptr, cols, V, temperature, softcap_, scale, HAS_SOFTCAP)
        p = tl.exp((z - top) - log_total)
        tl.store(to_ptr + cols, narrow(p, out_ptr.dtype.element_ty), mask=cols < V)


# From the host.


def entry(dtype: torch.dtype) -> str:
    """Of `fastrl.kernels.tuning`, by the dtype of the arithmetic."""
    return "softmax_row float64" if dtype == torch.float64 else "softmax_row"


def flags(temperature: torch.Tensor, softcap: float, vocabulary: int) -> dict[str, Any]:
    """The constexpr arguments that every kernel here has, and the options of its launch."""
    presence = {"HAS_SOFTCAP": softcap != NO_SOFTCAP, "PER_ROW_TEMPERATURE": temperature.numel() > 1}
    sizes = dict(tuned(entry(temperature.dtype), temperature.device))
    sizes["BLOCK"] = min(sizes["BLOCK"], max(128, triton.next_power_of_2(vocabulary)))  # columns at a time
    return {**presence, **sizes, **OPTIONS}


NUMBERS = dict.fromkeys(("stride", "hidden_stride", "weight_stride", "ignore_index"), "i64")
NUMBERS |= dict.fromkeys(("V", "H", "N", "part_columns", "parts"), "i32")
NUMBERS |= dict.fromkeys(("softcap", "logit_scale"), "fp64")


def build(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    *,
    entry: str = "softmax_row",
    multiples: tuple[str, ...] = (),
    **constants: Any,
) -> Build:
    """How a kernel is compiled that takes these `pointers`, named without `_ptr`, and None for its others."""
    if entry == "softmax_row" and pointers.get("temperature") == "fp64":
        entry = "softmax_row float64"
    given = {f"{key}_ptr": f"*{kind}" for key, kind in pointers.items()}
    types = {key: given.get(key) or NUMBERS.get(key) for key in kernel.arg_names}
    defaults = dict.fromkeys(("HAS_SOFTCAP", "PER_ROW_TEMPERATURE", "KEPT", "UNIT_TEMPERATURE"), False)
    rest = {key: (defaults | constants).get(key) for key, kind in types.items() if kind is None}
    return Build(name, kernel, {key: kind for key, kind in types.items() if kind}, rest, OPTIONS, entry, multiples)
