"""Every rule reaches each of its verdicts on written CSVs, and a changed CSV changes the verdict."""

import itertools
import math
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest

from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.report import claims
from afdslib.report.claims import NOT_SUPPORTED, SUPPORTED, UNDECIDED, UNTESTED
from afdslib.report.numbers import Number
from afdslib.studies import profiles, protocol, results

NOISE = np.array([0.002, -0.002, 0.001, -0.001, 0.0, 0.003, -0.003, 0.002, -0.002, 0.0])
WIDE = 60 * NOISE
CIFAR, DISJOINT, DOGS = "cifar10-60", "tiny-imagenet-32-target40-60", "stanford-dogs"
FIRST = "more accurate at 10x, 32 px"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A project without any result."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    return tmp_path


def write(file: str, rows) -> None:
    """A CSV, or the rows of a committed table by its address; the rows of that address before are gone."""
    if file.endswith(".csv"):
        target = paths.results("any").parent / file
        target.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(target, index=False)
        return
    profile, scale, name, *rest = file.split("/")
    part, _, target = name.partition("-")
    role = "trial" if rest == ["trials"] else "missing" if rest else "student"
    keys = {"scale": scale, "part": part, "role": role, "target": target}
    made = []
    for row in pd.DataFrame(rows).to_dict("records"):
        reason = {"reason": row.get("reason", "x")} if role == "missing" else {}
        made.append(keys | row | {"scale": scale, "part": part, "network": row.get("student", "")} | reason)
        made[-1]["target"] = target or made[-1]["target"]
    before = results.read(profile)
    same = (before.scale == scale) & (before.part == part) & ((before.target == target) | (target == ""))
    trials, missing = before.role == "trial", before.reason != ""
    same &= trials if role == "trial" else (~trials & (missing == (role == "missing")))
    results.path(profile).parent.mkdir(parents=True, exist_ok=True)
    pd.concat([before[~same], results.stored(made)]).to_csv(results.path(profile), index=False)


def comparison(profile: str, target: str, gain, *, seeds=10, macs=0.1, budget="standard", drop=0.2) -> None:
    """AFDS, its rival and a better test accuracy that is worse on validation; AFDS is `gain` above at 10x."""
    gain = np.broadcast_to(gain, seeds)
    rows = []
    for seed in range(seeds):
        for share in (1.0, 0.5, 0.1):
            base = 0.8 - drop * (1 - share) + NOISE[seed]
            for method, role, test, validation in (
                ("afd+afs", "afds", base + gain[seed] * (share < 1), 0.9),
                ("l2+taylor", "competitor", base, 0.7),
                ("l2sp+slimming", "competitor", 0.99, 0.6),
                ("l2+afs", "part", 0.99, 0.95),
            ):
                rows.append(
                    {"target": target, "method": method, "role": role, "seed": seed, "budget": share}
                    | {"test_accuracy": test, "validation_accuracy": validation}
                    | {"macs": macs + NOISE[seed] / 100 if share == 0.1 else share}
                )
    write(f"{profile}/{budget}/comparison-{target}", rows)


def sweep(gain, other="l2", *, seeds=6, budget="standard") -> None:
    gain = np.broadcast_to(gain, seeds)
    keys = itertools.product(("afd", other), range(seeds), (1.0, 0.1))
    rows = [(CIFAR, m, s, b, 0.5 + (gain[s] if m == "afd" else 0)) for m, s, b in keys]
    columns = ["target", "method", "seed", "budget", "test_accuracy"]
    write(f"imagenet32/{budget}/sweep", pd.DataFrame(rows, columns=columns))


def students(file: str, gains, *, seeds=4, teacher="wrn-16-2", student="wrn-16-1") -> None:
    """Accuracies of methods: a gain over the student alone."""
    rows = [{"teacher": "", "student": teacher, "method": "teacher", "seed": 0, "test_accuracy": 0.9, "run": "t"}]
    for method, gain in gains.items():
        for seed, value in enumerate(np.broadcast_to(gain, seeds)):
            rows.append(
                {"teacher": "" if method == "alone" else teacher, "student": student, "method": method, "seed": seed}
                | {"test_accuracy": 0.7 + value, "run": f"{method}-{seed}"}
            )
    write(file, rows)


def curves(profile: str, halves, *, seeds=4) -> None:
    """Learning curves that reach 0.5 of the training images after so many steps, and 0.8 in the end."""
    rows = [
        {"run": f"{method}-{seed}", "step": step, "train_accuracy": 0.8 * (1 - 0.5 ** (step / steps))}
        for method, half in halves.items()
        for seed, steps in enumerate(np.broadcast_to(half, seeds))
        for step in range(20, 401, 20)
    ]
    write(f"{profile}/curves.csv", rows)


