"""This CPU: its cores, its memory, and its vector instructions, on which a speed, a precision or last digits depend."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_INSTRUCTIONS = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "AMX": {"amx_int8", "amx_bf16"},
    "NEON": {"asimd"},
    "dot product": {"asimddp"},
    "i8mm": {"i8mm"},
}
"""Name → flags of /proc/cpuinfo, one of which is enough. The last three are those of Arm."""


def cores() -> int:
    """Returns the CPU cores that this process may use: its affinity, cut by the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    return count


def flags() -> set[str]:
    """Returns the CPU's flags as Linux lists them, none where it does not."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def instructions() -> list[str]:
    """Returns the vector instructions of this CPU, in a fixed order: `["AVX2", "AVX-512", "VNNI", "bf16"]`, for example."""
    found = flags()
    return [name for name, any_of in _INSTRUCTIONS.items() if found & any_of]


def keep_freed_memory() -> None:
    """Makes this process keep the memory that it frees, for what it allocates next.

    A training step frees and allocates the same large tensors over and over. glibc gives each of them back to the system, which
    then has to clear every page of them again: a seventh of the time of a small model's step (mallopt(3), M_MMAP_THRESHOLD and
    M_TRIM_THRESHOLD). Other C libraries stay as they are.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)
