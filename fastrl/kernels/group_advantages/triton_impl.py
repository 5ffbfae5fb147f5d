"""Sums by group in Triton, in float64: a program per group, and one for the spread of a batch.

Groups are brought together by a stable sort, so that a group's sums have the order of its members whatever else is in
the batch. How many groups there are is not known without waiting for the GPU: a program is started for each reward, and
only that of a group's first member works.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrl.kernels.precision import answer
from fastrl.kernels.triton_jit import Build, device_function, launch, scalars
from fastrl.kernels.tuning import tuned

OPTIONS = {"enable_fp_fusion": False}


@device_function
def _member(x: tl.tensor, order: tl.tensor, start: tl.tensor, end: tl.tensor, BLOCK: tl.constexpr) -> tuple:
    """Where the members of a segment from `start` on are, which of the block are any, and their numbers."""
    i = start + tl.arange(0, BLOCK)
    member = i
    if order is not None:
        member = tl.load(order + i, mask=i < end, other=0)
    return member, i < end, tl.load(x + member, mask=i < end, other=float("nan")).to(tl.float64)


@device_function
def _spread(
    x: tl.tensor, order: tl.tensor, start: tl.tensor, end: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Over the numbers of a segment that are not NaN: how many, the least, the mean above it, the sample standard
    deviation.

    Numbers are shifted by the least of their segment before anything is summed: differences of equals are exactly 0, so
    a constant segment has exactly no spread, and a large common offset costs no digits.
    """
    count = tl.full([BLOCK], 0.0, tl.float64)
    low = tl.full([BLOCK], float("inf"), tl.float64)
    total = tl.full([BLOCK], 0.0, tl.float64)
    squares = tl.full([BLOCK], 0.0, tl.float64)
    for i in range(start, end, BLOCK):
        _, _, value = _member(x, order, i, end, BLOCK)
        count += (value == value).to(tl.float64)
        low = tl.where(value < low, value, low)
    n, least = tl.sum(count, 0), tl.min(low, 0)
    for i in range(start, end, BLOCK):
        _, _, value = _member(x, order, i, end, BLOCK)
        total += tl.where(value == value, value - least, 0.0)
    mean = tl.sum(total, 0) / tl.maximum(n, 1.0)
    for i in range(start, end, BLOCK):
        _, _, value = _member(x, order, i, end, BLOCK)
        deviation = tl.where(value == value, value - least - mean, 0.0)
        squares += deviation * deviation
    return n, least, mean, tl.sqrt(tl.sum(squares, 0) / tl.maximum(n - 1.0, 1.0))


@device_function
def _divided(x: tl.tensor, std: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """x over the standard deviation plus eps, or x where there is no spread to divide by; NaN stays NaN."""
    return x / tl.where(std > 0.0, std + tl.load(eps), 1.0)


@triton.jit
def _group(
    rewards: tl.tensor,
    ids: tl.tensor,
    ends: tl.tensor,
    order: tl.tensor,
    eps: tl.tensor,
    advantages: tl.tensor,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The advantages of one group, before the batch's scale. With that scale a NaN is still one."""
    first = tl.program_id(0).to(tl.int64)
    before = tl.load(ids + tl.maximum(first - 1, 0))
    if (first == 0) | (before != tl.load(ids + first)):
        end = tl.load(ends + first)
        count, least, mean, std = _spread(rewards, order, first, end, BLOCK)
        for i in range(first, end, BLOCK):
            member, inside, x = _member(rewards, order, i, end, BLOCK)
            if BASELINE != "none":
                x = x - least - mean
            if BASELINE == "leave_one_out":  # r - mean of the others = (r - mean) n / (n - 1)
                x = x * (count / tl.maximum(count - 1.0, 1.0))
            if SCALE == "group":
                x = _divided(x, std, eps)
            if SCALE != "batch":
                x = tl.where(x == x, x, 0.0)
            tl.store(advantages + member, x, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _batch(x: tl.tensor, eps: tl.tensor, advantages: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    """All advantages over their standard deviation. A batch has thousands of rewards, not millions: one program."""
    _, _, _, std = _spread(x, None, 0, n, BLOCK)
    for i in range(0, n, BLOCK):
        at, inside, value = _member(x, None, i, n, BLOCK)
        value = _divided(value, std, eps)
        tl.store(advantages + at, tl.where(value == value, value, 0.0), mask=inside)


def forward(rewards: torch.Tensor, group_ids: torch.Tensor, baseline: str, scale: str, eps: float) -> torch.Tensor:
    rewards, n = rewards.contiguous(), len(rewards)
    advantages = rewards.new_empty(n, dtype=answer(rewards))
    if n == 0:
        return advantages
    ids, order = group_ids.sort(stable=True)
    ends = torch.searchsorted(ids, ids, right=True)
    by_group = rewards.new_empty(n, dtype=torch.float64) if scale == "batch" else advantages
    segments = {"ids": ids, "ends": ends, "order": order, "eps": scalars(rewards.device, eps)}
    kinds = {"BASELINE": baseline, "SCALE": scale, **tuned("group_advantages", rewards.device)}
    launch(_group, n, rewards, rewards=rewards, advantages=by_group, **segments, **kinds, **OPTIONS)
    if scale == "batch":
        outputs = {"advantages": advantages, "eps": segments["eps"], "n": n}
        launch(_batch, 1, rewards, x=by_group, **outputs, **tuned("group_advantages batch", rewards.device), **OPTIONS)
    return advantages


_INDEX = dict.fromkeys(("ids", "ends", "order"), "*i64") | {"eps": "*fp64"}
BUILDS = (
    *(
        Build(
            f"group {baseline} {scale}",
            _group,
            {"rewards": "*fp32", "advantages": "*fp64" if scale == "batch" else "*fp32"} | _INDEX,
            {"BASELINE": baseline, "SCALE": scale},
            OPTIONS,
            "group_advantages",
        )
        for baseline, scale in (("mean", "group"), ("leave_one_out", "none"), ("mean", "batch"))
    ),
    Build(
        "batch",
        _batch,
        {"x": "*fp64", "eps": "*fp64", "advantages": "*fp32", "n": "i32"},
        {},
        OPTIONS,
        "group_advantages batch",
    ),
)
