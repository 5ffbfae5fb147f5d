from __future__ import annotations

import inspect
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastrl.kernels import native, registry
from fastrl.kernels.registry import OPS, TABLE, Kernel, choose, explain, instruction_set, resolve

CPU = torch.device("cpu")


@pytest.fixture
def table(monkeypatch):
    """An op with one backend that refuses everything, one that takes only CPUs and one that takes all."""
    backends = {
        "never": Kernel("fastrl.kernels.logprob.reference", lambda device: "no compiler was found"),
        "on_cpu": Kernel(
            "fastrl.kernels.logprob.chunked", lambda device: None if device.type == "cpu" else "needs a CPU"
        ),
        "anywhere": Kernel("fastrl.kernels.logprob.reference"),
    }
    monkeypatch.setitem(registry.TABLE, "logprob", backends)
    return backends


def test_auto_takes_the_first_backend_that_does_not_refuse(table):
    assert resolve("logprob", "auto", CPU).__name__ == table["on_cpu"].module
    assert resolve("logprob", "auto", torch.device("meta")).__name__ == table["anywhere"].module


def test_a_backend_asked_for_by_name_is_used(table):
    assert resolve("logprob", "anywhere", CPU).__name__ == table["anywhere"].module


def test_a_backend_asked_for_by_name_is_refused_with_its_reason_and_never_replaced(table):
    with pytest.raises(ValueError, match=r"no backend takes device cpu\.\n  never: no compiler was found"):
        resolve("logprob", "never", CPU)


def test_when_all_refuse_every_reason_is_given(table):
    del table["anywhere"]
    with pytest.raises(ValueError, match="never: no compiler was found\n  on_cpu: needs a CPU"):
        resolve("logprob", "auto", torch.device("meta"))


def test_an_unknown_backend_is_refused_with_the_nearest_name(table):
    with pytest.raises(ValueError, match=r"logprob: backend: expected one of auto, never.*Did you mean 'on_cpu'"):
        resolve("logprob", "oncpu", CPU)


def test_explain_gives_the_reason_of_each_backend(table):
    assert explain("logprob", torch.device("meta")) == {
        "never": "no compiler was found",
        "on_cpu": "needs a CPU",
        "anywhere": None,
    }


@pytest.mark.parametrize("op", OPS)
def test_every_torch_backend_takes_every_device(op):
    for device in ("cpu", "cuda", "mps", "xpu"):
        for backend in {"reference", "chunked"} & TABLE[op].keys():
            assert isinstance(resolve(op, backend, torch.device(device)), ModuleType)


@pytest.mark.parametrize("op", OPS)
def test_every_importable_backend_has_the_signatures_of_the_reference(op):
    reference = resolve(op, "reference", CPU)
    functions = [name for name in ("forward", "backward", "grad_input", "grad_weight") if hasattr(reference, name)]
    assert functions
    for backend, reason in explain(op, CPU).items():
        if reason is None:
            module = resolve(op, backend, CPU)
            for name in functions:
                assert inspect.signature(getattr(module, name)) == inspect.signature(getattr(reference, name)), backend


@pytest.mark.parametrize("op", registry.HEAD_OPS)
def test_auto_prefers_triton_to_unmeasured_cuda_kernels_between_matmuls(op, monkeypatch):
    takes_all = {name: Kernel(kernel.module, auto_on=kernel.auto_on) for name, kernel in TABLE[op].items()}
    del takes_all["cpu"]  # which no GPU has
    monkeypatch.setitem(registry.TABLE, op, takes_all)
    monkeypatch.setattr(registry, "import_module", lambda name: name)
    assert resolve(op, "auto", torch.device("cuda")) == f"fastrl.kernels.{op}.triton_impl"
    del takes_all["triton"]
    assert resolve(op, "auto", torch.device("cuda")) == f"fastrl.kernels.{op}.cuda_impl"


def test_the_table_has_every_op_and_no_other():
    assert tuple(TABLE) == OPS
    assert all("reference" in backends for backends in TABLE.values())


def extension_whose_head_forward(does):
    """Enough of the native extension for its self-test."""
    return SimpleNamespace(
        isas=lambda: ["plain"], use=lambda isa: None, isa=lambda: "plain", Head=lambda *arguments: None,
        head_forward=does, head_backward=lambda *arguments: None,
    )  # fmt: skip


def takes_other_arguments(*arguments):
    raise TypeError("head_forward(): incompatible function arguments.\nInvoked with: ...")


@pytest.mark.parametrize(
    ("does", "why"),
    [
        (lambda *arguments: None, "the self-test of plain failed on this processor"),
        (
            takes_other_arguments,
            "the extension was built from other sources, build it again: "
            "head_forward(): incompatible function arguments.",
        ),
    ],
    ids=["wrong values", "another version"],
)
def test_an_extension_that_is_wrong_refuses_itself_with_the_reason(monkeypatch, does, why):
    monkeypatch.setattr(native, "import_module", lambda name: extension_whose_head_forward(does))
    assert native.load.__wrapped__() == (None, why)


@pytest.mark.skipif(native.load()[0] is None, reason="no C++ extension")
def test_the_self_test_is_on_the_cpu_whatever_the_default_device_is():
    extension, isa = native.load()
    before = extension.isa()
    with torch.device("meta"):
        assert native.load.__wrapped__() == (extension, isa)
    extension.use(before)


def test_an_older_name_of_a_backend_is_taken_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"logprob: backend: 'native' is called 'cpu' now\."):
        assert choose("logprob", "native", CPU) is TABLE["logprob"]["cpu"]


def test_the_dispatcher_knows_the_instruction_set_of_what_it_picks():
    kernel = Kernel("fastrl.kernels.logprob.reference", isa=lambda: "abacus")
    table = {"cpu": kernel, "reference": Kernel("fastrl.kernels.logprob.reference")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.TABLE, "logprob", table)
        assert instruction_set("logprob", "auto", CPU) == "abacus"
        assert instruction_set("logprob", "reference", CPU) == ""
        assert instruction_set("logprob", "cpu", torch.device("meta")) == ""
