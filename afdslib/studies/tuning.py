"""Quasi-random trials that several workers share: Optuna's journal in a folder beside the run store.

The points are drawn once, by the worker that comes first; a worker then takes the next one that waits. What a trial
costs is a run of the store, so a killed worker loses no finished run: whoever comes later takes its trial over and
resumes its run, and two workers that ask for one trial compute it once.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afdslib import runs
from afdslib.base.errors import AFDSError
from afdslib.losses.term import Axis, Value

if TYPE_CHECKING:
    import optuna

__all__ = ["Outcome", "Trial", "points", "search"]


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Attributes:
        value: validation accuracy; None where the run is missing.
        run: its id.
        reason: why it is missing.
    """

    value: float | None
    run: str
    reason: str = ""


@dataclass(frozen=True)
class Trial:
    """One finished trial.

    Attributes:
        number: 0 is the default settings.
        settings: by name.
        outcome: of its run.
    """

    number: int
    settings: dict[str, Value]
    outcome: Outcome


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


def points(space: Sequence[Axis], count: int, *, seed: int = 0) -> list[dict[str, float]]:
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


def _open(folder: Path, name: str, space: Sequence[Axis], count: int, seed: int) -> Any:
    """The shared study, with all its points waiting; made by whoever comes first."""
    import filelock
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    file = folder / "trials.journal"
    about = {"version": runs.RESULTS_VERSION, "space": [_signature(axis) for axis in space], "seed": seed}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "trials.lock"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A killed process leaves the journal's own lock behind; the others break it after 30 seconds.
            backend = JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file)))
            storage = optuna.storages.JournalStorage(backend)
            study = _quiet(
                lambda: optuna.create_study(
                    study_name=name, storage=storage, direction="maximize", load_if_exists=True,
                    sampler=optuna.samplers.RandomSampler(seed=seed),  # never asked: every point is drawn already
                )
            )  # fmt: skip
            if "about" not in study.user_attrs:
                study.set_user_attr("about", json.dumps(about, sort_keys=True))
            written = json.loads(study.user_attrs["about"])
            if written["version"] != runs.RESULTS_VERSION:
                raise AFDSError(
                    f"the trials in {file} were written by RESULTS_VERSION {written['version']}, and this is "
                    f"{runs.RESULTS_VERSION}; keep them elsewhere and start a new folder"
                )
            if written != json.loads(json.dumps(about)):
                raise AFDSError(
                    f"the trials of {name!r} in {file} are of another search space; keep them elsewhere and start a "
                    "new folder"
                )
            for point in points(space, count, seed=seed)[len(study.trials) :]:
                study.enqueue_trial(point)
            return study
    except OSError as error:
        raise AFDSError(
            f"the shared folder {folder} cannot be used: {error.strerror or error}; mount it, or mend its permissions"
        ) from error


def _signature(axis: Axis) -> list[Any]:
    return [axis.name, axis.default, axis.low, axis.high, axis.log, list(axis.choices)]


def _claim(folder: Path, study: Any) -> Any:
    """The next waiting trial, taken by this worker alone; None if none waits."""
    import filelock
    from optuna.trial import TrialState

    with filelock.FileLock(folder / "trials.lock"):
        if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return None
        return study.ask()


def search(
    folder: Path,
    name: str,
    space: Sequence[Axis],
    count: int,
    evaluate: Callable[[Mapping[str, Value]], Outcome],
    *,
    seed: int = 0,
    wait: bool = True,
) -> list[Trial]:
    """Does its share of a method's trials, then waits for the others': all of them, in order.

    Args:
        folder: shared by the workers; beside the run store.
        name: of the method.
        space: its settings; the same for all workers.
        count: trials.
        evaluate: settings -> outcome; a run of the store, so that asking twice computes once.
        seed: of the points.
        wait: False comes back when no trial waits any more, with none; so a worker can go on with another method.

    Raises:
        AFDSError: an empty space, a folder that cannot be used, or trials of another version or space.
    """
    from optuna.trial import TrialState

    if not space or count < 1:
        raise AFDSError(f"the search space of {name!r} is empty; give at least one setting and one trial")
    logging.getLogger("optuna").setLevel(logging.ERROR)
    study = _open(folder, name, space, count, seed)
    while (claimed := _claim(folder, study)) is not None:
        _tell(study, claimed.number, evaluate(_settings(space, study, claimed.number)))
    if not wait:
        return []
    # Still running: another worker's, whose lock is waited for, or a killed one's, whose run is resumed.
    for frozen in study.get_trials(states=(TrialState.RUNNING,)):
        _tell(study, frozen.number, evaluate(_settings(space, study, frozen.number)))
    found = [_settings(space, study, number) for number in range(count)]
    return [Trial(number, settings, evaluate(settings)) for number, settings in enumerate(found)]


def _settings(space: Sequence[Axis], study: Any, number: int) -> dict[str, Value]:
    fixed = study.trials[number].system_attrs["fixed_params"]
    return {axis.name: _value(axis, fixed[axis.name]) for axis in space}


def _tell(study: Any, number: int, outcome: Outcome) -> None:
    import optuna

    state = optuna.trial.TrialState.FAIL if outcome.value is None else None
    try:
        study.tell(number, outcome.value, state=state, skip_if_finished=True)
    except optuna.exceptions.UpdateFinishedTrialError:
        pass  # another worker was told the same between optuna's look and its writing
