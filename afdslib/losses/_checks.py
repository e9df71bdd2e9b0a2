"""What the losses refuse, each with one sentence.

The checks look at shapes and flags, which costs nothing on any device. Values are looked at in one place only,
`finite`: on the CPU it tests the finished scalar of a loss and searches for the culprit only when that is NaN. On an
accelerator that test would make the host wait in every step, so it is left out there; the training loop's own check of
all terms still stops such a run and names the term.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from afdslib.base.errors import AFDSError, DivergedError

__all__ = ["at_least", "finite", "logits", "pair", "positive", "same_shape", "whole"]

_FROZEN = "run the teacher in eval mode under torch.no_grad()"


def pair(student: Tensor, teacher: Tensor, what: str, *, dims: int = 4, frozen: str = _FROZEN) -> None:
    """Two floating-point tensors of `dims` dimensions, neither empty, of one batch.

    The second carries no gradient; `frozen` says what to do if it does.
    """
    for who, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor) or x.ndim != dims:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            wanted = "(batch, channels, height, width)" if dims == 4 else f"{dims} dimensions"
            raise AFDSError(f"The {who}'s {what} is {shape}; give a tensor of {wanted}.")
        if not x.is_floating_point():
            raise AFDSError(f"The {who}'s {what} is of {x.dtype}; give floating-point numbers.")
        if x.numel() == 0:
            raise AFDSError(f"The {who}'s {what} is empty, {tuple(x.shape)}; check the tapped layer and the batch.")
    if student.shape[0] != teacher.shape[0]:
        raise AFDSError(
            f"The student's {what} holds {student.shape[0]} samples and the teacher's {teacher.shape[0]}; give both "
            f"networks the same batch."
        )
    if teacher.requires_grad:
        raise AFDSError(f"The teacher's {what} carries gradients; {frozen}.")


def same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    """Equal shapes."""
    if student.shape != teacher.shape:
        raise AFDSError(
            f"The student's {what} has the shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; "
            f"this loss needs equal shapes, tap matching layers or put an adapter on the student."
        )


def logits(student: Tensor, teacher: Tensor) -> None:
    """Two (B, classes) tensors of equal shape."""
    pair(student, teacher, "logits", dims=2)
    same_shape(student, teacher, "logits")


def positive(value: float, name: str) -> None:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise AFDSError(f"{name} is {value!r}; give a finite number above 0.")


def at_least(value: float, name: str, least: float) -> None:
    """A finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value < math.inf:
        raise AFDSError(f"{name} is {value!r}; give a finite number of at least {least}.")


def whole(value: int, name: str, least: int) -> None:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Real) or value % 1 != 0 or value < least:
        raise AFDSError(f"{name} is {value!r}; give a whole number of at least {least}.")


def finite(loss: Tensor, **inputs: Tensor) -> Tensor:
    """Returns the loss; on the CPU a NaN or infinite one is traced to its input, or said to have overflowed.

    Raises:
        DivergedError: on the CPU, for a loss that is not finite.
    """
    if loss.device.type == "cpu" and not bool(torch.isfinite(loss.detach()).all()):
        for name, x in inputs.items():
            bad = ~torch.isfinite(x.detach())
            if bool(bad.any()):
                raise DivergedError(
                    f"{name.replace('_', ' ').capitalize()} holds {int(bad.sum())} values that are NaN or infinite "
                    f"out of {x.numel()}; lower the learning rate or look at the step before this one."
                )
        largest = max(float(x.detach().abs().max()) for x in inputs.values())
        raise DivergedError(
            f"The loss is {float(loss)} although its inputs are finite, the largest {largest:.1e}; lower the learning "
            f"rate or look at the step before this one."
        )
    return loss
