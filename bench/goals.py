"""What was measured on a GPU beside what was aimed at.

python -m bench.goals bench/results/<gpu>/<date>.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.shapes import HEADS

Record = dict[str, Any]  # a line of a results file
LARGE, SMALL = "16k x 4096", "16k x 1024"
TRAINS, ZERO_ADVANTAGE = "all groups train", "half of the groups zero-advantage"


def milliseconds(record: Record) -> float:
    """Of one call, forward and backward."""
    return record["median"] * 1e3


def device_microseconds(record: Record) -> float:
    """Of one call's kernels."""
    return record["device_seconds"] * 1e6


def of_matmuls(record: Record) -> float:
    """The time over that of the matmuls alone, at the rate of a large `torch.mm` in the same run."""
    return record["median"] * record["matmul_rate"] / record["flops"]


def gib_beyond_gradients(record: Record) -> float:
    """Peak memory of a call without its results: gradients of hidden states and head in 16 bits."""
    shape = HEADS[LARGE]
    gradients = 2 * shape.hidden * (shape.tokens + shape.vocabulary)
    return (record["peak_bytes"] - gradients) / 2**30


def logp_error(record: Record) -> float:
    """The largest absolute one."""
    return record["worst"]["logps"]


@dataclass(frozen=True)
class Goal:
    """At most `limit`, by an op on a shape in a mode; with `over`, as a ratio to another provider in the same case."""

    title: str
    op: str
    shape: str
    mode: str
    value: Callable[[Record], float]
    limit: float
    unit: str
    provider: str = "fastrl"
    over: str = ""


# On an H200 in bfloat16: 16,384 tokens, a head of 151,936 x 4,096 and GRPO's clipped loss, unless a shape says more.
GOALS = (
    Goal("one pass, trainable head", "linear_policy_loss", LARGE, TRAINS, milliseconds, 88, "ms"),
    Goal("the same over TRL's time", "linear_policy_loss", LARGE, TRAINS, milliseconds, 0.75, "x", over="trl"),
    Goal("half of the rows with advantage 0", "linear_policy_loss", LARGE, ZERO_ADVANTAGE, milliseconds, 56, "ms"),
    Goal("frozen head", "linear_logprob", LARGE, "frozen head", milliseconds, 58, "ms"),
    Goal("log-probabilities without a gradient", "linear_logprob", LARGE, "no gradient", milliseconds, 29, "ms"),
    Goal("extra memory, one pass", "linear_policy_loss", LARGE, TRAINS, gib_beyond_gradients, 2.5, "GiB"),
    Goal(
        "extra memory, memory='recompute'",
        "linear_logprob",
        LARGE,
        "trainable head",
        gib_beyond_gradients,
        0.6,
        "GiB",
        provider="fastrl/recompute",
    ),
    Goal("hidden size 1024, over its matmuls", "linear_policy_loss", SMALL, TRAINS, of_matmuls, 1.25, "x"),
    Goal("log-probability error against float64", "linear_logprob", LARGE, "no gradient", logp_error, 1e-5, "absolute"),
    Goal(
        "advantages and policy loss, 64k tokens",
        "group_policy_loss",
        "64k",
        "",
        device_microseconds,
        15,
        "us on the device",
        provider="fastrl/operator",
    ),
    Goal("gae, 16 x 131,072", "gae", "16 x 128k", "", device_microseconds, 100, "us on the device"),
)


def table(records: list[Record], goals: tuple[Goal, ...] = GOALS) -> str:
    """Markdown, a line per goal; of several measurements of one the last."""
    lines = ["| goal | at most | measured | met |", "|---|---|---|---|"]
    for goal in goals:
        found = _find(records, goal, goal.provider)
        other = _find(records, goal, goal.over) if goal.over else None
        lacking = next(
            (
                f"{who}: {why}"
                for who, record in ((goal.provider, found), (goal.over, other))
                if who and (why := _lacks(record))
            ),
            None,
        )
        if lacking:
            measured, met = lacking, ""
        else:
            number = goal.value(found) / (goal.value(other) if other else 1)
            measured, met = (
                f"{number:.3g}",
                "yes" if number <= goal.limit else f"no, {number / goal.limit:.2f} times it",
            )
        lines.append(f"| {goal.title} | {goal.limit:g} {goal.unit} | {measured} | {met} |")
    return "\n".join(lines)


def _find(records: list[Record], goal: Goal, provider: str) -> Record | None:
    start = f"{goal.op}, {goal.shape} ("
    matching = [
        record
        for record in records
        if record["provider"] == provider
        and record["case"].startswith(start)
        and goal.mode in ("", *record["case"].split(", "))
    ]
    return matching[-1] if matching else None


def _lacks(record: Record | None) -> str:
    """Why a record has no number, or nothing."""
    if record is None:
        return "not measured"
    return "" if record["status"] == "ok" else f"{record['status']} {record['detail']}".strip()


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
