from __future__ import annotations

import io
import json
import math
import random
import re
from dataclasses import replace

import pytest
import yaml
from rich.console import Console
from trainer.fabricated import (
    CONFIG,
    ENVIRONMENT,
    HOSTILE,
    STAGES,
    FakeClock,
    evaluate,
    fabricate,
    groups,
    recording_console,
    run_steps,
)

from fastrl.monitor.alarms import Alarms
from fastrl.monitor.log import RunLog, encode
from fastrl.monitor.screen import WIDTH
from fastrl.monitor.summary import staleness
from fastrl.monitor.units import clock, duration, fixed, number
from fastrl.monitor.untrusted import clean, one_line, question
from fastrl.types import Group, Prompt, Sample


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


@pytest.fixture
def ticking(tmp_path):
    """A log whose clock moves only when told to, and what it printed."""
    time, console = FakeClock(), recording_console()
    return RunLog(tmp_path / "run", total_steps=10, console=console, clock=time), time, console


def test_config_and_environment_come_back_from_disk(ticking, tmp_path):
    log, *_ = ticking
    log.start(CONFIG, ENVIRONMENT)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["optimizer"] == {"lr": 5e-6, "betas": [0.9, 0.999]}
    assert config["rewards"] == [{"name": "reasoning_gym", "weight": 1.0}]
    assert json.loads((tmp_path / "run" / "env.json").read_text()) == ENVIRONMENT


def test_nothing_is_written_before_the_first_record(ticking, tmp_path):
    assert not (tmp_path / "run").exists()
    ticking[0].warn("x")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["warnings.jsonl"]


def test_header_names_model_data_step_device_threads_and_layout(ticking):
    log, _, console = ticking
    log.start(CONFIG, ENVIRONMENT)
    text = console.file.getvalue()
    sampled = ("chain_sum, 24 prompts held out", "40 steps of 8 prompts x 8 completions")
    for expected in ("smollm2-135m-instruct", *sampled, "EPYC, 2 cores, AVX512", "2 of 2", "auto, 2048"):
        assert expected in text


def test_stage_entered_twice_adds_up_and_starts_anew_with_the_next_step(ticking, tmp_path):
    log, time, _ = ticking
    for seconds in (1.5, 0.25):
        with log.stage("score"):
            time.now += seconds
    time.now += 0.5
    log.step(1, {"num_tokens": 450.0})
    with log.stage("train"):
        time.now += 3.0
    log.step(2, {"num_tokens": 150.0})
    first, second = lines(tmp_path / "run" / "metrics.jsonl")
    assert first == {
        "step": 1,
        "time": 2.25,
        "num_tokens": 450.0,
        "step_time": 2.25,
        "tokens_per_second": 200.0,
        "time/score": 1.75,
    }
    assert second == {
        "step": 2,
        "time": 5.25,
        "num_tokens": 600.0,  # of the run
        "step_time": 3.0,
        "tokens_per_second": 50.0,
        "time/train": 3.0,
    }


def test_stage_that_raises_is_still_timed(ticking, tmp_path):
    log, time, _ = ticking

    def failing():
        with log.stage("train"):
            time.now += 2.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    log.step(1, {})
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["time/train"] == 2.0


