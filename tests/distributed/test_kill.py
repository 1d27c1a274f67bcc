"""Killed or asked to stop in the middle of a stage, a run goes on and ends with the bits of one that was left alone."""

import os
import shutil
import signal
import time

import pytest
import torch

from engine.errors import PREEMPTED
from engine.stages.stage import read_stage
from tests.distributed.conftest import TWO, Bothways, alive, kill, succeed
from tests.recipes import read_history, read_weights


def assert_bit_equal(directory, other):
    ours, theirs = read_weights(directory), read_weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert read_stage(directory)["metrics"] == read_stage(other)["metrics"]


def test_kill_9_of_one_of_two_zero2_ranks_then_run_again_gives_bit_equal_weights(recipe, zero2, tmp_path):
    arguments = ("--stage", "base", *TWO["zero2"])
    run = Bothways(recipe, tmp_path / "runs", *arguments)
    run.at_checkpoint("base", 6)
    kill(next(record.pid for record in run.records() if record.rank == 1))
    status, _, err = run.wait()
    assert status == 1
    assert err.splitlines()[-1] == (
        "error: process 1 of stage 'base' was killed: out of memory, or killed by hand; run again to go on"
    )
    assert not (tmp_path / "runs/tiny/base").exists()
    out = succeed(Bothways(recipe, tmp_path / "runs", *arguments))
    assert "resuming after step" in out
    assert_bit_equal(tmp_path / "runs/tiny/base", zero2)
    assert read_history(tmp_path / "runs/tiny/base") == read_history(zero2)


def test_sigterm_saves_a_checkpoint_on_both_ranks_and_the_next_run_gives_bit_equal_weights(recipe, zero2, tmp_path):
    arguments = ("--stage", "base", *TWO["zero2"])
    run = Bothways(recipe, tmp_path / "runs", *arguments)
    run.at_checkpoint("base", 4)
    run.process.send_signal(signal.SIGTERM)
    status, out, err = run.wait()
    assert status == PREEMPTED, f"{out}\n{err}"
    assert "asked to stop: checkpoint of step" in out
    assert err == "error: stage 'base' was asked to stop: run again to go on\n"
    assert "resuming after step" in succeed(Bothways(recipe, tmp_path / "runs", *arguments))
    assert_bit_equal(tmp_path / "runs/tiny/base", zero2)


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The fine-tuning stage after an uninterrupted run of one process."""
    runs = tmp_path_factory.mktemp("alone") / "runs"
    succeed(Bothways(recipe, runs, "--stage", "teacher"))
    return runs / "tiny" / "teacher"


def test_kill_9_of_bothways_itself_leaves_no_process_behind_and_the_next_run_gives_bit_equal_weights(recipe, alone, tmp_path):
    run = Bothways(recipe, tmp_path / "runs", "--stage", "teacher")
    run.at_checkpoint("teacher", 6)
    (rank,) = run.records()
    kill(run.process.pid)
    run.wait()
    give_up = time.monotonic() + 30
    while alive(rank.pid) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not alive(rank.pid)
    assert not (tmp_path / "runs/tiny/teacher").exists()
    assert "resuming after step" in succeed(Bothways(recipe, tmp_path / "runs", "--stage", "teacher"))
    assert_bit_equal(tmp_path / "runs/tiny/teacher", alone)


def test_an_unchanged_stage_is_skipped_and_a_changed_one_runs_again(recipe, alone, tmp_path):
    shutil.copytree(alone.parent.parent, tmp_path / "runs")
    stage = tmp_path / "runs/tiny/teacher"
    out = succeed(Bothways(recipe, tmp_path / "runs", "--stage", "teacher"))
    assert "teacher (finetune): skipped, unchanged" in out
    assert (stage / "stage.json").read_bytes() == (alone / "stage.json").read_bytes()
    succeed(Bothways(recipe, tmp_path / "runs", "--stage", "teacher", "--set", "teacher.train.steps=2"))
    assert read_stage(stage)["steps"] == 2


@pytest.mark.slow
def test_ctrl_c_stops_with_a_checkpoint_and_130(recipe, alone, tmp_path):
    run = Bothways(recipe, tmp_path / "runs", "--stage", "teacher")
    run.at_checkpoint("teacher", 2)
    (rank,) = run.records()
    os.kill(rank.pid, signal.SIGSTOP)  # else it may have finished before it is asked
    run.process.send_signal(signal.SIGINT)
    time.sleep(1)
    os.kill(rank.pid, signal.SIGCONT)
    status, _, err = run.wait()
    assert (status, err) == (130, "error: stage 'teacher' was asked to stop: run again to go on\n")
    succeed(Bothways(recipe, tmp_path / "runs", "--stage", "teacher"))
    assert_bit_equal(tmp_path / "runs/tiny/teacher", alone)


@pytest.mark.slow
def test_a_second_signal_kills(recipe, tmp_path):
    run = Bothways(recipe, tmp_path / "runs", "--stage", "teacher", "--set", "teacher.train.steps=100000")
    run.at_checkpoint("teacher", 2)
    (rank,) = run.records()
    os.kill(rank.pid, signal.SIGSTOP)  # it will not answer the first one
    run.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    run.process.send_signal(signal.SIGTERM)
    status, _, _ = run.wait()
    assert status == PREEMPTED
    assert not alive(rank.pid)


@pytest.mark.slow
def test_two_runs_in_one_directory_do_not_meet(recipe, tmp_path):
    first = Bothways(recipe, tmp_path / "runs", "--stage", "teacher")
    first.at_checkpoint("teacher", 0)
    second = Bothways(recipe, tmp_path / "runs", "--stage", "teacher")
    assert "skipped" not in succeed(first)
    out = succeed(second)
    assert "waiting for another run in" in out
    assert "skipped, unchanged" in out
