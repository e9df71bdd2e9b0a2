"""Tables and sentences of the report, computed from result tables: no number in the report is typed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from afdslib import data
from afdslib.base.atomic import write_text
from afdslib.base.errors import AFDSError
from afdslib.base.text import Text, times
from afdslib.report.plots.style import look
from afdslib.studies import statistics

if TYPE_CHECKING:
    from pathlib import Path

    from afdslib.data import Splits
    from afdslib.studies.profiles import Profile
    from afdslib.studies.sweep import Study

__all__ = [
    "PUBLISHED",
    "Table",
    "Text",
    "about_data",
    "accuracy_table",
    "budgets_of",
    "channels_left",
    "differences",
    "differences_text",
    "gates_text",
    "growing",
    "network_table",
    "networks",
    "run_text",
    "schedule",
    "scope_text",
    "settings",
    "share_classes",
    "smallest",
    "sources_text",
    "strengths_text",
    "write_page",
]


PUBLISHED = "Published weights are taken as they are: this study reads no source image and trains no source network."


class Table:
    """Rows of text that a notebook renders as a table.

    Args:
        header: column names.
        rows: of as many cells each; numbers are formatted by the caller.
        numbers: whether all columns but the first hold numbers, which are aligned to the right.
    """

    def __init__(self, header: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = True):
        self.numbers = numbers
        self.header = [str(cell) for cell in header]
        self.rows = [[str(cell) for cell in row] for row in rows]
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError("a row has another number of cells than the header")

    def _repr_markdown_(self) -> str:
        lines = [self.header, ["---", *["--:" if self.numbers else ":--"] * (len(self.header) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __repr__(self) -> str:
        widths = [max(len(line[i]) for line in (self.header, *self.rows)) for i in range(len(self.header))]
        lines = []
        for line in (self.header, *self.rows):
            rest = [c.rjust(w) if self.numbers else c.ljust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
            lines.append("  ".join([line[0].ljust(widths[0]), *rest]).rstrip())
        return "\n".join(lines)


def mean_sd(values: pd.Series, scale: float = 1.0, digits: int = 1) -> str:
    """Mean and standard deviation (n - 1) of what is not missing, as text; "–" of nothing."""
    values = values.dropna() * scale
    if values.empty:
        return "–"
    text = f"{round(values.mean(), 6):.{digits}f}"  # without the last bits, which decide how a 5 is rounded
    return text if len(values) < 2 else f"{text} ± {values.std(ddof=1):.{digits}f}"


def _rows_at(table: pd.DataFrame, budget: float) -> pd.DataFrame:
    rows = table[(table.budget - budget).abs() < 1e-9]
    if rows.empty:
        raise AFDSError(f"the table has no row at budget {budget:g}; it has {', '.join(map(times, budgets_of(table)))}")
    return rows


def budgets_of(table: pd.DataFrame) -> list[float]:
    """The budgets of a sweep, decreasing from 1."""
    return sorted((float(b) for b in table.budget.unique()), reverse=True)


def _by_target(table: pd.DataFrame, header: Sequence[str], row: Callable[[pd.DataFrame, float], list[str]]) -> Table:
    """One row per target and budget; the targets have a column if there are several."""
    targets = list(dict.fromkeys(table.target))
    named = len(targets) > 1
    rows = []
    for target in targets:
        mine = table[table.target == target]
        for budget in budgets_of(mine):
            rows.append([*([target] if named else []), *row(_rows_at(mine, budget), budget)])
    return Table([*(["target"] if named else []), *header], rows)


def accuracy_table(table: pd.DataFrame, *, value: str = "test_accuracy", target: str | None = None) -> Table:
    """Mean and standard deviation over seeds, in percent: one row per target and budget, one column per method.

    Args:
        table: from `Study.sweep`.
        value: an accuracy.
        target: of the table; default: all.
    """
    mine = table if target is None else table[table.target == target]
    methods = list(dict.fromkeys(mine.method))

    def row(here: pd.DataFrame, budget: float) -> list[str]:
        cells = [mean_sd(here[here.method == method][value], 100) for method in methods]
        return [times(budget), f"{100 * here.macs.mean():.1f} %", *cells]

    return _by_target(mine, ["reduction", "measured MACs", *(f"{look(m).label} (%)" for m in methods)], row)


def network_table(table: pd.DataFrame, method: str) -> Table:
    """What the sweep made of the network, mean over seeds: MACs, predictors' share, parameters, channels."""

    def row(here: pd.DataFrame, budget: float) -> list[str]:
        return [
            times(budget),
            f"{here.density.mean():.2f}",
            f"{100 * here.macs.mean():.1f} %",
            f"{100 * here.macs_predictors.mean():.1f} %",
            f"{here.parameters.mean() / 1000:.0f}",
            *(f"{here[state].mean():.0f}" for state in ("dynamic", "static", "removed")),
        ]

    header = ["reduction", "density d", "measured MACs", "of them predictors", "parameters (thousands)"]
    return _by_target(table[table.method == method], [*header, "dynamic", "static", "removed channels"], row)


