"""Which cases run: every pair of what is multiplied, and all of what is written out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MODULE = """
import pytest

@pytest.mark.parametrize("a", [0, 1, 2])
@pytest.mark.parametrize("b", [0, 1, 2])
@pytest.mark.parametrize("c", [0, 1, 2])
def test_multiplied(c, b, a): ...

@pytest.mark.parametrize(("a", "b", "c"), [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1), (1, 1, 1)])
@pytest.mark.parametrize("d", [0, 1])
def test_written_out(d, a, b, c): ...
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """What is collected with these options: the parameters of each case, by test."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "test_module.py").write_text(MODULE)

    def collect(*options):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-c", os.devnull, "--rootdir", str(folder)]
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        out = subprocess.run(
            [*command, "-p", "conftest", *options, str(folder)],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        found = re.findall(r"::(\w+)\[([\d-]+)\]", out)
        return {test: {values for name, values in found if name == test} for test, _ in found}

    return collect


def test_every_pair_of_entries_runs_and_every_row_of_a_table(collected):
    cases = collected()
    multiplied = [tuple(map(int, values.split("-"))) for values in cases["test_multiplied"]]
    for first, second in combinations(range(3), 2):
        assert {(one[first], one[second]) for one in multiplied} == set(product(range(3), repeat=2))
    assert len(multiplied) < 27
    assert len(cases["test_written_out"]) == 12


def test_exhaustive_runs_every_combination(collected):
    assert len(collected("--exhaustive")["test_multiplied"]) == 27
