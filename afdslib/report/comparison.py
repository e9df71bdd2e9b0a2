"""What notebooks 4, 5 and 8 show of a comparison: its rules, its tables, its figures' data and its sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import pandas as pd
from matplotlib.figure import Figure

from afdslib import runs
from afdslib.base.text import times
from afdslib.experiments import TransferRun
from afdslib.pruning import CRITERIA
from afdslib.report import plots
from afdslib.report.tables import Table, Text, bullets, mean_sd, place, plural
from afdslib.studies import ablations, engine, profiles, results, statistics
from afdslib.studies.ablations import LABELS, WHOLE
from afdslib.studies.comparison import MISSING, TIMES, Comparison, costs, macs_needed, points_of
from afdslib.studies.profile import SCALES, Profile
from afdslib.studies.protocol import AFDS, Axis, Method, label_of, protocol, regulariser_space, selection_space
from afdslib.studies.statistics import at

__all__ = [
    "Compared", "Competitors", "ablation_table", "ablations_text", "accuracy_table", "chosen_table", "committed",
    "costs_table", "each", "paired_table", "reasons_text", "rules_table", "settled_text", "size_table", "spaces_table",
    "statistics_text"
]  # fmt: skip

LEADING = ("dogs", "caltech101", "imagenet32", "imagenet32-disjoint")
"""Profiles in the order in which the report speaks of them: the nearest to the paper's own study first."""


class Compared:
    """The written tables of one finished comparison.

    Attributes:
        comparison, rules, budget: what was compared, by which rules; the endpoint's budget.
        points, table, missing: the points as text; those with a network, one row per method, seed and budget; the rest.
    """

    def __init__(self, comparison: Comparison):
        self.comparison, self.rules, self.budget = comparison, comparison.rules, comparison.rules.primary_budget
        self.points = comparison.complete()
        self.table = points_of(self.points)
        self.missing = results.view(self.points[self.points.reason != ""], MISSING)

    @cached_property
    def trials(self) -> pd.DataFrame:
        """Every trial."""
        return self.comparison.trials()

    @cached_property
    def beside(self) -> dict[str, pd.DataFrame]:
        """The tables of the ablations; see `ablations.views`."""
        return ablations.views(ablations.Ablations(self.comparison).rows())

    @cached_property
    def attention(self) -> pd.DataFrame:
        """The attention's width at each point, joint and detached."""
        return ablations.attention_widths(self.comparison.profile.network, self.points, self.beside["detached"])

    @property
    def rival(self) -> str:
        """The best competitor on validation images."""
        return statistics.rival(self.table, budget=self.budget, seeds=self.rules.seeds[: self.rules.rest])

    @property
    def paired(self) -> pd.DataFrame:
        """AFDS minus every other method at the endpoint's budget."""
        return statistics.paired_table(self.table, budget=self.budget)

    @property
    def unfinished(self) -> str:
        """How far a comparison is whose tables were written before its end; empty for a finished one."""
        if self.comparison.finished:
            return ""
        seeds = f"{self.points[self.points.method == AFDS.key].seed.nunique()} of {len(self.rules.seeds)}"
        return f"**Not finished**: {seeds} seeds of AFDS. It goes on with `{self.comparison.command}`."

    def trials_read_no_test_image(self) -> bool:
        """Whether no trial's stored result holds a test metric."""
        metrics = (runs.finished(id)[1].metrics for id in self.trials.run.dropna())
        return not any(key.startswith("test") for one in metrics for key in one)

    def budgets_met(self) -> bool:
        """Whether every statically pruned network costs 98 to 100 % of its budget on training images."""
        return bool(self.table[(self.table.budget < 1) & self.table.selection.isin(list(CRITERIA))].met.all())


def committed() -> list[Compared]:
    """The finished comparisons whose results are committed, in the order of `LEADING`, each at its largest scale."""
    found = []
    for name in LEADING:
        by_scale = ([Comparison(p, target=t) for t in p.targets] for p in (profiles.get(name, s) for s in SCALES[::-1]))
        finished = ([c for c in every if len(c.committed()) and c.finished] for every in by_scale)
        found += [Compared(c) for c in next(filter(None, finished), [])]
    return found


