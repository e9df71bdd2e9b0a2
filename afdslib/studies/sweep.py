"""The sweep: regularisers that share the AFS selection, from one source network, at every budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import pandas as pd

from afdslib import runs, training
from afdslib.base.errors import AFDSError
from afdslib.data import Splits
from afdslib.experiments import AFSSourceRun, DataSource, SourceRun, TransferRun, check_budgets
from afdslib.studies import engine, plan, results, workers
from afdslib.studies.engine import Cell
from afdslib.studies.profile import Profile
from afdslib.studies.protocol import Method
from afdslib.training.objective import Regulariser

__all__ = ["COLUMNS", "TRIALS", "Study"]

COLUMNS = [
    "target", "method", "strength", "seed", "budget", "density", "test_accuracy", "test_mean_class_accuracy",
    "validation_accuracy", "train_accuracy", "macs", "macs_predictors", "train_macs", "dense_macs", "parameters",
    "removed", "static", "dynamic", "dead_gates", "gate_variance", "steps", "training_macs", "run",
]  # fmt: skip
TRIALS = ["target", "method", "strength", "validation_accuracy", "train_accuracy", "run"]

Chosen = dict[str, dict[str, Regulariser]]
"""Regularisers at their chosen strengths, by target and name."""


class Study(engine.Plan):
    """The runs of a profile's sweep, computed or looked up.

    Args:
        profile: from `profiles.get`.
        workers: processes that compute independent runs at a time, one thread each; default: one per core on a CPU, one
            on a GPU.
    """

    part = "sweep"
    of_trials = ("validation_accuracy", "train_accuracy")

    def __init__(self, profile: Profile, *, workers: int | None = None):
        super().__init__(profile)
        self.workers = workers or training.processes()
        if len(self.targets) < len(profile.targets):
            raise AFDSError(f"two targets of the profile {profile.name} have the same title; give each its own data")
        # Values out of range are refused now, not after hours at the point that needs them.
        self.transfer_run(profile.candidates[0].regulariser, 0, budget=profile.budgets[-1] if profile.budgets else 1.0)

    # data

    @property
    def targets(self) -> dict[str, DataSource]:
        """The target data sets by the title they have in tables and figures, the primary one first."""
        return {target.title: target for target in self.profile.targets}

    @cached_property
    def target_data(self) -> dict[str, Splits]:
        """The targets' images, by title; the seed of the fitting images is the profile's."""
        return {title: target.load() for title, target in self.targets.items()}

    @cached_property
    def source_data(self) -> Splits | None:
        """The source's images, or None if no stage reads them: then the weights are published ones, taken as they are.

        Raises:
            AFDSError: if they are needed and missing.
        """
        return self.profile.source.load() if self.reads_source else None

    @property
    def reads_source(self) -> bool:
        """Whether any stage reads the source's images."""
        return not self.source_run.published or self.profile.afs_training.steps > 0

    @cached_property
    def chance(self) -> dict[str, float]:
        """The accuracy of guessing, by target."""
        return {title: 1 / self._classes(title, target) for title, target in self.targets.items()}

    def _classes(self, title: str, target: DataSource) -> int:
        """As a finished point knows them, so that a report of committed results needs no image; else as the data do."""
        for c, seed in itertools.product(self.profile.candidates, self.profile.seeds):
            for strength in c.strengths:  # whichever was chosen: nothing is trained for this
                config = self.transfer_run(replace(c.regulariser, strength=strength), seed, target=target)
                result = runs.lookup(config)
                if result is not None and "confusion" in result.metrics:
                    return len(result.metrics["confusion"])
        return len(self.target_data[title].classes)

    # configurations

    @property
    def source_run(self) -> SourceRun:
        """Configuration of the plain source network."""
        return self.profile.source_run

    @property
    def afs_source_run(self) -> AFSSourceRun:
        """Configuration of the converted source network, fine-tuned at density 1."""
        return self.profile.afs_source_run

    def transfer_run(
        self, regulariser: Regulariser, seed: int, *, budget: float = 1.0, target: DataSource | None = None
    ) -> TransferRun:
        """Configuration of one point of the sweep: the network at a budget, reached from all larger ones."""
        p = self.profile
        check_budgets(p.budgets)
        if budget not in p.budgets:
            known = ", ".join(f"{b:g}" for b in p.budgets)
            raise AFDSError(f"budget {budget!r} is not in the sweep, whose budgets are {known}")
        return TransferRun(
            self.afs_source_run, replace(target or p.targets[0], seed=seed), regulariser, p.transfer, p.tuning,
            p.budgets[: p.budgets.index(budget) + 1], delta_s=p.delta_s, density_floor=p.density_floor,
            macs_images=p.macs_images, seed=seed, settle=bool(p.settle_by), first=p.first_update,
            freeze_first=p.freeze_first, settle_by=p.settle_by or "q", statistics_images=p.statistics_images,
        )  # fmt: skip

    # the plan

    def batches(self) -> Iterator[list[Cell]]:
        """The source networks, the trials, and every point at the strengths that these choose."""
        keys = {"target": self.profile.source.title, "network": self.profile.network.name}
        yield [Cell(config, "source", keys | {"variant": name}) for name, config in self.networks()]
        yield self._trials()
        yield self._points(self._choose())

    def networks(self) -> Iterator[tuple[str, SourceRun | AFSSourceRun]]:
        """The source networks, from which anyone can go on."""
        yield from (("source", self.source_run), ("AFS source", self.afs_source_run))

    def _trials(self) -> list[Cell]:
        p, cells = self.profile, []
        for target, c in itertools.product(p.targets, p.candidates):
            for strength in c.strengths if len(c.strengths) > 1 else ():
                run = self.transfer_run(replace(c.regulariser, strength=strength), p.trial_seed, target=target)
                keys = {"target": target.title, "method": c.regulariser.name, "strength": strength}
                cells.append(Cell(replace(run, optimisation=p.trial, use_test=False), "trial", keys))
        return cells

    def _choose(self) -> Chosen:
        """The strengths of highest validation accuracy; the smaller one wins a tie."""
        chosen: Chosen = {
            title: {
                c.regulariser.name: replace(c.regulariser, strength=c.strengths[0]) for c in self.profile.candidates
            }
            for title in self.targets
        }
        best: dict[tuple[str, str], float] = {}
        for cell in sorted(self._trials(), key=lambda cell: float(cell.keys["strength"])):
            target, method = key = (cell.keys["target"], cell.keys["method"])
            accuracy = engine.lookup(cell.config).metrics.get("validation_accuracy", -1.0)  # a trial that diverged
            if key not in best or accuracy > best[key]:
                best[key], chosen[target][method] = accuracy, cell.config.regulariser
        return chosen

    def _points(
        self, chosen: Chosen, methods: Iterable[str] | None = None, budgets: Sequence[float] | None = None
    ) -> list[Cell]:
        p, cells = self.profile, []
        names = list(methods or (c.regulariser.name for c in p.candidates))
        wanted = [b for b in p.budgets if budgets is None or b in budgets]
        for target, seed, name, budget in itertools.product(p.targets, p.seeds, names, wanted):
            regulariser = chosen[target.title][name]
            keys = {
                "target": target.title, "method": name, "regulariser": name, "selection": "afs",
                "strength": regulariser.strength, "seed": seed, "budget": budget,
            }  # fmt: skip
            config = self.transfer_run(regulariser, seed, budget=budget, target=target)
            cells.append(Cell(config, Method(name, "afs").role, keys))
        return cells

    def describe(self) -> str:
        """What the study would do here: stages, steps, MACs, disk, memory, and what is missing on this machine."""
        return plan.describe(self)

    def summary(self) -> str:
        """Means over seeds of what is finished."""
        rows = results.select(engine.table(self), role=("afds", "part"), reason="")
        table = results.view(rows, ["target", "method", "budget", "test_accuracy", "macs", "parameters"])
        shown = table.groupby(["target", "method", "budget"], sort=False).mean()
        return shown.to_string(float_format=lambda v: f"{v:.4g}")

    # results, computed if need be

    def source(self) -> runs.Result:
        """The plain source network."""
        return runs.get_or_run(self.source_run)

    def afs_source(self) -> runs.Result:
        """The converted and fine-tuned source network."""
        return runs.get_or_run(self.afs_source_run)

    def trials(self) -> pd.DataFrame:
        """Every strength tried for every regulariser on every target, with its accuracy on validation images.

        No test image is read.
        """
        cells = self._trials()
        found = zip(cells, self._compute([cell.config for cell in cells]), strict=True)
        rows = [self.measured(cell, result) | dict(cell.keys) | {"run": result.id} for cell, result in found]
        return pd.DataFrame(rows, columns=TRIALS)

    @cached_property
    def _chosen(self) -> Chosen:
        self._compute([cell.config for cell in self._trials()])
        return self._choose()

    def chosen(self, target: DataSource | None = None) -> dict[str, Regulariser]:
        """The regularisers at the strengths that a target's trials chose; the smaller strength wins a tie."""
        return self._chosen[(target or self.profile.targets[0]).title]

    @property
    def regularisers(self) -> dict[str, Regulariser]:
        """`chosen` for the primary target."""
        return self.chosen()

    def sweep(self, methods: Iterable[str] | None = None, budgets: Sequence[float] | None = None) -> pd.DataFrame:
        """The pruning sweep: one row per target, method, seed and budget.

        A point that diverged, or started from one, has no row; `table.attrs["missing"]` says why.

        Args:
            methods: regularisers by name; default: all.
            budgets: default: all of the profile.
        """
        cells = self._points(self._chosen, methods, budgets)
        found = self._compute([cell.config for cell in cells])
        return engine.frame(zip([cell.keys for cell in cells], found, strict=True), COLUMNS)

    def point_run(
        self, method: str, seed: int, *, budget: float = 1.0, target: DataSource | None = None
    ) -> TransferRun:
        """Configuration of one point of the sweep, at the strength that the target's trials chose."""
        return self.transfer_run(self.chosen(target)[method], seed, budget=budget, target=target)

    def point(self, method: str, seed: int, budget: float, target: DataSource | None = None) -> runs.Result:
        """One finished point of the sweep, with its learning curve, gates and confusion matrix; see `point_run`."""
        return self._compute([self.point_run(method, seed, budget=budget, target=target)])[0]

    def _compute(self, configs: Sequence[TransferRun]) -> list[runs.Result]:
        """The results in this order, computed by several processes where more than one is missing."""
        missing = sum(runs.lookup(config) is None for config in configs)
        return workers.alongside(workers.compute, (list(configs),), min(self.workers, max(1, missing)))
