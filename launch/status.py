"""Where the stages of a run stand, read from the run directory, from Slurm and from the processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError, did_you_mean
from engine.stages import heartbeat
from engine.stages.stage import STAGE_FILE, WORK_FILE, read_stage
from launch.pipeline import FAILURE
from launch.slurm import jobs

DOT = " · "


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run."""

    stage: str
    state: str
    """finished, running, waiting, failed, cancelled, stopped (goes on when it is run again) or not started."""
    text: str = ""
    """Why, where, since when."""
    job: str | None = None
    step: int | None = None
    total_steps: int | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    """Of training, at the speed so far; evaluation is not counted."""
    phase: str | None = None
    """What the rank with the oldest sign of life is doing."""
    heartbeat_seconds: float | None = None
    """Age of the oldest sign of life of its ranks."""

    def as_json(self) -> dict[str, Any]:
        """Returns what is known of it."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}

    def line(self) -> str:
        """Returns everything but its name and state, for people."""
        parts = [f"job {self.job}"] if self.job else []
        parts += [self.text] if self.text else []
        if self.step is not None:
            parts.append(f"step {self.step:,}" + (f" of {self.total_steps:,}" if self.total_steps else ""))
        if self.state == "running":
            parts += [f"in {self.phase}, heartbeat {self.heartbeat_seconds:.1f} s ago"] if self.phase else []
            parts += [f"{self.tokens_per_second:,.0f} tokens/s"] if self.tokens_per_second else []
            parts += [f"{_duration(self.seconds_left)} left"] if self.seconds_left is not None else []
        return DOT.join(parts)


def status_of(run: Path, stages: list[str] | None = None) -> list[StageStatus]:
    """Returns the status of every stage.

    Args:
        run: run directory; it need not exist yet.
        stages: of the recipe; None: those that have left a trace.

    Raises:
        UserError: `run` is no run directory.
    """
    latest = jobs.latest(run)
    names = stages or _stages(run, latest)
    if not names:
        raise UserError(f"{run}: nothing in it has been run or submitted")
    here = local_run(run)
    return [_status(run, name, latest.get(name), here) for name in names]


def show(run: Path, stages: list[StageStatus]) -> str:
    """Returns a table for people."""
    wide = max(len(stage.stage) for stage in stages)
    lines = [f"  {stage.stage:<{wide}}  {stage.state:<11}  {stage.line()}".rstrip() for stage in stages]
    return "\n".join([str(run), *lines])


def _stages(run: Path, latest: dict[str, jobs.Job]) -> list[str]:
    """Returns the stages in the order of the recipe, as far as that was written down, and others that lie there."""
    newest = max(latest.values(), key=lambda job: float(job.facts["submitted"]), default=None)
    known = list(newest.facts["stages"]) if newest else []
    records = [*run.glob(f"*/{STAGE_FILE}"), *run.glob(f"*.partial/{WORK_FILE}")]
    found = sorted(records, key=lambda path: path.stat().st_mtime)
    return list(dict.fromkeys([*known, *(path.parent.name.removesuffix(".partial") for path in found)]))


def _status(run: Path, name: str, job: jobs.Job | None, here: LocalRun | None) -> StageStatus:
    state = job.state() if job else None
    if job and state and not state.over:
        if state.name == "running":
            return _running(run, name, state.text, job.id, job.records)
        return StageStatus(name, state.name, state.text, job.id)
    if here and here.stage == name:
        return _running(run, name, f"process {here.pid} of this machine", None, here.records)
    done = read_stage(run / name)
    partial = run / f"{name}.partial"
    if job and state and state.name in ("failed", "cancelled") and not (done and _newer(run / name, job.directory / "events")):
        step, total, _, _ = _progress(partial)
        return StageStatus(name, state.name, state.text, job.id, step, total)
    if done:
        return StageStatus(name, "finished", f"{done.get('finished', '')}".replace("T", " ").rstrip("Z"))
    if not partial.exists():
        return StageStatus(name, "not started")
    reason = partial / FAILURE
    step, total, _, _ = _progress(partial)
    if reason.exists():
        return StageStatus(name, "failed", reason.read_text(encoding="utf-8").strip(), None, step, total)
    return StageStatus(name, "stopped", "run it again to go on", None, step, total)


def _newer(path: Path, other: Path) -> bool:
    return not other.exists() or path.stat().st_mtime > other.stat().st_mtime


def _running(run: Path, name: str, text: str, job: str | None, records: Path | None) -> StageStatus:
    step, total, speed, pace = _progress(run / f"{name}.partial")
    beats = heartbeat.read(records) if records else []
    oldest = max(beats, key=lambda beat: beat.age_seconds, default=None)
    steps = [beat.step for beat in beats if beat.step is not None]
    step = max([*steps, *([step] if step is not None else [])], default=None)
    left = (total - step) * pace if total and pace and step is not None else None
    phase, age = (oldest.where, oldest.age_seconds) if oldest else (None, None)
    return StageStatus(name, "running", text, job, step, total, speed, left, phase, age)


def _progress(partial: Path) -> tuple[int | None, int | None, float | None, float | None]:
    """Returns (last recorded step, all steps, tokens per second, seconds per step) of a stage in the making."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in (partial / "history.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # being written
                records.append(json.loads(line))
    trained = [record for record in records if record.get("tokens_per_second")]
    if not records:
        return None, None, None, None
    last = trained[-1] if trained else {}
    pace = last["seconds"] / last["step"] if last.get("step") else None
    return records[-1]["step"], records[-1].get("total_steps"), last.get("tokens_per_second"), pace


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True)
class LocalRun:
    """A `bothways run` that is at work on this machine."""

    pid: int
    stage: str | None = None
    records: Path | None = None
    """Records and heartbeats of its ranks."""


def local_run(run: Path) -> LocalRun | None:
    """Returns the run of this machine that holds the lock of a run directory, if Linux tells."""
    try:
        inode = run.stat().st_ino
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return None
    for fields in held:
        if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode) and int(fields[4]) > 0:
            return _look_into(int(fields[4]))
    return None


def _look_into(pid: int) -> LocalRun:
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            arguments = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace").split("\0")
            variables = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace").split("\0")
            records = [text.partition("=")[2] for text in variables if text.startswith(f"{heartbeat.DIRECTORY}=")]
            if "--stage" in arguments and records:
                return LocalRun(pid, arguments[arguments.index("--stage") + 1], Path(records[0]))
    return LocalRun(pid)


def cancel_run(run: Path, stage: str | None, say: Callable[[str], None]) -> None:
    """Stops what is at work on a run: its Slurm jobs, and a run on this machine.

    Raises:
        UserError: nothing is, or there is no such stage.
    """
    names = _stages(run, jobs.latest(run))
    if stage and names and stage not in names:
        raise UserError(f"--stage {stage}: {run} has no such stage{did_you_mean(stage, names)}")
    here = local_run(run)
    if here and stage in (None, here.stage) and not any(job.state().name == "running" for job in jobs.jobs_of(run)):
        os.kill(here.pid, signal.SIGTERM)
        say(f"process {here.pid}: asked to save a checkpoint and stop; a second time ends it at once")
        return
    jobs.cancel(run, stage, say)
