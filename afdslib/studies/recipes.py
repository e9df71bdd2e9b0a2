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

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from afdslib import backbones, data, training
from afdslib.afs import macs
from afdslib.backbones.inputs import input_of, input_statistics
from afdslib.backbones.loading import imagenet_file
from afdslib.base.errors import AFDSError
from afdslib.data.imagenet import IMAGENET as IMAGENET_COUNTS
from afdslib.data.photographs import AUGMENTATIONS
from afdslib.experiments import DataSource, Distillation, Network, Photographs, PhotoRun, Published, StudentRun
from afdslib.experiments.photo import classes_of
from afdslib.experiments.student import paired
from afdslib.losses import BetaSchedule
from afdslib.losses.term import Pair
from afdslib.training import Optimisation

__all__ = ["RECIPES", "Recipe", "evaluate", "plan", "prepare"]


_AT = Distillation("at", BetaSchedule(beta=1000.0))
_NST = Distillation("nst", BetaSchedule(beta=50.0), taps="before-relu")


@dataclass(frozen=True)
class Recipe:
    """A student, its teacher and their schedule.

    Attributes:
        student: backbone.
        teacher: backbone of the teacher, with torchvision's ImageNet weights unless the user gives others.
        method: what is minimised.
        data: data set.
        pretrained: whether student and teacher start from ImageNet weights and are fine-tuned; the teacher first.
        augmentation: of the training images.
        epochs: of the student, and of a teacher that is fine-tuned.
        batch_size: images per step, of all processes together.
        lr: at the start; times `drop` at each milestone.
        milestones: shares of the epochs.
        drop: see `lr`.
        nesterov: Nesterov momentum.
        weight_decay: of every parameter.
        reported: what its authors report, if they do.
        source: where the numbers above come from.
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


_AT_CODE = "the attention-transfer code; its teacher is resnet-34-export.pth (--teacher), here torchvision's [ours]"
_NST_CODE = "the neuron-selectivity code; its teacher is an MXNet ResNet-101, here torchvision's [ours]"
_TUNED = "code never released; the schedule is ours, untuned"


def _nst_family(name: str, student: str, reported: dict[str, str]) -> Iterator[tuple[str, Recipe]]:
    alone = Recipe(student, augmentation="resnext", batch_size=512, nesterov=True, source=_NST_CODE)
    methods = {"": Distillation(), "-kd": Distillation(soft=1.0), "-nst": _NST, "-nst-kd": replace(_NST, soft=1.0)}
    for suffix, method in methods.items():
        teacher = "resnet101" if suffix else None
        yield name + suffix, replace(alone, method=method, teacher=teacher, reported=reported.get(suffix, ""))


def _fine_tuned(name: str, data_set: str) -> Iterator[tuple[str, Recipe]]:
    alone = Recipe(
        "resnet18", data=data_set, pretrained=True, augmentation="gentle", epochs=60, batch_size=64, lr=0.01,
        milestones=(0.5, 0.8), source=_TUNED,
    )  # fmt: skip
    yield name, alone
    yield f"{name}-at", replace(alone, teacher="resnet34", method=_AT)


def _cifar() -> Iterator[tuple[str, Recipe]]:
    """The commands of the attention-transfer README, and AT + KD, which it announces."""
    alone = Recipe(
        "wrn-16-1", data="cifar10", augmentation="", epochs=200, batch_size=128, milestones=(0.3, 0.6, 0.8), drop=0.2,
        weight_decay=5e-4, source="the attention-transfer code",
    )  # fmt: skip
    kd = Distillation(hard=0.1, soft=0.9)
    methods = {"at": _AT, "kd": kd, "at-kd": replace(kd, transfer="at", weight=BetaSchedule("cosine", beta=1000.0))}
    reported = {"wrn-16-1": "accuracy 91.23 %", "wrn-16-2": "accuracy 93.69 %", "wrn-16-1-at": "accuracy 92.07 %"}
    for name in ("wrn-40-1", "wrn-16-2", "wrn-40-2", "wrn-16-1"):
        yield name, replace(alone, student=name, reported=reported.get(name, ""))
    for student, teacher in (("wrn-16-1", "wrn-16-2"), ("wrn-16-2", "wrn-40-2")):
        for suffix, method in methods.items():
            said = reported.get(f"{student}-{suffix}", "")
            yield f"{student}-{suffix}", replace(alone, student=student, teacher=teacher, method=method, reported=said)


RECIPES: dict[str, Recipe] = {
    **dict(_cifar()),
    "resnet18": Recipe("resnet18", reported="top-1/top-5 error 30.4/10.8 %", source=_AT_CODE),
    "resnet18-at": Recipe("resnet18", "resnet34", _AT, reported="top-1/top-5 error 29.3/10.0 %", source=_AT_CODE),
    **dict(
        _nst_family(
            "inception-bn",
            "inception_bn",
            {
                "": "top-1/top-5 error 25.74/8.07 %",
                "-nst": "top-1/top-5 error 24.81/7.55 %",
                "-nst-kd": "top-1/top-5 error 24.34/7.11 %",
            },
        )
    ),
    **dict(_nst_family("resnet50-senet", "resnet50_senet", {"-nst-kd": "top-1/top-5 error 21.05/5.56 %"})),
    **dict(_fine_tuned("scenes", "mit-indoors")),
    **dict(_fine_tuned("cub", "cub-200-2011")),
}
"""The recipes by name; `inception-bn`, `resnet18`, `wrn-16-1`, ... without a suffix train the network alone."""


# Official training images and classes, for plans, which open no archive.
_SIZES = {
    "cifar10": (50_000, 10),
    "imagenet": (IMAGENET_COUNTS.train, IMAGENET_COUNTS.classes),
    "mit-indoors": (67 * 80, 67),
    "cub-200-2011": (5994, 200),
}


@dataclass(frozen=True)
class _Chosen:
    recipe: Recipe
    run: PhotoRun | StudentRun
    images: int
    classes: int
    known: bool  # whether images and classes were counted in the data set


def prepare(
    name: str,
    *,
    data_set: str | None = None,
    data_dir: str | None = None,
    teacher: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    weight: float | None = None,
    size: int | None = None,
    width: float = 1.0,
    precision: str = "fp32",
    local_norm: bool = False,
    seed: int = 0,
    skip_corrupt: bool = False,
    must_exist: bool = True,
) -> _Chosen:
    """The run of a recipe, with what the user changes.

    Args:
        name: one of `RECIPES`.
        data_set: another data set or ImageFolder tree.
        data_dir: the folder it lies in.
        teacher: a weight file or a backbone's name, in place of the recipe's teacher; on CIFAR-10 a wide ResNet, which
            is trained first.
        epochs: another length; the milestones keep their shares.
        batch_size: images per step of all processes together.
        lr: at the start.
        weight: of the transfer loss (AT's beta in the code's scale, NST's lambda) at the start; a recipe whose weight
            decays keeps its schedule.
        size: side of the crops, pixels; 224 unless given. CIFAR-10 has its own.
        width: factor on the student's channels, for trying things out.
        precision: "fp32", "bf16" or "fp16".
        local_norm: batch norm by each process's own images, as the old multi-GPU codes do.
        seed: of everything random.
        skip_corrupt: see `data.load`.
        must_exist: False for a plan, which takes a data set's official counts and opens no archive.

    Raises:
        AFDSError: an unknown name, or a value that cannot be.
    """
    if name not in RECIPES:
        raise AFDSError(f"there is no recipe {name!r}; take one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    for what, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise AFDSError(f"{what} must be a whole number of at least 1, got {value!r}")
    changes = {"data": data_set, "epochs": epochs, "batch_size": batch_size, "lr": lr}
    recipe = replace(recipe, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]
    if teacher is not None and recipe.teacher is None:
        raise AFDSError(f"the recipe {name!r} has no teacher; leave out --teacher, or take one of {_with_teacher()}")
    method = recipe.method
    if weight is not None:
        if method.transfer == "none":
            raise AFDSError(f"the recipe {name!r} has no transfer loss to weigh; leave out --weight")
        method = replace(method, weight=replace(method.weight, beta=weight))
    cifar = recipe.student.startswith("wrn-")
    if cifar:
        _refuse_for_cifar(name, recipe, teacher, size)
    source = Photographs(recipe.data, size or 224, recipe.augmentation, data_dir or "", skip_corrupt)
    images, classes, known = (*_SIZES["cifar10"], False) if cifar else _counted(source, must_exist)
    settings = _optimisation(recipe, images, precision, local_norm)
    run = (
        _cifar_run(recipe, method, settings, teacher, data_dir, width, seed)
        if cifar
        else _photo_run(recipe, method, settings, teacher, source, width, seed)
    )
    return _Chosen(recipe, run, images, classes, known)


def _refuse_for_cifar(name: str, recipe: Recipe, teacher: str | None, size: int | None) -> None:
    """What the other recipes take and those of wide ResNets do not."""
    if recipe.data != "cifar10":
        raise AFDSError(
            f"the recipe {name!r} is for cifar10, not {recipe.data!r}; leave out --data, or take another recipe"
        )
    if size is not None:
        raise AFDSError(f"the recipe {name!r} takes CIFAR-10's images as they are, 32 px; leave out --size")
    if teacher is not None and not teacher.startswith("wrn-"):
        raise AFDSError(
            f"the recipe {name!r} trains its teacher first, so --teacher takes the name of a wide ResNet, such as "
            f"wrn-40-2, not {teacher!r}"
        )


def _photo_run(
    recipe: Recipe, method: Distillation, settings: Optimisation, teacher: str | None, source: Photographs,
    width: float, seed: int,
) -> PhotoRun:  # fmt: skip
    weights = "imagenet" if recipe.pretrained else None
    teaching: PhotoRun | Published | None = None
    if recipe.teacher is not None:
        if teacher is not None:
            teaching = Published.of(teacher)
        elif recipe.pretrained:
            network = Network(recipe.teacher, weights=weights)
            teaching = PhotoRun(source, network, settings, weight_decay=recipe.weight_decay, seed=seed)
        else:
            teaching = Published(recipe.teacher)
    return PhotoRun(
        source, Network(recipe.student, width=width, weights=weights), settings, method, teaching,
        weight_decay=recipe.weight_decay, seed=seed,
    )  # fmt: skip


def _cifar_run(
    recipe: Recipe, method: Distillation, settings: Optimisation, teacher: str | None, data_dir: str | None,
    width: float, seed: int,
) -> StudentRun:  # fmt: skip
    """The run that notebook 06 makes in its profile `paper`, so that neither trains what the other has trained."""
    settings = replace(settings, log_rows=40)
    source = DataSource("cifar10", per_class=5000, root=data_dir or "", padding="reflect")
    teaching = None
    if recipe.teacher is not None:
        network = Network(teacher or recipe.teacher)
        teaching = StudentRun(source, network, settings, weight_decay=recipe.weight_decay)
    return StudentRun(
        replace(source, seed=seed), Network(recipe.student, width=width), settings, method, teaching,
        weight_decay=recipe.weight_decay, seed=seed,
    )  # fmt: skip


def _with_teacher() -> str:
    return ", ".join(name for name, recipe in RECIPES.items() if recipe.teacher)


def _counted(source: Photographs, must_exist: bool) -> tuple[int, int, bool]:
    """Training images and classes, and whether they were counted. A plan extracts and downloads nothing."""
    if not must_exist and source.name in _SIZES:
        return *_SIZES[source.name], False
    splits = source.load(download=must_exist)
    return len(splits.train), len(splits.classes), True


def _optimisation(recipe: Recipe, images: int, precision: str, local_norm: bool) -> Optimisation:
    return Optimisation(
        steps=recipe.epochs * max(1, images // recipe.batch_size),
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        nesterov=recipe.nesterov,
        schedule="milestones",
        drop=recipe.drop,
        milestones=recipe.milestones,
        precision=precision,
        log_rows=recipe.epochs,
        sync_norm=not local_norm,
    )


def plan(chosen: _Chosen, processes: int = 1) -> str:
    """What `prepare` chose, as text: networks, schedule, cost, memory, and what is missing. Trains nothing.

    Args:
        chosen: the recipe's run.
        processes: among which a batch is divided.
    """
    recipe, run = chosen.recipe, chosen.run
    side = run.data.size or 32
    settings, size = run.optimisation, (3, side, side)
    student = replace(run.network, weights=None).build(chosen.classes, run.seed)
    cost, parameters = macs.count(student, size).total, sum(p.numel() for p in student.parameters())
    teacher = None if recipe.teacher is None else _untrained(run.teacher, recipe.teacher)
    theirs = 0.0 if teacher is None else macs.count(teacher, size).total
    trained = isinstance(run.teacher, (PhotoRun, StudentRun))
    passes = 3 * cost + (4 if trained else 1) * theirs
    method, (share, rest) = run.method, divmod(settings.batch_size, processes)
    memory = _activation_bytes(student, size, settings.precision) * share + parameters * 4 * 3
    if teacher is not None:
        memory += sum(p.numel() for p in teacher.parameters()) * 4
    statistics = input_statistics(run.network.name)
    loss = f"{method.hard:g} CE"
    if method.soft:
        loss += f" + {method.soft:g} T^2 KL, T = {method.temperature:g}"
    if method.transfer != "none":
        loss += f" + {method.weight.beta:g} {method.transfer} ({_schedule_text(method.weight)})"
    pairs = () if teacher is None else paired(student, teacher, method, size)
    momentum = f"momentum {settings.momentum:g}{' (Nesterov)' if settings.nesterov else ''}"
    drops = f"lr {settings.lr:g} times {settings.drop:g} after {', '.join(f'{m:.0%}' for m in settings.milestones)}"
    lines = [
        f"student: {run.network.name} at {side} px, {cost / 1e9:.3g} G MACs, {parameters / 1e6:.2f} M "
        "parameters" + (", from torchvision's ImageNet weights" if run.network.weights else ""),
        f"input: mean {statistics.mean}, deviation {statistics.deviation} of RGB values from 0 to 255",
        "teacher: none" if teacher is None else f"teacher: {_teacher_text(run, recipe)}, {theirs / 1e9:.3g} G MACs",
        f"loss: {loss}",
        f"compared: {_pairs_text(pairs)}",
        f"augmentation: {_augmentation_text(run.data)}",
        f"data: {run.data.name}, {chosen.images:,} training images, {chosen.classes:,} classes"
        + ("" if chosen.known else " (official; not counted here)"),
        f"schedule: {recipe.epochs} epochs = {settings.steps:,} steps of {settings.batch_size} images, {drops}, "
        f"{momentum}, weight decay {run.weight_decay:g}, {settings.precision}",
        f"processes: {processes}, {share} images of each batch in each, batch norm over "
        + ("the whole batch" if settings.sync_norm else "each process's images"),
        f"training MACs: {passes * settings.steps * settings.batch_size:.3g}"
        + (", the teacher's own training included" if trained else ""),
        f"memory: about {memory / 2**30:.1f} GiB per process (a rule of thumb: three kept maps per convolution, "
        "weights, gradients, momentum, the teacher's weights)",
        f"sources: {recipe.source}",
    ]
    if recipe.reported:
        lines.append(f"reported: {recipe.reported}; this recipe has not been run in full here")
    missing = list(_missing(chosen, processes, rest))
    lines += ["", "missing on this machine:" if missing else "nothing is missing on this machine"]
    return "\n".join([*lines, *(f"  - {item}" for item in missing)])


def _schedule_text(weight: BetaSchedule) -> str:
    if weight.kind == "constant":
        return "constant"
    if weight.kind == "step":
        return f"step, times {weight.factor:g} at {', '.join(map(str, weight.milestones))}"
    return f"{weight.kind}, to {weight.end:g} at the end" + (f" of {weight.length:,} steps" if weight.length else "")


def _pairs_text(pairs: tuple[Pair, ...]) -> str:
    if not pairs:
        return "no feature maps"
    text = ", ".join(f"{p.student} with {p.teacher} at {p.size[0]}x{p.size[1]}" for p in pairs)
    # Of a block with a residual sum the last batch norm; "bn" alone is all that a pre-activation ReLU takes.
    inner = {name for p in pairs for name in (p.student, p.teacher) if ".bn" in name}
    return text + "".join(f"; {n} is a batch norm before the residual sum, not the ReLU's input" for n in sorted(inner))


def _activation_bytes(model: nn.Module, size: tuple[int, int, int], precision: str) -> int:
    """Bytes per image of what the backward pass needs: each convolution's output, kept three times. [ours]"""
    values: list[int] = []
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output: values.append(output.numel()))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    try:
        macs.count(model, size)
    finally:
        for handle in handles:
            handle.remove()
    return 3 * sum(values) * (2 if precision in ("bf16", "fp16") else 4)


