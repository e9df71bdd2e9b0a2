"""The strongest simple rival: the same network with fewer channels everywhere, trained on the source at that width."""

from __future__ import annotations

import functools

import torch
from torch import nn

from afdslib import backbones
from afdslib.afs import macs
from afdslib.base.errors import UnreachableError

__all__ = ["fitting_width", "network_macs"]


@functools.lru_cache(maxsize=4096)
def network_macs(name: str, stem: str, width: float, classes: int, size: tuple[int, int, int]) -> float:
    """MACs of a backbone at a width, for one image."""
    state = torch.get_rng_state()
    try:
        model: nn.Module = backbones.build(name, classes, stem=stem, width=width)
        return macs.count(model, size).total
    finally:
        torch.set_rng_state(state)  # counting draws nothing


def fitting_width(
    name: str, stem: str, width: float, classes: int, size: tuple[int, int, int], macs_budget: float
) -> float:
    """The largest width whose MACs are within a share of those at the given width.

    MACs grow in steps, as channel counts are whole; the share that is reached can be some points below the budget.

    Args:
        name: of the backbone.
        stem: see `backbones.build`.
        width: of the dense network.
        classes: of the classifier.
        size: (3, H, W).
        macs_budget: in (0, 1].

    Returns:
        The width, a multiple of 1/1024 of the given one.

    Raises:
        UnreachableError: where even one channel per layer costs more; it names that cost.
    """
    dense = network_macs(name, stem, width, classes, size)
    low, high = 1, 1024
    least = network_macs(name, stem, width / 1024, classes, size) / dense
    if least > macs_budget:
        raise UnreachableError(
            f"the budget {macs_budget:g} cannot be reached: the narrowest {name} costs {least:.4f} of the dense "
            "network; ask for at least that"
        )
    while low < high:
        middle = (low + high + 1) // 2
        if network_macs(name, stem, width * middle / 1024, classes, size) <= macs_budget * dense:
            low = middle
        else:
            high = middle - 1
    return width * low / 1024
