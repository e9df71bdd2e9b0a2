"""The published layouts of the real data sets, in miniature, from archive to loaded splits."""

import hashlib
import inspect
import pickle
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import CIFAR10, Caltech256, Food101

from afdslib import data
from afdslib.base.errors import AFDSError
from afdslib.data import catalogue, fetch, sources


def _use(monkeypatch, name, folder, *, address=None):
    """Give the data set's files the checksums and addresses of the fixture archives in `folder`."""

    def as_here(remote):
        file = folder / remote.file
        if not file.exists():
            return remote
        return replace(
            remote, url=f"{address}/{remote.file}" if address else remote.url,
            size=remote.size and file.stat().st_size,
            checksum=remote.checksum and "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest(),
        )  # fmt: skip

    spec = catalogue.SETS[name]
    layouts = tuple(replace(one, remotes=tuple(map(as_here, one.remotes))) for one in spec.layouts)
    monkeypatch.setitem(catalogue.SETS, name, replace(spec, layouts=layouts))


def stanford_dogs(make, folder):
    tree, classes = make.folder / "dogs", ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")
    files = {c: [f"{c}/{c.split('-')[0]}_{i}.jpg" for i in range(16)] for c in classes}
    make.images(tree / "Images", [f for many in files.values() for f in many], size=(60, 50))
    for name, part in (("train_list", slice(0, 12)), ("test_list", slice(12, None))):
        chosen = [(f, label + 1) for label, c in enumerate(classes) for f in files[c][part]]
        cells = np.array([[f] for f, _ in chosen], dtype=object)
        savemat(tree / f"{name}.mat", {"file_list": cells, "labels": np.array([[n] for _, n in chosen], np.uint8)})
    make.tar(folder / "images.tar", tree, names=["Images"])
    make.tar(folder / "lists.tar", tree, names=["train_list.mat", "test_list.mat"])


def mit_indoors(make, folder):
    tree = make.folder / "mit"
    files = [f"{c}/{c} {i}.jpg" for c in ("airport_inside", "winecellar") for i in range(18)]  # with spaces, as there
    make.images(tree / "Images", files, size=(60, 50))
    make.tar(folder / "indoorCVPR_09.tar", tree)
    (folder / "TrainImages.txt").write_text("\n".join(f for f in files if int(f.split()[1][:-4]) < 12) + "\r\n")
    (folder / "TestImages.txt").write_text("\n".join(f for f in files if 12 <= int(f.split()[1][:-4]) < 16))


def caltech_256(make, folder):
    base = make.folder / "caltech" / "256_ObjectCategories"
    classes = {"001": "ak47", "256": "toad", "257": "clutter"}
    make.images(base, [f"{n}.{c}/{n}_{i:04d}.jpg" for n, c in classes.items() for i in range(33)], size=(60, 50))
    (base / "001.ak47/RENAME2").write_text("a stray file, as in 198.spider")
    make.images(base / "001.ak47/greg/vision309", ["001_0001.jpg"])  # as in 056.dog
    make.tar(folder / "256_ObjectCategories.tar", base.parent)


