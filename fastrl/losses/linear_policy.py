"""The policy loss straight from hidden states: the same loss as `policy_loss`, in fewer matmuls."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fastrl import check
from fastrl.kernels.inputs import HeadInputs, LossTokens
from fastrl.kernels.linear_policy_loss.reference import zero_advantage_rows
from fastrl.losses.aggregate import check_layout
from fastrl.losses.metrics import available, named
from fastrl.losses.policy import flatten_tokens
from fastrl.ops.linear_logprob import check_head, check_split_backend, choose_save, logit_budget, memory_of
from fastrl.ops.linear_logprob import linear_logprob as linear_logprob_op
from fastrl.ops.linear_policy_loss import in_one_pass
from fastrl.ops.linear_policy_loss import linear_policy_loss as linear_policy_loss_op
from fastrl.ops.policy_loss import policy_loss as policy_loss_op
from fastrl.ops.support import Support, check_support
from fastrl.ops.vocabulary_parallel import ranks_of, shared_refusals
from fastrl.spec import PolicyLoss
from fastrl.types import LossOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_policy_loss"


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    spec: PolicyLoss,
    *,
    mask: torch.Tensor,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    sampling_logps: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    support: Support | None = None,
    process_group: ProcessGroup | None = None,
    main_grad: torch.Tensor | None = None,
    entropy: bool = False,
    metrics: bool = True,
    memory: str | int = "auto",
    backend: str = "auto",
) -> LossOutput:
    """`policy_loss` on the log-probabilities of `linear_logprob`, without a second pass over the vocabulary.

    Equals `policy_loss(linear_logprob(hidden, weight, targets).logps, advantages, spec, mask=mask, ...)`. A loss that
    separates per token (`PolicyLoss.separable`) takes 3 matmuls with a trainable head and 2 with a frozen one; those
    after the first cover only rows with a non-zero gradient. The C++ kernels take 4 with a trainable head, but its
    logits never leave the cache: without `main_grad` they run the two ops in turn and recompute, unless `memory` says
    what to store. A loss that does not separate (a sequence ratio, a sequence correction) runs as the two ops on every
    backend, with `memory` as in `linear_logprob`.

    Args:
        hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, vocab_size, support, backend: as
            `linear_logprob`, with targets (B, T) or (N,). A token whose target is `ignore_index` is outside the mask,
            and the set of a token outside the mask is not read.
        process_group: the vocabulary is split over these ranks, as in `linear_logprob`; everything else is the same on
            all of them, and so is the loss. Runs as the two ops, with `memory` as in `linear_logprob`: 3 matmuls where
            that stores.
        advantages, spec, mask, old_logps, ref_logps, sampling_logps, group_ids, normalizer, cu_seqlens: as
            `policy_loss`.
        main_grad: (V, H), float32 (float64 for float64 inputs): the weight's gradient is added here in the forward
            pass, unrounded and without an extra buffer, and does not reach `weight.grad`. It is the gradient of the
            loss itself, so call `loss.backward()` without a factor. For losses that separate per token. With a frozen
            weight, or without gradients, it is unchanged.
        entropy: compute the entropy for its metric; a spec with an entropy term always computes it.
        metrics: False also skips, in the first matmul, rows whose advantage alone makes loss and gradient zero; the
            metrics then count only the other rows.

    Returns:
        LossOutput: the scalar loss, float32 (float64 for float64 inputs), its metrics, and as constants, shaped like
        targets, the log-probabilities and with `entropy` the entropies of the tokens of the mask. hidden, weight and
        bias get gradients, accumulated in float32 and rounded once.

    Raises:
        ValueError, TypeError, IndexError: as `linear_logprob` and `policy_loss`.
    """
    split = process_group is not None and ranks_of(OP, process_group) > 1
    with shared_refusals(OP, process_group, hidden, weight) if split else nullcontext():
        settings = (bias, temperature, softcap, logit_scale, ignore_index, vocab_size)
        head = check_head(OP, hidden, weight, targets, *settings, shard=split)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        check.shape(
            OP, "mask", mask, targets.shape, "as targets"
        )  # before combining it with targets, where it would broadcast
        check.device(OP, "mask", mask, targets.device, "targets")
        check_layout(OP, mask, cu_seqlens)  # while its dtype can still be seen
        tokens = flatten_tokens(
            OP,
            targets.shape,
            targets.device,
            advantages,
            spec,
            mask=mask.bool() & (targets != ignore_index),
            old_logps=old_logps,
            ref_logps=ref_logps,
            sampling_logps=sampling_logps,
            group_ids=group_ids,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            dtype=dtype,
        )
        if main_grad is not None:
            check.require(
                spec.separable, OP, "main_grad", "None for a loss on whole sequences", "a tensor", "Leave it out."
            )
            check.require(not split, OP, "main_grad", "None with process_group", "a tensor", "Leave it out.")
            check.shape(OP, "main_grad", main_grad, weight.shape, "as weight")
            check.device(OP, "main_grad", main_grad, weight.device, "weight")
            check.require(main_grad.dtype == dtype, OP, "main_grad", f"dtype {dtype}", main_grad.dtype, error=TypeError)
            main_grad = main_grad[: len(head.weight)]
        if split:
            check_split_backend(OP, backend)
        sets = None if support is None else check_support(OP, head, support, "auto" if split else backend)
        entropy = entropy or spec.needs_entropy
        memory = memory_of(OP, memory)
        options = {"entropy": spec.needs_entropy, "backend": "chunked" if split else backend}
        save = choose_save(OP, head, memory, **options, frozen=not split)
        logit_bytes = logit_budget(OP, memory, hidden.device)
    constants = LossTokens(*(getattr(tokens, name) for name in LossTokens._fields))
    if spec.separable and not metrics:
        constants = constants._replace(mask=tokens.mask & ~zero_advantage_rows(constants, spec))
    if spec.separable and not split and (sets is not None or in_one_pass(head, main_grad, logit_bytes, backend)):
        out = linear_policy_loss_op(
            head,
            constants,
            spec,
            main_grad=main_grad,
            entropy=entropy,
            logit_bytes=logit_bytes,
            backend=backend,
            support=sets,
        )
        loss, table, logps, entropies = out.loss, out.metrics, out.logps, out.entropy
    else:
        options = {"entropy": entropy, "support": sets, "backend": backend}
        if split:
            options |= {"process_group": process_group, "vocab_size": vocab_size}
        logps, entropies = _logps(head, constants.mask, save, **options)
        loss, _, _, table = policy_loss_op(
            logps, *constants, entropies, tokens.seq_ids, tokens.num_seqs, spec.code, backend
        )
    given = {"ref": ref_logps is not None, "sampling": sampling_logps is not None, "entropy": entropy}
    shaped = (x.detach().view(targets.shape) for x in ((logps, entropies) if entropy else (logps,)))
    return LossOutput(loss, named(table, available(spec, **given)), *shaped)


def _logps(head: HeadInputs, mask: torch.Tensor, save: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    read = linear_logprob_op(
        head.hidden,
        head.weight,
        head.targets.masked_fill(~mask, head.ignore_index),
        bias=head.bias,
        temperature=head.temperature if head.temperature.numel() > 1 else head.temperature[0],
        softcap=head.softcap or None,
        logit_scale=head.logit_scale,
        ignore_index=head.ignore_index,
        memory=save if save in ("store", "recompute") else "auto",
        **options,
    )
    return read.logps, read.entropy
