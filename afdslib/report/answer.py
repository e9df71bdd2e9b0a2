"""What the report says first: the answer, which method to use when, and why, from every committed comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from afdslib.base.text import times
from afdslib.report import claims, plots
from afdslib.report.comparison import Compared, settled_text
from afdslib.report.numbers import Number, of_interval
from afdslib.report.tables import Table, Text, bullets, mean_sd, place
from afdslib.studies import ablations, statistics
from afdslib.studies.protocol import AFDS, Method
from afdslib.studies.statistics import at, by_seed

__all__ = ["by_budget", "differences", "each", "text", "use_table", "why_text"]

NONE = "No comparison is committed, so there is no answer yet."
CLAIM = """\
AFDS (attentive feature distillation and selection) fine-tunes a network to a small data set while it removes and skips
channels. The paper says: at a tenth of the multiply-accumulates (MACs) it is 11.07 points more accurate than its best
competitor, with ResNet-101 from ImageNet to Stanford Dogs. [paper]"""
WEAKEST = """\
**The weakest point:** the paper's own experiment has not been run. Networks and images here are smaller, trainings
are a few hundred steps, and all seeds share one source network. So its number is untested, neither supported nor
refuted."""


def _minus(one: Mapping[int, float], other: Mapping[int, float]) -> Number:
    return of_interval(statistics.paired(one, other).difference, "points", signed=True)


def _against(c: Compared) -> Number:
    """AFDS minus the best competitor at the endpoint's budget."""
    rows = at(c.table, c.budget)
    return _minus(*(by_seed(rows[rows.method == method]) for method in (AFDS.key, c.rival)))


def text(every: Sequence[Compared]) -> Text:
    """The answer in one paragraph: the claim, sign, size, interval and seeds of each study, and the weakest point."""
    if not every:
        return Text(NONE)
    found = {claims.of_interval(_against(c)) for c in every}
    sign = {
        frozenset({claims.SUPPORTED}): "In what could be run here AFDS is ahead, too.",
        frozenset({claims.NOT_SUPPORTED}): "In what could be run here the sign is the opposite.",
    }.get(frozenset(found), "What could be run here does not settle it.")
    parts = []
    for c in every:
        difference, rival = _against(c), Method.parse(c.rival).label
        value = str(difference).removesuffix(" points")
        parts.append(f"{value} on {place(c.comparison.target.title)} ({difference.n} seeds; {rival})")
    weakest = WEAKEST if claims.judge()[2].verdict == claims.UNTESTED else ""
    head = f"**{sign}** AFDS minus its best competitor, in points of test accuracy [95 % interval]: {'; '.join(parts)}."
    return Text(f"{CLAIM} {head} {weakest}".strip())


def differences(every: Sequence[Compared]) -> Figure:
    """The main figure: AFDS minus each other method at the endpoint's budget, a panel per study."""
    return plots.paired({c.comparison.target.title: c.paired for c in every}) if every else plots.sentence(NONE)


def by_budget(every: Sequence[Compared]) -> Figure:
    """AFDS minus the competitors that have all seeds, at every budget, a panel per study."""
    panels = {}
    for c in every:
        full = c.table[(c.table.role == "competitor") & (c.table.seed == max(c.rules.seeds))].method.unique()
        rows = []
        for method, budget in ((m, b) for m in full for b in sorted(c.table.budget.unique(), reverse=True)):
            here = at(c.table, budget)
            one, other = (by_seed(here[here.method == name]) for name in (AFDS.key, method))
            if set(one) & set(other):
                found = _minus(one, other)
                rows.append((method, budget, found.value, found.low, found.high))
        columns = ["method", "budget", "difference", "low", "high"]
        panels[c.comparison.target.title] = pd.DataFrame(rows, columns=columns)
    return plots.by_budget(panels) if panels else plots.sentence(NONE)


def use_table(every: Sequence[Compared]) -> Text:
    """By study and budget: the method that is best on validation images, of all and of the competitors, and AFDS."""
    parts = []
    for c in every:
        seeds, rows = c.rules.seeds[: c.rules.rest], []
        for budget in sorted(c.table.budget.unique(), reverse=True):
            here = at(c.table, budget)
            accuracies = here[here.seed.isin(seeds)].groupby("method")[["validation_accuracy", "test_accuracy"]].mean()
            best, rival = accuracies.validation_accuracy.idxmax(), statistics.rival(here, budget=budget, seeds=seeds)
            ours, theirs = (here[here.method == method] for method in (AFDS.key, rival))
            minus = _minus(by_seed(ours), by_seed(theirs))
            names = (f"{Method.parse(m).label}, {100 * accuracies.test_accuracy[m]:.1f}" for m in (best, rival))
            rows.append([times(budget), *names, mean_sd(ours.test_accuracy, 100), f"{minus}".replace(" points", "")])
        header = ["fewer MACs", "best of all, test %", "best competitor, test %", "AFDS, test %", "AFDS minus it"]
        parts += [f"**{place(c.comparison.target.title)}**", Table(header, rows)._repr_markdown_()]
    return Text("\n\n".join(parts) or NONE)


def why_text(every: Sequence[Compared]) -> Text:
    """What became of the attention in each study, what detaching it changes, and what meeting the budget costs."""
    lines = []
    for c in (c for c in every if not c.attention.empty):
        arguments = {"budget": c.budget, "rival": c.rival}
        if c.rules.settings_of:
            said = ablations.confirmation_text(c.attention, c.table, seeds=c.rules.seeds, **arguments)
        else:
            said = ablations.attention_text(c.attention, c.table, budget=c.budget)
            detached = by_seed(at(c.attention[c.attention.attention == "detached"], c.budget))
            if detached:
                theirs = by_seed(at(c.table[c.table.method == c.rival], c.budget))
                said += f" Detached attention minus {Method.parse(c.rival).label}: {_minus(detached, theirs)}."
        lines.append(f"**{place(c.comparison.target.title)}.** {said} {settled_text(c)}".strip())
    return Text(bullets(lines) or "No attention is stored.")


def each(every: Sequence[Compared], make: Callable[[Compared], Table | str]) -> Text:
    """What is made of each committed comparison, under its target's name."""
    parts = []
    for c in every:
        made = make(c)
        parts += [f"**{place(c.comparison.target.title)}**", made if isinstance(made, str) else made._repr_markdown_()]
    return Text("\n\n".join(parts) or NONE)
