"""Batches are made beside the step before."""

import threading

import pytest
import torch

from engine.training.ahead import Ahead


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
