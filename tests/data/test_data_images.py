import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from afdslib.data import images
from afdslib.data.images import CorruptImageError, read_rgb, resized_to, to_rgb

RED = (200, 30, 40)


def _saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_grey_is_repeated_over_the_channels(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    out = np.asarray(read_rgb(_saved(tmp_path, grey, "g.png")))
    assert out.shape == (16, 16, 3)
    assert (out == np.arange(256).reshape(16, 16, 1)).all()


def test_bilevel_image_becomes_black_and_white(tmp_path):
    mask = Image.fromarray(np.eye(8, dtype=bool))
    assert (np.asarray(read_rgb(_saved(tmp_path, mask, "b.png")))[..., 0] == np.eye(8) * 255).all()


def test_palette_is_looked_up(tmp_path):
    image = Image.new("RGB", (8, 8), RED).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.asarray(read_rgb(_saved(tmp_path, image, "p.png")))[0, 0].tolist() == list(RED)


def test_transparency_is_composited_over_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., :3] = RED
    pixels[0, 0, 3], pixels[0, 1, 3] = 255, 0
    pixels[1, :, 3] = 128
    out = np.asarray(read_rgb(_saved(tmp_path, Image.fromarray(pixels), "t.png")))
    assert out[0, 0].tolist() == list(RED)
    assert out[0, 1].tolist() == [255, 255, 255]
    expected = np.array(RED) * 128 / 255 + 255 * 127 / 255
    assert np.abs(out[1, 0] - expected).max() <= 1


def test_palette_with_a_transparent_entry_is_composited_over_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([*RED, 1, 2, 3])
    out = np.asarray(read_rgb(_saved(tmp_path, image, "t.png", transparency=1)))
    assert out[0].tolist() == [list(RED), [255, 255, 255]]


def test_cmyk_jpeg_loads_near_its_colour(tmp_path):
    image = Image.new("RGB", (16, 16), RED).convert("CMYK")
    out = np.asarray(read_rgb(_saved(tmp_path, image, "c.jpg", quality=95)))
    assert np.abs(out[8, 8].astype(int) - RED).max() <= 12


def test_16_bit_grey_is_scaled_to_8(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    out = np.asarray(read_rgb(_saved(tmp_path, Image.fromarray(values), "s.png")))
    assert out[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


def test_32_bit_and_float_modes_become_rgb():
    assert np.asarray(to_rgb(Image.fromarray(np.array([[0, 65535]], np.int32))))[0, :, 0].tolist() == [0, 255]
    assert np.asarray(to_rgb(Image.fromarray(np.array([[0.0, 1.0]], np.float32))))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("content", [b"", b"no image at all", None], ids=["empty", "text", "truncated"])
def test_a_corrupt_image_is_named_in_one_sentence(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content is None:
        data = io.BytesIO()
        Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)).save(data, "JPEG")
        content = data.getvalue()[: len(data.getvalue()) // 2]
    path.write_bytes(content)
    with pytest.raises(CorruptImageError) as error:
        read_rgb(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("width, height", [(300, 200), (201, 333), (256, 256), (90, 120)])
def test_test_time_geometry_equals_torchvisions(width, height):
    image = Image.fromarray(np.random.RandomState(1).randint(0, 256, (height, width, 3), dtype=np.uint8))
    reference = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(image)
    assert np.array_equal(resized_to(image, 224, shorter=256), np.asarray(reference))


def test_normalisation_equals_torchvisions():
    from afdslib.data.datasets import _normalise

    pixels = np.random.RandomState(2).randint(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    reference = v2.functional.normalize(tensor, list(images.MEAN), list(images.STD))
    torch.testing.assert_close(_normalise(pixels), reference, rtol=0, atol=1e-6)
