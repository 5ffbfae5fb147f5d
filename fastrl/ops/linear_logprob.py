"""Log-probabilities straight from hidden states and the LM head, without storing logits."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch

from fastrl import check, env
from fastrl.kernels.inputs import HeadInputs, Needs, Read
from fastrl.kernels.linear_logprob.storage import KEEP_BYTES, stored_rows
from fastrl.kernels.registry import as_written, instruction_set, resolve
from fastrl.kernels.softmax_row import NO_SOFTCAP, accumulate_dtype
from fastrl.ops.derivatives import once_differentiable, refuse_forward_mode
from fastrl.ops.support import Support, check_support, support_logprob
from fastrl.ops.tags import WAITS
from fastrl.ops.vocabulary_parallel import ranks_of, shared_refusals, vocabulary_parallel_logprob
from fastrl.types import LogprobDetails, LogprobOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_logprob"
MEMORY = ("auto", "store", "recompute")
RENAMED = {"keep": "store", "stream": "recompute"}
GATHER = (
    "Call a FusedLMHead, whose forward runs inside the sharded module, or gather the head with "
    "full_tensor(grad_placements=[Partial('avg')]), or with [Replicate()] where all ranks have the same tokens. "
    "Of a head that tensor parallelism splits by rows, pass to_local(), and the mesh's get_group() as process_group."
)
DEFAULT_KEEP_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


def needs_grad(inputs: HeadInputs) -> Needs:
    """Which tensors get a gradient; torch 2.6 compiles no property of `inputs`."""
    tensors = (inputs.hidden, inputs.weight, inputs.bias)
    return Needs(*(torch.is_grad_enabled() and one is not None and one.requires_grad for one in tensors))


def check_head(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    vocab_size: int | None = None,
    shard: bool = False,
) -> HeadInputs:
    """Checks the head's arguments once and flattens the leading dimensions.

    With `shard` weight and bias are a rank's part of a head, maybe empty, and `vocab_size` is for all ranks to check.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if name != "bias" or tensor is not None:
            check.tensor(op, name, tensor)
        check.require(
            not hasattr(tensor, "full_tensor"),
            op,
            name,
            "a plain tensor",
            "a DTensor",
            GATHER,
            TypeError,
        )
        refuse_replicated_gradient(op, name, tensor)
    check.floating(op, "hidden", hidden)
    refuse_forward_mode(op, hidden, weight, bias)
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(
        kind
    ):  # as torch's own linear does: a gradient reaches the uncast tensors
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check.require(weight.dim() == 2, op, "weight", "shape (V, H)", tuple(weight.shape), "Pass lm_head.weight.")
    check.require(hidden.dim() >= 1, op, "hidden", "shape (..., H)", tuple(hidden.shape))
    check.require(
        hidden.shape[-1] == weight.shape[1],
        op,
        "hidden",
        f"last dimension {weight.shape[1]} as weight",
        hidden.shape[-1],
        "Pass the last hidden state, not logits.",
    )
    check.require(weight.shape[0] > 0 or shard, op, "weight", "at least one row", tuple(weight.shape))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check.require(
                tensor.dtype == hidden.dtype,
                op,
                name,
                f"dtype {hidden.dtype} as hidden",
                tensor.dtype,
                "Cast one of them, or run under one precision.",
                TypeError,
            )
            check.device(op, name, tensor, hidden.device, "hidden")
    if bias is not None:
        check.shape(op, "bias", bias, (weight.shape[0],), "as weight's rows")
    if vocab_size is not None and not shard:
        expected = f"1 to {weight.shape[0]}, the rows of weight"
        check.require(0 < vocab_size <= weight.shape[0], op, "vocab_size", expected, vocab_size)
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    check.integer(op, "targets", targets)
    check.shape(op, "targets", targets, hidden.shape[:-1], "as hidden without its last dimension")
    check.device(op, "targets", targets, hidden.device, "hidden")
    rows = targets.numel()
    return HeadInputs(
        hidden.reshape(rows, hidden.shape[-1]),
        weight,
        targets.reshape(rows).long(),
        bias,
        check_temperature(op, temperature, targets, accumulate_dtype(hidden.dtype), ignore_index),
        check_softcap(op, softcap),
        check_logit_scale(op, logit_scale),
        int(ignore_index),
    )


