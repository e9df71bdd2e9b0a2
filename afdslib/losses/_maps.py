"""Feature maps of two networks made comparable: matching layers, full precision, one height and width."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from afdslib.base.errors import AFDSError

__all__ = ["LayerLoss", "area_matrix", "full_precision", "match_size"]


class LayerLoss(nn.Module):
    """What losses that sum over layers share: the layers, and which of the student's channels count.

    Args:
        channels: How many channels each of the student's layers has; None where any number is taken.
        what: The loss's name for sentences.
    """

    persistent = False  # whether the living channels are in the state

    def __init__(self, channels: Mapping[str, int | None], what: str) -> None:
        super().__init__()
        if not channels:
            raise AFDSError(f"{what} was given no layer; name at least one.")
        self.channels, self.what = dict(channels), what
        self.partial: set[str] = set()  # layers of which some channels do not count
        self.keys = {name: name.replace(".", "_") for name in channels}  # names of modules and buffers hold no dots
        if len(set(self.keys.values())) < len(channels):
            raise AFDSError(f"layer names must differ in more than dots and underscores, got {', '.join(channels)}")
        for name, count in channels.items():
            flags = torch.ones(count or 1, dtype=torch.bool)
            self.register_buffer(f"alive_{self.keys[name]}", flags, persistent=self.persistent)

    def alive(self, name: str) -> Tensor:
        """(C,) of bool: the channels of a layer that count."""
        return self.get_buffer(f"alive_{self.keys[name]}")

    def set_alive(self, alive: Mapping[str, Tensor]) -> None:
        """Says which channels can be other than zero, such as `afs.living_channels`; the others leave the loss. [ours]

        Args:
            alive: (C,) of bool by layer; of a layer that is not named, all count.
        """
        for name, flags in alive.items():
            count = self.channels.get(name) or flags.numel()
            if name not in self.keys or flags.dtype != torch.bool or flags.shape != (count,) or not bool(flags.any()):
                raise AFDSError(
                    f"The living channels of {name} are not {count} flags of a known layer with at least one set; the "
                    f"layers of {self.what} are {', '.join(self.keys)}."
                )
        self.partial = {name for name, flags in alive.items() if not bool(flags.all())}
        for name, key in self.keys.items():
            old = self.alive(name)
            setattr(self, f"alive_{key}", alive.get(name, torch.ones_like(old)).to(old.device, copy=True))

    def matched(
        self, student: Mapping[str, Tensor], source: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(layer, student's map, source's map); a source of another depth gives one map per stage in the same order."""
        if missing := [name for name in self.keys if name not in student]:
            raise AFDSError(f"The student's features lack {missing[0]}; they hold {', '.join(student) or 'nothing'}.")
        if any(name not in source for name in self.keys):
            if len(source) != len(self.keys):
                raise AFDSError(
                    f"The source's features hold {', '.join(source) or 'nothing'} for {', '.join(self.keys)} of the "
                    f"student; give one map per stage."
                )
            source = dict(zip(self.keys, source.values(), strict=True))
        return ((name, student[name], source[name]) for name in self.keys)


def full_precision(x: Tensor) -> Tensor:
    """float32 for half-precision tensors (squares overflow float16), everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def area_matrix(size: int, target: int, like: Tensor) -> Tensor:
    """(target, size): each row averages the cells that an output cell covers, by overlap, and sums to 1."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (size / target)
    cells = torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    return (overlap.clamp(min=0) * (target / size)).to(like)


def match_size(student: Tensor, teacher: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width of the two, by area averaging. [ours]

    The averaging is two matrix products, so its gradient is the same in every run (interpolation and adaptive pooling
    add with atomics on a GPU). A warning says once that the sizes differ.

    Shape:
        student (B, C, H, W), teacher (B, C', H', W'); the results have height min(H, H') and width min(W, W').
    """
    own, other = student.shape[-2:], teacher.shape[-2:]
    if own == other:
        return student, teacher
    height, width = (min(a, b) for a, b in zip(own, other, strict=True))
    warnings.warn(
        f"{what}: the student's {own[0]}x{own[1]} map and the teacher's {other[0]}x{other[1]} are compared at "
        f"{height}x{width} (area averaging).",
        stacklevel=3,
    )
    return _resize(student, height, width), _resize(teacher, height, width)


def _resize(x: Tensor, height: int, width: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it would average in half precision
        if x.shape[-2] != height:
            x = area_matrix(x.shape[-2], height, x) @ x
        return x @ area_matrix(x.shape[-1], width, x).t() if x.shape[-1] != width else x
