"""What notebooks 4, 5 and 8 show of a comparison: its rules, its tables, its figures' data and its sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import pandas as pd
from matplotlib.figure import Figure

from afdslib import runs
from afdslib.base.text import times
from afdslib.experiments import TransferRun
from afdslib.pruning import CRITERIA
from afdslib.report import plots
from afdslib.report.tables import Table, Text, bullets, mean_sd, plural
from afdslib.studies import ablations, engine, profiles, results, statistics
from afdslib.studies.ablations import LABELS, WHOLE
from afdslib.studies.comparison import MISSING, TIMES, Comparison, costs, macs_needed, points_of
from afdslib.studies.profile import Profile
from afdslib.studies.protocol import AFDS, Axis, Method, label_of, protocol, regulariser_space, selection_space
from afdslib.studies.statistics import at

__all__ = [
    "Compared", "Competitors", "Variants", "ablation_table", "accuracy_table", "better_text", "chosen_table",
    "costs_table", "missing_text", "paired_table", "rules_table", "size_table", "spaces_table", "statistics_text",
    "untrained_text"
]  # fmt: skip


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

    def _each(self, make: Callable[[Compared], Table | str]) -> Text:
        parts = []
        for target, compared in self.by_target.items():
            made = make(compared)
            parts += [f"**{target}**"] if len(self.by_target) > 1 else []
            parts.append(made if isinstance(made, str) else made._repr_markdown_())
        return Text("\n\n".join(parts))

    def figures(self, draw: Callable[[Compared, str], Figure]) -> dict[str, Figure]:
        """A figure per target, drawn from its comparison and title; a picture that says why where there is none."""
        return {t: draw(c, t) for t, c in self.by_target.items()} or {"": plots.sentence(self.not_run)}

    def sentence(self) -> Text:
        """The report's sentence, AFDS against its rival; or how to run the comparison. Other tables are empty then."""
        return self._each(lambda c: f"{c.comparison.sentence()} {c.unfinished}".strip()) or Text(self.not_run)

    def accuracy(self) -> Text:
        """Test accuracy: a row per method, a column per budget."""
        return self._each(lambda c: accuracy_table(c.table))

    def chosen(self) -> Text:
        """The settings that the trials chose."""
        return self._each(lambda c: chosen_table(c.table))

    def paired(self) -> Text:
        """AFDS minus every other method at the endpoint's budget."""
        return self._each(lambda c: paired_table(c.paired))

    def sizes(self) -> Text:
        """MACs, with and without predictors, and parameters at the endpoint's budget."""
        return self._each(lambda c: size_table(c.table, c.budget))

    def costs(self) -> Text:
        """What the networks took."""
        return self._each(costs_table)

    def ablations(self) -> Text:
        """AFDS with one part changed, and the rival at equal wall-clock time."""
        return self._each(_ablations_text)

    def attention(self) -> Text:
        """What became of the attention on the way to the endpoint's budget."""
        return self._each(lambda c: ablations.attention_text(c.attention, c.table, budget=c.budget))

    def attention_figures(self) -> dict[str, Figure]:
        """The attention's width at every budget, a figure per target."""
        none = "No attention is stored."
        draw = plots.attention_width
        return self.figures(lambda c, t: plots.sentence(none) if c.attention.empty else draw(c.attention, title=t))

    def confirmation(self) -> Text:
        """Whether detached attention is confirmed, in a comparison that was made to tell; else empty."""

        def text(c: Compared) -> str:
            tables, seeds = (c.attention, c.table), c.rules.seeds
            return ablations.confirmation_text(*tables, budget=c.budget, rival=c.rival, seeds=seeds)

        return self._each(lambda c: text(c) if c.rules.settings_of else "")

    def settled(self) -> Text:
        """What it changes when AFDS's budgets are met by Taylor importance."""

        def text(c: Compared) -> str:
            tables, text = (c.beside["settled"], c.attention, c.table), ""
            if not tables[0].empty:
                text = ablations.settled_text(*tables, budget=c.budget, rival=c.rival)
            return text or f"Not computed: `{ablations.Ablations(c.comparison).command}` does."

        return self._each(text)

    def missing(self) -> Text:
        """Points without a network, by reason."""
        return self._each(lambda c: missing_text(c.missing))


