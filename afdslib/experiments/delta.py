"""DELTA's stage before training: how much the loss grows when a channel of the source is removed, as a run of its own.

So it is computed once per source and fitting images, whatever the strengths and seeds that use it, and a killed one
goes on with the next layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from afdslib import backbones, data, runs, training
from afdslib.afs import macs
from afdslib.base.checks import whole
from afdslib.experiments.config import DataSource
from afdslib.experiments.measure import input_size
from afdslib.experiments.source import AFSSourceRun, ExtendedSourceRun, network_of
from afdslib.losses.delta import channel_weights, fit_classifier
from afdslib.losses.term import TERMS
from afdslib.training.features import feature_names
from afdslib.training.objective import Regulariser

__all__ = ["ChannelWeightsRun", "weights_for", "weights_run"]

WEIGHTS = "weights.safetensors"


@runs.register
@dataclass(frozen=True)
class ChannelWeightsRun:
    """Fits a classifier for the target's classes on the frozen source, then weighs the channels without each.

    Attributes:
        source: the network whose channels are weighed.
        data: the target data set; its seed draws the fitting images.
        features: the layers; see `features.feature_names`.
        images: fitting images (test-time transform, evenly over the classes) on which the loss is measured; the public
            code takes four batches of 64. [code]
        seed: of the classifier's initialisation.
    """

    source: AFSSourceRun | ExtendedSourceRun
    data: DataSource
    features: str = "block"
    images: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        whole("images", self.images, 1)

    def execute(self, run: runs.Run) -> dict[str, Any]:
        model = network_of(self.source, run)
        splits = data.sealed(self.data.load())
        size = input_size(splits)
        backbones.reset_classifier(model, len(splits.classes), generator=torch.Generator().manual_seed(self.seed))
        model.to(training.device())
        names = feature_names(model, self.features)
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
            if name in state["weights"]:
                continue
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
    by_layer = macs.count(model, size).by_layer
    total = [0.0]

    def hook(cost: float):
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            total[0] += cost * output.shape[0]

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(cost)) for name, cost in by_layer.items()]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def weights_run(
    regulariser: Regulariser, source: AFSSourceRun | ExtendedSourceRun, target: DataSource
) -> ChannelWeightsRun | None:
    """The stage that DELTA needs before its training; None for the other regularisers."""
    needed = "weights" in TERMS[regulariser.name].needs
    return ChannelWeightsRun(source, target, regulariser.features) if needed else None


def weights_for(
    regulariser: Regulariser, source: AFSSourceRun | ExtendedSourceRun, target: DataSource, run: runs.Run
) -> dict[str, Tensor] | None:
    """DELTA's channel weights, computed now if they are not stored; None for the other regularisers."""
    config = weights_run(regulariser, source, target)
    if config is None:
        return None
    return load_file(runs.get_or_run(config, store=run.store, needs=(WEIGHTS,)).artifact(WEIGHTS))
