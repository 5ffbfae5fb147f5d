"""Which backends an op has, and the one function that picks among them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch

from fastrl.check import choice
from fastrl.kernels import cuda, native, triton_jit


def any_device(device: torch.device) -> str | None:
    """Torch backends run wherever torch runs."""
    return None


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op: a module under `fastrl.kernels.<op>`, why it would refuse a device, and on which
    type of device "auto" considers it (None: every)."""

    module: str
    refuses: Callable[[torch.device], str | None] = any_device
    auto_on: str | None = None


CUDA_OPS = ("logprob", "policy_loss", "group_advantages", "gae")  # the others are made of matmuls


def _backends(op: str) -> dict[str, Kernel]:
    folder = f"fastrl.kernels.{op}"
    backends = {"native": Kernel(f"{folder}.native", native.refuses)}
    if op in CUDA_OPS:  # emulated CUDA is for tests: nobody gets it without asking
        backends["cuda"] = Kernel(f"{folder}.cuda_impl", cuda.refuses, auto_on="cuda")
    backends["triton"] = Kernel(
        f"{folder}.triton_impl", triton_jit.refuses, auto_on="cuda"
    )  # and so is interpreted Triton
    return backends | {name: Kernel(f"{folder}.{name}") for name in ("chunked", "reference")}


OPS = (
    "linear_logprob",
    "logprob",
    "policy_loss",
    "linear_policy_loss",
    "group_advantages",
    "gae",
)
# In order of preference: "auto" takes the first that does not refuse.
TABLE: dict[str, dict[str, Kernel]] = {op: _backends(op) for op in OPS}


def explain(op: str, device: torch.device) -> dict[str, str | None]:
    """Backend -> None when it takes `device`, else the reason why it does not."""
    return {name: kernel.refuses(device) for name, kernel in TABLE[op].items()}


def as_written(device: torch.device) -> AbstractContextManager:
    """Switches autocast off around a kernel: it would round the kernel's float32 matmuls to 16 bits."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def resolve(op: str, backend: str, device: torch.device) -> ModuleType:
    """The module that implements `op`. "auto" takes the first backend that supports `device`; a backend asked for by
    name is used or refused, never replaced.

    Raises:
        ValueError: the backend does not exist, or every candidate refuses; the message carries each reason.
    """
    table = TABLE[op]
    choice(op, "backend", backend, ("auto", *table))
    refusals = []
    if backend == "auto":
        candidates = [name for name, kernel in table.items() if kernel.auto_on in (None, device.type)]
    else:
        candidates = [backend]
    for name in candidates:
        reason = table[name].refuses(device)
        if reason is None:
            return import_module(table[name].module)
        refusals.append(f"{name}: {reason}")
    raise ValueError(f"{op}: backend: no backend takes device {device}.\n  " + "\n  ".join(refusals))
