"""Figures of the pruning sweep: accuracy and parameters against MACs, and the confusion matrix of one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from afdslib.base.text import times
from afdslib.report.plots.style import Look, look, percent, styled

__all__ = ["accuracy_macs", "confusion", "density_and_masks", "parameters_budget"]

QUANTITIES = {
    "test_accuracy": "accuracy, test images (%)",
    "test_mean_class_accuracy": "mean class accuracy, test images (%)",
    "validation_accuracy": "accuracy, validation images (%)",
    "parameters": "parameters (thousands)",
}


def macs_axis(ax: Axes, budgets: Sequence[float]) -> None:
    """Share of the dense MACs on a log scale, with the reductions 1x, 2x, ... along the top."""
    ax.set_xscale("log")
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("MACs, share of the dense network (%, log scale)")
    top = ax.secondary_xaxis("top")
    top.set_xscale("log")
    first = [b for b in (1.0, 0.5, 0.2, 0.1, 0.05) if any(abs(b - other) < 1e-9 for other in budgets)]
    apart: list[float] = []
    for budget in [*first, *sorted(budgets, reverse=True)]:  # labels that would touch are left out
        if all(max(budget, other) / min(budget, other) > 1.27 for other in apart):
            apart.append(budget)
    top.xaxis.set_major_locator(FixedLocator(apart))
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: times(value)))
    top.xaxis.set_minor_locator(NullLocator())
    top.tick_params(length=2, labelsize=8, pad=1)


def _by_budget(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    found = rows.groupby("budget").agg(x=("macs", "mean"), y=(value, "mean"), sd=(value, "std"), n=(value, "size"))
    return found.sort_index()


def draw_line(
    ax: Axes, rows: pd.DataFrame, value: str, style: Look, *, scale: float = 1.0, shift: float = 1.0,
    errors: bool = True, **kwargs: Any,
) -> None:  # fmt: skip
    """One method's line: the mean over seeds at each budget, with bars of one standard deviation."""
    found = _by_budget(rows, value)
    ax.errorbar(
        found.x * shift, found.y * scale, yerr=found.sd.fillna(0) * scale if errors else None, color=style.colour,
        marker=style.marker, linestyle=style.line, label=style.label, elinewidth=1.0, **kwargs,
    )  # fmt: skip


def shifts(lines: int) -> list[float]:
    """A factor per line by which it is moved sideways, a little, so that error bars of equal budgets stay apart."""
    return [1.012 ** (index - (lines - 1) / 2) for index in range(lines)]


def _lines(ax: Axes, table: pd.DataFrame, value: str, scale: float = 1.0) -> None:
    methods = list(dict.fromkeys(table.method))
    for method, shift in zip(methods, shifts(len(methods)), strict=True):
        draw_line(ax, table[table.method == method], value, look(method), scale=scale, shift=shift)


def seeds_text(table: pd.DataFrame) -> str:
    """What the error bars stand for."""
    seeds = table.groupby(["target", "method", "budget"]).size().unique()
    if len(seeds) == 1 and seeds[0] == 1:
        return "one seed, no error bars"
    many = " to ".join(str(n) for n in dict.fromkeys((min(seeds), max(seeds))))
    return f"mean and standard deviation over {many} seeds"


@styled
def accuracy_macs(
    table: pd.DataFrame,
    *,
    values: Sequence[str] = ("test_accuracy", "test_mean_class_accuracy"),
    chance: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Accuracy against measured MACs, one line per method, error bars of one standard deviation over seeds.

    Args:
        table: from `Study.sweep`: target, method, seed, budget, macs and the columns of `values`.
        values: one panel each.
        chance: accuracy of guessing by target, drawn as a line.
        title: above the panels.

    Each target has a row of panels, with its title above the first.
    """
    targets = list(dict.fromkeys(table.target))
    fig = Figure(figsize=(4.7 * len(values) + 0.4, 3.7 * len(targets) + 0.5), layout="constrained")
    axes = fig.subplots(len(targets), len(values), squeeze=False)
    for row, target in enumerate(targets):
        mine = table[table.target == target]
        for ax, value in zip(axes[row], values, strict=True):
            _lines(ax, mine, value)
            if chance:
                ax.axhline(chance[target], color="#555555", linewidth=0.9, linestyle=(0, (2, 2)))
                ax.annotate(
                    "chance", (0.995, chance[target]), xycoords=("axes fraction", "data"), xytext=(0, 2),
                    textcoords="offset points", ha="right", fontsize=8, color="#555555",
                )  # fmt: skip
            percent(ax.yaxis)
            ax.set_ylabel(QUANTITIES[value])
            macs_axis(ax, mine.budget.unique())
        axes[row][0].set_title(target)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), title=seeds_text(table), title_fontsize=8.5
    )
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig


@styled
def parameters_budget(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Parameters that remain on one target against measured MACs, one line per method, error bars over seeds."""
    fig = Figure(figsize=(5.4, 3.5), layout="constrained")
    ax = fig.subplots()
    _lines(ax, table, "parameters", 1e-3)
    ax.set_ylabel(QUANTITIES["parameters"])
    ax.set_ylim(bottom=0)
    macs_axis(ax, table.budget.unique())
    ax.legend(title=seeds_text(table), title_fontsize=8, alignment="left")
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig


@styled
def density_and_masks(table: pd.DataFrame, *, title: str = "") -> Figure:
    """How each budget is met: the density d that is set, and the share of channels that the masks leave.

    Args:
        table: from `Study.sweep`, one target: method, budget, macs, density, removed, static, dynamic.
        title: above the panel.
    """
    table = table.assign(living=(table.static + table.dynamic) / (table.removed + table.static + table.dynamic))
    fig = Figure(figsize=(5.8, 3.5), layout="constrained")
    ax = fig.subplots()
    density = table.groupby("budget").agg(x=("macs", "mean"), y=("density", "mean")).sort_index()
    ax.plot(density.x, density.y, color="#555555", linestyle=(0, (2, 2)), marker="|", label="density d, set")
    _lines(ax, table, "living")
    ax.set_ylim(0, 1.05)
    percent(ax.yaxis)
    ax.set_ylabel("share of channels (%)")
    macs_axis(ax, table.budget.unique())
    handles, labels = ax.get_legend_handles_labels()
    labels = [label if label.startswith("density") else f"left by the masks: {label}" for label in labels]
    ax.legend(handles, labels, loc="lower right")
    if title:
        ax.set_title(title)
    return fig


@styled
def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], *, title: str = "") -> Figure:
    """Confusion matrix: share of each true class (row) that is taken for each class (column), in percent."""
    counts = np.asarray(matrix, dtype=float)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(classes) <= 20
    side = 1.9 + (0.44 * len(classes) if few else 4.4)
    fig = Figure(figsize=(side + 0.8, side), layout="constrained")
    ax = fig.subplots()
    image = ax.imshow(share, vmin=0, vmax=1)
    ax.grid(False)
    if few:
        ax.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
        ax.set_yticks(range(len(classes)), classes)
        for (row, column), value in np.ndenumerate(share):
            colour = "white" if value < 0.55 else "black"
            ax.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    bar = fig.colorbar(image, ax=ax, shrink=0.85, pad=0.03)
    bar.set_label("share of the true class (%)")
    percent(bar.ax.yaxis)
    if title:
        ax.set_title(title)
    return fig
