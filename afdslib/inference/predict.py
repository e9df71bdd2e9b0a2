"""Classes of image files by an exported network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from scipy.special import softmax

from afdslib import afs
from afdslib.base import checks
from afdslib.base.errors import AFDSError
from afdslib.data.images import read_rgb, resized_to
from afdslib.data.trees import EXTENSIONS
from afdslib.inference.export import KEY, Card, session

__all__ = ["Network", "load", "predict", "prepare", "read_image"]

Network = Callable[[np.ndarray], np.ndarray]  # images float32 (B, 3, H, H) to logits (B, classes)
# Of images longer than this many times their shorter side only the middle is looked at: enlarged as a whole, a line of
# one pixel would fill the memory.
_LONGEST = 16


def load(path: str | Path) -> tuple[Network, Card]:
    """The network in a file of `afds export`, .onnx or .safetensors.

    Raises:
        AFDSError: for a missing, damaged or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise AFDSError(f"there is no file {path}; write one with afds export")
    if path.suffix == ".onnx":
        runtime = session(path)
        card = _card(runtime.get_modelmeta().custom_metadata_map.get(KEY), path)
        name, batch = runtime.get_inputs()[0].name, runtime.get_inputs()[0].shape[0]
        if isinstance(batch, int) and batch > 1:
            raise AFDSError(f"{path} takes {batch} images at a time only; write one for any number with afds export")
        return lambda images: runtime.run(None, {name: images})[0], card
    if path.suffix != ".safetensors":
        raise AFDSError(f"{path} is no file of afds export; give a .onnx or .safetensors file")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise AFDSError(f"{path} is damaged or no safetensors file ({reason}); export it again") from None
    card, model = _card(text, path), afs.load(path).float().requires_grad_(False)
    return lambda images: model(torch.from_numpy(images)).numpy(), card


def _card(text: str | None, path: Path) -> Card:
    if text is None:
        raise AFDSError(f"{path} holds no class names and preprocessing; write it with afds export")
    try:
        return Card.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise AFDSError(f"{path} says nothing sensible about its input ({error}); write it again") from None


def read_image(path: str | Path, size: int, *, shorter: int | None = None) -> np.ndarray:
    """An image file as networks see it: shorter side to `shorter` (default `size`), centre crop; uint8 (size, size, 3).

    Raises:
        AFDSError: no such file, or no image.
    """
    _there(path)
    image = read_rgb(path)
    width, height = (min(side, _LONGEST * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return resized_to(image.crop((left, top, left + width, top + height)), size, shorter=shorter)


def _there(path: str | Path) -> None:
    if not Path(path).is_file():
        raise AFDSError(f"there is no image file {path}; give the path of one")


def _files(paths: Sequence[str | Path]) -> Iterator[str | Path]:
    """The image files, those of folders in the order of their names, whatever else lies there."""
    for path in paths:
        if not Path(path).is_dir():
            _there(path)
            yield path
            continue
        found = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
        if not found:
            raise AFDSError(f"there is no image in the folder {path}; give one that holds images, or image files")
        yield from found


def prepare(path: str | Path, card: Card) -> np.ndarray:
    """One image file as the network wants it, float32 (3, H, H), where H is the card's side or else size."""
    square = read_image(path, card.size, shorter=card.resize)
    if card.side:
        square = np.asarray(Image.fromarray(square).resize((card.side, card.side), Image.Resampling.BILINEAR))
    pixels = square.astype(np.float32) / 255
    mean, std = (np.asarray(values, dtype=np.float32) for values in (card.mean, card.std))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def predict(
    paths: Sequence[str | Path], model: str | Path, *, top: int = 5
) -> list[tuple[str, list[tuple[str, float]]]]:
    """For each image file its path and its likeliest (class, probability), the likeliest first.

    Args:
        paths: image files, and folders for all images below them.
        model: a file of `afds export`.
        top: how many classes of each; all if there are fewer.

    Raises:
        AFDSError: for a bad model file, a file that is no image, or a network whose outputs and names differ in number
            or whose outputs are not finite.
    """
    checks.whole("top", top, 1)
    if not paths:
        raise AFDSError("no image is given; give the paths of one or more image files")
    network, card = load(model)
    files = list(_files(paths))  # a wrong name is told before anything is computed
    predictions = []
    for path in files:
        logits = network(prepare(path, card)[None])[0].astype(np.float64)
        if len(logits) != len(card.classes):
            raise AFDSError(f"{model} has {len(logits)} outputs but {len(card.classes)} class names; export it again")
        if not np.isfinite(logits).all():
            raise AFDSError(f"{model} gives outputs that are not finite for {path}; train it again and export it")
        shares = softmax(logits)
        best = np.argsort(-shares, kind="stable")[:top]
        predictions.append((str(path), [(card.classes[i], float(shares[i])) for i in best]))
    return predictions
