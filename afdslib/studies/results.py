"""The one table of a profile's results, data/results/<profile>/results.csv, and the views of it.

A row is a run or a point without one: `scale`, `part` and `role` say what it is for, then come its keys, its figures,
the run's id, and the reason where there is no network. Cells are kept as text, so that a table that is read and written
again is the same file; a view has numbers. What can be computed from rows and learning curves is no column.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from afdslib.base import paths
from afdslib.base.atomic import write_text
from afdslib.base.errors import AFDSError

__all__ = ["COLUMNS", "KEYS", "named", "path", "profiles", "read", "select", "stored", "view", "write"]

KEYS = [
    "scale", "part", "role", "target", "teacher", "network", "method", "regulariser", "selection", "attention",
    "variant", "stage", "trial", "seed", "budget", "strength",
]  # fmt: skip
"""What a row is; no two rows have all of them alike."""

COLUMNS = [
    *KEYS, "settings", "density", "test_accuracy", "test_mean_class_accuracy", "test_loss", "validation_accuracy",
    "train_accuracy", "macs", "macs_predictors", "train_macs", "met", "dense_macs", "parameters", "removed", "static",
    "dynamic", "dead_gates", "gate_variance", "steps", "steps_factor", "training_macs", "source_macs", "seconds",
    "source_seconds", "run", "reason",
]  # fmt: skip

_RESULTS = "results.csv"


def path(profile: str) -> Path:
    """The file of a profile."""
    return paths.results(profile) / _RESULTS


def profiles() -> list[str]:
    """The profiles that have committed results."""
    return sorted(file.parent.name for file in paths.results("any").parent.glob(f"*/{_RESULTS}"))


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def stored(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as the file holds them: text, floats with six digits."""
    cells = [[_cell(row.get(name)) for name in COLUMNS] for row in rows]
    return pd.DataFrame(cells, columns=COLUMNS, dtype=str)


def read(profile: str, scale: str | None = None) -> pd.DataFrame:
    """The committed table of a profile, as text; empty if there is none.

    Raises:
        AFDSError: the file is damaged.
    """
    file = path(profile)
    if not file.exists():
        return stored([])
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        why = str(error).splitlines()[0]
        raise AFDSError(f"{file} is damaged ({why}); restore it with: git checkout -- {file}") from None
    if list(table) != COLUMNS:
        raise AFDSError(f"{file} has other columns than this version of afdslib writes; restore or convert it")
    return table if scale is None else table[table.scale == scale]


def write(profile: str, table: pd.DataFrame) -> Path:
    """Adds rows to the committed table of a profile; none is ever dropped.

    A row that is there already stays as it is, unless it is of another run now (or has none), or AFDS_FRESH is set.
    """
    run = COLUMNS.index("run")
    rows = {row[: len(KEYS)]: row for row in read(profile).itertuples(index=False, name=None)}
    for row in table[COLUMNS].itertuples(index=False, name=None):
        key = row[: len(KEYS)]
        if paths.fresh() or key not in rows or (row[run] and rows[key][run] != row[run]):
            rows[key] = row
    text = pd.DataFrame(list(rows.values()), columns=COLUMNS).to_csv(index=False, lineterminator="\n")
    path(profile).parent.mkdir(parents=True, exist_ok=True)
    write_text(path(profile), text)
    return path(profile)


def select(table: pd.DataFrame, **keys: Any) -> pd.DataFrame:
    """The rows with these keys, still as text; a key may be several values, of which a row has one."""
    for name, value in keys.items():
        wanted = [value] if isinstance(value, (str, int, float)) else list(value)
        table = table[table[name].isin([_cell(one) for one in wanted])]
    return table


def view(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Some columns of stored rows, in this order, with numbers in them, as pandas reads a file."""
    return pd.read_csv(io.StringIO(table[list(columns)].to_csv(index=False)))


def named(address: str) -> pd.DataFrame:
    """A committed table by its address; empty if there is none.

    Args:
        address: "profile/scale/part", as "imagenet32/quick/sweep"; of a comparison with its target, as
            "imagenet32/quick/comparison-cifar10-60"; then, if wanted, "/trials" or "/missing" instead of the points.
    """
    profile, scale, name, *rest = address.split("/")
    part, _, target = name.partition("-")
    rows = select(read(profile, scale), part=part)
    rows = select(rows, target=target) if target else rows
    if rest == ["trials"]:
        rows = select(rows, role="trial")
    else:
        rows = rows[~rows.role.isin(["trial", "source", "curve"]) & ((rows.reason != "") == (rest == ["missing"]))]
    return view(rows, COLUMNS).rename(columns={"network": "student"} if part in ("attention", "selectivity") else {})
