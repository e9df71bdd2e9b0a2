"""Tables and sentences about a profile and its sweep, computed from result tables: no number is typed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from afdslib import data
from afdslib.base.errors import AFDSError
from afdslib.base.text import Text, times
from afdslib.data import Splits
from afdslib.report.numbers import Number, minus
from afdslib.report.plots import look
from afdslib.report.tables import Table, bullets, mean_sd, place
from afdslib.studies import statistics
from afdslib.studies.profile import Profile
from afdslib.studies.statistics import at
from afdslib.studies.sweep import Study

__all__ = [
    "PUBLISHED", "about_data", "accuracy_table", "budgets_of", "channels_left", "differences_text", "growing",
    "network_table", "networks", "run_text", "schedule", "scope_text", "settings", "sources_text", "stage_text",
    "strengths_text"
]  # fmt: skip

PUBLISHED = "Published weights are taken as they are: this study reads no source image and trains no source network."


def budgets_of(table: pd.DataFrame) -> list[float]:
    """The budgets of a sweep, decreasing from 1."""
    return sorted((float(b) for b in table.budget.unique()), reverse=True)


def _by_target(table: pd.DataFrame, header: Sequence[str], row: Callable[[pd.DataFrame], list[str]]) -> Table:
    """One row per target and budget; the targets have a column if there are several."""
    several = table.target.nunique() > 1
    rows = [
        [*([place(target)] if several else []), times(budget), *row(at(mine, budget))]
        for target, mine in table.groupby("target", sort=False)
        for budget in budgets_of(mine)
    ]
    return Table([*(["target"] if several else []), "reduction", *header], rows)


def accuracy_table(table: pd.DataFrame, *, value: str = "test_accuracy", target: str | None = None) -> Table:
    """An accuracy of a sweep (on a target or on all), mean and standard deviation over seeds, in percent.

    One row per target and budget, one column per method.
    """
    table = table if target is None else table[table.target == target]
    methods = list(dict.fromkeys(table.method))

    def row(here: pd.DataFrame) -> list[str]:
        cells = [mean_sd(here[here.method == method][value], 100) for method in methods]
        return [f"{100 * here.macs.mean():.1f} %", *cells]

    return _by_target(table, ["measured MACs", *(f"{look(m).label} (%)" for m in methods)], row)


def network_table(table: pd.DataFrame, method: str) -> Table:
    """What the sweep made of the network, mean over seeds: MACs, predictors' share, parameters, channels."""

    def row(here: pd.DataFrame) -> list[str]:
        mean = here.mean(numeric_only=True)
        return [
            f"{mean.density:.2f}", f"{100 * mean.macs:.1f} %", f"{100 * mean.macs_predictors:.1f} %",
            f"{mean.parameters / 1000:.0f}", *(f"{mean[state]:.0f}" for state in ("dynamic", "static", "removed"))
        ]  # fmt: skip

    header = ["density d", "measured MACs", "of them predictors", "parameters (thousands)"]
    return _by_target(table[table.method == method], [*header, "dynamic", "static", "removed channels"], row)


def differences_text(
    table: pd.DataFrame, method: str = "afd", other: str = "l2", *, budgets: Sequence[float] = (1.0, 0.5, 0.2, 0.1)
) -> Text:
    """One sentence per target and budget: the difference of two methods over paired seeds with its 95 % interval.

    The same seed means the same images, initial classifier and order. AFDSError where no budget has such a seed.
    """
    names, lines = [look(name).label for name in (method, other)], []
    for target, mine in table.groupby("target", sort=False):
        for budget in budgets:
            here = at(mine, budget)
            if found := minus(*(here[here.method == name] for name in (method, other))):
                said = f"{names[0]} minus {names[1]}: {found}, {statistics.paired_seeds(found.n)}: {_judged(found)}"
                lines.append(f"**{times(budget)}**, {place(str(target))}: {said}.")
    if not lines:
        raise AFDSError(f"the sweep has no seed with both {method} and {other} at {', '.join(map(times, budgets))}")
    for gap in table.attrs.get("missing", ()):
        name = f"{look(gap['method']).label} seed {gap['seed']} at {times(gap['budget'])}, {place(gap['target'])}"
        lines.append(f"Missing: {name}, because it diverged {gap['reason']}.")
    return Text(bullets(lines))


def _judged(difference: Number) -> str:
    if difference.n < 2 or difference.low <= 0 <= difference.high:
        return "undecided"
    few = ", of too few seeds to conclude" if difference.n < 5 else ""
    return f"{'better' if difference.value > 0 else 'worse'}{few}"


def growing(table: pd.DataFrame, column: str) -> bool:
    """Whether a column never falls from one budget to the next smaller one, in every chain of the sweep."""
    chains = table.sort_values("budget", ascending=False).groupby(["target", "method", "seed"])
    return all(chain[column].is_monotonic_increasing for _, chain in chains)


