"""How often the host waits for a GPU in each op and loss, counted without one.

A `Pretended` tensor says that it is on a GPU and keeps its numbers on the CPU. It sees every torch operation, so what
makes a host wait is counted: a number read, a size that depends on data, a copy between the two that is not queued.
The kernels run as everywhere else in these tests, Triton interpreted and CUDA emulated.
"""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch
from backends import CUDA, DEVICE
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastrl import (
    GroupAdvantage,
    PolicyLoss,
    gae,
    group_advantages,
    group_policy_loss,
    linear_logprob,
    linear_policy_loss,
    linear_token_loss,
    logprob,
    policy_loss,
    preference_loss,
    presets,
    reward_model_loss,
    unpaired_preference_loss,
    value_loss,
)
from fastrl.kernels import cuda, native, registry, triton_jit, tuning
from fastrl.kernels.linear_logprob import chunked

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU that is there needs no pretence")

GPU = torch.device("cuda", 0)
WAITS = []  # what waited, by name
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.allclose.default}
SIZES = {  # operations whose output has a size that depends on data
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Pretended(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data):
        kinds = {"dtype": data.dtype, "strides": data.stride(), "storage_offset": data.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, data.shape, **kinds)
        made.data_there = data
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace == "fastrl":
            with Moves():
                return OPDEFS[op._schema.name]._init_fn(*args, **kwargs)
        if op in READS or op in SIZES or (op in MASKED and any(is_bool(one) for one in args[1] if one is not None)):
            WAITS.append(str(op))
        wrappers = {}

        def there(one):
            if isinstance(one, Pretended):
                wrappers[id(one.data_there)] = one
            return inner(one)

        args, kwargs = tree_map(there, args), tree_map(there, kwargs)
        out = mixed(op, args, **kwargs) if op in MIXED else op(*args, **kwargs)
        return tree_map(lambda one: wrappers[id(one)] if id(one) in wrappers else outer(one), out)


MIXED = {getattr(packet, name) for packet in (aten.mm, aten.addmm) for name in packet.overloads() if "dtype" in name}


def mixed(op, matrices, *, out=None, **_):
    """A product of 16-bit matrices in float32, which torch has on a GPU only."""
    *matrices, dtype = matrices
    product = (torch.mm if len(matrices) == 2 else torch.addmm)(*(one.to(dtype) for one in matrices))
    return product if out is None else out.copy_(product)


def is_bool(one):
    return one.dtype in (torch.bool, torch.uint8)


def inner(one):
    return one.data_there if isinstance(one, Pretended) else one


def outer(one):
    return Pretended(one) if type(one) is torch.Tensor else one


class Moves(TorchFunctionMode):
    """Makes tensors where they are asked for, and counts the moves that wait."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        where = next((one for one in (*args[1:], *kwargs.values()) if is_device(one)), None)
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        name = getattr(function, "__name__", "")
        if name in ("cpu", "tolist", "numpy") and isinstance(source, Pretended):
            WAITS.append(name)
            return getattr(source.data_there, name)()
        if where is None or name == "__get__":
            return function(*args, **kwargs)
        to_gpu = torch.device(where).type == "cuda"
        moved = name == "tensor" or (source is not None and name == "to" and isinstance(source, Pretended) != to_gpu)
        if moved and not kwargs.get("non_blocking"):
            WAITS.append(f"{name} {where}")
        if source is not None and name == "to" and to_gpu == isinstance(source, Pretended):
            args, kwargs = without(where, args), {k: v for k, v in kwargs.items() if v is not where}
            return function(*args, **kwargs) if len(args) > 1 or kwargs.keys() - {"non_blocking"} else source
        args, kwargs = tree_map(inner, args) if moved else args, dict(kwargs)
        on_cpu = [torch.device("cpu") if one is where else one for one in args]
        out = function(*on_cpu, **{k: torch.device("cpu") if v is where else v for k, v in kwargs.items()})
        return outer(out) if to_gpu else out


def without(where, args):
    return tuple(one for one in args if one is not where)


def is_device(one):
    return isinstance(one, torch.device) or (isinstance(one, str) and one == "cpu")  # "cuda" is a backend's name too


class Event:
    """A stream, and an event on it, that count their waits."""

    def record_event(self):
        return self

    def synchronize(self):
        WAITS.append("event")


@pytest.fixture(autouse=True)
def _pretence(monkeypatch):
    """Kernels take pretended tensors; each backend is the one asked for."""
    monkeypatch.setattr(registry, "choose", lambda op, backend, device: registry.TABLE[op][backend])
    monkeypatch.setattr(tuning, "architecture", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Event())
    fitting = triton_jit.fitting
    monkeypatch.setattr(
        triton_jit, "fitting", lambda options, special: {k: inner(v) for k, v in fitting(options, special).items()}
    )
    for op in registry.OPS:
        for name, kernel in registry.TABLE[op].items():
            if name in ("triton", *CUDA):
                import_module(kernel.module)
    emulated = {
        "extension": lambda device: cuda.load_emulated(),
        "launch": lambda name, device, *arguments: getattr(cuda.load_emulated(), name)(*arguments, 0, 0),
        "address": lambda tensor: native.address(inner(tensor)),
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("fastrl.kernels.") and name.endswith(("cuda_impl", "epilogue")):
            for one, new in emulated.items():
                if hasattr(module, one):
                    monkeypatch.setattr(module, one, new)
    yield
    triton_jit.scalars.cache_clear()  # which hold what is pretended
    chunked.adds_into_float32.cache_clear()


def waits(function):
    """How often `function` waits, once the constants of its kernels are where they belong."""
    with Moves():
        function()
        WAITS.clear()
        function()
    return list(WAITS)


def on(tensor, grad=False):
    return Pretended(tensor).requires_grad_(grad)


# What is counted.

SEEN = {
    "a number read": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0).all()),
    "a list": lambda x: x.tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy by name": lambda x: x.to("cpu"),
    "a copy to the device": lambda x: torch.ones(2).to(x.device),
    "a tensor of numbers": lambda x: torch.tensor([1.0], device=x.device),
    "the places of what is not zero": lambda x: x.nonzero(),
    "what a mask selects": lambda x: x[x > 0],
    "a mask written to": lambda x: x.__setitem__(x > 0, x[:1] * 2),
    "distinct values": lambda x: x.unique(),
    "an event": lambda x: torch.cuda.current_stream(x.device).record_event().synchronize(),
}
UNSEEN = {
    "arithmetic": lambda x: torch.where(x > 0, x * 2, 0.0).masked_fill_(x < 1, 0).sum(),
    "places that are known": lambda x: x[torch.arange(2, device=x.device)],
    "a sort": lambda x: x.sort(stable=True),
    "a copy that is queued": lambda x: x.to("cpu", non_blocking=True),
    "another dtype": lambda x: x.to(x.device, torch.float64),
}


@pytest.mark.parametrize("case", SEEN)
def test_what_waits_is_counted(case):
    x = on(torch.tensor([1.0, -2.0, 3.0]))
    assert len(waits(lambda: SEEN[case](x))) >= 1


@pytest.mark.parametrize("case", UNSEEN)
def test_what_does_not_wait_is_not_counted(case):
    x = on(torch.tensor([1.0, -2.0, 3.0]))
    assert waits(lambda: UNSEEN[case](x)) == []


# The ops that contain the head.

KERNELS = (*CUDA, "triton")
N, H, V = 24, 16, 40
ROWS, MASK = torch.tensor([0, 5, 20]), torch.arange(N) % 5 != 1


def leaf(*shape, grad=True):
    return on(torch.randn(*shape).bfloat16(), grad)


def of_head(backend, grads=2, **options):
    """`linear_logprob` forward, and backward where `grads` of hidden and weight need gradients."""
    out = linear_logprob(leaf(N, H, grad=grads > 0), leaf(V, H, grad=grads > 1), ids(), backend=backend, **options)
    if grads:
        sum(one.sum() for one in out if one is not None and one.requires_grad).backward()


def ids():
    return on(torch.randint(V, (N,)).masked_fill(~MASK, -100))


FORWARD, BOTH = ["event"], ["event", "event"]
OPTIONS = {"plain": {}, "entropy": {"entropy": True}, "temperature": {"temperature": 0.7}}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("backend", ["chunked", *KERNELS])
def test_a_trainable_head_waits_once_per_pass_for_the_number_of_rows(backend, memory, option):
    assert waits(lambda: of_head(backend, memory=memory, **OPTIONS[option])) == BOTH


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", ["chunked", *KERNELS])
def test_a_frozen_head_waits_in_its_forward_pass_alone(backend, option):
    assert waits(lambda: of_head(backend, grads=1, **OPTIONS[option])) == FORWARD


@pytest.mark.parametrize("option", OPTIONS)
def test_triton_without_a_gradient_never_waits(option):
    assert waits(lambda: of_head("triton", grads=0, **OPTIONS[option])) == []


@pytest.mark.parametrize("backend", ["chunked", *CUDA])
def test_other_backends_without_a_gradient_wait_once(backend):
    assert waits(lambda: of_head(backend, grads=0)) == FORWARD


SPECS = {"GRPO": presets.GRPO, "DAPO": presets.DAPO, "sequences": presets.GSPO, "entropy": PolicyLoss(entropy_coef=0.1)}


def tokens(spec):
    """What the policy losses take of each token, packed."""
    more = {} if spec.kl is None else {"ref_logps": on(torch.randn(N))}
    return {"mask": on(MASK), "old_logps": on(torch.randn(N)), "cu_seqlens": on(ROWS), **more}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", ["chunked", *KERNELS])
def test_linear_policy_loss_waits_for_the_rows_and_for_those_with_a_gradient(backend, spec):
    def step():
        spec_ = SPECS[spec]
        given = (leaf(N, H), leaf(V, H), ids(), on(torch.randn(N)), spec_)
        linear_policy_loss(*given, **tokens(spec_), backend=backend).loss.backward()

    assert waits(step) == BOTH


@pytest.mark.parametrize("backend", ["chunked", *KERNELS])
def test_linear_token_loss_waits_twice_per_chunk(backend):
    def step(chunks):
        options = {"weights": on(torch.ones(N)), "memory": 2 * V * N // chunks, "backend": backend}
        linear_token_loss(leaf(N, H), leaf(V, H), ids(), lambda logps: -logps, **options).loss.backward()

    assert waits(lambda: step(1)) == BOTH
    assert waits(lambda: step(3)) == BOTH * 3


def test_sets_of_kept_ids_wait():
    """As documented; how often is not promised."""
    kept = torch.arange(5) + torch.arange(N).unsqueeze(1) % 30

    def step():
        pair = (on(kept.reshape(-1)), on(torch.arange(N + 1) * 5))
        linear_logprob(leaf(N, H), leaf(V, H), on(kept[:, 2].clone()), support=pair).logps.sum().backward()

    assert waits(step) != []


# Everything else waits for nothing.


def of_logits(backend):
    out = logprob(on(torch.randn(N, V), True), ids(), entropy=True, backend=backend)
    (out.logps.sum() + out.entropy.sum()).backward()


def of_policy(backend, spec, packed):
    given = tokens(spec)
    shape = (N,) if packed else (4, N // 4)
    if not packed:
        del given["cu_seqlens"]
        given = {name: one.reshape(shape) for name, one in given.items()}
    entropy = {"entropy": on(torch.rand(shape), True)} if spec.entropy_coef else {}
    advantages = on(torch.randn(shape))
    policy_loss(on(torch.randn(shape), True), advantages, spec, **given, **entropy, backend=backend).loss.backward()


def of_groups(backend, spec, scale):
    given = {name: one.reshape(4, -1) for name, one in tokens(spec).items() if name != "cu_seqlens"}
    entropy = {"entropy": on(torch.rand(4, N // 4), True)} if spec.entropy_coef else {}
    estimator = GroupAdvantage(scale=scale)
    logps, rewards = on(torch.randn(4, N // 4), True), on(torch.randn(4))
    group_policy_loss(
        logps, rewards, estimator, spec, group_size=2, **given, **entropy, backend=backend
    ).loss.backward()


def numbers(*shape):
    return on(torch.randn(*shape))


OPS = {
    "logprob": of_logits,
    "gae": lambda backend: gae(numbers(4, 6), numbers(4, 6), on(MASK.view(4, 6)), backend=backend),
    "gae packed": lambda backend: gae(numbers(N), numbers(N), on(MASK), cu_seqlens=on(ROWS), backend=backend),
    "group_advantages": lambda backend: group_advantages(numbers(8), group_size=4, backend=backend),
    "group_advantages of ids": lambda backend: group_advantages(
        numbers(8), group_ids=on(torch.arange(8) // 3), scale="batch", backend=backend
    ),
    **{
        f"policy_loss {name} {'packed' if packed else 'padded'}": lambda backend, spec=spec, packed=packed: of_policy(
            backend, spec, packed
        )
        for name, spec in SPECS.items()
        for packed in (True, False)
    },
    **{
        f"group_policy_loss {name} {scale}": lambda backend, spec=spec, scale=scale: of_groups(backend, spec, scale)
        for name, spec in SPECS.items()
        for scale in ("group", "batch")
    },
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", KERNELS)
def test_an_op_on_token_vectors_never_waits(backend, op):
    assert waits(lambda: OPS[op](backend)) == []


def of_pairs(padded=True):
    shape = (4, N // 4) if padded else (N,)
    names = ("mask", on(torch.ones(shape, dtype=torch.bool))) if padded else ("cu_seqlens", on(ROWS))
    sides = {f"{side}_{names[0]}": names[1] for side in ("chosen", "rejected")}
    ref = {f"ref_{side}_logps": numbers(*shape) for side in ("chosen", "rejected")}
    logps = (on(torch.randn(shape), True) for _ in range(2))
    preference_loss(*logps, presets.DPO, **sides, **ref).loss.backward()


def of_answers():
    given = {"ref_logps": numbers(4, 6), "mask": on(torch.ones(4, 6, dtype=torch.bool)), "kl": on(torch.tensor(0.1))}
    labels = on(torch.tensor([True, False, True, True]))
    unpaired_preference_loss(on(torch.randn(4, 6), True), labels, presets.KTO, **given).loss.backward()


def of_values():
    values = on(torch.randn(4, 6), True)
    value_loss(values, numbers(4, 6), numbers(4, 6), mask=on(MASK.view(4, 6))).loss.backward()


def of_reward_model():
    pairs, more = (on(torch.randn(4), True), on(torch.randn(4), True)), on(torch.rand(4))
    reward_model_loss(*pairs, margins=more, soft_labels=more, weights=more).loss.backward()


LOSSES = {"preference": of_pairs, "unpaired": of_answers, "value": of_values, "reward model": of_reward_model}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_with_its_metrics_never_waits(loss):
    assert waits(LOSSES[loss]) == []


def test_packed_pairs_wait_for_the_bounds_of_each_side():
    assert waits(lambda: of_pairs(padded=False)) == ["tolist", "tolist"]


# Where checking would wait, what is wrong shows in the result.


@pytest.mark.parametrize("bounds", [(1, 5, 20), (0, 9, 5), (0, 5, N + 1)], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_bounds_that_are_none_make_every_advantage_nan(backend, bounds):
    with Moves():
        out = gae(numbers(N), numbers(N), on(MASK), cu_seqlens=on(torch.tensor(bounds)), backend=backend)
    assert all(one.data_there.isnan().all() for one in out)


def test_a_pair_without_tokens_makes_the_loss_nan():
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[2] = False
    logps = {f"ref_{side}_logps": numbers(4, 6) for side in ("chosen", "rejected")}
    masks = {"chosen_mask": on(mask), "rejected_mask": on(torch.ones_like(mask))}
    with Moves():
        loss = preference_loss(numbers(4, 6), numbers(4, 6), presets.DPO, **masks, **logps).loss
    assert loss.data_there.isnan()


# What torch.compile is told.

UNSAFE = (
    "linear_logprob",
    "linear_logprob_backward",
    "linear_logprob_support",
    "linear_logprob_support_backward",
    "linear_policy_loss",
)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch before 2.9 has no such tag")
def test_cuda_graphs_leave_out_exactly_the_operators_that_wait():
    """The tests above show which those are."""
    ours = {name.removeprefix("fastrl::"): op for name, op in OPDEFS.items() if name.startswith("fastrl::")}
    assert set(UNSAFE) <= set(ours)
    tagged = {name for name, op in ours.items() if torch.Tag.cudagraph_unsafe in op._opoverload.tags}
    assert tagged == set(UNSAFE)
