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

from afdslib.base.errors import AFDSError
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


class AFDLoss(nn.Module):
    """The attentive feature regulariser R over a small set of layers, and the attention it learns.

    Args:
        shapes: (C, H, W) of each layer's features, by layer name. The loss is bound to them; another shape is an error.
        attention: "joint", trained to minimise the loss it weights (it can collapse onto the channels that move least:
            watch the entropy); "detached", trained beforehand with `fit_attention`, then frozen.

    Shape:
        student, source: by layer name, (B, C, H, W) each; both must see the same batch.

    Returns:
        "afd": R, a scalar. "entropy": of rho in nats, mean over samples and layers, detached.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], *, attention: str = "joint"):
        super().__init__()
        if not shapes:
            raise AFDSError("AFDLoss needs the shape of at least one layer's features")
        if attention not in ("joint", "detached"):
            raise AFDSError(f"attention must be 'joint' or 'detached', got {attention!r}")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.mode = attention
        # Names of modules and buffers must not hold dots.
        self._keys = {name: name.replace(".", "_") for name in self.shapes}
        if len(set(self._keys.values())) < len(self._keys):
            raise AFDSError(f"layer names must differ in more than dots and underscores, got {', '.join(self.shapes)}")
        self.attentions = nn.ModuleDict({self._keys[n]: _Attention(*shape) for n, shape in self.shapes.items()})
        for name, (channels, _, _) in self.shapes.items():
            self.register_buffer(f"alive_{self._keys[name]}", torch.ones(channels, dtype=torch.bool))
        if attention == "detached":
            self.attentions.requires_grad_(False)

    def set_alive(self, alive: Mapping[str, Tensor]) -> None:
        """Says which target channels can be other than zero; the rest leave both the softmax and R. [ours]

        Args:
            alive: bool (C,) by layer name, from `afs.living_channels`.

        Raises:
            AFDSError: for an unknown layer, a wrong length, or a layer without any living channel.
        """
        for name, channels in alive.items():
            shape = self._shape(name)
            if channels.shape != shape[:1] or not bool(channels.any()):
                raise AFDSError(f"living channels of {name!r} must be {shape[0]} flags with at least one set")
            getattr(self, f"alive_{self._keys[name]}").copy_(channels)

    def attention(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """rho by layer name, (B, C); each row sums to 1 over the living channels."""
        return {name: self._log_attention(name, source[name]).exp() for name in self._present(source)}

    def forward(self, student: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        distances, entropies = [], []
        for name in self._present(source):
            f_s = self._checked(name, source[name], "source")
            f_t = self._checked(name, student.get(name), "student")
            if f_t.shape[0] != f_s.shape[0]:
                raise AFDSError(
                    f"student and source features of {name!r} are of {f_t.shape[0]} and {f_s.shape[0]} samples"
                )
            with torch.autocast(f_t.device.type, enabled=False):
                log_rho = self._log_attention(name, f_s)
                rho = log_rho.exp()
                distance = (f_t.to(rho.dtype) - f_s.to(rho.dtype)).square().sum((2, 3))
                channels, height, width = self.shapes[name]
                distances.append(channels / (2 * height * width) * (rho * distance).sum(1).mean())
                entropies.append(-(rho * log_rho.masked_fill(rho == 0, 0.0)).sum(1).mean().detach())
        return {"afd": torch.stack(distances).sum(), "entropy": torch.stack(entropies).mean()}

    def _log_attention(self, name: str, source: Tensor) -> Tensor:
        source = self._checked(name, source, "source")
        key = self._keys[name]
        attention = self.attentions[key]
        with torch.autocast(source.device.type, enabled=False):
            logits = attention(source.to(next(attention.parameters()).dtype))
            return logits.masked_fill(~getattr(self, f"alive_{key}"), -math.inf).log_softmax(1)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise AFDSError(f"AFDLoss knows no layer {name!r}, only {', '.join(self.shapes)}")
        return self.shapes[name]

    def _present(self, features: Mapping[str, Tensor]) -> Iterable[str]:
        missing = [name for name in self.shapes if name not in features]
        if missing:
            raise AFDSError(f"no source features of layer {missing[0]!r} were given")
        return self.shapes

    def _checked(self, name: str, features: Tensor | None, whose: str) -> Tensor:
        if features is None:
            raise AFDSError(f"no {whose} features of layer {name!r} were given")
        if tuple(features.shape[1:]) != self.shapes[name]:
            raise AFDSError(
                f"{whose} features of {name!r} have shape {tuple(features.shape[1:])}, but this AFDLoss was made for "
                f"{self.shapes[name]}; make a new one for another input size"
            )
        return features


@torch.enable_grad()
def fit_attention(
    loss: AFDLoss,
    source: Callable[[Tensor], Mapping[str, Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    lr: float = 0.01,
    momentum: float = 0.9,
) -> list[float]:
    """Trains a detached attention with the cross-entropy of a linear head on C * rho_c * gap(x_S)_c, then freezes it.

    The variant is ours; it keeps the attention from choosing the channels that are cheapest to match.

    Args:
        loss: an AFDLoss with attention="detached"; changed in place.
        source: images -> source features by layer name, without gradients.
        batches: (images, labels) of the target's training data; each is one step.
        num_classes: of the target.
        lr: learning rate of the plain SGD steps, for attention and heads.
        momentum: of SGD.

    Returns:
        The cross-entropy (mean over layers) at each step.
    """
    if loss.mode != "detached":
        raise AFDSError("fit_attention trains a detached attention; this AFDLoss was made with attention='joint'")
    parameter = next(loss.parameters())
    heads = nn.ModuleDict({loss._keys[n]: nn.Linear(c, num_classes) for n, (c, _, _) in loss.shapes.items()})
    heads.to(parameter.device, parameter.dtype)
    loss.attentions.requires_grad_(True)
    optimiser = torch.optim.SGD([*loss.attentions.parameters(), *heads.parameters()], lr=lr, momentum=momentum)
    history = []
    for images, labels in batches:
        features = {name: x.to(parameter.dtype) for name, x in source(images).items()}
        rho = loss.attention(features)
        terms = [
            nn.functional.cross_entropy(
                heads[loss._keys[n]](loss.shapes[n][0] * rho[n] * features[n].mean((2, 3))), labels.to(parameter.device)
            )
            for n in loss.shapes
        ]
        total = torch.stack(terms).mean()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        history.append(total.item())
    loss.attentions.requires_grad_(False)
    loss.zero_grad(set_to_none=True)  # an optimiser would go on applying the last gradient
    if not all(math.isfinite(value) for value in history):
        raise AFDSError(
            f"the detached attention did not converge (its loss is not finite); lower its learning rate {lr:g}"
        )
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
        self,
        teacher: Callable[[Tensor], Mapping[str, Tensor]],
        batches: Iterator[tuple[Tensor, Tensor]],
        num_classes: int,
    ) -> list[float]:
        return fit_attention(self.module, teacher, batches, num_classes) if self.module.mode == "detached" else []

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        measured = self.module(batch.student, batch.teacher)
        return measured["afd"], measured  # the entropy is only watched
