"""bf16 on a CPU without instructions for it: convolutions and linear layers of bf16 values, computed in float32.

Torch's own bf16 kernels for such a CPU (one with AVX2 only) take ten times as long as float32. Here the operands are
rounded to bf16, multiplied and summed in float32, and the result is rounded to bf16, which is what the instructions
of other CPUs do, up to the order of the sums; so is the backward pass, and its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["fast_bf16", "has_instructions"]


def has_instructions() -> bool:
    """Whether torch's convolutions use this CPU's bf16 instructions (or oneDNN's own stand-in for them)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _InFloat32(TorchFunctionMode):
    """Inside the block, what autocast would run in bf16 on the CPU runs in float32 between roundings to bf16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.conv2d, torch.nn.functional.linear) or not _autocast_to_bf16():
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            widened = [_rounded(a) for a in args]
            return func(*widened, **{k: _rounded(v) for k, v in kwargs.items()}).bfloat16()


def _autocast_to_bf16() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


def _rounded(value: Any) -> Any:
    """A tensor's values in bf16, as float32; anything else as it is."""
    return value.bfloat16().float() if isinstance(value, torch.Tensor) else value


def fast_bf16(where: torch.device, precision: str) -> AbstractContextManager:
    """A block in which autocast to bf16 is fast on this device; nothing happens where it is so already.

    Args:
        where: the device.
        precision: "bf16"; with another one nothing happens.
    """
    wanted = precision == "bf16" and where.type == "cpu" and not has_instructions()
    return _InFloat32() if wanted else nullcontext()
