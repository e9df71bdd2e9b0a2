"""Decoded images as one memory-mapped uint8 array, built once per data set, size and content.

A cache is a folder `{name}-{size}px-{content}` with `images.npy` and `index.json`; it is written under a temporary name
and renamed, so it is there in full or not at all. A damaged one is built again.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from afdslib.base import paths
from afdslib.data.datasets import Source
from afdslib.data.images import CorruptImageError, resized_to
from afdslib.data.trees import Listing

__all__ = ["VERSION", "decoded", "load_cache"]

VERSION = 2
"""Raise it when decoding changes, so that old caches are not used."""


def _read(folder: Path) -> tuple[np.ndarray, dict] | None:
    """A cache's array and index, or None if it is absent or damaged in any way."""
    try:
        index = json.loads((folder / "index.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")  # refuses a file shorter than its header says
        right = images.dtype == np.uint8 and list(images.shape) == index["shape"]
        whole = (folder / "images.npy").stat().st_size == index["bytes"]
        return (images, index) if right and whole and index["version"] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _pixels(source: Source, size: int) -> Iterator[np.ndarray | CorruptImageError]:
    def one(row: int) -> np.ndarray | CorruptImageError:
        try:
            return resized_to(source.read(row), size)
        except CorruptImageError as error:
            return error

    rows = range(len(source))
    probe = source.read if len(source) else None
    large = False
    if probe is not None:
        try:
            large = max(probe(0).size) > 2 * 64
        except CorruptImageError:
            pass
    if not large:  # tiny images: threads would only wait for each other
        yield from map(one, rows)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), 1024):  # bounded, so that results do not pile up
            yield from pool.map(one, rows[start : start + 1024])


def _corrupt(error: str, skipped: list[str]) -> CorruptImageError:
    more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
    return CorruptImageError(error + more)


def load_cache(
    name: str, size: int, content: str, *, skip_corrupt: bool
) -> tuple[np.ndarray, Listing, list[str]] | None:
    """A finished cache: images, what they are, and the names of images left out; None if there is none.

    Raises:
        CorruptImageError: it was built with images left out and `skip_corrupt` is not set
    """
    found = _read(paths.cache() / f"{name}-{size}px-{content}")
    if found is None:
        return None
    images, index = found
    if index["skipped"] and not skip_corrupt:
        raise _corrupt(index["first_error"], index["skipped"])
    listing = Listing(
        index["relative"],
        np.array(index["targets"], dtype=np.int64),
        np.array(index["parts"], dtype=np.int8),
        tuple(index["classes"]),
        captions=tuple(index["captions"]),
    )
    return images, listing, index["skipped"]


def decoded(
    name: str, size: int, content: str, source: Source, listing: Listing, *, skip_corrupt: bool
) -> tuple[np.ndarray, Listing, list[str]]:
    """Decode every image of `listing` to (N, size, size, 3), or map what was decoded before.

    Args:
        name: of the data set; with `size` and `content` (a hash of the files) it names the cache
        skip_corrupt: leave out images that cannot be decoded

    Raises:
        CorruptImageError: an image cannot be decoded and `skip_corrupt` is not set; nothing is kept then
    """
    target = paths.cache() / f"{name}-{size}px-{content}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        found = load_cache(name, size, content, skip_corrupt=skip_corrupt)
        if found is not None:
            return found
        for stale in target.parent.glob(f".{target.name}.*"):  # of a killed process: the lock is ours
            shutil.rmtree(stale, ignore_errors=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        temporary.mkdir()
        try:
            _build(temporary, size, source, listing, skip_corrupt=skip_corrupt)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    found = load_cache(name, size, content, skip_corrupt=skip_corrupt)
    assert found is not None
    return found


def _header(file: BinaryIO, count: int, size: int) -> None:
    """NumPy's header for (count, size, size, 3); it leaves room for the count to change."""
    file.seek(0)
    shape = (count, size, size, 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _build(folder: Path, size: int, source: Source, listing: Listing, *, skip_corrupt: bool) -> None:
    kept: list[int] = []
    skipped: list[str] = []
    first_error = ""
    total = len(source)
    bar = tqdm(
        _pixels(source, size), total=total, desc=f"decode to {size} px", unit="image", mininterval=1, disable=None
    )
    # Plain writes, not a memory map: on a full disk these raise an error where a map kills the process.
    with (folder / "images.npy").open("wb") as file:
        _header(file, total, size)
        start = file.tell()
        for row, pixels in enumerate(bar):
            if isinstance(pixels, CorruptImageError):
                if not skip_corrupt:
                    raise pixels
                skipped.append(source.name(row))
                first_error = first_error or str(pixels)
                continue
            file.write(pixels.tobytes())
            kept.append(row)
        _header(file, len(kept), size)
        assert file.tell() == start
    rows = np.array(kept, dtype=np.int64)
    index = {
        "version": VERSION,
        "shape": [len(kept), size, size, 3],
        "bytes": (folder / "images.npy").stat().st_size,
        "relative": [listing.relative[r] for r in kept] if listing.relative else [],
        "targets": listing.targets[rows].tolist(),
        "parts": listing.parts[rows].tolist(),
        "classes": list(listing.classes),
        "captions": list(listing.captions),
        "skipped": skipped,
        "first_error": first_error,
    }
    (folder / "index.json").write_text(json.dumps(index))
