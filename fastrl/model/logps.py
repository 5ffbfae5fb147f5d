"""Log-probabilities of tokens from a causal language model, without its logits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrl import check
from fastrl.model.head import DIVISORS, SCALES, SOFTCAPS, SplitModel, _evaluating, rounding, split_head, watched
from fastrl.model.head_layer import adapter_refusal, in_force, is_adapted
from fastrl.model.masks import dense_masks
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.ops.support import Support
from fastrl.types import LogprobOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OP = "logps"
IGNORED = -100


def logps(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    entropy: bool = False,
    support: Support | None = None,
    memory: str | int = "auto",
    backend: str = "auto",
    **model_inputs: Any,
) -> LogprobOutput:
    """Log-probability of every token given the tokens before it, and the entropy of the distribution that it was drawn
    from, both in the shape of `input_ids`.

        logps[b, t] = log p(labels[b, t] | input_ids[b, :t]),   entropy[b, t] = H(p(. | input_ids[b, :t]))

    There is no shift to do: a token, its mask and its log-probability have the same index. `logps[:, -T:]` are the
    (B, T) log-probabilities of completions at the end of each row, as TRL and veRL lay them out. Exactly 0, without
    gradient, are: a token without a label, padding, and the first token of each sequence, which has nothing before it.
    Only the other tokens go through the head.

    The model's own forward runs, in its present mode: dropout is active in training mode, hooks and wrappers fire, and
    adapters count. Call `model.eval()` if log-probabilities of equal weights must be equal.

    Equals, with logits that are never rounded below float32:
    `log_softmax(model(input_ids, attention_mask).logits[:, :-1].float() / temperature, -1).gather(-1, input_ids[:, 1:,
    None])` at t = 1, 2, ...

    Args:
        model: a causal language model that `split_head` takes, or peft's or DistributedDataParallel's view of one. The
            split is made at the first call, which costs three forwards of four tokens, and again if the head changes.
        input_ids: (B, L) int. attention_mask: (B, L), 1 or True where there is a token; a row has no gaps.
        labels: (B, L): int, a token to score at each place or -100 for none, unshifted as transformers has them; or
            bool, a mask of the tokens of `input_ids` to score. None scores all tokens.
        position_ids: (B, L) int. Where it is 0 again, another sequence starts, which sees nothing of those before it.
            None counts from 0 along each row, padding included, as the model does. Other shapes go to the model as
            they are.
        temperature: a positive number, or a tensor that broadcasts to (B, L); no gradient.
        entropy: also return the entropy, with gradient.
        support: as `linear_logprob`, a set for each token that is scored, row by row, and none for the others:
            `support_sets` of what an engine returned for the completions of the batch.
        memory, backend: as `linear_logprob`.
        model_inputs: whatever else the model's forward takes, such as `pixel_values`.

    Returns:
        LogprobOutput, float32 (float64 for float64 models), with gradients to all that the model trains. The
        load-balancing loss of a mixture of experts is not in it: nothing here has a place for it. A loop that wants it
        takes it from the model, or trains with `fastrl.integrations.hf` or the built-in trainer.

    Raises:
        ValueError: as `split_head`; a shape or a set is wrong; a row has a gap in its attention_mask; sequences share a
            row in a model whose layers cannot keep them apart.
    """
    inner = unwrapped(OP, model)
    halves = split_once(inner)
    targets = _targets(input_ids, attention_mask, labels, position_ids)
    rows = (targets.flatten() != IGNORED).nonzero().squeeze(1)  # (N,), each at least 1 as no row's first token counts
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.broadcast_to(targets.shape).flatten()[rows]

    if support is not None:
        got = len(support[1]) - 1
        check.require(got == len(rows), OP, "support", f"{len(rows)} sets, one for each token that is scored", got)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        check.shape(
            OP, "hidden states", hidden, (*targets.shape, hidden.shape[-1]), "as input_ids and the head's width"
        )
        out = linear_logprob(
            hidden.flatten(0, 1)[rows - 1],
            halves.weight,
            targets.flatten()[rows],
            temperature=temperature,
            entropy=entropy,
            support=support,
            memory=memory,
            backend=backend,
            **halves.options,
        )
        found = [out.logps, out.entropy] if entropy else [out.logps]
        placed = [one.new_zeros(targets.numel()).index_copy(0, rows, one).view(targets.shape) for one in found]
        return torch.stack(placed, dim=-1)  # (B, L, 1 or 2)

    attention_mask = _separated(halves.decoder, input_ids, attention_mask, position_ids)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    with replaced_head(OP, halves.head, head) as call:
        model(**inputs, use_cache=False, **model_inputs)
    values = call.output
    return LogprobOutput(values[..., 0], values[..., 1] if entropy else None)


def unwrapped(op: str, model: nn.Module) -> PreTrainedModel:
    """The model inside DistributedDataParallel, or the model.

    Raises:
        ValueError: it is in a wrapper whose forward cannot have its head replaced.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    kind = type(model).__name__
    refused = {
        # Its graph would be compiled anew for every number of tokens that go through the head.
        "OptimizedModule": "Pass the model itself, and compile its decoder: model.get_decoder().compile().",
        "DataParallel": "Use DistributedDataParallel: start one process per GPU with torchrun.",
        "FullyShardedDataParallel": "Use fully_shard, on a model that was accelerated before.",
    }
    check.require(kind not in refused, op, "model", "a transformers model", kind, refused.get(kind, ""))
    return model


