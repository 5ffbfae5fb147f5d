"""The interface between a source and the trainer's loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from fastrl.algorithms.base import Kind, Learner
from fastrl.progress import Watch
from fastrl.types import Batch


class Source(Protocol):
    """Gives the groups of each training step.

    A new source (rounds of sampling and judging, a process that samples ahead, a curriculum) implements these members;
    the loop stays as it is.
    """

    kind: Kind  # of its groups
    replays: ClassVar[bool]  # whether a batch can be drawn again for free from an earlier state

    def next(self, learner: Learner, watch: Watch) -> Batch:
        """The batch of the step after `learner.steps`.

        `watch` may end it by raising at any progress report; the caller then restores the earlier state.
        """
        ...

    def publish(self, learner: Learner) -> None:
        """Called after each step: passes the new weights to the sampler."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The source's position, in a form that JSON can hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`.

        Raises:
            ValueError: the state belongs to other prompts or rows.
        """
        ...
