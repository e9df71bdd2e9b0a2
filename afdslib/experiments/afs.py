"""The runs of the study: each is a frozen configuration that knows how to compute itself, and names the runs it needs.

SourceRun -> AFSSourceRun -> TransferRun (the unpruned point) -> TransferRun (the next budget) -> ...
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from afdslib import afs, backbones, data, runs, training
from afdslib.afs import macs
from afdslib.afs.compact import compact
from afdslib.afs.graph import eval_mode
from afdslib.base.errors import AFDSError, DivergedError, UnreachableError
from afdslib.data import Splits
from afdslib.training import Optimisation
from afdslib.training.objective import Objective, Regulariser

__all__ = ["MODEL", "AFSSourceRun", "DataSource", "Network", "SourceRun", "TransferRun"]

MODEL, OBJECTIVE = "model.safetensors", "objective.safetensors"
PUBLISHED_CLASSES = 1000  # ImageNet's


@dataclass(frozen=True)
class DataSource:
    """A data set, how it is split and augmented; see `data.load`. The folder it lies in and whether corrupt images
    may be left out are recorded, not hashed.

    `content` is a hash of a tree's images, so that a tree that was changed is another data set.
    """

    name: str
    per_class: int | None = None
    seed: int = 0
    size: int | None = None
    root: str = runs.unhashed("")
    padding: str = runs.added("constant")
    sharpness: float = runs.added(0.0)
    content: str = runs.added("")
    skip_corrupt: bool = runs.unhashed(False)

    @property
    def title(self) -> str:
        """Its name in tables and figures: cifar10-60 is CIFAR-10 with 60 fitting images per class."""
        name = Path(self.name).name
        return name if self.per_class is None else f"{name}-{self.per_class}"

    def load(self) -> Splits:
        return data.load(
            self.name, self.root or None, per_class=self.per_class, seed=self.seed, size=self.size,
            padding=self.padding, sharpness=self.sharpness, skip_corrupt=self.skip_corrupt,
        )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A backbone; see `backbones.build`.

    Attributes:
        name, stem, width, weights: its arguments.
        zero_init: whether the residual branches of a random ResNet start at zero, by the last batch norm of each block
            (torchvision's zero_init_residual; Goyal et al. 2017). Without it, the gradient of a ResNet-101 at 64 px had
            a norm of 772 at the first step, and 120 steps taught it nothing. [ours]
    """

    name: str
    stem: str = "imagenet"
    width: float = 1.0
    weights: str | None = None
    zero_init: bool = runs.added(False)

    def build(self, num_classes: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = backbones.build(self.name, num_classes, weights=self.weights, stem=self.stem, width=self.width)
        if self.zero_init and self.weights is None:
            for block in model.modules():
                if isinstance(block, (Bottleneck, BasicBlock)):
                    nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)
        return model


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_budgets(budgets: tuple[float, ...]) -> None:
    """Refuses budgets that do not decrease from 1, or leave (0, 1]."""
    numbers = bool(budgets) and all(_is_number(b) and 0 < b <= 1 for b in budgets) and budgets[0] == 1
    if not numbers or any(x <= y for x, y in zip(budgets, budgets[1:], strict=False)):
        raise AFDSError(f"budgets must decrease from 1 and stay above 0, got {budgets!r}")


def _input_size(splits: Splits) -> tuple[int, int, int]:
    return 3, splits.test.size, splits.test.size


def _validation(splits: Splits) -> data.ImageDataset:
    if splits.validation is None:
        raise AFDSError(f"the data set {splits.name!r} leaves no training image for validation; take fewer per class")
    return splits.validation


def _cost(measured: training.Evaluation | afs.MaskReport) -> macs.MACs:
    if measured.macs is None:
        raise RuntimeError("MACs were not counted")
    return measured.macs


def _scores(prefix: str, evaluation: training.Evaluation) -> dict[str, float]:
    return {
        f"{prefix}_accuracy": evaluation.accuracy,
        f"{prefix}_mean_class_accuracy": evaluation.mean_class_accuracy,
        f"{prefix}_loss": evaluation.loss,
    }


def _training_macs(model: nn.Module, size: tuple[int, int, int], settings: Optimisation, forwards: float) -> float:
    """MACs of a stage: per image three dense passes of the network (forward, two gradients), and the teacher's."""
    return macs.count(model, size).total * settings.steps * settings.batch_size * (3 + forwards)


