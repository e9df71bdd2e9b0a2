"""A study: the runs of a profile, computed or looked up, and the tidy tables made from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from afdslib import runs, training
from afdslib.base.errors import AFDSError
from afdslib.data import Splits
from afdslib.experiments import AFSSourceRun, DataSource, SourceRun, TransferRun, check_budgets
from afdslib.runs.networks import keep_networks
from afdslib.studies.keeper import Keeper
from afdslib.studies.profiles import Profile
from afdslib.training.objective import Regulariser

__all__ = ["Study", "plan", "run_stage"]

COLUMNS = [
    "target", "method", "strength", "seed", "budget", "density", "test_accuracy", "test_mean_class_accuracy",
    "validation_accuracy", "train_accuracy", "macs", "macs_predictors", "train_macs", "dense_macs", "parameters",
    "removed", "static", "dynamic", "dead_gates", "gate_variance", "steps", "training_macs", "run",
]  # fmt: skip


class Study(Keeper[Profile]):
    """All runs of one profile.

    Args:
        profile: from `profiles.get`.
        workers: processes that compute independent runs at a time, one thread each; default: one per core on a CPU, one
            on a GPU.
    """

    def __init__(self, profile: Profile, *, workers: int | None = None):
        self.profile = profile
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
        p = self.profile
        return SourceRun(p.source, p.network, p.source_training, p.source_weight_decay)

    @property
    def afs_source_run(self) -> AFSSourceRun:
        """Configuration of the converted source network, fine-tuned at density 1."""
        p = self.profile
        return AFSSourceRun(self.source_run, p.source, p.afs_training, p.gates)

    def transfer_run(
        self, regulariser: Regulariser, seed: int, *, budget: float = 1.0, target: DataSource | None = None
    ) -> TransferRun:
        """Configuration of one point of the sweep: the network at a budget, reached from all larger ones."""
        p = self.profile
        check_budgets(p.budgets)
        if budget not in p.budgets:
            raise AFDSError(
                f"budget {budget!r} is not in the sweep, whose budgets are {', '.join(f'{b:g}' for b in p.budgets)}"
            )
        return TransferRun(
            source=self.afs_source_run,
            data=replace(target or p.targets[0], seed=seed),
            regulariser=regulariser,
            optimisation=p.transfer,
            tuning=p.tuning,
            budgets=p.budgets[: p.budgets.index(budget) + 1],
            delta_s=p.delta_s,
            density_floor=p.density_floor,
            macs_images=p.macs_images,
            seed=seed,
        )

    # results

    def source(self) -> runs.Result:
        """The plain source network."""
        return self._publish(runs.get_or_run(self.source_run))

    def afs_source(self) -> runs.Result:
        """The converted and fine-tuned source network."""
        self.source()
        return self._publish(runs.get_or_run(self.afs_source_run))

    def _trial_run(self, regulariser: Regulariser, strength: float, target: DataSource) -> TransferRun:
        p = self.profile
        run = self.transfer_run(replace(regulariser, strength=strength), p.trial_seed, target=target)
        return replace(run, optimisation=p.trial, use_test=False)

    def trials(self) -> pd.DataFrame:
        """Every strength tried for every regulariser on every target, with its accuracy on validation images.

        No test image is read. Also written to trials.csv.
        """
        tried = [
            (title, c.regulariser.name, strength, self._trial_run(c.regulariser, strength, target))
            for title, target in self.targets.items()
            for c in self.profile.candidates
            if len(c.strengths) > 1
            for strength in c.strengths
        ]
        results = self._compute([run for *_, run in tried])
        rows = [
            {"target": title, "method": method, "strength": strength, "run": result.id}
            | {key: result.metrics.get(key, math.nan) for key in ("validation_accuracy", "train_accuracy")}
            for (title, method, strength, _), result in zip(tried, results, strict=True)
        ]
        columns = ["target", "method", "strength", "validation_accuracy", "train_accuracy", "run"]
        table = pd.DataFrame(rows, columns=columns)
        self._write("trials", table)
        return table

    @cached_property
    def _chosen(self) -> dict[str, dict[str, Regulariser]]:
        trials = self.trials()
        chosen: dict[str, dict[str, Regulariser]] = {title: {} for title in self.targets}
        for title in self.targets:
            for c in self.profile.candidates:
                strength = c.strengths[0]
                if len(c.strengths) > 1:
                    mine = trials[(trials.target == title) & (trials.method == c.regulariser.name)]
                    mine = mine.sort_values("strength").fillna({"validation_accuracy": -1.0})  # a trial that diverged
                    strength = float(mine.strength[mine.validation_accuracy.idxmax()])
                chosen[title][c.regulariser.name] = replace(c.regulariser, strength=strength)
        return chosen

    def chosen(self, target: DataSource | None = None) -> dict[str, Regulariser]:
        """The regularisers at the strengths that a target's trials chose; the smaller strength wins a tie."""
        return self._chosen[(target or self.profile.targets[0]).title]

    @property
    def regularisers(self) -> dict[str, Regulariser]:
        """`chosen` for the primary target."""
        return self.chosen()

    def sweep(self, methods: Iterable[str] | None = None, budgets: Sequence[float] | None = None) -> pd.DataFrame:
        """The pruning sweep: one row per target, method, seed and budget. Also written to sweep.csv.

        A point that diverged, or started from one, has no row; `table.attrs["missing"]` and missing.csv say why.

        Args:
            methods: regularisers by name; default: all.
            budgets: default: all of the profile. The CSV is written for the whole sweep only.
        """
        p = self.profile
        names = list(methods or (c.regulariser.name for c in p.candidates))
        wanted = [b for b in p.budgets if budgets is None or b in budgets]
        points = [
            (target, self.chosen(target)[name], seed, budget)
            for target in p.targets
            for seed in p.seeds
            for name in names
            for budget in wanted
        ]
        results = self._compute([self.transfer_run(r, s, budget=b, target=t) for t, r, s, b in points])
        rows, missing = [], []
        for (target, regulariser, seed, budget), result in zip(points, results, strict=True):
            row = {"target": target.title, "method": regulariser.name, "strength": regulariser.strength, "seed": seed}
            if "diverged" in result.metrics:
                missing.append(row | {"budget": budget, "reason": result.metrics["diverged"], "run": result.id})
            else:
                rows.append(result.metrics | row | {"run": result.id})
        table = pd.DataFrame(rows, columns=COLUMNS)
        table.attrs["missing"] = missing
        if methods is None and budgets is None:
            self._write("sweep", table)
            columns = ["target", "method", "strength", "seed", "budget", "reason", "run"]
            self._write("missing", pd.DataFrame(missing, columns=columns))
        return table

    def point_run(
        self, method: str, seed: int, *, budget: float = 1.0, target: DataSource | None = None
    ) -> TransferRun:
        """Configuration of one point of the sweep, at the strength that the target's trials chose."""
        return self.transfer_run(self.chosen(target)[method], seed, budget=budget, target=target)

    def point(self, method: str, seed: int, budget: float, target: DataSource | None = None) -> runs.Result:
        """One finished point of the sweep, with its learning curve, gates and confusion matrix.

        Args:
            method: a regulariser by name.
            seed: of the profile.
            budget: of the profile.
            target: default: the primary one.
        """
        return self._compute([self.point_run(method, seed, budget=budget, target=target)])[0]

    # computing

    def _compute(self, configs: Sequence[TransferRun]) -> list[runs.Result]:
        """Results in the order asked for. Chains of budgets are computed side by side, each within one process."""
        missing = [config for config in configs if runs.lookup(config) is None]
        if missing:
            self.afs_source()
            chains: dict[TransferRun, list[TransferRun]] = {}
            for config in missing:
                chains.setdefault(replace(config, budgets=config.budgets[:1]), []).append(config)
            ordered = [sorted(chain, key=lambda c: len(c.budgets)) for chain in chains.values()]
            self._run_chains(ordered)
        return [self._publish(runs.get_or_run(config)) for config in configs]

    def _run_chains(self, chains: list[list[TransferRun]]) -> None:
        if self.workers == 1 or len(chains) == 1:
            for chain in chains:
                self._publish_all(_run_chain(chain, None))
            return
        # Started afresh, not forked: a process that has used torch's threads cannot be forked safely.
        with ProcessPoolExecutor(min(self.workers, len(chains)), mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(_run_chain, chain, 1) for chain in chains]
            try:
                for job in as_completed(jobs):
                    self._publish_all(job.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _publish_all(self, results: Iterable[runs.Result]) -> None:
        for result in results:
            self._publish(result)

    # files

    def publish_networks(self, points: Iterable[tuple[str, int, float]] = (("afd", 0, 1.0), ("afd", 0, 0.1))) -> Path:
        """Copies the sources and some points' networks to data/weights/<run id>.safetensors, with a model card.

        Args:
            points: (method, seed, budget) of the networks to keep, of the primary target. With none, the card is of the
                source networks alone, as far as they are trained.

        Raises:
            AFDSError: for the demo, whose networks are never committed, or one that is not in the store.
        """
        if not self.profile.committed:
            raise AFDSError(f"networks of the profile {self.profile.name} are never committed")
        points = list(points)
        sources = (("source", self.source_run), ("AFS source", self.afs_source_run))
        kept = [(n, self._publish(runs.get_or_run(c))) for n, c in sources if points or runs.lookup(c)]
        if not kept:
            raise AFDSError("no source network of this study is trained yet; `afds train` does that")
        primary = next(iter(self.targets))
        kept += [(f"{primary}, {m}, seed {s}, {1 / b:g}x", self.point(m, s, b)) for m, s, b in points]
        return keep_networks(kept, self.profile.name)


def _run_chain(chain: list[TransferRun], threads: int | None) -> list[runs.Result]:
    if threads is not None:
        torch.set_num_threads(threads)
    return [runs.get_or_run(config) for config in chain]


def run_stage(profile: Profile, stage: str) -> None:
    """Computes one stage of a study without notebooks.

    Args:
        profile: from `profiles.get`.
        stage: "train" (source, AFS source, trials and unpruned networks) or "sweep" (everything).
    """
    study = Study(profile)
    if stage == "train":
        study.afs_source()
        table = study.sweep(budgets=profile.budgets[:1])
    elif stage == "sweep":
        table = study.sweep()
    else:
        raise AFDSError(f"unknown stage {stage!r}; known are train and sweep")
    shown = table.groupby(["target", "method", "budget"], sort=False)[["test_accuracy", "macs", "parameters"]].mean()
    print(shown.to_string(float_format=lambda v: f"{v:.4g}"))


def plan(profile: Profile) -> str:
    """What a study would do here: stages, steps, MACs, disk, memory, and what is missing on this machine."""
    from afdslib.studies import plan as planning

    return planning.describe(Study(profile))
