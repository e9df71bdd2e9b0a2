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
from afdslib.afs.graph import is_add, keeps_channels, propagate, shapes, trace
from afdslib.afs.layer import AFSConvBN
from afdslib.afs.verify import require_own_weights, require_same
from afdslib.base.errors import AFDSError

__all__ = ["CompactNetwork", "compact", "fold_norm", "masks", "set_masks"]


class CompactNetwork(fx.GraphModule):
    """What `compact` returns: the layers of the original under their names, called by a graph of their own.

    It trains, takes mask updates where gates remain, and can be compacted again. `architecture` is what `afs.save`
    writes: the arguments of the original network and, for each compaction, the masks it was made by.
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
    """Sets what `masks` gave.

    Raises:
        AFDSError: the layers or their widths are others, or a letter is.
    """
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
    """A copy of a network without its removed channels, equal to it in eval mode.

    A layer whose living channels are all static becomes a Conv2d and a BatchNorm2d of the usual kind; in a layer where
    gates remain, the predictor has rows for the dynamic channels only, and k is still computed from the original
    width. Without any removed channel the copy is an equal network. Masks may be lowered and the result compacted
    again.

    Args:
        model: a network in eval mode, converted or not; it is left as it is.
        input_size: (3, H, W); default: 32 px for networks with the stem for small images, else 224 px. It matters only
            to networks that flatten maps of more than one pixel.
        fold_bn: also fold each batch norm into the convolution before it, for inference: such a network no longer
            normalises when it is trained.

    Returns:
        The compact network, in eval mode, on the same device, in the same precision.

    Raises:
        AFDSError: in train mode, if every channel of a layer is removed, if torch.fx cannot follow the network, for
            weights that a layer does not own, or if the result is another function.
    """
    require_own_weights(model, "compact")
    network = compact_in_place(copy.deepcopy(model), input_size=input_size, fold_bn=fold_bn)
    require_same(model, network, "compact", input_size=input_size or _input_size(getattr(model, "architecture", None)))
    return network


def compact_in_place(model: nn.Module, *, input_size: tuple[int, int, int] | None, fold_bn: bool) -> CompactNetwork:
    """What `compact` does, from the network's own layers, which are not to be used any more."""
    if model.training or any(m.training for m in model.modules() if isinstance(m, (AFSConvBN, nn.BatchNorm2d))):
        raise AFDSError("the network is in train mode, where its batch norms change; call model.eval() before compact")
    for name, layer in model.named_modules():
        if isinstance(layer, AFSConvBN) and not bool(layer.m.any()):
            raise AFDSError(f"every channel of layer {name!r} is removed, so nothing passes it; keep at least one")
    architecture = getattr(model, "architecture", None)
    if input_size is None:
        input_size = _input_size(architecture)
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


