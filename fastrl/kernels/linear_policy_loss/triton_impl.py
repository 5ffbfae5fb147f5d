"""`linear_policy_loss` with torch's matmuls and kernels between them. The kernel that reads a row's logits also derives
the row's loss: before the next matmul it is then known which rows have a gradient at all."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.linear_logprob import triton_impl as linear_logprob
from fastrl.kernels.linear_logprob.chunked import Statistics
from fastrl.kernels.linear_policy_loss.chunked import forward_in_chunks
from fastrl.kernels.policy_loss import triton_impl as policy_loss
from fastrl.kernels.policy_loss.triton_token import kinds, parameters, policy_token
from fastrl.kernels.softmax_row_triton import build, logp_at, statistics
from fastrl.kernels.triton_jit import Build, launch
from fastrl.spec import KL, Cispo, Clip, Correction, Dppo, PolicyLoss


@triton.jit
def statistics_with_loss_kernel(
    logits_ptr: tl.tensor,  # (n, V)
    bias_ptr: tl.tensor,  # (V,) or None
    targets_ptr: tl.tensor,  # (n,), outside the vocabulary for a log-probability of NaN
    temperature_ptr: tl.tensor,
    rows_ptr: tl.tensor,  # (n,): which of the N tokens each row is
    params_ptr: tl.tensor,
    advantages_ptr: tl.tensor,  # (N,), as the next four; the last three or None
    weights_ptr: tl.tensor,
    old_logps_ptr: tl.tensor,
    ref_logps_ptr: tl.tensor,
    sampling_logps_ptr: tl.tensor,
    logps_ptr: tl.tensor,  # (n,)
    lse_ptr: tl.tensor,  # (2, n)
    entropy_ptr: tl.tensor,  # (n,) or None
    dlogps_ptr: tl.tensor,  # (n,)
    dentropy_ptr: tl.tensor,  # (n,)
    V: tl.int32,
    softcap: tl.float64,
    logit_scale: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    PER_ROW_TEMPERATURE: tl.constexpr,
    SURROGATE: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    SHARED_RATIO: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    SEQUENCE_CORRECTION: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """As `statistics_kernel`, and d loss / d logps and d entropy of each row."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row if PER_ROW_TEMPERATURE else temperature_ptr)
    ACC: tl.constexpr = temperature_ptr.dtype.element_ty
    ENTROPY: tl.constexpr = entropy_ptr is not None
    softcap_, scale = tl.full((), softcap, ACC), tl.full((), logit_scale, ACC)
    row_ptr = logits_ptr + row * V
    top, log_total, entropy = statistics(
        row_ptr, bias_ptr, V, temperature, softcap_, scale, HAS_SOFTCAP, ENTROPY, BLOCK
    )
    target = tl.load(targets_ptr + row)
    logp = logp_at(row_ptr, bias_ptr, target, V, top, log_total, temperature, softcap_, scale, HAS_SOFTCAP)
    tl.store(logps_ptr + row, logp)
    tl.store(lse_ptr + row, top)
    tl.store(lse_ptr + tl.num_programs(0) + row, log_total)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)

    t = tl.load(rows_ptr + row)
    old_logp, ref_logp = logp, logp
    if old_logps_ptr is not None:
        old_logp = tl.load(old_logps_ptr + t)
    if ref_logps_ptr is not None:
        ref_logp = tl.load(ref_logps_ptr + t)
    sampling_logp = old_logp
    if sampling_logps_ptr is not None:
        sampling_logp = tl.load(sampling_logps_ptr + t)
    _, dlog_ratio, dlogp, dentropy, _, _, _, _, _, _, _, _, _, _ = policy_token(
        params_ptr,
        logp,
        tl.load(advantages_ptr + t),
        tl.load(weights_ptr + t),
        old_logp,
        ref_logp,
        sampling_logp,
        entropy,
        logp,  # the means of a sequence, which a separable loss does not read
        logp,
        SURROGATE,
        SEQUENCE_RATIO,
        SHARED_RATIO,
        KL,
        CORRECTION,
        SEQUENCE_CORRECTION,
        WITH_ENTROPY,
    )
    tl.store(dlogps_ptr + row, dlogp + dlog_ratio)
    tl.store(dentropy_ptr + row, dentropy)


class Chunk(linear_logprob.Chunk):
    """As `linear_logprob.triton_impl.Chunk`, and as `linear_policy_loss.chunked.Chunk` in one launch."""

    def read_with_loss(
        self,
        logits: torch.Tensor,
        entropy: bool,
        spec: PolicyLoss,
        tokens: LossTokens,
        rows: torch.Tensor,
        poisoned: torch.Tensor | None,
    ) -> tuple[Statistics, torch.Tensor, torch.Tensor]:
        """Statistics of hidden W^T (n, V), and d loss / d logps and d entropy (n,)."""
        known, dlogps, dentropy = self.unknown(logits, entropy), *(logits.new_empty(len(logits)) for _ in range(2))
        targets = self.targets if poisoned is None else self.targets.masked_fill(poisoned[rows], self.vocabulary)
        context = {f"{name}_ptr": x if x is None else x.contiguous() for name, x in tokens._asdict().items()}
        del context["mask_ptr"]  # True for every row of a chunk
        launch(
            statistics_with_loss_kernel,
            len(logits),
            logits,
            logits_ptr=logits,
            targets_ptr=targets,
            rows_ptr=rows,
            params_ptr=parameters(spec, logits.device),
            logps_ptr=known.logps,
            lse_ptr=known.lse,
            entropy_ptr=known.entropy,
            dlogps_ptr=dlogps,
            dentropy_ptr=dentropy,
            **context,
            **kinds(spec),
            **self._finish(self.temperature),
        )
        return known, dlogps, dentropy


forward = partial(forward_in_chunks, Chunk, policy_loss)


def _build(name: str, spec: PolicyLoss, bias: str | None, *absent: str, **constants: Any) -> Build:
    tokens = ("advantages", "weights", "old_logps", "ref_logps", "sampling_logps")
    real = dict.fromkeys(("logits", "temperature", *tokens, "logps", "lse", "entropy", "dlogps", "dentropy"), "fp32")
    pointers = real | {"targets": "i64", "rows": "i64", "params": "fp64"} | ({"bias": bias} if bias else {})
    pointers = {key: kind for key, kind in pointers.items() if key not in absent}
    return build(name, statistics_with_loss_kernel, pointers, **kinds(spec), **constants)


BUILDS = [
    _build(
        "linear_policy_loss statistics clip, all options",
        PolicyLoss("token", Clip(0.2, 0.2, dual=3.0), KL("k3_ratio", 0.1), "token_sum", 0.1),
        "bf16",
        HAS_SOFTCAP=True,
        PER_ROW_TEMPERATURE=True,
    ),
    _build(
        "linear_policy_loss statistics clip, no options",
        PolicyLoss(),
        None,
        "ref_logps",
        "sampling_logps",
        "entropy",
        multiples=("V",),
    ),
    _build(
        "linear_policy_loss statistics cispo, corrected",
        PolicyLoss("token", Cispo(5.0), KL("k2", 0.1), correction=Correction("truncate", "token", 2.0)),
        None,
        multiples=("V",),
    ),
    _build(
        "linear_policy_loss statistics dppo, corrected",
        PolicyLoss("token", Dppo(), KL("k3+", 0.1), correction=Correction("truncate", "token", 2.0)),
        None,
        multiples=("V",),
    ),
]
