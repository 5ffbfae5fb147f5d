"""GRPO on a list of dicts, with a lambda as the reward."""

import random

from fastrl import Trainer

pairs = [(random.randint(0, 9), random.randint(0, 9)) for _ in range(500)]
rows = [{"prompt": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)} for a, b in pairs]
judge = lambda completions, answer, **_: [float(a in text.split()) for text, a in zip(completions, answer)]  # noqa: B905, E731
trainer = Trainer("smollm2-135m-instruct", rows, rewards=judge, algorithm="grpo", steps=20, optimizer={"lr": 1e-5})
print(trainer.train().status)
trainer.save("sums")
