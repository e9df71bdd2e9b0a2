"""How important a channel is: the criteria of static pruning. Each gives one score per channel of a group.

Where several layers share a channel (a residual stream), Taylor adds their scores, since they estimate one change of
the loss, and the others average them, so that a stream compares with a single layer. [ours]
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from afdslib.afs.shrink import Group
from afdslib.base.checks import choice
from afdslib.base.cpu import safe_gradients
from afdslib.base.errors import AFDSError

__all__ = ["CRITERIA", "NORMALISATIONS", "Batches", "scores"]

Batches = Iterable[tuple[Tensor, Tensor]]
CRITERIA = ("slimming", "taylor", "l1", "random")
NORMALISATIONS = ("none", "mean")


def _layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def _slimming(model: nn.Module) -> dict[str, Tensor]:
    """|gamma| of the batch norm behind each channel. Network slimming, 1708.06519."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine}
    return {name: norm.weight.detach().abs() for name, norm in norms.items()}


def _l1(model: nn.Module) -> dict[str, Tensor]:
    """The L1 norm of each filter. 1608.08710."""
    return {name: layer.weight.flatten(1).detach().abs().sum(1) for name, layer in _layers(model).items()}


def _taylor(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """(sum w dL/dw)^2 over each filter, mean over batches. First-order Taylor, 1906.10771.

    In eval mode: behind a batch norm in train mode a filter's scale does not act, and the sum is 0 for all. [ours]
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)
    layers = _layers(model)
    parameters = [p for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None]
    where = parameters[0].device
    totals: dict[str, Tensor] = {}
    count = 0
    with torch.enable_grad(), safe_gradients(model, where):
        for images, labels in batches:
            loss = nn.functional.cross_entropy(model(images.to(where)).float(), labels.to(where))
            gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
            for name, layer in layers.items():
                change = (layer.weight.detach() * gradients[layer.weight]).flatten(1).sum(1)
                if layer.bias is not None:
                    change = change + layer.bias.detach() * gradients[layer.bias]
                totals[name] = totals.get(name, 0) + change.double().square()
            count += 1
    if not count:
        raise AFDSError("no image to estimate the Taylor importance on; the loader is empty")
    return {name: total / count for name, total in totals.items()}


def _of_group(group: Group, values: Mapping[str, Tensor], reduce: str) -> Tensor | None:
    """Per channel the mean or sum over the group's layers of a value per output; None if no layer has one."""
    total, count = torch.zeros(group.width, dtype=torch.float64), 0
    for member in group.members:
        if member.output and member.layer in values:
            outputs = values[member.layer].double().cpu()
            for root, position in member.positions:
                total[root] += outputs[position]
            count += 1
    if not count:
        return None
    return total / count if reduce == "mean" else total


def scores(
    criterion: str, model: nn.Module, groups: list[Group], *, batches: Batches = (), seed: int = 0,
    normalise: str = "none",
) -> list[Tensor | None]:  # fmt: skip
    """The importance of every channel, (C,) float64 by group; None for a group the criterion cannot rank.

    Args:
        criterion: of `CRITERIA`; "random" is an order of all channels, the same for a seed.
        groups: of the model, a plain network.
        batches: training images, for the criterion that looks at the loss.
        normalise: "none", as published, or "mean": divided by the group's mean, which makes layers alike. [ours]

    Raises:
        AFDSError: an unknown criterion, a network it cannot rank at all, or scores that are not finite.
    """
    choice("selection", criterion, CRITERIA)
    choice("normalise", normalise, NORMALISATIONS)
    ranked: list[Tensor | None]
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        ranked = [torch.rand(group.width, generator=generator, dtype=torch.float64) for group in groups]
    elif criterion == "taylor":
        values = _taylor(model, batches)
        ranked = [_of_group(group, values, "sum") for group in groups]
    else:
        values = (_slimming if criterion == "slimming" else _l1)(model)
        ranked = [_of_group(group, values, "mean") for group in groups]
    if all(channels is None for channels in ranked):
        raise AFDSError(
            f"{criterion} cannot rank the channels of {type(model).__name__}: no convolution such as "
            f"{groups[0].name!r} has a batch norm with scales; choose another selection"
        )
    for group, channels in zip(groups, ranked, strict=True):
        if channels is not None and not bool(channels.isfinite().all()):
            raise AFDSError(f"the {criterion} importance of {group.name!r} is not finite; look at the training before")
    if normalise == "mean":
        ranked = [None if channels is None else channels / channels.mean().clamp_min(1e-300) for channels in ranked]
    return ranked
