"""A user's own images: all looked at before the first step, none left out in silence, upright, one scale per kind."""

import itertools
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from scipy.io import savemat

from afdslib import backbones, cli, data
from afdslib.base.errors import AFDSError
from afdslib.data import cache, trees
from afdslib.data.images import CorruptImageError
from afdslib.inference.export import Card
from afdslib.inference.maps import read_image
from afdslib.inference.predict import prepare
from afdslib.studies import mine, profiles


def _count(splits):
    return sum(len(s) for s in (splits.train, splits.validation, splits.test))


@pytest.fixture
def flat(home, make):
    return make.tree("t", {"": {"a": 8, "b": 8}})


@pytest.fixture
def broken(flat):
    for name in ("a/002.jpg", "b/005.jpg"):
        (flat / name).write_bytes((flat / name).read_bytes()[:300])
    return flat


@pytest.mark.parametrize("size", [16, 72])
def test_every_image_is_decoded_before_the_splits_are_there_and_only_once(broken, make, tmp_path, size, monkeypatch):
    for _ in range(2):
        with pytest.raises(CorruptImageError, match="cannot decode 2 files.*a/002.jpg, b/005.jpg.*--skip-corrupt") as e:
            data.load(broken, size=size)
        assert "\n" not in str(e.value)
        monkeypatch.setattr(cache, "_build", lambda *a: pytest.fail("decoded again"))
    with pytest.warns(UserWarning, match="left out, not decodable: 2 files .a/002.jpg, b/005.jpg"):
        splits = data.load(broken, size=size, skip_corrupt=True)
    assert splits.skipped == ("a/002.jpg", "b/005.jpg") and _count(splits) == 14
    for split in (splits.train, splits.validation, splits.test):
        images, targets = split.__getitems__(range(len(split)))
        assert images.shape == (len(split), 3, size, size) and set(targets.tolist()) == {0, 1}
    monkeypatch.undo()
    shutil.copy(broken / "a/000.jpg", broken / "a/002.jpg")  # a changed tree is looked at again
    with pytest.raises(CorruptImageError, match="cannot decode 1 file .b/005.jpg"):
        data.load(broken, size=size)
    for _ in range(2):
        with pytest.raises(CorruptImageError, match="t.tar: cannot decode 1 file"):
            data.load(make.tar(tmp_path / "t.tar", broken), size=size)


def test_large_photographs_are_decoded_once_and_kept_scaled_down_without_a_change_of_a_pixel(home, make, monkeypatch):
    tree = make.tree("t", {"": {"a": 8, "b": 8}})
    random = np.random.RandomState(0)
    Image.fromarray(random.randint(0, 255, (400, 300, 3)).astype(np.uint8)).save(tree / "a" / "large.png")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "COPIES", 0)
        plain = data.load(tree, size=80)
    shutil.rmtree(cache.paths.cache())
    kept = data.load(tree, size=80)
    (copied,) = kept.train._source.copies.items()
    assert kept.train._source.relative[copied[0]] == "a/large.png" and Image.open(copied[1]).size == (91, 121)
    for one, other in zip((kept.train, kept.test), (plain.train, plain.test), strict=True):
        assert [one.file(i) for i in range(len(one))] == [other.file(i) for i in range(len(other))]
        assert torch.equal(one.__getitems__(range(len(one)))[0], other.__getitems__(range(len(other)))[0])
    copied[1].unlink()  # a damaged cache is made again
    assert len(data.load(tree, size=80).train._source.copies) == 1


def test_the_commands_that_load_a_tree_have_the_option(broken, capsys, tmp_path, monkeypatch):
    assert cli.main(["data", str(broken)]) == 2
    assert "--skip-corrupt" in (err := capsys.readouterr().err) and err.splitlines()[-1].startswith("afds: ")
    with pytest.warns(UserWarning, match="not decodable"):
        assert cli.main(["data", str(broken), "--skip-corrupt"]) == 0
    assert "left out, not decodable: a/002.jpg, b/005.jpg" in capsys.readouterr().out
    for command in ("run", "distill", "evaluate", "maps"):
        assert cli.main([command, "--help"]) == 0 and "--skip-corrupt" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="not decodable"):
        command = ["distill", "--recipe", "scenes", "--data", str(broken), "--epochs", "1", "--batch-size", "4"]
        assert cli.main([*command, "--dry-run", "--skip-corrupt"]) == 0
    assert "10 training images" in capsys.readouterr().out


