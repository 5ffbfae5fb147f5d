"""Files and folders that appear complete or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".tmp-"  # in names of files and folders not yet complete or not yet deleted


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file atomically: readers see the old or the new contents, never a part."""
    aside = _aside(path)
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def complete_or_absent(folder: Path) -> Generator[Path]:
    """Yields a folder to fill. It replaces `folder` when the block ends, and is deleted if the block raises."""
    aside = _aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            sync(path)
        with _moved_away(folder):
            os.rename(aside, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def remove(folder: Path) -> None:
    """Deletes a folder, if it exists; it is never visible half deleted under its own name."""
    with _moved_away(folder):
        pass


def clear_leftovers(parent: Path) -> None:
    """Deletes incomplete files and folders that a killed process left in `parent`."""
    for path in parent.glob(f".*{ASIDE}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _moved_away(folder: Path) -> Generator[None]:
    """Moves an existing `folder` out of the way for the (short) block, then deletes it."""
    old = _aside(folder, "old-")
    if folder.exists():
        os.rename(folder, old)
    yield
    shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path, why: str = "") -> Path:
    return path.with_name(f".{path.name}{ASIDE}{why}{os.getpid()}")
