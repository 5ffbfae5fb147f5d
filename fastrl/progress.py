"""How far a piece of work is: what can tell of it can be told to stop, so whoever reports can be ended there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

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


class Watch(Protocol):
    """Whoever follows a piece of work of several stages."""

    def stage(self, name: str, unit: str = "") -> AbstractContextManager[Progress]:
        """A block that is stage `name`; what it gives is told how many `unit`s of it are done."""
        ...

    def warn(self, message: str) -> None:
        """Something that the user should know."""
        ...


class Unwatched:
    """Nobody follows; warnings are printed."""

    def stage(self, name: str, unit: str = "") -> AbstractContextManager[Progress]:
        """As `Watch`."""
        return nullcontext(unseen)

    def warn(self, message: str) -> None:
        """As `Watch`."""
        print(message)
