"""What is measured of a trained network: scores, MACs and gates, the same for AFS and for every competitor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from afdslib import afs, data, training
from afdslib.afs import macs
from afdslib.afs.compact import compact
from afdslib.afs.graph import eval_mode
from afdslib.base.errors import AFDSError
from afdslib.data import Splits
from afdslib.training import Optimisation

__all__ = ["cost", "gate_metrics", "gate_summary", "input_size", "measure", "scores", "training_macs", "validation"]


def input_size(splits: Splits) -> tuple[int, int, int]:
    """(3, H, W)."""
    return 3, splits.test.size, splits.test.size


def cost(measured: training.Evaluation | afs.MaskReport) -> macs.MACs:
    """The counted MACs."""
    assert measured.macs is not None, "MACs were not counted"
    return measured.macs


def scores(prefix: str, evaluation: training.Evaluation) -> dict[str, float]:
    """Accuracies and loss of a split, as metrics."""
    names = ("accuracy", "mean_class_accuracy", "loss")
    return {f"{prefix}_{name}": getattr(evaluation, name) for name in names}


def validation(model: nn.Module, splits: Splits, settings: Optimisation) -> dict[str, float]:
    """Scores of the validation images; an AFDSError if there are none."""
    if splits.validation is None:
        raise AFDSError(f"the data set {splits.name!r} leaves no training image for validation; take fewer per class")
    return scores("validation", training.evaluate(model, splits.validation, precision=settings.precision))


def training_macs(model: nn.Module, size: tuple[int, int, int], settings: Optimisation, forwards: float = 0) -> float:
    """MACs of a stage: per image three dense passes of the network (forward, two gradients), and the teacher's."""
    return macs.count(model, size).total * settings.steps * settings.batch_size * (3 + forwards)


def gate_summary(model: nn.Module, images: data.ImageDataset, settings: Optimisation) -> dict[str, dict[str, Any]]:
    """Per layer: channel counts and eleven quantiles over channels of the mean gate and of the active rate."""
    with training.autocast(next(model.parameters()).device, settings.precision):
        statistics = afs.collect_statistics(model, data.loader(images, 128))
    summary: dict[str, dict[str, Any]] = {}
    for name, layer in afs.layers(model).items():
        alive, s = layer.m.bool().cpu(), statistics[name]
        dynamic = int((layer.m * layer.s).sum())
        variation = (s.p[alive] / s.q[alive].square().clamp_min(1e-12)).median()
        summary[name] = {
            "channels": layer.m.numel(), "removed": int((~alive).sum()), "static": int(alive.sum()) - dynamic,
            "dynamic": dynamic, "gate_quantiles": _deciles(s.q[alive]), "variation": round(float(variation), 6),
            "active_quantiles": _deciles(s.active_rate[alive]),
        }  # fmt: skip
    return summary


def _deciles(values: torch.Tensor) -> list[float]:
    return [round(v, 4) for v in torch.quantile(values, torch.linspace(0, 1, 11, dtype=torch.float64)).tolist()]


def gate_metrics(model: nn.Module, splits: Splits, settings: Optimisation) -> dict[str, Any]:
    """The gates of every layer over the training images, the sums of their states, and the density."""
    layers = gate_summary(model, splits.statistics, settings)
    sums = {kind: sum(layer[kind] for layer in layers.values()) for kind in ("removed", "static", "dynamic")}
    return {"layers": layers, **sums, "density": next(iter(afs.layers(model).values())).density}


def _without_removed(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """The network that is evaluated: compact where channels are removed. At 10x it took half the time of the masked one
    (test images of imagenet32, one thread), and it is what a user would run."""
    if all(bool(layer.m.all()) for layer in afs.layers(model).values()):
        return model
    with eval_mode(model):
        return compact(model, input_size=size).to(memory_format=torch.channels_last)


def measure(
    model: nn.Module, splits: Splits, settings: Optimisation, dense: float, budget: float, *, images: int,
    use_test: bool,
) -> dict[str, Any]:  # fmt: skip
    """Accuracies and MACs of one point.

    Args:
        model: the network, with its masks.
        splits, settings: of its training.
        dense: MACs of the dense network, of which all others are shares; the `budget` is for the record.
        images: training images whose accuracy and MACs are reported.
        use_test: whether the test images are read.
    """
    precision, size = settings.precision, input_size(splits)
    cut = _without_removed(model, size)
    fitted = training.evaluate(cut, training.first(splits.statistics, images), precision=precision, count_macs=True)
    metrics: dict[str, Any] = {
        "budget": budget, "dense_macs": dense, "train_macs": cost(fitted).total / dense,
        "parameters": macs.parameters(model, size), **scores("train", fitted),
    } | training.monitor_gates(model, splits.statistics)  # fmt: skip
    if splits.validation is not None:
        metrics |= validation(cut, splits, settings)
    if use_test:
        test = training.evaluate(cut, splits.test, precision=precision, count_macs=True)
        shares = {"macs": cost(test).total / dense, "macs_predictors": cost(test).predictors / dense}
        metrics |= scores("test", test) | shares | {"confusion": test.confusion}
    return metrics
