"""The policy loss in one pass over the tokens, in Triton; formulas in `triton_token`.

Sums are taken per block of a fixed number of tokens, in float64, and the blocks' sums in order by a second kernel: no
atomics, so every run gives the same bits. A batch of one block needs no second kernel. Where the spec has sequence
level means, a program per sequence sums its tokens before, and shares the derivative of its ratio among them after.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.native import dense
from fastrl.kernels.policy_loss.metrics import METRICS, merge_metrics
from fastrl.kernels.policy_loss.triton_token import kinds, parameters, policy_token, summed_log_ratio
from fastrl.kernels.triton_jit import Build, device_function, launch
from fastrl.kernels.triton_math import max_or_nan
from fastrl.kernels.tuning import tuned
from fastrl.spec import KL, Cispo, Clip, Correction, Dppo, Gmpo, PolicyLoss, Reinforce, Sapo, Vespo

__all__ = ["BUILDS", "METRICS", "forward", "merge_metrics"]

# The columns of a block's sums: those of METRICS, in order, the loss and the number of tokens.
(
    CLIP_LOW,
    CLIP_HIGH,
    RATIO_MEAN,
    RATIO_MAX,
    REFERENCE_KL,
    OLD_KL,
    ENTROPY,
    DIFFERENCE_MEAN,
    DIFFERENCE_MAX,
    IMPORTANCE,
    KEPT,
    GRADIENT,
    CLAMPED,
    NONFINITE,
) = map(tl.constexpr, range(len(METRICS)))
ROWS = tl.constexpr(len(METRICS))
LOSS = tl.constexpr(len(METRICS))
COUNT = tl.constexpr(len(METRICS) + 1)
COLUMNS = tl.constexpr(16)

OPTIONS = {"enable_fp_fusion": False}


@device_function
def _with_sum(row: tl.tensor, column: tl.constexpr, x: tl.tensor, seen: tl.tensor) -> tl.tensor:
    """`row` (COLUMNS,) with the sum of x over the tokens seen."""
    return tl.where(tl.arange(0, COLUMNS) == column, tl.sum(tl.where(seen, x.to(tl.float64), 0.0), 0), row)


@device_function
def _with_max(row: tl.tensor, column: tl.constexpr, x: tl.tensor, seen: tl.tensor) -> tl.tensor:
    """`row` (COLUMNS,) with the maximum of x, never negative, over the tokens seen."""
    return tl.where(tl.arange(0, COLUMNS) == column, max_or_nan(tl.where(seen, x.to(tl.float64), 0.0), 0), row)


@device_function
def _report(row: tl.tensor, reported: tl.tensor, loss: tl.tensor, table: tl.tensor) -> None:
    """Writes the loss and the table of the metrics from the sums over all tokens."""
    k = tl.arange(0, COLUMNS)
    count = tl.sum(tl.where(k == COUNT, row, 0.0), 0)
    counts = tl.where((k == RATIO_MAX) | (k == DIFFERENCE_MAX), (count > 0.0).to(tl.float64), count)
    shown = ((reported >> k) & 1) != 0
    tl.store(loss + k * 0, row, mask=k == LOSS)
    tl.store(table + 2 * k, tl.where(shown, row, 0.0), mask=k < ROWS)
    tl.store(table + 2 * k + 1, tl.where(shown, counts, 0.0), mask=k < ROWS)


@triton.jit(do_not_specialize=["n", "sequences", "reported"])
def _tokens(
    params: tl.tensor,
    logps: tl.tensor,
    advantages: tl.tensor,
    weights: tl.tensor,
    mask: tl.tensor,
    old_logps: tl.tensor,
    ref_logps: tl.tensor,
    sampling_logps: tl.tensor,
    entropy: tl.tensor,
    seq_ids: tl.tensor,
    means: tl.tensor,
    dlogps: tl.tensor,
    dentropy: tl.tensor,
    through_ratio: tl.tensor,
    partial: tl.tensor,
    loss: tl.tensor,
    table: tl.tensor,
    n: tl.tensor,
    sequences: tl.tensor,
    reported: tl.tensor,
    SURROGATE: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    SHARED_RATIO: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    SEQUENCE_CORRECTION: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The tokens of one block, and their sums: into `partial`, or, of a batch of one block, into `loss` and `table`."""
    block = tl.program_id(0)
    t = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = tl.load(mask + t, mask=t < n, other=0) != 0  # nothing else is read where the mask is False
    logp = tl.load(logps + t, mask=seen, other=0.0)
    advantage = tl.load(advantages + t, mask=seen, other=0.0)
    weight = tl.load(weights + t, mask=seen, other=0.0)
    old_logp, ref_logp, entropies = logp, logp, tl.full(logp.shape, 0.0, logp.dtype)
    if old_logps is not None:
        old_logp = tl.load(old_logps + t, mask=seen, other=0.0)
    if ref_logps is not None:
        ref_logp = tl.load(ref_logps + t, mask=seen, other=0.0)
    sampling_logp = old_logp
    if sampling_logps is not None:
        sampling_logp = tl.load(sampling_logps + t, mask=seen, other=0.0)
    if entropy is not None:
        entropies = tl.load(entropy + t, mask=seen, other=0.0)
    mean_log_ratio, mean_mismatch = logp, logp
    if SEQUENCE_RATIO or SEQUENCE_CORRECTION:
        sequence = tl.load(seq_ids + t, mask=seen, other=0)
        mean_log_ratio = tl.load(means + sequence, mask=seen, other=0.0)
        mean_mismatch = tl.load(means + sequences + sequence, mask=seen, other=0.0)
    value, dlog_ratio, dlogp, dterm, low, high, ratio, kl, old_kl, difference, importance, kept, clamped, broken = (
        policy_token(
            params,
            logp,
            advantage,
            weight,
            old_logp,
            ref_logp,
            sampling_logp,
            entropies,
            mean_log_ratio,
            mean_mismatch,
            SURROGATE,
            SEQUENCE_RATIO,
            SHARED_RATIO,
            KL,
            CORRECTION,
            SEQUENCE_CORRECTION,
            WITH_ENTROPY,
        )
    )
    if SHARED_RATIO:
        tl.store(through_ratio + t, dlog_ratio, mask=t < n)
        active = t < 0  # `_share` counts them
    else:
        dlogp += dlog_ratio
        active = seen & ((dlogp != 0.0) | (dterm != 0.0))
    tl.store(dlogps + t, dlogp, mask=t < n)
    tl.store(dentropy + t, dterm, mask=t < n)

    row = tl.full([COLUMNS], 0.0, tl.float64)
    row = _with_sum(row, CLIP_LOW, low, seen)
    row = _with_sum(row, CLIP_HIGH, high, seen)
    row = _with_sum(row, RATIO_MEAN, ratio, seen)
    row = _with_max(row, RATIO_MAX, ratio, seen)
    row = _with_sum(row, REFERENCE_KL, kl, seen)
    row = _with_sum(row, OLD_KL, old_kl, seen)
    row = _with_sum(row, ENTROPY, entropies, seen)
    row = _with_sum(row, DIFFERENCE_MEAN, difference, seen)
    row = _with_max(row, DIFFERENCE_MAX, difference, seen)
    row = _with_sum(row, IMPORTANCE, importance, seen)
    row = _with_sum(row, KEPT, kept, seen)
    row = _with_sum(row, GRADIENT, active, seen)
    row = _with_sum(row, CLAMPED, clamped, seen)
    row = _with_sum(row, NONFINITE, broken, seen)
    row = _with_sum(row, LOSS, value, seen)
    row = _with_sum(row, COUNT, seen, seen)
    if partial is None:
        _report(row, reported, loss, table)
    else:
        tl.store(partial + block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS), row)


