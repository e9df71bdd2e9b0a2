"""The regularisers of the comparison behind one interface: what each compares, prepares and adds to the cross-entropy.

A `Kind` is stateless: it builds the module that holds the state (channel weights, attention, the old classifier), says
which layers it looks at, and turns one batch into named terms. `KINDS` is the only list of them; `objectives.Objective`
knows none by name. Formulas: method, section 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from afdslib.backbones import classifier_name
from afdslib.base.errors import AFDSError
from afdslib.losses.afd import AFDLoss
from afdslib.losses.at import ATLoss
from afdslib.losses.delta import DELTALoss, uniform_weights
from afdslib.losses.l2sp import L2SP
from afdslib.losses.lwf import LwFLoss
from afdslib.training.features import feature_names, feature_shapes

if TYPE_CHECKING:
    from afdslib.training.objective import Regulariser

__all__ = ["KINDS", "Channels", "Kind", "Seen", "Setting"]


@dataclass(frozen=True)
class Channels:
    """Which of the source's channels a statically pruned network still has.

    Attributes:
        reference: the source with only those channels: parameters compare one by one with the pruned network's.
        kept: positions among the source's channels, (C',) int64, of each tapped layer's output and, under the
            classifier's name, of the classifier's inputs.
    """

    reference: nn.Module
    kept: Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What a regulariser is built from.

    Attributes:
        regulariser: its configuration.
        model: the network to train.
        source: the source network.
        input_size: (3, H, W).
        channels: of a statically pruned network; None where the networks have the same channels.
        weights: DELTA's channel weights by layer.
    """

    regulariser: Regulariser
    model: nn.Module
    source: nn.Module
    input_size: tuple[int, int, int]
    channels: Channels | None = None
    weights: Mapping[str, Tensor] | None = None

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of the compared layers, in the source's width."""
        network = self.model if self.channels is None else self.source
        return feature_shapes(network, feature_names(network, self.regulariser.features), self.input_size)


@dataclass(frozen=True)
class Seen:
    """One batch: features by layer in the source's width, classifier inputs, and the source's features and logits."""

    student: Mapping[str, Tensor]
    inputs: Tensor | None
    source: Mapping[str, Tensor]
    source_logits: Tensor | None


class Kind:
    """What one regulariser does; the defaults are those of plain weight decay.

    Attributes:
        needs_source: whether it is against a source network.
        needs_teacher: whether the source runs on every batch.
        taps: whether it compares feature maps.
        weighted: whether its terms hold their weights already; else the first is multiplied by the strength, and the
            others are only watched.
        slot: the attribute of the objective, and so the prefix of its state, in which the module lives.
        weights_classifier: whether the decay of the classifier is among its own terms, not left to the optimiser.
        is_decay: whether the strength is the optimiser's weight decay.
    """

    needs_source = True
    needs_teacher = True
    taps = True
    weighted = False
    slot = "term"
    weights_classifier = False
    is_decay = False

    def build(self, setting: Setting) -> nn.Module | None:
        """The module with the state, or None."""
        return None

    def measure(self, module: nn.Module | None, seen: Seen) -> dict[str, Tensor]:
        """Named terms of one batch, the regulariser's own first."""
        return {}


class WeightDecay(Kind):
    """L2: a/2 |(w, v)|^2, applied by the optimiser."""

    needs_source = needs_teacher = taps = False
    is_decay = True


class StartingPoint(Kind):
    """L2-SP: a/2 |w - w0|^2 + b/2 |v|^2; w0 is the source itself, also for a network trained and pruned since."""

    needs_teacher = taps = False
    weighted = weights_classifier = True
    slot = "_l2sp"

    def build(self, setting: Setting) -> nn.Module:
        source = setting.source if setting.channels is None else setting.channels.reference
        return L2SP(
            setting.model,
            alpha=setting.regulariser.strength,
            beta=setting.regulariser.classifier_decay,
            reference=dict(source.named_parameters()),
        )

    def measure(self, module: nn.Module | None, seen: Seen) -> dict[str, Tensor]:
        assert module is not None
        return module()


class OldClassifier(Kind):
    """LwF: distillation of the source's outputs through the old classifier, which is trained along."""

    taps = False

    def build(self, setting: Setting) -> nn.Module:
        # The head keeps the source's width, so its state fits at every budget; removed inputs are zero.
        head = setting.source.get_submodule(classifier_name(setting.source))
        assert isinstance(head, nn.Linear)
        return LwFLoss(head)

    def measure(self, module: nn.Module | None, seen: Seen) -> dict[str, Tensor]:
        assert module is not None
        return {"lwf": module(seen.inputs, seen.source_logits)}


class FeatureMap(Kind):
    """Feature map: sum over layers of C/(2HW) sum_c 1/C |f_T,c - f_S,c|^2."""

    key = "feature_map"

    def build(self, setting: Setting) -> nn.Module:
        return DELTALoss(uniform_weights(setting.shapes()))

    def measure(self, module: nn.Module | None, seen: Seen) -> dict[str, Tensor]:
        assert module is not None
        return {self.key: module(seen.student, seen.source)}


class WeightedFeatureMap(FeatureMap):
    """DELTA: the feature map with channel weights that a stage before the training has found."""

    key = "delta"

    def build(self, setting: Setting) -> nn.Module:
        shapes, weights = setting.shapes(), setting.weights
        if weights is None:
            raise AFDSError("DELTA needs its channel weights; compute them with losses.channel_weights")
        wrong = [name for name, shape in shapes.items() if name not in weights or len(weights[name]) != shape[0]]
        if wrong:
            raise AFDSError(f"DELTA's channel weights do not fit layer {wrong[0]!r}; compute them for this source")
        return DELTALoss({name: weights[name] for name in shapes})


class AttentionMap(FeatureMap):
    """AT: sum over layers of the activation-based distance, in the public code's scale."""

    key = "at"

    def build(self, setting: Setting) -> nn.Module:
        return ATLoss(setting.shapes())


class AttentiveFeatureMap(Kind):
    """AFD: the feature map with attention over channels, learned jointly or beforehand."""

    def build(self, setting: Setting) -> nn.Module:
        return AFDLoss(setting.shapes(), attention=setting.regulariser.attention)

    def measure(self, module: nn.Module | None, seen: Seen) -> dict[str, Tensor]:
        assert module is not None
        return module(seen.student, seen.source)


KINDS: dict[str, Kind] = {
    "l2": WeightDecay(),
    "l2sp": StartingPoint(),
    "feature-map": FeatureMap(),
    "afd": AttentiveFeatureMap(),
    "lwf": OldClassifier(),
    "delta": WeightedFeatureMap(),
    "at": AttentionMap(),
}


def widened(features: Tensor, kept: Tensor, width: int) -> Tensor:
    """Puts a pruned network's channels (B, C', ...) at their places among the source's (B, C, ...), zeros elsewhere."""
    full = features.new_zeros(features.shape[0], width, *features.shape[2:])
    return full.index_copy(1, kept.to(features.device), features)


def kept_flags(kept: Mapping[str, Tensor], widths: Mapping[str, int], names: Iterable[str]) -> dict[str, Tensor]:
    """bool (C,) by layer: which of the source's channels the pruned network still has."""
    flags = {}
    for name in names:
        flags[name] = torch.zeros(widths[name], dtype=torch.bool)
        flags[name][kept[name]] = True
    return flags
