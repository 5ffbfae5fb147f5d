"""`linear_logprob` over one shard of the vocabulary, and what the shards are together.

Shard r knows the logits of its own tokens: their log-sum-exp lse_r, log p(v | r), and the entropy H_r of p(. | r). The
softmax over all lse_r is p(r), so a row takes a few numbers from each shard:

    p_v = p(r) p(v | r),    logp = log p(y | r) + log p(r) in the shard r of the target y,
    H = sum_r p(r) H_r - sum_r p(r) log p(r),    log sum_v p_v^2 = logsumexp_r(2 log p(r) + log sum_v p(v | r)^2)
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from fastrl.kernels.linear_logprob import chunked
from fastrl.kernels.linear_logprob.chunked import Statistics
from fastrl.kernels.softmax_row import entropy_of, softmax_

TOP, LOG_TOTAL, LOGP, ENTROPY = range(4)  # rows of what a shard knows; with an entropy, its summaries come after


class Chunk(chunked.Chunk):
    """As `chunked.Chunk`, with one more column, of probability 0: the target of rows whose target is elsewhere.

    So the gradient at the target, which does not come from p, is written where nobody reads it. `known.lse` has three
    rows in `gradient`; the third is p(r), which makes p(v | r) the probability among all tokens.
    """

    columns = 1

    def finished(self, logits: torch.Tensor, summaries: torch.Tensor | None) -> torch.Tensor:
        """The finished logits of hidden W^T, with the slope of their cap and their summaries."""
        if summaries is not None and logits.shape[1] == 0:
            summaries.zero_()
            summaries = None
        z = super().finished(logits, summaries)
        self.slope = None if self.slope is None else pad(self.slope, (0, 1))
        # Finite, so that a shard whose logits are all -inf, or that has none, gives a log-sum-exp and not NaN.
        return pad(z, (0, 1), value=torch.finfo(z.dtype).min)

    def gradient(
        self,
        known: Statistics,
        grad_logps: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        rows: torch.Tensor | None = None,
        last: bool = True,
    ) -> torch.Tensor:
        """d hidden W^T (n, V), in `dtype`, of statistics of all shards."""
        self.p.mul_(known.lse[2].unsqueeze(-1))
        known = known._replace(lse=known.lse[:2])
        return super().gradient(known, grad_logps, grad_entropy, dtype, rows=rows, last=last)[:, :-1]


forward = partial(chunked.forward_in_chunks, Chunk)
backward = partial(chunked.backward_in_chunks, Chunk)


class Merged(NamedTuple):
    """What all shards together know of each row."""

    logps: torch.Tensor  # (n,)
    entropy: torch.Tensor  # (n,) or (0,)
    lse: torch.Tensor  # (3, n): the largest logit, the logarithm of what is left, and this shard's probability
    summaries: torch.Tensor  # (3, n) or (3, 0)


def merge(parts: torch.Tensor, owner: torch.Tensor, sizes: torch.Tensor, rank: int) -> Merged:
    """The statistics of all shards from those of each, added up in the order of the shards.

    Args:
        parts: (R, K, n) of R shards: K = 3 rows as named above, 4 with an entropy, 7 with summaries too.
        owner: (n,) int64, the shard of each row's target. sizes: (R,) tokens of each shard. rank: this shard.
    """
    known = parts.shape[1]
    dead = parts[:, TOP] == torch.finfo(parts.dtype).min
    tops = parts[:, TOP].masked_fill(dead, -torch.inf).T  # (n, R)
    top = tops.amax(-1)
    # Each log-sum-exp by its distance from the largest logit: the sum of its two parts, rounded, would lose digits.
    scores = (tops - top.unsqueeze(-1)).add_(parts[:, LOG_TOTAL].T)
    log_shares, lse = softmax_(scores, owner)
    shares = scores  # (n, R): p(r)
    own = parts.gather(0, owner.expand(1, known, -1)).squeeze(0)  # (K, n), as the target's shard has them
    entropy = parts.new_empty(0)
    if known > ENTROPY:
        entropy = entropy_of(shares) + (shares * parts[:, ENTROPY].T).sum(-1)
    summaries = parts.new_empty(3, 0)
    if known > ENTROPY + 1:
        squares, means, _ = parts[:, -3:].unbind(1)
        squares = squares.T.masked_fill(shares == 0, -torch.inf) + 2 * shares.log()
        mean = (means.T * sizes.to(parts.dtype)).sum(-1) / sizes.sum()
        first = own[-1] * (tops.argmax(-1) == owner)
        summaries = torch.stack((torch.logsumexp(squares, -1), mean, first))
    return Merged(own[LOGP] + log_shares, entropy, torch.stack((top, lse.sum(0), shares[:, rank])), summaries)
