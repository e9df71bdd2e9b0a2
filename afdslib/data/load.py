"""`load`: a name or a path -> the four data sets of a study."""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from afdslib.backbones.inputs import InputStatistics
from afdslib.base.checks import choice, number, whole
from afdslib.base.errors import AFDSError
from afdslib.data import cache, fetch, trees
from afdslib.data.catalogue import NAMES, SETS, DataSet, Layout, digits
from afdslib.data.datasets import ArrayImages, FileImages, Files, ImageDataset, shorter_side
from afdslib.data.images import SMALL, CorruptImageError, resized_to
from afdslib.data.sources import Remote
from afdslib.data.trees import Listing

__all__ = ["Sealed", "Splits", "load", "look", "sealed"]


@dataclass(frozen=True, repr=False)
class Splits:
    """The data sets of one study; unpacks as (train, validation, test, statistics, classes)."""

    train: ImageDataset  # fitting images, augmented
    validation: ImageDataset | None  # images for choosing, or None if no training image is left over
    test: ImageDataset  # images for reporting
    statistics: ImageDataset  # the images of `train` under the test-time transform
    classes: tuple[str, ...]  # names, indexed by target
    name: str = ""  # what was asked for
    note: str = ""  # what a reader of results has to know, such as "stored as JPEG"
    skipped: tuple[str, ...] = ()  # images that could not be decoded (only with `skip_corrupt`)
    captions: tuple[str, ...] = ()  # readable class names where `classes` are codes (wnids), else `classes`

    def __iter__(self):
        return iter((self.train, self.validation, self.test, self.statistics, self.classes))

    def normalised(self, statistics: InputStatistics) -> Splits:
        """The same images, normalised as a network expects them; see `backbones.inputs`."""
        changed: dict[str, Any] = {}
        for name in ("train", "validation", "test", "statistics"):
            if isinstance(dataset := getattr(self, name), (ArrayImages, FileImages)):
                changed[name] = copy.copy(dataset)
                changed[name].input = statistics
        return replace(self, **changed)

    def __repr__(self) -> str:
        validation = 0 if self.validation is None else len(self.validation)
        counts = f"{len(self.train)} training, {validation} validation and {len(self.test)} test images"
        return f"Splits({self.name!r}: {counts}, {len(self.classes)} classes, {self.train.size} px)"


def _search(spec: DataSet, root: str | Path | None) -> tuple[Layout, Path | None, list[Path]] | None:
    """What is there of a set: its layout and the extracted folder, or else all of its files; None if any is missing."""
    folders = fetch.places(spec.base, root)
    for some in (*([f] for f in folders), folders):  # one by one; at last, the files may lie in several of them
        for layout in spec.layouts:
            if len(some) == 1 and all((some[0] / marker).exists() for marker in layout.markers):
                return layout, some[0], []
            files = [file for remote in layout.remotes if (file := fetch.find(remote, some)) is not None]
            if len(files) == len(layout.remotes):
                return layout, None, files
    return None


def _lacking(spec: DataSet, root: str | Path | None) -> list[Remote]:
    """Those files of the layout to be fetched that are not there."""
    layout = next((one for one in reversed(spec.layouts) if all(r.url for r in one.remotes)), spec.layouts[-1])
    folders = fetch.places(spec.base, root)
    return [remote for remote in layout.remotes if fetch.find(remote, folders) is None]


def _locate(spec: DataSet, root: str | Path | None, download: bool) -> tuple[Layout, Path, str | None]:
    """The set as it is found or else downloaded: its layout, folder, and content hash (None for a loose tree)."""
    there = _search(spec, root)
    if there is None:
        missing = _lacking(spec, root)
        if not download or any(remote.url is None for remote in missing):
            raise fetch.missing_sentence(spec.base, missing, "" if download else " and download=False")
        for done, remote in enumerate(missing):
            fetch.download(spec.base, remote, missing[done:])
        there = _search(spec, root)
        assert there is not None
    layout, folder, files = there
    if folder is not None:
        return layout, folder, None
    for file, remote in zip(files, layout.remotes, strict=True):
        fetch.verify(file, remote)
    folder, content = fetch.unpack(spec.base, files)
    for file, remote in zip(files, layout.remotes, strict=True):
        fetch.pin(file, remote)
    return layout, folder, content


def look(name: str, root: str | Path | None = None) -> None:
    """AFDSError unless the files of a data set are there, with the sizes their sources give; arguments as for `load`.

    Nothing is opened, fetched, extracted or written, so checksums and contents stay unknown until `load`.
    """
    known = SETS.get(name)
    if known is None:
        _given_path(name, root)
    elif known.layouts:
        there = _search(known, root)
        if there is None:
            raise fetch.missing_sentence(known.base, _lacking(known, root), "")
        layout, _, files = there
        for file, remote in zip(files, layout.remotes, strict=False):
            fetch.check_size(file, remote)


