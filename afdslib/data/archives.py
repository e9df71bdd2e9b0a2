"""Checksums of archives, and extraction that writes either everything or nothing.

An entry that would land outside its folder (`..`, an absolute path, a link that points out, a device) is refused.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import stat
import tarfile
import uuid
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from filelock import FileLock
from tqdm import tqdm

from afdslib.base import paths
from afdslib.base.errors import AFDSError

__all__ = ["SUFFIXES", "is_archive", "digest", "extract", "write_text_atomically"]

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")

_BROKEN = (tarfile.ReadError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.HeaderError)


def is_archive(path: str | Path) -> bool:
    """Whether the name ends as an archive this project opens does."""
    return str(path).lower().endswith(SUFFIXES)


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file, remembered under the cache folder by path, size and modification time."""
    path = path.resolve()
    found = path.stat()
    state = [str(path), found.st_size, found.st_mtime_ns]
    memo = paths.cache() / "checksums" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}.json"
    try:
        known = json.loads(memo.read_text())
        known = known if known["file"] == state else {"file": state}
    except (OSError, ValueError, KeyError, TypeError):
        known = {"file": state}
    if algorithm not in known:
        with path.open("rb") as file:
            known[algorithm] = hashlib.file_digest(file, algorithm).hexdigest()
        write_text_atomically(memo, json.dumps(known))
    return known[algorithm]


def _unsafe(name: str) -> bool:
    """Whether an entry's name leads out of the folder it is extracted to (Windows spellings included)."""
    name = name.replace("\\", "/")
    return name.startswith("/") or ".." in PurePosixPath(name).parts or name[1:3] == ":/"


def _refuse(archive: Path, name: str) -> AFDSError:
    return AFDSError(
        f"the archive {archive} holds the entry {name!r}, which would be written outside its folder: "
        "nothing was extracted, get the archive from a source you trust"
    )


class _Entry(tarfile.TarInfo):
    """Notes that the archive's end mark was read: tarfile takes a file cut at an entry's end for a complete one."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True
            raise


def _extract_tar(archive: Path, folder: Path) -> int:
    entries = 0
    with (
        tarfile.open(archive, "r:*", tarinfo=_Entry) as tar,
        tqdm(desc=f"extract {archive.name}", unit="file", disable=None) as bar,
    ):
        for member in tar:
            if _unsafe(member.name):
                raise _refuse(archive, member.name)
            try:
                # The data filter refuses links and special files that reach outside, and drops owners and set-id bits.
                tar.extract(member, folder, filter="data")
            except tarfile.FilterError as error:
                raise _refuse(archive, member.name) from error
            except KeyError as error:  # a hard link to an entry that the archive does not hold
                raise AFDSError(
                    f"the archive {archive} is damaged at the entry {member.name!r}: delete it and fetch it again"
                ) from error
            entries += 1
            bar.update()
        if not getattr(tar, "ended", False):
            raise tarfile.ReadError("its end is missing")
    return entries


def _extract_zip(archive: Path, folder: Path) -> int:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            if _unsafe(member.filename) or stat.S_ISLNK(member.external_attr >> 16):
                raise _refuse(archive, member.filename)
        for member in tqdm(members, desc=f"extract {archive.name}", unit="file", disable=None):
            file.extract(member, folder)  # reads to the end, so the entry's CRC is checked
    return len(members)


def extract(files: tuple[Path, ...], target: Path, *, stamp: dict | None = None) -> Path:
    """Extract archives (and copy plain files) into a new folder `target`, all or nothing.

    The work is done in a temporary sibling that is renamed at the end, under a lock, so a killed or second process
    leaves no half tree. `target/.afds.json` records what was extracted.

    Args:
        files: archives, extracted in order into the same folder; another file is copied in
        target: the folder to make; returned as it is if it is there
        stamp: what to record

    Returns:
        `target`.

    Raises:
        AFDSError: an archive is truncated or damaged, or holds an entry that leads outside
    """
    if (target / ".afds.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if (target / ".afds.json").is_file():
            return target
        for stale in target.parent.glob(f".{target.name}.*"):  # of a killed process: the lock is ours
            shutil.rmtree(stale, ignore_errors=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        temporary.mkdir()
        try:
            entries = 0
            for file in files:
                try:
                    if not is_archive(file):
                        shutil.copyfile(file, temporary / file.name)
                    elif zipfile.is_zipfile(file) or file.name.lower().endswith(".zip"):
                        entries += _extract_zip(file, temporary)
                    else:
                        entries += _extract_tar(file, temporary)
                except _BROKEN as error:
                    reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
                    raise AFDSError(
                        f"the archive {file} is truncated or damaged ({reason}): delete it and fetch it again"
                    ) from error
            (temporary / ".afds.json").write_text(json.dumps({**(stamp or {}), "entries": entries}))
            if target.exists():  # without its stamp it is not ours to trust
                shutil.rmtree(target)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target
