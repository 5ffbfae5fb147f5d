"""A loss term of your own, added to a preset's: tokens that the policy is too sure of cost something."""

import torch

from fastrl import Trainer
from fastrl.types import MicroBatch


def overconfidence(logps: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """0.01 max(0, log p + 0.01): nothing below a probability of 99 %."""
    return 0.01 * (logps + 0.01).clamp(min=0.0)


def brief(completions: list[str], **_: object) -> list[float]:
    """Up to 30 words."""
    return [float(len(text.split()) <= 30) for text in completions]


def show(step: int, numbers: dict[str, float]) -> None:
    """Called after each step and each evaluation."""
    if "loss/overconfidence" in numbers:
        print(step, round(numbers["loss/overconfidence"], 4))


rows = [{"prompt": f"Ask me for {n} apples."} for n in range(2, 200)]
settings = {"algorithm": "dapo", "steps": 20, "optimizer": {"lr": 1e-5}}
Trainer("smollm2-135m-instruct", rows, rewards=brief, terms=[overconfidence], callbacks=[show], **settings).train()
