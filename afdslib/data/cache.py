"""Every image of a data set decoded once: into one memory-mapped uint8 array, or only to find the corrupt ones.

A cache is a folder with `index.json` and, for a size up to 64 px, `images.npy`. It is there in full or not at all; a
damaged one is built again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from afdslib.base import paths
from afdslib.data.datasets import Source
from afdslib.data.fetch import new_folder
from afdslib.data.images import CorruptImageError, resized_to
from afdslib.data.trees import Listing

__all__ = ["VERSION", "Decoded", "decode", "load_cache"]

VERSION = 3
"""Raise it when listing or decoding changes, so that old caches are not used."""

_BATCH, _PENDING = 16, 256  # images per task of a thread, and images decoded before they are written


class Decoded(NamedTuple):
    """Decoded images."""

    images: np.ndarray | None  # uint8 (N, size, size, 3), or None if they were only looked at
    listing: Listing  # without the corrupt images
    corrupt: dict[str, str]  # why an image could not be decoded, by its name


def _folder(name: str, size: int | None, content: str) -> Path:
    return paths.cache() / f"{name}-{'looked-at' if size is None else f'{size}px'}-{content}-v{VERSION}"


def load_cache(name: str, size: int | None, content: str) -> Decoded | None:
    """A finished cache (see `decode`), or None if it is absent or damaged in any way."""
    folder = _folder(name, size, content)
    try:
        index = json.loads((folder / "index.json").read_text())
        images = None
        if size is not None:
            images = np.load(folder / "images.npy", mmap_mode="r")  # refuses a file shorter than its header says
            whole = (folder / "images.npy").stat().st_size == index["bytes"]
            if not whole or images.dtype != np.uint8 or images.shape != (len(index["targets"]), size, size, 3):
                return None
        listing = Listing(
            index["relative"], np.array(index["targets"], dtype=np.int64), np.array(index["parts"], dtype=np.int8),
            tuple(index["classes"]), tuple(index["captions"]), left_out=tuple(index["left_out"]),
        )  # fmt: skip
        return Decoded(images, listing, dict(index["corrupt"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def decode(name: str, size: int | None, content: str, source: Source, listing: Listing) -> Decoded:
    """Decode every image of `listing`, or take what was decoded before.

    Args:
        name: of the data set; with `size` and `content` (a hash of the files) it names the cache
        size: side in pixels of the centre crops to keep; None to keep none
    """
    target = _folder(name, size, content)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        decoded = load_cache(name, size, content)
        if decoded is None:
            with new_folder(target) as folder:
                _build(folder, size, source, listing)
            decoded = load_cache(name, size, content)
    assert decoded is not None
    return decoded


def _pixels(source: Source, size: int | None) -> Iterator[np.ndarray | CorruptImageError | None]:
    def some(start: int) -> list[np.ndarray | CorruptImageError | None]:
        return [one(row) for row in range(start, min(start + _BATCH, len(source)))]

    def one(row: int) -> np.ndarray | CorruptImageError | None:
        try:
            image = source.read(row)
        except CorruptImageError as error:
            return error
        return None if size is None else resized_to(image, size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), _PENDING):  # bounded, so that results do not pile up
            yield from chain.from_iterable(pool.map(some, range(start, min(start + _PENDING, len(source)), _BATCH)))


def _header(file: BinaryIO, count: int, size: int) -> None:
    """NumPy's header for (count, size, size, 3); it leaves room for the count to change."""
    file.seek(0)
    shape = (count, size, size, 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _build(folder: Path, size: int | None, source: Source, listing: Listing) -> None:
    rows: list[int] = []
    corrupt: dict[str, str] = {}
    what = "look at every image" if size is None else f"decode to {size} px"
    bar = tqdm(_pixels(source, size), total=len(source), desc=what, unit="image", mininterval=1, disable=None)
    # Plain writes, not a memory map: on a full disk these raise an error where a map kills the process.
    with (folder / "images.npy").open("wb") as file:
        if size is not None:
            _header(file, len(source), size)
        for row, pixels in enumerate(bar):
            if isinstance(pixels, CorruptImageError):
                corrupt[listing.relative[row] if listing.relative else f"image {row}"] = str(pixels)
                continue
            rows.append(row)
            if pixels is not None:
                file.write(pixels.tobytes())
        if size is not None:
            _header(file, len(rows), size)
    kept = replace(listing, images=None) if not corrupt else listing.take(np.array(rows, dtype=np.int64))
    index = {
        "bytes": (folder / "images.npy").stat().st_size,
        "relative": kept.relative,
        "targets": kept.targets.tolist(),
        "parts": kept.parts.tolist(),
        "classes": kept.classes,
        "captions": kept.captions,
        "left_out": kept.left_out,
        "corrupt": corrupt,
    }
    (folder / "index.json").write_text(json.dumps(index))
