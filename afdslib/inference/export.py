"""Networks in files that need nothing else: ONNX or safetensors, with class names and preprocessing.

The gates of an exported network decide as they do in eval mode; channels are scaled, not skipped. Networks of
`dynamic.dynamic`, which skip, are exported for one batch size.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afdslib import afs, runs
from afdslib.afs.compact import compact, fold_norm
from afdslib.afs.layer import AFSConvBN
from afdslib.backbones.inputs import IMAGENET, input_of
from afdslib.base.atomic import atomic_path, output_path
from afdslib.base.errors import AFDSError
from afdslib.data import ImageDataset
from afdslib.data.images import MEAN, STD

__all__ = ["KEY", "OPSET", "TOLERANCE", "Card", "GatedInference", "export_run", "inference", "save_onnx", "session"]

OPSET = 18
"""The version of ONNX's operators that files are written for: onnxruntime 1.14 (2023) and later read it."""
TOLERANCE = 1e-4
"""What onnxruntime's outputs may differ by from torch's: max|a-b| / max|b|."""
KEY = "afds_export"


@dataclass(frozen=True)
class Card:
    """What a file says beside its weights, as JSON under `KEY` in its metadata.

    Attributes:
        classes: names, indexed by the network's outputs.
        size: side in pixels of the square that is cut from the centre.
        resize: the shorter side in pixels before that; bilinear with antialiasing.
        mean, std: of RGB values from 0 to 1: (value - mean) / std goes in, (B, 3, size, size).
        network: the backbone, where it is known.
        run: the run that trained it, or "".
        opset: of an ONNX file, else 0.
    """

    classes: tuple[str, ...]
    size: int
    resize: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    network: str = ""
    run: str = ""
    opset: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Card:
        """What `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: for anything else.
        """
        values: Any = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        card = cls(**values)
        card = replace(card, classes=tuple(map(str, card.classes)))
        sides = all(isinstance(side, int) and side >= 1 for side in (card.size, card.resize))
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in (*card.mean, *card.std))
        if not (sides and numbers and len(card.mean) == len(card.std) == 3 and min(card.std) > 0 and card.classes):
            raise ValueError("its preprocessing makes no sense")
        return card


# ----------------------------------------------------------------------------------------------- gates for inference


class GatedInference(nn.Module):
    """An AFS layer in eval mode by plain operations: the batch norm is folded, the masks and k are constants.

    Shape:
        (B, C_in, H, W) -> (B, C, H', W').
    """

    conv: nn.Module
    order: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    active: Tensor
    shift: Tensor

    def __init__(self, layer: AFSConvBN):
        super().__init__()
        self.conv = copy.deepcopy(layer.conv)
        fold_norm(self.conv, layer.norm)
        living, dynamic = layer.m > 0, layer.m * layer.s > 0
        chosen = dynamic.nonzero()[:, 0]
        constant = living & ~dynamic
        weight, bias = layer.predictor_weights()
        self.places = min(max(layer.k - int(constant.sum()), 0), len(chosen))
        self.dynamic = len(chosen)
        self.mixed = self.dynamic < layer.m.numel()
        order = torch.zeros_like(chosen.new_empty(layer.m.numel()))
        order[chosen] = torch.arange(len(chosen), device=chosen.device)
        rest = (~dynamic).nonzero()[:, 0]
        order[rest] = len(chosen) + torch.arange(len(rest), device=chosen.device)
        self.register_buffer("order", order)
        self.register_buffer("weight", weight.detach()[chosen].clone())
        self.register_buffer("bias", bias.detach()[chosen].clone())
        self.register_buffer("gamma", torch.where(constant, layer.gamma, 0)[None].clone())
        self.register_buffer("active", constant.to(weight.dtype)[None])
        self.register_buffer("shift", layer.beta.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if not self.dynamic:
            scale, active = self.gamma, self.active
        else:
            scale, active = self._gates(x)
        return self.conv(x) * scale[:, :, None, None] + (active * self.shift)[:, :, None, None]

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = nn.functional.linear(x.mean((2, 3)), self.weight, self.bias).relu()
        if 0 < self.places < self.dynamic:
            # The lowest index must win a tie: ONNX's TopK promises that, torch's does not.
            if torch.compiler.is_exporting():
                largest, index = h.topk(self.places, dim=1)
            else:
                ordered = torch.sort(h, dim=1, descending=True, stable=True)
                largest, index = (t[:, : self.places] for t in ordered)
            h = torch.zeros_like(h).scatter(1, index, largest)
        elif self.places == 0:
            h = torch.zeros_like(h)
        if self.mixed:
            h = nn.functional.pad(h, (0, self.order.numel() - self.dynamic)).index_select(1, self.order)
            return h + self.gamma, (h > 0).to(h.dtype) + self.active
        return h, (h > 0).to(h.dtype)


@torch.no_grad()
def inference(model: nn.Module) -> nn.Module:
    """A copy of a network in eval mode whose AFS layers are `GatedInference`, for exports and compilers."""
    made = copy.deepcopy(model).eval().requires_grad_(False)
    for name, layer in [(n, m) for n, m in made.named_modules() if isinstance(m, AFSConvBN)]:
        made.set_submodule(name, GatedInference(layer))
    return made.eval()


# --------------------------------------------------------------------------------------------------------------- ONNX


def need(name: str) -> Any:
    """A package of the export extra.

    Raises:
        AFDSError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise AFDSError(f"{name} is not installed; install it with: pip install 'afdslib[export]'") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes on its own operators are nothing a user can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _stable_sort() -> Any:
    """torch's stable sort in ONNX, for which the exporter has no translation: TopK gives ties in their order, too."""
    op = importlib.import_module("onnxscript").opset18

    def sort_stable(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        length = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]), axis=0)
        return op.TopK(self, length, axis=dim, largest=descending, sorted=True)

    return sort_stable


