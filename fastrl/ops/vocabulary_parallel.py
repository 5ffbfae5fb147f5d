"""`linear_logprob` with the vocabulary split over the ranks of a process group: the operator behind `process_group`.

Rank r holds the rows of the head's weight that follow those of rank r - 1, and every rank the same hidden states and
targets. A call takes two collectives: an all-gather of headers of `HEADER` bytes, by which every rank knows whether all
mean the same call, and one of 3 to 7 numbers per row (`fastrl.kernels.linear_logprob.shard`). Backward takes headers
too, since every rank has to derive the same loss, and an all-reduce of d hidden, of which each rank knows the part that
comes from its own tokens.

Rows split over ranks (sequence or context parallelism) need none of this: each rank calls without `process_group`, with
the normalizer of all ranks' rows.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch._compile import _disable_dynamo

from fastrl import check
from fastrl.kernels.inputs import HeadInputs, Needs, Read
from fastrl.kernels.linear_logprob import shard
from fastrl.kernels.linear_logprob import support as over_sets
from fastrl.kernels.precision import widest
from fastrl.kernels.registry import as_written
from fastrl.kernels.softmax_row import check_targets
from fastrl.ops.derivatives import once_differentiable
from fastrl.ops.support import Support

HEADER = 2048  # bytes
IGNORED = -1  # as a target within a shard, where the caller's ignore_index may be an id
SAME = "Give all ranks of the group the same rows, and the same options."
TOGETHER = "Gather the rows of sequence parallelism before the call."
Header = dict[str, Any]


def ranks_of(op: str, process_group: distributed.ProcessGroup | None, argument: str = "process_group") -> int:
    """The number of ranks that the vocabulary is split over; 1 without a group.

    Raises:
        TypeError: it is no process group with this rank in it.
    """
    if process_group is None:
        return 1
    got, do = type(process_group).__name__, "Of a DeviceMesh pass get_group()."
    known = isinstance(process_group, distributed.ProcessGroup)
    check.require(known, op, argument, "a torch.distributed.ProcessGroup", got, do, TypeError)
    return distributed.get_world_size(process_group)


@contextmanager
def shared_refusals(op: str, process_group: distributed.ProcessGroup | None, *tensors: Any) -> Generator[None]:
    """Inside the block, an error raises on every rank: the others would wait for this one in a collective.

    For all that a rank checks by itself before its first collective. `tensors` say on which device to tell the others.
    """
    if process_group is None or ranks_of(op, process_group) == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}".encode("ascii", "replace").decode()
        device = next((one.device for one in tensors if isinstance(one, torch.Tensor)), torch.device("cpu"))
        _exchange(process_group, device, {"error": text[: HEADER // 3]})
        raise


def _exchange(process_group: distributed.ProcessGroup, device: torch.device, header: Header) -> list[Header]:
    """The headers of all ranks, in the order of ranks. JSON of a fixed size: nothing is unpickled."""
    text = json.dumps(header).encode().ljust(HEADER)
    mine = torch.tensor(list(text), dtype=torch.uint8, device=device)
    every = mine.new_empty(distributed.get_world_size(process_group), HEADER)
    distributed.all_gather(list(every), mine, group=process_group)
    return [json.loads(bytes(row)) for row in every.tolist()]


def _answers(op: str, process_group: distributed.ProcessGroup, device: torch.device, header: Header) -> list[Header]:
    """The headers of all ranks, of the same kind as this one.

    Raises:
        RuntimeError: a rank refused its arguments, or is in another call.
    """
    every = _exchange(process_group, device, header)
    for rank, other in enumerate(every):
        refused, elsewhere = "error" in other, other.keys() != header.keys()
        got = f"an error on rank {rank}: {other['error']}" if refused else f"another call on rank {rank}"
        expected = "the same call on every rank, with arguments that each accepts"
        check.require(not (refused or elsewhere), op, "process_group", expected, got, error=RuntimeError)
    return every


def _agree(op: str, process_group: distributed.ProcessGroup, device: torch.device, header: Header) -> list[Header]:
    """Every rank's header.

    Raises, on every rank alike:
        RuntimeError: as `_answers`. ValueError: ranks differ in what must be the same, or hold the same rows.
    """
    every = _answers(op, process_group, device, header)
    for name, value in every[0]["same"].items():
        for rank, other in enumerate(every):
            theirs = other["same"][name]
            got = f"{value} on rank 0 and {theirs} on rank {rank}"
            do = TOGETHER if name in ("hidden", "targets") else SAME
            check.require(theirs == value, op, name, "the same on every rank of process_group", got, do)
    for rank, other in enumerate(every[1:], 1):
        whole = other["rows"] == every[0]["rows"] and other["ends"] is not None and other["ends"] == every[0]["ends"]
        do = "Pass each rank its own rows, or leave process_group out."
        check.require(not whole, op, "weight", "other rows on every rank", f"the same on ranks 0 and {rank}", do)
    return every


def _header(inputs: HeadInputs, support: Support | None, options: dict[str, Any]) -> Header:
    """What this rank tells the others: all that has to be the same, its number of rows, and marks of their ends."""
    wide = widest(inputs.hidden.device)
    live = (inputs.targets != inputs.ignore_index).sum()
    live, *sums = torch.stack([live, *map(_checksum, (inputs.targets, *(support or ())))]).tolist()
    rows = len(inputs.weight)
    with torch.no_grad():
        marks = [inputs.temperature.to(wide).sum(), *(inputs.weight[[0, -1]].to(wide).sum(-1) if rows else ())]
    temperature, *ends = map(repr, torch.stack(marks).tolist())
    same = {
        "hidden": f"shape {tuple(inputs.hidden.shape)} and dtype {inputs.hidden.dtype}",
        "targets": f"{live} of {len(inputs.targets)} ids with checksum {sums[0]}",
        "support": None if support is None else f"{len(support[0])} ids with checksums {sums[1:]}",
        "temperature": f"{inputs.temperature.numel()} with sum {temperature}",
        "softcap": inputs.softcap,
        "logit_scale": inputs.logit_scale,
        "ignore_index": inputs.ignore_index,
        "bias": inputs.bias is not None,
        **options,
    }
    # A head whose rows are all equal, as one of zeros, tells nothing.
    return {"same": same, "rows": rows, "ends": ends if len(set(ends)) > 1 else None, "live": live}


def _checksum(ids: torch.Tensor) -> torch.Tensor:
    """A number that other ids, or the same in another order, hardly ever have."""
    return ((ids + 1) * (2 * torch.arange(len(ids), device=ids.device) + 1)).sum()


def _agree_on_gradients(op: str, process_group: distributed.ProcessGroup, **upstream: torch.Tensor | None) -> None:
    """Requires about the same upstream gradients on every rank: of ranks with other losses, say from advantages of
    their own, the parts of d hidden would belong to no loss at all. Ranks may round them in another order.

    Raises:
        ValueError: on every rank, they differ.
    """
    marks = {name: None if one is None else _mark(one) for name, one in upstream.items()}
    device = next(one.device for one in upstream.values() if one is not None)
    header = {name: mark and list(map(repr, mark)) for name, mark in marks.items()}
    every = _answers(op, process_group, device, header)
    for name in upstream:
        found = [mark and tuple(map(float, mark)) for mark in (header[name] for header in every)]
        for rank, mark in enumerate(found):
            both = mark is not None and found[0] is not None
            # A NaN is no disagreement.
            same = mark == found[0] or (both and not abs(mark[0] - found[0][0]) > 1e-3 * max(mark[1], found[0][1]))
            got = f"{found[0] and found[0][0]} on rank 0 and {mark and mark[0]} on rank {rank}"
            expected = "a weighted sum that is the same on every rank of process_group"
            do = "Compute the same loss on every rank, from the same advantages, weights and masks."
            check.require(bool(same), op, f"gradient of {name}", expected, got, do)


def _mark(gradient: torch.Tensor) -> list[float]:
    """A sum that depends on the order, and the size of what is added."""
    wide = gradient.to(widest(gradient.device))
    ramp = torch.linspace(0.5, 1.5, len(wide), dtype=wide.dtype, device=wide.device)
    return torch.stack(((wide * ramp).sum(), wide.abs().sum())).tolist()


@dataclass(frozen=True)
class _Whole:
    """Scores of rows over all tokens of a shard."""

    entropy: bool
    summaries: bool
    save: str

    def forward(self, inputs: HeadInputs) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(what `shard.merge` reads of each row, what backward reads beside it)."""
        read = shard.forward(inputs, entropy=self.entropy, save=self.save, summaries=self.summaries)
        parts = [*read.lse, read.logps]
        if self.entropy or self.summaries:
            parts.append(read.entropy if self.entropy else torch.zeros_like(read.logps))
        return parts + (list(read.summaries) if self.summaries else []), read.saved

    def backward(
        self, upstream: tuple[torch.Tensor, torch.Tensor | None], inputs: HeadInputs, merged: shard.Merged,
        saved: torch.Tensor, needs: Needs,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """(d hidden, d weight, d bias) of this shard, in the accumulation dtype."""
        unused = saved.new_empty(0)
        read = Read(merged.logps, merged.entropy, merged.lse, saved, unused, unused)
        return shard.backward(*upstream, inputs, read, save=self.save, needs=needs, rounded=False)


@dataclass(frozen=True)
class _Sets:
    """Scores of rows over the part of their sets that a shard has."""

    entropy: bool
    sets: over_sets.Sets
    at_target: torch.Tensor

    def forward(self, inputs: HeadInputs) -> tuple[list[torch.Tensor], torch.Tensor]:
        """As of `_Whole`."""
        scores = over_sets.read(inputs, self.sets, self.at_target, entropy=self.entropy)
        return [*scores.lse, scores.logps, *([scores.entropy] if self.entropy else [])], scores.raw

    def backward(
        self, upstream: tuple[torch.Tensor, torch.Tensor | None], inputs: HeadInputs, merged: shard.Merged,
        saved: torch.Tensor, needs: Needs,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """As of `_Whole`."""
        scores = over_sets.Scores(merged.logps, merged.entropy, merged.lse[:2], saved, self.at_target)
        ids, offsets = self.sets.token_ids, self.sets.offsets
        return over_sets.backward(*upstream, inputs, ids, offsets, scores, needs=needs)


@dataclass(frozen=True)
class _Call:
    """One call on one rank: what is known once all ranks have agreed."""

    op: str
    group: distributed.ProcessGroup
    inputs: HeadInputs  # of this shard: its own tokens are 0 to V_r - 1, V_r stands for those of others
    scores: _Whole | _Sets
    rows: torch.Tensor  # (n,) those with a target
    owner: torch.Tensor  # (n,) the shard of each one's target
    sizes: torch.Tensor  # (R,) tokens of each shard
    sum_hidden: bool


@_disable_dynamo  # torch.compiler.disable would import the compiler here
def vocabulary_parallel_logprob(
    op: str,
    inputs: HeadInputs,
    process_group: distributed.ProcessGroup,
    *,
    vocab_size: int | None,
    entropy: bool,
    summaries: bool,
    support: Support | None,
    save: str,
    needs: Needs,
    sum_hidden: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logps (N,), entropy (N,) or (0,), summaries (3, N) or (3, 0)) over the rows of all ranks' weights in turn.

    Args:
        inputs: checked by `check_head`: this rank's weight and bias, targets among all tokens.
        vocab_size: how many of all rows are tokens; the last ranks have the others.
        support: checked by `check_support`, ids among all tokens.
        save: "store" or "recompute", this shard's probabilities.
        needs: which of the head's tensors get a gradient. d hidden is the sum over ranks, equal on all of them, or
            without `sum_hidden` this rank's share of it.

    Raises:
        ValueError, RuntimeError: on every rank, if ranks do not agree. IndexError: as `linear_logprob`.
    """
    options = {"entropy": entropy, "vocab_size": vocab_size, "summaries": summaries}
    options |= {"hidden.requires_grad": needs.hidden, "weight.requires_grad": needs.weight or needs.bias}
    options |= {"sum_hidden": sum_hidden}
    device, rank = inputs.hidden.device, distributed.get_rank(process_group)
    with torch.no_grad():
        every = _agree(op, process_group, device, _header(inputs, support, options))
        lengths = [header["rows"] for header in every]
        total = sum(lengths)
        vocabulary = total if vocab_size is None else vocab_size
        expected = f"1 to {total}, the rows of all ranks' weights"
        check.require(0 < vocabulary <= total, op, "vocab_size", expected, vocabulary)
        ends = torch.tensor(lengths).cumsum(0).clamp_(max=vocabulary)
        starts = torch.cat((ends.new_zeros(1), ends[:-1]))
        start, end = int(starts[rank]), int(ends[rank])
        ignored = inputs.targets == inputs.ignore_index
        targets, poisoned = check_targets(inputs.targets, vocabulary, inputs.ignore_index)
        rows = (
            (~ignored).nonzero()[:, 0] if every[0]["live"] < len(targets) else torch.arange(len(targets), device=device)
        )
        owner = torch.searchsorted(ends.to(device), targets[rows], right=True)
        elsewhere = (targets < start) | (targets >= end)
        own = (targets - start).masked_fill(elsewhere, end - start).masked_fill(ignored, IGNORED)
        scores: _Whole | _Sets = _Whole(entropy, summaries, save)
        if support is not None:
            sets, at_target = over_sets.checked_sets(inputs, *support, vocabulary)
            scores = _Sets(entropy, *over_sets.of_shard(sets, at_target, ~ignored, start, end))
    weight, bias = inputs.weight[: end - start], None if inputs.bias is None else inputs.bias[: end - start]
    local = inputs._replace(
        hidden=inputs.hidden.detach(),
        weight=weight.detach(),
        targets=own,
        bias=None if bias is None else bias.detach(),
        ignore_index=IGNORED,
    )
    call = _Call(op, process_group, local, scores, rows, owner, (ends - starts).to(device), sum_hidden)
    logps, entropies, found = _Logprob.apply(inputs.hidden, weight, bias, call)
    if poisoned is not None:
        logps = logps.masked_fill(poisoned, torch.nan)
    return logps, entropies, found


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: _Call
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        with as_written(hidden.device):
            parts, saved = call.scores.forward(call.inputs)
            merged = _gathered(torch.stack(parts), call)
        entropy = merged.entropy if call.scores.entropy else merged.entropy.new_empty(0)
        ctx.mark_non_differentiable(merged.summaries, *(() if call.scores.entropy else (entropy,)))
        ctx.save_for_backward(hidden, weight, bias, merged.logps, entropy, merged.lse, saved)
        ctx.call = call
        return merged.logps, entropy, merged.summaries

    @staticmethod
    @once_differentiable("linear_logprob")
    def backward(ctx: Any, grad_logps: torch.Tensor | None, grad_entropy: torch.Tensor | None, _: Any) -> tuple:
        call, needs = ctx.call, Needs(*ctx.needs_input_grad[:3])
        hidden, weight, bias, logps, entropy, lse, saved = ctx.saved_tensors
        if grad_logps is None and grad_entropy is None:
            return None, None, None, None
        grad_logps = torch.zeros_like(logps) if grad_logps is None else grad_logps.contiguous()
        inputs = call.inputs._replace(hidden=hidden, weight=weight, bias=bias)
        merged = shard.Merged(logps, entropy, lse, lse.new_empty(3, 0))
        _agree_on_gradients(call.op, call.group, logps=grad_logps, entropy=grad_entropy)
        with as_written(hidden.device):
            gradients = call.scores.backward((grad_logps, grad_entropy), inputs, merged, saved, needs)
        if needs.hidden and call.sum_hidden and len(call.rows) > 0:
            distributed.all_reduce(gradients[0], group=call.group)
        return *(grad.to(hidden.dtype) if needed else None for grad, needed in zip(gradients, needs, strict=True)), None


def _gathered(parts: torch.Tensor, call: _Call) -> shard.Merged:
    """The statistics of all shards, by row of the call, from those of this one, (K, N); 0 in ignored rows."""
    known, count = parts.shape
    ranks, some = distributed.get_world_size(call.group), len(call.rows)
    rank = distributed.get_rank(call.group)
    every = parts.new_empty(ranks, known, some)
    if some > 0:
        distributed.all_gather(list(every), parts[:, call.rows].contiguous(), group=call.group)
    merged = shard.merge(every, call.owner, call.sizes, rank)
    # Ignored rows are exactly 0.
    return shard.Merged(*(_spread(one, call.rows, count) for one in merged))


def _spread(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """(..., n) of some rows to (..., N), 0 elsewhere."""
    if values.shape[-1] != len(rows) or len(rows) == count:  # not computed, or all there
        return values
    return values.new_zeros(*values.shape[:-1], count).index_copy_(-1, rows, values)
