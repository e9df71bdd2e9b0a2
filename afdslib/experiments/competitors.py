"""The competitors as runs: a dense network, static pruning, FBS and narrower networks, beside AFS's `TransferRun`.

ExtendedSourceRun -> DenseRun (the unpruned point) -> PrunedRun (a budget) -> PrunedRun (the next budget) -> ...
ExtendedSourceRun -> FBSGatesRun (gates alone) -> FBSRun (everything, d = 1) -> FBSRun (a budget) -> ...
ExtendedSourceRun (at a smaller width) -> NarrowRun

All take the same fitting images, augmentation, steps and seeds as `TransferRun`, and report the same metrics. One
budget is one round of pruning and tuning; a static network is pruned first, so that every step of the stage mends it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from afdslib import afs, data, pruning, runs, training
from afdslib.afs import macs
from afdslib.afs.shrink import Kept, groups, shrink
from afdslib.backbones.inputs import input_of, see_at
from afdslib.base.atomic import write_json
from afdslib.base.checks import choice, number, whole
from afdslib.data import Splits
from afdslib.experiments.config import Network, check_budgets
from afdslib.experiments.measure import input_size
from afdslib.experiments.source import ExtendedSourceRun, network_of, with_classifier
from afdslib.experiments.stage import Event, FirstPoint, Point, Stage
from afdslib.losses.kd import Distil
from afdslib.losses.sparsity import GateL1, ScaleL1
from afdslib.losses.term import TERMS, Term
from afdslib.runs import MODEL
from afdslib.training import Optimisation
from afdslib.training.features import Teacher, feature_names
from afdslib.training.kept_channels import matching

__all__ = ["DenseRun", "FBSGatesRun", "FBSRun", "NarrowRun", "PrunedRun", "Selection"]

KEPT = "kept.json"


def _from(field: str, *names: str) -> tuple[Any, ...]:
    """Properties that a point takes from one of its fields."""
    return tuple(property(attrgetter(f"{field}.{name}")) for name in names)


def _chain(first: str) -> Any:
    """The point before, whose network a point starts from: that of one budget less, or the first one of the chain."""

    def parent(self: Any) -> Any:
        return replace(self, budgets=self.budgets[:-1]) if len(self.budgets) > 1 else getattr(self, first)

    return property(parent)


@runs.register
@dataclass(frozen=True)
class DenseRun(FirstPoint):
    """The unpruned point of every static method: one run, shared by the criteria that need nothing else.

    The fields are those of `Point` and `scale_l1`, network slimming's strength of the L1 term on batch norm scales; 0
    for all others.
    """

    source: ExtendedSourceRun
    scale_l1: float = 0.0
    macs_images: int = 256
    seed: int = 0
    use_test: bool = True

    budgets = (1.0,)

    def __post_init__(self) -> None:
        number("scale_l1", self.scale_l1, least=0)

    @property
    def penalties(self) -> tuple[Term, ...]:
        """Slimming's term, where it is asked for."""
        return (ScaleL1(self.scale_l1),) if self.scale_l1 else ()

    def start(self, run: runs.Run, splits: Splits) -> Stage:
        source = network_of(self.source, run)
        model = with_classifier(network_of(self.source, run), splits, self.seed)
        torch.manual_seed(self.seed)  # of the attention's weights
        return Stage(model, source, self.optimisation, terms=self.penalties)


@dataclass(frozen=True)
class Selection:
    """A criterion of static pruning.

    Attributes:
        name: "slimming", "taylor", "l1" or "random".
        normalise: "none", as published, or "mean": scores divided by their layer's mean.
        images: training images on which the Taylor scores are taken, in batches of 48.
        mixed: whether these batches hold images of all classes, as in training; in a split's own order, most hold one
            class, and the mean of their squared gradients is another criterion.
    """

    name: str
    normalise: str = "none"
    images: int = 480
    mixed: bool = runs.added(False)

    def __post_init__(self) -> None:
        choice("selection", self.name, pruning.CRITERIA)
        choice("normalise", self.normalise, pruning.NORMALISATIONS)
        whole("images", self.images, 1)


