"""Budgets of MACs met by one threshold for the whole network, by a density, or by a width."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from afdslib import afs, backbones
from afdslib.afs import macs
from afdslib.afs.shrink import Cost, Group, Kept
from afdslib.base.errors import UnreachableError

__all__ = ["LEAST", "ROOM", "choose", "fitting_side", "fitting_width", "lower_density", "network_macs", "settle"]

LEAST = 0.98
"""A budget counts as met between this share of it and all of it."""
ROOM = 0.999

Channel = tuple[float, int, int]  # score, group, position


def _unreachable(macs_budget: float, why: str, share: float) -> UnreachableError:
    """The error for a budget below `share`, what the smallest network costs."""
    return UnreachableError(
        f"the budget {macs_budget:g} cannot be reached: {why} {share:.4f} of the dense network; ask for at least that"
    )


def choose(
    model: nn.Module, found: list[Group], scores: list[Tensor | None], macs_budget: float, size: tuple[int, int, int],
    *, dense: float | None = None,
) -> Kept:  # fmt: skip
    """The channels to keep: the least important ones of the whole network go until the MACs meet the budget.

    Each group keeps its most important channel. Where the last removal overshoots, the most important of the removed
    channels that still fit come back until `LEAST` of the budget is used. [ours] Ties: (score, group, position).

    Args:
        found: the groups of the model, a plain network.
        scores: by group, from `criteria.scores`; a group without scores stays whole.
        macs_budget: share of `dense`, MACs per (3, H, W) image; default: the model's own.

    Raises:
        UnreachableError: for a budget below what one channel per group and the fixed layers cost; it names that.
    """
    price = Cost(model, found, size)
    dense = price.dense if dense is None else dense
    allowed = macs_budget * dense * (1 + 1e-9)
    ranking: list[Channel] = []
    for position, values in enumerate(scores):
        if values is not None:
            ranking += sorted((float(v), position, c) for c, v in enumerate(values.tolist()))[:-1]
    ranking.sort()

    def flags(gone: Iterable[Channel]) -> list[Tensor]:
        removed = [torch.zeros(group.width, dtype=torch.bool) for group in found]
        for _, position, channel in gone:
            removed[position][channel] = True
        return removed

    least = price(flags(ranking))
    if least > allowed:
        why = "the layers that stay whole and one channel of each other layer cost"
        raise _unreachable(macs_budget, why, least / dense)
    fewest = bisect_left(range(len(ranking)), True, key=lambda count: price(flags(ranking[:count])) <= allowed)
    gone = set(ranking[:fewest])
    for candidate in reversed(ranking[:fewest]):
        if price(flags(gone)) >= LEAST * allowed:
            break
        if price(flags(gone - {candidate})) <= allowed:
            gone.remove(candidate)
    return {
        group.name: tuple((~removed).nonzero().flatten().tolist())
        for group, removed in zip(found, flags(gone), strict=True)
    }


def lower_density(
    model: nn.Module, macs_budget: float, loader: Iterable[tuple[Tensor, Tensor]], dense: float, *, floor: float = 0.0
) -> float:
    """Sets the largest density at which a gated network's expected MACs are within the budget; FBS's only knob.

    Returns:
        The share of `dense`, the ungated network's MACs, that is reached on the loader, a fixed subset of training
        images.

    Raises:
        UnreachableError: where the density at `floor` (at least one channel per layer) costs more; it names that cost.
    """
    widest = max(layer.width for layer in afs.layers(model).values())
    low = max(1, math.floor(floor * widest + 1e-9))
    meter, shares = macs.Meter(model), {}

    def fits(step: int) -> bool:
        afs.set_density(model, step / widest)
        shares[step] = macs.expected(model, loader, meter=meter).total / dense
        return shares[step] <= macs_budget

    if not fits(low):
        why = f"at density {low / widest:g} the gated layers, the fixed ones and the predictors still cost"
        raise _unreachable(macs_budget, why, shares[low])
    # Every distinct number of channels of the widest layer, from the largest down.
    best = widest - bisect_left(range(widest, low, -1), True, key=fits)
    afs.set_density(model, best / widest)
    return shares[best]


def settle(
    model: nn.Module, macs_budget: float, loader: Iterable[tuple[Tensor, Tensor]],
    statistics: dict[str, afs.LayerStatistics], dense: float, *, multiple: int = 1, stream: str = "free",
    scores: Callable[[], Mapping[str, Tensor]] | None = None,
) -> float:  # fmt: skip
    """Brings an AFS network back between `LEAST` and all of its budget after the last step of training.

    Gates move while they train. Above the budget a few more channels go, never to return; below it the density rises,
    as far as there is something to select. [ours] A thousandth is left for rounding, since gates in half precision
    depend a little on the batch. `multiple`, `stream` and `scores` are those of `afs.update_masks`, the scores a
    function, called where channels have to go. Nothing is trained afterwards: by the mean of the gates, which says
    little across layers, a channel of the stem went once, and half of the accuracy; `afs.taylor_importance` is better.

    Returns:
        The share of the dense MACs that is reached.
    """
    meter = macs.Meter(model)
    share = macs.expected(model, loader, meter=meter).total / dense
    macs_budget *= ROOM
    if share > macs_budget:
        afs.update_masks(
            model, statistics, macs_budget=macs_budget, loader=loader, delta_s=0.0, multiple=multiple, stream=stream,
            scores=None if scores is None else scores(),
        )  # fmt: skip
        share = macs.expected(model, loader, meter=meter).total / dense
    if share < LEAST * macs_budget:
        density = next(iter(afs.layers(model).values())).density
        share = lower_density(model, macs_budget, loader, dense, floor=density)
    return share


@functools.lru_cache(maxsize=4096)
def network_macs(name: str, stem: str, width: float, classes: int, size: tuple[int, int, int]) -> float:
    """MACs of a backbone at a width, for one image."""
    state = torch.get_rng_state()
    try:
        return macs.count(backbones.build(name, classes, stem=stem, width=width), size).total
    finally:
        torch.set_rng_state(state)  # counting draws nothing


def fitting_width(
    name: str, stem: str, width: float, classes: int, size: tuple[int, int, int], macs_budget: float
) -> float:
    """The largest width whose MACs are within a share of those at the given width, a multiple of 1/1024 of it.

    So the same network with fewer channels everywhere, the strongest simple rival. MACs grow in steps, as channel
    counts are whole; the share that is reached can be some points below the budget. `size` is (3, H, W).

    Raises:
        UnreachableError: where even one channel per layer costs more; it names that cost.
    """
    dense = network_macs(name, stem, width, classes, size)
    least = network_macs(name, stem, width / 1024, classes, size) / dense
    if least > macs_budget:
        raise _unreachable(macs_budget, f"the narrowest {name} costs", least)

    def fits(step: int) -> bool:
        return network_macs(name, stem, width * step / 1024, classes, size) <= macs_budget * dense

    return width * (1024 - bisect_left(range(1024, 1, -1), True, key=fits)) / 1024


def fitting_side(
    name: str, stem: str, width: float, classes: int, size: tuple[int, int, int], macs_budget: float
) -> int:
    """The largest side of square images at which a network's MACs are within a share of those at `size`.

    Arguments as for `fitting_width`; layers round their sizes up, so the share that is reached can be far below.

    Raises:
        UnreachableError: no side of at least 8 pixels is within it.
    """
    dense = network_macs(name, stem, width, classes, size)
    for side in range(min(size[1], math.ceil(size[1] * math.sqrt(macs_budget)) + 4), 7, -1):
        if network_macs(name, stem, width, classes, (3, side, side)) <= macs_budget * dense:
            return side
    raise UnreachableError(f"the budget {macs_budget:g} cannot be reached by smaller images; ask for more")
