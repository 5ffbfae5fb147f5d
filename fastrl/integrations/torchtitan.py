"""torchtitan's RL trainer: any policy loss per token, from hidden states, as a `BaseLoss`.

Read in the sources of torchtitan 0.3.0 and of its main branch of August 2026. Both hand their head and hidden states
only to a `ChunkedLossWrapper`, so the loss is a subclass of it, without its chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper

from fastrl import check
from fastrl.integrations.handle import Handle, check_version
from fastrl.integrations.host_loss import preset, weighted_policy_loss
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.spec import PolicyLoss

OP = "fastrl.integrations.torchtitan"
check_version("torchtitan", "0.2.2", "0.4")


def spec_of(name: str, overrides: dict[str, Any]) -> PolicyLoss:
    """The policy loss of a preset with overrides, of which torchtitan's loss inputs can serve every part.

    Raises:
        ValueError: `aggregate` is overridden, which torchtitan's count of tokens decides; the loss needs the bounds of
            sequences, a reference policy, or a sampler that is not its old policy; or as
            `fastrl.integrations.host_loss.preset`.
    """
    do = "torchtitan divides by the number of tokens in the batch."
    check.require("aggregate" not in overrides, OP, "aggregate", "no override", overrides.get("aggregate"), do)
    spec = preset(OP, name, overrides)
    do = "A loss gets tokens without the bounds of their sequences."
    check.require(spec.ratio == "token", OP, "ratio", "'token'", repr(spec.ratio), do)
    do = "A loss gets no reference log-probabilities: set kl.coef to 0."
    check.require(not spec.needs_ref, OP, "kl", "none", spec.kl, do)
    do = "The old policy is the generator itself."
    check.require(spec.correction is None, OP, "correction", "none", spec.correction, do)
    return spec


class FastRLLoss(ChunkedLossWrapper):
    """The mean over the batch's tokens of surrogate_t - entropy_coef H_t, from hidden states and the head.

    The ratio is that of the trainer to the generator. As in torchtitan's own losses, a token whose generator
    log-probability is not finite leaves the loss and the count. No logits are stored, so nothing is cut into chunks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """`preset`: a name of `fastrl.presets` in lower case. `overrides`: numbers by dotted field of the loss.

        `entropy`: report the entropy; with 16-bit weights that costs a matrix product.
        """

        preset: str = "dapo"
        overrides: dict[str, float] = field(default_factory=dict)
        entropy: bool = True

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.spec = spec_of(config.preset, config.overrides)
        self.entropy = config.entropy or self.spec.needs_entropy
        self.lm_head: torch.nn.Module | None = None

    def set_lm_head(self, lm_head: torch.nn.Module) -> None:
        """Gives the loss the model's head.

        Raises:
            TypeError: its forward is more than a linear layer's, as that of a low-rank or a quantised head.
        """
        plain = type(lm_head).forward is torch.nn.Linear.forward
        do = "Leave the head out of the adapter and out of quantisation."
        check.require(plain, OP, "lm_head", "a torch.nn.Linear", type(lm_head).__name__, do, TypeError)
        self.lm_head = lm_head

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: float | torch.Tensor | None = None,
        *,
        generator_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        loss_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its metrics, divided by the global count, so that ranks and micro-batches add up.

        Args:
            pred: (..., H) hidden states. labels: (...) ids, shifted. The other tensors: (...).
            global_valid_tokens: the divisor; None divides by 1.

        Returns:
            The scalar loss, with a gradient to `pred` and the head, and scalars under torchtitan's names.

        Raises:
            ValueError: `set_lm_head` was not called, or the vocabulary is split over ranks.
        """
        mask = (loss_mask.bool() & generator_logprobs.isfinite()).reshape(-1)  # (N,)
        labels, old, advantages = labels.reshape(-1), generator_logprobs.reshape(-1), advantages.reshape(-1)
        logps, entropy = self._logps(pred, torch.where(mask, labels, IGNORE_INDEX))
        count = 1.0 if global_valid_tokens is None else torch.as_tensor(global_valid_tokens).clamp(min=1)
        out = weighted_policy_loss(
            OP,
            logps,
            advantages,
            self.spec,
            torch.ones_like(logps) / count,
            mask=mask,
            old_logps=torch.where(mask, old, 0),
            entropy=entropy if self.spec.needs_entropy else None,
        )
        sums = {name: total for name, (total, _) in out.metrics.items()}
        clipped = [sums[name] for name in ("clip_ratio/low_mean", "clip_ratio/high_mean") if name in sums]
        moved = torch.where(mask, logps.detach() - old, 0)
        metrics = {
            "loss/mean": out.loss.detach(),
            "loss/ratio_mean": sums["ratio/mean"] / count,
            "loss/ratio_clipped_frac": sum(clipped, torch.zeros_like(out.loss.detach())) / count,
            "bit_wise/logprob_diff/mean": moved.sum() / count,
            "bit_wise/logprob_diff/max": moved.abs().max(),
            "bit_wise/ratio_tokens_different/mean": (moved.abs() > 1e-6).sum() / count,
        }
        if entropy is not None:
            metrics["trainer/entropy/mean"] = entropy.detach().sum() / count  # 0 where masked
        return out.loss, metrics

    def _logps(self, pred: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N,) log-probabilities and entropies, computed in the head's own call, where FSDP has gathered its weight."""
        from torchtitan.distributed.spmd_types import spmd_mesh_size

        head, entropy = self.lm_head, self.entropy
        check.require(head is not None, OP, "lm_head", "the model's head", None, "Call set_lm_head first.")
        whole = spmd_mesh_size("tp") == 1 and not hasattr(pred, "full_tensor")
        do = "Set tensor_parallel_degree to 1, or use torchtitan's own loss."
        check.require(whole, OP, "parallelism", "the whole vocabulary on each rank", "tensor parallelism", do)

        def forward(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            out = linear_logprob(
                hidden, head.weight, targets, bias=head.bias, ignore_index=IGNORE_INDEX, entropy=entropy
            )
            # FSDP2 warns of outputs that are views.
            return out.logps.clone(), None if out.entropy is None else out.entropy.clone()

        with Handle(OP) as handle:
            handle.replace(head, "forward", forward)
            return head(pred.reshape(-1, pred.shape[-1]), targets)
