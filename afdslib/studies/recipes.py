"""Recipes: students of attention transfer on CIFAR-10 and ImageNet and of neuron selectivity transfer on ImageNet, and
attention transfer while fine-tuning on scenes and birds.

    afds distill --recipe resnet18-at --data-dir path/to/data --dry-run
    torchrun --nproc-per-node 8 -m afdslib.cli distill --recipe inception-bn-nst --data-dir path/to/data
    fabric run --devices 8 --accelerator gpu "$(command -v afds)" distill --recipe inception-bn-nst --data-dir ...

What the public code does and these do not: the old multi-GPU attention code adds up the GPUs' mean losses, so its beta
of 1e3 on two GPUs weighs as 2e3 does here; the old NST code runs its teacher in training mode, decays neither biases
nor the shifts of batch norms, and takes as teacher a pre-activation ResNet-101 whose file is for MXNet. [code] Both
normalise by each GPU's own images: `local_norm` does so too. None of the recipes has been run in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from afdslib import backbones, training
from afdslib.afs import macs
from afdslib.backbones.efficientnet import LITE
from afdslib.backbones.inputs import input_of, input_statistics
from afdslib.backbones.loading import imagenet_file
from afdslib.base.checks import whole
from afdslib.base.errors import AFDSError
from afdslib.data.imagenet import IMAGENET as IMAGENET_COUNTS
from afdslib.data.photographs import AUGMENTATIONS
from afdslib.experiments import DataSource, Distillation, Network, Photographs, PhotoRun, Published, StudentRun
from afdslib.experiments.student import classes_of, paired
from afdslib.losses import BetaSchedule
from afdslib.losses.term import Pair
from afdslib.studies import plan as planning
from afdslib.training import Optimisation

__all__ = ["RECIPES", "Recipe", "evaluate", "plan", "prepare"]


@dataclass(frozen=True)
class Recipe:
    """A student, its teacher and their schedule.

    Attributes:
        student, teacher: backbones; the teacher has torchvision's ImageNet weights unless the user gives others.
        method: what is minimised.
        data, augmentation: the data set, and how its training images are varied.
        pretrained: whether student and teacher start from ImageNet weights and are fine-tuned; the teacher first.
        epochs, batch_size: of the student, and of a teacher that is fine-tuned; images of all processes together.
        lr, drop, milestones: the rate at the start, times `drop` at each milestone, a share of the epochs.
        reported, source: what its authors report, if they do, and where the numbers come from.
    """

    student: str
    teacher: str | None = None
    method: Distillation = field(default_factory=Distillation)
    data: str = "imagenet"
    pretrained: bool = False
    augmentation: str = "inception"
    epochs: int = 100
    batch_size: int = 256
    lr: float = 0.1
    milestones: tuple[float, ...] = (0.3, 0.6, 0.9)
    drop: float = 0.1
    nesterov: bool = False
    weight_decay: float = 1e-4
    reported: str = ""
    source: str = ""


def _table() -> Iterator[tuple[str, Recipe]]:
    at = Distillation("at", BetaSchedule(beta=1000.0))
    # The commands of the attention-transfer README on CIFAR-10, and AT + KD, which it announces.
    cifar = Recipe(
        "", data="cifar10", augmentation="", epochs=200, batch_size=128, milestones=(0.3, 0.6, 0.8), drop=0.2,
        weight_decay=5e-4, source="the attention-transfer code",
    )  # fmt: skip
    kd = Distillation(hard=0.1, soft=0.9)
    both = replace(kd, transfer="at", weight=BetaSchedule("cosine", beta=1000.0))
    for name in ("wrn-40-1", "wrn-16-2", "wrn-40-2", "wrn-16-1"):
        yield name, replace(cifar, student=name)
    for student, teacher in (("wrn-16-1", "wrn-16-2"), ("wrn-16-2", "wrn-40-2")):
        for suffix, method in (("at", at), ("kd", kd), ("at-kd", both)):
            yield f"{student}-{suffix}", replace(cifar, student=student, teacher=teacher, method=method)
    # Its commands on ImageNet.
    code = "the attention-transfer code; its teacher is resnet-34-export.pth (--teacher), here torchvision's [ours]"
    yield "resnet18", Recipe("resnet18", source=code)
    yield "resnet18-at", Recipe("resnet18", "resnet34", at, source=code)
    # Neuron selectivity transfer on ImageNet.
    code = "the neuron-selectivity code; its teacher is an MXNet ResNet-101, here torchvision's [ours]"
    nst = Distillation("nst", BetaSchedule(beta=50.0), taps="before-relu")
    for student in ("inception_bn", "resnet50_senet"):
        name = student.replace("_", "-")
        alone = Recipe(student, augmentation="resnext", batch_size=512, nesterov=True, source=code)
        yield name, alone
        for suffix, method in (("kd", Distillation(soft=1.0)), ("nst", nst), ("nst-kd", replace(nst, soft=1.0))):
            yield f"{name}-{suffix}", replace(alone, teacher="resnet101", method=method)
    # Fine-tuning with attention transfer, on scenes and birds.
    for name, data_set in (("scenes", "mit-indoors"), ("cub", "cub-200-2011")):
        alone = Recipe(
            "resnet18", data=data_set, pretrained=True, augmentation="gentle", epochs=60, batch_size=64, lr=0.01,
            milestones=(0.5, 0.8), source="code never released; the schedule is ours, untuned",
        )  # fmt: skip
        yield name, alone
        yield f"{name}-at", replace(alone, teacher="resnet34", method=at)


# What the authors report: accuracies, or top-1/top-5 errors.
_REPORTED = {
    "wrn-16-1": "accuracy 91.23 %", "wrn-16-2": "accuracy 93.69 %", "wrn-16-1-at": "accuracy 92.07 %",
    "resnet18": "top-1/top-5 error 30.4/10.8 %", "resnet18-at": "top-1/top-5 error 29.3/10.0 %",
    "inception-bn": "top-1/top-5 error 25.74/8.07 %", "inception-bn-nst": "top-1/top-5 error 24.81/7.55 %",
    "inception-bn-nst-kd": "top-1/top-5 error 24.34/7.11 %",
    "resnet50-senet-nst-kd": "top-1/top-5 error 21.05/5.56 %",
}  # fmt: skip

RECIPES = {name: replace(recipe, reported=_REPORTED.get(name, "")) for name, recipe in _table()}
"""The recipes by name; `inception-bn`, `resnet18`, `wrn-16-1`, ... without a suffix train the network alone."""


# Official training images and classes, for plans, which open no archive.
_SIZES = {
    "cifar10": (50_000, 10), "imagenet": (IMAGENET_COUNTS.train, IMAGENET_COUNTS.classes),
    "mit-indoors": (67 * 80, 67), "cub-200-2011": (5994, 200),
}  # fmt: skip


@dataclass(frozen=True)
class _Chosen:
    recipe: Recipe
    run: PhotoRun | StudentRun
    images: int
    classes: int
    known: bool  # whether images and classes were counted in the data set


def prepare(
    name: str, *, data_set: str | None = None, data_dir: str | None = None, teacher: str | None = None,
    epochs: int | None = None, batch_size: int | None = None, lr: float | None = None, weight: float | None = None,
    size: int | None = None, width: float = 1.0, precision: str = "fp32", local_norm: bool = False, seed: int = 0,
    skip_corrupt: bool = False, must_exist: bool = True,
) -> _Chosen:  # fmt: skip
    """The run of a recipe, with what the user changes.

    Args:
        name: one of `RECIPES`.
        data_set, data_dir: another data set or ImageFolder tree, and the folder it lies in.
        teacher: a weight file or a backbone's name, in place of the recipe's teacher; on CIFAR-10 a wide ResNet, which
            is trained first.
        epochs, batch_size, lr: another length, whose milestones keep their shares; images per step of all processes
            together; the rate at the start.
        weight: of the transfer loss (AT's beta in the code's scale, NST's lambda) at the start; a recipe whose weight
            decays keeps its schedule.
        size: side of the crops, pixels; 224 unless given. CIFAR-10 has its own.
        width: factor on the student's channels, for trying things out.
        precision, local_norm: "fp32", "bf16" or "fp16"; batch norm by each process's own images, as in the old codes.
        seed: of everything random.
        skip_corrupt: see `data.load`.
        must_exist: False for a plan, which takes a data set's official counts and opens no archive.

    Raises:
        AFDSError: an unknown name, or a value that cannot be.
    """
    if name not in RECIPES:
        raise AFDSError(f"there is no recipe {name!r}; take one of {', '.join(RECIPES)}")
    given = {"data": data_set, "epochs": epochs, "batch_size": batch_size, "lr": lr}
    for what in ("epochs", "batch_size"):
        if given[what] is not None:
            whole(what, given[what], 1)
    changes: dict[str, Any] = {what: value for what, value in given.items() if value is not None}
    recipe = replace(RECIPES[name], **changes)
    cifar = recipe.student.startswith("wrn-")
    _refuse(name, recipe, teacher, weight, size)
    method = recipe.method
    if weight is not None:
        method = replace(method, weight=replace(method.weight, beta=weight))
    # A plan extracts and downloads nothing, so it takes official counts.
    photographs = Photographs(recipe.data, size or 224, recipe.augmentation, data_dir or "", skip_corrupt)
    known = not cifar and (must_exist or recipe.data not in _SIZES)
    images, classes = _SIZES.get(recipe.data, (0, 0))
    if known:
        splits = photographs.load(download=must_exist)
        images, classes = len(splits.train), len(splits.classes)
    settings = Optimisation(
        steps=recipe.epochs * max(1, images // recipe.batch_size), batch_size=recipe.batch_size, lr=recipe.lr,
        nesterov=recipe.nesterov, schedule="milestones", drop=recipe.drop, milestones=recipe.milestones,
        precision=precision, log_rows=40 if cifar else recipe.epochs, sync_norm=not local_norm,
    )  # fmt: skip
    weights, decay = "imagenet" if recipe.pretrained else None, recipe.weight_decay
    network, taught_by = Network(recipe.student, width=width, weights=weights), teacher or recipe.teacher
    source: Any = None
    if cifar:
        # The run that notebook 06 makes in its profile `paper`, so that neither trains what the other has trained.
        images_of = DataSource("cifar10", per_class=5000, root=data_dir or "", padding="reflect")
        if taught_by is not None:
            source = StudentRun(images_of, Network(taught_by), settings, weight_decay=decay)
        student = StudentRun(replace(images_of, seed=seed), network, settings, method, source, decay, seed)
        return _Chosen(recipe, student, images, classes, known)
    if recipe.pretrained and teacher is None and taught_by is not None:
        source = PhotoRun(photographs, Network(taught_by, weights=weights), settings, weight_decay=decay, seed=seed)
    elif taught_by is not None:
        source = Published.of(taught_by)
    run = PhotoRun(photographs, network, settings, method, source, decay, seed)
    return _Chosen(recipe, run, images, classes, known)


def _refuse(name: str, recipe: Recipe, teacher: str | None, weight: float | None, size: int | None) -> None:
    """What a user may not change of a recipe."""
    others = ", ".join(name for name, recipe in RECIPES.items() if recipe.teacher)
    cifar = recipe.student.startswith("wrn-")
    refused = {
        f"has no teacher; leave out --teacher, or take one of {others}": teacher is not None and not recipe.teacher,
        "has no transfer loss to weigh; leave out --weight": weight is not None and recipe.method.transfer == "none",
        f"is for cifar10, not {recipe.data!r}; leave out --data, or take another recipe": cifar
        and recipe.data != "cifar10",
        "takes CIFAR-10's images as they are, 32 px; leave out --size": cifar and size is not None,
        "trains its teacher first, so --teacher takes the name of a wide ResNet, such as wrn-40-2, not "
        f"{teacher!r}": cifar and teacher is not None and not teacher.startswith("wrn-"),
    }
    for why, applies in refused.items():
        if applies:
            raise AFDSError(f"the recipe {name!r} {why}")


def plan(chosen: _Chosen, processes: int = 1) -> str:
    """What `prepare` chose, as text: networks, schedule, cost, memory, and what is missing. Trains nothing.

    A batch is divided among the processes.
    """
    recipe, run, method, o = chosen.recipe, chosen.run, chosen.run.method, chosen.run.optimisation
    side = run.data.size or 32
    size = (3, side, side)
    student = replace(run.network, weights=None).build(chosen.classes, run.seed)
    cost, parameters = macs.count(student, size).total, sum(p.numel() for p in student.parameters())
    share = o.batch_size // processes
    memory = planning.memory(student, size, o.precision, share)
    passes, text, trained = 3 * cost, "none", isinstance(run.teacher, (PhotoRun, StudentRun))
    pairs: tuple[Pair, ...] = ()
    if run.teacher is not None:
        teacher, text = _teacher(run.teacher)
        teacher_cost = macs.count(teacher, size).total
        text += f", {teacher_cost / 1e9:.3g} G MACs"
        passes += (4 if trained else 1) * teacher_cost
        memory += sum(p.numel() for p in teacher.parameters()) * 4
        pairs = paired(student, teacher, method, size)
    statistics = input_statistics(run.network.name)
    momentum = f"momentum {o.momentum:g}{' (Nesterov)' if o.nesterov else ''}"
    drops = f"lr {o.lr:g} times {o.drop:g} after {', '.join(f'{m:.0%}' for m in o.milestones)}"
    pretrained = ", from torchvision's ImageNet weights" if run.network.weights else ""
    lines = [
        f"student: {run.network.name} at {side} px, {cost / 1e9:.3g} G MACs, {parameters / 1e6:.2f} M "
        f"parameters{pretrained}",
        f"input: mean {statistics.mean}, deviation {statistics.deviation} of RGB values from 0 to 255",
        f"teacher: {text}",
        f"loss: {_loss_text(method)}",
        f"compared: {_pairs_text(pairs)}",
        f"augmentation: {_augmentation_text(run.data)}",
        f"data: {run.data.name}, {chosen.images:,} training images, {chosen.classes:,} classes"
        + ("" if chosen.known else " (official; not counted here)"),
        f"schedule: {recipe.epochs} epochs = {o.steps:,} steps of {o.batch_size} images, {drops}, {momentum}, weight "
        f"decay {run.weight_decay:g}, {o.precision}",
        f"processes: {processes}, {share} images of each batch in each, batch norm over "
        + ("the whole batch" if o.sync_norm else "each process's images"),
        f"training MACs: {passes * o.steps * o.batch_size:.3g}"
        + (", the teacher's own training included" if trained else ""),
        f"memory: about {memory / 2**30:.1f} GiB per process (a rule of thumb: three kept maps per convolution, "
        "weights, gradients, momentum, the teacher's weights)",
        f"sources: {recipe.source}",
    ]
    if recipe.reported:
        lines.append(f"reported: {recipe.reported}; this recipe has not been run in full here")
    return "\n".join([*lines, *planning.lacking(_missing(chosen, processes))])


def _loss_text(method: Distillation) -> str:
    weight, text = method.weight, f"{method.hard:g} CE"
    if method.soft:
        text += f" + {method.soft:g} T^2 KL, T = {method.temperature:g}"
    if method.transfer == "none":
        return text
    schedule = weight.kind if weight.kind == "constant" else f"{weight.kind}, to {weight.end:g} at the end"
    return f"{text} + {weight.beta:g} {method.transfer} ({schedule})"


def _pairs_text(pairs: tuple[Pair, ...]) -> str:
    if not pairs:
        return "no feature maps"
    text = ", ".join(f"{p.student} with {p.teacher} at {p.size[0]}x{p.size[1]}" for p in pairs)
    # Of a block with a residual sum the last batch norm; "bn" alone is all that a pre-activation ReLU takes.
    inner = {name for p in pairs for name in (p.student, p.teacher) if ".bn" in name}
    return text + "".join(f"; {n} is a batch norm before the residual sum, not the ReLU's input" for n in sorted(inner))


def _augmentation_text(source: Photographs | DataSource) -> str:
    if isinstance(source, DataSource):
        return "crops of an image padded by 4 mirrored pixels, mirrored"
    a = AUGMENTATIONS[source.augmentation]
    return (
        f"{source.augmentation}, crops of {a.area[0]:.0%} to {a.area[1]:.0%} of the area, aspect {a.aspect[0]:.2f} to "
        f"{a.aspect[1]:.2f}, mirrored, jitter {a.jitter:g}, lighting {a.lighting:g}"
    )


def _teacher(teacher: PhotoRun | StudentRun | Published) -> tuple[nn.Module, str]:
    """A network of the teacher's form, and what it is; a file is read, but nothing is downloaded."""
    if isinstance(teacher, Published):
        if teacher.file:
            return teacher.build(), f"the file {teacher.file}"
        return backbones.build(teacher.network, 1000), f"{teacher.network}, torchvision's weights"
    how = "trained" if isinstance(teacher, StudentRun) else "fine-tuned"
    model = replace(teacher.network, weights=None).build(10 if isinstance(teacher, StudentRun) else 1000, 0)
    return model, f"{teacher.network.name}, {how} first by the same schedule"


def _missing(chosen: _Chosen, processes: int) -> Iterator[str]:
    run = chosen.run
    if training.device().type == "cpu":
        yield f"a GPU: on this CPU the recipe would take {'days' if isinstance(run, StudentRun) else 'months'}"
    if run.optimisation.batch_size % processes:
        yield f"a batch that {processes} processes can divide: {run.optimisation.batch_size} is no multiple of them"
    if not chosen.known:
        yield from planning.unreadable(run.data.name, run.data.root)
    # Networks that start from torchvision's weights.
    networks = [run.network, *([run.teacher.network] if isinstance(run.teacher, (PhotoRun, StudentRun)) else [])]
    names = [network.name for network in networks if network.weights]
    if isinstance(run.teacher, Published) and run.teacher.network:
        names.append(run.teacher.network)
    for name in names:
        yield from planning.published(name)


def evaluate(
    weights: str, *, data_set: str = "imagenet", data_dir: str | None = None, size: int = 224, precision: str = "fp32",
    skip_corrupt: bool = False, classes: Mapping[str, int] | None = None,
) -> training.Evaluation:  # fmt: skip
    """Top-1 and top-5 of a trained network on a data set's test part (ImageNet: its validation images).

    Args:
        weights: a file or a backbone's name; see `Published.of`.
        size: side of the centre crop, pixels.
        data_set, data_dir, precision, skip_corrupt: see `prepare`.
        classes: for a network of other classes, which of its outputs stands for each of the data set's.

    Raises:
        AFDSError: weights or data that are missing, or that do not fit each other.
    """
    published = Published.of(weights)
    if not published.file and published.network not in LITE:
        imagenet_file(published.network)  # refuses a backbone without ImageNet weights
    model = published.build().to(training.device()).eval()
    splits = Photographs(data_set, size, root=data_dir or "", skip_corrupt=skip_corrupt).load(input_of(model))
    test, known = splits.test, classes_of(model)
    if classes is not None:
        if set(classes) != set(splits.classes) or not all(0 <= output < known for output in classes.values()):
            wanted = ", ".join(f"{name}=0..{known - 1}" for name in splits.classes)
            raise AFDSError(f"the classes of {splits.name} need an output of the network each: {wanted}")
        test.targets = np.array([classes[splits.classes[target]] for target in test.targets])
        test.classes = tuple(map(str, range(known)))
    elif known != len(splits.classes):
        raise AFDSError(f"{weights} knows {known} classes and {splits.name} has {len(splits.classes)}")
    return training.evaluate(model, test, precision=precision)