@runs.register
@dataclass(frozen=True)
class PrunedRun(Point):
    """One point of static pruning: channels removed from the point before, for good and physically, then tuned.

    What `dense`, the unpruned point or a chain's last one, says of source, data, regulariser, seed and reading of the
    test set holds for the chain. The budgets decrease below 1.

    Attributes:
        alpha, temperature: share of the soft term in a distillation from the unpruned network, 0 for none, and its T.
        side: pixels to which the pruned network scales its images down; 0 for whole ones, which the teacher sees.
        matched: training images by which batch norms are corrected after the cut; see `pruning.match_norms`.
    """

    dense: DenseRun | PrunedRun
    selection: Selection
    tuning: Optimisation
    budgets: tuple[float, ...]
    alpha: float = runs.added(0.0)
    temperature: float = runs.added(4.0)
    side: int = runs.added(0)
    matched: int = runs.added(0)

    source, data, regulariser, seed = _from("dense", "source", "data", "regulariser", "seed")
    use_test, macs_images, penalties = _from("dense", "use_test", "macs_images", "penalties")
    (selection_name,) = _from("selection", "name")
    parent = _chain("dense")

    def __post_init__(self) -> None:
        check_budgets(self.budgets, pruned=True)
        number("alpha", self.alpha, least=0, most=1)
        number("temperature", self.temperature, above=0)
        whole("side", self.side, 0)
        whole("matched", self.matched, 0)

    @property
    def unpruned(self) -> DenseRun:
        """The point that every chain begins with."""
        return self.dense.unpruned if isinstance(self.dense, PrunedRun) else self.dense

    def start(self, run: runs.Run, splits: Splits) -> Stage:
        size, source, before = input_size(splits), network_of(self.source, run), self.point_before(run)
        budget, dense = self.budgets[-1], float(before.metrics["dense_macs"])
        larger = afs.load(before.artifact(MODEL))
        if self.side and "side" not in larger.architecture:  # type: ignore[operator]
            see_at(larger, self.side)
        splits = splits.normalised(input_of(larger))
        chosen = self._chosen(run, larger, splits, dense)
        model = shrink(larger, chosen, size)
        if self.matched:
            images = training.first(splits.statistics, self.matched)
            found = groups(larger, size)
            pruning.match_norms(model, larger, found, chosen, images.__getitems__(range(len(images)))[0])
        measured = macs.count(model, size).total / dense
        if measured > budget * (1 + 1e-6):
            raise RuntimeError(f"the pruned network costs {measured}, more than its budget {budget}")
        terms, forwards = self.penalties, self.taught / measured
        if self.alpha:
            terms += (Distil(self.temperature, self.alpha, Teacher(network_of(self.unpruned, run))),)
            forwards += 1 / measured
        torch.manual_seed(self.seed)
        compares = "layers" in TERMS[self.regulariser.name].needs
        names = feature_names(source, self.regulariser.features) if compares else []
        return Stage(
            model, source, self.tuning, before, dense, forwards=forwards,
            channels=matching(source, _kept(model), names, size), terms=terms,
        )  # fmt: skip

    def select(self, stage: Stage) -> Mapping[int, Event]:
        """The channels have gone at the start; batch norms are measured anew where that is asked for."""
        self.recalibrate(stage)
        return {}

    def channel_counts(self, stage: Stage) -> dict[str, Any]:
        widths = {group.name: group.width for group in groups(stage.reference, input_size(stage.splits))}
        layers = {
            name: {"channels": widths[name], "removed": widths[name] - len(p), "static": len(p), "dynamic": 0}
            for name, p in _kept(stage.model).items()
        }
        static = sum(layer["static"] for layer in layers.values())
        removed = sum(widths.values()) - static
        return {"density": 1.0, "removed": removed, "static": static, "dynamic": 0, "layers": layers}

    def _chosen(self, run: runs.Run, model: nn.Module, splits: Splits, dense: float) -> Kept:
        """The channels to keep, chosen once per run: a resumed run must not choose others on another machine."""
        file, size, selection = run.path / KEPT, input_size(splits), self.selection
        if not file.exists():
            model = model.to(training.device())
            layers = groups(model, size)
            shuffle = self.seed if selection.mixed else None
            batches = data.loader(training.first(splits.statistics, selection.images, shuffle=shuffle), 48)
            options: dict[str, Any] = {"batches": batches, "seed": self.seed, "normalise": selection.normalise}
            ranked = pruning.scores(selection.name, model, layers, **options)
            write_json(file, pruning.choose(model, layers, ranked, self.budgets[-1], size, dense=dense))
            model.to("cpu")
        return {name: tuple(positions) for name, positions in json.loads(file.read_text(encoding="utf-8")).items()}


