"""Dynamic execution: a gated network that computes, for each image, only the channels that its gates keep.

The gates of a layer need its pooled input only, so they come first; then our C++ kernel convolves the kept output
channels with the input channels that are there. Between the layers of a block only kept channels exist, as maps and
their channel numbers; the last convolution of a block adds its own to the residual stream. Where no compiler is found,
or the kernel does not suit a layer, the layer is masked. Gathering weights with torch's operations was measured, too,
and was slower than the kernel or than masking (data/results/speed/dynamic.csv). [ours]
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from afdslib import afs
from afdslib.afs.channels import Join, Spread
from afdslib.afs.graph import is_add, keeps_channels, keeps_channels_call, shapes, trace
from afdslib.afs.layer import AFSConvBN
from afdslib.base.errors import AFDSError
from afdslib.inference import kernels
from afdslib.inference.gates import inference
from afdslib.inference.timing import interleave

__all__ = ["ROUNDING", "TOLERANCE", "WAYS", "DynamicNetwork", "dynamic", "margins"]

WAYS = ("kernel", "mask")
TOLERANCE = 1e-4
"""What dynamic outputs may differ by from masked ones: max|a-b| / max|b|."""
ROUNDING = 2e-6
"""Margins of a selection below this are float32's rounding in a deep network."""

# In eval mode these return their input.
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)


@torch.no_grad()
def _static_layer(conv: nn.Conv2d) -> AFSConvBN:
    """A convolution without gates as a selected one whose channels are all static."""
    bare = copy.deepcopy(conv)
    bare.bias = None
    norm = nn.BatchNorm2d(conv.out_channels, affine=False)
    norm.running_var.sub_(norm.eps)  # type: ignore[union-attr]
    layer = AFSConvBN(bare, norm)
    layer.s.zero_()
    if conv.bias is not None:
        layer.beta.copy_(conv.bias)
    return layer.eval()


# ------------------------------------------------------------------------------------------------ the graph of kernels


@dataclass
class _Maps:
    """What stands for a node's maps in the graph of kernels.

    Attributes:
        values: the node of the maps (1, n, H, W).
        index: the node of their channel numbers, or None for all channels.
        channels: of the whole map.
        owner: the values were computed here and have no other name, so the last reader may write to them.
        rectified: the values are known to be at least 0.
    """

    values: fx.Node
    index: fx.Node | None = None
    channels: int = 0
    owner: bool = False
    rectified: bool = False


def _whole(values: Tensor, index: Tensor, channels: int) -> Tensor:
    """The map of all channels, zero where there are none."""
    return values.new_zeros(1, channels, *values.shape[2:]).index_copy_(1, index, values)


