"""Learning without forgetting. Li, Hoiem, arXiv 1606.09282, equations 2 and 3."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from afdslib.backbones import classifier_name
from afdslib.losses.kd import soft_kl_loss
from afdslib.losses.term import TERMS, Axis, Batch, Term, TermContext

__all__ = ["LwFLoss", "lwf_loss"]


def lwf_loss(logits: Tensor, old_logits: Tensor, *, T: float = 2.0) -> Tensor:
    """The distillation term: the target network's old classifier against the source model's outputs.

    The paper's term is the cross-entropy of the softened outputs; this is T^2 times that minus the source outputs'
    entropy, which has T^2 times its gradient and is 0 where nothing is forgotten. [ours] Add it, weighted, to the
    cross-entropy on the new classes.

    Args:
        logits: Old classifier on the target network's features.
        old_logits: The source model's own outputs for the same images, without gradient.
        T: Temperature, above 0 (2 in the paper).

    Shape:
        two (B, old classes); the result is a scalar, mean over the batch.
    """
    return soft_kl_loss(logits, old_logits, T=T)


class LwFLoss(nn.Module):
    """`lwf_loss` behind the source's classifier, which goes on learning with the target network.

    Training it along with the rest is the paper's joint optimisation; its warm-up of the new classifier alone is left
    out, so that all methods take the same steps. [recall; the last ours]

    Args:
        head: The source's classifier; copied.
        T: Temperature.

    Shape:
        forward takes the target network's classifier inputs (B, C) and the source's logits (B, old classes).
    """

    def __init__(self, head: nn.Linear, *, T: float = 2.0) -> None:
        super().__init__()
        self.head = copy.deepcopy(head).requires_grad_(True)
        self.T = T

    def forward(self, inputs: Tensor, old_logits: Tensor) -> Tensor:
        return lwf_loss(self.head(inputs), old_logits, T=self.T)


@TERMS.register
class LwF(Term):
    """LwF: distillation of the source's outputs through the old classifier, which is trained along."""

    name, label = "lwf", "LwF"
    space = (Axis("strength", 1.0, 1e-2, 10.0),)
    needs = frozenset({"inputs", "logits"})
    module: LwFLoss

    def build(self, context: TermContext) -> LwFLoss:
        assert context.source is not None
        # The head keeps the source's width, so its state fits at every budget; removed inputs are zero.
        head = context.source.get_submodule(classifier_name(context.source))
        assert isinstance(head, nn.Linear)
        return LwFLoss(head)

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value = self.module(batch.inputs, batch.teacher_logits)
        return value, {"lwf": value}
