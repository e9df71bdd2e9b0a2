"""A smaller network for one's own images: `afds run --profile mine`.

The options of that command become a profile of its own, named after the folder of images and a hash of all options, the
images (names, sizes, times) and the weights (content). So another scale, another image or another weight file is
another profile, nothing is overwritten, and the same command goes on where it stopped. The options lie in
`mine/<name>/settings.json` in the run store, from which `profiles.get` makes the profile again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afdslib import afs, data, training
from afdslib.backbones.loading import architecture, read_state
from afdslib.backbones.resnet import LAYOUTS
from afdslib.base import paths
from afdslib.base.atomic import write_json
from afdslib.base.errors import AFDSError
from afdslib.data import fetch, trees
from afdslib.experiments import DataSource, Network
from afdslib.experiments.source import PUBLISHED_CLASSES
from afdslib.studies.profile import Candidates, Profile
from afdslib.studies.statistics import at
from afdslib.training import Optimisation
from afdslib.training.objective import Regulariser

if TYPE_CHECKING:
    import pandas

    from afdslib.studies.sweep import Study

__all__ = ["Export", "Options", "chosen", "export", "get", "keep", "mine", "notebooks", "options"]

BASE = "mine"
COMMAND = f"afds run --profile {BASE} --source-weights imagenet --data-dir path/to/imagefolder --macs-budget 0.2"
STEPS = {"quick": (600, 200, 150), "standard": (3000, 1000, 600)}
"""Optimiser steps of the unpruned stage, of each later budget, and of a trial, by how much of the study is wanted."""
BATCH = 32


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
    folder: str | Path | None, weights: str | None, macs_budget: float | None, *, network: str | None = None,
    size: int = 224, scale: str | None = None, skip_corrupt: bool = False,
) -> Options:  # fmt: skip
    """Checks all that can be checked before the first step, so that no mistake shows after hours.

    Args:
        folder: an ImageFolder tree: train, validation and test folders are used as they are, a flat tree is split.
        weights: "imagenet" (torchvision's), or a file that `backbones.build` takes. A ResNet's stem and width are read
            from the file.
        network: default: what the weight file says of itself, else "resnet50".
        scale: default: "quick".
        macs_budget, size, skip_corrupt: see `Options`.

    Raises:
        AFDSError: a missing or bad value, no such tree, fewer than two classes, too few images, or weights that do not
            fit or cannot be fetched.
    """
    given = {"--source-weights": weights, "--data-dir": folder, "--macs-budget": macs_budget}
    if missing := [name for name, value in given.items() if value is None]:
        raise AFDSError(f"the profile {BASE} needs {' and '.join(missing)}, as in: {COMMAND}")
    assert folder is not None and weights is not None and macs_budget is not None
    if not 0 < macs_budget <= 1:
        raise AFDSError(f"the MACs budget must be a share of the dense MACs above 0 and at most 1, not {macs_budget:g}")
    scale = scale or "quick"
    if scale not in STEPS:
        raise AFDSError(f"unknown scale {scale!r}; known are {', '.join(STEPS)}")
    tree = Path(folder).expanduser().resolve()
    if not tree.is_dir():
        raise AFDSError(f"there is no folder {folder}; give the folder of an ImageFolder tree")
    splits = data.load(str(tree), size=size, skip_corrupt=skip_corrupt)
    if splits.validation is None or not len(splits.validation):
        raise AFDSError(f"the tree {folder} leaves no image for validation; give each class at least 4 images")
    content, stem, width = "", "imagenet", 1.0
    if weights != "imagenet":
        file = Path(weights).expanduser().resolve()
        known = architecture(file) or {}
        network = network or known.get("name", "resnet50")
        same = known.get("name") == network
        stem, width = (known["stem"], float(known["width"])) if same else _shape(network, file)
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
        weights = str(file)
    network = network or "resnet50"
    # Built and converted once, so that weights of another network or one without gates are refused now.
    afs.convert(Network(network, stem=stem, width=width, weights=weights).build(PUBLISHED_CLASSES, 0))
    precision = "bf16" if training.device().type == "cuda" else "fp32"
    return Options(
        str(tree), _images(tree), weights, content, float(macs_budget), network, stem, width, size, scale,
        min(BATCH, len(splits.train)), precision, skip_corrupt,
    )  # fmt: skip


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
    """The profile of some options: AFD against plain L2, both with AFS, from published weights, one target.

    Budgets are halved down to the wanted one. Predictors learn slowly, because one step moves a gate by about one plus
    the squared norm of its input, hundreds in a wide network. There is no source stage: nothing is known of the images
    behind a weight file, so the predictors first learn on the target. [ours]
    """
    transfer, tuning, trial = STEPS[o.scale]
    standard = o.scale == "standard"
    fit = Optimisation(
        steps=transfer, batch_size=o.batch_size, lr=0.01, schedule="cosine", warmup=0.05, predictor_lr=0.1,
        precision=o.precision, log_rows=10,
    )  # fmt: skip
    between = tuple(b for b in (0.5, 0.25, 0.125, 0.0625) if b >= 1.25 * o.macs_budget)
    weights = "imagenet" if not o.content else f"{Path(o.weights).stem}-{o.content}"
    l2, afd = Regulariser("l2", 1e-4), Regulariser("afd", 1e-3, classifier_decay=0.01)
    return Profile(
        name=o.name, scale=o.scale,
        source=DataSource(weights),  # never read; its name makes other weights other runs
        targets=(DataSource(o.folder, size=o.size, content=o.images, skip_corrupt=o.skip_corrupt),),
        network=Network(o.network, stem=o.stem, width=o.width, weights=o.weights),
        source_training=replace(fit, steps=0), source_weight_decay=1e-4, afs_training=replace(fit, steps=0),
        candidates=(
            Candidates(l2, (1e-4, 1e-3, 1e-2) if standard else (1e-4, 1e-2)),
            Candidates(afd, (1e-3, 1e-2, 1e-1) if standard else (1e-3, 1e-1)),
        ),
        trial=replace(fit, steps=trial, log_rows=1), trial_seed=1000, transfer=fit,
        tuning=replace(fit, steps=tuning, warmup=0.0, log_rows=2), seeds=(0, 1, 2) if standard else (0,),
        budgets=tuple(dict.fromkeys((1.0, *between, o.macs_budget))), delta_s=0.001, density_floor=0.2,
        committed=False, left_out=("06", "07"),
    )  # fmt: skip


def notebooks() -> Path:
    """The folder of the one notebook that makes the report."""
    return paths.root() / "examples" / "own_data"


def keep(o: Options) -> Path:
    """Writes the options to where `get` reads them."""
    file = _settings(o.name)
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


@dataclass(frozen=True)
class Export:
    """The exported network.

    Attributes:
        path: the file.
        method, budget: the regulariser it was trained with, "afd" or "l2"; the share of MACs it was to reach.
        macs, accuracy: measured on the test images: shares of the dense MACs, and of images.
        unpruned: accuracy of the unpruned network of the same method and seed.
    """

    path: Path
    method: str
    budget: float
    macs: float
    accuracy: float
    unpruned: float


def chosen(table: pandas.DataFrame, budget: float) -> Any:
    """The row of the network that is most accurate on validation images at a budget; the first of equals.

    Args:
        table: from `Study.sweep`.
        budget: of the sweep.

    Raises:
        AFDSError: no network has reached it.
    """
    rows = at(table, budget)
    if rows.empty:
        why = next((gap["reason"] for gap in table.attrs.get("missing", ())), "it is not in the sweep")
        raise AFDSError(f"no network reached {budget:g} of the dense MACs ({why}); ask for a larger --macs-budget")
    return rows.sort_values("validation_accuracy", ascending=False, kind="stable").iloc[0]


def export(study: Study) -> Export:
    """Writes the best network at the wanted budget next to the report: as ONNX where its packages are installed.

    The validation images choose between the methods and seeds. [ours]

    Raises:
        AFDSError: no network reached the budget.
    """
    from afdslib.inference.export import export_run

    p, table = study.profile, study.sweep()
    row = chosen(table, wanted := p.budgets[-1])
    unpruned = at(table[(table.method == row.method) & (table.seed == row.seed)], 1.0)
    onnx = all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
    tree = p.name.removeprefix(f"{BASE}-").rpartition("-")[0]  # a profile's name is "mine-<tree>-<hash>"
    path = paths.figures(p.name) / f"{tree}-{wanted:g}{'.onnx' if onnx else '.safetensors'}"
    path, _ = export_run(row.run, "onnx" if onnx else "torch", path)
    accuracy = float(unpruned.test_accuracy.iloc[0])
    return Export(path, row.method, wanted, float(row.macs), float(row.test_accuracy), accuracy)
