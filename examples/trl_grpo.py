"""TRL's GRPOTrainer on one-digit sums, with fastrl's log-probabilities and its one-pass loss."""

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from fastrl.integrations import trl
from fastrl.model.packaged import PACKAGED, converted

folder = str(converted(PACKAGED["smollm2-135m-instruct"]))
questions = [
    {"prompt": [{"role": "user", "content": f"What is {a} + {b}? Answer with the number only."}], "answer": str(a + b)}
    for a in range(10)
    for b in range(10)
]


def right(completions: list, answer: list[str], **_: object) -> list[float]:
    """1 where the answer is among the words of the completion."""
    return [float(one in text[0]["content"].split()) for text, one in zip(completions, answer, strict=True)]


arguments = GRPOConfig(
    "sums",
    max_steps=10,
    per_device_train_batch_size=16,
    num_generations=8,
    max_completion_length=16,
    learning_rate=1e-5,
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
trainer = GRPOTrainer(folder, right, args=arguments, train_dataset=Dataset.from_list(questions))
with trl.accelerate(trainer, loss=True, cpu=arguments.use_cpu):
    trainer.train()
