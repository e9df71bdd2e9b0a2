"""Recipes: what they choose, what they refuse, training alone and with a teacher, evaluation of weights."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_distributed import make_teacher, make_tree

from afdslib import afs, backbones, cli, runs, training
from afdslib.backbones import registry
from afdslib.backbones.inputs import RAW, input_of
from afdslib.base.errors import AFDSError
from afdslib.experiments import Distillation, Network, Photographs, PhotoRun, Published
from afdslib.inference import maps
from afdslib.losses import BetaSchedule
from afdslib.studies import recipes
from afdslib.studies import students as distillation_study
from afdslib.studies.recipes import RECIPES
from afdslib.studies.students import DistillationStudy
from afdslib.training import Optimisation, distributed

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


def small(tree, **changes) -> PhotoRun:
    settings = Optimisation(steps=4, batch_size=5, lr=0.05, log_rows=2)
    network = changes.pop("network", Network("resnet18", width=1 / 16))
    return PhotoRun(Photographs(str(tree), size=32), network, settings, **changes)


KINDS = ("wrn-16-1", "wrn-16-1-at-kd", "resnet18-at", "inception-bn-nst", "resnet50-senet-nst-kd", "scenes", "cub-at")


@pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.exhaustive) for n in RECIPES])
def test_every_recipe_has_a_plan_without_its_data(name):
    chosen = recipes.prepare(name, size=None if name.startswith("wrn") else 64, must_exist=False)
    text = recipes.plan(chosen, processes=8)
    share = chosen.run.optimisation.batch_size // 8
    assert f"processes: 8, {share} images of each batch" in text and "training MACs" in text
    assert "missing on this machine:" in text and f"data: {chosen.recipe.data}" in text
    assert ("compared: no feature maps" in text) == (chosen.recipe.method.transfer == "none")
    assert runs.from_json(runs.to_json(chosen.run)) == chosen.run


def test_the_published_settings_are_those_of_the_codes():
    at = recipes.prepare("resnet18-at", must_exist=False).run
    assert (at.network.name, at.teacher) == ("resnet18", Published("resnet34"))
    assert at.method == Distillation("at", BetaSchedule(beta=1000.0)) and at.data.augmentation == "inception"
    s = at.optimisation
    assert (s.steps, s.batch_size, s.lr, s.drop, s.nesterov) == (100 * (1_281_167 // 256), 256, 0.1, 0.1, False)
    epoch = s.steps // 100
    rates = [round(s.factor(epoch * e), 6) for e in (0, 29, 30, 59, 60, 89, 90, 99)]
    assert rates == [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    nst = recipes.prepare("inception-bn-nst-kd", must_exist=False).run
    assert nst.teacher == Published("resnet101") and nst.optimisation.nesterov and nst.optimisation.batch_size == 512
    method = nst.method
    assert (method.transfer, method.weight.beta, method.hard, method.soft) == ("nst", 50.0, 1.0, 1.0)
    assert (method.temperature, method.kernel, method.degree, method.offset) == (4.0, "poly", 2, 0.0)
    assert method.taps == "before-relu" and nst.data.augmentation == "resnext" and nst.weight_decay == 1e-4
    alone = recipes.prepare("inception-bn", must_exist=False).run
    assert alone.teacher is None and alone.method == Distillation() and alone.optimisation == nst.optimisation
    senet = recipes.prepare("resnet50-senet-nst-kd", must_exist=False).run
    assert senet.network.name == "resnet50_senet" and senet.method == nst.method


def test_the_cifar_recipes_are_the_runs_of_the_notebooks_paper_profile_and_scenes_fine_tune_a_teacher_first():
    study = DistillationStudy(distillation_study.get("attention", "paper", "standard"))
    for name, method, seed in (("wrn-16-1-at", "at", 2), ("wrn-16-1-kd", "kd", 0), ("wrn-16-1-at-kd", "at-kd", 1)):
        mine = recipes.prepare(name, seed=seed, must_exist=False).run
        theirs = study.student_run(study.profile.pairs[0], method, seed, weight=1000.0)
        assert runs.run_id(mine) == runs.run_id(theirs)
    alone = recipes.prepare("wrn-40-2", must_exist=False).run
    assert runs.run_id(alone) == runs.run_id(study.teacher_run(Network("wrn-40-2")))
    other = recipes.prepare("wrn-16-1-at", teacher="wrn-40-1", must_exist=False).run
    assert other.teacher.network == Network("wrn-40-1")
    for name, data_set in (("scenes-at", "mit-indoors"), ("cub-at", "cub-200-2011")):
        run = recipes.prepare(name, must_exist=False).run  # which fine-tunes the teacher first
        assert run.data.name == data_set and run.network == Network("resnet18", weights="imagenet")
        assert isinstance(run.teacher, PhotoRun) and run.teacher.network == Network("resnet34", weights="imagenet")
        assert run.teacher.teacher is None and run.teacher.data == run.data


def test_another_weight_keeps_the_recipes_schedule_which_the_plan_shows():
    for name, kind, words in (
        ("wrn-16-1-at", "constant", "+ 500 at (constant)"),
        ("wrn-16-1-at-kd", "cosine", "+ 500 at (cosine, to 0 at the end)"),
    ):
        chosen = recipes.prepare(name, weight=500.0, must_exist=False)
        assert chosen.run.method.weight == BetaSchedule(kind, beta=500.0) and words in recipes.plan(chosen)
    assert recipes.prepare(name, weight=1000.0, must_exist=False).run == recipes.prepare(name, must_exist=False).run


def test_a_plan_names_the_layers_and_the_size_at_which_they_are_compared():
    for name, words in (
        ("resnet18-at", "compared: layer1.1 with layer1.2 at 16x16, "),
        ("inception-bn-nst", "in5b.before_relu with layer4.2.bn3 at 2x2; layer4.2.bn3 is a batch norm before the "),
    ):
        text = recipes.plan(recipes.prepare(name, size=64, must_exist=False))
        assert words in text and ("residual sum, not the ReLU's input" in text) == ("nst" in name)


@pytest.mark.parametrize("name, options, words", [
    ("resnet19-at", {}, "there is no recipe 'resnet19-at'; take one of wrn-40-1, "),
    ("resnet18", {"teacher": "resnet34"}, "'resnet18' has no teacher"),
    ("resnet18", {"weight": 1.0}, "'resnet18' has no transfer loss"),
    ("resnet18-at", {"teacher": "none.pth"}, "'none.pth' is neither a weight file nor a backbone"),
    ("resnet18-at", {"epochs": 0}, "epochs must be .* got 0"), ("resnet18-at", {"weight": -1.0}, "beta .* got -1.0"),
    ("resnet18-at", {"lr": -1.0}, "lr must be a number above 0, got -1.0"),
    ("resnet18-at", {"batch_size": 0}, "batch_size must be .* got 0"),
    ("resnet18-at", {"precision": "fp8"}, "precision must be one of"),
    ("resnet18-at", {"data_set": "no/tree"}, "the data set path no/tree does not exist"),
    ("wrn-16-1", {"data_set": "mit-indoors"}, "'wrn-16-1' is for cifar10, not 'mit-indoors'; leave out --data"),
    ("wrn-16-1-at", {"size": 64}, "'wrn-16-1-at' takes CIFAR-10's images as they are, 32 px; leave out --size"),
    ("wrn-16-1-at", {"teacher": "model.safetensors"}, "the name of a wide ResNet, .* not 'model.safetensors'"),
    ("wrn-16-1-at", {"teacher": "resnet34"}, "the name of a wide ResNet, .* not 'resnet34'"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(name, options, words):
    with pytest.raises(AFDSError, match=words) as caught:
        recipes.prepare(name, **options, must_exist=False)
    assert "\n" not in str(caught.value)


def teacher_of(run: PhotoRun, folder: Path) -> torch.nn.Module:
    """The teacher that a student's training gets."""
    with mock.patch.object(PhotoRun, "fit", side_effect=KeyboardInterrupt) as fit, pytest.raises(KeyboardInterrupt):
        run.execute(runs.Run("0" * 12, folder, folder))
    return fit.call_args.args[3]


