"""The folder layouts of the data sets: each reader turns a folder into a Listing, from which the splits are drawn.

Read against the published descriptions and small fixtures of the same form; of the real downloads only the three
development archives (ImageFolder trees) have been read. Not run against the real download: Stanford Dogs, MIT Indoors,
Caltech-256, CUB-200-2011, Food-101 and CIFAR-10's python archive.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
_HIDDEN = (".", "__MACOSX")


@dataclass(frozen=True)
class Listing:
    """What a data set holds, before anything is decoded."""

    relative: list[str]  # image paths below the folder (empty for arrays)
    targets: np.ndarray  # int64 (N,)
    parts: np.ndarray  # int8 (N,): TRAIN, VALIDATION, TEST, or UNSPLIT where the set has no official split
    classes: tuple[str, ...]  # names, indexed by target
    captions: tuple[str, ...] = ()  # readable names where `classes` are codes
    images: np.ndarray | None = None  # uint8 (N, H, W, 3), for sets that come as arrays
    left_out: tuple[str, ...] = ()  # files of a user's own tree that no class takes

    def take(self, rows: np.ndarray) -> Listing:
        """The listing of some images; `images` stay behind."""
        relative = [self.relative[r] for r in rows] if self.relative else []
        return replace(self, relative=relative, targets=self.targets[rows], parts=self.parts[rows], images=None)

    def of_classes(self, names: list[str]) -> tuple[Listing, np.ndarray]:
        """The listing of some classes, targets renumbered in their order, and the rows taken."""
        new = {self.classes.index(name): i for i, name in enumerate(names)}
        rows = np.flatnonzero(np.isin(self.targets, list(new)))
        targets = np.array([new[t] for t in self.targets[rows].tolist()], dtype=np.int64)
        captions = tuple(self.captions[old] for old in new) if self.captions else ()
        return replace(self.take(rows), targets=targets, classes=tuple(names), captions=captions), rows


Reader = Callable[[Path], Listing]


def _listing(rows: Iterable[tuple[str, int, int]], classes: Iterable[str], **more) -> Listing:
    """From (path, target, part) of each image."""
    paths, targets, parts = zip(*sorted(rows), strict=True)
    return Listing(list(paths), np.array(targets, np.int64), np.array(parts, np.int8), tuple(classes), **more)


def folders(folder: Path) -> list[str]:
    """Names of the visible folders right in a folder."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(_HIDDEN))


def images(folder: Path) -> list[str]:
    """Names of the images right in a folder, by their suffix."""
    entries = [e for e in os.scandir(folder) if not e.name.startswith(".") and e.name.lower().endswith(EXTENSIONS)]
    return sorted(e.name for e in entries if not e.is_dir())


def _files(folder: Path) -> Iterator[Path]:
    """Every visible file below a folder. Links are followed, but into no folder twice."""

    def refuse(error: OSError) -> None:
        raise AFDSError(f"the folder {error.filename} cannot be read ({error.strerror}): mend its permissions")

    seen = set()
    for base, names, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(base)
        names[:] = [] if real in seen else [n for n in names if not n.startswith(_HIDDEN)]
        if real not in seen:
            yield from (Path(base, name) for name in files if not name.startswith("."))
        seen.add(real)


def _is_image(file: Path, look: bool = True) -> bool:
    """Whether its suffix, or with `look` its header, is that of an image."""
    if not look or file.name.lower().endswith(EXTENSIONS):
        return file.name.lower().endswith(EXTENSIONS)
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
    if train is not None and len(parts) == 1:
        advice = "add one, or give the folder of classes"
        raise AFDSError(f"the folder {folder} has {train}/ but neither test/ nor val/: {advice}")
    classes, others = names, []
    if train is None:
        parts = {"": UNSPLIT}
    else:
        others = [file for name in names if name not in parts for file in _files(folder / name)]
        if TEST not in parts.values():
            parts = {name: TRAIN if part == TRAIN else TEST for name, part in parts.items()}
        classes = folders(folder / train)
    if len(classes) < 2:
        lack = f"is no ImageFolder tree of at least two classes ({len(classes)} there)"
        raise AFDSError(f"the folder {folder} {lack}: it needs train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg")
    # Beside folders of classes only images are worth a word.
    left_out = [file for file in others if _is_image(file, look=False)]
    left_out += [folder / name / image for name in {"", *parts} for image in images(folder / name)]
    rows: list[tuple[str, int, int]] = []
    for name, part in parts.items():
        present, place = folders(folder / name), folder / name
        if unknown := sorted(set(present) - set(classes)):
            lacking = f"has no folder in {folder / str(train)}: add it, or remove it"
            raise AFDSError(f"the class {unknown[0]!r} of {place} {lacking}")
        for label, one in enumerate(classes):
            files = list(_files(place / one)) if one in present else []
            taken = [file for file in files if _is_image(file)]
            left_out += set(files) - set(taken)
            if not taken and part in (TRAIN, UNSPLIT):
                other = f" that Pillow can read, but {len(files)} other files" if files else ""
                raise AFDSError(f"the class folder {place / one} holds no image{other}: fill it, or remove it")
            rows += [(file.relative_to(start).as_posix(), label, part) for file in taken]
    ignored = tuple(sorted(file.relative_to(start).as_posix() for file in left_out))
    captions = _table(folder / "classes.tsv", "\t") if (folder / "classes.tsv").is_file() else {}
    named = tuple(captions.get(one, one) for one in classes) if captions else ()
    return _listing(rows, classes, captions=named, left_out=ignored)


