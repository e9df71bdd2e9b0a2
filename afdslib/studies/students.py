"""The two studies of students and teachers: attention transfer (notebook 06) and neuron selectivity transfer (07).

Both train students alone and beside a teacher, choose each method's weight on validation images with one seed of their
own, and report the test accuracy over other seeds. Where a final run fits every training image, no image is left for a
learning curve on validation images; the curves then come from runs of the same schedule on nine tenths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from afdslib import runs
from afdslib.base.errors import AFDSError
from afdslib.experiments import DataSource, Distillation, Network, StudentRun
from afdslib.losses import BetaSchedule
from afdslib.studies import engine
from afdslib.studies.engine import Cell
from afdslib.studies.profiles import names as profile_names
from afdslib.training import Optimisation

__all__ = ["STUDIES", "DistillationProfile", "DistillationStudy", "Method", "Pair", "get", "has"]

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
    """A student and its teacher, with the names of the methods compared and the seeds of the reported runs."""

    teacher: Network
    student: Network
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class DistillationProfile:
    """A study of students and teachers.

    Attributes:
        name, scale, study: "demo", "imagenet32" or "paper"; "quick" or "standard"; "attention" or "selectivity".
        data, trial_data: of the reported runs; of trials and learning curves, with a tenth held back for validation.
        methods: everything that is compared, "alone" first.
        pairs: students and teachers; the weights are chosen on the first pair.
        teacher_training, student_training: of the reported runs.
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


# profiles


def _attention_methods(
    at: tuple[float, ...] = (10.0, 100.0, 1000.0, 10000.0, 100000.0),
    nst: tuple[float, ...] = (5.0, 50.0, 500.0),
    hint: tuple[float, ...] = (0.01, 0.1, 1.0),
    gradient: tuple[float, ...] = (0.01, 0.1, 1.0),
) -> tuple[Method, ...]:
    """The table of notebook 06; the sizes of the weights are AT's beta in the code's scale, NST's lambda, and ours."""
    beta, kd = BetaSchedule(), Distillation(hard=0.1, soft=0.9)  # alpha 0.9, T 4 [code]
    return (
        Method("alone", Distillation()),
        Method("hint", Distillation("hint", beta), hint),
        Method("at", Distillation("at", beta), at),
        Method("gradient-at", Distillation("gradient-at", beta), gradient),
        Method("kd", kd),
        Method("at-kd", replace(kd, transfer="at", weight=BetaSchedule("cosine")), like="at"),
        Method("nst", Distillation("nst", beta, taps="before-relu"), nst),
    )


def _names(methods: Sequence[Method]) -> tuple[str, ...]:
    return tuple(method.name for method in methods)


def _attention_demo(scale: str) -> DistillationProfile:
    """Scikit-learn's digits 0 to 4 at 16 px: under a minute on a CPU, no download."""
    fit = Optimisation(steps=60, batch_size=16, lr=0.1, schedule="cosine", warmup=0.05, log_rows=10)
    methods = _attention_methods((0.1, 1.0, 10.0, 100.0, 1000.0), (5.0,), (0.1,), (0.1,))
    digits, seeds = DataSource("digits-0-4", size=16), (0, 1) if scale == "quick" else (0, 1, 2, 3)
    return DistillationProfile(
        name="demo", scale=scale, study="attention", data=digits, trial_data=digits, methods=methods,
        pairs=(Pair(Network("wrn-10-2"), Network("wrn-10-1"), _names(methods), seeds),),
        teacher_training=replace(fit, steps=80, log_rows=4), student_training=fit,
        trial=replace(fit, steps=30, log_rows=1), curves=("alone", "at", "kd", "at-kd"), committed=False,
    )  # fmt: skip


