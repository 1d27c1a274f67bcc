"""Does a stage resume exactly? It is trained undisturbed, interrupted and resumed, and compared bit by bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from engine.config import load_recipe
from engine.errors import PREEMPTED, UserError, did_you_mean
from engine.gpu import gpus
from engine.stages.rank import die_with_parent
from engine.stages.stage import Stage, read_stage
from launch.check import check_recipe
from launch.recipe import KINDS, load_stages

CHECKPOINTS = 5
"""Of a run; it is interrupted after one of the first three."""
PATIENCE = 10.0
"""Seconds to wait for the end of what was killed."""
CLOCKS = ("seconds", "tokens_per_second", "waited_share", "device_bytes")
"""What differs between two runs of the same work."""


class Child:
    """`bothways run` of one stage as a child process; its output goes to a file.

    Args:
        recipe: the recipe.
        runs: where its run directory goes.
        stage: the stage.
        overrides: `a.b=c` settings.
        log: file for its output.
    """

    def __init__(self, recipe: Path, runs: Path, stage: str, overrides: list[str], log: Path) -> None:
        command = [sys.executable, "-m", "launch.cli", "run", str(recipe), "--runs", str(runs), "--stage", stage]
        command += [part for override in overrides for part in ("--set", override)]
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, preexec_fn=die_with_parent)

    def ranks(self) -> list[psutil.Process]:
        """Returns the processes that train, oldest first; none while they are being started."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = child.cmdline()
                    if "--stage" in words and "launch.accelerated" not in words:
                        found.append(child)
        return found

    def stop(self, number: int, target: psutil.Process | None = None) -> None:
        """Sends a signal to one rank, or to `bothways run` itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(target.pid if target else self.process.pid, number)

    def wait(self) -> int:
        """Returns the exit status."""
        return self.process.wait()

    def end(self) -> None:
        """Kills what still runs, and waits until it writes no more; the ranks die with their launcher."""
        ranks = self.ranks()
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(ranks, timeout=PATIENCE)


class Trial(NamedTuple):
    """One interrupted and resumed run."""

    how: str
    stopped_after: int
    """Newest checkpoint when it was interrupted."""
    difference: str | None
    """First difference from the undisturbed run; None: bit-equal."""


def differences(directory: Path, other: Path) -> Iterator[str]:
    """Yields what distinguishes two finished directories of the same training stage: weights, losses and metrics, bit by bit."""
    for path in sorted(directory.rglob("model.safetensors")):  # of the model, and of what learns beside it
        yield from _other_tensors(path, other / path.relative_to(directory))
    mine, yours = (_losses(path) for path in (directory, other))
    for step in sorted(mine.keys() | yours.keys()):
        if mine.get(step) != yours.get(step):
            yield f"the history differs at step {step}: {mine.get(step)} and {yours.get(step)}"
    if (read_stage(directory) or {}).get("metrics") != (read_stage(other) or {}).get("metrics"):
        yield "the metrics differ"


def _other_tensors(path: Path, other: Path) -> Iterator[str]:
    """Yields what distinguishes the tensors of two files."""
    from safetensors import safe_open

    if not other.is_file():
        yield f"there is no {other}"
        return
    with safe_open(path, "pt") as ours, safe_open(other, "pt") as theirs:
        if set(ours.keys()) != set(theirs.keys()):
            yield "the tensors have other names"
            return
        for name in ours.keys():  # noqa: SIM118 - not a dictionary
            a, b = ours.get_tensor(name), theirs.get_tensor(name)
            if a.shape != b.shape or not a.equal(b):
                yield f"tensor {name} differs" + (f" by up to {float((a - b).abs().max()):.3g}" if a.shape == b.shape else "")


def _losses(directory: Path) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for line in (directory / "history.jsonl").read_text().splitlines():
        record = json.loads(line)
        # Being asked to stop adds a record of its step, and cuts the window of the next one.
        if "validation" in record:
            found.setdefault(record["step"], []).append({key: value for key, value in record.items() if key not in CLOCKS})
    return found


def resume_check(
    path: Path, overrides: list[str], runs: Path, only: str | None, steps: int, seed: int, say: Callable[[str], None]
) -> list[Trial]:
    """Trains a stage undisturbed, killed and resumed, and asked to stop and resumed.

    Args:
        path: the recipe.
        overrides: `a.b=c` settings.
        runs: where finished stages are that the stage reads.
        only: the stage; None: the first that trains.
        steps: optimizer steps of every run.
        seed: of the moments of interruption.
        say: tells what happens, a line at a time.

    Returns:
        the two interrupted runs.

    Raises:
        UserError: bad input, or an undisturbed run that fails.
    """
    recipe = load_recipe(path, overrides, runs)
    stages = [stage for stage in load_stages(recipe) if KINDS[stage.kind].trains]
    names = [stage.name for stage in stages]
    only = recipe.seeded.get(only or "", [only])[0]
    if not stages or (only and only not in names):
        raise UserError(f"{path}: no stage that trains" + (f" is named '{only}'{did_you_mean(only, names)}" if only else ""))
    stage = stages[names.index(only) if only else 0]
    check_recipe(recipe, [stage])
    stage.inputs  # noqa: B018 - stages that it reads must have finished
    every = max(1, steps // CHECKPOINTS)
    short = {"epochs": "null", "steps": steps, "early_stopping": "null", "evaluate_every": every, "checkpoint_every": every}
    if gpus():
        say("on a GPU with train.deterministic=true: without it no two runs are bit-equal, be they interrupted or not")
        short |= {"deterministic": "true", "compile": "false"}
    settings = [*overrides, *(f"{recipe.owner(stage.name)}.train.{key}={value}" for key, value in short.items())]
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="resume-check-", dir=made(runs)) as scratch:
        place = _Place(path, stage, Path(scratch), settings)
        say(f"stage {stage.name} ({stage.kind}), {steps} steps, a checkpoint every {every}")
        try:
            return _trials(place, rng, every, say)
        finally:
            place.end()


def _trials(place: _Place, rng: random.Random, every: int, say: Callable[[str], None]) -> list[Trial]:
    child = place.start("whole")
    if child.wait():
        raise UserError(f"stage '{place.stage.name}' does not run: {_last_line(child.log)}")
    say("undisturbed: done")
    trials = []
    for how, number in (("killed (SIGKILL of one rank)", signal.SIGKILL), ("asked to stop (SIGUSR1)", signal.SIGUSR1)):
        trials.append(place.interrupt(how, number, rng, every * rng.randint(1, 3)))
        verdict = trials[-1].difference or "bit-equal weights, losses and metrics"
        say(f"{how} after step {trials[-1].stopped_after}, resumed: {verdict}")
    return trials


def made(directory: Path) -> Path:
    """Returns a directory that is there now."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "no message"