def test_a_profile_of_own_images_remembers_that_corrupt_ones_are_left_out(broken, tmp_path):
    torch.save(backbones.build("resnet14", 5, stem="cifar", width=1 / 16).state_dict(), tmp_path / "w.pth")
    known = {"network": "resnet14", "size": 72}
    with pytest.raises(CorruptImageError, match="cannot decode 2 files"):
        mine.options(broken, str(tmp_path / "w.pth"), 0.5, **known)
    with pytest.warns(UserWarning, match="not decodable"):
        options = mine.options(broken, str(tmp_path / "w.pth"), 0.5, skip_corrupt=True, **known)
        mine.keep(options)
        assert _count(profiles.get(options.name).targets[0].load()) == 14


def test_images_in_sub_folders_and_of_any_suffix_are_read(flat):
    suffixes = ("webp", "tif", "tiff", "gif", "bmp", "JPG", "PNG", "jfif", "jpe", "avif", "jp2", "ppm", "pcx", "tga")
    for i, suffix in enumerate(suffixes):
        file = flat / "b" / "camera 2" / "deep" / f"{i}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(file, {"jfif": "JPEG", "jpe": "JPEG"}.get(suffix))
    picture(0).save(flat / "b" / "no suffix", "PNG")
    (flat / "b" / "loop").symlink_to(flat / "b")
    (flat / "b" / "linked").symlink_to(flat / "a")  # a folder of images elsewhere
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = data.load(flat, size=16)
    assert _count(splits) == 16 + len(suffixes) + 1 + 8
    labels = [t for s in (splits.train, splits.validation, splits.test) for t in s.targets]
    assert np.bincount(labels).tolist() == [8, 8 + len(suffixes) + 1 + 8]
    (flat / "c").mkdir()
    for i in range(3):
        (flat / "c" / f"{i}.heic").write_bytes(b"no image")
    with pytest.raises(AFDSError, match="c holds no image that Pillow can read, but 3 other files"):
        data.load(flat, size=16)


@pytest.mark.parametrize("pack", [False, True])
def test_what_is_left_out_is_counted_and_named(home, make, tmp_path, pack):
    tree = make.tree("t", {"train": {"a": 8, "b": 8}, "test": {"a": 2, "b": 2}, "extra": {"c": 3}})
    picture(0).save(tree / "train" / "loose.png")
    for name in ("a/x.heic", "a/notes.txt", "b/.hidden"):
        (tree / "train" / name).write_bytes(b"no image")
    path = make.tar(tmp_path / "t.tar", tree) if pack else tree
    for _ in range(2):
        words = r"left out, being no images of a class: 6 files \(extra/c/000.jpg"
        with pytest.warns(UserWarning, match=words) as said:
            splits = data.load(path, size=16)
        text = str(said[0].message)
        assert all(name in text for name in ("train/a/x.heic", "train/a/notes.txt", "train/loose.png"))
    assert _count(splits) == 20


def _mit(folder, train, test=b"a/2.jpg\nb/2.jpg\n"):
    (folder / "TrainImages.txt").write_bytes(train)
    (folder / "TestImages.txt").write_bytes(test)
    return trees.mit_indoors


def _cub(folder, **changed):
    base = folder / "CUB_200_2011"
    base.mkdir()
    lists = {
        "images": "1 a/1.jpg\n2 b/1.jpg\n", "image_class_labels": "1 1\n2 2\n", "train_test_split": "1 1\n2 0\n",
        "classes": "1 001.a\n2 002.b\n",
    }  # fmt: skip
    for name, text in (lists | changed).items():
        (base / f"{name}.txt").write_text(text)
    return trees.cub_200_2011


def _dogs(folder, files=("n1-a/1.jpg", "n2-b/1.jpg"), labels=(1, 2)):
    for name in ("train_list", "test_list"):
        cells = np.array([[f.replace("/", f"/{name}")] for f in files], dtype=object)
        savemat(folder / f"{name}.mat", {"file_list": cells, "labels": np.array(labels).reshape(-1, 1)})
    return trees.stanford_dogs


