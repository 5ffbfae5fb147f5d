"""prime-rl: any policy loss as its custom loss, and its chunked head on `linear_logprob`.

Read in the source of prime-rl 0.8.0 of August 2026, whose custom loss gets one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastrl import check
from fastrl.integrations.handle import Handle, check_version
from fastrl.integrations.host_loss import preset as preset_of
from fastrl.integrations.host_loss import weighted_policy_loss
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.spec import PolicyLoss

OP = "fastrl.integrations.prime_rl"


def spec_of(preset: str, overrides: Mapping[str, Any]) -> PolicyLoss:
    """The policy loss of a preset with overrides, of which prime-rl's loss inputs can serve every part.

    Raises:
        ValueError: `aggregate` is overridden, which prime-rl does itself; the loss has an entropy term, or a correction
            for a sampler that is not its old policy; or as `fastrl.integrations.host_loss.preset`.
    """
    do = "prime-rl adds up the tokens' losses and divides by their number in the batch."
    check.require("aggregate" not in overrides, OP, "aggregate", "no override", overrides.get("aggregate"), do)
    spec = preset_of(OP, preset, overrides)
    do = "A custom loss gets no entropy."
    check.require(not spec.needs_entropy, OP, "entropy_coef", "0", spec.entropy_coef, do)
    do = "The old policy of a custom loss is the sampler itself."
    check.require(spec.correction is None, OP, "correction", "none", spec.correction, do)
    return spec


def policy_loss(inputs: Any, *, preset: str = "dapo", **overrides: Any) -> Any:
    """A policy loss as prime-rl's custom loss: the sum over one sequence of v_t (surrogate_t + kl.coef KL_t).

    The ratio is that of the trainer to the sampler, `inference_logprobs`; v_t is the host's weight stream. prime-rl
    divides the sum of all sequences by the number of tokens in the batch, whatever the preset's `aggregate` is.

    Args:
        inputs: prime-rl's `LossInputs`; (T,) tensors of one sequence.
        preset: a preset of `fastrl.presets` in lower case.
        overrides: fields of the loss, nested or dotted: `surrogate = {high = 0.3}`, `"kl.coef" = 0.0`.

    Returns:
        prime-rl's `LossOutputs`: the scalar loss, with a gradient to `trainer_logprobs`, and the metrics of
        `fastrl.policy_loss` as means over the sequence's tokens.

    Raises:
        ValueError: as `spec_of`; or the loss has a KL term, and there are no `ref_logprobs`.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    spec = spec_of(preset, overrides)
    do = "Use an algorithm with a reference model, or set kl.coef to 0."
    has_ref = inputs.ref_logprobs is not None
    check.require(has_ref or not spec.needs_ref, OP, "ref_logprobs", f"a tensor, for the KL of {preset}", None, do)
    weights = torch.ones_like(inputs.trainer_logprobs) if inputs.loss_weights is None else inputs.loss_weights
    out = weighted_policy_loss(
        OP,
        inputs.trainer_logprobs[None],  # (1, T): one sequence
        inputs.advantages[None],
        spec,
        weights[None],
        mask=inputs.loss_mask[None],
        old_logps=inputs.inference_logprobs[None],
        ref_logps=inputs.ref_logprobs[None] if has_ref else None,
    )
    # A sequence without tokens reports 0: every rank must report the same names.
    metrics = {name: total / count.clamp(min=1) for name, (total, count) in out.metrics.items()}
    return LossOutputs(loss=out.loss, metrics=metrics)


class LogProbEntropy:
    """prime-rl's `_SequenceChunkedLogProbEntropyFn` on `linear_logprob`, with a gradient through the entropy too."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: torch.Tensor,
        chunk_size: int,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy of each token, (N,) float32.

        Args:
            hidden: (N, H). weight: (V, H). labels: (N,) ids. inv_temperature: (N,), 1 / temperature of each token.
            chunk_size: the host's, and not read: no logits are stored.
            bias: (V,) or None, which the host never passes: it refuses heads with a bias.
        """
        out = linear_logprob(hidden, weight, labels, bias=bias, temperature=inv_temperature.reciprocal(), entropy=True)
        return out.logps, out.entropy


def accelerate() -> Handle:
    """Replaces the arithmetic of prime-rl's `FusedOutputLinear`, in every model of this process.

    It takes effect at the next forward pass, also in models made before. With `model.fused_lm_head_token_chunk_size`
    "disabled" prime-rl makes logits, and nothing changes. Heads with Gemma's softcap have a function of their own,
    which stays.

    Returns:
        A `Handle` whose `undo()` gives prime-rl its own function back.
    """
    check_version("prime-rl", "0.8.0", "0.9")
    from prime_rl.trainer.models.layers import lm_head

    handle = Handle(OP)
    handle.replace(lm_head, "_SequenceChunkedLogProbEntropyFn", LogProbEntropy)
    return handle
