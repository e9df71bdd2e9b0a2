"""bf16 without instructions for it: the same values as torch's own kernels, in both directions."""

import pytest
import torch
from torch import nn

from afdslib import training
from afdslib.base import bf16 as _bf16

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_instructions(monkeypatch):
    monkeypatch.setattr(_bf16, "has_instructions", lambda: False)


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(4 * 16, 5))


def _pass(context, x):
    model = _network()
    with context:
        y = model(x)
    y.float().square().sum().backward()
    return y, [p.grad for p in model.parameters()]


def _near(got, expected):
    # Another order of sums may round to the neighbouring bf16 value (2 ** -8), which the gradients then sum up.
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-7 * float(expected.detach().abs().max()))


def test_values_and_gradients_are_those_of_torchs_own_bf16_kernels():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y, grads = _pass(training.autocast(CPU, "bf16"), x)
    expected, expected_grads = _pass(torch.autocast("cpu", torch.bfloat16), x)
    assert y.dtype is expected.dtype is torch.bfloat16
    _near(y.float(), expected.float())
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype is want.dtype is torch.float32
        _near(got, want)


def test_operands_and_result_are_rounded_to_bf16():
    x, w = torch.full((1, 1), 1 + 2**-10), torch.full((1, 1), 1 + 2**-7)
    with training.autocast(CPU, "bf16"):
        y = torch.nn.functional.linear(x, w)
    assert y.item() == 1 + 2**-7  # float32 would give 1.00879...
    assert torch.nn.functional.linear(x, w).item() == pytest.approx((1 + 2**-10) * (1 + 2**-7), abs=1e-7)


def test_no_bf16_kernel_runs_forwards_or_backwards():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "convolution" in str(func) or "mm" in str(func):
                seen.append({a.dtype for a in args if isinstance(a, torch.Tensor)})
            return func(*args, **(kwargs or {}))

    with Watch():
        _pass(training.autocast(CPU, "bf16"), torch.randn(2, 3, 8, 8))
    assert seen and all(types == {torch.float32} for types in seen)


def test_what_runs_outside_autocast_stays_in_float32():
    x = torch.full((1, 1), 1 + 2**-10)
    with _bf16.fast_bf16(CPU, "bf16"):
        assert torch.nn.functional.linear(x, x).item() == pytest.approx((1 + 2**-10) ** 2, abs=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp64"])
def test_other_precisions_are_left_alone(precision):
    with _bf16.fast_bf16(CPU, precision) as mode:
        assert mode is None


def test_a_cpu_with_instructions_uses_them(monkeypatch):
    monkeypatch.setattr(_bf16, "has_instructions", lambda: True)
    with _bf16.fast_bf16(CPU, "bf16") as mode:
        assert mode is None


def test_a_gradient_can_be_differentiated_again():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with training.autocast(CPU, "bf16"):
        (grad,) = torch.autograd.grad(_network()(x).float().square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert float(x.grad.abs().sum()) > 0
