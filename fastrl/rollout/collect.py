"""Prompts in, groups of decoded completions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from fastrl.progress import Progress, unseen
from fastrl.rollout.base import Sampler, SamplingParams
from fastrl.types import Group, Prompt


def collect(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    params: SamplingParams,
    progress: Progress = unseen,
) -> list[Group]:
    """`num_samples` completions of each prompt, decoded without special tokens.

    If `params` has no `vocab_size`, it covers the tokenizer's ids and the stop tokens.
    """
    if params.vocab_size is None:
        params = replace(params, vocab_size=1 + max(*tokenizer.get_vocab().values(), *params.stop_token_ids))
    samples = sampler.sample([prompt.token_ids for prompt in prompts], num_samples, params, progress)
    for group in samples:
        texts = tokenizer.batch_decode([sample.token_ids for sample in group], skip_special_tokens=True)
        for sample, text in zip(group, texts, strict=True):
            sample.text = text
    return [Group(prompt, group) for prompt, group in zip(prompts, samples, strict=True)]
