"""The competitors as runs: a dense network, static pruning, FBS and narrower networks, beside AFS's `TransferRun`.

ExtendedSourceRun -> DenseRun (the unpruned point) -> PrunedRun (a budget) -> PrunedRun (the next budget) -> ...
ExtendedSourceRun -> FBSGatesRun (gates alone) -> FBSRun (everything, d = 1) -> FBSRun (a budget) -> ...
ExtendedSourceRun (at a smaller width) -> NarrowRun

All take the same fitting images, augmentation, steps and seeds as `TransferRun`, and report the same metrics. One
budget is one round of pruning and tuning. A static network is pruned before the stage's first step, so that every step
mends it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from afdslib import afs, backbones, data, runs, training
from afdslib.afs import macs
from afdslib.afs.shrink import groups, shrink
from afdslib.base.atomic import write_json
from afdslib.base.errors import AFDSError
from afdslib.data import Splits
from afdslib.experiments.afs import (
    MODEL,
    OBJECTIVE,
    DataSource,
    Network,
    _gate_metrics,
    _input_size,
    _measure,
    _save,
    _training_macs,
    diverges,
)
from afdslib.experiments.delta import weights_for
from afdslib.experiments.extended import ExtendedSourceRun
from afdslib.losses.kd import Distil
from afdslib.losses.sparsity import GateL1, ScaleL1
from afdslib.losses.term import TAUGHT, TERMS, Term
from afdslib.pruning import boosted, choose, lower_density, scores
from afdslib.pruning.budget import ROOM
from afdslib.pruning.criteria import CRITERIA, NORMALISATIONS
from afdslib.pruning.fbs import gates_alone
from afdslib.pruning.narrow import network_macs
from afdslib.training import Optimisation
from afdslib.training.features import Teacher, feature_names
from afdslib.training.kept_channels import Channels, matching
from afdslib.training.objective import Objective, Regulariser

__all__ = ["DenseRun", "FBSGatesRun", "FBSRun", "NarrowRun", "PrunedRun", "Selection"]

KEPT = "kept.json"


def _share(value: object, *, above: bool = True) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and (0 < value if above else 0 <= value) and value < float("inf")  # type: ignore[operator]


def _check_tail(budgets: tuple[float, ...]) -> None:
    """Refuses budgets after the unpruned one that do not decrease within (0, 1)."""
    fine = bool(budgets) and all(_share(b) and b < 1 for b in budgets)
    if not fine or any(x <= y for x, y in zip(budgets, budgets[1:], strict=False)):
        raise AFDSError(f"budgets must decrease and lie between 0 and 1, got {budgets!r}")


class _Point:
    """What the points of all competitors share: loading, the objective, and one way to measure."""

    source: ExtendedSourceRun
    data: DataSource
    regulariser: Regulariser
    seed: int
    use_test: bool

    def splits(self) -> Splits:
        """The data; a trial's hold no test image."""
        return self.data.load() if self.use_test else data.sealed(self.data.load())

    def objective(
        self,
        run: runs.Run,
        model: nn.Module,
        source: nn.Module,
        settings: Optimisation,
        size: tuple[int, int, int],
        *,
        channels: Channels | None = None,
        penalties: Sequence[Term] = (),
    ) -> Objective:
        return Objective(
            model, self.regulariser, source, size, label_smoothing=settings.label_smoothing, channels=channels,
            weights=weights_for(self.regulariser, self.source, self.data, run), terms=penalties,
        )  # fmt: skip

    def prepare(self, run: runs.Run, objective: Objective, splits: Splits, settings: Optimisation) -> int:
        """Trains a detached attention before the first step of the first stage; returns its steps."""
        if self.regulariser.name != "afd" or self.regulariser.attention != "detached":
            return 0
        if run.load_checkpoint() is None:
            batches = training.first_batches(splits.train, settings.batch_size, self.seed, settings.steps)
            objective.prepare(batches, len(splits.classes))
        return settings.steps


def _plain(config: ExtendedSourceRun, run: runs.Run) -> nn.Module:
    return afs.load(runs.get_or_run(config, store=run.store, needs=(MODEL,)).artifact(MODEL))


def _architecture(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "architecture")  # noqa: B009 (torch's annotation of attributes is tensor or module)


def _forwards(regulariser: Regulariser) -> float:
    return 1.0 if TERMS[regulariser.name].needs & TAUGHT else 0.0


def _with_classifier(model: nn.Module, splits: Splits, seed: int) -> nn.Module:
    backbones.reset_classifier(model, len(splits.classes), generator=torch.Generator().manual_seed(seed))
    return model


