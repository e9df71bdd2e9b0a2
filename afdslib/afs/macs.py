"""Multiply-accumulate operations (MACs) of dense and of gated networks, with one rule for all methods.

Convolutions and matrix products count, as torch's own counter does; batch norm, ReLU and pooling do not; 1 MAC is one
multiply-accumulate. A gated layer costs, per image, H'W' k^2 (active inputs) (active outputs), and the mean over images
is that of the product, plus the predictors: active inputs times living dynamic outputs. [ours, method: MACs] Groups
count padded to equal sizes, as a compact network runs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from afdslib.afs.channels import GroupedConv2d
from afdslib.afs.graph import called, cost, eval_mode, propagate, shapes, trace
from afdslib.afs.layer import AFSConvBN
from afdslib.base.errors import AFDSError

__all__ = ["MACs", "Meter", "count", "expected", "parameters"]


@dataclass(frozen=True)
class MACs:
    """Multiply-accumulates per image."""

    total: float  # of all layers, predictors included
    by_layer: dict[str, float] = field(repr=False)  # convolutions and linear layers by name, without predictors
    predictors: float = 0.0  # the gates' linear layers, part of total


def count(model: nn.Module, input_size: tuple[int, int, int]) -> MACs:
    """MACs of the dense network for one image, by torch's own counter: all that it runs but the gates' predictors.

    An AFS network is counted as its ungated twin; `input_size` is (3, H, W). For torchvision's ResNets this equals
    their `weights.meta["_ops"]`.
    """
    if len(input_size) != 3 or min(input_size) < 1:
        raise AFDSError(f"input_size must be (channels, height, width), got {tuple(input_size)}")
    parameter = next(model.parameters())
    with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    done = {n: sum(ops.values()) // 2 for n, ops in counter.get_flop_counts().items() if n != "Global"}
    own = dict(done)  # what a module runs itself, outside its children
    for name, value in done.items():
        while name := name.rpartition(".")[0]:
            if name in done:
                own[name] -= value
                break
    modules = dict(model.named_modules())
    by_layer: dict[str, int] = {}
    for name, value in own.items():
        layer = name.removeprefix(type(model).__name__).removeprefix(".")
        if not value or isinstance(modules[layer], AFSConvBN):
            continue  # the predictor
        # A convolution inside an AFS layer goes by the layer's name: dense and gated counts compare by name.
        while layer.endswith(".conv") and isinstance(modules[layer[:-5]], (AFSConvBN, GroupedConv2d)):
            layer = layer[:-5]
        by_layer[layer] = by_layer.get(layer, 0) + value
    return MACs(sum(by_layer.values()), dict(by_layer))


class Meter:
    """Adds up the MACs that single images cost while batches pass through a network in eval mode.

    Use it around forward passes that are made anyway: `with Meter(model) as meter: model(images)`, then `meter.macs()`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._graph = trace(model)
        self._modules = dict(model.named_modules())
        self._seen: Any = None
        self._input_size: tuple[int, int, int] = (0, 0, 0)
        self._active: dict[str, Tensor] = {}
        self._handles = ExitStack()
        self.reset()

    def reset(self) -> None:
        """Forgets what has been counted, for another measurement of the same network."""
        self._sums: dict[str, float] = {}
        self._predictors, self._images = 0.0, 0

    def __enter__(self) -> Meter:
        for name, module in self._modules.items():
            if isinstance(module, AFSConvBN):
                self._handles.enter_context(module.register_forward_hook(partial(self._record, name)))
        self._handles.enter_context(self.model.register_forward_hook(self._count))
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.close()

    def _record(self, name: str, module: AFSConvBN, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._active[name] = module.gates(args[0]).active.double()

    @torch.no_grad()
    def _count(self, model: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        active, size = dict(self._active), tuple(args[0].shape[1:])
        if size != self._input_size:
            self._input_size = size  # type: ignore[assignment]
            self._seen = cost(model, self._graph, self._input_size)
        shapes, dense, batch = self._seen.shapes, self._seen.macs, args[0].shape[0]
        for node, entering, leaving in propagate(self._graph, self._modules, active, shapes):
            module = called(node, self._modules)
            entering = None if entering is None else entering.expand(batch, -1)
            if isinstance(module, AFSConvBN):
                inputs = batch * module.conv.in_channels if entering is None else float(entering.sum())
                self._predictors += inputs * float((module.m * module.s).sum())
                self._add(node, _conv_macs(module.conv, entering, leaving, batch, shapes[node.name]))
            elif isinstance(module, (nn.Conv2d, GroupedConv2d)) and entering is not None:
                self._add(node, _conv_macs(module, entering, None, batch, shapes[node.name]))
            elif isinstance(module, nn.Linear) and entering is not None:
                self._add(node, float(entering.sum()) * module.out_features)
            elif dense[node.name]:
                self._add(node, batch * dense[node.name])
        self._images += batch

    def _add(self, node: fx.Node, value: float) -> None:
        owners = list((node.meta.get("nn_module_stack") or {}).values())
        name = str(node.target) if node.op == "call_module" else owners[-1][0] if owners else ""
        self._sums[name] = self._sums.get(name, 0.0) + value

    def macs(self) -> MACs:
        """Mean per image over all images that have passed; an AFDSError if none has."""
        if not self._images:
            raise AFDSError("no image has passed through the network, so it has no mean MACs; the loader is empty")
        by_layer = {name: value / self._images for name, value in self._sums.items()}
        predictors = self._predictors / self._images
        return MACs(sum(by_layer.values()) + predictors, by_layer, predictors)


def _conv_macs(conv: Any, entering: Tensor | None, leaving: Tensor | None, batch: int, shape: tuple[int, ...]) -> float:
    """Sum over the batch of H'W' k^2 * sum over groups of (active inputs * active outputs), groups of equal size."""
    if isinstance(conv, GroupedConv2d):
        entering, leaving = conv.slots(entering, leaving)
        conv = conv.conv
    per_pair = shape[2] * shape[3] * conv.kernel_size[0] * conv.kernel_size[1]
    inputs, outputs = (
        torch.full((1, conv.groups), float(width // conv.groups), device=conv.weight.device)
        if active is None else active.reshape(active.shape[0], conv.groups, -1).sum(2)
        for active, width in ((entering, conv.in_channels), (leaving, conv.out_channels))
    )  # fmt: skip
    inputs, outputs = inputs.double(), outputs.double()
    if conv.groups == 1:
        pairs = inputs * outputs
    else:
        # Groups without outputs go, and the others are as large as the largest of them; see compact.
        inputs = torch.where(outputs > 0, inputs, 0.0)
        pairs = (outputs > 0).sum(1) * inputs.amax(1).clamp_min(1) * outputs.amax(1)
    return per_pair * float(pairs.expand(batch, *pairs.shape[1:]).sum(dtype=torch.float64))


def expected(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, meter: Meter | None = None) -> MACs:
    """Measured MACs of a gated network: the mean over the loader's images of what each image costs.

    The network's mode is restored; labels are not used; a meter made for this network before saves the tracing. An
    empty loader is an AFDSError.
    """
    device = next(model.parameters()).device
    meter = Meter(model) if meter is None else meter
    meter.reset()
    with eval_mode(model), torch.no_grad(), meter:
        for images, _ in loader:
            model(images.to(device))
    return meter.macs()


@torch.no_grad()
def parameters(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Parameters that remain once channels with m = 0 are cut out, with the inputs they fed and their predictors.

    A static channel has its constant gamma in place of predictor entries. A plain network has all its parameters.
    """
    graph, modules = trace(model), dict(model.named_modules())
    masks = {n: module.m[None].double() for n, module in modules.items() if isinstance(module, AFSConvBN)}
    node_shapes = shapes(model, graph, input_size)
    total = 0.0
    for node, entering, leaving in propagate(graph, modules, masks, node_shapes):
        module = called(node, modules)
        if isinstance(module, AFSConvBN):
            conv, alive = module.conv, float(module.m.sum())
            dynamic = float((module.m * module.s).sum())
            inputs = conv.in_channels if entering is None else float((entering > 0).sum())
            total += _conv_macs(conv, entering, leaving, 1, (1, 1, 1, 1))
            total += alive if any(n.endswith("bias") for n, _ in conv.named_parameters()) else 0
            total += dynamic * (inputs + 1) + (alive - dynamic) + alive
        elif isinstance(module, (nn.Conv2d, GroupedConv2d)):
            total += _conv_macs(module, entering, None, 1, (1, 1, 1, 1))
            total += module.out_channels if any(n.endswith("bias") for n, _ in module.named_parameters()) else 0
        elif isinstance(module, nn.Linear):
            inputs = module.in_features if entering is None else float((entering > 0).sum())
            total += inputs * module.out_features + (module.out_features if module.bias is not None else 0)
        elif module is not None:
            total += sum(p.numel() for p in module.parameters())
    return round(total)

