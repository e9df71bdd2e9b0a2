"""AFDS with one part changed, and what is measured beside the comparison. All of it is exploratory.

- Ablations: one part of AFDS changed at the endpoint's budget, at the first seeds.
- Attention: the joint one is trained to make the loss small that it weights, so it may move to the channels that are
  easiest to match; a detached one is trained beforehand and cannot. Both are followed from budget to budget.
- Settling: budgets met after the last step by Taylor importance instead of mean gates, which at times remove channels
  that matter. Found after the comparison was finished: its numbers stay, and these stand beside them.
- Equal time: the rival once more with as much wall-clock time on the target as AFDS takes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from afdslib import runs
from afdslib.base.errors import AFDSError
from afdslib.base.text import times
from afdslib.experiments import ExtendedSourceRun, Network, TransferRun
from afdslib.studies import engine, results
from afdslib.studies.comparison import COLUMNS, Comparison
from afdslib.studies.engine import Cell
from afdslib.studies.protocol import AFDS, Method
from afdslib.studies.statistics import by_seed, paired, paired_seeds, points
from afdslib.training.features import compared_shapes

__all__ = [
    "ATTENTION",
    "LABELS",
    "WHOLE",
    "Ablations",
    "attention_text",
    "attention_widths",
    "confirmation_text",
    "settled_text",
    "uniform_width",
    "views",
]

WHOLE = "whole"
"""The variant that is AFDS itself."""
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "multiple-8": {"multiple": 8},
    "multiple-16": {"multiple": 16},
    "coupled": {"stream": "coupled"},
}
"""Ablations for kernels' sake, which are made at the trials' budget, too."""
LABELS = {
    "l2": "AFS without AFD",
    "uniform": "uniform attention",
    "static": "static only",
    "dynamic": "dynamic only",
    "recalled": "masks first updated at half a stage",
    "no-source-stage": "without the source stage",
    "random-predictors": "random predictors",
    "convbn": "features of the last ConvBN",
    "detached": "detached attention",
    "multiple-8": "kept channels in multiples of 8",
    "multiple-16": "kept channels in multiples of 16",
    "coupled": "residual streams narrow as a whole",
    WHOLE: "both (AFDS)",
    "dense": "AFD without AFS",
    "longer": "unpruned, as many steps",
    "unextended": "unextended start",
}
"""Variants for readers; the last one is the rival's."""
ATTENTION = {"joint": AFDS, "detached": replace(AFDS, attention="detached")}


