"""A scan over blocks of tokens in Triton, in float64.

What a token hands to the one before it in its sequence is one number: X = gamma V + lam gamma A of the next token with
mask 1, plus the stray rewards of masked tokens on the way. So each token is an affine map of X,

    mask 1:  A = r - V + X,  X' = gamma V + gamma lam (r - V) + gamma lam X
    mask 0:                  X' = r (if finite) + X

and maps compose associatively. The first token of the next sequence hands over 0, whatever is behind it, so blocks need
not know sequences. Three kernels: each block's composed map; the X that enters each block; the tokens. A batch of one
block needs the last alone.

So a single long sequence is as parallel as many short ones. 16 sequences of 131,072 tokens, in blocks of 512: 4,096
programs twice, and between them one program that scans their 4,096 maps, 512 at a time in 8 turns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrl.kernels.precision import answer
from fastrl.kernels.triton_jit import Build, device_function, launch, scalars
from fastrl.kernels.triton_math import is_finite
from fastrl.kernels.tuning import tuned

OPTIONS = {"enable_fp_fusion": False}
FORGETS = tl.constexpr(-1.0)  # the slope, else in [0, 1], of a map that is constant even where NaN enters


@triton.jit
def _after(
    later: tl.tensor, later_slope: tl.tensor, offset: tl.tensor, slope: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The map X -> offset + slope X after the map of later tokens."""
    constant = slope == FORGETS
    both = tl.where(later_slope == FORGETS, later_slope, slope * later_slope)
    return tl.where(constant, offset, offset + slope * later), tl.where(constant, slope, both)


@device_function
def _apply(offset: tl.tensor, slope: tl.tensor, x: tl.tensor) -> tl.tensor:
    return tl.where(slope == FORGETS, offset, offset + slope * x)


@device_function
def _incoming(
    rewards: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    starts: tl.tensor,
    decays: tl.tensor,
    t: tl.tensor,
    n: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """For each token of a block, the map from the X that enters the block to the X that enters the token."""
    gamma, decay = tl.load(decays), tl.load(decays + 1)
    within = tl.load(starts + t + 1, mask=t < n, other=1) == 0  # the token behind is of the same sequence
    valid = tl.load(mask + t + 1, mask=within, other=0) != 0
    reward = tl.load(rewards + t + 1, mask=within, other=0.0).to(tl.float64)
    value = tl.load(values + t + 1, mask=valid, other=0.0).to(tl.float64)
    stray = tl.where(is_finite(reward), reward, 0.0)
    offset = tl.where(valid, gamma * value + decay * (reward - value), stray)
    slope = tl.where(valid, decay, tl.where(within, 1.0, FORGETS))
    return tl.associative_scan((offset, slope), 0, _after, reverse=True)


@triton.jit(do_not_specialize=["n"])
def _blocks(
    rewards: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    starts: tl.tensor,
    decays: tl.tensor,
    offsets: tl.tensor,
    slopes: tl.tensor,
    n: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Each block's map, from the X that enters its last token's next to the X that enters its first token."""
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    offset, slope = _incoming(rewards, values, mask, starts, decays, block * BLOCK + i, n)
    tl.store(offsets + block + i * 0, offset, mask=i == 0)
    tl.store(slopes + block + i * 0, slope, mask=i == 0)


@triton.jit(do_not_specialize=["blocks"])
def _carries(offsets: tl.tensor, slopes: tl.tensor, carries: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr) -> None:
    """The X that enters each block, from the last block to the first, BLOCK of them at a time."""
    i = tl.arange(0, BLOCK)
    carry = tl.full([], 0.0, tl.float64)
    for done in range(0, tl.cdiv(blocks, BLOCK) * BLOCK, BLOCK):
        block = tl.cdiv(blocks, BLOCK) * BLOCK - BLOCK - done + i
        behind = block + 1 < blocks
        offset = tl.load(offsets + block + 1, mask=behind, other=0.0)
        slope = tl.load(slopes + block + 1, mask=behind, other=FORGETS)
        offset, slope = tl.associative_scan((offset, slope), 0, _after, reverse=True)
        x = _apply(offset, slope, carry)
        tl.store(carries + block, x, mask=block < blocks)
        carry = tl.sum(tl.where(i == 0, x, 0.0), 0)


@triton.jit(do_not_specialize=["n"])
def _tokens(
    rewards: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    starts: tl.tensor,
    decays: tl.tensor,
    end: tl.tensor,
    carries: tl.tensor,
    advantages: tl.tensor,
    returns: tl.tensor,
    n: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Advantages and returns; exactly 0 where the mask is False and behind the last sequence."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK + tl.arange(0, BLOCK)
    x, slope = _incoming(rewards, values, mask, starts, decays, t, n)
    if carries is not None:
        x = _apply(x, slope, tl.load(carries + block))
    valid = tl.load(mask + t, mask=t < tl.load(end), other=0) != 0
    value = tl.load(values + t, mask=valid, other=0.0).to(tl.float64)
    advantage = tl.load(rewards + t, mask=valid, other=0.0).to(tl.float64) - value + x
    tl.store(advantages + t, tl.where(valid, advantage, 0.0), mask=t < n)
    tl.store(returns + t, tl.where(valid, advantage + value, 0.0), mask=t < n)


def forward(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    n, device = len(rewards), rewards.device
    advantages, returns = (rewards.new_empty(n, dtype=answer(rewards, values)) for _ in range(2))
    if n == 0:
        return advantages, returns
    rewards, values, mask = rewards.contiguous(), values.contiguous(), mask.contiguous()
    starts = torch.zeros(n + 1, dtype=torch.bool, device=device).index_fill_(0, cu_seqlens, True)
    tokens = {"rewards": rewards, "values": values, "mask": mask, "starts": starts, "n": n}
    tokens["decays"] = scalars(device, gamma, gamma * lam)
    common = {**tuned("gae", device), **OPTIONS}
    blocks, carries = triton.cdiv(n, common["BLOCK"]), None
    if blocks > 1:
        offsets, slopes, carries = rewards.new_empty(3, blocks, dtype=torch.float64)
        maps = {"offsets": offsets, "slopes": slopes}
        launch(_blocks, blocks, rewards, **tokens, **maps, **common)
        launch(_carries, 1, rewards, **maps, carries=carries, blocks=blocks, **tuned("gae carries", device), **OPTIONS)
    outputs = {"advantages": advantages, "returns": returns}
    launch(_tokens, blocks, rewards, **tokens, **outputs, end=cu_seqlens[-1:], carries=carries, **common)
    return advantages, returns


_TOKENS = {"rewards": "*fp32", "values": "*fp32", "mask": "*i1", "starts": "*i1", "decays": "*fp64", "n": "i32"}
_MAPS = {"offsets": "*fp64", "slopes": "*fp64"}
_OUTPUTS = {"end": "*i64", "advantages": "*fp32", "returns": "*fp32"}
BUILDS = (
    Build("blocks", _blocks, _TOKENS | _MAPS, {}, OPTIONS, "gae"),
    Build("carries", _carries, _MAPS | {"carries": "*fp64", "blocks": "i32"}, {}, OPTIONS, "gae carries"),
    Build("tokens", _tokens, _TOKENS | _OUTPUTS | {"carries": "*fp64"}, {}, OPTIONS, "gae"),
    Build("tokens of one block", _tokens, _TOKENS | _OUTPUTS, {"carries": None}, OPTIONS, "gae"),
)
