"""Losses on logits, the hint, and the schedules of their weights."""

import math

import pytest
import torch
from tiny import maps

from afdslib.losses.hint import HintTransfer, hint_loss
from afdslib.losses.kd import kd_loss, soft_kl_loss
from afdslib.losses.lwf import lwf_loss
from afdslib.losses.schedules import BetaSchedule
from afdslib.losses.term import Pair, TermContext

STUDENT = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 1.5]], dtype=torch.float64)
TARGET = torch.tensor([0, 2])


def _softmax(row, T=1.0):
    powers = [math.exp(float(v) / T) for v in row]
    return [p / sum(powers) for p in powers]


def _slow_kl(T):
    total = 0.0
    for s, t in zip(STUDENT, TEACHER, strict=True):
        total += sum(q * math.log(q / p) for p, q in zip(_softmax(s, T), _softmax(t, T), strict=True))
    return T * T * total / len(STUDENT)


@pytest.mark.parametrize("T, alpha", [(4.0, 0.9), (1.0, 0.0), (2.0, 1.0), (0.5, 0.3)])
def test_kd_is_the_formula(T, alpha):
    ce = -sum(math.log(_softmax(s)[int(y)]) for s, y in zip(STUDENT, TARGET, strict=True)) / 2
    wanted = alpha * _slow_kl(T) + (1 - alpha) * ce
    assert kd_loss(STUDENT, TEACHER, TARGET, T=T, alpha=alpha).item() == pytest.approx(wanted, rel=1e-12)


def test_kd_runs_in_full_precision_on_half_precision_logits_and_nsts_recipe_is_the_kl_at_temperature_four():
    half = kd_loss(STUDENT.half(), TEACHER.half(), TARGET)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(kd_loss(STUDENT, TEACHER, TARGET).item(), rel=1e-3)
    a, b = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    (16 * torch.nn.functional.cross_entropy(a / 4, (TEACHER / 4).softmax(1))).backward()  # of the soft cross-entropy
    soft_kl_loss(b, TEACHER, T=4.0).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_lwf_is_the_softened_kl_and_zero_when_nothing_is_forgotten_and_gradients_are_those_of_finite_differences():
    assert lwf_loss(STUDENT, TEACHER).item() == pytest.approx(_slow_kl(2.0), rel=1e-12)
    assert lwf_loss(TEACHER.clone(), TEACHER).item() == pytest.approx(0, abs=1e-15)
    for loss in (lambda s: kd_loss(s, TEACHER, TARGET), lambda s: lwf_loss(s, TEACHER)):
        assert torch.autograd.gradcheck(loss, STUDENT.clone().requires_grad_())


def test_hint_is_the_mean_squared_difference_of_the_adapted_student_and_trains_the_adapter():
    a, b = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1)
    wanted = sum((float(x) - float(y)) ** 2 for x, y in zip(a.flatten(), b.flatten(), strict=True)) / 24
    assert hint_loss(a, b).item() == pytest.approx(wanted, rel=1e-12) and hint_loss(b.clone(), b).item() == 0
    assert torch.autograd.gradcheck(lambda s: hint_loss(s, b), a.requires_grad_())
    term = HintTransfer(TermContext(None, torch.nn.Identity(), (Pair("a", "b", (2, 4, 4), (5, 4, 4)),)))
    student, teacher, adapter = maps(3, 2, 4, 4), maps(3, 5, 4, 4), term.module.double()[0]
    adapted = torch.einsum("oc,bchw->bohw", adapter.weight[:, :, 0, 0], student) + adapter.bias[None, :, None, None]
    loss = term.compare(student, teacher, 0)
    assert loss.item() == pytest.approx((adapted - teacher).square().mean().item(), rel=1e-12)
    loss.backward()
    assert adapter.weight.grad.abs().sum() > 0


def test_the_four_schedules_and_the_last_milestone_which_counts_for_the_last_step():
    for schedule, values in (
        (BetaSchedule("constant", 8.0), [8, 8, 8, 8, 8]), (BetaSchedule("linear", 8.0), [8, 6, 4, 2, 0]),
        (BetaSchedule("linear", 8.0, end=4.0, length=2), [8, 6, 4, 4, 4]),
        (BetaSchedule("step", 8.0, milestones=(1, 3), factor=0.5), [8, 4, 4, 2, 2]),
        (BetaSchedule("cosine", 8.0), [4 + 4 * math.cos(math.pi * t / 4) for t in range(5)]),
    ):  # fmt: skip
        assert [schedule(now, 4) for now in range(5)] == pytest.approx(values)
    schedule = BetaSchedule("step", 8.0, milestones=(9,))
    schedule.check(10)
    assert [schedule(now, 10) for now in (8, 9)] == pytest.approx([8.0, 0.8])
