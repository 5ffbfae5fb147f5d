"""The policy loss on tensors of any layout; checks and flattens the arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastrl import check
from fastrl.losses.aggregate import check_layout, check_normalizer, inside, sequence_ids, token_weights
from fastrl.losses.metrics import available, named
from fastrl.ops.derivatives import refuse_forward_mode
from fastrl.ops.policy_loss import policy_loss as policy_loss_op
from fastrl.spec import PolicyLoss
from fastrl.types import LossOutput

OP = "policy_loss"


@dataclass(frozen=True)
class TokenInputs:
    """Everything a policy loss reads besides `logps`, flat and contiguous: (N,) constants without gradient history.

    `seq_ids` is None and `num_seqs` 0 if no token's loss depends on its sequence (`PolicyLoss.separable`) and the
    advantages are given.
    """

    advantages: torch.Tensor | None
    weights: torch.Tensor
    mask: torch.Tensor
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    sampling_logps: torch.Tensor | None
    seq_ids: torch.Tensor | None
    num_seqs: int


def policy_loss(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    spec: PolicyLoss,
    *,
    mask: torch.Tensor,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    sampling_logps: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> LossOutput:
    """The loss of a `PolicyLoss` over the masked-in tokens: sum_t w_t (c_t surrogate_t + coef KL_t - c_H H_t).

    `fastrl.spec` has the equations and their sources, `fastrl.losses.aggregate` the weights w_t. `logps` and `entropy`
    get a gradient; everything else is a constant. A masked-out token has loss 0 and gradient exactly 0 whatever it
    holds; a masked-in token with a NaN makes the loss NaN. Log-ratios are clamped to [-20, 20], without gradient
    beyond. A ratio exactly at its bound is not clipped.

    Args:
        logps: (B, T) padded or (N,) packed, the log-probability of each token under the current policy.
        advantages: (B,) or (S,), one per sequence, or shaped like `logps`. Packed with as many sequences as tokens,
            they are one per sequence.
        mask: like `logps`, bool or integer; True where the token trains.
        old_logps: like `logps`, under the old policy in the ratio; None: `logps` as a constant, so the ratio is exactly
            1.
        ref_logps: like `logps`, under the reference policy; `kl` is reported even if the spec has no KL term.
        sampling_logps: like `logps`, from the sampler, for `spec.correction` and its metrics.
        entropy: like `logps`, for `spec.entropy_coef` and its metric.
        group_ids: (B,) or (S,) int, equal for samples of one prompt, for `prompt_mean`.
        normalizer: the divisor of the weights; None counts the given tensors (`fastrl.losses.aggregate`).
        cu_seqlens: (S + 1,) int, bounds of the sequences in packed tensors; tokens outside them are masked out.
        backend: as `linear_logprob`.

    Returns:
        The scalar loss, float32 (float64 for float64 `logps`), and its metrics (`fastrl.kernels.policy_loss.metrics`).

    Raises:
        ValueError: a shape, a device, or an argument that the spec needs is wrong or missing.
        TypeError: a dtype is wrong, or the spec is not a PolicyLoss.
    """
    check.floating(OP, "logps", logps)
    _refuse_sharded(OP, logps=logps, entropy=entropy)
    refuse_forward_mode(OP, logps, entropy)
    check.require(logps.dim() in (1, 2), OP, "logps", "shape (B, T) or (N,)", tuple(logps.shape))
    check_entropy(OP, entropy, logps, spec)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    tokens = flatten_tokens(
        OP,
        logps.shape,
        logps.device,
        advantages,
        spec,
        mask=mask,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_logps=sampling_logps,
        group_ids=group_ids,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        dtype=dtype,
    )
    loss, _, _, table = policy_loss_op(
        flat(logps, dtype),
        tokens.advantages,
        tokens.weights,
        tokens.mask,
        tokens.old_logps,
        tokens.ref_logps,
        tokens.sampling_logps,
        None if entropy is None else flat(entropy, dtype),
        tokens.seq_ids,
        tokens.num_seqs,
        spec.code,
        backend,
    )
    given = {"ref": ref_logps is not None, "sampling": sampling_logps is not None, "entropy": entropy is not None}
    return LossOutput(loss, named(table, available(spec, **given)))


def flatten_tokens(
    op: str,
    shape: torch.Size,
    device: torch.device,
    advantages: torch.Tensor | None,
    spec: PolicyLoss,
    *,
    mask: torch.Tensor,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    sampling_logps: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> TokenInputs:
    """Checks and flattens the arguments of a policy loss whose log-probabilities have `shape` and `device`.

    Args and Raises: as `policy_loss`; error messages start with `op`. If `advantages` is None, they will come per
    sequence, so the result keeps each token's sequence.
    """
    check_spec(op, spec)
    constants = {"old_logps": old_logps, "ref_logps": ref_logps, "sampling_logps": sampling_logps}
    _refuse_sharded(op, advantages=advantages, mask=mask, **constants)
    check.shape(op, "mask", mask, shape, "as logps")
    check.device(op, "mask", mask, device, "logps")
    check_layout(op, mask, cu_seqlens)
    check_normalizer(op, spec.aggregate, normalizer)
    for name, tensor in constants.items():
        check_token_tensor(op, name, tensor, shape, device)
    needs = {"ref_logps": spec.needs_ref, "sampling_logps": spec.correction is not None}
    for name, needed in needs.items():
        given = constants[name] is not None
        check.require(given or not needed, op, name, "a tensor, which the spec needs", None, f"Pass {name}.")
    has_sequences = len(shape) == 2 or cu_seqlens is not None
    do = "The spec works on whole sequences."
    check.require(has_sequences or spec.separable, op, "cu_seqlens", "sequence bounds with packed logps", None, do)

    seq_ids, num_seqs = sequence_ids(shape, device, cu_seqlens) if has_sequences else (None, 0)
    live = inside(mask, cu_seqlens)
    weights = token_weights(
        live, spec.aggregate, normalizer=normalizer, group_ids=group_ids, cu_seqlens=cu_seqlens, dtype=dtype
    )
    old, ref, sampling = (None if x is None else flat(x, dtype).detach() for x in constants.values())
    if advantages is not None:
        advantages = _token_advantages(op, advantages, shape, device, seq_ids, num_seqs).to(dtype).detach()
    without_ids = spec.separable and advantages is not None
    return TokenInputs(
        advantages=advantages,
        weights=weights.reshape(-1),
        mask=live.reshape(-1).contiguous(),
        old_logps=old,
        ref_logps=ref,
        sampling_logps=sampling,
        seq_ids=None if without_ids else seq_ids,
        num_seqs=0 if without_ids else max(num_seqs, 1),
    )


def _refuse_sharded(op: str, **tensors: torch.Tensor | None) -> None:
    """A loss of tokens that are spread over processes needs their global counts, which a DTensor does not bring."""
    do = (
        "Pass each process its own tokens, to_local(), with the normalizer of all, or every process all tokens, "
        "full_tensor()."
    )
    for name, tensor in tensors.items():
        check.require(not hasattr(tensor, "full_tensor"), op, name, "a plain tensor", "a DTensor", do, TypeError)


def check_spec(op: str, spec: object) -> None:
    """Requires a `PolicyLoss`; the likely mistake is its name."""
    if not isinstance(spec, PolicyLoss):  # torch.compile cannot trace repr, so it is called only on errors
        raise TypeError(check.sentence(op, "spec", "a PolicyLoss, such as fastrl.presets.DAPO", repr(spec)))


def check_entropy(op: str, entropy: torch.Tensor | None, logps: torch.Tensor, spec: PolicyLoss) -> None:
    """Requires an entropy shaped like `logps` if the loss has an entropy term."""
    check_spec(op, spec)
    do = "Ask the log-probability op for entropy=True."
    given = entropy is not None or not spec.needs_entropy
    check.require(given, op, "entropy", "a tensor, for a non-zero entropy_coef", None, do)
    check_token_tensor(op, "entropy", entropy, logps.shape, logps.device)


def check_token_tensor(
    op: str, name: str, tensor: torch.Tensor | None, shape: torch.Size, device: torch.device
) -> None:
    """Requires a given tensor to be floating point, with the shape and device of `logps`."""
    if tensor is not None:
        check.floating(op, name, tensor)
        check.shape(op, name, tensor, shape, "as logps")
        check.device(op, name, tensor, device, "logps")


def flat(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N,), contiguous."""
    return tensor.reshape(-1).to(dtype).contiguous()  # (N,)


def _token_advantages(
    op: str,
    advantages: torch.Tensor,
    shape: torch.Size,
    device: torch.device,
    seq_ids: torch.Tensor | None,
    num_seqs: int,
) -> torch.Tensor:
    """(N,) advantages from one per sequence or one per token."""
    check.floating(op, "advantages", advantages)
    check.device(op, "advantages", advantages, device, "logps")
    per_sequence = seq_ids is not None and tuple(advantages.shape) == (num_seqs,)
    if not per_sequence:
        also = f"({num_seqs},), one per sequence, or" if seq_ids is not None else ""
        ok = advantages.shape == shape
        check.require(ok, op, "advantages", f"shape {also} {tuple(shape)} as logps", tuple(advantages.shape))
        return advantages.reshape(-1).contiguous()
    if num_seqs == 0:
        return advantages.new_zeros(shape.numel())
    return advantages[seq_ids]  # (N,)
