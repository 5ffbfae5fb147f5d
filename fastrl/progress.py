"""Progress reports. A report may raise, so work can be stopped wherever it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

Progress = Callable[[int, int], None]  # (parts done, parts in total); may raise to end the work
Item = TypeVar("Item")


def unseen(done: int, total: int) -> None:
    """Ignores progress."""


def tracked(items: Sequence[Item], progress: Progress, *, before: int = 0, after: int = 0) -> Iterator[Item]:
    """Yields the items and reports progress before each, counting `before` and `after` other parts."""
    total = before + len(items) + after
    for done, item in enumerate(items, before):
        progress(done, total)
        yield item


class Watch(Protocol):
    """Follows work that has several stages."""

    def stage(self, name: str, unit: str = "") -> AbstractContextManager[Progress]:
        """A block for stage `name`; yields the function to report how many `unit`s are done."""
        ...

    def warn(self, message: str) -> None:
        """Shows a warning to the user."""
        ...


class Unwatched:
    """Ignores stages and prints warnings."""

    def stage(self, name: str, unit: str = "") -> AbstractContextManager[Progress]:
        """As `Watch`."""
        return nullcontext(unseen)

    def warn(self, message: str) -> None:
        """As `Watch`."""
        print(message)
