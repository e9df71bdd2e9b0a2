"""Conversion is exact: the AFS network computes the function of the network it came from."""


import pytest
import random_networks as random
import torch
from torch import nn

from afdslib import afs, backbones
from afdslib.base.errors import AFDSError


def small(**options) -> nn.Module:
    return random.randomised(backbones.build("resnet14", 5, stem="cifar", width=1 / 8), **options).float()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11_bn", "mobilenet_v2"])
def test_a_converted_network_computes_the_same_function(name, training):
    model = random.plain(name, 0)
    for module in model.modules():  # dropout would draw different masks in the two passes
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = afs.convert(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.train(training), converted.train(training)
    assert random.difference(converted, model, random.images(48)) <= 1e-9
    statistics, compared = dict(model.named_buffers()), 0
    for layer_name, layer in afs.layers(converted).items():
        twin = layer_name.replace("conv", "bn")
        if "conv" in layer_name and f"{twin}.running_mean" in statistics:
            assert torch.allclose(layer.norm.running_mean.abs(), statistics[f"{twin}.running_mean"].abs(), atol=1e-12)
            assert torch.allclose(layer.norm.running_var, statistics[f"{twin}.running_var"], atol=1e-12)
            compared += 1
    assert compared or "resnet" not in name


def test_resnet101_has_104_gates_99_of_them_in_its_blocks_and_deviates_little_in_float32():
    model = random.plain("resnet101", 0).float()
    converted = afs.convert(model)
    found = list(afs.layers(converted))
    assert len(found) == 104 and found[:2] == ["conv1", "layer1.0.conv1"]
    assert len(afs.layers(afs.convert(model, gates="blocks"))) == 99
    assert random.difference(converted, model, random.images(64).float()) <= 1e-5


def test_constant_channels_become_static_and_go_at_the_first_mask_update():
    model = small(zeros=False)
    with torch.no_grad():
        model.bn1.weight[3] = 0.0
        model.bn1.bias[3] = 0.7
    converted = afs.convert(model).eval()
    layer = afs.layers(converted)["conv1"]
    assert layer.s[3] == 0 and layer.gamma[3] == 0
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(layer(x)[:, 3], torch.full((2, 16, 16), 0.7))
    statistics = afs.collect_statistics(converted, [(x, None)])
    afs.update_masks(converted, statistics, delta_m=0.0)
    assert layer.m[3] == 0 and layer.m.sum() == 7
    assert layer(x)[:, 3].abs().max() == 0


def test_preactivation_networks_and_a_layer_without_any_scale_are_refused_in_one_sentence():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, self.conv2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
            self.bn2, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.conv1(x)
            x = x + self.conv2(self.bn1(x).relu())
            return self.fc(self.bn2(x).relu().mean((2, 3)))

    zero = backbones.build("resnet18", 5, width=1 / 8)
    nn.init.zeros_(zero.layer2[0].bn2.weight)
    for model, words in ((PreActivation(), "pre-activation"), (zero, "layer2.0.bn2.*zero-initialised")):
        with pytest.raises(AFDSError, match=words) as caught:
            afs.convert(model)
        assert "\n" not in str(caught.value)


def test_bad_arguments_are_refused():
    model = small()
    with pytest.raises(AFDSError, match="'some'"):
        afs.convert(model, gates="some")
    converted = afs.convert(model)
    with pytest.raises(AFDSError, match="already"):
        afs.convert(converted)
    for density in (0, -1, 1.5, 1.01, "0.5", float("nan"), True, None):
        with pytest.raises(AFDSError, match="density"):
            afs.set_density(converted, density)
    with pytest.raises(AFDSError, match="no AFS layer"):
        afs.set_density(model, 0.5)


def test_damaged_or_foreign_files_are_refused(tmp_path):
    with pytest.raises(AFDSError, match="no file"):
        afs.load(tmp_path / "missing.safetensors")
    afs.save(afs.convert(small()), tmp_path / "net.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:5000])
    with pytest.raises(AFDSError, match="damaged"):
        afs.load(tmp_path / "cut.safetensors")
    with pytest.raises(AFDSError, match="backbones.build"):
        afs.save(nn.Linear(2, 2), tmp_path / "x.safetensors")
