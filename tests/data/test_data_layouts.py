"""The published layouts of the real data sets, in miniature, from archive to loaded splits."""

import hashlib
import tarfile

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import CIFAR10, Caltech256, Food101

from afdslib import data
from afdslib.base.errors import AFDSError
from afdslib.data import catalogue, sources
from afdslib.data.sources import Remote


def _use(monkeypatch, name, folder, *, address=None):
    """Give the data set's files the checksums and addresses of the fixture archives in `folder`."""
    layouts = []
    for layout in catalogue.SETS[name].layouts:
        remotes = tuple(
            Remote(
                r.file,
                f"{address}/{r.file}" if address and (folder / r.file).exists() else r.url,
                (folder / r.file).stat().st_size if r.size and (folder / r.file).exists() else r.size,
                "sha256:" + hashlib.sha256((folder / r.file).read_bytes()).hexdigest()
                if r.checksum and (folder / r.file).exists()
                else r.checksum,
                r.source,
                r.hint,
            )
            for r in layout.remotes
        )
        layouts.append(catalogue.replace(layout, remotes=remotes))
    monkeypatch.setitem(catalogue.SETS, name, catalogue.replace(catalogue.SETS[name], layouts=tuple(layouts)))


def _cells(files):
    return np.array([[f] for f in files], dtype=object)


def stanford_dogs(make, folder, classes=("n02085620-Chihuahua", "n02085782-Japanese_spaniel"), train=12, test=4):
    tree = make.folder / "dogs"
    files = {c: [f"{c}/{c.split('-')[0]}_{i}.jpg" for i in range(train + test)] for c in classes}
    make.images(tree / "Images", [f for many in files.values() for f in many], size=(60, 50))
    for name, part in (("train_list", slice(0, train)), ("test_list", slice(train, None))):
        chosen = [(f, label + 1) for label, c in enumerate(classes) for f in files[c][part]]
        savemat(
            tree / f"{name}.mat",
            {
                "file_list": _cells([f for f, _ in chosen]),
                "annotation_list": _cells([f[:-4] for f, _ in chosen]),
                "labels": np.array([[label] for _, label in chosen], dtype=np.uint8),
            },
        )
    make.tar(folder / "images.tar", tree, names=["Images"])
    make.tar(folder / "lists.tar", tree, names=["train_list.mat", "test_list.mat"])


def mit_indoors(make, folder, classes=("airport_inside", "winecellar")):
    tree = make.folder / "mit"
    files = [f"{c}/{c} {i}.jpg" for c in classes for i in range(18)]  # the real names hold spaces too
    make.images(tree / "Images", files, size=(60, 50))
    make.tar(folder / "indoorCVPR_09.tar", tree)
    (folder / "TrainImages.txt").write_text("\n".join(f for f in files if int(f.split()[1][:-4]) < 12) + "\r\n")
    (folder / "TestImages.txt").write_text("\n".join(f for f in files if 12 <= int(f.split()[1][:-4]) < 16))


def caltech_256(make, folder):
    tree = make.folder / "caltech"
    names = [
        f"{n}.{c}/{n}_{i:04d}.jpg" for n, c in (("001", "ak47"), ("256", "toad"), ("257", "clutter")) for i in range(33)
    ]
    make.images(tree / "256_ObjectCategories", names, size=(60, 50))
    (tree / "256_ObjectCategories/001.ak47/RENAME2").write_text("a stray file, as in 198.spider")
    make.images(tree / "256_ObjectCategories/001.ak47/greg/vision309", ["001_0001.jpg"])  # as in 056.dog
    make.tar(folder / "256_ObjectCategories.tar", tree)


def cub_200_2011(make, folder):
    base = make.folder / "cub" / "CUB_200_2011"
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    files = [f"{c}/{c[4:]}_{i:04d}.jpg" for c in classes for i in range(15)]
    make.images(base / "images", files, size=(60, 50))
    ids = range(1, len(files) + 1)
    (base / "images.txt").write_text("".join(f"{k} {f}\n" for k, f in zip(ids, files, strict=True)))
    (base / "image_class_labels.txt").write_text(
        "".join(f"{k} {int(f[:3])}\n" for k, f in zip(ids, files, strict=True))
    )
    (base / "train_test_split.txt").write_text("".join(f"{k} {int((k - 1) % 15 < 11)}\n" for k in ids))
    (base / "classes.txt").write_text("".join(f"{i + 1} {c}\n" for i, c in enumerate(classes)))
    make.tar(folder / "CUB_200_2011.tgz", make.folder / "cub", mode="w:gz")


