"""AdamW on float32 master weights, for a policy whose own weights may be bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.optim.adamw import adamw

from fastrl.check import require
from fastrl.trainer.config import OptimizerConfig

POLICY, CRITIC = "optimizer", "critic"  # names of a run's optimizers, and of their files in a checkpoint
PIECE = 1 << 19  # 16-bit gradients widened at a time
SLICE = 1 << 22  # weights updated at a time: what the float32 copy of a slice costs is all the copy there is


class MasterOptimizer:
    """AdamW whose weights and gradients are float32 whatever the model's dtype.

    An update of about lr is far below the spacing of bfloat16 numbers around a typical weight, so 16-bit weights alone
    would not move. A master is kept as two halves of 16 bits: the model's own weight, which is the master rounded to
    bfloat16, and what the rounding left over. Together they are the float32 bits, in 4 bytes instead of 6.

    Everything lies in flat buffers made once: no allocation while training, and the peak of memory shows in the first
    step. Gradients of each micro-batch are added in float32 as soon as they are complete, and their 16-bit buffers
    freed; `param.main_grad`, the field's name for it since Megatron, is where an op may add directly.

    Args:
        params: of one dtype, bfloat16 or float32; those without `requires_grad` are left alone. They become views of a
            flat buffer. `zero_grad` on the model would detach float32 gradients from theirs: `step` clears them.
        config: rates, betas, clipping, schedule.
        total_steps: where a cosine schedule ends.

    Raises:
        ValueError: the parameters are of another dtype, or of several.
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
            param.data, param.main_grad = weight, grad
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
        """The Euclidean norm of the gradient as it stands; waits for the device."""
        return torch.linalg.vector_norm(self.grad).item()

    @torch.no_grad()
    def step(self, norm: float | None = None) -> float:
        """Clips, updates masters and model, clears gradients; returns the norm before clipping, which may be given.

        A norm that is not finite updates nothing: the caller decides what to do with it.
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
        """Clears the gradients of micro-batches whose step is not taken."""
        self.grad.zero_()
        if self.low_bits is not None:
            for param in self.params:
                param.grad = None  # there is one where a backward pass was cut short

    def masters(self) -> list[torch.Tensor]:
        """The float32 weights, one tensor per parameter: views when the model is float32, copies when it is not."""
        return self._views(self.weights if self.low_bits is None else join(self.weights, self.low_bits))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on besides `steps`: the flat buffers themselves, no copies.

        weights `(n,)` in the model's dtype; low_bits `(n,)` int16, of a bfloat16 model; exp_avg, exp_avg_sq `(n,)`
        float32.
        """
        named = {name: getattr(self, name) for name in ("weights", "low_bits", "exp_avg", "exp_avg_sq")}
        return {name: buffer for name, buffer in named.items() if buffer is not None}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor], *, steps: int) -> None:
        """Goes on from where `tensors` were taken, after `steps` steps; the model's weights change with the masters.

        Raises:
            ValueError: they are of parameters of another number or dtype.
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
            [torch.tensor(float(self.steps), device=master.device)],  # each slice counts up its own
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
def whole_step(optimizers: Iterable[MasterOptimizer]) -> Iterator[None]:
    """Inside, gradients are added; of a block that raises, none are left for the next step."""
    try:
        yield
    except BaseException:
        for optimizer in optimizers:
            optimizer.discard()
        raise


def join(weights: torch.Tensor, low_bits: torch.Tensor) -> torch.Tensor:
    """float32 masters from bfloat16 weights and int16 rests: their bits are (weight's bits << 16) + rest."""
    return (weights.view(torch.int16).int().bitwise_left_shift_(16)).add_(low_bits).view(torch.float32)


def split(masters: torch.Tensor, weights: torch.Tensor, low_bits: torch.Tensor) -> None:
    """Writes the nearest bfloat16 of each float32 master to `weights`, and the difference of their bits to `low_bits`.

    The low bits of a tie that rounds down would be 2^15, one more than int16 holds: that master loses its last bit.
    """
    weights.copy_(masters)
    high = weights.view(torch.int16).int().bitwise_left_shift_(16)
    low_bits.copy_((masters.view(torch.int32) - high).clamp_(max=2**15 - 1))


def _add_to(grad: torch.Tensor) -> Callable[[torch.nn.Parameter], None]:
    """A hook that adds a complete 16-bit gradient to its float32 buffer and frees it."""

    def hook(param: torch.nn.Parameter) -> None:
        if param.grad is None:  # an op has added all of it already
            return
        # torch widens a 16-bit addend before it adds: piece by piece, the wide copy stays in the cache.
        for total, part in zip(grad.flatten().split(PIECE), param.grad.flatten().split(PIECE), strict=True):
            total.add_(part)
        param.grad = None

    return hook
