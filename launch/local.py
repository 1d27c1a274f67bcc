"""Starting a stage on this machine: training stages through `accelerate launch`, the others as one process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.data.batches import accumulation_steps
from engine.errors import PREEMPTED, USER_ERROR, UserError
from engine.rank import ERROR_DIRECTORY, Record, read_records
from engine.stage import Stage
from engine.zero import read_zero_config
from launch.machine import cores, gpus
from launch.nodes import Place, Supervision, network
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


def process_count(stage: Stage[Any], place: Place | None = None) -> int:
    """Returns how many processes the stage runs on, over all nodes.

    Without a place that says it: as many as the recipe says, and for `auto` one per GPU, or one without GPUs.

    Raises:
        UserError: more processes than GPUs, or another number than the nodes have.
    """
    if not KINDS[stage.kind].trains:
        return 1
    wanted, here = stage.config.processes, gpus()
    if place is not None and (place.several or place.per_node):
        if wanted not in ("auto", place.total):
            spread = f"--nodes {place.nodes} × {place.processes} a node = {place.total}"
            raise UserError(f"processes={wanted} in the recipe, but {spread}: say processes: auto, or change those numbers")
        return place.total
    if wanted == "auto":
        return max(1, here)
    if here and wanted > here:
        raise UserError(f"processes={wanted}, but this machine has {here} GPUs: lower it or say auto")
    return wanted


def command(stage: Stage[Any], overrides: list[str], place: Place | None = None, attempt: int = 0) -> list[str]:
    """Returns the command line of a stage on this node.

    Args:
        attempt: 0, or the number of the restart: it meets on the next port and goes on from the checkpoints.
    """
    place = place or Place()
    kind, processes = KINDS[stage.kind], process_count(stage, place)
    arguments = [str(stage.recipe.path), "--stage", stage.name, "--runs", str(stage.recipe.runs)]
    arguments += [part for override in overrides for part in ("--set", override)]
    arguments += ["--restart"] if stage.restart and not attempt else []
    if not kind.trains:
        return [sys.executable, "-m", kind.module, *arguments]
    deepspeed = ["--use_deepspeed"] if _needs_deepspeed(stage, processes) else []
    meeting = ["--main_process_port", "0"]
    if place.several:
        # `standard`: every node starts its own ranks; the default, pdsh, would log in to the others.
        meeting = ["--deepspeed_multinode_launcher", "standard", "--machine_rank", str(place.rank)]
        meeting += ["--main_process_ip", place.address, "--main_process_port", str(place.port_of(attempt))]
    return [
        *(sys.executable, "-m", "launch.accelerated", *deepspeed),
        *("--num_processes", str(processes), "--num_machines", str(place.nodes), *meeting),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", str(_threads(processes // place.nodes))),
        *("-m", kind.module, *arguments),
    ]


def _needs_deepspeed(stage: Stage[Any], processes: int) -> bool:
    return bool(stage.config.parallel) or processes > 1


def _threads(processes: int) -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // processes))


def run_stage(
    stage: Stage[Any],
    overrides: list[str],
    say: Callable[[str], None],
    place: Place | None = None,
    supervision: Supervision | None = None,
) -> None:
    """Runs one stage to its end; its output goes where ours goes.

    SIGINT, SIGTERM and SIGUSR1 are passed on as a request to save a checkpoint and stop; the second one kills.

    Raises:
        UserError: bad input.
        StageError: it crashed, was killed or was asked to stop.
    """
    place, supervision = place or Place(), supervision or Supervision()
    processes = process_count(stage, place)
    if KINDS[stage.kind].trains and _needs_deepspeed(stage, processes):
        train = stage.config.train
        path = stage.recipe.find_zero(stage.config.parallel or "zero0")
        config = read_zero_config(path, train, *accumulation_steps(train.batch_size, train.micro_batch_size, processes))
        prepare(needed_operators(config, cuda=gpus() > 0), say)
    with _records(supervision) as records:
        threads = str(_threads(processes // place.nodes))
        environment = {**os.environ, **network(place), ERROR_DIRECTORY: str(records), "OMP_NUM_THREADS": threads}
        environment |= {} if gpus() else {"DS_ACCELERATOR": "cpu"}  # else DeepSpeed warns that it found no GPU
        # A session of its own: a terminal's Ctrl-C reaches only this process, which passes it on.
        process = subprocess.Popen(command(stage, overrides, place), env=environment, start_new_session=True)
        asked = _wait(process, records)
        # A process can die in its teardown after all was done: the published directory decides.
        if process.returncode and not stage.finished():
            _explain(stage, process.returncode, read_records(records), asked)


@contextlib.contextmanager
def _records(supervision: Supervision) -> Iterator[Path]:
    if supervision.records is None:
        with tempfile.TemporaryDirectory(prefix="bothways-") as records:
            yield Path(records)
    else:
        supervision.records.mkdir(parents=True, exist_ok=True)
        yield supervision.records.absolute()


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
