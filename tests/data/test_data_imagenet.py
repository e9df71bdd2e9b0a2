"""Sorting ImageNet's flat validation folder, from every kind of list, and the counts."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from afdslib import cli, data
from afdslib.base.errors import AFDSError
from afdslib.data import imagenet
from afdslib.data.imagenet import Counts, arrange, read_labels

# The order of the IDs is not that of the WordNet ids, as in the real list.
WNIDS = {1: "n02119789", 2: "n02100735", 3: "n01440764"}
IDS = [2, 1, 3, 3, 1, 2]
EXPECTED = Counts(3, 7, 6)


def image(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def devkit(folder: Path) -> Path:
    """The two files of the devkit that matter, with high-level synsets behind the three."""
    place = folder / "ILSVRC2012_devkit_t12" / "data"
    place.mkdir(parents=True)
    (place / imagenet.GROUND_TRUTH).write_text("".join(f"{i}\n" for i in IDS))
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(i, wnid, "a, b", 0) for i, wnid in WNIDS.items()] + [(4, "n00001740", "entity", 3)]
    savemat(place / imagenet.META, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    return place.parent


def kaggle(folder: Path) -> Path:
    file = folder / imagenet.KAGGLE
    lines = [f"{Path(image(n)).stem},{WNIDS[i]} 1 2 3 4 {WNIDS[i]} 5 6 7 8 " for n, i in enumerate(IDS, 1)]
    file.write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
    return file


def plain(folder: Path) -> Path:
    """A list without a header and with suffixes."""
    file = folder / "own.csv"
    file.write_text("\n".join(f"{image(n)},{WNIDS[i]}" for n, i in enumerate(IDS, 1)))
    return file


def packed(folder: Path) -> Path:
    file = folder / "devkit.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(devkit(folder), arcname="ILSVRC2012_devkit_t12")
    return file


def text(folder: Path) -> Path:
    return devkit(folder) / "data" / imagenet.GROUND_TRUTH


SORTED = {image(n): WNIDS[i] for n, i in enumerate(IDS, 1)}


@pytest.fixture
def tree(make, home) -> Path:
    folder = make.tree("imagenet", {"train": {w: 2 + (w == WNIDS[1]) for w in WNIDS.values()}})
    return make.images(folder, [f"val/{image(n)}" for n in range(1, 7)]).parent / "imagenet"


def placed(tree: Path) -> dict[str, str]:
    return {p.name: p.parent.name for p in (tree / "val").rglob("*.JPEG")}


@pytest.mark.parametrize("labels", [devkit, kaggle, plain, packed, text], ids=lambda f: f.__name__)
def test_each_kind_of_list_sorts_the_flat_folder(tree, tmp_path, labels):
    folder, moved, counts = arrange(tree, labels(tmp_path), expected=EXPECTED)
    assert folder == tree and moved == 6 and counts == EXPECTED
    assert placed(tree) == SORTED
    assert arrange(tree, expected=EXPECTED)[1] == 0  # sorted already: no list is needed
    splits = data.load("imagenet", tree, holdout=False)
    assert len(splits.train) == 7 and len(splits.test) == 6 and splits.validation is None
    assert splits.classes == tuple(sorted(WNIDS.values()))


def test_the_list_is_found_beside_the_tree_and_an_interrupted_sort_goes_on(tree, monkeypatch):
    with pytest.raises(AFDSError, match="holds 6 images outside class folders: sort them with afds data imagenet"):
        data.load("imagenet", tree)
    devkit(tree.parent)
    calls = []

    def killed(source, target, rename=imagenet.os.rename):
        calls.append(source)
        if len(calls) == 3:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(imagenet.os, "rename", killed)
        arrange(tree, expected=EXPECTED)
    assert sum(folder != "val" for folder in placed(tree).values()) == 2
    assert arrange(tree.parent, expected=EXPECTED)[1] == 4
    assert placed(tree) == SORTED


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda file, text: file.unlink(), "there is no file .*own.csv: give ILSVRC2012_devkit_t12.tar.gz"),
    (lambda file, text: file.write_text(text.split("\n")[0]), "5 images of .*val have no class"),
    (lambda file, text: file.write_text(text.replace(",n01440764", ",")), r"line 3 of .*own.csv"),
    (lambda file, text: file.write_text(text.replace("n01440764", "n99999999")), "'n99999999' .* has no folder in"),
    (lambda file, text: file.write_bytes(text.encode("utf-16")), "own.csv cannot be read"),
], ids=["missing", "short", "empty-class", "foreign", "utf-16"])  # fmt: skip
def test_what_does_not_fit_is_one_sentence_and_nothing_is_moved(tree, tmp_path, spoil, words):
    file = plain(tmp_path)
    spoil(file, file.read_text())
    with pytest.raises(AFDSError, match=words) as caught:
        arrange(tree, file, expected=EXPECTED)
    assert "\n" not in str(caught.value) and set(placed(tree).values()) == {"val"}
    wrong = tree / "val" / WNIDS[3]
    wrong.mkdir()
    (tree / "val" / image(1)).rename(wrong / image(1))
    with pytest.raises(AFDSError, match=f"{image(1)} is of the class {WNIDS[2]}: move it there"):
        arrange(tree, plain(tmp_path), expected=EXPECTED)


def test_damaged_devkits_are_one_sentence(tmp_path):
    def refused(path, words):
        with pytest.raises(AFDSError, match=words):
            read_labels(path)

    folder = devkit(tmp_path)
    (folder / "data" / imagenet.META).write_bytes(b"no mat file at all")
    refused(folder, "the devkit .* cannot be read")
    (folder / "data" / imagenet.META).unlink()
    refused(folder, "is no ImageNet devkit: it lacks meta.mat")
    named = tmp_path / imagenet.DEVKIT
    with tarfile.open(named, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("empty"), io.BytesIO())
    refused(named, "has another md5")
    other = named.rename(tmp_path / "other.tar.gz")
    refused(other, "is no ImageNet devkit: it lacks")
    other.write_bytes(b"cut")
    refused(other, "is truncated or damaged")
    refused(Path(__file__), "says no classes")


def test_the_command_sorts_and_counts(tree, tmp_path, capsys, refused):
    devkit(tree.parent)
    assert "1,281,167 training and 50,000 validation images" in refused("data", "imagenet", "--root", str(tree.parent))
    assert cli.main(["data", "imagenet", "--root", str(tree.parent), "--subset"]) == 0
    assert capsys.readouterr().out == f"{tree}: 3 classes, 7 training and 6 validation images\n"
    refused("data", "imagenet", "--root", str(tmp_path / "none"))
    assert "there is no ImageNet tree in" in refused("data", "imagenet", "--root", str(tmp_path))
    assert "imagenet only" in refused("data", "digits", "--subset")
