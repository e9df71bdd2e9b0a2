"""One threshold for the whole network, set so that the MACs meet a budget; static networks and gated ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from afdslib import afs
from afdslib.afs import macs
from afdslib.afs.shrink import Cost, Group, Kept
from afdslib.base.errors import UnreachableError

__all__ = ["LEAST", "choose", "lower_density", "settle"]

LEAST = 0.98
"""A budget counts as met between this share of it and all of it."""
ROOM = 0.999


def choose(
    model: nn.Module,
    found: list[Group],
    scores: list[Tensor | None],
    macs_budget: float,
    size: tuple[int, int, int],
    *,
    dense: float | None = None,
) -> Kept:
    """The channels to keep: the least important ones of the whole network go until the MACs meet the budget.

    Each group keeps its most important channel. Where the last removal overshoots, the most important of the removed
    channels that still fit come back until `LEAST` of the budget is used. [ours] Ties: (score, group, position).

    Args:
        model: the plain network.
        found: its groups.
        scores: by group, from `criteria.scores`; a group without scores stays whole.
        macs_budget: share of `dense`.
        size: (3, H, W).
        dense: MACs that the budget is a share of; default: the model's own.

    Raises:
        UnreachableError: for a budget below what one channel per group and the fixed layers cost; it names that.
    """
    price = Cost(model, found, size)
    dense = price.dense if dense is None else dense
    allowed = macs_budget * dense * (1 + 1e-9)
    ranking: list[tuple[float, int, int]] = []
    for position, values in enumerate(scores):
        if values is not None:
            channels = sorted((float(v), position, c) for c, v in enumerate(values.tolist()))
            ranking += channels[:-1]
    ranking.sort()

    def flags(gone: list[tuple[float, int, int]]) -> list[Tensor]:
        removed = [torch.zeros(group.width, dtype=torch.bool) for group in found]
        for _, position, channel in gone:
            removed[position][channel] = True
        return removed

    least = price(flags(ranking))
    if least > allowed:
        raise UnreachableError(
            f"the budget {macs_budget:g} cannot be reached: the layers that stay whole and one channel of each other "
            f"layer cost {least / dense:.4f} of the dense network; ask for at least that"
        )
    low, high = 0, len(ranking)
    while low < high:
        middle = (low + high) // 2
        if price(flags(ranking[:middle])) <= allowed:
            high = middle
        else:
            low = middle + 1
    gone = ranking[:high]
    kept_back: list[tuple[float, int, int]] = []
    for candidate in reversed(gone):
        chosen = set(kept_back)
        if price(flags([c for c in gone if c not in chosen])) >= LEAST * allowed:
            break
        chosen.add(candidate)
        if price(flags([c for c in gone if c not in chosen])) <= allowed:
            kept_back.append(candidate)
    final = flags([c for c in gone if c not in set(kept_back)])
    return {
        group.name: tuple((~removed).nonzero().flatten().tolist()) for group, removed in zip(found, final, strict=True)
    }


def _share(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], meter: macs.Meter, dense: float) -> float:
    return macs.expected(model, loader, meter=meter).total / dense


def lower_density(
    model: nn.Module, macs_budget: float, loader: Iterable[tuple[Tensor, Tensor]], dense: float, *, floor: float = 0.0
) -> float:
    """Sets the largest density at which a gated network's expected MACs are within the budget; FBS's only knob.

    Args:
        model: a gated network; its masks stay.
        macs_budget: share of `dense`.
        loader: a fixed subset of training images.
        dense: MACs of the ungated network.
        floor: density that is not gone below.

    Returns:
        The share of the dense MACs that is reached.

    Raises:
        UnreachableError: where the density at `floor` (at least one channel per layer) costs more; it names that cost.
    """
    widest = max(layer.width for layer in afs.layers(model).values())
    meter = macs.Meter(model)
    low, high = max(1, math.floor(floor * widest + 1e-9)), widest  # every distinct k of the widest layer

    def measure(step: int) -> float:
        afs.set_density(model, step / widest)
        return _share(model, loader, meter, dense)

    reached = measure(low)
    if reached > macs_budget:
        raise UnreachableError(
            f"the budget {macs_budget:g} cannot be reached: at density {low / widest:g} the gated layers, the fixed "
            f"ones and the predictors still cost {reached:.4f} of the dense network; ask for at least that"
        )
    best = low
    while low < high:
        middle = (low + high + 1) // 2
        share = measure(middle)
        if share <= macs_budget:
            low, best, reached = middle, middle, share
        else:
            high = middle - 1
    afs.set_density(model, best / widest)
    return reached


def settle(
    model: nn.Module,
    macs_budget: float,
    loader: Iterable[tuple[Tensor, Tensor]],
    statistics: dict[str, afs.LayerStatistics],
    dense: float,
    *,
    multiple: int = 1,
    stream: str = "free",
    scores: Callable[[], Mapping[str, Tensor]] | None = None,
) -> float:
    """Brings an AFS network back between `LEAST` and all of its budget after the last step of training.

    Gates move while they train. Above the budget a few more channels go; below it the density rises, as far as there
    is something to select. [ours] Removed channels never return. A thousandth is left for rounding, since gates in
    half precision depend a little on the batch. `multiple`, `stream` and `scores` are those of `afs.update_masks`, the
    scores a function, called where channels have to go.

    Nothing is trained afterwards, so what goes here is missed. By the mean of the gates, which says little across
    layers, a channel of the stem went once, and half of the accuracy; `afs.taylor_importance` gives better scores.

    Returns:
        The share of the dense MACs that is reached.
    """
    meter = macs.Meter(model)
    share = _share(model, loader, meter, dense)
    macs_budget *= ROOM
    if share > macs_budget:
        afs.update_masks(
            model, statistics, macs_budget=macs_budget, loader=loader, delta_s=0.0, multiple=multiple, stream=stream,
            scores=None if scores is None else scores(),
        )  # fmt: skip
        share = _share(model, loader, meter, dense)
    if share < LEAST * macs_budget:
        density = next(iter(afs.layers(model).values())).density
        share = lower_density(model, macs_budget, loader, dense, floor=density)
    return share
