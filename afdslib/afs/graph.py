"""The network as a graph: which tensor feeds which layer, and which channels of it can be other than zero.

A residual stream's active set is, per image, the union of its addends' a(x); an ungated addend makes every channel
active; ReLU and pooling keep the set; the classifier uses it too. [method: MACs, ours]
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from afdslib.afs.channels import ChannelOp, GroupedConv2d, Join
from afdslib.afs.layer import AFSConvBN
from afdslib.base.errors import AFDSError
from afdslib.base.hooks import eval_mode

__all__ = [
    "called", "cost", "depthwise_ties", "is_add", "keeps_channels", "keeps_channels_call", "living_channels",
    "name_of", "output_makers", "propagate", "shapes", "streams", "trace", "usual_size",
]  # fmt: skip

# Modules and functions that map a zero channel to a zero channel and leave the channels in their order.
_KEEP_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Dropout,
    nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
_KEEP_FUNCTIONS = {
    "relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "hardswish", "tanh", "dropout", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "contiguous", "clone", "float",
}  # fmt: skip


def keeps_channels(module: nn.Module | None) -> bool:
    """Whether a layer maps a zero channel to a zero channel and leaves the channels in their order."""
    return isinstance(module, _KEEP_MODULES)


def keeps_channels_call(node: fx.Node) -> bool:
    """The same of a function or method that a node calls; `propagate` also knows the spatial mean."""
    return node.op in ("call_function", "call_method") and name_of(node) in _KEEP_FUNCTIONS


def name_of(node: fx.Node) -> str:
    """The name of what a node calls."""
    return getattr(node.target, "__name__", str(node.target))


def called(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The layer that a node calls."""
    return modules.get(str(node.target)) if node.op == "call_module" else None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        whole = isinstance(module, (AFSConvBN, ChannelOp, nn.ZeroPad2d))
        return whole or super().is_leaf_module(module, qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a network in eval mode, with selected convolutions as single nodes.

    A network that torch.fx cannot follow, or a tensor that is read after a change in place, is an AFDSError.
    """
    try:
        with eval_mode(model):
            graph = _Tracer().trace(model)
    except Exception as error:  # fx raises many types; all mean the same to the caller
        raise AFDSError(
            f"torch.fx cannot follow {type(model).__name__} ({str(error).splitlines()[0]}); "
            "give its forward method no control flow that depends on the data"
        ) from error
    modules = dict(model.named_modules())
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = node.args[0] if node.args and _writes(node, modules) else None
        if isinstance(changed, fx.Node) and any(order[user] > order[node] for user in changed.users):
            raise AFDSError(
                f"{type(model).__name__} changes the tensor {changed.name!r} in place ({name_of(node)}) and reads it "
                "again afterwards; use the result of that operation instead"
            )
    return graph


def _writes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node changes its first argument in place, and not so that channels that are zero stay zero."""
    if module := called(node, modules):
        return getattr(module, "inplace", False) is True and not keeps_channels(module)
    name = name_of(node)
    marked = name.endswith("_") and not name.endswith("__") or node.kwargs.get("inplace") is True
    in_place = marked or node.target in (operator.iadd, operator.imul, operator.isub, operator.itruediv)
    return node.op in ("call_function", "call_method") and in_place and name not in _KEEP_FUNCTIONS


def is_add(node: fx.Node) -> bool:
    """Whether a node is a sum, in place or not."""
    named = node.target in (operator.add, operator.iadd, torch.add) or name_of(node) in ("add", "add_")
    return named and node.op in ("call_function", "call_method")


def output_makers(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[str]:
    """The layers whose output channels are the network's outputs, with nothing behind them that mixes channels."""
    makers, seen = set(), set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if isinstance(called(node, modules), (nn.modules.conv._ConvNd, nn.Linear, AFSConvBN, GroupedConv2d)):
            makers.add(str(node.target))
        elif name_of(node) not in ("size", "dim", "getattr"):  # what is read of a shape is no channel
            waiting += [source for source in node.all_input_nodes if source not in seen]
            seen.update(node.all_input_nodes)
    return makers


def _union(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return None if left is None or right is None else torch.maximum(left, right)


def propagate(
    graph: fx.Graph, modules: dict[str, nn.Module], active: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[fx.Node, Tensor | None, Tensor | None]]:
    """Walks the graph in order and yields (node, set of channels that enter, set that leaves).

    A set is (B, C) with 1 for active, or None for "all channels". `active` is for each AFSConvBN its a(x), (B, C), or
    its mask m, (1, C); the shapes are from `shapes`. What a node does to channels follows from its name and from its
    shapes; where they do not fit, all are active.
    """
    sets: dict[fx.Node, Tensor | None] = {}
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        before, first = ((), None) if source is None else (shapes[source.name], sets[source])
        after, name, module = shapes[node.name], name_of(node), called(node, modules)
        result: Tensor | None = None
        function = node.op in ("call_function", "call_method")
        if node.op == "output":
            result = first
        elif isinstance(module, AFSConvBN):
            result = active[node.target]
        elif isinstance(module, ChannelOp):
            result = module.channels([sets[n] for n in node.args])
        elif isinstance(module, nn.Flatten) or (function and name in ("flatten", "view", "reshape")):
            # Each channel becomes H*W neighbouring features, if a row is an image.
            if first is not None and after == (before[0], math.prod(before[1:])):
                result = first.repeat_interleave(after[1] // first.shape[1], dim=1)
        elif isinstance(module, _KEEP_MODULES) or keeps_channels_call(node):
            result = first if before[:2] == after[:2] and len(before) == len(after) else None
        elif is_add(node):
            addends = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            # A constant addend makes zero channels non-zero; so may one whose dimensions are others.
            same = len({(len(shapes[a.name]), *shapes[a.name][:2]) for a in addends} | {(len(after), *after[:2])}) == 1
            result = _union(sets[addends[0]], sets[addends[1]]) if len(addends) == 2 and same else None
        elif function and name in ("cat", "concat"):
            result = _concatenate(node, sets, shapes)
        elif function and name == "mean" and len(before) == 4:
            dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            result = first if isinstance(dims, (list, tuple)) and sorted(d % 4 for d in dims) == [2, 3] else None
        sets[node] = result
        yield node, first, result


def _concatenate(
    node: fx.Node, sets: dict[fx.Node, Tensor | None], shapes: dict[str, tuple[int, ...]]
) -> Tensor | None:
    parts: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    known = [s for p in parts if (s := sets[p]) is not None] if isinstance(parts, (list, tuple)) else []
    if dim != 1 or not known:
        return None
    batch = max(map(len, known))  # what holds for every image has a batch of one
    widened = (known[0].new_ones(1, shapes[p.name][1]) if (s := sets[p]) is None else s for p in parts)
    return torch.cat([s.expand(batch, -1) for s in widened], dim=1)


def usual_size(model: nn.Module, photographs: int = 224) -> tuple[int, int, int]:
    """(3, H, W) of the images of a network: 32 px by its `architecture`'s stem for small ones, else another size."""
    architecture = getattr(model, "architecture", None)
    known = architecture if isinstance(architecture, dict) else {}
    small = known.get("stem") == "cifar" or str(known.get("name")).startswith("wrn-")
    return (3, 32, 32) if small else (3, photographs, photographs)


class Cost(NamedTuple):
    """What the nodes of a graph give and cost, by their names.

    Attributes:
        shapes: of the output for a batch of two images, so that it differs from dimensions of one; () for no tensor.
        macs: multiply-accumulates per image of everything that the node does, by torch's own counter.
    """

    shapes: dict[str, tuple[int, ...]]
    macs: dict[str, float]


class _Recorder(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph, input_size: tuple[int, int, int]):
        super().__init__(model, graph=graph)
        self.cost = Cost({}, {})
        parameter = next(model.parameters())
        images = torch.zeros(2, *input_size, device=parameter.device, dtype=parameter.dtype)
        with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as self._counter:
            self.run(images)

    def run_node(self, n: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        value = super().run_node(n)
        self.cost.macs[n.name] = (self._counter.get_total_flops() - before) / 4
        self.cost.shapes[n.name] = tuple(value.shape) if isinstance(value, Tensor) else ()
        return value


_COSTS: dict[Any, Cost] = {}


def cost(model: nn.Module, graph: fx.Graph, input_size: tuple[int, int, int]) -> Cost:
    """Of every node. Networks of one structure share it: each stage of a run would measure its copy many times."""
    tensors = (t.shape for t in (*model.parameters(), *model.buffers()))
    structure = (input_size, str(graph), repr(model), *tensors)
    if structure not in _COSTS:
        while len(_COSTS) > 100:
            _COSTS.pop(next(iter(_COSTS)))
        _COSTS[structure] = _Recorder(model, graph, input_size).cost
    return _COSTS[structure]


def shapes(model: nn.Module, graph: fx.Graph, input_size: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every node's output for a batch of two images; () where a node gives no tensor."""
    return cost(model, graph, input_size).shapes


def streams(model: nn.Module) -> list[tuple[str, ...]]:
    """The residual streams: for each the AFS layers that are added up in it, in forward order.

    A channel of such a stream is zero where it is removed in every one of its layers. Streams with an addend that has
    no gates, or another number of channels, are left out, for none of their channels ever is, and so are those that a
    compact network has cut. [ours]
    """
    graph, modules = trace(model), dict(model.named_modules())
    # Each stream is a set of layer names; None among them is an addend that cannot be cut.
    carried: dict[fx.Node, frozenset[str | None]] = {}
    found: list[frozenset[str | None]] = []
    for node in graph.nodes:
        module, inputs = called(node, modules), [carried[n] for n in node.all_input_nodes]
        if isinstance(module, AFSConvBN):
            carried[node] = frozenset([node.target])
        elif is_add(node) or isinstance(module, Join):
            # The addends of a Join hold different channels: a compact network's stream is coupled no more.
            closed = len(inputs) == 2 and not isinstance(module, Join)
            stream = frozenset[str | None]().union(*inputs, [] if closed else [None])
            joined = [s for s in found if s & stream - {None}]
            found = [s for s in found if s not in joined] + [stream.union(*joined)]
            carried[node] = found[-1]
        elif inputs and (isinstance(module, _KEEP_MODULES) or keeps_channels_call(node)):
            carried[node] = inputs[0]
        else:
            carried[node] = frozenset([None])
    order = {str(node.target): place for place, node in enumerate(graph.nodes)}
    complete = [sorted((str(n) for n in s), key=order.__getitem__) for s in found if None not in s and len(s) > 1]
    complete = [names for names in complete if len({modules[name].m.numel() for name in names}) == 1]
    return sorted((tuple(names) for names in complete), key=lambda names: order[names[0]])


def depthwise_ties(model: nn.Module) -> list[tuple[str, ...]]:
    """AFS layers with the depthwise ones that alone read them, in forward order.

    A depthwise filter whose input is removed computes a constant, and a channel whose only reader is removed is of no
    use, so such layers lose channels together. [method, section 7; ours]
    """
    graph, modules = trace(model), dict(model.named_modules())
    tied: dict[str, list[str]] = {}
    for node in graph.nodes:
        layer = called(node, modules)
        conv = layer.conv if isinstance(layer, AFSConvBN) else None
        if not isinstance(conv, nn.Conv2d) or not 1 < conv.groups == conv.in_channels == conv.out_channels:
            continue
        before = node.all_input_nodes[0]
        while len(before.users) == 1 and (keeps_channels(called(before, modules)) or keeps_channels_call(before)):
            before = before.all_input_nodes[0]
        writer = called(before, modules)
        if len(before.users) == 1 and isinstance(writer, AFSConvBN) and writer.m.numel() == conv.out_channels:
            tied[node.target] = [*tied.pop(before.target, [before.target]), node.target]
    return list(map(tuple, tied.values()))


def living_channels(model: nn.Module, names: Iterable[str], input_size: tuple[int, int, int]) -> dict[str, Tensor]:
    """Channels of some modules' outputs that can be other than zero for at least one image, as far as masks prove it.

    For each name, such as that of a block, a bool tensor (C,): False where m = 0 in every addend of the stream. [ours]
    `input_size` is (3, H, W). A name that is no module of the network is an AFDSError.
    """
    graph, modules = trace(model), dict(model.named_modules())
    masks = {n: m.m[None] for n, m in modules.items() if isinstance(m, AFSConvBN)}
    widths = shapes(model, graph, input_size)
    last: dict[str, tuple[Tensor | None, int]] = {}
    wanted = set(names)
    for node, _, leaving in propagate(graph, modules, masks, widths):
        # A block is not a node of its own; its output is the last node made inside it.
        owners = {path for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
        owners |= {str(node.target)} if node.op == "call_module" else set()
        last |= {owner: (leaving, widths[node.name][1]) for owner in owners & wanted}
    if missing := sorted(wanted - set(last)):
        raise AFDSError(
            f"no layer {missing[0]!r} in {type(model).__name__}; its layers are named by model.named_modules()"
        )
    device = next(model.parameters()).device
    return {
        name: torch.ones(width, dtype=torch.bool, device=device) if channels is None else channels[0] > 0
        for name, (channels, width) in last.items()
    }

