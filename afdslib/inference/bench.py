"""`afds bench`: measured time of networks, training steps, losses and data loading, side by side in one run.

Every case measures its variants in turn, repeat by repeat, on a fixed number of threads and after a warm-up; networks
see another image each repeat, after some calls that are not timed. A ratio is the median over repeats of the ratio
within a repeat, so that what else the machine does falls on both sides. Networks have random weights unless a file is
given: their time does not depend on them, apart from gates, which `random_gates` makes depend on the image. [ours]
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from afdslib import afs, runs
from afdslib.afs import macs
from afdslib.afs.compact import compact, set_masks
from afdslib.afs.io import read_masks
from afdslib.base import checks
from afdslib.base.atomic import atomic_path
from afdslib.base.cpu import keep_freed_memory
from afdslib.base.errors import AFDSError
from afdslib.data.datasets import ArrayImages, FileImages, Files
from afdslib.inference import networks
from afdslib.inference.dynamic import DynamicNetwork, dynamic
from afdslib.inference.export import need, save_onnx, session
from afdslib.inference.gates import inference
from afdslib.inference.timing import interleave, on_threads, peak
from afdslib.losses import at_loss, nst_loss
from afdslib.losses.afd import AFDLoss
from afdslib.training.objective import Objective, Regulariser

__all__ = [
    "CASES", "RUNTIMES", "Row", "Settings", "compare", "describe", "environment", "nst_peak", "on_threads", "ratio",
    "run", "to_csv",
]  # fmt: skip

RUNTIMES = ("eager", "compiled", "onnxruntime")
PACKAGES = ("torch", "afdslib", "onnxruntime", "torch-pruning")
FOLDED = {"note": "batch norm folded"}
Columns = Mapping[str, Mapping[str, Any]]
"""Further columns of a comparison's rows, by variant."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Raises:
        AFDSError: for a number out of range, or an unknown runtime.
    """

    networks: tuple[str, ...] = ("resnet50",)  # backbones, with the stem for photographs
    batches: tuple[int, ...] = (1,)  # images at a time
    runtimes: tuple[str, ...] = ("eager",)  # of `RUNTIMES`
    size: int = 224  # side of the images, pixels
    threads: int = 1  # of torch and of onnxruntime
    repeats: int = 5  # measured rounds
    warmup: int = 1  # rounds before them
    # Seconds of untimed calls before each timed one of a network: idle threads of onnxruntime spin for about 0.1 s, and
    # beside two other sessions a pruned ResNet-101 took 17 to 30 ms per image instead of 9.
    steady: float = 0.2
    keep: float = 0.2  # share of the inner channels that the compact network keeps
    stream: float = 0.75  # share of the residual streams' channels that it keeps
    multiple: int = 16  # kept channels are rounded to a multiple
    density: float = 0.3  # d of the dynamic case
    weights: str | None = None  # a file of `afs.save` whose own masks make the compact network, instead of random ones
    masks: tuple[str, ...] = ()  # of `afds publish --part speed`, one network each; the weights are then random
    train_size: int = 64  # side of the images of training steps, pixels
    train_batch: int = 16  # images per training step
    width: float = 1.0  # factor on the channels, for quick looks
    seed: int = 0  # of weights, masks, gates and images

    def __post_init__(self) -> None:
        for name in ("size", "threads", "repeats", "multiple", "train_size", "train_batch"):
            checks.whole(name, getattr(self, name), 1)
        for name in ("keep", "stream", "density"):
            checks.number(name, getattr(self, name), above=0, most=1)
        checks.whole("the smallest batch", min(self.batches, default=0), 1)
        for runtime in self.runtimes:
            checks.choice("the runtime", runtime, RUNTIMES)


@dataclass(frozen=True)
class Row:
    """One variant of one case: median and quartiles over the repeats."""

    case: str
    network: str  # or tensor shape
    runtime: str  # of `RUNTIMES`, or ""
    batch: int  # images at a time
    variant: str  # what was measured
    baseline: str  # the variant it is compared with
    size: int | None = None  # side of the images, pixels
    width: float | None = None  # factor on the network's channels
    median_ms: float | None = None  # milliseconds per call
    q1_ms: float | None = None
    q3_ms: float | None = None
    speedup: float | None = None  # time of the baseline over time of this, within each repeat
    speedup_q1: float | None = None
    speedup_q3: float | None = None
    macs: float | None = None  # mean multiply-accumulates per image
    reduction: float | None = None  # MACs of the baseline over MACs of this
    peak_mib: float | None = None  # by how much it raises the peak memory of a process of its own
    file_mib: float | None = None  # size of the weights' file
    note: str = ""


def _rows(seconds: Mapping[str, Sequence[float]], row: Row, extra: Columns) -> list[Row]:
    """Rows of one comparison; `row` names what they share, its baseline included."""
    rows = []
    for variant, values in seconds.items():
        ratios = np.divide(seconds[row.baseline], values)
        times, speedups = (np.quantile(v, (0.5, 0.25, 0.75)).tolist() for v in (np.multiply(values, 1000), ratios))
        columns = dict(zip(("median_ms", "q1_ms", "q3_ms"), times, strict=True))
        columns |= dict(zip(("speedup", "speedup_q1", "speedup_q3"), speedups, strict=True))
        rows.append(replace(row, variant=variant, **columns, **extra.get(variant, {})))
    return rows


def _in_runtime(model: nn.Module, example: Tensor, runtime: str, threads: int, folder: str) -> Callable[[Tensor], Any]:
    """A network as a function of a batch, in one of the runtimes; onnxruntime's as `afds export` writes it."""
    if runtime == "onnxruntime":
        file = Path(folder) / "network.onnx"  # which the session reads at once
        batch, channels, height, width = example.shape
        save_onnx(model, file, (channels, height, width), batch=batch, images=example)
        runs_onnx = session(file, threads=threads)
        return lambda images: runs_onnx.run(None, {"image": images.numpy()})
    # By default a second batch size would be compiled for any size, some variants of a comparison and not others.
    call: Callable[[Tensor], Any] = torch.compile(model, dynamic=False) if runtime == "compiled" else model

    def forward(images: Tensor) -> Any:
        with torch.no_grad():
            return call(images)

    if runtime == "compiled":
        # Without freezing, the weights would be packed for the kernels anew in every call: 52 instead of 34 ms for a
        # ResNet-101. As an option of torch.compile it has no effect, so it is set while the first call compiles.
        from torch._inductor import config as inductor  # which only this runtime needs

        with inductor.patch(freezing=True, cpp_wrapper=True):
            forward(example)
    return forward


