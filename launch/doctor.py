"""What this machine can and cannot do, why, and what would change it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from engine.cpu import cores, instructions
from engine.gpu import gpus
from launch.operators import ASYNC_IO, CPU_ADAM, SHARED_MEMORY, is_built, is_stale, locks


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    works: bool
    says: str
    """What was found, and what follows from it."""
    fix: str = ""
    """What would change it."""


def examine() -> list[Finding]:
    """Looks at everything; a check that fails says so and stops no other."""
    checks: list[Callable[[], Finding]] = [
        *(_python, _torch, _cpu, _gpus, _bf16, _memory, _disk, _collectives, _operators, _locks, _async_io),
        *(_onnxruntime, _int8, _tensorrt, _tensorrt_rtx, _bitsandbytes, _modelopt, _serving, _slurm, _loopback),
    ]
    return [_guarded(check) for check in checks]


def show(findings: list[Finding]) -> None:
    """Prints the findings as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        mark = Text("yes", "green") if finding.works else Text("no", "yellow")
        fix = Text(f"\n→ {finding.fix}" if finding.fix else "", "cyan")
        table.add_row(mark, Text(finding.name, "bold"), Text(finding.says) + fix)
    Console(highlight=False).print(table)


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a diagnosis must survive whatever is wrong with the machine
        name = check.__name__.strip("_").replace("_", " ")
        return Finding(name, False, f"could not be examined: {type(error).__name__}: {error}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    known = (3, 11) <= sys.version_info[:2] <= (3, 12)
    fix = "" if known else "use Python 3.11 or 3.12"
    return Finding("Python", known, f"{platform.python_version()} on {platform.machine()}", fix)


def _torch() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Finding("torch", True, f"{torch.__version__} ({build}), transformers {_version('transformers')}")


def _cpu() -> Finding:
    found = instructions()
    return Finding("vector instructions", bool(found), ", ".join(found) or "unknown: /proc/cpuinfo does not say")


def _gpus() -> Finding:
    driver = any(Path("/dev").glob("nvidia[0-9]*"))
    if not driver:
        return Finding("GPUs", False, "no NVIDIA driver: stages train on the CPU, several processes over gloo")
    import torch

    if not torch.version.cuda:
        return Finding("GPUs", False, "there is an NVIDIA driver, but torch is a CPU build", "install a CUDA build of torch")
    if not torch.cuda.is_available():
        return Finding("GPUs", False, "torch cannot use the NVIDIA driver", "compare `nvidia-smi` with the CUDA version of torch")
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    shown = [f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}" for card in cards]
    return Finding("GPUs", True, "; ".join(shown))


def _bf16() -> Finding:
    import torch

    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    where = "GPU" if torch.cuda.is_available() else "CPU with bf16" if "bf16" in instructions() else "no bf16 instructions"
    return Finding("bf16 training", fast, f"precision=auto means {'bf16' if fast else 'fp32'} here ({where})")


def _memory() -> Finding:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * size / 2**30
    return Finding("cores and memory", True, f"{cores()} cores, {pages * size / 2**30:.0f} GiB of memory ({free:.0f} GiB free)")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    fix = "" if free > 5 else "runs keep checkpoints of weights and optimizer state: point --runs to a larger disk"
    return Finding("disk", free > 5, f"{free:.0f} GiB free in {Path.cwd()}", fix)


def _collectives() -> Finding:
    import torch.distributed

    found = [
        name
        for name, there in (
            ("gloo", torch.distributed.is_gloo_available()),
            ("NCCL", torch.distributed.is_nccl_available()),
            ("MPI", torch.distributed.is_mpi_available()),
        )
        if there
    ]
    used = "NCCL" if gpus() else "gloo"
    return Finding("several processes", used in found, f"torch has {', '.join(found)}; stages here use {used}")


def _operators() -> Finding:
    tools = {"g++": bool(shutil.which("g++") or shutil.which("c++")), "ninja": bool(shutil.which("ninja") or _version("ninja"))}
    missing = [name for name, there in tools.items() if not there]
    state = ", ".join(f"{op.name} {'compiled' if is_built(op) else 'not compiled yet'}" for op in (SHARED_MEMORY, CPU_ADAM))
    needs = "every run with `parallel` compiles one on first use" if not gpus() else "only offload compiles one"
    fix = f"install {' and '.join(missing)} (apt-get install g++; pip install ninja)" if missing else ""
    return Finding(f"DeepSpeed {_version('deepspeed')}", not missing, f"{state}; {needs}", fix)


def _locks() -> Finding:
    stale = [lock for lock in locks() if is_stale(lock)]
    says = "none" if not stale else f"{', '.join(map(str, stale))}: left by a killed build, DeepSpeed would wait on it for ever"
    return Finding("stale build locks", not stale, says, f"rm {' '.join(map(str, stale))}" if stale else "")


def _async_io() -> Finding:
    header = any(Path(root, "libaio.h").is_file() for root in ("/usr/include", "/usr/local/include"))
    if is_built(ASYNC_IO) or header:
        return Finding("offload to NVMe", True, "libaio is there (ZeRO-3 only)")
    return Finding("offload to NVMe", False, "no libaio headers", "apt-get install libaio-dev")


def _onnxruntime() -> Finding:
    import onnxruntime

    names = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return Finding("ONNX Runtime", True, f"{onnxruntime.__version__} with {names}; bundles are served on the CPU provider")


def _int8() -> Finding:
    units = [name for name in instructions() if name in ("VNNI", "AMX", "dot product", "i8mm")]
    lacking = (
        "no int8 dot products in this CPU: int8 engines with `portable` weights are exact here, those with `8bit` weights slower"
    )
    return Finding("fast int8", bool(units), ", ".join(units) or lacking)


def _tensorrt() -> Finding:
    if importlib.util.find_spec("tensorrt") is None:
        return Finding("TensorRT", False, "not installed", "where a GPU is: pip install 'bothways[tensorrt]'")
    if not gpus():
        return Finding("TensorRT", False, f"{_version('tensorrt')} is installed, but it neither builds nor runs without a GPU")
    return Finding("TensorRT", True, f"{_version('tensorrt')}: builds and runs engines")


def _tensorrt_rtx() -> Finding:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return Finding("TensorRT-RTX", False, "not installed", "pip install 'bothways[rtx]'")
    version = _version("tensorrt-rtx-cu13") or "installed"
    from export.engines.trt import why_not_run

    reason = why_not_run("tensorrt_rtx")
    if not reason:
        return Finding("TensorRT-RTX", True, f"{version}: builds and runs engines")
    fix = "take `tensorrt` here: pip install 'bothways[tensorrt]'" if gpus() else ""
    return Finding("TensorRT-RTX", True, f"{version}: builds engines for RTX GPUs, and runs none: {reason}", fix)


def _bitsandbytes() -> Finding:
    version = _version("bitsandbytes")
    fix = "" if version else "pip install bitsandbytes"
    return Finding(
        "8-bit optimizer", bool(version), f"bitsandbytes {version or 'is not installed'} (train.optimizer=adamw_8bit)", fix
    )


def _modelopt() -> Finding:
    version = _version("nvidia-modelopt")
    fix = "" if version else "pip install 'bothways[modelopt]'"
    return Finding("modelopt", bool(version), f"nvidia-modelopt {version or 'is not installed'}", fix)


def _serving() -> Finding:
    needed = {"starlette": "starlette", "uvicorn": "uvicorn", "orjson": "orjson", "tritonclient": "tritonclient"}
    needed |= {"prometheus_client": "prometheus-client", "grpc": "grpcio"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    says = f"missing: {', '.join(missing)}" if missing else "everything for `bothways serve` is installed"
    return Finding("serving", not missing, says, "pip install 'bothways[serve]'" if missing else "")


def _slurm() -> Finding:
    path = shutil.which("sbatch")
    if path is None:
        return Finding("Slurm", False, "no sbatch on the PATH: stages start on this machine only")
    done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=5)
    return Finding("Slurm", True, f"{done.stdout.strip()} ({path})")


def _loopback() -> Finding:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        probe.listen()
    return Finding("loopback", True, "processes can meet on 127.0.0.1")
