"""The command line `afds`.

A mistake that a user can mend ends in one line on stderr and exit code 2; anything else is a bug and shows a traceback.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option, echo

from afdslib import __version__
from afdslib.base.atomic import output_path
from afdslib.base.errors import AFDSError

__all__ = ["app", "main"]

app = typer.Typer(
    name="afds", help="AFDS (ICLR 2020): a reproducibility report that runs.", add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
runs_app = typer.Typer(help="The run store: list, show and delete training runs.", rich_markup_mode=None)
app.add_typer(runs_app, name="runs")

# The base class of everything typer says about wrong usage; typer exports only this subclass of it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

ProfileName = Annotated[
    str, Option("--profile", help="A study: demo, imagenet32, imagenet32-disjoint, paper; mine: your own images.")
]
Scale = Annotated[str | None, Option(help="How much of the study: quick (the default) or standard.")]
SkipCorrupt = Annotated[bool, Option("--skip-corrupt", help="Go on without images that cannot be decoded.")]
DataDir = Annotated[str | None, Option(help="Folder with archives or image trees; it may be read-only.")]
Show = Annotated[bool, Option("--show", help="Show every setting and stop.")]
DryRun = Annotated[bool, Option("--dry-run", help="Show the plan and what is missing, and stop.")]
RequireTraining = Annotated[bool, Option("--require-training", help="Fail if the run store holds no training step.")]
Precision = Annotated[str, Option(help="fp32, bf16 or fp16.")]
RunId = Annotated[str, Argument(help="The run, or the beginning of its id.")]
Texts = list[str] | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 after a mistake of the user, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(arguments, prog_name="afds", standalone_mode=False)
    except (AFDSError, OSError, _UsageError) as error:
        print("afds:", re.sub(r"\s*[\r\n]+\s*", " ", _message(error)), file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        print("afds: interrupted; what was being trained goes on when the command is repeated", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror or error}: {error.filename}"
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "afds"
        return f"{error.format_message()} See: {command} --help"  # type: ignore[attr-defined]
    return str(error)


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"afds {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    several = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if several and (command := context.invoked_subcommand) not in ("distill", "evaluate"):
        shared = "several processes share the commands distill and evaluate only"
        raise AFDSError(f"{shared}; start afds {command} without a launcher")


@app.command()
def run(
    profile: ProfileName, scale: Scale = None, data_dir: DataDir = None, show: Show = False, dry_run: DryRun = False,
    require_training: RequireTraining = False, skip_corrupt: SkipCorrupt = False,
    fresh: Annotated[bool, Option("--fresh", help="Execute finished notebooks again, too.")] = False,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Show what the notebooks print.")] = False,
    notebook: Annotated[Texts, Option(metavar="NN", help="Only the notebook of this number; repeatable.")] = None,
    settings: Annotated[Texts, Option("--set", metavar="NAME=VALUE", help="Another notebook parameter.")] = None,
    source_weights: Annotated[str | None, Option(help="mine: imagenet (the default), or a weight file.")] = None,
    macs_budget: Annotated[float | None, Option(help="mine: share of the MACs to keep; default: 0.2.")] = None,
    network: Annotated[str | None, Option(help="mine: backbone; default: the file's, or efficientnet_lite0.")] = None,
    size: Annotated[int | None, Option(min=8, help="mine: side of the images; default: 128, on a GPU 224.")] = None,
) -> None:  # fmt: skip
    """Execute the notebooks of a study in order, from the last finished one, and write its report.

    With --profile mine: a smaller network for your own images (--data-dir, an ImageFolder tree), a report, and the
    network's files.
    """
    if profile.startswith("mine"):  # threads that spin while they wait make a busy machine many times slower
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from afdslib.studies import profiles

    parameters = _assignments(settings or [])
    own = {
        "source_weights": source_weights, "macs_budget": macs_budget, "network": network, "size": size,
        "skip_corrupt": skip_corrupt or None,
    }  # fmt: skip
    own = {name: value for name, value in own.items() if value is not None}
    if own and profile != "mine":
        raise AFDSError(f"--{next(iter(own)).replace('_', '-')} is for --profile mine only; leave it out")
    for name, value in (("scale", scale), ("data_dir", data_dir)):
        if value is not None and name in parameters:
            raise AFDSError(f"{name} is given twice, by --{name.replace('_', '-')} and by --set; give it once")
        parameters |= {} if value is None else {name: value}
    if profile == "mine":
        chosen = _mine(parameters.pop("scale", None), parameters.pop("data_dir", None), own, show or dry_run)
        profile = chosen.name
    else:
        chosen = profiles.get(profile, parameters.get("scale"), _folder(parameters.get("data_dir")))
    if show:
        echo(profiles.show(chosen))
        return
    from afdslib import runs
    from afdslib.report import pipeline
    from afdslib.studies import mine
    from afdslib.studies.sweep import Study

    folder = _notebooks(profile)
    if dry_run:
        pipeline.plan(profile, parameters, only=set(notebook or ()) or None, folder=folder)
        echo(Study(chosen).describe() if folder is None else mine.Recipe(chosen).describe())
        return
    if folder is not None:
        _train_mine(chosen)
    only = set(notebook or ()) or {path.name[:2] for path in pipeline.notebooks(folder)} - set(chosen.left_out)
    pipeline.execute(profile, parameters, only=only, fresh=fresh, verbose=verbose, echo=echo, folder=folder)
    if folder is None and not notebook and chosen.left_out:
        numbers = " ".join(f"--notebook {number}" for number in chosen.left_out)
        echo(f"left out of this scale, because it takes hours: {numbers}")
    if require_training:
        echo(_steps(runs.require_training()))


def _assignments(texts: list[str]) -> dict[str, str]:
    """Notebook parameters by name, from NAME=VALUE."""
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise AFDSError(f"--set {text!r} is not of the form NAME=VALUE; write for instance --set lr=0.01")
        if name.strip() in values or name.strip() == "profile":
            raise AFDSError(f"{name.strip()} is given twice; give it once")
        values[name.strip()] = value
    return values


def _folder(data_dir: str | None) -> str | None:
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise AFDSError(f"the data folder {data_dir} does not exist: create it, or give another")
    return data_dir


def _mine(scale: str | None, data_dir: str | None, own: dict[str, Any], only_look: bool) -> Any:
    """The profile of one's own images, kept unless it is only looked at."""
    from afdslib.studies import mine

    weights, macs_budget = own.pop("source_weights", None), own.pop("macs_budget", None)
    options = mine.options(_folder(data_dir), weights, macs_budget, scale=scale, fetch=not only_look, **own)
    if only_look and (missing := mine.lacking(options)):
        echo(f"missing: {missing}", err=True)
    if not only_look:
        mine.keep(options)
        where = "a GPU" if options.precision == "bf16" else "a CPU"
        echo(
            f"profile {options.name}: {options.network} at {options.size} px, as this is {where}; the budget is "
            f"{options.macs_budget:g} of its MACs"
        )
    return mine.mine(options)