def _input_size(architecture: object) -> tuple[int, int, int]:
    known = architecture if isinstance(architecture, dict) else {}
    small = known.get("stem") == "cifar" or str(known.get("name")).startswith("wrn-")
    return (3, 32, 32) if small else (3, 224, 224)


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
            alive = None if leaving is None or bool((leaving > 0).all()) else leaving[0].nonzero()[:, 0]
            self.kept[node] = alive
            if node.op == "output":
                self._rigid(node)
            elif node.op == "call_module":
                self._cut_module(node, self.modules[node.target])
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

    # ------------------------------------------------------------------------------------------------------- nodes

    def _cut_module(self, node: fx.Node, module: nn.Module) -> None:
        source = node.args[0] if node.args else None
        assert isinstance(source, fx.Node)
        enters, leaves = self.kept[source], self.kept[node]
        if isinstance(module, Join):
            self._cut_join(node, list(node.args), [module.left, module.right])  # type: ignore[arg-type]
        elif isinstance(module, Spread):
            self._swap(node, nn.Identity())  # what reads it widens again where it must
        elif isinstance(module, Pick):
            # Of the channels it gives, those that are left, by their places in what now enters.
            wanted = module.index if leaves is None else module.index[leaves]
            places = _within(wanted, enters)
            whole = len(places) == (self.shapes[source.name][1] if enters is None else len(enters))
            self._swap(node, nn.Identity() if whole else Pick(places))
        elif isinstance(module, AFSConvBN):
            self._cut_gated(node, module, enters, leaves)
        elif isinstance(module, (nn.Conv2d, GroupedConv2d)):
            if enters is not None:
                self._swap(node, _cut_conv(module, enters, None))
        elif isinstance(module, nn.Linear) and len(self.shapes[source.name]) == 2:
            if enters is not None:
                self._swap(node, _cut_linear(module, enters, None))
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1 and enters is not None:
            narrow = nn.PReLU(len(enters))
            narrow.weight = _part(module.weight, module.weight[enters])
            self._swap(node, narrow)
        elif not (keeps_channels(module) or isinstance(module, nn.Flatten)) or (enters is not None and leaves is None):
            self._rigid(node)

    def _cut_function(self, node: fx.Node) -> None:
        name = getattr(node.target, "__name__", str(node.target))
        addends = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if is_add(node):
            same = len({self.shapes[a.name] for a in addends}) == 1
            if len(addends) == 2 and same and not node.kwargs:
                self._cut_join(node, addends, [None, None])
            else:
                self._rigid(node)
        elif name in ("size", "getattr") and _asks_batch(node):
            pass  # what is read of the shape does not change
        elif self.kept[node] is None or (name in ("view", "reshape") and not _flattens(node)):
            self._rigid(node)

    def _cut_join(self, node: fx.Node, addends: list[fx.Node], index: list[Tensor | None]) -> None:
        """A residual add: plain where both addends hold the same channels, else each writes its own."""
        out, width = self.kept[node], self.shapes[node.name][1]
        places: list[Tensor | None] = []
        for addend, where in zip(addends, index, strict=True):
            held = self._everything(addend) if self.kept[addend] is None else self.kept[addend]
            assert held is not None
            written = held if where is None else where[held]
            places.append(_within(written, out))
        total = width if out is None else len(out)
        joined = [None if len(p) == total else p for p in places if p is not None]
        if joined == [None, None]:
            if node.op == "call_module":
                with self.graph.inserting_after(node):
                    plain = self.graph.call_function(operator.add, tuple(addends))
                self._take_over(node, plain)
        else:
            with self.graph.inserting_after(node):
                new = self.graph.call_module(self._add(Join(total, *joined)), tuple(addends))
            self._take_over(node, new)

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
            with self.graph.inserting_after(node):
                narrow = self.graph.call_module(self._add(Pick(alive)), (node,))
            node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
            self.kept[narrow] = alive
            self.shapes[narrow.name] = self.shapes[node.name]

    def _everything(self, node: fx.Node) -> Tensor:
        return torch.arange(self.shapes[node.name][1], device=next(self.model.parameters()).device)

    def _add(self, module: nn.Module) -> str:
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

    def _replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def _take_over(self, node: fx.Node, new: fx.Node) -> None:
        self.kept[new], self.shapes[new.name] = self.kept[node], self.shapes[node.name]
        self._replace(node, new)

    # ------------------------------------------------------------------------------------------------------ layers

    def _cut_gated(self, node: fx.Node, layer: AFSConvBN, enters: Tensor | None, leaves: Tensor | None) -> None:
        conv = _cut_conv(layer.conv, enters, leaves)
        dynamic = layer.m * layer.s > 0
        if not bool(dynamic.any()):
            norm = _norm(layer.norm, leaves, affine=True)
            norm.weight = _part(layer.beta, _take(layer.gamma, leaves))
            norm.bias = _part(layer.beta, _take(layer.beta, leaves))
            self._swap(node, conv)
            self._put_norm(node, norm)
            return
        bare = _norm(layer.norm, leaves, affine=False)
        kept = self._kept_channels(layer, leaves)
        rows = dynamic[kept].nonzero()[:, 0]
        places = kept[rows]  # of the rows among the layer's channels
        if isinstance(layer, CutConvBN):
            places = _within(places, layer.rows)
        if len(rows) == len(kept):
            cut = AFSConvBN(conv, bare, width=layer.width)  # type: ignore[arg-type]
        else:
            cut = CutConvBN(conv, bare, width=layer.width, rows=rows)  # type: ignore[arg-type]
        cut.density = layer.density
        cut.predictor = _cut_linear(layer.predictor, enters, places)
        cut.beta = _part(layer.beta, layer.beta[kept])
        cut.m, cut.s, cut.gamma = layer.m[kept], layer.s[kept], layer.gamma[kept]
        self._swap(node, cut)

    def _kept_channels(self, layer: AFSConvBN, leaves: Tensor | None) -> Tensor:
        return torch.arange(layer.m.numel(), device=layer.m.device) if leaves is None else leaves

    def _put_norm(self, node: fx.Node, norm: nn.BatchNorm2d) -> None:
        """Where the conversion left an Identity, else in a node of its own."""
        after = next(iter(node.users), None)
        if (
            len(node.users) == 1
            and after is not None
            and after.op == "call_module"
            and type(self.modules[str(after.target)]) is nn.Identity
            and self.calls[after.target] == 1
        ):
            self._swap(after, norm)
            return
        with self.graph.inserting_after(node):
            new = self.graph.call_module(self._add(norm), (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.kept[new], self.shapes[new.name] = self.kept[node], self.shapes[node.name]


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


def _take(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor.clone() if index is None else tensor[index]


def _within(numbers: Tensor, kept: Tensor | None) -> Tensor:
    """The places of channel numbers in a sorted list of kept ones that has them all."""
    return numbers if kept is None else torch.searchsorted(kept, numbers)


def _part(old: Tensor, values: Tensor) -> nn.Parameter:
    """A parameter with some of the values of another, which is trained if the other is."""
    return nn.Parameter(values.detach().clone(), requires_grad=old.requires_grad)


def _norm(norm: nn.BatchNorm2d, kept: Tensor | None, *, affine: bool) -> nn.BatchNorm2d:
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    mean, var = _take(norm.running_mean, kept), _take(norm.running_var, kept)
    cut = nn.BatchNorm2d(len(mean), norm.eps, norm.momentum, affine=affine, device=mean.device, dtype=mean.dtype)
    cut.running_mean, cut.running_var = mean, var
    cut.num_batches_tracked = norm.num_batches_tracked.clone()
    return cut


def _cut_linear(linear: nn.Linear, inputs: Tensor | None, outputs: Tensor | None) -> nn.Linear:
    weight = _take(_take(linear.weight, outputs).T, inputs).T
    cut = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=linear.bias is not None, device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip
    cut.weight = _part(linear.weight, weight.contiguous())
    if linear.bias is not None:
        cut.bias = _part(linear.bias, _take(linear.bias, outputs))
    return cut


def _conv_like(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Conv2d:
    cut = nn.utils.skip_init(
        nn.Conv2d, weight.shape[1] * groups, weight.shape[0], conv.kernel_size, stride=conv.stride,
        padding=conv.padding, dilation=conv.dilation, groups=groups, bias=bias is not None,
        padding_mode=conv.padding_mode, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    cut.weight = _part(conv.weight, weight.contiguous())
    if bias is not None and conv.bias is not None:
        cut.bias = _part(conv.bias, bias)
    return cut


def _cut_conv(
    conv: nn.Conv2d | GroupedConv2d, inputs: Tensor | None, outputs: Tensor | None
) -> nn.Conv2d | GroupedConv2d:
    """A convolution with some of the input and output channels (None for all)."""
    if isinstance(conv, nn.Conv2d) and conv.groups == 1:
        weight = _take(_take(conv.weight, outputs).transpose(0, 1), inputs).transpose(0, 1)
        return _conv_like(conv, weight, None if conv.bias is None else _take(conv.bias, outputs), 1)
    if inputs is None and outputs is None:
        return copy.deepcopy(conv)
    return _cut_groups(conv, inputs, outputs)


def _cut_groups(conv: nn.Conv2d | GroupedConv2d, inputs: Tensor | None, outputs: Tensor | None) -> GroupedConv2d:
    """A grouped convolution: groups without outputs go, and the others are padded to equal sizes."""
    inner = conv.conv if isinstance(conv, GroupedConv2d) else conv
    device = inner.weight.device
    read = list(range(conv.in_channels)) if isinstance(conv, nn.Conv2d) else conv.reads.tolist()
    write: list[int | None] = [None] * inner.out_channels
    for channel, slot in enumerate(range(conv.out_channels) if isinstance(conv, nn.Conv2d) else conv.writes.tolist()):
        write[slot] = channel
    # Old channel numbers to new ones; the number of inputs stands for zeros.
    held = range(conv.in_channels) if inputs is None else inputs.tolist()
    wanted = range(conv.out_channels) if outputs is None else outputs.tolist()
    new_input = {old: new for new, old in enumerate(held)}
    new_output: dict[int | None, int] = {old: new for new, old in enumerate(wanted)}
    per_in, per_out = inner.in_channels // inner.groups, inner.out_channels // inner.groups
    groups = []
    for group in range(inner.groups):
        slots_in = [i for i in range(per_in) if read[group * per_in + i] in new_input]
        slots_out = [o for o in range(group * per_out, (group + 1) * per_out) if write[o] in new_output]
        if slots_out:
            groups.append((group, slots_in, slots_out))
    most_in = max(1, *(len(slots_in) for _, slots_in, _ in groups))
    most_out = max(len(slots_out) for _, _, slots_out in groups)
    weight = inner.weight.new_zeros(len(groups) * most_out, most_in, *inner.kernel_size)
    bias = None if inner.bias is None else inner.bias.new_zeros(len(weight))
    reads = torch.full((len(groups) * most_in,), len(new_input))
    writes = torch.empty(len(new_output), dtype=torch.long)
    for place, (group, slots_in, slots_out) in enumerate(groups):
        for position, slot in enumerate(slots_in):
            reads[place * most_in + position] = new_input[read[group * per_in + slot]]
        for position, slot in enumerate(slots_out):
            row = place * most_out + position
            writes[new_output[write[slot]]] = row
            if slots_in:
                weight[row, : len(slots_in)] = inner.weight[slot, slots_in]
            if bias is not None and inner.bias is not None:
                bias[row] = inner.bias[slot]
    cut = _conv_like(inner, weight, bias, len(groups))
    return GroupedConv2d(cut, len(new_input), reads.to(device), writes.to(device))


# -------------------------------------------------------------------------------------------------------- batch norms


def _fold(network: CompactNetwork) -> None:
    """Each batch norm that alone reads a convolution goes into its weights and bias."""
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    for node in list(network.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d) or calls[node.target] > 1:
            continue
        source = node.args[0]
        conv = modules.get(str(source.target)) if source.op == "call_module" else None
        if not isinstance(conv, (nn.Conv2d, GroupedConv2d)) or len(source.users) > 1 or calls[source.target] > 1:
            continue
        fold_norm(conv, norm)
        node.replace_all_uses_with(source)
        network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()


def fold_norm(conv: nn.Conv2d | GroupedConv2d, norm: nn.BatchNorm2d) -> None:
    """Gives a convolution, in place, the weights and the bias with which it also does the batch norm behind it."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.affine:
        shift = shift + norm.bias
    inner = conv
    if isinstance(conv, GroupedConv2d):
        inner = conv.conv
        scale, shift = (v.new_zeros(inner.out_channels).index_copy(0, conv.writes, v) for v in (scale, shift))
    assert isinstance(inner, nn.Conv2d)
    if inner.bias is not None:
        shift = shift + scale * inner.bias
    inner.weight = _part(inner.weight, inner.weight * scale[:, None, None, None])
    inner.bias = _part(inner.weight, shift)
