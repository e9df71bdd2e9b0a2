"""Over how many channels AFD's attention spreads while a network is pruned: the collapse that a joint attention risks.

The attention is trained to make the loss small that it weights, so it may move to the channels that are easiest to
match. A detached one is trained beforehand and cannot. Both are followed from budget to budget. [ours]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from afdslib import runs
from afdslib.base.text import times
from afdslib.studies.protocol import Method
from afdslib.studies.statistics import by_seed, paired, paired_seeds, points
from afdslib.training.features import compared_shapes

if TYPE_CHECKING:
    from afdslib.experiments import Network
    from afdslib.studies.comparison import Comparison

__all__ = ["COLUMNS", "VARIANTS", "chains", "confirmation_text", "text", "uniform_width", "widths"]

VARIANTS = {"joint": Method("afd", "afs"), "detached": Method("afd-detached", "afs")}
COLUMNS = ["attention", "seed", "budget", "width", "uniform", "macs", "test_accuracy", "run"]


def uniform_width(network: Network, features: str = "block") -> float:
    """The width of a uniform attention: the geometric mean of the compared layers' channels."""
    shapes = compared_shapes(network, features).values()
    return math.exp(sum(math.log(channels) for channels, _, _ in shapes) / len(shapes))


def chains(comparison: Comparison, attention: str) -> list[tuple[int, float, Any]]:
    """(seed, budget, run) of every point of AFDS, or of the same with detached attention and AFDS's settings."""
    rules, tuned = comparison.rules, replace(comparison.tuned(VARIANTS["joint"]), method=VARIANTS[attention])
    return [
        (seed, budget, comparison.point(tuned, seed, rules.budgets[: i + 1]))
        for seed in rules.seeds
        for i, budget in enumerate(rules.budgets)
    ]


def widths(comparison: Comparison) -> pd.DataFrame:
    """The attention's width at the end of each finished point of AFDS and of its variant with detached attention.

    Width is exp of the entropy (nats, mean over samples and layers): the number of channels of a uniform attention with
    that entropy, as a geometric mean over layers.

    Returns:
        Columns attention ("joint" or "detached"), seed, budget, width, uniform, macs, test_accuracy, run.
    """
    uniform = uniform_width(comparison.profile.network)
    rows = []
    for name in VARIANTS:
        for seed, budget, config in chains(comparison, name):
            result = runs.lookup(config)
            if result is None or "diverged" in result.metrics:
                continue
            width = math.exp(float(result.history().entropy.iloc[-1]))
            measured = (result.metrics[key] for key in ("macs", "test_accuracy"))
            rows.append((name, seed, budget, width, uniform, *measured, result.id))
    return pd.DataFrame(rows, columns=COLUMNS)


def text(table: pd.DataFrame, main: pd.DataFrame, *, budget: float) -> str:
    """What became of the attention by one budget, and what detaching it changes there.

    Args:
        table: of `widths`.
        main: of `Comparison.sweep`.
        budget: the endpoint's.
    """
    here = table[(table.budget - budget).abs() < 1e-9]
    joint, detached = (here[here.attention == name] for name in VARIANTS)
    if joint.empty:
        return ""
    unpruned = table[(table.attention == "joint") & (table.budget == 1)].width.mean()
    said = [
        f"How wide AFD's attention is: uniform, it would be {table.uniform.iloc[0]:.0f} channels (geometric mean over "
        f"layers); the joint one is {unpruned:.0f} wide in the unpruned network and {joint.width.mean():.1f} at "
        f"{times(budget)}."
    ]
    if not detached.empty:
        gain = paired(by_seed(detached), by_seed(joint)).difference
        said.append(
            f"The detached one is {detached.width.mean():.0f} wide there; the accuracy of detached minus joint: "
            f"{points(gain)} points, {paired_seeds(gain.n)} (exploratory)."
        )
    delta = main[(main.method == "delta+afs") & ((main.budget - budget).abs() < 1e-9)]
    if not delta.empty:
        gain = paired(by_seed(delta), by_seed(joint)).difference
        said.append(
            f"DELTA, which fixes its weights beforehand too, minus AFD, both with AFS: {points(gain)} points, "
            f"{paired_seeds(gain.n)}."
        )
    return " ".join(said)


def confirmation_text(
    table: pd.DataFrame, main: pd.DataFrame, *, budget: float, rival: str, seeds: Sequence[int]
) -> str:
    """Whether detached attention is confirmed: its difference from the joint one, and from the rival.

    Args:
        table: of `widths`.
        main: of `Comparison.sweep`.
        budget: the endpoint's.
        rival: its method.
        seeds: of the protocol; there is no verdict before all of them are there.
    """
    here = table[(table.budget - budget).abs() < 1e-9]
    joint, detached = (by_seed(here[here.attention == name]) for name in VARIANTS)
    theirs = by_seed(main[(main.method == rival) & ((main.budget - budget).abs() < 1e-9)])
    there = set(joint) & set(detached) & set(theirs)
    if not there >= set(seeds):
        return f"Detached attention: {len(there)} of {len(seeds)} seeds are there, so nothing is said of it yet."
    gain, beside = (paired(detached, other).difference for other in (joint, theirs))
    verdict = "confirmed" if gain.low > 0 else "not confirmed"
    return (
        f"Detached attention, found on the primary target, is {verdict} here: {points(gain)} points from AFDS and "
        f"{points(beside)} from the rival, {Method.parse(rival).label}, {paired_seeds(gain.n)}."
    )
