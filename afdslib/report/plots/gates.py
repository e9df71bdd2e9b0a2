"""Gates of the whole network, which channels became static, dynamic or removed, and what is taken for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from afdslib.base.text import times
from afdslib.report.plots.style import STATES, canvas, percent, styled

Layers = Mapping[str, Mapping[str, Any]]
QUANTITIES = {
    "gate_quantiles": ("mean gate of a channel, E[η]", 1),
    "active_quantiles": ("share of images computed (%)", 100),
}


@styled
def gates_heatmap(layers: Mapping[str, Layers], *, quantity: str = "gate_quantiles", title: str = "") -> Figure:
    """Per layer (rows, input first) deciles of one of `QUANTITIES` over its living channels, a panel per caption."""
    label, scale = QUANTITIES[quantity]
    panels = {
        caption: scale * pd.DataFrame.from_dict({n: layer[quantity] for n, layer in one.items()}, orient="index")
        for caption, one in layers.items()
    }
    rows = max(map(len, panels.values()))
    top = scale if quantity == "active_quantiles" else max(float(panel.max(axis=None)) for panel in panels.values())
    size = 1.9 + 2.9 * len(panels), min(8.0, 1.3 + 0.17 * rows)
    fig, (axes,) = canvas(*size, 1, len(panels), what="Gates by layer", title=title, sharey=True)
    for ax, (caption, panel) in zip(axes, panels.items(), strict=True):
        ax.grid(False)
        panel = panel.rename(columns=lambda i: 10 * i)
        sns.heatmap(panel, ax=ax, vmin=0, vmax=top, cmap="cividis", cbar=False, xticklabels=2)
        ax.tick_params(axis="x", labelrotation=0)
        ax.tick_params(axis="y", labelsize=7, labelrotation=0)
        ax.set(xlabel="channels below (%)")
        ax.set_title(caption)
    axes[0].set_ylabel("layer, input first")
    fig.colorbar(axes[-1].collections[0], ax=list(axes), pad=0.02, label=label)
    return fig


@styled
def channel_states(layers: Mapping[float, Layers], *, title: str = "") -> Figure:
    """Which channels are dynamic, static and removed, by layer: one row of stacked bars per budget."""
    names, white = list(next(iter(layers.values()))), {"edgecolor": "white", "linewidth": 0}
    drawn: dict[str, Any] = {
        state: {"facecolor": colour, "hatch": hatch, **white} for state, (colour, hatch) in STATES.items()
    }
    size = max(6.4, min(11, 1.5 + 0.3 * len(names))), 1.25 * len(layers) + 1.5
    fig, axes = canvas(*size, len(layers), what="Channels by layer", title=title, sharex=True)
    for (ax,), (budget, one) in zip(axes, layers.items(), strict=True):
        table = pd.DataFrame(one).T[["channels", *STATES]].astype(float)
        bottom = np.zeros(len(table))
        for state, signs in drawn.items():
            share = (table[state] / table.channels).to_numpy()
            ax.bar(range(len(table)), share, bottom=bottom, width=0.86, **signs)
            bottom += share
        ax.grid(False)
        percent(ax.yaxis)
        ax.set(ylim=(0, 1), xlim=(-0.6, len(table) - 0.4), yticks=[0, 0.5, 1], ylabel="channels (%)")
        which = "unpruned" if budget == 1 else f"{times(budget)} fewer MACs"
        gone = 100 * table.removed.sum() / table.channels.sum()
        ax.set_title(f"{which}: {gone:.0f} % of all channels removed", fontweight="normal")
    step = -(-len(names) // 36)  # where there is no room every second, third, ... layer has a tick
    axes[-1, 0].set_xticks(range(0, len(names), step), names[::step])
    axes[-1, 0].tick_params(axis="x", labelrotation=90, labelsize=7)
    axes[-1, 0].set_xlabel("layer, input first")
    entries = [Patch(**signs, label=state) for state, signs in drawn.items()]
    fig.legend(handles=entries, loc="outside upper right", ncols=3)
    return fig


@styled
def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], *, title: str = "") -> Figure:
    """Confusion matrix: share of each true class (row) that is taken for each class (column), in percent."""
    counts = np.asarray(matrix, dtype=float)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(classes) <= 20
    side = 1.9 + (0.44 * len(classes) if few else 4.4)
    fig, ((ax,),) = canvas(side + 0.8, side, what="What is taken for what", title=title)
    ax.grid(False)
    sns.heatmap(
        pd.DataFrame(share, classes, classes) if few else share, ax=ax, vmin=0, vmax=100, cmap="cividis", square=True,
        annot=few, fmt=".0f", annot_kws={"fontsize": 8},
        cbar_kws={"label": "share of the true class (%)", "shrink": 0.85, "pad": 0.03}
    )  # fmt: skip
    ax.set(xlabel="predicted class", ylabel="true class")
    return fig
