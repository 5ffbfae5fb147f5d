"""One optimizer step: micro-batches in, one update out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastrl.algorithms import Algorithm
from fastrl.algorithms.masks import masked
from fastrl.losses.metrics import Metrics, merge
from fastrl.model.policy import Policy
from fastrl.model.scalar import Critic
from fastrl.progress import Progress, tracked, unseen
from fastrl.trainer.optimizer import POLICY, MasterOptimizer, whole_step
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
    critic: Critic | None,
    optimizers: Mapping[str, MasterOptimizer],
    algorithm: Algorithm,
    batches: Sequence[MicroBatch],
    normalizer: float,
    *,
    temperature: float,
    only_critic: bool = False,
    progress: Progress = unseen,
) -> tuple[Metrics, dict[str, float]]:
    """Accumulates the gradient of every micro-batch, then steps; returns token metrics, and loss and gradient norms.

    The normaliser belongs to the whole step, so any split into micro-batches gives the same gradient. Norm and learning
    rate of an optimizer but the policy's have its name in front. With `only_critic` the policy stays as it is.

    `progress` is told of the micro-batches, before each; when it raises, nothing was updated and no gradient is left.
    """
    # The optimizer's steps are saved with a checkpoint, so a resumed run draws what it would have drawn.
    seed, metrics = optimizers[POLICY].steps, []
    selects = algorithm.masks.on and not only_critic  # in a pass of its own
    if only_critic:
        policy, optimizers = None, {name: optimizer for name, optimizer in optimizers.items() if name != POLICY}
    else:
        options = {"temperature": temperature, "to_sampler": algorithm.to_sampler, "seed": seed}
        batches, noted = masked(policy, batches, algorithm.masks, algorithm.spec, **options, progress=progress)
        metrics.append(noted)
    loss = 0.0
    with whole_step(optimizers.values()):
        for batch in tracked(batches, progress, before=len(batches) if selects else 0):
            for out in algorithm.losses(policy, critic, batch, normalizer, temperature=temperature, entropy=True):
                out.loss.backward()
                loss = loss + out.loss.detach()
                metrics.append(out.metrics)
    routers = [model.router for model in (policy, critic) if getattr(model, "router", None)]
    metrics += [noted for router in routers for noted in router.metrics()]
    loss = float(loss)
    if not math.isfinite(loss):
        raise NonFiniteLoss("the loss", loss, batches)
    norms = {name: optimizer.norm() for name, optimizer in optimizers.items()}  # all of them before any steps
    for norm in norms.values():
        if not math.isfinite(norm):
            raise NonFiniteLoss("the gradient norm", norm, batches)
    numbers = {"loss": loss}
    for name, optimizer in optimizers.items():
        prefix = "" if name == POLICY else f"{name}/"
        numbers |= {f"{prefix}grad_norm": norms[name], f"{prefix}learning_rate": optimizer.learning_rate()}
        optimizer.step(norms[name])
    return merge(metrics), numbers
