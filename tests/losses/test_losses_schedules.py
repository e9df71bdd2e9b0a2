import math

import pytest

from afdslib.base.errors import AFDSError
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


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: BetaSchedule("exponential"), "'exponential' is unknown"),
        (lambda: BetaSchedule("linear", length=11)(0, 10), "takes 11 and the run only 10"),
        (lambda: BetaSchedule("step", milestones=(5, 12)).check(10), "a milestone at 12 and the run ends at 10"),
        (lambda: BetaSchedule("step", milestones=(10,)).check(10), "a milestone at 10 and the run ends at 10"),
        (lambda: BetaSchedule(beta="1000"), "beta of the beta schedule must be a number of at least 0, got '1000'"),
        (lambda: BetaSchedule(beta=None), "beta of the beta schedule must be a number of at least 0, got None"),
        (lambda: BetaSchedule("linear", length="3"), "length of the beta schedule must be"),
        (lambda: BetaSchedule("step", milestones=("3",)), "a milestone of the beta schedule must be"),
        (lambda: BetaSchedule("step", milestones=5), "milestones of the beta schedule are 5"),
        (lambda: BetaSchedule("step"), "no milestones"),
        (lambda: BetaSchedule("step", milestones=(5, 5)), "increasing"),
        (lambda: BetaSchedule(beta=-1), "beta of the beta schedule must be a number of at least 0, got -1"),
        (lambda: BetaSchedule("linear", length=0), "at least 1"),
    ],
)
def test_bad_schedules_are_one_sentence(call, words):
    with pytest.raises(AFDSError) as caught:
        call()
    assert words in str(caught.value)


def test_the_last_milestone_of_a_run_counts_for_its_last_step():
    schedule = BetaSchedule("step", 8.0, milestones=(9,))
    schedule.check(10)
    assert [schedule(now, 10) for now in (8, 9)] == pytest.approx([8.0, 0.8])
