"""fastrl on the pairs: its own trainer, the reference scored before the first step."""

from __future__ import annotations

import json

from bench.pairs import PairsWorkload
from bench.step_child import STAGES, StepRecord, child
from fastrl.trainer.config import DataConfig, OptimizerConfig, TrainConfig
from fastrl.trainer.setup import train


def run(workload: PairsWorkload) -> list[StepRecord]:
    """Every step, warm-up included; the first one's time includes the scoring by the reference."""
    config = TrainConfig(
        model=workload.model,
        algorithm="dpo",
        steps=workload.total_steps,
        rows_per_step=workload.pairs,
        seed=workload.seed,
        device=workload.device,
        max_tokens_per_microbatch=workload.max_tokens_per_microbatch,
        run_dir=f"{workload.folder}/fastrl",
        data=DataConfig(source=str(workload.rows), held_out=0, chat=False),
        optimizer=OptimizerConfig(lr=1e-6),
    )
    metrics = train(config).report.parent / "metrics.jsonl"
    return [_record(json.loads(line)) for line in metrics.read_text().splitlines()]


def _record(step: dict[str, float]) -> StepRecord:
    stages = dict.fromkeys(STAGES, 0.0) | {"train": step["time/train"]}
    tokens = round(step["tokens_per_second"] * step["step_time"])
    return StepRecord(step["step_time"], stages, step["loss"], 0.0, tokens, 0.0)


if __name__ == "__main__":
    child(run, PairsWorkload)