def times(dense=(30, 31, 32), compact=(3, 3.1, 3.2), *, note="masks of resnet101-10x.json", name="a", **facts):
    row = {"case": "networks", "network": "resnet101-10x", "batch": 1, "device": "CPU", "threads": 1}
    row |= {"size": 224, "width": 1.0, "repeats": 5} | facts
    rows = [
        row | {"variant": v, "runtime": r, "q1_ms": f * t[0], "median_ms": f * t[1], "q3_ms": f * t[2], "note": n}
        for v, t, n in (("dense", dense, "batch norm folded"), ("compact", compact, note))
        for r, f in (("onnxruntime", 1.0), ("eager", 1.5))
    ]
    rows.append(row | {"variant": "compact", "runtime": "compiled", "note": "not in this runtime"})
    write(f"speed/{name}.csv", rows)


def named(title: str) -> claims.Claim:
    return {c.title: c for c in claims.claims()}[title]


def verdict(title: str) -> str:
    return named(title).judge().verdict


# pure rules


@pytest.mark.parametrize(
    ("low", "high", "n", "margin", "expected"),
    [
        (0.1, 3, 5, 0, SUPPORTED),
        (-3, -0.1, 5, 0, NOT_SUPPORTED),
        (-1, 3, 5, 0, UNDECIDED),
        (0, 3, 5, 0, UNDECIDED),
        (-3, 0, 5, 0, UNDECIDED),
        (0.1, 3, 4, 0, UNDECIDED),
        (math.nan, math.nan, 5, 0, UNDECIDED),
        (8, 12, 5, 11.07, SUPPORTED),
        (13, 15, 5, 11.07, SUPPORTED),
        (5, 11, 5, 11.07, NOT_SUPPORTED),
        (-5, 11, 5, 11.07, NOT_SUPPORTED),
        (-5, 12, 5, 11.07, UNDECIDED),
        (5, 11, 4, 11.07, UNDECIDED),
    ],
)
def test_an_interval_speaks_for_against_or_not_at_all(low, high, n, margin, expected):
    assert claims.of_interval(Number((low + high) / 2, low=low, high=high, n=n), margin=margin) == expected


def test_nothing_measured_is_not_tested():
    assert claims.of_interval(None) == UNTESTED and claims.of_interval(None, margin=11.07) == UNTESTED
    assert claims.matters({}, 0.1, seeds=3) == UNTESTED and claims.matters({1: 0.1, 2: 0.2, 3: 0.3}, None, seeds=3) == (
        UNTESTED
    )


def test_a_step_beside_the_best_weight_is_held_against_the_seeds():
    tried = {1: 0.70, 10: 0.80, 100: 0.79, 1000: 0.60}
    assert claims.matters(tried, 0.05, seeds=3) == SUPPORTED
    assert claims.matters(tried, 0.15, seeds=3) == UNDECIDED  # only far away it costs more
    assert claims.matters(tried, 0.25, seeds=3) == NOT_SUPPORTED
    assert claims.matters(tried, 0.05, seeds=2) == UNDECIDED
    assert claims.matters(tried | {100: math.nan}, 0.25, seeds=3) == SUPPORTED  # it diverged


# each rule reaches each verdict


def test_without_results_no_claim_is_tested():
    found = claims.judge()
    assert {f.verdict for f in found.values()} == {UNTESTED} and not any(f.files for f in found.values())
    assert all(f.why.startswith("No committed result has") for f in found.values())


def lines(file: str, alone, taught) -> None:
    students(file, {"at": 0.0, "alone": 0.0}, seeds=len(alone))
    curves("imagenet32", {"alone": alone, "at": taught}, seeds=len(alone))


def tried(*accuracies) -> None:
    students(QUICK, {"at": NOISE[:4], "alone": 0.0})
    rows = zip((1, 10, 100), accuracies, strict=True)
    write(f"{QUICK}/trials", [{"method": "at", "strength": w, "validation_accuracy": v} for w, v in rows])


def gains(file: str, teacher: str, student: str, one: str, other: str, margin: float = 0):
    pair = {"teacher": teacher, "student": student}
    cases = ((0.02 + NOISE[:4], 4), (margin / 2 - 0.02 + NOISE[:4], 4), (WIDE[:4], 4), (0.02, 2))
    yield from (partial(students, file, {one: gain, other: 0.0}, seeds=seeds, **pair) for gain, seeds in cases)


