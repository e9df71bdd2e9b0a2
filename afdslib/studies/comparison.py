"""Every competitor on the same curve: tuned alike on validation images, then swept over budgets and seeds.

The first seeds are for every method, the rest of the seeds for AFDS and for the competitors that are best on
validation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from afdslib import runs
from afdslib.base.errors import AFDSError, UnreachableError
from afdslib.experiments import AFSSourceRun, DataSource, ExtendedSourceRun, weights_run
from afdslib.studies import engine, profiles, results, statistics
from afdslib.studies.engine import Cell
from afdslib.studies.points import Points, Tuned
from afdslib.studies.profile import Profile
from afdslib.studies.protocol import AFDS, Method, Protocol, protocol
from afdslib.studies.tuning import Tuning

__all__ = ["COLUMNS", "MISSING", "TIMES", "Comparison", "costs", "macs_needed", "points_of"]

COLUMNS = [
    "target", "method", "role", "regulariser", "selection", "strength", "seed", "budget", "density", "test_accuracy",
    "test_mean_class_accuracy", "validation_accuracy", "train_accuracy", "macs", "macs_predictors", "train_macs",
    "met", "dense_macs", "parameters", "removed", "static", "dynamic", "dead_gates", "gate_variance", "steps",
    "training_macs", "source_macs", "settings", "run",
]  # fmt: skip
TRIALS = ["stage", "method", "trial", "settings", "validation_accuracy", "reason", "run"]
MISSING = ["target", "method", "role", "seed", "budget", "reason"]
TIMES = ["method", "seed", "budget", "seconds", "source_seconds", "run"]


class Comparison(engine.Plan):
    """All runs of a profile's comparison on one target.

    Args:
        profile: from `profiles.get`: data sets, network, steps.
        rules: default: those of the profile.
        target: default: the profile's first.
    """

    part = "comparison"

    def __init__(self, profile: Profile, rules: Protocol | None = None, target: DataSource | None = None):
        super().__init__(profile)
        self.rules = rules or protocol(profile)
        self.target = target or profile.targets[0]
        self.points = Points(profile, self.rules, self.target)
        if profile.trial_seed in self.rules.seeds:
            raise AFDSError(f"the trials' seed {profile.trial_seed} is among those of the comparison; take another")

    @cached_property
    def original(self) -> Comparison | None:
        """The comparison whose settings and rivals this one takes, if any; see `Protocol.settings_of`."""
        if not self.rules.settings_of:
            return None
        p = self.profile
        return Comparison(profiles.get(self.rules.settings_of, p.scale, p.source.root or None))

    @cached_property
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
        ranked = statistics.rank_on_validation(original.table(), budget=rules.primary_budget, seeds=original._first)
        return (AFDS, *map(Method.parse, ranked[: rules.rivals]))

    # the plan

    @cached_property
    def tuning(self) -> Tuning:
        """The trials that the settings come from."""
        return self.original.tuning if self.original else Tuning(self.points, self.methods)

    def tuned(self, method: Method) -> Tuned:
        """A method at the settings that its trials chose."""
        return self.tuning.tuned(method)

    def batches(self) -> Iterator[list[Cell]]:
        """Source networks; trials, unless another comparison has made them; the first seeds; the rest of the seeds."""
        keys = {"target": self.target.title}
        yield [Cell(config, "source", keys | {"variant": name}) for name, config in self.points.sources(self.methods)]
        if self.original is None:
            yield from self.tuning.batches()
        # Seed by seed, so that what is finished of an interrupted study compares all methods.
        cells = [cell for seed in self._first for method in self.methods for cell in self._chain(method, seed)]
        yield cells
        if rest := self.rules.seeds[self.rules.rest :]:
            reached = [(cell, engine.lookup(cell.config).metrics) for cell in cells if cell.config is not None]
            rows = [m | dict(cell.keys) | {"role": cell.role} for cell, m in reached if "diverged" not in m]
            best = self._best(points_of(results.stored(rows)))
            yield [cell for seed in rest for method in best for cell in self._chain(method, seed)]

    @property
    def _first(self) -> tuple[int, ...]:
        """The seeds that all methods get."""
        return self.rules.seeds[: self.rules.rest]

    def _best(self, first: pd.DataFrame) -> list[Method]:
        """AFDS, and the competitors that are best on validation images at the first seeds."""
        try:
            ranked = statistics.rank_on_validation(first, budget=self.rules.primary_budget)
        except AFDSError:  # nobody reached it
            ranked = []
        methods = [method for method in self.methods if method == AFDS or method.key in ranked[: self.rules.rivals]]
        return [method for method in methods if (first.method == method.key).any()]

    def _chain(self, method: Method, seed: int) -> list[Cell]:
        """The points of one method and seed, from the unpruned one down."""
        return [self.cell(method, seed, self.rules.budgets[: i + 1]) for i in self._wanted(method)]

    def _wanted(self, method: Method) -> list[int]:
        """At which budgets there is a point."""
        every = self.rules.narrow_between or not method.selection.startswith("width")
        return [i for i, b in enumerate(self.rules.budgets) if every or b in (1.0, self.rules.primary_budget)]

    def cell(self, method: Method, seed: int, budgets: Sequence[float], *, role: str = "", factor: float = 1.0) -> Cell:
        """A method's point at the last of some budgets, at the chosen settings."""
        keys = {
            "target": self.target.title, "method": method.key, "regulariser": method.transfer,
            "selection": method.selection, "seed": seed, "budget": budgets[-1],
        }  # fmt: skip
        role = role or method.role
        if reason := self.tuning.why_not(method):
            return Cell(None, role, keys, reason)
        tuned = self.tuned(method)
        said = {**tuned.regulariser, **{f"{k} ({method.selection})": v for k, v in tuned.selection.items()}}
        keys |= {"strength": tuned.strength, "settings": json.dumps(said)}
        try:
            return Cell(self.points.point(tuned, seed, budgets, factor=factor), role, keys)
        except UnreachableError as error:
            return Cell(None, role, keys, str(error))

    def measured(self, cell: Cell, result: runs.Result) -> dict[str, Any]:
        """A point's figures with what it took; of a trial its validation accuracy alone."""
        figures = super().measured(cell, result)
        return figures if cell.role in ("trial", "source") else figures | _costs(cell.config, result)

    def show(self) -> str:
        """The rules, as JSON."""
        return json.dumps(runs.to_json(self.rules), indent=2)

    def summary(self) -> str:
        """The report's sentence, and how far it is."""
        return f"{self.sentence()} {'' if self.finished else f'Not finished; go on with: {self.command}'}".strip()

    # what is there

    def committed(self, part: str = "comparison") -> pd.DataFrame:
        """The committed rows of this comparison, or of what is beside it, as text."""
        rows = results.read(self.profile.name, self.profile.scale) if self.profile.committed else results.stored([])
        return results.select(rows, part=part, target=self.target.title)

    def rows(self) -> pd.DataFrame:
        """The rows of this comparison, as text: the committed ones, else what is finished in the run store."""
        rows = self.committed()
        return rows if len(rows) else engine.table(self)

    def table(self) -> pd.DataFrame:
        """One row per method, seed and budget: of the seeds that are finished for every method that gets them."""
        return points_of(self.complete())

    def complete(self) -> pd.DataFrame:
        """The rows of the points, with and without a network, without seeds that some method has not finished."""
        rows = results.select(self.rows(), part=self.part, role=("afds", "part", "competitor"))
        numbers = rows.seed.astype(int)
        count = rows.groupby([rows.method, numbers]).size()

        def done(methods: Sequence[Method], seed: int) -> bool:
            return all(count.get((m.key, seed), 0) >= len(self._wanted(m)) for m in methods)

        first = [seed for seed in self._first if done(self.methods, seed)]
        best = self._best(points_of(rows[numbers.isin(first)])) if first else []
        rest = [seed for seed in self.rules.seeds[self.rules.rest :] if first and done(best, seed)]
        rows = rows[numbers.isin([*first, *rest])]
        return rows.sort_values("method", key=lambda names: pd.factorize(names)[0], kind="stable")

    def trials(self) -> pd.DataFrame:
        """Every trial that the settings come from: what was tried, its validation accuracy or why it has none."""
        rows = (self.original or self).rows()
        return results.view(results.select(rows, role="trial"), TRIALS).rename(columns={"method": "name"})

    @property
    def finished(self) -> bool:
        """Whether every method is there at the first seeds and AFDS at all, with a network or a reason for none."""
        try:
            methods = self.methods
        except AFDSError:
            return False
        rows = self.complete()
        there = set(zip(rows.method, rows.seed.astype(int), strict=True))
        first = {(method.key, seed) for method in methods for seed in self._first}
        return there >= first | {(AFDS.key, seed) for seed in self.rules.seeds if AFDS in methods}

    def rival(self) -> str:
        """The best competitor on validation images, on the first seeds."""
        return statistics.rival(self.table(), budget=self.rules.primary_budget, seeds=self._first)

    def sentence(self) -> str:
        """The report's sentence."""
        try:
            names = {method.key: method.label for method in self.methods}
            budget = self.rules.primary_budget
            return statistics.sentence(self.table(), budget=budget, seeds=self._first, names=names)
        except AFDSError as error:
            return f"There is no verdict: {error}."


