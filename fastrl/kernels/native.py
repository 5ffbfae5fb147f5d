"""The native CPU extension: loading and checking it, and handing tensors to it.

The extension takes addresses. Whatever reaches it went through the checks of `fastrl.ops`, and through `dense` here.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import overload

import torch

from fastrl import env

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/cpu/kernels.h
_BUILD_REPORT = Path(__file__).parents[1] / "_cpu_build.txt"


@cache
def load() -> tuple[ModuleType | None, str]:
    """(the extension, its instruction set), or (None, why it cannot be used)."""
    try:
        _share_openmp()
        module = import_module("fastrl._cpu")
    except ImportError as error:
        report = _BUILD_REPORT.read_text().strip() if _BUILD_REPORT.exists() else str(error)
        return None, f"the extension is not built: {report}"
    try:
        for isa in module.isas():
            module.use(isa)
            with torch.device("cpu"):  # whatever the default device is
                right = _self_test(module)
            if not right:
                return None, f"the self-test of {isa} failed on this processor"
        module.use(env.cpu_isa() or module.isas()[0])
    except ValueError as error:
        return None, f"FASTRL_CPU_ISA: {error}"
    except (AttributeError, TypeError) as error:
        return None, f"the extension was built from other sources, build it again: {str(error).splitlines()[0]}"
    return module, module.isa()


def refuses(device: torch.device) -> str | None:
    """Why the native kernels do not take `device`, or None."""
    if device.type != "cpu":
        return "runs on CPUs only"
    module, reason = load()
    return None if module is not None else reason


def extension() -> ModuleType:
    """The loaded extension.

    Raises:
        RuntimeError: it cannot be used; `fastrl doctor` shows the same reason.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(f"native: {reason}")
    return module


def isa() -> str:
    """The instruction set in use."""
    return extension().isa()


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's values start; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@overload
def dense(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def dense(tensor: torch.Tensor | None) -> torch.Tensor | None: ...
def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor without gaps between its elements."""
    return None if tensor is None else tensor.contiguous()


def reduced_float32() -> bool:
    """Whether torch's switch for float32 matmuls allows products on CPUs that are short of bits.

    `torch.set_float32_matmul_precision("high")` or "medium", or its newer form for CPUs alone, which knows of both.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and newer
    if matmul is None:
        return torch.get_float32_matmul_precision() != "highest"
    return matmul.fp32_precision in ("tf32", "bf16")


def _share_openmp() -> None:
    """Make torch's own copy of OpenMP visible, so that the extension's threads are torch's threads.

    The extension is linked against no OpenMP: a second pool would compete with torch's for the same cores.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return
    loaded = {line.split()[-1] for line in maps.splitlines() if re.search(r"/lib(gomp|iomp5|omp)[-.]", line)}
    for path in sorted(loaded) or ["libgomp.so.1"]:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _self_test(module: ModuleType) -> bool:
    """Whether, under the instruction set in use, a small head gives the right log-probabilities and gradient, and a
    linear layer the right products.

    A build that loads but computes wrongly is worse than none. In float32, whole and reduced, and in bfloat16: a few
    milliseconds.
    """
    rows, width, vocabulary = 37, 70, 300  # whole tiles of every instruction set, and parts of tiles
    values = (torch.arange(rows * width + vocabulary * width, dtype=torch.float64) * 0.7).sin() / 4
    targets, index, one = torch.arange(rows) * 8, torch.arange(rows), torch.ones(1)
    cases = ((torch.float32, False, 1e-5, 1e-5), (torch.float32, True, 1e-4, 1e-4), (torch.bfloat16, False, 1e-5, 2e-2))
    for dtype, reduced, logp_tolerance, grad_tolerance in cases:
        h, w = (x.view(-1, width).to(dtype) for x in (values[: rows * width], values[rows * width :]))
        hidden, weight = h.double(), w.double()
        log_p = (hidden @ weight.T).log_softmax(-1)
        want_logps = log_p.gather(1, targets[:, None]).squeeze(1)
        want_grad = weight[targets] - log_p.exp() @ weight
        logps, grad, lse, ones = torch.zeros(rows), torch.zeros(rows, width), torch.zeros(2, rows), torch.ones(rows)
        shape = (width, width, width, vocabulary, address(index), rows, rows, address(targets), address(one))
        head = module.Head(DTYPES[dtype], address(h), address(w), 0, *shape, False, 0.0, 1.0, reduced, 1)
        module.head_forward(head, address(logps), address(lse), 0, 0, 0)
        outputs = (address(grad), 0, 0, False, False)
        module.head_backward(head, address(logps), address(lse), 0, address(ones), 0, 0, 0, 0, 0, *outputs)
        if not torch.allclose(logps.double(), want_logps, rtol=0, atol=logp_tolerance):
            return False
        if not torch.allclose(grad.double(), want_grad, rtol=0, atol=grad_tolerance):
            return False
        if not reduced and not _linear_is_right(module, h, w, grad_tolerance):
            return False
    return True


def _linear_is_right(module: ModuleType, x: torch.Tensor, weight: torch.Tensor, tolerance: float) -> bool:
    """Whether the three products of a linear layer are right; with the outputs as what comes back."""
    (rows, width), outputs, dtype = x.shape, weight.shape[0], DTYPES[x.dtype]
    y, dx, dw = x.new_zeros(rows, outputs), torch.zeros_like(x), torch.zeros(weight.shape)
    at, size = (address(x), address(weight), 0, address(y)), (dtype, rows, width, outputs, 1)
    module.linear_forward(*size, *at, width, width, outputs, False)
    module.linear_grad_input(*size, address(y), address(weight), address(dx), outputs, width, width, False)
    module.linear_grad_weight(*size, address(y), address(x), address(dw), outputs, width, False, False)
    dy = y.double()
    pairs = ((dy, x.double() @ weight.double().T), (dx, dy @ weight.double()), (dw, dy.T @ x.double()))
    return all(((got - want).abs().max() <= tolerance * want.abs().max()).item() for got, want in pairs)