def refuse_replicated_gradient(op: str, name: str, tensor: torch.Tensor | None) -> None:
    """Refuses the result of a plain `full_tensor()`: DTensor takes each rank's gradient of it for the whole gradient,
    so the head would silently learn from this rank's tokens only.

    Raises:
        TypeError: `tensor` is one.
    """
    if torch.compiler.is_compiling() or tensor is None:
        return
    made = tensor.grad_fn
    spec = getattr(made, "dtensor_spec", None)
    got = "the result of full_tensor(), which takes every rank's gradient for the sum of all"
    plain = spec is None or made.grad_placements is not None or spec.mesh.size() == 1
    check.require(plain, op, name, "a tensor whose gradient is summed over ranks", got, GATHER, TypeError)


def check_softcap(op: str, softcap: float | None) -> float:
    """The softcap in the kernels' form."""
    finite = softcap is None or 0 < softcap < float("inf")  # infinity times tanh(0) would be NaN
    check.require(finite, op, "softcap", "a positive, finite number or None", softcap)
    return NO_SOFTCAP if softcap is None else float(softcap)


def check_logit_scale(op: str, logit_scale: float) -> float:
    """The scale in the kernels' form."""
    finite = -math.inf < logit_scale < math.inf  # torch.compile(dynamic=True) traces no math.isfinite
    check.require(finite, op, "logit_scale", "a finite number", logit_scale)
    return float(logit_scale)


