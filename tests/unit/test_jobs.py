"""What is known of a run: from the records of its jobs, from Slurm's words and from this machine's processes."""

import fcntl
import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from engine.errors import PREEMPTED, UserError
from engine.stages import heartbeat
from engine.stages.rank import Record
from engine.stages.stage import WORK_FILE
from launch.slurm import jobs
from launch.slurm.jobs import Job, JobState, jobs_of, latest, parse_job
from launch.status import local_run, show, status_of
from launch.watchdog import StageError

# scontrol of Slurm 22.05, shortened.
LINE = (
    "JobId=17 JobName=a b=c-teacher UserId=root(0) GroupId=root(0) Priority=1 JobState=RUNNING Reason=None Dependency=(null) "
    "Requeue=1 Restarts=2 BatchFlag=1 ExitCode=0:0 StartTime=2026-11-24T11:00:00 NodeList=n[1-2] NumNodes=2 CPUs/Task=1 "
    "ReqB:S:C:T=0:0:*:* Command=/tmp/a dir/x.sbatch 3 Comment=JobState=FAILED StdOut=/tmp/17.log Power="
)


def test_the_fields_of_a_job_are_read_whatever_its_name_is():
    fields = parse_job(LINE)
    assert (fields["JobState"], fields["Reason"], fields["NodeList"], fields["Restarts"]) == ("RUNNING", "None", "n[1-2]", "2")
    assert fields["JobName"] == "a b=c-teacher"
    assert fields["Command"] == "/tmp/a dir/x.sbatch 3"
    assert fields["Power"] == ""


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs/tiny"


def make_job(run, number, stage, *events, submitted=0.0):
    directory = run / "jobs" / number
    directory.mkdir(parents=True)
    facts = {"stage": stage, "stages": ["base", "teacher"], "submitted": submitted, "logs": str(run / "jobs")}
    (directory / "job.json").write_text(json.dumps(facts))
    if events:
        (directory / "events").write_text("".join(f"2026-11-24T11:00:00Z {event}\n" for event in events))
    return Job(directory)


@pytest.fixture
def slurm(monkeypatch):
    """Slurm's answers, by job; it has forgotten all others."""
    answers = {}
    monkeypatch.setattr(jobs, "ask", lambda job: answers.get(job, {}))
    return answers


