"""Freed memory is kept and used again; whoever sets an allocator keeps it."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from tempering.core.allocator import keep_freed_memory
kept = keep_freed_memory()
def blocks(count):
    for _ in range(count):
        torch.zeros(20 << 20, dtype=torch.uint8)
blocks(20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks(10)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(("own", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, False)])
def test_a_freed_block_is_taken_again_without_a_page_fault(own, kept):
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", **own}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    said, faults = done.stdout.split()
    assert said == str(kept) and (int(faults) < 1000) == kept  # 20 MB are 5,120 pages
