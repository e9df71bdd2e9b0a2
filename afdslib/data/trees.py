"""The folder layouts of the data sets: each reader turns a folder into a Listing, from which the splits are drawn.

Read against the published descriptions and small fixtures of the same form; of the real downloads only the three
development archives (ImageFolder trees) have been read. Not run against the real download: Stanford Dogs, MIT Indoors,
Caltech-256, CUB-200-2011, Food-101 and CIFAR-10's python archive.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from afdslib.base.errors import AFDSError
from afdslib.data.datasets import generator

__all__ = [
    "TRAIN", "VALIDATION", "TEST", "UNSPLIT", "Listing", "Reader", "caltech_256", "cub_200_2011", "folders", "food_101",
    "image_folder", "images", "mit_indoors", "stanford_dogs",
]  # fmt: skip

TRAIN, VALIDATION, TEST, UNSPLIT = 0, 1, 2, -1

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".ppm", ".pgm")
"""Suffixes of images, in small letters. In a user's own tree other files are opened to see whether they are one."""

_SPLITS = {
    "train": TRAIN, "training": TRAIN, "val": VALIDATION, "validation": VALIDATION, "valid": VALIDATION, "test": TEST,
    "testing": TEST,
}  # fmt: skip


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
        left_out: files of a user's own tree that no class takes
    """

    relative: list[str]
    targets: np.ndarray
    parts: np.ndarray
    classes: tuple[str, ...]
    captions: tuple[str, ...] = ()
    images: np.ndarray | None = field(default=None, repr=False)
    left_out: tuple[str, ...] = ()

    def take(self, rows: np.ndarray) -> Listing:
        """The listing of some images; `images` stay behind."""
        relative = [self.relative[r] for r in rows] if self.relative else []
        return replace(self, relative=relative, targets=self.targets[rows], parts=self.parts[rows], images=None)

    def of_classes(self, names: list[str]) -> tuple[Listing, np.ndarray]:
        """The listing of some classes, targets renumbered in their order, and the rows taken."""
        new = {self.classes.index(name): i for i, name in enumerate(names)}
        rows = np.flatnonzero(np.isin(self.targets, list(new)))
        taken = self.take(rows)
        targets = np.array([new[t] for t in taken.targets.tolist()], dtype=np.int64)
        captions = tuple(self.captions[old] for old in new) if self.captions else ()
        return replace(taken, targets=targets, classes=tuple(names), captions=captions), rows


Reader = Callable[[Path], Listing]


def _listing(rows: Iterable[tuple[str, int, int]], classes: Iterable[str], **more) -> Listing:
    relative, targets, parts = zip(*sorted(rows), strict=True)
    return Listing(
        list(relative), np.array(targets, dtype=np.int64), np.array(parts, dtype=np.int8), tuple(classes), **more
    )


def folders(folder: Path) -> list[str]:
    """Names of the visible folders right in a folder."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith((".", "__MACOSX")))


def images(folder: Path) -> list[str]:
    """Names of the images right in a folder, by their suffix."""
    return sorted(
        e.name
        for e in os.scandir(folder)
        if not e.name.startswith(".") and e.name.lower().endswith(EXTENSIONS) and not e.is_dir()
    )


# ---------------------------------------------------------------------------------------------------- a user's own tree


def _files(folder: Path) -> Iterator[Path]:
    """Every visible file below a folder. Links are followed, but into no folder twice."""

    def refuse(error: OSError) -> None:
        raise AFDSError(f"the folder {error.filename} cannot be read ({error.strerror}): mend its permissions")

    seen = set()
    for base, names, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(base)
        names[:] = [] if real in seen else [n for n in names if not n.startswith((".", "__MACOSX"))]
        if real not in seen:
            yield from (Path(base, name) for name in files if not name.startswith("."))
        seen.add(real)


def _is_image(file: Path) -> bool:
    if file.name.lower().endswith(EXTENSIONS):
        return True
    try:
        with Image.open(file):  # reads the header only
            return True
    except Exception:  # Pillow's readers raise many kinds
        return False


