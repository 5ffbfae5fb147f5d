"""The hub, where there is a way to it: without one, libraries ask again and again for the better part of a minute."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 3.0  # seconds that a connection may take


@contextmanager
def or_cache(name: str) -> Iterator[None]:
    """Inside, what is looked up on the hub is taken from the local cache, or at once not found, where the hub cannot be
    reached; a `name` that is a path is not looked up."""
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
    """Whether a connection to the server can be made; behind a proxy it is taken for granted."""
    if getproxies():
        return True
    server, connected = urlsplit(url), []

    def connect() -> None:
        try:
            socket.create_connection((server.hostname, server.port or 443), PATIENCE).close()
            connected.append(True)
        except OSError:
            pass

    thread = Thread(target=connect, daemon=True)  # the name is looked up without any limit of time
    thread.start()
    thread.join(PATIENCE)
    return bool(connected)
