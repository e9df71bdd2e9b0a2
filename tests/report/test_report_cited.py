"""A number of the report is in a result file, or there is one sentence about what is missing."""

import math
import re

import pandas as pd
import pytest
from scipy import stats

from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.report import numbers as cited

FILE = "toy/quick/sweep.csv"


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """Two methods, three seeds, two budgets; one cell is empty."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    rows = [
        (m, None if m == "l2" else "big", s, b, a + s / 100 + b / 10)
        for m, a in (("l2", 0.5), ("afd", 0.53)) for s in range(3) for b in (1.0, 0.1)
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "teacher", "seed", "budget", "test_accuracy"])
    table.loc[len(table) - 1, "test_accuracy"] = math.nan
    file = paths.results("toy") / "quick" / "sweep.csv"
    file.parent.mkdir(parents=True)
    table.to_csv(file, index=False)
    return file


def sentence(info) -> str:
    text = str(info.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("column", "row", "words"),
    [
        ("accuracy", {"method": "l2"}, "has no column 'accuracy'; it has method, teacher, seed"),
        ("test_accuracy", {"way": "l2"}, "has no column 'way'"),
        ("test_accuracy", {"method": "l3"}, "has no row with method = 'l3'"),
        ("test_accuracy", {"method": "l2", "seed": 7}, "has no row with method = 'l2', seed = 7"),
        ("test_accuracy", {"method": "l2", "seed": 0}, "several rows per seed with method = 'l2', seed = 0; name more"),
        ("test_accuracy", {"method": 3}, "holds text"),
        ("test_accuracy", {"method": "afd", "seed": 2, "budget": 0.1}, "no number in column 'test_accuracy'"),
        ("method", {"method": "l2", "seed": 0, "budget": 0.1}, "no number in column 'method'"),
        ("test_accuracy", {}, "several rows per seed with any value"),
    ],
)
def test_what_is_missing_or_ambiguous_is_one_sentence(column, row, words):
    with pytest.raises(AFDSError) as info:
        cited.mean(FILE, column, **row)
    assert words in sentence(info) and FILE in sentence(info)


def test_a_missing_or_damaged_file_is_one_sentence(table):
    with pytest.raises(AFDSError, match=re.escape("toy/none.csv does not exist")) as info:
        cited.mean("toy/none.csv", "a")
    assert sentence(info)
    for content in (b"", b"\xff\xfe\x00\x81", b'a,b\n1,2\n1,2,3,"\n'):
        table.write_bytes(content)
        with pytest.raises(AFDSError, match="is no table") as info:
            cited.mean(FILE, "a")
        assert sentence(info)


def test_a_mean_has_students_interval_over_seeds():
    found = cited.mean(FILE, "test_accuracy", unit="%", method="l2", budget=1)
    low, high = stats.t.interval(0.95, 2, loc=61, scale=stats.sem([60, 61, 62]))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((61, low, high, 3))
    assert str(found) == f"61.0 [{low:.1f}, {high:.1f}] %"
    one = cited.mean(FILE, "test_accuracy", unit="%", method="l2", seed=1, budget=0.1)
    assert str(one) == "52.0 %" and one.n == 1
    assert len(cited.rows(FILE, "test_accuracy", teacher="")) == 6  # an empty cell is matched by empty text
    assert set(cited.rows(FILE, "test_accuracy", teacher="big").method) == {"afd"}


def test_a_difference_is_paired_and_signed(table):
    found = cited.difference(FILE, "test_accuracy", {"method": "afd"}, {"method": "l2"}, budget=1.0)
    assert str(found) == "+3.0 [+3.0, +3.0] points" and found.n == 3
    with pytest.raises(AFDSError, match="no number"):
        cited.difference(FILE, "test_accuracy", {"method": "afd"}, {"method": "l2"}, budget=0.1)
    changed = pd.read_csv(table)
    changed[(changed.method == "l2") | (changed.seed == 0)].to_csv(table, index=False)
    one = cited.difference(FILE, "test_accuracy", {"method": "afd"}, {"method": "l2"}, budget=0.1)
    assert one.n == 1 and str(one) == "+3.0 points"  # one seed has no interval
    assert str(cited.Number(-0.04, "points", signed=True)) == "+0.0 points"