def differences(
    table: pd.DataFrame, method: str = "afd", other: str = "l2", *, value: str = "test_accuracy"
) -> pd.DataFrame:
    """Paired differences of two methods: the same seed means the same images, initial classifier and order.

    Returns:
        A table with target, budget, difference (mean over seeds, percentage points), sd (of the paired differences),
        low and high (Student's 95 % interval; like sd NaN for one seed) and seeds.
    """
    index = ["target", "budget", "seed"]
    one, two = (table[table.method == name].set_index(index)[value] for name in (method, other))
    paired = (one - two).dropna() * 100
    if paired.empty:
        raise AFDSError(f"the sweep has no seed with both {method} and {other}; compute both")
    rows = []
    for (target, budget), values in paired.groupby(["target", "budget"], sort=False):
        d = statistics.interval(values.to_list())
        rows.append((target, budget, d.mean, d.sd, d.low, d.high, d.n))
    found = pd.DataFrame(rows, columns=["target", "budget", "difference", "sd", "low", "high", "seeds"])
    return found.sort_values(["target", "budget"], ascending=[True, False], ignore_index=True)


def _signed(points: float) -> str:
    return f"{round(points, 1) + 0.0:+.1f}"  # never -0.0


def _difference(row: Any, names: tuple[str, str]) -> str:
    size = f"{names[0]} minus {names[1]} is {_signed(row.difference)} points"
    if row.seeds < 2:
        return f"{size} with one seed, so the interval is not known"
    size += f" [{_signed(row.low)}, {_signed(row.high)}], {row.seeds} seeds"
    if row.low <= 0 <= row.high:
        return f"{size}: the seeds do not tell the two apart"
    few = ", of too few seeds to conclude" if row.seeds < 5 else ""
    return f"{size}: {names[0]} is {'ahead' if row.difference > 0 else 'behind'}{few}"


def differences_text(
    table: pd.DataFrame, method: str = "afd", other: str = "l2", *, budgets: Sequence[float] = (1.0, 0.5, 0.2, 0.1)
) -> Text:
    """One sentence per target and budget: the paired difference with its 95 % interval, and what it says."""
    names = look(method).label, look(other).label
    found = differences(table, method, other)
    lines = []
    for target in dict.fromkeys(found.target):
        for budget in budgets:
            rows = found[(found.target == target) & ((found.budget - budget).abs() < 1e-9)]
            for row in rows.itertuples():
                lines.append(f"- **{times(budget)}**, {target}: {_difference(row, names)}.")
    for gap in table.attrs.get("missing", ()):
        name = f"{look(gap['method']).label} seed {gap['seed']} at {times(gap['budget'])}, {gap['target']}"
        lines.append(f"- Missing: {name}, because it diverged {gap['reason']}.")
    if not lines:
        raise AFDSError(f"the sweep has none of the budgets {', '.join(map(times, budgets))}")
    return Text("\n".join(lines))


def smallest(table: pd.DataFrame, method: str = "afd") -> pd.Series:
    """The row of the smallest budget of a method, first seed."""
    mine = table[table.method == method].sort_values(["budget", "seed"])
    if mine.empty:
        raise AFDSError(f"the sweep has no row of method {method!r}")
    return mine.iloc[0]


def growing(table: pd.DataFrame, column: str) -> bool:
    """Whether a column never falls from one budget to the next smaller one, in every chain of the sweep."""
    chains = table.sort_values("budget", ascending=False).groupby(["target", "method", "seed"])
    return all(chain[column].is_monotonic_increasing for _, chain in chains)


