"""Statements that a report prints and that must be true: the regulariser acts, the gates act, the network has learnt.

Each is a function of results or of a network and returns a bool, so that a notebook shows it and a changed value fails
its comparison. A study with lambda at 0, with gates that nobody looks at, or with shuffled labels makes one false.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from afdslib.afs.layer import AFSConvBN

if TYPE_CHECKING:
    import pandas

__all__ = ["gates_act", "learns", "regulariser_acts"]


def regulariser_acts(history: pandas.DataFrame, strength: float, term: str) -> bool:
    """Whether, in every logged row, the loss that was trained is the cross-entropy plus lambda times the regulariser.

    A term too small to be seen in the loss (4e-6 of it, near the rounding of float32) does not act.

    Args:
        history: rows of a run, from `Result.history()`.
        strength: lambda, as configured and not as the run itself reports it.
        term: the regulariser's column: "afd" or "feature_map".
    """
    if history.empty or term not in history or not strength > 0:
        return False
    share, wanted = history["loss"] - history["cross_entropy"], strength * history[term]
    visible = wanted > 4e-6 * history["loss"]
    return bool((visible & ((share - wanted).abs() <= 0.01 * wanted + 1e-6 * history["loss"])).all())


@torch.no_grad()
def gates_act(model: nn.Module, images: Tensor, *, tolerance: float = 1e-4) -> bool:
    """Whether the gates decide what every gated layer really puts out.

    In a forward pass over the images, with the first living channel of every layer closed on a copy of the network,
    each layer's output must be a * (eta * y + beta) with the layer's own gates, and exactly zero where a = 0.

    Args:
        model: an AFS network; it is left as it is.
        images: (B, 3, H, W).
        tolerance: of the formula, relative to the layer's largest output.

    Returns:
        False also for a network without gates.
    """
    closed = copy.deepcopy(model).eval()
    found = [module for module in closed.modules() if isinstance(module, AFSConvBN)]
    shut: dict[AFSConvBN, int] = {}
    for layer in found:
        shut[layer] = int(layer.m.argmax())
        layer.m[shut[layer]] = 0
    outcome: list[bool] = []

    def check(layer: AFSConvBN, args: tuple[Tensor, ...], output: Tensor) -> None:
        _, eta, active = (gate[..., None, None] for gate in layer.gates(args[0]))
        expected = active * (eta * layer.norm(layer.conv(args[0])) + layer.beta[:, None, None])
        error = (output - expected).abs().max()
        outcome.append(bool(error <= tolerance * expected.abs().max().clamp_min(1e-6)))
        outcome.append(bool((output[:, shut[layer]] == 0).all()))
        outcome.append(bool((output.abs().amax((2, 3))[active[..., 0, 0] == 0] == 0).all()))

    handles = [layer.register_forward_hook(check) for layer in found]
    try:
        closed(images.to(next(closed.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return bool(outcome) and all(outcome)


def learns(metrics: Mapping[str, Any], *, factor: float = 2.0, split: str = "test") -> bool:
    """Whether the accuracy, also as the mean over classes, is above `factor` times that of guessing.

    Args:
        metrics: of a run that read the split, with its confusion matrix.
        factor: times 1 / classes.
        split: "test", "validation" or "train".
    """
    chance = 1 / len(metrics["confusion"])
    return min(metrics[f"{split}_accuracy"], metrics[f"{split}_mean_class_accuracy"]) > factor * chance