def save_onnx(
    model: nn.Module,
    path: str | Path,
    input_size: tuple[int, int, int],
    *,
    card: Card | None = None,
    batch: int | None = None,
    opset: int = OPSET,
    images: Tensor | None = None,
) -> float:
    """Writes a network as one ONNX file and checks it in onnxruntime against torch, in float32.

    The input is "image", (B, 3, H, W), the output "logits", (B, classes).

    Args:
        model: plain, gated, compact or dynamic, in eval mode; it is left as it is.
        path: the file.
        input_size: (3, H, W).
        card: what the file says about itself.
        batch: a fixed batch size; None for any. Networks of `dynamic.dynamic` need the one they were prepared for.
        opset: version of ONNX's operators.
        images: at least three, or `batch`, images (B, 3, H, W) to check it with; default: random ones, on which the
            gates of a deep network may overflow that never saw such images.

    Returns:
        max|a-b| / max|b| between onnxruntime and torch on these images.

    Raises:
        AFDSError: in train mode, without the ONNX packages, for an opset or a network that cannot be exported, such as
            a dynamic one with our own kernel, for outputs that are not finite, or if onnxruntime's differ by more than
            `TOLERANCE`; no file is left then.
    """
    need("onnx"), need("onnxscript"), need("onnxruntime")
    if model.training:
        raise AFDSError("the network is in train mode, where its batch norms change; call model.eval() before it")
    if any(getattr(module, "kernel", "") == "own" for module in model.modules()):
        raise AFDSError(
            "the dynamic network runs on our own kernel, which no file can hold; prepare it with "
            "dynamic(..., static_shapes=True)"
        )
    reference = copy.deepcopy(model).float().cpu()
    frozen = inference(reference)
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> Tensor:
        if images is not None:
            return images[:count].float().cpu()
        noise = torch.randn(count, *input_size, generator=generator)
        return noise + torch.randn(count, input_size[0], 1, 1, generator=generator)

    example = some(2 if batch is None else batch)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                frozen, (example,), dynamo=True, opset_version=opset, input_names=["image"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},) if batch is None else None, verbose=False,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
            )  # fmt: skip
        except Exception as error:  # the exporter raises many types; all mean the same to the caller
            reason = str(error).split("## Exception summary")[-1].strip().splitlines()
            raise AFDSError(
                f"torch.onnx cannot export {type(model).__name__} ({reason[0] if reason else type(error).__name__})"
            ) from error
    assert program is not None
    written = int(program.model.opset_imports[""])
    if written != opset:
        raise AFDSError(f"torch.onnx cannot write opset {opset!r} here and would take {written}; ask for one it knows")
    if card is not None:
        program.model.metadata_props[KEY] = Card(**{**asdict(card), "opset": opset}).to_json()
    with atomic_path(path) as part:
        program.save(str(part), external_data=False)
        differences = []
        runtime = session(part)
        with torch.no_grad():
            for count in (1, 3) if batch is None else (batch,):
                x = some(count)
                wanted, found = model_output(reference, x), torch.from_numpy(runtime.run(None, {"image": x.numpy()})[0])
                if not bool(wanted.isfinite().all()):
                    raise AFDSError("the network's outputs are not finite, so it is not exported; train it again")
                differences.append(float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)))
        worst = math.inf if any(map(math.isnan, differences)) else max(differences)
        if not worst <= TOLERANCE:
            raise AFDSError(
                f"onnxruntime's outputs differ by {worst:.1e} of the largest from torch's, more than {TOLERANCE:g}: "
                "the file would be wrong and is not written"
            )
    return worst


