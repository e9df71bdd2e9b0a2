"""Statistics are exact, masks go down only, budgets are met; streams narrow as a whole, channels come in multiples."""

import math

import pytest
import torch
from torch import nn

from afdslib import afs, backbones
from afdslib.afs import compact, macs
from afdslib.base.errors import AFDSError

WIDTH = 1 / 8


def network(name: str = "resnet14", gates: str = "all") -> nn.Module:
    """A small converted network, whose gates are constant and all different from each other."""
    torch.manual_seed(0)
    plain = backbones.build(name, 4, stem="cifar", width=WIDTH)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.5)
    return afs.convert(plain, gates=gates).eval()


@pytest.fixture
def model():
    """One whose gates depend on the input."""
    converted = network()
    for layer in afs.layers(converted).values():
        nn.init.normal_(layer.predictor.weight, std=0.5)
    return converted


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 16, 16, generator=generator), torch.zeros(n)) for n in (7, 7, 5)]


def test_statistics_restore_the_mode_and_touch_no_running_statistic(model, loader):
    model.train()
    model.layer2.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    afs.collect_statistics(model, loader)
    assert model.training and not model.layer2.training and model.layer3.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("delta_s", [0.05, 0.0, math.inf])
def test_thresholds_follow_the_definition(model, loader, delta_s):
    statistics = afs.collect_statistics(model, loader)
    delta_m = float(statistics["layer2.0.conv1"].q.median())
    report = afs.update_masks(model, statistics, delta_m=delta_m, delta_s=delta_s)
    for name, layer in afs.layers(model).items():
        q, p = statistics[name].q, statistics[name].p
        expected_m = (q > delta_m).float()
        if expected_m.sum() == 0:
            expected_m[q.argmax()] = 1  # a layer never loses its last channel
        assert torch.equal(layer.m, expected_m)
        # 0 keeps every gate that varies dynamic, infinity none.
        assert torch.equal(layer.s, (p > delta_s * q**2).float() if delta_s < math.inf else torch.zeros_like(layer.s))
        assert torch.allclose(layer.gamma[layer.s == 0], q[layer.s == 0].float())
    alive = [(layer.m, layer.s) for layer in afs.layers(model).values()]
    assert report.removed == sum(int((m == 0).sum()) for m, _ in alive)
    assert report.dynamic == sum(int((m * s).sum()) for m, s in alive)
    assert report.static == sum(int((m * (1 - s)).sum()) for m, s in alive)


def test_freezing_everything_at_its_mean_keeps_the_function_where_gates_are_constant(loader):
    torch.manual_seed(0)
    model = afs.convert(backbones.build("resnet14", 4, stem="cifar", width=WIDTH)).eval()
    before = model(loader[0][0])
    afs.update_masks(model, afs.collect_statistics(model, loader), delta_m=-1.0)
    assert all((layer.s == 0).all() for layer in afs.layers(model).values())
    assert torch.allclose(model(loader[0][0]), before, atol=1e-5)


def test_masks_never_return(model, loader):
    afs.update_masks(model, afs.collect_statistics(model, loader), macs_budget=0.5, loader=loader)
    m, s = ({n: getattr(x, which).clone() for n, x in afs.layers(model).items()} for which in ("m", "s"))
    for budget in (0.9, 0.3):
        afs.update_masks(model, afs.collect_statistics(model, loader), macs_budget=budget, loader=loader)
        for name, layer in afs.layers(model).items():
            assert (layer.m <= m[name]).all() and (layer.s <= s[name]).all()


@pytest.mark.parametrize("budget", [0.7, 0.5, 0.2, 0.1])
def test_budget_is_met_closely_and_measured_on_the_loader(model, loader, budget):
    dense = macs.count(model, (3, 16, 16)).total
    report = afs.update_masks(model, afs.collect_statistics(model, loader), macs_budget=budget, loader=loader)
    measured = macs.expected(model, loader).total / dense
    assert report.macs.total / dense == pytest.approx(measured)
    assert 0.97 * budget <= measured <= budget


def test_ties_fall_by_layer_and_index(loader):
    torch.manual_seed(0)
    model = afs.convert(backbones.build("resnet14", 4, stem="cifar", width=WIDTH)).eval()  # every q is 1
    afs.update_masks(model, afs.collect_statistics(model, loader), macs_budget=0.9, loader=loader)
    gone = [int((1 - layer.m).sum()) for layer in afs.layers(model).values()]
    first = next(iter(afs.layers(model).values()))
    assert gone[0] > 0 and gone[-1] == 0
    assert torch.equal(first.m, (torch.arange(first.m.numel()) >= gone[0]).float())


