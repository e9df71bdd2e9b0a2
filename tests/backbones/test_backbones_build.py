import pytest
import torch
import torchvision
from torch import nn

from afdslib import backbones
from afdslib.base.errors import AFDSError
from afdslib.base.hooks import kept

TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg11_bn", "vgg16_bn", "mobilenet_v2"]


def _meta(name, **arguments):
    with torch.device("meta"):  # shapes without memory
        return backbones.build(name, 5, **arguments)


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, num_classes=5)
    ours = _meta(name)
    assert {n: v.shape for n, v in ours.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_width_one_is_torchvisions_network_down_to_its_initialisation(name):
    torch.manual_seed(3)
    ours = backbones.build(name, 4).eval()
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(name, num_classes=4).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("name", backbones.known_names())
def test_every_network_is_traced_by_fx_and_rebuilt_from_its_architecture(name):
    model = _meta(name)
    torch.fx.symbolic_trace(model)
    assert type(model.architecture) is dict and model.architecture["num_classes"] == 5
    with torch.device("meta"):
        again = backbones.build(**model.architecture)
    assert again.architecture == model.architecture
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}


def test_width_scales_every_channel_count():
    model = _meta("resnet50", width=3 / 16)
    assert model.conv1.out_channels == 12 and model.fc.in_features == 384
    full = _meta("resnet50")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels == full.get_submodule(name).out_channels * 3 // 16
    smallest = _meta("resnet18", width=0.001)
    assert {m.out_channels for m in smallest.modules() if isinstance(m, nn.Conv2d)} == {1}


def test_the_cifar_stem_keeps_the_resolution_and_the_names():
    model = backbones.build("resnet14", 5, stem="cifar", width=1 / 32).eval()
    assert isinstance(model.maxpool, nn.Identity)
    with kept({name: model.get_submodule(name) for name in ("conv1", *backbones.stages(model))}) as outputs:
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert [output.shape[-1] for output in outputs.values()] == [32, 32, 16, 8, 4]


@pytest.mark.parametrize("name, classifier, stages", [
    ("resnet14", "fc", [f"layer{i}.0" for i in range(1, 5)]), ("resnet26", "fc", [f"layer{i}.1" for i in range(1, 5)]),
    ("resnet50", "fc", ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]),
    ("wrn-16-2", "fc", ["layer1.1", "layer2.1", "layer3.1"]), ("inception_bn", "fc", ["in3b", "in4d", "in5b"]),
    ("vgg11_bn", "classifier.6", ["features.2", "features.6", "features.13", "features.20", "features.27"]),
    ("mobilenet_v2", "classifier.1", [f"features.{i}" for i in (1, 3, 6, 13, 18)]),
])  # fmt: skip
def test_classifier_and_stages_are_found_or_their_lack_is_one_sentence(name, classifier, stages):
    model = _meta(name)
    assert backbones.classifier_name(model) == classifier
    assert isinstance(model.get_submodule(classifier), nn.Linear)
    assert backbones.stages(model) == stages
    for find, words in ((backbones.classifier_name, "no linear layer"), (backbones.stages, "no stages")):
        with pytest.raises(AFDSError, match=words):
            find(nn.Sequential(nn.Linear(1, 1)))


def test_reset_classifier_is_seeded_and_keeps_the_rest():
    model = backbones.build("resnet14", 5, stem="cifar", width=1 / 16).double().eval()
    before = {n: v.clone() for n, v in model.state_dict().items() if not n.startswith("fc.")}
    weights = []
    for _ in range(2):
        backbones.reset_classifier(model, 7, torch.Generator().manual_seed(4))
        weights.append(model.fc.weight.clone())
    assert torch.equal(*weights) and weights[0].dtype == torch.float64
    assert model.architecture["num_classes"] == 7 and model(torch.zeros(2, 3, 16, 16).double()).shape == (2, 7)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items())
    torch.manual_seed(0)
    backbones.reset_classifier(model, 3)
    torch.manual_seed(0)
    torch.testing.assert_close(model.fc.weight.float(), nn.Linear(model.fc.in_features, 3).weight)


@pytest.mark.parametrize("name, arguments, words", [
    ("resnet19", {}, "'resnet19' is unknown; known are resnet14, resnet18"), ("resnet18", {"width": 0}, "width is 0"),
    ("resnet18", {"num_classes": 0}, "num_classes is 0"), ("resnet18", {"num_classes": 2.0}, "num_classes is 2.0"),
    ("resnet18", {"width": float("inf")}, "width is inf"), ("resnet18", {"stem": "mnist"}, "stem 'mnist' is unknown"),
    ("vgg11_bn", {"width": 0.5}, "vgg11_bn has one width"), ("vgg11_bn", {"stem": "cifar"}, "vgg11_bn has one stem"),
    ("wrn-16-1", {"width": 2}, "width of wrn-16-1 is in its name"), ("wrn-17-1", {}, "d = 6n + 4"),
    ("wrn-16-0", {}, "k from 1"), ("resnet14", {"weights": "imagenet"}, "no ImageNet weights for 'resnet14'"),
    ("resnet18", {"weights": "imagenet", "stem": "cifar"}, "stem='imagenet' and width=1 only"),
    ("resnet18", {"weights": "imagenet", "width": 0.5}, "width=0.5"),
    ("resnet18", {"weights": "nowhere.pt"}, "no weight file nowhere.pt"),
])  # fmt: skip
def test_bad_input_is_one_sentence(name, arguments, words):
    with pytest.raises(AFDSError) as caught:
        backbones.build(**(dict(name=name, num_classes=2) | arguments))
    assert words in str(caught.value) and "\n" not in str(caught.value)
