"""Starting a stage on this machine: through `accelerate launch` where several processes share it, else as one process."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import hashes
from engine.cpu import cores
from engine.data.batches import accumulation_steps, most_processes
from engine.errors import USER_ERROR, UserError
from engine.gpu import gpus
from engine.stages.rank import ERROR_DIRECTORY, LOGS
from engine.stages.stage import Stage
from engine.training.zero import Host, read_zero_config, zero_config_of
from launch.nodes.link import Link, gather, host_name, lives
from launch.nodes.place import Place, Supervision, network
from launch.operators import needed_operators, prepare
from launch.ranks import Ranks, Requests, ending
from launch.recipe import KINDS
from launch.watchdog import AGAIN, StageError, Verdict, judge, may_restart

RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which the ranks of torch find each other."""


def process_count(stage: Stage[Any], place: Place | None = None) -> int:
    """Returns how many processes the stage runs on, over all nodes.

    Without a place that says it: as many as the recipe says, and for `auto` one per GPU, or one without GPUs. On a machine with
    fewer GPUs, or whose GPUs do not divide the batch for `auto`, as many of them as do: the batch is the same on any number.

    Raises:
        UserError: another number than the nodes have.
    """
    if not KINDS[stage.kind].spread:
        return 1
    wanted, here = stage.config.processes, gpus()
    if place is not None and (place.several or place.per_node):
        if wanted not in ("auto", place.total):
            spread = f"--nodes {place.nodes} × {place.processes} a node = {place.total}"
            raise UserError(f"processes={wanted} in the recipe, but {spread}: say processes: auto, or change those numbers")
        return place.total
    if not here or not KINDS[stage.kind].trains:
        return 1 if wanted == "auto" else wanted
    if wanted != "auto" and wanted <= here:
        return wanted
    return most_processes(stage.config.train.batch_size, stage.config.train.micro_batch_size, here)


def fewer_processes(stage: Stage[Any], place: Place | None = None) -> str | None:
    """Says why a stage runs on fewer processes than the recipe or the machine has, if it does."""
    processes, here = process_count(stage, place), gpus()
    if not here or not KINDS[stage.kind].trains or (place is not None and (place.several or place.per_node)):
        return None
    wanted = stage.config.processes
    machine = f"{here} GPU{'' if here == 1 else 's'} here"
    if wanted != "auto" and processes < wanted:
        return f"{processes} of processes={wanted}: {machine}" + (
            "" if processes == here else f", and batch_size={stage.config.train.batch_size} divides by {processes}"
        )
    if wanted == "auto" and processes < here:
        return f"{processes} of {machine}: batch_size={stage.config.train.batch_size} divides by no more of them"
    return None


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
    if processes == 1:
        # `accelerate launch` would load torch a second time to start the same command.
        return [sys.executable, "-m", kind.module, *arguments]
    deepspeed = ["--use_deepspeed"] if not kind.trains or zero_config_of(stage.config, processes) else []
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


def _threads(processes: int) -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // processes))


def run_stage(
    stage: Stage[Any],
    overrides: list[str],
    say: Callable[[str], None],
    place: Place | None = None,
    supervision: Supervision | None = None,
    link: Link | None = None,
) -> None:
    """Runs one stage to its end on this host, or as node 0 of several; its output goes where ours goes.

    SIGINT, SIGTERM and SIGUSR1 are passed on as a request to save a checkpoint and stop; the second one kills.

    Raises:
        UserError: bad input.
        StageError: it crashed, was killed or was asked to stop, and was not to be started again.
    """
    place, supervision = place or Place(), supervision or Supervision()
    if not KINDS[stage.kind].spread:
        place, link = Place(), None
    if note := fewer_processes(stage, place):
        say(note)
    prepare_operators(stage, place, say)
    with Requests() as requests, records_of(supervision) as records:
        for attempt in itertools.count():
            if link:
                gather(link, stage.name, attempt, requests, say)
            with ending(start(stage, overrides, place, supervision, records, attempt)) as ranks:
                verdict = _watch(stage, ranks, requests, supervision.heartbeat_limit, link)
                verdict = verdict and replace(verdict, details=verdict.details or ranks.stacks(verdict.stuck))
            if link:
                link.command(verdict=verdict and replace(verdict, details=""), stage=stage.name if verdict else None, go=False)
            if verdict is None:
                return
            if requests.signals or not may_restart(verdict, attempt, supervision.max_restarts):
                raise failure(verdict)
            say(f"restart {attempt + 1} of {supervision.max_restarts}: {verdict.message.removesuffix(AGAIN)}")


