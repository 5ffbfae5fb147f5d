"""A source of your own: groups that somebody else has sampled and judged, here a function."""

import random

import torch

from fastrl import Trainer
from fastrl.data.preferences import load_preferences
from fastrl.model.load import load_model
from fastrl.types import Batch

model, tokenizer = load_model("smollm2-135m-instruct", torch.float32)


class Service:
    """Asks for scored completions whenever the trainer wants some."""

    kind, replays, asked = "rewarded", False, 0

    def next(self, learner: object, watch: object) -> Batch:
        """Eight questions with a right and a wrong answer each."""
        self.asked += 1
        draw, rows = random.Random(self.asked), []
        for a, b in [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(8)]:
            responses = [str(a + b), str(a + b + 1)]
            rows.append({"prompt": f"What is {a} + {b}?", "responses": responses, "rewards": [1.0, 0.0]})
        return Batch(load_preferences(rows, tokenizer, kind="rewarded"), seed=self.asked)

    def publish(self, learner: object) -> None:
        """Here a service would get the new weights."""

    def state_dict(self) -> dict:
        return {"asked": self.asked}  # what a checkpoint keeps

    def load_state_dict(self, state: dict) -> None:
        self.asked = state["asked"]


Trainer((model, tokenizer), Service(), algorithm="dpo", source="rollouts", steps=20, task={"held_out": 20}).train()
