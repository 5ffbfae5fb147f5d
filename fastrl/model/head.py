"""Splits a causal language model at its head, into a backbone that gives hidden states and a head that gives logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrl import check
from fastrl.model.fused_lm_head import FusedLMHead
from fastrl.model.head_layer import adapter_refusal as adapter_refusal
from fastrl.model.head_layer import head_bias, head_weight, require_linear
from fastrl.model.head_layer import is_adapted as is_adapted
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
        attention: extra arguments for the model's attention, from `fastrl.model.attention`.
    """
    return run_decoder(decoder, input_ids, attention_mask, position_ids, **attention).last_hidden_state


def run_decoder(
    decoder: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **named: Any,
) -> Any:
    """All outputs of the decoder; `named` may request `output_router_logits`."""
    mask: Any = attention_mask
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.numel() > 0:
        mask = dense_masks(decoder, input_ids, attention_mask, position_ids, next(decoder.parameters()))
    return decoder(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False, **named)


@dataclass(frozen=True)
class SplitModel:
    """The halves of a model: logits = cap(logit_scale (hidden weight^T + bias)), cap(z) = softcap tanh(z / softcap).

    The halves are the model's own modules, so training or sharding the model is training or sharding them.
    """

    model: PreTrainedModel
    decoder: nn.Module
    head: nn.Linear  # or peft's layer around one
    softcap: float | None
    logit_scale: float
    vocab_size: int | None = None  # rows of the head that are tokens; the rest has probability 0; None: all

    @property
    def weight(self) -> torch.Tensor:
        """(V, H); the input embeddings themselves if the model ties the two; `head_weight` with an adapter."""
        return head_weight(self.head)

    @property
    def bias(self) -> torch.Tensor | None:
        """(V,) or None; `head_bias` with an adapter."""
        return head_bias(self.head)

    @property
    def options(self) -> dict[str, Any]:
        """The fused ops' arguments about the head, besides its weight."""
        return {
            "bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "vocab_size": self.vocab_size,
        }

    def backbone(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """`last_hidden` of the model's own decoder."""
        return last_hidden(self.decoder, *inputs, **named)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The full logits (..., V); the fused ops do without them."""
        logits = self.head(hidden)[..., : self.vocab_size] * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# Names in configurations for the constants between the head's product and the logits, in the order of `SplitModel`.
SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon H1; muP models
DIVISORS = ("logits_scaling",)  # Granite
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_softcap")
LARGE = 100.0  # size of the logits for comparing a model with its halves: a cap does not show on small ones


def split_head(
    model: PreTrainedModel,
    vocab_size: int | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> SplitModel:
    """Splits a causal language model at its head, and checks on four tokens that the halves reproduce its logits, both
    at their own size and scaled up.

    `softcap` and `logit_scale` come from the model's configuration, under the names that models in transformers use
    (`SOFTCAPS`, `SCALES`, `DIVISORS`). Models read the same name in different ways: Granite divides by
    `logits_scaling` and HyperCLOVA X multiplies by it; vision-language models leave out what their language model has.
    So each reading is tried, and the one that gives the model's own logits is taken. If wrappers of the model's forward
    bring an autocast, as accelerate's do, the comparison is made in it; the halves themselves run in their caller's.

    Args:
        vocab_size: number of head rows that are tokens, as in `linear_logprob`.
        softcap, logit_scale: replace the configuration's.

    Raises:
        ValueError: the head is not a plain linear layer, or the model changes its logits in other ways. If other
            constants would work, the message names them.
    """
    _require_decoder_only(model)
    head = model.get_output_embeddings()
    head = head.lm_head if isinstance(head, FusedLMHead) else head
    _require_plain_head(model, head)
    decoder = _decoder(model)
    readings = [
        SplitModel(model, decoder, head, cap, scale)
        for scale in (_scales(model.config.get_text_config()) if logit_scale is None else [logit_scale])
        for cap in (_softcaps(model.config.get_text_config()) if softcap is None else [softcap])
    ]
    with _evaluating(model), torch.no_grad():
        halves = next((one for one in readings if _mismatch(one) is None), None)
        if halves is None:
            _refuse(readings[0])
    return replace(halves, vocab_size=vocab_size)


def _scales(config: Any) -> list[float]:
    """What a configuration may mean by its scales, the usual meaning first, no scale last."""
    scale = math.prod(getattr(config, name, None) or 1.0 for name in SCALES)
    divisor = math.prod(getattr(config, name, None) or 1.0 for name in DIVISORS)
    return list(dict.fromkeys((float(scale / divisor), float(scale * divisor), 1.0)))


def _softcaps(config: Any) -> list[float | None]:
    """The same for its soft cap."""
    caps = [float(cap) for name in SOFTCAPS if (cap := getattr(config, name, None))]
    return [*caps[:1], None]


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The module that gives hidden states; some wrappers call their language model a decoder with its head on, and
    transformers 4 the whole model, where its decoder is not called `model`."""
    decoder: Any = model.get_decoder()
    if getattr(decoder, "get_output_embeddings", lambda: None)() is not None:
        decoder = getattr(decoder, "model", getattr(decoder, "base_model", decoder))
    plain = getattr(decoder, "get_output_embeddings", lambda: None)() is None
    name = f"{type(decoder).__name__}, which has one,"
    do = "This model's head cannot be split off."
    check.require(plain, "split_head", "model", "a decoder without a head", f"{name} in a {type(model).__name__}", do)
    return decoder


def _require_decoder_only(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, getattr(model, "active_peft_config", None)
    check.require(
        not getattr(model.config, "is_encoder_decoder", False),
        "split_head",
        "model",
        "a decoder-only model",
        f"{name}, an encoder and a decoder",
        "Run the model yourself, and pass what its head is given, and the head's weight, to linear_logprob.",
    )
    check.require(
        not getattr(config, "is_prompt_learning", False),
        "split_head",
        "model",
        "adapters in the model's layers, or none",
        f"prompt tuning ({getattr(config, 'peft_type', '')})",
        "Use LoRA: its weights are in the layers, and no token is put before the prompt.",
    )


def _require_plain_head(model: nn.Module, head: nn.Module | None) -> None:
    from torch.distributed.tensor import DTensor

    name = type(model).__name__
    check.require(
        head is not None,
        "split_head",
        "model",
        "a model with output embeddings",
        name,
        "Load it with AutoModelForCausalLM.",
    )
    check.require(
        not isinstance(getattr(head, "weight", None), DTensor),
        "split_head",
        "head.weight",
        "a plain tensor",
        "a DTensor",
        "Split the model before sharding it.",
    )
    require_linear("split_head", "head", head)


@dataclass(frozen=True)
class HeadRun:
    """One call of a model, seen from its head."""

    logits: torch.Tensor  # the model's own, in float32
    hidden: torch.Tensor | None  # what its head was given; None if the model did not call it
    precision: AbstractContextManager[object]  # the autocast in which it was called


def watched(halves: SplitModel) -> HeadRun:
    """Calls the model on four tokens. Wrappers of its forward, such as accelerate's, bring an autocast of their own;
    only in the same do its halves compute what it computes."""
    kind, seen = halves.weight.device.type, []

    def state() -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    hook = halves.head.register_forward_pre_hook(lambda _, given: seen.append((given[0], state())))
    try:
        logits = halves.model(input_ids=_probe(halves), use_cache=False).logits.float()
    finally:
        hook.remove()
    hidden, (enabled, dtype) = seen[0] if seen else (None, state())
    precision = torch.autocast(kind, dtype, enabled) if (enabled, dtype) != state() else nullcontext()
    return HeadRun(logits, hidden, precision)


def rounding(hidden: torch.Tensor, logits: torch.Tensor) -> float:
    """The epsilon of the less precise of a head's input and output, which differ in an autocast."""
    return max(torch.finfo(one.dtype).eps for one in (hidden, logits))


def _mismatch(halves: SplitModel) -> tuple[float, float] | None:
    """(largest difference from the model's own logits, largest of those); None if it is only rounding."""
    run = watched(halves)
    with run.precision:
        hidden = halves.backbone(_probe(halves))
        if hidden.shape[-1] != halves.weight.shape[1]:
            return float("inf"), float("nan")
        largest = halves.head(hidden).abs().max().item()
        for factor in (1.0, LARGE / largest) if largest else (1.0,):  # a head of zeros has no large logits
            with _scaled_input(halves.head, factor):
                expected = run.logits if factor == 1.0 else watched(halves).logits
                ours = halves.logits(hidden)
            error, scale = (ours.float() - expected).abs().max().item(), expected.abs().max().item()
            # Each of the few roundings after the matmul is at most half an epsilon of the largest logit.
            if not error <= 4 * rounding(hidden, ours) * scale:
                return error, scale
    return None


def _probe(halves: SplitModel) -> torch.Tensor:
    """(1, 4) token ids to compare on."""
    return torch.arange(4, device=halves.weight.device).unsqueeze(0) % halves.weight.shape[0]


def _require_finite(model: PreTrainedModel) -> None:
    """Refuses NaN or infinite weights, which a diverged run leaves, before blaming the head."""
    bad = [name for name, one in model.named_parameters() if one.is_floating_point() and not one.isfinite().all()]
    got = f"NaN or infinity in {len(bad)} of its tensors, {bad[0]} first" if bad else ""
    check.require(not bad, "split_head", "model", "finite weights", got, "Take a checkpoint from before it diverged.")


def _refuse(halves: SplitModel) -> None:
    """Says how the halves differ from the model, and with which constants they would not."""
    _require_finite(halves.model)
    error, scale = _mismatch(halves) or (0.0, 0.0)
    check.require(
        False,
        "split_head",
        "model",
        f"logits that follow from the last hidden states and the head (softcap {halves.softcap}, "
        f"logit scale {halves.logit_scale:g})",
        f"a {type(halves.model).__name__} whose own differ by up to {error:.3g} (largest logit {scale:.3g})",
        _would_do(halves) or "This model's head cannot be split off.",
    )


def _would_do(halves: SplitModel) -> str:
    """Advice on constants with which the halves would give the model's logits; empty if there are none."""
    with watched(halves).precision:
        hidden = halves.backbone(_probe(halves))
        product = halves.head(hidden) if hidden.shape[-1] == halves.weight.shape[1] else hidden.new_zeros(1)
        largest, eps = product.abs().max().item(), rounding(hidden, product)
        if not largest:
            return ""
        pairs = []
        for size in (1e-3, LARGE, 1e4):  # where no cap shows; where it bends; where it is all that shows
            with _scaled_input(halves.head, size / largest):
                expected = halves.model(input_ids=_probe(halves), use_cache=False).logits.double()
                pairs.append((expected, halves.head(hidden).double()))
    (small, product), (large, large_product), (capped, _) = pairs
    scale, cap = ((small * product).sum() / product.square().sum()).item(), capped.abs().max().item()
    near = 64 * eps * large.abs().max()
    for softcap in (None, cap):
        logits = scale * large_product
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        if bool((logits - large).abs().max() <= near):
            too = "" if softcap is None else f" and softcap={softcap:.4g}"
            return f"With logit_scale={scale:.4g}{too} they agree: pass them to split_head, or set them in the recipe."
    return ""


@contextmanager
def _scaled_input(head: nn.Module, factor: float) -> Iterator[None]:
    """Inside the block, the head's input is multiplied by `factor`."""
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; restores each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
