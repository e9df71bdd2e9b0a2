"""`load`: a name or a path -> the four data sets of a study."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from afdslib.base.errors import AFDSError
from afdslib.data import cache, fetch, splits, trees
from afdslib.data.archives import SUFFIXES, is_archive
from afdslib.data.catalogue import NAMES, SETS, DataSet, Layout, digits
from afdslib.data.datasets import ArrayImages, Arrays, FileImages, Files, ImageDataset, Source
from afdslib.data.images import SMALL, CorruptImageError, resized_to
from afdslib.data.sources import Remote
from afdslib.data.trees import Listing

__all__ = ["Splits", "load", "look"]


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class _Located:
    """A data set on disk: where, in which form, and a hash of its content (None for a loose tree not hashed yet)."""

    folder: Path
    layout: Layout
    content: str | None


def _found(layout: Layout, folders: list[Path]) -> list[Path] | None:
    """All files of a layout, or None if one is missing."""
    files = [file for file in (fetch.find(remote, folders) for remote in layout.remotes) if file is not None]
    return files if len(files) == len(layout.remotes) else None


def _whole(name: str, value: object, least: int, *, none: bool = False) -> None:
    if none and value is None:
        return
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < least:
        raise AFDSError(f"{name} must be a whole number of at least {least}{' or None' if none else ''}, not {value!r}")


def _search(spec: DataSet, root: str | Path | None) -> tuple[Layout, Path | None, list[Path]] | None:
    """What is there of a set: its layout and the extracted folder, or else all of its files; None if some are missing.

    Only looks: nothing is opened or written.
    """
    folders = fetch.places(spec.base, root)
    for folder in folders:
        for layout in spec.layouts:
            if all((folder / marker).exists() for marker in layout.markers):
                return layout, folder, []
            files = _found(layout, [folder])
            if files:
                return layout, None, files
    for layout in spec.layouts:  # the files may lie in several of the folders
        files = _found(layout, folders)
        if files:
            return layout, None, files
    return None


def _lacking(spec: DataSet, root: str | Path | None) -> list[Remote]:
    """Those files of the layout to be fetched that are not there."""
    layout = next((one for one in reversed(spec.layouts) if all(r.url for r in one.remotes)), spec.layouts[-1])
    folders = fetch.places(spec.base, root)
    return [remote for remote in layout.remotes if fetch.find(remote, folders) is None]


def _locate(name: str, spec: DataSet, root: str | Path | None, download: bool) -> _Located:
    """Find the set in extracted or archive form, or download it."""
    there = _search(spec, root)
    if there is None:
        missing = _lacking(spec, root)
        if not download or any(remote.url is None for remote in missing):
            raise fetch.missing_sentence(spec.base, missing, "" if download else " and download=False")
        for done, remote in enumerate(missing):
            fetch.fetch(spec.base, remote, missing[done:])
        there = _search(spec, root)
        assert there is not None
    layout, folder, files = there
    return _Located(folder, layout, None) if folder is not None else _verified(spec, layout, files)


def look(name: str, root: str | Path | None = None) -> None:
    """Looks whether the files of a data set are there, with the sizes their sources give.

    Nothing is opened, fetched, extracted or written, so checksums and contents stay unknown until `load`.

    Args:
        name: a known name, or a path
        root: as for `load`

    Raises:
        AFDSError: an unknown name, a missing file, or one of another size
    """
    known = SETS.get(name)
    if known is None:
        _given_path(name, root)
    elif known.base != "digits":
        there = _search(known, root)
        if there is None:
            raise fetch.missing_sentence(known.base, _lacking(known, root), "")
        layout, _, files = there
        for file, remote in zip(files, layout.remotes, strict=False):
            fetch.check_size(file, remote)


def _verified(spec: DataSet, layout: Layout, files: list[Path]) -> _Located:
    for file, remote in zip(files, layout.remotes, strict=True):
        fetch.verify(file, remote)
    folder, content = fetch.unpack(spec.base, files)
    for file, remote in zip(files, layout.remotes, strict=True):
        fetch.pin(file, remote)
    return _Located(folder, layout, content)


def _given_path(name: str, root: str | Path | None) -> Path:
    """The folder or archive that `name` means, if it is no known name."""
    candidates = [Path(name).expanduser()] if name else []
    if root is not None and name:
        candidates.append(Path(root).expanduser() / name)
    found = next((p for p in candidates if p.exists()), None)
    if found is None:
        if os.sep in name or is_archive(name):
            raise AFDSError(
                f"the data set path {name} does not exist: give a folder or an archive ({', '.join(SUFFIXES)})"
            )
        raise AFDSError(
            f"there is no data set {name!r}: take one of {', '.join(NAMES)}, or the path of an ImageFolder tree"
        )
    if found.is_file() and not is_archive(found):
        raise AFDSError(
            f"the file {found} is no archive of a known kind: give a folder or one of {', '.join(SUFFIXES)}"
        )
    return found


def _path_set(path: Path) -> tuple[DataSet, _Located]:
    base = "".join(c if c.isalnum() or c in "-_." else "-" for c in path.resolve().name) or "tree"
    layout = Layout((), (), trees.image_folder)
    spec = DataSet(f"tree-{base}", (layout,))
    if path.is_file():
        folder, content = fetch.unpack(spec.base, [path])
        return spec, _Located(folder, layout, content)
    return spec, _Located(path, layout, None)


def _source(folder: Path, listing: Listing) -> Source:
    return Arrays(listing.images) if listing.images is not None else Files(folder, listing.relative)


def _sound(located: _Located, source: Source) -> tuple[np.ndarray, list[str]]:
    """Decode every image once, and return the rows of those that can be, and the names of the others."""
    from tqdm import tqdm

    rows, skipped = [], []
    for row in tqdm(range(len(source)), desc="look for corrupt images", unit="image", disable=None):
        try:
            source.read(row)
            rows.append(row)
        except CorruptImageError:
            skipped.append(source.name(row))
    return np.array(rows, dtype=np.int64), skipped


def _read(
    spec: DataSet, located: _Located, size: int, skip_corrupt: bool
) -> tuple[np.ndarray | Source, Listing, list[str]]:
    """Images (an array up to 64 px, else a source) with one row per entry of the Listing."""
    content = located.content
    if size <= SMALL and content is not None:
        found = cache.load_cache(spec.base, size, content, skip_corrupt=skip_corrupt)
        if found is not None:
            return found
    listing = located.layout.read(located.folder)
    absent = next((one for one in listing.relative if not (located.folder / one).is_file()), None)
    if absent is not None:
        raise AFDSError(
            f"the image {located.folder / absent} is listed but missing: fetch the data set {spec.base} again"
        )
    source = _source(located.folder, listing)
    if size <= SMALL:
        if content is None:
            parts = hashlib.sha256(listing.parts.tobytes() + listing.targets.tobytes()).hexdigest()[:6]
            files = listing.relative or sorted(
                p.relative_to(located.folder).as_posix() for p in (located.folder / located.layout.markers[0]).iterdir()
            )
            content = f"{fetch.fingerprint(located.folder, files)}{parts}"
        return cache.decoded(spec.base, size, content, source, listing, skip_corrupt=skip_corrupt)
    if skip_corrupt:
        rows, skipped = _sound(located, source)
        if skipped:
            listing = replace(
                listing,
                relative=[listing.relative[r] for r in rows],
                targets=listing.targets[rows],
                parts=listing.parts[rows],
            )
            source = _source(located.folder, listing)
        return source, listing, skipped
    return source, listing, []


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
    """Ready-made splits of a data set.

    Names: stanford-dogs, mit-indoors, caltech-256, cub-200-2011, food-101, cifar10, tiny-imagenet-32 (also -source160
    and -target40, which share no class), hymenoptera-160, digits (also digits-0-4, digits-5-9), or the path of an
    ImageFolder tree or of an archive of one. The first five and CIFAR-10's python archive have been tried on small
    fixtures of the same form only, never on the real downloads.

    Splits: official train and test parts where the set has them (tiny-imagenet-32: `val` is the test part). Caltech-256
    has none: 20 test images per class [our reading], the same for every seed. Digits: every second image of a class is
    a test image. A flat tree is split 70/15/15 per class by the seed, so its test images do depend on the seed.

    Images up to 64 px are decoded once (shorter side to `size`, centre crop) into a memory-mapped array; training pads
    by 4 (mean colour; black for digits), crops and mirrors (digits are never mirrored). Larger ones: shorter side to
    size*256/224, crop `size`, mirror. All are normalised with ImageNet's mean and deviation.

    Args:
        name: a known name, or a path
        root: folder with archives or extracted trees, which may be read-only; the raw data folder is looked in too
        per_class: fitting images per class, drawn by `seed`; validation then holds 100 (digits: 20) of the others of
            each class. None: all training images but a tenth per class, which is the validation set
        seed: of the draws and of the augmentation
        size: side in pixels; default 32 for the 32 px sets and digits, else 224
        download: whether missing files may be fetched
        skip_corrupt: go on without images that cannot be decoded, with a warning that lists them. Above 64 px every
            image is decoded once for that; without it such an image is an error when it is reached
        holdout: False fits the images that would be held back for validation too, for a study whose schedule is fixed
            beforehand and that chooses nothing; validation is then None, or the set's own validation part
        padding: of training crops up to 64 px: "constant" as above, or "reflect" [code: attention transfer]
        sharpness: training images up to 64 px are sharpened at random by up to this amount; see `ArrayImages`

    Returns:
        Splits(train, validation, test, statistics, classes).

    Raises:
        AFDSError: an unknown name, a missing, truncated or wrong file, a corrupt image, too few images in a class
    """
    _whole("per_class", per_class, 1, none=True)
    _whole("seed", seed, 0)
    _whole("size", size, 8, none=True)
    if padding not in ("constant", "reflect"):
        raise AFDSError(f"padding must be 'constant' or 'reflect', not {padding!r}")
    if not isinstance(sharpness, (int, float)) or isinstance(sharpness, bool) or not 0 <= sharpness <= 10:
        raise AFDSError(f"sharpness must be a number from 0 to 10, not {sharpness!r}")
    name = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    known = SETS.get(name)
    if known is not None and known.base == "digits":
        spec, located = known, None
    elif known is not None:
        spec, located = known, _locate(name, known, root, download)
    else:
        spec, located = _path_set(_given_path(name, root))
    size = size or spec.size

    skipped: list[str] = []
    images: np.ndarray | Source
    if located is None:
        listing = digits()
        images = source = Arrays(np.asarray(listing.images))
        if size <= SMALL:
            images = np.stack([resized_to(source.read(row), size) for row in range(len(source))])
    else:
        images, listing, skipped = _read(spec, located, size, skip_corrupt)
    if skipped:
        shown = ", ".join(skipped[:10]) + (", ..." if len(skipped) > 10 else "")
        warnings.warn(f"{name}: {len(skipped)} images could not be decoded and are left out: {shown}", stacklevel=2)

    rows = np.arange(len(listing.targets))
    if spec.choose is not None:
        listing, rows = trees.subset(listing, spec.choose(listing.classes))
    parts = spec.parts(listing) if spec.parts else listing.parts
    drawn = splits.partition(
        listing, parts, per_class=per_class, seed=seed, validation_per_class=spec.validation_per_class, holdout=holdout
    )
    if not len(drawn.test):
        raise AFDSError(
            f"the data set {name} has no test images: add a test/ folder, or at least 4 images to each class"
        )

    def make(chosen: np.ndarray, augment: bool) -> ImageDataset:
        labels, names = listing.targets[chosen], listing.classes
        if isinstance(images, np.ndarray):
            return ArrayImages(
                images, rows[chosen], labels, names, augment=augment, flip=spec.flip, seed=int(seed),
                border=spec.border, reflect=padding == "reflect", sharpness=float(sharpness),
            )  # fmt: skip
        if padding != "constant":
            raise AFDSError(f"padding={padding!r} is for images up to {SMALL} px; larger ones are cropped, not padded")
        if sharpness:
            raise AFDSError(f"sharpness={sharpness!r} is for images up to {SMALL} px; take 0 for larger ones")
        return FileImages(
            images, rows[chosen], labels, names, size=size, augment=augment, flip=spec.flip, seed=int(seed)
        )

    return Splits(
        train=make(drawn.train, True),
        validation=make(drawn.validation, False) if len(drawn.validation) else None,
        test=make(drawn.test, False),
        statistics=make(drawn.train, False),
        classes=listing.classes,
        name=name,
        note=located.layout.note if located else "scikit-learn's 8x8 digits",
        skipped=tuple(skipped),
        captions=listing.captions or listing.classes,
    )
