import math

import pytest
import torch

from afdslib.base.errors import AFDSError
from afdslib.losses.hint import Hint, hint_loss


def test_hint_is_the_mean_squared_difference():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted = sum((float(x) - float(y)) ** 2 for x, y in zip(a.flatten(), b.flatten(), strict=True)) / 24
    assert hint_loss(a, b).item() == pytest.approx(wanted, rel=1e-12)
    assert hint_loss(b.clone(), b).item() == 0
    assert torch.autograd.gradcheck(lambda s: hint_loss(s, b), a.requires_grad_())


def test_the_adapter_maps_the_students_channels_to_the_teachers_and_is_trained():
    torch.manual_seed(0)
    hint = Hint(2, 5).double()
    student = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    teacher = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    weight, bias = hint.adapter.weight[:, :, 0, 0], hint.adapter.bias
    adapted = torch.einsum("oc,bchw->bohw", weight, student) + bias[None, :, None, None]
    loss = hint(student, teacher)
    assert loss.item() == pytest.approx((adapted - teacher).square().mean().item(), rel=1e-12)
    loss.backward()
    assert hint.adapter.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "student, words",
    [(torch.zeros(2, 3, 4, 4), "adapter takes (batch, 2"), (torch.zeros(2, 2, 2, 4), "needs equal shapes")],
)
def test_bad_input_is_one_sentence(student, words):
    with pytest.raises(AFDSError) as caught:
        Hint(2, 5)(student, torch.zeros(2, 5, 4, 4))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "student, source, words",
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 4, 4), "holds 2 samples and the teacher's 3"),
        (torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 0, 4), "is empty"),
        (torch.full((2, 3, 4, 4), math.nan), torch.zeros(2, 3, 4, 4), "Student map holds 96 values"),
        (torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), math.inf), "Teacher map holds 96 values"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).requires_grad_(), "feature map carries gradients"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).int(), "is of torch.int32"),
    ],
)
def test_bad_maps_are_one_sentence(student, source, words):
    with pytest.raises(AFDSError) as caught:
        hint_loss(student, source)
    assert words in str(caught.value) and "\n" not in str(caught.value)
