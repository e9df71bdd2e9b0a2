"""One regulariser or distillation loss: its name, its search space, what it needs, and what it adds to the loss.

A regulariser of transfer runs is one file, here or in a module of your own that is imported before the run:

    @TERMS.register
    class Cosine(Term):
        name, label = "cosine", "cosine distance"
        space = (Axis("strength", 1.0, 1e-2, 1e2),)
        needs = frozenset({"layers"})

        def __call__(self, batch):
            pairs = ((batch.student[n].flatten(1), batch.teacher[n].flatten(1)) for n in batch.student)
            value = sum(1 - cosine_similarity(s, t).mean() for s, t in pairs)
            return value, {"cosine": value}

From then on `Regulariser("cosine", 0.1)` is taken by every run, plan and table; its colour is a line of
`report/plots/style.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from afdslib.base.errors import AFDSError

__all__ = ["TAUGHT", "TERMS", "TRANSFERS", "Axis", "Batch", "Pair", "Term", "TermContext", "Transfer", "Value"]

NEEDS = frozenset({"layers", "logits", "inputs", "source", "weights", "gradients"})
"""What a term can ask for.

"layers": `Batch.student` and `Batch.teacher`; "logits": `Batch.teacher_logits`; "inputs": `Batch.inputs`; "source":
`TermContext.reference`; "weights": `TermContext.weights`; "gradients": `Batch.gradients`.
"""

TAUGHT = frozenset({"layers", "logits", "gradients"})
"""Needs for which the source or teacher runs on every batch."""

Value = float | str | None


@dataclass(frozen=True)
class Axis:
    """One dimension of a search space: a setting with limits, both included, or with choices."""

    name: str
    default: Value  # of the first trial
    low: float = 0.0
    high: float = 1.0
    log: bool = True  # values are spread evenly in their logarithm
    choices: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two layers that are compared: their names, and (C, H, W) of their outputs."""

    student: str
    teacher: str
    student_shape: tuple[int, int, int]
    teacher_shape: tuple[int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) at which maps of two sizes are compared: the smaller one's."""
        (_, *own), (_, *other) = self.student_shape, self.teacher_shape
        return min(own[0], other[0]), min(own[1], other[1])


