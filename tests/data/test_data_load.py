"""`load`: names, paths, splits, and caches that are whole or absent, whatever is killed."""

import itertools
import json
import os
import pkgutil
import signal
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ended, start
from sklearn.datasets import load_digits

from afdslib import data
from afdslib.base.errors import AFDSError
from afdslib.data import cache
from afdslib.data.images import CorruptImageError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def _lengths(splits):
    return tuple(0 if s is None else len(s) for s in (splits.train, splits.validation, splits.test))


@pytest.fixture
def tree(home, make):
    return make.tree("t", {"": {"a": 8, "b": 8}})


@pytest.mark.parametrize("name, options, words", [
    ("cifar11", {}, "digits-5-9"), ("", {}, "digits-5-9"), ("no/such/folder", {}, "does not exist"),
    ("missing.tar.gz", {}, "does not exist"), ("notes.txt", {}, "no archive of a known kind"),
    *(("digits", options, next(iter(options))) for options in (
        {"per_class": 0}, {"per_class": 2.5}, {"per_class": True}, {"seed": -1}, {"seed": "0"}, {"size": 0},
        {"size": 4}, {"padding": "zero"}, {"sharpness": -1.0}, {"sharpness": 1.0, "size": 96},
    )),
])  # fmt: skip
def test_an_unknown_name_or_path_or_a_setting_out_of_range_is_one_sentence(home, name, options, words):
    Path("notes.txt").write_text("hello")
    with pytest.raises(AFDSError, match=words) as error:
        data.load(name, **options)
    assert "\n" not in str(error.value)


def test_digits_need_no_file_and_their_classes_split(home):
    whole, low, high = (data.load(n) for n in ("digits", "digits-0-4", "digits-5-9"))
    assert sum(_lengths(whole)) == 1797 == sum(_lengths(low)) + sum(_lengths(high))
    assert low.classes == tuple("01234") and high.classes == tuple("56789")
    assert low.train[0][0].shape == (3, 32, 32) and not low.train.flip
    assert not list(home.rglob("*.npy"))
    one, other = (data.load("digits-5-9", per_class=12, seed=s) for s in (0, 1))
    assert _lengths(one) == (60, 100, 447)
    assert np.array_equal(one.test._rows, other.test._rows)
    assert not np.array_equal(one.train._rows, other.train._rows)
    assert not set(one.train._rows) & (set(one.test._rows) | set(one.validation._rows))
    bunch, row = load_digits(), int(whole.test._rows[5])  # shown upright with their label
    small = whole.test.raw(5)[2::4, 2::4, 0].astype(float)
    assert np.corrcoef(small.ravel(), bunch.images[row].ravel())[0, 1] > 0.9
    assert whole.classes[whole.test.targets[5]] == str(bunch.target[row])


def test_splits_unpack_in_order_and_statistics_are_the_training_images_under_the_test_time_transform(home):
    splits = data.load("digits-5-9", per_class=12)
    train, validation, test, statistics, classes = splits
    assert (train, validation, test) == (splits.train, splits.validation, splits.test)
    assert statistics is splits.statistics and classes == splits.classes
    assert np.array_equal(statistics.targets, train.targets) and not statistics.augment and train.augment
    assert np.array_equal(statistics.raw(7), train.raw(7)) and not torch.equal(statistics[7][0], train[7][0])


def test_a_split_tree_is_used_as_it_is_and_a_flat_one_split_by_the_seed(home, make, tree):
    parts = {"Training": {"a": 6, "b": 5}, "VAL": {"a": 2, "b": 1}, "testing": {"a": 3, "b": 3}}  # or train, ...
    splits = data.load(str(make.tree("s", parts)), size=16)
    assert _lengths(splits) == (11, 3, 6) and splits.classes == ("a", "b")
    one, other = (data.load(tree, size=16, seed=s) for s in (0, 1))
    assert _lengths(one) == (12, 2, 2) and not np.array_equal(one.test._rows, other.test._rows)
    assert repr(one) == f"Splits({str(tree)!r}: 12 training, 2 validation and 2 test images, 2 classes, 16 px)"
    assert repr(one.train) == "ArrayImages(12 images, 2 classes, 16 px)"


