"""Knowledge distillation on logits. Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
arXiv 1503.02531."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from afdslib.base import checks
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
        student_logits: Before the softmax, (B, classes).
        teacher_logits: The same classes, without gradient.
        target: Class indices, (B,).
        T: Temperature, above 0; the T^2 keeps the soft gradient's size independent of it (section 2).
        alpha: Share of the soft term, 0 to 1.

    Raises:
        AFDSError: as `at_loss`; also T or alpha out of range, targets that are no whole numbers and, on the CPU, a
            target that is no class (-100, too, which torch would leave out).
    """
    checks.number("alpha, the soft term's share,", alpha, least=0, most=1)
    soft = soft_kl_loss(student_logits, teacher_logits, T=T)
    _checks.targets(target, student_logits)
    hard = F.cross_entropy(full_precision(student_logits), target, ignore_index=_checks.NOTHING)
    return alpha * soft + (1 - alpha) * hard


def soft_kl_loss(student_logits: Tensor, teacher_logits: Tensor, *, T: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over classes, mean over the batch."""
    checks.number("the temperature T", T, above=0)
    _checks.pair(student_logits, teacher_logits, "logits", dims=2, equal=True)
    student, teacher = (F.log_softmax(full_precision(x) / T, dim=1) for x in (student_logits, teacher_logits))
    loss = T * T * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return _checks.finite(loss, student_logits=student_logits, teacher_logits=teacher_logits)


class SoftLabels(Term):
    """weight * T^2 KL(teacher || student), of the run's teacher or of a `training.features.Teacher` of its own."""

    name, label = "soft", "KD"

    def __init__(self, T: float, weight: float, teacher: Any = None) -> None:
        self.T, self.weight, self.teacher = T, weight, teacher
        self.needs = frozenset() if teacher is not None else frozenset({"logits"})  # type: ignore[misc]

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        taught = batch.teacher_logits if self.teacher is None else self.teacher(batch.images)[0]
        value = soft_kl_loss(batch.logits, taught, T=self.T)  # type: ignore[arg-type]
        return value, {self.name: value}


class Distil(SoftLabels):
    """alpha T^2 KL + (1 - alpha) CE, beside whatever regulariser there is; `weight` is alpha."""

    name = "kd"

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        soft, logged = super().__call__(batch)
        # The loss so far holds the whole cross-entropy, of which alpha is taken back.
        hard = F.cross_entropy(full_precision(batch.logits), batch.labels, label_smoothing=batch.label_smoothing)
        return soft - hard, logged
