"""Checks once whether the hub is reachable; offline, libraries would retry for most of a minute."""

from __future__ import annotations

import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 3.0  # seconds to wait for a connection


@contextmanager
def or_cache(name: str) -> Generator[None]:
    """If the hub is unreachable, lookups inside the block use only the local cache and fail at once. A `name` that is a
    path is never looked up."""
    from huggingface_hub import constants

    if Path(name).exists() or constants.HF_HUB_OFFLINE or answers(constants.ENDPOINT):
        yield
        return
    modules = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module in modules:
            module.HF_HUB_OFFLINE = False


def answers(url: str) -> bool:
    """Whether the server accepts a connection; assumed behind a proxy."""
    if getproxies():
        return True
    server, connected = urlsplit(url), []

    def connect() -> None:
        try:
            socket.create_connection((server.hostname, server.port or 443), PATIENCE).close()
            connected.append(True)
        except OSError:
            pass

    thread = Thread(target=connect, daemon=True)  # name lookup has no timeout
    thread.start()
    thread.join(PATIENCE)
    return bool(connected)
