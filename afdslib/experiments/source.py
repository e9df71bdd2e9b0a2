"""Networks trained on source data, which transfer runs start from.

SourceRun -> ExtendedSourceRun, for AFS's competitors
SourceRun -> AFSSourceRun, for AFS
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from afdslib import afs, runs, training
from afdslib.afs import macs
from afdslib.base.checks import choice
from afdslib.base.errors import DivergedError
from afdslib.data import ImageDataset, Splits
from afdslib.experiments.config import DataSource, Network
from afdslib.experiments.measure import cost, gate_summary, input_size, scores, training_macs, validation
from afdslib.runs import MODEL
from afdslib.training import Optimisation, distributed
from afdslib.training.objective import Objective

__all__ = ["AFSSourceRun", "ExtendedSourceRun", "SourceRun", "network_of"]

PUBLISHED_CLASSES = 1000  # ImageNet's


def network_of(config: Any, run: runs.Run) -> nn.Module:
    """The network that another run has trained, or trains now."""
    return afs.load(distributed.get_or_run(config, store=run.store, needs=(MODEL,)).artifact(MODEL))


def keep(run: runs.Run, model: nn.Module) -> None:
    """Writes the network of a run."""
    run.write_artifact(MODEL, lambda path: afs.save(model, path))


@runs.register
@dataclass(frozen=True)
class SourceRun:
    """Trains a plain network on the source data, or takes published weights (no step, no source data).

    Attributes:
        data: the source data set.
        network: the backbone.
        optimisation: of the training; 0 steps with published weights.
        weight_decay: of every parameter.
        seed: of initialisation, data order and augmentation.
    """

    data: DataSource
    network: Network
    optimisation: Optimisation
    weight_decay: float = 5e-4
    seed: int = 0

    @property
    def published(self) -> bool:
        """Whether finished weights are taken as they are, without a step and without a look at the data."""
        return self.network.weights is not None and self.optimisation.steps == 0

    def execute(self, run: runs.Run) -> dict[str, Any]:
        if self.published:
            # Another classifier than ImageNet's is left out; the target gets a new one anyway.
            model = self.network.build(PUBLISHED_CLASSES, self.seed)
            keep(run, model)
            return {"steps": 0, "parameters": sum(p.numel() for p in model.parameters())}
        splits = self.data.load()
        model = self.network.build(len(splits.classes), self.seed).to(training.device())
        metrics = _train(self, run, model, splits, "source")
        return metrics | {"parameters": sum(p.numel() for p in model.parameters())}


@runs.register
@dataclass(frozen=True)
class ExtendedSourceRun:
    """Goes on training a plain source network, as `AFSSourceRun` does with the converted one.

    Without it AFS would have seen more source images than its competitors.

    Attributes:
        source: the plain network.
        data: the source data set; not read if there are no steps.
        optimisation: of the additional steps; 0 steps is the unextended start, an ablation.
        weight_decay: of every parameter.
        seed: of data order and augmentation.
    """

    source: SourceRun
    data: DataSource
    optimisation: Optimisation
    weight_decay: float = 1e-4
    seed: int = 0

    def execute(self, run: runs.Run) -> dict[str, Any]:
        model = network_of(self.source, run)
        if self.optimisation.steps == 0:
            keep(run, model)
            return {"steps": 0, "training_macs": 0.0}
        splits = self.data.load()
        model.to(training.device())
        before = validation(model, splits, self.optimisation)
        metrics = _train(self, run, model, splits, "extended source")
        return metrics | {"source_validation_accuracy": before["validation_accuracy"]}


@runs.register
@dataclass(frozen=True)
class AFSSourceRun:
    """Converts the source network exactly and fine-tunes it on the source data at density 1, so the predictors learn.

    Attributes:
        source: the plain network.
        data: the source data set; not read if there are no steps.
        optimisation: of the fine-tuning; 0 steps to leave the stage out.
        gates: "all" or "blocks"; see `afs.convert`.
        weight_decay: of every parameter.
        seed: of data order and augmentation.
        predictors: "exact", the conversion; or "random", as in the seed's code, which loses the trained function: for
            the ablation only.
    """

    source: SourceRun
    data: DataSource
    optimisation: Optimisation
    gates: str = "all"
    weight_decay: float = 1e-4
    seed: int = 0
    predictors: str = runs.added("exact")

    def __post_init__(self) -> None:
        choice("predictors", self.predictors, ("exact", "random"))

    def execute(self, run: runs.Run) -> dict[str, Any]:
        try:
            return self._train(run)
        except DivergedError as error:
            if self.predictors == "exact":
                raise
            # Of the ablation this is the result: gates that start at random may not survive the source stage.
            return {"diverged": f"in the source stage, {error}", "steps": 0}

    def _train(self, run: runs.Run) -> dict[str, Any]:
        model = afs.convert(network_of(self.source, run), gates=self.gates)
        if self.predictors == "random":
            torch.manual_seed(self.seed)
            for layer in afs.layers(model).values():
                layer.predictor.reset_parameters()
        if self.optimisation.steps == 0:
            keep(run, model)
            return {"steps": 0, "gates": len(afs.layers(model))}
        splits, settings = self.data.load(), self.optimisation
        model.to(training.device())
        images = training.first(splits.statistics, 512)
        before, gates_before = validation(model, splits, settings), gate_summary(model, images, settings)
        metrics = _train(self, run, model, splits, "AFS source", monitor=splits.statistics)
        return metrics | {
            "gates": len(gates_before),
            "converted_validation_accuracy": before["validation_accuracy"],
            "gates_before": gates_before,
            "gates_after": gate_summary(model, images, settings),
        }


def _train(
    config: SourceRun | ExtendedSourceRun | AFSSourceRun, run: runs.Run, model: nn.Module, splits: Splits, label: str,
    monitor: ImageDataset | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains on all source images and keeps the network; `monitor` are the images by which gates are watched."""
    settings, size = config.optimisation, input_size(splits)
    objective = Objective(model, weight_decay=config.weight_decay, label_smoothing=settings.label_smoothing)

    def validate() -> dict[str, float]:
        return validation(model, splits, settings)

    training.fit(
        model, splits.train, objective, settings, run, seed=config.seed, monitor=monitor, evaluation=validate,
        label=label,
    )  # fmt: skip
    keep(run, model)
    gated = monitor is not None
    test = training.evaluate(model, splits.test, precision=settings.precision, count_macs=gated)
    measured = cost(test) if gated else macs.count(model, size)
    return {
        "steps": settings.steps,
        "images": len(splits.train),
        "macs": measured.total,
        "training_macs": training_macs(model, size, settings),
        **({"macs_predictors": measured.predictors} if gated else {}),
        **validate(),
        **scores("test", test),
    }
