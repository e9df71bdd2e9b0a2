"""Files found, downloaded and verified; archives extracted in full or not at all, and nothing outside their folder."""

import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from afdslib import data
from afdslib.base.errors import AFDSError
from afdslib.data import catalogue, fetch
from afdslib.data.fetch import digest, extract
from afdslib.data.sources import Remote

NAME = "hymenoptera-160"


@pytest.fixture
def archive(make, tmp_path):
    make.tree(f"h/{NAME}", {"train": {"ants": 10, "bees": 10}, "test": {"ants": 2, "bees": 2}})
    return make.tar(tmp_path / "archive" / f"{NAME}.tar", make.folder / "h")


@pytest.fixture
def remote(archive, monkeypatch):
    """Makes the data set consist of the archive, with its size and checksum unless told otherwise."""

    def use(url=None, **changes):
        known = {"size": archive.stat().st_size, "checksum": _sha(archive), "hint": "ask"} | changes
        spec = catalogue.SETS[NAME]
        layout = catalogue.replace(spec.layouts[0], remotes=(Remote(archive.name, url, **known),))
        monkeypatch.setitem(catalogue.SETS, NAME, catalogue.replace(spec, layouts=(layout,)))

    use()
    return use


def _sha(path):
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def _refused(archive, target, words):
    with pytest.raises(AFDSError, match=words) as error:
        extract((archive,), target)
    assert "\n" not in str(error.value) and str(archive) in str(error.value) and not target.exists()


@pytest.mark.parametrize("name", [n for n in data.NAMES if not n.startswith("digits")])
def test_without_a_download_one_sentence_says_what_to_fetch_and_where_to_put_it(home, name):
    with pytest.raises(AFDSError) as error:
        data.load(name, download=False)
    text, spec = str(error.value), catalogue.SETS[name]
    layout = next((x for x in reversed(spec.layouts) if all(r.url for r in x.remotes)), spec.layouts[-1])
    assert "\n" not in text and str(home / "data" / "raw" / spec.base) in text
    for remote in layout.remotes:
        assert remote.file in text and (remote.url or remote.hint) in text and (remote.checksum or "unknown") in text
        assert (f"{remote.size:,}" if remote.size else "size unknown") in text


def test_no_network_and_a_refusing_server_are_the_same_sentence_and_a_wrong_checksum_is_not_kept(
    home, remote, server, archive
):
    for address, words in (("http://127.0.0.1:9", "its download failed"), (server[1], "HTTPError")):
        remote(f"{address}/{NAME}.tar")
        with pytest.raises(AFDSError, match=words) as error:
            data.load(NAME)
        assert f"{address}/{NAME}.tar" in str(error.value) and "\n" not in str(error.value)
    (server[0] / archive.name).write_bytes(archive.read_bytes()[:-512])
    remote(f"{server[1]}/{archive.name}", size=None)
    with pytest.raises(AFDSError, match="checksum"):
        data.load(NAME)
    assert not (home / f"data/raw/{NAME}/{NAME}.tar").exists()


def test_a_root_that_is_read_only_gets_nothing_written(home, archive, remote):
    archive.parent.chmod(0o555)
    try:
        before = sorted(archive.parent.rglob("*"))
        assert len(data.load(NAME, archive.parent).train) == 18
        assert sorted(archive.parent.rglob("*")) == before
    finally:
        archive.parent.chmod(0o755)


def test_a_look_finds_an_archive_by_name_and_size_and_writes_nothing(home, archive, remote):
    remote(checksum="sha256:" + 64 * "0")
    data.look(NAME, archive.parent)  # the wrong checksum is for `load` to find
    data.look("digits-0-4")
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(AFDSError, match="truncated: it has 5,000 bytes"):
        data.look(NAME, archive.parent)
    with pytest.raises(AFDSError, match=f"the data set {NAME} is not on this machine: put into the folder"):
        data.look(NAME)
    with pytest.raises(AFDSError, match="there is no data set 'x'"):
        data.look("x")
    assert not list(home.iterdir())


def test_a_truncated_or_changed_archive_is_refused_even_after_a_good_one_was_extracted(home, archive, remote):
    data.load(NAME, archive.parent, size=32)
    content = archive.read_bytes()
    archive.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    with pytest.raises(AFDSError, match="damaged, sha256"):
        data.load(NAME, archive.parent, size=32)
    archive.write_bytes(content[:5000])
    with pytest.raises(AFDSError, match="truncated: it has 5,000 bytes"):
        data.load(NAME, archive.parent, size=32)


def test_an_unknown_checksum_is_pinned_at_the_first_good_use_and_held_to(home, archive, remote):
    remote(size=None, checksum=None)
    content, place = archive.read_bytes(), archive.parent / f"{archive.name}.pin.json"
    archive.write_bytes(content[:5000])
    with pytest.raises(AFDSError, match="truncated"):
        data.load(NAME, archive.parent)
    archive.write_bytes(content)
    assert len(data.load(NAME, archive.parent).test) == 4
    pin = json.loads(place.read_text())
    assert f"sha256:{pin['sha256']}" == _sha(archive) and pin["size"] == archive.stat().st_size
    archive.write_bytes(content + bytes(512))
    with pytest.raises(AFDSError, match="pinned it at its first use"):
        data.load(NAME, archive.parent)
    place.write_text("{")
    with pytest.raises(AFDSError, match="delete it to pin"):
        data.load(NAME, archive.parent)


