"""Every image of a data set decoded once: into one memory-mapped uint8 array, or only to find the corrupt ones.

A cache is a folder with `index.json` and, for a size up to 64 px, `images.npy`. It is there in full or not at all; a
damaged one is built again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from tqdm import tqdm

from afdslib.base import paths
from afdslib.data.datasets import Files
from afdslib.data.fetch import make_folder
from afdslib.data.images import CorruptImageError, resized_to
from afdslib.data.trees import Listing

__all__ = ["VERSION", "Decoded", "decode", "load_cache"]

Decoded: TypeAlias = tuple[np.ndarray | None, Listing, dict[str, str]]
"""uint8 (N, size, size, 3) or None if only looked at; the listing without corrupt images; why those are, by name."""

VERSION = 3
"""Raise it when listing or decoding changes, so that old caches are not used."""

_BATCH, _PENDING = 16, 256  # images per task of a thread, and images decoded before they are written


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
        targets, parts = np.array(index["targets"], np.int64), np.array(index["parts"], np.int8)
        classes, captions, left_out = (tuple(index[key]) for key in ("classes", "captions", "left_out"))
        listing = Listing(index["relative"], targets, parts, classes, captions, left_out=left_out)
        return images, listing, dict(index["corrupt"])
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def decode(name: str, size: int | None, content: str, source: Files, listing: Listing) -> Decoded:
    """Decode every image of `listing`, or take what was decoded before; AFDSError on a full disk.

    The cache is named by the data set, `content` (a hash of the files) and `size`, the side in pixels of the centre
    crops to keep, or None to keep none.
    """
    key = name, size, content
    make_folder(_folder(*key), lambda: bool(load_cache(*key)), lambda folder: _build(folder, size, source, listing))
    decoded = load_cache(*key)
    assert decoded is not None
    return decoded


def _pixels(source: Files, size: int | None, count: int) -> Iterator[np.ndarray | CorruptImageError | None]:
    def one(row: int) -> np.ndarray | CorruptImageError | None:
        try:
            image = source.read(row)
        except CorruptImageError as error:
            return error
        return None if size is None else resized_to(image, size)

    def some(start: int) -> list[np.ndarray | CorruptImageError | None]:
        return [one(row) for row in range(start, min(start + _BATCH, count))]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, count, _PENDING):  # bounded, so that results do not pile up
            yield from chain.from_iterable(pool.map(some, range(start, min(start + _PENDING, count), _BATCH)))


def _header(file: BinaryIO, count: int, size: int) -> None:
    """NumPy's header for (count, size, size, 3); it leaves room for the count to change."""
    file.seek(0)
    shape = (count, size, size, 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _build(folder: Path, size: int | None, source: Files, listing: Listing) -> None:
    rows, corrupt, count = [], {}, len(listing.targets)
    what = "look at every image" if size is None else f"decode to {size} px"
    bar = tqdm(_pixels(source, size, count), total=count, desc=what, unit="image", mininterval=1, disable=None)
    # Plain writes, not a memory map: on a full disk these raise an error where a map kills the process.
    with (folder / "images.npy").open("wb") as file:
        if size is not None:
            _header(file, count, size)
        for row, pixels in enumerate(bar):
            if isinstance(pixels, CorruptImageError):
                corrupt[listing.relative[row] if listing.relative else f"image {row}"] = str(pixels)
                continue
            rows.append(row)
            if pixels is not None:
                file.write(pixels.tobytes())
        if size is not None:
            _header(file, len(rows), size)
    kept = listing.take(np.array(rows, dtype=np.int64)) if corrupt else replace(listing, images=None)
    index = asdict(kept) | {"targets": kept.targets.tolist(), "parts": kept.parts.tolist(), "corrupt": corrupt}
    index["bytes"] = (folder / "images.npy").stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
