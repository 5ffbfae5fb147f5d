from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from fastrl import doctor
from fastrl.doctor import Fact, environment, facts, machine, print_doctor, selfcheck
from fastrl.kernels import registry

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found():
    return facts()


def printed(as_json=False, width=140):
    console = Console(file=io.StringIO(), width=width)
    status = print_doctor(console, as_json=as_json)
    return status, console.file.getvalue()


def test_every_op_has_a_self_check():
    assert set(selfcheck.CHECKS) == set(registry.OPS)


def test_self_check_passes_for_every_backend_that_takes_the_cpu():
    for op in registry.OPS:
        for name, refusal in registry.explain(op, CPU).items():
            if refusal is None:
                assert selfcheck.self_check(op, name, CPU) < selfcheck.TOLERANCE, (op, name)


def test_self_check_leaves_the_random_numbers_of_a_run_alone():
    before = torch.get_rng_state()
    selfcheck.self_check("linear_logprob", "reference", CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_error_is_relative_to_one_plus_the_value_and_nan_survives():
    one, ten = torch.ones(2, dtype=torch.float64), torch.full((2,), 9.0, dtype=torch.float64)
    assert selfcheck.largest_error([one + 0.5, ten + 0.5], [one, ten]) == pytest.approx(0.25)
    wrong = torch.tensor([0.0, float("nan")], dtype=torch.float64)
    assert not selfcheck.largest_error([wrong, ten], [one, ten]) <= selfcheck.TOLERANCE


def test_facts_name_each_op_backend_and_device(found):
    listed = {(fact.name, fact.value) for fact in found if fact.section == "backends on cpu"}
    assert listed == {(op, name) for op in registry.OPS for name in registry.TABLE[op]}
    (default,) = (f for f in found if f.name == "gae" and "used by default" in f.note and "cpu" in f.section)
    assert default.value == next(iter(registry.TABLE["gae"]))
    values = {fact.name: fact.value for fact in found}
    assert values["torch"] == str(torch.get_num_threads())  # the later section overrides the version
    assert values["cpu"] == machine.cpu_name()


def test_refusing_backend_is_shown_with_its_reason(monkeypatch):
    refusing = registry.Kernel("nowhere", lambda device: "needs a unicorn")
    table = {**registry.TABLE["gae"], "cpu": refusing}
    monkeypatch.setitem(registry.TABLE, "gae", table)
    shown = [fact for fact in doctor._op_backends("gae", CPU) if fact.value == "cpu"]
    assert shown == [Fact("backends on cpu", "gae", "cpu", "needs a unicorn", "missing")]


def test_op_without_any_backend_fails(monkeypatch):
    monkeypatch.setitem(registry.TABLE, "gae", {"cpu": registry.Kernel("nowhere", lambda device: "no compiler")})
    (fact,) = doctor._op_backends("gae", CPU)
    assert fact.level == "failed"
    assert "no compiler" in fact.note


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_wrong_numbers_give_exit_status_3_and_name_the_op(monkeypatch, value):
    monkeypatch.setattr(doctor, "self_check", lambda op, backend, device: value if op == "gae" else 0.0)
    status, text = printed()
    assert status == 3
    assert "Failed: backends on cpu: gae" in text
    assert "DIFFERS" in text


def test_broken_backend_is_reported_beside_the_working_ones(monkeypatch):
    def broken(op, backend, device):
        if (op, backend) == ("logprob", "chunked"):
            raise ImportError("undefined symbol: fma")
        return 0.0

    monkeypatch.setattr(doctor, "self_check", broken)
    status, text = printed(as_json=True)
    assert status == 3
    failed = [fact for fact in json.loads(text) if fact["level"] == "failed"]
    assert [(f["name"], f["value"]) for f in failed] == [("logprob", "chunked")]
    assert "undefined symbol: fma" in failed[0]["note"]


def test_healthy_machine_exits_0_and_says_so(monkeypatch, found):
    monkeypatch.setattr(doctor, "facts", lambda: [f for f in found if f.level != "failed"])
    status, text = printed()
    assert status == 0
    assert text.rstrip().endswith("Fit for use.")
    assert torch.__version__ in text


def test_missing_package_is_listed_with_what_it_gives_and_its_pip_line(monkeypatch):
    absent = doctor.Package("surely_not_installed", "surely-not-installed", "wings")
    monkeypatch.setattr(doctor, "PACKAGES", (absent,))
    assert doctor._packages() == [
        Fact(
            "optional packages",
            "surely_not_installed",
            "missing",
            "wings: pip install surely-not-installed",
            "missing",
        )
    ]


def test_two_openmp_runtimes_in_one_process_are_a_warning(monkeypatch):
    maps = """\
7f0000000000-7f0000001000 r-xp 00000000 08:01 1   /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f0000002000-7f0000003000 r-xp 00000000 08:01 1   /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f0000004000-7f0000005000 r-xp 00000000 08:01 2   /site-packages/torch/lib/libiomp5.so
7f0000006000-7f0000007000 r-xp 00000000 08:01 3   /usr/lib/libcomplex.so
"""
    runtimes = machine.parse_openmp(maps)
    assert runtimes == ["/site-packages/torch/lib/libiomp5.so", "/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0"]
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: runtimes)
    (fact,) = (fact for fact in doctor._threads() if fact.name == "OpenMP runtimes")
    assert (fact.value, fact.level) == ("2", "warning")
    assert "libiomp5.so" in fact.note


def test_more_threads_than_usable_cores_is_a_warning(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: (64, 2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    fact = doctor._threads()[0]
    assert fact.level == "warning"
    assert "OMP_NUM_THREADS=2" in fact.note


def test_environment_is_strict_json_with_versions_threads_and_backends():
    values = json.loads(json.dumps(environment(), allow_nan=False))
    assert torch.__version__.startswith(values["packages"]["torch"])
    assert values["threads"]["torch"] == torch.get_num_threads()
    assert values["backends"]["gae"] in registry.TABLE["gae"]


def test_commit_is_read_from_a_checkout_and_none_elsewhere(tmp_path):
    assert machine.git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        assert machine._run(*git, *command) is not None
    commit = machine._run(*git, "rev-parse", "HEAD")
    assert machine.git_commit(tmp_path) == {"commit": commit, "modified": False}


def test_nothing_is_cut_off_in_80_columns(found, monkeypatch):
    monkeypatch.setattr(doctor, "facts", lambda: found)
    words = {word for fact in found for word in fact.note.split() if len(word) < 27}  # longer ones are folded
    assert words <= set(printed(width=80)[1].split())
