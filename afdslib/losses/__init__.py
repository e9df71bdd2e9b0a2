"""Losses and regularisers: pure functions on tensors, and a thin module where there is state.

The student (the target network) comes first and the teacher (the source) second, everywhere.
"""

from .at import ATLoss, at_loss, attention_map, gradient_at_loss, input_gradient
from .delta import DELTALoss, channel_weights, fit_classifier, uniform_weights
from .hint import Hint, hint_loss
from .kd import kd_loss, soft_ce_loss, soft_kl_loss
from .l2sp import L2SP, classifier_l2, l2_loss
from .lwf import LwFLoss, lwf_loss
from .nst import nst_loss
from .schedules import BetaSchedule

__all__ = [
    "ATLoss",
    "BetaSchedule",
    "DELTALoss",
    "Hint",
    "L2SP",
    "LwFLoss",
    "at_loss",
    "attention_map",
    "channel_weights",
    "classifier_l2",
    "fit_classifier",
    "gradient_at_loss",
    "hint_loss",
    "input_gradient",
    "kd_loss",
    "l2_loss",
    "lwf_loss",
    "nst_loss",
    "soft_ce_loss",
    "soft_kl_loss",
    "uniform_weights",
]
