"""The way around oneDNN's fault: the same convolutions, only where the fault is, and without the kernel at fault."""

import pytest
import torch
from torch import nn

from afdslib.base import onednn as _onednn

CPU = torch.device("cpu")


def _convolution(channels=4, **options):
    torch.manual_seed(0)
    return nn.Conv2d(channels, 8, **{"kernel_size": 1, "stride": 2} | options).double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (1, 2)},
        {"padding": "valid"},
        {"padding": 1},
        {"kernel_size": 3},
        {"groups": 4},
        {"channels": 8},
        {"stride": 1, "padding": "same"},
    ],
    ids=str,
)
def test_it_is_torchs_convolution_forwards_and_backwards(options):
    layer = _convolution(**options)
    x = torch.randn(2, layer.in_channels, 7, 6, dtype=torch.float64)
    expected = layer(x)
    wanted = torch.autograd.grad(expected.square().sum(), tuple(layer.parameters()))
    got = _onednn.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), tuple(layer.parameters())), wanted, rtol=1e-12, atol=0
    )


class _Strides(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "aten.convolution" in str(func):
            self.seen.append(tuple(next(a for a in args[3:] if isinstance(a, list))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("channels", "affected", "stride"), [(4, True, 1), (8, True, 2), (4, False, 2)])
def test_only_a_narrow_layer_on_an_affected_cpu_goes_around(channels, affected, stride, monkeypatch):
    monkeypatch.setattr(_onednn, "is_affected", lambda: affected)
    monkeypatch.setattr(nn.functional, "conv2d", torch.conv2d)  # the tests' own guard
    layer = _convolution(channels)
    with _Strides() as strides, _onednn.safe_gradients(nn.Sequential(layer), CPU):
        layer(torch.randn(1, channels, 6, 6, dtype=torch.float64))
    assert strides.seen == [(stride, stride)]


@pytest.mark.parametrize(("flags", "affected"), [("avx2", True), ("avx2 avx512f", False), (None, True)])
def test_which_cpus_are_affected(flags, affected, monkeypatch, tmp_path):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(_onednn, "Path", lambda _: tmp_path / "cpuinfo")
    assert _onednn.is_affected.__wrapped__() is affected
