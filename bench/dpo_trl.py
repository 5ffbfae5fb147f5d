"""TRL's DPOTrainer on the pairs, no gradient checkpointing, the reference's log-probabilities before the first step.

float32 weights, which learn, under bf16 autocast where the hardware multiplies bf16. `bfloat16` weights are there to
show the speed of that."""

from __future__ import annotations

import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from bench.pairs import PairsWorkload
from bench.step_child import STAGES, StepRecord, child
from bench.workload import compute_dtype, model_folder
from fastrl.integrations import trl as fastrl_in_trl


class Clock(TrainerCallback):
    """Times each step from the end of the one before."""

    def __init__(self, workload: PairsWorkload) -> None:
        self.tokens = 2 * workload.pairs * workload.tokens
        self.records: list[StepRecord] = []
        self.mark = self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.mark = self.mark or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds, self.mark = now - self.mark, now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            stages = dict.fromkeys(STAGES, 0.0) | {"train": self.seconds}
            self.records.append(StepRecord(self.seconds, stages, logs["loss"], 0.0, self.tokens, 0.0))


def run(workload: PairsWorkload, dtype: str = "float32", accelerate: str = "") -> list[StepRecord]:
    """Every step, warm-up included; with `accelerate` on fastrl's log-probabilities."""
    if accelerate:
        fastrl_in_trl.accelerate()
    folder, clock = model_folder(workload.model), Clock(workload)
    micro_batch = min(workload.micro_batch, workload.pairs)
    config = DPOConfig(
        output_dir=f"{workload.folder}/trl",
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=workload.pairs // micro_batch,
        max_length=2 * workload.tokens,
        precompute_ref_log_probs=True,
        beta=0.1,
        max_steps=workload.total_steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=compute_dtype("", workload.device) == torch.bfloat16,
        gradient_checkpointing=False,
        use_cpu=workload.device == "cpu",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=workload.seed,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list(workload.read()),
        callbacks=[clock],
    )
    trainer.train()
    return clock.records


if __name__ == "__main__":
    child(run, PairsWorkload)