def _pool(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def _contiguous_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _is_relu(node: fx.Node, module: nn.Module | None) -> bool:
    called = node.op == "call_function" and node.target in (F.relu, torch.relu)
    return isinstance(module, nn.ReLU) or called or (node.op == "call_method" and node.target in ("relu", "relu_"))


class _Builder:
    """Writes the graph that runs a network on one image by kernels.

    Args:
        model: the gated network in eval mode.
        input_size: (3, H, W).
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]) -> None:
        self.source = trace(model)
        self.shapes = shapes(model, self.source, input_size)
        self.modules = dict(model.named_modules())
        self.root = inference(model)
        self.graph = fx.Graph()
        self.maps: dict[fx.Node, _Maps] = {}
        self.pooled: dict[fx.Node, fx.Node] = {}
        self.ways: dict[str, str] = {}
        self.last = {n: user for user in self.source.nodes for n in user.all_input_nodes}

    def build(self) -> fx.GraphModule:
        for node in self.source.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._whole))
            else:
                self.maps[node] = self._node(node)
        module = fx.GraphModule(self.root, self.graph, "DynamicPlan")
        module.graph.eliminate_dead_code()
        module.recompile()
        return module.eval().requires_grad_(False)

    def _node(self, node: fx.Node) -> _Maps:
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        inputs = node.all_input_nodes
        if isinstance(module, AFSConvBN):
            return self._gated(node, module)
        if isinstance(module, Join):
            both = zip(node.args, (module.left, module.right), strict=True)
            return self._added(node, *(self._moved(n, places, module.width, node) for n, places in both))
        if isinstance(module, Spread):
            return self._moved(inputs[0], module.index, module.width, node)
        if is_add(node) and len(inputs) == len(node.args) == 2 and not node.kwargs and self._are_maps(*inputs):
            return self._added(node, *(self._addend(n, node) for n in inputs))
        if kernels.suits(module) and self.maps[inputs[0]].index is not None:
            # Without gates, but behind a layer with gates: only the channels that are there are read.
            return self._kernel(node, _static_layer(module))  # type: ignore[arg-type]
        shape = self.shapes[node.name]
        channels = shape[1] if len(shape) == 4 else 0
        keeps = keeps_channels(module) if module is not None else keeps_channels_call(node)
        if not keeps or len(inputs) != 1:
            return _Maps(self.graph.node_copy(node, self._whole), channels=channels)
        # Such a layer maps zero to zero and leaves the channels in their order, so kept channels stay what they are.
        maps, relu = self.maps[inputs[0]], _is_relu(node, module)
        same = isinstance(module, _NOTHING) or (relu and maps.rectified)
        values = maps.values if same else self.graph.node_copy(node, lambda n: maps.values)
        # The result may be the input's memory, which then has two names: only the last may be written to.
        owner, maps.owner = maps.owner and self.last[inputs[0]] is node, False
        return _Maps(values, maps.index, channels, owner, relu or (same and maps.rectified))

    def _call(self, function: Callable, *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def _whole(self, node: fx.Node) -> fx.Node:
        """The maps of all channels."""
        maps = self.maps[node]
        return maps.values if maps.index is None else self._call(_whole, maps.values, maps.index, maps.channels)

    def _rectifies(self, node: fx.Node) -> bool:
        """Whether a ReLU follows, and nothing else reads what it gets."""
        (user, *others) = node.users
        module = self.modules[str(user.target)] if user.op == "call_module" else None
        return not others and (_is_relu(user, module) or (isinstance(module, _NOTHING) and self._rectifies(user)))

    # residual streams

    def _are_maps(self, *nodes: fx.Node) -> bool:
        first, *others = (self.shapes[node.name] for node in nodes)
        return len(first) == 4 and all(other == first for other in others)

    def _addend(self, node: fx.Node, reader: fx.Node) -> _Maps:
        maps = self.maps[node]
        return _Maps(maps.values, maps.index, maps.channels, maps.owner and self.last[node] is reader, maps.rectified)

    def _moved(self, node: Any, places: Tensor | None, width: int, reader: fx.Node) -> _Maps:
        """Maps as some channels of a wider map, in which they have these places; None if they have all."""
        if places is None:
            return self._addend(node, reader)
        maps = self.maps[node]
        name = f"places_{len(self.graph.nodes)}"
        self.root.register_buffer(name, places.clone())
        index = self.graph.get_attr(name)
        if maps.index is not None:
            index = self._call(operator.getitem, index, maps.index)
        return _Maps(maps.values, index, width)

    def _added(self, node: fx.Node, first: _Maps, second: _Maps) -> _Maps:
        if first.index is not None:
            first, second = second, first
        if second.index is None:
            return _Maps(self._call(torch.add, first.values, second.values), None, first.channels, owner=True)
        if first.index is not None:
            values = self._call(_whole, first.values, first.index, first.channels)
            first = _Maps(values, None, first.channels, owner=True)
        if not (self._rectifies(node) and kernels.available()):
            values = self._call(torch.index_add, first.values, 1, second.index, second.values)
            return _Maps(values, None, first.channels, owner=True)
        stream = first.values if first.owner else self._call(_contiguous_copy, first.values)
        # Where the means of a rectified stream are known, only the channels that are added to change.
        means = self.pooled.get(first.values) if first.owner and first.rectified else None
        both = self._call(kernels.add_relu, stream, second.values, second.index, means)
        values, means = (self._call(operator.getitem, both, i) for i in range(2))
        self.pooled[values] = means
        return _Maps(values, None, first.channels, owner=True, rectified=True)

    # selected convolutions

    def _gated(self, node: fx.Node, layer: AFSConvBN) -> _Maps:
        name = str(node.target)
        if not bool((layer.m > 0).any()):
            raise AFDSError(f"all channels of {name!r} are removed, so the network computes nothing there")
        self.ways[name] = "kernel" if kernels.suits(layer.conv) else "mask"
        if self.ways[name] == "kernel":
            return self._kernel(node, layer)
        return _Maps(self.graph.node_copy(node, self._whole), channels=layer.m.numel(), owner=True)

    def _kernel(self, node: fx.Node, layer: AFSConvBN) -> _Maps:
        maps = self.maps[node.all_input_nodes[0]]
        pooled, relu = None, self._rectifies(node)
        if bool((layer.m * layer.s > 0).any()):
            if maps.values not in self.pooled:  # shared by the layers that read the same maps
                self.pooled[maps.values] = self._call(_pool, maps.values)
            pooled = self.pooled[maps.values]
        name = f"kernel_{node.name}"
        self.root.add_module(name, kernels.KernelConvBN(layer))
        results = self.graph.call_module(name, (maps.values, maps.index, pooled, relu))
        values, index = (self._call(operator.getitem, results, i) for i in range(2))
        if relu:  # otherwise something else is done to the maps before they are pooled
            self.pooled[values] = self._call(operator.getitem, results, 2)
        return _Maps(values, index, layer.conv.out_channels, rectified=relu)


# --------------------------------------------------------------------------------------------------------- the network


class DynamicNetwork(nn.Module):
    """A gated network that computes only the channels that each image's gates keep. For inference only.

    Attributes:
        ways: "kernel" or "mask" for each AFS layer, where kernels are run.
        seconds: the least over some passes of each way, by the batch sizes that were prepared.
        taken: the way that is run, by the same; a batch of another size takes that of the nearest.
    """

    def __init__(self, kernel: nn.Module, masked: nn.Module, ways: dict[str, str]) -> None:
        super().__init__()
        self.kernel, self.masked, self.ways = kernel, masked, ways
        self.seconds: dict[int, dict[str, float]] = {}
        self.taken: dict[int, str] = {}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.run(images, self.taken[min(self.taken, key=lambda size: abs(size - len(images)))])

    @torch.no_grad()
    def run(self, images: Tensor, way: str) -> Tensor:
        """By kernels, which take one image at a time, or all images by masking."""
        return self.masked(images) if way == "mask" else torch.cat([self.kernel(image) for image in images.split(1)])


@torch.no_grad()
def dynamic(model: nn.Module, *images: Tensor, way: str | None = None, repeats: int = 5) -> DynamicNetwork:
    """A network that gives a gated network's outputs and computes only what its gates keep.

    It is a snapshot: training the model afterwards does not change it. Its outputs equal the masked model's up to
    rounding, unless two importances at the edge of a selection differ by no more than rounding errors; that is checked
    on a random image and on the first of the given ones.

    Args:
        model: a converted network in eval mode, or what `compact.compact` makes of one.
        images: one batch (B, 3, H, W) for each batch size to prepare; real ones, for both ways are timed on them.
        way: of `WAYS`, instead of timing.
        repeats: timed passes of each way.

    Raises:
        AFDSError: without AFS layers or images, in train mode, for an unknown way, if all channels of a layer are
            removed, or if the outputs would be wrong.
    """
    if not afs.layers(model):
        raise AFDSError(f"{type(model).__name__} has no AFS layer; convert it with afs.convert first")
    if model.training:
        raise AFDSError("dynamic execution uses the batch norms' fixed statistics; call model.eval() first")
    if not images:
        raise AFDSError("dynamic needs a batch of images for each batch size, to time both ways on them")
    if way is not None and way not in WAYS:
        raise AFDSError(f"the way must be one of {', '.join(WAYS)}, got {way!r}")
    if repeats < 1:
        raise AFDSError(f"repeats must be at least 1, got {repeats!r}")
    for batch in images:
        if batch.dim() != 4 or not len(batch):
            raise AFDSError(f"images must be batches of shape (B, 3, H, W), got {tuple(batch.shape)}")
    channels, height, width = images[0].shape[1:]
    builder = _Builder(model, (channels, height, width))
    network = DynamicNetwork(builder.build(), inference(model), builder.ways).eval()
    _verify(network, model, images[0][:1])
    for batch in images:
        if way is None:
            calls = {each: lambda _, each=each, batch=batch: network.run(batch, each) for each in WAYS}
            network.seconds[len(batch)] = {each: min(times) for each, times in interleave(calls, repeats).items()}
        seconds = network.seconds.get(len(batch), {})
        network.taken[len(batch)] = way or min(WAYS, key=lambda each: seconds[each])
    return network


def _verify(network: DynamicNetwork, model: nn.Module, image: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(image.shape, generator=generator).to(image)
    for x, margin in zip((image, noise), margins(model, torch.cat([image, noise])), strict=True):
        wanted = model(x)
        # Where rounding decides on a channel, or the network overflows, there is nothing to compare.
        if margin <= ROUNDING or not bool(wanted.isfinite().all()):
            continue
        for way in WAYS:
            difference = float((network.run(x, way) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
            if not difference <= (TOLERANCE if x.dtype in (torch.float32, torch.float64) else 0.1):
                raise AFDSError(
                    f"dynamic execution by {way!r} differs by {difference:.1e} of the largest output from the masked "
                    "network, so it is not used; run the network itself"
                )


@torch.no_grad()
def margins(model: nn.Module, images: Tensor) -> list[float]:
    """For each image, by how much of its importance the last selected channel beats the next, in the closest layer.

    Computed in float64: where the margin is about float32's rounding, two correct ways may select differently.
    """
    exact, closest = copy.deepcopy(model).double(), [1.0] * len(images)

    def compare(layer: AFSConvBN, arguments: tuple[Tensor, ...]) -> None:
        pi, k = layer.gates(arguments[0]).pi, layer.k
        h = F.linear(arguments[0].mean((2, 3)), *layer.predictor_weights()).relu()
        for i in range(len(images)):
            chosen, others = h[i][pi[i] > 0], h[i][(pi[i] == 0) & (layer.m * layer.s > 0)]
            if len(chosen) and len(others) and k < h.shape[1]:
                closest[i] = min(closest[i], float(1 - others.max() / chosen.min()))

    for layer in afs.layers(exact).values():
        layer.register_forward_pre_hook(compare)
    exact(images.double())
    return closest
