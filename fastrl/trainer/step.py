"""One optimizer step: micro-batches in, one update out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastrl.algorithms import GroupPolicyGradient
from fastrl.losses.metrics import Metrics, merge
from fastrl.model.policy import Policy
from fastrl.trainer.optimizer import MasterOptimizer
from fastrl.types import MicroBatch


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm is NaN or infinite; nothing was updated."""

    def __init__(self, what: str, value: float, batches: Sequence[MicroBatch]) -> None:
        super().__init__(f"{what} is {value}")
        self.batches = batches

    def save(self, folder: Path) -> Path:
        """Writes the step's micro-batches to `folder`/non_finite_batch.safetensors for inspection."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{index}.{name}": value.detach().cpu().contiguous()
            for index, batch in enumerate(self.batches)
            for name, value in vars(batch).items()
            if isinstance(value, torch.Tensor)
        }
        path = folder / "non_finite_batch.safetensors"
        save_file(tensors, path)
        return path


def optimise(
    policy: Policy,
    optimizer: MasterOptimizer,
    algorithm: GroupPolicyGradient,
    batches: Sequence[MicroBatch],
    normalizer: float,
    *,
    temperature: float,
) -> tuple[Metrics, dict[str, float]]:
    """Accumulates the gradient of every micro-batch, then steps; returns token metrics, and loss and gradient norm.

    The normaliser belongs to the whole step, so any split into micro-batches gives the same gradient.
    """
    loss, metrics = 0.0, []
    for batch in batches:
        out = algorithm.loss(policy, batch, normalizer, temperature=temperature, entropy=True)
        out.loss.backward()
        loss = loss + out.loss.detach()
        metrics.append(out.metrics)
    loss = float(loss)
    if not math.isfinite(loss):
        raise NonFiniteLoss("the loss", loss, batches)
    learning_rate = optimizer.learning_rate()
    norm = optimizer.step()
    if not math.isfinite(norm):
        raise NonFiniteLoss("the gradient norm", norm, batches)
    return merge(metrics), {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate}
