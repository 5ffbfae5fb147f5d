from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from ops.cases import IGNORE, ORDERS, SHAPES, Inputs, dense, gaussian, peaked
from tolerance import assert_exact, assert_no_worse

from fastrl import linear_logprob, linear_policy_loss, policy_loss
from fastrl.kernels.linear_logprob import chunked, storage
from fastrl.kernels.policy_loss import METRICS
from fastrl.ops import attach
from fastrl.ops import linear_policy_loss as module
from fastrl.ops.attach import attach_gradients
from fastrl.spec import KL, Cispo, Clip, Correction, Dppo, PolicyLoss, Reinforce, Sapo

EVERYTHING = ("hidden", "weight", "bias")
SPECS = {
    "reinforce": PolicyLoss(surrogate=Reinforce()),
    "clip": PolicyLoss(surrogate=Clip(0.2, 0.28)),
    "dual clip": PolicyLoss(surrogate=Clip(0.2, 0.2, dual=1.3), aggregate="token_mean"),
    "cispo": PolicyLoss(surrogate=Cispo(1.2, 0.8), aggregate="token_mean"),
    "sapo": PolicyLoss(surrogate=Sapo(1.0, 1.05)),
    "dppo, k3+": PolicyLoss(surrogate=Dppo(0.005, 0.01), kl=KL("k3+", 0.3)),
    "k1": PolicyLoss(kl=KL("k1", 0.3)),
    "k2": PolicyLoss(kl=KL("k2", 0.3)),
    "k3": PolicyLoss(kl=KL("k3", 0.3)),
    "k3_ratio": PolicyLoss(kl=KL("k3_ratio", 0.3)),
    "entropy bonus": PolicyLoss(entropy_coef=0.1),
    "entropy penalty": PolicyLoss(entropy_coef=-0.1, kl=KL("k3", 0.1), surrogate=Reinforce()),
    "truncated weights": PolicyLoss(correction=Correction("truncate", "token", 1.1)),
    "masked weights": PolicyLoss(correction=Correction("mask", "token", 1.2, 0.8), entropy_coef=0.1),
}
TWO_OPS = {
    "sequence ratio": PolicyLoss(ratio="sequence", surrogate=Clip(0.02, 0.03), kl=KL("k3", 0.1), entropy_coef=0.1),
    "sequence correction": PolicyLoss(correction=Correction("truncate", "sequence", 1.01)),
}
OPTIONS = {
    "no options": lambda shape: {},
    "temperature a float": lambda shape: {"temperature": 0.7},
    "temperature per token": lambda shape: {"temperature": torch.rand(shape, dtype=torch.float64) + 0.5},
    "softcap": lambda shape: {"softcap": 2.5},
    "logit_scale": lambda shape: {"logit_scale": 0.5},
    "ignore_index a valid id": lambda shape: {"ignore_index": 0},
    "all": lambda shape: {"temperature": torch.tensor(0.6).double(), "softcap": 3.0, "logit_scale": 0.5},
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Five rows of a float64 vocabulary of 37 at a time, and 16-bit weights widened 100 rows at a time."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 5 * 37 * 8)
    monkeypatch.setattr(chunked, "VOCABULARY_TILE", 100)
    monkeypatch.setattr(storage, "LOGIT_BYTES", 5 * 37 * 8)
    monkeypatch.setattr(storage, "FEWEST_ROWS", 5)
    monkeypatch.setattr(storage, "FEWEST_WIDTH", 1)


# The definition, by autograd.


def token_loss(spec, logps, entropy, advantages, old, ref, sampling):
    """The loss of each token, written down again."""
    ratio = (logps - old).exp()
    match spec.surrogate:
        case Clip(low, high, dual):
            loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
            if dual is not None:
                loss = torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)
        case Cispo(high, low):
            loss = -ratio.detach().clamp(low, high) * advantages * logps
        case Sapo(pos, neg):
            tau = torch.where(advantages > 0, logps.new_tensor(pos), logps.new_tensor(neg))
            loss = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
        case Dppo(low, high):
            moved = (logps.exp() - old.exp()).detach()
            gone = ((advantages < 0) & (moved < -low)) | ((advantages > 0) & (moved > high))
            loss = -ratio * advantages * ~gone
        case Reinforce():
            loss = -advantages * logps
    if spec.correction is not None:
        weight = (old - sampling).exp()
        low, high = spec.correction.low, spec.correction.high
        weight = (
            weight.clamp(max=high)
            if spec.correction.kind == "truncate"
            else weight * ((weight >= low) & (weight <= high))
        )
        loss = weight * loss
    if spec.kl is not None:
        d = ref - logps
        k3 = d.exp() - d - 1
        k2 = d.square() / 2
        kls = {"k1": -d, "k2": k2, "k3": k3, "k3_ratio": ratio * k3, "k3+": k3.detach() + k2 - k2.detach()}
        loss = loss + spec.kl.coef * kls[spec.kl.kind]
    return loss - spec.entropy_coef * entropy


