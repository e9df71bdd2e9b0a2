"""What the notebooks look at inside trained networks: exactness, skipped channels, gates by budget, attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from afdslib import afs, runs, training
from afdslib.afs.graph import eval_mode
from afdslib.features import Teacher, feature_names, feature_shapes
from afdslib.losses.afd import AFDLoss
from afdslib.objectives import Objective
from afdslib.stages import MODEL, OBJECTIVE, TransferRun

if TYPE_CHECKING:
    from afdslib.study import Study

__all__ = [
    "NOT_STORED",
    "AttentionView",
    "attention",
    "conversion_error",
    "entropy_bounds",
    "feature_sizes",
    "histories",
    "layers_by_budget",
    "network",
    "skips_exactly",
    "terms_add_up",
]

NOT_STORED = (
    "Not shown: only the results of this profile are stored here, not its networks. "
    "To train them, set AFDS_FRESH=1 and add --fresh to the same command."
)


def network(study: Study, config: Any, *, needs: Sequence[str] = (MODEL,)) -> runs.Result | None:
    """The finished run of a configuration with its files.

    Returns:
        None if only its committed result is here and the training would take more than minutes; the demo is computed.
    """
    found = runs.lookup(config, needs=needs)
    if found is None and not study.profile.committed:
        found = runs.get_or_run(config, needs=needs)
    return found


@torch.no_grad()
def conversion_error(study: Study, images: int = 16) -> dict[str, float] | None:
    """Largest relative error of the converted network's logits, max|a - b| / max|b|, on target images.

    Returns:
        "float64 eval", "float64 train" and "float32 eval"; None if the source network is not stored.
    """
    result = network(study, study.source_run)
    if result is None:
        return None
    plain = afs.load(result.artifact(MODEL))
    batch, _ = study.profile.targets[0].load().statistics.__getitems__(list(range(images)))
    errors = {}
    for name, dtype, train in (
        ("float64 eval", torch.float64, False),
        ("float64 train", torch.float64, True),
        ("float32 eval", torch.float32, False),
    ):
        one = copy.deepcopy(plain).to(dtype).train(train)
        other = afs.convert(one, gates=study.profile.gates)
        expected = one(batch.to(dtype))
        errors[name] = float((other(batch.to(dtype)) - expected).abs().max() / expected.abs().max())
    return errors


def histories(
    study: Study, methods: Iterable[str] | None = None, *, budget: float = 1.0
) -> dict[str, list[pd.DataFrame]]:
    """Logged rows of every seed at one budget, by method."""
    names = list(methods or study.regularisers)
    return {name: [study.point(name, seed, budget).history() for seed in study.profile.seeds] for name in names}


def terms_add_up(study: Study, method: str, *, budget: float = 1.0, tolerance: float = 1e-3) -> bool:
    """Whether the logged loss is the cross-entropy plus the strength times the regulariser, and the latter is at work.

    Means over the same steps are compared, relative to the regulariser's share, so that a strength of 0 is noticed.
    """
    strength, column = study.regularisers[method].strength, method.replace("-", "_")
    for history in histories(study, [method], budget=budget)[method]:
        term = strength * history[column]
        share = history.loss - history.cross_entropy
        if not (strength > 0 and bool((term > 0).all()) and bool(((share - term).abs() <= tolerance * term).all())):
            return False
    return True


def layers_by_budget(study: Study, method: str, seed: int, budgets: Sequence[float]) -> dict[float, dict[str, Any]]:
    """Per-layer gate summaries of the points of one chain, by budget."""
    return {budget: study.point(method, seed, budget).metrics["layers"] for budget in budgets}


@torch.no_grad()
def skips_exactly(study: Study, method: str, seed: int, budget: float, *, images: int = 32) -> bool | None:
    """Whether, in every layer, what the gates leave out is exactly zero and no more than max(k, static) is computed.

    Returns:
        None if the network is not stored.
    """
    result = network(study, _point(study, method, seed, budget))
    if result is None:
        return None
    model = afs.load(result.artifact(MODEL))
    batch, _ = study.profile.targets[0].load().statistics.__getitems__(list(range(images)))
    outcome, handles = [], []

    def check(layer: afs.AFSConvBN, args: tuple[Tensor, ...], output: Tensor) -> None:
        active = layer.gates(args[0]).active
        most = max(layer.k, int((layer.m * (1 - layer.s)).sum()))
        outcome.append(bool((output[active == 0] == 0).all()) and bool((active.sum(1) <= most).all()))
        outcome.append(bool((active[:, layer.m == 0] == 0).all()))

    try:
        for layer in afs.layers(model).values():
            handles.append(layer.register_forward_hook(check))
        with eval_mode(model):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return all(outcome)


def _point(study: Study, method: str, seed: int, budget: float) -> TransferRun:
    return study.transfer_run(study.regularisers[method], seed, budget=budget)


@dataclass(frozen=True)
class AttentionView:
    """AFD's attention for one image.

    Attributes:
        image: uint8 (H, W, 3).
        caption: its class.
        layer: the tapped layer shown.
        weights: attention of each channel, (C,); the sum is 1.
        maps: source features, (C, h, w).
        total: the sum of the weights of each tapped layer, which must be 1.
    """

    image: np.ndarray
    caption: str
    layer: str
    weights: np.ndarray
    maps: np.ndarray
    total: dict[str, float]


def _attending(study: Study, seed: int, budget: float) -> tuple[Teacher, AFDLoss] | None:
    """The frozen source and the trained attention of an AFD run."""
    config = _point(study, "afd", seed, budget)
    result, source = network(study, config, needs=(MODEL, OBJECTIVE)), network(study, study.afs_source_run)
    if result is None or source is None:
        return None
    size = config.data.load().test.size
    objective = Objective(
        afs.load(result.artifact(MODEL)), config.regulariser, afs.load(source.artifact(MODEL)), (3, size, size)
    )
    objective.load_state_dict(load_file(result.artifact(OBJECTIVE)))
    assert objective.teacher is not None and isinstance(objective.term, AFDLoss)
    return objective.teacher, objective.term


@torch.no_grad()
def attention(study: Study, *, seed: int | None = None, index: int = 0, budget: float = 1.0) -> AttentionView | None:
    """AFD's attention for one training image, in the deepest tapped layer whose map is at least 8 x 8.

    Args:
        study: has an AFD run.
        seed: default: the first one.
        index: of the image among the fitting images.
        budget: of the sweep.

    Returns:
        None if the networks are not stored.
    """
    seed = study.profile.seeds[0] if seed is None else seed
    found = _attending(study, seed, budget)
    if found is None:
        return None
    teacher, term = found
    splits = replace(study.profile.targets[0], seed=seed).load()
    images, target = splits.statistics[index]
    _, features = teacher(images[None])
    rho = term.attention(features)
    large = [name for name in features if features[name].shape[2] >= 8]
    layer = large[-1] if large else max(features, key=lambda name: features[name].shape[2])
    return AttentionView(
        image=splits.statistics.raw(index),
        caption=str(splits.captions[target]),
        layer=layer,
        weights=rho[layer][0].double().numpy(),
        maps=features[layer][0].double().numpy(),
        total={name: float(weights.double().sum()) for name, weights in rho.items()},
    )


def entropy_bounds(study: Study) -> tuple[float, float, float]:
    """Smallest and largest logged entropy of the unpruned AFD runs, and that of a uniform attention, nats."""
    logged = [history.entropy for history in histories(study, ["afd"])["afd"]]
    sizes = feature_sizes(study).values()
    uniform = sum(math.log(channels) for channels, _, _ in sizes) / len(sizes)
    return min(float(e.min()) for e in logged), max(float(e.max()) for e in logged), uniform


def feature_sizes(study: Study) -> dict[str, tuple[int, int, int]]:
    """(C, H, W) of the layers that AFD compares."""
    p = study.profile
    splits = p.targets[0].load()
    model: nn.Module = replace(p.network, weights=None).build(len(splits.classes), 0)
    features = next((c.regulariser.features for c in p.candidates if c.regulariser.name == "afd"), "block")
    with training.autocast(torch.device("cpu"), "fp32"):
        return feature_shapes(model, feature_names(model, features), (3, splits.test.size, splits.test.size))
