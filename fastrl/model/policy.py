"""A model as the trainer uses it: micro-batches in, hidden states or log-probabilities of their tokens out."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from fastrl.model.attention import attention_inputs
from fastrl.model.head import run_decoder, split_head
from fastrl.model.router import RouterLoss, router_loss
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.ops.support import Support
from fastrl.types import LogprobOutput, MicroBatch


class Policy(torch.nn.Module):
    """A causal language model split at its head. Its forward includes the head, so wrappers of a module's forward (data
    parallelism, hooks) see all of it.

    Args:
        model: a transformers model. It always runs in evaluation mode with dropout off: with dropout the same weights
            would give different log-probabilities, and the ratio of an on-policy step would not be 1.
        vocab_size, softcap, logit_scale: as `split_head`.
        router_aux_loss_coef: for a mixture of experts, as `router_loss`.
        backend: backend of the head's ops.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int | None = None,
        softcap: float | None = None,
        logit_scale: float | None = None,
        router_aux_loss_coef: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        switch_off_dropout(model)
        self.model = model
        self.head = split_head(model, vocab_size, softcap=softcap, logit_scale=logit_scale)
        self.router = router_loss(model, router_aux_loss_coef)
        self.backend = backend

    def forward(self, batch: MicroBatch, *, temperature: float = 1.0, entropy: bool = False) -> LogprobOutput:
        """Log-probabilities of the completion tokens, (N,) float32, and entropies if requested; with gradient."""
        return self.of(self.hidden(batch), batch, temperature=temperature, entropy=entropy)

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """(N, H): the state that predicts each completion token, with gradient; carries the routers' loss."""
        return token_states(self.model, self.head.decoder, self.router, batch)

    @torch.no_grad()
    def score(self, batch: MicroBatch, *, temperature: float) -> torch.Tensor:
        """(N,) float32: log-probabilities of the completion tokens under the current weights."""
        return self.read(self.hidden(batch), batch, temperature=temperature)

    @torch.no_grad()
    def read(self, hidden: torch.Tensor, batch: MicroBatch, *, temperature: float = 1.0) -> torch.Tensor:
        """`score`, given the hidden states of the batch."""
        return self.of(hidden, batch, temperature=temperature).logps

    def of(
        self, hidden: torch.Tensor, batch: MicroBatch, *, temperature: float = 1.0, entropy: bool = False
    ) -> LogprobOutput:
        """`forward`, given the hidden states of the batch; over the tokens' `support` where the batch has one.

        With a support, tokens outside the mask are 0: what the policy did not draw has no set.
        """
        targets = batch.targets if batch.support is None else batch.targets.masked_fill(~batch.mask, -100)
        return self.outputs(hidden, targets, temperature=temperature, entropy=entropy, support=batch.support)

    def outputs(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        support: Support | None = None,
    ) -> LogprobOutput:
        """Log-probabilities of the targets and, if requested, entropies; both with gradient."""
        return linear_logprob(
            hidden,
            self.head.weight,
            targets,
            temperature=temperature,
            entropy=entropy,
            support=support,
            backend=self.backend,
            **self.head.options,
        )


def token_states(
    model: PreTrainedModel, decoder: torch.nn.Module, router: RouterLoss | None, batch: MicroBatch
) -> torch.Tensor:
    """(N, H): a decoder's states before each completion token of the batch; with gradient, they carry the routers'
    loss."""
    if model.training:  # functional dropout, layer drop and router noise depend only on this flag
        model.eval()
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, **attention_inputs(batch)}
    routed = router is not None and torch.is_grad_enabled()
    outputs = run_decoder(decoder, **inputs, **({"output_router_logits": True} if routed else {}))
    states = outputs.last_hidden_state  # (R, L, H)
    states = states.reshape(-1, states.shape[-1]).index_select(0, batch.hidden_index)
    return router.attach(states, outputs.router_logits, batch) if routed else states


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Sets evaluation mode, and dropout to 0 in case someone leaves it."""
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