def cub_200_2011(make, folder):
    base = make.folder / "cub" / "CUB_200_2011"
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    files = [f"{c}/{c[4:]}_{i:04d}.jpg" for c in classes for i in range(15)]
    make.images(base / "images", files, size=(60, 50))
    numbered = list(enumerate(files, 1))
    (base / "images.txt").write_text("".join(f"{k} {f}\n" for k, f in numbered))
    (base / "image_class_labels.txt").write_text("".join(f"{k} {int(f[:3])}\n" for k, f in numbered))
    (base / "train_test_split.txt").write_text("".join(f"{k} {int((k - 1) % 15 < 11)}\n" for k, _ in numbered))
    (base / "classes.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(classes, 1)))
    make.tar(folder / "CUB_200_2011.tgz", base.parent, mode="w:gz")


def food_101(make, folder):
    base = make.folder / "food" / "food-101"
    names = [f"{c}/{100 + i}" for c in ("apple_pie", "waffles") for i in range(14)]
    make.images(base / "images", [f"{n}.jpg" for n in names], size=(60, 50))
    (base / "meta").mkdir()
    for part, chosen in (("train", range(100, 111)), ("test", range(111, 114))):
        (base / "meta" / f"{part}.txt").write_text("\n".join(n for n in names if int(n.split("/")[1]) in chosen))
    make.tar(folder / "food-101.tar.gz", base.parent, mode="w:gz")


REAL = {
    "stanford-dogs": (stanford_dogs, (11, 1, 4), ("Chihuahua", "Japanese_spaniel")),
    "mit-indoors": (mit_indoors, (11, 1, 4), ("airport_inside", "winecellar")),
    "caltech-256": (caltech_256, (12, 1, 20), ("ak47", "toad")),
    "cub-200-2011": (cub_200_2011, (10, 1, 4), ("Black_footed_Albatross", "Laysan_Albatross")),
    "food-101": (food_101, (10, 1, 3), ("apple_pie", "waffles")),
}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def _lengths(splits):
    return tuple(len(s) for s in (splits.train, splits.validation, splits.test))


@pytest.mark.parametrize("name", REAL)
def test_a_set_is_downloaded_found_again_and_used_extracted(home, make, root, monkeypatch, server, name):
    folder, address = server
    build, (train, validation, test), classes = REAL[name]
    build(make, folder)
    _use(monkeypatch, name, folder, address=address)
    first = data.load(name, size=32)
    raw = home / "data" / "raw" / name
    for remote in catalogue.SETS[name].layouts[0].remotes:
        assert (raw / remote.file).is_file()
        assert (raw / f"{remote.file}.pin.json").exists() == (remote.checksum is None)
        (folder / remote.file).unlink()  # a second load needs no network
    splits = data.load(name, download=False)
    assert first.classes == splits.classes == classes
    assert _lengths(splits) == (2 * train, 2 * validation, 2 * test)
    assert np.bincount(splits.test.targets).tolist() == [test, test]
    image, target = splits.train[0]
    assert image.shape == (3, 224, 224) and target in (0, 1)
    for split in (splits.train, splits.validation, splits.test):
        for row, target in zip(split._rows, split.targets, strict=True):
            assert classes[target] in split._source.relative[row]
    if name == "stanford-dogs":  # by its official list
        test = splits.test
        assert all(int(test._source.relative[r].rsplit("_", 1)[1][:-4]) >= 12 for r in test._rows)

    for file in [file for file in raw.iterdir() if file.is_file()]:
        if fetch.is_archive(file):
            with tarfile.open(file) as tar:
                tar.extractall(root, filter="data")
        else:
            file.rename(root / file.name)
    shutil.rmtree(raw)
    loose = data.load(name, root, size=32, download=False)
    assert loose.classes == classes and np.array_equal(loose.train.raw(0), first.train.raw(0))
    assert not raw.exists()


def test_caltech_256_fits_n_images_and_keeps_one_test_set(home, make, root, monkeypatch):
    caltech_256(make, root)
    _use(monkeypatch, "caltech-256", root)
    one, other = (data.load("caltech-256", root, per_class=8, seed=s, size=32) for s in (0, 1))
    assert _lengths(one) == (16, 10, 40) and np.array_equal(one.test._rows, other.test._rows)
    assert not np.array_equal(one.train._rows, other.train._rows)
    with pytest.raises(AFDSError, match="'ak47' has 13 training images, fewer than per_class=30"):
        data.load("caltech-256", root, per_class=30, size=32)


def test_cifar10_python_archive_goes_through_torchvision(home, make, tmp_path, root, monkeypatch):
    base = tmp_path / "made" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        rows = random.randint(0, 256, (20, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": [i % 10 for i in range(20)]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    make.tar(root / "cifar-10-python.tar.gz", base.parent, mode="w:gz", names=["cifar-10-batches-py"])
    _use(monkeypatch, "cifar10", root)
    with pytest.raises(AFDSError, match="incomplete or damaged"):  # torchvision checks the md5 of each batch
        data.load("cifar10", root)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    for size in (None, 96):
        splits = data.load("cifar10", root, per_class=3, size=size)
        assert _lengths(splits) == (30, 70, 20) and splits.classes[0] == "c0"
        assert splits.train.size == (size or 32)
    assert splits.note == "the original arrays"
    last = rows[0].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(data.load("cifar10", root, per_class=3).test.raw(0), last)


def test_cifar10_as_jpeg_is_preferred_and_says_so_and_tiny_imagenets_val_is_the_test_part(home, make, tmp_path):
    make.tree("root/cifar10", {"train": {"cat": 20, "dog": 20}, "test": {"cat": 5, "dog": 5}})
    splits = data.load("cifar10", tmp_path / "made/root", per_class=6)
    assert "JPEG" in splits.note and _lengths(splits) == (12, 28, 10)
    tree = make.tree("root/tiny-imagenet-32", {"train": {"n1": 20, "n2": 20}, "val": {"n1": 3, "n2": 3}})
    (tree / "classes.tsv").write_text("n1\tgoldfish\nn2\tbullfrog\n")
    for _ in range(2):
        splits = data.load("tiny-imagenet-32", tmp_path / "made/root")
        assert _lengths(splits) == (36, 4, 6)
        assert splits.classes == ("n1", "n2") and splits.captions == ("goldfish", "bullfrog")


def test_source_and_target_classes_of_tiny_imagenet_are_disjoint(home, make, tmp_path):
    names = [f"n{i:08d}" for i in range(200)]
    make.tree("root/tiny-imagenet-32", {"train": dict.fromkeys(names, 2), "val": dict.fromkeys(names, 1)}, size=(8, 8))
    source, target, whole = (
        data.load(f"tiny-imagenet-32{part}", tmp_path / "made/root", size=8) for part in ("-source160", "-target40", "")
    )
    assert len(source.classes) == 160 and len(target.classes) == 40
    assert set(source.classes) | set(target.classes) == set(names)
    assert sorted(set(target.test.targets.tolist())) == list(range(40))
    assert data.target_40(tuple(reversed(names))) == list(target.classes)
    row = np.flatnonzero(whole.test.targets == whole.classes.index(target.classes[3]))[0]
    own = np.flatnonzero(target.test.targets == 3)[0]
    assert np.array_equal(whole.test.raw(row), target.test.raw(own))


def test_addresses_and_checksums_are_torchvisions_where_it_has_the_set():
    food, cifar, caltech = (sources.FILES[n][0] for n in ("food-101", "cifar10", "caltech-256"))
    assert (food.url, food.checksum) == (Food101._URL, f"md5:{Food101._MD5}")
    assert (cifar.url, cifar.checksum) == (CIFAR10.url, f"md5:{CIFAR10.tgz_md5}")
    source = inspect.getsource(Caltech256.download)
    assert caltech.url in source and caltech.checksum.removeprefix("md5:") in source
    for remote in (remote for remotes in sources.FILES.values() for remote in remotes):
        assert remote.source and (remote.url or remote.hint)  # it says where its checksum was read
        algorithm, value = (remote.checksum or f"md5:{32 * '0'}").split(":")
        assert len(value) == {"md5": 32, "sha256": 64}[algorithm]
