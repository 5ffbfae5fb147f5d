"""Where Triton kernels run: on CUDA devices, and with TRITON_INTERPRET=1 on CPU tensors, to check them without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from fastrl import env
from fastrl.kernels import tuning


def fitting(options: dict[str, Any], specialize: bool) -> dict[str, Any]:
    """Options of a launch, `maxnreg` lowered to what each thread can have: a block has 65536 registers. Specialized
    warps are more than `num_warps` and each has its own number, which Triton finds where there is no `maxnreg`."""
    if "maxnreg" not in options:
        return options
    if specialize:
        return {name: option for name, option in options.items() if name != "maxnreg"}
    return options | {"maxnreg": min(options["maxnreg"], 65536 // (32 * options["num_warps"]))}


@dataclass(frozen=True)
class Build:
    """One way in which a kernel is compiled; a Triton module lists its own as `BUILDS`, for `bench.aot` to compile
    ahead of time and to count registers, spills, shared memory and instructions of.

    `signature` gives a Triton type per run-time argument ("*bf16", "i32", "fp32"), `constants` the constexpr arguments
    and those that are None, `multiples` the integers that are multiples of 16: of these Triton compiles a kernel of its
    own, with wider loads. What an architecture's table may change comes from `entry` of `fastrl.kernels.tuning`, and
    over it from `changes`.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, enable_fp_fusion: as at the launch
    entry: str = ""
    multiples: tuple[str, ...] = ()
    changes: dict[str, int] = field(default_factory=dict)  # what a table may come to say

    def architectures(self, names: Iterable[str]) -> list[str]:
        """Those of some architectures that it is for."""
        return [name for name in names if not self.changes.get("WARP_SPECIALIZE") or name in tuning.SPECIALIZES]

    def on(self, architecture: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The constants and the options with which an architecture launches it."""
        constants, options = dict(self.constants), dict(self.options)
        parameters = tuning.parameters(self.entry, architecture) | self.changes if self.entry else {}
        for name, number in parameters.items():
            if name in self.kernel.arg_names:
                constants[name] = number
            elif name in tuning.MOST:
                options[name] = number
        return constants, fitting(options, constants.get("WARP_SPECIALIZE", False))


@cache
def _missing() -> str | None:
    return None if find_spec("triton") else "triton is not installed"


def refuses(device: torch.device) -> str | None:
    """Why Triton kernels do not take `device`, or None."""
    if (reason := _missing()) is not None:
        return reason
    if env.triton_interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets kernels on CPU tensors only"
    return None if device.type == "cuda" else "runs on CUDA devices; on a CPU only interpreted, with TRITON_INTERPRET=1"


def device_function(function: Callable) -> Callable:
    """`triton.jit` for what kernels call. The interpreter would go through the whole language again at each call: there
    it stays plain Python, which the kernel around it makes work."""
    if env.triton_interpreted():
        return function
    return import_module("triton").jit(function)


def launch(kernel: Any, programs: int | tuple[int, ...], like: torch.Tensor, **arguments: Any) -> None:
    """Runs `kernel` on the device of `like`, which need not be the current one; no programs, no launch."""
    grid = (programs,) if isinstance(programs, int) else programs
    specialize = arguments.get("WARP_SPECIALIZE", False)

    def run() -> None:
        if specialize:  # its descriptors of tensors are made on the device, in memory that Triton asks for
            allocate = import_module("triton").set_allocator
            allocate(lambda size, alignment, stream: torch.empty(size, dtype=torch.uint8, device=like.device))
        kernel[grid](**fitting(arguments, specialize))

    if 0 not in grid:
        with torch.cuda.device_of(like):
            copy_context().run(run)  # so that an allocator which the caller has set stays his


@lru_cache
def scalars(device: torch.device, *values: float) -> torch.Tensor:
    """Run-time numbers for a kernel, as float64: an argument that is a Python float arrives in float32."""
    return torch.tensor(values, dtype=torch.float64, device=device)
