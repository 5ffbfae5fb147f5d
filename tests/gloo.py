"""A process group for processes that a test started, and cases that all of them run."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


@contextmanager
def process_group(rank, size, folder, seconds=30):
    """The block, on one thread, is the last thing that its process does."""
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=seconds)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    yield
    end()


def end():
    """Ends the process group and the process, without Python's own ending.

    Meshes, sharded modules and compiled graphs keep the group after it is destroyed, and with it threads of gloo: one
    that frees a tensor after Python has ended aborts the process.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(cases, rank, folder):
    """Runs the cases, functions of the rank by name, and writes what each raised, or nothing, into `name.rank`."""
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case(rank)
            said = ""
        except Exception:
            said = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(said)
        dist.barrier()