class _Place:
    """Run directories of the trials of one stage, with what it reads beside them."""

    def __init__(self, path: Path, stage: Stage[Any], scratch: Path, settings: list[str]) -> None:
        self.path, self.stage, self.scratch, self.settings = path, stage, scratch, settings
        self._child: Child | None = None

    def start(self, name: str) -> Child:
        """Starts or continues the trial `name`."""
        directory = self.scratch / name / self.stage.recipe.name
        for source in self.stage.upstream():
            link = made(directory) / source
            if not link.exists():
                link.symlink_to(self.stage.recipe.directory(source).resolve())
        self._child = Child(self.path, self.scratch / name, self.stage.name, self.settings, self.scratch / f"{name}.log")
        return self._child

    def end(self) -> None:
        """Ends the run that was started last."""
        if self._child:
            self._child.end()

    def directory(self, name: str) -> Path:
        """Of the finished stage of a trial."""
        return self.scratch / name / self.stage.recipe.name / self.stage.name

    def seconds_between_checkpoints(self) -> float:
        """As the undisturbed run went."""
        record = read_stage(self.directory("whole")) or {}
        return record["seconds"]["training"] / CHECKPOINTS

    def interrupt(self, how: str, number: int, rng: random.Random, step: int) -> Trial:
        """Interrupts a run at a random moment after the checkpoint of `step`, resumes it and compares it with the whole one."""
        name = signal.Signals(number).name
        child = self.start(name)
        checkpoints = self.directory(name).with_name(self.stage.name + ".partial") / "checkpoints"
        while child.process.poll() is None and not (checkpoints / f"step-{step:08d}").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, self.seconds_between_checkpoints()))
        newest = max((path.name for path in checkpoints.glob("step-????????")), default="step-0")
        ranks = child.ranks()
        child.stop(number, rng.choice(ranks) if ranks else None)
        status = child.wait()
        after = int(newest[5:])
        if status == 0:
            return Trial(how, after, "it finished before it could be interrupted: give it more --steps")
        if status not in (1, PREEMPTED):
            raise UserError(f"stage '{self.stage.name}' does not run: {_last_line(child.log)}")
        again = self.start(name)
        if again.wait():
            return Trial(how, after, f"it does not resume: {_last_line(again.log)}")
        return Trial(how, after, next(differences(self.directory(name), self.directory("whole")), None))
