"""GRPO's loss with its KL term from log-probabilities and rewards, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

import fastrl
from bench.peers import group_normalised
from bench.shapes import BATCHES, CLIP, GROUP, KL_COEF, TokenTensors, grpo_loss, token_tensors
from bench.timing import Outputs, Provider
from fastrl.advantages import GRPO
from fastrl.losses.policy import flatten_tokens
from fastrl.ops.group_policy_loss import group_policy_loss as op

OP, SHAPES, DEFAULT = "group_policy_loss", BATCHES, ("demo", "wide")
SPEC = fastrl.PolicyLoss(surrogate=fastrl.Clip(low=CLIP, high=CLIP), kl=fastrl.KL("k3", KL_COEF))


def tensors(batch: tuple[int, int], dtype: torch.dtype, device: torch.device) -> dict[str, tuple]:
    """Token tensors, and a reward per sequence in place of its advantage; float32 whatever `dtype`."""
    tokens = token_tensors(batch, device)
    rewards = torch.randn(batch[0], generator=torch.Generator().manual_seed(2)).to(device)
    return {"": (tokens, rewards)}


def truth(tokens: TokenTensors, rewards: torch.Tensor) -> Outputs:
    """Loss and gradient in float64."""
    logps = tokens.logps.detach().double().requires_grad_()
    loss = grpo_loss(logps, replace(tokens, advantages=group_normalised(rewards.double(), GRPO.eps)), kl=True)
    (gradient,) = torch.autograd.grad(loss, logps)
    return {"loss": loss.detach(), "grad_logps": gradient}


def fastrl_provider(backend: str, tokens: TokenTensors, rewards: torch.Tensor) -> Provider:
    """The public function on a backend, its metrics included."""
    given = {"mask": tokens.mask, "old_logps": tokens.old_logps, "ref_logps": tokens.ref_logps}
    return _with_gradient(
        tokens,
        lambda: (
            fastrl.group_policy_loss(tokens.logps, rewards, GRPO, SPEC, **given, group_size=GROUP, backend=backend).loss
        ),
    )


def operator(tokens: TokenTensors, rewards: torch.Tensor) -> Provider:
    """The operator alone: weights and ids are made beforehand, as where a batch has several updates."""
    shape, device = tokens.mask.shape, tokens.mask.device
    given = {"mask": tokens.mask, "old_logps": tokens.old_logps, "ref_logps": tokens.ref_logps}
    flat = flatten_tokens(OP, shape, device, None, SPEC, **given)
    groups = torch.arange(shape[0], device=device) // GROUP
    inputs = (rewards, groups, flat.weights, flat.mask, flat.old_logps, flat.ref_logps, None, None, flat.seq_ids)
    options = (GRPO.baseline, GRPO.scale, GRPO.eps, SPEC.code, "auto")
    return _with_gradient(tokens, lambda: op(tokens.logps.view(-1), *inputs, *options)[0])


def _with_gradient(tokens: TokenTensors, loss: Callable[[], torch.Tensor]) -> Provider:
    def run() -> Outputs:
        out = loss()
        (gradient,) = torch.autograd.grad(out, tokens.logps)
        return {"loss": out.detach(), "grad_logps": gradient}

    return run


VARIANTS = {"operator": operator}
