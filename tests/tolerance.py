"""The rule of trust: no worse than plain torch in the same dtype, measured against float64."""

from __future__ import annotations

import torch


def assert_exact(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    """For float64: equal to `tolerance` relative to the largest value, with no NaN in either."""
    assert got.dtype == torch.float64
    assert torch.isfinite(expected).all()
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


def assert_no_worse(
    got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, *, units: float = 4.0, name: str = ""
) -> None:
    """Elementwise |got - truth| <= |plain - truth| + a few roundings of got's dtype, the RMS error at most 1.1 times
    plain's, and no bias: the mean error within four standard errors of zero.

    `plain` is torch in the working dtype, `truth` the same rounded inputs in float64.
    """
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error, plain_error = (got.double() - truth).abs(), (plain.double() - truth).abs()
    scale = truth.abs().max().item()
    floor = units * torch.finfo(got.dtype).eps * scale
    over = error - plain_error - floor
    if (over > 0).any():
        worst = int(over.argmax())
        values = tuple(t.flatten()[worst].item() for t in (got, plain, truth))
        raise AssertionError(f"{name}: worst at {worst}: got {values[0]}, plain {values[1]}, truth {values[2]}")
    rms, plain_rms = error.square().mean().sqrt().item(), plain_error.square().mean().sqrt().item()
    small = torch.finfo(got.dtype).eps * truth.square().mean().sqrt().item()
    assert rms <= 1.1 * plain_rms + small, f"{name}: RMS error {rms} against {plain_rms}"
    signed = got.double() - truth
    noise = 4 * signed.std().item() / signed.numel() ** 0.5 if signed.numel() > 1 else 0.0
    assert abs(signed.mean().item()) <= noise + small, f"{name}: biased by {signed.mean().item()}, noise {noise}"
