"""Curves over training steps, and the trials that chose a strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from afdslib.report.plots.style import METHODS, Look, look, note, percent, styled

__all__ = ["band", "learning_curves", "trials"]

PANELS = {
    "cross_entropy": "cross-entropy, training images (nats)",
    "train_accuracy": "accuracy, training images (%)",
    "validation_accuracy": "accuracy, validation images (%)",
}
# For curves that are no methods, such as the source network's stages.
_OTHERS = (Look("", "#0072B2", "o"), Look("", "#D55E00", "D", (0, (5, 1.5))), Look("", "#009E73", "^", (0, (1, 1))))


def band(ax: Axes, histories: Sequence[pd.DataFrame], column: str, style: Look, label: str, scale: float = 1.0) -> bool:
    """Mean over seeds with a band of one standard deviation. Returns whether anything could be drawn."""
    series = [h.set_index("step")[column].dropna() * scale for h in histories if column in h]
    if not series:
        return False
    table = pd.concat(series, axis=1).dropna()
    steps, mean = table.index.to_numpy(), table.mean(axis=1).to_numpy()
    ax.plot(steps, mean, color=style.colour, marker=style.marker, linestyle=style.line, label=label, markersize=4)
    if len(series) > 1:
        sd = table.std(axis=1, ddof=1).to_numpy()
        ax.fill_between(steps, mean - sd, mean + sd, color=style.colour, alpha=0.15, linewidth=0)
    return True


@styled
def learning_curves(histories: Mapping[str, Sequence[pd.DataFrame]], *, title: str = "") -> Figure:
    """Loss and accuracy over the steps, one line per method or stage, bands of one standard deviation over seeds.

    Args:
        histories: logged rows of each seed (`Result.history()`), by method or by any label.
        title: above the panels.

    The second panel shows validation images where they were evaluated during training, else training images.
    """
    frames = [frame for many in histories.values() for frame in many]
    validated = any("validation_accuracy" in frame for frame in frames)
    second = "validation_accuracy" if validated else "train_accuracy"
    fig = Figure(figsize=(8.4, 3.3), layout="constrained")
    for ax, column in zip(fig.subplots(1, 2), ("cross_entropy", second), strict=True):
        drawn = False
        for index, (name, many) in enumerate(histories.items()):
            style = look(name) if name in METHODS else _OTHERS[index % len(_OTHERS)]
            drawn |= band(ax, many, column, style, style.label or name)
        if not drawn:
            note(ax, "no curve was stored")
            continue
        ax.set_xlabel("optimiser step")
        ax.set_ylabel(PANELS[column])
        if column == "cross_entropy":
            ax.set_ylim(bottom=0)
        else:
            percent(ax.yaxis)
        if len(histories) > 1:
            ax.legend()
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold")
    return fig


@styled
def trials(table: pd.DataFrame, chosen: Mapping[str, float], *, title: str = "") -> Figure:
    """Validation accuracy of every strength tried; the chosen one is ringed.

    Args:
        table: columns method, strength, validation_accuracy.
        chosen: strength by method.
        title: above the panel.
    """
    fig = Figure(figsize=(5.6, 3.3), layout="constrained")
    ax = fig.subplots()
    for index, (method, rows) in enumerate(table.groupby("method", sort=False)):
        style, rows = look(str(method)), rows.sort_values("strength")
        shift = 1.08**index  # methods with the same grid and the same accuracy would hide each other
        ax.plot(
            rows.strength * shift, rows.validation_accuracy, color=style.colour, marker=style.marker,
            linestyle=style.line, label=style.label,
        )  # fmt: skip
        best = rows[np.isclose(rows.strength, chosen[str(method)])]
        ax.plot(
            best.strength * shift, best.validation_accuracy, linestyle="", marker="o", markersize=13, fillstyle="none",
            color=style.colour,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel("strength of the regulariser (log scale)")
    ax.set_ylabel("accuracy, validation images (%)")
    ax.margins(0.12)
    percent(ax.yaxis)
    ax.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), title="ringed: chosen;\nshifted to be seen", alignment="left"
    )
    if title:
        ax.set_title(title)
    return fig