def image_folder(folder: Path) -> Listing:
    """An ImageFolder tree: folders of classes in `train/`, `val/` and `test/`, or a flat tree of classes.

    Also `training`, `validation`, `valid` and `testing`, in any case. A single folder around the tree is stepped into.
    Images in sub-folders belong to the class. Without a test folder the validation folder takes its place, and
    validation images are drawn from the training images. A `classes.tsv` (class, tab, readable name) gives captions.

    Raises:
        AFDSError: no such tree, an empty class, or a test class that training lacks
    """
    start, names = folder, folders(folder)
    while len(names) == 1 and names[0].lower() not in _SPLITS and folders(folder / names[0]):
        folder, names = folder / names[0], folders(folder / names[0])
    parts = {name: _SPLITS[name.lower()] for name in names if name.lower() in _SPLITS}
    train = next((name for name, part in parts.items() if part == TRAIN), None)
    if len(set(parts.values())) < len(parts):
        raise AFDSError(f"the folder {folder} has two folders of one purpose ({', '.join(parts)}): rename one")
    if train is None and parts and len(parts) == len(names):
        raise AFDSError(f"the folder {folder} has {', '.join(parts)}, but no train/: add it")
    if train is None:
        parts, classes = {"": UNSPLIT}, names
    else:
        if len(parts) == 1:
            raise AFDSError(
                f"the folder {folder} has {train}/ but neither test/ nor val/: add one, or give the folder of classes"
            )
        if TEST not in parts.values():
            parts = {name: TRAIN if part == TRAIN else TEST for name, part in parts.items()}
        classes = folders(folder / train)
    if len(classes) < 2:
        raise AFDSError(
            f"the folder {folder} is no ImageFolder tree of at least two classes ({len(classes)} there): "
            "it needs train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg"
        )
    rows: list[tuple[str, int, int]] = []
    left_out: list[Path] = []
    # Beside folders of classes only images are worth a word.
    for name in {"", *parts}:
        left_out += [folder / name / image for image in images(folder / name)]
    for name in names if train is not None else ():
        if name not in parts:
            left_out += [file for file in _files(folder / name) if file.name.lower().endswith(EXTENSIONS)]
    for name, part in parts.items():
        present = folders(folder / name)
        if unknown := sorted(set(present) - set(classes)):
            raise AFDSError(
                f"the class {unknown[0]!r} of {folder / name} has no folder in {folder / str(train)}: add it, or "
                "remove it"
            )
        for label, one in enumerate(classes):
            files = list(_files(folder / name / one)) if one in present else []
            taken = [file for file in files if _is_image(file)]
            left_out += set(files) - set(taken)
            if not taken and part in (TRAIN, UNSPLIT):
                other = f" that Pillow can read, but {len(files)} other files" if files else ""
                raise AFDSError(f"the class folder {folder / name / one} holds no image{other}: fill it, or remove it")
            rows += [(file.relative_to(start).as_posix(), label, part) for file in taken]
    ignored = tuple(sorted(file.relative_to(start).as_posix() for file in left_out))
    return _listing(rows, classes, captions=_captions(folder, classes), left_out=ignored)


def _captions(folder: Path, classes: list[str]) -> tuple[str, ...]:
    """Readable names from `classes.tsv`, or nothing where there is no such file."""
    if not (folder / "classes.tsv").is_file():
        return ()
    lines = [line.split("\t", 1) for line in _lines(folder / "classes.tsv")]
    if bad := next((line[0] for line in lines if len(line) < 2), None):
        raise _damaged(folder / "classes.tsv", f"the line {bad[:60]!r} is not a class, a tab and its name")
    captions = dict(lines)
    return tuple(captions.get(one, one) for one in classes)


# ------------------------------------------------------------------------------------------------------- published sets


def _damaged(file: Path, why: object) -> AFDSError:
    return AFDSError(f"the list {file} is damaged or of another data set ({why}): fetch it again")


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AFDSError(f"the list {file} cannot be read ({error}): fetch the data set again") from error
    if "\0" in text:
        raise _damaged(file, "it is no UTF-8 text")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _listed(file: Path, relative: str) -> tuple[str, str]:
    """Class folder and image path from a list file, `class/name`: it must stay below the folder."""
    if relative.startswith("/") or ".." in Path(relative).parts:
        raise AFDSError(f"the list {file} names {relative!r}, a file outside its folder: fetch the data set again")
    one, slash, name = relative.partition("/")
    if not slash or not one or not name:
        raise _damaged(file, f"{relative[:60]!r} is not of the form class/image")
    return one, relative