def test_an_archive_of_a_tree_loads_like_the_tree_and_is_stamped(home, make, tmp_path):
    tree = make.tree("wrap/t", {"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}})
    archive = make.tar(tmp_path / "t.tar.xz", tree.parent, mode="w:xz")
    one, other = data.load(archive, size=16), data.load(tree, size=16)
    assert _lengths(one) == _lengths(other) == (10, 2, 4)
    assert all(np.array_equal(one.train.raw(i), other.train.raw(i)) for i in range(10))
    stamp = json.loads(next((home / "data/raw").rglob(".afds.json")).read_text())
    with tarfile.open(archive) as tar:
        assert stamp["entries"] == len(tar.getmembers()) and list(stamp["files"]) == [archive.name]


@pytest.mark.parametrize(("counts", "words"), [
    ({"train": {"a": 2, "b": 2}}, "neither test"),
    ({"train": {"a": 2, "b": 2}, "test": {"a": 1, "c": 1}}, "'c'"),
    ({"train": {"a": 2}, "test": {"a": 1}}, "at least two classes"),
    ({"val": {"a": 2, "b": 2}, "test": {"a": 2, "b": 2}}, "has test, val, but no train/"),
    ({"train": {"a": 2, "b": 2}, "val": {"a": 2, "b": 2}, "valid": {"a": 1}}, "two folders of one purpose"),
    ({"": {"a": 4, "b": 4}}, "empty holds no image: fill it"),
])  # fmt: skip
def test_a_tree_of_another_form_is_one_sentence(home, make, counts, words):
    tree = make.tree("t", counts)
    if "" in counts:
        (tree / "empty").mkdir()
    with pytest.raises(AFDSError, match=words):
        data.load(tree, size=16)


def test_a_corrupt_image_met_by_a_worker_is_one_sentence_too(tree):
    splits = data.load(tree, size=96)
    for path in tree.glob("b/*"):
        path.write_bytes(b"changed since")
    with pytest.raises(CorruptImageError, match=r"b/00\d.jpg cannot be decoded") as error:
        list(data.loader(splits.train, 4, workers=1))
    assert "\n" not in str(error.value)


def test_images_are_decoded_once_and_mapped_until_they_change_or_their_cache_is_truncated(home, tree, monkeypatch):
    before = data.load(tree, size=16).train.raw(3)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_build", lambda *a, **k: pytest.fail("decoded again"))
        assert isinstance(data.load(tree, size=16).train._images, np.memmap)
    for file, size in (("images.npy", 0), ("images.npy", -10), ("index.json", 0), ("index.json", 100)):
        damaged = next((home / "data/cache").glob(f"*px*/{file}"))
        damaged.write_bytes(damaged.read_bytes()[:size])
        assert np.array_equal(data.load(tree, size=16).train.raw(3), before)
    for path in (tree / "a").iterdir():
        path.write_bytes((tree / "b/000.jpg").read_bytes())
    splits = data.load(tree, size=16)
    assert len({splits.train.raw(r).tobytes() for r in np.flatnonzero(splits.train.targets == 0)}) == 1


def test_imbalance_and_detail_are_reported_also_where_no_validation_image_is_left(home, make, capsys):
    tree = make.tree("t", {"train": {"a": 30, "b": 10}, "test": {"a": 4, "b": 2}})
    splits = data.load(tree, size=16)
    counted = data.imbalance(splits.test)
    assert counted["counts"] == {"a": 4, "b": 2} and counted["ratio"] == 2
    assert counted["smallest"] == ("b", 2) and counted["largest"] == ("a", 4)
    table = data.describe(splits).set_index("split")
    assert table["images"].to_dict() == {"train": 36, "validation": 4, "test": 6}
    assert table["smallest class"].tolist() == [9, 1, 2] and table["largest class"].tolist() == [27, 3, 4]
    assert table["ratio"].tolist() == [3, 3, 2]
    splits = data.load(tree, size=16, holdout=False)
    assert splits.validation is None and data.describe(splits).loc[1, "images"] == 0
    flat, stripes = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((3, 8, 8, 3), np.uint8)
    stripes[:, :, ::2] = 100  # every pair of neighbours along x differs by 100, none along y
    for pixels, expected in ((flat, 0), (stripes, 50)):
        rows = np.arange(len(pixels))
        assert data.detail(data.ArrayImages(pixels, rows, 0 * rows, ["a"], augment=False)) == expected
    table = data.prepare("digits-5-9", per_class=12)
    out = capsys.readouterr().out
    assert "digits-5-9: 5 classes, 32 px" in out and "validation" in out and (table["detail"] > 1).all()


@needs_fork
@pytest.mark.parametrize(
    "place, after", [("cache.resized_to", 7), ("fetch.tarfile.TarFile.extract", 5), ("fetch.os.replace", 3)]
)
def test_a_killed_preparation_is_done_anew_and_leaves_no_rest(home, make, tree, tmp_path, monkeypatch, place, after):
    archive = make.tar(tmp_path / "t.tar", tree)
    real, calls = pkgutil.resolve_name(f"afdslib.data.{place}"), itertools.count(1)

    def dying(*args, **options):
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"afdslib.data.{place}", dying)
        child = start(lambda: data.load(archive, size=16))
    assert ended(child) == -signal.SIGKILL
    assert _lengths(data.load(archive, size=16)) == (12, 2, 2)
    assert not [p for p in (home / "data").rglob(".*") if p.name != ".afds.json"]


@needs_fork
def test_two_processes_prepare_a_set_once_and_agree(home, make, tmp_path):
    archive = make.tar(tmp_path / "t.tar", make.tree("t", {"": {"a": 30, "b": 30}}))

    def prepare(name):
        np.save(tmp_path / name, data.load(archive, size=16).train._images)

    assert [ended(child) for child in [start(partial(prepare, name)) for name in ("one", "other")]] == [0, 0]
    assert np.array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "other.npy"))
    assert len(list((home / "data/cache").glob("*16px*/images.npy"))) == 1


def test_a_full_disk_is_an_error_and_leaves_nothing(home, tree, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_header", full)
    with pytest.raises(AFDSError, match="cannot write .*16px.*: No space left on device; free space there"):
        data.load(tree, size=16)
    assert not [p for p in (home / "data/cache").iterdir() if p.is_dir() and "px" in p.name]
