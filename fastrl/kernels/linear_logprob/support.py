"""`linear_logprob` over a set of kept ids per row, in plain torch: narrow sets read only their rows of the weight.

The sets come as in a CSR matrix: row n keeps token_ids[offsets[n] : offsets[n + 1]]. An entry is one (row, kept id);
what lies between the products with hidden states and weight are vectors over all entries, (nnz,). A narrow row's
products gather the kept rows of the weight, a wide row's are a matmul over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastrl.check import require
from fastrl.kernels.inputs import HeadInputs, Needs
from fastrl.kernels.linear_logprob.chunked import VOCABULARY_TILE, Head, row_chunks
from fastrl.kernels.precision import widest
from fastrl.kernels.softmax_row import finish_logits_, unfinish_grad_

GATHER_BYTES = 64 << 20  # of gathered rows in the accumulation dtype; the workspace is a small multiple of it
# A row is wide that keeps at least one id in so many. Gathering moves a row of the weight per entry, so a matmul, which
# reads each row once for many tokens, overtakes it long before a set is most of the vocabulary. The CPU's share is
# measured, forward and backward; the GPU's is an estimate from bytes and operations.
WIDE = {"cpu": 128, "cuda": 1024}


class Sets(NamedTuple):
    """The set of each row."""

    token_ids: torch.Tensor  # (nnz,) int64; 0 in ignored rows, whose ids are never read
    rows: torch.Tensor  # (nnz,) int64, ascending, the row of each entry
    offsets: torch.Tensor  # (N + 1,) int64

    def entries(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(entries, owner) of some rows (n,): indices into nnz, and which of `rows` each belongs to."""
        sizes = self.offsets.diff()[rows]
        owner = torch.arange(len(rows), device=rows.device).repeat_interleave(sizes)
        shift = self.offsets[rows] - (sizes.cumsum(0) - sizes)
        return torch.arange(len(owner), device=rows.device) + shift[owner], owner

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """(nnz,) -> (N,), summed in float64, in the order of the entries."""
        wide = values.to(widest(values.device))
        return torch.segment_reduce(wide, "sum", offsets=self.offsets, initial=0, unsafe=True)  # ty: ignore[missing-attribute]


class Scores(NamedTuple):
    """What the forward pass gives: its two results, and what the backward pass reads beside them."""

    logps: torch.Tensor  # (N,)
    entropy: torch.Tensor  # (N,) or (0,)
    lse: torch.Tensor  # (2, N): the largest logit, and the logarithm of what is left
    raw: torch.Tensor  # (nnz,) hidden W^T, without the bias
    at_target: torch.Tensor  # (N,) int64, the entry of each row's target; -1 if another part of the vocabulary has it


