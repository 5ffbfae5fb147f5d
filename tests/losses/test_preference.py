"""Preference losses against their papers' formulas, and what must not change them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid, pad

from fastrl.losses import presets
from fastrl.losses.answer_rows import split_pairs
from fastrl.losses.metrics import finish, merge
from fastrl.losses.preference import preference_loss
from fastrl.losses.unpaired import mismatched_kl, unpaired_preference_loss
from fastrl.preference_spec import (
    JensenShannon,
    LogOdds,
    Power,
    PreferenceLoss,
    PreferenceMix,
    Sft,
    UnpairedPreferenceLoss,
)

CHOSEN, REJECTED = (4, 1, 6, 2), (2, 5, 6, 1)  # tokens of each answer
PAIRED = {n: s for n, s in presets.PREFERENCE_PRESETS.items() if not isinstance(s, UnpairedPreferenceLoss)}
UNPAIRED = {n: s for n, s in presets.PREFERENCE_PRESETS.items() if n not in PAIRED}
every_pair_loss = pytest.mark.parametrize("name", PAIRED)
LABELS = torch.tensor([True, False, False, True])
KL = 0.75


def batch(dtype=torch.float64, shift=0.0):
    """Keyword arguments of `preference_loss`, padded: (P, T) and NaN where the mask is False."""
    g = torch.Generator().manual_seed(7)
    data = {}
    for side, lengths, sign in (("chosen", CHOSEN, 1), ("rejected", REJECTED, -1)):
        size = (len(lengths), max(lengths))
        mask = torch.arange(size[1]) < torch.tensor(lengths)[:, None]
        logps = -3 * torch.rand(size, generator=g, dtype=torch.float64)
        noise = 2 * torch.randn(size, generator=g, dtype=torch.float64)
        squares = -torch.rand(size, generator=g, dtype=torch.float64)
        tensors = {
            f"{side}_logps": logps,
            f"ref_{side}_logps": logps + noise - sign * shift,
            f"{side}_log_sum_sq_probs": squares,
        }
        data |= {key: x.masked_fill(~mask, torch.nan).to(dtype) for key, x in tensors.items()}
        data[f"{side}_mask"] = mask
    return data


def evaluate(spec, data, **more):
    """Loss, and gradients by both log-probabilities."""
    data = dict(data)
    leaves = [data.pop(key).detach().requires_grad_() for key in ("chosen_logps", "rejected_logps")]
    loss = preference_loss(*leaves, spec, **data, **more).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def assert_same(ours, expected, tolerance=1e-12):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert expected[1].abs().sum() > 0


# The papers' formulas, pair by pair, on plain lists of tokens.


def answers(side):
    data = batch()
    names = (f"{side}_logps", f"ref_{side}_logps", f"{side}_log_sum_sq_probs")
    return [tuple(data[name][i][data[f"{side}_mask"][i]] for name in names) for i in range(len(CHOSEN))]


def h(answer):
    return (answer[0] - answer[1]).sum()


def mean_of_pairs(loss):
    return sum(loss(w, r) for w, r in zip(answers("chosen"), answers("rejected"), strict=True)) / len(CHOSEN)


def margin(w, r):
    return 0.1 * (h(w) - h(r))


def dpo(w, r):
    return -logsigmoid(margin(w, r))


def exo(w, r):
    q, e = torch.sigmoid(margin(w, r)), 1e-3
    return q * (q / (1 - e)).log() + (1 - q) * ((1 - q) / e).log()


def bco(w, r):
    return -logsigmoid(0.1 * h(w)) - logsigmoid(-0.1 * h(r))


def nca(w, r):
    return -logsigmoid(0.1 * h(w)) - 0.5 * logsigmoid(-0.1 * h(w)) - 0.5 * logsigmoid(-0.1 * h(r))


def discopop(w, r):
    m = torch.sigmoid(margin(w, r) / 0.05)
    return (1 - m) * dpo(w, r) + m * (-margin(w, r)).exp()


def aot():
    policy = sorted(float(w[0].sum() - r[0].sum()) for w, r in zip(answers("chosen"), answers("rejected"), strict=True))
    ref = sorted(float(w[1].sum() - r[1].sum()) for w, r in zip(answers("chosen"), answers("rejected"), strict=True))
    return torch.tensor([math.log1p(math.exp(-0.1 * (a - b))) for a, b in zip(policy, ref, strict=True)]).mean()


def aot_unpaired():
    sides = [sorted(float(h(answer)) for answer in answers(side)) for side in ("chosen", "rejected")]
    return torch.tensor([math.log1p(math.exp(-0.1 * (a - b))) for a, b in zip(*sides, strict=True)]).mean()


def ld(answer, shared, alpha=0.5):
    return sum(x[:shared].sum() + alpha * x[shared:].sum() for x in (answer[0], -answer[1]))


def ld_dpo(w, r):
    shared = min(len(w[0]), len(r[0]))
    return -logsigmoid(0.1 * (ld(w, shared) - ld(r, shared)))


def wpo(w, r):
    return (w[0] - w[2]).mean().exp() * (r[0] - r[2]).mean().exp() * dpo(w, r)


def alpha_reward(answer, alpha=0.25):
    return (1 - answer[0].mean().exp() ** -alpha) / alpha


def orpo(w, r):
    odds = [p / (1 - p) for p in (w[0].mean().exp(), r[0].mean().exp())]
    return -w[0].mean() - 0.1 * logsigmoid((odds[0] / odds[1]).log())


FORMULAS = {
    "DPO": dpo,
    "CDPO": lambda w, r: -0.9 * logsigmoid(margin(w, r)) - 0.1 * logsigmoid(-margin(w, r)),
    "ROBUST_DPO": lambda w, r: (-0.9 * logsigmoid(margin(w, r)) + 0.1 * logsigmoid(-margin(w, r))) / 0.8,
    "DPO_NORM": lambda w, r: -logsigmoid(0.1 * ((w[0] - w[1]).mean() - (r[0] - r[1]).mean())),
    "SLIC": lambda w, r: (1 - margin(w, r)).clamp(min=0),
    "IPO": lambda w, r: ((w[0] - w[1]).mean() - (r[0] - r[1]).mean() - 1 / (2 * 0.1)) ** 2,
    "EXO": exo,
    "NCA": nca,
    "BCO": bco,
    "SPPO_HARD": lambda w, r: (h(w) - 5) ** 2 + (h(r) + 5) ** 2,
    "AOT": aot,
    "AOT_UNPAIRED": aot_unpaired,
    "APO_ZERO": lambda w, r: 1 - torch.sigmoid(0.1 * h(w)) + torch.sigmoid(0.1 * h(r)),
    "APO_DOWN": lambda w, r: torch.sigmoid(0.1 * h(w)) + 1 - torch.sigmoid(0.1 * h(w) - 0.1 * h(r)),
    "DISCOPOP": discopop,
    "LD_DPO": ld_dpo,
    "WPO": wpo,
    "RPO": lambda w, r: dpo(w, r) - w[0].mean(),
    "MPO": lambda w, r: 0.8 * dpo(w, r) + 0.2 * bco(w, r) - w[0].mean(),
    "SIMPO": lambda w, r: -logsigmoid(2 * w[0].mean() - 2 * r[0].mean() - 0.5),
    "ALPHAPO": lambda w, r: -logsigmoid(2 * alpha_reward(w) - 2 * alpha_reward(r) - 0.5),
    "CPO": lambda w, r: -logsigmoid(0.1 * (w[0].sum() - r[0].sum())) - w[0].sum(),
    "ORPO": orpo,
}


@every_pair_loss
def test_preset_equals_its_paper_formula(name):
    formula = FORMULAS[name]
    expected = formula() if name.startswith("AOT") else mean_of_pairs(formula)
    torch.testing.assert_close(
        evaluate(PAIRED[name], batch())[0], expected.double(), rtol=1e-6 if name.startswith("AOT") else 1e-12, atol=0
    )


@pytest.mark.parametrize(("name", "z"), [("KTO", KL), ("KTO", -KL), ("APO_ZERO_UNPAIRED", None)])
def test_unpaired_preset_equals_its_paper_formula(name, z):
    data = batch()
    arguments = {"mask": data["chosen_mask"], "ref_logps": data["ref_chosen_logps"], "kl": z}
    out = unpaired_preference_loss(data["chosen_logps"], LABELS, UNPAIRED[name], **arguments)
    reference = max(0.0, z or 0.0)
    rewards = [0.1 * (h(answer) - reference) for answer in answers("chosen")]
    values = [1 - torch.sigmoid(r if good else -r) for r, good in zip(rewards, LABELS, strict=True)]
    torch.testing.assert_close(out.loss, sum(values) / len(values), rtol=1e-12, atol=0)


def test_the_table_holds_every_preset_under_its_own_name():
    kinds = PreferenceLoss | PreferenceMix | UnpairedPreferenceLoss
    assert {
        name: value for name, value in vars(presets).items() if isinstance(value, kinds)
    } == presets.PREFERENCE_PRESETS
    assert set(FORMULAS) == set(PAIRED)


def test_ipo_by_sums_is_the_equation_as_printed():
    expected = mean_of_pairs(lambda w, r: (h(w) - h(r) - 1 / (2 * 0.1)) ** 2)
    torch.testing.assert_close(evaluate(replace(presets.IPO, length="sum"), batch())[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("transform", [Power(-1.0), Power(-0.7), JensenShannon()])
@pytest.mark.parametrize("length", ["mean", "reward_mean"])
def test_gradients_of_transforms_pass_gradcheck(transform, length):
    check_gradient(PreferenceLoss(length=length, transform=transform))


@every_pair_loss
def test_gradients_pass_gradcheck(name):
    check_gradient(PAIRED[name])


def check_gradient(spec):
    data = batch()
    weighted = isinstance(spec, PreferenceLoss) and spec.match == "pairs"
    data["weights"] = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64) if weighted else None
    masks = data["chosen_mask"], data["rejected_mask"]
    leaves = [data.pop(f"{side}_logps").nan_to_num().requires_grad_() for side in ("chosen", "rejected")]
    wpo_is_constant = isinstance(spec, PreferenceLoss) and spec.weighting == "wpo"
    if wpo_is_constant:  # a finite difference would see the weights move
        data["weights"] = torch.ones(4, dtype=torch.float64)
        for side, leaf in zip(("chosen", "rejected"), leaves, strict=True):
            squares = data.pop(f"{side}_log_sum_sq_probs")
            weight = torch.where(data[f"{side}_mask"], leaf.detach() - squares, 0).sum(1) / data[f"{side}_mask"].sum(1)
            data["weights"] = data["weights"] * weight.exp()
        analytic = evaluate(spec, batch())
        spec = replace(spec, weighting="none")

    def loss(*logps):
        return preference_loss(*logps, spec, **data).loss

    assert torch.autograd.gradcheck(loss, leaves)
    if wpo_is_constant:
        assert_same(analytic, evaluate(spec, {"chosen_logps": leaves[0], "rejected_logps": leaves[1], **data}))
    for mask, grad in zip(masks, torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True), strict=True):
        assert (grad[~mask] == 0).all()


@every_pair_loss
def test_masked_tokens_have_gradient_exactly_zero_whatever_they_hold(name):
    data = batch(torch.float32)
    loss, *grads = evaluate(PAIRED[name], data)
    assert loss.isfinite()
    for side, grad in zip(("chosen", "rejected"), grads, strict=True):
        assert grad.isfinite().all()
        assert (grad[~data[f"{side}_mask"]] == 0).all()


@every_pair_loss
def test_padding_and_packing_change_nothing(name):
    data, spec = batch(), PAIRED[name]
    expected = evaluate(spec, data)
    padded = {key: pad(x, (2, 3), value=0 if "mask" in key else torch.nan) for key, x in data.items()}
    ours = evaluate(spec, padded)
    assert_same((ours[0], *(x[:, 2:-3] for x in ours[1:])), expected)

    tail = 3  # tokens of no sequence, as left by a fixed-size buffer
    packed = {}
    for side, lengths in (("chosen", CHOSEN), ("rejected", REJECTED)):
        mask = data[f"{side}_mask"]
        for key in (f"{side}_logps", f"ref_{side}_logps", f"{side}_log_sum_sq_probs"):
            packed[key] = torch.cat([data[key][mask], torch.full((tail,), torch.nan, dtype=torch.float64)])
        packed[f"{side}_cu_seqlens"] = torch.tensor((0, *lengths)).cumsum(0)
    ours = evaluate(spec, packed)
    masks = (data["chosen_mask"], data["rejected_mask"])
    live = [grad[mask] for grad, mask in zip(expected[1:], masks, strict=True)]
    assert_same((ours[0], *(x[:-tail] for x in ours[1:])), (expected[0], *live))
    assert all((x[-tail:] == 0).all() for x in ours[1:])


@every_pair_loss
def test_order_of_pairs_changes_nothing(name):
    data, order = batch(), torch.tensor([2, 0, 3, 1])
    expected = evaluate(PAIRED[name], data)
    ours = evaluate(PAIRED[name], {key: x[order] for key, x in data.items()})
    assert_same(ours, (expected[0], *(x[order] for x in expected[1:])))


@pytest.mark.parametrize("split", [[1, 1, 1, 1], [2, 2], [3, 1]], ids=["one", "two", "uneven"])
@pytest.mark.parametrize("name", [*(n for n in PAIRED if not n.startswith("AOT")), "TRL_RPO"])
def test_micro_batches_with_a_global_normalizer_add_up_to_the_batch(name, split):
    data = batch()
    spec = PAIRED.get(name) or PreferenceMix(((1.0, presets.DPO), (0.5, Sft("token_mean"))))
    counts = {"normalizer": float(len(CHOSEN)), "token_normalizer": float(sum(CHOSEN))}
    if name != "TRL_RPO":
        del counts["token_normalizer"]
    parts = [dict(zip(data, part, strict=True)) for part in zip(*(x.split(split) for x in data.values()), strict=True)]
    losses, *grads = zip(*(evaluate(spec, part, **counts) for part in parts), strict=True)
    assert_same((sum(losses), *(torch.cat(g) for g in grads)), evaluate(spec, data))
    whole = finish(metrics_of(spec, data))
    assert finish(merge(metrics_of(spec, part, **counts) for part in parts)) == pytest.approx(whole)


def metrics_of(spec, data, **more):
    return preference_loss(data["chosen_logps"], data["rejected_logps"], spec, **more, **{
        key: x for key, x in data.items() if key not in ("chosen_logps", "rejected_logps")
    }).metrics  # fmt: skip


@pytest.mark.parametrize("split", [[1, 1, 1, 1], [2, 2], [3, 1]], ids=["one", "two", "uneven"])
def test_kto_micro_batches_with_a_global_normalizer_and_kl_add_up_to_the_batch(split):
    data = batch()
    tensors = [data["chosen_logps"].requires_grad_(), LABELS, data["ref_chosen_logps"], data["chosen_mask"]]

    def loss(logps, labels, ref_logps, mask, **more):
        return unpaired_preference_loss(logps, labels, presets.KTO, ref_logps=ref_logps, mask=mask, kl=KL, **more).loss

    whole = loss(*tensors)
    parts = sum(loss(*part, normalizer=4.0) for part in zip(*(x.split(split) for x in tensors), strict=True))
    grads = [torch.autograd.grad(x, tensors[0])[0] for x in (parts, whole)]
    assert_same((parts, grads[0]), (whole, grads[1]))
    pieces = zip(*(x.split(split) for x in tensors), strict=True)
    sums, counts = zip(*(mismatched_kl(logps, ref, mask=mask) for logps, _, ref, mask in pieces), strict=True)
    torch.testing.assert_close((sum(sums), sum(counts)), mismatched_kl(tensors[0], tensors[2], mask=tensors[3]))


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@every_pair_loss
def test_log_ratios_of_ten_thousand_leave_loss_and_gradient_finite(name, shift):
    loss, *grads = evaluate(PAIRED[name], batch(torch.float32, shift=shift))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("transform", [Power(-1.0), Power(1.0), JensenShannon()])
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_divergences_of_extreme_log_ratios_are_finite(transform, shift):
    loss, *grads = evaluate(PreferenceLoss(transform=transform), batch(torch.float32, shift=shift))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


def test_odds_of_a_certain_answer_are_finite():
    logps = torch.zeros(1, 2, requires_grad=True)
    rejected = torch.full((1, 2), -1e-9, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = preference_loss(logps, rejected, presets.ORPO, chosen_mask=mask, rejected_mask=mask).loss
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, [logps, rejected]))


def test_dpo_on_a_tabular_policy_reaches_the_closed_form_optimum():
    """pi* = pi_ref exp(r / beta) / Z when each pair is labelled by Bradley-Terry on r: arXiv:2305.18290 eq. 4."""
    prompts, responses, beta = 4, 5, 0.7
    rewards, ref = torch.randn(2, prompts, responses, dtype=torch.float64)
    ref = ref.log_softmax(-1)
    table = ref.clone().requires_grad_()
    prompt, first, second = torch.tensor(
        [(p, i, j) for p in range(prompts) for i in range(responses) for j in range(i)]
    ).T
    labels = torch.sigmoid(rewards[prompt, first] - rewards[prompt, second])
    mask = torch.ones(len(prompt), 1, dtype=torch.bool)
    optimizer = torch.optim.LBFGS([table], max_iter=300, tolerance_grad=1e-12, tolerance_change=0)

    def step():
        optimizer.zero_grad()
        policy = table.log_softmax(-1)
        sides = [policy[prompt, answer][:, None] for answer in (first, second)]
        loss = preference_loss(
            *sides, replace(presets.DPO, beta=beta), chosen_mask=mask, rejected_mask=mask, soft_labels=labels,
            ref_chosen_logps=ref[prompt, first], ref_rejected_logps=ref[prompt, second],
        ).loss  # fmt: skip
        loss.backward()
        return loss

    optimizer.step(step)
    optimum = (ref + rewards / beta).softmax(-1)
    torch.testing.assert_close(table.softmax(-1), optimum, rtol=0, atol=1e-6)
    assert (optimum - ref.exp()).abs().max() > 0.1


def test_soft_labels_are_label_smoothing_per_pair_and_hard_ones_change_nothing():
    data = batch()
    even = torch.full((4,), 0.9, dtype=torch.float64)
    assert_same(evaluate(presets.DPO, data, soft_labels=even), evaluate(presets.CDPO, data))
    assert_same(evaluate(presets.DPO, data, soft_labels=torch.ones(4)), evaluate(presets.DPO, data))


def test_margins_are_subtracted_pair_by_pair_and_equal_ones_are_the_specs():
    data = batch()
    same = torch.full((4,), 0.3, dtype=torch.float64)
    assert_same(evaluate(presets.DPO, data, margins=same), evaluate(replace(presets.DPO, margin=0.3), data))
    margins = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    alone = [
        evaluate(replace(presets.DPO, margin=m), {k: x[i : i + 1] for k, x in data.items()})[0]
        for i, m in enumerate(margins.tolist())
    ]
    torch.testing.assert_close(evaluate(presets.DPO, data, margins=margins)[0], torch.stack(alone).mean())


def test_a_pair_of_weight_zero_has_no_gradient_and_still_counts():
    data = batch()
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    loss, chosen, rejected = evaluate(presets.DPO, data, weights=weights)
    kept = {key: x[weights.bool()] for key, x in data.items()}
    assert_same((loss, chosen[weights.bool()]), evaluate(presets.DPO, kept, normalizer=4.0)[:2])
    assert (chosen[1] == 0).all()
    assert (rejected[1] == 0).all()


def test_reference_sums_equal_reference_tokens():
    data = batch()
    expected = evaluate(presets.DPO, data)
    for side in ("chosen", "rejected"):
        data[f"ref_{side}_logps"] = data[f"ref_{side}_logps"].nansum(1)
    assert_same(evaluate(presets.DPO, data), expected)
    with pytest.raises(ValueError, match=r"ref_chosen_logps: expected one per token for ld_alpha, got sums\."):
        evaluate(presets.LD_DPO, data)


def test_alternating_sequences_of_one_forward_become_pairs():
    data = batch()
    interleaved = {}
    for key, names in (
        ("logps", ("chosen_logps", "rejected_logps")),
        ("ref_logps", ("ref_chosen_logps", "ref_rejected_logps")),
        ("log_sum_sq_probs", ("chosen_log_sum_sq_probs", "rejected_log_sum_sq_probs")),
    ):
        masks = (data["chosen_mask"], data["rejected_mask"])
        rows = [data[name][i][mask[i]] for i in range(4) for name, mask in zip(names, masks, strict=True)]
        interleaved[key] = torch.cat(rows)
    lengths = [length for both in zip(CHOSEN, REJECTED, strict=True) for length in both]
    arguments = split_pairs(torch.tensor([0, *lengths]).cumsum(0), **interleaved, mask=None)
    torch.testing.assert_close(evaluate(presets.WPO, arguments)[0], evaluate(presets.WPO, data)[0])
    with pytest.raises(ValueError, match=r"split_pairs: cu_seqlens: expected an even number of sequences.* got 3\."):
        split_pairs(torch.tensor([0, 1, 2, 3]), logps=torch.zeros(3))


def test_no_pairs_have_loss_zero():
    empty = {key: x[:0] for key, x in batch().items()}
    assert [float(x.sum()) for x in evaluate(presets.MPO, empty)] == [0.0, 0.0, 0.0]
    packed = {"chosen_logps": torch.zeros(0), "rejected_logps": torch.zeros(0)}
    packed |= {f"{side}_cu_seqlens": torch.tensor([0]) for side in ("chosen", "rejected")}
    assert evaluate(presets.SIMPO, packed)[0] == 0


def without(*names):
    return lambda data: [data.pop(name) for name in names]


def emptied(side):
    return lambda data: data[f"{side}_mask"][1].fill_(False)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("DPO", emptied("rejected"), r"^preference_loss: rejected_mask: expected a token in every answer, .* in \[1\]"),
        ("DPO", emptied("chosen"), r"chosen_mask: expected a token in every answer"),
        ("DPO", without("ref_rejected_logps"), r"ref_rejected_logps: expected a tensor, which the spec needs"),
        ("WPO", without("chosen_log_sum_sq_probs"), r"chosen_log_sum_sq_probs: expected a tensor, for weighting='wpo'"),
        ("DPO", without("chosen_mask"), r"chosen_mask: expected a mask .* Without one the padding would be trained on"),
        ("DPO", lambda d: d.update(weights=torch.ones(3)), r"weights: expected shape \(4,\) one per pair"),
        ("AOT", lambda d: d.update(weights=torch.ones(4)), r"weights: expected None for match='aot', which mixes"),
        ("DPO", lambda d: d.update(soft_labels=torch.tensor([0.5, 1.1, 1, 0])), r"soft_labels: .* got 1\.1"),
        ("NCA", lambda d: d.update(soft_labels=torch.ones(4)), r"soft_labels: expected None for a loss that has no"),
        ("NCA", lambda d: d.update(margins=torch.ones(4)), r"margins: expected None for a loss that has no margin, or"),
        ("SIMPO", lambda d: d.update(margins=torch.ones(4)), r"margins: expected None for a loss that has no margin, "),
        ("AOT", lambda d: d.update(margins=torch.ones(4)), r"margins: expected None for a loss that has no margin, or"),
        ("DPO", lambda d: d.update(margins=torch.ones(3)), r"margins: expected shape \(4,\) one per pair"),
        ("DPO", lambda d: d.update(normalizer=0.0), r"normalizer: expected a positive number, got 0\.0"),
        ("DPO", lambda d: d.update(ref_chosen_logps=torch.ones(2, 2)), r"ref_chosen_logps: expected shape \(4, 6\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_one_sentence(name, change, message):
    data = batch()
    change(data)
    with pytest.raises(ValueError, match=message):
        evaluate(PAIRED[name], data)


def test_a_token_mean_of_a_part_is_refused_without_its_own_normalizer():
    mix = PreferenceMix(((1.0, presets.DPO), (1.0, Sft("token_mean"))))
    with pytest.raises(ValueError, match=r"token_normalizer: expected a number, as normalizer, got None\. An average"):
        evaluate(mix, batch(), normalizer=8.0)


def test_the_spec_of_another_loss_is_refused():
    data = batch()
    with pytest.raises(TypeError, match="preference_loss: spec: expected a PreferenceLoss or PreferenceMix"):
        evaluate(presets.KTO, data)
    with pytest.raises(TypeError, match="unpaired_preference_loss: spec: expected an UnpairedPreferenceLoss"):
        unpaired_preference_loss(data["chosen_logps"], LABELS, presets.DPO, ref_logps=data["ref_chosen_logps"])


def test_unequal_numbers_of_answers_are_refused():
    data = batch()
    data |= {key: x[:3] for key, x in data.items() if "rejected" in key}
    with pytest.raises(ValueError, match=r"rejected_logps: expected 4 answers as chosen_logps, got 3\."):
        evaluate(presets.DPO, data)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kl": None}, ValueError, r"kl: expected a number, for baseline='kl', got None\. See mismatched_kl\."),
        ({"labels": LABELS.float()}, TypeError, r"labels: expected a bool tensor, got torch\.float32\."),
        ({"labels": LABELS[:3]}, ValueError, r"labels: expected shape \(4,\) one per answer"),
        ({"spec": presets.APO_ZERO_UNPAIRED}, ValueError, r"kl: expected None, for baseline='zero', got 0\.75\."),
    ],
)
def test_bad_unpaired_input_is_refused_with_one_sentence(change, error, message):
    data = batch()
    arguments = {"labels": LABELS, "spec": presets.KTO, "mask": data["chosen_mask"], "kl": KL} | change
    with pytest.raises(error, match=message):
        unpaired_preference_loss(data["chosen_logps"], ref_logps=data["ref_chosen_logps"], **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreferenceLoss("sigmod"), r"PreferenceLoss: link: .*Did you mean 'sigmoid'\?"),
        (lambda: PreferenceLoss(beta=0.0), r"PreferenceLoss: beta: expected a finite number above 0, got 0\.0\."),
        (lambda: PreferenceLoss(label_smoothing=0.5), r"label_smoothing: expected a number from 0 to below 0\.5"),
        (lambda: PreferenceLoss("exo_pair"), r"label_smoothing: expected above 0 for exo_pair"),
        (lambda: PreferenceLoss("nca_pair", margin=1.0), r"margin: expected 0 for nca_pair"),
        (lambda: PreferenceLoss("bco_pair", label_smoothing=0.1), r"expected no label noise for bco_pair"),
        (lambda: PreferenceLoss("apo_zero", transform=Power(-1.0)), r"transform: expected Power\(0\.0\) for apo_zero"),
        (lambda: PreferenceLoss("sppo_hard", match="aot"), r"match: expected 'pairs' for sppo_hard"),
        (lambda: PreferenceLoss(match="aot", weighting="wpo"), r"weighting: expected 'none' for match"),
        (lambda: PreferenceLoss(match="aot", transform=JensenShannon()), r"expected Power\(0\.0\) for match"),
        (lambda: PreferenceLoss(transform=LogOdds()), r"reference: expected False for LogOdds"),
        (lambda: PreferenceLoss(ld_alpha=1.5), r"ld_alpha: expected a number from 0 to 1, got 1\.5\."),
        (lambda: PreferenceLoss(tau=0.1), r"tau: expected its default for sigmoid, which has no tau, got 0\.1\."),
        (lambda: PreferenceMix(((1.0, Sft()),)), r"PreferenceMix: terms: expected at least one PreferenceLoss"),
        (lambda: PreferenceMix((presets.DPO,)), r"PreferenceMix: terms: expected a tuple of \(weight, term\)"),
        (lambda: UnpairedPreferenceLoss(baseline="none"), r"baseline: expected one of kl, zero, got 'none'"),
    ],
)  # fmt: skip
def test_a_spec_that_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
