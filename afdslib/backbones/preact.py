"""Pre-activation residual networks: wide ResNets for 32 px images, and the ResNets of the attention-transfer files.

A block's output is the plain sum of residual and shortcut; batch norm and ReLU open the next block. So the last block
of each group gives the group's output as attention transfer takes it [code], negative values included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from afdslib.backbones.resnet import scaled
from afdslib.base.errors import AFDSError

__all__ = ["PREACT_LAYOUTS", "PreActBlock", "PreActResNet", "preact_resnet", "wide_resnet"]

PREACT_LAYOUTS = {"resnet18_preact": (2, 2, 2, 2), "resnet34_preact": (3, 4, 6, 3)}


class PreActBlock(nn.Module):
    """bn1, ReLU, conv1 3x3, bn2, ReLU, conv2 3x3, plus the shortcut: (B, C, H, W) -> (B, C', ceil(H/s), ceil(W/s)).

    He et al., "Identity Mappings in Deep Residual Networks", arXiv 1603.05027. Where the width or the resolution
    changes, the shortcut is a 1x1 convolution of the activated input, else the raw input. [code] `opens=False` leaves
    out bn1 and its ReLU: the input is activated already (the block after an ImageNet stem).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, opens: bool = True) -> None:
        super().__init__()
        self.opens = opens
        self.bn1 = nn.BatchNorm2d(inputs) if opens else nn.Identity()
        self.relu1 = nn.ReLU(inplace=True) if opens else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return out + (x if self.downsample is None else self.downsample(activated))


class PreActResNet(nn.Module):
    """A stem, groups of pre-activation blocks, batch norm, ReLU, mean and classifier: (B, 3, H, W) -> (B, num_classes).

    Args:
        stem: Its channels.
        planes: Channels of the groups `layer1` and so on; all but the first halve the map.
        blocks: Blocks in each group.
        num_classes: Outputs of the classifier.
        photographs: The stem is 7x7 stride 2 with norm, ReLU and max pool (input / 4), not 3x3.
    """

    def __init__(self, stem: int, planes: Sequence[int], blocks: Sequence[int], num_classes: int, *, photographs: bool):
        super().__init__()
        kernel, stride = (7, 2) if photographs else (3, 1)
        self.conv1 = nn.Conv2d(3, stem, kernel, stride, padding=kernel // 2, bias=False)
        self.relu = nn.ReLU()
        if photographs:
            self.bn1, self.maxpool = nn.BatchNorm2d(stem), nn.MaxPool2d(3, stride=2, padding=1)
        self._photographs, self._groups = photographs, [f"layer{i + 1}" for i in range(len(planes))]
        for name, inputs, outputs, count in zip(self._groups, (stem, *planes), planes, blocks, strict=False):
            first = name == "layer1"
            block = PreActBlock(inputs, outputs, 1 if first else 2, opens=not (first and photographs))
            self.add_module(name, nn.Sequential(block, *(PreActBlock(outputs, outputs) for _ in range(1, count))))
        self.bn = nn.BatchNorm2d(planes[-1])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self._photographs:
            x = self.maxpool(self.relu(self.bn1(x)))
        for name in self._groups:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


def wide_resnet(name: str, num_classes: int) -> PreActResNet:
    """The network called "wrn-d-k": d = 6n + 4 with n blocks in each of three groups of 16k, 32k and 64k channels.

    Zagoruyko, Komodakis, "Wide Residual Networks", arXiv 1605.07146; the initialisation (convolutions and classifier
    normal with deviation 2 / sqrt(fan in), batch norm scales uniform on 0 to 1) is the attention-transfer code's.
    [code]

    Raises:
        AFDSError: d is not 6n + 4, or k is 0.
    """
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if match is None or int(match[1]) < 10 or (int(match[1]) - 4) % 6 or int(match[2]) < 1:
        raise AFDSError(f"{name!r} is no wide ResNet; write wrn-d-k with d = 6n + 4 (10, 16, 22, 28, 40) and k from 1.")
    planes, blocks = [factor * int(match[2]) for factor in (16, 32, 64)], (int(match[1]) - 4) // 6
    model = PreActResNet(16, planes, [blocks] * 3, num_classes, photographs=False)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=2 / math.sqrt(module.weight[0].numel()))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    nn.init.zeros_(model.fc.bias)
    return model


def preact_resnet(name: str, num_classes: int, *, width: float = 1.0) -> PreActResNet:
    """ResNet-18 or -34 of fb.resnet.torch's pre-activation kind, the network of the file resnet-18-at-export. [code]"""
    stem, *planes = (scaled(p, width) for p in (64, 64, 128, 256, 512))
    model = PreActResNet(stem, planes, PREACT_LAYOUTS[name], num_classes, photographs=True)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
