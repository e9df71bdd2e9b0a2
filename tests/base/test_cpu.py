"""Ways around the CPU's kernels: bf16 by float32, pages that stay, a convolution that writes behind its memory."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from afdslib import training
from afdslib.base import cpu

CPU = torch.device("cpu")


class Convolutions(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the data types of matrix products and the strides of convolutions, both directions."""

    def __init__(self):
        super().__init__()
        self.types, self.strides = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func) or "mm" in str(func):
            self.types |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        if "aten.convolution" in str(func):
            self.strides.append(tuple(next(a for a in args[3:] if isinstance(a, list))))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_instructions(monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: False)


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(4 * 16, 5))


def test_values_and_gradients_are_those_of_torchs_own_bf16_kernels(no_instructions):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def values(context):
        model = _network()
        with context:
            y = model(x)
        y.float().square().sum().backward()
        assert y.dtype is torch.bfloat16
        return [y.float(), *(p.grad for p in model.parameters())]

    with Convolutions() as seen:
        got = values(training.autocast(CPU, "bf16"))
    assert seen.types == {torch.float32}  # no bf16 kernel ran, forwards or backwards
    for one, expected in zip(got, values(torch.autocast("cpu", torch.bfloat16)), strict=True):
        # Another order of sums may round to the neighbouring bf16 value (2 ** -8), which the gradients then sum up.
        torch.testing.assert_close(one, expected, rtol=2**-6, atol=2**-7 * float(expected.detach().abs().max()))


def test_operands_are_rounded_to_bf16_inside_autocast_only_and_a_gradient_can_be_differentiated_again(no_instructions):
    x, w = torch.full((1, 1), 1 + 2**-10), torch.full((1, 1), 1 + 2**-7)
    with training.autocast(CPU, "bf16"):
        y = nn.functional.linear(x, w)
    assert y.item() == 1 + 2**-7  # float32 would give 1.00879...
    with cpu.fast_bf16(CPU, "bf16"):
        assert nn.functional.linear(x, w).item() == pytest.approx((1 + 2**-10) * (1 + 2**-7), abs=1e-7)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with training.autocast(CPU, "bf16"):
        (grad,) = torch.autograd.grad(_network()(x).float().square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp64"])
def test_other_precisions_and_cpus_with_instructions_are_left_alone(precision, no_instructions, monkeypatch):
    with cpu.fast_bf16(CPU, precision) as mode:
        assert mode is None
    monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: True)
    with cpu.fast_bf16(CPU, "bf16") as mode:
        assert mode is None


COUNT = """
import resource, torch
from afdslib.base.cpu import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(12_000_000).fill_(1.0)  # 48 MB: by default such a block is given back
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults(), faults()
kept = keep_freed_memory()
faults(), faults()
print(kept, before[1], faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_freed_block_is_used_again_without_page_faults_unless_the_user_set_the_allocator(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    out = subprocess.run([sys.executable, "-c", COUNT], stdout=subprocess.PIPE, text=True).stdout
    kept, before, faults = out.split()
    if kept == "False":
        pytest.skip("this C library keeps its own thresholds")
    assert int(before) > 100 > int(faults)  # 5 blocks of 48 MB are 59,000 pages of 4 kB
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    assert not cpu.keep_freed_memory.__wrapped__()


def _convolution(channels=4, **options):
    torch.manual_seed(0)
    return nn.Conv2d(channels, 8, **{"kernel_size": 1, "stride": 2} | options).double()


@pytest.mark.parametrize(
    "options",
    [
        {}, {"stride": (1, 2)}, {"padding": "valid"}, {"padding": 1}, {"kernel_size": 3}, {"groups": 4},
        {"channels": 8}, {"stride": 1, "padding": "same"},
    ],
    ids=str,
)  # fmt: skip
def test_the_way_around_is_torchs_convolution_forwards_and_backwards(options):
    layer = _convolution(**options)
    x = torch.randn(2, layer.in_channels, 7, 6, dtype=torch.float64)
    expected = layer(x)
    wanted = torch.autograd.grad(expected.square().sum(), tuple(layer.parameters()))
    with cpu._PixelsFirst():
        got = layer(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(got.square().sum(), tuple(layer.parameters()))
    torch.testing.assert_close(grads, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("channels", "affected", "stride"), [(4, True, 1), (8, True, 2), (4, False, 2)])
def test_only_a_narrow_layer_on_an_affected_cpu_goes_around(channels, affected, stride, monkeypatch):
    monkeypatch.setattr(cpu, "has_onednn_fault", lambda: affected)
    layer = _convolution(channels)
    with Convolutions() as seen, cpu.safe_gradients(nn.Sequential(layer), CPU):
        layer(torch.randn(1, channels, 6, 6, dtype=torch.float64))
    assert seen.strides == [(stride, stride)]


@pytest.mark.parametrize(("flags", "affected"), [("avx2", True), ("avx2 avx512f", False), (None, True)])
def test_which_cpus_are_affected(flags, affected, monkeypatch, tmp_path):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path / "cpuinfo")
    assert cpu.has_onednn_fault.__wrapped__() is affected
