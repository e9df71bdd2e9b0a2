"""Gates of the whole network: how large they are, and which channels became static, dynamic or removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from afdslib.base.text import times
from afdslib.report.plots.style import STATES, percent, styled

__all__ = ["channel_states", "gates_heatmap", "gates_histogram"]

Layers = Mapping[str, Mapping[str, Any]]


def _density(layers: Layers, edges: np.ndarray) -> np.ndarray:
    """Share of the living channels per bin. Between two deciles of a layer lies a tenth of it, spread evenly."""
    mass = np.zeros(len(edges) - 1)
    for layer in layers.values():
        q = np.asarray(layer["gate_quantiles"], dtype=float)
        alive = layer["channels"] - layer["removed"]
        for low, high in zip(q, q[1:], strict=False):
            if high - low < 1e-9:
                share = np.histogram([low], edges)[0].astype(float)
            else:
                share = (np.clip(edges[1:], low, high) - np.clip(edges[:-1], low, high)) / (high - low)
            mass += alive / (len(q) - 1) * share
    return mass / mass.sum()


@styled
def gates_histogram(before: Layers, after: Layers, *, labels: Sequence[str] = ("before", "after")) -> Figure:
    """Histogram of the mean gate E[eta] over all living channels, from eleven quantiles per layer.

    Args:
        before, after: by layer: channels, removed, gate_quantiles (of a run's metrics).
        labels: of the two.
    """
    top = max(max(layer["gate_quantiles"]) for layers in (before, after) for layer in layers.values())
    edges = np.linspace(0, top * 1.001, 41)
    fig = Figure(figsize=(6.2, 3.1), layout="constrained")
    ax = fig.subplots()
    ax.stairs(_density(before, edges), edges, color="#7F7F7F", fill=True, alpha=0.45, label=labels[0])
    ax.stairs(_density(after, edges), edges, color="#D55E00", linewidth=1.8, label=labels[1])
    ax.set_xlabel("mean gate of a channel, E[η]")
    ax.set_ylabel("share of channels (%)")
    percent(ax.yaxis)
    ax.legend()
    return fig


def _sparse(ax_axis: Any, names: Sequence[str], most: int = 36) -> None:
    """Every layer has a tick where there is room; else every second, third, ..."""
    step = -(-len(names) // most)
    ax_axis.set_ticks(range(0, len(names), step), [names[i] for i in range(0, len(names), step)])


@styled
def gates_heatmap(layers: Mapping[str, Layers], *, quantity: str = "gate_quantiles", title: str = "") -> Figure:
    """Per layer (rows, input first) the deciles over its living channels, one panel per state of the network.

    Args:
        layers: by caption, for instance {"before": ..., "after": ...}.
        quantity: "gate_quantiles", the mean gate, or "active_quantiles", the share of images a channel is computed for.
        title: above the panels.
    """
    label = {"gate_quantiles": "mean gate of a channel, E[η]", "active_quantiles": "share of images computed (%)"}
    panels = {caption: np.array([layer[quantity] for layer in one.values()]) for caption, one in layers.items()}
    rows = max(len(values) for values in panels.values())
    top = 1.0 if quantity == "active_quantiles" else max(float(values.max()) for values in panels.values())
    fig = Figure(figsize=(1.9 + 2.9 * len(panels), min(8.0, 1.3 + 0.17 * rows)), layout="constrained")
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    image: Any = None
    for ax, (caption, values) in zip(axes, panels.items(), strict=True):
        image = ax.imshow(values, aspect="auto", vmin=0, vmax=top, interpolation="nearest")
        ax.grid(False)
        ax.set_xticks(range(0, values.shape[1], 2), [f"{10 * i}" for i in range(0, values.shape[1], 2)])
        ax.set_xlabel("channels below (%)")
        ax.set_title(caption)
    names = list(next(iter(layers.values())))
    _sparse(axes[0].yaxis, names)
    axes[0].tick_params(axis="y", labelsize=7)
    axes[0].set_ylabel("layer, input first")
    bar = fig.colorbar(image, ax=list(axes), pad=0.02)
    bar.set_label(label[quantity])
    if quantity == "active_quantiles":
        percent(bar.ax.yaxis)
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig


def _stack(ax: Axes, layers: Layers) -> None:
    bottom = np.zeros(len(layers))
    width = np.array([layer["channels"] for layer in layers.values()], dtype=float)
    for state, (colour, hatch) in STATES.items():
        height = np.array([layer[state] for layer in layers.values()]) / width
        ax.bar(
            range(len(layers)), height, bottom=bottom, width=0.86, color=colour, hatch=hatch, edgecolor="white",
            linewidth=0,
        )  # fmt: skip
        bottom += height
    ax.set_ylim(0, 1)
    ax.set_xlim(-0.6, len(layers) - 0.4)
    ax.grid(False)
    percent(ax.yaxis)
    ax.set_yticks([0, 0.5, 1])
    ax.set_ylabel("channels (%)")


@styled
def channel_states(layers: Mapping[float, Layers], *, title: str = "") -> Figure:
    """Which channels are dynamic, static and removed, by layer: one row of stacked bars per budget.

    Args:
        layers: by budget; by layer: channels, dynamic, static, removed (of a run's metrics).
        title: above the panels.
    """
    names = list(next(iter(layers.values())))
    fig = Figure(figsize=(max(6.4, min(11, 1.5 + 0.3 * len(names))), 1.25 * len(layers) + 1.5), layout="constrained")
    axes = fig.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (budget, one) in zip(axes, layers.items(), strict=True):
        _stack(ax, one)
        gone = sum(layer["removed"] for layer in one.values()) / sum(layer["channels"] for layer in one.values())
        which = "unpruned" if budget == 1 else f"{times(budget)} fewer MACs"
        ax.set_title(f"{which}: {100 * gone:.0f} % of all channels removed", fontweight="normal")
    _sparse(axes[-1].xaxis, names)
    axes[-1].tick_params(axis="x", labelrotation=90, labelsize=7)
    axes[-1].set_xlabel("layer, input first")
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0, label=state)
        for state, (colour, hatch) in STATES.items()
    ]
    fig.legend(handles=handles, loc="outside upper right", ncols=3)
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig
