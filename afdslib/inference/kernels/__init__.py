"""Kernels of our own in C++, for what no library does: the selected convolution of one image.

They are compiled for this machine when they are first asked for, which takes some seconds, by the C++ compiler that is
found ($CXX, else c++); nothing is kept afterwards. Without a compiler, or with one that fails, there are no kernels,
and dynamic execution masks. [ours]
"""

from __future__ import annotations

import copy
import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afdslib.afs.compact import fold_norm
from afdslib.afs.layer import AFSConvBN

__all__ = ["KernelConvBN", "add_relu", "available", "suits"]

_SOURCE = Path(__file__).with_name("gated_conv.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 120


@functools.cache
def _library() -> Any:
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
    for function, count in ((library.afds_gated_conv, 12), (library.afds_add_relu, 9)):
        function.restype, function.argtypes = None, [ctypes.c_void_p] * count  # pointers and int64_t: 8 bytes each
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


def _addresses(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


class KernelConvBN(nn.Module):
    """Gates, selection and convolution of one image in one pass; weights are prepared once and not trained.

    The batch norm's fixed statistics are folded into weights and bias. Only rows of living channels are kept, static
    ones first. It needs `available`.

    Args:
        layer: one whose convolution `suits`, in eval mode; it is left as it is.

    Shape:
        - values: (1, n_in, H, W); index: their channel numbers (n_in,), or None for all channels in order
        - pooled: means of the values over positions, (1, n_in); None without dynamic channels
        - result: the kept channels (1, n, H', W'), their numbers by ascending row (n,), and their means over positions
          (1, n); with `relu` negative values become 0
    """

    @torch.no_grad()
    def __init__(self, layer: AFSConvBN):
        super().__init__()
        conv = copy.deepcopy(layer.conv)
        fold_norm(conv, layer.norm)
        dynamic = layer.m * layer.s > 0
        static_rows, dynamic_rows = (rows.nonzero()[:, 0] for rows in ((layer.m > 0) & ~dynamic, dynamic))
        rows = torch.cat([static_rows, dynamic_rows])
        self.static = len(static_rows)
        self.places = min(max(0, layer.k - self.static), len(dynamic_rows))
        self.side, self.stride = conv.kernel_size[0], conv.stride[0]
        phi, phi_bias = layer.predictor_weights()
        self.phi = nn.Buffer(phi[dynamic_rows].T.contiguous())  # (C_in, dynamic)
        self.phi_bias = nn.Buffer(phi_bias[dynamic_rows])
        self.weight = nn.Buffer(conv.weight[rows].flatten(2).contiguous())
        self.terms = nn.Buffer(torch.stack([conv.bias, layer.beta])[:, rows].contiguous())  # type: ignore[list-item]
        self.gamma, self.numbers = nn.Buffer(layer.gamma[rows]), nn.Buffer(rows)

    def forward(
        self, values: Tensor, index: Tensor | None, pooled: Tensor | None, relu: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, index, pooled = (None if t is None else t.contiguous() for t in (values, index, pooled))  # type: ignore
        _, inputs, height, width = values.shape
        outputs = self.static + self.places
        maps = values.new_empty(1, outputs, (height - 1) // self.stride + 1, (width - 1) // self.stride + 1)
        kept, means = torch.empty(outputs, dtype=torch.int64), values.new_empty(1, outputs)
        layer = (ctypes.c_int64 * 13)(  # the struct Layer
            *_addresses(self.phi, self.phi_bias, self.weight, self.terms, self.gamma, self.numbers),
            self.weight.shape[1], len(self.numbers), self.static, len(self.phi_bias), self.places, self.side,
            self.stride,
        )  # fmt: skip
        _library().afds_gated_conv(
            layer, *_addresses(values, index, pooled), inputs, height, width, relu, torch.get_num_threads(),
            *_addresses(maps, kept, means),
        )  # fmt: skip
        return maps, kept, means


def add_relu(stream: Tensor, values: Tensor, index: Tensor, means: Tensor | None) -> tuple[Tensor, Tensor]:
    """relu(stream + values) of one image, in place, where the values are of some channels only; needs `available`.

    Args:
        stream: the maps of all channels, (1, C, H, W); if they are not contiguous, a copy is changed.
        values: maps to add, (1, n, H, W).
        index: their channel numbers, (n,), each once.
        means: of the stream over positions, (1, C), changed in place; None if they are not known. With means, the
            stream's ReLU has been taken before, so only the channels in `index` are touched.

    Returns:
        The stream and its means.
    """
    stream, values, index, known = stream.contiguous(), values.contiguous(), index.contiguous(), means is not None
    means = stream.new_empty(stream.shape[:2]) if means is None else means
    _library().afds_add_relu(
        stream.data_ptr(), stream.shape[1], stream.shape[2] * stream.shape[3], *_addresses(values, index), len(index),
        known, torch.get_num_threads(), means.data_ptr(),
    )  # fmt: skip
    return stream, means
