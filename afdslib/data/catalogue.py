"""The data sets by name: their files, layouts, readers and rules."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from afdslib.base.errors import AFDSError
from afdslib.data import imagenet, trees
from afdslib.data.sources import FILES, Remote
from afdslib.data.trees import TEST, TRAIN, Listing

__all__ = ["DataSet", "Layout", "NAMES", "SETS", "target_40"]


@dataclass(frozen=True)
class Layout:
    """One form in which a data set is found."""

    remotes: tuple[Remote, ...]  # its files
    markers: tuple[str, ...]  # paths below the folder of the extracted set, by which it is recognised
    read: trees.Reader  # from that folder to a Listing
    note: str = ""  # what a reader of results has to know about this form


@dataclass(frozen=True)
class DataSet:
    """A named data set."""

    base: str  # name of the set whose files and caches it uses
    layouts: tuple[Layout, ...]  # forms it may have, the preferred first; the last with addresses is downloaded
    size: int = 224  # default image side in pixels
    flip: bool = True  # whether a mirrored image still shows its class
    border: int | None = None  # grey level of the padding in augmentation; None for the mean colour
    parts: Callable[[Listing], np.ndarray] | None = None  # from a Listing to parts; the Listing's own where None
    choose: Callable[[tuple[str, ...]], list[str]] | None = None  # from all class names to those used; None for all
    validation_per_class: int = 100  # validation images per class when `per_class` is given
    expected: int = 0  # classes of a complete copy; 0 where that is not checked
    other: str = ""  # another set of the same images: where both are there, a sentence says which is read


def _cifar10_python(folder: Path) -> Listing:
    """CIFAR-10's original arrays through torchvision, which checks the md5 of every batch file."""
    from torchvision.datasets import CIFAR10

    try:
        both = [CIFAR10(folder, train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        place = folder / "cifar-10-batches-py"
        raise AFDSError(f"the folder {place} is incomplete or damaged: fetch the data set again") from error
    targets = np.concatenate([np.asarray(b.targets, dtype=np.int64) for b in both])
    parts = np.repeat(np.array([TRAIN, TEST], dtype=np.int8), [len(b.targets) for b in both])
    return Listing([], targets, parts, tuple(both[0].classes), images=np.concatenate([b.data for b in both]))


def digits() -> Listing:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey of 17 levels, as uint8 RGB; embedded in scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    parts, images = np.full(len(grey), trees.UNSPLIT, dtype=np.int8), np.repeat(grey[..., None], 3, axis=3)
    return Listing([], bunch.target.astype(np.int64), parts, tuple("0123456789"), images=images)


def target_40(classes: tuple[str, ...]) -> list[str]:
    """The 40 classes of the target set: the smallest sha256 of "afds-target40:" + class name, sorted. [ours]"""
    ranked = sorted(classes, key=lambda name: hashlib.sha256(f"afds-target40:{name}".encode()).hexdigest())
    return sorted(ranked[:40])


def _set(name: str, markers: tuple[str, ...], read: trees.Reader, **rules) -> DataSet:
    """A set of one layout."""
    return DataSet(name, (Layout(FILES[name], markers, read),), **rules)


def _tree(name: str, test: str, note: str = "", files: str = "") -> Layout:
    """An ImageFolder tree in a folder of the set's name; paths are relative to the folder above."""

    def read(folder: Path) -> Listing:
        listing = trees.image_folder(folder / name)
        # Stanford Dogs' folders are called by wnid and breed.
        named = tuple(re.sub(r"^n\d{8}-", "", one).replace("_", " ") for one in listing.classes)
        captions = listing.captions or (named if named != listing.classes else ())
        return replace(listing, relative=[f"{name}/{path}" for path in listing.relative], captions=captions)

    return Layout(FILES[files or name], (f"{name}/train", f"{name}/{test}"), read, note)


_CIFAR10 = (
    _tree("cifar10", "test", "stored as JPEG, so not bit-identical to the original arrays", "cifar10-jpeg"),
    Layout(FILES["cifar10"], ("cifar-10-batches-py",), _cifar10_python, "the original arrays"),
)
_TINY = DataSet("tiny-imagenet-32", (_tree("tiny-imagenet-32", "val", "stored as 32 px JPEG"),), size=32)
# A mirrored digit is another glyph. Writers are not known, so one may be in both halves.
_DIGITS = DataSet("digits", (), 32, flip=False, border=0, parts=trees.alternate_test, validation_per_class=20)

SETS: dict[str, DataSet] = {
    "stanford-dogs": _set("stanford-dogs", ("Images", "train_list.mat", "test_list.mat"), trees.stanford_dogs),
    # The dogs study fits 30 images per breed and chooses on 30 others. Dogs cut out by the first box of each image,
    # shorter side 144 px; or whole photographs, which are harder.
    "stanford-dogs-144": DataSet(
        "stanford-dogs-144",
        (_tree("stanford-dogs-144", "test", "dogs cut out by their bounding boxes, stored as 144 px WebP"),),
        validation_per_class=30, expected=120, other="stanford-dogs-60",
    ),
    "stanford-dogs-60": _set(
        "stanford-dogs", ("Images", "train_list.mat", "test_list.mat"), partial(trees.stanford_dogs, first=60),
        validation_per_class=30, expected=120, other="stanford-dogs-144",
    ),
    "caltech101-144": DataSet(
        "caltech101-144", (_tree("caltech101-144", "test", "stored as 144 px WebP, a split of its own"),), expected=100
    ),
    "mit-indoors": _set("mit-indoors", ("Images", "TrainImages.txt", "TestImages.txt"), trees.mit_indoors),
    # 20 test images per class [our reading]; they are the same for all seeds [ours].
    "caltech-256": _set(
        "caltech-256", ("256_ObjectCategories",), trees.caltech_256, parts=lambda one: trees.fixed_test(one, 20)
    ),
    "cub-200-2011": _set("cub-200-2011", ("CUB_200_2011/images", "CUB_200_2011/images.txt"), trees.cub_200_2011),
    "food-101": _set("food-101", ("food-101/images", "food-101/meta"), trees.food_101),
    "imagenet": _set("imagenet", ("train", "val"), imagenet.tree),
    "cifar10": DataSet("cifar10", _CIFAR10, size=32),
    "tiny-imagenet-32": _TINY,
    "tiny-imagenet-32-source160": replace(_TINY, choose=lambda classes: sorted(set(classes) - set(target_40(classes)))),
    "tiny-imagenet-32-target40": replace(_TINY, choose=target_40),
    "hymenoptera-160": DataSet("hymenoptera-160", (_tree("hymenoptera-160", "test"),)),
    "digits": _DIGITS,
    "digits-0-4": replace(_DIGITS, choose=lambda classes: list("01234")),
    "digits-5-9": replace(_DIGITS, choose=lambda classes: list("56789")),
}

NAMES = tuple(sorted(SETS))
