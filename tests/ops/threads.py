"""Running a function under another number of threads."""

from __future__ import annotations

from collections.abc import Callable

import torch


def with_threads(threads: int, function: Callable[[], object]) -> object:
    """What `function` returns under `threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(before)