def test_a_student_trains_with_a_teacher_that_expects_other_images(tree, teacher, tmp_path):
    """Inception-BN takes raw pixels, its teacher normalised ones: the teacher still sees its own kind."""
    method = Distillation("nst", BetaSchedule(beta=5.0), soft=1.0, taps="before-relu")
    network = Network("inception_bn", width=1 / 16)
    run = small(tree, network=network, teacher=Published.of(str(teacher)), method=method)
    student_view = run.data.load(RAW).test
    teacher_view = run.data.load().test
    mine = teacher_of(run, tmp_path)(student_view[0][0][None])
    torch.testing.assert_close(mine, Published.of(str(teacher)).build().eval()(teacher_view[0][0][None]))
    result = runs.get_or_run(run)
    assert result.metrics["steps"] == 4 and result.metrics["images"] == 20 and result.metrics["processes"] == 1
    history = result.history()
    assert {"cross_entropy", "soft", "nst_1", "test_accuracy", "test_top5_accuracy"} <= set(history.columns)
    total = history["cross_entropy"] + history["soft"] + 5 * history["nst_1"]
    assert history["loss"].to_numpy() == pytest.approx(total.to_numpy(), rel=1e-5)
    assert result.metrics["test_top5_accuracy"] == 1  # of three classes
    assert result.metrics["compared"] == [[1, 1]]
    # The file says that it takes raw pixels, and is evaluated, taught by and looked through so.
    file = result.artifact("model.safetensors")
    model = afs.load(file)
    assert input_of(model) == RAW
    found = recipes.evaluate(str(file), data_set=str(tree), size=32)
    assert found.loss == pytest.approx(result.metrics["test_loss"], rel=1e-5)
    pupil = small(tree, teacher=Published.of(str(file)), method=Distillation(soft=1.0))
    seen = teacher_of(pupil, tmp_path)(teacher_view[0][0][None])
    torch.testing.assert_close(seen, model(student_view[0][0][None]))
    view = maps.look_at({"one": model}, student_view.raw(0), student_view.classes)
    assert view.networks["one"].prediction in student_view.classes


