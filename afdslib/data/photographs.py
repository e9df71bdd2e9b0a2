"""Photographs for training from scratch: random resized crops, colour jitter and lighting, and any input statistics.

What is random is a function of (seed, epoch, index) alone. The pixel operations are torchvision's, the draws are not:
its transforms draw from torch's global generator, which would tie an image to the number of workers.

Sources: the area and aspect ranges are Szegedy et al., "Going Deeper with Convolutions", arXiv 1409.4842; colour jitter
0.4 and lighting 0.1 are what the ResNeXt code adds to them [code: neuron selectivity transfer]. Lighting is Krizhevsky
et al., "ImageNet Classification with Deep Convolutional Neural Networks", section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.random import RandomState as Random
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from afdslib.backbones.inputs import IMAGENET, InputStatistics
from afdslib.base.errors import AFDSError
from afdslib.data.datasets import FileImages, Files, ImageDataset, generator
from afdslib.data.load import Splits

__all__ = ["AUGMENTATIONS", "Augmentation", "PhotoImages", "photographs"]

# Eigenvalues and eigenvectors (columns) of the RGB values of ImageNet's training images, from 0 to 1. [code: ResNeXt]
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
_CUBIC = InterpolationMode.BICUBIC
_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)


@dataclass(frozen=True)
class Augmentation:
    """How a training image is varied."""

    area: tuple[float, float] = (0.08, 1.0)  # smallest and largest share of the image's area that a crop takes
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of a crop, drawn evenly on a logarithmic scale
    flip: bool = True  # whether half of the crops are mirrored
    # Brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter, in random order; values are
    # clipped to 0..255, as torchvision does and the Torch code did not. [ours]
    jitter: float = 0.0
    lighting: float = 0.0  # deviation of the steps along the three principal components of ImageNet's colours


AUGMENTATIONS = {
    "inception": Augmentation(),  # the attention-transfer code's
    "resnext": Augmentation(jitter=0.4, lighting=0.1),  # the neuron-selectivity code's
    "gentle": Augmentation(area=(0.5, 1.0)),  # for fine-tuning on small sets [ours]
}


class PhotoImages(FileImages):
    """Image files as float32 (3, size, size), normalised by any input statistics.

    Training: a random resized crop (bicubic), mirrored, jittered, lit. Without `augmentation` the shorter side at
    size*256/224 (bicubic) and the centre crop. `rows` (int64, N) are the images of `source` that are in this split.
    """

    def __init__(
        self, source: Files, rows: np.ndarray, targets: np.ndarray, classes: Sequence[str], *, size: int,
        augmentation: Augmentation | None = None, statistics: InputStatistics = IMAGENET, seed: int = 0,
    ) -> None:  # fmt: skip
        self.augmentation = augmentation
        self._mean = torch.tensor(statistics.mean).view(3, 1, 1)
        self._deviation = torch.tensor(statistics.deviation).view(3, 1, 1)
        augment, flip = augmentation is not None, augmentation is not None and augmentation.flip
        super().__init__(source, rows, targets, classes, size=size, augment=augment, flip=flip, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch draws other crops."""
        self.epoch = int(epoch)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = self._check(indices)
        images = torch.stack([(self._pixels(i) - self._mean) / self._deviation for i in index.tolist()])
        return images, torch.from_numpy(self.targets[index])

    def _pixels(self, index: int) -> Tensor:
        """float32 (3, size, size), values 0..255 (lighting may leave that range)."""
        image = self._source.read(int(self._rows[index]))
        if self.augmentation is None:
            image = F.resize(image, [self.shorter], interpolation=_CUBIC)
            return F.pil_to_tensor(F.center_crop(image, [self.size, self.size])).float()
        random = generator(self.seed, self.epoch, 0xA07, index)
        box = random_box(image.width, image.height, self.augmentation, random)
        image = F.resized_crop(image, *box, size=[self.size, self.size], interpolation=_CUBIC)
        if self.flip and random.random_sample() < 0.5:
            image = F.horizontal_flip(image)
        if self.augmentation.jitter:
            factors = random.uniform(1 - self.augmentation.jitter, 1 + self.augmentation.jitter, 3)
            for i in random.permutation(3):
                image = _JITTER[i](image, float(factors[i]))
        pixels = F.pil_to_tensor(image).float()
        if self.augmentation.lighting:
            pixels += _light(self.augmentation.lighting, random)
        return pixels


def random_box(width: int, height: int, augmentation: Augmentation, random: Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop, pixels: ten tries, then the largest central one of an allowed aspect."""
    low, high = (math.log(a) for a in augmentation.aspect)
    for _ in range(10):
        area = width * height * random.uniform(*augmentation.area)
        ratio = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h + 1), random.randint(0, width - w + 1), h, w
    ratio = min(max(width / height, augmentation.aspect[0]), augmentation.aspect[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, max(1, h), max(1, w)


def _light(deviation: float, random: Random) -> Tensor:
    """(3, 1, 1): what is added to the channels, on the scale 0..255."""
    shift = 255 * _EIGENVECTORS @ (random.normal(0, deviation, 3) * _EIGENVALUES)
    return torch.tensor(shift, dtype=torch.float32).view(3, 1, 1)


def photographs(
    splits: Splits, size: int, augmentation: str, statistics: InputStatistics, *, seed: int | None = None
) -> Splits:
    """The same splits with these transforms.

    Args:
        splits: from `data.load` at a size above 64 px, where images stay files; decoded arrays are refused
        size: side of the crops, pixels
        augmentation: one of `AUGMENTATIONS`
        statistics: of the input; see `backbones.input_statistics`
        seed: of the augmentation; by default that of the splits
    """
    if augmentation not in AUGMENTATIONS:
        raise AFDSError(f"the augmentation {augmentation!r} is unknown; use one of {', '.join(AUGMENTATIONS)}")

    def again(split: ImageDataset, chosen: Augmentation | None) -> PhotoImages:
        if not isinstance(split, FileImages):
            raise AFDSError(f"the data set {splits.name!r} holds decoded arrays; load it at a size above 64 px")
        which = split._source, split._rows, split.targets, split.classes
        drawn = split.seed if seed is None else seed
        return PhotoImages(*which, size=size, augmentation=chosen, statistics=statistics, seed=drawn)

    return replace(
        splits, train=again(splits.train, AUGMENTATIONS[augmentation]), test=again(splits.test, None),
        validation=splits.validation and again(splits.validation, None), statistics=again(splits.statistics, None),
    )  # fmt: skip
