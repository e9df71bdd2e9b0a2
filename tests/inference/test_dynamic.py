"""Dynamic execution equals the masked network, whatever the way, the batch, the masks."""

import pytest
import tiny
import torch
from torch import nn

from afdslib import afs, backbones
from afdslib.afs import compact
from afdslib.base.errors import AFDSError
from afdslib.inference import dynamic


def images(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.cat([batch for batch, _ in tiny.batches()])[:count].to(dtype)


def network(density: float = 0.4, *, masked: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
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


@pytest.mark.parametrize("way", ["mask", "gather", "group"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_every_way_equals_the_masked_network(way: str, batch: int, masked: bool) -> None:
    for density in (1.0, 0.4):
        model, x = network(density, masked=masked), images(batch)
        assert distance(model, dynamic.dynamic(model, x, ways=way), x) <= 1e-12


def test_measured_ways_equal_the_masked_network_in_float32_and_on_other_images() -> None:
    model = network(dtype=torch.float32)
    net = dynamic.dynamic(model, images(1, torch.float32), images(3, torch.float32), repeats=1)
    assert distance(model, net, images(6, torch.float32)[3:4]) <= 1e-4
    assert distance(model, net, images(6, torch.float32)[3:]) <= 1e-4
    assert set(net.choices) == {1, 3} and [c.layer for c in net.choices[1]] == list(afs.layers(model))


@pytest.mark.parametrize("batch", [1, 2])
def test_compact_networks_with_gates_run_dynamically(batch: int) -> None:
    model, x = network(masked=True), images(batch)
    small = compact.compact(model)
    for way in ("mask", "gather"):
        assert distance(model, dynamic.dynamic(small, x, ways=way), x) <= 1e-12


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_basic_blocks_and_grouped_convolutions(name: str) -> None:
    torch.manual_seed(0)
    model = afs.convert(backbones.build(name, 3, width=0.125)).double().eval()
    afs.set_density(model, 0.5)
    for layer in afs.layers(model).values():
        nn.init.normal_(layer.predictor.weight, std=0.1)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert distance(model, dynamic.dynamic(model, x, ways="gather"), x) <= 1e-12


def test_only_kept_channels_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(0.4), images(1)
    net = dynamic.dynamic(model, x, ways="gather")
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in net.named_modules():
        if isinstance(module, dynamic.DynamicConvBN):

            def convolve(x, weight, bias, name=name, original=module._convolve):
                seen[name.removeprefix("plans.1.")] = weight.shape[:2]
                return original(x, weight, bias)

            monkeypatch.setattr(module, "_convolve", convolve)
    net(x)
    layers = afs.layers(model)
    assert set(seen) == set(layers)
    assert all(seen[name][0] == layer.k for name, layer in layers.items())
    # Inside a block the inputs are the channels that the layer before kept.
    assert seen["layer2.0.conv2"][1] == layers["layer2.0.conv1"].k
    assert seen["layer2.0.conv3"][1] == layers["layer2.0.conv2"].k


def test_inputs_of_a_stream_that_are_zero_can_be_left_out() -> None:
    model, x = network(0.2), images(1)
    layer = "layer2.0.conv1"
    for static_shapes in (False, True):
        net = dynamic.dynamic(
            model, x, ways=dict.fromkeys(afs.layers(model), "mask") | _streams(layer), static_shapes=static_shapes
        )
        assert distance(model, net, x) <= 1e-12
        assert next(c.way for c in net.choices[1] if c.layer == layer).startswith("nonzero:")


def test_a_network_prepared_for_one_image_takes_several() -> None:
    model, x = network(0.6), images(1)  # so dense that the channels that are not zero are counted for each image
    ways = dict.fromkeys(afs.layers(model), "mask") | _streams("layer2.0.conv1")
    assert distance(model, dynamic.dynamic(model, x, ways=ways), images(3)) <= 1e-12


@pytest.mark.parametrize("way", ["mask", "gather"])
@pytest.mark.parametrize("weights", [False, True])
def test_channels_last_maps_are_as_good_as_others(way: str, weights: bool) -> None:
    model, x = network(), images(2).to(memory_format=torch.channels_last)
    if weights:
        model.to(memory_format=torch.channels_last)
    net = dynamic.dynamic(model, x, ways=way)
    assert distance(model, net, x) <= 1e-12
    basic = afs.convert(backbones.build("resnet18", 3, stem="cifar", width=0.25)).double().eval()
    afs.set_density(basic, 0.6)
    if weights:
        basic.to(memory_format=torch.channels_last)
    ways = {name: "gather/conv/rows" if name.endswith("conv2") else "mask" for name in afs.layers(basic)}
    assert distance(basic, dynamic.dynamic(basic, x, ways=ways), x) <= 1e-12


def _streams(layer: str) -> dict[str, str]:
    """The addends of the stream that a layer reads must be gathered for its zero channels to be known."""
    block = layer.split(".")[0]
    before = f"layer{int(block[5:]) - 1}.0"
    gathered = {f"{before}.{name}": "gather/matmul/rows" for name in ("conv3", "downsample.0")}
    return gathered | {layer: "nonzero:gather/matmul/rows"}


def test_a_selected_channel_of_importance_zero_is_exactly_zero() -> None:
    model, x = network(1.0), images(2)
    for layer in afs.layers(model).values():
        layer.predictor.bias.data[1::2] = -100.0
        layer.beta.data.fill_(3.0)
    for way in ("mask", "gather"):
        assert distance(model, dynamic.dynamic(model, x, ways=way), x) <= 1e-12


def test_ties_go_to_the_lowest_index_as_in_the_masked_network() -> None:
    model = afs.convert(tiny.network()).double().eval()
    for layer in afs.layers(model).values():
        layer.predictor.bias.data.fill_(1.0)
    afs.set_density(model, 0.3)
    for batch in (1, 2):
        assert distance(model, dynamic.dynamic(model, images(batch), ways="gather"), images(batch)) <= 1e-12


def test_samples_of_one_pattern_share_one_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(0.4), images(1).expand(3, -1, -1, -1).contiguous()
    net = dynamic.dynamic(model, x, ways="group")
    module = net.get_submodule("plans.3").get_submodule("layer2.0.conv2")
    batches = []
    original = module._convolve
    monkeypatch.setattr(module, "_convolve", lambda x, *rest: batches.append(len(x)) or original(x, *rest))
    net(x)
    assert batches == [3]


def test_what_is_run_is_the_fastest_whole_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), images(1)

    def measured(runs, repeats, *, before=None):
        return {name: 1.0 if name in ("model", "mask") else 2.0 for name in runs}

    monkeypatch.setattr(dynamic, "measure", measured)
    net = dynamic.dynamic(model, x)
    assert net.taken[1] == "mask" and set(net.seconds[1]) == {"dynamic", "mask", "model"}
    # Masking wins every layer, too, where a gather is measured to be slower.
    assert {choice.way for choice in net.choices[1]} == {"mask"}


def test_the_input_and_the_model_are_left_alone() -> None:
    model, x = network(), images(2)
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    net = dynamic.dynamic(model, x, ways="gather")
    first = net(x)
    assert torch.equal(net(x), first) and torch.equal(x, before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_static_shapes_compile_into_one_graph() -> None:
    model, x = network(dtype=torch.float32), images(1, torch.float32)
    net = dynamic.dynamic(model, x, ways="gather", static_shapes=True)
    explained = torch._dynamo.explain(net.plans["1"])(x)
    assert explained.graph_break_count == 0


def test_refusals_name_what_is_wrong() -> None:
    model, x = network(), images(1)
    with pytest.raises(AFDSError, match="no AFS layer"):
        dynamic.dynamic(tiny.network().eval(), x)
    with pytest.raises(AFDSError, match="model.eval"):
        dynamic.dynamic(tiny.gated(), x)
    with pytest.raises(AFDSError, match="batch of images"):
        dynamic.dynamic(model)
    with pytest.raises(AFDSError, match="no AFS layer"):
        dynamic.dynamic(model, x, ways={"layer9": "mask"})
    with pytest.raises(AFDSError, match="cannot be computed by 'fast'"):
        dynamic.dynamic(model, x, ways={"conv1": "fast"})
    with pytest.raises(AFDSError, match="mask, gather, group"):
        dynamic.dynamic(model, x, ways="fast")
    afs.layers(model)["layer1.0.conv2"].m.zero_()
    with pytest.raises(AFDSError, match="'layer1.0.conv2'"):
        dynamic.dynamic(model, x)
