"""`linear_policy_loss` in one pass over chunks of rows: the gradient is formed while the probabilities are at hand.

Three matmuls with a trainable head (logits, d hidden, d weight), two with a frozen one, and the last two only over the
rows whose gradient is not zero.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch

from fastrl.kernels.inputs import HeadInputs, LossTokens, Needs
from fastrl.kernels.linear_logprob import chunked as linear_logprob
from fastrl.kernels.linear_logprob.chunked import Head, Selection, Statistics, at_rows, row_chunks
from fastrl.kernels.linear_policy_loss.reference import zero_advantage_rows
from fastrl.kernels.policy_loss import reference as policy_loss
from fastrl.kernels.softmax_row import check_targets
from fastrl.spec import PolicyLoss


class Chunk(linear_logprob.Chunk):
    """As `linear_logprob.chunked.Chunk`, and the derivative of the loss by what was read."""

    def read_with_loss(
        self,
        logits: torch.Tensor,
        entropy: bool,
        spec: PolicyLoss,
        tokens: LossTokens,
        rows: torch.Tensor,
        poisoned: torch.Tensor | None,
    ) -> tuple[Statistics, torch.Tensor, torch.Tensor]:
        """Statistics of hidden W^T (n, V), and d loss / d logps and d entropy (n,).

        The chunk has these `rows` of `tokens` and of `poisoned`, whose log-probability is NaN.
        """
        known = self.read(logits, entropy)
        if poisoned is not None:
            known.logps.masked_fill_(poisoned[rows], float("nan"))
        own = LossTokens(*(None if x is None else x[rows] for x in tokens))
        _, dlogps, dentropy, _ = policy_loss.forward(known.logps, own, known.entropy, None, 0, spec)
        return known, dlogps, dentropy


def forward_in_chunks(
    make: type[Chunk],
    token_loss: ModuleType,
    inputs: HeadInputs,
    tokens: LossTokens,
    main_grad: torch.Tensor | None,
    *,
    spec: PolicyLoss,
    entropy: bool,
    logit_bytes: int,
    needs: Needs,
) -> tuple[torch.Tensor, ...]:
    """As `reference.forward`; `token_loss` is a backend of `policy_loss`.

    On a GPU the host waits for the number of rows that count, and for that of each chunk's rows with a gradient. With
    16-bit heads only the first of each finds the device without work: the others have the products of the chunk before.
    """
    hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index = inputs
    needs_hidden, needs_weight, needs_bias = needs
    head = Head(weight, main_grad)
    count, vocabulary = len(targets), weight.shape[0]
    live, silent = tokens.mask & (targets != ignore_index), zero_advantage_rows(tokens, spec)
    chosen = Selection(live & silent, live & ~silent)
    logps = hidden.new_zeros(count, dtype=head.dtype)
    entropies = hidden.new_zeros(count if entropy else 0, dtype=head.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else (0,), dtype=head.dtype)
    tokens = tokens._replace(mask=live)
    safe, poisoned = check_targets(targets.masked_fill(~live, ignore_index), vocabulary, ignore_index)

    def multiply(dz: torch.Tensor, rows: torch.Tensor) -> None:
        if needs_hidden:
            grad_hidden[rows] = head.grad_hidden(dz)
        if needs_weight:
            head.accumulate_weight(dz, hidden[rows])
        if needs_bias:
            head.accumulate_bias(dz)

    # Rows known to have no gradient come in chunks of their own: those of the others are full, and pass over d weight
    # less often.
    without, with_gradient = (row_chunks(rows, vocabulary, logps.element_size()) for rows in chosen.rows())
    waiting = None  # the last chunk's dz and rows: their products are launched before this chunk's count is waited for
    for rows, derive in [*((rows, False) for rows in without), *((rows, any(needs)) for rows in with_gradient)]:
        chunk = make(safe[rows], at_rows(temperature, rows, head.dtype), bias, softcap, logit_scale)
        logits = head.logits(hidden[rows])
        if derive:
            known, dlogps, dentropy = chunk.read_with_loss(logits, entropy, spec, tokens, rows, poisoned)
        else:
            known = chunk.read(logits, entropy)
        del logits  # the chunk has it
        logps[rows] = known.logps
        if entropy:
            entropies[rows] = known.entropy
        if not derive:
            continue
        active = Selection((dlogps != 0) | (dentropy != 0) if spec.needs_entropy else dlogps != 0)
        if waiting is not None:
            multiply(*waiting)
            waiting = None
        (within,) = active.rows()
        if len(within) == 0:
            continue
        some = within if len(within) < len(rows) else None
        if some is not None:
            rows, known, dlogps, dentropy = rows[some], known.at(some), dlogps[some], dentropy[some]
        # No name for dz: it would live on beside the next one.
        waiting = (
            chunk.gradient(known, dlogps, dentropy if spec.needs_entropy else None, head.dz_dtype, rows=some),
            rows,
        )
        if not head.mixed:  # nothing to wait for, or dz is in the logits' memory, which the next chunk needs
            multiply(*waiting)
            waiting = None
    if waiting is not None:
        multiply(*waiting)
    if poisoned is not None:
        logps.masked_fill_(poisoned, float("nan"))
    loss, _, _, metrics = token_loss.forward(logps, tokens, entropies if entropy else None, None, 0, spec)
    gradients = head.gradients(needs_weight and main_grad is None, needs_bias)
    return loss, logps, entropies, grad_hidden, *gradients, metrics


forward = partial(forward_in_chunks, Chunk, policy_loss)
