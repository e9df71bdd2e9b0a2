"""The claims, one per clause, each with a rule; verdicts come from result files.

The rules were written before any result that can decide them; where one saw earlier numbers, its claim says so.
A rule is a function of the committed CSVs below data/results/ and of nothing else: no verdict is typed in. Verdicts:

    supported      the whole 95 % interval speaks for the claim
    not supported  the whole interval speaks against it, or leaves out the margin it names
    undecided      the interval holds both, or there are too few seeds
    untested       no row of the network and data set that the claim names

Differences are paired by seed. The rival is the competitor that is best on validation images at 10x (`statistics`).
Of the committed scales of a study the largest one that has the rows counts.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from afdslib.base.errors import AFDSError
from afdslib.report import numbers, speed
from afdslib.report.numbers import Number
from afdslib.report.plots import look
from afdslib.report.students import steps_saved
from afdslib.report.tables import Table, Text, place
from afdslib.studies import profiles, results, statistics
from afdslib.studies.profile import SCALES
from afdslib.studies.protocol import AFDS, Method, label_of, protocol
from afdslib.studies.statistics import PRIMARY_BUDGET, at

__all__ = [
    "NOT_SUPPORTED", "SUPPORTED", "UNDECIDED", "UNTESTED", "VERDICTS", "Claim", "Found", "about", "claims", "judge",
    "matters", "of_interval", "rules_text", "verdict_table",
]  # fmt: skip

VERDICTS = SUPPORTED, NOT_SUPPORTED, UNDECIDED, UNTESTED = "supported", "not supported", "undecided", "untested"

# With fewer seeds (of AFDS; of students, which are trained for hours each) or repeats nothing is concluded. [ours]
SEEDS, STUDENT_SEEDS, REPEATS = 5, 3, 5
TOLERANCE = 0.02  # by which measured MACs may exceed a budget, which is met on training images [ours]
ALL = f"all planned seeds, less those in which a network was lost; at least {SEEDS}"
TEST, VALIDATION = "test_accuracy", "validation_accuracy"


@dataclass(frozen=True)
class Found:
    """What a rule found: a verdict, a sentence with the numbers behind it, and the files read, below data/results."""

    verdict: str
    why: str
    files: tuple[str, ...] = ()


Judged = Iterator[Found]
"""What a rule yields: from each file that has the rows, the best one first. Only the first counts."""


@dataclass(frozen=True)
class Claim:
    """One clause."""

    number: int  # in the report
    title: str  # a few words
    text: str  # what is claimed
    source: str  # who says so: "[paper]", "[ours]", "[AT's paper]" and so on
    rule: str  # in words, as `judge` follows it
    judge: Callable[[], Found]  # from the result files


def of_interval(difference: Number | None, *, margin: float = 0.0, seeds: int = SEEDS) -> str:
    """The verdict on "larger than 0" or "larger by a margin" from a paired difference with its 95 % interval.

    With a margin (in the difference's unit) the interval must lie above 0 and reach the margin; so its middle is more
    than half the margin. With fewer seeds nothing is concluded; None: nothing was measured.
    """
    if difference is None:
        return UNTESTED
    if difference.n < seeds or math.isnan(difference.low):
        return UNDECIDED
    if difference.high < margin:
        return NOT_SUPPORTED
    return SUPPORTED if difference.low > 0 else UNDECIDED


def matters(tried: Mapping[float, float], spread: float | None, *, seeds: int) -> str:
    """The verdict on "small changes matter": what a step away from the best weight costs, against the seeds.

    Args:
        tried: weight -> validation accuracy, NaN for a trial that diverged, which counts as 0.
        spread: largest minus smallest accuracy over seeds at one weight; None where nothing was measured.
    """
    if len(tried) < 3 or spread is None:
        return UNTESTED
    if seeds < STUDENT_SEEDS:
        return UNDECIDED
    beside, worst = _costs(tried)
    if beside > spread:
        return SUPPORTED
    return NOT_SUPPORTED if worst <= spread else UNDECIDED


def _costs(tried: Mapping[float, float]) -> tuple[float, float]:
    """What the worse neighbour of the best weight loses, and the worst of all weights."""
    values = [0.0 if math.isnan(tried[w]) else tried[w] for w in sorted(tried)]
    best = values.index(max(values))
    return max(values) - min(values[max(0, best - 1) : best + 2]), max(values) - min(values)


def _tables(files: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Those of the committed tables that exist, with their addresses."""
    return ((file, table) for file in files if not (table := results.named(file)).empty)


def _with_seeds(number: Number) -> str:
    return f"{number}, {statistics.paired_seeds(number.n)}"


def _comparisons(profile: str, target: str) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """(file, table, rival) of every comparison that has AFDS and a competitor at 10x."""
    for file, table in _tables([f"{profile}/{scale}/comparison-{target}" for scale in SCALES[::-1]]):
        here = at(table, PRIMARY_BUDGET)
        if (here.role == "competitor").any() and (here.method == AFDS.key).any():
            rules = _protocol(file)
            yield file, table, statistics.rival(table, seeds=rules.seeds[: rules.rest])


def _protocol(file: str):
    return protocol(profiles.get(*file.split("/")[:2]))


def _judged(file: str, number: Number, why: str, methods: Sequence[str], *, margin: float = 0.0) -> Found:
    """The verdict of a comparison that has all of the protocol's seeds but for those that a method lost at 10x.

    A verdict on the way would depend on when one looks.
    """
    planned = max(SEEDS, len(set(_protocol(file).seeds) - set(_missing(file, methods).seed)))
    return Found(of_interval(number, margin=margin, seeds=planned), why, (file,))


def _missing(file: str, methods: Sequence[str]) -> pd.DataFrame:
    """The points at 10x without a network."""
    table = results.named(f"{file}/missing")
    return at(table[table.method.isin(methods)], PRIMARY_BUDGET)


def _lost(file: str, methods: Sequence[str], *, target: str | None = None) -> str:
    """A sentence on seeds that have no network at 10x, such as those that diverged: they are in no pair."""
    here = _missing(file, methods)
    here = here if target is None else here[here.target == target]
    lost = [f"{_label(str(method))} {len(rows)}" for method, rows in here.groupby("method", sort=False)]
    return f" Seeds without a network at 10x: {', '.join(lost)}." if lost else ""


def _label(method: str) -> str:
    return Method.parse(method).label if "+" in method else label_of(method)


def reaches_budget(profile: str, target: str) -> Judged:
    """Whether AFDS's measured MACs at 10x are a tenth of the dense network's."""
    limit = 100 * PRIMARY_BUDGET * (1 + TOLERANCE)
    for file, table, _ in _comparisons(profile, target):
        ours = at(table[table.method == AFDS.key], PRIMARY_BUDGET)
        share = numbers.of_interval(statistics.interval(ours.macs.tolist()), "%")
        spare = Number(limit - share.value, low=limit - share.high, high=limit - share.low, n=share.n)
        why = f"AFDS costs {share} of the dense network's MACs on test images, {share.n} seeds."
        yield _judged(file, spare, why, [AFDS.key])


def beats_rival(profile: str, target: str, *, margin: float = 0.0) -> Judged:
    """AFDS minus its rival at 10x, in points of test accuracy."""
    for file, table, rival in _comparisons(profile, target):
        both = [AFDS.key, rival]
        if number := _difference(at(table, PRIMARY_BUDGET), both):
            why = f"AFDS minus the best competitor, {_label(rival)}, on {place(target)}: {_with_seeds(number)}."
            yield _judged(file, number, why + _lost(file, both), both, margin=margin)


def _difference(here: pd.DataFrame, methods: Sequence[str]) -> Number | None:
    """The first method minus the second, in points; None where they share no seed."""
    return numbers.minus(*(here[here.method == method] for method in methods))


def saves_more(profile: str, target: str) -> Judged:
    """The MACs that AFDS and its most frugal competitor need for the same accuracy, paired by seed.

    That accuracy is the rival's when unpruned, less one point. The most frugal is the competitor that needs the fewest
    MACs for it on validation images, among those that have as many seeds as the rival.
    """
    for file, table, rival in _comparisons(profile, target):
        seeds = table[table.role == "competitor"].groupby("method", sort=False).seed.nunique()
        needed = {m: _shares(table, m, rival, VALIDATION) for m in seeds.index[seeds >= seeds[rival]]}
        means = {method: sum(shares.values()) / len(shares) for method, shares in needed.items() if shares}
        if not means:
            continue
        frugal = min(means, key=lambda method: means[method])
        one, other = (_shares(table, method, rival, TEST) for method in (frugal, AFDS.key))
        if not set(one) & set(other):
            continue
        number = _saved(one, other, "% of the dense MACs")
        why = f"MACs that {_label(frugal)} needs minus those that AFDS needs: {_with_seeds(number)}."
        if frugal != rival and (shares := _shares(table, rival, rival, TEST)):
            why += f" {_label(rival)}, the best competitor at 10x, minus AFDS: {_saved(shares, other, '%')}."
        both = [AFDS.key, frugal]
        yield _judged(file, number, why + _lost(file, both), both)


def _saved(one: Mapping[int, float], other: Mapping[int, float], unit: str) -> Number:
    return numbers.of_interval(statistics.paired(one, other).difference, unit, scale=100, signed=True)


def _shares(table: pd.DataFrame, method: str, rival: str, value: str) -> dict[int, float]:
    """By seed, the share of MACs at which a method has the rival's unpruned accuracy less one point; else 1."""
    dense = statistics.by_seed(table[(table.method == rival) & (table.budget == 1)], value)
    shares = {}
    for seed, rows in table[table.method == method].groupby("seed"):
        curve = {budget: (macs, accuracy) for budget, macs, accuracy in rows[["budget", "macs", value]].to_numpy()}
        if 1.0 in curve and seed in dense:
            share = statistics.macs_within(curve, dense=dense[seed])
            shares[int(seed)] = 1.0 if share is None else share
    return shares


def same_selection(profile: str, target: str, other: str) -> Judged:
    """AFD minus another regulariser under the same AFS at 10x, in points of test accuracy."""
    both = ["afd", other]
    for file, table in _tables([f"{profile}/{scale}/sweep" for scale in SCALES[::-1]]):
        here = at(table[table.target == target], PRIMARY_BUDGET)
        if number := _difference(here, both):
            why = f"AFD minus {label_of(other)}, both with AFS, on {place(target)}: {_with_seeds(number)}."
            yield Found(of_interval(number), why + _lost(file, both, target=target), (file,))


def faster() -> Judged:
    """Measured time of the network that AFDS pruned by its own masks, against the dense one.

    Each in its fastest runtime, for each file, device, number of threads and batch size.
    """
    table = speed.benchmarks()
    table = table[(table.network == "resnet101-10x") & (table["size"] == 224) & (table.width == 1)]
    own = table.file[table.note.fillna("").str.startswith("masks of")]  # and not random ones
    pairs = []
    for _, here in speed.best(table[table.file.isin(own)]).groupby(["file", "device", "threads", "batch"]):
        rows = {row.variant: row for row in here.itertuples()}
        if {"dense", "compact"} <= set(rows):
            pairs.append((rows["dense"], rows["compact"]))
    if not pairs:
        return
    times = "; ".join(
        f"batch {dense.batch}: {Number(small.faster)}x as fast, {Number(small.median_ms)} against "
        f"{Number(dense.median_ms)} ms" for dense, small in pairs
    )
    accuracy = speed.trained_accuracies().get(10, "unknown")
    why = f"Test accuracy of the cut network, after a short training: {accuracy}. On {pairs[0][0].device}, medians, "
    verdict = UNDECIDED
    if min(int(row.repeats) for pair in pairs for row in pair) >= REPEATS:
        if any(small.q1_ms > dense.q3_ms for dense, small in pairs):
            verdict = NOT_SUPPORTED
        elif all(small.q3_ms < dense.q1_ms for dense, small in pairs):
            verdict = SUPPORTED
    yield Found(verdict, f"{why}{times}.", tuple(dict.fromkeys(str(dense.file) for dense, _ in pairs)))


def _students(files: Sequence[str], pair: Sequence[str], *methods: str) -> Iterator[tuple[str, list[pd.DataFrame]]]:
    """(file, rows of each way of training) of the tables in which all of a (teacher, student) share a seed."""
    for file, table in _tables(files):
        rows = table[(table.student == pair[1]) & ((table.teacher == pair[0]) | (table.method == "alone"))]
        by_method = [rows[rows.method == method] for method in methods]
        if set.intersection(*(set(here.seed) for here in by_method)):
            yield file, by_method


def student_gains(files: Sequence[str], pair: Sequence[str], methods: Sequence[str], *, margin: float = 0.0) -> Judged:
    """One way of training a student of a (teacher, student) minus another, in points of test accuracy."""
    names = " minus ".join(look(method).label for method in methods)
    for file, by_method in _students(files, pair, *methods):
        if number := numbers.minus(*by_method):
            why = f"{names}, {pair[0]} to {pair[1]}: {_with_seeds(number)}."
            yield Found(of_interval(number, margin=margin, seeds=STUDENT_SEEDS), why, (file,))


def converges_faster(files: Sequence[str], pair: Sequence[str], *, method: str = "at") -> Judged:
    """Steps until 90 % of the plain student's final accuracy on training images: alone minus with the teacher."""
    names = f"{look('alone').label.capitalize()} minus {look(method).label}"
    for file, by_method in _students(files, pair, "alone", method):
        stored = f"{file.split('/')[0]}/curves.csv"
        every = dict(tuple(numbers.read(stored).groupby("run")))
        if lost := [run for rows in by_method for run in rows.run if run not in every]:
            raise AFDSError(f"{stored} has no row of run {lost[0]}; publish its study again")
        number = steps_saved(*({int(r.seed): every[r.run] for r in rows.itertuples()} for rows in by_method))
        why = f"{names}, {pair[0]} to {pair[1]}: {_with_seeds(number)}."
        yield Found(of_interval(number, seeds=STUDENT_SEEDS), why, (file,))


def weights_matter(files: Sequence[str], pair: Sequence[str], *, method: str = "at") -> Judged:
    """What a factor of ten beside the best weight costs on validation images, against the spread between seeds."""
    for file, (students,) in _students(files, pair, method):
        for trials, table in _tables([f"{file}/trials"]):
            rows = table[table.method == method]
            tried = dict(zip(rows.strength.astype(float), rows.validation_accuracy.astype(float), strict=True))
            if len(tried) < 3:
                continue
            spread, seeds = float(np.ptp(students.test_accuracy)), students.seed.nunique()
            beside, worst = (Number(100 * cost, "points") for cost in _costs(tried))
            why = (
                f"The worse neighbour of the best weight costs {beside}, the worst of {len(tried)} weights {worst}; "
                f"{seeds} seeds at one weight differ by {Number(100 * spread, 'points')}."
            )
            yield Found(matters(tried, spread, seeds=seeds), why, (trials, file))


_TARGET, _PAIR = " on {place} in the profile {profile}", "students {pair[1]} of a teacher {pair[0]}"
_RIVAL = f"AFDS and a competitor at 10x{_TARGET}"
_SEEDS, _STUDENTS = f"at least {SEEDS} seeds", f"at least {STUDENT_SEEDS} seeds"

RULES: dict[str, tuple[Callable[..., Judged], str, str]] = {
    "reaches_budget": (reaches_budget, ALL, _RIVAL),
    "beats_rival": (beats_rival, ALL, _RIVAL),
    "saves_more": (saves_more, ALL, f"AFDS and a competitor from 1x to 10x{_TARGET}"),
    "same_selection": (same_selection, _SEEDS, f"AFD and {{other}} at 10x{_TARGET}"),
    "faster": (faster, f"at least {REPEATS} repeats", "times of a ResNet-101 that AFDS pruned 10x by its own masks"),
    "student_gains": (student_gains, _STUDENTS, f"{_PAIR}, {{labels}}"),
    "converges_faster": (converges_faster, _STUDENTS, f"{_PAIR}, AT and alone"),
    "weights_matter": (weights_matter, _STUDENTS, f"three weights of AT and {_PAIR}"),
}
"""Function by name, what it needs before it concludes anything, and what no file has where it yields nothing."""


@functools.cache
def _written() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("claims.toml").read_text("utf-8"))


