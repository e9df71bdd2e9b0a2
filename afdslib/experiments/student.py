"""Training a student beside a teacher: attention transfer, distillation, neuron selectivity transfer, hints.

StudentRun (the teacher: a network trained alone) -> StudentRun (a student with that teacher)
Published | PhotoRun (the teacher) -> PhotoRun (a student with that teacher), on photographs and by several processes

    loss = hard * CE + soft * T^2 KL + weight(t) * sum over layers of the transfer loss

AT and KD follow Zagoruyko, Komodakis, arXiv 1612.03928; NST follows Huang, Wang, arXiv 1707.01219.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from afdslib import backbones, runs, training
from afdslib.afs import macs
from afdslib.backbones.inputs import expect, input_of, input_statistics, set_input
from afdslib.base.checks import choice, number, whole
from afdslib.base.errors import AFDSError, DivergedError
from afdslib.data import Splits, sealed
from afdslib.experiments.config import DataSource, Network, Photographs, Published
from afdslib.experiments.measure import input_size
from afdslib.experiments.source import keep, network_of
from afdslib.losses import BetaSchedule
from afdslib.losses.kd import SoftLabels
from afdslib.losses.term import TRANSFERS, Pair, Term, TermContext
from afdslib.training import Optimisation, distributed
from afdslib.training.features import pair_layers
from afdslib.training.objective import Objective

__all__ = ["TAPS", "Distillation", "PhotoRun", "StudentRun", "classes_of", "paired", "student_objective", "tapped"]

TAPS = ("groups", "last", "before-relu", "after-relu")


@dataclass(frozen=True)
class Distillation:
    """What a student minimises; the default is plain training, the student alone.

    Attributes:
        transfer: "none", "at" (activation-based attention), "gradient-at" (double backward), "hint" (F-ActT, a squared
            difference behind a 1x1 adapter) or "nst".
        weight: of the transfer loss, step by step: AT's beta, NST's lambda. In mode "paper" AT takes weight / 2, as the
            paper's equation 2 does.
        hard: weight of the cross-entropy.
        soft: weight of T^2 KL(teacher || student). KD with alpha: hard = 1 - alpha, soft = alpha; NST's code for
            NST + KD: hard = soft = 1 (CE + 16 x soft CE at T = 4 has that gradient). [code]
        temperature: T of the soft term.
        mode: of AT: "code" or "paper"; see `losses.at_loss`.
        exponent: p of AT.
        kernel: of NST: "poly", "linear" or "gaussian".
        degree, offset: d and c of the polynomial kernel.
        taps: which layers are compared; see `tapped`. Gradient attention has no layers.
    """

    transfer: str = "none"
    weight: BetaSchedule = field(default_factory=lambda: BetaSchedule(beta=0.0))
    hard: float = 1.0
    soft: float = 0.0
    temperature: float = 4.0
    mode: str = "code"
    exponent: float = 2.0
    kernel: str = "poly"
    degree: int = 2
    offset: float = 0.0
    taps: str = "groups"

    def __post_init__(self) -> None:
        kernels = ("poly", "linear", "gaussian")
        known = {"transfer": ("none", *TRANSFERS), "mode": ("code", "paper"), "taps": TAPS, "kernel": kernels}
        for name, choices in known.items():
            choice(name, getattr(self, name), choices)
        if not isinstance(self.weight, BetaSchedule):
            raise AFDSError(f"weight must be a BetaSchedule, such as BetaSchedule(beta=1000.0), got {self.weight!r}")
        for name in ("hard", "soft", "offset"):
            number(name, getattr(self, name), least=0)
        for name in ("temperature", "exponent"):
            number(name, getattr(self, name), above=0)
        whole("degree", self.degree, 1)
        if not (self.hard or self.soft):
            raise AFDSError("hard and soft are both 0, so no label and no teacher says which class is right; set one")
        decays = self.weight.kind in ("linear", "cosine")
        if self.transfer != "none" and not (self.weight.beta or (decays and self.weight.end)):
            raise AFDSError(f"the weight of the transfer {self.transfer!r} is 0; set one, as BetaSchedule(beta=1000.0)")

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is compared with a teacher."""
        return self.transfer != "none" or self.soft > 0

    def check(self, teacher: Any, steps: int) -> None:
        """Refuses a missing or a needless teacher, and a schedule of the weight that is longer than the run."""
        if self.needs_teacher and teacher is None:
            raise AFDSError(f"the method {self.transfer!r} needs a teacher; give the run of one")
        if teacher is not None and not self.needs_teacher:
            raise AFDSError("a teacher is given but the method compares nothing with it; set its soft or its transfer")
        self.weight.check(steps)


