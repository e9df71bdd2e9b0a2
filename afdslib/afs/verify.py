"""What a rebuilt network is checked by: weights that its layers own, and the same outputs on one random input."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from afdslib.afs.graph import eval_mode
from afdslib.base.errors import AFDSError
from afdslib.base.hooks import kept

__all__ = ["Sample", "confirm", "require_own_weights", "require_same", "sample"]

_SIDES = (32, 64, 16, 28, 8, 12, 48, 96, 128, 224, 299)
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)


class Sample(NamedTuple):
    """Random images, (2, C, H, W), and what a network gives for them in eval mode; no images where it takes none."""

    images: Tensor | None
    outputs: list[Tensor]


def require_own_weights(model: nn.Module, deed: str) -> None:
    """Refuses layers whose weights are not plain parameters of their own, by an AFDSError with the layer's name.

    A weight is computed (`torch.nn.utils.prune`, weight norm, parametrisations, hooks), not yet initialised, or shared
    by two layers, wholly or in part.
    """
    spans: list[tuple[str, int, int, str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, _WEIGHTED):
            continue
        for part in ("weight", "bias"):
            tensor = module._parameters.get(part)
            if parametrize.is_parametrized(module, part) or (tensor is None and getattr(module, part) is not None):
                raise AFDSError(
                    f"{deed} needs plain weights, and the {part} of layer {name!r} is computed from other tensors "
                    "(pruning, weight norm or a parametrisation); make it permanent first, for instance with "
                    "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
                )
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                raise AFDSError(f"{deed} needs weights, and layer {name!r} has none yet; pass an image through it")
            if tensor is not None and tensor.numel():
                end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
                spans.append((str(tensor.device), tensor.data_ptr(), end, name))
    for (device, _, end, first), (other, start, _, second) in itertools.pairwise(sorted(spans)):
        if device == other != "meta" and start < end:
            raise AFDSError(
                f"{deed} needs a weight per layer, and layers {first!r} and {second!r} share one; give each a copy"
            )


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What a network gives in eval mode; random numbers and buffers stay as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = list({b.device for b in model.parameters() if b.device.type == "cuda"})
    with torch.random.fork_rng(devices), eval_mode(model):
        torch.manual_seed(0)  # for dropout that is on in eval mode, too
        try:
            return [leaf.clone() for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor)]
        finally:
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])


def sample(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Sample:
    """A network's outputs on random images of a size, or of the first usual size that it takes.

    It leaves modes, buffers and random numbers alone.
    """
    like = next(model.parameters())
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    sizes = [input_size] if input_size else [(c, s, s) for s in _SIDES for c in dict.fromkeys((channels, 3))]
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        noise = torch.randn(2, *size, generator=generator) + torch.randn(2, size[0], 1, 1, generator=generator)
        images = noise.to(like.device, like.dtype)
        try:
            return Sample(images, _outputs(model, images))
        except Exception:  # a size that the network does not take; networks raise what they like
            continue
    return Sample(None, [])


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    """max|a-b| / max|b| where both are finite, the largest of all outputs; infinite where they do not compare."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.detach().double(), y.detach().to(x.device).double()
        finite = x.isfinite() & y.isfinite()
        if bool(x.isfinite().all()) != bool(y.isfinite().all()):
            return float("inf")
        if bool(finite.any()):
            worst = max(worst, float((x - y)[finite].abs().max() / y[finite].abs().max().clamp_min(1e-30)))
    return worst


def _excess(before: Sample, rebuilt: nn.Module, deed: str) -> float:
    """The difference of a rebuilt network's outputs; 0 where it is within the tolerance of their precision."""
    if before.images is None:
        return 0.0
    try:
        after = _outputs(rebuilt, before.images)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise AFDSError(
            f"{deed} cannot follow this network: its result does not run ({reason}); nothing was changed"
        ) from error
    difference = _difference(after, before.outputs)
    return difference if difference > _tolerance(before.outputs) else 0.0


def _tolerance(outputs: list[Tensor]) -> float:
    return max([1e-4, *(16 * torch.finfo(t.dtype).eps for t in outputs if t.is_floating_point())])


def confirm(before: Sample, rebuilt: nn.Module, deed: str) -> None:
    """Refuses a network, rebuilt in place, whose outputs are not those that it gave before.

    Raises:
        AFDSError: if it does not run, or an output differs by more than 1e-4 of the largest (rounding, in half
            precision); what is not finite on both sides is not compared.
    """
    if error := _excess(before, rebuilt, deed):
        raise AFDSError(
            f"{deed} cannot follow this network: its result computes another function (the outputs differ by "
            f"{error:.2g} of the largest); nothing was changed"
        )


def require_same(
    original: nn.Module, rebuilt: nn.Module, deed: str, *, input_size: tuple[int, int, int] | None = None,
    twins: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Refuses a rebuilt network that is not the same function as the original, in eval mode on one random input.

    Where they differ, both are compared once more as copies in float64: rounding may tip the choice of a gate.

    Args:
        original, rebuilt: both are left as they are.
        deed: what was done, for the message.
        input_size: (C, H, W); default: the first usual size that the original takes.
        twins: layers of the original by the name of what replaced them, in forward order; one that differs is named.

    Raises:
        AFDSError: see `confirm`.
    """
    before = sample(original, input_size)
    if before.images is None or not _excess(before, rebuilt, deed):
        return
    try:
        original, rebuilt = copy.deepcopy(original).double(), copy.deepcopy(rebuilt).double()
        exact = Sample(before.images.double(), _outputs(original, before.images.double()))
    except Exception:  # a network that insists on its own precision
        return confirm(before, rebuilt, deed)
    for name, twin in (twins or {}).items():
        with kept({name: rebuilt.get_submodule(name)}) as ours, kept({name: original.get_submodule(twin)}) as theirs:
            for model in (original, rebuilt):
                _outputs(model, before.images.double())
        if _difference(list(ours.values()), list(theirs.values())) > _tolerance(exact.outputs):
            raise AFDSError(
                f"{deed} does not keep the function of layer {name!r}, whose weights or outputs something else "
                "computes (a hook, a parametrisation or a layer class of its own); make them plain first"
            )
    confirm(exact, rebuilt, deed)
