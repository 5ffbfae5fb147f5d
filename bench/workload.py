"""The workload of the whole-step benchmark: the demo task, the same for every provider."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastrl.model.packaged import PACKAGED, converted
from fastrl.rewards.extract import completion_text, last_number


@dataclass(frozen=True)
class Workload:
    """The demo task: sums and differences of two one-digit numbers; GRPO without a KL term. Every provider gets it."""

    model: str = "smollm2-135m-instruct"
    algorithm: str = "grpo"  # or ppo: a critic and a reference of their own, two mini-batches
    prompts: int = 8
    samples: int = 8
    max_new_tokens: int = 32
    steps: int = 4  # measured, after `warm_up` more
    warm_up: int = 1
    micro_batch: int = 16  # sequences; fastrl's recipe counts tokens instead
    reward: str = "last_number"  # or alternating, see `REWARDS`
    dtype: str = ""  # the model computes in; "" is the recipe's for fastrl, and auto for the others
    trl_dtype: str = ""  # where TRL's is another
    seed: int = 0
    device: str = "cpu"
    folder: str = ""  # where the questions are and a provider may write

    @property
    def total_steps(self) -> int:
        """Steps run, warm-up included."""
        return self.steps + self.warm_up

    @property
    def questions(self) -> Path:
        """One JSON object with `prompt` and `answer` a line, in the order of use where the provider keeps it."""
        return Path(self.folder) / "questions.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """The questions that `write_questions` wrote."""
        return [json.loads(line) for line in self.questions.read_text().splitlines()]

    def encode(self) -> str:
        """JSON, the form in which a workload reaches a provider's process."""
        return json.dumps(asdict(self))


def model_folder(name: str) -> Path:
    """Where transformers loads the model from: a packaged one is converted on first use."""
    return converted(PACKAGED[name]) if name in PACKAGED else Path(name)


FEW_SHOT = "What is 4 + 3? The answer is 7.\nWhat is 9 - 2? The answer is 7.\nWhat is 5 + 6? The answer is 11.\n"


def write_questions(workload: Workload, *, chat: bool) -> None:
    """Distinct questions, as many as the steps use: chat messages, or few-shot text for a model without a template."""
    import reasoning_gym

    task = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    entries = reasoning_gym.create_dataset("chain_sum", size=2_000, seed=workload.seed, **task)
    distinct = list({entry["question"]: entry for entry in entries}.values())
    needed = workload.total_steps * workload.prompts
    if needed > len(distinct):
        raise ValueError(f"steps: expected at most {len(distinct)} questions in all, got {needed}. Use fewer steps.")
    chosen = random.Random(workload.seed).sample(distinct, needed)
    rows = [{"prompt": _prompt(entry, chat), "answer": entry["answer"]} for entry in chosen]
    workload.questions.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _prompt(entry: dict[str, Any], chat: bool) -> Any:
    if chat:
        return [{"role": "user", "content": entry["question"]}]
    sum_text = entry["metadata"]["expression"]
    return f"{FEW_SHOT}What is {sum_text}? The answer is"


def last_number_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the last number of a completion is the answer, else 0. TRL's signature, which is also fastrl's."""
    return [
        float(last_number(completion_text(completion)) == expected)
        for completion, expected in zip(completions, answer, strict=True)
    ]


def alternating_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """0, 1, 0, 1, ...: no prompt's rewards are equal, so that every completion is trained on by every provider."""
    return [float(place % 2) for place in range(len(completions))]


ALGORITHMS = ("grpo", "ppo")
DTYPES = ("auto", "bfloat16", "float32")


def compute_dtype(name: str, device: str) -> torch.dtype:
    """What a plain torch model computes in: "auto" or "" is the quicker of the two, bfloat16 where the hardware has it.

    Without such instructions a CPU widens every bfloat16 first, and torch's matmuls take ten times as long.
    """
    if name not in ("", "auto"):
        return getattr(torch, name)
    quick = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if quick else torch.float32


def half_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """As `alternating`, for every other group of 8; the others' rewards are equal, so that nothing is learned there."""
    return [float(place % 2) if place // 8 % 2 else 0.0 for place in range(len(completions))]


REWARDS = {"last_number": last_number_reward, "alternating": alternating_reward, "half": half_reward}
