"""`fastrl::policy_loss` against autograd of an expression written sequence by sequence in plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import BACKENDS, using
from ops.threads import with_threads
from tolerance import assert_no_worse

from fastrl.kernels import tuning
from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.policy_loss import METRICS, chunked, merge_metrics, reference
from fastrl.losses.metrics import finish
from fastrl.losses.policy import policy_loss
from fastrl.ops.policy_loss import policy_loss as op
from fastrl.spec import KL, ONLY_RATIO, Cispo, Clip, Correction, Dppo, Gmpo, PolicyLoss, Reinforce, Sapo, Vespo

SURROGATES = {
    "clip": Clip(low=0.2, high=0.28),
    "dual_clip": Clip(low=0.2, high=0.2, dual=1.5),
    "cispo": Cispo(ratio_max=1.3, ratio_min=0.6),
    "sapo": Sapo(tau_pos=1.0, tau_neg=1.05),
    "reinforce": Reinforce(),
    "dppo": Dppo(low=0.1, high=0.15),
}
PAIRS = [(name, r) for name, s in SURROGATES.items() for r in ("token", "sequence") if ONLY_RATIO.get(type(s), r) == r]
each_pair = pytest.mark.parametrize(("surrogate", "ratio"), PAIRS)
OF_SEQUENCES = {
    "gmpo": PolicyLoss("sequence", Gmpo(low=0.2, high=0.3)),
    "vespo": PolicyLoss("sequence", Vespo()),
    "gspo_token": PolicyLoss("sequence_token", Clip(low=0.02, high=0.03, dual=1.5)),
    "sapo_token": PolicyLoss("sequence_token", Sapo()),
}
KLS = [None, *(KL(kind, coef=0.3) for kind in ("k1", "k2", "k3", "k3_ratio"))]
CORRECTIONS = [
    None,
    Correction("truncate", "token", high=1.1),
    Correction("mask", "token", high=1.3, low=0.8),
    Correction("truncate", "sequence", high=1.0),
    Correction("mask", "sequence", high=1.0, low=0.9),
]
AGGREGATES = ["token_mean", "prompt_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum"]
GROUP_IDS = torch.tensor([7, 3, 7, 3, 5])
NORMALIZER = 40.0


def batch(dtype=torch.float64):
    """Five sequences of ragged masks: one fully masked, one with a hole, NaN and inf wherever the mask is False."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 0, 6])[:, None]
    mask[4, 2] = False
    logps = -3 * torch.rand(5, 7, generator=g, dtype=dtype)
    data = {
        "logps": logps,
        "advantages": torch.randn(5, 7, generator=g, dtype=dtype),
        "old_logps": logps + 0.4 * torch.randn(5, 7, generator=g, dtype=dtype),
        "ref_logps": logps + 0.5 * torch.randn(5, 7, generator=g, dtype=dtype),
        "sampling_logps": logps + 0.4 * torch.randn(5, 7, generator=g, dtype=dtype),
        "entropy": torch.rand(5, 7, generator=g, dtype=dtype),
    }
    data["advantages"][0, 1] = 0.0
    data["old_logps"][0, 3] = logps[0, 3] + 25.0  # log-ratios and d beyond the bound
    data["old_logps"][2, 1] = logps[2, 1] - 25.0
    data["ref_logps"][0, 2] = logps[0, 2] + 30.0
    data["ref_logps"][4, 0] = logps[4, 0] - 30.0
    for tensor in data.values():
        tensor[~mask] = torch.nan
    data["logps"][1, 5] = torch.inf
    data["logps"].requires_grad_()
    data["entropy"].requires_grad_()
    return data | {"mask": mask}


def surrogate_value(spec, ratio, logps, advantages, old):
    s = spec.surrogate
    if isinstance(s, Dppo):
        moved = (logps.exp() - old.exp()).detach()
        keep = ~(((advantages > 0) & (moved > s.high)) | ((advantages < 0) & (moved < -s.low)))
        return -ratio * advantages * keep
    if isinstance(s, Gmpo):
        clipped = (logps - old).clamp(-s.low, s.high)
        pulled = torch.where(advantages > 0, (logps - old).minimum(clipped), (logps - old).maximum(clipped))
        return -pulled.mean().exp() * advantages
    if isinstance(s, Vespo):
        w = (logps - old).sum().clamp(-20, 20).exp().detach()
        pairs = logps.new_tensor([[s.k_pos, s.k_neg], [s.lam_pos, s.lam_neg]])
        k, lam = (torch.where(advantages >= 0, *pair) for pair in pairs)
        return -(w**k) * (lam * (1 - w)).exp() * advantages * logps
    if isinstance(s, Clip):
        objective = torch.minimum(ratio * advantages, ratio.clamp(1 - s.low, 1 + s.high) * advantages)
        if s.dual is not None:
            objective = torch.where(advantages < 0, torch.maximum(objective, s.dual * advantages), objective)
        return -objective
    if isinstance(s, Cispo):
        return -ratio.clamp(s.ratio_min, s.ratio_max).detach() * advantages * logps
    if isinstance(s, Sapo):
        tau = torch.tensor([s.tau_pos if a > 0 else s.tau_neg for a in advantages], dtype=ratio.dtype)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    return -advantages * logps


