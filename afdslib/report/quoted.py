"""Numbers of others, quoted from `quoted.toml` and not reproduced; every one has its source."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from afdslib.report.plots import look
from afdslib.report.tables import Table, Text
from afdslib.studies.students import DistillationStudy

__all__ = ["Quotation", "gains_text", "quotations", "reported", "table"]


@dataclass(frozen=True)
class Quotation:
    """Numbers of others about one teacher and student."""

    data: str  # the data set
    networks: str  # teacher and student
    measure: str  # "accuracy" or "error"; in percent
    numbers: Mapping[str, str]  # by method, as they are printed; of an error top-1/top-5
    source: str  # who reports them

    @property
    def gains(self) -> dict[str, float]:
        """What each method gains over the student alone, percentage points of (top-1) accuracy."""
        sign = 1 if self.measure == "accuracy" else -1
        first = {method: float(text.partition("/")[0]) for method, text in self.numbers.items() if method != "teacher"}
        alone = first.pop("alone", None)
        return {} if alone is None else {method: round(sign * (value - alone), 2) for method, value in first.items()}


@functools.cache
def quotations() -> tuple[Quotation, ...]:
    """All of them."""
    text = Path(__file__).with_name("quoted.toml").read_text("utf-8")
    return tuple(Quotation(**row) for row in tomllib.loads(text)["quotation"])


def reported(data: str, teacher: str, student: str, method: str) -> str:
    """The accuracy in percent that the method's paper reports for a network of a study, or nothing."""
    for q in quotations():
        one, other = q.networks.lower().split(" to ")
        same = student == one if method == "teacher" else student == other and teacher in ("", one)
        if q.measure == "accuracy" and q.data.replace("-", "").lower() == data and same:
            return q.numbers.get(method, "")
    return ""


def _of(study: DistillationStudy) -> list[Quotation]:
    """Those that belong to a study's notebook."""
    wanted = {"at"} if study.profile.study == "attention" else {"nst", "nst-poly+kd"}
    return [q for q in quotations() if wanted & set(q.numbers)]


def table(study: DistillationStudy) -> Table:
    """What others report, one row per teacher and student, with the source."""
    measures = {"accuracy": "accuracy (%)", "error": "top-1/top-5 error (%)"}
    rows = [
        [f"{q.data}, {q.networks}", measures[q.measure],
         ", ".join(f"{look(method).label} {text}" for method, text in q.numbers.items()), q.source]
        for q in _of(study)
    ]  # fmt: skip
    return Table(["data, teacher to student", "measure", "numbers", "source"], rows, numbers=False)


def gains_text(study: DistillationStudy) -> Text:
    """From where to where the quoted gains run, and how many exceed the spread between the seeds of this study."""
    gains = {
        f"{gain:+.2f} points ({look(m).label}, {q.data}, {q.networks})": gain
        for q in _of(study)
        for m, gain in q.gains.items()
    }
    least, most = (pick(gains, key=lambda text: gains[text]) for pick in (min, max))
    text = f"The {len(gains)} gains over the student alone quoted above run from {least} to {most}."
    students = study.table()
    seeds = students[students.method != "teacher"].groupby(["teacher", "student", "method"]).test_accuracy
    spreads = (100 * (seeds.max() - seeds.min()))[seeds.size() > 1]
    if spreads.empty:
        return Text(f"{text} No student of this study has two seeds, so they cannot be held against a spread.")
    clear = sum(gain > spreads.max() for gain in gains.values())
    text += f" In this study seeds of one method differ by up to {spreads.max():.1f} points (median over methods: "
    return Text(f"{text}{spreads.median():.1f}); {clear} of the quoted gains are larger than that.")
