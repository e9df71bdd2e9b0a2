"""Words of the report: sentences that a notebook renders, and budgets as readers know them."""

from __future__ import annotations

__all__ = ["Text", "times"]


class Text(str):
    """Markdown that a notebook renders."""

    def _repr_markdown_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)


def times(budget: float) -> str:
    """A budget as the reduction it stands for: 0.1 is "10x"."""
    return f"{1 / budget:.3g}x"