@dataclass(frozen=True)
class _Known:
    """What `split_once` remembers of a split. No reference to a module, so that all can be freed."""

    embeddings: weakref.ref[nn.Module]  # the model's output embeddings, which may be a wrapper of the head
    head: weakref.ref[nn.Module]
    decoder: weakref.ref[nn.Module]
    state: tuple[object, ...]
    softcap: float | None
    logit_scale: float


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def split_once(model: PreTrainedModel) -> SplitModel:
    """`split_head`, which runs the model, only if it has not been called or if the head or its constants are others.

    Here `logit_scale` is what the model does behind its head, to which it may give other states than its decoder's.

    Raises:
        ValueError: as `split_head`, or the model's logits do not follow from the head's input.
    """
    get = getattr(model, "get_output_embeddings", None)
    do = "Load it with AutoModelForCausalLM."
    check.require(get is not None, "split_head", "model", "a transformers model", type(model).__name__, do)
    embeddings, known = get(), _KNOWN.get(model)
    if embeddings is not None and known is not None and known.embeddings() is embeddings:
        head, decoder = known.head(), known.decoder()
        if head is not None and decoder is not None and known.state == _state(model, head):
            return SplitModel(model, decoder, head, known.softcap, known.logit_scale)
    halves = _for_the_heads_input(split_head(model))
    modules = (weakref.ref(one) for one in (embeddings, halves.head, halves.decoder))
    _KNOWN[model] = _Known(*modules, _state(model, halves.head), halves.softcap, halves.logit_scale)
    return halves


def _state(model: PreTrainedModel, head: nn.Module) -> tuple[object, ...]:
    """What makes a split another one if it changes."""
    config: Any = model.config.get_text_config()
    constants = tuple(getattr(config, name, None) for name in (*SCALES, *DIVISORS, *SOFTCAPS))
    layer: Any = in_force(head)
    weight = layer.base_layer.weight if is_adapted(layer) else layer.weight
    return (tuple(weight.shape), adapter_refusal(layer) if is_adapted(layer) else None, constants)


def _for_the_heads_input(halves: SplitModel) -> SplitModel:
    """The same halves, with the scale that is left to apply behind the head: MiniCPM3 scales its states before it."""
    with _evaluating(halves.model), torch.no_grad():
        run = watched(halves)
        for scale in dict.fromkeys((halves.logit_scale, 1.0)) if run.hidden is not None else ():
            found = replace(halves, logit_scale=scale)
            with run.precision:
                logits = found.logits(run.hidden)
            error = (logits.float() - run.logits).abs().max().item()
            if error <= 4 * rounding(run.hidden, logits) * run.logits.abs().max().item():
                return found
    got = f"a {type(halves.model).__name__}, which changes it first"
    check.require(False, "split_head", "model", "a model whose head takes the decoder's last hidden state", got)
    return halves


