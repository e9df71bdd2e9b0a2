"""Numbers of the report, each read from a result file: a missing file, column or row is an error, never a blank.

difference("imagenet32/quick/sweep", "test_accuracy", {"method": "afd"}, {"method": "l2"}, budget=0.1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.studies import results, statistics

__all__ = ["Number", "difference", "exists", "mean", "of_interval", "read", "rows"]

SCALES = {"%": 100.0, "points": 100.0}
"""Accuracies and MACs are stored as shares."""


@dataclass(frozen=True)
class Number:
    """A number whose text has the unit and, where it is known, the 95 % interval.

    Attributes:
        value: in the unit.
        unit: "%", "points", "steps" and so on; may be empty.
        low, high: limits of the interval; NaN where there is none.
        n: seeds behind it.
        digits: after the point.
        signed: whether a plus is shown.
    """

    value: float
    unit: str = ""
    low: float = math.nan
    high: float = math.nan
    n: int = 1
    digits: int = 1
    signed: bool = False

    def __str__(self) -> str:
        text = self._show(self.value)
        if not math.isnan(self.low):
            text += f" [{self._show(self.low)}, {self._show(self.high)}]"
        return f"{text} {self.unit}".strip()

    def _show(self, value: float) -> str:
        value = round(value, self.digits) + 0.0  # never -0.0
        return f"{value:{'+' if self.signed else ''}.{self.digits}f}"


def of_interval(found: statistics.Interval, unit: str, *, scale: float | None = None, **kwargs: Any) -> Number:
    """The number of a mean with its interval; shares are shown in percent or points."""
    scale = SCALES.get(unit, 1.0) if scale is None else scale
    return Number(scale * found.mean, unit, scale * found.low, scale * found.high, found.n, **kwargs)


def exists(file: str) -> bool:
    """Whether there is such a table; see `read`."""
    return _path(file).is_file() if file.endswith(".csv") else not results.named(file).empty


def _path(file: str) -> Path:
    return paths.results("any").parent / file


def read(file: str) -> pd.DataFrame:
    """A table of results.

    Args:
        file: the address of a committed table, such as "imagenet32/quick/sweep" (see `results.named`), or a CSV below
            data/results/.

    Raises:
        AFDSError: it is missing or no table.
    """
    try:
        if not file.endswith(".csv"):
            if (table := results.named(file)).empty:
                raise FileNotFoundError
            return table
        return pd.read_csv(_path(file))
    except FileNotFoundError:
        raise AFDSError(
            f"the result file {file} does not exist; run the study that writes it or leave its number out"
        ) from None
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AFDSError(f"the result file {file} is no table ({reason}); write it again") from None


def rows(file: str, *columns: str, **row: Any) -> pd.DataFrame:
    """The rows of a result file that have the given values.

    Args:
        file: see `read`.
        columns: that must exist.
        row: value by column; numbers match up to rounding, "" matches an empty cell.

    Raises:
        AFDSError: no such file, column or row.
    """
    table = read(file)
    for name in (*columns, *row):
        if name not in table:
            raise AFDSError(f"{file} has no column {name!r}; it has {', '.join(map(str, table.columns))}")
    for name, value in row.items():
        cells = table[name]
        if value == "":
            table = table[cells.isna()]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if cells.dtype.kind not in "iuf":
                raise AFDSError(f"column {name!r} of {file} holds text, so no row has {name} = {value!r}; quote it")
            table = table[(cells - value).abs() <= 1e-9 * max(1.0, abs(value))]
        else:
            table = table[cells == value]
    if table.empty:
        raise AFDSError(f"{file} has no row with {_said(row)}; run what writes it or correct the row")
    return table


def mean(file: str, column: str, *, unit: str = "", **row: Any) -> Number:
    """The mean over seeds of a column, of the rows with the given values, with Student's 95 % interval.

    Raises:
        AFDSError: as `rows`; a seed has several rows, or no number.
    """
    values = _by_seed(file, column, row)
    return of_interval(statistics.interval(list(values.values())), unit)


def difference(
    file: str, column: str, one: Mapping[str, Any], other: Mapping[str, Any], *, unit: str = "points", **row: Any
) -> Number:
    """One method minus another, paired by seed, with Student's 95 % interval.

    Args:
        file: see `read`.
        column: of what is compared.
        one, other: value by column that tell the two apart.
        unit: of the difference.
        row: value by column that both share.

    Raises:
        AFDSError: as `mean`, or if the two share no seed.
    """
    a, b = (_by_seed(file, column, {**row, **which}) for which in (one, other))
    return of_interval(statistics.paired(a, b).difference, unit, signed=True)


def _by_seed(file: str, column: str, row: Mapping[str, Any]) -> dict[int, float]:
    table = rows(file, column, "seed", **row)
    if table.seed.duplicated().any():
        raise AFDSError(f"{file} has several rows per seed with {_said(row)}; name more columns until one is left")
    values = pd.to_numeric(table[column], errors="coerce")
    if not values.map(math.isfinite).all():
        raise AFDSError(f"{file} has no number in column {column!r} with {_said(row)}; run what writes it")
    return {int(seed): float(value) for seed, value in zip(table.seed, values, strict=True)}


def _said(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in row.items()) or "any value"
