"""Weights into a network: torchvision's ImageNet files, or a state dict in a file. Every mismatch is one sentence."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from afdslib.base.errors import AFDSError

__all__ = ["architecture", "few", "imagenet_state", "load_file", "load_state", "read_state"]

# Under which training programs keep a state dict, and its moving average.
_HOLDERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "module",
    "state_dict_ema", "model_state_dict_ema", "model_ema_state_dict", "ema_state_dict", "model_ema", "ema_model", "ema",
    "params_ema", "ema_params", "shadow",
)  # fmt: skip
# Parts of names: of DataParallel and DistributedDataParallel, torch.compile, FSDP and checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Plain data of training programs that torch does not unpickle by itself: options, and numpy's numbers.
_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]
_PLAIN = [
    argparse.Namespace, np.dtype, (_SCALAR, "numpy.core.multiarray.scalar"),
    _SCALAR, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")),
]  # fmt: skip


def few(names: Iterable[str], limit: int = 3) -> str:
    """Some names for a sentence, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def imagenet_file(name: str) -> tuple[Path, str]:
    """Where torchvision's IMAGENET1K_V1 file of a network belongs, and its address; an AFDSError if it has none."""
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
    prefix = file.stem.rsplit("-", 1)[1]  # of the sha256, which torchvision writes into the name
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=prefix, progress=sys.stderr.isatty())
        except (URLError, OSError, RuntimeError) as error:
            raise AFDSError(
                f"The ImageNet weights of {name} could not be downloaded ({getattr(error, 'reason', None) or error}): "
                f"fetch {file.name} from {url} and put it in {file.parent}."
            ) from error
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(prefix):
        raise AFDSError(
            f"{file} has the sha256 {digest[:8]}... where its name says {prefix}: delete it and fetch it again from "
            f"{url}."
        )
    return read_state(file)


def architecture(path: str | Path) -> dict[str, Any] | None:
    """What a safetensors file of `afs.save` says of its network: name, num_classes, stem, width and more; else None."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("afds", "null"))
    except (safetensors.SafetensorError, ValueError, OSError):
        return None
    return found if isinstance(found, dict) and "name" in found else None


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, on the CPU: alone, or the only one in a training checkpoint. No code is unpickled.

    Raises:
        AFDSError: no such file, another suffix, a damaged file, one that pickles more than numbers, or one without a
            state dict or with two (such as the network and its moving average).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise AFDSError(f"There is no weight file {path}; give weights=None, 'imagenet' or the path of a file.")
    if path.suffix not in (".safetensors", ".pt", ".pth", ".tar", ".ckpt"):
        raise AFDSError(f"{path} is not a weight file this project reads (.safetensors, .pt, .pth, .pth.tar, .ckpt)")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(str(path))
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError,
        AttributeError, TypeError,
    ) as error:  # fmt: skip
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        why = f" ({reason}): fetch or write it again."
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            why = f": it pickles {unsafe[1]}, which is not unpickled here; save model.state_dict() alone."
        raise AFDSError(f"{path} is not a readable weight file{why}") from error
    states = dict(_state_dicts(content))
    if not states:
        held = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            held = few(map(str, content)) if content else "nothing"
        raise AFDSError(f"{path} holds no state dict (names to tensors) but {held}: save model.state_dict() alone.")
    first, *others = ({_bare(n): v for n, v in state.items()} for state in states.values())
    # An average that was not updated yet is the same network.
    if any(o.keys() != first.keys() or not all(torch.equal(v, first[n]) for n, v in o.items()) for o in others):
        raise AFDSError(
            f"{path} holds {len(states)} networks, {' and '.join(states)}: save the one you mean alone, as in "
            f"torch.save(torch.load(path)[{list(states)[0].split('.')[0]!r}], 'one.pth')."
        )
    return next(iter(states.values()))


def _state_dicts(content: Any, where: str = "") -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(place, names to tensors): the content itself, or what lies under the names that training programs use."""
    if not isinstance(content, Mapping):
        return
    held = [key for key in _HOLDERS if isinstance(content.get(key), Mapping)]
    for key in held:
        yield from _state_dicts(content[key], f"{where}.{key}".strip("."))
    tensors = {n: v for n, v in content.items() if isinstance(n, str) and isinstance(v, torch.Tensor)}
    notes = [v for n, v in content.items() if n not in tensors]  # they say nothing of the weights
    if tensors and not held and all(isinstance(v, (bool, int, float, str, type(None))) for v in notes):
        yield where, tensors


