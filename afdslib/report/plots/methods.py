"""Methods over the budgets of a sweep or a comparison, side by side, and the trials and students behind them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from afdslib.base.text import times
from afdslib.report.plots.style import Look, canvas, drawn_as, handles, labelled, level, look, narrow, percent, styled
from afdslib.report.tables import place, span
from afdslib.studies.protocol import AFDS, RECALLED, Method, label_of

QUANTITIES = {
    "test_accuracy": "accuracy, test images (%)",
    "test_mean_class_accuracy": "mean class accuracy, test images (%)",
}
WIDTHS = dict.fromkeys(("width", "width-kd"), "narrower networks")
PALE = Look("AFDS", "#EBA985", "")
ATTENTIONS = {
    "joint": Look("joint attention", "#D55E00", "D"),
    "detached": Look("detached attention", "#0072B2", "o", (5, 1.5)),
}
ROLES = {"competitor": ("competitor", "#000000", "o"), "part": ("AFD or AFS alone", "#7F7F7F", "s")}
STAGES = {
    "regulariser": "regularisers, on the dense network",
    "selection": "selections, with L2 at its best",
    RECALLED: "AFS with the recalled schedule, which was replaced",
    "strength": "pairs: strength at the endpoint's budget",
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
    if not ax.child_axes:  # one axis along the top, also where lines are added
        _macs_axis(ax, table.budget.unique())
    if "accuracy" in value:
        percent(ax.yaxis)


def _seeds(table: pd.DataFrame) -> str:
    """What the error bars stand for."""
    seeds = table.groupby(["target", "method", "budget"]).size()
    if seeds.max() == 1:
        return "one seed, no error bars"
    return f"mean and standard deviation over {span(seeds.min(), seeds.max())} seeds"


@styled
def accuracy_macs(table: pd.DataFrame, *, chance: Mapping[str, float] | None = None) -> Figure:
    """Accuracy against measured MACs, one line per method; each target of a sweep has a row of panels.

    The accuracy of guessing, by target, is drawn as a line.
    """
    table, looks = labelled(table)
    by_target = dict(tuple(table.groupby("target", sort=False)))
    fig, axes = canvas(9.8, 3.7 * len(by_target) + 0.5, len(by_target), 2, what="Accuracy by MACs, all with AFS")
    for row, (target, mine) in zip(axes, by_target.items(), strict=True):
        for ax, value in zip(row, ("test_accuracy", "test_mean_class_accuracy"), strict=True):
            _lines(ax, mine, value, looks)
            if chance:
                level(ax, chance[str(target)], "chance")
        row[0].set_title(place(str(target)))
    fig.legend(handles=handles(looks), loc="outside lower center", ncols=len(looks), title=_seeds(table))
    return fig


@styled
def accuracy_cost(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Test accuracy of a few networks against their MACs and the milliseconds that one image takes."""
    fig, (axes,) = canvas(8.0, 3.4, 1, 2, sharey=True)
    for ax, key, label in zip(axes, ("macs", "milliseconds"), ("MACs (M per image)", "ms per image"), strict=True):
        ax.plot([p[key] for p in points], [p["test_accuracy"] for p in points], marker="o")
        for p in points:
            ax.annotate(times(p["budget"]), (p[key], p["test_accuracy"]), (3, -11), textcoords="offset points")
        ax.set(xlabel=f"{label}, log scale", xscale="log", ylabel="test accuracy (%)")
    percent(axes[0].yaxis)
    return fig


