"""A run goes on at another number of ranks, and goes round a bad step on all ranks alike, at every ZeRO level."""

import json
import signal

import numpy as np
import pytest
import torch

from engine.config import load_recipe
from engine.errors import PREEMPTED, USER_ERROR
from engine.training.checkpoint import step_numbers
from engine.training.zero_files import SHIPPED
from launch.local import run_stage
from launch.operators import CPU_ADAM, prepare
from launch.recipe import KINDS, load_stages
from tests.distributed.conftest import Bothways, succeed
from tests.distributed.poisoned import BAD
from tests.recipes import read_history, read_weights, run_here

SLOW = pytest.mark.slow
LONGER = "base.train.steps=80"


@pytest.fixture(scope="module")
def single(recipe, tmp_path_factory):
    """The pretraining stage on one process without interruption."""
    return run_here(recipe, "base", tmp_path_factory.mktemp("single"), LONGER).directory


def train_in_parts(recipe, runs, *ways):
    """Trains in one run for each way (level, ranks), all but the last stopped after a checkpoint; returns what they say."""

    def newest():
        return max(step_numbers(runs / "tiny/base.partial/checkpoints"), default=0)

    said = ""
    for part, (level, ranks) in enumerate(ways, 1):
        settings = (LONGER, f"base.parallel={level}", f"base.processes={ranks}")
        before = newest()
        run = Bothways(recipe, runs, "--stage", "base", *(word for setting in settings for word in ("--set", setting)))
        if part == len(ways):
            return said + succeed(run)
        run.when(lambda before=before: newest() > before, f"a checkpoint of {ranks} ranks at {level}")
        run.process.send_signal(signal.SIGTERM)
        status, out, err = run.wait()
        assert status == PREEMPTED, f"{out}\n{err}"
        assert not list(runs.rglob("*.universal*"))
        said += out


def assert_same_result(stage, single):
    ours, theirs = (
        {record["step"]: record["validation"]["loss"] for record in read_history(directory) if "validation" in record}
        for directory in (stage, single)
    )
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0, atol=1e-4)
    weights = read_weights(single)
    for name, tensor in read_weights(stage).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("level", "way"),
    [
        ("zero2", (2,)),
        pytest.param("zero0", (1, 2, 4), marks=SLOW),
        pytest.param("zero2", (1, 2, 4), marks=SLOW),
        pytest.param("zero3", (1, 2, 4), marks=SLOW),
    ],
)
def test_a_run_that_changes_its_number_of_ranks_gives_the_losses_and_weights_of_one(recipe, single, tmp_path, level, way):
    said = train_in_parts(recipe, tmp_path / "runs", *((level, ranks) for ranks in way), (level, 1))
    assert said.count("resuming after step") == len(way)
    assert said.count("converted for") == (0 if level == "zero0" else len(way))
    assert_same_result(tmp_path / "runs/tiny/base", single)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("zero2", "zero2_offload"),
        ("zero2_offload", "zero2"),
        ("zero3", "pieces"),
        ("zero3", "zero3_offload"),
        ("zero3_offload", "zero3"),
    ],
)
def test_a_run_that_changes_how_its_state_is_cut_gives_the_same_losses_and_weights(recipe, single, tmp_path, before, after):
    prepare([CPU_ADAM], print)
    pieces = changed(tmp_path, "zero3", sub_group_size=3000)
    changes = (pieces if after == "pieces" else after, 2)
    said = train_in_parts(recipe, tmp_path / "runs", (before, 2), changes, changes)
    assert said.count("converted for") == 1
    assert_same_result(tmp_path / "runs/tiny/base", single)


def changed(directory, level, **keys):
    """Writes a shipped ZeRO configuration with other keys; returns its path."""
    config = json.loads((SHIPPED / f"{level}.json").read_text())
    config["zero_optimization"] |= keys
    path = directory / "changed.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_a_change_that_deepspeed_would_convert_wrongly_is_refused(recipe, tmp_path):
    arguments = ("--stage", "base", "--set", LONGER, "--set", "base.processes=1", "--set")
    run = Bothways(recipe, tmp_path / "runs", *arguments, "base.parallel=zero2")
    run.at_checkpoint("base", 2)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait()[0] == PREEMPTED
    other = changed(tmp_path, "zero2", round_robin_gradients=True)
    again = Bothways(recipe, tmp_path / "runs", *arguments, f"base.parallel={other}")
    status, _, err = again.wait()
    assert status == USER_ERROR and "round_robin_gradients, whose order cannot be spread anew" in err


@pytest.mark.parametrize("level", ["zero2", pytest.param("zero0", marks=SLOW), pytest.param("zero3", marks=SLOW)])
@pytest.mark.parametrize("action", ["rollback", pytest.param("skip", marks=SLOW)])
def test_a_loss_that_is_not_finite_on_one_rank_is_bad_on_all(recipe, tmp_path, monkeypatch, level, action):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(KINDS, "pretrain", KINDS["pretrain"]._replace(module="tests.distributed.poisoned"))
    overrides = [f"base.parallel={level}", "base.processes=2", f"base.train.bad_steps.action={action}"]
    stage = load_stages(load_recipe(recipe, overrides, tmp_path / "runs"))[0]
    run_stage(stage, overrides, print)
    history = read_history(stage.directory)
    key = {"rollback": "rolled_back", "skip": "skipped"}[action]
    (event,) = [record for record in history if key in record]
    assert (event["step"], event[key]) == (4 if action == "rollback" else BAD + 1, "the loss is not finite")
    assert all(torch.isfinite(tensor).all() for tensor in read_weights(stage.directory).values())
    assert history[-1]["step"] == 20
