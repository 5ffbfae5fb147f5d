"""The models being trained, their optimizers, and what algorithms need from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from fastrl.algorithms.base import Algorithm, Step
from fastrl.data.pack import pack, spread
from fastrl.data.plan import ModelShape
from fastrl.distributed import ALONE, World
from fastrl.losses.metrics import Metrics, merge
from fastrl.model.adapter import WithoutAdapter
from fastrl.model.policy import Policy
from fastrl.model.scalar import Critic, ScalarModel, SharedCritic
from fastrl.progress import Progress, unseen
from fastrl.trainer.optimizer import POLICY, MasterOptimizer, whole_step
from fastrl.types import Group, MicroBatch, Update

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


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


@dataclass
class Learner:
    """Models on one device; `steps` and the optimizers hold the training state."""

    policy: Policy | ScalarModel
    device: torch.device
    layout: str
    shape: ModelShape
    max_tokens: int  # of a micro-batch
    make_optimizers: Callable[[Learner], dict[str, MasterOptimizer]]  # by name of their file in a checkpoint
    critic: Critic | None = None
    reference: Policy | WithoutAdapter | None = None  # frozen, scores every batch
    adapted: PeftModel | None = None  # the policy's model as peft sees it
    temperature: float = 1.0
    steps: int = 0
    optimizers: dict[str, MasterOptimizer] = field(default_factory=dict)
    world: World = ALONE
    intact: bool = True  # False from the first weight that an update changes until the loop has taken note of it

    @property
    def updates(self) -> int:
        """Optimizer steps of the policy."""
        return self.optimizers[POLICY].steps if self.optimizers else 0

    def begin(self) -> None:
        """Makes the optimizers, whose buffers replace the storage of the weights."""
        self.optimizers = self.make_optimizers(self)

    def models(self) -> dict[str, PreTrainedModel]:
        """The trained models by folder name. A shared critic is only a head on the policy, so it is not among them."""
        critic = {"critic": self.critic.model} if isinstance(self.critic, ScalarModel) else {}
        return {"model": self.adapted or self.policy.model} | critic

    def pack(
        self, groups: Sequence[Group], *, mask_truncated: bool = False, whole_groups: bool = False
    ) -> list[MicroBatch]:
        """Micro-batches of the samples to train on, in the models' layout and within `max_tokens`."""
        return pack(
            groups,
            layout=self.layout,
            max_tokens=self.max_tokens,
            device=self.device,
            shape=self.shape,
            mask_truncated=mask_truncated,
            whole_groups=whole_groups,
        )

    def tensor(self, values: Sequence[float | None]) -> torch.Tensor | None:
        """(n,) float32; None if a value is missing."""
        return None if None in values else torch.tensor(values, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def score(
        self, batches: Sequence[MicroBatch], progress: Progress = unseen, *, old: bool = False
    ) -> list[MicroBatch]:
        """The micro-batches with what is computed before an update: `ref_logps` if there is a reference, `values` if
        there is a critic, `old_logps` if `old`. The samples get them too. Of several processes, each computes those
        of its own micro-batches."""
        every = self.world.map(batches, partial(self._scored, old=old), progress)
        for batch, found in zip(batches, every, strict=True):
            spread(batch, found)
        return [replace(batch, **found) for batch, found in zip(batches, every, strict=True)]

    def _scored(self, batch: MicroBatch, *, old: bool) -> dict[str, torch.Tensor]:
        shared, temperature = isinstance(self.critic, SharedCritic), self.temperature
        hidden = self.policy.hidden(batch) if old or shared else None
        found = {}
        if old:
            found["old_logps"] = self.policy.read(hidden, batch, temperature=temperature)
        if self.reference:
            found["ref_logps"] = self.reference.score(batch, temperature=temperature)
        if self.critic:
            found["values"] = self.critic.of(hidden) if shared else self.critic.values(batch)
        return found

    def step(self, algorithm: Algorithm, step: Step, progress: Progress = unseen) -> Update:
        """One optimizer step. Returns token metrics, and the loss, gradient norms and learning rates.

        Norm and learning rate of any optimizer but the policy's are prefixed with its name. `progress` is called before
        each micro-batch; if it raises, nothing is updated and the gradients are cleared.

        Raises:
            NonFiniteLoss: the loss or a gradient norm is not finite; nothing was updated.
        """
        trains = {name: one for name, one in self.optimizers.items() if not (step.only_critic and name == POLICY)}
        with whole_step(self.optimizers.values()):
            with self.world.together("the backward pass"):
                loss, metrics = algorithm.accumulate(self, step.share(self.world), progress)
            loss = self._summed(float(loss), trains)
            if not math.isfinite(loss):
                raise NonFiniteLoss("the loss", loss, step.batches)
            norms = {name: optimizer.norm() for name, optimizer in trains.items()}  # all norms before the first update
            for norm in norms.values():
                if not math.isfinite(norm):
                    raise NonFiniteLoss("the gradient norm", norm, step.batches)
        routers = [model.router for model in (self.policy, self.critic) if getattr(model, "router", None)]
        metrics = self._everyones([*metrics, *(noted for router in routers for noted in router.metrics())])
        numbers = {"loss": loss}
        self.intact = False
        for name, optimizer in trains.items():
            prefix = "" if name == POLICY else f"{name}/"
            numbers |= {f"{prefix}grad_norm": norms[name], f"{prefix}learning_rate": optimizer.learning_rate()}
            optimizer.step(norms[name])
        return merge(metrics), numbers

    def _summed(self, loss: float, trains: Mapping[str, MasterOptimizer]) -> float:
        """The loss of the whole step; sums the gradients of all processes."""
        total = torch.tensor(loss, dtype=torch.float64, device=self.device)
        self.world.sum_(total, *(optimizer.grad for optimizer in trains.values()))
        return float(total)

    def _everyones(self, metrics: Sequence[Metrics]) -> list[Metrics]:
        """The metrics of all processes."""
        if self.world.size == 1:
            return list(metrics)
        own = {name: [float(total), float(count)] for name, (total, count) in merge(metrics).items()}
        return [
            {name: tuple(torch.tensor(value, device=self.device) for value in row) for name, row in one.items()}
            for one in self.world.gather(own)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The counters, in a form that JSON can hold; tensors are saved separately."""
        return {"steps": self.steps, "updates": {name: one.steps for name, one in self.optimizers.items()}}

    def load(self, state: Mapping[str, Any], tensors: Callable[[str], dict[str, torch.Tensor]]) -> None:
        """Restores `state_dict` and the tensors of each optimizer, which `tensors` returns by name."""
        self.steps = state["steps"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_tensors(tensors(name), steps=state["updates"][name])
