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
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from afdslib import afs
from afdslib.afs.channels import Join, Spread
from afdslib.afs.graph import is_add, keeps_channels, keeps_channels_call, shapes, trace
from afdslib.afs.layer import AFSConvBN
from afdslib.afs.verify import Sample, confirm
from afdslib.base import checks
from afdslib.base.errors import AFDSError
from afdslib.inference import kernels
from afdslib.inference.gates import inference
from afdslib.inference.timing import interleave

__all__ = ["WAYS", "DynamicNetwork", "dynamic"]

WAYS = ("kernel", "mask")
_ROUNDING = 2e-6  # margins of a selection below this are float32's rounding in a deep network
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode these return their input


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


@dataclass
class _Maps:
    """What stands for a node's maps in the graph of kernels."""

    values: fx.Node  # of the maps (1, n, H, W)
    index: fx.Node | None = None  # of their channel numbers; None for all channels
    channels: int = 0  # of the whole map
    owner: bool = False  # the values were computed here and have no other name: the last reader may write to them
    rectified: bool = False  # the values are known to be at least 0


def _scattered(values: Tensor, index: Tensor, channels: int) -> Tensor:
    """The map of all channels, zero where there are none."""
    return values.new_zeros(1, channels, *values.shape[2:]).index_copy_(1, index, values)


class _Builder:
    """Writes the graph that runs a network in eval mode on one image, (3, H, W), by kernels."""

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

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _node(self, node: fx.Node) -> _Maps:
        module, inputs, shape = self._module(node), node.all_input_nodes, self.shapes[node.name]
        if isinstance(module, AFSConvBN):
            return self._gated(node, module)
        if isinstance(module, Join):
            both = zip(node.args, module.indices, strict=True)
            return self._added(node, *(self._moved(n, places, module.width, node) for n, places in both))
        if isinstance(module, Spread):
            return self._moved(inputs[0], module.index, module.width, node)
        plain_sum = is_add(node) and len(inputs) == len(node.args) == 2 and not node.kwargs
        if plain_sum and len(shape) == 4 and all(self.shapes[n.name] == shape for n in inputs):
            return self._added(node, *(self._addend(n, node) for n in inputs))
        if kernels.suits(module) and self.maps[inputs[0]].index is not None:
            # Without gates, but behind a layer with gates: only the channels that are there are read.
            return self._kernel(node, _static_layer(module))  # type: ignore[arg-type]
        channels = shape[1] if len(shape) == 4 else 0
        keeps = keeps_channels(module) if module is not None else keeps_channels_call(node)
        if not keeps or len(inputs) != 1:
            return _Maps(self.graph.node_copy(node, self._whole), channels=channels)
        # Such a layer maps zero to zero and leaves the channels in their order, so kept channels stay what they are.
        maps, relu = self.maps[inputs[0]], self._is_relu(node)
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
        return maps.values if maps.index is None else self._call(_scattered, maps.values, maps.index, maps.channels)

    def _is_relu(self, node: fx.Node) -> bool:
        module = self._module(node)
        return isinstance(module, nn.ReLU) if module else node.target in (F.relu, torch.relu, "relu", "relu_")

    def _rectifies(self, node: fx.Node) -> bool:
        """Whether a ReLU follows, and nothing else reads what it gets."""
        (user, *others) = node.users
        return not others and (
            self._is_relu(user) or (isinstance(self._module(user), _NOTHING) and self._rectifies(user))
        )

    def _addend(self, node: fx.Node, reader: fx.Node) -> _Maps:
        maps = self.maps[node]
        return replace(maps, owner=maps.owner and self.last[node] is reader)

    def _moved(self, node: Any, places: Tensor | None, width: int, reader: fx.Node) -> _Maps:
        """Maps as some channels of a wider map, in which they have these places; None if they have all."""
        if places is None:
            return self._addend(node, reader)
        name = f"places_{len(self.graph.nodes)}"
        self.root.register_buffer(name, places.clone())
        maps, index = self.maps[node], self.graph.get_attr(name)
        if maps.index is not None:
            index = self._call(operator.getitem, index, maps.index)
        return _Maps(maps.values, index, width)

    def _added(self, node: fx.Node, first: _Maps, second: _Maps) -> _Maps:
        if first.index is not None:
            first, second = second, first
        if second.index is None:
            return _Maps(self._call(torch.add, first.values, second.values), None, first.channels, owner=True)
        if first.index is not None:
            values = self._call(_scattered, first.values, first.index, first.channels)
            first = _Maps(values, None, first.channels, owner=True)
        if not (self._rectifies(node) and kernels.available()):
            values = self._call(torch.index_add, first.values, 1, second.index, second.values)
            return _Maps(values, None, first.channels, owner=True)
        contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
        stream = first.values if first.owner else self.graph.call_method("clone", (first.values,), contiguous)
        # Where the means of a rectified stream are known, only the channels that are added to change.
        means = self.pooled.get(first.values) if first.owner and first.rectified else None
        both = self._call(kernels.add_relu, stream, second.values, second.index, means)
        values, means = (self._call(operator.getitem, both, i) for i in range(2))
        self.pooled[values] = means
        return _Maps(values, None, first.channels, owner=True, rectified=True)

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
                self.pooled[maps.values] = self.graph.call_method("mean", (maps.values, (2, 3)))
            pooled = self.pooled[maps.values]
        name = f"kernel_{node.name}"
        self.root.add_module(name, kernels.KernelConvBN(layer))
        results = self.graph.call_module(name, (maps.values, maps.index, pooled, relu))
        values, index = (self._call(operator.getitem, results, i) for i in range(2))
        if relu:  # otherwise something else is done to the maps before they are pooled
            self.pooled[values] = self._call(operator.getitem, results, 2)
        return _Maps(values, index, layer.conv.out_channels, rectified=relu)


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
    if way is not None:
        checks.choice("the way", way, WAYS)
    checks.whole("repeats", repeats, 1)
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
            seconds = {each: min(times) for each, times in interleave(calls, repeats).items()}
            network.seconds[len(batch)] = seconds
        network.taken[len(batch)] = way or min(seconds, key=seconds.__getitem__)
    return network


def _verify(network: DynamicNetwork, model: nn.Module, image: Tensor) -> None:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    images = torch.cat([image, noise])
    for x, margin in zip(images.split(1), _margins(model, images), strict=True):
        if margin > _ROUNDING:  # else rounding decides on a channel, either choice is right, and all behind it differs
            for each in (network.kernel, network.masked):
                confirm(Sample(x, [model(x)]), each, "dynamic execution")


def _margins(model: nn.Module, images: Tensor) -> Tensor:
    """By how much of its importance the last selected channel beats the next, in the closest layer; (B,)."""
    exact, closest = copy.deepcopy(model).double(), images.new_ones(len(images), dtype=torch.float64)

    def compare(layer: AFSConvBN, arguments: tuple[Tensor, ...]) -> None:
        h = F.linear(arguments[0].mean((2, 3)), *layer.predictor_weights()).relu()
        chosen = layer.gates(arguments[0]).pi > 0
        others = torch.where(chosen | (layer.m * layer.s == 0), 0, h).amax(1)
        torch.minimum(closest, 1 - others / torch.where(chosen, h, torch.inf).amin(1), out=closest)

    for layer in afs.layers(exact).values():
        layer.register_forward_pre_hook(compare)
    exact(images.double())
    return closest
