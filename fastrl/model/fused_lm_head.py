"""The LM head as a module that returns log-probabilities and losses, so that the hooks of DDP and FSDP fire."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastrl import check
from fastrl.losses.linear_policy import linear_policy_loss
from fastrl.model.head_layer import head_bias, head_weight, in_force, require_linear
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.ops.linear_token_loss import linear_token_loss
from fastrl.spec import PolicyLoss
from fastrl.types import LossOutput

OP = "FusedLMHead"
SHARD_THIS = (
    "Shard the FusedLMHead instead of the layer in it: the hooks that gather are on the sharded module's forward."
)
PUT_INSIDE = (
    "The module that holds it sharded is not running: before sharding, put the FusedLMHead into that module "
    "(model.lm_head = FusedLMHead(model.lm_head)) and call it in that module's forward, or shard it by itself."
)
GATHERED_AROUND_A_CALL = (
    "FSDP 1 and ZeRO-3 gather a weight around the forward of its module. Wrap the FusedLMHead, or what calls it, in "
    "FSDP, and call the wrapper, with op=functools.partial(linear_policy_loss, ...) for a loss; under ZeRO-3 call it "
    "in the forward of the engine."
)


class FusedLMHead(torch.nn.Module):
    """A model's head whose forward gives log-probabilities or a loss without logits.

    The layer stays the same object, so its parameters do, tied or not; `state_dict` has the layer's own names. Every
    method calls this module's forward, so hooks on it fire: `fully_shard` it alone or within a model, or wrap the
    module that calls it in DistributedDataParallel or FullyShardedDataParallel (FSDP 1). A layer with this rank's part
    of the vocabulary takes `process_group` among its options, as `linear_logprob`. In the layer's place, as in
    `model.lm_head = FusedLMHead(model.lm_head)`, it leaves the model's own forward and `generate` as they were.

    Args:
        lm_head: the linear layer that maps hidden states (..., H) to logits (..., V), also with LoRA or DoRA, or in
            peft's `modules_to_save` or `trainable_token_indices`.
        softcap, logit_scale, vocab_size: as `linear_logprob`; properties of the model. They are not part of plain
            logits, where the model itself applies them.

    Raises:
        TypeError: `lm_head` is another kind of layer, or its adapter is not a matrix.
    """

    def __init__(
        self,
        lm_head: torch.nn.Module,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        require_linear(OP, "lm_head", lm_head, TypeError)
        self.lm_head = lm_head
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.vocab_size = vocab_size
        self.register_state_dict_post_hook(_with_the_layers_names)
        self.register_load_state_dict_pre_hook(_with_our_names)

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        op: Callable[..., Any] = linear_logprob,
        **options: Any,
    ) -> Any:
        """`op` with this head, by default `linear_logprob`: the same shapes, gradients and errors.

        Args:
            hidden, targets: as `linear_logprob`. Without targets, the layer's own logits, (..., V).
            op: called as `op(hidden, weight, targets, bias=, softcap=, logit_scale=, vocab_size=, **options)`.
            options: of the op, such as temperature and entropy. FSDP's mixed precision rounds tensors among them; those
                in a `functools.partial` as `op`, which the methods below use, it leaves alone.

        Raises:
            ValueError: the weight is not whole here, as FSDP, FSDP 1 and ZeRO-3 leave it outside the forward of the
            module that they shard, or FSDP rounded the temperature.
        """
        if targets is None:
            check.require(not options, OP, "targets", "a tensor with other options", None, "Pass the token ids.")
            return self.lm_head(hidden)
        self._require_whole(in_force(self.lm_head).weight)  # ty: ignore[invalid-argument-type]  a linear layer's
        weight = head_weight(self.lm_head)
        self._require_gathered(weight)
        temperature = options.get("temperature")
        rounded = isinstance(temperature, torch.Tensor) and temperature.is_floating_point() and temperature.itemsize < 4
        got = temperature.dtype if rounded else ""
        do = "FSDP's mixed precision rounds it: pass op=functools.partial(linear_logprob, temperature=temperature)."
        check.require(not rounded, OP, "temperature", "a tensor of at least 32 bits", got, do)
        return op(
            hidden,
            weight,
            targets,
            bias=head_bias(self.lm_head),
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            vocab_size=self.vocab_size,
            **options,
        )

    def policy_loss(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        advantages: torch.Tensor,
        spec: PolicyLoss,
        *,
        mask: torch.Tensor,
        **options: Any,
    ) -> LossOutput:
        """`linear_policy_loss` with this head: the same arguments, shapes, gradients and errors.

        Under DistributedDataParallel of the head alone, call the wrapper instead, with
        `op=functools.partial(linear_policy_loss, advantages=advantages, spec=spec, mask=mask)`.
        """
        # In a partial, because FSDP's mixed precision would round advantages and old log-probabilities.
        op = partial(linear_policy_loss, advantages=advantages, spec=spec, mask=mask, **options)
        return self(hidden, targets, op=op)

    def token_loss(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        token_loss: Callable[..., torch.Tensor],
        *,
        weights: torch.Tensor,
        **options: Any,
    ) -> LossOutput:
        """`linear_token_loss` with this head: the same arguments, shapes, gradients and errors.

        Under DistributedDataParallel of the head alone, call the wrapper instead, as for `policy_loss`.
        """
        return self(hidden, targets, op=partial(linear_token_loss, token_loss=token_loss, weights=weights, **options))

    @property
    def weight(self) -> torch.Tensor:
        """The layer's."""
        return self.lm_head.weight  # ty: ignore[invalid-explicit-return]  a linear layer's

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's."""
        return getattr(self.lm_head, "bias", None)

    @property
    def in_features(self) -> int:
        """H."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """V."""
        return self.weight.shape[0]

    def _require_whole(self, weight: torch.Tensor) -> None:
        """A piece of a flat parameter has one dimension, or the shape of the whole and no memory to read."""
        if torch.compiler.is_compiling() or hasattr(weight, "full_tensor"):
            return
        piece = weight.dim() != 2 or (weight.numel() > 0 and weight.untyped_storage().size() == 0)
        do = SHARD_THIS if type(self.lm_head).__name__ == "FullyShardedDataParallel" else GATHERED_AROUND_A_CALL
        got = f"a piece of it, of shape {tuple(weight.shape)}"
        check.require(not piece, OP, "lm_head.weight", "a whole tensor", got, do)

    def _require_gathered(self, weight: torch.Tensor) -> None:
        if not hasattr(weight, "full_tensor"):
            return
        from torch.distributed.fsdp import FSDPModule

        do = SHARD_THIS if isinstance(self.lm_head, FSDPModule) else PUT_INSIDE
        check.require(False, OP, "lm_head.weight", "a whole tensor", "a shard (a DTensor)", do)


def _with_the_layers_names(module: FusedLMHead, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """So that a checkpoint does not depend on whether a FusedLMHead was there."""
    _rename(state, f"{prefix}lm_head.", prefix)


def _with_our_names(module: FusedLMHead, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    names = [f"{prefix}{name}" for name in module.lm_head.state_dict()]
    _rename(state, prefix, f"{prefix}lm_head.", names)


def _rename(state: dict[str, Any], old: str, new: str, names: list[str] | None = None) -> None:
    """Replaces a prefix in place, keeping the order."""
    chosen = {name for name in state if name.startswith(old)} if names is None else set(names)
    items = [(new + name[len(old) :] if name in chosen else name, value) for name, value in state.items()]
    state.clear()
    state.update(items)