@runs.register
@dataclass(frozen=True)
class SourceRun:
    """Trains a plain network on the source data, or takes published weights (no step, no source data).

    Attributes:
        data: the source data set.
        network: the backbone.
        optimisation: of the training; 0 steps with published weights.
        weight_decay: of every parameter.
        seed: of initialisation, data order and augmentation.
    """

    data: DataSource
    network: Network
    optimisation: Optimisation
    weight_decay: float = 5e-4
    seed: int = 0

    @property
    def published(self) -> bool:
        """Whether finished weights are taken as they are, without a step and without a look at the data."""
        return self.network.weights is not None and self.optimisation.steps == 0

    def execute(self, run: runs.Run) -> dict[str, Any]:
        if self.published:
            # Another classifier than ImageNet's is left out; the target gets a new one anyway.
            model = self.network.build(PUBLISHED_CLASSES, self.seed)
            run.write_artifact(MODEL, lambda path: afs.save(model, path))
            return {"steps": 0, "parameters": sum(p.numel() for p in model.parameters())}
        splits = self.data.load()
        model = self.network.build(len(splits.classes), self.seed).to(training.device())
        precision = self.optimisation.precision
        objective = Objective(model, weight_decay=self.weight_decay, label_smoothing=self.optimisation.label_smoothing)

        def validate() -> dict[str, float]:
            return _scores("validation", training.evaluate(model, _validation(splits), precision=precision))

        training.fit(
            model, splits.train, objective, self.optimisation, run, seed=self.seed, evaluation=validate, label="source"
        )
        run.write_artifact(MODEL, lambda path: afs.save(model, path))
        return {
            "steps": self.optimisation.steps,
            "images": len(splits.train),
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": macs.count(model, _input_size(splits)).total,
            "training_macs": _training_macs(model, _input_size(splits), self.optimisation, 0),
            **validate(),
            **_scores("test", training.evaluate(model, splits.test, precision=precision)),
        }


def _gate_summary(model: nn.Module, statistics: Mapping[str, afs.LayerStatistics]) -> dict[str, dict[str, Any]]:
    """Per layer: channel counts and eleven quantiles over channels of the mean gate and of the active rate."""
    summary = {}
    grid = torch.linspace(0, 1, 11, dtype=torch.float64)
    for name, layer in afs.layers(model).items():
        alive = layer.m.bool().cpu()
        dynamic = int((layer.m * layer.s).sum())
        s = statistics[name]
        summary[name] = {
            "channels": layer.m.numel(),
            "removed": int((~alive).sum()),
            "static": int(alive.sum()) - dynamic,
            "dynamic": dynamic,
            "gate_quantiles": [round(v, 4) for v in torch.quantile(s.q[alive], grid).tolist()],
            "active_quantiles": [round(v, 4) for v in torch.quantile(s.active_rate[alive], grid).tolist()],
            "variation": round(float((s.p[alive] / s.q[alive].square().clamp_min(1e-12)).median()), 6),
        }
    return summary


def _gate_metrics(model: nn.Module, splits: Splits, settings: Optimisation) -> dict[str, Any]:
    """The gates of every layer over the training images, and the sums of their states."""
    with training.autocast(next(model.parameters()).device, settings.precision):
        statistics = afs.collect_statistics(model, data.loader(splits.statistics, 128))
    layers = _gate_summary(model, statistics)
    return {"layers": layers} | {
        kind: sum(layer[kind] for layer in layers.values()) for kind in ("removed", "static", "dynamic")
    }


