"""The curves of a report: small SVG pictures whose ink follows the page's colours, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastrl.monitor.records import RunRecord

WINDOW = 10  # steps in a rolling mean
# Drawn in these, then replaced by the page's CSS variables of the same name.
PALETTE = {
    "ink": "#010101",
    "grid": "#020202",
    "blue": "#030303",
    "orange": "#040404",
    "green": "#050505",
    "purple": "#060606",
    "grey": "#070707",
    "red": "#080808",
}
LINES = ("blue", "orange", "green", "purple", "red", "grey")
STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and is small
    "svg.hashsalt": "fastrl",  # equal runs give equal files
    "font.size": 9,
    "text.parse_math": False,  # a name with a dollar sign is a name
}


@dataclass
class Chart:
    """A figure with its title, unit and legend, which the page sets in its own type."""

    title: str
    unit: str
    svg: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)  # (colour name, label)


def charts(run: RunRecord) -> list[Chart]:
    """All charts that the run has numbers for."""
    if not run.metrics and not run.evaluations:
        return []
    made = [_held_out(run), *_measures(run), _reward(run), _explained_variance(run)]
    made += [_curves(run, title, unit, names) for title, unit, names in _CURVES]
    made.append(_stages(run))
    return [chart for chart in made if chart is not None]


_CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "per optimizer step", {"loss": "loss"}),
    (
        "Pairs in the right order",
        "fraction of the batch",
        {"rewards/accuracies": "by reward", "accuracy": "by score"},
    ),
    (
        "Rewards of the answers",
        "mean over the batch",
        {"rewards/chosen": "chosen, or desirable", "rewards/rejected": "rejected, or undesirable"},
    ),
    ("Reward margin", "mean over the batch", {"rewards/margins": "of rewards", "margin": "of scores"}),
    ("Values and returns", "mean over tokens", {"value/mean": "the critic's values", "return/mean": "returns"}),
    ("Value loss", "mean over tokens", {"value/loss": "value loss"}),
    ("KL in the reward", "nats per completion", {"objective/kl": "to the reference"}),
    ("Gradient norm", "before clipping", {"grad_norm": "policy", "critic/grad_norm": "critic"}),
    (
        "Entropy",
        "nats per token",
        {"entropy": "of the groups that train", "sampling/entropy": "of all completions, as sampled"},
    ),
    (
        "Completion length",
        "tokens",
        {"completions/mean_length": "mean", "completions/max_length": "longest", "completions/min_length": "shortest"},
    ),
    (
        "Shares of a batch",
        "fraction",
        {
            "frac_reward_zero_std": "prompts with equal rewards",
            "completions/clipped_ratio": "completions cut off",
        },
    ),
    (
        "Clipped tokens",
        "fraction of tokens",
        {"clip_ratio/low_mean": "at the lower bound", "clip_ratio/high_mean": "at the upper bound"},
    ),
    (
        "Masks of tokens",
        "fraction of the tokens with an advantage",
        {"masks/kept_fraction": "learn", "masks/kl_cov_fraction": "held to the old policy"},
    ),
    ("KL to the reference", "nats per token", {"kl": "k3 estimate"}),
    (
        "Sampler against trainer",
        "mean |difference of log-probability|, nats",
        {"sampling/sampling_logp_difference/mean": "difference"},
    ),
    (
        "Tokens outside [0.9, 1.1] of the sampler",
        "fraction of tokens, by the ratio of trainer to sampler",
        {"sampling/outside_share": "outside"},
    ),
    ("Throughput", "tokens per second", {"tokens_per_second": "prompt and completion tokens"}),
)


def _held_out(run: RunRecord) -> Chart | None:
    names = list(dict.fromkeys(e.name for e in run.evaluations if not e.numbers))
    chart = Chart("Held-out reward", "mean over held-out prompts, by step")

    def draw(axes: Axes) -> None:
        for colour, name in zip(cycle(LINES), names):
            points = [(e.step, e.reward) for e in run.evaluations if e.name == name]
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=PALETTE[colour], marker="o", markersize=4.5, linewidth=1.8, clip_on=False)
            chart.legend.append((colour, name))
        _unit_interval(axes, [e.reward for e in run.evaluations])

    return _picture(chart, draw) if names else None


def _measures(run: RunRecord) -> list[Chart]:
    """One chart for each metric on held-out rows."""
    return [_measure(run, name) for name in dict.fromkeys(name for e in run.evaluations for name in e.numbers)]


def _measure(run: RunRecord, name: str) -> Chart:
    points = [(e.step, e.numbers[name]) for e in run.evaluations if name in e.numbers]

    def draw(axes: Axes) -> None:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=PALETTE["blue"], marker="o", markersize=4.5, linewidth=1.8, clip_on=False)
        _unit_interval(axes, y)

    return _picture(Chart(f"Held-out {name.replace('_', ' ')}", "over held-out rows, by step"), draw)


def _reward(run: RunRecord) -> Chart | None:
    rewards = run.series("reward")
    chart = Chart("Training reward", "mean over the batch, by step")

    def draw(axes: Axes) -> None:
        axes.plot(run.steps, rewards, color=PALETTE["grey"], **_stroke(rewards, 1.0), alpha=0.7)
        axes.plot(run.steps, rolling(rewards), color=PALETTE["blue"], linewidth=2.0)
        chart.legend += [("grey", "step"), ("blue", f"mean of the last {WINDOW}")]
        _unit_interval(axes, rewards)

    return _picture(chart, draw) if _any_finite(rewards) else None


def _explained_variance(run: RunRecord) -> Chart | None:
    """How much of the returns' variance the critic explains; a new critic can be far worse than a constant."""
    values = run.series("value/explained_variance")
    low = -1.0
    below = any(v < low for v in values)
    chart = Chart("What the critic foresees", "share of the returns' variance" + (", not below -1" if below else ""))

    def draw(axes: Axes) -> None:
        shown = [max(v, low) if math.isfinite(v) else v for v in values]
        axes.plot(run.steps, shown, color=PALETTE["grey"], **_stroke(shown, 1.0), alpha=0.7)
        axes.plot(run.steps, rolling(shown), color=PALETTE["blue"], linewidth=2.0)
        chart.legend += [("grey", "step"), ("blue", f"mean of the last {WINDOW}")]
        axes.axhline(0.0, color=PALETTE["grid"], linewidth=1.2)
        axes.set_ylim(min(0.0, *(1.08 * v for v in shown if math.isfinite(v))), 1.0)

    return _picture(chart, draw) if _any_finite(values) else None


