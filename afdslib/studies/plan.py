"""The plan of a study: what it would do, what it would cost, and what this machine lacks.

It only looks: nothing is trained, fetched, extracted, decoded or written.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from afdslib import afs, backbones, data, runs, training
from afdslib.afs import macs
from afdslib.backbones.loading import imagenet_file
from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.training import Optimisation
from afdslib.training.features import feature_shapes

__all__ = ["describe", "lacking", "memory", "published", "unreadable"]


def memory(model: nn.Module, size: tuple[int, int, int], precision: str, images: int) -> int:
    """Bytes that training takes: what the backward pass needs of each image, weights, gradients and momentum.

    Each convolution's output is kept three times: its input, the batch norm's, the gate's. A rule of thumb. [ours]
    """
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    values = sum(math.prod(shape) for shape in feature_shapes(model, convolutions, size).values())
    return 3 * values * (4 if precision == "fp32" else 2) * images + 3 * 4 * sum(p.numel() for p in model.parameters())


def published(name: str) -> Iterator[str]:
    """Whether a backbone's ImageNet weights are missing."""
    file, url = imagenet_file(name)
    if not file.exists():
        yield f"the ImageNet weights {file.name}, which a run fetches from {url} into {file.parent}"


def unreadable(name: str, root: str) -> Iterator[str]:
    """Why a data set cannot be loaded, in the words that a run would use."""
    try:
        data.look(name, root or None)
    except AFDSError as error:
        yield str(error)


def lacking(items: Iterable[str]) -> list[str]:
    """Lines that say what is missing."""
    missing = [f"  - {item}" for item in dict.fromkeys(items)]
    return ["", "missing on this machine:" if missing else "nothing is missing on this machine", *missing]


def describe(study: Any) -> str:  # a `sweep.Study`, which imports this module
    """The plan as text: network, data sets, stages with steps and training MACs, disk, memory, and what is missing."""
    p, target = study.profile, study.profile.targets[0]
    size = target.size or (32 if target.name.startswith(("digits", "cifar", "tiny-imagenet")) else 224)
    model = backbones.build(p.network.name, 1000, stem=p.network.stem, width=p.network.width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    gated = afs.convert(model, gates=p.gates)
    layers, dense = afs.layers(gated), macs.count(gated, (3, size, size))
    predictors = sum(layer.predictor.weight.numel() for layer in layers.values())
    parameters = sum(q.numel() for q in gated.parameters())
    names = [t.name if t.per_class is None else f"{t.name} ({t.per_class} per class)" for t in p.targets]
    lines = [
        f"profile {p.name}, scale {p.scale}",
        f"network: {p.network.name}, stem {p.network.stem}, width {p.network.width:g}, at {size} px: "
        f"{dense.total / 1e6:,.1f} M MACs, {parameters / 1e6:.2f} M parameters with predictors",
        f"AFS: {len(layers)} gated layers (gates={p.gates!r}), predictors {predictors / 1e6:.2f} M MACs "
        f"({predictors / dense.total:.1%} of dense)",
        f"source: {p.source.name}; targets: {', '.join(names)}",
        f"budgets: {', '.join(f'{b:g}' for b in p.budgets)} of the dense MACs; seeds: {', '.join(map(str, p.seeds))}",
        "",
        f"{'stage':34}{'runs':>6}{'steps each':>12}{'batch':>7}{'training MACs':>16}",
    ]
    total, networks = 0.0, 0
    for name, count, o, teacher in _stages(p):
        cost = count * o.steps * o.batch_size * dense.total * (3 + teacher)
        total, networks = total + cost, networks + count
        lines.append(f"{name:34}{count:>6}{o.steps:>12,}{o.batch_size:>7}{cost:>16.3g}")
    store = next(folder for folder in (paths.runs(), *paths.runs().parents) if folder.exists())
    needed = memory(gated, (3, size, size), p.transfer.precision, p.transfer.batch_size)
    lines += [
        f"{'total':34}{'':>25}{total:>16.3g}",
        "",
        f"disk: about {parameters * 4 * networks / 2**30:.1f} GiB of networks in the run store; free here: "
        f"{shutil.disk_usage(store).free / 2**30:.0f} GiB",
        f"memory: about {needed / 2**30:.1f} GiB per training process at batch {p.transfer.batch_size} "
        "(a rule of thumb: three kept maps per convolution, weights, gradients, momentum)",
        f"this machine: {training.device()}, {training.cores()} cores, {study.workers} worker processes",
        *lacking(_missing(study)),
        "(files are looked for by name and size; a run verifies their checksums and opens them)",
    ]
    return "\n".join([*lines, "", p.not_run] if p.not_run else lines)


def _stages(p: Any) -> Iterator[tuple[str, int, Optimisation, int]]:
    """Each stage's name, runs, optimisation, and forward passes of a teacher."""
    chains = len(p.targets) * len(p.seeds)
    yield "source network", 1, p.source_training, 0
    yield "AFS source (density 1)", 1, p.afs_training, 0
    for c in p.candidates:
        name, teacher = c.regulariser.name, int(c.regulariser.name not in ("l2", "l2sp"))
        if len(c.strengths) > 1:
            yield f"trials, {name}", len(p.targets) * len(c.strengths), p.trial, teacher
        yield f"unpruned, {name}", chains, p.transfer, teacher
        yield f"sweep, {name}", chains * (len(p.budgets) - 1), p.tuning, teacher


def _missing(study: Any) -> Iterator[str]:
    """What a run would stumble over, in the words it would use."""
    p, weights = study.profile, study.profile.network.weights
    if training.device().type == "cpu" and p.name == "paper":
        yield "a GPU: on this CPU the study would take months"
    if runs.lookup(study.source_run) is None:
        if weights == "imagenet":
            yield from published(p.network.name)
        elif weights is not None and not Path(weights).expanduser().is_file():
            yield f"the weight file {weights}"
    for source in (*p.targets, *([p.source] if study.reads_source else [])):
        yield from unreadable(source.name, source.root)
