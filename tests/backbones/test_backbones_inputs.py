"""Each backbone's input statistics, and a teacher that takes its student's images."""

import copy

import pytest
import torch

from afdslib import afs, backbones
from afdslib.backbones.inputs import IMAGENET, RAW, expect, fed, input_of, input_statistics, set_input
from afdslib.base.errors import AFDSError


def test_the_statistics_are_those_of_the_recipes():
    assert input_statistics("inception_bn") == RAW
    assert input_statistics("resnet50_senet").mean == (123.68, 116.28, 103.53)
    assert input_statistics("resnet50_senet").deviation == (58.395, 57.12, 57.375)
    assert input_statistics("resnet101") == IMAGENET
    assert [m / 255 for m in IMAGENET.mean] == pytest.approx([0.485, 0.456, 0.406])
    assert [d / 255 for d in IMAGENET.deviation] == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize("given, wanted", [(RAW, IMAGENET), (IMAGENET, RAW), (IMAGENET, IMAGENET)])
def test_a_network_sees_what_it_expects_if_converted_or_inside_the_block(given, wanted):
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 255

    def normalised(statistics):
        mean, deviation = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in vars(statistics).values())
        return (pixels - mean) / deviation

    torch.manual_seed(0)
    model = backbones.build("resnet18", 3, width=1 / 16).double().eval()
    expected = model(normalised(wanted))
    set_input(model, wanted)
    with fed(model, given):
        torch.testing.assert_close(model(normalised(given)), expected)
    assert torch.allclose(model(normalised(given)), expected) == (given == wanted)
    names = set(model.state_dict())
    converted = expect(model, given, wanted)
    torch.testing.assert_close(converted(normalised(given)), expected)
    torch.testing.assert_close(copy.deepcopy(converted)(normalised(given)), expected)
    assert set(converted.state_dict()) == names


def test_a_file_says_what_its_network_was_trained_on_only_if_that_is_unusual(tmp_path):
    model = backbones.build("resnet18", 3, width=1 / 16)
    usual = dict(model.architecture)
    set_input(model, IMAGENET)
    assert model.architecture == usual and input_of(model) == IMAGENET
    set_input(model, RAW)
    afs.save(afs.convert(model), tmp_path / "raw.safetensors")
    loaded = afs.load(tmp_path / "raw.safetensors")
    assert input_of(loaded) == RAW
    assert loaded.architecture == {**usual, "gates": "all", "input": {"mean": [0.0] * 3, "deviation": [1.0] * 3}}
    set_input(loaded, IMAGENET)
    assert "input" not in loaded.architecture
    model.architecture["input"] = {"mean": [0, 0, 0], "deviation": [1, 1, 0]}
    afs.save(model, tmp_path / "odd.safetensors")
    with pytest.raises(AFDSError, match="the network's input is .* mean and deviation of three colours"):
        afs.load(tmp_path / "odd.safetensors")
