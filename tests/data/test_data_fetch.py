import hashlib
import json

import pytest

from afdslib import data
from afdslib.base.errors import AFDSError
from afdslib.data import catalogue, fetch
from afdslib.data.sources import Remote


def _one(monkeypatch, remote):
    """Make food-101 consist of one file."""
    spec = catalogue.SETS["hymenoptera-160"]
    layout = catalogue.replace(spec.layouts[0], remotes=(remote,))
    monkeypatch.setitem(catalogue.SETS, "hymenoptera-160", catalogue.replace(spec, layouts=(layout,)))


@pytest.fixture
def archive(make, tmp_path):
    make.tree("h/hymenoptera-160", {"train": {"ants": 10, "bees": 10}, "test": {"ants": 2, "bees": 2}})
    return make.tar(tmp_path / "archive" / "hymenoptera-160.tar", make.folder / "h")


def _sha(path):
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [n for n in data.NAMES if not n.startswith("digits")])
def test_without_a_download_one_sentence_says_what_to_fetch_and_where_to_put_it(home, name):
    with pytest.raises(AFDSError) as error:
        data.load(name, download=False)
    text = str(error.value)
    assert "\n" not in text
    spec = catalogue.SETS[name]
    layout = next((x for x in reversed(spec.layouts) if all(r.url for r in x.remotes)), spec.layouts[-1])
    assert str(home / "data" / "raw" / spec.base) in text
    for remote in layout.remotes:
        assert remote.file in text and (remote.url or remote.hint) in text and (remote.checksum or "unknown") in text
        assert (f"{remote.size:,}" if remote.size else "size unknown") in text


def test_no_network_is_the_same_sentence(home, monkeypatch):
    _one(monkeypatch, Remote("hymenoptera-160.tar", "http://127.0.0.1:9/hymenoptera-160.tar"))
    with pytest.raises(AFDSError, match="its download failed") as error:
        data.load("hymenoptera-160")
    assert "http://127.0.0.1:9/hymenoptera-160.tar" in str(error.value) and "\n" not in str(error.value)


def test_a_refusing_server_is_the_same_sentence(home, monkeypatch, server):
    _one(monkeypatch, Remote("hymenoptera-160.tar", f"{server[1]}/hymenoptera-160.tar"))
    with pytest.raises(AFDSError, match="HTTPError"):
        data.load("hymenoptera-160")
    assert not (home / "data/raw/hymenoptera-160/hymenoptera-160.tar").exists()


def test_a_download_with_the_wrong_checksum_is_not_kept(home, monkeypatch, server, archive):
    folder, address = server
    (folder / archive.name).write_bytes(archive.read_bytes()[:-512])
    _one(monkeypatch, Remote(archive.name, f"{address}/{archive.name}", None, _sha(archive)))
    with pytest.raises(AFDSError, match="checksum"):
        data.load("hymenoptera-160")
    assert not (home / "data/raw/hymenoptera-160" / archive.name).exists()


def test_a_root_that_is_read_only_gets_nothing_written(home, archive, monkeypatch):
    _one(monkeypatch, Remote(archive.name, None, archive.stat().st_size, _sha(archive), hint="ask"))
    archive.parent.chmod(0o555)
    try:
        before = sorted(archive.parent.rglob("*"))
        assert len(data.load("hymenoptera-160", archive.parent).train) == 18
        assert sorted(archive.parent.rglob("*")) == before
    finally:
        archive.parent.chmod(0o755)


def test_a_look_finds_an_archive_by_name_and_size_and_writes_nothing(home, archive, monkeypatch):
    _one(monkeypatch, Remote(archive.name, None, archive.stat().st_size, "sha256:" + 64 * "0", hint="ask"))
    data.look("hymenoptera-160", archive.parent)  # the wrong checksum is for `load` to find
    data.look("digits-0-4")
    assert not list(home.iterdir())
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(AFDSError, match="truncated: it has 5,000 bytes"):
        data.look("hymenoptera-160", archive.parent)
    with pytest.raises(AFDSError, match="the data set hymenoptera-160 is not on this machine: put into the folder"):
        data.look("hymenoptera-160")
    with pytest.raises(AFDSError, match="there is no data set 'x'"):
        data.look("x")
    assert not list(home.iterdir())


def test_a_truncated_archive_is_refused_even_after_a_good_one_was_extracted(home, archive, monkeypatch):
    _one(monkeypatch, Remote(archive.name, None, archive.stat().st_size, _sha(archive), hint="ask"))
    data.load("hymenoptera-160", archive.parent, size=32)
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(AFDSError, match="truncated: it has 5,000 bytes"):
        data.load("hymenoptera-160", archive.parent, size=32)


def test_an_archive_with_a_changed_byte_is_refused(home, archive, monkeypatch):
    _one(monkeypatch, Remote(archive.name, None, archive.stat().st_size, _sha(archive), hint="ask"))
    content = bytearray(archive.read_bytes())
    content[2000] ^= 1
    archive.write_bytes(content)
    with pytest.raises(AFDSError, match="damaged, sha256"):
        data.load("hymenoptera-160", archive.parent)
    assert not list((home / "data").rglob("*.jpg"))


def test_an_unknown_checksum_is_pinned_at_the_first_use_and_held_to(home, archive, monkeypatch):
    _one(monkeypatch, Remote(archive.name, None, hint="ask"))
    data.load("hymenoptera-160", archive.parent)
    pin = json.loads((archive.parent / f"{archive.name}.pin.json").read_text())
    assert f"sha256:{pin['sha256']}" == _sha(archive) and pin["size"] == archive.stat().st_size
    archive.write_bytes(archive.read_bytes() + bytes(512))
    with pytest.raises(AFDSError, match="pinned"):
        data.load("hymenoptera-160", archive.parent)


def test_a_damaged_file_of_unknown_checksum_is_not_pinned(home, archive, monkeypatch):
    _one(monkeypatch, Remote(archive.name, None, hint="ask"))
    whole = archive.read_bytes()
    archive.write_bytes(whole[:5000])
    with pytest.raises(AFDSError, match="truncated"):
        data.load("hymenoptera-160", archive.parent)
    archive.write_bytes(whole)
    assert len(data.load("hymenoptera-160", archive.parent).test) == 4


def test_an_unreadable_pin_is_one_sentence(home, archive, monkeypatch):
    _one(monkeypatch, Remote(archive.name, None, hint="ask"))
    (archive.parent / f"{archive.name}.pin.json").write_text("{")
    with pytest.raises(AFDSError, match="delete it to pin"):
        data.load("hymenoptera-160", archive.parent)


def test_a_root_that_does_not_exist_is_one_sentence(home, tmp_path):
    with pytest.raises(AFDSError, match="does not exist"):
        data.load("hymenoptera-160", tmp_path / "nowhere")


def test_the_callers_folder_comes_first(home, tmp_path):
    (home / "data" / "raw" / "x").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    assert fetch.places("x", tmp_path / "mine") == [tmp_path / "mine", home / "data/raw/x", home / "data/raw"]
