"""A policy loss as a host's plug-in: the spec from plain settings, the weight of each token from the host."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

import torch

from fastrl import check
from fastrl.losses.metrics import available, named
from fastrl.losses.policy import check_entropy, check_spec, check_token_tensor, flat, flatten_tokens
from fastrl.losses.presets import PRESETS
from fastrl.ops.policy_loss import policy_loss as policy_loss_op
from fastrl.spec import KL, SURROGATES, Correction, PolicyLoss
from fastrl.types import LossOutput

NAMES = tuple(name.lower() for name in PRESETS)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


# The classes of each factor, by the name that chooses one.
FACTORS = {
    "surrogate": {_snake(name): kind for name, kind in SURROGATES.items()},
    "kl": {"kl": KL},
    "correction": {"correction": Correction},
}


def preset(op: str, name: str, changes: Mapping[str, Any] | None = None) -> PolicyLoss:
    """The policy loss of a preset, with changes as a recipe writes them.

    Args:
        op: what an error message starts with.
        name: a preset of `fastrl.presets` in lower case, such as "dapo".
        changes: new values by field. A factor's field is a dotted key or a nested mapping, `{"surrogate.high": 0.3}` or
            `{"surrogate": {"high": 0.3}}`; the key `name` chooses another surrogate.

    Raises:
        ValueError: there is no such preset or field, or a value is out of range.
        TypeError: a factor is given as something other than a mapping or None.
    """
    check.choice(op, "preset", name, NAMES)
    spec = PRESETS[name.upper()]
    for key, value in _nested(op, changes or {}).items():
        check.choice(op, key, key, [one.name for one in fields(spec) if one.init])
        if key in FACTORS and value is not None:
            value = _factor(op, key, getattr(spec, key), value)
        spec = replace(spec, **{key: value})
    return spec


def _nested(op: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings; a field that is given twice is refused."""
    found: dict[str, Any] = {}
    for name, value in changes.items():
        key, dot, rest = name.partition(".")
        value = {rest: value} if dot else value
        if isinstance(value, Mapping) and isinstance(found.get(key), dict):
            twice = found[key].keys() & value.keys()
            check.require(not twice, op, name, "each field once", f"{', '.join(sorted(twice))} twice")
            found[key] |= value
            continue
        check.require(key not in found, op, name, "each field once", f"{key} twice")
        found[key] = dict(value) if isinstance(value, Mapping) else value
    return found


def _factor(op: str, key: str, current: Any, value: Any) -> Any:
    """One factor with some fields changed; of another class if `name` says so."""
    is_mapping = isinstance(value, Mapping)
    check.require(is_mapping, op, key, "a mapping of its fields, or None", repr(value), error=TypeError)
    value, kinds = dict(value), FACTORS[key]
    name = value.pop("name", _snake(type(current).__name__) if current is not None else key)
    check.choice(op, f"{key}.name", name, kinds)
    kind = kinds[name]
    for one in value:
        check.choice(op, f"{key}.{one}", one, [field.name for field in fields(kind)])
    if type(current) is kind:
        return replace(current, **value)
    missing = [one.name for one in fields(kind) if one.name not in value and one.default is MISSING]
    check.require(not missing, op, key, f"all fields of {kind.__name__}", f"none for {', '.join(missing)}")
    return kind(**value)


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
