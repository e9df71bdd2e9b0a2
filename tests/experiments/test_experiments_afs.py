"""The runs of the study: real ones on a tiny image folder, interrupted and resumed to the same numbers; their gates."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from afdslib import afs, runs, training
from afdslib.base.errors import AFDSError, DivergedError
from afdslib.experiments import OBJECTIVE, DataSource, Distillation, Network, StudentRun, TransferRun
from afdslib.experiments.gates import REPLACEMENTS, GatesRun, others, replaced
from afdslib.losses import BetaSchedule
from afdslib.runs import MODEL
from afdslib.studies.gates import costs
from afdslib.training import loop


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> DataSource:
    """A folder of image files."""
    return DataSource(str(tiny.tree(tmp_path_factory.mktemp("photos") / "tree", train=14, test=6)), size=tiny.SIZE)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A project with a store of its own, in which what several tests ask for is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("AFDS_HOME", str(home))
        patch.setenv("AFDS_RUNS", str(home / "runs"))
        patch.delenv("AFDS_FRESH", raising=False)
        yield home


def chain(photos: DataSource, **kwargs) -> TransferRun:
    """A run at half of the MACs on real image files, with mask updates before the steps 5 and 7 of 10, each in the
    middle of an epoch."""
    source = replace(tiny.SOURCE, data=photos, optimisation=tiny.settings(2, lr=0.05))
    afs_source = replace(tiny.AFS_SOURCE, source=source, data=photos, optimisation=tiny.settings(2))
    stage = tiny.settings(10, log_rows=10, recalibrate=kwargs.pop("recalibrate", 0))
    point = tiny.transfer(budgets=(1.0, 0.5), steps=4, features="convbn", **kwargs)
    return replace(point, source=afs_source, data=replace(photos, per_class=7), tuning=stage, trim=0.7)


def student(photos: DataSource) -> StudentRun:
    """With a teacher, and a weight that decays."""
    photos = replace(photos, per_class=7)
    teacher = StudentRun(photos, Network("wrn-10-2"), tiny.settings(3))
    method = Distillation("at", BetaSchedule("cosine", beta=100.0), hard=0.1, soft=0.9)
    return StudentRun(photos, Network("wrn-10-1"), tiny.settings(8), method, teacher)


def outcome(result: runs.Result) -> dict[str, bytes]:
    """The metrics, the learning curve and the networks of a run, byte by byte."""
    files = (MODEL, OBJECTIVE, "metrics.csv", "result.json")
    return {name: (result.path / name).read_bytes() for name in files if (result.path / name).exists()}


def test_a_source_stage_that_diverges_is_a_result_of_the_ablation_only(photos, tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise DivergedError("the loss is nan at step 1")

    config = chain(photos)
    runs.get_or_run(config.source.source, store=tmp_path)
    monkeypatch.setattr(training, "fit", diverge)
    result = runs.get_or_run(replace(config, source=replace(config.source, predictors="random")), store=tmp_path)
    assert result.metrics == {"diverged": "in the source stage, the loss is nan at step 1", "steps": 0}
    with pytest.raises(DivergedError):  # without a source network the study ends
        runs.get_or_run(config.source, store=tmp_path)


@pytest.mark.parametrize("name", ["resnet14", "resnet18"])
def test_residual_branches_may_start_at_zero(name):
    usual, zero = (Network(name, "cifar", 1 / 16, zero_init=z).build(3, 0).eval() for z in (False, True))
    block, x = zero.layer2[-1], torch.rand(2, 3, 16, 16)
    seen = []
    (block.bn3 if name == "resnet14" else block.bn2).register_forward_hook(lambda m, a, out: seen.append(out))
    zero(x)
    assert not seen[0].any() and any(p.any() for n, p in usual.named_parameters() if n.endswith("bn2.weight"))
    assert all(torch.equal(p, q) for p, q in zip(usual.parameters(), zero.parameters(), strict=True) if p.dim() > 1)


RESUMED = {  # and when it is interrupted
    "mask updates, batch norms measured anew": (lambda p: chain(p, recalibrate=2), [1, "in the update", 6]),
    "an attention fitted beforehand": (lambda p: chain(p, attention="detached").parent, [1]),
    "a student": (student, [1, 5, 6]),
}


@pytest.mark.parametrize("case", RESUMED)
def test_an_interrupted_run_resumes_to_the_same_numbers_bit_by_bit(home, photos, tmp_path, monkeypatch, case):
    """With what a run does beside its steps, interrupted before, in and after it."""
    monkeypatch.setattr(loop.Throttle, "due", lambda self: True)
    make, moments = RESUMED[case]
    config, left = make(photos), list(moments)
    whole = runs.get_or_run(config)
    store = Path(shutil.copytree(home / "runs", tmp_path / "runs"))
    shutil.rmtree(store / whole.id)
    saved, updated = runs.Run.save_checkpoint, afs.update_masks

    def interrupt(moment):
        if moment in left:
            left.remove(moment)
            raise KeyboardInterrupt

    def save(self, state):
        saved(self, state)
        if self.id == whole.id:
            interrupt(state["step"])

    def update(*args, **kwargs):
        report = updated(*args, **kwargs)
        interrupt("in the update")
        return report

    monkeypatch.setattr(runs.Run, "save_checkpoint", save)
    monkeypatch.setattr(afs, "update_masks", update)
    result = None
    while result is None:
        try:
            result = runs.get_or_run(config, store=store)
        except KeyboardInterrupt:
            assert (store / whole.id / "checkpoint.pt").exists() and not (store / whole.id / "result.json").exists()
    assert not left and outcome(result) == outcome(whole)


def test_a_point_keeps_the_masks_of_the_point_before_and_meets_its_budget(photos):
    config = chain(photos)
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


def test_channels_may_go_early_and_gates_freeze_later(photos):
    early = replace(chain(photos), first=0.1, freeze_first=False, delta_s=1e9)
    rows = runs.get_or_run(early).history().dropna(subset=["removed"]).set_index("step")
    assert list(rows.index) == [2, 8]  # logged with the step after the update
    assert rows.removed[2] > 0 and rows.static[2] == 0 and rows.static[8] > 0 and rows.dynamic[8] == 0
    both = replace(early, freeze_first=True, tuning=replace(early.tuning, steps=4, log_rows=4))
    assert runs.get_or_run(both).history().dropna(subset=["removed"]).static.iloc[0] > 0
    with pytest.raises(AFDSError, match="first must be a number in"):
        replace(early, first=1.0)


@pytest.mark.parametrize("attention", ["joint", "detached"])
def test_a_run_does_not_depend_on_what_the_process_drew_before(tmp_path, attention):
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with tiny.served():
            config = tiny.transfer(steps=2, attention=attention)
            outcomes.append(outcome(runs.get_or_run(config, store=tiny.store(tmp_path / str(seed)))))
    assert outcomes[0] == outcomes[1]


def test_published_weights_take_no_step_and_read_no_source_data(tmp_path):
    model = tiny.network()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    network = replace(tiny.SOURCE.network, weights=str(tmp_path / "net.pth"))
    source = replace(tiny.SOURCE, network=network, optimisation=tiny.settings(0), data=DataSource("nowhere"))
    result = runs.get_or_run(source)
    assert result.metrics["steps"] == 0
    assert torch.equal(afs.load(result.artifact(MODEL)).conv1.weight, model.conv1.weight)


def test_whose_gates_an_image_gets():
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    assert others(labels, same_class=False).tolist() == [1, 2, 3, 4, 5, 0]
    taken = others(labels, same_class=True)
    assert taken.tolist() == [2, 4, 5, 3, 1, 0] and torch.equal(labels[taken], labels)


def test_inside_the_block_the_gates_are_the_given_ones_and_afterwards_its_own():
    model = tiny.gated().eval()
    (images, _), *_ = tiny.batches(4, 4)
    before, found = model(images), afs.layers(model)
    ones = {n: afs.Gates(*(torch.ones(1, layer.m.numel()) for _ in range(3))) for n, layer in found.items()}
    with replaced(model, {n: g._replace(active=torch.zeros_like(g.active)) for n, g in ones.items()}):
        closed = model(images)
    assert torch.equal(closed[0], closed[1]) and not torch.equal(before[0], before[1])  # nothing is computed
    assert torch.equal(model(images), before)


def test_own_gates_change_nothing_and_others_do(tmp_path):
    with tiny.served():
        store = tiny.store(tmp_path)
        point = tiny.transfer("l2", 1e-3)
        trained = runs.get_or_run(point, store=store)
        found = {kind: runs.get_or_run(GatesRun(point, kind), store=store) for kind in REPLACEMENTS}
        again = runs.get_or_run(GatesRun(point, "own", seed=1), store=store)
    assert found["own"].metrics["test_accuracy"] == again.metrics["test_accuracy"]
    assert found["own"].metrics["test_accuracy"] == pytest.approx(trained.metrics["test_accuracy"])
    assert all(0 <= result.metrics["test_accuracy"] <= 1 for result in found.values())
    with pytest.raises(AFDSError, match="gates must be"):
        replace(GatesRun(point, "own"), gates="none")


def test_the_rule_looks_at_the_upper_end_of_the_interval_of_shuffled_gates():
    rows = [
        {"budget": budget, "seed": seed, "variant": variant, "test_accuracy": 0.5 - lost * (1 + 0.1 * seed)}
        for budget, cost in ((1.0, 0.1), (0.1, 0.001))
        for variant, lost in (("own", 0.0), ("mean", 0.002), ("shuffled", cost), ("class", cost / 2))
        for seed in (0, 1, 2)
    ]
    table = costs(pd.DataFrame(rows)).set_index(["budget", "variant"])
    assert table.loc[(1.0, "shuffled"), "cost"] == pytest.approx(0.11)
    assert not table.loc[(1.0, "shuffled"), "disguise"] and table.loc[(0.1, "shuffled"), "disguise"]
    assert not table.loc[(0.1, "mean"), "disguise"] and (table.seeds == 3).all()
