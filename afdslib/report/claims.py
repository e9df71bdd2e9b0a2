"""The claims, one per clause, each with a rule; verdicts come from result files.

The rules were written before any result that can decide them; where one saw earlier numbers, its claim says so.
A rule is a function of the committed CSVs below data/results/ and of nothing else: no verdict is typed in. Verdicts:

    [Re]            replicated: the whole 95 % interval speaks for the claim
    [¬Re]           not replicated: the whole interval speaks against it, or leaves out the margin it names
    [inconclusive]  the interval holds both, or there are too few seeds
    [?]             not tested: no row of the network and data set that the claim names

Differences are paired by seed. The rival is the competitor that is best on validation images at 10x (`statistics`).
Where a study is committed with two budgets, the larger one that has the rows counts.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from afdslib.report import numbers, speed
from afdslib.report.numbers import Number
from afdslib.report.plots import look
from afdslib.report.students import steps_saved
from afdslib.report.tables import Table, Text, at, bullets
from afdslib.studies import profiles, statistics
from afdslib.studies.protocol import Method, label_of, protocol
from afdslib.studies.statistics import PRIMARY_BUDGET

__all__ = [
    "INCONCLUSIVE", "NOT_REPLICATED", "REPLICATED", "UNTESTED", "VERDICTS", "Claim", "Found", "claims",
    "conclusion_text", "judge", "matters", "of_interval", "of_times", "rules_text", "verdict_table", "verdicts_text",
]  # fmt: skip

REPLICATED, NOT_REPLICATED, INCONCLUSIVE, UNTESTED = "[Re]", "[¬Re]", "[inconclusive]", "[?]"
VERDICTS = {
    REPLICATED: "replicated", NOT_REPLICATED: "not replicated", INCONCLUSIVE: "inconclusive", UNTESTED: "not tested"
}  # fmt: skip

SEEDS = 5
"""Of a sweep or a comparison of AFDS: with fewer, nothing is concluded. [ours]"""
STUDENT_SEEDS = 3
"""Of students, which are trained for hours each; Student's interval is as wide as so few seeds deserve. [ours]"""
REPEATS = 5
"""Of a measured time. [ours]"""
TOLERANCE = 0.02
"""By which measured MACs may exceed a budget, which is met on training images. [ours]"""

AFDS = "afd+afs"
BUDGETS = ("standard", "quick")


