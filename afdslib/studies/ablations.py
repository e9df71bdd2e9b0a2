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
from afdslib.studies.statistics import at, by_seed, paired, paired_seeds, points
from afdslib.training.features import compared_shapes

__all__ = [
    "ATTENTION", "LABELS", "WHOLE", "Ablations", "attention_text", "attention_widths", "confirmation_text",
    "settled_text", "uniform_width", "views",
]  # fmt: skip

WHOLE = "whole"
"""The variant that is AFDS itself."""
SHAPES: Mapping[str, dict[str, Any]] = {
    "multiple-8": {"multiple": 8}, "multiple-16": {"multiple": 16}, "coupled": {"stream": "coupled"},
}  # fmt: skip
"""Ablations for kernels' sake, which are made at the trials' budget, too."""
LABELS = {
    "l2": "AFS without AFD", "uniform": "uniform attention", "static": "static only", "dynamic": "dynamic only",
    "recalled": "masks first updated at half a stage", "no-source-stage": "without the source stage",
    "random-predictors": "random predictors", "convbn": "features of the last ConvBN", "detached": "detached attention",
    "multiple-8": "kept channels in multiples of 8", "multiple-16": "kept channels in multiples of 16",
    "coupled": "residual streams narrow as a whole", WHOLE: "both (AFDS)", "dense": "AFD without AFS",
    "longer": "unpruned, as many steps", "unextended": "unextended start",
}  # fmt: skip
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
        return self.comparison.committed(self.part) if self.profile.committed else engine.table(self)

    def chain(self, attention: str, seeds: Sequence[int]) -> list[tuple[int, float, TransferRun]]:
        """(seed, budget, run) of AFDS down to the primary budget, or of the same with detached attention."""
        tuned = replace(self.comparison.tuned(AFDS), method=ATTENTION[attention])
        return [
            (seed, budget, self.points.point(tuned, seed, self.rules.budgets[: i + 1]))  # type: ignore[misc]
            for seed in seeds
            for i, budget in enumerate(self.rules.chain)
        ]

    def _cell(self, role: str, config: Any, seed: int, budget: float, method: Method = AFDS, **keys: str) -> Cell:
        target = self.comparison.target.title
        return Cell(config, role, {"target": target, "method": method.key, "seed": seed, "budget": budget} | keys)

    def _ablations(self) -> list[Cell]:
        rules, comparison, tuned = self.rules, self.comparison, self.comparison.tuned(AFDS)
        seeds, chain, make = rules.seeds[: rules.rest], rules.chain, self.points.regulariser
        none = replace(self.profile.afs_training, steps=0)
        l2, uniform = Method("l2", "afs"), Method("feature-map", "afs")
        l2_settings = comparison.tuning.best_regulariser(l2)
        fields: dict[str, Callable[[Any], dict[str, Any]]] = {
            "l2": lambda c: {"regulariser": make(l2, l2_settings)},
            "uniform": lambda c: {"regulariser": make(uniform, tuned.regulariser)},
            "static": lambda c: {"delta_s": math.inf},
            "dynamic": lambda c: {"delta_s": 0.0},
            "recalled": lambda c: {"first": 0.5, "freeze_first": True},
            "no-source-stage": lambda c: {"source": replace(c.source, optimisation=none)},
            "random-predictors": lambda c: {"source": replace(c.source, predictors="random")},
            "convbn": lambda c: {"regulariser": replace(c.regulariser, features="convbn")},
            "detached": lambda c: {"regulariser": replace(c.regulariser, attention="detached")},
            **{name: lambda c, name=name: SHAPES[name] for name in SHAPES},  # type: ignore[misc]
            WHOLE: lambda c: {},
        }
        ends = {chain: list(fields)}
        if rules.trial_budget in chain[:-1]:
            # A small network has few layers that are wide enough for multiples at the primary budget.
            ends[chain[: chain.index(rules.trial_budget) + 1]] = [*SHAPES, WHOLE]
        cells = []
        for budgets, names in ends.items():
            wholes = [self.points.point(tuned, seed, budgets) for seed in seeds]
            for name in names:
                for seed, whole in zip(seeds, wholes, strict=True):
                    changed = replace(whole, **fields[name](whole))
                    cells.append(self._cell("ablation", changed, seed, budgets[-1], variant=name))
        rival = comparison.tuned(Method.parse(comparison.rival()))
        for seed in seeds:
            first: Any = self.points.point(tuned, seed, chain[:1])
            steps = first.optimisation.steps + (len(chain) - 1) * first.tuning.steps
            longer = replace(first, optimisation=self.points.stage(first.optimisation, 1.0, steps))
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
        kept = results.select(comparison.committed(self.part), role="equal-time", method=name)
        factor = float(kept.steps_factor.iloc[0]) if len(kept) else self._ratio(name)
        cells = [comparison.cell(Method.parse(name), s, rules.chain, role="equal-time", factor=factor) for s in seeds]
        return [replace(cell, keys={**cell.keys, "steps_factor": factor}) for cell in cells]

    def _ratio(self, rival: str) -> float:
        rules, rows = self.rules, results.view(self.comparison.complete(), ["method", "seed", "budget", "seconds"])
        rows = at(rows[rows.seed.isin(rules.seeds[: rules.rest])], rules.primary_budget)
        ours, theirs = (rows[rows.method == m].seconds.mean() for m in (AFDS.key, rival))
        if not (ours > 0 and theirs > 0):
            raise AFDSError("the wall-clock times of AFDS or of its rival are not known; recompute them on one machine")
        return max(0.1, round(ours / theirs, 1))

    def measured(self, cell: Cell, result: runs.Result) -> dict[str, Any]:
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


