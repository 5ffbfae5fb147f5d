"""The page of benchmarks: the newest run of each case, what is worse than before, what cannot be read; and --quick."""

from __future__ import annotations

import json

import pytest
import torch

from bench import page, quick, run, timing

ABOUT = {
    "machine": "m-2c",
    "cpu": "CPU",
    "isa": "AVX2",
    "native": "avx2",
    "threads": 2,
    "torch": "2.13.0",
    "commit": "c1",
}


def op(provider, seconds, date, *, status="ok", case="gae, 32k, float32", **about):
    return {
        "op": "gae", "case": case, "provider": provider, "status": status, "median": seconds, "peak_bytes": 2**20,
        "errors": {"y": 1e-7, "z": 1e-6}, "environment": ABOUT | {"date": date} | about,
    }  # fmt: skip


def step(provider, seconds, date):
    asked = {"model": "m", "algorithm": "grpo", "prompts": 8, "samples": 8, "max_new_tokens": 32, "reward": "half"}
    return {
        "op": "step", "workload": asked, "provider": provider, "status": "ok", "peak_bytes": [2**30],
        "steps": [{"seconds": one} for one in seconds], "environment": ABOUT | {"date": date},
    }  # fmt: skip


def written(folder, *lines):
    (folder / "m-2c").mkdir(parents=True, exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "m-2c" / "2026-01-01.jsonl").write_text(text)
    return page.read(folder)


def test_the_newest_run_of_a_case_counts_with_its_best_peer_and_commit(tmp_path):
    old, new = "2026-01-01T00:00:00", "2026-01-02T00:00:00"
    lines, wrong = written(
        tmp_path,
        op("fastrl", 0.004, new, commit="c2"),
        op("torch", 0.010, new, commit="c2"),
        op("liger", 0.008, new, commit="c2"),
        op("compile", None, new, status="wrong", commit="c2"),
        op("fastrl", 0.5, old),
        op("torch", 0.001, old),
    )
    assert wrong == []
    (row,) = [line for line in page.page(lines).splitlines() if line.startswith("| gae")]
    assert row == "| gae, 32k, float32 | 4.0 | liger | 8.0 | 0.50 | 1 | 1 | 1e-06, 1e-06 | c2, 2026-01-02 |"


def test_machines_and_instruction_sets_have_sections_of_their_own_and_labels_their_present_names(tmp_path):
    date = "2026-01-01T00:00:00"
    lines, _ = written(
        tmp_path,
        op("fastrl", 0.004, date, case="x (8 x 49152 x 32), half of the groups silent, float32"),
        op("fastrl", 0.002, date, native="avx512_bf16"),
    )
    text = page.page(lines)
    assert "## m-2c, avx2\n" in text
    assert "## m-2c, avx512_bf16\n" in text
    assert "| x (8 x 49152, sequences of 32), half of the groups zero-advantage, float32 | 4.0 | none |" in text


def test_broken_lines_are_named_and_skipped(tmp_path):
    good = op("fastrl", 0.004, "2026-01-01T00:00:00")
    lines, wrong = written(tmp_path, good, '{"op": "gae"', "\n", {"op": "gae", "case": "x"}, "[1]\n")
    assert len(lines) == 1
    assert [message.split(":")[0] for message in wrong] == [f"2026-01-01.jsonl, line {n}" for n in (2, 3, 4)]


@pytest.mark.parametrize(("now", "flagged"), [(0.0052, False), (0.0054, True), (0.001, False)])
def test_a_share_of_the_best_peer_that_grew_by_more_than_a_twentieth_is_flagged(tmp_path, now, flagged):
    """Of the peer in the same run: a slow minute of the machine hits both."""
    old, new = "2026-01-01T00:00:00", "2026-01-02T00:00:00"
    runs = (op("fastrl", 0.005, old), op("torch", 0.010, old), op("fastrl", 2 * now, new), op("torch", 0.020, new))
    lines, _ = written(tmp_path, *runs)
    assert [message.endswith(f"0.50 -> {now / 0.01:.2f} of the best peer") for message in page.slower(lines)] == [
        True
    ] * flagged


def test_whole_steps_are_medians_and_the_picture_has_a_bar_for_each(tmp_path):
    date = "2026-01-01T00:00:00"
    lines, _ = written(
        tmp_path, step("fastrl", [2.0, 9.0, 2.2], date), step("trl", [8.8], date), step("trl+fastrl", [4.4], date)
    )
    text = page.page(lines)
    assert "| fastrl | 2.2 | 1.00 | 1024 |\n| trl+fastrl | 4.4 | 2.00 | 1024 |\n| trl | 8.8 | 4.00 | 1024 |" in text
    page.draw(lines, tmp_path / "assets" / "step.svg")
    picture = (tmp_path / "assets" / "step.svg").read_text()
    assert all(word in picture for word in ("fastrl", "TRL + fastrl", "2.2 s", "4.4 s", "8.8 s"))
    page.draw(lines, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == picture


def test_the_repositorys_page_is_that_of_its_results():
    lines, wrong = page.read(page.RESULTS)
    assert wrong == []
    assert page.PAGE.read_text() == page.page(lines)


def test_quick_prints_and_draws_the_timed_and_names_the_rest(tmp_path, monkeypatch, capsys):
    def measured(case, rounds, device):
        assert "fastrl" in case.providers
        assert not set(quick.SLOW) & set(case.providers)
        found = [timing.Result("fastrl", "ok", "", {"y": 1e-3}, 0.2, 0.2, 0.2, 2**20)]
        found.append(timing.Result("torch", "ok", "", {"y": 1e-2}, 0.4, 0.4, 0.4, 2**21))
        return [*found, timing.Result("liger", "wrong", "y beyond"), timing.Result("cce", "absent", "no module")]

    monkeypatch.setattr(quick, "measure", measured)
    monkeypatch.setattr(quick, "matmul_rate", lambda dtype, device: 1e12)
    monkeypatch.setattr(quick, "NAME", "tiny")
    run.main(["--quick", "--device", "cpu", "--plot", str(tmp_path / "bench.svg")])
    said = capsys.readouterr().out
    assert "0.50" in said
    assert "liger: wrong, y beyond; cce: absent, no module" in said
    picture = (tmp_path / "bench.svg").read_text()
    assert all(word in picture for word in ("200 ms", "400 ms", "liger wrong, cce absent"))
    assert quick.dtype_of(torch.device("cuda")) is torch.bfloat16
