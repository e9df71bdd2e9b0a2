"""Curves over training steps, and the trials that chose a strength or a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from afdslib.report.plots.style import Look, canvas, drawn_as, handles, labelled, level, looks_of, note, percent, styled

PANELS = {
    "cross_entropy": "cross-entropy, training images (nats)",
    "train_accuracy": "accuracy, training images (%)",
    "validation_accuracy": "accuracy, validation images (%)",
}


def _bands(
    ax: Axes, histories: Mapping[str, Sequence[pd.DataFrame]], column: str, looks: Sequence[Look], scale: float = 1.0
) -> bool:
    """A line per name: the mean over seeds, with a band of one standard deviation. Returns whether there was any."""
    frames = [
        pd.DataFrame({"step": frame.step, "value": scale * frame[column], "label": one.label})
        for one, many in zip(looks, histories.values(), strict=True)
        for frame in many
        if column in frame
    ]
    if not frames:
        return False
    errorbar = "sd" if max(map(len, histories.values())) > 1 else None
    kwargs = drawn_as(looks) | {"markersize": 4, "err_kws": {"alpha": 0.15, "linewidth": 0}}
    sns.lineplot(pd.concat(frames), x="step", y="value", errorbar=errorbar, ax=ax, **kwargs)
    ax.set(xlabel="optimiser step", ylabel=PANELS.get(column, column))
    if column.endswith("accuracy"):
        percent(ax.yaxis)
    return True


@styled
def learning_curves(histories: Mapping[str, Sequence[pd.DataFrame]], *, title: str = "") -> Figure:
    """Loss and accuracy over the steps, one line per method or stage, bands of one standard deviation over seeds.

    The second panel shows validation images where they were evaluated during training, else training images.
    """
    validated = any("validation_accuracy" in frame for many in histories.values() for frame in many)
    second = "validation_accuracy" if validated else "train_accuracy"
    looks = looks_of(histories)
    fig, (panels,) = canvas(8.4, 3.3, 1, 2, what="Loss and accuracy during training", title=title)
    for ax, column in zip(panels, ("cross_entropy", second), strict=True):
        if not _bands(ax, histories, column, looks):
            note(ax, "no curve was stored")
            continue
        if column == "cross_entropy":
            ax.set_ylim(bottom=0)
        if len(histories) > 1:
            ax.legend(handles=handles(looks, markersize=4))
    return fig


@styled
def attention_entropy(
    histories: Mapping[str, Sequence[pd.DataFrame]], shapes: Mapping[str, tuple], *, title: str = ""
) -> Figure:
    """Entropy of the attention over the steps, by variant ("joint", "detached"), as a share of the uniform one's.

    The shapes are the (C, H, W) of the tapped layers.
    """
    uniform = float(np.mean([math.log(shape[0]) for shape in shapes.values()]))
    looks = [Look("joint", "#D55E00", "D"), Look("detached", "#0072B2", "o", (5, 1.5))][: len(histories)]
    fig, ((ax,),) = canvas(5.2, 3.1, what="Entropy of the attention", title=title)
    _bands(ax, histories, "entropy", looks, 100 / uniform)
    level(ax, 100, "uniform", below=True)
    # At least five percent are shown, so that an attention that stays uniform looks uniform.
    depth = max(5.0, 1.15 * (100 - ax.get_ylim()[0]))
    ax.set_ylim(max(0.0, 100 - depth), 100 + 0.08 * depth)
    ax.set_ylabel("entropy of ρ (% of uniform)")
    if len(histories) > 1:
        ax.legend(handles=handles(looks))
    return fig


@styled
def student_curves(
    curves: Mapping[str, pd.DataFrame], *, column: str = "validation_accuracy", target: float | None = None,
    title: str = ""
) -> Figure:  # fmt: skip
    """Accuracy over the steps by method, where it was logged; the target, 90 % of the student alone, is a line."""
    fig, ((ax,),) = canvas(6.6, 3.4, what="Accuracy during training", title=title)
    shown = {method: [curve] for method, curve in curves.items() if column in curve}
    looks = looks_of(shown)
    if not _bands(ax, shown, column, looks):
        note(ax, "no curve is stored yet")
        return fig
    if target is not None:
        level(ax, target, "90 % of the student alone", below=True)
    ax.legend(handles=handles(looks, markersize=4), loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


@styled
def trials(
    table: pd.DataFrame, chosen: Mapping[str, float], *, xlabel: str = "strength of the regulariser (log scale)",
    title: str = ""
) -> Figure:  # fmt: skip
    """Validation accuracy of every strength or weight tried, one line per method; the chosen one is ringed."""
    table, looks = labelled(table)
    shifts = {method: 1.08**index for index, method in enumerate(dict.fromkeys(table.method))}
    # Methods with the same grid and the same accuracy would hide each other.
    table = table.assign(x=table.strength * table.method.map(shifts))
    fig, ((ax,),) = canvas(5.8, 3.3, what="Accuracy by strength", title=title)
    sns.lineplot(table, x="x", y="validation_accuracy", ax=ax, **drawn_as(looks))
    best = table[np.isclose(table.strength, table.method.map(chosen))]
    colours = best.label.map({one.label: one.colour for one in looks})
    ax.scatter(best.x, best.validation_accuracy, s=170, facecolors="none", edgecolors=colours, linewidths=1.6)
    ax.set_xscale("log")
    ax.set(xlabel=xlabel, ylabel=PANELS["validation_accuracy"])
    ax.margins(0.12)
    percent(ax.yaxis)
    words = "ringed: chosen" + (";\nshifted to be seen" if len(looks) > 1 else "")
    ax.legend(handles=handles(looks), title=words, loc="center left", bbox_to_anchor=(1.0, 0.5), alignment="left")
    return fig
