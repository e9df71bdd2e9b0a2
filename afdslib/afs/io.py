"""Saving AFS networks without pickle: safetensors for the tensors, JSON in the same file for the architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from afdslib import backbones
from afdslib.afs.compact import compact_in_place, set_masks
from afdslib.afs.convert import convert_in_place
from afdslib.afs.shrink import shrink
from afdslib.afs.verify import confirm, sample
from afdslib.backbones.inputs import input_of, see_at
from afdslib.base.atomic import atomic_path
from afdslib.base.errors import AFDSError

__all__ = ["load", "load_network", "read_masks", "save", "weight_file"]


def save(model: nn.Module, path: str | Path, *, metadata: dict[str, str] | None = None) -> None:
    """Writes a network built by `backbones.build` (plain, converted or compact) to one safetensors file, atomically.

    Of a compact network the file says by which masks it was cut, so that `load` can cut a fresh one alike. `metadata`
    are more texts for the file's header, such as class names. Another network is an AFDSError.
    """
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, dict):
        raise AFDSError(
            f"{type(model).__name__} does not say how to build it; networks that are saved must come from "
            "backbones.build"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={**(metadata or {}), "afds": json.dumps(architecture, sort_keys=True)})


def load(path: str | Path) -> nn.Module:
    """The network in a file written by `save`, on the CPU, in eval mode; another file is an AFDSError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            architecture = json.loads((file.metadata() or {})["afds"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except FileNotFoundError:
        raise AFDSError(f"no file {str(path)!r}; give the path of a network written by afs.save") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise AFDSError(f"{str(path)!r} is damaged or was not written by afs.save ({_short(error)})") from None
    try:
        model = _rebuild(architecture)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise AFDSError(f"{str(path)!r} describes no network that can be built here ({_short(error)})") from None
    dtype = next((t.dtype for n, t in state.items() if n.endswith("weight")), None)
    try:
        model.to(dtype).load_state_dict(state)
    except RuntimeError as error:
        raise AFDSError(
            f"{str(path)!r} does not fit its own architecture ({str(error).splitlines()[-1].strip()})"
        ) from None
    return model.eval()


def weight_file(path: str | Path) -> Path:
    """The absolute path of a file that `load_network` may read; an AFDSError if there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise AFDSError(
            f"{str(path)!r} is neither a weight file nor a backbone: give a model.safetensors of a run, "
            "resnet-34-export.pth, or a name such as resnet34 for torchvision's weights"
        )
    return file.resolve()


def load_network(weights: str | Path) -> nn.Module:
    """A trained network from a file of this library (.safetensors) or a public attention-transfer export (.pth).

    Or by the name of a backbone, for torchvision's ImageNet weights. Anything else is an AFDSError.
    """
    if str(weights) in backbones.known_names():
        return backbones.build(str(weights), 1000, weights="imagenet")
    file = weight_file(weights)
    return load(file) if file.suffix == ".safetensors" else backbones.load_export(file)


def _short(error: Exception) -> str:
    """The first line of a message, for a sentence."""
    return str(error).strip().partition("\n")[0]


def _rebuild(architecture: Any) -> nn.Module:
    """A network with the layers, not the values, of the one that was saved; never two of them in memory at once."""
    plain = dict(architecture)
    gates, kept, cuts, images, side = (plain.pop(name, None) for name in ("gates", "kept", "compact", "input", "side"))
    model = backbones.build(**plain)
    if images is not None:  # written by a network trained on other images than torchvision's
        model.architecture = {**plain, "input": images}  # type: ignore[assignment]
        input_of(model)  # refuses nonsense
    if kept is not None:  # a network that static pruning has made narrower
        model = shrink(model, {name: tuple(positions) for name, positions in kept.items()})
    if gates is not None:
        for module in model.modules():  # a fresh network's zero-initialised branches cannot be converted
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.ones_(module.weight)
        before = sample(model.eval())
        model = convert_in_place(model, gates=gates)
        confirm(before, model, "converting the saved network")
    for cut in cuts or ():
        set_masks(model, cut["masks"])
        size = tuple(cut["input_size"])
        before = sample(model.eval(), size)
        model = compact_in_place(model, input_size=size, fold_bn=cut["fold_bn"])
        confirm(before, model, "cutting the saved network")
    return see_at(model, int(side)) if side else model


def read_masks(path: str | Path) -> dict[str, Any]:
    """Masks of `afds publish --part speed`, without weights: "architecture" and "masks", see `compact.set_masks`."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        named = isinstance(record["architecture"]["name"], str)
        if not (named and isinstance(record["masks"], dict) and record["masks"]):
            raise KeyError("masks")
    except FileNotFoundError:
        raise AFDSError(f"no file {str(path)!r}; give one that afds publish --part speed wrote") from None
    except (ValueError, KeyError, TypeError, IsADirectoryError):
        raise AFDSError(f"{str(path)!r} holds no masks; give a file that afds publish --part speed wrote") from None
    return record
