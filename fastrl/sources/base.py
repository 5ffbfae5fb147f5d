"""What a source is to the trainer's loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from fastrl.algorithms.base import Kind, Learner
from fastrl.progress import Watch
from fastrl.types import Batch


class Source(Protocol):
    """Gives the groups of each training step.

    A new one (rounds of sampling and judging, another process that samples ahead, a curriculum) needs these five and no
    change of the loop.
    """

    kind: Kind  # of its groups
    replays: ClassVar[bool]  # whether going back to an earlier state costs nothing, so that no batch need be kept

    def next(self, learner: Learner, watch: Watch) -> Batch:
        """The batch of the step after `learner.steps`.

        `watch` may end it at any report of progress, by what it raises; the caller then goes back to the state before.
        """
        ...

    def publish(self, learner: Learner) -> None:
        """The weights have changed: new ones for whoever samples."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as JSON can hold it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state_dict` was taken.

        Raises:
            ValueError: the state is of other prompts or rows.
        """
        ...
