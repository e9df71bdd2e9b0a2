"""Which channels of a network can only go together, found by torch-pruning's dependency graph, and what each costs.

A group is a set of channels that all its layers share by position: a convolution, the batch norm behind it and the
inputs of the layers it feeds, or all the addends of a residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from afdslib.afs import macs
from afdslib.afs.graph import eval_mode, output_makers, trace, usual_size
from afdslib.afs.layer import AFSConvBN
from afdslib.afs.verify import confirm, require_own_weights, sample
from afdslib.backbones import classifier_name
from afdslib.base.errors import AFDSError

__all__ = ["Cost", "Group", "Kept", "Member", "groups", "shrink"]

Kept = Mapping[str, tuple[int, ...]]
"""Per group the positions, among the dense network's channels, that a pruned network still has."""


@dataclass(frozen=True)
class Member:
    """One layer's outputs, or inputs, in a group; the pairs are the group's channel and the layer's channel."""

    layer: str
    output: bool
    positions: tuple[tuple[int, int], ...] = field(repr=False)


@dataclass(frozen=True)
class Group:
    """So many channels that go together, named by the first of their convolutions or linear layers."""

    name: str
    width: int
    members: tuple[Member, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The layers whose outputs they are."""
        return tuple(m.layer for m in self.members if m.output)


def _graph(model: nn.Module, size: tuple[int, int, int]):
    """torch-pruning's graph of a network; its forward pass is made in eval mode."""
    import torch_pruning

    parameter = next(model.parameters())
    image = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with eval_mode(model), torch.enable_grad():
            model.requires_grad_(True)  # the graph is read from the gradient's functions
            return torch_pruning.DependencyGraph().build_dependency(model, image, verbose=False)
    except Exception as error:  # torch-pruning raises many types; all mean the same to the caller
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise AFDSError(
            f"torch-pruning cannot follow {type(model).__name__} ({reason}); static pruning does not work on it"
        ) from error
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def groups(model: nn.Module, size: tuple[int, int, int]) -> list[Group]:
    """The groups of a plain network in its order, without its outputs; `size` is (3, H, W) of its images.

    Raises:
        AFDSError: for a gated network, grouped convolutions, or one that torch-pruning cannot follow.
    """
    require_own_weights(model, "static pruning")
    for name, module in model.named_modules():
        if isinstance(module, AFSConvBN):
            raise AFDSError(f"layer {name!r} is gated; static pruning takes the plain network, before afs.convert")
        if isinstance(module, nn.Conv2d) and 1 < module.groups < module.in_channels:
            raise AFDSError(
                f"layer {name!r} is a convolution of {module.groups} groups, whose channels cannot be removed one by "
                "one; choose a network without grouped convolutions"
            )
    graph = _graph(model, size)
    names = {module: name for name, module in model.named_modules()}
    order = {name: position for position, name in enumerate(names.values())}
    try:
        fixed = output_makers(trace(model), dict(model.named_modules()))  # whose channels are classes
    except AFDSError:  # torch.fx cannot follow what torch-pruning perhaps can
        fixed = {classifier_name(model)}
    found = []
    for raw in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        members = []
        for item in raw.items:
            module = item.dep.target.module
            if module not in names or not isinstance(module, (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)):
                continue
            output = bool(graph.is_out_channel_pruning_fn(item.dep.handler))
            pairs = tuple(zip(map(int, item.root_idxs), map(int, item.idxs), strict=True))
            members.append(Member(names[module], output, pairs))
        members.sort(key=lambda m: (order[m.layer], m.output))
        makers = [m for m in members if m.output and not isinstance(model.get_submodule(m.layer), nn.BatchNorm2d)]
        if any(m.layer in fixed for m in makers) or not makers:
            continue
        width = len(makers[0].positions)
        for m in members:
            limit = _width(model.get_submodule(m.layer), m.output)
            if any(root >= width or place >= limit for root, place in m.positions):
                raise AFDSError(
                    f"torch-pruning cannot follow {type(model).__name__}: it finds channels of layer {m.layer!r} that "
                    "do not exist; static pruning does not work on it"
                )
        found.append(Group(makers[0].layer, width, tuple(members)))
    found.sort(key=lambda group: order[group.name])
    if not found:
        raise AFDSError(f"{type(model).__name__} has no channel that can be removed; choose a convolutional network")
    return found


def _width(layer: nn.Module, output: bool) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels if output else layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features if output else layer.in_features
    return layer.num_features  # type: ignore[return-value]


@torch.no_grad()
def _silence(model: nn.Module, group: Group, gone: list[int]) -> None:
    """Sets some channels of a group to zero, in place."""
    for member in (m for m in group.members if m.output):
        layer: Any = model.get_submodule(member.layer)
        places = [place for root, place in member.positions if root in set(gone)]
        for values in (layer.weight, layer.bias, getattr(layer, "running_mean", None)):
            if values is not None:
                values[places] = 0


def shrink(model: nn.Module, kept: Kept, size: tuple[int, int, int] | None = None) -> nn.Module:
    """A copy of a network with only some channels of each group; its `architecture["kept"]` says which.

    Args:
        model: plain, dense or pruned before.
        kept: positions among the PRESENT channels by group; groups that are not named keep all.
        size: (3, H, W) for tracing; the positions do not depend on it.

    Raises:
        AFDSError: for an unknown group, positions out of range, a group left without a channel, weights that a layer
            does not own, or a result that is not the network with those channels at zero.
    """
    size = size or usual_size(model, 64)
    pruned = copy.deepcopy(model)
    found = {group.name: group for group in groups(pruned, size)}
    for name, positions in kept.items():
        if name not in found:
            raise AFDSError(f"{type(model).__name__} has no group of channels {name!r}; it has {', '.join(found)}")
        if not positions or sorted(set(positions)) != list(positions) or not 0 <= positions[-1] < found[name].width:
            raise AFDSError(
                f"the kept channels of {name!r} must be increasing positions below {found[name].width}, at least one"
            )
    graph = _graph(pruned, size)
    removed = {name: sorted(set(range(g.width)) - set(kept.get(name, range(g.width)))) for name, g in found.items()}
    for name, gone in removed.items():
        _silence(pruned, found[name], gone)
    silenced = sample(pruned, size)
    for name, gone in removed.items():
        if gone:
            module = pruned.get_submodule(name)
            handler = graph.get_pruner_of_module(module).prune_out_channels
            graph.get_pruning_group(module, handler, gone).prune(record_history=False)
    confirm(silenced, pruned, "static pruning")
    for parameter in pruned.parameters():
        parameter.grad = None
    architecture = getattr(model, "architecture", None)
    if isinstance(architecture, dict):
        before = architecture.get("kept") or {name: list(range(group.width)) for name, group in found.items()}
        after = {name: [before[name][p] for p in kept.get(name, range(found[name].width))] for name in found}
        pruned.architecture = {**architecture, "kept": after}  # type: ignore[assignment]
    return pruned


class Cost:
    """MACs of a network as a function of the channels removed from its groups, equal to `macs.count` once shrunken."""

    def __init__(self, model: nn.Module, found: list[Group], size: tuple[int, int, int]):
        self._per_pair: dict[str, float] = {}
        self._widths: dict[tuple[str, bool], int] = {}  # inputs (1 of a depthwise convolution) and outputs
        for name, total in macs.count(model, size).by_layer.items():
            module = model.get_submodule(name)
            inputs = outputs = 1  # what no layer of a group does costs the same for all
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
                inputs, outputs = 1 if depthwise else _width(module, False), _width(module, True)
            self._widths |= {(name, False): inputs, (name, True): outputs}
            self._per_pair[name] = total / (inputs * outputs)
        # What each channel of a group takes from the inputs or outputs of a layer.
        self._takes: list[list[tuple[tuple[str, bool], Tensor]]] = []
        for group in found:
            counted = [m for m in group.members if m.layer in self._per_pair]
            counted = [m for m in counted if m.output or getattr(model.get_submodule(m.layer), "groups", 1) == 1]
            roots = [torch.tensor([root for root, _ in m.positions]) for m in counted]
            counts = [torch.bincount(each, minlength=group.width) for each in roots]
            self._takes.append([((m.layer, m.output), each) for m, each in zip(counted, counts, strict=True)])
        self.dense = self(())

    def __call__(self, removed: Sequence[Tensor]) -> float:
        """MACs once the flagged channels (bool (C,) by group) are gone."""
        widths = dict(self._widths)
        for flags, takes in zip(removed, self._takes, strict=False):
            for side, counts in takes:
                widths[side] -= int(counts[flags].sum())
        return sum(each * widths[name, True] * widths[name, False] for name, each in self._per_pair.items())
