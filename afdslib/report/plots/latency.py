"""Figures of measured time: accuracy against latency, and the speed-up against the MACs saved."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from afdslib.report.plots.style import look, percent, sentence, styled

__all__ = ["latency", "speed"]

_FILLS, _LINES = ("full", "none"), ("-", (0, (4, 1.5)))


def _log(axis: XAxis | YAxis, unit: str = "") -> None:
    """A log scale with ticks at 1, 2 and 5 of each decade."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.set_minor_formatter(NullFormatter())


def _speed(ax: Axes, mine: pd.DataFrame, shares: str, colour: str, marker: str, style: dict, label: str) -> None:
    rows = mine.sort_values("budget")
    ax.errorbar(
        1 / rows[shares], rows.speedup, yerr=[rows.speedup - rows.speedup_q1, rows.speedup_q3 - rows.speedup],
        color=colour, marker=marker, label=label, elinewidth=1.0, **style,
    )  # fmt: skip


@styled
def latency(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Left: accuracy against milliseconds per image. Right: speed-up over the dense network against MACs saved.

    Args:
        table: of one target, from `latency.times`; a sentence is drawn where it is empty.
        title: above the panels.

    The right panel has the ideal line, on which time follows MACs, and two sets of points: against the MACs that the
    gates leave, and against those that the compact network computes, which does not skip dynamic channels. Error bars
    are quartiles over the repeats.
    """
    if table.empty:
        return sentence("No time is shown: the weights of these networks are not at hand to be measured.")
    fig = Figure(figsize=(9.8, 4.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    style = look(table.method.iloc[0])
    for index, (batch, mine) in enumerate(table.groupby("batch", sort=True)):
        rows = mine.sort_values("budget")
        drawn = {"fillstyle": _FILLS[index % 2], "linestyle": _LINES[index % 2]}
        left.errorbar(
            rows.median_ms / batch, rows.test_accuracy,
            xerr=[(rows.median_ms - rows.q1_ms) / batch, (rows.q3_ms - rows.median_ms) / batch],
            color=style.colour, marker=style.marker, elinewidth=1.0, label=f"batch {batch}", **drawn,
        )  # fmt: skip
        _speed(right, rows, "macs", style.colour, style.marker, drawn, f"batch {batch}, MACs as the gates leave them")
        _speed(right, rows, "computed", "#0072B2", "o", drawn, f"batch {batch}, MACs that are computed")
    _log(left.xaxis)
    left.set_xlabel("time per image (ms, log scale)")
    left.set_ylabel("accuracy, test images (%)")
    percent(left.yaxis)
    left.legend(title=f"{style.label}, one seed", alignment="left")
    most = 1.15 / min(table.macs.min(), table.computed.min())
    right.plot([1, most], [1, most], color="#555555", linewidth=0.9, linestyle=(0, (2, 2)), label="ideal")
    _log(right.xaxis, "x")
    _log(right.yaxis, "x")
    right.set_xlabel("MACs, reduction (log scale)")
    right.set_ylabel("measured speed-up over the dense network")
    right.legend(fontsize=7.5)
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig


_VARIANTS = {"compact": ("#0072B2", "o", "AFDS, compact"), "torch-pruning": ("#D55E00", "s", "torch-pruning, L1")}


@styled
def speed(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Measured speed-up over the dense network against MACs saved, each in its fastest runtime, with the ideal line.

    A panel per device, number of threads, size of the images and batch size; networks cut by random masks are left out.

    Args:
        table: of `measured.best`; a sentence is drawn where it is empty.
        title: above the panels.
    """
    trained = table.network[table.note.fillna("").str.startswith("masks of")] if len(table) else ()
    rows = table[table.variant.isin(list(_VARIANTS)) & table.network.isin(trained)] if len(table) else table
    if rows.empty:
        return sentence("No speed is shown: no network has been measured by afds bench.")
    panels = list(rows.groupby(["device", "threads", "size", "batch"], sort=True))
    fig = Figure(figsize=(4.9 * len(panels), 4.2), layout="constrained")
    most = 1.15 * max(rows.reduction.max(), rows.faster.max())
    for ax, ((_, threads, size, batch), here) in zip(
        fig.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for variant, (colour, marker, label) in _VARIANTS.items():
            mine = here[here.variant == variant].sort_values("reduction")
            ax.plot(mine.reduction, mine.faster, color=colour, marker=marker, label=label)
        ax.plot([1, most], [1, most], color="#555555", linewidth=0.9, linestyle=(0, (2, 2)), label="ideal")
        _log(ax.xaxis, "x")
        _log(ax.yaxis, "x")
        ax.set(xlabel="MACs, reduction (log scale)", ylabel="measured speed-up over the dense network")
        ax.legend(title=f"batch {batch}, {size:g} px, {threads} threads", alignment="left", loc="upper left")
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig
