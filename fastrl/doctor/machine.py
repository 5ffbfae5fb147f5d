"""Facts about this machine from the operating system; unknown ones are None or empty."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

GIB = 1 << 30
# The instruction sets that the kernels choose among: the operating system's names -> common names.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
}


class Memory(NamedTuple):
    """Bytes; None if unknown."""

    total: int | None
    available: int | None


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text(errors="replace") if file.is_file() else ""


def cpu_name() -> str:
    """The CPU's model name."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """The INSTRUCTION_SETS that the CPU has, in that order; empty without /proc/cpuinfo."""
    found = re.search(r"^flags\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]


def cores() -> tuple[int, int]:
    """(cores of the machine, cores that this process may use)."""
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return total, usable


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP libraries in this process; more than one compete for the same cores."""
    return parse_openmp(_read("/proc/self/maps"))


def parse_openmp(maps: str) -> list[str]:
    """The OpenMP libraries named in the text of a /proc/*/maps."""
    return sorted(set(re.findall(r"\s(/\S*/lib(?:gomp|iomp\d*|omp)\b\S*)", maps)))


def memory() -> Memory:
    """The machine's memory."""
    values = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE))
    return Memory(*(int(values[key]) * 1024 if key in values else None for key in ("MemTotal", "MemAvailable")))


def free_disk(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gpus() -> list[str]:
    """Names of the CUDA devices that torch sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def git_commit(folder: Path) -> dict[str, object] | None:
    """The commit checked out in `folder` and whether tracked files differ from it; None outside a checkout."""
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return None
    commit = _run(git, "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _run(git, "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": bool(changed)}


def _run(*command: str) -> str | None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
