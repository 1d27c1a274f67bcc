"""Real runs of `bothways run` on two gloo processes; runs that several tests look at happen once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.stages.rank import Record, read_records
from launch.operators import SHARED_MEMORY, prepare
from tests.recipes import finetune_section, pretrain_section, ragged_rows, train_section, write_recipe, write_rows

ROOT = Path(__file__).parents[2]
WAIT = 240.0
"""Seconds after which a run that should have ended is killed and the test fails."""


class Bothways:
    """`bothways run` as a child process."""

    def __init__(self, recipe: Path, runs: Path, *arguments: str) -> None:
        self.runs = runs
        self.scratch = runs.with_name(runs.name + ".scratch")
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "run", str(recipe), "--runs", str(runs), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # One thread each: threads that wait for each other make a tiny model slow on a busy machine.
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.scratch)},
        )

    def wait(self) -> tuple[int, str, str]:
        """Returns (exit status, stdout, stderr)."""
        try:
            out, err = self.process.communicate(timeout=WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"still running after {WAIT} s\n{out}\n{err}")
        return self.process.returncode, out, err

    def records(self) -> list[Record]:
        """Returns the records of the ranks of the running stage."""
        return [record for directory in self.scratch.glob("bothways-*") for record in read_records(directory)]

    def when(self, happened, what: str) -> None:
        """Waits until `happened()`."""
        give_up = time.monotonic() + WAIT
        while not happened():
            if self.process.poll() is not None or time.monotonic() > give_up:
                pytest.fail(f"never happened: {what}\n{self.wait()}")
            time.sleep(0.005)

    def at_checkpoint(self, stage: str, step: int) -> None:
        """Waits until the checkpoint of `step` is complete."""
        path = self.runs / "tiny" / f"{stage}.partial" / "checkpoints" / f"step-{step:08d}"
        self.when(path.exists, f"checkpoint {path}")


def succeed(run: Bothways) -> str:
    status, out, err = run.wait()
    assert status == 0, f"{out}\n{err}"
    return out


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Killed and not yet collected by its parent counts as gone.
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session", autouse=True)
def operators():
    """DeepSpeed's shared-memory operator, compiled before the first test."""
    if not shutil.which("g++"):
        pytest.skip("DeepSpeed compiles an operator on machines without GPUs, and there is no g++")
    prepare([SHARED_MEMORY], print)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """A pretraining stage with ragged targets and a fine-tuning stage, both with many checkpoints."""
    directory = tmp_path_factory.mktemp("recipe")
    write_rows(directory / "rows.jsonl", ragged_rows(200))
    train = train_section(steps=20, learning_rate=3e-3)
    stages = {"base": {"pretrain": pretrain_section(train=train)}, "teacher": {"finetune": finetune_section(train=train)}}
    return write_recipe(directory, stages)


TWO = {
    "zero2": ("--set", "base.parallel=zero2", "--set", "base.processes=2"),
    "zero3": ("--set", "base.parallel=zero3", "--set", "base.processes=2", "--set", "base.train.micro_batch_size=1"),
}
"""Two ranks × 4 rows, and two ranks × 1 row × 4 accumulation steps."""


@pytest.fixture(scope="session")
def zero2(recipe, tmp_path_factory):
    """The directory of the pretraining stage after an uninterrupted run on two ZeRO-2 processes."""
    return _uninterrupted(recipe, tmp_path_factory, "zero2")


@pytest.fixture(scope="session")
def zero3(recipe, tmp_path_factory):
    return _uninterrupted(recipe, tmp_path_factory, "zero3")


def _uninterrupted(recipe, tmp_path_factory, name):
    runs = tmp_path_factory.mktemp(name) / "runs"
    succeed(Bothways(recipe, runs, "--stage", "base", *TWO[name]))
    return runs / "tiny" / "base"
