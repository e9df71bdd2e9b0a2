"""A look inside trained networks, on a study of three steps over a tree of coloured noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from afdslib import afs, runs
from afdslib.base import paths
from afdslib.experiments import DataSource, Network
from afdslib.report import checks, plots
from afdslib.report import views as inspection
from afdslib.studies import profiles
from afdslib.studies.profile import Candidates
from afdslib.studies.sweep import Study
from afdslib.training.objective import Objective, Regulariser


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    home = tmp_path_factory.mktemp("project")
    random = np.random.RandomState(0)
    for split, channel in ((s, c) for s in ("train", "test") for c in range(3)):
        folder = home / "tree" / split / "rgb"[channel]
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = random.randint(0, 120, (16, 16, 3))
            pixels[:, :, channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    demo = profiles.get("demo")
    fit = replace(demo.transfer, steps=4, batch_size=6, log_rows=2)
    tree = str(home / "tree")
    profile = replace(
        demo, source=DataSource(tree, size=16), targets=(DataSource(tree, per_class=6, size=16),),
        network=Network("resnet14", stem="cifar", width=1 / 16), source_training=fit, afs_training=fit, trial=fit,
        transfer=fit, tuning=fit, budgets=(1.0, 0.5), seeds=(0, 1), macs_images=18,
        candidates=tuple(Candidates(Regulariser(name, 1e-3), (1e-3,)) for name in ("l2", "feature-map", "afd"))
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFDS_HOME", str(home))
        for name in ("AFDS_RUNS", "AFDS_FIGURES", "AFDS_FRESH"):
            patch.delenv(name, raising=False)
        made = Study(profile, workers=1)
        made.sweep()
        yield made


def test_conversion_is_exact_in_both_modes_and_random_predictors_are_noticed(study, monkeypatch):
    errors = inspection.conversion_error(study, images=6)
    assert errors["float64 eval"] <= 1e-9 and errors["float64 train"] <= 1e-9 and errors["float32 eval"] <= 1e-5
    exact = afs.convert

    def random(model, **options):
        converted = exact(model, **options)
        for layer in afs.layers(converted).values():
            torch.nn.init.normal_(layer.predictor.weight)
        return converted

    monkeypatch.setattr(afs, "convert", random)
    assert not inspection.conversion_error(study, images=6)["float64 eval"] <= 1e-3  # may overflow to NaN


def test_gates_act_in_a_study_unless_they_are_ignored(study, monkeypatch):
    assert checks.gates_act(study, "afd", 0, (1.0, 0.5), images=6)
    monkeypatch.setattr(afs.AFSConvBN, "forward", lambda self, x: self.norm(self.conv(x)) + self.beta[:, None, None])
    assert not checks.gates_act(study, "afd", 0, (1.0, 0.5), images=6)


def test_a_regulariser_acts_in_a_study_unless_its_strength_is_forced_to_zero(study, monkeypatch):
    assert checks.regulariser_acts(study, "afd") and checks.regulariser_acts(study, "feature-map")
    assert checks.regulariser_acts(study, "afd", budget=0.5)
    forward = Objective.forward

    def without(self, *args):
        _, terms, logits = forward(self, *args)
        return terms["cross_entropy"], terms, logits

    monkeypatch.setattr(Objective, "forward", without)
    other = Study(replace(study.profile, transfer=replace(study.profile.transfer, lr=0.0123)), workers=1)
    assert not checks.regulariser_acts(other, "afd")
    candidates = tuple(replace(c, strengths=(0.0,)) for c in study.profile.candidates)
    assert not checks.regulariser_acts(Study(replace(study.profile, candidates=candidates), workers=1), "afd")


def test_attention_of_a_real_image_sums_to_one_in_each_layer(study):
    view = inspection.attention(study, index=2)
    sizes = inspection.feature_sizes(study)
    assert set(view.total) == set(sizes) and all(total == pytest.approx(1, abs=1e-5) for total in view.total.values())
    assert view.weights.shape == sizes[view.layer][:1] and view.maps.shape == sizes[view.layer]
    assert view.image.shape == (16, 16, 3) and view.image.dtype == np.uint8 and view.caption in "rgb"
    assert sizes[view.layer][1] >= 8  # coarse maps tell nothing about places
    assert len(plots.attention(view, top=2).get_axes()) == 5


def test_entropy_lies_between_zero_and_uniform(study):
    lowest, highest, uniform = inspection.entropy_bounds(study)
    assert 0 < lowest <= highest <= uniform + 1e-4


def test_histories_and_layers_are_those_of_the_points(study):
    found = inspection.histories(study, ["l2"])
    assert len(found["l2"]) == 2 and list(found["l2"][0].step) == [2, 4]
    layers = inspection.layers_by_budget(study, "afd", 0, (1.0, 0.5))
    removed = {budget: sum(layer["removed"] for layer in one.values()) for budget, one in layers.items()}
    assert removed[1.0] == 0 < removed[0.5]


def test_results_without_networks_are_shown_without_training(study, monkeypatch):
    """As on a machine that has only the committed results of a real study."""
    real = Study(replace(study.profile, committed=True), workers=1)
    points = [runs.Result(point, {}, paths.runs() / point) for point in study.sweep().run]
    runs.publish([*points, study.source(), study.afs_source()], "real")
    monkeypatch.setenv("AFDS_RUNS", str(paths.root() / "empty"))
    assert inspection.attention(real) is None
    assert inspection.conversion_error(real) is None
    assert inspection.attentions(real) == {} and checks.gates_act(real, "afd", 0, (0.5,)) is None
    assert len(inspection.histories(real)["afd"]) == 2  # what was logged is there
    assert not (paths.root() / "empty").exists()
