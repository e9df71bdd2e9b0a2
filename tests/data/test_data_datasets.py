import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from afdslib import data
from afdslib.base.errors import AFDSError
from afdslib.data.datasets import ArrayImages, FileImages, Files, _normalise, _sharpened
from afdslib.data.images import STD

CLASSES = ("a", "b")


def _pixels(count=10, size=8, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, size, size, 3), dtype=np.uint8)


def _array(augment, count=10, **options):
    pixels = _pixels(count)
    return pixels, ArrayImages(pixels, np.arange(count), np.arange(count) % 2, CLASSES, augment=augment, **options)


def _files(augment, **options):
    source = Files(Path(), (), _pixels(6, 40))
    return FileImages(source, np.arange(6), np.arange(6) % 2, CLASSES, size=32, augment=augment, **options)


def test_an_item_is_a_normalised_float_image_and_an_int_of_the_chosen_row():
    pixels = _pixels()
    ds = ArrayImages(pixels, np.array([7, 2]), np.array([1, 0]), CLASSES, augment=False)
    image, target = ds[0]
    assert image.dtype == torch.float32 and image.shape == (3, 8, 8) and isinstance(target, int) and target == 1
    assert torch.equal(image, _normalise(pixels[7:8])[0])
    assert len(ds) == 2 and np.array_equal(ds.raw(0), pixels[7]) and np.array_equal(ds.raw(1), pixels[2])
    assert torch.equal(ds[-1][0], ds[1][0])
    with pytest.raises(IndexError):
        ds[2]


@pytest.mark.parametrize("flip, reflect", [(True, False), (False, False), (False, True)])
def test_augmentation_is_a_pad_4_crop_and_flip_of_the_image(flip, reflect):
    pixels, ds = _array(True, count=64, flip=flip, reflect=reflect)
    mode, seen = "reflect" if reflect else "constant", set()
    for i in range(64):
        image, padded = ds[i][0], torch.nn.functional.pad(_normalise(pixels[i : i + 1]), (4,) * 4, mode=mode)[0]
        windows = padded.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)  # (9, 9, 3, 8, 8)
        kinds = (False,) if reflect else (False, True)  # a mirrored window of a mirrored edge may be another window
        matches = [(windows.flip(-1) if m else windows).eq(image).all((2, 3, 4)).nonzero() for m in kinds]
        (match,) = [(int(top), int(left), bool(m)) for m, found in enumerate(matches) for top, left in found]
        seen.add(match)
    assert {mirrored for *_, mirrored in seen} == {False, flip}
    assert {0, 8} <= {top for top, *_ in seen} and {0, 8} <= {left for _, left, _ in seen}


def test_sharpness_adds_detail_by_an_amount_of_seed_epoch_and_index():
    pixels, ds = _array(True, count=6, sharpness=1.5)
    plain = _normalise(pixels)
    amounts = torch.linspace(0, 1, 6)
    sharp = _sharpened(plain, amounts)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    for i, channel in ((0, 0), (3, 1), (5, 2)):  # an inner pixel, by hand
        x = plain[i, channel]
        blurred = (x[2:5, 3:6] * kernel).sum()
        low, high = (_normalise(np.full((1, 1, 1, 3), level, np.uint8))[0, channel, 0, 0] for level in (0, 255))
        wanted = (x[3, 4] + amounts[i] * (x[3, 4] - blurred)).clamp(low, high)
        assert torch.isclose(sharp[i, channel, 3, 4], wanted, atol=1e-5)
    assert torch.allclose(sharp[0], plain[0], atol=1e-6) and not torch.allclose(sharp[5], plain[5])

    first = torch.stack([ds[i][0] for i in range(6)])
    assert torch.equal(first, torch.stack([ds[i][0] for i in (5, 4, 3, 2, 1, 0)]).flip(0))
    ds.set_epoch(1)
    assert not torch.equal(first, torch.stack([ds[i][0] for i in range(6)]))
    assert torch.equal(_array(False, count=6, sharpness=1.5)[1][0][0], plain[0])
    assert torch.equal(_array(True, count=6, sharpness=0.0)[1][2][0], _array(True, count=6)[1][2][0])


