"""Seeds, the backend fixture, and NaN in every uninitialised buffer that fastrl asks for."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch

from fastrl.kernels import native


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device; without one they are reported as skipped, never as passed."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _native_isas():
    module, _ = native.load()
    return [] if module is None else [f"native-{isa}" for isa in module.isas()]


@contextmanager
def _instruction_set(isa):
    extension = native.extension()
    before = extension.isa()
    extension.use(isa)
    try:
        yield
    finally:
        extension.use(before)


@pytest.fixture(params=["reference", "chunked", *_native_isas()])
def backend(request):
    """The name of a backend; native once per instruction set that this machine has."""
    name, _, isa = request.param.partition("-")
    with _instruction_set(isa) if isa else nullcontext():
        yield name


@pytest.fixture(params=_native_isas())
def native_isa(request):
    """Each instruction set that the native kernels have here."""
    isa = request.param.partition("-")[2]
    with _instruction_set(isa):
        yield isa


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """`torch.empty` and its kin return NaN when called from fastrl, so a value never written cannot pass for zero."""

    def poison(make):
        def wrapped(*args, **kwargs):
            tensor = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            fake = type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            if caller.startswith("fastrl.kernels") and tensor.is_floating_point() and not fake:
                tensor.fill_(float("nan"))
            return tensor

        return wrapped

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