# ------------------------------------------------------------------------------------------------------ dense networks


@runs.register
@dataclass(frozen=True)
class DenseRun(_Point):
    """The unpruned point of every static method: one run, shared by the criteria that need nothing else.

    Attributes:
        source: the plain network to start from; also the reference of the regulariser.
        data: the target data set; its seed draws the fitting images.
        regulariser: and its strength.
        optimisation: of the stage.
        scale_l1: network slimming's strength of the L1 term on batch norm scales; 0 for all others.
        macs_images: training images whose accuracy and MACs are reported, as in `TransferRun`.
        seed: of the classifier's initialisation, data order and augmentation.
        use_test: whether the test set is read at the end; trials that choose something must not.
    """

    source: ExtendedSourceRun
    data: DataSource
    regulariser: Regulariser
    optimisation: Optimisation
    scale_l1: float = 0.0
    macs_images: int = 256
    seed: int = 0
    use_test: bool = True

    def __post_init__(self) -> None:
        if not _share(self.scale_l1, above=False):
            raise AFDSError(f"scale_l1 must be a number of at least 0, got {self.scale_l1!r}")

    parent = None
    times = "1x"
    budgets = (1.0,)

    @property
    def penalties(self) -> tuple[Term, ...]:
        """Slimming's term, where it is asked for."""
        return (ScaleL1(self.scale_l1),) if self.scale_l1 else ()

    @diverges
    def execute(self, run: runs.Run) -> dict[str, Any]:
        splits, settings = self.splits(), self.optimisation
        size, source = _input_size(splits), _plain(self.source, run)
        model = _with_classifier(_plain(self.source, run), splits, self.seed)
        torch.manual_seed(self.seed)  # of the attention's weights
        objective = self.objective(run, model, source, settings, size, penalties=self.penalties)
        model.to(training.device())
        objective.place(training.device())
        attention_steps = self.prepare(run, objective, splits, settings)
        dense = macs.count(model, size).total
        training.fit(
            model, splits.train, objective, settings, run, seed=self.seed,
            label=f"{self.regulariser.name} seed {self.seed} dense",
        )  # fmt: skip
        metrics = _measure(model, splits, settings, dense, 1.0, images=self.macs_images, use_test=self.use_test)
        _save(run, model, objective)
        channels = sum(group.width for group in groups(model, size))
        return metrics | {
            "density": 1.0,
            "removed": 0,
            "static": channels,
            "dynamic": 0,
            "steps": settings.steps + attention_steps,
            "training_macs": _training_macs(model, size, settings, _forwards(self.regulariser)),
        }


# ------------------------------------------------------------------------------------------------------ static pruning


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
        if self.name not in CRITERIA:
            raise AFDSError(f"unknown selection {self.name!r}; static ones are {', '.join(CRITERIA)}")
        if self.normalise not in NORMALISATIONS:
            raise AFDSError(f"normalise must be one of {', '.join(NORMALISATIONS)}, got {self.normalise!r}")
        if not (isinstance(self.images, int) and self.images >= 1):
            raise AFDSError(f"images must be a whole number of at least 1, got {self.images!r}")


