"""Log-probabilities from logits that are in memory, forward and backward."""

from __future__ import annotations

import torch

import fastrl
from bench.shapes import HEADS, HeadShape
from bench.timing import Outputs, Provider

OP, SHAPES, DEFAULT = "logprob", HEADS, ("smollm2", "gemma3-270m")


def tensors(shape: HeadShape, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[torch.Tensor, ...]]:
    """Logits (N, V), targets and the gradient from above (N,)."""
    made = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(shape.tokens, shape.vocabulary, generator=made)
    targets = torch.randint(shape.vocabulary, (shape.tokens,), generator=made)
    logits[torch.arange(shape.tokens), targets] += 12
    grad_logps = torch.randn(shape.tokens, generator=made) / shape.tokens
    return {"": (logits.to(device, dtype).requires_grad_(), targets.to(device), grad_logps.to(device))}


def truth(logits: torch.Tensor, targets: torch.Tensor, grad_logps: torch.Tensor) -> Outputs:
    """Log-probabilities and gradient in float64."""
    z = logits.detach().double()
    gradient = -z.softmax(-1)
    gradient[torch.arange(len(targets)), targets] += 1
    logps = z.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return {"logps": logps, "grad_logits": gradient.mul_(grad_logps.double().unsqueeze(1))}


def fastrl_provider(backend: str, logits: torch.Tensor, targets: torch.Tensor, grad_logps: torch.Tensor) -> Provider:
    """The op on a backend."""

    def run() -> Outputs:
        out = fastrl.logprob(logits, targets, backend=backend).logps
        (gradient,) = torch.autograd.grad(out, logits, grad_logps.to(out.dtype))
        return {"logps": out.detach(), "grad_logits": gradient}

    return run
