"""group_policy_loss against group_advantages followed by policy_loss, which it must equal bit for bit."""

from __future__ import annotations

import pytest
import torch
from backends import CUDA, NATIVE

from fastrl import advantages as estimators
from fastrl.advantages import GroupAdvantage
from fastrl.losses.group_policy import group_policy_loss
from fastrl.losses.policy import policy_loss
from fastrl.ops.group_advantages import group_advantages
from fastrl.ops.group_policy_loss import group_policy_loss as op
from fastrl.spec import KL, Cispo, Clip, Correction, Gmpo, PolicyLoss, Sapo, Vespo

NAN = float("nan")
LENGTHS = torch.tensor([7, 1, 0, 5, 7, 3, 6, 2])
GROUPS = torch.tensor([9, -4, 9, 9, -4, -4, 2, -4])
SPECS = {
    "clip": PolicyLoss("token", Clip(0.2, 0.28, dual=3.0), KL("k3_ratio", 0.1), "prompt_mean", entropy_coef=0.1),
    "gspo": PolicyLoss("sequence", Clip(0.02, 0.02), KL("k3", 0.1), correction=Correction("truncate", "token", 1.1)),
    "cispo": PolicyLoss("token", Cispo(1.3), aggregate="token_mean", correction=Correction("mask", "sequence", 1.2)),
    "sapo": PolicyLoss("token", Sapo(), KL("k1", 0.1), "token_sum"),
}
ESTIMATORS = {name: getattr(estimators, name) for name in ("GRPO", "DR_GRPO", "RLOO", "SCALE_RL")}
ESTIMATORS["none"] = GroupAdvantage("none", "none")
# The formulas are tested elsewhere: one instruction set will do.
each_backend = pytest.mark.parametrize(
    "backend", ["reference", "chunked", *NATIVE[-1:], *CUDA, "triton"], indirect=True
)


def batch(dtype=torch.float32):
    """Eight sequences, one without a token and one whose reward is NaN; NaN wherever the mask is False."""
    made = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < LENGTHS[:, None]
    logps = -3 * torch.rand(8, 7, generator=made, dtype=dtype)
    near = {name: logps + 0.4 * torch.randn(8, 7, generator=made, dtype=dtype) for name in ("old", "ref", "sampling")}
    data = {"logps": logps, "entropy": torch.rand(8, 7, generator=made, dtype=dtype)}
    data |= {f"{name}_logps": tensor for name, tensor in near.items()}
    for tensor in data.values():
        tensor[~mask] = NAN
    rewards = torch.randn(8, generator=made, dtype=dtype)
    rewards[3] = NAN
    return data | {"mask": mask, "rewards": rewards}


def packed(data):
    """The same tokens without padding, and six behind the last sequence."""
    mask, rewards = data["mask"], data["rewards"]
    tail = torch.zeros(6, dtype=data["logps"].dtype)
    flat = {name: torch.cat((x[mask], tail)) for name, x in data.items() if name not in ("mask", "rewards")}
    return flat | {
        "rewards": rewards,
        "mask": torch.ones(len(flat["logps"]), dtype=torch.bool),
        "cu_seqlens": torch.cat((torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0))),
    }


def outputs(function, spec, data, *what, **options):
    """Loss, gradients and metrics."""
    leaves = {name: data[name].detach().requires_grad_() for name in ("logps", "entropy")}
    rest = {name: x for name, x in data.items() if name not in ("logps", "rewards")} | {"entropy": leaves["entropy"]}
    normalizer = 17.0 if spec.aggregate == "token_sum" else None
    out = function(leaves["logps"], *what, spec, **rest, normalizer=normalizer, group_ids=GROUPS, **options)
    gradients = torch.autograd.grad(out.loss, list(leaves.values()))
    assert gradients[0].isfinite().all()
    return out.loss, *gradients, *(x for row in out.metrics.values() for x in row)


