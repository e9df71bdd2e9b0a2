import io
import os
import stat
import tarfile
import threading
import zipfile

import pytest

from afdslib.base.errors import AFDSError
from afdslib.data import fetch
from afdslib.data.fetch import digest, extract


def _sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("mode, suffix", [("w", "tar"), ("w:gz", "tar.gz"), ("w:gz", "tgz"), ("w:xz", "tar.xz")])
def test_a_tar_is_extracted_completely(home, make, tmp_path, mode, suffix):
    tree = make.tree("t", {"": {"a": 2, "b": 1}})
    archive = make.tar(tmp_path / f"t.{suffix}", tree, mode=mode)
    target = extract((archive,), tmp_path / "out")
    names = sorted(p.relative_to(target).as_posix() for p in target.rglob("*.jpg"))
    assert names == ["a/000.jpg", "a/001.jpg", "b/000.jpg"]
    assert (target / "a/000.jpg").read_bytes() == (tree / "a/000.jpg").read_bytes()


def test_a_zip_is_extracted_completely(home, make, tmp_path):
    tree = make.tree("t", {"": {"a": 1, "b": 1}})
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as file:
        for path in tree.rglob("*.jpg"):
            file.write(path, path.relative_to(tree))
    target = extract((tmp_path / "t.zip",), tmp_path / "out")
    assert (target / "b/000.jpg").read_bytes() == (tree / "b/000.jpg").read_bytes()


@pytest.mark.parametrize(
    "name, fields",
    [
        ("../escaped.txt", {}),
        ("a/../../escaped.txt", {}),
        ("/tmp/afds-escaped.txt", {}),
        ("..\\escaped.txt", {}),
        ("c:/escaped.txt", {}),
        ("link", {"type": tarfile.SYMTYPE, "linkname": "../../escaped.txt"}),
        ("link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("link", {"type": tarfile.LNKTYPE, "linkname": "../escaped.txt"}),
        ("device", {"type": tarfile.CHRTYPE}),
        ("pipe", {"type": tarfile.FIFOTYPE}),
    ],
)
def test_a_tar_entry_that_leads_outside_is_refused_and_nothing_is_left(home, make, tmp_path, name, fields):
    archive = make.tar_entry(tmp_path / "evil.tar", name, **fields)
    before = {p for p in tmp_path.rglob("*")}
    with pytest.raises(AFDSError) as error:
        extract((archive,), tmp_path / "deep" / "out")
    assert repr(name) in _sentence(error) and str(archive) in _sentence(error)
    left = {p for p in tmp_path.rglob("*")} - before
    assert {p.name for p in left} <= {"deep", "out.lock"}
    assert not os.path.exists("/tmp/afds-escaped.txt")


def test_a_link_that_was_planted_to_lead_later_entries_outside_is_refused(home, tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        link = tarfile.TarInfo("door")
        link.type, link.linkname = tarfile.SYMTYPE, ".."
        tar.addfile(link)
        info = tarfile.TarInfo("door/escaped.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"bad"))
    with pytest.raises(AFDSError):
        extract((tmp_path / "evil.tar",), tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("escaped.txt"))


@pytest.mark.parametrize(
    "name", ["../escaped.txt", "/tmp/afds-escaped.txt", "a\\..\\..\\escaped.txt", "C:/escaped.txt"]
)
def test_a_zip_entry_that_leads_outside_is_refused(home, tmp_path, name):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr("good.txt", "good")
        file.writestr(name, "bad")
    with pytest.raises(AFDSError) as error:
        extract((tmp_path / "evil.zip",), tmp_path / "out")
    assert "outside" in _sentence(error) and not (tmp_path / "out").exists()


def test_a_zip_link_is_refused(home, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(AFDSError):
        extract((tmp_path / "evil.zip",), tmp_path / "out")


@pytest.mark.parametrize("mode, suffix", [("w", "tar"), ("w:gz", "tar.gz"), ("w:xz", "tar.xz")])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_truncated_tar_is_refused_in_one_sentence(home, make, tmp_path, mode, suffix, share):
    archive = make.tar(tmp_path / f"t.{suffix}", make.tree("t", {"": {"a": 8, "b": 8}}, size=(64, 64)), mode=mode)
    content = archive.read_bytes()
    if suffix == "tar":  # behind the zero padding at the end nothing is lost
        content = content.rstrip(b"\0")
    archive.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(AFDSError, match="truncated or damaged") as error:
        extract((archive,), tmp_path / "out")
    assert str(archive) in _sentence(error) and not (tmp_path / "out").exists()


def test_a_tar_cut_exactly_between_two_entries_is_refused(home, make, tmp_path):
    archive = make.tar(tmp_path / "t.tar", make.tree("t", {"": {"a": 3, "b": 3}}))
    with tarfile.open(archive) as tar:
        cut = tar.getmembers()[-1].offset
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(AFDSError, match="truncated"):
        extract((archive,), tmp_path / "out")


def test_a_zip_with_a_damaged_entry_is_refused(home, tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as file:
        file.writestr("a.txt", "hello " * 50)
    content = (tmp_path / "t.zip").read_bytes().replace(b"hello hello", b"hellO hello", 1)
    (tmp_path / "t.zip").write_bytes(content)
    with pytest.raises(AFDSError, match="damaged"):
        extract((tmp_path / "t.zip",), tmp_path / "out")


def test_extracting_twice_or_from_two_threads_happens_once(home, make, tmp_path, monkeypatch):
    archive = make.tar(tmp_path / "t.tar", make.tree("t", {"": {"a": 2, "b": 2}}))
    calls = []
    real = fetch._extract_tar
    monkeypatch.setattr(fetch, "_extract_tar", lambda *a: (calls.append(1), real(*a))[1])
    threads = [threading.Thread(target=extract, args=((archive,), tmp_path / "out")) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert calls == [1] and len(list((tmp_path / "out").rglob("*.jpg"))) == 4


def test_a_half_made_folder_without_its_stamp_is_replaced(home, make, tmp_path):
    archive = make.tar(tmp_path / "t.tar", make.tree("t", {"": {"a": 2}}))
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "half.jpg").write_bytes(b"")
    target = extract((archive,), tmp_path / "out")
    assert sorted(p.name for p in target.rglob("*.jpg")) == ["000.jpg", "001.jpg"]


def test_a_digest_follows_a_changed_file(home, tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"one")
    first = digest(file)
    assert first == digest(file)
    file.write_bytes(b"other")
    assert digest(file) != first
    assert digest(file, "md5") == "795f3202b17cb6bc3d4b771d8c6c9eaf"