@runs.register
@dataclass(frozen=True)
class PrunedRun(_Point):
    """One point of static pruning: channels removed from the point before, for good and physically, then tuned.

    Attributes:
        dense: the unpruned point, whose source, data, regulariser, seed and reading of the test set hold for the chain.
        selection: which channels go.
        tuning: of each stage.
        budgets: shares of the dense network's MACs, decreasing below 1.
    """

    dense: DenseRun
    selection: Selection
    tuning: Optimisation
    budgets: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_tail(self.budgets)

    @property
    def source(self) -> ExtendedSourceRun:  # type: ignore[override]
        return self.dense.source

    @property
    def data(self) -> DataSource:  # type: ignore[override]
        return self.dense.data

    @property
    def regulariser(self) -> Regulariser:  # type: ignore[override]
        return self.dense.regulariser

    @property
    def seed(self) -> int:  # type: ignore[override]
        return self.dense.seed

    @property
    def use_test(self) -> bool:  # type: ignore[override]
        return self.dense.use_test

    @property
    def parent(self) -> PrunedRun | DenseRun:
        """The point before, whose network this one starts from."""
        return replace(self, budgets=self.budgets[:-1]) if len(self.budgets) > 1 else self.dense

    @property
    def times(self) -> str:
        return f"{1 / self.budgets[-1]:g}x"

    @diverges
    def execute(self, run: runs.Run) -> dict[str, Any]:
        splits, settings, budget = self.splits(), self.tuning, self.budgets[-1]
        size, source = _input_size(splits), _plain(self.source, run)
        before = runs.get_or_run(self.parent, store=run.store, needs=(MODEL, OBJECTIVE))
        dense = float(before.metrics["dense_macs"])
        larger = afs.load(before.artifact(MODEL))
        model = shrink(larger, self._chosen(run, larger, splits, budget, dense, size), size)
        measured = macs.count(model, size).total / dense
        if measured > budget * (1 + 1e-6):
            raise RuntimeError(f"the pruned network costs {measured}, more than its budget {budget}")
        torch.manual_seed(self.seed)
        compares = "layers" in TERMS[self.regulariser.name].needs
        names = feature_names(source, self.regulariser.features) if compares else []
        kept = {name: tuple(positions) for name, positions in _architecture(model)["kept"].items()}
        objective = self.objective(
            run, model, source, settings, size,
            channels=matching(source, kept, names, size), penalties=self.dense.penalties,
        )  # fmt: skip
        objective.inherit(load_file(before.artifact(OBJECTIVE)))
        model.to(training.device())
        objective.place(training.device())
        training.fit(
            model, splits.train, objective, settings, run, seed=self.seed,
            label=f"{self.regulariser.name} {self.selection.name} seed {self.seed} at {self.times}",
        )  # fmt: skip
        metrics = _measure(
            model, splits, settings, dense, budget, images=self.dense.macs_images, use_test=self.use_test
        )
        _save(run, model, objective)
        here = sum(len(positions) for positions in kept.values())
        widths = {group.name: group.width for group in groups(source, size)}
        return metrics | {
            "density": 1.0,
            "removed": sum(widths.values()) - here,
            "static": here,
            "dynamic": 0,
            "layers": {
                name: {"channels": widths[name], "removed": widths[name] - len(p), "static": len(p), "dynamic": 0}
                for name, p in kept.items()
            },
            "steps": settings.steps,
            "training_macs": _training_macs(model, size, settings, _forwards(self.regulariser) / measured),
        }

    def _chosen(
        self, run: runs.Run, model: nn.Module, splits: Splits, budget: float, dense: float, size: tuple[int, int, int]
    ) -> Mapping[str, tuple[int, ...]]:
        """The channels to keep, chosen once per run: a resumed run must not choose others on another machine."""
        file = run.path / KEPT
        if file.exists():
            return {name: tuple(positions) for name, positions in json.loads(file.read_text(encoding="utf-8")).items()}
        model = model.to(training.device())
        found = groups(model, size)
        shuffle = self.seed if self.selection.mixed else None
        batches = data.loader(training.first(splits.statistics, self.selection.images, shuffle=shuffle), 48)
        ranked = scores(
            self.selection.name, model, found, batches=batches, seed=self.seed, normalise=self.selection.normalise
        )
        kept = choose(model, found, ranked, budget, size, dense=dense)
        model.to("cpu")
        write_json(file, {name: list(positions) for name, positions in kept.items()})
        return kept


# --------------------------------------------------------------------------------------------------------- dynamic: FBS


@runs.register
@dataclass(frozen=True)
class FBSGatesRun(_Point):
    """FBS's first stage: the gates alone, with the new classifier, at density 1.

    Attributes:
        source: the plain network to start from; FBS has no source stage of its own.
        data: the target data set; its seed draws the fitting images.
        regulariser: and its strength.
        optimisation: of the stage; its steps are taken from those of the unpruned stage.
        gate_bias: what every gate starts at; None for the trained scales; see `selection.boosted`.
        gate_l1: strength of the optional L1 term on the gates.
        seed: of the classifier's initialisation, data order and augmentation.
        use_test: whether the chain reads the test set.
    """

    source: ExtendedSourceRun
    data: DataSource
    regulariser: Regulariser
    optimisation: Optimisation
    gate_bias: float | None = 1.0
    gate_l1: float = 0.0
    seed: int = 0
    use_test: bool = True

    parent = None
    times = "1x"

    def __post_init__(self) -> None:
        if self.gate_bias is not None and not _share(self.gate_bias):
            raise AFDSError(f"gate_bias must be a number above 0 or None, got {self.gate_bias!r}")
        if not _share(self.gate_l1, above=False):
            raise AFDSError(f"gate_l1 must be a number of at least 0, got {self.gate_l1!r}")

    @property
    def penalties(self) -> tuple[Term, ...]:
        return (GateL1(self.gate_l1),) if self.gate_l1 else ()

    @diverges
    def execute(self, run: runs.Run) -> dict[str, Any]:
        splits, settings = data.sealed(self.splits()), self.optimisation
        size, source = _input_size(splits), _plain(self.source, run)
        model = _with_classifier(boosted(source, bias=self.gate_bias), splits, self.seed)
        torch.manual_seed(self.seed)
        objective = self.objective(run, model, self._reference(source), settings, size, penalties=self.penalties)
        model.to(training.device())
        objective.place(training.device())
        attention_steps = self.prepare(run, objective, splits, settings)
        gates_alone(model, objective.classifier(model), True)
        training.fit(
            model, splits.train, objective, settings, run, seed=self.seed, monitor=splits.statistics,
            label=f"{self.regulariser.name} fbs seed {self.seed} gates",
        )  # fmt: skip
        _save(run, model, objective)
        return {
            "steps": settings.steps + attention_steps,
            "training_macs": _training_macs(model, size, settings, _forwards(self.regulariser)),
        }

    def _reference(self, source: nn.Module) -> nn.Module:
        """The source with the same gates, at their trained scales: the same function, and parameters by name."""
        return boosted(source, bias=None)


