"""What stands behind the report is read from files, and the faults it names are those that the tests catch."""

import json
import re

import pytest
from test_mutants import FAULTS

from afdslib import runs
from afdslib.report import appendix as evidence
from afdslib.report import pipeline
from afdslib.runs import config
from afdslib.studies import results


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    monkeypatch.setenv("AFDS_FIGURES", str(tmp_path / "figures"))
    return tmp_path


def test_each_fault_names_mutants_that_a_test_catches():
    named = [mutant for _, mutants in evidence.faults() for mutant in mutants]
    caught = {mutant.__name__ for mutant, _, _ in FAULTS}
    assert len(named) == len(set(named)) and set(named) <= caught
    # The rest are faults of a careless MACs counter or sweep, not of the public reproduction.
    assert caught - set(named) == {
        "product_of_means", "stream_without_its_shortcut", "predictors_for_free", "each_budget_starts_from_the_source"
    }  # fmt: skip
    assert "`masks_per_layer`" in evidence.faults_table()._repr_markdown_()


def test_every_committed_table_is_shown_under_its_own_profile(home):
    assert "No result is committed" in evidence.committed_text()
    row = {"scale": "quick", "target": "t", "budget": 0.1, "macs": 0.1, "role": "part"}
    rows = [
        row | {"part": part, "method": method, "seed": seed, "test_accuracy": value, "run": str(seed)}
        for part, method in (("sweep", "l2"), ("comparison", "afd+afs"))
        for seed, value in enumerate((0.5, 0.6))
    ]
    row = {"scale": "quick", "part": "attention", "role": "student", "network": "s", "run": "x"}
    rows += [row | {"method": "alone", "test_accuracy": 0.7123}]
    rows += [row | {"method": "at", "teacher": "t", "test_accuracy": 0.75}]
    results.write("imagenet32", results.stored(rows))
    text = evidence.committed_text()
    assert "| 10x | 10.0 % | 55.0 ± 7.1 |" in text and "| AFD + AFS | 55.0 ± 7.1 |" in text
    assert "| s, AT from t | 75.0 | 75.0 to 75.0 | 1 |" in text and "71.2" in text
    assert "the comparison on t:" in text and text.count("**imagenet32, quick**") == 3
    assert "afds study --part attention --profile imagenet32 --scale quick" in text


def test_the_cost_is_the_sum_of_what_the_runs_took_and_every_kind_has_a_name_for_readers(home):
    lines = [{"environment": "e0", "value": runs.environment()}]
    for name, times in (("a", {"seconds": 1800}), ("b", {"seconds": 5400}), ("c", {})):
        line = {"id": name, "kind": "SourceRun", "environment": "e0", "config": {}, "metrics": {}, "times": times}
        lines.append(line)
    (home / "data/results/imagenet32").mkdir(parents=True)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (home / "data/results/imagenet32/runs.jsonl").write_text(text)
    ((profile, kind, _, count, hours),) = evidence.cost_table().rows
    assert (profile, kind, count, hours) == ("imagenet32", "source networks", "3", "2.00")
    kinds = {name for name, kind in config._registry.items() if kind.__module__.startswith("afdslib")}
    assert {name for name in kinds if name.endswith("Run")} == set(evidence.KINDS)


def test_every_figure_that_a_notebook_saves_has_its_command(monkeypatch, tmp_path):
    monkeypatch.setenv("AFDS_FIGURES", str(tmp_path))
    rows = evidence.figures_table("demo", "quick").rows
    saved = sum(path.read_text().count("plots.save(") for path in pipeline.notebooks())
    assert sum(len(row[0].split(", ")) for row in rows) == saved
    assert all("--profile demo --scale quick --notebook" in row[1] and row[2] == "not kept" for row in rows)


def test_every_reference_names_its_authors_title_year_and_where_it_is():
    lines = evidence.references().splitlines()
    assert len(lines) == len(evidence.CITED) and "{" not in evidence.references()
    form = re.compile(r"- .+: \*.+\*, (19|20)\d\d\. (arXiv \d{4}\.\d{4,5}|https://\S+)")
    assert not [line for line in lines if not form.fullmatch(line)]
    assert lines[0].startswith("- Wang et al.: *Pay Attention to Features, Transfer Learn Faster CNNs*, 2020.")
