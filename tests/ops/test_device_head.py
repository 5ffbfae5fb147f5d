"""What the ops with the head do on a GPU: as far as a CPU can show it, and, marked `gpu`, on one."""

from __future__ import annotations

import math

import pytest
import torch
from backends import CUDA, DEVICE
from ops.cases import IGNORE, gaussian
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.kernels.inputs import HeadInputs, LossTokens, Needs
from fastrl.kernels.linear_logprob import chunked
from fastrl.kernels.linear_policy_loss import chunked as policy_chunked
from fastrl.kernels.registry import resolve
from fastrl.spec import KL, PolicyLoss

KERNELS = (*CUDA, "triton")
BACKENDS = ("chunked", *KERNELS)
SIZES = [0, 1, 2, 7, 300]


@pytest.fixture
def small_chunks(monkeypatch):
    """Five rows of a float32 vocabulary of 37 at a time."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 5 * 37 * 4)


# The choice of rows.


@pytest.mark.parametrize("n", SIZES)
def test_compacted_rows_are_those_of_nonzero_and_then_the_rest(n):
    kind = torch.randint(4, (n,))
    order, counts = chunked.compact(kind == 2, kind == 0)
    chosen = [(kind == k).nonzero().squeeze(-1) for k in (2, 0)]
    rest = ((kind == 1) | (kind == 3)).nonzero().squeeze(-1)
    assert torch.equal(order, torch.cat((*chosen, rest)))
    assert counts.tolist() == [len(rows) for rows in chosen]
    for got, want in zip(chunked.Selection(kind == 2, kind == 0).rows(), chosen, strict=True):
        assert torch.equal(got, want)


class HostReads(TorchDispatchMode):
    """Counts the operations whose result, or the size of it, the host has to know."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and isinstance(args[1], (list, tuple)) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )  # fmt: skip
        self.count += masks or name in ("nonzero", "_local_scalar_dense", "masked_select", "equal")
        return func(*args, **(kwargs or {}))


