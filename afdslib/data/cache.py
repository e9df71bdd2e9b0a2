"""Every image of a data set decoded once: into one memory-mapped uint8 array, or only to find the corrupt ones.

A cache is a folder with `index.json`, for a size up to 64 px `images.npy`, and for a larger one scaled copies of large
photographs, without loss. It is there in full or not at all; a damaged one is built again.
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
from PIL import Image
from tqdm import tqdm

from afdslib.base import paths
from afdslib.data.datasets import Files
from afdslib.data.fetch import make_folder
from afdslib.data.images import CorruptImageError, resize_shorter, resized_to
from afdslib.data.trees import Listing

__all__ = ["COPIES", "VERSION", "Decoded", "decode", "load_cache"]

Decoded: TypeAlias = tuple[np.ndarray | dict[int, Path], Listing, dict[str, str]]
"""uint8 (N, size, size, 3), or scaled copies by row; the listing without corrupt images; why those are, by name."""

VERSION = 3
"""Raise it when listing or decoding changes, so that old caches are not used."""

COPIES = 20_000
"""Scaled copies are kept of data sets of at most so many images: some 50 kB each at 128 px, 150 kB at 224."""

_BATCH, _PENDING = 16, 256  # images per task of a thread, and images decoded before they are written


def _folder(name: str, size: int | None, content: str, shorter: int) -> Path:
    kind = f"{size}px" if size is not None else f"shorter-{shorter}" if shorter else "looked-at"
    return paths.cache() / f"{name}-{kind}-{content}-v{VERSION}"


def load_cache(name: str, size: int | None, content: str, shorter: int = 0) -> Decoded | None:
    """A finished cache (see `decode`), or None if it is absent or damaged in any way."""
    folder = _folder(name, size, content, shorter)
    try:
        index = json.loads((folder / "index.json").read_text())
        images = {row: folder / f"{row}.png" for row in index.get("copied", ())}
        if not all(file.is_file() for file in images.values()):
            return None
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


def decode(
    name: str, size: int | None, content: str, source: Files, listing: Listing, shorter: int = 0
) -> Decoded:  # fmt: skip
    """Decode every image of `listing`, or take what was decoded before; AFDSError on a full disk.

    The cache is named by the data set, `content` (a hash of the files) and `size`, the side in pixels of the centre
    crops to keep, or None to keep none. Then large photographs, which take 0.1 s and more to decode, are kept with
    `shorter` pixels on their shorter side, where that is not 0; later resizing to it changes no pixel.
    """
    key = name, size, content, shorter
    shorter = shorter if len(listing.targets) <= COPIES else 0

    def fill(folder: Path) -> None:
        _build(folder, size, shorter, source, listing)

    make_folder(_folder(*key), lambda: bool(load_cache(*key)), fill)
    decoded = load_cache(*key)
    assert decoded is not None
    return decoded


def _pixels(
    source: Files, size: int | None, shorter: int, count: int
) -> Iterator[np.ndarray | CorruptImageError | None]:  # fmt: skip
    def one(row: int) -> np.ndarray | CorruptImageError | None:
        try:
            image = source.read(row)
        except CorruptImageError as error:
            return error
        if size is None:
            large = shorter and min(image.size) >= 2 * shorter
            return np.asarray(resize_shorter(image, shorter)) if large else None
        return resized_to(image, size)

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


def _build(folder: Path, size: int | None, shorter: int, source: Files, listing: Listing) -> None:
    rows: list[int] = []
    copied, corrupt, count = [], {}, len(listing.targets)
    what = "look at every image" if size is None else f"decode to {size} px"
    bar = tqdm(_pixels(source, size, shorter, count), total=count, desc=what, unit="image", mininterval=1, disable=None)
    # Plain writes, not a memory map: on a full disk these raise an error where a map kills the process.
    with (folder / "images.npy").open("wb") as file:
        if size is not None:
            _header(file, count, size)
        for row, pixels in enumerate(bar):
            if isinstance(pixels, CorruptImageError):
                corrupt[listing.relative[row] if listing.relative else f"image {row}"] = str(pixels)
                continue
            if pixels is not None and size is None:
                Image.fromarray(pixels).save(folder / f"{len(rows)}.png", compress_level=1)
                copied.append(len(rows))
            rows.append(row)
            if size is not None:
                assert pixels is not None
                file.write(pixels.tobytes())
        if size is not None:
            _header(file, len(rows), size)
    kept = listing.take(np.array(rows, dtype=np.int64)) if corrupt else replace(listing, images=None)
    index = asdict(kept) | {"targets": kept.targets.tolist(), "parts": kept.parts.tolist(), "corrupt": corrupt}
    index["copied"] = copied
    index["bytes"] = (folder / "images.npy").stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
