"""Losses and regularisers: pure functions on tensors, and a thin module where there is state.

The student (the target network) comes first and the teacher (the source) second, everywhere.
"""

from afdslib.losses.afd import AFDLoss
from afdslib.losses.at import ATLoss, at_loss, attention_map, gradient_at_loss, input_gradient
from afdslib.losses.delta import DELTALoss, channel_weights, fit_classifier
from afdslib.losses.hint import hint_loss
from afdslib.losses.kd import kd_loss, soft_kl_loss
from afdslib.losses.l2sp import L2SP
from afdslib.losses.lwf import lwf_loss
from afdslib.losses.nst import nst_loss
from afdslib.losses.schedules import BetaSchedule
from afdslib.losses.term import TERMS, TRANSFERS, Axis, Batch, Term, TermContext

__all__ = [
    "AFDLoss", "ATLoss", "Axis", "Batch", "BetaSchedule", "DELTALoss", "L2SP", "TERMS", "TRANSFERS", "Term",
    "TermContext", "at_loss", "attention_map", "channel_weights", "fit_classifier", "gradient_at_loss", "hint_loss",
    "input_gradient", "kd_loss", "lwf_loss", "nst_loss", "soft_kl_loss",
]  # fmt: skip