def test_a_refused_update_changes_nothing(model, loader):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    statistics = afs.collect_statistics(model, loader)
    with pytest.raises(AFDSError, match=r"cannot be reached.*costs 0\.\d+"):
        afs.update_masks(model, statistics, macs_budget=1e-4, loader=loader)
    for kwargs, word in (
        ({}, "exactly one"), ({"delta_m": 0.1, "macs_budget": 0.5}, "exactly one"),
        ({"macs_budget": 1.5, "loader": loader}, r"\(0, 1\]"), ({"macs_budget": "1", "loader": loader}, "macs_budget"),
        ({"macs_budget": True, "loader": loader}, "macs_budget"), ({"macs_budget": 0.5}, "needs a loader"),
        ({"macs_budget": 0.5, "loader": []}, "empty"), ({"delta_m": 0.1, "delta_s": -1}, "delta_s"),
        ({"delta_m": 0.1, "delta_s": "0.1"}, "delta_s"), ({"delta_m": float("nan")}, "nan"),
        ({"delta_m": "0.5"}, "delta_m"), ({"delta_m": 0.1, "multiple": 0}, "multiple"),
        ({"delta_m": 0.1, "multiple": True}, "multiple.*True"), ({"delta_m": 0.1, "stream": "narrow"}, "'narrow'"),
    ):  # fmt: skip
        with pytest.raises(AFDSError, match=word):
            afs.update_masks(model, statistics, **kwargs)
    with pytest.raises(AFDSError, match="another network"):
        afs.update_masks(model, dict(list(statistics.items())[1:]), delta_m=0.1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(AFDSError, match="empty"):
        afs.collect_statistics(model, [])


def test_living_channels_are_those_that_some_addend_of_the_stream_can_make_non_zero(model):
    block, shortcut = model.layer2[0].conv3, model.layer2[0].downsample[0]
    block.m[:10] = 0
    shortcut.m[5:20] = 0
    alive = afs.living_channels(model, ["layer2.0", "layer2.0.conv3"], (3, 16, 16))
    expected = torch.ones(64, dtype=torch.bool)
    expected[5:10] = False
    assert torch.equal(alive["layer2.0"], expected)
    assert torch.equal(alive["layer2.0.conv3"], block.m > 0)
    with pytest.raises(AFDSError, match="layer9"):
        afs.living_channels(model, ["layer9"], (3, 16, 16))


def test_gates_that_are_always_zero_go_and_never_come_back_as_constants(model, loader):
    layer = model.layer1[0].conv2
    with torch.no_grad():
        layer.predictor.weight[:2] = 0
        layer.predictor.bias[:2] = -1
        layer.beta[:2] = 0.5
    afs.set_density(model, 0.6)  # already below the budget: no channel would have to go
    statistics = afs.collect_statistics(model, loader)
    report = afs.update_masks(model, statistics, macs_budget=1.0, loader=loader)
    assert report.delta_m == 0 and layer.m[:2].sum() == 0
    for name, found in afs.layers(model).items():
        assert torch.equal(found.m, (statistics[name].q > 0).float())


def updated(loader, **options):
    model, loader = network("resnet26"), loader[:1]
    statistics = afs.collect_statistics(model, loader)
    return model, afs.update_masks(model, statistics, macs_budget=0.3, loader=loader, **options)


def test_streams_are_the_layers_that_are_added_up():
    assert afs.streams(network("resnet26")) == [
        (f"{stage}.0.conv3", f"{stage}.0.downsample.0", f"{stage}.1.conv3")
        for stage in ("layer1", "layer2", "layer3", "layer4")
    ]
    # Without a shortcut convolution the stem, through its ReLU, is an addend of the first stage.
    assert afs.streams(network("resnet18"))[0] == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert afs.streams(network("resnet26", gates="blocks")) == []  # their shortcuts have no gates


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
    model = network("resnet26")
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
    afs.update_masks(model, statistics, delta_m=math.inf, stream="coupled")  # a last channel stays
    assert all(int(model.get_submodule(name).m.sum()) == 1 for name in (n for s in afs.streams(model) for n in s))
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
    model = network("resnet26")
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
    model = network("resnet26", gates="blocks")
    statistics = afs.collect_statistics(model, loader)
    with pytest.raises(AFDSError, match="addends all have gates"):
        afs.update_masks(model, statistics, delta_m=0.5, stream="coupled")
    with pytest.raises(AFDSError, match="8 channels per layer"):
        afs.update_masks(model, statistics, macs_budget=1e-4, loader=loader, multiple=8)
    assert all(bool(layer.m.all()) and bool(layer.s.all()) for layer in afs.layers(model).values())
