"""Residual networks with torchvision's module names, at any width, with a stem for photographs or for 32 px images."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import resnet as tv

__all__ = ["LAYOUTS", "BasicBlock", "Bottleneck", "ResNet", "resnet", "scaled"]


class BasicBlock(tv.BasicBlock):
    """torchvision's block, except that the residual add is not in place.

    torchvision adds the shortcut into the output of the last batch norm, so a hook on that layer would hold the
    block's output instead of its own.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(tv.Bottleneck):
    """torchvision's block, except that the residual add is not in place; see `BasicBlock`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


Block = type[BasicBlock | Bottleneck]

# Block and blocks per stage. 18 to 152: He et al. 2016, table 1. 14 and 26 are the bottleneck networks of the same
# pattern (1 or 2 blocks per stage), small enough for a CPU. [ours]
LAYOUTS: dict[str, tuple[Block, tuple[int, int, int, int]]] = {
    "resnet14": (Bottleneck, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet26": (Bottleneck, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def scaled(channels: int, width: float) -> int:
    """A channel count times the width, rounded, at least 1."""
    return max(1, round(channels * width))


class ResNet(tv.ResNet):
    """torchvision's ResNet (v1.5) whose every channel count is multiplied by `width`.

    The forward pass, the module names and, at width 1 with the photograph stem, the random initialisation are
    torchvision's, so its weight files load and its MACs metadata applies.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: Blocks in each of the four stages.
        num_classes: Outputs of the classifier.
        stem: "imagenet" is 7x7 stride 2 and a 3x3 max pool (input / 4); "cifar" is 3x3 stride 1 without a pool
            (`maxpool` is then `nn.Identity`, so that the module names stay).
        width: Factor on the stem, the planes of each stage and the classifier's input.

    Shape:
        input (B, 3, H, W), output (B, num_classes).
    """

    def __init__(
        self,
        block: Block,
        layers: tuple[int, int, int, int],
        num_classes: int = 1000,
        *,
        stem: str = "imagenet",
        width: float = 1.0,
    ) -> None:
        # torchvision's constructor fixes 64 to 512 planes, so it is replaced, not called.
        nn.Module.__init__(self)
        self._norm_layer = nn.BatchNorm2d
        self.dilation, self.groups, self.base_width = 1, 1, 64
        self.conv1, self.inplanes = self._stem(stem, width)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        planes = [scaled(p, width) for p in (64, 128, 256, 512)]
        self.layer1 = self._stage(block, planes[0], layers[0], stride=1)
        self.layer2 = self._stage(block, planes[1], layers[1], stride=2)
        self.layer3 = self._stage(block, planes[2], layers[2], stride=2)
        self.layer4 = self._stage(block, planes[3], layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[3] * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stem(self, stem: str, width: float) -> tuple[nn.Module, int]:
        """What stands for `conv1`, and its output channels."""
        channels = scaled(64, width)
        if stem == "cifar":
            return nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False), channels
        return nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False), channels

    def _shortcut(self, inputs: int, outputs: int, stride: int) -> nn.Conv2d:
        return tv.conv1x1(inputs, outputs, stride)

    def _stage(self, block: Block, planes: int, blocks: int, *, stride: int) -> nn.Module:
        out = planes * block.expansion
        downsample: nn.Module | None = None
        # By the pattern, not by comparing widths: rounding must not remove a shortcut that width 1 has.
        if stride != 1 or block.expansion != 1:
            downsample = nn.Sequential(self._shortcut(self.inplanes, out, stride), nn.BatchNorm2d(out))
        stage = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = out
        stage += [block(self.inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*stage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward_impl(x)


def resnet(name: str, num_classes: int, *, stem: str = "imagenet", width: float = 1.0) -> ResNet:
    """The ResNet of that name in `LAYOUTS`, with random weights from torch's global generator."""
    block, layers = LAYOUTS[name]
    return ResNet(block, layers, num_classes, stem=stem, width=width)