def check_temperature(
    op: str, temperature: float | torch.Tensor, targets: torch.Tensor, dtype: torch.dtype, ignore_index: int
) -> torch.Tensor:
    """The temperature as a tensor of 1 or N values, so that new values never trigger recompilation.

    The temperature of a token without a target is not read.
    """
    if isinstance(temperature, torch.Tensor):
        if temperature.dim() == 0:
            good = (temperature > 0) & temperature.isfinite()
            one = check.values(op, "temperature", temperature.detach(), good, "a positive number")
            return one.reshape(1).to(targets.device, dtype)
        check.shape(op, "temperature", temperature, targets.shape, "as targets, or a number")
        check.device(op, "temperature", temperature, targets.device, "targets")
        if temperature.numel() == 0:  # no tokens, but kernels read at least one number
            return torch.ones(1, dtype=dtype, device=targets.device)
        read = targets != ignore_index
        good = ((temperature > 0) & temperature.isfinite()) | ~read
        given = check.values(op, "temperature", temperature.detach(), good, "positive numbers")
        return torch.where(read, given, 1.0).reshape(-1).to(dtype)
    finite = 0 < temperature < math.inf
    check.require(finite, op, "temperature", "a positive number", temperature, "For greedy use argmax.")
    return torch.full((1,), float(temperature), dtype=dtype, device=targets.device)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    entropy: bool = False,
    log_sum_sq_probs: bool = False,
    mean_logits: bool = False,
    is_top1: bool = False,
    support: Support | None = None,
    process_group: ProcessGroup | None = None,
    memory: str | int = "auto",
    backend: str = "auto",
) -> LogprobOutput | LogprobDetails:
    """Log-probability of each target token, and the entropy of its distribution, from the last hidden state.

        z = cap(logit_scale (hidden W^T + bias)) / temperature,   cap(x) = softcap tanh(x / softcap)
        logps = z[target] - logsumexp(z),   entropy = -sum_v softmax(z)_v log softmax(z)_v

    Equals `log_softmax(lm_head(hidden).float() / temperature, -1).gather(-1, targets[..., None])[..., 0]` with logits
    that were never rounded below float32.

    Args:
        hidden: (..., H), any strides. weight: (V, H), the same dtype. targets: (...) integer ids.
        bias: (V,) or None. temperature: a positive number, or one per token, shape (...); it gets no gradient.
        softcap: Gemma's final_logit_softcapping. logit_scale: Cohere's logit_scale, applied before the cap.
        ignore_index: targets with this id give exactly 0 and no gradient, whatever their hidden state holds.
        vocab_size: number of rows of weight and bias that are tokens. Later rows, which pad many models, have
            probability 0: they enter neither logsumexp nor entropy, and their gradient is 0. None: all are tokens.
        entropy: also return the entropy, with its gradient.
        log_sum_sq_probs, mean_logits, is_top1: also return log sum_v softmax(z)_v^2, the mean of z over the vocabulary,
            and whether the target is the first argmax of z; without gradients. Ignored targets give 0 and False.
        support: (token_ids (nnz,), offsets (N + 1,)), int64 or int32: the distribution is renormalised over these ids,
            as top-k, top-p and min-p leave it. Row n of the N flattened rows keeps token_ids[offsets[n]:offsets[n+1]];
            logsumexp and entropy run over them alone. The set of an ignored target is not read. A small set reads only
            its rows of weight, and one number per kept id is stored for backward whatever `memory` says. Waits for the
            device. Other outputs and named backends are refused.
        process_group: the vocabulary is split over these ranks: weight and bias are this rank's rows, after those of
            the ranks before it; hidden, targets, `support` and `vocab_size` are those of the whole, and the same on all
            ranks, as the loss has to be. Outputs and the gradient of hidden are equal on all ranks, bit for bit; weight
            and bias get that of their own rows. Sends numbers per row, and in backward the gradient of hidden. Runs in
            torch on any device; a frozen head stores or recomputes as a trainable one does.
        memory: what to store for backward if the head is trainable: "store" stores probabilities in the input dtype
            (2 matmuls in backward), "recompute" nothing (3 matmuls), "auto" stores what fits in a budget
            (256 MiB on a CPU, 4 GiB on a GPU, or $FASTRL_KEEP_BYTES); an int is that budget in bytes. With 16-bit
            inputs and `entropy`, "auto" recomputes.
            With a frozen head the derivative itself is stored, (..., H), and backward has no matmul.
        backend: "auto", or a name from `fastrl doctor`; a named backend is used or refused, never replaced.

    Returns:
        LogprobOutput(logps, entropy or None), or LogprobDetails, which also has what else was requested; float32
        (float64 for float64 inputs; is_top1 bool), shape (...), None where not requested. hidden, weight and bias get
        gradients, accumulated in float32 and rounded once; double backward raises.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or is a DTensor or the result of its
        full_tensor() without `grad_placements`, which would get only this rank's gradient. IndexError: on a CPU, a
        target is outside [0, V); on a GPU that row is NaN instead. With `support`, on every device, a ValueError: a set
        has an id outside [0, V), an id twice, or not its target. With `process_group`, on every rank: ranks do not
        agree (ValueError), or one of them refused its arguments (RuntimeError).
    """
    wanted = (log_sum_sq_probs, mean_logits, is_top1)
    others = {"log_sum_sq_probs": log_sum_sq_probs, "mean_logits": mean_logits, "is_top1": is_top1}
    head = (hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index)
    if process_group is not None and ranks_of(OP, process_group) > 1:
        with shared_refusals(OP, process_group, hidden, weight):
            check_split_backend(OP, backend)
            inputs, memory = check_head(OP, *head, shard=True), memory_of(OP, memory)
            save = choose_save(OP, inputs, memory, entropy=entropy, backend="chunked", frozen=False)
            sets = None if support is None else check_support(OP, inputs, support, "auto", **others)
        options = {"vocab_size": vocab_size, "entropy": entropy, "summaries": any(wanted), "support": sets}
        read = vocabulary_parallel_logprob(OP, inputs, process_group, save=save, needs=needs_grad(inputs), **options)
        return _shaped(*read, targets.shape, entropy, wanted)
    inputs = check_head(OP, *head, vocab_size)
    memory = memory_of(OP, memory)
    if support is not None:
        logit_budget(OP, memory, hidden.device)  # refuses a wrong one
        sets = check_support(OP, inputs, support, backend, **others)
        logps, entropies = support_logprob(inputs, sets, entropy=entropy)
        return LogprobOutput(logps.view(targets.shape), entropies.view(targets.shape) if entropy else None)
    save = choose_save(OP, inputs, memory, entropy=entropy, backend=backend)
    logps, entropies, _, _, _, summaries = _op(*inputs, entropy, save, any(wanted), backend)
    return _shaped(logps, entropies, summaries, targets.shape, entropy, wanted)


