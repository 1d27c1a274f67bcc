"""Batch jobs on a real Slurm: chains, failures, preemption, lost nodes, sweeps."""

import json
import subprocess
import sys

import pytest
import torch

from engine.errors import PREEMPTED, USER_ERROR
from engine.stages.stage import read_stage
from launch.slurm.jobs import jobs_of, latest
from tests.recipes import read_history, read_weights
from tests.slurm.conftest import ROOT, STEPS, TWO_NODES, WAIT, at_checkpoint, events, everything, happened, status


def assert_bit_equal(directory, other):
    ours, theirs = read_weights(directory), read_weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert validations(directory) == validations(other)


def validations(directory):
    """What was measured at each evaluation; where a run was asked to stop there is one more record of the training loss."""
    return [record for record in read_history(directory) if "validation" in record]


def test_a_training_job_on_two_nodes_equals_two_processes_of_one_host(bothways, submitted, recipe, tmp_path):
    options = ("--set", "base.parallel=zero2", "--set", "base.processes=2", "--stage", "base")
    bothways("run", recipe, "--runs", tmp_path / "runs", *options)
    two_nodes = bothways.finished(submitted["two nodes"], "base")
    assert read_stage(two_nodes)["processes"].startswith("2 processes over gloo, zero2")
    job = latest(two_nodes.parent)["base"]
    assert {path.name for path in job.records.glob("rank*.json")} == {"rank0.json", "rank1.json"}
    assert events(two_nodes.parent, "base") == ["started", "finished"]
    ours, theirs = read_weights(two_nodes), read_weights(tmp_path / "runs/tiny/base")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=name)


def test_every_rank_has_its_own_log(bothways, submitted):
    run = submitted["two nodes"]
    bothways.finished(run, "base")
    whole, _ = bothways("logs", run, "--follow")
    assert "finished" in whole.splitlines()[-1]
    rank, _ = bothways("logs", run, "--stage", "base", "--rank", "1")
    assert "validation loss" in whole
    assert "validation loss" not in rank
    _, err = bothways("logs", run, "--rank", "7", status=USER_ERROR)
    assert err.endswith("has logs of the ranks 0, 1\n")


def test_usr1_saves_a_checkpoint_and_the_requeued_job_ends_with_the_same_bits(bothways, submitted, recipe, tmp_path):
    run = bothways.submit(recipe, tmp_path / "runs", *TWO_NODES)
    at_checkpoint(run, "base", 2)
    out, _ = bothways("status", run, "--json")
    (running,) = (entry for entry in json.loads(out)[str(run)] if entry["stage"] == "base")
    assert (running["state"], running["total_steps"]) == ("running", STEPS)
    assert running["heartbeat_seconds"] < WAIT
    bothways.ask_to_stop(run, "base")
    happened("requeue", lambda: "requeued" in events(run, "base"), run)
    assert not (run / "base").exists()
    directory = bothways.finished(run, "base")
    assert events(run, "base") == ["started", "stopping", "requeued", "started", "finished"]
    assert "resuming after step" in latest(run)["base"].log.read_text()
    assert_bit_equal(directory, bothways.finished(submitted["two nodes"], "base"))


def test_a_job_that_loses_a_node_is_requeued_and_ends_with_the_same_bits(bothways, cluster, submitted, recipe, tmp_path):
    expected = bothways.finished(submitted["two nodes"], "base")
    run = bothways.submit(recipe, tmp_path / "runs", *TWO_NODES)
    at_checkpoint(run, "base", 2)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        bothways.until(run, "base", "waiting")
    finally:
        # It may have come back by itself, because its slurmd is alive.
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)
    directory = bothways.finished(run, "base")
    assert events(run, "base")[-2:] == ["started", "finished"]
    assert events(run, "base").count("started") == 2
    assert_bit_equal(directory, expected)


