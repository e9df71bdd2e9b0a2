"""`afds bench`: measured time of networks, training steps, losses and data loading, side by side in one run.

Every case measures its variants in turn, repeat by repeat, on a fixed number of threads and after a warm-up; networks
see another image each repeat, after some calls that are not timed. A ratio is the median over repeats of the ratio
within a repeat, so that what else the machine does falls on both sides. Networks have random weights unless a file is
given: their time does not depend on the weights, apart from gates, which `random_gates` makes depend on the image.
[ours]
"""

from __future__ import annotations

import copy
import csv
import importlib.metadata
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from afdslib import afs, runs
from afdslib.afs import macs
from afdslib.afs.compact import compact, set_masks
from afdslib.afs.io import read_masks
from afdslib.base.atomic import write_text
from afdslib.base.cpu import keep_freed_memory
from afdslib.base.errors import AFDSError
from afdslib.data.datasets import ArrayImages, FileImages, Files
from afdslib.inference import dynamic, naive, networks
from afdslib.inference.export import need, save_onnx, session
from afdslib.inference.gates import inference
from afdslib.inference.timing import interleave, on_threads, peak, quartiles
from afdslib.training.objective import Objective, Regulariser

__all__ = [
    "CASES", "RUNTIMES", "Row", "Settings", "compare", "describe", "environment", "interleave", "nst_peak",
    "on_threads", "ratio", "run", "table", "to_csv",
]  # fmt: skip

RUNTIMES = ("eager", "compiled", "onnxruntime")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        networks: backbones, with the stem for photographs.
        batches: images at a time.
        runtimes: of `RUNTIMES`.
        size: side of the images, pixels.
        threads: of torch and of onnxruntime.
        repeats: measured rounds.
        warmup: rounds before them.
        steady: seconds of untimed calls before each timed one of a network. Idle threads of onnxruntime spin for about
            0.1 s: beside two other sessions a pruned ResNet-101 took 17 to 30 ms per image instead of 9.
        keep: share of the inner channels that the compact network keeps.
        stream: share of the residual streams' channels that it keeps.
        multiple: kept channels are rounded to a multiple.
        density: d of the dynamic case.
        weights: a file of `afs.save` whose own masks make the compact network, instead of random ones.
        masks: of `afds publish --part speed`, one network each; the weights are then random.
        train_size: side of the images of training steps.
        train_batch: images per training step.
        width: factor on the channels, for quick looks.
        seed: of weights, masks, gates and images.
    """

    networks: tuple[str, ...] = ("resnet50",)
    batches: tuple[int, ...] = (1,)
    runtimes: tuple[str, ...] = ("eager",)
    size: int = 224
    threads: int = 1
    repeats: int = 5
    warmup: int = 1
    steady: float = 0.2
    keep: float = 0.2
    stream: float = 0.75
    multiple: int = 16
    density: float = 0.3
    weights: str | None = None
    masks: tuple[str, ...] = ()
    train_size: int = 64
    train_batch: int = 16
    width: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "threads", "repeats", "multiple", "train_size", "train_batch"):
            if getattr(self, name) < 1:
                raise AFDSError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("keep", "stream", "density"):
            if not 0 < getattr(self, name) <= 1:
                raise AFDSError(f"{name} must be in (0, 1], got {getattr(self, name):g}")
        if min(self.batches, default=0) < 1:
            raise AFDSError(f"the batch sizes must be at least 1, got {self.batches}")
        for runtime in self.runtimes:
            if runtime not in RUNTIMES:
                raise AFDSError(f"unknown runtime {runtime!r}; known are {', '.join(RUNTIMES)}")


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    Attributes:
        case: name of the case.
        network: or tensor shape.
        runtime: of `RUNTIMES`, or "" where it does not apply.
        batch: images at a time.
        variant: what was measured.
        baseline: the variant it is compared with.
        size: side of the images, pixels, where there are any.
        width: factor on the network's channels.
        median_ms, q1_ms, q3_ms: milliseconds per call: median and quartiles over the repeats.
        speedup, speedup_q1, speedup_q3: time of the baseline over time of this, within each repeat.
        macs: mean multiply-accumulates per image, where they are known.
        reduction: MACs of the baseline over MACs of this.
        peak_mib: by how much it raises the peak memory of a process of its own.
        file_mib: size of the weights' file.
        note: whatever else a reader has to know.
    """

    case: str
    network: str
    runtime: str
    batch: int
    variant: str
    baseline: str
    size: int | None = None
    width: float | None = None
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    speedup: float | None = None
    speedup_q1: float | None = None
    speedup_q3: float | None = None
    macs: float | None = None
    reduction: float | None = None
    peak_mib: float | None = None
    file_mib: float | None = None
    note: str = ""