def _attention_imagenet32(scale: str) -> DistillationProfile:
    """Real CIFAR-10, all 50,000 training images: a few epochs, hours on one CPU core; 20 epochs for standard."""
    epoch, standard = 390, scale == "standard"  # steps of 128 images in 50,000
    fit = Optimisation(
        steps=(20 if standard else 3) * epoch, batch_size=128, lr=0.1, schedule="cosine", warmup=0.02,
        precision="bf16", log_rows=16,
    )  # fmt: skip
    teacher, student, seeds = Network("wrn-16-2"), Network("wrn-16-1"), (0, 1, 2)
    return DistillationProfile(
        name="imagenet32", scale=scale, study="attention",
        data=DataSource("cifar10", per_class=5000, padding="reflect"),
        trial_data=DataSource("cifar10", padding="reflect"), methods=_attention_methods(),
        pairs=(
            Pair(teacher, student, ("alone", "at", "kd", "at-kd", "nst"), seeds),
            Pair(Network("wrn-40-1"), student, ("at",), seeds[:1]),
            # Two backward passes through each other take seconds per step on a CPU: an hour for one quick student.
            Pair(teacher, student, ("hint", "gradient-at") if standard else ("hint",), seeds[:1]),
        ),
        teacher_training=replace(fit, steps=(20 if standard else 6) * epoch), student_training=fit,
        trial=replace(fit, steps=epoch, log_rows=4), curves=("alone", "at", "kd", "at-kd", "nst"),
    )  # fmt: skip


def _attention_paper(scale: str) -> DistillationProfile:
    """The recipe of the attention-transfer code: 200 epochs, lr 0.1 x0.2 at 60, 120 and 160, batch 128. [code]"""
    epoch, methods = 390, _attention_methods()
    fit = Optimisation(
        steps=(200 if scale == "standard" else 40) * epoch, batch_size=128, lr=0.1, schedule="milestones",
        milestones=(0.3, 0.6, 0.8), drop=0.2, log_rows=40,
    )  # fmt: skip
    pairs = (("wrn-16-2", "wrn-16-1"), ("wrn-40-1", "wrn-16-1"), ("wrn-40-2", "wrn-16-2"))
    return DistillationProfile(
        name="paper", scale=scale, study="attention",
        data=DataSource("cifar10", per_class=5000, padding="reflect"),
        trial_data=DataSource("cifar10", padding="reflect"), methods=methods,
        pairs=tuple(Pair(Network(t), Network(s), _names(methods), (0, 1, 2, 3, 4)) for t, s in pairs),
        teacher_training=fit, student_training=fit, trial=replace(fit, steps=20 * epoch, log_rows=4),
        curves=_names(methods),
        not_run="The paper profile (200 epochs with --scale standard) has not been run: it takes GPU days.",
    )  # fmt: skip


def _selectivity(
    attention: DistillationProfile, fit: Optimisation, trial: Optimisation, teacher: str, width: float,
    seeds: tuple[int, ...], poly: tuple[float, ...], others: tuple[float, ...] = (), **changes: object,
) -> DistillationProfile:  # fmt: skip
    """The table of notebook 07: three kernels, NST + KD as in NST's code, and the tap behind the ReLU.

    The linear and the Gaussian kernel take the polynomial one's weight where they have none of their own.
    """
    nst = Distillation("nst", BetaSchedule(), taps="before-relu")
    like = "" if others else "nst-poly"
    methods = (
        Method("alone", Distillation()),
        Method("kd", Distillation(soft=1.0)),  # CE + 16 x soft CE at T = 4 [code]
        Method("nst-poly", nst, poly),
        Method("nst-linear", replace(nst, kernel="linear"), others, like),
        Method("nst-gaussian", replace(nst, kernel="gaussian"), others, like),
        Method("nst-poly+kd", replace(nst, soft=1.0), like="nst-poly"),
        Method("nst-poly, after ReLU", replace(nst, taps="after-relu"), like="nst-poly"),
    )
    pair = Pair(Network(teacher), Network("inception_bn", stem="cifar", width=width), _names(methods), seeds)
    return replace(
        attention, study="selectivity", methods=methods, pairs=(pair,), student_training=fit, trial=trial, curves=(),
        **changes,  # type: ignore[arg-type]
    )  # fmt: skip


def _selectivity_demo(scale: str) -> DistillationProfile:
    """Scikit-learn's digits, the wide ResNet of notebook 06 as the teacher and a narrow Inception-BN."""
    fit = Optimisation(steps=50, batch_size=16, lr=0.05, schedule="cosine", warmup=0.05, log_rows=5)
    attention = _attention_demo(scale)
    return _selectivity(attention, fit, fit, "wrn-10-2", 0.125, attention.pairs[0].seeds, (5.0,))