@dataclass(frozen=True)
class Found:
    """What a rule found.

    Attributes:
        verdict: of `VERDICTS`.
        why: one sentence with the numbers behind it.
        files: result files read, below data/results.
    """

    verdict: str
    why: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One clause.

    Attributes:
        number: in the report.
        title: a few words.
        text: what is claimed.
        source: tag of `method.md`: who says so.
        rule: in words, as `judge` follows it.
        judge: from the result files.
    """

    number: int
    title: str
    text: str
    source: str
    rule: str
    judge: Callable[[], Found]


# --------------------------------------------------------------------------------------------------------- pure rules


def of_interval(difference: Number | None, *, margin: float = 0.0, seeds: int = SEEDS) -> str:
    """The verdict on "larger than 0" or "larger by a margin" from a paired difference with its 95 % interval.

    With a margin the interval must lie above 0 and reach the margin; so its middle is more than half the margin.

    Args:
        difference: in the margin's unit; None where nothing was measured.
        margin: the claimed size; 0 for a claim about the sign.
        seeds: with fewer, nothing is concluded.
    """
    if difference is None:
        return UNTESTED
    if difference.n < seeds or math.isnan(difference.low):
        return INCONCLUSIVE
    if difference.high < margin:
        return NOT_REPLICATED
    return REPLICATED if difference.low > 0 else INCONCLUSIVE


def of_times(table: pd.DataFrame, *, repeats: int = REPEATS) -> str:
    """The verdict on "faster": the network and its dense original, each in the runtime in which it is fastest.

    Args:
        table: rows of one network with columns file, device, threads, batch, variant ("dense" or "compact"), runtime,
            q1_ms, median_ms, q3_ms, repeats.
        repeats: with fewer, nothing is concluded.
    """
    pairs = _timed(table)
    if not pairs:
        return UNTESTED
    if min(int(row.repeats) for pair in pairs for row in pair) < repeats:
        return INCONCLUSIVE
    if any(small.q1_ms > dense.q3_ms for dense, small in pairs):
        return NOT_REPLICATED
    return REPLICATED if all(small.q3_ms < dense.q1_ms for dense, small in pairs) else INCONCLUSIVE


def matters(tried: Mapping[float, float], spread: float | None, *, seeds: int, least: int = STUDENT_SEEDS) -> str:
    """The verdict on "small changes matter": what a step away from the best weight costs, against the seeds.

    Args:
        tried: weight -> validation accuracy, NaN for a trial that diverged, which counts as 0.
        spread: largest minus smallest accuracy over seeds at one weight; None where nothing was measured.
        seeds: behind the spread.
        least: with fewer seeds, nothing is concluded.
    """
    if len(tried) < 3 or spread is None:
        return UNTESTED
    if seeds < least:
        return INCONCLUSIVE
    beside, worst = _costs(tried)
    if beside > spread:
        return REPLICATED
    return NOT_REPLICATED if worst <= spread else INCONCLUSIVE


def _costs(tried: Mapping[float, float]) -> tuple[float, float]:
    """What the worse neighbour of the best weight loses, and the worst of all weights."""
    values = [0.0 if math.isnan(tried[w]) else tried[w] for w in sorted(tried)]
    best = values.index(max(values))
    return max(values) - min(values[max(0, best - 1) : best + 2]), max(values) - min(values)


# ------------------------------------------------------------------------------------ comparisons and sweeps, by file


def _existing(names: Iterable[str]) -> list[str]:
    return [name for name in names if numbers.exists(name)]


def _untested(what: str) -> Found:
    return Found(UNTESTED, f"No committed result file has {what}.")


def _no_comparison(profile: str, target: str, budgets: str = "at 10x") -> Found:
    return _untested(f"AFDS and a competitor {budgets} on {target} in the profile {profile}")


def _with_seeds(number: Number) -> str:
    return f"{number}, {statistics.paired_seeds(number.n)}"


def _comparisons(profile: str, target: str) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """(file, table, rival) of every comparison that has AFDS and a competitor at 10x."""
    for file in _existing(f"{profile}/{budget}/comparison-{target}" for budget in BUDGETS):
        table = numbers.read(file)
        here = at(table, PRIMARY_BUDGET)
        if (here.role == "competitor").any() and (here.method == AFDS).any():
            rules = _protocol(file)
            yield file, table, statistics.rival(table, seeds=rules.seeds[: rules.rest])


def _protocol(file: str):
    profile, budget = file.split("/")[:2]
    return protocol(profiles.get(profile, budget))


def _planned(file: str, methods: Sequence[str]) -> int:
    """Seeds that a comparison must have before it is judged: the protocol's, but for those that a method lost at 10x.

    A verdict on the way would depend on when one looks.
    """
    return max(SEEDS, len(set(_protocol(file).seeds) - set(_missing(file, methods).seed)))


def _missing(file: str, methods: Sequence[str]) -> pd.DataFrame:
    """Rows at 10x of the table of missing points beside a file; none where there is no such table."""
    missing = f"{file}/missing"
    if not _existing([missing]):
        return pd.DataFrame(columns=["target", "method", "seed"])
    table = numbers.read(missing)
    return at(table[table.method.isin(methods)], PRIMARY_BUDGET)


def _lost(file: str, methods: Sequence[str], *, target: str | None = None) -> str:
    """A sentence on seeds that have no network at 10x, such as those that diverged: they are in no pair."""
    here = _missing(file, methods)
    here = here if target is None else here[here.target == target]
    lost = [f"{_label(str(method))} {len(rows)}" for method, rows in here.groupby("method", sort=False)]
    return f" Seeds without a network at 10x: {', '.join(lost)}." if lost else ""


def _label(method: str) -> str:
    return Method.parse(method).label if "+" in method else label_of(method)


def reaches_budget(profile: str, target: str) -> Found:
    """Whether AFDS's measured MACs at 10x are a tenth of the dense network's."""
    limit = 100 * PRIMARY_BUDGET * (1 + TOLERANCE)
    for file, _, _ in _comparisons(profile, target):
        share = numbers.mean(file, "macs", unit="%", method=AFDS, budget=PRIMARY_BUDGET)
        spare = Number(limit - share.value, low=limit - share.high, high=limit - share.low, n=share.n)
        why = f"AFDS costs {share} of the dense network's MACs on test images, {share.n} seeds."
        return Found(of_interval(spare, seeds=_planned(file, [AFDS])), why, (file,))
    return _no_comparison(profile, target)


def beats_rival(profile: str, target: str, *, margin: float = 0.0) -> Found:
    """AFDS minus its rival at 10x, in points of test accuracy."""
    for file, table, rival in _comparisons(profile, target):
        seeds = at(table, PRIMARY_BUDGET).groupby("method").seed
        if not set(seeds.get_group(AFDS)) & set(seeds.get_group(rival)):
            continue
        one, other = {"method": AFDS}, {"method": rival}
        found = numbers.difference(file, "test_accuracy", one, other, budget=PRIMARY_BUDGET)
        why = f"AFDS minus its rival, {_label(rival)}, at 10x on {target}: {_with_seeds(found)}."
        why += _lost(file, [AFDS, rival])
        return Found(of_interval(found, margin=margin, seeds=_planned(file, [AFDS, rival])), why, (file,))
    return _no_comparison(profile, target)


def saves_more(profile: str, target: str) -> Found:
    """The MACs that AFDS and its most frugal competitor need for the same accuracy, paired by seed.

    That accuracy is the rival's when unpruned, less one point. The most frugal is the competitor that needs the fewest
    MACs for it on validation images, among those that have as many seeds as the rival.
    """
    for file, table, rival in _comparisons(profile, target):
        seeds = table[table.role == "competitor"].groupby("method", sort=False).seed.nunique()
        needed = {m: _shares(table, m, rival, "validation_accuracy") for m in seeds.index[seeds >= seeds[rival]]}
        needed = {method: shares for method, shares in needed.items() if shares}
        if not needed:
            continue
        frugal = min(needed, key=lambda method: sum(needed[method].values()) / len(needed[method]))
        one, other = (_shares(table, method, rival, "test_accuracy") for method in (frugal, AFDS))
        if not set(one) & set(other):
            continue
        found = _saved(one, other, "% of the dense MACs")
        why = f"MACs that {_label(frugal)} needs minus those that AFDS needs: {_with_seeds(found)}."
        if frugal != rival and (theirs := _shares(table, rival, rival, "test_accuracy")):
            why += f" {_label(rival)}, the rival at 10x, minus AFDS: {_saved(theirs, other, '%')}."
        why += _lost(file, [AFDS, frugal])
        return Found(of_interval(found, seeds=_planned(file, [AFDS, frugal])), why, (file,))
    return _no_comparison(profile, target, "from 1x to 10x")


def _saved(one: Mapping[int, float], other: Mapping[int, float], unit: str) -> Number:
    difference = statistics.paired(one, other).difference
    return numbers.of_interval(difference, unit, scale=100, signed=True)


def _shares(table: pd.DataFrame, method: str, rival: str, value: str) -> dict[int, float]:
    """By seed, the share of MACs at which a method has the rival's unpruned accuracy less one point; else 1."""
    dense = statistics.by_seed(table[(table.method == rival) & (table.budget == 1)], value)
    found = {}
    for seed, rows in table[table.method == method].groupby("seed"):
        curve = {float(r.budget): (float(r.macs), float(getattr(r, value))) for r in rows.itertuples()}
        if 1.0 in curve and seed in dense:
            share = statistics.macs_within(curve, dense=dense[seed])
            found[int(seed)] = 1.0 if share is None else share
    return found


