"""Numbers that a caller gives, each refused by one sentence: "lr must be a number above 0, got -1"."""

from __future__ import annotations

from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

from afdslib.base.errors import AFDSError

__all__ = ["choice", "number", "whole"]


def number(
    name: str, value: Any, *, least: float = -inf, above: float = -inf, most: float = inf, below: float = inf
) -> None:
    """A finite number, at least, above, at most or below a limit; else an AFDSError."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if real and isfinite(value) and least <= value <= most and above < value < below:
        return
    low, high = max(least, above), min(most, below)
    start, end = "[" if low == least else "(", "]" if high == most else ")"
    limit = f" {'above' if low == above else 'of at least'} {low:g}" if isfinite(low) else ""
    if isfinite(high):
        limit = f" in {start}{low:g}, {high:g}{end}"
    raise AFDSError(f"{name} must be a number{limit}, got {value!r}")


def whole(name: str, value: Any, least: int) -> None:
    """A whole number of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise AFDSError(f"{name} must be a whole number of at least {least}, got {value!r}")


def choice(name: str, value: Any, known: Any) -> None:
    """One of the known values."""
    if value not in known:
        raise AFDSError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
