"""Students beside teachers: the loss as it is written, the frozen teacher, the runs, and what is refused."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import tiny
import torch
from torch import nn

from afdslib import backbones, data, runs
from afdslib.base.errors import AFDSError, DivergedError
from afdslib.experiments import DataSource, Distillation, Network, StudentRun
from afdslib.experiments.student import student_objective, tapped
from afdslib.losses import BetaSchedule, _checks, at_loss, kd_loss
from afdslib.training import features, loop
from afdslib.training.objective import Objective

SIZE = (3, tiny.SIZE, tiny.SIZE)


def network(name="wrn-10-1", seed=0):
    torch.manual_seed(seed)
    return backbones.build(name, 3)


def weighed(beta, kind="constant"):
    return BetaSchedule(kind, beta=beta)


METHODS = {
    "alone": Distillation(), "at": Distillation("at", weighed(100.0)), "hint": Distillation("hint", weighed(0.1)),
    "gradient-at": Distillation("gradient-at", weighed(0.1)), "kd": Distillation(hard=0.1, soft=0.9),
    "at-kd": Distillation("at", weighed(100.0, "cosine"), hard=0.1, soft=0.9),
    **{f"nst-{k}": Distillation("nst", weighed(5.0), kernel=k, taps="last") for k in ("poly", "linear", "gaussian")},
    "nst-kd": Distillation("nst", weighed(5.0), soft=1.0, taps="before-relu"),
}  # fmt: skip


def objective(method, model, teacher=None, steps=4):
    torch.manual_seed(0)
    return student_objective(model, method, teacher, SIZE, steps=steps, weight_decay=1e-4)


def batch():
    return tiny.images(6).__getitems__(list(range(6)))


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_the_sum_of_its_logged_terms_and_trains_the_student_alone(name):
    method, student, teacher = METHODS[name], network(), network("wrn-10-2", 1)
    made = objective(method, student, teacher if method.needs_teacher else None)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    loss, terms, _ = made(student, *batch())
    transfer = [v for k, v in terms.items() if k not in ("cross_entropy", "soft", "beta")]
    assert len(transfer) == {"none": 0, "nst": 1, "gradient-at": 1}.get(method.transfer, 3)
    total = method.hard * terms["cross_entropy"] + method.soft * terms.get("soft", 0)
    total = total + method.weight.beta * sum(transfer)
    assert torch.allclose(loss, total, rtol=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())  # no batch norm has learned
    if made.teacher is not None:
        assert made.teacher.model is not teacher
        assert all(torch.equal(v, before[k]) for k, v in made.teacher.model.state_dict().items())


def test_kd_at_and_its_decaying_weight_are_the_losses_of_these_names_and_the_papers_beta_counts_half():
    student, teacher = network().eval(), network("wrn-10-2", 1).eval()
    images, labels = batch()
    loss, _, logits = objective(METHODS["kd"], student, teacher)(student, images, labels)
    assert torch.allclose(loss, kd_loss(logits, teacher(images).detach(), labels, T=4.0, alpha=0.9))
    for mode, share in (("code", 1.0), ("paper", 0.5)):
        method = Distillation("at", weighed(10.0), mode=mode)
        loss, terms, _ = objective(method, student, teacher)(student, images, labels)
        at = sum(v for k, v in terms.items() if k.startswith("at_"))
        assert torch.allclose(loss - terms["cross_entropy"], share * 10 * at, rtol=1e-5)
    layer = backbones.stages(student)[1]
    with torch.no_grad(), features.taps(student, [layer]) as maps, features.taps(teacher, [layer]) as reference:
        student(images), teacher(images)
    assert torch.allclose(terms["at_2"], at_loss(maps[layer], reference[layer], mode="paper"), rtol=1e-5)
    made = objective(Distillation("at", weighed(8.0, "linear")), student, teacher, steps=4)
    assert [float(made(student, images, labels, step)[1]["beta"]) for step in range(4)] == [8.0, 6.0, 4.0, 2.0]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("wrn-10-1", "bn", "relu"), ("inception_bn", "in5b.before_relu", "in5b"), ("resnet14", "layer4.0.bn3", "layer4.0")]
)
def test_taps_lie_before_and_after_the_last_relu(name, before, after):
    model = backbones.build(name, 3, stem="cifar", **({} if name.startswith("wrn") else {"width": 1 / 16}))
    assert tapped(model, "before-relu") == [before] and tapped(model, "after-relu") == [after]
    assert tapped(model, "groups") == backbones.stages(model) and tapped(model, "last") == backbones.stages(model)[-1:]
    made = objective(Distillation("nst", weighed(1.0), taps="after-relu"), model, network("wrn-10-2"))
    assert made.pairs[0].size <= (4, 4)


def test_networks_of_different_families_and_map_sizes_are_compared_at_the_smaller_size(recwarn):
    student = backbones.build("inception_bn", 3, stem="cifar", width=1 / 16)
    made = objective(METHODS["nst-kd"], student, network("wrn-10-2", 1))
    loss, _, _ = made(student, *batch())
    assert [pair.size for pair in made.pairs] == [(2, 2)] and math.isfinite(float(loss))
    assert not [w for w in recwarn if "area averaging" in str(w.message)]  # said once, in the result


@pytest.mark.parametrize(("change", "sentence"), [
    ({"transfer": "fsp"}, "transfer must be one of none, at,"), ({"weight": 1000.0}, "weight must be a BetaSchedule"),
    ({"kernel": "rbf"}, "kernel must be one of poly, linear, gaussian, got 'rbf'"),
    ({"mode": "torch"}, "mode must be one of code, paper, got 'torch'"),
    ({"taps": "all"}, "taps must be one of groups, last, before-relu, after-relu, got 'all'"),
    ({"temperature": 0}, "temperature must be a number above 0, got 0"),
    ({"temperature": math.nan}, "temperature must be a number above 0, got nan"),
    ({"exponent": 0.0}, "exponent must be a number above 0"), ({"hard": -0.1}, "hard must be a number of at least 0"),
    ({"degree": 0}, "degree must be a whole number of at least 1, got 0"), ({"hard": 0.0}, "hard and soft are both 0"),
    ({"offset": -1.0}, "offset must be a number of at least 0"),
    ({"transfer": "at"}, "the weight of the transfer 'at' is 0"),
])  # fmt: skip
def test_a_setting_out_of_range_is_one_sentence(change, sentence):
    with pytest.raises(AFDSError) as error:
        Distillation(**change)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_networks_that_do_not_fit_and_a_teacher_that_was_thawed_are_one_sentence():
    student, teacher = network(), network("wrn-10-2", 1)
    inception = backbones.build("inception_bn", 3, stem="cifar", width=1 / 16)
    hint, made = Distillation("hint", weighed(1.0), taps="last"), objective(METHODS["at"], student, teacher)
    for make, words in (
        (lambda: objective(METHODS["at"], student, tiny.network()), "the student has 3 stages and the teacher 4; use"),
        (lambda: objective(METHODS["at"], student, None), "needs a teacher"),
        (lambda: objective(hint, inception, teacher), "maps of one size, but the student's 'in5b' is 2x2"),
        (lambda: objective(METHODS["kd"], student, backbones.build("wrn-10-1", 5))(student, *batch()), "equal shapes"),
        (lambda: made.teacher.model.train() and made(student, *batch()), r"train mode.*teacher.model.eval\(\)\.$"),
        (lambda: made.teacher.model.eval().requires_grad_(True) and made(student, *batch()), r"\(False\)\.$"),
    ):
        with pytest.raises(AFDSError, match=words):
            make()


TEACHER = StudentRun(DataSource("tiny-source"), Network("wrn-10-2"), tiny.settings(3, log_rows=1))


def student_run(method, steps=4, **kwargs):
    teacher = TEACHER if method.needs_teacher else None
    settings = tiny.settings(steps, log_rows=2)
    return StudentRun(DataSource("tiny-source"), Network("wrn-10-1"), settings, method, teacher, **kwargs)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with tiny.served():
        runs.get_or_run(TEACHER, store=folder)
    return folder


LOGGED = {
    "alone": [], "at-kd": ["soft", "at_1", "at_2", "at_3", "beta"], "gradient-at": ["gradient_at", "beta"],
    "hint": ["hint_1", "hint_2", "hint_3", "beta"],
}  # fmt: skip


@pytest.mark.parametrize("name", LOGGED)
def test_a_student_is_trained_once_and_every_term_is_logged(store, name):
    config = student_run(METHODS[name])
    with tiny.served():
        result = runs.get_or_run(config, store=store)
        assert runs.get_or_run(config, store=store).path == result.path
    log = result.history()
    assert [column for column in log if column in {*LOGGED[name], "soft", "beta"}] == LOGGED[name]
    assert {"cross_entropy", "lr", "validation_accuracy", "l2"} <= set(log) and len(log) == 2
    m = result.metrics
    assert m["steps"] == 4 and 0 <= m["test_accuracy"] <= 1 and sum(map(sum, m["confusion"])) == 24
    teacher = runs.lookup(TEACHER, store=store).metrics["macs"] if name != "alone" else 0
    assert m["training_macs"] == (3 * m["macs"] + teacher) * 4 * 8


def test_a_trial_reads_no_test_image_and_without_validation_images_the_test_set_is_read_once_and_nothing_else(store):
    with tiny.served():
        result = runs.get_or_run(student_run(METHODS["alone"], seed=7, use_test=False), store=store)
    assert not [key for key in result.metrics if "test" in key] and "validation_accuracy" in result.metrics
    with mock.patch.object(data, "load", lambda *_, **__: replace(tiny.splits(), validation=None)):
        result = runs.get_or_run(student_run(METHODS["alone"], seed=8), store=store)
    assert "validation_accuracy" not in result.metrics and "validation_accuracy" not in result.history()
    assert "test_accuracy" in result.metrics


def test_a_map_that_is_not_finite_makes_a_result_that_says_so(store, monkeypatch):
    def broken(self, *args):
        raise DivergedError("the loss cannot be computed")

    monkeypatch.setattr(Objective, "forward", broken)
    with tiny.served():
        result = runs.get_or_run(student_run(METHODS["at"], seed=9), store=store)
    assert result.metrics["steps"] == 0
    assert result.metrics["diverged"] == "the loss cannot be computed at step 1: the loss cannot be computed"


def test_the_training_loop_names_the_term_where_the_losses_do_not_look_for_nan(tmp_path, monkeypatch):
    """As on an accelerator, where a loss that is not finite is returned."""
    student = network()
    made = objective(METHODS["at"], student, network("wrn-10-2", 1))
    with torch.no_grad():
        made.teacher.model.get_submodule(made.pairs[2].teacher).conv2.weight.fill_(float("nan"))
    with pytest.raises(DivergedError, match="cannot be computed at step 1: Teacher map holds"):
        tiny.fit(tmp_path / "cpu", student, made)
    with monkeypatch.context() as patch, pytest.raises(DivergedError, match="the loss term 'at_3' is nan at step 1 "):
        patch.setattr(_checks, "finite", lambda loss, **_: loss)
        tiny.fit(tmp_path / "accelerator", student, made)
    with torch.no_grad():
        student.conv1.weight.fill_(float("nan"))
    with pytest.raises(DivergedError, match="^Student map holds .* NaN or infinite"):
        made(student, *batch())


def test_runs_that_make_no_sense_are_one_sentence():
    with pytest.raises(AFDSError, match="the method 'at' needs a teacher; give the run of one"):
        replace(student_run(METHODS["at"]), teacher=None)
    with pytest.raises(AFDSError, match="a teacher is given but the method compares nothing"):
        replace(student_run(METHODS["at"]), method=Distillation())
    longer = Distillation("at", BetaSchedule("linear", beta=1.0, length=5))
    with pytest.raises(AFDSError, match="The linear beta schedule takes 5 and the run only 4"):
        student_run(longer)
    with pytest.raises(AFDSError, match="weight_decay must be a number of at least 0"):
        student_run(METHODS["at"], weight_decay=-1.0)


def test_student_parameters_and_adapters_are_optimised_and_the_teachers_are_not():
    student = network()
    made = objective(METHODS["hint"], student, network("wrn-10-2", 1))
    ids = {id(p) for group in loop._groups(student, made, tiny.settings()) for p in group["params"]}
    assert {id(p) for p in (*student.parameters(), *made.term.parameters())} <= ids
    assert not ids & {id(p) for p in made.teacher.model.parameters()}
    assert all(isinstance(adapter, nn.Conv2d) for adapter in made.term)
