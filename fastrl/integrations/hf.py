"""fastrl in Hugging Face models: their loss without logits, in `transformers.Trainer` or any other loop."""

from __future__ import annotations

import dataclasses
import inspect
from functools import update_wrapper
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from fastrl import check
from fastrl.integrations.handle import Handle, check_version
from fastrl.model.accelerate import accelerate_cpu
from fastrl.model.head import SplitModel, _evaluating
from fastrl.model.logps import replaced, replaced_head, split_once, unwrapped
from fastrl.ops.linear_token_loss import linear_token_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OP = "hf.accelerate"
LOGITS = ("eval", "never")
SHAPES = ("labels", "shift_labels", "num_items_in_batch")  # what the model must hand to its loss untouched


def accelerate(
    model: PreTrainedModel, *, logits: str = "eval", memory: int | None = None, backend: str = "auto", cpu: bool = False
) -> Handle:
    """Makes `model(input_ids, labels=...)` compute its own loss without logits, in place; `undo()` reverts it.

        loss = -sum_t log p(labels_t | tokens before t) / n,   n = num_items_in_batch, or the number of labels not -100

    which is transformers' `ForCausalLMLoss` with `labels`, `shift_labels`, `ignore_index` and `num_items_in_batch` as
    it reads them. Softcap, logit scale, bias, tied weights and adapters are the model's; a mixture of experts adds its
    routers' loss itself, as always. The gradient, to hidden states and head, is formed in the forward pass, chunk by
    chunk (`linear_token_loss`): three matmuls, as with logits, but nothing of size (tokens, V) is kept. The model's own
    forward runs, so its signature, its other outputs, hooks, gradient checkpointing, autocast, DistributedDataParallel
    and fully_shard work as before. Applying it twice changes nothing more.

    The output has no `logits` if there are `labels`, in training mode. Logits are made as always without labels, which
    is how `generate`, label smoothing and a `compute_loss_func` call a model, and with `logits_to_keep`.

    Args:
        model: a causal language model of transformers, with or without peft's adapters, before `fully_shard` and
            `torch.compile`; or DistributedDataParallel's view of one.
        logits: "eval": evaluation mode gives logits also with labels, as `compute_metrics` needs; "never": only the
            loss, for evaluations that read nothing else. One call decides for itself by `skip_logits=True` or False.
        memory, backend: as `linear_token_loss`.
        cpu: also apply `fastrl.accelerate_cpu`.

    Returns:
        Handle: `undo()` makes `model.forward` the object from before.

    Raises:
        ValueError: as `split_head`; the model's loss is not transformers' for causal language models, or differs from
            fastrl's on four tokens; a call asks for tuples.
        ImportError: transformers is not installed.
    """
    check_version("transformers", "4.57", "5.25")
    check.choice(OP, "logits", logits, LOGITS)
    inner = unwrapped(OP, model)
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    handle = Handle(OP)
    if not getattr(inner.forward, "_fastrl", False):  # update_wrapper carries the mark up through others' wrappers
        forward = _fused(inner, logits, memory, backend)
        _require_same_loss(inner, forward)
        handle.replace(inner, "forward", forward)
    if cpu:
        handle.on_undo(accelerate_cpu(inner).undo)
    return handle


def _fused(model: PreTrainedModel, logits: str, memory: int | None, backend: str) -> MethodType:
    """The model's forward, bound to it, with the head's product and the loss replaced where no logits are asked for."""
    before = model.forward
    # A bound method: the forward of a deep copy is the copy's.
    own = before.__func__ if getattr(before, "__self__", None) is model else None
    signature = inspect.signature(before)
    names = tuple(signature.parameters)

    def forward(self: PreTrainedModel, *args: Any, skip_logits: bool | None = None, **named: Any) -> Any:
        run = before if own is None else MethodType(own, self)
        given = dict(zip(names, args, strict=False)) | named
        skip = (self.training or logits == "never") if skip_logits is None else skip_logits
        if given.get("labels") is None or not skip or _keeps_some(given.get("logits_to_keep")):
            return run(*args, **named)
        _require_causal_loss(self)
        halves = split_once(self)

        def head(hidden: torch.Tensor) -> torch.Tensor:
            return torch.stack([_loss(halves, hidden, given, memory, backend)])  # (1,)

        def loss(logits: torch.Tensor, labels: Any = None, vocab_size: int | None = None, **rest: Any) -> torch.Tensor:
            _require_untouched(given, rest | {"labels": labels})
            return call.output.sum()

        with replaced_head(OP, halves.head, head) as call, replaced(self, "_loss_function", loss):
            out = run(*args, **named)
        kind = type(out).__name__
        check.require(
            dataclasses.is_dataclass(out), OP, "return_dict", "True, or nothing", f"a {kind}", "Leave it out."
        )
        return dataclasses.replace(out, logits=None)

    update_wrapper(forward, own or before)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrapped: Any = forward  # functions take attributes
    wrapped.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
    wrapped._fastrl = True
    return MethodType(forward, model)


