"""A study small enough for a test: coloured 16 px images, a network of 50,000 parameters, a handful of steps."""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from afdslib import afs, backbones, data, runs, training
from afdslib.experiments import AFSSourceRun, DataSource, Network, SourceRun, TransferRun
from afdslib.training import Optimisation
from afdslib.training.objective import Objective, Regulariser

SIZE = 16
WIDTH = 1 / 16
CLASSES = ("red", "green", "blue")


def images(count: int, seed: int = 0, *, augment: bool = False, shift: int = 0) -> data.ArrayImages:
    """Noise with one brighter colour, by which the classes differ; `shift` makes another task of the same images."""
    random = np.random.RandomState(seed)
    targets = np.arange(count) % 3
    pixels = random.randint(0, 120, (count, SIZE, SIZE, 3))
    pixels[np.arange(count), :, :, targets] += 100
    labels = (targets + shift) % 3
    return data.ArrayImages(pixels.astype(np.uint8), np.arange(count), labels, CLASSES, augment=augment, seed=seed)


def tree(folder: Path, classes: tuple[str, ...] = CLASSES, *, train: int = 24, test: int = 8) -> Path:
    """An ImageFolder tree of the same kind of images."""
    random = np.random.RandomState(len(classes))
    for split, count in (("train", train), ("test", test)):
        for channel, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 120, (SIZE, SIZE, 3))
                pixels[:, :, channel] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


def splits(seed: int = 0, *, shift: int = 0, count: int = 24) -> data.Splits:
    """Disjoint draws; statistics are the fitting images without augmentation."""
    return data.Splits(
        train=images(count, seed, augment=True, shift=shift),
        validation=images(12, seed + 1, shift=shift),
        test=images(24, seed + 2, shift=shift),
        statistics=images(count, seed, shift=shift),
        classes=CLASSES,
        name="tiny",
    )


def network(seed: int = 0, classes: int = 3, stem: str = "imagenet") -> nn.Module:
    """A plain bottleneck network with random scales, some of them negative.

    With the stem for photographs its last stage is 1 x 1; take "cifar" for bf16, as oneDNN leaves the gradient of a
    3x3 convolution with stride 2 on a 1 x 1 map partly unwritten in bf16.
    """
    torch.manual_seed(seed)
    model = backbones.build("resnet14", classes, width=WIDTH, stem=stem)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.copy_(torch.rand_like(module.weight) + 0.3)
                module.weight[::3] *= -1
                module.bias.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def gated(seed: int = 0, stem: str = "imagenet") -> nn.Module:
    """A converted network whose gates depend on the input."""
    model = afs.convert(network(seed, stem=stem))
    for layer in afs.layers(model).values():
        # Small, because each gate multiplies by what it sees: through 17 layers larger ones overflow.
        nn.init.normal_(layer.predictor.weight, std=0.3 / layer.conv.in_channels**0.5)
    return model


def batches(count: int = 12, size: int = 5, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of unequal lengths, in order."""
    split = images(count, seed)
    return [split.__getitems__(list(range(i, min(i + size, count)))) for i in range(0, count, size)]


def settings(steps: int = 6, **kwargs) -> Optimisation:
    return Optimisation(**({"steps": steps, "batch_size": 8, "lr": 0.02, "log_rows": max(1, steps)} | kwargs))


def run(folder: Path) -> runs.Run:
    folder.mkdir(parents=True, exist_ok=True)
    return runs.Run("0" * 12, folder, folder.parent)


def fit(folder: Path, model: nn.Module, objective: Objective | None = None, **kwargs) -> nn.Module:
    """`training.fit` on 24 images."""
    objective = objective or Objective(model, weight_decay=kwargs.pop("weight_decay", 0.0))
    optimisation = kwargs.pop("settings", None) or settings()
    split = kwargs.pop("dataset", None) or images(24, augment=True)
    return training.fit(model, split, objective, optimisation, run(folder), seed=kwargs.pop("seed", 0), **kwargs)


# a study

SOURCE = SourceRun(DataSource("tiny-source"), Network("resnet14", width=WIDTH), settings(12, lr=0.05, log_rows=2))
AFS_SOURCE = AFSSourceRun(SOURCE, DataSource("tiny-source"), settings(6, log_rows=2))


def transfer(name: str = "afd", strength: float = 0.01, *, budgets=(1.0,), steps: int = 6, **kwargs) -> TransferRun:
    regulariser = Regulariser(name, strength, **{k: kwargs.pop(k) for k in ("features", "attention") if k in kwargs})
    stage = settings(steps, log_rows=3)
    return TransferRun(AFS_SOURCE, DataSource("tiny-target"), regulariser, stage, stage, budgets, **kwargs)


@contextmanager
def served(target: data.Splits | None = None) -> Iterator[None]:
    """`data.load` gives tiny splits for "tiny-source" and "tiny-target"."""
    sets = {"tiny-source": splits(0), "tiny-target": target or splits(10, shift=1)}
    with mock.patch.object(data, "load", lambda name, *_, **__: sets[name]):
        yield


@functools.cache
def _trained() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    with served():
        runs.get_or_run(AFS_SOURCE, store=folder.name)
    return folder


def store(folder: Path) -> Path:
    """A run store that holds the source networks, trained once per session."""
    copied = folder / "runs"
    shutil.copytree(_trained().name, copied)
    return copied


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normally distributed numbers of a seed of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@contextmanager
def killed(step: int) -> Iterator[None]:
    """The stage inside the block is interrupted right after its checkpoint at a step."""
    saved = runs.Run.save_checkpoint

    def save(self, state):
        saved(self, state)
        if state["step"] == step:
            raise KeyboardInterrupt

    with mock.patch.object(runs.Run, "save_checkpoint", save), pytest.raises(KeyboardInterrupt):
        yield
