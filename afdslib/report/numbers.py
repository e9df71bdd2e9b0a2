"""Numbers of the report with their intervals, and the result files that they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.studies import results, statistics

__all__ = ["Number", "minus", "of_interval", "read"]


@dataclass(frozen=True)
class Number:
    """A number in a unit, with its 95 % interval where it has one, and how it is shown."""

    value: float
    unit: str = ""  # "%", "points", "steps" and so on
    low: float = math.nan
    high: float = math.nan
    n: int = 1  # seeds behind it
    digits: int = 1  # after the point
    signed: bool = False  # whether a plus is shown

    def __str__(self) -> str:
        text = self._show(self.value)
        if not math.isnan(self.low):
            text += f" [{self._show(self.low)}, {self._show(self.high)}]"
        return f"{text} {self.unit}".strip()

    def _show(self, value: float) -> str:
        value = round(value, self.digits) + 0.0  # never -0.0
        return f"{value:{'+' if self.signed else ''}.{self.digits}f}"


def of_interval(interval: statistics.Interval, unit: str, *, scale: float | None = None, **kwargs: Any) -> Number:
    """The number of a mean with its interval; shares are shown in percent or points."""
    scale = (100 if unit in ("%", "points") else 1) if scale is None else scale
    return Number(scale * interval.mean, unit, scale * interval.low, scale * interval.high, interval.n, **kwargs)


def read(file: str) -> pd.DataFrame:
    """A committed table by its address (see `results.named`), or a CSV below data/results/; or AFDSError."""
    try:
        table = pd.read_csv(paths.results(file)) if file.endswith(".csv") else results.named(file)
        if file.endswith(".csv") or len(table):
            return table
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AFDSError(f"the result file {file} is no table ({reason}); write it again") from None
    raise AFDSError(f"the result file {file} does not exist; run the study that writes it or leave its number out")


def minus(one: pd.DataFrame, other: pd.DataFrame, value: str = "test_accuracy") -> Number | None:
    """The rows of one method minus those of another, paired by seed, in points; None where they share no seed."""
    a, b = (statistics.by_seed(rows, value) for rows in (one, other))
    return of_interval(statistics.paired(a, b).difference, "points", signed=True) if set(a) & set(b) else None
