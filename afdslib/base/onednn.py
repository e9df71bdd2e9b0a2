"""Around a fault of oneDNN: training layers that write behind their memory on CPUs without AVX-512.

The kernel for the weight gradient of a strided 1x1 convolution of fewer than 8 input channels does so in torch 2.15.0
(channels last, AVX2). Taking the pixels that the stride visits first is the same convolution by another kernel.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["conv2d", "is_affected", "safe_gradients"]


@functools.cache
def is_affected() -> bool:
    """Whether this CPU may take the kernel: any that is not known to have AVX-512."""
    try:
        return "avx512" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def conv2d(
    input: Tensor,  # torch's name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d`, where a layer as above takes the pixels that it visits first."""
    steps = (stride, stride) if isinstance(stride, int) else (tuple(stride) * 2)[:2]
    pads = padding if isinstance(padding, str) else set((padding,) if isinstance(padding, int) else padding)
    if _is_narrow(weight.shape[1], weight.shape[2:], steps) and pads in ({0}, "valid") and groups == 1:
        input, stride = input[..., :: steps[0], :: steps[1]], 1
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _is_narrow(channels: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return channels < 8 and tuple(kernel) == (1, 1) and max(stride) > 1


class _PixelsFirst(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def safe_gradients(model: nn.Module, where: torch.device) -> AbstractContextManager:
    """A block in which the model may be run to differentiate it; nothing happens where the kernel cannot be taken."""
    narrow = any(
        isinstance(m, nn.Conv2d) and _is_narrow(m.in_channels // m.groups, m.kernel_size, m.stride)
        for m in model.modules()
    )
    return _PixelsFirst() if narrow and where.type == "cpu" and is_affected() else nullcontext()
