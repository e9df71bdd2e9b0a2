"""A trained AFS network is tested with the gates of other images, or with constant ones: are they looking? [ours]"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from afdslib import afs, data, runs, training
from afdslib.afs.graph import eval_mode
from afdslib.afs.layer import Gates
from afdslib.backbones.inputs import input_of
from afdslib.base.checks import choice
from afdslib.experiments.afs import TransferRun
from afdslib.experiments.source import network_of

__all__ = ["REPLACEMENTS", "GatesRun", "others", "replaced"]

REPLACEMENTS = ("own", "mean", "shuffled", "class")
"""Each image's own gates; each gate's mean over the fitting images; those of another image; of one of its class."""
BATCH = 128


@contextmanager
def replaced(model: nn.Module, gates: Mapping[str, Gates]) -> Iterator[None]:
    """Inside the block the AFS layers take these gates, (B, C) or (1, C) each, whatever their inputs are."""
    with ExitStack() as stack:
        for name, layer in afs.layers(model).items():
            stack.enter_context(patch.object(layer, "_gates", lambda pooled, given=gates[name]: _as(given, pooled)))
        yield


def _as(gates: Gates, pooled: Tensor) -> Gates:
    return Gates(*(part.to(pooled).expand(pooled.shape[0], -1) for part in gates))


def others(labels: Tensor, *, same_class: bool) -> Tensor:
    """For each place of a batch another one, whose gates it takes: the next, or the next of its class if there is one.

    Args:
        labels: (B,).
        same_class: whether it must have the same label.
    """
    places = torch.arange(len(labels))
    if not same_class:
        return places.roll(-1)
    following = places.clone()
    for label in labels.unique():
        mine = places[labels == label]
        following[mine] = mine.roll(-1)
    return following


@runs.register
@dataclass(frozen=True)
class GatesRun:
    """The test accuracy of a point of AFS with its gates replaced. Nothing is trained.

    Attributes:
        point: the trained point.
        gates: of `REPLACEMENTS`.
        seed: of the order of the images, which decides whose gates an image gets.
    """

    point: TransferRun
    gates: str
    seed: int = 0

    def __post_init__(self) -> None:
        choice("gates", self.gates, REPLACEMENTS)

    def execute(self, run: runs.Run) -> dict[str, Any]:
        if reason := runs.get_or_run(self.point, store=run.store).metrics.get("diverged"):
            return {"diverged": reason}
        model = network_of(self.point, run).to(training.device())
        splits = self.point.data.load().normalised(input_of(model))
        constant = self._means(model, splits.statistics) if self.gates == "mean" else {}
        targets = torch.as_tensor(splits.test.targets)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(self.seed))
        if self.gates == "class":
            order = order[targets[order].argsort(stable=True)]
        ordered: Any = Subset(splits.test, order.tolist())
        correct = 0
        precision = self.point.optimisation.precision
        with eval_mode(model), torch.no_grad(), training.autocast(training.device(), precision):
            for images, labels in data.loader(ordered, BATCH):
                given = constant or self._given(model, images, labels)
                with replaced(model, given):
                    correct += int((model(images.to(training.device())).argmax(1).cpu() == labels).sum())
        return {"test_accuracy": correct / len(targets), "images": len(targets)}

    def _given(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Gates]:
        """The gates that the images of a batch get: their own, or in another order."""
        seen: dict[str, Gates] = {}
        with ExitStack() as stack:
            for name, layer in afs.layers(model).items():

                def record(pooled: Tensor, layer: Any = layer, name: str = name) -> Gates:
                    seen[name] = type(layer)._gates(layer, pooled)
                    return seen[name]

                stack.enter_context(patch.object(layer, "_gates", record))
            model(images.to(training.device()))
        if self.gates == "own":
            return seen
        taken = others(labels, same_class=self.gates == "class")
        return {name: Gates(*(part[taken] for part in gates)) for name, gates in seen.items()}

    def _means(self, model: nn.Module, fitting: data.ImageDataset) -> dict[str, Gates]:
        """Constant gates: every living channel is computed, at its mean over the fitting images."""
        images = training.first(fitting, self.point.statistics_images or len(fitting))
        statistics = afs.collect_statistics(model, data.loader(images, BATCH))
        layers = afs.layers(model)
        means = {name: statistics[name].q.to(layer.m)[None] for name, layer in layers.items()}
        return {name: Gates(means[name], means[name], layer.m[None]) for name, layer in layers.items()}
