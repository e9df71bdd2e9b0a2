"""A whole study in miniature: trials choose on validation, chains share their stages, tables are the same each time."""

import json
import math
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import tiny

from afdslib import afs, runs
from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.experiments import DataSource, Network
from afdslib.report import pages
from afdslib.report import sweep as summary
from afdslib.studies import engine, profiles, results
from afdslib.studies import plan as planning
from afdslib.studies.profile import Candidates
from afdslib.studies.sweep import Study
from afdslib.training.objective import Regulariser


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A tree of three colours of noise, and a run store that grows from test to test."""
    folder = tmp_path_factory.mktemp("shared")
    tiny.tree(folder / "tree")
    return folder


@pytest.fixture
def profile(home, shared, monkeypatch):
    monkeypatch.setenv("AFDS_RUNS", str(shared / "runs"))
    fit = replace(profiles.get("demo").transfer, steps=3, batch_size=8, log_rows=1)
    tree = DataSource(str(shared / "tree"), size=16)
    return replace(
        profiles.get("demo"), source=tree, targets=(replace(tree, per_class=6),),
        network=Network("resnet14", stem="cifar", width=1 / 16), source_training=fit, afs_training=fit, trial=fit,
        transfer=fit, tuning=fit, budgets=(1.0, 0.5), seeds=(0, 1), macs_images=18,
        candidates=(
            Candidates(Regulariser("l2", 1e-4), (1e-4, 1e-3)),
            Candidates(Regulariser("afd", 1e-3), (1e-3,)),
        ),
    )  # fmt: skip


def test_a_study_gives_one_row_per_method_seed_and_budget_and_the_same_table_twice(profile, home):
    table = Study(profile, workers=1).sweep()
    assert list(table.method.value_counts()) == [4, 4] and set(table.seed) == {0, 1}
    assert (table.macs[table.budget == 0.5] <= 0.55).all() and (table.macs[table.budget == 1] > 0.9).all()
    rows = engine.table(Study(profile))
    assert list(rows.role.value_counts()[["part", "afds", "source", "trial"]]) == [4, 4, 2, 2]
    study = Study(profile, workers=1)
    trials = study.trials()
    assert list(trials.strength) == [1e-4, 1e-3]
    for id in trials.run:
        metrics = runs.show(id)["result"]["metrics"]
        assert "validation_accuracy" in metrics and not any(key.startswith("test") for key in metrics)
    best = trials.strength[trials.validation_accuracy.idxmax()]
    assert study.regularisers["l2"].strength == best and study.regularisers["afd"].strength == 1e-3
    last, first = (study.transfer_run(profile.candidates[1].regulariser, 0, budget=b) for b in (0.5, 1.0))
    assert last.parent == first and runs.lookup(last).metrics["removed"] > 0 == runs.lookup(first).metrics["removed"]
    ids = {summary.id for summary in runs.list_runs()}
    Study(profile, workers=1).sweep()
    assert {summary.id for summary in runs.list_runs()} == ids  # nothing computed again
    pd.testing.assert_frame_equal(engine.table(Study(profile)), rows)
    assert not list(paths.figures("demo").glob("*.csv"))  # queries write nothing


def test_results_and_networks_of_a_real_study_can_be_committed_and_are_found_again(profile, home, shared, monkeypatch):
    monkeypatch.setenv("AFDS_RUNS", str(home / "runs"))
    fixed = (Candidates(Regulariser("l2", 1e-4), (1e-4,)), profile.candidates[1])
    real = replace(profile, name="imagenet32", committed=True, seeds=(0,), candidates=fixed)
    card = home / "data" / "weights" / "imagenet32.md"
    study = Study(real, workers=1)
    study.source()
    file = engine.publish(study)
    assert card.read_text().count("| `") == 1 and len(list(card.parent.glob("*.safetensors"))) == 1
    assert len(results.read("imagenet32")) == 1 and pages.write(study) == []
    if (shared / "runs").exists():  # what is trained already
        shutil.copytree(shared / "runs", home / "runs", dirs_exist_ok=True)
    table = study.sweep()
    assert engine.publish(study) == file and card.read_text().count("| `") == 2
    page = pages.write(study)[0].read_text()
    assert f"{100 * table.test_accuracy[table.budget == 0.5].iloc[0]:.1f}" in page and "| 2x |" in page
    (home / "runs").rename(home / "elsewhere")  # another machine, with the committed files only
    again = Study(real, workers=1)
    pd.testing.assert_frame_equal(again.sweep(), table)
    pd.testing.assert_frame_equal(engine.table(again), results.read("imagenet32"))
    source = runs.lookup(again.afs_source_run)
    assert source.committed and afs.layers(afs.load(source.artifact("model.safetensors")))
    assert not (home / "runs").exists()


def test_bad_names_are_one_sentence(profile):
    for make, words in (
        (lambda: profiles.get("x"), "unknown profile 'x'; known are demo"),
        (lambda: profiles.get("demo", "huge"), "unknown scale 'huge'"),
        (lambda: Study(profile).transfer_run(Regulariser("l2", 0.1), 0, budget=0.3), "not in the sweep"),
        (lambda: engine.publish(Study(profile)), "never committed"),
    ):
        with pytest.raises(AFDSError, match=words):
            make()


@pytest.mark.parametrize("name", profiles.names())
@pytest.mark.parametrize("scale", ["quick", "standard"])
def test_every_profile_is_shown_in_full_and_keeps_its_trial_seed_apart(name, scale):
    profile = profiles.get(name, scale)
    shown = json.loads(profiles.show(profile))
    assert shown["network"]["name"] == profile.network.name and 0.1 in shown["budgets"]
    assert profile.trial_seed not in profile.seeds


def test_the_plan_of_the_paper_profile_names_its_network_and_what_is_missing(home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: pytest.fail("a plan downloads nothing"))
    text = planning.describe(Study(profiles.get("paper")))
    assert "104 gated layers" in text and "7,801.4 M MACs" in text
    assert "stanford-dogs" in text.split("missing on this machine")[1]
    assert "resnet101-" in text and "has not been run" in text


def test_a_plan_only_looks_and_writes_nothing(profile, home):
    archive = home / "drop" / "hymenoptera-160.tar"
    archive.parent.mkdir()
    archive.write_bytes(b"half")
    targets = (*profile.targets, DataSource("hymenoptera-160", root=str(archive.parent)), DataSource("cifar10"))
    before = sorted((file, file.stat().st_mtime_ns) for file in home.rglob("*"))
    text = planning.describe(Study(replace(profile, targets=targets)))
    assert f"{archive} is truncated: it has 4 bytes instead of 5,560,320" in text
    assert "the data set cifar10 is not on this machine" in text and text.count("\n  - ") == 2
    assert sorted((file, file.stat().st_mtime_ns) for file in home.rglob("*")) == before


def test_targets_are_tuned_apart_and_a_trial_that_diverged_is_never_chosen(profile, home, monkeypatch):
    other = replace(profile.targets[0], per_class=7)
    study = Study(replace(profile, targets=(*profile.targets, other)), workers=1)
    assert list(study.targets) == ["tree-6", "tree-7"] and study.chance == {"tree-6": 1 / 3, "tree-7": 1 / 3}
    accuracies = {6: {1e-4: 0.5, 1e-3: 0.5}, 7: {1e-4: math.nan, 1e-3: 0.1}}  # NaN: that one diverged
    rows, by_id = [], {}
    for target in (*profile.targets, other):
        for strength, accuracy in accuracies[target.per_class].items():
            regulariser = replace(profile.candidates[0].regulariser, strength=strength)
            run = replace(study.transfer_run(regulariser, profile.trial_seed, target=target), use_test=False)
            metrics = {} if math.isnan(accuracy) else {"validation_accuracy": accuracy}
            by_id[runs.run_id(replace(run, optimisation=profile.trial))] = metrics
            rows.append({"target": target.title, "method": "l2", "strength": strength, "validation_accuracy": accuracy})
    monkeypatch.setattr(study, "_compute", lambda configs: [])
    monkeypatch.setattr(engine, "lookup", lambda config: runs.Result("x", by_id[runs.run_id(config)], home))
    monkeypatch.setattr(study, "trials", lambda: pd.DataFrame(rows))
    assert study.regularisers["l2"].strength == 1e-4 and study.chosen(other)["l2"].strength == 1e-3
    assert study.point_run("l2", 0, target=other).regulariser.strength == 1e-3
    assert study.point_run("l2", 0, target=other).data == other
    text = summary.strengths_text(study)
    assert "images of tree-6: L2 0.0001" in text and "images of tree-7: L2 0.001" in text
    with pytest.raises(AFDSError, match="same title"):
        Study(replace(profile, targets=(other, replace(other, size=24))))


def test_a_point_that_diverges_is_missing_with_its_reason_and_the_others_are_there(profile):
    wild = replace(profile, budgets=(1.0, 0.5, 0.25), seeds=(0,), tuning=replace(profile.tuning, lr=1e30))
    study = Study(wild, workers=1)
    table = study.sweep(methods=["l2", "afd"])
    assert list(table.budget) == [1.0, 1.0]
    missing = table.attrs["missing"]
    assert [(m["method"], m["budget"]) for m in missing] == [("l2", 0.5), ("l2", 0.25), ("afd", 0.5), ("afd", 0.25)]
    assert all("at 2x, the loss term" in m["reason"] and "step" in m["reason"] for m in missing)
    ids = {run.id for run in runs.list_runs()}
    study.sweep()
    assert {run.id for run in runs.list_runs()} == ids  # a divergence is a result, computed once
    assert (results.select(engine.table(study), role=("afds", "part")).reason != "").sum() == 4
    assert "Missing: L2 seed 0 at 2x" in summary.differences_text(table, budgets=(1.0,))
