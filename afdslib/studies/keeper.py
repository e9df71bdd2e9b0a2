"""Where a study's tables go, and which of its results are kept to be committed."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, Protocol, TypeVar

import pandas as pd

from afdslib import runs
from afdslib.base import paths
from afdslib.base.atomic import atomic_path

__all__ = ["Keeper"]


class Kept(Protocol):
    """A profile, as far as it says what is kept."""

    @property
    def name(self) -> str: ...
    @property
    def scale(self) -> str: ...
    @property
    def committed(self) -> bool: ...


P = TypeVar("P", bound=Kept)


class Keeper(Generic[P]):
    """Of a study: results of real ones are kept as small files to be committed; those of the demo never are."""

    profile: P

    def folder(self) -> Path:
        """Where the tables go: data/results/<profile>/<scale> for real studies, the figures' folder for the demo."""
        p = self.profile
        return paths.results(p.name) / p.scale if p.committed else paths.figures(p.name)

    def _write(self, name: str, table: pd.DataFrame) -> None:
        if self.profile.committed:  # only `afds publish` writes what is committed
            return
        with atomic_path(self.folder() / f"{name}.csv") as part:
            table.to_csv(part, index=False, float_format="%.6g", lineterminator="\n")

    def _publish(self, result: runs.Result) -> runs.Result:
        return result
