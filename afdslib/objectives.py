"""What a transfer run minimises: cross-entropy and one regulariser, with every term under its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afdslib.afs.graph import living_channels
from afdslib.backbones import classifier_name
from afdslib.errors import AFDSError
from afdslib.features import Teacher, feature_names, feature_shapes, taps
from afdslib.losses.afd import AFDLoss, fit_attention
from afdslib.losses.delta import DELTALoss, uniform_weights
from afdslib.losses.l2sp import L2SP

__all__ = ["REGULARISERS", "Objective", "Regulariser"]

REGULARISERS = ("l2", "l2sp", "feature-map", "afd")


@dataclass(frozen=True)
class Regulariser:
    """A regulariser and its strength.

    Attributes:
        name: "l2" (weight decay only), "l2sp", "feature-map" or "afd".
        strength: l2: weight decay of every parameter; l2sp: alpha; feature-map and afd: lambda.
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


class Objective(nn.Module):
    """Cross-entropy, optionally with a regulariser against a frozen source network.

    Args:
        model: the network to train.
        regulariser: None for plain training.
        source: the source network, needed by every regulariser but l2; it is copied and frozen.
        input_size: (3, H, W).
        weight_decay: for plain training without a regulariser.
        label_smoothing: of the cross-entropy.

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
    ):
        super().__init__()
        self.regulariser = regulariser
        self.label_smoothing = label_smoothing
        self.weight_decay = self.classifier_decay = weight_decay
        self.input_size = input_size
        self.teacher: Teacher | None = None
        self.term: AFDLoss | DELTALoss | None = None
        self.strength = 0.0 if regulariser is None else regulariser.strength
        self._l2sp: L2SP | None = None
        self._names: list[str] = []
        if regulariser is None:
            return
        if regulariser.name == "l2":
            self.weight_decay = self.classifier_decay = regulariser.strength
            return
        self.weight_decay, self.classifier_decay = 0.0, regulariser.classifier_decay
        if source is None:
            raise AFDSError(f"the regulariser {regulariser.name!r} needs the source network")
        if regulariser.name == "l2sp":
            # The starting point is the source itself, also for a network that was trained and pruned since.
            self._l2sp = L2SP(
                model,
                alpha=regulariser.strength,
                beta=regulariser.classifier_decay,
                reference=dict(source.named_parameters()),
            )
            self.classifier_decay = 0.0  # beta is in the loss already
            return
        self._names = feature_names(model, regulariser.features)
        self.teacher = Teacher(source, self._names)
        shapes = feature_shapes(model, self._names, input_size)
        if regulariser.name == "afd":
            self.term = AFDLoss(shapes, attention=regulariser.attention)
        else:
            self.term = DELTALoss(uniform_weights(shapes))

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

    def masks_changed(self, model: nn.Module) -> None:
        """Leaves channels that the masks prove zero out of the feature terms."""
        if self.term is not None:
            self.term.set_alive(living_channels(model, self._names, self.input_size))

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor], Tensor]:
        """(loss, named terms, logits) of one batch. Terms that are no losses, such as the entropy, are only logged."""
        inner = getattr(model, "module", model)
        with taps(inner, self._names) as features:
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        terms: dict[str, Tensor] = {"cross_entropy": loss}
        if self._l2sp is not None:
            penalties = self._l2sp()
            terms |= penalties
            loss = loss + penalties["l2sp"] + penalties["l2"]
        if self.term is not None and self.teacher is not None:
            _, source_features = self.teacher(images)
            measured = self.term(features, source_features)
            if isinstance(measured, Tensor):
                measured = {"feature_map": measured}
            terms |= measured
            # The first entry is the loss; the others (the attention's entropy) are only watched.
            loss = loss + self.strength * next(iter(measured.values()))
        return loss, terms, logits

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
