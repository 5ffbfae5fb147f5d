"""Mask, aggregation and normaliser as one weight per token: loss = sum_t w_t l_t.

| aggregate             | w_t of a masked-in token           | default n                               |
|-----------------------|------------------------------------|-----------------------------------------|
| `token_mean`          | 1 / n                              | masked-in tokens                        |
| `prompt_mean`         | 1 / (tokens of its prompt's group) / n | groups with a masked-in token       |
| `seq_mean_token_mean` | 1 / (tokens of its sequence) / n   | sequences with a masked-in token        |
| `seq_mean_token_sum`  | 1 / n                              | sequences with a masked-in token        |
| `token_sum`           | 1 / n                              | none: `normalizer` is required          |

`prompt_mean` is from ScaleRL, arXiv:2510.13786. The default n counts the given tensors. If you split a batch, pass the
count of the whole batch, and the split changes nothing. If a split may cut through a prompt's group, pass
`prompt_mean` one divisor per sequence: the tokens of its whole group times n.
"""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.spec import AGGREGATES, Aggregate

OP = "token_weights"


def sequence_ids(shape: torch.Size, device: torch.device, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """The sequence of each token, (N,) int64, and the number of sequences: rows of (B, T), or bounds of packed (N,).

    Tokens outside the bounds get the id of a neighbour; `inside` masks them out.
    """
    if cu_seqlens is None:
        rows, columns = shape
        return torch.arange(rows, device=device).repeat_interleave(columns), rows
    positions = torch.arange(shape[0], device=device)
    num_seqs = cu_seqlens.numel() - 1
    ids = torch.searchsorted(cu_seqlens[1:].to(torch.int64), positions, right=True)
    return ids.clamp(max=max(num_seqs - 1, 0)), num_seqs


def inside(mask: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The mask as bool, False for packed tokens outside all sequences."""
    mask = mask.bool()
    if cu_seqlens is None:
        return mask
    positions = torch.arange(mask.numel(), device=mask.device)
    return mask & (positions >= cu_seqlens[0]) & (positions < cu_seqlens[-1])


def token_weights(
    mask: torch.Tensor,
    aggregate: Aggregate,
    *,
    normalizer: float | torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight of each token under an aggregation: the table in `fastrl.losses.aggregate`.

    Args:
        mask: (B, T) padded or (N,) packed, bool or integer; True where the token is part of the loss.
        normalizer: n, a positive number or a 0-d tensor, which is read without a host synchronisation; or, for
            `prompt_mean`, (B,) or (S,), the full divisor of each sequence's tokens.
        group_ids: (B,) or (S,) integers, equal if two sequences answer the same prompt; for `prompt_mean`.
        cu_seqlens: (S + 1,) bounds of the sequences in a packed mask; tokens outside them have weight 0.
        dtype: of the weights.

    Returns:
        The weights, shaped like `mask`; exactly 0 where it is False, so all 0 where nothing is masked in.

    Raises:
        ValueError: a name, a shape, or an argument that the aggregation needs is wrong or missing.
        TypeError: the mask or the ids have a floating-point dtype.
    """
    check.choice(OP, "aggregate", aggregate, AGGREGATES)
    check_layout(OP, mask, cu_seqlens)
    check_normalizer(OP, aggregate, normalizer)
    live = inside(mask, cu_seqlens)
    if mask.numel() == 0 or (cu_seqlens is not None and cu_seqlens.numel() == 1):
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    weights = torch.ones(mask.shape, dtype=dtype, device=mask.device)
    if aggregate in ("token_mean", "token_sum"):
        total = live.sum()
    else:
        by_row = mask.dim() == 2 or cu_seqlens is not None
        expected = "a (B, T) mask, or cu_seqlens with a packed one"
        check.require(by_row, OP, "cu_seqlens", expected, None, f"{aggregate} needs sequence bounds.")
        seq_ids, num_seqs = sequence_ids(mask.shape, mask.device, cu_seqlens)
        if isinstance(normalizer, torch.Tensor) and normalizer.dim() == 1:
            check.shape(OP, "normalizer", normalizer, (num_seqs,), "one per sequence, or a single number")
            return torch.where(live, weights / normalizer[seq_ids].view(mask.shape), 0).to(dtype)
        if aggregate == "prompt_mean":
            seq_ids = _group_of_token(seq_ids, num_seqs, group_ids)
        counts = _counts(live.reshape(-1), seq_ids, num_seqs)
        total = (counts > 0).sum()
        if aggregate != "seq_mean_token_sum":
            weights = weights / counts.clamp(min=1).to(dtype)[seq_ids].view(mask.shape)
    return torch.where(live, weights / (total if normalizer is None else normalizer), 0)


def _counts(live: torch.Tensor, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Masked-in tokens of each id, (size,) int64: integers, so the order of the additions does not matter."""
    return torch.zeros(size, dtype=torch.int64, device=live.device).index_add_(0, ids, live.long())


def _group_of_token(seq_ids: torch.Tensor, num_seqs: int, group_ids: torch.Tensor | None) -> torch.Tensor:
    """(N,) ids below `num_seqs`, equal where the prompts are: the rank of the group's first member among all ids."""
    do = "Give each sequence the id of its prompt."
    check.require(group_ids is not None, OP, "group_ids", "a tensor, for prompt_mean", None, do)
    check.shape(OP, "group_ids", group_ids, (num_seqs,), "one per sequence", do)
    check.integer(OP, "group_ids", group_ids)
    check.device(OP, "group_ids", group_ids, seq_ids.device, "mask")
    ranks = torch.searchsorted(group_ids.sort().values, group_ids)  # (S,)
    return ranks[seq_ids]


def check_layout(op: str, mask: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    """Require a bool or integer mask that is padded (B, T), packed (N,) with `cu_seqlens`, or plain (N,)."""
    check.require(
        not mask.is_floating_point(), op, "mask", "a bool or integer tensor", mask.dtype, "Use mask.bool().", TypeError
    )
    check.require(mask.dim() in (1, 2), op, "mask", "shape (B, T) or (N,)", tuple(mask.shape))
    if cu_seqlens is not None:
        check.require(mask.dim() == 1, op, "cu_seqlens", "None with a padded (B, T) mask", "a tensor", "Drop one.")
        bounds = cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1
        check.require(bounds, op, "cu_seqlens", "shape (S + 1,)", tuple(cu_seqlens.shape))
        check.integer(op, "cu_seqlens", cu_seqlens)
        check.device(op, "cu_seqlens", cu_seqlens, mask.device, "mask")


def check_normalizer(op: str, aggregate: Aggregate, normalizer: float | torch.Tensor | None) -> None:
    """Require a positive number or a 0-d tensor, and not None for `token_sum`."""
    if normalizer is None:
        do = "Pass what the sum is divided by, such as batch size times maximum length."
        check.require(aggregate != "token_sum", op, "normalizer", "a number or 0-d tensor, for token_sum", None, do)
    elif isinstance(normalizer, torch.Tensor):
        dims = (0, 1) if aggregate == "prompt_mean" else (0,)
        expected = "a 0-d tensor, or one number per sequence for prompt_mean"
        check.require(normalizer.dim() in dims, op, "normalizer", expected, tuple(normalizer.shape))
    else:
        check.require(normalizer > 0, op, "normalizer", "a positive number", normalizer)
