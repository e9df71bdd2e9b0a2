"""Kernels of our own in C++, for what no library does: the selected convolution of one image.

They are compiled for this machine when they are first asked for, which takes some seconds, by the C++ compiler that is
found ($CXX, else c++); nothing is kept afterwards. Without a compiler, or with one that fails, there are no kernels,
and dynamic execution masks. [ours]
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from afdslib.afs.layer import AFSConvBN

__all__ = ["KernelConvBN", "add_relu", "available", "suits"]

_SOURCE = Path(__file__).with_name("gated_conv.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 120


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("phi", "phi_bias", "weight", "terms", "gamma", "numbers")),
        *((name, ctypes.c_int64) for name in ("in_channels", "rows", "statics", "dynamic", "places", "side", "stride")),
    ]


@functools.cache
def _library() -> ctypes.CDLL | None:
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.so"
        try:
            command += [*_FLAGS, str(_SOURCE), "-o", str(file)]
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
            library = ctypes.CDLL(str(file))  # torch has loaded its OpenMP before, so both use the same threads
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or str(error).encode()
            logging.getLogger(__name__).debug("no kernels: %s", reason.decode(errors="replace"))
            return None
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.afds_gated_conv.restype = library.afds_add_relu.restype = None
    library.afds_gated_conv.argtypes = [
        ctypes.POINTER(_Layer), *[pointer] * 3, *[integer] * 3, *[number] * 2, *[pointer] * 3,
    ]  # fmt: skip
    library.afds_add_relu.argtypes = [pointer, *[integer] * 2, *[pointer] * 2, integer, *[number] * 2, pointer]
    return library


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the kernels could not be compiled here")
    return library


def available() -> bool:
    """Whether the kernels can be used here; compiles them at the first call."""
    return _library() is not None


def suits(conv: nn.Module | None) -> bool:
    """Whether the kernel computes such a convolution: in float32 on the CPU, a square filter centred on a position."""
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1 or conv.padding_mode != "zeros":
        return False
    high, wide = conv.kernel_size
    centred = high == wide and high % 2 == 1 and conv.padding in ((high // 2, wide // 2), "same")
    known = centred and conv.stride[0] == conv.stride[1] and conv.dilation == (1, 1)
    return known and conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32 and available()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class KernelConvBN(nn.Module):
    """Gates, selection and convolution of one image in one pass; weights are prepared once and not trained.

    The batch norm's fixed statistics are folded into weights and bias: W' = W / std, b' = (b - mean) / std. Only rows
    of living channels are kept, static ones first.

    Args:
        layer: one whose convolution `suits`, in eval mode; it is left as it is.

    Shape:
        - values: (1, n_in, H, W); index: their channel numbers (n_in,), or None for all channels in order
        - pooled: means of the values over positions, (1, n_in); None without dynamic channels
        - result: the kept channels (1, n, H', W'), their numbers by ascending row (n,), and their means over positions
          (1, n); with `relu` negative values become 0

    Raises:
        RuntimeError: when it is called and `available` says no.
    """

    phi: Tensor
    phi_bias: Tensor
    weight: Tensor
    terms: Tensor
    gamma: Tensor
    numbers: Tensor

    @torch.no_grad()
    def __init__(self, layer: AFSConvBN):
        super().__init__()
        conv, norm = layer.conv, layer.norm
        dynamic = layer.m * layer.s > 0
        static_rows, dynamic_rows = ((layer.m > 0) & ~dynamic).nonzero()[:, 0], dynamic.nonzero()[:, 0]
        self.static = len(static_rows)
        self.places = min(max(0, layer.k - self.static), len(dynamic_rows))
        self.side, self.stride = conv.kernel_size[0], conv.stride[0]
        numbers = torch.cat([static_rows, dynamic_rows])
        scale = torch.rsqrt(norm.running_var + norm.eps)  # type: ignore[operator, arg-type]
        bias = ((0 if conv.bias is None else conv.bias) - norm.running_mean) * scale  # type: ignore[operator]
        phi, phi_bias = layer.predictor_weights()
        self.register_buffer("phi", phi[dynamic_rows].T.contiguous())  # (C_in, dynamic)
        self.register_buffer("phi_bias", phi_bias[dynamic_rows].clone())
        self.register_buffer("weight", (conv.weight * scale[:, None, None, None])[numbers].flatten(2).contiguous())
        self.register_buffer("terms", torch.stack([bias, layer.beta])[:, numbers].contiguous())
        self.register_buffer("gamma", layer.gamma[numbers].clone())
        self.register_buffer("numbers", numbers)

    def forward(
        self, values: Tensor, index: Tensor | None, pooled: Tensor | None, relu: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, index, pooled = (None if t is None else t.contiguous() for t in (values, index, pooled))  # type: ignore
        _, inputs, height, width = values.shape
        outputs, rows, in_channels = self.static + self.places, len(self.numbers), self.weight.shape[1]
        maps = values.new_empty(1, outputs, (height - 1) // self.stride + 1, (width - 1) // self.stride + 1)
        kept, means = torch.empty(outputs, dtype=torch.int64), values.new_empty(1, outputs)
        layer = _Layer(
            *map(_address, (self.phi, self.phi_bias, self.weight, self.terms, self.gamma, self.numbers)),
            in_channels, rows, self.static, len(self.phi_bias), self.places, self.side, self.stride,
        )  # fmt: skip
        _loaded().afds_gated_conv(
            layer, *map(_address, (values, index, pooled)), inputs, height, width, relu, torch.get_num_threads(),
            *map(_address, (maps, kept, means)),
        )  # fmt: skip
        return maps, kept, means

    def extra_repr(self) -> str:
        return f"{self.static + self.places} of {len(self.numbers)} living"


def add_relu(stream: Tensor, values: Tensor, index: Tensor, means: Tensor | None) -> tuple[Tensor, Tensor]:
    """relu(stream + values) of one image, in place, where the values are of some channels only.

    Args:
        stream: the maps of all channels, (1, C, H, W); if they are not contiguous, a copy is changed.
        values: maps to add, (1, n, H, W).
        index: their channel numbers, (n,), each once.
        means: of the stream over positions, (1, C), changed in place; None if they are not known. With means, the
            stream's ReLU has been taken before, so only the channels in `index` are touched.

    Returns:
        The stream and its means.

    Raises:
        RuntimeError: if `available` says no.
    """
    stream, values, index, known = stream.contiguous(), values.contiguous(), index.contiguous(), means is not None
    if means is None:
        means = stream.new_empty(stream.shape[:2])
    _loaded().afds_add_relu(
        stream.data_ptr(), stream.shape[1], stream.shape[2] * stream.shape[3], values.data_ptr(), index.data_ptr(),
        len(index), known, torch.get_num_threads(), means.data_ptr(),
    )  # fmt: skip
    return stream, means
