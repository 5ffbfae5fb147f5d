"""Pre-written groups: pairs, labelled answers, demonstrations, scored completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastrl.algorithms.base import Kind, Learner
from fastrl.data.sampler import PromptSampler
from fastrl.progress import Watch
from fastrl.types import Batch, Group


@dataclass
class Offline:
    """Pre-written rows, shuffled anew in each epoch."""

    rows: PromptSampler[Group]
    number: int  # rows per step
    kind: Kind
    seed: int = 0
    replays: ClassVar[bool] = True

    def next(self, learner: Learner, watch: Watch) -> Batch:
        """As `Source`."""
        groups = self.rows.next(self.number)
        numbers = {"epoch": float(self.rows.epoch)}
        return Batch(groups, seed=self.seed + learner.steps + 1, kind=self.kind, numbers=numbers)

    def publish(self, learner: Learner) -> None:
        """Does nothing: there is no sampler."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the rows."""
        return self.rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `Source`."""
        self.rows.load_state_dict(state)

    def first(self, steps: int) -> list[Group]:
        """The distinct rows that the first `steps` steps of a run train on."""
        rows = self.rows.prompts
        return PromptSampler(rows, seed=self.rows.seed).next(min(steps * self.number, len(rows)))
