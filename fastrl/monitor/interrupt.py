"""Ctrl-C and what schedulers and closed terminals send: the first is heeded where work can be given up without loss,
the second at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Ctrl-C; the end of a job; a terminal that is closed, or a connection that is lost; what schedulers send some time
# before the end of a job. The last two are not there on Windows.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


HEARD = "Stopping at the next safe point; once more stops at once."


class Interrupted(KeyboardInterrupt):
    """A signal has asked the run to stop, and here is a place to.

    It is no `Exception`, so that what is written to survive the errors of rewards and trackers does not survive this.
    """


class Interrupt:
    """Whether a signal has asked the run to stop, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.shown = False  # whether somebody shows `HEARD` who looks here

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raises `Interrupted` once a signal has come."""
        if self:
            raise Interrupted(self.signal.name)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first of `SIGNALS` asks the run to stop, and `HEARD` is said; the second stops it at once. A
        hangup that was ignored before, as under nohup, still is."""

        hangup = getattr(signal, "SIGHUP", None)
        # Asked now: of a terminal that is gone, nobody can tell that it was one.
        terminals = [out.fileno() for out in (sys.__stdout__, sys.__stderr__) if out is not None and out.isatty()]

        def handle(number: int, _: FrameType | None) -> None:
            if number == hangup:
                _to_nowhere(terminals)
            if self:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)
            if not self.shown:
                _say(HEARD)

        heard = [one for one in SIGNALS if one != hangup or signal.getsignal(one) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _say(line: str) -> None:
    """To standard error, past `sys.stderr`, which the code that was interrupted may be writing to."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def _to_nowhere(files: list[int]) -> None:
    """Whatever still goes there is lost: to write to a terminal that is gone is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in files:
        os.dup2(nowhere, file)
    os.close(nowhere)
