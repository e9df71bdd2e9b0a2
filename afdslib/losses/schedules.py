"""How the weight of a transfer loss changes during a run. AT+KD "with decaying beta" was announced with the
attention-transfer code and never released; the shapes are [ours]."""

from __future__ import annotations

import dataclasses
import math

from afdslib.base import checks
from afdslib.base.errors import AFDSError

__all__ = ["BetaSchedule"]

KINDS = ("constant", "linear", "cosine", "step")


@dataclasses.dataclass(frozen=True)
class BetaSchedule:
    """A weight as a function of time, in epochs or in steps: the caller's choice, the same everywhere.

    The kind is "constant"; "linear" or "cosine", from `beta` to `end` over `length`, `end` after it; or "step", `beta`
    times `factor` for each milestone reached.
    """

    kind: str = "constant"
    beta: float = 1.0  # weight at the start
    end: float = 0.0  # weight at the end of a linear or cosine decay
    length: int | None = None  # duration of the decay; None is the whole run
    milestones: tuple[int, ...] = ()  # times of the steps, increasing
    factor: float = 0.1  # at each milestone

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AFDSError(f"The beta schedule {self.kind!r} is unknown; use {', '.join(KINDS)}.")
        for name in ("beta", "end", "factor"):
            checks.number(f"{name} of the beta schedule", getattr(self, name), least=0)
        if self.length is not None:
            checks.number("the length of the beta schedule", self.length, least=1)
        times = self.milestones
        if not isinstance(times, (tuple, list)):
            raise AFDSError(f"The milestones of the beta schedule are {times!r}; give a tuple of increasing times.")
        for time in times:
            checks.number("a milestone of the beta schedule", time, least=0)
        if any(b <= a for a, b in zip(times, times[1:], strict=False)):
            raise AFDSError(f"The milestones of the beta schedule are {times}; give increasing times from 0 on.")
        if self.kind == "step" and not times:
            raise AFDSError("The step beta schedule has no milestones; give at least one, or use 'constant'.")

    def check(self, total: int) -> None:
        """Refuses a decay that would not end, or a milestone that would not be reached, in a run of `total`."""
        what = ""
        if self.kind == "step" and self.milestones[-1] >= total:
            what = f"has a milestone at {self.milestones[-1]} and the run ends at {total}; take it out"
        if self.kind in ("linear", "cosine") and (self.length or 0) > total:
            what = f"takes {self.length} and the run only {total}; shorten the schedule"
        if what:
            raise AFDSError(f"The {self.kind} beta schedule {what} or lengthen the run.")

    def __call__(self, now: float, total: int) -> float:
        """The weight at time `now` (0 at the start) of a run of `total`."""
        self.check(total)
        if self.kind == "constant":
            return self.beta
        if self.kind == "step":
            return self.beta * self.factor ** sum(now >= t for t in self.milestones)
        share = min(max(now / max(self.length or total, 1), 0.0), 1.0)
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.beta + (self.end - self.beta) * share
