"""What a profile is: every setting of a study in one frozen dataclass."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from afdslib import runs
from afdslib.experiments import AFSSourceRun, DataSource, Network, SourceRun
from afdslib.training import Optimisation
from afdslib.training.objective import Regulariser

__all__ = ["BUDGETS", "RECALLED_SCHEDULE", "SCALES", "Candidates", "Profile", "show"]

SCALES = ("quick", "standard", "full")
"""How much of a study is made."""

BUDGETS = (1.0, 0.5, 0.25, 0.2, 0.125, 0.1, 0.05)


@dataclass(frozen=True)
class Candidates:
    """A regulariser, and the strengths among which validation images choose on the unpruned network; a single strength
    is taken as it is."""

    regulariser: Regulariser
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Profile:
    """A study.

    Attributes:
        name, scale: of the study, and how much of it is made: "quick" or "standard".
        source, targets: data sets; the first target is the primary one.
        network: backbone of source and target.
        source_training, source_weight_decay: of the plain source network; 0 steps with published weights.
        afs_training: fine-tuning of the converted source at density 1.
        candidates: the regularisers compared, with the strengths that validation chooses from.
        trial, trial_seed: of a trial that chooses a strength; the seed is none of `seeds`.
        transfer, tuning: optimisation of the unpruned stage, and of each stage after it.
        seeds: of the reported runs; each draws its own fitting images, initialisation and order.
        gates: "all" or "blocks".
        budgets: shares of the dense MACs, decreasing from 1.
        delta_s: threshold below which gates become constant.
        density_floor: lowest density d; the masks do the rest.
        macs_images: training images on which a budget is met.
        statistics_images: training images from whose gates AFS makes its masks; 0 for all.
        first_update: share of a stage after which AFS removes channels.
        freeze_first: whether that update freezes gates, too; if not, only the later one does.
        settle_by: what channels are ranked by when the budget is met once more after the last step: "q", the mean gate,
            or "taylor"; "" for not meeting it once more.
        committed: whether finished results go to data/results/ to be committed.
        left_out: numbers of the notebooks that `afds run` executes only where `--notebook` names them.
        not_run: what of this profile has never been run, said in the report.
        variant_of: the profile whose question this one asks of other data; empty for none.
    """

    name: str
    scale: str
    source: DataSource
    targets: tuple[DataSource, ...]
    network: Network
    source_training: Optimisation
    source_weight_decay: float
    afs_training: Optimisation
    candidates: tuple[Candidates, ...]
    trial: Optimisation
    trial_seed: int
    transfer: Optimisation
    tuning: Optimisation
    seeds: tuple[int, ...]
    gates: str = "all"
    budgets: tuple[float, ...] = BUDGETS
    delta_s: float = 0.01
    density_floor: float = 0.5
    macs_images: int = 256
    statistics_images: int = 0
    first_update: float = 0.02
    freeze_first: bool = False
    settle_by: str = "taylor"
    committed: bool = True
    left_out: tuple[str, ...] = ()
    not_run: str = ""
    variant_of: str = ""

    @property
    def source_run(self) -> SourceRun:
        """The plain source network."""
        return SourceRun(self.source, self.network, self.source_training, self.source_weight_decay)

    @property
    def afs_source_run(self) -> AFSSourceRun:
        """The converted source network, fine-tuned at density 1 so that its predictors learn."""
        return AFSSourceRun(self.source_run, self.source, self.afs_training, self.gates)


RECALLED_SCHEDULE: dict[str, Any] = {"first_update": 0.5, "freeze_first": True, "settle_by": ""}
"""Masks are first updated, and gates frozen, between a stage's halves [recall]; of the studies that were made so."""


def show(profile: Profile) -> str:
    """The whole profile as JSON."""
    return json.dumps(runs.to_json(profile), indent=2)
