"""The two kinds of data set: images decoded into one array, and image files opened when asked for.

Augmentation is a function of (seed, epoch, index) alone: each epoch has one table of uniforms, so neither the number of
workers nor the order of visits nor a resume changes an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from afdslib.backbones.inputs import IMAGENET, InputStatistics
from afdslib.base.checks import whole
from afdslib.data.images import MEAN, STD, centre_box, read_rgb, resize_shorter, resized_to

__all__ = ["ArrayImages", "FileImages", "Files", "ImageDataset", "collate", "generator", "loader", "shorter_side"]

_PAD = 4
_SCALE = torch.tensor([1.0 / (255.0 * s) for s in STD]).view(1, 3, 1, 1)
_SHIFT = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(1, 3, 1, 1)


def generator(*key: int) -> np.random.RandomState:
    """A random generator for an integer key. NumPy guarantees RandomState's stream across versions."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([int(k) for k in key])))


def _normalise(images: np.ndarray, statistics: InputStatistics = IMAGENET) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), normalised."""
    values = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(torch.float32)
    if statistics == IMAGENET:
        return values.mul_(_SCALE).add_(_SHIFT)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (statistics.mean, statistics.deviation))
    return values.sub_(mean).div_(deviation)


def _grey(level: int, statistics: InputStatistics) -> Tensor:
    """A grey level, normalised: (1, 3, 1, 1)."""
    return _normalise(np.full((1, 1, 1, 3), level, dtype=np.uint8), statistics)


def _sharpened(images: Tensor, amounts: Tensor, statistics: InputStatistics = IMAGENET) -> Tensor:
    """x + a (x - blur(x)) within the range of colours, a 3x3 binomial blur; images (B, 3, H, W), amounts a (B,)."""
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(binomial, binomial).expand(3, 1, 3, 3)
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    detail = images - nn.functional.conv2d(padded, kernel, groups=3)
    sharp = torch.addcmul(images, amounts.view(-1, 1, 1, 1), detail)
    return torch.maximum(torch.minimum(sharp, _grey(255, statistics)), _grey(0, statistics))


class ImageDataset(Dataset):
    """Images with integer labels: `targets` is int64 (N,), `classes` their names, `size` the side in pixels.

    `augment` says whether crop and flip are random, `flip` whether augmentation may mirror an image;
    `input` is what they are normalised by.
    """

    input: InputStatistics = IMAGENET

    def __init__(
        self, targets: np.ndarray, classes: Sequence[str], *, size: int, augment: bool, flip: bool = True, seed: int = 0
    ) -> None:
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = tuple(classes)
        self.size, self.augment, self.flip, self.seed = size, augment, flip, seed
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images, {len(self.classes)} classes, {self.size} px)"

    def set_epoch(self, epoch: int) -> None:
        """Draw the epoch's augmentation, before its loader is iterated: worker processes copy it when they start."""
        self.epoch = int(epoch)  # and uniforms (N, 3) for the crop's row, its column and the flip
        self._uniforms = generator(self.seed, self.epoch, 0xA06).random_sample((len(self), 3)) if self.augment else None

    def _check(self, indices: Sequence[int] | Tensor | np.ndarray) -> np.ndarray:
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(index) and (index.max() >= len(self) or index.min() < -len(self)):
            raise IndexError(f"index out of range for a data set of {len(self)} images")
        return index % max(len(self), 1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, targets = self.__getitems__([int(index)])
        return images[0], int(targets[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A collated batch: images float32 (B, 3, size, size), normalised; targets int64 (B,)."""
        raise NotImplementedError

    def raw(self, index: int) -> np.ndarray:
        """One image for display: uint8 (size, size, 3), resized, centre-cropped, not augmented or normalised."""
        raise NotImplementedError

    def file(self, index: int) -> str:
        """The path of an image below the data set's folder; "" where the images were decoded into one array."""
        return ""


class ArrayImages(ImageDataset):
    """Images decoded into one uint8 array (memory-mapped or not).

    Training: pad by 4 pixels, crop at random, mirror with probability 1/2. Otherwise the image as it is.

    Args:
        images: uint8 (M, size, size, 3), shared by the splits
        rows: int64 (N,): which of the M images are in this split
        border: grey level 0..255 of the padding; None for zeros AFTER the normalisation, so ImageNet's mean colour
        reflect: whether the padding mirrors the image instead, without repeating its edge
        sharpness: a training image x becomes x + a (x - blur(x)), a uniform in [0, sharpness], so that a network does
            not depend on the filter that scaled its training images down [ours]
    """

    def __init__(
        self, images: np.ndarray, rows: np.ndarray, targets: np.ndarray, classes: Sequence[str], *, augment: bool,
        flip: bool = True, seed: int = 0, border: int | None = None, reflect: bool = False, sharpness: float = 0.0,
    ) -> None:  # fmt: skip
        self.border, self.reflect, self.sharpness = border, reflect, sharpness
        self._images = images
        self._rows = np.asarray(rows, dtype=np.int64)
        super().__init__(targets, classes, size=images.shape[1], augment=augment, flip=flip, seed=seed)

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if isinstance(self._images, np.memmap):  # a spawned worker opens the file again instead of receiving its bytes
            state["_images"] = Path(str(self._images.filename))
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if isinstance(self._images, Path):
            self._images = np.load(self._images, mmap_mode="r")

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = self._check(indices)
        images = _normalise(self._images[self._rows[index]], self.input)
        if self._uniforms is not None:
            if self.sharpness:
                images = _sharpened(images, self._amounts[index], self.input)
            images = self._augmented(images, self._uniforms[index])
        return images, torch.from_numpy(self.targets[index])

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.augment and self.sharpness:
            amounts = generator(self.seed, self.epoch, 0x5A4).random_sample(len(self))
            self._amounts = torch.from_numpy(amounts * self.sharpness).float()

    def _augmented(self, images: Tensor, uniforms: np.ndarray) -> Tensor:
        side = self.size + 2 * _PAD
        padded = np.zeros((len(images), 3, side, side), dtype=np.float32)
        if self.border is not None:
            padded += _grey(self.border, self.input).numpy()
        padded[:, :, _PAD:-_PAD, _PAD:-_PAD] = images
        if self.reflect:
            padded = np.pad(images.numpy(), ((0, 0), (0, 0), (_PAD, _PAD), (_PAD, _PAD)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (self.size, self.size), axis=(2, 3))
        corner = (uniforms[:, :2] * (2 * _PAD + 1)).astype(np.int64)
        out = windows[np.arange(len(padded)), :, corner[:, 0], corner[:, 1]]
        if self.flip:
            mirrored = uniforms[:, 2] < 0.5
            out[mirrored] = out[mirrored, :, :, ::-1]
        return torch.from_numpy(out)

    def raw(self, index: int) -> np.ndarray:
        return np.array(self._images[self._rows[self._check([index])[0]]])


@dataclass(frozen=True)
class Files:
    """The images of a data set: files below a folder or, where it is given, one uint8 array (M, H, W, 3).

    `copies` are scaled copies of some, by row, which are read instead.
    """

    folder: Path
    relative: Sequence[str]
    array: np.ndarray | None = None
    copies: Mapping[int, Path] = field(default_factory=dict)

    def read(self, row: int) -> Image.Image:
        """One image as RGB."""
        if self.array is not None:
            return Image.fromarray(self.array[row])
        return read_rgb(self.copies.get(row) or self.folder / self.relative[row])


def shorter_side(size: int) -> int:
    """Pixels of an image's shorter side before a square of `size` is cut, as torchvision's 256 for 224."""
    return round(size * 256 / 224)


class FileImages(ImageDataset):
    """Images opened when asked for, for sizes above 64 px; worker processes do the decoding.

    Training: shorter side to size*256/224, random crop, mirror with probability 1/2. Otherwise the centre crop. `rows`
    (int64, N) are the images of `source` that are in this split.
    """

    def __init__(
        self, source: Files, rows: np.ndarray, targets: np.ndarray, classes: Sequence[str], *, size: int,
        augment: bool, flip: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self._source = source
        self._rows = np.asarray(rows, dtype=np.int64)
        self.shorter = shorter_side(size)
        super().__init__(targets, classes, size=size, augment=augment, flip=flip, seed=seed)

    def _crop(self, index: int) -> np.ndarray:
        image = resize_shorter(self._source.read(int(self._rows[index])), self.shorter)
        left, top = centre_box(*image.size, self.size)
        mirrored = False
        if self._uniforms is not None:
            u = self._uniforms[index]
            top, left = int(u[0] * (image.height - self.size + 1)), int(u[1] * (image.width - self.size + 1))
            mirrored = self.flip and u[2] < 0.5
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return pixels[:, ::-1] if mirrored else pixels

    def file(self, index: int) -> str:
        return self._source.relative[int(self._rows[index])]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = self._check(indices)
        pixels = np.stack([self._crop(i) for i in index])
        return _normalise(pixels, self.input), torch.from_numpy(self.targets[index])

    def raw(self, index: int) -> np.ndarray:
        row = int(self._rows[self._check([index])[0]])
        return resized_to(self._source.read(row), self.size, shorter=self.shorter)


def collate(batch):
    """Batches from `__getitems__` are collated already; a list of (image, target) pairs is stacked."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


def loader(ds: ImageDataset, batch_size: int, *, workers: int = 0, drop_last: bool = False) -> DataLoader:
    """Batches in order, for statistics and evaluation."""
    whole("batch_size", batch_size, 1)
    whole("workers", workers, 0)
    return DataLoader(ds, batch_size, num_workers=workers, drop_last=drop_last, collate_fn=collate)