@runs.register
@dataclass(frozen=True)
class FBSRun(_Point):
    """One point of FBS: everything is tuned, and below 1 the density is lowered gradually to the budget.

    Attributes:
        gates: the stage before, with source, data, regulariser and seed of the chain.
        optimisation: of the unpruned stage, less the steps of the gates alone.
        tuning: of each later stage.
        budgets: shares of the dense network's MACs, decreasing from 1.
        lowerings: in how many steps, over the first half of a stage, the density goes down.
        trim: share of a stage after which the density is set to the budget once more.
        macs_images: training images on which a budget is met.
    """

    gates: FBSGatesRun
    optimisation: Optimisation
    tuning: Optimisation
    budgets: tuple[float, ...] = (1.0,)
    lowerings: int = 4
    trim: float = 0.8
    macs_images: int = 256

    def __post_init__(self) -> None:
        if self.budgets[:1] != (1.0,):
            raise AFDSError(f"budgets must decrease from 1 and stay above 0, got {self.budgets!r}")
        if self.budgets[1:]:
            _check_tail(self.budgets[1:])
        if not (isinstance(self.lowerings, int) and self.lowerings >= 1):
            raise AFDSError(f"lowerings must be a whole number of at least 1, got {self.lowerings!r}")

    @property
    def source(self) -> ExtendedSourceRun:  # type: ignore[override]
        return self.gates.source

    @property
    def data(self) -> DataSource:  # type: ignore[override]
        return self.gates.data

    @property
    def regulariser(self) -> Regulariser:  # type: ignore[override]
        return self.gates.regulariser

    @property
    def seed(self) -> int:  # type: ignore[override]
        return self.gates.seed

    @property
    def use_test(self) -> bool:  # type: ignore[override]
        return self.gates.use_test

    @property
    def parent(self) -> FBSRun | FBSGatesRun:
        """The point before, whose network this one starts from."""
        return replace(self, budgets=self.budgets[:-1]) if len(self.budgets) > 1 else self.gates

    @property
    def times(self) -> str:
        return f"{1 / self.budgets[-1]:g}x"

    @diverges
    def execute(self, run: runs.Run) -> dict[str, Any]:
        splits, budget = self.splits(), self.budgets[-1]
        settings = self.optimisation if budget == 1 else self.tuning
        size, source = _input_size(splits), _plain(self.source, run)
        before = runs.get_or_run(self.parent, store=run.store, needs=(MODEL, OBJECTIVE))
        model = afs.load(before.artifact(MODEL))
        torch.manual_seed(self.seed)
        reference = self.gates._reference(source)
        objective = self.objective(run, model, reference, settings, size, penalties=self.gates.penalties)
        objective.load_state_dict(load_file(before.artifact(OBJECTIVE)))
        model.to(training.device())
        objective.place(training.device())
        gates_alone(model, objective.classifier(model), False)
        dense = macs.count(model, size).total
        subset = training.first(splits.statistics, self.macs_images)

        def lower(share: float) -> Callable[[], dict[str, float]]:
            def event() -> dict[str, float]:
                with training.autocast(next(model.parameters()).device, settings.precision):
                    reached = lower_density(model, share, data.loader(subset, 128), dense)
                return {"mask_macs": reached, "density": next(iter(afs.layers(model).values())).density}

            return event

        events = {}
        if budget < 1:
            start = self.budgets[-2]
            for index in range(self.lowerings):
                share = start * (budget / start) ** ((index + 1) / self.lowerings)
                events[index * settings.steps // (2 * self.lowerings)] = lower(share)
            events[int(settings.steps * self.trim)] = lower(budget)
        training.fit(
            model, splits.train, objective, settings, run, seed=self.seed, monitor=splits.statistics, events=events,
            label=f"{self.regulariser.name} fbs seed {self.seed} at {self.times}",
        )  # fmt: skip
        if budget < 1:
            lower(ROOM * budget)()
        metrics = _measure(model, splits, settings, dense, budget, images=self.macs_images, use_test=self.use_test)
        metrics |= _gate_metrics(model, splits, settings)
        _save(run, model, objective)
        return metrics | {
            "density": next(iter(afs.layers(model).values())).density,
            "steps": settings.steps,
            "training_macs": _training_macs(model, size, settings, _forwards(self.regulariser)),
        }


# ---------------------------------------------------------------------------------------------------- narrower networks


@runs.register
@dataclass(frozen=True)
class NarrowRun(_Point):
    """A narrower network, trained on the source at its width and then on the target, with or without distillation.

    It takes as many target steps as a chain down to its budget takes in all.

    Attributes:
        source: the narrow network trained on the source data; also the reference of the regulariser.
        data: the target data set; its seed draws the fitting images.
        regulariser: and its strength.
        optimisation: of the only stage.
        full: the dense network, of whose MACs the budget is a share.
        budget: for the record; the width decides the MACs.
        teacher: the tuned dense target network to distil; None for plain training.
        temperature: T of the distillation.
        alpha: share of its soft term.
        macs_images: training images whose accuracy and MACs are reported, as in `TransferRun`.
        seed: of the classifier's initialisation, data order and augmentation.
        use_test: whether the test set is read at the end; trials that choose something must not.
    """

    source: ExtendedSourceRun
    data: DataSource
    regulariser: Regulariser
    optimisation: Optimisation
    full: Network
    budget: float
    teacher: DenseRun | None = None
    temperature: float = 4.0
    alpha: float = 0.9
    macs_images: int = 256
    seed: int = 0
    use_test: bool = True

    def __post_init__(self) -> None:
        if not (_share(self.budget) and self.budget <= 1):
            raise AFDSError(f"budget must be a share in (0, 1], got {self.budget!r}")
        if not _share(self.temperature):
            raise AFDSError(f"temperature must be a number above 0, got {self.temperature!r}")
        if not (_share(self.alpha, above=False) and self.alpha <= 1):
            raise AFDSError(f"alpha must be a share in [0, 1], got {self.alpha!r}")

    @property
    def parent(self) -> DenseRun | None:
        """The teacher, if there is one: without its result there is none here."""
        return self.teacher

    @property
    def budgets(self) -> tuple[float, ...]:
        return (self.budget,)

    @property
    def times(self) -> str:
        return f"{1 / self.budget:g}x"

    @diverges
    def execute(self, run: runs.Run) -> dict[str, Any]:
        splits, settings = self.splits(), self.optimisation
        size, source = _input_size(splits), _plain(self.source, run)
        model = _with_classifier(_plain(self.source, run), splits, self.seed)
        dense = network_macs(self.full.name, self.full.stem, self.full.width, len(splits.classes), size)
        penalties: list[Term] = []
        if self.teacher is not None:
            tuned = afs.load(runs.get_or_run(self.teacher, store=run.store, needs=(MODEL,)).artifact(MODEL))
            penalties.append(Distil(self.temperature, self.alpha, Teacher(tuned)))
        torch.manual_seed(self.seed)
        objective = self.objective(run, model, source, settings, size, penalties=penalties)
        model.to(training.device())
        objective.place(training.device())
        attention_steps = self.prepare(run, objective, splits, settings)
        training.fit(
            model, splits.train, objective, settings, run, seed=self.seed,
            label=f"{self.regulariser.name} narrow seed {self.seed} at {self.times}",
        )  # fmt: skip
        metrics = _measure(model, splits, settings, dense, self.budget, images=self.macs_images, use_test=self.use_test)
        _save(run, model, objective)
        channels = sum(group.width for group in groups(model, size))
        own = macs.count(model, size).total
        forwards = _forwards(self.regulariser) + (dense / own if self.teacher is not None else 0)
        return metrics | {
            "density": 1.0,
            "removed": 0,
            "static": channels,
            "dynamic": 0,
            "steps": settings.steps + attention_steps,
            "training_macs": _training_macs(model, size, settings, forwards),
        }
