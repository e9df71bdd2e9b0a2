"""The modified ResNet-50 of the neuron-selectivity-transfer README: "following SENet Appendix B"."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet as tv

from afdslib.backbones.resnet import Bottleneck, ResNet, scaled

__all__ = ["SENetStyleResNet", "resnet50_senet"]


class SENetStyleResNet(ResNet):
    """A ResNet with three 3x3 convolutions as its stem and 3x3 convolutions in the shortcuts that halve the map.

    What is known of the network, whose symbol file is no longer public:

    - Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507, appendix B lists the changes that make SENet-154:
      the 7x7 convolution becomes three 3x3; the 1x1 stride-2 shortcuts become 3x3 stride-2; the first 1x1 convolution
      of each bottleneck is halved; dropout 0.2 before the classifier; label smoothing. [recall]
    - The stem's channels 64, 64, 128 are SENet-154's in public copies. [code]
    - The stride of a block is in its 3x3 convolution, as in torchvision. [recall]
    - Left out: squeeze-and-excitation (a ResNet is what the README names), the halved 1x1 (it belongs to the grouped
      ResNeXt) and dropout (no transfer recipe mentions it). [ours]

    `conv1` is the stem up to its last convolution, whose norm is `bn1`; all other names are torchvision's.
    """

    def _stem(self, stem: str, width: float) -> tuple[nn.Module, int]:
        first, last = scaled(64, width), scaled(128, width)
        layers: list[nn.Module] = []
        for inputs, stride in ((3, 2), (first, 1)):
            layers += [
                nn.Conv2d(inputs, first, kernel_size=3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(first),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers, nn.Conv2d(first, last, kernel_size=3, padding=1, bias=False)), last

    def _shortcut(self, inputs: int, outputs: int, stride: int) -> nn.Conv2d:
        return tv.conv1x1(inputs, outputs) if stride == 1 else tv.conv3x3(inputs, outputs, stride)


def resnet50_senet(num_classes: int, *, width: float = 1.0) -> SENetStyleResNet:
    """The modified ResNet-50, with random weights; its recipe's mean is (123.68, 116.28, 103.53), its deviation
    (58.395, 57.12, 57.375), of RGB values from 0 to 255. [code]"""
    return SENetStyleResNet(Bottleneck, (3, 4, 6, 3), num_classes, width=width)
