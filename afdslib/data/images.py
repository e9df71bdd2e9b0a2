"""One image file -> an 8-bit RGB picture, and the two geometric transforms. Training, `predict` and `maps` read alike.

Whatever the file holds comes out as RGB [ours]: grey is repeated, a palette is looked up, transparency is composited
over white, CMYK is converted, an animation shows its first frame. A picture is turned as its EXIF orientation says
(photographs from phones; torchvision's loaders ignore it). Each kind of file has one scale, whatever an image holds:
integers of 16 and 32 bits from 0 to 65535, floats from 0.0 to 1.0. Values beyond are clipped; an image most of whose
values are beyond is on another scale and is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from afdslib.base.errors import AFDSError

__all__ = ["MEAN", "SMALL", "STD", "CorruptImageError", "centre_box", "read_rgb", "resize_shorter", "resized_to"]

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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image -> mode RGB, transparency composited over white; ValueError for values on another scale."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        full = 1.0 if values.dtype.kind == "f" else 65535
        scaled = np.nan_to_num(values.astype(np.float64)) * (255 / full)
        if np.median(scaled) > 255:
            raise ValueError(f"most of its {values.dtype} values are above {full}, which is read as white; scale them")
        return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def read_rgb(path: str | Path) -> Image.Image:
    """Decode an image file to RGB, upright.

    Raises:
        CorruptImageError: the file is missing, truncated or no image; the sentence names it
    """
    try:
        with Image.open(path) as image:
            image.load()
            try:
                ImageOps.exif_transpose(image, in_place=True)
            except Exception:  # a damaged EXIF block says nothing; the pixels are sound
                pass
            return _to_rgb(image)
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... depending on the damage.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptImageError(f"the image {path} cannot be decoded ({reason}): replace it") from error


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter side has `size` pixels: bilinear, antialiased, as torchvision's Resize."""
    width, height = image.size
    new = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    return image if min(width, height) == size else image.resize(new, Image.Resampling.BILINEAR)


def centre_box(width: int, height: int, size: int) -> tuple[int, int]:
    """Left and top of the centre crop, as torchvision's CenterCrop."""
    return int(round((width - size) / 2.0)), int(round((height - size) / 2.0))


def resized_to(image: Image.Image, size: int, *, shorter: int | None = None) -> np.ndarray:
    """The test-time geometry: shorter side to `shorter` (default `size`), centre crop; uint8 (size, size, 3)."""
    image = resize_shorter(image, shorter or size)
    left, top = centre_box(*image.size, size)
    return np.asarray(image.crop((left, top, left + size, top + size)))