QUICK = "imagenet32/quick/attention"
SLOW, FAST = np.array([100, 103, 97, 101]), np.array([50, 49, 51, 50])
THIRD, TENTHS = ("wrn-16-2", "wrn-16-1"), ("resnet101", "inception_bn")
BY = [(0.02 + NOISE[::-1], 10), (-0.02 + NOISE[::-1], 10), (WIDE, 10), (0.02, 9)]
FEW = [(0.02 + NOISE[::-1][:5], 5), (-0.02 + NOISE[::-1][:5], 5), (WIDE[:5], 5), (0.02, 4)]
LESS = [0.08 + NOISE, -0.08 + NOISE, WIDE]
SAME = [(0.02 + NOISE[:6], 6), (-0.02 + NOISE[:6], 6), (WIDE[:6], 6), (0.02, 2)]
RULES = {  # what is written, one after the other: supported, not supported, undecided, and for another reason
    FIRST: [partial(comparison, "imagenet32", CIFAR, g, seeds=n) for g, n in BY],
    "more accurate at 10x, 32 px, no class in common": [
        partial(comparison, "imagenet32-disjoint", DISJOINT, g, seeds=n) for g, n in FEW
    ],
    "more accurate at 10x, Stanford Dogs at 128 px": [
        partial(comparison, "dogs", "stanford-dogs-144-30", g, seeds=n, budget="quick") for g, n in FEW
    ],
    "+11.07 points": [partial(comparison, "paper", DOGS, g) for g in (0.12, 0.05 + NOISE, 0.1107 + 2 * WIDE)],
    "10x fewer MACs": [
        partial(comparison, "paper", DOGS, 0.0, macs=macs, seeds=seeds)
        for macs, seeds in ((0.0995, 10), (0.12, 10), (0.102, 10), (0.0995, 9))
    ],
    "computation at the same accuracy": [partial(comparison, "paper", DOGS, gain) for gain in LESS],
    "fewer MACs at the same accuracy, 32 px": [partial(comparison, "imagenet32", CIFAR, gain) for gain in LESS],
    "AFD over L2, 32 px": [partial(sweep, gain, seeds=seeds) for gain, seeds in SAME],
    "attention, 32 px": [partial(sweep, gain, "feature-map", seeds=seeds) for gain, seeds in SAME],
    "faster by the clock": [
        times, partial(times, (3, 3.1, 3.2), (30, 31, 32), batch=16, name="b"),
        partial(times, (3, 3.1, 3.2), (3, 3.1, 3.2), batch=16, name="b"), partial(times, batch=16, repeats=4, name="b")
    ],
    "AT on CIFAR-10": [*gains("paper/standard/attention", *THIRD, "at", "alone", 0.0084)],
    "AT, few epochs": [*gains(QUICK, *THIRD, "at", "alone")],
    "AT on ImageNet": [*gains("paper/quick/attention", "resnet34", "resnet18", "at", "alone", 0.011)],
    "NST on ImageNet": [*gains("paper/standard/selectivity", *TENTHS, "nst-poly", "alone", 0.0093)],
    "NST + KD on ImageNet": [*gains("paper/quick/selectivity", *TENTHS, "nst-poly+kd", "nst-poly", 0.0047)],
    "NST, CIFAR-10": [*gains("imagenet32/standard/attention", *THIRD, "nst", "alone")],
    "NST + KD, CIFAR-10": [
        *gains("imagenet32/quick/selectivity", "wrn-16-2", "inception_bn", "nst-poly+kd", "nst-poly")
    ],
    "AT converges faster": [
        partial(lines, QUICK, *two)
        for two in ((SLOW, FAST), (FAST, SLOW), (SLOW, [103, 97, 100, 101]), (SLOW[:2], FAST[:2]))
    ],
    "AT's weight matters": [
        partial(tried, *values) for values in ((0.70, 0.80, 0.70), (0.800, 0.801, 0.802), (0.790, 0.801, 0.802))
    ]
}  # fmt: skip


@pytest.mark.parametrize("title", [c.title for c in claims.claims()])
def test_each_rule_reaches_each_of_its_verdicts(title):
    seen = [verdict(title)]
    for written in RULES[title]:
        written()
        seen.append(verdict(title))
    assert seen == [UNTESTED, SUPPORTED, NOT_SUPPORTED, UNDECIDED, UNDECIDED][: len(seen)]