def kl_value(kind, logps, ref_logps, ratio, of_sequence):
    d = ref_logps - logps
    k3 = d.clamp(max=20).exp() - d.clamp(max=20) - 1
    weighted = torch.where(d > 20, (ratio * k3).detach(), ratio * k3)
    if not of_sequence:  # the derivative as it is on paper, where the two exponentials cancel
        weighted = (ratio * k3).detach() - (ratio * d).detach() * (logps - logps.detach())
    k2 = d * d / 2
    through = k2 - k2.detach()  # nothing, with the derivative of k2
    return {
        "k1": -d,
        "k2": k2,
        "k3": k3,
        "k3_ratio": weighted,
        "k1+": through - d.detach(),
        "k3+": through + k3.detach(),
    }[kind]


def sequence_losses(spec, data):
    """The token losses of each sequence, over its masked-in tokens only, by definition."""
    for i, row in enumerate(data["mask"]):
        names = ("logps", "advantages", "old_logps", "ref_logps", "sampling_logps", "entropy")
        logps, advantages, old, ref, sampling, entropy = (data[name][i][row] for name in names)
        ratio = (logps - old).clamp(-20, 20).exp()
        if spec.ratio == "sequence":
            ratio = (logps - old).mean().clamp(-20, 20).exp().expand(len(logps))
        elif spec.ratio == "sequence_token":
            ratio = (logps - old).mean().exp().detach() * (logps - logps.detach()).exp()
        loss = surrogate_value(spec, ratio, logps, advantages, old)
        if spec.correction is not None:
            c = spec.correction
            log_weight = old - sampling if c.level == "token" else (old - sampling).mean().expand(len(logps))
            weight = log_weight.clamp(-20, 20).exp().detach()
            truncated = weight.clamp(max=c.high)
            loss = loss * (truncated if c.kind == "truncate" else weight * ((weight >= c.low) & (weight <= c.high)))
        if spec.kl is not None:
            own = isinstance(spec.surrogate, (Gmpo, Vespo))
            rho = (logps - old).clamp(-20, 20).exp() if own else ratio
            of_sequence = spec.ratio == "sequence" and not own
            loss = loss + spec.kl.coef * kl_value(spec.kl.kind, logps, ref, rho, of_sequence)
        yield loss - spec.entropy_coef * entropy


def aggregated(spec, data):
    losses = list(sequence_losses(spec, data))
    present = [loss for loss in losses if len(loss) > 0]
    if spec.aggregate == "token_mean":
        return torch.cat(losses).mean()
    if spec.aggregate == "token_sum":
        return torch.cat(losses).sum() / NORMALIZER
    if spec.aggregate == "seq_mean_token_mean":
        return torch.stack([loss.mean() for loss in present]).mean()
    if spec.aggregate == "seq_mean_token_sum":
        return torch.stack([loss.sum() for loss in present]).mean()
    groups = [torch.cat([losses[i] for i in range(5) if GROUP_IDS[i] == g]) for g in (3, 5, 7)]
    return torch.stack([group.mean() for group in groups]).mean()


def run(spec, data, backend="reference"):
    optional = {name: data[name] for name in ("old_logps", "ref_logps", "sampling_logps", "entropy")}
    normalizer = NORMALIZER if spec.aggregate == "token_sum" else None
    return policy_loss(
        data["logps"],
        data["advantages"],
        spec,
        mask=data["mask"],
        group_ids=GROUP_IDS,
        normalizer=normalizer,
        backend=backend,
        **optional,
    )


def assert_equals_definition(spec, backends, monkeypatch):
    monkeypatch.setattr(chunked, "SLICE", 6)  # sequences of 7 cross the slices
    data = batch()
    inputs = (data["logps"], data["entropy"])
    expected = aggregated(spec, data)
    grads = torch.autograd.grad(expected, inputs, allow_unused=True, materialize_grads=True)
    for name in backends:
        with using(name) as backend:
            loss = run(spec, data, backend).loss
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, msg=str(spec))
        ours = torch.autograd.grad(loss, inputs)
        for a, b in zip(ours, grads, strict=True):
            torch.testing.assert_close(a, b.where(data["mask"], 0), rtol=1e-12, atol=1e-12, msg=str(spec))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0] != "dppo"])
def test_value_and_gradients_equal_autograd_of_the_definition(pair, correction, kl, aggregate, monkeypatch):
    surrogate, ratio = pair
    coef = 0.0 if kl is None else 0.05
    spec = PolicyLoss(ratio, SURROGATES[surrogate], kl, aggregate, entropy_coef=coef, correction=correction)
    assert_equals_definition(spec, BACKENDS, monkeypatch)


@pytest.mark.parametrize("kind", ["k1+", "k3+"])
def test_a_straight_through_kl_has_the_value_of_its_estimate_and_the_derivative_of_k2(kind, monkeypatch):
    for ratio in ("token", "sequence"):
        spec = PolicyLoss(ratio, SURROGATES["clip"], KL(kind, 0.3), correction=CORRECTIONS[4])
        assert_equals_definition(spec, BACKENDS, monkeypatch)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", ["dppo", *OF_SEQUENCES])
def test_newer_surrogates_equal_autograd_of_the_definition(name, aggregate, monkeypatch):
    """Each KL with one correction."""
    start = PolicyLoss(surrogate=SURROGATES[name]) if name == "dppo" else OF_SEQUENCES[name]
    for kl, correction in zip((*KLS, KL("k3+", 0.3)), (*CORRECTIONS, None), strict=True):
        spec = replace(start, kl=kl, aggregate=aggregate, correction=correction, entropy_coef=0.05)
        assert_equals_definition(spec, BACKENDS, monkeypatch)


