"""MACs: dense counts against torchvision's metadata, gated counts against channels literally removed."""

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from afdslib import afs, backbones
from afdslib.afs import macs
from afdslib.base.errors import AFDSError
from afdslib.base.hooks import kept


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_dense_counts_equal_torchvision_metadata(name):
    with torch.device("meta"):
        counted = macs.count(backbones.build(name, 1000), (3, 224, 224)).total
    printed = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta["_ops"]
    assert f"{counted / 1e9:.3f}" == f"{printed:.3f}"


class Tiny(nn.Module):
    """Stem, one residual block with a shortcut convolution, pooling, flattening, classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a, self.bn1 = nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5)
        self.b, self.bn2 = nn.Conv2d(5, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.shortcut, self.bn3 = nn.Conv2d(6, 7, 1, stride=2, bias=False), nn.BatchNorm2d(7)
        self.fc = nn.Linear(7 * 4, 3)

    def forward(self, x):
        x = self.bn0(self.stem(x)).relu()
        y = self.bn2(self.b(self.bn1(self.a(x)).relu()))
        x = (y + self.bn3(self.shortcut(x))).relu()
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 2), 1))


def brute_force(model: nn.Module, image: torch.Tensor) -> tuple[float, float]:
    """MACs of one image: layers rebuilt with only the channels that are computed, counted by torch's own counter."""
    found = afs.layers(model)
    with torch.no_grad(), kept(found, inputs=True) as x:
        model(image)
    active = {name: found[name].gates(x[name]).active[0] > 0 for name in found}
    everything, stem, b = torch.ones(3, dtype=torch.bool), active["stem"], active["b"]
    streams = {"stem": everything, "a": stem, "b": active["a"], "shortcut": stem}
    total = predictors = 0.0
    for name, inputs in streams.items():
        outputs, layer, conv = active[name], found[name], found[name].conv
        if inputs.any() and outputs.any():
            sizes = int(inputs.sum()), int(outputs.sum()), conv.kernel_size, conv.stride, conv.padding
            cut = nn.Conv2d(*sizes, bias=False)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                cut(x[name][:, inputs])
            total += counter.get_total_flops() / 2
        predictors += int(inputs.sum()) * int((layer.m * layer.s).sum())
    total += int((b | active["shortcut"]).sum()) * 4 * 3
    return total, predictors


def test_an_ungated_addend_makes_the_whole_stream_active():
    model = afs.convert(backbones.build("resnet14", 4, stem="cifar", width=0.25), gates="blocks").eval()
    for name, layer in afs.layers(model).items():
        if name.endswith("conv3"):
            layer.m[1:] = 0
    measured, dense = macs.expected(model, [(torch.randn(2, 3, 16, 16), None)]), macs.count(model, (3, 16, 16))
    assert measured.by_layer["layer2.0.conv1"] == dense.by_layer["layer2.0.conv1"]
    assert measured.by_layer["fc"] == dense.by_layer["fc"]
    assert measured.by_layer["layer2.0.conv3"] == dense.by_layer["layer2.0.conv3"] / 128


def test_gates_do_not_change_the_dense_count_which_a_plain_network_costs_and_an_empty_loader_is_refused():
    model = backbones.build("resnet14", 4, stem="cifar", width=0.25)
    dense, gated = macs.count(model, (3, 16, 16)), macs.count(afs.convert(model), (3, 16, 16))
    assert gated == dense and sum(gated.by_layer.values()) == gated.total
    measured = macs.expected(model, [(torch.randn(2, 3, 16, 16), None)])
    assert measured.total == dense.total and measured.predictors == 0
    assert model.training  # the mode is restored
    with pytest.raises(AFDSError, match="empty"):
        macs.expected(model, [])
    with pytest.raises(AFDSError, match="input_size"):
        macs.count(model, (3, 32))


def test_grouped_convolutions_count_pairs_within_groups():
    model = afs.convert(backbones.build("mobilenet_v2", 4, width=0.25)).eval()
    layer = afs.layers(model)["features.1.conv.0.0"]
    layer.m[:3] = 0
    measured = macs.expected(model, [(torch.randn(1, 3, 32, 32), None)])
    dense = macs.count(model, (3, 32, 32))
    assert measured.by_layer["features.1.conv.0.0"] == dense.by_layer["features.1.conv.0.0"] * 5 / 8


def test_parameters_are_those_of_the_network_with_its_removed_channels_cut_out():
    model = afs.convert(Tiny()).eval()
    plain = sum(p.numel() for p in Tiny().parameters())
    everything_static = {"stem": 6, "a": 5, "b": 7, "shortcut": 7}
    for name, layer in afs.layers(model).items():
        layer.s.zero_()
        assert layer.m.numel() == everything_static[name]
    assert macs.parameters(model, (3, 8, 8)) == plain  # gamma and beta are the batch norm's scale and shift
    model.stem.m[:2] = 0
    cut = 2 * 3 * 9 + 2 * 2 + 2 * 5 * 9 + 2 * 7  # its filters, scale and shift, and the inputs of a and of the shortcut
    assert macs.parameters(model, (3, 8, 8)) == plain - cut
    model.b.m[0] = 0  # the shortcut still writes channel 0, so the classifier keeps it
    assert macs.parameters(model, (3, 8, 8)) == plain - cut - (5 * 9 + 2)
    model.a.s[:3] = 1  # dynamic channels: a row of the predictor and its bias in place of gamma
    assert macs.parameters(model, (3, 8, 8)) == plain - cut - (5 * 9 + 2) + 3 * (4 + 1) - 3
