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

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from afdslib.report import numbers, speed
from afdslib.report.numbers import Number
from afdslib.report.plots import look
from afdslib.report.quoted import REPORTED
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

AFDS_MARGIN, EARLIER_MARGIN = 11.07, 12.51
"""Points over the best competitor at 10x on Stanford Dogs, in the published and an earlier abstract. [paper]"""
AT_IMAGENET = (30.4, 29.3)
"""Top-1 error of ResNet-18 alone and with AT from ResNet-34, percent. [paper of AT]"""
NST_IMAGENET = (25.74, 24.81, 24.34)
"""Top-1 error of Inception-BN alone, with NST and with NST + KD, percent. [paper of NST]"""
AT_CIFAR = tuple(REPORTED["cifar10", teacher, "wrn-16-1", m] for teacher, m in (("", "alone"), ("wrn-16-2", "at")))

AFDS, DOGS, CIFAR, DISJOINT = "afd+afs", "stanford-dogs", "cifar10-60", "tiny-imagenet-32-target40-60"
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
    return [name for name in names if numbers.path_of(name).is_file()]


def _untested(what: str) -> Found:
    return Found(UNTESTED, f"No committed result file has {what}.")


def _no_comparison(profile: str, target: str, budgets: str = "at 10x") -> Found:
    return _untested(f"AFDS and a competitor {budgets} on {target} in the profile {profile}")


def _with_seeds(number: Number) -> str:
    return f"{number}, {statistics.paired_seeds(number.n)}"


def _comparisons(profile: str, target: str) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """(file, table, rival) of every comparison that has AFDS and a competitor at 10x."""
    for file in _existing(f"{profile}/{budget}/comparison-{target}/comparison.csv" for budget in BUDGETS):
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
    missing = Path(file).with_name("missing.csv").as_posix()
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
        found = _saved(one, other, "% of the dense MACs", file)
        why = f"MACs that {_label(frugal)} needs minus those that AFDS needs: {_with_seeds(found)}."
        if frugal != rival and (theirs := _shares(table, rival, rival, "test_accuracy")):
            why += f" {_label(rival)}, the rival at 10x, minus AFDS: {_saved(theirs, other, '%', file)}."
        why += _lost(file, [AFDS, frugal])
        return Found(of_interval(found, seeds=_planned(file, [AFDS, frugal])), why, (file,))
    return _no_comparison(profile, target, "from 1x to 10x")


def _saved(one: Mapping[int, float], other: Mapping[int, float], unit: str, file: str) -> Number:
    difference = statistics.paired(one, other).difference
    return numbers.of_interval(difference, unit, scale=100, file=file, signed=True)


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
    for file in _existing(f"{profile}/{b}/sweep.csv" for b in BUDGETS):
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
        trials = file.replace(".csv", "_trials.csv")
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

RULES = """
- **The sign of** a difference: [Re] if its 95 % interval lies above 0; [¬Re] if it lies below; [inconclusive] if it
  holds 0, or with fewer seeds than the rule names.
- **The size of** a difference: [Re] if its 95 % interval lies above 0 and reaches the claimed size; [¬Re] if it ends
  below that size; [inconclusive] if it holds both 0 and the size, or with fewer seeds.
- **Every rule**: [?] if no committed result file has the network and the data that the claim names. Differences are
  paired by seed. The *rival* is the competitor that is best at 10x on validation images; pairs that hold a part of AFDS
  are no competitors. Of a study's committed sizes (quick, standard) the larger one that has the rows counts.
"""

ALL = f"all seeds of the protocol that the two have not lost, at least {SEEDS}"
"""Of a comparison, which is judged when it is finished."""

ATTENTION, SELECTIVITY = (
    [f"{profile}/{budget}/{study}.csv" for profile in ("paper", "imagenet32") for budget in BUDGETS]
    for study in ("attention", "selectivity")
)
WRN, RESNET, INCEPTION = ("wrn-16-2", "wrn-16-1"), ("resnet34", "resnet18"), ("resnet101", "inception_bn")


