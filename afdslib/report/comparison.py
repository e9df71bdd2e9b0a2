"""What notebook 4 and the report show of a comparison: its rules, its tables, its figures' data and its sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from matplotlib.figure import Figure

from afdslib import runs, training
from afdslib.base.text import times
from afdslib.experiments.afs import TransferRun
from afdslib.pruning import CRITERIA
from afdslib.report import plots
from afdslib.report.summary import Table, Text, mean_sd
from afdslib.studies import collapse, profiles, settling, statistics
from afdslib.studies.comparison import WHOLE, Comparison, run_comparison
from afdslib.studies.profiles import Profile
from afdslib.studies.protocol import Axis, Method, label_of, protocol, regulariser_space, selection_space

__all__ = [
    "Compared",
    "Competitors",
    "Variants",
    "ablation_table",
    "accuracy_table",
    "better_text",
    "chosen_table",
    "costs_table",
    "missing_text",
    "paired_table",
    "rules_table",
    "size_table",
    "spaces_table",
    "statistics_text",
    "untrained_text",
]


@dataclass(frozen=True)
class Compared:
    """The written tables of one finished comparison.

    Attributes:
        comparison: what was compared.
    """

    comparison: Comparison

    def read(self, name: str) -> pd.DataFrame:
        """A table of the comparison's folder, by its name without suffix."""
        return pd.read_csv(self.comparison.folder() / f"{name}.csv")

    def has(self, name: str) -> bool:
        """Whether a table has been written."""
        return (self.comparison.folder() / f"{name}.csv").is_file()

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per method, seed and budget."""
        return self.read("comparison")

    @property
    def unfinished(self) -> str:
        """How far a comparison is whose tables were written before its end; empty for a finished one."""
        if self.comparison.finished:
            return ""
        missing = self.read("missing")
        seeds = {int(s) for t in (self.table, missing) for s in t[t.method == "afd+afs"].seed}
        return (
            f"**Not finished**: {len(seeds)} of {len(self.comparison.rules.seeds)} seeds of AFDS. It goes on with "
            f"`{self.comparison.command}`."
        )

    @cached_property
    def trials(self) -> pd.DataFrame:
        """Every trial."""
        return self.read("trials")

    @property
    def paired(self) -> pd.DataFrame:
        """AFDS minus every other method at the endpoint's budget."""
        return statistics.paired_table(self.table, budget=self.comparison.rules.primary_budget)

    def trials_read_no_test_image(self) -> bool:
        """Whether no trial's stored result holds a test metric."""
        found = (runs.finished(id)[1].metrics for id in self.trials.run.dropna())
        return not any(key.startswith("test") for metrics in found for key in metrics)

    def budgets_met(self) -> bool:
        """Whether every statically pruned network costs 98 to 100 % of its budget on training images."""
        rows = self.table[(self.table.budget < 1) & self.table.selection.isin(list(CRITERIA))]
        return bool(rows.met.all())