def compare(models: Mapping[str, nn.Module], settings: Settings, row: Row, extra: Columns, images: Tensor) -> list[Row]:
    """Times networks in eval mode, by variant, in one runtime; those that it refuses become rows with a note.

    Args:
        row: what the rows share: case, network, runtime, batch and the baseline's name.
        images: (N, 3, H, W), N at least the batch; each repeat takes the batch that begins one image later.
    """
    calls: dict[str, Callable[[int], object]] = {}
    refused = []
    if row.runtime == "onnxruntime":
        need("onnxruntime")
    if row.runtime == "compiled":
        torch.compiler.reset()  # what was compiled for another batch size has no say in this one
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            try:
                call = _in_runtime(model, images[: row.batch], row.runtime, settings.threads, folder)
                call(images[: row.batch])
            except Exception as error:  # what an exporter or a compiler cannot do is a result of the comparison
                logging.getLogger(__name__).debug("%s in %s", name, row.runtime, exc_info=True)
                reason = f"{type(error).__name__} {next(iter(str(error).strip().splitlines()), '')[:120]}".strip()
                refused.append(replace(row, variant=name, note=f"not in this runtime: {reason}"))
            else:
                calls[name] = partial(_on_part, call, images, row.batch)
        if row.baseline not in calls:
            return refused
        seconds = interleave(calls, settings.repeats, settings.warmup, before=settings.steady)
        return _rows(seconds, row, extra) + refused


def _on_part(call: Callable[[Tensor], object], images: Tensor, batch: int, repeat: int) -> object:
    first = repeat % (len(images) - batch + 1)
    return call(images[first : first + batch])


