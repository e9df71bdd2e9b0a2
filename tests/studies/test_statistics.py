"""Intervals, paired tests and Holm's correction against scipy; the rival is chosen without a test number."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from afdslib.base.errors import AFDSError
from afdslib.studies import statistics

RANDOM = np.random.RandomState(0)


def table(**accuracies) -> pd.DataFrame:
    """One row per method and seed at 10x; a method's value is (test accuracies, validation accuracies)."""
    rows = []
    for key, pair in accuracies.items():
        method = key.replace("_", "+")
        role = "afds" if method == "afd+afs" else "part" if "afd" in method or "afs" in method else "competitor"
        rows += [(method, role, seed, 0.1, t, v) for seed, (t, v) in enumerate(zip(*pair, strict=True))]
    return pd.DataFrame(rows, columns=["method", "role", "seed", "budget", "test_accuracy", "validation_accuracy"])


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_students(n, level):
    values = RANDOM.normal(0.7, 0.02, n)
    found = statistics.interval(values, level=level)
    low, high = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high)) and found.n == n
    assert (found.mean, found.sd) == pytest.approx((values.mean(), values.std(ddof=1)))
    one = statistics.interval(values[:1])
    assert one.mean == values[0] and all(map(math.isnan, (one.sd, one.low, one.high)))
    for bad in ([], [0.5, math.nan], [math.inf]):
        with pytest.raises(AFDSError, match="finite"):
            statistics.interval(bad)