def _sign(what: str, seeds: int | str) -> str:
    return f"The sign of {what}; {_least(seeds)}."


def _size(what: str, margin: float, seeds: int | str) -> str:
    return f"The size of {what}, {margin:g} points; {_least(seeds)}."


def _least(seeds: int | str) -> str:
    return seeds if isinstance(seeds, str) else f"at least {seeds} seeds"


def _of_afds() -> Iterator[tuple[str, str, str, str, Callable[[], Found]]]:
    """(title, text, source, rule, judge) of the paper's claims, and of ours at 32 px."""
    rival, resnet, here = (
        "AFDS minus its rival at 10x",
        "ResNet-101, ImageNet to Stanford Dogs",
        "Tiny ImageNet to CIFAR-10",
    )
    saved = (
        "the MACs that AFDS needs less than the most frugal competitor, on validation images, for the accuracy of its "
        "unpruned rival less one point"
    )
    stricter = (
        "(At first the rule asked the rival at 10x alone, which AFDS undercuts; its numbers were known when it was "
        "made stricter.)"
    )
    known = "(The two seeds of the quick study were known when the rule was written; they are too few for it.)"
    yield (
        "10x fewer MACs", f"{resnet}: a network with a tenth of the MACs.", "[paper]",
        f"[Re] if the 95 % interval of its MACs, measured on test images with the predictors, ends below a tenth "
        f"plus {TOLERANCE:.0%} of it; [¬Re] if it starts above; else, or with fewer than {ALL}, [inconclusive].",
        partial(reaches_budget, "paper", DOGS),
    )  # fmt: skip
    yield (
        f"+{AFDS_MARGIN} points",
        f"{resnet}: at 10x it is {AFDS_MARGIN} points more accurate than its best competitor "
        f"({EARLIER_MARGIN} in an earlier version of the abstract).", "[paper]",
        _size(rival, AFDS_MARGIN, ALL), partial(beats_rival, "paper", DOGS, margin=AFDS_MARGIN),
    )  # fmt: skip
    yield (
        "computation at the same accuracy", f"{resnet}: state-of-the-art computation reduction at the same "
        "accuracy budget.", "[paper]", _sign(saved, ALL), partial(saves_more, "paper", DOGS),
    )  # fmt: skip
    yield (
        "faster CNNs", "The transferred network is faster. Here: ResNet-101, trained with AFDS on photographs of "
        "64 px, cut 10x by its own masks, timed at 224 px.", "[paper] (the title); measurement [ours]",
        "[Re] if at every measured batch size and device the upper quartile of its time lies below the dense "
        "network's lower quartile, each in its best runtime; [¬Re] if at any of them its lower quartile lies above "
        f"the dense upper one; else, or with fewer than {REPEATS} repeats, [inconclusive].", faster,
    )  # fmt: skip
    yield (
        "sign at 10x, 32 px", f"{here}, 60 images per class: at 10x AFDS is more accurate than "
        "the best of our competitors.", "[ours]", _sign(rival, ALL), partial(beats_rival, "imagenet32", CIFAR),
    )  # fmt: skip
    yield (
        "sign at 10x, disjoint classes", "The same where source and target share no class (160 and 40 of Tiny "
        "ImageNet's).", "[ours]", _sign(rival, ALL), partial(beats_rival, "imagenet32-disjoint", DISJOINT),
    )  # fmt: skip
    yield (
        "MACs at the same accuracy, 32 px", f"{here}, 60 images per class: AFDS needs fewer MACs for the same "
        f"accuracy than any of our competitors. {stricter}", "[ours]", _sign(saved, ALL),
        partial(saves_more, "imagenet32", CIFAR),
    )  # fmt: skip
    yield (
        "AFD over L2, 32 px", f"With the same AFS, AFD is more accurate at 10x than plain fine-tuning. {known}",
        "[ours]", _sign("AFD minus L2 at 10x", SEEDS), partial(same_selection, "imagenet32", CIFAR, "l2"),
    )  # fmt: skip
    yield (
        "attention, 32 px", "With the same AFS, AFD is more accurate at 10x than a pull on all channels alike: the "
        f"attention helps. {known}", "[ours]", _sign("AFD minus feature map at 10x", SEEDS),
        partial(same_selection, "imagenet32", CIFAR, "feature-map"),
    )  # fmt: skip


