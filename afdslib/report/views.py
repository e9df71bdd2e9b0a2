"""What the notebooks look at inside trained networks: exactness, skipped channels, gates by budget, attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn

from afdslib import afs, runs
from afdslib.experiments import OBJECTIVE, DataSource
from afdslib.experiments.source import PUBLISHED_CLASSES
from afdslib.losses.afd import AFDLoss
from afdslib.report.tables import smallest
from afdslib.runs import MODEL
from afdslib.studies.sweep import Study
from afdslib.training.features import compared_shapes
from afdslib.training.objective import Objective

__all__ = [
    "NOT_STORED", "NOT_TUNED", "AttentionView", "Confusion", "attention", "attentions", "confusions",
    "conversion_error", "entropy_bounds", "feature_sizes", "histories", "layers_by_budget", "network",
    "source_architecture", "source_gates"
]  # fmt: skip

NOT_STORED = (
    "Not shown: only the results of this profile are stored here, not its networks. "
    "To train them, set AFDS_FRESH=1 and add --fresh to the same command."
)
NOT_TUNED = "The predictors were not trained on source images: every gate is still the scale of its batch norm."


def network(study: Any, config: Any, *, needs: Sequence[str] = (MODEL,)) -> runs.Result | None:
    """The finished run of a configuration with its files.

    None if only its committed result is here and the training would take more than minutes (the demo is computed), or
    if it diverged.
    """
    found = runs.lookup(config, needs=needs)
    if found is None and not study.profile.committed and "diverged" not in runs.get_or_run(config).metrics:
        found = runs.get_or_run(config, needs=needs)
    return found


def source_architecture(study: Study) -> tuple[nn.Module, tuple[int, int, int]]:
    """The source network with fresh weights, and (3, H, W) of its images; of published weights, of the target's."""
    splits = study.source_data
    size = (splits or next(iter(study.target_data.values()))).test.size
    plain = replace(study.profile.network, weights=None)
    classes = PUBLISHED_CLASSES if splits is None or study.source_run.published else len(splits.classes)
    return plain.build(classes, 0), (3, size, size)


def source_gates(study: Study) -> dict[str, dict[str, Any]]:
    """Per-layer gate summaries of the source network "before" and "after" its predictors were trained, or nothing."""
    metrics = study.afs_source().metrics
    return {when: metrics[f"gates_{when}"] for when in ("before", "after") if f"gates_{when}" in metrics}


@torch.no_grad()
def conversion_error(study: Study, images: int = 16) -> dict[str, float] | None:
    """Largest relative error of the converted network's logits, max|a - b| / max|b|, on images of the primary target.

    By "float64 eval", "float64 train" and "float32 eval"; None if the source network is not stored.
    """
    result = network(study, study.source_run)
    if result is None:
        return None
    plain = afs.load(result.artifact(MODEL))
    statistics = next(iter(study.target_data.values())).statistics
    batch, _ = statistics.__getitems__(list(range(min(images, len(statistics)))))
    errors = {}
    for case in ("float64 eval", "float64 train", "float32 eval"):
        dtype = torch.float64 if "64" in case else torch.float32
        one = copy.deepcopy(plain).to(dtype).train("train" in case)
        other = afs.convert(one, gates=study.profile.gates)
        expected = one(batch.to(dtype))
        errors[case] = float((other(batch.to(dtype)) - expected).abs().max() / expected.abs().max())
    return errors


def histories(
    study: Study, methods: Iterable[str] | None = None, *, budget: float = 1.0, target: DataSource | None = None
) -> dict[str, list[pd.DataFrame]]:
    """Logged rows of every seed on one target (default: the primary one) at one budget, by method."""
    names, seeds = list(methods or study.regularisers), study.profile.seeds
    return {name: [study.point(name, seed, budget, target).history() for seed in seeds] for name in names}


def layers_by_budget(
    study: Study, method: str, seed: int, budgets: Sequence[float], target: DataSource | None = None
) -> dict[float, dict[str, Any]]:
    """Per-layer gate summaries of the points of one chain, by budget, without those that diverged."""
    metrics = {budget: study.point(method, seed, budget, target).metrics for budget in budgets}
    return {budget: found["layers"] for budget, found in metrics.items() if "layers" in found}


