"""Numbers of the report, each read from a result file: a missing file, column or row is an error, never a blank.

    f"AFD reaches {number('imagenet32/quick/sweep.csv', 'test_accuracy', unit='%', method='afd', seed=0, budget=0.1)}"

A number knows its file, its unit and, where there are several seeds, its 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.studies import statistics

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Number", "difference", "mean", "number", "of_interval", "path_of", "read", "rows"]

SCALES = {"%": 100.0, "points": 100.0}
"""Accuracies and MACs are stored as shares."""


@dataclass(frozen=True)
class Number:
    """A number with its origin; its text has the unit and, where it is known, the interval.

    Attributes:
        value: in the unit.
        unit: "%", "points", "steps" and so on; may be empty.
        low, high: limits of the 95 % interval; NaN where there is none.
        n: seeds, or rows, behind it.
        file: below data/results, or as it was given.
        digits: after the point.
        signed: whether a plus is shown.
    """

    value: float
    unit: str = ""
    low: float = math.nan
    high: float = math.nan
    n: int = 1
    file: str = ""
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

    def __float__(self) -> float:
        return self.value


def of_interval(found: statistics.Interval, unit: str, *, scale: float | None = None, **kwargs: Any) -> Number:
    """The number of a mean with its interval; shares are shown in percent or points."""
    scale = SCALES.get(unit, 1.0) if scale is None else scale
    return Number(scale * found.mean, unit, scale * found.low, scale * found.high, found.n, **kwargs)


def path_of(file: str | Path) -> Path:
    """A file as it is given if it is absolute, else below data/results/."""
    return Path(file) if Path(file).is_absolute() else paths.results("any").parent / file


def read(file: str | Path) -> pd.DataFrame:
    """A result file.

    Args:
        file: a CSV below data/results/, such as "imagenet32/quick/sweep.csv", or an absolute path.

    Raises:
        AFDSError: it is missing or no table.
    """
    import pandas as pd

    try:
        return pd.read_csv(path_of(file))
    except FileNotFoundError:
        raise AFDSError(
            f"the result file {file} does not exist; run the study that writes it or leave its number out"
        ) from None
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AFDSError(f"the result file {file} is no table ({reason}); write it again") from None


def rows(file: str | Path, *columns: str, **row: Any) -> pd.DataFrame:
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


def number(
    file: str | Path, column: str, *, unit: str = "", scale: float | None = None, interval: tuple[str, ...] = (),
    digits: int = 1, **row: Any,
) -> Number:  # fmt: skip
    """One cell of a result file.

    Args:
        file: see `read`.
        column: the cell's.
        unit: shown behind it.
        scale: factor on the cell; default: 100 for "%" and "points", else 1.
        interval: columns of the same row with the limits of the number's interval.
        digits: after the point.
        row: value by column; exactly one row must have them all.

    Raises:
        AFDSError: no such file, column or row, several rows, or an empty cell.
    """
    found = rows(file, column, *interval, **row)
    if len(found) > 1:
        raise AFDSError(f"{file} has {len(found)} rows with {_said(row)}; name more columns until one is left")
    scale = SCALES.get(unit, 1.0) if scale is None else scale
    value, *limits = (scale * _cell(found, name, file, row) for name in (column, *interval))
    return Number(value, unit, *(limits or (math.nan, math.nan)), 1, str(file), digits)


def mean(file: str | Path, column: str, *, over: str = "seed", unit: str = "", digits: int = 1, **row: Any) -> Number:
    """The mean of a column over seeds, with Student's 95 % interval.

    Raises:
        AFDSError: as `number`, or if a seed has several rows.
    """
    values = _by(file, column, over, row)
    return of_interval(statistics.interval(list(values.values())), unit, file=str(file), digits=digits)


def difference(
    file: str | Path, column: str, one: Mapping[str, Any], other: Mapping[str, Any], *, over: str = "seed",
    unit: str = "points", digits: int = 1, **row: Any,
) -> Number:  # fmt: skip
    """One method minus another, paired by seed, with Student's 95 % interval.

    Args:
        file: see `read`.
        column: of what is compared.
        one, other: value by column that tell the two apart.
        over: what pairs them.
        unit: of the difference.
        digits: after the point.
        row: value by column that both share.

    Raises:
        AFDSError: as `number`, or if the two share no seed.
    """
    a, b = (_by(file, column, over, {**row, **mine}) for mine in (one, other))
    return of_interval(statistics.paired(a, b).difference, unit, file=str(file), digits=digits, signed=True)


def _by(file: str | Path, column: str, over: str, row: Mapping[str, Any]) -> dict[int, float]:
    found = rows(file, column, over, **row)
    if found[over].duplicated().any():
        raise AFDSError(f"{file} has several rows per {over} with {_said(row)}; name more columns until one is left")
    return {int(key): _cell(found[found[over] == key], column, file, row) for key in found[over]}


def _cell(found: pd.DataFrame, column: str, file: str | Path, row: Mapping[str, Any]) -> float:
    try:
        value = float(found[column].iloc[0])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise AFDSError(f"{file} has no number in column {column!r} with {_said(row)}; run what writes it")
    return value


def _said(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in row.items()) or "any value"