def test_equal_advantages_and_weights_in_a_sequence_make_gspo_token_gspo():
    data = batch()
    data["advantages"] = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.5], dtype=torch.float64)
    specs = [PolicyLoss(ratio, Clip(low=0.02, high=0.03)) for ratio in ("sequence", "sequence_token")]
    losses = [run(spec, data).loss for spec in specs]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss, data["logps"])[0] for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("p", "advantage", "gone"), [(0.81, 1, 1), (0.79, 1, 0), (0.29, -1, 1), (0.31, -1, 0), (0.01, 1, 0)]
)
def test_dppo_drops_a_token_that_moved_beyond_its_bounds_the_way_of_its_advantage(backend, p, advantage, gone):
    logps = torch.tensor([p], dtype=torch.float64).log().requires_grad_()
    arguments = {"mask": torch.ones(1, dtype=torch.bool), "old_logps": torch.tensor([0.5], dtype=torch.float64).log()}
    spec = PolicyLoss(surrogate=Dppo(low=0.2, high=0.3), aggregate="token_mean")
    out = policy_loss(logps, torch.tensor([advantage], dtype=torch.float64), spec, backend=backend, **arguments)
    out.loss.backward()
    expected = 0.0 if gone else -advantage * p / 0.5
    assert (out.loss.item(), logps.grad.item()) == pytest.approx((expected, expected), rel=1e-12)
    counted = {"clip_ratio/low_mean": gone * (advantage < 0), "clip_ratio/high_mean": gone * (advantage > 0)}
    assert counted.items() <= finish(out.metrics).items()


@pytest.mark.parametrize("only", [Dppo(), Gmpo(), Vespo()])
def test_a_surrogate_of_one_ratio_refuses_the_others(only):
    with pytest.raises(ValueError, match=f"PolicyLoss.ratio: expected .* with {type(only).__name__}, got"):
        PolicyLoss("sequence" if isinstance(only, Dppo) else "token", only)


CLIP_CASES = [
    # log ratio, advantage, dual, loss, dlogp, clipped low, clipped high
    pytest.param(0.1, 1.0, None, -1.1051709180756477, -1.1051709180756477, 0, 0, id="inside"),
    pytest.param(0.5, 1.0, None, -1.28, 0.0, 0, 1, id="above with A > 0: clipped"),
    pytest.param(0.5, -1.0, None, 1.6487212707001282, 1.6487212707001282, 0, 0, id="above with A < 0: not clipped"),
    pytest.param(-0.5, -1.0, None, 0.8, 0.0, 1, 0, id="below with A < 0: clipped"),
    pytest.param(-0.5, 1.0, None, -0.6065306597126334, -0.6065306597126334, 0, 0, id="below with A > 0: not clipped"),
    pytest.param(0.5, 0.0, None, 0.0, 0.0, 0, 0, id="A = 0"),
    pytest.param(2.0, -1.0, 3.0, 3.0, 0.0, 1, 0, id="beyond the dual bound"),
    pytest.param(1.0, -1.0, 3.0, 2.718281828459045, 2.718281828459045, 0, 0, id="within the dual bound"),
    pytest.param(2.0, 1.0, 3.0, -1.28, 0.0, 0, 1, id="dual leaves A > 0 alone"),
]


@pytest.mark.parametrize(("log_ratio", "advantage", "dual", "loss", "dlogp", "low", "high"), CLIP_CASES)
def test_clip_and_its_gradient_on_each_side_of_each_bound(log_ratio, advantage, dual, loss, dlogp, low, high):
    x = torch.tensor([log_ratio], dtype=torch.float64)
    term = reference.clip(x, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.28, dual)
    assert term.loss.item() == pytest.approx(loss, abs=1e-15)
    assert term.dlog_ratio.item() == pytest.approx(dlogp, abs=1e-15)
    assert (dlogp == 0.0) == (term.dlog_ratio.item() == 0.0)
    assert (term.low.item(), term.high.item()) == (low, high)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_exactly_at_its_bound_keeps_its_gradient(advantage):
    one = torch.zeros(1, dtype=torch.float64)  # ratio exactly 1, which is both bounds
    term = reference.clip(one, torch.full_like(one, advantage), 0.0, 0.0, None)
    assert term.dlog_ratio.item() == -advantage
    assert not term.low.item()
    assert not term.high.item()


def test_a_loss_exactly_at_the_dual_bound_keeps_its_gradient():
    x = torch.tensor([2.0], dtype=torch.float64).log()
    assert x.exp().item() == 2.0
    term = reference.clip(x, torch.tensor([-1.0], dtype=torch.float64), 0.2, 0.2, 2.0)
    assert (term.loss.item(), term.dlog_ratio.item(), term.low.item()) == (2.0, 2.0, False)


