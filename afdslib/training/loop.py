"""One small loop for every training stage: source fine-tuning, transfer, and the tuning between mask updates."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from afdslib import data, runs
from afdslib.afs import macs
from afdslib.afs.graph import eval_mode
from afdslib.afs.layer import AFSConvBN
from afdslib.afs.masks import collect_statistics
from afdslib.base import checks
from afdslib.base.cpu import fast_bf16, safe_gradients
from afdslib.base.errors import AFDSError
from afdslib.training import distributed
from afdslib.training.curve import Curve, Progress, Throttle

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from afdslib.runs import Run
    from afdslib.training.objective import Objective

__all__ = ["Evaluation", "Optimisation", "autocast", "device", "evaluate", "fit", "monitor_gates", "recalibrate"]

_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed", "fp64": "64-true"}


@dataclass(frozen=True)
class Optimisation:
    """How one stage is trained: SGD with momentum and a schedule over a fixed number of steps.

    The schedule "cosine" ends at 0; "step" multiplies the rate by `drop` at `milestone` of each half [code: seed],
    "milestones" at each of `milestones`.
    """

    steps: int  # optimiser steps
    batch_size: int = 48  # images per step
    lr: float = 0.01  # learning rate at the start (after the warm-up)
    momentum: float = 0.9
    nesterov: bool = False
    schedule: str = "step"
    milestone: float = 0.67  # share of each half after which the rate drops
    drop: float = 0.1  # factor of the drop
    second_half: float = 1.0  # factor on the rate of the second half; 0.1 in our reading of the paper [recall]
    warmup: float = 0.0  # share of the steps in which the rate rises linearly from 0
    predictor_lr: float = 1.0  # multiplier on the learning rate of the gates' predictors [ours]
    label_smoothing: float = 0.0  # of the cross-entropy
    precision: str = "fp32"  # or "bf16", "fp16" (by autocast, gates in float32), or "fp64" to compare arithmetic
    channels_last: bool = True  # memory format of images and weights
    log_rows: int = 20  # rows of the learning curve, spread over the stage (at most one per step)
    recalibrate: int = 0  # batches to re-estimate the batch norms' statistics on after each mask update
    milestones: tuple[float, ...] = runs.added(())  # increasing shares of the stage
    # With several processes, whether batch norm normalises by the images of all of them, as one process would; else
    # each by its own, so that the number of processes matters.
    sync_norm: bool = runs.added(True)
    classifier_lr: float = runs.added(1.0)  # multiplier on the learning rate of the classifier
    fixed_norm: bool = runs.added(False)  # whether batch norms keep normalising by their running statistics
    norm_momentum: float = runs.added(0.0)  # share of a batch in these statistics; 0 for the network's own

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("log_rows", 1), ("recalibrate", 0)):
            checks.whole(name, getattr(self, name), least)
        checks.choice("precision", self.precision, _PRECISIONS)
        checks.choice("schedule", self.schedule, ("step", "cosine", "milestones"))
        for name in ("lr", "predictor_lr", "classifier_lr"):
            checks.number(name, getattr(self, name), above=0)
        for name in ("momentum", "warmup", "label_smoothing", "norm_momentum"):
            checks.number(name, getattr(self, name), least=0, below=1)
        for name in ("milestone", "drop", "second_half"):
            checks.number(name, getattr(self, name), least=0, most=1)
        shares = (0.0, *self.milestones, 1.0)
        rising = all(x < y for x, y in itertools.pairwise(shares))
        if bool(self.milestones) != (self.schedule == "milestones") or not rising:
            raise AFDSError(
                f"milestones must be increasing shares between 0 and 1 for the schedule 'milestones' and empty for the "
                f"others, got {self.milestones!r} for {self.schedule!r}"
            )
        if self.nesterov and not self.momentum:
            raise AFDSError("nesterov needs a momentum above 0, such as 0.9")

    def factor(self, step: int) -> float:
        """The learning rate at a step, as a share of `lr`."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))
        if self.schedule == "milestones":
            return self.drop ** sum(step >= round(share * self.steps) for share in self.milestones)
        half = (self.steps + 1) // 2
        within, length = (step, half) if step < half else (step - half, self.steps - half)
        rate = 1.0 if step < half else self.second_half
        return rate * (self.drop if within >= self.milestone * length else 1.0)


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes() -> int:
    """How many processes should train at a time, one thread each: one per core on a CPU, one on a GPU."""
    return 1 if device().type != "cpu" else cores()