def test_the_callers_folder_comes_first_and_must_exist_and_a_digest_follows_a_changed_file(home, tmp_path):
    (home / "data" / "raw" / "x").mkdir(parents=True)
    (tmp_path / "own").mkdir()
    assert fetch.places("x", tmp_path / "own") == [tmp_path / "own", home / "data/raw/x", home / "data/raw"]
    with pytest.raises(AFDSError, match="does not exist"):
        data.load(NAME, tmp_path / "nowhere")
    (file := tmp_path / "f").write_bytes(b"one")
    assert (first := digest(file)) == digest(file)
    file.write_bytes(b"other")
    assert digest(file) != first and digest(file, "md5") == "795f3202b17cb6bc3d4b771d8c6c9eaf"


@pytest.mark.parametrize("mode, suffix", [("w", "tar"), ("w:gz", "tar.gz"), ("w:gz", "tgz"), ("w:xz", "tar.xz")])
def test_a_tar_is_extracted_completely_and_a_truncated_one_refused(home, make, tmp_path, mode, suffix):
    tree = make.tree("t", {"": {"a": 8, "b": 1}}, size=(64, 64))
    archive = make.tar(tmp_path / f"t.{suffix}", tree, mode=mode)
    target = extract((archive,), tmp_path / "out")
    names = sorted(p.relative_to(target).as_posix() for p in target.rglob("*.jpg"))
    assert names == [*(f"a/00{i}.jpg" for i in range(8)), "b/000.jpg"]
    assert (target / "a/000.jpg").read_bytes() == (tree / "a/000.jpg").read_bytes()
    content = archive.read_bytes()
    if suffix == "tar":  # behind the zero padding at the end nothing is lost
        content = content.rstrip(b"\0")
        with tarfile.open(archive) as tar:
            archive.write_bytes(content[: tar.getmembers()[-1].offset])  # exactly between two entries
        _refused(archive, tmp_path / "other", "truncated")
    for share in (0.0, 0.3, 0.6, 0.95):
        archive.write_bytes(content[: int(len(content) * share)])
        _refused(archive, tmp_path / "other", "truncated or damaged")


def test_a_zip_is_extracted_completely_and_a_damaged_one_or_one_that_would_fill_the_disk_refused(
    home, tmp_path, make, monkeypatch
):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as file:
        file.writestr("a/a.txt", "hello " * 50)
    assert (extract((tmp_path / "t.zip",), tmp_path / "out") / "a/a.txt").read_text() == "hello " * 50
    (tmp_path / "t.zip").write_bytes((tmp_path / "t.zip").read_bytes().replace(b"hello hello", b"hellO hello", 1))
    _refused(tmp_path / "t.zip", tmp_path / "other", "damaged")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("1.png", bytes(3_000_000))
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "1.png").write_bytes(bytes(3_000_000))
    make.tar(tmp_path / "bomb.tar.gz", tmp_path / "big", mode="w:gz")
    monkeypatch.setattr(fetch, "ALLOWED", 1_000_000)
    for name in ("bomb.zip", "bomb.tar.gz"):
        _refused(tmp_path / name, tmp_path / "other", f"{name} grows to more than 3,000,000 bytes in 1 entries")


@pytest.mark.parametrize(
    "name, fields",
    [
        ("../escaped.txt", {}), ("a/../../escaped.txt", {}), ("/tmp/afds-escaped.txt", {}), ("..\\escaped.txt", {}),
        ("c:/escaped.txt", {}), ("link", {"type": tarfile.SYMTYPE, "linkname": "../../escaped.txt"}),
        ("link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("link", {"type": tarfile.LNKTYPE, "linkname": "../escaped.txt"}),
        ("device", {"type": tarfile.CHRTYPE}), ("pipe", {"type": tarfile.FIFOTYPE}),
    ],
)  # fmt: skip
def test_a_tar_entry_that_leads_outside_is_refused_and_nothing_is_left(home, make, tmp_path, name, fields):
    archive = make.tar_entry(tmp_path / "evil.tar", name, **fields)
    before = {p for p in tmp_path.rglob("*")}
    _refused(archive, tmp_path / "deep" / "out", "outside its folder")
    left = {p for p in tmp_path.rglob("*")} - before
    assert {p.name for p in left} <= {"deep", "out.lock"} and not os.path.exists("/tmp/afds-escaped.txt")


def test_a_planted_link_and_a_zip_entry_that_lead_outside_are_refused(home, tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        link, info = tarfile.TarInfo("door"), tarfile.TarInfo("door/escaped.txt")
        link.type, link.linkname, info.size = tarfile.SYMTYPE, "..", 3
        tar.addfile(link)
        tar.addfile(info, io.BytesIO(b"bad"))
    _refused(tmp_path / "evil.tar", tmp_path / "deep" / "out", "door")
    assert not list(tmp_path.rglob("escaped.txt"))
    for name in ("../escaped.txt", "/tmp/afds-escaped.txt", "a\\..\\..\\escaped.txt", "C:/escaped.txt", "link"):
        with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
            file.writestr("good.txt", "good")
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16 if name == "link" else 0
            file.writestr(info, "/etc/passwd")
        _refused(tmp_path / "evil.zip", tmp_path / "out", "outside")


def test_several_threads_extract_once_and_replace_a_half_made_folder(home, make, tmp_path, monkeypatch):
    archive = make.tar(tmp_path / "t.tar", make.tree("t", {"": {"a": 2, "b": 2}}))
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "half.jpg").write_bytes(b"")  # there is no stamp beside it
    calls = []
    real = fetch._extract_one
    monkeypatch.setattr(fetch, "_extract_one", lambda *a: (calls.append(1), real(*a))[1])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: extract((archive,), tmp_path / "out"), range(4)))
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.jpg"))
    assert calls == [1] and names == ["a/000.jpg", "a/001.jpg", "b/000.jpg", "b/001.jpg"]
