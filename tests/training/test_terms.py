"""Terms: one of the test's own in whole runs, what a registry refuses, and what the objective makes of them."""

import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import faulty
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from afdslib import backbones, runs
from afdslib.base.errors import AFDSError
from afdslib.experiments import OBJECTIVE, DataSource, DenseRun, ExtendedSourceRun, PrunedRun, Selection
from afdslib.losses import TERMS, Axis, Batch, Term, kd_loss
from afdslib.losses.kd import Distil, SoftLabels
from afdslib.report.plots import style
from afdslib.report.plots.methods import accuracy_macs
from afdslib.studies import workers
from afdslib.studies.profile import Candidates
from afdslib.studies.protocol import Method, label_of, regulariser_space
from afdslib.studies.sweep import Study
from afdslib.training.features import Teacher, feature_names
from afdslib.training.objective import Objective, Regulariser

SIZE = (3, tiny.SIZE, tiny.SIZE)


@pytest.fixture
def toys(monkeypatch):
    """Two regularisers of the test's own: one without state, one that trains a scale per layer beside the network."""
    known = dict(TERMS)

    @TERMS.register
    class Cosine(Term):
        name, label = "cosine", "cosine distance"
        space = (Axis("strength", 1.0, 1e-2, 1e2),)
        needs = frozenset({"layers"})

        def __call__(self, batch):
            pairs = [(batch.student[n].flatten(1), batch.teacher[n].flatten(1)) for n in batch.student]
            value = sum(1 - nn.functional.cosine_similarity(s, t).mean() for s, t in pairs)
            return value, {"cosine": value}

    @TERMS.register
    class Scaled(Cosine):
        name, label = "scaled", "scaled cosine distance"

        def build(self, context):
            return nn.ParameterList(torch.ones(shape[0]) for shape in context.shapes.values())

        def __call__(self, batch):
            value, logged = super().__call__(batch)
            return value + sum((p - 1).square().sum() + p.sum() for p in self.module), logged

    yield Cosine
    TERMS.clear()
    TERMS.update(known)


@pytest.mark.parametrize("name", ["cosine", "scaled"])
def test_a_regulariser_of_ones_own_runs_through_a_study_and_pruned_runs(toys, tmp_path, monkeypatch, name):
    """Declared in this file alone, but for a line of colour: runs, table, figure, the state's inheritance."""
    label = TERMS[name].label
    assert regulariser_space(name)[0].name == "strength" and label_of(name) == label
    assert Method.parse(f"{name}+taylor").label.startswith(label)
    monkeypatch.setitem(style.METHODS, name, style.Look(label, "#7F7F7F", "X"))
    monkeypatch.setenv("AFDS_RUNS", str(tiny.store(tmp_path)))
    stage, regulariser = tiny.settings(3, log_rows=3), Regulariser(name, 0.5)
    candidates = (Candidates(regulariser, (0.5,)),)
    profile = replace(faulty.profile(), transfer=stage, tuning=stage, budgets=(1.0, 0.5), candidates=candidates)
    start = ExtendedSourceRun(tiny.SOURCE, DataSource("tiny-source"), tiny.settings(0))
    dense = DenseRun(start, DataSource("tiny-target"), regulariser, stage, macs_images=12)
    with tiny.served():
        table = Study(profile, workers=1).sweep()
        pruned = runs.get_or_run(PrunedRun(dense, Selection("l1"), stage, (0.5,)))
    assert list(table.method) == [name] * 2 and list(table.budget) == [1.0, 0.5]
    drawn = accuracy_macs(table).legends[0].get_texts()
    assert [text.get_text() for text in drawn] == [label]
    for history in (pruned.history(), *(runs.finished(id)[1].history() for id in table.run)):
        assert (history.cosine > 0).all() and (history.loss != history.cross_entropy).all()
        if name == "cosine":
            np.testing.assert_allclose(history.loss, history.cross_entropy + 0.5 * history.cosine, rtol=1e-6)
    assert list(load_file(pruned.artifact(OBJECTIVE))) == ([] if name == "cosine" else [f"term.{i}" for i in range(4)])
    assert runs.from_json(runs.to_json(dense)) == dense


