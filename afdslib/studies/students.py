"""The two studies of students and teachers: attention transfer (notebook 06) and neuron selectivity transfer (07).

Both train students alone and beside a teacher, choose each method's weight on validation images with one seed of their
own, and report the test accuracy over other seeds. Where a final run fits every training image, no image is left for a
learning curve on validation images; the curves then come from runs of the same schedule on nine tenths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from afdslib import runs
from afdslib.base.errors import AFDSError
from afdslib.experiments import DataSource, Distillation, Network, StudentRun
from afdslib.losses import BetaSchedule
from afdslib.studies import engine
from afdslib.studies.profiles import names as profile_names
from afdslib.training import Optimisation

__all__ = [
    "STUDIES",
    "DistillationProfile",
    "DistillationStudy",
    "Job",
    "Method",
    "Pair",
    "get",
    "steps_to_reach",
]

STUDIES = ("attention", "selectivity")


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: in tables and figures.
        distillation: what is minimised; the weight's size is replaced by the chosen one.
        weights: tried on validation images; a single one is taken as it is.
        like: the method whose chosen weight is used, for variants that are not tuned themselves.
    """

    name: str
    distillation: Distillation
    weights: tuple[float, ...] = ()
    like: str = ""


@dataclass(frozen=True)
class Pair:
    """A student and its teacher.

    Attributes:
        methods: names of the methods compared.
        seeds: of the reported runs.
    """

    teacher: Network
    student: Network
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class DistillationProfile:
    """A study of students and teachers.

    Attributes:
        name: of the profile: "demo", "imagenet32" or "paper".
        scale: "quick" or "standard".
        study: "attention" or "selectivity".
        data: of the reported runs.
        trial_data: of trials and learning curves; holds a tenth back for validation.
        methods: everything that is compared, "alone" first.
        pairs: students and teachers; the weights are chosen on the first pair.
        teacher_training: of the teachers.
        student_training: of the students.
        trial: of a trial that chooses a weight.
        curves: methods of the first pair whose learning curves on validation images are drawn.
        trial_seed: of trials and curves; none of the pairs' seeds.
        weight_decay: of every network.
        committed: whether finished results go to data/results/ to be committed.
        not_run: what of this profile has never been run.
    """

    name: str
    scale: str
    study: str
    data: DataSource
    trial_data: DataSource
    methods: tuple[Method, ...]
    pairs: tuple[Pair, ...]
    teacher_training: Optimisation
    student_training: Optimisation
    trial: Optimisation
    curves: tuple[str, ...]
    trial_seed: int = 1000
    weight_decay: float = 5e-4
    committed: bool = True
    not_run: str = ""


# ---------------------------------------------------------------------------------------------------------- profiles


def _beta(kind: str = "constant", beta: float = 1.0) -> BetaSchedule:
    return BetaSchedule(kind, beta=beta)


def _attention_methods(
    at: tuple[float, ...] = (10.0, 100.0, 1000.0, 10000.0, 100000.0),
    nst: tuple[float, ...] = (5.0, 50.0, 500.0),
    hint: tuple[float, ...] = (0.01, 0.1, 1.0),
    gradient: tuple[float, ...] = (0.01, 0.1, 1.0),
) -> tuple[Method, ...]:
    """The table of notebook 06; the sizes of the weights are AT's beta in the code's scale, NST's lambda, and ours."""
    return (
        Method("alone", Distillation()),
        Method("hint", Distillation("hint", _beta()), hint),
        Method("at", Distillation("at", _beta()), at),
        Method("gradient-at", Distillation("gradient-at", _beta()), gradient),
        Method("kd", Distillation(hard=0.1, soft=0.9)),  # alpha 0.9, T 4 [code]
        Method("at-kd", Distillation("at", _beta("cosine"), hard=0.1, soft=0.9), like="at"),
        Method("nst", Distillation("nst", _beta(), taps="before-relu"), nst),
    )


