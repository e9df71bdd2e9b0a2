"""The statistics of the comparison, fixed before its numbers: see `PROTOCOL`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from afdslib.base.errors import AFDSError

__all__ = [
    "LEVEL", "PRIMARY_BUDGET", "PROTOCOL", "Interval", "Paired", "at", "by_seed", "holm", "interval",
    "macs_within", "paired", "paired_seeds", "paired_table", "points", "rank_on_validation", "rival", "sentence",
]  # fmt: skip

PROTOCOL = """\
- **Primary endpoint**: test accuracy at a tenth of the dense network's MACs on CIFAR-10 with 60 images per class, AFDS
  (AFD + AFS) minus the rival. The same endpoint on the class-disjoint target is secondary: AFDS and three rivals at
  five paired seeds (ten at first; changed before a network was trained on that target, for the cost; later, with no
  result looked at, narrower networks were confined to the endpoint).
- **The rival** is the competitor with the highest mean VALIDATION accuracy at that budget over the first seeds, which
  all methods have (one that lost a seed comes last). AFDS and the best few competitors get ten seeds, the others three.
  A pair that holds AFD or AFS is a part of AFDS, reported as an ablation, and no competitor.
- **Pairs**: one seed means the same fitting images for both methods, and the same initial classifier and order of
  images where both have such (a narrower network has a classifier of its own size, and one stage instead of several).
  The difference is the mean over seeds, with Student's 95 % interval.
- **Everything else is exploratory**: two-sided paired t tests, Holm-corrected within a table.
- **Confirmation**: detached attention, an ablation that beat AFDS at three seeds of the primary target, was found by
  looking at test accuracy. It is tried again on the class-disjoint target, with AFDS's settings and seeds, fixed before
  a network was trained there: confirmed if the 95 % interval of its paired difference from AFDS lies above 0.
- **Secondary**: the MACs a method needs to stay within one point of its dense network, linear between the budgets.
"""
"""As the report prints it."""

PRIMARY_BUDGET = 0.1
LEVEL = 0.95
POINTS = 1.0
"""Of accuracy: how far below its dense network a method may fall in the MACs it needs."""


@dataclass(frozen=True)
class Interval:
    """Mean, standard deviation (n - 1) and Student's interval of n numbers; `sd`, `low`, `high` are NaN for one."""

    mean: float
    sd: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Mean and Student's confidence interval.

    Raises:
        AFDSError: no value, or one that is not finite.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise AFDSError(f"an interval needs at least one finite number, got {list(values)!r}")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, math.nan, math.nan, math.nan, 1)
    from scipy import stats

    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, x.size - 1)) * sd / math.sqrt(x.size)
    return Interval(mean, sd, mean - half, mean + half, x.size)


@dataclass(frozen=True)
class Paired:
    """A paired difference.

    Attributes:
        difference: of the two methods, seed by seed.
        p: of the two-sided paired t test; NaN for fewer than two seeds; 1 if all differences are 0.
        seeds: in both.
    """

    difference: Interval
    p: float
    seeds: tuple[int, ...]


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Paired:
    """The difference of two methods over the seeds they share.

    Raises:
        AFDSError: if they share none.
    """
    seeds = tuple(sorted(set(one) & set(other)))
    if not seeds:
        raise AFDSError("the two methods share no seed, so they cannot be compared in pairs; compute both")
    d = interval([one[s] - other[s] for s in seeds])
    if d.n == 1:
        return Paired(d, math.nan, seeds)
    if d.sd == 0:
        return Paired(d, 1.0 if d.mean == 0 else 0.0, seeds)
    from scipy import stats

    t = d.mean / (d.sd / math.sqrt(d.n))
    return Paired(d, float(2 * stats.t.sf(abs(t), d.n - 1)), seeds)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p values, in the order given; NaN stays NaN and is not counted. Holm 1979.

    Raises:
        AFDSError: for a number outside 0 to 1.
    """
    numbers = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    if any(not 0 <= value <= 1 for value, _ in numbers):
        raise AFDSError(f"p values lie between 0 and 1, got {list(p)!r}")
    corrected, worst = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(numbers):
        corrected[i] = worst = max(worst, min(1.0, (len(numbers) - rank) * value))
    return corrected


def macs_within(
    curve: Mapping[float, tuple[float, float]], *, points: float = POINTS, dense: float | None = None
) -> float | None:
    """The smallest share of MACs at which a method still is within some points of the dense network.

    Going down the budgets from the unpruned point, linear between the last point above the line and the first below.

    Args:
        curve: budget -> (measured share of MACs, accuracy), with budget 1.
        points: of accuracy, in percent.
        dense: accuracy of the dense network; default: the curve's own at budget 1.

    Returns:
        The share; None if even the unpruned point is below the line.

    Raises:
        AFDSError: without a point at budget 1.
    """
    if 1.0 not in curve:
        raise AFDSError("the curve has no unpruned point; give the accuracy at budget 1")
    line = (curve[1.0][1] if dense is None else dense) - points / 100
    before: tuple[float, float] | None = None
    for budget in sorted(curve, reverse=True):
        share, accuracy = curve[budget]
        if accuracy < line - 1e-12:
            if before is None:
                return None
            weight = (before[1] - line) / (before[1] - accuracy)
            return before[0] + weight * (share - before[0])
        before = share, accuracy
    return share


# of a table


def at(table: pd.DataFrame, budget: float) -> pd.DataFrame:
    """The rows at a budget, a share of the dense MACs."""
    return table[(table.budget - budget).abs() < 1e-9]


def _at(table: pd.DataFrame, budget: float) -> pd.DataFrame:
    rows = at(table, budget)
    if rows.empty:
        raise AFDSError(f"the comparison has no row at {1 / budget:g}x")
    return rows


def by_seed(rows: pd.DataFrame, value: str = "test_accuracy") -> dict[int, float]:
    """A column of one method's rows at one budget, by seed."""
    return {int(seed): float(v) for seed, v in zip(rows.seed, rows[value], strict=True)}