def _two_lists(lists: Iterable[tuple[Path, int]]) -> tuple[list[tuple[str, str, int]], list[str]]:
    """(class, path, part) of a training and a test list, and the classes in order."""
    rows = [(*_listed(file, line), part) for file, part in lists for line in _lines(file)]
    file = next(iter(lists))[0]
    if both := {path for _, path, part in rows if part == TRAIN} & {path for _, path, part in rows if part == TEST}:
        raise _damaged(file, f"{min(both)} is in the test list beside it, too")
    if len(classes := sorted({one for one, _, _ in rows})) < 2:
        raise _damaged(file, f"it names {len(classes)} classes")
    return rows, classes


def stanford_dogs(folder: Path) -> Listing:
    """Stanford Dogs 120: `Images/<class>/*.jpg` and the official `train_list.mat` (100 per class), `test_list.mat`."""
    from scipy.io import loadmat

    rows: list[tuple[str, int, int]] = []
    names: dict[int, str] = {}
    for file, part in ((folder / "train_list.mat", TRAIN), (folder / "test_list.mat", TEST)):
        try:
            lists = loadmat(file)
            files = [str(cell[0][0]) for cell in lists["file_list"]]
            labels = [int(label) for label in lists["labels"].reshape(-1)]
        except Exception as error:  # scipy raises many kinds for a damaged .mat
            raise AFDSError(f"the list {file} cannot be read ({error}): fetch the data set again") from error
        if len(files) != len(labels):
            raise _damaged(file, f"it has {len(files)} images and {len(labels)} labels")
        for name, label in zip(files, labels, strict=True):
            one, path = _listed(file, name)
            if names.setdefault(label, one) != one:
                raise _damaged(file, f"the label {label} is of {names[label]} and of {one}")
            rows.append((f"Images/{path}", label, part))
    if len(set(names.values())) < max(2, len(names)):
        raise _damaged(folder / "train_list.mat", f"it has {len(names)} labels of {len(set(names.values()))} classes")
    new = {label: i for i, label in enumerate(sorted(names))}
    classes = [names[label].split("-", 1)[-1] for label in new]
    return _listing([(file, new[label], part) for file, label, part in rows], classes)


def mit_indoors(folder: Path) -> Listing:
    """MIT Indoors 67: `Images/<class>/*`, official lists, about 80 training and 20 test images per class."""
    rows, classes = _two_lists(((folder / "TrainImages.txt", TRAIN), (folder / "TestImages.txt", TEST)))
    return _listing([(f"Images/{path}", classes.index(one), part) for one, path, part in rows], classes)


def food_101(folder: Path) -> Listing:
    """Food-101: `meta/train.txt`, `meta/test.txt` with lines `class/number`, images in `images/class/number.jpg`."""
    meta = folder / "food-101" / "meta"
    rows, classes = _two_lists(((meta / "train.txt", TRAIN), (meta / "test.txt", TEST)))
    return _listing([(f"food-101/images/{path}.jpg", classes.index(one), part) for one, path, part in rows], classes)


def caltech_256(folder: Path) -> Listing:
    """Caltech-256: `256_ObjectCategories/NNN.name/*.jpg`, no official split; class 257 (clutter) is left out."""
    base = folder / "256_ObjectCategories"
    names = [n for n in folders(base) if n[:3].isdigit() and n[3:4] == "." and not n.startswith("257.")]
    # Stray files and sub-folders of the real archive are no images of a class.
    rows = [
        (f"256_ObjectCategories/{name}/{image}", label, UNSPLIT)
        for label, name in enumerate(names)
        for image in images(base / name)
    ]
    if not rows:
        raise AFDSError(f"the folder {base} holds no folders NNN.name of images: fetch the data set again")
    return _listing(rows, [n.split(".", 1)[1] for n in names])


