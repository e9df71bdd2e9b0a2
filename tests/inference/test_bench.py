"""The bench measures what it says: no assertion here is about how long anything took."""

import csv
import json
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch

from afdslib import afs, cli
from afdslib.afs import compact, macs
from afdslib.base.atomic import write_json
from afdslib.base.errors import AFDSError
from afdslib.inference import bench, networks, timing
from afdslib.losses import at_loss, nst_loss
from afdslib.losses.afd import AFDLoss
from afdslib.studies import engine, speed

QUICK = bench.Settings(
    networks=("resnet14",), size=32, width=0.125, repeats=2, warmup=0, steady=0.0, multiple=2, train_size=32,
    train_batch=4,
)  # fmt: skip


def test_variants_take_turns_after_the_warm_up():
    calls: list[tuple[str, int]] = []
    variants = {name: (lambda i, name=name: calls.append((name, i))) for name in "ab"}
    seconds = timing.interleave(variants, repeats=2, warmup=1)
    assert calls == [("a", -1), ("b", -1), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    # Untimed calls, on another image, go before each timed one.
    numbers: list[int] = []
    seconds = timing.interleave({"a": lambda i: numbers.append(i) or time.sleep(0.06)}, 2, 0, before=0.05)
    assert numbers == [1, 0, 2, 1] and len(seconds["a"]) == 2


def test_ratios_are_taken_within_a_repeat():
    row = bench.Row("case", "net", "eager", 1, "", "dense")
    dense, fast = bench._rows({"dense": [1.0, 10.0, 100.0], "fast": [0.5, 5.0, 50.0]}, row, {})
    assert (dense.speedup, fast.speedup, fast.speedup_q1) == (1, 2, 2)
    assert (fast.median_ms, fast.q1_ms, fast.q3_ms) == (5000, 2750, 27500)


def test_each_repeat_sees_another_batch():
    settings = bench.Settings(repeats=12, warmup=0, steady=0.0, size=8)
    for batch in (1, 2, 16):
        look = torch.nn.Identity()
        seen: list[bytes] = []
        look.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].numpy().tobytes()))
        row = bench.Row("case", "net", "eager", batch, "", "look")
        bench.compare({"look": look}, settings, row, {}, bench._images(settings, batch))
        assert len(set(seen[1:])) == 12


def test_what_a_runtime_refuses_is_a_row_with_the_reason():
    class Broken(torch.nn.Module):
        def __init__(self, error):
            super().__init__()
            self.forward = mock.Mock(side_effect=error)

    row = bench.Row("case", "net", "eager", 1, "", "dense")
    models = {"dense": torch.nn.Identity(), "a": Broken(RuntimeError("no such kernel")), "b": Broken(AssertionError())}
    found = bench.compare(models, QUICK, row, {}, torch.zeros(8, 3, 4, 4))
    assert [r.variant for r in found] == ["dense", "a", "b"]
    assert "no such kernel" in found[1].note and found[1].speedup is None
    assert found[2].note == "not in this runtime: AssertionError"


def test_every_batch_size_is_compiled_for_itself():
    with mock.patch.object(torch, "compile", side_effect=lambda model, **_: model) as compiled:
        for batch in (1, 2):
            row = bench.Row("case", "net", "compiled", batch, "", "dense")
            bench.compare({"dense": torch.nn.Identity()}, QUICK, row, {}, torch.zeros(8, 3, 4, 4))
    assert [call.kwargs for call in compiled.call_args_list] == [{"dynamic": False}] * 2


def test_random_gates_depend_on_the_image_stay_finite_and_do_not_tie():
    model = afs.convert(tiny.network(stem="cifar"))
    afs.set_density(model, 0.3)
    networks.random_gates(model, networks.photographs(16, 32, 2))
    images = networks.photographs(6, 32, 1)
    assert networks.jaccard(model, images) <= 0.6
    constant = afs.convert(tiny.network()).eval()
    afs.set_density(constant, 0.3)
    assert networks.jaccard(constant, images) == 1
    first = next(iter(afs.layers(model).values()))  # it has three inputs, which are almost dependent
    with torch.no_grad():
        assert bool(model(images).isfinite().all())
        for importances in first.predictor(images[:4].mean((2, 3))):
            assert len(importances.mul(1e4).round().unique()) == len(importances)


