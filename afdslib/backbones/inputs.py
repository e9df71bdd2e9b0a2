"""What each backbone expects its images to be: the mean and deviation they are normalised by, or none.

Two networks that see one batch, a student and its teacher, may expect two things; `expect` puts the conversion into the
second network, so that one batch, augmented once, serves both. A network that was trained on other images than
torchvision's says so in its `architecture`, and with it in its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from afdslib.base.errors import AFDSError

__all__ = ["IMAGENET", "RAW", "InputStatistics", "expect", "fed", "input_of", "input_statistics", "see_at", "set_input"]


@dataclass(frozen=True)
class InputStatistics:
    """(pixel - mean) / deviation, per channel, of RGB values from 0 to 255."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


# torchvision's weights: 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225 of values from 0 to 1.
IMAGENET = InputStatistics((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# The values as they are: Inception-BN opens with a batch norm of its own. [code]
RAW = InputStatistics((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# The modified ResNet-50 of neuron selectivity transfer, as its README gives them. [code]
SENET = InputStatistics((123.68, 116.28, 103.53), (58.395, 57.12, 57.375))
# EfficientNet-Lite's files. [code]
LITE = InputStatistics((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))

_OTHERS = {"inception_bn": RAW, "resnet50_senet": SENET}


def input_statistics(name: str) -> InputStatistics:
    """What the recipe of the backbone of that name feeds it; torchvision's statistics for most."""
    return LITE if name.startswith("efficientnet_lite") else _OTHERS.get(name, IMAGENET)


def set_input(model: nn.Module, statistics: InputStatistics) -> None:
    """Writes into a network's `architecture` what it is trained on; nothing for torchvision's, which is the default."""
    architecture = {k: v for k, v in model.architecture.items() if k != "input"}  # type: ignore[operator, union-attr]
    if statistics != IMAGENET:
        architecture["input"] = {k: list(v) for k, v in asdict(statistics).items()}
    model.architecture = architecture  # type: ignore[assignment]


def input_of(model: nn.Module) -> InputStatistics:
    """What a network was trained on, as its `architecture` says.

    Raises:
        AFDSError: it says something that makes no sense.
    """
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
        pairs = list(zip(given.mean, given.deviation, wanted.mean, wanted.deviation, strict=True))
        self.scale = [d / other for _, d, _, other in pairs]
        self.shift = [(m - mean) / other for m, _, mean, other in pairs]

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, *rest = args
        scale, shift = (images.new_tensor(v).view(1, 3, 1, 1) for v in (self.scale, self.shift))
        return (torch.addcmul(shift, images, scale), *rest)


def expect(model: nn.Module, given: InputStatistics, wanted: InputStatistics) -> nn.Module:
    """Lets a network that expects `wanted` be fed images normalised by `given`.

    Args:
        model: changed in place, by a hook that goes with its copies and is no part of its state dict.
        given: how the images are normalised.
        wanted: how the network expects them.

    Returns:
        The model.
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
        size = (self.side, self.side)
        small = nn.functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
        return (small.to(images.dtype).contiguous(memory_format=torch.channels_last), *rest)


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


@contextmanager
def fed(model: nn.Module, given: InputStatistics) -> Iterator[None]:
    """Inside the block a network takes images normalised by `given`, whatever its `input_of` is."""
    wanted = input_of(model)
    handle = None if given == wanted else model.register_forward_pre_hook(_Conversion(given, wanted))
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
