"""DeepSpeed's operators, which it compiles on first use: compiled once beforehand, one build at a time.

A build that is killed leaves a file `lock` behind, on which every later run waits for ever; such locks are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError
from engine.training.zero import offload_devices

STALE_SECONDS = 60.0
"""A lock this old in whose directory no process works was left by a killed build."""


class Operator(NamedTuple):
    """An operator that DeepSpeed compiles."""

    name: str
    builder: str
    seconds: int
    """Typical time of the build."""
    needs: str = "g++ and ninja"
    """What has to be installed."""


SHARED_MEMORY = Operator("deepspeed_shm_comm", "ShareMemCommBuilder", 40)
CPU_ADAM = Operator("cpu_adam", "CPUAdamBuilder", 140)
ASYNC_IO = Operator("async_io", "AsyncIOBuilder", 120, "g++, ninja and libaio (Debian: libaio-dev)")


def needed_operators(config: dict[str, Any], cuda: bool) -> list[Operator]:
    """Returns the operators that a run under this DeepSpeed configuration compiles on first use."""
    devices = offload_devices(config["zero_optimization"])
    needed = [] if cuda else [SHARED_MEMORY]
    needed += [CPU_ADAM] if devices[0] != "none" else []
    return needed + ([ASYNC_IO] if "nvme" in devices else [])


def _directories() -> list[Path]:
    """Where torch keeps compiled extensions: one directory per Python and accelerator, or the one that is set."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [Path(os.environ["TORCH_EXTENSIONS_DIR"])]
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_extensions"
    return sorted(root.glob(f"py{sys.version_info.major}{sys.version_info.minor}*"))


def is_built(operator: Operator) -> bool:
    """True when the operator has been compiled for this Python."""
    return any((directory / operator.name / f"{operator.name}.so").is_file() for directory in _directories())


def locks() -> list[Path]:
    """Returns the locks of builds: of those that are going on, and of those that were killed."""
    return [lock for directory in _directories() for lock in directory.glob("*/lock")]


def is_stale(lock: Path) -> bool:
    """True when the build that made the lock is gone: nothing works in its directory, and has not for a while."""
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return False
    return age > STALE_SECONDS and lock.parent.resolve() not in _working_directories()


def _working_directories() -> set[Path]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.add((process / "cwd").readlink())
    return found


def prepare(operators: list[Operator], say: Callable[[str], None]) -> None:
    """Compiles what is missing; two runs on one machine build in turn.

    Raises:
        UserError: an operator does not compile here.
    """
    for lock in locks():
        if lock.parent.name in [operator.name for operator in operators]:
            while lock.exists() and not is_stale(lock):
                time.sleep(0.5)
            if lock.exists():
                say(f"removing {lock}, left by a build that was killed")
                lock.unlink(missing_ok=True)
    missing = [operator for operator in operators if not is_built(operator)]
    if not missing:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "bothways-build.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for operator in missing:
            if not is_built(operator):
                say(f"compiling DeepSpeed's {operator.name}: about {operator.seconds} s, once on this machine")
                _build(operator)


def _build(operator: Operator) -> None:
    code = (
        "from engine.stages.rank import die_with_parent; die_with_parent();"
        "from deepspeed.accelerator import get_accelerator;"
        f"get_accelerator().create_op_builder('{operator.builder}').load()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()] or ["no message"]
        raise UserError(
            f"DeepSpeed's {operator.name} does not compile here ({lines[0].strip()}): install {operator.needs} "
            "(see `bothways doctor`), or choose another `parallel`"
        )
