"""`linear_logprob` with torch's matmuls and kernels between them; without a gradient and at small hidden sizes one
kernel multiplies and keeps statistics, so that no logit is ever stored."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from fastrl.kernels import tuning
from fastrl.kernels.inputs import HeadInputs, Read
from fastrl.kernels.linear_logprob import epilogue
from fastrl.kernels.linear_logprob.chunked import Statistics, backward_in_chunks, compact, forward_in_chunks
from fastrl.kernels.softmax_row import NO_SOFTCAP, check_targets
from fastrl.kernels.softmax_row_triton import (
    INTERPRETED,
    OPTIONS,
    below,
    build,
    cap,
    divide,
    flags,
    gradient_kernel,
    lowest,
    over,
    probabilities_kernel,
    statistics_kernel,
)
from fastrl.kernels.triton_jit import Build, launch

# Elements that Triton must know a stride to be a multiple of, to copy 16 bytes at a time; and bytes of a start.
ALIGNED = 16
NOT_A_TARGET = -1  # the rows of a chunk are chosen beforehand: none of them is ignored
FUSED_HIDDEN = 2048  # up to this size the logits' way to memory and back weighs more than the library's faster matmul


class Chunk(epilogue.Chunk):
    """As `epilogue.Chunk`, in Triton."""

    def write_statistics(self, known: Statistics, summaries: torch.Tensor | None = None) -> None:
        """Statistics of `source`, and its summaries (3, n) where there is room for them."""
        launch(
            statistics_kernel,
            len(self.source),
            self.source,
            logits_ptr=self.source,
            stride=self.source.stride(0),
            targets_ptr=self.targets,
            logps_ptr=known.logps,
            lse_ptr=known.lse,
            entropy_ptr=known.entropy,
            summaries_ptr=summaries,
            ignore_index=NOT_A_TARGET,
            **self._finish(self.temperature),
        )

    def keep(self, known: Statistics, saved: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes the probabilities to those rows of `saved` (N, V)."""
        launch(
            probabilities_kernel,
            len(rows),
            saved,
            logits_ptr=self.source,
            rows_ptr=rows,
            lse_ptr=known.lse,
            out_ptr=saved,
            **self._finish(self.temperature),
        )

    def write_gradient(
        self,
        known: Statistics,
        grad_logps: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: torch.Tensor,
        rows: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """d `source` to `out`."""
        launch(
            gradient_kernel,
            len(grad_logps),
            out,
            logits_ptr=self.source,
            stride=self.source.stride(0),
            rows_ptr=rows,
            targets_ptr=targets,
            logps_ptr=known.logps,
            lse_ptr=known.lse,
            entropy_ptr=known.entropy,
            grad_logps_ptr=grad_logps,
            grad_entropy_ptr=grad_entropy,
            out_ptr=out,
            ignore_index=NOT_A_TARGET,
            KEPT=self.kept,
            **self._finish(temperature),
        )

    def _finish(self, temperature: torch.Tensor) -> dict[str, Any]:
        """The arguments that finish a logit."""
        return {
            "bias_ptr": None if self.bias is None else self.bias.contiguous(),
            "temperature_ptr": temperature,
            "V": self.vocabulary,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            **flags(temperature, self.softcap, self.vocabulary),
        }


# The first matmul and the statistics in one kernel.


@triton.jit(do_not_specialize=["N"])
def part_kernel(
    hidden_ptr: tl.tensor,  # (N, H); with WARP_SPECIALIZE in the order of `rows`
    hidden_stride: tl.int64,
    weight_ptr: tl.tensor,  # (V, H)
    weight_stride: tl.int64,
    rows_ptr: tl.tensor,  # (N,) of hidden, targets and temperature; the first n of them are computed
    n_ptr: tl.tensor,
    bias_ptr: tl.tensor,  # (V,) or None
    targets_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    parts_ptr: tl.tensor,  # (4, parts, N): largest logit, the two sums relative to it, the target's logit or 0
    N: tl.int32,
    V: tl.int32,
    H: tl.int32,
    part_columns: tl.int32,
    softcap: tl.float64,
    logit_scale: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    PER_ROW_TEMPERATURE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr,
) -> None:
    """Statistics of hidden W^T over one part of the vocabulary. Neighbouring programs share the part of the weight, and
    those beyond the last row end at once.

    With WARP_SPECIALIZE, Hopper's tensor memory accelerator loads the tiles: one group of warps keeps it busy, also
    across the ends of vocabulary tiles, and two others each multiply and finish half of the rows. Triton divides the
    warps only where no branch is in or before the loop: programs that have nothing to do go through it no times, and a
    temperature of 1 and all others are two kernels, of which one finds that it has no row.
    """
    n = tl.load(n_ptr)
    first = tl.program_id(0) * BLOCK_N
    if not WARP_SPECIALIZE:  # noqa: SIM102 - known when it is compiled, the other when it runs
        if first >= n:
            return
    ACC: tl.constexpr = temperature_ptr.dtype.element_ty
    softcap_, scale = tl.full((), softcap, ACC), tl.full((), logit_scale, ACC)
    at = first + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row = tl.load(rows_ptr + at, mask=at < n, other=0)  # int64
    target = tl.load(targets_ptr + row).to(tl.int32)
    temperature = tl.load(temperature_ptr + row if PER_ROW_TEMPERATURE else temperature_ptr)
    end = tl.minimum((part + 1) * part_columns, V)
    if WARP_SPECIALIZE:
        if not PER_ROW_TEMPERATURE:
            n = tl.where((temperature == 1) == UNIT_TEMPERATURE, n, 0)
        end = tl.where(first < n, end, 0)
        hidden_tiles = tl.make_tensor_descriptor(hidden_ptr, [N, H], [hidden_stride, 1], [BLOCK_N, BLOCK_H])
        weight_tiles = tl.make_tensor_descriptor(weight_ptr, [V, H], [weight_stride, 1], [BLOCK_V, BLOCK_H])
    else:
        hidden_at = hidden_ptr + row[:, None] * hidden_stride
    columns = tl.arange(0, BLOCK_V)  # compared as they are: numbers known when it is compiled take no registers
    top = tl.full((BLOCK_N,), 0, ACC) + lowest(ACC)
    total = tl.full((BLOCK_N,), 0, ACC)
    moment = tl.full((BLOCK_N,), 0, ACC)
    at_target = tl.full((BLOCK_N,), 0, ACC)
    for start in tl.range(part * part_columns, end, BLOCK_V, warp_specialize=WARP_SPECIALIZE):
        cols = start + columns
        if not WARP_SPECIALIZE:
            weight_at = weight_ptr + cols[None, :].to(tl.int64) * weight_stride
        z = tl.full((BLOCK_N, BLOCK_V), 0, ACC)
        for k in range(0, H, BLOCK_H):
            if WARP_SPECIALIZE:  # beyond the ends there are zeros
                h = hidden_tiles.load([first, k])
                w = weight_tiles.load([start, k]).T
            else:
                ks = k + tl.arange(0, BLOCK_H)
                h = tl.load(hidden_at + ks[None, :], mask=ks[None, :] < H, other=0)
                w = tl.load(weight_at + ks[:, None], mask=(ks[:, None] < H) & (cols[None, :] < V), other=0)
            if INTERPRETED:  # the interpreter multiplies the bits of a bfloat16 as an integer; the product is the same
                h = h.to(ACC)
                w = w.to(ACC)
            z = tl.dot(h, w, z, input_precision="ieee")
        if bias_ptr is not None:
            z += tl.load(bias_ptr + cols, mask=cols < V, other=0).to(ACC)[None, :]
        z, _ = cap(z, softcap_, scale, HAS_SOFTCAP)
        if PER_ROW_TEMPERATURE:
            z = divide(z, temperature[:, None])
        elif not WARP_SPECIALIZE:
            z = over(z, temperature)
        elif not UNIT_TEMPERATURE:
            z = divide(z, temperature)
        at_target += tl.sum(tl.where(columns[None, :] == (target - start)[:, None], z, 0), 1)
        z = tl.where(columns[None, :] < V - start, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        total, moment = below(top, total, moment, higher)
        top = higher
        shifted = z - top[:, None]
        e = tl.exp(shifted)
        total += tl.sum(e, 1)
        moment += tl.sum(tl.where(e == 0, 0, e * shifted), 1)
    to_ptr = parts_ptr + part.to(tl.int64) * N + at
    step = tl.num_programs(1).to(tl.int64) * N
    tl.store(to_ptr, top, mask=at < n)
    tl.store(to_ptr + step, total, mask=at < n)
    tl.store(to_ptr + 2 * step, moment, mask=at < n)
    tl.store(to_ptr + 3 * step, at_target, mask=at < n)


@triton.jit(do_not_specialize=["N"])
def merge_kernel(
    parts_ptr: tl.tensor,  # (4, parts, N)
    rows_ptr: tl.tensor,  # (N,), and n as in `part_kernel`
    n_ptr: tl.tensor,
    logps_ptr: tl.tensor,  # (N,)
    lse_ptr: tl.tensor,  # (2, N)
    entropy_ptr: tl.tensor,  # (N,) or None
    N: tl.int32,
    parts: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    """Merges the parts in their order."""
    n = tl.load(n_ptr)
    if tl.program_id(0) * BLOCK >= n:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    ACC: tl.constexpr = parts_ptr.dtype.element_ty
    step = parts.to(tl.int64) * N
    top = tl.full((BLOCK,), 0, ACC) + lowest(ACC)
    total = tl.full((BLOCK,), 0, ACC)
    moment = tl.full((BLOCK,), 0, ACC)
    at_target = tl.full((BLOCK,), 0, ACC)
    for part in range(0, parts):
        from_ptr = parts_ptr + tl.cast(part, tl.int64) * N + at
        other_top = tl.load(from_ptr, mask=inside, other=0)
        other_total = tl.load(from_ptr + step, mask=inside, other=1)
        other_moment = tl.load(from_ptr + 2 * step, mask=inside, other=0)
        at_target += tl.load(from_ptr + 3 * step, mask=inside, other=0)
        higher = tl.maximum(top, other_top)
        total, moment = below(top, total, moment, higher)
        other_total, other_moment = below(other_top, other_total, other_moment, higher)
        total += other_total
        moment += other_moment
        top = higher
    log_total = tl.log(total)
    row = tl.load(rows_ptr + at, mask=inside, other=0)
    tl.store(logps_ptr + row, (at_target - top) - log_total, mask=inside)
    tl.store(lse_ptr + row, top, mask=inside)
    tl.store(lse_ptr + N + row, log_total, mask=inside)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_total - divide(moment, total), mask=inside)


def forward(
    inputs: HeadInputs,
    *,
    entropy: bool,
    save: str,
    summaries: bool = False,
) -> Read:
    """As `reference.forward`."""
    hidden = inputs.hidden
    # Wider values would go to units that multiply no faster than the library uses them; odd rows cannot be copied to
    # shared memory while the kernel multiplies.
    size = hidden.shape[1]
    if summaries or save != "none" or hidden.element_size() > 2 or size > FUSED_HIDDEN or size % ALIGNED != 0:
        return forward_in_chunks(Chunk, inputs, entropy=entropy, save=save, summaries=summaries)
    nothing, summary = (hidden.new_empty(0) for _ in range(2)), inputs.temperature.new_empty(3, 0)
    return Read(*_fused(inputs, entropy=entropy), *nothing, summary)


def _fused(inputs: HeadInputs, *, entropy: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logps, entropy, lse) without logits, and without a wait for the device."""
    hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index = inputs
    hidden, weight = (x if _aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in (hidden, weight))
    temperature = temperature.contiguous()
    count, vocabulary = len(targets), weight.shape[0]
    logps, lse = temperature.new_zeros(count), temperature.new_zeros(2, count)
    entropies = temperature.new_zeros(count if entropy else 0)
    safe, poisoned = check_targets(targets, vocabulary, ignore_index)
    rows, n = compact(targets != ignore_index)
    presence = {"HAS_SOFTCAP": softcap != NO_SOFTCAP, "PER_ROW_TEMPERATURE": temperature.numel() > 1}
    tile = dict(tuning.tuned("linear_logprob fused" + (" narrow" if any(presence.values()) else ""), hidden.device))
    tiles = -(-vocabulary // tile["BLOCK_V"])
    part_tiles = -(-tiles // tile.pop("PARTS"))
    parts = temperature.new_empty(4, -(-tiles // part_tiles), count)
    specialize = tile["WARP_SPECIALIZE"]
    if specialize:
        hidden = hidden[rows]  # a tile that a descriptor loads is of neighbouring rows
    for unit in (True, False) if specialize and not presence["PER_ROW_TEMPERATURE"] else (False,):
        launch(
            part_kernel,
            (-(-count // tile["BLOCK_N"]), parts.shape[1]),
            hidden,
            hidden_ptr=hidden,
            hidden_stride=hidden.stride(0),
            weight_ptr=weight,
            weight_stride=weight.stride(0),
            rows_ptr=rows,
            n_ptr=n,
            bias_ptr=None if bias is None else bias.contiguous(),
            targets_ptr=safe.contiguous(),
            temperature_ptr=temperature,
            parts_ptr=parts,
            N=count,
            V=vocabulary,
            H=hidden.shape[1],
            part_columns=part_tiles * tile["BLOCK_V"],
            softcap=softcap,
            logit_scale=logit_scale,
            UNIT_TEMPERATURE=unit,
            **presence,
            **tile,
            **OPTIONS,
        )
    merge = tuning.tuned("linear_logprob merge", hidden.device)
    launch(
        merge_kernel,
        -(-count // merge["BLOCK"]),
        hidden,
        parts_ptr=parts,
        rows_ptr=rows,
        n_ptr=n,
        logps_ptr=logps,
        lse_ptr=lse,
        entropy_ptr=entropies if entropy else None,
        N=count,
        parts=parts.shape[1],
        **merge,
        **OPTIONS,
    )
    return logps if poisoned is None else logps.masked_fill_(poisoned, float("nan")), entropies, lse


def _aligned(x: torch.Tensor) -> bool:
    """Whether rows start where both asynchronous copies and the tensor memory accelerator can read them."""
    return x.stride(-1) == 1 and x.stride(0) % ALIGNED == 0 and x.data_ptr() % ALIGNED == 0


backward = partial(backward_in_chunks, Chunk)


def _builds(head: str) -> list[Build]:
    """What heads of one dtype use, at its fullest."""
    real = "fp64" if head == "fp64" else "fp32"
    row = {"targets": "i64", "temperature": real, "bias": head}
    logits, known = {"logits": real, **row}, dict.fromkeys(("logps", "lse", "entropy"), real)
    upstream, summary = dict.fromkeys(("grad_logps", "grad_entropy"), real), {"summaries": real}
    capped: dict[str, Any] = {"HAS_SOFTCAP": True, "PER_ROW_TEMPERATURE": True}
    saved = {**logits, "logits": head, "rows": "i64"}
    kept = {**logits, "rows": "i64", "lse": real, "out": head}
    del kept["targets"]
    return [
        build(f"linear_logprob statistics {head}", statistics_kernel, logits | known, **capped),
        build(f"linear_logprob summaries {head}", statistics_kernel, logits | known | summary, **capped),
        build(f"linear_logprob gradient {head}", gradient_kernel, logits | known | upstream | {"out": head}, **capped),
        build(
            f"linear_logprob gradient of kept {head}",
            gradient_kernel,
            saved | known | upstream | {"out": head},
            KEPT=True,
            **capped,
        ),
        build(f"linear_logprob probabilities {head}", probabilities_kernel, kept, **capped),
    ]


def _fused_builds(head: str) -> list[Build]:
    inputs = {"hidden": head, "weight": head, "rows": "i64", "n": "i64", "targets": "i64", "temperature": "fp32"}
    inputs |= {"parts": "fp32"}
    biased, multiples = inputs | {"bias": head}, ("H", "hidden_stride", "weight_stride")
    wide = {"entry": "linear_logprob fused", "multiples": multiples}
    narrow = {"entry": "linear_logprob fused narrow", "multiples": multiples, "PER_ROW_TEMPERATURE": True}
    return [
        build(f"linear_logprob fused {head}", part_kernel, inputs, **wide),
        build(f"linear_logprob fused {head}, bias", part_kernel, biased, **wide),
        build(f"linear_logprob fused {head}, temperatures", part_kernel, inputs, **narrow),
        build(f"linear_logprob fused {head}, all options", part_kernel, biased, HAS_SOFTCAP=True, **narrow),
    ]


def _specialized_builds(head: str) -> list[Build]:
    """Of a table that turns WARP_SPECIALIZE on; there is none yet."""
    plain, biased, _, everything = _fused_builds(head)
    unit = replace(plain, constants=plain.constants | {"UNIT_TEMPERATURE": True})
    names = {"temperature 1": unit, "bias": biased, "all options": everything}
    return [
        replace(build, name=f"linear_logprob specialized {head}, {name}", changes=tuning.SPECIALIZED[build.entry])
        for name, build in names.items()
    ]


BUILDS = [build for head in ("bf16", "fp16", "fp32", "fp64") for build in _builds(head)]
BUILDS += [
    build(
        f"linear_logprob {name} bf16, no options",
        kernel,
        {"logits": "fp32", "targets": "i64", "temperature": "fp32", "logps": "fp32", "lse": "fp32"} | more,
        multiples=("V", "stride"),
    )
    for name, kernel, more in (
        ("statistics", statistics_kernel, {}),
        ("gradient", gradient_kernel, {"grad_logps": "fp32", "out": "bf16"}),
    )
]
BUILDS += _fused_builds("bf16") + _fused_builds("fp16") + _specialized_builds("bf16")
BUILDS += [
    build(
        "linear_logprob merge",
        merge_kernel,
        {"parts": "fp32", "rows": "i64", "n": "i64", "logps": "fp32", "lse": "fp32", "entropy": "fp32"},
        entry="linear_logprob merge",
    )
]