def _notebooks(profile: str) -> Path | None:
    """The folder of a profile's notebooks, if it has notebooks of its own."""
    from afdslib.studies import mine

    return mine.notebooks() if profile == "mine" or profile.startswith("mine-") else None


def _train_mine(profile: Any) -> None:
    from afdslib.base import paths
    from afdslib.studies import mine

    recipe = mine.Recipe(profile)
    echo(f"{recipe.splits}: all of them can be decoded")
    mine.compute(recipe, echo)
    echo("writing and measuring the files")
    found = mine.deliver(recipe)
    first, last = found["points"][0], found["points"][-1]
    echo(
        f"test accuracy {first['test_accuracy']:.1%} unpruned ({first['macs']:.1f} M MACs), "
        f"{last['test_accuracy']:.1%} at {last['macs'] / first['macs']:.3g} of its MACs"
    )
    for one in found["files"]:
        path = paths.figures(profile.name) / one["file"]
        echo(
            f"network: {path} ({one['precision']}, {one['bytes'] / 1e6:.1f} MB): {one['accuracy']:.1%} of the test "
            f"images, {one['milliseconds']:.1f} ms for one"
        )
        echo(f"use it: afds predict --model {shlex.quote(str(path))} IMAGE_OR_FOLDER...")


@app.command()
def study(
    profile: ProfileName = "demo", scale: Scale = None, data_dir: DataDir = None, show: Show = False,
    dry_run: DryRun = False,
    part: Annotated[str, Option(help="sweep, comparison, ablations, attention, selectivity or speed.")] = "sweep",
    workers: Annotated[int | None, Option(min=1, help="Processes here; default: as many as fit.")] = None,
    target: Annotated[str | None, Option(help="comparison, ablations: a target by title.")] = None,
    finished: Annotated[bool, Option("--finished", help="Train nothing: say what is finished.")] = False,
) -> None:  # fmt: skip
    """Compute one part of a study without notebooks (what is not computed yet), and say what came of it.

    Machines that share the run store (AFDS_RUNS) do one part between them by giving this same command.
    """
    from afdslib.studies import engine, parts

    for plan in parts.plans(part, profile, scale, _folder(data_dir), target):
        if not (show or dry_run or finished):
            engine.compute(plan, workers)
        echo(plan.show() if show else plan.describe() if dry_run else plan.summary())


