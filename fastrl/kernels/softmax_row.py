"""Log-softmax of one row of logits, value and derivative: the torch copy, shared by every op that sees logits.

With z the finished logits of a row, p = softmax(z) and y its target:

    logp = log p_y          d logp / d z_v = [v = y] - p_v
    H = -sum_v p_v log p_v  d H / d z_v    = -p_v (log p_v + H)

A `-inf` logit has p = 0 and contributes nothing. A row that is all `-inf`, or holds NaN or `+inf`, gives NaN for that
row only.
"""

from __future__ import annotations

import torch

NO_SOFTCAP = 0.0


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for everything but float64, which stays as it is so that the definition can be checked in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finish_logits_(
    z: torch.Tensor, temperature: torch.Tensor, softcap: float, logit_scale: float
) -> torch.Tensor | None:
    """z <- cap(logit_scale z) / temperature in place, with cap(x) = softcap tanh(x / softcap).

    Args: z (N, V); temperature (1,) or (N,). Returns cap'(x) of shape (N, V), or None without a softcap.
    """
    slope = None
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap != NO_SOFTCAP:
        z.div_(softcap).tanh_()
        slope = z.square().neg_().add_(1.0)
        z.mul_(softcap)
    z.div_(temperature.unsqueeze(-1))
    return slope


def unfinish_grad_(
    dz: torch.Tensor, slope: torch.Tensor | None, temperature: torch.Tensor, logit_scale: float
) -> torch.Tensor:
    """The chain rule through `finish_logits_`: d/d(raw logits) from d/d(finished logits), in place."""
    dz.mul_(logit_scale / temperature.unsqueeze(-1))
    return dz if slope is None else dz.mul_(slope)


def slope_from_probs(
    p: torch.Tensor,
    targets: torch.Tensor,
    logps: torch.Tensor,
    lse: torch.Tensor,
    temperature: torch.Tensor,
    softcap: float,
) -> torch.Tensor | None:
    """cap' recovered from probabilities: the finished logit is log p + lse.

    Where p = 0 the value does not matter, except at the target, whose gradient is then at its largest: its log p comes
    from `logps`.
    """
    if softcap == NO_SOFTCAP:
        return None
    log_p = p.log().scatter_(-1, targets.unsqueeze(-1), logps.unsqueeze(-1))
    capped = log_p.add_(lse.sum(0).unsqueeze(-1)).mul_(temperature.unsqueeze(-1)).div_(softcap).clamp_(-1.0, 1.0)
    return capped.square_().neg_().add_(1.0)


def softmax_(z: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrites z (N, V) with its softmax; returns logps (N,) and lse (2, N).

    The log-sum-exp stays in two parts, the largest logit and the logarithm of what is left: their sum, rounded, would
    scale every probability of its row.
    """
    top = z.amax(-1, keepdim=True)
    z.sub_(top)  # an infinite maximum makes the row NaN, as it must be
    at_target = z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    total = z.exp_().sum(-1)
    z.div_(total.unsqueeze(-1))
    log_total = total.log()
    return at_target - log_total, torch.stack((top.squeeze(-1), log_total))


def entropy_of(p: torch.Tensor) -> torch.Tensor:
    """H of each row of probabilities; 0 log 0 = 0."""
    return torch.special.entr(p).sum(-1)


def summaries_of(z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(3, N) of finished logits z (N, V): log sum_v p_v^2, mean z, and 1 where z is first largest at the target."""
    squared = torch.logsumexp(2 * z, -1) - 2 * torch.logsumexp(z, -1)
    return torch.stack((squared, z.mean(-1), (z.argmax(-1) == targets).to(z.dtype)))


def grad_logits_(
    p: torch.Tensor,
    targets: torch.Tensor,
    logps: torch.Tensor,
    grad_logps: torch.Tensor,
    entropy: torch.Tensor | None = None,
    grad_entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    """grad_logps d logp/dz + grad_entropy dH/dz, written over p (N, V).

    The target's entry comes from `logps`, not from p: with p_y near 1, or rounded to 16 bits, 1 - p_y would be lost.
    """
    index = targets.unsqueeze(-1)
    at_target = -grad_logps * torch.expm1(logps)
    if grad_entropy is None:
        dz = p.mul_(-grad_logps.unsqueeze(-1))
    else:
        surprise = p.log().add_(entropy.unsqueeze(-1)).masked_fill_(p == 0, 0.0)
        entropy_at_target = surprise.mul_(grad_entropy.unsqueeze(-1)).gather(-1, index).squeeze(-1) * torch.exp(logps)
        at_target = at_target - entropy_at_target
        dz = p.mul_(surprise.add_(grad_logps.unsqueeze(-1)).neg_())
    return dz.scatter_(-1, index, at_target.unsqueeze(-1))


def scale_rows(
    rows: torch.Tensor,
    grad_logps: torch.Tensor,
    entropy_rows: torch.Tensor,
    grad_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """grad_logps rows + grad_entropy entropy_rows, the whole backward of a frozen head; (N, H).

    A zero upstream gradient gives exactly 0, also for a row that is not finite.
    """
    grad = rows.to(accumulate_dtype(rows.dtype)) * grad_logps.unsqueeze(-1)
    grad.masked_fill_((grad_logps == 0).unsqueeze(-1), 0)
    if grad_entropy is not None:
        extra = entropy_rows.to(grad.dtype) * grad_entropy.unsqueeze(-1)
        grad += extra.masked_fill_((grad_entropy == 0).unsqueeze(-1), 0)
    return grad


def check_targets(
    targets: torch.Tensor, vocabulary: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(targets safe to read with, rows to poison or None).

    On the CPU an id outside the vocabulary raises IndexError. On a device, where a check would wait for the stream, the
    read is clamped and the row's results become NaN.
    """
    outside = (targets < 0) | (targets >= vocabulary)
    wrong = outside & (targets != ignore_index)
    if targets.device.type == "cpu":
        if wrong.any():
            row = int(wrong.flatten().nonzero()[0])
            raise IndexError(
                f"targets: expected ids in [0, {vocabulary}) or ignore_index {ignore_index}, got "
                f"{int(targets.flatten()[row])} at row {row}. Mask the row with ignore_index, or fix the tokenizer."
            )
        return targets, None
    return targets.clamp(0, vocabulary - 1), wrong
