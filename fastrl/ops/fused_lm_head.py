"""The LM head as a module that returns log-probabilities, so that DDP, FSDP and tensor-parallel hooks fire."""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.types import LogprobOutput


class FusedLMHead(torch.nn.Module):
    """Wraps a `torch.nn.Linear` head; `forward` gives log-probabilities instead of logits.

    The parameters stay in place (`lm_head.weight`, tied or not), and a wrapper's hooks see this module's forward.

    Args:
        lm_head: the Linear that maps hidden states (..., H) to logits (..., V).
        softcap, logit_scale, vocab_size: as `linear_logprob`; properties of the model.
    """

    def __init__(
        self,
        lm_head: torch.nn.Linear,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        check.require(
            isinstance(lm_head, torch.nn.Linear),
            "FusedLMHead",
            "lm_head",
            "a torch.nn.Linear",
            f"{type(lm_head).__module__}.{type(lm_head).__name__}",
            "Pass model.get_output_embeddings(); of an adapted head, call merge_and_unload() first, or leave the head "
            "out of target_modules.",
            TypeError,
        )
        self.lm_head = lm_head
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.vocab_size = vocab_size

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        temperature: float | torch.Tensor = 1.0,
        ignore_index: int = -100,
        entropy: bool = False,
        memory: str | int = "auto",
        backend: str = "auto",
    ) -> LogprobOutput:
        """`linear_logprob` with this head, with the same shapes, gradients and errors."""
        return linear_logprob(
            hidden,
            self.lm_head.weight,
            targets,
            bias=self.lm_head.bias,
            temperature=temperature,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            ignore_index=ignore_index,
            vocab_size=self.vocab_size,
            entropy=entropy,
            memory=memory,
            backend=backend,
        )
