"""Freed feature maps stay with the process: counted in page faults, not in seconds."""

import os
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from afdslib.base.malloc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(8_000_000).fill_(1.0)  # 32 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
faults(), faults()
print(kept, faults())
"""


def run(**variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    out = subprocess.run([sys.executable, "-c", COUNT], env=clean | variables, stdout=subprocess.PIPE, text=True)
    kept, faults = out.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_freed_block_is_used_again_without_page_faults():
    kept, faults = run()
    if not kept:
        pytest.skip("this C library keeps its own thresholds")
    assert faults < 100  # 5 blocks of 32 MB are 39,000 pages of 4 kB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_users_own_settings_stay():
    kept, faults = run(MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept and faults > 100
