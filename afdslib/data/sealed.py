"""Splits whose test images cannot be read: for trials, which choose something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from afdslib.data.datasets import ImageDataset

if TYPE_CHECKING:
    from afdslib.data.load import Splits

__all__ = ["Sealed", "sealed"]


class Sealed(ImageDataset):
    """A test split that tells its size and its classes, and holds no image and no label.

    Reading from it is a fault of the program, so the error is no AFDSError.
    """

    def __init__(self, dataset: ImageDataset):
        super().__init__(np.empty(0), dataset.classes, size=dataset.size, augment=False)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a test image was asked for in a trial, which must choose without them")

    def raw(self, index: int) -> np.ndarray:
        raise RuntimeError("a test image was asked for in a trial, which must choose without them")


def sealed(splits: Splits) -> Splits:
    """The splits without test images."""
    return replace(splits, test=Sealed(splits.test))