@app.command()
def publish(
    profile: ProfileName, scale: Scale = None, data_dir: DataDir = None,
    part: Annotated[Texts, Option(help="A part of the study, see afds study; repeatable; default: all.")] = None,
) -> None:  # fmt: skip
    """Write what is committed of a study, as far as it is finished: runs, rows of results.csv, networks, pages."""
    from afdslib.report import pages
    from afdslib.studies import engine, parts, profiles

    if not profiles.get(profile, scale, _folder(data_dir)).committed:
        raise AFDSError(f"results and networks of the profile {profile} are never committed")
    for name in part or parts.of(profile):
        for plan in parts.plans(name, profile, scale, data_dir):
            for file in (engine.publish(plan), *pages.write(plan)):
                echo(f"{name}: written to {file}")


@app.command()
def report(profile: ProfileName) -> None:
    """Write the HTML report of an executed study again."""
    from afdslib.report import pipeline

    echo(pipeline.render(profile, folder=_notebooks(profile)))


@app.command()
def distill(
    recipe: Annotated[str, Option(help="resnet18-at, inception-bn-nst-kd, scenes-at, ...")],
    data_dir: DataDir = None, precision: Precision = "fp32", skip_corrupt: SkipCorrupt = False, dry_run: DryRun = False,
    data: Annotated[str | None, Option(help="Another data set, or the path of a tree.")] = None,
    teacher: Annotated[str | None, Option(help="A weight file, or a backbone with torchvision's weights.")] = None,
    epochs: Annotated[int | None, Option(min=1)] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Images per step of all processes together.")] = None,
    lr: Annotated[float | None, Option(help="Learning rate at the start.")] = None,
    weight: Annotated[float | None, Option(help="Of the transfer loss: AT's beta, NST's lambda.")] = None,
    size: Annotated[int | None, Option(min=8, help="Side of the crops in pixels, 224 unless given.")] = None,
    width: Annotated[float, Option(help="Factor on the student's channels, for trying things out.")] = 1.0,
    local_norm: Annotated[bool, Option("--local-norm", help="Batch norm over each process's images.")] = False,
    seed: Annotated[int, Option(min=0)] = 0,
) -> None:  # fmt: skip
    """Train a student with its teacher on photographs; several processes by torchrun or fabric run."""
    from afdslib.studies import recipes
    from afdslib.training import distributed

    chosen = recipes.prepare(
        recipe, data_set=data, data_dir=_folder(data_dir), teacher=teacher, epochs=epochs, batch_size=batch_size, lr=lr,
        weight=weight, size=size, width=width, precision=precision, local_norm=local_norm, seed=seed,
        skip_corrupt=skip_corrupt, must_exist=not dry_run,
    )  # fmt: skip
    if dry_run:
        if distributed.leads():
            echo(recipes.plan(chosen, distributed.launched()))
        return
    with distributed.joined():
        result = distributed.get_or_run(chosen.run)
    if distributed.leads():
        echo(json.dumps({"id": result.id, **result.metrics}, indent=2))


def _outputs(classes: str | None) -> dict[str, int] | None:
    """From "ants=310,bees=309"."""
    if classes is None:
        return None
    pairs = [part.rpartition("=") for part in classes.split(",")]
    if not all(name and output.isdecimal() for name, _, output in pairs):
        raise AFDSError(f"--classes {classes!r} is not of the form NAME=OUTPUT,NAME=OUTPUT")
    return {name: int(output) for name, _, output in pairs}


@app.command()
def evaluate(
    weights: Annotated[str, Argument(help="A weight file, or a backbone with torchvision's weights.")],
    data_dir: DataDir = None, precision: Precision = "fp32", skip_corrupt: SkipCorrupt = False,
    data: Annotated[str, Option(help="A data set, or the path of an image tree.")] = "imagenet",
    size: Annotated[int, Option(min=8, help="Side of the centre crop in pixels.")] = 224,
    classes: Annotated[
        str | None, Option(help="Outputs of the network that stand for the data's classes: ants=310,bees=309.")
    ] = None,
) -> None:  # fmt: skip
    """Top-1 and top-5 error of trained weights on a data set's test images (ImageNet: its validation images)."""
    from afdslib.studies import recipes
    from afdslib.training import distributed

    folder = _folder(data_dir)
    with distributed.joined():
        measured = recipes.evaluate(
            weights, data_set=data, data_dir=folder, size=size, precision=precision, skip_corrupt=skip_corrupt,
            classes=_outputs(classes),
        )  # fmt: skip
    if distributed.leads():
        echo(
            f"{weights}: top-1 error {1 - measured.accuracy:.2%}, top-5 error {1 - measured.top5_accuracy:.2%}, "
            f"loss {measured.loss:.4f}, {sum(map(sum, measured.confusion)):,} images"
        )


