"""A network without its removed channels: the same function, smaller tensors, ordinary layers where gates are constant.

What masks prove to be zero is not stored, read or computed any more: filters with m = 0 go with their statistics, rows
and columns of predictors, inputs of the next layers. A residual stream keeps the channels that any of its addends
writes; an addend that has fewer writes only those. [ours]
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from afdslib.afs.channels import CutConvBN, GroupedConv2d, Join, Pick, Spread
from afdslib.afs.graph import called, is_add, keeps_channels, name_of, propagate, shapes, trace, usual_size
from afdslib.afs.layer import AFSConvBN
from afdslib.afs.verify import require_own_weights, require_same
from afdslib.base.errors import AFDSError

__all__ = ["CompactNetwork", "compact", "fold_norm", "masks", "set_masks"]


class CompactNetwork(fx.GraphModule):
    """What `compact` returns: the layers of the original under their names, called by a graph of their own.

    `architecture` has the arguments of the original network and, for each compaction, the masks it was made by.
    """

    architecture: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactNetwork:
        copied: Any = super().__deepcopy__(memo)
        copied.architecture = copy.deepcopy(self.architecture, memo)
        copied.__class__.__name__ = type(self).__name__  # the class is the instance's own; the copy was "GraphModule"
        return copied


def masks(model: nn.Module) -> dict[str, str]:
    """Each AFS layer's masks as text, one letter per channel: "0" removed, "s" static, "d" dynamic."""
    return {
        name: "".join("0sd"[1 + int(s) if m else 0] for m, s in zip(layer.m.tolist(), layer.s.tolist(), strict=True))
        for name, layer in model.named_modules()
        if isinstance(layer, AFSConvBN)
    }