def _of_students() -> Iterator[tuple[str, str, str, str, Callable[[], Found]]]:
    """The claims of AT and of NST, as `_of_afds`."""
    at_margin, at_large = round(AT_CIFAR[1] - AT_CIFAR[0], 2), round(AT_IMAGENET[0] - AT_IMAGENET[1], 2)
    nst_margin, kd_margin = (round(NST_IMAGENET[i] - NST_IMAGENET[i + 1], 2) for i in (0, 1))
    at_alone, nst_alone, nst_kd = ("at", "alone"), ("nst-poly", "alone"), ("nst-poly+kd", "nst-poly")
    yield (
        "AT on CIFAR-10", f"WRN-16-2 teaches WRN-16-1, 200 epochs: accuracy {AT_CIFAR[1]:.2f} % instead of "
        f"{AT_CIFAR[0]:.2f} %.", "[AT's paper]", _size("AT minus alone", at_margin, STUDENT_SEEDS),
        partial(student_gains, ATTENTION[:1], WRN, at_alone, margin=at_margin),
    )  # fmt: skip
    yield (
        "AT, few epochs", "The sign of the same in a training of a few epochs.", "[ours]",
        _sign("AT minus alone", STUDENT_SEEDS), partial(student_gains, ATTENTION[2:], WRN, at_alone),
    )  # fmt: skip
    yield (
        "AT on ImageNet", f"ResNet-34 teaches ResNet-18: top-1 error {AT_IMAGENET[1]} % instead of "
        f"{AT_IMAGENET[0]} %.", "[AT's paper]", _size("AT minus alone", at_large, STUDENT_SEEDS),
        partial(student_gains, ATTENTION, RESNET, at_alone, margin=at_large),
    )  # fmt: skip
    yield (
        "AT converges faster", "A student with AT converges faster.", "[AT's paper]; measure [ours]",
        _sign("alone minus AT, steps until 90 % of the plain student's final accuracy on training images",
              STUDENT_SEEDS) + " Steps are linear between logged rows; who never gets there counts the last one.",
        partial(converges_faster, ATTENTION, WRN),
    )  # fmt: skip
    yield (
        "AT's weight matters",
        "Small changes of a hyper-parameter matter. Tested here: a factor of ten in the weight.",
        "[AT's paper]; measure [ours]",
        "[Re] if the worse neighbour of the best weight costs more validation accuracy than the seeds differ at "
        "one weight; [¬Re] if all weights tried lie within that; else, or with fewer than "
        f"{STUDENT_SEEDS} seeds, [inconclusive].", partial(weights_matter, ATTENTION, WRN),
    )  # fmt: skip
    yield (
        "NST on ImageNet", f"ResNet-101 teaches Inception-BN: top-1 error {NST_IMAGENET[1]} % instead of "
        f"{NST_IMAGENET[0]} %.", "[NST's paper]", _size("NST minus alone", nst_margin, STUDENT_SEEDS),
        partial(student_gains, SELECTIVITY, INCEPTION, nst_alone, margin=nst_margin),
    )  # fmt: skip
    yield (
        "NST + KD on ImageNet", f"The same with KD as well: {NST_IMAGENET[2]} % instead of {NST_IMAGENET[1]} %.",
        "[NST's paper]", _size("NST + KD minus NST", kd_margin, STUDENT_SEEDS),
        partial(student_gains, SELECTIVITY, INCEPTION, nst_kd, margin=kd_margin),
    )  # fmt: skip
    yield (
        "NST, CIFAR-10", "The sign of NST's gain on CIFAR-10, WRN-16-2 to WRN-16-1.", "[ours]",
        _sign("NST minus alone", STUDENT_SEEDS), partial(student_gains, ATTENTION, WRN, ("nst", "alone")),
    )  # fmt: skip
    yield (
        "NST + KD, CIFAR-10", "The sign of what KD adds to NST on CIFAR-10, WRN-16-2 to a narrow Inception-BN.",
        "[ours]", _sign("NST + KD minus NST", STUDENT_SEEDS),
        partial(student_gains, SELECTIVITY, ("wrn-16-2", "inception_bn"), nst_kd),
    )  # fmt: skip


