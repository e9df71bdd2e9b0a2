"""Terms: one of the test's own in whole runs, what a registry refuses, and what the objective makes of them."""

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
from afdslib.studies.protocol import Method, label_of, regulariser_space
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
def test_a_regulariser_of_ones_own_runs_through_transfer_and_pruned_runs(toys, tmp_path, name):
    """Declared in this file alone: runs, the search space, names for readers, the state and its taking over."""
    assert regulariser_space(name)[0].name == "strength" and label_of(name) == TERMS[name].label
    assert Method.parse(f"{name}+taylor").label.startswith(TERMS[name].label)
    stage = tiny.settings(3, log_rows=3)
    start = ExtendedSourceRun(tiny.SOURCE, DataSource("tiny-source"), tiny.settings(0))
    dense = DenseRun(start, DataSource("tiny-target"), Regulariser(name, 0.5), stage, macs_images=12)
    pruned = PrunedRun(dense, Selection("l1"), stage, (0.5,))
    with tiny.served():
        store = tiny.store(tmp_path)
        for config in (tiny.transfer(name, 0.5, budgets=(1.0, 0.5)), pruned):
            history = runs.get_or_run(config, store=store).history()
            assert (history.cosine > 0).all() and (history.loss != history.cross_entropy).all()
            if name == "cosine":
                torch.testing.assert_close(
                    torch.tensor(history.loss), torch.tensor(history.cross_entropy + 0.5 * history.cosine)
                )
        state = load_file(runs.get_or_run(pruned, store=store).artifact(OBJECTIVE))
    assert list(state) == ([] if name == "cosine" else [f"term.{i}" for i in range(4)])
    assert runs.from_json(runs.to_json(dense)) == dense


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"name": "other"}, "needs a name and a label"),
        ({"name": "afd", "label": "x"}, "the name 'afd' belongs to AFD"),
        ({"name": "x", "label": "X", "needs": frozenset({"gold"})}, "x needs 'gold', which no run has"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_one_sentence(attributes, words):
    with pytest.raises(AFDSError, match=words):
        TERMS.register(type("Mine", (Term,), attributes))


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
    torch.testing.assert_close(
        plain(model, images, labels)[0], kd_loss(logits, teacher(images).detach(), labels, T=4.0, alpha=0.7)
    )
    with pytest.raises(AFDSError, match="needs the source network or a teacher"):
        Objective(model, terms=[SoftLabels(4.0, 0.7)])


def test_two_terms_do_not_share_a_place_for_their_state(toys):
    model = tiny.network()
    first = Objective(model, Regulariser("lwf", 0.1), model, SIZE)
    with pytest.raises(AFDSError, match="two terms keep their state in 'term'"):
        Objective(model, Regulariser("scaled", 0.1), model, SIZE, terms=first.terms)
    with pytest.raises(NotImplementedError, match="lacks __call__"):
        Term(type("Nothing", (), {"config": None, "pairs": ()})())(Batch(model, *[torch.ones(1)] * 3))
