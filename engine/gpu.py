"""GPUs as the driver shows them, found without loading torch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import re
from pathlib import Path

from engine.errors import UserError

DEVICES, WSL, VERSION = Path("/dev"), Path("/dev/dxg"), Path("/proc/driver/nvidia/version")
LIBRARY = "libnvidia-ml.so.1"
"""NVML, the driver's library of management."""


def gpus() -> int:
    """Returns the NVIDIA GPUs that a stage can use: those of the driver, or those that CUDA_VISIBLE_DEVICES names."""
    if "+cpu" in importlib.metadata.version("torch"):
        return 0
    found = len(list(DEVICES.glob("nvidia[0-9]*")))
    if not found and WSL.exists():  # WSL2 has one device file for whatever GPUs Windows has
        found = _counted_by_library()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not found:
        return found
    return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])


def _counted_by_library() -> int:
    count = ctypes.c_uint(0)
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(LIBRARY)
        if library.nvmlInit_v2() == 0:
            try:
                library.nvmlDeviceGetCount_v2(ctypes.byref(count))
            finally:
                library.nvmlShutdown()
    return count.value


def driver() -> str:
    """Returns the version of the NVIDIA driver, `of unknown version` where Linux does not say."""
    with contextlib.suppress(OSError):
        if match := re.search(r"\b\d{3,}(?:\.\d+)+\b", VERSION.read_text()):
            return match[0]
    return "of unknown version"


def require_usable() -> None:
    """Raises UserError when there are GPUs and torch can use none of them: a stage would train on the CPU without a word."""
    import torch

    if torch.cuda.is_available() or not gpus():
        return
    build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    raise UserError(
        f"this machine has {gpus()} GPUs and the NVIDIA driver {driver()}, but torch {torch.__version__}, which {build}, cannot "
        "use them: update the driver, or install a torch that is built for it (https://pytorch.org/get-started); to train on the "
        "CPU all the same, set CUDA_VISIBLE_DEVICES= (empty)"
    )
