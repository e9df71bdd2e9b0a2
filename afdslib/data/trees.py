"""The folder layouts of the data sets: each reader turns an extracted folder into one Listing.

Read against the published descriptions and small fixtures of the same form; of the real downloads only the three
development archives (ImageFolder trees) have been read. Not run against the real download: Stanford Dogs, MIT Indoors,
Caltech-256, CUB-200-2011, Food-101 and CIFAR-10's python archive.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from afdslib.base.errors import AFDSError

__all__ = [
    "TRAIN",
    "VALIDATION",
    "TEST",
    "UNSPLIT",
    "Listing",
    "image_folder",
    "stanford_dogs",
    "mit_indoors",
    "caltech_256",
    "cub_200_2011",
    "food_101",
    "subset",
]

TRAIN, VALIDATION, TEST, UNSPLIT = 0, 1, 2, -1

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Listing:
    """What a data set holds, before anything is decoded.

    Attributes:
        relative: image paths below the folder (empty for arrays)
        targets: int64 (N,)
        parts: int8 (N,): TRAIN, VALIDATION, TEST, or UNSPLIT where the set has no official split
        classes: names, indexed by target
        captions: readable names where `classes` are codes, else empty
        images: uint8 (N, H, W, 3) for sets that come as arrays
    """

    relative: list[str]
    targets: np.ndarray
    parts: np.ndarray
    classes: tuple[str, ...]
    captions: tuple[str, ...] = ()
    images: np.ndarray | None = field(default=None, repr=False)


def _listing(rows: list[tuple[str, int, int]], classes: list[str]) -> Listing:
    rows = sorted(rows)
    return Listing(
        [r[0] for r in rows],
        np.array([r[1] for r in rows], dtype=np.int64),
        np.array([r[2] for r in rows], dtype=np.int8),
        tuple(classes),
    )


def _folders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith((".", "__MACOSX")))


def _images(folder: Path) -> list[str]:
    return sorted(
        e.name
        for e in os.scandir(folder)
        if not e.name.startswith(".") and e.name.lower().endswith(EXTENSIONS) and e.is_file()
    )


def _text(folder: Path, name: str) -> list[str]:
    try:
        return [line.strip() for line in (folder / name).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AFDSError(f"the list {folder / name} cannot be read ({error}): fetch the data set again") from error


def _listed(folder: Path, name: str, relative: str) -> str:
    """A path from a list file: it must stay below the folder."""
    if relative.startswith("/") or ".." in Path(relative).parts:
        raise AFDSError(
            f"the list {folder / name} names {relative!r}, a file outside its folder: fetch the data set again"
        )
    return relative


def image_folder(folder: Path) -> Listing:
    """An ImageFolder tree: `train/`, `val/` or `validation/`, `test/` with a folder per class, or a flat one.

    A single folder around the tree is stepped into. Without `test/`, `val/` takes its place and the validation images
    are drawn from `train/`. A `classes.tsv` (class, readable name) beside them gives captions.

    Raises:
        AFDSError: no such tree, an empty class, or a test class that training lacks
    """
    start = folder
    names = _folders(folder)
    while len(names) == 1 and names[0] != "train" and _folders(folder / names[0]):
        folder, names = folder / names[0], _folders(folder / names[0])
    validation = next((n for n in ("val", "validation", "valid") if n in names), None)
    if "train" in names:
        parts = {"train": TRAIN}
        if "test" in names:
            parts["test"] = TEST
            if validation:
                parts[validation] = VALIDATION
        elif validation:
            parts[validation] = TEST
        else:
            raise AFDSError(
                f"the folder {folder} has train/ but neither test/ nor val/: add one, or give the folder of classes"
            )
        classes = _folders(folder / "train")
    else:
        parts = {"": UNSPLIT}
        classes = names
    if len(classes) < 2:
        raise AFDSError(
            f"the folder {folder} is no ImageFolder tree of at least two classes (found {len(classes)}): "
            "it needs train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg"
        )
    prefix = folder.relative_to(start)
    rows = []
    for name, part in parts.items():
        present = _folders(folder / name)
        unknown = sorted(set(present) - set(classes))
        if unknown:
            raise AFDSError(
                f"the class {unknown[0]!r} of {folder / name} has no folder in {folder / 'train'}: add it, or remove it"
            )
        for label, one in enumerate(classes):
            images = _images(folder / name / one) if one in present else []
            if not images and part in (TRAIN, UNSPLIT):
                raise AFDSError(f"the class folder {folder / name / one} holds no image: fill it, or remove it")
            rows += [((prefix / name / one / i).as_posix(), label, part) for i in images]
    return replace(_listing(rows, classes), captions=_captions(folder, classes))


def _captions(folder: Path, classes: list[str]) -> tuple[str, ...]:
    """Readable names from `classes.tsv` (class, tab, name), or nothing where there is no such file."""
    if not (folder / "classes.tsv").is_file():
        return ()
    names = dict(line.split("\t", 1) for line in _text(folder, "classes.tsv") if "\t" in line)
    return tuple(names.get(one, one) for one in classes)


def stanford_dogs(folder: Path) -> Listing:
    """Stanford Dogs 120: `Images/<class>/*.jpg` and the official `train_list.mat` (100 per class), `test_list.mat`."""
    from scipy.io import loadmat

    rows, names = [], {}
    for name, part in (("train_list.mat", TRAIN), ("test_list.mat", TEST)):
        try:
            lists = loadmat(folder / name)
            files = [str(cell[0][0]) for cell in lists["file_list"]]
            labels = [int(label) - 1 for label in lists["labels"].reshape(-1)]
        except Exception as error:  # scipy raises many kinds for a damaged .mat
            raise AFDSError(f"the list {folder / name} cannot be read ({error}): fetch the data set again") from error
        for file, label in zip(files, labels, strict=True):
            rows.append(("Images/" + _listed(folder, name, file), label, part))
            names[label] = file.split("/")[0].split("-", 1)[-1]
    new = {label: i for i, label in enumerate(sorted(names))}
    return _listing([(file, new[label], part) for file, label, part in rows], [names[label] for label in new])


def mit_indoors(folder: Path) -> Listing:
    """MIT Indoors 67: `Images/<class>/*`, official lists, about 80 training and 20 test images per class."""
    found = []
    for name, part in (("TrainImages.txt", TRAIN), ("TestImages.txt", TEST)):
        found += [(_listed(folder, name, line), part) for line in _text(folder, name)]
    classes = sorted({file.split("/")[0] for file, _ in found})
    label = {name: i for i, name in enumerate(classes)}
    return _listing([("Images/" + file, label[file.split("/")[0]], part) for file, part in found], classes)


def caltech_256(folder: Path) -> Listing:
    """Caltech-256: `256_ObjectCategories/NNN.name/*.jpg`, no official split; class 257 (clutter) is left out."""
    base = folder / "256_ObjectCategories"
    folders = [n for n in _folders(base) if n[:3].isdigit() and n[3:4] == "." and not n.startswith("257.")]
    rows = []
    for label, name in enumerate(folders):  # stray files and sub-folders of the real archive are no images of a class
        rows += [(f"256_ObjectCategories/{name}/{i}", label, UNSPLIT) for i in _images(base / name)]
    return _listing(rows, [n.split(".", 1)[1] for n in folders])


def cub_200_2011(folder: Path) -> Listing:
    """CUB-200-2011: `images.txt`, `image_class_labels.txt`, `train_test_split.txt` (1 is train), `classes.txt`."""
    base = folder / "CUB_200_2011"
    table = {}
    for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"):
        try:
            table[name] = {int(key): value for key, value in (line.split(maxsplit=1) for line in _text(base, name))}
        except ValueError as error:
            raise AFDSError(f"the list {base / name} is damaged ({error}): fetch the data set again") from error
    classes = [name.split(".", 1)[-1] for _, name in sorted(table["classes.txt"].items())]
    rows = []
    for key, file in table["images.txt"].items():
        try:
            label, train = int(table["image_class_labels.txt"][key]) - 1, int(table["train_test_split.txt"][key])
        except KeyError as error:
            raise AFDSError(
                f"the image {key} of {base / 'images.txt'} has no label or split: fetch the data set again"
            ) from error
        rows.append(("CUB_200_2011/images/" + _listed(base, "images.txt", file), label, TRAIN if train else TEST))
    return _listing(rows, classes)


def food_101(folder: Path) -> Listing:
    """Food-101: `meta/train.txt`, `meta/test.txt` with lines `class/number`, images in `images/class/number.jpg`."""
    meta = folder / "food-101" / "meta"
    found = []
    for name, part in (("train.txt", TRAIN), ("test.txt", TEST)):
        found += [(_listed(meta, name, line), part) for line in _text(meta, name)]
    classes = sorted({file.split("/")[0] for file, _ in found})
    label = {name: i for i, name in enumerate(classes)}
    return _listing([(f"food-101/images/{file}.jpg", label[file.split("/")[0]], part) for file, part in found], classes)


def subset(listing: Listing, classes: list[str]) -> tuple[Listing, np.ndarray]:
    """The listing of some classes, targets renumbered in their order, and the rows kept."""
    new = {listing.classes.index(name): i for i, name in enumerate(classes)}
    rows = np.flatnonzero(np.isin(listing.targets, list(new)))
    targets = np.array([new[t] for t in listing.targets[rows].tolist()], dtype=np.int64)
    relative = [listing.relative[r] for r in rows] if listing.relative else []
    captions = tuple(listing.captions[old] for old in new) if listing.captions else ()
    return Listing(relative, targets, listing.parts[rows], tuple(classes), captions), rows


Reader = Callable[[Path], Listing]