def sets_of(inputs: HeadInputs, token_ids: torch.Tensor, offsets: torch.Tensor) -> Sets:
    """The sets, from offsets that are known to be good."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    rows = rows.repeat_interleave(offsets.diff(), output_size=len(token_ids))
    ignored = inputs.targets == inputs.ignore_index
    return Sets(token_ids.masked_fill(ignored[rows], 0), rows, offsets)


def checked_sets(
    inputs: HeadInputs, token_ids: torch.Tensor, offsets: torch.Tensor, vocabulary: int
) -> tuple[Sets, torch.Tensor]:
    """(the sets, the entry of each row's target), from what a caller gave.

    The host has to learn the size of each set in any case, so a wrong one raises on every device. A target outside its
    set raises too: its log-probability would be -inf and its ratio 0, which a loss takes for an ordinary clipped token.

    Raises:
        ValueError: the offsets are no bounds of sets, or a row that is not ignored has an id outside the vocabulary, an
            id twice, or not its target.
    """
    count = len(token_ids)
    bounds = offsets.cpu()
    good = bool(bounds[0] == 0 and bounds[-1] == count and (bounds.diff() >= 0).all())
    expected = f"offsets that ascend from 0 to {count}, the number of ids"
    require(good, "linear_logprob", "support", expected, bounds.tolist() if len(bounds) < 10 else "others")
    sets = sets_of(inputs, token_ids, offsets)
    live = inputs.targets != inputs.ignore_index
    outside = (sets.token_ids < 0) | (sets.token_ids >= vocabulary)
    _refuse(outside, sets.rows, f"ids in [0, {vocabulary})", "another", "Pass vocab_size as the sampler had it.")
    # One key per (row, id), sorted: neighbours that are equal are duplicates, and a search finds the targets.
    key, order = (sets.rows * vocabulary + sets.token_ids).sort(stable=True)
    twice = torch.zeros_like(outside)
    twice[1:] = (key[1:] == key[:-1]) & live[sets.rows[1:]]  # sorting leaves every entry in its row
    _refuse(twice, sets.rows, "each id once", "one twice", "A set has no duplicates.")
    rows = torch.arange(len(live), device=live.device)
    inside = (inputs.targets >= 0) & (inputs.targets < vocabulary)
    wanted = rows * vocabulary + inputs.targets.where(inside, 0)
    place = torch.searchsorted(key, wanted).clamp_(max=max(count - 1, 0))
    found = inside & (key[place] == wanted) if count else torch.zeros_like(live)
    do = "The sampler could not have drawn it: align the sets with the targets, or mask the row with ignore_index."
    _refuse(live & ~found, rows, "the target in its row's set", "one without", do)
    return sets, order[place] if count else rows


def of_shard(
    sets: Sets, at_target: torch.Tensor, live: torch.Tensor, start: int, end: int
) -> tuple[Sets, torch.Tensor]:
    """The part of the sets of live rows (N,) bool with ids from `start` to `end`, which become 0 to end - start."""
    kept = (sets.token_ids >= start) & (sets.token_ids < end) & live[sets.rows]
    before = torch.cat((kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)))  # (nnz + 1,)
    part = Sets(sets.token_ids[kept] - start, sets.rows[kept], before[sets.offsets])
    if len(kept) == 0:
        return part, torch.full_like(at_target, -1)
    return part, torch.where(kept[at_target], before[at_target], -1)


def _refuse(wrong: torch.Tensor, rows: torch.Tensor, expected: str, got: str, do: str) -> None:
    """Raises for the first of `rows` that is wrong."""
    if bool(wrong.any()):
        row = int(rows[wrong.nonzero()[0, 0]])
        require(False, "linear_logprob", "support", expected, f"{got} at row {row}", do)


def forward(inputs: HeadInputs, token_ids: torch.Tensor, offsets: torch.Tensor, *, entropy: bool) -> Scores:
    """logps and entropy of each row's softmax over its set; ignored rows are exactly 0.

    Raises:
        ValueError: see `checked_sets`.
    """
    sets, at_target = checked_sets(inputs, token_ids, offsets, inputs.weight.shape[0])
    return read(inputs, sets, at_target, entropy=entropy)


def read(inputs: HeadInputs, sets: Sets, at_target: torch.Tensor, *, entropy: bool) -> Scores:
    """`forward`, given the checked sets. A row without its target has log-probability -inf, one without any id also
    the largest logit."""
    ignored = inputs.targets == inputs.ignore_index
    raw = _products(inputs, sets, ~ignored)
    if len(raw) == 0:  # there is no target to read either
        logps = raw.new_full(ignored.shape, -torch.inf).masked_fill_(ignored, 0)
        return Scores(logps, raw.new_zeros(len(logps) * entropy), logps.repeat(2, 1), raw, at_target)
    z, _ = _finished(raw, inputs, sets)
    top = torch.segment_reduce(z, "max", offsets=sets.offsets, unsafe=True)  # ty: ignore[missing-attribute]  not in its stubs
    p = (z - top[sets.rows]).exp_()  # an infinite maximum makes the row NaN, as it must be
    total = sets.sum(p)
    log_total = total.log()
    logps = (z[at_target.clamp(min=0)] - top - log_total).to(z.dtype).masked_fill_(at_target < 0, -torch.inf)
    h = raw.new_empty(0)
    if entropy:
        h = sets.sum(torch.special.entr(p.div_(total[sets.rows]))).to(z.dtype).masked_fill_(ignored, 0)
    lse = torch.stack((top, log_total.to(z.dtype))).masked_fill_(ignored, 0)
    return Scores(logps.masked_fill_(ignored, 0), h, lse, raw, at_target)


def backward(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    inputs: HeadInputs,
    token_ids: torch.Tensor,
    offsets: torch.Tensor,
    scores: Scores,
    *,
    needs: Needs,
    main_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(d hidden (N, H), d weight (V, H), d bias (V,)) in the accumulation dtype; (0,) where not needed.

    With `main_grad`, (V, H) in that dtype, d weight is added to it instead of being returned. Rows whose upstream
    gradient is exactly zero cost no product. No sum depends on the order in which threads finish.
    """
    hidden, weight = inputs.hidden, inputs.weight
    sets = sets_of(inputs, token_ids, offsets)
    active = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
    active = active & (inputs.targets != inputs.ignore_index)
    dz = _grad_entries(grad_logps, grad_entropy, inputs, sets, scores, active)
    dtype = dz.dtype
    grad_hidden = dz.new_zeros(hidden.shape if needs.hidden else (0,))
    grad_weight = dz.new_zeros(weight.shape if needs.weight and main_grad is None else (0,))
    into = grad_weight if main_grad is None else main_grad
    grad_bias = dz.new_zeros(weight.shape[0] if needs.bias else 0)
    narrow, wide = _by_width(active, sets, weight)
    head = Head(weight, into)
    for rows in row_chunks(wide, weight.shape[0], dtype.itemsize):
        entries, owner = sets.entries(rows)
        dense = dz.new_zeros(len(rows), weight.shape[0])
        dense[owner, sets.token_ids[entries]] = dz[entries]
        dense = dense.to(head.dz_dtype)
        if needs.hidden:
            grad_hidden[rows] = _times_weight(head, dense)
        if needs.weight:
            head.accumulate_weight(dense, hidden[rows])
    for entries in _gathers(narrow, sets, weight, dtype):
        rows, ids, upstream = sets.rows[entries], sets.token_ids[entries], dz[entries].unsqueeze(-1)
        if needs.hidden:
            _add_rows(grad_hidden, rows, weight[ids].to(dtype).mul_(upstream))
        if needs.weight:
            _add_rows(into, ids, hidden[rows].to(dtype).mul_(upstream))
    if needs.bias:
        _add_rows(grad_bias, sets.token_ids, dz)
    return grad_hidden, grad_weight, grad_bias


def _products(inputs: HeadInputs, sets: Sets, live: torch.Tensor) -> torch.Tensor:
    """hidden W^T of every entry of the live rows, 0 in the others; (nnz,)."""
    hidden, weight = inputs.hidden, inputs.weight
    head = Head(weight)
    raw = hidden.new_zeros(len(sets.rows), dtype=head.dtype)
    narrow, wide = _by_width(live, sets, weight)
    for rows in row_chunks(wide, weight.shape[0], head.dtype.itemsize):
        entries, owner = sets.entries(rows)
        raw[entries] = head.logits(hidden[rows])[owner, sets.token_ids[entries]]
    for entries in _gathers(narrow, sets, weight, head.dtype):
        kept = weight[sets.token_ids[entries]].to(head.dtype)  # (n, H)
        raw[entries] = kept.mul_(hidden[sets.rows[entries]]).sum(-1)
    return raw


def _times_weight(head: Head, dense: torch.Tensor) -> torch.Tensor:
    """dense (n, V) times the weight, (n, H), in the accumulation dtype.

    Without a mixed-precision matmul the weight is widened tile by tile: a 16-bit matmul over a whole vocabulary is
    hundreds of times slower on a CPU that has none.
    """
    if head.mixed:
        return head.grad_hidden(dense)
    total = dense.new_zeros(len(dense), head.weight.shape[1])
    for start in range(0, len(head.weight), VOCABULARY_TILE):
        tile = slice(start, start + VOCABULARY_TILE)
        total.addmm_(dense[:, tile], head.weight[tile].to(dense.dtype))
    return total


def _by_width(chosen: torch.Tensor, sets: Sets, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(narrow, wide): row indices, ascending, of the chosen rows (N,) bool."""
    wide = sets.offsets.diff() * WIDE.get(weight.device.type, WIDE["cuda"]) >= weight.shape[0]
    return (chosen & ~wide).nonzero()[:, 0], (chosen & wide).nonzero()[:, 0]


def _gathers(rows: torch.Tensor, sets: Sets, weight: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The entries of some rows, in parts whose rows of the weight fit `GATHER_BYTES`; a set may span several parts."""
    entries, _ = sets.entries(rows)
    return iter(entries.split(max(1, GATHER_BYTES // (weight.shape[1] * dtype.itemsize))) if len(entries) else ())


def _finished(raw: torch.Tensor, inputs: HeadInputs, sets: Sets) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(finished logits, slope of the cap or None) of every entry, (nnz,)."""
    z = raw.clone() if inputs.bias is None else raw + inputs.bias[sets.token_ids]
    slope = finish_logits_(z.unsqueeze(-1), _temperature(inputs, sets), inputs.softcap, inputs.logit_scale)
    return z, slope


def _temperature(inputs: HeadInputs, sets: Sets) -> torch.Tensor:
    """(1,) or (nnz,)."""
    return inputs.temperature if inputs.temperature.numel() == 1 else inputs.temperature[sets.rows]


def _grad_entries(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    inputs: HeadInputs,
    sets: Sets,
    scores: Scores,
    active: torch.Tensor,
) -> torch.Tensor:
    """d raw (nnz,), 0 in rows that are not active.

    The target's entry comes from `logps`: with p near 1, 1 - p would be lost.
    """
    z, slope = _finished(scores.raw, inputs, sets)
    top, log_total = scores.lse[:, sets.rows]
    log_p = z.sub_(top).sub_(log_total)
    p = log_p.exp()
    chosen = (active & (scores.at_target >= 0)).nonzero()[:, 0]
    target, logps = scores.at_target[chosen], scores.logps[chosen]
    dz = -grad_logps[sets.rows] * p
    dz[target] = -grad_logps[chosen] * logps.expm1()
    if grad_entropy is not None:
        surprise = (log_p + scores.entropy[sets.rows]).masked_fill_(p == 0, 0)
        dz -= grad_entropy[sets.rows] * p * surprise
    dz = unfinish_grad_(dz.unsqueeze(-1), slope, _temperature(inputs, sets), inputs.logit_scale).squeeze(-1)
    return dz.masked_fill_(~active[sets.rows], 0)


def _add_rows(total: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """total[index] += values in an order that does not vary; each device has one function that keeps it."""
    if total.device.type == "cpu":
        total.index_add_(0, index, values)
    else:
        total.index_put_((index,), values, accumulate=True)