def prepare_operators(stage: Stage[Any], place: Place, say: Callable[[str], None]) -> None:
    """Compiles what DeepSpeed would compile on first use.

    Raises:
        UserError: it does not compile here, or the batch does not divide.
    """
    processes = process_count(stage, place)
    zero = zero_config_of(stage.config, processes) if KINDS[stage.kind].trains else None
    if zero:
        train = stage.config.train
        split = accumulation_steps(train.batch_size, train.micro_batch_size, processes)
        config = read_zero_config(
            stage.recipe.find_zero(zero), train, *split, Host(gpus() > 0, processes // place.nodes, stage.partial)
        )
        prepare(needed_operators(config, cuda=gpus() > 0), say)


def start(stage: Stage[Any], overrides: list[str], place: Place, supervision: Supervision, records: Path, attempt: int) -> Ranks:
    """Starts the ranks of a stage on this node."""
    processes = process_count(stage, place) // place.nodes
    threads = str(_threads(processes))
    environment = {**os.environ, **network(place), ERROR_DIRECTORY: str(records), "OMP_NUM_THREADS": threads}
    environment |= {} if gpus() else {"DS_ACCELERATOR": "cpu"}  # else DeepSpeed warns that it found no GPU
    environment |= {LOGS: "1"} if supervision.records else {}
    if processes == place.nodes == 1:
        # What an outer launcher has left would make it one rank of several.
        environment = {name: value for name, value in environment.items() if name not in RENDEZVOUS}
    hashes.leave(records)
    numbers = range(place.rank * processes, (place.rank + 1) * processes)
    return Ranks(command(stage, overrides, place, attempt), environment, numbers, records, bool(supervision.records))


@contextlib.contextmanager
def records_of(supervision: Supervision) -> Iterator[Path]:
    """The directory of the ranks' records: the one that was asked for, or one that is removed again."""
    if supervision.records is None:
        with tempfile.TemporaryDirectory(prefix="bothways-") as records:
            yield Path(records)
    else:
        supervision.records.mkdir(parents=True, exist_ok=True)
        yield supervision.records.absolute()


def _watch(stage: Stage[Any], ranks: Ranks, requests: Requests, limit: float, link: Link | None) -> Verdict | None:
    """Watches one attempt; returns what ended it, or None when the stage has been published."""
    failing: float | None = None
    while True:
        life = ranks.attend(0, host_name(), requests)
        # A process can die in its teardown after all was done: the published directory decides.
        if life.exited == 0 or (life.exited is not None and stage.finished()):
            return None
        nodes = [life]
        if link:
            link.say(life=life)
            nodes += lives(link, stage.name, link.order.attempt)
            if any(node.asked for node in nodes):
                ranks.ask_to_stop()
        if any(node.exited or any(rank.failed for rank in node.ranks) for node in nodes):
            failing = failing or time.monotonic()
        verdict = judge(stage.name, nodes, limit, time.monotonic() - failing if failing else 0.0)
        if verdict:
            return verdict


def failure(verdict: Verdict) -> Exception:
    """Returns a verdict as the exception that ends the command."""
    if verdict.status == USER_ERROR:
        return UserError(verdict.message)
    return StageError(verdict.status, verdict.message, verdict.details)
