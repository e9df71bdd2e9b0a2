"""Each backbone's input statistics, and a teacher that takes its student's images."""

import copy

import pytest
import torch

from afdslib import backbones
from afdslib.backbones.inputs import IMAGENET, RAW, expect, input_statistics


def test_the_statistics_are_those_of_the_recipes():
    assert input_statistics("inception_bn") == RAW
    assert input_statistics("resnet50_senet").mean == (123.68, 116.28, 103.53)
    assert input_statistics("resnet50_senet").deviation == (58.395, 57.12, 57.375)
    assert input_statistics("resnet101") == IMAGENET
    assert [m / 255 for m in IMAGENET.mean] == pytest.approx([0.485, 0.456, 0.406])
    assert [d / 255 for d in IMAGENET.deviation] == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize("given, wanted", [(RAW, IMAGENET), (IMAGENET, RAW), (IMAGENET, IMAGENET)])
def test_a_converted_network_sees_what_it_expects(given, wanted):
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 255

    def normalised(statistics):
        mean, deviation = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in vars(statistics).values())
        return (pixels - mean) / deviation

    torch.manual_seed(0)
    model = backbones.build("resnet18", 3, width=1 / 16).double().eval()
    expected = model(normalised(wanted))
    names = set(model.state_dict())
    converted = expect(model, given, wanted)
    torch.testing.assert_close(converted(normalised(given)), expected)
    torch.testing.assert_close(copy.deepcopy(converted)(normalised(given)), expected)
    assert set(converted.state_dict()) == names
