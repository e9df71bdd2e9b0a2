"""Tables and sentences about students and teachers, computed from a study's results: no number is typed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from afdslib import afs, runs, training
from afdslib.base.errors import AFDSError
from afdslib.data import ImageDataset
from afdslib.experiments import StudentRun
from afdslib.experiments.student import tapped
from afdslib.inference import bench, maps
from afdslib.losses import attention_map
from afdslib.report import views
from afdslib.report.numbers import Number, of_interval
from afdslib.report.plots import look
from afdslib.report.quoted import reported
from afdslib.report.sweep import stage_text
from afdslib.report.tables import Table, Text, bullets, place
from afdslib.report.views import NOT_STORED
from afdslib.runs import MODEL
from afdslib.studies import engine, results, statistics
from afdslib.studies.students import DistillationStudy, get
from afdslib.training.features import Teacher, taps

__all__ = [
    "NOT_STORED", "Gain", "beta_in_paper_scale", "beta_table", "better_than_guessing", "command", "compared_sizes",
    "decays", "falls", "finished_gains", "first_pair", "gain", "gains_text", "networks", "no_test_in_trials",
    "nst_memory", "pull_text", "reach_text", "saved_text", "scope", "seen_text", "settings", "steps_saved",
    "steps_until", "stored_like_table", "student_table", "taps_of", "terms_add_up", "view", "weights_text"
]  # fmt: skip


def beta_in_paper_scale(beta: float, norm: float, positions: int) -> float:
    """The beta of the paper's loss, beta / 2 x norm, that weighs one sample as the code's beta x norm^2 / positions.

    Args:
        beta: in the scale of the public code.
        norm: 2-norm of the difference of the two attention maps of the sample.
        positions: H x W of the map.
    """
    return 2 * beta * norm / positions


class Gain(NamedTuple):
    """A method against the student alone."""

    gain: float  # difference of the medians over seeds, percentage points
    spread: float  # the larger of the two ranges (largest minus smallest) over seeds; NaN with a single seed
    exceeds: bool | None  # whether the gain's size is larger than the spread; None if the spread is not known


def gain(method: Sequence[float], alone: Sequence[float]) -> Gain:
    """The gain of a method over the student alone, from test accuracies, one per seed. [ours]"""
    if not len(method) or not len(alone):
        raise AFDSError("a gain needs at least one accuracy of the method and one of the student alone")
    one, two = (pd.Series(values, dtype=float) * 100 for values in (method, alone))
    difference = float(one.median() - two.median())
    if min(len(one), len(two)) < 2:
        return Gain(difference, math.nan, None)
    spread = float(max(one.max() - one.min(), two.max() - two.min()))
    return Gain(difference, spread, abs(difference) > spread)


def _pairs(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(teacher, student, their rows) of the table, in order; a student alone belongs to every teacher."""
    taught = table[table.teacher != ""]
    for teacher, student in dict.fromkeys(zip(taught.teacher, taught.student, strict=True)):
        own = (table.student == student) & ((table.teacher == teacher) | (table.method == "alone"))
        yield teacher, student, table[own | ((table.method == "teacher") & (table.student == teacher))]


def _methods(table: pd.DataFrame) -> Iterator[tuple[str, str, str, pd.DataFrame, pd.Series]]:
    """(teacher, student, method, its rows, accuracies of the student alone)."""
    for teacher, student, rows in _pairs(table):
        alone = rows[rows.method == "alone"].test_accuracy
        for method, found in rows[rows.method != "teacher"].groupby("method", sort=False):
            yield teacher, student, str(method), found, alone