@contextmanager
def autocast(where: torch.device, precision: str) -> Iterator[None]:
    """The autocast context of a precision's name."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with fast_bf16(where, precision), torch.autocast(where.type, dtype=dtype, enabled=dtype is not None):
        yield


def workers(dataset: data.ImageDataset) -> int:
    """Loader processes: none for images in memory, else one per core (shared by this machine's processes) up to 8."""
    images = dataset
    while isinstance(images, _Subset):
        images = images.dataset
    return 0 if isinstance(images, data.ArrayImages) else max(1, min(8, cores() // distributed.local_world()))


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a split says."""

    accuracy: float  # share of images whose top class is right
    mean_class_accuracy: float  # mean over classes of the share within the class
    loss: float  # mean cross-entropy, nats
    confusion: list[list[int]]  # images by (true class, predicted class)
    macs: macs.MACs | None  # mean per image, if asked for
    top5_accuracy: float = math.nan  # share of images whose class is among the five top ones (all, of fewer classes)


def evaluate(
    model: nn.Module, dataset: data.ImageDataset, *, batch_size: int = 256, precision: str = "fp32",
    count_macs: bool = False,
) -> Evaluation:  # fmt: skip
    """Accuracy (and the gates' measured MACs) of a network on a split, in eval mode; the mode is restored.

    Several processes evaluate a part each, and all get the whole result; MACs are measured by one process alone.
    """
    where, classes = next(model.parameters()).device, len(dataset.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    loss, near = 0.0, 0
    part: Any = dataset
    if distributed.world() > 1:
        if count_macs:
            raise AFDSError("MACs are not counted by several processes; evaluate in one")
        part = _Subset(dataset, range(distributed.rank(), len(dataset), distributed.world()))
    meter = macs.Meter(model) if count_macs else None
    with eval_mode(model), torch.no_grad(), autocast(where, precision), meter or nullcontext():
        for images, labels in data.loader(part, batch_size, workers=workers(dataset)):
            logits = model(_to(images, where, Optimisation(0, precision=precision))).float().cpu()
            near += int((logits.topk(min(5, classes)).indices == labels[:, None]).sum())
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            pairs = labels * classes + logits.argmax(1)
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    confusion = distributed.total(confusion)
    loss, near = distributed.total(torch.tensor([loss, near], dtype=torch.float64)).tolist()
    count, right, seen = int(confusion.sum()), confusion.diag(), confusion.sum(1)
    if not count:
        raise AFDSError("the split to evaluate has no image")
    return Evaluation(
        accuracy=float(right.sum()) / count, mean_class_accuracy=float((right / seen)[seen > 0].mean()),
        loss=loss / count, confusion=confusion.tolist(), macs=meter.macs() if meter else None,
        top5_accuracy=near / count,
    )  # fmt: skip


def monitor_gates(model: nn.Module, dataset: data.ImageDataset, *, images: int = 128) -> dict[str, float]:
    """Two warning signs over living dynamic channels and some training images; empty for a network without gates.

    "dead_gates": share of the channels that no image computes. "gate_variance": their mean of Var[pi] / E[eta]^2, the
    squared coefficient of variation that delta_s is compared with.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AFSConvBN)}
    if not layers:
        return {}
    subset = first(dataset, images)
    statistics = collect_statistics(model, data.loader(subset, len(subset)))
    dead, variation = [], []
    for name, layer in layers.items():
        dynamic, s = (layer.m * layer.s).bool().cpu(), statistics[name]
        dead.append((s.active_rate == 0)[dynamic].double())
        variation.append((s.p / s.q.square().clamp_min(1e-12))[dynamic & (s.q > 0)])
    known = {"dead_gates": torch.cat(dead), "gate_variance": torch.cat(variation)}
    return {name: float(values.mean()) if len(values) else 0.0 for name, values in known.items()}


class _Subset(torch.utils.data.Subset):
    """Images of a split at some positions."""

    def __init__(self, dataset: Any, positions: Any):
        super().__init__(dataset, positions)
        self.classes, self.size = dataset.classes, dataset.size


def first(dataset: data.ImageDataset, images: int, *, shuffle: int | None = None) -> Any:
    """A fixed subset of a split: at most `images`, evenly spaced, so that every class is among them.

    They are in the split's own order, or in a random one by the seed `shuffle`.
    """
    count = min(images, len(dataset))
    positions = [i * len(dataset) // count for i in range(count)]
    if shuffle is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(shuffle))
        positions = [positions[i] for i in order.tolist()]
    return _Subset(dataset, positions)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], precision: str = "fp32") -> None:
    """Re-estimates every batch norm's running statistics as plain averages over some training batches."""
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    where = next(model.parameters()).device
    with eval_mode(model), autocast(where, precision):  # which gives every module its own mode back
        model.train()
        try:
            for norm in momenta:
                norm.reset_running_stats()
                norm.momentum = None
            for images, _ in batches:
                model(_to(images, where))
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum


