"""Figures over the budgets of a sweep or a comparison: one line per method against measured MACs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from afdslib.base.text import times
from afdslib.report.plots.style import Look, canvas, drawn_as, handles, labelled, level, look, percent, styled
from afdslib.studies.protocol import Method, label_of

QUANTITIES = {
    "test_accuracy": "accuracy, test images (%)",
    "test_mean_class_accuracy": "mean class accuracy, test images (%)",
    "validation_accuracy": "accuracy, validation images (%)",
}
AFDS = "afd+afs"
PALE = Look("AFDS", "#EBA985", "")
ATTENTIONS = {
    "joint": Look("joint attention", "#D55E00", "D"),
    "detached": Look("detached attention", "#0072B2", "o", (5, 1.5)),
}


def _macs_axis(ax: Axes, budgets: Sequence[float]) -> None:
    """Share of the dense MACs on a log scale, with the reductions 1x, 2x, ... along the top."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]))
    ax.xaxis.set_minor_formatter(NullFormatter())
    percent(ax.xaxis)
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


def _lines(ax: Axes, table: pd.DataFrame, value: str, looks: Sequence[Look], **kwargs) -> None:
    """A line per label: the mean over seeds at each budget and its mean MACs, with bars of one standard deviation.

    Each line is moved sideways, a little, so that error bars of equal budgets stay apart.
    """
    shifts = {one.label: 1.012 ** (i - (len(looks) - 1) / 2) for i, one in enumerate(looks)}
    x = table.groupby(["label", "budget"]).macs.transform("mean") * table.label.map(shifts)
    kwargs = {"errorbar": "sd", "err_style": "bars", "err_kws": {"elinewidth": 1.0}} | kwargs
    sns.lineplot(table.assign(x=x), x="x", y=value, ax=ax, **drawn_as(looks), **kwargs)
    ax.set_ylabel(QUANTITIES.get(value, value))
    _macs_axis(ax, table.budget.unique())
    if "accuracy" in value:
        percent(ax.yaxis)


def _seeds(table: pd.DataFrame) -> str:
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
    """Accuracy against measured MACs, one line per method; each target has a row of panels, its title above the first.

    Args:
        table: of a sweep: target, method, seed, budget, macs and the columns of `values`.
        values: one panel each.
        chance: accuracy of guessing by target, drawn as a line.
    """
    table, looks = labelled(table)
    by_target = dict(tuple(table.groupby("target", sort=False)))
    size = 4.7 * len(values) + 0.4, 3.7 * len(by_target) + 0.5
    fig, axes = canvas(*size, len(by_target), len(values), title=title)
    for row, (target, mine) in zip(axes, by_target.items(), strict=True):
        for ax, value in zip(row, values, strict=True):
            _lines(ax, mine, value, looks)
            if chance:
                level(ax, chance[str(target)], "chance")
        row[0].set_title(target)
    fig.legend(handles=handles(looks), loc="outside lower center", ncols=len(looks), title=_seeds(table))
    return fig