def test_cut_keeps_the_shares_and_couples_the_streams_and_torch_pruning_meets_the_budget_in_multiples():
    plain = networks.plain_network("resnet14", width=0.25)
    model = afs.convert(plain)
    networks.cut(model, keep=0.5, stream=0.75, multiple=4)
    kept = {name: int(layer.m.sum()) for name, layer in afs.layers(model).items()}
    assert kept["layer2.0.conv2"] == 16 and kept["layer2.0.conv3"] == 96 and all(n % 4 == 0 for n in kept.values())
    assert torch.equal(model.layer2[0].conv3.m, model.layer2[0].downsample[0].m)
    dense = macs.count(plain, (3, 32, 32)).total
    pruned = networks.torch_pruned(plain, 32, dense / 3, 4)
    assert macs.count(pruned, (3, 32, 32)).total <= dense / 3
    assert all(m.out_channels % 4 == 0 for m in pruned.modules() if isinstance(m, torch.nn.Conv2d))


def test_naive_losses_are_the_same_losses():
    torch.manual_seed(1)
    student, source = torch.rand(3, 6, 5, 5), torch.rand(3, 6, 5, 5)
    afd = AFDLoss({"map": (6, 5, 5)})
    torch.nn.init.normal_(afd.attentions["map"].w2)
    for loss, expected in (
        (afd({"map": student}, {"map": source})["afd"], bench.naive_afd(student, source, afd.attentions["map"])),
        (at_loss(student, source), bench.naive_at(student, source)),
        (nst_loss(student, source), bench.naive_nst(student, source)),
    ):
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def _allocate(mebibytes: int):
    return lambda: torch.ones(mebibytes * 2**18).sum()


@pytest.mark.slow
def test_peak_memory_is_that_of_the_call():
    peak = timing.peak(_allocate, 64)
    assert peak is None or 60 <= peak <= 90


@pytest.mark.parametrize("case", ["networks", "dynamic", "gates", "training", "loading"])
def test_cases_compare_with_their_baseline(case: str):
    found = bench.run([case], QUICK)
    baseline = {row.baseline for row in found}
    assert len(baseline) == 1 and baseline <= {row.variant for row in found}
    assert all(row.median_ms is not None and row.median_ms > 0 and row.speedup for row in found)
    if case == "networks":
        reductions = {row.variant: row.reduction for row in found}
        assert reductions["dense"] == 1 and reductions["torch-pruning"] >= reductions["compact"] > 1


