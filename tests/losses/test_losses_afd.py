"""AFD: the formula, its gradients, and what its attention may and may not do."""

import math

import pytest
import torch
from checks import afd_case, slow_afd

from afdslib.base.errors import AFDSError
from afdslib.losses.afd import AFDLoss, fit_attention


def value(loss, student, source) -> float:
    """R, which is the formula's as its entropy is."""
    measured = {name: float(x.detach()) for name, x in loss(student, source).items()}
    assert tuple(measured.values()) == pytest.approx(slow_afd(loss, student, source), rel=1e-9)
    return measured["afd"]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_loss_and_entropy_are_the_formulas(batch):
    loss, student, source = afd_case(seed=batch, batch=batch)
    assert value(loss, student, source) > 0
    assert float(loss({n: x.clone() for n, x in source.items()}, source)["afd"].detach()) == 0


def test_dead_channels_leave_both_softmax_and_loss():
    loss, student, source = afd_case()
    alive = torch.tensor([True, False, True, True, False])
    loss.set_alive({"layer1.0": alive})
    afd = value(loss, student, source)
    other, _, _ = afd_case(seed=5)
    other.load_state_dict(loss.state_dict())  # a checkpoint holds them
    assert value(other, student, source) == afd
    rho = loss.attention(source)
    assert (rho["layer1.0"][:, ~alive] == 0).all() and (rho["layer2.0"] > 0).all()
    torch.testing.assert_close(rho["layer1.0"].sum(1), torch.ones(3, dtype=torch.float64))
    # What a dead channel holds is of no consequence, not even for the gradient.
    student["layer1.0"][:, 1] = 1e6
    student["layer1.0"].requires_grad_()
    again = loss(student, source)["afd"]
    assert float(again.detach()) == pytest.approx(afd, rel=1e-9)
    again.backward()
    assert (student["layer1.0"].grad[:, ~alive] == 0).all() and (student["layer1.0"].grad[:, alive] != 0).any()
    assert all(bool(p.grad.isfinite().all()) for p in loss.parameters())


def test_gradients_are_those_of_finite_differences():
    loss, student, source = afd_case(batch=2)
    loss.set_alive({"layer1.0": torch.tensor([True, True, True, False, True])})
    inputs = [x.requires_grad_() for x in (*student.values(), *loss.parameters())]
    other = {name: value + 1 for name, value in source.items()}  # the attention reads the source
    assert not torch.allclose(loss.attention(other)["layer1.0"], loss.attention(source)["layer1.0"])
    # The parameters are perturbed in place.
    assert torch.autograd.gradcheck(lambda *_: loss(student, source)["afd"], inputs)


def test_attention_is_uniform_at_step_0():
    _, student, source = afd_case()
    torch.manual_seed(0)
    loss = AFDLoss({name: tuple(x.shape[1:]) for name, x in source.items()}).double()
    for name, rho in loss.attention(source).items():
        torch.testing.assert_close(rho, torch.full_like(rho, 1 / source[name].shape[1]))
    measured = loss(student, source)
    assert float(measured["entropy"]) == pytest.approx((math.log(5) + math.log(4)) / 2)
    uniform = sum((student[n] - x).square().sum((1, 2, 3)).mean() / (2 * x[0, 0].numel()) for n, x in source.items())
    assert float(measured["afd"].detach()) == pytest.approx(float(uniform))
    # Its hidden width is the height, and the bias is per channel.
    attention = AFDLoss({"a": (7, 4, 3)}).attentions["a"]
    assert attention.hidden.weight.shape == (4, 12) and attention.w2.shape == (4,) and attention.b2.shape == (7,)


def test_loss_stays_float32_under_bf16_autocast_and_large_logits_do_not_overflow():
    loss, student, source = afd_case(dtype=torch.float32)
    student, source = ({n: x.bfloat16() for n, x in side.items()} for side in (student, source))
    with torch.autocast("cpu", torch.bfloat16):
        measured, rho = loss(student, source), loss.attention(source)
    assert all(value.dtype == torch.float32 for value in (*measured.values(), *rho.values()))
    exact = loss({n: x.float() for n, x in student.items()}, {n: x.float() for n, x in source.items()})
    assert float(measured["afd"].detach()) == pytest.approx(float(exact["afd"].detach()), rel=1e-6)
    with torch.no_grad():
        loss.attentions["layer1_0"].b2.copy_(torch.tensor([1e4, 0, 0, 0, 0]))
    measured = loss(student, source)
    measured["afd"].backward()
    assert all(bool(v.isfinite().all()) for v in (*measured.values(), *(p.grad for p in loss.parameters())))


# detached


def separable(batches: int = 40):
    """Two classes that differ in channel 3 of layer a only; the other channels are noise."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        labels = torch.randint(0, 2, (16,), generator=generator)
        x = torch.randn(16, 5, 4, 4, generator=generator)
        x[:, 3] += 2.0 * (2 * labels - 1)[:, None, None]
        yield x, labels


def test_detached_attention_finds_the_channel_that_tells_the_classes_apart_and_is_frozen_before_and_after():
    torch.manual_seed(0)
    loss = AFDLoss({"a": (5, 4, 4)}, attention="detached")
    assert not any(p.requires_grad for p in loss.parameters())
    history = fit_attention(loss, lambda images: {"a": images}, separable(), 2, lr=0.1)
    assert len(history) == 40 and sum(history[-10:]) < 0.7 * sum(history[:10])
    assert int(loss.attention({"a": next(separable())[0]})["a"].mean(0).argmax()) == 3
    assert not any(p.requires_grad for p in loss.parameters())
    before = [p.clone() for p in loss.parameters()]
    student = torch.randn(3, 5, 4, 4, requires_grad=True)
    optimiser = torch.optim.SGD([student, *loss.parameters()], lr=1.0, weight_decay=0.1)
    loss({"a": student}, {"a": torch.randn(3, 5, 4, 4)})["afd"].backward()
    optimiser.step()
    assert student.grad.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, loss.parameters(), strict=True))


def test_joint_attention_learns_from_the_loss_that_it_weights():
    loss, student, source = afd_case()
    optimiser, values = torch.optim.SGD(loss.parameters(), lr=0.1), []
    for _ in range(20):
        optimiser.zero_grad()
        measured = loss(student, source)["afd"]
        measured.backward()
        optimiser.step()
        values.append(float(measured.detach()))
    # Features stand still; the loss falls all the same: the attention moves to the channels that differ least.
    assert values[-1] < values[0]


def test_an_attention_that_diverges_is_one_sentence():
    loss = AFDLoss({"a": (5, 4, 4)}, attention="detached")
    batches = [(1e20 * x, labels) for x, labels in separable(6)]
    with pytest.raises(AFDSError, match="did not converge.*learning rate") as caught:
        fit_attention(loss, lambda images: {"a": images}, batches, 2, lr=1e6)
    assert "\n" not in str(caught.value)
    assert not any(p.requires_grad for p in loss.parameters())
