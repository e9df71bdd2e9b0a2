"""Feature maps of two networks made comparable: full precision, one height and width."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["area_matrix", "full_precision", "match_size"]


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
