"""DeepSpeed's operators: compiled once, and never behind the lock of a build that was killed."""

import os
import threading
import time

import pytest

from engine.errors import UserError
from launch import operators
from launch.operators import Operator, is_built, is_stale, locks, prepare

TOY = Operator("toy", "NoSuchBuilder", 1)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The directory of an operator in an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "extensions" / "toy"
    directory.mkdir(parents=True)
    return directory


def age(path, seconds):
    path.touch()
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_compiled_operator_is_found_and_not_compiled_again(toy):
    assert not is_built(TOY)
    (toy / "toy.so").touch()
    assert is_built(TOY)
    said = []
    prepare([TOY], said.append)
    assert said == []


def test_a_lock_is_stale_when_it_is_old_and_nobody_works_there(toy, monkeypatch):
    age(toy / "lock", 3600)
    assert locks() == [toy / "lock"]
    assert is_stale(toy / "lock")
    monkeypatch.chdir(toy)  # as ninja does for as long as it builds
    assert not is_stale(toy / "lock")
    monkeypatch.chdir(toy.parent)
    age(toy / "lock", 1)
    assert not is_stale(toy / "lock")
    assert not is_stale(toy / "no-lock")


def test_a_stale_lock_is_removed_before_anything_waits_on_it(toy):
    (toy / "toy.so").touch()
    age(toy / "lock", 3600)
    other = toy.parent / "other" / "lock"
    other.parent.mkdir()
    age(other, 3600)
    said = []
    prepare([TOY], said.append)
    assert said == [f"removing {toy / 'lock'}, left by a build that was killed"]
    assert locks() == [other]


def test_a_build_that_is_going_on_is_waited_for(toy):
    (toy / "toy.so").touch()
    (toy / "lock").touch()
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (prepare([TOY], print), done.set()))
    waiting.start()
    assert not done.wait(0.2)
    (toy / "lock").unlink()
    waiting.join()
    assert done.is_set()


def test_two_runs_build_in_turn_and_once(toy, monkeypatch):
    built = []

    def build(operator):
        built.append(operator.name)
        time.sleep(0.1)
        (toy / "toy.so").touch()

    monkeypatch.setattr(operators, "_build", build)
    runs = [threading.Thread(target=prepare, args=([TOY], lambda text: None)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert built == ["toy"]


def test_an_operator_that_does_not_compile_is_a_line_with_the_way_out(toy):
    said = []
    with pytest.raises(UserError, match=r"toy does not compile here \(.*\): install g\+\+ and ninja") as error:
        prepare([TOY], said.append)
    assert said == ["compiling DeepSpeed's toy: about 1 s, once on this machine"]
    assert "\n" not in str(error.value)