def sources_text(study: Study) -> Text:
    """How accurate the source networks are that the sweep starts from, on their own test images."""
    if study.source_run.published:
        return Text(PUBLISHED)
    networks = {"The source network": study.source(), "with gates, trained on,": study.afs_source()}
    parts = [f"{name} is right on {100 * r.metrics['test_accuracy']:.1f} %" for name, r in networks.items()]
    return Text(f"{'; '.join(parts)} of the source's test images. One network of each: seeds do not vary them.")


def strengths_text(study: Study) -> Text:
    """The strengths that each target's trials chose, how far apart these were, and which lie at a grid's edge."""
    trials = study.trials()
    texts = [
        _strengths(title, study.chosen(target), trials[trials.target == title])
        for title, target in study.targets.items()
    ]
    return Text("\n\n".join(texts))


def _strengths(target: str, regularisers: Mapping[str, Any], trials: pd.DataFrame) -> str:
    parts = [f"{look(name).label} {r.strength:g}" for name, r in regularisers.items()]
    text = f"Chosen on validation images of {target}: {', '.join(parts)}."
    grids = trials.groupby("method", sort=False)
    spread = 100 * (grids.validation_accuracy.max() - grids.validation_accuracy.min())
    edges = [
        look(name).label
        for name, grid in grids.strength
        if regularisers[str(name)].strength in (grid.min(), grid.max())
    ]
    if len(spread):
        text += f" Within one method the strengths tried differ by at most {spread.max():.1f} points."
    if edges:
        text += f" At the edge of the values tried, so perhaps not the best: {', '.join(edges)}."
    return text


def run_text(metrics: Mapping[str, Any]) -> Text:
    """Accuracies of a source run in one sentence."""
    parts = [
        f"{100 * metrics[f'{split}_accuracy']:.1f} % of the {split} images"
        for split in ("validation", "test")
        if f"{split}_accuracy" in metrics
    ]
    if not parts:
        return Text("Published weights were taken; nothing was trained.")
    return Text(f"Right on {' and '.join(parts)} after {metrics['steps']} steps.")


def gates_text(table: pd.DataFrame) -> Text:
    """Dead gates and the gates' variation of the unpruned networks, mean over seeds, by target and method."""
    texts = []
    for target, rows in _rows_at(table, max(budgets_of(table))).groupby("target", sort=False):
        parts = []
        for method, found in rows.groupby("method", sort=False):
            dead, variation = 100 * found.dead_gates.mean(), found.gate_variance.mean()
            parts.append(f"{look(str(method)).label} {dead:.1f} % dead, variation {variation:.3f}")
        texts.append(f"Gates of the unpruned networks on {target}: {'; '.join(parts)}.")
    return Text("\n\n".join(texts))


def about_data(splits: Splits | None, source: Splits | None = None) -> str:
    """What a data set holds, line by line, to be printed.

    Args:
        splits: the data set; None for one that is not read.
        source: for a target: the source, with which it may share classes.
    """
    if splits is None:
        return PUBLISHED
    lines = [
        f"{splits.name}:",
        data.describe(splits).to_string(index=False),
        "detail: mean difference of neighbouring pixels, grey levels; it shows splits scaled down by different filters",
        f"size of an image: {splits.train.size} x {splits.train.size} pixels",
        f"note: {splits.note or 'none'}",
        f"largest class / smallest class of the fitting images: {data.imbalance(splits.train)['ratio']:.2f}",
    ]
    if source is not None:
        lines.append(f"classes shared with the source: {', '.join(share_classes(source, splits)) or 'none'}")
    return "\n".join(lines)


def share_classes(one: Splits, other: Splits) -> list[str]:
    """Class names that two data sets have in common, by their readable names."""

    def names(splits: Splits) -> set[str]:
        return {part.strip().lower() for caption in splits.captions for part in str(caption).split(",")}

    return sorted(names(one) & names(other))


def _target(source: Any) -> str:
    return source.name if source.per_class is None else f"{source.name}, {source.per_class} images per class"


def channels_left(layers: Mapping[str, Mapping[str, Any]]) -> float:
    """Share of all channels that are not removed.

    Raises:
        AFDSError: if a layer has none left, or its dynamic, static and removed channels are not all of its channels.
    """
    for name, layer in layers.items():
        if layer["removed"] >= layer["channels"]:
            raise AFDSError(f"layer {name} has lost all its channels")
        if layer["dynamic"] + layer["static"] + layer["removed"] != layer["channels"]:
            raise AFDSError(f"dynamic, static and removed channels of layer {name} are not all its channels")
    channels = sum(layer["channels"] for layer in layers.values())
    return 1 - sum(layer["removed"] for layer in layers.values()) / channels


