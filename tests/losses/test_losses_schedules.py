import math

import pytest

from afdslib.losses.schedules import BetaSchedule


def _values(schedule, total=4):
    return [schedule(now, total) for now in range(total + 1)]


def test_shapes_of_the_four_schedules():
    assert _values(BetaSchedule("constant", 8.0)) == [8, 8, 8, 8, 8]
    assert _values(BetaSchedule("linear", 8.0)) == [8, 6, 4, 2, 0]
    assert _values(BetaSchedule("linear", 8.0, end=4.0, length=2)) == [8, 6, 4, 4, 4]
    assert _values(BetaSchedule("step", 8.0, milestones=(1, 3), factor=0.5)) == [8, 4, 4, 2, 2]
    wanted = [4 + 4 * math.cos(math.pi * t / 4) for t in range(5)]
    assert _values(BetaSchedule("cosine", 8.0)) == pytest.approx(wanted)


def test_the_last_milestone_of_a_run_counts_for_its_last_step():
    schedule = BetaSchedule("step", 8.0, milestones=(9,))
    schedule.check(10)
    assert [schedule(now, 10) for now in (8, 9)] == pytest.approx([8.0, 0.8])
