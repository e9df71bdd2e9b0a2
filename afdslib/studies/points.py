"""The configurations of the comparison: every competitor's source network and its point at each budget."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from afdslib import experiments
from afdslib.base.errors import UnreachableError
from afdslib.experiments import DataSource, TransferRun
from afdslib.pruning import CRITERIA, fitting_side, fitting_width
from afdslib.studies.profile import Profile
from afdslib.studies.protocol import Method, Protocol
from afdslib.training import Optimisation
from afdslib.training.objective import Regulariser

__all__ = ["Point", "Points", "Settings", "Tuned"]

Point = experiments.DenseRun | experiments.PrunedRun | experiments.FBSRun | experiments.NarrowRun | TransferRun
Settings = Mapping[str, Any]
"""Of a regulariser or a selection, by name: numbers, words or None."""


@dataclass(frozen=True)
class Tuned:
    """A method with the settings of its regulariser (strength, lr) and of its selection."""

    method: Method
    regulariser: Settings
    selection: Settings

    @property
    def strength(self) -> float:
        return float(self.regulariser["strength"])


class Points:
    """Makes the configurations of a comparison on one target.

    Args:
        profile: data sets, network, steps.
        rules: of the comparison.
        target: the data set.
    """

    def __init__(self, profile: Profile, rules: Protocol, target: DataSource):
        self.profile, self.rules, self.target = profile, rules, target

    @property
    def afs_source(self) -> experiments.AFSSourceRun:
        """The converted source, fine-tuned so that its predictors learn."""
        return self.profile.afs_source_run

    def extended(self, budget: float | None = None) -> experiments.ExtendedSourceRun:
        """The competitors' start: as many more source steps as AFS got, at full width or at a budget's.

        Args:
            budget: share of MACs of a narrower network; None for the full one.

        Raises:
            UnreachableError: no width has that budget, or the weights are published ones.
        """
        p, source = self.profile, self.profile.source_run
        if budget is not None:
            if p.network.weights is not None:
                raise UnreachableError(
                    "published weights exist at one width only; give the profile a source training to pretrain "
                    "narrower networks"
                )
            classes, size = self._shape
            width = fitting_width(p.network.name, p.network.stem, p.network.width, classes, size, budget)
            source = replace(source, network=replace(p.network, width=width))
        return experiments.ExtendedSourceRun(source, p.source, p.afs_training)

    @functools.cached_property
    def _shape(self) -> tuple[int, tuple[int, int, int]]:
        splits = self.target.load()
        return len(splits.classes), (3, splits.test.size, splits.test.size)

    def sources(self, methods: Sequence[Method]) -> Iterator[tuple[str, Any]]:
        """The source networks that methods start from, with a name for readers."""
        yield "AFS source", self.afs_source
        yield "source, trained on", self.extended()
        r = self.rules
        if any("width" in m.selection for m in methods):
            for budget in sorted({r.trial_budget, r.primary_budget, *r.budgets[1:]}, reverse=True):
                try:
                    yield f"source of {1 / budget:g}x, trained on", self.extended(budget)
                except UnreachableError:  # no such width: its points are missing and say why
                    continue

    def regulariser(self, method: Method, settings: Settings) -> Regulariser:
        """A method's regulariser with its strength."""
        decay = self.profile.candidates[-1].regulariser.classifier_decay
        plain = Regulariser(method.regulariser, float(settings["strength"]), decay)
        return replace(plain, attention=method.attention) if method.attention != "joint" else plain

    def stage(self, settings: Optimisation, factor: float | None, steps: int) -> Optimisation:
        """A stage with its learning rate scaled, and a row, after which it can be resumed, about every epoch."""
        rows = max(1, math.ceil(steps / self.rules.epoch_steps))
        return replace(settings, lr=settings.lr * float(factor or 1.0), log_rows=rows, steps=steps)

    def dense(self, method: Method, settings: Settings, seed: int, *, trial: bool = False) -> Point:
        """The unpruned network with a method's regulariser."""
        return self.point(Tuned(replace(method, selection="taylor"), settings, {"lr": 1.0}), seed, (1.0,), trial=trial)

    def point(
        self, tuned: Tuned, seed: int, budgets: Sequence[float], *, trial: bool = False, factor: float = 1.0
    ) -> Point:
        """The last point of a chain of budgets.

        Args:
            tuned: the method with its settings.
            seed: of fitting images, initialisation and order.
            budgets: from 1 down to the one wanted.
            trial: with the trial's steps and without test images.
            factor: on the target steps, for the row at equal wall-clock time.

        Raises:
            UnreachableError: a budget that no width reaches.
        """
        p, rules, budgets = self.profile, self.rules, tuple(budgets)
        selection, chosen = tuned.method.selection, tuned.selection
        first, factor = p.trial if trial else p.transfer, factor * rules.steps
        unpruned = self.stage(first, tuned.regulariser["lr"], max(2, round(first.steps * factor)))
        tuning = self.stage(p.tuning, chosen["lr"], max(2, round(p.tuning.steps * factor)))
        data, regulariser = replace(self.target, seed=seed), self.regulariser(tuned.method, tuned.regulariser)
        common: dict[str, Any] = {"macs_images": p.macs_images, "seed": seed, "use_test": not trial}
        if selection in ("afs", "fbs"):
            faster = float(chosen["predictor_lr"])
            unpruned, tuning = (replace(o, predictor_lr=o.predictor_lr * faster) for o in (unpruned, tuning))
        if selection == "afs":
            return TransferRun(
                self.afs_source, data, regulariser, unpruned, tuning, budgets, float(chosen["delta_s"]),
                density_exponent=float(chosen["density_exponent"]), density_floor=p.density_floor, settle=True,
                first=rules.first_update, freeze_first=False, settle_by=rules.settle_by,
                statistics_images=p.statistics_images, **common,
            )  # fmt: skip
        if selection == "fbs":
            alone = round(rules.gates_alone * unpruned.steps)
            gates = experiments.FBSGatesRun(
                self.extended(), data, regulariser, self.stage(unpruned, 1.0, alone), chosen["gate_bias"],
                float(chosen["gate_l1"]), seed, not trial,
            )  # fmt: skip
            rest = self.stage(unpruned, 1.0, unpruned.steps - alone)
            return experiments.FBSRun(gates, rest, tuning, budgets, macs_images=p.macs_images)
        scale_l1 = float(chosen.get("scale_l1", 0.0))
        dense = experiments.DenseRun(self.extended(), data, regulariser, unpruned, scale_l1=scale_l1, **common)
        if len(budgets) == 1:
            return dense
        if selection in CRITERIA:
            criterion = experiments.Selection(
                selection, str(chosen.get("normalise", "none")), mixed=selection == "taylor"
            )
            return experiments.PrunedRun(dense, criterion, tuning, budgets[1:])
        whole = self.stage(first, chosen["lr"], unpruned.steps + (len(budgets) - 1) * tuning.steps)
        smaller = selection.startswith("image")
        return experiments.NarrowRun(
            self.extended(None if smaller else budgets[-1]), data, regulariser, whole, full=p.network,
            budget=budgets[-1], teacher=dense if selection.endswith("-kd") else None,
            temperature=float(chosen.get("temperature", 4.0)), alpha=float(chosen.get("alpha", 0.9)),
            side=self._side(budgets[-1]) if smaller else 0, **common,
        )  # fmt: skip

    def _side(self, budget: float) -> int:
        """Of the images that the dense network has a budget for."""
        network = self.profile.network
        return fitting_side(network.name, network.stem, network.width, *self._shape, budget)
