"""The public weight files of attention transfer: flat dictionaries with the batch norms folded away. [code]

- `resnet-34-export.pth` (the teacher): a post-activation ResNet whose batch norms are in the convolutions' biases:
  `group{g}.block{b}.conv{i}.weight` and `.bias`, `conv_dim` for the shortcut. Its bias is added, as in the export's own
  notebook and unlike in the training code.
- `resnet-18-at-export.pth` (the student trained with attention transfer): a pre-activation ResNet,
  `group{g}.block{b}.conv{i}` without biases, and `affine{i}.a` and `.b`, what a batch norm in eval mode comes to.

Both become networks with batch norms (mean 0, variance 1 - eps) that compute the same in eval mode. In train mode they
would normalise by the batch: these are teachers, not starting points for fine-tuning (their authors say so too).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from afdslib.backbones.loading import load_state, read_state, refuse_other_names
from afdslib.backbones.preact import PREACT_LAYOUTS
from afdslib.backbones.registry import build
from afdslib.backbones.resnet import LAYOUTS
from afdslib.base.errors import AFDSError

__all__ = ["load_export"]

_URL = "https://s3.amazonaws.com/modelzoo-networks"
_GROUPS = range(4)


def load_export(path: str | Path) -> nn.Module:
    """The network in `resnet-34-export.pth`, `resnet-18-at-export.pth` or a file of the same form, in eval mode.

    Raises:
        AFDSError: no such file, a file of the older .hkl form, damaged, or missing and foreign names.
    """
    if Path(path).suffix == ".hkl":
        raise AFDSError(f"{path} is a Hickle file, which is not read here; take the .pth of the same name from {_URL}.")
    state = read_state(path)
    preact = any(".affine" in name or name.startswith("affine") for name in state)
    if preact:  # the convolutions may carry the suffix that the other file's have
        state = {n.removesuffix(".weight") if ".conv" in f".{n}" else n: v for n, v in state.items()}
    suffix = "" if preact else ".weight"
    blocks = tuple(sum(bool(re.fullmatch(rf"group{g}\.block[^.]*\.conv0{suffix}", n)) for n in state) for g in _GROUPS)
    layouts = PREACT_LAYOUTS if preact else {n: LAYOUTS[n][1] for n in ("resnet18", "resnet34")}
    names = [name for name, layout in layouts.items() if layout == blocks]
    if not names or f"conv0{suffix}" not in state or "fc.weight" not in state:
        raise AFDSError(
            f"{path} is none of the exports: it holds {'-'.join(map(str, blocks))} blocks of the form "
            f"group0.block0.conv0{suffix} where a ResNet-18 has 2-2-2-2 and a ResNet-34 3-4-6-3, or lacks "
            f"conv0{suffix} or fc.weight; fetch resnet-34-export.pth or resnet-18-at-export.pth from {_URL}."
        )
    width = state[f"conv0{suffix}"].shape[0] / 64
    model = build(names[0], state["fc.weight"].shape[0], width=width)
    load_state(model, _translated(model, state, preact=preact, source=str(path)), source=str(path))
    return model.eval()


def _translated(model: nn.Module, state: Mapping[str, Tensor], *, preact: bool, source: str) -> dict[str, Tensor]:
    """The model's state dict from the file's, after a check that both name the same things."""
    pairs = dict(_preact_names(model) if preact else _folded_names(model))
    refuse_other_names(pairs.values(), state, f"{source} %s: it is not a complete export, fetch it again from {_URL}.")
    translated = {ours: state[theirs] for ours, theirs in pairs.items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            zeros = torch.zeros(module.num_features)
            translated[f"{name}.running_mean"] = zeros
            translated[f"{name}.running_var"] = zeros + (1 - module.eps)  # the square root of variance + eps is 1
            if not preact:
                translated[f"{name}.weight"] = zeros + 1
    return translated


def _folded_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(our name, the file's) for a post-activation ResNet; the batch norms' biases are the file's biases."""
    yield from (("conv1.weight", "conv0.weight"), ("bn1.bias", "conv0.bias"))
    yield from (("fc.weight", "fc.weight"), ("fc.bias", "fc.bias"))
    for ours, theirs, block in _blocks(model):
        yield from ((f"{ours}.conv{i}.weight", f"{theirs}.conv{i - 1}.weight") for i in (1, 2))
        yield from ((f"{ours}.bn{i}.bias", f"{theirs}.conv{i - 1}.bias") for i in (1, 2))
        if block.downsample is not None:
            yield f"{ours}.downsample.0.weight", f"{theirs}.conv_dim.weight"
            yield f"{ours}.downsample.1.bias", f"{theirs}.conv_dim.bias"


def _preact_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(our name, the file's) for a pre-activation ResNet."""
    yield from (("conv1.weight", "conv0"), ("fc.weight", "fc.weight"), ("fc.bias", "fc.bias"))
    norms = [("bn1", "affine0"), ("bn", "affine_last")]
    for ours, theirs, block in _blocks(model):
        yield from ((f"{ours}.conv{i}.weight", f"{theirs}.conv{i - 1}") for i in (1, 2))
        norms += [(f"{ours}.bn{i}", f"{theirs}.affine{i - 1}") for i in (1, 2) if i == 2 or block.opens]
        if block.downsample is not None:
            yield f"{ours}.downsample.weight", f"{theirs}.conv_dim"
    for ours, theirs in norms:
        yield from ((f"{ours}.weight", f"{theirs}.a"), (f"{ours}.bias", f"{theirs}.b"))


def _blocks(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    for g in _GROUPS:
        for b, block in model.get_submodule(f"layer{g + 1}").named_children():
            yield f"layer{g + 1}.{b}", f"group{g}.block{b}", block
