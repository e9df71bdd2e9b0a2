"""Classes of image files by an exported network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from afdslib import afs
from afdslib.base.errors import AFDSError
from afdslib.data.images import CorruptImageError, read_rgb, resized_to
from afdslib.inference.export import KEY, Card, model_output, session

__all__ = ["Network", "load", "predict", "prepare"]

Network = Callable[[np.ndarray], np.ndarray]
"""Images float32 (B, 3, size, size) to logits (B, classes)."""

_LONGEST = 16
"""Of images longer than this many times their shorter side only the middle is looked at; the crop takes no more."""


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
    card = _card(text, path)
    model = afs.load(path)
    if next(model.parameters()).dtype != torch.float32:
        model.float()
    return lambda images: model_output(model, torch.from_numpy(images)).numpy(), card


def _card(text: str | None, path: Path) -> Card:
    if text is None:
        raise AFDSError(f"{path} holds no class names and preprocessing; write it with afds export")
    try:
        return Card.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise AFDSError(f"{path} says nothing sensible about its input ({error}); write it again") from None


def prepare(path: str | Path, card: Card) -> np.ndarray:
    """One image file as the network wants it, float32 (3, size, size).

    Raises:
        AFDSError: no such file, or no image.
    """
    _there(path)
    try:
        image = read_rgb(path)
    except CorruptImageError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise AFDSError(f"{path} is no image that can be read ({reason}); give a PNG, JPEG or the like") from None
    longest = _LONGEST * min(image.size)
    if max(image.size) > longest:  # enlarged as a whole, a line of one pixel would fill the memory
        width, height = (min(side, longest) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = resized_to(image, card.size, shorter=card.resize).astype(np.float32) / 255
    mean, std = (np.asarray(values, dtype=np.float32) for values in (card.mean, card.std))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def _there(path: str | Path) -> None:
    if not Path(path).is_file():
        raise AFDSError(f"there is no image {path}; give the path of an image file")


def predict(
    paths: Sequence[str | Path], model: str | Path, *, top: int = 5
) -> list[tuple[str, list[tuple[str, float]]]]:
    """The likeliest classes of images.

    Args:
        paths: image files.
        model: a file of `afds export`.
        top: how many classes of each; all if there are fewer.

    Returns:
        For each image its path and (class, probability), likeliest first.

    Raises:
        AFDSError: for a bad model file, a file that is no image, or a network whose outputs and names differ in number
            or whose outputs are not finite.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise AFDSError(f"top must be a whole number of at least 1, got {top!r}")
    if not paths:
        raise AFDSError("no image is given; give the paths of one or more image files")
    network, card = load(model)
    for path in paths:  # a wrong name is told before anything is computed
        _there(path)
    found = []
    for path in paths:
        logits = network(prepare(path, card)[None])[0].astype(np.float64)
        if len(logits) != len(card.classes):
            raise AFDSError(f"{model} has {len(logits)} outputs but {len(card.classes)} class names; export it again")
        if not np.isfinite(logits).all():
            raise AFDSError(f"{model} gives outputs that are not finite for {path}; train it again and export it")
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares, kind="stable")[:top]
        found.append((str(path), [(card.classes[i], float(shares[i])) for i in best]))
    return found