def test_a_claim_is_held_against_the_data_and_networks_that_it_names_only():
    comparison("imagenet32", CIFAR, 0.12)
    comparison("paper", "mit-indoors", 0.12)
    for file in ("paper/quick/attention", "imagenet32/standard/attention"):
        students(file, {"at": 0.02 + NOISE[:4], "alone": 0.0})
    assert verdict("+11.07 points") == verdict("AT on CIFAR-10") == UNTESTED
    assert verdict("AT, few epochs") == SUPPORTED
    comparison("paper", DOGS, -0.05)
    assert verdict("+11.07 points") == NOT_SUPPORTED
    students(QUICK, {"nst-poly+kd": 0.05, "nst-poly": 0.0}, teacher="another", student="inception_bn")
    assert verdict("NST + KD, CIFAR-10") == UNTESTED


def test_a_learning_curve_that_is_missing_is_one_sentence():
    lines(QUICK, SLOW, FAST)
    curves("imagenet32", {"alone": 100, "at": 50}, seeds=1)
    with pytest.raises(AFDSError, match="curves.csv has no row"):
        verdict("AT converges faster")


def test_macs_at_the_same_accuracy_are_held_against_the_most_frugal_competitor():
    # l2+width is best at 10x, so the rival; l2+taylor needs 25 % of the MACs for 0.59, a point below the rival's 0.6.
    curves = {
        "afd+afs": {1.0: 0.62, 0.5: 0.59, 0.1: 0.4},
        "l2+width": {1.0: 0.60, 0.5: 0.55, 0.1: 0.5},
        "l2+taylor": {1.0: 0.61, 0.25: 0.59, 0.1: 0.3},
    }
    rows = [
        {"target": CIFAR, "method": m, "role": "afds" if m == "afd+afs" else "competitor", "seed": seed}
        | {"budget": b, "macs": b, "test_accuracy": a + NOISE[seed] / 100, "validation_accuracy": a}
        for m, curve in curves.items()
        for b, a in curve.items()
        for seed in range(10)
    ]
    write(f"imagenet32/quick/comparison-{CIFAR}", rows)
    found = named("fewer MACs at the same accuracy, 32 px").judge()
    assert found.verdict == NOT_SUPPORTED
    assert found.why.startswith("MACs that L2 + Taylor needs minus those that AFDS needs: -25.0 [")
    assert "L2 + narrower network, the best competitor at 10x, minus AFDS: +4" in found.why
    short = [row for row in rows if row["method"] != "l2+taylor" or row["seed"] < 3]  # too few seeds to be asked
    write(f"imagenet32/quick/comparison-{CIFAR}", short)
    assert verdict("fewer MACs at the same accuracy, 32 px") == SUPPORTED


def test_times_of_random_masks_are_no_evidence_and_each_network_has_its_best_runtime():
    times(note="random masks: 0.2 inner")
    assert verdict("faster by the clock") == UNTESTED
    times(size=64)
    assert verdict("faster by the clock") == UNTESTED
    times((30, 31, 32), (25, 26, 27))
    found = named("faster by the clock").judge()
    assert found.verdict == SUPPORTED  # eager compact (37.5 ms) does not count
    assert "On CPU, medians, batch 1: 1.2x as fast, 26.0 against 31.0 ms" in found.why
    assert found.files == ("speed/a.csv",)


# what a rule reads


def test_a_changed_file_changes_the_verdict_and_its_sentence():
    comparison("imagenet32", CIFAR, 0.0206 + NOISE)
    file = f"imagenet32/standard/comparison-{CIFAR}"
    claim = named(FIRST)
    before = claim.judge()
    table = results.named(file)
    table.loc[(table.method == "afd+afs") & (table.budget == 0.1), "test_accuracy"] -= 0.05
    write(file, table)
    after = claim.judge()
    assert (before.verdict, after.verdict) == (SUPPORTED, NOT_SUPPORTED)
    assert ": +2.1 [" in before.why and ": -2.9 [" in after.why
    assert before.files == (f"imagenet32/standard/comparison-{CIFAR}",)


def test_the_rival_is_chosen_on_validation_and_parts_of_afds_are_no_rivals():
    comparison("imagenet32", CIFAR, 0.02 + NOISE)
    claim = named(FIRST)
    assert "AFDS minus the best competitor, L2 + Taylor, on CIFAR-10 (32 px), 60 per class" in claim.judge().why
    file = f"imagenet32/standard/comparison-{CIFAR}"
    table = results.named(file)
    first = table.seed.isin(protocol.protocol(profiles.get("imagenet32", "standard")).seeds[:3])
    table.loc[(table.method == "l2sp+slimming") & first, "validation_accuracy"] = 0.71
    write(file, table)
    found = claim.judge()
    assert "L2-SP + network slimming" in found.why and found.verdict == NOT_SUPPORTED


