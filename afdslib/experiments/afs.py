"""AFS and AFDS on a target: AFSSourceRun -> TransferRun (the unpruned point) -> TransferRun (the next budget) -> ..."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader

from afdslib import afs, data, runs, training
from afdslib.base.checks import choice, number, whole
from afdslib.data import Splits
from afdslib.experiments.config import check_budgets
from afdslib.experiments.measure import cost
from afdslib.experiments.source import AFSSourceRun, network_of, with_classifier
from afdslib.experiments.stage import Event, FirstPoint, Stage
from afdslib.pruning import settle
from afdslib.runs import MODEL
from afdslib.training import Optimisation

__all__ = ["TransferRun"]


@runs.register
@dataclass(frozen=True)
class TransferRun(FirstPoint):
    """One point of a pruning sweep: a target network at the last of its budgets, tuned from the point before.

    The first budget is 1, the unpruned network at its true cost. For each later one the density is set first, half of
    the stage is trained, the masks are updated to the budget, and the rest is trained; shortly before the end the
    masks are updated once more, because gates move while they train. [recall; the last update ours]

    Attributes:
        source, data, regulariser, macs_images, seed, use_test: see `Point`.
        optimisation: of the unpruned stage.
        tuning: of each later stage.
        budgets: shares of the dense network's MACs, decreasing from 1.
        delta_s: threshold of the squared coefficient of variation below which gates become constant.
        density_exponent: d = max(density_floor, budget ** density_exponent). [ours]
        density_floor: see above.
        trim: share of a stage after which the masks are updated a second time.
        settle: whether the budget is met once more after the last step, between 98 and 100 %; see `pruning.settle`.
        multiple: each layer keeps a multiple of channels, for kernels that like such shapes; see `afs.update_masks`.
        stream: "free", or "coupled" for residual streams that narrow as a whole; see `afs.update_masks`.
        first: share of a stage after which the masks are updated the first time; 0.5 is between its halves. [recall]
        freeze_first: whether that update freezes gates, too; if not, only the later one does. [ours]
        settle_by: what the channels that go when the budget is met once more are ranked by: "q", the mean gate, or
            "taylor"; see `afs.taylor_importance`. [ours]
        statistics_images: training images whose gates the masks are made from; 0 for all.
    """

    source: AFSSourceRun
    tuning: Optimisation
    budgets: tuple[float, ...] = (1.0,)
    delta_s: float = 0.01
    density_exponent: float = 0.5
    density_floor: float = 0.5
    trim: float = 0.8
    macs_images: int = 256
    seed: int = 0
    use_test: bool = True
    settle: bool = runs.added(False)
    multiple: int = runs.added(1)
    stream: str = runs.added("free")
    first: float = runs.added(0.5)
    freeze_first: bool = runs.added(True)
    settle_by: str = runs.added("q")
    statistics_images: int = runs.added(0)

    gated = True

    def __post_init__(self) -> None:
        check_budgets(self.budgets)
        whole("multiple", self.multiple, 1)
        whole("macs_images", self.macs_images, 1)
        choice("stream", self.stream, ("free", "coupled"))
        choice("settle_by", self.settle_by, ("q", "taylor"))
        if len(self.budgets) == 1:  # not settled, and one run for all that go on from it
            object.__setattr__(self, "settle_by", "q")
        number("density_floor", self.density_floor, above=0, most=1)
        number("density_exponent", self.density_exponent, least=0)
        if self.delta_s != math.inf:  # every gate becomes constant
            number("delta_s", self.delta_s, least=0)
        number("first", self.first, least=0, below=1)
        number("trim", self.trim, least=0, below=1)

    @property
    def parent(self) -> TransferRun | None:
        """The point before, whose network this one starts from."""
        if len(self.budgets) == 1:
            return None
        return replace(self, budgets=self.budgets[:-1])

    @property
    def density(self) -> float:
        """The density d at the last budget."""
        return max(self.density_floor, self.budgets[-1] ** self.density_exponent)

    def start(self, run: runs.Run, splits: Splits) -> Stage:
        torch.manual_seed(self.seed)  # of the attention's weights, which are drawn after the network is built
        source, smoothing = network_of(self.source, run), self.optimisation.label_smoothing
        if self.parent is None:
            model = with_classifier(copy.deepcopy(source), splits, self.seed)
            return Stage(model, source, self.optimisation, smoothing=smoothing)
        before = self.point_before(run)
        model = afs.load(before.artifact(MODEL))
        afs.set_density(model, self.density)
        return Stage(model, source, self.tuning, before, smoothing=smoothing)

    def select(self, stage: Stage) -> Mapping[int, Event]:
        """The masks meet the budget between the halves of the stage, and once more shortly before its end."""
        if self.parent is None:
            return {}
        stage.objective.masks_changed(stage.model)
        update, steps = functools.partial(self._update_masks, stage), stage.settings.steps
        return {
            math.floor(steps * self.first): functools.partial(update, self.freeze_first),
            math.floor(steps * self.trim): update,
        }

    def _update_masks(self, stage: Stage, freeze: bool = True) -> dict[str, float]:
        model, settings = stage.model, stage.settings
        with training.autocast(next(model.parameters()).device, settings.precision):
            report = afs.update_masks(
                model, afs.collect_statistics(model, self._statistics_images(stage)),
                macs_budget=self.budgets[-1], loader=self._subset(stage), delta_s=self.delta_s if freeze else 0.0,
                multiple=self.multiple, stream=self.stream,
            )  # fmt: skip
        stage.objective.masks_changed(model)
        self.recalibrate(stage)
        counts = {kind: getattr(report, kind) for kind in ("removed", "static", "dynamic")}
        return {"mask_macs": cost(report).total / stage.dense, **counts}

    def settle_budget(self, stage: Stage) -> None:
        """Where asked for, channels go or come back until the budget is met between 98 and 100 %."""
        if not self.settle or self.parent is None:
            return
        model, fitting = stage.model, self._statistics_images(stage)
        with training.autocast(next(model.parameters()).device, stage.settings.precision):
            settle(
                model, self.budgets[-1], self._subset(stage), afs.collect_statistics(model, fitting),
                stage.dense, multiple=self.multiple, stream=self.stream,
                scores=functools.partial(afs.taylor_importance, model, fitting) if self.settle_by == "taylor" else None,
            )  # fmt: skip
        stage.objective.masks_changed(model)

    def _statistics_images(self, stage: Stage) -> DataLoader:
        images = stage.splits.statistics
        return data.loader(training.first(images, self.statistics_images or len(images)), 128)

    def _subset(self, stage: Stage) -> DataLoader:
        """The training images on which the budget is met."""
        return data.loader(training.first(stage.splits.statistics, self.macs_images), 128)
