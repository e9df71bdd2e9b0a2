"""What a transfer run minimises: cross-entropy and one regulariser, with every term under its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from afdslib.afs.graph import living_channels
from afdslib.backbones import classifier_name
from afdslib.base.errors import AFDSError
from afdslib.losses.afd import AFDLoss, fit_attention
from afdslib.training.features import Teacher, feature_names, taps
from afdslib.training.regularisers import KINDS, Channels, Seen, Setting, kept_flags, widened

__all__ = ["REGULARISERS", "Objective", "Penalty", "Regulariser"]

REGULARISERS = tuple(KINDS)


@dataclass(frozen=True)
class Regulariser:
    """A regulariser and its strength.

    Attributes:
        name: "l2" (weight decay only), "l2sp", "feature-map", "afd", "lwf", "delta" or "at"; see `regularisers.KINDS`.
        strength: l2: weight decay of every parameter; l2sp: alpha; the others: lambda.
        classifier_decay: weight decay of the classifier where `strength` is not that already. [code: DELTA]
        features: which maps are compared: "block" or "convbn".
        attention: of AFD: "joint" or "detached".
    """

    name: str
    strength: float
    classifier_decay: float = 0.01
    features: str = "block"
    attention: str = "joint"

    def __post_init__(self) -> None:
        if self.name not in REGULARISERS:
            raise AFDSError(f"unknown regulariser {self.name!r}; known are {', '.join(REGULARISERS)}")
        if not (isinstance(self.strength, (int, float)) and 0 <= self.strength < float("inf")):
            raise AFDSError(
                f"the strength (lambda) of {self.name} must be a number of at least 0, got {self.strength!r}"
            )
        decay = self.classifier_decay
        if not (isinstance(decay, (int, float)) and 0 <= decay < float("inf")):
            raise AFDSError(f"classifier_decay of {self.name} must be a number of at least 0, got {decay!r}")
        for field, known in (("features", ("block", "convbn")), ("attention", ("joint", "detached"))):
            if getattr(self, field) not in known:
                raise AFDSError(f"{field} must be {known[0]!r} or {known[1]!r}, got {getattr(self, field)!r}")


class Penalty(Protocol):
    """Something else that is added to the loss, such as an L1 term of a selection method.

    `watch` surrounds the forward pass; `add` gets the loss so far and returns the new one with named terms.
    """

    def watch(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def add(
        self, loss: Tensor, model: nn.Module, images: Tensor, logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]: ...


class Objective(nn.Module):
    """Cross-entropy, optionally with a regulariser against a frozen source network.

    Args:
        model: the network to train.
        regulariser: None for plain training.
        source: the source network, needed by every regulariser but l2; it is copied and frozen.
        input_size: (3, H, W).
        weight_decay: for plain training without a regulariser.
        label_smoothing: of the cross-entropy.
        channels: which of the source's channels a statically pruned network has; features are compared on these.
        weights: DELTA's channel weights by layer.
        penalties: added to the loss after the regulariser.

    Attributes:
        weight_decay: of backbone and predictors, applied by the optimiser.
        classifier_decay: of the classifier.
    """

    def __init__(
        self,
        model: nn.Module,
        regulariser: Regulariser | None = None,
        source: nn.Module | None = None,
        input_size: tuple[int, int, int] = (3, 32, 32),
        *,
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        channels: Channels | None = None,
        weights: Mapping[str, Tensor] | None = None,
        penalties: Sequence[Penalty] = (),
    ):
        super().__init__()
        self.regulariser = regulariser
        self.label_smoothing = label_smoothing
        self.weight_decay = self.classifier_decay = weight_decay
        self.input_size = input_size
        self.penalties = tuple(penalties)
        self.teacher: Teacher | None = None
        self.term: Any = None  # the regulariser's module where it has one
        self.strength = 0.0 if regulariser is None else regulariser.strength
        self._kind = None if regulariser is None else KINDS[regulariser.name]
        self._l2sp: nn.Module | None = None
        self._names: list[str] = []
        self._kept: Mapping[str, Tensor] = {}
        self._widths: dict[str, int] = {}
        if regulariser is None or self._kind is None:
            return
        if self._kind.is_decay:
            self.weight_decay = self.classifier_decay = regulariser.strength
        else:
            self.weight_decay = 0.0
            self.classifier_decay = 0.0 if self._kind.weights_classifier else regulariser.classifier_decay
        if not self._kind.needs_source:
            return
        if source is None:
            raise AFDSError(f"the regulariser {regulariser.name!r} needs the source network")
        setting = Setting(regulariser, model, source, input_size, channels, weights)
        if self._kind.taps:
            self._names = feature_names(model, regulariser.features)
        if self._kind.needs_teacher:
            self.teacher = Teacher(source, self._names)
        setattr(self, self._kind.slot, self._kind.build(setting))
        if channels is not None and self._kind.needs_teacher:
            self._narrow(setting, channels.kept)

    def _narrow(self, setting: Setting, kept: Mapping[str, Tensor]) -> None:
        """The network has only some of the source's channels: those are compared."""
        head = classifier_name(setting.source)
        self._kept = {name: kept[name] for name in (*self._names, *(() if self._names else (head,)))}
        if self._names:
            self._widths = {name: shape[0] for name, shape in setting.shapes().items()}
            self.term.set_alive(kept_flags(self._kept, self._widths, self._names))
        else:
            self._widths = {head: setting.source.get_submodule(head).in_features}  # type: ignore[dict-item]

    def place(self, device: torch.device) -> None:
        """Moves the objective and its teacher, which is deliberately no submodule, to a device."""
        self.to(device)
        if self.teacher is not None:
            self.teacher.to(device, torch.channels_last)

    @staticmethod
    def classifier(model: nn.Module) -> nn.Module:
        """The target's new layer."""
        return model.get_submodule(classifier_name(model))

    def prepare(self, batches: Iterator[tuple[Tensor, Tensor]], num_classes: int) -> list[float]:
        """Trains a detached attention beforehand; nothing to do for the others."""
        teacher = self.teacher
        if not isinstance(self.term, AFDLoss) or self.term.mode != "detached" or teacher is None:
            return []
        device = next(self.term.parameters()).device
        return fit_attention(self.term, lambda images: teacher(images.to(device))[1], batches, num_classes)

    def inherit(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what the objective of the larger network before has learnt; its starting point is made anew."""
        own = {name: value for name, value in state.items() if not name.startswith("_l2sp.")}
        mine = {name for name in self.state_dict() if not name.startswith("_l2sp.")}
        if set(own) != mine:
            raise AFDSError(f"the state of another regulariser than {self.regulariser} cannot be taken over")
        flags = {n: b.clone() for n, b in self.named_buffers() if "alive" in n}
        self.load_state_dict(own, strict=False)
        for name, flag in flags.items():  # the masks are this network's own
            self.get_buffer(name).copy_(flag)

    def masks_changed(self, model: nn.Module) -> None:
        """Leaves channels that the masks prove zero out of the feature terms."""
        if self._names and not self._kept:
            self.term.set_alive(living_channels(model, self._names, self.input_size))

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor], Tensor]:
        """(loss, named terms, logits) of one batch. Terms that are no losses, such as the entropy, are only logged."""
        inner = getattr(model, "module", model)
        with ExitStack() as stack:
            features = stack.enter_context(taps(inner, self._names))
            inputs = stack.enter_context(_classifier_inputs(inner, self.teacher is not None and not self._names))
            for penalty in self.penalties:
                stack.enter_context(penalty.watch(inner))
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        terms: dict[str, Tensor] = {"cross_entropy": loss}
        if self._kind is not None and self._kind.needs_source:
            measured = self._measure(features, inputs, images)
            terms |= measured
            if self._kind.weighted:
                for value in measured.values():
                    loss = loss + value
            else:
                # The first entry is the loss; the others (the attention's entropy) are only watched.
                loss = loss + self.strength * next(iter(measured.values()))
        for penalty in self.penalties:
            loss, added = penalty.add(loss, inner, images, logits, labels)
            terms |= added
        return loss, terms, logits

    def _measure(self, features: Mapping[str, Tensor], inputs: list[Tensor], images: Tensor) -> dict[str, Tensor]:
        assert self._kind is not None
        source_logits, source_features = (None, {}) if self.teacher is None else self.teacher(images)
        if self._kept and self._names:
            features = {n: widened(x, self._kept[n], self._widths[n]) for n, x in features.items()}
        entering = inputs[0] if inputs else None
        if self._kept and entering is not None:
            ((head, kept),) = self._kept.items()
            entering = widened(entering, kept, self._widths[head])
        return self._kind.measure(
            getattr(self, self._kind.slot), Seen(features, entering, source_features, source_logits)
        )

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


@contextmanager
def _classifier_inputs(model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects what enters the classifier; the hook is gone when the block ends."""
    inputs: list[Tensor] = []
    if not wanted:
        yield inputs
        return
    head = model.get_submodule(classifier_name(model))
    handle = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()
