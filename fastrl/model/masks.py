"""Dense attention masks in the form that each transformers model takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastrl import check

FULL, SLIDING = "full_attention", "sliding_attention"


def dense_masks(
    decoder: nn.Module,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    like: torch.Tensor,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The `attention_mask` that makes `decoder`'s layers attend where the dense `mask` is True.

    transformers passes a 4-D mask to every layer unchanged, so the mask must include a sliding window: a query at
    position p attends to keys at positions above p - window. Positions count in the text, not in the row: sequences
    that share a prompt are farther apart in the row. Models with different kinds of layers take one mask per kind.

    Args:
        mask: (R, 1, L, L) bool. position_ids: (R, L), or None to count along the row.
        like: a parameter. Eager attention adds its mask, which has this dtype and holds 0 and the lowest finite number.

    Raises:
        ValueError: the mask has another shape or dtype, or the model's attention takes no dense mask.
    """
    rows, length = input_ids.shape
    check.shape("backbone", "attention_mask", mask, (rows, 1, length, length), "as (R, 1, L, L) from input_ids")
    check.require(mask.dtype == torch.bool, "backbone", "attention_mask", "torch.bool when 4-D", mask.dtype)
    config: Any = decoder.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    _require_dense_attention(config, kinds)
    window = getattr(config, "sliding_window", None)
    eager = config._attn_implementation == "eager"
    full = _additive(mask, like.dtype) if eager else mask
    if not window or kinds == {FULL}:
        return full
    if position_ids is None:
        position_ids = torch.arange(length, device=input_ids.device).expand(rows, -1)
    behind = position_ids[:, None, :, None] - position_ids[:, None, None, :]  # (R, 1, L, L)
    narrowed = mask & (behind < window)
    sliding = _additive(narrowed, like.dtype) if eager else narrowed
    return {FULL: full, SLIDING: sliding} if kinds else sliding


def _require_dense_attention(config: Any, kinds: set[str]) -> None:
    attention = config._attn_implementation
    check.require(
        not any(name in attention for name in ("flash", "flex", "paged")),
        "backbone",
        "attention_mask",
        f"a 2-D mask, the only kind that {attention!r} attention takes",
        "a 4-D mask",
        "Load the model with attn_implementation='sdpa'.",
    )
    unknown = sorted(kinds - {FULL, SLIDING})
    check.require(
        not unknown,
        "backbone",
        "attention_mask",
        "a 2-D mask, as this model has layers that take no dense mask",
        f"a 4-D mask and layers of kind {', '.join(unknown)}",
        "Give each sequence its own row.",
    )


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Eager attention takes its softmax in float32, where float64's lowest number would be -inf and an empty row NaN.
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
