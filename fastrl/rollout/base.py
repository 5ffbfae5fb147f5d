"""What a sampler is: prompts in, completions with their log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastrl.check import require
from fastrl.progress import Progress, unseen
from fastrl.types import Sample

_OP = "SamplingParams"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn: `p = softmax(z[:vocab_size] / temperature)`, cut to `top_k` tokens, then to `top_p` mass,
    renormalised.

    Raises:
        ValueError: a field is outside its range.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # keep the smallest set of most probable tokens whose mass reaches top_p; 1 = off
    top_k: int = 0  # keep the top_k most probable tokens; 0 = off
    stop_token_ids: tuple[int, ...] = ()  # sampling one of these ends the completion
    seed: int = 0
    vocab_size: int | None = None  # ids from here on are no tokens, and have probability 0; None: all are

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, _OP, "max_new_tokens", "at least 1", self.max_new_tokens)
        require(0.0 <= self.temperature < float("inf"), _OP, "temperature", "0 (greedy) or more", self.temperature)
        require(0.0 < self.top_p <= 1.0, _OP, "top_p", "a number in (0, 1]", self.top_p, "1.0 turns it off.")
        require(self.top_k >= 0, _OP, "top_k", "0 (off) or more", self.top_k)
        require(0 <= self.seed < 2**64, _OP, "seed", "an integer in [0, 2**64)", self.seed)
        positive = self.vocab_size is None or self.vocab_size >= 1
        require(positive, _OP, "vocab_size", "at least 1, or None", self.vocab_size)
        ids_ok = all(isinstance(token, int) and token >= 0 for token in self.stop_token_ids)
        require(ids_ok, _OP, "stop_token_ids", "non-negative token ids", self.stop_token_ids)


class Sampler(Protocol):
    """Anything that completes prompts under the current policy."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        params: SamplingParams,
        progress: Progress = unseen,
    ) -> list[list[Sample]]:
        """`num_samples` completions of each prompt's token ids: one inner list per prompt, `Sample.text` left empty.

        Args:
            progress: told of the tokens of a completion, before each; what it raises ends the call.
        """
        ...
