"""What an integration changed in its host, and how to undo it."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable
from importlib import metadata
from types import TracebackType
from typing import Any

from packaging.version import Version

from fastrl import check

_ABSENT = object()


class Handle:
    """The changes that an integration made to its host.

    `undo()` takes them back: every attribute is the very object from before, or absent if it was. Used as a context
    manager, the changes last for the block.

    Args:
        host: the name in error messages.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self._changes: list[tuple[Any, str, Any, Any]] = []
        self._after: list[Callable[[], object]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of an object, class or module, and remembers what was there."""
        self._changes.append((owner, name, vars(owner).get(name, _ABSENT), value))
        setattr(owner, name, value)

    def on_undo(self, call: Callable[[], object]) -> None:
        """Has `undo` also make this call."""
        self._after.append(call)

    def undo(self) -> None:
        """Takes every change back, the last one first. A second call does nothing.

        Raises:
            RuntimeError: something else has replaced one of the attributes since; nothing was undone.
        """
        last = {(id(owner), name): (owner, name, value) for owner, name, _, value in self._changes}
        for owner, name, value in last.values():
            now = vars(owner).get(name, _ABSENT)
            ours = now is value
            got = "no attribute" if now is _ABSENT else textwrap.shorten(repr(now), 80)
            check.require(
                ours, self.host, name, "fastrl's own object", got, "Undo what replaced it first.", RuntimeError
            )
        changes, self._changes = self._changes, []
        for owner, name, before, _ in reversed(changes):
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        after, self._after = self._after, []
        for call in reversed(after):
            call()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def check_version(package: str, least: str, below: str) -> Version:
    """The installed version of a host; one warning if it is outside what was tested, [least, below).

    Raises:
        ImportError: it is not installed.
    """
    try:
        version = Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        do = f"Install it: pip install '{package}>={least}'."
        raise ImportError(
            check.sentence(f"fastrl.integrations.{package}", package, "an installed package", "none", do)
        ) from None
    if not Version(least) <= version < Version(below):
        tested = f"tested were {least} up to, not including, {below}"
        warnings.warn(f"fastrl.integrations: {package} {version} is installed; {tested}.", stacklevel=3)
    return version
