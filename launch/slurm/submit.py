"""Submitting a recipe to Slurm: one job for each stage that is not finished, each waiting for the one before."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import JOBS, Recipe, load_recipe
from engine.errors import UserError
from engine.stages.stage import Stage
from launch.check import check_recipe
from launch.nodes.place import Place
from launch.pipeline import choose_stages, require_finished
from launch.points import Variant, expand_sweep
from launch.recipe import load_stages
from launch.slurm.jobs import JOB_FILE, Job, last_line, latest
from launch.slurm.script import Batch, BatchOptions, Task


@dataclass(frozen=True)
class Submission:
    """A recipe that has been looked at, with what its jobs share and the stages that they run, in order."""

    batch: Batch
    stages: list[Stage[Any]]

    def scripts(self) -> Iterator[tuple[Stage[Any], str]]:
        """Yields every stage with its script."""
        for stage in self.stages:
            yield stage, self.batch.script(stage)

    def command(self, stage: Stage[Any], after: str | None) -> list[str]:
        """Returns the command that submits the script of a stage.

        Args:
            after: id of the job before it, if there is one.
        """
        # A stage whose inputs will never be made must not wait for them for ever.
        wait = [f"--dependency={self.batch.after}:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *wait]


def prepare_submission(
    path: Path,
    overrides: list[str],
    runs: Path,
    only: list[str],
    options: BatchOptions,
    sweep: list[str],
    restart: bool = False,
) -> Submission:
    """Looks at a recipe as `bothways run` would, for every combination of a sweep.

    Raises:
        UserError: anything that would stop a stage; a run that has jobs already.
    """
    tasks: list[Task] = []
    wanted: dict[str, Stage[Any]] = {}
    base = load_recipe(path, overrides, runs)
    for variant in expand_sweep(sweep) if sweep else [Variant("", ())]:
        named = (f"name={base.name}-{variant.suffix}",) if variant.suffix else ()
        settings = (*overrides, *variant.overrides, *named)
        recipe = load_recipe(path, list(settings), runs)
        stages = load_stages(recipe)
        chosen = choose_stages(stages, only)
        here = options.gpus_per_node or options.processes_per_node
        # Without a number the nodes' GPUs decide, which this machine does not know.
        check_recipe(recipe, chosen, Place(options.nodes, per_node=here) if here else None)
        require_finished(recipe, chosen)
        left = _unfinished(chosen)
        if left:
            tasks.append(Task(recipe.runs / recipe.name, settings))
            _require_no_jobs(recipe, left)
        wanted |= {stage.name: stage for stage in left}
    order = [stage.name for stage in load_stages(base)]
    batch = Batch(path, base.name, runs, tasks, options, restart)
    return Submission(batch, sorted(wanted.values(), key=lambda stage: order.index(stage.name)))


def _unfinished(stages: list[Stage[Any]]) -> list[Stage[Any]]:
    """Returns the stages that have to run: those that are not finished, and those that read them."""
    left: list[Stage[Any]] = []
    for stage in stages:
        names = {other.name for other in left}
        if names.intersection(stage.upstream()) or not stage.finished():
            left.append(stage)
    return left


def _require_no_jobs(recipe: Recipe, stages: list[Stage[Any]]) -> None:
    run = recipe.runs / recipe.name
    jobs = latest(run)
    for stage in stages:
        state = jobs[stage.name].state() if stage.name in jobs else None
        if state and not state.over:
            raise UserError(
                f"{run}: job {jobs[stage.name].id} for stage '{stage.name}' is already {state.name}: "
                f"see `bothways status {run}`, or stop it by `bothways cancel {run}`"
            )


def dry_run(submission: Submission) -> str:
    """Returns the scripts and, as comments, the commands that would submit them."""
    shown, before = [], None
    for stage, text in submission.scripts():
        command = " ".join([*submission.command(stage, f"${before}" if before else None), f"{stage.name}.sbatch"])
        before = "job_" + stage.name.replace("-", "_")
        shown.append(f"# ---- {stage.name}.sbatch, submitted by: {before}=$({command})\n{text}\n")
    return "\n".join(shown)


def submit(submission: Submission, say: Callable[[str], None]) -> list[Job]:
    """Submits the stages as a chain, all or none.

    Returns:
        their jobs, the tasks of an array one by one.

    Raises:
        UserError: sbatch refused one; its own line is passed on.
    """
    _require_sbatch()
    scripts = list(submission.scripts())
    directory = submission.batch.jobs
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)  # Slurm does not make it for the jobs' logs
    submitted: list[str] = []
    jobs: list[Job] = []
    for stage, text in scripts:
        command = submission.command(stage, submitted[-1] if submitted else None)
        done = subprocess.run(command, input=text, capture_output=True, text=True, env=_environment())
        if done.returncode:
            if submitted:
                subprocess.run(["scancel", *submitted], capture_output=True)
            for job in jobs:
                shutil.rmtree(job.directory)
            with contextlib.suppress(OSError):  # not empty
                for path in made:
                    path.rmdir()
            raise UserError(f"sbatch refused stage '{stage.name}': {last_line(done.stderr)}; nothing has been submitted")
        number = done.stdout.strip().partition(";")[0]
        jobs += _record(submission, stage, text, number, command)
        after = f", after job {submitted[-1]}" if submitted else ""
        tasks = f" ({len(submission.batch.tasks)} tasks)" if submission.batch.array else ""
        say(f"{stage.name}: job {number}{tasks}{after}")
        submitted.append(number)
    return jobs


def _record(submission: Submission, stage: Stage[Any], text: str, number: str, command: list[str]) -> list[Job]:
    """Writes down what has been submitted, in the run directory of every task."""
    batch = submission.batch
    facts = {
        "stage": stage.name,
        "stages": list(stage.recipe.stages),
        "recipe": str(batch.recipe.absolute()),
        "submitted": time.time(),
        "command": shlex.join([*command, f"{stage.name}.sbatch"]),
        "logs": str(batch.jobs),
    }
    jobs = []
    for index, task in enumerate(batch.tasks):
        directory = task.run / JOBS / (f"{number}_{index}" if batch.array else number)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{stage.name}.sbatch").write_text(text, encoding="utf-8")
        part = directory / "job.tmp"
        part.write_text(json.dumps({**facts, "settings": task.settings}, indent=1) + "\n")
        part.rename(directory / JOB_FILE)
        jobs.append(Job(directory))
    return jobs


def try_submission(submission: Submission, say: Callable[[str], None]) -> None:
    """Asks sbatch when each stage would start, without submitting it.

    Raises:
        UserError: sbatch would refuse it.
    """
    _require_sbatch()
    for stage, text in submission.scripts():
        done = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"sbatch would refuse stage '{stage.name}': {last_line(done.stderr)}")
        say(f"{stage.name}: {last_line(done.stderr)}")


def _environment() -> dict[str, str]:
    """Returns ours without what would tell the new job that it has been requeued, when we are in a job ourselves."""
    return {name: value for name, value in os.environ.items() if name != "SLURM_RESTART_COUNT"}


def _require_sbatch() -> None:
    if not shutil.which("sbatch"):
        raise UserError("sbatch is not on the PATH: submit from a login node of the cluster; --dry-run works without it")
