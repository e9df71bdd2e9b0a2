"""Learning without forgetting. Li, Hoiem, arXiv 1606.09282, equations 2 and 3."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from afdslib.backbones import classifier_name
from afdslib.losses.kd import soft_kl_loss
from afdslib.losses.term import TERMS, Axis, Batch, Term, TermContext

__all__ = ["lwf_loss"]


def lwf_loss(logits: Tensor, old_logits: Tensor, *, T: float = 2.0) -> Tensor:
    """The distillation term: the target network's old classifier against the source model's outputs.

    The paper's term is the cross-entropy of the softened outputs; this is T^2 times that minus the source outputs'
    entropy, which has T^2 times its gradient and is 0 where nothing is forgotten. [ours]

    Args:
        logits: Old classifier on the target network's features, (B, old classes).
        old_logits: The source model's own outputs for the same images, without gradient.
        T: Temperature, above 0 (2 in the paper).
    """
    return soft_kl_loss(logits, old_logits, T=T)


@TERMS.register
class LwF(Term):
    """LwF: distillation of the source's outputs through a copy of the old classifier, which is trained along.

    This is the paper's joint optimisation; its warm-up of the new classifier alone is left out, so that all methods
    take the same steps. [recall; the last ours]
    """

    name, label = "lwf", "LwF"
    space = (Axis("strength", 1.0, 1e-2, 10.0),)
    needs = frozenset({"inputs", "logits"})
    module: nn.ModuleDict

    def build(self, context: TermContext) -> nn.ModuleDict:
        assert context.source is not None
        # The head keeps the source's width, so its state fits at every budget; removed inputs are zero.
        head = copy.deepcopy(context.source.get_submodule(classifier_name(context.source)))
        return nn.ModuleDict({"head": head.requires_grad_(True)})

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.teacher_logits is not None
        value = lwf_loss(self.module["head"](batch.inputs), batch.teacher_logits)
        return value, {"lwf": value}
