"""What this machine has to offer to a stage, found without loading torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cores() -> int:
    """Returns the CPU cores that this process may use: its affinity, cut by the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    return count
