"""The training loop: schedules, parameter groups, events, logs, resumption to the same numbers, evaluation."""

import copy
import csv
import math
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from afdslib import afs, data, training
from afdslib.base.errors import AFDSError
from afdslib.losses import TERMS
from afdslib.training import Optimisation, loop
from afdslib.training.objective import Objective, Regulariser

SIZE = (3, tiny.SIZE, tiny.SIZE)


@pytest.fixture(autouse=True)
def checkpoint_at_every_row(monkeypatch):
    monkeypatch.setattr(loop.Throttle, "due", lambda self: True)


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def optimisation(**change):
    return Optimisation(**({"steps": 10} | change))


def regulariser(**change):
    return Regulariser(**({"name": "afd", "strength": 0.1} | change))


REFUSED = [
    *((optimisation, {name: value}, name) for name, values in {
        "steps": (-1, 2.5, "many", True), "batch_size": (0, 4.0, "4"), "lr": (0, math.nan, "0.1"),
        "predictor_lr": (-1,), "momentum": (1.0, "0.9"), "label_smoothing": (1.5,), "warmup": (1.0, "0.1"),
        "schedule": ("linear",), "precision": ("fp8",), "log_rows": (-1,), "recalibrate": (1.5,),
    }.items() for value in values),
    *((optimisation, {"schedule": "milestones", "milestones": m}, "milestones must be increasing shares between 0 and")
      for m in ((), (0.6, 0.3), (0.0, 0.5), (0.5, 1.0))),
    (optimisation, {"schedule": "cosine", "milestones": (0.5,)}, "empty for the others"),
    (regulariser, {"name": "l3"}, "'l3'"), (regulariser, {"strength": -0.1}, "lambda.*-0.1"),
    (regulariser, {"strength": math.inf}, "lambda.*inf"), (regulariser, {"strength": math.nan}, "lambda.*nan"),
    (regulariser, {"strength": "0.1"}, "lambda.*'0.1'"), (regulariser, {"classifier_decay": -1}, "classifier_decay.*-"),
    (regulariser, {"features": "conv"}, "'conv'"), (regulariser, {"attention": "both"}, "'both'"),
    *((tiny.transfer, {name: value}, name) for name, values in {
        "budgets": ((), (0.5,), (1.0, 0.0), (1.0, 0.5, 0.5), (1.0, "0.5")), "density_floor": (0.0, "high"),
        "delta_s": (-0.1,), "macs_images": (0,), "trim": (1.5,),
    }.items() for value in values),
]  # fmt: skip


@pytest.mark.parametrize(("make", "change", "words"), REFUSED, ids=[str(change) for _, change, _ in REFUSED])
def test_settings_out_of_range_or_of_the_wrong_type_are_one_sentence(make, change, words):
    with pytest.raises(AFDSError, match=words) as caught:
        make(**change)
    assert "\n" not in str(caught.value)
    if make is optimisation and words in change:
        assert str(change[words]) in str(caught.value)


