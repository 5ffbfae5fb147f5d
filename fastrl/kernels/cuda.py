"""The CUDA extension: loading and checking it, and launching its kernels on the stream that torch uses.

The same sources run on CPU tensors where they were built to be emulated there: for tests, never by default.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastrl.kernels.native import DTYPES, address

MINIMUM_CAPABILITY = (8, 0)
_BUILD_REPORT = Path(__file__).parents[1] / "_cuda_build.txt"
_HOW_TO_BUILD = "where nvcc is: python setup.py build_ext --inplace, or FASTRL_CUDA=1 pip install"


@cache
def load() -> tuple[ModuleType | None, str]:
    """(the extension, the architectures it was built for), or (None, why it cannot be used)."""
    try:
        module = import_module("fastrl._cuda")
    except ImportError as error:
        report = _BUILD_REPORT.read_text().strip() if _BUILD_REPORT.exists() else f"{error}; {_HOW_TO_BUILD}"
        return None, f"the extension is not built: {report}"
    return module, module.architectures


@cache
def load_emulated() -> ModuleType | None:
    """The kernels as plain C++ for CPU tensors, where they were built with FASTRL_EMULATE_CUDA=1."""
    try:
        return import_module("fastrl._cuda_emulated")
    except ImportError:
        return None


def refuses(device: torch.device) -> str | None:
    """Why the CUDA kernels do not take `device`, or None."""
    if device.type == "cpu":
        emulated = load_emulated() is not None
        return None if emulated else "runs on CUDA devices; on a CPU only emulated, built with FASTRL_EMULATE_CUDA=1"
    if device.type != "cuda" or torch.version.hip is not None:
        return "runs on CUDA devices only"
    module, reason = load()
    if module is None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _fails_on(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _fails_on(index: int) -> str | None:
    """Why the extension does not work on a device, found out by a small launch, or None.

    A build that loads but does not run, for a driver that is too old say, is worse than none.
    """
    device = torch.device("cuda", index)
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        least, found = (".".join(map(str, version)) for version in (MINIMUM_CAPABILITY, capability))
        return f"needs compute capability {least}, {torch.cuda.get_device_name(device)} has {found}"
    logits = torch.arange(600, dtype=torch.float32, device=device).mul_(0.7).sin_().view(2, 300)
    targets, one = torch.tensor([7, 299], device=device), torch.ones(1, device=device)
    logps = torch.empty(2, device=device)
    call = (DTYPES[logits.dtype], address(logits), 300, 2, 300, address(targets), address(one), False, -100)
    try:
        launch("logprob_forward", device, extension(device).Logprob(*call), address(logps), 0)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"a first launch failed: {error}"
    want = logits.double().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    right = torch.allclose(logps.double(), want, rtol=0, atol=1e-5)
    return None if right else "the self-test failed on this device"


def extension(device: torch.device) -> ModuleType:
    """The extension for tensors on `device`.

    Raises:
        RuntimeError: it cannot be used; `fastrl doctor` shows the same reason.
    """
    module, reason = (load_emulated(), "not built to be emulated") if device.type == "cpu" else load()
    if module is None:
        raise RuntimeError(f"cuda: {reason}")
    return module


def launch(function: str, device: torch.device, *arguments: Any) -> None:
    """Calls a function of the extension on torch's current stream of `device`."""
    run = getattr(extension(device), function)
    if device.type == "cpu":
        return run(*arguments, 0, 0)
    with torch.cuda.device(device):  # and back to the caller's device afterwards
        return run(*arguments, device.index, torch.cuda.current_stream(device).cuda_stream)


def scratch(size: int, device: torch.device) -> torch.Tensor:
    """Memory for a launch. It may be freed when the launch has been queued: torch reuses it on the same stream."""
    return torch.empty(size, dtype=torch.uint8, device=device)
