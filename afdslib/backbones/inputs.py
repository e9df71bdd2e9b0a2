"""What each backbone expects its images to be: the mean and deviation they are normalised by, or none.

A student and its teacher may expect two things; `expect` puts the conversion into the second network, so that one
batch serves both. A network that was trained on other images than torchvision's says so in its `architecture`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from afdslib.base.errors import AFDSError

__all__ = [
    "IMAGENET", "RAW", "InputStatistics", "expect", "fed", "input_of", "input_statistics", "scaled_down",
    "see_at", "see_whole", "set_input",
]  # fmt: skip


@dataclass(frozen=True)
class InputStatistics:
    """(pixel - mean) / deviation, per channel, of RGB values from 0 to 255."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


IMAGENET = InputStatistics((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # torchvision's weights
RAW = InputStatistics((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_OTHERS = {
    "inception_bn": RAW,  # opens with a batch norm of its own [code]
    "resnet50_senet": InputStatistics((123.68, 116.28, 103.53), (58.395, 57.12, 57.375)),  # its README [code]
}


def input_statistics(name: str) -> InputStatistics:
    """What the recipe of the backbone of that name feeds it; torchvision's statistics for most."""
    if name.startswith("efficientnet_lite"):
        return InputStatistics((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))  # of its files [code]
    return _OTHERS.get(name, IMAGENET)


def set_input(model: nn.Module, statistics: InputStatistics) -> None:
    """Writes into a network's `architecture` what it is trained on; nothing for torchvision's, which is the default."""
    architecture = {k: v for k, v in model.architecture.items() if k != "input"}  # type: ignore[operator, union-attr]
    if statistics != IMAGENET:
        architecture["input"] = {k: list(v) for k, v in asdict(statistics).items()}
    model.architecture = architecture  # type: ignore[assignment]


def input_of(model: nn.Module) -> InputStatistics:
    """What a network was trained on, as its `architecture` says; an AFDSError if that makes no sense."""
    architecture = getattr(model, "architecture", None)
    said = architecture.get("input") if isinstance(architecture, dict) else None
    if said is None:
        return IMAGENET
    try:
        statistics = InputStatistics(*(tuple(map(float, said[key])) for key in ("mean", "deviation")))  # type: ignore[arg-type]
        if len(statistics.mean) == len(statistics.deviation) == 3 and min(statistics.deviation) > 0:
            return statistics
    except (KeyError, TypeError, ValueError):
        pass
    raise AFDSError(f"the network's input is {said!r}; it must hold the mean and deviation of three colours")


class _Conversion:
    """A forward pre-hook: from one normalisation to another. It holds numbers only, so it goes with a model's copy."""

    def __init__(self, given: InputStatistics, wanted: InputStatistics) -> None:
        self.scale = [d / other for d, other in zip(given.deviation, wanted.deviation, strict=True)]
        means = zip(given.mean, wanted.mean, wanted.deviation, strict=True)
        self.shift = [(m - mean) / deviation for m, mean, deviation in means]

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, *rest = args
        scale, shift = (images.new_tensor(v).view(1, 3, 1, 1) for v in (self.scale, self.shift))
        return (torch.addcmul(shift, images, scale), *rest)


def expect(model: nn.Module, given: InputStatistics, wanted: InputStatistics) -> nn.Module:
    """The network, which expects images normalised by `wanted`, takes them normalised by `given` from now on.

    It is changed by a hook that goes with its copies and is no part of its state dict.
    """
    if given != wanted:
        model.register_forward_pre_hook(_Conversion(given, wanted))
    return model


class _Downscale:
    """A forward pre-hook: square images scaled down, with antialiasing."""

    def __init__(self, side: int):
        self.side = side

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, *rest = args
        return (scaled_down(images, self.side).contiguous(memory_format=torch.channels_last), *rest)


def scaled_down(images: Tensor, side: int) -> Tensor:
    """Square images (B, 3, H, H) at another side, with antialiasing; as Pillow's bilinear filter."""
    small = nn.functional.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)
    return small.to(images.dtype)


def see_at(model: nn.Module, side: int) -> nn.Module:
    """Lets a network scale its images down before it looks at them, and writes so into its `architecture`.

    Args:
        model: changed in place, by a hook that goes with its copies and its file.
        side: of the images that it computes on, pixels.

    Returns:
        The model.
    """
    model.register_forward_pre_hook(_Downscale(side))
    model.architecture = {**model.architecture, "side": side}  # type: ignore[assignment, dict-item]
    return model


def see_whole(model: nn.Module) -> int:
    """Takes back `see_at`, in place, for whoever scales the images down before; returns the side, or 0 without one."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Downscale):
            del model._forward_pre_hooks[key]
    architecture = dict(getattr(model, "architecture", {}))
    side = int(architecture.pop("side", 0))
    model.architecture = architecture  # type: ignore[assignment]
    return side


@contextmanager
def fed(model: nn.Module, given: InputStatistics) -> Iterator[None]:
    """Inside the block a network takes images normalised by `given`, whatever its `input_of` is."""
    wanted = input_of(model)
    with model.register_forward_pre_hook(_Conversion(given, wanted)) if given != wanted else nullcontext():
        yield
