"""GRPO's loss with its KL term from log-probabilities, forward and backward."""

from __future__ import annotations

import torch

import fastrl
from bench.shapes import BATCHES, CLIP, KL_COEF, TokenTensors, grpo_loss, token_tensors
from bench.timing import Outputs, Provider

OP, SHAPES, DEFAULT = "policy_loss", BATCHES, ("demo", "long", "wide")


def tensors(batch: tuple[int, int], dtype: torch.dtype, device: torch.device) -> dict[str, tuple[TokenTensors]]:
    """Token tensors, float32 whatever `dtype`: log-probabilities are never less."""
    return {"": (token_tensors(batch, device),)}


def truth(tokens: TokenTensors) -> Outputs:
    """Loss and gradient in float64."""
    logps = tokens.logps.detach().double().requires_grad_()
    loss = grpo_loss(logps, tokens, kl=True)
    (gradient,) = torch.autograd.grad(loss, logps)
    return {"loss": loss.detach(), "grad_logps": gradient}


def fastrl_provider(backend: str, tokens: TokenTensors) -> Provider:
    """The op on a backend, its metrics included."""
    spec = fastrl.PolicyLoss(surrogate=fastrl.Clip(low=CLIP, high=CLIP), kl=fastrl.KL("k3", KL_COEF))

    def run() -> Outputs:
        out = fastrl.policy_loss(
            tokens.logps,
            tokens.advantages,
            spec,
            mask=tokens.mask,
            old_logps=tokens.old_logps,
            ref_logps=tokens.ref_logps,
            backend=backend,
        ).loss
        (gradient,) = torch.autograd.grad(out, tokens.logps)
        return {"loss": out.detach(), "grad_logps": gradient}

    return run
