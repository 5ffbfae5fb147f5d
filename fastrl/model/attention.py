"""Attention of transformers models in each layout of `fastrl.data.pack`: the backbone's arguments, and attention over
sequences laid end to end.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from statistics import median
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fastrl.check import choice, require
from fastrl.model.masks import FULL, SLIDING
from fastrl.types import MicroBatch

NAME = "fastrl_varlen"
IN_FLOAT32 = "fastrl_sdpa"
FLASH_DTYPES = (torch.bfloat16, torch.float16)


def varlen_attention_backend(device: torch.device | str) -> Literal["flash_attn", "torch"] | None:
    """The variable-length attention kernel of `device`; None if there is only the loop over sequences."""
    if torch.device(device).type != "cuda":
        return None
    if find_spec("flash_attn") is not None:
        return "flash_attn"
    if find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention.varlen import varlen_attn

        # Its first releases had neither grouped heads nor windows.
        if {"enable_gqa", "window_size"} <= inspect.signature(varlen_attn).parameters.keys():
            return "torch"
    return None


def prepare_attention(model: nn.Module, layout: str, *, dtype: torch.dtype) -> str:
    """Prepares a transformers model for `layout`, and returns the layout to pack with.

    `varlen` replaces the model's attention by `fastrl_varlen`, which calls the former SDPA if no sequence bounds are
    given, so generation and other callers see no difference. `auto` becomes `varlen` if the device has a kernel for it
    that supports `dtype`, the dtype of attention. Otherwise it stays `auto`, or becomes `padded` if the model cannot
    keep sequences in a row apart.

    Raises:
        ValueError: the model does not support the attention that the layout needs.
    """
    choice("prepare_attention", "layout", layout, ("auto", "padded", "shared", "varlen"))
    refusal = _refusal(model)
    if layout == "padded" or (layout == "auto" and refusal):
        return "padded"
    require(refusal is None, "prepare_attention", "model", *(refusal or ("", "")), "Use layout='padded'.")
    if layout == "auto":
        kernel = varlen_attention_backend(next(model.parameters()).device)
        layout = "varlen" if kernel is not None and dtype in FLASH_DTYPES else "auto"
    if layout == "varlen":
        _register(NAME, _attention_forward)
        model.set_attn_implementation(NAME)
    return layout


def _refusal(model: nn.Module) -> tuple[str, str] | None:
    """Why several sequences cannot share a row of this model, as (expected, got)."""
    config: Any = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", IN_FLOAT32, NAME):
        return "SDPA attention where sequences share a row", repr(config._attn_implementation)
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING})
    if other or getattr(model, "_is_stateful", False):  # a recurrent state would run from one sequence into the next
        return "attention in every layer where sequences share a row", ", ".join(other) or "recurrent layers"
    return None


def attention_inputs(batch: MicroBatch) -> dict[str, Any]:
    """The arguments of `SplitModel.backbone` besides `input_ids` and `position_ids` for the batch's layout.

    `padded`: no mask, because padding is on the right, where a causal query never looks, and without a mask SDPA can
    skip the part above the diagonal. `shared`: the dense mask. `varlen`: the bounds, and an empty 4-D mask. The empty
    mask stops transformers from building a dense one, and makes any other attention fail on its shape instead of
    attending across sequences.
    """
    if batch.attention_cu_seqlens is None:
        dense = batch.attention_mask is not None and batch.attention_mask.dim() == 4
        return {"attention_mask": batch.attention_mask if dense else None}
    bounds, longest = batch.attention_cu_seqlens, batch.attention_max_seqlen
    return {
        "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=bounds.device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention inside each of the sequences laid end to end along the first dimension.

    The kernels of `varlen_attention_backend` take bfloat16 and float16; other dtypes and devices get one SDPA call per
    sequence. Gradients flow to query, key and value.

    Args:
        query: (L, heads, head size). key, value: (L, key heads, head size); key heads divide heads.
        cu_seqlens: (S + 1,) int32. max_seqlen: the longest sequence.
        window: tokens that a query sees, itself included; None = all before it.

    Returns:
        (L, heads, head size), in query's dtype.
    """
    backend = varlen_attention_backend(query.device) if query.dtype in FLASH_DTYPES else None
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    left = -1 if window is None else window - 1
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query, key, value, *bounds, softmax_scale=scale, causal=True, window_size=(left, 0 if window else -1)
        )
    if backend == "torch":
        from torch.nn.attention.varlen import varlen_attn

        grouped = key.shape[1] != query.shape[1]
        return varlen_attn(query, key, value, *bounds, scale=scale, window_size=(left, 0), enable_gqa=grouped)
    return _loop(query, key, value, cu_seqlens, scale, window)


def _loop(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    sizes = cu_seqlens.diff().tolist()
    outputs = []
    for parts in zip(*(tensor.split(sizes) for tensor in (query, key, value)), strict=True):
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in parts)  # (1, heads, length, head size)
        length = q.shape[2]
        mask = None
        if window is not None and window < length:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        grouped = k.shape[1] != q.shape[1]
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)  # (L, heads, head size)


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, L, head size) in, (1, L, heads, head size) out."""
    if softcap is not None or s_aux is not None:
        do = "Use layout='padded' with the model's own attention."
        require(False, NAME, "model", "attention without softcap and sinks", type(module).__name__, do)
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    require(
        dropout == 0.0, NAME, "attention dropout", "0", dropout, "Set attention_dropout to 0 in the model's config."
    )
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(
        kind
    ):  # rotary embeddings give back float32 under autocast
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (L, heads, head size)
    return varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scale=scaling, window=sliding_window)[None], None


def in_float32(model: nn.Module) -> Callable[[], None]:
    """Makes a transformers model's SDPA compute bfloat16 inputs in float32 on CPUs where bfloat16 is slow.

    On processors without bfloat16 instructions, torch's forward and backward take 6 times as long as in float32.
    Returns the function that undoes it. Models with other attention are left alone.
    """
    config: Any = getattr(model, "config", None)
    configs = [] if config is None or not hasattr(config, "get_text_config") else [config, config.get_text_config()]
    found = [one for one in configs if getattr(one, "_attn_implementation", None) == "sdpa"]
    if found:
        _register(IN_FLOAT32, _sdpa_in_float32)
    for one in found:
        one._attn_implementation = IN_FLOAT32

    def undo() -> None:
        for one in found:
            if one._attn_implementation == IN_FLOAT32:
                one._attn_implementation = "sdpa"

    return undo


def _sdpa_in_float32(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, on float32 copies where bfloat16 is slow."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype, kind = query.dtype, query.device.type
    if kind != "cpu" or torch.bfloat16 not in (dtype, key.dtype, value.dtype) or not slow_bfloat16():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = (x.float() for x in (query, key, value))
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(kind, enabled=False):
        out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out.to(dtype), weights


@cache
def slow_bfloat16() -> bool:
    """Whether torch's attention on this CPU is clearly slower in bfloat16 than in float32, as measured."""
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.linspace(-1, 1, 4 * 192 * 64, device="cpu").view(1, 4, 192, 64).to(dtype).requires_grad_()
        calls[dtype] = lambda x=x: torch.autograd.grad(scaled_dot_product_attention(x, x, x, is_causal=True).sum(), x)
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in calls}
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(7):
            for dtype, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[dtype].append(time.perf_counter() - began)
    return median(seconds[torch.bfloat16]) > 1.5 * median(seconds[torch.float32])


def _register(name: str, forward: Callable[..., tuple[torch.Tensor, None]]) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
