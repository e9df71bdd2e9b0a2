"""What a rebuilt network is checked by: weights that its layers own, and the same outputs on one random input."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from afdslib.afs.graph import eval_mode
from afdslib.base.errors import AFDSError
from afdslib.base.hooks import kept

__all__ = ["Sample", "confirm", "require_own_weights", "require_same", "sample"]

TOLERANCE = 1e-4
_SIDES = (32, 64, 16, 28, 8, 12, 48, 96, 128, 224, 299)
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)


class Sample(NamedTuple):
    """Random images, (2, C, H, W), and what a network gives for them in eval mode; no images where it takes none."""

    images: Tensor | None
    outputs: list[Tensor]


def require_own_weights(model: nn.Module, deed: str) -> None:
    """Refuses layers whose weights are not plain parameters of their own.

    Raises:
        AFDSError: for a weight that is computed (`torch.nn.utils.prune`, weight norm, parametrisations, hooks), not yet
            initialised, or shared by two layers, wholly or in part; it names the layer.
    """
    spans: list[tuple[int, int, str, object]] = []
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
                spans.append((tensor.data_ptr(), end, name, tensor.device))
    spans.sort(key=lambda span: (str(span[3]), *span[:2]))
    for (_, end, first, device), (start, _, second, other) in zip(spans, spans[1:], strict=False):
        if device == other and device != torch.device("meta") and start < end:
            raise AFDSError(
                f"{deed} needs a weight per layer, and layers {first!r} and {second!r} share one; give each a copy"
            )


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and random numbers and buffers afterwards as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = list({b.device for b in model.parameters() if b.device.type == "cuda"})
    with torch.random.fork_rng(devices), eval_mode(model), torch.no_grad():
        torch.manual_seed(0)  # for dropout that is on in eval mode, too
        try:
            yield
        finally:
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    with _untouched(model):
        return [leaf.clone() for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor)]


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
            error, scale = (x - y)[finite].abs().max(), y[finite].abs().max()
            worst = max(worst, float(error / scale.clamp_min(1e-30)))
    return worst


def _compare(before: Sample, rebuilt: nn.Module, deed: str) -> float:
    if before.images is None:
        return 0.0
    try:
        after = _outputs(rebuilt, before.images)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise AFDSError(
            f"{deed} cannot follow this network: its result does not run ({reason}); nothing was changed"
        ) from error
    return _difference(after, before.outputs)


def _tolerance(before: Sample) -> float:
    kinds = [torch.finfo(t.dtype).eps for t in before.outputs if t.is_floating_point()]
    return max([TOLERANCE, *(16 * eps for eps in kinds)])


def confirm(before: Sample, rebuilt: nn.Module, deed: str) -> None:
    """Refuses a network, rebuilt in place, whose outputs are not those that it gave before.

    Raises:
        AFDSError: if it does not run, or an output differs by more than 1e-4 of the largest (rounding, in half
            precision); what is not finite on both sides is not compared.
    """
    if (error := _compare(before, rebuilt, deed)) > _tolerance(before):
        raise AFDSError(
            f"{deed} cannot follow this network: its result computes another function (the outputs differ by "
            f"{error:.2g} of the largest); nothing was changed"
        )


def require_same(
    original: nn.Module,
    rebuilt: nn.Module,
    deed: str,
    *,
    input_size: tuple[int, int, int] | None = None,
    twins: Mapping[str, str] | None = None,
) -> None:
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
    if _compare(before, rebuilt, deed) <= _tolerance(before):
        return
    assert before.images is not None
    try:
        original, rebuilt = copy.deepcopy(original).double(), copy.deepcopy(rebuilt).double()
        exact = Sample(before.images.double(), _outputs(original, before.images.double()))
    except Exception:  # a network that insists on its own precision
        return confirm(before, rebuilt, deed)
    for name, twin in (twins or {}).items():
        found = []
        for model, layer in ((original, twin), (rebuilt, name)):
            with kept({layer: model.get_submodule(layer)}) as tensors:
                _outputs(model, exact.images)  # type: ignore[arg-type]
            found.append(list(tensors.values()))
        if _difference(found[1], found[0]) > _tolerance(exact):
            raise AFDSError(
                f"{deed} does not keep the function of layer {name!r}, whose weights or outputs something else "
                "computes (a hook, a parametrisation or a layer class of its own); make them plain first"
            )
    confirm(exact, rebuilt, deed)
