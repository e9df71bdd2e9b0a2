"""What the report says first: the answer, which method to use when, and why, from every committed comparison."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.figure import Figure

from afdslib.base.errors import AFDSError
from afdslib.base.text import times
from afdslib.report import claims, plots
from afdslib.report.comparison import Compared, each, settled_text
from afdslib.report.numbers import Number, minus
from afdslib.report.tables import Table, Text, bullets, mean_sd, place
from afdslib.studies import ablations, statistics
from afdslib.studies.protocol import AFDS, Method
from afdslib.studies.statistics import at

__all__ = ["by_budget", "differences", "scale_text", "text", "use_table", "use_text", "why_text"]

NONE = "No comparison is committed, so there is no answer yet."
CLAIM = """\
AFDS (attentive feature distillation and selection) fine-tunes a network to a small data set while it removes and skips
channels. The [paper](https://openreview.net/forum?id=ryxyCeHtPB) says: at a tenth of the multiply-accumulates (MACs) it
is 11.07 points more accurate than its best competitor, with ResNet-101 from ImageNet to Stanford Dogs. [paper]"""
WEAKEST = """\
**The weakest point:** the paper's own experiment has not been run. Networks and images here are smaller, trainings
are a few hundred steps, and all seeds share one source network. So its number is untested, neither supported nor
refuted."""


def _against(rows: pd.DataFrame, method: str) -> Number:
    """AFDS minus another method, over the rows of one budget."""
    if (found := minus(rows[rows.method == AFDS.key], rows[rows.method == method])) is None:
        raise AFDSError(f"AFDS and {method} share no seed; compute both")
    return found


def text(every: Sequence[Compared]) -> Text:
    """The answer in one paragraph: the claim, sign, size, interval and seeds of each study, and the weakest point."""
    if not every:
        return Text(NONE)
    gaps = [_against(at(c.table, c.budget), c.rival) for c in every]
    found = {claims.of_interval(gap) for gap in gaps}
    sign = {
        frozenset({claims.SUPPORTED}): "In what could be run here AFDS is ahead, too.",
        frozenset({claims.NOT_SUPPORTED}): "In what could be run here the sign is the opposite.",
    }.get(frozenset(found), "What could be run here does not settle it.")
    parts = []
    for c, gap in list(zip(every, gaps, strict=True))[:3]:  # the rest is in the figure
        value, rival = str(gap).removesuffix(" points"), Method.parse(c.rival).label
        parts.append(f"{value} on {place(c.comparison.target.title)} ({gap.n} seeds; {rival})")
    weakest = WEAKEST if claims.judge()[2].verdict == claims.UNTESTED else ""
    head = f"**{sign}** AFDS minus its best competitor, in points of test accuracy [95 % interval]: {'; '.join(parts)}."
    return Text(f"{CLAIM} {head} {weakest}".strip())


def scale_text(every: Sequence[Compared]) -> Text:
    """The network of each study, where it comes from, and how many methods were compared."""
    lines = []
    for c in every:
        p, macs = c.comparison.profile, c.table.dense_macs.iloc[0] / 1e6
        text = f"**{c.comparison.target.title}**: {p.network.name} of width {p.network.width:g}, {macs:.0f} M MACs, "
        lines.append(place(f"{text}from {p.source.name}; {c.table.method.nunique()} methods."))
    return Text(bullets(lines))


def differences(every: Sequence[Compared]) -> Figure:
    """The main figure: AFDS minus each other method at the endpoint's budget, a panel per study."""
    return plots.paired({c.comparison.target.title: c.paired for c in every}) if every else plots.sentence(NONE)


def by_budget(every: Sequence[Compared]) -> Figure:
    """AFDS minus the competitors that have all seeds, at every budget, a panel per study."""
    panels = {}
    for c in every:
        full = c.table[(c.table.role == "competitor") & (c.table.seed == max(c.rules.seeds))].method.unique()
        rows = [
            (str(method), float(budget), found.value, found.low, found.high)
            for (method, budget), here in c.table.groupby(["method", "budget"], sort=False)
            if method in full and (found := minus(at(c.table[c.table.method == AFDS.key], float(budget)), here))
        ]
        columns = ["method", "budget", "difference", "low", "high"]
        panels[c.comparison.target.title] = pd.DataFrame(rows, columns=columns)
    return plots.by_budget(panels) if panels else plots.sentence(NONE)


def _by_budget(c: Compared) -> Iterator[tuple[float, pd.DataFrame, str, Number]]:
    """(budget, rows, the best competitor on validation images, AFDS minus it) at each budget."""
    for budget in sorted(c.table.budget.unique(), reverse=True):
        rows = at(c.table, budget)
        rival = statistics.rival(rows, budget=budget, seeds=c.rules.seeds[: c.rules.rest])
        yield budget, rows, rival, _against(rows, rival)


def use_text(every: Sequence[Compared]) -> Text:
    """By study: down to which budget AFDS is within a point of the best competitor, and what is best below that."""
    lines = []
    for c in every:
        found = list(_by_budget(c))
        near = list(itertools.takewhile(lambda one: one[3].value > -1, found))
        rest: dict[str, list[str]] = {}
        for budget, _, rival, _ in found[len(near) :]:
            rest.setdefault(Method.parse(rival).label, []).append(times(budget))
        take = "; ".join(f"{method} ({', '.join(budgets)})" for method, budgets in rest.items())
        text = f"**{place(c.comparison.target.title)}.** "
        text += f"Down to {times(near[-1][0])} AFDS is within a point of the best competitor." if near else ""
        text += f" {'Below that take' if near else 'Take'} {take}." if take else ""
        delta = c.table[c.table.method == "delta+afs"]
        if len(delta):
            ours = c.table[(c.table.method == AFDS.key) & c.table.seed.isin(delta.seed)]
            means = [rows.groupby("budget").test_accuracy.mean() for rows in (delta, ours)]
            count = int((means[0] > means[1]).sum())
            text += f" DELTA in the place of AFD, with the same AFS, has the higher mean at {count} of {len(means[0])}"
            text += f" budgets ({delta.seed.nunique()} seeds)."
        lines.append(text)
    return Text(bullets(lines) or NONE)


def use_table(every: Sequence[Compared]) -> Text:
    """By study and budget: the method that is best on validation images, of all and of the competitors, and AFDS."""

    def table(c: Compared) -> Table:
        seeds, lines = c.rules.seeds[: c.rules.rest], []
        for budget, rows, rival, difference in _by_budget(c):
            means = rows[rows.seed.isin(seeds)].groupby("method")[["validation_accuracy", "test_accuracy"]].mean()
            best = (means.validation_accuracy.idxmax(), rival)
            names = (f"{Method.parse(m).label}, {100 * means.test_accuracy[m]:.1f}" for m in best)
            ours = mean_sd(rows[rows.method == AFDS.key].test_accuracy, 100)
            lines.append([times(budget), *names, ours, str(difference).removesuffix(" points")])
        header = ["fewer MACs", "best of all, test %", "best competitor, test %", "AFDS, test %", "AFDS minus it"]
        return Table(header, lines, numbers=False)

    return each(every, table) or Text(NONE)


def why_text(every: Sequence[Compared]) -> Text:
    """What became of the attention in each study, what detaching it changes, and what meeting the budget costs."""
    lines = []
    for c in (c for c in every if not c.attention.empty):
        if c.rules.settings_of:
            known = c.attention, c.table
            said = ablations.confirmation_text(*known, budget=c.budget, rival=c.rival, seeds=c.rules.seeds)
        else:
            said = ablations.attention_text(c.attention, c.table, budget=c.budget)
            detached = at(c.attention[c.attention.attention == "detached"], c.budget)
            if found := minus(detached, at(c.table[c.table.method == c.rival], c.budget)):
                said += f" Detached attention minus {Method.parse(c.rival).label}: {found}."
        lines.append(f"**{place(c.comparison.target.title)}.** {said} {settled_text(c)}".strip())
    return Text(bullets(lines) or "No attention is stored.")
