"""Activation checkpointing that leaves the model in evaluation mode."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fastrl.check import require


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes the model's layers recompute their activations in the backward pass instead of storing them.

    Works in evaluation mode. The checkpointing in transformers needs training mode, which also turns on randomness that
    no module shows (functional dropout, layer drop, router noise).

    Raises:
        ValueError: the model has no layers that transformers would checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    got = f"{type(model).__name__}, which has none"
    require(
        bool(layers), "checkpoint_activations", "model", "layers that transformers can checkpoint", got, "Leave it off."
    )
    for layer in layers:
        layer.__class__ = _recomputed(type(layer))


@cache
def _recomputed(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A subclass of a layer that stores only its inputs."""

    def forward(self: torch.nn.Module, *args: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **named)
        return checkpoint(partial(kind.forward, self, **named), *args, use_reentrant=False, preserve_rng_state=False)

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__, "__module__": kind.__module__})
