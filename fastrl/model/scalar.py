"""Models with one number per position instead of logits: PPO's critic and reward models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastrl import check
from fastrl.chat import end_of_turn
from fastrl.model.load import embedding_rows, load_pretrained
from fastrl.model.policy import Policy, switch_off_dropout, token_states
from fastrl.model.router import router_loss
from fastrl.types import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_scalar_model(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_model`, with a scalar head: transformers' sequence classification model with one label.

    A checkpoint of a causal language model gets a zero head, so training starts from 0 everywhere instead of noise; a
    checkpoint with a scalar head keeps it.
    """
    from transformers import AutoModelForSequenceClassification

    model, tokenizer, fresh = load_pretrained(AutoModelForSequenceClassification, name_or_path, dtype, num_labels=1)
    head = scalar_head(model)
    if any(key.startswith("score.") for key in fresh):
        torch.nn.init.zeros_(head.weight)
    tokenizer.pad_token = padding(tokenizer, embedding_rows(model)) or tokenizer.pad_token
    model.config.pad_token_id = tokenizer.pad_token_id  # transformers finds a row's last token with it
    return model, tokenizer


def padding(tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    """A special token to pad with that never ends a text; None if there is none.

    transformers and compatible servers score a sequence at its last token that is not padding. If the padding token is
    the end of sequence, that is the token before the last.
    """
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    special = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if id < rows and token.special}
    free = {id: text for id, text in special.items() if id not in ends}
    if tokenizer.pad_token_id in free:
        return tokenizer.pad_token
    used = str(tokenizer.chat_template or "")

    def suits(item: tuple[int, str]) -> tuple[bool, bool, bool]:
        _, text = item
        known = any(word in text.lower() for word in ("pad", "reserved", "unused", "extra"))
        return (not known, text in used or text == tokenizer.bos_token, text == tokenizer.unk_token)

    return min(free.items(), key=suits)[1] if free else None


def about_padding(tokenizer: PreTrainedTokenizerBase) -> str:
    """A warning about a scalar model's padding; empty if it is fine."""
    if tokenizer.pad_token_id not in (tokenizer.eos_token_id, end_of_turn(tokenizer)):
        return ""
    return (
        f"The tokenizer pads with {tokenizer.pad_token!r}, which also ends texts, and has no other special token for "
        "padding: transformers and servers will score answers at the token before the last. Add a pad token."
    )


def scalar_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The model's linear layer with one output.

    Raises:
        ValueError: the model has none.
    """
    head = getattr(model, "score", None)
    plain = isinstance(head, torch.nn.Linear) and head.out_features == 1
    got = f"{type(model).__name__} with score {head}"
    check.require(plain, "scalar_head", "model", "a sequence classification model with one label", got)
    return head


class ScalarModel:
    """Micro-batches in, one number per completion token out.

    Args:
        model: from `load_scalar_model`; its dropout is switched off.
        router_aux_loss_coef: for a mixture of experts, as `router_loss`.
    """

    def __init__(self, model: PreTrainedModel, *, router_aux_loss_coef: float | None = None) -> None:
        switch_off_dropout(model)
        self.model, self.head = model, scalar_head(model)
        self.router = router_loss(model, router_aux_loss_coef)

    def values(self, batch: MicroBatch) -> torch.Tensor:
        """(N,) float32: v = head(h), h the state before each completion token; gradient to every weight.

        For a critic this is V(s_t), where s_t is the prompt and the tokens before token t.
        """
        states = token_states(self.model, self.model.base_model, self.router, batch)
        return self.head(states).squeeze(-1).float()

    def scores(self, batch: MicroBatch) -> torch.Tensor:
        """(S,) float32: the value at each sequence's last target, which `with_end` appends so that the state before it
        has seen the whole completion."""
        return self.values(batch)[batch.cu_seqlens[1:] - 1]


class SharedCritic:
    """A critic that reads the policy's hidden states through a linear layer, which starts at zero."""

    def __init__(self, policy: Policy) -> None:
        weight = policy.head.weight
        self.policy = policy
        self.head = torch.nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype, device=weight.device)
        torch.nn.init.zeros_(self.head.weight)

    def values(self, batch: MicroBatch) -> torch.Tensor:
        """As `ScalarModel.values`."""
        return self.of(self.policy.hidden(batch))

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N,) float32 of `policy.hidden(batch)`; gradient to the backbone too."""
        return self.head(hidden).squeeze(-1).float()


Critic = ScalarModel | SharedCritic