def each(every: Iterable[Compared], make: Callable[[Compared], Table | str]) -> Text:
    """What is made of each comparison, under its target's name if there are several."""
    made = {place(c.comparison.target.title): make(c) for c in every}
    texts = {name: one if isinstance(one, str) else one._repr_markdown_() for name, one in made.items()}
    return Text("\n\n".join(f"**{name}**\n\n{text}" if len(texts) > 1 else text for name, text in texts.items()))


class Competitors:
    """The finished comparisons of a profile, by target.

    One whose results are not committed, such as the demo's, is computed if need be. Any other takes hours and is only
    read: `afds study --part comparison` computes it, and until then every table and figure says so.
    """

    def __init__(self, profile: Profile):
        self.profile = profile
        if profile.committed:
            every = [Comparison(profile, target=target) for target in profile.targets]
            every = [c for c in every if not c.committed().empty]
        else:
            every = [Comparison(profile)]
            engine.compute(every[0])
        self.by_target = {c.target.title: Compared(c) for c in every}

    def __iter__(self) -> Iterator[Compared]:
        return iter(self.by_target.values())

    @property
    def not_run(self) -> str:
        """What to do where there is no comparison."""
        what = f"The comparison of {self.profile.name}, {self.profile.scale}, has not been run to its end"
        return f"{what}; it takes hours: {Comparison(self.profile).command} --workers 2"

    def figures(self, draw: Callable[[Compared, str], Figure]) -> dict[str, Figure]:
        """A figure per target, drawn from its comparison and title; a picture that says why where there is none."""
        return {t: draw(c, t) for t, c in self.by_target.items()} or {"": plots.sentence(self.not_run)}

    def sentence(self) -> Text:
        """AFDS against its best competitor; or how to run the comparison. Other tables are empty then."""
        return each(self, lambda c: f"{c.comparison.sentence()} {c.unfinished}".strip()) or Text(self.not_run)

    def accuracy(self) -> Text:
        """Test accuracy: a row per method, a column per budget."""
        return each(self, lambda c: accuracy_table(c.table))

    def paired(self) -> Text:
        """AFDS minus every other method at the endpoint's budget."""
        return each(self, lambda c: paired_table(c.paired))

    def sizes(self) -> Text:
        """MACs, with and without predictors, and parameters at the endpoint's budget."""
        return each(self, lambda c: size_table(c.table, c.budget))

    def costs(self) -> Text:
        """What the networks took."""
        return each(self, costs_table)

    def missing(self) -> Text:
        """Points without a network, by reason."""
        return each(self, lambda c: reasons_text(c.missing) or "Every planned point has a network.")


def statistics_text() -> Text:
    """The statistics, fixed before the numbers."""
    return Text(statistics.PROTOCOL.strip())


def rules_table(profile: Profile) -> Table:
    """How much of the comparison a profile runs."""
    r = protocol(profile)
    if r.settings_of:
        rows = [
            ("methods", f"AFDS and the best {r.rivals} on validation of the comparison of {r.settings_of}"),
            ("settings", "those that its trials chose; nothing is tuned here"),
        ]
    else:
        by_selection: dict[str, list[str]] = {}
        for method in r.methods:
            by_selection.setdefault(method.selection, []).append(label_of(method.transfer))
        multipliers = ", ".join(f"{value:g}" for value in sorted(r.multipliers))
        rows = [
            *((f"with {label_of(selection)}", ", ".join(names)) for selection, names in by_selection.items()),
            ("trials of each regulariser and selection", str(r.trials)),
            ("selections are tuned at", times(r.trial_budget)),
            ("strength once more, times", f"{multipliers} at {times(r.primary_budget)}"),
        ]
    before = f"AFS: {100 * r.first_update:g} %, and its gates freeze after {100 * TransferRun.trim:g} %"
    rows += [
        ("budgets", ", ".join(map(times, r.budgets))),
        ("seeds of AFDS and the top rivals", f"{len(r.seeds)} (rivals: the best {r.rivals} on validation)"),
        ("seeds of the rest", "–" if r.settings_of else str(r.rest)),
        ("steps on the target, unpruned", str(max(2, round(profile.transfer.steps * r.steps)))),
        ("steps per later budget", str(max(2, round(profile.tuning.steps * r.steps)))),
        ("share of them before the cut", f"static pruning: none; {before}"),
    ]
    return Table(["rule", "here"], rows, numbers=False)


