"""Our own kernels against the layers they stand for, in float32."""

import ctypes
import mmap
import sys

import forked
import pytest
import tiny
import torch
from torch import nn

from afdslib import afs
from afdslib.afs.layer import AFSConvBN
from afdslib.base.errors import AFDSError
from afdslib.inference import dynamic, export, kernels

needs_compiler = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler here")


def layer(inputs: int, outputs: int, side: int, stride: int, density: float, *, static: bool = False) -> AFSConvBN:
    """With random statistics, gates of both signs, a tenth of the channels removed and, if asked for, some static."""
    torch.manual_seed(inputs + outputs)
    conv = nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, bias=False)
    made = AFSConvBN(conv, nn.BatchNorm2d(outputs, affine=False)).eval()
    with torch.no_grad():
        made.beta.normal_()
        made.predictor.bias.uniform_(-0.3, 1)
        made.norm.running_mean.normal_()
        made.norm.running_var.uniform_(0.5, 2)
        made.gamma.uniform_(0.3, 1)
        made.m[1 : 1 + outputs // 10] = 0
        if static:
            made.s[::3] = 0
    made.density = density
    return made


@torch.no_grad()
def computed(made: AFSConvBN, x: torch.Tensor, index: torch.Tensor | None, *, relu: bool) -> torch.Tensor:
    """What the kernel gives, as a whole map; its means are checked on the way."""
    own = kernels.KernelConvBN(made)
    values = x if index is None else x[:, index]
    before = values.clone()
    maps, kept, means = own(values, index, values.mean((2, 3)), relu)
    assert torch.equal(values, before) and maps.shape[1] == len(kept) == own.static + own.places
    torch.testing.assert_close(means, maps.mean((2, 3)), rtol=1e-4, atol=1e-5)
    whole = torch.zeros_like(made(x))
    whole[:, kept] = maps
    return whole


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "side", "stride", "size"),
    [
        (1, 1, 1, 1, 1), (5, 3, 1, 1, 4), (70, 40, 1, 1, 14), (33, 90, 1, 1, 7), (12, 20, 1, 2, 9), (12, 20, 1, 2, 8),
        (5, 3, 3, 1, 1), (30, 25, 3, 1, 7), (9, 17, 3, 1, 17), (16, 33, 3, 2, 14), (16, 33, 3, 2, 15),
        (3, 20, 7, 2, 33), (6, 10, 5, 3, 16),
    ],
)  # fmt: skip
def test_the_kernel_equals_the_masked_layer(inputs, outputs, side, stride, size, static):
    x = torch.zeros(1, inputs, size, size)
    index = torch.arange(inputs)[::2]
    for density in (1.0, 0.4):
        made = layer(inputs, outputs, side, stride, density, static=static)
        x[:, index] = torch.randn(1, len(index), size, size)
        for given in (None, index):
            for relu in (False, True):
                wanted = made(x).relu() if relu else made(x)
                found = computed(made, x, given, relu=relu)
                assert float((found - wanted).abs().max()) <= 1e-5 * float(made(x).abs().max())


@needs_compiler
def test_several_threads_give_the_same_ties_go_to_the_lowest_channel_and_importance_zero_is_exactly_zero(monkeypatch):
    made, x = layer(70, 62, 3, 1, 0.4), torch.randn(1, 70, 14, 14)
    assert made.k == 25  # of six threads one has no panel of its own
    found = []
    for threads in (1, 2, 3, 6, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(computed(made, x, None, relu=True))
    assert all(torch.equal(found[0], other) for other in found[1:])
    made, x = layer(4, 8, 1, 1, 0.5), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        made.m.fill_(1)
        made.predictor.weight.zero_()
        # Three are positive, and the first 0 is the fourth.
        made.predictor.bias.copy_(torch.tensor([0.0, 1, -1, 1, 0, 1, 0, 0]))
    maps, kept, _ = kernels.KernelConvBN(made)(x, None, x.mean((2, 3)))
    assert kept.tolist() == [0, 1, 3, 5]
    assert not maps[0, 0].any() and all(bool(maps[0, i].any()) for i in (1, 2, 3))


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect")
def test_nothing_behind_the_maps_is_read():
    """In a process of its own, which a read would kill: the maps end where the next page is forbidden."""

    def check() -> None:
        page = mmap.PAGESIZE
        memory = mmap.mmap(-1, 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + page), page, 0) == 0
        for inputs, side, size in ((1, 1, 1), (5, 1, 1), (9, 1, 2), (6, 1, 3), (3, 1, 5), (2, 3, 5)):
            count = inputs * size * size
            x = torch.frombuffer((ctypes.c_float * count).from_address(start + page - 4 * count), dtype=torch.float32)
            x = x.normal_().view(1, inputs, size, size)
            made = layer(inputs, 6, side, 1, 1.0)
            assert float((computed(made, x, None, relu=False) - made(x)).abs().max()) < 1e-4

    assert forked.ended(forked.start(check)) == 0


@needs_compiler
@pytest.mark.parametrize("size", [1, 4, 7])
def test_a_stream_is_added_to_in_place_with_its_means(size):
    torch.manual_seed(size)
    stream, more = torch.randn(1, 10, size, size), torch.randn(2, 1, 3, size, size)
    indices = torch.tensor([[7, 0, 4], [1, 4, 9]])
    wanted, means = stream.clone(), None
    memory = stream.data_ptr()
    for values, index in zip(more, indices, strict=True):
        wanted = wanted.index_add(1, index, values).relu()
        stream, means = kernels.add_relu(stream, values, index, means)
        assert stream.data_ptr() == memory
        torch.testing.assert_close(stream, wanted, rtol=0, atol=0)
        torch.testing.assert_close(means, wanted.mean((2, 3)))


@needs_compiler
@torch.no_grad()
def test_a_network_of_kernels_equals_the_masked_one_and_runs_no_relu_of_torch():
    model = tiny.gated().eval()
    afs.set_density(model, 0.4)
    x = tiny.batches(12, 12)[0][0]
    network = dynamic.dynamic(model, x[:1], way="kernel")
    assert network.ways == dict.fromkeys(afs.layers(model), "kernel")
    called = [str(node.target) for node in network.kernel.graph.nodes]
    assert "relu" not in called and any("add_relu" in name for name in called)
    with pytest.raises(AFDSError, match="no file can hold"):
        export.save_onnx(network, "unused.onnx", (3, *x.shape[2:]), batch=1)
    for image in x[:4].split(1):
        wanted = model(image)
        assert float((network(image) - wanted).abs().max() / wanted.abs().max()) <= 1e-5


@pytest.mark.parametrize("compiler", ["no-such-compiler", "echo 'a b'"])
@pytest.mark.slow
def test_without_a_working_compiler_layers_are_masked(compiler, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    kernels._library.cache_clear()
    try:
        assert not kernels.available()
        model = tiny.gated().eval()
        x = tiny.batches(1)[0][0]
        network = dynamic.dynamic(model, x, way="kernel")
        assert set(network.ways.values()) == {"mask"}
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
    finally:
        kernels._library.cache_clear()
