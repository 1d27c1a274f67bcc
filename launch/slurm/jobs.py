"""The batch jobs of a run: what they left in `runs/<recipe>/jobs/<job id>/`, and what Slurm says about them.

Accounting is not needed: Slurm forgets a job some minutes after its end, the job's own record stays.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import JOBS
from engine.errors import PREEMPTED, UserError
from engine.stages.rank import read_records
from launch.watchdog import StageError

JOB_FILE = "job.json"
CANCELLED = "cancelled"
"""Its presence in a job's directory keeps the job from queueing itself again."""
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "SIGNALING", "STOPPED")
"""States from which a job goes on by itself."""
ENDINGS = {
    "TIMEOUT": "it ran into its time limit before a checkpoint could be saved: raise --time or --signal-before",
    "NODE_FAIL": "a node failed and Slurm has not requeued the job",
    "OUT_OF_MEMORY": "out of host memory: raise --mem, or lower micro_batch_size",
    "BOOT_FAIL": "a node did not start",
    "DEADLINE": "its deadline has passed",
    "PREEMPTED": "it was preempted and Slurm has not requeued it",
    "CANCELLED": "it was cancelled",
}
"""What the final states of Slurm mean when the job itself could not say more."""
TAIL_BYTES = 2**16
"""How much of a log is searched for the reason of a failure."""
POLL_SECONDS = (0.5, 10.0)
"""Pause between two questions to Slurm while waiting: at first, and after a while."""


@dataclass(frozen=True)
class Event:
    """One line that a job wrote about itself: `2026-11-24T11:08:00Z requeued: asked to stop`."""

    time: str
    word: str
    text: str


@dataclass(frozen=True)
class JobState:
    """Where a job stands."""

    name: str
    """waiting, running, finished, failed, cancelled or resubmitted."""
    text: str = ""
    """Why, where or as which job."""
    details: str = ""
    """A traceback."""
    status: int = 0
    """Exit status that fits a failure."""

    @property
    def over(self) -> bool:
        """True when nothing more will come from this job."""
        return self.name not in ("waiting", "running")


@dataclass(frozen=True)
class Job:
    """One job, with its directory; an array job has one for each of its tasks."""

    directory: Path

    @property
    def id(self) -> str:
        """As Slurm's commands take it: `17`, or `17_2` for a task of an array."""
        return self.directory.name

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What its submission wrote down."""
        found: dict[str, Any] = json.loads((self.directory / JOB_FILE).read_text())
        return found

    @property
    def stage(self) -> str:
        """The stage that it runs."""
        return str(self.facts["stage"])

    @property
    def log(self) -> Path:
        """What the job and the launchers of its nodes print."""
        return Path(self.facts["logs"], f"{self.id}.log")

    @property
    def records(self) -> Path:
        """Records, heartbeats and logs of the ranks in its latest attempt."""
        attempts = self.directory.glob("attempt-*")
        return max(attempts, key=lambda path: int(path.name.rpartition("-")[2]), default=self.directory / "attempt-0")

    def events(self) -> list[Event]:
        """Returns what it has said about itself, oldest first."""
        try:
            lines = (self.directory / "events").read_text().splitlines()
        except FileNotFoundError:
            return []
        parts = [line.split(maxsplit=2) for line in lines]
        return [Event(part[0], part[1].rstrip(":"), part[2] if len(part) > 2 else "") for part in parts if len(part) > 1]

    def state(self) -> JobState:
        """Returns where it stands, by Slurm's word while Slurm knows it, else by its own."""
        events = self.events()
        told = [event for event in events if event.word in ("finished", "failed", "cancelled", "resubmitted")]
        last = told[-1] if told else None
        facts = ask(self.id)
        if facts is None and not last:
            return JobState("running" if events else "waiting", "by its own word: there is no Slurm here to ask")
        facts = facts or {}
        known = facts.get("JobState", "")
        if known in ACTIVE and not (last and known == "COMPLETING"):
            return _active(known, facts, events)
        if last and last.word == "failed":
            return self._failed(last)
        if last:
            return JobState(last.word, last.text, status=PREEMPTED if last.word == "cancelled" else 0)
        if known == "COMPLETED":
            return JobState("finished")
        if (self.directory / CANCELLED).exists() or (known == "CANCELLED" and not events):
            text = "" if events else "before it had started; so are jobs that wait for a stage which did not finish"
            return JobState("cancelled", text, status=PREEMPTED)
        reason, details = self._reason()
        if events and events[-1].word == "terminated":
            reason = reason or "Slurm terminated it: its time limit, a lost node or scancel"
        ending = ENDINGS.get(known) or reason or ("it ended without a word" if events else "Slurm does not know it")
        return JobState("cancelled" if known == "CANCELLED" else "failed", ending, details, status=1)

    def _failed(self, event: Event) -> JobState:
        number, _, said = event.text.partition(" ")
        reason, details = self._reason()
        shown = said or reason or f"exit status {number}"
        return JobState("failed", shown, "" if said else details, int(number) if number.isdigit() else 1)

    def _reason(self) -> tuple[str, str]:
        """Returns (one line, traceback) of what went wrong first in the latest attempt; empty where nothing is known."""
        failed = [record for record in read_records(self.records) if record.status not in (None, 0, PREEMPTED)]
        own = sorted((record for record in failed if not record.collective and record.message), key=lambda record: record.ended)
        lines = own[0].message.strip().splitlines() if own else []
        log = tail(self.log)
        for said_by in ("", r"\w+: "):  # our own commands; else srun or slurmstepd
            errors = re.findall(rf"^{said_by}error: (.*)$", log, flags=re.MULTILINE)
            if errors and not (said_by and own):
                return errors[-1], own[0].message if len(lines) > 1 else ""
        return (f"rank {own[0].rank}: {lines[-1]}", own[0].message if len(lines) > 1 else "") if own else ("", "")