def _selectivity_imagenet32(scale: str) -> DistillationProfile:
    """CIFAR-10: the WRN-16-2 of notebook 06 teaches an Inception-BN of an eighth of its width."""
    attention, epoch = _attention_imagenet32(scale), 390
    fit = replace(attention.student_training, steps=2 * epoch, log_rows=4)
    trial = replace(fit, steps=epoch, log_rows=2)
    return _selectivity(attention, fit, trial, "wrn-16-2", 0.125, (0, 1), (5.0, 50.0, 500.0))


def _selectivity_paper(scale: str) -> DistillationProfile:
    """CIFAR-10 with NST's optimiser: Nesterov, lr 0.1 x0.1 at 30, 60 and 90 % of the run, weight decay 1e-4. [code]"""
    attention, weights = _attention_paper(scale), (5.0, 50.0, 500.0)
    fit = replace(attention.student_training, nesterov=True, milestones=(0.3, 0.6, 0.9), drop=0.1)
    trial = replace(fit, steps=attention.trial.steps, log_rows=2)
    note = "The paper profile has not been run: it takes GPU days; NST's ImageNet recipe is a command of its own."
    return _selectivity(
        attention, fit, trial, "wrn-40-2", 0.5, (0, 1, 2, 3, 4), weights, weights, weight_decay=1e-4, not_run=note
    )


_PROFILES: dict[str, dict[str, Callable[[str], DistillationProfile]]] = {
    "attention": {"demo": _attention_demo, "imagenet32": _attention_imagenet32, "paper": _attention_paper},
    "selectivity": {"demo": _selectivity_demo, "imagenet32": _selectivity_imagenet32, "paper": _selectivity_paper},
}


def _family(study: str, profile: str) -> str:
    """Variants of a profile differ in what AFDS transfers from; their students are those of the profile itself."""
    return profile if profile in _PROFILES[study] else profile.split("-")[0]


def has(study: str, profile: str) -> bool:
    """Whether a profile has this study of students."""
    return _family(study, profile) in _PROFILES[study]


def get(study: str, profile: str, scale: str | None = None, data_dir: str | None = None) -> DistillationProfile:
    """A study of a profile.

    Args:
        study: one of `STUDIES`.
        profile, scale, data_dir: see `profiles.get`.

    Raises:
        AFDSError: for an unknown study, profile or scale.
    """
    scale = scale or "quick"
    known = {"study": (study, STUDIES), "profile": (profile, profile_names()), "scale": (scale, ("quick", "standard"))}
    for what, (name, names) in known.items():
        if name not in names:
            raise AFDSError(f"unknown {what} {name!r}; known are {', '.join(names)}")
    profile = _family(study, profile)
    if not has(study, profile):
        raise AFDSError(f"the profile {profile} has no students; {', '.join(_PROFILES[study])} have some")
    chosen = _PROFILES[study][profile](scale)
    if data_dir:
        data, trial_data = (replace(d, root=str(data_dir)) for d in (chosen.data, chosen.trial_data))
        chosen = replace(chosen, data=data, trial_data=trial_data)
    return chosen


