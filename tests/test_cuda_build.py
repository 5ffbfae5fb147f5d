"""The CUDA kernels compile for every architecture, without warnings and without spills; no GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastrl.kernels import cuda

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def setup_script():
    """setup.py as a module, for its flags: it builds only when it is run."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nvcc():
    try:
        return setup_script().nvcc()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reports(nvcc, tmp_path_factory):
    """Source -> what nvcc and ptxas say of it, a warning being an error."""
    out, script = tmp_path_factory.mktemp("cuda"), setup_script()
    targets = [f"-gencode=arch={virtual},code={real}" for real, virtual in script.architectures(nvcc).items()]

    def compile_one(source):
        compiling = [flag for flag in script.NVCC if flag not in ("-shared", "--threads=0")]
        strict = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xptxas=-v", "-c", "-o", str(out / f"{source.stem}.o")]
        return subprocess.run([nvcc, *compiling, *targets, *strict, str(source)], capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((source.stem for source in SOURCES), pool.map(compile_one, SOURCES), strict=True))


def test_no_source_gives_a_warning(reports):
    for name, result in reports.items():
        assert result.returncode == 0, f"{name}: {result.stderr}"


def test_no_kernel_of_any_architecture_spills_or_has_a_stack(reports):
    kernels = defaultdict(set)
    entry = r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
    for result in reports.values():
        for kernel, architecture, *sizes in re.findall(entry, result.stderr, re.DOTALL):
            kernels[architecture].add(kernel)
            assert sizes == ["0", "0"], f"{kernel} for {architecture}: stack and spills of {sizes} bytes"
    assert set(kernels) == {"sm_80", "sm_90", "sm_100"}
    # logprob: two for each of four dtypes; of policy_loss three, gae two and group_advantages one for each of two.
    # linear_logprob: statistics of two, gradients of four, with a softcap and without; from probabilities six.
    assert {len(found) for found in kernels.values()} == {8 + 6 + 4 + 2 + 2 * (2 + 4) + 6}


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
    names = [extension.name for extension in setup_script().extensions()]
    assert names == ["fastrl._cpu", *(["fastrl._cuda"] if built else [])]
