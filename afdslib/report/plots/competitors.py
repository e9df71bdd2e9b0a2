"""Figures of the comparison: every competitor on the same curve, paired differences, and all trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from afdslib.report.plots.style import Look, look, percent, styled
from afdslib.report.plots.sweep import QUANTITIES, draw_line, macs_axis, seeds_text, shifts
from afdslib.studies.protocol import RECALLED, Method, label_of

__all__ = ["competitor_trials", "competitors", "paired"]

AFDS = "afd+afs"
NARROWER = "narrower networks"
ROLES = {"competitor": ("competitor", "#000000", "o"), "part": ("AFD or AFS alone", "#7F7F7F", "s")}


def _panel(selection: str) -> str:
    return NARROWER if selection.startswith("width") else label_of(selection)


def _look(regulariser: str, selection: str) -> Look:
    """Of a line in its panel: by its regulariser, dotted where attention is detached; narrower ones by theirs, too."""
    name = Method(regulariser, selection).base
    if selection.startswith("width"):
        base = look(selection)
        if regulariser == "l2":
            return base
        return replace(base, label=f"{base.label}, {label_of(regulariser)}", colour=look(name).colour)
    base = look(name)
    return base if name == regulariser else replace(base, label=label_of(regulariser), line=":")


@styled
def competitors(table: pd.DataFrame, *, chance: float | None = None, title: str = "") -> Figure:
    """Test accuracy against measured MACs: a panel per selection, a line per regulariser, AFDS pale in every other.

    Args:
        table: of `Comparison.sweep`, one target: method, regulariser, selection, seed, budget, macs, test_accuracy.
        chance: accuracy of guessing, drawn as a line.
        title: above the panels.
    """
    panels = list(dict.fromkeys(map(_panel, table.selection)))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    fig = Figure(figsize=(4.6 * columns + 0.4, 3.2 * rows + 0.8), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharey=True)
    ours = table[table.method == AFDS]
    for ax, panel in zip(axes.flat, panels, strict=False):
        here = table[[_panel(s) == panel for s in table.selection]]
        if AFDS not in set(here.method):
            draw_line(ax, ours, "test_accuracy", Look("AFDS", "#EBA985", "", "-"), errors=False, linewidth=4, zorder=1)
        pairs = list(dict.fromkeys(zip(here.regulariser, here.selection, strict=True)))
        for (regulariser, selection), shift in zip(pairs, shifts(len(pairs)), strict=True):
            mine = here[(here.regulariser == regulariser) & (here.selection == selection)]
            draw_line(ax, mine, "test_accuracy", _look(regulariser, selection), shift=shift)
        if chance is not None:
            ax.axhline(chance, color="#555555", linewidth=0.9, linestyle=(0, (2, 2)))
        macs_axis(ax, table.budget.unique())
        percent(ax.yaxis)
        ax.set_title(panel)
    limits = [ax.get_xlim() for ax in axes.flat[: len(panels)]]
    for ax in axes.flat[: len(panels)]:
        ax.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
    for ax in axes[:, 0]:
        ax.set_ylabel(QUANTITIES["test_accuracy"])
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    legend = dict(
        pair for ax in axes.flat for pair in zip(*reversed(ax.get_legend_handles_labels()), strict=True)
    )  # each label once
    fig.legend(
        list(legend.values()), list(legend), loc="outside lower center", ncols=min(4, len(legend)),
        title=seeds_text(table) + ("; dashed grey: chance" if chance is not None else ""), title_fontsize=8.5,
    )  # fmt: skip
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig


@styled
def paired(table: pd.DataFrame, *, title: str = "") -> Figure:
    """AFDS minus each other method, seed by seed, with Student's 95 % interval: right of 0, AFDS is the better one.

    Args:
        table: of `statistics.paired_table`: method, role, seeds, difference, low, high, in points.
        title: above the panel.
    """
    fig = Figure(figsize=(6.4, 0.95 + 0.28 * max(2, len(table))), layout="constrained")
    ax = fig.subplots()
    ax.axvline(0, color="#555555", linewidth=0.9)
    for role, (label, colour, marker) in ROLES.items():
        mine = table[table.role == role]
        if mine.empty:
            continue
        half = [(mine.difference - mine.low).fillna(0), (mine.high - mine.difference).fillna(0)]
        ax.errorbar(mine.difference, mine.index, xerr=half, color=colour, marker=marker, linestyle="", label=label)
    labels = [f"{Method.parse(r.method).label} ({r.seeds})" for r in table.itertuples()]
    ax.set_yticks(range(len(table)), labels)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlabel("AFDS minus the method, points of test accuracy\n(95 % interval; in brackets: paired seeds)")
    if table.role.nunique() > 1:
        fig.legend(loc="outside lower center", ncols=2)
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig


STAGES = {
    "regulariser": "regularisers, on the dense network",
    "selection": "selections, with L2 at its best",
    RECALLED: "AFS with the recalled schedule, which was replaced",
    "strength": "pairs: strength at the endpoint's budget",
}


def _name(stage: str, name: str) -> str:
    return Method.parse(name).label if stage == "strength" else label_of(name)


def _strip(ax: Axes, table: pd.DataFrame, *, chosen: bool) -> None:
    names = list(dict.fromkeys(table.name_))
    for row, name in enumerate(names):
        mine = table[table.name_ == name].dropna(subset="validation_accuracy")
        ax.plot(
            mine.validation_accuracy, [row] * len(mine), linestyle="", marker="o", markersize=4,
            markerfacecolor="white", color="#0072B2",
        )  # fmt: skip
        if chosen and len(mine):
            ax.plot(mine.validation_accuracy.max(), row, linestyle="", marker="D", color="#D55E00", markersize=4.5)
        lost = len(table[table.name_ == name]) - len(mine)
        if lost:
            ax.annotate(
                f"{lost} without a value", (1, row), xycoords=("axes fraction", "data"), xytext=(-3, 0),
                textcoords="offset points", ha="right", va="center", fontsize=7.5, color="#555555",
            )  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    percent(ax.xaxis)


@styled
def competitor_trials(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Every trial's validation accuracy, one row per method and stage; the chosen one is filled.

    Args:
        table: of `Comparison.trials`: stage, name, validation_accuracy (NaN where there is none).
        title: above the panels.
    """
    stages: Mapping[str, pd.DataFrame] = {
        stage: table[table.stage == stage].assign(name_=lambda t, stage=stage: [_name(stage, n) for n in t["name"]])
        for stage in STAGES
        if (table.stage == stage).any()
    }
    sizes = [mine.name_.nunique() for mine in stages.values()]
    fig = Figure(figsize=(6.6, 0.24 * sum(sizes) + 0.75 * len(sizes) + 0.4), layout="constrained")
    axes = fig.subplots(len(sizes), 1, squeeze=False, sharex=True, height_ratios=[n + 0.6 for n in sizes])[:, 0]
    for ax, (stage, mine) in zip(axes, stages.items(), strict=True):
        _strip(ax, mine, chosen=stage != RECALLED)
        ax.set_title(STAGES[stage])
    for ax in axes:
        ax.tick_params(labelbottom=True)
    axes[-1].set_xlabel("accuracy, validation images (%); the chosen trial is filled")
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig
