"""`load`: a name or a path -> the four data sets of a study."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from afdslib.base.errors import AFDSError
from afdslib.data import cache, fetch, trees
from afdslib.data.catalogue import NAMES, SETS, DataSet, Layout, digits
from afdslib.data.datasets import ArrayImages, Arrays, FileImages, Files, ImageDataset, Source, check_whole
from afdslib.data.images import SMALL, CorruptImageError, resized_to
from afdslib.data.sources import Remote
from afdslib.data.trees import Listing

__all__ = ["Sealed", "Splits", "load", "look", "sealed"]


@dataclass(frozen=True, repr=False)
class Splits:
    """The data sets of one study; unpacks as (train, validation, test, statistics, classes).

    Attributes:
        train: fitting images, augmented
        validation: images for choosing, or None if no training image is left over
        test: images for reporting
        statistics: the images of `train` under the test-time transform
        classes: names, indexed by target
        name: what was asked for
        note: what a reader of results has to know, such as "stored as JPEG"
        skipped: images left out because they could not be decoded (only with `skip_corrupt`)
        captions: readable class names where `classes` are codes (wnids), else `classes`
    """

    train: ImageDataset
    validation: ImageDataset | None
    test: ImageDataset
    statistics: ImageDataset
    classes: tuple[str, ...]
    name: str = ""
    note: str = ""
    skipped: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    def __iter__(self):
        return iter((self.train, self.validation, self.test, self.statistics, self.classes))

    def __repr__(self) -> str:
        validation = 0 if self.validation is None else len(self.validation)
        return (
            f"Splits({self.name!r}: {len(self.train)} training, {validation} validation and {len(self.test)} test "
            f"images, {len(self.classes)} classes, {self.train.size} px)"
        )


@dataclass(frozen=True)
class _Located:
    """A data set on disk: where, in which form, and a hash of its content (None for a loose tree not hashed yet)."""

    folder: Path
    layout: Layout
    content: str | None


# ------------------------------------------------------------------------------------------------------------- locating


def _search(spec: DataSet, root: str | Path | None) -> tuple[Layout, Path | None, list[Path]] | None:
    """What is there of a set: its layout and the extracted folder, or else all of its files; None if some are missing.

    Only looks: nothing is opened or written.
    """
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


def _locate(spec: DataSet, root: str | Path | None, download: bool) -> _Located:
    """Find the set in extracted or archive form, or download it."""
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
        return _Located(folder, layout, None)
    pairs = list(zip(files, layout.remotes, strict=True))
    for file, remote in pairs:
        fetch.verify(file, remote)
    folder, content = fetch.unpack(spec.base, files)
    for file, remote in pairs:
        fetch.pin(file, remote)
    return _Located(folder, layout, content)


def look(name: str, root: str | Path | None = None) -> None:
    """Looks whether the files of a data set are there, with the sizes their sources give; arguments as for `load`.

    Nothing is opened, fetched, extracted or written, so checksums and contents stay unknown until `load`.

    Raises:
        AFDSError: an unknown name, a missing file, or one of another size
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
    candidates = [Path(name).expanduser()] if name else []
    if root is not None and name:
        candidates.append(Path(root).expanduser() / name)
    path = next((p for p in candidates if p.exists()), None)
    kinds = ", ".join(fetch.SUFFIXES)
    if path is None:
        if os.sep in name or fetch.is_archive(name):
            raise AFDSError(f"the data set path {name} does not exist: give a folder or an archive ({kinds})")
        known = ", ".join(NAMES)
        raise AFDSError(f"there is no data set {name!r}: take one of {known}, or the path of an ImageFolder tree")
    if path.is_file() and not fetch.is_archive(path):
        raise AFDSError(f"the file {path} is no archive of a known kind: give a folder or one of {kinds}")
    return path


def _own_tree(path: Path) -> tuple[DataSet, _Located]:
    base = "".join(c if c.isalnum() or c in "-_." else "-" for c in path.resolve().name) or "tree"
    layout = Layout((), (), trees.image_folder)
    spec = DataSet(f"tree-{base}", (layout,))
    folder, content = fetch.unpack(spec.base, [path]) if path.is_file() else (path, None)
    return spec, _Located(folder, layout, content)


# -------------------------------------------------------------------------------------------------------------- reading


def _read(
    name: str, spec: DataSet, located: _Located, size: int, skip_corrupt: bool
) -> tuple[np.ndarray | Source, Listing, tuple[str, ...]]:
    """Images (an array up to 64 px, else a source) with one row per entry of the Listing, and the names left out."""
    own, content, kept = not located.layout.remotes, located.content, size if size <= SMALL else None
    decoded = cache.load_cache(spec.base, kept, content) if content else None
    if decoded is None:
        listing = located.layout.read(located.folder)
        absent = next((one for one in listing.relative if not (located.folder / one).is_file()), None)
        if absent is not None:
            raise AFDSError(f"the image {located.folder / absent} is listed but missing: fetch the data set again")
        files = Files(located.folder, listing.relative)
        source: Source = files if listing.images is None else Arrays(listing.images)
        if kept is None and (source is not files or not (own or skip_corrupt)):
            return source, listing, ()
        if content is None:
            parts = hashlib.sha256(listing.parts.tobytes() + listing.targets.tobytes()).hexdigest()[:6]
            names = listing.relative or sorted(
                p.relative_to(located.folder).as_posix() for p in (located.folder / located.layout.markers[0]).iterdir()
            )
            content = f"{fetch.fingerprint(located.folder, names)}{parts}"
        decoded = cache.decode(spec.base, kept, content, source, listing)
    images, listing, corrupt = decoded
    if listing.left_out:
        warnings.warn(f"{name}: left out, being no images of a class: {_several(listing.left_out)}", stacklevel=3)
    if corrupt and not skip_corrupt:
        raise CorruptImageError(
            f"{name}: cannot decode {_several(corrupt)}; {next(iter(corrupt.values())).removesuffix(': replace it')}: "
            + ("replace or delete, or go on without, by --skip-corrupt" if own else "fetch the data set again")
        )
    if corrupt:
        warnings.warn(f"{name}: left out, not decodable: {_several(corrupt)}", stacklevel=3)
    return Files(located.folder, listing.relative) if images is None else images, listing, tuple(corrupt)


def _several(names: dict[str, str] | tuple[str, ...]) -> str:
    shown = ", ".join(list(names)[:10]) + (", ..." if len(names) > 10 else "")
    return f"{len(names)} file{'' if len(names) == 1 else 's'} ({shown})"


def load(
    name: str,
    root: str | Path | None = None,
    *,
    per_class: int | None = None,
    seed: int = 0,
    size: int | None = None,
    download: bool = True,
    skip_corrupt: bool = False,
    holdout: bool = True,
    padding: str = "constant",
    sharpness: float = 0.0,
) -> Splits:
    """Ready-made splits of a data set: one of `NAMES`, or the path of an ImageFolder tree or of an archive of one.

    Splits: official train and test parts where the set has them (tiny-imagenet-32: `val` is the test part). Caltech-256
    has none: 20 test images per class [our reading], the same for every seed. Digits: every second image of a class is
    a test image. A flat tree is split 70/15/15 per class by the seed, so its test images do depend on the seed.

    Images up to 64 px are decoded once (shorter side to `size`, centre crop) into a memory-mapped array; training pads
    by 4 (mean colour; black for digits), crops and mirrors (digits are never mirrored). Larger ones: shorter side to
    size*256/224, crop `size`, mirror. All are normalised with ImageNet's mean and deviation.

    Every image of a tree given by its path is decoded once before this returns, whatever its size; the result is
    remembered until the files change. Files of the tree that are no images of a class are named in a warning.

    Args:
        name: a known name, or a path (see `trees.image_folder`)
        root: folder with archives or extracted trees, which may be read-only; the raw data folder is looked in too
        per_class: fitting images per class, drawn by `seed`; validation then holds 100 (digits: 20) of the others of
            each class. None: all training images but a tenth per class, which is for validation
        seed: of the draws and of the augmentation
        size: side in pixels; default 32 for the 32 px sets and digits, else 224
        download: whether missing files may be fetched
        skip_corrupt: go on without images that cannot be decoded, with a warning that lists them. Known sets above 64
            px are looked through for that only if this is set; else such an image is an error when it is reached
        holdout: False fits the images that would be held back for validation too, for a study whose schedule is fixed
            beforehand and that chooses nothing; validation is then None, or the set's own validation part
        padding: of training crops up to 64 px: "constant" as above, or "reflect" [code: attention transfer]
        sharpness: training images up to 64 px are sharpened at random by up to this amount; see `ArrayImages`

    Raises:
        AFDSError: an unknown name, a missing, truncated or wrong file, a corrupt image, too few images in a class
    """
    check_whole("per_class", per_class, 1, none=True)
    check_whole("seed", seed, 0)
    check_whole("size", size, 8, none=True)
    if padding not in ("constant", "reflect"):
        raise AFDSError(f"padding must be 'constant' or 'reflect', not {padding!r}")
    if not isinstance(sharpness, (int, float)) or isinstance(sharpness, bool) or not 0 <= sharpness <= 10:
        raise AFDSError(f"sharpness must be a number from 0 to 10, not {sharpness!r}")
    name = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    spec = SETS.get(name)
    skipped: tuple[str, ...] = ()
    images: np.ndarray | Source
    if spec is not None and not spec.layouts:
        note, listing = "scikit-learn's 8x8 digits", digits()
        images = source = Arrays(np.asarray(listing.images))
        size = size or spec.size
        if size <= SMALL:
            images = np.stack([resized_to(source.read(row), size) for row in range(len(source))])
    else:
        spec, located = (spec, _locate(spec, root, download)) if spec else _own_tree(_given_path(name, root))
        note, size = located.layout.note, size or spec.size
        images, listing, skipped = _read(name, spec, located, size, skip_corrupt)
    if size > SMALL and (padding != "constant" or sharpness):
        raise AFDSError(
            f"padding={padding!r} and sharpness={sharpness!r} are for images up to {SMALL} px; larger ones are cropped"
        )

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
        which = rows[chosen], listing.targets[chosen], listing.classes
        if isinstance(images, np.ndarray):
            return ArrayImages(
                images, *which, augment=augment, flip=spec.flip, seed=int(seed), border=spec.border,
                reflect=padding == "reflect", sharpness=float(sharpness),
            )  # fmt: skip
        return FileImages(images, *which, size=size, augment=augment, flip=spec.flip, seed=int(seed))

    validation = make(drawn.validation, False) if len(drawn.validation) else None
    return Splits(
        make(drawn.train, True), validation, make(drawn.test, False), make(drawn.train, False), listing.classes,
        name=name, note=note, skipped=skipped, captions=listing.captions or listing.classes,
    )  # fmt: skip


class Sealed(ImageDataset):
    """A test split without images and labels. Reading from it is a fault of the program, so no AFDSError."""

    def __init__(self, dataset: ImageDataset):
        super().__init__(np.empty(0), dataset.classes, size=dataset.size, augment=False)

    def _refuse(self, indices: Any) -> Any:
        raise RuntimeError("a test image was asked for in a trial, which must choose without them")

    __getitems__ = raw = _refuse  # type: ignore[assignment]


def sealed(splits: Splits) -> Splits:
    """The splits without test images, for trials, which choose something."""
    return replace(splits, test=Sealed(splits.test))