def same_selection(profile: str, target: str, other: str, *, budget: float = PRIMARY_BUDGET) -> Found:
    """AFD minus another regulariser under the same AFS, in points of test accuracy."""
    for file in _existing(f"{profile}/{b}/sweep" for b in BUDGETS):
        table = numbers.read(file)
        here = at(table[table.target == target], budget)
        seeds = {m: set(here[here.method == m].seed) for m in ("afd", other)}
        if not seeds["afd"] & seeds[other]:
            continue
        one, two = {"method": "afd"}, {"method": other}
        found = numbers.difference(file, "test_accuracy", one, two, target=target, budget=budget)
        why = f"AFD minus {label_of(other)}, both with AFS, at {1 / budget:g}x on {target}: {_with_seeds(found)}."
        why += _lost(file, ["afd", other], target=target)
        return Found(of_interval(found), why, (file,))
    return _untested(f"AFD and {other} at 10x on {target} in the profile {profile}")


# ------------------------------------------------------------------------------------------------------- times, by file


def _timed(table: pd.DataFrame) -> list[tuple[Any, Any]]:
    """(dense, compact), each in its fastest runtime, for each file, device, number of threads and batch size."""
    found = []
    for _, here in speed.best(table).groupby(["file", "device", "threads", "batch"]):
        rows = {row.variant: row for row in here.itertuples()}
        if {"dense", "compact"} <= set(rows):
            found.append((rows["dense"], rows["compact"]))
    return found