def test_the_modified_resnet50_is_trained_by_nst_and_kd(tree, teacher):
    options = {"size": 64, "width": 1 / 16, "epochs": 1, "batch_size": 10}
    run = recipes.prepare("resnet50-senet-nst-kd", data_set=str(tree), teacher=str(teacher), **options).run
    result = runs.get_or_run(run)
    assert result.metrics["steps"] == 2 and result.metrics["compared"] == [[2, 2]]
    row = result.history().iloc[-1]
    assert row["loss"] == pytest.approx(row["cross_entropy"] + row["soft"] + 50 * row["nst_1"], rel=1e-5)
    before, after = run.network.build(3, run.seed), afs.load(result.artifact("model.safetensors"))
    assert after.architecture["input"]["mean"] == [123.68, 116.28, 103.53]
    assert not torch.equal(after.state_dict()["conv1.0.weight"], before.state_dict()["conv1.0.weight"])


def test_a_teacher_is_fine_tuned_and_then_teaches_a_student_that_is(tree, monkeypatch):
    """The whole chain of a recipe, with narrow networks and weights that stand in for torchvision's."""
    bare = registry._bare
    monkeypatch.setattr(registry, "_bare", lambda *a, **k: bare(*a, **{**k, "width": 1 / 16}))
    states = {name: backbones.build(name, 1000).state_dict() for name in ("resnet18", "resnet34")}
    monkeypatch.setattr(backbones.loading, "imagenet_state", lambda name: states[name])
    run = recipes.prepare("scenes-at", data_set=str(tree), size=64, epochs=1, batch_size=10, lr=1e-4).run
    result = runs.get_or_run(run)
    teaching = runs.lookup(run.teacher)
    assert result.metrics["steps"] == teaching.metrics["steps"] == 2
    assert {r.kind for r in runs.list_runs()} == {"PhotoRun"} and len(runs.list_runs()) == 2
    assert result.metrics["compared"] == [[16, 16], [8, 8], [4, 4], [2, 2]]
    assert {"at_1", "at_4", "beta"} <= set(result.history().columns) and "at_1" not in teaching.history()
    for found, name in ((result, "resnet18"), (teaching, "resnet34")):
        trained = afs.load(found.artifact("model.safetensors")).state_dict()
        moved = (trained["conv1.weight"] - states[name]["conv1.weight"]).abs().max()
        assert 0 < moved < 0.05  # it began with those weights; others differ by 0.3
    loaded = afs.load_network(result.artifact("model.safetensors"))
    evaluated = training.evaluate(loaded, run.data.load().test)
    assert evaluated.accuracy == pytest.approx(result.metrics["test_accuracy"])