def test_no_step_pays_for_evaluation_and_saving(ticking, tmp_path):
    log, time, _ = ticking
    before = evaluate(log, time, 0, 0.3)
    for step in (1, 2):
        with log.stage("train"):
            time.now += 2.0
        log.step(step, {})
        with log.stage("save"):
            time.now += 7.0
    metrics, evaluations = (lines(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    assert [record["step_time"] for record in metrics] == [2.0, 2.0]
    assert metrics[1]["time/save"] == 7.0
    assert [record["seconds"] for record in evaluations] == [6.0, 6.0]
    assert {record["name"]: record["reward"] for record in evaluations} == before


def test_evaluation_line_says_what_when_and_on_how_many_prompts(ticking):
    log, time, console = ticking
    with log.stage("eval"):
        time.now += 6.0
    log.evaluation(3, "greedy", {"reward": 0.25, "prompts": 4.0}, [])
    assert console.file.getvalue() == "held-out, greedy, after step 3:  reward 0.250  on 4 prompts  (6.0 s)\n"


def test_eta_is_the_mean_recent_step_time_for_each_remaining_step(ticking):
    log, time, console = ticking
    for step, seconds in ((1, 40.0), (2, 20.0)):
        with log.stage("train"):
            time.now += seconds
        log.step(step, {})
    assert log._screen.eta() == 8 * 30.0
    assert "4:00" in console.file.getvalue().splitlines()[-1]


def test_rolling_reward_is_the_mean_of_the_last_ten_steps(ticking):
    log, _, console = ticking
    for step in range(1, 13):
        log.step(step, {"reward": float(step)})
    assert console.file.getvalue().splitlines()[-1].split()[:3] == ["12/10", "12", "7.500"]


@pytest.mark.parametrize(("value", "written"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_non_finite_numbers_are_written_as_strict_json_and_shown(ticking, tmp_path, value, written):
    log, _, console = ticking
    log.step(1, {"loss": value})
    (record,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert record["loss"] == written
    assert str(float(record["loss"])) == str(value)
    assert f"loss is {value}" in console.file.getvalue()
    assert f"loss is {value}" in lines(tmp_path / "run" / "warnings.jsonl")[0]["message"]


def test_every_sample_of_a_step_is_written_with_its_numbers(ticking, tmp_path):
    log, *_ = ticking
    made = groups(random.Random(3), 0.5, prompts=2, samples=3)
    made[1].samples[2] = replace(made[1].samples[2], reward=None, rewards={"r": None})
    log.completions(4, made)
    records = lines(tmp_path / "run" / "completions.jsonl")
    samples = [(group, sample) for group in made for sample in group.samples]
    assert len(records) == 6
    for record, (group, sample) in zip(records, samples, strict=True):
        assert record == {
            "step": 4,
            "prompt_index": group.prompt.index,
            "prompt": group.prompt.content[-1]["content"],
            "completion": sample.text,
            "rewards": sample.rewards,
            "reward": sample.reward,
            "advantage": sample.advantage,
            "finished": sample.finished,
            "tokens": len(sample.token_ids),
        }


def test_what_rewards_log_of_a_sample_is_written_with_it(ticking, tmp_path):
    log, *_ = ticking
    made = groups(random.Random(3), 0.5, prompts=1, samples=2)
    made[0].samples[1].extra = {"found": [7], "why": "no \u2028 idea"}
    log.completions(1, made)
    log.evaluation(1, "greedy", {"reward": 0.0}, made)
    for name in ("completions", "evaluation_completions"):
        records = lines(tmp_path / "run" / f"{name}.jsonl")
        assert [record.get("extra") for record in records] == [None, {"found": [7], "why": "no \u2028 idea"}]


def test_huge_and_tiny_numbers_are_short_on_the_screen(ticking):
    log, _, console = ticking
    huge = {"reward": -3.4e38, "loss": 1e300, "grad_norm": 1e-300, "entropy": 1e9}
    log.step(1, huge)
    samples = [Sample([1], [], True, "text", {}, reward, reward) for reward in (3e38, -3e38)]
    log.completions(1, [Group(Prompt(0, "q", (1,)), samples)])
    log.evaluation(1, "greedy", huge, [])
    log.warn(next(Alarms().check(1, {"loss": math.inf})))
    log.close("finished", {"before": huge, "after": huge})
    text = console.file.getvalue()
    for shown in ("-3.40e+38", "1.00e+300", "1.0e-300", "1.00e+09", "+3.00e+38"):
        assert shown in text
    assert max(len(digits) for digits in re.findall(r"[0-9,.]+", text)) < 12


def test_completions_are_shown_at_step_one_and_every_show_every_steps(tmp_path):
    console = recording_console()
    log = RunLog(tmp_path, total_steps=40, show_every=10, console=console, clock=FakeClock())
    for step in range(1, 31):
        log.completions(step, groups(random.Random(0), 0.5, prompts=1))
    shown = [line.split()[-1] for line in console.file.getvalue().splitlines() if "completions of step" in line]
    assert shown == ["1", "10", "20", "30"]


def test_table_shows_the_best_and_the_worst_completion_of_a_prompt_with_a_spread(ticking):
    log, _, console = ticking
    equal = Group(Prompt(0, "dull question", (1,)), [Sample([1], [], True, "dull", {}, 1.0)])
    texts = {"middling": 0.5, "excellent": 1.0, "terrible": 0.0}
    samples = [Sample([1], [], True, text, {}, reward, reward - 0.5) for text, reward in texts.items()]
    log.completions(1, [equal, equal, Group(Prompt(1, "live question", (1,)), samples)])
    text = console.file.getvalue()
    assert "live question" in text
    assert "excellent" in text
    assert "terrible" in text
    assert "middling" not in text
    assert "+0.50" in text
    assert "-0.50" in text


def test_hostile_completion_reaches_disk_whole_and_the_terminal_as_plain_text(tmp_path):
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="truecolor")
    log = RunLog(tmp_path, total_steps=1, console=console, clock=FakeClock())
    log.completions(1, [Group(Prompt(0, HOSTILE, (1,)), [Sample([1], [], True, HOSTILE, {}, 0.0)])])
    raw = (tmp_path / "completions.jsonl").read_bytes()
    assert json.loads(raw)["completion"] == HOSTILE
    assert raw.isascii()
    assert b"\x1b" not in raw
    shown = console.file.getvalue()
    assert "[bold red]" in shown
    assert "markup[/]" in shown
    assert "\x1b[31mred" not in shown
    assert "title" not in shown
    assert not {"\x9b", "\u202e", "\x07"} & set(shown)


def test_output_that_cannot_carry_a_character_shows_its_escape(tmp_path):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    log = RunLog(tmp_path, total_steps=1, console=Console(file=ascii_only), clock=FakeClock())
    log.completions(1, [Group(Prompt(0, "q", (1,)), [Sample([1], [], True, "\u4f60\ud800", {}, 0.0)])])
    assert b"\\u4f60" in ascii_only.buffer.getvalue()


def test_clean_removes_what_controls_a_terminal_and_keeps_text():
    assert clean("a\x1b[31;1mb\x1b[0m\tc\r\nd\x00\x7f\x85e") == "ab\tc\nde"
    assert clean("x\x1b]8;;http://evil\x1b\\y\x1b]0;t\x07z\x9b2Jw") == "xyzw"
    assert clean("\u202eabc\u2066\u200b\ud800") == "abc"
    assert clean("naïve 你好 ∑ é") == "naïve 你好 ∑ é"
    assert clean("\x1b\x1b[31m\x1b[") == ""


def test_one_line_keeps_both_ends_of_a_long_text_within_its_limit():
    text = one_line("start " + "x" * 500 + "\nend", 60)
    assert len(text) == 60
    assert text.startswith("start x")
    assert text.endswith("x end")


def test_question_is_the_last_message_or_the_text():
    assert question([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "u"
    assert question("plain") == "plain"


def test_plain_output_is_one_line_a_step_of_at_most_110_columns(tmp_path):
    console = recording_console(width=500)
    time = FakeClock()
    log = RunLog(tmp_path, total_steps=1000, show_every=0, console=console, clock=time)
    run_steps(log, time, 30, 1000)
    output = [line for line in console.file.getvalue().splitlines() if "/1000" in line]
    assert len(output) == 30
    assert max(map(len, output)) <= WIDTH
    assert all("rollout 1.9s  train 2.1s" in line for line in output)
    assert "\x1b" not in console.file.getvalue()


def test_narrow_terminal_drops_whole_columns(tmp_path):
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    log = RunLog(tmp_path, total_steps=9, console=console, clock=FakeClock())
    log.step(
        1, {"reward": 0.123, "loss": 0.456, "grad_norm": 0.789, "entropy": 1.234, "completions/mean_length": 7.654}
    )
    last = console.file.getvalue().splitlines()[-1]
    assert last.split() == ["1/9", "0.123", "0.123", "0.456", "0.789", "1.234", "7.654"]


def test_live_display_on_a_terminal_shows_the_running_stage_and_goes_away(tmp_path):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    time = FakeClock()
    log = RunLog(tmp_path, total_steps=4, console=console, clock=time)
    with log.stage("rollout"):
        time.now += 2.5
        with console.capture() as capture:
            console.print(log._screen._status())
    assert "step 0/4" in capture.get()
    assert "rollout 2.5s" in capture.get()
    log.step(1, {"reward": 0.25})
    with console.capture() as capture:
        console.print(log._screen._status())
    assert "reward 0.250" in capture.get()
    assert "about 0:08 left" in capture.get()
    assert log._screen._live is not None
    log.close("finished", {"before": {}, "after": {}, "steps": 1})
    assert log._screen._live is None
    assert console.file.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_last_panel_says_status_change_time_and_places(tmp_path):
    console = recording_console()
    fabricate(tmp_path / "run", steps=20, total=20, console=console)
    panel = console.file.getvalue().split("finished")[-1]
    evaluations = lines(tmp_path / "run" / "evaluations.jsonl")
    greedy = [record["reward"] for record in evaluations if record["name"] == "greedy"]
    assert f"{greedy[0]:.3f} -> {greedy[1]:.3f}" in panel
    assert "20 of 20" in panel
    assert duration(20 * (sum(STAGES.values()) + 0.08) + 4 * 6.0) in panel
    assert "report.html" in re.sub(r"[│\s]", "", panel)  # a long path goes on in the next line


def test_warning_for_equal_rewards_comes_once_after_three_steps_in_a_row():
    alarms, flat = Alarms(), {"frac_reward_zero_std": 1.0}
    said = [list(alarms.check(step, {} if step == 3 else flat)) for step in range(1, 12)]
    assert [step for step, messages in enumerate(said, 1) if messages] == [6]
    assert said[5][0].startswith("Steps 4 to 6: all completions of each prompt got the same reward")


def test_warnings_for_length_limit_and_sampler_mismatch_carry_their_numbers():
    alarms = Alarms()
    metrics = {"completions/clipped_ratio": 0.95, "sampling/sampling_logp_difference/mean": 0.25}
    messages = [message for step in (1, 2, 3) for message in alarms.check(step, metrics)]
    assert len(messages) == 2
    assert "95%" in messages[0]
    assert "0.250 nats" in messages[1]
    far = {"sampling/outside_share": 0.3, "sampling/staleness": 0.0}
    assert not [m for step in (1, 2, 3) for m in Alarms().check(step, {"sampling/outside_share": 0.1})]
    assert not [m for step in (1, 2, 3) for m in Alarms().check(step, far | {"sampling/staleness": 2.0})]
    alarms = Alarms()
    (message,) = [m for step in (1, 2, 3) for m in alarms.check(step, far)]
    assert "for 30% of them" in message


def test_encoded_line_holds_one_line_whatever_the_text():
    assert "\n" not in encode({"text": "a\nb\u2028c\x85"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (0.1234, "0.123"),
        (-0.00012, "-1.2e-04"),
        (24.0, "24"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (12345.6, "12,346"),
        (9_876_543.2, "9,876,543"),
        (12_345_678.9, "1.23e+07"),
        (-1e300, "-1.00e+300"),
        (1e-300, "1.0e-300"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "places", "sign", "text"),
    [
        (0.125, 3, "", "0.125"),
        (0.5, 2, "+", "+0.50"),
        (-0.5, 2, "+", "-0.50"),
        (123456.789, 2, "", "123456.79"),
        (1e300, 2, "+", "+1.00e+300"),
        (-3e38, 3, "", "-3.00e+38"),
        (1e-300, 2, "", "0.00"),
        (math.nan, 2, "", "nan"),
        (math.inf, 2, "+", "+inf"),
    ],
)
def test_numbers_of_fixed_places_are_short_too(value, places, sign, text):
    assert fixed(value, places, sign) == text


def test_durations_round_without_ever_showing_sixty_seconds():
    assert [duration(s) for s in (4.26, 59.97, 119.6, 312, 3720)] == [
        "4.3 s",
        "1 min 00 s",
        "2 min 00 s",
        "5 min 12 s",
        "1 h 02 min",
    ]
    assert [clock(s) for s in (59.6, 228, 3727)] == ["1:00", "3:48", "1:02:07"]


def test_a_hacked_reward_shows_in_lengths_and_entropies():
    alarms, said = Alarms(), []
    for step, (length, entropy) in enumerate([(12.0, 5.5)] * 4 + [(6.0, 3.0)] * 3 + [(1.4, 0.5)] * 4, start=1):
        said += alarms.check(step, {"completions/mean_length": length, "sampling/entropy": entropy, "reward": 1.0})
    assert [message.split(":")[0] for message in said] == ["Steps 8 to 10", "Steps 8 to 10"]
    assert "completions have 1.4 tokens, a third or less of the 12.0 they began with" in said[0]
    assert "the entropy is 0.500 nats per token, a tenth or less of the 5.500" in said[1]


def test_completions_of_old_weights_are_measured_and_too_old_ones_told():
    def groups(*versions):
        samples = [Sample([5, 6], [-1.0, -1.0], True, versions=list(pair), own=[True, own]) for *pair, own in versions]
        return [Group(Prompt(0, "", (1,)), samples)]

    assert staleness(groups((3, 3, True), (1, 3, False)), 4) == {"sampling/staleness": pytest.approx((1 + 1 + 3) / 3)}
    assert staleness(groups((4, 4, True)), 4) == {}
    assert staleness([Group(Prompt(0, "", (1,)), [Sample([5], [-1.0], True)])], 4) == {}
    alarms = Alarms()
    (said,) = [message for step in range(1, 5) for message in alarms.check(step, {"sampling/staleness": 9.0})]
    assert said.startswith("Steps 1 to 3: completions are 9.0 updates old")


@pytest.mark.parametrize("name", ["grad_norm", "kl"])
def test_a_spike_is_said_at_once_and_slow_growth_is_none(name):
    alarms, said = Alarms(), []
    for step in range(1, 40):
        said += alarms.check(step, {name: 1.1**step})
    assert said == []
    for step, value in enumerate([1.0] * 10 + [9.0, 11.0, 50.0], start=1):
        said += Alarms.check(alarms, 40 + step, {name: value * 40})
    assert [message.split(",")[0] for message in said] == [f"Step 52: {name} is 440"]
