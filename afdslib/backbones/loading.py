"""Weights into a network: torchvision's ImageNet files, or a state dict in a file. Every mismatch is one sentence."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from afdslib.base.errors import AFDSError

__all__ = ["few", "imagenet_state", "load_file", "load_state", "read_state"]


def few(names: Iterable[str], limit: int = 3) -> str:
    """Some names for a sentence, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def imagenet_file(name: str) -> tuple[Path, str]:
    """Where torchvision's IMAGENET1K_V1 file of a network belongs on this machine, and where it is fetched from.

    Raises:
        AFDSError: there are no such weights.
    """
    try:
        url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    except (ValueError, KeyError):
        raise AFDSError(f"There are no ImageNet weights for {name!r}; use weights=None or a path.") from None
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1], url


def imagenet_state(name: str) -> dict[str, torch.Tensor]:
    """torchvision's IMAGENET1K_V1 state dict of a network, from the torch hub folder or, failing that, the network.

    Raises:
        AFDSError: there are no such weights, the file cannot be downloaded, or its checksum is wrong.
    """
    file, url = imagenet_file(name)
    folder = file.parent
    if not file.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=_hash_prefix(file), progress=sys.stderr.isatty())
        except (URLError, OSError, RuntimeError) as error:
            reason = getattr(error, "reason", None) or error
            raise AFDSError(
                f"The ImageNet weights of {name} could not be downloaded ({reason}): fetch {file.name} from "
                f"{url} and put it in {folder}."
            ) from error
    _verify(file, url)
    return read_state(file)


def _hash_prefix(file: Path) -> str:
    """torchvision writes the first 8 hex digits of the sha256 into the name: resnet50-0676ba61.pth."""
    return file.stem.rsplit("-", 1)[1]


def _verify(file: Path, url: str) -> None:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(_hash_prefix(file)):
        raise AFDSError(
            f"{file} has the sha256 {digest[:8]}... where its name says {_hash_prefix(file)}: delete it and fetch it "
            f"again from {url}."
        )


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """A state dict from a .safetensors, .pt or .pth file, on the CPU; nothing is unpickled but tensors.

    Raises:
        AFDSError: no such file, another suffix, a damaged file, or contents that are not a flat dict of tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise AFDSError(
            f"There is no weight file {path}; give weights=None, 'imagenet' or the path of an existing file."
        )
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise AFDSError(f"{path} is not a weight file this project reads: use .safetensors, .pt or .pth.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AFDSError(f"{path} is not a readable weight file ({reason[:120]}): fetch or write it again.") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise AFDSError(f"{path} does not hold a state dict (names to tensors): save model.state_dict() alone.")
    return dict(state)


def load_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, source: str, classifier: str | None = None
) -> None:
    """Copies a state dict into a model; nothing is copied unless everything fits.

    Args:
        model: The network, changed in place.
        state: Names to tensors.
        source: Where the state is from, for the sentence.
        classifier: Name of the last linear layer; if the file has another number of classes there (and nothing else
            differs), that layer alone keeps the model's own values.

    Raises:
        AFDSError: missing or foreign names, or another shape.
    """
    state, own = dict(state), model.state_dict()
    if classifier is not None and _other_classes(own, state, classifier):
        for name in (f"{classifier}.weight", f"{classifier}.bias"):
            if name in own and name in state:
                state[name] = own[name]
    missing, foreign = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or foreign:
        told = [f"lacks {few(missing)}"] if missing else []
        told += [f"holds the foreign {few(foreign)}"] if foreign else []
        raise AFDSError(f"{source} {' and '.join(told)}: these are weights of another network, give the matching name.")
    wrong = {n for n in own if own[n].shape != state[n].shape}
    if wrong:
        first = min(wrong, key=list(own).index)
        raise AFDSError(
            f"{source} has the shape {tuple(state[first].shape)} for {first} where this network has "
            f"{tuple(own[first].shape)}{f' ({len(wrong)} tensors differ)' if len(wrong) > 1 else ''}: check name, "
            f"stem, width and number of classes."
        )
    model.load_state_dict(state)


def _other_classes(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], classifier: str) -> bool:
    weight = f"{classifier}.weight"
    return (
        weight in own
        and weight in state
        and state[weight].shape[:1] != own[weight].shape[:1]
        and state[weight].shape[1:] == own[weight].shape[1:]
    )


def load_file(model: nn.Module, path: str | Path, *, classifier: str | None = None) -> None:
    """`read_state` and `load_state` in one step."""
    load_state(model, read_state(path), source=str(path), classifier=classifier)
