"""`linear_logprob` under the tokens that a sampler kept: the operator behind its argument `support`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch

from fastrl import check
from fastrl.kernels.inputs import HeadInputs, Needs
from fastrl.kernels.linear_logprob import support as kernel
from fastrl.kernels.softmax_row import accumulate_dtype
from fastrl.ops.derivatives import once_differentiable
from fastrl.ops.tags import WAITS

Support = tuple[torch.Tensor, torch.Tensor]  # token_ids (nnz,), offsets (N + 1,)


def support_sets(masks: Iterable[Any], *, device: torch.device | str | None = None) -> Support:
    """The sets of kept ids of some completions, end to end, as `support` takes them.

    Args:
        masks: one per completion, in the order of the rows: the sampling mask that an engine returned, or an int n for
            n tokens that are not scored, such as a prompt's or padding. Known forms: a list with the ids kept for each
            token (vLLM's `sampling_mask.token_ids` or JSON, SGLang's `output_token_sampling_mask`); an object with the
            ids of all tokens in one list beside their `offsets` (vLLM's `SamplingMask`) or their `counts` (prime-rl).
        device: of the result.

    Returns:
        (token_ids (nnz,), offsets (N + 1,)), int64.

    Raises:
        TypeError: a mask has another form. None is one: the engine was not asked to return masks.
    """
    sets = [(list(chain.from_iterable(rows)), list(map(len, rows))) for rows in map(_rows, masks)]
    ids = list(chain.from_iterable(ids for ids, _ in sets))
    offsets = [0, *accumulate(chain.from_iterable(sizes for _, sizes in sets))]
    return torch.tensor(ids, dtype=torch.int64, device=device), torch.tensor(offsets, dtype=torch.int64, device=device)


def _rows(mask: Any) -> Sequence[Sequence[int]]:
    """The ids kept for each token of a completion."""
    if isinstance(mask, int):
        return [()] * mask
    ids = next((getattr(mask, name) for name in ("token_ids", "ids") if hasattr(mask, name)), mask)
    bounds = getattr(mask, "offsets", None)
    if bounds is None and hasattr(mask, "counts"):
        bounds = [0, *accumulate(_listed(mask.counts))]
    if bounds is not None:
        ids, bounds = _listed(ids), _listed(bounds)
        return [ids[start:end] for start, end in pairwise(bounds)]
    rows = _listed(ids)
    rows = [_listed(row) for row in rows] if isinstance(rows, list | tuple) else rows
    known = isinstance(rows, list) and all(isinstance(row, list | tuple) for row in rows)
    expected = "a list with the ids kept for each token, or an int"
    do = "Ask the engine for it: return_sampling_mask=True." if mask is None else ""
    check.require(known, "support_sets", "masks", expected, type(mask).__name__, do, TypeError)
    return rows


def _listed(values: Any) -> Any:
    """Arrays and tensors as lists."""
    return values.tolist() if hasattr(values, "tolist") else values


def check_support(op: str, inputs: HeadInputs, support: Support, backend: str, **outputs: bool) -> Support:
    """The sets as kernels take them, int64.

    Args:
        inputs: checked by `check_head`.
        support: as `linear_logprob`.
        outputs: by name, those that are not computed over sets, and whether they were asked for.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, a named backend, or one of `outputs`.
    """
    check.require(backend == "auto", op, "backend", "'auto' with support", repr(backend))
    asked = ", ".join(name for name, one in outputs.items() if one)
    check.require(not asked, op, asked, "False with support", True, "Ask for it in a call without support.")
    pair = isinstance(support, tuple | list) and len(support) == 2
    check.require(pair, op, "support", "a pair (token_ids, offsets)", type(support).__name__, error=TypeError)
    token_ids, offsets = support
    for name, tensor in (("support[0]", token_ids), ("support[1]", offsets)):
        check.tensor(op, name, tensor)
        check.integer(op, name, tensor)
        check.device(op, name, tensor, inputs.hidden.device, "hidden")
    one = token_ids.dim() == 1
    check.require(one, op, "support[0]", "shape (nnz,), the sets end to end", tuple(token_ids.shape))
    expected = (len(inputs.targets) + 1,)
    check.shape(op, "support[1]", offsets, expected, "bounds of the sets of all rows, ignored ones too")
    return token_ids.long(), offsets.long()


def support_logprob(inputs: HeadInputs, support: Support, *, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and entropy, under the softmax over its row's set of kept ids.

        logps = z[target] - logsumexp_{v in S} z_v,   entropy = -sum_{v in S} p_v log p_v,   p = softmax over S

    with z as in `linear_logprob`. A sampler with top-k, top-p or min-p draws from this distribution.

    Args:
        inputs, support: checked by `check_head` and `check_support`.
        entropy: also compute the entropy.

    Returns:
        logps (N,) and entropy (N,) or (0,), in the accumulation dtype. hidden, weight and bias get gradients; the sets
        are constants. Stored for backward: one number per kept id.

    Raises:
        ValueError: offsets that are no bounds of sets; or, in a row that is not ignored, an id outside the vocabulary,
        an id twice, or a set without the target.
    """
    logps, entropies, _, _, _ = _op(*inputs, *support, entropy)
    return logps, entropies


@torch.library.custom_op("fastrl::linear_logprob_support", mutates_args=(), **WAITS)
def _op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    token_ids: torch.Tensor,
    offsets: torch.Tensor,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = HeadInputs(hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index)
    return tuple(kernel.forward(inputs, token_ids, offsets, entropy=entropy))


@_op.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    token_ids, _, entropy = rest[-3:]
    rows, dtype = hidden.shape[0], accumulate_dtype(hidden.dtype)
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if entropy else 0, dtype=dtype),
        hidden.new_empty(2, rows, dtype=dtype),
        hidden.new_empty(token_ids.shape[0], dtype=dtype),
        token_ids.new_empty(rows),
    )


