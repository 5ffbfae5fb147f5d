"""A loss term of your own, added to a preset's: tokens that the policy is too sure of cost something."""

import torch

from fastrl import Trainer
from fastrl.types import MicroBatch


def overconfidence(logps: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """0.01 max(0, log p + 0.01): nothing below a probability of 99 %."""
    return 0.01 * (logps + 0.01).clamp(min=0.0)


async def polite(completions: list[str], **_: object) -> list[float]:
    """A reward may be async: a judge behind a network, for instance."""
    return [float("please" in text.lower()) for text in completions]


def brief(completions: list[str], **_: object) -> list[float]:
    """Up to 30 words."""
    return [float(len(text.split()) <= 30) for text in completions]


def show(step: int, numbers: dict[str, float]) -> None:
    """Called after each step and each evaluation."""
    if "loss/overconfidence" in numbers:
        print(step, round(numbers["loss/overconfidence"], 4))


rows = [{"prompt": f"Ask me for {n} apples."} for n in range(2, 200)]
rewards = [(polite, 1.0), (brief, 0.2)]
Trainer("smollm2-135m-instruct", rows, rewards=rewards, algorithm="dapo", terms=[overconfidence], callbacks=[show],
        steps=20).train()  # fmt: skip
