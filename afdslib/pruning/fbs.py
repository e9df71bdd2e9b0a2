"""FBS, feature boosting and suppression (Gao et al., 1810.05331): dynamic gates alone, no mask ever.

As AFS with m = 1 and s = 1, no source stage, gate bias 1, tuned at d = 1 first (the gates alone, then everything), then
d lowered gradually, with an optional L1 term on h. [method, section 7]
"""

from __future__ import annotations

import torch
from torch import nn

from afdslib import afs

__all__ = ["boosted", "gates_alone"]


@torch.no_grad()
def boosted(model: nn.Module, *, bias: float | None = 1.0) -> nn.Module:
    """A gated copy of a plain network with the gates of FBS, constant at first: predictors of weight 0. [ours]

    Args:
        model: the plain network; left as it is.
        bias: what every gate starts at: 1 is FBS's own recipe, which sets the trained scales aside and tunes the gates
            back first; None starts each gate at its trained scale, as AFS does, for which FBS is better off. [ours]
    """
    gated = afs.convert(model)
    for layer in afs.layers(gated).values():
        layer.m.fill_(1)
        layer.s.fill_(1)
        if bias is not None:
            layer.predictor.bias.fill_(bias)
            layer.gamma.fill_(bias)
    return gated


def gates_alone(model: nn.Module, classifier: nn.Module, alone: bool) -> None:
    """Whether only the gates and the new classifier learn; the latter knows nothing yet, so it always does. [ours]"""
    model.requires_grad_(not alone)
    classifier.requires_grad_(True)
    for layer in afs.layers(model).values():
        layer.predictor.requires_grad_(True)