def food_101(make, folder):
    base = make.folder / "food" / "food-101"
    names = [f"{c}/{100 + i}" for c in ("apple_pie", "waffles") for i in range(14)]
    make.images(base / "images", [f"{n}.jpg" for n in names], size=(60, 50))
    (base / "meta").mkdir()
    for name, keep in (("train", lambda i: i < 11), ("test", lambda i: i >= 11)):
        (base / "meta" / f"{name}.txt").write_text("\n".join(n for n in names if keep(int(n.split("/")[1]) - 100)))
    make.tar(folder / "food-101.tar.gz", make.folder / "food", mode="w:gz")


REAL = {
    "stanford-dogs": (stanford_dogs, (11, 1, 4), ("Chihuahua", "Japanese_spaniel")),
    "mit-indoors": (mit_indoors, (11, 1, 4), ("airport_inside", "winecellar")),
    "caltech-256": (caltech_256, (12, 1, 20), ("ak47", "toad")),
    "cub-200-2011": (cub_200_2011, (10, 1, 4), ("Black_footed_Albatross", "Laysan_Albatross")),
    "food-101": (food_101, (10, 1, 3), ("apple_pie", "waffles")),
}


def _lengths(splits):
    return tuple(len(s) for s in (splits.train, splits.validation, splits.test))


@pytest.mark.parametrize("name", REAL)
def test_files_dropped_by_hand_are_verified_and_used(home, make, monkeypatch, name):
    build, (train, validation, test), classes = REAL[name]
    folder = home / "data" / "raw" / name
    folder.mkdir(parents=True)
    build(make, folder)
    _use(monkeypatch, name, folder)
    splits = data.load(name, download=False)
    assert splits.classes == classes
    assert _lengths(splits) == (2 * train, 2 * validation, 2 * test)
    assert np.bincount(splits.test.targets).tolist() == [test, test]
    image, target = splits.train[0]
    assert image.shape == (3, 224, 224) and target in (0, 1)


@pytest.mark.parametrize("name", REAL)
def test_the_set_is_downloaded_extracted_and_found_again(home, make, monkeypatch, server, name):
    folder, address = server
    build, _, classes = REAL[name]
    build(make, folder)
    _use(monkeypatch, name, folder, address=address)
    first = data.load(name, size=32)
    assert first.classes == classes
    raw = home / "data" / "raw" / name
    for remote in catalogue.SETS[name].layouts[0].remotes:
        assert (raw / remote.file).is_file()
        assert (raw / f"{remote.file}.pin.json").exists() == (remote.checksum is None)
        (folder / remote.file).unlink()  # a second load needs no network
    again = data.load(name, size=32, download=False)
    assert np.array_equal(first.train.raw(0), again.train.raw(0))


@pytest.mark.parametrize("name", REAL)
def test_an_extracted_tree_is_used_in_place(home, make, tmp_path, name):
    build, (train, *_), classes = REAL[name]
    folder = tmp_path / "root"
    folder.mkdir()
    build(make, folder)
    for file in folder.iterdir():
        if ".t" in file.name and not file.name.endswith(".txt"):
            with tarfile.open(file) as tar:
                tar.extractall(folder, filter="data")
            file.unlink()
    splits = data.load(name, folder, size=32, download=False)
    assert splits.classes == classes and len(splits.train) == 2 * train
    assert not (home / "data" / "raw").exists()


def test_targets_belong_to_their_images(home, make, tmp_path, monkeypatch):
    folder = tmp_path / "root"
    folder.mkdir()
    stanford_dogs(make, folder)
    _use(monkeypatch, "stanford-dogs", folder)
    splits = data.load("stanford-dogs", folder)
    for split in (splits.train, splits.validation, splits.test):
        for i, target in enumerate(split.targets):
            name = split._source.relative[int(split._rows[i])]
            assert splits.classes[target] in name
    official = {split._source.relative[int(r)] for split in (splits.test,) for r in split._rows}
    assert all(int(n.rsplit("_", 1)[1][:-4]) >= 12 for n in official)


def test_caltech_256_fits_n_images_and_keeps_one_test_set(home, make, tmp_path, monkeypatch):
    folder = tmp_path / "root"
    folder.mkdir()
    caltech_256(make, folder)
    _use(monkeypatch, "caltech-256", folder)
    one, other = (data.load("caltech-256", folder, per_class=8, seed=s, size=32) for s in (0, 1))
    assert _lengths(one) == (16, 10, 40)
    assert np.array_equal(one.test._rows, other.test._rows)
    assert not np.array_equal(one.train._rows, other.train._rows)
    with pytest.raises(AFDSError, match="'ak47' has 13 training images, fewer than per_class=30"):
        data.load("caltech-256", folder, per_class=30, size=32)


