"""Networks in files that need nothing else: ONNX or safetensors, with class names and preprocessing.

The gates of an exported network decide as they do in eval mode; channels are scaled, not skipped.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from afdslib import afs, data, runs, training
from afdslib.afs.compact import compact
from afdslib.backbones.inputs import IMAGENET, input_of, scaled_down, see_at, see_whole
from afdslib.base import checks
from afdslib.base.atomic import atomic_path, output_path
from afdslib.base.errors import AFDSError
from afdslib.data.images import MEAN, STD
from afdslib.inference.gates import inference
from afdslib.inference.kernels import KernelConvBN

__all__ = [
    "FORMATS", "KEY", "OPSET", "TOLERANCE", "Card", "accuracy", "card_of", "export_run", "inputs", "save_int8",
    "save_onnx", "session",
]  # fmt: skip

FORMATS = {"onnx": ".onnx", "onnx-int8": ".onnx", "torch": ".safetensors"}
"""Of exported files, with their suffixes."""

OPSET = 18  # the version of ONNX's operators that files are written for: onnxruntime 1.14 (2023) and later read it
TOLERANCE = 1e-4  # what onnxruntime's outputs may differ by from torch's: max|a-b| / max|b|
KEY = "afds_export"
CALIBRATION = 200  # training images, from which the ranges of an int8 file's values are taken
HELD = 1000  # validation and then training images on which its loss is measured
LOSS = 0.005  # share of them that int8 may lose, else some layers stay in fp32


@dataclass(frozen=True)
class Card:
    """What a file says beside its weights, as JSON under `KEY` in its metadata."""

    classes: tuple[str, ...]  # names, indexed by the network's outputs
    size: int  # side in pixels of the square that is cut from the centre
    resize: int  # the shorter side in pixels before that; bilinear with antialiasing
    mean: tuple[float, ...] = MEAN  # of RGB values from 0 to 1: (value - mean) / std goes in, (B, 3, size, size)
    std: tuple[float, ...] = STD
    network: str = ""  # the backbone, where it is known
    run: str = ""  # the run that trained it, or ""
    opset: int = 0  # of an ONNX file, else 0
    side: int = 0  # pixels to which the square is scaled down at last, bilinear with antialiasing; 0: it is not
    precision: str = "fp32"  # or "int8"
    fp32: tuple[str, ...] = ()  # layers of an int8 file that stay in fp32

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Card:
        """What `to_json` wrote; ValueError, KeyError or TypeError for anything else."""
        values: Any = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        card = cls(**fields)
        card = replace(card, classes=tuple(map(str, card.classes)))
        sides = all(isinstance(side, int) and side >= 1 for side in (card.size, card.resize, card.side + 1))
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in (*card.mean, *card.std))
        if not (sides and numbers and len(card.mean) == len(card.std) == 3 and min(card.std) > 0 and card.classes):
            raise ValueError("its preprocessing makes no sense")
        return card


def need(name: str) -> Any:
    """A package of the export extra; AFDSError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise AFDSError(f"{name} is not installed; install it with: pip install 'afdslib[export]'") from None


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
        model: plain, gated or compact, in eval mode; it is left as it is.
        path: the file.
        input_size: (3, H, W).
        card: what the file says about itself.
        batch: a fixed batch size; None for any.
        opset: version of ONNX's operators.
        images: at least three, or `batch`, images (B, 3, H, W) to check it with; default: random ones, on which the
            gates of a deep network may overflow that never saw such images.

    Returns:
        max|a-b| / max|b| between onnxruntime and torch on these images.

    Raises:
        AFDSError: in train mode, without the ONNX packages, for an opset or a network that cannot be exported, such as
            one of `dynamic.dynamic`, for outputs that are not finite, or if onnxruntime's differ by more than
            `TOLERANCE`; no file is left then.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package)
    if model.training:
        raise AFDSError("the network is in train mode, where its batch norms change; call model.eval() before it")
    if any(isinstance(module, KernelConvBN) for module in model.modules()):
        raise AFDSError(
            "the dynamic network runs on our own kernel, which no file can hold; export the network it was made from"
        )
    reference = copy.deepcopy(model).float().cpu()
    if images is None:
        generator = torch.Generator().manual_seed(0)
        count = batch or 3
        images = torch.randn(count, *input_size, generator=generator)
        images += torch.randn(count, input_size[0], 1, 1, generator=generator)
    images = images.float().cpu()
    program = _program(reference, images[: batch or 2], opset, any_batch=batch is None)
    if card is not None:
        program.model.metadata_props[KEY] = replace(card, opset=opset).to_json()
    with atomic_path(path) as part:
        program.save(str(part), external_data=False)
        runtime = session(part)
        worst = max(_difference(reference, runtime, images[:count]) for count in ([batch] if batch else (1, 3)))
        if not worst <= TOLERANCE:
            raise AFDSError(
                f"onnxruntime's outputs differ by {worst:.1e} of the largest from torch's, more than {TOLERANCE:g}: "
                "the file would be wrong and is not written"
            )
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of exporters on their own operators, which are nothing a user can act on."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


