"""Ctrl-C and the signals of schedulers and closed terminals: the first stops a run at a safe point, the second at
once."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from types import FrameType
from typing import Any, TextIO

from fastrl.distributed import World

# Ctrl-C; end of a job; closed terminal or lost connection; a scheduler's notice before the end of a job. Windows lacks
# the last two.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


HEARD = "Stopping at the next safe point; once more stops at once."


class Interrupted(KeyboardInterrupt):
    """A signal has asked the run to stop, and this is a safe point.

    Not an `Exception`, so code that survives errors of rewards and trackers does not swallow it.
    """


class Interrupt:
    """Whether a signal has asked the run to stop, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.shown = False  # whether the screen shows `HEARD` by itself
        self.together = False  # whether other processes must hear of it first: `check` then never raises

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raises `Interrupted` once a signal has come, unless the run has other processes."""
        if self.signal is not None and not self.together:
            raise Interrupted(self.signal.name)

    def agree(self, world: World) -> None:
        """Raises `Interrupted` in all processes once a signal has come to one of them.

        All call this at the same places, so that none waits for one that has stopped.
        """
        number = max(world.gather(int(self.signal or 0)))
        if number:
            self.signal = signal.Signals(number)
            raise Interrupted(self.signal.name)

    @contextmanager
    def listening(self) -> Generator[None]:
        """Inside the block, the first of `SIGNALS` prints `HEARD` and asks the run to stop; the second stops it at
        once. A hangup is never the second, and later ones are ignored, also after the block: a terminal that closes
        sends one, and its shell another. One that was ignored before, as under nohup, stays ignored. Output to a
        terminal that is gone is dropped, whether or not a hangup tells of it."""

        hangup = getattr(signal, "SIGHUP", None)
        # Checked now, because a terminal that is gone no longer looks like one.
        terminals = [out.fileno() for out in (sys.__stdout__, sys.__stderr__) if out is not None and out.isatty()]

        def handle(number: int, _: FrameType | None) -> None:
            if number == hangup:
                signal.signal(hangup, signal.SIG_IGN)
                _to_nowhere(terminals)
                if self:
                    return
            if self:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)
            if not self.shown:
                _say(HEARD)

        heard = [one for one in SIGNALS if one != hangup or signal.getsignal(one) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, handle) for number in heard}
        try:
            with redirect_stdout(_dropping(sys.stdout)), redirect_stderr(_dropping(sys.stderr)):
                yield
        finally:
            for number, handler in previous.items():
                if number != hangup or signal.getsignal(hangup) is not signal.SIG_IGN:
                    signal.signal(number, handler)


class _Output:
    """A text stream that drops what a closed terminal no longer takes, instead of raising."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any text stream."""
        with self._closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of any text stream."""
        with self._closed():
            self._stream.flush()

    @contextmanager
    def _closed(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:  # a pipe that nobody reads is another error
                raise
            _to_nowhere([self._stream.fileno()])


def _dropping(stream: TextIO | None) -> Any:
    """The stream as an `_Output`; None, as where there is no console, stays None."""
    return None if stream is None else _Output(stream)


def _say(line: str) -> None:
    """Writes to standard error, bypassing `sys.stderr`, which the interrupted code may be writing to."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def _to_nowhere(files: list[int]) -> None:
    """Redirects the files to nowhere, because writing to a terminal that is gone is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in files:
        os.dup2(nowhere, file)
    os.close(nowhere)
