"""Which backends an op has, and the one function that picks among them."""

from __future__ import annotations

import warnings
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
    """One implementation of one op: a module under `fastrl.kernels.<op>`, why it would refuse a device, and on
    which type of device "auto" considers it (None: every)."""

    module: str
    refuses: Callable[[torch.device], str | None] = any_device
    auto_on: str | None = None
    isa: Callable[[], str] = str  # the instruction set that it runs on, where it is one of several


HEAD_OPS = ("linear_logprob", "linear_policy_loss")  # matmuls and kernels between them
CPU_OPS = ("linear",)  # torch's matmul is as good as any elsewhere


def _backends(op: str) -> dict[str, Kernel]:
    folder = f"fastrl.kernels.{op}"
    # Emulated CUDA and interpreted Triton are for tests: nobody gets them without asking.
    cuda_kernel = Kernel(f"{folder}.cuda_impl", cuda.refuses, "cuda")
    triton_kernel = Kernel(f"{folder}.triton_impl", triton_jit.refuses, "cuda")
    backends = {"cpu": Kernel(f"{folder}.native", native.refuses, isa=native.isa)}
    if op in CPU_OPS:
        return backends | {"reference": Kernel(f"{folder}.reference")}
    # Triton has a kernel with the first matmul inside; which of the others are quicker is unmeasured.
    if op in HEAD_OPS:
        backends |= {"triton": triton_kernel, "cuda": cuda_kernel}
    else:
        backends |= {"cuda": cuda_kernel, "triton": triton_kernel}
    return backends | {name: Kernel(f"{folder}.{name}") for name in ("chunked", "reference")}


OPS = (
    "linear_logprob",
    "logprob",
    "policy_loss",
    "linear_policy_loss",
    "group_advantages",
    "gae",
    "linear",
)
RENAMED = {"native": "cpu"}
# In order of preference: "auto" takes the first that does not refuse.
TABLE: dict[str, dict[str, Kernel]] = {op: _backends(op) for op in OPS}


def backend_of(op: str, backend: str) -> str:
    """As given, if there is such a backend or it is "auto"; an older name becomes today's."""
    if backend in RENAMED:
        new = RENAMED[backend]
        warnings.warn(f"{op}: backend: {backend!r} is called {new!r} now.", DeprecationWarning, stacklevel=3)
        backend = new
    choice(op, "backend", backend, ("auto", *TABLE[op]))
    return backend


def explain(op: str, device: torch.device) -> dict[str, str | None]:
    """Backend -> None when it takes `device`, else the reason why it does not."""
    return {name: kernel.refuses(device) for name, kernel in TABLE[op].items()}


def as_written(device: torch.device) -> AbstractContextManager:
    """Switches autocast off around a kernel: it would round the kernel's float32 matmuls to 16 bits."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def resolve(op: str, backend: str, device: torch.device) -> ModuleType:
    """The module that implements `op` on the backend that `choose` gives."""
    return import_module(choose(op, backend, device).module)


@torch.compiler.assume_constant_result
def instruction_set(op: str, backend: str, device: torch.device) -> str:
    """That of the backend that `choose` gives; "" for one that has none, and where there are only shapes."""
    return "" if device.type == "meta" else choose(op, backend, device).isa()


def choose(op: str, backend: str, device: torch.device) -> Kernel:
    """The implementation of `op`. "auto" takes the first backend that supports `device`; a backend asked for by name
    is used or refused, never replaced.

    Raises:
        ValueError: the backend does not exist, or every candidate refuses; the message carries each reason.
    """
    table, backend = TABLE[op], backend_of(op, backend)
    refusals = []
    if backend == "auto":
        candidates = [name for name, kernel in table.items() if kernel.auto_on in (None, device.type)]
    else:
        candidates = [backend]
    for name in candidates:
        reason = table[name].refuses(device)
        if reason is None:
            return table[name]
        refusals.append(f"{name}: {reason}")
    raise ValueError(f"{op}: backend: no backend takes device {device}.\n  " + "\n  ".join(refusals))
