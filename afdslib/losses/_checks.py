"""What the losses refuse, each with one sentence.

Shapes and flags are looked at everywhere, values on the CPU only: on an accelerator that would make the host wait in
every step. There torch stops at an index that is no class, and the training loop names a term that is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afdslib.base.errors import AFDSError, DivergedError

__all__ = ["NOTHING", "finite", "pair", "targets"]

NOTHING = -(2**31)
"""`ignore_index` of a cross-entropy that leaves no target out, whatever stands there."""

_FROZEN = "run the teacher in eval mode under torch.no_grad()"


def pair(student: Tensor, teacher: Tensor, what: str, *, dims: int = 4, equal: bool = False, frozen: str = _FROZEN):
    """Two floating-point tensors of `dims` dimensions, of one batch or of `equal` shapes, neither of them empty.

    The second carries no gradient; `frozen` says what to do if it does.
    """
    wanted = "(batch, channels, height, width)" if dims == 4 else f"{dims} dimensions"
    for who, x in (("student", student), ("teacher", teacher)):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if not isinstance(x, Tensor) or x.ndim != dims:
            raise AFDSError(f"The {who}'s {what} is {shape}; give a tensor of {wanted}.")
        if not x.is_floating_point():
            raise AFDSError(f"The {who}'s {what} is of {x.dtype}; give floating-point numbers.")
        if x.numel() == 0:
            raise AFDSError(f"The {who}'s {what} is empty, {shape}; check the tapped layer and the batch.")
    if len(student) != len(teacher):
        samples = f"{len(student)} samples and the teacher's {len(teacher)}"
        raise AFDSError(f"The student's {what} holds {samples}; give both networks the same batch.")
    if teacher.requires_grad:
        raise AFDSError(f"The teacher's {what} carries gradients; {frozen}.")
    if equal and student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and the teacher's {tuple(teacher.shape)}"
        raise AFDSError(f"The student's {what} is {shapes}; this loss needs equal shapes, compare matching layers.")


def targets(target: Tensor, logits: Tensor) -> None:
    """One class index per row of (B, classes) logits. The values are looked at on the CPU only."""
    rows, classes = logits.shape
    if target.shape != (rows,) or target.dtype != torch.int64:
        raise AFDSError(
            f"The target is {target.dtype} of the shape {tuple(target.shape)} for {rows} samples; give one class index "
            f"per sample, int64."
        )
    wrong = target[(target < 0) | (target >= classes)] if target.device.type == "cpu" else target[:0]
    if len(wrong):
        raise AFDSError(f"The target {wrong[0]:d} is none of the {classes} classes; give one from 0 to {classes - 1}.")


def finite(loss: Tensor, **inputs: Tensor) -> Tensor:
    """Returns the loss; on the CPU a NaN or infinite one is traced to its input, or said to have overflowed.

    Raises:
        DivergedError: on the CPU, for a loss that is not finite.
    """
    if loss.device.type != "cpu" or bool(loss.detach().isfinite().all()):
        return loss
    advice = "lower the learning rate or look at the step before this one"
    for name, x in inputs.items():
        if bad := int((~x.detach().isfinite()).sum()):
            name = name.replace("_", " ").capitalize()
            raise DivergedError(f"{name} holds {bad} values that are NaN or infinite out of {x.numel()}; {advice}.")
    largest = max(float(x.detach().abs().max()) for x in inputs.values())
    raise DivergedError(f"The loss is {loss:g} although its inputs are finite, the largest {largest:.1e}; {advice}.")