@pytest.mark.slow
def test_a_preempted_job_saves_a_checkpoint_and_goes_on_afterwards(bothways, cluster, alone, recipe, tmp_path):
    run = bothways.submit(recipe, tmp_path / "runs", "--stage", "base", "--partition", "low")
    at_checkpoint(run, "base", 2)
    cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/high", "--wrap=sleep 1")
    directory = bothways.finished(run, "base")
    told = events(run, "base")
    assert told[:2] == ["started", "stopping"]
    assert told[-2:] == ["started", "finished"]
    assert "resuming after step" in latest(run)["base"].log.read_text()
    assert_bit_equal(directory, alone)


@pytest.mark.slow
def test_a_node_that_is_not_fit_is_named_and_the_job_goes_on_without_it(bothways, recipe, tmp_path):
    # A driver that fails on the first node.
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" != n1 ] || { echo "the driver does not answer"; exit 9; }\n')
    tool.chmod(0o755)
    options = ("--preflight", "--setup", f"export PATH={tool.parent}:$PATH", "--set", "base.train.steps=2")
    run = bothways.submit(recipe, tmp_path / "runs", "--stage", "base", *options)
    bothways.finished(run, "base")
    told = [(event.word, event.text) for event in latest(run)["base"].events()]
    assert told == [("started", "n1"), ("requeued", "bad nodes: n1"), ("started", "n2"), ("finished", "")]
    assert "node 0 (n1): nvidia-smi fails" in latest(run)["base"].log.read_text()


@pytest.mark.slow
def test_where_requeueing_is_forbidden_another_job_takes_over_and_the_next_stage_waits_for_it(bothways, alone, recipe, tmp_path):
    run = bothways.submit(recipe, tmp_path / "runs", "--sbatch=--no-requeue")
    first = latest(run)["base"]
    at_checkpoint(run, "base", 2)
    bothways.ask_to_stop(run, "base")
    teacher = bothways.finished(run, "teacher")
    second = latest(run)["base"]
    assert [event.word for event in first.events()] == ["started", "stopping", "requeued", "resubmitted"]
    assert [event.word for event in second.events()] == ["started", "finished"]
    assert first.events()[-1].text == second.id
    assert_bit_equal(run / "base", alone)
    assert read_stage(teacher)["inputs"]["model"]["reference"] == "base"


