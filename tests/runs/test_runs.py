"""The run store: computed once, resumed after any kill, and every damaged file told in one sentence."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
import toy_runs
from forked import ended, start
from toy_runs import Schedule, ToySource, ToyTrain

from afdslib import runs
from afdslib.base import paths
from afdslib.base.errors import AFDSError, BusyError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store in an empty project."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AFDS_FRESH", raising=False)
    monkeypatch.delenv("AFDS_RUNS", raising=False)
    return tmp_path / "runs"


def unexpected(*_):
    raise AssertionError("executed again")


def sentence(info) -> str:
    text = str(info.value)
    assert "\n" not in text and text
    return text


@pytest.fixture
def first(store):
    """A finished run."""
    return runs.get_or_run(ToyTrain(), store=store)


def test_the_id_of_a_configuration_never_changes_nor_depends_on_the_process(monkeypatch):
    config = ToyTrain("golden", 8, schedule=Schedule(0.25, (3, 5), None), source=ToySource(4, seed=1))
    code = "import toy_runs; from afdslib import runs; print(runs.run_id(toy_runs.ToyTrain()))"
    path = f"{paths.root()}:{Path(toy_runs.__file__).parent}"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == runs.run_id(ToyTrain())
    monkeypatch.setattr("afdslib.runs.config.RESULTS_VERSION", 1)
    assert runs.run_id(config) == "abffcc2ed981"


OTHERS = [
    ToyTrain(steps=7), ToyTrain(name="toy2"), ToyTrain(schedule=Schedule(lr=0.25)), ToyTrain(shift=0.5),
    ToyTrain(schedule=Schedule(milestones=(2,))), ToyTrain(schedule=Schedule(decay=0.0)), ToyTrain(source=ToySource()),
    ToyTrain(source=ToySource(seed=1)),
]  # fmt: skip


def test_every_changed_field_the_class_and_the_version_give_another_id_and_the_order_of_fields_does_not(monkeypatch):
    ids = [runs.run_id(config) for config in (ToyTrain(), *OTHERS)]
    assert len(set(ids)) == len(ids)
    same_fields = dataclasses.make_dataclass("Other", [("steps", int, 3), ("seed", int, 0)], frozen=True)
    assert runs.run_id(same_fields()) != runs.run_id(ToySource())

    def make(names):
        return dataclasses.make_dataclass("Ordered", [(name, int) for name in names], frozen=True)

    assert runs.run_id(make("abc")(a=1, b=2, c=3)) == runs.run_id(make("cab")(a=1, b=2, c=3))
    monkeypatch.setattr("afdslib.runs.config.RESULTS_VERSION", runs.RESULTS_VERSION + 1)
    assert runs.run_id(ToyTrain()) not in ids


def test_unhashed_fields_defaults_of_added_ones_and_integers_for_floats_keep_the_id():
    assert "shift" not in runs.to_json(ToyTrain(), hashed_only=True) and runs.to_json(ToyTrain())["shift"] == 0.0
    for same in (ToyTrain(folder="elsewhere", pause=3.0), ToyTrain(shift=0)):
        assert runs.run_id(same) == runs.run_id(ToyTrain())
    assert runs.run_id(ToyTrain(schedule=Schedule(lr=1))) == runs.run_id(ToyTrain(schedule=Schedule(lr=1.0)))


def test_configuration_survives_json():
    config = ToyTrain("x", 3, schedule=Schedule(float("inf"), (1,), 0.5), source=ToySource(seed=4), folder="f")
    data = json.loads(json.dumps(runs.to_json(config), allow_nan=False))
    assert runs.from_json(data) == config
    assert runs.from_json({**data, "source": None}) == dataclasses.replace(config, source=None)
    with pytest.raises(AFDSError, match="unknown kind of run 'Nobody'"):
        runs.from_json({"class": "Nobody"})
    with pytest.raises(AFDSError, match="no field 'colour'"):
        runs.from_json({**data, "colour": 1})


def test_values_without_a_canonical_form_and_classes_that_are_not_frozen_or_of_a_used_name_are_refused():
    for value in ([1], {"a": 1}, float("nan"), numpy.zeros(2)):
        with pytest.raises(TypeError, match="ToyTrain.name"):
            runs.run_id(ToyTrain(name=value))
    used = dataclasses.make_dataclass("ToyTrain", [("a", int)], frozen=True)
    for cls, words in ((dataclass(type("Mutable", (), {})), "frozen"), (used, "already registered")):
        with pytest.raises(TypeError, match=words):
            runs.register(cls)


def test_second_call_returns_the_stored_result_without_executing(store, first, monkeypatch):
    monkeypatch.setattr(ToyTrain, "execute", unexpected)
    second = runs.get_or_run(ToyTrain(folder="/nowhere"), store=store)
    assert second == first == runs.lookup(ToyTrain(), store=store)
    assert first.metrics["pair"] == [1, 2] and first.path == store / first.id
    names = {file.name for file in first.path.iterdir()}
    assert names == {"config.json", "environment.json", "metrics.csv", "times.json", "result.json", "model.txt"}
    record = json.loads((first.path / "result.json").read_text())
    assert record == {"id": first.id, "kind": "ToyTrain", "version": runs.RESULTS_VERSION, "metrics": first.metrics}
    assert "torch" in json.loads((first.path / "environment.json").read_text())["versions"]
    assert list(first.history()["step"]) == [1, 2, 3, 4, 5, 6]
    shown = runs.show(first.id[:4], store=store)
    assert shown["state"] == "finished" and shown["config"]["schedule"]["lr"] == 0.5
    assert shown["result"]["metrics"] == first.metrics and shown["files"]["model.txt"] > 0


def test_nested_parent_is_computed_once_and_shared_in_the_store_of_the_environment(store, monkeypatch):
    monkeypatch.setenv("AFDS_RUNS", str(store / "elsewhere"))
    child = runs.get_or_run(ToyTrain(source=ToySource()))
    parent = runs.lookup(ToySource())
    assert parent is not None and parent.path.parent == child.path.parent == store / "elsewhere"
    runs.get_or_run(ToyTrain(source=ToySource(), steps=2))
    assert sorted(summary.kind for summary in runs.list_runs()) == ["ToySource", "ToyTrain", "ToyTrain"]
    assert runs.require_training() == {"ToySource": 3, "ToyTrain": 8}


def test_finished_run_without_the_needed_artifact_is_computed_again(store, first):
    first.artifact("model.txt").unlink()
    assert runs.lookup(ToyTrain(), store=store, needs=("model.txt",)) is None
    with pytest.raises(AFDSError, match="has no model.txt"):
        first.artifact("model.txt")
    again = runs.get_or_run(ToyTrain(), store=store, needs=("model.txt",))
    assert again.metrics == first.metrics and again.artifact("model.txt").read_text() == repr(first.metrics["weight"])
    assert list(again.history()["step"]) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(AFDSError, match="ended without writing other.txt"):
        runs.get_or_run(ToyTrain(steps=1), store=store, needs=("other.txt",))


@needs_fork
def test_two_processes_compute_a_run_once(store, tmp_path):
    config = ToyTrain(folder=str(tmp_path), pause=0.05)
    children = [start(lambda: runs.get_or_run(config, store=store)) for _ in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    assert (tmp_path / "executions.txt").read_text() == "started\n"
    assert runs.lookup(config, store=store) is not None


def test_an_interrupted_run_resumes_to_the_numbers_of_an_uninterrupted_one_but_not_in_another_version(store, tmp_path):
    id = interrupt(store)
    assert [run.state for run in runs.list_runs(store)] == ["interrupted"]
    with mock.patch("afdslib.runs.config.RESULTS_VERSION", runs.RESULTS_VERSION + 1):
        with pytest.raises(AFDSError, match=f"another version of afdslib; delete it with: afds runs rm {id}"):
            runs.resume(id, store=store)
    resumed, whole = runs.resume(id[:6], store=store), runs.get_or_run(ToyTrain(), store=tmp_path / "whole")
    assert resumed.metrics == whole.metrics
    assert (resumed.path / "metrics.csv").read_bytes() == (whole.path / "metrics.csv").read_bytes()
    assert json.loads((resumed.path / "times.json").read_text())["sessions"] == 2


def interrupt(store: Path) -> str:
    """Leaves a run that stopped after its last checkpoint."""
    with mock.patch.object(runs.Run, "write_artifact", unexpected), pytest.raises(AssertionError):
        runs.get_or_run(ToyTrain(), store=store)
    return runs.run_id(ToyTrain())


@pytest.fixture
def run(store):
    path = store / ("0" * 12)
    path.mkdir(parents=True)
    return runs.Run(path.name, path, store)


def test_rows_with_different_columns_share_a_header(run):
    run.log({"step": 1, "loss": 0.5})
    run.log({"step": 2, "accuracy": torch.tensor(0.25), "note": "two\nlines, one row"})
    run.log({"step": 3, "loss": numpy.float64(0.125)})
    rows = ["step,loss,accuracy,note", "1,0.5,,", '2,,0.25,"two lines, one row"', "3,0.125,,"]
    assert (run.path / "metrics.csv").read_text().splitlines() == rows
    with pytest.raises(ValueError, match="step"):
        run.log({"loss": 1.0})


def test_a_torn_last_line_and_the_rows_after_a_checkpoint_are_dropped(run):
    file = run.path / "metrics.csv"
    file.write_text("step,loss\n1,0.5\n2,1.0\n3,1.5\n4,2.")
    run.truncate_log(2)
    assert file.read_text() == "step,loss\n1,0.5\n2,1.0\n"
    file.write_text("step,loss\n1,0.5\n2,0.")
    again = runs.Run(run.id, run.path, run.store)
    again.log({"step": 2, "loss": 0.25})
    assert file.read_text() == "step,loss\n1,0.5\n2,0.25\n"


def test_artifact_is_whole_or_absent(run):
    run.write_artifact("a.txt", lambda path: path.write_text("old"))

    def broken(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.write_artifact("a.txt", broken)
    assert run.artifact("a.txt").read_text() == "old" and [file.name for file in run.path.iterdir()] == ["a.txt"]
    for name in ("../a", "result.json", ".hidden", "a/b", ""):
        with pytest.raises(ValueError, match="artifact"):
            run.artifact(name)


def test_checkpoint_returns_tensors_and_plain_data_and_one_of_another_architecture_is_one_sentence(run):
    assert run.load_checkpoint() is None
    model = torch.nn.Linear(3, 2).state_dict()
    run.save_checkpoint({"step": 3, "model": model, "rng": torch.get_rng_state(), "order": [2, 0, 1]})
    state = run.load_checkpoint()
    assert state["order"] == [2, 0, 1] and torch.equal(state["model"]["weight"], model["weight"])
    with pytest.raises(AFDSError) as info, run.restoring():
        torch.nn.Linear(4, 2).load_state_dict(state["model"])
    assert "does not fit this network" in sentence(info) and f"afds runs rm {run.id}" in sentence(info)
    with pytest.raises(AFDSError, match="does not fit"), run.restoring():
        state["optimizer"]


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    changed = {"truncated": content[: len(content) // 2], "empty": b"", "binary": os.urandom(64)}
    file.write_bytes(changed.get(how, how.encode()))


@pytest.mark.parametrize(("name", "how"), [
    *(("result.json", how) for how in ("truncated", "empty", "binary", "[]", "{}", '{"id": "0", "metrics": {}}')),
    *(("checkpoint.pt", how) for how in ("truncated", "empty", "binary", "hello")),
])  # fmt: skip
def test_a_damaged_file_is_one_sentence_and_rm_helps(store, name, how):
    id = interrupt(store) if name == "checkpoint.pt" else runs.get_or_run(ToyTrain(), store=store).id
    file = store / id / name
    damage(file, how)
    with pytest.raises(AFDSError) as info:
        runs.get_or_run(ToyTrain(), store=store)
    assert str(file) in sentence(info) and f"afds runs rm {id}" in sentence(info) and file.exists()
    state = "corrupted" if name == "result.json" else "interrupted"
    assert [summary.state for summary in runs.list_runs(store)] == [state]
    runs.remove(id, store=store)
    assert runs.get_or_run(ToyTrain(), store=store).metrics["steps"] == 6


def test_a_flipped_bit_in_a_tensor_is_noticed_and_code_in_a_checkpoint_refused_not_run(run):
    run.save_checkpoint({"w": torch.full((64,), 1.25)})
    content = bytearray(run.checkpoint_path.read_bytes())
    content[content.index(torch.full((64,), 1.25).numpy().tobytes()) + 100] ^= 1
    run.checkpoint_path.write_bytes(content)
    with pytest.raises(AFDSError, match="corrupted"):
        run.load_checkpoint()

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(run.path / "pwned"),))

    torch.save({"step": Evil()}, run.checkpoint_path)
    with pytest.raises(AFDSError, match="corrupted"):
        run.load_checkpoint()
    assert not (run.path / "pwned").exists()


def test_a_full_disk_and_a_store_that_cannot_be_made_are_one_sentence_and_keep_the_last_checkpoint(store, tmp_path):
    id = interrupt(store)
    run = runs.Run(id, store / id, store)
    before = run.load_checkpoint()
    with mock.patch.object(os, "fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        with pytest.raises(AFDSError) as info:
            run._save(run.checkpoint_path, lambda part: part.write_text("new"))
        assert "No space left" in sentence(info) and str(run.checkpoint_path) in sentence(info)
        with pytest.raises(AFDSError, match="No space left"):
            runs.get_or_run(ToyTrain(), store=store)
    assert run.load_checkpoint() == before
    assert runs.get_or_run(ToyTrain(), store=store).metrics["steps"] == 6
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(AFDSError) as info:
        runs.get_or_run(ToyTrain(), store=tmp_path / "file")
    assert str(tmp_path / "file") in sentence(info) and "AFDS_RUNS" in sentence(info)


def test_writers_that_report_a_full_disk_in_their_own_way_are_understood_and_a_bug_stays_a_bug(run):
    full = "cannot write .*a.bin: No space left on device"
    for error, kind, words in (
        (Exception("[enforce fail at inline_container.cc:671] . unexpected pos 832 vs 726"), AFDSError, full),  # torch
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), AFDSError, full),
        (RuntimeError("shape mismatch"), RuntimeError, "shape mismatch"),
    ):
        with pytest.raises(kind, match=words):
            run.write_artifact("a.bin", mock.Mock(side_effect=error))


def test_the_time_of_a_run_leaves_out_the_runs_it_computes_on_the_way(store, monkeypatch):
    real = ToySource.execute
    monkeypatch.setattr(ToySource, "execute", lambda self, run: time.sleep(0.5) or real(self, run))
    child = runs.get_or_run(ToyTrain(source=ToySource()), store=store)
    assert runs.seconds(runs.lookup(ToySource(), store=store)) >= 0.5 > 0.4 > runs.seconds(child)


def test_published_results_are_found_without_a_store(store, monkeypatch):
    first = runs.get_or_run(ToyTrain(folder=str(store.parent), source=ToySource()), store=store)
    file = runs.publish([first], "tiny")
    ((profile, record),) = runs.records()
    assert file == paths.results("tiny") / "runs.jsonl" and profile == "tiny"
    assert set(record) == {"id", "kind", "version", "config", "metrics", "environment", "times"}
    assert record["environment"] == json.loads((first.path / "environment.json").read_text())
    assert record["metrics"] == first.metrics and runs.run_id(runs.from_json(record["config"])) == first.id
    assert "folder" not in record["config"] and str(store.parent) not in file.read_text()
    monkeypatch.setattr(ToyTrain, "execute", unexpected)
    config = ToyTrain(source=ToySource())
    found = runs.get_or_run(config, store=store / "empty")
    assert found.metrics == first.metrics and found.committed and not first.committed
    assert found.history().equals(first.history()) and runs.seconds(found) == runs.seconds(first)
    assert runs.lookup(ToySource(), store=store / "empty") is None  # named by the other, but not published
    before = file.stat()
    assert runs.publish([found], "tiny") == file and file.stat() == before
    with pytest.raises(AFDSError, match="AFDS_FRESH"):
        found.artifact("model.txt")
    with pytest.raises(AFDSError, match="git log"):
        found.artifact("model.safetensors")
    assert runs.show(first.id[:6], store=store / "empty")["state"] == "committed"
    assert [run.id for run in runs.list_committed()] == [first.id] and runs.list_runs(store / "empty") == []
    with pytest.raises(AFDSError, match="no run in"):
        runs.remove(first.id, store=store / "empty")


def test_publishing_merges_and_writes_each_shared_part_once(store):
    """Whatever the order and the grouping, the files are the same, and every curve comes back as it was logged."""
    configs = [ToySource(), ToyTrain(source=ToySource()), ToyTrain(steps=3), ToyTrain(steps=2, source=ToySource(9))]
    results = [runs.get_or_run(config, store=store) for config in configs]
    (results[2].path / "metrics.csv").write_text('note,step,loss\n,1,0.10000\n"a, b",2,\n')
    for result in results:
        (result.path / "environment.json").write_bytes((results[0].path / "environment.json").read_bytes())
    runs.publish(results, "whole")
    for result in reversed(results):
        runs.publish([result], "parts")
    whole, parts = (paths.results(profile) for profile in ("whole", "parts"))
    assert (whole / "runs.jsonl").read_text() == (parts / "runs.jsonl").read_text()
    assert (whole / "runs.jsonl").read_text().count('"torch"') == 1
    assert (whole / "runs.jsonl").read_text().count('"class":"ToySource"') == 2  # a line each, one without a result
    assert len(list(runs.records("whole"))) == 4
    for result in results:
        for folder in (whole, parts):
            assert runs.Result(result.id, {}, folder).history().equals(result.history())


def test_metrics_become_plain_json_and_tables_within_them_come_back_as_they_were(store):
    layers = {"b": {"x": 1, "y": [0.5]}, "a": {"y": [], "x": None}}
    numbers = {"a": numpy.float32(0.5), "b": torch.tensor([1, 2]), "c": float("nan"), 4: [float("inf"), True]}

    @runs.register
    @dataclass(frozen=True)
    class Layers:
        def execute(self, run):
            return numbers | {"layers": layers, "odd": {"b": {"x": 1, "y": 2}, "a": {"x": 1}}, "list": [layers]}

    first = runs.get_or_run(Layers(), store=store)
    assert {key: first.metrics[key] for key in "abc4"} == {"a": 0.5, "b": [1, 2], "c": None, "4": [None, True]}
    text = runs.publish([first], "tiny").read_text()
    assert text.count('"columns":["x","y"]') == 2
    assert runs.get_or_run(Layers(), store=store / "empty").metrics == first.metrics


def test_committed_result_is_computed_again_when_fresh_or_when_an_artifact_is_needed(store, first, monkeypatch, caplog):
    file = runs.publish([first], "tiny")
    written = file.stat().st_mtime_ns, file.stat().st_ino
    again = runs.get_or_run(ToyTrain(), store=store / "a", needs=("model.txt",))
    assert not again.committed and f"{first.id} is committed without model.txt" in caplog.text
    runs.publish([again], "tiny")
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == written
    (first.path / "result.json").unlink()  # an interrupted run of the same id
    config, result = runs.finished(first.id, store=store)
    assert config == ToyTrain() and result.committed
    monkeypatch.setenv("AFDS_FRESH", "1")
    runs.publish([again], "tiny")
    assert file.stat().st_ino != written[1]  # written anew
    assert runs.lookup(ToyTrain(), store=store / "b") is None
    # It is computed anew; by its id, as a table of committed results has it, it is still read.
    assert runs.finished(first.id, store=store / "b")[1].committed
    assert not runs.get_or_run(ToyTrain(), store=store / "b").committed


BROKEN = ["truncated", "empty", "binary", "<<<<<<< ours\n", '{"id":"ID","metrics":\n', '{"id":"ID","metrics":1}\n']


@pytest.mark.parametrize("how", BROKEN)
def test_corrupted_committed_results_name_the_file(store, first, how):
    file = runs.publish([first], "tiny")
    damage(file, how.replace("ID", first.id))
    with pytest.raises(AFDSError) as info:
        runs.lookup(ToyTrain(), store=store / "empty")
    assert str(file) in sentence(info) and "git checkout" in sentence(info)


def test_listing_survives_runs_of_unknown_kind_and_strange_folders(store):
    runs.get_or_run(ToyTrain(source=ToySource()), store=store)
    (store / "notes").mkdir()
    old = store / "0123456789ab"
    old.mkdir()
    (old / "config.json").write_text('{"class": "FromAnotherAge", "x": 1}')
    (store / "ba9876543210").mkdir()
    listed = {summary.id: summary for summary in runs.list_runs(store)}
    assert len(listed) == 4 and listed["0123456789ab"].kind == "FromAnotherAge"
    assert listed["ba9876543210"].state == "corrupted"
    with pytest.raises(AFDSError, match="unknown kind of run 'FromAnotherAge'"):
        runs.resume("0123456789ab", store=store)
    assert runs.show("0123", store=store)["config"]["x"] == 1
    assert runs.list_runs(store / "nothing") == []
    for id in ("../../etc", "", "*", "ffffffffffff", "0123456789abc"):
        with pytest.raises(AFDSError, match="afds runs list"):
            runs.remove(id, store=store)


@needs_fork
def test_running_run_is_not_removed(store):
    child = start(lambda: runs.get_or_run(ToyTrain(pause=0.1), store=store))
    id = runs.run_id(ToyTrain())
    deadline = time.monotonic() + 10
    while not (store / id / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [run.state for run in runs.list_runs(store)] == ["running"]
    with pytest.raises(AFDSError, match="another process"):
        runs.remove(id, store=store)
    with pytest.raises(BusyError, match="another process"):
        runs.get_or_run(ToyTrain(pause=0.1), store=store, wait=False)
    assert ended(child) == 0
    runs.remove(id, store=store)
    assert not (store / id).exists() and runs.list_runs(store) == []
