"""The runs of the study: real ones on a tiny image folder, killed and resumed to the same numbers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from afdslib import afs, cli, runs, training
from afdslib.base.errors import AFDSError, DivergedError
from afdslib.experiments import OBJECTIVE, DataSource, Distillation, Network, StudentRun, TransferRun
from afdslib.losses import BetaSchedule
from afdslib.runs import MODEL
from afdslib.training import loop


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty project with a folder of images, and a store of its own."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    monkeypatch.setenv("AFDS_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("AFDS_FRESH", raising=False)
    images = tiny.images(60)
    for index in range(60):
        folder = tmp_path / "photos" / tiny.CLASSES[images.targets[index]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.raw(index)).save(folder / f"{index:03d}.png")
    return tmp_path


def chain(home: Path, **kwargs) -> TransferRun:
    """A run at half of the MACs on real image files, with mask updates before the steps 5 and 7 of 10, each in the
    middle of an epoch."""
    photos = DataSource(str(home / "photos"), size=tiny.SIZE)
    source = replace(tiny.SOURCE, data=photos, optimisation=tiny.settings(2, lr=0.05))
    afs_source = replace(tiny.AFS_SOURCE, source=source, data=photos, optimisation=tiny.settings(2))
    stage = tiny.settings(10, log_rows=10, recalibrate=kwargs.pop("recalibrate", 0))
    made = tiny.transfer(budgets=(1.0, 0.5), steps=4, features="convbn", **kwargs)
    return replace(made, source=afs_source, data=replace(photos, per_class=7), tuning=stage, trim=0.7)


def outcome(result: runs.Result) -> dict[str, bytes]:
    """The metrics, the learning curve and the networks of a run, byte by byte."""
    files = (MODEL, OBJECTIVE, "metrics.csv", "result.json")
    return {name: (result.path / name).read_bytes() for name in files if (result.path / name).exists()}


def test_a_source_stage_that_diverges_is_a_result_of_the_ablation_only(home, monkeypatch):
    def diverge(*_, **__):
        raise DivergedError("the loss is nan at step 1")

    config = chain(home)
    runs.get_or_run(config.source.source)
    monkeypatch.setattr(training, "fit", diverge)
    random = replace(config, source=replace(config.source, predictors="random"))
    result = runs.get_or_run(random)
    assert result.metrics == {"diverged": "in the source stage, the loss is nan at step 1", "steps": 0}
    with pytest.raises(DivergedError):  # without a source network the study ends
        runs.get_or_run(config.source)


KILLER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import lightning.fabric
from afdslib import afs, runs
import afdslib.experiments  # registers the runs
from afdslib.training import loop

config, id, kills = runs.from_json(json.loads(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3])
loop.Throttle.due = lambda self: True
saved, updated = runs.Run.save_checkpoint, afs.update_masks

def die():
    os.kill(os.getpid(), signal.SIGKILL)

for store, moment in kills.items():
    def save(self, state):
        saved(self, state)
        if self.id == id and state["step"] == moment:
            die()

    def update(*args, **kwargs):
        report = updated(*args, **kwargs)
        if moment == "in the update":
            die()
        return report

    runs.Run.save_checkpoint, afs.update_masks = save, update
    child = os.fork()
    if not child:
        runs.get_or_run(config, store=store)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, moment
"""


@pytest.mark.parametrize("name", ["resnet14", "resnet18"])
def test_residual_branches_may_start_at_zero(name):
    usual, zero = (Network(name, "cifar", 1 / 16, zero_init=z).build(3, 0).eval() for z in (False, True))
    block, x = zero.layer2[-1], torch.rand(2, 3, 16, 16)
    seen = []
    (block.bn3 if name == "resnet14" else block.bn2).register_forward_hook(lambda m, a, out: seen.append(out))
    zero(x)
    assert not seen[0].any() and any(p.any() for n, p in usual.named_parameters() if n.endswith("bn2.weight"))
    assert all(torch.equal(p, q) for p, q in zip(usual.parameters(), zero.parameters(), strict=True) if p.dim() > 1)


def test_a_killed_run_resumes_to_the_same_numbers_bit_by_bit(home, capsys, monkeypatch):
    """SIGKILL before, in and after the mask update; `afds resume` ends at the numbers of the undisturbed run."""
    config = chain(home)
    whole = runs.get_or_run(config)
    kills = {}
    for moment in (2, "in the update", 6):
        store = home / f"killed {moment}"
        shutil.copytree(home / "runs", store)
        shutil.rmtree(store / whole.id)
        kills[str(store)] = moment
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(runs.to_json(config)), whole.id, json.dumps(kills)],
        env={**os.environ, "PYTHONPATH": root}, check=True, timeout=900, capture_output=True,
    )  # fmt: skip
    for store, moment in kills.items():
        killed = Path(store) / whole.id
        assert (killed / "checkpoint.pt").exists() and not (killed / "result.json").exists()
        monkeypatch.setenv("AFDS_RUNS", store)
        capsys.readouterr()
        assert cli.main(["resume", whole.id[:8]]) == 0
        assert json.loads(capsys.readouterr().out) == whole.metrics, moment
        assert outcome(runs.get_or_run(config)) == outcome(whole), moment


