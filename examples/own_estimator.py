"""Advantages of your own: of each group, only the best completion is pushed up."""

import torch

from fastrl import Trainer


def best_of_group(rewards: torch.Tensor, *, group_ids: torch.Tensor) -> torch.Tensor:
    """1 for a group's first best completion if another one is worse, else 0."""
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        members = (group_ids == group).nonzero().squeeze(1)
        scored = rewards[members].nan_to_num(-torch.inf)
        if scored.max() > scored.min():
            advantages[members[scored.argmax()]] = 1.0
    return advantages


def short(completions: list[str], **_: object) -> list[float]:
    """The shorter, the better."""
    return [1.0 / (1 + len(text)) for text in completions]


rows = [{"prompt": f"Tell me one fact about the number {n}."} for n in range(200)]
Trainer("smollm2-135m-instruct", rows, rewards=short, estimator=best_of_group, steps=20).train()
