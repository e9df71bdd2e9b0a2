"""Networks and images to measure: random weights, gates that depend on the image, masks, and the rival's pruning."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from afdslib import afs, backbones
from afdslib.afs import macs
from afdslib.afs.compact import compact
from afdslib.afs.graph import streams
from afdslib.afs.layer import AFSConvBN
from afdslib.base.errors import AFDSError

__all__ = ["cut", "folded", "jaccard", "photographs", "plain_network", "random_gates", "rebuilt", "torch_pruned"]


def plain_network(name: str, classes: int = 1000, *, width: float = 1.0, seed: int = 0) -> nn.Module:
    """A backbone with the stem for photographs and random weights, in eval mode."""
    torch.manual_seed(seed)
    return backbones.build(name, classes, width=width).eval()


def rebuilt(architecture: Mapping[str, Any]) -> nn.Module:
    """The plain network of a saved one's architecture, with random weights."""
    known = ("name", "num_classes", "stem", "width")
    return backbones.build(**{key: value for key, value in architecture.items() if key in known}).eval()


def folded(model: nn.Module, size: int) -> nn.Module:
    """A plain network with its batch norms folded into the convolutions: the fairest dense baseline."""
    return compact(model, input_size=(3, size, size), fold_bn=True)


def photographs(count: int, size: int, seed: int) -> Tensor:
    """Smooth random images (count, 3, size, size), each of mean 0 and deviation 1; unlike noise, no two look alike."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(count, 3, size, size)
    for cells in (2, 4, 8, 16, 32):
        field = torch.randn(count, 3, cells, cells, generator=generator)
        image += F.interpolate(field, size=(size, size), mode="bilinear")
    image -= image.mean((1, 2, 3), keepdim=True)
    return image / image.std((1, 2, 3), keepdim=True)


@torch.no_grad()
def random_gates(model: nn.Module, images: Tensor, *, spread: float = 0.05, seed: int = 0) -> None:
    """Predictors at random, in place, so that importances vary with the image; and batch norms fitted to the images.

    Each importance is 1 + spread * (z(x) + u / 3) with z of unit variance over the images and a u of the channel, and
    falls where all inputs rise, so that scales do not multiply up through a hundred layers. Without u the channels of
    the first layer, which reads three inputs, tie up to rounding errors. Random gates say nothing about accuracy.

    Args:
        model: a converted network, put into eval mode.
        images: (B, 3, H, W), from which the variances are taken, layer by layer.
        spread: of the importances.
        seed: of the predictors.
    """
    generator = torch.Generator().manual_seed(seed)

    def prepare(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not isinstance(layer, AFSConvBN):
            return
        pooled = arguments[0].mean((2, 3))
        mean, scale = pooled.mean(0), pooled.mean(0).norm()
        phi = torch.randn(layer.predictor.weight.shape, generator=generator).to(pooled)
        steady = scale > 0.1 * pooled.std(0).norm()
        direction = mean / scale if steady else torch.zeros_like(mean)
        phi -= torch.outer(phi @ direction, direction)
        phi *= spread / ((pooled - mean) @ phi.T).std(0)[:, None].clamp_min(1e-6)
        phi -= 0.3 * direction / scale.clamp_min(1e-30)
        layer.predictor.weight.copy_(phi)
        offset = torch.randn(len(phi), generator=generator).to(pooled) / 3
        layer.predictor.bias.copy_(1 + spread * offset - phi @ mean)
        y = layer.conv(arguments[0])
        layer.norm.running_mean.copy_(y.mean((0, 2, 3)))  # type: ignore[union-attr]
        layer.norm.running_var.copy_(y.var((0, 2, 3)))  # type: ignore[union-attr]

    with register_module_forward_pre_hook(prepare):
        model.eval()(images)


@torch.no_grad()
def jaccard(model: nn.Module, images: Tensor) -> float:
    """Mean over layers and pairs of neighbouring images of |kept by both| / |kept by either|."""
    overlaps: list[Tensor] = []

    def compare(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if isinstance(layer, AFSConvBN):
            kept = layer.gates(arguments[0]).active > 0
            overlaps.append((kept[1:] & kept[:-1]).sum(1) / (kept[1:] | kept[:-1]).sum(1).clamp_min(1))

    with register_module_forward_pre_hook(compare):
        model(images)
    return float(torch.cat(overlaps).mean())


@torch.no_grad()
def cut(model: nn.Module, *, keep: float, stream: float, multiple: int, seed: int = 0) -> None:
    """Random masks, in place, that keep a share of every layer and of every residual stream; all gates become constant.

    Args:
        model: a converted network.
        keep: share of a layer's channels.
        stream: share of the channels of layers that are added up in a residual stream, the same channels in each.
        multiple: the numbers are rounded to the nearest multiple, at least one.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    together = {name: names for names in streams(model) for name in names}
    chosen: dict[tuple[str, ...], Tensor] = {}
    for name, layer in afs.layers(model).items():
        names, share, width = together.get(name, (name,)), stream if name in together else keep, layer.m.numel()
        if names not in chosen:
            kept = min(width, max(multiple, multiple * round(share * width / multiple)))
            chosen[names] = torch.randperm(width, generator=generator)[:kept]
        layer.m.zero_()[chosen[names]] = 1
        layer.gamma.copy_(layer.predictor.bias.relu())
        layer.s.zero_()


def torch_pruned(model: nn.Module, size: int, allowed: float, multiple: int) -> nn.Module:
    """The network that torch-pruning makes with coupled widths, all cut alike, with at most the allowed MACs.

    The share is bisected; filters go by their L1 norm. Source: Fang et al., DepGraph, CVPR 2023. [code]
    """
    import torch_pruning

    low, high, best = 0.0, 0.98, None
    for _ in range(10):
        ratio, pruned = (low + high) / 2, copy.deepcopy(model)
        torch_pruning.pruner.BasePruner(
            pruned, torch.zeros(1, 3, size, size), importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio, round_to=multiple,
            ignored_layers=[pruned.get_submodule(backbones.classifier_name(pruned))],
        ).step()  # fmt: skip
        if macs.count(pruned, (3, size, size)).total <= allowed:
            high, best = ratio, pruned
        else:
            low = ratio
    if best is None:
        raise AFDSError(f"torch-pruning does not reach {allowed:.3g} MACs; keep more channels")
    return best.eval()
