"""A language model in this process that answers chat messages: one loaded from disk, or the policy itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastrl import check
from fastrl.chat import render, text_ids
from fastrl.rollout.base import Sampler, SamplingParams
from fastrl.types import Group, Messages, Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrl.model.policy import Policy

OP = "judge"
AT_ONCE = 32768  # tokens of one call of the sampler, which bounds its key/value cache
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class LocalChat:
    """A policy and its sampler as a chat model. Weights are read at each call, so the policy judges as it is now."""

    policy: Policy
    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    layout: str  # of its forward passes
    room: float  # tokens that it has positions for
    name: str = "policy"

    def __str__(self) -> str:
        return self.name

    def replies(
        self,
        conversations: Sequence[Messages],
        samples: int,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> list[list[str] | None]:
        """`samples` replies to each conversation; None where a conversation leaves no room for one."""
        prompts = [self._ids(messages) for messages in conversations]
        fits = [place for place, ids in enumerate(prompts) if len(ids) + max_new_tokens <= self.room]
        found: list[list[str] | None] = [None] * len(prompts)
        for part in _parts(fits, [samples * (len(prompts[place]) + max_new_tokens) for place in fits]):
            params = SamplingParams(
                max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                stop_token_ids=self.stop_token_ids,
                seed=(seed + (part[0] << 32)) % 2**64,  # draws depend on the place in the call
                vocab_size=self.policy.head.vocab_size,
            )
            drawn = self.sampler.sample([prompts[place] for place in part], samples, params)
            for place, several in zip(part, drawn, strict=True):
                ids = [sample.token_ids for sample in several]
                found[place] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return found

    def option_probabilities(
        self, conversations: Sequence[Messages], options: Sequence[str]
    ) -> list[list[float] | None]:
        """The probability of each option as the reply, relative to the others; None where a conversation is too long or
        where options are the same tokens.

        p(option) is that of its tokens, less that of longer options that begin with them, such as 10 for 1.
        """
        import torch

        from fastrl.data.pack import pack

        groups, found = [], [None] * len(conversations)
        for place, messages in enumerate(conversations):
            text = self._text(messages)
            ids = self._tokens(text)
            samples = [self._option(text, ids, option) for option in options]
            differ = len({tuple(sample.token_ids) for sample in samples}) == len(options)
            if differ and len(ids) + max(len(sample.token_ids) for sample in samples) <= self.room:
                groups.append(Group(Prompt(place, messages, tuple(ids)), samples))
        if not groups:
            return found
        longest = max(
            sum(len(group.prompt.token_ids) + len(sample.token_ids) for sample in group.samples) for group in groups
        )
        device = self.policy.head.weight.device
        for batch in pack(groups, layout=self.layout, max_tokens=max(4096, longest), device=device, whole_groups=True):
            logps = self.policy.score(batch, temperature=1.0).double().cpu()
            sums = [float(part.sum()) for part in torch.split(logps, batch.cu_seqlens.diff().tolist())]
            for start in range(0, len(sums), len(options)):  # whole groups, so their samples are adjacent
                samples = batch.samples[start : start + len(options)]
                place = groups[int(batch.group_ids[start])].prompt.index
                found[place] = _exclusive(sums[start : start + len(options)], [one.token_ids for one in samples])
        return found

    def _text(self, messages: Messages) -> str:
        """The conversation up to where the reply begins; plain text for a tokenizer without a chat template."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        return render(self.tokenizer, messages, add_generation_prompt=True)

    def _tokens(self, text: str) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            return text_ids(self.tokenizer, text)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _ids(self, messages: Messages) -> list[int]:
        return self._tokens(self._text(messages))

    def _option(self, text: str, ids: list[int], option: str) -> Sample:
        """The option's tokens after the text."""
        whole = self._tokens(text + option)
        own = whole[len(ids) :] if whole[: len(ids)] == ids else []
        own = own or self.tokenizer(option, add_special_tokens=False)["input_ids"]
        return Sample(own, [0.0] * len(own), True, option, reward=0.0)


def local_chat(name: str, *, dtype: str = "auto", device: str = "auto") -> LocalChat:
    """A model that only judges: a folder, a hub id, or the name of a model that ships in a Python package.

    Raises:
        ValueError: there is no such model, dtype or device.
    """
    import torch

    from fastrl.model.attention import prepare_attention, slow_bfloat16
    from fastrl.model.load import load_model, stop_token_ids, vocab_size
    from fastrl.model.policy import Policy
    from fastrl.rollout.transformers_sampler import TransformersSampler

    check.choice(OP, "dtype", dtype, DTYPES)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if dtype == "auto":  # forward only: if attention is slow in bfloat16, so are the layers
        dtype = "float32" if torch.device(place).type == "cpu" and slow_bfloat16() else "bfloat16"
    model, tokenizer = load_model(name, getattr(torch, dtype))
    model.to(place).requires_grad_(False)
    layout = prepare_attention(model, "auto", dtype=getattr(torch, dtype))
    policy = Policy(model, vocab_size=vocab_size(model, tokenizer))
    stops, sampler = stop_token_ids(model, tokenizer), TransformersSampler(model, tokenizer)
    return LocalChat(policy, sampler, tokenizer, stops, layout, room_of(policy), name)


def room_of(policy: Policy) -> float:
    """The tokens that a model has positions for; infinite without a limit."""
    return getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def _parts(places: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """The places in order, cut so that no part but a single one exceeds `AT_ONCE` in size."""
    part, total = [], 0
    for place, size in zip(places, sizes, strict=True):
        if part and total + size > AT_ONCE:
            yield part
            part, total = [], 0
        part.append(place)
        total += size
    if part:
        yield part


def _exclusive(logps: Sequence[float], ids: Sequence[Sequence[int]]) -> list[float] | None:
    """Options' shares of probability, each without what belongs to longer options that begin with its tokens."""
    highest = max(logps)
    whole = [math.exp(logp - highest) for logp in logps]
    own = [
        share - sum(p for p, other in zip(whole, ids, strict=True) if len(other) > len(mine) and _begins(other, mine))
        for share, mine in zip(whole, ids, strict=True)
    ]
    own = [max(0.0, share) for share in own]  # rounding
    total = math.fsum(own)
    return [share / total for share in own] if total > 0 else None


def _begins(other: Sequence[int], mine: Sequence[int]) -> bool:
    return list(other[: len(mine)]) == list(mine)
