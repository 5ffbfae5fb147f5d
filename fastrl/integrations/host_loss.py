"""A policy loss as a host's plug-in: the spec from plain settings, the weight of each token from the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastrl import check
from fastrl.losses.metrics import available, named
from fastrl.losses.policy import check_entropy, check_spec, check_token_tensor, flat, flatten_tokens
from fastrl.losses.presets import PRESETS
from fastrl.ops.policy_loss import policy_loss as policy_loss_op
from fastrl.spec import PolicyLoss
from fastrl.typed import changed, nested
from fastrl.types import LossOutput

NAMES = tuple(name.lower() for name in PRESETS)


def preset(op: str, name: str, changes: Mapping[str, Any] | None = None) -> PolicyLoss:
    """The policy loss of a preset, with changes as a recipe writes them.

    Args:
        op: what an error message starts with.
        name: a preset of `fastrl.presets` in lower case, such as "dapo".
        changes: new values by field. A factor's field is a dotted key or a nested mapping, `{"surrogate.high": 0.3}` or
            `{"surrogate": {"high": 0.3}}`; the key `name` chooses another surrogate.

    Raises:
        ValueError: there is no such preset or field, or a value has the wrong type or is out of range.
    """
    check.choice(op, "preset", name, NAMES)
    return changed(PRESETS[name.upper()], nested(changes or {}, op), op)


def weighted_policy_loss(
    op: str,
    logps: torch.Tensor,
    advantages: torch.Tensor,
    spec: PolicyLoss,
    weights: torch.Tensor,
    *,
    mask: torch.Tensor,
    old_logps: torch.Tensor,
    ref_logps: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
) -> LossOutput:
    """sum_t w_t (surrogate_t + kl.coef KL_t - entropy_coef H_t): `policy_loss` with weights that the host made.

    The weights replace the spec's `aggregate`. `logps` and `entropy` get a gradient; everything else is a constant.

    Args:
        op: what an error message starts with.
        logps: (B, T), or (N,) if the spec is separable.
        advantages, mask, old_logps, ref_logps, entropy: as `policy_loss`.
        weights: as logps, at least 0; read where the mask is True.

    Returns:
        The scalar loss, float32 (float64 for float64 `logps`), and the metrics of `policy_loss`.

    Raises:
        ValueError, TypeError: as `policy_loss`.
    """
    check_spec(op, spec)
    check.floating(op, "logps", logps)
    check_entropy(op, entropy, logps, spec)
    check_token_tensor(op, "weights", weights, logps.shape, logps.device)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    tokens = flatten_tokens(
        op,
        logps.shape,
        logps.device,
        advantages,
        replace(spec, aggregate="token_sum"),
        mask=mask,
        old_logps=old_logps,
        ref_logps=ref_logps,
        normalizer=1.0,
        dtype=dtype,
    )
    loss, _, _, table = policy_loss_op(
        flat(logps, dtype),
        tokens.advantages,
        torch.where(tokens.mask, flat(weights.detach(), dtype), 0),
        tokens.mask,
        tokens.old_logps,
        tokens.ref_logps,
        None,
        None if entropy is None else flat(entropy, dtype),
        tokens.seq_ids,
        tokens.num_seqs,
        spec.code,
        "auto",
    )
    return LossOutput(
        loss, named(table, available(spec, ref=ref_logps is not None, sampling=False, entropy=entropy is not None))
    )