def _augmentation_text(source: Photographs | DataSource) -> str:
    if isinstance(source, DataSource):
        return "crops of an image padded by 4 mirrored pixels, mirrored"
    a = AUGMENTATIONS[source.augmentation]
    return (
        f"{source.augmentation}, crops of {a.area[0]:.0%} to {a.area[1]:.0%} of the area, aspect {a.aspect[0]:.2f} to "
        f"{a.aspect[1]:.2f}, mirrored, jitter {a.jitter:g}, lighting {a.lighting:g}"
    )


def _untrained(teacher: PhotoRun | StudentRun | Published | None, name: str) -> nn.Module:
    """A network of the teacher's form: a file is read, but nothing is downloaded."""
    if isinstance(teacher, Published) and teacher.file:
        return teacher.build()
    if isinstance(teacher, StudentRun):
        return replace(teacher.network, weights=None).build(10, 0)
    return backbones.build(teacher.network if isinstance(teacher, Published) else name, 1000)


def _teacher_text(run: PhotoRun | StudentRun, recipe: Recipe) -> str:
    if isinstance(run.teacher, StudentRun):
        return f"{run.teacher.network.name}, trained first by the same schedule"
    if isinstance(run.teacher, Published):
        return f"the file {run.teacher.file}" if run.teacher.file else f"{run.teacher.network}, torchvision's weights"
    return f"{recipe.teacher}, fine-tuned first by the same schedule"


