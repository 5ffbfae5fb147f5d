"""A reasoning-gym task's score of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastrl import check
from fastrl.rewards.extract import EXTRACT, Extract, completion_text

# Tasks whose scorers pass the answer to Python's `eval`, most of them through sympy's parser.
EVALUATING = frozenset(
    (
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    )
)


@dataclass(frozen=True)
class ReasoningGymReward:
    """The task's own score in [0, 1]; 0 for a completion without an answer.

    Reads the columns `entry`, `task` and `task_options`, which `fastrl.data.load_prompts` writes for such tasks.

    Args:
        extract: where in a completion the answer is.
        strict: turn every score below 1 into 0. Many tasks give partial scores; `chain_sum`, for example, rewards any
            answer that contains the right digits.
        allow_eval: allow scorers that run the answer as Python code, which a model can write freely; refused by
            default.
    """

    extract: Extract = "answer_tag"
    strict: bool = False
    allow_eval: bool = False

    __name__ = "reasoning_gym"

    def __post_init__(self) -> None:
        check.choice("reasoning_gym", "extract", self.extract, EXTRACT)

    def __call__(
        self,
        completions: Sequence[Any],
        *,
        entry: Sequence[dict[str, Any]],
        task: Sequence[str],
        task_options: Sequence[dict[str, Any]],
        **_: Any,
    ) -> list[float]:
        """One score per completion."""
        return [
            self._score(completion_text(completion), *about)
            for completion, about in zip(completions, zip(entry, task, task_options, strict=True), strict=True)
        ]

    def _score(self, text: str, entry: dict[str, Any], task: str, options: dict[str, Any]) -> float:
        check.require(
            self.allow_eval or task not in EVALUATING,
            "reasoning_gym",
            "task",
            "one whose scorer only reads the answer",
            f"{task}, whose scorer runs it as Python code",
            "Set allow_eval only where completions can do no harm.",
        )
        answer = EXTRACT[self.extract](text)
        if answer is None:
            return 0.0
        score = float(_scorer(task, json.dumps(options, sort_keys=True))(answer, entry))
        return score if score >= 1.0 or not self.strict else 0.0


@cache
def _scorer(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(options)).score_answer
