"""Measured time: of a sweep's networks on this machine, and the committed measurements of `afds bench`.

Times belong to a machine. Those of a sweep are kept beside its table, never in it, so that the sweep stays
reproducible; each file below data/results/speed/ was written by one `afds bench --out` and names device and versions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from afdslib import afs, runs
from afdslib.afs import macs
from afdslib.afs.compact import compact
from afdslib.afs.io import read_masks
from afdslib.base import paths
from afdslib.base.atomic import atomic_path
from afdslib.inference import bench
from afdslib.inference.gates import inference
from afdslib.report import numbers
from afdslib.report.tables import Table, Text, bullets, place, plural
from afdslib.runs import MODEL
from afdslib.studies.sweep import Study

__all__ = [
    "COLUMNS", "benchmarks", "best", "measure", "networks_text", "others_text", "sentence", "stored", "times",
    "trained_accuracies", "write_times"
]  # fmt: skip

COLUMNS = [
    "target", "method", "seed", "budget", "test_accuracy", "macs", "macs_predictors", "computed", "runtime", "batch",
    "median_ms", "q1_ms", "q3_ms", "speedup", "speedup_q1", "speedup_q3", "threads", "device", "run"
]  # fmt: skip
DENSE = "dense"
SETTINGS = bench.Settings(batches=(1, 16), threads=1, repeats=40, warmup=5, steady=0.0)  # one thread, none that spins


def times(study: Study, sweep: pd.DataFrame, *, method: str = "afd") -> pd.DataFrame:
    """The times kept with a study of the networks of a method's first seed in its sweep's table, or measured now.

    Returns:
        One row per target, budget and batch size, `COLUMNS`: `macs` and `computed` are shares of the dense MACs, as
        the gates leave them and as the compact network computes them (it computes every dynamic channel); times in
        milliseconds per call, medians with quartiles; `speedup` the dense network's time over this one's, within each
        repeat. A network whose weights are not at hand has no row.
    """
    kept = stored(study, sweep)
    kept = kept[kept.method == method]
    rows = sweep[sweep.method == method]
    wanted = set(rows[rows.seed == rows.groupby("target").seed.transform("min")].run)
    if study.profile.committed and not kept.empty and wanted <= set(kept.run):
        return kept
    found = measure(study, sweep, method=method)
    if study.profile.committed and set(found.run) <= set(kept.run):  # the other networks are not at hand
        return kept
    with atomic_path(_measured_here(study)) as part:
        found.to_csv(part, index=False, float_format="%.6g", lineterminator="\n")
    return found


def _measured_here(study: Study) -> Path:
    """The times that this machine has measured, in the run store: only publishing writes committed files."""
    return paths.runs() / "times" / f"{study.profile.name}-{study.profile.scale}.csv"


def write_times(study: Study) -> Path | None:
    """Writes the times measured here, if there are any, beside the study's table, to be committed."""
    file, measured = study.folder() / "times.csv", _measured_here(study)
    if not measured.is_file():
        return None
    with atomic_path(file) as part:
        part.write_bytes(measured.read_bytes())
    return file


def stored(study: Study, sweep: pd.DataFrame) -> pd.DataFrame:
    """The times measured here, else those kept with a study, of the sweep's networks alone; empty if there are none."""
    for file in (_measured_here(study), study.folder() / "times.csv"):
        kept = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=COLUMNS)
        if len(kept) and list(kept) == COLUMNS and set(kept.run) <= set(sweep.run):
            return kept
    return pd.DataFrame(columns=COLUMNS)


def measure(
    study: Study, sweep: pd.DataFrame, *, method: str = "afd", settings: bench.Settings | None = None
) -> pd.DataFrame:
    """Times the networks of a method's first seed as they are exported; see `times`.

    By default in onnxruntime, or torch itself without it and in the demo, whose times mean nothing and should be short.
    """
    if settings is None:
        real = study.profile.committed and importlib.util.find_spec("onnxruntime")
        settings = replace(SETTINGS, runtimes=("onnxruntime" if real else "eager",))
    sweep, rows = sweep[sweep.method == method], list[dict[str, Any]]()
    with bench.on_threads(settings.threads):
        for title in study.targets:
            rows += _measure(study, sweep[sweep.target == title], title, settings)
    return pd.DataFrame(rows, columns=COLUMNS)


