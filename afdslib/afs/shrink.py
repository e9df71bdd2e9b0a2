"""Which channels of a network can only go together, found by torch-pruning's dependency graph, and what each costs.

A group is a set of channels that all its layers share by position: a convolution, the batch norm behind it and the
inputs of the layers it feeds, or all the addends of a residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from afdslib.afs import macs
from afdslib.afs.graph import eval_mode, output_makers, trace
from afdslib.afs.layer import AFSConvBN
from afdslib.afs.verify import confirm, require_own_weights, sample
from afdslib.backbones import classifier_name
from afdslib.base.errors import AFDSError

__all__ = ["Cost", "Group", "Kept", "Member", "groups", "shrink"]

Kept = Mapping[str, tuple[int, ...]]
"""Per group the positions, among the dense network's channels, that a pruned network still has."""


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    Attributes:
        layer: its name.
        output: whether the channels are its outputs; else its inputs.
        positions: (root, position) pairs: the group's channel and the layer's channel.
    """

    layer: str
    output: bool
    positions: tuple[tuple[int, int], ...] = field(repr=False)


@dataclass(frozen=True)
class Group:
    """Channels that go together.

    Attributes:
        name: of the first of its convolutions (or linear layers), in the network's order.
        width: channels.
        members: the layers concerned.
    """

    name: str
    width: int
    members: tuple[Member, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The layers whose outputs they are."""
        return tuple(m.layer for m in self.members if m.output)


def _refuse(model: nn.Module) -> None:
    require_own_weights(model, "static pruning")
    for name, module in model.named_modules():
        if isinstance(module, AFSConvBN):
            raise AFDSError(f"layer {name!r} is gated; static pruning takes the plain network, before afs.convert")
        if isinstance(module, nn.Conv2d) and 1 < module.groups < module.in_channels:
            raise AFDSError(
                f"layer {name!r} is a convolution of {module.groups} groups, whose channels cannot be removed one by "
                "one; choose a network without grouped convolutions"
            )


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
    except AFDSError:
        raise
    except Exception as error:  # torch-pruning raises many types; all mean the same to the caller
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise AFDSError(
            f"torch-pruning cannot follow {type(model).__name__} ({reason}); static pruning does not work on it"
        ) from error
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def groups(model: nn.Module, size: tuple[int, int, int]) -> list[Group]:
    """The groups of a plain network in its order, without the classifier's outputs.

    Args:
        model: a network of convolutions, batch norms and linear layers.
        size: (3, H, W) of its images.

    Raises:
        AFDSError: for a gated network, grouped convolutions, or one that torch-pruning cannot follow.
    """
    _refuse(model)
    graph = _graph(model, size)
    names = {module: name for name, module in model.named_modules()}
    order = {name: position for position, name in enumerate(names.values())}
    fixed = _fixed(model)
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


def _fixed(model: nn.Module) -> set[str]:
    """The layers whose outputs are the network's: their channels are classes."""
    try:
        return output_makers(trace(model), dict(model.named_modules()))
    except AFDSError:  # torch.fx cannot follow what torch-pruning perhaps can
        return {classifier_name(model)}


def _width(layer: nn.Module, output: bool) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels if output else layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features if output else layer.in_features
    return layer.num_features  # type: ignore[return-value]


@torch.no_grad()
def _silence(model: nn.Module, group: Group, gone: list[int]) -> None:
    """Sets some channels of a group to zero, in place."""
    roots = set(gone)
    for member in group.members:
        layer: Any = model.get_submodule(member.layer)
        places = [place for root, place in member.positions if root in roots]
        if member.output:
            for values in (layer.weight, layer.bias, getattr(layer, "running_mean", None)):
                if values is not None:
                    values[places] = 0


def shrink(model: nn.Module, kept: Kept, size: tuple[int, int, int] | None = None) -> nn.Module:
    """A copy of a network with only some channels of each group.

    Its `architecture["kept"]` says which ones of the dense network's, so that `afs.save` and `afs.load` work.

    Args:
        model: plain, dense or pruned before.
        kept: positions among the PRESENT channels by group; groups that are not named keep all.
        size: (3, H, W) for tracing; the positions do not depend on it.

    Raises:
        AFDSError: for an unknown group, positions out of range, a group left without a channel, weights that a layer
            does not own, or a result that is not the network with those channels at zero.
    """
    size = size or _tracing_size(model)
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
    modes = {n: m.training for n, m in pruned.named_modules()}
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
    for name, mode in modes.items():
        pruned.get_submodule(name).training = mode
    architecture = getattr(model, "architecture", None)
    if isinstance(architecture, dict):
        before = architecture.get("kept") or {name: list(range(group.width)) for name, group in found.items()}
        after = {name: [before[name][p] for p in kept.get(name, range(found[name].width))] for name in found}
        pruned.architecture = {**architecture, "kept": after}  # type: ignore[assignment]
    return pruned


def _tracing_size(model: nn.Module) -> tuple[int, int, int]:
    architecture = getattr(model, "architecture", None) or {}
    small = architecture.get("stem") == "cifar" or str(architecture.get("name", "")).startswith("wrn")
    return (3, 32, 32) if small else (3, 64, 64)


@dataclass(frozen=True)
class _Layer:
    per_pair: float
    inputs: int
    outputs: int
    depthwise: bool


class Cost:
    """MACs of a network as a function of the channels removed from it, equal to `macs.count` of the shrunken network.

    Args:
        model: the network.
        found: its groups.
        size: (3, H, W).
    """

    def __init__(self, model: nn.Module, found: list[Group], size: tuple[int, int, int]):
        self._layers: dict[str, _Layer] = {}
        by_layer = macs.count(model, size).by_layer
        for name, total in by_layer.items():
            module = model.get_submodule(name)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                inputs, outputs = _width(module, False), _width(module, True)
            else:
                inputs = outputs = 1  # what no layer of a group does costs the same for all
            depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
            per_pair = total / (outputs if depthwise else inputs * outputs)
            self._layers[name] = _Layer(per_pair, inputs, outputs, depthwise)
        # What one channel of a group takes from each layer: (inputs, outputs).
        self._takes: list[list[tuple[str, bool, Tensor]]] = []
        for group in found:
            takes = []
            for member in group.members:
                if member.layer in self._layers:
                    counts = torch.zeros(group.width, dtype=torch.int64)
                    for root, _ in member.positions:
                        counts[root] += 1
                    takes.append((member.layer, member.output, counts))
            self._takes.append(takes)
        self.dense = self(())

    def __call__(self, removed: tuple[Tensor, ...] | list[Tensor] | tuple[()]) -> float:
        """MACs once the flagged channels (bool (C,) by group) are gone."""
        inputs = {name: layer.inputs for name, layer in self._layers.items()}
        outputs = {name: layer.outputs for name, layer in self._layers.items()}
        for flags, takes in zip(removed, self._takes, strict=False):
            for name, output, counts in takes:
                (outputs if output else inputs)[name] -= int(counts[flags].sum())
        return sum(
            layer.per_pair * outputs[name] * (1 if layer.depthwise else inputs[name])
            for name, layer in self._layers.items()
        )