def token_weights(spec, mask):
    mask = mask.double()
    if spec.aggregate == "token_mean":
        return mask / mask.sum().clamp(min=1)
    lengths = mask.sum(-1, keepdim=True)
    return mask / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)


def batch(shape=(4, 6), size=8, vocabulary=37, **options):
    """Inputs, and token tensors: a masked-out sequence, a zero-advantage one, ratios beyond the bounds."""
    flat = gaussian(math.prod(shape), size, vocabulary, **options)
    inputs = Inputs(flat.hidden.reshape(*shape, size), flat.weight, flat.targets.reshape(shape), flat.bias)
    mask = torch.rand(shape) < 0.8
    mask[-1:] = False
    advantages = torch.randn(shape[0], dtype=torch.float64)
    advantages[:1] = 0
    logps = dense(inputs)[0].detach()
    others = {
        name: logps + 0.4 * torch.randn(shape, dtype=torch.float64)
        for name in ("old_logps", "ref_logps", "sampling_logps")
    }
    return inputs, advantages, {"mask": mask, **others}


def fused(inputs, advantages, spec, tokens, **options):
    return linear_policy_loss(
        inputs.hidden, inputs.weight, inputs.targets, advantages, spec, bias=inputs.bias, **tokens, **options
    )


def compare_with_dense(case, spec, requires, options, *, on_policy=False, **paths):
    inputs, advantages, tokens = case
    ours, theirs = inputs.leaves(*requires), inputs.leaves(*requires)
    if on_policy:
        tokens = tokens | {"old_logps": None}
    out = fused(ours, advantages, spec, tokens, **options, **paths)
    logps, entropy = dense(theirs, **options)
    mask = tokens["mask"] & (inputs.targets != options.get("ignore_index", IGNORE))
    old = logps.detach() if on_policy else tokens["old_logps"]
    losses = token_loss(spec, logps, entropy, advantages[:, None], old, tokens["ref_logps"], tokens["sampling_logps"])
    loss = (token_weights(spec, mask) * losses).sum()
    assert_exact(out.loss, loss)
    if requires:
        (3 * out.loss).backward()
        (3 * loss).backward()
    for name, expected in theirs.grads().items():
        got = ours.grads()[name]
        assert (got is None) == (expected is None), name
        if expected is not None:
            assert_exact(got, expected)


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("spec", SPECS)
def test_equals_dense_for_every_spec(backend, spec, on_policy, small_chunks):
    compare_with_dense(batch(), SPECS[spec], EVERYTHING, {}, on_policy=on_policy, backend=backend)


@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_dense_with_every_option(backend, option, metrics, small_chunks):
    options = OPTIONS[option]((4, 6))
    case = batch(ignored="ignore_index" not in options)
    case[0].targets[1, 1] = 0
    spec = PolicyLoss(kl=KL("k3", 0.3), entropy_coef=0.1)
    for s in (spec, SPECS["clip"]):
        compare_with_dense(case, s, EVERYTHING, options, metrics=metrics, backend=backend)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_dense_at_every_shape(backend, shape):
    rows, size, vocabulary = SHAPES[shape]
    options = {"temperature": torch.rand(rows, 1, dtype=torch.float64) + 0.5}
    compare_with_dense(batch((rows, 1), size, vocabulary), SPECS["entropy bonus"], EVERYTHING, options, backend=backend)