def _measure(study: Study, sweep: pd.DataFrame, title: str, settings: bench.Settings) -> Iterator[dict[str, Any]]:
    """Rows of one target, from the sweep's rows of one method."""
    splits, runtime = study.target_data[title], settings.runtimes[0]
    shape = (3, splits.test.size, splits.test.size)
    network = replace(study.profile.network, weights=None).build(len(splits.classes), 0).eval()
    dense = macs.count(network, shape).total
    models: dict[str, torch.nn.Module] = {DENSE: compact(network, input_size=shape, fold_bn=True)}
    rows: dict[str, dict[str, Any]] = {}
    for row in sweep[sweep.seed == sweep.seed.min()].sort_values("budget", ascending=False).itertuples():
        config = study.point_run(row.method, int(row.seed), budget=float(row.budget), target=study.targets[title])
        result = runs.lookup(config, needs=(MODEL,))
        if result is None:
            continue
        small = compact(afs.load(result.artifact(MODEL)).eval(), input_size=shape, fold_bn=True)
        models[f"{row.budget:g}"] = inference(small)
        rows[f"{row.budget:g}"] = row._asdict() | {"computed": macs.count(small, shape).total / dense}
    some = min(max(settings.batches) + settings.repeats, len(splits.test))
    images = splits.test.__getitems__(range(some))[0]
    facts = {"threads": settings.threads, "device": bench.environment(settings)["device"], "runtime": runtime}
    for batch in settings.batches if rows else ():
        shared = bench.Row("sweep", study.profile.network.name, runtime, min(batch, some), "", DENSE)
        for one in bench.compare(models, settings, shared, {}, images):
            if one.variant in rows and one.median_ms is not None:
                yield vars(one) | rows[one.variant] | facts


def sentence(table: pd.DataFrame, sweep: pd.DataFrame) -> Text:
    """What the clock says of the smallest measured network, in words."""
    if table.empty:
        what = f"the weights of these {len(sweep)} networks are not at hand"
        return Text(f"Not measured: {what}. Where they are trained, this notebook measures them.")
    lines = []
    for (title, batch), rows in table.groupby(["target", "batch"], sort=False):
        last = rows.sort_values("budget").iloc[0]
        computed, skipped = f"{100 * last.computed:.1f}", f"{100 * (last.macs - last.macs_predictors):.1f}"
        masked = f"{computed} % of the dense MACs"
        if computed != skipped:
            masked += f", as dynamic channels are computed, then masked; skipped, they would leave {skipped} %"
        lines.append(
            f"{place(title)}, batch {batch}: at {1 / last.budget:g}x fewer MACs the network is "
            f"{last.speedup:.2f}x as fast as the dense one (quartiles {last.speedup_q1:.2f} to {last.speedup_q3:.2f}); "
            f"it computes {masked}."
        )
    one = table.iloc[0]
    return Text(
        f"{bullets(lines)}\n\n{one.runtime}, {plural(one.threads, 'thread')}, {one.device}, medians of "
        f"{SETTINGS.repeats} interleaved repeats; the dense network's batch norms are folded too."
    )


