from pathlib import Path

import torch
import torch.nn.functional as F

# Tiny networks are slower on more threads, and numbers are compared bitwise.
torch.set_num_threads(1)

# oneDNN's AVX2 kernel for the weight gradient of a strided 1x1 convolution of fewer than 8 channels (torch 2.15.0)
# writes behind its memory. Only the tests' narrowest networks have such layers; on CPUs without AVX-512 the pixels that
# they read are taken first, which is the same convolution.
_conv2d = F.conv2d


def _without_stride(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    steps = tuple(stride) if isinstance(stride, (tuple, list)) else (stride, stride)
    unpadded = padding in (0, (0, 0), [0, 0])
    if weight.shape[1] < 8 and tuple(weight.shape[2:]) == (1, 1) and max(steps) > 1 and unpadded and groups == 1:
        x, stride = x[:, :, :: steps[0], :: steps[1]], 1
    return _conv2d(x, weight, bias, stride, padding, dilation, groups)


_CPU = Path("/proc/cpuinfo")
if _CPU.is_file() and "avx512" not in _CPU.read_text(encoding="utf-8"):
    F.conv2d = _without_stride