def test_the_paired_test_is_scipys_over_the_shared_seeds():
    one = {s: float(v) for s, v in enumerate(RANDOM.normal(0.70, 0.02, 10))}
    other = {s: float(v) for s, v in enumerate(RANDOM.normal(0.69, 0.02, 7), start=2)}
    found = statistics.paired(one, other)
    expected = stats.ttest_rel([one[s] for s in range(2, 9)], [other[s] for s in range(2, 9)])
    bounds = expected.confidence_interval(0.95)
    assert found.seeds == tuple(range(2, 9)) and found.p == pytest.approx(expected.pvalue)
    assert (found.difference.low, found.difference.high) == pytest.approx((bounds.low, bounds.high))
    with pytest.raises(AFDSError, match="share no seed"):
        statistics.paired({0: 1.0}, {1: 1.0})
    assert math.isnan(statistics.paired({0: 1.0}, {0: 0.5}).p)
    assert statistics.paired({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).p == 1


def test_holm_steps_down_and_never_falls():
    # Worked by hand: 0.01*4, 0.02*3, max(0.06, 0.025*2), max(., 0.5).
    assert statistics.holm([0.5, 0.01, 0.025, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    found = statistics.holm([0.03, math.nan, 0.01])
    assert found[0] == pytest.approx(0.03) and math.isnan(found[1]) and found[2] == pytest.approx(0.02)
    # Between Bonferroni and no correction, and at least the false discovery rate's.
    p = RANDOM.uniform(0, 0.2, 20)
    corrected = np.array(statistics.holm(p))
    assert (corrected >= p).all() and (corrected <= np.minimum(1, 20 * p)).all()
    assert (corrected >= stats.false_discovery_control(p) - 1e-12).all()
    with pytest.raises(AFDSError, match="between 0 and 1"):
        statistics.holm([1.2])


def test_the_macs_within_a_point_are_linear_between_the_budgets():
    curve = {1.0: (1.0, 0.80), 0.5: (0.5, 0.795), 0.25: (0.25, 0.785), 0.1: (0.1, 0.70)}
    assert statistics.macs_within(curve) == pytest.approx(0.375)  # 0.79 is half way from 0.795 to 0.785
    assert statistics.macs_within(curve, points=20) == 0.1
    assert statistics.macs_within(curve, dense=0.9) is None
    back = {1.0: (1.0, 0.80), 0.5: (0.5, 0.70), 0.25: (0.25, 0.80)}
    assert statistics.macs_within(back) == pytest.approx(0.95)  # what comes after the first fall does not count
    with pytest.raises(AFDSError, match="unpruned"):
        statistics.macs_within({0.5: (0.5, 0.7)})


def test_the_rival_is_the_best_competitor_on_validation_and_no_test_number_is_looked_at():
    found = table(
        afd_afs=([0.8, 0.8], [0.9, 0.9]),
        l2_afs=([0.9, 0.9], [0.95, 0.95]),  # a part of AFDS is no competitor
        l2_taylor=([0.9, 0.9], [0.5, 0.5]),
        l2sp_slimming=([0.1, 0.1], [0.6, 0.6]),
    )
    assert statistics.rival(found) == "l2sp+slimming"
    assert statistics.rival(found.drop(columns="test_accuracy")) == "l2sp+slimming"
    assert statistics.rank_on_validation(found) == ["l2sp+slimming", "l2+taylor"]
    late = found.copy()
    late.loc[(late.method == "l2+taylor") & (late.seed == 1), "validation_accuracy"] = 1.0
    assert statistics.rival(late) == "l2+taylor" and statistics.rival(late, seeds=[0]) == "l2sp+slimming"
    low, high = [0.7] * 2, [0.9] * 2
    lost = table(afd_afs=(high, high), l2_taylor=(low, low), l2sp_slimming=(low, high))
    one = (lost.method == "l2sp+slimming") & (lost.seed == 1)  # one that lost a seed stands behind those that did not
    assert statistics.rank_on_validation(lost)[0] == "l2sp+slimming"
    for part in (lost[~one], lost.assign(validation_accuracy=lost.validation_accuracy.mask(one))):
        assert statistics.rank_on_validation(part) == ["l2+taylor", "l2sp+slimming"]
    with pytest.raises(AFDSError, match="no competitor"):
        statistics.rival(table(afd_afs=([0.8], [0.9])))
    with pytest.raises(AFDSError, match="no row at 4x"):
        statistics.rival(found, budget=0.25)


def test_the_table_of_pairs_is_in_points_with_corrected_p_values():
    ours = RANDOM.normal(0.80, 0.01, 10)
    found = table(afd_afs=(ours, ours), l2_taylor=(ours - RANDOM.normal(0.02, 0.005, 10), ours),
                  l2_l1=((ours + 0.01)[:3], ours[:3]))  # fmt: skip
    pairs = statistics.paired_table(found).set_index("method")
    assert list(pairs.index) == ["l2+l1", "l2+taylor"] and list(pairs.seeds) == [3, 10]
    assert pairs.difference["l2+l1"] == pytest.approx(-1) and pairs.low["l2+taylor"] < pairs.difference["l2+taylor"]
    assert pairs.p_holm["l2+taylor"] == pytest.approx(pairs.p["l2+taylor"])  # the larger of two
    assert (pairs.p_holm >= pairs.p).all()


@pytest.mark.parametrize(("shift", "words"), [(0.02, "points above"), (-0.02, "points below")])
def test_the_sentence_says_its_sign_its_rival_and_its_interval(shift, words):
    noise = np.array([0.001, -0.001, 0.0])
    found = table(afd_afs=(0.7 + shift + noise, [0.5] * 3), l2_taylor=([0.7] * 3, [0.6] * 3))
    text = statistics.sentence(found, names={"l2+taylor": "L2 + Taylor"})
    assert text.startswith(f"AFDS is 2.0 {words} the best of our competitors, L2 + Taylor, at 10x")
    assert f"{100 * shift:+.1f} [" in text and "3 paired seeds" in text and "\n" not in text
    wide = table(afd_afs=([0.6, 0.8, 0.7], [0.5] * 3), l2_taylor=([0.7, 0.69, 0.7], [0.6] * 3))
    assert statistics.sentence(wide).endswith("which is undecided.")
    assert "interval is not known" in statistics.sentence(wide[wide.seed == 0])
