"""Knowledge distillation on logits. Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
arXiv 1503.02531."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from afdslib.base.errors import AFDSError
from afdslib.losses import _checks
from afdslib.losses._maps import full_precision
from afdslib.losses.term import Batch, Term

__all__ = ["Distil", "SoftLabels", "kd_loss", "soft_kl_loss"]


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, T: float = 4.0, alpha: float = 0.9
) -> Tensor:
    """alpha T^2 KL(teacher || student at temperature T) + (1 - alpha) CE(student, target), mean over the batch.

    The attention-transfer code [code] averages the KL over classes as well as samples and doubles it, so its
    alpha = 0.9 weighs the soft term 2 / classes as much as here (0.2 of it on CIFAR-10).

    Args:
        student_logits: Before the softmax.
        teacher_logits: The same classes, without gradient.
        target: Class indices.
        T: Temperature, above 0; the T^2 keeps the soft gradient's size independent of it (section 2).
        alpha: Share of the soft term, 0 to 1.

    Shape:
        logits (B, classes), target (B,); the result is a scalar.

    Raises:
        AFDSError: other shapes, T not above 0, alpha outside 0 to 1; a loss that is not finite, on the CPU (on an
            accelerator it is returned, and the training loop names it).
    """
    if not 0 <= alpha <= 1:
        raise AFDSError(f"alpha is {alpha!r}; give the soft term's share, 0 to 1.")
    soft = soft_kl_loss(student_logits, teacher_logits, T=T)
    if target.shape != student_logits.shape[:1]:
        raise AFDSError(
            f"The target has the shape {tuple(target.shape)} for {student_logits.shape[0]} samples; give one class "
            f"index per sample."
        )
    return alpha * soft + (1 - alpha) * F.cross_entropy(full_precision(student_logits), target)


def soft_kl_loss(student_logits: Tensor, teacher_logits: Tensor, *, T: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over classes, mean over the batch.

    Shape:
        two (B, classes); the result is a scalar, 0 for equal logits.
    """
    _checks.positive(T, "The temperature T")
    _checks.logits(student_logits, teacher_logits)
    student = F.log_softmax(full_precision(student_logits) / T, dim=1)
    teacher = F.log_softmax(full_precision(teacher_logits) / T, dim=1)
    loss = T * T * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return _checks.finite(loss, student_logits=student_logits, teacher_logits=teacher_logits)


class SoftLabels(Term):
    """weight * T^2 KL(teacher || student), beside whatever else there is.

    Args:
        T: temperature.
        weight: of the term.
        teacher: a network of its own, as `training.features.Teacher`; None for the one of the run.
    """

    name, label = "soft", "KD"

    def __init__(self, T: float, weight: float, teacher: Any = None) -> None:
        self.T, self.weight, self.teacher = T, weight, teacher
        self.needs = frozenset() if teacher is not None else frozenset({"logits"})  # type: ignore[misc]

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        taught = batch.teacher_logits if self.teacher is None else self.teacher(batch.images)[0]
        value = soft_kl_loss(batch.logits, taught, T=self.T)
        return value, {self.name: value}


class Distil(SoftLabels):
    """alpha T^2 KL + (1 - alpha) CE, beside whatever regulariser there is; `weight` is alpha."""

    name = "kd"

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        soft, logged = super().__call__(batch)
        # The loss so far holds the whole cross-entropy, of which alpha is taken back.
        hard = F.cross_entropy(full_precision(batch.logits), batch.labels, label_smoothing=batch.label_smoothing)
        return soft - hard, logged