@pytest.mark.parametrize("spec", ["clip", "entropy bonus"])
@pytest.mark.parametrize(
    "requires",
    [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight"), ("weight", "bias")],
    ids=lambda names: "+".join(names) or "nothing",
)
def test_gives_a_gradient_to_exactly_what_requires_one(backend, requires, spec, small_chunks):
    compare_with_dense(batch(), SPECS[spec], requires, {"softcap": 3.0}, backend=backend)


@pytest.mark.parametrize(
    ("spec", "memory"), [*product(SPECS, ["auto"]), *product(TWO_OPS, ["store", "recompute", "auto", 0])]
)
def test_equals_the_two_ops_with_loss_gradients_and_metrics(backend, spec, memory, small_chunks):
    (inputs, advantages, tokens), spec = batch(), (SPECS | TWO_OPS)[spec]
    tokens["mask"] &= inputs.targets != IGNORE
    ours, theirs = inputs.leaves(*EVERYTHING), inputs.leaves(*EVERYTHING)
    out = fused(ours, advantages, spec, tokens, temperature=0.7, entropy=True, memory=memory, backend=backend)
    read = linear_logprob(theirs.hidden, theirs.weight, theirs.targets, bias=theirs.bias, temperature=0.7, entropy=True)
    expected = policy_loss(read.logps, advantages, spec, entropy=read.entropy, **tokens)
    out.loss.backward()
    expected.loss.backward()
    assert_exact(out.loss, expected.loss)
    for got, want in zip(ours.grads().values(), theirs.grads().values(), strict=True):
        assert_exact(got, want)
    assert out.metrics.keys() == expected.metrics.keys()
    for name, row in expected.metrics.items():
        for got, want in zip(out.metrics[name], row, strict=True):
            assert_exact(got, want)


def test_packed_tokens_with_any_strides(backend, small_chunks):
    inputs, advantages, tokens = batch(ignored=False)
    tokens["mask"][:] = True
    lengths = torch.tensor([0, 6, 12, 18, 24])
    spec, results = SPECS["k3"], []
    for packed in (False, True):
        ours = inputs.leaves(*EVERYTHING)
        hidden, weight, targets = ours.hidden, ours.weight, ours.targets
        token_inputs = dict(tokens)
        if packed:
            hidden = torch.stack((hidden, -hidden), -1)[..., 0].flatten(0, 1)
            weight, targets = weight.T.contiguous().T, torch.stack((targets, targets), -1).flatten(0, 1)[:, 0]
            token_inputs = {k: torch.stack((v, v), -1).flatten(0, 1)[:, 1] for k, v in tokens.items()}
            token_inputs["cu_seqlens"] = lengths
        out = linear_policy_loss(
            hidden, weight, targets, advantages, spec, bias=ours.bias, **token_inputs, backend=backend
        )
        out.loss.backward()
        results.append((out.loss.detach(), *ours.grads().values()))
    for got, want in zip(*results, strict=True):
        assert_exact(got, want)


def test_a_tied_weight_collects_the_gradient_of_both_uses(backend):
    inputs, advantages, tokens = batch()
    ids = torch.randint(37, inputs.targets.shape)
    results = []
    for one_pass in (True, False):
        tied = inputs.weight.clone().requires_grad_()
        hidden = torch.tanh(tied[ids])
        if one_pass:
            out = linear_policy_loss(hidden, tied, inputs.targets, advantages, SPECS["k3"], **tokens, backend=backend)
        else:
            logps = dense(Inputs(hidden, tied, inputs.targets))[0]
            mask = tokens["mask"] & (inputs.targets != IGNORE)
            out = policy_loss(logps, advantages, SPECS["k3"], **(tokens | {"mask": mask}))
        out.loss.backward()
        results.append(tied.grad)
    assert_exact(*results)


@pytest.mark.parametrize("requires", [EVERYTHING, ("hidden",)], ids=["trainable head", "frozen head"])
def test_gradcheck(backend, requires, small_chunks):
    inputs, advantages, tokens = batch((3, 2), 3, 7)
    ours = inputs.leaves(*requires)
    spec = PolicyLoss(surrogate=Sapo(), kl=KL("k3_ratio", 0.3), entropy_coef=0.1)

    def op(hidden, weight, bias):
        x = Inputs(hidden, weight, ours.targets, bias)
        return fused(x, advantages, spec, tokens, softcap=3.0, temperature=0.8, backend=backend).loss

    assert torch.autograd.gradcheck(op, (ours.hidden, ours.weight, ours.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("requires", [EVERYTHING, ("hidden",)], ids=["trainable head", "frozen head"])
def test_no_worse_than_plain_torch_on_peaked_logits(backend, dtype, requires, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 100 * 515 * 4)
    monkeypatch.setattr(chunked, "VOCABULARY_TILE", 128)
    # no bound to cross: there a rounding would become a jump
    spec = PolicyLoss(surrogate=Sapo(), kl=KL("k2", 0.1), entropy_coef=0.1, aggregate="token_sum")
    inputs = peaked(264, 64, 515, dtype)
    truth_logps = dense(inputs.leaves(dtype=torch.float64))[0]
    advantages = torch.randn(264)
    old, ref = (truth_logps + 0.2 * torch.randn(264) for _ in range(2))
    mask = inputs.targets != IGNORE
    ours, truth = inputs.leaves(*requires), inputs.leaves(*requires, dtype=torch.double)
    plains = [inputs.leaves(*requires) for _ in range(ORDERS)]
    losses = [
        fused(
            ours,
            advantages,
            spec,
            {"mask": mask, "old_logps": old.float(), "ref_logps": ref.float()},
            normalizer=1.0,
            backend=backend,
        ).loss
    ]
    orders = [(x.reordered(seed), torch.float32) for seed, x in enumerate(plains)]
    for x, working in (*orders, (truth, torch.float64)):
        logps, entropy = dense(x, upcast=working)
        values = (t.to(working) for t in (advantages, old.float(), ref.float()))
        losses.append((mask * token_loss(spec, logps, entropy, *values, None)).sum())
    for loss in losses:
        loss.backward()
    got, expected, *_, want = (loss.detach() for loss in losses)
    assert abs(got.double() - want) <= abs(expected.double() - want) + 1e-5 * abs(want)
    for name in requires:
        assert_no_worse(ours.grads()[name], [x.grads()[name] for x in plains], truth.grads()[name], name=f"d {name}")


# The contract at the edges.


def test_tokens_outside_the_mask_are_never_touched(backend, small_chunks):
    """NaN everywhere, and ids outside the vocabulary."""
    inputs, advantages, tokens = batch(ignored=False)
    tokens["mask"][:, 1] = False
    out = ~tokens["mask"]
    results = []
    for break_it in (False, True):
        ours, given = inputs.leaves(*EVERYTHING), dict(tokens)
        if break_it:
            ours.hidden.data[out] = math.nan
            ours.targets = ours.targets.masked_fill(out, 10**6)
            given |= {k: v.masked_fill(out, math.nan) for k, v in tokens.items() if k != "mask"}
        loss = fused(ours, advantages, SPECS["masked weights"], given, entropy=True, backend=backend)
        loss.loss.backward()
        metrics = [t for row in loss.metrics.values() for t in row]
        results.append([loss.loss.detach(), *ours.grads().values(), *metrics])
    for without, with_garbage in zip(*results, strict=True):
        assert torch.equal(without, with_garbage)
    assert (results[1][1][out] == 0).all()


@pytest.mark.parametrize("spec", ["clip", "entropy bonus", "k3"])
@pytest.mark.parametrize("why", ["mask", "ignored"])
def test_nothing_to_train_on_gives_loss_zero_and_zero_gradients(backend, spec, why):
    inputs, advantages, tokens = batch()
    ours = inputs.leaves(*EVERYTHING)
    if why == "mask":
        tokens["mask"][:] = False
    else:
        ours.targets = torch.full_like(ours.targets, IGNORE)
    out = fused(ours, advantages, SPECS[spec], tokens, backend=backend)
    out.loss.backward()
    assert out.loss == 0
    assert all((g == 0).all() for g in ours.grads().values())
    assert all((total == 0) and (count == 0) for total, count in out.metrics.values())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_token_is_counted_and_spoils_no_other_token(backend, poison, small_chunks):
    inputs, advantages, tokens = batch(ignored=False)
    tokens["mask"][1] = True
    results = []
    for fill in (None, poison):
        ours = inputs.leaves("hidden")
        if fill is not None:
            ours.hidden.data[1, 2] = fill
        out = fused(ours, advantages, SPECS["clip"], tokens, backend=backend)
        out.loss.backward()
        results.append((out, ours.hidden.grad))
    (_, clean), (out, grad) = results
    others = torch.ones(4, 6, dtype=torch.bool)
    others[1, 2] = False
    assert out.loss.isnan()
    assert out.metrics["nonfinite_rows"][0] == 1
    assert grad[1, 2].isnan().all()
    assert torch.equal(grad[others], clean[others])


def test_tokens_of_a_masked_vocabulary(backend, small_chunks):
    inputs, advantages, tokens = batch(ignored=False)
    live = torch.arange(37) >= 20
    inputs.targets = inputs.targets % 17 + 20
    inputs.bias[~live] = -math.inf
    ours = inputs.leaves(*EVERYTHING)
    theirs = Inputs(inputs.hidden, inputs.weight[live], inputs.targets - 20, inputs.bias[live]).leaves(*EVERYTHING)
    for x in (ours, theirs):
        fused(x, advantages, SPECS["masked weights"], tokens, backend=backend).loss.backward()
    assert_exact(ours.hidden.grad, theirs.hidden.grad)
    for name in ("weight", "bias"):
        assert_exact(ours.grads()[name][live], theirs.grads()[name])
        assert (ours.grads()[name][~live] == 0).all()


def test_an_id_outside_the_vocabulary_raises_and_names_the_row(backend):
    inputs, advantages, tokens = batch(ignored=False)
    tokens["mask"][1, 3], inputs.targets[1, 3] = True, 37
    with pytest.raises(IndexError, match="got 37 at row 9"):
        fused(inputs, advantages, SPECS["clip"], tokens, backend=backend)


def test_backward_twice_doubles_the_gradient(backend):
    inputs, advantages, tokens = batch()
    ours = inputs.leaves(*EVERYTHING)
    loss = fused(ours, advantages, SPECS["entropy bonus"], tokens, backend=backend).loss
    loss.backward(retain_graph=True)
    once = {name: g.clone() for name, g in ours.grads().items()}
    loss.backward()
    for name, grad in ours.grads().items():
        assert torch.equal(grad, 2 * once[name])


def test_double_backward_raises(backend):
    inputs, advantages, tokens = batch()
    ours = inputs.leaves("hidden")
    loss = fused(ours, advantages, SPECS["clip"], tokens, backend=backend).loss
    (grad,) = torch.autograd.grad(loss * ours.hidden.sum(), ours.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="It has no second derivative"):
        grad.sum().backward()


def test_inputs_are_never_overwritten(backend, small_chunks):
    inputs, advantages, tokens = batch()
    ours = inputs.leaves(*EVERYTHING)
    tensors = (ours.hidden, ours.weight, ours.bias, ours.targets, advantages, *tokens.values())
    before = [t.clone() for t in tensors]
    fused(ours, advantages, SPECS["masked weights"], tokens, softcap=3.0, backend=backend).loss.backward()
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new)


def test_everything_but_the_head_is_a_constant(backend):
    inputs, advantages, tokens = batch()
    ours = inputs.leaves(*EVERYTHING)
    constants = {k: v.clone().requires_grad_() for k, v in tokens.items() if k != "mask"}
    advantages.requires_grad_()
    fused(ours, advantages, SPECS["masked weights"], tokens | constants, backend=backend).loss.backward()
    assert ours.weight.grad is not None
    assert all(t.grad is None for t in (advantages, *constants.values()))


def test_without_gradients_the_loss_is_the_same(backend):
    inputs, advantages, tokens = batch()
    ours = inputs.leaves(*EVERYTHING)
    loud = fused(ours, advantages, SPECS["clip"], tokens, backend=backend).loss
    with torch.no_grad():
        quiet = fused(ours, advantages, SPECS["clip"], tokens, backend=backend).loss
    assert torch.equal(loud, quiet)
    assert not quiet.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(6, dtype=torch.bool)}, "linear_policy_loss: mask: expected shape"),
        ({"old_logps": torch.zeros(4, 5)}, "linear_policy_loss: old_logps: expected shape"),
        ({"advantages": torch.zeros(5)}, "linear_policy_loss: advantages: expected shape"),
        ({"weight": torch.zeros(37, 9)}, "linear_policy_loss: hidden: expected last dimension 9"),
        ({"spec": PolicyLoss(kl=KL("k3", 0.1))}, "linear_policy_loss: ref_logps: expected a tensor"),
        ({"spec": "GRPO"}, "linear_policy_loss: spec: expected a PolicyLoss"),
        ({"backend": "chunkd"}, "Did you mean 'chunked'"),
        ({"mask": torch.full((4, 6), 0.5)}, "linear_policy_loss: mask: expected a bool or integer tensor"),
    ],
    ids=["broadcast mask", "old_logps", "advantages", "weight", "no ref_logps", "spec", "backend", "mask of floats"],
)
def test_a_wrong_argument_is_refused_by_name(changes, message):
    good = {"hidden": torch.ones(4, 6, 8), "weight": torch.ones(37, 8), "targets": torch.zeros(4, 6, dtype=torch.int64)}
    good |= {"advantages": torch.ones(4), "spec": PolicyLoss(), "mask": torch.ones(4, 6, dtype=torch.bool)}
    with pytest.raises((ValueError, TypeError), match=message):
        linear_policy_loss(**(good | changes))


