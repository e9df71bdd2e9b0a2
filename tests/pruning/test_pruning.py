"""Static pruning: groups, MACs as counted, budgets met, networks saved and compared channel by channel."""

import copy
from collections import OrderedDict

import pytest
import tiny
import torch
from torch import nn

from afdslib import afs, backbones
from afdslib.afs import macs
from afdslib.afs.shrink import Cost, groups, shrink
from afdslib.base.errors import AFDSError, UnreachableError
from afdslib.pruning import CRITERIA, choose, scores
from afdslib.pruning.budget import LEAST
from afdslib.training.features import Teacher, feature_names
from afdslib.training.kept_channels import matching

SIZE = (3, 32, 32)
NETWORKS = {
    "resnet14": {"stem": "cifar", "width": 1 / 8},
    "resnet18": {"stem": "cifar", "width": 1 / 8},
    "wrn-16-1": {},
    "mobilenet_v2": {"width": 0.25},
}


def network(name: str = "resnet14", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = backbones.build(name, 5, **NETWORKS[name]).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
    return model


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(6, *SIZE), torch.randint(0, 5, (6,))) for _ in range(2)]


def ranked(model: nn.Module, criterion: str = "l1"):
    return scores(criterion, model, groups(model, SIZE), batches=batches(), normalise="mean")


def pruned(model: nn.Module, criterion: str = "l1", budget: float = 0.4):
    return choose(model, groups(model, SIZE), ranked(model, criterion), budget, SIZE)