def _damaged(file: Path, why: object, what: str = "is damaged or of another data set") -> AFDSError:
    return AFDSError(f"the list {file} {what} ({why}): fetch the data set again")


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(file, error, "cannot be read") from error
    if "\0" in text:
        raise _damaged(file, "it is no UTF-8 text")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _table(file: Path, separator: str | None = None, values: Iterable[str] | None = None) -> dict[str, str]:
    """The two columns of a list, keyed by the first, a number where blanks separate them; values are of `values`."""
    rows, numbered = [line.split(separator, 1) for line in _lines(file)], separator is None
    for row in rows:
        known = len(row) == 2 and (values is None or row[1] in values)
        if not known or (numbered and not row[0].isdecimal()):
            raise _damaged(file, f"the line {' '.join(row)[:60]!r} is not of its form")
    table = {key: value for key, value in rows}
    if numbered and len(table) < max(2, len(rows)):
        raise _damaged(file, f"it has {len(rows)} lines for {len(table)} numbers")
    return table


def _class_of(file: Path, path: str) -> str:
    """The class folder of a path `class/image` that a list names: it must stay below the folder."""
    if path.startswith("/") or ".." in Path(path).parts:
        raise AFDSError(f"the list {file} names {path!r}, a file outside its folder: fetch the data set again")
    one, _, name = path.partition("/")
    if not one or not name:
        raise _damaged(file, f"{path[:60]!r} is not of the form class/image")
    return one


def _two_lists(lists: dict[Path, list[str]], form: str) -> Listing:
    """From a training and a test list of `class/image`; `form` turns such a line into the path of the image."""
    rows = [(_class_of(f, line), line, part) for f, part in zip(lists, (TRAIN, TEST), strict=True) for line in lists[f]]
    (file, train), (_, test) = lists.items()
    if both := set(train) & set(test):
        raise _damaged(file, f"{min(both)} is in the test list beside it, too")
    if len(classes := sorted({one for one, _, _ in rows})) < 2:
        raise _damaged(file, f"it names {len(classes)} classes")
    return _listing([(form.format(line), classes.index(one), part) for one, line, part in rows], classes)


def stanford_dogs(folder: Path, *, first: int = 100) -> Listing:
    """Stanford Dogs 120: `Images/<class>/*.jpg` and the official `train_list.mat` (100 per class), `test_list.mat`.

    `first` is how many training images of each class are taken, in the order of the list.
    """
    from scipy.io import loadmat

    def read(file: Path) -> list[str]:
        try:
            lists = loadmat(file)
            lines = [str(cell[0][0]) for cell in lists["file_list"]]
            labels = [int(label) for label in lists["labels"].reshape(-1)]
        except Exception as error:  # scipy raises many kinds for a damaged .mat
            raise _damaged(file, error, "cannot be read") from error
        pairs = set(zip(labels, (_class_of(file, line) for line in lines), strict=False))
        if len(lines) != len(labels) or not len(pairs) == len(dict(pairs)) == len({one for _, one in pairs}):
            raise _damaged(file, f"its {len(labels)} labels are not the classes of its {len(lines)} images")
        return lines

    train, test = folder / "train_list.mat", folder / "test_list.mat"
    counts: Counter[str] = Counter()
    lines = []
    for line in read(train):
        counts[one := _class_of(train, line)] += 1
        lines += [line] if counts[one] <= first else []
    listing = _two_lists({train: lines, test: read(test)}, "Images/{}")
    return replace(listing, classes=tuple(one.split("-", 1)[-1] for one in listing.classes))


def mit_indoors(folder: Path) -> Listing:
    """MIT Indoors 67: `Images/<class>/*`, official lists, about 80 training and 20 test images per class."""
    files = folder / "TrainImages.txt", folder / "TestImages.txt"
    return _two_lists({file: _lines(file) for file in files}, "Images/{}")


def food_101(folder: Path) -> Listing:
    """Food-101: `meta/train.txt`, `meta/test.txt` with lines `class/number`, images in `images/class/number.jpg`."""
    files = folder / "food-101/meta/train.txt", folder / "food-101/meta/test.txt"
    return _two_lists({file: _lines(file) for file in files}, "food-101/images/{}.jpg")


