"""`logprob` in chunks of rows: the float32 copy of the logits never exceeds a chunk."""

from __future__ import annotations

import torch

from fastrl.kernels.logprob import reference

CHUNK_BYTES = 64 << 20  # of logits in float32


def _pieces(logits: torch.Tensor) -> int:
    return max(1, -(-logits.numel() * 4 // CHUNK_BYTES))


def _split(tensor: torch.Tensor | None, pieces: int) -> tuple[torch.Tensor | None, ...]:
    return (tensor,) * pieces if tensor is None or tensor.numel() == 1 else tensor.tensor_split(pieces)


def forward(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, *, ignore_index: int, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.forward`."""
    pieces = _pieces(logits)
    chunks = [
        reference.forward(*chunk, ignore_index=ignore_index, entropy=entropy)
        for chunk in zip(
            logits.tensor_split(pieces), targets.tensor_split(pieces), _split(temperature, pieces), strict=True
        )
    ]
    logps, entropies, lse = zip(*chunks, strict=True)
    return torch.cat(logps), torch.cat(entropies), torch.cat(lse, 1)


def backward(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    *,
    ignore_index: int,
) -> torch.Tensor:
    """As `reference.backward`."""
    pieces = _pieces(logits)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    chunks = zip(
        grad.tensor_split(pieces),
        grad_logps.tensor_split(pieces),
        _split(grad_entropy, pieces),
        logits.tensor_split(pieces),
        targets.tensor_split(pieces),
        _split(temperature, pieces),
        _split(entropy, pieces),
        lse.tensor_split(pieces, 1),
        strict=True,
    )
    for out, *chunk in chunks:
        out.copy_(reference.backward(*chunk, ignore_index=ignore_index))
    return grad
