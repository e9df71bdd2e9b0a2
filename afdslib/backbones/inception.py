"""Inception-BN, the student of neuron selectivity transfer.

Ioffe, Szegedy, "Batch Normalization", arXiv 1502.03167, with the channels of the public NST code. Every convolution is
followed by batch norm (eps 2e-5) and ReLU. The biases that the code's convolutions carry are left out: the batch norm
behind them cancels them. The network opens with a batch norm on its raw input, whose scale stays 1 (`fix_gamma`), so
that it needs no mean and deviation of the data. [code]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afdslib.backbones.resnet import scaled

__all__ = ["ConvBN", "Inception", "InceptionBN"]

EPS = 2e-5

# name: (1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, pool, projection); the two without 1x1 have stride 2.
BLOCKS: dict[str, tuple[int, int, int, int, int, str, int]] = {
    "in3a": (64, 64, 64, 64, 96, "avg", 32),  # at 224 px: 256 channels of 27x27
    "in3b": (64, 64, 96, 64, 96, "avg", 64),  # 320
    "in3c": (0, 128, 160, 64, 96, "max", 0),  # 576 of 14x14
    "in4a": (224, 64, 96, 96, 128, "avg", 128),
    "in4b": (192, 96, 128, 96, 128, "avg", 128),
    "in4c": (160, 128, 160, 128, 160, "avg", 128),  # 608
    "in4d": (96, 128, 192, 160, 192, "avg", 128),
    "in4e": (0, 128, 192, 192, 256, "max", 0),  # 1056 of 7x7
    "in5a": (352, 192, 320, 160, 224, "avg", 128),  # 1024
    "in5b": (352, 192, 320, 192, 224, "max", 128),
}


class ConvBN(nn.Sequential):
    """`conv`, `bn` and, if asked for, `relu`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=EPS)
        if relu:
            self.relu = nn.ReLU(inplace=True)


class Inception(nn.Module):
    """Four branches, or three that halve the map, concatenated: (B, inputs, H, W) -> (B, outputs, H', W').

    The ReLUs that end the branches are one ReLU on their concatenation, the same function (the max pool's input is not
    negative), so that `before_relu` is a named place to tap: the batch norms' outputs, side by side.
    """

    def __init__(self, inputs: int, spec: tuple[int, int, int, int, int, str, int], width: float) -> None:
        super().__init__()
        *counts, pool, last = spec
        one, reduce3, three, reduce_double, double, projection = (
            scaled(int(n), width) if n else 0 for n in (*counts, last)
        )
        stride = 1 if one else 2
        self.branch_1x1 = ConvBN(inputs, one, 1, relu=False) if one else None
        self.branch_3x3 = nn.Sequential(ConvBN(inputs, reduce3, 1), ConvBN(reduce3, three, 3, stride, relu=False))
        self.branch_double = nn.Sequential(
            ConvBN(inputs, reduce_double, 1),
            ConvBN(reduce_double, double, 3),
            ConvBN(double, double, 3, stride, relu=False),
        )
        # torch's average counts the padding, as the code's does.
        pooling = nn.AvgPool2d(3, stride, padding=1) if pool == "avg" else nn.MaxPool2d(3, stride, padding=1)
        self.branch_pool = nn.Sequential(pooling, ConvBN(inputs, projection, 1, relu=False)) if projection else pooling
        self.before_relu = nn.Identity()
        self.relu = nn.ReLU()  # not in place: `before_relu` may be tapped
        self.outputs = one + three + double + (projection or inputs)

    def forward(self, x: Tensor) -> Tensor:
        branches = [] if self.branch_1x1 is None else [self.branch_1x1(x)]
        branches += [self.branch_3x3(x), self.branch_double(x), self.branch_pool(x)]
        return self.relu(self.before_relu(torch.cat(branches, 1)))


class InceptionBN(nn.Module):
    """Inception-BN: (B, 3, H, W), raw or normalised -> (B, num_classes).

    Taps: `in3a` to `in5b` (after the ReLU) and `in5b.before_relu`, where the code takes the student's feature.

    Args:
        num_classes: Outputs of the classifier.
        stem: "imagenet"; "cifar" has a 3x3 stride-1 `conv1` and no `pool1`, so that 32 px end at 4x4.
        width: Factor on every channel count.
    """

    def __init__(self, num_classes: int, *, stem: str = "imagenet", width: float = 1.0) -> None:
        super().__init__()
        self.bn_data = nn.BatchNorm2d(3, eps=EPS)
        self.bn_data.weight.requires_grad_(False)
        first, second = scaled(64, width), scaled(192, width)
        self.conv1 = ConvBN(3, first, 3) if stem == "cifar" else ConvBN(3, first, 7, 2)
        self.pool1 = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2)
        self.conv2 = nn.Sequential(ConvBN(first, first, 1), ConvBN(first, second, 3))
        self.pool2 = nn.MaxPool2d(3, 2)
        channels = second
        for name, spec in BLOCKS.items():
            block = Inception(channels, spec, width)
            self.add_module(name, block)
            channels = block.outputs
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # Xavier, factor_type "in", magnitude 2 [code]
                nn.init.kaiming_normal_(module.weight, mode="fan_in")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.conv1(self.bn_data(x)))
        x = self.pool2(self.conv2(x))
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))
