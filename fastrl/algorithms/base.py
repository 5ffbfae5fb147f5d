"""What an algorithm is to the trainer's loop, and what it may ask of the learner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from fastrl.losses.metrics import Metrics
from fastrl.model.policy import Policy
from fastrl.model.scalar import Critic
from fastrl.progress import Progress, Watch
from fastrl.types import Batch, Group, MicroBatch

Kind = Literal["rewarded", "pairs", "ranked", "labelled", "completions"]  # of the groups that an algorithm learns from


class Learner(Protocol):
    """The models that train, as an algorithm sees them."""

    policy: Policy  # or, for a reward model, a `ScalarModel`
    critic: Critic | None
    steps: int  # training steps that are done
    updates: int  # optimizer steps of the policy that are done
    temperature: float  # of every log-probability of sampled completions

    def pack(
        self, groups: Sequence[Group], *, mask_truncated: bool = False, whole_groups: bool = False
    ) -> list[MicroBatch]:
        """`fastrl.data.pack.pack`, as the models take it."""
        ...

    def tensor(self, values: Sequence[float | None]) -> torch.Tensor | None:
        """(n,) float32 on the models' device; None where one is missing."""
        ...

    def score(self, batches: Sequence[MicroBatch], progress: Progress, *, old: bool) -> list[MicroBatch]:
        """With `ref_logps` where there is a reference, `values` where there is a critic, `old_logps` when asked for;
        the samples get them too."""
        ...


class Step(Protocol):
    """What one optimizer step learns from."""

    @property
    def batches(self) -> list[MicroBatch]:
        """All of it."""
        ...

    @property
    def label(self) -> str:
        """Which of the batch's steps it is, in words; empty where there is one."""
        ...

    @property
    def only_critic(self) -> bool:
        """Whether the policy stays as it is."""
        ...


class Algorithm(Protocol):
    """How groups become optimizer steps, and the gradient of one.

    Everything that belongs to a step and not to a micro-batch (counts, baselines, sorting) is computed over the whole
    step, so that no split into micro-batches changes the gradient.
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

        Steps that `batch.updates` says are done are left out, so the rest of an interrupted batch gives the rest of
        them. Each is to be taken before the next is asked for.
        """
        ...

    def accumulate(self, learner: Learner, step: Any, progress: Progress) -> tuple[torch.Tensor, list[Metrics]]:
        """Adds the gradient of a step's loss to the parameters; returns the loss, a scalar, and metrics to merge.

        `progress` is told of the micro-batches, before each; when it raises, the caller discards the gradients.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What changes as training goes on, as JSON can hold it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""
        ...