def silenced(model: nn.Module, kept) -> nn.Module:
    """The dense network with the removed channels set to zero: what the shrunken one must compute."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for group in groups(model, SIZE):
            gone = [c for c in range(group.width) if c not in kept[group.name]]
            for name in group.outputs:
                for parameter in model.get_submodule(name).parameters():
                    parameter[gone] = 0
    return model


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("budget", [0.6, 0.15])
def test_a_shrunken_network_meets_its_budget_and_computes_the_dense_one_with_those_channels_at_zero(name, budget):
    model, x = network(name), torch.randn(3, *SIZE)
    found, dense, kept = groups(model, SIZE), macs.count(model, SIZE).total, pruned(model, budget=budget)
    small = shrink(model, kept, SIZE)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(x), silenced(model, kept)(x), rtol=1e-4, atol=1e-5)
    counted = macs.count(small, SIZE).total
    assert LEAST * budget <= counted / dense <= budget
    gone = [torch.tensor([c not in kept[g.name] for c in range(g.width)]) for g in found]
    assert Cost(model, found, SIZE)(gone) == pytest.approx(counted)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_least_important_channels_of_the_whole_network_go(criterion):
    model = network()
    inside, outside = [], []
    kept = pruned(model, criterion)
    for group, values in zip(groups(model, SIZE), ranked(model, criterion), strict=True):
        stays = torch.isin(torch.arange(group.width), torch.tensor(kept[group.name]))
        outside.append(values[~stays])
        inside.append(values[stays] if stays.sum() > 1 else values[:0])
        assert stays.any()
    # One threshold, but for the few that came back to fill the budget.
    assert float((torch.cat(outside) > torch.cat(inside).quantile(0.05)).double().mean()) < 0.05


def test_the_criteria_are_their_formulas():
    model = network()
    everything = groups(model, SIZE)
    names = [group.name for group in everything]
    conv, norm = model.layer1[0].conv1, model.layer1[0].bn1

    def of(criterion, layer="layer1.0.conv1", seed=0):
        return scores(criterion, model, everything, batches=batches(), seed=seed)[names.index(layer)]

    torch.testing.assert_close(of("slimming"), norm.weight.detach().abs().double())
    torch.testing.assert_close(of("l1"), conv.weight.detach().abs().sum((1, 2, 3)).double())
    expected = torch.zeros(conv.out_channels, dtype=torch.float64)
    for images, labels in batches():
        loss = nn.functional.cross_entropy(model(images), labels)
        gradient = torch.autograd.grad(loss, conv.weight)[0]
        expected += (conv.weight.detach() * gradient).sum((1, 2, 3)).double().square() / 2
    torch.testing.assert_close(of("taylor"), expected)
    assert not torch.equal(of("random"), of("random", seed=1))
    assert all(p.grad is None for p in model.parameters()) and not model.training  # as they were
    # A residual stream: the shortcut's and the last convolution's filters share their channels.
    both = [model.layer1[0].conv3, model.layer1[0].downsample[0]]
    mean = sum(c.weight.detach().abs().sum((1, 2, 3)) for c in both) / 2
    torch.testing.assert_close(of("l1", "layer1.0.conv3"), mean.double())


def test_a_pruned_network_is_saved_with_its_channels_and_pruned_again_keeps_their_names(tmp_path):
    model, x = network(), torch.randn(2, *SIZE)
    first = pruned(model, budget=0.5)
    small = shrink(model, first, SIZE)
    second = pruned(small, "random", budget=0.5)
    smaller = shrink(small, second, SIZE)
    assert all(smaller.architecture["kept"][n] == [first[n][c] for c in second[n]] for n in first)
    afs.save(smaller, tmp_path / "net.safetensors")
    loaded = afs.load(tmp_path / "net.safetensors")
    assert torch.equal(loaded(x), smaller(x)) and loaded.architecture == smaller.architecture


@pytest.mark.parametrize("name", NETWORKS)
def test_the_kept_channels_of_tapped_layers_are_those_of_the_source(name):
    """The silenced source's features at the kept channels are the pruned network's features."""
    model = network(name)
    kept = pruned(model)
    names = feature_names(model, "block")
    channels = matching(model, kept, names, SIZE)
    small = shrink(model, kept, SIZE)
    assert [p.shape for p in channels.reference.parameters()] == [p.shape for p in small.parameters()]
    x = torch.randn(2, *SIZE)
    features, of_dense = Teacher(small, names)(x)[1], Teacher(silenced(model, kept), names)(x)[1]
    for layer in names:
        torch.testing.assert_close(features[layer], of_dense[layer][:, channels.kept[layer]], rtol=1e-3, atol=1e-4)


def test_a_budget_below_the_fixed_layers_names_the_smallest_that_can_be_reached():
    model = network()
    with pytest.raises(UnreachableError, match=r"budget 0.001 cannot be reached.*cost 0\.\d+ of the dense") as caught:
        pruned(model, budget=0.001)
    smallest = float(str(caught.value).split("cost ")[1].split()[0])
    kept = pruned(model, budget=smallest + 1e-4)
    assert all(len(positions) == 1 for positions in kept.values())
    with pytest.raises(UnreachableError):
        pruned(model, budget=smallest - 1e-3)


def test_networks_that_cannot_be_pruned_are_refused_in_one_sentence():
    model, small = network(), (3, tiny.SIZE, tiny.SIZE)
    parts = {"features": nn.Conv2d(3, 6, 3), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    plain = nn.Sequential(OrderedDict(parts, fc=nn.Linear(6, 3)))
    grouped = nn.Sequential(OrderedDict(features=parts["features"], grouped=nn.Conv2d(6, 6, 3, groups=2)))
    for call, words in (
        (lambda: scores("slimming", plain, groups(plain, SIZE)), "slimming cannot rank.*'features'.*batch norm"),
        (lambda: groups(tiny.gated(), small), "'conv1' is gated"),
        (lambda: groups(grouped, SIZE), "'grouped' is a convolution of 2 groups"),
        (lambda: shrink(model, {"x": (0,)}, SIZE), "no group"),
        (lambda: shrink(model, {"conv1": ()}, SIZE), "at least one"),
        (lambda: shrink(model, {"conv1": (99,)}, SIZE), "below 8"),
        (lambda: scores("magic", model, groups(model, SIZE)), "selection must be one of slimming, .* got 'magic'"),
        (lambda: scores("taylor", model, groups(model, SIZE)), "loader is empty"),
    ):
        with pytest.raises(AFDSError, match=words):
            call()
