"""Conversion is exact: the AFS network computes the function of the network it came from."""

import copy

import pytest
import torch
from torch import nn

from afdslib import afs, backbones
from afdslib.base.errors import AFDSError


def randomise(model: nn.Module, seed: int = 0, *, zeros: bool = True) -> nn.Module:
    """Random statistics, shifts and scales; some scales negative, some exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            module.running_mean.copy_(torch.randn(n, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.randn(n, generator=generator))
                module.bias.copy_(torch.randn(n, generator=generator) * 0.3)
                if zeros and n > 4:
                    module.weight[torch.randperm(n, generator=generator)[: n // 5]] = 0
    return model


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


NETWORKS = [
    ("resnet18", {"stem": "imagenet"}, 64),
    ("resnet50", {"stem": "imagenet"}, 64),
    ("resnet26", {"stem": "cifar", "width": 0.125}, 16),
    ("resnet50", {"stem": "cifar", "width": 3 / 16}, 16),
    ("vgg11_bn", {}, 32),
    ("mobilenet_v2", {}, 48),
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("name", "kwargs", "size"), NETWORKS, ids=lambda v: str(v) if not isinstance(v, dict) else "")
def test_converted_network_computes_the_same_function(name, kwargs, size, training):
    torch.manual_seed(0)
    model = randomise(backbones.build(name, 5, **kwargs)).double()
    for module in model.modules():  # dropout would draw different masks in the two passes
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    converted = afs.convert(model)
    model.train(training), converted.train(training)
    x = torch.randn(3, 3, size, size, dtype=torch.float64)
    assert deviation(converted(x), model(x)) <= 1e-9
    statistics = {n: b for n, b in model.named_buffers() if "running" in n}
    compared = 0
    for layer_name, layer in afs.layers(converted).items():
        twin = layer_name.replace("conv", "bn") if "conv" in layer_name.rsplit(".", 1)[-1] else None
        if twin is None or f"{twin}.running_mean" not in statistics:
            continue
        assert torch.allclose(layer.norm.running_mean.abs(), statistics[f"{twin}.running_mean"].abs(), atol=1e-12)
        assert torch.allclose(layer.norm.running_var, statistics[f"{twin}.running_var"], atol=1e-12)
        compared += 1
    assert compared or "resnet" not in name


def test_float32_eval_deviation_is_small():
    torch.manual_seed(0)
    model = randomise(backbones.build("resnet101", 5)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert deviation(afs.convert(model)(x), model(x)) <= 1e-5


def test_resnet101_has_104_gates_and_99_in_its_blocks():
    model = backbones.build("resnet101", 10)
    found = list(afs.layers(afs.convert(model)))
    assert len(found) == 104
    assert found[0] == "conv1" and found[1] == "layer1.0.conv1"
    assert len(afs.layers(afs.convert(model, gates="blocks"))) == 99


def test_the_original_is_left_as_it_was():
    model = randomise(backbones.build("resnet14", 5, stem="cifar", width=0.25))
    before = copy.deepcopy(model.state_dict())
    afs.convert(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_constant_channels_become_static_and_go_at_the_first_mask_update():
    model = backbones.build("resnet14", 5, stem="cifar", width=0.25)
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
    assert layer.m[3] == 0 and layer.m.sum() == 15
    assert layer(x)[:, 3].abs().max() == 0


def test_a_layer_without_any_scale_is_refused():
    model = backbones.build("resnet18", 5)
    nn.init.zeros_(model.layer2[0].bn2.weight)
    with pytest.raises(AFDSError, match="layer2.0.bn2.*zero-initialised"):
        afs.convert(model)


def test_preactivation_networks_are_refused_in_one_sentence():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, self.conv2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
            self.bn2, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.conv1(x)
            x = x + self.conv2(self.bn1(x).relu())
            return self.fc(self.bn2(x).relu().mean((2, 3)))

    with pytest.raises(AFDSError, match="pre-activation") as caught:
        afs.convert(PreActivation())
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_refused():
    model = backbones.build("resnet14", 5, stem="cifar", width=0.25)
    with pytest.raises(AFDSError, match="'some'"):
        afs.convert(model, gates="some")
    converted = afs.convert(model)
    with pytest.raises(AFDSError, match="already"):
        afs.convert(converted)
    for density in (0, -1, 1.5, "0.5", float("nan")):
        with pytest.raises(AFDSError, match="density"):
            afs.set_density(converted, density)
    with pytest.raises(AFDSError, match="no AFS layer"):
        afs.set_density(model, 0.5)


def test_saved_network_reloads_with_masks_and_density(tmp_path):
    torch.manual_seed(0)
    model = afs.convert(randomise(backbones.build("resnet14", 5, stem="cifar", width=0.25))).eval()
    afs.set_density(model, 0.5)
    for layer in afs.layers(model).values():
        layer.m[::5] = 0
        layer.s[::3] = 0
    x = torch.randn(2, 3, 32, 32)
    afs.save(model, tmp_path / "net.safetensors")
    again = afs.load(tmp_path / "net.safetensors")
    assert torch.equal(again(x), model(x))
    assert [layer.k for layer in afs.layers(again).values()] == [layer.k for layer in afs.layers(model).values()]


def test_damaged_or_foreign_files_are_refused(tmp_path):
    with pytest.raises(AFDSError, match="no file"):
        afs.load(tmp_path / "missing.safetensors")
    model = afs.convert(randomise(backbones.build("resnet14", 5, stem="cifar", width=0.25)))
    afs.save(model, tmp_path / "net.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:5000])
    with pytest.raises(AFDSError, match="damaged"):
        afs.load(tmp_path / "cut.safetensors")
    with pytest.raises(AFDSError, match="backbones.build"):
        afs.save(nn.Linear(2, 2), tmp_path / "x.safetensors")
