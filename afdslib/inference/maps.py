"""Attention maps to look at: where a network's stages respond on an image, and which pixels its loss hangs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from afdslib import afs, data
from afdslib.afs.graph import eval_mode
from afdslib.backbones import classifier_name, stages
from afdslib.backbones.inputs import IMAGENET, fed
from afdslib.base.errors import AFDSError
from afdslib.inference.predict import read_image
from afdslib.losses.at import attention_map, input_gradient
from afdslib.training.features import taps

__all__ = ["MapsView", "NetworkMaps", "look_at", "maps_of", "view"]


@dataclass(frozen=True)
class NetworkMaps:
    """What one network does with an image."""

    stages: dict[str, np.ndarray]  # the activation map of each stage, (h, w), >= 0, of 2-norm 1, by the layer's name
    gradient: np.ndarray  # 2-norm over the colours of the loss's gradient with respect to each pixel, (H, W)
    prediction: str  # the class it names


@dataclass(frozen=True)
class MapsView:
    """One image seen by several networks."""

    image: np.ndarray  # uint8 (H, W, 3)
    caption: str  # its class, or "unknown"
    networks: dict[str, NetworkMaps]  # by name


def maps_of(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What a network, in eval mode, does with images; its mode and its parameters' gradients are left as they were.

    Args:
        model: one with known stages.
        images: (B, 3, H, W), normalised.
        labels: class indices (B,) of the loss; by default the network's own answers.

    Returns:
        The attention map of each stage, (B, h, w), by the layer's name: mean over channels of F^2, divided by its
        2-norm. The size of the loss's gradient at each pixel, (B, H, W), 2-norm over the colours. The answers, (B,).
    """
    with eval_mode(model):
        with torch.no_grad(), taps(model, stages(model)) as features:
            answers = model(images).argmax(1)
        pixels = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            gradient = input_gradient(model(pixels), answers if labels is None else labels, pixels, create_graph=False)
    maps = {name: attention_map(f).view(len(images), *f.shape[2:]) for name, f in features.items()}
    return maps, torch.linalg.vector_norm(gradient, dim=1), answers


def look_at(
    networks: Mapping[str, nn.Module], image: np.ndarray, classes: Sequence[str], *, label: int | None = None
) -> MapsView:
    """Every network's activation maps and gradient map for one image, normalised as each network was trained.

    The gradients are taken with respect to pixels of one normalisation, torchvision's, so that they can be compared.

    Args:
        networks: by name, in the order of the rows.
        image: uint8 (H, W, 3), from `read_image` or a data set's `raw`.
        classes: names of the networks' classes.
        label: the image's class; unknown if not given, and each gradient is then that of the network's own answer.

    Raises:
        AFDSError: no network, another kind of image, or a label that is no class.
    """
    if not networks:
        raise AFDSError("there is no network to look through; give at least one")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise AFDSError(f"the image is {image.dtype} of shape {image.shape}; give a square uint8 image with 3 colours")
    if label is not None and not 0 <= label < len(classes):
        raise AFDSError(f"the label {label} is no class; give 0 to {len(classes) - 1}")
    pixels = data.ArrayImages(image[None], np.arange(1), np.zeros(1), ("?",), augment=False)[0][0][None]
    target = None if label is None else torch.tensor([label])
    views = {}
    for name, model in networks.items():
        with fed(model, IMAGENET):
            maps, gradient, (answer,) = maps_of(model, pixels.to(next(model.parameters())), target)
        heat = {layer: each[0].double().cpu().numpy() for layer, each in maps.items()}
        prediction = str(classes[answer] if answer < len(classes) else int(answer))
        views[name] = NetworkMaps(heat, gradient[0].double().cpu().numpy(), prediction)
    return MapsView(image, "unknown" if label is None else str(classes[label]), views)


def view(
    networks: Sequence[str],
    image: str | Path | None = None,
    data_set: str | None = None,
    index: int = 0,
    size: int = 32,
    data_dir: str | None = None,
    *,
    skip_corrupt: bool = False,
) -> MapsView:
    """What networks do with one image, a file or a test image of a data set.

    Args:
        networks: weight files or backbones with torchvision's weights (see `afs.load_network`), each as "which" or
            "name=which".
        image: an image file; without one a test image of the data set is taken.
        data_set: names the classes, and holds the test image.
        index: of the test image.
        size: side of the image in pixels.
        data_dir, skip_corrupt: see `data.load`.

    Raises:
        AFDSError: neither image nor data set, a file that is no network or no image, or an index beyond the data set.
    """
    if image is None and data_set is None:
        raise AFDSError("there is no image to look at; give an image file or a data set")
    named = {Path(text).stem if "=" not in text else text.split("=")[0]: text.split("=", 1)[-1] for text in networks}
    models = {name: afs.load_network(which) for name, which in named.items()}
    if data_set is not None:
        splits = data.load(data_set, data_dir, size=size, skip_corrupt=skip_corrupt)
        classes: Sequence[str] = splits.captions or splits.classes
    else:
        outputs = [m.get_submodule(classifier_name(m)).weight.shape[0] for m in models.values()]  # type: ignore
        classes = [f"class {i}" for i in range(max(outputs))]
    if image is not None:
        return look_at(models, read_image(image, size), classes)
    if not 0 <= index < len(splits.test):
        raise AFDSError(f"the data set {data_set} has {len(splits.test)} test images and no number {index}")
    return look_at(models, splits.test.raw(index), classes, label=int(splits.test.targets[index]))