def _images(settings: Settings, batch: int) -> Tensor:
    return networks.photographs(max(8, batch + settings.repeats), settings.size, settings.seed + 1)


def _in_all_runtimes(settings: Settings, row: Row, models: Mapping[str, nn.Module], extra: Columns) -> Iterator[Row]:
    """`compare` for all batch sizes and runtimes; only eager runs our own kernel."""
    for batch in settings.batches:
        images = _images(settings, batch)
        for runtime in settings.runtimes:
            own = runtime == "eager"
            suited = {name: model for name, model in models.items() if own or not isinstance(model, DynamicNetwork)}
            yield from compare(suited, settings, replace(row, batch=batch, runtime=runtime), extra, images)


def _plain(settings: Settings, name: str, classes: int = 1000) -> nn.Module:
    return networks.plain_network(name, classes, width=settings.width, seed=settings.seed)


def _gated(settings: Settings, plain: nn.Module) -> nn.Module:
    """Converted, with random gates."""
    gated = afs.convert(plain)
    afs.set_density(gated, settings.density)
    networks.random_gates(gated, networks.photographs(16, settings.size, settings.seed + 2), seed=settings.seed)
    return gated


def _cut(settings: Settings, plain: nn.Module) -> nn.Module:
    """Converted, with random masks and constant gates."""
    gated = afs.convert(plain).eval()
    networks.cut(gated, keep=settings.keep, stream=settings.stream, multiple=settings.multiple, seed=settings.seed)
    return gated


def _masked(settings: Settings) -> Iterator[tuple[str, nn.Module, nn.Module, str]]:
    """Networks to make compact: name, the plain network, the one with masks, and whose masks they are."""
    if settings.weights is not None:
        gated, file = afs.load(settings.weights), Path(settings.weights)
        yield file.stem, networks.rebuilt(gated.architecture), gated, f"masks of {file.name}"  # type: ignore[arg-type]
    for file in map(Path, settings.masks):
        record = read_masks(file)
        plain = networks.rebuilt(record["architecture"])
        gated = afs.convert(plain, gates=record["architecture"].get("gates", "all"))
        set_masks(gated, record["masks"])
        yield file.stem, plain, gated, f"masks of {file.name}"
    if settings.weights is None and not settings.masks:
        kept = f"{settings.keep:g} inner, {settings.stream:g} stream, multiples of {settings.multiple}"
        for name in settings.networks:
            plain = _plain(settings, name)
            yield name, plain, _cut(settings, plain), f"random masks: {kept}"


def _networks(settings: Settings) -> Iterator[Row]:
    """Dense, compact and torch-pruning's network at the same MACs."""
    size = (3, settings.size, settings.size)
    for name, plain, gated, note in _masked(settings):
        width = float(gated.architecture["width"])  # type: ignore[index]
        row = Row("networks", name, "", 0, "", "dense", settings.size, width)
        small = compact(gated.eval(), input_size=size, fold_bn=True)
        dense, reached = macs.count(plain, size).total, macs.count(small, size).total
        if afs.layers(small):  # their channels are all computed, and their predictors besides
            reached += macs.expected(small, [(_images(settings, 1)[:4], torch.zeros(4))]).predictors
        models = {"dense": networks.folded(plain, settings.size), "compact": small}
        extra = {"dense": _saved(dense, dense, **FOLDED), "compact": _saved(dense, reached, note=note)}
        try:
            peer = networks.torch_pruned(plain, settings.size, reached, settings.multiple)
        except AFDSError as error:
            yield replace(row, variant="torch-pruning", note=str(error))
        else:
            note = f"L1, coupled widths, multiples of {settings.multiple}"
            extra["torch-pruning"] = _saved(dense, macs.count(peer, size).total, note=note)
            models["torch-pruning"] = networks.folded(peer, settings.size)
        yield from _in_all_runtimes(settings, row, models, extra)


def _saved(dense: float, count: float, **more: str) -> dict[str, Any]:
    return {"macs": count, "reduction": dense / count, **more}


