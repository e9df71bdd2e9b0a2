"""AFD's attention on a real image, and how its entropy moves while it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from afdslib.report.plots.curves import band
from afdslib.report.plots.style import Look, percent, styled
from afdslib.report.plots.sweep import QUANTITIES, draw_line, macs_axis, seeds_text

if TYPE_CHECKING:
    from afdslib.report.views import AttentionView

__all__ = ["attention", "attention_entropy", "attention_width"]

KINDS = (Look("", "#D55E00", "D"), Look("", "#0072B2", "o", (0, (5, 1.5))))
"""Looks of the joint and of the detached attention; the callers' names are the labels."""


def _colours(count: int, top: int) -> list[str]:
    return ["#D55E00" if rank < top else "#8C8C8C" for rank in range(count)]


def _overlay(ax, image: np.ndarray, heat: np.ndarray, caption: str) -> None:
    """The image in grey under a map that is enlarged to its size."""
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    ax.imshow(image.mean(2), cmap="gray", extent=extent, vmin=0, vmax=255)
    span = heat.max() - heat.min()
    shown = (heat - heat.min()) / span if span > 0 else np.zeros_like(heat)
    ax.imshow(shown, cmap="inferno", alpha=0.55, extent=extent, interpolation="bilinear", vmin=0, vmax=1)
    ax.set_title(caption, fontsize=8, fontweight="normal", loc="center")
    ax.set_axis_off()


@styled
def attention(view: AttentionView, *, top: int = 4, title: str = "") -> Figure:
    """The attention of one image: every channel's weight against uniform, and where the top channels respond.

    Args:
        view: from `inspection.attention`.
        top: channels shown as overlays.
        title: above the panels.
    """
    living = int((view.weights > 0).sum())
    order = np.argsort(-view.weights, kind="stable")[:living]
    fig = Figure(figsize=(9.6, 4.5), layout="constrained")
    panels: Any = fig.subfigures(2, 1, height_ratios=[1.2, 1])
    upper, lower = panels
    ax = upper.subplots()
    ax.bar(range(living), 100 * (view.weights[order] * living - 1), width=0.85, color=_colours(living, top))
    ax.axhline(0, color="black", linewidth=1)
    ax.set_xlim(-1, living)
    ax.margins(y=0.12)
    ax.set_xlabel(f"the {living} channels of {view.layer}, largest attention first (coloured: shown below)")
    ax.set_ylabel("attention ρ against\nuniform attention (%)")
    axes = lower.subplots(1, top + 2)
    axes[0].imshow(view.image)
    axes[0].set_title(f"image, class {view.caption}", fontsize=8, fontweight="normal", loc="center")
    axes[0].set_axis_off()
    for ax, channel in zip(axes[1:-1], order[:top], strict=True):
        _overlay(ax, view.image, view.maps[channel], f"channel {channel}")
    _overlay(axes[-1], view.image, np.tensordot(view.weights, view.maps, 1), "all, weighted by ρ")
    if title:
        upper.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig


@styled
def attention_entropy(
    histories: Mapping[str, Sequence[pd.DataFrame]], shapes: Mapping[str, tuple], *, title: str = ""
) -> Figure:
    """Entropy of the attention over the steps, as a share of the uniform attention's, with bands over seeds.

    Args:
        histories: logged rows of each seed, by variant ("joint", "detached").
        shapes: (C, H, W) of the tapped layers.
        title: above the panel.
    """
    uniform = float(np.mean([math.log(shape[0]) for shape in shapes.values()]))
    fig = Figure(figsize=(5.2, 3.1), layout="constrained")
    ax = fig.subplots()
    for style, (name, many) in zip(KINDS, histories.items(), strict=False):
        band(ax, many, "entropy", style, name, 100 / uniform)
    ax.axhline(100, color="black", linewidth=1, linestyle=(0, (4, 2)))
    # At least five percent are shown, so that an attention that stays uniform looks uniform.
    depth = max(5.0, 1.15 * (100 - ax.get_ylim()[0]))
    ax.set_ylim(max(0.0, 100 - depth), 100 + 0.08 * depth)
    ax.annotate(
        "uniform", (0.99, 100), xycoords=("axes fraction", "data"), xytext=(0, -12), textcoords="offset points",
        ha="right", fontsize=8,
    )  # fmt: skip
    ax.set_xlabel("optimiser step")
    ax.set_ylabel("entropy of ρ (% of uniform)")
    if len(histories) > 1:
        ax.legend()
    if title:
        ax.set_title(title)
    return fig


@styled
def attention_width(table: pd.DataFrame, *, title: str = "") -> Figure:
    """How wide the attention is at each budget, joint and detached, and the accuracy beside it.

    Args:
        table: of `collapse.widths`: attention, seed, budget, width, uniform, macs, test_accuracy.
        title: above the panels.
    """
    fig = Figure(figsize=(8.6, 3.7), layout="constrained")
    left, right = fig.subplots(1, 2)
    for style, (name, mine) in zip(KINDS, table.groupby("attention", sort=False), strict=False):
        style = replace(style, label=f"{name} attention")
        draw_line(left, mine, "width", style)
        draw_line(right, mine, "test_accuracy", style)
    left.axhline(float(table.uniform.iloc[0]), color="black", linewidth=1, linestyle=(0, (4, 2)))
    left.annotate(
        "uniform", (0.01, float(table.uniform.iloc[0])), xycoords=("axes fraction", "data"), xytext=(0, -11),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip
    left.set_yscale("log")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_ylim(bottom=1)
    left.set_ylabel("width of the attention, channels (log scale)")
    right.set_ylabel(QUANTITIES["test_accuracy"])
    percent(right.yaxis)
    for ax in (left, right):
        macs_axis(ax, table.budget.unique())
    handles, labels = left.get_legend_handles_labels()
    seeds = seeds_text(table.assign(target="", method=table.attention))
    fig.legend(handles, labels, loc="outside lower center", ncols=2, title=seeds, title_fontsize=8.5)
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig
