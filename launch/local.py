"""Starting a stage on this machine: training stages through `accelerate launch`, the others as one process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.data.batches import accumulation_steps
from engine.errors import PREEMPTED, USER_ERROR, UserError
from engine.rank import ERROR_DIRECTORY, Record, read_records
from engine.stage import Stage
from engine.zero import Place, read_zero_config, zero_config_of
from launch.machine import cores, gpus
from launch.operators import needed_operators, prepare
from launch.recipe import KINDS

GRACE = 10.0
"""Seconds that the other ranks of a failed one may take; one that waits for it in a collective operation may never notice."""


class StageError(Exception):
    """A stage that ended without a result.

    Args:
        status: exit status for the whole command.
        message: one line.
        details: a traceback, or nothing.
    """

    def __init__(self, status: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.details = details


def process_count(stage: Stage[Any]) -> int:
    """Returns how many processes the stage runs on here: one per GPU, or one without GPUs, unless the recipe says otherwise.

    Raises:
        UserError: more processes than GPUs.
    """
    if not KINDS[stage.kind].trains:
        return 1
    wanted, here = stage.config.processes, gpus()
    if wanted == "auto":
        return max(1, here)
    if here and wanted > here:
        raise UserError(f"processes={wanted}, but this machine has {here} GPUs: lower it or say auto")
    return wanted


def command(stage: Stage[Any], overrides: list[str]) -> list[str]:
    """Returns the command line of a stage."""
    kind, processes = KINDS[stage.kind], process_count(stage)
    arguments = [str(stage.recipe.path), "--stage", stage.name, "--runs", str(stage.recipe.runs)]
    arguments += [part for override in overrides for part in ("--set", override)]
    arguments += ["--restart"] if stage.restart else []
    if not kind.trains:
        return [sys.executable, "-m", kind.module, *arguments]
    deepspeed = ["--use_deepspeed"] if zero_config_of(stage.config, processes) else []
    return [
        *(sys.executable, "-m", "launch.accelerated", *deepspeed),
        *("--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", str(_threads(processes))),
        *("-m", kind.module, *arguments),
    ]


def _threads(processes: int) -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // processes))


def run_stage(stage: Stage[Any], overrides: list[str], say: Callable[[str], None]) -> None:
    """Runs one stage to its end; its output goes where ours goes.

    SIGINT, SIGTERM and SIGUSR1 are passed on as a request to save a checkpoint and stop; the second one kills.

    Raises:
        UserError: bad input.
        StageError: it crashed, was killed or was asked to stop.
    """
    processes = process_count(stage)
    zero = zero_config_of(stage.config, processes) if KINDS[stage.kind].trains else None
    if zero:
        train = stage.config.train
        split = accumulation_steps(train.batch_size, train.micro_batch_size, processes)
        config = read_zero_config(stage.recipe.find_zero(zero), train, *split, Place(gpus() > 0, processes, stage.partial))
        prepare(needed_operators(config, cuda=gpus() > 0), say)
    with tempfile.TemporaryDirectory(prefix="bothways-") as records:
        environment = {**os.environ, ERROR_DIRECTORY: records, "OMP_NUM_THREADS": str(_threads(processes))}
        environment |= {} if gpus() else {"DS_ACCELERATOR": "cpu"}  # else DeepSpeed warns that it found no GPU
        # A session of its own: a terminal's Ctrl-C reaches only this process, which passes it on.
        process = subprocess.Popen(command(stage, overrides), env=environment, start_new_session=True)
        asked = _wait(process, Path(records))
        # A process can die in its teardown after all was done: the published directory decides.
        if process.returncode and not stage.finished():
            _explain(stage, process.returncode, read_records(Path(records)), asked)


def _wait(process: subprocess.Popen[bytes], records: Path) -> int | None:
    """Waits for the end of `process`; returns the signal that asked for it, if one did."""
    asked: list[int] = []
    told: set[int] = set()
    failed_at: float | None = None
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers}
    try:
        while process.poll() is None and len(asked) < 2:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.3)
            ranks = read_records(records)
            # Again and again: a rank may come up only after the request.
            for rank in ranks if asked else []:
                if rank.status is None and rank.pid not in told:
                    told.add(rank.pid)
                    _signal(rank.pid, signal.SIGUSR1)
            if any(rank.status for rank in ranks):
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > GRACE:
                    break
    finally:
        # The ranks die with their launcher (PR_SET_PDEATHSIG): nothing is left behind.
        process.kill()
        process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return asked[0] if asked else None


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _explain(stage: Stage[Any], code: int, records: list[Record], asked: int | None) -> None:
    """Raises what ended the stage: the first rank that failed by itself, not those that it took along."""
    ended = sorted((record for record in records if record.status), key=lambda record: record.ended)
    causes = [record for record in ended if record.status != PREEMPTED and not record.collective]
    killed = [record for record in records if record.status is None]
    if causes and causes[0].status == USER_ERROR:
        raise UserError(causes[0].message)
    if causes:
        _raise_crash(stage, causes[0])
    if asked:
        status = 130 if asked == signal.SIGINT else PREEMPTED
        raise StageError(status, f"stage '{stage.name}' was asked to stop: run again to go on")
    if killed:
        who = f"process {killed[0].rank} of stage '{stage.name}'"
        raise StageError(1, f"{who} was killed: out of memory, or killed by hand; run again to go on")
    if any(record.status == PREEMPTED for record in ended):
        raise StageError(PREEMPTED, f"stage '{stage.name}' was asked to stop: run again to go on")
    if ended:
        _raise_crash(stage, ended[0])
    raise StageError(1, f"stage '{stage.name}' could not be started (exit status {code})")


def _raise_crash(stage: Stage[Any], record: Record) -> None:
    last = record.message.strip().splitlines()[-1] if record.message.strip() else f"exit status {record.status}"
    raise StageError(1, f"stage '{stage.name}' crashed in process {record.rank}: {last}", record.message)