@dataclass(frozen=True)
class TermContext:
    """What a term is built from."""

    config: Any  # the `Regulariser` or `Distillation` with the term's options
    model: nn.Module  # the network to train
    pairs: tuple[Pair, ...] = ()  # layers of the student and of its teacher, for terms that need "layers"
    source: nn.Module | None = None  # the source network, or the teacher
    reference: nn.Module | None = None  # the source with the student's channels: parameters compare one by one
    weights: Mapping[str, Tensor] | None = None  # DELTA's channel weights by layer
    steps: int = 0  # length of the run

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of the compared maps by the student's layer, in the source's width."""
        return {pair.student: pair.teacher_shape for pair in self.pairs}


@dataclass
class Batch:
    """One batch as the terms see it.

    Maps are in the source's width: a pruned student's channels lie at their places among the source's, zeros elsewhere.
    """

    model: nn.Module  # the network to train
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,)
    logits: Tensor  # of the student, (B, classes)
    student: Mapping[str, Tensor] = field(default_factory=dict)  # (B, C, H, W) by the student's layer
    teacher: Mapping[str, Tensor] = field(default_factory=dict)  # the same, without gradient
    inputs: Tensor | None = None  # what enters the student's classifier, (B, C)
    teacher_logits: Tensor | None = None  # (B, classes of the teacher), without gradient
    gradients: Callable[[], tuple[Tensor, Tensor]] | None = None  # the networks' input gradients, two (B, 3, H, W)
    label_smoothing: float = 0.0  # of the cross-entropy that the loss holds
    step: int = 0  # counted from 0


class Term:
    """A regulariser or a distillation loss. A subclass declares it, an instance acts in one run.

    A module with `set_alive(flags by layer)` is told which of the source's channels the student still has.
    """

    name: ClassVar[str] = ""  # in configurations and tables
    label: ClassVar[str] = ""  # for readers
    space: ClassVar[tuple[Axis, ...]] = ()  # of its strength and other settings
    needs: ClassVar[frozenset[str]] = frozenset()  # of `NEEDS`
    slot: ClassVar[str] = "term"  # attribute of the objective in which the module lives: the prefix of its state
    inherited: ClassVar[bool] = True  # whether a pruned network's term takes over the state of the larger network's
    weight: float = 1.0  # the factor on the value; the strength of a regulariser
    module: nn.Module | None = None  # what has parameters or buffers
    pairs: tuple[Pair, ...] = ()

    def __init__(self, context: TermContext) -> None:
        self.weight = getattr(context.config, "strength", 1.0)
        self.pairs = context.pairs
        self.module = self.build(context)

    @classmethod
    def decays(cls, config: Any) -> tuple[float, float]:
        """Weight decay that the optimiser applies, of the network and of the classifier."""
        return 0.0, config.classifier_decay

    def build(self, context: TermContext) -> nn.Module | None:
        """The module with the state."""
        return None

    def prepare(
        self, teacher: Callable[[Tensor], Mapping[str, Tensor]], batches: Iterator[tuple[Tensor, Tensor]], classes: int
    ) -> list[float]:
        """Trains beforehand what stays fixed during the run; returns its loss at each step."""
        return []

    def watch(self, model: nn.Module) -> AbstractContextManager:
        """Surrounds the forward pass of the student."""
        return nullcontext()

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The value, a scalar to be weighed, and the terms to be logged by name."""
        raise NotImplementedError(f"{type(self).__name__} lacks __call__(batch) -> value, logged")

    def add(self, loss: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with this term, and what is logged."""
        value, logged = self(batch)
        return loss + self.weight * value, logged


class Transfer(Term):
    """A student's transfer loss: a sum over layers, with a weight that can change during the run."""

    needs = frozenset({"layers"})

    def __init__(self, context: TermContext) -> None:
        super().__init__(context)
        self.config, self.steps = context.config, context.steps

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """The loss of one pair of layers, of that position among the pairs."""
        raise NotImplementedError(f"{type(self).__name__} lacks compare(student, teacher, index) -> value")

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with warnings.catch_warnings():
            # Maps of two sizes are compared at `Pair.size`, which the result records; once a step is too often.
            warnings.filterwarnings("ignore", message=".*area averaging.*")
            names = [pair.student for pair in self.pairs]
            values = [self.compare(batch.student[n], batch.teacher[n], i) for i, n in enumerate(names)]
        return torch.stack(values).sum(), {f"{self.name}_{i}": value for i, value in enumerate(values, 1)}

    def add(self, loss: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value, logged = self(batch)
        beta = self.config.weight(batch.step, self.steps)
        return loss + self.weight * beta * value, logged | {"beta": loss.new_tensor(beta)}


class Registry(dict[str, type[Term]]):
    """Terms by name; `register` is the decorator that adds one."""

    def register(self, term: type[Term]) -> type[Term]:
        """Adds a term under its name.

        Raises:
            AFDSError: no name or label, a name that another term has, or an unknown need.
        """
        if not (term.name and term.label):
            raise AFDSError(f"the term {term.__name__} needs a name and a label, such as name, label = 'l2', 'L2'")
        if term.name in self and self[term.name].__qualname__ != term.__qualname__:
            raise AFDSError(f"the name {term.name!r} belongs to {self[term.name].__name__}; give the term another")
        if unknown := set(term.needs) - NEEDS:
            raise AFDSError(f"{term.name} needs {min(unknown)!r}, which no run has; use some of {', '.join(NEEDS)}")
        self[term.name] = term
        return term


TERMS, TRANSFERS = Registry(), Registry()
"""Regularisers of transfer runs, and transfer losses between a student and its teacher."""
