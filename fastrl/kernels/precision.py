"""In which dtype an op that is cheap and sensitive to rounding computes, and in which it answers."""

from __future__ import annotations

import torch


def widest(device: torch.device) -> torch.dtype:
    """float64 where the device has it. Advantages are few numbers beside logits: the width costs nothing that shows."""
    return torch.float32 if device.type == "mps" else torch.float64


def answer(*inputs: torch.Tensor) -> torch.dtype:
    """float64 when an input is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