class Ablations(engine.Plan):
    """What is trained beside a comparison.

    Args:
        comparison: finished, so that the rival is known.
    """

    part = "ablations"

    def __init__(self, comparison: Comparison):
        super().__init__(comparison.profile)
        self.comparison, self.rules, self.points = comparison, comparison.rules, comparison.points

    def batches(self) -> Iterator[list[Cell]]:
        """The ablations; the attention and, by Taylor importance, the settled points; the rival at equal time.

        A variant of a study looks at detached attention alone, at all its seeds.
        """
        if not self.comparison.finished:
            raise engine.Unfinished(
                f"ablations need the comparison, which is not finished; finish it first: {self.comparison.command}"
            )
        rules, varies = self.rules, bool(self.rules.settings_of)
        if not varies:
            yield self._ablations()
        seeds = rules.seeds if varies else rules.seeds[: rules.rest]
        detached = self.chain("detached", seeds)
        yield [self._cell("attention", config, seed, b, attention="detached") for seed, b, config in detached]
        yield [
            self._cell("settled", replace(config, settle_by="taylor"), seed, budget, attention=attention)
            for attention in (ATTENTION if varies else ("joint",))
            for seed, budget, config in self.chain(attention, rules.seeds[: rules.rest])
            if budget < 1
        ]
        if not varies:
            yield self._equal_time()

    def rows(self) -> pd.DataFrame:
        """The rows of this part, as text: the committed ones of a real study, else what is finished here."""
        if not self.profile.committed:
            return engine.table(self)
        rows = results.read(self.profile.name, self.profile.scale)
        return results.select(rows, part=self.part, target=self.comparison.target.title)

    def chain(self, attention: str, seeds: Sequence[int]) -> list[tuple[int, float, TransferRun]]:
        """(seed, budget, run) of AFDS down to the primary budget, or of the same with detached attention."""
        tuned = replace(self.comparison.tuned(AFDS), method=ATTENTION[attention])
        return [
            (seed, budget, self.points.point(tuned, seed, self.rules.budgets[: i + 1]))  # type: ignore[misc]
            for seed in seeds
            for i, budget in enumerate(self._primary)
        ]

    @property
    def _primary(self) -> tuple[float, ...]:
        """Budgets down to the primary one."""
        return self.rules.budgets[: self.rules.budgets.index(self.rules.primary_budget) + 1]

    def _cell(self, role: str, config: Any, seed: int, budget: float, method: Method = AFDS, **keys: str) -> Cell:
        same = {"target": self.comparison.target.title, "method": method.key, "seed": seed, "budget": budget}
        return Cell(config, role, same | keys)

    def _ablations(self) -> list[Cell]:
        rules, comparison, tuned = self.rules, self.comparison, self.comparison.tuned(AFDS)
        seeds, chain = rules.seeds[: rules.rest], self._primary
        none = replace(self.profile.afs_training, steps=0)
        l2, uniform = Method("l2", "afs"), Method("feature-map", "afs")
        l2_settings = comparison.best_regulariser(l2)
        changed: dict[str, Callable[[Any], Any]] = {
            "l2": lambda c: replace(c, regulariser=self.points.regulariser(l2, l2_settings)),
            "uniform": lambda c: replace(c, regulariser=self.points.regulariser(uniform, tuned.regulariser)),
            "static": lambda c: replace(c, delta_s=math.inf),
            "dynamic": lambda c: replace(c, delta_s=0.0),
            "recalled": lambda c: replace(c, first=0.5, freeze_first=True),
            "no-source-stage": lambda c: replace(c, source=replace(c.source, optimisation=none)),
            "random-predictors": lambda c: replace(c, source=replace(c.source, predictors="random")),
            "convbn": lambda c: replace(c, regulariser=replace(c.regulariser, features="convbn")),
            "detached": lambda c: replace(c, regulariser=replace(c.regulariser, attention="detached")),
            **{name: functools.partial(replace, **fields) for name, fields in SHAPES.items()},
            WHOLE: lambda c: c,
        }
        ends = {chain: list(changed)}
        if rules.trial_budget in chain[:-1]:
            # A small network has few layers that are wide enough for multiples at the primary budget.
            ends[chain[: chain.index(rules.trial_budget) + 1]] = [*SHAPES, WHOLE]
        cells = [
            self._cell("ablation", changed[name](whole), seed, budgets[-1], variant=name)
            for budgets, names in ends.items()
            for name in names
            for seed in seeds
            for whole in (self.points.point(tuned, seed, budgets),)
        ]
        rival = comparison.tuned(Method.parse(comparison.rival()))
        for seed in seeds:
            first: Any = self.points.point(tuned, seed, chain[:1])
            steps = first.optimisation.steps + (len(chain) - 1) * first.tuning.steps
            longer = replace(first, optimisation=self.points.stage(first.optimisation, 1.0, steps=steps))
            unextended = _unextended(self.points.point(rival, seed, chain))
            dense = self.points.dense(AFDS, tuned.regulariser, seed)
            cells.append(self._cell("ablation", dense, seed, 1.0, variant="dense"))
            cells.append(self._cell("ablation", longer, seed, 1.0, variant="longer"))
            cells.append(self._cell("ablation", unextended, seed, chain[-1], rival.method, variant="unextended"))
        return cells

    def _equal_time(self) -> list[Cell]:
        """The rival with its steps scaled by the ratio of the measured times, rounded to tenths."""
        rules, comparison = self.rules, self.comparison
        name, seeds = comparison.rival(), rules.seeds[: rules.rest]
        kept = results.select(results.read(self.profile.name, self.profile.scale), role="equal-time", method=name)
        kept = results.select(kept, target=comparison.target.title)
        factor = float(kept.steps_factor.iloc[0]) if self.profile.committed and len(kept) else self._ratio(name)
        cells = [comparison.cell(Method.parse(name), s, self._primary, role="equal-time", factor=factor) for s in seeds]
        return [replace(cell, keys={**cell.keys, "steps_factor": factor}) for cell in cells]

    def _ratio(self, rival: str) -> float:
        rules, rows = self.rules, results.view(self.comparison.complete(), ["method", "seed", "budget", "seconds"])
        rows = rows[(rows.budget == rules.primary_budget) & rows.seed.isin(list(rules.seeds[: rules.rest]))]
        ours, theirs = (rows[rows.method == m].seconds.mean() for m in (AFDS.key, rival))
        if not (ours > 0 and theirs > 0):
            raise AFDSError("the wall-clock times of AFDS or of its rival are not known; recompute them on one machine")
        return max(0.1, round(ours / theirs, 1))

    def measured(self, cell: Cell, result: runs.Result) -> Mapping[str, Any]:
        """A row's figures; those at equal time have the costs, too."""
        return self.comparison.measured(cell, result) if cell.role == "equal-time" else result.metrics


