"""Full activation transfer (F-ActT): the student's features, through a 1x1 adapter, are to equal the teacher's.
The baseline of Zagoruyko, Komodakis, arXiv 1612.03928, table 1, after Romero et al., FitNets, arXiv 1412.6550."""

from __future__ import annotations

from torch import Tensor, nn

from afdslib.base.errors import AFDSError
from afdslib.losses import _checks
from afdslib.losses._maps import full_precision
from afdslib.losses.term import TRANSFERS, TermContext, Transfer

__all__ = ["hint_loss"]


def hint_loss(student: Tensor, source: Tensor) -> Tensor:
    """Mean squared difference over all elements of adapted features and the teacher's, two (B, C, H, W)."""
    _checks.pair(student, source, "feature map", equal=True)
    loss = (full_precision(student) - full_precision(source)).square().mean()
    return _checks.finite(loss, student_map=student, teacher_map=source)


@TRANSFERS.register
class HintTransfer(Transfer):
    """A squared difference behind a 1x1 convolution per layer, trained with the student and thrown away after."""

    name, label = "hint", "hint"
    module: nn.ModuleList

    def build(self, context: TermContext) -> nn.ModuleList:
        for pair in context.pairs:
            (_, *own), (_, *other) = pair.student_shape, pair.teacher_shape
            if own != other:
                raise AFDSError(
                    f"a hint compares maps of one size, but the student's {pair.student!r} is {own[0]}x{own[1]} and "
                    f"the teacher's {pair.teacher!r} {other[0]}x{other[1]}; take another teacher, or transfer 'at'"
                )
        return nn.ModuleList(nn.Conv2d(p.student_shape[0], p.teacher_shape[0], kernel_size=1) for p in context.pairs)

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        return hint_loss(self.module[index](student), teacher)
