import math
import subprocess
import sys

import pytest
import torch
from tiny import maps

from afdslib.losses import nst as module
from afdslib.losses.nst import nst_loss

KERNELS = [
    dict(), dict(c=0.5), dict(kernel="linear"), dict(d=1, c=0.3), dict(d=3, c=0.1), dict(d=4), dict(kernel="gaussian"),
]  # fmt: skip


def _slow_nst(student, teacher, *, kernel="poly", d=2, c=0.0):
    """Entry by entry from the definition, in Python floats."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        a, b = ([[v / (math.hypot(*row) or 1) for v in row] for row in x.flatten(1).tolist()] for x in (s, t))
        variance = sum(math.dist(x, y) ** 2 for x in a for y in b) / len(a) / len(b)

        def k(x, y, variance=variance):
            dot = sum(v * w for v, w in zip(x, y, strict=True))
            if kernel == "gaussian":
                return math.exp(-(math.dist(x, y) ** 2) / (2 * variance))
            return dot if kernel == "linear" else (dot + c) ** d

        def mean(left, right, k=k):
            return sum(k(x, y) for x in left for y in right) / (len(left) * len(right))

        total += mean(b, b) + mean(a, a) - 2 * mean(a, b)
    return total / len(student)


@pytest.mark.parametrize("arguments", KERNELS)
@pytest.mark.parametrize("channels, side", [(7, 2), (3, 4)], ids=["few positions", "few channels"])
def test_nst_is_the_formula_for_different_channels(arguments, channels, side):
    student, teacher = maps(2, channels, side, side), maps(2, channels + 2, side, side, seed=1)
    wanted = _slow_nst(student, teacher, **arguments)
    assert nst_loss(student, teacher, **arguments).item() == pytest.approx(wanted, rel=1e-10)
    teacher = teacher.relu()
    wanted = _slow_nst(student, teacher, **arguments)
    assert nst_loss(student.float(), teacher.float(), **arguments).item() == pytest.approx(wanted, rel=1e-5)
    student, teacher = student[:, :5].requires_grad_(), teacher[:, :3]
    assert torch.autograd.gradcheck(lambda s: nst_loss(s, teacher, **arguments), student)


@pytest.mark.parametrize("arguments", KERNELS)
def test_identical_maps_give_zero_and_a_permutation_of_channels_changes_nothing(arguments):
    same = maps(3, 4, 3, 3).requires_grad_()
    loss = nst_loss(same, same.detach(), **arguments)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14) and same.grad.abs().max() < 1e-14
    ones = torch.ones(2, 1, 3, 3)  # points that are all equal
    assert nst_loss(ones.clone(), ones, **arguments).item() == 0
    student, teacher = maps(2, 6, 3, 3), maps(2, 4, 3, 3, seed=1)
    order, other = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 3, 1, 0])
    shuffled = nst_loss(student[:, order], teacher[:, other], **arguments)
    assert shuffled.item() == pytest.approx(nst_loss(student, teacher, **arguments).item(), rel=1e-12)


@pytest.mark.parametrize("arguments", KERNELS)
def test_channels_that_are_off_do_not_make_the_gradient_explode(arguments):
    student = maps(2, 6, 3, 3).relu()
    student[:, 2] = 0
    student.requires_grad_()
    nst_loss(student, maps(2, 4, 3, 3, seed=1), **arguments).backward()
    assert torch.equal(student.grad[:, 2], torch.zeros_like(student.grad[:, 2]))
    assert student.grad.isfinite().all() and student.grad.abs().max() < 10


@pytest.mark.parametrize("arguments", [dict(d=3, c=0.1), dict(kernel="gaussian")])
def test_chunks_do_not_change_value_or_gradient(arguments, monkeypatch):
    teacher, results = maps(5, 4, 3, 3, seed=1), []
    for size in (1, 2 * 36 * 8, 2**30):  # one sample, two samples, all samples at a time
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        student = maps(5, 6, 3, 3).requires_grad_()
        loss = nst_loss(student, teacher, **arguments)
        (3 * loss).backward()
        results.append((loss.detach(), student.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def test_another_map_size_is_averaged_by_area_and_said_and_autocast_leaves_products_in_full_precision():
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 2, 2, seed=1)
    with pytest.warns(UserWarning, match="4x4 map and the teacher's 2x2 are compared at 2x2"):
        loss = nst_loss(student, teacher)
    pooled = torch.nn.functional.avg_pool2d(student, 2)
    assert loss.item() == pytest.approx(nst_loss(pooled, teacher).item(), rel=1e-12)
    pooled, teacher = pooled.float(), teacher.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nst_loss(pooled, teacher)
    assert inside.item() == nst_loss(pooled, teacher).item()


MEASURE = """
import os, re, resource, torch
from afdslib.losses.nst import nst_loss
torch.set_num_threads(1)
for batch, channels, side, arguments in %r:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    student, teacher = (torch.rand(batch, channels, side, side) for _ in range(2))
    student.requires_grad_()
    nst_loss(student[:1, :8], teacher[:1, :8], **arguments).backward()
    student.grad = None
    pages = int(open("/proc/self/statm").read().split()[1])
    nst_loss(student, teacher, **arguments).backward()
    # Not ru_maxrss, which a child process inherits from the process that started it.
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    print(peak - pages * resource.getpagesize(), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_large_layers_and_batches_stays_under_the_bar():
    """At its peak, forward and backward, beside the inputs; each case in a process of its own.

    Of batch 64 of 1024x14x14 a (B, C, C, HW) tensor would be 53 GB, (B, C, C) 0.27 GB each. Of batch 128 of 512x4x4 a
    (B, C, C) tensor is 134 MB: the product, what the kernel makes of it and the float64 copy whose mean is taken are
    alive at once, in one piece 537 MB; chunks of 8 MB leave half of the bar.
    """
    cases = [(64, 1024, 14, {}), (128, 512, 4, dict(d=3)), (128, 512, 4, dict(kernel="gaussian"))]
    command = [sys.executable, "-c", MEASURE % cases]
    peaks = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(peaks) == 3 and all(0 < int(peak) < 0.4e9 for peak in peaks), peaks
