"""Groups that were written before: pairs, labelled answers, demonstrations, scored completions."""

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
    """The next rows, in an order that is another one in each epoch."""

    rows: PromptSampler[Group]
    number: int  # rows of a step
    kind: Kind
    seed: int = 0
    replays: ClassVar[bool] = True

    def next(self, learner: Learner, watch: Watch) -> Batch:
        """As `Source`."""
        groups = self.rows.next(self.number)
        numbers = {"epoch": float(self.rows.epoch)}
        return Batch(groups, seed=self.seed + learner.steps + 1, kind=self.kind, numbers=numbers)

    def publish(self, learner: Learner) -> None:
        """Nothing: nobody samples."""

    def state_dict(self) -> dict[str, Any]:
        """Where the rows are."""
        return self.rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `Source`."""
        self.rows.load_state_dict(state)

    def first(self, steps: int) -> list[Group]:
        """The rows that so many steps from the beginning train on, each once."""
        rows = self.rows.prompts
        return PromptSampler(rows, seed=self.rows.seed).next(min(steps * self.number, len(rows)))
