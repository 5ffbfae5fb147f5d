"""The CUDA kernels compile for every architecture, without warnings and spills and no larger than recorded; no GPU is
needed."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import aot
from fastrl.kernels import cuda

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    """What setup.py defines, where there is nvcc."""
    defined = runpy.run_path(str(ROOT / "setup.py"))
    try:
        defined["nvcc"]()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return defined


@pytest.fixture(scope="module")
def table(script):
    """`source: kernel` -> architecture -> counts, of sources without a warning: the first one raises."""
    return aot.measure_cuda(processes=2)


def test_every_kernel_compiles_for_every_architecture_without_a_warning(table):
    # logprob: two for each of four dtypes; of policy_loss three, gae two and group_advantages one for each of two.
    # linear_logprob: statistics of two, gradients of four, with a softcap and without; from probabilities six.
    assert len(table) == 8 + 6 + 4 + 2 + 2 * (2 + 4) + 6
    assert {tuple(architectures) for architectures in table.values()} == {("sm_80", "sm_90", "sm_100")}


def test_no_kernel_spills_or_has_a_stack_or_takes_too_much_shared_memory(table):
    assert aot.over_limit(table) == []


def test_no_kernel_is_larger_than_recorded(table):
    record = json.loads(aot.RECORD.read_text()).get(aot.nvcc_version())
    if record is None:
        pytest.skip(f"no record of {aot.nvcc_version()}")
    assert aot.grown(table, record) == []


def test_a_warning_is_an_error(script, tmp_path):
    (tmp_path / "unused.cu").write_text("__global__ void kernel() { int unused; }\n")
    with pytest.raises(ValueError, match=r'(?s)^bench\.aot: unused\.cu: .*"unused" was declared but never referenced'):
        aot.compile_cuda(tmp_path / "unused.cu", script)


def test_a_kernel_that_spills_is_a_complaint(script, tmp_path):
    values = ", ".join(f"v{i} = in[{i} * n]" for i in range(200))
    kernel = "__global__ void __maxnreg__(32) kernel(const float* in, float* out, int n) {{ float {}; {} }}\n"
    uses = "".join(f"out[{i}] = v{i} * v{199 - i};" for i in range(200))
    (tmp_path / "spills.cu").write_text(kernel.format(values, uses))
    complaints = aot.over_limit(aot.compile_cuda(tmp_path / "spills.cu", script))
    assert len(complaints) == 3
    assert all(re.fullmatch(r"spills\.cu: kernel on sm_\d+: \d+ bytes of spilled registers", c) for c in complaints)


def test_the_module_imports_without_a_gpu_and_says_why_it_cannot_launch():
    """Where it is built."""
    module, reason = cuda.load()
    if module is None:
        pytest.skip(reason)
    code = (
        "import sys, torch; from fastrl.kernels import cuda\n"
        "module = cuda.load()[0]\n"
        "call = module.Gae(0, 0, 0, 0, 0, 1, 1, 1.0, 1.0, 0, 0)\n"
        "assert module.gae_scratch(call) > 0\n"
        "try:\n    module.gae(call, 0, 0, 0)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("CUDA: ")


def test_a_cpu_is_refused_with_a_reason_where_nothing_is_emulated(monkeypatch):
    monkeypatch.setattr(cuda, "load_emulated", lambda: None)
    assert "only emulated" in cuda.refuses(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="cuda: not built to be emulated"):
        cuda.extension(torch.device("cpu"))
    assert cuda.refuses(torch.device("mps")) == "runs on CUDA devices only"


@pytest.mark.parametrize(
    ("command", "variable", "built"),
    [
        (["bdist_wheel"], None, False),
        (["editable_wheel"], None, False),
        (["bdist_wheel"], "1", True),
        (["build_ext", "--inplace"], None, True),
        (["build_ext", "--inplace"], "0", False),
    ],
)
def test_nvcc_is_run_only_where_it_was_asked_for(command, variable, built, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", *command])
    monkeypatch.delenv("FASTRL_CUDA", raising=False)
    monkeypatch.delenv("FASTRL_EMULATE_CUDA", raising=False)
    if variable is not None:
        monkeypatch.setenv("FASTRL_CUDA", variable)
    names = [extension.name for extension in runpy.run_path(str(ROOT / "setup.py"))["extensions"]()]
    assert names == ["fastrl._cpu", *(["fastrl._cuda"] if built else [])]