def test_every_term_matches_finite_differences():
    g = torch.Generator().manual_seed(1)
    logps, old, ref, advantages = (torch.randn(200, generator=g, dtype=torch.float64) for _ in range(4))
    h = 1e-6

    def terms(logps):
        log_ratio = logps - old
        tokens = reference.clean(logps, LossTokens(advantages, logps, logps.isfinite(), old, ref, None), None)
        for surrogate in SURROGATES.values():
            if not isinstance(surrogate, Cispo):  # its ratio is a constant, so its value does not tell its derivative
                yield reference.surrogate_term(surrogate, log_ratio, tokens)
        for kind in ("k1", "k2", "k3", "k3_ratio"):
            for of_sequence in (False, True):
                yield reference.kl_term(kind, ref - logps, log_ratio, of_sequence=of_sequence)

    for here, up, down in zip(terms(logps), terms(logps + h), terms(logps - h), strict=True):
        numeric = (up.loss - down.loss) / (2 * h)
        torch.testing.assert_close(here.dlog_ratio + here.dlogp, numeric, rtol=1e-6, atol=1e-7)


@each_pair
def test_masked_tokens_of_any_content_change_nothing(backend, surrogate, ratio):
    spec = PolicyLoss(ratio, SURROGATES[surrogate], KL("k3_ratio", 0.1), entropy_coef=0.1, correction=CORRECTIONS[3])
    poisoned, clean = batch(torch.float32), batch(torch.float32)
    for name, tensor in clean.items():
        if name != "mask":
            clean[name] = tensor.detach().where(clean["mask"], -0.5).requires_grad_(tensor.requires_grad)
    outputs = [run(spec, data, backend) for data in (poisoned, clean)]
    assert outputs[0].loss.isfinite()
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert finish(outputs[0].metrics) == finish(outputs[1].metrics)
    for out, data in zip(outputs, (poisoned, clean), strict=True):
        out.loss.backward()
        assert (data["logps"].grad[~data["mask"]] == 0).all()
        assert (data["entropy"].grad[~data["mask"]] == 0).all()
    assert torch.equal(poisoned["logps"].grad, clean["logps"].grad)


@pytest.mark.parametrize("old", ["given", None])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_nan_in_a_token_that_counts_makes_the_loss_nan_and_is_counted(surrogate, old):
    logps = torch.tensor([-1.0, torch.nan, -2.0], requires_grad=True)
    spec = PolicyLoss("token", SURROGATES[surrogate], aggregate="token_mean")
    old_logps = None if old is None else torch.tensor([-1.0, -1.0, -1.0])
    mask = torch.ones(3, dtype=torch.bool)
    out = policy_loss(logps, torch.ones(3), spec, mask=mask, old_logps=old_logps)
    assert out.loss.isnan()
    assert out.metrics["nonfinite_rows"][0].item() == 1


def test_a_token_of_weight_zero_has_no_loss_and_no_gradient_even_if_nan():
    x = torch.tensor([-1.0, torch.nan])
    weights, mask = torch.tensor([1.0, 0.0]), torch.ones(2, dtype=torch.bool)
    loss, dlogps, _, _ = op(x, torch.ones(2), weights, mask, None, None, None, None, None, 0, PolicyLoss().code, "auto")
    assert loss.item() == -1.0
    assert dlogps.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_huge_log_ratios_are_finite_without_gradient_and_counted(ratio):
    old = torch.tensor([[-1.0, -1.0], [-900.0, -900.0], [-1.0, -1.0]])
    logps = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-900.0, -900.0]], requires_grad=True)
    spec = PolicyLoss(ratio, Clip(low=0.2, high=0.2), aggregate="token_mean")
    out = policy_loss(logps, -torch.ones(3), spec, mask=torch.ones_like(old, dtype=torch.bool), old_logps=old)
    out.loss.backward()
    expected = (1.0 + torch.tensor(20.0).exp().item() + 0.8) / 3
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    assert logps.grad[0].tolist() == pytest.approx([1 / 6, 1 / 6])
    assert (logps.grad[1:] == 0).all()
    assert finish(out.metrics)["log_ratio_clamped"] == pytest.approx(4 / 6)


def test_a_log_ratio_exactly_at_the_bound_keeps_its_gradient_and_is_not_counted():
    logps = torch.tensor([-20.0], requires_grad=True)
    mask, old = torch.ones(1, dtype=torch.bool), torch.zeros(1)
    out = policy_loss(logps, torch.ones(1), PolicyLoss(aggregate="token_mean"), mask=mask, old_logps=old)
    out.loss.backward()
    assert logps.grad.item() == -torch.tensor(-20.0).exp().item()
    assert finish(out.metrics)["log_ratio_clamped"] == 0.0


@pytest.mark.parametrize(("kind", "share"), [("k1", 0.0), ("k2", 0.0), ("k3", 1.0), ("k3_ratio", 1.0)])
def test_only_an_exponentiated_kl_counts_as_clamped(kind, share):
    spec = PolicyLoss(kl=KL(kind, 0.1), aggregate="token_mean")
    far, near, mask = torch.full((1,), -30.0), torch.zeros(1), torch.ones(1, dtype=torch.bool)
    for logps, ref, expected in ((far, near, share), (near, far, 0.0)):  # e^d overflows on one side alone
        out = policy_loss(logps, torch.ones(1), spec, mask=mask, ref_logps=ref)
        assert finish(out.metrics)["log_ratio_clamped"] == expected


