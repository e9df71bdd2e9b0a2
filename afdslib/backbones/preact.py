"""Pre-activation residual networks: wide ResNets for 32 px images, and the ResNets of the attention-transfer files.

A block's output is the plain sum of residual and shortcut; batch norm and ReLU open the next block. So the last block
of each group gives the group's output as attention transfer takes it [code], negative values included.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from afdslib.backbones.resnet import scaled
from afdslib.base.errors import AFDSError

__all__ = ["PREACT_LAYOUTS", "PreActBlock", "PreActResNet", "WideResNet", "preact_resnet", "wide_resnet"]

PREACT_LAYOUTS: dict[str, tuple[int, int, int, int]] = {
    "resnet18_preact": (2, 2, 2, 2),
    "resnet34_preact": (3, 4, 6, 3),
}


class PreActBlock(nn.Module):
    """bn1, ReLU, conv1 3x3, bn2, ReLU, conv2 3x3, plus the shortcut.

    He et al., "Identity Mappings in Deep Residual Networks", arXiv 1603.05027. Where the width or the resolution
    changes, the shortcut is a 1x1 convolution of the activated input, else the raw input. [code]

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Of conv1 and the shortcut.
        opens: False leaves out bn1 and its ReLU: the input is activated already (the block after an ImageNet stem).

    Shape:
        (B, inputs, H, W) -> (B, outputs, ceil(H/stride), ceil(W/stride)).
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


def _group(inputs: int, outputs: int, blocks: int, stride: int, *, opens: bool = True) -> nn.Sequential:
    first = PreActBlock(inputs, outputs, stride, opens=opens)
    return nn.Sequential(first, *(PreActBlock(outputs, outputs) for _ in range(1, blocks)))


class WideResNet(nn.Module):
    """WRN-d-k for 32x32 images: a 3x3 stem of 16 channels and three groups of 16k, 32k and 64k.

    Zagoruyko, Komodakis, "Wide Residual Networks", arXiv 1605.07146; the initialisation (convolutions and classifier
    normal with deviation 2 / sqrt(fan in), batch norm scales uniform on 0 to 1) is the attention-transfer code's.
    [code]

    Args:
        depth: d = 6n + 4, n blocks per group.
        widen: k.
        num_classes: Outputs of the classifier.

    Shape:
        input (B, 3, H, W), output (B, num_classes); `layer1` to `layer3` give (B, 16k, H, W), (B, 32k, H/2, W/2) and
        (B, 64k, H/4, W/4).
    """

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _group(16, 16 * widen, blocks, 1)
        self.layer2 = _group(16 * widen, 32 * widen, blocks, 2)
        self.layer3 = _group(32 * widen, 64 * widen, blocks, 2)
        self.bn = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=2 / math.sqrt(module.weight[0].numel()))
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


class PreActResNet(nn.Module):
    """ResNet-18 or -34 of fb.resnet.torch's pre-activation kind, the network of the file resnet-18-at-export. [code]

    Args:
        blocks: Blocks in each of the four groups.
        num_classes: Outputs of the classifier.
        width: Factor on every channel count.

    Shape:
        input (B, 3, H, W), output (B, num_classes); `layer1` to `layer4` are the groups.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int, *, width: float = 1.0) -> None:
        super().__init__()
        stem, *planes = (scaled(p, width) for p in (64, 64, 128, 256, 512))
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _group(stem, planes[0], blocks[0], 1, opens=False)
        self.layer2 = _group(planes[0], planes[1], blocks[1], 2)
        self.layer3 = _group(planes[1], planes[2], blocks[2], 2)
        self.layer4 = _group(planes[2], planes[3], blocks[3], 2)
        self.bn = nn.BatchNorm2d(planes[3])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


def wide_resnet(name: str, num_classes: int) -> WideResNet:
    """The network called "wrn-d-k".

    Raises:
        AFDSError: d is not 6n + 4, or k is 0.
    """
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if match is None or int(match[1]) < 10 or (int(match[1]) - 4) % 6 or int(match[2]) < 1:
        raise AFDSError(f"{name!r} is no wide ResNet; write wrn-d-k with d = 6n + 4 (10, 16, 22, 28, 40) and k from 1.")
    return WideResNet(int(match[1]), int(match[2]), num_classes)


def preact_resnet(name: str, num_classes: int, *, width: float = 1.0) -> PreActResNet:
    """The network of that name in `PREACT_LAYOUTS`."""
    return PreActResNet(PREACT_LAYOUTS[name], num_classes, width=width)