def claims() -> list[Claim]:
    """All claims, in the report's order: the paper's, ours at 32 px, then those of AT and of NST."""
    return [Claim(number, *rest) for number, rest in enumerate([*_of_afds(), *_of_students()], 1)]


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
    return Text(f"{RULES.strip()}\n\n" + "\n".join(lines))


def verdict_table() -> Table:
    """Claims with their verdicts, the numbers behind them and the files these were read from."""
    found = judge()
    rows = [
        (c.number, c.title, f"**{found[c.number].verdict}**", found[c.number].why,
         ", ".join(f"`{file}`" for file in found[c.number].files) or "none")
        for c in claims()
    ]  # fmt: skip
    return Table(["no.", "claim", "verdict", "what was found", "file below data/results"], rows, numbers=False)


CONCLUSIONS = {
    "+11.07 points": {
        UNTESTED: "The paper's own number needs ResNet-101 on Stanford Dogs and is not tested here; nothing below "
        "refutes or supports it.",
        REPLICATED: "The paper's margin on Stanford Dogs was reached.",
        NOT_REPLICATED: "The paper's margin on Stanford Dogs was not reached.",
    },
    "sign at 10x, 32 px": {
        REPLICATED: "On small photographs AFDS is the most accurate of our methods at a tenth of the MACs.",
        NOT_REPLICATED: "On small photographs AFDS is not the most accurate of our methods at a tenth of the MACs: a "
        "rival is better that had no more tuning.",
    },
    "sign at 10x, disjoint classes": {
        REPLICATED: "Where source and target share no class AFDS is the better one.",
        NOT_REPLICATED: "Where source and target share no class a rival is better.",
        INCONCLUSIVE: "Where source and target share no class the seeds do not tell AFDS from its rival.",
    },
    "MACs at the same accuracy, 32 px": {
        REPLICATED: "With mild pruning AFDS needs fewer MACs for the same accuracy than any of them.",
        NOT_REPLICATED: "With mild pruning, too, a competitor needs fewer MACs for the same accuracy.",
        INCONCLUSIVE: "With mild pruning the seeds do not tell it from the competitor that needs the fewest MACs for "
        "the same accuracy.",
    },
    "faster CNNs": {
        REPLICATED: "A ResNet-101 that it has cut is faster by the clock, without its removed channels; accuracy has "
        "no part in that verdict.",
        NOT_REPLICATED: "A ResNet-101 that it has cut is not faster by the clock.",
    },
}
"""Per claim what a reader should take away from its verdict; nothing is said of a verdict without a sentence."""


def conclusion_text() -> Text:
    """What to think: a sentence for each of the leading claims, by its verdict."""
    found, number = judge(), {claim.title: claim.number for claim in claims()}
    return Text(
        bullets(
            f"{sentence.removesuffix('.')} (no. {number[title]})."
            for title, by_verdict in CONCLUSIONS.items()
            if (sentence := by_verdict.get(found[number[title]].verdict))
        )
    )


def verdicts_text() -> Text:
    """Which claims got which verdict: the paper's, our own about AFDS, those about the systems around it."""
    found, of_afds, every = judge(), len(list(_of_afds())), claims()
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