def test_a_border_level_pads_with_that_grey():
    black = np.zeros((32, 8, 8, 3), np.uint8)
    for options, stays in (({"border": 0}, True), ({}, False)):
        ds = ArrayImages(black, np.arange(32), np.zeros(32), CLASSES, augment=True, **options)
        assert torch.allclose(ds.__getitems__(range(32))[0], _normalise(black), atol=1e-6) == stays


@pytest.mark.parametrize("kind", ["array", "files"])
def test_augmentation_depends_on_seed_epoch_and_index_only(kind):
    def make(seed, epoch):
        ds = _array(True, seed=seed)[1] if kind == "array" else _files(True, seed=seed)
        ds.set_epoch(1)
        ds.set_epoch(epoch)
        return ds

    batch, _ = make(5, 3).__getitems__([4, 0, 2])
    assert torch.equal(batch[0], make(5, 3)[4][0]) and torch.equal(batch[1], make(5, 3)[0][0])
    for other in (make(5, 4), make(6, 3)):
        assert not torch.equal(batch, other.__getitems__([4, 0, 2])[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_any_number_of_workers_and_a_memory_mapped_set_is_pickled_by_path(workers, tmp_path):
    np.save(tmp_path / "i.npy", _pixels(500))
    mapped = np.load(tmp_path / "i.npy", mmap_mode="r")
    ds = ArrayImages(mapped, np.arange(10), np.arange(10) % 2, CLASSES, augment=True)
    assert len(pickle.dumps(ds)) < 20_000
    ds.set_epoch(2)
    order = [7, 1, 0, 9, 3, 2, 8, 6, 5, 4]
    batches = [order[:4], order[4:8], order[8:]]
    loaded = list(DataLoader(ds, batch_sampler=batches, collate_fn=data.collate, num_workers=workers))
    images, targets = torch.cat([x for x, _ in loaded]), torch.cat([y for _, y in loaded])
    expected, labels = pickle.loads(pickle.dumps(ds)).__getitems__(order)
    assert torch.equal(images, expected) and torch.equal(targets, labels) and targets.dtype == torch.int64


def test_loader_keeps_the_order_and_the_last_batch_collate_takes_pairs_too_and_bad_sizes_are_refused():
    _, ds = _array(False)
    ds.set_epoch(9)  # changes nothing at test time
    batches = list(data.loader(ds, 4))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.cat([y for _, y in batches]).tolist() == ds.targets.tolist()
    assert [len(y) for _, y in data.loader(ds, 4, drop_last=True)] == [4, 4]
    images, targets = data.collate([ds[0], ds[1]])
    assert torch.equal(images, batches[0][0][:2]) and targets.tolist() == [0, 1]
    for options in ({"batch_size": 0}, {"batch_size": 2.0}, {"batch_size": 4, "workers": -1}):
        with pytest.raises(AFDSError):
            data.loader(ds, **options)


def test_large_images_are_resized_to_256_of_224_and_random_crops_stay_inside_and_move():
    ds = _files(False)
    assert ds.shorter == 37 and ds[0][0].shape == (3, 32, 32) and ds.raw(0).shape == (32, 32, 3)
    assert torch.equal(ds[0][0], _normalise(ds.raw(0)[None])[0])
    pixels = np.broadcast_to(np.arange(37, dtype=np.uint8)[None, :, None, None] * 3, (200, 37, 37, 3)).copy()
    ds = FileImages(Files(Path(), (), pixels), np.arange(200), np.zeros(200), CLASSES, size=32, augment=True)
    images, _ = ds.__getitems__(range(200))
    first = ((images[:, 0, 0, 0] * STD[0] + 0.485) * 255 / 3).round().int()  # the row at which the crop begins
    assert set(first.tolist()) == set(range(6))
