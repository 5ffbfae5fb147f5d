"""`linear_logprob` over the tokens that a sampler kept, against the masked definition."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ops.cases import IGNORE, ORDERS, Inputs, dense_logits, gaussian, peaked
from tolerance import assert_exact, assert_no_worse

from fastrl import (
    KL,
    Clip,
    FusedLMHead,
    PolicyLoss,
    linear_logprob,
    linear_policy_loss,
    linear_token_loss,
    policy_loss,
    support_sets,
)
from fastrl.kernels.linear_logprob import chunked
from fastrl.kernels.linear_logprob import support as kernel
from fastrl.ops import linear_policy_loss as loss_module
from fastrl.ops import support as module

EVERYTHING = ("hidden", "weight", "bias")
OPTIONS = {
    "no options": {},
    "temperature": {"temperature": 0.7},
    "temperature per row": {"temperature": torch.linspace(0.3, 2.0, 11, dtype=torch.float64)},
    "softcap that bites": {"softcap": 2.5},
    "all": {
        "temperature": torch.linspace(0.3, 2.0, 11, dtype=torch.float64),
        "softcap": 2.5,
        "logit_scale": 0.7,
    },
}


@pytest.fixture(params=["narrow", "wide", "mixed"])
def path(request, monkeypatch):
    """Every row gathered, every row multiplied with the whole vocabulary, or each as its set's size says; in parts of
    seven gathered rows and of three rows of logits, with the weight widened ten rows at a time."""
    monkeypatch.setitem(kernel.WIDE, "cpu", {"narrow": 0, "wide": 10**9, "mixed": 4}[request.param])
    monkeypatch.setattr(kernel, "GATHER_BYTES", 7 * 8 * 8)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 3 * 37 * 8)
    monkeypatch.setattr(kernel, "VOCABULARY_TILE", 10)
    return request.param


def random_sets(inputs, seed=0):
    """For each row from one id to the whole vocabulary, in no order, the target among them; none for ignored rows."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = len(inputs.weight)
    sets = []
    for row, target in enumerate(inputs.targets.flatten().tolist()):
        size = (1, 2, vocabulary // 5, vocabulary // 2, vocabulary)[row % 5]
        others = torch.randperm(vocabulary, generator=generator).tolist()
        kept = [target, *(one for one in others if one != target)][: max(size, 1)]
        order = torch.randperm(len(kept), generator=generator).tolist()
        sets.append([] if target == IGNORE else [kept[i] for i in order])
    return sets


def csr(sets):
    offsets = torch.tensor([0, *(len(kept) for kept in sets)]).cumsum(0)
    return torch.tensor([one for kept in sets for one in kept], dtype=torch.int64), offsets


def masked(inputs, sets, upcast=None, **options):
    """The definition: a logit outside the set is -inf. Autograd differentiates it."""
    keep = torch.zeros(inputs.targets.numel(), len(inputs.weight), dtype=torch.bool)
    for row, kept in zip(keep, sets, strict=True):
        row[kept] = True
        row[:] |= not kept  # an ignored row, whose value is not read
    z = dense_logits(inputs, upcast=upcast, **options)
    keep = keep.view(z.shape)
    live = inputs.targets != IGNORE
    log_p = z.masked_fill(~keep, -math.inf).log_softmax(-1)
    logps = log_p.gather(-1, inputs.targets.masked_fill(~live, 0).unsqueeze(-1)).squeeze(-1)
    finite = log_p.masked_fill(~keep, 0)
    entropy = -(log_p.exp() * finite).sum(-1)
    return logps.masked_fill(~live, 0), entropy.masked_fill(~live, 0)


def scored(inputs, support, **options):
    return linear_logprob(
        inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, support=support, entropy=True, **options
    )


def pull(outputs, grads):
    torch.autograd.backward([o for o in outputs if o is not None], [g.to(outputs[0].dtype) for g in grads])


def compare(inputs, sets, requires=EVERYTHING, **options):
    ours, theirs = inputs.leaves(*requires), inputs.leaves(*requires)
    out, expected = scored(ours, csr(sets), **options), masked(theirs, sets, **options)
    assert_exact(out.logps, expected[0])
    assert_exact(out.entropy, expected[1])
    grads = torch.randn(2, *inputs.targets.shape, dtype=torch.float64)
    grads[..., 3::4] = 0
    pull(out[:2], grads)
    pull(expected, grads)
    for name, want in theirs.grads().items():
        got = ours.grads()[name]
        assert (got is None) == (want is None), name
        if want is not None:
            assert_exact(got, want)


@pytest.mark.parametrize("option", OPTIONS)
def test_equals_the_masked_definition_with_every_option(path, option):
    inputs = gaussian(11, 8, 37)
    compare(inputs, random_sets(inputs), **OPTIONS[option])


@pytest.mark.parametrize("requires", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_gives_a_gradient_to_exactly_what_requires_one(path, requires):
    inputs = gaussian(11, 8, 37)
    compare(inputs, random_sets(inputs), requires, softcap=3.0)


def test_a_head_without_bias(path):
    inputs = gaussian(11, 8, 37, bias=False)
    compare(inputs, random_sets(inputs), ("hidden", "weight"))


@pytest.mark.parametrize("shape", [(), (2, 3), (2, 1, 3)], ids=str)
def test_sets_are_of_the_flattened_rows_of_any_leading_shape(path, shape):
    flat = gaussian(math.prod(shape), 8, 37)
    sets = random_sets(flat)
    compare(Inputs(flat.hidden.reshape(*shape, 8), flat.weight, flat.targets.reshape(shape), flat.bias), sets)


STRIDES = {
    "hidden transposed": lambda x: {"hidden": torch.randn(8, 11, dtype=torch.float64).T},
    "hidden sliced": lambda x: {"hidden": torch.randn(23, 17, dtype=torch.float64)[1::2, 1::2]},
    "weight transposed": lambda x: {"weight": torch.randn(8, 37, dtype=torch.float64).T},
    "weight expanded": lambda x: {"weight": torch.randn(1, 8, dtype=torch.float64).expand(37, 8)},
    "targets strided": lambda x: {"targets": x.targets.repeat_interleave(2)[::2]},
}


@pytest.mark.parametrize("layout", STRIDES)
def test_any_strides(path, layout):
    inputs = gaussian(11, 8, 37)
    changed = {"hidden": inputs.hidden, "weight": inputs.weight, "targets": inputs.targets} | STRIDES[layout](inputs)
    strided = Inputs(**changed, bias=inputs.bias)
    ids, offsets = csr(random_sets(inputs))
    apart = (ids.repeat_interleave(2)[::2], offsets.repeat_interleave(3)[::3])
    grads = torch.randn(2, 11, dtype=torch.float64)
    results = []
    for one, support in ((strided, apart), (strided.leaves(), (ids, offsets))):
        leaves = [one.hidden, one.weight, one.bias]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = scored(Inputs(leaves[0], leaves[1], one.targets, leaves[2]), support)
        results.append([out.logps, out.entropy, *torch.autograd.grad(out[:2], leaves, tuple(grads))])
    for got, want in zip(*results, strict=True):
        assert_exact(got, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sets_may_be_int32(path, dtype):
    inputs = gaussian(11, 8, 37)
    ids, offsets = csr(random_sets(inputs))
    assert torch.equal(scored(inputs, (ids.to(dtype), offsets.to(dtype))).logps, scored(inputs, (ids, offsets)).logps)


def test_the_order_inside_a_set_changes_no_result(path):
    inputs = gaussian(11, 8, 37)
    sets = random_sets(inputs)
    out, other = scored(inputs, csr(sets)), scored(inputs, csr([sorted(kept) for kept in sets]))
    assert_exact(out.logps, other.logps)
    assert_exact(out.entropy, other.entropy)


def test_gradcheck(path):
    inputs = gaussian(6, 4, 9).leaves(*EVERYTHING)
    support, temperature = csr(random_sets(inputs)), torch.linspace(0.5, 2.0, 6, dtype=torch.float64)

    def op(hidden, weight, bias):
        out = scored(Inputs(hidden, weight, inputs.targets, bias), support, temperature=temperature, softcap=3.0)
        return out.logps, out.entropy

    assert torch.autograd.gradcheck(op, (inputs.hidden, inputs.weight, inputs.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 30.0}], ids=["plain", "softcap"])
def test_no_worse_than_plain_torch_on_peaked_logits(path, dtype, options, monkeypatch):
    monkeypatch.setattr(kernel, "GATHER_BYTES", 1000 * 64 * 4)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 100 * 515 * 4)
    monkeypatch.setattr(kernel, "VOCABULARY_TILE", 128)
    inputs = peaked(264, 64, 515, dtype)
    sets = random_sets(inputs)
    grads = torch.randn(2, 264, dtype=torch.float64)
    ours, truth = inputs.leaves(*EVERYTHING), inputs.leaves(*EVERYTHING, dtype=torch.double)
    plains = [inputs.leaves(*EVERYTHING) for _ in range(ORDERS)]
    out = scored(ours, csr(sets), **options)[:2]
    plain_outs = [masked(x.reordered(seed), sets, upcast=torch.float32, **options) for seed, x in enumerate(plains)]
    truth_out = masked(truth, sets, **options)
    for outputs in (out, *plain_outs, truth_out):
        pull(outputs, grads)
    for name, got, plain, want in zip(("logps", "entropy"), out, zip(*plain_outs, strict=True), truth_out, strict=True):
        assert got.dtype == torch.float32
        assert_no_worse(got, plain, want, name=name)
    for name in EVERYTHING:
        assert ours.grads()[name].dtype == dtype
        assert_no_worse(ours.grads()[name], [x.grads()[name] for x in plains], truth.grads()[name], name=f"d {name}")


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_ignored_rows_are_zero_whatever_their_hidden_state_and_their_set_hold(path, garbage):
    inputs = gaussian(11, 8, 37)
    ignored = (inputs.targets == IGNORE).nonzero()[:, 0].tolist()
    sets = random_sets(inputs)
    filled = [[-5, 99999, 3, 3] if row in ignored else kept for row, kept in enumerate(sets)]
    grads = torch.randn(2, 11, dtype=torch.float64)
    results = []
    for fill, given in ((0.0, sets), (garbage, filled)):
        ours = inputs.leaves(*EVERYTHING)
        ours.hidden.data[ignored] = fill
        out = scored(ours, csr(given))
        pull(out[:2], grads)
        assert not out.logps[ignored].any()
        assert not out.entropy[ignored].any()
        assert not ours.hidden.grad[ignored].any()
        results.append([out.logps.detach(), out.entropy.detach(), *ours.grads().values()])
    for without, with_garbage in zip(*results, strict=True):
        assert_exact(with_garbage, without)


def test_a_row_that_is_not_finite_stays_alone_and_without_upstream_gradient_reaches_nothing(path):
    inputs = gaussian(11, 8, 37, ignored=False)
    sets = random_sets(inputs)
    grads = torch.randn(2, 11, dtype=torch.float64)
    grads[:, 4] = 0
    results = []
    for fill in (1.0, math.nan):
        ours = inputs.leaves(*EVERYTHING)
        ours.hidden.data[4] = fill
        out = scored(ours, csr(sets))
        pull(out[:2], grads)
        results.append([out.logps.detach(), out.entropy.detach(), *ours.grads().values()])
    assert results[1][0][4].isnan()
    assert results[1][1][4].isnan()
    others = torch.arange(11) != 4
    for good, bad in zip(results[0][:2], results[1][:2], strict=True):
        assert_exact(bad[others], good[others])
    for good, bad in zip(results[0][2:], results[1][2:], strict=True):
        assert_exact(bad, good)


def test_a_kept_id_with_a_logit_of_minus_infinity_contributes_nothing(path):
    inputs = gaussian(1, 8, 37, ignored=False)
    target = int(inputs.targets[0])
    masked_id, other = (target + 1) % 37, (target + 2) % 37
    inputs.bias[masked_id] = -math.inf
    results = []
    for kept in ([target, masked_id, other], [target, other]):
        ours = inputs.leaves(*EVERYTHING)
        out = scored(ours, csr([kept]))
        pull(out[:2], torch.ones(2, 1))
        results.append([out.logps.detach(), out.entropy.detach(), *ours.grads().values()])
    for got, want in zip(*results, strict=True):
        assert_exact(got, want)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows_and_only_ignored_rows_give_zeros_and_zero_gradients(path, rows):
    inputs = gaussian(rows, 8, 37).leaves(*EVERYTHING)
    inputs.targets.fill_(IGNORE)
    out = scored(inputs, csr([[]] * rows))
    assert out.logps.shape == out.entropy.shape == (rows,)
    pull(out[:2], torch.ones(2, rows))
    assert not out.logps.any()
    assert not out.entropy.any()
    for name, grad in inputs.grads().items():
        assert grad.shape == getattr(inputs, name).shape
        assert not grad.any(), name


@pytest.mark.parametrize("option", ["no options", "all"])
def test_the_whole_vocabulary_equals_the_plain_op(path, option):
    inputs = gaussian(11, 8, 37)
    sets = [list(range(37))] * 11
    ours, theirs = inputs.leaves(*EVERYTHING), inputs.leaves(*EVERYTHING)
    out, plain = scored(ours, csr(sets), **OPTIONS[option]), scored(theirs, None, **OPTIONS[option])
    grads = torch.randn(2, 11, dtype=torch.float64)
    for one in (out, plain):
        pull(one[:2], grads)
    assert_exact(out.logps, plain.logps)
    assert_exact(out.entropy, plain.entropy)
    for got, want in zip(ours.grads().values(), theirs.grads().values(), strict=True):
        assert_exact(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sets_of_one_token_give_exactly_zero_and_no_gradient(path, dtype):
    inputs = gaussian(11, 8, 37, ignored=False, dtype=dtype)
    ours = inputs.leaves(*EVERYTHING)
    out = scored(ours, csr([[target] for target in inputs.targets.tolist()]), temperature=0.7, softcap=5.0)
    pull(out[:2], torch.randn(2, 11))
    assert not out.logps.any()
    assert not out.entropy.any()
    for name, grad in ours.grads().items():
        assert not grad.any(), name


def test_rows_of_the_weight_that_no_set_keeps_are_not_read_by_narrow_rows(monkeypatch):
    monkeypatch.setitem(kernel.WIDE, "cpu", 0)
    inputs = gaussian(6, 8, 37, ignored=False)
    sets = [sorted({target, 3, 5}) for target in inputs.targets.tolist()]
    kept = torch.tensor(sorted({one for given in sets for one in given}))
    ours = inputs.leaves(*EVERYTHING)
    others = torch.ones(37, dtype=torch.bool)
    others[kept] = False
    ours.weight.data[others] = math.nan
    ours.bias.data[others] = math.nan
    out = scored(ours, csr(sets))
    pull(out[:2], torch.ones(2, 6))
    assert out.logps.isfinite().all()
    assert ours.hidden.grad.isfinite().all()
    assert not ours.weight.grad[others].any()
    assert_exact(out.logps, masked(inputs, sets)[0])


def test_no_gathered_part_is_larger_than_the_bound(monkeypatch):
    monkeypatch.setitem(kernel.WIDE, "cpu", 0)
    monkeypatch.setattr(kernel, "GATHER_BYTES", 7 * 8 * 8 + 63)  # not quite eight rows of eight float64
    inputs = gaussian(11, 8, 37)
    ids, offsets = csr(random_sets(inputs))
    head = inputs_of(inputs)
    sets = kernel.sets_of(head, ids, offsets)
    parts = list(kernel._gathers(torch.arange(11), sets, head.weight, torch.float64))
    assert max(map(len, parts)) == 7
    assert torch.equal(torch.cat(parts), torch.arange(len(ids)))


def inputs_of(inputs):
    temperature = torch.ones(1, dtype=torch.float64)
    return kernel.HeadInputs(inputs.hidden, inputs.weight, inputs.targets, inputs.bias, temperature, 0.0, 1.0, IGNORE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_narrow_rows_do_not_depend_on_the_number_of_threads(dtype, monkeypatch):
    monkeypatch.setitem(kernel.WIDE, "cpu", 0)
    inputs = gaussian(512, 8, 37, dtype=dtype)
    support, grads = csr(random_sets(inputs)), torch.randn(2, 512)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ours = inputs.leaves(*EVERYTHING)
        pull(scored(ours, support)[:2], grads)
        results.append(list(ours.grads().values()))
    torch.set_num_threads(before)
    for one in results[1:]:
        assert all(map(torch.equal, one, results[0]))


# What engines return.

FORMS = {
    "rows of lists": lambda rows: rows,
    "rows of arrays": lambda rows: [np.array(row, dtype=np.int32) for row in rows],
    "an object with rows": lambda rows: SimpleNamespace(token_ids=rows),
    "offsets": lambda rows: SimpleNamespace(token_ids=csr(rows)[0].tolist(), offsets=csr(rows)[1].tolist()),
    "arrays and offsets": lambda rows: SimpleNamespace(
        token_ids=np.array(csr(rows)[0].tolist()), offsets=csr(rows)[1].numpy()
    ),
    "counts": lambda rows: SimpleNamespace(
        ids=np.array(csr(rows)[0].tolist()), counts=np.array([len(row) for row in rows])
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_sampling_masks_of_engines_become_sets(form):
    completions = [[[5, 7], [6]], [[1, 2, 3]]]
    ids, offsets = support_sets([2, *map(FORMS[form], completions), 1])
    assert (ids.tolist(), offsets.tolist()) == ([5, 7, 6, 1, 2, 3], [0, 0, 0, 2, 3, 6, 6])
    assert ids.dtype == offsets.dtype == torch.int64


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "got NoneType. Ask the engine for it: return_sampling_mask=True."),
        ([3, 4], "expected a list with the ids kept for each token, or an int, got list"),
        ("34", "got str"),
        (SimpleNamespace(logprobs=[]), "got SimpleNamespace"),
    ],
)
def test_what_is_no_sampling_mask_is_refused(mask, message):
    with pytest.raises(TypeError, match=f"^support_sets: masks: .*{message}"):
        support_sets([[[1]], mask])


# The losses.

SPECS = {
    "clip": PolicyLoss(),
    "with KL and entropy": PolicyLoss("token", Clip(0.2, 0.2), KL("k3", 0.1), "token_mean", 0.1),
    "sequence ratio": PolicyLoss("sequence", Clip(0.2, 0.2), aggregate="seq_mean_token_mean"),
}


def loss_arguments(inputs, sets):
    """(advantages, keyword arguments) of a policy loss over 11 tokens of two sequences; row 4 is outside the mask."""
    mask = inputs.targets != IGNORE
    mask[4] = False
    logps = masked(inputs, sets)[0].detach()
    generator = torch.Generator().manual_seed(1)
    near = [logps + 0.2 * torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(2)]
    advantages = torch.randn(11, generator=generator, dtype=torch.float64)
    advantages[7:] = 0
    bounds = torch.tensor([0, 7, 11])
    return advantages, {"mask": mask, "old_logps": near[0], "ref_logps": near[1], "cu_seqlens": bounds}


@pytest.mark.parametrize("requires", [("hidden",), EVERYTHING], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("spec", SPECS)
def test_linear_policy_loss_is_that_of_the_masked_definition(path, spec, requires):
    inputs, spec = gaussian(11, 8, 37), SPECS[spec]
    sets = random_sets(inputs)
    advantages, options = loss_arguments(inputs, sets)
    if spec.kl is None:
        del options["ref_logps"]
    given = [[-5, 99, 3, 3] if row == 4 else kept for row, kept in enumerate(sets)]  # outside the mask: not read
    ours, theirs = inputs.leaves(*requires), inputs.leaves(*requires)
    fused = FusedLMHead(torch.nn.Linear(8, 37, dtype=torch.float64), softcap=2.5)
    fused.lm_head.weight, fused.lm_head.bias = (
        torch.nn.Parameter(getattr(ours, name).detach(), name in requires) for name in ("weight", "bias")
    )
    more = {"support": csr(given), "temperature": 0.7, "entropy": True, **options}
    out = linear_policy_loss(
        ours.hidden, ours.weight, ours.targets, advantages, spec, bias=ours.bias, softcap=2.5, **more
    )
    logps, entropy = masked(theirs, sets, temperature=0.7, softcap=2.5)
    expected = policy_loss(logps, advantages, spec, entropy=entropy, **options)
    assert_exact(out.loss, expected.loss)
    assert_exact(out.logps, logps.detach() * options["mask"])
    assert_exact(out.entropy, entropy.detach() * options["mask"])
    for name, pair in expected.metrics.items():
        assert_exact(torch.stack(list(out.metrics[name])), torch.stack(list(pair)))
    for loss in (out.loss, expected.loss):
        (3 * loss).backward()
    for name, want in theirs.grads().items():
        assert (want is not None) == (name in requires)
        if want is not None:
            assert want.abs().max() > 1e-3
            assert_exact(ours.grads()[name], want)
    through = fused.policy_loss(ours.hidden.detach(), ours.targets, advantages, spec, **more)
    assert_exact(through.loss, out.loss)


@pytest.mark.parametrize("metrics", [True, False])
def test_linear_policy_loss_over_sets_adds_the_gradient_to_main_grad(path, metrics):
    inputs = gaussian(11, 8, 37)
    sets = random_sets(inputs)
    advantages, options = loss_arguments(inputs, sets)
    del options["ref_logps"]
    main_grad, ours, theirs = torch.ones(37, 8, dtype=torch.float64), *(inputs.leaves(*EVERYTHING) for _ in range(2))
    more = {"support": csr(sets), **options}
    arguments = [(x.hidden, x.weight, x.targets, advantages, PolicyLoss()) for x in (ours, theirs)]
    out = linear_policy_loss(*arguments[0], bias=ours.bias, main_grad=main_grad, metrics=metrics, **more)
    out.loss.backward()
    linear_policy_loss(*arguments[1], bias=theirs.bias, **more).loss.backward()
    assert ours.weight.grad is None
    assert_exact(main_grad - 1, theirs.weight.grad)
    assert_exact(ours.hidden.grad, theirs.hidden.grad)
    assert_exact(ours.bias.grad, theirs.bias.grad)


@pytest.mark.parametrize("entropy", [True, False])
def test_linear_token_loss_is_that_of_the_masked_definition(path, entropy):
    inputs = gaussian(11, 8, 37)
    sets = random_sets(inputs)
    weights = torch.linspace(0.1, 1.0, 11, dtype=torch.float64) * (inputs.targets != IGNORE)
    weights[4] = 0
    given = [[-5, 99, 3, 3] if row == 4 else kept for row, kept in enumerate(sets)]
    context = torch.linspace(-1.0, 1.0, 11, dtype=torch.float64)

    def token_loss(logps, *rest):
        return logps.exp() * rest[-1] + (rest[0] ** 2 if entropy else 0)

    ours, theirs = inputs.leaves(*EVERYTHING), inputs.leaves(*EVERYTHING)
    more = {"weights": weights, "context": (context,), "entropy": entropy, "temperature": 0.7, "softcap": 2.5}
    out = linear_token_loss(
        ours.hidden, ours.weight, ours.targets, token_loss, bias=ours.bias, support=csr(given), **more
    )
    logps, h = masked(theirs, sets, temperature=0.7, softcap=2.5)
    expected = (weights * token_loss(*((logps, h) if entropy else (logps,)), context)).sum()
    assert_exact(out.loss, expected)
    for loss in (out.loss, expected):
        (3 * loss).backward()
    for name, want in theirs.grads().items():
        assert want.abs().max() > 1e-3
        assert_exact(ours.grads()[name], want)


@pytest.mark.parametrize("op", ["linear_policy_loss", "linear_token_loss"])
def test_a_loss_refuses_a_named_backend_and_a_set_without_its_target(op):
    hidden, weight, targets = good()
    support, wrong = (torch.tensor([6, 4]), torch.tensor([0, 1, 1, 2])), (torch.tensor([4]), torch.tensor([0, 1]))
    losses = {
        "linear_policy_loss": lambda **more: linear_policy_loss(
            hidden,
            weight,
            targets,
            torch.ones(3),
            PolicyLoss(),
            mask=torch.ones(3, dtype=torch.bool),
            cu_seqlens=torch.tensor([0, 3]),
            **more,
        ),
        "linear_token_loss": lambda **more: linear_token_loss(
            hidden, weight, targets, torch.neg, weights=torch.ones(3), **more
        ),
    }
    with pytest.raises(ValueError, match=rf"^{op}: backend: expected 'auto' with support"):
        losses[op](support=support, backend="reference")
    with pytest.raises(ValueError, match=rf"^{op}: support\[1\]: .*\(4,\)"):
        losses[op](support=wrong)
    with pytest.raises(ValueError, match="the target in its row's set, got one without at row 0"):
        losses[op](support=support)


# The door.


def good():
    hidden, weight = torch.ones(3, 8), torch.ones(37, 8)
    return hidden, weight, torch.tensor([4, IGNORE, 6])


WRONG = {
    "not a pair": (torch.zeros(3), TypeError, "support: expected a pair"),
    "not tensors": (([4, 6], [0, 1, 1, 2]), TypeError, r"support\[0\]: expected a tensor, got a list"),
    "ids not integers": ((torch.ones(2), torch.tensor([0, 1, 1, 2])), TypeError, r"support\[0\]: expected an int64"),
    "ids on another device": (
        (torch.ones(2, dtype=torch.int64, device="meta"), torch.tensor([0, 1, 1, 2])), ValueError, "expected device cpu"
    ),
    "ids of two dimensions": (
        (torch.tensor([[4], [6]]), torch.tensor([0, 1, 1, 2])), ValueError, r"support\[0\]: expected shape \(nnz,\)"
    ),
    "one bound too few": ((torch.tensor([4, 6]), torch.tensor([0, 1, 2])), ValueError, r"support\[1\]: .*\(4,\)"),
    "bounds that fall": ((torch.tensor([4, 6]), torch.tensor([0, 2, 1, 2])), ValueError, "offsets that ascend"),
    "bounds past the ids": ((torch.tensor([4, 6]), torch.tensor([0, 1, 1, 3])), ValueError, "from 0 to 2"),
    "bounds from one": ((torch.tensor([4, 6]), torch.tensor([1, 1, 1, 2])), ValueError, "from 0 to 2"),
    "an empty set": ((torch.tensor([4]), torch.tensor([0, 1, 1, 1])), ValueError, "target in its row's set.*at row 2"),
    "no ids at all": (
        (torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)), ValueError, "target in .* at row 0"
    ),
    "a target of another set": (
        (torch.tensor([6, 4]), torch.tensor([0, 1, 1, 2])), ValueError, "target in .* at row 0. The sampler could not"
    ),
    "an id twice": ((torch.tensor([4, 6, 1, 6]), torch.tensor([0, 1, 1, 4])), ValueError, "got one twice at row 2"),
    "an id past the vocabulary": (
        (torch.tensor([4, 6, 37]), torch.tensor([0, 1, 1, 3])), ValueError, r"in \[0, 37\), got another at row 2"
    ),
    "a negative id": ((torch.tensor([4, -1, 6]), torch.tensor([0, 2, 2, 3])), ValueError, "got another at row 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_support_is_refused_and_the_row_named(case):
    support, error, message = WRONG[case]
    with pytest.raises(error, match=f"^linear_logprob: support.*{message.removeprefix('support')}"):
        linear_logprob(*good(), support=support)


def test_a_target_outside_the_vocabulary_is_in_no_set():
    hidden, weight, _ = good()
    support = (torch.tensor([4, 5, 6]), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="the target in its row's set, got one without at row 1"):
        linear_logprob(hidden, weight, torch.tensor([4, 37, 6]), support=support)


def test_ids_that_vocab_size_leaves_out_are_refused():
    support = (torch.tensor([4, 6]), torch.tensor([0, 1, 1, 2]))
    assert linear_logprob(*good(), support=support, vocab_size=7).logps.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"ids in \[0, 6\), got another at row 2.*vocab_size"):
        linear_logprob(*good(), support=support, vocab_size=6)


@pytest.mark.parametrize("name", ["reference", "chunked", "triton"])
def test_a_named_backend_is_refused(name):
    with pytest.raises(ValueError, match="backend: expected 'auto' with support"):
        linear_logprob(*good(), support=(torch.tensor([4, 6]), torch.tensor([0, 1, 1, 2])), backend=name)


@pytest.mark.parametrize("name", ["log_sum_sq_probs", "mean_logits", "is_top1"])
def test_other_outputs_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected False with support"):
        linear_logprob(*good(), support=(torch.tensor([4, 6]), torch.tensor([0, 1, 1, 2])), **{name: True})


def test_a_second_derivative_raises():
    inputs = gaussian(4, 8, 37, ignored=False).leaves("hidden")
    out = scored(inputs, csr(random_sets(inputs)))
    upstream = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(out.logps, inputs.hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^linear_logprob: expected a first derivative"):
        grad.sum().backward()


# torch.library and torch.compile.


def test_the_one_pass_loss_passes_opcheck_with_sets():
    inputs = gaussian(11, 8, 37)
    sets = random_sets(inputs)
    advantages, _ = loss_arguments(inputs, sets)
    head = [one.detach() if isinstance(one, torch.Tensor) else one for one in inputs_of(inputs)]
    mask, main_grad = inputs.targets != IGNORE, torch.zeros(37, 8, dtype=torch.float64)
    tokens = (advantages, mask.double(), mask, None, None, None)
    for given in (None, main_grad):
        rest = (given, PolicyLoss().code, True, 0, True, True, True, "auto", *csr(sets))
        torch.library.opcheck(loss_module._op, (*head, *tokens, *rest), test_utils=("test_schema", "test_faketensor"))


def test_operators_pass_opcheck():
    inputs = gaussian(11, 8, 37).leaves(*EVERYTHING)
    ids, offsets = csr(random_sets(inputs))
    head = inputs_of(inputs)
    torch.library.opcheck(module._op, (*head, ids, offsets, True))
    head = [one.detach() if isinstance(one, torch.Tensor) else one for one in head]
    scores = module._op(*head, ids, offsets, True)
    grads = torch.randn(2, 11, dtype=torch.float64)
    torch.library.opcheck(module.backward_op, (*grads, *head[:5], ids, offsets, *scores, *head[5:], True, True, True))


@pytest.mark.parametrize("requires", [("hidden",), EVERYTHING], ids=["frozen head", "trainable head"])
def test_compiles_without_a_graph_break(requires):
    inputs = gaussian(11, 8, 37)
    support = csr(random_sets(inputs))

    def step(hidden, weight, bias, targets, ids, offsets):
        out = scored(Inputs(hidden, weight, targets, bias), (ids, offsets), temperature=0.7)
        return (out.logps * 3 + out.entropy).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        ours = inputs.leaves(*requires)
        loss = function(ours.hidden, ours.weight, ours.bias, ours.targets, *support)
        loss.backward()
        results.append([loss.detach(), *(g for g in ours.grads().values() if g is not None)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
