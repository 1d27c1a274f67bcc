"""How one process of a stage ends, and how the process that started it learns why.

A process started by `bothways run` keeps a record, `rank<N>.json`, in the directory that ERROR_DIRECTORY names. It is written
when the process starts and again when it ends; a record that never got its end belongs to a process that was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import PREEMPTED, USER_ERROR, UserError, disk_full
from engine.stages import heartbeat
from engine.terminal import printing

ERROR_DIRECTORY = heartbeat.DIRECTORY
"""Environment variable: where the ranks of a stage leave their records."""
PARENT = "BOTHWAYS_PARENT"
"""Environment variable: process id of the launcher that starts a process; absent where any parent will do."""
LOGS = "BOTHWAYS_RANK_LOGS"
"""Environment variable: set when each rank writes what it prints to `rank<N>.log` beside its record."""
RECORD_BYTES = 2**16
"""Size of a record from its beginning on: its end can still be written when the disk has filled up meanwhile."""


@dataclass(frozen=True)
class Record:
    """The life of one rank as the process that started it sees it."""

    rank: int
    pid: int
    status: int | None = None
    """Exit status; None while it runs, and for ever when it was killed."""
    message: str = ""
    """One line for a user's mistake, a traceback for a crash."""
    ended: int = 0
    """When, in nanoseconds."""
    collective: bool = False
    """It ended because another rank did: a collective operation lost its peer."""


def read_records(directory: Path) -> list[Record]:
    """Returns the records of all ranks that started, in rank order; one that is just being written is left out."""
    records = []
    for path in directory.glob("rank*.json"):
        with contextlib.suppress(ValueError):
            records.append(Record(**json.loads(path.read_text())))
    return sorted(records, key=lambda record: record.rank)


def die_with_parent() -> None:
    """Asks Linux to kill this process when the one that started it is gone: no orphan goes on writing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        parent = os.environ.pop(PARENT, None)  # not for the children of this process
        if parent and os.getppid() != int(parent):  # it was gone before it could be named
            os.kill(os.getpid(), signal.SIGKILL)


def _write(record: Record) -> None:
    directory = os.environ.get(ERROR_DIRECTORY)
    if directory is None:
        return
    path = Path(directory, f"rank{record.rank}.json")
    # The end of a message tells more than its beginning; escapes make a character up to 12 bytes long.
    data = json.dumps(asdict(replace(record, message=record.message[-RECORD_BYTES // 16 :]))).encode().ljust(RECORD_BYTES)
    if path.exists():
        with path.open("r+b", buffering=0) as file:
            file.write(data)
    else:
        part = path.with_suffix(".tmp")
        part.write_bytes(data)
        part.rename(path)


def run_rank(work: Callable[[], None], where: str) -> None:
    """Runs the work of this process; SIGTERM and SIGUSR1 end it with PREEMPTED, a user's mistake with USER_ERROR.

    Args:
        work: what to do.
        where: what is being written, for the message of a full disk.

    Raises:
        SystemExit: the work did not succeed. Its message goes to the record, or to stderr where nobody keeps one.
    """
    recorded = ERROR_DIRECTORY in os.environ
    if recorded:
        die_with_parent()
        _open_files(Path(os.environ[ERROR_DIRECTORY]))
    _on_request(_stop)
    record = Record(int(os.environ.get("RANK", "0")), os.getpid())
    _write(record)
    heartbeat.beat("start")
    status, message, collective = 0, "", False
    try:
        try:
            with printing(outlive_reader=True):
                work()
        finally:
            _on_request(signal.SIG_IGN)  # the outcome is known: a request to stop that comes late must not replace it
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        status, message = _explain(error, where)
        collective = status == 1 and _lost_a_peer(error)
    try:
        _write(replace(record, status=status, message=message, ended=time.time_ns(), collective=collective))
    except OSError:  # somebody has cleaned the directory away: what has been achieved still counts
        recorded = False
    if message and not recorded:
        print(message if status == 1 else f"error: {message}", file=sys.stderr, flush=True)
    if status:
        sys.exit(status)


def _open_files(directory: Path) -> None:
    """Opens the rank's log where logs are kept, and the file for the stack that its launcher asks for when it is stuck."""
    rank = os.environ.get("RANK", "0")
    if os.environ.get(LOGS):
        log = os.open(directory / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(log, number)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # Written by a handler in C: it answers in the middle of a collective operation, too.
    faulthandler.register(signal.SIGUSR2, (directory / f"rank{rank}.stack").open("w"))


def _on_request(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handler)


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(PREEMPTED)


def _explain(error: BaseException, where: str) -> tuple[int, str]:
    """Returns (exit status, message) of an exception."""
    if isinstance(error, UserError):
        return USER_ERROR, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if disk_full(error):
        return USER_ERROR, f"disk full while writing {getattr(error, 'filename', None) or where}: free some space and run again"
    if out_of_memory(error):
        place = heartbeat.last()
        return USER_ERROR, f"{memory_message(place)} ({(str(error).strip().splitlines() or [type(error).__name__])[0][:200]})"
    return 1, traceback.format_exc()


NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    *("CUDA out of memory", "CUDA error: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation"),
    "Cuda failure 2 'out of memory'",
)
"""What libraries say that allocate memory themselves: torch, cuBLAS, cuDNN, NCCL."""


def out_of_memory(error: BaseException) -> bool:
    """True when memory could not be allocated, on a GPU or on the host."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return any(sign in str(error) for sign in NO_MEMORY)


def memory_message(beat: heartbeat.Beat | None) -> str:
    """Says in which phase memory ran out and what to change."""
    smaller = "lower train.micro_batch_size (accumulation makes up for it) or set train.gradient_checkpointing=true"
    split = "split more over the ranks (parallel: zero2, zero3) or take a ZeRO file with offload"
    fixes = {
        "prepare": "read less at once, or use a host with more memory; a model that does not fit needs more ranks",
        "load": split,
        "forward": f"{smaller}; if the weights alone do not fit, {split}",
        "update": f"{smaller}, or {split}",
        "evaluate": split,
        "save": "a copy of the weights has to fit into the host's memory: use a host with more of it",
    }
    where = f" in {beat.where}" if beat else ""
    return f"out of memory{where}: {fixes.get(beat.phase if beat else '', f'{smaller}, or {split}')}"


def _lost_a_peer(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "third_party/gloo")
    return torch is not None and (isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in signs))
