"""The files of a data set: found, downloaded, verified, and extracted so that a folder is whole or absent.

A file is looked for in the folder the caller names (which may be read-only) and in the project's raw data folder; it is
downloaded only into the latter. An archive entry that would land outside its folder (`..`, an absolute path, a link
that points out, a device) is refused, and so is an archive that would fill the disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from afdslib.base import paths
from afdslib.base.atomic import write_json
from afdslib.base.errors import AFDSError
from afdslib.data.sources import Remote

__all__ = [
    "SUFFIXES", "check_size", "digest", "download", "extract", "find", "fingerprint", "is_archive", "make_folder",
    "missing_sentence", "pin", "places", "unpack", "verify",
]  # fmt: skip

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")

GROWTH, ALLOWED, ENTRIES = 200, 2**30, 20_000_000
"""An archive gives at most `GROWTH` times its own bytes, or `ALLOWED` bytes if that is more, in `ENTRIES` entries."""

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)  # no fault of an archive


def is_archive(path: str | Path) -> bool:
    """Whether the name ends as an archive this project opens does."""
    return str(path).lower().endswith(SUFFIXES)


def places(name: str, root: str | Path | None) -> list[Path]:
    """The folders in which files of the set `name` are looked for, the caller's first."""
    raw, given = paths.raw_data(), []
    if root is not None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise AFDSError(f"the data folder {root} does not exist: create it, or give another")
        given = [root, root / name]
    return [p for p in [*given, raw / name, raw] if p.is_dir()]


def find(remote: Remote, folders: list[Path]) -> Path | None:
    """The first of `folders` that holds the file."""
    return next((f / remote.file for f in folders if (f / remote.file).is_file()), None)


def missing_sentence(name: str, remotes: list[Remote], why: str) -> AFDSError:
    """One sentence: which files to fetch, from where, their size and checksum, and the folder to put them in."""
    files = " and ".join(
        f"{r.file} ({r.url or r.hint}; {f'{r.size:,} bytes' if r.size is not None else 'size unknown'}; "
        f"checksum {r.checksum or 'unknown'})"
        for r in remotes
    )
    folder = paths.raw_data() / name
    return AFDSError(f"the data set {name} is not on this machine{why}: put into the folder {folder} {files}")


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file, remembered under the cache folder by path, size and modification time."""
    path = path.resolve()
    status = path.stat()
    state = [str(path), status.st_size, status.st_mtime_ns]
    memo = paths.cache() / "checksums" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.json"
    known: dict[str, Any] = {"file": state}
    try:
        stored = json.loads(memo.read_text())
        known = stored if stored["file"] == state else known
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if algorithm not in known:
        with path.open("rb") as file:
            known[algorithm] = hashlib.file_digest(file, algorithm).hexdigest()
        write_json(memo, known)
    return known[algorithm]


def fingerprint(folder: Path, relative: list[str]) -> str:
    """Hash of names, sizes and modification times of files that were not extracted by this project."""
    state = hashlib.sha256(os.fsencode(folder.resolve()))
    for name in relative:
        status = os.stat(folder / name)
        state.update(os.fsencode(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    return state.hexdigest()[:12]


def _pin_path(file: Path) -> Path:
    return file.with_name(f"{file.name}.pin.json")


def pin(file: Path, remote: Remote) -> None:
    """Record the sha256 of a file whose checksum no source gives beside it, after it was read without error."""
    if remote.checksum is None and not _pin_path(file).exists():
        note = {"file": file.name, "sha256": digest(file), "size": file.stat().st_size, "url": remote.url}
        with suppress(AFDSError):  # a file in a read-only folder is used without a pin
            write_json(_pin_path(file), note | {"note": "first seen here, not given by a source"})


def check_size(file: Path, remote: Remote) -> None:
    """Check a file's size where a source gives one; the file is not opened."""
    size = file.stat().st_size
    if remote.size is not None and size != remote.size:
        state = "truncated" if size < remote.size else "not the published file"
        counts = f"it has {size:,} bytes instead of {remote.size:,}"
        raise AFDSError(f"the file {file} is {state}: {counts}: delete it and fetch it again")


def verify(file: Path, remote: Remote) -> None:
    """Check size and checksum where a source gives them, else the pin."""
    check_size(file, remote)
    checksum, place, origin = remote.checksum, _pin_path(file), ""
    if checksum is None and place.exists():
        try:
            checksum = f"sha256:{json.loads(place.read_text())['sha256']}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AFDSError(f"the pinned checksum {place} cannot be read ({error}): delete it to pin anew") from error
        origin = f", as {place} pinned it at its first use"
    if checksum is not None:
        algorithm, expected = checksum.split(":")
        if (actual := digest(file, algorithm)) != expected:
            differ = f"{algorithm} {actual} instead of {expected}{origin}"
            raise AFDSError(f"the file {file} is damaged, {differ}: delete it and fetch it again")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keeps other processes out while `target` is made, and turns what a full disk leads to into one sentence."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            yield
    except OSError as error:
        advice = "free space there or mend its permissions"
        raise AFDSError(f"cannot write {target}: {error.strerror or error}; {advice}") from error