def caltech_256(folder: Path) -> Listing:
    """Caltech-256: `256_ObjectCategories/NNN.name/*.jpg`, no official split; class 257 (clutter) is left out."""
    base = folder / "256_ObjectCategories"
    names = [n for n in folders(base) if n[:3].isdigit() and n[3:4] == "." and not n.startswith("257.")]
    # Stray files and sub-folders of the real archive are no images of a class.
    found = [(f"{base.name}/{n}/{image}", i, UNSPLIT) for i, n in enumerate(names) for image in images(base / n)]
    if not found:
        raise AFDSError(f"the folder {base} holds no folders NNN.name of images: fetch the data set again")
    return _listing(found, [n.split(".", 1)[1] for n in names])


def cub_200_2011(folder: Path) -> Listing:
    """CUB-200-2011: `images.txt`, `image_class_labels.txt`, `train_test_split.txt` (1 is train), `classes.txt`."""
    base = folder / "CUB_200_2011"
    names = _table(base / "classes.txt")
    labels = _table(base / "image_class_labels.txt", values=names)
    train = _table(base / "train_test_split.txt", values=("0", "1"))
    new = {key: i for i, key in enumerate(sorted(names, key=int))}
    rows = []
    for key, path in _table(base / "images.txt").items():
        if key not in labels or key not in train:
            raise AFDSError(f"the image {key} of {base / 'images.txt'} has no label or split: fetch the data set again")
        _class_of(base / "images.txt", path)
        rows.append((f"CUB_200_2011/images/{path}", new[labels[key]], TRAIN if train[key] == "1" else TEST))
    return _listing(rows, [names[key].split(".", 1)[-1] for key in new])


class Parts(NamedTuple):
    """Rows of a Listing, each array sorted."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def _permutation(rows: np.ndarray, seed: int, name: str) -> np.ndarray:
    """Draws depend on (seed, class name) only, and the first are fitted: a class's 30 images are among its 60."""
    return rows[generator(seed, zlib.crc32(name.encode())).permutation(len(rows))]


def _by_class(listing: Listing, where: np.ndarray | bool = True) -> Iterator[tuple[str, np.ndarray]]:
    """Name and rows of each class, of the images of which `where` is true."""
    for label, name in enumerate(listing.classes):
        yield name, np.flatnonzero((listing.targets == label) & where)


def fixed_test(listing: Listing, count: int) -> np.ndarray:
    """Parts with `count` test images per class, drawn once for all seeds, the rest for training."""
    parts = np.full_like(listing.parts, TRAIN)
    for name, rows in _by_class(listing):
        if len(rows) <= count:
            raise AFDSError(f"the class {name!r} has {len(rows)} images; {count} are for the test: it needs more")
        parts[_permutation(rows, 0, name)[:count]] = TEST
    return parts


def alternate_test(listing: Listing) -> np.ndarray:
    """Parts for which, within each class, every second image in stored order is a test image, whatever the seed."""
    parts = np.full_like(listing.parts, TRAIN)
    for _, rows in _by_class(listing):
        parts[rows[1::2]] = TEST
    return parts


def _thirds(listing: Listing, seed: int) -> np.ndarray:
    """70/15/15 per class for a tree without a split; each class keeps at least one training image."""
    parts = listing.parts.copy()
    for name, rows in _by_class(listing, parts == UNSPLIT):
        held = min(round(0.15 * len(rows)), (len(rows) - 1) // 2)
        rows = _permutation(rows, seed, name)
        parts[rows] = TRAIN
        parts[rows[:held]] = TEST
        parts[rows[held : 2 * held]] = VALIDATION
    return parts


def partition(
    listing: Listing, parts: np.ndarray, *, per_class: int | None, seed: int, validation_per_class: int,
    holdout: bool = True,
) -> Parts:  # fmt: skip
    """Draw the splits from `parts`, int8 (N,) as in Listing; UNSPLIT images are split 70/15/15 per class by the seed.

    An official validation part is used as it is. Otherwise (with `holdout`) validation images are training images that
    are not fitted: where `per_class` are fitted up to `validation_per_class` of them, else a tenth.
    """
    if np.any(parts == UNSPLIT):
        parts = _thirds(listing, seed)
    own_validation = np.flatnonzero(parts == VALIDATION)
    train, validation = [], [own_validation]
    for name, rows in _by_class(listing, parts == TRAIN):
        if not len(rows):
            raise AFDSError(f"the class {name!r} has no training image: add images to it, or remove the class")
        if len(rows) < (per_class or 0):
            few = f"has {len(rows)} training images, fewer than per_class={per_class}: ask for at most {len(rows)}"
            raise AFDSError(f"the class {name!r} {few}")
        rows = _permutation(rows, seed, name)
        held = validation_per_class if per_class else min(max(1, round(0.1 * len(rows))), len(rows) - 1)
        held = 0 if len(own_validation) or not holdout else held
        fit = per_class or len(rows) - held
        train.append(rows[:fit])
        validation.append(rows[fit : fit + held])
    return Parts(np.sort(np.concatenate(train)), np.sort(np.concatenate(validation)), np.flatnonzero(parts == TEST))
