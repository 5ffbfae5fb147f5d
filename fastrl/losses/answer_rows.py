"""Lays out padded or packed answers as one row each, for the preference losses."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.utils.rnn import pad_sequence

from fastrl import check
from fastrl.losses.aggregate import check_layout


@dataclass(frozen=True)
class Rows:
    """Answers as rows: exact zeros where the mask is False, so a NaN there reaches neither loss nor gradient."""

    logps: torch.Tensor  # (P, T)
    mask: torch.Tensor  # (P, T) bool
    lengths: torch.Tensor  # (P,) tokens that count, in the dtype of logps
    ref_logps: torch.Tensor | None = None  # (P, T), or (P,) sums
    log_sum_sq_probs: torch.Tensor | None = None  # (P, T)


def answer_rows(
    op: str,
    side: str,
    logps: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    ref_logps: torch.Tensor | None = None,
    log_sum_sq_probs: torch.Tensor | None = None,
) -> Rows:
    """Checks and lays out the answers of one side; argument names in messages begin with `side`, such as chosen_."""
    name, packed = f"{side}logps", cu_seqlens is not None
    check.floating(op, name, logps)
    expected = "shape (N,) with cu_seqlens" if packed else "shape (P, T), or packed with cu_seqlens"
    check.require(logps.dim() == 2 - packed, op, name, expected, tuple(logps.shape))
    do = "Without one the padding would be trained on."
    check.require(mask is not None or packed, op, f"{side}mask", "a mask with padded log-probabilities", None, do)
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    check.shape(op, f"{side}mask", mask, logps.shape, f"as {name}")
    check.device(op, f"{side}mask", mask, logps.device, name)
    check_layout(op, mask, cu_seqlens)
    bounds = cu_seqlens.tolist() if packed else None
    if packed:
        ascend = bounds == sorted(bounds) and bounds[0] >= 0 and bounds[-1] <= len(logps)
        check.require(ascend, op, f"{side}cu_seqlens", f"bounds that ascend from 0 to {len(logps)}", bounds[:8])
    sums = (len(bounds) - 1 if packed else len(logps),)
    _check_like(op, f"ref_{side}logps", ref_logps, logps, name, sums)
    _check_like(op, f"{side}log_sum_sq_probs", log_sum_sq_probs, logps, name, None)

    mask = _padded(mask.bool(), bounds)
    lengths = mask.sum(1)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    outside = _outside(op, f"{side}mask", lengths, dtype)

    def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or tensor.shape != logps.shape:
            return None if tensor is None else tensor.to(dtype)
        return torch.where(mask, _padded(tensor.to(dtype), bounds), outside)

    ref_logps, log_sum_sq_probs = (None if x is None else x.detach() for x in (ref_logps, log_sum_sq_probs))
    return Rows(rows(logps), mask, lengths.to(dtype), rows(ref_logps), rows(log_sum_sq_probs))


def _outside(op: str, name: str, lengths: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(P, 1): what stands where the mask is False: 0, and in an answer without tokens, which has no loss, NaN.

    On a CPU such an answer is refused, unless this is compiled; a GPU would have to be waited for.
    """
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        empty = (lengths == 0).nonzero().view(-1).tolist()
        got, do = f"none in {empty[:8]}", "Leave such pairs out."
        check.require(not empty, op, name, "a token in every answer", got, do)
    return torch.zeros_like(lengths, dtype=dtype).masked_fill(lengths == 0, torch.nan).unsqueeze(1)


def _check_like(
    op: str, name: str, tensor: torch.Tensor | None, logps: torch.Tensor, like: str, also: tuple[int, ...] | None
) -> None:
    """Requires a given tensor to be floating point and shaped like `logps`, or `also`."""
    if tensor is not None:
        check.floating(op, name, tensor)
        check.device(op, name, tensor, logps.device, like)
        if tensor.shape != logps.shape and tuple(tensor.shape) != also:
            # Only now: torch.compile takes a size put in a message for a constant.
            either = f" or {also}, sums of answers" if also else ""
            check.require(False, op, name, f"shape {tuple(logps.shape)} as {like}{either}", tuple(tensor.shape))


def _padded(tensor: torch.Tensor, bounds: list[int] | None) -> torch.Tensor:
    """(P, T) rows of a packed tensor, padded with zeros; a padded tensor unchanged."""
    if bounds is None:
        return tensor
    if len(bounds) == 1:
        return tensor[:0].view(0, 0)  # a view, so that an empty loss has a gradient too
    sequences = [tensor[start:end] for start, end in pairwise(bounds)]
    return pad_sequence(sequences, batch_first=True)


def sequence_logps(rows: Rows, token_weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) sums over the tokens, for the policy and the reference; zeros without a reference."""

    def total(logps: torch.Tensor) -> torch.Tensor:
        if logps.dim() == 1:
            return logps
        return (logps if token_weights is None else logps * token_weights).sum(1)

    policy = total(rows.logps)
    return policy, torch.zeros_like(policy) if rows.ref_logps is None else total(rows.ref_logps)


def split_pairs(
    cu_seqlens: torch.Tensor, *, logps: torch.Tensor, **tensors: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The keyword arguments of `preference_loss` from one packed forward pass with alternating chosen and rejected.

    `fastrl.data.pack.pack(..., whole_groups=True)` lays pairs out this way.

    Args:
        cu_seqlens: (2 P + 1,) int, bounds of the sequences.
        logps: (N,) packed.
        tensors: `mask`, `ref_logps` and `log_sum_sq_probs`, like `logps` where given.

    Raises:
        ValueError: the number of sequences is odd, or a tensor has another name.
    """
    S = cu_seqlens.numel() - 1
    check.require(S % 2 == 0, "split_pairs", "cu_seqlens", "an even number of sequences, pairs of two", S)
    for name, tensor in tensors.items():
        check.choice("split_pairs", "tensors", name, ("mask", "ref_logps", "log_sum_sq_probs"))
        if tensor is not None:
            check.shape("split_pairs", name, tensor, logps.shape, "as logps")
    lengths = cu_seqlens.diff()
    inner = slice(*cu_seqlens[[0, -1]].tolist())
    side_of_token = (torch.arange(S, device=lengths.device) % 2).repeat_interleave(lengths)
    arguments = {}
    for place, side in enumerate(("chosen", "rejected")):
        take = side_of_token == place
        arguments[f"{side}_cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths[place::2].cumsum(0)])
        for name, tensor in {"logps": logps, **tensors}.items():
            if tensor is not None:
                key = f"ref_{side}_logps" if name == "ref_logps" else f"{side}_{name}"
                arguments[key] = tensor[inner][take]
    return arguments
