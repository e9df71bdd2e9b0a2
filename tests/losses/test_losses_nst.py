import math
import subprocess
import sys

import pytest
import torch

from afdslib.base.errors import AFDSError
from afdslib.losses import nst as module
from afdslib.losses.nst import nst_loss

KERNELS = [
    dict(),
    dict(c=0.5),
    dict(kernel="linear"),
    dict(d=1, c=0.3),
    dict(d=3, c=0.1),
    dict(d=4),
    dict(kernel="gaussian"),
]


def _maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _slow_nst(student, teacher, *, kernel="poly", d=2, c=0.0):
    """Entry by entry from the definition, in Python floats."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        points = []
        for x in (s, t):
            rows = [[float(v) for v in row] for row in x.flatten(1)]
            points.append([[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows])
        a, b = points
        pairs = [sum((v - w) ** 2 for v, w in zip(x, y, strict=True)) for x in a for y in b]
        variance = sum(pairs) / len(pairs)

        def k(x, y, variance=variance):
            dot = sum(v * w for v, w in zip(x, y, strict=True))
            if kernel == "linear":
                return dot
            if kernel == "poly":
                return (dot + c) ** d
            return math.exp(-sum((v - w) ** 2 for v, w in zip(x, y, strict=True)) / (2 * variance))

        def mean(left, right, k=k):
            return sum(k(x, y) for x in left for y in right) / (len(left) * len(right))

        total += mean(b, b) + mean(a, a) - 2 * mean(a, b)
    return total / len(student)


@pytest.mark.parametrize("arguments", KERNELS)
@pytest.mark.parametrize("shape", [(2, 7, 2, 2), (2, 3, 4, 4)], ids=["few positions", "few channels"])
def test_nst_is_the_formula_for_different_channels(arguments, shape):
    batch, channels, height, width = shape
    student, teacher = _maps(*shape), _maps(batch, channels + 2, height, width, seed=1)
    wanted = _slow_nst(student, teacher, **arguments)
    assert nst_loss(student, teacher, **arguments).item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("arguments", KERNELS)
@pytest.mark.parametrize("shape", [(2, 12, 3, 3), (3, 6, 6, 6)], ids=["few positions", "few channels"])
def test_single_precision_agrees_with_brute_force_to_1e_5(arguments, shape):
    student, teacher = _maps(*shape), _maps(*shape, seed=1).relu()
    wanted = _slow_nst(student, teacher, **arguments)
    assert nst_loss(student.float(), teacher.float(), **arguments).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("arguments", KERNELS)
@pytest.mark.parametrize("shape", [(2, 5, 2, 2), (2, 2, 3, 3)], ids=["few positions", "few channels"])
def test_nst_gradients(arguments, shape):
    student, teacher = _maps(*shape).requires_grad_(), _maps(2, 3, *shape[2:], seed=1)
    assert torch.autograd.gradcheck(lambda s: nst_loss(s, teacher, **arguments), student)


@pytest.mark.parametrize("arguments", KERNELS)
def test_identical_maps_give_zero(arguments):
    teacher = _maps(3, 4, 3, 3)
    student = teacher.clone().requires_grad_()
    loss = nst_loss(student, teacher, **arguments)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert student.grad.abs().max() < 1e-14


@pytest.mark.parametrize("arguments", KERNELS)
def test_nst_ignores_a_permutation_of_channels(arguments):
    student, teacher = _maps(2, 6, 3, 3), _maps(2, 4, 3, 3, seed=1)
    order, other = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 3, 1, 0])
    shuffled = nst_loss(student[:, order], teacher[:, other], **arguments)
    assert shuffled.item() == pytest.approx(nst_loss(student, teacher, **arguments).item(), rel=1e-12)


@pytest.mark.parametrize("arguments", KERNELS)
def test_channels_that_are_off_do_not_make_the_gradient_explode(arguments):
    student = _maps(2, 6, 3, 3).relu()
    student[:, 2] = 0
    student.requires_grad_()
    nst_loss(student, _maps(2, 4, 3, 3, seed=1), **arguments).backward()
    assert torch.equal(student.grad[:, 2], torch.zeros_like(student.grad[:, 2]))
    assert student.grad.isfinite().all() and student.grad.abs().max() < 10


@pytest.mark.parametrize("arguments", [dict(d=3, c=0.1), dict(kernel="gaussian")])
def test_chunks_do_not_change_value_or_gradient(arguments, monkeypatch):
    teacher, results = _maps(5, 4, 3, 3, seed=1), []
    for size in (1, 2 * 36 * 8, 2**30):  # one sample, two samples, all samples at a time
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        student = _maps(5, 6, 3, 3).requires_grad_()
        loss = nst_loss(student, teacher, **arguments)
        (3 * loss).backward()
        results.append((loss.detach(), student.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def test_all_points_equal_is_zero_for_the_gaussian_kernel():
    ones = torch.ones(2, 1, 3, 3)
    assert nst_loss(ones.clone(), ones, kernel="gaussian").item() == 0


def test_another_map_size_is_averaged_by_area_and_said():
    student, teacher = _maps(2, 3, 4, 4), _maps(2, 5, 2, 2, seed=1)
    with pytest.warns(UserWarning, match="4x4 map and the teacher's 2x2 are compared at 2x2"):
        loss = nst_loss(student, teacher)
    pooled = torch.nn.functional.avg_pool2d(student, 2)
    assert loss.item() == pytest.approx(nst_loss(pooled, teacher).item(), rel=1e-12)


def test_autocast_leaves_the_products_in_full_precision():
    student, teacher = _maps(2, 8, 3, 3, dtype=torch.float32), _maps(2, 8, 3, 3, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nst_loss(student, teacher)
    assert inside.item() == nst_loss(student, teacher).item()


MEASURE = """
import re, resource, sys, torch
from afdslib.losses.nst import nst_loss
torch.set_num_threads(1)
batch, channels, side, arguments = eval(sys.argv[1])
student, teacher = (torch.rand(batch, channels, side, side) for _ in range(2))
student.requires_grad_()
nst_loss(student[:1, :8], teacher[:1, :8], **arguments).backward()
student.grad = None
pages = int(open("/proc/self/statm").read().split()[1])
nst_loss(student, teacher, **arguments).backward()
# Not ru_maxrss, which a child process inherits from the process that started it.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(peak - pages * resource.getpagesize())
"""


def measured(*case) -> int:
    """Bytes that a forward and backward pass needs at its peak, beside its two inputs."""
    command = [sys.executable, "-c", MEASURE, repr(case)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_large_layer_stays_under_the_bar():
    """Batch 64 of 1024x14x14, forward and backward: a (B, C, C, HW) tensor would be 53 GB, (B, C, C) 0.27 GB each."""
    assert measured(64, 1024, 14, {}) < 0.4e9


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("arguments", [dict(d=3), dict(kernel="gaussian")], ids=["cubic", "gaussian"])
def test_memory_of_the_chunked_kernels_does_not_grow_with_the_batch(arguments):
    """Batch 128 of 512x4x4: a (B, C, C) tensor is 134 MB. The product, what the kernel makes of it and the float64 copy
    whose mean is taken are alive at once, in one piece 537 MB; chunks of 8 MB leave half of the bar."""
    assert measured(128, 512, 4, arguments) < 0.4e9


@pytest.mark.parametrize(
    "student, teacher, arguments, words",
    [
        (_maps(2, 3, 4, 4), _maps(3, 3, 4, 4), {}, "holds 2 samples and the teacher's 3"),
        (_maps(2, 0, 4, 4), _maps(2, 3, 4, 4), {}, "is empty"),
        (_maps(2, 3, 4, 4), _maps(2, 3, 4, 4) * math.inf, {}, "Teacher map holds 96 values"),
        (_maps(2, 3, 4, 4), _maps(2, 3, 4, 4).requires_grad_(), {}, "carries gradients"),
        (_maps(2, 3, 4, 4), _maps(2, 3, 4, 4), dict(kernel="cubic"), "kernel 'cubic' is unknown"),
        (_maps(2, 3, 4, 4), _maps(2, 3, 4, 4), dict(d=0), "a whole number of at least 1, got 0"),
        (_maps(2, 3, 4, 4), _maps(2, 3, 4, 4), dict(d=1.5), "whole number"),
        (_maps(2, 3, 4, 4), _maps(2, 3, 4, 4), dict(d=math.nan), "a whole number of at least 1, got nan"),
        (_maps(2, 3, 4, 4), _maps(2, 3, 4, 4), dict(d="two"), "a whole number of at least 1, got 'two'"),
        (_maps(2, 3, 4, 4), _maps(2, 3, 4, 4), dict(c="x"), "a number of at least 0, got 'x'"),
        (_maps(2, 3, 4, 4), _maps(2, 3, 4, 4), dict(c=math.nan), "a number of at least 0, got nan"),
        (_maps(2, 3, 4, 4), _maps(2, 3, 4, 4), dict(c=-1.0), "a number of at least 0"),
        (_maps(2, 3, 4, 4).long(), _maps(2, 3, 4, 4), {}, "is of torch.int64; give floating-point numbers"),
        (_maps(2, 3, 4, 4).float() * 1e25, _maps(2, 3, 4, 4).float(), {}, "its inputs are finite, the largest"),
        (_maps(2, 3, 4, 4).float(), _maps(2, 3, 4, 4).float() * 1e25, dict(d=3), "although its inputs are finite"),
    ],
)
def test_bad_input_is_one_sentence(student, teacher, arguments, words):
    with pytest.raises(AFDSError) as caught:
        nst_loss(student, teacher, **arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
