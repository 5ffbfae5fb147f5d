"""A causal language model cut at its head: the trunk that gives hidden states, and what turns them into logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrl import check
from fastrl.model.accelerate import is_linear
from fastrl.model.masks import dense_masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def last_hidden(
    decoder: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **attention: Any,
) -> torch.Tensor:
    """The last hidden states of a decoder after its final norm, (R, L, H) in the model's dtype, with gradients.

    Args:
        input_ids: (R, L) int64.
        attention_mask: (R, L), 1 where there is a token; or (R, 1, L, L) bool, True where a query may attend to a
            key, which layers with a sliding window narrow by `position_ids`; None is plain causal attention.
        position_ids: (R, L) int64; None counts from 0 along each row.
        attention: further arguments for the model's attention, as `fastrl.model.attention` makes them.
    """
    mask: Any = attention_mask
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.numel() > 0:
        mask = dense_masks(decoder, input_ids, attention_mask, position_ids, next(decoder.parameters()))
    outputs = decoder(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False, **attention)
    return outputs.last_hidden_state


def is_adapted(layer: nn.Module | None) -> bool:
    """Whether a linear layer carries an adapter."""
    return is_linear(getattr(layer, "base_layer", None)) and hasattr(layer, "get_delta_weight")


def adapted_weight(layer: Any) -> torch.Tensor:
    """(out, in): W + (alpha / rank) B A of the active adapters, with gradient to A and B; W where switched off."""
    weight = layer.base_layer.weight
    if layer.disable_adapters or layer.merged:
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


@dataclass(frozen=True)
class CutModel:
    """The halves of a model: logits = cap(logit_scale (hidden weight^T + bias)), cap(z) = softcap tanh(z / softcap).

    The halves are the model's own modules, so training or sharding the model is training or sharding them.
    """

    model: PreTrainedModel
    decoder: nn.Module
    head: nn.Linear  # or a low-rank adapter around one
    softcap: float | None
    logit_scale: float

    @property
    def weight(self) -> torch.Tensor:
        """(V, H); the input embeddings themselves where the model ties the two; `adapted_weight` under an adapter."""
        return adapted_weight(self.head) if is_adapted(self.head) else self.head.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """(V,) or None."""
        return self.head.bias

    def trunk(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """`last_hidden` of the model's own decoder."""
        return last_hidden(self.decoder, *inputs, **named)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits (..., V), in full; the fused ops compute what they need without them."""
        logits = self.head(hidden) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def cut(model: PreTrainedModel) -> CutModel:
    """Cut a causal language model at its head, after checking on four tokens that the halves give the model's logits.

    `softcap` is the config's `final_logit_softcapping` (Gemma 2), `logit_scale` its `logit_scale` (Cohere) or the
    inverse of its `logits_scaling` (Granite).

    Raises:
        ValueError: the head is not a plain linear layer, or the model does more to its logits than the above.
    """
    head = model.get_output_embeddings()
    _require_plain_head(model, head)
    config: Any = model.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    halves = CutModel(
        model=model,
        decoder=model.get_decoder(),
        head=head,
        softcap=getattr(config, "final_logit_softcapping", None) or None,
        logit_scale=1.0 / scaling if scaling else float(getattr(config, "logit_scale", None) or 1.0),
    )
    with _evaluating(model), torch.no_grad():
        _require_same_logits(halves)
    return halves


def _require_plain_head(model: nn.Module, head: nn.Module | None) -> None:
    from torch.distributed.tensor import DTensor

    name = type(model).__name__
    check.require(
        head is not None, "cut", "model", "a model with output embeddings", name, "Load it with AutoModelForCausalLM."
    )
    check.require(
        not isinstance(getattr(head, "weight", None), DTensor),
        "cut",
        "head.weight",
        "a plain tensor",
        "a DTensor",
        "Cut the model before sharding it.",
    )
    check.require(
        is_linear(head) or is_adapted(head),
        "cut",
        "head",
        "a torch.nn.Linear",
        type(head).__name__,
        "Leave the head out of quantisation.",
    )


def _require_same_logits(halves: CutModel) -> None:
    ids = torch.arange(4, device=halves.weight.device).unsqueeze(0) % halves.weight.shape[0]
    expected = halves.model(input_ids=ids, use_cache=False).logits.float()
    hidden = halves.trunk(ids)
    matches = hidden.shape[-1] == halves.weight.shape[1]
    error, scale = float("inf"), expected.abs().max().item()
    if matches:
        error = (halves.logits(hidden).float() - expected).abs().max().item()
    # Each of the few roundings after the matmul is at most half an epsilon of the largest logit.
    check.require(
        error <= 4 * torch.finfo(hidden.dtype).eps * scale,
        "cut",
        "model",
        f"logits that follow from the last hidden states and the head (softcap {halves.softcap}, "
        f"logit scale {halves.logit_scale:g})",
        f"a {type(halves.model).__name__} whose own differ by up to {error:.3g} (largest logit {scale:.3g})",
        "This model's head cannot be cut.",
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and afterwards each module in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
