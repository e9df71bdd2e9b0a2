"""Sentences that a notebook renders."""

from __future__ import annotations

__all__ = ["Text"]


class Text(str):
    """Markdown that a notebook renders."""

    def _repr_markdown_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)
