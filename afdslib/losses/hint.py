"""Full activation transfer (F-ActT): the student's features, through a 1x1 adapter, are to equal the teacher's.
The baseline of Zagoruyko, Komodakis, arXiv 1612.03928, table 1, after Romero et al., FitNets, arXiv 1412.6550."""

from __future__ import annotations

from torch import Tensor, nn

from afdslib.base.errors import AFDSError
from afdslib.losses import _checks
from afdslib.losses._maps import full_precision
from afdslib.losses.term import TRANSFERS, TermContext, Transfer

__all__ = ["Hint", "hint_loss"]


def hint_loss(student: Tensor, source: Tensor) -> Tensor:
    """Mean squared difference over all elements.

    Args:
        student: Adapted features.
        source: The teacher's, without gradient.

    Shape:
        two (B, C, H, W); the result is a scalar.

    Raises:
        AFDSError: other shapes, an empty map, a teacher with gradient; a loss that is not finite, on the CPU (on an
            accelerator it is returned, and the training loop names it).
    """
    _checks.pair(student, source, "feature map")
    _checks.same_shape(student, source, "feature map")
    loss = (full_precision(student) - full_precision(source)).square().mean()
    return _checks.finite(loss, student_map=student, teacher_map=source)


class Hint(nn.Module):
    """`hint_loss` behind a 1x1 convolution that is trained with the student and thrown away after.

    Args:
        channels: Of the student's features.
        source_channels: Of the teacher's.

    Shape:
        forward takes (B, channels, H, W) and (B, source_channels, H, W).
    """

    def __init__(self, channels: int, source_channels: int) -> None:
        super().__init__()
        self.adapter = nn.Conv2d(channels, source_channels, kernel_size=1)

    def forward(self, student: Tensor, source: Tensor) -> Tensor:
        if student.ndim != 4 or student.shape[1] != self.adapter.in_channels:
            raise AFDSError(
                f"The adapter takes (batch, {self.adapter.in_channels}, height, width) and got {tuple(student.shape)}; "
                f"make it with the student's channel count."
            )
        return hint_loss(self.adapter(student), source)


@TRANSFERS.register
class HintTransfer(Transfer):
    """A squared difference behind an adapter per layer."""

    name, label = "hint", "hint"
    needs = frozenset({"layers"})
    module: nn.ModuleList

    def build(self, context: TermContext) -> nn.ModuleList:
        for pair in context.pairs:
            (_, *own), (_, *other) = pair.student_shape, pair.teacher_shape
            if own != other:
                raise AFDSError(
                    f"a hint compares maps of one size, but the student's {pair.student!r} is {own[0]}x{own[1]} and "
                    f"the teacher's {pair.teacher!r} {other[0]}x{other[1]}; take another teacher, or transfer 'at'"
                )
        return nn.ModuleList(Hint(pair.student_shape[0], pair.teacher_shape[0]) for pair in context.pairs)

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        return self.module[index](student, teacher)
