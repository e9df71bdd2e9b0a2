"""Faults of the losses, of the training loop and of the study around it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from afdslib import afs, data, training
from afdslib import experiments as stages
from afdslib.afs import macs
from afdslib.losses import afd
from afdslib.losses.afd import AFDLoss
from afdslib.training import features, loop
from afdslib.training import objective as objectives


def unsquared_norm() -> AbstractContextManager:
    """The distance of two feature maps is not squared."""

    def forward(self: AFDLoss, student: dict[str, Tensor], source: dict[str, Tensor]) -> dict[str, Tensor]:
        total = torch.zeros((), dtype=torch.float64)
        for name, rho in self.attention(source).items():
            channels, height, width = self.shapes[name]
            distance = (student[name] - source[name]).flatten(2).norm(dim=2)
            total = total + channels / (2 * height * width) * (rho * distance).sum(1).mean()
        return {"afd": total, "entropy": torch.zeros(())}

    return mock.patch.object(AFDLoss, "forward", forward)


def shared_bias() -> AbstractContextManager:
    """b2 is one scalar, which cancels in the softmax."""
    original = afd._Attention.__init__

    def init(self: afd._Attention, *shape: int) -> None:
        original(self, *shape)
        self.b2 = nn.Parameter(torch.zeros(1))

    return mock.patch.object(afd._Attention, "__init__", init)


@contextmanager
def hooks_are_left() -> Iterator[None]:
    """Hooks are never removed, and later passes write into the same features; the first entry of each layer is used."""
    kept: dict[str, list[Tensor]] = {}

    @contextmanager
    def taps(model: nn.Module, names) -> Iterator[dict[str, Tensor]]:
        found: dict[str, Tensor] = {}

        def record(name: str):
            def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
                kept.setdefault(name, []).append(output)
                found[name] = output

            return hook

        for name in names:
            model.get_submodule(name).register_forward_hook(record(name))
        yield found

    with mock.patch.object(features, "taps", taps), mock.patch.object(objectives, "taps", taps):
        yield


def no_seeds() -> AbstractContextManager:
    """The order of the images comes from the process's generator."""

    def batches(dataset, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        order = np.random.RandomState().permutation(len(dataset)).tolist()
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    return mock.patch.object(loop, "_batches", batches)


def _splits(change) -> AbstractContextManager:
    original = stages.DataSource.load
    return mock.patch.object(stages.DataSource, "load", lambda self: change(original(self)))


def statistics_of_the_test_set() -> AbstractContextManager:
    """Masks are fitted on test images."""
    return _splits(lambda splits: replace(splits, statistics=splits.test))


def chosen_on_the_test_set() -> AbstractContextManager:
    """There is no validation split: test images are used to choose."""
    return _splits(lambda splits: replace(splits, validation=splits.test))


def no_validation_split() -> AbstractContextManager:
    """There is nothing to choose by."""
    return _splits(lambda splits: replace(splits, validation=None))


def no_source_stage() -> AbstractContextManager:
    """The converted network goes to the target as it is; its predictors have seen no source image."""
    return mock.patch.object(training, "fit", lambda model, *_, **__: model)


@contextmanager
def no_pruning_loop() -> Iterator[None]:
    """Masks are never lowered, whatever the budget."""

    def update(model: nn.Module, statistics, *, loader, **_) -> afs.MaskReport:
        return afs.MaskReport(0.0, macs.expected(model, loader), 0, 0, 0)

    with mock.patch.object(afs, "update_masks", update), mock.patch.object(afs, "set_density", lambda *_: None):
        yield


@contextmanager
def each_budget_starts_from_the_source() -> Iterator[None]:
    """The network of the budget before is thrown away: its masks are set back."""
    original = afs.set_density

    def set_density(model: nn.Module, d: float) -> None:
        original(model, d)
        for layer in afs.layers(model).values():
            removed = layer.m == 0
            layer.m.fill_(1)
            layer.s.fill_(1)
            nn.init.uniform_(layer.predictor.bias, 0.5, 1)
            with torch.no_grad():  # no chance that the same channels are the least important ones again
                layer.predictor.bias[removed] += 1

    with mock.patch.object(afs, "set_density", set_density):
        yield


# What a notebook has to notice.


def lambda_is_zero() -> AbstractContextManager:
    """The feature terms are measured and logged, and do not act."""
    original = objectives.Objective.__init__

    def init(self: objectives.Objective, model, regulariser=None, *args, **kwargs) -> None:
        original(self, model, regulariser, *args, **kwargs)
        for term in self.terms:
            term.weight = 0.0

    return mock.patch.object(objectives.Objective, "__init__", init)


def target_labels_shuffled() -> AbstractContextManager:
    """The fitting images of every data set get each other's labels."""
    original = data.load

    def load(*args, **kwargs) -> data.Splits:
        splits = original(*args, **kwargs)
        order = np.random.RandomState(0).permutation(len(splits.train))
        splits.train.targets = splits.train.targets[order]
        return splits

    return mock.patch.object(data, "load", load)
