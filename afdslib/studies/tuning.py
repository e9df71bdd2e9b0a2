"""The trials of a comparison, and the settings that they choose: on validation images, at quasi-random settings.

Regularisers are tuned on the dense network; selections at the trial budget, with L2 at its best; then each pair's
strength once more at the primary budget. A trial is a run of the store, so workers share trials as they share all runs.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from afdslib import runs
from afdslib.base.errors import AFDSError, UnreachableError
from afdslib.losses.term import Axis, Value
from afdslib.studies import engine
from afdslib.studies.engine import Cell
from afdslib.studies.points import Points, Settings, Tuned
from afdslib.studies.protocol import Method, regulariser_space, selection_space

__all__ = ["Tuning", "settings"]

Trials = list[tuple[Settings, Cell]]
L2 = Method("l2", "afs")


def _value(axis: Axis, share: float) -> Value:
    """The value at a share of an axis."""
    if axis.choices:
        return axis.choices[min(int(share * len(axis.choices)), len(axis.choices) - 1)]
    if not axis.log:
        return axis.low + share * (axis.high - axis.low)
    low, high = math.log(axis.low), math.log(axis.high)
    return math.exp(low + share * (high - low))


def settings(space: Sequence[Axis], count: int, *, seed: int = 0) -> list[dict[str, Value]]:
    """The settings of `count` trials: the defaults, then a scrambled Sobol sequence. The same for a seed.

    Raises:
        AFDSError: for an empty search space, or no trial.
    """
    if not space or count < 1:
        tried = f"{len(space)} settings and {count} trials"
        raise AFDSError(f"the search space is empty: {tried}; give at least one of each")
    from scipy.stats import qmc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sequence is balanced at powers of two only
        shares = qmc.Sobol(len(space), scramble=True, seed=seed).random(count)[: count - 1]
    drawn = [{axis.name: _value(axis, float(u)) for axis, u in zip(space, row, strict=True)} for row in shares]
    return [{axis.name: axis.default for axis in space}, *drawn]


class Tuning:
    """The trials of some methods, and what they choose. Nothing is trained here: a choice reads finished trials.

    Args:
        points: of the comparison.
        methods: that are compared.
    """

    def __init__(self, points: Points, methods: Sequence[Method]):
        self.points, self.rules, self.methods = points, points.rules, methods
        self.seed = points.profile.trial_seed
        self._tuned: dict[Method, Tuned] = {}

    def _trials(self, stage: str, name: str, tried: Sequence[Settings], make: Callable[[Settings], Any]) -> Trials:
        """A cell for each of some settings; one that cannot be made says why."""
        trials = []
        for i, chosen in enumerate(tried):
            said = {"strength": chosen["strength"]} if stage == "strength" else dict(chosen)
            keys = {"target": self.points.target.title, "method": name, "stage": stage, "trial": i}
            cell = Cell(None, "trial", keys | {"settings": json.dumps(said)})
            try:
                cell = replace(cell, config=make(chosen))
            except UnreachableError as error:
                cell = replace(cell, reason=str(error))
            if cell.config is not None and cell.config.use_test:
                raise RuntimeError("a trial must hold no test image")
            trials.append((chosen, cell))
        return trials

    def _point(self, method: Method, regulariser: Settings, selection: Settings, budgets: Sequence[float]) -> Any:
        return self.points.point(Tuned(method, regulariser, selection), self.seed, budgets, trial=True)

    @functools.cached_property
    def _regularisers(self) -> dict[Method, Trials]:
        """Of each regulariser on the dense network, L2 first."""
        trials = {}
        for m in dict.fromkeys((L2, *(replace(m, selection="afs") for m in self.methods))):
            space = regulariser_space(m.regulariser, self.rules.feature_strengths)
            tried = settings(space, self.rules.trials, seed=self.seed)
            make = functools.partial(self.points.dense, m, seed=self.seed, trial=True)
            trials[m] = self._trials("regulariser", m.transfer, tried, make)
        return trials

    @functools.cached_property
    def _selections(self) -> dict[str, Trials]:
        """Of each selection at the trial budget, with L2 at its best."""
        best, chain = self.best_regulariser(L2), (1.0, self.rules.trial_budget)
        trials = {}
        for name in dict.fromkeys(m.selection for m in self.methods):
            tried = settings(selection_space(name, self.points.profile), self.rules.trials, seed=self.seed)
            make = functools.partial(self._point, Method("l2", name), best, budgets=chain)
            trials[name] = self._trials("selection", name, tried, make)
        return trials

    @functools.cached_property
    def _strengths(self) -> dict[Method, Trials]:
        """Of each method that has settings, at the primary budget."""
        trials = {}
        for m in self.methods:
            if not self.why_not(m):
                best, selection = self.best_regulariser(m), self.best_selection(m)
                tried = [{**best, "strength": float(best["strength"]) * factor} for factor in self.rules.multipliers]
                make = functools.partial(self._point, m, selection=selection, budgets=self.rules.trial_chain)
                trials[m] = self._trials("strength", m.key, tried, make)
        return trials

    def batches(self) -> Iterator[list[Cell]]:
        """The trials in three batches, each of which needs the choices from the one before."""
        for stage in ("_regularisers", "_selections", "_strengths"):
            yield [cell for trials in getattr(self, stage).values() for _, cell in trials]

    def best_regulariser(self, method: Method) -> Settings:
        """A regulariser's settings of highest validation accuracy; the defaults first in a tie."""
        return _best(f"regulariser {method.transfer}", self._regularisers[replace(method, selection="afs")])

    def best_selection(self, method: Method) -> Settings:
        """A selection's settings of highest validation accuracy; the defaults first in a tie."""
        return _best(f"selection {method.selection}", self._selections[method.selection])

    def why_not(self, method: Method) -> str:
        """Why a method cannot be tuned, because none of its trials has a value; empty where it can."""
        if method in self._tuned:
            return ""
        try:
            self.best_regulariser(method), self.best_selection(method)
        except UnreachableError as error:
            return str(error)
        return ""

    def tuned(self, method: Method) -> Tuned:
        """A method at the settings that its trials chose; the smallest change wins a tie of the strengths."""
        if method not in self._tuned:
            try:
                regulariser = _best("", self._strengths[method])
            except UnreachableError:  # no strength reached the primary budget
                regulariser = self.best_regulariser(method)
            self._tuned[method] = Tuned(method, regulariser, self.best_selection(method))
        return self._tuned[method]


def _accuracy(cell: Cell) -> tuple[float, str]:
    """Of a trial on validation images; or -inf and why it has none.

    Raises:
        RuntimeError: the trial has read a test image, which is a fault of the program.
    """
    if cell.config is None:
        return -math.inf, cell.reason
    result: runs.Result = engine.lookup(cell.config)
    if any(key.startswith("test") or key == "confusion" for key in result.metrics):
        raise RuntimeError(f"the trial {result.id} holds test results")
    if "diverged" in result.metrics:
        return -math.inf, result.metrics["diverged"]
    return float(result.metrics["validation_accuracy"]), ""


def _best(what: str, trials: Trials) -> Settings:
    """The first settings of highest validation accuracy."""
    outcomes = [_accuracy(cell) for _, cell in trials]
    best = max((value for value, _ in outcomes), default=-math.inf)
    if best == -math.inf:
        why = next((why for _, why in outcomes if why), "no trial was made")
        raise UnreachableError(
            f"every trial of {what} is missing ({why}); widen its search space or raise the trial budget"
        )
    return next(chosen for (chosen, _), (value, _) in zip(trials, outcomes, strict=True) if value == best)
