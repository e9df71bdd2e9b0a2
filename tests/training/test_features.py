"""Features: hooks that never stay, copies where layers work in place, and a teacher that nothing can change."""

import copy

import checks
import pytest
import tiny
import torch
import torchvision
from torch import nn

from afdslib import afs, backbones
from afdslib.base.errors import AFDSError
from afdslib.training import features


def images(count: int = 2) -> torch.Tensor:
    return tiny.images(count).__getitems__(list(range(count)))[0]


def test_hooks_are_gone_after_the_block_an_exception_and_an_unknown_layer():
    model = tiny.gated()
    with features.taps(model, ["layer1.0", "layer4.0"]) as taken:
        assert checks.hooks(model) == 3  # and one that looks for changes in place
        model(images())
    assert set(taken) == {"layer1.0", "layer4.0"} and checks.hooks(model) == 0
    with pytest.raises(RuntimeError), features.taps(model, ["layer1.0"]):
        model(torch.zeros(2, 5, 16, 16))
    assert checks.hooks(model) == 0
    with pytest.raises(AFDSError, match="no layer 'layer9' in ResNet") as caught:
        features.taps(model, ["fc", "layer9"]).__enter__()
    assert checks.hooks(model) == 0 and "\n" not in str(caught.value)


def reference(model: nn.Module, block: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last layer's own output before the add, and the block's output, computed piece by piece."""
    names = [n for n, _ in model.named_children()]
    for name in names[: names.index(block.split(".")[0])]:
        x = model.get_submodule(name)(x)
    last = model.get_submodule(block)
    shortcut = x if last.downsample is None else last.downsample(x)
    out = x
    for i in (1, 2, 3):
        out = getattr(last, f"bn{i}")(getattr(last, f"conv{i}")(out))
        out = out.clone() if i == 3 else out.relu()
    return out, (out + shortcut).relu()


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("origin", ["backbones", "torchvision"])
def test_convbn_features_are_not_those_of_the_block(origin, converted):
    """torchvision's own blocks add in place into the last norm's output, and its ReLUs overwrite the others'."""
    torch.manual_seed(0)
    if origin == "torchvision":
        model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 3)
    else:
        model = tiny.network()
    model = (afs.convert(model) if converted else model).eval()
    x = torch.randn(2, 3, 32, 32)
    layer, block = features.feature_names(model, "convbn")[0], features.feature_names(model, "block")[0]
    assert block == "layer1.0" and layer == ("layer1.0.conv3" if converted else "layer1.0.bn3")
    with features.taps(model, [layer, block]) as taken:
        model(x)
    own, added = reference(model, block, x)
    torch.testing.assert_close(taken[layer], own)
    torch.testing.assert_close(taken[block], added)
    assert not torch.allclose(taken[layer], taken[block], atol=1e-2)
    taken[layer].square().sum().backward()  # through the copy
    grads = [[p.grad is not None and bool(p.grad.any()) for p in m.parameters()] for m in (model.conv1, model.layer2)]
    assert any(grads[0]) and not any(grads[1])


@pytest.mark.parametrize(("name", "last"), [("resnet18", "layer4.1"), ("resnet14", "layer4.0")])
def test_features_are_those_of_the_last_blocks_of_the_stages(name, last):
    model = backbones.build(name, 3, stem="cifar", width=1 / 16)
    names = features.feature_names(model, "block")
    assert len(names) == 4 and names[-1] == last
    shapes = features.feature_shapes(model, names, (3, 16, 16))
    assert [shape[1:] for shape in shapes.values()] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert model.training
    with pytest.raises(AFDSError, match="'conv'"):
        features.feature_names(model, "conv")


def test_the_teacher_is_a_frozen_copy_in_eval_mode():
    model = tiny.gated().train()
    teacher = features.Teacher(model, ["layer2.0"])
    before = copy.deepcopy(teacher.model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert model.training and all(p.requires_grad for p in model.parameters())
    logits, taken = teacher(images())
    assert not logits.requires_grad and not taken["layer2.0"].requires_grad
    assert not any(module.training for module in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    # Neither a pass nor the model's changes moved anything, running statistics included.
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())
    one, _ = teacher(images(2)[:1])
    torch.testing.assert_close(one, logits[:1], rtol=1e-4, atol=1e-5)  # no batch statistics: a sample is seen alone
    assert not isinstance(teacher, nn.Module)  # `.train()` of an objective cannot reach it


def test_a_block_whose_output_is_changed_in_place_is_no_feature():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(inplace=True)).eval()
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(AFDSError, match="'0' is changed in place"), features.taps(model, ["0"]):
        model(x)
    with features.taps(model, ["0"]) as taken, torch.no_grad():
        model(x)
    assert torch.equal(taken["0"], model[0](x)) and float(taken["0"].min()) < 0
