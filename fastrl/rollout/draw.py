"""Draw one token per row from logits, with one uniform number per row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F

from fastrl.check import require
from fastrl.rollout.base import SamplingParams

_BLOCK = 256  # tokens per block of the two-level cumulative sum
_SUPPORT_IDS = 1 << 25  # that a call may record: up to 1.3 GB of Python integers
_NUCLEUS_GUESS = 1024  # most nuclei fit in this many tokens, which avoids sorting the vocabulary


def uniforms(seed: int, streams: Iterable[tuple[int, int]], steps: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), one independent stream per (prompt index, sample index): `(rows, steps)` float64.

    Stream (i, j) is Philox-4x64 with key (seed, i * 2^32 + j) (Salmon et al. 2011, doi:10.1145/2063384.2063405): it
    depends neither on other streams nor on the number of steps.
    """
    rows = [np.random.Generator(np.random.Philox(key=[seed, (i << 32) | j])).random(steps) for i, j in streams]
    return torch.from_numpy(np.stack(rows))


def draw(logits: torch.Tensor, u: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token per row and give its log-probability under the distribution it was drawn from.

        p = softmax(z / T), zero outside the top_k / top_p / min_p set, renormalised;  logp = log p[token]
        T = 0: token = argmax z, and logp = log softmax(z)[token], the log-probability at temperature 1

    Args:
        logits: `(n, V)`, any float dtype; the arithmetic is float32.
        u: `(n,)` float64 in [0, 1), one per row; unused when greedy.
        params: temperature and truncation.

    Returns:
        token ids `(n,)` int64 and their log-probabilities `(n,)` float32.
    """
    return draw_weighted(logits, u, params)[:2]


def draw_weighted(
    logits: torch.Tensor, u: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`draw`, and the weights `(n, V)` that it drew by, zero outside the set; None when greedy."""
    z = logits.float()
    if params.temperature == 0.0:
        tokens = z.argmax(-1)
        return tokens, z.gather(-1, tokens[:, None])[:, 0] - z.logsumexp(-1), None
    z = z if params.temperature == 1.0 else z / params.temperature
    weights = truncate(z.softmax(-1), params.top_k, params.top_p, params.min_p)
    tokens, total = inverse_cdf(weights, u)
    return tokens, (weights.gather(-1, tokens[:, None])[:, 0] / total).log().float(), weights


class Support:
    """The ids that each draw chose among, collected step by step on the CPU.

    Four bytes per id until the end, then lists of Python integers, up to 40 bytes each: top_k=20 and 100,000 tokens
    make 80 MB. A nucleus of a flat distribution can hold most of the vocabulary, so what a call may record is bounded.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.total = 0
        self.first = 0  # the completion that is row 0 of what is decoded now

    @staticmethod
    def is_cut(params: SamplingParams) -> bool:
        """Whether tokens are drawn from a part of the vocabulary."""
        return params.temperature > 0.0 and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)

    def add(self, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """The next token's sets: the ids of positive weight `(n, V)`, drawn for the completions `rows` `(n,)`.

        Raises:
            ValueError: too many ids in total.
        """
        positive = weights > 0
        ids = positive.nonzero()[:, 1].int().cpu()
        self.total += len(ids)
        do = "Set top_k or lower top_p, sample fewer completions at a time, or turn record_support off."
        expected = f"at most {_SUPPORT_IDS} kept ids in a call"
        require(self.total <= _SUPPORT_IDS, "Support", "support", expected, f"{self.total} or more", do)
        self.steps.append((rows.cpu() + self.first, ids, positive.sum(-1).cpu()))

    def lists(self, lengths: list[int]) -> list[list[list[int]]]:
        """For each completion, for each of its first `lengths` tokens, the ids in ascending order."""
        found: list[list[list[int]]] = [[] for _ in lengths]
        for rows, ids, sizes in self.steps:
            for row, kept in zip(rows.tolist(), ids.split(sizes.tolist()), strict=True):
                if len(found[row]) < lengths[row]:
                    found[row].append(kept.tolist())
        return found


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits `(n, V)` in float32 with `seen` tokens `(n, V)` made less likely: positive logits divided by `penalty`,
    negative ones multiplied by it (Keskar et al. 2019, arXiv:1909.05858 section 4.1)."""
    z = logits.float()
    return torch.where(seen, torch.where(z > 0, z / penalty, z * penalty), z)


def truncate(weights: torch.Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> torch.Tensor:
    """Zero `weights` `(n, V)`, in place, outside the `top_k` largest, then outside the nucleus of mass `top_p`, then
    below `min_p` times the largest.

    Tokens tied with the last one kept are kept too. Nucleus: the smallest set of most probable tokens whose mass
    reaches `top_p` (Holtzman et al. 2020, arXiv:1904.09751), measured after top-k. Min-p: Nguyen et al. 2024,
    arXiv:2407.01082.
    """
    if 0 < top_k < weights.shape[-1]:
        last_kept = weights.topk(top_k).values[:, -1:]
        weights.masked_fill_(weights < last_kept, 0.0)
    if top_p < 1.0:
        weights.masked_fill_(weights < _nucleus_edge(weights, top_p), 0.0)
    if min_p > 0.0:
        weights.masked_fill_(weights < min_p * weights.amax(-1, keepdim=True), 0.0)
    return weights


def _nucleus_edge(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest weight inside each row's nucleus, `(n, 1)`."""
    goal = top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)
    vocabulary = weights.shape[-1]
    ordered = weights.topk(min(_NUCLEUS_GUESS, vocabulary)).values
    mass = ordered.cumsum(-1, dtype=torch.float64)
    if not bool((mass[:, -1:] >= goal).all()):
        ordered = weights.sort(descending=True).values
        mass = ordered.cumsum(-1, dtype=torch.float64)
    before_goal = (mass < goal).sum(-1, keepdim=True)
    return ordered.gather(-1, before_goal.clamp_(max=ordered.shape[-1] - 1))


def inverse_cdf(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token where the cumulative sum of `weights` first exceeds `u * total`, and the total.

    The sum runs over blocks of tokens, then inside one block, in float64: a float32 running sum over a vocabulary of
    262144 would round tokens away. A token of zero weight is never returned, for any `u` in [0, 1].

    Args:
        weights: `(n, V)` float32, non-negative, each row with at least one positive entry.
        u: `(n,)` float64.

    Returns:
        token ids `(n,)` int64 and totals `(n,)` float64.
    """
    tail = -weights.shape[-1] % _BLOCK
    blocks = (F.pad(weights, (0, tail)) if tail else weights).unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(-1).double()
    cdf = sums.cumsum(-1)
    total = cdf[:, -1:]
    target = u[:, None] * total
    block = _first_above(cdf, target)
    reached = sums.gather(-1, block)
    fraction = 1.0 - (cdf.gather(-1, block) - target) / reached
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(-1)
    within = _first_above(inside, fraction.clamp_(min=0.0) * inside[:, -1:])
    tokens = (block * _BLOCK + within).clamp_(max=weights.shape[-1] - 1)
    return tokens[:, 0], total[:, 0]


def _first_above(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """First index where `cdf > target`. The cdf has just risen there, so the entry is positive.

    A row of NaN has no such index and gets the last one; its total stays NaN.
    """
    last = cdf[:, -1:]
    below_last = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cdf, below_last, right=True).clamp_(max=cdf.shape[-1] - 1)
