"""Feature maps of two networks made comparable: matching layers, full precision, one height and width."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from afdslib.base.errors import AFDSError

__all__ = ["LayerLoss", "area_matrix", "full_precision", "match_size"]


class LayerLoss(nn.Module):
    """What losses that sum over layers share: the layers, and which channels count.

    Args:
        names: The student's layers.
        what: The loss's name for sentences.
    """

    def __init__(self, names: Iterable[str], what: str) -> None:
        super().__init__()
        self.names, self.what = list(names), what
        if not self.names:
            raise AFDSError(f"{what} was given no layer; name at least one.")
        self.alive: dict[str, Tensor] = {}

    def set_alive(self, alive: Mapping[str, Tensor]) -> None:
        """Leaves channels out, such as those a pruned student no longer has.

        Args:
            alive: (C,) of bool for some or all layers, False for a channel to leave out.
        """
        for name, flags in alive.items():
            if name not in self.names or flags.dtype != torch.bool or flags.ndim != 1 or not bool(flags.any()):
                raise AFDSError(
                    f"The living channels of {name} are not flags of a known layer with at least one set; the layers "
                    f"of {self.what} are {', '.join(self.names)}."
                )
        self.alive = {name: flags.detach() for name, flags in alive.items()}

    def flags(self, name: str, like: Tensor) -> Tensor | None:
        """The living channels of a layer on a map's device; None where all of them count."""
        flags = self.alive.get(name)
        return None if flags is None or bool(flags.all()) else flags.to(like.device)

    def matched(
        self, student: Mapping[str, Tensor], source: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(layer, student's map, source's map); a source of another depth gives one map per stage in the same order."""
        if missing := [name for name in self.names if name not in student]:
            raise AFDSError(f"The student's features lack {missing[0]}; they hold {', '.join(student) or 'nothing'}.")
        if any(name not in source for name in self.names):
            if len(source) != len(self.names):
                raise AFDSError(
                    f"The source's features hold {', '.join(source) or 'nothing'} for {', '.join(self.names)} of the "
                    f"student; give one map per stage."
                )
            source = dict(zip(self.names, source.values(), strict=True))
        return ((name, student[name], source[name]) for name in self.names)


def full_precision(x: Tensor) -> Tensor:
    """float32 for half-precision tensors (squares overflow float16), everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def area_matrix(size: int, target: int, like: Tensor) -> Tensor:
    """(target, size): each row averages the cells that an output cell covers, by overlap, and sums to 1."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (size / target)
    cells = torch.arange(size, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], cells[None])
    high = torch.minimum(edges[1:, None], cells[None] + 1)
    return ((high - low).clamp(min=0) * (target / size)).to(like)


def match_size(student: Tensor, teacher: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width of the two, by area averaging. [ours]

    The averaging is two matrix products, so its gradient is the same in every run (interpolation and adaptive pooling
    add with atomics on a GPU). A warning says once that the sizes differ.

    Shape:
        student (B, C, H, W), teacher (B, C', H', W'); the results have height min(H, H') and width min(W, W').
    """
    if student.shape[-2:] == teacher.shape[-2:]:
        return student, teacher
    height, width = (min(a, b) for a, b in zip(student.shape[-2:], teacher.shape[-2:], strict=True))
    warnings.warn(
        f"{what}: the student's {student.shape[-2]}x{student.shape[-1]} map and the teacher's "
        f"{teacher.shape[-2]}x{teacher.shape[-1]} are compared at {height}x{width} (area averaging).",
        stacklevel=3,
    )
    return _resize(student, height, width), _resize(teacher, height, width)


def _resize(x: Tensor, height: int, width: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it would average in half precision
        if x.shape[-2] != height:
            x = area_matrix(x.shape[-2], height, x) @ x
        if x.shape[-1] != width:
            x = x @ area_matrix(x.shape[-1], width, x).t()
    return x
