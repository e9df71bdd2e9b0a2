"""What a run minimises: the cross-entropy and terms of `afdslib.losses`, each logged under its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afdslib.afs.graph import living_channels
from afdslib.backbones import classifier_name
from afdslib.base import checks
from afdslib.base.errors import AFDSError
from afdslib.base.hooks import kept
from afdslib.losses._maps import full_precision
from afdslib.losses.at import input_gradient
from afdslib.losses.term import TAUGHT, TERMS, Batch, Pair, Term, TermContext
from afdslib.training.features import Teacher, feature_names, pair_layers, taps
from afdslib.training.kept_channels import Channels

__all__ = ["Objective", "Regulariser"]


@dataclass(frozen=True)
class Regulariser:
    """A regulariser and its strength."""

    name: str  # of `losses.TERMS`: "l2", "l2sp", "feature-map", "afd", "lwf", "delta", "at", or a term of your own
    strength: float  # l2: weight decay of every parameter; l2sp: alpha; the others: lambda
    classifier_decay: float = 0.01  # of the classifier where `strength` is not that already [code: DELTA]
    features: str = "block"  # which maps are compared: "block" or "convbn"
    attention: str = "joint"  # of AFD: "joint" or "detached"

    def __post_init__(self) -> None:
        if self.name not in TERMS:
            raise AFDSError(f"unknown regulariser {self.name!r}; known are {', '.join(TERMS)}")
        checks.number(f"the strength (lambda) of {self.name}", self.strength, least=0)
        checks.number(f"classifier_decay of {self.name}", self.classifier_decay, least=0)
        checks.choice("features", self.features, ("block", "convbn"))
        checks.choice("attention", self.attention, ("joint", "detached"))


class Objective(nn.Module):
    """Cross-entropy and terms against a frozen source network or teacher.

    Args:
        model: the network to train.
        regulariser: the first term, built here; None for plain training or a student.
        source: the source network or the teacher, where a term needs one; it is copied and frozen.
        input_size: (3, H, W).
        weight_decay: where no regulariser says it.
        label_smoothing: of the cross-entropy.
        channels: which of the source's channels a statically pruned network has; features are compared on these.
        weights: DELTA's channel weights by layer.
        terms: built already; added to the loss after the regulariser, in this order.
        hard: weight of the cross-entropy.

    Attributes:
        pairs: the layers that are compared.
        teacher: the frozen copy of `source`, or None.
        weight_decay, classifier_decay: applied by the optimiser, to backbone and predictors, and to the classifier.
    """

    def __init__(
        self, model: nn.Module, regulariser: Regulariser | None = None, source: nn.Module | None = None,
        input_size: tuple[int, int, int] = (3, 32, 32), *, weight_decay: float = 0.0, label_smoothing: float = 0.0,
        channels: Channels | None = None, weights: Mapping[str, Tensor] | None = None, terms: Sequence[Term] = (),
        hard: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.label_smoothing, self.hard, self.input_size, self.channels = label_smoothing, hard, input_size, channels
        self.weight_decay = self.classifier_decay = weight_decay
        self.term: nn.Module | None = None  # the module of the term that has one
        if regulariser is not None:
            kind = TERMS[regulariser.name]
            pairs: tuple[Pair, ...] = ()
            self.weight_decay, self.classifier_decay = kind.decays(regulariser)
            if kind.needs and source is None:
                raise AFDSError(f"the regulariser {regulariser.name!r} needs the source network")
            if source is not None and "layers" in kind.needs:
                own, other = (feature_names(network, regulariser.features) for network in (model, source))
                pairs = pair_layers(model, source, own, other, input_size)
            reference = source if channels is None else channels.reference
            terms = (kind(TermContext(regulariser, model, pairs, source, reference, weights)), *terms)
        self.terms = tuple(terms)
        for term in self.terms:
            if term.module is not None:
                if isinstance(getattr(self, term.slot, None), nn.Module):
                    raise AFDSError(f"two terms keep their state in {term.slot!r}; give {term.name} another slot")
                setattr(self, term.slot, term.module)
        self.needs = frozenset().union(*(term.needs for term in self.terms))
        self.pairs: tuple[Pair, ...] = tuple(dict.fromkeys(pair for term in self.terms for pair in term.pairs))
        self.teacher: Teacher | None = None
        if self.needs & TAUGHT:
            if source is None:
                raise AFDSError(f"{self.terms[0].name} needs the source network or a teacher; give one")
            self.teacher = Teacher(source, [pair.teacher for pair in self.pairs])
        # A network that is differentiated twice is called without the wrapper of several processes, which refuses that.
        self.calls_wrapper = "gradients" not in self.needs
        if channels is not None:
            self._set_alive({p.student: channels.flags(p.teacher, p.teacher_shape[0]) for p in self.pairs})

    def place(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Moves the objective and its teachers, which are deliberately no submodules, to a device."""
        self.to(device=device, dtype=dtype)
        for teacher in (self.teacher, *(getattr(term, "teacher", None) for term in self.terms)):
            if teacher is not None:
                teacher.model.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @staticmethod
    def classifier(model: nn.Module) -> nn.Module:
        """The target's new layer."""
        return model.get_submodule(classifier_name(model))

    def prepare(self, batches: Iterator[tuple[Tensor, Tensor]], num_classes: int) -> list[float]:
        """Trains what stays fixed during the run, such as a detached attention."""
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        taught = lambda images: self._teach(images.to(device))[1]  # noqa: E731
        return [loss for term in self.terms for loss in term.prepare(taught, batches, num_classes)]

    def inherit(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what the objective of the larger network before has learnt, where a term's state goes on."""
        anew = tuple(f"{term.slot}." for term in self.terms if not term.inherited)
        own = {name for name in self.state_dict() if not name.startswith(anew)}
        if own != {name for name in state if not name.startswith(anew)}:
            raise AFDSError(f"the state of another regulariser than {self.terms[0].name} cannot be taken over")
        # The living channels are this network's own.
        self.load_state_dict({name: state[name] for name in own if "alive" not in name}, strict=False)

    def masks_changed(self, model: nn.Module) -> None:
        """Leaves channels that the masks prove zero out of the feature terms."""
        if self.channels is None and any(hasattr(term.module, "set_alive") for term in self.terms):
            self._set_alive(living_channels(model, [pair.student for pair in self.pairs], self.input_size))

    def _set_alive(self, flags: Mapping[str, Tensor]) -> None:
        for term in self.terms:
            if hasattr(term.module, "set_alive"):
                term.module.set_alive({p.student: flags[p.student] for p in term.pairs})  # type: ignore[union-attr, operator]

    def forward(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int = 0
    ) -> tuple[Tensor, Mapping[str, Tensor], Tensor]:
        """(loss, named terms, logits) of one batch. Terms that are no losses, such as the entropy, are only logged."""
        inner = getattr(model, "module", model)
        if "gradients" in self.needs:
            images = images.detach().requires_grad_()
        # The student's own pass, watched by the terms.
        head = {"": self.classifier(inner)} if "inputs" in self.needs else {}
        with ExitStack() as stack:
            features = stack.enter_context(taps(inner, [pair.student for pair in self.pairs]))
            entering = stack.enter_context(kept(head, inputs=True))
            for term in self.terms:
                stack.enter_context(term.watch(inner))
            logits = (model if self.calls_wrapper else inner)(images)
        smoothing = self.label_smoothing
        cross_entropy = nn.functional.cross_entropy(full_precision(logits), labels, label_smoothing=smoothing)
        loss, logged = self.hard * cross_entropy, {"cross_entropy": cross_entropy}
        if not self.terms:
            return loss, logged, logits
        # The teacher's pass, and what both give brought to the same channels.
        taught, teacher = self._teach(images.detach())
        frozen: Any = self.teacher
        inputs = entering.get("")
        if self.channels is not None:
            widened = self.channels.widened
            features = {p.student: widened(features[p.student], p.teacher, p.teacher_shape[0]) for p in self.pairs}
            inputs = None if inputs is None else widened(inputs, *self.channels.inputs)
        batch = Batch(
            inner, images, labels, logits, features, teacher, inputs, taught, label_smoothing=smoothing,
            gradients=lambda: (input_gradient(logits, labels, images), frozen.input_gradient(images, labels)),
            step=step,
        )  # fmt: skip
        for term in self.terms:
            loss, added = term.add(loss, batch)
            logged |= added
        return loss, logged, logits

    def _teach(self, images: Tensor) -> tuple[Tensor | None, Mapping[str, Tensor]]:
        """The teacher's logits, and its features by the student's layers."""
        if self.teacher is None:
            return None, {}
        logits, features = self.teacher(images)
        return logits, {pair.student: features[pair.teacher] for pair in self.pairs}

    @torch.no_grad()
    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """The weight decay that the optimiser applies, as the loss term it stands for."""
        if not (self.weight_decay or self.classifier_decay):
            return {}
        head = {id(p) for p in self.classifier(model).parameters()}
        total = 0.0
        for parameter in model.parameters():
            decay = self.classifier_decay if id(parameter) in head else self.weight_decay
            total += decay / 2 * float(parameter.square().sum()) if decay else 0.0
        return {"l2": total}
