"""A process group for processes that a test started."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist


@contextmanager
def process_group(rank, size, folder, seconds=30):
    """The block is the last thing that its process does.

    Meshes, sharded modules and compiled graphs keep the group after it is destroyed, and with it threads of gloo: one
    that frees a tensor after Python has ended aborts the process. So the process ends without Python's own ending.
    """
    options = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=seconds)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    yield
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
