"""`linear_policy_loss` over a set of kept ids per row, in one pass: what the forward products gave is still there."""

from __future__ import annotations

from types import ModuleType

import torch

from fastrl.kernels.inputs import HeadInputs, LossTokens, Needs
from fastrl.kernels.linear_logprob import support as linear_logprob
from fastrl.spec import PolicyLoss


def forward(
    inputs: HeadInputs,
    tokens: LossTokens,
    main_grad: torch.Tensor | None,
    token_ids: torch.Tensor,
    offsets: torch.Tensor,
    *,
    token_loss: ModuleType,
    spec: PolicyLoss,
    entropy: bool,
    needs: Needs,
) -> tuple[torch.Tensor, ...]:
    """As `reference.forward`, with the sets of `linear_logprob.support`; `token_loss` is a backend of `policy_loss`.

    Raises:
        ValueError: a set is wrong, as `linear_logprob.support.checked_sets` says.
    """
    head = inputs._replace(targets=inputs.targets.masked_fill(~tokens.mask, inputs.ignore_index))
    tokens = tokens._replace(mask=head.targets != head.ignore_index)
    scores = linear_logprob.forward(head, token_ids, offsets, entropy=entropy)
    entropies = scores.entropy if entropy else None
    loss, dlogps, dentropy, metrics = token_loss.forward(scores.logps, tokens, entropies, None, 0, spec)
    upstream = (dlogps, dentropy if spec.needs_entropy else None)
    gradients = linear_logprob.backward(
        *upstream, head, token_ids, offsets, scores, needs=needs, main_grad=main_grad if needs.weight else None
    )
    return loss, scores.logps, scores.entropy, *gradients, metrics
