"""Residual networks with torchvision's module names, at any width, with a stem for photographs or for 32 px images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models import resnet as tv

__all__ = ["LAYOUTS", "BasicBlock", "Bottleneck", "ResNet", "SENetStyleResNet", "scaled"]


class BasicBlock(tv.BasicBlock):
    """torchvision's block, except that the residual add is not in place: a hook on bn2 sees the norm, not the block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(tv.Bottleneck):
    """torchvision's block, except that the residual add is not in place."""

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

    The forward pass, the module names and, at width 1 with the photograph stem, the initialisation are torchvision's.
    (B, 3, H, W) -> (B, num_classes).

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: Blocks in each of the four stages.
        num_classes: Outputs of the classifier.
        stem: "imagenet" is 7x7 stride 2 and a 3x3 max pool (input / 4); "cifar" is 3x3 stride 1 without a pool
            (`maxpool` is then `nn.Identity`, so that the module names stay).
        width: Factor on the stem, the planes of each stage and the classifier's input.
    """

    def __init__(
        self, block: Block, layers: Sequence[int], num_classes: int, *, stem: str = "imagenet", width: float = 1.0
    ) -> None:
        nn.Module.__init__(self)  # torchvision's constructor fixes 64 to 512 planes, so it is replaced, not called
        self.conv1, self.inplanes = self._stem(stem, width)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        planes = [scaled(p, width) for p in (64, 128, 256, 512)]
        for i in range(4):
            self.add_module(f"layer{i + 1}", self._stage(block, planes[i], layers[i], stride=1 if i == 0 else 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[3] * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stem(self, stem: str, width: float) -> tuple[nn.Module, int]:
        """What stands for `conv1`, and its output channels."""
        kernel, stride, channels = (3, 1, scaled(64, width)) if stem == "cifar" else (7, 2, scaled(64, width))
        return nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False), channels

    def _shortcut(self, inputs: int, outputs: int, stride: int) -> nn.Conv2d:
        return tv.conv1x1(inputs, outputs, stride)

    def _stage(self, block: Block, planes: int, blocks: int, *, stride: int) -> nn.Module:
        out = planes * block.expansion
        downsample: nn.Module | None = None
        # By the pattern, not by comparing widths: rounding must not remove a shortcut that width 1 has.
        if stride != 1 or block.expansion != 1:
            downsample = nn.Sequential(self._shortcut(self.inplanes, out, stride), nn.BatchNorm2d(out))
        first, self.inplanes = block(self.inplanes, planes, stride, downsample), out
        return nn.Sequential(first, *(block(out, planes) for _ in range(1, blocks)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward_impl(x)


class SENetStyleResNet(ResNet):
    """The ResNet-50 of the neuron-selectivity-transfer README, "following SENet Appendix B".

    Its symbol file is no longer public. Three 3x3 convolutions as the stem and 3x3 convolutions in the shortcuts that
    halve the map are changes that make SENet-154 (Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507,
    appendix B [recall]); the stem's channels 64, 64, 128 are SENet-154's in public copies [code]. Left out of that
    list: squeeze-and-excitation (a ResNet is what the README names), the halved first 1x1 of each bottleneck (it
    belongs to the grouped ResNeXt) and dropout (no transfer recipe mentions it). [ours]

    `conv1` is the stem up to its last convolution, whose norm is `bn1`; all other names are torchvision's.
    """

    def _stem(self, stem: str, width: float) -> tuple[nn.Module, int]:
        first, last = scaled(64, width), scaled(128, width)
        layers: list[nn.Module] = []
        for inputs, stride in ((3, 2), (first, 1)):
            layers += [tv.conv3x3(inputs, first, stride), nn.BatchNorm2d(first), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, tv.conv3x3(first, last)), last

    def _shortcut(self, inputs: int, outputs: int, stride: int) -> nn.Conv2d:
        return tv.conv1x1(inputs, outputs) if stride == 1 else tv.conv3x3(inputs, outputs, stride)
