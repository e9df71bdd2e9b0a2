import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afdslib import backbones
from afdslib.base.errors import AFDSError
from afdslib.losses import delta as module
from afdslib.losses.delta import DELTALoss, channel_weights, fit_classifier, uniform_weights

SHAPES = {"layer1.0": (3, 4, 2), "layer2.0": (5, 2, 1)}


def _features(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(4, *s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def _weights():
    generator = torch.Generator().manual_seed(9)
    return {n: torch.rand(s[0], generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def _slow_delta(student, source, weights, alive=None):
    total = 0.0
    student = {n: v.detach() for n, v in student.items()}
    for name, (channels, height, width) in SHAPES.items():
        for b in range(4):
            for c in range(channels):
                if alive is None or name not in alive or bool(alive[name][c]):
                    distance = sum(
                        float(student[name][b, c, i, j] - source[name][b, c, i, j]) ** 2
                        for i in range(height)
                        for j in range(width)
                    )
                    total += channels / (2 * height * width) * float(weights[name][c]) * distance / 4
    return total


def test_delta_is_the_formula():
    student, source, weights = _features(0), _features(1), _weights()
    assert DELTALoss(weights)(student, source).item() == pytest.approx(_slow_delta(student, source, weights), rel=1e-12)
    assert DELTALoss(weights)(source, source).item() == 0


def test_delta_gradients():
    student, source, loss = _features(0), _features(1), DELTALoss(_weights())
    values = [v.requires_grad_() for v in student.values()]
    assert torch.autograd.gradcheck(lambda *v: loss(dict(zip(SHAPES, v, strict=True)), source), values)


def test_uniform_weights_give_the_feature_map_regulariser():
    student, source = _features(0), _features(1)
    wanted = sum(0.5 * (student[n] - source[n]).square().sum().item() / (4 * h * w) for n, (_, h, w) in SHAPES.items())
    assert DELTALoss(uniform_weights(SHAPES))(student, source).item() == pytest.approx(wanted, rel=1e-6)


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


@pytest.mark.parametrize("group_bytes", [1, 2**13, 2**26])
def test_channel_weights_are_those_of_one_pass_per_channel(group_bytes, monkeypatch):
    monkeypatch.setattr(module, "GROUP_BYTES", group_bytes)
    model, loader = _pretrained()
    fit_classifier(model, loader)
    names = ["layer2.0", "layer4.0", "layer2.0.bn2"]  # two ends of blocks and a layer inside one
    weights = channel_weights(model, names, loader)
    assert model.training

    model.eval()
    for name in names:
        layer = model.get_submodule(name)

        @torch.no_grad()
        def loss(channel=None, layer=layer):
            def remove(_module, _args, output):
                output = output.clone()
                output[:, channel] = 0
                return output

            handle = layer.register_forward_hook(remove) if channel is not None else None
            total = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in loader) / 24
            if handle is not None:
                handle.remove()
            return total

        channels = len(weights[name])
        increase = [loss(c) - loss() for c in range(channels)]
        mean = sum(increase) / channels
        deviation = math.sqrt(sum((v - mean) ** 2 for v in increase) / channels)
        powers = [math.exp((v - mean) / deviation / 5) for v in increase]
        wanted = torch.tensor([p / sum(powers) for p in powers])
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


def test_weights_are_equal_where_removal_changes_nothing():
    model, loader = _pretrained()
    nn.init.zeros_(model.fc.weight)
    weights = channel_weights(model, ["layer4.0"], loader)["layer4.0"]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(weights)))


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


IMAGES, LABELS = torch.zeros(3, 3, 8, 8), torch.arange(3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: DELTALoss({}), "was given no layer"),
        (lambda: DELTALoss({"a": torch.tensor([0.5, -0.5])}), "of at least 0"),
        (lambda: DELTALoss(_weights())({"layer1.0": _features(0)["layer1.0"]}, _features(1)), "lack layer2.0"),
        (lambda: DELTALoss({"layer1.0": torch.ones(2)})(_features(0), _features(1)), "3 channels and DELTA holds 2"),
        (
            lambda: DELTALoss(_weights()).set_alive({"x": torch.ones(3, dtype=torch.bool)}),
            "channels of x are not flags",
        ),
        (lambda: DELTALoss(_weights()).set_alive({"layer1.0": torch.ones(3)}), "channels of layer1.0 are not flags"),
        (lambda: channel_weights(_pretrained()[0], ["layer1.0"], [(IMAGES, LABELS - 1)]), "target -1 is none"),
        (lambda: fit_classifier(_pretrained()[0], [(IMAGES, LABELS + 1)]), "target 3 is none of the 3 classes"),
        (
            lambda: DELTALoss(_weights())({n: v * math.nan for n, v in _features(0).items()}, _features(1)),
            "Student map of layer1.0 holds 96 values",
        ),
        (lambda: channel_weights(_pretrained()[0], ["layer9"], []), "no layer 'layer9'"),
        (lambda: channel_weights(_pretrained()[0], ["layer1.0"], []), "is empty"),
        (lambda: fit_classifier(_pretrained()[0], []), "is empty"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(AFDSError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)
