"""Networks trained on photographs, by one process or several, alone or as students of trained networks.

Published | PhotoRun (the teacher) -> PhotoRun (a student with that teacher)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from afdslib import afs, backbones, data, runs, training
from afdslib.afs.io import weight_file
from afdslib.backbones.inputs import IMAGENET, InputStatistics, expect, input_of, input_statistics, set_input
from afdslib.base.errors import AFDSError, DivergedError
from afdslib.data import Splits
from afdslib.data.fetch import digest
from afdslib.data.images import SMALL
from afdslib.data.photographs import photographs
from afdslib.experiments.config import Network
from afdslib.experiments.source import keep, network_of
from afdslib.experiments.student import Distillation, check_teacher, train_student
from afdslib.training import Optimisation, distributed

__all__ = ["PhotoRun", "Photographs", "Published", "classes_of"]


@dataclass(frozen=True)
class Photographs:
    """A data set of photographs and how its images are varied. All its training images are fitted.

    Attributes:
        name: a data set by name, or the path of an ImageFolder tree.
        size: side of the crops, pixels.
        augmentation: "inception", "resnext" or "gentle"; see `data.photographs`.
        root: the folder it lies in.
        skip_corrupt: see `data.load`.
    """

    name: str = "imagenet"
    size: int = 224
    augmentation: str = "inception"
    root: str = runs.unhashed("")
    skip_corrupt: bool = runs.unhashed(False)

    def load(self, statistics: InputStatistics = IMAGENET, *, seed: int = 0, download: bool = True) -> Splits:
        """The splits, their images normalised by `statistics`."""
        # Above SMALL the images stay files; the crops may be smaller.
        splits = data.load(
            self.name, self.root or None, size=max(self.size, SMALL + 1), holdout=False, download=download,
            skip_corrupt=self.skip_corrupt,
        )  # fmt: skip
        return photographs(splits, self.size, self.augmentation, statistics, seed=seed)


@dataclass(frozen=True)
class Published:
    """A trained network that is not trained here.

    Attributes:
        network: name of the backbone, for torchvision's ImageNet weights; empty for a file.
        sha256: of the file, which is its identity.
        file: a file as `afs.load_network` reads it.
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


@runs.register
@dataclass(frozen=True)
class PhotoRun:
    """Trains a network on photographs, alone or as the student of a trained one, by one process or several.

    Attributes:
        data: the data set; its test part (ImageNet's validation images) is measured along the way, and nothing is
            chosen by it: the last network is the result.
        network: the backbone, with or without ImageNet weights.
        optimisation: of the training.
        method: what is minimised.
        teacher: the run whose network teaches, or published weights; None for a network trained alone.
        weight_decay: of every parameter.
        seed: of initialisation, data order and augmentation.
    """

    data: Photographs
    network: Network
    optimisation: Optimisation
    method: Distillation = field(default_factory=Distillation)
    teacher: PhotoRun | Published | None = None
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_teacher(self.method, self.teacher, self.optimisation.steps)

    def execute(self, run: runs.Run) -> dict[str, Any]:
        """Trains and measures; a run that diverges is a result with "diverged": why."""
        splits = self.data.load(input_statistics(self.network.name), seed=self.seed)
        teacher = self._teacher(run)
        try:
            return self._train(run, splits, teacher)
        except DivergedError as error:
            return {"diverged": str(error), "steps": 0}

    def _teacher(self, run: runs.Run) -> nn.Module | None:
        """The teacher, set to take the student's images."""
        if self.teacher is None:
            return None
        if isinstance(self.teacher, Published):
            model = self.teacher.build()
        else:
            model = network_of(self.teacher, run)
        return expect(model.eval(), input_statistics(self.network.name), input_of(model))

    def _train(self, run: runs.Run, splits: Splits, teacher: nn.Module | None) -> dict[str, Any]:
        known = len(splits.classes) if teacher is None else classes_of(teacher)
        if self.method.soft and known != len(splits.classes):
            raise AFDSError(
                f"the teacher knows {known} classes and {splits.name} has {len(splits.classes)}; give another teacher"
            )
        model = self.network.build(len(splits.classes), self.seed)
        set_input(model, input_statistics(self.network.name))

        def validate() -> dict[str, float]:
            found = training.evaluate(model, splits.test, precision=self.optimisation.precision)
            return {
                "test_accuracy": found.accuracy,
                "test_top5_accuracy": found.top5_accuracy,
                "test_loss": found.loss,
            }

        size = (3, self.data.size, self.data.size)
        metrics = train_student(self, run, model, splits, teacher, size, validate)
        keep(run, model.float())
        return metrics | {"processes": distributed.world()}


def classes_of(model: nn.Module) -> int:
    """How many classes a network tells apart."""
    return int(model.get_submodule(backbones.classifier_name(model)).out_features)  # type: ignore[arg-type]
