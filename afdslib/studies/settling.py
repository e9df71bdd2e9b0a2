"""AFDS with its budgets met in another way after the last step: what `selection.settle` cost it. [ours]

By the mean of their gates, channels that matter were removed at times, with no training afterwards; found after the
comparison was finished. Its numbers stay as they are, and these stand beside them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from afdslib import runs
from afdslib.base.text import times
from afdslib.studies import collapse
from afdslib.studies.protocol import Method
from afdslib.studies.statistics import by_seed, paired, paired_seeds, points

if TYPE_CHECKING:
    from afdslib.studies.comparison import Comparison

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


def text(found: pd.DataFrame, before: pd.DataFrame, main: pd.DataFrame, *, budget: float, rival: str) -> str:
    """What settling by Taylor importance changes at a budget, and how far AFDS is from the rival then.

    Args:
        found: of `table`.
        before: of `collapse.widths`: the same networks, settled by mean gates.
        main: of `Comparison.sweep`.
        budget: the endpoint's.
        rival: its method.

    Returns:
        Empty where nothing is finished.
    """
    now, then = (t[(t.budget - budget).abs() < 1e-9] for t in (found, before))
    theirs = by_seed(main[(main.method == rival) & ((main.budget - budget).abs() < 1e-9)])
    settled = {name: by_seed(now[now.attention == name]) for name in collapse.VARIANTS}
    said = []
    for name, label in (("joint", "AFDS"), ("detached", "AFDS with detached attention")):
        mine, other = settled[name], by_seed(then[then.attention == name])
        if not (set(mine) & set(other) and set(mine) & set(theirs)):
            continue
        gain, beside = (paired(mine, of).difference for of in (other, theirs))
        each = ", ".join(f"{100 * (mine[seed] - other[seed]):+.1f}" for seed in sorted(set(mine) & set(other)))
        said.append(
            f"{label} gains {points(gain)} points by it, {paired_seeds(gain.n)} (seed by seed {each}), and is then "
            f"{points(beside)} from the rival, {Method.parse(rival).label}."
        )
    if set(settled["joint"]) & set(settled["detached"]):
        gain = paired(settled["detached"], settled["joint"]).difference
        said.append(f"Detached minus joint attention, both so: {points(gain)} points, {paired_seeds(gain.n)}.")
    elif set(settled["detached"]) & set(joint := by_seed(then[then.attention == "joint"])):
        gain = paired(settled["detached"], joint).difference
        said.append(
            f"Against joint attention, whose budgets are still met by mean gates (two things differ): {points(gain)} "
            f"points, {paired_seeds(gain.n)}."
        )
    if not said:
        return ""
    return f"Budgets met by Taylor importance after the last step (exploratory, at {times(budget)}): {' '.join(said)}"