def _active(known: str, facts: dict[str, str], events: list[Event]) -> JobState:
    if known in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD"):
        again = [event for event in events if event.word == "requeued"]
        text = _PENDING.get(facts.get("Reason", ""), facts.get("Reason", ""))
        if facts.get("Dependency", "(null)") != "(null)":
            text = f"{text} {facts['Dependency'].partition('(')[0]}"
        return JobState("waiting", f"{text}; requeued: {again[-1].text}" if again else text)
    where = facts.get("NodeList", "")
    stopping = events and events[-1].word == "stopping"
    return JobState("running", f"on {where}" + (", saving a checkpoint before it stops" if stopping else ""))


_PENDING = {
    "None": "for the scheduler",
    "Resources": "for free nodes",
    "Priority": "for jobs of a higher priority",
    "Dependency": "for",
    "BeginTime": "for the pause after a requeue",
}


def tail(path: Path) -> str:
    """Returns the end of a log; nothing when it does not exist."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def parse_job(line: str) -> dict[str, str]:
    """Returns the fields of a line of `scontrol show job -o`; a value may contain spaces and equals signs."""
    fields: dict[str, str] = {}
    for found in re.finditer(r"(?:^| )([A-Z]\w*(?:/\w+)*(?::\w+)?)=(.*?)(?= [A-Z]\w*(?:/\w+)*(?::\w+)?=|$)", line.strip()):
        fields.setdefault(found[1], found[2])
    return fields


def ask(job: str) -> dict[str, str] | None:
    """Returns what Slurm knows about a job: nothing when it has forgotten it, None when there is no Slurm here.

    Raises:
        UserError: Slurm does not answer.
    """
    try:
        done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if "Could not establish a configuration source" in done.stderr:
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"scontrol: {last_line(done.stderr)}")
    # A pending task of an array is shown by the record of all of its pending tasks.
    return parse_job(done.stdout.splitlines()[0]) if done.stdout.strip() else {}


def last_line(text: str) -> str:
    """Returns the last line of what a command of Slurm said, without its name."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"^\w+: (error: )?", "", lines[-1]) if lines else "it failed without a word"


def jobs_of(run: Path, stage: str | None = None) -> list[Job]:
    """Returns the jobs of a run in the order of their submission; of one stage, or of all."""
    jobs = [Job(path.parent) for path in (run / JOBS).glob(f"*/{JOB_FILE}")]
    jobs.sort(key=lambda job: (job.facts["submitted"], [int(part) for part in job.id.split("_")]))
    return [job for job in jobs if stage in (None, job.stage)]