def _dynamic(settings: Settings) -> Iterator[Row]:
    """Dynamic execution with random gates at density d, selection included, against the dense network.

    It needs our kernel, which other runtimes than eager do not run: there the masked network is measured alone.
    """
    for name in settings.networks:
        plain = _plain(settings, name)
        gated = _gated(settings, plain)
        dense = macs.count(gated, (3, settings.size, settings.size)).total
        images = _images(settings, max(settings.batches))
        count = macs.expected(gated, [(images[:4], torch.zeros(4))]).total
        batches = [images[:batch] for batch in settings.batches]
        network = dynamic(gated, *batches, repeats=min(settings.repeats, 5))
        overlap = networks.jaccard(gated, images[:8])
        note = f"random gates, d {settings.density:g}, Jaccard {overlap:.2f}, runs {network.taken}"
        extra = {"dense": _saved(dense, dense, **FOLDED), "masked": _saved(dense, dense)}
        extra["dynamic"] = _saved(dense, count, note=note)
        models = {"dense": networks.folded(plain, settings.size), "masked": gated, "dynamic": network}
        row = Row("dynamic", name, "", 0, "", "dense", settings.size, settings.width)
        yield from _in_all_runtimes(settings, row, models, extra)


def _gates(settings: Settings) -> Iterator[Row]:
    """What gates cost at density 1, where they save nothing: AFS over the plain network."""
    for name in settings.networks:
        plain = _plain(settings, name)
        gated = _gated(settings, plain)
        afs.set_density(gated, 1.0)
        models = {"plain": networks.folded(plain, settings.size), "AFS": gated, "AFS prepared": inference(gated)}
        extra = {"plain": FOLDED, "AFS prepared": {"note": "statistics folded, masks constant"}}
        row = Row("gates", name, "", 0, "", "plain", settings.size, settings.width)
        yield from _in_all_runtimes(settings, row, models, extra)


def _step(model: nn.Module, source: nn.Module | None, size: int) -> Callable[[Tensor], None]:
    """One training step with SGD on a batch of any images; with a source network it is AFDS's."""
    regulariser = None if source is None else Regulariser("afd", 0.01)
    objective = Objective(model, regulariser, source, (3, size, size))
    objective.place(torch.device("cpu"))
    model.train().to(memory_format=torch.channels_last)
    parameters = [*model.parameters(), *(p for p in objective.parameters() if p.requires_grad)]
    optimiser = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def step(images: Tensor) -> None:
        loss, _, _ = objective(model, images, torch.arange(len(images)) % 10)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def _training(settings: Settings) -> Iterator[Row]:
    """A training step of the plain network, of AFS alone, and of AFDS with the frozen source's forward pass."""
    keep_freed_memory()  # as every training here does, the plain one included
    size, batch = settings.train_size, settings.train_batch
    for name in settings.networks:
        plain = _plain(settings, name, 10)
        gated = afs.convert(plain)
        images = networks.photographs(batch + settings.repeats, size, settings.seed + 1)
        images = images.contiguous(memory_format=torch.channels_last)
        variants: dict[str, tuple[nn.Module, nn.Module | None]]
        variants = {"plain": (plain, None), "AFS": (gated, None), "AFDS": (gated, gated)}
        steps = {variant: _step(copy.deepcopy(model), source, size) for variant, (model, source) in variants.items()}
        calls = {variant: partial(_on_part, step, images, batch) for variant, step in steps.items()}
        row = Row("training", name, "eager", batch, "", "plain", size, settings.width)
        extra = {"AFDS": {"note": "float32, SGD; the source's forward pass included"}}
        yield from _rows(interleave(calls, settings.repeats, settings.warmup), row, extra)


def naive_at(student: Tensor, teacher: Tensor) -> Tensor:
    """AT sample by sample."""
    total = student.new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        a, b = (x.pow(2).mean(0).flatten() for x in (s, t))
        total = total + (a / a.norm() - b / b.norm()).pow(2).mean()
    return total / len(student)


