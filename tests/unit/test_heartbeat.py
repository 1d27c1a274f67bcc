"""Heartbeats: written by a rank, read by its launcher, nothing where nobody watches."""

import os
import timeit

import pytest

from engine.stages import heartbeat


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.setenv(heartbeat.DIRECTORY, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(heartbeat, "_writer", None)
    return tmp_path


def test_the_latest_phase_of_a_rank_is_read_back(watched):
    heartbeat.beat("start")
    heartbeat.beat("update", 412)
    (beat,) = heartbeat.read(watched)
    assert (beat.rank, beat.pid, beat.phase, beat.step) == (3, os.getpid(), "update", 412)
    assert 0 <= beat.age_seconds < 5
    assert heartbeat.last().step == 412
    heartbeat.beat("evaluate")
    assert (heartbeat.last().phase, heartbeat.last().step) == ("evaluate", 412)


def test_a_process_is_warm_after_its_first_step(watched):
    for step, warm in ((100, False), (100, False), (101, True), (100, True)):
        heartbeat.beat("forward", step)
        assert heartbeat.read(watched)[0].warm is warm


def test_nothing_is_written_where_nobody_watches(tmp_path, monkeypatch):
    monkeypatch.delenv(heartbeat.DIRECTORY, raising=False)
    monkeypatch.setattr(heartbeat, "_writer", None)
    monkeypatch.chdir(tmp_path)
    heartbeat.beat("data", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_cleaned_away_does_not_stop_training(tmp_path, monkeypatch):
    monkeypatch.setenv(heartbeat.DIRECTORY, str(tmp_path / "gone"))
    monkeypatch.setattr(heartbeat, "_writer", None)
    heartbeat.beat("data", 1)


@pytest.mark.parametrize("content", [b"", b"short", bytes(range(64))])
def test_a_beat_that_is_torn_is_left_out(tmp_path, content):
    (tmp_path / "beat0").write_bytes(content)
    assert heartbeat.read(tmp_path) == []


def test_a_beat_that_is_half_written_is_left_out(watched):
    heartbeat.beat("data", 7)
    data = bytearray((watched / "beat3").read_bytes())
    data[0] ^= 1  # one of its two times
    (watched / "beat3").write_bytes(bytes(data))
    assert heartbeat.read(watched) == []


def test_a_beat_is_cheap_enough_for_every_micro_batch(watched):
    heartbeat.beat("forward", 1)
    assert min(timeit.repeat(lambda: heartbeat.beat("forward", 2), number=1000, repeat=5)) / 1000 < 100e-6