def _without_removed(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """The network that is evaluated: compact where channels are removed. At 10x it took half the time of the masked one
    (test images of imagenet32, one thread), and it is what a user would run."""
    if all(bool(layer.m.all()) for layer in afs.layers(model).values()):
        return model
    with eval_mode(model):
        return compact(model, input_size=size).to(memory_format=torch.channels_last)


def _measure(
    model: nn.Module,
    splits: Splits,
    settings: Optimisation,
    dense: float,
    budget: float,
    *,
    images: int,
    use_test: bool,
) -> dict[str, Any]:
    """Accuracies and MACs of one point: the same for AFS and for every competitor."""
    precision, size = settings.precision, _input_size(splits)
    whole, model = model, _without_removed(model, size)
    fitted = training.evaluate(model, training.first(splits.statistics, images), precision=precision, count_macs=True)
    metrics: dict[str, Any] = {
        "budget": budget,
        "dense_macs": dense,
        "train_macs": _cost(fitted).total / dense,
        "parameters": macs.parameters(whole, size),
        **_scores("train", fitted),
        **training.monitor_gates(whole, splits.statistics),
    }
    if splits.validation is not None:
        metrics |= _scores("validation", training.evaluate(model, splits.validation, precision=precision))
    if use_test:
        test = training.evaluate(model, splits.test, precision=precision, count_macs=True)
        metrics |= _scores("test", test) | {
            "macs": _cost(test).total / dense,
            "macs_predictors": _cost(test).predictors / dense,
            "confusion": test.confusion,
        }
    return metrics


def _save(run: runs.Run, model: nn.Module, objective: Objective) -> None:
    """The network and what its objective has learned."""
    state = {name: tensor.cpu().contiguous() for name, tensor in objective.state_dict().items()}
    run.write_artifact(OBJECTIVE, lambda path: save_file(state, path))
    run.write_artifact(MODEL, lambda path: afs.save(model, path))


@runs.register
@dataclass(frozen=True)
class AFSSourceRun:
    """Converts the source network exactly and fine-tunes it on the source data at density 1, so the predictors learn.

    Attributes:
        source: the plain network.
        data: the source data set; not read if there are no steps.
        optimisation: of the fine-tuning; 0 steps to leave the stage out.
        gates: "all" or "blocks"; see `afs.convert`.
        weight_decay: of every parameter.
        seed: of data order and augmentation.
        predictors: "exact", the conversion; or "random", as in the seed's code, which loses the trained function: for
            the ablation only.
    """

    source: SourceRun
    data: DataSource
    optimisation: Optimisation
    gates: str = "all"
    weight_decay: float = 1e-4
    seed: int = 0
    predictors: str = runs.added("exact")

    def __post_init__(self) -> None:
        if self.predictors not in ("exact", "random"):
            raise AFDSError(f"predictors must be 'exact' or 'random', got {self.predictors!r}")

    def execute(self, run: runs.Run) -> dict[str, Any]:
        try:
            return self._train(run)
        except DivergedError as error:
            if self.predictors == "exact":
                raise
            # Of the ablation this is the result: gates that start at random may not survive the source stage.
            return {"diverged": f"in the source stage, {error}", "steps": 0}

    def _train(self, run: runs.Run) -> dict[str, Any]:
        source = runs.get_or_run(self.source, store=run.store, needs=(MODEL,))
        model = afs.convert(afs.load(source.artifact(MODEL)), gates=self.gates)
        if self.predictors == "random":
            torch.manual_seed(self.seed)
            for layer in afs.layers(model).values():
                layer.predictor.reset_parameters()
        if self.optimisation.steps == 0:
            run.write_artifact(MODEL, lambda path: afs.save(model, path))
            return {"steps": 0, "gates": len(afs.layers(model))}
        splits = self.data.load()
        settings = self.optimisation
        model.to(training.device())
        objective = Objective(model, weight_decay=self.weight_decay, label_smoothing=settings.label_smoothing)
        monitor = training.first(splits.statistics, 512)

        def validate() -> dict[str, float]:
            return _scores("validation", training.evaluate(model, _validation(splits), precision=settings.precision))

        def summarise() -> dict[str, dict[str, Any]]:
            where = next(model.parameters()).device
            with training.autocast(where, settings.precision):
                return _gate_summary(model, afs.collect_statistics(model, data.loader(monitor, 128)))

        before, gates_before = validate(), summarise()
        training.fit(
            model, splits.train, objective, settings, run, seed=self.seed, monitor=splits.statistics,
            evaluation=validate, label="AFS source",
        )  # fmt: skip
        gates_after = summarise()
        run.write_artifact(MODEL, lambda path: afs.save(model, path))
        test = training.evaluate(model, splits.test, precision=settings.precision, count_macs=True)
        return {
            "steps": settings.steps,
            "images": len(splits.train),
            "gates": len(gates_after),
            "macs": _cost(test).total,
            "macs_predictors": _cost(test).predictors,
            "training_macs": _training_macs(model, _input_size(splits), settings, 0),
            "converted_validation_accuracy": before["validation_accuracy"],
            **validate(),
            **_scores("test", test),
            "gates_before": gates_before,
            "gates_after": gates_after,
        }


_Execute = TypeVar("_Execute", bound=Callable[..., dict[str, Any]])


def diverges(execute: _Execute) -> _Execute:
    """A point that diverges or cannot be reached, or starts from such a one, is a result with "diverged": why.

    Args:
        execute: of a run with `parent`, the point before or None, `source`, the source network, and `times`, its
            budget for readers.
    """

    @functools.wraps(execute)
    def wrapper(self: Any, run: runs.Run) -> dict[str, Any]:
        for before in (self.parent, self.source):
            if before is not None and (reason := runs.get_or_run(before, store=run.store).metrics.get("diverged")):
                return {"diverged": reason, "steps": 0}
        try:
            return execute(self, run)
        except (DivergedError, UnreachableError) as error:
            return {"diverged": f"at {self.times}, {error}", "steps": 0}

    return wrapper  # type: ignore[return-value]


@runs.register
@dataclass(frozen=True)
class TransferRun:
    """One point of a pruning sweep: a target network at the last of its budgets, tuned from the point before.

    The first budget is 1, the unpruned network at its true cost. For each later one the density is set first, half of
    the stage is trained, the masks are updated to the budget, and the rest is trained; shortly before the end the
    masks are updated once more, because gates move while they train. [recall; the last update ours]

    Attributes:
        source: the AFS source network; also the reference of the regulariser.
        data: the target data set; its seed draws the fitting images.
        regulariser: and its strength.
        optimisation: of the unpruned stage.
        tuning: of each later stage.
        budgets: shares of the dense network's MACs, decreasing from 1.
        delta_s: threshold of the squared coefficient of variation below which gates become constant.
        density_exponent: d = max(density_floor, budget ** density_exponent). [ours]
        density_floor: see above.
        trim: share of a stage after which the masks are updated a second time.
        macs_images: training images on which the budget is met; a fixed subset.
        seed: of the classifier's initialisation, data order and augmentation.
        use_test: whether the test set is read at the end; trials that choose something must not.
        settle: whether the budget is met once more after the last step, between 98 and 100 %; see `selection.settle`.
        multiple: each layer keeps a multiple of channels, for kernels that like such shapes; see `afs.update_masks`.
        stream: "free", or "coupled" for residual streams that narrow as a whole; see `afs.update_masks`.
        first: share of a stage after which the masks are updated the first time; 0.5 is between its halves. [recall]
        freeze_first: whether that update freezes gates, too; if not, only the later one does. [ours]
        settle_by: what the channels that go when the budget is met once more are ranked by: "q", the mean gate, or
            "taylor"; see `afs.taylor_importance`. [ours]
    """

    source: AFSSourceRun
    data: DataSource
    regulariser: Regulariser
    optimisation: Optimisation
    tuning: Optimisation
    budgets: tuple[float, ...] = (1.0,)
    delta_s: float = 0.01
    density_exponent: float = 0.5
    density_floor: float = 0.5
    trim: float = 0.8
    macs_images: int = 256
    seed: int = 0
    use_test: bool = True
    settle: bool = runs.added(False)
    multiple: int = runs.added(1)
    stream: str = runs.added("free")
    first: float = runs.added(0.5)
    freeze_first: bool = runs.added(True)
    settle_by: str = runs.added("q")

    def __post_init__(self) -> None:
        check_budgets(self.budgets)
        if not (isinstance(self.multiple, int) and not isinstance(self.multiple, bool) and self.multiple >= 1):
            raise AFDSError(f"multiple must be a whole number of at least 1, got {self.multiple!r}")
        if self.stream not in ("free", "coupled"):
            raise AFDSError(f"stream must be 'free' or 'coupled', got {self.stream!r}")
        if self.settle_by not in ("q", "taylor"):
            raise AFDSError(f"settle_by must be 'q' or 'taylor', got {self.settle_by!r}")
        if not (_is_number(self.density_floor) and 0 < self.density_floor <= 1):
            raise AFDSError(f"density_floor must be in (0, 1], got {self.density_floor!r}")
        for name in ("density_exponent", "delta_s"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise AFDSError(f"{name} must be a number of at least 0, got {getattr(self, name)!r}")
        for name in ("first", "trim"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                raise AFDSError(f"{name} must be a share in [0, 1), got {getattr(self, name)!r}")
        if not (isinstance(self.macs_images, int) and self.macs_images >= 1):
            raise AFDSError(f"macs_images must be a whole number of at least 1, got {self.macs_images!r}")

    @property
    def parent(self) -> TransferRun | None:
        """The point before, whose network this one starts from."""
        if len(self.budgets) == 1:
            return None
        # The unpruned network is not settled, and is shared by those that settle in different ways.
        return replace(self, budgets=self.budgets[:-1], settle_by="q" if len(self.budgets) == 2 else self.settle_by)

    @property
    def density(self) -> float:
        """The density d at the last budget."""
        return max(self.density_floor, self.budgets[-1] ** self.density_exponent)

    @property
    def times(self) -> str:
        """The last budget for readers: "10x"."""
        return f"{1 / self.budgets[-1]:g}x"

    @diverges
    def execute(self, run: runs.Run) -> dict[str, Any]:
        source = runs.get_or_run(self.source, store=run.store, needs=(MODEL,))
        splits = self.data.load() if self.use_test else data.sealed(self.data.load())
        size, budget, parent = _input_size(splits), self.budgets[-1], self.parent
        torch.manual_seed(self.seed)  # of the attention's weights, which are drawn after the network is built
        source_model = afs.load(source.artifact(MODEL))
        if parent is None:
            settings, model = self.optimisation, copy.deepcopy(source_model)
            generator = torch.Generator().manual_seed(self.seed)
            backbones.reset_classifier(model, len(splits.classes), generator=generator)
            objective = self._objective(model, source_model, size, run)
        else:
            settings = self.tuning
            before = runs.get_or_run(parent, store=run.store, needs=(MODEL, OBJECTIVE))
            model = afs.load(before.artifact(MODEL))
            objective = self._objective(model, source_model, size, run)
            objective.load_state_dict(load_file(before.artifact(OBJECTIVE)))
            afs.set_density(model, self.density)
        model.to(training.device())
        objective.place(training.device())
        if parent is not None:
            objective.masks_changed(model)
        attention_steps = 0
        if parent is None and self.regulariser.name == "afd" and self.regulariser.attention == "detached":
            attention_steps = self.optimisation.steps
            if run.load_checkpoint() is None:
                self._prepare(objective, splits)
        dense = macs.count(model, size).total
        subset = training.first(splits.statistics, self.macs_images)

        def update_masks(freeze: bool = True) -> dict[str, float]:
            where = next(model.parameters()).device
            with training.autocast(where, settings.precision):
                statistics = afs.collect_statistics(model, data.loader(splits.statistics, 128))
                report = afs.update_masks(
                    model, statistics, macs_budget=budget, loader=data.loader(subset, 128),
                    delta_s=self.delta_s if freeze else 0.0, multiple=self.multiple, stream=self.stream,
                )  # fmt: skip
            objective.masks_changed(model)
            if settings.recalibrate:
                batches = training.first_batches(splits.train, settings.batch_size, self.seed, settings.recalibrate)
                training.recalibrate(model, batches, settings.precision)
            return {
                "mask_macs": _cost(report).total / dense,
                "removed": report.removed,
                "static": report.static,
                "dynamic": report.dynamic,
            }

        events: dict[int, Callable[[], dict[str, float]]] = {}
        if budget < 1:
            events[math.floor(settings.steps * self.first)] = functools.partial(update_masks, self.freeze_first)
            events[math.floor(settings.steps * self.trim)] = update_masks
        training.fit(
            model, splits.train, objective, settings, run, seed=self.seed, monitor=splits.statistics, events=events,
            label=f"{self.regulariser.name} seed {self.seed} at {self.times}",
        )  # fmt: skip
        if self.settle and budget < 1:
            from afdslib.pruning import settle

            with training.autocast(next(model.parameters()).device, settings.precision):
                fitting = data.loader(splits.statistics, 128)
                importance = functools.partial(afs.taylor_importance, model, fitting)
                settle(
                    model, budget, data.loader(subset, 128), afs.collect_statistics(model, fitting), dense,
                    multiple=self.multiple, stream=self.stream,
                    scores=importance if self.settle_by == "taylor" else None,
                )  # fmt: skip
            objective.masks_changed(model)
        metrics = _measure(model, splits, settings, dense, budget, images=self.macs_images, use_test=self.use_test)
        metrics |= _gate_metrics(model, splits, settings)
        metrics["density"] = next(iter(afs.layers(model).values())).density  # which settling may have raised
        metrics["training_macs"] = _training_macs(model, size, settings, 0 if objective.teacher is None else 1)
        metrics["steps"] = settings.steps + attention_steps
        _save(run, model, objective)
        return metrics

    def _objective(self, model: nn.Module, source: nn.Module, size: tuple[int, int, int], run: runs.Run) -> Objective:
        from afdslib.experiments.delta import weights_for  # which needs the runs of this module

        weights = weights_for(self.regulariser, self.source, self.data, run)
        smoothing = self.optimisation.label_smoothing
        return Objective(model, self.regulariser, source, size, label_smoothing=smoothing, weights=weights)

    def _prepare(self, objective: Objective, splits: Splits) -> None:
        o = self.optimisation
        batches = training.first_batches(splits.train, o.batch_size, self.seed, o.steps)
        objective.prepare(batches, len(splits.classes))
