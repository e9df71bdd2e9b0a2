"""Crops, jitter and lighting: what they draw, that they are torchvision's operations, and any input statistics."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from afdslib import data
from afdslib.backbones.inputs import IMAGENET, RAW, InputStatistics
from afdslib.base.errors import AFDSError
from afdslib.data import photographs as module
from afdslib.data.datasets import Files
from afdslib.data.photographs import AUGMENTATIONS, Augmentation, PhotoImages, photographs, random_box


def images(pixels: np.ndarray | None = None, *, size: int = 24, **options) -> PhotoImages:
    if pixels is None:
        pixels = np.random.RandomState(0).randint(0, 256, (6, 40, 56, 3), dtype=np.uint8)
    rows = np.arange(len(pixels))
    return PhotoImages(Files(Path(), (), pixels), rows, rows % 2, ("a", "b"), size=size, **options)


def test_the_test_time_transform_is_torchvisions_and_raw_statistics_leave_the_pixels():
    split = images(statistics=IMAGENET)
    x, y = split.__getitems__([0, 3])
    assert x.shape == (2, 3, 24, 24) and x.dtype == torch.float32 and y.tolist() == [0, 1]
    recipe = v2.Compose(
        [
            v2.Resize(round(24 * 256 / 224), interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(24),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )  # fmt: skip
    for row, image in zip((0, 3), x, strict=True):
        torch.testing.assert_close(image, recipe(split._source.read(row)), rtol=0, atol=1e-5)
    split = images(np.full((1, 30, 30, 3), (10, 120, 250), dtype=np.uint8), statistics=RAW)
    assert split[0][0].mean((1, 2)).tolist() == [10, 120, 250]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmented_image_depends_on_seed_epoch_and_index_alone(name):
    split = images(augmentation=AUGMENTATIONS[name], seed=3)
    split.set_epoch(2)
    state = torch.get_rng_state()
    together, _ = split.__getitems__([4, 1, 1])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(together[0], split[4][0]) and torch.equal(together[1], together[2])
    again = images(augmentation=AUGMENTATIONS[name], seed=3)
    again.set_epoch(2)
    loader = DataLoader(again, batch_sampler=[[4], [1]], collate_fn=data.collate, num_workers=2)
    assert torch.equal(torch.cat([x for x, _ in loader]), together[:2])
    other = copy.copy(split)
    other.set_epoch(3)
    assert not torch.equal(other[4][0], together[0])
    assert not torch.equal(images(augmentation=AUGMENTATIONS[name], seed=4)[4][0], together[0])


def test_boxes_stay_inside_and_within_their_ranges_and_are_drawn_like_torchvisions():
    """The two distributions, by their means and deviations over many draws."""
    random, chosen = np.random.RandomState(0), AUGMENTATIONS["inception"]
    boxes = np.array([random_box(400, 300, chosen, random) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert ((0 <= top) & (top <= 300 - height) & (0 <= left) & (left <= 400 - width)).all()
    areas, ratios = height * width / 120_000, width / height
    assert 0.078 < min(areas) < 0.1 and 0.9 < max(areas) <= 1
    assert 0.74 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.35
    assert abs(np.log(ratios)[areas < 0.5].mean()) < 0.02  # as often upright as lying
    for width, height in ((1000, 10), (10, 1000), (1, 1)):  # no crop fits: the largest central box
        top, left, h, w = random_box(width, height, Augmentation(area=(0.9, 1.0)), random)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h >= 1 and w >= 1
        assert max(h, w) <= math.ceil(min(width, height) * 4 / 3)
    torch.manual_seed(0)
    image, crops = torch.zeros(3, 60, 90), v2.RandomResizedCrop(8)
    expected = np.array([list(crops.make_params([image]).values()) for _ in range(4000)])
    boxes = np.array([random_box(90, 60, Augmentation(), random) for _ in range(4000)])
    for moment in (np.mean, np.std):
        np.testing.assert_allclose(moment(boxes, 0), moment(expected, 0), rtol=0.06)


def test_half_of_the_crops_are_mirrored_where_flip_is_on_and_jitter_changes_colours_within_its_strength():
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (60, 60, 3)).copy()
    for flip, low, high in ((True, 0.35, 0.65), (False, 0, 0)):
        x, _ = images(np.stack([ramp] * 100), augmentation=Augmentation(flip=flip)).__getitems__(list(range(100)))
        assert low <= float((x[:, 0, 0, 0] > x[:, 0, 0, -1]).double().mean()) <= high
    grey = np.full((200, 40, 40, 3), 100, dtype=np.uint8)
    x, _ = images(grey, augmentation=Augmentation(jitter=0.4), statistics=RAW).__getitems__(list(range(200)))
    means = x.mean((1, 2, 3))  # of a grey image only the brightness moves
    assert 59 <= float(means.min()) < 65 and 135 < float(means.max()) <= 141
    assert float(x.std((1, 2, 3)).max()) == 0


def test_lighting_moves_all_pixels_along_the_principal_components():
    random = np.random.RandomState(0)
    shifts = torch.stack([module._light(0.1, random).flatten() for _ in range(20_000)]).double().numpy()
    wanted = (module._EIGENVECTORS * (25.5 * module._EIGENVALUES) ** 2) @ module._EIGENVECTORS.T
    np.testing.assert_allclose(np.cov(shifts.T), wanted, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(module._EIGENVECTORS.T @ module._EIGENVECTORS, np.eye(3), atol=1e-3)
    flat = np.full((1, 30, 30, 3), 128, dtype=np.uint8)
    x = images(flat, augmentation=Augmentation(lighting=0.1), statistics=RAW)[0][0]
    assert float(x.std((1, 2)).max()) < 1e-4 and float((x - 128).abs().max()) > 0


def test_splits_get_the_transforms_and_keep_their_images(make, home):
    tree = make.tree("tree", {"train": {"a": 5, "b": 6}, "val": {"a": 2, "b": 2}}, size=(80, 70))
    loaded = data.load(str(tree), size=72, holdout=False)
    assert loaded.validation is None and len(loaded.train) == 11
    found = photographs(loaded, 16, "resnext", InputStatistics((1, 2, 3), (4, 5, 6)), seed=7)
    assert [len(s) for s in (found.train, found.test, found.statistics)] == [11, 4, 11] and found.validation is None
    assert found.train.augment and not found.test.augment and found.train.seed == 7
    assert np.array_equal(found.train.targets, loaded.train.targets) and found.train[0][0].shape == (3, 16, 16)
    assert found.test.raw(0).shape == (16, 16, 3)
    with pytest.raises(AFDSError, match="'mixup' is unknown; use one of inception, resnext, gentle"):
        photographs(loaded, 16, "mixup", RAW)
    with pytest.raises(AFDSError, match="decoded arrays; load it at a size above 64"):
        photographs(data.load(str(tree), size=32), 16, "inception", RAW)