def benchmarks() -> pd.DataFrame:
    """All rows of all files, with the file's name below data/results/ in the column `file`; empty if there is none."""
    base = paths.results("any").parent
    files = [path.relative_to(base).as_posix() for path in sorted((base / "speed").rglob("*.csv"))]
    tables = [table.assign(file=file) for file in files if "case" in (table := numbers.read(file)) and len(table)]
    columns = [field.name for field in fields(bench.Row)] + ["device", "threads", "repeats", "file"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Each network of `benchmarks` in the runtime in which it is fastest, against the dense one in its fastest.

    For the case "networks" a row per file, device, number of threads, image size, network, width, batch size and
    variant that was measured beside a dense network, with `faster`, the dense one's median time over this one's.
    """
    found = []
    table = table[table.case == "networks"].dropna(subset=["median_ms"])
    for _, rows in table.groupby(["file", "device", "threads", "size", "width", "network", "batch"], sort=False):
        rows = rows.loc[rows.groupby("variant", sort=False).median_ms.idxmin()]
        dense = rows[rows.variant == DENSE]
        if not dense.empty:
            found.append(rows.assign(faster=float(dense.median_ms.iloc[0]) / rows.median_ms))
    return pd.concat(found, ignore_index=True) if found else table.assign(faster=pd.Series(dtype=float)).iloc[:0]


def networks_text(table: pd.DataFrame) -> Text:
    """Networks without their removed channels, and torch-pruning's at the same MACs, against the dense one."""
    rows = best(table)
    if rows.empty:
        commands = "`afds publish --part speed`, then `afds bench --case networks --masks FILE --out ...`"
        return Text(f"Not measured: {commands}, do.")
    parts = []
    header = ["network", "batch", "variant", "fewer MACs", "ms", "fastest in", "faster", "faster / fewer MACs"]
    for (file, device, threads, size), here in rows.groupby(["file", "device", "threads", "size"], sort=False):
        lines = [
            [
                _network(row), str(row.batch), row.variant, f"{row.reduction:.1f}x", f"{row.median_ms:.1f}",
                row.runtime, f"{row.faster:.2f}x", f"{row.faster / row.reduction:.2f}"
            ]
            for row in here.itertuples()
        ]  # fmt: skip
        notes = [note for note in here.note.dropna().unique() if note.startswith(("masks of", "random masks"))]
        parts += [
            f"`data/results/{file}`, {int(size)} px, {device}, {plural(threads, 'thread')}; compact: "
            f"{', '.join(notes)}; torch-pruning: its network of at most as many MACs, by L1 norms, widths coupled.",
            Table(header, lines)._repr_markdown_(),
        ]
    return Text("\n\n".join([*parts, _accuracies()]).strip())


def trained_accuracies() -> dict[int, str]:
    """How accurate the networks are whose masks are committed, by the reduction of their MACs: {10: "35.5 %"}."""
    masks = sorted(map(read_masks, paths.results("speed").glob("*.json")), key=lambda one: -one["budget"])
    return {round(1 / one["budget"]): f"{100 * one['metrics']['test_accuracy']:.1f} %" for one in masks}


def _accuracies() -> str:
    """How accurate the networks are whose masks are committed; empty if there are none."""
    file = next(paths.results("speed").glob("*.json"), None)
    if file is None:
        return ""
    settings = read_masks(file)["training"]
    reached = ", ".join(f"{times}x {accuracy}" for times, accuracy in trained_accuracies().items())
    return (
        f"The committed masks come from short trainings, {settings['source_steps']} steps on the source, then "
        f"{settings['transfer_steps']} and {settings['tuning_steps']} per budget on {settings['target']} with "
        f"{settings['per_class']} images per class at {settings['size']} px: they are for measuring time. Test "
        f"accuracy: {reached}."
    )


def others_text(table: pd.DataFrame) -> Text:
    """The other cases of `afds bench`: dynamic execution, gates, training steps, losses, loading and memory."""
    rows = table[table.case != "networks"]
    rows = rows[((rows.variant != rows.baseline) & rows.speedup.notna()) | rows.peak_mib.notna()]
    if rows.empty:
        return Text("Not measured: `afds bench --out ...` does.")
    lines = []
    for _, row in rows.iterrows():
        cells = {"median_ms": ".4g", "peak_mib": ".1f", "file_mib": ".1f"}
        ratio = "" if pd.isna(row.speedup) or row.variant == row.baseline else bench.ratio(row)
        name = f"{row.case}, {_network(row)}" + ("" if pd.isna(row["size"]) else f", {int(row['size'])} px")
        shown = ["" if pd.isna(row[column]) else f"{row[column]:{form}}" for column, form in cells.items()]
        lines.append([name, str(row.batch), "" if pd.isna(row.runtime) else row.runtime, row.variant, ratio, *shown])
    header = ["case", "batch", "runtime", "measured", "median ratio [quartiles]", "ms", "peak MiB", "file MiB"]
    files = dict.fromkeys(zip(rows.file, rows.device, rows.threads, strict=True))
    facts = "; ".join(f"`data/results/{file}`, {device}, {plural(number, 'thread')}" for file, device, number in files)
    return Text(f"{Table(header, lines, numbers=False)._repr_markdown_()}\n\n{facts}.")


def _network(row: Any) -> str:
    """A network with its width, where it is not the usual one."""
    return str(row.network) if pd.isna(row.width) or row.width == 1 else f"{row.network} of width {row.width:g}"
