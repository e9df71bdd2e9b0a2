"""AFDS with its budgets met in another way after the last step: what `selection.settle` cost it. [ours]

By the mean of their gates, channels that matter were removed at times, with no training afterwards; found after the
comparison was finished. Its numbers stay as they are, and these stand beside them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from afdslib import collapse, runs

if TYPE_CHECKING:
    from afdslib.comparison import Comparison

__all__ = ["COLUMNS", "chains", "table", "text"]

COLUMNS = ["attention", "seed", "budget", "macs", "test_accuracy", "validation_accuracy", "removed", "run"]


def chains(comparison: Comparison, attention: str) -> list[tuple[int, float, Any]]:
    """(seed, budget, run) down to the primary budget, seed by seed, with the settings of `collapse.chains`."""
    last = comparison.rules.primary_budget
    return [
        (seed, budget, replace(config, settle_by="taylor"))
        for seed, budget, config in collapse.chains(comparison, attention)
        if last <= budget < 1
    ]


def table(comparison: Comparison) -> pd.DataFrame:
    """What is finished, one row per point."""
    rows = []
    for attention in collapse.VARIANTS:
        for seed, budget, config in chains(comparison, attention):
            result = runs.lookup(config)
            if result is not None and "diverged" not in result.metrics:
                rows.append((attention, seed, budget, *(result.metrics[key] for key in COLUMNS[3:-1]), result.id))
    return pd.DataFrame(rows, columns=COLUMNS)
