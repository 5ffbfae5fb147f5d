"""AdamW on float32 master weights, for a policy whose own weights may be bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

import torch
from torch.optim.adamw import adamw

from fastrl.check import require
from fastrl.trainer.config import OptimizerConfig

POLICY, CRITIC = "optimizer", "critic"  # names of a run's optimizers, and of their files in a checkpoint
PIECE = 1 << 19  # 16-bit gradients widened at a time
SLICE = 1 << 22  # weights updated at a time: only one slice is ever copied to float32


class MasterOptimizer:
    """AdamW with float32 weights and gradients, whatever the model's dtype.

    An update of about lr is far below the spacing of bfloat16 numbers around a typical weight, so 16-bit weights alone
    would not move. Each float32 master is stored as two 16-bit halves: the model's weight, which is the master rounded
    to bfloat16, and the difference of their bits. Together they take 4 bytes per weight instead of 6.

    Everything lies in flat buffers allocated once, so peak memory shows in the first step. Gradients of each
    micro-batch are added in float32 as soon as they are complete, and their 16-bit buffers freed. An op may add
    directly to `param.main_grad`, the name that Megatron introduced.

    Args:
        params: all bfloat16 or all float32; those without `requires_grad` are left alone. They become views of a flat
            buffer. Do not call the model's `zero_grad`, which would detach float32 gradients from their buffer: `step`
            clears them.
        config: rates, betas, clipping, schedule.
        total_steps: where a cosine schedule ends.

    Raises:
        ValueError: the parameters have another dtype, or several.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], config: OptimizerConfig, total_steps: int) -> None:
        self.config, self.total_steps, self.steps = config, total_steps, 0
        self.params = [p for p in params if p.requires_grad]
        dtypes = {p.dtype for p in self.params}
        ok = dtypes in ({torch.bfloat16}, {torch.float32})
        require(ok, "MasterOptimizer", "params", "parameters of one dtype, bfloat16 or float32", dtypes)
        self.weights = torch.cat([p.detach().flatten() for p in self.params])
        self.low_bits = torch.zeros_like(self.weights, dtype=torch.int16) if dtypes == {torch.bfloat16} else None
        self.grad, self.exp_avg, self.exp_avg_sq = (
            torch.zeros_like(self.weights, dtype=torch.float32) for _ in range(3)
        )
        for param, weight, grad in zip(self.params, self._views(self.weights), self._views(self.grad), strict=True):
            param.data, param.main_grad = weight, grad  # ty: ignore[missing-attribute]  ours
            if self.low_bits is None:
                param.grad = grad
            else:
                param.register_post_accumulate_grad_hook(_add_to(grad))

    def learning_rate(self) -> float:
        """Linear warm-up, then constant or cosine to zero."""
        warm = min(1.0, (self.steps + 1) / max(1, self.config.warmup_steps))
        if self.config.schedule == "constant":
            return self.config.lr * warm
        done = max(0, self.steps - self.config.warmup_steps) / max(1, self.total_steps - self.config.warmup_steps)
        return self.config.lr * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    @torch.no_grad()
    def norm(self) -> float:
        """The Euclidean norm of the current gradient; waits for the device."""
        return torch.linalg.vector_norm(self.grad).item()

    @torch.no_grad()
    def step(self, norm: float | None = None) -> float:
        """Clips, updates masters and model, and clears gradients. Returns the norm before clipping.

        A given `norm` is not computed again. If it is not finite, nothing is updated; the caller decides what to do.
        """
        norm = self.norm() if norm is None else norm
        if math.isfinite(norm):
            if 0 < self.config.max_grad_norm < norm:
                self.grad.mul_(self.config.max_grad_norm / norm)
            for start in range(0, len(self.weights), SLICE):
                self._update(slice(start, start + SLICE))
            self.steps += 1
        self.grad.zero_()
        return norm

    def discard(self) -> None:
        """Clears the gradients of a step that will not be taken."""
        self.grad.zero_()
        if self.low_bits is not None:
            for param in self.params:
                param.grad = None  # left behind if a backward pass was cut short

    def masters(self) -> list[torch.Tensor]:
        """The float32 weights, one tensor per parameter: views if the model is float32, copies otherwise."""
        return self._views(self.weights if self.low_bits is None else join(self.weights, self.low_bits))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the next step depends on besides `steps`: the flat buffers themselves, not copies.

        exp_avg, exp_avg_sq `(n,)` float32; weights `(n,)` in the model's dtype; low_bits `(n,)` int16, only for a
        bfloat16 model.
        """
        named = {name: getattr(self, name) for name in ("exp_avg", "exp_avg_sq", "weights", "low_bits")}
        return {name: buffer for name, buffer in named.items() if buffer is not None}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor], *, steps: int) -> None:
        """Restores what `tensors` returned after `steps` steps; the model's weights change with the masters.

        Raises:
            ValueError: the number or the dtype of the parameters differs.
        """
        expected = {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in self.tensors().items()}
        got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        require(got == expected, "MasterOptimizer", "tensors", f"{expected}, as the model's", got)
        for name, buffer in self.tensors().items():
            buffer.copy_(tensors[name])
        self.steps = steps

    def _update(self, piece: slice) -> None:
        master = self.weights[piece] if self.low_bits is None else join(self.weights[piece], self.low_bits[piece])
        adamw(
            [master],
            [self.grad[piece]],
            [self.exp_avg[piece]],
            [self.exp_avg_sq[piece]],
            [],
            [torch.tensor(float(self.steps), device=master.device)],  # adamw increments it, so each slice gets its own
            fused=True,
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=self.learning_rate(),
            weight_decay=self.config.weight_decay,
            eps=self.config.eps,
            maximize=False,
        )
        if self.low_bits is not None:
            split(master, self.weights[piece], self.low_bits[piece])

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]


@contextmanager
def whole_step(optimizers: Iterable[MasterOptimizer]) -> Generator[None]:
    """Clears all gradients if the block raises, so that none leak into the next step."""
    try:
        yield
    except BaseException:
        for optimizer in optimizers:
            optimizer.discard()
        raise


def join(weights: torch.Tensor, low_bits: torch.Tensor) -> torch.Tensor:
    """float32 masters from bfloat16 weights and int16 low bits: (bits of the weight << 16) + low bits."""
    return (weights.view(torch.int16).int().bitwise_left_shift_(16)).add_(low_bits).view(torch.float32)


def split(masters: torch.Tensor, weights: torch.Tensor, low_bits: torch.Tensor) -> None:
    """Writes each float32 master, rounded to bfloat16, to `weights`, and the difference of their bits to `low_bits`.

    On a tie that rounds down the difference is 2^15, one more than int16 holds: that master loses its last bit.
    """
    weights.copy_(masters)
    high = weights.view(torch.int16).int().bitwise_left_shift_(16)
    low_bits.copy_((masters.view(torch.int32) - high).clamp_(max=2**15 - 1))


def _add_to(grad: torch.Tensor) -> Callable[[torch.nn.Parameter], None]:
    """A hook that adds a complete 16-bit gradient to its float32 buffer and frees it."""

    def hook(param: torch.nn.Parameter) -> None:
        if param.grad is None:  # an op has already added all of it
            return
        # torch widens a 16-bit addend before adding it; in pieces, the wide copy stays in the cache.
        for total, part in zip(grad.flatten().split(PIECE), param.grad.flatten().split(PIECE), strict=True):
            total.add_(part)
        param.grad = None

    return hook
