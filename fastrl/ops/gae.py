"""Generalised advantage estimation over the tokens that the policy wrote."""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.kernels.precision import answer
from fastrl.kernels.registry import resolve

OP = "gae"


@torch.library.custom_op("fastrl::gae", mutates_args=())
def _gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_bounds(cu_seqlens, rewards.shape[0])
    return resolve(OP, backend, rewards.device).forward(rewards, values, mask, cu_seqlens, gamma, lam)


@_gae.register_fake
def _(rewards: torch.Tensor, values: torch.Tensor, *options: object) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = answer(rewards, values)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _are_bounds(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Whether they start at 0, never decrease and end at most at the number of tokens: a bool on their device."""
    return (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= tokens)


def _check_bounds(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """Reads values, so it runs inside the operator, which torch.compile does not trace, and on a CPU alone."""
    if cu_seqlens.device.type != "cpu":
        return
    check.require(
        bool(_are_bounds(cu_seqlens, tokens)),
        OP,
        "cu_seqlens",
        f"bounds that start at 0, never decrease and end at most at the {tokens} tokens given",
        f"values from {cu_seqlens[0].item()} to {cu_seqlens[-1].item()}",
        "Pass the cumulative sum of the sequence lengths, with a 0 in front.",
    )


def _bounds(shape: torch.Size, cu_seqlens: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Bounds of each sequence in the flattened tokens."""
    dims = 2 if cu_seqlens is None else 1
    layout = "shape (B, T), or (N,) with cu_seqlens" if cu_seqlens is None else "shape (N,) with cu_seqlens"
    check.require(len(shape) == dims, OP, "rewards", layout, tuple(shape))
    if cu_seqlens is None:
        return torch.arange(shape[0] + 1, device=device) * shape[1]
    check.integer(OP, "cu_seqlens", cu_seqlens)
    check.require(
        cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1, OP, "cu_seqlens", "shape (S + 1,)", tuple(cu_seqlens.shape)
    )
    check.device(OP, "cu_seqlens", cu_seqlens, device, "rewards")
    return cu_seqlens.long()


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and value targets for each token that the policy wrote.

    delta_t = r_t + gamma V_{t'} - V_t,  A_t = delta_t + gamma lam A_{t'},  returns_t = A_t + V_t, where t' is the next
    token of the sequence with mask 1 and V_{t'} = A_{t'} = 0 after the last: arXiv:1506.02438 eq. 16, as PPO uses it,
    arXiv:1707.06347 eq. 11.

    A masked token (padding, tool output) is not a step of the policy: it adds no discount, and its value, even NaN, is
    never read. Its reward is added, undiscounted, to the last token with mask 1 before it, so a terminal reward on a
    tool token goes to the action that led there. A reward without such a token before it in its sequence is dropped;
    so is a masked reward that is not finite.

    Args:
        rewards: (B, T), or (N,) with `cu_seqlens`; floating point.
        values: as rewards; the critic's estimate before each token.
        mask: as rewards; bool, or numbers that are zero where masked.
        gamma: discount per token with mask 1, in [0, 1].
        lam: in [0, 1]; 1 is the Monte Carlo return minus V, 0 the one-step error.
        cu_seqlens: (S + 1,) int64 or int32 bounds of packed sequences, which may be empty; tokens after the last bound
            are padding.
        backend: as `linear_logprob`.

    Returns:
        advantages and returns, shaped as rewards; float32, or float64 if rewards or values are; exactly 0 where masked.
        Constants: no gradient reaches rewards or values.

    Raises:
        ValueError: shapes or devices differ, gamma or lam is outside [0, 1], or cu_seqlens are not bounds; on a GPU
            these give NaN everywhere instead, because reading them would wait for it.
        TypeError: rewards or values are not floating point, or cu_seqlens are not integers.
    """
    check.floating(OP, "rewards", rewards)
    check.floating(OP, "values", values)
    bounds = _bounds(rewards.shape, cu_seqlens, rewards.device)
    for name, tensor in (("values", values), ("mask", mask)):
        check.shape(OP, name, tensor, rewards.shape, "as rewards")
        check.device(OP, name, tensor, rewards.device, "rewards")
    for name, number in (("gamma", gamma), ("lam", lam)):
        check.require(0.0 <= number <= 1.0, OP, name, "a number from 0 to 1", number)
    good = None
    if cu_seqlens is not None and rewards.device.type != "cpu":  # where reading them would wait for the device
        good = _are_bounds(bounds, rewards.shape[0])
        bounds = torch.where(good, bounds, 0)  # kernels read no tokens outside the ones given
    flat = (x.detach().reshape(-1) for x in (rewards, values, mask != 0))
    both = _gae(*flat, bounds, float(gamma), float(lam), backend)
    advantages, returns = both if good is None else (torch.where(good, one, torch.nan) for one in both)
    return advantages.reshape(rewards.shape), returns.reshape(rewards.shape)