def test_an_infinite_log_probability_is_counted_even_where_the_loss_is_finite():
    logps, mask = torch.tensor([-torch.inf, -1.0]), torch.ones(2, dtype=torch.bool)
    out = policy_loss(logps, torch.ones(2), PolicyLoss(aggregate="token_mean"), mask=mask, old_logps=-torch.ones(2))
    assert out.loss.isfinite()
    assert finish(out.metrics)["nonfinite_rows"] == 0.5


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_correction_weight_exactly_at_its_bounds_is_kept(level):
    spec = PolicyLoss(correction=Correction("mask", level, high=1.0, low=1.0))
    logps, mask = -torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    out = policy_loss(logps, torch.ones(1), spec, mask=mask, old_logps=logps, sampling_logps=logps)
    assert out.loss.item() == -1.0
    assert finish(out.metrics)["sampling/kept_fraction"] == 1.0


def test_k3_keeps_its_digits_where_policy_and_reference_nearly_agree():
    d = torch.tensor([1e-4], dtype=torch.float32)
    term = reference.kl_term("k3", d, torch.zeros(1))
    assert term.loss.item() == pytest.approx(5.000166e-9, rel=2e-3)  # e^d - d - 1 in float32 gives 0 or 1.2e-7
    assert term.dlogp.item() == pytest.approx(-1.00005e-4, rel=1e-6)


