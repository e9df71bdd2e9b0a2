"""The trials of a comparison, and the settings that they choose: on validation images, at quasi-random settings.

Regularisers are tuned on the dense network; selections at the trial budget, with L2 at its best; then each pair's
strength once more at the primary budget. The settings are the same for all workers, and a trial is a run of the store:
workers share the trials as they share all runs.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from afdslib import runs
from afdslib.base.errors import AFDSError, UnreachableError
from afdslib.losses.term import Axis, Value
from afdslib.studies import engine
from afdslib.studies.engine import Cell
from afdslib.studies.points import Points, Settings, Tuned
from afdslib.studies.protocol import Method, regulariser_space, selection_space

if TYPE_CHECKING:
    import optuna

__all__ = ["Tuning", "draw", "settings"]

Trials = list[tuple[Settings, Cell]]


def _distribution(axis: Axis) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import FloatDistribution

    # Choices are cut from a unit interval: Optuna draws categories at random, not quasi-randomly.
    return FloatDistribution(0.0, 1.0) if axis.choices else FloatDistribution(axis.low, axis.high, log=axis.log)


def _value(axis: Axis, number: float) -> Value:
    if not axis.choices:
        return number
    return axis.choices[min(int(number * len(axis.choices)), len(axis.choices) - 1)]


def _number(axis: Axis) -> float:
    if axis.choices:
        return (axis.choices.index(axis.default) + 0.5) / len(axis.choices)
    return float(axis.default)  # type: ignore[arg-type]


def draw(space: Sequence[Axis], count: int, *, seed: int = 0) -> list[dict[str, float]]:
    """Optuna's numbers of `count` trials: the defaults, then a scrambled Sobol sequence. The same for a seed.

    Raises:
        AFDSError: for an empty search space, or no trial.
    """
    import optuna

    if not space or count < 1:
        raise AFDSError(
            f"the search space is empty: {len(space)} settings and {count} trials; give at least one of each"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # QMCSampler is marked experimental
        sampler = optuna.samplers.QMCSampler(
            qmc_type="sobol", scramble=True, seed=seed, warn_independent_sampling=False
        )
        study = _quiet(lambda: optuna.create_study(sampler=sampler, direction="maximize"))
        distributions = {axis.name: _distribution(axis) for axis in space}
        study.enqueue_trial({axis.name: _number(axis) for axis in space})
        drawn = []
        for _ in range(count):
            trial = study.ask(distributions)
            study.tell(trial, 0.0)
            drawn.append({axis.name: float(trial.params[axis.name]) for axis in space})
    return drawn


def _quiet(make: Callable[[], Any]) -> Any:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return make()
    finally:
        optuna.logging.set_verbosity(before)


def settings(space: Sequence[Axis], count: int, *, seed: int = 0) -> list[dict[str, Value]]:
    """The settings of `count` trials: the defaults, then quasi-random ones."""
    drawn = draw(space, count, seed=seed)
    return [{axis.name: _value(axis, numbers[axis.name]) for axis in space} for numbers in drawn]


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

    def _cell(self, stage: str, name: str, number: int, chosen: Settings, make: Callable[[], Any]) -> Cell:
        keys = {
            "target": self.points.target.title, "method": name, "stage": stage, "trial": number,
            "settings": json.dumps(dict(chosen)),
        }  # fmt: skip
        try:
            config = make()
        except UnreachableError as error:
            return Cell(None, "trial", keys, str(error))
        if config.use_test:
            raise RuntimeError("a trial must hold no test image")
        return Cell(config, "trial", keys)

    def _trials(
        self, stage: str, name: str, space: Sequence[Axis], make: Callable[[Settings], Callable[[], Any]]
    ) -> Trials:
        tried = settings(space, self.rules.trials, seed=self.seed)
        return [(chosen, self._cell(stage, name, i, chosen, make(chosen))) for i, chosen in enumerate(tried)]

    @functools.cached_property
    def _regularisers(self) -> dict[Method, Trials]:
        """Of each regulariser on the dense network, L2 first."""

        def trials(plain: Method) -> Trials:
            space, dense = regulariser_space(plain.regulariser), self.points.dense
            make = functools.partial(functools.partial, dense, plain, seed=self.seed, trial=True)
            return self._trials("regulariser", plain.transfer, space, make)

        every = (Method("l2", "afs"), *(replace(m, selection="afs") for m in self.methods))
        return {plain: trials(plain) for plain in dict.fromkeys(every)}

    @functools.cached_property
    def _selections(self) -> dict[str, Trials]:
        """Of each selection at the trial budget, with L2 at its best."""
        best, chain = self.best_regulariser(Method("l2", "afs")), (1.0, self.rules.trial_budget)

        def trials(name: str) -> Trials:
            def make(chosen: Settings) -> Callable[[], Any]:
                tuned = Tuned(Method("l2", name), best, chosen)
                return functools.partial(self.points.point, tuned, self.seed, chain, trial=True)

            return self._trials("selection", name, selection_space(name, self.points.profile), make)

        return {name: trials(name) for name in dict.fromkeys(m.selection for m in self.methods)}

    @functools.cached_property
    def _strengths(self) -> dict[Method, Trials]:
        """Of each method that has settings, at the primary budget."""

        def trials(method: Method) -> Trials:
            tuned = Tuned(method, self.best_regulariser(method), self.best_selection(method))
            tried: Trials = []
            for i, multiplier in enumerate(self.rules.multipliers):
                regulariser = {**tuned.regulariser, "strength": tuned.strength * multiplier}
                one, chain = replace(tuned, regulariser=regulariser), self.rules.trial_chain
                make = functools.partial(self.points.point, one, self.seed, chain, trial=True)
                said = {"strength": regulariser["strength"]}
                tried.append((regulariser, self._cell("strength", method.key, i, said, make)))
            return tried

        return {method: trials(method) for method in self.methods if not self.why_not(method)}

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


def _accuracy(cell: Cell) -> tuple[float | None, str]:
    """Of a trial on validation images; or why it has none. A trial that read a test image is a fault of the program."""
    if cell.config is None:
        return None, cell.reason
    result: runs.Result = engine.lookup(cell.config)
    if any(key.startswith("test") or key == "confusion" for key in result.metrics):
        raise RuntimeError(f"the trial {result.id} holds test results")
    if "diverged" in result.metrics:
        return None, result.metrics["diverged"]
    return float(result.metrics["validation_accuracy"]), ""


def _best(what: str, trials: Trials) -> Settings:
    outcomes = [_accuracy(cell) for _, cell in trials]
    if all(value is None for value, _ in outcomes):
        reason = next((why for _, why in outcomes if why), "no trial was made")
        raise UnreachableError(
            f"every trial of {what} is missing ({reason}); widen its search space or raise the trial budget"
        )
    best = max(range(len(trials)), key=lambda i: (-math.inf if outcomes[i][0] is None else outcomes[i][0], -i))
    return trials[best][0]
