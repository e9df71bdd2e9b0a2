import argparse
import hashlib
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from afdslib import afs, backbones
from afdslib.backbones import loading
from afdslib.base.errors import AFDSError

TINY = dict(name="resnet14", stem="cifar", width=1 / 32)


def _tiny(classes=3, seed=0):
    torch.manual_seed(seed)
    return backbones.build(num_classes=classes, **TINY)


def test_a_state_dict_is_loaded_without_a_classifier_of_other_classes_and_nothing_else(tmp_path):
    state = _tiny().state_dict()
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    torch.save(state, tmp_path / "net.pt")
    for name in ("net.safetensors", "net.pt"):
        model = backbones.build(num_classes=3, weights=tmp_path / name, **TINY)
        assert all(torch.equal(v, model.state_dict()[n]) for n, v in state.items())
    torch.manual_seed(7)
    model = backbones.build(num_classes=4, weights=str(tmp_path / "net.pt"), **TINY)
    fresh = _tiny(4, seed=7)
    for n, value in model.state_dict().items():
        assert torch.equal(value, (fresh.state_dict() if n.startswith("fc.") else state)[n])


OLD = {n: v for n, v in _tiny().state_dict().items() if not n.endswith("num_batches_tracked")}


def renamed(change, state=OLD):
    return {change(n): v for n, v in state.items()}