@app.command()
def maps(
    networks: Annotated[list[str], Argument(metavar="[NAME=]FILE...", help="Weight files or torchvision's backbones.")],
    output: Annotated[str, Option(help="The PNG to write.")],
    image: Annotated[str | None, Option(help="An image file.")] = None,
    data: Annotated[str | None, Option(help="A data set, for a test image and the classes.")] = None,
    index: Annotated[int, Option(min=0, help="Of the test image.")] = 0,
    size: Annotated[int, Option(min=8, help="Side of the image in pixels.")] = 32,
    data_dir: DataDir = None, skip_corrupt: SkipCorrupt = False,
) -> None:  # fmt: skip
    """Draw what networks attend to in an image: the activation map of each stage, and the loss's gradient."""
    from afdslib.inference.maps import view
    from afdslib.report.plots import draw_maps

    output_path(output)
    views = view(networks, image, data, index, size, data_dir, skip_corrupt=skip_corrupt)
    echo(f"written to {draw_maps(views, output)}")


@runs_app.command("list")
def list_runs(
    require_training: RequireTraining = False,
    committed: Annotated[bool, Option("--committed", help="The runs below data/results instead.")] = False,
) -> None:
    """All runs, oldest first: id, kind, state, optimiser steps, wall clock."""
    from afdslib import runs
    from afdslib.base import paths

    rows = []
    for run in runs.list_committed() if committed else runs.list_runs():
        seconds = "-" if run.seconds is None else f"{run.seconds:.0f} s"
        rows.append((run.id, run.kind, run.state, "-" if run.steps is None else str(run.steps), seconds))
    _table(("id", "kind", "state", "steps", "time"), rows)
    echo(f"{len(rows)} runs in {paths.results('*') if committed else paths.runs()}")
    if require_training:
        echo(_steps(runs.require_training()))


@runs_app.command("show")
def show_run(id: RunId) -> None:
    """Configuration, metrics, environment, times and files of one run, as JSON."""
    from afdslib import runs

    echo(json.dumps(runs.show(id), indent=2))


@runs_app.command("rm")
def remove_runs(ids: Annotated[list[str], Argument(metavar="ID...", help="Runs to delete.")]) -> None:
    """Delete runs: a later call computes them anew."""
    from afdslib import runs

    for id in ids:
        echo(f"deleted {runs.remove(id)}")


@app.command()
def resume(id: RunId) -> None:
    """Continue an interrupted training run from its last checkpoint."""
    import afdslib.experiments  # noqa: F401  (it registers the kinds of runs)
    from afdslib import runs

    echo(json.dumps(runs.resume(id).metrics, indent=2))


@app.command()
def data(
    name: Annotated[str, Argument(help="A data set by name, or the path of an image tree or archive.")],
    root: DataDir = None,
    per_class: Annotated[int | None, Option(help="Fitting images per class.")] = None,
    labels: Annotated[str | None, Option(help="imagenet: the devkit, or a CSV of image and class.")] = None,
    subset: Annotated[bool, Option("--subset", help="imagenet: accept a part of it.")] = False,
    skip_corrupt: SkipCorrupt = False,
) -> None:
    """Fetch, verify, extract and decode a data set, and describe its splits.

    imagenet: sort the flat validation folder into classes (files are moved) and check the counts of the tree.
    """
    from afdslib import data as datasets
    from afdslib.base import paths
    from afdslib.data import imagenet

    if name == "imagenet":
        place = _folder(root) or str(paths.raw_data())
        folder, moved, counts = imagenet.arrange(place, labels, expected=None if subset else imagenet.IMAGENET)
        echo(f"{folder}: {counts}" + (f"; {moved:,} images sorted into their classes" if moved else ""))
        return
    if labels is not None or subset:
        raise AFDSError(f"--labels and --subset are for imagenet only, not for {name}; leave them out")
    datasets.prepare(name, root, per_class=per_class, skip_corrupt=skip_corrupt)