def download(name: str, remote: Remote, missing: list[Remote]) -> None:
    """Download one file into the raw data folder of the set; `missing` are all files to name should that fail."""
    import pooch  # only a download needs it, and it imports requests

    folder = paths.raw_data() / name
    with _locked(folder / remote.file):
        if (folder / remote.file).is_file():
            return
        pooch.get_logger().setLevel("ERROR")  # its own lines would stand before our sentence
        try:
            # pooch writes to a temporary name and renames it after the checksum was found right.
            loader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty())
            pooch.retrieve(remote.url, remote.checksum, remote.file, folder, downloader=loader)
        except ValueError as error:
            wrong = f"has not the checksum {remote.checksum}: try again, or fetch it by hand"
            raise AFDSError(f"the download {remote.url} {wrong}") from error
        except OSError as error:  # requests' exceptions are OSErrors
            if error.errno in _DISK:
                raise
            raise missing_sentence(name, missing, f" and its download failed ({type(error).__name__})") from error


def make_folder(target: Path, is_made: Callable[[], bool], fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder, which becomes `target` once complete, unless `is_made()`; AFDSError on a full disk."""
    with _locked(target):
        temporary = target.with_name(f".{target.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
        if is_made():
            return
        try:
            temporary.mkdir()
            fill(temporary)
            if target.exists():  # damaged or half made
                shutil.rmtree(target)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class _Entry(tarfile.TarInfo):
    """Notes that the archive's end mark was read: tarfile takes a file cut at an entry's end for a complete one."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True
            raise


def _extract_one(file: Path, folder: Path) -> int:
    """Extracts an archive or copies a plain file, and says how many entries it had."""
    try:
        if not is_archive(file):
            shutil.copyfile(file, folder / file.name)
            return 0
        if zipfile.is_zipfile(file) or file.name.lower().endswith(".zip"):
            with zipfile.ZipFile(file) as pack:
                entries = [(e, e.filename, e.file_size, stat.S_ISLNK(e.external_attr >> 16)) for e in pack.infolist()]
                return _extract_entries(file, entries, lambda entry: pack.extract(entry, folder))
        with tarfile.open(file, "r:*", tarinfo=_Entry) as tar:
            # The data filter refuses links and special files that reach outside, and drops owners and set-id bits.
            members = ((member, member.name, member.size, False) for member in tar)
            count = _extract_entries(file, members, lambda member: tar.extract(member, folder, filter="data"))
            if not getattr(tar, "ended", False):
                raise tarfile.ReadError("its end is missing")
            return count
    # Besides their own errors, the readers of archives raise EOFError, KeyError, struct.error, RuntimeError, ...
    except Exception as error:
        if isinstance(error, AFDSError) or getattr(error, "errno", None) in _DISK:
            raise
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        raise AFDSError(f"the archive {file} is truncated or damaged ({reason}): fetch it again") from error


def _extract_entries(
    archive: Path, entries: Iterable[tuple[Any, str, int, bool]], extract_entry: Callable[[Any], object]
) -> int:
    """Extracts (entry, name, bytes, whether to refuse it), unless one leads out of its folder or fills the disk."""
    count, size, advice = 0, 0, "nothing was extracted, get it from a source you trust"
    bar = tqdm(entries, f"extract {archive.name}", unit="file", mininterval=1, disable=None)
    for entry, name, length, refused in bar:
        count, size = count + 1, size + length
        spelled = name.replace("\\", "/")  # Windows spellings included
        refused |= spelled.startswith("/") or ".." in PurePosixPath(spelled).parts or spelled[1:3] == ":/"
        if size > max(ALLOWED, GROWTH * archive.stat().st_size) or count > ENTRIES:
            growth = f"grows to more than {size:,} bytes in {count:,} entries, as no archive of images does"
            raise AFDSError(f"the archive {archive} {growth}: {advice}")
        try:
            if refused:
                raise tarfile.FilterError
            extract_entry(entry)
        except tarfile.FilterError as error:
            what = f"holds the entry {name!r}, which would be written outside its folder"
            raise AFDSError(f"the archive {archive} {what}: {advice}") from error
    return count


def extract(files: tuple[Path, ...], target: Path, *, stamp: dict | None = None) -> Path:
    """Extract archives and copy plain files into a new folder `target`, all or nothing; `.afds.json` there says so."""
    done = target / ".afds.json"

    def fill(folder: Path) -> None:
        entries = sum(_extract_one(file, folder) for file in files)
        (folder / done.name).write_text(json.dumps({**(stamp or {}), "entries": entries}))

    if not done.is_file():  # perhaps in a read-only folder, which takes no lock
        make_folder(target, done.is_file, fill)
    return target


def unpack(name: str, files: list[Path]) -> tuple[Path, str]:
    """Extract verified files into `raw/<name>/x-<content hash>`; gives that folder and the hash."""
    digests = {file.name: digest(file) for file in files}
    content = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]
    return extract(tuple(files), paths.raw_data() / name / f"x-{content}", stamp={"files": digests}), content
