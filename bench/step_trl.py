"""TRL's GRPOTrainer on the workload, at the settings that were fastest on a CPU among those that learn.

float32 weights, under bf16 autocast where the hardware multiplies bf16, 16 sequences a micro-batch, no gradient
checkpointing. With bf16 weights it is faster, but an update of 1e-5 is below their spacing, so that most weights never
move: `dtype="bfloat16"` is there to show the speed of that.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import fastrl
from bench.step_child import StepRecord, child
from bench.workload import REWARDS, Workload, compute_dtype, model_folder
from fastrl.integrations import trl as fastrl_in_trl

NESTED = ("_generate", "_calculate_rewards", "_generate_and_score_completions", "training_step")


class Clock(TrainerCallback):
    """Times GRPOTrainer's own methods, and each step from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.records: list[StepRecord] = []
        self.tokens = 0.0
        self.mark = self.last_backward = self.step_seconds = 0.0

    def wrap(self, trainer: GRPOTrainer) -> None:
        """Puts a stopwatch around each method of `NESTED` of this one trainer."""
        for name in NESTED:
            setattr(trainer, name, self._timed(name, getattr(trainer, name)))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            self.last_backward = time.perf_counter()
            self.seconds[name] += self.last_backward - start
            return result

        return timed

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds["optimizer"] = now - self.last_backward  # clip, step, zero_grad
        self.step_seconds, self.mark = now - self.mark, now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "reward" not in logs:  # the summary at the end
            return
        seconds, self.seconds = self.seconds, Counter()
        rollout, reward, both = (seconds[name] for name in NESTED[:3])
        stages = {
            "rollout": rollout,
            "reward": reward,
            "score": both - rollout - reward,
            "train": seconds["training_step"] - both + seconds["optimizer"],
        }
        tokens, self.tokens = logs["num_tokens"] - self.tokens, logs["num_tokens"]
        length = logs["completions/mean_length"]
        equal = logs["frac_reward_zero_std"]
        self.records.append(StepRecord(self.step_seconds, stages, logs["reward"], length, round(tokens), equal))


def settings(workload: Workload, dtype: str) -> GRPOConfig:
    """One generation of all completions a step, one optimizer step on them."""
    sequences = workload.prompts * workload.samples
    micro_batch = min(workload.micro_batch, sequences)
    return GRPOConfig(
        output_dir=f"{workload.folder}/trl",
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=sequences // micro_batch,
        num_generations=workload.samples,
        max_completion_length=workload.max_new_tokens,
        temperature=1.0,
        beta=0.0,
        max_steps=workload.total_steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=compute_dtype(workload.trl_dtype or workload.dtype, workload.device) == torch.bfloat16,
        gradient_checkpointing=False,
        use_cpu=workload.device == "cpu",
        shuffle_dataset=False,
        model_init_kwargs={"dtype": dtype},
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=workload.seed,
    )


def run(workload: Workload, dtype: str = "float32", accelerate: str = "") -> list[StepRecord]:
    """Every step, warm-up included. `accelerate`: cpu, fastrl's CPU products; logps, its log-probabilities; loss, also
    its one-pass loss."""
    clock = Clock()
    trainer = GRPOTrainer(
        model=str(model_folder(workload.model)),
        reward_funcs=REWARDS[workload.reward],
        args=settings(workload, dtype),
        train_dataset=Dataset.from_list(workload.rows()),
        callbacks=[clock],
    )
    weights = next(trainer.model.parameters()).dtype
    assert weights == getattr(torch, dtype), weights
    if accelerate == "cpu":
        fastrl.accelerate_cpu(trainer.model)
    elif accelerate:
        fastrl_in_trl.accelerate(trainer, loss=accelerate == "loss")
    clock.wrap(trainer)
    trainer.train()
    return clock.records


if __name__ == "__main__":
    child(run)