@triton.jit(do_not_specialize=["parts", "reported"])
def _total(
    partial: tl.tensor, loss: tl.tensor, table: tl.tensor, parts: tl.tensor, reported: tl.tensor, PARTS: tl.constexpr
) -> None:
    """The loss and the metrics from the sums of all blocks, in one program."""
    k = tl.arange(0, COLUMNS)
    total = tl.full([COLUMNS], 0.0, tl.float64)
    most = tl.full([COLUMNS], 0.0, tl.float64)
    for start in range(0, parts, PARTS):
        i = start + tl.arange(0, PARTS)
        part = tl.load(partial + i[:, None] * COLUMNS + k[None, :], mask=i[:, None] < parts, other=0.0)
        total += tl.sum(part, 0)
        largest = max_or_nan(part, 0)
        most = tl.where((largest > most) | (largest != largest), largest, most)
    _report(tl.where((k == RATIO_MAX) | (k == DIFFERENCE_MAX), most, total), reported, loss, table)


@triton.jit(do_not_specialize=["sequences"])
def _means(
    params: tl.tensor,
    order: tl.tensor,
    bounds: tl.tensor,
    mask: tl.tensor,
    advantages: tl.tensor,
    logps: tl.tensor,
    old_logps: tl.tensor,
    sampling_logps: tl.tensor,
    means: tl.tensor,
    sequences: tl.tensor,
    SURROGATE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Of one sequence, the means over its masked-in tokens of logps - old_logps, which Gmpo clips and of which Vespo
    takes the sum, and of old_logps - sampling_logps."""
    s = tl.program_id(0)
    end = tl.load(bounds + s + 1)
    count = tl.full([BLOCK], 0, tl.int32)
    log_ratio = tl.full([BLOCK], 0.0, tl.float64)
    mismatch = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(tl.load(bounds + s), end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        t = tl.load(order + i, mask=i < end, other=0)
        seen = tl.load(mask + t, mask=i < end, other=0) != 0
        logp = tl.load(logps + t, mask=seen, other=0.0).to(tl.float64)
        old_logp = logp
        if old_logps is not None:
            old_logp = tl.load(old_logps + t, mask=seen, other=0.0).to(tl.float64)
        count += seen.to(tl.int32)
        advantage = tl.load(advantages + t, mask=seen, other=0.0).to(tl.float64)
        log_ratio += summed_log_ratio(params, logp - old_logp, advantage, SURROGATE)
        if sampling_logps is not None:
            mismatch += old_logp - tl.load(sampling_logps + t, mask=seen, other=0.0).to(tl.float64)
    tokens = tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
    if SURROGATE == "Vespo":
        tl.store(means + s, tl.sum(log_ratio, 0))
    else:
        tl.store(means + s, tl.sum(log_ratio, 0) / tokens)
    tl.store(means + sequences + s, tl.sum(mismatch, 0) / tokens)


@triton.jit(do_not_specialize=["blocks"])
def _share(
    params: tl.tensor,
    order: tl.tensor,
    bounds: tl.tensor,
    mask: tl.tensor,
    advantages: tl.tensor,
    logps: tl.tensor,
    old_logps: tl.tensor,
    through_ratio: tl.tensor,
    dlogps: tl.tensor,
    dentropy: tl.tensor,
    partial: tl.tensor,
    blocks: tl.tensor,
    SURROGATE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The derivative of one sequence's ratio, shared by its masked-in tokens, of Gmpo those that it does not clip; and
    how many tokens now send a gradient."""
    s = tl.program_id(0)
    first = tl.load(bounds + s)
    end = tl.load(bounds + s + 1)
    count = tl.full([BLOCK], 0, tl.int32)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        t = tl.load(order + i, mask=i < end, other=0)
        seen = tl.load(mask + t, mask=i < end, other=0) != 0
        count += seen.to(tl.int32)
        total += tl.load(through_ratio + t, mask=seen, other=0.0).to(tl.float64)
    mean = (tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1).to(tl.float64)).to(dlogps.dtype.element_ty)
    active = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        t = tl.load(order + i, mask=i < end, other=0)
        seen = tl.load(mask + t, mask=i < end, other=0) != 0
        dlogp = tl.load(dlogps + t, mask=seen, other=0.0)
        if SURROGATE == "Gmpo":
            raw = tl.load(logps + t, mask=seen, other=0.0)
            raw -= raw if old_logps is None else tl.load(old_logps + t, mask=seen, other=0.0)
            advantage = tl.load(advantages + t, mask=seen, other=0.0)
            takes_part = summed_log_ratio(params, raw, advantage, SURROGATE) == raw
            dlogp = tl.where(takes_part, dlogp + mean, dlogp)
        else:
            dlogp += mean
        tl.store(dlogps + t, dlogp, mask=seen)
        dterm = tl.load(dentropy + t, mask=seen, other=0.0)
        active += (seen & ((dlogp != 0.0) | (dterm != 0.0))).to(tl.float64)
    k = tl.arange(0, COLUMNS)
    row = tl.where(k == GRADIENT, tl.sum(active, 0), 0.0)
    tl.store(partial + (blocks + s).to(tl.int64) * COLUMNS + k, row)