def _missing(chosen: _Chosen, processes: int, rest: int) -> Iterator[str]:
    run = chosen.run
    if training.device().type == "cpu":
        yield f"a GPU: on this CPU the recipe would take {'days' if isinstance(run, StudentRun) else 'months'}"
    if rest:
        yield f"a batch that {processes} processes can divide: {run.optimisation.batch_size} is no multiple of them"
    if not chosen.known:
        try:
            data.look(run.data.name, run.data.root or None)
        except AFDSError as error:
            yield str(error)
    names = [run.network.name] if run.network.weights else []
    if isinstance(run.teacher, Published):
        names += [run.teacher.network] if run.teacher.network else []
    elif run.teacher is not None and run.teacher.network.weights:
        names.append(run.teacher.network.name)
    for name in names:
        file, url = imagenet_file(name)
        if not file.exists():
            yield f"the ImageNet weights {file.name}, which a run fetches from {url} into {file.parent}"


def evaluate(
    weights: str, *, data_set: str = "imagenet", data_dir: str | None = None, size: int = 224, precision: str = "fp32",
    skip_corrupt: bool = False,
) -> training.Evaluation:
    """Top-1 and top-5 of a trained network on a data set's test part (ImageNet: its validation images).

    Args:
        weights: a file or a backbone's name; see `Published.of`.
        data_set: by name, or the path of an ImageFolder tree.
        data_dir: the folder it lies in.
        size: side of the centre crop, pixels.
        precision: "fp32", "bf16" or "fp16".
        skip_corrupt: see `data.load`.

    Raises:
        AFDSError: weights or data that are missing, or that do not fit each other.
    """
    published = Published.of(weights)
    if not published.file:
        imagenet_file(published.network)  # refuses a backbone without ImageNet weights
    model = published.build().to(training.device()).eval()
    splits = Photographs(data_set, size, root=data_dir or "", skip_corrupt=skip_corrupt).load(input_of(model))
    if classes_of(model) != len(splits.classes):
        raise AFDSError(f"{weights} knows {classes_of(model)} classes and {splits.name} has {len(splits.classes)}")
    return training.evaluate(model, splits.test, precision=precision)