STATES = {
    "queued": ({"JobState": "PENDING", "Reason": "Resources"}, [], "waiting", "for free nodes"),
    "behind another": (
        {"JobState": "PENDING", "Reason": "Dependency", "Dependency": "afterok:16(unfulfilled)"}, [], "waiting", "for afterok:16",
    ),
    "requeued": (
        {"JobState": "PENDING", "Reason": "BeginTime"}, ["started n1", "stopping", "requeued: asked to stop"],
        "waiting", "for the pause after a requeue; requeued: asked to stop",
    ),
    "at work": ({"JobState": "RUNNING", "NodeList": "n[1-2]"}, ["started n[1-2]"], "running", "on n[1-2]"),
    "stopping": (
        {"JobState": "RUNNING", "NodeList": "n1"}, ["started n1", "stopping at the request of Slurm"],
        "running", "on n1, saving a checkpoint before it stops",
    ),
    "done": ({"JobState": "COMPLETED"}, ["started n1", "finished"], "finished", ""),
    "done and forgotten": ({}, ["started n1", "finished"], "finished", ""),
    "tidied up": ({"JobState": "COMPLETING"}, ["started n1", "finished"], "finished", ""),
    "handed over": ({}, ["started n1", "requeued: asked to stop", "resubmitted 18"], "resubmitted", "18"),
    "given up": (
        {"JobState": "FAILED"}, ["started n1", "failed 75 asked to stop; given up after 3 requeues (--max-requeues)"],
        "failed", "asked to stop; given up after 3 requeues (--max-requeues)",
    ),
    "failed without a reason": ({"JobState": "FAILED"}, ["started n1", "failed 137"], "failed", "exit status 137"),
    "time limit": ({"JobState": "TIMEOUT"}, ["started n1"], "failed", jobs.ENDINGS["TIMEOUT"]),
    "lost node": ({"JobState": "NODE_FAIL"}, ["started n1"], "failed", jobs.ENDINGS["NODE_FAIL"]),
    "never started": ({"JobState": "CANCELLED"}, [], "cancelled", "before it had started"),
    "scancel": ({"JobState": "CANCELLED"}, ["started n1", "terminated by Slurm"], "cancelled", "it was cancelled"),
    "at work elsewhere": (None, ["started n1"], "running", "by its own word"),
    "queued elsewhere": (None, [], "waiting", "by its own word"),
    "done elsewhere": (None, ["started n1", "finished"], "finished", ""),
    "forgotten": ({}, ["started n1"], "failed", "it ended without a word"),
    "unknown": ({}, [], "failed", "Slurm does not know it"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_the_state_of_a_job_follows_from_what_slurm_and_the_job_say(run, slurm, case):
    facts, events, name, text = STATES[case]
    slurm["17"] = facts
    state = make_job(run, "17", "teacher", *events).state()
    assert (state.name, state.over) == (name, name not in ("waiting", "running"))
    assert state.text.startswith(text) and bool(state.text) == bool(text)


def test_the_reason_of_a_failure_is_the_launchers_verdict_with_the_traceback_of_the_first_failing_rank(run, slurm):
    job = make_job(run, "17", "teacher", "started n1", "failed 1")
    (run / "jobs/17.log").write_text(
        "Traceback\nerror: stage 'teacher' crashed in process 1: ZeroDivisionError: x\nsrun: error: n2: task 1: Exited\n"
    )
    for attempt, message in ((0, "Traceback old\nOld"), (1, "Traceback new\nZeroDivisionError: x")):
        directory = job.directory / f"attempt-{attempt}"
        directory.mkdir()
        ranks = [Record(0, 1, 1, "Traceback\nConnection reset", 1, True), Record(1, 2, 1, message, 2), Record(2, 3, 75, "", 0)]
        for record in ranks:
            (directory / f"rank{record.rank}.json").write_text(json.dumps(asdict(record)))
    state = job.state()
    assert state == JobState("failed", "stage 'teacher' crashed in process 1: ZeroDivisionError: x", ranks[1].message, 1)
    (run / "jobs/17.log").unlink()
    assert job.state().text == "rank 1: ZeroDivisionError: x"


def test_jobs_are_in_the_order_of_their_submission_and_the_latest_counts(run, slurm):
    make_job(run, "9", "base", submitted=1.0)
    make_job(run, "10", "base", submitted=1.0)  # has taken over from 9
    make_job(run, "8_1", "teacher", submitted=2.0)
    assert [job.id for job in jobs_of(run)] == ["9", "10", "8_1"]
    assert {stage: job.id for stage, job in latest(run).items()} == {"base": "10", "teacher": "8_1"}


def test_waiting_follows_a_job_that_was_handed_over_and_tells_the_first_failure(run, slurm):
    base = make_job(run, "17", "base", "started n1", "resubmitted 19")
    make_job(run, "19", "base", "started n1", "failed 2 bad input")
    teacher = make_job(run, "18", "teacher")
    slurm["18"] = {"JobState": "CANCELLED"}
    said = []
    with pytest.raises(StageError, match=r"^stage 'base' failed \(job 19\): bad input$") as error:
        jobs.wait_for([base, teacher], said.append)
    assert error.value.status == 2
    assert said[0] == "base (job 19): failed bad input"


def beat(directory, rank, phase, step, age):
    then = time.time() - age
    number = list(heartbeat.PHASES).index(phase)
    (directory / f"beat{rank}").write_bytes(struct.pack("<diiqi?d", then, rank, 1, step, number, True, then))


def test_a_running_stage_shows_its_step_speed_and_the_oldest_sign_of_life(run, slurm):
    job = make_job(run, "17", "base", "started n1")
    slurm["17"] = {"JobState": "RUNNING", "NodeList": "n1"}
    records = job.directory / "attempt-0"
    records.mkdir()
    beat(records, 0, "forward", 31, 1)
    beat(records, 1, "update", 30, 20)
    partial = run / "base.partial"
    partial.mkdir()
    lines = [{"step": step, "total_steps": 100, "tokens_per_second": 500.0, "seconds": step * 2.0} for step in (10, 20)]
    (partial / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    base, teacher = status_of(run)
    assert (base.state, base.step, base.total_steps, base.tokens_per_second) == ("running", 31, 100, 500.0)
    assert base.seconds_left == pytest.approx(2 * 69)
    assert base.phase == "update (backward, all-reduce, optimizer step) at step 30"
    assert base.heartbeat_seconds == pytest.approx(20, abs=5)
    assert teacher.state == "not started"
    table = show(run, [base, teacher])
    assert "base     running      job 17 · on n1 · step 31 of 100 · in update" in table
    assert "500 tokens/s · 2:18 left" in table


def test_a_local_run_is_found_by_its_lock_and_a_stopped_one_says_why(run, slurm, tmp_path):
    partial = run / "base.partial"
    partial.mkdir(parents=True)
    (partial / WORK_FILE).write_text("{}")
    assert [(stage.stage, stage.state) for stage in status_of(run)] == [("base", "stopped")]
    (partial / "failure.txt").write_text("the loss is not finite\n")
    assert (status_of(run)[0].state, status_of(run)[0].text) == ("failed", "the loss is not finite")
    assert local_run(run) is None
    # A process that waits, as the ranks' launcher does.
    child = subprocess.Popen(
        [sys.executable, "-c", "input()", "--stage", "base"], stdin=subprocess.PIPE, env={heartbeat.DIRECTORY: str(tmp_path)}
    )
    handle = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        beat(tmp_path, 0, "data", 3, 2)
        (base,) = status_of(run)
        assert (base.state, base.text, base.step) == ("running", f"process {os.getpid()} of this machine", 3)
    finally:
        os.close(handle)
        child.communicate(b"\n")
    assert status_of(run)[0].state == "failed"


def test_a_directory_in_which_nothing_has_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing in it has been run or submitted"):
        status_of(tmp_path)


def test_the_commands_say_what_is_missing(call, tmp_path, run):
    status, _, err = call("status", tmp_path / "nothing")
    assert (status, err) == (2, f"error: {tmp_path / 'nothing'}: no such run directory and no such recipe\n")
    run.mkdir(parents=True)
    status, _, err = call("logs", run)
    assert (status, err.count("\n")) == (2, 1)
    assert "no job has run it" in err
    status, _, err = call("cancel", run)
    assert (status, err) == (2, f"error: {run}: no job is waiting or running\n")


def test_the_log_of_a_rank_is_that_of_the_latest_attempt(call, run, monkeypatch):
    monkeypatch.setattr(jobs, "ask", lambda job: {})
    job = make_job(run, "17", "base", "started n1", "finished")
    for attempt in (2, 10):
        (job.directory / f"attempt-{attempt}").mkdir()
        (job.directory / f"attempt-{attempt}/rank1.log").write_text(f"attempt {attempt}\n")
    assert call("logs", run, "--rank", "1") == (0, "attempt 10\n", "")
    status, _, err = call("logs", run, "--rank", "0")
    assert (status, err) == (2, "error: --rank 0: job 17 has logs of the ranks 1\n")


@pytest.mark.parametrize("asked", [False, True])
def test_a_cancel_that_fails_leaves_the_job_as_it_was(call, run, slurm, tmp_path, monkeypatch, asked):
    job = make_job(run, "17", "base", "started n1")
    slurm["17"] = {"JobState": "RUNNING"}
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, err = call("cancel", run)
    assert (status, err) == (2, "error: scancel is not on the PATH: cancel from a login node of the cluster\n")
    (tmp_path / "scancel").write_text("#!/bin/sh\necho 'scancel: error: no controller' >&2\nexit 1\n")
    (tmp_path / "scancel").chmod(0o755)
    marker = job.directory / jobs.CANCELLED
    if asked:
        marker.touch()
    status, _, err = call("cancel", run)
    assert (status, err) == (2, f"error: scancel {'' if asked else '--batch --signal=USR1 '}17: no controller\n")
    assert marker.exists() is asked


def test_a_cancelled_job_ends_with_the_status_of_a_run_that_can_go_on(run, slurm):
    job = make_job(run, "17", "base", "started n1", "stopping", "cancelled")
    assert job.state() == JobState("cancelled", "", status=PREEMPTED)
