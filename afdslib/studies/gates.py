"""Are the gates looking? What it costs AFDS when its gates are those of another image, or constant. [ours]

The rule, fixed before the first of these numbers: where shuffling the gates over all images costs less than half a
point, at the upper end of the 95 % interval over seeds, AFS is static pruning in disguise at that budget.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from afdslib import runs
from afdslib.experiments.gates import REPLACEMENTS, GatesRun
from afdslib.studies import engine
from afdslib.studies.comparison import Comparison
from afdslib.studies.engine import Cell
from afdslib.studies.protocol import AFDS
from afdslib.studies.statistics import interval

__all__ = ["DISGUISE", "GateStudy", "costs"]

DISGUISE = 0.005
"""Accuracy below which gates that look at the image are of no use."""
LABELS = {
    "own": "each image's own gates", "mean": "each gate's mean", "shuffled": "the gates of another image",
    "class": "the gates of another image of its class",
}  # fmt: skip


class GateStudy(engine.Plan):
    """AFDS's networks of a comparison, at every budget and seed, with their gates replaced.

    Args:
        comparison: whose points of AFDS.
    """

    part = "gates"

    def __init__(self, comparison: Comparison):
        super().__init__(comparison.profile)
        self.comparison = comparison

    def batches(self) -> Iterator[list[Cell]]:
        rules = self.comparison.rules
        cells = []
        for seed in rules.seeds:
            for last in range(len(rules.budgets)):
                point = self.comparison.cell(AFDS, seed, rules.budgets[: last + 1])
                # Of points that are not trained yet nothing is asked.
                if point.config is None or runs.lookup(point.config) is None:
                    continue
                kept = ("target", "method", "seed", "budget")
                keys = {key: point.keys[key] for key in kept}
                cells += [
                    Cell(GatesRun(point.config, gates), "gates", keys | {"variant": gates}) for gates in REPLACEMENTS
                ]
        yield cells


def costs(rows: pd.DataFrame) -> pd.DataFrame:
    """What each replacement costs, in accuracy: one row per budget and replacement.

    Args:
        rows: of the part "gates", with numbers in budget, seed and test_accuracy.

    Returns:
        budget, variant, label, cost (mean over seeds), low, high (95 %), seeds, disguise (whether the rule calls the
        gates static; only for "shuffled").
    """
    table = rows.pivot_table(index=["budget", "seed"], columns="variant", values="test_accuracy").reset_index()
    out = []
    for budget, some in table.sort_values("budget", ascending=False).groupby("budget", sort=False):
        for variant in REPLACEMENTS[1:]:
            lost = interval((some["own"] - some[variant]).dropna().tolist())
            out.append(
                {
                    "budget": budget, "variant": variant, "label": LABELS[variant], "cost": lost.mean,
                    "low": lost.low, "high": lost.high, "seeds": lost.n,
                    "disguise": variant == "shuffled" and lost.high < DISGUISE,
                }
            )  # fmt: skip
    return pd.DataFrame(out)
