"""DELTA. Li et al., "DELTA: Deep Learning Transfer using Feature Map with Attention", ICLR 2019, arXiv 1901.09229.
With equal weights it is the feature-map regulariser that its authors compare with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afdslib.backbones import classifier_name
from afdslib.base.errors import AFDSError
from afdslib.base.hooks import eval_mode, kept
from afdslib.losses import _checks
from afdslib.losses._maps import LayerLoss, full_precision
from afdslib.losses.term import TERMS, Axis, Batch, Term, TermContext

__all__ = ["DELTALoss", "channel_weights", "fit_classifier"]

# Bytes of ablated copies of one layer's output that go through the rest of the network at once.
GROUP_BYTES = 2**26


class DELTALoss(LayerLoss):
    """sum over layers of C/(2HW) sum over channels of w_c |f_student - f_source|_2^2, mean over the batch.

    The public code sums over the batch [code], so its alpha = 0.01 at batch 64 is 0.64 here. The term b/2 |v|^2 of
    the classifier is the optimiser's weight decay. With w_c = 1/C it is the feature-map regulariser.

    Args:
        weights: (C,) of each layer, at least 0, such as `channel_weights`.

    Shape:
        student, source: by layer, (B, C, H, W) of the same images, the source's without gradient; a scalar.

    Raises:
        AFDSError: a missing layer, another shape, an empty map, a source with gradient, NaN (on the CPU).
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__({name: w.numel() for name, w in weights.items()}, "DELTA")
        for i, (name, w) in enumerate(weights.items()):
            if w.ndim != 1 or not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
                raise AFDSError(f"The channel weights of {name} are not a vector of finite numbers of at least 0.")
            self.register_buffer(f"weight{i}", w.detach().clone())

    def forward(self, student: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Tensor:
        layers = enumerate(self.matched(student, source))
        return torch.stack([self._layer(name, a, b, self.get_buffer(f"weight{i}")) for i, (name, a, b) in layers]).sum()

    def _layer(self, name: str, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        _checks.pair(a, b, f"feature map {name}", equal=True)
        channels, height, width = a.shape[1:]
        if channels != len(w):
            raise AFDSError(f"The feature map {name} has {channels} channels and DELTA holds {len(w)} weights.")
        energy = (full_precision(a) - full_precision(b)).square().sum((2, 3)).mean(0)
        loss = channels / (2 * height * width) * ((w * self.alive(name)).to(energy) * energy).sum()
        return _checks.finite(loss, **{f"student_map_of_{name}": a, f"source_map_of_{name}": b})


@TERMS.register
class FeatureMap(Term):
    """Feature map: sum over layers of C/(2HW) sum_c 1/C |f_T,c - f_S,c|^2."""

    name, label = "feature-map", "feature map"
    space = (Axis("strength", 1e-2, 1e-4, 1.0),)
    needs = frozenset({"layers"})
    module: nn.Module

    def build(self, context: TermContext) -> nn.Module:
        return DELTALoss({name: torch.full((shape[0],), 1 / shape[0]) for name, shape in context.shapes.items()})

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value = self.module(batch.student, batch.teacher)
        return value, {self.name.replace("-", "_"): value}


@TERMS.register
class DELTA(FeatureMap):
    """DELTA: the feature map with channel weights that a stage before the training has computed."""

    name, label = "delta", "DELTA"
    needs = frozenset({"layers", "weights"})

    def build(self, context: TermContext) -> nn.Module:
        shapes, weights = context.shapes, context.weights
        if weights is None:
            raise AFDSError("DELTA needs its channel weights; compute them with losses.channel_weights")
        if wrong := [n for n, shape in shapes.items() if n not in weights or len(weights[n]) != shape[0]]:
            raise AFDSError(f"DELTA's channel weights do not fit layer {wrong[0]!r}; compute them for this source")
        return DELTALoss({name: weights[name] for name in shapes})


def channel_weights(
    model: nn.Module, names: Iterable[str], loader: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """softmax(z / 5) over a layer's channels, z the standardised increase of the loss when the channel is removed.

    "Removed" sets the channel of the layer's output to 0 (the public code zeroes the filter of the raw convolution
    [code]; at a block's output that would leave the shortcut, [ours]). The increase is of the mean cross-entropy over
    all images of the loader (the code takes four training batches); z divides by the population deviation [code], and
    all weights are 1/C where removal changes nothing.

    Args:
        model: The source network with a classifier for the loader's classes: `fit_classifier`. Its mode is restored.
        names: Layers.
        loader: (images, class indices) for training.

    Returns:
        (C,) by name, float32 on the CPU, summing to 1.

    Raises:
        AFDSError: an unknown layer, an empty loader, targets that are no classes, a loss that is not finite.
    """
    modules, names = dict(model.named_modules()), list(names)
    if unknown := [name for name in names if name not in modules]:
        raise AFDSError(f"The network has no layer {unknown[0]!r} to weigh the channels of.")
    device, count = next(model.parameters()).device, 0
    increase: dict[str, Tensor] = {}
    with eval_mode(model), torch.no_grad():
        for images, target in loader:
            images, target = images.to(device), target.to(device)
            count += len(target)
            logits = model(images)
            _checks.targets(target, logits)
            whole = F.cross_entropy(logits, target, reduction="sum").double()
            for name in names:
                increase[name] = increase.get(name, 0) + (_ablated(model, modules[name], images, target) - whole)
    if count == 0:
        raise AFDSError("The loader for DELTA's channel weights is empty; give at least one batch of training images.")
    weights = {}
    for name, summed in increase.items():
        x = summed / count
        if not bool(x.isfinite().all()):
            raise AFDSError(f"The loss without some channels of {name} is NaN or infinite; look at the model's weights")
        # Rounding alone gives a spread of about 1e-7 of the loss, which must not be blown up to deviations of 1.
        spread = x.std(correction=0)
        z = torch.where(spread > 1e-9, (x - x.mean()) / spread.clamp(min=1e-9), 0.0)
        weights[name] = (z / 5.0).softmax(0).float().cpu()
    return weights


def _ablated(model: nn.Module, module: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """(C,) float64: the summed cross-entropy without each channel of the module's output.

    Many ablated copies of the output go through the rest of the network together. Where it meets another stream later
    (a layer inside a residual block), the whole network is run for each copy instead.
    """
    with kept({"": module}) as outputs:
        model(images[:1])
    batch, (_, width, *rest) = len(target), outputs[""].shape
    group = max(1, min(width, GROUP_BYTES // (4 * batch * width * math.prod(rest))))
    inside, losses = False, []
    for channels in torch.arange(width, device=images.device).split(group):
        if not inside:
            try:
                logits = _run_without(model, module, images, channels, repeated=False)
                inside = len(logits) != len(channels) * batch
            except RuntimeError:  # the copies met a stream of the plain batch size
                inside = True
        if inside:
            logits = _run_without(model, module, images.repeat(len(channels), 1, 1, 1), channels, repeated=True)
        loss = F.cross_entropy(logits, target.repeat(len(channels)), reduction="none")
        losses.append(loss.double().view(len(channels), batch).sum(1))
    return torch.cat(losses)


def _run_without(model: nn.Module, module: nn.Module, images: Tensor, channels: Tensor, *, repeated: bool) -> Tensor:
    """Logits, (channels * batch, classes): the g-th copy of the batch lacks the g-th of the channels."""
    copies = len(channels)

    def ablate(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        stacked = output.view(copies, -1, *output.shape[1:]) if repeated else output.expand(copies, *output.shape)
        stacked = stacked.clone()
        stacked[torch.arange(copies, device=output.device), :, channels] = 0
        return stacked.flatten(0, 1)

    with module.register_forward_hook(ablate):
        return model(images)


def fit_classifier(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, weight_decay: float = 1e-4) -> float:
    """Fits the last linear layer alone on frozen features, in place; what DELTA does before it weighs the channels.

    The public code takes ten epochs of SGD [code]; the problem is convex, so here the features are computed once and
    L-BFGS fits the layer, with no seed and no learning rate. [ours] It returns the cross-entropy reached.

    Args:
        model: A network with a classifier for the loader's classes (`backbones.reset_classifier`); mode restored.
        loader: (images, class indices), in any order.
        weight_decay: Weight of |v|^2 / 2.

    Raises:
        AFDSError: an empty loader, or targets that are no classes.
    """
    head, device = model.get_submodule(classifier_name(model)), next(model.parameters()).device
    features, targets = [], []
    with kept({"": head}, inputs=True) as entering, eval_mode(model), torch.no_grad():
        for images, target in loader:
            _checks.targets(target, model(images.to(device)))
            features.append(entering[""])
            targets.append(target.to(device))
    if not targets:
        raise AFDSError("The loader to fit the classifier on is empty; give at least one batch of training images.")
    x, y = torch.cat(features), torch.cat(targets)
    parameters = list(head.parameters())
    flags = [p.requires_grad for p in parameters]
    head.requires_grad_(True)
    solver = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-9)

    def closure() -> Tensor:
        solver.zero_grad()
        squares = torch.stack([p.square().sum() for p in parameters]).sum()
        loss = F.cross_entropy(head(x), y) + weight_decay / 2 * squares
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    for p, flag in zip(parameters, flags, strict=True):
        p.grad = None
        p.requires_grad_(flag)
    with torch.no_grad():
        return float(F.cross_entropy(head(x), y))
