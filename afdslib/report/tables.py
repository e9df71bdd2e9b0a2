"""How the report shows rows and numbers: tables that a notebook renders, and means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from afdslib.base.errors import AFDSError
from afdslib.base.text import Text

__all__ = ["Table", "Text", "bullets", "mean_sd", "place", "plural", "smallest", "span"]

_PLACES = {
    "tiny-imagenet-32-target40": "40 classes of Tiny ImageNet (32 px)", "tiny-imagenet-32": "Tiny ImageNet (32 px)",
    "tiny-imagenet-32-source160": "the other 160 classes",
    "cifar10": "CIFAR-10 (32 px)", "digits-5-9": "digits 5 to 9", "digits-0-4": "digits 0 to 4",
    "stanford-dogs-144": "Stanford Dogs (128 px)", "stanford-dogs": "Stanford Dogs (224 px)",
    "caltech101-144": "Caltech-101 (128 px)", "imagenet": "ImageNet", "efficientnet_lite0": "EfficientNet-Lite0",
    "resnet26": "ResNet-26", "resnet50": "ResNet-50",
}  # fmt: skip
"""Data sets and networks for readers."""
_PLACE = re.compile(rf"\b({'|'.join(map(re.escape, sorted(_PLACES, key=len, reverse=True)))})(-\d+)?(?![\w-])")


def place(text: str) -> str:
    """A text in which targets have names for readers: "cifar10-60" is "CIFAR-10 (32 px), 60 per class"."""
    return _PLACE.sub(lambda m: _PLACES[m[1]] + (f", {m[2][1:]} per class" if m[2] else ""), text)


class Table:
    """Rows of text that a notebook renders as a table; with `numbers` all columns but the first are right-aligned."""

    def __init__(self, header: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = True):
        self.numbers = numbers
        self.header = [str(cell) for cell in header]
        self.rows = [[str(cell) for cell in row] for row in rows]
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError("a row has another number of cells than the header")

    def _repr_markdown_(self) -> str:
        lines = [self.header, ["---", *["--:" if self.numbers else ":--"] * (len(self.header) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        sides = ["<", *[">" if self.numbers else "<"] * (len(widths) - 1)]
        form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
        return "\n".join(form.format(*line).rstrip() for line in lines)


def mean_sd(values: pd.Series, scale: float = 1.0, digits: int = 1) -> str:
    """Mean and standard deviation (n - 1) of what is not missing, as text; "–" of nothing."""
    values = values.dropna() * scale
    if values.empty:
        return "–"
    text = f"{round(values.mean(), 6):.{digits}f}"  # without the last bits, which decide how a 5 is rounded
    return text if len(values) < 2 else f"{text} ± {values.std(ddof=1):.{digits}f}"


def plural(count: int, noun: str) -> str:
    """ "1 seed", "2 seeds"."""
    return f"{count} {noun}{'s' if count > 1 else ''}"


def span(low: Any, high: Any) -> str:
    """ "3" or "3 to 10"."""
    return f"{low} to {high}" if low < high else f"{high}"


def bullets(lines: Iterable[str], head: str = "") -> str:
    """A Markdown list below a sentence; empty without lines."""
    listed = "\n".join(f"- {line}" for line in lines)
    return f"{head}\n\n{listed}" if head and listed else listed


def smallest(table: pd.DataFrame, method: str = "afd") -> pd.Series:
    """The row of the smallest budget of a method, first seed."""
    rows = table[table.method == method].sort_values(["budget", "seed"])
    if rows.empty:
        raise AFDSError(f"the sweep has no row of method {method!r}")
    return rows.iloc[0]
