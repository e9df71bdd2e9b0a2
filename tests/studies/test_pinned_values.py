"""Every cell of the tables as they were committed before there was one, against what is made of results.csv now."""

import io
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from afdslib.report.comparison import Compared
from afdslib.studies import profiles, results, statistics, students
from afdslib.studies.comparison import TIMES, Comparison, costs, macs_needed

BEFORE = "d963105:data/results"
TARGETS = {"imagenet32": "cifar10-60", "imagenet32-disjoint": "tiny-imagenet-32-target40-60"}
SENTENCES = {
    "imagenet32": "AFDS is 2.9 points below the best of our competitors, L2 + narrower network with KD, at 10x "
    "(difference -2.9 [-3.6, -2.2] points, 10 paired seeds).",
    "imagenet32-disjoint": "AFDS is 5.8 points below the best of our competitors, L2 + narrower network, at 10x "
    "(difference -5.8 [-9.1, -2.4] points, 5 paired seeds).",
}


def before(file: str) -> pd.DataFrame:
    """A table of the history, its cells as text."""
    shown = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "show", f"{BEFORE}/{file}"], capture_output=True, text=True
    )
    if shown.returncode:
        pytest.skip("the history of the tables is not there (a shallow clone, or no clone)")
    return pd.read_csv(io.StringIO(shown.stdout), dtype=str, keep_default_na=False)


def same(table: pd.DataFrame, file: str, rel: float = 0.0, **renamed: str) -> None:
    """Cell by cell; figures that are means of the table's own six digits may differ in the last of theirs."""
    old = before(file)
    text = table.rename(columns=renamed)[list(old)].to_csv(index=False, float_format="%.6g")
    now = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    assert len(now) == len(old)
    for column in old:
        for one, other in zip(now[column], old[column], strict=True):
            if one != other:
                assert float(one) == pytest.approx(float(f"{float(other):.6g}"), rel=rel, abs=0), (file, column)


@pytest.fixture(scope="module", params=TARGETS)
def compared(request):
    return Compared(Comparison(profiles.get(request.param, "quick")))


def test_the_comparisons_are_what_they_were(compared):
    p = compared.comparison.profile
    folder, budget = f"{p.name}/quick/comparison-{TARGETS[p.name]}", compared.budget
    same(compared.table, f"{folder}/comparison.csv")
    same(results.view(compared.points, TIMES), f"{folder}/times.csv")
    same(compared.trials, f"{folder}/trials.csv")
    same(compared.missing, f"{folder}/missing.csv")
    same(costs(compared.table, budget), f"{folder}/costs.csv", rel=5e-6)
    same(macs_needed(compared.table), f"{folder}/macs_within.csv", rel=5e-6)
    same(statistics.paired_table(compared.table, budget=budget), f"{folder}/paired.csv", rel=5e-6)
    same(compared.attention, f"{folder}/attention.csv")
    assert compared.comparison.finished and compared.comparison.sentence() == SENTENCES[p.name]


def test_what_is_beside_the_comparisons_is_what_it_was():
    first, second = (Compared(Comparison(profiles.get(name, "quick"))) for name in TARGETS)
    folder = f"imagenet32/quick/comparison-{TARGETS['imagenet32']}"
    same(first.beside["ablations"], f"{folder}/ablations.csv")
    same(first.beside["equal_time"], f"{folder}/equal_time.csv")
    same(second.beside["settled"], f"imagenet32-disjoint/quick/comparison-{TARGETS['imagenet32-disjoint']}/settled.csv")


def test_the_sweep_and_the_students_are_what_they_were():
    same(results.named("imagenet32/quick/sweep"), "imagenet32/quick/sweep.csv")
    same(results.named("imagenet32/quick/sweep/trials"), "imagenet32/quick/trials.csv")
    same(results.named("imagenet32/quick/attention"), "imagenet32/quick/attention.csv", strength="weight")
    same(results.named("imagenet32/quick/attention/trials"), "imagenet32/quick/attention_trials.csv")
    study = students.DistillationStudy(students.get("attention", "imagenet32", "quick"), complete=False)
    same(study.reach(), "imagenet32/quick/attention_steps.csv")
