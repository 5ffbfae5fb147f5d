"""AdamW on float32 master weights, for a policy whose own weights may be 16-bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastrl.trainer.config import OptimizerConfig


class MasterOptimizer:
    """AdamW whose parameters and gradients are float32 whatever the model's dtype.

    An update of lr * 1 is far below the spacing of bfloat16 numbers around a typical weight, so 16-bit weights alone
    would not move. The model keeps its 16-bit copy for the matmuls; gradients of each micro-batch are added in float32
    as soon as they are complete, and their 16-bit buffers freed. float32 parameters are their own masters.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], config: OptimizerConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.params = [p for p in params if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.params]
        for param, master in zip(self.params, self.masters, strict=True):
            if master is not param:
                param.register_post_accumulate_grad_hook(_add_to(master))
        self.adamw = torch.optim.AdamW(
            self.masters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        # The whole state exists from the start: peak memory shows in the first step, not in the second.
        self.steps = 0

    def learning_rate(self) -> float:
        """Linear warm-up, then constant or cosine to zero."""
        warm = min(1.0, (self.steps + 1) / max(1, self.config.warmup_steps))
        if self.config.schedule == "constant":
            return self.config.lr * warm
        done = max(0, self.steps - self.config.warmup_steps) / max(1, self.total_steps - self.config.warmup_steps)
        return self.config.lr * warm * 0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * min(1.0, done))).item())

    @torch.no_grad()
    def step(self) -> float:
        """Clips, updates the masters, rounds them into the model, clears gradients; returns the norm before clipping.

        A norm that is not finite updates nothing: the caller decides what to do with it.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm or torch.inf).item()
        if norm == norm and norm != float("inf"):
            for group in self.adamw.param_groups:
                group["lr"] = self.learning_rate()
            self.adamw.step()
            self.steps += 1
            for param, master in zip(self.params, self.masters, strict=True):
                if master is not param:
                    param.copy_(master)
        for master in self.masters:
            master.grad = None
        return norm


def _add_to(master: torch.Tensor) -> object:
    def hook(param: torch.Tensor) -> None:
        grad = param.grad.float()
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        param.grad = None

    return hook