class Competitors:
    """The finished comparisons of a profile, by target.

    One whose results are not committed, such as the demo's, is computed if need be. Any other takes hours and is only
    read: `afds compare` computes it, and until then every table and figure says so.

    Args:
        profile: from `profiles.get`.
    """

    def __init__(self, profile: Profile):
        self.profile = profile
        if profile.committed:
            every = [Comparison(profile, target=target) for target in profile.targets]
            every = [c for c in every if (c.folder() / "comparison.csv").is_file()]
        else:
            # What is begun is mostly looked up, for which other processes are not worth their start.
            alone = torch.cuda.is_available() or Comparison(profile).journal().is_dir()
            every = [run_comparison(profile, workers=1 if alone else training.cores())]
        self.by_target = {c.target.title: Compared(c) for c in every}

    def __iter__(self) -> Iterator[Compared]:
        return iter(self.by_target.values())

    @property
    def not_run(self) -> str:
        """What to do where there is no comparison."""
        p = self.profile
        return (
            f"The comparison of {p.name}, {p.budget}, has not been run to its end; "
            f"it takes hours: {Comparison(p).command} --workers 2"
        )

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
        return self._each(lambda c: size_table(c.table, c.comparison.rules.primary_budget))

    def costs(self) -> Text:
        """What the networks took."""
        return self._each(
            lambda c: costs_table(
                c.read("costs"), c.read("times"), c.read("macs_within"), c.comparison.rules.primary_budget
            )
        )

    def ablations(self) -> Text:
        """AFDS with one part changed, and the rival at equal wall-clock time."""

        def text(c: Compared) -> str:
            rest = f"`{c.comparison.command} --extras` does."
            table = c.read("ablations") if c.has("ablations") else pd.DataFrame(columns=["variant"])
            if set(table.variant) <= {WHOLE}:
                return f"Not computed: {rest}"
            time = _equal_time(c) if c.has("equal_time") else f"The rest is not computed: {rest}"
            rules = c.comparison.rules
            better = better_text(table, c.table, budget=rules.primary_budget, seeds=rules.seeds[: rules.rest])
            return f"{ablation_table(table)._repr_markdown_()}\n\n{untrained_text(table)}{better}{time}"

        return self._each(text)

    def attention(self) -> Text:
        """What became of the attention on the way to the endpoint's budget."""

        def text(c: Compared) -> str:
            if not c.has("attention"):
                return f"Not written: `{c.comparison.command} --finished` does."
            return collapse.text(c.read("attention"), c.table, budget=c.comparison.rules.primary_budget)

        return self._each(text)

    def attention_figures(self) -> dict[str, Figure]:
        """The attention's width at every budget, a figure per target."""

        def draw(c: Compared, title: str) -> Figure:
            table = c.read("attention") if c.has("attention") else pd.DataFrame()
            if table.empty:
                return plots.sentence("No attention is stored.")
            return plots.attention_width(table, title=title)

        return self.figures(draw)

    def confirmation(self) -> Text:
        """Whether detached attention is confirmed, in a comparison that was made to tell; else empty."""

        def text(c: Compared) -> str:
            rules = c.comparison.rules
            if not rules.settings_of:
                return ""
            seeds, budget = rules.seeds, rules.primary_budget
            best = statistics.rival(c.table, budget=budget, seeds=seeds[: rules.rest])
            return collapse.confirmation_text(c.read("attention"), c.table, budget=budget, rival=best, seeds=seeds)

        return self._each(text)

    def settled(self) -> Text:
        """What it changes when AFDS's budgets are met by Taylor importance."""

        def text(c: Compared) -> str:
            rules, found = c.comparison.rules, ""
            if c.has("settled") and c.has("attention"):
                best = statistics.rival(c.table, budget=rules.primary_budget, seeds=rules.seeds[: rules.rest])
                tables = (c.read("settled"), c.read("attention"), c.table)
                found = settling.text(*tables, budget=rules.primary_budget, rival=best)
            return found or f"Not computed: `{c.comparison.command} --extras` does."

        return self._each(text)

    def missing(self) -> Text:
        """Points without a network, by reason."""
        return self._each(lambda c: missing_text(c.read("missing")))


class Variants:
    """The comparisons of the profiles that ask a profile's question of other data, such as imagenet32-disjoint.

    Args:
        profile: from `profiles.get`.
    """

    def __init__(self, profile: Profile):
        names = [name for name in profiles.names() if name.startswith(f"{profile.name}-")]
        self.every = {name: Competitors(profiles.get(name, profile.budget)) for name in names}

    def _each(self, make: Callable[[Competitors], Text]) -> Text:
        parts = [f"**{name}**: {text}" for name, found in self.every.items() if (text := make(found))]
        return Text("\n\n".join(parts) or ("" if self.every else "This profile has no variant."))

    def sentence(self) -> Text:
        """AFDS against its rival there, and whether detached attention is confirmed."""
        return self._each(lambda found: Text(f"{found.sentence()} {found.confirmation()}".strip()))

    def settled(self) -> Text:
        """What it changes there when budgets are met by Taylor importance."""
        return self._each(Competitors.settled)

    def tables(self) -> Text:
        """Test accuracy at every budget, then AFDS minus every other method at the endpoint's."""
        return self._each(lambda found: Text(f"\n\n{found.accuracy()}\n\n{found.paired()}" if found.by_target else ""))

    def figures(self) -> dict[str, Figure]:
        """Every method's curve, a figure per target of each variant; a picture that says why where there is none."""

        def draw(c: Compared, title: str) -> Figure:
            return plots.competitors(c.table, title=title)

        drawn = {title: fig for found in self.every.values() for title, fig in found.figures(draw).items()}
        return drawn or {"": plots.sentence("This profile has no variant.")}


