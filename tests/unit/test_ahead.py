"""Batches are made beside the step before."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from engine.errors import UserError
from engine.training.ahead import Ahead
from engine.training.processes import Processes
from tests.recipes import pretrain_section, read_weights, run_here, train_section, write_recipe


@pytest.fixture
def recorded():
    """(an Ahead over recorded steps, the steps that were made, the threads that made them)."""
    made, threads = [], set()

    def make(step):
        made.append(step)
        threads.add(threading.get_ident())
        return [{"input_ids": torch.tensor([step]), "count": step}]

    ahead = Ahead(make, pin=False)
    yield ahead, made, threads
    ahead.close()


def test_every_step_gets_its_own_batch_and_each_is_made_once(recorded):
    ahead, made, threads = recorded
    assert [ahead.at(step, last=4)[0]["count"] for step in range(5)] == [0, 1, 2, 3, 4]
    ahead.close()
    assert made == [0, 1, 2, 3, 4], "none behind the last"
    assert threads and threading.get_ident() not in threads


def test_a_step_that_was_not_expected_is_made_anew(recorded):
    ahead, made, _ = recorded
    ahead.at(0, last=99)
    assert ahead.at(7, last=99)[0]["count"] == 7
    assert ahead.at(8, last=99)[0]["count"] == 8
    ahead.close()
    assert made[:4] == [0, 1, 7, 8]


def test_the_next_batch_is_made_while_the_caller_works():
    going = threading.Event()

    def make(step):
        if step:
            going.set()
        return []

    ahead = Ahead(make, pin=False)
    ahead.at(0, last=9)
    assert going.wait(timeout=30), "nobody has asked for step 1, and it is there"
    ahead.close()


def test_what_goes_wrong_shows_where_the_batch_is_asked_for():
    def make(step):
        if step == 1:
            raise ValueError("row 7")
        return []

    ahead = Ahead(make, pin=False)
    ahead.at(0, last=9)
    with pytest.raises(ValueError, match="row 7"):
        ahead.at(1, last=9)
    ahead.close()


def test_waiting_is_counted():
    ahead = Ahead(lambda step: (threading.Event().wait(0.05) and []) or [], pin=False)
    ahead.at(0, last=0)
    assert ahead.waited >= 0.05
    ahead.close()


def test_more_steps_than_were_expected_come_in_order(recorded):
    ahead, made, _ = recorded
    assert [ahead.at(step, last=1)[0]["count"] for step in range(2)] == [0, 1]
    assert [ahead.at(step, last=3)[0]["count"] for step in (2, 3)] == [2, 3], "data that is left out moves the end"
    ahead.close()
    assert made == [0, 1, 2, 3]


def made_elsewhere(step):
    if step == 7:
        raise UserError("texts.csv:7: no text")
    if step == 8:
        raise ValueError("row 8")
    rows = torch.full((2, 3), step)
    return [{"input_ids": rows, "count": step, "process": os.getpid()}, {"input_ids": rows + 1, "count": 1, "process": 0}]


@pytest.fixture
def elsewhere():
    """An Ahead whose batches are made by two other processes."""
    ahead = Ahead(made_elsewhere, pin=False, workers=2)
    yield ahead
    ahead.close()


def test_processes_give_the_same_batches_in_the_same_order(elsewhere):
    before, makers = torch.random.get_rng_state(), set()
    for step in [0, 1, 2, 3, 20, 21, 1, 2]:
        first, second = elsewhere.at(step, last=30)
        assert (first["count"], first["input_ids"].tolist()) == (step, [[step] * 3] * 2)
        assert second["input_ids"].tolist() == [[step + 1] * 3] * 2
        makers.add(first["process"])
    assert len(makers) >= 2 and os.getpid() not in makers
    assert torch.equal(torch.random.get_rng_state(), before), "dropout draws from this generator"


def test_processes_go_on_when_everybody_is_asked_to_stop(elsewhere):
    worker = elsewhere.at(0, last=30)[0]["process"]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker, number)
    assert [elsewhere.at(step, last=30)[0]["count"] for step in range(1, 7)] == [1, 2, 3, 4, 5, 6]


def test_a_users_mistake_is_one_line_from_processes_too(elsewhere):
    with pytest.raises(UserError, match=r"^texts.csv:7: no text$"):
        elsewhere.at(7, last=30)
    with pytest.raises(ValueError, match="row 8"):
        elsewhere.at(8, last=30)


KILLED = """
import os, signal
from engine.training.ahead import Ahead

ahead = Ahead(lambda step: [{"process": os.getpid()}], pin=False, workers=2)
try:
    os.kill(ahead.at(0, last=10**6)[0]["process"], signal.SIGKILL)
    for step in range(1, 10**6):
        ahead.at(step, last=10**6)
except RuntimeError as error:
    print("failed", flush=True)
finally:
    ahead.close()
"""


def test_a_process_that_is_gone_is_an_error():
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=120)
    assert "failed" in done.stdout, done.stderr


CRASHES = """
import sys
from engine.training.ahead import Ahead

def make(step):
    return [{"count": step, "failed": 1 // (3 - step)}]

ahead = Ahead(make, pin=False, workers=2)
try:
    for step in range(9):
        ahead.at(step, last=9)
except ZeroDivisionError as error:
    kept = error
    ahead.close()
    print("closed", flush=True)
"""


def test_a_program_that_keeps_the_error_ends_all_the_same():
    done = subprocess.run([sys.executable, "-c", CRASHES], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr


def test_processes_end_with_what_asked_them(elsewhere):
    worker = elsewhere.at(0, last=30)[0]["process"]
    elsewhere.close()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}")


def test_a_training_learns_the_same_from_processes(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, {"base": {"pretrain": pretrain_section(train=train_section(dropout=0.1))}})
    by_thread = read_weights(run_here(recipe, "base", tmp_path / "thread").directory)
    asked = []
    monkeypatch.setattr(Processes, "batch_workers", property(lambda self: asked.append(1) or 2))
    by_processes = read_weights(run_here(recipe, "base", tmp_path / "processes").directory)
    assert asked and by_thread.keys() == by_processes.keys()
    assert all(torch.equal(tensor, by_processes[name]) for name, tensor in by_thread.items())
