"""Triton kernels compile for every GPU generation that fastrl names, and none grows unseen; `tests/test_cuda_build.py`
says the same of CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot

ROOT = Path(__file__).parents[2]
COUNTS = {"registers": 32, "spills": 0, "shared": 1024, "instructions": 500}


@pytest.mark.timeout(1500)  # the longest of the tests: 180 s on two idle cores, and three times that on busy ones
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_every_kernel_compiles_for_each_architecture_within_its_limits_and_no_larger_than_recorded():
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", "--check", "--kernels", "triton"]
    result = subprocess.run(command, cwd=ROOT, env=compiled, capture_output=True, text=True, timeout=1440)
    assert result.returncode == 0, result.stdout + result.stderr
    for build in ("gae.triton_impl: tokens", "policy_loss.triton_impl: total"):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{build}  ")]
        assert all(architecture in line for architecture in ("sm_80", "sm_90", "sm_100"))


@pytest.mark.parametrize("key", aot.COUNTS)
def test_a_count_that_rose_is_a_complaint_and_one_that_fell_is_none(key):
    record = {"a: b": {"sm_80": COUNTS, "sm_90": COUNTS}}
    rose, fell = ({"a: b": {"sm_80": COUNTS, "sm_90": COUNTS | {key: COUNTS[key] + by}}} for by in (1, -1))
    assert aot.grown(rose, record) == [f"a: b on sm_90: {key} rose from {COUNTS[key]} to {COUNTS[key] + 1}"]
    assert aot.grown(fell, record) == []


def test_a_build_that_only_one_side_has_is_a_complaint():
    one, none = {"a: b": {"sm_80": COUNTS}}, {}
    assert aot.grown(one, none) == ["a: b: not in the record"]
    assert aot.grown(none, one) == ["a: b: recorded, but no longer built"]


@pytest.mark.parametrize(("architecture", "most"), [("sm_80", 163 << 10), ("sm_90", 227 << 10), ("sm_100", 227 << 10)])
def test_a_spill_and_shared_memory_that_does_not_fit_are_complaints_also_without_a_record(architecture, most):
    assert aot.over_limit({"a: b": {architecture: COUNTS | {"shared": most}}}) == []
    (complaint,) = aot.over_limit({"a: b": {architecture: COUNTS | {"shared": most + 1}}})
    assert complaint == f"a: b on {architecture}: {most + 1} bytes of shared memory, {most} exist"
    (complaint,) = aot.over_limit({"a: b": {architecture: COUNTS | {"spills": 4}}})
    assert complaint == f"a: b on {architecture}: 4 bytes of spilled registers"


@pytest.mark.parametrize("missing", [*aot.SPECIALIZED, None])
def test_code_without_an_instruction_of_specialized_warps_is_refused(missing):
    code = "\n".join(instruction for instruction in aot.SPECIALIZED if instruction != missing)
    if missing is None:
        aot.check_specialized("a: b", code)
        return
    with pytest.raises(ValueError, match=f"^bench.aot: a: b: expected specialized warps, found no {missing}.$"):
        aot.check_specialized("a: b", code)
