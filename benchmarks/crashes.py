"""Ranks that are killed, disks that fill up and files that are torn, at random moments: does every run end as it would have?

Ranks are forked from a server that has torch and DeepSpeed loaded already, so that a run takes seconds; from there on they are
what `accelerate launch` starts. A kill is a SIGKILL.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import USER_ERROR
from engine.stages import heartbeat
from engine.stages.rank import read_records
from engine.stages.stage import hash_directory, read_stage
from engine.training.checkpoint import MANIFEST, step_numbers
from engine.training.processes import free_port
from launch.operators import SHARED_MEMORY, prepare
from launch.recipe import KINDS
from launch.resume_check import differences, made
from tests.recipes import finetune_section, pretrain_section, ragged_rows, train_section, write_recipe, write_rows

STEPS = 24
KINDS_OF = {"base": "pretrain", "teacher": "finetune"}
PRELOADED = ["deepspeed", "accelerate", "transformers", "torch.utils.tensorboard"]
PRELOADED += ["engine.pretrain", "engine.finetune", "engine.training.loop"]
PATIENCE = 120.0
"""Seconds after which a run that should have ended counts as failed."""
SURVIVOR = 5.0
"""Seconds that the other rank has to notice, before it is ended as `bothways run` would."""


def make_recipe(directory: Path) -> Path:
    """Writes a recipe with a pretraining and a fine-tuning stage, ragged rows and many evaluations and checkpoints."""
    write_rows(made(directory) / "rows.jsonl", ragged_rows(400))
    train = train_section(steps=STEPS, learning_rate=3e-3, dropout=0.1, evaluate_every=3, checkpoint_every=2)
    stages = {"base": {"pretrain": pretrain_section(train=train)}, "teacher": {"finetune": finetune_section(train=train)}}
    return write_recipe(directory, stages)


def _rank(stage: str, argv: list[str], environment: dict[str, str], log: str) -> None:
    """What a forked rank does."""
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    sys.argv[1:] = argv
    importlib.import_module(KINDS[KINDS_OF[stage]].module).main()


def server() -> Any:
    """Returns what forks ranks from a process that has loaded torch and DeepSpeed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Run:
    """One attempt at a stage: its ranks, started together."""

    def __init__(self, recipe: Path, stage: str, runs: Path, ranks: int, overrides: list[str], records: Path) -> None:
        # Beside the run, as with `bothways run`: a full disk below the run must not silence the ranks.
        self.records = Path(tempfile.mkdtemp(prefix="ranks-", dir=made(records)))
        self.log = self.records / "output.log"
        argv = [str(recipe), "--stage", stage, "--runs", str(runs)]
        argv += [part for override in overrides for part in ("--set", override)]
        context = server()
        common = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", heartbeat.DIRECTORY: str(self.records)}
        if ranks > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": str(ranks)}
        self.ranks = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            process = context.Process(target=_rank, args=(stage, argv, common | own, str(self.log)))
            process.start()
            self.ranks.append(process)

    def phase(self, rank: int) -> str:
        """Returns what a rank was doing last."""
        beats = [beat for beat in heartbeat.read(self.records) if beat.rank == rank]
        return beats[0].phase if beats else "start"

    def kill(self, rank: int) -> None:
        """Kills one rank; the others get a while to notice."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.ranks[rank].pid or 0, signal.SIGKILL)
        self.wait(SURVIVOR)

    def wait(self, patience: float = PATIENCE) -> bool:
        """Waits for all ranks and ends those that are left; returns whether all ended by themselves and well."""
        give_up = time.monotonic() + patience
        for process in self.ranks:
            process.join(max(0.0, give_up - time.monotonic()))
        for process in self.ranks:
            if process.is_alive():
                process.kill()
            process.join()
        return all(process.exitcode == 0 for process in self.ranks)

    def said(self) -> tuple[int | None, str]:
        """Returns (exit status, message) of rank 0."""
        records = read_records(self.records)
        return (records[0].status, records[0].message) if records else (None, "")


def half_trusted(partial: Path) -> list[str]:
    """Returns what bears the name of something complete below a stage's working directory and is not."""
    found = []
    for step in step_numbers(partial / "checkpoints"):
        path = partial / "checkpoints" / f"step-{step:08d}"
        try:
            if json.loads((path / MANIFEST).read_text()) != hash_directory(path, skip=(MANIFEST,)):
                found.append(str(path))
        except (OSError, ValueError):
            found.append(str(path))
    from safetensors import SafetensorError, safe_open

    for step in step_numbers(partial / "weights"):
        path = partial / "weights" / f"step-{step:08d}" / "model.safetensors"
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (OSError, SafetensorError):
            found.append(str(path))
    return found


