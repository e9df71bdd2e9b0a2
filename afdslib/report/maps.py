"""The picture of `afds maps`."""

from __future__ import annotations

from pathlib import Path

from afdslib.base.atomic import atomic_path
from afdslib.inference.maps import MapsView
from afdslib.report.plots import attention_maps

__all__ = ["draw"]


def draw(view: MapsView, output: str | Path) -> Path:
    """Writes the maps of one image as a PNG.

    Args:
        view: from `inference.maps.view`.
        output: the file.
    """
    output, figure = Path(output), attention_maps(view)
    with atomic_path(output) as part:
        figure.savefig(part, format="png", dpi=150)
    return output
