"""Dynamic execution equals the masked network, whatever the way, the batch, the masks."""

import pytest
import tiny
import torch
from torch import nn

from afdslib import afs, backbones
from afdslib.afs import compact
from afdslib.base.errors import AFDSError
from afdslib.inference import dynamic, kernels


def images(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return tiny.batches(12, count)[0][0].to(dtype)


def network(density: float = 0.4, *, masked: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Gated; with masks some channels are gone, some static, and every third layer is static altogether."""
    model = tiny.gated().to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for i, layer in enumerate(afs.layers(model).values() if masked else []):
        layer.m.copy_(torch.rand(layer.m.shape, generator=generator) > 0.3)
        layer.m[0] = 1
        layer.s.copy_(torch.rand(layer.s.shape, generator=generator) > 0.5 if i % 3 else torch.zeros_like(layer.s))
        layer.gamma.uniform_(0.3, 1, generator=generator)
    afs.set_density(model, density)
    return model


@torch.no_grad()
def distance(model: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    wanted = model(x)
    return float((other(x) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("way", dynamic.WAYS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("masked", "density"), [(False, 1.0), (False, 0.4), (True, 0.4)])
def test_both_ways_equal_the_masked_network(way: str, batch: int, masked: bool, density: float):
    model, x = network(density, masked=masked), images(batch)
    assert distance(model, dynamic.dynamic(model, x, way=way), x) <= 1e-5
    if masked:  # what is compact already still has gates
        assert distance(model, dynamic.dynamic(compact.compact(model), x, way=way), x) <= 1e-5
        exact, x = network(density, masked=masked, dtype=torch.float64), x.double()
        assert distance(exact, dynamic.dynamic(exact, x, way=way), x) <= 1e-12


def test_the_faster_way_is_run_for_each_batch_size(monkeypatch: pytest.MonkeyPatch):
    def measured(calls, repeats):
        return {way: [2.0 if (way == "kernel") == (len(seen) == 3) else 1.0] * repeats for way in calls}

    model, seen = network(), []
    real = dynamic.interleave
    monkeypatch.setattr(dynamic, "interleave", lambda calls, n: real(calls, n) and measured(calls, seen.append(n) or n))
    net = dynamic.dynamic(model, *(images(count) for count in (1, 3, 6)), repeats=1)
    assert net.taken == {1: "kernel", 3: "kernel", 6: "mask"}
    assert set(net.seconds[1]) == set(dynamic.WAYS) and list(net.ways) == list(afs.layers(model))
    monkeypatch.setattr(net, "run", lambda x, way: way)
    assert [net(images(count)) for count in (2, 9)] == ["kernel", "mask"]
    assert distance(model, dynamic.dynamic(model, images(1), repeats=1), images(5)) <= 1e-5


@pytest.mark.parametrize(("name", "gates"), [("resnet18", "all"), ("resnet14", "blocks"), ("mobilenet_v2", "all")])
def test_other_blocks_and_grouped_convolutions(name: str, gates: str):
    torch.manual_seed(0)
    model = afs.convert(backbones.build(name, 3, width=0.125), gates=gates).eval()
    afs.set_density(model, 0.5)
    for layer in afs.layers(model).values():
        nn.init.normal_(layer.predictor.weight, std=0.1)
    x = torch.randn(2, 3, 32, 32)
    net = dynamic.dynamic(model, x, way="kernel")
    assert distance(model, net, x) <= 1e-5
    if kernels.available():
        assert ("mask" in net.ways.values()) == (name == "mobilenet_v2")


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler here")
def test_only_kept_channels_are_computed():
    model, x = network(0.4), images(1)
    net, seen = dynamic.dynamic(model, x, way="kernel"), {}
    for name, module in net.kernel.named_children():
        if isinstance(module, kernels.KernelConvBN):
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out[0])}))
    net(x)
    layers = afs.layers(model)
    shapes = {name: seen[f"kernel_{name.replace('.', '_')}"] for name in layers}
    assert all(shapes[name][1].shape[1] == layer.k for name, layer in layers.items())
    # Inside a block the inputs are the channels that the layer before kept.
    assert shapes["layer2.0.conv2"][0].shape[1] == layers["layer2.0.conv1"].k
    assert shapes["layer2.0.conv3"][0].shape[1] == layers["layer2.0.conv2"].k


@pytest.mark.parametrize("way", dynamic.WAYS)
@pytest.mark.parametrize("weights", [False, True])
def test_channels_last_maps_are_as_good_as_others(way: str, weights: bool):
    basic = afs.convert(backbones.build("resnet18", 3, stem="cifar", width=1 / 16)).eval()
    afs.set_density(basic, 0.6)
    for model in (network(), basic):
        if weights:
            model.to(memory_format=torch.channels_last)
        x = images(2).to(memory_format=torch.channels_last)
        assert distance(model, dynamic.dynamic(model, x, way=way), x) <= 1e-5


@pytest.mark.parametrize("way", dynamic.WAYS)
def test_importance_zero_is_exactly_zero_ties_go_to_the_lowest_index_and_input_and_model_are_left_alone(way):
    model, x = network(1.0), images(2)
    for layer in afs.layers(model).values():
        layer.predictor.bias.data[1::2] = -100.0
        layer.beta.data.fill_(3.0)
    tied = afs.convert(tiny.network()).eval()
    for layer in afs.layers(tied).values():
        layer.predictor.bias.data.fill_(1.0)
    afs.set_density(tied, 0.3)
    for one in (model, tied):
        state, before = {k: v.clone() for k, v in one.state_dict().items()}, x.clone()
        net = dynamic.dynamic(one, x, way=way)
        assert distance(one, net, x) <= 1e-5 and torch.equal(net(x), net(x)) and torch.equal(x, before)
        assert all(torch.equal(v, state[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize("broken", ["GatedInference", "KernelConvBN"])
def test_a_network_that_would_compute_something_else_is_refused(broken, monkeypatch):
    if broken == "KernelConvBN" and not kernels.available():
        pytest.skip("no C++ compiler here")

    def faulty(model, real=dynamic.inference):
        plain = real(model)
        plain.fc.weight.data[0] += 0.1
        return plain

    def shifted(self, *arguments, real=kernels.KernelConvBN.forward):
        maps, *others = real(self, *arguments)
        return maps + 0.1, *others

    if broken == "GatedInference":
        monkeypatch.setattr(dynamic, "inference", faulty)
    else:
        monkeypatch.setattr(kernels.KernelConvBN, "forward", shifted)
    with pytest.raises(AFDSError, match="dynamic execution cannot .* differ by .* of the largest"):
        dynamic.dynamic(network(), images(1))


def test_refusals_name_what_is_wrong():
    model, cut, x = network(), network(), images(1)
    afs.layers(cut)["layer1.0.conv2"].m.zero_()
    for arguments, way, sentence in (
        ((tiny.network().eval(), x), None, "no AFS layer"), ((tiny.gated(), x), None, "model.eval"),
        ((model,), None, "batch of images"), ((model, x[0]), None, "shape"),
        ((model, x), "gather", "kernel, mask, got 'gather'"), ((cut, x), None, "'layer1.0.conv2'"),
    ):  # fmt: skip
        with pytest.raises(AFDSError, match=sentence):
            dynamic.dynamic(*arguments, way=way)
