"""Locks that let only one process write to a run's folder."""

from __future__ import annotations

import errno
import os
import socket
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fastrl.check import require, sentence
from fastrl.trainer.config import TrainConfig

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows, where the trainer is untested

LOCK = ".lock"  # in a run's folder while a process writes there
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # errors of a file system without flock


@contextmanager
def only_writer(folder: Path, config: TrainConfig) -> Generator[Path]:
    """Locks a run's folder for the block and yields it.

    The folder of a new run is created here, under the next free name if another process has taken `folder` meanwhile,
    and removed if the block leaves it empty.

    Raises:
        ValueError: another process writes there, or the system has no POSIX locks.
    """
    do = "On Windows, WSL runs it."
    require(fcntl is not None, "train", "system", "Linux, macOS or another with POSIX locks", sys.platform, do)
    made = not config.resume
    while made:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = free_directory(config.directory())
    try:
        with hold(folder):
            yield folder
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def hold(folder: Path) -> Generator[None]:
    """Locks `folder` for the block. The operating system releases the lock when the process ends, however it ends.

    Raises:
        ValueError: another process holds the lock; the message has its process id.
    """
    handle = _lock(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while still locked: later it could be another process's file
        os.close(handle)


def _lock(folder: Path) -> int:
    """An open file that holds the lock."""
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
        os.close(handle)  # the previous holder has just finished and removed the file


def free_directory(wanted: Path) -> Path:
    """The first of `wanted`, `wanted`-2, `wanted`-3, ... that does not exist, so that no run overwrites another."""
    number, directory = 1, wanted
    while directory.exists():
        number += 1
        directory = wanted.with_name(f"{wanted.name}-{number}")
    return directory