def test_schedules_step_within_each_half_warm_up_and_end_near_0_or_drop_at_milestones():
    settings = Optimisation(steps=100, schedule="step", milestone=0.67, drop=0.1, second_half=0.1)
    factors = [settings.factor(step) for step in (0, 33, 34, 49, 50, 83, 84, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    settings = Optimisation(steps=100, schedule="cosine", warmup=0.1)
    assert [settings.factor(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert settings.factor(55) == pytest.approx(0.5) and 0 < settings.factor(99) < 1e-3
    settings = Optimisation(steps=200, schedule="milestones", milestones=(0.3, 0.6, 0.8), drop=0.2)
    rates = [settings.factor(step) for step in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008])


@pytest.mark.parametrize("name", sorted(set(TERMS) - {"l2"}))
def test_a_regulariser_needs_its_source(name):
    with pytest.raises(AFDSError, match="needs the source"):
        Objective(tiny.gated(), Regulariser(name, 0.1))


def test_predictors_and_the_objectives_own_parameters_have_their_rates_and_decays():
    model = tiny.gated()
    objective = Objective(model, Regulariser("afd", 0.1, classifier_decay=0.02), tiny.gated(1), SIZE)
    groups = {g["name"]: g for g in loop._groups(model, objective, tiny.settings(lr=0.5, predictor_lr=0.1))}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "backbone": (0.5, 0.0), "classifier": (0.5, 0.02), "predictors": (0.05, 0.0), "objective": (0.5, 0.0),
    }  # fmt: skip
    expected = {id(p) for layer in afs.layers(model).values() for p in layer.predictor.parameters()}
    assert {id(p) for p in groups["predictors"]["params"]} == expected
    assert {id(p) for p in groups["objective"]["params"]} == {id(p) for p in objective.parameters()}
    everything = [id(p) for g in groups.values() for p in g["params"]]
    assert len(everything) == len(set(everything)) == len([*model.parameters(), *objective.parameters()])


@pytest.mark.parametrize(("option", "part"), [("predictor_lr", "predictor"), ("classifier_lr", "fc.")])
def test_a_learning_rate_multiplier_scales_the_step_of_its_part(tmp_path, option, part):
    moved = {}
    for multiplier in (1.0, 0.1):
        model = tiny.gated()
        before = parameters(model)
        tiny.fit(tmp_path / str(multiplier), model, settings=tiny.settings(1, **{option: multiplier}))
        moved[multiplier] = {n: p - before[n] for n, p in parameters(model).items()}
    assert any(part in name for name in moved[1.0])
    for name, step in moved[1.0].items():
        torch.testing.assert_close(moved[0.1][name], (0.1 if part in name else 1.0) * step, rtol=1e-3, atol=1e-7)


def test_batch_norms_keep_their_statistics_where_fixed_and_their_momentum_unless_a_stage_gives_one(tmp_path):
    for fixed, given, used in ((True, 0.0, 0.1), (False, 0.5, 0.5)):
        model = tiny.gated()
        before = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
        tiny.fit(tmp_path / str(fixed), model, settings=tiny.settings(2, fixed_norm=fixed, norm_momentum=given))
        same = [torch.equal(before[n], b) for n, b in model.named_buffers() if n in before]
        assert before and (all(same) if fixed else not any(same))
        assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {used}


def test_weight_decay_is_the_gradient_of_the_penalty_that_is_logged():
    model = tiny.gated()
    objective = Objective(model, Regulariser("l2", 0.3))
    assert objective.weight_decay == objective.classifier_decay == 0.3
    settings = tiny.settings(lr=0.1, predictor_lr=0.5)
    explicit, decayed = copy.deepcopy(model), model
    optimiser = torch.optim.SGD(loop._groups(decayed, objective, settings), lr=0.1)
    for parameter in decayed.parameters():
        parameter.grad = torch.zeros_like(parameter)
    penalty = objective.diagnostics(decayed)["l2"]
    optimiser.step()
    value = 0.3 / 2 * sum(p.square().sum() for p in explicit.parameters())
    assert penalty == pytest.approx(value.item(), rel=1e-5)
    value.backward()
    for (name, p), q in zip(explicit.named_parameters(), decayed.parameters(), strict=True):
        rate = 0.05 if "predictor" in name else 0.1
        torch.testing.assert_close(q.detach(), p.detach() - rate * p.grad)


def test_a_resumed_stage_draws_the_same_dropout(tmp_path):
    def train(folder: str) -> nn.Module:
        model = tiny.network()
        model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(0.5))
        return tiny.fit(tmp_path / folder, model, settings=tiny.settings(6))

    whole = train("whole")
    with tiny.killed(4):  # in the middle of the second epoch
        train("resumed")
    torch.testing.assert_close(train("resumed").state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_of_another_architecture_is_one_sentence(tmp_path):
    tiny.run(tmp_path).save_checkpoint({"step": 1, "model": tiny.network(classes=5).state_dict()})
    with pytest.raises(AFDSError, match="does not fit this network.*afds runs rm") as caught:
        tiny.fit(tmp_path, tiny.gated())
    assert "\n" not in str(caught.value)


def test_events_happen_once_before_the_step_of_their_key_and_are_logged(tmp_path):
    model, seen = tiny.gated(), []

    def happen(step):
        seen.append((step, model.training))
        model.eval()  # whatever an event leaves behind, training goes on in training mode
        return {f"event{step}": 1.0}

    events = {step: partial(happen, step) for step in (0, 3, 4)}
    tiny.fit(tmp_path, model, settings=tiny.settings(6, log_rows=3), events=events)
    assert [step for step, _ in seen] == [0, 3, 4] and model.training
    names = ("step", "event0", "event3", "event4")
    assert [tuple(row[name] for name in names) for row in rows_of(tmp_path)] == [
        ("2", "1.0", "", ""), ("4", "", "1.0", ""), ("6", "", "", "1.0"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "terms"),
    [("l2", set()), ("l2sp", {"l2sp"}), ("feature-map", {"feature_map"}), ("afd", {"afd", "entropy"})],
)
def test_every_term_is_logged_they_add_up_to_the_loss_and_a_diverging_run_stops_with_the_step(tmp_path, name, terms):
    model = tiny.gated()
    objective = Objective(model, Regulariser(name, 0.1), tiny.gated(1), SIZE)
    tiny.fit(tmp_path, model, objective, settings=tiny.settings(2), monitor=tiny.images(24))
    rows = rows_of(tmp_path)
    always = {"l2", "loss", "cross_entropy", "lr", "step", "epoch", "train_accuracy", "dead_gates", "gate_variance"}
    assert set(rows[0]) == terms | always
    for row in ({key: float(value) for key, value in row.items()} for row in rows):
        share = {"l2": 0.0, "l2sp": row.get("l2sp", 0) + row["l2"]}.get(name)
        share = 0.1 * row[name.replace("-", "_")] if share is None else share
        assert row["loss"] == pytest.approx(row["cross_entropy"] + share, rel=1e-5)
    with pytest.raises(AFDSError, match=r"at step \d+\b.*lower the learning rate") as caught:
        tiny.fit(tmp_path / "wild", model, objective, settings=tiny.settings(8, lr=1e12))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("attention", "moves"), [("joint", True), ("detached", False)])
def test_only_a_joint_attention_is_trained(tmp_path, attention, moves):
    model = tiny.gated()
    objective = Objective(model, Regulariser("afd", 0.1, attention=attention), tiny.gated(1), SIZE)
    assert bool(objective.prepare(iter(tiny.batches()), 3)) != moves
    before = parameters(objective)
    tiny.fit(tmp_path, model, objective, settings=tiny.settings(2))
    assert any(not torch.equal(before[n], p) for n, p in parameters(objective).items()) == moves


def test_the_strength_reaches_the_network_and_the_teacher_stays(tmp_path):
    """With a lambda the features stay nearer to the source's; the teacher's own state does not move."""
    distances = []
    for strength in (0.0, 0.1):
        model = tiny.network()
        objective = Objective(model, Regulariser("feature-map", strength), model, SIZE)
        before = copy.deepcopy(objective.teacher.model.state_dict())
        tiny.fit(tmp_path / str(strength), model, objective, settings=tiny.settings(16, lr=0.005))
        assert all(torch.equal(before[n], v) for n, v in objective.teacher.model.state_dict().items())
        distances.append([float(row["feature_map"]) for row in rows_of(tmp_path / str(strength))])
    without, with_lambda = (sum(values[-4:]) for values in distances)
    assert with_lambda < 0.95 * without and distances[0][0] == distances[1][0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_term_that_is_not_finite_is_named_with_its_step(tmp_path, monkeypatch, precision):
    model = tiny.gated(stem="cifar")
    objective = Objective(model, Regulariser("afd", 0.1), tiny.gated(1, "cifar"), SIZE)
    forward, calls = type(objective.term).forward, count(1)

    def broken(self, *args):
        measured = forward(self, *args)
        return measured | {"afd": measured["afd"] * (math.nan if next(calls) == 3 else 1)}

    monkeypatch.setattr(type(objective.term), "forward", broken)
    with pytest.raises(AFDSError, match="'afd' is nan at step 3 .*learning rate") as caught:
        tiny.fit(tmp_path, model, objective, settings=tiny.settings(5, precision=precision))
    assert "\n" not in str(caught.value)
    state = tiny.run(tmp_path).load_checkpoint()
    assert state["step"] == 2 and all(bool(p.isfinite().all()) for p in state["model"].values())  # nothing of step 3


def test_bf16_trains_with_gates_and_terms_in_float32(tmp_path):
    model, source = tiny.gated(stem="cifar"), tiny.gated(1, "cifar")
    objective = Objective(model, Regulariser("afd", 0.1), source, SIZE)
    tiny.fit(tmp_path, model, objective, settings=tiny.settings(2, precision="bf16"), monitor=tiny.images(24))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert len(rows_of(tmp_path)) == 2 and "nan" not in (tmp_path / "metrics.csv").read_text()


def test_batches_continue_where_an_interrupted_run_stopped_and_the_first_ones_leave_the_epoch_alone():
    split = tiny.images(20, augment=True)

    def take(start: int, count: int):
        stream = training.batches_from(split, 6, 5, start)
        return [next(stream) for _ in range(count)]

    whole = take(0, 8)
    assert [epoch for epoch, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2]
    for start in (1, 3, 4):
        torch.testing.assert_close(whole[start:], take(start, 8 - start), rtol=0, atol=0)
    seen = loop._batches(split, 6, 5, 0)
    assert len({i for batch in seen for i in batch}) == 18 and seen != loop._batches(split, 6, 5, 1)
    assert [len(batch) for batch in loop._batches(tiny.images(5), 8, 0, 0)] == [5]  # smaller than a batch
    split.set_epoch(7)
    first = list(training.first_batches(split, 6, 5, 4))  # the fourth is of the second epoch
    torch.testing.assert_close(first, [batch for _, batch in whole[:4]], rtol=0, atol=0)
    assert split.epoch == 7 and list(training.first_batches(split, 6, 5, 0)) == []


def test_recalibration_gives_the_plain_averages_and_leaves_all_else():
    model = tiny.gated().eval()
    model.layer2.train()
    before = parameters(model)
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    loader = [tiny.batches(8, 4, seed)[0] for seed in range(3)]
    training.recalibrate(model, iter(loader))
    outputs = [model.conv1.conv(x) for x, _ in loader]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(model.conv1.norm.running_mean, mean.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.conv1.norm.running_var, var.detach(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[n], p) for n, p in parameters(model).items())
    assert not model.training and model.layer2.training and all(m.momentum == v for m, v in momenta.items())


def test_evaluation_is_the_direct_one():
    pixels = np.random.RandomState(0).randint(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    split = data.ArrayImages(pixels, np.arange(40), np.arange(40) % 8, (*"abcdefgh", "nobody"), augment=False)
    model = tiny.network(classes=9, stem="cifar").train()
    found = training.evaluate(model, split, batch_size=7)
    x, y = split.__getitems__(list(range(40)))
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(x)
    right = logits.argmax(1) == y
    assert found.accuracy == pytest.approx(float(right.double().mean()))
    per_class = [float(right[y == c].double().mean()) for c in range(8)]  # the class without images does not count
    assert found.mean_class_accuracy == pytest.approx(np.mean(per_class))
    top5 = float((logits.topk(5).indices == y[:, None]).any(1).double().mean())
    assert found.top5_accuracy == pytest.approx(top5) and 0 < found.accuracy < found.top5_accuracy < 1
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert np.array(found.confusion).sum(1).tolist() == [5] * 8 + [0] and found.macs is None
    assert np.trace(found.confusion) == int(right.sum()) and model.training


def test_gate_monitor_counts_dead_gates_and_measures_variation():
    model = tiny.gated().eval()
    assert training.monitor_gates(tiny.network(), tiny.images(4)) == {}
    for layer in afs.layers(model).values():
        nn.init.zeros_(layer.predictor.weight)
    assert training.monitor_gates(model, tiny.images(6)) == {"dead_gates": 0.0, "gate_variance": 0.0}
    total = sum(layer.m.numel() for layer in afs.layers(model).values())
    with torch.no_grad():
        model.conv1.predictor.bias[:2] = -1.0
    assert training.monitor_gates(model, tiny.images(6))["dead_gates"] == pytest.approx(2 / total)
    model.conv1.m[0] = 0  # a removed channel is no dead gate
    assert training.monitor_gates(model, tiny.images(6))["dead_gates"] == pytest.approx(1 / (total - 1))