def cub_200_2011(folder: Path) -> Listing:
    """CUB-200-2011: `images.txt`, `image_class_labels.txt`, `train_test_split.txt` (1 is train), `classes.txt`."""
    base = folder / "CUB_200_2011"

    def table(name: str, choices: Iterable[str] | None = None) -> dict[str, str]:
        """The two columns of a list, keyed by the first; each value must be one of `choices`."""
        rows = [line.split(maxsplit=1) for line in _lines(base / name)]
        for row in rows:
            if len(row) < 2 or not row[0].isdecimal() or (choices is not None and row[1] not in choices):
                raise _damaged(base / name, f"the line {' '.join(row)[:60]!r} is not of its form")
        found = {key: value for key, value in rows}
        if len(found) < len(rows) or len(found) < 2:
            raise _damaged(base / name, f"it has {len(rows)} lines for {len(found)} numbers")
        return found

    names = table("classes.txt")
    labels, train = table("image_class_labels.txt", names), table("train_test_split.txt", ("0", "1"))
    new = {key: i for i, key in enumerate(sorted(names, key=int))}
    rows = []
    for key, file in table("images.txt").items():
        if key not in labels or key not in train:
            raise AFDSError(f"the image {key} of {base / 'images.txt'} has no label or split: fetch the data set again")
        path = _listed(base / "images.txt", file)[1]
        rows.append((f"CUB_200_2011/images/{path}", new[labels[key]], TRAIN if train[key] == "1" else TEST))
    return _listing(rows, [names[key].split(".", 1)[-1] for key in new])


# --------------------------------------------------------------------------------------------------------------- splits
# Which images are fitted, used for choosing, and tested on. All draws are per class and depend on (seed, class name)
# only, through a permutation of which the fitted images are the first: so the 30 images of a class are among its 60,
# and every method sees the same ones.


@dataclass(frozen=True)
class Parts:
    """Rows of a Listing, each array sorted."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def _permutation(rows: np.ndarray, seed: int, name: str) -> np.ndarray:
    return rows[generator(seed, zlib.crc32(name.encode())).permutation(len(rows))]


def fixed_test(listing: Listing, count: int) -> np.ndarray:
    """Parts with `count` test images per class, drawn once for all seeds, the rest for training."""
    parts = listing.parts.copy()
    for label, name in enumerate(listing.classes):
        rows = np.flatnonzero(listing.targets == label)
        if len(rows) <= count:
            raise AFDSError(f"the class {name!r} has {len(rows)} images; {count} are for the test: it needs more")
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
    listing: Listing, parts: np.ndarray, *, per_class: int | None, seed: int, validation_per_class: int,
    holdout: bool = True,
) -> Parts:  # fmt: skip
    """Draw the splits.

    With an official validation part, that part is used as it is. Otherwise validation images are training images that
    are not fitted: `validation_per_class` of them, or a tenth of the training images when `per_class` is None.

    Args:
        parts: int8 (N,) as in Listing, UNSPLIT where the seed is to split 70/15/15 per class
        per_class: fitting images per class, which each class must have; None for all but the validation images
        seed: of the draw
        validation_per_class: validation images per class when `per_class` is given (fewer where fewer are left)
        holdout: whether training images may be held back for validation; False fits all of them
    """
    if np.any(parts == UNSPLIT):
        parts = _thirds(listing, seed)
    own_validation = np.flatnonzero(parts == VALIDATION)
    train, validation = [], [own_validation]
    for label, name in enumerate(listing.classes):
        rows = _permutation(np.flatnonzero((listing.targets == label) & (parts == TRAIN)), seed, name)
        if not len(rows):
            raise AFDSError(f"the class {name!r} has no training image: add images to it, or remove the class")
        if len(rows) < (per_class or 0):
            raise AFDSError(
                f"the class {name!r} has {len(rows)} training images, fewer than per_class={per_class}: "
                f"ask for at most {len(rows)}"
            )
        held = validation_per_class if per_class else min(max(1, round(0.1 * len(rows))), len(rows) - 1)
        if len(own_validation) or not holdout:
            held = 0
        fit = per_class or len(rows) - held
        train.append(rows[:fit])
        validation.append(rows[fit : fit + held])
    return Parts(np.sort(np.concatenate(train)), np.sort(np.concatenate(validation)), np.flatnonzero(parts == TEST))
