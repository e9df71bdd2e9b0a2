"""The committed measurements of `afds bench`, for the report: which networks are faster, and by how much.

Each file below data/results/speed/ was written by one `afds bench --out`; its rows name device, threads and versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pandas as pd

from afdslib.base import paths
from afdslib.inference import bench
from afdslib.report import numbers as cited
from afdslib.report.summary import Table, Text
from afdslib.studies.speed import read_masks

__all__ = ["best", "networks_text", "others_text", "stored"]

_RUN = ["file", "device", "threads", "size", "width", "network", "batch"]
_COLUMNS = [field.name for field in fields(bench.Row)] + ["device", "threads", "repeats", "file"]


def stored() -> pd.DataFrame:
    """All rows of all files, with the file's name below data/results/ in the column `file`; empty if there is none."""
    base = paths.results("any").parent
    tables = []
    for path in sorted((base / "speed").rglob("*.csv")):
        file = path.relative_to(base).as_posix()
        table = cited.read(file)
        if "case" in table and not table.empty:
            tables.append(table.assign(file=file))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=_COLUMNS)


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Each network in the runtime in which it is fastest, against the dense one in the runtime in which that is.

    Args:
        table: of `stored`.

    Returns:
        For the case "networks" a row per file, device, number of threads, image size, network, width, batch size and
        variant that was measured beside a dense network, with `faster`, the dense one's median time over this one's.
    """
    found = []
    table = table[table.case == "networks"].dropna(subset=["median_ms"])
    for _, mine in table.groupby(_RUN, sort=False):
        rows = mine.loc[mine.groupby("variant", sort=False).median_ms.idxmin()]
        dense = rows[rows.variant == "dense"]
        if not dense.empty:
            found.append(rows.assign(faster=float(dense.median_ms.iloc[0]) / rows.median_ms))
    return pd.concat(found, ignore_index=True) if found else table.assign(faster=pd.Series(dtype=float)).iloc[:0]


def networks_text(table: pd.DataFrame) -> Text:
    """Networks without their removed channels, and torch-pruning's at the same MACs, against the dense one.

    Args:
        table: of `stored`.
    """
    rows = best(table)
    if rows.empty:
        return Text("Not measured: `afds speed`, then `afds bench --case networks --masks FILE --out ...`, do.")
    parts = []
    for (file, device, threads, size), mine in rows.groupby(["file", "device", "threads", "size"], sort=False):
        lines = [
            [
                _named(row), str(row.batch), row.variant, f"{row.reduction:.1f}x", f"{row.median_ms:.1f}", row.runtime,
                f"{row.faster:.2f}x", f"{row.faster / row.reduction:.2f}",
            ]
            for row in mine.itertuples()
        ]  # fmt: skip
        header = ["network", "batch", "variant", "fewer MACs", "ms", "fastest in", "faster", "faster / fewer MACs"]
        notes = [note for note in mine.note.dropna().unique() if note.startswith(("masks of", "random masks"))]
        parts += [
            f"`data/results/{file}`, {int(size)} px, {device}, {_threads(threads)}; compact: {', '.join(notes)}; "
            "torch-pruning: its network of at most as many MACs, by L1 norms, widths coupled.",
            Table(header, lines)._repr_markdown_(),
        ]
    return Text("\n\n".join([*parts, _accuracies()]).strip())


def _trained() -> list[Mapping[str, Any]]:
    """The committed masks with what is known of their networks, the largest budget first."""
    found = [read_masks(file) for file in paths.results("speed").glob("*.json")]
    return sorted(found, key=lambda one: -one["budget"])


def trained_accuracies() -> dict[int, str]:
    """How accurate the networks are whose masks are committed, by the reduction of their MACs: {10: "35.5 %"}."""
    return {round(1 / one["budget"]): f"{100 * one['metrics']['test_accuracy']:.1f} %" for one in _trained()}


def _accuracies() -> str:
    """How accurate the networks are whose masks are committed; empty if there are none."""
    found = _trained()
    if not found:
        return ""
    settings = found[0]["training"]
    reached = ", ".join(f"{times}x {accuracy}" for times, accuracy in trained_accuracies().items())
    return (
        f"The committed masks come from short trainings, {settings['source_steps']} steps on the source, then "
        f"{settings['transfer_steps']} and {settings['tuning_steps']} per budget on {settings['target']} with "
        f"{settings['per_class']} images per class at {settings['size']} px: they are for measuring time. Test "
        f"accuracy: {reached}."
    )


def others_text(table: pd.DataFrame) -> Text:
    """The other cases of `afds bench`: dynamic execution, gates, training steps, losses, loading and memory.

    Args:
        table: of `stored`.
    """
    rows = table[table.case != "networks"]
    rows = rows[((rows.variant != rows.baseline) & rows.speedup.notna()) | rows.peak_mib.notna()]
    if rows.empty:
        return Text("Not measured: `afds bench --out ...` does.")
    lines = [
        [
            f"{row.case}, {_named(row)}" + ("" if pd.isna(row["size"]) else f", {int(row['size'])} px"), str(row.batch),
            "" if pd.isna(row.runtime) else row.runtime, row.variant, _ratio(row),
            "" if pd.isna(row.median_ms) else f"{row.median_ms:.4g}",
            "" if pd.isna(row.peak_mib) else f"{row.peak_mib:.1f}",
            "" if pd.isna(row.file_mib) else f"{row.file_mib:.1f}",
        ]
        for _, row in rows.iterrows()
    ]  # fmt: skip
    header = ["case", "batch", "runtime", "measured", "median ratio [quartiles]", "ms", "peak MiB", "file MiB"]
    files = dict.fromkeys(zip(rows.file, rows.device, rows.threads, strict=True))
    facts = "; ".join(f"`data/results/{file}`, {device}, {_threads(number)}" for file, device, number in files)
    return Text(f"{Table(header, lines, numbers=False)._repr_markdown_()}\n\n{facts}.")


def _ratio(row: Any) -> str:
    return "" if pd.isna(row.speedup) or row.variant == row.baseline else bench.ratio(row)


def _named(row: Any) -> str:
    """A network with its width, where it is not the usual one."""
    return str(row.network) if pd.isna(row.width) or row.width == 1 else f"{row.network} of width {row.width:g}"


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"
