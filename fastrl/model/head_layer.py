"""The layer at a model's head: what it multiplies by and adds, with or without peft's adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastrl import check
from fastrl.model.accelerate import is_linear


def in_force(layer: nn.Module) -> nn.Module:
    """The layer that computes now: of a head in peft's `modules_to_save`, the active adapter's copy, or the original
    while adapters are off; any other layer itself."""
    copies = getattr(layer, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return layer
    active = [] if layer.disable_adapters else layer.active_adapters
    return copies[active[0]] if active and all(name in copies for name in active) else layer.original_module


def require_linear(op: str, argument: str, layer: nn.Module, error: type[Exception] = ValueError) -> None:
    """Requires a head of which `head_weight` and `head_bias` say all.

    Raises:
        error: it is another kind of layer, or its adapter is not a matrix.
    """
    layer = in_force(layer)
    refused = adapter_refusal(layer) if is_adapted(layer) else None
    check.require(
        refused is None,
        op,
        argument,
        "a linear layer, or one with adapters that are a matrix",
        f"one with {refused}",
        "Set lora_dropout to 0, use LoRA or DoRA, or leave the head out of target_modules.",
        error,
    )
    kind, do = type(layer).__name__, "Leave the head out of quantisation."
    if type(layer).__module__.startswith("peft."):
        do = "Give the head LoRA or DoRA, leave it out of the adapter, or call merge_and_unload() first."
        tuner = type(layer).__module__.split(".")[-2]  # for example loha, whose layer is also called Linear
        kind = f"one with another adapter of peft ({tuner}.{kind})"
    elif hasattr(layer, "get_output_embeddings"):
        do = "Pass its head, model.get_output_embeddings()."
    # A subclass that computes as its parent does, such as FSDP's, is plain.
    plain = is_linear(layer) or (isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward)
    check.require(
        plain or is_adapted(layer) or trains_tokens(layer), op, argument, "a torch.nn.Linear", kind, do, error
    )


def head_weight(layer: nn.Module) -> torch.Tensor:
    """(V, H): the weight that a head multiplies by now; `adapted_weight` with low-rank adapters."""
    layer = in_force(layer)
    return adapted_weight(layer) if is_adapted(layer) else layer.weight


def head_bias(layer: nn.Module) -> torch.Tensor | None:
    """(V,) or None: the bias that a head adds now; `adapted_bias` with low-rank adapters."""
    layer = in_force(layer)
    if trains_tokens(layer):
        return None
    return adapted_bias(layer) if is_adapted(layer) else layer.bias


def trains_tokens(layer: nn.Module) -> bool:
    """Whether a layer is a linear one with peft's `trainable_token_indices`: its weight has the trained rows.

    One with a bias is not, since peft leaves the bias out while the adapter is on.
    """
    base = layer.original_module if hasattr(layer, "token_adapter") else None
    return is_linear(base) and base.bias is None


def is_adapted(layer: nn.Module | None) -> bool:
    """Whether a layer is a linear one with peft's low-rank adapters."""
    return is_linear(getattr(layer, "base_layer", None)) and hasattr(layer, "lora_A")


def adapted_weight(layer: Any) -> torch.Tensor:
    """(out, in): W + (alpha / rank) B A of the active adapters, with gradient to A and B; W if they are switched off.

    DoRA (arXiv:2402.09353): m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, per row, with gradient to the
    magnitude m too; the norm is a constant.
    """
    weight = layer.base_layer.weight
    for name in _active(layer):
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
        if _variant(layer, name) == DORA:
            scale = layer.lora_magnitude_vector[name].weight / weight.detach().norm(dim=1)
            weight = scale[:, None].to(weight.dtype) * weight
    return weight


def adapted_bias(layer: Any) -> torch.Tensor | None:
    """(out,): b + (alpha / rank) b_B of the active adapters whose B has a bias; None if there is no bias at all."""
    bias = layer.base_layer.bias
    for name in _active(layer):
        own = layer.lora_B[name].bias
        if own is not None:
            own = (layer.scaling[name] * own).to(layer.base_layer.weight.dtype)
            bias = own if bias is None else bias + own
    return bias


def adapter_refusal(layer: Any) -> str | None:
    """What a head's adapters do beyond a matrix product; None if `adapted_weight` covers them."""
    for name in _active(layer):
        variant, dropout = _variant(layer, name), getattr(layer.lora_dropout[name], "p", 0.0)
        if variant not in (None, DORA):
            return f"LoRA of the kind {variant}"
        if variant == DORA and len(_active(layer)) > 1:
            return "DoRA beside another adapter"
        if dropout > 0:
            return f"LoRA with a dropout of {dropout:g}"
    return None


DORA = "DoraLinearVariant"


def _active(layer: Any) -> list[str]:
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _variant(layer: Any, name: str) -> str | None:
    """The name of peft's class for a variant of LoRA; None for plain LoRA."""
    if not hasattr(layer, "lora_variant"):  # peft before 0.16
        return DORA if getattr(layer, "use_dora", {}).get(name) else None
    return type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else None