def points_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The points that have a network."""
    return results.view(rows[rows.reason == ""], COLUMNS)


def _costs(config: Any, result: runs.Result) -> dict[str, Any]:
    """Of the whole chain on the target, and of its source network: training MACs and wall-clock seconds."""
    chain, source = _ancestors(config), _ancestors(config.source)
    if (teacher := getattr(config, "teacher", None)) is not None:
        source += _ancestors(teacher.source)
    if (weighing := weights_run(config.regulariser, config.source, config.data)) is not None:
        chain.append(weighing)
    share = result.metrics["train_macs"] / result.metrics["budget"]
    return {
        "training_macs": _total(chain, lambda r: r.metrics.get("training_macs")),
        "seconds": _total(chain, runs.seconds),
        "source_macs": _total(source, lambda r: r.metrics.get("training_macs", 0.0)),
        "source_seconds": _total(source, runs.seconds),
        # The unpruned network is at its true cost, predictors included.
        "met": result.metrics["budget"] == 1 or 0.98 <= share <= 1 + 1e-6,
    }


def _ancestors(config: Any) -> list[Any]:
    """A run and those it started from, as far as they are of its own kind: points of one chain, or source networks."""
    chain: list[Any] = []
    while config is not None:
        chain.append(config)
        source = config.source if isinstance(config, (AFSSourceRun, ExtendedSourceRun)) else None
        config = getattr(config, "parent", None) or source
    return chain


def _total(chain: Sequence[Any], of: Callable[[runs.Result], float | None]) -> float:
    """The sum over runs; NaN where one of them is not known."""
    values = [None if (result := runs.lookup(config)) is None else of(result) for config in chain]
    return math.nan if None in values else float(sum(map(float, values)))  # type: ignore[arg-type]


def costs(table: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Per method what a point at a budget took, mean over seeds: training MACs on the source and on the target."""
    rows = statistics.at(table, budget)
    return rows.groupby("method", sort=False)[["source_macs", "training_macs"]].mean().reset_index()


def macs_needed(table: pd.DataFrame) -> pd.DataFrame:
    """Per method the share of MACs to stay within one point of its own dense network, from the means over seeds."""
    rows = []
    for method, points in table.groupby("method", sort=False):
        means = points.groupby("budget")[["macs", "test_accuracy"]].mean()
        curve = {float(b): (float(r.macs), float(r.test_accuracy)) for b, r in means.iterrows()}
        share = statistics.macs_within(curve) if 1.0 in curve else None
        rows.append({"method": method, "macs": math.nan if share is None else share, "seeds": points.seed.nunique()})
    return pd.DataFrame(rows, columns=["method", "macs", "seeds"])