def _unextended(config: Any) -> Any:
    """A run whose source networks are as they were before the additional source steps."""
    if isinstance(config, ExtendedSourceRun):
        return replace(config, optimisation=replace(config.optimisation, steps=0))
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    inner = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return replace(config, **{k: v for k, value in inner.items() if (v := _unextended(value)) != value})


# ---------------------------------------------------------------------------------------------------------- the tables

FIGURES = ["test_accuracy", "validation_accuracy", "train_macs", "macs", "dead_gates"]


def views(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables of a target's ablations: ablations, detached, settled, equal_time.

    Args:
        rows: text, of the part "ablations".
    """
    columns = {name: name for name in ("variant", "seed", "budget", *FIGURES, "reason", "run", "method")}
    table = results.view(results.select(rows, role="ablation"), columns | {"reason": "diverged"})
    labels = [
        LABELS[r.variant] if r.variant != "unextended" else f"{Method.parse(r.method).label}, {LABELS[r.variant]}"
        for r in table.itertuples()
    ]
    table.insert(0, "key", table.variant)
    table["variant"] = labels
    settled = ["attention", "seed", "budget", "macs", "test_accuracy", "validation_accuracy", "removed", "run"]
    return {
        "ablations": table,
        "detached": results.select(rows, role="attention"),
        "settled": results.view(results.select(rows, role="settled", reason=""), settled),
        "equal_time": results.view(
            results.select(rows, role="equal-time", reason="").assign(role="competitor"), [*COLUMNS, "steps_factor"]
        ),
    }


def attention_widths(network: Network, main: pd.DataFrame, detached: pd.DataFrame) -> pd.DataFrame:
    """The attention's width at the end of each finished point of AFDS and of its variant with detached attention.

    Width is exp of the entropy (nats, mean over samples and layers): the number of channels of a uniform attention with
    that entropy, as a geometric mean over layers.

    Args:
        network: of the study.
        main: the comparison's rows, as text.
        detached: the rows of the role "attention", as text.

    Returns:
        Columns attention ("joint" or "detached"), seed, budget, width, uniform, macs, test_accuracy, run.
    """
    joint = results.select(main, method=AFDS.key, reason="").assign(attention="joint")
    rows = pd.concat([joint, results.select(detached, reason="")])
    table = results.view(rows, ["attention", "seed", "budget", "macs", "test_accuracy", "run"])
    widths = [math.exp(float(_history(run).entropy.iloc[-1])) for run in rows.run]
    table.insert(3, "width", [float(f"{width:.6g}") for width in widths])
    table.insert(4, "uniform", float(f"{uniform_width(network):.6g}"))
    return table


def _history(run: str) -> pd.DataFrame:
    return runs.finished(run)[1].history()


def uniform_width(network: Network, features: str = "block") -> float:
    """The width of a uniform attention: the geometric mean of the compared layers' channels."""
    shapes = compared_shapes(network, features).values()
    return math.exp(sum(math.log(channels) for channels, _, _ in shapes) / len(shapes))


# --------------------------------------------------------------------------------------------------------- sentences


def attention_text(table: pd.DataFrame, main: pd.DataFrame, *, budget: float) -> str:
    """What became of the attention by one budget, and what detaching it changes there.

    Args:
        table: of `attention_widths`.
        main: of `Comparison.table`.
        budget: the endpoint's.
    """
    here = table[(table.budget - budget).abs() < 1e-9]
    joint, detached = (here[here.attention == name] for name in ATTENTION)
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
        table: of `attention_widths`.
        main: of `Comparison.table`.
        budget: the endpoint's.
        rival: its method.
        seeds: of the protocol; there is no verdict before all of them are there.
    """
    here = table[(table.budget - budget).abs() < 1e-9]
    joint, detached = (by_seed(here[here.attention == name]) for name in ATTENTION)
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


def settled_text(found: pd.DataFrame, before: pd.DataFrame, main: pd.DataFrame, *, budget: float, rival: str) -> str:
    """What settling by Taylor importance changes at a budget, and how far AFDS is from the rival then.

    Args:
        found: the settled points.
        before: of `attention_widths`: the same networks, settled by mean gates.
        main: of `Comparison.table`.
        budget: the endpoint's.
        rival: its method.

    Returns:
        Empty where nothing is finished.
    """
    now, then = (t[(t.budget - budget).abs() < 1e-9] for t in (found, before))
    theirs = by_seed(main[(main.method == rival) & ((main.budget - budget).abs() < 1e-9)])
    settled = {name: by_seed(now[now.attention == name]) for name in ATTENTION}
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
