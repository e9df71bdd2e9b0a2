import math

import pytest
import torch

from afdslib.base.errors import AFDSError
from afdslib.losses.kd import kd_loss, soft_kl_loss
from afdslib.losses.lwf import lwf_loss

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


def test_kd_gradients():
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, TEACHER, TARGET), student)
    assert torch.autograd.gradcheck(lambda s: lwf_loss(s, TEACHER), student)


def test_the_nst_recipe_of_sixteen_times_the_soft_cross_entropy_is_the_kl_at_temperature_four():
    a, b = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    (16 * torch.nn.functional.cross_entropy(a / 4, (TEACHER / 4).softmax(1))).backward()
    soft_kl_loss(b, TEACHER, T=4.0).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_lwf_is_the_softened_kl_and_zero_when_nothing_is_forgotten():
    assert lwf_loss(STUDENT, TEACHER).item() == pytest.approx(_slow_kl(2.0), rel=1e-12)
    assert lwf_loss(TEACHER.clone(), TEACHER).item() == pytest.approx(0, abs=1e-15)


def test_kd_runs_in_full_precision_on_half_precision_logits():
    half = kd_loss(STUDENT.half(), TEACHER.half(), TARGET)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(kd_loss(STUDENT, TEACHER, TARGET).item(), rel=1e-3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(T=0), "temperature T must be a number above 0, got 0"),
        (dict(T=-1.0), "temperature T must be a number above 0, got -1.0"),
        (dict(T=float("nan")), "temperature T must be a number above 0, got nan"),
        (dict(alpha=1.5), "must be a number in [0, 1], got 1.5"),
        (dict(teacher=TEACHER[:1]), "holds 2 samples and the teacher's 1"),
        (dict(teacher=TEACHER[:, :2]), "equal shapes"),
        (dict(teacher=TEACHER.clone().requires_grad_()), "carries gradients"),
        (dict(teacher=TEACHER * math.nan), "Teacher logits holds 6 values"),
        (dict(student=STUDENT[:0], teacher=TEACHER[:0]), "is empty"),
        (dict(target=TARGET[:1]), "one class index per sample"),
        (dict(target=TARGET.double()), "target is torch.float64 of the shape (2,) for 2 samples"),
        (dict(target=TARGET.int()), "int64"),
        (dict(target=STUDENT.softmax(1)), "one class index per sample"),
        (dict(target=torch.tensor([0, -100])), "target -100 is none of the 3 classes"),
        (dict(target=torch.tensor([-100, -100])), "target -100 is none of the 3 classes"),
        (dict(target=torch.tensor([0, 3])), "target 3 is none of the 3 classes; give indices from 0 to 2"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    arguments = dict(student=STUDENT, teacher=TEACHER, target=TARGET) | arguments
    student, teacher, target = (arguments.pop(n) for n in ("student", "teacher", "target"))
    with pytest.raises(AFDSError) as caught:
        kd_loss(student, teacher, target, **arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "logits, old, words",
    [
        (STUDENT, TEACHER[:1], "holds 2 samples and the teacher's 1"),
        (STUDENT, TEACHER[:, :2], "equal shapes"),
        (STUDENT[:0], TEACHER[:0], "is empty"),
        (STUDENT * math.nan, TEACHER, "Student logits holds 6 values"),
        (STUDENT, TEACHER.clone().requires_grad_(), "The teacher's logits carries gradients"),
    ],
)
def test_bad_old_logits_are_one_sentence(logits, old, words):
    with pytest.raises(AFDSError) as caught:
        lwf_loss(logits, old)
    assert words in str(caught.value) and "\n" not in str(caught.value)
