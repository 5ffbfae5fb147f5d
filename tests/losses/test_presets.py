"""Each preset against its paper's formula, written out for a small batch, and the metrics it reports."""

from __future__ import annotations

import pytest
import torch

from fastrl.losses import presets
from fastrl.losses.metrics import finish, merge
from fastrl.losses.policy import policy_loss
from fastrl.spec import PolicyLoss, decode

LENGTHS = (2, 4, 3, 1)
GROUPS = ((0, 1), (2, 3))  # two prompts, two completions each
MAX_LENGTH = 4


def rows():
    """Per sequence: logps, old_logps, ref_logps, advantage; some ratios beyond every bound."""
    g = torch.Generator().manual_seed(3)
    logps = [-torch.rand(n, generator=g, dtype=torch.float64) for n in LENGTHS]
    old = [x + 0.8 * torch.randn(len(x), generator=g, dtype=torch.float64) for x in logps]
    ref = [x + 0.3 * torch.randn(len(x), generator=g, dtype=torch.float64) for x in logps]
    return list(zip(logps, old, ref, (1.5, -0.5, -1.0, 2.0), strict=True))


def clipped(ratio, a, low, high):
    return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def clip_rows(low, high):
    return [clipped((lp - old).exp(), a, low, high) for lp, old, _, a in rows()]


def grpo():
    kl = [0.04 * ((ref - lp).exp() - (ref - lp) - 1) for lp, _, ref, _ in rows()]
    return sum((x + k).mean() for x, k in zip(clip_rows(0.2, 0.2), kl, strict=True)) / 4


def gspo():
    return sum(clipped((lp - old).mean().exp(), a, 3e-4, 4e-4) for lp, old, _, a in rows()) / 4


def cispo_rows():
    return [-(lp - old).exp().clamp(max=5.0) * a * lp for lp, old, _, a in rows()]


def scale_rl():
    losses = cispo_rows()
    return sum(torch.cat([losses[i] for i in group]).mean() for group in GROUPS) / 2


def sapo():
    total = 0.0
    for lp, old, _, a in rows():
        tau = 1.0 if a > 0 else 1.05
        total = total - (4 / tau * torch.sigmoid(tau * ((lp - old).exp() - 1)) * a).mean()
    return total / 4


def gspo_token():
    losses = []
    for lp, old, _, a in rows():
        ratio = (lp - old).mean().exp().detach() * (lp - lp.detach()).exp()
        losses.append(clipped(ratio, a, 3e-4, 4e-4).mean())
    return sum(losses) / 4


def gmpo():
    total = 0.0
    for lp, old, _, a in rows():
        log_ratio = (lp - old).clamp(max=0.4) if a > 0 else (lp - old).clamp(min=-0.4)
        total = total - log_ratio.mean().exp() * a
    return total / 4


def luspo():
    return sum(len(lp) * clipped((lp - old).mean().exp(), a, 2e-3, 2.5e-3) for lp, old, _, a in rows()) / 4


def vespo():
    total = 0.0
    for lp, old, _, a in rows():
        w = (lp - old).sum().exp()
        phi = w**2 * (3 - 3 * w).exp() if a >= 0 else w**3 * (2 - 2 * w).exp()
        total = total - (phi * a * lp).sum()
    return total / 10


def dppo():
    total = 0.0
    for lp, old, _, a in rows():
        moved = lp.exp() - old.exp()
        keep = (moved <= 0.2) if a > 0 else (moved >= -0.2)
        total = total - (keep * (lp - old).exp() * a).sum()
    return total / 10


def intellect2():
    total = 0.0
    for lp, old, _, a in rows():
        ratio = (lp - old).exp()
        total = total - torch.minimum(ratio.clamp(max=4.0) * a, ratio.clamp(0.8, 1.2) * a).sum()
    return total / 10


FORMULAS = {
    "PPO": lambda: torch.cat(clip_rows(0.2, 0.2)).mean(),
    "GRPO": grpo,
    "DR_GRPO": lambda: torch.cat(clip_rows(0.2, 0.2)).sum() / (4 * MAX_LENGTH),
    "DAPO": lambda: torch.cat(clip_rows(0.2, 0.28)).mean(),
    "GSPO": gspo,
    "CISPO": lambda: torch.cat(cispo_rows()).mean(),
    "SCALE_RL": scale_rl,
    "SAPO": sapo,
    "RLOO": lambda: sum(-a * lp.sum() for lp, _, _, a in rows()) / 4,
    "REINFORCE_PP": lambda: torch.cat(clip_rows(0.2, 0.2)).mean(),
    "GSPO_TOKEN": gspo_token,
    "GMPO": gmpo,
    "LUSPO": luspo,
    "VESPO": vespo,
    "DPPO": dppo,
    "INTELLECT2": intellect2,
}


def packed(name):
    spec = presets.PRESETS[name]
    logps, old, ref = (torch.cat(x) for x in list(zip(*rows(), strict=True))[:3])
    return policy_loss(
        logps,
        torch.tensor([1.5, -0.5, -1.0, 2.0], dtype=torch.float64),
        spec,
        mask=torch.ones(10, dtype=torch.bool),
        old_logps=old,
        ref_logps=ref if spec.needs_ref else None,
        group_ids=torch.tensor([0, 0, 1, 1]),
        normalizer=4.0 * MAX_LENGTH if name == "DR_GRPO" else None,
        cu_seqlens=torch.tensor([0, 2, 6, 9, 10]),
    )


@pytest.mark.parametrize("name", presets.PRESETS)
def test_preset_equals_its_paper_formula(name):
    torch.testing.assert_close(packed(name).loss, FORMULAS[name](), rtol=1e-12, atol=1e-12)


def test_the_table_holds_every_preset_under_its_own_name():
    named = {name: value for name, value in vars(presets).items() if isinstance(value, PolicyLoss)}
    assert named == presets.PRESETS
    assert set(named) == set(FORMULAS)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_preset_survives_the_operator_boundary(name):
    assert decode(presets.PRESETS[name].code) == presets.PRESETS[name]


def test_metrics_name_only_what_the_inputs_can_give():
    names = set(packed("RLOO").metrics)
    assert names == {"ratio/mean", "ratio/max", "old_kl", "gradient_fraction", "log_ratio_clamped", "nonfinite_rows"}
    assert set(packed("PPO").metrics) == names | {"clip_ratio/low_mean", "clip_ratio/high_mean"}
    assert "kl" in packed("GRPO").metrics


def test_merged_metrics_weigh_tokens_not_parts_and_skip_what_was_never_counted():
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    a = {"kl": (torch.tensor(2.0), torch.tensor(10.0)), "ratio/max": (torch.tensor(3.0), one), "entropy": (zero, zero)}
    b = {"kl": (torch.tensor(9.0), one), "ratio/max": (torch.tensor(2.0), one), "old_kl": (one, one)}
    assert finish(merge([a, b])) == {"kl": 1.0, "ratio/max": 3.0, "old_kl": 1.0}
    assert finish(merge([])) == {}
