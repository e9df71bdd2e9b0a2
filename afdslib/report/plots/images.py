"""Pictures of images: samples, augmentation, AFD's attention, and the attention maps of several networks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from afdslib.base.atomic import atomic_path
from afdslib.data import MEAN, STD, ImageDataset
from afdslib.inference.maps import MapsView
from afdslib.report.plots.style import PHONE, canvas, narrow, styled
from afdslib.report.tables import place
from afdslib.report.views import AttentionView


def _show(ax: Axes, image: np.ndarray | None, caption: str = "", heat: np.ndarray | None = None, **kwargs) -> None:
    """An image under its caption; with a map, from 0 to 1, the image in grey under the map, enlarged to its size."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.set_frame_on(False)
    ax.set_title(caption, fontsize=8, fontweight="normal", loc="center")
    if image is None:
        return
    if heat is None:
        ax.imshow(image, interpolation="nearest")
        return
    extent = (0, image.shape[1], image.shape[0], 0)
    ax.imshow(image.mean(2), cmap="gray", extent=extent, vmin=0, vmax=255)
    ax.imshow(heat, cmap="inferno", alpha=0.6, extent=extent, vmin=0, vmax=1, **kwargs)


def _short(text: str, length: int = 13) -> str:
    text = text.split(",")[0]
    return text if len(text) <= length else f"{text[: length - 1]}…"


@styled
def samples(dataset: ImageDataset, *, captions: Sequence[str] = (), per_class: int = 4, title: str = "") -> Figure:
    """A grid of images, resized but neither augmented nor normalised: a column for each of ten classes at most."""
    names = captions or dataset.classes
    count = min(5 if narrow() else 10, len(names))
    fig, axes = canvas(0.95 * count + 0.2, 0.95 * per_class + 0.6, per_class, count, title=title, stack=False)
    for column, target in enumerate(i * len(names) // count for i in range(count)):
        found = np.flatnonzero(dataset.targets == target)[:per_class]
        for row, ax in enumerate(axes[:, column]):
            image = dataset.raw(int(found[row])) if row < len(found) else None
            _show(ax, image, "" if row else _short(str(names[target])))
    return fig


@styled
def mistakes(dataset: ImageDataset, found: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """The images that a network is surest about and wrong: what it says, how surely, and what is true."""
    fig, axes = canvas(8.4, 4.2, 2, 5, title=title)
    for ax, one in itertools.zip_longest(axes.flat, found):
        said = "" if one is None else f"{_short(one['said'])}, {one['probability']:.0%}\nis {_short(one['true'])}"
        _show(ax, None if one is None else dataset.raw(one["image"]), said)
    return fig


@styled
def augmentations(dataset: ImageDataset, index: int = 0, *, epochs: int = 8, title: str = "") -> Figure:
    """One training image as the network sees it in the first epochs, beside the image itself."""
    epochs = min(epochs, 3) if narrow() else epochs
    fig, (axes,) = canvas(1.0 * (epochs + 1) + 0.2, 1.5, 1, epochs + 1, what="Augmentation", title=title, stack=False)
    _show(axes[0], dataset.raw(index), "as stored")
    before = dataset.epoch
    try:
        for epoch, ax in enumerate(axes[1:]):
            dataset.set_epoch(epoch)
            image = dataset[index][0].permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)
            _show(ax, image.clip(0, 1), f"epoch {epoch + 1}")
    finally:
        dataset.set_epoch(before)
    return fig


@styled
def attention(view: AttentionView, *, top: int = 4, title: str = "") -> Figure:
    """`views.attention` of one image: every channel's weight against uniform, and where the top channels respond."""
    living = int((view.weights > 0).sum())
    order = np.argsort(-view.weights, kind="stable")[:living]
    top = min(top, 2) if narrow() else top
    fig = Figure(figsize=(PHONE if narrow() else 9.6, 4.5), layout="constrained")
    panels: Any = fig.subfigures(2, 1, height_ratios=[1.2, 1])
    upper, lower = panels
    ax = upper.subplots()
    colours = ["#D55E00"] * top + ["#8C8C8C"] * (living - top)
    ax.bar(range(living), 100 * (view.weights[order] * living - 1), width=0.85, color=colours[:living])
    ax.axhline(0, color="black", linewidth=1)
    ax.set_xlim(-1, living)
    ax.margins(y=0.12)
    label = f"the {living} channels of {view.layer}, largest attention first (coloured: shown below)"
    ax.set(xlabel=label, ylabel="attention ρ against\nuniform attention (%)")
    axes = lower.subplots(1, top + 2)
    _show(axes[0], view.image, f"image, class {view.caption}")
    heats = [(f"channel {channel}", view.maps[channel]) for channel in order[:top]]
    heats.append(("all, weighted by ρ", np.tensordot(view.weights, view.maps, 1)))
    for ax, (caption, heat) in zip(axes[1:], heats, strict=True):
        span = np.ptp(heat)
        _show(ax, view.image, caption, (heat - heat.min()) / (span if span > 0 else 1), interpolation="bilinear")
    if title:
        upper.suptitle(place(title), fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig


@styled
def attention_maps(view: MapsView, *, title: str = "") -> Figure:
    """`maps.look_at` of one image, one row per network: the activation map of each stage, then the gradient map."""
    columns, rows = max(len(seen.stages) for seen in view.networks.values()) + 2, len(view.networks)
    title = title or f"image of class {view.caption}"
    size = 1.55 * columns + 0.2, 1.62 * rows + 0.4
    fig, axes = canvas(*size, rows, columns, what="Attention maps", title=title, stack=False)
    for line, (name, seen) in zip(axes, view.networks.items(), strict=True):
        for ax in line:
            _show(ax, None)
        _show(line[0], view.image, f"says {seen.prediction}")
        line[0].set_ylabel(name, fontsize=8.5)
        heats = {f"{stage}, {heat.shape[0]}x{heat.shape[1]}": heat for stage, heat in seen.stages.items()}
        for ax, (caption, heat) in zip(line[1:-1], heats.items(), strict=False):
            _show(ax, view.image, caption, heat / (heat.max() or 1))
        _show(line[-1], view.image, "gradient of the loss", seen.gradient / (seen.gradient.max() or 1))
    return fig


def draw_maps(view: MapsView, output: str | Path) -> Path:
    """Writes `attention_maps` as a PNG, for `afds maps`."""
    output, figure = Path(output), attention_maps(view)
    with atomic_path(output) as part:
        figure.savefig(part, format="png", dpi=150)
    return output