def tapped(model: nn.Module, where: str) -> list[str]:
    """The layers of a network that are compared.

    Args:
        model: a residual network or Inception-BN.
        where: "groups", the last block of each stage; "last", that of the last stage; "before-relu" and "after-relu",
            the last stage around its ReLU: the last batch norm and what the ReLU makes of it. In a ResNet with the ReLU
            behind the residual sum "before-relu" is the last batch norm alone, not the sum that the ReLU takes, and
            "after-relu" the block. NST's code takes the teacher's last batch norm and the student's in5b before the
            ReLU. [code]
    """
    blocks = backbones.stages(model)
    if where in ("groups", "last"):
        return blocks if where == "groups" else blocks[-1:]
    last, modules, before = blocks[-1], dict(model.named_modules()), where == "before-relu"
    if f"{last}.before_relu" in modules:
        return [f"{last}.before_relu" if before else last]
    if "bn" in modules and "relu" in modules:  # pre-activation networks
        return ["bn" if before else "relu"]
    norms = [n for n, m in model.get_submodule(last).named_children() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        raise AFDSError(f"{type(model).__name__} has no batch norm at the end of {last!r}; use taps 'last'")
    return [f"{last}.{norms[-1]}" if before else last]


def paired(
    model: nn.Module, teacher: nn.Module, method: Distillation, input_size: tuple[int, int, int]
) -> tuple[Pair, ...]:
    """The layers of a student and its teacher that a method compares, by one pass of a (3, H, W) image through both;
    none without a transfer of maps. An AFDSError refuses networks of unequally many stages.
    """
    if method.transfer == "none" or "layers" not in TRANSFERS[method.transfer].needs:
        return ()
    return pair_layers(model, teacher, tapped(model, method.taps), tapped(teacher, method.taps), input_size)


def student_objective(
    model: nn.Module, method: Distillation, teacher: nn.Module | None, input_size: tuple[int, int, int], *, steps: int,
    **options: float,
) -> Objective:  # fmt: skip
    """The loss of a student, with every term under its name, unweighted; the transfer's weight is logged as "beta".

    Args:
        method: what is minimised, beside the `teacher` where it needs one.
        input_size: (3, H, W).
        steps: length of the run, for the weight's schedule.
        options: weight decay and label smoothing, of `Objective`.
    """
    method.check(teacher, steps)
    terms: list[Term] = [SoftLabels(method.temperature, method.soft)] if method.soft else []
    if method.transfer != "none":
        assert teacher is not None
        pairs = paired(model, teacher, method, input_size)
        terms.append(TRANSFERS[method.transfer](TermContext(method, model, pairs, teacher, steps=steps)))
    return Objective(model, None, teacher, input_size, terms=terms, hard=method.hard, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Trained:
    """The common body of `StudentRun` and `PhotoRun`: a network is trained alone or beside its teacher.

    Weight decay is that of every parameter; the seed is of initialisation, data order and augmentation.
    """

    data: Any
    network: Network
    optimisation: Optimisation
    method: Distillation = field(default_factory=Distillation)
    teacher: Any = None
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        self.method.check(self.teacher, self.optimisation.steps)
        number("weight_decay", self.weight_decay, least=0)

    def execute(self, run: runs.Run) -> dict[str, Any]:
        """Trains and measures; a run that diverges is a result with "diverged": why."""
        try:
            return self.train(run)
        except DivergedError as error:
            return {"diverged": str(error), "steps": 0}

    def train(self, run: runs.Run) -> dict[str, Any]:
        """Loads what it starts from, fits, and writes the network."""
        raise NotImplementedError

    def fit(
        self, run: runs.Run, model: nn.Module, splits: Splits, teacher: nn.Module | None, size: tuple[int, int, int],
        evaluate: Callable[[], dict[str, float]], *, follow: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """Trains a model, which is on the CPU; `evaluate` scores it, for the metrics and, to `follow` it, the curve."""
        settings, method = self.optimisation, self.method
        # What is minimised. Adapters between layers of two widths start at random, by the run's seed.
        torch.manual_seed(self.seed)
        options = {"weight_decay": self.weight_decay, "label_smoothing": settings.label_smoothing}
        objective = student_objective(model, method, teacher, size, steps=settings.steps, **options)
        # The steps.
        model.to(training.device())
        what = "alone" if teacher is None else f"{method.transfer}{'+kd' if method.soft else ''}"
        training.fit(
            model, splits.train, objective, settings, run, seed=self.seed, evaluation=evaluate if follow else None,
            label=f"{self.network.name} {what} {method.weight.beta:g} seed {self.seed}",
        )  # fmt: skip
        # What it has become, and what it cost: per image three passes of the student and one of the teacher.
        reached = evaluate()
        own = macs.count(model, size).total
        cost = 3 * own + (0.0 if teacher is None else macs.count(teacher, size).total)
        return {
            "steps": settings.steps, "images": len(splits.train), "macs": own,
            "parameters": sum(p.numel() for p in model.parameters()), **reached,
            "training_macs": cost * settings.steps * settings.batch_size,
            "compared": [list(pair.size) for pair in objective.pairs],
        }  # fmt: skip


@runs.register
@dataclass(frozen=True)
class StudentRun(_Trained):
    """Trains a network alone (a teacher, or the baseline) or as the student of one that was.

    Without validation images (`per_class` takes them all) the learning curve has no scores. The test set is read once,
    at the end, and not with `use_test` False: trials that choose something must not.
    """

    data: DataSource
    teacher: StudentRun | None = None
    use_test: bool = True

    def train(self, run: runs.Run) -> dict[str, Any]:
        splits = self.data.load() if self.use_test else sealed(self.data.load())
        teacher = None if self.teacher is None else network_of(self.teacher, run)
        model = self.network.build(len(splits.classes), self.seed)

        def evaluate(name: str = "validation") -> dict[str, Any]:
            if (images := getattr(splits, name)) is None:
                return {}
            scores = training.evaluate(model, images, precision=self.optimisation.precision)
            confusion = {"confusion": scores.confusion} if name == "test" else {}
            return {f"{name}_accuracy": scores.accuracy, f"{name}_loss": scores.loss} | confusion

        follow = splits.validation is not None
        metrics = self.fit(run, model, splits, teacher, input_size(splits), evaluate, follow=follow)
        keep(run, model)
        return metrics | (evaluate("test") if self.use_test else {})


@runs.register
@dataclass(frozen=True)
class PhotoRun(_Trained):
    """Trains a network on photographs, alone or as the student of a trained one, by one process or several.

    The test part of the data (ImageNet's validation images) is measured along the way, and nothing is chosen by it: the
    last network is the result.
    """

    data: Photographs
    teacher: PhotoRun | Published | None = None
    weight_decay: float = 1e-4

    def train(self, run: runs.Run) -> dict[str, Any]:
        statistics = input_statistics(self.network.name)
        splits, teacher = self.data.load(statistics, seed=self.seed), None
        classes = len(splits.classes)
        if self.teacher is not None:
            published = isinstance(self.teacher, Published)
            teacher = self.teacher.build() if published else network_of(self.teacher, run)  # type: ignore[union-attr]
            teacher = expect(teacher.eval(), statistics, input_of(teacher))  # it takes the student's images
            if self.method.soft and classes_of(teacher) != classes:
                known = f"the teacher knows {classes_of(teacher)} classes and {splits.name} has {classes}"
                raise AFDSError(f"{known}; give another teacher")
        model = self.network.build(classes, self.seed)
        set_input(model, statistics)

        def validate() -> dict[str, float]:
            scores = training.evaluate(model, splits.test, precision=self.optimisation.precision)
            return {f"test_{name}": getattr(scores, name) for name in ("accuracy", "top5_accuracy", "loss")}

        metrics = self.fit(run, model, splits, teacher, (3, self.data.size, self.data.size), validate)
        keep(run, model.float())
        return metrics | {"processes": distributed.world()}


def classes_of(model: nn.Module) -> int:
    """How many classes a network tells apart."""
    return int(model.get_submodule(backbones.classifier_name(model)).out_features)  # type: ignore[arg-type]