def first_pair(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first student and teacher."""
    return next((rows for *_, rows in _pairs(table)), table)


def student_table(study: DistillationStudy) -> Table:
    """Teachers and students: median over seeds, spread (largest minus smallest), gain over the student alone; and,
    where there is one, the number that the original paper reports."""
    table, name = study.table(), study.profile.data.name
    rows = {}
    for row in table[table.method == "teacher"].itertuples():
        cells = ["", f"{100 * row.test_accuracy:.1f}", "–", "1", "", reported(name, "", row.student, "teacher")]
        rows[f"teacher {row.student}"] = cells
    for teacher, student, method, here, alone in _methods(table):
        values, teacher = here.test_accuracy, "" if method == "alone" else teacher
        weight = f"{here.weight.iloc[0]:g}" if here.weight.iloc[0] else ""
        spread = f"{100 * (values.max() - values.min()):.1f}" if len(values) > 1 else "–"
        better = f"{gain(values, alone).gain:+.1f}" if teacher and len(alone) else ""
        cells = [weight, f"{100 * values.median():.1f}", spread, str(len(values)), better]
        label = f"{student}, {look(method).label}{f' ({teacher})' if teacher else ''}"
        rows[label] = [*cells, reported(name, teacher, student, method)]
    header = ["network, method (teacher)", "weight", "median (%)", "spread", "seeds", "gain over alone"]
    width = len(header) + any(cells[-1] for cells in rows.values())
    lines = [[label, *cells][:width] for label, cells in rows.items()]
    return Table([*header, "reported at 200 epochs (%)"][:width], lines)


_NONE = "No student with a teacher is finished yet."


def gains_text(study: DistillationStudy) -> Text:
    """One sentence per method: its gain over the student alone, and whether that exceeds the spread between seeds."""
    table, lines = study.table(), []
    for teacher, student, method, found, alone in _methods(table):
        if alone.empty or method == "alone":
            continue
        g = gain(found.test_accuracy, alone)
        verdict = {
            None: "with one seed, so nothing can be said",
            True: f"a {'gain' if g.gain > 0 else 'loss'} larger than the spread between seeds ({g.spread:.1f})",
            False: f"not larger than the spread between seeds ({g.spread:.1f})",
        }[g.exceeds]
        lines.append(f"**{look(method).label}** from {teacher} to {student}: {g.gain:+.1f} points, {verdict}.")
    for gap in table.attrs.get("missing", ()):
        lines.append(f"Missing: {gap['student']}, {gap['method']}, seed {gap['seed']}, because {gap['reason']}.")
    return Text(bullets(lines) or _NONE)


def finished_gains(profile: str, scale: str) -> Text:
    """Scale and `gains_text` of what is finished of a profile's study of attention transfer; nothing is trained."""
    study = DistillationStudy(get("attention", profile, scale), complete=False)
    teacher, student = study.profile.teacher_training, study.profile.student_training
    steps = f"{teacher.steps} steps for a teacher and {student.steps} for a student, batches of {student.batch_size}"
    return Text(f"On {place(study.profile.data.name)}, {steps}.\n\n{gains_text(study)}")


def weights_text(study: DistillationStudy) -> Text:
    """Where each method's weight comes from: chosen among those tried, given, or taken from another method."""
    trials, used = study.trials(), {name for pair in study.profile.pairs for name in pair.methods}
    chosen, edge = "Chosen on validation images: ", "At the edge of the values tried, so perhaps not the best: "
    given = "Taken as given, with no other value tried: "
    parts: dict[str, list[str]] = {chosen: [], edge: [], given: []}
    for name, method in study.methods.items():
        if name not in used or method.distillation.transfer == "none":
            continue
        label, rows = look(name).label, trials[trials.method == name]
        if method.like:
            parts.setdefault(f"The weight of {look(method.like).label} is taken, untuned, by ", []).append(label)
        elif len(method.weights) == 1:
            parts[given].append(f"{label} {method.weights[0]:g}")
        elif len(rows) == len(method.weights):  # else not finished, so nothing is chosen
            weight, accuracy = study.weight(name), 100 * rows.validation_accuracy
            between = accuracy.max() - accuracy.min()
            parts[chosen].append(f"{label} {weight:g} (of {len(rows)}, which differ by up to {between:.1f} points)")
            parts[edge] += [label] if weight in (rows.strength.min(), rows.strength.max()) else []
    said = (f"{head}{'; '.join(names)}." for head, names in parts.items() if names)
    return Text(" ".join(said) or "No weight is chosen yet.")


def reach_text(study: DistillationStudy, share: float = 0.9) -> Text:
    """Steps to reach a share of the plain student's final accuracy on validation images, by method."""
    found = study.reach(share)
    if found.empty:
        return Text("No learning curve on validation images is finished yet.")
    alone, lines = found[found.method == "alone"].steps, []
    for row in found.itertuples():
        text = "never" if math.isnan(row.steps) else f"{row.steps:.0f}"
        if text != "never" and row.method != "alone" and not alone.isna().all():
            text += f", {100 * (row.steps / alone.iloc[0] - 1):+.0f} % of them"
        lines.append(f"{look(row.method).label}: {text}.")
    goal = f"{100 * share:.0f} % of the plain student's final validation accuracy ({100 * found.target.iloc[0]:.1f} %)"
    listed = bullets(lines, f"Steps until {goal}, of {found.total.iloc[0]} steps:")
    return Text(f"{listed}\n\nOne seed; the curve is looked at as often as its figure has signs.")


def steps_until(curve: pd.DataFrame, target: float) -> float:
    """Optimiser steps until the train_accuracy of a curve reaches a target, linear between rows; its last if never."""
    steps, accuracy = (curve[name].to_numpy(float) for name in ("step", "train_accuracy"))
    above = np.flatnonzero(accuracy >= target)
    if not len(above):
        return float(steps[-1])
    part = slice(max(0, above[0] - 1), above[0] + 1)
    return float(np.interp(target, accuracy[part], steps[part]))


def steps_saved(alone: Mapping[int, pd.DataFrame], method: Mapping[int, pd.DataFrame], *, share: float = 0.9) -> Number:
    """Steps until a share of the plain student's final accuracy on training images: alone minus the method, by seed.

    This is the measure by which the report judges whether a student converges faster. [ours]

    Args:
        alone, method: learning curves (columns step and train_accuracy) by seed, without and with a teacher.

    Returns:
        Mean of the paired differences with Student's 95 % interval, in steps; above 0 where the method is faster.
    """
    steps: list[dict[int, float]] = [{}, {}]
    for seed in sorted(set(alone) & set(method)):
        curves = [by_seed[seed].dropna(subset=["train_accuracy"]) for by_seed in (alone, method)]
        for one, curve in zip(steps, curves, strict=True):
            one[seed] = steps_until(curve, share * float(curves[0].train_accuracy.iloc[-1]))
    return of_interval(statistics.paired(*steps).difference, "steps", digits=0, signed=True)


def saved_text(study: DistillationStudy, share: float = 0.9) -> Text:
    """The report's measure of convergence, on training images over the table's seeds: one line per method."""
    pair = study.profile.pairs[0]
    curves: dict[str, dict[int, pd.DataFrame]] = {"alone": {}}
    for cell, result in study.results():
        taught = cell.config.network == pair.student and cell.keys.get("teacher") in ("", pair.teacher.name)
        if cell.role == "student" and taught and "diverged" not in result.metrics:
            curves.setdefault(cell.keys["method"], {})[cell.config.seed] = result.history()
    alone, lines = curves.pop("alone"), []
    for method, by_seed in curves.items():
        if set(by_seed) & set(alone):
            found = steps_saved(alone, by_seed, share=share)
            names = f"{look('alone').label} minus {look(method).label}"
            lines.append(f"{names}: {found}, {statistics.paired_seeds(found.n)}.")
    head = f"Steps until {100 * share:.0f} % of the plain student's final accuracy on training images "
    head += f"(of {study.profile.student_training.steps}), mean difference [95 % interval], above 0 where it is faster:"
    return Text(bullets(lines, head) or _NONE)


def _pixels(images: ImageDataset) -> list[int]:
    return [hash(images.raw(i).tobytes()) for i in range(len(images))]


def seen_text(study: DistillationStudy) -> Text:
    """How many validation images of trials and curves the teacher was fitted on, and how right it is on them."""
    p = study.profile
    config = study.teacher_run(p.pairs[0].teacher)
    if not study.complete and runs.lookup(config) is None:
        return Text("The teacher is not finished yet.")
    used = {}
    if any(len(m.weights) > 1 for m in p.methods):
        used["trials"] = replace(p.trial_data, seed=p.trial_seed)
    if p.curves:
        own = p.data == p.trial_data  # then the curves are those of the first reported runs
        used["learning curves"] = replace(p.trial_data, seed=p.pairs[0].seeds[0] if own else p.trial_seed)
    if len({*used.values()}) == 1:
        used = {" and ".join(used): next(iter(used.values()))}
    if not used:
        return Text("Nothing is chosen or drawn on validation images in this study.")
    model, fitted, parts = _network(study, config), set(_pixels(config.data.load().train)), []
    test = study.result(config).metrics.get("test_accuracy", math.nan)
    for name, source in used.items():
        validation = source.load().validation
        if validation is None:
            continue
        seen = sum(one in fitted for one in _pixels(validation))
        parts.append(f"Of the {len(validation):,} validation images of the {name} the teacher was fitted on {seen:,}.")
        if model is None:
            parts.append("How right it is on them is not shown: its weights are not stored here.")
            continue
        right = training.evaluate(model, validation, precision=p.teacher_training.precision).accuracy
        parts.append(
            f"It is right on {100 * right:.1f} % of these {len(validation):,} and on {100 * test:.1f} % of the "
            f"test images: a difference of {100 * (right - test):+.1f} points."
        )
    return Text(" ".join(parts))


def pull_text(study: DistillationStudy, method: str = "at", *, hardly: float = 0.05) -> Text:
    """How much of the loss a student's layer-wise terms are; below a share of it the sentence warns. [ours]"""
    log, label = study.histories().get(method), look(method).label
    if log is None:
        return Text(f"No student with {label} is finished yet.")
    terms = log[_terms(log, study.methods[method].distillation)].sum(axis=1)
    share = float((log.beta * terms / log.loss).mean())
    text = f"The weight of {label} here is {study.weight(method):g}: its terms are {100 * share:.2g} % of this "
    text += "student's loss (mean over the logged rows)"
    if share < hardly:
        text += f", so they hardly pull, and the row of {label} may look like that of the student alone"
    return Text(f"{text}.")


def _terms(log: pd.DataFrame, distillation: Any) -> list[str]:
    """The columns of a log that hold a student's layer-wise terms."""
    stem = distillation.transfer.replace("-", "_")
    return [] if stem == "none" else [column for column in log if column.startswith(stem)]


def settings(study: DistillationStudy) -> Table:
    """The settings that a reader needs to judge the numbers; `afds study --part attention --show` prints them all."""
    p = study.profile
    used = {name for pair in p.pairs for name in pair.methods}
    tried = [m for m in p.methods if m.weights and m.name in used]
    grids = [f"{look(m.name).label} {{{', '.join(f'{w:g}' for w in m.weights)}}}" for m in tried]
    wide = {a.student: "" if a.student.width == 1 else f" of width {a.student.width:g}" for a in p.pairs}
    held = "a tenth held back for validation" if p.data == p.trial_data else "all training images"
    rows = [
        ("data", f"{place(p.data.name)}, {held}{', reflected crops' if p.data.padding == 'reflect' else ''}"),
        ("teachers and students", "; ".join(f"{a.teacher.name} to {a.student.name}{wide[a.student]}" for a in p.pairs)),
        ("teacher training", stage_text(p.teacher_training, "")),
        ("student training", stage_text(p.student_training, "")),
        ("trial of one weight, nine tenths of the data", stage_text(p.trial, "")),
        ("weights tried; a single one is taken as given", "; ".join(grids)),
        ("seeds", ", ".join(map(str, p.pairs[0].seeds)) + f"; trials: {p.trial_seed}"),
        ("weight decay", f"{p.weight_decay:g}"),
    ]
    return Table(["setting", "value"], rows, numbers=False)


def command(study: DistillationStudy) -> Text:
    """The command that makes the tables again."""
    p = study.profile
    folder = "" if p.data.name.startswith("digits") else " --data-dir DIR"
    return Text(f"Made again by `afds study --part {p.study} --profile {p.name} --scale {p.scale}{folder}`.")


def scope(study: DistillationStudy) -> Text:
    """What a reader must know about the scale before looking at any number."""
    p = study.profile
    epochs = p.student_training.steps * p.student_training.batch_size / max(1, len(p.data.load().train))
    seeds = len(p.pairs[0].seeds)
    text = f"Profile **{p.name}**, scale {p.scale}: {p.data.name}, students of {epochs:.0f} epochs, {seeds} seeds."
    if p.name == "demo":
        text += " The demo shows that the whole chain works; its data are too small and too few to judge any method."
    elif p.data.name == "cifar10" and epochs < 100:
        text += " The published numbers are of 200 epochs: compare methods within the table, not with them."
    return Text(f"{text} {p.not_run}".strip())


def terms_add_up(study: DistillationStudy, method: str, *, tolerance: float = 1e-3) -> bool:
    """Whether the logged loss of a student is hard x CE + soft x T^2 KL + weight x transfer, each at work.

    Row means of products are compared with products of row means, so only a constant weight can be checked.
    """
    found = ((c, r) for c, r in study.results() if c.role == "student" and c.keys["method"] == method)
    cell, result = next(found)
    d, log = cell.config.method, result.history()
    columns = _terms(log, d)
    total = d.hard * log.cross_entropy + (log.beta * log[columns].sum(axis=1) if columns else 0)
    total += d.soft * log.soft if d.soft else 0
    working = bool((log[columns] > 0).all(axis=None)) and (d.transfer == "none" or bool(columns))
    return working and bool(((log.loss - total).abs() <= tolerance * log.loss.abs()).all())


def decays(study: DistillationStudy, method: str = "at-kd") -> bool:
    """Whether the logged weight of a method falls from row to row, from no more than its start to less than half."""
    beta, start = study.histories()[method].beta, study.weight(method)
    return bool(beta.is_monotonic_decreasing and beta.iloc[0] <= start and beta.iloc[-1] < 0.5 * start)


def better_than_guessing(study: DistillationStudy, factor: float = 1.5) -> bool:
    """Whether every teacher and student of the table is right more than `factor` times as often as chance."""
    return bool((study.table().test_accuracy > factor / len(study.profile.data.load().classes)).all())


def stored_like_table(study: DistillationStudy) -> bool:
    """Whether the rows that are stored are the table's, with the same accuracies, one run per row.

    Of the demo, which is never committed, they are the rows that would be stored.
    """
    table, p = study.table(), study.profile
    if p.committed:
        stored = results.named(f"{p.name}/{p.scale}/{p.study}")
    else:
        rows = results.select(engine.table(study), role=("teacher", "student"), reason="")
        stored = results.view(rows, results.COLUMNS)
    known, shown = (rows.set_index("run").test_accuracy for rows in (stored, table))
    same = len(known) == len(shown) == known.index.nunique() and set(known.index) == set(shown.index)
    return same and bool(((known - shown).abs() < 1e-5).all())


def no_test_in_trials(study: DistillationStudy) -> bool:
    """Whether no trial and no curve has read a test image."""
    return not any("test" in key for c, r in study.results() if not c.config.use_test for key in r.metrics)


def falls(study: DistillationStudy, method: str, term: str) -> bool:
    """Whether a logged loss term is smaller at the end of the first student's training than at its start."""
    log = study.histories()[method]
    return bool(log[term].iloc[-1] < log[term].iloc[0])


def taps_of(study: DistillationStudy, where: str) -> tuple[str, str]:
    """The last layer compared in the teacher and in the student, with their networks."""
    pair = study.profile.pairs[0]
    teacher, student = (f"{n.name} {tapped(n.build(2, 0), where)[-1]}" for n in (pair.teacher, pair.student))
    return teacher, student


def compared_sizes(study: DistillationStudy) -> str:
    """Height and width at which the maps of the first student with a layer-wise term are compared."""
    for cell, result in study.results():
        if cell.role == "student" and result.metrics.get("compared"):
            return ", ".join(f"{height}x{width}" for height, width in result.metrics["compared"])
    return "nothing yet"


def nst_memory(shape: Sequence[int] = (64, 1024, 14, 14), kernels: Iterable[str] = ("poly", "gaussian")) -> Table:
    """Measured memory of NST on a layer, beside what a (B, C, C, HW) tensor of its maps would take by itself.

    Args:
        shape: (B, C, H, W) of the student's and the teacher's maps; by default ResNet-101's third stage at 224 px.
        kernels: each is measured, forward and backward, in a process of its own.
    """
    batch, channels, height, width = shape
    kernels, rows = tuple(kernels), []
    with ThreadPoolExecutor() as pool:
        peaks = pool.map(lambda kernel: bench.nst_peak(kernel, tuple(shape)), kernels)
    for kernel, peak in zip(kernels, peaks, strict=True):
        label = look(f"nst-{kernel}").label
        rows.append([f"{label}: forward and backward pass", "not measured" if peak is None else f"{peak:.2f}"])
    avoided = batch * channels * channels * height * width * 4 / 1e9
    rows.append(["one (B, C, C, HW) tensor, never built", f"{avoided:.1f}"])
    return Table([f"B x C x H x W = {' x '.join(map(str, shape))}, float32", "GB beyond the maps"], rows)


def _network(study: DistillationStudy, config: StudentRun) -> nn.Module | None:
    result = views.network(study, config)
    return None if result is None else afs.load(result.artifact(MODEL))


def networks(study: DistillationStudy, *methods: str) -> dict[str, nn.Module] | None:
    """The first teacher and the students of its pair at the first seed, by label; None if one is not stored here."""
    pair = study.profile.pairs[0]
    configs = {"teacher": study.teacher_run(pair.teacher)}
    configs |= {look(m).label: study.student_run(pair, m, pair.seeds[0]) for m in methods}
    models = {name: model for name, config in configs.items() if (model := _network(study, config)) is not None}
    return models if len(models) == len(configs) else None


def view(study: DistillationStudy, *methods: str, index: int = 0) -> maps.MapsView | None:
    """Attention maps of the teacher and some students for one test image; None if a network is not stored."""
    found = networks(study, *methods)
    if found is None:
        return None
    splits = study.profile.data.load()
    classes, label = splits.captions or splits.classes, int(splits.test.targets[index])
    return maps.look_at(found, splits.test.raw(index), classes, label=label)


@torch.no_grad()
def beta_table(study: DistillationStudy, *, images: int = 128) -> Table | None:
    """AT's loss of the first AT student in both scales on training images, and the code's beta in the paper's scale;
    None if the networks are not stored."""
    found = networks(study, "at")
    if found is None:
        return None
    teacher, student = found.values()
    batch = torch.stack([x for x, _ in training.first(study.profile.data.load().statistics, images)])
    source, beta = Teacher(teacher, maps.stages(teacher)), study.weight("at")
    _, theirs = source(batch)
    names = maps.stages(student)
    with taps(student.eval(), names) as features:
        student(batch)
    rows = []
    for group, (name, other) in enumerate(zip(names, source.names, strict=True), 1):
        one, two = attention_map(features[name]), attention_map(theirs[other])
        norm = torch.linalg.vector_norm(one - two, dim=1).mean()
        paper = beta_in_paper_scale(beta, float(norm), one.shape[1])
        loss = f"{float((one - two).square().mean()):.2g}", f"{float(norm):.2g}"
        size = f"group {group}, {features[name].shape[2]}x{features[name].shape[3]}"
        rows.append([size, *loss, f"{beta:g}", f"{paper:.2g}"])
    return Table(["maps", "loss, code", "loss, paper", "β, code", "β, paper, of the same size"], rows)