def _loss(
    halves: SplitModel, hidden: torch.Tensor, given: dict[str, Any], memory: int | None, backend: str
) -> torch.Tensor:
    """The causal language modelling loss of a call, from the head's input (..., L, H)."""
    ignored = given.get("ignore_index", -100)
    targets = given.get("shift_labels")
    if targets is None:  # the token at t is predicted at t - 1
        targets = torch.nn.functional.pad(given["labels"], (0, 1), value=ignored)[..., 1:]
    targets = targets.to(hidden.device)
    check.shape(OP, "labels", targets, hidden.shape[:-1], "as the head's input")
    counted, items = targets != ignored, given.get("num_items_in_batch")
    items = counted.sum() if items is None else torch.as_tensor(items, device=hidden.device)
    check.require(items.numel() == 1, OP, "num_items_in_batch", "one number", tuple(items.shape))
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = counted.to(dtype) / items.reshape(())
    return linear_token_loss(
        hidden,
        halves.weight,
        targets,
        torch.neg,
        weights=weights,
        ignore_index=ignored,
        memory=memory,
        backend=backend,
        **halves.options,
    ).loss


def _keeps_some(logits_to_keep: Any) -> bool:
    return isinstance(logits_to_keep, torch.Tensor) or bool(logits_to_keep)


def _require_causal_loss(model: PreTrainedModel) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    loss = getattr(model, "loss_function", None)
    name = getattr(loss, "__name__", repr(loss))
    do = "Call undo() for a loss of your own: it needs the logits."
    check.require(loss is ForCausalLMLoss, OP, "model.loss_function", "transformers' ForCausalLMLoss", name, do)


def _require_untouched(given: dict[str, Any], got: dict[str, Any]) -> None:
    """Refuses a model that computes labels for its loss from those of the call."""
    for name in SHAPES:
        ours, theirs = given.get(name), got.get(name)
        moved = isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) and ours.device != theirs.device
        expected = "the call's own in the model's loss"
        check.require(ours is theirs or moved, OP, name, expected, "others", "This model's loss cannot be replaced.")


def _require_same_loss(model: PreTrainedModel, forward: MethodType) -> None:
    """Compares the two losses on four tokens."""
    _require_causal_loss(model)
    halves = split_once(model)
    own, calls, products = model.loss_function, [], []

    def counted(*args: Any, **named: Any) -> torch.Tensor:
        calls.append(own)
        return own(*args, **named)

    ids = torch.arange(4, device=halves.weight.device).unsqueeze(0) % halves.weight.shape[0]
    with _evaluating(model), torch.no_grad():
        hook = halves.head.register_forward_hook(lambda _, given, product: products.append(product))
        with hook, replaced(model, "_loss_function", counted):
            expected = model.forward(input_ids=ids, labels=ids, use_cache=False)
        got, do = f"a {type(model).__name__}, which does not call it", "Its logits are needed for the loss."
        check.require(len(calls) == 1, OP, "model", "a model that takes its loss from self.loss_function", got, do)
        ours = forward(input_ids=ids, labels=ids, use_cache=False, skip_logits=True)
    error, scale = (ours.loss - expected.loss).abs().item(), max(1.0, expected.logits.abs().max().item())
    # transformers rounds the logits to the model's dtype and the loss to float32, fastrl does not. Logits of a model in
    # accelerate's autocast come in float32, after a product in bfloat16.
    eps = max(torch.finfo(one.dtype).eps for one in (*products, expected.logits, expected.loss))
    same = error <= 4 * eps * scale
    got = f"a {type(model).__name__}, whose own differs by {error:.3g}"
    check.require(same, OP, "model", "a model whose loss follows from its last hidden states", got)