@app.command()
def bench(
    case: Annotated[Texts, Option(help="networks, dynamic, gates, training, losses, loading, memory.")] = None,
    network: Annotated[Texts, Option(help="Backbones; default: resnet50.")] = None,
    batch: Annotated[list[int] | None, Option(min=1, help="Batch sizes; default: 1.")] = None,
    runtime: Annotated[Texts, Option(help="eager, compiled, onnxruntime; default: eager.")] = None,
    threads: Annotated[int, Option(min=1, help="Threads of torch and onnxruntime.")] = 1,
    repeats: Annotated[int, Option(min=1, help="Measured rounds, each on another image.")] = 5,
    size: Annotated[int, Option(min=8, help="Side of the images in pixels.")] = 224,
    keep: Annotated[float, Option(help="Share of the inner channels of the compact network.")] = 0.2,
    stream: Annotated[float, Option(help="Share of the residual streams' channels.")] = 0.75,
    multiple: Annotated[int, Option(min=1, help="Kept channels are rounded to a multiple.")] = 16,
    density: Annotated[float, Option(help="Density d of the dynamic case.")] = 0.3,
    weights: Annotated[str | None, Option(help="A network of afs.save, with masks of its own.")] = None,
    masks: Annotated[Texts, Option(help="Masks of afds publish --part speed, each a network.")] = None,
    train_size: Annotated[int, Option(min=8, help="Side of the images of training steps.")] = 64,
    train_batch: Annotated[int, Option(min=2, help="Images per training step.")] = 16,
    width: Annotated[float, Option(help="Factor on all channels, for quick looks.")] = 1.0,
    full: Annotated[bool, Option("--full", help="ResNet-50 and -101, batch 1 and 16, all runtimes.")] = False,
    out: Annotated[str | None, Option(help="The CSV file to write.")] = None,
) -> None:
    """Measure networks, training steps, losses and data loading side by side: medians, quartiles, ratios."""
    from afdslib.inference import bench as benchmarks

    settings = benchmarks.Settings(
        networks=tuple(network or (("resnet50", "resnet101") if full else ("resnet50",))),
        batches=tuple(batch or ((1, 16) if full else (1,))),
        runtimes=tuple(runtime or (benchmarks.RUNTIMES if full else ("eager",))),
        size=size, threads=threads, repeats=repeats, keep=keep, stream=stream, multiple=multiple, density=density,
        weights=weights, masks=tuple(masks or ()), train_size=train_size, train_batch=train_batch, width=width,
    )  # fmt: skip
    echo("  ".join(f"{key}: {value}" for key, value in benchmarks.environment(settings).items()))
    if out is not None:
        output_path(out)
    measured: list[benchmarks.Row] = []

    def show(row: benchmarks.Row) -> None:
        echo(benchmarks.describe(row))
        measured.append(row)
        if out is not None:
            benchmarks.to_csv(measured, settings, out)  # after each row: measuring takes long

    benchmarks.run(case or list(benchmarks.CASES), settings, show)
    if out is not None:
        echo(f"written to {out}")


@app.command()
def export(
    run: Annotated[str, Option(help="A finished run, or the beginning of its id.")],
    format: Annotated[str, Option(help="onnx, onnx-int8 or torch (safetensors).")] = "onnx",
    out: Annotated[str | None, Option(help="The file; default: the run's id in the working folder.")] = None,
) -> None:
    """Write a run's network without its removed channels, with class names and preprocessing, to one file."""
    import afdslib.experiments  # noqa: F401  (it registers the kinds of runs)
    from afdslib.inference.export import export_run

    path, card = export_run(run, format, out)
    left = f", {len(card.fp32)} layers of it in fp32" if card.fp32 else ""
    about = f"{len(card.classes)} classes, {card.side or card.size} px, {card.precision}{left}"
    echo(f"{path}: {card.network}, {about}, {path.stat().st_size:,} bytes")


@app.command()
def predict(
    images: Annotated[list[str], Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    model: Annotated[str, Option(help="A file of afds export.")],
    top: Annotated[int, Option(min=1, help="How many classes to show.")] = 5,
) -> None:
    """Print the likeliest classes of images by an exported network."""
    from afdslib.inference.predict import predict as classify

    classified = classify(images, model, top=top)
    rows = [(path, name, f"{share:.1%}") for path, classes in classified for name, share in classes]
    _table(("image", "class", "probability"), rows)


@app.command()
def doctor(data_dir: DataDir = None) -> None:
    """Show versions, devices, folders and data sets of this machine."""
    from afdslib.studies.doctor import examine

    _table(("what", "state", "detail"), examine(data_dir))


def _steps(steps: dict[str, int]) -> str:
    return "training steps: " + ", ".join(f"{kind} {number}" for kind, number in sorted(steps.items()))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned columns; the last one may be as long as it is."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
