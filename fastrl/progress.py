"""How far a piece of work is: what can tell of it can be told to stop, so whoever reports can be ended there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Progress = Callable[[int, int], None]  # (done, total) of the parts of a piece of work; it may raise to end the work
Item = TypeVar("Item")


def unseen(done: int, total: int) -> None:
    """Nobody looks."""


def tracked(items: Sequence[Item], progress: Progress, *, before: int = 0, after: int = 0) -> Iterator[Item]:
    """The items; before each, `progress` is told how many are done, `before` and `after` others counted in."""
    total = before + len(items) + after
    for done, item in enumerate(items, before):
        progress(done, total)
        yield item