# the study

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
        self._results: list[tuple[Cell, runs.Result]] | None = None
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

    # the plan

    def batches(self) -> Iterator[list[Cell]]:
        """Teachers and trials; then students, at the weights that these choose, and learning curves."""
        first = self._first()
        yield first
        for cell in first:
            engine.lookup(cell.config)
        yield self._students()

    def _first(self) -> list[Cell]:
        """The teachers, and the trials of all methods that are used and tuned."""
        p = self.profile
        configs = [self.teacher_run(network) for network in dict.fromkeys(pair.teacher for pair in p.pairs)]
        cells = [self._cell("teacher", config, "teacher") for config in configs]
        used = (*(name for pair in p.pairs for name in pair.methods), *p.curves)
        tuned = {self.methods[name].like or name for name in used}
        for m in p.methods:
            for weight in m.weights if m.name in tuned and len(m.weights) > 1 else ():
                cells.append(Cell(self.trial_run(m.name, weight), "trial", {"method": m.name, "strength": weight}))
        return cells

    def _students(self) -> list[Cell]:
        """Every student once, seed by seed, so that a whole table is there as early as possible; then the curves."""
        p = self.profile
        cells: dict[tuple[str, str], Cell] = {}
        for pair in p.pairs:
            for seed in pair.seeds:
                for method in pair.methods:
                    config = self.student_run(pair, method, seed)
                    teacher = pair.teacher.name if config.teacher else ""
                    cells.setdefault((method, runs.run_id(config)), self._cell("student", config, method, teacher))
            for method in p.curves if pair is p.pairs[0] and p.data != p.trial_data else ():
                cells["curve", method] = self._cell("curve", self.curve_run(method), method, pair.teacher.name)
        return list(cells.values())

    def _cell(self, role: str, config: StudentRun, method: str, teacher: str = "") -> Cell:
        weight = config.method.weight.beta if config.method.transfer != "none" else 0.0
        keys = {"teacher": teacher, "network": config.network.name, "seed": config.seed}
        return Cell(config, role, keys | {"method": method, "strength": weight})

    def networks(self) -> Iterator[tuple[str, StudentRun]]:
        """The first teacher and its first students, alone and by attention transfer."""
        pair = self.profile.pairs[0]
        configs = [("teacher", self.teacher_run(pair.teacher))]
        if all(runs.lookup(cell.config) is not None for cell in self._first()):
            methods = [method for method in ("alone", "at") if method in pair.methods]
            configs += [(method, self.student_run(pair, method, pair.seeds[0])) for method in methods]
        yield from ((f"{config.network.name}, {name}", config) for name, config in configs)

    # results

    def result(self, config: StudentRun) -> runs.Result:
        """A run's result, computed if need be.

        Raises:
            Unfinished: it is not there, and this study never trains.
        """
        return runs.get_or_run(config) if self.complete else engine.lookup(config)

    def results(self) -> list[tuple[Cell, runs.Result]]:
        """Every run with its result; with `complete=False` what is finished."""
        if self._results is None:
            if self.complete:
                engine.compute(self, self.workers)
            self._results = [(cell, result) for cell, result in engine.cells(self) if result is not None]
        return self._results

    def table(self) -> pd.DataFrame:
        """One row per teacher and student, with the test accuracy.

        A run that diverged has no row; `table.attrs["missing"]` says why.
        """
        found = [(cell.keys, result) for cell, result in self.results() if cell.role in ("teacher", "student")]
        rows = (({**k, "student": k["network"], "weight": k["strength"]}, result) for k, result in found)
        return engine.frame(rows, COLUMNS)

    def trials(self) -> pd.DataFrame:
        """Every weight tried, with its accuracy on validation images."""
        found = [(cell, result) for cell, result in self.results() if cell.role == "trial"]
        rows = [{**cell.keys, **self.measured(cell, result), "run": result.id} for cell, result in found]
        return pd.DataFrame(rows, columns=["method", "strength", "validation_accuracy", "run"])

    def curves(self) -> dict[str, pd.DataFrame]:
        """One learning curve on validation images by method; the first student's where the data keep validation."""
        kind = "student" if self.profile.data == self.profile.trial_data else "curve"
        return self._logged(kind, self.profile.curves)

    def histories(self) -> dict[str, pd.DataFrame]:
        """Logged rows of the first student of each method of the first pair."""
        return self._logged("student", self.profile.pairs[0].methods)

    def _logged(self, role: str, methods: Sequence[str]) -> dict[str, pd.DataFrame]:
        logs: dict[str, pd.DataFrame] = {}
        for cell, result in self.results():
            if cell.role == role and (method := cell.keys["method"]) in methods and method not in logs:
                logs[method] = result.history()
        return logs

    def reach(self, share: float = 0.9) -> pd.DataFrame:
        """Steps until each curve reaches a share of the plain student's final validation accuracy.

        Returns:
            method, steps (the first logged step at which it does; NaN if never), target (the accuracy), total (steps of
            the run).
        """
        curves, rows = self.curves(), []
        if "alone" in curves:
            target = share * float(curves["alone"].validation_accuracy.iloc[-1])
            for method, curve in curves.items():
                steps = float(curve.step[curve.validation_accuracy >= target].min())
                rows.append((method, steps, target, int(curve.step.iloc[-1])))
        return pd.DataFrame(rows, columns=["method", "steps", "target", "total"])