def _attention_demo(scale: str) -> DistillationProfile:
    """Scikit-learn's digits 0 to 4 at 16 px: under a minute on a CPU, no download."""
    fit = Optimisation(steps=60, batch_size=16, lr=0.1, schedule="cosine", warmup=0.05, log_rows=10)
    methods = _attention_methods((0.1, 1.0, 10.0, 100.0, 1000.0), (5.0,), (0.1,), (0.1,))
    digits = DataSource("digits-0-4", size=16)
    everything = tuple(m.name for m in methods)
    return DistillationProfile(
        name="demo", scale=scale, study="attention", data=digits, trial_data=digits, methods=methods,
        pairs=(
            Pair(Network("wrn-10-2"), Network("wrn-10-1"), everything, (0, 1) if scale == "quick" else (0, 1, 2, 3)),
        ),
        teacher_training=replace(fit, steps=80, log_rows=4), student_training=fit,
        trial=replace(fit, steps=30, log_rows=1),
        curves=("alone", "at", "kd", "at-kd"), committed=False,
    )  # fmt: skip


def _attention_imagenet32(scale: str) -> DistillationProfile:
    """Real CIFAR-10, all 50,000 training images: a few epochs, hours on one CPU core; 20 epochs for standard."""
    epoch, standard = 390, scale == "standard"  # steps of 128 images in 50,000
    fit = Optimisation(
        steps=(20 if standard else 3) * epoch, batch_size=128, lr=0.1, schedule="cosine", warmup=0.02,
        precision="bf16", log_rows=16,
    )  # fmt: skip
    methods = _attention_methods()
    student, seeds = Network("wrn-16-1"), (0, 1, 2)
    return DistillationProfile(
        name="imagenet32", scale=scale, study="attention",
        data=DataSource("cifar10", per_class=5000, padding="reflect"),
        trial_data=DataSource("cifar10", padding="reflect"), methods=methods,
        pairs=(
            Pair(Network("wrn-16-2"), student, ("alone", "at", "kd", "at-kd", "nst"), seeds),
            Pair(Network("wrn-40-1"), student, ("at",), seeds[:1]),
            # Two backward passes through each other take seconds per step on a CPU: an hour for one quick student.
            Pair(Network("wrn-16-2"), student, ("hint", "gradient-at") if standard else ("hint",), seeds[:1]),
        ),
        teacher_training=replace(fit, steps=(20 if standard else 6) * epoch), student_training=fit,
        trial=replace(fit, steps=epoch, log_rows=4),
        curves=("alone", "at", "kd", "at-kd", "nst"),
    )  # fmt: skip


def _attention_paper(scale: str) -> DistillationProfile:
    """The recipe of the attention-transfer code: 200 epochs, lr 0.1 x0.2 at 60, 120 and 160, batch 128. [code]"""
    epoch = 390
    fit = Optimisation(
        steps=(200 if scale == "standard" else 40) * epoch, batch_size=128, lr=0.1, schedule="milestones",
        milestones=(0.3, 0.6, 0.8), drop=0.2, log_rows=40,
    )  # fmt: skip
    methods = _attention_methods()
    everything, seeds = tuple(m.name for m in methods), (0, 1, 2, 3, 4)
    pairs = (("wrn-16-2", "wrn-16-1"), ("wrn-40-1", "wrn-16-1"), ("wrn-40-2", "wrn-16-2"))
    return DistillationProfile(
        name="paper", scale=scale, study="attention",
        data=DataSource("cifar10", per_class=5000, padding="reflect"),
        trial_data=DataSource("cifar10", padding="reflect"), methods=methods,
        pairs=tuple(Pair(Network(t), Network(s), everything, seeds) for t, s in pairs),
        teacher_training=fit, student_training=fit, trial=replace(fit, steps=20 * epoch, log_rows=4), curves=everything,
        not_run="The paper profile (200 epochs with --scale standard) has not been run: it takes GPU days.",
    )  # fmt: skip


