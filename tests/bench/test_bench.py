"""A benchmark must not print the speed of a wrong answer, and must measure what it says."""

from __future__ import annotations

import importlib
import json
import platform
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import bench_step, goals, peers, run, step_fastrl, timing
from bench.shapes import GROUP
from bench.step_child import StepRecord
from bench.step_naive import Loop
from bench.workload import Workload, alternating_reward, compute_dtype, last_number_reward, write_questions
from fastrl.trainer.recipe import load_recipe

CPU = torch.device("cpu")


def case(providers: dict, dtype: torch.dtype = torch.float32, **absent: str) -> timing.Case:
    return timing.Case("case", dtype, lambda: {"y": torch.ones(4, dtype=torch.float64)}, providers, absent)


def ones() -> dict[str, torch.Tensor]:
    return {"y": torch.ones(4)}


@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_a_wrong_provider_has_an_error_and_no_time(value):
    fast = lambda: {"y": torch.full((4,), value)}  # noqa: E731
    right, wrong = timing.measure(case({"right": ones, "fast": fast}), 2, CPU)
    assert right.status == "ok"
    assert right.median > 0
    assert wrong.status == "wrong"
    assert wrong.median is None
    assert "y beyond" in run._cells(wrong, right.median, None)[-1]
    assert run._cells(wrong, right.median, None)[0] == "wrong"


def test_a_provider_without_memory_shows_oom_and_a_broken_one_its_message():
    def hungry():
        torch.empty(2**60)

    def broken():
        raise RuntimeError("no such kernel\nstack")

    results = timing.measure(case({"hungry": hungry, "broken": broken, "right": ones}, gone="not installed"), 1, CPU)
    shown = {result.provider: (result.status, result.detail) for result in results}
    assert shown["hungry"][0] == "OOM"
    assert shown["broken"] == ("failed", "no such kernel")
    assert shown["right"][0] == "ok"
    assert shown["gone"] == ("absent", "not installed")


def test_each_round_runs_every_provider_and_another_one_starts(monkeypatch):
    order = []

    def provider(name):
        def call():
            order.append(name)
            return ones()

        return call

    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    timing.measure(case({name: provider(name) for name in "abc"}), 3, CPU)
    assert "".join(order[-9:]) == "abcbcacab"


def test_a_time_is_that_of_one_call_however_many_a_sample_holds(monkeypatch):
    clock = [0.0]  # of its own: a real one also counts what else the machine does
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def takes_a_millisecond():
        clock[0] += 0.001
        return ones()

    (result,) = timing.measure(case({"slow": takes_a_millisecond}), 3, CPU)
    assert result.samples == 3 * round(timing.SAMPLE_SECONDS / 0.001)
    assert (result.low, result.median, result.high) == pytest.approx((0.001, 0.001, 0.001))


def test_a_provider_that_takes_minutes_is_called_once_and_says_so(monkeypatch):
    clock, calls = [0.0], {"slow": 0, "quick": 0}
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def provider(name, seconds):
        def call():
            calls[name] += 1
            clock[0] += seconds
            return ones()

        return call

    providers = {"slow": provider("slow", 2 * timing.SLOW_SECONDS), "quick": provider("quick", 2.0)}
    slow, quick = timing.measure(case(providers), 3, CPU)
    assert (slow.status, slow.samples, slow.detail) == ("ok", 1, "one call, the first")
    assert (slow.low, slow.median, slow.high) == (40.0, 40.0, 40.0)
    assert (quick.median, quick.samples, quick.detail) == (2.0, 3, "")
    assert calls == {"slow": 1, "quick": 5}  # a check, a peak and three rounds


@pytest.mark.skipif(platform.system() != "Linux", reason="the high-water mark is Linux's")
def test_peak_memory_counts_what_a_call_needs_and_gives_back():
    def needs_64_mib():
        torch.ones(16 << 20)
        return ones()

    peak = timing.peak_extra(needs_64_mib, CPU)
    assert 60 << 20 <= peak <= 80 << 20


