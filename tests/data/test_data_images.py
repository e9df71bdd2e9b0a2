"""An image file as RGB: every mode, upright, one scale per kind of file; and the geometry of evaluation."""

import io

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from torchvision.transforms import v2

from afdslib.data import images
from afdslib.data.datasets import _normalise
from afdslib.data.images import CorruptImageError, read_rgb, resized_to

RED = (200, 30, 40)


@pytest.fixture
def saved(tmp_path):
    """Pixels of an image as they are read from its file."""

    def read(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        return np.asarray(read_rgb(tmp_path / name))

    return read


def test_grey_palettes_and_cmyk_are_their_colours(saved):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (saved(Image.fromarray(grey)) == np.repeat(grey[..., None], 3, 2)).all()
    assert (saved(Image.fromarray(np.eye(8, dtype=bool)))[..., 0] == np.eye(8) * 255).all()
    image = Image.new("RGB", (16, 16), RED)
    assert saved(image.convert("P", palette=Image.Palette.ADAPTIVE))[0, 0].tolist() == list(RED)
    assert np.abs(saved(image.convert("CMYK"), "c.jpg", quality=95)[8, 8].astype(int) - RED).max() <= 12


def test_transparency_is_composited_over_white(saved):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., :3] = RED
    pixels[0, 0, 3], pixels[0, 1, 3] = 255, 0
    pixels[1, :, 3] = 128
    out = saved(Image.fromarray(pixels))
    assert out[0].tolist() == [list(RED), [255, 255, 255]]
    assert np.abs(out[1, 0] - (np.array(RED) * 128 / 255 + 255 * 127 / 255)).max() <= 1
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([*RED, 1, 2, 3])
    assert saved(image, transparency=1)[0].tolist() == [list(RED), [255, 255, 255]]


SCALES = [
    (np.array([[0, 257, 128 * 257, 65535]], np.uint16), [0, 1, 128, 255]),
    (np.array([[0, 257, 128 * 257, 65535]], np.int32), [0, 1, 128, 255]),
    (np.array([[0, 100, 200, 200]], np.int32), [0, 0, 1, 1]), (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
    (np.array([[0, 0.5, 1.5]], np.float32), [0, 128, 255]), (np.array([[0, 0.1, np.nan]], np.float32), [0, 26, 0]),
]  # fmt: skip


def test_the_scale_is_that_of_the_kind_of_file_whatever_an_image_holds_or_it_is_refused(saved):
    for values, out in SCALES:
        assert saved(Image.fromarray(values), "x.tif")[0].tolist() == [[v] * 3 for v in out]
    with pytest.raises(CorruptImageError, match="most of its float32 values are above 1.0"):
        saved(Image.fromarray(np.full((4, 4), 200, np.float32)), "x.tif")


def test_a_corrupt_image_is_named_in_one_sentence_and_a_damaged_exif_block_loses_none(saved, tmp_path, monkeypatch):
    path, buffer = tmp_path / "broken.jpg", io.BytesIO()
    picture(0, 64, 64).save(buffer, "JPEG")
    for content in (b"", b"no image at all", buffer.getvalue()[: len(buffer.getvalue()) // 2]):
        path.write_bytes(content)
        with pytest.raises(CorruptImageError) as error:
            read_rgb(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(Image.Image, "getexif", lambda self: (_ for _ in ()).throw(SyntaxError("damaged")))
    assert saved(picture(0), "x.jpg").shape == (16, 20, 3)


def test_test_time_geometry_and_normalisation_equal_torchvisions():
    transform = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    for image in (picture(1, *sides) for sides in ((300, 200), (201, 333), (256, 256), (90, 120))):
        assert np.array_equal(resized_to(image, 224, shorter=256), np.asarray(transform(image)))
    pixels = np.random.RandomState(2).randint(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    reference = v2.functional.normalize(tensor, list(images.MEAN), list(images.STD))
    torch.testing.assert_close(_normalise(pixels), reference, rtol=0, atol=1e-6)
