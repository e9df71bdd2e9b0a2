"""Times of a sweep's networks are measured and kept; committed ones become tables and a figure."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from afdslib import runs
from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.inference import bench
from afdslib.report import plots, speed
from afdslib.studies import profiles
from afdslib.studies.profile import Candidates
from afdslib.studies.speed import Speed
from afdslib.studies.sweep import Study
from afdslib.training.objective import Regulariser

SETTINGS = bench.Settings(batches=(1, 2), repeats=3, warmup=0, steady=0.0)
FOUR = bench.Settings(threads=2, repeats=4)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFDS_HOME", str(tmp_path_factory.mktemp("home")))
        demo, few = profiles.get("demo"), {"steps": 2, "log_rows": 1}
        profile = replace(
            demo, name="imagenet32", committed=True, seeds=(0,), budgets=(1.0, 0.2), macs_images=20,
            network=replace(demo.network, width=0.0625), source_training=replace(demo.source_training, **few),
            afs_training=replace(demo.afs_training, **few), transfer=replace(demo.transfer, **few),
            tuning=replace(demo.tuning, **few), candidates=(Candidates(Regulariser("l2", 1e-4), (1e-4,)),)
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


def test_without_weights_nothing_is_measured_and_the_number_of_threads_is_given_back(study, monkeypatch):
    sweep, before = study.sweep(), torch.get_num_threads()
    speed.measure(study, sweep, method="l2", settings=replace(SETTINGS, threads=2))
    assert torch.get_num_threads() == before
    monkeypatch.setattr(runs, "lookup", lambda config, **kwargs: None)
    table = speed.measure(study, sweep, method="l2", settings=SETTINGS)
    assert table.empty and speed.sentence(table, sweep).startswith("Not measured")
    assert isinstance(plots.latency(table).axes[0].texts[0].get_text(), str)


# the committed measurements


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))

    def write(name, rows):
        return bench.to_csv(rows, FOUR, paths.results("speed") / f"{name}.csv")

    return write


def network(variant, runtime, ms, reduction=1.0, batch=1, note=None):
    row = bench.Row("networks", "resnet101-10x", runtime, batch, variant, "dense", 224, 1.0, note=note or "")
    return bench.replace(row, median_ms=ms, q1_ms=ms - 1, q3_ms=ms + 1, speedup=1.0, reduction=reduction)


def test_each_network_stands_in_its_fastest_runtime(write):
    refused = bench.Row("networks", "resnet101-10x", "compiled", 1, "compact", "dense", 224, 1.0, note="not here")
    write("a", [
        network("dense", "onnxruntime", 40.0), network("dense", "eager", 90.0), refused,
        network("compact", "onnxruntime", 8.0, 10.0, note="masks of x.json"), network("compact", "eager", 50.0, 10.0),
        network("torch-pruning", "eager", 10.0, 10.4)
    ])  # fmt: skip
    rows = speed.best(speed.benchmarks()).set_index("variant")
    assert rows.faster.to_dict() == pytest.approx({"dense": 1.0, "compact": 5.0, "torch-pruning": 4.0})
    assert rows.runtime.to_dict() == {"dense": "onnxruntime", "compact": "onnxruntime", "torch-pruning": "eager"}
    text = str(speed.networks_text(speed.benchmarks())._repr_markdown_())
    assert "| compact | 10.0x | 8.0 | onnxruntime | 5.00x | 0.50 |" in text.replace("--:", "")
    assert "2 threads" in text and "compact: masks of x.json" in text


def test_networks_stand_in_the_order_of_the_file_with_the_accuracy_of_their_masks(write):
    rows = [
        bench.replace(network(variant, "eager", 9.0), network=f"resnet101-{times}")
        for times in ("2x", "10x") for variant in ("dense", "compact")
    ]  # fmt: skip
    write("a", rows)
    assert "Test accuracy" not in speed.networks_text(speed.benchmarks())._repr_markdown_()
    settings = runs.to_json(Speed())
    for budget, accuracy in ((0.1, 0.25), (0.5, 0.5)):
        found = {"architecture": {"name": "resnet101"}, "masks": {"conv1": "s"}, "budget": budget, "training": settings}
        file = paths.results("speed") / f"resnet101-{1 / budget:g}x.json"
        file.write_text(json.dumps(found | {"metrics": {"test_accuracy": accuracy}}))
    text = speed.networks_text(speed.benchmarks())._repr_markdown_()
    assert text.index("resnet101-2x") < text.index("resnet101-10x")
    assert "60 images per class at 64 px" in text and text.endswith("Test accuracy: 2x 50.0 %, 10x 25.0 %.")


def test_a_narrow_network_or_small_images_are_no_full_network(write):
    rows = [network("dense", "eager", 40.0), network("compact", "eager", 20.0, 2.0)]
    write("a", rows + [bench.replace(row, size=32, width=0.125, median_ms=row.median_ms / 40) for row in rows])
    found = speed.best(speed.benchmarks())
    assert len(found) == 4 and found.groupby(["size", "width"]).faster.max().tolist() == [2.0, 2.0]
    text = speed.networks_text(speed.benchmarks())._repr_markdown_()
    assert "32 px" in text and "resnet101-10x of width 0.125" in text


def test_batches_and_files_stay_apart(write):
    masks = "masks of x.json"
    write("a", [network("dense", "eager", 40.0), network("compact", "eager", 20.0, 2.0, note=masks)])
    write("b", [network("dense", "eager", 9.0, batch=16), network("compact", "eager", 3.0, 2.0, batch=16, note=masks)])
    rows = speed.best(speed.benchmarks())
    found = {(r.file, r.batch): r.faster for r in rows.itertuples() if r.variant == "compact"}
    assert found == pytest.approx({("speed/a.csv", 1): 2.0, ("speed/b.csv", 16): 3.0})
    figure = plots.speed(rows)
    assert [ax.get_legend().get_title().get_text().split(",")[0] for ax in figure.axes] == ["batch 1", "batch 16"]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([2.0])


def test_networks_with_random_masks_are_no_point_of_the_figure(write):
    random = network("compact", "eager", 10.0, 4.0, note="random masks: 0.2 inner")
    rows = [network("dense", "eager", 40.0), network("compact", "eager", 20.0, 2.0, note="masks of x.json")]
    rows += [bench.replace(row, network="resnet50") for row in (network("dense", "eager", 40.0), random)]
    write("a", rows)
    table = speed.best(speed.benchmarks())
    assert list(plots.speed(table).axes[0].lines[0].get_xdata()) == [2.0]
    assert "No speed is shown" in plots.speed(table[table.network == "resnet50"]).axes[0].texts[0].get_text()


def test_the_other_cases_name_their_ratio_the_right_way_round(write):
    row = bench.Row("training", "resnet101", "eager", 16, "AFDS", "plain", 64, 0.5, 1600.0, 1500.0, 1700.0)
    slower = bench.replace(row, speedup=0.625, speedup_q1=0.6, speedup_q3=0.64)
    weighed = bench.Row("memory", "resnet50", "eager", 1, "dense", "dense", 224, 1.0, peak_mib=123.4, file_mib=97.5)
    write("a", [slower, bench.replace(slower, variant="plain", speedup=1.0), weighed])
    text = speed.others_text(speed.benchmarks())._repr_markdown_()
    assert "| training, resnet101 of width 0.5, 64 px | 16 | eager | AFDS |" in text
    assert "1.60x [1.56, 1.67] the time of plain" in text and "| plain |" not in text
    assert "| memory, resnet50, 224 px | 1 | eager | dense |  |  | 123.4 | 97.5 |" in text


def test_nothing_measured_says_so_and_a_damaged_file_is_an_error(write):
    table = speed.benchmarks()
    assert table.empty and speed.best(table).empty
    for text in (speed.networks_text(table), speed.others_text(table)):
        assert text._repr_markdown_().startswith("Not measured")
    assert "No speed is shown" in plots.speed(speed.best(table)).axes[0].texts[0].get_text()
    path = write("a", [])
    assert speed.benchmarks().empty
    path.write_bytes(b"")
    with pytest.raises(AFDSError, match="no table"):
        speed.benchmarks()