def _selectivity_methods(weights: dict[str, tuple[float, ...]]) -> tuple[Method, ...]:
    """The table of notebook 07: three kernels, NST + KD as in NST's code, and the tap behind the ReLU.

    A kernel without weights of its own takes the polynomial one's.
    """

    def nst(kernel: str, taps: str = "before-relu", soft: float = 0.0) -> Distillation:
        return Distillation("nst", _beta(), kernel=kernel, taps=taps, soft=soft)

    return (
        Method("alone", Distillation()),
        Method("kd", Distillation(soft=1.0)),  # CE + 16 x soft CE at T = 4 [code]
        Method("nst-poly", nst("poly"), weights["poly"]),
        *(
            Method(f"nst-{kernel}", nst(kernel), weights[kernel], "" if weights[kernel] else "nst-poly")
            for kernel in ("linear", "gaussian")
        ),
        Method("nst-poly+kd", nst("poly", soft=1.0), like="nst-poly"),
        Method("nst-poly, after ReLU", nst("poly", "after-relu"), like="nst-poly"),
    )


def _selectivity_demo(scale: str) -> DistillationProfile:
    """Scikit-learn's digits 0 to 4 at 16 px, a wide ResNet as the teacher and a narrow Inception-BN."""
    fit = Optimisation(steps=50, batch_size=16, lr=0.05, schedule="cosine", warmup=0.05, log_rows=5)
    methods = _selectivity_methods({"poly": (5.0,), "linear": (), "gaussian": ()})
    digits = DataSource("digits-0-4", size=16)
    return DistillationProfile(
        name="demo", scale=scale, study="selectivity", data=digits, trial_data=digits, methods=methods,
        pairs=(
            Pair(
                Network("wrn-10-2"), Network("inception_bn", stem="cifar", width=0.125),
                tuple(m.name for m in methods), (0, 1) if scale == "quick" else (0, 1, 2, 3),
            ),
        ),
        # The teacher of notebook 06.
        teacher_training=_attention_demo(scale).teacher_training, student_training=fit,
        trial=fit, curves=(), committed=False,
    )  # fmt: skip


def _selectivity_imagenet32(scale: str) -> DistillationProfile:
    """CIFAR-10: the WRN-16-2 of notebook 06 teaches an Inception-BN of an eighth of its width."""
    attention, epoch = _attention_imagenet32(scale), 390
    fit = replace(attention.student_training, steps=2 * epoch, log_rows=4)
    methods = _selectivity_methods({"poly": (5.0, 50.0, 500.0), "linear": (), "gaussian": ()})
    return replace(
        attention, study="selectivity", methods=methods,
        pairs=(
            Pair(
                Network("wrn-16-2"), Network("inception_bn", stem="cifar", width=0.125),
                tuple(m.name for m in methods), (0, 1),
            ),
        ),
        student_training=fit, trial=replace(fit, steps=epoch, log_rows=2), curves=(),
    )  # fmt: skip


def _selectivity_paper(scale: str) -> DistillationProfile:
    """CIFAR-10 with NST's optimiser: Nesterov, lr 0.1 x0.1 at 30, 60 and 90 % of the run, weight decay 1e-4. [code]"""
    attention = _attention_paper(scale)
    fit = replace(attention.student_training, nesterov=True, milestones=(0.3, 0.6, 0.9), drop=0.1)
    methods = _selectivity_methods(dict.fromkeys(("poly", "linear", "gaussian"), (5.0, 50.0, 500.0)))
    return replace(
        attention, study="selectivity", methods=methods,
        pairs=(
            Pair(
                Network("wrn-40-2"), Network("inception_bn", stem="cifar", width=0.5),
                tuple(m.name for m in methods), (0, 1, 2, 3, 4),
            ),
        ),
        student_training=fit, trial=replace(fit, steps=attention.trial.steps, log_rows=2), curves=(), weight_decay=1e-4,
        not_run="The paper profile has not been run: it takes GPU days; NST's ImageNet recipe is a command of its own.",
    )  # fmt: skip


_PROFILES: dict[tuple[str, str], Callable[[str], DistillationProfile]] = {
    ("attention", "demo"): _attention_demo,
    ("attention", "imagenet32"): _attention_imagenet32,
    ("attention", "paper"): _attention_paper,
    ("selectivity", "demo"): _selectivity_demo,
    ("selectivity", "imagenet32"): _selectivity_imagenet32,
    ("selectivity", "paper"): _selectivity_paper,
}


