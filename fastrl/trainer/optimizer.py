"""AdamW on float32 master weights, for a policy whose own weights may be 16-bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from fastrl.trainer.config import OptimizerConfig


class MasterOptimizer:
    """AdamW whose parameters and gradients are float32 whatever the model's dtype.

    An update of lr * 1 is far below the spacing of bfloat16 numbers around a typical weight, so 16-bit weights alone
    would not move. The model keeps its 16-bit copy for the matmuls; gradients of each micro-batch are added in float32
    as soon as they are complete, and their 16-bit buffers freed. float32 parameters become views of their masters.
    `zero_grad` on the model would detach those views: gradients are cleared by `step` alone.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], config: OptimizerConfig, total_steps: int) -> None:
        self.config, self.total_steps, self.steps = config, total_steps, 0
        self.params = [p for p in params if p.requires_grad]
        # One buffer for all masters and one for all gradients: one kernel per update, no allocation while training,
        # and the peak of memory shows in the first step.
        sizes = [p.numel() for p in self.params]
        flat = torch.empty(sum(sizes), dtype=torch.float32, device=self.params[0].device)
        self.flat = torch.nn.Parameter(flat)
        self.flat.grad = torch.zeros_like(flat)
        self.masters = _views(flat, self.params)
        self.grads = _views(self.flat.grad, self.params)
        for param, master, grad in zip(self.params, self.masters, self.grads, strict=True):
            master.copy_(param.detach())
            param.main_grad = grad  # the field's name for it, since Megatron: the head's op adds to it directly
            if param.dtype == torch.float32:
                param.data, param.grad = master, grad
            else:
                param.register_post_accumulate_grad_hook(_add_to(grad))
        self.adamw = torch.optim.AdamW(
            [self.flat],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def learning_rate(self) -> float:
        """Linear warm-up, then constant or cosine to zero."""
        warm = min(1.0, (self.steps + 1) / max(1, self.config.warmup_steps))
        if self.config.schedule == "constant":
            return self.config.lr * warm
        done = max(0, self.steps - self.config.warmup_steps) / max(1, self.total_steps - self.config.warmup_steps)
        return self.config.lr * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    @torch.no_grad()
    def step(self) -> float:
        """Clips, updates the masters, rounds them into the model, clears gradients; returns the norm before clipping.

        A norm that is not finite updates nothing: the caller decides what to do with it.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.flat, self.config.max_grad_norm or math.inf).item()
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = self.learning_rate()
            self.adamw.step()
            self.steps += 1
            for param, master in zip(self.params, self.masters, strict=True):
                if param.dtype != torch.float32:
                    param.copy_(master)
        self.flat.grad.zero_()
        return norm


def _views(flat: torch.Tensor, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]


def _add_to(grad: torch.Tensor) -> Callable[[torch.nn.Parameter], None]:
    """A hook that adds a complete 16-bit gradient to its float32 buffer and frees it."""

    def hook(param: torch.nn.Parameter) -> None:
        grad.add_(param.grad)
        param.grad = None

    return hook