def naive_nst(student: Tensor, teacher: Tensor) -> Tensor:
    """NST as in the popular implementations: the kernel of all pairs of channels from a (B, C, C, HW) tensor."""
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, :, None] * y[:, None]).sum(-1).pow(2).mean()

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def naive_afd(student: Tensor, source: Tensor, attention: nn.Module) -> Tensor:
    """AFD channel by channel, as the formula sums it."""
    rho = attention(source).softmax(1)
    height, width = student.shape[2:]
    total = student.new_zeros(())
    for channel in range(student.shape[1]):
        distance = (student[:, channel] - source[:, channel]).pow(2).sum((1, 2))
        total = total + (rho[:, channel] * distance).mean()
    return student.shape[1] / (2 * height * width) * total


def random_pass(
    loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], few: tuple[slice, ...] = (slice(2),)
) -> Callable[[], None]:
    """Forward and backward pass of a loss on random maps; what the first call of all allocates is spent on `few`."""
    torch.manual_seed(0)
    student, source = torch.rand(shape, requires_grad=True), torch.rand(shape)

    def call(s: Tensor = student, t: Tensor = source) -> None:
        student.grad = None
        loss(s, t).backward()

    call(student[few], source[few])
    student.grad = None
    return call


def nst_peak(kernel: str, shape: tuple[int, ...]) -> float | None:
    """GB that NST adds to two maps at its peak, forward and backward, in a process of its own; None off Linux.

    Args:
        kernel: "poly" (d = 2, c = 0), "linear" or "gaussian".
        shape: (B, C, H, W) of both maps.
    """
    mebibytes = peak(random_pass, partial(nst_loss, kernel=kernel), shape, (slice(1), slice(8)))
    return None if mebibytes is None else mebibytes * 2**20 / 1e9


def _afd(loss: AFDLoss, student: Tensor, source: Tensor) -> Tensor:
    return loss({"map": student}, {"map": source})["afd"]


def _losses(settings: Settings) -> Iterator[Row]:
    """AFD, AT and NST against naive forms: time, and peak memory in processes of their own."""
    shape = (min(8, settings.train_batch), max(8, round(256 * settings.width)), 14, 14)
    afd = AFDLoss({"map": shape[1:]})
    cases: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
        "AFD": {"naive": partial(naive_afd, attention=afd.attentions["map"]), "AFD": partial(_afd, afd)},
        "AT": {"naive": naive_at, "AT": at_loss},
        "NST": {"naive": naive_nst, "NST": nst_loss},
    }
    for name, losses in cases.items():
        passes = {variant: random_pass(loss, shape) for variant, loss in losses.items()}
        seconds = interleave({v: lambda _, call=call: call() for v, call in passes.items()}, settings.repeats)  # type: ignore[misc]
        extra = {variant: {"peak_mib": peak(random_pass, loss, shape)} for variant, loss in losses.items()}
        row = Row("losses", f"{name} on {'x'.join(map(str, shape))}", "eager", shape[0], "", "naive")
        yield from _rows(seconds, row, extra)


