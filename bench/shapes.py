"""Real model shapes, the tensors of each op at such a shape, and the float64 truth of the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import Outputs

GROUP = 8  # completions per prompt
CLIP = 0.2
KL_COEF = 0.04


@dataclass(frozen=True)
class HeadShape:
    """`tokens` completion tokens, in sequences of `length`, at a head of `vocabulary` x `hidden`; of a padded batch
    about three eighths of them are padding."""

    tokens: int
    hidden: int
    vocabulary: int
    length: int = 32
    padded: bool = True

    def __str__(self) -> str:
        size = f"{self.tokens} x {self.hidden} x {self.vocabulary}"
        return f"{size}, sequences of {self.length}" + ("" if self.padded else " without padding")


# A micro-batch of the demo recipe has about 512 completion tokens; a GPU takes 4,096 and more.
HEADS = {
    "tiny": HeadShape(256, 64, 1_000, 16),
    "smollm2": HeadShape(512, 576, 49_152),
    "smollm2-2k": HeadShape(2_048, 576, 49_152),
    "gemma3-270m": HeadShape(512, 640, 262_144),
    "gemma3-270m-1k": HeadShape(1_024, 640, 262_144),
    "qwen3-4b": HeadShape(4_096, 2_560, 151_936, 512),
    "llama3-8b": HeadShape(4_096, 4_096, 128_256, 512),
    "qwen3-0.6b-8k": HeadShape(8_192, 1_024, 151_936, 512),
    "qwen3-8b-8k": HeadShape(8_192, 4_096, 151_936, 512),
    "qwen3-8b-16k": HeadShape(16_384, 4_096, 151_936, 512),
    # Without padding, what `bench/goals.py` compares with.
    "16k x 4096": HeadShape(16_384, 4_096, 151_936, 512, padded=False),
    "16k x 1024": HeadShape(16_384, 1_024, 151_936, 512, padded=False),
}


@dataclass(frozen=True)
class LayerShape:
    """`tokens` rows through each distinct linear layer of a decoder block: (outputs, width)."""

    tokens: int
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {' '.join(f'{outputs}x{width}' for outputs, width in self.sizes)}"


# q and o, k and v, gate and up, down.
SMOLLM2 = ((576, 576), (192, 576), (1_536, 576), (576, 1_536))
QWEN3_600M = ((2_048, 1_024), (1_024, 1_024), (3_072, 1_024), (1_024, 3_072))
LAYERS = {
    "tiny": LayerShape(48, ((40, 24), (24, 40))),
    "smollm2-8": LayerShape(8, SMOLLM2),
    "smollm2-64": LayerShape(64, SMOLLM2),
    "smollm2-512": LayerShape(512, SMOLLM2),
    "smollm2-1k": LayerShape(1_024, SMOLLM2),
    "smollm2-2k": LayerShape(2_048, SMOLLM2),
    "smollm2-4k": LayerShape(4_096, SMOLLM2),
    "qwen3-0.6b-64": LayerShape(64, QWEN3_600M),
    "qwen3-0.6b-1k": LayerShape(1_024, QWEN3_600M),
}

# Sequences x tokens of each, for the ops without a vocabulary; `demo` is one step of the demo recipe.
BATCHES = {
    "tiny": (8, 16),
    "demo": (64, 32),
    "64k": (128, 512),
    "long": (64, 2_048),
    "wide": (1_024, 512),
    "32k": (64, 32_768),
    "16 x 128k": (16, 131_072),
}


def find(table: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The named shapes of a table.

    Raises:
        ValueError: no such shape.
    """
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError(f"shapes: expected some of {', '.join(table)}, got {', '.join(unknown)}.")
    return {name: table[name] for name in names}


@dataclass(frozen=True)
class HeadTensors:
    """What a log-probability op reads; those of `wants` get a gradient, with `grad_logps` coming from above."""

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    targets: torch.Tensor  # (N,)
    grad_logps: torch.Tensor  # (N,) float32
    wants: tuple[str, ...]

    def inputs(self) -> list[torch.Tensor]:
        """The tensors of `wants`."""
        return [getattr(self, name) for name in self.wants]


