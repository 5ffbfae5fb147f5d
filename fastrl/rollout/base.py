"""The sampler's interface: prompts in, completions with their log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastrl.check import require
from fastrl.progress import Progress, unseen
from fastrl.types import Sample

_OP = "SamplingParams"
SECOND_SEED = 1 << 48  # added to the seed for each further part of a completion; above steps, refills and evaluations


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn: `p = softmax(z[:vocab_size] / temperature)`, cut to `top_k` tokens, then to `top_p` mass,
    then by `min_p`, renormalised. `repetition_penalty` and `min_new_tokens` first change the logits `z`.

    transformers uses the same order. vLLM applies `min_p` before `top_k` and `top_p`, which differs if `top_p` is set
    too, because its mass then covers fewer tokens.

    Raises:
        ValueError: a field is outside its range.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # keep the smallest set of most probable tokens whose mass reaches top_p; 1 = off
    top_k: int = 0  # keep the top_k most probable tokens; 0 = off
    stop_token_ids: tuple[int, ...] = ()  # sampling one of these ends the completion
    seed: int = 0
    vocab_size: int | None = None  # ids from here on are not tokens and have probability 0; None: all ids are tokens
    min_p: float = 0.0  # keep tokens at least min_p times as probable as the most probable one; 0 = off
    repetition_penalty: float = 1.0  # makes tokens of the prompt and the completion less likely; 1 = off
    min_new_tokens: int = 0  # until then, stop tokens have probability 0 and stop strings are ignored
    stop_strings: tuple[str, ...] = ()  # the token that completes one of these in the text ends the completion
    # Number of each prompt's stream of random numbers; None: its place in the call. A part of the prompts, or what is
    # left of them in a later turn, thus draws what it would draw among all.
    places: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        distinct = self.places is None or len(set(self.places)) == len(self.places)
        require(distinct, _OP, "places", "a different number for each prompt", self.places)
        require(self.max_new_tokens >= 1, _OP, "max_new_tokens", "at least 1", self.max_new_tokens)
        require(0.0 <= self.temperature < float("inf"), _OP, "temperature", "0 (greedy) or more", self.temperature)
        require(0.0 < self.top_p <= 1.0, _OP, "top_p", "a number in (0, 1]", self.top_p, "1.0 turns it off.")
        require(self.top_k >= 0, _OP, "top_k", "0 (off) or more", self.top_k)
        require(0.0 <= self.min_p <= 1.0, _OP, "min_p", "a number in [0, 1]", self.min_p, "0.0 turns it off.")
        penalty, low = self.repetition_penalty, self.min_new_tokens
        require(0.0 < penalty < float("inf"), _OP, "repetition_penalty", "above 0", penalty, "1.0 turns it off.")
        expected = f"0 to max_new_tokens = {self.max_new_tokens}"
        require(0 <= low <= self.max_new_tokens, _OP, "min_new_tokens", expected, low)
        require(0 <= self.seed < 2**64, _OP, "seed", "an integer in [0, 2**64)", self.seed)
        positive = self.vocab_size is None or self.vocab_size >= 1
        require(positive, _OP, "vocab_size", "at least 1, or None", self.vocab_size)
        ids_ok = all(isinstance(token, int) and token >= 0 for token in self.stop_token_ids)
        require(ids_ok, _OP, "stop_token_ids", "non-negative token ids", self.stop_token_ids)
        texts_ok = isinstance(self.stop_strings, tuple) and all(self.stop_strings)
        require(texts_ok, _OP, "stop_strings", "a tuple of texts, none of them empty", repr(self.stop_strings))


class Sampler(Protocol):
    """Anything that completes prompts under the current policy."""

    version: int  # the number of updates behind the weights; whoever updates them sets it

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        params: SamplingParams,
        progress: Progress = unseen,
    ) -> list[list[Sample]]:
        """`num_samples` completions of each prompt's token ids: one inner list per prompt, `Sample.text` left empty.

        Args:
            progress: called before each token of the completions; an exception in it ends the call.
        """
        ...


def places_of(prompts: Sequence[Any], params: SamplingParams) -> Sequence[int]:
    """The number of each prompt's stream.

    Raises:
        ValueError: `params` has more or fewer of them than there are prompts.
    """
    if params.places is None:
        return range(len(prompts))
    require(len(params.places) == len(prompts), _OP, "places", f"{len(prompts)}, one per prompt", len(params.places))
    return params.places


def extend(sample: Sample, more: Sample, room: int) -> Sample:
    """Appends the first `room` tokens that the policy sampled next; returns `sample`, which has `own`."""
    sample.token_ids += more.token_ids[:room]
    sample.sampling_logps += more.sampling_logps[:room]
    sample.own += [True] * len(more.token_ids[:room])
    if more.versions is not None:
        sample.versions = (sample.versions or []) + more.versions[:room]
    if more.support is not None:
        sample.support = (sample.support or []) + more.support[:room]
    return sample


def insert(sample: Sample, ids: Sequence[int]) -> None:
    """Appends tokens that the policy did not write; `sample` has `own`."""
    sample.token_ids += ids
    sample.sampling_logps += [0.0] * len(ids)
    sample.own += [False] * len(ids)
    if sample.versions is not None:
        sample.versions += sample.versions[-1:] * len(ids)
    if sample.support is not None:
        sample.support += [[token] for token in ids]