AVERAGE = {n: v + 1 for n, v in OLD.items()}
FILES = {
    "before torch 0.4.1": OLD,
    "DataParallel": renamed(lambda n: f"module.{n}"),
    "compiled, in parallel": renamed(lambda n: f"module._orig_mod.{n}"),
    "compiled in parts": renamed(lambda n: n.replace("layer1.", "layer1._orig_mod.").replace("fc.", "fc.module.")),
    "checkpoint": {"epoch": 3, "arch": "resnet14", "state_dict": renamed(lambda n: f"module.{n}"), "best": 0.5,
                   "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}},
    "options and numpy": {"model": OLD, "args": argparse.Namespace(lr=0.1), "acc": np.float64(0.5)},
    "nested": {"ema": {"module": renamed(lambda n: f"_orig_mod.{n}"), "updates": 7}},
    "equal average": {"state_dict": OLD, "state_dict_ema": renamed(lambda n: f"module.{n}")},
    "torch's average": renamed(lambda n: f"module.{n}") | {"n_averaged": torch.tensor(3)},
    "thop": OLD | {"total_ops": torch.zeros(1), "layer1.0.conv1.total_params": torch.zeros(1)},
    "Lightning": {"state_dict": renamed(lambda n: f"model.{n}") | {"criterion.weight": torch.ones(3)}, "epoch": 1},
    "deeper": renamed(lambda n: f"net.backbone.{n}"),
    "epoch among the names": OLD | {"epoch": 3},
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar"])
@pytest.mark.parametrize("name", FILES)
def test_weight_files_that_people_have_are_loaded(tmp_path, name, suffix):
    torch.save(FILES[name], tmp_path / f"net{suffix}")
    state = backbones.build(num_classes=3, weights=tmp_path / f"net{suffix}", **TINY).state_dict()
    assert all(torch.equal(state[n], v) for n, v in OLD.items())
    assert all(int(v) == 0 for n, v in state.items() if n.endswith("num_batches_tracked"))


def changed(**change) -> dict:
    """The state with tensors changed, or left out where they are None; `_` in a name stands for a dot."""
    return {n: v for n, v in (OLD | {n.replace("_", "."): v for n, v in change.items()}).items() if v is not None}


REFUSED = {
    "average": ({"state_dict": OLD, "state_dict_ema": AVERAGE}, "holds 2 networks, state_dict and state_dict_ema: "),
    "twice": (OLD | renamed(lambda n: f"module.{n}"), "with and without a wrapper's name"),
    "prefixes": (renamed(lambda n: f"model.{n}") | renamed(lambda n: f"ema.{n}", AVERAGE), "under 'model' and 'ema'"),
    "places": ({"student": OLD, "teacher": OLD, "epoch": 1}, "but epoch, student, teacher: save model.state_dict"),
    "list": ([torch.ones(2)], "but a list"),
    "missing": (renamed(lambda n: f"model.{n}", changed(conv1_weight=None)), "lacks conv1.weight: "),
    "classifier": (changed(fc_bias=None), "lacks fc.bias"),
    "foreign": (changed(layer9_weight=torch.zeros(1)), "holds the foreign layer9.weight"),
    "shape": (changed(conv1_weight=torch.zeros(5, 3, 3, 3)), "shape (5, 3, 3, 3) for conv1.weight"),
    "width": (changed(fc_weight=torch.zeros(3, 5)), "shape (3, 5) for fc.weight"),
    "pickled": ({"epoch": 3, "model": _tiny()}, "not a readable weight file: it pickles afdslib"),
    "garbage": (b"\x80\x02garbage", "not a readable weight file"), "empty": (b"", "not a readable weight file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_damaged_ambiguous_or_does_not_fit_is_one_sentence(tmp_path, name):
    content, words = REFUSED[name]
    if isinstance(content, bytes):
        (tmp_path / "net.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "net.pt")
    with pytest.raises(AFDSError) as caught:
        backbones.build(num_classes=3, weights=tmp_path / "net.pt", **TINY)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, words", [("net.safetensors", "not a readable weight file"), ("net.bin", ".pth.tar, ")])
def test_files_of_other_kinds_are_one_sentence(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"not a tensor file")
    with pytest.raises(AFDSError) as caught:
        backbones.build(num_classes=3, weights=tmp_path / name, **TINY)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_this_project_says_what_network_it_holds(tmp_path):
    afs.save(_tiny(), tmp_path / "net.safetensors")
    assert loading.architecture(tmp_path / "net.safetensors") == _tiny().architecture
    safetensors.torch.save_file(OLD, tmp_path / "plain.safetensors")
    torch.save(OLD, tmp_path / "plain.pt")
    for other in ("plain.safetensors", "plain.pt", "missing.safetensors"):
        assert loading.architecture(tmp_path / other) is None
    with pytest.raises(AFDSError, match=r"\(a resnet14 of width 0.03125\) .*another network"):
        backbones.build("resnet18", 3, weights=tmp_path / "net.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub folder and no network."""

    def no_network(*_args, **_kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_without_a_network_the_sentence_names_file_address_and_folder(hub):
    with pytest.raises(AFDSError) as caught:
        backbones.build("resnet18", 10, weights="imagenet")
    for words in ("resnet18-f37072fd.pth", "https://download.pytorch.org/models/resnet18-f37072fd.pth", str(hub)):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_weight_file_put_there_by_hand_is_verified_and_used(hub, monkeypatch):
    hub.mkdir(parents=True)
    torch.manual_seed(1)
    theirs = torchvision.models.mobilenet_v2()
    torch.save(theirs.state_dict(), hub / "net.pth")
    digest = hashlib.sha256((hub / "net.pth").read_bytes()).hexdigest()[:8]
    (hub / "net.pth").rename(hub / f"mobilenet_v2-{digest}.pth")

    class Weights:
        url = f"https://download.pytorch.org/models/mobilenet_v2-{digest}.pth"

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda _name: {"IMAGENET1K_V1": Weights})
    model = backbones.build("mobilenet_v2", 10, weights="imagenet")
    assert torch.equal(model.features[0][0].weight, theirs.features[0][0].weight)
    assert model.classifier[1].out_features == 10 and model.architecture["num_classes"] == 10
    kept = backbones.build("mobilenet_v2", 1000, weights="imagenet")
    assert torch.equal(kept.classifier[1].weight, theirs.classifier[1].weight)

    with (hub / f"mobilenet_v2-{digest}.pth").open("ab") as file:
        file.write(b"x")
    with pytest.raises(AFDSError, match="delete it and fetch it again"):
        backbones.build("mobilenet_v2", 10, weights="imagenet")
