"""A disk that fills up: one line, exit status 2, and the previous checkpoint is there to go on from."""

import os
import shutil
import subprocess

import pytest
import torch

from engine.errors import UserError, disk_full
from engine.training import checkpoint, loop
from engine.training.checkpoint import step_numbers
from engine.training.tracking import Tracker
from tests.distributed.conftest import Bothways, succeed
from tests.recipes import read_weights, run_here

MEGABYTES = 16


@pytest.fixture
def small(tmp_path):
    """A directory on a disk of a few megabytes."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(directory):
    with pytest.raises(OSError, match="No space left"), (directory / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 2**16)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    return run_here(recipe, "teacher", tmp_path_factory.mktemp("whole")).directory


PLACES = {
    "checkpoint": (checkpoint.Checkpoints, "save", 4),
    "manifest of the checkpoint": (checkpoint, "hash_directory", 4),
    "weights": (loop.Fit, "_keep_weights", 3),
    "history": (Tracker, "record", 9),
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_the_disk_fills_up_the_run_goes_on_from_the_checkpoint_before(recipe, whole, small, monkeypatch, place):
    owner, name, call = PLACES[place]
    original, calls = getattr(owner, name), []

    def filling(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            fill(small)
        return original(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, filling)
        with pytest.raises(Exception) as error:
            run_here(recipe, "teacher", small)
    assert isinstance(error.value, UserError) or disk_full(error.value)
    partial = small / "tiny/teacher.partial"
    kept = step_numbers(partial / "checkpoints")
    assert kept
    if isinstance(error.value, UserError):
        assert f"disk full while saving the checkpoint: free some space and run again; the checkpoint of step {kept[-1]}" in str(
            error.value
        )
    (small / "filler").unlink()
    directory = run_here(recipe, "teacher", small).directory
    assert all(torch.equal(tensor, read_weights(whole)[key]) for key, tensor in read_weights(directory).items())


def test_a_full_disk_under_a_real_run_is_one_line_and_the_next_run_goes_on(recipe, small):
    run = Bothways(recipe, small / "runs", "--stage", "teacher")
    run.at_checkpoint("teacher", 2)
    fill(small)
    status, _, err = run.wait()
    assert status == 2, err
    assert err.startswith("error: ")
    assert "disk full" in err
    assert err.count("\n") == 1
    (small / "filler").unlink()
    assert "resuming after step" in succeed(Bothways(recipe, small / "runs", "--stage", "teacher"))