def _given_path(name: str, root: str | Path | None) -> Path:
    """The folder or archive that `name` means, if it is no known name."""
    candidates = [Path(name).expanduser(), Path(root or "").expanduser() / name] if name else []
    kinds, known = ", ".join(fetch.SUFFIXES), ", ".join(NAMES)
    path = next((p for p in candidates if p.exists()), None)
    if path is None and (os.sep in name or fetch.is_archive(name)):
        raise AFDSError(f"the data set path {name} does not exist: give a folder or an archive ({kinds})")
    if path is None:
        raise AFDSError(f"there is no data set {name!r}: take one of {known}, or the path of an ImageFolder tree")
    if path.is_file() and not fetch.is_archive(path):
        raise AFDSError(f"the file {path} is no archive of a known kind: give a folder or one of {kinds}")
    return path


def _read(
    name: str, root: str | Path | None, size: int | None, download: bool, skip_corrupt: bool
) -> tuple[DataSet, np.ndarray | Files, int, Listing, str, tuple[str, ...]]:
    """The set, its images (an array up to 64 px) in the order of the Listing, their size, note, and names left out."""
    spec = SETS.get(name)
    pixels: np.ndarray | Files
    if spec is not None and not spec.layouts:
        listing, size = digits(), size or spec.size
        pixels = source = Files(Path(), (), listing.images)
        if size <= SMALL:
            pixels = np.stack([resized_to(source.read(row), size) for row in range(len(listing.targets))])
        return spec, pixels, size, listing, "scikit-learn's 8x8 digits", ()
    if spec is None:
        path, layout = _given_path(name, root), Layout((), (), trees.image_folder)
        base = "".join(c if c.isalnum() or c in "-_." else "-" for c in path.resolve().name) or "tree"
        spec = DataSet(f"tree-{base}", (layout,))
        folder, content = fetch.unpack(spec.base, [path]) if path.is_file() else (path, None)
    else:
        layout, folder, content = _locate(spec, root, download)
        if spec.other and _search(SETS[spec.other], root):
            warnings.warn(f"{name} is read; {spec.other}, which is there too, is not", stacklevel=3)
    own, size = not layout.remotes, size or spec.size
    kept = size if size <= SMALL else None
    shorter = shorter_side(size) if own and kept is None else 0
    decoded = cache.load_cache(spec.base, kept, content, shorter) if content else None
    if decoded is None:
        listing = layout.read(folder)
        absent = next((one for one in listing.relative if not (folder / one).is_file()), None)
        if absent is not None:
            raise AFDSError(f"the image {folder / absent} is listed but missing: fetch the data set again")
        source = Files(folder, listing.relative, listing.images)
        if kept is None and (listing.images is not None or not (own or skip_corrupt)):
            return spec, source, size, listing, layout.note, ()
        if content is None:
            parts = hashlib.sha256(listing.parts.tobytes() + listing.targets.tobytes()).hexdigest()[:6]
            arrays = [] if listing.relative else (folder / layout.markers[0]).iterdir()
            names = listing.relative or sorted(p.relative_to(folder).as_posix() for p in arrays)
            content = f"{fetch.fingerprint(folder, names)}{parts}"
        decoded = cache.decode(spec.base, kept, content, source, listing, shorter)
    array, listing, corrupt = decoded
    if listing.left_out:
        warnings.warn(f"{name}: left out, being no images of a class: {_several(listing.left_out)}", stacklevel=3)
    if corrupt and not skip_corrupt:
        mend = "replace or delete, or go on without, by --skip-corrupt" if own else "fetch the data set again"
        reason = next(iter(corrupt.values())).removesuffix(": replace it")
        raise CorruptImageError(f"{name}: cannot decode {_several(tuple(corrupt))}; {reason}: {mend}")
    if corrupt:
        warnings.warn(f"{name}: left out, not decodable: {_several(tuple(corrupt))}", stacklevel=3)
    pixels = Files(folder, listing.relative, copies=array) if isinstance(array, dict) else array
    return spec, pixels, size, listing, layout.note, tuple(corrupt)


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{len(names)} file{'' if len(names) == 1 else 's'} ({shown})"


