"""The interface between an algorithm and the trainer's loop, and what it may use of the learner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from fastrl.distributed import World
from fastrl.losses.metrics import Metrics
from fastrl.model.scalar import Critic
from fastrl.progress import Progress, Watch
from fastrl.types import Batch, Group, MicroBatch

Kind = Literal["rewarded", "pairs", "ranked", "labelled", "completions"]  # kind of groups


class Learner(Protocol):
    """The models being trained, as an algorithm sees them."""

    policy: Any  # a `Policy` or, for a reward model, a `ScalarModel`
    critic: Critic | None
    steps: int  # training steps done
    updates: int  # optimizer steps of the policy done
    temperature: float  # of all log-probabilities of sampled completions
    world: World  # the processes that train together
    device: torch.device

    def pack(
        self, groups: Sequence[Group], *, mask_truncated: bool = False, whole_groups: bool = False
    ) -> list[MicroBatch]:
        """`fastrl.data.pack.pack` with the models' layout and limits."""
        ...

    def tensor(self, values: Sequence[float | None]) -> torch.Tensor | None:
        """(n,) float32 on the models' device; None if a value is missing."""
        ...

    def score(self, batches: Sequence[MicroBatch], progress: Progress, *, old: bool) -> list[MicroBatch]:
        """The micro-batches with `ref_logps` if there is a reference, `values` if there is a critic, and `old_logps` if
        `old`. The samples get them too."""
        ...


class Step(Protocol):
    """The data of one optimizer step."""

    @property
    def batches(self) -> list[MicroBatch]:
        """All micro-batches of the step."""
        ...

    def share(self, world: World) -> Step:
        """The same step with this process's micro-batches alone; counts and normalisers stay the whole step's."""
        ...

    @property
    def label(self) -> str:
        """Which of the batch's steps this is, in words; empty if there is only one."""
        ...

    @property
    def only_critic(self) -> bool:
        """Whether only the critic trains."""
        ...


class Algorithm(Protocol):
    """Turns groups into optimizer steps, and computes the gradient of a step.

    Counts, baselines and sorting are computed over the whole step, so the split into micro-batches never changes the
    gradient.
    """

    kind: Kind

    @property
    def needs_ref(self) -> bool:
        """Whether `MicroBatch.ref_logps` is read."""
        ...

    @property
    def needs_critic(self) -> bool:
        """Whether it learns with a critic."""
        ...

    @property
    def needs_greedy(self) -> bool:
        """Whether `Group.greedy_reward` is read."""
        ...

    def updates(self, learner: Learner, batch: Batch, watch: Watch) -> Iterator[Step]:
        """The optimizer steps on a batch: label, drop what cannot contribute, split, pack, score.

        Skips the steps that `batch.updates` lists as done, so an interrupted batch continues where it stopped. Take
        each step before asking for the next.
        """
        ...

    def accumulate(self, learner: Learner, step: Any, progress: Progress) -> tuple[torch.Tensor, list[Metrics]]:
        """Adds the gradient of a step's loss to the parameters; returns the scalar loss and metrics to merge.

        `progress` is called before each micro-batch; if it raises, the caller discards the gradients.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """State that changes during training, in a form that JSON can hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`."""
        ...
