"""Ctrl-C and SIGTERM: the first is heeded where work can be given up without loss, the second at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal has asked the run to stop, and here is a place to.

    It is no `Exception`, so that what is written to survive the errors of rewards and trackers does not survive this.
    """


class Interrupt:
    """Whether a signal has asked the run to stop, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raises `Interrupted` once a signal has come."""
        if self:
            raise Interrupted(self.signal.name)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first Ctrl-C or SIGTERM asks the run to stop; the second stops it at once."""

        def handle(number: int, _: FrameType | None) -> None:
            if self:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
