"""Supervised fine-tuning with transformers.Trainer, whose loss fastrl computes without logits."""

import torch
from transformers import DataCollatorForSeq2Seq, EvalPrediction, Trainer, TrainingArguments

from fastrl.integrations import hf
from fastrl.model.load import load_model

model, tokenizer = load_model("smollm2-135m-instruct", torch.float32)


def row(a: int, b: int) -> dict[str, list[int]]:
    """A question and its answer; only the answer has labels."""
    question, answer = tokenizer(f"What is {a} + {b}?").input_ids, tokenizer(f" {a + b}").input_ids
    ids = [*question, *answer, tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": [-100] * len(question) + ids[len(question) :]}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Evaluation still has logits: the share of right tokens."""
    right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(right[prediction.label_ids[:, 1:] != -100].mean())}


rows = [row(a, b) for a in range(10) for b in range(10)]
arguments = TrainingArguments("sums", max_steps=20, gradient_accumulation_steps=2, learning_rate=1e-5, report_to=[])
trainer = Trainer(
    model,
    arguments,
    train_dataset=rows[10:],
    eval_dataset=rows[:10],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    compute_metrics=accuracy,
)
with hf.accelerate(model, cpu=model.device.type == "cpu"):
    trainer.train()
    print(trainer.evaluate())
