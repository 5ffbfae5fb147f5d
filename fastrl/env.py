"""The only module that reads `os.environ` or touches process-wide settings."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_RANKS = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def cache_dir() -> Path:
    """Where converted models are kept: `$FASTRL_CACHE`, else `$XDG_CACHE_HOME/fastrl`, else `~/.cache/fastrl`."""
    explicit = os.environ.get("FASTRL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(explicit or Path(base) / "fastrl").expanduser()


def keep_bytes() -> int | None:
    """`$FASTRL_KEEP_BYTES`: the byte budget of `memory="auto"`, or None to let the op decide by device."""
    value = os.environ.get("FASTRL_KEEP_BYTES")
    return int(value) if value else None


def cpu_isa() -> str | None:
    """`$FASTRL_CPU_ISA`: the instruction set that the native CPU kernels use, or None for the best one."""
    return os.environ.get("FASTRL_CPU_ISA") or None


def secret(name: str) -> str | None:
    """The environment variable `name`, such as a key to a server; None if it is unset or empty."""
    return os.environ.get(name) or None


def ranks() -> tuple[int, int, int]:
    """(rank, rank on this machine, number of processes) as torchrun sets them; (0, 0, 1) without it."""
    rank, local, size = (os.environ.get(name, default) for name, default in _RANKS)
    return int(rank), int(local), int(size)


def triton_interpreted() -> bool:
    """`$TRITON_INTERPRET`: whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reuse_freed_memory() -> bool:
    """Asks the C library to keep freed blocks, so that each step can reuse the last one's big CPU buffers.

    Page faults on fresh buffers cost a CPU trainer more than its elementwise work. Also bounds the two caches of
    compiled matmuls, oneDNN's and torch's, which otherwise grow by half a megabyte with every new shape. Returns False
    if there is no `mallopt`.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "32")
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is None:
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 16 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)


def wait_briefly() -> None:
    """Makes waiting threads sleep soon, unless the user has configured it. Call it before torch is loaded.

    A GNU OpenMP thread spins for milliseconds at the end of a parallel region before it sleeps. If another program uses
    one of the cores, the spinning thread keeps its core from the thread it waits for: on two cores, one of them busy, a
    model's layers take 4 to 5 times as long. A few microseconds are enough to bridge the gap between two regions, and
    cost little if there is nothing to wait for.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "3000"


def return_freed_memory() -> None:
    """Returns freed blocks to the system, between stages that need memory of different shapes."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.system() == "Linux" else None
