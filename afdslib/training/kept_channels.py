"""Which channels of the source a pruned network still has, layer by layer, so that like is compared with like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afdslib.afs.shrink import Kept, groups, shrink
from afdslib.backbones import classifier_name
from afdslib.base.errors import AFDSError
from afdslib.training.features import feature_shapes

__all__ = ["Channels", "matching"]


@dataclass(frozen=True)
class Channels:
    """Which of the source's channels a statically pruned network still has."""

    reference: nn.Module  # the source with only those channels: parameters compare one by one with the pruned network's
    # Positions among the source's channels, (C',) int64, of each tapped layer's output and of the classifier's inputs.
    kept: Mapping[str, Tensor]
    inputs: tuple[str, int]  # of the source's classifier: its name, and how many there are

    def widened(self, features: Tensor, name: str, width: int) -> Tensor:
        """(B, C', ...) of a layer at its places among the source's (B, C, ...), zeros elsewhere."""
        full = features.new_zeros(features.shape[0], width, *features.shape[2:])
        return full.index_copy(1, self.kept[name].to(features.device), features)

    def flags(self, name: str, width: int) -> Tensor:
        """bool (C,): which of the source's channels of a layer the pruned network still has."""
        return torch.zeros(width, dtype=torch.bool).index_fill(0, self.kept[name], True)


def matching(source: nn.Module, kept: Kept, names: Iterable[str], size: tuple[int, int, int]) -> Channels:
    """The source's channels that a network pruned from it still has.

    Args:
        source: the dense source network.
        kept: positions among its channels, by group: `architecture["kept"]` of the pruned network.
        names: tapped layers, or blocks of layers.
        size: (3, H, W).

    Raises:
        AFDSError: where a tapped layer's channels do not all belong to one group.
    """
    members = [(m, set(kept.get(g.name, range(g.width)))) for g in groups(source, size) for m in g.members]
    names, order = list(names), [n for n, _ in source.named_modules()]
    shapes = feature_shapes(source, names, size) if names else {}
    positions = {}
    for name in names:
        # Its outputs are those of the last layer inside it (or before it) that fits.
        makers = {m.layer: (m, alive) for m, alive in members if m.output and len(m.positions) == shapes[name][0]}
        inside = [n for n in makers if n == name or n.startswith(f"{name}.")]
        candidates = inside or [n for n in makers if order.index(n) < order.index(name)]
        if not candidates:
            kind = type(source).__name__
            raise AFDSError(f"it cannot be told which channels of {name!r} a pruned {kind} has; use l2 or l2sp on it")
        member, alive = makers[max(candidates, key=order.index)]
        positions[name] = torch.tensor(sorted(p for root, p in member.positions if root in alive))
    head = classifier_name(source)
    entering = [(m, alive) for m, alive in members if m.layer == head and not m.output]
    gone = {p for m, alive in entering for root, p in m.positions if root not in alive}
    width = int(source.get_submodule(head).in_features)  # type: ignore[arg-type]
    positions[head] = torch.tensor([p for p in range(width) if p not in gone])
    return Channels(shrink(source, kept, size), positions, (head, width))
