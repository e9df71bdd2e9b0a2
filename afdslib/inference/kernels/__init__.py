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
from torch import Tensor

__all__ = ["add_relu", "available", "gated_conv"]

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
        made = Path(folder) / "kernels.so"
        try:
            subprocess.run(
                [*command, *_FLAGS, str(_SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=_SECONDS
            )
            # torch has loaded its OpenMP before, so both use the same threads.
            library = ctypes.CDLL(str(made))
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error).encode()
            logging.getLogger(__name__).debug("no kernels: %s", said.decode(errors="replace"))
            return None
    library.afds_gated_conv.restype = None
    library.afds_gated_conv.argtypes = [
        ctypes.POINTER(_Layer), *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, *[ctypes.c_int] * 2,
        *[ctypes.c_void_p] * 3,
    ]  # fmt: skip
    library.afds_add_relu.restype = None
    library.afds_add_relu.argtypes = [
        ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_int] * 2,
        ctypes.c_void_p,
    ]  # fmt: skip
    return library


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the kernels could not be compiled here")
    return library


def available() -> bool:
    """Whether the kernels can be used here; compiles them at the first call."""
    return _library() is not None


def gated_conv(
    values: Tensor,
    index: Tensor | None,
    pooled: Tensor | None,
    *,
    phi: Tensor,
    phi_bias: Tensor,
    weight: Tensor,
    terms: Tensor,
    gamma: Tensor,
    numbers: Tensor,
    statics: int,
    places: int,
    side: int,
    stride: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, selection and convolution of one image in one pass, in float32 on the CPU.

    Args:
        values: the input's maps, (1, n, H, W).
        index: their channel numbers, (n,), or None for all channels in order.
        pooled: their means over positions, (1, n); None without dynamic channels.
        phi: the predictor by input, (in_channels, dynamic).
        phi_bias: (dynamic,).
        weight: of the living channels, static ones first, (rows, in_channels, side * side).
        terms: their biases and betas, (2, rows).
        gamma: their constant scales, (rows,).
        numbers: their channel numbers, (rows,).
        statics: how many are static.
        places: how many of the dynamic ones are selected.
        side: height and width of the filters, odd; side // 2 zeros surround the maps.
        stride: in both directions.
        relu: whether negative results become 0.

    Returns:
        The maps of the kept channels, (1, statics + places, H', W'), their channel numbers by ascending row,
        (statics + places,), and the maps' means over positions, (1, statics + places).

    Raises:
        RuntimeError: if `available` says no.
    """
    values, index = values.contiguous(), None if index is None else index.contiguous()
    pooled = None if pooled is None else pooled.contiguous()
    _, inputs, height, width = values.shape
    outputs = statics + places
    made = values.new_empty(1, outputs, (height - 1) // stride + 1, (width - 1) // stride + 1)
    kept = torch.empty(outputs, dtype=torch.int64)
    means = values.new_empty(1, outputs)
    layer = _Layer(
        phi.data_ptr(), phi_bias.data_ptr(), weight.data_ptr(), terms.data_ptr(), gamma.data_ptr(), numbers.data_ptr(),
        weight.shape[1], weight.shape[0], statics, phi_bias.shape[0], places, side, stride,
    )  # fmt: skip
    _loaded().afds_gated_conv(
        layer, values.data_ptr(), None if index is None else index.data_ptr(),
        None if pooled is None else pooled.data_ptr(), inputs, height, width, relu, torch.get_num_threads(),
        made.data_ptr(), kept.data_ptr(), means.data_ptr(),
    )  # fmt: skip
    return made, kept, means


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