def test_a_teacher_of_other_classes_or_a_needless_one_is_refused(tree, tmp_path):
    torch.manual_seed(0)
    export = tmp_path / "five.safetensors"
    afs.save(backbones.build("resnet18", 5, width=1 / 16), export)
    with pytest.raises(AFDSError, match="the teacher knows 5 classes and .* has 3"):
        runs.get_or_run(small(tree, teacher=Published.of(str(export)), method=Distillation(soft=1.0)))
    with pytest.raises(AFDSError, match="compares nothing with it"):
        small(tree, teacher=Published("resnet34"))
    with pytest.raises(AFDSError, match="needs a teacher"):
        small(tree, method=Distillation("at", BetaSchedule(beta=1.0)))


def test_double_differentiation_is_refused_for_several_processes(tree, teacher, monkeypatch):
    method = Distillation("gradient-at", BetaSchedule(beta=1.0))
    run = small(tree, teacher=Published.of(str(teacher)), method=method)
    with monkeypatch.context() as patch, pytest.raises(AFDSError, match="differentiates the network twice"):
        patch.setattr(distributed, "world", lambda: 2)
        run.execute(runs.Run("0" * 12, distributed.Path("nowhere"), distributed.Path(".")))
    assert runs.get_or_run(run).metrics["steps"] == 4


SHORT = ["--size", "32", "--epochs", "1", "--batch-size", "10", "--width", "0.0625"]


def test_distill_plans_trains_and_evaluate_measures_what_it_wrote(tree, teacher, capsys):
    command = ["distill", "--recipe", "resnet18-at", "--data", str(tree), "--teacher", str(teacher), *SHORT]
    assert cli.main([*command, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "20 training images, 3 classes" in plan and f"the file {teacher}" in plan and "a GPU" in plan
    assert not runs.list_runs()
    assert cli.main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    file = runs.folder() / printed["id"] / "model.safetensors"
    assert cli.main(["evaluate", str(file), "--data", str(tree), "--size", "32"]) == 0
    words = capsys.readouterr().out
    assert f"top-1 error {1 - printed['test_accuracy']:.2%}, top-5 error 0.00%" in words and "6 images" in words
    names = sorted(folder.name for folder in (tree / "train").iterdir())
    outputs = ",".join(f"{name}={i}" for i, name in enumerate(names))
    assert cli.main(["evaluate", str(file), "--data", str(tree), "--size", "32", "--classes", outputs]) == 0
    assert capsys.readouterr().out == words
    for wrong, why in (("cat", "NAME=OUTPUT"), ("cat=1", "need an output of the network each")):
        assert cli.main(["evaluate", str(file), "--data", str(tree), "--size", "32", "--classes", wrong]) == 2
        assert why in capsys.readouterr().err


def test_the_public_exports_are_evaluated_and_teach(tree, capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "backbones"))
    from test_backbones_importers import _folded

    state = {name: value * 0.5 for name, value in _folded((3, 4, 6, 3)).items()}
    state["fc.weight"], state["fc.bias"] = state["fc.weight"][:3], state["fc.bias"][:3]
    file = tmp_path / "resnet-34-export.pth"
    torch.save(state, file)
    assert cli.main(["evaluate", str(file), "--data", str(tree), "--size", "32"]) == 0
    assert "top-1 error" in capsys.readouterr().out
    assert cli.main(["distill", "--recipe", "resnet18-at", "--data", str(tree), "--teacher", str(file), *SHORT]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


@pytest.mark.parametrize("arguments, words", [
    (["evaluate", "none.pth"], "'none.pth' is neither a weight file nor a backbone"),
    (["evaluate", "inception_bn"], "There are no ImageNet weights for 'inception_bn'"),
    (["evaluate", "FILE", "--data-dir", "nowhere"], "the data folder nowhere does not exist"),
    (["evaluate", "FILE", "--data", "digits", "--size", "32"], "digits"),
    (["distill", "--recipe", "resnet18-at"], "imagenet is not on this machine"),
    (["distill", "--recipe", "resnet18-at", "--epochs", "0"], "--epochs"),
], ids=str)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(teacher, refused, arguments, words):
    assert words in refused(*(str(teacher) if a == "FILE" else a for a in arguments))