class HeadCall:
    """What a replaced head returned."""

    def __init__(self, op: str) -> None:
        self.op, self.outputs = op, []

    @property
    def output(self) -> torch.Tensor:
        """The result of the only call."""
        times = len(self.outputs)
        check.require(times == 1, self.op, "model", "a forward that calls its head once", f"{times} calls")
        return self.outputs[0]


@contextmanager
def replaced_head(op: str, head: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Generator[HeadCall]:
    """Inside the block, the head's forward is another function of its input, (B, L, H) to any few numbers per token.

    The head is still called as a module, where its model calls it. So whatever hangs on that call happens: hooks, the
    gathering of sharded weights, moves between devices. What the model does to its logits is done to those few numbers,
    which the caller ignores.
    """
    call = HeadCall(op)

    def recorded(hidden: torch.Tensor) -> torch.Tensor:
        # The very tensor that the module returns: gradient hooks that wrappers put on it must be on the loss's way.
        call.outputs.append(forward(hidden))
        return call.outputs[-1]

    # accelerate's hooks, which move weights and inputs to a device, are in `forward` and call `_old_forward`.
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    with replaced(head, name, recorded):
        yield call


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Generator[None]:
    """Inside the block, an object's own attribute is another one."""
    absent = object()
    before = vars(owner).get(name, absent)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is absent:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _targets(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """(B, L) int64: the token to score at each place, or IGNORED."""
    check.integer(OP, "input_ids", input_ids)
    check.require(input_ids.dim() == 2, OP, "input_ids", "shape (B, L)", tuple(input_ids.shape))
    targets = input_ids.long()
    if labels is not None:
        check.shape(OP, "labels", labels, input_ids.shape, "as input_ids", "Do not shift them.")
        check.device(OP, "labels", labels, input_ids.device, "input_ids")
        if labels.dtype == torch.bool:
            targets = targets.masked_fill(~labels, IGNORED)
        else:
            check.integer(OP, "labels", labels)
            targets = labels.long()
    first = torch.zeros_like(targets, dtype=torch.bool)
    first[:, :1] = True
    if attention_mask is not None:
        check.shape(OP, "attention_mask", attention_mask, input_ids.shape, "as input_ids")
        check.device(OP, "attention_mask", attention_mask, input_ids.device, "input_ids")
        there = attention_mask != 0
        begins = there.clone()
        begins[:, 1:] &= ~there[:, :-1]
        do = "Move the padding to the ends: the token after a gap is not predicted by the place before it."
        together = bool((begins.sum(1) <= 1).all())
        check.require(together, OP, "attention_mask", "each row's tokens side by side", "a row with a gap", do)
        targets = targets.masked_fill(~there, IGNORED)
        first |= begins
    if position_ids is not None and position_ids.dim() == 2:
        check.shape(OP, "position_ids", position_ids, input_ids.shape, "as input_ids")
        first |= position_ids == 0
    return targets.masked_fill(first, IGNORED)


def _separated(
    decoder: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> Any:
    """The model's attention mask: as given, or if sequences share a row, one that keeps them apart."""
    if position_ids is None or position_ids.dim() != 2:
        return attention_mask
    there = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    starts = there & (position_ids == 0)
    if not bool((starts.sum(1) > 1).any()):
        return attention_mask
    owner = starts.cumsum(1)
    mask = (owner[:, :, None] == owner[:, None, :]) & there[:, None, :] & there[:, :, None]
    mask = (mask & torch.ones_like(mask).tril()).unsqueeze(1)  # (B, 1, L, L)
    return dense_masks(decoder, input_ids, mask, position_ids, next(decoder.parameters()))