@pytest.mark.parametrize("op", peers.PEERS)
def test_fastrl_and_torch_agree_with_the_float64_truth_of_every_op(op):
    module = importlib.import_module(f"bench.bench_{op}")
    dtype = torch.float64 if op in run.HEAD_OPS else torch.float32
    for tensors in module.tensors(module.SHAPES["tiny"], dtype, CPU).values():
        plain, absent = peers.build(op, ["torch"], *tensors)
        providers = plain | {"fastrl": module.fastrl_provider("auto", *tensors)}
        measured = timing.Case(op, torch.float32, lambda t=tensors: module.truth(*t), providers, absent)
        results = timing.measure(measured, 1, CPU)
        assert {result.provider for result in results} == {"torch", "fastrl"}
        assert all(0 <= result.error < 2e-6 for result in results)


def test_a_peer_that_is_unknown_or_not_installed_is_absent_with_its_reason(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'other'")

    monkeypatch.setitem(peers.PEERS, "gae", {"torch": lambda: ones, "other": missing})
    providers, absent = peers.build("gae", ["torch", "other", "nobody"])
    assert list(providers) == ["torch"]
    assert absent == {"other": "No module named 'other'", "nobody": "no peer for gae; there are torch, other"}


def test_the_command_writes_one_line_per_provider_with_where_it_ran(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    arguments = ["group_advantages", "--shapes", "tiny", "--rounds", "1", "--against", "torch,trl", "--out", str(out)]
    run.main(arguments)
    lines = {line["provider"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert set(lines) == {"fastrl", "torch", "trl"}
    assert lines["trl"]["status"] == "absent"
    assert lines["fastrl"]["median"] > 0
    assert torch.__version__.startswith(lines["fastrl"]["environment"]["torch"])
    assert "| fastrl " in capsys.readouterr().out


@pytest.mark.parametrize("written", [["float32", "bfloat16"], ["float32,bfloat16"]], ids=str)
def test_every_dtype_has_a_table_of_its_own_against_all_peers(written, tmp_path, capsys, monkeypatch):
    logprob = {name: peers.PEERS["logprob"][name] for name in ("torch", "trl")}
    monkeypatch.setitem(peers.PEERS, "logprob", logprob)
    out = tmp_path / "results.jsonl"
    arguments = ["logprob", "--shapes", "tiny", "--rounds", "1", "--against", "all", "--dtype", *written]
    run.main([*arguments, "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    providers = {
        dtype: {x["provider"] for x in lines if x["case"].endswith(dtype)} for dtype in ("float32", "bfloat16")
    }
    assert providers == {"float32": {"fastrl", *logprob}, "bfloat16": {"fastrl", *logprob}}
    shown = capsys.readouterr().out
    assert shown.index(", float32") < shown.index(", bfloat16")
    assert {"isa", "native"} <= lines[0]["environment"].keys()


def test_an_op_in_float32_alone_is_measured_once_whatever_dtypes_are_named(tmp_path):
    out = tmp_path / "results.jsonl"
    both = ["--dtype", "bfloat16", "float32"]
    run.main(["gae", "--shapes", "tiny", "--rounds", "1", "--against", "none", *both, "--out", str(out)])
    assert len(out.read_text().splitlines()) == 1


def test_a_dtype_that_is_none_is_refused_by_name():
    with pytest.raises(ValueError, match=r"--dtype: expected some of bfloat16, float16, .* got float23"):
        run.main(["gae", "--dtype", "float32", "float23"])


def line(op: str, shape: str, mode: str, provider: str, **measured: object) -> dict:
    module = importlib.import_module(f"bench.bench_{op}")
    label = run.label_of(op, shape, module.SHAPES[shape], mode, torch.bfloat16)
    fields = {"status": "ok", "detail": "", "matmul_rate": 7e14, "flops": 6.1e13, "worst": {"logps": 3e-6}}
    return {"op": op, "case": label, "provider": provider} | fields | measured


def test_goals_stand_beside_what_was_measured_last_and_say_what_was_not():
    large = ("linear_policy_loss", goals.LARGE)
    records = [
        line(*large, goals.TRAINS, "fastrl", median=0.3, peak_bytes=0),
        line(*large, goals.TRAINS, "fastrl", median=0.08, peak_bytes=(2 << 30) + 2 * 4096 * (16384 + 151936)),
        line(*large, goals.TRAINS, "trl", median=0.1),
        line(*large, goals.ZERO_ADVANTAGE, "fastrl", median=0.084),
        line("linear_policy_loss", goals.SMALL, goals.TRAINS, "fastrl", median=0.1),
        line("linear_logprob", goals.LARGE, "frozen head", "fastrl", status="OOM", detail="no memory"),
        line("linear_logprob", goals.LARGE, "no gradient", "fastrl", median=0.0285),
        line("group_policy_loss", "64k", "", "fastrl/operator", device_seconds=12e-6),
        line("group_policy_loss", "64k", "", "fastrl", device_seconds=90e-6),
    ]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in goals.table(records).splitlines()[2:]]
    assert len(rows) == len(goals.GOALS)
    assert [row[2:] for row in rows] == [
        ["80", "yes"],
        ["0.8", "no, 1.07 times it"],
        ["84", "no, 1.50 times it"],
        ["fastrl: OOM no memory", ""],
        ["28.5", "yes"],
        ["2", "yes"],
        ["fastrl/recompute: not measured", ""],
        ["1.15", "yes"],
        ["3e-06", "yes"],
        ["12", "yes"],
        ["fastrl: not measured", ""],
    ]


def test_every_goal_is_of_a_shape_and_a_mode_that_there_are():
    for goal in goals.GOALS:
        module = importlib.import_module(f"bench.bench_{goal.op}")
        assert goal.shape in module.SHAPES
        assert goal.mode in ("", *getattr(module, "MODES", {}), *getattr(module, "ZERO_ADVANTAGE", {}))
        assert goal.over in ("", *peers.PEERS[goal.op])


def test_the_other_ways_to_call_an_op_agree_with_the_float64_truth():
    for op in ("group_policy_loss", "linear_logprob", "linear_policy_loss"):
        module = importlib.import_module(f"bench.bench_{op}")
        tensors = list(module.tensors(module.SHAPES["tiny"], torch.float32, CPU).values())[-1]
        providers = {name: run.ours_on(module, name, *tensors) for name in module.VARIANTS}
        measured = timing.Case(op, torch.float32, lambda t=tensors, m=module: m.truth(*t), providers)
        for result in timing.measure(measured, 1, CPU):
            assert (result.status, result.detail) == ("ok", "")
            assert all(0 <= error < 1e-4 for error in result.worst.values())


def test_the_questions_are_distinct_and_enough_for_every_step(tmp_path):
    workload = Workload(prompts=4, steps=3, folder=str(tmp_path))
    write_questions(workload, chat=True)
    prompts = {row["prompt"][0]["content"] for row in workload.rows()}
    assert len(prompts) == len(workload.rows()) == 4 * (3 + workload.warm_up)
    write_questions(workload, chat=False)
    assert all(row["prompt"].endswith("The answer is") for row in workload.rows())
    assert Workload(**json.loads(workload.encode())) == workload


def test_the_rewards_score_the_last_number_and_leave_no_prompt_with_equal_ones():
    texts = ["2 + 3 = 5", [{"role": "assistant", "content": "it is -4."}], "no idea"]
    assert last_number_reward(texts, answer=["5", "4", "1"]) == [1.0, 0.0, 0.0]
    rewards = torch.tensor(alternating_reward(["x"] * 4 * GROUP)).view(-1, GROUP)
    assert (rewards.std(1) > 0).all()


@pytest.mark.parametrize(
    ("device", "instructions", "expected"),
    [("cpu", False, torch.float32), ("cpu", True, torch.bfloat16), ("cuda", False, torch.bfloat16)],
)
def test_a_plain_model_computes_in_the_dtype_named_else_in_the_quicker(monkeypatch, device, instructions, expected):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions)
    for name in ("", "auto"):
        assert compute_dtype(name, device) == expected
    assert compute_dtype("bfloat16", device) == torch.bfloat16
    assert compute_dtype("float32", device) == torch.float32


def test_the_dtypes_of_a_step_are_its_arguments_and_reach_every_provider(monkeypatch):
    args = bench_step._parser().parse_args(["--dtype", "auto", "--trl-dtype", "float32"])
    assert (args.dtype, args.trl_dtype) == ("auto", "float32")
    assert bench_step._parser().parse_args([]).dtype == ""
    with pytest.raises(SystemExit):
        bench_step._parser().parse_args(["--dtype", "float16"])
    given = []
    monkeypatch.setattr(step_fastrl, "train", lambda config: given.append(config.dtype) or exit())
    for dtype in ("float32", "bfloat16", ""):
        with pytest.raises(SystemExit):
            step_fastrl.run(Workload(dtype=dtype, folder="."))
    assert given == ["float32", "bfloat16", load_recipe(step_fastrl.RECIPES / "grpo.yaml").dtype]


def test_trl_computes_in_its_own_dtype_where_one_is_named(tmp_path):
    step_trl = pytest.importorskip("bench.step_trl")
    for dtype, own, autocast in (("bfloat16", "", True), ("float32", "", False), ("bfloat16", "float32", False)):
        workload = Workload(dtype=dtype, trl_dtype=own, folder=str(tmp_path))
        settings = step_trl.settings(workload, "float32")
        assert settings.bf16 == autocast
        assert settings.model_init_kwargs == {"dtype": "float32"}


def fake(tmp_path, monkeypatch, body: str) -> bench_step.Provider:
    (tmp_path / "fake_child.py").write_text(f"import json, sys\n{body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return bench_step.Provider("fake_child")


def test_a_step_provider_is_measured_without_its_warm_up(tmp_path, monkeypatch):
    steps = [StepRecord(s, {"rollout": s / 2}, 0.5, 6.0, 100, 0.0).__dict__ for s in (9.0, 2.0, 4.0)]
    body = f"json.dump({{'steps': {steps}, 'peak_bytes': {{'host': 7, 'gpu': 0}}}}, open(sys.argv[2], 'w'))"
    result = bench_step.Measured("fake")
    bench_step.measure_once(Workload(folder=str(tmp_path)), fake(tmp_path, monkeypatch, body), result, 1, 60)
    assert (result.status, result.detail) == ("ok", "")
    assert result.typical(lambda s: s.seconds) == 3.0
    assert result.peak == 7


@pytest.mark.parametrize(
    ("body", "status"),
    [("raise ValueError('broken')", "failed"), ("import os; os.kill(os.getpid(), 9)", "OOM"), ("pass", "failed")],
)
def test_a_step_provider_that_dies_has_a_status_and_no_steps(tmp_path, monkeypatch, body, status):
    result = bench_step.Measured("fastrl")
    bench_step.measure_once(Workload(folder=str(tmp_path)), fake(tmp_path, monkeypatch, body), result, 1, 60)
    assert result.status == status
    assert result.steps == []
    assert bench_step.table(Workload(), [result]).row_count > 0


def test_completions_of_unlike_length_are_called_out():
    def measured(name, length):
        return bench_step.Measured(name, steps=[StepRecord(1.0, {}, 0.0, length, 10, 0.0)], peak_bytes=[1])

    assert bench_step.warnings([measured("fastrl", 10.0), measured("trl", 12.0)]) == []
    (line,) = bench_step.warnings([measured("fastrl", 10.0), measured("trl", 15.0)])
    assert line.startswith("trl: its completions are 15.0 tokens long against 10.0")


def test_the_naive_loop_gives_the_same_gradient_however_it_is_split():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    ids, mask = torch.randint(64, (4, 9)), torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    attention = torch.cat([torch.tensor([[0, 0, 1, 1], [1] * 4, [0, 1, 1, 1], [1] * 4]), mask.long()], 1)
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0])
    loop = object.__new__(Loop)
    loop.model = LlamaForCausalLM(config).double().eval()

    def gradient(size: int) -> torch.Tensor:
        loop.masters = [parameter.detach().float() for parameter in loop.model.parameters()]
        for part in torch.arange(4).split(size):
            loop.accumulate(ids[part], attention[part], mask[part], advantages[part], 4)
        return torch.cat([master.grad.flatten().double() for master in loop.masters])

    whole = gradient(4)
    assert whole.norm() > 0
    assert (gradient(1) - whole).norm() < 1e-6 * whole.norm()
