"""Pictures of the data: samples by class, and one image under the training augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from afdslib.data import MEAN, STD, ImageDataset
from afdslib.report.plots.style import styled

__all__ = ["augmentations", "samples"]


def _bare(ax, image: np.ndarray) -> None:
    ax.imshow(image, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color("#bbbbbb")


def _short(text: str, length: int = 13) -> str:
    text = text.split(",")[0]
    return text if len(text) <= length else f"{text[: length - 1]}…"


@styled
def samples(
    dataset: ImageDataset, *, captions: Sequence[str] = (), classes: int = 10, per_class: int = 4, title: str = ""
) -> Figure:
    """A grid of images: one column per class, its name above.

    Args:
        dataset: shown as `raw` gives it: resized, but neither augmented nor normalised.
        captions: readable class names; default: the data set's own.
        classes: columns at most, evenly spaced over the classes.
        per_class: rows.
        title: above the grid.
    """
    names = captions or dataset.classes
    count = min(classes, len(names))
    chosen = [i * len(names) // count for i in range(count)]
    fig = Figure(figsize=(0.95 * count + 0.2, 0.95 * per_class + 0.6), layout="constrained")
    axes = fig.subplots(per_class, count, squeeze=False)
    for column, target in enumerate(chosen):
        found = np.flatnonzero(dataset.targets == target)[:per_class]
        for row in range(per_class):
            ax = axes[row, column]
            if row < len(found):
                _bare(ax, dataset.raw(int(found[row])))
            else:
                ax.set_axis_off()
        axes[0, column].set_title(_short(str(names[target])), fontsize=8, fontweight="normal", loc="center")
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold")
    return fig


@styled
def augmentations(dataset: ImageDataset, index: int = 0, *, epochs: int = 8, title: str = "") -> Figure:
    """One training image as the network sees it in the first epochs, beside the image itself."""
    mean, std = np.array(MEAN), np.array(STD)
    fig = Figure(figsize=(1.0 * (epochs + 1) + 0.2, 1.5), layout="constrained")
    axes = fig.subplots(1, epochs + 1)
    _bare(axes[0], dataset.raw(index))
    axes[0].set_title("as stored", fontsize=8, fontweight="normal", loc="center")
    before = dataset.epoch
    try:
        for epoch in range(epochs):
            dataset.set_epoch(epoch)
            image = dataset[index][0].permute(1, 2, 0).numpy() * std + mean
            _bare(axes[epoch + 1], image.clip(0, 1))
            axes[epoch + 1].set_title(f"epoch {epoch + 1}", fontsize=8, fontweight="normal", loc="center")
    finally:
        dataset.set_epoch(before)
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold")
    return fig