def test_a_worker_imports_the_modules_of_all_terms(toys, tmp_path, monkeypatch):
    """A worker is a new process, which knows what its modules declare."""
    source = "from afdslib.losses import TERMS, Term\n@TERMS.register\nclass Own(Term):\n    name = label = 'own'\n"
    (tmp_path / "own_term.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    started = []
    context = SimpleNamespace(Process=lambda target, args: started.append((target, args)) or mock.Mock(exitcode=0))
    monkeypatch.setattr(workers, "get_context", lambda _: context)
    importlib.import_module("own_term")
    workers.alongside(print, (), 2)
    del TERMS["own"], sys.modules["own_term"]
    ((target, arguments),) = started
    target(*arguments)
    assert TERMS["own"].label == "own"


def test_networks_of_different_depth_are_compared_stage_by_stage():
    torch.manual_seed(0)
    student, teacher = (backbones.build(n, 3, stem="cifar", width=1 / 16).eval() for n in ("resnet18", "resnet34"))
    (images, labels), *_ = tiny.batches(4, 4)
    layers = feature_names(teacher, "block")
    features = Teacher(teacher, layers)(images)[1]
    assert layers != feature_names(student, "block")
    for name in ("at", "feature-map", "afd"):
        objective = Objective(student, Regulariser(name, 0.1), teacher, SIZE)
        assert [pair.teacher for pair in objective.pairs] == layers
        given = objective._teach(images)[1]
        assert all(torch.equal(given[p.student], features[p.teacher]) for p in objective.pairs)
        assert objective(student, images, labels)[0].isfinite()
    with pytest.raises(AFDSError, match="the student has 4 stages and the teacher 3"):
        Objective(student, Regulariser("at", 0.1), backbones.build("wrn-10-1", 3), SIZE)


@pytest.mark.parametrize("name", ["l2sp", "afd", "at", "lwf"])
def test_fp64_is_float64_from_the_logits_on(tmp_path, name):
    model = tiny.network()
    terms = [Distil(2.0, 0.5, Teacher(tiny.network(2)))]
    objective = Objective(model, Regulariser(name, 0.1), tiny.network(1), SIZE, terms=terms)
    tiny.fit(tmp_path, model, objective, settings=tiny.settings(1, precision="fp64"))
    (images, labels), *_ = tiny.batches(4, 4)
    loss, logged, logits = objective(model, images.double(), labels)
    exact = nn.functional.cross_entropy(logits, labels)
    assert loss.dtype == torch.float64 and torch.equal(logged["cross_entropy"], exact)
    assert not torch.equal(exact, nn.functional.cross_entropy(logits.float(), labels).double())


def test_distillation_takes_back_the_cross_entropy_that_the_loss_holds():
    model, teacher = tiny.network().eval(), tiny.network(1).eval()
    (images, labels), *_ = tiny.batches(4, 4)
    smooth = Objective(model, label_smoothing=0.2, terms=[Distil(4.0, 0.7, Teacher(teacher))])
    loss, logged, logits = smooth(model, images, labels)
    hard = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(loss, 0.7 * logged["kd"] + 0.3 * hard)
    plain = Objective(model, source=teacher, terms=[SoftLabels(4.0, 0.7)], hard=0.3)
    wanted = kd_loss(logits, teacher(images).detach(), labels, T=4.0, alpha=0.7)
    torch.testing.assert_close(plain(model, images, labels)[0], wanted)
    with pytest.raises(AFDSError, match="needs the source network or a teacher"):
        Objective(model, terms=[SoftLabels(4.0, 0.7)])


def test_declarations_that_make_no_sense_and_two_terms_that_share_a_place_for_their_state_are_refused(toys):
    model = tiny.network()
    first = Objective(model, Regulariser("lwf", 0.1), model, SIZE)
    with pytest.raises(AFDSError, match="two terms keep their state in 'term'"):
        Objective(model, Regulariser("scaled", 0.1), model, SIZE, terms=first.terms)
    for attributes, words in (
        ({"name": "new"}, "needs a name and a label"), ({"name": "afd", "label": "x"}, "the name 'afd' belongs to AFD"),
        ({"name": "x", "label": "X", "needs": frozenset({"gold"})}, "x needs 'gold', which no run has"),
    ):  # fmt: skip
        with pytest.raises(AFDSError, match=words):
            TERMS.register(type("Mine", (Term,), attributes))
    with pytest.raises(NotImplementedError, match="lacks __call__"):
        Term(type("Nothing", (), {"config": None, "pairs": ()})())(Batch(model, *[torch.ones(1)] * 3))
