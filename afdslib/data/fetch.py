"""Finding, downloading and verifying the files of a data set.

A file is looked for in the folder the caller names (which may be read-only) and in the project's raw data folder; it is
downloaded only into the latter.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from filelock import FileLock

from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.data.archives import digest, extract, is_archive, write_text_atomically
from afdslib.data.sources import Remote

__all__ = ["places", "find", "fetch", "check_size", "verify", "pin", "unpack", "missing_sentence"]


def places(name: str, root: str | Path | None) -> list[Path]:
    """The folders in which files of the set `name` are looked for, the caller's first."""
    raw = paths.raw_data()
    given = []
    if root is not None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise AFDSError(f"the data folder {root} does not exist: create it, or give another")
        given = [root, root / name]
    return [p for p in [*given, raw / name, raw] if p.is_dir()]


def find(remote: Remote, folders: list[Path]) -> Path | None:
    """The first of `folders` that holds the file."""
    return next((f / remote.file for f in folders if (f / remote.file).is_file()), None)


def _size(remote: Remote) -> str:
    return f"{remote.size:,} bytes" if remote.size is not None else "size unknown"


def missing_sentence(name: str, remotes: list[Remote], why: str) -> AFDSError:
    """One sentence: which files to fetch, from where, their size and checksum, and the folder to put them in."""
    files = " and ".join(
        f"{r.file} ({r.url or r.hint}; {_size(r)}; checksum {r.checksum or 'unknown'})" for r in remotes
    )
    folder = paths.raw_data() / name
    return AFDSError(f"the data set {name} is not on this machine{why}: put into the folder {folder} {files}")


def _pin_path(file: Path) -> Path:
    return file.with_name(f"{file.name}.pin.json")


def pin(file: Path, remote: Remote) -> None:
    """Record, beside a file whose checksum no source gives, its sha256, if that has not been done.

    Called after the file was read without error. A file in a read-only folder is used without a pin.
    """
    place = _pin_path(file)
    if remote.checksum is not None or place.exists():
        return
    note = {"file": file.name, "sha256": digest(file), "size": file.stat().st_size, "url": remote.url}
    note["note"] = "first seen here, not given by a source"
    try:
        write_text_atomically(place, json.dumps(note, indent=1))
    except OSError:
        pass


def _check_pin(file: Path) -> None:
    place = _pin_path(file)
    try:
        pinned = json.loads(place.read_text())["sha256"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AFDSError(
            f"the pinned checksum {place} cannot be read ({error}): delete it to pin the file anew"
        ) from error
    found = digest(file)
    if pinned != found:
        raise AFDSError(
            f"the file {file} has sha256 {found}, not {pinned} as pinned when it was first used: fetch it again, "
            f"or delete {place} if the change is meant"
        )


def check_size(file: Path, remote: Remote) -> None:
    """Check a file's size where a source gives one; the file is not opened.

    Raises:
        AFDSError: it differs
    """
    if remote.size is not None and file.stat().st_size != remote.size:
        state = "truncated" if file.stat().st_size < remote.size else "not the published file"
        raise AFDSError(
            f"the file {file} is {state}: it has {file.stat().st_size:,} bytes instead of {remote.size:,}: "
            "delete it and fetch it again"
        )


def verify(file: Path, remote: Remote) -> None:
    """Check size and checksum where a source gives them, else the pin.

    Raises:
        AFDSError: one of them differs
    """
    check_size(file, remote)
    if remote.checksum is None:
        _check_pin(file)
        return
    algorithm, expected = remote.checksum.split(":")
    found = digest(file, algorithm)
    if found != expected:
        raise AFDSError(
            f"the file {file} is damaged, {algorithm} {found} instead of {expected}: delete it and fetch it again"
        )


def fetch(name: str, remote: Remote, missing: list[Remote] | None = None) -> Path:
    """Download one file into the raw data folder of the set; `missing` are all files to name should that fail.

    Raises:
        AFDSError: no address, no network, a server's refusal, or a wrong checksum
    """
    if remote.url is None:
        raise missing_sentence(name, [remote], "")
    import pooch  # only a download needs it, and it imports requests

    folder = paths.raw_data() / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{remote.file}.lock"):
        target = folder / remote.file
        if not target.is_file():
            log = pooch.get_logger()
            level = log.level
            log.setLevel("ERROR")  # its own lines would stand before our sentence
            try:
                # pooch writes to a temporary name and renames it after the checksum was found right.
                pooch.retrieve(
                    remote.url,
                    known_hash=remote.checksum,
                    fname=remote.file,
                    path=folder,
                    downloader=pooch.HTTPDownloader(progressbar=sys.stderr.isatty()),
                )
            except ValueError as error:
                raise AFDSError(
                    f"the download {remote.url} has not the checksum {remote.checksum}: try again, or fetch it by hand"
                ) from error
            except OSError as error:  # requests' exceptions are OSErrors
                if isinstance(error, PermissionError) or getattr(error, "errno", None) == 28:
                    raise
                raise missing_sentence(
                    name, missing or [remote], f" and its download failed ({type(error).__name__})"
                ) from error
            finally:
                log.setLevel(level)
    return target


def unpack(name: str, files: list[Path]) -> tuple[Path, str]:
    """Extract verified files into `raw/<name>/<content hash>`.

    Returns:
        the folder, and the content hash, which names caches of decoded images too.
    """
    digests = {file.name: digest(file) for file in files}
    content = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]
    target = paths.raw_data() / name / f"x-{content}"
    return extract(tuple(files), target, stamp={"files": digests}), content


def fingerprint(folder: Path, relative: list[str]) -> str:
    """Hash of names, sizes and modification times of files that were not extracted by this project."""
    state = hashlib.sha256(str(folder.resolve()).encode())
    for name in relative:
        try:
            found = os.stat(folder / name)
        except OSError as error:
            raise AFDSError(f"the image {folder / name} is listed but missing: fetch the data set again") from error
        state.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return state.hexdigest()[:12]


def usable_as_archive(path: Path) -> bool:
    """Whether a path given by the caller is an archive to open."""
    return path.is_file() and is_archive(path)