def get(study: str, profile: str, scale: str | None = None, data_dir: str | None = None) -> DistillationProfile:
    """A study of a profile.

    Args:
        study: "attention" or "selectivity".
        profile: "demo", "imagenet32" or "paper".
        scale: "quick" (the default) or "standard".
        data_dir: the folder in which the data set's archive or tree lies; by default it is downloaded to data/raw.

    Raises:
        AFDSError: for an unknown study, profile or scale.
    """
    if study not in STUDIES:
        raise AFDSError(f"unknown study {study!r}; known are {', '.join(STUDIES)}")
    if profile not in profile_names():
        raise AFDSError(f"unknown profile {profile!r}; known are {', '.join(profile_names())}")
    # Variants of a profile differ in what AFDS transfers from; their students are those of the profile itself.
    profile = profile if (study, profile) in _PROFILES else profile.split("-")[0]
    if (scale or "quick") not in ("quick", "standard"):
        raise AFDSError(f"unknown scale {scale!r}; known are quick and standard")
    found = _PROFILES[study, profile](scale or "quick")
    if data_dir:
        data, trial_data = (replace(d, root=str(data_dir)) for d in (found.data, found.trial_data))
        found = replace(found, data=data, trial_data=trial_data)
    return found


# ------------------------------------------------------------------------------------------------------------- study


def steps_to_reach(steps: Sequence[float], accuracy: Sequence[float], target: float) -> float | None:
    """The first logged step at which a learning curve reaches a target; None if it never does.

    Args:
        steps: optimiser steps, increasing.
        accuracy: at these steps.
        target: accuracy to reach.

    Raises:
        AFDSError: the two have different lengths.
    """
    if len(steps) != len(accuracy):
        raise AFDSError(f"a learning curve has {len(steps)} steps and {len(accuracy)} accuracies; give one for each")
    return next((float(s) for s, a in zip(steps, accuracy, strict=True) if a >= target), None)


@dataclass(frozen=True)
class Job:
    """One run of a study, and what it is for.

    Attributes:
        kind: "teacher", "trial", "student" or "curve".
        config: of the run.
        method: its name; empty for a teacher.
        weight: of the transfer loss; 0 where there is none.
        teacher: the name of its teacher; empty for one.
    """

    kind: str
    config: StudentRun
    method: str = ""
    weight: float = 0.0
    teacher: str = ""


COLUMNS = [
    "teacher", "student", "method", "weight", "seed", "test_accuracy", "test_loss", "parameters", "macs", "steps",
    "training_macs", "run",
]  # fmt: skip


