"""AFD, attentive feature distillation: a feature distance to the source, weighted by learned channel attention.

```
rho(x) = softmax_over_channels( relu( flat(x) W1 + b1 ) w2 + b2 )        from SOURCE features    [code x3]
R      = sum_l c_l * mean_batch sum_c rho_c * || f_T,c - f_S,c ||_2^2,   c_l = C / (2HW)         [recall; scale ours]
```

with flat(x) (C, H*W), W1 (H*W, K), b1 (K,), w2 (K,), b2 (C,) and K = H. The norm is squared and b2 is per channel (a
shared scalar cancels in the softmax). c_l is DELTA's, comparable across resolutions. w2 = b2 = 0 at the start, so the
attention is uniform at step 0. [ours]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from afdslib.base import checks
from afdslib.base.errors import AFDSError
from afdslib.losses import _checks
from afdslib.losses._maps import LayerLoss
from afdslib.losses.term import TERMS, Axis, Batch, Term, TermContext

__all__ = ["AFDLoss", "fit_attention"]


class _Attention(nn.Module):
    """Attention logits over the channels of one source feature map: (B, C, H, W) -> (B, C)."""

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.hidden = nn.Linear(height * width, height)
        self.w2 = nn.Parameter(torch.zeros(height))
        self.b2 = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x.flatten(2)).relu() @ self.w2 + self.b2


class AFDLoss(LayerLoss):
    """The attentive feature regulariser R over a small set of layers, and the attention it learns.

    Called with the features of student and source, (B, C, H, W) by layer name, it returns "afd", R, and "entropy", of
    rho in nats, mean over samples and layers, detached.

    Args:
        shapes: (C, H, W) of each layer's features, by layer name. The loss is bound to them; another shape is an error.
        attention: "joint", trained to minimise the loss it weights (it can collapse onto the channels that move least:
            watch the entropy); "detached", trained beforehand with `fit_attention`, then frozen.
    """

    persistent = True

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], *, attention: str = "joint"):
        super().__init__({name: shape[0] for name, shape in shapes.items()}, "AFD")
        checks.choice("attention", attention, ("joint", "detached"))
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.mode = attention
        self.attentions = nn.ModuleDict({self.keys[name]: _Attention(*shape) for name, shape in shapes.items()})
        self.attentions.requires_grad_(attention == "joint")

    def attention(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """rho by layer name, (B, C); each row sums to 1 over the living channels."""
        return {name: self._log_attention(name, x).exp() for name, x, _ in self.matched(source, source)}

    def forward(self, student: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        distances, entropies = [], []
        for name, f_t, f_s in self.matched(student, source):
            self._check(name, f_t, "student")
            _checks.pair(f_t, f_s, f"feature map {name}")
            with torch.autocast(f_t.device.type, enabled=False):
                log_rho = self._log_attention(name, f_s)
                rho = log_rho.exp()
                distance = (f_t.to(rho.dtype) - f_s.to(rho.dtype)).square().sum((2, 3))
                channels, height, width = self.shapes[name]
                distances.append(channels / (2 * height * width) * (rho * distance).sum(1).mean())
                entropies.append(-(rho * log_rho.masked_fill(rho == 0, 0.0)).sum(1).mean().detach())
        return {"afd": torch.stack(distances).sum(), "entropy": torch.stack(entropies).mean()}

    def _log_attention(self, name: str, source: Tensor) -> Tensor:
        self._check(name, source, "source")
        attention = self.attentions[self.keys[name]]
        with torch.autocast(source.device.type, enabled=False):
            logits = attention(source.to(next(attention.parameters()).dtype))
            return logits.masked_fill(~self.alive(name), -math.inf).log_softmax(1)

    def _check(self, name: str, features: Tensor, whose: str) -> None:
        if tuple(features.shape[1:]) != self.shapes[name]:
            shapes = f"{tuple(features.shape[1:])}, and this AFDLoss was made for {self.shapes[name]}"
            raise AFDSError(f"{whose} features of {name!r} are {shapes}; make a new one for another input size")


@torch.enable_grad()
def fit_attention(
    loss: AFDLoss,
    source: Callable[[Tensor], Mapping[str, Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    lr: float = 0.01,
) -> list[float]:
    """Trains a detached attention with the cross-entropy of a linear head on C * rho_c * gap(x_S)_c, then freezes it.

    The variant is ours; it keeps the attention from choosing the channels that are cheapest to match.

    Args:
        loss: an AFDLoss with attention="detached"; changed in place.
        source: images -> source features by layer name, without gradients.
        batches: (images, labels) of the target's training data; each is one step of SGD.
        num_classes: of the target.
        lr: learning rate of attention and heads.

    Returns:
        The cross-entropy (mean over layers) at each step; one that is not finite is an AFDSError.
    """
    if loss.mode != "detached":
        raise AFDSError("fit_attention trains a detached attention; this AFDLoss was made with attention='joint'")
    parameter = next(loss.parameters())
    heads = nn.ModuleDict({key: nn.Linear(loss.shapes[name][0], num_classes) for name, key in loss.keys.items()})
    heads.to(parameter.device, parameter.dtype)
    loss.attentions.requires_grad_(True)
    optimiser = torch.optim.SGD([*loss.attentions.parameters(), *heads.parameters()], lr=lr, momentum=0.9)
    history = []
    for images, labels in batches:
        features = {name: x.to(parameter.dtype) for name, x in source(images).items()}
        labels = labels.to(parameter.device)
        terms = []
        for name, rho in loss.attention(features).items():
            logits = heads[loss.keys[name]](loss.shapes[name][0] * rho * features[name].mean((2, 3)))
            terms.append(nn.functional.cross_entropy(logits, labels))
        total = torch.stack(terms).mean()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        history.append(total.item())
    loss.attentions.requires_grad_(False)
    loss.zero_grad(set_to_none=True)  # an optimiser would go on applying the last gradient
    if not all(map(math.isfinite, history)):
        raise AFDSError(f"the detached attention did not converge to a finite loss; lower its learning rate {lr:g}")
    return history


@TERMS.register
class AFD(Term):
    """AFD: the feature map with attention over channels, learned jointly or beforehand."""

    name, label = "afd", "AFD"
    space = (Axis("strength", 1e-2, 1e-4, 1.0),)
    needs = frozenset({"layers"})
    module: AFDLoss

    def build(self, context: TermContext) -> AFDLoss:
        return AFDLoss(context.shapes, attention=context.config.attention)

    def prepare(
        self, teacher: Callable[[Tensor], Mapping[str, Tensor]], batches: Iterator[tuple[Tensor, Tensor]], classes: int
    ) -> list[float]:
        return fit_attention(self.module, teacher, batches, classes) if self.module.mode == "detached" else []

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        measured = self.module(batch.student, batch.teacher)
        return measured["afd"], measured  # the entropy is only watched
