"""A model as the trainer sees it: micro-batches in, hidden states or log-probabilities of their tokens out."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from fastrl.model.attention import attention_inputs
from fastrl.model.head import cut
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.types import LogprobOutput, MicroBatch


class Policy:
    """A causal language model cut before its head.

    Args:
        model: a transformers model. Its dropout is switched off: with it the same weights would give two different
            log-probabilities, and the ratio of an on-policy step would not be 1.
        backend: which backend the head's ops use.
    """

    def __init__(self, model: PreTrainedModel, *, backend: str = "auto") -> None:
        switch_off_dropout(model)
        self.model = model
        self.head = cut(model)
        self.backend = backend

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """(N, H): the hidden state that predicts each completion token, with gradient."""
        states = self.head.trunk(
            input_ids=batch.input_ids, position_ids=batch.position_ids, **attention_inputs(batch)
        )  # (R, L, H)
        return states.reshape(-1, states.shape[-1]).index_select(0, batch.hidden_index)

    @torch.no_grad()
    def score(self, batch: MicroBatch, *, temperature: float) -> torch.Tensor:
        """(N,) float32: log-probabilities of the completion tokens under the current weights."""
        return self.read(self.hidden(batch), batch, temperature=temperature)

    @torch.no_grad()
    def read(self, hidden: torch.Tensor, batch: MicroBatch, *, temperature: float = 1.0) -> torch.Tensor:
        """`score` from the hidden states of the batch, where they are at hand."""
        return self.outputs(hidden, batch.targets, temperature=temperature).logps

    def outputs(
        self, hidden: torch.Tensor, targets: torch.Tensor, *, temperature: float = 1.0, entropy: bool = False
    ) -> LogprobOutput:
        """Log-probabilities of the targets and, when asked for, entropies; both with gradient."""
        return linear_logprob(
            hidden,
            self.head.weight,
            targets,
            bias=self.head.bias,
            temperature=temperature,
            softcap=self.head.softcap,
            logit_scale=self.head.logit_scale,
            entropy=entropy,
            backend=self.backend,
        )


def switch_off_dropout(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
