"""The vector instructions of this CPU: what a speed, a precision or the last digits of a result depend on."""

from __future__ import annotations

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