def test_the_command_writes_rows_with_device_threads_and_versions(tmp_path: Path, capsys):
    out = tmp_path / "bench.csv"
    arguments = "--case networks --network resnet14 --size 32 --width 0.125 --multiple 2 --repeats 2".split()
    assert cli.main(["bench", *arguments, "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["variant"] for row in rows] == ["dense", "compact", "torch-pruning"]
    assert {(row["size"], row["width"]) for row in rows} == {("32", "0.125")}
    assert all(
        row["device"] and row["threads"] == "1" and row["torch"] == torch.__version__.split("+")[0] for row in rows
    )
    said = capsys.readouterr().out
    assert "as fast as" in said or "the time of" in said


def test_committed_masks_rebuild_the_network_that_is_timed(tmp_path: Path):
    model = afs.convert(networks.plain_network("resnet14", width=0.25))
    wanted, files = {}, []
    for name, keep in (("a", 0.5), ("b", 0.25)):
        networks.cut(model, keep=keep, stream=0.5, multiple=4)
        files.append(str(tmp_path / f"{name}.json"))
        write_json(files[-1], {"architecture": model.architecture, "masks": compact.masks(model)})
        wanted[name] = macs.count(compact.compact(model.eval()), (3, 32, 32)).total
    rows = bench.run(["networks"], bench.replace(QUICK, masks=tuple(files), multiple=4))
    assert {row.network: row.macs for row in rows if row.variant == "compact"} == wanted and wanted["b"] < wanted["a"]


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch):
    def case(settings):
        yield bench.Row("toy", "net", "eager", 1, "dense", "dense", 32, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.CASES, "toy", case)
    out = tmp_path / "bench.csv"
    assert cli.main(["bench", "--case", "toy", "--out", str(out)]) == 130
    assert [row["case"] for row in csv.DictReader(out.open())] == ["toy"]
    assert cli.main(["bench", "--case", "toy", "--out", str(tmp_path)]) == 2


def test_publishing_the_speed_study_trains_nothing_and_writes_finished_masks(monkeypatch, tmp_path):
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    monkeypatch.setattr(speed.runs, "get_or_run", lambda *_, **__: pytest.fail("something was trained"))
    plan, finished = speed.SpeedPlan(), {}
    monkeypatch.setattr(speed.runs, "lookup", lambda config, **_: finished.get(config))
    with pytest.raises(AFDSError, match="no pruned network of the part speed is finished here"):
        engine.publish(plan)
    assert not (tmp_path / "data").exists()
    dense, half, *_ = speed.Speed().runs()
    model = afs.convert(tiny.network(stem="cifar"))
    for config, id in ((dense, "0" * 12), (half, "1" * 12)):
        finished[config] = speed.runs.Result(id, {"test_accuracy": 0.5, "seconds": 1.0}, tmp_path / id)
        (tmp_path / id).mkdir()
        afs.save(model, finished[config].path / "model.safetensors")
    folder = engine.publish(plan)
    (file,) = folder.iterdir()
    written = json.loads(file.read_text())
    assert file.name == "resnet101-2x.json" and written["masks"] == afs.compact.masks(model)
    assert written["run"] == "1" * 12 and written["budget"] == 0.5 and written["metrics"] == {"test_accuracy": 0.5}
    finished[half] = speed.runs.Result("1" * 12, {"diverged": "loss is not finite"}, tmp_path)
    with pytest.raises(AFDSError, match="no such network: loss is not finite"):
        engine.publish(plan)


def test_refusals(tmp_path: Path, capsys, monkeypatch):
    row = bench.Row("case", "net", "onnxruntime", 1, "", "dense")
    for make, sentence in (
        (lambda: bench.run(["speed"], QUICK), "the case must be one of networks, .* got 'speed'"),
        (lambda: bench.Settings(runtimes=("jax",)), "the runtime must be one of .* got 'jax'"),
        (lambda: bench.Settings(density=0), "density"),
        (lambda: bench.compare({"dense": torch.nn.Identity()}, QUICK, row, {}, torch.zeros(8, 3, 4, 4)),
         "onnxruntime is not installed; install it with"),
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(AFDSError, match=sentence):
            patch.setitem(sys.modules, "onnxruntime", None)
            make()
    (tmp_path / "foreign.json").write_text("[]")
    (tmp_path / "empty.json").write_text('{"architecture": {}, "masks": {}}')
    for name in ("foreign.json", "missing.json", "empty.json"):
        assert cli.main(["bench", "--case", "networks", "--masks", str(tmp_path / name)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_onnxruntime_runs_networks_whose_gates_select():
    nn = torch.nn
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model = afs.convert(nn.Sequential(*layers))
    afs.set_density(model, 0.5)
    images = networks.photographs(16, 32, 0)
    networks.random_gates(model, images)
    row = bench.Row("gates", "tiny", "onnxruntime", 2, "", "gated")
    (found,) = bench.compare({"gated": model.eval()}, QUICK, row, {}, images)
    assert found.note == "" and found.median_ms is not None