@dataclass
class Campaign:
    """What became of many disturbed runs."""

    runs: int = 0
    good: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    """How many were struck in which phase."""
    failures: list[str] = field(default_factory=list)

    def count(self, what: str, phase: str, problem: str | None) -> None:
        """Adds one run."""
        self.runs += 1
        self.good += problem is None
        self.phases[phase] = self.phases.get(phase, 0) + 1
        if problem:
            self.failures.append(f"{what}, struck in {phase}: {problem}")
        print(f"  {self.runs:3d} {what}, struck in {phase}: {problem or 'as undisturbed'}", flush=True)


class Place:
    """Where the runs of one stage at one width happen, with the undisturbed one to compare with."""

    def __init__(self, scratch: Path, recipe: Path, stage: str, ranks: int, overrides: list[str]) -> None:
        self.scratch, self.recipe, self.stage, self.ranks, self.overrides = scratch, recipe, stage, ranks, overrides
        self.number = 0
        first = server().Process(target=int)  # it waits until the server has loaded everything: that is not the run's time
        first.start()
        first.join()
        started = time.monotonic()
        self.whole = self._finished(made(scratch) / "whole")
        self.seconds = time.monotonic() - started

    def start(self, runs: Path, ranks: int | None = None) -> Run:
        """Starts or continues the stage in a run directory."""
        ranks = ranks or self.ranks
        spread = [f"{self.stage}.processes={ranks}"]
        return Run(self.recipe, self.stage, runs, ranks, [*self.overrides, *spread], self.scratch / "records")

    def _finished(self, runs: Path, ranks: int | None = None) -> Path:
        run = self.start(runs, ranks)
        if not run.wait():
            raise RuntimeError(f"the undisturbed run fails:\n{run.log.read_text()}")
        return runs / "tiny" / self.stage

    def fresh(self) -> Path:
        """Returns a new run directory."""
        self.number += 1
        return self.scratch / f"run{self.number}"

    def partial(self, runs: Path) -> Path:
        """Returns the working directory of the stage."""
        return runs / "tiny" / f"{self.stage}.partial"

    def verdict(self, runs: Path, whole: Path | None = None, ranks: int | None = None) -> str | None:
        """Runs the stage on to its end and compares; None: bit-equal to the undisturbed run."""
        broken = half_trusted(self.partial(runs))
        if broken:
            return f"half-written, but with the name of something complete: {broken[0]}"
        # One that was struck after it had finished is not run again, as `bothways run` would not.
        run = None if read_stage(runs / "tiny" / self.stage) else self.start(runs, ranks)
        if run and not run.wait():
            return f"it does not go on: {run.said()[1] or run.log.read_text()[-300:]}"
        problem = next(differences(runs / "tiny" / self.stage, whole or self.whole), None)
        shutil.rmtree(runs)
        return problem


def kill_anywhere(place: Place, rng: random.Random, campaign: Campaign) -> None:
    """Kills one rank at a moment drawn from the whole length of a run."""
    runs, victim = place.fresh(), rng.randrange(place.ranks)
    run = place.start(runs)
    time.sleep(rng.uniform(0.0, place.seconds))
    phase = run.phase(victim)
    run.kill(victim)
    campaign.count(f"{place.stage}, rank {victim} of {place.ranks} killed", phase, place.verdict(runs))


def kill_in(place: Place, phase: str, rng: random.Random, campaign: Campaign) -> None:
    """Kills one rank in a given phase, somewhere in the run."""
    runs, victim = place.fresh(), rng.randrange(place.ranks)
    run = place.start(runs)
    skip, seen, before = rng.randrange(1, 6), 0, ""
    while seen < skip and any(process.is_alive() for process in run.ranks):
        now = run.phase(victim)
        seen += now == phase and before != phase
        before = now
    time.sleep(rng.uniform(0.0, 0.003))
    struck = run.phase(victim)
    run.kill(victim)
    campaign.count(f"{place.stage}, rank {victim} of {place.ranks} killed", struck, place.verdict(runs))