def test_cifar10_python_archive_goes_through_torchvision(home, make, tmp_path, monkeypatch):
    import pickle

    base = tmp_path / "made" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    names = [n for n, _ in CIFAR10.train_list + CIFAR10.test_list]
    random = np.random.RandomState(0)
    for name in names:
        rows = random.randint(0, 256, (20, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": [i % 10 for i in range(20)]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    root = tmp_path / "root"
    make.tar(root / "cifar-10-python.tar.gz", base.parent, mode="w:gz", names=["cifar-10-batches-py"])
    _use(monkeypatch, "cifar10", root)
    with pytest.raises(AFDSError, match="incomplete or damaged"):  # torchvision checks the md5 of each batch
        data.load("cifar10", root)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    splits = data.load("cifar10", root, per_class=3)
    assert _lengths(splits) == (30, 70, 20) and splits.classes[0] == "c0"
    assert splits.note == "the original arrays" and splits.train.size == 32
    last = rows[0].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(splits.test.raw(0), last)


def test_cifar10_as_jpeg_is_preferred_and_says_so(home, make, tmp_path):
    make.tree("root/cifar10", {"train": {"cat": 20, "dog": 20}, "test": {"cat": 5, "dog": 5}})
    splits = data.load("cifar10", tmp_path / "made/root", per_class=6)
    assert "JPEG" in splits.note and _lengths(splits) == (12, 28, 10)


def test_tiny_imagenets_val_is_the_test_part_and_codes_get_captions(home, make, tmp_path):
    tree = make.tree("root/tiny-imagenet-32", {"train": {"n1": 20, "n2": 20}, "val": {"n1": 3, "n2": 3}})
    (tree / "classes.tsv").write_text("n1\tgoldfish\nn2\tbullfrog\n")
    splits = data.load("tiny-imagenet-32", tmp_path / "made/root")
    assert _lengths(splits) == (36, 4, 6)
    assert splits.classes == ("n1", "n2") and splits.captions == ("goldfish", "bullfrog")
    assert data.load("tiny-imagenet-32", tmp_path / "made/root").captions == splits.captions


def test_source_and_target_classes_of_tiny_imagenet_are_disjoint(home, make, tmp_path):
    names = [f"n{i:08d}" for i in range(200)]
    counts = dict.fromkeys(names, 2)
    make.tree("root/tiny-imagenet-32", {"train": counts, "val": dict.fromkeys(names, 1)}, size=(8, 8))
    source = data.load("tiny-imagenet-32-source160", tmp_path / "made/root", size=8)
    target = data.load("tiny-imagenet-32-target40", tmp_path / "made/root", size=8)
    assert len(source.classes) == 160 and len(target.classes) == 40
    assert set(source.classes) | set(target.classes) == set(names)
    assert sorted(set(target.test.targets.tolist())) == list(range(40))
    assert data.target_40(tuple(reversed(names))) == list(target.classes)
    whole = data.load("tiny-imagenet-32", tmp_path / "made/root", size=8)
    label = target.classes[3]
    row = np.flatnonzero(whole.test.targets == whole.classes.index(label))[0]
    own = np.flatnonzero(target.test.targets == 3)[0]
    assert np.array_equal(whole.test.raw(row), target.test.raw(own))


def test_addresses_and_checksums_are_torchvisions_where_it_has_the_set():
    import inspect

    food, cifar, caltech = (sources.FILES[n][0] for n in ("food-101", "cifar10", "caltech-256"))
    assert (food.url, food.checksum) == (Food101._URL, f"md5:{Food101._MD5}")
    assert (cifar.url, cifar.checksum) == (CIFAR10.url, f"md5:{CIFAR10.tgz_md5}")
    source = inspect.getsource(Caltech256.download)
    assert caltech.url in source and caltech.checksum.removeprefix("md5:") in source


def test_every_file_says_where_its_checksum_was_read():
    for remotes in sources.FILES.values():
        for remote in remotes:
            assert remote.source and (remote.url or remote.hint)
            if remote.checksum:
                algorithm, value = remote.checksum.split(":")
                assert len(value) == {"md5": 32, "sha256": 64}[algorithm]
