"""Freed memory stays with the process, where the C library is glibc.

By itself glibc hands large blocks back to the system when they are freed, and takes them anew for the next layer,
page by page zeroed. After `keep_freed_memory` it keeps them, at the price of a higher peak. Blocks beyond 32 MiB, the
most it can be told, still come and go: kept, they would leave holes as large.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Names and numbers of malloc.h."""
NEVER = -1
PAD, LARGEST = 64 << 20, 32 << 20
OWN_SETTINGS = (
    "GLIBC_TUNABLES",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "LD_PRELOAD",
)


@cache
def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, unless the environment sets an allocator; returns whether it does."""
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in OWN_SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, PAD))
    return all([mallopt(name, value) == 1 for name, value in settings])
