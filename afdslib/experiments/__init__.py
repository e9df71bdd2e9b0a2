"""The runs: each is a frozen configuration that knows how to compute itself, and names the runs it needs.

Importing the package imports every kind of run, so that a stored configuration can be rebuilt by the name of its class.
"""

from afdslib.experiments.afs import TransferRun
from afdslib.experiments.competitors import DenseRun, FBSGatesRun, FBSRun, NarrowRun, PrunedRun, Selection
from afdslib.experiments.config import DataSource, Network, Photographs, Published, check_budgets
from afdslib.experiments.gates import GatesRun
from afdslib.experiments.source import AFSSourceRun, ChannelWeightsRun, ExtendedSourceRun, SourceRun, weights_run
from afdslib.experiments.stage import OBJECTIVE
from afdslib.experiments.student import Distillation, PhotoRun, StudentRun

__all__ = [
    "OBJECTIVE", "AFSSourceRun", "ChannelWeightsRun", "DataSource", "DenseRun", "Distillation", "ExtendedSourceRun",
    "FBSGatesRun", "FBSRun", "GatesRun", "NarrowRun", "Network", "PhotoRun", "Photographs", "PrunedRun", "Published",
    "Selection", "SourceRun", "StudentRun", "TransferRun", "check_budgets", "weights_run",
]  # fmt: skip