def test_host_reads_are_counted():
    x = torch.arange(4)
    for read in (lambda: x.nonzero(), lambda: x.sum().item(), lambda: bool(x[0] == 0), lambda: x[x > 1]):
        with HostReads() as reads:
            read()
        assert reads.count == 1
    with HostReads() as reads:
        x[torch.tensor([1, 0])] += 1
    assert reads.count == 0


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Targets are checked without the host, as on a GPU; returns the list of what the ops wait for."""
    from fastrl.kernels.linear_logprob import triton_impl

    def check_targets(targets, vocabulary, ignore_index):
        outside = (targets < 0) | (targets >= vocabulary)
        return targets.clamp(0, vocabulary - 1), outside & (targets != ignore_index)

    waits, rows = [], chunked.Selection.rows
    for module in (chunked, policy_chunked, triton_impl):
        monkeypatch.setattr(module, "check_targets", check_targets)
    monkeypatch.setattr(chunked.Selection, "rows", lambda self: waits.append("rows") or rows(self))
    return waits


def head_of(inputs):
    dtype = torch.float64 if inputs.hidden.dtype == torch.float64 else torch.float32
    one = torch.ones(1, dtype=dtype)
    return HeadInputs(inputs.hidden, inputs.weight, inputs.targets, inputs.bias, one, 0.0, 1.0, IGNORE)


STORED = {"logit_bytes": 1 << 30}  # of the native backend alone; the others take it and store by their own rule
NEEDS = Needs(hidden=True, weight=True, bias=True)


@pytest.mark.parametrize(("save", "backward"), [("store", 1), ("recompute", 1), ("frozen", 0), ("none", None)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_learns_the_number_of_rows_once_in_each_direction(
    as_on_a_device, backend, save, backward, small_chunks
):
    kernel, head = resolve("linear_logprob", backend, torch.device("cpu")), head_of(gaussian(23, 8, 37))
    grads = torch.randn(2, 23, dtype=torch.float64)
    with HostReads() as reads:
        known = kernel.forward(head, entropy=True, save=save)
        assert as_on_a_device == ["rows"]
        if backward is not None:
            kernel.backward(*grads, head, known, needs=NEEDS, save=save, rounded=True)
            assert as_on_a_device == ["rows"] * (1 + backward)
    assert reads.count == 0


def test_statistics_inside_the_matmul_wait_for_nothing(as_on_a_device):
    kernel = resolve("linear_logprob", "triton", torch.device("cpu"))
    with HostReads() as reads:
        kernel.forward(head_of(gaussian(23, 16, 37).leaves(dtype=torch.bfloat16)), entropy=True, save="none")
    assert as_on_a_device == []
    assert reads.count == 0


def policy_loss_of(backend, inputs, spec, *, main_grad=None, needs=NEEDS, old_logps=None, ref_logps=None):
    """`linear_policy_loss` below autograd, a third of the advantages 0."""
    head, n = head_of(inputs), len(inputs.targets)
    torch.manual_seed(1)
    advantages = torch.randn(n, dtype=head.temperature.dtype)
    advantages[::3] = 0
    weights, mask = torch.full_like(advantages, 1 / n), torch.rand(n) < 0.9
    tokens = LossTokens(advantages, weights, mask, old_logps, ref_logps, None)
    kernel = resolve("linear_policy_loss", backend, torch.device("cpu"))
    return kernel.forward(head, tokens, main_grad, spec=spec, **STORED, needs=needs, entropy=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_policy_loss_waits_for_the_number_of_rows_and_for_that_of_each_chunk_with_a_gradient(
    as_on_a_device, backend, small_chunks
):
    inputs = gaussian(23, 8, 37).leaves(dtype=torch.float32)
    with HostReads() as reads:
        policy_loss_of(backend, inputs, PolicyLoss())
    with_gradient = len(as_on_a_device) - 1
    assert 2 <= with_gradient <= 4  # of the 23 rows some 12 have a gradient
    assert reads.count == 0
    as_on_a_device.clear()
    policy_loss_of(backend, inputs, PolicyLoss(), needs=Needs(False, False, False))
    assert as_on_a_device == ["rows"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_outside_the_vocabulary_makes_its_own_row_nan(as_on_a_device, backend, small_chunks):
    inputs = gaussian(23, 8, 37, ignored=False).leaves(dtype=torch.float32)
    want = policy_loss_of(backend, inputs, PolicyLoss(entropy_coef=0.1))
    inputs.targets[[7, 8]] = torch.tensor([37, -1])
    loss, logps, _, grad_hidden, *_ = policy_loss_of(backend, inputs, PolicyLoss(entropy_coef=0.1))
    assert loss.isnan()
    broken = torch.zeros(23, dtype=torch.bool)
    broken[[7, 8]] = want[1][[7, 8]] != 0  # the mask leaves out the others
    assert broken.any()
    assert torch.equal(logps.isnan(), broken)
    assert torch.equal(grad_hidden.isnan().all(-1), broken)
    for got, exact in ((logps, want[1]), (grad_hidden, want[3])):
        assert torch.equal(got[~broken], exact[~broken])


# 16-bit heads where torch multiplies 16-bit matrices into float32 ones.


@pytest.fixture
def mixed_matmuls(request, monkeypatch):
    """torch.mm and torch.addmm with `out_dtype`, which the CPU lacks; returns the list of their calls. The parameter
    says how d weight is summed, "in place" or "added": torch's matmuls do, so one backend is enough for the latter."""
    calls, mm = [], torch.mm

    def mixed_mm(a, b, *, out_dtype=None, **options):
        if out_dtype is None:
            return mm(a, b, **options)
        assert a.dtype == b.dtype != out_dtype
        calls.append("mm")
        return mm(a.to(out_dtype), b.to(out_dtype))

    def mixed_addmm(total, a, b, *, out_dtype, out):
        assert a.dtype == b.dtype != total.dtype == out_dtype
        assert out is total
        calls.append("addmm")
        return out.add_(mm(a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(chunked, "multiplies_mixed", lambda weight: weight.element_size() == 2)
    monkeypatch.setattr(chunked, "adds_into_float32", lambda device, dtype: request.param == "in place")
    monkeypatch.setattr(torch, "mm", mixed_mm)
    monkeypatch.setattr(torch, "addmm", mixed_addmm)
    calls.append(request.param)
    return calls


IN_PLACE = [(backend, "in place") for backend in BACKENDS]


def with_mixed_matmuls(cases):
    """(backend, how d weight is summed)."""
    return pytest.mark.parametrize(("backend", "mixed_matmuls"), cases, indirect=["mixed_matmuls"])


def assert_equal_but_for_rounded_dz(got, want):
    """dz is rounded to bfloat16 once where the matmuls are mixed."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2**-7 * b.abs().max().item() if b.numel() else 0)


@with_mixed_matmuls([*IN_PLACE, ("chunked", "added")])
def test_mixed_matmuls_give_the_gradients_of_widened_ones(backend, small_chunks, mixed_matmuls, monkeypatch):
    kernel, grads = resolve("linear_logprob", backend, torch.device("cpu")), torch.randn(2, 23)
    head = head_of(gaussian(23, 8, 37).leaves(dtype=torch.bfloat16))

    def run():
        known = kernel.forward(head, entropy=True, save="recompute")
        return *known[:3], *kernel.backward(*grads, head, known, needs=NEEDS, save="recompute", rounded=False)

    mixed = run()
    (how, *calls) = mixed_matmuls
    chunks = 4  # of at most five of the 18 rows that are not ignored
    assert calls.count("addmm") == (chunks - 1 if how == "in place" else 0)
    assert len(calls) == 4 * chunks
    monkeypatch.setattr(chunked, "multiplies_mixed", lambda weight: False)
    assert_equal_but_for_rounded_dz(mixed, run())


@with_mixed_matmuls([*IN_PLACE, ("chunked", "added")])
@pytest.mark.parametrize("spec", [PolicyLoss(), PolicyLoss(kl=KL("k3", 0.1), entropy_coef=0.1)], ids=["clip", "all"])
def test_policy_loss_with_mixed_matmuls_adds_to_the_gradient_buffer_given(
    backend, spec, small_chunks, mixed_matmuls, monkeypatch
):
    inputs, old_logps = gaussian(23, 8, 37).leaves(dtype=torch.bfloat16), -4 * torch.rand(23)
    results = []
    for mixed in (True, False):
        if not mixed:
            (how, *calls) = mixed_matmuls
            monkeypatch.setattr(chunked, "multiplies_mixed", lambda weight: False)
        main_grad = torch.ones(37, 8)
        out = policy_loss_of(backend, inputs, spec, main_grad=main_grad, old_logps=old_logps, ref_logps=old_logps - 0.1)
        results.append((*out, main_grad - 1))
    assert_equal_but_for_rounded_dz(*results)
    assert (calls.count("addmm") > 1) == (how == "in place")


@with_mixed_matmuls(IN_PLACE)
def test_the_products_of_a_chunk_are_launched_before_the_next_count_is_waited_for(
    as_on_a_device, backend, small_chunks, mixed_matmuls, monkeypatch
):
    grad_hidden = chunked.Head.grad_hidden
    monkeypatch.setattr(
        chunked.Head, "grad_hidden", lambda self, dz: as_on_a_device.append("product") or grad_hidden(self, dz)
    )
    policy_loss_of(backend, gaussian(23, 8, 37, ignored=False).leaves(dtype=torch.bfloat16), PolicyLoss())
    assert as_on_a_device[:2] == ["rows", "rows"]
    assert len(as_on_a_device) > 5
    assert as_on_a_device[2:] == ["product", "rows"] * (len(as_on_a_device) // 2 - 1) + ["product"] * (
        len(as_on_a_device) % 2
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_one_launch_per_chunk_derives_the_policy_loss_and_one_per_call_reports_it(backend, small_chunks, monkeypatch):
    with_loss, statistics, gradient, report = {
        "cuda": ("head_statistics_with_loss", "head_statistics", "head_gradient", "policy_loss"),
        "triton": ("statistics_with_loss_kernel", "statistics_kernel", "gradient_kernel", "_tokens"),
    }[backend]
    launched = []

    def recording(launch):
        def run(kernel, *a, **k):
            launched.append(kernel if isinstance(kernel, str) else getattr(kernel, "fn", kernel).__name__)
            return launch(kernel, *a, **k)

        return run

    for op in ("linear_logprob", "linear_policy_loss", "policy_loss"):
        module = resolve(op, backend, torch.device("cpu"))
        monkeypatch.setattr(module, "launch", recording(module.launch))
    inputs = gaussian(23, 8, 37, ignored=False).leaves(dtype=torch.float32)
    policy_loss_of(backend, inputs, PolicyLoss())
    chunks = launched.count(with_loss)
    assert chunks > 1
    assert launched.count(gradient) == chunks
    assert launched.count(report) == 1
    silent_chunks = launched.count(statistics)  # rows without an advantage: nothing to derive
    assert len(launched) == 2 * chunks + silent_chunks + 1


# On a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs FASTRL_TEST_DEVICE=cuda: without it kernels are interpreted")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_gpu_nothing_but_the_choice_of_rows_waits_for_the_device(backend, dtype, monkeypatch):
    """CUDA's own check knows every wait but that for an event, which is how the number of rows is waited for."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1 << 16)
    inputs = gaussian(300, 64, 1000).leaves(dtype=dtype)
    head = HeadInputs(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in head_of(inputs)))
    grads, advantages, mask = torch.randn(2, 300).cuda(), torch.randn(300).cuda(), (torch.rand(300) < 0.9).cuda()
    logprob, policy = (resolve(op, backend, head.hidden.device) for op in ("linear_logprob", "linear_policy_loss"))
    try:
        for mode in ("default", "error"):  # the first time compiles, asks the device what it can, and moves constants
            torch.cuda.set_sync_debug_mode(mode)
            for save in ("none", "frozen", "store", "recompute"):
                known = logprob.forward(head, entropy=True, save=save)
                if save != "none":
                    logprob.backward(*grads, head, known, needs=NEEDS, save=save, rounded=True)
            tokens = LossTokens(advantages, advantages.abs(), mask, None, None, None)
            policy.forward(head, tokens, None, spec=PolicyLoss(), **STORED, needs=NEEDS, entropy=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_16_bit_products_are_added_to_a_float32_matrix_without_rounding_it(dtype, monkeypatch):
    head = chunked.Head(torch.zeros(3000, 64, dtype=dtype, device="cuda"))
    pairs = [(torch.randn(50, 3000).to(dtype), torch.randn(50, 64).to(dtype)) for _ in range(3)]
    for adds in (chunked.adds_into_float32(torch.device("cuda", 0), dtype), False):
        monkeypatch.setattr(chunked, "adds_into_float32", lambda device, dtype, adds=adds: adds)
        head.grad_weight = None
        for dz, hidden in pairs:
            head.accumulate_weight(dz.cuda(), hidden.cuda())
        want = sum(dz.double().T @ hidden.double() for dz, hidden in pairs)
        assert head.grad_weight.dtype == torch.float32
        torch.testing.assert_close(head.grad_weight.cpu().double(), want.cpu(), rtol=0, atol=1e-4 * math.sqrt(50))