def _claim(number: int, row: Mapping[str, Any]) -> Claim:
    """A claim as it is written: its rule in words, and the function with its arguments."""
    arguments, quoted = dict(row["judge"]), row.get("quoted", ())
    function, least, missing = RULES[arguments.pop("by")]
    if "pair" in arguments:
        files = [f"{p}/{s}/{row.get('part', 'attention')}" for p in ("paper", "imagenet32") for s in SCALES[::-1]]
        arguments["files"] = row.get("files", files)
    if quoted:
        arguments["margin"] = round(abs(float(quoted[0]) - float(quoted[1])), 2)
    if "sign" in row:
        rule = f"The sign of {row['sign']}; {least}. {row.get('more', '')}".strip()
    elif "size" in row:
        rule = f"The size of {row['size']}, {arguments['margin']:g} points; {least}."
    else:
        rule = row["rule"].format(all=ALL, tolerance=f"{TOLERANCE:.0%}", repeats=REPEATS, seeds=STUDENT_SEEDS)
    said = {"labels": " and ".join(look(method).label for method in arguments.get("methods", ()))}
    said["place"] = place(arguments.get("target", ""))
    none = Found(UNTESTED, f"No committed result has {missing.format(**arguments, **said)}.")
    text = row["text"].format(*quoted)
    return Claim(number, row["title"], text, row["source"], rule, lambda: next(function(**arguments), none))


