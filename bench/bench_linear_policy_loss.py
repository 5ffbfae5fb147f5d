"""GRPO's loss straight from hidden states, forward and backward, with a trainable head."""

from __future__ import annotations

from typing import Any

import torch

import fastrl
from bench.peers import loss_with_gradients, plain_logps
from bench.shapes import (
    CLIP,
    HEADS,
    HeadShape,
    HeadTensors,
    TokenTensors,
    grpo_loss,
    head_tensors,
    token_tensors,
    true_gradients,
    true_logps,
)
from bench.timing import Outputs, Provider

OP, SHAPES, DEFAULT = "linear_policy_loss", HEADS, ("smollm2-2k", "gemma3-270m-1k")
# In GRPO on verifiable rewards, a third to two thirds of the groups often have equal rewards, so advantages of zero.
ZERO_ADVANTAGE = {"all groups train": 0.0, "half of the groups zero-advantage": 0.5}


def tensors(shape: HeadShape, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[HeadTensors, TokenTensors]]:
    """Mode -> what the providers read."""
    head = head_tensors(shape, dtype, device, ("hidden", "weight"))
    batch = (shape.tokens // shape.length, shape.length)
    with torch.no_grad():
        parts = zip(head.hidden.split(64), head.targets.split(64), strict=True)
        around = torch.cat([plain_logps(hidden, head.weight, targets) for hidden, targets in parts]).view(batch)
    return {
        mode: (head, token_tensors(batch, device, around=around, zero_advantage=s, padded=shape.padded))
        for mode, s in ZERO_ADVANTAGE.items()
    }


def matmul_flops(head: HeadTensors, tokens: TokenTensors) -> float:
    """What no provider can do without: logits of the completion tokens, two gradients of those that have one."""
    active = tokens.mask & (tokens.advantages != 0)[:, None]
    return 2 * head.weight.numel() * (int(tokens.mask.sum()) + 2 * int(active.sum()))


def truth(head: HeadTensors, tokens: TokenTensors) -> Outputs:
    """Loss and gradients in float64."""
    logps = true_logps(head).view(tokens.mask.shape).requires_grad_()
    loss = grpo_loss(logps, tokens, kl=False)
    (gradient,) = torch.autograd.grad(loss, logps)
    return {"loss": loss.detach()} | true_gradients(head, gradient.view(-1))


def fastrl_provider(backend: str, head: HeadTensors, tokens: TokenTensors, **options: Any) -> Provider:
    """The op on a backend."""
    spec = fastrl.PolicyLoss(surrogate=fastrl.Clip(low=CLIP, high=CLIP), aggregate="seq_mean_token_mean")
    shape = tokens.mask.shape
    return loss_with_gradients(
        head,
        lambda: (
            fastrl.linear_policy_loss(
                head.hidden.view(*shape, -1),
                head.weight,
                head.targets.view(shape),
                tokens.advantages,
                spec,
                mask=tokens.mask,
                old_logps=tokens.old_logps,
                backend=backend,
                **options,
            ).loss
        ),
    )


# Without metrics zero-advantage rows need no logits either.
VARIANTS = {"no-metrics": lambda head, tokens: fastrl_provider("auto", head, tokens, metrics=False)}