def _reported(
    spec: PolicyLoss,
    ref_logps: torch.Tensor | None,
    sampling_logps: torch.Tensor | None,
    entropy: torch.Tensor | None,
) -> int:
    """A bit per row of METRICS: whether it has values. A row without is (0, 0)."""
    absent = set()
    if isinstance(spec.surrogate, (Sapo, Reinforce, Vespo)):
        absent |= {"clip_ratio/low_mean", "clip_ratio/high_mean"}
    if ref_logps is None:
        absent |= {"kl"}
    if entropy is None:
        absent |= {"entropy"}
    if sampling_logps is None:
        absent |= {name for name in METRICS if name.startswith("sampling/")}
    if spec.correction is None:
        absent |= {"sampling/kept_fraction"}
    return sum(1 << k for k, name in enumerate(METRICS) if name not in absent)


def forward(
    logps: torch.Tensor,
    tokens: LossTokens,
    entropy: torch.Tensor | None,
    seq_ids: torch.Tensor | None,
    num_seqs: int,
    spec: PolicyLoss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, dlogps (N,), dentropy (N,), metrics (K, 2): the contract is in `fastrl.kernels.policy_loss`."""
    n, shares = len(logps), spec.ratio == "sequence"
    if n == 0:
        return logps.new_zeros(()), logps.clone(), logps.clone(), logps.new_zeros(len(METRICS), 2)
    logps, entropy = dense(logps), dense(entropy)
    advantages, weights, mask, old_logps, ref_logps, sampling_logps = map(dense, tokens)
    loss, table = logps.new_empty(()), logps.new_empty(len(METRICS), 2)
    dlogps, dentropy = torch.empty_like(logps), torch.empty_like(logps)
    sizes = tuned("policy_loss", logps.device)
    seen = {"mask": mask, **sizes, **OPTIONS}
    outputs = {"loss": loss, "table": table, "reported": _reported(spec, ref_logps, sampling_logps, entropy)}
    derivatives = {"dlogps": dlogps, "dentropy": dentropy, "through_ratio": None}
    compared = {"logps": logps, "advantages": advantages, "old_logps": old_logps, "sampling_logps": sampling_logps}
    shared = {"seq_ids": None, "means": None, "sequences": num_seqs}
    partial, blocks = None, triton.cdiv(n, sizes["BLOCK"])
    parts = blocks + (num_seqs if shares else 0)
    if parts > 1 or shares:
        partial = logps.new_empty(parts, COLUMNS.value, dtype=torch.float64)
    if not spec.separable:
        ids, order = seq_ids.sort(stable=True)  # a sequence's tokens side by side, whatever their order
        segments = {"order": order, "bounds": torch.searchsorted(ids, torch.arange(num_seqs + 1, device=ids.device))}
        means = logps.new_empty(2, num_seqs)
        segments |= {"params": parameters(spec, logps.device), "SURROGATE": type(spec.surrogate).__name__}
        launch(_means, num_seqs, logps, **segments, **compared, **seen, means=means, sequences=num_seqs)
        shared |= {"seq_ids": dense(seq_ids), "means": means}
    if shares:
        derivatives["through_ratio"] = torch.empty_like(logps)
    launch(
        _tokens,
        blocks,
        logps,
        **{"params": parameters(spec, logps.device), "weights": weights, "n": n},
        **{"ref_logps": ref_logps, "entropy": entropy, "partial": partial},
        **(compared | shared | derivatives | outputs | kinds(spec) | seen),
    )
    if shares:
        del compared["sampling_logps"]
        launch(_share, num_seqs, logps, **segments, **compared, **derivatives, **seen, partial=partial, blocks=blocks)
    if partial is not None:
        sums = tuned("policy_loss total", logps.device)
        launch(_total, 1, logps, **outputs, partial=partial, parts=parts, **sums, **OPTIONS)
    return loss, dlogps, dentropy, table


def _builds() -> Iterator[Build]:
    everything = {
        "clip": PolicyLoss("token", Clip(0.2, 0.2, dual=3.0), KL("k3_ratio", 0.1), "token_sum", 0.1),
        "cispo": PolicyLoss("token", Cispo(5.0), KL("k2", 0.1), correction=Correction("truncate", "token", 2.0)),
        "sapo": PolicyLoss("token", Sapo(), KL("k1", 0.1), correction=Correction("mask", "sequence", 2.0)),
        "gspo": PolicyLoss(
            "sequence", Clip(3e-4, 4e-4), KL("k3", 0.1), correction=Correction("truncate", "token", 2.0)
        ),
        "dppo": PolicyLoss("token", Dppo(), KL("k3+", 0.1), correction=Correction("truncate", "token", 2.0)),
        "reinforce": PolicyLoss("token", Reinforce(), aggregate="token_sum"),
        "gmpo": PolicyLoss("sequence", Gmpo(), KL("k3_ratio", 0.1)),
        "vespo": PolicyLoss("sequence", Vespo()),
        "gspo_token": PolicyLoss("sequence_token", Clip(3e-4, 4e-4)),
    }
    floats = {"params": "*fp64", "partial": "*fp64"}
    for name, spec in everything.items():
        for real in ("fp32", "fp64") if name in ("clip", "gspo") else ("fp32",):
            types = dict.fromkeys(_tokens.arg_names[: _tokens.arg_names.index("n")], f"*{real}") | floats
            types |= {"mask": "*i1", "seq_ids": "*i64"} | dict.fromkeys(("n", "sequences", "reported"), "i32")
            absent = set() if spec.correction else {"sampling_logps"}
            absent |= set() if spec.ratio == "sequence" else {"through_ratio"}
            absent |= {"seq_ids", "means"} if spec.separable else set()
            absent |= {"partial"} if name == "reinforce" else set()
            constants = dict.fromkeys(absent) | kinds(spec)
            yield Build(f"tokens {name} {real}", _tokens, types, constants, OPTIONS, "policy_loss")
    yield Build(
        "total",
        _total,
        {"partial": "*fp64", "loss": "*fp32", "table": "*fp32", "parts": "i32", "reported": "i32"},
        {},
        OPTIONS,
        "policy_loss total",
    )
    segments = {"order": "*i64", "bounds": "*i64", "mask": "*i1"}
    segments |= {"params": "*fp64"} | dict.fromkeys(("advantages", "logps", "old_logps"), "*fp32")
    means = segments | dict.fromkeys(("sampling_logps", "means"), "*fp32") | {"sequences": "i32"}
    share = segments | dict.fromkeys(("through_ratio", "dlogps", "dentropy"), "*fp32")
    share |= {"partial": "*fp64", "blocks": "i32"}
    for surrogate, name in (("Clip", ""), ("Gmpo", " gmpo")):
        of = {"SURROGATE": surrogate}
        yield Build(f"means{name}", _means, means, of, OPTIONS, "policy_loss")
        yield Build(f"share{name}", _share, share, of, OPTIONS, "policy_loss")


BUILDS = tuple(_builds())
