import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from afdslib import data
from afdslib.base.errors import AFDSError
from afdslib.data import cache
from afdslib.data.images import CorruptImageError


def _lengths(splits):
    return tuple(0 if s is None else len(s) for s in (splits.train, splits.validation, splits.test))


def test_an_unknown_name_lists_the_known_ones(home):
    with pytest.raises(AFDSError) as error:
        data.load("cifar11")
    assert "'cifar11'" in str(error.value) and all(name in str(error.value) for name in data.NAMES)


@pytest.mark.parametrize("name", ["", "no/such/folder", "missing.tar.gz"])
def test_a_path_that_does_not_exist_is_one_sentence(home, name):
    with pytest.raises(AFDSError):
        data.load(name)


@pytest.mark.parametrize(
    "options",
    [{"per_class": 0}, {"per_class": 2.5}, {"per_class": True}, {"seed": -1}, {"seed": "0"}, {"size": 0}, {"size": 4}],
)
def test_numbers_out_of_range_or_of_the_wrong_type_are_one_sentence(home, options):
    with pytest.raises(AFDSError, match=next(iter(options))):
        data.load("digits", **options)


def test_digits_need_no_file_and_their_classes_split(home):
    whole, low, high = (data.load(n) for n in ("digits", "digits-0-4", "digits-5-9"))
    assert sum(_lengths(whole)) == 1797 == sum(_lengths(low)) + sum(_lengths(high))
    assert low.classes == tuple("01234") and high.classes == tuple("56789")
    assert low.train[0][0].shape == (3, 32, 32) and not low.train.flip
    assert not list(home.rglob("*.npy"))


def test_the_digits_target_has_a_fixed_test_part_and_a_drawn_fitting_part(home):
    one, other = (data.load("digits-5-9", per_class=12, seed=s) for s in (0, 1))
    assert _lengths(one) == (60, 100, 447)
    assert np.array_equal(one.test._rows, other.test._rows)
    assert not np.array_equal(one.train._rows, other.train._rows)
    assert not set(one.train._rows) & (set(one.test._rows) | set(one.validation._rows))


def test_digits_are_shown_upright_with_their_label(home):
    from sklearn.datasets import load_digits

    bunch, splits = load_digits(), data.load("digits")
    row = int(splits.test._rows[5])
    small = splits.test.raw(5)[2::4, 2::4, 0].astype(float)
    assert np.corrcoef(small.ravel(), bunch.images[row].ravel())[0, 1] > 0.9
    assert splits.classes[splits.test.targets[5]] == str(bunch.target[row])


def test_statistics_are_the_training_images_under_the_test_time_transform(home):
    splits = data.load("digits-5-9", per_class=12)
    assert np.array_equal(splits.statistics.targets, splits.train.targets)
    assert not splits.statistics.augment and splits.train.augment
    assert np.array_equal(splits.statistics.raw(7), splits.train.raw(7))
    assert not torch.equal(splits.statistics[7][0], splits.train[7][0])


def test_splits_unpack_in_the_documented_order(home):
    splits = data.load("digits-5-9", per_class=12)
    train, validation, test, statistics, classes = splits
    assert train is splits.train and statistics is splits.statistics and classes == splits.classes
    assert validation is splits.validation and test is splits.test


def test_a_folder_with_train_validation_and_test_is_used_as_it_is(home, make):
    tree = make.tree("t", {"train": {"a": 6, "b": 5}, "validation": {"a": 2, "b": 1}, "test": {"a": 3, "b": 3}})
    splits = data.load(str(tree), size=16)
    assert _lengths(splits) == (11, 3, 6) and splits.classes == ("a", "b")


def test_a_flat_tree_is_split_by_the_seed(home, make):
    tree = make.tree("t", {"": {"a": 20, "b": 20}})
    assert _lengths(data.load(tree, size=16)) == (28, 6, 6)
    one, other = (data.load(tree, size=16, seed=s) for s in (0, 1))
    assert not np.array_equal(one.test._rows, other.test._rows)


