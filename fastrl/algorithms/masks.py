"""Selects the tokens that an optimizer step trains on, with `fastrl.losses.token_masks` under the current policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch

from fastrl.check import require
from fastrl.kernels.policy_loss.reference import clip
from fastrl.losses.metrics import Metrics
from fastrl.losses.token_masks import (
    binary_tv_mask,
    clip_cov_score,
    covariance,
    entropy_threshold,
    off_policy_sequence_mask,
    top_entropy_mask,
    top_threshold,
)
from fastrl.model.policy import Policy
from fastrl.progress import Progress, tracked, unseen
from fastrl.rollout.draw import uniforms
from fastrl.spec import Clip, Dppo, Gmpo, PolicyLoss
from fastrl.types import MicroBatch

OP = "TokenMasks"


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens are trained on; null turns a mask off. Masks cost one more forward pass per optimizer step.

    Shares and means are over the tokens of one optimizer step with a non-zero advantage, whatever the split into
    micro-batches. A masked token loses only its surrogate; it keeps its KL and entropy terms and its place in the
    normaliser.
    """

    top_entropy: float | None = None
    """Train only on this share of tokens, those with the highest entropy: arXiv:2506.01939, which uses 0.2."""
    off_policy: float | None = None
    """Skip completions with a negative advantage that the policy has left by more than this, in nats per token:
    DeepSeek-V3.2, arXiv:2512.02556 eq. 9."""
    total_variation: float | None = None
    """Skip tokens whose probability has moved by more than this from the sampler's, in the direction of their
    advantage: DPPO's mask, arXiv:2602.04879, for other surrogates; dppo uses 0.2."""
    clip_cov: float | None = None
    """Clip-Cov, arXiv:2505.22617: skip this share of tokens, drawn from those with a covariance between cov_low and
    cov_high. The paper uses 2e-4."""
    cov_low: float = 1.0
    """Lower bound of the covariances that Clip-Cov draws from."""
    cov_high: float = 5.0
    """Upper bound of the covariances that Clip-Cov draws from."""
    kl_cov: float | None = None
    """KL-Cov, arXiv:2505.22617: hold this share of tokens, those with the highest covariance, to the old policy. The
    paper uses 2e-4 with an unclipped surrogate: loss.surrogate.low 1 and loss.surrogate.high 1e9."""
    kl_cov_coef: float = 1.0
    """KL-Cov: weight of the distance |log pi - log pi_old|."""

    def __post_init__(self) -> None:
        for name in ("top_entropy", "clip_cov", "kl_cov"):
            share = getattr(self, name)
            require(share is None or 0.0 < share < 1.0, OP, name, "a share between 0 and 1, or null", share)
        for name in ("off_policy", "total_variation"):
            bound = getattr(self, name)
            require(bound is None or bound >= 0.0, OP, name, "at least 0, or null", bound)
        one = self.clip_cov is None or self.kl_cov is None
        require(one, OP, "clip_cov, kl_cov", "one of them: both select the same tokens", "both")
        require(self.cov_low < self.cov_high, OP, "cov_low", f"less than cov_high, {self.cov_high}", self.cov_low)
        require(self.kl_cov_coef >= 0.0, OP, "kl_cov_coef", "at least 0", self.kl_cov_coef)
        for names, of in ((("cov_low", "cov_high"), "clip_cov"), (("kl_cov_coef",), "kl_cov")):
            given = [name for name in names if getattr(self, name) != getattr(type(self), name)]
            used = getattr(self, of) is not None
            require(used or not given, OP, ", ".join(names), f"left out without {of}", ", ".join(given))

    @property
    def on(self) -> bool:
        """Whether any mask is on."""
        switches = (self.top_entropy, self.off_policy, self.total_variation, self.clip_cov, self.kl_cov)
        return any(value is not None for value in switches)

    @property
    def reads_sampler(self) -> bool:
        """Whether a mask compares with the sampler's log-probabilities."""
        return self.off_policy is not None or self.total_variation is not None

    def require_fits(self, spec: PolicyLoss) -> None:
        """Refuses masks that make no sense with the loss."""
        surrogate, by_token = spec.surrogate, ("top_entropy", "total_variation", "clip_cov")
        one = next((name for name in by_token if getattr(self, name) is not None), "")
        expected = "null with gmpo, which has no term per token"
        require(not (one and isinstance(surrogate, Gmpo)), OP, one, expected, "a number")
        own = isinstance(surrogate, Dppo) and self.total_variation is not None
        require(not own, OP, "total_variation", "null with dppo, which has that mask", self.total_variation)
        clips = isinstance(surrogate, Clip) and spec.ratio == "token"
        expected = "null without the clip of a token's ratio, which it replaces"
        require(clips or self.clip_cov is None, OP, "clip_cov", expected, self.clip_cov)


def require_token_advantages(op: str, name: str, spec: PolicyLoss, masks: TokenMasks) -> None:
    """Refuses, as the value of `name`, advantages that differ within a completion where the loss takes one for all.

    Raises:
        ValueError: the loss's ratio is that of the sequence, or a mask reads the advantage of the whole completion.
    """
    one = spec.ratio == "sequence" or isinstance(spec.surrogate, Gmpo)
    require(not one, op, name, "None with a ratio per sequence; gspo_token takes advantages per token", spec.ratio)
    off, expected = masks.off_policy, "null where advantages differ within a completion"
    require(off is None, op, "masks.off_policy", expected, off)


