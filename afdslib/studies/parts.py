"""The parts of a study by name: each is one plan, or one per target."""

from __future__ import annotations

from collections.abc import Callable

from afdslib.base.errors import AFDSError
from afdslib.studies import profiles, speed, students
from afdslib.studies.ablations import Ablations
from afdslib.studies.comparison import Comparison
from afdslib.studies.engine import Plan
from afdslib.studies.gates import GateStudy
from afdslib.studies.sweep import Study

__all__ = ["PARTS", "of", "plans"]

PARTS = ("sweep", "comparison", "ablations", "gates", *students.STUDIES, "speed")


def of(profile: str) -> list[str]:
    """The parts that a profile has and that can be published for it; speed is the same for all."""
    return [part for part in PARTS if part != "speed" and (part not in students.STUDIES or students.has(part, profile))]


def plans(
    part: str, profile: str, scale: str | None = None, data_dir: str | None = None, target: str | None = None
) -> list[Plan]:
    """The plans of one part of a profile, by name.

    Args:
        part: one of `PARTS`.
        profile, scale, data_dir: see `profiles.get`; the part "speed" is the same for all.
        target: a target by title, of the comparison and its ablations; default: the first.

    Raises:
        AFDSError: an unknown part, profile, scale or target.
    """
    if part not in PARTS:
        raise AFDSError(f"unknown part {part!r} of a study; known are {', '.join(PARTS)}")
    if target is not None and part not in ("comparison", "ablations", "gates"):
        raise AFDSError(f"--target is for the parts comparison, ablations and gates, not for {part}; leave it out")
    if part in students.STUDIES:
        return [students.DistillationStudy(students.get(part, profile, scale, data_dir), complete=False)]
    chosen = profiles.get(profile, scale, data_dir)
    if part == "speed":
        return [speed.SpeedPlan(data_dir)]
    if part == "sweep":
        return [Study(chosen)]
    targets = {one.title: one for one in chosen.targets}
    if target is not None and target not in targets:
        raise AFDSError(f"the profile {profile} has no target {target!r}; it has {', '.join(targets)}")
    comparison = Comparison(chosen, target=targets[target] if target else None)
    kinds: dict[str, Callable[[Comparison], Plan]] = {"ablations": Ablations, "gates": GateStudy}
    return [comparison if part == "comparison" else kinds[part](comparison)]
