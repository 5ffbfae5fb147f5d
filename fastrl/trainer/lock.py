"""One process at a time writes to a run's folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastrl.check import sentence
from fastrl.trainer.setup import free_directory

if TYPE_CHECKING:
    from fastrl.trainer.offline_setup import OfflineRun
    from fastrl.trainer.setup import Run

    AnyRun = TypeVar("AnyRun", Run, OfflineRun)

LOCK = ".lock"  # in a run's folder while a process writes there
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what a file system without flock answers


@contextmanager
def only_writer(run: AnyRun) -> Iterator[AnyRun]:
    """The run, with a folder that no other process writes to while the block lasts.

    A new run makes its folder here, under the next free name when another process has taken its own meanwhile; one that
    the block left empty is removed again.

    Raises:
        ValueError: another process writes there.
    """
    made = run.resumed is None
    while made:
        try:
            run.directory.mkdir(parents=True)
            break
        except FileExistsError:
            run = replace(run, directory=free_directory(run.config.directory()))
    try:
        with hold(run.directory):
            yield run
    finally:
        if made and not any(run.directory.iterdir()):
            run.directory.rmdir()


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds `folder` for the block. The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        ValueError: another process holds it; the message has its number.
    """
    handle = _lock(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before the lock is gone, or it could be another's
        os.close(handle)


def _lock(folder: Path) -> int:
    """An open file that has the lock."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 1000).decode(errors="replace").strip() or "another process"
            os.close(handle)
            do = "Wait for it, stop it, or give another run_dir."
            raise ValueError(sentence("run_dir", str(folder), "a folder that nothing writes to", holder, do)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
            warnings.warn(f"{folder}: no locks here ({error.strerror}): start one process at a time.", stacklevel=4)
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return handle
        os.close(handle)  # whoever had it has just finished, and its file is gone