def head_tensors(shape: HeadShape, dtype: torch.dtype, device: torch.device, wants: tuple[str, ...]) -> HeadTensors:
    """Random tensors whose distributions are as peaked as a trained model's: most tokens were likely."""
    on = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    weight = torch.randn(shape.vocabulary, shape.hidden, **on) * shape.hidden**-0.5
    targets = torch.randint(shape.vocabulary, (shape.tokens,), **on)
    hidden = 14 * weight[targets] + 2 * torch.randn(shape.tokens, shape.hidden, **on)
    grad_logps = torch.randn(shape.tokens, **on) / shape.tokens
    return HeadTensors(
        hidden.to(dtype).requires_grad_("hidden" in wants),
        weight.to(dtype).requires_grad_("weight" in wants),
        targets,
        grad_logps,
        wants,
    )


@dataclass(frozen=True)
class TokenTensors:
    """What a policy loss reads besides log-probabilities: right-padded sequences, `GROUP` to a prompt."""

    logps: torch.Tensor  # (B, T) float32, with gradient
    old_logps: torch.Tensor  # (B, T)
    ref_logps: torch.Tensor  # (B, T)
    advantages: torch.Tensor  # (B,)
    mask: torch.Tensor  # (B, T) bool


def token_tensors(
    batch: tuple[int, int],
    device: torch.device,
    *,
    around: torch.Tensor | None = None,
    zero_advantage: float = 0.0,
    padded: bool = True,
) -> TokenTensors:
    """Sequences of a quarter of T to T tokens, or all of T where not `padded`; the first `zero_advantage` share of the
    groups has advantages of 0.

    `around`: (B, T) log-probabilities that the old and reference ones differ from by little.
    """
    made = torch.Generator().manual_seed(1)
    sequences, length = batch
    logps = -torch.rand(batch, generator=made) * 3 if around is None else around.detach().float().cpu()
    advantages = torch.randn(sequences, generator=made)
    advantages[: int(zero_advantage * sequences / GROUP) * GROUP] = 0.0
    lengths = torch.randint(max(1, length // 4), length + 1, (sequences, 1), generator=made)
    # A fifth of the ratios far beyond the clip bounds, the others well inside: a ratio beside a bound would be clipped
    # or not by the rounding of 16-bit logits, and every such provider would look wrong by a whole token's gradient.
    beyond = torch.rand(batch, generator=made) < 0.2
    away = 0.4 * torch.randn(batch, generator=made).sign()
    old, ref = (logps + torch.where(beyond, away, 0.03 * torch.randn(batch, generator=made)) for _ in range(2))
    return TokenTensors(
        logps.to(device).requires_grad_(),
        old.to(device),
        ref.to(device),
        advantages.to(device),
        ((torch.arange(length) < lengths) | (not padded)).to(device),
    )


def grpo_loss(logps: torch.Tensor, tokens: TokenTensors, *, kl: bool) -> torch.Tensor:
    """GRPO as one writes it in torch, arXiv:2402.03300 eq. 3: the mean over sequences of the mean over tokens."""
    advantages = tokens.advantages.to(logps.dtype).unsqueeze(1)
    ratio = torch.exp(logps - tokens.old_logps.to(logps.dtype))
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    if kl:
        distance = tokens.ref_logps.to(logps.dtype) - logps
        loss = loss + KL_COEF * (distance.exp() - distance - 1)
    mask = tokens.mask.to(logps.dtype)
    return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def true_logps(head: HeadTensors, rows: int = 64) -> torch.Tensor:
    """(N,) float64, a few rows at a time."""
    weight = head.weight.detach().double()
    return torch.cat(
        [
            (hidden.detach().double() @ weight.T).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
            for hidden, targets in zip(head.hidden.split(rows), head.targets.split(rows), strict=True)
        ]
    )


def true_gradients(head: HeadTensors, grad_logps: torch.Tensor, rows: int = 64) -> Outputs:
    """d sum(grad_logps logps) / d hidden and / d weight in float64: dz = grad_logps (onehot - softmax)."""
    weight = head.weight.detach().double()
    grad_hidden, grad_weight = [], torch.zeros_like(weight)
    parts = (tensor.split(rows) for tensor in (head.hidden, head.targets, grad_logps.double()))
    for hidden, targets, upstream in zip(*parts, strict=True):
        hidden = hidden.detach().double()
        dz = -(hidden @ weight.T).softmax(-1)
        dz[torch.arange(len(targets), device=targets.device), targets] += 1.0
        dz *= upstream.unsqueeze(1)
        grad_hidden.append(dz @ weight)
        grad_weight.addmm_(dz.T, hidden)
    gradients = {"grad_hidden": torch.cat(grad_hidden), "grad_weight": grad_weight}
    return {name: gradient for name, gradient in gradients.items() if name.removeprefix("grad_") in head.wants}