def _captions(folder, text):
    for one in ("a", "b"):
        (folder / one).mkdir()
        picture(0).save(folder / one / "1.png")
    (folder / "classes.tsv").write_bytes(text)
    return trees.image_folder


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda f: _mit(f, "ä/1.jpg\n".encode("latin-1")), "cannot be read"),
        (lambda f: _mit(f, "a/1.jpg\nb/1.jpg\n".encode("utf-16-le")), "no UTF-8 text"),
        (lambda f: _mit(f, b"1.jpg\nb/1.jpg\n"), "'1.jpg' is not of the form class/image"),
        (lambda f: _mit(f, b"", b""), "it names 0 classes"),
        (lambda f: _mit(f, b"a/1.jpg\nb/1.jpg\n", b"a/1.jpg\n"), "a/1.jpg is in the test list beside it, too"),
        (lambda f: _cub(f, image_class_labels="1 1\n2 3\n"), "image_class_labels.txt .* '2 3' is not of its form"),
        (lambda f: _cub(f, image_class_labels="1 1\n2 0\n"), "image_class_labels.txt .* '2 0' is not of its form"),
        (lambda f: _cub(f, image_class_labels="1 1\n2 x\n"), "image_class_labels.txt .* '2 x' is not of its form"),
        (lambda f: _cub(f, train_test_split="1 1\n2 7\n"), "train_test_split.txt .* '2 7' is not of its form"),
        (lambda f: _cub(f, images="1 a/1.jpg\n2\n"), "images.txt .* '2' is not of its form"),
        (lambda f: _cub(f, images="1 a/1.jpg\n1 b/1.jpg\n"), "images.txt .* 2 lines for 1 numbers"),
        (lambda f: _cub(f, images="1 a/1.jpg\n3 b/1.jpg\n"), "the image 3 of .* has no label or split"),
        (lambda f: _dogs(f, labels=(1, 2, 2)), "its 3 labels are not the classes of its 2 images"),
        (lambda f: _dogs(f, labels=(1, 1)), "its 2 labels are not the classes of its 2 images"),
        (lambda f: _dogs(f, files=("1.jpg", "n2-b/1.jpg")), "'1.jpg' is not of the form class/image"),
        (lambda f: _captions(f, b"a\tapple\nb banana\n"), "'b banana' is not of its form"),
        (lambda f: _captions(f, "a\täpfel\n".encode("latin-1")), "classes.tsv cannot be read"),
    ],
)
def test_a_damaged_list_is_one_sentence_that_names_it(tmp_path, build, words):
    read = build(tmp_path)
    with pytest.raises(AFDSError, match=words) as error:
        read(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    listing = _mit(tmp_path, b"\xef\xbb\xbfa/1.jpg\nb/1.jpg\n")(tmp_path)  # with a byte order mark
    assert listing.classes == ("a", "b") and listing.relative[0] == "Images/a/1.jpg"


def test_photographs_are_turned_alike_in_training_predict_and_maps(flat, tmp_path):
    upright = np.zeros((40, 40, 3), np.uint8)
    upright[:20], upright[20:] = (250, 20, 20), (20, 20, 250)  # red above, blue below
    turns = list(itertools.product(("jpg", "png", "webp", "tif"), ((3, 180), (6, 90), (8, 270))))
    names = [f"phone{degrees}.{suffix}" for suffix, (_, degrees) in turns]
    for name, (_, (orientation, degrees)) in zip(names, turns, strict=True):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(upright).rotate(degrees).save(flat / "a" / name, exif=exif)  # as the sensor saw it
    relative = trees.image_folder(flat).relative
    card = Card(("a", "b"), 16, 16, (0, 0, 0), (1, 1, 1), "x", "y")
    for size in (16, 72):
        splits = data.load(flat, size=size, holdout=False)
        for split in (splits.statistics, splits.validation, splits.test):
            for i, row in enumerate(split._rows):
                if "phone" in relative[row]:
                    image = split.raw(i)
                    assert image[size // 4, size // 2, 0] > 200 and image[3 * size // 4, size // 2, 2] > 200
    for name in names:
        seen = read_image(flat / "a" / name, 16)
        assert seen[4, 8, 0] > 200 and seen[12, 8, 2] > 200
        assert prepare(flat / "a" / name, card)[0, 4, 8] > 0.8
