"""Which cases run, seeds, the backend fixture, and NaN in every uninitialised buffer that fastrl asks for."""

from __future__ import annotations

import sys
from itertools import combinations

import pytest
import torch
from backends import BACKENDS, DEVICE, NATIVE, using


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="every combination of a test's parameters")


def pytest_collection_modifyitems(config, items):
    """A test whose cases multiply three lists or more runs on every pair of entries of every two, not on every
    combination, unless it is named or `--exhaustive` is given. Tests marked `gpu` need a CUDA device; without one they
    are reported as skipped, never as passed."""
    if not (config.option.exhaustive or any("::" in argument for argument in config.args)):
        chosen = _every_pair(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _every_pair(items):
    """The first cases that have each pair; in the order of collection, which is nearly as few as there can be."""
    chosen, seen = {}, set()
    for item in items:
        entries = _entries(item)
        pairs = {(item.nodeid.partition("[")[0], *pair) for pair in combinations(entries, 2)}
        if len(entries) < 3 or not pairs <= seen:
            chosen[item] = None
            seen |= pairs
    return chosen


def _entries(item):
    """Which entry of each list a case has. A list of tuples, by one `parametrize`, is one: its entries stand whole."""
    left = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    entries = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].replace(",", " ").split() if isinstance(mark.args[0], str) else mark.args[0]
        entries.append(tuple((name, id(left.pop(name))) for name in names))
    return sorted(entries) + sorted(((name, id(value)),) for name, value in left.items())  # those of fixtures


@pytest.fixture(autouse=True, scope="session")
def _device():
    """Tests that name no device make their tensors and generators on `FASTRL_TEST_DEVICE`."""
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)

        class Generator(torch.Generator):  # which the default device does not reach
            def __new__(cls, device=DEVICE):
                return super().__new__(cls, device)

        torch.Generator = Generator


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """The fixture `backend` goes through all of them, unless the test lists its own."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "backend" in metafunc.fixturenames and all("backend" not in mark.args[0] for mark in marks):
        metafunc.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture
def backend(request):
    """The name of a backend; native once per instruction set that this machine has."""
    with using(request.param) as name:
        yield name


@pytest.fixture(params=NATIVE)
def native_isa(request):
    """Each instruction set that the native kernels have here."""
    with using(request.param):
        yield request.param.partition("-")[2]


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
