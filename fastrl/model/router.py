"""The load-balancing loss of a mixture of experts, attached to the hidden states and so added to any loss on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastrl.types import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METRIC = "aux_loss"  # as TRL calls it


class RouterLoss:
    """coef times the model's own load-balancing loss (Switch Transformer, arXiv:2101.03961, equations 4 to 6).

    Without it, a mixture of experts in training sends its tokens to ever fewer experts. It is computed per micro-batch,
    without padding, and averaged over a step weighted by tokens.

    Args:
        balance: transformers' `load_balancing_loss_func` for the model.
        coef: its coefficient.
        experts, top_k: from the model's configuration.
    """

    def __init__(self, balance: Callable[..., torch.Tensor], coef: float, experts: int, top_k: int) -> None:
        self.coef = coef
        self._balance, self._experts, self._top_k = balance, experts, top_k
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attach(self, hidden: torch.Tensor, logits: tuple[torch.Tensor, ...], batch: MicroBatch) -> torch.Tensor:
        """`hidden` unchanged; its backward pass also sends the gradient of this loss.

        Args:
            hidden: (N, H). logits: of each layer's router, (R * L, experts) or (R, L, experts).
        """
        real = batch.token_mask.reshape(-1)
        kept = tuple(layer.reshape(real.numel(), -1)[real] for layer in logits if layer is not None)
        loss = self._balance(kept, self._experts, self._top_k)
        self._seen.append((loss.detach() * batch.share, torch.as_tensor(batch.share)))
        return _WithLoss.apply(hidden, loss * (self.coef * batch.share))

    def metrics(self) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """The losses since the last call."""
        seen, self._seen = self._seen, []
        return [{METRIC: one} for one in seen]


def router_loss(model: PreTrainedModel, coef: float | None = None) -> RouterLoss | None:
    """The loss of a model's routers; None if it has none or the coefficient is 0.

    Args:
        coef: replaces the model's `router_aux_loss_coef`.
    """
    config: Any = model.config.get_text_config()
    balance = _balance(model)
    coef = getattr(config, "router_aux_loss_coef", 0.0) if coef is None else coef
    if balance is None or not coef:
        return None
    return RouterLoss(balance, float(coef), _experts(config), config.num_experts_per_tok)


def about_router(model: PreTrainedModel, coef: float | None = None) -> str:
    """A note on the routers' loss for a mixture of experts; empty for other models."""
    experts, loss = _experts(model.config.get_text_config()), router_loss(model, coef)
    if experts < 2:
        return ""
    if loss is not None:
        return f"Mixture of {experts} experts: the routers' load-balancing loss is added, times {loss.coef:g}."
    why = "with a coefficient of 0" if _balance(model) else f"since transformers has none for {type(model).__name__}"
    return f"Mixture of {experts} experts: it trains without a load-balancing loss, {why}."


def _experts(config: Any) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def _balance(model: PreTrainedModel) -> Callable[..., torch.Tensor] | None:
    module = sys.modules.get(type(model.get_decoder()).__module__)  # peft's own classes are elsewhere
    known = hasattr(model.config.get_text_config(), "router_aux_loss_coef")
    return getattr(module, "load_balancing_loss_func", None) if known else None


class _WithLoss(torch.autograd.Function):
    """Passes a tensor through; its backward pass also sends gradient 1 to a scalar loss."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.like = loss.new_ones(())
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, ctx.like
