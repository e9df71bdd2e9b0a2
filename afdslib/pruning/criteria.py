"""How important a channel is: the criteria of static pruning. Each gives one score per channel of a group.

Where several layers share a channel (a residual stream), Taylor adds their scores, since they estimate one change of
the loss, and the others average them, so that a stream compares with a single layer. [ours]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from afdslib.afs.graph import eval_mode
from afdslib.afs.shrink import Group
from afdslib.base.cpu import safe_gradients
from afdslib.base.errors import AFDSError

__all__ = ["CRITERIA", "NORMALISATIONS", "Batches", "scores"]

Batches = Iterable[tuple[Tensor, Tensor]]
NORMALISATIONS = ("none", "mean")


def _filters(module: nn.Module) -> Tensor | None:
    """(outputs, values per output) of a convolution or linear layer."""
    return module.weight.flatten(1) if isinstance(module, (nn.Conv2d, nn.Linear)) else None


def _spread(group: Group, values: Mapping[str, Tensor], reduce: str) -> Tensor | None:
    """Per channel the mean or sum over the group's layers of a value per output; None if no layer has one."""
    total, count = torch.zeros(group.width, dtype=torch.float64), 0
    for member in group.members:
        if member.output and member.layer in values:
            found = values[member.layer].double().cpu()
            for root, position in member.positions:
                total[root] += found[position]
            count += 1
    if not count:
        return None
    return total / count if reduce == "mean" else total


def _slimming(model: nn.Module, groups: list[Group], batches: Batches, seed: int) -> list[Tensor | None]:
    """|gamma| of the batch norm behind each channel. Network slimming, 1708.06519."""
    scales = {
        n: m.weight.detach().abs() for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine
    }
    return [_spread(group, scales, "mean") for group in groups]


def _l1(model: nn.Module, groups: list[Group], batches: Batches, seed: int) -> list[Tensor | None]:
    """The L1 norm of each filter. 1608.08710."""
    norms = {n: f.detach().abs().sum(1) for n, m in model.named_modules() if (f := _filters(m)) is not None}
    return [_spread(group, norms, "mean") for group in groups]


def _taylor(model: nn.Module, groups: list[Group], batches: Batches, seed: int) -> list[Tensor | None]:
    """(sum w dL/dw)^2 over each filter, mean over batches. First-order Taylor, 1906.10771.

    In eval mode: behind a batch norm in train mode a filter's scale does not act, and the sum is 0 for all. [ours]
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    where = next(model.parameters()).device
    totals: dict[str, Tensor] = {}
    count = 0
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(True)
        with eval_mode(model), torch.enable_grad(), safe_gradients(model, where):
            for images, labels in batches:
                loss = nn.functional.cross_entropy(model(images.to(where)).float(), labels.to(where))
                parameters = [p for m in layers.values() for p in (m.weight, m.bias) if p is not None]
                gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
                for name, module in layers.items():
                    change = (module.weight.detach() * gradients[module.weight]).flatten(1).sum(1)
                    if module.bias is not None:
                        change = change + module.bias.detach() * gradients[module.bias]
                    totals[name] = totals.get(name, 0) + change.double().square()
                count += 1
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if not count:
        raise AFDSError("no image to estimate the Taylor importance on; the loader is empty")
    means = {name: total / count for name, total in totals.items()}
    return [_spread(group, means, "sum") for group in groups]


def _random(model: nn.Module, groups: list[Group], batches: Batches, seed: int) -> list[Tensor | None]:
    """A random order of all channels, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(group.width, generator=generator, dtype=torch.float64) for group in groups]


Criterion = Callable[[nn.Module, list[Group], Batches, int], "list[Tensor | None]"]

CRITERIA: dict[str, Criterion] = {"slimming": _slimming, "taylor": _taylor, "l1": _l1, "random": _random}


def scores(
    criterion: str,
    model: nn.Module,
    groups: list[Group],
    *,
    batches: Batches = (),
    seed: int = 0,
    normalise: str = "none",
) -> list[Tensor | None]:
    """The importance of every channel, (C,) float64 by group; None for a group the criterion cannot rank.

    Args:
        criterion: of `CRITERIA`.
        model: the plain network.
        groups: of this network.
        batches: training images, for the criteria that look at the loss.
        seed: for the random order.
        normalise: "none", as published, or "mean": divided by the group's mean, which makes layers alike. [ours]

    Raises:
        AFDSError: an unknown criterion, a network it cannot rank at all, or scores that are not finite.
    """
    if criterion not in CRITERIA:
        raise AFDSError(f"unknown selection {criterion!r}; static ones are {', '.join(CRITERIA)}")
    if normalise not in NORMALISATIONS:
        raise AFDSError(f"normalise must be one of {', '.join(NORMALISATIONS)}, got {normalise!r}")
    found = CRITERIA[criterion](model, groups, batches, seed)
    if all(values is None for values in found):
        raise AFDSError(
            f"{criterion} cannot rank the channels of {type(model).__name__}: no convolution such as "
            f"{groups[0].name!r} has a batch norm with scales; choose another selection"
        )
    for group, values in zip(groups, found, strict=True):
        if values is not None and not bool(values.isfinite().all()):
            raise AFDSError(f"the {criterion} importance of {group.name!r} is not finite; look at the training before")
    if normalise == "mean":
        found = [None if v is None else v / v.mean().clamp_min(1e-300) for v in found]
    return found