class Conversions:
    """Runs that go on at another number of ranks, killed while their checkpoint is being converted."""

    def __init__(self, place: Place, ranks: int) -> None:
        self.place, self.ranks = place, ranks
        self.stopped = place.scratch / "stopped"
        run = place.start(self.stopped)
        checkpoint = place.partial(self.stopped) / "checkpoints" / "step-00000010"
        while not checkpoint.exists() and run.ranks[0].is_alive():
            time.sleep(0.01)
        run.kill(0)
        whole = shutil.copytree(self.stopped, place.scratch / "converted")
        started = time.monotonic()
        self.whole = place._finished(whole, ranks)
        self.seconds = time.monotonic() - started

    def kill(self, rng: random.Random, campaign: Campaign) -> None:
        """Kills the main rank during a conversion, or somewhere around it."""
        runs = shutil.copytree(self.stopped, self.place.fresh())
        run = self.place.start(runs, self.ranks)
        while run.phase(0) != "convert" and run.ranks[0].is_alive():
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, self.seconds / 2))
        phase = run.phase(0)
        run.kill(0)
        what = f"{self.place.stage}, {self.place.ranks} → {self.ranks} ranks, rank 0 killed"
        campaign.count(what, phase, self.place.verdict(runs, self.whole, self.ranks))


def crashes(scratch: Path, runs: int, seed: int) -> Campaign:
    """Kills ranks in `runs` runs: alone and one of two; anywhere, in evaluations, in saves and in conversions."""
    prepare([SHARED_MEMORY], print)  # else the length of the undisturbed run is that of a build
    rng, campaign = random.Random(seed), Campaign()
    recipe = make_recipe(scratch / "recipe")
    alone = Place(scratch / "alone", recipe, "teacher", 1, [])
    pair = Place(scratch / "pair", recipe, "base", 2, ["base.parallel=zero2"])
    conversions = Conversions(pair, 1)
    strikes: list[Callable[[], None]] = [
        lambda: kill_anywhere(alone, rng, campaign),
        lambda: kill_in(alone, "save", rng, campaign),
        lambda: kill_anywhere(pair, rng, campaign),
        lambda: kill_in(alone, "evaluate", rng, campaign),
        lambda: kill_in(pair, rng.choice(["save", "evaluate", "update"]), rng, campaign),
        lambda: conversions.kill(rng, campaign),
    ]
    for number in range(runs):
        strikes[number % len(strikes)]()
    return campaign


def truncations(scratch: Path, cases: int, seed: int) -> Campaign:
    """Tears, shortens or empties one file of the newest checkpoint of interrupted runs."""
    rng, campaign = random.Random(seed), Campaign()
    place = Place(scratch / "alone", make_recipe(scratch / "recipe"), "teacher", 1, [])
    for _ in range(cases):
        runs = place.fresh()
        run = place.start(runs)
        checkpoints = place.partial(runs) / "checkpoints"
        until = rng.randrange(4, STEPS - 4)
        while max(step_numbers(checkpoints), default=0) < until and run.ranks[0].is_alive():
            time.sleep(0.005)
        run.kill(0)
        newest = checkpoints / f"step-{step_numbers(checkpoints)[-1]:08d}"
        victim = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        data = victim.read_bytes()
        size = rng.randrange(len(data))
        victim.write_bytes(data[:size])
        run = place.start(runs)
        problem = None if run.wait() else f"it does not go on: {run.said()[1]}"
        if f"{newest.name} is damaged: passed over" not in run.log.read_text():
            problem = "the damage was not noticed"
        problem = problem or next(differences(runs / "tiny" / place.stage, place.whole), None)
        campaign.count(f"{victim.name} of {newest.name} cut from {len(data)} to {size} bytes", "load", problem)
        shutil.rmtree(runs)
    return campaign


@contextlib.contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs of a few megabytes; needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(made(directory))], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def full_disks(scratch: Path, cases: int, seed: int) -> Campaign:
    """Fills the disk at a random moment of a run: one clear line, and with some space again it goes on."""
    rng, campaign = random.Random(seed), Campaign()
    place = Place(scratch / "alone", make_recipe(scratch / "recipe"), "teacher", 1, [])
    while campaign.runs < cases:
        with small_disk(scratch / "small", 24) as disk:
            runs = disk / "runs"
            run = place.start(runs)
            time.sleep(rng.uniform(0.3, 0.9) * place.seconds)
            phase = run.phase(0)
            _fill(disk / "filler")
            ended = run.wait()
            if ended and read_stage(runs / "tiny" / place.stage):
                continue  # it was too late: nothing more had to be written
            (disk / "filler").unlink()
            status, message = run.said()
            problem = None if status == USER_ERROR and "disk full" in message else f"status {status}: {message}"
            campaign.count("disk full", phase, problem or place.verdict(runs))
    return campaign


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 2**16)
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(b"\0")


def as_dict(campaign: Campaign) -> dict[str, Any]:
    """Returns a campaign as JSON."""
    return {"runs": campaign.runs, "good": campaign.good, "phases": campaign.phases, "failures": campaign.failures}