@torch.no_grad()
def set_masks(model: nn.Module, texts: dict[str, str]) -> None:
    """Sets what `masks` gave; an AFDSError if the layers, their widths or a letter are others."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, AFSConvBN)}
    if set(found) != set(texts) or any(len(texts[n]) != layer.m.numel() for n, layer in found.items()):
        raise AFDSError(f"the masks belong to another network than this {type(model).__name__}")
    for name, text in texts.items():
        if unknown := sorted(set(text) - set("0sd")):
            raise AFDSError(f"the masks of layer {name!r} have the letter {unknown[0]!r}; they consist of 0, s and d")
    for name, layer in found.items():
        layer.m.copy_(torch.tensor([letter != "0" for letter in texts[name]]))
        layer.s.copy_(torch.tensor([letter == "d" for letter in texts[name]]))


def compact(
    model: nn.Module, *, input_size: tuple[int, int, int] | None = None, fold_bn: bool = False
) -> CompactNetwork:
    """A copy of a network without its removed channels, in eval mode, equal to it there.

    A layer whose living channels are all static becomes a Conv2d and a BatchNorm2d of the usual kind; in a layer where
    gates remain, the predictor has rows for the dynamic channels only, and k is still computed from the original
    width. Masks may be lowered and the result compacted again.

    Args:
        model: a network in eval mode, converted or not; it is left as it is.
        input_size: (3, H, W); default: 32 px for networks with the stem for small images, else 224 px. It matters only
            to networks that flatten maps of more than one pixel.
        fold_bn: also fold each batch norm into the convolution before it, for inference: such a network no longer
            normalises when it is trained.

    Raises:
        AFDSError: in train mode, if every channel of a layer is removed, if torch.fx cannot follow the network, for
            weights that a layer does not own, or if the result is another function.
    """
    require_own_weights(model, "compact")
    network = compact_in_place(copy.deepcopy(model), input_size=input_size, fold_bn=fold_bn)
    require_same(model, network, "compact", input_size=input_size or usual_size(model))
    return network


def compact_in_place(model: nn.Module, *, input_size: tuple[int, int, int] | None, fold_bn: bool) -> CompactNetwork:
    """What `compact` does, from the network's own layers, which are not to be used any more."""
    if model.training or any(m.training for m in model.modules() if isinstance(m, (AFSConvBN, nn.BatchNorm2d))):
        raise AFDSError("the network is in train mode, where its batch norms change; call model.eval() before compact")
    for name, layer in model.named_modules():
        if isinstance(layer, AFSConvBN) and not bool(layer.m.any()):
            raise AFDSError(f"every channel of layer {name!r} is removed, so nothing passes it; keep at least one")
    architecture, input_size = getattr(model, "architecture", None), input_size or usual_size(model)
    steps = {"masks": masks(model), "input_size": list(input_size), "fold_bn": fold_bn}
    with torch.no_grad():
        try:
            network = _Surgeon(model.eval(), input_size).operate()
        except (RuntimeError, LookupError, TypeError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise AFDSError(f"compact cannot cut {type(model).__name__} at {input_size} ({reason})") from error
        if fold_bn:
            _fold(network)
    if isinstance(architecture, dict):
        network.architecture = {**architecture, "compact": [*architecture.get("compact", []), steps]}
    return network.eval()


class _Surgeon:
    """Walks a network's graph once and cuts every layer to the channels that enter and leave it.

    Attributes:
        kept: for each node of the graph the channels that its tensor still holds, sorted, or None for all.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]):
        self.model = model
        self.graph = trace(model)
        self.modules = dict(model.named_modules())
        self.shapes = shapes(model, self.graph, input_size)
        self.calls = Counter(node.target for node in self.graph.nodes if node.op == "call_module")
        self.kept: dict[fx.Node, Tensor | None] = {}
        self._made = 0

    def operate(self) -> CompactNetwork:
        living = {n: m.m[None] for n, m in self.modules.items() if isinstance(m, AFSConvBN)}
        for node, _, leaving in list(propagate(self.graph, self.modules, living, self.shapes)):
            self.kept[node] = None if leaving is None or bool((leaving > 0).all()) else leaving[0].nonzero()[:, 0]
            if module := called(node, self.modules):
                self._cut_module(node, module)
            elif node.op == "output":
                self._rigid(node)
            elif node.op != "placeholder":
                self._cut_function(node)
        for node in list(self.graph.nodes):
            if node.op == "call_module" and type(self.model.get_submodule(node.target)) is nn.Identity:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        name = type(self.model).__name__.removeprefix("Compact")
        network = CompactNetwork(self.model, self.graph, class_name=f"Compact{name}")
        network.graph.eliminate_dead_code()
        network.graph.lint()
        network.recompile()
        return network

    def _cut_module(self, node: fx.Node, module: nn.Module) -> None:
        source: Any = node.args[0]
        enters, leaves = self.kept[source], self.kept[node]
        if isinstance(module, Join):
            self._cut_join(node, list(node.args), module.indices)  # type: ignore[arg-type]
        elif isinstance(module, Spread):
            self._swap(node, nn.Identity())  # what reads it widens again where it must
        elif isinstance(module, Pick):
            # Of the channels it gives, those that are left, by their places in what now enters.
            places = _within(module.index if leaves is None else module.index[leaves], enters)
            whole = len(places) == (self.shapes[source.name][1] if enters is None else len(enters))
            self._swap(node, nn.Identity() if whole else Pick(places))
        elif isinstance(module, AFSConvBN):
            self._cut_gated(node, module, enters, leaves)
        elif isinstance(module, (nn.Conv2d, GroupedConv2d)) or (
            isinstance(module, nn.Linear) and len(self.shapes[source.name]) == 2
        ):
            if enters is not None:
                self._swap(node, _cut(module, enters, None))
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1 and enters is not None:
            narrow = nn.PReLU(len(enters))
            narrow.weight = _part(module.weight, module.weight[enters])
            self._swap(node, narrow)
        elif not (keeps_channels(module) or isinstance(module, nn.Flatten)) or (enters is not None and leaves is None):
            self._rigid(node)

    def _cut_function(self, node: fx.Node) -> None:
        name, addends = name_of(node), [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if is_add(node) and len({self.shapes[a.name] for a in addends}) == 1 and len(addends) == 2 and not node.kwargs:
            self._cut_join(node, addends, [None, None])
        elif name in ("size", "getattr") and _asks_batch(node):
            pass  # what is read of the shape does not change
        elif is_add(node) or self.kept[node] is None or (name in ("view", "reshape") and not _flattens(node)):
            self._rigid(node)

    def _cut_join(self, node: fx.Node, addends: list[fx.Node], indices: list[Tensor | None]) -> None:
        """A residual add: plain where both addends hold the same channels, else each writes its own."""
        out, width = self.kept[node], self.shapes[node.name][1]
        total = width if out is None else len(out)
        joined: list[Tensor | None] = []
        for addend, index in zip(addends, indices, strict=True):
            held = _or_all(self.kept[addend], self.shapes[addend.name][1], self.model)
            places = _within(held if index is None else index[held], out)
            joined.append(None if len(places) == total else places)
        if joined != [None, None]:
            self._behind(node, Join(total, *joined), tuple(addends))
        elif node.op == "call_module":
            self._behind(node, operator.add, tuple(addends))

    def _rigid(self, node: fx.Node) -> None:
        """Leaves a node that cannot be cut as it is: what enters is widened before it, what leaves narrowed after."""
        for source in dict.fromkeys(node.all_input_nodes):
            held = self.kept[source]
            if held is not None:
                with self.graph.inserting_before(node):
                    wide = self.graph.call_module(self._add(Spread(held, self.shapes[source.name][1])), (source,))
                node.replace_input_with(source, wide)
                self.kept[wide] = None
        alive = self.kept[node]
        if alive is not None and node.op != "output":
            self._behind(node, Pick(alive))

    def _behind(self, node: fx.Node, what: Any, inputs: tuple[fx.Node, ...] = ()) -> None:
        """A layer or function of a node's value, or in place of the node if it has inputs of its own."""
        with self.graph.inserting_after(node):
            layer = isinstance(what, nn.Module)
            call: Any = self.graph.call_module if layer else self.graph.call_function
            new = call(self._add(what) if layer else what, inputs or (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.kept[new], self.shapes[new.name] = self.kept[node], self.shapes[node.name]
        if inputs:
            self.graph.erase_node(node)

    def _add(self, module: nn.Module) -> str:
        # Files of networks hold these names.
        while hasattr(self.model, name := f"{type(module).__name__.lower()}_{self._made}"):
            self._made += 1
        self.model.add_module(name, module.eval())
        return name

    def _swap(self, node: fx.Node, module: nn.Module) -> None:
        assert isinstance(node.target, str)
        if self.calls[node.target] > 1:  # one layer for several inputs, which may be cut differently
            node.target = self._add(module)
        else:
            self.model.set_submodule(node.target, module.eval())

    def _cut_gated(self, node: fx.Node, layer: AFSConvBN, enters: Tensor | None, leaves: Tensor | None) -> None:
        kept = _or_all(leaves, layer.m.numel(), layer)
        conv, norm = _cut(layer.conv, enters, leaves), copy.deepcopy(layer.norm)
        norm.num_features = len(kept)
        norm.running_mean, norm.running_var = norm.running_mean[kept], norm.running_var[kept]  # type: ignore[index]
        beta = _part(layer.beta, layer.beta[kept])
        rows = (layer.m * layer.s > 0)[kept].nonzero()[:, 0]
        if not len(rows):
            norm.affine, norm.weight, norm.bias = True, _part(layer.beta, layer.gamma[kept]), beta
            self._swap(node, conv)
            # Where the conversion left an Identity, else in a node of its own.
            after = next(iter(node.users), None)
            alone = len(node.users) == 1 and type(called(after, self.modules)) is nn.Identity  # type: ignore[arg-type]
            if alone and self.calls[after.target] == 1:  # type: ignore[union-attr]
                self._swap(after, norm)  # type: ignore[arg-type]
            else:
                self._behind(node, norm)
            return
        if len(rows) == len(kept):
            cut = AFSConvBN(conv, norm, width=layer.width)
        else:
            cut = CutConvBN(conv, norm, width=layer.width, rows=rows)
        places = _within(kept[rows], layer.rows if isinstance(layer, CutConvBN) else None)
        cut.density, cut.beta, cut.predictor = layer.density, beta, _cut(layer.predictor, enters, places)
        cut.m, cut.s, cut.gamma = layer.m[kept], layer.s[kept], layer.gamma[kept]
        self._swap(node, cut)


def _asks_batch(node: fx.Node) -> bool:
    """Whether a node that reads a tensor's shape is asked for anything but its channels."""
    if node.target is getattr and node.args[1] != "shape":
        return False
    if node.op == "call_method" and len(node.args) == 2:
        return node.args[1] not in (1, -3)
    return all(user.target is operator.getitem and user.args[1] in (0, 2, 3, -1, -2) for user in node.users)


def _flattens(node: fx.Node) -> bool:
    """Whether a view is (batch, -1), so that it takes any number of channels."""
    sizes: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return len(sizes) == 2 and bool(sizes[1] == -1)


def _or_all(kept: Tensor | None, width: int, like: nn.Module) -> Tensor:
    return torch.arange(width, device=next(like.parameters()).device) if kept is None else kept


def _take(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor.clone() if index is None else tensor[index]


def _within(numbers: Tensor, kept: Tensor | None) -> Tensor:
    """The places of channel numbers in a sorted list of kept ones that has them all."""
    return numbers if kept is None else torch.searchsorted(kept, numbers)


def _part(old: Tensor, values: Tensor) -> nn.Parameter:
    """A parameter with some of the values of another, which is trained if the other is."""
    return nn.Parameter(values.detach().clone(), requires_grad=old.requires_grad)


def _cut(layer: Any, inputs: Tensor | None, outputs: Tensor | None) -> Any:
    """A convolution or a linear layer with some of the input and output channels (None for all)."""
    if isinstance(layer, GroupedConv2d) or (isinstance(layer, nn.Conv2d) and layer.groups > 1):
        return copy.deepcopy(layer) if inputs is None and outputs is None else _cut_groups(layer, inputs, outputs)
    weight = _take(_take(layer.weight, outputs).transpose(0, 1), inputs).transpose(0, 1)
    return _like(layer, weight, None if layer.bias is None else _take(layer.bias, outputs))


def _like(layer: Any, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Any:
    """A copy of a layer with other weights."""
    cut = copy.deepcopy(layer)
    cut.weight = _part(layer.weight, weight.contiguous())
    cut.bias = None if bias is None else _part(layer.bias, bias)
    if isinstance(layer, nn.Conv2d):
        cut.out_channels, cut.in_channels, cut.groups = len(weight), weight.shape[1] * groups, groups
    else:
        cut.out_features, cut.in_features = weight.shape
    return cut


def _cut_groups(conv: nn.Conv2d | GroupedConv2d, inputs: Tensor | None, outputs: Tensor | None) -> GroupedConv2d:
    """A grouped convolution: groups without outputs go, and the others are padded to equal sizes."""
    inner: Any = conv
    reads, writes = list(range(conv.in_channels)), list(range(conv.out_channels))
    if isinstance(conv, GroupedConv2d):
        inner, reads, writes = conv.conv, conv.reads.tolist(), conv.writes.tolist()
    # Old channels (of the outputs: the slots that write them) to new ones.
    held = {old: new for new, old in enumerate(range(conv.in_channels) if inputs is None else inputs.tolist())}
    wanted = range(conv.out_channels) if outputs is None else outputs.tolist()
    written = {writes[old]: new for new, old in enumerate(wanted)}
    per_in, per_out = inner.in_channels // inner.groups, inner.out_channels // inner.groups
    groups = []
    for group in range(inner.groups):
        columns = [i for i in range(per_in) if reads[group * per_in + i] in held]
        if rows := [o for o in range(group * per_out, (group + 1) * per_out) if o in written]:
            groups.append((rows, columns, [held[reads[group * per_in + i]] for i in columns]))
    most_in = max(1, *(len(columns) for _, columns, _ in groups))
    most_out = max(len(rows) for rows, _, _ in groups)
    weight = inner.weight.new_zeros(len(groups) * most_out, most_in, *inner.kernel_size)
    bias = None if inner.bias is None else inner.bias.new_zeros(len(weight))
    new_reads, new_writes = torch.full((len(groups), most_in), len(held)), torch.empty(len(written), dtype=torch.long)
    for place, (rows, columns, channels) in enumerate(groups):
        new_reads[place, : len(columns)] = torch.tensor(channels, dtype=torch.long)
        start = place * most_out
        weight[start : start + len(rows), : len(columns)] = inner.weight[rows][:, columns]
        if bias is not None:
            bias[start : start + len(rows)] = inner.bias[rows]
        new_writes[[written[row] for row in rows]] = torch.arange(start, start + len(rows))
    cut, device = _like(inner, weight, bias, len(groups)), inner.weight.device
    return GroupedConv2d(cut, len(held), new_reads.flatten().to(device), new_writes.to(device))


def _fold(network: CompactNetwork) -> None:
    """Each batch norm that alone reads a convolution goes into its weights and bias."""
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    for node in list(network.graph.nodes):
        norm = called(node, modules)
        if isinstance(norm, nn.BatchNorm2d) and calls[node.target] == 1:
            source = node.args[0]
            conv = called(source, modules)
            alone = len(source.users) == 1 and calls[source.target] == 1
            if alone and isinstance(conv, (nn.Conv2d, GroupedConv2d)):
                fold_norm(conv, norm)
                node.replace_all_uses_with(source)
                network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()


def fold_norm(conv: nn.Conv2d | GroupedConv2d, norm: nn.BatchNorm2d) -> None:
    """Gives a convolution, in place, the weights and the bias with which it also does the batch norm behind it."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale * norm.weight if norm.affine else scale
    shift = -norm.running_mean * scale
    shift = shift + norm.bias if norm.affine else shift
    if isinstance(conv, GroupedConv2d):
        scale, shift = (v.new_zeros(conv.conv.out_channels).index_copy(0, conv.writes, v) for v in (scale, shift))
        conv = conv.conv
    if conv.bias is not None:
        shift = shift + scale * conv.bias
    conv.weight = _part(conv.weight, conv.weight * scale[:, None, None, None])
    conv.bias = _part(conv.weight, shift)