@torch.library.custom_op("fastrl::linear_logprob_support_backward", mutates_args=(), **WAITS)
def backward_op(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    token_ids: torch.Tensor,
    offsets: torch.Tensor,
    logps: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    raw: torch.Tensor,
    at_target: torch.Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(d hidden, d weight, d bias) in hidden's dtype, each rounded once from its sum; (0,) if not needed."""
    d_hidden, d_weight, d_bias = kernel.backward(
        grad_logps,
        grad_entropy,
        HeadInputs(hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index),
        token_ids,
        offsets,
        kernel.Scores(logps, entropy, lse, raw, at_target),
        needs=Needs(needs_hidden, needs_weight, needs_bias),
    )
    return d_hidden.to(hidden.dtype), d_weight.to(hidden.dtype), d_bias.to(hidden.dtype)


@backward_op.register_fake
def _(
    grad_logps: torch.Tensor, grad_entropy: torch.Tensor | None, hidden: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    needs_hidden, needs_weight, needs_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        hidden.new_empty(weight.shape if needs_weight else (0,)),
        hidden.new_empty(weight.shape[0] if needs_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, targets, bias, temperature, *options, token_ids, offsets, entropy = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, temperature, token_ids, offsets, *output)
    ctx.options, ctx.entropy = options, entropy
    ctx.set_materialize_grads(False)


@once_differentiable("linear_logprob")
def _backward(ctx: Any, grad_logps: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any) -> tuple:
    nothing = (None,) * 11
    if grad_logps is None and grad_entropy is None:
        return nothing
    logps = ctx.saved_tensors[7]
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    gradients = backward_op(
        torch.zeros_like(logps) if grad_logps is None else grad_logps.contiguous(),
        grad_entropy.contiguous() if ctx.entropy and grad_entropy is not None else None,
        *ctx.saved_tensors,
        *ctx.options,
        *needs,
    )
    grad_hidden, grad_weight, grad_bias = (
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, *nothing[4:]


_op.register_autograd(_backward, setup_context=_setup_context)
