import itertools
import math
import statistics
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tiny import maps
from torch import nn

from afdslib import backbones
from afdslib.losses import delta as module
from afdslib.losses.delta import DELTALoss, FeatureMap, channel_weights, fit_classifier
from afdslib.losses.term import Pair, TermContext

SHAPES = {"layer1.0": (3, 4, 2), "layer2.0": (5, 2, 1)}


def _features(seed):
    return {n: maps(4, *s, seed=seed) for n, s in SHAPES.items()}


def _weights():
    return {n: maps(s[0], seed=9).abs() for n, s in SHAPES.items()}


def _slow_delta(student, source, weights, alive):
    total = 0.0
    for name, (channels, height, width) in SHAPES.items():
        difference = (student[name] - source[name]).detach()
        for b, c in itertools.product(range(4), range(channels)):
            if name not in alive or bool(alive[name][c]):
                distance = sum(float(v) ** 2 for v in difference[b, c].flatten())
                total += channels / (2 * height * width) * float(weights[name][c]) * distance / 4
    return total


def test_delta_is_the_formula_and_equal_weights_are_the_feature_map_regulariser():
    student, source, weights = _features(0), _features(1), _weights()
    loss, wanted = DELTALoss(weights), _slow_delta(student, source, weights, {})
    assert loss(student, source).item() == pytest.approx(wanted, rel=1e-12) and loss(source, source).item() == 0
    context = TermContext(None, nn.Identity(), tuple(Pair(n, n, s, s) for n, s in SHAPES.items()))
    wanted = sum(0.5 * (student[n] - source[n]).square().sum().item() / (4 * h * w) for n, (_, h, w) in SHAPES.items())
    assert FeatureMap(context).module(student, source).item() == pytest.approx(wanted, rel=1e-6)
    values = [v.requires_grad_() for v in student.values()]
    assert torch.autograd.gradcheck(lambda *v: loss(dict(zip(SHAPES, v, strict=True)), source), values)


def test_masked_channels_leave_the_sum_and_the_gradient_until_the_mask_is_lifted():
    student, source, weights = _features(0), _features(1), _weights()
    alive = {"layer2.0": torch.tensor([True, False, True, True, False])}
    loss = DELTALoss(weights)
    full = loss(student, source).item()
    loss.set_alive(alive)
    student["layer2.0"].requires_grad_()
    masked = loss(student, source)
    masked.backward()
    assert masked.item() == pytest.approx(_slow_delta(student, source, weights, alive), rel=1e-12)
    assert (student["layer2.0"].grad.abs().sum((0, 2, 3)) > 0).tolist() == alive["layer2.0"].tolist()
    loss.set_alive({})
    assert loss(student, source).item() == full


def _pretrained():
    """A tiny network and three classes of bright squares that it can tell apart."""
    torch.manual_seed(0)
    model = backbones.build("resnet14", 3, stem="cifar", width=1 / 16)
    target = torch.arange(24) % 3
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    images[torch.arange(24), target] += 2
    return model, [(images[:10], target[:10]), (images[10:], target[10:])]


def test_channel_weights_are_those_of_one_pass_per_channel(monkeypatch):
    model, loader = _pretrained()
    fit_classifier(model, loader)
    names = ["layer2.0", "layer2.0.bn2"]  # the end of a block and a layer inside one
    found = []
    for group_bytes in (2**13, 2**26):
        monkeypatch.setattr(module, "GROUP_BYTES", group_bytes)
        found.append(channel_weights(model, names, loader))
    assert model.training

    model.eval()
    for name in names:
        layer = model.get_submodule(name)

        @torch.no_grad()
        def loss(channel, layer=layer):
            def remove(_module, _args, output):
                return output.index_fill(1, torch.tensor([channel]), 0)

            with layer.register_forward_hook(remove) if channel is not None else nullcontext():
                return sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in loader) / 24

        increase = [loss(c) - loss(None) for c in range(len(found[0][name]))]
        mean, deviation = statistics.mean(increase), statistics.pstdev(increase)
        powers = [math.exp((v - mean) / deviation / 5) for v in increase]
        wanted = torch.tensor([p / sum(powers) for p in powers])
        for weights in found:
            torch.testing.assert_close(weights[name], wanted, rtol=1e-3, atol=1e-6)


def test_a_channel_that_decides_weighs_most():
    model = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    model[3].weight.data[:, 2] = torch.tensor([5.0, -5.0])
    images = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    target = torch.tensor([0, 1, 0, 1, 0, 1])
    images[:, 2] += (1 - 2 * target.float())[:, None, None]
    weights = channel_weights(model, ["0"], [(images, target)])["0"]
    assert weights.argmax() == 2
    assert weights[[0, 1, 3]].unique().numel() == 1  # removing the others changes nothing
    nn.init.zeros_(model[3].weight)
    assert channel_weights(model, ["0"], [(images, target)])["0"].tolist() == pytest.approx([0.25] * 4)


def test_fitting_the_classifier_touches_nothing_else_and_reaches_the_optimum():
    model, loader = _pretrained()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    reached = fit_classifier(model, loader, weight_decay=1e-3)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"fc.weight", "fc.bias"} and model.training
    assert reached < 0.3
    model.eval()
    images, target = (torch.cat(parts) for parts in zip(*loader, strict=True))
    (F.cross_entropy(model(images), target) + 5e-4 * model.fc.weight.square().sum()).backward()
    assert model.fc.weight.grad.abs().max() < 1e-3  # stationary
