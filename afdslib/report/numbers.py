"""Numbers of the report, each read from a result file: a missing file, column or row is an error, never a blank.

difference("imagenet32/quick/sweep", "test_accuracy", {"method": "afd"}, {"method": "l2"}, budget=0.1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.studies import results, statistics

__all__ = ["Number", "difference", "mean", "of_interval", "read", "rows"]


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


def rows(file: str, *columns: str, **row: Any) -> pd.DataFrame:
    """The rows of a table (see `read`), which must have some columns, that have the given values.

    Numbers match up to rounding; "" matches an empty cell. AFDSError: no such file, column or row.
    """
    table = read(file)
    for name in (*columns, *row):
        if name not in table:
            raise AFDSError(f"{file} has no column {name!r}; it has {', '.join(map(str, table.columns))}")
    for name, value in row.items():
        cells = table[name]
        if value == "":
            table = table[cells.isna()]
        elif isinstance(value, (int, float)):
            if cells.dtype.kind not in "iuf":
                raise AFDSError(f"column {name!r} of {file} holds text, so no row has {name} = {value!r}; quote it")
            table = table[(cells - value).abs() <= 1e-9 * max(1.0, abs(value))]
        else:
            table = table[cells == value]
    if table.empty:
        raise AFDSError(f"{file} has no row with {_words(row)}; run what writes it or correct the row")
    return table


def mean(file: str, column: str, *, unit: str = "", **row: Any) -> Number:
    """The mean over seeds of a column, of the rows with the given values, with Student's 95 % interval.

    AFDSError: as `rows`; a seed has several rows, or no number.
    """
    return of_interval(statistics.interval(list(_by_seed(file, column, row).values())), unit)


def difference(
    file: str, column: str, one: Mapping[str, Any], other: Mapping[str, Any], *, unit: str = "points", **row: Any
) -> Number:
    """One method minus another, paired by seed, with Student's 95 % interval.

    Args:
        one, other: values by column that tell the two apart; both share those of `row`.

    Raises:
        AFDSError: as `mean`, or if the two share no seed.
    """
    a, b = (_by_seed(file, column, {**row, **which}) for which in (one, other))
    return of_interval(statistics.paired(a, b).difference, unit, signed=True)


def _by_seed(file: str, column: str, row: Mapping[str, Any]) -> dict[int, float]:
    table = rows(file, column, "seed", **row)
    if table.seed.duplicated().any():
        raise AFDSError(f"{file} has several rows per seed with {_words(row)}; name more columns until one is left")
    table = table.assign(**{column: pd.to_numeric(table[column], errors="coerce")})
    if not table[column].map(math.isfinite).all():
        raise AFDSError(f"{file} has no number in column {column!r} with {_words(row)}; run what writes it")
    return statistics.by_seed(table, column)


def _words(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in row.items()) or "any value"