def model_output(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in eval mode, without gradients."""
    with torch.no_grad():
        return model(images)


def session(path: str | Path, *, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        AFDSError: without onnxruntime, or for a damaged file.
    """
    ort = need("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(Path(path).read_bytes(), options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise AFDSError(f"cannot read {path}: {error.strerror or error}; give a file of afds export") from None
    except Exception as error:  # onnxruntime has a type of its own for each kind of damage
        reason = " ".join(str(error).split())[:120]
        raise AFDSError(f"{path} is damaged or no ONNX file ({reason}); write it again with afds export") from None


# ----------------------------------------------------------------------------------------------------- a trained run


def card_of(data: ImageDataset, classes: tuple[str, ...], **more: Any) -> Card:
    """The preprocessing of a data set's test images."""
    return Card(tuple(classes), data.size, getattr(data, "shorter", data.size), **more)


def _normalisation(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """What a card says of a network that was trained on other images than torchvision's."""
    images = input_of(model)
    if images == IMAGENET:
        return {}
    return {"mean": tuple(m / 255 for m in images.mean), "std": tuple(d / 255 for d in images.deviation)}


def export_run(
    id: str, format: str, out: str | Path | None = None, *, store: str | Path | None = None
) -> tuple[Path, Card]:
    """Writes the compact network of a finished run with its class names and preprocessing.

    Args:
        id: the run, or the beginning of its id.
        format: "onnx" (batch norms folded, checked in onnxruntime, any batch size) or "torch" (safetensors of
            `afs.save`, which can be trained on).
        out: the file; default: `<id>.onnx` or `<id>.safetensors` in the working directory.
        store: the run store.

    Returns:
        The file and what it says about itself.

    Raises:
        AFDSError: no such run, an unfinished one, one without a network or class names, a missing data set, or an
            unknown format.
    """
    suffixes = {"onnx": ".onnx", "torch": ".safetensors"}
    if format not in suffixes:
        raise AFDSError(f"the format {format!r} is unknown; use onnx or torch")
    if out is not None and Path(out).suffix != suffixes[format]:
        raise AFDSError(f"a file of the format {format} is named *{suffixes[format]}, got {str(out)!r}; rename it")
    if out is not None:
        output_path(out)
    config, result = runs.finished(id, store=store)
    if "diverged" in result.metrics:
        raise AFDSError(f"run {result.id} diverged, so it has no network to export; take another run")
    data = getattr(config, "data", None)
    if not callable(getattr(data, "load", None)):
        raise AFDSError(
            f"run {result.id} is a {type(config).__name__}, which names no data set whose classes could go into the "
            "file; export one that was trained on a data set"
        )
    model = afs.load(result.artifact(runs.MODEL))
    splits = data.load()
    architecture: Any = model.architecture
    classes = tuple(splits.captions or splits.classes)
    card = card_of(splits.test, classes, network=architecture["name"], run=result.id, **_normalisation(model))
    if len(card.classes) != architecture["num_classes"]:
        raise AFDSError(
            f"the network of run {result.id} has {architecture['num_classes']} outputs but its data set "
            f"{len(card.classes)} classes, so their names are not known; export a run that was trained on it"
        )
    size = (3, card.size, card.size)
    path = Path(out) if out is not None else Path(f"{result.id}{suffixes[format]}")
    cut = compact(model, input_size=size, fold_bn=format == "onnx")
    if format == "onnx":
        save_onnx(cut, path, size, card=card)
    else:
        with atomic_path(path) as part:
            afs.save(cut, part, metadata={KEY: card.to_json()})
    return path, card
