"""Samples from any transformers causal language model, using the very object that is being trained."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from fastrl.check import require
from fastrl.model.load import embedding_rows
from fastrl.progress import Progress, tracked, unseen
from fastrl.rollout.base import SamplingParams, places_of
from fastrl.rollout.cache import DECODE_ATTENTION, RolloutCache, decode_attention, passed_as
from fastrl.rollout.draw import Support, draw, draw_weighted, penalise, uniforms
from fastrl.rollout.prepack import prepacked
from fastrl.rollout.stop_strings import StopStrings
from fastrl.types import Sample

AttentionInterface.register(DECODE_ATTENTION, decode_attention)

_OP = "TransformersSampler"
_PREFILL_TOKENS = 8192  # of one prefill batch, padding included


@dataclass
class _Rows:
    """The rows still being decoded."""

    index: torch.Tensor  # (n,) int64, the completion of each row
    position: torch.Tensor  # (n,) int64, prompt length: the position of the first new token
    mask: torch.Tensor | None  # (n, 1, 1, max_len) additive; None when no row is padded
    done: torch.Tensor  # (n,) bool, a stop token was sampled or a stop string completed
    seen: torch.Tensor | None  # (n, V) bool, the tokens of prompt and completion; None if not needed

    def keep(self, rows: torch.Tensor) -> _Rows:
        mask, seen = (None if one is None else one[rows] for one in (self.mask, self.seen))
        return _Rows(self.index[rows], self.position[rows], mask, self.done[rows], seen)

    def logits(self, logits: torch.Tensor, step: int, stop: torch.Tensor, params: SamplingParams) -> torch.Tensor:
        """The logits to draw the next tokens from, given the model's."""
        logits = logits[:, : params.vocab_size]
        if self.seen is not None:
            logits = penalise(logits, self.seen[:, : logits.shape[1]], params.repetition_penalty)
        if step < params.min_new_tokens:
            logits = logits.index_fill(1, stop, float("-inf"))
        return logits


