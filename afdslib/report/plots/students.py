"""Figures of students and teachers: accuracy by method, weights tried, learning curves, attention maps side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from afdslib.base.errors import AFDSError
from afdslib.report.plots.style import Look, note, percent, styled

if TYPE_CHECKING:
    from afdslib.inference.maps import MapsView

__all__ = ["STUDENTS", "attention_maps", "student_accuracy", "student_curves", "student_look", "weights_tried"]

_DASH, _DOT, _DASHDOT = (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5))

# Colours of the Okabe-Ito palette; AT, KD and NST look as in the comparison of regularisers.
STUDENTS = {
    "teacher": Look("teacher", "#000000", "*", "-"),
    "alone": Look("student alone", "#000000", "o", _DASH),
    "hint": Look("F-ActT", "#E69F00", "s", _DASHDOT),
    "at": Look("AT", "#CC79A7", "X", "-"),
    "gradient-at": Look("gradient AT", "#56B4E9", "^", _DOT),
    "kd": Look("KD", "#7F7F7F", "<", _DASH),
    "at-kd": Look("AT + KD, β decays", "#D55E00", "D", "-"),
    "nst": Look("NST", "#009E73", ">", _DOT),
    "nst-poly": Look("NST, polynomial", "#009E73", ">", "-"),
    "nst-linear": Look("NST, linear", "#56B4E9", "v", _DOT),
    "nst-gaussian": Look("NST, Gaussian", "#0072B2", "P", _DASHDOT),
    "nst-poly+kd": Look("NST + KD", "#D55E00", "D", "-"),
    "nst-poly, after ReLU": Look("NST, polynomial, after ReLU", "#E69F00", "s", _DASH),
}


def student_look(method: str) -> Look:
    """The look of a method.

    Raises:
        AFDSError: for a method without one.
    """
    if method not in STUDENTS:
        raise AFDSError(f"no colour and marker for method {method!r}; known are {', '.join(STUDENTS)}")
    return STUDENTS[method]


@styled
def student_accuracy(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Test accuracy of every student: a sign per seed, a bar at the median; shaded is the plain student's range.

    Args:
        table: from `DistillationStudy.table`: the rows of one student and teacher.
        title: above the panel.
    """
    students = table[table.method != "teacher"]
    methods = list(dict.fromkeys(students.method))
    fig = Figure(figsize=(6.6, 0.42 * len(methods) + 1.2), layout="constrained")
    ax = fig.subplots()
    alone = students[students.method == "alone"].test_accuracy
    if len(alone) > 1:
        ax.axvspan(alone.min(), alone.max(), color="#000000", alpha=0.08, linewidth=0)
    for row, method in enumerate(methods):
        style, values = student_look(method), students[students.method == method].test_accuracy
        ax.plot(values, [row] * len(values), linestyle="", marker=style.marker, color=style.colour, markersize=7)
        ax.plot([values.median()] * 2, [row - 0.33, row + 0.33], color=style.colour, linewidth=2.4)
    for row in table[table.method == "teacher"].itertuples():
        ax.axvline(row.test_accuracy, color="black", linewidth=1, linestyle=(0, (4, 2)))
        ax.annotate(
            f"teacher {row.student}", (row.test_accuracy, 1), xycoords=("data", "axes fraction"), xytext=(-3, 3),
            textcoords="offset points", ha="right", fontsize=8,
        )  # fmt: skip
    ax.set_yticks(range(len(methods)), [student_look(m).label for m in methods])
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.margins(x=0.06)
    percent(ax.xaxis)
    seeds = students.groupby("method").size()
    many = " to ".join(str(n) for n in dict.fromkeys((seeds.min(), seeds.max())))
    ax.set_xlabel(f"accuracy, test images (%); {many} seeds, bar: median, shaded: range of the student alone")
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig


