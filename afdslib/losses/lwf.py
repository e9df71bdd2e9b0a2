"""Learning without forgetting. Li, Hoiem, arXiv 1606.09282, equations 2 and 3."""

from __future__ import annotations

from torch import Tensor

from .kd import soft_kl_loss

__all__ = ["lwf_loss"]


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
