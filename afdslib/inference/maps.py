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
from afdslib.data.images import read_rgb, resized_to
from afdslib.losses.at import attention_map, input_gradient
from afdslib.training.features import taps

__all__ = ["MapsView", "NetworkMaps", "activation_maps", "gradient_map", "look_at", "read_image", "view"]


@dataclass(frozen=True)
class NetworkMaps:
    """What one network does with an image.

    Attributes:
        stages: the activation map of each stage, (h, w), at least 0 and of 2-norm 1, by the layer's name.
        gradient: 2-norm over the colours of the loss's gradient with respect to each pixel, (H, W).
        prediction: the class it names.
    """

    stages: dict[str, np.ndarray]
    gradient: np.ndarray
    prediction: str


@dataclass(frozen=True)
class MapsView:
    """One image seen by several networks.

    Attributes:
        image: uint8 (H, W, 3).
        caption: its class, or "unknown".
        networks: by name.
    """

    image: np.ndarray
    caption: str
    networks: dict[str, NetworkMaps]


@torch.no_grad()
def activation_maps(
    model: nn.Module, images: Tensor, *, layers: Sequence[str] | None = None, p: float = 2
) -> dict[str, Tensor]:
    """The attention map of each layer: mean over channels of |F|^p, divided by its 2-norm; see `losses.attention_map`.

    Args:
        model: any network; its mode is restored.
        images: (B, 3, H, W), normalised.
        layers: by default the ends of the network's stages.
        p: exponent.

    Returns:
        (B, h, w) by layer.

    Raises:
        AFDSError: a network without known stages and no `layers`, or a layer whose output is no map.
    """
    names = list(layers) if layers is not None else stages(model)
    with eval_mode(model), taps(model, names) as features:
        model(images)
    found = {}
    for name in names:
        if features[name].ndim != 4:
            raise AFDSError(f"the output of {name!r} is {tuple(features[name].shape)}, no feature map; name another")
        found[name] = attention_map(features[name], p).view(len(images), *features[name].shape[2:])
    return found


@torch.enable_grad()
def gradient_map(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """The size of the loss's gradient at each pixel, 2-norm over the colours, in eval mode.

    Args:
        model: any network; its mode and its parameters' gradients are left as they were.
        images: (B, 3, H, W), normalised.
        labels: class indices (B,); by default the network's own answers.

    Returns:
        (B, H, W).
    """
    images = images.detach().clone().requires_grad_()
    with eval_mode(model):
        logits = model(images)
        labels = logits.detach().argmax(1) if labels is None else labels
        gradient = input_gradient(logits, labels, images, create_graph=False)
    return torch.linalg.vector_norm(gradient, dim=1)


def read_image(path: str | Path, size: int) -> np.ndarray:
    """An image file as the networks see it: shorter side to `size`, centre crop, uint8 (size, size, 3)."""
    if not Path(path).is_file():
        raise AFDSError(f"there is no image file {path}; give the path of one")
    return resized_to(read_rgb(path), size)


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
    only = data.ArrayImages(image[None], np.arange(1), np.zeros(1), ("?",), augment=False)
    batch = only[0][0][None]
    target = None if label is None else torch.tensor([label])
    seen = {}
    for name, model in networks.items():
        x = batch.to(next(model.parameters()))
        with fed(model, IMAGENET):
            with torch.no_grad(), eval_mode(model):
                answer = int(model(x).argmax(1))
            maps = {layer: m[0].double().cpu().numpy() for layer, m in activation_maps(model, x).items()}
            gradient = gradient_map(model, x, target)[0].double().cpu().numpy()
        seen[name] = NetworkMaps(maps, gradient, str(classes[answer]) if answer < len(classes) else str(answer))
    return MapsView(image, "unknown" if label is None else str(classes[label]), seen)


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
        data_dir: folder with the data set's archive or tree.
        skip_corrupt: see `data.load`.

    Raises:
        AFDSError: neither image nor data set, a file that is no network or no image, or an index beyond the data set.
    """
    if image is None and data_set is None:
        raise AFDSError("there is no image to look at; give an image file or a data set")
    models = {}
    for text in networks:
        name, equals, which = text.partition("=")
        models[name if equals else Path(text).stem] = afs.load_network(which if equals else text)
    label = None
    if data_set is not None:
        splits = data.load(data_set, data_dir, size=size, skip_corrupt=skip_corrupt)
        classes: Sequence[str] = splits.captions or splits.classes
    else:
        outputs = [m.get_submodule(classifier_name(m)).weight.shape[0] for m in models.values()]  # type: ignore
        classes = [f"class {i}" for i in range(max(outputs))]
    if image is not None:
        pixels = read_image(image, size)
    else:
        if not 0 <= index < len(splits.test):
            raise AFDSError(f"the data set {data_set} has {len(splits.test)} test images and no number {index}")
        pixels, label = splits.test.raw(index), int(splits.test.targets[index])
    return look_at(models, pixels, classes, label=label)
