import os
from pathlib import Path

# oneDNN's AVX2 kernel for the weight gradient of a strided 1x1 convolution of fewer than 8 channels (torch 2.15.0)
# writes behind its memory. Only the tests' narrowest networks have such layers; on CPUs without AVX-512 they use older
# kernels. Read when torch first convolves, and inherited by the processes that tests start.
_CPU = Path("/proc/cpuinfo")
if _CPU.is_file() and "avx512" not in _CPU.read_text(encoding="utf-8"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")

import torch  # noqa: E402

# Tiny networks are slower on more threads, and numbers are compared bitwise.
torch.set_num_threads(1)
