"""Times of a sweep's networks are measured against the dense network, kept with the study and put into words."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from afdslib import runs
from afdslib.inference import bench
from afdslib.report import plots, speed
from afdslib.studies import profiles
from afdslib.studies.profile import Candidates
from afdslib.studies.sweep import Study
from afdslib.training.objective import Regulariser

SETTINGS = bench.Settings(batches=(1, 2), repeats=3, warmup=0, steady=0.0)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFDS_HOME", str(tmp_path_factory.mktemp("home")))
        demo, few = profiles.get("demo"), {"steps": 2, "log_rows": 1}
        profile = replace(
            demo, name="imagenet32", committed=True, seeds=(0,), budgets=(1.0, 0.2), macs_images=20,
            network=replace(demo.network, width=0.0625), source_training=replace(demo.source_training, **few),
            afs_training=replace(demo.afs_training, **few), transfer=replace(demo.transfer, **few),
            tuning=replace(demo.tuning, **few), candidates=(Candidates(Regulariser("l2", 1e-4), (1e-4,)),),
        )  # fmt: skip
        yield Study(profile, workers=1)


def test_each_network_is_timed_beside_the_dense_one(study):
    sweep = study.sweep()
    table = speed.measure(study, sweep, method="l2", settings=replace(SETTINGS, runtimes=("onnxruntime",)))
    assert set(table.runtime) == {"onnxruntime"}
    assert list(table) == speed.COLUMNS and table.groupby(["budget", "batch"]).size().tolist() == [1] * 4
    assert (table.median_ms > 0).all() and set(table.run) == set(sweep.run) and (table.threads == 1).all()
    unpruned, small = table[table.budget == 1].computed, table[table.budget == 0.2].computed
    assert unpruned.tolist() == pytest.approx([1.0, 1.0]) and (small < 0.8).all()
    text = speed.sentence(table, sweep)
    assert text.count("at 5x fewer MACs") == 2 and f"{table.speedup[table.budget == 0.2].iloc[0]:.2f}x as fast" in text
    axes = plots.latency(table).axes
    assert [line.get_label() for line in axes[1].lines if line.get_label() == "ideal"] == ["ideal"]


def test_kept_times_are_read_unless_they_are_of_other_networks_and_only_publishing_commits_them(study, monkeypatch):
    sweep = study.sweep()
    monkeypatch.setattr(speed, "SETTINGS", SETTINGS)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    assert speed.stored(study, sweep).empty and speed.write_times(study) is None
    first = speed.times(study, sweep, method="l2")
    assert len(speed.stored(study, sweep)) == len(first) == 4
    pd.testing.assert_frame_equal(speed.times(study, sweep, method="l2"), first, check_exact=False, rtol=1e-5)
    committed, here = study.folder() / "times.csv", speed._measured_here(study)
    assert not committed.exists() and speed.write_times(study) == committed
    kept = pd.read_csv(committed)
    for changed in (kept.assign(run="000000000000", median_ms=1e9), kept.assign(method="afd"), kept[kept.budget == 1]):
        for file in (here, committed):
            changed.to_csv(file, index=False)
        again = speed.times(study, sweep, method="l2")
        assert (again.median_ms < 1e9).all() and set(again.method) == {"l2"} and set(again.budget) == {1.0, 0.2}
    assert set(pd.read_csv(committed).budget) == {1.0}
    here.unlink()
    monkeypatch.setattr(runs, "lookup", lambda config, **kwargs: None)  # what is kept stays where networks are not
    assert set(speed.times(study, sweep, method="l2").budget) == {1.0} and not here.exists()


def test_without_weights_nothing_is_measured_and_it_says_so(study, monkeypatch):
    sweep = study.sweep()
    monkeypatch.setattr(runs, "lookup", lambda config, **kwargs: None)
    table = speed.measure(study, sweep, method="l2", settings=SETTINGS)
    assert table.empty and speed.sentence(table, sweep).startswith("Not measured")
    assert isinstance(plots.latency(table).axes[0].texts[0].get_text(), str)


def test_the_number_of_threads_is_given_back(study):
    before = torch.get_num_threads()
    speed.measure(study, study.sweep(), method="l2", settings=replace(SETTINGS, threads=2))
    assert torch.get_num_threads() == before
