"""Which images are fitted, used for choosing, and tested on.

All draws are per class and depend on (seed, class name) only, through a permutation of which the fitted images are the
first: so the 30 images of a class are among its 60, and every method sees the same ones.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from afdslib.base.errors import AFDSError
from afdslib.data.datasets import generator
from afdslib.data.trees import TEST, TRAIN, UNSPLIT, VALIDATION, Listing

__all__ = ["Parts", "partition", "fixed_test", "alternate_test"]


@dataclass(frozen=True)
class Parts:
    """Rows of a Listing, each array sorted."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def _permutation(rows: np.ndarray, seed: int, name: str) -> np.ndarray:
    return rows[generator(seed, zlib.crc32(name.encode())).permutation(len(rows))]


def fixed_test(listing: Listing, count: int) -> np.ndarray:
    """Parts with `count` test images per class, drawn once for all seeds, the rest for training.

    Raises:
        AFDSError: a class has no image left for training
    """
    parts = listing.parts.copy()
    for label, name in enumerate(listing.classes):
        rows = np.flatnonzero(listing.targets == label)
        if len(rows) <= count:
            raise AFDSError(
                f"the class {name!r} has {len(rows)} images, of which {count} are for the test: it needs more"
            )
        parts[rows] = TRAIN
        parts[_permutation(rows, 0, name)[:count]] = TEST
    return parts


def alternate_test(listing: Listing) -> np.ndarray:
    """Parts for which, within each class, every second image in stored order is a test image, whatever the seed."""
    parts = np.full(len(listing.targets), TRAIN, dtype=np.int8)
    for label in range(len(listing.classes)):
        parts[np.flatnonzero(listing.targets == label)[1::2]] = TEST
    return parts


def _thirds(listing: Listing, seed: int) -> np.ndarray:
    """70/15/15 per class for a tree without a split; each class keeps at least one training image."""
    parts = listing.parts.copy()
    for label, name in enumerate(listing.classes):
        rows = _permutation(np.flatnonzero((listing.targets == label) & (parts == UNSPLIT)), seed, name)
        held = min(round(0.15 * len(rows)), (len(rows) - 1) // 2)
        parts[rows] = TRAIN
        parts[rows[:held]] = TEST
        parts[rows[held : 2 * held]] = VALIDATION
    return parts


def partition(
    listing: Listing,
    parts: np.ndarray,
    *,
    per_class: int | None,
    seed: int,
    validation_per_class: int,
    holdout: bool = True,
) -> Parts:
    """Draw the splits.

    Args:
        parts: int8 (N,) as in Listing, UNSPLIT where the seed is to split 70/15/15 per class
        per_class: fitting images per class; None for all but the validation images
        seed: of the draw
        validation_per_class: validation images per class when `per_class` is given (fewer where fewer are left)
        holdout: whether training images may be held back for validation; False fits all of them

    With an official validation part, that part is used as it is. Otherwise validation images are training images that
    are not fitted: `validation_per_class` of them, or a tenth of the training images when `per_class` is None.

    Raises:
        AFDSError: a class has fewer training images than `per_class`
    """
    if np.any(parts == UNSPLIT):
        parts = _thirds(listing, seed)
    own_validation = np.flatnonzero(parts == VALIDATION)
    train, validation = [], [own_validation]
    for label, name in enumerate(listing.classes):
        rows = _permutation(np.flatnonzero((listing.targets == label) & (parts == TRAIN)), seed, name)
        if not len(rows):
            raise AFDSError(f"the class {name!r} has no training image: add images to it, or remove the class")
        if per_class is None:
            held = 0 if len(own_validation) or not holdout else min(max(1, round(0.1 * len(rows))), len(rows) - 1)
            fit = len(rows) - held
        else:
            fit, held = per_class, 0 if len(own_validation) or not holdout else validation_per_class
            if len(rows) < fit:
                raise AFDSError(
                    f"the class {name!r} has {len(rows)} training images, fewer than per_class={per_class}: "
                    f"ask for at most {len(rows)}"
                )
        train.append(rows[:fit])
        validation.append(rows[fit : fit + held])
    return Parts(np.sort(np.concatenate(train)), np.sort(np.concatenate(validation)), np.flatnonzero(parts == TEST))