def latest(run: Path) -> dict[str, Job]:
    """Returns {stage: its latest job}."""
    return {job.stage: job for job in jobs_of(run)}


def follow_up(job: Job) -> Job:
    """Returns the job that has taken over, or the same."""
    while (state := job.state()).name == "resubmitted":
        job = Job(job.directory.with_name(state.text))
    return job


def wait_for(jobs: list[Job], say: Callable[[str], None]) -> None:
    """Waits for jobs to end, telling every change.

    Args:
        jobs: in the order of their stages.

    Raises:
        StageError: one failed or was cancelled; the first that did.
    """
    shown: dict[str, JobState] = {}
    pause, longest = POLL_SECONDS
    while True:
        jobs = [follow_up(job) for job in jobs]
        states = {job.id: job.state() for job in jobs}
        for job in jobs:
            state = states[job.id]
            if shown.get(job.id) != state:
                say(f"{job.stage} (job {job.id}): {state.name} {state.text}".rstrip())
        shown = states
        if all(state.over for state in states.values()):
            break
        time.sleep(pause)
        pause = min(longest, pause * 1.2)
    for job in jobs:
        state = states[job.id]
        if state.name != "finished":
            raise StageError(state.status or 1, f"stage '{job.stage}' {state.name} (job {job.id}): {state.text}", state.details)


def cancel(run: Path, stage: str | None, say: Callable[[str], None]) -> None:
    """Cancels the jobs of a run: waiting ones at once; running ones save a checkpoint first, unless they are asked twice.

    Raises:
        UserError: nothing of it is waiting or running.
    """
    alive = [job for job in jobs_of(run, stage) if not job.state().over]
    if alive and not shutil.which("scancel"):
        raise UserError("scancel is not on the PATH: cancel from a login node of the cluster")
    for job in reversed(alive):  # the last of a chain first: none of them may start meanwhile
        marker = job.directory / CANCELLED
        asked = marker.exists()
        gently = job.state().name == "running" and not asked
        marker.touch()  # before the signal: the job looks for it when it has saved its checkpoint
        command = ["scancel", "--batch", "--signal=USR1", job.id] if gently else ["scancel", job.id]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            if not asked:
                marker.unlink()
            raise UserError(f"{' '.join(command)}: {last_line(done.stderr)}")
        how = "asked to save a checkpoint and stop; a second time ends it at once" if gently else "cancelled"
        say(f"{job.stage} (job {job.id}): {how}")
    if not alive:
        raise UserError(f"{run}: no job{f' of stage {stage!r}' if stage else ''} is waiting or running")


def show_log(run: Path, stage: str | None, rank: int | None, follow: bool) -> None:
    """Prints the log of the latest job that has one, or of one of its ranks.

    Args:
        follow: go on until the job is over.

    Raises:
        UserError: there is none.
    """
    job, path = _find_log(run, stage, rank)
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while True:
            # Asked before reading: what is written meanwhile is read in the next round.
            over = not follow or job.state().over
            while chunk := file.read(TAIL_BYTES):
                sys.stdout.write(chunk)
            sys.stdout.flush()
            if over:
                return
            time.sleep(1)


def _find_log(run: Path, stage: str | None, rank: int | None) -> tuple[Job, Path]:
    jobs = jobs_of(run, stage)
    if not jobs:
        whose = f"stage '{stage}' of {run}" if stage else str(run)
        raise UserError(f"{whose}: no job has run it; what `bothways run` prints goes to its terminal")
    for job in reversed(jobs):
        path = job.log if rank is None else job.records / f"rank{rank}.log"
        if path.is_file():
            return job, path
    if rank is None:
        raise UserError(f"{run}: job {jobs[-1].id} has not started ({jobs[-1].state().text}): there is no log yet")
    known = sorted(int(found.stem[4:]) for found in jobs[-1].records.glob("rank*.log"))
    raise UserError(f"--rank {rank}: job {jobs[-1].id} has logs of the ranks {', '.join(map(str, known)) or 'none'}")
