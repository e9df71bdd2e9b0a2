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

from afdslib import __version__
from afdslib.base.atomic import output_path
from afdslib.base.errors import AFDSError

__all__ = ["app", "main"]

app = typer.Typer(
    name="afds",
    help="AFDS (ICLR 2020): a reproducibility report that runs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
runs_app = typer.Typer(help="The run store: list, show and delete training runs.", rich_markup_mode=None)
app.add_typer(runs_app, name="runs")

# The base class of everything typer says about wrong usage; typer exports only this subclass of it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

ProfileName = Annotated[
    str, typer.Option("--profile", help="A study: demo, imagenet32, imagenet32-disjoint, paper; mine: your own images.")
]
Scale = Annotated[str | None, typer.Option(help="How much of the study: quick (the default) or standard.")]
SkipCorrupt = Annotated[bool, typer.Option("--skip-corrupt", help="Go on without images that cannot be decoded.")]
DataDir = Annotated[str | None, typer.Option(help="Folder with archives or image trees; it may be read-only.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 after a mistake of the user, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(arguments, prog_name="afds", standalone_mode=False)
    except (AFDSError, OSError, _UsageError) as error:
        return _complain(error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        print("afds: interrupted; what was being trained goes on when the command is repeated", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _complain(error: Exception) -> int:
    if isinstance(error, OSError):
        message = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    elif isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "afds"
        message = f"{error.format_message()} See: {command} --help"  # type: ignore[attr-defined]
    else:
        message = str(error)
    print("afds:", re.sub(r"\s*[\r\n]+\s*", " ", message), file=sys.stderr)
    return 2


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"afds {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    shared = ("distill", "evaluate")
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        if context.invoked_subcommand not in shared:
            raise AFDSError(
                f"several processes share the commands {' and '.join(shared)} only; start afds "
                f"{context.invoked_subcommand} without a launcher"
            )


# ---------------------------------------------------------------------------------------------------------- the study


@app.command()
def run(
    profile: ProfileName,
    scale: Scale = None,
    data_dir: DataDir = None,
    show: Annotated[bool, typer.Option("--show", help="Show the whole profile and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and what is missing, and stop.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Execute finished notebooks again, too.")] = False,
    require_training: Annotated[
        bool, typer.Option("--require-training", help="Fail if the run store holds no training step afterwards.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the notebooks print.")] = False,
    notebook: Annotated[
        list[str] | None, typer.Option("--notebook", metavar="NN", help="Only the notebook of this number; repeatable.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another notebook parameter.")
    ] = None,
    source_weights: Annotated[
        str | None, typer.Option(help="mine: imagenet (torchvision's), or a weight file.")
    ] = None,
    macs_budget: Annotated[float | None, typer.Option(help="mine: share of the MACs to keep, e.g. 0.2.")] = None,
    network: Annotated[str | None, typer.Option(help="mine: backbone; default: the file's own, or resnet50.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="mine: side of the images; default: 224 pixels.")] = None,
    skip_corrupt: SkipCorrupt = False,
) -> None:
    """Execute the notebooks of a study in order, from the last finished one, and write its report.

    With --profile mine: a smaller network for your own images (--data-dir, an ImageFolder tree), a report, and the
    network as one file.
    """
    parameters = _assignments(settings or [])
    own = {"source_weights": source_weights, "macs_budget": macs_budget, "network": network, "size": size}
    own = {name: value for name, value in own.items() if value is not None}
    own |= {"skip_corrupt": True} if skip_corrupt else {}
    if own and profile != "mine":
        raise AFDSError(f"--{next(iter(own)).replace('_', '-')} is for --profile mine only; leave it out")
    for name, value in (("scale", scale), ("data_dir", data_dir)):
        if value is not None:
            if name in parameters:
                raise AFDSError(f"{name} is given twice, by --{name.replace('_', '-')} and by --set; give it once")
            parameters[name] = value
    if profile == "mine":
        chosen = _mine(parameters, own, write=not (show or dry_run))
        profile, parameters = chosen.name, {k: v for k, v in parameters.items() if k not in ("scale", "data_dir")}
    else:
        chosen = _profile(profile, parameters.get("scale"), parameters.get("data_dir"))
    if show:
        from afdslib.studies import profiles

        typer.echo(profiles.show(chosen))
        return
    if dry_run:
        from afdslib.report import pipeline
        from afdslib.studies.sweep import Study

        pipeline.plan(profile, parameters, only=set(notebook or ()) or None, folder=_notebooks(profile))
        typer.echo(Study(chosen).describe())
        return
    from afdslib import runs
    from afdslib.report import pipeline

    folder = _notebooks(profile)
    only = set(notebook) if notebook else {path.name[:2] for path in pipeline.notebooks(folder)} - set(chosen.left_out)
    given = {} if folder is None else {"folder": folder}
    pipeline.execute(profile, parameters, only=only, fresh=fresh, verbose=verbose, echo=typer.echo, **given)
    if folder is not None:
        _export_mine(chosen)
    elif not notebook and chosen.left_out:
        numbers = " ".join(f"--notebook {number}" for number in chosen.left_out)
        typer.echo(f"left out of this scale, because it takes hours: {numbers}")
    if require_training:
        typer.echo(f"training steps: {_count(runs.require_training())}")


@app.command()
def study(
    profile: ProfileName = "demo",
    scale: Scale = None,
    part: Annotated[
        str, typer.Option(help="sweep, comparison, ablations, attention (notebook 06), selectivity (07) or speed.")
    ] = "sweep",
    data_dir: DataDir = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes here, one thread each if several; default: as many as fit.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="comparison, ablations: a target by title.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Show every setting and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show runs and steps, and stop.")] = False,
    finished: Annotated[bool, typer.Option("--finished", help="Train nothing: say what is finished.")] = False,
) -> None:
    """Compute one part of a study without notebooks (what is not computed yet), and say what came of it.

    Machines that share the run store (AFDS_RUNS) do one part between them by giving this same command.
    """
    from afdslib.studies import engine, parts

    for plan in parts.plans(part, profile, scale, _folder(data_dir), target):
        if show:
            typer.echo(plan.show())
        elif dry_run:
            typer.echo(plan.describe())
        else:
            if not finished:
                engine.compute(plan, workers)
            typer.echo(plan.summary())


@app.command()
def publish(
    profile: ProfileName,
    scale: Scale = None,
    part: Annotated[
        list[str] | None, typer.Option(help="A part of the study, see afds study; repeatable; default: all.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Write what is committed of a study, as far as it is finished: runs, rows of results.csv, networks, pages."""
    from afdslib.report import pages
    from afdslib.studies import engine, parts, profiles

    chosen = profiles.get(profile, scale, _folder(data_dir))
    if not chosen.committed:
        raise AFDSError(f"results and networks of the profile {profile} are never committed")
    for name in part or [name for name in parts.PARTS if name != "speed"]:
        for plan in parts.plans(name, profile, scale, data_dir):
            for file in (engine.publish(plan), *pages.write(plan)):
                typer.echo(f"{name}: written to {file}")


@app.command()
def report(profile: ProfileName) -> None:
    """Write the HTML report of an executed study again."""
    from afdslib.report import pipeline

    typer.echo(pipeline.render(profile, folder=_notebooks(profile)))


@app.command()
def resume(id: Annotated[str, typer.Argument(help="The run, or the beginning of its id.")]) -> None:
    """Continue an interrupted training run from its last checkpoint."""
    import afdslib.experiments  # noqa: F401  (it registers the kinds of runs)
    from afdslib import runs

    result = runs.resume(id)
    typer.echo(json.dumps(result.metrics, indent=2))


def _profile(name: str, scale: str | None, data_dir: str | None) -> Any:
    """The profile, checked: only what was given is passed on, so that defaults stay in one place."""
    from afdslib.studies import profiles

    given = {"scale": scale, "data_dir": _folder(data_dir)}
    return profiles.get(name, **{key: value for key, value in given.items() if value is not None})


def _mine(parameters: dict[str, str], own: dict[str, Any], *, write: bool) -> Any:
    """The profile of one's own images, from the options of `afds run`."""
    from afdslib.studies import mine as own_data

    weights, macs_budget = own.pop("source_weights", None), own.pop("macs_budget", None)
    folder, scale = _folder(parameters.get("data_dir")), parameters.get("scale")
    options = own_data.options(folder, weights, macs_budget, scale=scale, **own)
    if write:
        own_data.keep(options)
        typer.echo(f"profile {options.name}")
    return own_data.mine(options)


def _notebooks(profile: str) -> Path | None:
    """The folder of a profile's notebooks, if it has notebooks of its own."""
    if profile != "mine" and not profile.startswith("mine-"):
        return None
    from afdslib.studies import mine as own_data

    return own_data.notebooks()


def _export_mine(profile: Any) -> None:
    from afdslib.studies import mine as own_data
    from afdslib.studies.sweep import Study

    done = own_data.export(Study(profile))
    typer.echo(
        f"network: {done.path}, by {done.method}: {done.macs:.1%} of the dense MACs, test accuracy {done.accuracy:.1%} "
        f"(unpruned {done.unpruned:.1%})"
    )
    typer.echo(f"use it: afds predict --model {shlex.quote(str(done.path))} IMAGE...")


def _assignments(texts: list[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise AFDSError(f"--set {text!r} is not of the form NAME=VALUE; write for instance --set lr=0.01")
        if name.strip() in values or name.strip() == "profile":
            raise AFDSError(f"{name.strip()} is given twice; give it once")
        values[name.strip()] = value
    return values


# ----------------------------------------------------------------------------------------------- teachers and students


@app.command()
def distill(
    recipe: Annotated[str, typer.Option("--recipe", help="resnet18-at, inception-bn-nst-kd, scenes-at, ...")],
    data_dir: DataDir = None,
    data: Annotated[str | None, typer.Option("--data", help="Another data set, or the path of a tree.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A weight file, or a backbone with torchvision's weights; for CIFAR-10 wrn-d-k.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step of all processes together.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at the start.")] = None,
    weight: Annotated[float | None, typer.Option(help="Of the transfer loss: AT's beta, NST's lambda.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Side of the crops in pixels, 224 unless given.")] = None,
    width: Annotated[float, typer.Option(help="Factor on the student's channels, for trying things out.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    local_norm: Annotated[
        bool, typer.Option("--local-norm", help="Batch norm over each process's images, as in the old codes.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    skip_corrupt: SkipCorrupt = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and what is missing, and stop.")] = False,
) -> None:
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
            typer.echo(recipes.plan(chosen, distributed.launched()))
        return
    with distributed.joined():
        result = distributed.get_or_run(chosen.run)
    if distributed.leads():
        typer.echo(json.dumps({"id": result.id, **result.metrics}, indent=2))


@app.command()
def evaluate(
    weights: Annotated[str, typer.Argument(help="A weight file, or a backbone with torchvision's weights.")],
    data_dir: DataDir = None,
    data: Annotated[str, typer.Option("--data", help="A data set, or the path of an image tree.")] = "imagenet",
    size: Annotated[int, typer.Option(min=8, help="Side of the centre crop in pixels.")] = 224,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    skip_corrupt: SkipCorrupt = False,
) -> None:
    """Top-1 and top-5 error of trained weights on a data set's test images (ImageNet: its validation images)."""
    from afdslib.studies import recipes
    from afdslib.training import distributed

    with distributed.joined():
        found = recipes.evaluate(
            weights, data_set=data, data_dir=_folder(data_dir), size=size, precision=precision,
            skip_corrupt=skip_corrupt,
        )  # fmt: skip
    if distributed.leads():
        images = sum(map(sum, found.confusion))
        typer.echo(
            f"{weights}: top-1 error {1 - found.accuracy:.2%}, top-5 error {1 - found.top5_accuracy:.2%}, loss "
            f"{found.loss:.4f}, {images:,} images"
        )


def _folder(data_dir: str | None) -> str | None:
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise AFDSError(f"the data folder {data_dir} does not exist: create it, or give another")
    return data_dir


@app.command()
def maps(
    networks: Annotated[
        list[str], typer.Argument(metavar="[NAME=]FILE...", help="Weight files, or backbones of torchvision.")
    ],
    output: Annotated[str, typer.Option(help="The PNG to write.")],
    image: Annotated[str | None, typer.Option(help="An image file.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="A data set, for a test image and the classes.")] = None,
    index: Annotated[int, typer.Option(min=0, help="Of the test image.")] = 0,
    size: Annotated[int, typer.Option(min=8, help="Side of the image in pixels.")] = 32,
    data_dir: DataDir = None,
    skip_corrupt: SkipCorrupt = False,
) -> None:
    """Draw what networks attend to in an image: the activation map of each stage, and the loss's gradient."""
    from afdslib.inference.maps import view
    from afdslib.report.maps import draw

    output_path(output)
    seen = view(networks, image, data, index, size, data_dir, skip_corrupt=skip_corrupt)
    typer.echo(f"written to {draw(seen, output)}")


# ------------------------------------------------------------------------------------------------------ the run store


@runs_app.command("list")
def list_runs(
    require_training: Annotated[
        bool, typer.Option("--require-training", help="Fail if the store holds no training step.")
    ] = False,
    committed: Annotated[bool, typer.Option("--committed", help="The runs below data/results instead.")] = False,
) -> None:
    """All runs, oldest first: id, kind, state, optimiser steps, wall clock."""
    from afdslib import runs
    from afdslib.base import paths

    listed = runs.list_committed() if committed else runs.list_runs()
    rows = [
        (
            run.id,
            run.kind,
            run.state,
            "-" if run.steps is None else str(run.steps),
            "-" if run.seconds is None else f"{run.seconds:.0f} s",
        )
        for run in listed
    ]
    _table(("id", "kind", "state", "steps", "time"), rows)
    typer.echo(f"{len(rows)} runs in {paths.results('*') if committed else paths.runs()}")
    if require_training:
        typer.echo(f"training steps: {_count(runs.require_training())}")


@runs_app.command("show")
def show_run(id: Annotated[str, typer.Argument(help="The run, or the beginning of its id.")]) -> None:
    """Configuration, metrics, environment, times and files of one run, as JSON."""
    from afdslib import runs

    typer.echo(json.dumps(runs.show(id), indent=2))


@runs_app.command("rm")
def remove_runs(ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Runs to delete.")]) -> None:
    """Delete runs: a later call computes them anew."""
    from afdslib import runs

    for id in ids:
        typer.echo(f"deleted {runs.remove(id)}")


# -------------------------------------------------------------------------------------------------- data and machine


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="A data set by name, or the path of an image tree or archive.")],
    root: Annotated[str | None, typer.Option(help="Folder with archives or trees; it may be read-only.")] = None,
    per_class: Annotated[int | None, typer.Option(help="Fitting images per class.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="imagenet: the devkit (archive or folder) or a CSV of image and class.")
    ] = None,
    subset: Annotated[bool, typer.Option("--subset", help="imagenet: accept a part of it.")] = False,
    skip_corrupt: SkipCorrupt = False,
) -> None:
    """Fetch, verify, extract and decode a data set, and describe its splits.

    imagenet: sort the flat validation folder into classes (files are moved) and check the counts of the tree.
    """
    if name == "imagenet":
        _imagenet(root, labels, subset)
        return
    if labels is not None or subset:
        raise AFDSError(f"--labels and --subset are for imagenet only, not for {name}; leave them out")
    from afdslib import data as datasets

    datasets.prepare(name, root, per_class=per_class, skip_corrupt=skip_corrupt)


def _imagenet(root: str | None, labels: str | None, subset: bool) -> None:
    from afdslib.base import paths
    from afdslib.data import imagenet

    place = _folder(root) or str(paths.raw_data())
    folder, moved, counts = imagenet.arrange(place, labels, expected=None if subset else imagenet.IMAGENET)
    typer.echo(f"{folder}: {counts}" + (f"; {moved:,} images sorted into their classes" if moved else ""))


@app.command()
def bench(
    case: Annotated[
        list[str] | None, typer.Option(help="networks, dynamic, gates, training, losses, loading, memory.")
    ] = None,
    network: Annotated[list[str] | None, typer.Option(help="Backbones; default: resnet50.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes; default: 1.")] = None,
    runtime: Annotated[list[str] | None, typer.Option(help="eager, compiled, onnxruntime; default: eager.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and onnxruntime.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, each on another image.")] = 5,
    size: Annotated[int, typer.Option(min=8, help="Side of the images in pixels.")] = 224,
    keep: Annotated[float, typer.Option(help="Share of the inner channels of the compact network.")] = 0.2,
    stream: Annotated[float, typer.Option(help="Share of the residual streams' channels.")] = 0.75,
    multiple: Annotated[int, typer.Option(min=1, help="Kept channels are rounded to a multiple.")] = 16,
    density: Annotated[float, typer.Option(help="Density d of the dynamic case.")] = 0.3,
    weights: Annotated[str | None, typer.Option(help="A network of afs.save, with masks of its own.")] = None,
    masks: Annotated[
        list[str] | None, typer.Option(help="Masks of afds publish --part speed, each a network; random weights.")
    ] = None,
    train_size: Annotated[int, typer.Option(min=8, help="Side of the images of training steps.")] = 64,
    train_batch: Annotated[int, typer.Option(min=2, help="Images per training step.")] = 16,
    width: Annotated[float, typer.Option(help="Factor on all channels, for quick looks.")] = 1.0,
    full: Annotated[
        bool, typer.Option("--full", help="ResNet-50 and ResNet-101, batch 1 and 16, all runtimes.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="The CSV file to write.")] = None,
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
    typer.echo("  ".join(f"{key}: {value}" for key, value in benchmarks.environment(settings).items()))
    if out is not None:
        output_path(out)
    measured: list[benchmarks.Row] = []

    def show(row: benchmarks.Row) -> None:
        typer.echo(benchmarks.describe(row))
        measured.append(row)
        if out is not None:
            benchmarks.to_csv(measured, settings, out)  # after each row: measuring takes long

    benchmarks.run(case or list(benchmarks.CASES), settings, show)
    if out is not None:
        typer.echo(f"written to {out}")


@app.command()
def export(
    run: Annotated[str, typer.Option("--run", help="A finished run, or the beginning of its id.")],
    format: Annotated[str, typer.Option("--format", help="onnx or torch (safetensors).")] = "onnx",
    out: Annotated[str | None, typer.Option(help="The file; default: the run's id in the working folder.")] = None,
) -> None:
    """Write a run's network without its removed channels, with class names and preprocessing, to one file."""
    import afdslib.experiments  # noqa: F401  (it registers the kinds of runs)
    from afdslib.inference import export as exports

    path, card = exports.export_run(run, format, out)
    typer.echo(f"{path}: {card.network}, {len(card.classes)} classes, {card.size} px, {path.stat().st_size:,} bytes")


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
    model: Annotated[str, typer.Option("--model", help="A file of afds export.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
) -> None:
    """Print the likeliest classes of images by an exported network."""
    from afdslib.inference.predict import predict as classify

    found = classify(images, model, top=top)
    rows = [(path, name, f"{share:.1%}") for path, classes in found for name, share in classes]
    _table(("image", "class", "probability"), rows)


@app.command()
def doctor(data_dir: DataDir = None) -> None:
    """Show versions, devices, folders and data sets of this machine."""
    from afdslib.studies.doctor import examine

    _table(("what", "state", "detail"), examine(data_dir))


def _count(steps: dict[str, int]) -> str:
    return ", ".join(f"{kind} {number}" for kind, number in sorted(steps.items()))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned columns; the last one may be as long as it is."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
