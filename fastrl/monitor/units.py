"""Numbers and durations as people read them."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """About three significant digits, however large or small; `nan` and `inf` stay visible, None is a dash."""
    if value is None:
        return "-"
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1e7:
        return f"{value:.2e}"
    if size >= 1000 or (size >= 10 and value == round(value)):
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    if size >= 10:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.001 or size == 0 else f"{value:.1e}"


def fixed(value: float, places: int = 2, sign: str = "") -> str:
    """A number with `places` decimals, for comparison with others; in scientific notation if it is large.

    Args:
        sign: + writes the sign of positive numbers too.
    """
    return f"{value:{sign}.2e}" if abs(value) >= 1e6 else f"{value:{sign}.{places}f}"


def duration(seconds: float) -> str:
    """4.3 s, 3 min 48 s, 1 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float) -> str:
    """0:48, 3:48, 1:02:07."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