def load(
    name: str, root: str | Path | None = None, *, per_class: int | None = None, seed: int = 0, size: int | None = None,
    download: bool = True, skip_corrupt: bool = False, holdout: bool = True, padding: str = "constant",
    sharpness: float = 0.0,
) -> Splits:  # fmt: skip
    """Ready-made splits of a data set: one of `NAMES`, or the path of an ImageFolder tree or of an archive of one.

    Splits: official train and test parts where the set has them (tiny-imagenet-32: `val` is the test part). Caltech-256
    has none: 20 test images per class [our reading], the same for every seed. Digits: every second image of a class is
    a test image. A flat tree is split 70/15/15 per class by the seed, so its test images do depend on the seed.

    Images up to 64 px are decoded once (shorter side to `size`, centre crop) into a memory-mapped array; training pads
    by 4 (mean colour; black for digits), crops and mirrors (digits are never mirrored). Larger ones: shorter side to
    size*256/224, crop `size`, mirror. All are normalised with ImageNet's mean and deviation.

    Every image of a tree given by its path is decoded once before this returns, whatever its size, and again only if
    the files change; large photographs are kept scaled down. Files of the tree that are no images of a class are named
    in a warning.

    Args:
        name: a known name, or a path (see `trees.image_folder`)
        root: folder with archives or extracted trees, which may be read-only; the raw data folder is looked in too
        per_class: fitting images per class; validation then holds 100 (digits: 20) of the others of each class. None:
            all training images but a tenth per class, which is for validation
        seed: of the draws and of the augmentation
        size: side in pixels; default 32 for the 32 px sets and digits, else 224
        download: whether missing files may be fetched
        skip_corrupt: go on without images that cannot be decoded, with a warning that lists them. Known sets above 64
            px are looked through for that only if this is set; else such an image is an error when it is reached
        holdout: False fits the images that would be held back for validation too, for a study that chooses nothing;
            validation is then None, or the set's own validation part
        padding: of training crops up to 64 px: "constant" as above, or "reflect" [code: attention transfer]
        sharpness: training images up to 64 px are sharpened at random by up to this amount; see `ArrayImages`

    Raises:
        AFDSError: unknown name, missing or wrong file, corrupt image, too few images in a class, full disk
    """
    whole("per_class", 1 if per_class is None else per_class, 1)
    whole("seed", seed, 0)
    whole("size", 8 if size is None else size, 8)
    choice("padding", padding, ("constant", "reflect"))
    number("sharpness", sharpness, least=0, most=10)
    name = str(name)
    spec, pixels, size, listing, note, skipped = _read(name, root, size, download, skip_corrupt)
    if size > SMALL and (padding != "constant" or sharpness):
        options = f"padding={padding!r} and sharpness={sharpness!r}"
        raise AFDSError(f"{options} are for images up to {SMALL} px; larger ones are cropped")

    if spec.expected and len(listing.classes) != spec.expected:
        found = len(listing.classes)
        raise AFDSError(f"the data set {name} has {found} of its {spec.expected} classes: fetch it again, whole")
    rows = np.arange(len(listing.targets))
    if spec.choose is not None:
        listing, rows = listing.of_classes(spec.choose(listing.classes))
    parts = spec.parts(listing) if spec.parts else listing.parts
    drawn = trees.partition(
        listing, parts, per_class=per_class, seed=seed, validation_per_class=spec.validation_per_class, holdout=holdout
    )
    if not len(drawn.test):
        raise AFDSError(f"the data set {name} has no test images: add test/, or at least 4 images to each class")

    def make(chosen: np.ndarray, augment: bool) -> ImageDataset:
        common: dict[str, Any] = {"rows": rows[chosen], "targets": listing.targets[chosen], "classes": listing.classes}
        common |= {"augment": augment, "flip": spec.flip, "seed": int(seed)}
        if isinstance(pixels, Files):
            return FileImages(pixels, size=size, **common)
        reflect = padding == "reflect"
        return ArrayImages(pixels, border=spec.border, reflect=reflect, sharpness=float(sharpness), **common)

    validation = make(drawn.validation, False) if len(drawn.validation) else None
    train, test, statistics = make(drawn.train, True), make(drawn.test, False), make(drawn.train, False)
    captions = listing.captions or listing.classes
    return Splits(train, validation, test, statistics, listing.classes, name, note, skipped, captions)


class Sealed(ImageDataset):
    """A test split without images and labels. Reading from it is a fault of the program, so no AFDSError."""

    def _refuse(self, indices: Any) -> Any:
        raise RuntimeError("a test image was asked for in a trial, which must choose without them")

    __getitems__ = raw = _refuse  # type: ignore[assignment]


def sealed(splits: Splits) -> Splits:
    """The splits without test images, for trials, which choose something."""
    return replace(splits, test=Sealed(np.empty(0), splits.classes, size=splits.test.size, augment=False))
