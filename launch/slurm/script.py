"""The batch script of a stage, from one template that can be read.

A script starts `bothways launch` on each of its nodes, turns Slurm's warning before a preemption or a time limit into a
checkpoint, and queues itself again. It depends on nothing else of ours: it can be kept, changed and submitted by hand.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import JOBS
from engine.errors import NODE_FAILED, PREEMPTED, USER_ERROR, UserError
from engine.stages.stage import Stage
from launch.recipe import KINDS
from launch.slurm import MAX_REQUEUES, SIGNAL_BEFORE


@dataclass(frozen=True)
class BatchOptions:
    """What the jobs ask Slurm for; the names are those of sbatch."""

    nodes: int = 1
    """Of training stages; the others take one."""
    gpus_per_node: int | None = None
    processes_per_node: int | None = None
    """Ranks on every node without GPUs."""
    resources: dict[str, str | int | None] = field(default_factory=dict)
    """sbatch options that are passed on as they are: {"partition": "gpu", "time": "4:00:00", …}; None: not given."""
    job_name: str | None = None
    """Beginning of the jobs' names; the stage's name follows. None: the recipe's name."""
    sbatch: tuple[str, ...] = ()
    """Further options as sbatch takes them; they override the others."""
    setup: tuple[str, ...] = ()
    """Shell lines that prepare the environment: `module load cuda`."""
    container_image: str | None = None
    container_mounts: str | None = None
    max_requeues: int = MAX_REQUEUES
    """Against a job that is stopped again and again before its first checkpoint."""
    signal_before: int = SIGNAL_BEFORE
    """Seconds before the time limit, or before preemption, at which the job is asked for its checkpoint."""
    preflight: bool = False
    """Check the nodes of training stages first; go on without those that are not fit."""
    node_options: tuple[str, ...] = ()
    """Passed on to `bothways launch` on every node: --max-restarts, --heartbeat-limit."""

    def __post_init__(self) -> None:
        for option in self.sbatch:
            if not re.match(r"--?\w", option) or "\n" in option:
                raise UserError(f"--sbatch {option!r}: give one option of sbatch, as in --sbatch=--mail-type=END")
            if re.match(r"--array\b|-a", option):
                raise UserError(f"--sbatch {option}: an array comes from --sweep, with a task for each of its runs")
            if re.match(r"--exclude\b|-x", option):
                raise UserError(f"--sbatch {option}: say --exclude, to which bad nodes are added")
        if self.container_mounts and not self.container_image:
            raise UserError(f"--container-mounts {self.container_mounts}: add --container-image")
        for name, value in [*self.resources.items(), ("job-name", self.job_name)]:
            if value is not None and re.search(r"[\n\r]|^\s*$", str(value)):
                raise UserError(f"--{name} {value!r}: empty, or a line break in it")
        limit = minutes(str(self.resources.get("time") or ""))
        if limit and limit * 60 <= self.signal_before:
            raise UserError(
                f"--time {self.resources['time']}: not longer than --signal-before {self.signal_before} s: "
                "the job would be asked to stop as soon as it starts"
            )


@dataclass(frozen=True)
class Task:
    """One run of the recipe: the only one, or one of an array job."""

    run: Path
    """Run directory."""
    overrides: tuple[str, ...]
    """`a.b=c` settings that make it this run."""

    @property
    def settings(self) -> list[str]:
        """The overrides as arguments of `bothways`."""
        return [part for override in self.overrides for part in ("--set", override)]


