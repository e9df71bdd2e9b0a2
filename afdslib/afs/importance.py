"""How much the loss depends on each output channel of the gated layers, to first order."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from afdslib.afs.convert import gated
from afdslib.afs.graph import eval_mode
from afdslib.base.cpu import safe_gradients
from afdslib.base.errors import AFDSError
from afdslib.base.hooks import kept

__all__ = ["taylor_importance"]


def taylor_importance(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """First-order estimate of how much each image's loss changes when a channel of a layer's output is set to 0.

    |sum over pixels of z dL/dz|, mean over images, with z the output of the AFS layer (gate, scale and shift included)
    and L the cross entropy; in eval mode. [Molchanov et al. 2017, 1611.06440, eq. 8, with the absolute value of the sum
    over pixels; on gated layers ours] A channel that is never computed has 0.

    By layer name, in forward order, (C,) float64 on the CPU, from batches of (training images, labels), never the test
    set. The network's mode and gradients are left as they were.

    Raises:
        AFDSError: if the network has no AFS layer or cannot be differentiated, or the loader is empty.
    """
    found = gated(model)
    where = next(model.parameters()).device
    totals = {name: torch.zeros(layer.m.numel(), dtype=torch.float64) for name, layer in found.items()}
    count = 0
    with kept(found, graph=True) as outputs, eval_mode(model), torch.enable_grad(), safe_gradients(model, where):
        for images, labels in loader:
            # The images ask for gradients, so that layers without trainable parameters have them, too.
            logits = model(images.to(where).requires_grad_(True)).float()
            loss = nn.functional.cross_entropy(logits, labels.to(where), reduction="sum")
            try:
                gradients = torch.autograd.grad(loss, list(outputs.values()))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise AFDSError(f"torch cannot differentiate {type(model).__name__} ({reason})") from error
            for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
                totals[name] += (output.detach().double() * gradient.double()).sum((2, 3)).abs().sum(0).cpu()
            count += len(labels)
    if not count:
        raise AFDSError("no image to estimate the Taylor importance on; the loader is empty")
    return {name: total / count for name, total in totals.items()}