def _to(images: Tensor, where: torch.device, settings: Optimisation | None = None) -> Tensor:
    """Images on the device in the type and memory format of a stage; default: float32, channels last."""
    images = images.to(where, non_blocking=True)
    images = images.double() if settings and settings.precision == "fp64" else images
    return images.contiguous(memory_format=torch.channels_last) if not settings or settings.channels_last else images


def _batches(dataset: data.ImageDataset, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches: a permutation of (seed, epoch) alone. A last, smaller batch is left out if others exist."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


def batches_from(
    dataset: data.ImageDataset, batch_size: int, seed: int, step: int
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Endless (epoch, batch) from a step on, a function of seed and step alone; of several processes each its share."""
    per_epoch = len(_batches(dataset, batch_size, seed, 0))
    epoch, position = divmod(step, per_epoch)
    while True:
        dataset.set_epoch(epoch)
        todo = [distributed.share(batch) for batch in _batches(dataset, batch_size, seed, epoch)[position:]]
        # With a generator of its own a loader draws nothing from torch's, which a resumed run would draw twice.
        own = {"num_workers": workers(dataset), "generator": torch.Generator()}
        for batch in DataLoader(dataset, batch_sampler=todo, collate_fn=data.collate, **own):  # type: ignore[arg-type]
            yield epoch, batch
        epoch, position = epoch + 1, 0


def first_batches(
    dataset: data.ImageDataset, batch_size: int, seed: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first training batches of a seed, augmented, for what is fitted beside the steps of a stage."""
    # A copy: setting its epoch must not change the augmentation of a stage that goes on.
    stream = batches_from(copy.copy(dataset), batch_size, seed, 0)
    return (batch for _, batch in itertools.islice(stream, count))


def _groups(model: nn.Module, objective: Objective, settings: Optimisation) -> list[dict[str, Any]]:
    """Parameter groups: backbone, classifier, predictors (own rate), and what the objective learns (no decay)."""
    kinds = {id(p): "predictors" for m in model.modules() if isinstance(m, AFSConvBN) for p in m.predictor.parameters()}
    kinds |= {id(p): "classifier" for p in objective.classifier(model).parameters()}
    groups: dict[str, list[nn.Parameter]] = {"backbone": [], "classifier": [], "predictors": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[kinds.get(id(parameter), "backbone")].append(parameter)
    groups["objective"] = [p for p in objective.parameters() if p.requires_grad]
    decays = {"classifier": objective.classifier_decay, "objective": 0.0}
    made = []
    for name, params in groups.items():
        scale = {"predictors": settings.predictor_lr, "classifier": settings.classifier_lr}.get(name, 1.0)
        decay = decays.get(name, objective.weight_decay)
        made.append({"params": params, "lr": settings.lr * scale, "scale": scale, "weight_decay": decay, "name": name})
    return [group for group in made if group["params"]]


def _set_up(model: nn.Module, objective: Objective, settings: Optimisation, seed: int) -> tuple[Fabric, nn.Module, Any]:
    """Network, objective and a new optimiser on the device of this process; torch's generator at the seed."""
    fabric = distributed.fabric(_PRECISIONS[settings.precision])
    where, dtype = fabric.device, torch.float64 if settings.precision == "fp64" else None
    torch.manual_seed(seed)
    if settings.precision == "fp16" and where.type == "cpu":
        raise AFDSError("precision 'fp16' needs a GPU; use bf16 or fp32 on this CPU")
    if distributed.world() > 1 and not objective.calls_wrapper:
        raise AFDSError("the objective differentiates the network twice, which several processes cannot share; use one")
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    model.to(device=where, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    objective.place(where, dtype)
    optimiser = torch.optim.SGD(
        _groups(model, objective, settings), lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov
    )
    return fabric, *fabric.setup(model, optimiser)


@torch.enable_grad()  # a notebook's look at a network may be what computes the run
def fit(
    model: nn.Module, dataset: data.ImageDataset, objective: Objective, settings: Optimisation, run: Run, *, seed: int,
    monitor: data.ImageDataset | None = None, events: Mapping[int, Callable[[], Mapping[str, float]]] | None = None,
    evaluation: Callable[[], Mapping[str, float]] | None = None, label: str = "",
) -> nn.Module:  # fmt: skip
    """Trains a network in place and returns it, resuming from the run's checkpoint if there is one.

    Every process that a launcher started calls it: each takes its share of every batch, and the first writes.

    Args:
        model: moved to the accelerator if there is one.
        dataset: the fitting images, with augmentation.
        objective: the loss, its named terms, and the decay of each parameter group.
        settings: optimiser, schedule, precision.
        run: where checkpoints and the learning curve go.
        seed: of data order, augmentation, and torch's generator during the stage.
        monitor: training images under the test-time transform, for the gates' warning signs.
        events: called before the step of their key, for instance a mask update, and logged.
        evaluation: called for each row of the learning curve, and logged.
        label: for the progress display.

    Raises:
        DivergedError: the loss is not finite; it names step and term, and nothing of that step is saved.
    """
    fabric, wrapped, optimiser = _set_up(model, objective, settings, seed)
    # A run that was interrupted goes on from its last checkpoint.
    parts = {"model": model, "objective": objective, "optimiser": optimiser, "scaler": fabric.strategy.precision}
    step = _resume(run, parts, model, objective)
    per_epoch = len(_batches(dataset, settings.batch_size, seed, 0))
    rows = {round((i + 1) * settings.steps / settings.log_rows) for i in range(settings.log_rows)} | {settings.steps}
    progress = Progress(label or run.id, settings.steps, step, silent=distributed.rank() > 0)
    curve, checkpoints, stream = Curve(), Throttle(30), batches_from(dataset, settings.batch_size, seed, step)
    _train_mode(model, settings)
    while step < settings.steps:
        # What is to happen before this step, such as a mask update.
        if step in (events or {}):
            curve.happened.update(events[step]())  # type: ignore[index]
            _train_mode(model, settings)
        # The learning rate of this step.
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * group["scale"] * settings.factor(step)
        # The next batch: a function of seed and step alone.
        images, labels = next(stream)[1]
        images, labels = _to(images, fabric.device, settings), labels.to(fabric.device, non_blocking=True)
        # The loss and its terms.
        with _forward(fabric, model, settings, step):
            loss, terms, logits = objective(wrapped, images, labels, step)
        # Its gradient, and one step against it.
        optimiser.zero_grad()
        fabric.backward(loss)
        distributed.average_gradients(objective.parameters())  # unknown to the wrapper
        optimiser.step()
        step += 1
        # The learning curve. On a GPU, looking at the loss waits for it, so it is looked at every 50 steps.
        curve.add(loss, terms, logits, labels)
        if fabric.device.type == "cpu" or curve.unseen >= 50 or step in rows:
            curve.refuse_non_finite(step, optimiser.param_groups[0]["lr"])
        if step in rows:
            row = {"step": step, "epoch": step / per_epoch, "lr": settings.lr * settings.factor(step - 1)}
            row |= curve.means() | objective.diagnostics(model) | curve.happened
            row |= {} if monitor is None else monitor_gates(model, monitor)
            row |= evaluation() if evaluation else {}
            run.log(row)
            progress.row(row)
            curve = Curve()
            _train_mode(model, settings)
            # Only here, where no partial sums are pending, does a resumed run log the same rows.
            if step < settings.steps and checkpoints.due():
                _save(run, step, parts)
        progress.step(step)
    progress.close()
    return model


def _train_mode(model: nn.Module, settings: Optimisation) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(not settings.fixed_norm)
            module.momentum = settings.norm_momentum or module.momentum


@contextmanager
def _forward(fabric: Fabric, model: nn.Module, settings: Optimisation, step: int) -> Iterator[None]:
    """A block for the pass of a step: its precision, the batch norms of all processes, and errors that name it."""
    half, safe = fast_bf16(fabric.device, settings.precision), safe_gradients(model, fabric.device)
    try:
        with safe, half, fabric.autocast(), distributed.synchronised_norms(model, settings.sync_norm):
            yield
    except AFDSError as error:  # a term that refuses its input does not know the step
        raise type(error)(f"the loss cannot be computed at step {step + 1}: {error}") from error


def _save(run: Run, step: int, parts: Mapping[str, Any]) -> None:
    """Writes the checkpoint that `_resume` reads."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    run.save_checkpoint({"step": step, **{name: part.state_dict() for name, part in parts.items()}, "rng": rng})


def _resume(run: Run, parts: Mapping[str, Any], model: nn.Module, objective: Objective) -> int:
    """Puts a run's checkpoint, if there is one, into its parts and torch's generators; returns its step."""
    state = run.load_checkpoint()
    if state is None:
        return 0
    with run.restoring():
        for name, part in parts.items():
            part.load_state_dict(state[name])
    objective.masks_changed(model)
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"]["cuda"])
    run.truncate_log(state["step"])
    return state["step"]