@styled
def parameters_budget(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Parameters that remain on one target against measured MACs, one line per method."""
    table, looks = labelled(table.assign(parameters=table.parameters / 1000))
    fig, ((ax,),) = canvas(5.4, 3.5, title=title or "Parameters")
    _lines(ax, table, "parameters", looks)
    ax.set_ylabel("parameters (thousands)")
    ax.set_ylim(bottom=0)
    ax.legend(handles=handles(looks), title=_seeds(table), alignment="left")
    return fig


@styled
def density_and_masks(table: pd.DataFrame, *, title: str = "") -> Figure:
    """How a sweep's budgets are met on one target: the density d that is set, the share of channels the masks leave."""
    living = table.static + table.dynamic
    table, looks = labelled(table.assign(living=living / (table.removed + living)))
    fig, ((ax,),) = canvas(5.8, 3.5, what="Density and channels by MACs", title=title)
    density = table.groupby("budget")[["macs", "density"]].mean()
    drawn = {"color": "#555555", "linestyle": (0, (2, 2)), "marker": "|"}
    (line,) = ax.plot(density.macs, density.density, **drawn, label="density d, set")
    _lines(ax, table, "living", looks)
    ax.set_ylim(0, 1.05)
    percent(ax.yaxis)
    ax.set_ylabel("share of channels (%)")
    left = [replace(one, label=f"left by the masks: {one.label}") for one in looks]
    ax.legend(handles=[line, *handles(left)], loc="lower right")
    return fig


@styled
def attention_width(table: pd.DataFrame, *, title: str = "") -> Figure:
    """`ablations.attention_widths`: how wide the attention is at each budget, joint and detached, and the accuracy."""
    looks = [ATTENTIONS[name] for name in dict.fromkeys(table.attention)]
    table = table.assign(label=[ATTENTIONS[name].label for name in table.attention], target="", method=table.attention)
    fig, ((left, right),) = canvas(8.6, 3.7, 1, 2, what="Width of the attention, and accuracy", title=title)
    _lines(left, table, "width", looks)
    _lines(right, table, "test_accuracy", looks)
    level(left, float(table.uniform.iloc[0]), "uniform", below=True, end=0.01)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_ylim(bottom=1)
    left.set_ylabel("width of the attention, channels (log scale)")
    fig.legend(handles=handles(looks), loc="outside lower center", ncols=2, title=_seeds(table))
    return fig


def _look(method: Method) -> Look:
    """Of a line in its panel: by its regulariser, dotted where attention is detached; narrower ones by theirs, too."""
    base, label = look(method.regulariser), method.label.partition(" + ")[0]
    if method.selection.startswith("width"):
        own = look(method.selection)
        return own if method.regulariser == "l2" else replace(own, label=f"{own.label}, {label}", colour=base.colour)
    return base if method.attention == "joint" else replace(base, label=label, dashes=(1.2, 1.2))


@styled
def competitors(table: pd.DataFrame, *, chance: float | None = None, title: str = "") -> Figure:
    """A comparison's test accuracy against measured MACs: a panel per selection, a line per regulariser, AFDS pale in
    every other; the accuracy of guessing is a line, too."""
    methods = {name: Method.parse(name) for name in dict.fromkeys(table.method)}
    looks = {name: _look(method) for name, method in methods.items()}
    titles = {m.selection: label_of(m.selection) for m in methods.values()} | WIDTHS
    table = table.assign(
        label=[looks[name].label for name in table.method],
        panel=[titles[methods[name].selection] for name in table.method],
    )
    panels = list(dict.fromkeys(table.panel))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = 4.6 * columns + 0.4, 3.2 * rows + 0.8
    fig, axes = canvas(*size, rows, columns, what="Accuracy by MACs", title=title, sharex=True, sharey=True)
    ours, pale = table[table.method == AFDS.key].assign(label=PALE.label), False
    for ax, panel in zip(axes.flat, panels, strict=False):
        here = table[table.panel == panel]
        if AFDS.key not in set(here.method) and len(ours):
            _lines(ax, ours, "test_accuracy", [PALE], errorbar=None, linewidth=4, zorder=1)
            pale = True
        _lines(ax, here, "test_accuracy", [looks[name] for name in dict.fromkeys(here.method)])
        if chance is not None:
            level(ax, chance)
        ax.set_title(panel)
        ax.tick_params(labelbottom=True)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    lines = {one.label: one for one in looks.values()}.values()
    entries = handles([PALE] if pale else [], linewidth=4) + handles(lines)
    words = _seeds(table) + ("; dashed grey: chance" if chance is not None else "")
    fig.legend(handles=entries, loc="outside lower center", ncols=min(4, len(entries)), title=words)
    return fig


@styled
def paired(tables: pd.DataFrame | Mapping[str, pd.DataFrame], *, title: str = "") -> Figure:
    """AFDS minus each other method with its interval, right of 0 where AFDS is better.

    One table of `statistics.paired_table`, whose target is the title, or one per target, each with a panel.
    """
    tables = {title: tables} if isinstance(tables, pd.DataFrame) else tables
    sizes = [max(2, len(table)) for table in tables.values()]
    size = 6.4, 0.9 + (0.4 if narrow() else 0.28) * sum(sizes) + 0.35 * len(sizes)
    said = "AFDS minus each other method, a tenth of the MACs"
    fig, axes = canvas(*size, len(sizes), what=said, sharex=True, height_ratios=[n + 0.5 for n in sizes])
    shown = set[str]()
    for (ax,), (target, table) in zip(axes, tables.items(), strict=True):
        ax.axvline(0, color="#555555", linewidth=0.9)
        names = [f"{Method.parse(r.method).label} ({r.seeds})" for r in table.itertuples()]
        names = [textwrap.fill(name, 22) for name in names] if narrow() else names
        for y, row in enumerate(table.itertuples()):
            word, colour, marker = ROLES[row.role]
            spread = [[row.difference - row.low], [row.high - row.difference]]
            label = "_" if word in shown else word
            ax.errorbar(row.difference, y, xerr=spread, color=colour, marker=marker, linestyle="", label=label)
            shown.add(word)
        ax.set_yticks(range(len(names)), names, fontsize=7.5 if narrow() else 9)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_title(place(target))
        ax.grid(False, axis="y")
    unit = "points" if narrow() else "points of test accuracy"
    axes[-1, 0].set_xlabel(f"AFDS worse  ←  {unit}  →  better\n(95 % interval; in brackets: seeds)")
    if len(shown) > 1:
        fig.legend(loc="outside lower center", ncols=2)
    return fig


@styled
def by_budget(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """AFDS minus competitors (method, budget, difference, low, high) at each budget, in points; a panel per target."""
    said = "AFDS minus its best competitors, by MACs"
    fig, (axes,) = canvas(4.6 * len(tables), 3.6, 1, len(tables), what=said, sharey=True)
    for ax, (target, table) in zip(axes, tables.items(), strict=True):
        ax.axhline(0, color="#555555", linewidth=0.9)
        for i, (method, rows) in enumerate(table.groupby("method", sort=False)):
            pair = Method.parse(str(method))
            one = look(pair.selection)
            drawn = {"color": one.colour, "marker": one.marker, "linestyle": one.line, "elinewidth": 1.0}
            spread = [rows.difference - rows.low, rows.high - rows.difference]
            drawn["label"] = f"minus {pair.label}"
            ax.errorbar(rows.budget * 1.02 ** (i - 1), rows.difference, yerr=spread, **drawn)
        _macs_axis(ax, table.budget.unique())
        ax.set_title(place(target))
        ax.legend()
    axes[0].set_ylabel("points of test accuracy, 95 % interval")
    return fig


def _strip(ax: Axes, table: pd.DataFrame, *, chosen: bool) -> None:
    names = list(dict.fromkeys(table["name"]))
    rows = table.dropna(subset="validation_accuracy")
    common = {"x": "validation_accuracy", "y": "name", "order": names, "jitter": False, "ax": ax}
    sns.stripplot(rows, **common, size=4, color="white", edgecolor="#0072B2", linewidth=1)
    if chosen and len(rows):
        best = rows.loc[rows.groupby("name").validation_accuracy.idxmax()]
        sns.stripplot(best, **common, size=5, color="#D55E00", marker="D", zorder=5)
    for row, name in enumerate(names):
        if lost := int((table["name"] == name).sum() - (rows["name"] == name).sum()):
            ax.annotate(
                f"{lost} without a value", (1, row), xycoords=("axes fraction", "data"), xytext=(-3, 0),
                textcoords="offset points", ha="right", va="center", fontsize=7.5, color="#555555"
            )  # fmt: skip
    ax.set(xlabel="", ylabel="", ylim=(len(names) - 0.5, -0.5))
    ax.set_yticks(range(len(names)), names)  # also where no trial has a value
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.tick_params(labelbottom=True)
    percent(ax.xaxis)


@styled
def competitor_trials(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Validation accuracy of a comparison's trials (stage, name), one row per method and stage; the chosen filled."""

    def name(row: pd.Series) -> str:
        return Method.parse(row["name"]).label if row.stage == "strength" else label_of(row["name"])

    table = table.assign(name=table.apply(name, axis=1))
    stages = {stage: table[table.stage == stage] for stage in STAGES if (table.stage == stage).any()}
    sizes = [mine["name"].nunique() for mine in stages.values()]
    height = 0.24 * sum(sizes) + 0.75 * len(sizes) + 0.4
    ratios = [size + 0.6 for size in sizes]
    fig, axes = canvas(6.6, height, len(sizes), what="Every trial", title=title, sharex=True, height_ratios=ratios)
    for (ax,), (stage, mine) in zip(axes, stages.items(), strict=True):
        _strip(ax, mine, chosen=stage != RECALLED)
        ax.set_title(STAGES[stage])
    axes[-1, 0].set_xlabel("accuracy, validation images (%); the chosen trial is filled")
    return fig


@styled
def student_accuracy(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Test accuracy of one teacher's students: a sign per seed, a bar at the median; shaded: the plain one's range."""
    students, looks = labelled(table[table.method != "teacher"])
    fig, ((ax,),) = canvas(6.6, 0.42 * len(looks) + 1.2, what="Accuracy of each student", title=title)
    alone = students[students.method == "alone"].test_accuracy
    if len(alone) > 1:
        ax.axvspan(alone.min(), alone.max(), color="#000000", alpha=0.08, linewidth=0)
    sns.scatterplot(students, x="test_accuracy", y="label", ax=ax, s=48, **drawn_as(looks, lines=False))
    for row, one in enumerate(looks):
        median = students[students.label == one.label].test_accuracy.median()
        ax.plot([median] * 2, [row - 0.33, row + 0.33], color=one.colour, linewidth=2.4)
    for row in table[table.method == "teacher"].itertuples():
        ax.axvline(row.test_accuracy, color="black", linewidth=1, linestyle=(0, (4, 2)))
        ax.annotate(
            f"teacher {row.student}", (row.test_accuracy, 1), xycoords=("data", "axes fraction"), xytext=(-3, 3),
            textcoords="offset points", ha="right", fontsize=8
        )  # fmt: skip
    ax.set_ylim(len(looks) - 0.4, -0.6)
    ax.margins(x=0.06)
    percent(ax.xaxis)
    seeds = students.groupby("method").size()
    words = f"{span(seeds.min(), seeds.max())} seeds, bar: median, shaded: range of the student alone"
    ax.set(xlabel=f"accuracy, test images (%); {words}", ylabel="")
    return fig
