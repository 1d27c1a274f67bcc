"""Restarts in place and stalls on one host."""

import os
import signal

import pytest

from engine.config import load_recipe
from engine.errors import UserError
from launch.local import run_stage
from launch.nodes.place import Supervision
from launch.recipe import KINDS, load_stages
from launch.watchdog import StageError
from tests.distributed.conftest import TWO, Bothways, kill, succeed
from tests.distributed.test_kill import assert_bit_equal
from tests.recipes import write_recipe


def test_a_killed_rank_is_started_again_in_place_and_the_weights_are_those_of_an_undisturbed_run(recipe, zero2, tmp_path):
    run = Bothways(recipe, tmp_path / "runs", "--stage", "base", *TWO["zero2"], "--max-restarts", "1")
    run.at_checkpoint("base", 6)
    kill(next(record.pid for record in run.records() if record.rank == 1))
    out = succeed(run)
    assert "restart 1 of 1: process 1 of stage 'base' was killed: out of memory, or killed by hand\n" in out
    assert "resuming after step" in out
    assert_bit_equal(tmp_path / "runs/tiny/base", zero2)


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_run_with_its_phase_and_the_stack_of_a_rank_that_answers(recipe, tmp_path):
    arguments = ("--stage", "base", *TWO["zero2"], "--set", "base.train.steps=100000", "--heartbeat-limit", "5")
    run = Bothways(recipe, tmp_path / "runs", *arguments)
    run.at_checkpoint("base", 6)
    os.kill(next(record.pid for record in run.records() if record.rank == 1), signal.SIGSTOP)
    status, _, err = run.wait()
    assert status == 1
    assert err.splitlines()[-1].startswith("error: stage 'base': rank 1: no progress for ")
    assert err.splitlines()[-1].endswith("(the process is stopped)")


def restarts(tmp_path, monkeypatch, how, most):
    """Returns (the exception that ended the stage, what was said) of a stage whose rank 1 fails in every attempt."""
    monkeypatch.setenv("FAIL", how)
    monkeypatch.setitem(KINDS, "finetune", KINDS["finetune"]._replace(module="tests.distributed.crashing"))
    overrides = ["teacher.parallel=zero2", "teacher.processes=2"]
    (stage,) = load_stages(load_recipe(write_recipe(tmp_path), overrides, tmp_path / "runs"))
    said = []
    with pytest.raises((StageError, UserError)) as error:
        run_stage(stage, overrides, said.append, supervision=Supervision(most))
    return error.value, [line for line in said if line.startswith("restart")]


@pytest.mark.slow
def test_a_crash_is_tried_again_as_often_as_allowed_and_no_more(tmp_path, monkeypatch):
    error, said = restarts(tmp_path, monkeypatch, "crash", 2)
    assert str(error) == "stage 'teacher' crashed in process 1: ZeroDivisionError: rank 1 divides by zero"
    assert said == [f"restart {number} of 2: {error}" for number in (1, 2)]


@pytest.mark.slow
def test_a_mistake_is_never_tried_again(tmp_path, monkeypatch):
    error, said = restarts(tmp_path, monkeypatch, "mistake", 2)
    assert (str(error), said) == ("recipe.yaml:3: rank 1 cannot use this", [])