def rank_on_validation(
    table: pd.DataFrame, *, budget: float = PRIMARY_BUDGET, seeds: Sequence[int] | None = None
) -> list[str]:
    """Competitors by mean validation accuracy at a budget, best first; no test number is looked at.

    One that lost a seed, because it diverged or could not reach the budget, stands behind those that did not: the mean
    over what survived is no fair one.

    Args:
        table: columns method, role, seed, budget, validation_accuracy.
        budget, seeds: only these.
    """
    rows = _at(table, budget)[["method", "role", "seed", "validation_accuracy"]]
    rows = rows[(rows.role == "competitor") & (True if seeds is None else rows.seed.isin(list(seeds)))]
    methods = rows.dropna(subset="validation_accuracy").groupby("method", sort=True)
    ranked = methods.agg(seeds=("seed", "nunique"), mean=("validation_accuracy", "mean"))
    return list(ranked.sort_values(["seeds", "mean"], ascending=False, kind="stable").index)


def rival(table: pd.DataFrame, **kwargs: Any) -> str:
    """The best competitor on validation images; see `rank_on_validation`.

    Raises:
        AFDSError: if no competitor has a point there.
    """
    if not (ranked := rank_on_validation(table, **kwargs)):
        raise AFDSError("no competitor has a point at the primary budget; see missing.csv for the reasons")
    return ranked[0]


def paired_table(table: pd.DataFrame, *, budget: float = PRIMARY_BUDGET) -> pd.DataFrame:
    """Test accuracy of AFDS minus every other method's at one budget, in points; p values Holm-corrected.

    Returns:
        Columns method, role, seeds, validation, mean, sd (these three of the method, of all its seeds), difference,
        low, high, p, p_holm, best first.
    """
    rows = _at(table, budget)
    ours, pairs = by_seed(rows[rows.method == "afd+afs"]), []
    for name, here in rows[rows.method != "afd+afs"].groupby("method", sort=False):
        accuracy = by_seed(here)
        if set(ours) & set(accuracy):
            own, pair = interval(list(accuracy.values())), paired(ours, accuracy)
            validation, d = interval(list(here.validation_accuracy)).mean, pair.difference
            shares = (100 * value for value in (validation, own.mean, own.sd, d.mean, d.low, d.high))
            pairs.append((name, here.role.iloc[0], len(pair.seeds), *shares, pair.p))
    columns = ["method", "role", "seeds", "validation", "mean", "sd", "difference", "low", "high", "p"]
    result = pd.DataFrame(pairs, columns=columns)
    result["p_holm"] = holm(list(result.p))
    return result.sort_values(["difference", "method"], ignore_index=True)


def sentence(
    table: pd.DataFrame, *, budget: float = PRIMARY_BUDGET, seeds: Sequence[int] | None = None,
    names: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """The report's sentence: "AFDS is X [interval] points above (below) the best of our competitors, Z, at 10x."

    Args:
        table, budget: of the comparison; the primary one.
        seeds: on which the rival is chosen; default: all.
        names: of methods, for readers.
    """
    best, rows = rival(table, budget=budget, seeds=seeds), _at(table, budget)
    d = paired(*(by_seed(rows[rows.method == method]) for method in ("afd+afs", best))).difference
    side = "above" if d.mean > 0 else "below" if d.mean < 0 else "beside"
    text = f"AFDS is {abs(100 * d.mean):.1f} points {side} the best of our competitors, "
    text += f"{(names or {}).get(best, best)}, at {1 / budget:g}x"
    if d.n < 2:
        return f"{text} ({paired_seeds(d.n)}, so the interval is not known)."
    text += f" (difference {points(d)} points, {paired_seeds(d.n)})"
    return f"{text}, which is undecided." if d.low <= 0 <= d.high else f"{text}."


def points(difference: Interval) -> str:
    """A difference of shares in points with its interval: "+3.8 [+3.1, +4.4]"."""
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def paired_seeds(n: int) -> str:
    """How many: "1 paired seed", "3 paired seeds"."""
    return f"{n} paired seed{'s' if n > 1 else ''}"
