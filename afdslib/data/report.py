"""What a data set holds: class counts, imbalance, and the table that `afds data NAME` prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from afdslib.data.datasets import ImageDataset
from afdslib.data.load import Splits, load

__all__ = ["imbalance", "describe", "detail", "prepare"]


def imbalance(split: ImageDataset) -> dict:
    """Images per class of one split.

    `counts`: class name -> images; `smallest`, `largest`: (class name, images); `ratio`: largest / smallest count,
    infinite if a class has no image.
    """
    counts = np.bincount(split.targets, minlength=len(split.classes))
    low, high = int(counts.argmin()), int(counts.argmax())
    return {
        "counts": dict(zip(split.classes, counts.tolist(), strict=True)),
        "smallest": (split.classes[low], int(counts[low])),
        "largest": (split.classes[high], int(counts[high])),
        "ratio": float(counts[high] / counts[low]) if counts[low] else float("inf"),
    }


def detail(split: ImageDataset, images: int = 256) -> float:
    """Mean absolute difference of neighbouring pixels, in grey levels 0..255, of images spread evenly. [ours]

    Splits of one data set that differ in it were scaled down by different filters; a network trained on one of them is
    then less often right on the other, for no reason that the task has.
    """
    chosen = np.unique(np.linspace(0, len(split) - 1, min(images, len(split))).round().astype(int))
    pixels = np.stack([split.raw(int(i)) for i in chosen]).astype(np.int16)
    return float(np.mean([np.abs(np.diff(pixels, axis=axis)).mean() for axis in (1, 2)]))


def describe(splits: Splits) -> pd.DataFrame:
    """One row per split: split, images, classes, smallest class, largest class (images), ratio of the two, `detail`.

    `statistics` holds the images of `train`, so it has no row of its own.
    """
    rows: list[tuple] = []
    for name, split in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if split is None:
            rows.append((name, 0, 0, 0, 0, float("nan"), float("nan")))
            continue
        held = imbalance(split)
        classes = int(np.count_nonzero(list(held["counts"].values())))
        numbers = held["smallest"][1], held["largest"][1], round(held["ratio"], 2), round(detail(split), 1)
        rows.append((name, len(split), classes, *numbers))
    columns = ("split", "images", "classes", "smallest class", "largest class", "ratio", "detail")
    return pd.DataFrame(rows, columns=columns)


def prepare(name: str, root: str | Path | None = None, **options) -> pd.DataFrame:
    """Load a data set (arguments as for `load`) and print `describe` of it (the command `afds data NAME`)."""
    splits = load(name, root, **options)
    table = describe(splits)
    note = f", {splits.note}" if splits.note else ""
    print(f"{splits.name}: {len(splits.classes)} classes, {splits.train.size} px{note}")
    print(table.to_string(index=False))
    if splits.skipped:
        print(f"left out, not decodable: {', '.join(splits.skipped)}")
    return table