def assert_equal_to_two_calls(data, estimator, spec, backend):
    options = {"baseline": estimator.baseline, "scale": estimator.scale, "eps": estimator.eps}
    advantages = group_advantages(data["rewards"], group_ids=GROUPS, **options, backend=backend)
    want = outputs(policy_loss, spec, data, advantages, backend=backend)
    got = outputs(group_policy_loss, spec, data, data["rewards"], estimator, backend=backend)
    assert want[1].any()
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_backend
@pytest.mark.parametrize(
    ("spec", "estimator"), [*((spec, "GRPO") for spec in SPECS), *(("clip", name) for name in list(ESTIMATORS)[1:])]
)
def test_equals_group_advantages_then_policy_loss_in_every_bit(backend, spec, estimator):
    assert_equal_to_two_calls(batch(), ESTIMATORS[estimator], SPECS[spec], backend)


@each_backend
@pytest.mark.parametrize("spec", SPECS)
def test_packed_sequences_equal_two_calls_and_the_padded_ones(backend, spec):
    data = batch(torch.float64)
    assert_equal_to_two_calls(packed(data), estimators.GRPO, SPECS[spec], backend)
    one, other = (
        outputs(group_policy_loss, SPECS[spec], x, x["rewards"], estimators.GRPO, backend=backend)[0]
        for x in (data, packed(data))
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@each_backend
@pytest.mark.parametrize(
    "spec",
    [PolicyLoss("sequence_token"), PolicyLoss("sequence", Gmpo()), PolicyLoss("sequence", Vespo())],
    ids=["sequence_token", "gmpo", "vespo"],
)
def test_losses_of_whole_sequences_are_those_of_two_calls(backend, spec):
    assert_equal_to_two_calls(batch(), estimators.GRPO, spec, backend)


@each_backend
@pytest.mark.parametrize("rewards", [torch.float64, torch.bfloat16], ids=str)
def test_rewards_of_another_precision_give_the_advantages_that_they_give_alone(backend, rewards):
    data = batch()
    data["rewards"] = data["rewards"].to(rewards)
    assert_equal_to_two_calls(data, estimators.GRPO, SPECS["clip"], backend)


def test_a_group_size_is_the_group_ids_of_neighbours():
    data, spec = batch(), SPECS["clip"]
    arguments = {name: x for name, x in data.items() if name not in ("logps", "rewards")}
    by_size, by_ids = (
        group_policy_loss(data["logps"], data["rewards"], estimators.GRPO, spec, **arguments, **groups).loss
        for groups in ({"group_size": 4}, {"group_ids": torch.arange(8) // 4})
    )
    assert torch.equal(by_size, by_ids)


@pytest.mark.skipif(not CUDA, reason="neither a GPU build nor one with FASTRL_EMULATE_CUDA=1")
@pytest.mark.parametrize(("estimator", "launches"), [("GRPO", 1), ("RLOO", 1), ("SCALE_RL", 2)])
def test_cuda_takes_one_launch_where_no_spread_of_the_batch_is_needed(estimator, launches, monkeypatch):
    from fastrl.kernels.group_advantages import cuda_impl as groups
    from fastrl.kernels.policy_loss import cuda_impl as loss

    launched = []
    for module in (groups, loss):
        run = module.launch
        monkeypatch.setattr(module, "launch", lambda name, *rest, run=run: (launched.append(name), run(name, *rest)))
    outputs(group_policy_loss, SPECS["clip"], data := batch(), data["rewards"], ESTIMATORS[estimator], backend="cuda")
    assert launched == ["group_advantages", "policy_loss"][-launches:]


@each_backend
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (4, 0)])
def test_empty_batches_have_loss_zero(backend, rows, columns):
    logps = torch.zeros(rows, columns, requires_grad=True)
    mask, rewards = torch.ones(rows, columns, dtype=torch.bool), torch.zeros(rows)
    options = {"mask": mask, "group_ids": torch.zeros(rows, dtype=torch.int64), "backend": backend}
    out = group_policy_loss(logps, rewards, estimators.GRPO, PolicyLoss(), **options)
    assert (out.loss.item(), logps.numel()) == (0.0, 0)


@each_backend
def test_packed_tokens_without_any_sequence_are_padding(backend):
    logps, nothing = torch.ones(5, requires_grad=True), torch.zeros(0)
    options = {"mask": torch.ones(5), "cu_seqlens": torch.tensor([0]), "group_size": 2}
    options["mask"] = options["mask"].bool()
    for spec in (PolicyLoss("sequence"), PolicyLoss()):
        out = group_policy_loss(logps, nothing, estimators.GRPO, spec, **options, backend=backend)
        assert out.loss.item() == 0.0
        assert not torch.autograd.grad(out.loss, logps)[0].any()


def op_inputs(backend):
    data = packed(batch())
    flat = [data[name] for name in ("logps", "old_logps", "ref_logps", "sampling_logps", "entropy")]
    logps, *near, entropy = (x.nan_to_num(0.0) for x in flat)
    weights, ids = torch.rand(len(logps)), torch.arange(8).repeat_interleave(LENGTHS)
    ids = torch.cat((ids, torch.full((6,), 7)))
    tokens = (weights, data["mask"], *near, entropy.requires_grad_())
    code = SPECS["gspo"].code
    return (logps.requires_grad_(), data["rewards"], GROUPS, *tokens, ids, "mean", "group", 1e-6, code, backend)


def test_operator_passes_opcheck():
    torch.library.opcheck(op, op_inputs("auto"))


def test_compiled_equals_eager():
    spec = PolicyLoss()

    def run(data):
        options = {"mask": data["mask"], "group_size": 4, "old_logps": data["old_logps"]}
        return group_policy_loss(data["logps"], data["rewards"], estimators.GRPO, spec, **options).loss

    data = batch()
    leaf = data["logps"].requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager, ours = (torch.autograd.grad(function(data), leaf)[0] for function in (run, compiled))
    assert torch.equal(eager, ours)


def test_rewards_get_no_gradient():
    data = batch()
    logps, rewards = data["logps"].requires_grad_(), data["rewards"].requires_grad_()
    group_policy_loss(logps, rewards, estimators.GRPO, PolicyLoss(), mask=data["mask"], group_size=4).loss.backward()
    assert logps.grad.any()
    assert rewards.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(3)}, r"rewards: expected shape \(2,\) one per sequence, got \(3,\)"),
        ({"rewards": torch.zeros(2, dtype=torch.int64)}, "rewards: expected a floating-point tensor"),
        ({"group_size": None}, "group_ids: expected exactly one of group_ids and group_size, got neither"),
        ({"group_size": 3}, "group_size: expected a divisor of the 2 rewards, got 3"),
        ({"logps": torch.zeros(6), "mask": torch.ones(6, dtype=torch.bool)}, "cu_seqlens: expected bounds"),
        ({"spec": PolicyLoss(kl=KL("k3", 0.1))}, "ref_logps: expected a tensor"),
        ({"spec": PolicyLoss(entropy_coef=0.1)}, "entropy: expected a tensor"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask: expected shape"),
        ({"spec": "GRPO"}, "spec: expected a PolicyLoss"),
        ({"estimator": "GRPO"}, "estimator: expected a GroupAdvantage"),
    ],
)
def test_wrong_arguments_are_refused_with_the_name_and_the_values(change, message):
    arguments = {"logps": torch.zeros(2, 3), "rewards": torch.zeros(2), "estimator": estimators.GRPO}
    arguments |= {"spec": PolicyLoss(), "mask": torch.ones(2, 3, dtype=torch.bool), "group_size": 2}
    with pytest.raises((ValueError, TypeError), match=f"group_policy_loss: {message}"):
        group_policy_loss(**(arguments | change))
