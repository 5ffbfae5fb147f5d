"""The law by which accuracy grows with compute, fitted to runs: `fastrl scaling fit RUN ...`.

    R(C) = R_0 + (A - R_0) / (1 + (C_mid / C)^B)

A is the asymptote, B the exponent (efficiency), C_mid the compute at half of the gain, R_0 the rate before training:
equation 1 of ScaleRL, arXiv:2510.13786, and its procedure of fitting (appendix A.5 to A.7): for every A and C_mid of a
grid, the B with the least squared error; of all cells the best.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrl.check import require

OP = "scaling"
PAPER_ASYMPTOTES = np.linspace(0.45, 0.8, 71)
PAPER_MIDPOINTS = np.linspace(100.0, 40_000.0, 100)  # hours of a GPU; the paper's table has values between these
EXPONENTS = np.geomspace(0.05, 20.0, 40)  # where the search of B starts
LEAST = 5  # points for three unknowns and something to judge them by


@dataclass(frozen=True)
class SigmoidLaw:
    """R(C); `edges` names what was found at an end of its grid, and so may lie beyond it."""

    asymptote: float
    exponent: float
    midpoint: float
    start: float
    edges: tuple[str, ...] = ()

    def __call__(self, compute: np.ndarray | float) -> np.ndarray:
        """The rate at a compute above 0, in the unit of `midpoint`."""
        gain = _sigmoid(self.exponent * np.log(np.asarray(compute, dtype=float) / self.midpoint))
        return self.start + (self.asymptote - self.start) * gain


@dataclass(frozen=True)
class Margins:
    """Of each of asymptote, exponent and midpoint: lowest and highest."""

    refits: dict[str, tuple[float, float]]  # over fits that leave out one point each
    bootstrap: dict[str, tuple[float, float]]  # 5 and 95 % of fits to the curve plus residuals drawn anew
    laws: tuple[SigmoidLaw, ...]  # those of the bootstrap, for bands

    def band(self, compute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """5 and 95 % of the bootstrap's curves."""
        low, high = np.quantile([law(compute) for law in self.laws], (0.05, 0.95), axis=0)
        return low, high


def fit_sigmoid(
    compute: Sequence[float] | np.ndarray,
    rate: Sequence[float] | np.ndarray,
    *,
    start: float,
    asymptotes: Sequence[float] | np.ndarray = PAPER_ASYMPTOTES,
    midpoints: Sequence[float] | np.ndarray = PAPER_MIDPOINTS,
) -> SigmoidLaw:
    """The law with the least sum of squared errors over a grid of asymptotes and midpoints.

    Args:
        compute, rate: (n,) points, compute above 0 in any unit, with n at least 5; no point before training.
        start: R_0, the rate before training.
        asymptotes, midpoints: the grid, ascending; a single asymptote fits runs that are compared at it.

    Raises:
        ValueError: too few points, a compute that is not positive, a value that is not finite, or an asymptote that is
            not above `start`.
    """
    compute, rate, asymptotes, midpoints = (np.asarray(x, dtype=float) for x in (compute, rate, asymptotes, midpoints))
    require(len(compute) == len(rate), OP, "rate", f"{len(compute)} values as compute", len(rate))
    require(len(compute) >= LEAST, OP, "points", f"at least {LEAST}", len(compute), "Evaluate more often.")
    good = bool(np.isfinite(compute).all() and np.isfinite(rate).all() and (compute > 0).all())
    require(good, OP, "points", "finite, with a compute above 0", "another")
    require(bool((midpoints > 0).all()), OP, "midpoints", "above 0", midpoints.min())
    asymptotes = asymptotes[asymptotes > start]
    require(len(asymptotes) > 0, OP, "asymptotes", f"one above the start, {start:g}", "none")
    errors, exponents = _best_exponents(compute, rate - start, asymptotes - start, midpoints)
    row, column = np.unravel_index(errors.argmin(), errors.shape)
    edges = tuple(
        name
        for name, grid, at in (("asymptote", asymptotes, row), ("midpoint", midpoints, column))
        if len(grid) > 1 and at in (0, len(grid) - 1)
    )
    found = (asymptotes[row], exponents[row, column], midpoints[column])
    return SigmoidLaw(*map(float, found), float(start), edges)


