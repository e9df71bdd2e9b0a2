"""A study in miniature that a notebook's own cells can work on, with one fault in the library."""

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import tiny
from mutants import selection, study

from afdslib import training
from afdslib.experiments import DataSource
from afdslib.studies import profiles
from afdslib.studies.profile import Candidates, Profile
from afdslib.training.objective import Regulariser

FAULTS = {
    "lambda_is_zero": study.lambda_is_zero,
    "gates_ignored": selection.gates_ignored,
    "target_labels_shuffled": study.target_labels_shuffled,
}


def profile() -> Profile:
    """Feature map and AFD on the tiny images, one seed, down to 5x: less costs one channel per layer already."""
    stage = tiny.settings(4, log_rows=2)
    return replace(
        profiles.get("demo"), name="tiny", source=tiny.SOURCE.data, targets=(DataSource("tiny-target"),), seeds=(0,),
        network=tiny.SOURCE.network, source_training=tiny.SOURCE.optimisation,
        afs_training=tiny.AFS_SOURCE.optimisation, transfer=tiny.settings(24, log_rows=2), tuning=stage,
        budgets=(1.0, 0.5, 0.2), macs_images=12,
        candidates=tuple(Candidates(Regulariser(name, 0.01), (0.01,)) for name in ("feature-map", "afd")),
    )  # fmt: skip


def install(fault: str) -> ExitStack:
    """While the returned stack is kept: the study and the images of a test, a store of its own, and a fault."""
    found = profile()
    os.environ["AFDS_RUNS"] = str(tiny.store(Path(fault)).resolve())
    stack = ExitStack()
    stack.enter_context(tiny.served())
    stack.enter_context(mock.patch.object(profiles, "get", lambda *_: found))
    stack.enter_context(mock.patch.object(training, "cores", lambda: 1))
    stack.enter_context(FAULTS[fault]())
    return stack
