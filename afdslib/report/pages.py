"""The pages that `afds publish` writes beside the results."""

from __future__ import annotations

from pathlib import Path

from afdslib.report import speed, students, sweep
from afdslib.studies.engine import Plan, pending
from afdslib.studies.students import DistillationStudy
from afdslib.studies.sweep import Study

__all__ = ["write"]


def write(plan: Plan) -> list[Path]:
    """The pages of a plan's results, and its measured times; none before all of it is finished."""
    if pending(plan):
        return []
    if isinstance(plan, Study):
        times = speed.write_times(plan)
        return [sweep.write_page(plan), *([times] if times else [])]
    if isinstance(plan, DistillationStudy):
        return [students.write_page(plan)]
    return []
