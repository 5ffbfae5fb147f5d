"""What a provider of the whole-step benchmark hands back from its own process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.timing import resident_bytes
from bench.workload import Workload

STAGES = ("rollout", "reward", "score", "train")  # what is left of a step is "other"


@dataclass(frozen=True)
class StepRecord:
    """One training step."""

    seconds: float
    stages: dict[str, float]  # of `STAGES`
    reward: float  # mean over completions
    length: float  # mean completion tokens, the stop token included
    tokens: int  # prompt and completion tokens of all sequences
    equal_rewards: float  # share of the prompts whose completions all got the same reward


def child(run: Callable[..., list[StepRecord]], kind: type[Any] = Workload) -> None:
    """Runs the workload named on the command line, and writes its steps and this process's peak memory.

    python -m bench.step_<provider> WORKLOAD_JSON RESULT_FILE [further arguments of `run`]
    """
    workload, result = kind(**json.loads(sys.argv[1])), Path(sys.argv[2])
    records = run(workload, *sys.argv[3:])
    peak = {"host": resident_bytes("VmHWM"), "gpu": _gpu_peak(workload)}
    result.write_text(json.dumps({"steps": [asdict(record) for record in records], "peak_bytes": peak}))


def _gpu_peak(workload: Any) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if workload.device.startswith("cuda") else 0


def read(path: Path) -> tuple[list[StepRecord], dict[str, int]]:
    """(steps, peak bytes by place) that a child wrote."""
    found = json.loads(path.read_text())
    names = [field.name for field in fields(StepRecord)]
    return [StepRecord(**{name: step[name] for name in names}) for step in found["steps"]], found["peak_bytes"]