def _shaped(
    logps: torch.Tensor,
    entropies: torch.Tensor,
    summaries: torch.Tensor,
    shape: torch.Size,
    entropy: bool,
    wanted: tuple[bool, bool, bool],
) -> LogprobOutput | LogprobDetails:
    """What was requested, token-shaped."""
    pair = LogprobOutput(logps.view(shape), entropies.view(shape) if entropy else None)
    if not any(wanted):
        return pair
    rows = zip(summaries.detach(), wanted, strict=True)
    more = [one.view(shape) if asked else None for one, asked in rows]
    more[2] = None if more[2] is None else more[2] != 0
    return LogprobDetails(*pair, *more)


def check_split_backend(op: str, backend: str) -> None:
    """Refuses a named backend that does not run on a part of the vocabulary."""
    expected, do = (
        "'auto' or 'chunked' with process_group",
        "Only torch's own operations run on a part of a vocabulary.",
    )
    check.require(backend in ("auto", "chunked"), op, "backend", expected, repr(backend), do)


def choose_save(
    op: str, inputs: HeadInputs, memory: str | int, *, entropy: bool, backend: str, frozen: bool = True
) -> str:
    """What the forward pass stores: none, frozen, store or recompute; without `frozen`, which forms the derivative of
    a frozen head in the forward pass, such a head counts as a trainable one.

    The budget is used only if storing is faster, by the rule of `stores_logits`. 16-bit probabilities lose digits of
    log p + H, the entropy's gradient, if the distribution is nearly uniform; only an explicit "store" accepts that.
    """
    budget = logit_budget(op, memory, inputs.hidden.device)
    needs_hidden, *needs_head = needs_grad(inputs)
    if not any(needs_head) and (frozen or not needs_hidden):
        return "frozen" if needs_hidden else "none"
    if memory in ("store", "recompute"):
        return str(memory)
    if entropy and inputs.hidden.element_size() < 4:
        return "recompute"
    logits = inputs.hidden.shape[0] * inputs.weight.shape[0]
    kept = logits * inputs.hidden.element_size()
    if inputs.hidden.element_size() < 4 and instruction_set("linear_logprob", backend, inputs.hidden.device):
        kept += min(KEEP_BYTES, 4 * logits)  # the float32 logits that these come from
    return "store" if kept <= budget and stores_logits("linear_logprob", inputs, budget, backend) else "recompute"


def memory_of(op: str, memory: str | int) -> str | int:
    """`memory` with former names replaced by current ones."""
    if memory in RENAMED:
        new = RENAMED[memory]
        warnings.warn(f"{op}: memory: {memory!r} is called {new!r} now.", DeprecationWarning, stacklevel=3)
        return new
    return memory


def logit_budget(op: str, memory: str | int, device: torch.device) -> int:
    """Bytes of logits or probabilities that `memory` allows; "store" is unlimited."""
    if isinstance(memory, str):
        check.choice(op, "memory", memory, MEMORY)
        return {"store": 1 << 62, "recompute": 0}.get(memory, keep_budget(device))
    check.require(isinstance(memory, int) and memory >= 0, op, "memory", "a byte budget of at least 0", memory)
    return memory