# ------------------------------------------------------------------------------------------------- rows and runtimes


def _rows(seconds: Mapping[str, Sequence[float]], row: Row, extra: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Rows of one comparison; `row` names what they share, its baseline included."""
    rows = []
    for variant, values in seconds.items():
        median, first, third = (1000 * v for v in quartiles(values))
        ratio, low, high = quartiles([b / v for b, v in zip(seconds[row.baseline], values, strict=True)])
        rows.append(
            replace(
                row, variant=variant, median_ms=median, q1_ms=first, q3_ms=third, speedup=ratio, speedup_q1=low,
                speedup_q3=high, **extra.get(variant, {}),
            )
        )  # fmt: skip
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


def compare(
    models: Mapping[str, nn.Module],
    settings: Settings,
    row: Row,
    extra: Mapping[str, Mapping[str, Any]],
    images: Tensor,
) -> list[Row]:
    """Times networks in one runtime, a different batch each repeat; those that it refuses become rows with a note.

    Args:
        models: by variant, in eval mode.
        settings: threads, repeats and warm-up.
        row: what the rows share: case, network, runtime, batch and the baseline's name.
        extra: further columns by variant.
        images: (N, 3, H, W), N at least the batch; each repeat takes the batch that begins one image later.
    """
    batch = row.batch
    calls: dict[str, Callable[[int], object]] = {}
    refused = []
    if row.runtime == "onnxruntime":
        need("onnxruntime")
    if row.runtime == "compiled":
        torch.compiler.reset()  # what was compiled for another batch size has no say in this one
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            try:
                call = _in_runtime(model, images[:batch], row.runtime, settings.threads, folder)
                call(images[:batch])
            except Exception as error:  # what an exporter or a compiler cannot do is a result of the comparison
                logging.getLogger(__name__).debug("%s in %s", name, row.runtime, exc_info=True)
                said = (str(error).strip().splitlines() or [""])[0][:120]
                why = f"not in this runtime: {type(error).__name__} {said}".strip()
                refused.append(replace(row, variant=name, note=why))
                continue

            def timed(repeat: int, call: Callable[[Tensor], Any] = call) -> object:
                first = repeat % (len(images) - batch + 1)
                return call(images[first : first + batch])

            calls[name] = timed
        if row.baseline not in calls:
            return refused
        seconds = interleave(calls, settings.repeats, settings.warmup, before=settings.steady)
        return _rows(seconds, row, extra) + refused


def _images(settings: Settings, batch: int) -> Tensor:
    return networks.photographs(max(8, batch + settings.repeats), settings.size, settings.seed + 1)


def _in_all_runtimes(
    settings: Settings, row: Row, models: Mapping[str, nn.Module], extra: Mapping[str, Mapping[str, Any]]
) -> Iterator[Row]:
    for batch in settings.batches:
        images = _images(settings, batch)
        for runtime in settings.runtimes:
            yield from compare(models, settings, replace(row, batch=batch, runtime=runtime), extra, images)


def _gated(settings: Settings, name: str) -> tuple[nn.Module, nn.Module]:
    """(plain, converted with random gates); the time of the plain network does not depend on its statistics."""
    plain = networks.plain_network(name, width=settings.width, seed=settings.seed)
    gated = afs.convert(plain)
    afs.set_density(gated, settings.density)
    networks.random_gates(gated, networks.photographs(16, settings.size, settings.seed + 2), seed=settings.seed)
    return plain, gated


def _cut(settings: Settings, name: str) -> tuple[nn.Module, nn.Module]:
    """(plain, converted with random masks and constant gates)."""
    plain = networks.plain_network(name, width=settings.width, seed=settings.seed)
    gated = afs.convert(plain).eval()
    networks.cut(gated, keep=settings.keep, stream=settings.stream, multiple=settings.multiple, seed=settings.seed)
    return plain, gated


# --------------------------------------------------------------------------------------------------------------- cases


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
            yield name, *_cut(settings, name), f"random masks: {kept}"


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
        extra: dict[str, dict[str, Any]] = {
            "dense": {"macs": dense, "reduction": 1.0, "note": "batch norm folded"},
            "compact": {"macs": reached, "reduction": dense / reached, "note": note},
        }
        try:
            peer = networks.torch_pruned(plain, settings.size, reached, settings.multiple)
        except AFDSError as error:
            yield replace(row, variant="torch-pruning", note=str(error))
        else:
            count = macs.count(peer, size).total
            text = f"L1, coupled widths, multiples of {settings.multiple}"
            models["torch-pruning"] = networks.folded(peer, settings.size)
            extra["torch-pruning"] = {"macs": count, "reduction": dense / count, "note": text}
        yield from _in_all_runtimes(settings, row, models, extra)


def _dynamic(settings: Settings) -> Iterator[Row]:
    """Dynamic execution with random gates at density d, selection included, against the dense network.

    It needs our kernel, which other runtimes than eager do not run: there the masked network is measured alone.
    """
    for name in settings.networks:
        plain, gated = _gated(settings, name)
        dense = macs.count(gated, (3, settings.size, settings.size)).total
        for batch in settings.batches:
            images = _images(settings, batch)
            overlap = networks.jaccard(gated, images[: min(8, len(images))])
            # Where rounding decides on a channel, either choice is right, and everything behind it differs.
            closest = torch.tensor(dynamic.margins(gated, images))
            images = images[closest.argsort(descending=True, stable=True)]
            clear = images[: max(1, int((closest > dynamic.ROUNDING).sum()) // batch) * batch]
            count = macs.expected(gated, [(images[:4], torch.zeros(4))])
            network = dynamic.dynamic(gated, images[:batch], repeats=min(settings.repeats, 5))
            with torch.no_grad():
                expected = torch.cat([gated(part) for part in clear.split(batch)])
            outputs = torch.cat([network(part) for part in clear.split(batch)])
            difference = float((expected - outputs).abs().max() / expected.abs().max())
            note = (
                f"random gates, d {settings.density:g}, Jaccard {overlap:.2f}, runs {network.taken[batch]!r}, "
                f"max difference to masked {difference:.1e} on {len(clear)} images"
            )
            extra: dict[str, dict[str, Any]] = {
                "dense": {"macs": dense, "reduction": 1.0, "note": "batch norm folded"},
                "masked": {"macs": dense, "reduction": 1.0},
                "dynamic": {"macs": count.total, "reduction": dense / count.total, "note": note},
            }
            for runtime in settings.runtimes:
                models = {"dense": networks.folded(plain, settings.size), "masked": gated}
                row = Row("dynamic", name, runtime, batch, "", "dense", settings.size, settings.width)
                models |= {"dynamic": network} if runtime == "eager" else {}
                yield from compare(models, settings, row, extra, images)


def _gates(settings: Settings) -> Iterator[Row]:
    """What gates cost at density 1, where they save nothing: AFS over the plain network."""
    for name in settings.networks:
        plain, gated = _gated(settings, name)
        afs.set_density(gated, 1.0)
        models = {"plain": networks.folded(plain, settings.size), "AFS": gated, "AFS prepared": inference(gated)}
        extra = {"plain": {"note": "batch norm folded"}, "AFS prepared": {"note": "statistics folded, masks constant"}}
        row = Row("gates", name, "", 0, "", "plain", settings.size, settings.width)
        yield from _in_all_runtimes(settings, row, models, extra)


def _step(model: nn.Module, source: nn.Module | None, size: int) -> Callable[[Tensor, Tensor], None]:
    """One training step with SGD; with a source network it is AFDS's."""
    regulariser = None if source is None else Regulariser("afd", 0.01)
    objective = Objective(model, regulariser, source, (3, size, size))
    objective.place(torch.device("cpu"))
    model.train().to(memory_format=torch.channels_last)
    parameters = [*model.parameters(), *(p for p in objective.parameters() if p.requires_grad)]
    optimiser = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def step(images: Tensor, labels: Tensor) -> None:
        loss, _, _ = objective(model, images, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def _training(settings: Settings) -> Iterator[Row]:
    """A training step of the plain network, of AFS alone, and of AFDS with the frozen source's forward pass."""
    keep_freed_memory()  # as every training here does, the plain one included
    size, batch = settings.train_size, settings.train_batch
    for name in settings.networks:
        plain = networks.plain_network(name, 10, width=settings.width, seed=settings.seed)
        gated = afs.convert(plain)
        steps = {
            "plain": _step(copy.deepcopy(plain), None, size),
            "AFS": _step(copy.deepcopy(gated), None, size),
            "AFDS": _step(copy.deepcopy(gated), gated, size),
        }
        images = networks.photographs(batch + settings.repeats, size, settings.seed + 1)
        images = images.contiguous(memory_format=torch.channels_last)

        def timed(step: Callable[[Tensor, Tensor], None], images: Tensor, repeat: int) -> None:
            first = max(0, repeat)
            step(images[first : first + batch], torch.arange(batch) % 10)

        calls = {variant: partial(timed, step, images) for variant, step in steps.items()}
        row = Row("training", name, "eager", batch, "", "plain", size, settings.width)
        note = {"note": "float32, SGD; the source's forward pass included"}
        yield from _rows(interleave(calls, settings.repeats, settings.warmup), row, {"AFDS": note})


def nst_peak(kernel: str, shape: tuple[int, ...]) -> float | None:
    """GB that NST adds to two maps at its peak, forward and backward, in a process of its own; None off Linux.

    Args:
        kernel: "poly" (d = 2, c = 0), "linear" or "gaussian".
        shape: (B, C, H, W) of both maps.
    """
    mebibytes = peak(naive.nst_pass, kernel, shape)
    return None if mebibytes is None else mebibytes * 2**20 / 1e9


def _each_round(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda _: call()


def _losses(settings: Settings) -> Iterator[Row]:
    """AFD, AT and NST against naive forms: time, and peak memory in processes of their own."""
    channels = max(8, round(256 * settings.width))
    shape = (min(8, settings.train_batch), channels, 14, 14)
    for name in ("AFD", "AT", "NST"):
        variants = {variant: (name, variant == "naive", shape) for variant in ("naive", name)}
        calls = {variant: _each_round(naive.loss_pass(*arguments)) for variant, arguments in variants.items()}
        extra = {variant: {"peak_mib": peak(naive.loss_pass, *arguments)} for variant, arguments in variants.items()}
        row = Row("losses", f"{name} on {'x'.join(map(str, shape))}", "eager", shape[0], "", "naive")
        yield from _rows(interleave(calls, settings.repeats), row, extra)


def _loading(settings: Settings) -> Iterator[Row]:
    """Reading, decoding and augmenting a batch, against a training step on it."""
    batch, size, name = settings.train_batch, settings.train_size, settings.networks[0]
    random = np.random.RandomState(settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        side = round(1.3 * size)
        files = [f"{i}.jpg" for i in range(batch)]
        for file in files:
            pixels = random.randint(0, 255, (12, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(Path(folder) / file)
        rows, labels = np.arange(batch), np.arange(batch) % 10
        classes = tuple(map(str, range(10)))
        decoded = FileImages(Files(Path(folder), files), rows, labels, classes, size=size, augment=True)
        pixels = random.randint(0, 255, (batch, size, size, 3)).astype(np.uint8)
        held = ArrayImages(pixels, rows, labels, classes, augment=True)
        step = _step(networks.plain_network(name, 10, width=settings.width, seed=settings.seed), None, size)
        images = held.__getitems__(list(rows))
        calls: dict[str, Callable[[int], object]] = {
            "training step": lambda _: step(*images),
            "from memory": lambda _: held.__getitems__(list(rows)),
            "from JPEG files": lambda _: decoded.__getitems__(list(rows)),
        }
        seconds = interleave(calls, settings.repeats, settings.warmup)
        extra = {"from JPEG files": {"note": f"{side} px files, one process"}}
        yield from _rows(
            seconds, Row("loading", name, "eager", batch, "", "training step", size, settings.width), extra=extra
        )


def _loaded(path: str, size: int, batch: int) -> Callable[[], object]:
    """A forward pass of a saved network; measured with the loading of the file."""

    def forward() -> object:
        with torch.no_grad():
            return afs.load(path)(torch.zeros(batch, 3, size, size))

    return forward


def _memory(settings: Settings) -> Iterator[Row]:
    """Peak memory of loading a network and one forward pass, in a process of its own, and the size of its file."""
    for name in settings.networks:
        plain, gated = _cut(settings, name)
        models = {"dense": plain, "masked": gated, "compact": compact(gated, fold_bn=True)}
        with tempfile.TemporaryDirectory() as folder:
            for batch in settings.batches:
                for variant, model in models.items():
                    path = Path(folder) / f"{variant}.safetensors"
                    afs.save(model, path)
                    yield Row(
                        "memory", name, "eager", batch, variant, "dense", settings.size, settings.width,
                        peak_mib=peak(_loaded, str(path), settings.size, batch),
                        file_mib=path.stat().st_size / 2**20,
                    )  # fmt: skip


CASES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "networks": _networks,
    "dynamic": _dynamic,
    "gates": _gates,
    "training": _training,
    "losses": _losses,
    "loading": _loading,
    "memory": _memory,
}


# -------------------------------------------------------------------------------------------------------------- output


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
        if name not in CASES:
            raise AFDSError(f"unknown case {name!r}; known are {', '.join(CASES)}")
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
    versions = {"torch": facts["versions"]["torch"], "afdslib": facts["versions"]["afdslib"]}
    for package in ("onnxruntime", "torch-pruning"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    settled = {"threads": str(settings.threads), "repeats": str(settings.repeats)}
    return {"device": facts["cpu"], "cores": str(facts["cores"]), **settled, **versions}  # all is measured on the CPU


def describe(row: Row) -> str:
    """One line of the terminal."""
    parts = [row.case, row.network, row.runtime, f"batch {row.batch}", row.variant]
    text = "  ".join(part for part in parts if part)
    if row.median_ms is not None and row.speedup is not None:
        text += f": {row.median_ms:.2f} ms [{row.q1_ms:.2f}, {row.q3_ms:.2f}]"
        if row.variant != row.baseline:
            text += f", {ratio(row)}"
    if row.size is not None:
        text += f" at {row.size} px"
    if row.reduction is not None:
        text += f", MACs {row.reduction:.2f}x fewer"
    if row.peak_mib is not None:
        text += f", peak {row.peak_mib:.1f} MiB"
    if row.file_mib is not None:
        text += f", file {row.file_mib:.1f} MiB"
    return text + (f" ({row.note})" if row.note else "")


def ratio(row: Any) -> str:
    """A row's speed-up over its baseline in words, with quartiles; also of a row that was read from a file."""
    if row.speedup >= 1:
        return f"{row.speedup:.2f}x [{row.speedup_q1:.2f}, {row.speedup_q3:.2f}] as fast as {row.baseline}"
    return f"{1 / row.speedup:.2f}x [{1 / row.speedup_q3:.2f}, {1 / row.speedup_q1:.2f}] the time of {row.baseline}"


def table(rows: Sequence[Row], settings: Settings) -> list[dict[str, Any]]:
    """Rows as dictionaries, rounded, each with device, threads and versions."""
    digits, shared = {"macs": 0, "median_ms": 4, "q1_ms": 4, "q3_ms": 4}, environment(settings)

    def rounded(name: str, value: Any) -> Any:
        return round(value, digits.get(name, 3)) if isinstance(value, float) else value

    return [{name: rounded(name, value) for name, value in vars(row).items()} | shared for row in rows]


def to_csv(rows: Sequence[Row], settings: Settings, path: str | Path) -> Path:
    """Writes a tidy CSV, atomically; missing values stay empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)] + list(environment(settings)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table(rows, settings))
    write_text(Path(path), text.getvalue())
    return Path(path)
