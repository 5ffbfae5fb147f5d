"""The policy loss straight from rewards."""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.losses.metrics import available, named
from fastrl.losses.policy import check_entropy, flat, flatten_tokens
from fastrl.ops.derivatives import refuse_forward_mode
from fastrl.ops.group_advantages import GroupAdvantage, check_groups, finite
from fastrl.ops.group_policy_loss import group_policy_loss as group_policy_loss_op
from fastrl.spec import PolicyLoss
from fastrl.types import LossOutput

OP = "group_policy_loss"


def group_policy_loss(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    estimator: GroupAdvantage,
    spec: PolicyLoss,
    *,
    mask: torch.Tensor,
    group_ids: torch.Tensor | None = None,
    group_size: int | None = None,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    sampling_logps: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> LossOutput:
    """`policy_loss` with the advantages that `estimator` computes from the rewards, without extra launches on CUDA.

    Equals `policy_loss(logps, estimator(rewards, group_ids=group_ids), spec, mask=mask, ...)`, bit for bit. Every
    completion of a group must be in the batch; a batch split into micro-batches needs its advantages beforehand.
    On CUDA it takes one launch if no token's loss depends on its sequence, else three. Advantages scaled by the batch,
    and float64 rewards with other logps, take extra launches.

    Args:
        logps, spec, mask, old_logps, ref_logps, sampling_logps, entropy, normalizer, cu_seqlens, backend: as
            `policy_loss`, with logps (B, T), or (N,) with `cu_seqlens`.
        rewards, group_ids, group_size: as `group_advantages`, one per sequence: (B,) or (S,). On a device, infinite
            rewards are not detected. `prompt_mean` uses the same groups.
        estimator: the advantage estimator, such as `fastrl.advantages.GRPO`.

    Returns:
        As `policy_loss`. `logps` and `entropy` get a gradient; the rewards do not.

    Raises:
        ValueError, TypeError: as `policy_loss` and `group_advantages`.
    """
    check.floating(OP, "logps", logps)
    refuse_forward_mode(OP, logps, entropy)
    check.require(logps.dim() in (1, 2), OP, "logps", "shape (B, T) or (N,)", tuple(logps.shape))
    packed = logps.dim() == 1
    do = "There is one reward per sequence."
    check.require(not packed or cu_seqlens is not None, OP, "cu_seqlens", "bounds with packed logps", None, do)
    sequences = cu_seqlens.numel() - 1 if packed else logps.shape[0]
    check.shape(OP, "rewards", rewards, (sequences,), "one per sequence")
    check.device(OP, "rewards", rewards, logps.device, "logps")
    groups = check_groups(OP, rewards, group_ids, group_size)
    if not isinstance(estimator, GroupAdvantage):
        expected = "a GroupAdvantage, such as fastrl.advantages.GRPO"
        raise TypeError(check.sentence(OP, "estimator", expected, repr(estimator)))
    check_entropy(OP, entropy, logps, spec)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    tokens = flatten_tokens(
        OP,
        logps.shape,
        logps.device,
        None,
        spec,
        mask=mask,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_logps=sampling_logps,
        group_ids=groups,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        dtype=dtype,
    )
    loss, _, _, table = group_policy_loss_op(
        flat(logps, dtype),
        finite(OP, "rewards", rewards) if rewards.device.type == "cpu" else rewards.detach(),  # no launches for it
        groups,
        tokens.weights,
        tokens.mask,
        tokens.old_logps,
        tokens.ref_logps,
        tokens.sampling_logps,
        None if entropy is None else flat(entropy, dtype),
        tokens.seq_ids,
        estimator.baseline,
        estimator.scale,
        float(estimator.eps),
        spec.code,
        backend,
    )
    given = {"ref": ref_logps is not None, "sampling": sampling_logps is not None, "entropy": entropy is not None}
    return LossOutput(loss, named(table, available(spec, **given)))