# torch.library and torch.compile.


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False,) * 3], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "column-major"])
@pytest.mark.parametrize("into_main_grad", [False, True])
def test_the_operator_passes_opcheck(backend, needs, layout, into_main_grad):
    inputs = gaussian(4, 3, 5, dtype=torch.float32)
    hidden = inputs.hidden if layout == "contiguous" else inputs.hidden.T.contiguous().T
    tokens = (torch.randn(4), torch.rand(4), torch.tensor([True, True, False, True]), *torch.randn(3, 4).unbind())
    spec = SPECS["masked weights"].code
    head = (hidden, inputs.weight, inputs.targets, inputs.bias, torch.ones(1), 3.0, 0.5, IGNORE)
    main_grad = torch.zeros_like(inputs.weight) if into_main_grad and needs[1] else None
    torch.library.opcheck(module._op, (*head, *tokens, main_grad, spec, True, 1 << 20, *needs, backend))


@pytest.mark.parametrize("requires", [EVERYTHING, ("hidden",), ("weight",)], ids="+".join)
def test_attach_gradients_passes_opcheck(requires):
    inputs = gaussian(4, 3, 5, dtype=torch.float32).leaves(*requires)
    tensors = {"hidden": inputs.hidden, "weight": inputs.weight, "bias": inputs.bias}
    gradients = (torch.randn(t.shape if name in requires else 0) for name, t in tensors.items())
    torch.library.opcheck(attach_gradients, (torch.tensor(1.5), *tensors.values(), *gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_gradient_is_scaled_in_pieces_and_rounded_once(dtype, monkeypatch):
    monkeypatch.setattr(attach, "PIECE", 7)
    gradient, scale = torch.randn(5, 9), torch.tensor(1 / 3)
    assert torch.equal(attach.scaled(gradient, scale, dtype), (gradient * scale).to(dtype))
    assert attach.scaled(torch.empty(0), scale, dtype).shape == (0,)


def test_scaled_passes_opcheck():
    torch.library.opcheck(attach.scaled, (torch.randn(3, 4), torch.tensor(0.3), torch.bfloat16))


@pytest.mark.parametrize("spec", ["masked weights", "sequence ratio"])
def test_compiles_without_a_graph_break(spec):
    spec = (SPECS | TWO_OPS)[spec]

    def step(hidden, weight, bias, targets, advantages, tokens):
        out = linear_policy_loss(hidden * 2, weight, targets, advantages, spec, bias=bias, **tokens)
        return out.loss * 3, out.metrics["ratio/mean"][0]

    torch._dynamo.reset()
    base, advantages, tokens = batch()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        ours = base.leaves(*EVERYTHING)
        loss, ratio = function(ours.hidden, ours.weight, ours.bias, ours.targets, advantages, tokens)
        loss.backward()
        results.append((loss.detach(), ratio, *ours.grads().values()))
    for eager, compiled in zip(*results, strict=True):
        assert_exact(compiled, eager)


def test_the_metrics_table_has_a_row_for_every_name(backend):
    inputs, advantages, tokens = batch()
    out = fused(inputs, advantages, SPECS["masked weights"], tokens, entropy=True, backend=backend)
    assert list(out.metrics) == list(METRICS)


@pytest.mark.parametrize("dense_rows", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("spec", SPECS)
def test_main_grad_receives_the_weight_gradient_and_weight_grad_nothing(backend, spec, dense_rows, small_chunks):
    inputs, advantages, tokens = batch()
    plain, ours = inputs.leaves(*EVERYTHING), inputs.leaves(*EVERYTHING)
    fused(plain, advantages, SPECS[spec], tokens, backend=backend).loss.backward()
    main_grad = torch.ones_like(inputs.weight) if dense_rows else torch.ones_like(inputs.weight.T).T
    for _ in range(2):
        fused(ours, advantages, SPECS[spec], tokens, main_grad=main_grad, backend=backend).loss.backward()
    want = plain.grads()
    assert ours.weight.grad is None
    torch.testing.assert_close(main_grad, 1 + 2 * want["weight"], rtol=0, atol=1e-12)
    for name in ("hidden", "bias"):
        torch.testing.assert_close(ours.grads()[name], 2 * want[name], rtol=0, atol=1e-12)


def test_main_grad_stays_as_it_was_when_nothing_trains(backend):
    inputs, advantages, tokens = batch()
    ours, main_grad = inputs.leaves(*EVERYTHING), torch.ones_like(inputs.weight)
    fused(ours, 0 * advantages, SPECS["clip"], tokens, main_grad=main_grad, backend=backend).loss.backward()
    assert (main_grad == 1).all()
    assert (ours.hidden.grad == 0).all()
    assert (ours.bias.grad == 0).all()


def test_main_grad_stays_as_it_was_with_a_frozen_weight_and_without_gradients(backend):
    inputs, advantages, tokens = batch()
    main_grad = torch.ones_like(inputs.weight)
    frozen = inputs.leaves("hidden", "bias")
    fused(frozen, advantages, SPECS["clip"], tokens, main_grad=main_grad, backend=backend).loss.backward()
    assert (frozen.hidden.grad != 0).any()
    with torch.no_grad():
        fused(inputs.leaves(*EVERYTHING), advantages, SPECS["clip"], tokens, main_grad=main_grad, backend=backend)
    assert (main_grad == 1).all()


@pytest.mark.parametrize("spec", ["clip", "sequence ratio"])
@pytest.mark.parametrize("memory", ["nonsense", -1])
def test_memory_is_refused_where_it_is_no_choice_and_no_budget(backend, spec, memory):
    inputs, advantages, tokens = batch()
    for requires in ((), ("hidden",), EVERYTHING):
        with pytest.raises(ValueError, match="linear_policy_loss: memory"):
            fused(inputs.leaves(*requires), advantages, (SPECS | TWO_OPS)[spec], tokens, memory=memory, backend=backend)


@pytest.mark.parametrize("memory", ["store", "recompute", 0])
def test_memory_changes_nothing_of_a_loss_that_separates(backend, memory, small_chunks):
    compare_with_dense(batch(), SPECS["entropy bonus"], EVERYTHING, {}, memory=memory, backend=backend)


def test_a_weight_that_alone_trains_into_main_grad_has_a_loss_to_call_backward_on(backend):
    inputs, advantages, tokens = batch()
    both, alone = torch.zeros_like(inputs.weight), torch.zeros_like(inputs.weight)
    fused(inputs.leaves(*EVERYTHING), advantages, SPECS["clip"], tokens, main_grad=both, backend=backend)
    only = inputs.leaves("weight")
    loss = fused(only, advantages, SPECS["clip"], tokens, main_grad=alone, backend=backend).loss
    (2 * loss).backward()  # joins any graph
    assert alone.abs().sum() > 0
    assert torch.equal(alone, both)
    assert only.weight.grad is None


def test_main_grad_is_refused_where_it_would_be_wrong():
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    targets, advantages, mask = torch.randint(0, 9, (6,)), torch.randn(6), torch.ones(6, dtype=torch.bool)
    with pytest.raises(ValueError, match="main_grad: expected shape"):
        linear_policy_loss(
            hidden,
            weight,
            targets,
            advantages,
            PolicyLoss(aggregate="token_mean"),
            mask=mask,
            main_grad=torch.zeros(4, 9),
        )
    sequences = PolicyLoss(ratio="sequence")
    with pytest.raises(ValueError, match="main_grad: expected None for a loss on whole sequences"):
        linear_policy_loss(
            hidden.view(2, 3, 4),
            weight,
            targets.view(2, 3),
            advantages[:2],
            sequences,
            mask=mask.view(2, 3),
            main_grad=torch.zeros_like(weight),
        )