def margins(
    compute: Sequence[float] | np.ndarray,
    rate: Sequence[float] | np.ndarray,
    law: SigmoidLaw,
    *,
    asymptotes: Sequence[float] | np.ndarray = PAPER_ASYMPTOTES,
    midpoints: Sequence[float] | np.ndarray = PAPER_MIDPOINTS,
    draws: int = 100,
    seed: int = 0,
) -> Margins:
    """How far asymptote, exponent and midpoint move if a point is left out, or if the noise falls differently.

    The bootstrap fits to R(C_i) + e_i, with e_i drawn from the residuals, which are scaled by sqrt(n / (n - 3)) because
    three numbers were fitted to them.

    Args:
        compute, rate, asymptotes, midpoints: as `fit_sigmoid` had them, and `law` what it gave.
        draws: fits of the bootstrap, at least 1.

    Raises:
        ValueError: `draws` is below 1.
    """
    require(draws >= 1, OP, "draws", "at least 1", draws)
    compute, rate = np.asarray(compute, dtype=float), np.asarray(rate, dtype=float)
    grid: dict[str, Any] = {"start": law.start, "asymptotes": asymptotes, "midpoints": midpoints}
    others = (np.arange(len(compute)) != left_out for left_out in range(len(compute)))
    refits = [fit_sigmoid(compute[kept], rate[kept], **grid) for kept in others] if len(compute) > LEAST else [law]
    noise, generator = rate - law(compute), np.random.default_rng(seed)
    noise = noise * np.sqrt(len(noise) / max(len(noise) - 3, 1))
    drawn = (law(compute) + generator.choice(noise, len(noise)) for _ in range(draws))
    laws = tuple(fit_sigmoid(compute, one, **grid) for one in drawn)
    names = ("asymptote", "exponent", "midpoint")
    spread = {name: tuple(np.quantile([getattr(one, name) for one in laws], (0.05, 0.95))) for name in names}
    moved = {name: (min(values), max(values)) for name in names if (values := [getattr(one, name) for one in refits])}
    return Margins(moved, spread, laws)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -500.0, 500.0)))


