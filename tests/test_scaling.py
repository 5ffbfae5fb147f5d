"""The law of accuracy over compute: the rows of ScaleRL's Table 1, noise, refusals, and runs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from fastrl import scaling
from fastrl.cli import main
from fastrl.scaling import SigmoidLaw, curve, fit_sigmoid, margins

# arXiv:2510.13786, Table 1: C_mid in hours of a GPU, B, A.
TABLE = {
    "ScaleRL": (2542, 1.92, 0.610),
    "32k": (11272, 1.89, 0.645),
    "8 generations": (2542, 2.44, 0.585),
    "24 generations": (3054, 2.22, 0.590),
    "32 generations": (2936, 2.07, 0.595),
    "Scout": (4242, 1.65, 0.710),
    "batch of 512": (2818, 1.77, 0.605),
    "batch of 2048": (10909, 1.70, 0.645),
    "math of both": (2896, 2.05, 0.595),
    "code of both": (1675, 1.09, 0.615),
}
COMPUTE = np.linspace(1500, 8000, 14)


def law_of(row):
    midpoint, exponent, asymptote = TABLE[row]
    return SigmoidLaw(asymptote, exponent, midpoint, 0.3)


@pytest.mark.parametrize("row", TABLE)
def test_points_on_a_published_curve_give_its_numbers(row):
    law = law_of(row)
    grid = np.arange(law.midpoint - 500, law.midpoint + 501, 1.0)
    found = fit_sigmoid(COMPUTE, law(COMPUTE), start=0.3, midpoints=grid)
    assert (found.asymptote, found.midpoint) == pytest.approx((law.asymptote, law.midpoint))
    assert found.exponent == pytest.approx(law.exponent, abs=1e-6)
    assert found.edges == ()


def test_on_the_papers_own_grid_the_nearest_cell_is_found_and_predicts_twice_the_compute():
    law = law_of("ScaleRL")
    found = fit_sigmoid(COMPUTE, law(COMPUTE), start=0.3)
    assert (found.asymptote, round(found.exponent, 2), round(found.midpoint)) == (pytest.approx(0.61), 1.90, 2518)
    assert found(16_000) == pytest.approx(law(16_000), abs=2e-4)


def test_the_law_is_the_equation():
    law = SigmoidLaw(0.7, 1.5, 100.0, 0.2)
    by_hand = [0.2 + 0.5 / (1 + (100.0 / c) ** 1.5) for c in (1.0, 100.0, 1e4)]
    assert law(np.array([1.0, 100.0, 1e4])) == pytest.approx(by_hand, rel=1e-12)
    assert law(100.0) == pytest.approx(0.45)


def test_no_cell_has_a_better_exponent_than_the_one_found():
    """Against a fine search over all three."""
    generator = np.random.default_rng(0)
    rate = law_of("Scout")(COMPUTE) + generator.normal(0, 0.01, len(COMPUTE))
    grid = {"asymptotes": np.linspace(0.5, 0.9, 21), "midpoints": np.linspace(1000, 9000, 17)}
    found = fit_sigmoid(COMPUTE, rate, start=0.3, **grid)

    def error(law):
        return ((law(COMPUTE) - rate) ** 2).sum()

    others = [
        error(SigmoidLaw(a, b, c, 0.3)) for a in grid["asymptotes"] for c in grid["midpoints"]
        for b in np.geomspace(0.1, 10, 200)
    ]  # fmt: skip
    assert error(found) <= min(others)


def test_the_margins_hold_the_truth_and_grow_with_the_noise():
    law, widths = law_of("ScaleRL"), []
    grid = {"asymptotes": np.arange(0.5, 0.8, 0.005), "midpoints": np.linspace(1500, 6000, 46)}
    for noise in (0.002, 0.01):
        rate = law(COMPUTE) + np.random.default_rng(3).normal(0, noise, len(COMPUTE))
        found = fit_sigmoid(COMPUTE, rate, start=0.3, **grid)
        spread = margins(COMPUTE, rate, found, draws=40, **grid)
        low, high = spread.bootstrap["asymptote"]
        assert low <= law.asymptote <= high
        assert spread.refits["asymptote"][0] <= found.asymptote <= spread.refits["asymptote"][1]
        below, above = spread.band(np.array([16_000.0]))
        assert below[0] <= law(16_000) <= above[0]
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]


def test_an_optimum_at_the_end_of_a_grid_is_named():
    law = law_of("ScaleRL")
    found = fit_sigmoid(COMPUTE, law(COMPUTE), start=0.3, asymptotes=[0.4, 0.45, 0.5])
    assert "asymptote" in found.edges
    assert fit_sigmoid(COMPUTE, law(COMPUTE), start=0.3, asymptotes=[0.61]).edges == ()


def test_at_a_fixed_asymptote_exponents_are_compared():
    """The faster of two runs to the same asymptote has the larger B."""
    fast, slow = SigmoidLaw(0.6, 2.0, 2500, 0.3), SigmoidLaw(0.6, 1.2, 2500, 0.3)
    exponents = [fit_sigmoid(COMPUTE, law(COMPUTE), start=0.3, asymptotes=[0.6]).exponent for law in (fast, slow)]
    assert exponents == pytest.approx([2.0, 1.2], abs=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute": [1, 2, 3, 4], "rate": [0.1] * 4}, "points: expected at least 5, got 4. Evaluate more often"),
        ({"rate": [0.1] * 4}, "rate: expected 5 values as compute, got 4"),
        ({"compute": [0, 1, 2, 3, 4]}, "points: expected finite, with a compute above 0"),
        ({"rate": [0.1, 0.2, float("nan"), 0.3, 0.4]}, "points: expected finite"),
        ({"start": 0.9}, "asymptotes: expected one above the start, 0.9, got none"),
        ({"midpoints": [-1.0, 2.0]}, "midpoints: expected above 0"),
    ],
)
def test_what_no_law_can_be_fitted_to_is_refused(changes, message):
    given = {"compute": [1, 2, 3, 4, 5], "rate": [0.1, 0.2, 0.3, 0.4, 0.5], "start": 0.1} | changes
    with pytest.raises(ValueError, match=f"^scaling: {message}"):
        fit_sigmoid(**given)


def test_margins_without_a_draw_are_refused():
    law = law_of("ScaleRL")
    with pytest.raises(ValueError, match=r"^scaling: draws: expected at least 1, got 0"):
        margins(COMPUTE, law(COMPUTE), law, draws=0)


# Runs.


def written(folder, steps=24, noise=0.0, evaluated=True):
    """A run's folder with points on a curve: 10 seconds and 100 tokens a step."""
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 24\n")
    law, generator = SigmoidLaw(0.8, 2.0, 90.0, 0.1), np.random.default_rng(0)
    rows = [{"step": n, "time": 10.0 * n, "num_tokens": 100.0 * n} for n in range(1, steps + 1)]
    rates = [float(law(row["time"])) + noise * generator.normal() for row in rows]
    metrics = [row | {"reward": rate - 0.05} for row, rate in zip(rows, rates, strict=True)]
    held_out = [{"step": 0, "time": 1.0, "name": "greedy", "reward": 0.1, "prompts": 10.0}]
    held_out += [
        {"step": row["step"], "time": row["time"], "name": "greedy", "reward": rate, "prompts": 10.0}
        for row, rate in zip(rows, rates, strict=True)
    ]
    for name, records in (("metrics", metrics), ("evaluations", held_out if evaluated else held_out[:1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


@pytest.mark.parametrize(("unit", "first"), [("time", 10.0), ("step", 1.0), ("num_tokens", 100.0)])
def test_a_run_s_points_are_its_evaluations_over_its_compute(tmp_path, unit, first):
    found = curve(written(tmp_path / "run"), unit=unit)
    assert (found.name, found.start, len(found.rate), found.compute[0]) == ("run greedy", 0.1, 24, first)
    assert len(curve(tmp_path / "run", unit=unit, skip=4 * first).rate) == 20


def test_without_enough_evaluations_the_reward_of_the_steps_is_fitted(tmp_path):
    found = curve(written(tmp_path / "run", evaluated=False))
    assert (found.name, len(found.rate)) == ("run reward", 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, "metric: expected one of the run's: greedy, reward, or another of metrics.jsonl"),
        ({"unit": "flops"}, "unit: expected time, step or num_tokens, got flops"),
    ],
)
def test_what_a_run_does_not_have_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        curve(written(tmp_path / "run"), **options)


def test_the_command_prints_the_law_predicts_the_second_half_and_draws(tmp_path, capsys):
    runs = [str(written(tmp_path / name, noise=0.005)) for name in ("one", "two")]
    picture = tmp_path / "law.png"
    grid = ["--asymptotes", "0.7", "0.9", "0.01", "--midpoints", "60", "120", "31", "--bootstrap", "10"]
    assert main(["scaling", "fit", *runs, *grid, "--at", "480", "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "one greedy: 24 points, R_0 0.100, rms error 0.00" in said
    off = re.findall(r"from its first 12 points: 0\.\d+ at the end where 0\.7\d+ came, (0\.\d+) off on average", said)
    assert len(off) == 2
    assert max(map(float, off)) < 0.05
    assert "at 480 time: 0.7" in said
    assert "at the mean asymptote 0.7" in said or "at the mean asymptote 0.8" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_with_too_few_points_ends_the_command_in_a_sentence(tmp_path, capsys):
    assert main(["scaling", "fit", str(written(tmp_path / "run", steps=3))]) == 2
    assert capsys.readouterr().err.startswith("scaling: points: expected at least 5, got 3. Evaluate more often")
    assert scaling.LEAST == 5