GAPS = torch.tensor([1e-3, 0.1, 1.0, 10.0, 18.0, 19.9, 20.1, 60.0, 1e4], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3_ratio", "k1+", "k3+"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_gradient_of_a_kl_keeps_its_sign_and_its_digits_at_every_distance(name, kind, dtype):
    """On policy, by paper: k1 1, k2 -d, k3 1 - e^d, k3_ratio -d; only k3 is held, at 0, where e^d would overflow.

    The sum of rho k3 and rho (1 - e^d) lost its digits below the bound, and turned its sign beyond it.
    https://github.com/OpenRLHF/OpenRLHF/issues/1335
    """
    d = torch.cat([GAPS, -GAPS]).to(dtype).double()  # ref - logp
    logps = torch.where(d > 0, -d, 0).to(dtype).requires_grad_()
    spec = PolicyLoss(surrogate=Reinforce(), kl=KL(kind, 1.0), aggregate="token_sum")
    arguments = {"mask": torch.ones(len(d), dtype=torch.bool), "normalizer": 1.0}
    with using(name) as backend:
        out = policy_loss(
            logps, torch.zeros(len(d)), spec, ref_logps=torch.where(d > 0, 0, d).to(dtype), backend=backend, **arguments
        )
    out.loss.backward()
    by_paper = {"k1": torch.ones_like(d), "k3": torch.where(d > 20, 0, -torch.expm1(d))}.get(kind, -d)
    rounding = {torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(logps.grad.double(), by_paper, rtol=rounding, atol=0)
    values = {"k1": -d, "k1+": -d, "k2": d * d / 2}.get(kind, torch.expm1(d.clamp(max=20)) - d.clamp(max=20))
    assert out.loss.item() == pytest.approx(values.sum().item(), rel=1e-6, abs=1e-6 * values.abs().max().item())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_kl_weighted_by_the_ratio_takes_the_loss_s_ratio_which_may_be_the_sequence_s(name):
    """As TRL's default with sequence-level sampling: https://github.com/huggingface/trl/pull/6549."""
    data, spec = batch(), PolicyLoss("sequence", SURROGATES["clip"], KL("k3_ratio", 0.04), "token_mean")
    g = torch.Generator().manual_seed(0)
    near = 0.2 * torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
    advantages = torch.randn(5, 1, generator=g, dtype=torch.float64)
    logps = data["logps"].detach().nan_to_num(-1.0, -1.0, -1.0).requires_grad_()
    old, ref, mask = logps.detach() + near[0], logps.detach() + near[1], torch.ones(5, 7, dtype=torch.bool)
    with using(name) as backend:
        out = policy_loss(logps, advantages[:, 0], spec, mask=mask, old_logps=old, ref_logps=ref, backend=backend)
    ratio, d = (logps - old).mean(1, keepdim=True).exp(), ref - logps
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    expected = (surrogate + 0.04 * ratio * (d.exp() - d - 1)).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(loss, logps)[0] for loss in (out.loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_on_policy_ratio_is_exactly_one(ratio):
    data = batch(torch.float32)
    spec = PolicyLoss(ratio, SURROGATES["clip"], aggregate="token_mean")
    out = policy_loss(data["logps"], data["advantages"], spec, mask=data["mask"])
    metrics = finish(out.metrics)
    assert metrics["ratio/mean"] == 1.0
    assert metrics["ratio/max"] == 1.0
    assert metrics["old_kl"] == 0.0
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0.0
    given = policy_loss(data["logps"], data["advantages"], spec, mask=data["mask"], old_logps=data["logps"])
    assert torch.equal(out.loss, given.loss)
    a, b = (torch.autograd.grad(loss, data["logps"])[0] for loss in (out.loss, given.loss))
    assert torch.equal(a, b)
    assert a.abs().sum() > 0


def test_cispo_counts_clamped_ratios_of_both_signs():
    logps = torch.tensor([0.0, 0.0, 2.0, 2.0, -2.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    spec = PolicyLoss("token", Cispo(ratio_max=5.0, ratio_min=0.5), aggregate="token_mean")
    mask = torch.ones(5, dtype=torch.bool)
    metrics = finish(policy_loss(logps, advantages, spec, mask=mask, old_logps=torch.zeros(5)).metrics)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(2 / 5)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(1 / 5)
    assert metrics["gradient_fraction"] == 1.0


def test_metrics_are_what_their_names_say():
    data = batch()
    spec = PolicyLoss("token", Clip(0.2, 0.28), KL("k3", 0.1), correction=Correction("mask", "token", 1.3, low=0.8))
    metrics = finish(run(spec, data).metrics)
    mask = data["mask"]
    names = ("logps", "advantages", "old_logps", "ref_logps", "sampling_logps", "entropy")
    logps, advantages, old, ref, sampling, entropy = (data[name].detach()[mask] for name in names)
    log_ratio, d, moved = (logps - old).clamp(-20, 20), (ref - logps).clamp(max=20), (logps - old).clamp(max=20)
    ratio, weight = log_ratio.exp(), (old - sampling).clamp(-20, 20).exp()
    kept = (weight >= 0.8) & (weight <= 1.3)
    expected = {
        "clip_ratio/low_mean": ((ratio < 0.8) & (advantages < 0)).double().mean(),
        "clip_ratio/high_mean": ((ratio > 1.28) & (advantages > 0)).double().mean(),
        "ratio/mean": ratio.mean(),
        "ratio/max": ratio.max(),
        "kl": (d.exp() - d - 1).mean(),
        "old_kl": (moved.exp() - moved - 1).mean(),
        "entropy": entropy.mean(),
        "sampling/sampling_logp_difference/mean": (old - sampling).abs().mean(),
        "sampling/sampling_logp_difference/max": (old - sampling).abs().max(),
        "sampling/importance_sampling_ratio/mean": (weight * kept).mean(),
        "sampling/kept_fraction": kept.double().mean(),
        "log_ratio_clamped": torch.tensor(3 / 17, dtype=torch.float64),
        "nonfinite_rows": torch.tensor(0.0),
    }
    grad = torch.autograd.grad(run(spec, data).loss, data["logps"])[0][mask]
    expected["gradient_fraction"] = (grad != 0).double().mean()
    assert set(expected) == set(metrics) == set(METRICS)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-12, abs=1e-15), name


def test_merged_metrics_of_two_halves_are_those_of_the_whole():
    data = batch()
    spec = PolicyLoss("token", Cispo(2.0), KL("k3", 0.1), "token_sum", correction=CORRECTIONS[1])
    names = ("logps", "advantages", "weights", "mask", "old_logps", "ref_logps", "sampling_logps", "entropy")
    data["weights"] = data["mask"].double()
    flat = [data[name].detach().reshape(-1) for name in names]
    parts = [[x[part] for x in flat] for part in (slice(0, 21), slice(21, 28), slice(28, 35))]
    assert not parts[1][3].any()  # the second part is fully masked
    tables = [
        reference.forward(logps, LossTokens(*tokens), entropy, None, 0, spec)[3]
        for logps, *tokens, entropy in (*parts, flat)
    ]
    whole = tables.pop()
    torch.testing.assert_close(merge_metrics(merge_metrics(*tables[:2]), tables[2]), whole, rtol=1e-12, atol=1e-12)


def op_inputs(ratio="sequence"):
    data = batch(torch.float32)
    names = ("logps", "advantages", "weights", "mask", "old_logps", "ref_logps", "sampling_logps", "entropy")
    data["weights"] = data["mask"].float() / 18
    flat = [data[name].detach().reshape(-1).clone() for name in names]
    spec = PolicyLoss(ratio, Clip(0.2, 0.2), KL("k3", 0.1), entropy_coef=0.1, correction=CORRECTIONS[3])
    ids = torch.arange(5).repeat_interleave(7)
    return (flat[0].requires_grad_(), *flat[1:7], flat[7].requires_grad_(), ids, 5, spec.code, "auto")


def test_operator_registration_passes_opcheck():
    torch.library.opcheck(op, op_inputs())
    off = list(op_inputs())
    off[4:9] = [None] * 5
    off[10] = PolicyLoss().code
    torch.library.opcheck(op, tuple(off))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_compiled_equals_eager(ratio):
    args = op_inputs(ratio)

    def loss_and_grads(function):
        loss = function(*args)[0]
        return loss, *torch.autograd.grad(loss, (args[0], args[7]))

    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    for a, b in zip(loss_and_grads(compiled), loss_and_grads(op), strict=True):
        assert torch.equal(a, b)


def test_public_function_compiles_without_graph_breaks_and_keeps_specs_and_shapes_apart():
    data = batch(torch.float32)
    smaller = {name: x.detach()[:, :5].clone().requires_grad_(x.requires_grad) for name, x in data.items()}
    compiled = torch.compile(lambda spec, data: run(spec, data, "auto").loss, fullgraph=True, backend="aot_eager")
    specs = [PolicyLoss("sequence", Clip(0.2, 0.2), KL("k3", c), "prompt_mean", entropy_coef=0.1) for c in (0.1, 0.2)]
    losses = []
    for spec in specs:
        for inputs in (data, smaller):
            eager, ours = run(spec, inputs, "auto").loss, compiled(spec, inputs)
            assert torch.equal(eager, ours)
            a, b = (torch.autograd.grad(x, (inputs["logps"], inputs["entropy"])) for x in (eager, ours))
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            losses.append(ours.item())
    assert len(set(losses)) == 4


def test_backward_twice_doubles_the_gradient_and_scales_with_the_upstream_one():
    args = op_inputs()
    loss = op(*args)[0]
    (3 * loss).backward(retain_graph=True)
    once = args[0].grad.clone(), args[7].grad.clone()
    (3 * loss).backward()
    _, dlogps, dentropy, _ = op(*args)
    for leaf, first, derivative in zip((args[0], args[7]), once, (dlogps, dentropy), strict=True):
        assert torch.equal(first, 3 * derivative)
        assert torch.equal(leaf.grad, 2 * first)


def test_only_logps_and_entropy_get_a_gradient_and_only_if_they_ask():
    spec = PolicyLoss(kl=KL("k3", 0.1), entropy_coef=0.1, correction=CORRECTIONS[1])
    constants = ("advantages", "old_logps", "ref_logps", "sampling_logps")
    for wanted in ("logps", "entropy"):
        data = batch()
        for name in ("logps", "entropy", *constants):
            data[name] = data[name].detach().requires_grad_(name == wanted or name in constants)
        run(spec, data).loss.backward()
        assert [name for name in ("logps", "entropy", *constants) if data[name].grad is not None] == [wanted]


def test_a_loss_of_constants_asks_for_no_gradient():
    data = {name: x.detach() for name, x in batch().items()}
    for name in ("advantages", "old_logps", "ref_logps", "sampling_logps"):
        data[name].requires_grad_()
    assert not run(PolicyLoss(kl=KL("k3", 0.1), correction=CORRECTIONS[1]), data).loss.requires_grad


def test_inputs_of_any_layout_give_the_same_bits():
    data = batch(torch.float32)
    spec = PolicyLoss("sequence", Clip(0.2, 0.28), KL("k3", 0.1), entropy_coef=0.1, correction=CORRECTIONS[4])
    strided = {}
    for name, x in data.items():
        wide = torch.empty(7, 10, dtype=x.dtype)
        strided[name] = wide.t()[::2]  # transposed, then every other row
        strided[name].copy_(x.detach())
        assert not strided[name].is_contiguous()
    strided["logps"].requires_grad_()
    a, b = run(spec, data).loss, run(spec, strided).loss
    assert torch.equal(a, b)
    grads = [torch.autograd.grad(loss, x["logps"])[0] for loss, x in ((a, data), (b, strided))]
    assert torch.equal(*grads)


def test_advantages_per_sequence_equal_their_expansion():
    data = batch(torch.float32)
    per_sequence = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5])
    expanded = data | {"advantages": per_sequence[:, None].expand(5, 7)}
    assert torch.equal(
        run(PolicyLoss(), data | {"advantages": per_sequence}).loss,
        run(PolicyLoss(), expanded).loss,
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_empty_batches_have_loss_zero_and_a_backward(backend, ratio, shape):
    logps = torch.zeros(shape, requires_grad=True)
    spec = PolicyLoss(ratio, Clip(0.2, 0.2))
    mask = torch.ones(shape, dtype=torch.bool)
    out = policy_loss(logps, torch.zeros(shape[0]), spec, mask=mask, old_logps=logps, backend=backend)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert logps.grad.shape == shape
    assert finish(out.metrics) == {}


def test_bfloat16_log_probabilities_are_computed_in_float32():
    data = batch(torch.float32)
    half = data["logps"].detach().bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    losses = [run(PolicyLoss(), data | {"logps": x}).loss for x in (half, full)]
    assert torch.equal(*losses)
    for loss in losses:
        assert loss.dtype == torch.float32
        loss.backward()
    assert torch.equal(half.grad, full.grad.bfloat16())


def test_each_run_gives_the_same_bits():
    data = batch(torch.float32)
    spec = PolicyLoss("sequence", Sapo(), KL("k3_ratio", 0.1), correction=CORRECTIONS[4])
    results = []
    for _ in range(20):
        loss = run(spec, data).loss
        results.append((loss, torch.autograd.grad(loss, data["logps"])[0]))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def long_batch():
    """(logps, advantages, weights, mask, old, ref, sampling, entropy) of 5,003 tokens, then their sequences."""
    logps = -3 * torch.rand(5003)
    old, ref, sampling = (logps + 0.1 * torch.randn(5003) for _ in range(3))
    mask = torch.rand(5003) < 0.8
    tokens = (logps, torch.randn(5003), torch.rand(5003) / 5003, mask, old, ref, sampling, torch.rand(5003))
    return tokens, torch.arange(5003) // 700, 8


LONG_SPECS = [
    PolicyLoss("token", Clip(0.2, 0.28, dual=3.0), KL("k3_ratio", 0.1), entropy_coef=0.1, correction=CORRECTIONS[1]),
    PolicyLoss("sequence", Clip(0.02, 0.02), KL("k3", 0.1), entropy_coef=0.1, correction=CORRECTIONS[3]),
    PolicyLoss("token", Cispo(1.3), KL("k2", 0.1), correction=CORRECTIONS[4]),
    PolicyLoss("sequence", Sapo(), KL("k1", 0.1), correction=CORRECTIONS[2]),
]
each_long_spec = pytest.mark.parametrize("spec", LONG_SPECS, ids=["clip", "gspo", "cispo", "sapo"])


@each_long_spec
def test_threads_change_no_bit(native_isa, spec):
    tokens, ids, sequences = long_batch()
    one, two = (with_threads(n, lambda: op(*tokens, ids, sequences, spec.code, "cpu")) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@each_long_spec
def test_triton_takes_the_tokens_of_sequences_in_any_order(spec):
    tokens, ids, sequences = long_batch()
    order = torch.randperm(len(ids))
    straight = op(*tokens, ids, sequences, spec.code, "triton")
    shuffled = op(*(x[order] for x in tokens), ids[order], sequences, spec.code, "triton")
    if spec.separable:  # a sequence's mean is a sum, which has an order
        assert torch.equal(shuffled[1], straight[1][order])
    assert torch.equal(shuffled[2], straight[2][order])
    for a, b in zip(shuffled, (straight[0], straight[1][order], straight[2][order], straight[3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@each_long_spec
def test_native_float32_is_no_worse_than_the_reference_in_float32(native_isa, spec):
    assert_float32_no_worse(spec, "cpu")


@each_long_spec
def test_triton_float32_in_many_blocks_is_no_worse_than_the_reference_in_float32(spec):
    with tuning.trying("policy_loss total", PARTS=4):  # the sums of ten blocks in three turns
        assert_float32_no_worse(spec, "triton")


def assert_float32_no_worse(spec, backend):
    tokens, ids, sequences = long_batch()
    wide = [x if x.dtype == torch.bool else x.double() for x in tokens]
    got = op(*tokens, ids, sequences, spec.code, backend)
    plain, truth = (op(*x, ids, sequences, spec.code, "reference") for x in (tokens, wide))
    for name, *values in zip(("loss", "dlogps", "dentropy", "metrics"), got, plain, truth, strict=True):
        if name == "loss":  # one number: an error of the sum, not of a token
            torch.testing.assert_close(values[0].double(), values[2], rtol=1e-6, atol=1e-7)
        elif name == "metrics":
            torch.testing.assert_close(values[0].double(), values[2], rtol=1e-6, atol=1e-6)
        else:
            assert_no_worse(*values, name=name)


GOOD = {"mask": torch.ones(2, 3, dtype=torch.bool)}
WRONG = [
    pytest.param(PolicyLoss(), {"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask: expected shape", id="mask shape"),
    pytest.param(PolicyLoss(), {"mask": torch.ones(2, 3)}, "mask: expected a bool or integer", id="float mask"),
    pytest.param(PolicyLoss(), GOOD | {"old_logps": torch.zeros(2, 2)}, "old_logps: expected shape", id="old shape"),
    pytest.param(PolicyLoss(), GOOD | {"entropy": torch.zeros(3, 2)}, "entropy: expected shape", id="entropy shape"),
    pytest.param(PolicyLoss(kl=KL("k3", 0.1)), GOOD, "ref_logps: expected a tensor", id="no ref_logps"),
    pytest.param(PolicyLoss(entropy_coef=0.1), GOOD, "entropy: expected a tensor", id="no entropy"),
    pytest.param(PolicyLoss(correction=CORRECTIONS[1]), GOOD, "sampling_logps: expected", id="no sampling_logps"),
    pytest.param(PolicyLoss(aggregate="prompt_mean"), GOOD, "group_ids: expected", id="no group_ids"),
    pytest.param(PolicyLoss(aggregate="token_sum"), GOOD, "normalizer: expected", id="no normalizer"),
    pytest.param(PolicyLoss(), GOOD | {"normalizer": 0.0}, "normalizer: expected a positive", id="normalizer 0"),
    pytest.param(PolicyLoss(), GOOD | {"normalizer": torch.ones(2)}, "normalizer: expected a 0-d", id="normalizer 1-d"),
    pytest.param(PolicyLoss(), GOOD | {"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens: expected None", id="padded"),
    pytest.param("GRPO", GOOD, "spec: expected a PolicyLoss, such as .*, got 'GRPO'", id="name of a spec"),
    pytest.param(PolicyLoss(), GOOD | {"backend": "referense"}, "Did you mean 'reference'", id="backend"),
]


@pytest.mark.parametrize(("spec", "arguments", "message"), WRONG)
def test_wrong_arguments_are_refused_with_the_name_and_the_values(spec, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        policy_loss(torch.zeros(2, 3), torch.zeros(2), spec, **arguments)


@pytest.mark.parametrize("advantages", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(())])
def test_advantages_of_another_shape_are_refused_instead_of_broadcast(advantages):
    with pytest.raises(ValueError, match="advantages: expected shape"):
        policy_loss(torch.zeros(2, 3), advantages, PolicyLoss(), **GOOD)


@pytest.mark.parametrize(
    "spec",
    [PolicyLoss(ratio="sequence", aggregate="token_mean"), PolicyLoss(aggregate="seq_mean_token_mean")],
)
def test_packed_log_probabilities_without_bounds_are_refused_where_sequences_matter(spec):
    arguments = {"mask": torch.ones(6, dtype=torch.bool)}
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        policy_loss(torch.zeros(6), torch.zeros(6), spec, **arguments)
    policy_loss(torch.zeros(6), torch.zeros(6), replace(spec, ratio="token", aggregate="token_mean"), **arguments)


def test_double_backward_is_refused():
    logps = torch.randn(4, dtype=torch.float64, requires_grad=True)
    out = policy_loss(
        logps,
        torch.randn(4, dtype=torch.float64),
        PolicyLoss(aggregate="token_mean"),
        mask=torch.ones(4, dtype=torch.bool),
    )
    (grad,) = torch.autograd.grad(out.loss, logps, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
