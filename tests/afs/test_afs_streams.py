"""Mask updates for shapes that kernels like: whole residual streams narrow, channel counts come in multiples."""

import math

import pytest
import torch
from torch import nn

from afdslib import afs, backbones
from afdslib.afs import compact, macs
from afdslib.base.errors import AFDSError


def network(name: str = "resnet26", gates: str = "all") -> nn.Module:
    torch.manual_seed(0)
    plain = backbones.build(name, 4, stem="cifar", width=0.125)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.5)
    return afs.convert(plain, gates=gates).eval()


@pytest.fixture(scope="module")
def loader():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 16, 16, generator=generator), torch.zeros(4))]


def updated(loader, name: str = "resnet26", **options):
    model = network(name)
    statistics = afs.collect_statistics(model, loader)
    return model, afs.update_masks(model, statistics, macs_budget=0.3, loader=loader, **options)


def test_streams_are_the_layers_that_are_added_up():
    assert afs.streams(network()) == [
        (f"{stage}.0.conv3", f"{stage}.0.downsample.0", f"{stage}.1.conv3")
        for stage in ("layer1", "layer2", "layer3", "layer4")
    ]
    # Without a shortcut convolution the stem, through its ReLU, is an addend of the first stage.
    assert afs.streams(network("resnet18"))[0] == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert afs.streams(network(gates="blocks")) == []  # their shortcuts have no gates


def test_a_coupled_stream_narrows_as_a_whole_and_joins_become_plain_sums(loader):
    model, report = updated(loader, stream="coupled")
    assert report.macs.total <= 0.3 * macs.count(model, (3, 16, 16)).total
    gone = 0
    for names in afs.streams(model):
        kept = [model.get_submodule(name).m for name in names]
        assert all(torch.equal(m, kept[0]) for m in kept) and bool(kept[0].any())
        gone += int((kept[0] == 0).sum())
    assert gone > 0
    cut = compact.compact(model, input_size=(3, 16, 16))
    assert not [m for m in cut.modules() if type(m).__name__ == "Join"]
    free, _ = updated(loader)
    cut = compact.compact(free, input_size=(3, 16, 16))
    assert [m for m in cut.modules() if type(m).__name__ == "Join"] and afs.streams(cut) == []


def test_a_channel_of_a_coupled_stream_stays_while_any_addend_needs_it(loader):
    model = network()
    statistics = afs.collect_statistics(model, loader)
    names = afs.streams(model)[1]
    model.get_submodule(names[0]).m[5] = 0  # a dead addend counts as nothing
    largest = torch.stack([statistics[n].q * model.get_submodule(n).m for n in names]).amax(0)
    delta = float(largest.sort().values[10])
    afs.update_masks(model, statistics, delta_m=delta, stream="coupled")
    for name in names:
        expected = (largest > delta).float()
        if name == names[0]:
            expected[5] = 0
        assert torch.equal(model.get_submodule(name).m.double(), expected.double())


def test_a_coupled_stream_keeps_a_last_channel(loader):
    model = network()
    afs.update_masks(model, afs.collect_statistics(model, loader), delta_m=math.inf, stream="coupled")
    for names in afs.streams(model):
        assert all(int(model.get_submodule(name).m.sum()) == 1 for name in names)
    assert torch.isfinite(model(loader[0][0])).all()


@pytest.mark.parametrize("stream", ["free", "coupled"])
def test_channels_are_kept_in_multiples_within_the_budget(loader, stream):
    model, report = updated(loader, multiple=4, stream=stream)
    dense = macs.count(model, (3, 16, 16)).total
    assert report.macs.total <= 0.3 * dense
    kept = {name: (int(layer.m.sum()), layer.width) for name, layer in afs.layers(model).items()}
    assert all(alive % 4 == 0 or alive == width for alive, width in kept.values()), kept
    assert any(alive < width for alive, width in kept.values())


@pytest.mark.parametrize("options", [{"multiple": 8}, {"stream": "coupled"}])
def test_no_closed_gate_that_is_kept_comes_back_as_a_constant(loader, options):
    model = network()
    layer = model.layer2[1].conv3 if "stream" in options else model.layer2[0].conv1
    with torch.no_grad():
        layer.predictor.bias[:6] = -1.0  # predictors are constant here: these gates are always 0
        layer.beta.fill_(3.0)
    before = model(loader[0][0])
    afs.update_masks(model, afs.collect_statistics(model, loader), delta_m=0.0, **options)
    assert bool(layer.m.all()) and not layer.s.any()
    assert not layer.gamma[:6].any() and not layer.beta[:6].any() and bool((layer.beta[6:] == 3).all())
    assert torch.allclose(before, model(loader[0][0]), atol=1e-5)


def test_options_that_do_not_fit_are_refused_and_change_nothing(loader):
    model = network(gates="blocks")
    statistics = afs.collect_statistics(model, loader)
    with pytest.raises(AFDSError, match="addends all have gates"):
        afs.update_masks(model, statistics, delta_m=0.5, stream="coupled")
    wrong = (({"stream": "narrow"}, "'narrow'"), ({"multiple": 0}, "multiple"), ({"multiple": True}, "multiple.*True"))
    for options, words in wrong:
        with pytest.raises(AFDSError, match=words):
            afs.update_masks(model, statistics, delta_m=0.5, **options)
    with pytest.raises(AFDSError, match="8 channels per layer"):
        afs.update_masks(model, statistics, macs_budget=1e-4, loader=loader, multiple=8)
    assert all(bool(layer.m.all()) and bool(layer.s.all()) for layer in afs.layers(model).values())