def test_the_larger_budget_counts_where_it_has_the_rows():
    sweep(-0.02 + NOISE[:6], budget="quick")
    assert verdict("AFD over L2, 32 px") == NOT_SUPPORTED
    sweep(0.02 + NOISE[:6], budget="standard")
    assert verdict("AFD over L2, 32 px") == SUPPORTED
    sweep(0.02, "feature-map", budget="standard")
    assert verdict("AFD over L2, 32 px") == NOT_SUPPORTED


def test_seeds_that_diverged_are_told():
    comparison("imagenet32", CIFAR, 0.02 + NOISE)
    rows = [{"target": "x", "method": m, "seed": 9, "budget": b} for m in ("afd+afs", "l2+width") for b in (0.1, 0.5)]
    write(f"imagenet32/standard/comparison-{CIFAR}/missing", rows)
    claim = named(FIRST)
    assert claim.judge().why.endswith("Seeds without a network at 10x: AFD + AFS 1.")


def test_a_comparison_is_judged_when_every_seed_is_there_or_known_to_be_lost():
    file = f"imagenet32/standard/comparison-{CIFAR}/missing"
    comparison("imagenet32", CIFAR, 0.02 + NOISE[:9], seeds=9)
    assert verdict(FIRST) == UNDECIDED
    write(file, [{"target": "x", "method": "l2+taylor", "seed": 9, "budget": 0.5}])
    assert verdict(FIRST) == UNDECIDED
    write(file, [{"target": "x", "method": "l2+taylor", "seed": 9, "budget": 0.1}])
    assert verdict(FIRST) == SUPPORTED
    comparison("imagenet32", CIFAR, 0.02 + NOISE[:4], seeds=4)
    write(file, [{"target": "x", "method": "afd+afs", "seed": s, "budget": 0.1} for s in range(4, 10)])
    assert verdict(FIRST) == UNDECIDED


def test_a_comparison_without_afds_or_without_competitors_is_no_test():
    for keep in ("competitor", "afds"):
        comparison("imagenet32", CIFAR, 0.02)
        file = f"imagenet32/standard/comparison-{CIFAR}"
        table = results.named(file)
        write(file, table[table.role == keep])
        assert verdict(FIRST) == UNTESTED
        assert verdict("fewer MACs at the same accuracy, 32 px") == UNTESTED


def test_a_damaged_file_is_one_sentence():
    file = results.path("imagenet32")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff\x81")
    with pytest.raises(AFDSError, match="is damaged"):
        claims.judge()


# rendering


def test_every_claim_has_a_number_a_source_a_rule_and_a_verdict():
    made = claims.claims()
    assert [c.number for c in made] == list(range(1, len(made) + 1)) and len({c.title for c in made}) == len(made)
    for claim in made:
        assert re.match(r"\[(paper|ours|AT's paper|NST's paper)\]", claim.source), claim
        shared = claim.rule.startswith(("The sign of", "The size of"))
        assert shared or all(v in claim.rule for v in ("Supported if", "not supported if", "undecided else")), claim
    text, table = str(claims.rules_text()), claims.verdict_table()
    assert all(text.count(f"\n{c.number}. **{c.title}** {c.source}: ") == 1 and c.rule in text for c in made)
    assert text.count("**The sign of**") == text.count("**The size of**") == 1
    assert len(table.rows) == len(made)
    assert {row[2] for row in table.rows} == {"**untested**"} and "|" not in "".join(sum(table.rows, []))


def test_the_tables_hold_the_verdicts_and_the_paper_has_three_claims_of_its_own():
    comparison("imagenet32", CIFAR, 0.02 + NOISE)
    sweep(0.02, seeds=2, budget="quick")
    rows = {row[1]: row for row in claims.verdict_table().rows}
    assert rows[FIRST][2] == "**supported**" and rows["AFD over L2, 32 px"][2] == "**undecided**"
    assert "`imagenet32/quick/sweep`" in rows["AFD over L2, 32 px"][4]
    assert [row[1] for row in claims.about("[paper]").rows] == ["**untested**"] * 3
    own = {row[0].partition(". ")[2]: row for row in claims.about("[ours]").rows}
    assert own[FIRST][1:] == rows[FIRST][2:4] and "faster by the clock" in own and len(own) == 7


def test_every_claim_is_judged_by_a_known_rule():
    rows = claims._written()["afds"] + claims._written()["students"]
    assert {row["judge"]["by"] for row in rows} == set(claims.RULES)


def test_the_committed_results_can_be_judged(monkeypatch):
    monkeypatch.delenv("AFDS_HOME")
    assert {f.verdict for f in claims.judge().values()} <= set(claims.VERDICTS)
    if "paper" not in results.profiles():
        assert {c.judge().verdict for c in claims.claims() if c.number <= 3} == {UNTESTED}
