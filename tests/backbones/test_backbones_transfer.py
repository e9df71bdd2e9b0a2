"""The networks of the attention-transfer and neuron-selectivity studies, against their published sizes."""

import torch
from torch import nn

from afdslib import backbones
from afdslib.backbones.inception import BLOCKS
from afdslib.base.hooks import kept


def _outputs(model, names, images):
    with torch.no_grad(), kept({n: model.get_submodule(n) for n in names}) as outputs:
        outputs["output"] = model(images)
    return outputs


def test_wide_resnets_have_the_published_number_of_parameters_and_resnet18_preact_opens_without_norm():
    for name, millions in (("wrn-16-1", 0.2), ("wrn-16-2", 0.7), ("wrn-40-1", 0.6), ("wrn-40-2", 2.2)):
        with torch.device("meta"):
            model = backbones.build(name, 10)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    with torch.device("meta"):
        model = backbones.build("resnet18_preact", 1000)
    assert isinstance(model.layer1[0].bn1, nn.Identity) and isinstance(model.layer1[1].bn1, nn.BatchNorm2d)
    assert model.layer1[0].downsample is None and model.layer2[0].downsample is not None


def test_wide_resnet_groups_are_pre_activation_sums_and_hooks_see_them_unchanged():
    torch.manual_seed(0)
    model = backbones.build("wrn-16-1", 10).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = _outputs(model, backbones.stages(model), images)
    shapes = [tuple(outputs[n].shape[1:]) for n in backbones.stages(model)]
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert all((outputs[n] < 0).any() for n in backbones.stages(model))  # no ReLU, and none in place behind the hook
    logits = model.fc(torch.relu(model.bn(outputs["layer3.1"])).mean((2, 3)))
    torch.testing.assert_close(logits, outputs["output"])


def test_wide_resnet_is_the_public_codes_function():
    """The functional form of the attention-transfer code's network, written out."""
    torch.manual_seed(0)
    model = backbones.build("wrn-10-2", 10).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def activation(x, norm):
        return torch.relu(nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))

    x = nn.functional.conv2d(images, model.conv1.weight, padding=1)
    for group, stride in ((model.layer1, 1), (model.layer2, 2), (model.layer3, 2)):
        block = group[0]
        first = activation(x, block.bn1)
        out = nn.functional.conv2d(first, block.conv1.weight, stride=stride, padding=1)
        out = nn.functional.conv2d(activation(out, block.bn2), block.conv2.weight, padding=1)
        x = out + nn.functional.conv2d(first, block.downsample.weight, stride=stride)
    x = nn.functional.avg_pool2d(activation(x, model.bn), 8).flatten(1)
    torch.testing.assert_close(model(images), nn.functional.linear(x, model.fc.weight, model.fc.bias))


def test_inception_bn_has_the_documented_channels_at_224():
    with torch.device("meta"):
        model = backbones.build("inception_bn", 1000).eval()
        outputs = _outputs(model, ["pool1", "conv2", "pool2", *BLOCKS], torch.empty(1, 3, 224, 224))
    shapes = {n: tuple(v.shape[1:]) for n, v in outputs.items()}
    assert shapes == {
        "pool1": (64, 55, 55), "conv2": (192, 55, 55), "pool2": (192, 27, 27), "in3a": (256, 27, 27),
        "in3b": (320, 27, 27), "in3c": (576, 14, 14), "in4a": (576, 14, 14), "in4b": (576, 14, 14),
        "in4c": (608, 14, 14), "in4d": (608, 14, 14), "in4e": (1056, 7, 7), "in5a": (1024, 7, 7),
        "in5b": (1024, 7, 7), "output": (1000,),
    }  # fmt: skip


def test_inception_bn_can_be_tapped_before_the_last_relu_and_needs_no_mean_and_deviation_of_the_data():
    torch.manual_seed(0)
    model = backbones.build("inception_bn", 4, stem="cifar", width=1 / 16).eval()
    outputs = _outputs(model, ["in5b.before_relu", "in5b"], torch.randn(2, 3, 32, 32))
    before = outputs["in5b.before_relu"]
    assert before.shape == (2, 64, 4, 4) and (before < 0).any() and torch.equal(before.relu(), outputs["in5b"])
    model.double().train()
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4]))
    raw = model(255 * images)
    torch.testing.assert_close(raw, model((255 * images - mean) / deviation), rtol=1e-4, atol=1e-5)
    assert not model.bn_data.weight.requires_grad and model.bn_data.bias.requires_grad


def test_the_modified_resnet50_has_a_deep_stem_and_3x3_shortcuts_where_it_halves():
    with torch.device("meta"):
        model = backbones.build("resnet50_senet", 1000)
        plain = backbones.build("resnet50", 1000)
        outputs = _outputs(model.eval(), ["conv1", *backbones.stages(model)], torch.empty(1, 3, 224, 224))
    shapes = [tuple(v.shape[1:]) for v in outputs.values()]
    assert shapes == [(128, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (1000,)]
    stem = [(m.kernel_size, m.stride) for m in model.conv1.modules() if isinstance(m, nn.Conv2d)]
    assert stem == [((3, 3), (2, 2)), ((3, 3), (1, 1)), ((3, 3), (1, 1))]
    shortcuts = [model.get_submodule(f"layer{i}.0.downsample.0").kernel_size for i in range(1, 5)]
    assert shortcuts == [(1, 1), (3, 3), (3, 3), (3, 3)]
    assert model.layer2[0].conv1.stride == (1, 1) and model.layer2[0].conv2.stride == (2, 2)
    same = [n for n in plain.state_dict() if "conv1." not in n and "downsample" not in n and not n.startswith("bn1.")]
    assert all(model.state_dict()[n].shape == plain.state_dict()[n].shape for n in same if not n.startswith("conv1"))
