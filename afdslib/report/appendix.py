"""What stands behind the report: every committed result, its cost, the command for each figure, and the faults avoided.

Everything is read from files; the list of faults is held to the mutants of the tests by a test.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from afdslib import runs
from afdslib.base import paths
from afdslib.report import comparison
from afdslib.report.plots import look
from afdslib.report.sweep import accuracy_table
from afdslib.report.tables import Table, Text, place, span
from afdslib.studies import results

__all__ = ["committed_text", "cost_table", "faults", "faults_table", "figures_table", "references"]


def faults() -> list[tuple[str, list[str]]]:
    """What the public reproduction does [code], and the mutants of the tests that do the same."""
    text = Path(__file__).with_name("faults.toml").read_text("utf-8")
    return [(row["does"], row["mutants"]) for row in tomllib.loads(text)["fault"]]


def faults_table() -> Table:
    """Each fault of the public reproduction, with the mutants that show that a test here fails on it."""
    rows = [(fault, ", ".join(f"`{name}`" for name in mutants)) for fault, mutants in faults()]
    header = ["what the public reproduction does", "mutants that tests/test_mutants.py catches"]
    return Table(header, rows, numbers=False)


def _studies(*parts: str) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """(profile and scale for readers, part, options of the command, points) of the committed tables of some parts."""
    for part, profile in itertools.product(parts, results.profiles()):
        rows = results.select(results.read(profile), part=part)
        keys = rows.target if part == "comparison" else [""] * len(rows)
        for scale, target in dict.fromkeys(zip(rows.scale, keys, strict=True)):
            table = results.named(f"{profile}/{scale}/{part}" + (f"-{target}" if target else ""))
            if len(table):
                yield f"**{profile}, {scale}**", part, f"--profile {profile} --scale {scale} --data-dir DIR", table


def committed_text() -> Text:
    """Every committed sweep, comparison and study of students, each under its profile and scale with its command."""
    parts = []
    for name, part, options, table in _studies("sweep", "comparison", "attention", "selectivity"):
        count = table.groupby("method").seed.nunique()
        seeds = f"mean ± standard deviation over {span(count.min(), count.max())} seeds"
        command = f"`afds study --part {part} {options}`"
        if part == "sweep":
            text, rows = f"{name}: test accuracy, {seeds}", accuracy_table(table)
        elif part == "comparison":
            text = f"{name}, the comparison on {place(table.target.iloc[0])}: test accuracy in %, {seeds}"
            rows = comparison.accuracy_table(table)
        else:
            text, rows = f"{name}, students ({part}): test accuracy in %", _students(table)
        parts += [f"{text}. {command}", rows._repr_markdown_()]
    return Text("\n\n".join(parts) or "No result is committed.")


def _students(table: pd.DataFrame) -> Table:
    rows = []
    keys = ["student", "teacher", "method"]
    for (student, teacher, method), here in table.fillna({"teacher": ""}).groupby(keys, sort=False):
        name = f"{student}, {look(str(method)).label}" + (f" from {teacher}" if teacher else "")
        values = 100 * here.test_accuracy
        rows.append([name, f"{values.median():.1f}", f"{values.min():.1f} to {values.max():.1f}", str(len(values))])
    return Table(["network, method", "median", "range", "seeds"], rows)


KINDS = {
    "SourceRun": "source networks", "ExtendedSourceRun": "source networks, trained on",
    "AFSSourceRun": "AFS source networks", "TransferRun": "points with AFS", "DenseRun": "competitors, unpruned",
    "PrunedRun": "competitors, pruned", "NarrowRun": "narrower networks", "FBSGatesRun": "FBS, gates alone",
    "PhotoRun": "teachers and students on photographs", "FBSRun": "points with FBS",
    "ChannelWeightsRun": "DELTA's weights", "StudentRun": "teachers and students", "GatesRun": "gates replaced"
}  # fmt: skip
"""Kinds of runs, for readers."""


def cost_table() -> Table:
    """Wall-clock hours of the committed runs by profile and kind, with the device; the sum of all their sessions."""
    rows = []
    for profile, record in runs.records():
        where = record["environment"]
        device = ", ".join(where["gpus"]) or f"{where['cpu']}, {where['threads']} of {where['cores']} cores"
        rows.append((profile, record["kind"], device, record.get("times", {}).get("seconds")))
    table = pd.DataFrame(rows, columns=["profile", "kind", "device", "seconds"]).astype({"seconds": float})
    cells = []
    for (profile, kind, device), here in table.groupby(["profile", "kind", "device"]):
        hours = f"{here.seconds.sum() / 3600:.2f}" if here.seconds.notna().any() else "not kept"
        cells.append([profile, KINDS.get(str(kind), kind), device, str(len(here)), hours])
    return Table(["profile", "trained", "device", "runs", "hours"], cells, numbers=False)


def figures_table(profile: str, scale: str) -> Table:
    """Each figure of a profile: the notebook that draws it, the command, and how long that notebook took here."""
    rows = []
    executed = paths.figures(profile) / "executed"
    for notebook in sorted(paths.notebooks().glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        names = re.findall(r"plots\.save\(.*?profile,\s*\"(\w+)\"\)", source, flags=re.S)
        try:
            taken = json.loads((executed / f"{notebook.stem}.json").read_text(encoding="utf-8"))["seconds"]
            time = f"{taken:.0f} s"
        except (OSError, ValueError, KeyError):
            time = "not kept"
        command = f"`afds run --profile {profile} --scale {scale} --notebook {notebook.stem[:2]}`"
        if names:
            rows.append([", ".join(dict.fromkeys(names)), command, time])
    return Table(["figures", "command", "time of the notebook here"], rows, numbers=False)


BIBLIOGRAPHY = Path(__file__).resolve().parents[2] / "references.bib"
CITED = (
    "wang2020afds", "gao2019fbs", "li2018l2sp", "li2019delta", "li2016lwf", "zagoruyko2017at", "huang2017nst",
    "hinton2015kd", "romero2015fitnets", "liu2017slimming", "molchanov2019taylor", "fang2023depgraph"
)  # fmt: skip


def references() -> Text:
    """The papers behind the methods of the report, from references.bib."""
    entries = dict(re.findall(r"@\w+\{(\w+),\n(.*?)\n\}", BIBLIOGRAPHY.read_text("utf-8"), re.S))
    lines = []
    for key in CITED:
        field = dict(re.findall(r"(\w+)\s*=\s*\{(.*?)\}(?:,?\n|$)", entries[key] + "\n", re.S))
        first, *more = [name.split(",")[0] for name in field["author"].split(" and ")]
        who = first + (" et al." if len(more) > 1 else f" and {more[0]}" if more else "")
        text = f"{who}: *{field['title']}*, {field['year']}. {field.get('url') or field.get('note', '')}"
        lines.append("- " + re.sub(r"\s+", " ", re.sub(r"\\L|[{}]", "", text)).strip())
    return Text("\n".join(lines))