def faster(times: int = 10) -> Found:
    """Measured time of the network that AFDS pruned by its own masks, against the dense one."""
    table = speed.benchmarks()
    table = table[(table.network == f"resnet101-{times}x") & (table["size"] == 224) & (table.width == 1)]
    own = table.file[table.note.fillna("").str.startswith("masks of")]  # and not random ones
    table = table[table.file.isin(own)]
    pairs = _timed(table)
    if not pairs:
        return _untested(
            f"times of a ResNet-101 that AFDS pruned {times}x by its own masks (smaller networks: Measured time)"
        )
    parts = [
        f"batch {dense.batch} on {dense.device}: {Number(small.faster)}x as fast, {_milliseconds(small)} in "
        f"{small.runtime} against {_milliseconds(dense)} in {dense.runtime}"
        for dense, small in pairs
    ]
    why = f"Medians and quartiles, {'; '.join(parts)}. What torch-pruning makes of it is in the same file."
    if accuracy := speed.trained_accuracies().get(times):
        why += f" Its test accuracy after a short training: {accuracy}."
    return Found(of_times(table), why, tuple(dict.fromkeys(str(dense.file) for dense, _ in pairs)))


def _milliseconds(row: Any) -> str:
    return f"{row.median_ms:.1f} [{row.q1_ms:.1f}, {row.q3_ms:.1f}] ms"


# ---------------------------------------------------------------------------------------------------- students, by file

Pair = tuple[str, str]
"""(teacher, student)."""