def schedule(study: Study) -> Table:
    """Budgets of the sweep and the density that is set at each."""
    method = study.profile.candidates[0].regulariser  # all have the same
    points = [study.transfer_run(method, study.profile.seeds[0], budget=b) for b in study.profile.budgets]
    rows = [(times(p.budgets[-1]), f"{p.budgets[-1]:g}", f"{p.density:.2f}") for p in points]
    return Table(["reduction", "MACs budget", "density d"], rows)


def networks(profile: Profile) -> int:
    """How many networks the sweep of a profile has."""
    return len(profile.targets) * len(profile.candidates) * len(profile.seeds) * len(profile.budgets)


def scope_text(profile: Profile) -> Text:
    """What a reader must know about the scale before looking at any number."""
    p = profile
    text = (
        f"This report is of profile **{p.name}**, budget {p.budget}: a {p.network.name} of width {p.network.width:g}, "
        f"from {p.source.name} to {'; '.join(map(_target, p.targets))}; {len(p.seeds)} seeds."
    )
    if not any(t.name == "stanford-dogs" for t in p.targets):
        text += " Stanford Dogs is not among the targets, so the paper's 11.07 points are **not tested** here."
    if p.name == "demo":
        text += " The demo shows that the whole chain works; its data are too small and too easy to judge any method."
    return Text(f"{text} {p.not_run}".strip())


def settings(profile: Profile) -> Table:
    """The settings of a profile that a reader needs to judge its numbers; `afds run --show` prints them all."""
    p = profile
    shape = f"{p.network.name}, {p.network.stem} stem, width {p.network.width:g}"
    stages = [
        ("source training", p.source_training),
        ("AFS fine-tuning of the source", p.afs_training),
        ("trial of one strength", p.trial),
        ("transfer, unpruned", p.transfer),
        ("each later budget", p.tuning),
    ]
    rows: list[tuple[str, str]] = [
        ("source data", p.source.name),
        ("target data", "; ".join(map(_target, p.targets))),
        ("network", shape if p.network.weights is None else f"{shape}, {p.network.weights} weights"),
        *((name, _stage(stage)) for name, stage in stages),
        ("regularisers", "; ".join(_grid(c) for c in p.candidates)),
        ("budgets", ", ".join(times(b) for b in p.budgets)),
        ("density", f"d = max({p.density_floor:g}, √b) at the share b of the dense MACs; the masks do the rest"),
        ("threshold of static gates, δ_s", f"{p.delta_s:g}"),
        ("training images on which a budget is met", f"at most {p.macs_images}"),
        ("seeds", f"{len(p.seeds)} ({', '.join(map(str, p.seeds))}); trials: {p.trial_seed}"),
    ]
    return Table(["setting", "value"], rows, numbers=False)


def _stage(o: Any) -> str:
    if not o.steps:
        return "none"
    return f"{o.steps} steps of {o.batch_size}, learning rate {o.lr:g}, {o.schedule} schedule, {o.precision}"


def _grid(candidates: Any) -> str:
    values = ", ".join(f"{strength:g}" for strength in sorted(candidates.strengths))
    return f"{look(candidates.regulariser.name).label} {{{values}}}"


def write_page(study: Study) -> Path:
    """Writes README.md beside the study's tables: the command, the scale, and the results in words and rows."""
    p, table = study.profile, study.sweep()
    parts = [
        f"# Results of the study {p.name}, budget {p.budget}",
        f"Regenerated by `afds run --profile {p.name} --data-dir DIR --budget {p.budget}`; written by `afds publish`.",
        scope_text(p),
        run_text(study.source().metrics),
    ]
    for target in dict.fromkeys(table.target):
        parts += [f"## Test accuracy on {target}, %", accuracy_table(table, target=target)._repr_markdown_()]
    parts += [
        "## AFD minus plain fine-tuning (L2), same seeds",
        differences_text(table),
        "Every point is a row of `sweep.csv`, every trial of `trials.csv`; each run's settings, learning curve, "
        "device and versions are in `../runs/`.",
    ]
    page = study.folder() / "README.md"
    write_text(page, "\n\n".join(map(str, parts)) + "\n")
    return page