@styled
def weights_tried(trials: pd.DataFrame, chosen: Mapping[str, float], *, xlabel: str, title: str = "") -> Figure:
    """Validation accuracy of each weight tried, one line per method; the chosen weight is ringed.

    Args:
        trials: from `DistillationStudy.trials`.
        chosen: weight by method.
        xlabel: which weight, in which scale.
        title: above the panel.
    """
    fig = Figure(figsize=(5.8, 3.2), layout="constrained")
    ax = fig.subplots()
    for index, (method, rows) in enumerate(trials.groupby("method", sort=False)):
        style, rows = student_look(str(method)), rows.sort_values("strength")
        x = rows.strength * 1.06**index  # equal grids would hide each other
        ax.plot(x, rows.validation_accuracy, color=style.colour, marker=style.marker, linestyle=style.line,
                label=style.label)  # fmt: skip
        best = np.isclose(rows.strength, chosen[str(method)])
        ax.plot(x[best], rows.validation_accuracy[best], linestyle="", marker="o", markersize=14, fillstyle="none",
                color=style.colour)  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel(xlabel)
    ax.set_ylabel("accuracy, validation images (%)")
    ax.margins(0.12)
    percent(ax.yaxis)
    ax.legend(title="ringed: chosen", alignment="left", loc="center left", bbox_to_anchor=(1.0, 0.5))
    if title:
        ax.set_title(title)
    return fig


@styled
def student_curves(
    curves: Mapping[str, pd.DataFrame], *, column: str = "validation_accuracy", target: float | None = None,
    title: str = "",
) -> Figure:  # fmt: skip
    """Accuracy over the steps, one line per method, and the accuracy that is to be reached.

    Args:
        curves: logged rows with step and the column, by method; those without it are left out.
        column: "validation_accuracy" or "train_accuracy".
        target: drawn as a line, such as 90 % of the plain student's final accuracy.
        title: above the panel.
    """
    fig = Figure(figsize=(6.6, 3.4), layout="constrained")
    ax = fig.subplots()
    drawn = {method: curve for method, curve in curves.items() if column in curve}
    if not drawn:
        note(ax, "no curve is stored yet")
        return fig
    for method, curve in drawn.items():
        style = student_look(method)
        ax.plot(curve.step, curve[column], color=style.colour, marker=style.marker, linestyle=style.line,
                label=style.label, markersize=4)  # fmt: skip
    if target is not None:
        ax.axhline(target, color="#555555", linewidth=0.9, linestyle=(0, (2, 2)))
        ax.annotate(
            "90 % of the student alone", (0.995, target), xycoords=("axes fraction", "data"), xytext=(0, -3),
            textcoords="offset points", ha="right", va="top", fontsize=8, color="#555555",
        )  # fmt: skip
    percent(ax.yaxis)
    ax.set_xlabel("optimiser step")
    ax.set_ylabel(f"accuracy, {'validation' if column.startswith('validation') else 'training'} images (%)")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    if title:
        ax.set_title(title)
    return fig


def _heat(ax: Any, image: np.ndarray, heat: np.ndarray, caption: str) -> None:
    """The image in grey under a map enlarged to its size; the map's largest value is white."""
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    ax.imshow(image.mean(2), cmap="gray", extent=extent, vmin=0, vmax=255)
    top = float(heat.max())
    ax.imshow(heat / top if top > 0 else heat, cmap="inferno", alpha=0.6, extent=extent, vmin=0, vmax=1)
    ax.set_title(caption, fontsize=8, fontweight="normal", loc="center")


@styled
def attention_maps(view: MapsView, *, title: str = "") -> Figure:
    """One image, one row per network: the activation map of each stage, then the gradient map.

    Args:
        view: from `maps.look_at`.
        title: above the panels.
    """
    columns = max(len(seen.stages) for seen in view.networks.values()) + 2
    rows = len(view.networks)
    fig = Figure(figsize=(1.55 * columns + 0.2, 1.62 * rows + 0.4), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False)
    for line, (name, seen) in zip(axes, view.networks.items(), strict=True):
        for ax in line:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            ax.set_frame_on(False)
        line[0].imshow(view.image)
        line[0].set_ylabel(name, fontsize=8.5)
        line[0].set_title(f"says {seen.prediction}", fontsize=8, fontweight="normal", loc="center")
        for ax, (stage, heat) in zip(line[1:-1], seen.stages.items(), strict=False):
            _heat(ax, view.image, heat, f"{stage}, {heat.shape[0]}x{heat.shape[1]}")
        _heat(line[-1], view.image, seen.gradient, "gradient of the loss")
    fig.suptitle(title or f"image of class {view.caption}", fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig
