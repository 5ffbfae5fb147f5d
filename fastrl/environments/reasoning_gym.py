"""A reasoning-gym task in several turns: a wrong answer may be tried again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrl.rewards.extract import Extract
from fastrl.rewards.reasoning_gym import ReasoningGymReward
from fastrl.types import Messages

_FEEDBACK = "That is not right. Try again."


class ReasoningGymEnvironment:
    """Scores each turn with the task's scorer; an answer that scores below 1 gets the feedback and another turn.

    A turn's reward is its score less the best score before, or 0 if that is negative, so that the sum over turns is the
    best score.

    Args:
        feedback: what the user says after a wrong answer.
        extract, strict, allow_eval: as in the reward `reasoning_gym`.
    """

    def __init__(
        self,
        feedback: str = _FEEDBACK,
        extract: Extract = "answer_tag",
        strict: bool = False,
        allow_eval: bool = False,
    ) -> None:
        self.feedback = feedback
        self.score = ReasoningGymReward(extract, strict, allow_eval)
        self.row: dict[str, list[Any]] = {}
        self.best = 0.0

    def reset(self, row: Mapping[str, Any]) -> None:
        """Keeps the columns that the scorer reads."""
        self.row = {name: [row[name]] for name in ("entry", "task", "task_options")}
        self.best = 0.0

    def step(self, completion: str) -> tuple[Messages, float | None, bool]:
        """The feedback, the gain in score, and whether the answer is right."""
        score = self.score([completion], **self.row)[0]
        gained, self.best = max(score - self.best, 0.0), max(score, self.best)
        return [] if score >= 1.0 else [{"role": "user", "content": self.feedback}], gained, score >= 1.0
