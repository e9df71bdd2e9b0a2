"""What the losses refuse, each with one sentence.

The checks look at shapes and flags, which costs nothing on any device. Values are looked at on the CPU only: `targets`
looks for indices that are no class, and `finite` tests the finished scalar of a loss and searches for the culprit only
when that is NaN. On an accelerator both would make the host wait in every step; there torch stops at such an index, and
the training loop's own check of all terms names the term that is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afdslib.base.errors import AFDSError, DivergedError

__all__ = ["NOTHING", "finite", "logits", "pair", "same_shape", "targets"]

NOTHING = -(2**31)
"""`ignore_index` of a cross-entropy that leaves no target out, whatever stands there."""

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


def targets(target: Tensor, logits: Tensor) -> None:
    """One class index per row of (B, classes) logits. The values are looked at on the CPU only."""
    rows, classes = logits.shape
    if target.shape != (rows,) or target.dtype != torch.int64:
        raise AFDSError(
            f"The target is {target.dtype} of the shape {tuple(target.shape)} for {rows} samples; give one class index "
            f"per sample, int64."
        )
    if target.device.type == "cpu" and rows and not (0 <= int(target.min()) and int(target.max()) < classes):
        wrong = next(int(t) for t in target if not 0 <= t < classes)
        raise AFDSError(f"The target {wrong} is none of the {classes} classes; give indices from 0 to {classes - 1}.")


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