# ---------------------------------------------------------------------------------------------------------------- rules


def statistics_text() -> Text:
    """The statistics, fixed before the numbers: what `afdslib.studies.statistics` says of itself."""
    lines = (statistics.__doc__ or "").strip().split("\n", 2)
    return Text(lines[2].strip())


def _one(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


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
            by_selection.setdefault(method.selection, []).append(label_of(method.regulariser))
        rows = [
            *((f"with {label_of(selection)}", ", ".join(names)) for selection, names in by_selection.items()),
            ("trials of each regulariser and selection", str(r.trials)),
            ("selections are tuned at", times(r.trial_budget)),
            ("strength once more, times", f"{_one(sorted(r.multipliers))} at {times(r.primary_budget)}"),
        ]
    rows += [
        ("budgets", ", ".join(map(times, r.budgets))),
        ("seeds of AFDS and the top rivals", f"{len(r.seeds)} (rivals: the best {r.rivals} on validation)"),
        ("seeds of the rest", "–" if r.settings_of else str(r.rest)),
        ("steps on the target, unpruned", str(max(2, round(profile.transfer.steps * r.steps)))),
        ("steps per later budget", str(max(2, round(profile.tuning.steps * r.steps)))),
        (
            "share of them before the cut",
            f"static pruning: none; AFS: {100 * r.first_update:g} %, and its gates freeze after "
            f"{100 * TransferRun.trim:g} %",
        ),
    ]
    return Table(["rule", "here"], rows, numbers=False)


def _space(axes: Sequence[Axis]) -> str:
    parts = []
    for axis in axes:
        values = "{" + ", ".join(map(str, axis.choices)) + "}" if axis.choices else f"{axis.low:g} to {axis.high:g}"
        parts.append(f"{axis.name} {values}")
    return "; ".join(parts)


def spaces_table(profile: Profile) -> Table:
    """The search spaces of the methods that a profile compares; lr and predictor_lr are factors on each stage's own."""
    r = protocol(profile)
    spaces = [regulariser_space(m.base) for m in r.methods], [selection_space(m.selection, profile) for m in r.methods]
    named = dict(zip((label_of(m.base) for m in r.methods), spaces[0], strict=True))
    named |= dict(zip((label_of(m.selection) for m in r.methods), spaces[1], strict=True))
    return Table(["method", "searched"], [(name, _space(axes)) for name, axes in named.items()], numbers=False)


# -------------------------------------------------------------------------------------------------------------- results


def chosen_table(table: pd.DataFrame) -> Table:
    """The settings that the trials chose for each method.

    Args:
        table: of `Comparison.sweep`.
    """
    rows = []
    for method, mine in table.groupby("method", sort=False):
        settings = json.loads(mine.settings.iloc[0])
        said = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items()]
        rows.append((Method.parse(str(method)).label, ", ".join(said)))
    return Table(["method", "chosen on validation images"], rows, numbers=False)


def accuracy_table(table: pd.DataFrame) -> Table:
    """Test accuracy in percent, mean and standard deviation over seeds: a row per method, a column per budget."""
    budgets = sorted(table.budget.unique(), reverse=True)
    rows = []
    for method, mine in table.groupby("method", sort=False):
        cells = [mean_sd(mine[mine.budget == b].test_accuracy, 100) for b in budgets]
        rows.append([Method.parse(str(method)).label, *cells])
    return Table(["method", *map(times, budgets)], rows)