def _kept(model: Any) -> dict[str, tuple[int, ...]]:
    """Positions among the source's channels, by group, that a pruned network has."""
    return {name: tuple(positions) for name, positions in model.architecture["kept"].items()}


@runs.register
@dataclass(frozen=True)
class FBSGatesRun(FirstPoint):
    """FBS's first stage: the gates alone, with the new classifier, at density 1.

    FBS has no source stage of its own, and these steps are taken from those of the unpruned stage.

    Attributes:
        gate_bias: what every gate starts at; None for the trained scales; see `pruning.boosted`.
        gate_l1: strength of the optional L1 term on the gates.
    """

    source: ExtendedSourceRun
    gate_bias: float | None = 1.0
    gate_l1: float = 0.0
    seed: int = 0
    use_test: bool = True

    budgets = (1.0,)
    gated, measured, selection_name = True, False, "gates of fbs"

    def __post_init__(self) -> None:
        if self.gate_bias is not None:
            number("gate_bias", self.gate_bias, above=0)
        number("gate_l1", self.gate_l1, least=0)

    @property
    def penalties(self) -> tuple[Term, ...]:
        """The term on the gates, where it is asked for."""
        return (GateL1(self.gate_l1),) if self.gate_l1 else ()

    def start(self, run: runs.Run, splits: Splits) -> Stage:
        source = network_of(self.source, run)
        model = with_classifier(pruning.boosted(source, bias=self.gate_bias), splits, self.seed)
        torch.manual_seed(self.seed)
        # The reference has the same gates at their trained scales: the same function, and parameters by name.
        return Stage(model, pruning.boosted(source, bias=None), self.optimisation, terms=self.penalties)

    def select(self, stage: Stage) -> Mapping[int, Event]:
        pruning.gates_alone(stage.model, stage.objective.classifier(stage.model), True)
        return {}


