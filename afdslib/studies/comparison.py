"""Every competitor on the same curve: the runs of the comparison, tuned alike, and their tidy tables.

Regularisers are tuned on the dense network; selections at the trial budget, with L2 at its best; then each pair's
strength once more at the primary budget. All of it on validation images. Then the sweep: the first seeds for every
method, the rest of the seeds for AFDS and for the competitors that are best on validation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from afdslib import runs
from afdslib.base import paths
from afdslib.base.atomic import write_json
from afdslib.base.errors import AFDSError, UnreachableError
from afdslib.experiments import (
    AFSSourceRun,
    DataSource,
    DenseRun,
    ExtendedSourceRun,
    FBSGatesRun,
    FBSRun,
    NarrowRun,
    PrunedRun,
    Selection,
    SourceRun,
    TransferRun,
    weights_run,
)
from afdslib.losses.term import Value
from afdslib.pruning import CRITERIA, fitting_width
from afdslib.runs import MODEL
from afdslib.runs.networks import keep_networks
from afdslib.studies import collapse, profiles, settling, statistics
from afdslib.studies.keeper import Keeper
from afdslib.studies.profiles import Profile
from afdslib.studies.protocol import RECALLED, Method, Protocol, protocol, regulariser_space, selection_space
from afdslib.studies.tuning import Outcome, Trial, search
from afdslib.studies.workers import alongside, compute
from afdslib.training import Optimisation
from afdslib.training.objective import Regulariser

__all__ = ["COLUMNS", "Comparison", "Tuned", "run_comparison"]

Point = DenseRun | PrunedRun | FBSRun | NarrowRun | TransferRun
Settings = Mapping[str, Value]

COLUMNS = [
    "target", "method", "role", "regulariser", "selection", "strength", "seed", "budget", "density", "test_accuracy",
    "test_mean_class_accuracy", "validation_accuracy", "train_accuracy", "macs", "macs_predictors", "train_macs",
    "met", "dense_macs", "parameters", "removed", "static", "dynamic", "dead_gates", "gate_variance", "steps",
    "training_macs", "source_macs", "seconds", "source_seconds", "settings", "run",
]  # fmt: skip
TIMES = ["seconds", "source_seconds"]
"""Of wall-clock: kept beside the table, which is the same at each run."""
WHOLE = "both (AFDS)"
"""The name of AFDS itself among the ablations."""
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "kept channels in multiples of 8": {"multiple": 8},
    "kept channels in multiples of 16": {"multiple": 16},
    "residual streams narrow as a whole": {"stream": "coupled"},
}
"""Ablations for kernels' sake, which are made at the trials' budget, too."""
MISSING = ["target", "method", "role", "seed", "budget", "reason"]


@dataclass(frozen=True)
class Tuned:
    """A method with its settings.

    Attributes:
        method: the pair.
        regulariser: settings by name: strength, lr.
        selection: settings by name.
    """

    method: Method
    regulariser: Settings
    selection: Settings

    @property
    def strength(self) -> float:
        return float(self.regulariser["strength"])  # type: ignore[arg-type]


class Comparison(Keeper[Profile]):
    """All runs of a profile's comparison on one target.

    Args:
        profile: from `profiles.get`: data sets, network, steps.
        rules: default: those of the profile.
        target: default: the profile's first.
        complete: False never trains: the tables then hold the seeds that are finished for every method.
    """

    def __init__(
        self,
        profile: Profile,
        rules: Protocol | None = None,
        target: DataSource | None = None,
        *,
        complete: bool = True,
    ):
        self.profile, self.complete = profile, complete
        self.rules = rules or protocol(profile)
        self.target = target or profile.targets[0]
        if profile.trial_seed in self.rules.seeds:
            raise AFDSError(f"the trials' seed {profile.trial_seed} is among those of the comparison; take another")

    @property
    def command(self) -> str:
        """What computes it, or goes on with it."""
        return f"afds compare --profile {self.profile.name} --budget {self.profile.budget}"

    @functools.cached_property
    def original(self) -> Comparison | None:
        """The comparison whose settings and rivals this one takes, if any; see `Protocol.settings_of`."""
        if not self.rules.settings_of:
            return None
        p = self.profile
        return Comparison(profiles.get(self.rules.settings_of, p.budget, p.source.root or None), complete=self.complete)

    @functools.cached_property
    def methods(self) -> tuple[Method, ...]:
        """The pairs that are compared.

        Raises:
            AFDSError: the comparison that names the rivals is not finished.
        """
        rules, original = self.rules, self.original
        if original is None:
            return rules.methods
        if not original.finished:
            raise AFDSError(
                f"this comparison takes its settings and rivals from that of {original.profile.name}, which is not "
                f"finished; finish it first: {original.command}"
            )
        table, first = pd.read_csv(original.folder() / "comparison.csv"), original.rules.seeds[: original.rules.rest]
        ranked = statistics.rank_on_validation(table, budget=rules.primary_budget, seeds=first)
        return (Method("afd", "afs"), *map(Method.parse, ranked[: rules.rivals]))

    @property
    def finished(self) -> bool:
        """Whether its tables hold every method at the first seeds and AFDS at all, or say why a point is missing."""
        files = [self.folder() / f"{name}.csv" for name in ("comparison", "missing")]
        if not all(file.is_file() for file in files):
            return False
        there = {(str(r.method), int(r.seed)) for file in files for r in pd.read_csv(file).itertuples()}
        first = {(method.key, seed) for method in self.methods for seed in self.rules.seeds[: self.rules.rest]}
        return there >= first | {(m.key, seed) for m in self.methods if m.role == "afds" for seed in self.rules.seeds}

    # ------------------------------------------------------------------------------------------------------ sources

    @property
    def source(self) -> SourceRun:
        """The plain source network."""
        p = self.profile
        return SourceRun(p.source, p.network, p.source_training, p.source_weight_decay)

    @property
    def afs_source(self) -> AFSSourceRun:
        """The converted source, fine-tuned so that its predictors learn."""
        p = self.profile
        return AFSSourceRun(self.source, p.source, p.afs_training, p.gates)

    def extended(self, budget: float | None = None, *, steps: bool = True) -> ExtendedSourceRun:
        """The competitors' start: as many more source steps as AFS got, at full width or at a budget's.

        Args:
            budget: share of MACs of a narrower network; None for the full one.
            steps: False for the unextended start, an ablation.
        """
        p, source = self.profile, self.source
        if budget is not None:
            if p.network.weights is not None:
                raise UnreachableError(
                    "published weights exist at one width only; give the profile a source training to pretrain "
                    "narrower networks"
                )
            classes, size = self._shape
            width = fitting_width(p.network.name, p.network.stem, p.network.width, classes, size, budget)
            source = replace(source, network=replace(p.network, width=width))
        training = p.afs_training if steps else replace(p.afs_training, steps=0)
        return ExtendedSourceRun(source, p.source, training)

    @functools.cached_property
    def _shape(self) -> tuple[int, tuple[int, int, int]]:
        splits = self.target.load()
        return len(splits.classes), (3, splits.test.size, splits.test.size)

    # ------------------------------------------------------------------------------------------------------- points

    def regulariser(self, name: str, settings: Settings) -> Regulariser:
        """With its strength."""
        decay = self.profile.candidates[-1].regulariser.classifier_decay
        base, _, variant = name.partition("-detached")
        made = Regulariser(base if name.endswith("-detached") else name, float(settings["strength"]), decay)  # type: ignore[arg-type]
        return replace(made, attention="detached") if name.endswith("-detached") else made

    def _stage(self, settings: Optimisation, factor: Value, **changes: Any) -> Optimisation:
        """A stage with its learning rate scaled, and a row, after which it can be resumed, about every epoch."""
        steps = changes.get("steps", settings.steps)
        rows = max(1, math.ceil(steps / self.rules.epoch_steps))
        return replace(settings, lr=settings.lr * float(factor or 1.0), log_rows=rows, **changes)

    def dense(
        self, name: str, settings: Settings, seed: int, *, trial: bool = False, scale_l1: float = 0.0
    ) -> DenseRun:
        """The unpruned network with a regulariser."""
        p = self.profile
        first = p.trial if trial else p.transfer
        return DenseRun(
            source=self.extended(),
            data=replace(self.target, seed=seed),
            regulariser=self.regulariser(name, settings),
            optimisation=self._stage(first, settings["lr"], steps=max(2, round(first.steps * self.rules.steps))),
            scale_l1=scale_l1,
            macs_images=p.macs_images,
            seed=seed,
            use_test=not trial,
        )

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
            AFDSError: an unknown combination, or a budget that no width reaches.
        """
        p, budgets = self.profile, tuple(budgets)
        selection, chosen = tuned.method.selection, tuned.selection
        first, factor = p.trial if trial else p.transfer, factor * self.rules.steps
        unpruned = self._stage(first, tuned.regulariser["lr"], steps=max(2, round(first.steps * factor)))
        tuning = self._stage(p.tuning, chosen["lr"], steps=max(2, round(p.tuning.steps * factor)))
        regulariser = self.regulariser(tuned.method.regulariser, tuned.regulariser)
        data = replace(self.target, seed=seed)
        if selection in ("afs", "fbs"):
            faster = float(chosen["predictor_lr"])  # type: ignore[arg-type]
            unpruned, tuning = (replace(o, predictor_lr=o.predictor_lr * faster) for o in (unpruned, tuning))
        if selection == "afs":
            return TransferRun(
                self.afs_source, data, regulariser, unpruned, tuning, budgets, float(chosen["delta_s"]),  # type: ignore[arg-type]
                density_exponent=float(chosen["density_exponent"]), density_floor=p.density_floor,  # type: ignore[arg-type]
                macs_images=p.macs_images, seed=seed, use_test=not trial, settle=True,
                first=self.rules.first_update, freeze_first=False,
            )  # fmt: skip
        if selection == "fbs":
            alone = round(self.rules.gates_alone * unpruned.steps)
            gates = FBSGatesRun(
                self.extended(), data, regulariser, self._stage(unpruned, 1.0, steps=alone),
                chosen["gate_bias"], float(chosen["gate_l1"]), seed, not trial,  # type: ignore[arg-type]
            )  # fmt: skip
            rest = self._stage(unpruned, 1.0, steps=unpruned.steps - alone)
            return FBSRun(gates, rest, tuning, budgets, macs_images=p.macs_images)
        scale_l1 = float(chosen.get("scale_l1", 0.0))  # type: ignore[arg-type]
        dense = replace(
            self.dense(tuned.method.regulariser, tuned.regulariser, seed, trial=trial, scale_l1=scale_l1),
            optimisation=unpruned,
        )
        if len(budgets) == 1:
            return dense
        if selection in CRITERIA:
            criterion = Selection(selection, str(chosen.get("normalise", "none")), mixed=selection == "taylor")
            return PrunedRun(dense, criterion, tuning, budgets[1:])
        steps = unpruned.steps + (len(budgets) - 1) * tuning.steps
        distil = selection == "width-kd"
        return NarrowRun(
            source=self.extended(budgets[-1]),
            data=data,
            regulariser=regulariser,
            optimisation=self._stage(first, chosen["lr"], steps=steps),
            full=p.network,
            budget=budgets[-1],
            teacher=dense if distil else None,
            temperature=float(chosen.get("temperature", 4.0)),  # type: ignore[arg-type]
            alpha=float(chosen.get("alpha", 0.9)),  # type: ignore[arg-type]
            macs_images=p.macs_images,
            seed=seed,
            use_test=not trial,
        )

    def networks(self) -> None:
        """Trains the source networks that the points start from before the trials, so that workers share them.

        Those of a committed profile are kept in data/weights/, with a card: the study can go on elsewhere.
        """
        if not self.complete:
            return
        p = self.profile
        made: list[tuple[str, Any]] = [("AFS source", self.afs_source), ("source, trained on", self.extended())]
        for budget in self._widths(self.methods):
            with contextlib.suppress(UnreachableError):  # no such width: its points are missing and say why
                made.append((f"source of {1 / budget:g}x, trained on", self.extended(budget)))
        self._compute([config for _, config in made])
        if p.committed:
            found = [(name, runs.lookup(config, needs=(MODEL,))) for name, config in made]
            keep_networks([(name, result) for name, result in found if result is not None], p.name)

    def _widths(self, methods: Sequence[Method]) -> list[float]:
        """Budgets that narrower networks are trained for, if one is among the methods."""
        r = self.rules
        narrow = any("width" in m.selection for m in methods)
        return sorted({r.trial_budget, r.primary_budget, *r.budgets[1:]}, reverse=True) if narrow else []

    # ------------------------------------------------------------------------------------------------------- trials

    def _compute(self, configs: Sequence[Any]) -> list[runs.Result]:
        if not self.complete and (missing := [config for config in configs if runs.lookup(config) is None]):
            raise AFDSError(
                f"{len(missing)} of {len(configs)} runs that the tables need are not finished; "
                f"go on with: {self.command}"
            )
        return compute(configs, self._publish)

    def journal(self) -> Path:
        """The folder of the trials' journal: in the run store, which the workers share."""
        return paths.runs() / "trials" / f"{self.profile.name}-{self.profile.budget}-{self.target.title}"

    def _outcome(self, config: Point) -> Outcome:
        """A trial's result, computed if need be; a trial that read a test image is a fault of the program."""
        if config.use_test:
            raise RuntimeError("a trial must hold no test image")
        (result,) = self._compute([config])
        if any(key.startswith("test") or key == "confusion" for key in result.metrics):
            raise RuntimeError(f"the trial {result.id} holds test results")
        if "diverged" in result.metrics:
            return Outcome(None, result.id, result.metrics["diverged"])
        return Outcome(float(result.metrics["validation_accuracy"]), result.id)

    def _try(self, make: Callable[[], Point]) -> Outcome:
        """The outcome of a point that may be out of reach."""
        try:
            config = make()
        except UnreachableError as error:
            return Outcome(None, "", str(error))
        return self._outcome(config)

    def regulariser_trials(self, name: str, *, wait: bool = True) -> list[Trial]:
        """A regulariser on the dense network, at the quasi-random settings."""
        seed, space = self.profile.trial_seed, regulariser_space(_space(name))

        def evaluate(settings: Settings) -> Outcome:
            return self._try(lambda: self.dense(name, settings, seed, trial=True))

        return search(self.journal(), f"regulariser {name}", space, self.rules.trials, evaluate, seed=seed, wait=wait)

    def selection_trials(self, name: str, *, wait: bool = True) -> list[Trial]:
        """A selection at the trial budget, with L2 at its best."""
        seed, space = self.profile.trial_seed, selection_space(name, self.profile)

        def evaluate(settings: Settings) -> Outcome:
            return self._try(lambda: self._selection_trial(name, settings))

        return search(self.journal(), f"selection {name}", space, self.rules.trials, evaluate, seed=seed, wait=wait)

    def _selection_trial(self, name: str, settings: Settings) -> Point:
        """A selection at the trial budget, with L2 at its best."""
        tuned = Tuned(Method("l2", name), self.best_regulariser("l2"), settings)
        return self.point(tuned, self.profile.trial_seed, (1.0, self.rules.trial_budget), trial=True)

    @functools.cache  # noqa: B019 (a comparison lives as long as its process)
    def best_regulariser(self, name: str) -> Settings:
        """Its settings of highest validation accuracy; the defaults first in a tie."""
        return _best(f"regulariser {name}", self.regulariser_trials(name))

    @functools.cache  # noqa: B019
    def best_selection(self, name: str) -> Settings:
        """Its settings of highest validation accuracy; the defaults first in a tie."""
        return _best(f"selection {name}", self.selection_trials(name))

    def why_not(self, method: Method) -> str:
        """Why a method cannot be tuned, because none of its trials has a value; empty where it can."""
        if self.original is not None:
            return self.original.why_not(method)
        try:
            self.best_regulariser(method.regulariser), self.best_selection(method.selection)
        except UnreachableError as error:
            return str(error)
        return ""

    def _recalled(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Rows of AFS's trials with the recalled schedule, as far as they were made: the first ones, later replaced."""
        rows = []
        for trial in trials:
            now = self._selection_trial("afs", trial.settings)
            assert isinstance(now, TransferRun)
            before = replace(now, first=0.5, freeze_first=True)
            if runs.lookup(before) is not None:
                rows.append(_trial_row(RECALLED, "afs", trial.number, trial.settings, self._outcome(before)))
        return rows

    def strength_trials(self, method: Method) -> list[tuple[float, Outcome]]:
        """A pair's strength once more, at the primary budget: (multiplier, outcome)."""
        return [(multiplier, self._try(make)) for multiplier, make in self._strengths(method)]

    def _strengths(self, method: Method) -> list[tuple[float, functools.partial[Point]]]:
        tuned = Tuned(method, self.best_regulariser(method.regulariser), self.best_selection(method.selection))
        chain, seed = self.rules.trial_chain, self.profile.trial_seed
        made = []
        for multiplier in self.rules.multipliers:
            one = replace(tuned, regulariser={**tuned.regulariser, "strength": tuned.strength * multiplier})
            made.append((multiplier, functools.partial(self.point, one, seed, chain, trial=True)))
        return made

    @functools.cache  # noqa: B019
    def tuned(self, method: Method) -> Tuned:
        """A method at the settings that its trials chose; the smallest change wins a tie of the strengths."""
        if self.original is not None:
            return self.original.tuned(method)
        outcomes = [(m, o.value) for m, o in self.strength_trials(method) if o.value is not None]
        multiplier = max(outcomes, key=lambda pair: pair[1])[0] if outcomes else 1.0
        regulariser = dict(self.best_regulariser(method.regulariser))
        regulariser["strength"] = float(regulariser["strength"]) * multiplier  # type: ignore[arg-type]
        return Tuned(method, regulariser, self.best_selection(method.selection))

    def trials(self) -> pd.DataFrame:
        """Every trial: what was tried, its validation accuracy or why it has none; also written to trials.csv."""
        self.networks()
        if self.original is not None:
            table = pd.read_csv(self.original.folder() / "trials.csv")
            self._write("trials", table)
            return table
        regularisers = dict.fromkeys(("l2", *(m.regulariser for m in self.methods)))
        selections = dict.fromkeys(m.selection for m in self.methods)
        # First whatever is free, of all methods, so that many workers find something to do; then the results.
        for name in regularisers:
            self.regulariser_trials(name, wait=False)
        for name in selections:
            self.selection_trials(name, wait=False)
        rows: list[dict[str, Any]] = []
        for name in regularisers:
            found = self.regulariser_trials(name)
            rows += [_trial_row("regulariser", name, t.number, t.settings, t.outcome) for t in found]
        for name in selections:
            found = self.selection_trials(name)
            rows += [_trial_row("selection", name, t.number, t.settings, t.outcome) for t in found]
            rows += self._recalled(found) if name == "afs" else []
        methods = [method for method in self.methods if not self.why_not(method)]
        # The same multiplier of all pairs, then the next: pairs share the unpruned stage.
        columns = zip(*map(self._strengths, methods), strict=True)
        self._compute([c for column in columns for _, make in column if (c := _made(make)) is not None])
        for method in methods:
            best = float(self.best_regulariser(method.regulariser)["strength"])  # type: ignore[arg-type]
            for number, (multiplier, outcome) in enumerate(self.strength_trials(method)):
                rows.append(_trial_row("strength", method.key, number, {"strength": best * multiplier}, outcome))
        table = pd.DataFrame(
            rows, columns=["stage", "name", "trial", "settings", "validation_accuracy", "reason", "run"]
        )
        self._write("trials", table)
        return table

    # -------------------------------------------------------------------------------------------------------- sweep

    def sweep(self) -> pd.DataFrame:
        """One row per method, seed and budget; written to comparison.csv, and what is missing to missing.csv.

        The first seeds of all methods come first; validation then says who gets the rest.
        """
        rules = self.rules
        reasons = {method: self.why_not(method) for method in self.methods}
        methods = [method for method, reason in reasons.items() if not reason]
        first = self._seeds(methods, rules.seeds[: rules.rest])
        if not first:
            raise AFDSError(f"no seed of the comparison of {self.profile.name} is finished for every method yet")
        table = self._points(dict.fromkeys(methods, first))
        try:
            ranked = statistics.rank_on_validation(table, budget=rules.primary_budget, seeds=first)
        except AFDSError:  # nobody reached it
            ranked = []
        best = [m for m in methods if m.role == "afds" or m.key in ranked[: rules.rivals]]
        every = [*first, *self._seeds(best, rules.seeds[rules.rest :])]
        table = self._points({m: every if m in best else first for m in methods})
        table.attrs["missing"] += [
            {"target": self.target.title, "method": m.key, "role": m.role, "seed": seed, "budget": b, "reason": reason}
            for m, reason in reasons.items()
            if reason
            for seed in first
            for b in rules.budgets
        ]
        self._write("comparison", table.drop(columns=TIMES))
        self._write("times", table[["method", "seed", "budget", *TIMES, "run"]])
        self._write("missing", pd.DataFrame(table.attrs["missing"], columns=MISSING))
        return table

    def _seeds(self, methods: Sequence[Method], seeds: Sequence[int]) -> list[int]:
        """Those to compare: all, or without training those that are finished for every method."""
        if self.complete:
            return list(seeds)

        def finished(method: Method, seed: int) -> bool:
            made = (_made(functools.partial(self.point, *wanted)) for wanted in self._wanted(method, seed))
            return all(config is None or runs.lookup(config) is not None for config in made)

        return [seed for seed in seeds if all(finished(method, seed) for method in methods)]

    def _wanted(self, method: Method, seed: int) -> list[tuple[Tuned, int, tuple[float, ...]]]:
        """The points of one chain, as `point` takes them."""
        rules, budgets = self.rules, self.rules.budgets
        wanted = [(self.tuned(method), seed, budgets[: i + 1]) for i in range(len(budgets))]
        if method.selection.startswith("width") and not rules.narrow_between:
            return [one for one in wanted if one[-1][-1] in (1.0, rules.primary_budget)]
        return wanted

    def _points(self, seeds: Mapping[Method, Sequence[int]]) -> pd.DataFrame:
        return self.table([wanted for m, mine in seeds.items() for seed in mine for wanted in self._wanted(m, seed)])

    def table(self, wanted: Sequence[tuple[Tuned, int, tuple[float, ...]]], *, factor: float = 1.0) -> pd.DataFrame:
        """Rows of some points, computed if need be; `attrs["missing"]` holds those that have none, with why."""
        made: list[Point | str] = []
        for tuned, seed, budgets in wanted:
            try:
                made.append(self.point(tuned, seed, budgets, factor=factor))
            except UnreachableError as error:
                made.append(str(error))
        # Seed by seed, so that what is finished of an interrupted study compares all methods.
        order = sorted((i for i, c in enumerate(made) if not isinstance(c, str)), key=lambda i: wanted[i][1])
        results = dict(zip(order, self._compute([made[i] for i in order]), strict=True))
        rows, missing = [], []
        for i, ((tuned, seed, budgets), config) in enumerate(zip(wanted, made, strict=True)):
            row = self._row(tuned, seed, budgets[-1])
            if isinstance(config, str):
                missing.append(row | {"reason": config})
                continue
            result = results[i]
            if "diverged" in result.metrics:
                missing.append(row | {"reason": result.metrics["diverged"]})
            else:
                rows.append(result.metrics | row | self._costs(config, result))
        table = pd.DataFrame(rows, columns=COLUMNS)
        table.attrs["missing"] = missing
        return table

    def _row(self, tuned: Tuned, seed: int, budget: float) -> dict[str, Any]:
        method = tuned.method
        return {
            "target": self.target.title,
            "method": method.key,
            "role": method.role,
            "regulariser": method.regulariser,
            "selection": method.selection,
            "strength": tuned.strength,
            "seed": seed,
            "budget": budget,
            "settings": json.dumps(
                {**tuned.regulariser, **{f"{k} ({method.selection})": v for k, v in tuned.selection.items()}}
            ),
        }

    def _costs(self, config: Point, result: runs.Result) -> dict[str, Any]:
        """Of the whole chain on the target, and of its source network: training MACs and wall-clock seconds."""
        chain, source = _chain(config), _chain(config.source)
        if (teacher := getattr(config, "teacher", None)) is not None:
            source += _chain(teacher.source)
        if (weighing := weights_run(config.regulariser, config.source, config.data)) is not None:
            chain.append(weighing)
        share = result.metrics["train_macs"] / result.metrics["budget"]
        return {
            "run": result.id,
            "training_macs": _total(chain, lambda r: r.metrics.get("training_macs")),
            "seconds": _total(chain, runs.seconds),
            "source_macs": _total(source, lambda r: r.metrics.get("training_macs", 0.0)),
            "source_seconds": _total(source, runs.seconds),
            # The unpruned network is at its true cost, predictors included.
            "met": result.metrics["budget"] == 1 or 0.98 <= share <= 1 + 1e-6,
        }

    def equal_time(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rival once more with as much wall-clock time on the target as AFDS takes, at the primary budget.

        Its steps are scaled by the ratio of the measured times, rounded to tenths; the ratio is kept in equal_time.json
        so that an interrupted study goes on with the same one.
        """
        rules = self.rules
        seeds = rules.seeds[: rules.rest]
        rows = table[(table.budget == rules.primary_budget) & table.seed.isin(list(seeds))]
        name = statistics.rival(table, budget=rules.primary_budget, seeds=seeds)
        file = self.folder() / "equal_time.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if kept.get("rival") == name:
            ratio = kept["ratio"]
        else:
            ours, theirs = (rows[rows.method == m].seconds.mean() for m in ("afd+afs", name))
            if not (ours > 0 and theirs > 0):
                raise AFDSError(
                    "the wall-clock times of AFDS or of its rival are not known; recompute them on one machine"
                )
            ratio = max(0.1, round(ours / theirs, 1))
            write_json(file, {"rival": name, "ratio": ratio, "seconds": {"afd+afs": ours, name: theirs}})
        tuned = self.tuned(Method.parse(name))
        chain = rules.budgets[: rules.budgets.index(rules.primary_budget) + 1]
        again = self.table([(tuned, seed, chain) for seed in seeds], factor=ratio)
        again["steps_factor"] = ratio
        self._write("equal_time", again.drop(columns=TIMES))
        return again

    def ablations(self, table: pd.DataFrame) -> pd.DataFrame:
        """AFDS with one part changed, and its rival from the unextended source, at the primary budget; shapes that
        suit kernels also at the trials' budget; unpruned, AFD without AFS and AFDS trained as long as to the primary
        budget. Over the first seeds; written to ablations.csv. Without training, those that are finished.

        Args:
            table: of `sweep`, from which the rival is known.
        """
        rules, tuned = self.rules, self.tuned(Method("afd", "afs"))
        seeds, chain = rules.seeds[: rules.rest], rules.budgets[: rules.budgets.index(rules.primary_budget) + 1]
        rival = self.tuned(Method.parse(statistics.rival(table, budget=rules.primary_budget, seeds=seeds)))
        none = replace(self.profile.afs_training, steps=0)
        changed: dict[str, Callable[[Any], Any]] = {
            "AFS without AFD": lambda c: replace(c, regulariser=self.regulariser("l2", self.best_regulariser("l2"))),
            "uniform attention": lambda c: replace(c, regulariser=self.regulariser("feature-map", tuned.regulariser)),
            "static only": lambda c: replace(c, delta_s=math.inf),
            "dynamic only": lambda c: replace(c, delta_s=0.0),
            "masks first updated at half a stage": lambda c: replace(c, first=0.5, freeze_first=True),
            "without the source stage": lambda c: replace(c, source=replace(c.source, optimisation=none)),
            "random predictors": lambda c: replace(c, source=replace(c.source, predictors="random")),
            "features of the last ConvBN": lambda c: replace(c, regulariser=replace(c.regulariser, features="convbn")),
            "detached attention": lambda c: replace(c, regulariser=replace(c.regulariser, attention="detached")),
            **{name: functools.partial(replace, **fields) for name, fields in SHAPES.items()},
            WHOLE: lambda c: c,
        }
        planned: list[tuple[str, float, int, Any]] = [
            (name, chain[-1], seed, change(self.point(tuned, seed, chain)))
            for name, change in changed.items()
            for seed in seeds
        ]
        if rules.trial_budget in chain[:-1]:
            # A small network has few layers that are wide enough for multiples at the primary budget.
            earlier = chain[: chain.index(rules.trial_budget) + 1]
            planned += [
                (name, rules.trial_budget, seed, changed[name](self.point(tuned, seed, earlier)))
                for name in (*SHAPES, WHOLE)
                for seed in seeds
            ]
        for seed in seeds:
            planned.append(("AFD without AFS", 1.0, seed, self.dense("afd", tuned.regulariser, seed)))
            first = self.point(tuned, seed, chain[:1])
            assert isinstance(first, TransferRun)
            steps = first.optimisation.steps + (len(chain) - 1) * first.tuning.steps
            longer = self._stage(first.optimisation, 1.0, steps=steps)
            planned.append(("unpruned, as many steps", 1.0, seed, replace(first, optimisation=longer)))
            unextended = _unextended(self.point(rival, seed, chain))
            planned.append((f"{rival.method.label}, unextended start", chain[-1], seed, unextended))
        if not self.complete:
            planned = [one for one in planned if runs.lookup(one[-1]) is not None]
        results = self._compute([config for *_, config in planned])
        keys = ("test_accuracy", "validation_accuracy", "train_macs", "macs", "dead_gates", "diverged")
        rows = []
        for (name, budget, seed, _), result in zip(planned, results, strict=True):
            found = {key: result.metrics.get(key) for key in keys}
            rows.append({"variant": name, "seed": seed, "budget": budget} | found | {"run": result.id})
        found = pd.DataFrame(rows, columns=["variant", "seed", "budget", *keys, "run"])
        self._write("ablations", found)
        return found

    def attention(self, *, extras: bool = False) -> pd.DataFrame:
        """How wide the attention is at each finished point, joint and detached; written to attention.csv.

        Args:
            extras: train what is missing of the detached one.
        """
        if extras:
            self._compute([config for _, _, config in collapse.chains(self, "detached")])
        found = collapse.widths(self)
        self._write("attention", found)
        return found

    def settled(self, *, extras: bool = False) -> pd.DataFrame:
        """The finished points of AFDS that meet their budgets by Taylor importance, if any; written to settled.csv.

        Args:
            extras: train those of the first seeds; with detached attention, too, in a comparison that looks at it.
        """
        if extras:
            rules = self.rules
            variants = ("joint", "detached") if rules.settings_of else ("joint",)
            chains = [one for name in variants for one in settling.chains(self, name)]
            wanted = [one for one in chains if one[0] in rules.seeds[: rules.rest]]
            self._compute([config for _, _, config in wanted])
        found = settling.table(self)
        if not found.empty:
            self._write("settled", found)
        return found

    def plan(self) -> str:
        """What the comparison would train, stage by stage: runs and steps. Nothing is trained or looked up."""
        p, r = self.profile, self.rules
        first, trial, later = (max(2, round(o.steps * r.steps)) for o in (p.transfer, p.trial, p.tuning))
        regularisers = len(dict.fromkeys(("l2", *(m.regulariser for m in r.methods))))
        selections = len({m.selection for m in r.methods})
        top = sum(m.role == "afds" for m in r.methods) + min(r.rivals, sum(m.role == "competitor" for m in r.methods))
        count = top if r.settings_of else len(r.methods)
        chains = count * r.rest + top * (len(r.seeds) - r.rest)
        widths = self._widths(r.methods)
        source = p.source_training.steps + p.afs_training.steps
        rows = [
            ("source networks (plain, AFS, extended)", 3, p.source_training.steps + 2 * p.afs_training.steps),
            ("narrower source networks", len(widths), len(widths) * source),
        ]
        if not r.settings_of:
            strengths = len(r.methods) * len(r.multipliers)
            rows += [
                ("trials of regularisers", regularisers * r.trials, regularisers * r.trials * trial),
                ("trials of selections", selections * r.trials, selections * r.trials * (trial + later)),
                ("strengths of pairs", strengths, strengths * (trial + (len(r.trial_chain) - 1) * later)),
            ]
        chain = first + (len(r.budgets) - 1) * later
        rows.append(("chains of the sweep", chains, chains * chain))
        if r.settings_of:
            rows.append(("chains of detached attention, by --extras", len(r.seeds), len(r.seeds) * chain))
        lines = [f"comparison of {p.name}, budget {p.budget}, on {self.target.title}: {count} methods"]
        if r.settings_of:
            lines.append(f"settings and rivals are those of {r.settings_of}; narrower networks only if one is a rival")
        lines += [f"{name:40}{count:>6} runs{steps:>12,} steps" for name, count, steps in rows]
        lines.append(f"{'at most (what is shared counts once)':40}{'':>11}{sum(row[2] for row in rows):>12,} steps")
        return "\n".join(lines)

    # -------------------------------------------------------------------------------------------------------- files

    def folder(self) -> Path:
        """Of the tables: a folder comparison-<target> in the study's."""
        return super().folder() / f"comparison-{self.target.title}"

    def sentence(self) -> str:
        """The report's sentence, from the written table."""
        rules, table = self.rules, pd.read_csv(self.folder() / "comparison.csv")
        try:
            names = {method.key: method.label for method in self.methods}
            first = rules.seeds[: rules.rest]
            return statistics.sentence(table, budget=rules.primary_budget, seeds=first, names=names)
        except AFDSError as error:
            return f"There is no verdict: {error}."

    def write_statistics(self, table: pd.DataFrame) -> str:
        """costs.csv, macs_within.csv and paired.csv, and the report's sentence, which is returned."""
        self._write("macs_within", macs_needed(table))
        self._write("costs", costs(table, self.rules.primary_budget))
        if ((table.budget == self.rules.primary_budget) & (table.method == "afd+afs")).any():
            self._write("paired", statistics.paired_table(table, budget=self.rules.primary_budget))
        return self.sentence()


def costs(table: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Per method what a point at a budget took, mean over seeds: training MACs on the source and on the target."""
    columns = ["source_macs", "training_macs"]
    rows = table[(table.budget - budget).abs() < 1e-9]
    return rows.groupby("method", sort=False)[columns].mean().reset_index()


def macs_needed(table: pd.DataFrame) -> pd.DataFrame:
    """Per method the share of MACs to stay within one point of its own dense network, from the means over seeds."""
    rows = []
    for method, mine in table.groupby("method", sort=False):
        means = mine.groupby("budget")[["macs", "test_accuracy"]].mean()
        curve = {float(b): (float(r.macs), float(r.test_accuracy)) for b, r in means.iterrows()}
        share = statistics.macs_within(curve) if 1.0 in curve else None
        rows.append({"method": method, "macs": math.nan if share is None else share, "seeds": mine.seed.nunique()})
    return pd.DataFrame(rows, columns=["method", "macs", "seeds"])


def _made(make: Callable[[], Point]) -> Point | None:
    """A point's configuration; None where it is out of reach."""
    try:
        return make()
    except UnreachableError:
        return None


def _unextended(config: Any) -> Any:
    """A run whose source networks are as they were before the additional source steps."""
    if isinstance(config, ExtendedSourceRun):
        return replace(config, optimisation=replace(config.optimisation, steps=0))
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    inner = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return replace(config, **{k: v for k, value in inner.items() if (v := _unextended(value)) != value})


def _space(name: str) -> str:
    return name.removesuffix("-detached")


def _best(what: str, trials: Sequence[Trial]) -> Settings:
    finished = [t for t in trials if t.outcome.value is not None]
    if not finished:
        reason = next((t.outcome.reason for t in trials if t.outcome.reason), "no trial was made")
        raise UnreachableError(
            f"every trial of {what} is missing ({reason}); widen its search space or raise the trial budget"
        )
    return max(finished, key=lambda t: (t.outcome.value, -t.number)).settings


def _trial_row(stage: str, name: str, number: int, settings: Settings, outcome: Outcome) -> dict[str, Any]:
    value = math.nan if outcome.value is None else outcome.value
    return {
        "stage": stage,
        "name": name,
        "trial": number,
        "settings": json.dumps(dict(settings)),
        "validation_accuracy": value,
        "reason": outcome.reason,
        "run": outcome.run,
    }


def _chain(config: Any) -> list[Any]:
    """A run and those it started from, as far as they are of its own kind: points of one chain, or source networks."""
    found = [config]
    while True:
        last = found[-1]
        before = getattr(last, "parent", None) or (getattr(last, "source", None) if _is_source(last) else None)
        if before is None:
            return found
        found.append(before)


def _is_source(config: Any) -> bool:
    return isinstance(config, (SourceRun, AFSSourceRun, ExtendedSourceRun))


def _total(chain: Sequence[Any], of: Any) -> float:
    """The sum over runs; NaN where one of them is not known."""
    values = []
    for config in chain:
        result = runs.lookup(config)
        values.append(None if result is None else of(result))
    known = [float(value) for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else math.nan


def _work(
    profile: Profile, rules: Protocol, target: DataSource, complete: bool, trials_only: bool, extras: bool
) -> None:
    comparison = Comparison(profile, rules, target, complete=complete)
    comparison.trials()
    if trials_only:
        return
    table = comparison.sweep()
    comparison.write_statistics(table)
    varies = bool(comparison.rules.settings_of)  # its ablation is the detached attention alone
    comparison.attention(extras=extras and varies)
    comparison.settled(extras=extras)
    if (extras or not complete) and not varies:
        comparison.ablations(table)
    if extras and not varies:
        comparison.equal_time(table)


def run_comparison(
    profile: Profile,
    *,
    rules: Protocol | None = None,
    target: DataSource | None = None,
    workers: int = 1,
    trials_only: bool = False,
    extras: bool = False,
    complete: bool = True,
) -> Comparison:
    """Computes a comparison, or this worker's share of it, and writes its tables.

    Args:
        profile: from `profiles.get`.
        rules: default: those of the profile.
        target: default: the profile's first.
        workers: processes here; other machines that share the run store join by the same call.
        trials_only: stop after the choices on validation images.
        extras: also the ablations and the rival at equal wall-clock time.
        complete: False trains nothing and writes the tables of the seeds that are finished for every method.

    Raises:
        AFDSError: without training, if a trial or every seed is unfinished.
    """
    comparison = Comparison(profile, rules, target, complete=complete)
    shared = (profile, comparison.rules, comparison.target, complete, trials_only, extras)
    alongside(_work, shared, workers if complete else 1)
    return comparison
