"""Rewards of your own: a function of completions and columns, several of them weighted, and an async one."""

import re
from collections.abc import Callable

from fastrl import Trainer


def right(completions: list[str], answer: list[str], **_: object) -> list[float | None]:
    """1 if the last number is the answer; None, not applicable, for a row without one."""
    last = [re.findall(r"-?\d+", text)[-1:] for text in completions]
    return [None if wanted is None else float(number == [wanted]) for number, wanted in zip(last, answer, strict=True)]


def brief(completions: list[str], log_metric: Callable[..., None], **_: object) -> list[float]:
    """1 for up to ten words; the mean length goes to the log."""
    words = [len(text.split()) for text in completions]
    log_metric("words", sum(words) / len(words))
    return [float(count <= 10) for count in words]


async def polite(completions: list[str], **_: object) -> list[float]:
    """Async, as a judge behind a network would be."""
    return [float("please" in text.lower()) for text in completions]


rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(10) for b in range(10)]
rows.append({"prompt": "Say hello.", "answer": None})
rewards = [(right, 1.0), (brief, 0.2), (polite, 0.1)]
Trainer("smollm2-135m-instruct", rows, rewards=rewards, algorithm="grpo", steps=20, optimizer={"lr": 1e-5}).train()