@runs.register
@dataclass(frozen=True)
class FBSRun(Point):
    """One point of FBS: everything is tuned, and below 1 the density is lowered gradually to the budget.

    Attributes:
        gates: the stage before, with source, data, regulariser and seed of the chain.
        optimisation, tuning: of the unpruned stage, less the steps of the gates alone, and of each later one.
        lowerings: in how many steps, over the first half of a stage, the density goes down.
        trim: share of a stage after which the density is set to the budget once more.
    """

    gates: FBSGatesRun
    optimisation: Optimisation
    tuning: Optimisation
    budgets: tuple[float, ...] = (1.0,)
    lowerings: int = 4
    trim: float = 0.8
    macs_images: int = 256

    gated, selection_name = True, "fbs"
    source, data, regulariser, seed, use_test = _from("gates", "source", "data", "regulariser", "seed", "use_test")
    parent = _chain("gates")

    def __post_init__(self) -> None:
        check_budgets(self.budgets)
        whole("lowerings", self.lowerings, 1)

    def start(self, run: runs.Run, splits: Splits) -> Stage:
        source, before = network_of(self.source, run), self.point_before(run)
        model = afs.load(before.artifact(MODEL))
        torch.manual_seed(self.seed)
        settings = self.optimisation if len(self.budgets) == 1 else self.tuning
        return Stage(model, pruning.boosted(source, bias=None), settings, before, terms=self.gates.penalties)

    def select(self, stage: Stage) -> Mapping[int, Event]:
        pruning.gates_alone(stage.model, stage.objective.classifier(stage.model), False)
        if len(self.budgets) == 1:
            return {}
        (start, budget), steps = self.budgets[-2:], stage.settings.steps
        events: dict[int, Event] = {}
        for index in range(self.lowerings):
            share = start * (budget / start) ** ((index + 1) / self.lowerings)
            events[index * steps // (2 * self.lowerings)] = partial(self._lower, stage, share)
        events[int(steps * self.trim)] = partial(self._lower, stage, budget)
        return events

    def settle_budget(self, stage: Stage) -> None:
        if len(self.budgets) > 1:
            self._lower(stage, pruning.ROOM * self.budgets[-1])

    def _lower(self, stage: Stage, share: float) -> dict[str, float]:
        """Lowers the density until the network costs a share of the dense one's MACs."""
        subset = data.loader(training.first(stage.splits.statistics, self.macs_images), 128)
        with training.autocast(next(stage.model.parameters()).device, stage.settings.precision):
            reached = pruning.lower_density(stage.model, share, subset, stage.dense)
        return {"mask_macs": reached, "density": next(iter(afs.layers(stage.model).values())).density}


@runs.register
@dataclass(frozen=True)
class NarrowRun(FirstPoint):
    """A cheaper network, narrower or of smaller images, trained on the target with or without distillation.

    A narrower one is trained on the source at its width. One of smaller images starts from the source's weights and
    scales each augmented image down; a teacher sees the whole one.

    It takes as many target steps as a chain down to its budget takes in all. The budget is for the record: the width of
    the source decides the MACs.

    Attributes:
        full: the dense network, of whose MACs the budget is a share.
        teacher: the tuned dense target network to distil; None for plain training.
        temperature, alpha: T of the distillation, and the share of its soft term.
        side: pixels to which images are scaled down; 0 for a narrower network.
    """

    source: ExtendedSourceRun
    full: Network
    budget: float
    teacher: DenseRun | None = None
    temperature: float = 4.0
    alpha: float = 0.9
    macs_images: int = 256
    seed: int = 0
    use_test: bool = True
    side: int = runs.added(0)

    selection_name = "narrow"
    parent = property(attrgetter("teacher"))  # without its result there is none here

    def __post_init__(self) -> None:
        number("budget", self.budget, above=0, most=1)
        whole("side", self.side, 0)
        number("temperature", self.temperature, above=0)
        number("alpha", self.alpha, least=0, most=1)

    @property
    def budgets(self) -> tuple[float, ...]:  # type: ignore[override]
        return (self.budget,)

    def start(self, run: runs.Run, splits: Splits) -> Stage:
        size, source, network = input_size(splits), network_of(self.source, run), self.full
        model = with_classifier(network_of(self.source, run), splits, self.seed)
        if self.side:
            see_at(model, self.side)
            see_at(source, self.side)
        dense = pruning.network_macs(network.name, network.stem, network.width, len(splits.classes), size)
        terms: tuple[Term, ...] = ()
        forwards = self.taught
        if self.teacher is not None:
            terms = (Distil(self.temperature, self.alpha, Teacher(network_of(self.teacher, run))),)
            forwards += dense / macs.count(model, size).total
        torch.manual_seed(self.seed)
        return Stage(model, source, self.optimisation, dense=dense, forwards=forwards, terms=terms)