def student(home: Path) -> StudentRun:
    """With a teacher, and a weight that decays."""
    photos = DataSource(str(home / "photos"), size=tiny.SIZE, per_class=7)
    teacher = StudentRun(photos, Network("wrn-10-2"), tiny.settings(3))
    method = Distillation("at", BetaSchedule("cosine", beta=100.0), hard=0.1, soft=0.9)
    return StudentRun(photos, Network("wrn-10-1"), tiny.settings(8), method, teacher)


RESUMED = {
    "batch norms measured anew": lambda home: chain(home, recalibrate=2),
    "an attention fitted beforehand": lambda home: chain(home, attention="detached").parent,
    "a student": student,
}


@pytest.mark.parametrize("case", RESUMED)
def test_an_interrupted_run_resumes_to_the_same_numbers(home, monkeypatch, case):
    """With what a run does beside its steps."""
    monkeypatch.setattr(loop.Throttle, "due", lambda self: True)
    config = RESUMED[case](home)
    whole = runs.get_or_run(config)
    expected = outcome(whole)
    shutil.rmtree(whole.path)
    saved, interrupted = runs.Run.save_checkpoint, []

    def save(self, state):
        saved(self, state)
        if self.id == whole.id and state["step"] in (1, 5, 6) and state["step"] not in interrupted:
            interrupted.append(state["step"])
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "save_checkpoint", save)
    result = None
    while result is None:
        try:
            result = runs.get_or_run(config)
        except KeyboardInterrupt:
            assert len(interrupted) <= 3
    assert interrupted and outcome(result) == expected


def test_a_point_keeps_the_masks_of_the_point_before_and_meets_its_budget(home):
    config = chain(home)
    result, before = runs.get_or_run(config), runs.get_or_run(config.parent)
    assert config.parent.parent is None and config.density == pytest.approx(0.5**0.5)
    assert before.metrics["train_macs"] > 0.9 and result.metrics["train_macs"] < 0.55
    assert result.metrics["removed"] > 0 == before.metrics["removed"]
    network = afs.load(result.artifact(MODEL))
    assert {layer.density for layer in afs.layers(network).values()} == {config.density}
    rows = result.history()
    assert rows["mask_macs"].notna().tolist() == [False] * 5 + [True, False, True, False, False]
    assert (rows["mask_macs"].dropna() <= 0.5).all() and rows["afd"].notna().all()
    assert np.sum(result.metrics["confusion"]) > 0 and result.metrics["steps"] == 10


def test_channels_may_go_early_and_gates_freeze_later(home):
    early = replace(chain(home), first=0.1, freeze_first=False, delta_s=1e9)
    rows = runs.get_or_run(early).history().dropna(subset=["removed"]).set_index("step")
    assert list(rows.index) == [2, 8]  # logged with the step after the update
    assert rows.removed[2] > 0 and rows.static[2] == 0 and rows.static[8] > 0 and rows.dynamic[8] == 0
    both = runs.get_or_run(replace(early, freeze_first=True)).history().dropna(subset=["removed"]).set_index("step")
    assert both.static[2] > 0
    with pytest.raises(AFDSError, match="first must be a number in"):
        replace(early, first=1.0)


@pytest.mark.parametrize("attention", ["joint", "detached"])
def test_a_run_does_not_depend_on_what_the_process_drew_before(tmp_path, attention):
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with tiny.served():
            result = runs.get_or_run(
                tiny.transfer(steps=2, attention=attention), store=tiny.store(tmp_path / str(seed))
            )
        outcomes.append(outcome(result))
    assert outcomes[0] == outcomes[1]


def test_the_run_ids_follow_what_changes_the_numbers():
    ids = {
        runs.run_id(config)
        for config in (
            tiny.transfer("afd", 0.01), tiny.transfer("afd", 0.02), tiny.transfer("l2", 0.01),
            tiny.transfer("afd", 0.01, seed=1),
            tiny.transfer("afd", 0.01, budgets=(1.0, 0.5)), tiny.transfer("afd", 0.01, features="convbn"),
            tiny.transfer("afd", 0.01, use_test=False),
        )
    }  # fmt: skip
    assert len(ids) == 7
    rooted = replace(tiny.transfer("afd", 0.01), data=DataSource("tiny-target", root="/somewhere"))
    assert runs.run_id(rooted) == runs.run_id(tiny.transfer("afd", 0.01))


def test_published_weights_take_no_step_and_read_no_source_data(home, monkeypatch):
    model = tiny.network()
    torch.save(model.state_dict(), home / "net.pth")
    network = replace(tiny.SOURCE.network, weights=str(home / "net.pth"))
    source = replace(tiny.SOURCE, network=network, optimisation=tiny.settings(0), data=DataSource("nowhere"))
    result = runs.get_or_run(source)
    assert result.metrics["steps"] == 0
    loaded = afs.load(result.artifact(MODEL))
    assert torch.equal(loaded.conv1.weight, model.conv1.weight)