def _program(model: nn.Module, example: Tensor, opset: int, *, any_batch: bool) -> Any:
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                inference(model), (example,), dynamo=True, opset_version=opset, input_names=["image"],
                output_names=["logits"], verbose=False, dynamic_shapes=shapes,
            )  # fmt: skip
    except Exception as error:  # the exporter raises many types; all mean the same to the caller
        reason = str(error).split("## Exception summary")[-1].strip().splitlines() or [type(error).__name__]
        raise AFDSError(f"torch.onnx cannot export {type(model).__name__} ({reason[0]})") from error
    written = int(program.model.opset_imports[""])
    if written != opset:
        raise AFDSError(f"torch.onnx cannot write opset {opset!r} here and would take {written}; ask for one it knows")
    return program


@torch.no_grad()
def _difference(model: nn.Module, runtime: Any, images: Tensor) -> float:
    """max|a-b| / max|b| between onnxruntime and torch; infinite where onnxruntime gives no number."""
    expected = model(images)
    if not bool(expected.isfinite().all()):
        raise AFDSError("the network's outputs are not finite, so it is not exported; train it again")
    outputs = torch.from_numpy(runtime.run(None, {"image": images.numpy()})[0])
    difference = float((outputs - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return math.inf if math.isnan(difference) else difference


def session(path: str | Path, *, threads: int = 0) -> Any:
    """An onnxruntime session on the CPU, by default on as many threads as it likes.

    Raises:
        AFDSError: without onnxruntime, or for a damaged file.
    """
    ort = need("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    if not threads:  # threads that spin while they wait make a busy machine many times slower
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(Path(path).read_bytes(), options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise AFDSError(f"cannot read {path}: {error.strerror or error}; give a file of afds export") from None
    except Exception as error:  # onnxruntime has a type of its own for each kind of damage
        reason = " ".join(str(error).split())[:120]
        raise AFDSError(f"{path} is damaged or no ONNX file ({reason}); write it again with afds export") from None


def inputs(images: Any, count: int, side: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of 32 of at most `count` evenly spaced images, as a file takes them (see `Card.side`), with labels."""
    batches = data.loader(training.first(images, count), 32)
    return [((scaled_down(x, side) if side else x).numpy(), labels.numpy()) for x, labels in batches]


def accuracy(path: str | Path, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Share of images on which an ONNX file is right; `batches` as of `inputs`."""
    runtime, right = session(path), 0
    for images, labels in batches:
        right += int((runtime.run(None, {"image": images})[0].argmax(1) == labels).sum())
    return right / sum(len(labels) for _, labels in batches)


def save_int8(
    file: str | Path, out: str | Path, calibration: Sequence[tuple[np.ndarray, np.ndarray]],
    held: Sequence[tuple[np.ndarray, np.ndarray]], card: Card,
) -> Card:  # fmt: skip
    """Writes the network of an ONNX file in int8: onnxruntime's static quantisation, weights by channel.

    Weights take 7 bits, since processors without instructions for int8 would add up 8 of them beyond their range. Where
    more than `LOSS` of the held images are lost, the layers that lose them stay in fp32: the list of layers is halved
    as long as the better half is enough. [ours]

    Args:
        file: in fp32, from `save_onnx`.
        out: the file to write.
        calibration, held: of `inputs`: training images that give the ranges, and images to choose by.
        card: what `file` says of itself.

    Returns:
        What the file says of itself, with the layers that stay in fp32.
    """
    onnx = need("onnx")
    need("onnxruntime")
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry

    layers = [node.name for node in onnx.load(file).graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    with tempfile.TemporaryDirectory() as folder, atomic_path(out) as part, _quiet():
        # What values each map takes, once for all trials.
        watched, batches = Path(folder) / "watched.onnx", iter(calibration)
        calibrator = create_calibrator(Path(file), augmented_model_path=str(watched))
        calibrator.infer_session = session(watched)
        calibrator.collect_data(SimpleNamespace(get_next=lambda: next(({"image": x} for x, _ in batches), None)))
        ranges = calibrator.compute_data()

        def score(fp32: Sequence[str]) -> float:
            quantiser = QDQQuantizer(
                onnx.shape_inference.infer_shapes(onnx.load(file)), True, True, QuantType.QInt8, QuantType.QUInt8,
                ranges, [], list(fp32), list(QDQRegistry), {},
            )  # fmt: skip
            quantiser.quantize_model()
            onnx.helper.set_model_props(
                quantiser.model.model, {KEY: replace(card, precision="int8", fp32=tuple(fp32)).to_json()}
            )
            quantiser.model.save_model_to_file(str(part), False)
            return accuracy(part, held)

        fp32: list[str] = []
        wanted = accuracy(file, held) - LOSS - 1e-9
        if score(fp32) < wanted:
            fp32 = layers
            while len(fp32) > 1:
                trials = {score(half): half for half in (fp32[len(fp32) // 2 :], fp32[: len(fp32) // 2])}
                if max(trials) < wanted:
                    break
                fp32 = trials[max(trials)]
            score(fp32)
    return replace(card, precision="int8", fp32=tuple(fp32))


def card_of(data: Any, classes: tuple[str, ...], **more: Any) -> Card:
    """The preprocessing of a data set's test images; `more` are further fields of the card."""
    return Card(tuple(classes), data.size, getattr(data, "shorter", data.size), **more)


def export_run(
    id: str, format: str, out: str | Path | None = None, *, store: str | Path | None = None
) -> tuple[Path, Card]:
    """Writes the compact network of a finished run to a file, and gives the file and what it says about itself.

    Args:
        id: the run, or the beginning of its id.
        format: "onnx" (batch norms folded, checked in onnxruntime, any batch size), "onnx-int8" (the same, quantised;
            see `save_int8`) or "torch" (safetensors of `afs.save`, which can be trained on).
        out: the file; default: `<id>.onnx`, `<id>.int8.onnx` or `<id>.safetensors` in the working directory.
        store: the run store.

    Raises:
        AFDSError: no such run, an unfinished one, one without a network or class names, a missing data set, or an
            unknown format.
    """
    checks.choice("the format", format, FORMATS)
    suffix = FORMATS[format]
    if out is not None:
        if Path(out).suffix != suffix:
            raise AFDSError(f"a file of the format {format} is named *{suffix}, got {str(out)!r}; rename it")
        output_path(out)
    config, result = runs.finished(id, store=store)
    if "diverged" in result.metrics:
        raise AFDSError(f"run {result.id} diverged, so it has no network to export; take another run")
    source: Any = getattr(config, "data", None)
    # Photographs with an augmentation of their own are resized by another rule than the one a card states.
    if not hasattr(source, "load") or hasattr(source, "augmentation"):
        raise AFDSError(
            f"run {result.id} is a {type(config).__name__}, which names no data set whose classes could go into the "
            "file; export one that was trained on a data set"
        )
    model = afs.load(result.artifact(runs.MODEL))
    try:
        splits = source.load()
    except AFDSError as error:
        wanted = "the class names and, in int8, the ranges of values" if format == "onnx-int8" else "the class names"
        raise AFDSError(f"{wanted} come from the training images, which cannot be read ({error})") from error
    architecture, pixels = cast(Any, model.architecture), input_of(model)
    # That of torchvision's networks is stated as usual, for values from 0 to 1.
    scaled = (tuple(value / 255 for value in values) for values in (pixels.mean, pixels.deviation))
    mean, std = (MEAN, STD) if pixels == IMAGENET else scaled
    classes, network = splits.captions or splits.classes, architecture["name"]
    card = card_of(splits.test, classes, mean=mean, std=std, network=network, run=result.id)
    if len(card.classes) != architecture["num_classes"]:
        raise AFDSError(
            f"the network of run {result.id} has {architecture['num_classes']} outputs but its data set "
            f"{len(card.classes)} classes, so their names are not known; export a run that was trained on it"
        )
    path = Path(out or f"{result.id}{'.int8' if format == 'onnx-int8' else ''}{suffix}")
    # Images that the network scales down itself: in an ONNX file whoever prepares them does so.
    smaller = see_whole(model)
    side = smaller or card.size
    cut = compact(model, input_size=(3, side, side), fold_bn=format != "torch")
    if format == "torch":
        with atomic_path(path) as part:
            afs.save(see_at(cut, smaller) if smaller else cut, part, metadata={KEY: card.to_json()})
        return path, card
    card = replace(card, opset=OPSET, side=smaller)
    if format == "onnx":
        save_onnx(cut, path, (3, side, side), card=card)
        return path, card
    splits = splits.normalised(pixels)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "fp32.onnx"
        save_onnx(cut, plain, (3, side, side))
        held = [] if splits.validation is None else inputs(splits.validation, HELD // 2, card.side)
        held += inputs(splits.statistics, HELD - sum(len(labels) for _, labels in held), card.side)
        return path, save_int8(plain, path, inputs(splits.statistics, CALIBRATION, card.side), held, card)
