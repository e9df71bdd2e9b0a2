"""Parts of the runs' configurations: data sets, networks, budgets."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from afdslib import afs, backbones, data, runs
from afdslib.afs.io import weight_file
from afdslib.backbones.inputs import IMAGENET, InputStatistics
from afdslib.base.errors import AFDSError
from afdslib.data import Splits
from afdslib.data.fetch import digest
from afdslib.data.images import SMALL
from afdslib.data.photographs import photographs

__all__ = ["DataSource", "Network", "Photographs", "Published", "check_budgets"]


@dataclass(frozen=True)
class DataSource:
    """A data set, how it is split and augmented; see `data.load`. Where it lies and whether corrupt images may be left
    out is recorded, not hashed. `content` is a hash of a tree's images: a tree that was changed is another data set.
    """

    name: str
    per_class: int | None = None
    seed: int = 0
    size: int | None = None
    root: str = runs.unhashed("")
    padding: str = runs.added("constant")
    sharpness: float = runs.added(0.0)
    content: str = runs.added("")
    skip_corrupt: bool = runs.unhashed(False)
    holdout: bool = runs.added(True)

    @property
    def title(self) -> str:
        """Its name in tables and figures: cifar10-60 is CIFAR-10 with 60 fitting images per class."""
        name = Path(self.name).name
        return name if self.per_class is None else f"{name}-{self.per_class}"

    def load(self) -> Splits:
        return data.load(
            self.name, self.root or None, per_class=self.per_class, seed=self.seed, size=self.size,
            padding=self.padding, sharpness=self.sharpness, skip_corrupt=self.skip_corrupt, holdout=self.holdout,
        )  # fmt: skip


@dataclass(frozen=True)
class Photographs:
    """A data set of photographs and how its images are varied; all its training images are fitted.

    Attributes:
        name: a data set by name, or the path of an ImageFolder tree; it lies in `root`.
        size: side of the crops, pixels.
        augmentation: "inception", "resnext" or "gentle"; see `data.photographs`.
    """

    name: str = "imagenet"
    size: int = 224
    augmentation: str = "inception"
    root: str = runs.unhashed("")
    skip_corrupt: bool = runs.unhashed(False)

    def load(self, statistics: InputStatistics = IMAGENET, *, seed: int = 0, download: bool = True) -> Splits:
        """The splits, their images normalised by `statistics`."""
        size = max(self.size, SMALL + 1)  # above SMALL the images stay files; the crops may be smaller
        splits = data.load(
            self.name, self.root or None, size=size, holdout=False, download=download, skip_corrupt=self.skip_corrupt
        )
        return photographs(splits, self.size, self.augmentation, statistics, seed=seed)


@dataclass(frozen=True)
class Network:
    """A backbone; the fields are the arguments of `backbones.build`, and `zero_init`: whether the residual branches of
    a random ResNet start at zero, by the last batch norm of each block (torchvision's zero_init_residual; Goyal et al.
    2017). Without it, the gradient of a ResNet-101 at 64 px had a norm of 772 at the first step, and 120 steps taught
    it nothing. [ours]
    """

    name: str
    stem: str = "imagenet"
    width: float = 1.0
    weights: str | None = None
    zero_init: bool = runs.added(False)

    def build(self, num_classes: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = backbones.build(self.name, num_classes, weights=self.weights, stem=self.stem, width=self.width)
        if self.zero_init and self.weights is None:
            for block in model.modules():
                if isinstance(block, (Bottleneck, BasicBlock)):
                    nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)
        return model


@dataclass(frozen=True)
class Published:
    """A trained network that is not trained here: torchvision's ImageNet weights of the backbone `network`, or a
    `file` as `afs.load_network` reads it, whose identity is its `sha256`.
    """

    network: str = ""
    sha256: str = ""
    file: str = runs.unhashed("")

    @staticmethod
    def of(what: str) -> Published:
        """From a file's path, or the name of a backbone that torchvision has ImageNet weights of."""
        if what in backbones.known_names():
            return Published(what)
        file = weight_file(what)
        return Published(sha256=digest(file), file=str(file))

    def build(self) -> nn.Module:
        """The network, with `architecture`."""
        return afs.load_network(self.file or self.network)


def check_budgets(budgets: tuple[float, ...], *, pruned: bool = False) -> None:
    """Refuses budgets that do not decrease from 1 within (0, 1]; of pruned points alone, within (0, 1)."""
    numbers = bool(budgets) and all(isinstance(b, Real) and 0 < b <= 1 for b in budgets) and (budgets[0] == 1) != pruned
    if not numbers or any(x <= y for x, y in zip(budgets, budgets[1:], strict=False)):
        words = "and lie between 0 and 1" if pruned else "from 1 and stay above 0"
        raise AFDSError(f"budgets must decrease {words}, got {budgets!r}")