def paired_table(table: pd.DataFrame) -> Table:
    """AFDS minus each method in points: paired, 95 % interval, and the Holm-corrected p value.

    Args:
        table: of `statistics.paired_table`.
    """
    rows = [
        [
            Method.parse(r.method).label, f"{round(r.validation, 6):.1f}", f"{round(r.mean, 6):.1f}",
            f"{r.difference:+.1f}",
            "–" if pd.isna(r.low) else f"{r.low:+.1f} to {r.high:+.1f}",
            "–" if pd.isna(r.p_holm) else f"{r.p_holm:.2g}", str(r.seeds),
        ]
        for r in table.itertuples()
    ]  # fmt: skip
    header = ["method", "validation (%)", "test (%)", "AFDS minus it, test", "95 % interval", "p (Holm)", "seeds"]
    return Table(header, rows)


def size_table(table: pd.DataFrame, budget: float) -> Table:
    """What is left at one budget, mean over seeds: shares of the dense MACs on test images, parameters, channels."""
    rows = []
    for method, mine in table[(table.budget - budget).abs() < 1e-9].groupby("method", sort=False):
        mean = mine[["macs", "macs_predictors", "train_macs", "parameters"]].mean()
        living = mine[["dynamic", "static"]].mean().fillna(0)
        rows.append([
            Method.parse(str(method)).label, f"{100 * mean.macs:.2f} %", f"{100 * mean.macs_predictors:.2f} %",
            f"{100 * mean.train_macs:.2f} %", f"{mean.parameters / 1000:.0f}", f"{living.dynamic:.0f}",
        ])  # fmt: skip
    header = ["method", "MACs, test", "of them predictors", "MACs, training images", "parameters (thousands)"]
    return Table([*header, "dynamic channels"], rows)


def costs_table(costs: pd.DataFrame, times: pd.DataFrame, needed: pd.DataFrame, budget: float) -> Table:
    """What a network at the endpoint's budget took: 10^12 training MACs and minutes, on the source and on the target.

    One row per method, mean over seeds; the source's work is shared by all that start from the same network. The last
    column is the share of MACs that a method needs to stay within one point of its own unpruned network.
    """
    minutes = times[(times.budget - budget).abs() < 1e-9].groupby("method")[["source_seconds", "seconds"]].mean() / 60
    shares = dict(zip(needed.method, needed.macs, strict=True))
    rows = [
        [
            Method.parse(r.method).label, f"{r.source_macs / 1e12:.3g}", f"{r.training_macs / 1e12:.3g}",
            *(f"{value:.1f}" for value in minutes.loc[r.method]),
            "–" if math.isnan(share := float(shares.get(r.method, math.nan))) else f"{100 * share:.0f} %",
        ]
        for r in costs.itertuples()
    ]  # fmt: skip
    return Table(
        ["method", "source TMACs", "target TMACs", "source minutes", "target minutes", "MACs within 1 point"], rows
    )


def ablation_table(table: pd.DataFrame) -> Table:
    """Test accuracy of each variant, and its difference from AFDS seed by seed, in points.

    AFDS is taken at the variant's budget, or at its own first one where it has none there.
    """
    afds, rows, p = table[table.variant == WHOLE], [], []
    for (budget, variant), found in table.groupby(["budget", "variant"], sort=False):
        at, mine = times(budget), found.set_index("seed").test_accuracy
        there = budget if (afds.budget == budget).any() else afds.budget.iloc[0]
        whole = afds[afds.budget == there].set_index("seed").test_accuracy
        both = pd.DataFrame({"mine": mine, "whole": whole}).dropna()
        cell = "–"
        p.append(math.nan)
        if variant != WHOLE and len(both):
            pair = statistics.paired(both.mine.to_dict(), both.whole.to_dict())
            d, p[-1] = pair.difference, pair.p
            cell = f"{100 * d.mean:+.1f}"
            cell += "" if math.isnan(d.low) else f" ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
        rows.append([variant, at, mean_sd(mine, 100), cell, f"{mine.notna().sum()} of {len(mine)}"])
    for row, corrected in zip(rows, statistics.holm(p), strict=True):
        row.insert(-1, "–" if math.isnan(corrected) else f"{corrected:.2g}")
    return Table(["variant", "at", "test accuracy (%)", "minus AFDS (95 % interval)", "p (Holm)", "seeds"], rows)


