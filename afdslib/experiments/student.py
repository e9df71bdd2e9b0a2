"""Training a student beside a teacher: attention transfer, distillation, neuron selectivity transfer, hints.

StudentRun (the teacher: a network trained alone) -> StudentRun (a student with that teacher)

    loss = hard * CE + soft * T^2 KL + weight(t) * sum over layers of the transfer loss

AT and KD follow Zagoruyko, Komodakis, arXiv 1612.03928; NST follows Huang, Wang, arXiv 1707.01219.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from afdslib import afs, backbones, runs, training
from afdslib.afs import macs
from afdslib.base.errors import AFDSError, DivergedError
from afdslib.data import Splits, sealed
from afdslib.experiments.afs import MODEL, DataSource, Network
from afdslib.losses import BetaSchedule, Hint, at_loss, gradient_at_loss, input_gradient, nst_loss, soft_kl_loss
from afdslib.losses._maps import full_precision
from afdslib.training import Optimisation, distributed
from afdslib.training.features import Teacher, feature_shapes, taps
from afdslib.training.objective import Objective

__all__ = ["TAPS", "TRANSFERS", "Distillation", "DistillationObjective", "Pair", "StudentRun", "paired", "tapped"]

TRANSFERS = ("none", "at", "gradient-at", "hint", "nst")
TAPS = ("groups", "last", "before-relu", "after-relu")


def _number(value: object, least: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < float("inf")


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
        degree: d of the polynomial kernel.
        offset: c of the polynomial kernel.
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
        known = {
            "transfer": TRANSFERS, "mode": ("code", "paper"), "kernel": ("poly", "linear", "gaussian"), "taps": TAPS,
        }  # fmt: skip
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise AFDSError(f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(choices)}")
        if not isinstance(self.weight, BetaSchedule):
            raise AFDSError(f"weight must be a BetaSchedule, such as BetaSchedule(beta=1000.0), got {self.weight!r}")
        for name in ("hard", "soft"):
            if not _number(getattr(self, name), 0):
                raise AFDSError(f"{name} must be a number of at least 0, got {getattr(self, name)!r}")
        for name in ("temperature", "exponent"):
            if not (_number(getattr(self, name), 0) and getattr(self, name) > 0):
                raise AFDSError(f"{name} must be a number above 0, got {getattr(self, name)!r}")
        if not (isinstance(self.degree, int) and not isinstance(self.degree, bool) and self.degree >= 1):
            raise AFDSError(f"degree must be a whole number of at least 1, got {self.degree!r}")
        if not _number(self.offset, 0):
            raise AFDSError(f"offset must be a number of at least 0, got {self.offset!r}")
        if not (self.hard or self.soft):
            raise AFDSError("hard and soft are both 0, so no label and no teacher says which class is right; set one")

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is compared with a teacher."""
        return self.transfer != "none" or self.soft > 0


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
    if where not in TAPS:
        raise AFDSError(f"taps {where!r} is unknown; use one of {', '.join(TAPS)}")
    blocks = backbones.stages(model)
    if where == "groups":
        return blocks
    last = blocks[-1]
    if where == "last":
        return [last]
    modules = dict(model.named_modules())
    if f"{last}.before_relu" in modules:
        return [f"{last}.before_relu" if where == "before-relu" else last]
    if "bn" in modules and "relu" in modules:  # pre-activation networks
        return ["bn" if where == "before-relu" else "relu"]
    norms = [n for n, m in model.get_submodule(last).named_children() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        raise AFDSError(f"{type(model).__name__} has no batch norm at the end of {last!r}; use taps 'last'")
    return [f"{last}.{norms[-1]}" if where == "before-relu" else last]


@dataclass(frozen=True)
class Pair:
    """Two layers that are compared.

    Attributes:
        student: layer of the student.
        teacher: layer of the teacher.
        channels: of the student's map and of the teacher's.
        size: (H, W) at which they are compared: the smaller map's.
    """

    student: str
    teacher: str
    channels: tuple[int, int]
    size: tuple[int, int]


def paired(model: nn.Module, teacher: nn.Module, method: Distillation, input_size: tuple[int, int, int]) -> list[Pair]:
    """The layers of a student and its teacher that a method compares, by one pass of an image through both.

    Args:
        model: the student.
        teacher: the teacher.
        method: what is minimised; without a transfer of maps there are no pairs.
        input_size: (3, H, W).

    Raises:
        AFDSError: networks of unequally many stages, or maps of two sizes for "hint", which compares every position.
    """
    if method.transfer in ("none", "gradient-at"):
        return []
    mine, theirs = tapped(model, method.taps), tapped(teacher, method.taps)
    if len(mine) != len(theirs):
        raise AFDSError(
            f"the student has {len(mine)} stages and the teacher {len(theirs)}; use taps 'last' for such a pair"
        )
    shapes = [feature_shapes(net, names, input_size) for net, names in ((model, mine), (teacher, theirs))]
    pairs = []
    for student, source in zip(mine, theirs, strict=True):
        (channels, *size), (source_channels, *source_size) = shapes[0][student], shapes[1][source]
        if method.transfer == "hint" and size != source_size:
            raise AFDSError(
                f"a hint compares maps of one size, but the student's {student!r} is {size[0]}x{size[1]} and the "
                f"teacher's {source!r} {source_size[0]}x{source_size[1]}; take another teacher, or transfer 'at'"
            )
        smaller = (min(size[0], source_size[0]), min(size[1], source_size[1]))
        pairs.append(Pair(student, source, (channels, source_channels), smaller))
    return pairs


class DistillationObjective(Objective):
    """The loss of a student, with every term under its name; the teacher is a frozen copy (`features.Teacher`).

    Args:
        model: the student.
        method: what is minimised.
        teacher: the trained teacher; None where the method needs none.
        input_size: (3, H, W).
        steps: length of the run, for the weight's schedule.
        weight_decay: of every parameter, applied by the optimiser.
        label_smoothing: of the cross-entropy.

    Attributes:
        pairs: (student's layer, teacher's layer) that are compared.
        compared: (H, W) at which each pair is compared: the smaller map's.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Distillation,
        teacher: nn.Module | None,
        input_size: tuple[int, int, int],
        *,
        steps: int,
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(model, input_size=input_size, weight_decay=weight_decay, label_smoothing=label_smoothing)
        method.weight.check(steps)
        self.method, self.steps, self.step = method, steps, 0
        self.calls_wrapper = method.transfer != "gradient-at"  # see `forward`; several processes need the wrapper
        self.pairs: list[tuple[str, str]] = []
        self.compared: list[tuple[int, int]] = []
        self.adapters = nn.ModuleList()
        if not method.needs_teacher:
            return
        if teacher is None:
            raise AFDSError(f"{method.transfer if method.soft == 0 else 'distillation'} needs a teacher; give one")
        pairs = paired(model, teacher, method, input_size)
        self.pairs = [(pair.student, pair.teacher) for pair in pairs]
        self.compared = [pair.size for pair in pairs]
        self.teacher = Teacher(teacher, [pair.teacher for pair in pairs])
        if method.transfer == "hint":
            self.adapters.extend(Hint(*pair.channels) for pair in pairs)

    def get_extra_state(self) -> dict[str, int]:
        """The step, so that a resumed run goes on with the weight's schedule."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor], Tensor]:
        """(loss, named terms, logits) of one batch; the terms are unweighted, the weight is logged as "beta"."""
        method, inner = self.method, getattr(model, "module", model)
        gradients = method.transfer == "gradient-at"
        if gradients:
            images = images.detach().requires_grad_()
            logits = inner(images)  # not the wrapper, which refuses to be differentiated twice
            features: Mapping[str, Tensor] = {}
        else:
            with taps(inner, [name for name, _ in self.pairs]) as features:
                logits = model(images)
        cross_entropy = nn.functional.cross_entropy(
            full_precision(logits), labels, label_smoothing=self.label_smoothing
        )
        terms: dict[str, Tensor] = {"cross_entropy": cross_entropy}
        loss = method.hard * cross_entropy
        if self.teacher is not None:
            teacher_logits, teacher_features = self.teacher(images.detach())
            if method.soft:
                terms["soft"] = soft_kl_loss(logits, teacher_logits, T=method.temperature)
                loss = loss + method.soft * terms["soft"]
            if gradients:
                mine = input_gradient(logits, labels, images)
                transfer = {"gradient_at": gradient_at_loss(mine, self.teacher.input_gradient(images.detach(), labels))}
            else:
                transfer = self._transfer(features, teacher_features)
            if transfer:
                weight = method.weight(self.step, self.steps)
                scale = weight / 2 if method.transfer == "at" and method.mode == "paper" else weight
                loss = loss + scale * torch.stack(list(transfer.values())).sum()
                terms |= transfer | {"beta": loss.new_tensor(weight)}
        self.step += 1
        return loss, terms, logits

    def _transfer(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        method, terms = self.method, {}
        with warnings.catch_warnings():
            # Maps of two sizes are compared at `compared`, which the result records; once a step is too often.
            warnings.filterwarnings("ignore", message=".*area averaging.*")
            for index, (mine, theirs) in enumerate(self.pairs):
                s, t = student[mine], teacher[theirs]
                if method.transfer == "at":
                    terms[f"at_{index + 1}"] = at_loss(s, t, p=method.exponent, mode=method.mode)
                elif method.transfer == "hint":
                    terms[f"hint_{index + 1}"] = self.adapters[index](s, t)
                else:
                    terms[f"nst_{index + 1}"] = nst_loss(s, t, kernel=method.kernel, d=method.degree, c=method.offset)
        return terms


@runs.register
@dataclass(frozen=True)
class StudentRun:
    """Trains a network alone (a teacher, or the baseline) or as the student of one that was.

    Attributes:
        data: the data set. Without validation images (`per_class` takes them all) the learning curve has none.
        network: the backbone.
        optimisation: of the training.
        method: what is minimised.
        teacher: the run whose network teaches; None for a network trained alone.
        weight_decay: of every parameter.
        seed: of initialisation, data order and augmentation.
        use_test: whether the test set is read, once, at the end; trials that choose something must not.
    """

    data: DataSource
    network: Network
    optimisation: Optimisation
    method: Distillation = Distillation()
    teacher: StudentRun | None = None
    weight_decay: float = 5e-4
    seed: int = 0
    use_test: bool = True

    def __post_init__(self) -> None:
        if self.method.needs_teacher != (self.teacher is not None):
            raise AFDSError(
                f"the method {self.method.transfer!r} needs a teacher; give the run of one"
                if self.method.needs_teacher
                else "a teacher is given but the method compares nothing with it; set its soft weight or its transfer"
            )
        if not _number(self.weight_decay, 0):
            raise AFDSError(f"weight_decay must be a number of at least 0, got {self.weight_decay!r}")
        self.method.weight.check(self.optimisation.steps)

    def execute(self, run: runs.Run) -> dict[str, Any]:
        """Trains and measures; a run that diverges is a result with "diverged": why."""
        try:
            return self._train(run)
        except DivergedError as error:
            return {"diverged": str(error), "steps": 0}

    def _train(self, run: runs.Run) -> dict[str, Any]:
        settings = self.optimisation
        splits = self.data.load() if self.use_test else sealed(self.data.load())
        teacher = None
        if self.teacher is not None:
            found = distributed.get_or_run(self.teacher, store=run.store, needs=(MODEL,))
            teacher = afs.load(found.artifact(MODEL))
        size = (3, splits.test.size, splits.test.size)
        model = self.network.build(len(splits.classes), self.seed)
        torch.manual_seed(self.seed)  # of the adapters
        objective = DistillationObjective(
            model, self.method, teacher, size, steps=settings.steps, weight_decay=self.weight_decay,
            label_smoothing=settings.label_smoothing,
        )  # fmt: skip
        model.to(training.device())

        def validate() -> dict[str, float]:
            return _validation_scores(model, splits, settings.precision)

        training.fit(
            model, splits.train, objective, settings, run, seed=self.seed,
            evaluation=validate if splits.validation is not None else None, label=self._label(),
        )  # fmt: skip
        run.write_artifact(MODEL, lambda path: afs.save(model, path))
        mine = macs.count(model, size).total
        theirs = 0.0 if teacher is None else macs.count(teacher, size).total
        metrics: dict[str, Any] = {
            "steps": settings.steps,
            "images": len(splits.train),
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": mine,
            "training_macs": (3 * mine + theirs) * settings.steps * settings.batch_size,
            "compared": [list(s) for s in objective.compared],
            **validate(),
        }
        if self.use_test:
            test = training.evaluate(model, splits.test, precision=settings.precision)
            metrics |= {"test_accuracy": test.accuracy, "test_loss": test.loss, "confusion": test.confusion}
        return metrics

    def _label(self) -> str:
        what = "alone" if self.teacher is None else f"{self.method.transfer}{'+kd' if self.method.soft else ''}"
        return f"{self.network.name} {what} {self.method.weight.beta:g} seed {self.seed}"


def _validation_scores(model: nn.Module, splits: Splits, precision: str) -> dict[str, float]:
    if splits.validation is None:
        return {}
    found = training.evaluate(model, splits.validation, precision=precision)
    return {"validation_accuracy": found.accuracy, "validation_loss": found.loss}