def stores_logits(op: str, inputs: HeadInputs, budget: int, backend: str) -> bool:
    """Whether storing logits is faster than computing them twice; torch's and the GPU backends always store."""
    isa = instruction_set(op, backend, inputs.hidden.device)
    rows, width, vocabulary = inputs.hidden.shape[0], inputs.hidden.shape[1], inputs.weight.shape[0]
    return not isa or stored_rows(inputs.hidden.dtype, isa, rows, width, vocabulary, budget) > 0


def keep_budget(device: torch.device) -> int:
    """Bytes that `memory="auto"` may store on this device."""
    budget = env.keep_bytes()
    return DEFAULT_KEEP_BYTES.get(device.type, DEFAULT_KEEP_BYTES["cpu"]) if budget is None else budget


@torch.library.custom_op("fastrl::linear_logprob", mutates_args=(), **WAITS)
def _op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    entropy: bool,
    save: str,
    summaries: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with as_written(hidden.device):
        inputs = HeadInputs(hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index)
        chosen = resolve("linear_logprob", backend, hidden.device)
        return tuple(chosen.forward(inputs, entropy=entropy, save=save, summaries=summaries))


@_op.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    entropy, save, summaries = rest[-4:-1]
    rows, dtype = hidden.shape[0], accumulate_dtype(hidden.dtype)
    saved = {"store": (rows, weight.shape[0]), "frozen": (rows, hidden.shape[1])}.get(save, (0,))
    saved_entropy = (rows, hidden.shape[1]) if save == "frozen" and entropy else (0,)
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if entropy else 0, dtype=dtype),
        hidden.new_empty(2, rows, dtype=dtype),
        hidden.new_empty(saved),
        hidden.new_empty(saved_entropy),
        hidden.new_empty(3, rows if summaries else 0, dtype=dtype),
    )


@torch.library.custom_op("fastrl::linear_logprob_backward", mutates_args=(), **WAITS)
def backward_op(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    logps: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    saved: torch.Tensor,
    saved_entropy: torch.Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    save: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    rounded: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(d hidden, d weight, d bias), in hidden's dtype if `rounded`, else the accumulation dtype; (0,) if not needed."""
    with as_written(hidden.device):
        gradients = resolve("linear_logprob", backend, hidden.device).backward(
            grad_logps,
            grad_entropy,
            HeadInputs(hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index),
            Read(logps, entropy, lse, saved, saved_entropy, lse.new_empty(3, 0)),
            save=save,
            needs=Needs(needs_hidden, needs_weight, needs_bias),
            rounded=rounded,
        )
    dtype = hidden.dtype if rounded else accumulate_dtype(hidden.dtype)
    return tuple(gradient.to(dtype) for gradient in gradients)


@backward_op.register_fake
def _(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    needs_hidden, needs_weight, needs_bias, rounded = rest[-5:-1]
    dtype = hidden.dtype if rounded else accumulate_dtype(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, entropy, save, _, backend = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, temperature, *output[:-1])
    ctx.options = (softcap, logit_scale, ignore_index, save)
    ctx.entropy, ctx.backend = entropy, backend
    ctx.set_materialize_grads(False)


@once_differentiable("linear_logprob")
def _backward(ctx: Any, grad_logps: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any) -> tuple:
    nothing = (None,) * 12
    if grad_logps is None and grad_entropy is None:
        return nothing
    hidden, weight, targets, bias, temperature, logps, entropy, lse, saved, saved_entropy = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    gradients = backward_op(
        torch.zeros_like(logps) if grad_logps is None else grad_logps.contiguous(),
        grad_entropy.contiguous() if ctx.entropy and grad_entropy is not None else None,
        hidden,
        weight,
        targets,
        bias,
        temperature,
        logps,
        entropy,
        lse,
        saved,
        saved_entropy,
        *ctx.options,
        *needs,
        True,
        ctx.backend,
    )
    gradients = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    grad_hidden, grad_weight, grad_bias = gradients
    return grad_hidden, grad_weight, None, grad_bias, *nothing[4:]


_op.register_autograd(_backward, setup_context=_setup_context)