def better_text(table: pd.DataFrame, main: pd.DataFrame, *, budget: float, seeds: Sequence[int]) -> str:
    """Which variants at the primary budget beat AFDS by more than their interval, and how they stand to the rival.

    Args:
        table: of the ablations.
        main: of the sweep, from which the rival is known.
        budget: the primary one.
        seeds: those on which the rival is chosen.
    """
    there = table[(table.budget - budget).abs() < 1e-9]
    accuracy = {variant: mine.set_index("seed").test_accuracy for variant, mine in there.groupby("variant", sort=False)}
    if WHOLE not in accuracy:
        return ""
    rival = statistics.rival(main, budget=budget, seeds=seeds)
    theirs = main[(main.method == rival) & ((main.budget - budget).abs() < 1e-9)].set_index("seed").test_accuracy
    lines = []
    for variant, mine in accuracy.items():
        if "unextended" in variant or len(mine := mine.dropna()) < 2:  # the former is the rival's, not AFDS's
            continue
        gain = statistics.paired(mine.to_dict(), accuracy[WHOLE].to_dict()).difference
        if gain.low > 0:
            beside = statistics.paired(mine.to_dict(), theirs.to_dict()).difference
            lines.append(
                f"- {variant}: {statistics.points(gain)} points from AFDS and {statistics.points(beside)} from the "
                f"rival, {Method.parse(rival).label}, on the same {beside.n} seeds"
            )
    if not lines:
        return ""
    note = "Better than AFDS by more than the interval. Exploratory: these were found by looking at test accuracy."
    return "\n".join([note, "", *lines, "", ""])


def untrained_text(table: pd.DataFrame) -> str:
    """Why variants of the ablation have no network; of seeds that fail alike the first is quoted."""
    gone = table[table.diverged.notna()]
    lines = [
        f"- {variant} at {times(budget)}, {len(mine)} seed{'s' if len(mine) > 1 else ''}: {mine.diverged.iloc[0]}"
        for (variant, budget), mine in gone.groupby(["variant", "budget"], sort=False)
    ]
    return "\n".join(["Without a network:", "", *lines, "", ""]) if lines else ""


def _equal_time(compared: Compared) -> str:
    """The rival once more with as much time on the target as AFDS took."""
    again = compared.read("equal_time")
    if again.empty:
        return "The rival at equal wall-clock time has no network."
    rival, factor = again.method.iloc[0], float(again.steps_factor.iloc[0])
    budget = compared.comparison.rules.primary_budget
    here = compared.table[((compared.table.budget - budget).abs() < 1e-9) & compared.table.seed.isin(set(again.seed))]
    ours, before = (mean_sd(here[here.method == m].test_accuracy, 100) for m in ("afd+afs", rival))
    return (
        f"At equal wall-clock time on the target, {factor:g} times its steps, the rival {Method.parse(rival).label} "
        f"reaches {mean_sd(again.test_accuracy, 100)} % ({before} % before; AFDS {ours} %; "
        f"{again.seed.nunique()} seeds)."
    )


def missing_text(missing: pd.DataFrame) -> str:
    """How many points have no network, and why."""
    if missing.empty:
        return "Every planned point has a network."
    lines = [
        f"- {Method.parse(str(method)).label}: {len(mine)} point{'s' if len(mine) > 1 else ''}: {reason}"
        for (method, reason), mine in missing.groupby(["method", "reason"], sort=False)
    ]
    return "Points without a network:\n\n" + "\n".join(lines)
