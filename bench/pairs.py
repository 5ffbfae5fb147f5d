"""The workload of the DPO benchmark: pairs of a fixed length, the same for every provider."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.workload import model_folder


@dataclass(frozen=True)
class PairsWorkload:
    """DPO with beta 0.1 against the model itself; both sides of a pair have `tokens` tokens, half of them prompt."""

    model: str = "smollm2-135m-instruct"
    pairs: int = 16  # of a step
    tokens: int = 256
    steps: int = 2  # measured, after `warm_up` more
    warm_up: int = 1
    micro_batch: int = 4  # pairs; fastrl counts tokens instead
    max_tokens_per_microbatch: int = 2048
    seed: int = 0
    device: str = "cpu"
    folder: str = ""  # where the pairs are and a provider may write

    @property
    def total_steps(self) -> int:
        """Steps run, warm-up included."""
        return self.steps + self.warm_up

    @property
    def rows(self) -> Path:
        """One JSON object with `prompt`, `chosen` and `rejected` a line."""
        return Path(self.folder) / "pairs.jsonl"

    def read(self) -> list[dict[str, Any]]:
        """The rows that `write_pairs` wrote."""
        return [json.loads(line) for line in self.rows.read_text().splitlines()]

    def encode(self) -> str:
        """JSON, the form in which a workload reaches a provider's process."""
        return json.dumps(asdict(self))


def write_pairs(workload: PairsWorkload) -> None:
    """Random words that are one token each, so that every text has as many tokens as words.

    The tokenizer's end-of-text token takes the last place of an answer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(workload.model))
    texts = [tokenizer.decode([token]) for token in range(1000, 20000)]
    words = [text for text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    draw = random.Random(workload.seed)
    half = workload.tokens // 2

    def text(tokens: int) -> str:
        return "".join(draw.choices(words, k=tokens))

    rows = [
        {"prompt": text(half), "chosen": text(workload.tokens - half - 1), "rejected": text(workload.tokens - half - 1)}
        for _ in range(workload.pairs * workload.total_steps)
    ]
    lengths = {len(tokenizer(row["prompt"] + row["chosen"])["input_ids"]) for row in rows}
    if lengths != {workload.tokens - 1}:
        raise ValueError(f"tokens: expected texts of {workload.tokens - 1} tokens, got {sorted(lengths)}.")
    workload.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
