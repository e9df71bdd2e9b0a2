"""Statements that a report prints and that must be true: the regulariser acts, the gates act, the networks have learnt.

`adds_up`, `obeys_gates` and `learns` look at one run, one network, one result. The others gather them over a study, for
all targets and seeds, so that a notebook prints one line and a changed value fails its comparison. A study with lambda
at 0, with gates that nobody looks at, or with shuffled labels makes one of them false.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from afdslib import afs
from afdslib.afs import macs
from afdslib.afs.layer import AFSConvBN
from afdslib.report import views
from afdslib.report.sweep import run_text
from afdslib.runs import MODEL
from afdslib.studies.sweep import Study

__all__ = [
    "about_conversion", "about_gates", "about_source", "adds_up", "gates_act", "learns", "obeys_gates",
    "regulariser_acts", "source_costs", "sweep_learns"
]  # fmt: skip


def adds_up(history: pd.DataFrame, strength: float, term: str) -> bool:
    """Whether, in every logged row, the loss that was trained is the cross-entropy plus lambda times the regulariser.

    A term too small to be seen in the loss (4e-6 of it, near the rounding of float32) does not act. Lambda, the
    strength, is as configured and not as the run itself reports it; the term is a column: "afd" or "feature_map".
    """
    if history.empty or term not in history or not strength > 0:
        return False
    share, wanted = history["loss"] - history["cross_entropy"], strength * history[term]
    visible = wanted > 4e-6 * history["loss"]
    return bool((visible & ((share - wanted).abs() <= 0.01 * wanted + 1e-6 * history["loss"])).all())


@torch.no_grad()
def obeys_gates(model: nn.Module, images: Tensor, *, tolerance: float = 1e-4) -> bool:
    """Whether the gates decide what every gated layer really puts out.

    In a forward pass over the images, with the first living channel of every layer closed on a copy of the network,
    each layer's output must be a * (eta * y + beta) with the layer's own gates (up to a tolerance, relative to the
    layer's largest output), and exactly zero where a = 0; no image has more than max(k, living static) channels
    computed. False also for a network without gates. The images are (B, 3, H, W).
    """
    closed, outcome = copy.deepcopy(model).eval(), list[bool]()
    layers = [module for module in closed.modules() if isinstance(module, AFSConvBN)]
    shut = {layer: int(layer.m.argmax()) for layer in layers}
    for layer, channel in shut.items():
        layer.m[channel] = 0

    def check(layer: AFSConvBN, args: tuple[Tensor, ...], output: Tensor) -> None:
        _, eta, active = (gate[..., None, None] for gate in layer.gates(args[0]))
        expected = active * (eta * layer.norm(layer.conv(args[0])) + layer.beta[:, None, None])
        error = (output - expected).abs().max()
        most = max(layer.k, int((layer.m * (1 - layer.s)).sum()))
        outcome.append(bool(error <= tolerance * expected.abs().max().clamp_min(1e-6)))
        outcome.append(bool((output[:, shut[layer]] == 0).all()))
        outcome.append(bool((output.abs().amax((2, 3))[active[..., 0, 0] == 0] == 0).all()))
        outcome.append(bool((active.sum(1) <= most).all()))

    for layer in layers:
        layer.register_forward_hook(check)  # on the copy, which nobody else sees
    closed(images.to(next(closed.parameters()).device))
    return bool(outcome) and all(outcome)


def learns(metrics: Mapping[str, Any], chance: float, *, share: float = 0.2, split: str = "test") -> bool:
    """Whether the accuracy on a split, also as the mean over classes, is a share of the way from chance to 1.

    The metrics are those of a run, or a row of a sweep; chance is 1 / classes.
    """
    least = chance + share * (1 - chance)
    return min(metrics[f"{split}_accuracy"], metrics[f"{split}_mean_class_accuracy"]) > least


def regulariser_acts(study: Study, method: str, *, budget: float = 1.0) -> bool:
    """`adds_up` for a method's runs at one budget, on all targets and seeds."""
    return all(
        adds_up(history, study.chosen(target)[method].strength, method.replace("-", "_"))
        for target in study.targets.values()
        for history in views.histories(study, [method], budget=budget, target=target)[method]
    )


def gates_act(study: Study, method: str, seed: int, budgets: Sequence[float], *, images: int = 32) -> bool | None:
    """`obeys_gates` for the networks of one chain per target, on real images, without those that diverged.

    None if the networks are not stored.
    """
    outcome = []
    for title, target in study.targets.items():
        statistics = study.target_data[title].statistics
        batch, _ = statistics.__getitems__(list(range(min(images, len(statistics)))))
        for budget in budgets:
            if "diverged" in study.point(method, seed, budget, target).metrics:
                continue
            result = views.network(study, study.point_run(method, seed, budget=budget, target=target))
            if result is None:
                return None
            outcome.append(obeys_gates(afs.load(result.artifact(MODEL)), batch))
    return bool(outcome) and all(outcome)


def sweep_learns(study: Study, sweep: pd.DataFrame, *, share: float = 0.2) -> bool:
    """`learns` for every row of a sweep, against its target's chance; False for an empty one."""
    rows = sweep.to_dict("records")
    return bool(rows) and all(learns(row, study.chance[row["target"]], share=share) for row in rows)


def about_source(study: Study) -> list[str]:
    """Whether the plain source network has learnt; for published weights one sentence."""
    result = study.source()
    if study.source_data is None or "test_accuracy" not in result.metrics:
        return [run_text(result.metrics)]
    chance, loss = 1 / len(study.source_data.classes), result.history().loss
    learnt = {split: learns(result.metrics, chance, share=0.1, split=split) for split in ("validation", "test")}
    lines = [f"{split} images: a tenth of the way from guessing to perfect: {ok}" for split, ok in learnt.items()]
    return [*lines, f"the loss fell: {bool(loss.iloc[-1] < loss.iloc[0])}"]


def source_costs(study: Study) -> list[str]:
    """Whether the stored numbers of the plain source network are those of its architecture."""
    model, size = views.source_architecture(study)
    m, o, dense = study.source().metrics, study.profile.source_training, macs.count(model, size).total
    lines = [f"parameters as counted above: {m['parameters'] == sum(p.numel() for p in model.parameters())}"]
    if "macs" in m:
        cost = o.steps * o.batch_size * 3 * dense
        lines.append(f"MACs as counted above: {m['macs'] == dense}")
        lines.append(f"training MACs are steps x images x 3 x MACs: {m['training_macs'] == cost}")
    return lines


def about_conversion(study: Study) -> list[str]:
    """Whether conversion and fine-tuning kept what the source network knew, as far as either was measured."""
    plain, gated = study.source().metrics, study.afs_source().metrics
    lines = [f"gated layers: {gated['gates']}"]
    if not gated["steps"]:
        return [*lines, views.NOT_TUNED]
    model, size = views.source_architecture(study)
    converted, dense = gated["converted_validation_accuracy"], macs.count(model, size).total
    start = plain.get("validation_accuracy", converted)
    gain = gated["validation_accuracy"] - start
    return [
        *lines,
        f"converted, before any step, as accurate as the plain network: {abs(converted - start) < 0.005}",
        f"fine-tuned, at most ten points below the plain network: {gain > -0.1}",
        f"predictors cost less than 5 % of the dense MACs: {gated['macs_predictors'] < 0.05 * dense}",
    ]


def about_gates(study: Study) -> list[str]:
    """Whether the source network's gates were constant before its predictors were trained, and vary afterwards."""
    if not (gates := views.source_gates(study)):
        return [views.NOT_TUNED]
    before, after, watched = gates["before"].values(), gates["after"].values(), study.afs_source().history()
    return [
        f"gates constant before: {all(layer['variation'] == 0 for layer in before)}",
        f"gates vary afterwards: {any(layer['variation'] > 0 for layer in after)}",
        f"density 1, so every channel has a place: {all(layer['removed'] == 0 for layer in after)}",
        f"dead gates at the end, below a fifth: {bool(watched.dead_gates.iloc[-1] < 0.2)}",
        f"the gates' variation is logged and finite: {bool(watched.gate_variance.between(0, 1e6).all())}",
    ]
