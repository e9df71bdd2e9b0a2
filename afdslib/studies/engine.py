"""One engine for all studies.

A plan says which runs there are, batch by batch; the engine computes them, makes a table of them, and publishes both.
A batch is asked for when the one before is there, so that a choice on validation images can read earlier results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from afdslib import runs, training
from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.runs import MODEL
from afdslib.runs.networks import keep_networks
from afdslib.studies import results, workers

__all__ = [
    "Cell", "Plan", "Unfinished", "cells", "compute", "dry_run", "frame", "lookup", "pending", "publish", "table",
]  # fmt: skip


class Unfinished(AFDSError):
    """A choice needs a result that is not there, and nothing is trained."""


@dataclass(frozen=True)
class Cell:
    """A run, and what it is in the table.

    Attributes:
        config: of the run; None for a point that is out of reach.
        role: "source", "trial", "afds", "part", "competitor", "ablation", "teacher", "student", ...
        keys: of its row, by column: target, method, seed, budget, ...
        reason: why there is no run; else empty.
    """

    config: Any
    role: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


class Plan:
    """The runs of one part of a study.

    Args:
        profile: whose part it is; has at least name, scale and committed.
    """

    part = ""
    """Its name on the command line and in the table."""
    of_trials: tuple[str, ...] = ("validation_accuracy",)
    """Metrics of a trial that the table holds."""

    def __init__(self, profile: Any):
        self.profile = profile

    def batches(self) -> Iterator[Sequence[Cell]]:
        """The runs in the order of computation. What is yielded before a batch is finished when it is asked for.

        Raises:
            Unfinished: nothing is trained, and a choice reads a result that is not there.
        """
        raise NotImplementedError

    def measured(self, cell: Cell, result: runs.Result) -> dict[str, Any]:
        """What the table holds of a finished run beside its keys."""
        if cell.role == "trial":
            return {key: result.metrics.get(key, math.nan) for key in self.of_trials}
        return result.metrics

    def networks(self) -> Iterable[tuple[str, Any]]:
        """Networks that are published, as (name for readers, run)."""
        return ()

    def files(self) -> Path | None:
        """Writes what `publish` is to write instead of rows, if a plan has such; returns where."""
        return None

    def folder(self) -> Path:
        """Where pages and times go: data/results/<profile>/<scale> for real studies, the figures' folder for others."""
        p = self.profile
        return paths.results(p.name) / p.scale if p.committed else paths.figures(p.name)

    def show(self) -> str:
        """Every setting, as JSON."""
        return json.dumps(runs.to_json(self.profile), indent=2)

    def describe(self) -> str:
        """What would be computed."""
        return dry_run(self)

    def summary(self) -> str:
        """What came of it, in a few lines."""
        known = list(cells(self))
        gone = sum(result is None or "diverged" in result.metrics for _, result in known)
        return f"{self.part}: {len(known) - gone} runs are finished, {gone} points have no network"

    @property
    def command(self) -> str:
        """What computes it, or goes on with it."""
        return f"afds study --profile {self.profile.name} --scale {self.profile.scale} --part {self.part}"


def lookup(config: Any) -> runs.Result:
    """A finished result.

    Raises:
        Unfinished: it is not there.
    """
    result = runs.lookup(config)
    if result is None:
        raise Unfinished(f"the run {runs.run_id(config)} ({type(config).__name__}) is not finished")
    return result


def compute(plan: Plan, processes: int | None = None) -> None:
    """Computes what is missing; several processes, here or on machines with the same run store, share the runs.

    By default there are as many processes here as train well at a time.
    """
    several = processes or training.processes()
    workers.alongside(_share, (plan,), several if pending(plan) > 1 else 1)


def _share(plan: Plan) -> None:
    for batch in plan.batches():
        workers.compute([cell.config for cell in batch if cell.config is not None])


