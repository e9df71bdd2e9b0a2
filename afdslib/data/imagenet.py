"""The ImageNet tree (ILSVRC 2012): sorts the flat validation folder into classes, and counts the images.

ILSVRC2012_img_val.tar holds 50,000 files without folders. Which class each belongs to is read from one of

- `ILSVRC2012_devkit_t12.tar.gz`, or the folder `ILSVRC2012_devkit_t12` it unpacks to: line n of its file
  `data/ILSVRC2012_validation_ground_truth.txt` is the ILSVRC2012_ID (1 to 1000) of `ILSVRC2012_val_{n:08d}.JPEG`, and
  its `data/meta.mat` says which WordNet id (n01440764, ...) that is, in an order that is not that of the WordNet ids;
- `LOC_val_solution.csv` of the Kaggle copy, or any CSV whose first column is the image (with or without suffix) and
  whose second begins with the WordNet id.

Tried on small trees of the same form; never on the real 50,000 images.
"""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from afdslib.base.errors import AFDSError
from afdslib.data.fetch import digest, extract, is_archive
from afdslib.data.trees import Listing, folders, image_folder, images

__all__ = ["IMAGENET", "Counts", "arrange", "read_labels", "sort_validation", "tree"]

DEVKIT, DEVKIT_MD5 = "ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf"  # md5: torchvision's source
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
KAGGLE = "LOC_val_solution.csv"


class Counts(NamedTuple):
    """Classes and images of a tree."""

    classes: int
    train: int
    validation: int

    def __str__(self) -> str:
        return f"{self.classes:,} classes, {self.train:,} training and {self.validation:,} validation images"


IMAGENET = Counts(1000, 1_281_167, 50_000)


def tree(folder: Path) -> Listing:
    """The listing of `train/` and `val/`, refused while `val/` is flat; validation images are the test part."""
    if loose := images(folder / "val"):
        many = f"{len(loose):,} images outside class folders"
        raise AFDSError(f"the folder {folder / 'val'} holds {many}: sort them with afds data imagenet --root {folder}")
    return image_folder(folder)


def read_labels(path: str | Path) -> dict[str, str]:
    """The class (WordNet id) of each validation image, by file name without suffix, from a devkit or a CSV."""
    path = Path(path).expanduser()
    if path.name == GROUND_TRUTH:  # its meaning is in meta.mat beside it
        path = path.parent
    kinds = f"{DEVKIT}, the folder it unpacks to, or a CSV such as {KAGGLE}"
    if not path.exists():
        raise AFDSError(f"there is no file {path}: give {kinds}")
    if path.is_dir():
        return _devkit(path, path)
    if path.suffix == ".csv":
        return _csv(path)
    if not is_archive(path):
        raise AFDSError(f"{path} says no classes: give {kinds}")
    if path.name == DEVKIT and digest(path, "md5") != DEVKIT_MD5:
        raise AFDSError(f"{path} has another md5 than {DEVKIT_MD5}: fetch it again from image-net.org")
    with TemporaryDirectory() as folder:
        return _devkit(extract((path,), Path(folder) / "devkit"), path)


def _devkit(folder: Path, origin: Path) -> dict[str, str]:
    """From the two files somewhere below a folder."""
    from scipy.io import loadmat

    files = {name: file for name in (GROUND_TRUTH, META) for file in folder.rglob(name)}
    if missing := [name for name in (GROUND_TRUTH, META) if name not in files]:
        raise AFDSError(f"{origin} is no ImageNet devkit: it lacks {' and '.join(missing)}")
    try:
        synsets = loadmat(files[META], squeeze_me=True)["synsets"]
        names = {int(i): str(wnid) for i, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
        labels = [names[int(line)] for line in files[GROUND_TRUTH].read_text().split()]
    except Exception as error:  # scipy raises many kinds for a damaged .mat
        reason = f"{type(error).__name__}: {error}"
        raise AFDSError(f"the devkit {origin} cannot be read ({reason}): fetch it again") from error
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(labels, start=1)}


