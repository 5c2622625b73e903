"""What the benchmarks that weigh processes share. No benchmark by itself."""

from __future__ import annotations

import sys
from pathlib import Path


def resident_mb(what: str = "VmHWM") -> float:
    """The most memory that this process has held (`VmRSS`: that it holds now), in MB.

    Not from `getrusage` where the kernel tells more: a new process inherits its parent's peak there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        told = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(told[what].split()[0]) / 2**10
    import resource

    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
