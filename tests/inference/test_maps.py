"""Attention maps of any backbone and any image."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from afdslib import afs, backbones, cli
from afdslib.backbones.inputs import RAW, set_input
from afdslib.base.errors import AFDSError
from afdslib.inference import maps
from afdslib.training.features import taps


def pixels(size=32, seed=0):
    return np.random.RandomState(seed).randint(0, 255, (size, size, 3)).astype(np.uint8)


@pytest.mark.parametrize(("make", "stages"), [
    (lambda: backbones.build("wrn-10-1", 3), 3), (lambda: backbones.build("resnet18_preact", 3, width=1 / 16), 4),
    (lambda: tiny.gated(stem="cifar"), 4), (lambda: backbones.build("inception_bn", 3, stem="cifar", width=1 / 16), 3),
])  # fmt: skip
def test_every_backbone_has_a_map_of_norm_one_per_stage(make, stages):
    torch.manual_seed(0)
    model = make().train()
    view = maps.look_at({"one": model}, pixels(), tiny.CLASSES, label=2)
    seen = view.networks["one"]
    assert len(seen.stages) == stages and view.caption == tiny.CLASSES[2] and model.training
    for heat in seen.stages.values():
        assert heat.min() >= 0 and abs((heat**2).sum() - 1) < 1e-5
    assert seen.gradient.shape == (32, 32) and seen.gradient.min() >= 0
    assert seen.prediction in tiny.CLASSES and all(p.grad is None for p in model.parameters())
    assert maps.look_at({"one": model}, pixels(), tiny.CLASSES).caption == "unknown"


def test_a_network_that_was_trained_on_raw_pixels_sees_raw_pixels():
    torch.manual_seed(0)
    image, model = pixels(), backbones.build("wrn-10-1", 4).eval()
    set_input(model, RAW)
    raw = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    heat = maps.look_at({"one": model}, image, "abcd").networks["one"]
    for layer, wanted in maps.maps_of(model, raw)[0].items():
        assert np.allclose(heat.stages[layer], wanted[0].numpy(), atol=1e-5)
    assert not model._forward_pre_hooks


def test_maps_are_mean_squares_and_gradients_the_losss_slope_at_each_pixel():
    torch.manual_seed(0)
    model = backbones.build("wrn-10-1", 3).eval().double()
    x, label = torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.tensor([1])
    heat, gradient, answers = maps.maps_of(model, x, label)
    with taps(model, heat) as features:
        assert torch.equal(model(x).argmax(1), answers)
    for layer, found in heat.items():
        expected = features[layer].square().mean(1)
        assert torch.allclose(found, expected / expected.norm(), atol=1e-6)
    step = torch.zeros_like(x)
    step[0, 1, 3, 4] = 1e-6
    with torch.no_grad():
        up, down = (torch.nn.functional.cross_entropy(model(x + s), label) for s in (step, -step))
    images = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(images), label).backward()
    assert float((up - down) / 2e-6) == pytest.approx(float(images.grad[0, 1, 3, 4]), rel=1e-3)
    assert torch.allclose(gradient, images.grad.norm(dim=1))


def test_images_and_labels_out_of_range_are_one_sentence():
    networks = {"one": backbones.build("wrn-10-1", 3)}
    for given, image, label, sentence in (
        (networks, pixels().astype(np.float32), None, "the image is float32 of shape"),
        (networks, pixels()[:20], None, "give a square uint8 image"),
        (networks, pixels(), 3, "the label 3 is no class; give 0 to 2"),
        ({}, pixels(), None, "there is no network to look through"),
    ):
        with pytest.raises(AFDSError, match=sentence):
            maps.look_at(given, image, tiny.CLASSES, label=label)


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    afs.save(backbones.build("wrn-10-1", 10), tmp_path / "student.safetensors")
    Image.fromarray(pixels(50)[:40]).save(tmp_path / "photo.jpg")
    return tmp_path


def test_the_command_draws_an_image_file_and_a_sample_of_a_data_set_or_refuses_in_one_line(files, capsys, refused):
    network, output = str(files / "student.safetensors"), files / "maps.png"
    for arguments, sentence in (
        ((), "there is no image to look at; give an image file or a data set"),
        (("--image", "nowhere.jpg"), "there is no image file nowhere.jpg; give the path of one"),
        (("--data", "digits", "--index", "100000"), "test images and no number 100000"),
    ):
        assert sentence in refused("maps", network, "--output", str(output), *arguments) and not output.exists()
    assert cli.main(["maps", f"student={network}", "--image", str(files / "photo.jpg"), "--output", str(output)]) == 0
    first = output.read_bytes()
    assert first.startswith(b"\x89PNG") and "written to" in capsys.readouterr().out
    sample = ["maps", network, "--data", "digits", "--size", "16", "--index", "3", "--output", str(output)]
    assert cli.main(sample) == 0
    assert output.read_bytes().startswith(b"\x89PNG") and output.read_bytes() != first


def test_the_published_exports_and_torchvisions_weights_are_looked_through(files, refused, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "backbones"))
    from test_backbones_importers import _folded

    torch.save({name: value * 0.5 for name, value in _folded((3, 4, 6, 3)).items()}, files / "resnet-34-export.pth")
    state = {"resnet18": backbones.build("resnet18", 1000).state_dict()}
    real = backbones.loading.imagenet_state
    monkeypatch.setattr(backbones.loading, "imagenet_state", lambda name: state.get(name) or real(name))
    image, output = ["--image", str(files / "photo.jpg")], files / "maps.png"
    networks = [f"teacher={files / 'resnet-34-export.pth'}", "resnet18"]
    assert cli.main(["maps", *networks, *image, "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    for which, sentence in (
        ("none.pth", "'none.pth' is neither a weight file nor a backbone"),
        (str(files / "photo.jpg"), "is not a weight file this project reads"),
        ("inception_bn", "There are no ImageNet weights for 'inception_bn'"),
    ):
        assert sentence in refused("maps", which, *image, "--output", str(output))