@dataclass(frozen=True)
class Batch:
    """What the jobs of one submission have in common."""

    recipe: Path
    name: str
    """Of the recipe."""
    runs: Path
    tasks: list[Task]
    options: BatchOptions
    restart: bool = False
    """Throw interrupted runs away, in the first attempt."""

    @property
    def jobs(self) -> Path:
        """Where scripts and the logs of the jobs lie: `runs/<recipe>/jobs`."""
        return self.runs.absolute() / self.name / JOBS

    @property
    def array(self) -> bool:
        """True when every stage is an array job."""
        return len(self.tasks) > 1

    @property
    def after(self) -> str:
        """Kind of dependency: a task of an array waits for its own run only."""
        return "aftercorr" if self.array else "afterok"

    def script(self, stage: Stage[Any]) -> str:
        """Returns the batch script of a stage.

        Raises:
            UserError: it is not valid bash, which can only come from the set-up lines.
        """
        options, kind = self.options, KINDS[stage.kind]
        exclude = options.resources.get("exclude")
        text: str = _template().render(
            stage=stage.name,
            recipe=self.recipe,
            options=[shlex.quote(option) for option in self._options(stage)],  # sbatch splits these lines as a shell does
            tasks=self.tasks if self.array else [],
            run=self.tasks[0].run.absolute(),
            settings=self.tasks[0].settings,
            max_requeues=options.max_requeues,
            setup=options.setup,
            nodes=options.nodes if kind.spread else 1,
            command=self._command(stage),
            node_options=self._node_options(kind.trains) if kind.spread else [],
            restart=self.restart,
            srun=self._container(),
            preflight=options.preflight and kind.trains,
            exclude=f"{exclude}," if exclude else "",
            after=self.after,
            PREEMPTED=PREEMPTED,
            NODE_FAILED=NODE_FAILED,
            USER_ERROR=USER_ERROR,
        )
        checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        if checked.returncode:
            raise UserError(f"--setup: with these lines the script is not valid bash: {checked.stderr.strip().splitlines()[0]}")
        return text

    def _options(self, stage: Stage[Any]) -> list[str]:
        options, kind = self.options, KINDS[stage.kind]
        # What is spread without training is made of texts, and needs no GPU.
        gpus = options.gpus_per_node and (options.gpus_per_node if kind.trains else None if kind.spread else 1)
        given: dict[str, Any] = {
            "job-name": f"{options.job_name or self.name}-{stage.name}",
            "chdir": os.getcwd(),
            "output": self.jobs / ("%A_%a.log" if self.array else "%j.log"),
            "open-mode": "append",
            "nodes": options.nodes if kind.spread else 1,
            "ntasks-per-node": 1,
            "gpus-per-node": gpus,
            **options.resources,
            "array": f"0-{len(self.tasks) - 1}" if self.array else None,
            "signal": f"B:USR1@{options.signal_before}",
        }
        return [f"--{name}={value}" for name, value in given.items() if value is not None] + ["--requeue", *options.sbatch]

    def _command(self, stage: Stage[Any]) -> list[str]:
        # A container has a Python of its own; on the host it is the one that submits.
        bothways = ["bothways"] if self.options.container_image else [sys.executable, "-m", "launch.cli"]
        return [*bothways, "launch", str(self.recipe.absolute()), "--stage", stage.name, "--runs", str(self.runs.absolute())]

    def _node_options(self, trains: bool) -> list[str]:
        counts = {"--processes-per-node": self.options.processes_per_node}
        counts |= {"--gpus-per-node": self.options.gpus_per_node} if trains else {}
        return [*(part for flag, count in counts.items() if count for part in (flag, str(count))), *self.options.node_options]

    def _container(self) -> list[str]:
        """Returns the flags that the plugin pyxis adds to srun."""
        options = self.options
        if not options.container_image:
            return []
        mounts = [f"--container-mounts={options.container_mounts}"] if options.container_mounts else []
        return [f"--container-image={options.container_image}", *mounts, f"--container-workdir={os.getcwd()}"]


def minutes(text: str) -> float | None:
    """Returns the minutes of a time limit as Slurm writes it (`30`, `4:00:00`, `2-12`), or None when it is not one."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        return None
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1]:  # days-hours:minutes:seconds
        return days * 1440 + first * 60 + second + third / 60
    if found[4]:  # hours:minutes:seconds
        return first * 60 + second + third / 60
    return first + second / 60


@functools.cache
def _template() -> Any:
    import jinja2

    loader = jinja2.PackageLoader("launch.slurm", "")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    environment.filters["words"] = lambda values: shlex.join(str(value) for value in values)
    return environment.get_template("stage.sbatch.j2")