def claims() -> list[Claim]:
    """All claims, in the report's order: the paper's, ours about AFDS, then those of AT and of NST."""
    return [_claim(number, row) for number, row in enumerate(_written()["afds"] + _written()["students"], 1)]


def judge() -> dict[int, Found]:
    """The verdict of every claim, by its number; AFDSError for a damaged result file."""
    return {claim.number: claim.judge() for claim in claims()}


def rules_text() -> Text:
    """The rules, then the claims with who makes them and the rule of each: to be shown before any number."""
    lines = [f"{c.number}. **{c.title}** {c.source}: {c.text} *Rule:* {c.rule}" for c in claims()]
    return Text(f"{_written()['general'].strip()}\n\n" + "\n".join(lines))


def about(source: str) -> Table:
    """The claims about AFDS from one source, "[paper]" or "[ours]", each with its verdict and the numbers behind it."""
    those = [claim for claim in claims()[: len(_written()["afds"])] if claim.source == source]
    rows = [(f"{c.number}. {c.title}", f"**{(found := c.judge()).verdict}**", found.why) for c in those]
    return Table([f"claim {source}", "verdict", "what was found"], rows, numbers=False)


def verdict_table() -> Table:
    """Every claim with its verdict, the numbers behind it and the files these were read from."""
    rows = []
    for claim in claims():
        found = claim.judge()
        files = ", ".join(f"`{file}`" for file in found.files) or "none"
        rows.append((claim.number, claim.title, f"**{found.verdict}**", found.why, files))
    return Table(["no.", "claim", "verdict", "what was found", "file below data/results"], rows, numbers=False)