class Variants:
    """The comparisons of the profiles that ask a profile's question of other data, such as imagenet32-disjoint."""

    def __init__(self, profile: Profile):
        every = (profiles.get(name, profile.scale) for name in profiles.names())
        self.every = {p.name: Competitors(p) for p in every if p.variant_of == profile.name}

    def _each(self, make: Callable[[Competitors], str]) -> Text:
        parts = [f"**{name}**: {text}" for name, variant in self.every.items() if (text := make(variant))]
        return Text("\n\n".join(parts) or ("" if self.every else "This profile has no variant."))

    def sentence(self) -> Text:
        """AFDS against its rival there, and whether detached attention is confirmed."""
        return self._each(lambda variant: f"{variant.sentence()} {variant.confirmation()}".strip())

    def settled(self) -> Text:
        """What it changes there when budgets are met by Taylor importance."""
        return self._each(Competitors.settled)

    def tables(self) -> Text:
        """Test accuracy at every budget, then AFDS minus every other method at the endpoint's."""
        return self._each(lambda v: f"\n\n{v.accuracy()}\n\n{v.paired()}" if v.by_target else "")

    def figures(self) -> dict[str, Figure]:
        """Every method's curve, a figure per target of each variant; a picture that says why where there is none."""
        figures: dict[str, Figure] = {}
        for variant in self.every.values():
            figures |= variant.figures(lambda c, title: plots.competitors(c.table, title=title))
        return figures or {"": plots.sentence("This profile has no variant.")}


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
    methods = protocol(profile).methods
    spaces = {label_of(m.regulariser): regulariser_space(m.regulariser) for m in methods}
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


def better_text(table: pd.DataFrame, main: pd.DataFrame, *, budget: float, rival: str) -> str:
    """Which of the ablations at the primary budget beat AFDS by more than their interval, and how they stand to the
    rival, a method of the main table."""
    there = at(table, budget)
    afds, other = there[there.key == WHOLE], at(main[main.method == rival], budget)
    lines = []
    for variant, here in there.groupby("variant", sort=False):
        pair = _pair(here, afds)
        if pair is None or here.method.iloc[0] != AFDS.key or not pair.difference.low > 0:  # the second is the rival's
            continue
        if beside := _pair(here, other):
            lines.append(
                f"{variant}: {statistics.points(pair.difference)} points from AFDS and "
                f"{statistics.points(beside.difference)} from the rival, {_label(rival)}, on the same "
                f"{beside.difference.n} seeds"
            )
    note = "Better than AFDS by more than the interval. Exploratory: these were found by looking at test accuracy."
    return f"{bullets(lines, note)}\n\n" if lines else ""


def untrained_text(table: pd.DataFrame) -> str:
    """Why variants of the ablation have no network; of seeds that fail alike the first is quoted."""
    lines = [
        f"{variant} at {times(budget)}, {plural(len(here), 'seed')}: {here.diverged.iloc[0]}"
        for (variant, budget), here in table[table.diverged.notna()].groupby(["variant", "budget"], sort=False)
    ]
    return f"{bullets(lines, 'Without a network:')}\n\n" if lines else ""


def _ablations_text(c: Compared) -> str:
    """The variants, and the rival once more with as much time on the target as AFDS took."""
    rest, table, again = (
        f"`{ablations.Ablations(c.comparison).command}` does.",
        c.beside["ablations"],
        c.beside["equal_time"],
    )
    if set(table.key) <= {WHOLE}:
        return f"Not computed: {rest}"
    better = better_text(table, c.table, budget=c.budget, rival=c.rival)
    text = f"{ablation_table(table)._repr_markdown_()}\n\n{untrained_text(table)}{better}"
    if again.empty:
        return f"{text}The rest is not computed: {rest}"
    rival, factor = again.method.iloc[0], float(again.steps_factor.iloc[0])
    here = at(c.table, c.budget)
    here = here[here.seed.isin(set(again.seed))]
    ours, before = (mean_sd(here[here.method == m].test_accuracy, 100) for m in ("afd+afs", rival))
    return (
        f"{text}At equal wall-clock time on the target, {factor:g} times its steps, the rival {_label(rival)} "
        f"reaches {mean_sd(again.test_accuracy, 100)} % ({before} % before; AFDS {ours} %; "
        f"{again.seed.nunique()} seeds)."
    )


def missing_text(missing: pd.DataFrame) -> str:
    """How many points have no network, and why."""
    lines = [
        f"{_label(method)}: {plural(len(here), 'point')}: {reason}"
        for (method, reason), here in missing.groupby(["method", "reason"], sort=False)
    ]
    return bullets(lines, "Points without a network:") or "Every planned point has a network."
