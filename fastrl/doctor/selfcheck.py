"""Checks every op and backend on this machine against plain torch in float64, in about a second."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastrl
from fastrl.ops.linear import linear

ROWS, HIDDEN, VOCABULARY = 24, 32, 211  # a vocabulary that is not a multiple of any vector width
TOLERANCE = 1e-4  # of float32 results, relative to 1 + |value|

Results = list[torch.Tensor]
# An op under test: (backend, device) -> (what it computed in float32, what is right in float64).
Check = Callable[[str, torch.device], tuple[Results, Results]]


def self_check(op: str, backend: str, device: torch.device) -> float:
    """The largest error of an op's values and gradients relative to 1 + |value|; NaN if a result is NaN."""
    return largest_error(*CHECKS[op](backend, device))


def largest_error(got: Results, want: Results) -> float:
    """max |got - want| / (1 + |want|) over all results; NaN if any of them is NaN."""
    errors = [((g.double() - w).abs() / (1 + w.abs())).max() for g, w in zip(got, want, strict=True) if w.numel() > 0]
    return float(torch.stack(errors).max())


def _draw(device: torch.device, *shape: int) -> torch.Tensor:
    """Random numbers from a separate generator."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device)


def _targets(device: torch.device) -> torch.Tensor:
    return (torch.arange(ROWS, device=device) * 37) % VOCABULARY


def _logps_and_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    full = torch.log_softmax(logits, -1)
    return full.gather(-1, targets[:, None]).squeeze(-1), -(full.exp() * full).sum(-1)


def _with_gradients(outputs: Results, inputs: Results) -> Results:
    """The outputs, and the gradients of their sum with weights 1, 2, 3, ..."""
    scalar = sum((out * torch.arange(1, out.numel() + 1).to(out).reshape(out.shape)).sum() for out in outputs)
    return [out.detach() for out in outputs] + list(torch.autograd.grad(scalar / ROWS, inputs))


def _leaves(*tensors: torch.Tensor, double: bool) -> Results:
    return [(t.double() if double else t).detach().requires_grad_() for t in tensors]


def _logprob(backend: str, device: torch.device) -> tuple[Results, Results]:
    targets, logits = _targets(device), _draw(device, ROWS, VOCABULARY) * 3
    (x,) = _leaves(logits, double=False)
    out = fastrl.logprob(x, targets, entropy=True, backend=backend)
    (y,) = _leaves(logits, double=True)
    want = _with_gradients(list(_logps_and_entropy(y, targets)), [y])
    return _with_gradients([out.logps, out.entropy], [x]), want


def _head(device: torch.device, double: bool) -> Results:
    return _leaves(_draw(device, ROWS, HIDDEN), _draw(device, VOCABULARY, HIDDEN) / 2, double=double)


def _linear_logprob(backend: str, device: torch.device) -> tuple[Results, Results]:
    targets, (hidden, weight) = _targets(device), _head(device, double=False)
    out = fastrl.linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
    h, w = _head(device, double=True)
    want = _with_gradients(list(_logps_and_entropy(h @ w.T, targets)), [h, w])
    return _with_gradients([out.logps, out.entropy], [hidden, weight]), want


def _clip_loss(logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """PPO's clipped surrogate, mean over tokens, in plain torch."""
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def _policy_inputs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, fastrl.PolicyLoss]:
    spec = fastrl.PolicyLoss(surrogate=fastrl.Clip(low=0.2, high=0.2), aggregate="token_mean")
    mask = torch.ones(1, ROWS, dtype=torch.bool, device=device)
    return _draw(device, 1, ROWS), _draw(device, ROWS, 1).T.contiguous(), mask, spec


def _policy_loss(backend: str, device: torch.device) -> tuple[Results, Results]:
    noise, advantages, mask, spec = _policy_inputs(device)
    start = -noise.abs()
    old = start - 0.3 * noise
    (x,) = _leaves(start, double=False)
    out = fastrl.policy_loss(x, advantages, spec, mask=mask, old_logps=old, backend=backend)
    (y,) = _leaves(start, double=True)
    want = _with_gradients([_clip_loss(y, old.double(), advantages.double())], [y])
    return _with_gradients([out.loss], [x]), want


def _linear_policy_loss(backend: str, device: torch.device) -> tuple[Results, Results]:
    noise, advantages, mask, spec = _policy_inputs(device)
    targets, (h, w) = _targets(device), _head(device, double=True)
    logps = _logps_and_entropy(h @ w.T, targets)[0][None]
    old = (logps.detach() - 0.3 * noise).float()
    want = _with_gradients([_clip_loss(logps, old.double(), advantages.double())], [h, w])
    hidden, weight = _head(device, double=False)
    out = fastrl.linear_policy_loss(
        hidden[None], weight, targets[None], advantages, spec, mask=mask, old_logps=old, backend=backend
    )
    return _with_gradients([out.loss], [hidden, weight]), want


def _group_advantages(backend: str, device: torch.device) -> tuple[Results, Results]:
    rewards = _draw(device, ROWS)
    got = fastrl.group_advantages(rewards, group_size=4, backend=backend)
    groups = rewards.double().reshape(-1, 4)
    want = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    return [got], [want.reshape(-1)]


def _gae(backend: str, device: torch.device) -> tuple[Results, Results]:
    rewards, values = _draw(device, 3, 8), _draw(device, 8, 3).T.contiguous()
    mask = torch.ones(3, 8, dtype=torch.bool, device=device)
    advantages, returns = fastrl.gae(rewards, values, mask, gamma=0.9, lam=0.8, backend=backend)
    r, v = rewards.double(), values.double()
    want, carry = torch.zeros_like(r), torch.zeros_like(r[:, 0])
    for t in reversed(range(8)):
        following = v[:, t + 1] if t < 7 else torch.zeros_like(carry)
        carry = r[:, t] + 0.9 * following - v[:, t] + 0.9 * 0.8 * carry
        want[:, t] = carry
    return [advantages, returns], [want, want + v]


def _linear(backend: str, device: torch.device) -> tuple[Results, Results]:
    hidden, weight = _head(device, double=False)
    h, w = _head(device, double=True)
    got = _with_gradients([linear(hidden, weight, backend=backend)], [hidden, weight])
    return got, _with_gradients([h @ w.T], [h, w])


CHECKS: dict[str, Check] = {
    "linear_logprob": _linear_logprob,
    "logprob": _logprob,
    "policy_loss": _policy_loss,
    "linear_policy_loss": _linear_policy_loss,
    "group_advantages": _group_advantages,
    "gae": _gae,
    "linear": _linear,
}