def _values(axis: Axis) -> str:
    return f"{{{', '.join(map(str, axis.choices))}}}" if axis.choices else f"{axis.low:g} to {axis.high:g}"


def spaces_table(profile: Profile) -> Table:
    """The search spaces of the methods that a profile compares; lr and predictor_lr are factors on each stage's own."""
    rules = protocol(profile)
    methods = rules.methods
    spaces = {label_of(m.regulariser): regulariser_space(m.regulariser, rules.feature_strengths) for m in methods}
    spaces |= {label_of(m.selection): selection_space(m.selection, profile) for m in methods}
    rows = [(name, "; ".join(f"{axis.name} {_values(axis)}" for axis in axes)) for name, axes in spaces.items()]
    return Table(["method", "searched"], rows, numbers=False)


def _label(method: object) -> str:
    return Method.parse(str(method)).label


def _by_method(table: pd.DataFrame, header: Sequence[str], row: Callable[[pd.DataFrame], Sequence[str]], **kw) -> Table:
    """A row per method, in the table's order."""
    rows = [[_label(method), *row(here)] for method, here in table.groupby("method", sort=False)]
    return Table(["method", *header], rows, **kw)


def chosen_table(table: pd.DataFrame) -> Table:
    """The settings that the trials chose for each method of a comparison's table."""

    def row(here: pd.DataFrame) -> list[str]:
        settings = json.loads(here.settings.iloc[0])
        return [", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())]

    return _by_method(table, ["chosen on validation images"], row, numbers=False)


def accuracy_table(table: pd.DataFrame) -> Table:
    """Test accuracy in percent, mean and standard deviation over seeds: a row per method, a column per budget."""
    budgets = sorted(table.budget.unique(), reverse=True)
    return _by_method(
        table,
        list(map(times, budgets)),
        lambda here: [mean_sd(here[here.budget == b].test_accuracy, 100) for b in budgets],
    )


def _or_dash(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def _to(low: float, high: float) -> str:
    return "–" if math.isnan(low) else f"{low:+.1f} to {high:+.1f}"


def paired_table(table: pd.DataFrame) -> Table:
    """`statistics.paired_table`: AFDS minus each method in points, 95 % interval, Holm-corrected p value."""
    rows = [
        [
            _label(r.method), f"{round(r.validation, 6):.1f}", f"{round(r.mean, 6):.1f}", f"{r.difference:+.1f}",
            _to(r.low, r.high), _or_dash(r.p_holm, ".2g"), str(r.seeds)
        ]
        for r in table.itertuples()
    ]  # fmt: skip
    header = ["method", "validation (%)", "test (%)", "AFDS minus it, test", "95 % interval", "p (Holm)", "seeds"]
    return Table(header, rows)


def size_table(table: pd.DataFrame, budget: float) -> Table:
    """What is left at one budget, mean over seeds: shares of the dense MACs on test images, parameters, channels."""

    def row(here: pd.DataFrame) -> list[str]:
        shares = here[["macs", "macs_predictors", "train_macs"]].mean()
        counts = here.parameters.mean() / 1000, here.dynamic.fillna(0).mean()
        return [*(f"{100 * share:.2f} %" for share in shares), *(f"{count:.0f}" for count in counts)]

    header = ["MACs, test", "of them predictors", "MACs, training images", "parameters (thousands)", "dynamic channels"]
    return _by_method(at(table, budget), header, row)


def costs_table(c: Compared) -> Table:
    """What a network at the endpoint's budget took: 10^12 training MACs and minutes, on the source and on the target.

    One row per method, mean over seeds; the source's work is shared by all that start from the same network. The last
    column is the share of MACs that a method needs to stay within one point of its own unpruned network.
    """
    seconds = results.view(c.points[c.points.reason == ""], TIMES)
    minutes = at(seconds, c.budget).groupby("method")[["source_seconds", "seconds"]].mean() / 60
    shares, rows = macs_needed(c.table).set_index("method").macs, []
    for r in costs(c.table, c.budget).itertuples():
        share = float(shares.get(r.method, math.nan))
        work = f"{r.source_macs / 1e12:.3g}", f"{r.training_macs / 1e12:.3g}"
        spent = [f"{value:.1f}" for value in minutes.loc[r.method]]
        rows.append([_label(r.method), *work, *spent, "–" if math.isnan(share) else f"{100 * share:.0f} %"])
    columns = ["source TMACs", "target TMACs", "source minutes", "target minutes"]
    return Table(["method", *columns, "MACs within 1 point"], rows)


def _pair(one: pd.DataFrame, other: pd.DataFrame) -> statistics.Paired | None:
    """The paired difference of test accuracies by seed, without those that are missing; None without a pair."""
    values = [statistics.by_seed(table.dropna(subset="test_accuracy")) for table in (one, other)]
    return statistics.paired(*values) if set(values[0]) & set(values[1]) else None


def ablation_table(table: pd.DataFrame) -> Table:
    """Test accuracy of each variant, and its difference from AFDS seed by seed, in points.

    AFDS is taken at the variant's budget, or at its own first one where it has none there.
    """
    afds, rows, p = table[table.key == WHOLE], [], []
    for (budget, variant), found in table.groupby(["budget", "variant"], sort=False):
        there = budget if (afds.budget == budget).any() else afds.budget.iloc[0]
        pair, cell = _pair(found, afds[afds.budget == there]) if variant != LABELS[WHOLE] else None, "–"
        if pair:
            d = pair.difference
            cell = f"{100 * d.mean:+.1f}" + ("" if math.isnan(d.low) else f" ({_to(100 * d.low, 100 * d.high)})")
        p.append(pair.p if pair else math.nan)
        accuracy = found.test_accuracy
        rows.append([variant, times(budget), mean_sd(accuracy, 100), cell, f"{accuracy.notna().sum()} of {len(found)}"])
    for row, corrected in zip(rows, statistics.holm(p), strict=True):
        row.insert(-1, _or_dash(corrected, ".2g"))
    return Table(["variant", "at", "test accuracy (%)", "minus AFDS (95 % interval)", "p (Holm)", "seeds"], rows)


def reasons_text(table: pd.DataFrame, name: Callable[[str], str] = _label) -> str:
    """How many seeds of each method or variant have no network at a budget; of several reasons the first is quoted."""
    lines = [
        f"{name(str(method))} at {times(budget)}, {plural(len(here), 'seed')}: {here.reason.iloc[0]}"
        for (method, budget), here in table.groupby(["method", "budget"], sort=False)
    ]
    return bullets(lines, "Without a network:") if lines else ""


def ablations_text(c: Compared) -> str:
    """The variants, and the best competitor once more with as much time on the target as AFDS took."""
    table, again = c.beside["ablations"], c.beside["equal_time"]
    missing = f"no result yet; `{ablations.Ablations(c.comparison).command}` computes it."
    if set(table.key) <= {WHOLE}:
        return f"Ablations: {missing}"
    lost = table[table.diverged.notna()].rename(columns={"method": "_", "variant": "method", "diverged": "reason"})
    text = f"{ablation_table(table)._repr_markdown_()}\n\n{reasons_text(lost, str)}"
    if again.empty:
        return f"{text}\n\nAt equal time: {missing}"
    rival, factor = again.method.iloc[0], float(again.steps_factor.iloc[0])
    here = at(c.table, c.budget)
    here = here[here.seed.isin(set(again.seed))]
    ours, before = (mean_sd(here[here.method == m].test_accuracy, 100) for m in (AFDS.key, rival))
    return (
        f"{text}\n\nAt equal wall-clock time on the target, {factor:g} times its steps, {_label(rival)} "
        f"reaches {mean_sd(again.test_accuracy, 100)} % ({before} % before; AFDS {ours} %; "
        f"{again.seed.nunique()} seeds)."
    )


def settled_text(c: Compared) -> str:
    """What it changes when AFDS's budgets are met by Taylor importance; empty where nothing of it is there."""
    tables = c.beside["settled"], c.attention, c.table
    return "" if tables[0].empty else ablations.settled_text(*tables, budget=c.budget, rival=c.rival)
