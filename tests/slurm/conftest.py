"""A real Slurm, and the jobs that several tests look at: submitted at the start, so that they run side by side."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.operators import SHARED_MEMORY, prepare
from launch.slurm.jobs import latest
from launch.status import status_of
from tests.recipes import finetune_section, pretrain_section, ragged_rows, train_section, write_recipe, write_rows
from tests.slurm.cluster import Cluster, why_not

ROOT = Path(__file__).parents[2]
WAIT = 240.0
"""Seconds after which something that should have happened fails the test."""
STEPS = 60


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


class Bothways:
    """The command line on a machine of the cluster."""

    def __init__(self, cluster):
        self.cluster = cluster
        # One thread each: threads that wait for each other make a tiny model slow on a busy machine.
        self.environment = {**cluster.environment, "OMP_NUM_THREADS": "1"}

    def __call__(self, *arguments, status=0):
        """Runs `bothways …`; returns (stdout, stderr)."""
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=self.environment,
            timeout=2 * WAIT,
        )
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr

    def submit(self, recipe, runs, *arguments):
        """Submits a recipe; returns its run directory."""
        self("launch", recipe, "--runs", runs, "--slurm", "--time", "10", *arguments)
        return runs / "tiny"

    def until(self, run, stage, *states):
        """Waits until a stage is in one of the states; returns its status."""
        give_up = time.monotonic() + WAIT
        while (found := status(run, stage)).state not in states:
            if time.monotonic() > give_up:
                pytest.fail(f"never {' or '.join(states)}: {found}\n{everything(run)}")
            time.sleep(0.3)
        return found

    def finished(self, run, stage):
        """Waits until a stage has finished; returns its directory."""
        found = self.until(run, stage, "finished", "failed", "cancelled", "stopped")
        assert found.state == "finished", f"{found}\n{everything(run)}"
        return run / stage

    def ask_to_stop(self, run, stage):
        """What Slurm does some time before the time limit."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", latest(run)[stage].id)


def status(run, stage):
    """What `bothways status` says about a stage."""
    return next(found for found in status_of(run) if found.stage == stage)


def everything(run):
    """All that the jobs of a run have left, for the message of a failing test."""
    paths = [*run.glob("jobs/*.log"), *run.glob("jobs/*/events"), *run.glob("jobs/*/attempt-*/*.log")]
    return "\n".join(f"==> {path}\n{path.read_text()[-3000:]}" for path in paths)


def happened(what, test, run):
    give_up = time.monotonic() + WAIT
    while not test():
        if time.monotonic() > give_up:
            pytest.fail(f"never happened: {what}\n{everything(run)}")
        time.sleep(0.02)


def at_checkpoint(run, stage, step):
    """Waits until a checkpoint is complete."""
    path = run / f"{stage}.partial/checkpoints/step-{step:08d}"
    happened(f"checkpoint {path}", path.exists, run)


def events(run, stage):
    """What the latest job of a stage has said about itself, one word for each."""
    return [event.word for event in latest(run)[stage].events()]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    if not shutil.which("g++"):
        pytest.skip("DeepSpeed compiles an operator on machines without GPUs, and there is no g++")
    prepare([SHARED_MEMORY], print)
    with Cluster(tmp_path_factory.mktemp("slurm")) as running, pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, running.environment[name])
        yield running


@pytest.fixture(scope="session")
def bothways(cluster):
    return Bothways(cluster)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """Two training stages in a chain, with many checkpoints."""
    directory = tmp_path_factory.mktemp("recipe")
    write_rows(directory / "rows.jsonl", ragged_rows(200))
    train = train_section(steps=STEPS, learning_rate=3e-3, dropout=0.1)
    short = train_section(steps=2)
    stages = {
        "base": {"pretrain": pretrain_section(train=train)},
        "teacher": {"finetune": finetune_section(model="base", train=short)},
    }
    return write_recipe(directory, stages)


TWO_NODES = ("--nodes", "2", "--processes-per-node", "1", "--set", "base.parallel=zero2", "--stage", "base")
"""One ZeRO-2 rank on each of two nodes."""


@pytest.fixture(scope="session")
def submitted(bothways, recipe, tmp_path_factory):
    """Runs that are left to themselves: {name: run directory}; what they do is independent of each other."""
    runs = {}

    def submit(name, recipe, *arguments):
        runs[name] = bothways.submit(recipe, tmp_path_factory.mktemp(name) / "runs", *arguments)

    submit("two nodes", recipe, *TWO_NODES)
    submit("sweep", recipe, "--stage", "base", "--sweep", "base.train.learning_rate=1e-3,3e-3", "--set", "base.train.steps=2")
    submit("mistake", _with_mistake(tmp_path_factory.mktemp("mistake-recipe")))
    submit("crash", *_crashing(tmp_path_factory.mktemp("crash-recipe")), "--nodes", "2", "--processes-per-node", "1")
    return runs


def _with_mistake(directory):
    """A recipe whose first stage finds a broken line that is too far down for a look in advance."""
    recipe = write_recipe(
        directory, {"base": {"pretrain": pretrain_section()}, "teacher": {"finetune": finetune_section(model="base")}}
    )
    path = write_rows(directory / "rows.jsonl", ragged_rows(600))
    path.write_text(path.read_text() + "{broken\n")
    return recipe


BROKEN = """\
import os, sys


class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "engine.training.loop":
            raise ZeroDivisionError("a rank that is broken")


if "RANK" in os.environ:
    sys.meta_path.insert(0, Broken())
"""
"""A sitecustomize.py with which a rank crashes in the middle of its work."""


def _crashing(directory):
    """Options and recipe of a run whose first stage crashes in every rank."""
    stages = {"teacher": {"finetune": finetune_section()}, "again": {"finetune": finetune_section(model="teacher")}}
    broken = directory / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(BROKEN)
    return write_recipe(directory, stages), "--setup", f"export PYTHONPATH={broken}:$PYTHONPATH"


@pytest.fixture(scope="session")
def alone(recipe, tmp_path_factory):
    """The first stage after an uninterrupted run of one process."""
    runs = tmp_path_factory.mktemp("alone") / "runs"
    command = [sys.executable, "-m", "launch.cli", "run", str(recipe), "--runs", str(runs), "--stage", "base"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    return runs / "tiny/base"
