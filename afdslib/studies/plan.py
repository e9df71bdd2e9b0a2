"""The plan of a study: what it would do, what it would cost, and what this machine lacks.

It only looks: nothing is trained, fetched, extracted, decoded or written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from afdslib import afs, backbones, data, runs, training
from afdslib.afs import macs
from afdslib.backbones.loading import imagenet_file
from afdslib.base.errors import AFDSError
from afdslib.experiments import DataSource
from afdslib.training import Optimisation

__all__ = ["describe"]

# Bytes per activation value kept for the backward pass, with autocast, and how often each convolution's output is kept:
# its input, the batch norm's input, the gate's input. A rule of thumb, not a measurement. [ours]
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_KEPT = 3


def describe(study: Any) -> str:  # a `sweep.Study`, which imports this module
    """The plan as text: network, data sets, stages with steps and training MACs, disk, memory, and what is missing."""
    p = study.profile
    size = p.targets[0].size or _default_size(p.targets[0].name)
    shape = (3, size, size)
    model = backbones.build(p.network.name, 1000, stem=p.network.stem, width=p.network.width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    gated = afs.convert(model, gates=p.gates)
    layers = afs.layers(gated)
    dense = macs.count(gated, shape)
    predictors = sum(layer.predictor.weight.numel() for layer in layers.values())
    parameters = sum(q.numel() for q in gated.parameters())
    lines = [
        f"profile {p.name}, scale {p.scale}",
        f"network: {p.network.name}, stem {p.network.stem}, width {p.network.width:g}, at {size} px: "
        f"{dense.total / 1e6:,.1f} M MACs, {parameters / 1e6:.2f} M parameters with predictors",
        f"AFS: {len(layers)} gated layers (gates={p.gates!r}), predictors {predictors / 1e6:.2f} M MACs "
        f"({predictors / dense.total:.1%} of dense)",
        f"source: {p.source.name}; targets: {', '.join(_title(t) for t in p.targets)}",
        f"budgets: {', '.join(f'{b:g}' for b in p.budgets)} of the dense MACs; seeds: {', '.join(map(str, p.seeds))}",
        "",
        f"{'stage':34}{'runs':>6}{'steps each':>12}{'batch':>7}{'training MACs':>16}",
    ]
    total = 0.0
    for name, count, settings, teacher in _stages(study):
        cost = count * settings.steps * settings.batch_size * dense.total * (3 + teacher)
        total += cost
        lines.append(f"{name:34}{count:>6}{settings.steps:>12,}{settings.batch_size:>7}{cost:>16.3g}")
    trials = sum(len(c.strengths) for c in p.candidates if len(c.strengths) > 1)
    models = 2 + len(p.targets) * (len(p.candidates) * len(p.seeds) * len(p.budgets) + trials)
    kept = parameters * 4 * models
    memory = _memory(gated, shape, p.transfer, parameters)
    lines += [
        f"{'total':34}{'':>25}{total:>16.3g}",
        "",
        f"disk: about {kept / 2**30:.1f} GiB of networks in the run store; free here: {_free():.0f} GiB",
        f"memory: about {memory / 2**30:.1f} GiB per training process at batch {p.transfer.batch_size} "
        "(a rule of thumb: three kept maps per convolution, weights, gradients, momentum)",
        f"this machine: {training.device()}, {training.cores()} cores, {study.workers} worker processes",
    ]
    missing = list(dict.fromkeys(_missing(study)))
    lines += ["", "missing on this machine:" if missing else "nothing is missing on this machine"]
    lines += [f"  - {item}" for item in missing]
    lines += ["(files are looked for by name and size; a run verifies their checksums and opens them)"]
    if p.not_run:
        lines += ["", p.not_run]
    return "\n".join(lines)


def _title(source: DataSource) -> str:
    return source.name if source.per_class is None else f"{source.name} ({source.per_class} per class)"


def _default_size(name: str) -> int:
    small = name.startswith(("digits", "cifar", "tiny-imagenet"))
    return 32 if small else 224


def _stages(study: Any) -> Iterator[tuple[str, int, Optimisation, float]]:
    p = study.profile
    targets, seeds = len(p.targets), len(p.seeds)
    yield "source network", 1, p.source_training, 0
    yield "AFS source (density 1)", 1, p.afs_training, 0
    for c in p.candidates:
        teacher = 0 if c.regulariser.name in ("l2", "l2sp") else 1
        name = c.regulariser.name
        if len(c.strengths) > 1:
            yield f"trials, {name}", targets * len(c.strengths), p.trial, teacher
        yield f"unpruned, {name}", targets * seeds, p.transfer, teacher
        yield f"sweep, {name}", targets * seeds * (len(p.budgets) - 1), p.tuning, teacher


def _memory(model: nn.Module, shape: tuple[int, int, int], settings: Optimisation, parameters: int) -> float:
    values = 0
    handles = []

    def count(module: nn.Module, args: tuple, output) -> None:
        nonlocal values
        values += output.numel()

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, afs.AFSConvBN)):
            handles.append(layer.register_forward_hook(count))
    try:
        macs.count(model, shape)
    finally:
        for handle in handles:
            handle.remove()
    return values / 2 * _KEPT * settings.batch_size * _BYTES[settings.precision] + parameters * 4 * 3


def _free() -> float:
    from afdslib.base import paths

    folder = paths.runs()
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize / 2**30


def _missing(study: Any) -> Iterator[str]:
    """What a run would stumble over, in the words it would use."""
    p = study.profile
    if training.device().type == "cpu" and p.name == "paper":
        yield "a GPU: on this CPU the study would take months"
    if runs.lookup(study.source_run) is None:
        if p.network.weights == "imagenet":
            file, url = imagenet_file(p.network.name)
            if not file.exists():  # a plan looks, and downloads nothing
                yield f"the ImageNet weights {file.name}, which a run fetches from {url} into {file.parent}"
        elif p.network.weights is not None and not Path(p.network.weights).expanduser().is_file():
            yield f"the weight file {p.network.weights}"
    for source in (*p.targets, *([p.source] if study.reads_source else [])):
        try:
            data.look(source.name, source.root or None)
        except AFDSError as error:
            yield str(error)
