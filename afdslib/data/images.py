"""One image file -> an 8-bit RGB picture, and the two geometric transforms.

Whatever the file holds comes out as RGB [ours]: grey is repeated, a palette is looked up, transparency is composited
over white, CMYK is converted, 16 bits are scaled to 8. EXIF orientation is ignored, as torchvision's loaders do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from afdslib.base.errors import AFDSError

__all__ = [
    "MEAN",
    "STD",
    "SMALL",
    "CorruptImageError",
    "to_rgb",
    "read_rgb",
    "resize_shorter",
    "centre_box",
    "resized_to",
]

# ImageNet statistics for every set: a source network and its targets must share one normalisation. [ours]
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

SMALL = 64
"""Images up to this size (pixels) are decoded once into an array; larger ones are opened when asked for."""


class CorruptImageError(AFDSError):
    """An image that cannot be decoded, named in one sentence, also when a DataLoader worker meets it.

    A worker's exception is raised again with the worker's whole traceback as its message: only the sentence is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("CorruptImageError: ", 1)[-1].strip())


def _to_8_bit(values: np.ndarray) -> Image.Image:
    """Grey values of 16 or 32 bits -> 8 bits: 65535 becomes 255."""
    if values.dtype.kind == "f":
        scaled = np.nan_to_num(values) * (255.0 if np.nanmax(values, initial=0.0) <= 1.0 else 1.0)
    else:
        scaled = values / 257.0 if values.max(initial=0) > 255 else values
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image -> mode RGB, transparency composited over white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode.startswith("I;16"):
            return Image.fromarray(np.rint(values / 257.0).astype(np.uint8)).convert("RGB")
        return _to_8_bit(values).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def read_rgb(path: str | Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        CorruptImageError: the file is missing, truncated or no image; the sentence names it
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... depending on the damage.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptImageError(
            f"the image {path} cannot be decoded ({reason}): replace it, or pass skip_corrupt=True to go on without it"
        ) from error


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter side has `size` pixels: bilinear, antialiased, as torchvision's Resize."""
    width, height = image.size
    if min(width, height) == size:
        return image
    if width <= height:
        new = (size, int(size * height / width))
    else:
        new = (int(size * width / height), size)
    return image.resize(new, Image.Resampling.BILINEAR)


def centre_box(width: int, height: int, size: int) -> tuple[int, int]:
    """Left and top of the centre crop, as torchvision's CenterCrop."""
    return int(round((width - size) / 2.0)), int(round((height - size) / 2.0))


def resized_to(image: Image.Image, size: int, *, shorter: int | None = None) -> np.ndarray:
    """The test-time geometry: resize the shorter side to `shorter` (default `size`), crop the centre `size` square.

    Returns:
        uint8 array (size, size, 3).
    """
    image = resize_shorter(image, shorter or size)
    left, top = centre_box(*image.size, size)
    return np.asarray(image.crop((left, top, left + size, top + size)))
