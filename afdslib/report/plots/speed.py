"""Figures of measured time: accuracy against latency, and the speed-up against the MACs saved."""

from __future__ import annotations

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from afdslib.report.plots.pictures import sentence
from afdslib.report.plots.style import Look, canvas, drawn_as, handles, look, percent, styled

_VARIANTS = {
    "compact": Look("AFDS, compact", "#0072B2", "o"),
    "torch-pruning": Look("torch-pruning, L1", "#D55E00", "s"),
}
_IDEAL = Look("ideal", "#555555", "", (2, 2))


def _log(axis: XAxis | YAxis, unit: str = "") -> None:
    """A log scale with ticks at 1, 2 and 5 of each decade."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.set_minor_formatter(NullFormatter())


def _ideal(ax: Axes, most: float) -> None:
    """The line on which time follows MACs, and the axes of a panel of speed-ups."""
    ax.plot([1, most], [1, most], color=_IDEAL.colour, linewidth=0.9, linestyle=_IDEAL.line, label=_IDEAL.label)
    _log(ax.xaxis, "x")
    _log(ax.yaxis, "x")
    ax.set(xlabel="MACs, reduction (log scale)", ylabel="measured speed-up over the dense network")


@styled
def latency(table: pd.DataFrame, *, title: str = "") -> Figure:
    """`speed.times` of one target. Left: accuracy against time per image. Right: speed-up against MACs saved.

    The right panel has the ideal line, on which time follows MACs, and two sets of points: against the MACs that the
    gates leave, and against those that the compact network computes, which does not skip dynamic channels. Error bars
    are quartiles over the repeats.
    """
    if table.empty:
        return sentence("No time is shown: the weights of these networks are not at hand to be measured.")
    fig, ((left, right),) = canvas(9.8, 4.2, 1, 2, title=title)
    style = look(table.method.iloc[0])
    for index, (batch, rows) in enumerate(table.sort_values("budget").groupby("batch")):
        drawn: dict[str, Any] = {"elinewidth": 1.0, "fillstyle": ("full", "none")[index % 2]}
        drawn["linestyle"] = ("-", (0, (4, 1.5)))[index % 2]
        spread = [(rows.median_ms - rows.q1_ms) / batch, (rows.q3_ms - rows.median_ms) / batch]
        ours = {"color": style.colour, "marker": style.marker}
        left.errorbar(rows.median_ms / batch, rows.test_accuracy, xerr=spread, label=f"batch {batch}", **ours, **drawn)
        spread = [rows.speedup - rows.speedup_q1, rows.speedup_q3 - rows.speedup]
        for shares, words, look_ in (
            ("macs", "MACs as the gates leave them", ours),
            ("computed", "MACs that are computed", {"color": "#0072B2", "marker": "o"}),
        ):
            label = f"batch {batch}, {words}"
            right.errorbar(1 / rows[shares], rows.speedup, yerr=spread, label=label, **look_, **drawn)
    _log(left.xaxis)
    left.set(xlabel="time per image (ms, log scale)", ylabel="accuracy, test images (%)")
    percent(left.yaxis)
    left.legend(title=f"{style.label}, one seed", alignment="left")
    _ideal(right, 1.15 / min(table.macs.min(), table.computed.min()))
    right.legend(fontsize=7.5)
    return fig


@styled
def speed(table: pd.DataFrame, *, title: str = "") -> Figure:
    """`speed.best`: measured speed-up over the dense network against MACs saved, with the ideal line.

    A panel per device, number of threads, size of the images and batch size; networks cut by random masks are left out.
    """
    trained = table.network[table.note.fillna("").str.startswith("masks of")] if len(table) else ()
    rows = table[table.variant.isin(list(_VARIANTS)) & table.network.isin(trained)] if len(table) else table
    if rows.empty:
        return sentence("No speed is shown: no network has been measured by afds bench.")
    rows = rows.assign(label=[_VARIANTS[variant].label for variant in rows.variant])
    panels = list(rows.groupby(["device", "threads", "size", "batch"], sort=True))
    fig, (axes,) = canvas(4.9 * len(panels), 4.2, 1, len(panels), title=title or "Speed-up by fewer MACs")
    for ax, ((_, threads, size, batch), here) in zip(axes, panels, strict=True):
        sns.lineplot(here, x="reduction", y="faster", ax=ax, **drawn_as(_VARIANTS.values()))
        _ideal(ax, 1.15 * max(rows.reduction.max(), rows.faster.max()))
        words = f"batch {batch}, {size:g} px, {threads} threads"
        ax.legend(handles=handles([*_VARIANTS.values(), _IDEAL]), title=words, alignment="left", loc="upper left")
    return fig