def _best_exponents(
    compute: np.ndarray, gain: np.ndarray, heights: np.ndarray, midpoints: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(sum of squared errors, B) of each cell, (asymptotes, midpoints): the best start, then Gauss and Newton's steps.

    gain = height * sigmoid(B log(C / C_mid)), so for a known height and C_mid there is one unknown.
    """
    log_ratio = np.log(compute / midpoints[:, None])  # (midpoints, n)
    shape = (len(heights), len(midpoints))
    best, exponents = np.full(shape, np.inf), np.full(shape, EXPONENTS[0])
    for one in EXPONENTS:
        s = _sigmoid(one * log_ratio)  # expanded squares: no array of cells and points
        found = heights[:, None] ** 2 * (s**2).sum(-1) - 2 * heights[:, None] * (s @ gain) + (gain**2).sum()
        better = found < best
        best, exponents = np.where(better, found, best), np.where(better, one, exponents)
    errors = np.empty(shape)
    for row, height in enumerate(heights):
        errors[row], exponents[row] = _refined(height, log_ratio, gain, exponents[row])
    return errors, exponents


def _refined(
    height: float, log_ratio: np.ndarray, gain: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(least sum of squared errors, its B) for one height and every midpoint, from a start near it."""

    def error(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        s = _sigmoid(exponents[:, None] * log_ratio)
        off = height * s - gain
        return (off**2).sum(-1), off, height * s * (1 - s) * log_ratio

    least, off, slope = error(exponents)
    for _ in range(30):
        step = -(off * slope).sum(-1) / np.maximum((slope**2).sum(-1), 1e-300)
        tried = np.clip(exponents + step, exponents / 2, exponents * 2).clip(EXPONENTS[0], EXPONENTS[-1])
        found, new_off, new_slope = error(tried)
        better = found < least * (1 - 1e-12)
        if not better.any():
            break
        exponents, least = np.where(better, tried, exponents), np.where(better, found, least)
        off, slope = np.where(better[:, None], new_off, off), np.where(better[:, None], new_slope, slope)
    return least, exponents


@dataclass(frozen=True)
class Curve:
    """Points of a run, in order: compute above 0, and the rate before training."""

    name: str
    compute: np.ndarray
    rate: np.ndarray
    start: float


def curve(
    run_dir: Path, *, metric: str = "", unit: str = "time", skip: float = 0.0, start: float | None = None
) -> Curve:
    """The points of a run to fit.

    Args:
        metric: the name of an evaluation, or a metric of the steps such as `reward`. Empty: the evaluation with the
            most points, or the steps' reward if none has enough.
        unit: time (seconds since the run began), step, or num_tokens.
        skip: leave out points before this compute; the paper leaves out the first epoch.
        start: the rate before training. None: the evaluation before the first step, or the first step's value.

    Raises:
        ValueError: there is no run, or no such metric or unit.
    """
    from fastrl.monitor.records import lines, measured, read_run

    run = read_run(run_dir)
    at = {record["step"]: record for record in run.metrics}
    evaluated: dict[str, list[tuple[dict, float]]] = {}
    for record in lines(run_dir / "evaluations.jsonl"):
        for name, value in measured(record).items():
            evaluated.setdefault(name, []).append((record, value))
    most = max(evaluated, key=lambda name: len(evaluated[name]), default="")
    chosen = metric or (most if most and len(evaluated[most]) > LEAST else "reward")
    points = evaluated.get(chosen) or [(one, float(one[chosen])) for one in run.metrics if chosen in one]
    known = ", ".join([*evaluated, "reward"])
    require(len(points) > 0, OP, "metric", f"one of the run's: {known}, or another of metrics.jsonl", chosen)
    require(unit in ("time", "step", "num_tokens"), OP, "unit", "time, step or num_tokens", unit)
    compute = [float({**at.get(one["step"], {}), **one}.get(unit, 0.0)) for one, _ in points]
    kept = [(c, rate) for c, (one, rate) in zip(compute, points, strict=True) if one["step"] > 0 and c > skip]
    first = next((rate for one, rate in points if one["step"] == 0), points[0][1])
    xs, ys = (np.array(column) for column in zip(*kept, strict=True)) if kept else (np.empty(0), np.empty(0))
    return Curve(f"{run.name} {chosen}", xs, ys, first if start is None else start)


def main(args: Sequence[str]) -> int:
    """`fastrl scaling fit RUN ...`: prints the laws of runs, and draws them."""
    options = _options(args)
    curves = [
        curve(Path(run), metric=options.metric, unit=options.unit, skip=options.skip, start=options.start)
        for run in options.runs
    ]
    grids = [_grid(one, options) for one in curves]
    laws = [
        fit_sigmoid(one.compute, one.rate, start=one.start, **grid) for one, grid in zip(curves, grids, strict=True)
    ]
    spreads = [
        margins(one.compute, one.rate, law, draws=options.bootstrap, **grid)
        for one, law, grid in zip(curves, laws, grids, strict=True)
    ]
    for one, law, spread, grid in zip(curves, laws, spreads, grids, strict=True):
        _show(one, law, spread, options)
        _show_prediction(one, grid, options)
    if len(curves) > 1:
        shared = float(np.mean([law.asymptote for law in laws]))
        print(f"\nat the mean asymptote {shared:.3f}")
        for one, grid in zip(curves, grids, strict=True):
            at = fit_sigmoid(one.compute, one.rate, start=one.start, **{**grid, "asymptotes": [shared]})
            print(f"  {one.name}: B {at.exponent:.2f}, C_mid {at.midpoint:.4g}")
    if options.plot:
        _plot(curves, laws, spreads, options)
        print(f"\nplot: {options.plot}")
    return 0


def _options(args: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="fastrl scaling", description=__doc__)
    parser.add_argument("command", choices=["fit"])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--metric", default="", help="an evaluation or a metric of the steps")
    parser.add_argument("--unit", default="time", help="of compute: time, step or num_tokens")
    parser.add_argument("--skip", type=float, default=0.0, help="leave out points up to this compute")
    parser.add_argument("--start", type=float, help="the rate before training; measured by default")
    parser.add_argument("--asymptotes", type=float, nargs=3, metavar=("LOW", "HIGH", "STEP"))
    parser.add_argument("--midpoints", type=float, nargs=3, metavar=("LOW", "HIGH", "COUNT"))
    parser.add_argument("--known", type=float, default=0.5, help="share of the points from which the rest is predicted")
    parser.add_argument("--at", type=float, nargs="*", default=[], help="compute to extrapolate to")
    parser.add_argument("--bootstrap", type=int, default=100, help="draws for the margins")
    parser.add_argument("--plot", default="", help="a picture to write")
    return parser.parse_args(args)


def _grid(one: Curve, options: Namespace) -> dict[str, Any]:
    """The grid asked for, or one around the run: asymptotes up to 1, midpoints from its first point to past its end."""
    if options.asymptotes:
        low, high, step = options.asymptotes
        asymptotes = np.arange(low, high + step / 2, step)
    else:
        asymptotes = np.arange(one.start + 0.01, 1.0001, 0.005)
    if options.midpoints:
        low, high, count = options.midpoints
        midpoints = np.linspace(low, high, int(count))
    else:
        require(len(one.compute) > 0, OP, "points", f"at least {LEAST}", 0, "Evaluate more often, or lower --skip.")
        midpoints = np.geomspace(one.compute.min() / 4, one.compute.max() * 4, 60)
    return {"asymptotes": asymptotes, "midpoints": midpoints}


def _show(one: Curve, law: SigmoidLaw, spread: Margins, options: Namespace) -> None:
    off = float(np.sqrt(np.mean((law(one.compute) - one.rate) ** 2)))
    print(f"{one.name}: {len(one.compute)} points, R_0 {one.start:.3f}, rms error {off:.4f}")
    for name, sign, form in (("asymptote", "A", ".3f"), ("exponent", "B", ".2f"), ("midpoint", "C_mid", ".4g")):
        (low, high), (least, most) = spread.bootstrap[name], spread.refits[name]
        edge = "; at the end of its grid: beyond it may fit better" if name in law.edges else ""
        spans = f"90 % {low:{form}} to {high:{form}}, one left out {least:{form}} to {most:{form}}"
        print(f"  {sign:5} {getattr(law, name):>8{form}}  {spans}{edge}")
    for compute in options.at:
        low, high = spread.band(np.array([compute]))
        print(f"  at {compute:g} {options.unit}: {law(compute):.3f}, 90 % {low[0]:.3f} to {high[0]:.3f}")


def _show_prediction(one: Curve, grid: dict[str, np.ndarray], options: Namespace) -> None:
    """What the run's first points say of the rest, and how far off that was."""
    known = int(len(one.compute) * options.known)
    if known < LEAST or known == len(one.compute):
        print(f"  too few points to predict some from others: {known} known, at least {LEAST} needed")
        return
    law = fit_sigmoid(one.compute[:known], one.rate[:known], start=one.start, **grid)
    rest, truth = law(one.compute[known:]), one.rate[known:]
    off = float(np.abs(rest - truth).mean())
    said = f"{rest[-1]:.3f} at the end where {truth[-1]:.3f} came, {off:.3f} off on average"
    print(f"  from its first {known} points: {said}")


def _plot(curves: list[Curve], laws: list[SigmoidLaw], spreads: list[Margins], options: Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (one, law, spread) in enumerate(zip(curves, laws, spreads, strict=True)):
        color = f"C{index}"
        end = max([one.compute.max() * 2, *options.at])
        x = np.geomspace(one.compute.min() / 2, end, 200)
        axes.plot(one.compute, one.rate, "o", markersize=4, color=color, label=one.name)
        inside = x <= one.compute.max()
        axes.plot(x[inside], law(x[inside]), color=color)
        axes.plot(x[~inside], law(x[~inside]), "--", color=color)
        axes.fill_between(x, *spread.band(x), color=color, alpha=0.15, linewidth=0)
        axes.axhline(law.asymptote, color=color, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("seconds" if options.unit == "time" else options.unit)
    axes.set_ylabel("rate")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(options.plot, dpi=150)
