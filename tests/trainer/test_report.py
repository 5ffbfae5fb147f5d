from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from trainer.fabricated import HOSTILE, FakeClock, fabricate, recording_console

from fastrl.monitor.charts import charts, rolling
from fastrl.monitor.log import RunLog
from fastrl.monitor.records import read_run
from fastrl.monitor.report import full_marks, held_out, mark, verdict, write_report
from fastrl.types import Group, Prompt, Sample


class Page(HTMLParser):
    """Visible text, every tag, and what the page would load."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.loads, self.words = [], [], []
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action") and not (value or "").startswith("#"):
                self.loads.append((tag, name, value))
            if name.startswith("on"):
                self.loads.append((tag, name, value))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    fabricate(run_dir)
    return run_dir, Page(write_report(run_dir))


def started(run_dir, total=5, **config):
    log = RunLog(run_dir, total_steps=total, console=recording_console(), clock=FakeClock())
    log.start({"steps": total, **config}, {})
    return log


def one_sample(text, reward, prompt="q", index=0):
    return Group(Prompt(index, prompt, (1,)), [Sample([1, 2], [], True, text, {}, reward, 0.5)])


def test_verdict_holds_accuracies_steps_time_and_cores(finished):
    run_dir, page = finished
    records = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    ends = {name: [r["reward"] for r in records if r["name"] == name] for name in ("greedy", "sampled")}
    expected = ", ".join(f"{before:.2f} → {after:.2f} ({name})" for name, (before, after) in ends.items())
    sentence = f"Held-out accuracy {expected}, 40 steps, 3 min 24 s on 2 cores"
    assert verdict(read_run(run_dir)) == sentence
    assert sentence in page.text


def test_every_metric_of_the_last_step_is_in_the_table(finished):
    run_dir, page = finished
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"reward {json.loads((run_dir / 'metrics.jsonl').read_text().splitlines()[0])['reward']:.3f}" in page.text
    for name in last.keys() - {"step", "time"}:
        assert name in page.words
    assert f"{last['entropy']:.3f}" in page.words
    assert f"{last['num_tokens']:,.0f}" in page.words


def test_configuration_and_environment_are_listed(finished):
    _, page = finished
    for row in ("task.source reasoning_gym:chain_sum", "rewards.0.weight 1.0", "optimizer.betas 0.9, 0.999"):
        assert row in page.text
    assert "git.commit 0123456789abcdef" in page.text


def test_page_loads_nothing_and_runs_nothing(finished):
    _, page = finished
    assert page.loads == []
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert "url(http" not in page.html
    assert "@import" not in page.html


def test_hostile_completion_is_escaped_and_stripped(finished):
    run_dir, page = finished
    written = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    assert written[0]["completion"] == HOSTILE
    assert "<script>alert('x')</script> [bold red]markup[/] red desrever" in page.text
    assert "&lt;script&gt;" in page.html
    assert not {"\x1b", "\x9b", "\u202e", "\x07"} & set(page.html)


def test_hostile_prompt_warning_and_evaluation_name_are_escaped(tmp_path):
    log = started(tmp_path)
    bad = "<img src=x onerror=alert(1)> $x_"
    log.warn(bad)
    log.evaluation(0, bad, {"reward": 0.5}, [one_sample(bad, 1.0, prompt=bad)])
    page = Page(write_report(tmp_path))
    assert "img" not in page.tags
    assert page.text.count(bad) >= 4


def test_first_middle_and_last_training_steps_are_shown(finished):
    _, page = finished
    headings = re.findall(r"<h3>Step (\d+)</h3>", page.html)
    assert headings == ["1", "21", "40"]


def test_held_out_changes_are_counted_over_all_answers(tmp_path):
    log = started(tmp_path)
    before = [1.0, 0.0, 0.0, 0.0, 1.0]
    after = [1.0, 1.0, 1.0, 0.0, 0.0]
    for step, rewards in ((0, before), (5, after)):
        answers = [one_sample(f"answer {i} at {step}", r, f"question {i}", i) for i, r in enumerate(rewards)]
        log.evaluation(step, "greedy", {"reward": sum(rewards) / 5}, answers)
    run = read_run(tmp_path)
    found = held_out(run)
    assert {change.label: change.count for change in found.changes} == {
        "wrong → right": 2,
        "right → right": 1,
        "wrong → wrong": 1,
        "right → wrong": 1,
    }
    assert found.changes[0].label == "wrong → right"
    first_before, first_after = found.changes[0].pairs[0]
    assert (first_before["completion"], first_after["completion"]) == ("answer 1 at 0", "answer 1 at 5")
    page = Page(write_report(tmp_path))
    assert "wrong → right: 2 of 5" in page.text
    assert "Held-out accuracy 0.40 → 0.60 (greedy), 0 of 5 steps" in page.text.replace("\xa0", " ")


def test_partial_rewards_make_the_verdict_a_reward_and_not_an_accuracy(tmp_path):
    log = started(tmp_path)
    log.evaluation(0, "greedy", {"reward": 0.7}, [one_sample("a", 0.7)])
    assert verdict(read_run(tmp_path)).startswith("Held-out reward 0.70 (greedy), 0 of 5 steps")


@pytest.mark.parametrize("kind", ["rewards", "answers"])
def test_huge_numbers_are_short_and_the_page_is_written(tmp_path, kind):
    log = started(tmp_path)
    for step in range(1, 6):
        log.step(step, {"reward": step * 3e37, "loss": -1e300 * step, "grad_norm": 3.4e38, "reward_std": 1e-300})
    sample = one_sample("a", 3e38)
    sample.samples[0].rewards, sample.samples[0].advantage = {"loss": -1e300}, 3e38
    log.completions(5, [sample])
    result = {"reward": 3e38} if kind == "rewards" else {"loss": 1e300, "rows": 1.0}
    log.evaluation(0, "greedy" if kind == "rewards" else "pairs", result, [sample])
    page = Page(write_report(tmp_path))
    shown = "Held-out reward 3.00e+38 (greedy)" if kind == "rewards" else "Held-out loss 1.00e+300"
    assert shown in page.text
    assert max(len(digits) for digits in re.findall(r"[0-9,.]+", page.text)) < 12


def test_training_rewards_without_evaluations_are_short_too(tmp_path):
    log = started(tmp_path)
    for step in range(1, 16):
        log.step(step, {"reward": 1e37 * step})
    assert verdict(read_run(tmp_path)).startswith("Training reward 5.50e+37 → 1.05e+38 (means of 10 steps)")


def test_marks_follow_the_sum_of_the_reward_weights(tmp_path):
    log = started(tmp_path, rewards=[{"name": "a", "weight": 1.0}, {"name": "b", "weight": 0.5}])
    log.warn("x")
    full = full_marks(read_run(tmp_path))
    assert full == 1.5
    marks = [mark(reward, full) for reward in (1.5, 1.0, 0.5, 0.0, None, "NaN")]
    assert marks == ["right", "partly right", "wrong", "wrong", "not scored", "wrong"]


def test_unfinished_run_says_how_far_it_came(tmp_path):
    fabricate(tmp_path / "run", steps=17, total=40)
    page = Page(write_report(tmp_path / "run"))
    assert ", 17 of 40 steps, " in page.text
    assert "before training" not in page.text
    assert "greedy, at step 0" in page.text


def test_run_of_one_step_has_its_number_in_the_curves(tmp_path):
    fabricate(tmp_path / "run", steps=1, total=40)
    titles = {chart.title for chart in charts(read_run(tmp_path / "run"))}
    assert {"Training reward", "Loss", "Time per step", "Throughput"} <= titles
    assert "1 of 40 steps" in Page(write_report(tmp_path / "run")).text


def test_run_that_was_killed_before_its_first_step_has_a_report(tmp_path):
    started(tmp_path)
    page = Page(write_report(tmp_path))
    assert "No step completed, 0 of 5 steps, 0.0 s" in page.text
    assert "svg" not in page.tags


def test_run_without_samples_or_evaluations_reports_the_training_reward(tmp_path):
    log = started(tmp_path, total=20)
    for step in range(1, 21):
        log.step(step, {"reward": step / 20})
    page = Page(write_report(tmp_path))
    assert "Training reward 0.28 → 0.78 (means of 10 steps), 20 steps" in page.text.replace("\xa0", " ")
    assert "Training completions" not in page.text


def test_last_line_that_a_killed_run_did_not_finish_is_left_out(tmp_path):
    log = started(tmp_path)
    log.step(1, {"reward": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 2, "rew')
    assert read_run(tmp_path).steps == [1]


def test_non_finite_metrics_stay_visible(tmp_path):
    log = started(tmp_path)
    log.step(1, {"reward": 0.5, "loss": float("nan"), "grad_norm": float("inf")})
    log.step(2, {"reward": 0.5, "loss": 0.25, "grad_norm": 1.0})
    page = Page(write_report(tmp_path))
    assert "loss nan 0.250" in page.text
    assert "grad_norm inf 1.000" in page.text
    assert "Step 1: loss is nan." in page.text


def test_directory_without_a_run_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"run_dir: expected a directory with a config\.yaml"):
        write_report(tmp_path / "nothing")


def test_charts_are_well_formed_follow_the_page_colours_and_have_no_fixed_size(finished):
    drawn = charts(read_run(finished[0]))
    assert len(drawn) == 13
    for chart in drawn:
        root = ET.fromstring(chart.svg)
        assert "width" not in root.attrib
        assert not re.findall(r"#[0-9a-f]{6}", re.sub(r'href="#[^"]*"|url\(#[^)]*\)', "", chart.svg)), chart.title
        assert "var(--" in chart.svg


def test_stages_are_stacked_in_the_order_in_which_they_ran(finished):
    run = read_run(finished[0])
    (chart,) = (c for c in charts(run) if c.title == "Time per step")
    assert [label for _, label in chart.legend] == ["rollout", "reward", "pack", "score", "train"]


def test_equal_runs_give_equal_pages(finished):
    run_dir, page = finished
    assert write_report(run_dir).read_text(encoding="utf-8") == page.html


def test_rolling_mean_leaves_out_what_is_not_finite():
    assert rolling([1.0, float("nan"), 3.0, 5.0], window=3) == [1.0, 1.0, 2.0, 4.0]


def test_run_with_a_critic_shows_what_it_foresees_and_says_what_is_cut_off(tmp_path):
    for name, first, note in (("good", -0.5, False), ("bad", -40.0, True)):
        log = started(tmp_path / name)
        for step in range(1, 6):
            explained = {"value/explained_variance": first if step == 1 else 0.15 * step}
            values = {"value/mean": 0.1 * step, "return/mean": 0.5, "value/loss": 1 / step, "objective/kl": 0.2 * step}
            log.step(step, {"reward": 0.5, "grad_norm": 1.0, "critic/grad_norm": 2.0} | explained | values)
        drawn = {chart.title: chart for chart in charts(read_run(tmp_path / name))}
        assert {"Value loss", "KL in the reward"} <= drawn.keys()
        assert ("not below -1" in drawn["What the critic foresees"].unit) == note
        assert [label for _, label in drawn["Values and returns"].legend] == ["the critic's values", "returns"]
        assert [label for _, label in drawn["Gradient norm"].legend] == ["policy", "critic"]
        page = Page(write_report(tmp_path / name))
        assert "What the critic foresees" in page.text
    ticks = [float(text) for text in re.findall(r">(-?[\d.]+)</text>", drawn["What the critic foresees"].svg)]
    assert min(ticks) == -1.0


def test_run_without_a_critic_has_no_chart_of_one(finished):
    titles = {chart.title for chart in charts(read_run(finished[0]))}
    assert not titles & {"What the critic foresees", "Values and returns", "Value loss", "KL in the reward"}