@torch.no_grad()
def masked(
    policy: Policy,
    batches: Sequence[MicroBatch],
    masks: TokenMasks,
    spec: PolicyLoss,
    *,
    temperature: float,
    ratio_to_sampler: bool,
    seed: int,
    progress: Progress = unseen,
) -> tuple[list[MicroBatch], Metrics]:
    """The micro-batches of one optimizer step with token advantages, 0 for masked tokens, and with `kl_cov_weights`.

    Args:
        ratio_to_sampler: as in `policy_gradient_loss`: whether the old policy of ratio and KL-Cov is the sampler.
        seed: seed of Clip-Cov's draw, a different one for each optimizer step.
        progress: called before each micro-batch; counts them as the first of two passes.

    Returns:
        (micro-batches, metrics): `masks/kept_fraction`, the share of tokens with an advantage that keep it, and for
        KL-Cov `masks/kl_cov_fraction`.
    """
    if not masks.on or not batches:
        return list(batches), {}
    needs_entropy = masks.top_entropy is not None
    outputs = [
        policy.of(policy.hidden(batch), batch, temperature=temperature, entropy=needs_entropy)
        for batch in tracked(batches, progress, after=len(batches))
    ]
    logps = torch.cat([out.logps for out in outputs])
    sampling = torch.cat([batch.sampling_logps for batch in batches])
    advantages = torch.cat([token_advantages(batch) for batch in batches])
    live = torch.cat([batch.mask for batch in batches]) & (advantages != 0)

    keep = live.clone()
    if needs_entropy:
        entropy = torch.cat([out.entropy for out in outputs])
        keep &= top_entropy_mask(entropy, live, entropy_threshold(entropy, live, masks.top_entropy))
    if masks.off_policy is not None:
        parts = zip(batches, outputs, strict=True)
        keep &= torch.cat([_near(batch, out.logps, masks.off_policy) for batch, out in parts])
    if masks.total_variation is not None:
        bound = masks.total_variation
        keep &= binary_tv_mask(logps, sampling, advantages, low=bound, high=bound)
    held = None
    if masks.kl_cov is not None:
        scores = covariance(logps, advantages, live)
        held = scores >= top_threshold(scores, live, masks.kl_cov)
    if masks.clip_cov is not None:
        scores = covariance(logps, advantages, live)
        on_policy = not ratio_to_sampler and batches[0].old_logps is None  # if so, nothing is clipped
        old = sampling if ratio_to_sampler else logps
        if not (on_policy or ratio_to_sampler):
            old = torch.cat([batch.old_logps for batch in batches])
        term = clip(logps - old, advantages, spec.surrogate.low, spec.surrogate.high, spec.surrogate.dual)
        scores = scores.masked_fill(term.low | term.high, -torch.inf)
        noise = torch.cat([_noise(batch, seed) for batch in batches])
        scores = clip_cov_score(scores, noise, low=masks.cov_low, high=masks.cov_high)
        keep &= scores < top_threshold(scores, live, masks.clip_cov)

    sizes, count = [len(batch.targets) for batch in batches], live.sum().float()
    columns = {"advantages": torch.where(keep, advantages, 0.0).split(sizes)}
    metrics = {"masks/kept_fraction": (keep.sum().float(), count)}
    if held is not None:
        columns["kl_cov_weights"] = (masks.kl_cov_coef * held).split(sizes)
        metrics["masks/kl_cov_fraction"] = (held.sum().float(), count)
    pieces = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [replace(batch, **piece) for batch, piece in zip(batches, pieces, strict=True)], metrics


def token_advantages(batch: MicroBatch) -> torch.Tensor:
    """(N,) advantages, expanded if the batch has one per sequence."""
    if len(batch.advantages) == len(batch.targets):
        return batch.advantages
    return batch.advantages.repeat_interleave(batch.cu_seqlens.diff())


def _near(batch: MicroBatch, logps: torch.Tensor, threshold: float) -> torch.Tensor:
    """(N,) bool, True for tokens of sequences that `off_policy_sequence_mask` keeps."""
    kept = off_policy_sequence_mask(
        logps,
        batch.sampling_logps,
        batch.advantages,
        mask=batch.mask,
        threshold=threshold,
        cu_seqlens=batch.cu_seqlens,
    )
    return kept.repeat_interleave(batch.cu_seqlens.diff())


def _noise(batch: MicroBatch, seed: int) -> torch.Tensor:
    """(N,) uniform numbers, seeded by group and token hash so that packing does not change a completion's."""
    bounds, groups, tokens = batch.cu_seqlens.tolist(), batch.group_ids.tolist(), batch.targets.cpu().numpy()
    pieces = [
        uniforms(seed, [(group, crc32(tokens[start:end].tobytes()))], end - start)[0]
        for group, start, end in zip(groups, bounds, bounds[1:], strict=False)
    ]
    return torch.cat(pieces).to(batch.targets.device, torch.float32)