class DistillationStudy(engine.Plan):
    """The runs of a study as a plan, and the tables made from them.

    Args:
        profile: from `get`.
        complete: False never trains: the tables then hold what is finished so far.
        workers: processes that train at a time; default: see `engine.compute`.
    """

    def __init__(self, profile: DistillationProfile, *, complete: bool = True, workers: int | None = None):
        super().__init__(profile)
        self.part, self.complete, self.workers = profile.study, complete, workers
        self.methods = {m.name: m for m in profile.methods}
        self._weights: dict[str, float] = {}
        self._done: list[tuple[Job, runs.Result]] | None = None
        for name in (*(n for pair in profile.pairs for n in pair.methods), *profile.curves):
            if name not in self.methods:
                raise AFDSError(f"unknown method {name!r}; known are {', '.join(self.methods)}")

    # configurations

    def teacher_run(self, network: Network) -> StudentRun:
        """A teacher: trained alone, with seed 0."""
        p = self.profile
        return StudentRun(p.data, network, p.teacher_training, weight_decay=p.weight_decay)

    def student_run(self, pair: Pair, method: str, seed: int, *, weight: float | None = None) -> StudentRun:
        """A student of the table, at the chosen weight unless one is given."""
        p, d = self.profile, self.methods[method].distillation
        if d.transfer != "none":
            weight = self.weight(method) if weight is None else weight
            d = replace(d, weight=replace(d.weight, beta=float(weight)))
        return StudentRun(
            data=replace(p.data, seed=seed), network=pair.student, optimisation=p.student_training, method=d,
            teacher=self.teacher_run(pair.teacher) if d.needs_teacher else None, weight_decay=p.weight_decay, seed=seed,
        )  # fmt: skip

    def trial_run(self, method: str, weight: float) -> StudentRun:
        """A trial of a weight: short, on the trial data; no test image is read."""
        return replace(self.curve_run(method, weight=weight), optimisation=self.profile.trial)

    def curve_run(self, method: str, *, weight: float | None = None) -> StudentRun:
        """A student of the first pair with the table's schedule on the trial data, for its learning curve."""
        p = self.profile
        run = self.student_run(p.pairs[0], method, p.trial_seed, weight=weight)
        return replace(run, data=replace(p.trial_data, seed=p.trial_seed), use_test=False)

    def weight(self, method: str) -> float:
        """The weight that the trials chose; the smaller one wins a tie."""
        m = self.methods[method]
        if m.like:
            return self.weight(m.like)
        if len(m.weights) == 1:
            return m.weights[0]
        if method not in self._weights:
            tried = {w: self.result(self.trial_run(method, w)).metrics for w in sorted(m.weights)}
            self._weights[method] = max(tried, key=lambda w: tried[w].get("validation_accuracy", -math.inf))
        return self._weights[method]

    def jobs(self) -> Iterator[Job]:
        """Every run once, in an order that gives a whole table as early as possible.

        The trials of a method come before its first student, whose weight they choose; so take them one by one.
        """
        seen = set()
        for job in self._jobs():
            if (key := (job.kind, job.method, runs.run_id(job.config))) not in seen:
                seen.add(key)
                yield job

    def _jobs(self) -> Iterator[Job]:
        p, first = self.profile, self.profile.pairs[0]
        yield self._teacher(first)
        for seed in first.seeds:
            for method in first.methods:
                yield from self._student(first, method, seed)
        for method in p.curves if p.data != p.trial_data else ():
            yield Job("curve", self.curve_run(method), method, self._size(method), first.teacher.name)
        for pair in p.pairs[1:]:
            yield self._teacher(pair)
            for seed in pair.seeds:
                for method in pair.methods:
                    yield from self._student(pair, method, seed)

    def _teacher(self, pair: Pair) -> Job:
        return Job("teacher", self.teacher_run(pair.teacher))

    def _student(self, pair: Pair, method: str, seed: int) -> Iterator[Job]:
        tuned = self.methods[method].like or method
        weights = self.methods[tuned].weights
        for weight in weights if len(weights) > 1 else ():
            yield Job("trial", self.trial_run(tuned, weight), tuned, weight, self.profile.pairs[0].teacher.name)
        config = self.student_run(pair, method, seed)
        yield Job("student", config, method, self._size(method), pair.teacher.name if config.teacher else "")

    def _size(self, method: str) -> float:
        return self.weight(method) if self.methods[method].distillation.transfer != "none" else 0.0

    # results

    def result(self, config: StudentRun) -> runs.Result:
        """A run's result, computed if need be.

        Raises:
            Unfinished: it is not there, and this study never trains.
        """
        return runs.get_or_run(config) if self.complete else engine.lookup(config)

    def results(self) -> list[tuple[Job, runs.Result]]:
        """Every run with its result. With `complete=False` up to the first one that is not finished."""
        if self._done is None:
            if self.complete:
                engine.compute(self, self.workers)
            done = []
            for job in self.jobs():
                if not self.complete and runs.lookup(job.config) is None:
                    break
                done.append((job, self.result(job.config)))
            self._done = done
        return self._done

    def _first(self) -> list[Job]:
        """The teachers and the trials, which choose the weights of the students."""
        used = [name for pair in self.profile.pairs for name in pair.methods]
        tuned = {self.methods[name].like or name for name in (*used, *self.profile.curves)}
        teacher = self.profile.pairs[0].teacher.name
        trials = [
            Job("trial", self.trial_run(m.name, weight), m.name, weight, teacher)
            for m in self.profile.methods
            if m.name in tuned and len(m.weights) > 1
            for weight in m.weights
        ]
        return [*map(self._teacher, self.profile.pairs), *trials]

    def table(self) -> pd.DataFrame:
        """One row per teacher and student, with the test accuracy.

        A run that diverged has no row; `table.attrs["missing"]` says why.
        """
        rows, missing = [], []
        for job, result in self.results():
            if job.kind not in ("teacher", "student"):
                continue
            row = {
                "teacher": job.teacher, "student": job.config.network.name, "method": job.method or "teacher",
                "weight": job.weight, "seed": job.config.seed, "run": result.id,
            }  # fmt: skip
            if "diverged" in result.metrics:
                missing.append(row | {"reason": result.metrics["diverged"]})
            else:
                rows.append(result.metrics | row)
        table = pd.DataFrame(rows, columns=COLUMNS)
        table.attrs["missing"] = missing
        return table

    def trials(self) -> pd.DataFrame:
        """Every weight tried, with its accuracy on validation images."""
        rows = [
            {"method": job.method, "strength": job.weight, "run": result.id}
            | {"validation_accuracy": result.metrics.get("validation_accuracy", math.nan)}
            for job, result in self.results()
            if job.kind == "trial"
        ]
        return pd.DataFrame(rows, columns=["method", "strength", "validation_accuracy", "run"])

    def curves(self) -> dict[str, pd.DataFrame]:
        """One learning curve on validation images by method; the first student's where the data keep validation."""
        kind = "student" if self.profile.data == self.profile.trial_data else "curve"
        return self._logged(kind, self.profile.curves)

    def histories(self) -> dict[str, pd.DataFrame]:
        """Logged rows of the first student of each method of the first pair."""
        return self._logged("student", self.profile.pairs[0].methods)

    def _logged(self, kind: str, methods: Sequence[str]) -> dict[str, pd.DataFrame]:
        found: dict[str, pd.DataFrame] = {}
        for job, result in self.results():
            if job.kind == kind and job.method in methods and job.method not in found:
                found[job.method] = result.history()
        return found

    def reach(self, share: float = 0.9) -> pd.DataFrame:
        """Steps until each curve reaches a share of the plain student's final validation accuracy.

        Returns:
            method, steps (NaN if never), target (the accuracy), total (steps of the run).
        """
        curves, rows = self.curves(), []
        if "alone" in curves:
            target = share * float(curves["alone"].validation_accuracy.iloc[-1])
            for method, curve in curves.items():
                steps = steps_to_reach(curve.step.tolist(), curve.validation_accuracy.tolist(), target)
                rows.append(
                    {
                        "method": method, "steps": math.nan if steps is None else steps, "target": target,
                        "total": int(curve.step.iloc[-1]),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows, columns=["method", "steps", "target", "total"])

    # plan

    def batches(self) -> Iterator[list[engine.Cell]]:
        """Teachers and trials; then students, at the weights that these choose, and learning curves."""
        first = self._first()
        yield [self._cell(job) for job in first]
        for job in first:
            engine.lookup(job.config)
        yield [self._cell(job) for job in self.jobs() if job.kind not in ("teacher", "trial")]

    def _cell(self, job: Job) -> engine.Cell:
        keys = {"teacher": job.teacher, "network": job.config.network.name, "seed": job.config.seed}
        if job.kind == "trial":
            keys = {}
        return engine.Cell(job.config, job.kind, keys | {"method": job.method or "teacher", "strength": job.weight})

    def measured(self, cell: engine.Cell, result: runs.Result) -> Mapping[str, Any]:
        """A run's figures; of a trial its validation accuracy alone."""
        if cell.role == "trial":
            return {"validation_accuracy": result.metrics.get("validation_accuracy")}
        return result.metrics

    def networks(self) -> Iterator[tuple[str, StudentRun]]:
        """The first teacher and its first students, alone and by attention transfer."""
        pair = self.profile.pairs[0]
        configs = [("teacher", self.teacher_run(pair.teacher))]
        if all(runs.lookup(job.config) is not None for job in self._first()):
            methods = [method for method in ("alone", "at") if method in pair.methods]
            configs += [(method, self.student_run(pair, method, pair.seeds[0])) for method in methods]
        yield from ((f"{config.network.name}, {name}", config) for name, config in configs)