@pytest.mark.slow
def test_a_job_that_was_requeued_too_often_fails_and_the_stages_behind_it_do_not_run(bothways, recipe, tmp_path):
    command = [sys.executable, "-m", "launch.cli", "launch", str(recipe), "--runs", str(tmp_path / "runs"), "--slurm", "--wait"]
    waiting = subprocess.Popen(
        [*command, "--max-requeues", "0"],
        cwd=ROOT,
        env=bothways.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = tmp_path / "runs/tiny"
    at_checkpoint(run, "base", 2)
    bothways.ask_to_stop(run, "base")
    out, err = waiting.communicate(timeout=100)
    assert waiting.returncode == PREEMPTED, out + err
    job = latest(run)["base"]
    reason = "asked to stop; given up after 0 requeues (--max-requeues)"
    assert err == f"error: stage 'base' failed (job {job.id}): {reason}\n"
    assert events(run, "base") == ["started", "stopping", "failed"]
    assert bothways.until(run, "teacher", "cancelled").text.startswith("before it had started")


def test_a_users_mistake_that_only_the_stage_finds_is_not_retried_and_is_named(bothways, submitted):
    run = submitted["mistake"]
    failed = bothways.until(run, "base", "failed")
    assert "rows.jsonl:601: not valid JSON" in failed.text
    assert events(run, "base") == ["started", "failed"]
    assert latest(run)["base"].events()[-1].text == str(USER_ERROR)
    assert bothways.until(run, "teacher", "cancelled")


def test_a_crash_is_not_retried_and_the_failing_ranks_own_reason_is_told(bothways, submitted):
    run = submitted["crash"]
    failed = bothways.until(run, "teacher", "failed")
    assert "stage 'teacher' crashed in process" in failed.text, everything(run)
    assert "ZeroDivisionError" in failed.text
    assert events(run, "teacher") == ["started", "failed"]
    assert "Traceback" in latest(run)["teacher"].state().details
    assert bothways.until(run, "again", "cancelled")


def test_every_task_of_a_sweep_is_a_run_of_its_own(bothways, submitted):
    runs = submitted["sweep"].parent
    for rate in ("1e-3", "3e-3"):
        run = runs / f"tiny-learning_rate-{rate}"
        record = read_stage(bothways.finished(run, "base"))
        assert record["section"]["train"]["learning_rate"] == float(rate)
        assert latest(run)["base"].log.is_file()
    assert not (runs / "tiny/base").exists()


@pytest.mark.slow
def test_cancel_saves_a_checkpoint_and_takes_the_waiting_stages_away(bothways, recipe, tmp_path):
    run = bothways.submit(recipe, tmp_path / "runs")
    at_checkpoint(run, "base", 2)
    out, _ = bothways("cancel", run)
    assert [line.partition(" (")[0] for line in out.splitlines()] == ["teacher", "base"]
    stopped = bothways.until(run, "base", "cancelled")
    assert events(run, "base") == ["started", "stopping", "cancelled"]
    assert stopped.step >= 2
    assert status(run, "teacher").state == "cancelled"
    _, err = bothways("cancel", run, status=USER_ERROR)
    assert err == f"error: {run}: no job is waiting or running\n"
    assert [job.stage for job in jobs_of(run)] == ["base", "teacher"]


def test_a_second_submission_of_a_waiting_stage_is_refused(bothways, cluster, recipe, tmp_path):
    run = bothways.submit(recipe, tmp_path / "runs", "--sbatch=--hold", "--stage", "base")
    job = latest(run)["base"].id
    _, err = bothways("launch", recipe, "--runs", tmp_path / "runs", "--slurm", status=USER_ERROR)
    assert err.startswith(f"error: {run}: job {job} for stage 'base' is already waiting")
    assert status(run, "base").state == "waiting"
    bothways("cancel", run, "--stage", "base")
    assert cluster.run("squeue", "--noheader", f"--jobs={job}") == ""
    assert status(run, "base").state == "cancelled"


def test_sbatch_says_in_advance_whether_a_job_would_start(bothways, recipe, tmp_path):
    arguments = ("launch", recipe, "--runs", tmp_path / "runs", "--slurm", "--test-only")
    out, _ = bothways(*arguments, "--nodes", "2", "--processes-per-node", "1")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["base", "teacher"]
    assert "to start at" in out
    _, err = bothways(*arguments, "--nodes", "4", "--processes-per-node", "1", status=USER_ERROR)
    assert err.startswith("error: sbatch would refuse stage 'base'")
    assert not (tmp_path / "runs").exists()


def test_what_sbatch_refuses_is_passed_on_and_nothing_is_submitted(bothways, recipe, tmp_path):
    arguments = ("launch", recipe, "--runs", tmp_path / "runs", "--slurm", "--partition", "nowhere")
    _, err = bothways(*arguments, status=USER_ERROR)
    reason = "Batch job submission failed: Invalid partition name specified"
    assert err == f"error: sbatch refused stage 'base': {reason}; nothing has been submitted\n"
    assert not (tmp_path / "runs").exists()


def test_sbatch_takes_the_scripts_that_the_dry_run_shows(bothways, cluster, recipe, tmp_path):
    out, _ = bothways(
        *("launch", recipe, "--runs", tmp_path / "runs", "--slurm", "--dry-run", "--nodes", 2, "--processes-per-node", 1),
        *('--sbatch=--comment=it\'s "so" $HOME', "--job-name", "a b"),
    )
    scripts = out.split("# ---- ")[1:]
    assert len(scripts) == 2
    for number, text in enumerate(scripts):
        path = tmp_path / f"{number}.sbatch"
        path.write_text(text.partition("\n")[2])
        cluster.run("sbatch", "--test-only", path)
    held = cluster.run("sbatch", "--parsable", "--hold", path).strip()
    shown = cluster.run("scontrol", "show", "job", held)
    cluster.run("scancel", held)
    assert "JobName=a b-teacher" in shown
    assert 'Comment=it\'s "so" $HOME' in shown