class TransformersSampler:
    """A sampler with a static key/value cache that prefills nothing twice and drops finished rows.

    Of the completions decoded together, each distinct prompt is prefilled once, and so is a prefix that all share.

    `Sample.sampling_logps` are under the distribution that was sampled from, with temperature, penalty and truncation
    applied; when greedy (temperature 0) they are the log-probabilities at temperature 1. The sample includes the stop
    token, or the whole token that completes a stop string. Draws depend only on (seed, prompt index, sample index),
    never on the rest of the batch. Nothing is kept between calls, so the weights are always current.
    `Sample.versions` has `version`, which counts the updates behind the weights, as of each token.

    Args:
        model: a transformers causal LM with pluggable attention; its mode and settings are restored after a call.
        tokenizer: decodes completions to search for `SamplingParams.stop_strings`; not needed without them.
        compact_after: drop finished rows from the batch once they have wasted the work of this many whole steps
            (0: at once; infinity: never). Moving the cache of the live rows costs about a quarter of a step.
        prepack: on a CPU, compute with packed copies of bfloat16 weights during a call; see `prepacked`.
        max_num_seqs: completions decoded at the same time, which bounds the key/value cache; 0 is all of them.
        record_support: fill in `Sample.support`, the ids that top_k, top_p and min_p left of each token's vocabulary.
            `linear_logprob(support=...)` scores tokens under the distribution that they were drawn from. Costs up to 40
            bytes per id, and on an accelerator a wait per token. Nothing to record without truncation or when greedy.

    Raises:
        ValueError: the model's attention cannot be replaced, or `max_num_seqs` is negative.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        compact_after: float = 0.25,
        prepack: bool = True,
        max_num_seqs: int = 0,
        record_support: bool = False,
    ) -> None:
        pluggable = getattr(model, "_supports_attention_backend", False)
        require(pluggable, _OP, "model", "a causal LM with pluggable attention", type(model).__name__)
        require(max_num_seqs >= 0, _OP, "max_num_seqs", "at least 0", max_num_seqs)
        self.model = model
        self.tokenizer = tokenizer
        self.compact_after = compact_after
        self.prepack = prepack
        self.max_num_seqs = max_num_seqs
        self.record_support = record_support
        self.version = 0

    @torch.no_grad()
    def update_weights(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Copies new weights into the model's parameters of these names, also between two tokens of a call: the rest of
        its completions is drawn under them, from the keys and values that the old weights computed, as in PipelineRL,
        arXiv:2509.19128.

        Args:
            version: the number of updates behind the weights; `Sample.versions` has it for each token.

        Raises:
            ValueError: the model has no such parameter, or one of another shape.
        """
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            fits = name in parameters and parameters[name].shape == tensor.shape
            require(fits, _OP, name, "a parameter of the model", f"a tensor of shape {tuple(tensor.shape)}")
            parameters[name].copy_(tensor)
        self.version = version

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        params: SamplingParams,
        progress: Progress = unseen,
    ) -> list[list[Sample]]:
        """Draws `num_samples` completions of each prompt; see `Sampler.sample`.

        Raises:
            ValueError: no prompts, an empty prompt, a prompt with no room for `max_new_tokens`, stop strings without
                a tokenizer, or `record_support` and sets too large to keep.
            FloatingPointError: the model's logits are not finite.
        """
        self._check(prompts, num_samples, params)
        streams = [(i, j) for i in places_of(prompts, params) for j in range(num_samples)]
        asked = [tuple(prompt) for prompt in prompts for _ in range(num_samples)]
        support = Support() if self.record_support and Support.is_cut(params) else None
        samples: list[Sample] = []
        with _eval_mode(self.model), prepacked(self.model) if self.prepack else nullcontext():
            for part in _parts(len(asked), self.max_num_seqs):
                u = uniforms(params.seed, streams[part], params.max_new_tokens)
                if support is not None:
                    support.first = part.start
                share = _share(progress, part, len(asked))
                tokens, logps, ends, versions = self._complete(asked[part], params, u, support, share)
                _require_finite(logps)
                samples += _collect(tokens, logps, params.stop_token_ids, ends, versions)
        if support is not None:
            sets = support.lists([len(sample.token_ids) for sample in samples])
            samples = [replace(sample, support=kept) for sample, kept in zip(samples, sets, strict=True)]
        return [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]

    def _check(self, prompts: Sequence[Sequence[int]], num_samples: int, params: SamplingParams) -> None:
        require(len(prompts) > 0, _OP, "prompts", "at least one prompt", "none")
        require(num_samples >= 1, _OP, "num_samples", "at least 1", num_samples)
        readable = self.tokenizer is not None or not params.stop_strings
        require(readable, _OP, "tokenizer", "one, to read stop_strings with", "none")
        lengths = [len(prompt) for prompt in prompts]
        empty = f"an empty prompt at index {lengths.index(0)}" if 0 in lengths else ""
        require(not empty, _OP, "prompts", "at least one token in each", empty)
        vocabulary = embedding_rows(self.model)
        low, high = min(map(min, prompts)), max(map(max, prompts))
        require(0 <= low <= high < vocabulary, _OP, "prompts", f"token ids in [0, {vocabulary})", f"[{low}, {high}]")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        require(
            limit is None or max(lengths) + params.max_new_tokens <= limit,
            _OP,
            "prompts",
            f"prompt + max_new_tokens within the model's {limit} positions",
            f"{max(lengths)} + {params.max_new_tokens}",
            "Shorten the prompts or lower max_new_tokens.",
        )

    def _complete(
        self,
        asked: Sequence[tuple[int, ...]],
        params: SamplingParams,
        u: torch.Tensor,
        support: Support | None,
        progress: Progress,
    ) -> tuple[torch.Tensor, torch.Tensor, Mapping[int, int], list[int]]:
        """One completion of each of `asked`, prompts that may repeat, decoded together.

        Token ids and log-probabilities `(completions, max_new_tokens)`, the lengths of completions that a stop string
        ended, and the weights' version at each step; values after a stop are meaningless.
        """
        began = self.version  # a prefill that saw an update counts as the older weights'
        distinct = list(dict.fromkeys(asked))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        source = torch.tensor([place[prompt] for prompt in asked])
        cache, logits = self._prefill(distinct, source.to(self.model.device), params.max_new_tokens, progress)
        lengths = torch.tensor([len(prompt) for prompt in distinct])[source].to(logits.device)
        layer = cache.layers[0]
        rows = _first_rows(lengths, layer.get_max_length(), layer.get_seq_length(), layer.keys.dtype)
        if params.repetition_penalty != 1.0:
            rows.seen = _tokens_in(distinct, logits)[source]
        return self._decode(cache, logits, rows, params, u.to(logits.device), support, progress, began)

    def _prefill(
        self, prompts: list[tuple[int, ...]], source: torch.Tensor, max_new_tokens: int, progress: Progress
    ) -> tuple[RolloutCache, torch.Tensor]:
        """Runs each prompt once; row `i` of the cache and of the next-token logits belongs to `prompts[source[i]]`."""
        longest = max(map(len, prompts))
        cache = RolloutCache(len(source), longest + max_new_tokens, cursor=longest)
        shared = self._run_prefix(prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=source.device)
        prefix = (longest - lengths)[:, None] + torch.arange(shared.get_seq_length(), device=source.device)
        logits = None
        for batch in _batches_by_length(prompts, _PREFILL_TOKENS):
            progress(0, max_new_tokens)
            last, prefilled = self._forward_prompts([prompts[i] for i in batch], shared)
            members = torch.tensor(batch, device=source.device)
            rows, local = (source[:, None] == members).nonzero(as_tuple=True)
            cache.fill(prefilled, rows, local, prefix[source[rows]])
            logits = last.new_empty(len(source), last.shape[-1]) if logits is None else logits
            logits[rows] = last[local]
        return cache, logits

    def _run_prefix(self, prompts: list[tuple[int, ...]]) -> DynamicCache:
        """Keys and values `(1, ...)` of the prefix that all prompts share, such as a system prompt."""
        cache = DynamicCache(config=self.model.config)
        # A sliding-window layer that forgets old tokens could not pass on the whole prefix.
        remembered = [layer.sliding_window for layer in cache.layers if layer.is_sliding]
        common = _common_prefix(prompts) if len(prompts) > 1 else ()
        common = common[: min(map(len, prompts)) - 1]  # leaves each prompt a token to predict from
        if common and max(map(len, prompts)) < min(remembered, default=math.inf):
            self.model(
                input_ids=torch.tensor([common], device=self.model.device),
                use_cache=True,
                logits_to_keep=1,
                **passed_as(self.model, cache),
            )
        return cache

    def _forward_prompts(
        self, prompts: list[tuple[int, ...]], prefix: DynamicCache
    ) -> tuple[torch.Tensor, DynamicCache]:
        """One forward pass over the left-padded prompts after the prefix; last logits `(prompts, V)` and the cache."""
        shared, longest = prefix.get_seq_length(), max(map(len, prompts))
        # Any id works as padding: the mask comes from lengths.
        ids = [(0,) * (longest - len(prompt)) + prompt[shared:] for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.model.device)
        position = torch.arange(shared, longest, device=self.model.device) - (longest - lengths)[:, None]
        mask = F.pad((position >= shared).long(), (shared, 0), value=1)
        cache = DynamicCache(config=self.model.config)
        for i, layer in enumerate(prefix.layers if shared else ()):
            states = (x.expand(len(prompts), -1, -1, -1) for x in (layer.keys, layer.values))
            cache.update(*states, i)
        out = self.model(
            input_ids=torch.tensor(ids, device=self.model.device),
            attention_mask=mask,
            position_ids=position.clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **passed_as(self.model, cache),
        )
        return out.logits[:, -1], cache

    def _decode(
        self,
        cache: RolloutCache,
        logits: torch.Tensor,
        rows: _Rows,
        params: SamplingParams,
        u: torch.Tensor,
        support: Support | None,
        progress: Progress,
        version: int,
    ) -> tuple[torch.Tensor, torch.Tensor, Mapping[int, int], list[int]]:
        """Draws tokens, drops finished rows when it pays, and feeds the tokens back; one result column per step."""
        tokens = torch.zeros(u.shape, dtype=torch.int64, device=u.device)
        logps = torch.zeros(u.shape, dtype=torch.float32, device=u.device)
        vocabulary = logits[:, : params.vocab_size].shape[1]
        stop = [token for token in params.stop_token_ids if token < vocabulary]
        stop = torch.tensor(stop, dtype=torch.int64, device=u.device)
        texts = StopStrings(params.stop_strings, self.tokenizer, len(u), params.min_new_tokens)
        every = _steps_between_checks(u.device)
        versions = [version]
        wasted = 0.0  # steps' worth of work spent on finished rows since the last compaction
        for step in tracked(range(params.max_new_tokens), progress):
            logits = rows.logits(logits, step, stop, params)
            if support is None:
                drawn, logps[rows.index, step] = draw(logits, u[rows.index, step], params)
            else:
                drawn, logps[rows.index, step], weights = draw_weighted(logits, u[rows.index, step], params)
                support.add(rows.index, weights)
            tokens[rows.index, step] = drawn
            rows.done |= torch.isin(drawn, stop)
            last, checks = step + 1 == params.max_new_tokens, (step + 1) % every == 0
            if params.stop_strings and (last or checks):
                _read(texts, rows, tokens[:, step // every * every : step + 1])
            if last:
                break
            if rows.seen is not None:
                rows.seen.scatter_(1, drawn[:, None], True)
            if checks:
                live = int((~rows.done).sum())
                if live == 0:
                    break
                wasted += every * (len(rows.done) - live) / len(rows.done)
                if wasted > self.compact_after:
                    kept = (~rows.done).nonzero()[:, 0]
                    rows, drawn, wasted = rows.keep(kept), drawn[kept], 0.0
                    cache.keep(kept)
            versions.append(self.version)
            logits = self._step(cache, rows, drawn, step)
        return tokens, logps, texts.ends, versions

    def _step(self, cache: RolloutCache, rows: _Rows, tokens: torch.Tensor, step: int) -> torch.Tensor:
        """Feeds one token per row; returns next-token logits `(rows, V)`."""
        with _attention(self.model, DECODE_ATTENTION):
            out = self.model(
                input_ids=tokens[:, None],
                attention_mask=None if rows.mask is None else rows.mask[..., : cache.get_seq_length() + 1],
                position_ids=(rows.position + step)[:, None],
                use_cache=True,
                logits_to_keep=1,
                **passed_as(self.model, cache),
            )
        return out.logits[:, -1]


def _steps_between_checks(device: torch.device) -> int:
    """How often to check for finished rows, which has to wait for an accelerator."""
    return 1 if device.type == "cpu" else 8


def _first_rows(lengths: torch.Tensor, max_len: int, cursor: int, dtype: torch.dtype) -> _Rows:
    """All rows, none of them done, with the mask of their left padding."""
    mask = None
    if bool((lengths < cursor).any()):
        padding = torch.arange(max_len, device=lengths.device) < (cursor - lengths)[:, None]
        mask = torch.zeros(padding.shape, dtype=dtype, device=lengths.device).masked_fill_(padding, float("-inf"))
        mask = mask[:, None, None]
    index = torch.arange(len(lengths), device=lengths.device)
    return _Rows(index, lengths, mask, torch.zeros_like(index, dtype=torch.bool), None)


def _tokens_in(prompts: Sequence[tuple[int, ...]], logits: torch.Tensor) -> torch.Tensor:
    """Which tokens each prompt contains, `(prompts, V)` bool, ignoring ids that the head has no logit for."""
    found = torch.zeros(len(prompts), logits.shape[1], dtype=torch.bool, device=logits.device)
    for row, prompt in zip(found, prompts, strict=True):
        row[[token for token in set(prompt) if token < logits.shape[1]]] = True
    return found


def _read(texts: StopStrings, rows: _Rows, tokens: torch.Tensor) -> None:
    """Marks rows as done if the newest `tokens` `(completions, steps)` complete a stop string in their text."""
    index = rows.index.tolist()
    ended = [texts.read(i, ids) for i, ids in zip(index, tokens[rows.index].tolist(), strict=True)]
    rows.done |= torch.tensor(ended, device=rows.done.device)


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The prefix that all prompts share, which is the one that the first and last in sorted order share."""
    first, last = min(prompts), max(prompts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _batches_by_length(prompts: list[tuple[int, ...]], budget: int) -> Iterator[list[int]]:
    """Indices of prompts, longest first, in batches of at most `budget` tokens, padding included."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        size = max(1, budget // len(prompts[order[0]]))
        yield order[:size]
        order = order[size:]


def _require_finite(logps: torch.Tensor) -> None:
    if not bool(logps.isfinite().all()):
        raise FloatingPointError(f"{_OP}: model: expected finite logits, got NaN or infinity. Check the weights.")


def _parts(total: int, at_once: int) -> list[slice]:
    """As few parts as hold at most `at_once` each, of nearly equal size; one part if it is 0."""
    number = -(-total // at_once) if at_once else 1
    ends = [total * i // number for i in range(number + 1)]
    return [slice(*ends[i : i + 2]) for i in range(number)]


def _share(progress: Progress, part: slice, total: int) -> Progress:
    """Reports the tokens of one part as a share of those of all completions."""

    def report(done: int, of: int) -> None:
        progress((part.start * of + done * (part.stop - part.start)) // total, of)

    return report


def _collect(
    tokens: torch.Tensor,
    logps: torch.Tensor,
    stop_token_ids: tuple[int, ...],
    ends: Mapping[int, int],
    versions: list[int],
) -> list[Sample]:
    """Cuts each completion after its first stop token, or earlier if a stop string `ends` it."""
    stop = frozenset(stop_token_ids)
    samples = []
    for index, (ids, values) in enumerate(zip(tokens.tolist(), logps.tolist(), strict=True)):
        end = next((i + 1 for i, token in enumerate(ids[: ends.get(index)]) if token in stop), ends.get(index))
        by_step = versions[: len(ids[:end])]
        samples.append(Sample(ids[:end], values[:end], finished=end is not None, versions=by_step))
    return samples


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Generator[None]:
    """Evaluation mode inside the block; restores each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Generator[None]:
    """Another registered attention inside the block; restores the model's own afterwards."""
    config = model.config.get_text_config(decoder=True)
    previous = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = previous
