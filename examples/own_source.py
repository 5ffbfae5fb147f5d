"""A source of your own: groups that somebody else has sampled and judged, here a function."""

import random
from typing import Any

import torch

from fastrl import Trainer
from fastrl.data.preferences import load_preferences
from fastrl.model.load import load_model
from fastrl.types import Batch


class Service:
    """Asks for scored completions whenever the trainer wants some."""

    kind, replays = "rewarded", False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.asked = tokenizer, 0

    def next(self, learner: Any, watch: Any) -> Batch:
        """Eight questions with a right and a wrong answer each."""
        draw = random.Random(self.asked)
        self.asked += 1
        rows = []
        for a, b in [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(8)]:
            responses = [str(a + b), str(a + b + 1)]
            rows.append({"prompt": f"What is {a} + {b}?", "responses": responses, "rewards": [1.0, 0.0]})
        return Batch(load_preferences(rows, self.tokenizer, kind="rewarded"), seed=self.asked)

    def publish(self, learner: Any) -> None:
        """Here a service would get the new weights."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.asked = state["asked"]


model, tokenizer = load_model("smollm2-135m-instruct", torch.float32)
service = Service(tokenizer)
Trainer((model, tokenizer), service, algorithm="dpo", source="rollouts", steps=20, task={"held_out": 20}).train()