def _students(files: Sequence[str], pair: Pair, methods: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """(file, seeds) of every table of students in which all methods have a seed in common; "alone" has no teacher."""
    teacher, student = pair
    for file in _existing(files):
        table = numbers.read(file)
        rows = table[(table.student == student) & ((table.teacher == teacher) | (table.method == "alone"))]
        if seeds := set.intersection(*(set(rows[rows.method == m].seed) for m in methods)):
            yield file, sorted(map(int, seeds))


def _row(pair: Pair, method: str) -> dict[str, str]:
    return {"method": method, "student": pair[1], "teacher": "" if method == "alone" else pair[0]}


def student_gains(
    files: Sequence[str], pair: Pair, methods: tuple[str, str], *, margin: float = 0.0, seeds: int = STUDENT_SEEDS
) -> Found:
    """One way of training a student minus another, in points of test accuracy.

    Args:
        files: tables of students; the first one that has the rows counts.
        pair: (teacher, student).
        methods: minuend and subtrahend; "alone" has no teacher.
        margin: the claimed size.
        seeds: with fewer, nothing is concluded.
    """
    one, other = (look(method).label for method in methods)
    for file, _ in _students(files, pair, methods):
        found = numbers.difference(file, "test_accuracy", *(_row(pair, method) for method in methods))
        why = f"{one} minus {other}, {pair[0]} to {pair[1]}: {_with_seeds(found)}."
        return Found(of_interval(found, margin=margin, seeds=seeds), why, (file,))
    return _untested(f"students {pair[1]} of a teacher {pair[0]}, {one} and {other}")


def converges_faster(files: Sequence[str], pair: Pair, *, method: str = "at", share: float = 0.9) -> Found:
    """Steps until a share of the plain student's final accuracy on training images: alone minus with the teacher."""
    label = look(method).label
    for file, seeds in _students(files, pair, ("alone", method)):
        alone, taught = (
            {seed: _curve(file, **_row(pair, name), seed=seed) for seed in seeds} for name in ("alone", method)
        )
        found = steps_saved(alone, taught, share=share)
        why = f"{look('alone').label.capitalize()} minus {label}, {pair[0]} to {pair[1]}: {_with_seeds(found)}."
        return Found(of_interval(found, seeds=STUDENT_SEEDS), why, (file,))
    return _untested(f"students {pair[1]} of a teacher {pair[0]}, {label} and alone")


def _curve(file: str, **row: Any) -> pd.DataFrame:
    """The learning curve of a row's run."""
    run = numbers.rows(file, "run", **row).run.iloc[0]
    return numbers.rows(f"{file.split('/')[0]}/curves.csv", "train_accuracy", run=run)


def weights_matter(files: Sequence[str], pair: Pair, *, method: str = "at") -> Found:
    """What a factor of ten beside the best weight costs on validation images, against the spread between seeds."""
    label = look(method).label
    for file, seeds in _students(files, pair, (method,)):
        trials = f"{file}/trials"
        if not _existing([trials]):
            continue
        table = numbers.read(trials)
        rows = table[table.method == method]
        tried = dict(zip(rows.strength.astype(float), rows.validation_accuracy.astype(float), strict=True))
        if len(tried) < 3:
            continue
        accuracy = numbers.rows(file, "test_accuracy", **_row(pair, method)).test_accuracy
        spread = float(accuracy.max() - accuracy.min())
        beside, worst = (Number(100 * cost, "points") for cost in _costs(tried))
        why = (
            f"The worse neighbour of the best weight costs {beside}, the worst of {len(tried)} weights {worst}; "
            f"{len(seeds)} seeds at one weight differ by {Number(100 * spread, 'points')}."
        )
        return Found(matters(tried, spread, seeds=len(seeds)), why, (trials, file))
    return _untested(f"three weights of {label} and students {pair[1]} of a teacher {pair[0]}")


# ---------------------------------------------------------------------------------------------------------- the claims

ALL = f"all seeds of the protocol that the two have not lost, at least {SEEDS}"
"""Of a comparison, which is judged when it is finished."""

RULES: dict[str, tuple[Callable[..., Found], str]] = {
    "reaches_budget": (reaches_budget, ALL),
    "beats_rival": (beats_rival, ALL),
    "saves_more": (saves_more, ALL),
    "same_selection": (same_selection, f"at least {SEEDS} seeds"),
    "faster": (faster, f"at least {REPEATS} repeats"),
    "student_gains": (student_gains, f"at least {STUDENT_SEEDS} seeds"),
    "converges_faster": (converges_faster, f"at least {STUDENT_SEEDS} seeds"),
    "weights_matter": (weights_matter, f"at least {STUDENT_SEEDS} seeds"),
}
"""Function by name, and what it needs before it concludes anything."""


@functools.cache
def _written() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("claims.toml").read_text("utf-8"))


