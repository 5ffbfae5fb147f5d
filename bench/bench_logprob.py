"""Log-probabilities from logits that are in memory, forward and backward."""

from __future__ import annotations

import torch

import fastrl
from bench.shapes import HEADS, HeadShape
from bench.timing import Outputs, Provider

OP, SHAPES, DEFAULT = "logprob", HEADS, ("smollm2", "gemma3-270m")


def tensors(shape: HeadShape, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[torch.Tensor, ...]]:
    """Logits (N, V), targets and the gradient from above (N,)."""
    on = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    logits = torch.randn(shape.tokens, shape.vocabulary, **on).mul_(2)
    targets = torch.randint(shape.vocabulary, (shape.tokens,), **on)
    logits[torch.arange(shape.tokens, device=device), targets] += 12
    grad_logps = torch.randn(shape.tokens, **on) / shape.tokens
    return {"": (logits.to(dtype).requires_grad_(), targets, grad_logps)}


def truth(logits: torch.Tensor, targets: torch.Tensor, grad_logps: torch.Tensor) -> Outputs:
    """Log-probabilities and gradient in float64."""
    z = logits.detach().double()
    logps = z.gather(1, targets.unsqueeze(1)).squeeze(1) - z.logsumexp(1)
    gradient = z.softmax(-1).neg_()
    gradient[torch.arange(len(targets), device=targets.device), targets] += 1
    return {"logps": logps, "grad_logits": gradient.mul_(grad_logps.double().unsqueeze(1))}


def fastrl_provider(backend: str, logits: torch.Tensor, targets: torch.Tensor, grad_logps: torch.Tensor) -> Provider:
    """The op on a backend."""

    def run() -> Outputs:
        out = fastrl.logprob(logits, targets, backend=backend).logps
        (gradient,) = torch.autograd.grad(out, logits, grad_logps.to(out.dtype))
        return {"logps": out.detach(), "grad_logits": gradient}

    return run
