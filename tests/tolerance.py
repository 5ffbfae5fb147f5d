"""The rule of trust: no worse than plain torch in the same dtype, measured against float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def assert_exact(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    """For float64: equal to `tolerance` relative to the largest value, with no NaN in either."""
    assert got.dtype == torch.float64
    assert torch.isfinite(expected).all()
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


def assert_no_worse(
    got: torch.Tensor,
    plain: torch.Tensor | Sequence[torch.Tensor],
    truth: torch.Tensor,
    *,
    units: float = 4.0,
    name: str = "",
) -> None:
    """Elementwise |got - truth| <= |plain - truth| + a few roundings of got's dtype, the RMS error at most 1.1 times
    plain's, and no bias: the mean error within four standard errors of zero.

    `plain` is torch in the working dtype, `truth` the same rounded inputs in float64. Several `plain` are equal
    computations in other orders of summation. Rounding then is noise of which they are draws: as flash-attention's rule
    has it, an element of one more draw may be at most twice the largest of theirs. The RMS has no such allowance.
    """
    plains = [plain] if isinstance(plain, torch.Tensor) else list(plain)
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error, plain_errors = (got.double() - truth).abs(), torch.stack([(p.double() - truth).abs() for p in plains])
    plain_error = plain_errors.amax(0) * (1 if len(plains) == 1 else 2)
    scale = truth.abs().max().item()
    floor = units * torch.finfo(got.dtype).eps * scale
    over = error - plain_error - floor
    if (over > 0).any():
        worst = int(over.argmax())
        values = tuple(t.flatten()[worst].item() for t in (got, *plains, truth))
        raise AssertionError(f"{name}: worst at {worst}: got {values[0]}, plain {values[1:-1]}, truth {values[-1]}")
    rms, plain_rms = error.square().mean().sqrt().item(), plain_errors.square().flatten(1).mean(1).sqrt().max().item()
    small = torch.finfo(got.dtype).eps * truth.square().mean().sqrt().item()
    assert rms <= 1.1 * plain_rms + small, f"{name}: RMS error {rms} against {plain_rms}"
    signed = got.double() - truth
    noise = 4 * signed.std().item() / signed.numel() ** 0.5 if signed.numel() > 1 else 0.0
    assert abs(signed.mean().item()) <= noise + small, f"{name}: biased by {signed.mean().item()}, noise {noise}"
