"""What transfer runs start from: networks trained on source data, and DELTA's weights of their channels.

SourceRun -> ExtendedSourceRun, for AFS's competitors
SourceRun -> AFSSourceRun, for AFS
either of the two -> ChannelWeightsRun, for DELTA
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from afdslib import afs, backbones, data, runs, training
from afdslib.afs import macs
from afdslib.backbones.inputs import input_of
from afdslib.base.checks import choice, whole
from afdslib.base.errors import DivergedError
from afdslib.data import ImageDataset, Splits
from afdslib.experiments.config import DataSource, Network
from afdslib.experiments.measure import cost, gate_summary, input_size, scores, training_macs, validation
from afdslib.losses.delta import channel_weights, fit_classifier
from afdslib.losses.term import TERMS
from afdslib.runs import MODEL
from afdslib.training import Optimisation, distributed
from afdslib.training.features import feature_names
from afdslib.training.objective import Objective, Regulariser

__all__ = ["AFSSourceRun", "ChannelWeightsRun", "ExtendedSourceRun", "SourceRun", "network_of", "weights_run"]

PUBLISHED_CLASSES = 1000  # ImageNet's
WEIGHTS = "weights.safetensors"


def network_of(config: Any, run: runs.Run) -> nn.Module:
    """The network that another run has trained, or trains now."""
    return afs.load(distributed.get_or_run(config, store=run.store, needs=(MODEL,)).artifact(MODEL))


def keep(run: runs.Run, model: nn.Module) -> None:
    """Writes the network of a run."""
    run.write_artifact(MODEL, lambda path: afs.save(model, path))


def with_classifier(model: nn.Module, splits: Splits, seed: int) -> nn.Module:
    """The network with a new classifier for the data set's classes."""
    backbones.reset_classifier(model, len(splits.classes), generator=torch.Generator().manual_seed(seed))
    return model


@runs.register
@dataclass(frozen=True)
class SourceRun:
    """Trains a plain network on the source data, or takes published weights (no step, no source data).

    Weight decay is that of every parameter; the seed is of initialisation, data order and augmentation.
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
            metrics: dict[str, Any] = {"steps": 0}
        else:
            splits = self.data.load()
            model = self.network.build(len(splits.classes), self.seed).to(training.device())
            metrics = _train(self, run, model, splits, "source")
        return metrics | {"parameters": sum(p.numel() for p in model.parameters())}


@runs.register
@dataclass(frozen=True)
class ExtendedSourceRun:
    """Goes on training a plain source network, as `AFSSourceRun` does with the converted one and with its fields; else
    AFS would have seen more source images than its competitors. 0 steps is the unextended start, an ablation.
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

    With 0 steps the stage is left out, and the data are not read.

    Attributes:
        gates: "all" or "blocks"; see `afs.convert`.
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
        gates = {"gates_before": gates_before, "gates_after": gate_summary(model, images, settings)}
        accuracy = {"converted_validation_accuracy": before["validation_accuracy"]}
        return metrics | gates | accuracy | {"gates": len(gates_before)}


def _train(
    config: SourceRun | ExtendedSourceRun | AFSSourceRun, run: runs.Run, model: nn.Module, splits: Splits, label: str,
    monitor: ImageDataset | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains on all source images and keeps the network; `monitor` are the images by which gates are watched."""
    settings, size = config.optimisation, input_size(splits)
    objective = Objective(model, weight_decay=config.weight_decay, label_smoothing=settings.label_smoothing)
    validate = partial(validation, model, splits, settings)
    options: dict[str, Any] = {"monitor": monitor, "evaluation": validate, "label": label}
    training.fit(model, splits.train, objective, settings, run, seed=config.seed, **options)
    keep(run, model)
    gated = monitor is not None
    test = training.evaluate(model, splits.test, precision=settings.precision, count_macs=gated)
    measured = cost(test) if gated else macs.count(model, size)
    predictors = {"macs_predictors": measured.predictors} if gated else {}
    return {
        "steps": settings.steps, "images": len(splits.train), "macs": measured.total, **predictors,
        "training_macs": training_macs(model, size, settings), **validate(), **scores("test", test),
    }  # fmt: skip


@runs.register
@dataclass(frozen=True)
class ChannelWeightsRun:
    """Fits a classifier for the target's classes on the frozen source, then weighs the channels without each.

    How much the loss grows when a channel is removed is computed once per source and fitting images, whatever the
    strengths and seeds that use it; a killed run goes on with the next layer.

    Attributes:
        features: the layers; see `features.feature_names`.
        images: fitting images (test-time transform, evenly over the classes) on which the loss is measured; the public
            code takes four batches of 64. [code]
    """

    source: AFSSourceRun | ExtendedSourceRun
    data: DataSource
    features: str = "block"
    images: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        whole("images", self.images, 1)

    def execute(self, run: runs.Run) -> dict[str, Any]:
        splits = data.sealed(self.data.load())
        model = with_classifier(network_of(self.source, run), splits, self.seed).to(training.device())
        splits = splits.normalised(input_of(model))
        size, names = input_size(splits), feature_names(model, self.features)
        state = run.load_checkpoint()
        if state is None:
            with _counted(model, size) as counter:
                loss = fit_classifier(model, data.loader(splits.statistics, 128))
            state = {"step": 0, "model": model.state_dict(), "loss": loss, "macs": counter[0], "weights": {}}
            run.save_checkpoint(state)
        with run.restoring():
            model.load_state_dict(state["model"])
        subset = training.first(splits.statistics, self.images)
        for name in names:
            if name not in state["weights"]:
                with _counted(model, size) as counter:
                    state["weights"] |= channel_weights(model, [name], data.loader(subset, 64))
                state["macs"] += counter[0]
                run.save_checkpoint(state)
        weights: dict[str, Tensor] = {name: state["weights"][name] for name in names}
        run.write_artifact(WEIGHTS, lambda path: save_file(weights, path))
        entropy = {name: float(-(w * w.clamp_min(1e-30).log()).sum()) for name, w in weights.items()}
        return {"classifier_loss": state["loss"], "training_macs": state["macs"], "entropy": entropy}


@contextmanager
def _counted(model: nn.Module, size: tuple[int, int, int]) -> Iterator[list[float]]:
    """Adds up the dense MACs of every convolution and linear layer that runs inside the block."""
    costs = {model.get_submodule(name): cost for name, cost in macs.count(model, size).by_layer.items()}
    total = [0.0]

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if module in costs:
            total[0] += costs[module] * output.shape[0]

    handle = nn.modules.module.register_module_forward_hook(record)
    try:
        yield total
    finally:
        handle.remove()


def weights_run(
    regulariser: Regulariser, source: AFSSourceRun | ExtendedSourceRun, target: DataSource
) -> ChannelWeightsRun | None:
    """The stage that DELTA needs before its training; None for the other regularisers."""
    needed = "weights" in TERMS[regulariser.name].needs
    return ChannelWeightsRun(source, target, regulariser.features) if needed else None
