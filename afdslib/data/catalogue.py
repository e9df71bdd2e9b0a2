"""The data sets by name: their files, layouts, readers and rules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from afdslib.base.errors import AFDSError
from afdslib.data import imagenet, splits, trees
from afdslib.data.sources import FILES, Remote
from afdslib.data.trees import TEST, TRAIN, Listing

__all__ = ["Layout", "DataSet", "SETS", "NAMES", "target_40"]


@dataclass(frozen=True)
class Layout:
    """One form in which a data set is found.

    Attributes:
        remotes: its files
        markers: paths that exist below a folder that holds the extracted set
        read: from that folder to a Listing
        note: what a reader of results has to know about this form
    """

    remotes: tuple[Remote, ...]
    markers: tuple[str, ...]
    read: Callable[[Path], Listing]
    note: str = ""


@dataclass(frozen=True)
class DataSet:
    """A named data set.

    Attributes:
        base: name of the set whose files and caches it uses
        layouts: forms it may have, the preferred first; the last with addresses is the one downloaded
        size: default image side in pixels
        flip: whether a mirrored image still shows its class
        border: grey level of the padding in augmentation; None for the mean colour
        parts: from a Listing to parts; the Listing's own where None
        choose: from all class names to those used; all where None
        validation_per_class: validation images per class when `per_class` is given
    """

    base: str
    layouts: tuple[Layout, ...]
    size: int = 224
    flip: bool = True
    border: int | None = None
    parts: Callable[[Listing], np.ndarray] | None = None
    choose: Callable[[tuple[str, ...]], list[str]] | None = None
    validation_per_class: int = 100


def _cifar10_python(folder: Path) -> Listing:
    """CIFAR-10's original arrays through torchvision, which checks the md5 of every batch file."""
    from torchvision.datasets import CIFAR10

    try:
        both = [CIFAR10(folder, train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise AFDSError(
            f"the folder {folder / 'cifar-10-batches-py'} is incomplete or damaged: fetch the data set again"
        ) from error
    targets = np.concatenate([np.asarray(b.targets, dtype=np.int64) for b in both])
    parts = np.repeat(np.array([TRAIN, TEST], dtype=np.int8), [len(b.targets) for b in both])
    return Listing([], targets, parts, tuple(both[0].classes), images=np.concatenate([b.data for b in both]))


def digits() -> Listing:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey of 17 levels, as uint8 RGB; embedded in scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    parts = np.full(len(grey), trees.UNSPLIT, dtype=np.int8)
    return Listing(
        [], bunch.target.astype(np.int64), parts, tuple("0123456789"), images=np.repeat(grey[..., None], 3, axis=3)
    )


def target_40(classes: tuple[str, ...]) -> list[str]:
    """The 40 classes of the target set: the smallest sha256 of "afds-target40:" + class name, in sorted order. [ours]

    A rule that no library's random generator can change.
    """
    ranked = sorted(classes, key=lambda name: hashlib.sha256(f"afds-target40:{name}".encode()).hexdigest())
    return sorted(ranked[:40])


def _source_160(classes: tuple[str, ...]) -> list[str]:
    target = set(target_40(classes))
    return [name for name in classes if name not in target]


def _one(name: str, markers: tuple[str, ...], read: Callable[[Path], Listing], note: str = "") -> tuple[Layout, ...]:
    return (Layout(FILES[name], markers, read, note),)


def _below(folder_name: str) -> Callable[[Path], Listing]:
    """Read the ImageFolder tree in a sub-folder, with paths relative to the folder above."""

    def read(folder: Path) -> Listing:
        found = trees.image_folder(folder / folder_name)
        relative = [f"{folder_name}/{name}" for name in found.relative]
        return replace(found, relative=relative)

    return read


_TINY = _one(
    "tiny-imagenet-32",
    ("tiny-imagenet-32/train", "tiny-imagenet-32/val"),
    _below("tiny-imagenet-32"),
    "stored as 32 px JPEG",
)


def _digits(chosen: str | None) -> DataSet:
    """All or some digits. A mirrored digit is another glyph. Writers are not known, so one may be in both halves."""
    return DataSet(
        "digits",
        (),
        size=32,
        flip=False,
        border=0,
        parts=splits.alternate_test,
        choose=None if chosen is None else lambda classes: list(chosen),
        validation_per_class=20,
    )


SETS: dict[str, DataSet] = {
    "stanford-dogs": DataSet(
        "stanford-dogs",
        _one("stanford-dogs", ("Images", "train_list.mat", "test_list.mat"), trees.stanford_dogs),
    ),
    "mit-indoors": DataSet(
        "mit-indoors", _one("mit-indoors", ("Images", "TrainImages.txt", "TestImages.txt"), trees.mit_indoors)
    ),
    # 20 test images per class [our reading]; they are the same for all seeds [ours].
    "caltech-256": DataSet(
        "caltech-256",
        _one("caltech-256", ("256_ObjectCategories",), trees.caltech_256),
        parts=lambda listing: splits.fixed_test(listing, 20),
    ),
    "cub-200-2011": DataSet(
        "cub-200-2011",
        _one("cub-200-2011", ("CUB_200_2011/images", "CUB_200_2011/images.txt"), trees.cub_200_2011),
    ),
    "food-101": DataSet("food-101", _one("food-101", ("food-101/images", "food-101/meta"), trees.food_101)),
    "imagenet": DataSet("imagenet", _one("imagenet", ("train", "val"), imagenet.tree)),
    "cifar10": DataSet(
        "cifar10",
        (
            Layout(
                FILES["cifar10-jpeg"],
                ("cifar10/train", "cifar10/test"),
                _below("cifar10"),
                "stored as JPEG, so not bit-identical to the original arrays",
            ),
            Layout(FILES["cifar10"], ("cifar-10-batches-py",), _cifar10_python, "the original arrays"),
        ),
        size=32,
    ),
    "tiny-imagenet-32": DataSet("tiny-imagenet-32", _TINY, size=32),
    "tiny-imagenet-32-source160": DataSet("tiny-imagenet-32", _TINY, size=32, choose=_source_160),
    "tiny-imagenet-32-target40": DataSet("tiny-imagenet-32", _TINY, size=32, choose=target_40),
    "hymenoptera-160": DataSet(
        "hymenoptera-160",
        _one("hymenoptera-160", ("hymenoptera-160/train", "hymenoptera-160/test"), _below("hymenoptera-160")),
    ),
    "digits": _digits(None),
    "digits-0-4": _digits("01234"),
    "digits-5-9": _digits("56789"),
}

NAMES = tuple(sorted(SETS))
