"""The expected gradient of each KL estimate, enumerated exactly over a categorical policy, against autograd of the KL.

| estimate   | on-policy          | off-policy         |
|------------|--------------------|--------------------|
| `k1`       | 0                  | biased             |
| `k2`       | reverse KL         | biased             |
| `k3`       | forward KL         | biased             |
| `k3_ratio` | reverse KL         | reverse KL         |
| `k1+`      | reverse KL         | biased             |
| `k3+`      | reverse KL         | biased             |
"""

from __future__ import annotations

import pytest
import torch

from fastrl.ops.policy_loss import policy_loss
from fastrl.spec import KL, PolicyLoss, Reinforce

ACTIONS = 5


def logits(seed):
    return torch.randn(ACTIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected_gradient(kind, theta, ref, old=None):
    """sum_a q(a) d estimate(a) / d theta, q the policy that samples: the current one, or `old`."""
    theta = theta.clone().requires_grad_()
    logps = theta.log_softmax(0)  # every action once, so the expectation is a weighted sum
    q = (logps if old is None else old.log_softmax(0)).detach().exp()
    spec = PolicyLoss(surrogate=Reinforce(), kl=KL(kind, coef=1.0), aggregate="token_sum")
    mask = torch.ones(ACTIONS, dtype=torch.bool)
    old_logps = None if old is None else old.log_softmax(0)
    constants = (old_logps, ref.log_softmax(0), None, None, None, 0, spec.code, "reference")
    loss = policy_loss(logps, torch.zeros_like(logps), q, mask, *constants)[0]
    return loss.detach(), torch.autograd.grad(loss, theta)[0]


def true_gradient(direction, theta, ref):
    theta = theta.clone().requires_grad_()
    p, r = theta.log_softmax(0), ref.log_softmax(0)
    kl = (p.exp() * (p - r)).sum() if direction == "reverse" else (r.exp() * (r - p)).sum()
    return kl.detach(), torch.autograd.grad(kl, theta)[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("kind", "direction"),
    [
        ("k1", None),
        ("k2", "reverse"),
        ("k3", "forward"),
        ("k3_ratio", "reverse"),
        ("k1+", "reverse"),
        ("k3+", "reverse"),
    ],
)
def test_expected_gradient_on_policy(kind, direction, seed):
    theta, ref = logits(seed), logits(seed + 100)
    _, ours = expected_gradient(kind, theta, ref)
    expected = torch.zeros_like(ours) if direction is None else true_gradient(direction, theta, ref)[1]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for other in {"reverse", "forward"} - {direction}:
        assert not torch.allclose(ours, true_gradient(other, theta, ref)[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["k1", "k3", "k3_ratio", "k1+", "k3+"])
def test_expected_value_on_policy_is_the_reverse_kl(kind):
    theta, ref = logits(0), logits(100)
    torch.testing.assert_close(expected_gradient(kind, theta, ref)[0], true_gradient("reverse", theta, ref)[0])


@pytest.mark.parametrize("seed", range(4))
def test_only_k3_ratio_stays_unbiased_off_policy(seed):
    theta, ref, old = logits(seed), logits(seed + 100), logits(seed + 200)
    value, ours = expected_gradient("k3_ratio", theta, ref, old)
    kl, gradient = true_gradient("reverse", theta, ref)
    torch.testing.assert_close(value, kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, gradient, rtol=1e-12, atol=1e-12)
    for kind in ("k1", "k2", "k3", "k1+", "k3+"):
        biased = expected_gradient(kind, theta, ref, old)[1]
        for direction in ("reverse", "forward"):
            assert not torch.allclose(biased, true_gradient(direction, theta, ref)[1], rtol=1e-2, atol=1e-2)
