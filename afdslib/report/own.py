"""Tables and sentences about the network for one's own images; see `studies.mine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afdslib.base.text import Text, times
from afdslib.report.tables import Table
from afdslib.studies.mine import Recipe

__all__ = ["files_table", "learns", "mistakes_table", "points_table", "ways_text"]


def points_table(found: Mapping[str, Any]) -> Table:
    """What each budget gives: `found` is of `mine.deliver`."""
    rows = [
        [
            times(p["budget"]), f"{p['macs']:.1f}", f"{p['side']}", f"{p['milliseconds']:.1f}",
            f"{100 * p['validation_accuracy']:.1f}", f"{100 * p['test_accuracy']:.1f}",
        ]
        for p in found["points"]
    ]  # fmt: skip
    header = ["reduction", "MACs (M)", "image (px)", "ms per image", "validation (%)", "test (%)"]
    return Table(header, rows)


def files_table(found: Mapping[str, Any]) -> Table:
    """The network's files."""
    rows = [
        [
            f["file"], f["precision"], f"{len(f['fp32'])}" if f["precision"] == "int8" else "all",
            f"{100 * f['accuracy']:.1f}", f"{f['milliseconds']:.1f}", f"{f['bytes'] / 1e6:.1f}",
        ]
        for f in found["files"]
    ]  # fmt: skip
    return Table(["file", "numbers", "layers in fp32", "test (%)", "ms per image", "MB"], rows)


def mistakes_table(found: Mapping[str, Any]) -> Table:
    """The surest mistakes, by file: some of them may be mistakes of a label."""
    rows = [[m["file"], m["true"], m["said"], f"{m['probability']:.0%}"] for m in found["mistakes"]]
    return Table(["image", "label", "network", "probability"], rows)


def ways_text(recipe: Recipe) -> Text:
    """How the ways down to the budget compared, on validation images."""
    accuracies = recipe.accuracies
    if not accuracies:
        return Text("Nothing was to be removed.")
    known = "; ".join(f"{side} px: {'diverged' if a is None else f'{a:.1%}'}" for side, a in accuracies.items())
    return Text(f"Right on validation images, at equal MACs, by the image's side: {known}. Taken: {recipe.side} px.")


def learns(recipe: Recipe, found: Mapping[str, Any]) -> bool:
    """Whether the unpruned network is a fifth of the way from guessing to perfect, on test images."""
    chance = 1 / len(recipe.splits.classes)
    return found["points"][0]["test_accuracy"] >= chance + 0.2 * (1 - chance)