@pytest.mark.parametrize("mode, suffix", [("w", "tar"), ("w:gz", "tar.gz"), ("w:xz", "tar.xz")])
def test_an_archive_of_a_tree_loads_like_the_tree(home, make, tmp_path, mode, suffix):
    tree = make.tree("wrap/t", {"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}})
    archive = make.tar(tmp_path / f"t.{suffix}", tree.parent, mode=mode)
    one, other = data.load(archive, size=16), data.load(tree, size=16)
    assert _lengths(one) == _lengths(other) == (10, 2, 4)
    assert all(np.array_equal(one.train.raw(i), other.train.raw(i)) for i in range(10))


@pytest.mark.parametrize(
    "counts, words",
    [
        ({"train": {"a": 2, "b": 2}}, "neither test"),
        ({"train": {"a": 2, "b": 2}, "test": {"a": 1, "c": 1}}, "'c'"),
        ({"train": {"a": 2}, "test": {"a": 1}}, "at least two classes"),
    ],
)
def test_a_tree_of_another_form_is_one_sentence(home, make, counts, words):
    with pytest.raises(AFDSError, match=words):
        data.load(make.tree("t", counts), size=16)


def test_an_empty_class_folder_is_named(home, make):
    tree = make.tree("t", {"": {"a": 4, "b": 4}})
    (tree / "empty").mkdir()
    with pytest.raises(AFDSError, match="empty"):
        data.load(tree, size=16)


def test_a_file_that_is_no_archive_is_one_sentence(home, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(AFDSError, match="no archive of a known kind"):
        data.load(tmp_path / "notes.txt")


def test_a_corrupt_image_met_by_a_worker_is_one_sentence_too(home, make):
    tree = make.tree("t", {"train": {"a": 8, "b": 8}, "test": {"a": 2, "b": 2}})
    splits = data.load(tree, size=96)
    (tree / "train/b/003.jpg").write_bytes(b"changed since")
    with pytest.raises(CorruptImageError, match="train/b/003.jpg cannot be decoded") as error:
        for ds in (splits.train, splits.validation):
            for _ in data.loader(ds, 4, workers=1):
                pass
    assert "\n" not in str(error.value)


def test_images_are_decoded_once_and_mapped(home, make, monkeypatch):
    tree = make.tree("t", {"": {"a": 8, "b": 8}})
    data.load(tree, size=16)
    monkeypatch.setattr(cache, "_build", lambda *a, **k: pytest.fail("decoded again"))
    splits = data.load(tree, size=16)
    assert isinstance(splits.train._images, np.memmap)


@pytest.mark.parametrize("file", ["images.npy", "index.json"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_cache_is_built_again(home, make, file, size):
    tree = make.tree("t", {"": {"a": 8, "b": 8}})
    before = data.load(tree, size=16).train.raw(3)
    found = next((home / "data/cache").glob(f"*px*/{file}"))
    found.write_bytes(found.read_bytes()[:size])
    assert np.array_equal(data.load(tree, size=16).train.raw(3), before)


def test_a_cache_that_lost_its_tail_is_built_again(home, make):
    tree = make.tree("t", {"": {"a": 8, "b": 8}})
    before = data.load(tree, size=16).test.raw(0)
    found = next((home / "data/cache").glob("*px*/images.npy"))
    found.write_bytes(found.read_bytes()[:-10])
    assert np.array_equal(data.load(tree, size=16).test.raw(0), before)


def test_a_changed_tree_is_decoded_again(home, make):
    tree = make.tree("t", {"": {"a": 8, "b": 8}})
    data.load(tree, size=16)
    for path in (tree / "a").iterdir():
        path.write_bytes((tree / "b/000.jpg").read_bytes())
    splits = data.load(tree, size=16)
    rows = np.flatnonzero(splits.train.targets == 0)
    assert len({splits.train.raw(r).tobytes() for r in rows}) == 1


def test_an_unsafe_archive_given_by_path_writes_nothing(home, make, tmp_path):
    archive = make.tar_entry(tmp_path / "evil.tar", "../../escaped.txt")
    with pytest.raises(AFDSError, match="outside"):
        data.load(archive)
    assert not list(tmp_path.rglob("escaped.txt")) and not list(home.rglob("good.png"))


def test_imbalance_is_reported(home, make):
    splits = data.load(make.tree("t", {"train": {"a": 30, "b": 10}, "test": {"a": 4, "b": 2}}), size=16)
    found = data.imbalance(splits.test)
    assert found["counts"] == {"a": 4, "b": 2} and found["ratio"] == 2
    assert found["smallest"] == ("b", 2) and found["largest"] == ("a", 4)
    table = data.describe(splits)
    assert table["split"].tolist() == ["train", "validation", "test"]
    assert table["images"].tolist() == [36, 4, 6]
    assert table["smallest class"].tolist() == [9, 1, 2] and table["largest class"].tolist() == [27, 3, 4]
    assert table["ratio"].tolist() == [3, 3, 2]


def test_detail_tells_a_split_that_was_scaled_by_another_filter(home, make):
    def split(pixels):
        return data.ArrayImages(pixels, np.arange(len(pixels)), np.zeros(len(pixels)), ["a"], augment=False)

    flat, stripes = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((3, 8, 8, 3), np.uint8)
    stripes[:, :, ::2] = 100  # every pair of neighbours along x differs by 100, none along y
    assert data.detail(split(flat)) == 0 and data.detail(split(stripes)) == 50
    table = data.describe(data.load("digits-5-9", per_class=12))
    assert (table["detail"] > 1).all()


def test_describe_shows_that_no_validation_image_is_left(home, make):
    splits = data.load(make.tree("t", {"train": {"a": 5, "b": 5}, "test": {"a": 1, "b": 1}}), size=16, per_class=5)
    assert splits.validation is None
    assert data.describe(splits).loc[1, "images"] == 0


def test_prepare_prints_the_table(home, capsys):
    table = data.prepare("digits-5-9", per_class=12)
    out = capsys.readouterr().out
    assert "digits-5-9: 5 classes, 32 px" in out and "validation" in out and len(table) == 3


def test_the_stamp_of_an_extraction_names_what_was_extracted(home, make, tmp_path):
    archive = make.tar(tmp_path / "t.tar", make.tree("t", {"": {"a": 8, "b": 8}}))
    data.load(archive, size=16)
    stamp = json.loads(next((home / "data/raw").rglob(".afds.json")).read_text())
    with tarfile.open(archive) as tar:
        assert stamp["entries"] == len(tar.getmembers()) and list(stamp["files"]) == ["t.tar"]


_KILLED = """
import os, sys
from afdslib import data
from afdslib.data import {module}
real, calls = {module}.{function}, 0
def dying(*args, **options):
    global calls
    calls += 1
    if calls == {after}:
        os.kill(os.getpid(), 9)
    return real(*args, **options)
{module}.{function} = dying
data.load(sys.argv[1], size=16)
"""


@pytest.mark.parametrize(
    "module, function, after", [("cache", "resized_to", 7), ("fetch", "_check_entry", 5), ("fetch.os", "replace", 3)]
)
def test_a_killed_preparation_is_done_anew_and_leaves_no_rest(home, make, tmp_path, module, function, after):
    archive = make.tar(tmp_path / "t.tar", make.tree("t", {"": {"a": 8, "b": 8}}))
    script = _KILLED.format(module=module.split(".")[0], function=function, after=after)
    if module == "fetch.os":
        script = script.replace("fetch.replace", "fetch.os.replace")
    done = subprocess.run([sys.executable, "-c", script, str(archive)], cwd=Path(data.__file__).parents[2])
    assert done.returncode == -9
    assert _lengths(data.load(archive, size=16)) == (12, 2, 2)
    rest = [p for p in (home / "data").rglob(".*") if p.name != ".afds.json"]
    assert not rest


def test_two_processes_prepare_a_set_once_and_agree(home, make, tmp_path):
    archive = make.tar(tmp_path / "t.tar", make.tree("t", {"": {"a": 30, "b": 30}}))
    script = "import sys; from afdslib import data; print(data.load(sys.argv[1], size=16).train.raw(5).sum())"
    command = [sys.executable, "-c", script, str(archive)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(data.__file__).parents[2])
        for _ in range(2)
    ]
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0] and said[0] == said[1] != ""


def test_a_full_disk_is_an_error_and_leaves_nothing(home, make, monkeypatch):
    tree = make.tree("t", {"": {"a": 8, "b": 8}})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_header", full)
    with pytest.raises(OSError, match="No space left"):
        data.load(tree, size=16)
    assert not [p for p in (home / "data/cache").iterdir() if p.is_dir() and "px" in p.name]
