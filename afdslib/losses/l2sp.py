"""Weight penalties. Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks" (L2-SP), arXiv 1802.01483."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from afdslib.backbones import classifier_name
from afdslib.base import checks
from afdslib.base.errors import AFDSError
from afdslib.losses.term import TERMS, Axis, Batch, Term, TermContext

__all__ = ["L2SP"]


class L2SP(nn.Module):
    """alpha / 2 |w - w0|^2 + beta / 2 |v|^2 (equation 4).

    w are the parameters that the starting point has too, v all others: the new classifier, and whatever else was
    added. Copies of the starting point w0 are buffers, so they follow the device and the checkpoint. Use it with the
    optimiser's weight decay at 0. It returns both addends, "l2sp" and "l2".

    Args:
        model: The network to be trained, holding its starting point.
        alpha, beta: Weights of the distance and of the plain decay, at least 0.
        reference: Starting point by parameter name, if it is not what the model holds now; parameters it lacks are v.
    """

    def __init__(
        self, model: nn.Module, *, alpha: float, beta: float, reference: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        checks.number("alpha of L2-SP", alpha, least=0)
        checks.number("beta of L2-SP", beta, least=0)
        self.alpha, self.beta = alpha, beta
        self._model = (model,)  # in a tuple, so that the model is no part of this module and of its checkpoint
        head = f"{classifier_name(model)}."
        start = dict(model.named_parameters()) if reference is None else reference
        self.names = [n for n, _ in model.named_parameters() if not n.startswith(head) and n in start]
        if not self.names:
            raise AFDSError("L2-SP found no parameter that model and starting point share; give matching networks.")
        for i, name in enumerate(self.names):
            self.register_buffer(f"start{i}", start[name].detach().clone())
        with torch.no_grad():
            self()  # refuses other shapes

    def forward(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = dict(self._model[0].named_parameters())
        distances = []
        for i, name in enumerate(self.names):
            start, w = self.get_buffer(f"start{i}"), own.pop(name, None)
            if w is None or w.shape != start.shape:
                own_shape = "gone" if w is None else tuple(w.shape)
                shapes = f"{name} of shape {tuple(start.shape)} and the model's is {own_shape}"
                raise AFDSError(f"L2-SP holds {shapes}; make the loss anew for the network that is trained.")
            distances.append(w - start)
        decay = _half_squares(own.values(), self.beta) if self.beta else distances[0].new_zeros(())
        return {"l2sp": _half_squares(distances, self.alpha), "l2": decay}


def _half_squares(parameters: Iterable[Tensor], weight: float) -> Tensor:
    """weight / 2 times the sum of squares."""
    return weight / 2 * torch.stack([p.square().sum() for p in parameters]).sum()


@TERMS.register
class L2Term(Term):
    """L2: a/2 |(w, v)|^2 as the optimiser's weight decay; nothing is added to the loss."""

    name, label = "l2", "L2"
    space = (Axis("strength", 1e-3, 1e-5, 1e-1),)

    @classmethod
    def decays(cls, config: Any) -> tuple[float, float]:
        return config.strength, config.strength

    def add(self, loss: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return loss, {}


@TERMS.register
class L2SPTerm(Term):
    """L2-SP; w0 is the source itself, also for a network trained and pruned since."""

    name, label = "l2sp", "L2-SP"
    space = (Axis("strength", 1e-2, 1e-4, 1.0),)
    needs = frozenset({"source"})
    slot, inherited = "_l2sp", False
    module: L2SP

    @classmethod
    def decays(cls, config: Any) -> tuple[float, float]:
        return 0.0, 0.0

    def build(self, context: TermContext) -> L2SP:
        assert context.reference is not None
        start, config = dict(context.reference.named_parameters()), context.config
        return L2SP(context.model, alpha=config.strength, beta=config.classifier_decay, reference=start)

    def add(self, loss: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.module()
        return loss + terms["l2sp"] + terms["l2"], terms
