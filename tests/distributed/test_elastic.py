"""A run goes on at another number of ranks, and goes round a bad step on all ranks alike, at every ZeRO level."""

import signal

import numpy as np
import pytest
import torch

from engine.checkpoint import step_numbers
from engine.config import load_recipe
from engine.errors import PREEMPTED
from launch.local import run_stage
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
    def arguments(ranks):
        settings = (LONGER, f"base.parallel={level}", f"base.processes={ranks}")
        return ("--stage", "base", *(part for setting in settings for part in ("--set", setting)))

    def newest():
        return max(step_numbers(tmp_path / "runs/tiny/base.partial/checkpoints"), default=0)

    said = ""
    for ranks in way:
        before = newest()
        run = Bothways(recipe, tmp_path / "runs", *arguments(ranks))
        run.when(lambda before=before: newest() > before, f"a checkpoint of {ranks} ranks")
        run.process.send_signal(signal.SIGTERM)
        status, out, err = run.wait()
        assert status == PREEMPTED, f"{out}\n{err}"
        said += out
    said += succeed(Bothways(recipe, tmp_path / "runs", *arguments(1)))
    assert said.count("resuming after step") == len(way)
    assert said.count("converted for") == (0 if level == "zero0" else len(way))
    stage = tmp_path / "runs/tiny/base"
    ours, theirs = (
        {record["step"]: record["validation"]["loss"] for record in read_history(directory) if "validation" in record}
        for directory in (stage, single)
    )
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0, atol=1e-4)
    weights = read_weights(single)
    for name, tensor in read_weights(stage).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-3, msg=name)


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