# the tables

FIGURES = ["test_accuracy", "validation_accuracy", "train_macs", "macs", "dead_gates"]


def views(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables ablations, detached, settled, equal_time, from a target's rows of the part "ablations", as text."""
    columns = ["variant", "seed", "budget", *FIGURES, "reason", "run", "method"]
    table = results.view(results.select(rows, role="ablation"), columns).rename(columns={"reason": "diverged"})
    table.insert(0, "key", table.variant)
    table["variant"] = [
        LABELS[key] if key != "unextended" else f"{Method.parse(method).label}, {LABELS[key]}"
        for key, method in zip(table.key, table.method, strict=True)
    ]
    settled = ["attention", "seed", "budget", "macs", "test_accuracy", "validation_accuracy", "removed", "run"]
    again = results.select(rows, role="equal-time", reason="").assign(role="competitor")
    return {
        "ablations": table,
        "detached": results.select(rows, role="attention"),
        "settled": results.view(results.select(rows, role="settled", reason=""), settled),
        "equal_time": results.view(again, [*COLUMNS, "steps_factor"]),
    }


def attention_widths(network: Network, main: pd.DataFrame, detached: pd.DataFrame) -> pd.DataFrame:
    """The attention's width at the end of each finished point of AFDS and of its variant with detached attention.

    Width is exp of the entropy (nats, mean over samples and layers): the number of channels of a uniform attention with
    that entropy, as a geometric mean over layers.

    Args:
        network: of the study.
        main, detached: the comparison's rows, and those of the role "attention", as text.

    Returns:
        Columns attention ("joint" or "detached"), seed, budget, width, uniform, macs, test_accuracy, run.
    """
    joint = results.select(main, method=AFDS.key, reason="").assign(attention="joint")
    rows = pd.concat([joint, results.select(detached, reason="")])
    table = results.view(rows, ["attention", "seed", "budget", "macs", "test_accuracy", "run"])
    widths = [math.exp(float(runs.finished(run)[1].history().entropy.iloc[-1])) for run in rows.run]
    table.insert(3, "width", [float(f"{width:.6g}") for width in widths])
    table.insert(4, "uniform", float(f"{uniform_width(network):.6g}"))
    return table


def uniform_width(network: Network) -> float:
    """The width of a uniform attention: the geometric mean of the compared layers' channels."""
    shapes = compared_shapes(network, "block").values()
    return math.exp(sum(math.log(channels) for channels, _, _ in shapes) / len(shapes))


# sentences: `table` and `before` are of `attention_widths`, `main` is `Comparison.table`, `budget` is the endpoint's


def _attentions(table: pd.DataFrame, budget: float) -> tuple[dict[int, float], dict[int, float]]:
    """Accuracy by seed at a budget: with joint attention, with detached attention."""
    here = at(table, budget)
    joint, detached = (by_seed(here[here.attention == name]) for name in ATTENTION)
    return joint, detached


def _gain(one: Mapping[int, float], other: Mapping[int, float]) -> tuple[str, str]:
    """One minus the other, in points with its interval, and of how many seeds."""
    difference = paired(one, other).difference
    return points(difference), paired_seeds(difference.n)


def attention_text(table: pd.DataFrame, main: pd.DataFrame, *, budget: float) -> str:
    """What became of the attention by the endpoint's budget, and what detaching it changes there."""
    here, (joint, detached) = at(table, budget), _attentions(table, budget)
    if not joint:
        return ""
    width = here.groupby("attention").width.mean()
    unpruned = table[(table.attention == "joint") & (table.budget == 1)].width.mean()
    said = [
        f"How wide AFD's attention is: uniform, it would be {table.uniform.iloc[0]:.0f} channels (geometric mean over "
        f"layers); the joint one is {unpruned:.0f} wide in the unpruned network and {width['joint']:.1f} at "
        f"{times(budget)}."
    ]
    if detached:
        gain, seeds = _gain(detached, joint)
        said.append(
            f"The detached one is {width['detached']:.0f} wide there; the accuracy of detached minus joint: "
            f"{gain} points, {seeds} (exploratory)."
        )
    if delta := by_seed(at(main[main.method == "delta+afs"], budget)):
        gain, seeds = _gain(delta, joint)
        said.append(f"DELTA, which fixes its weights beforehand too, minus AFD, both with AFS: {gain} points, {seeds}.")
    return " ".join(said)


def confirmation_text(
    table: pd.DataFrame, main: pd.DataFrame, *, budget: float, rival: str, seeds: Sequence[int]
) -> str:
    """Whether detached attention is confirmed: its difference from the joint one, and from the rival.

    There is no verdict before all of the protocol's seeds are there.
    """
    (joint, detached), other = _attentions(table, budget), by_seed(at(main[main.method == rival], budget))
    there = set(joint) & set(detached) & set(other)
    if not there >= set(seeds):
        return f"Detached attention: {len(there)} of {len(seeds)} seeds are there, so nothing is said of it yet."
    verdict = "confirmed" if paired(detached, joint).difference.low > 0 else "not confirmed"
    gain, n = _gain(detached, joint)
    return (
        f"Detached attention, found on the primary target, is {verdict} here: {gain} points from AFDS and "
        f"{_gain(detached, other)[0]} from the best competitor, {Method.parse(rival).label}, {n}."
    )


def settled_text(table: pd.DataFrame, before: pd.DataFrame, main: pd.DataFrame, *, budget: float, rival: str) -> str:
    """What settling by Taylor importance changes at a budget, and how far AFDS is from the rival then.

    Args:
        table: the settled points; `before` has the same networks, settled by mean gates.

    Returns:
        Empty where nothing is finished.
    """
    now, then = _attentions(table, budget), _attentions(before, budget)
    rivals, said = by_seed(at(main[main.method == rival], budget)), []
    for label, new, old in zip(("AFDS", "AFDS with detached attention"), now, then, strict=True):
        if shared := sorted(set(new) & set(old)) if set(new) & set(rivals) else []:
            gain, n = _gain(new, old)
            each = ", ".join(f"{100 * (new[seed] - old[seed]):+.1f}" for seed in shared)
            said.append(
                f"{label} gains {gain} points by it, {n} (seed by seed {each}), and is then {_gain(new, rivals)[0]} "
                f"from the best competitor, {Method.parse(rival).label}."
            )
    (joint, detached), unsettled = now, then[0]
    if set(joint) & set(detached):
        gain, n = _gain(detached, joint)
        said.append(f"Detached minus joint attention, both so: {gain} points, {n}.")
    elif set(detached) & set(unsettled):
        gain, n = _gain(detached, unsettled)
        still = "whose budgets are still met by mean gates (two things differ)"
        said.append(f"Against joint attention, {still}: {gain} points, {n}.")
    if not said:
        return ""
    return f"Budgets met by Taylor importance after the last step (exploratory, at {times(budget)}): {' '.join(said)}"