@styled
def parameters_budget(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Parameters that remain on one target against measured MACs, one line per method."""
    table, looks = labelled(table.assign(parameters=table.parameters / 1000))
    fig, ((ax,),) = canvas(5.4, 3.5, title=title)
    _lines(ax, table, "parameters", looks)
    ax.set_ylabel("parameters (thousands)")
    ax.set_ylim(bottom=0)
    ax.legend(handles=handles(looks), title=_seeds(table), alignment="left")
    return fig


@styled
def density_and_masks(table: pd.DataFrame, *, title: str = "") -> Figure:
    """How each budget is met: the density d that is set, and the share of channels that the masks leave.

    Args:
        table: of a sweep, one target: method, budget, macs, density, removed, static, dynamic.
    """
    living = table.static + table.dynamic
    table, looks = labelled(table.assign(living=living / (table.removed + living)))
    fig, ((ax,),) = canvas(5.8, 3.5, title=title)
    density = table.groupby("budget")[["macs", "density"]].mean()
    (line,) = ax.plot(
        density.macs, density.density, color="#555555", linestyle=(0, (2, 2)), marker="|", label="density d, set"
    )
    _lines(ax, table, "living", looks)
    ax.set_ylim(0, 1.05)
    percent(ax.yaxis)
    ax.set_ylabel("share of channels (%)")
    left = [replace(one, label=f"left by the masks: {one.label}") for one in looks]
    ax.legend(handles=[line, *handles(left)], loc="lower right")
    return fig


@styled
def attention_width(table: pd.DataFrame, *, title: str = "") -> Figure:
    """How wide the attention is at each budget, joint and detached, and the accuracy beside it.

    Args:
        table: of `ablations.attention_widths`: attention, seed, budget, width, uniform, macs, test_accuracy.
    """
    looks = [ATTENTIONS[name] for name in dict.fromkeys(table.attention)]
    table = table.assign(label=[ATTENTIONS[name].label for name in table.attention], target="", method=table.attention)
    fig, ((left, right),) = canvas(8.6, 3.7, 1, 2, title=title)
    _lines(left, table, "width", looks)
    _lines(right, table, "test_accuracy", looks)
    level(left, float(table.uniform.iloc[0]), "uniform", below=True, end=0.01)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_ylim(bottom=1)
    left.set_ylabel("width of the attention, channels (log scale)")
    fig.legend(handles=handles(looks), loc="outside lower center", ncols=2, title=_seeds(table))
    return fig


def _panel(selection: str) -> str:
    return "narrower networks" if selection.startswith("width") else label_of(selection)


def _look(method: Method) -> Look:
    """Of a line in its panel: by its regulariser, dotted where attention is detached; narrower ones by theirs, too."""
    base, label = look(method.regulariser), method.label.partition(" + ")[0]
    if method.selection.startswith("width"):
        own = look(method.selection)
        return own if method.regulariser == "l2" else replace(own, label=f"{own.label}, {label}", colour=base.colour)
    return base if method.attention == "joint" else replace(base, label=label, dashes=(1.2, 1.2))


@styled
def competitors(table: pd.DataFrame, *, chance: float | None = None, title: str = "") -> Figure:
    """Test accuracy against measured MACs: a panel per selection, a line per regulariser, AFDS pale in every other.

    Args:
        table: of a comparison, one target: method, seed, budget, macs, test_accuracy.
        chance: accuracy of guessing, drawn as a line.
    """
    methods = {name: Method.parse(name) for name in dict.fromkeys(table.method)}
    looks = {name: _look(method) for name, method in methods.items()}
    table = table.assign(
        label=[looks[name].label for name in table.method],
        panel=[_panel(methods[name].selection) for name in table.method],
    )
    panels = list(dict.fromkeys(table.panel))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = 4.6 * columns + 0.4, 3.2 * rows + 0.8
    fig, axes = canvas(*size, rows, columns, title=title, sharex=True, sharey=True)
    ours, pale = table[table.method == AFDS].assign(label=PALE.label), False
    for ax, panel in zip(axes.flat, panels, strict=False):
        here = table[table.panel == panel]
        if AFDS not in set(here.method) and len(ours):
            _lines(ax, ours, "test_accuracy", [PALE], errorbar=None, linewidth=4, zorder=1)
            pale = True
        _lines(ax, here, "test_accuracy", [looks[name] for name in dict.fromkeys(here.method)])
        if chance is not None:
            level(ax, chance)
        ax.set_title(panel)
        ax.tick_params(labelbottom=True)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    entries = handles([PALE] if pale else [], linewidth=4) + handles(
        {one.label: one for one in looks.values()}.values()
    )
    fig.legend(
        handles=entries, loc="outside lower center", ncols=min(4, len(entries)),
        title=_seeds(table) + ("; dashed grey: chance" if chance is not None else "")
    )  # fmt: skip
    return fig


@styled
def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], *, title: str = "") -> Figure:
    """Confusion matrix: share of each true class (row) that is taken for each class (column), in percent."""
    counts = np.asarray(matrix, dtype=float)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(classes) <= 20
    side = 1.9 + (0.44 * len(classes) if few else 4.4)
    fig, ((ax,),) = canvas(side + 0.8, side, title=title)
    ax.grid(False)
    sns.heatmap(
        pd.DataFrame(share, classes, classes) if few else share, ax=ax, vmin=0, vmax=100, cmap="cividis", square=True,
        annot=few, fmt=".0f", annot_kws={"fontsize": 8},
        cbar_kws={"label": "share of the true class (%)", "shrink": 0.85, "pad": 0.03}
    )  # fmt: skip
    ax.set(xlabel="predicted class", ylabel="true class")
    return fig