def _loading(settings: Settings) -> Iterator[Row]:
    """Reading, decoding and augmenting a batch, against a training step on it."""
    batch, size, name = settings.train_batch, settings.train_size, settings.networks[0]
    random, side = np.random.RandomState(settings.seed), round(1.3 * size)
    rows, labels, classes = np.arange(batch), np.arange(batch) % 10, tuple(map(str, range(10)))
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{i}.jpg" for i in range(batch)]
        for file in files:
            pixels = random.randint(0, 255, (12, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(Path(folder) / file)
        pixels = random.randint(0, 255, (batch, size, size, 3)).astype(np.uint8)
        held = ArrayImages(pixels, rows, labels, classes, augment=True)
        decoded = FileImages(Files(Path(folder), files), rows, labels, classes, size=size, augment=True)
        step, images = _step(_plain(settings, name, 10), None, size), held.__getitems__(list(rows))[0]
        calls: dict[str, Callable[[int], object]] = {
            "training step": lambda _: step(images),
            "from memory": lambda _: held.__getitems__(list(rows)),
            "from JPEG files": lambda _: decoded.__getitems__(list(rows)),
        }
        seconds = interleave(calls, settings.repeats, settings.warmup)
    row = Row("loading", name, "eager", batch, "", "training step", size, settings.width)
    yield from _rows(seconds, row, {"from JPEG files": {"note": f"{side} px files, one process"}})


@torch.no_grad()
def _load_and_run(path: str, size: int, batch: int) -> object:
    return afs.load(path)(torch.zeros(batch, 3, size, size))


def _memory(settings: Settings) -> Iterator[Row]:
    """Peak memory of loading a network and one forward pass, in a process of its own, and the size of its file."""
    for name in settings.networks:
        plain = _plain(settings, name)
        gated = _cut(settings, plain)
        models = {"dense": plain, "masked": gated, "compact": compact(gated, fold_bn=True)}
        row = Row("memory", name, "eager", 0, "", "dense", settings.size, settings.width)
        with tempfile.TemporaryDirectory() as folder:
            for batch in settings.batches:
                for variant, model in models.items():
                    path = Path(folder) / f"{variant}.safetensors"
                    afs.save(model, path)
                    mebibytes = peak(partial, _load_and_run, str(path), settings.size, batch)
                    file = path.stat().st_size / 2**20
                    yield replace(row, batch=batch, variant=variant, peak_mib=mebibytes, file_mib=file)


CASES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "networks": _networks, "dynamic": _dynamic, "gates": _gates, "training": _training, "losses": _losses,
    "loading": _loading, "memory": _memory,
}  # fmt: skip


def run(cases: Sequence[str], settings: Settings, show: Callable[[Row], object] = lambda row: None) -> list[Row]:
    """Measures cases one after the other.

    Args:
        cases: names, of `CASES`.
        settings: what and how.
        show: called with each row as soon as it is there.

    Raises:
        AFDSError: for an unknown case.
    """
    for name in cases:
        checks.choice("the case", name, CASES)
    rows = []
    with on_threads(settings.threads):
        for name in cases:
            for row in CASES[name](settings):
                rows.append(row)
                show(row)
    return rows


def environment(settings: Settings) -> dict[str, str]:
    """Device, threads and versions, for the file and the reader."""
    facts = runs.environment()
    settled = {"threads": settings.threads, "repeats": settings.repeats}
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = {name: installed.get(name, "not installed") for name in PACKAGES}
    all_facts = {"device": facts["cpu"], "cores": facts["cores"]} | settled | versions  # all is measured on the CPU
    return {name: str(value) for name, value in all_facts.items()}


def describe(row: Row) -> str:
    """One line of the terminal."""
    names = [row.case, row.network, row.runtime, f"batch {row.batch}", row.variant]
    facts = [
        row.median_ms and f"{row.median_ms:.2f} ms [{row.q1_ms:.2f}, {row.q3_ms:.2f}]",
        row.median_ms and row.variant != row.baseline and ratio(row), row.size and f"{row.size} px",
        row.reduction and f"MACs {row.reduction:.2f}x fewer", row.peak_mib and f"peak {row.peak_mib:.1f} MiB",
        row.file_mib and f"file {row.file_mib:.1f} MiB", row.note,
    ]  # fmt: skip
    return f"{'  '.join(filter(None, names))}: {', '.join(str(fact) for fact in facts if fact)}"


def ratio(row: Any) -> str:
    """A row's speed-up over its baseline in words, with quartiles; also of a row that was read from a file."""
    if row.speedup >= 1:
        return f"{row.speedup:.2f}x [{row.speedup_q1:.2f}, {row.speedup_q3:.2f}] as fast as {row.baseline}"
    return f"{1 / row.speedup:.2f}x [{1 / row.speedup_q3:.2f}, {1 / row.speedup_q1:.2f}] the time of {row.baseline}"


def to_csv(rows: Sequence[Row], settings: Settings, path: str | Path) -> Path:
    """Writes a tidy CSV, rounded, each row with device, threads and versions; missing values stay empty."""
    digits = {"macs": 0, "median_ms": 4, "q1_ms": 4, "q3_ms": 4}
    columns = [field.name for field in fields(Row)]
    table = pd.DataFrame(list(rows), columns=columns).astype({name: float for name in digits})
    others = {name: 3 for name in table if name not in digits}
    table = table.round(digits | others).assign(**environment(settings))
    with atomic_path(path) as part:
        table.to_csv(part, index=False, lineterminator="\n")
    return Path(path)
