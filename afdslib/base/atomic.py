"""Files that are either whole or absent: write beside the target, flush to disk, rename."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from afdslib.base.errors import AFDSError

__all__ = ["atomic_path", "output_path", "remove_leftovers", "write_json", "write_text"]

_SUFFIX = ".part"


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder, which is made; leaving the block without an error renames it.

    A killed process leaves the old file as it was, and at most a hidden `.NAME.*.part` beside it.

    Raises:
        AFDSError: The folder cannot be written or is full. Nothing is left half written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part, os.O_RDWR)
        os.replace(part, path)
        with suppress(OSError):  # some network file systems refuse to sync folders, which makes the rename durable
            _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        advice = "free space there, mend its permissions or choose another folder"
        raise AFDSError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
    finally:
        with suppress(OSError):  # the folder itself cannot be reached: the error above already says so
            part.unlink(missing_ok=True)


def output_path(path: str | Path) -> Path:
    """A file that a user asks for: refused before anything is computed if its folder does not exist, or it is one."""
    path = Path(path)
    if not path.parent.is_dir():
        raise AFDSError(f"the folder {path.parent} of {path} does not exist; create it, or give another")
    if path.is_dir():
        raise AFDSError(f"{path} is a folder; give the name of the file to write")
    return path


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically (see `atomic_path`)."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes strict, readable JSON atomically: sorted keys, two spaces, no NaN."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed writers left in a folder. Only call it while nobody else writes there."""
    for part in folder.glob(f".*{_SUFFIX}"):
        part.unlink(missing_ok=True)
