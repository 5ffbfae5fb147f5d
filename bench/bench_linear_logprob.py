"""Log-probabilities from hidden states: without a gradient, with a frozen head, and with a trainable one."""

from __future__ import annotations

from typing import Any

import torch

import fastrl
from bench.peers import with_gradients
from bench.shapes import HEADS, HeadShape, HeadTensors, head_tensors, true_gradients, true_logps
from bench.timing import Outputs, Provider

OP, SHAPES, DEFAULT = "linear_logprob", HEADS, ("smollm2", "gemma3-270m")
MODES = {"no gradient": (), "frozen head": ("hidden",), "trainable head": ("hidden", "weight")}


def tensors(shape: HeadShape, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[HeadTensors]]:
    """Mode -> what the providers read."""
    return {mode: (head_tensors(shape, dtype, device, wants),) for mode, wants in MODES.items()}


def matmul_flops(head: HeadTensors) -> float:
    """What no provider can do without: the logits, and a matmul for each gradient."""
    return 2 * head.weight.numel() * len(head.hidden) * (1 + len(head.wants))


def truth(head: HeadTensors) -> Outputs:
    """Every output in float64."""
    return {"logps": true_logps(head)} | (true_gradients(head, head.grad_logps) if head.wants else {})


def fastrl_provider(backend: str, head: HeadTensors, **options: Any) -> Provider:
    """The op on a backend."""
    inputs = (head.hidden, head.weight, head.targets)
    return with_gradients(head, lambda: fastrl.linear_logprob(*inputs, **options, backend=backend).logps)


VARIANTS = {"recompute": lambda head: fastrl_provider("auto", head, memory="recompute")}  # the least memory
