"""Statistics are exact, masks go down only, budgets are met."""

import math

import pytest
import torch

from afdslib import afs, backbones
from afdslib.afs import macs
from afdslib.base.errors import AFDSError


@pytest.fixture
def model():
    """A small converted network whose gates depend on the input, all different from each other."""
    torch.manual_seed(0)
    plain = backbones.build("resnet14", 4, stem="cifar", width=0.25)
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.2, 1.5)
    converted = afs.convert(plain).eval()
    for layer in afs.layers(converted).values():
        torch.nn.init.normal_(layer.predictor.weight, std=0.5)
    return converted


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 16, 16, generator=generator), torch.zeros(n)) for n in (7, 7, 5)]


def test_statistics_equal_the_direct_ones_whatever_the_batches(model, loader):
    afs.set_density(model, 0.5)
    statistics = afs.collect_statistics(model, loader)
    name, layer = "layer1.0.conv1", model.layer1[0].conv1
    inputs = []
    with torch.no_grad(), layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        for images, _ in loader:
            model(images)
    gates = [layer.gates(x) for x in inputs]
    pi, eta = (torch.cat([getattr(g, part) for g in gates]).double() for part in ("pi", "eta"))
    assert torch.allclose(statistics[name].q, eta.mean(0), atol=1e-12)
    assert torch.allclose(statistics[name].p, pi.var(0, unbiased=False), atol=1e-10)
    assert torch.allclose(statistics[name].active_rate, (pi > 0).double().mean(0))
    assert statistics[name].n == 19


def test_statistics_restore_the_mode_and_touch_no_running_statistic(model, loader):
    model.train()
    model.layer2.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    afs.collect_statistics(model, loader)
    assert model.training and not model.layer2.training and model.layer3.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_static_channels_have_variance_zero_and_mean_gamma(model, loader):
    layer = model.layer1[0].conv2
    layer.s[3], layer.gamma[3] = 0, 0.25
    statistics = afs.collect_statistics(model, loader)["layer1.0.conv2"]
    assert statistics.p[3] == 0 and statistics.q[3] == 0.25


def test_threshold_follows_the_definition(model, loader):
    statistics = afs.collect_statistics(model, loader)
    delta_m = float(statistics["layer2.0.conv1"].q.median())
    afs.update_masks(model, statistics, delta_m=delta_m, delta_s=0.05)
    for name, layer in afs.layers(model).items():
        q, p = statistics[name].q, statistics[name].p
        expected_m = (q > delta_m).float()
        if expected_m.sum() == 0:
            expected_m[q.argmax()] = 1  # a layer never loses its last channel
        assert torch.equal(layer.m, expected_m)
        assert torch.equal(layer.s, (p > 0.05 * q**2).float())
        assert torch.allclose(layer.gamma[layer.s == 0], q[layer.s == 0].float())


@pytest.mark.parametrize("delta_s", [0.0, math.inf])
def test_delta_s_zero_keeps_every_varying_gate_dynamic_and_infinity_makes_all_static(model, loader, delta_s):
    statistics = afs.collect_statistics(model, loader)
    report = afs.update_masks(model, statistics, delta_m=-1.0, delta_s=delta_s)
    total = sum(layer.m.numel() for layer in afs.layers(model).values())
    varying = sum(int((s.p > 0).sum()) for s in statistics.values())
    assert report.removed == 0 and varying > total / 2
    assert report.dynamic == (varying if delta_s == 0 else 0) and report.static + report.dynamic == total


def test_freezing_everything_at_its_mean_keeps_the_function_where_gates_are_constant(loader):
    torch.manual_seed(0)
    model = afs.convert(backbones.build("resnet14", 4, stem="cifar", width=0.25)).eval()
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
    model = afs.convert(backbones.build("resnet14", 4, stem="cifar", width=0.25)).eval()  # every q is 1
    afs.update_masks(model, afs.collect_statistics(model, loader), macs_budget=0.9, loader=loader)
    gone = [int((1 - layer.m).sum()) for layer in afs.layers(model).values()]
    first = next(iter(afs.layers(model).values()))
    assert gone[0] > 0 and gone[-1] == 0
    assert torch.equal(first.m, (torch.arange(first.m.numel()) >= gone[0]).float())


def test_kept_channels_are_rounded_up_to_a_multiple(model, loader):
    afs.update_masks(model, afs.collect_statistics(model, loader), macs_budget=0.4, loader=loader, multiple=4)
    kept = [int(layer.m.sum()) for layer in afs.layers(model).values()]
    assert all(n % 4 == 0 for n in kept) and min(kept) < 16


def test_a_refused_update_changes_nothing(model, loader):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    statistics = afs.collect_statistics(model, loader)
    with pytest.raises(AFDSError, match=r"cannot be reached.*costs 0\.\d+"):
        afs.update_masks(model, statistics, macs_budget=1e-4, loader=loader)
    for kwargs, word in (
        ({}, "exactly one"),
        ({"delta_m": 0.1, "macs_budget": 0.5}, "exactly one"),
        ({"macs_budget": 1.5, "loader": loader}, r"\(0, 1\]"),
        ({"macs_budget": 0.5}, "needs a loader"),
        ({"macs_budget": 0.5, "loader": []}, "empty"),
        ({"delta_m": 0.1, "delta_s": -1}, "delta_s"),
        ({"delta_m": float("nan")}, "nan"),
        ({"delta_m": 0.1, "multiple": 0}, "multiple"),
    ):
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
    expected = torch.ones(128, dtype=torch.bool)
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