def _claim(number: int, row: Mapping[str, Any]) -> Claim:
    """A claim as it is written: its rule in words, and the function with its arguments."""
    arguments = dict(row["judge"])
    function, least = RULES[arguments.pop("by")]
    if "files" in row:
        arguments["files"] = row["files"]
    if quoted := row.get("quoted"):
        arguments["margin"] = round(abs(float(quoted[0]) - float(quoted[1])), 2)
    if "sign" in row:
        rule = f"The sign of {row['sign']}; {least}. {row.get('more', '')}".strip()
    elif "size" in row:
        rule = f"The size of {row['size']}, {arguments['margin']:g} points; {least}."
    else:
        facts = {"all": ALL, "tolerance": f"{TOLERANCE:.0%}", "repeats": REPEATS, "seeds": STUDENT_SEEDS}
        rule = row["rule"].format(**facts)
    text = row["text"].format(*(quoted or ()))
    return Claim(number, row["title"], text, row["source"], rule, partial(function, **arguments))


def claims() -> list[Claim]:
    """All claims, in the report's order: the paper's, ours at 32 px, then those of AT and of NST."""
    return [_claim(number, row) for number, row in enumerate(_written()["afds"] + _written()["students"], 1)]


def judge(made: Sequence[Claim] | None = None) -> dict[int, Found]:
    """The verdict of every claim, by its number.

    Raises:
        AFDSError: a damaged result file.
    """
    return {claim.number: claim.judge() for claim in (claims() if made is None else made)}


# ----------------------------------------------------------------------------------------------------------- rendering


def rules_text() -> Text:
    """The rules, then the claims with who makes them and the rule of each: to be shown before any number."""
    lines = [f"{c.number}. **{c.title}** {c.source}: {c.text} *Rule:* {c.rule}" for c in claims()]
    return Text(f"{_written()['general'].strip()}\n\n" + "\n".join(lines))


def verdict_table() -> Table:
    """Claims with their verdicts, the numbers behind them and the files these were read from."""
    found = judge()
    rows = [
        (c.number, c.title, f"**{found[c.number].verdict}**", found[c.number].why,
         ", ".join(f"`{file}`" for file in found[c.number].files) or "none")
        for c in claims()
    ]  # fmt: skip
    return Table(["no.", "claim", "verdict", "what was found", "file below data/results"], rows, numbers=False)


def conclusion_text() -> Text:
    """What to think: a sentence for each of the leading claims, by its verdict, where the claim has one for it."""
    lines = {}
    for claim, row in zip(claims(), _written()["afds"], strict=False):
        if sentence := row.get("conclusion", {}).get(claim.judge().verdict):
            lines[row.get("concluded_after", 0), claim.number] = f"{sentence.removesuffix('.')} (no. {claim.number})."
    return Text(bullets(lines[place] for place in sorted(lines, key=lambda place: (max(place), place))))


def verdicts_text() -> Text:
    """Which claims got which verdict: the paper's, our own about AFDS, those about the systems around it."""
    found, of_afds, every = judge(), len(_written()["afds"]), claims()
    groups = {
        "claims of the paper": [c for c in every if c.source.startswith("[paper]")],
        "questions of our own about AFDS, where [Re] says that it is so here": [
            c for c in every[:of_afds] if not c.source.startswith("[paper]")
        ],
        "claims and questions about the systems around it": every[of_afds:],
    }
    lines = []
    for name, group in groups.items():
        parts = []
        for verdict, word in VERDICTS.items():
            if which := [str(c.number) for c in group if found[c.number].verdict == verdict]:
                parts.append(f"{len(which)} {word} {verdict} (no. {', '.join(which)})")
        lines.append(f"{len(group)} {name}: {', '.join(parts)}.")
    return Text(bullets(lines))
