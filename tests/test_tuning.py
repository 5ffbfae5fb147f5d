"""Tables of tile sizes: what they may say, that launches take it, that it compiles, and how one is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from bench import aot, tune
from bench.shapes import HeadShape
from fastrl.cli import main
from fastrl.kernels import tuning
from fastrl.kernels.softmax_row import NO_SOFTCAP
from fastrl.kernels.triton_jit import launch
from fastrl.ops.gae import gae
from fastrl.ops.logprob import logprob

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where tables are, and a CPU that reads that of sm_90."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    forget()
    yield tmp_path
    forget()


def forget():
    tuning.table.cache_clear()
    tuning.tuned.cache_clear()


def put(folder, **entries):
    (folder / "sm_90.json").write_text(json.dumps({"about": {}, "entries": entries}))
    forget()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"gea": {"BLOCK": 64}}, "entry: expected one of gae, .*, got 'gea'. Did you mean 'gae'"),
        ({"gae": {"BLOK": 64}}, "gae: expected one of BLOCK, num_warps, got 'BLOK'. Did you mean 'BLOCK'"),
        ({"gae": {"BLOCK": 96}}, "gae.BLOCK: expected a power of two, got 96"),
        ({"gae": {"BLOCK": 0}}, "gae.BLOCK: expected a power of two, got 0"),
        ({"gae": {"BLOCK": "64"}}, "gae.BLOCK: expected a power of two, got '64'"),
        ({"gae": {"BLOCK": True}}, "gae.BLOCK: expected a power of two, got True"),
        ({"gae": {"num_warps": 64}}, "gae.num_warps: expected a power of two of at most 32, got 64"),
        (
            {"linear_logprob fused": {"num_stages": 9}},
            "linear_logprob fused.num_stages: expected a whole number above 0 of at most 8",
        ),
        (
            {"linear_logprob fused": {"WARP_SPECIALIZE": 1}},
            "linear_logprob fused.WARP_SPECIALIZE: expected true or false, got 1",
        ),
        (
            {"linear_logprob fused": {"WARP_SPECIALIZE": True}},
            "linear_logprob fused.num_warps and BLOCK_N: expected 4 and 128 or more to specialize warps, got 8 and 128",
        ),
        ({"gae": 64}, "gae: expected parameter -> number, got 64"),
        ([], "entries: expected entry -> parameter -> number"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_path_and_one_sentence(folder, entries, message):
    put(folder)
    (folder / "sm_90.json").write_text(json.dumps({"about": {}, "entries": entries}))
    with pytest.raises(ValueError, match=rf"sm_90\.json: {message}") as refusal:
        tuning.tuned("gae", CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["sm_80", "sm_100"])
def test_specialized_warps_are_refused_where_they_are_not_hopper_s(folder, name):
    (folder / f"{name}.json").write_text(json.dumps({"about": {}, "entries": tuning.SPECIALIZED}))
    message = rf"{name}\.json: linear_logprob fused.WARP_SPECIALIZE: expected false but on sm_90, got true\."
    with pytest.raises(ValueError, match=message):
        tuning.table(name)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"entries": '])
def test_a_file_without_entries_is_refused(folder, text):
    (folder / "sm_90.json").write_text(text)
    with pytest.raises(ValueError, match=r"sm_90\.json: expected .* in JSON, got"):
        tuning.tuned("gae", CPU)


def test_a_table_changes_what_it_names_and_nothing_else(folder):
    put(folder, gae={"BLOCK": 64})
    assert tuning.tuned("gae", CPU) == tuning.DEFAULTS["gae"] | {"BLOCK": 64}
    assert tuning.tuned("policy_loss", CPU) == tuning.DEFAULTS["policy_loss"]
    assert tuning.parameters("gae", "sm_80") == tuning.parameters("gae", None) == tuning.DEFAULTS["gae"]
    with tuning.trying("gae", num_warps=2):
        assert tuning.tuned("gae", CPU)["num_warps"] == 2
    assert tuning.tuned("gae", CPU)["num_warps"] == tuning.DEFAULTS["gae"]["num_warps"]


def test_launches_take_the_table_whatever_the_number_of_rows_and_results_stay(folder, monkeypatch):
    from fastrl.kernels.gae import triton_impl as of_gae
    from fastrl.kernels.logprob import triton_impl as of_logprob

    seen = []
    for module in (of_gae, of_logprob):

        def noted(kernel, programs, like, **arguments):
            seen.append((programs, arguments["BLOCK"]))
            launch(kernel, programs, like, **arguments)

        monkeypatch.setattr(module, "launch", noted)

    def results():
        seen.clear()
        answers = [logprob(logits[:rows], targets[:rows], backend="triton").logps for rows in (1, 3)]
        return [*gae(*tokens, backend="triton"), *answers]

    tokens = (*torch.randn(2, 3, 20, dtype=torch.float64), torch.ones(3, 20))
    logits, targets = torch.randn(3, 500), torch.tensor([0, 499, 7])
    before = results()
    assert seen == [(1, 512), (3, 512), (1, 512)]
    put(folder, gae={"BLOCK": 16}, softmax_row={"BLOCK": 128})
    after = results()
    assert seen == [(1, 128), (3, 128), (4, 16), (1, 512), (4, 16)]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch.equal(after[-1][:1], after[-2])


@pytest.mark.parametrize(("warps", "registers"), [(4, 255), (8, 255), (16, 128), (32, 64)])
def test_more_warps_have_a_lower_limit_of_registers_at_a_launch_and_in_a_build(warps, registers):
    from fastrl.kernels.softmax_row_triton import flags  # imported by those who run it: it imports Triton

    launched, kernel = [], MagicMock()
    kernel.__getitem__.return_value = lambda **arguments: launched.append(arguments["maxnreg"])
    with tuning.trying("softmax_row", num_warps=warps):
        launch(kernel, 1, torch.empty(0), **flags(torch.ones(1), NO_SOFTCAP, 500))
        _, options = aot.builds()["logprob.triton_impl: logprob forward bf16"].on("sm_90")
    assert launched == [options["maxnreg"]] == [registers]


def test_specialized_warps_have_an_allocator_meanwhile_and_the_registers_that_triton_finds():
    from triton.runtime import _allocation

    launched, kernel = [], MagicMock()
    kernel.__getitem__.return_value = lambda **arguments: launched.append((arguments, _allocation._allocator.get()))
    before = _allocation._allocator.get()
    launch(kernel, 1, torch.empty(0), WARP_SPECIALIZE=True, num_warps=4, maxnreg=255)
    ((arguments, allocate),) = launched
    assert arguments == {"WARP_SPECIALIZE": True, "num_warps": 4}
    assert allocate(640, 128, None).nbytes == 640
    assert _allocation._allocator.get() is before
    builds = [build for build in aot.builds().values() if build.changes]
    assert {build.entry for build in builds} == set(tuning.SPECIALIZED)
    for build in builds:
        constants, options = build.on("sm_90")
        assert constants["WARP_SPECIALIZE"]
        assert "maxnreg" not in options
        assert build.architectures(["sm_80", "sm_90", "sm_100"]) == ["sm_90"]


def test_every_entry_is_of_a_build_and_has_a_measurement_whose_choices_are_legal():
    assert {build.entry for build in aot.builds().values()} == set(tuning.DEFAULTS) == set(tune.WORK)
    for entry, work in tune.WORK.items():
        for name, numbers in work.choices.items():
            for number in numbers:
                tuning.check_entries("choices", {entry: {name: number}})


def test_every_entry_is_timed_on_a_shape_that_there_is_and_by_a_call_that_reads_it(monkeypatch):
    read, parameters = set(), tuning.parameters
    monkeypatch.setattr(tuning, "parameters", lambda entry, name: read.add(entry) or parameters(entry, name))
    for entry, work in tune.WORK.items():
        module = import_module(f"bench.bench_{work.op}")
        assert work.shape in module.SHAPES
        read.clear()
        few = module.SHAPES["tiny"]
        few = replace(few, tokens=32) if isinstance(few, HeadShape) else few
        tensors = module.tensors(few, work.dtype, CPU)[work.mode]
        with tuning.trying("gae", BLOCK=16), tuning.trying("policy_loss", BLOCK=16):  # several blocks
            module.fastrl_provider("triton", *tensors, **work.options)()
        assert entry in read


def test_every_shipped_table_is_one_and_is_of_an_architecture_whose_limits_are_known():
    for name in tuning.tables():
        tuning.check_entries(name, tuning.table(name))
        assert int(name.removeprefix("sm_")) in aot.SHARED_LIMIT | aot.OTHER_LIMITS


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_what_a_table_says_is_what_is_compiled_for_its_architecture_alone(folder):
    put(folder, **{"gae carries": {"BLOCK": 2048}})
    build = aot.builds()["gae.triton_impl: carries"]
    assert [build.on(name)[0]["BLOCK"] for name in ("sm_80", "sm_90")] == [512, 2048]
    (folder / "sm_120.json").write_text(json.dumps({"about": {}, "entries": {}}))
    code = (
        f"import pathlib; from bench import aot; from fastrl.kernels import tuning\n"
        f"tuning.FOLDER = pathlib.Path({str(folder)!r})\n"
        "assert aot.capabilities() == [80, 90, 100, 120], aot.capabilities()\n"
        "for changes in ({}, {'BLOCK': 512}):\n"
        "    print(aot.compile_and_count('gae.triton_impl: carries', 90, **changes)['instructions'])\n"
    )
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled["TRITON_CACHE_DIR"] = str(folder / "cache")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=compiled, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    with_table, default = map(int, result.stdout.split())
    assert with_table > 2 * default  # of four times as many maps to a thread


def test_a_new_table_without_a_record_is_a_complaint():
    counts = {"registers": 32, "spills": 0, "shared": 1024, "instructions": 500}
    record = {"a: b": {"sm_80": counts}}
    assert aot.grown({"a: b": {"sm_80": counts, "sm_120": counts}}, record) == [
        "a: b on sm_120: in only one of the table and the record"
    ]


def tiny(monkeypatch, refused=()):
    """An entry measured in the interpreter, where the largest block shall be the fastest."""
    monkeypatch.setattr(tune, "WORK", {"gae": tune.Work("gae", "tiny", {"BLOCK": (256, 1024), "num_warps": (4,)})})
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr("bench.timing.SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(tune, "seconds", lambda result: 1 / json.loads(result.provider)["BLOCK"])
    monkeypatch.setattr(tune, "_refused", lambda entry, parameters, device: parameters["BLOCK"] in refused)


@pytest.mark.parametrize(("refused", "table"), [((), {"gae": {"BLOCK": 1024}}), ((1024,), {})])
def test_tuning_keeps_the_fastest_candidate_that_compiles_within_limits(folder, monkeypatch, refused, table):
    tiny(monkeypatch, refused)
    tune.tune(CPU, tune.WORK)
    assert [path.name for path in folder.iterdir()] == ["sm_90.json"]
    written = json.loads((folder / "sm_90.json").read_text())
    assert written["entries"] == table
    assert written["about"]["machine"]
    assert tuning.tuned("gae", CPU)["BLOCK"] == (1024 if table else 512)


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_tuning_tries_specialized_warps_where_there_are_some(folder, monkeypatch, architecture):
    entry, tried = "linear_logprob fused", []
    monkeypatch.setattr(tuning, "architecture", lambda device: architecture)
    work = replace(tune.WORK[entry], shape="tiny", choices={"BLOCK_H": (16, 32), "num_warps": (4, 8)})
    monkeypatch.setattr(tune, "WORK", {entry: work})
    monkeypatch.setattr(tune, "_refused", lambda entry, parameters, device: False)

    def fastest(case, rounds, device):
        tried.extend(map(json.loads, case.providers))
        return [tune.Result(name, "ok", median=2.0 - json.loads(name)["WARP_SPECIALIZE"]) for name in case.providers]

    monkeypatch.setattr(tune, "measure", fastest)
    tune.tune(CPU, [entry])
    specialized = [parameters for parameters in tried if parameters["WARP_SPECIALIZE"]]
    assert {p["num_warps"] for p in specialized} == ({4} if architecture == "sm_90" else set())
    assert {p["num_warps"] for p in tried if p not in specialized} == {4, 8}
    written = json.loads((folder / f"{architecture}.json").read_text())["entries"]
    assert written == ({entry: tuning.SPECIALIZED[entry]} if architecture == "sm_90" else {})


@pytest.mark.parametrize("status", ["wrong", "failed", "OOM"])
def test_a_candidate_whose_results_are_not_right_has_no_time(status):
    assert tune.seconds(tune.Result("candidate", status)) == float("inf")
    assert tune.seconds(tune.Result("candidate", "ok", median=2.0)) == 2.0
    assert tune.seconds(tune.Result("candidate", "ok", median=2.0, device_seconds=1.0)) == 1.0


def test_tuning_other_entries_keeps_what_a_table_has(folder, monkeypatch):
    put(folder, policy_loss={"BLOCK": 256})
    monkeypatch.setattr(tune, "faster", lambda entry, device: tuning.DEFAULTS[entry] | {"BLOCK": 1024})
    tune.tune(CPU, ["gae"])
    assert tuning.table("sm_90") == {"gae": {"BLOCK": 1024}, "policy_loss": {"BLOCK": 256}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to tune")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "there is nothing to tune"), (["--device", "cpu"], "got cpu: there is nothing"), (["gea"], "got gea.")],
)
def test_without_a_gpu_tuning_says_so_in_one_sentence(arguments, message, capsys):
    assert main(["bench", "--tune", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fastrl bench --tune: expected ")
    assert message in printed
    assert printed.count("\n") == 1