def _csv(path: Path) -> dict[str, str]:
    labels: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AFDSError(f"the list {path} cannot be read ({error}): fetch it again") from error
    for number, row in enumerate(rows, start=1):
        name, words = Path(row[0].strip()), row[1].split() if len(row) > 1 else []
        if number == 1 and not re.search(r"\d|\.", "".join(row)):
            continue  # a header
        if not words or "/" in words[0] or words[0] in (".", ".."):
            raise AFDSError(f"line {number} of {path} is {','.join(row)[:60]!r}: it needs an image and its class")
        labels[name.stem] = words[0]
    return labels


def sort_validation(folder: Path, labels: dict[str, str]) -> int:
    """Moves each loose image of `val/` of a tree into the folder of its class (of `read_labels`), and says how many.

    An interrupted sort goes on where it stopped. Nothing is moved if an image has no label, a class no folder in
    `train/`, or an image lies in the folder of another class: AFDSError.
    """
    validation, known = folder / "val", set(folders(folder / "train"))
    loose = images(validation)
    if unlabelled := [name for name in loose if Path(name).stem not in labels]:
        many = f"{len(unlabelled):,} images of {validation} have no class in the list, first {unlabelled[0]}"
        raise AFDSError(f"{many}: give the list of this data set")
    targets = {name: validation / labels[Path(name).stem] for name in loose}
    if strange := sorted({target.name for target in targets.values()} - known):
        many = f"has no folder in {folder / 'train'} ({len(strange):,} in all)"
        raise AFDSError(f"the class {strange[0]!r} of the list {many}: complete it, or give the list of this data set")
    for one in folders(validation):
        for name in images(validation / one):
            if labels.get(Path(name).stem, one) != one:
                raise AFDSError(f"{validation / one / name} is of the class {labels[Path(name).stem]}: move it there")
    try:
        for name, target in targets.items():
            target.mkdir(exist_ok=True)
            if (target / name).exists():
                raise AFDSError(f"{name} lies both in {validation} and in {target}: delete one of them")
            os.rename(validation / name, target / name)
    except OSError as error:
        advice = "the command moves files, so the folder must be writable"
        raise AFDSError(f"cannot sort {validation} ({error.strerror}): {advice}") from error
    return len(loose)


def arrange(
    root: str | Path, labels: str | Path | None = None, *, expected: Counts | None = IMAGENET
) -> tuple[Path, int, Counts]:
    """Sorts the validation images if they are not sorted yet, and checks the counts (the command `afds data imagenet`).

    `root` is the tree or a folder above it; `labels`, see `read_labels`, are looked for in the tree's folder and up
    to three above it; `expected` is what the tree must hold. Gives the tree, the number of moved images, and counts.
    """
    root = Path(root).expanduser()
    places = (root, root / "imagenet", root / "ILSVRC2012", root / "ILSVRC" / "Data" / "CLS-LOC")
    folder = next((place for place in places if (place / "train").is_dir() and (place / "val").is_dir()), None)
    if folder is None:
        lack = "it needs train/ with a folder per class (from ILSVRC2012_img_train.tar) and val/ with the images of"
        raise AFDSError(f"there is no ImageNet tree in {root}: {lack} ILSVRC2012_img_val.tar")
    moved = 0
    if images(folder / "val"):
        names = (DEVKIT, DEVKIT.removesuffix(".tar.gz"), KAGGLE)
        beside = [place / name for place in (folder, *list(folder.resolve().parents)[:3]) for name in names]
        labels = labels or next((file for file in beside if file.exists()), None)
        if labels is None:
            advice = f"put {DEVKIT} or {KAGGLE} beside it, or name such a file by --labels"
            raise AFDSError(f"the images of {folder / 'val'} are not sorted into classes: {advice}")
        moved = sort_validation(folder, read_labels(labels))
    train, validation = ([len(images(folder / part / c)) for c in folders(folder / part)] for part in ("train", "val"))
    counts = Counts(len(train), sum(train), sum(validation))
    if expected is not None and counts != expected:
        advice = "fetch what is missing, or accept a part of it with --subset"
        raise AFDSError(f"{folder} holds {counts}, where ImageNet has {expected}: {advice}")
    return folder, moved, counts
