"""Exact conversion: an AFS network that computes the very function of a trained network."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from afdslib.afs.graph import called, output_makers, trace
from afdslib.afs.layer import AFSConvBN
from afdslib.afs.verify import require_own_weights, require_same
from afdslib.base.checks import choice, number
from afdslib.base.errors import AFDSError

__all__ = ["convert", "layers", "set_density"]

# Of each network the kinds of its modules by name, and the names of its AFS layers in forward order: tracing is slow.
_ORDERS: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[str, type], ...], tuple[str, ...]]] = WeakKeyDictionary()


def layers(model: nn.Module) -> dict[str, AFSConvBN]:
    """The selected convolutions of a network by name, in forward order."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, AFSConvBN)}
    if not found:
        return {}
    kinds = tuple((name, type(module)) for name, module in model.named_modules())
    known = _ORDERS.get(model)
    if known is None or known[0] != kinds:
        order = [str(n.target) for n in trace(model).nodes if n.op == "call_module" and n.target in found]
        known = _ORDERS[model] = kinds, tuple(dict.fromkeys(order))
    return {name: found[name] for name in known[1]}


def gated(model: nn.Module) -> dict[str, AFSConvBN]:
    """`layers` of a network that has some; an AFDSError if it has none."""
    if found := layers(model):
        return found
    raise AFDSError(f"{type(model).__name__} has no AFS layer; convert it with afs.convert first")


def set_density(model: nn.Module, d: float) -> None:
    """Sets the density, 0 < d <= 1, of every selected convolution: k = ceil(d * C - 1e-9) places, C the original width.

    Another density, or a network without AFS layers, is an AFDSError.
    """
    number("density", d, above=0, most=1)
    for layer in gated(model).values():
        layer.density = float(d)


def _pairs(model: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    """Names of the (convolution, batch norm) pairs in forward order; refuses batch norms that have no convolution.

    Pairs that make the network's outputs are left out: a class is no channel that may be removed.
    """
    modules = dict(model.named_modules())
    pairs: list[tuple[str, str]] = []
    outputs = output_makers(graph, modules)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        norm = called(node, modules)
        # A batch norm on the raw input (Inception-BN) normalises the image; there is nothing to select.
        if not isinstance(norm, nn.BatchNorm2d) or (source := node.args[0]).op == "placeholder":
            continue
        if not isinstance(called(source, modules), nn.Conv2d) or len(source.users) != 1:
            raise AFDSError(
                f"batch norm {node.target!r} does not directly follow a convolution of its own, as in pre-activation "
                "networks; AFS converts networks in which each Conv2d is followed by its BatchNorm2d"
            )
        if calls[source.target] > 1 or calls[node.target] > 1:
            raise AFDSError(f"layer {source.target!r} is used more than once per forward pass; AFS needs one per use")
        if not norm.track_running_stats:
            raise AFDSError(f"batch norm {node.target!r} keeps no running statistics; AFS needs them")
        if source.target not in outputs:
            pairs.append((source.target, node.target))
    return pairs


@torch.no_grad()
def _convert_pair(conv: nn.Conv2d, norm: nn.BatchNorm2d, conv_name: str, norm_name: str) -> AFSConvBN:
    """The selected convolution that equals conv followed by norm. Source: method, exact conversion [ours]."""
    mean: Any = norm.running_mean  # _pairs refuses norms without
    kind = {"device": conv.weight.device, "dtype": mean.dtype}
    bare = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, affine=False, **kind)
    bare.load_state_dict(norm.state_dict(), strict=False)
    gamma, beta = (norm.weight, norm.bias) if norm.affine else (torch.ones_like(mean), torch.zeros_like(mean))
    if bool((gamma == 0).all()):
        raise AFDSError(
            f"every scale of batch norm {norm_name!r} is 0 (a zero-initialised residual branch), so {conv_name!r} has "
            "no channel to select; train the network before converting it"
        )
    for tensor in (conv.weight, conv.bias, bare.running_mean):
        if tensor is not None:
            tensor[gamma < 0] *= -1
    layer = AFSConvBN(conv, bare).train(norm.training)
    layer.predictor.weight.zero_()
    layer.predictor.bias.copy_(gamma.abs())
    layer.beta.copy_(beta)
    # A channel with scale 0 is the constant beta: static with gamma = 0, gone at the first mask update.
    layer.s[gamma == 0] = 0
    layer.gamma.copy_(gamma.abs())
    return layer


def convert(model: nn.Module, *, gates: str = "all") -> nn.Module:
    """A copy, in the same mode, with selected convolutions in place of Conv2d-BatchNorm2d pairs: the same function.

    The predictors start with Phi = 0 and phi = |gamma_bn|, so the gates are constant and equal to the trained scales;
    filters with a negative scale are negated together with their bias and running mean. [ours: exact conversion]

    Args:
        model: any network whose Conv2d-BatchNorm2d pairs torch.fx finds; it is left as it is.
        gates: "all", every pair (104 in ResNet-101) but those that make the network's outputs; "blocks", only the
            convolutions inside a ResNet's residual blocks (99), as in the seed's code.

    Raises:
        AFDSError: for pre-activation networks, networks that torch.fx cannot follow, a layer whose scales are all
            zero, weights that a layer does not own (shared, pruned, parametrised), a network that has been converted
            already, an unknown value of gates, or a result that is another function.
    """
    if any(isinstance(module, AFSConvBN) for module in model.modules()):
        raise AFDSError("the network has AFS layers already; convert the plain network")
    require_own_weights(model, "afs.convert")
    pairs = _pairs(model, trace(model))
    converted = convert_in_place(copy.deepcopy(model), gates=gates)
    twins = {conv: norm for conv, norm in pairs if isinstance(converted.get_submodule(conv), AFSConvBN)}
    require_same(model, converted, "afs.convert", twins=twins)
    return converted


def convert_in_place(model: nn.Module, *, gates: str) -> nn.Module:
    """What `convert` does, to the network itself, which is spoilt where it is refused; for those with the only copy."""
    choice("gates", gates, ("all", "blocks"))
    pairs = [p for p in _pairs(model, trace(model)) if gates == "all" or re.fullmatch(r"layer\d+\.\d+\.conv\d+", p[0])]
    if not pairs:
        raise AFDSError(f"no convolution with a batch norm to gate in {type(model).__name__} with gates={gates!r}")
    for conv_name, norm_name in pairs:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        model.set_submodule(conv_name, _convert_pair(conv, norm, conv_name, norm_name))
        model.set_submodule(norm_name, nn.Identity())
    architecture = getattr(model, "architecture", None)
    if isinstance(architecture, dict):
        model.architecture = {**architecture, "gates": gates}  # type: ignore[assignment]
    return model