def _planned(plan: Plan, why: type[AFDSError] = Unfinished) -> tuple[list[Cell], AFDSError | None]:
    """The cells that are known so far, and why the next ones are not, if there are more."""
    cells: list[Cell] = []
    try:
        for batch in plan.batches():
            cells += batch
    except why as error:
        return cells, error
    return cells, None


def pending(plan: Plan) -> float:
    """How many runs are missing; infinite where what comes next is chosen from some of them."""
    cells, more = _planned(plan)
    missing = sum(cell.config is not None and runs.lookup(cell.config) is None for cell in cells)
    return math.inf if more else missing


def cells(plan: Plan) -> Iterator[tuple[Cell, runs.Result | None]]:
    """What is known: each cell that is finished, with its result, and each that is out of reach. Trains nothing."""
    for cell in _planned(plan)[0]:
        result = None if cell.config is None else runs.lookup(cell.config)
        if cell.config is None or result is not None:
            yield cell, result


def frame(found: Iterable[tuple[Mapping[str, Any], runs.Result]], columns: Sequence[str]) -> pd.DataFrame:
    """A row per run, of its keys and metrics; `attrs["missing"]` has the keys and reasons of those that diverged."""
    rows, missing = [], []
    for keys, result in found:
        row = {**keys, "run": result.id}
        if "diverged" in result.metrics:
            missing.append(row | {"reason": result.metrics["diverged"]})
        else:
            rows.append(result.metrics | row)
    table = pd.DataFrame(rows, columns=list(columns))
    table.attrs["missing"] = missing
    return table


def table(plan: Plan) -> pd.DataFrame:
    """The rows of a plan in the schema of results.csv: of all that is finished or out of reach, or has diverged."""
    rows = []
    for cell, result in cells(plan):
        figures: dict[str, Any] = {"reason": cell.reason}
        if result is not None:
            diverged = result.metrics.get("diverged")
            figures = ({"reason": diverged} if diverged else plan.measured(cell, result)) | {"run": result.id}
        same = {"scale": plan.profile.scale, "part": plan.part, "role": cell.role}
        rows.append({**figures, **same, **cell.keys})
    return results.stored(rows)


def publish(plan: Plan) -> Path:
    """Writes what is finished of a real study to be committed: runs, learning curves, rows of results.csv, networks.

    Raises:
        AFDSError: for a profile whose results are never committed.
    """
    if (own := plan.files()) is not None:
        return own
    profile = plan.profile
    if not profile.committed:
        raise AFDSError(f"results and networks of the profile {profile.name} are never committed")
    computed = workers.with_needs(cell.config for cell, result in cells(plan) if result is not None)
    runs.publish([result for config in computed if (result := runs.lookup(config)) is not None], profile.name)
    written = results.write(profile.name, table(plan))
    found = ((name, runs.lookup(config, needs=(MODEL,))) for name, config in plan.networks())
    if kept := [(name, result) for name, result in found if result is not None]:
        keep_networks(kept, profile.name)
    return written


def dry_run(plan: Plan) -> str:
    """The runs of each role that are planned so far, how many are finished, and the steps of the others."""
    cells, more = _planned(plan, AFDSError)  # also images that are not there
    lines = [f"{plan.part} of {plan.profile.name}, scale {plan.profile.scale}"]
    configs = [(cell.role, cell.config) for cell in cells if cell.config is not None]
    for role in dict.fromkeys(role for role, _ in configs):
        missing = [config for name, config in configs if name == role and runs.lookup(config) is None]
        n = sum(name == role for name, _ in configs)
        lines.append(f"{role:12}{n:>6} runs, {n - len(missing)} finished, {sum(map(_steps, missing)):,} steps to go")
    return "\n".join([*lines, f"what comes next is not known yet: {more}"] if more else lines)


def _steps(config: Any) -> int:
    """Optimiser steps of a run's own stage, without those of the runs that it starts from."""
    stage = "tuning" if getattr(config, "parent", None) is not None else "optimisation"
    return int(getattr(config, stage, config).steps) if hasattr(config, stage) else 0