class AttentionView(NamedTuple):
    """AFD's attention for one image."""

    image: np.ndarray  # uint8 (H, W, 3)
    caption: str  # its class
    layer: str  # the tapped layer shown
    weights: np.ndarray  # attention of each channel, (C,); the sum is 1
    maps: np.ndarray  # source features, (C, h, w)
    total: dict[str, float]  # the sum of the weights of each tapped layer, which must be 1


@torch.no_grad()
def attention(study: Study, *, index: int = 0, target: DataSource | None = None) -> AttentionView | None:
    """AFD's attention for one fitting image, in the deepest tapped layer whose map is at least 8 x 8.

    Of the unpruned network of the first seed, on a target (default: the primary one); None if it is not stored.
    """
    seed, target = study.profile.seeds[0], target or study.profile.targets[0]
    config = study.point_run("afd", seed, budget=1.0, target=target)
    result, source = network(study, config, needs=(MODEL, OBJECTIVE)), network(study, study.afs_source_run)
    if result is None or source is None:
        return None
    splits, (model, teacher) = (
        replace(target, seed=seed).load(),
        (afs.load(r.artifact(MODEL)) for r in (result, source)),
    )
    objective = Objective(model, config.regulariser, teacher, (3, splits.test.size, splits.test.size))
    objective.load_state_dict(load_file(result.artifact(OBJECTIVE)))
    assert objective.teacher is not None and isinstance(objective.term, AFDLoss)
    images, label = splits.statistics[index]
    _, features = objective.teacher(images[None])
    rho = objective.term.attention(features)
    large = [name for name in features if features[name].shape[2] >= 8]
    layer = large[-1] if large else max(features, key=lambda name: features[name].shape[2])
    weights, maps = (values[layer][0].double().numpy() for values in (rho, features))
    total = {name: float(one.double().sum()) for name, one in rho.items()}
    return AttentionView(splits.statistics.raw(index), str(splits.captions[label]), layer, weights, maps, total)


def attentions(study: Study) -> dict[str, AttentionView]:
    """`attention` of the first seed, by target; without the targets whose networks are not stored."""
    views = {title: attention(study, target=target) for title, target in study.targets.items()}
    return {title: view for title, view in views.items() if view is not None}


def entropy_bounds(study: Study, target: DataSource | None = None) -> tuple[float, float, float]:
    """Smallest and largest logged entropy of a target's unpruned AFD runs, and that of a uniform attention, nats."""
    logged = pd.concat([history.entropy for history in histories(study, ["afd"], target=target)["afd"]])
    sizes = _feature_shapes(study, 64).values()
    uniform = sum(math.log(channels) for channels, _, _ in sizes) / len(sizes)
    return float(logged.min()), float(logged.max()), uniform


def feature_sizes(study: Study, target: DataSource | None = None) -> dict[str, tuple[int, int, int]]:
    """(C, H, W) of the layers that AFD compares."""
    return _feature_shapes(study, study.target_data[(target or study.profile.targets[0]).title].test.size)


def _feature_shapes(study: Study, side: int) -> dict[str, tuple[int, int, int]]:
    """`feature_sizes` for square images of a side, in pixels."""
    candidates = study.profile.candidates
    features = next((c.regulariser.features for c in candidates if c.regulariser.name == "afd"), "block")
    return compared_shapes(study.profile.network, features, side)


class Confusion(NamedTuple):
    """The confusion matrix of one network on a target's test images."""

    matrix: list[list[int]]  # images by (true class, predicted class)
    captions: tuple[str, ...]  # readable class names
    budget: float  # of the network
    accuracy: float  # as the sweep's table has it
    images: int  # in the test set


def confusions(study: Study, sweep: pd.DataFrame, method: str) -> dict[str, Confusion]:
    """The confusion matrix of a method's smallest network of a sweep's table, first seed, by target."""
    found = {}
    for title, target in study.targets.items():
        row, splits = smallest(sweep[sweep.target == title], method), study.target_data[title]
        budget = float(row.budget)
        matrix = study.point(method, int(row.seed), budget, target).metrics["confusion"]
        found[title] = Confusion(matrix, splits.captions, budget, float(row.test_accuracy), len(splits.test))
    return found