def _curves(run: RunRecord, title: str, unit: str, names: dict[str, str]) -> Chart | None:
    series = {label: run.series(name) for name, label in names.items()}
    series = {label: values for label, values in series.items() if _any_finite(values)}
    chart = Chart(title, unit)

    def draw(axes: Axes) -> None:
        for colour, (label, values) in zip(cycle(LINES), series.items()):
            axes.plot(run.steps, values, color=PALETTE[colour], **_stroke(values, 1.5))
            if len(series) > 1:
                chart.legend.append((colour, label))
        finite = [v for values in series.values() for v in values if math.isfinite(v)]
        if min(finite) >= 0:
            axes.set_ylim(0, 1.08 * max(finite) or 1.0)

    return _picture(chart, draw) if series else None


def _stages(run: RunRecord) -> Chart | None:
    stages = {name: [0.0 if math.isnan(v) else v for v in run.series(f"time/{name}")] for name in run.stages()}
    chart = Chart("Time per step", "seconds, by stage")

    def draw(axes: Axes) -> None:
        edges = [run.steps[0] - 0.5, *(step + 0.5 for step in run.steps)]
        base = [0.0] * len(run.steps)
        largest = sorted(stages, key=lambda name: -sum(stages[name]))[: len(LINES) - 1]
        rest = [name for name in stages if name not in largest]
        parts = {name: stages[name] for name in stages if name in largest}
        if rest:
            parts["other"] = [sum(values) for values in zip(*(stages[name] for name in rest), strict=True)]
        for colour, (label, values) in zip(cycle(LINES), parts.items()):
            top = [a + b for a, b in zip(base, values, strict=True)]
            axes.stairs(top, edges, baseline=base, fill=True, color=PALETTE[colour], linewidth=0, alpha=0.75)
            chart.legend.append((colour, label))
            base = top
        axes.set_ylim(0, 1.08 * max(base) or 1.0)

    return _picture(chart, draw) if stages else None


def rolling(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """The mean of the last `window` values at each point, fewer at the start, ignoring non-finite ones."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [v for v in values[max(0, end - window) : end] if math.isfinite(v)]
        means.append(sum(recent) / len(recent) if recent else math.nan)
    return means


def _any_finite(values: Sequence[float]) -> bool:
    return any(math.isfinite(v) for v in values)


def _stroke(values: Sequence[float], width: float) -> dict[str, Any]:
    """A line, or a dot for a single point."""
    return {"linewidth": width, "marker": "o" if len(values) == 1 else None, "markersize": 5}


def _unit_interval(axes: Axes, values: Sequence[float]) -> None:
    finite = [v for v in values if math.isfinite(v)]
    if finite and min(finite) >= 0 and max(finite) <= 1:
        axes.set_ylim(0, 1)


def _tick(value: float, _: int) -> str:
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _picture(chart: Chart, draw: Callable[[Axes], None]) -> Chart:
    with mpl.rc_context(STYLE):  # ty: ignore[invalid-argument-type]  names of its settings
        figure = Figure(figsize=(4.6, 2.5))
        axes = figure.add_axes((0.115, 0.17, 0.865, 0.79))
        draw(axes)
        axes.set_xlabel("step", color=PALETTE["ink"], labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=PALETTE["ink"], pad=5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(PALETTE["grid"])
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    chart.svg = _for_page(target.getvalue(), chart.title)
    return chart


def _for_page(svg: str, title: str) -> str:
    """The bare <svg> element, scaled by the page, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # a style element would reach the whole page
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for name, value in PALETTE.items():
        svg = svg.replace(value, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title} by step"', 1)