def channels_left(layers: Mapping[str, Mapping[str, Any]]) -> float:
    """Share of all channels that are not removed; AFDSError for a layer without any, or whose states do not add up."""
    for name, layer in layers.items():
        if layer["removed"] >= layer["channels"]:
            raise AFDSError(f"layer {name} has lost all its channels")
        if layer["dynamic"] + layer["static"] + layer["removed"] != layer["channels"]:
            raise AFDSError(f"dynamic, static and removed channels of layer {name} are not all its channels")
    channels, removed = (sum(layer[key] for layer in layers.values()) for key in ("channels", "removed"))
    return 1 - removed / channels


def run_text(metrics: Mapping[str, Any]) -> Text:
    """Accuracies of a source run in one sentence."""
    accuracies = {split: metrics.get(f"{split}_accuracy") for split in ("validation", "test")}
    parts = [f"{100 * share:.1f} % of the {split} images" for split, share in accuracies.items() if share is not None]
    if not parts:
        return Text("Published weights were taken; nothing was trained.")
    return Text(f"Right on {' and '.join(parts)} after {metrics['steps']} steps.")


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
    texts = []
    for title, target in study.targets.items():
        chosen = {name: regulariser.strength for name, regulariser in study.chosen(target).items()}
        parts = [f"{look(name).label} {strength:g}" for name, strength in chosen.items()]
        text = f"Chosen on validation images of {place(title)}: {', '.join(parts)}."
        grids = trials[trials.target == title].groupby("method", sort=False)
        spread = 100 * (grids.validation_accuracy.max() - grids.validation_accuracy.min())
        edges = [look(m).label for m, grid in grids.strength if chosen[str(m)] in (grid.min(), grid.max())]
        if len(spread):
            text += f" Within one method the strengths tried differ by at most {spread.max():.1f} points."
        if edges:
            text += f" At the edge of the values tried, so perhaps not the best: {', '.join(edges)}."
        texts.append(text)
    return Text("\n\n".join(texts))


def schedule(study: Study) -> Table:
    """Budgets of the sweep and the density that is set at each."""
    method = study.profile.candidates[0].regulariser  # all have the same
    points = [study.transfer_run(method, study.profile.seeds[0], budget=b) for b in study.profile.budgets]
    rows = [(times(p.budgets[-1]), f"{p.budgets[-1]:g}", f"{p.density:.2f}") for p in points]
    return Table(["reduction", "MACs budget", "density d"], rows)


def about_data(splits: Splits | None, source: Splits | None = None) -> str:
    """What a data set holds (None: it is not read), line by line; of a target, too, what it shares with the source."""
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
        both = ({n.strip().lower() for c in s.captions for n in str(c).split(",")} for s in (source, splits))
        lines.append(f"classes shared with the source: {', '.join(sorted(set.intersection(*both))) or 'none'}")
    return "\n".join(lines)


def networks(profile: Profile) -> int:
    """How many networks the sweep of a profile has."""
    return len(profile.targets) * len(profile.candidates) * len(profile.seeds) * len(profile.budgets)


def scope_text(profile: Profile) -> Text:
    """What a reader must know about the scale before looking at any number."""
    p = profile
    text = f"Profile **{p.name}**, scale {p.scale}: a {p.network.name} of width {p.network.width:g}, from "
    text += f"{place(p.source.name)} to {place('; '.join(t.title for t in p.targets))}; {len(p.seeds)} seeds."
    if p.name == "demo":
        text += " The demo shows that the whole chain works; its data are too small and too easy to judge any method."
    return Text(f"{text} {p.not_run}".strip())


def settings(profile: Profile) -> Table:
    """The settings of a profile that a reader needs to judge its numbers; `afds run --show` prints them all."""
    p = profile
    shape = f"{p.network.name}, {p.network.stem} stem, width {p.network.width:g}"
    grids = [f"{look(c.regulariser.name).label} {{{_values(sorted(c.strengths))}}}" for c in p.candidates]
    rows = [
        ("source data", place(p.source.name)),
        ("target data", place("; ".join(t.title for t in p.targets))),
        ("network", shape if p.network.weights is None else f"{shape}, {p.network.weights} weights"),
        ("source training", stage_text(p.source_training)),
        ("AFS fine-tuning of the source", stage_text(p.afs_training)),
        ("trial of one strength", stage_text(p.trial)),
        ("transfer, unpruned", stage_text(p.transfer)),
        ("each later budget", stage_text(p.tuning)),
        ("regularisers", "; ".join(grids)),
        ("budgets", ", ".join(map(times, p.budgets))),
        ("density", f"d = max({p.density_floor:g}, √b) at the share b of the dense MACs; the masks do the rest"),
        ("threshold of static gates, δ_s", f"{p.delta_s:g}"),
        ("training images on which a budget is met", f"at most {p.macs_images}"),
        ("seeds", f"{len(p.seeds)} ({_values(p.seeds)}); trials: {p.trial_seed}"),
    ]
    return Table(["setting", "value"], rows, numbers=False)


def _values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def stage_text(o: Any, word: str = " schedule") -> str:
    """A stage of training, an `Optimisation`, in one line."""
    if not o.steps:
        return "none"
    drops = f" (x{o.drop:g} at {', '.join(f'{m:.0%}' for m in o.milestones)})" if o.milestones else ""
    return f"{o.steps} steps of {o.batch_size}, learning rate {o.lr:g}, {o.schedule}{word}{drops}, {o.precision}"