def _bare(name: str) -> str:
    """A parameter's name without what wrappers put into it: "module.features._orig_mod.0.weight"."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _fitted(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """A state dict under a network's own names: without wrappers' parts, one common prefix and profilers' leftovers.

    Counters of batches, which files from before torch 0.4.1 lack, start at 0.
    """
    if own.keys() != state.keys():
        # What thop leaves in a network, and the counter of torch's AveragedModel.
        leftovers = ("total_ops", "total_params", "n_averaged")
        used = {n: v for n, v in state.items() if n.rpartition(".")[2] not in leftovers}
        bare = {_bare(n): v for n, v in used.items()}
        if len(bare) < len(used):
            raise AFDSError(f"{source} holds parameters with and without a wrapper's name: save one network alone.")
        # The prefix under which most of the network's names lie, such as Lightning's "model.".
        ends = ((n, n[at:]) for n in bare for at in (0, *(i + 1 for i, c in enumerate(n) if c == ".")))
        counts = Counter(n.removesuffix(end) for n, end in ends if end in own)
        prefixes = [prefix for prefix, count in counts.items() if count > len(own) // 2]
        if len(prefixes) > 1:
            named = " and ".join(repr(p.rstrip(".")) if p else "no prefix" for p in prefixes)
            raise AFDSError(f"{source} holds {len(prefixes)} networks, under {named}: save the one you mean alone.")
        prefix = prefixes[0] if prefixes else ""
        state = {n.removeprefix(prefix): v for n, v in bare.items() if n.startswith(prefix)}
    counters = {n: v for n, v in own.items() if n.endswith("num_batches_tracked") and n not in state}
    return {**state, **counters}


def load_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, source: str, classifier: str | None = None
) -> None:
    """Copies a state dict into a model; nothing is copied unless everything fits.

    Args:
        model: changed in place.
        state: names to tensors; with the prefixes of DataParallel, torch.compile, averages or Lightning, too.
        source: where the state is from, for the sentence.
        classifier: name of the last linear layer, which keeps the model's own values where the file has another number
            of classes.

    Raises:
        AFDSError: missing or foreign names, names of two networks, or another shape.
    """
    own = model.state_dict()
    state = _fitted(own, state, source)
    weight, bias = f"{classifier}.weight", f"{classifier}.bias"
    if weight in own and weight in state:
        (classes, *inputs), (given, *given_inputs) = own[weight].shape, state[weight].shape or (0,)
        if classes != given and inputs == given_inputs:
            state.update({name: own[name] for name in (weight, bias) if name in own and name in state})
    refuse_other_names(own, state, f"{source} %s: these are weights of another network, give the matching name.")
    if wrong := [n for n in own if own[n].shape != state[n].shape]:
        first, differ = wrong[0], f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else ""
        raise AFDSError(
            f"{source} has the shape {tuple(state[first].shape)} for {first} where this network has "
            f"{tuple(own[first].shape)}{differ}: check name, stem, width and number of classes."
        )
    model.load_state_dict(state)


def refuse_other_names(wanted: Iterable[str], given: Iterable[str], sentence: str) -> None:
    """An AFDSError whose %s says which names are missing and which are foreign; nothing where they are equal."""
    missing, foreign = set(wanted) - set(given), set(given) - set(wanted)
    if missing or foreign:
        parts = [f"lacks {few(missing)}"] if missing else []
        parts += [f"holds the foreign {few(foreign)}"] if foreign else []
        raise AFDSError(sentence.replace("%s", " and ".join(parts)))


def load_file(model: nn.Module, path: str | Path, *, classifier: str | None = None) -> None:
    """`read_state` and `load_state` in one step."""
    form = ""
    if known := architecture(path):
        gates = " with gates" if known.get("gates") else ""
        form = f" (a {known['name']} of width {known.get('width', 1):g}{gates})"
    load_state(model, read_state(path), source=f"{path}{form}", classifier=classifier)
