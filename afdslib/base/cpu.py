"""Ways around slow or faulty kernels of the CPU: bf16 without instructions, freed memory, a fault of oneDNN."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

__all__ = ["fast_bf16", "has_bf16_instructions", "has_onednn_fault", "keep_freed_memory", "safe_gradients"]


def has_bf16_instructions() -> bool:
    """Whether torch's convolutions use this CPU's bf16 instructions (or oneDNN's own stand-in for them)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _InFloat32(TorchFunctionMode):
    """What autocast would run in bf16 on the CPU runs in float32 between roundings, as by the CPUs' instructions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
        if func not in (torch.conv2d, nn.functional.linear) or not to_bf16:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.bfloat16().float(), (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs).bfloat16()


def fast_bf16(where: torch.device, precision: str) -> AbstractContextManager:
    """A block in which autocast to bf16 is fast; on a CPU with AVX2 only, torch's kernels take ten times as long."""
    wanted = precision == "bf16" and where.type == "cpu" and not has_bf16_instructions()
    return _InFloat32() if wanted else nullcontext()


@functools.cache
def keep_freed_memory() -> bool:
    """Asks glibc to keep freed blocks of up to 2 GB, and says whether it does; a user's MALLOC_* settings stay.

    By default each next feature map costs a page fault per 4 kB: evaluating the gated network of imagenet32 at batch
    256 takes 0.71 s instead of 0.42 s (one thread, bf16). Before 2.35, glibc refuses such a threshold.
    """
    own = any(name.startswith("MALLOC_") for name in os.environ)
    if own or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD; with the second alone, blocks above 128 kB would always be returned.
    return bool(mallopt(-3, 2**31 - 1) and mallopt(-1, 2**31 - 1))


@functools.cache
def has_onednn_fault() -> bool:
    """Whether this CPU may take the kernel of `safe_gradients`: any that is not known to have AVX-512."""
    try:
        return "avx512" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def _is_narrow(channels: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return channels < 8 and tuple(kernel) == (1, 1) and max(stride) > 1


def _conv2d(input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, *rest: Any, **more: Any):
    """`torch.conv2d`; a narrow layer without padding and groups takes the pixels first that its stride visits."""
    steps = (stride, stride) if isinstance(stride, int) else (tuple(stride) * 2)[:2]
    pads = padding if isinstance(padding, str) else set((padding,) if isinstance(padding, int) else padding)
    groups = more.get("groups", rest[1] if len(rest) > 1 else 1)
    if _is_narrow(weight.shape[1], weight.shape[2:], steps) and pads in ({0}, "valid") and groups == 1:
        input, stride = input[..., :: steps[0], :: steps[1]], 1
    return torch.conv2d(input, weight, bias, stride, padding, *rest, **more)


class _PixelsFirst(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def safe_gradients(model: nn.Module, where: torch.device) -> AbstractContextManager:
    """A block in which the model may be differentiated on any CPU; where nothing is at fault it does nothing.

    On CPUs without AVX-512, torch 2.15.0's kernel for the weight gradient of a strided 1x1 convolution of fewer than 8
    input channels writes behind its memory (channels last). The same convolution of a subsampled input does not.
    """
    narrow = any(
        isinstance(m, nn.Conv2d) and _is_narrow(m.in_channels // m.groups, m.kernel_size, m.stride)
        for m in model.modules()
    )
    return _PixelsFirst() if narrow and where.type == "cpu" and has_onednn_fault() else nullcontext()
