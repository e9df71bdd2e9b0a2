"""Tables and sentences of the report: computed from tables, exact, and honest about few seeds."""

import itertools

import pandas as pd
import pytest

from afdslib.base.errors import AFDSError
from afdslib.data import load
from afdslib.report import sweep as results
from afdslib.report import tables
from afdslib.studies import profiles


@pytest.fixture
def sweep():
    accuracies = {
        ("l2", 1.0): (0.50, 0.60),
        ("afd", 1.0): (0.53, 0.65),
        ("l2", 0.1): (0.4, 0.2),
        ("afd", 0.1): (0.3, 0.3),
    }
    rows = [(*key, seed, value) for key, values in accuracies.items() for seed, value in enumerate(values)]
    table = pd.DataFrame(rows, columns=["method", "budget", "seed", "test_accuracy"])
    b = table.budget
    table = table.assign(target="toy", macs=b, macs_predictors=0.01, density=b.clip(lower=0.5), parameters=1000 * b)
    return table.assign(dynamic=10 * b, static=1, removed=10 - 10 * b, dead_gates=0.1, gate_variance=0.2)


def test_table_shows_mean_and_standard_deviation_over_seeds(sweep):
    table = results.accuracy_table(sweep)
    assert table.header == ["reduction", "measured MACs", "L2 (%)", "AFD (%)"]
    assert table.rows == [["1x", "100.0 %", "55.0 ± 7.1", "59.0 ± 8.5"], ["10x", "10.0 %", "30.0 ± 14.1", "30.0 ± 0.0"]]
    assert results.accuracy_table(sweep[sweep.seed == 0]).rows[0][2] == "50.0"  # no spread from one seed
    assert table._repr_markdown_().splitlines()[2] == "| 1x | 100.0 % | 55.0 ± 7.1 | 59.0 ± 8.5 |"
    assert repr(table).splitlines()[1].startswith("1x")


@pytest.mark.parametrize(
    "values, words",
    [
        ((0.53, 0.65), "+4.0 [-8.7, +16.7] points, 2 paired seeds: undecided"),
        ((0.45, 0.55), "-5.0 [-5.0, -5.0] points, 2 paired seeds: worse, of too few seeds to conclude"),
        ((0.45, 0.66), "+0.5 [-69.4, +70.4] points, 2 paired seeds: undecided"),
    ],
)
def test_sentence_says_how_the_difference_compares_with_its_spread(sweep, values, words):
    sweep.loc[(sweep.method == "afd") & (sweep.budget == 1), "test_accuracy"] = values
    text = results.differences_text(sweep, budgets=(1.0,))
    assert f"**1x**, toy: AFD minus L2: {words}." in text


def test_differences_are_paired_and_one_seed_has_no_spread_many_no_warning_and_what_rounds_to_zero_no_minus(sweep):
    missing = sweep[~((sweep.method == "l2") & (sweep.seed == 1))]
    assert "+3.0 points, 1 paired seed: undecided" in results.differences_text(missing)
    many = pd.concat([sweep.assign(seed=sweep.seed + 2 * i) for i in range(3)])
    assert "6 paired seeds" in results.differences_text(many) and "too few" not in results.differences_text(many)
    sweep.loc[(sweep.method == "afd") & (sweep.budget == 1), "test_accuracy"] = (0.4999, 0.5999)
    assert "+0.0" in results.differences_text(sweep, budgets=(1.0,))


def test_missing_rows_are_one_sentence_and_those_that_are_there_are_shown(sweep):
    with pytest.raises(AFDSError, match="no seed with both afd and at"):
        results.differences_text(sweep, "afd", "at")
    with pytest.raises(AFDSError, match="no row of method 'at'"):
        tables.smallest(sweep, "at")
    with pytest.raises(AFDSError, match="no seed with both afd and l2 at 4x"):
        results.differences_text(sweep, budgets=(0.25,))
    row = tables.smallest(sweep)
    assert (row.budget, row.seed, row.method) == (0.1, 0, "afd")
    assert results.budgets_of(sweep) == [1.0, 0.1]
    assert results.growing(sweep, "removed") and not results.growing(sweep, "parameters")
    assert results.network_table(sweep, "afd").rows[1] == ["10x", "0.50", "10.0 %", "1.0 %", "0", "1", "1", "9"]


def test_several_targets_have_a_column_and_a_sentence_each(sweep):
    both = pd.concat([sweep, sweep.assign(target="other", test_accuracy=0.25)])
    table = results.accuracy_table(both)
    assert table.header[:2] == ["target", "reduction"] and [row[0] for row in table.rows] == ["toy"] * 2 + ["other"] * 2
    assert table.rows[0][3] == "55.0 ± 7.1" and table.rows[2][3] == "25.0 ± 0.0"
    assert results.accuracy_table(both, target="other").rows[0] == table.rows[2][1:]
    assert [row[:2] for row in results.network_table(both, "afd").rows] == [row[:2] for row in table.rows]
    assert "1x**, other:" in results.differences_text(both) and "1x**, toy:" in results.differences_text(both)


def test_a_data_set_is_described_and_one_that_is_not_read_says_so():
    source, target = load("digits"), load("digits-5-9", per_class=12)
    text = results.about_data(target, source)
    assert "size of an image: 32 x 32 pixels" in text and "shared with the source: 5, 6, 7, 8, 9" in text
    assert "fitting images: 1.00" in text and "shared" not in results.about_data(source)
    assert results.about_data(None) == results.PUBLISHED
    assert "shared with the source: none" in results.about_data(target, load("digits-0-4"))


def test_channels_left_checks_what_it_counts():
    good = {"a": {"channels": 4, "removed": 1, "static": 2, "dynamic": 1}}
    assert results.channels_left(good) == 0.75
    with pytest.raises(AFDSError, match="lost all"):
        results.channels_left({"a": {"channels": 4, "removed": 4, "static": 0, "dynamic": 0}})
    with pytest.raises(AFDSError, match="not all its channels"):
        results.channels_left({"a": {"channels": 4, "removed": 1, "static": 1, "dynamic": 1}})


def test_scope_says_what_the_numbers_cannot_say():
    assert "too small" in results.scope_text(profiles.get("demo"))
    assert "has not been run" in results.scope_text(profiles.get("paper"))


def test_settings_name_every_stage_of_every_profile():
    for name, budget in itertools.product(profiles.names(), ("quick", "standard")):
        profile = profiles.get(name, budget)
        shown = dict(results.settings(profile).rows)
        assert str(profile.transfer.steps) in shown["transfer, unpruned"] and "10x" in shown["budgets"]
        assert shown["regularisers"].count("{") == len(profile.candidates)
        assert results.networks(profile) % len(profile.seeds) == 0
