"""One global batch gives one loss and one update, however it is spread over ranks and accumulation steps."""

import numpy as np
import pytest
import torch

from engine.stages.stage import read_stage
from tests.distributed.conftest import TWO
from tests.recipes import pretrain_section, read_history, read_weights, run_here, train_section, write_recipe, write_rows
from tests.unit.models import WORDS

CLOSE = 1e-4


@pytest.fixture(scope="module")
def single(recipe, tmp_path_factory):
    """1 × 8: one process, no accumulation."""
    return run_here(recipe, "base", tmp_path_factory.mktemp("single")).directory


@pytest.fixture(scope="module")
def accumulated(recipe, tmp_path_factory):
    """8 × 1: one process, eight accumulation steps of one row each."""
    return run_here(recipe, "base", tmp_path_factory.mktemp("accumulated"), "base.train.micro_batch_size=1").directory


def numbers(directory, *path):
    found = []
    for record in read_history(directory):
        for key in path:
            record = record.get(key) if isinstance(record, dict) else None
        found += [] if record is None else [record]
    return np.asarray(found)


@pytest.mark.parametrize("spread", ["accumulated", "zero2", "zero3"])
def test_losses_and_gradient_norms_do_not_depend_on_how_the_batch_is_spread(single, spread, request):
    other = request.getfixturevalue(spread)
    for path in (("loss",), ("validation", "loss"), ("grad_norm",)):
        ours, theirs = numbers(single, *path), numbers(other, *path)
        assert len(ours) == len(theirs) >= 10
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE, err_msg=str(path))


@pytest.mark.parametrize("spread", ["accumulated", "zero2", "zero3"])
def test_the_weights_that_are_handed_on_do_not_depend_on_how_the_batch_is_spread(single, spread, request):
    ours, theirs = read_weights(single), read_weights(request.getfixturevalue(spread))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-3, msg=name)


def test_the_loss_falls_where_there_is_something_to_learn(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"text": " ".join([word] * count)} for word in WORDS for count in range(5, 25)])
    train = train_section(steps=60, learning_rate=1e-2, evaluate_every=30)
    recipe = write_recipe(tmp_path, {"base": {"pretrain": pretrain_section(train=train)}})
    loss = numbers(run_here(recipe, "base", tmp_path / "runs").directory, "validation", "loss")
    assert loss[-1] < loss[0] - 0.5


def test_the_record_says_how_the_work_was_spread(zero2, zero3):
    assert read_stage(zero2)["processes"] == (
        "2 processes over gloo, zero2, accumulation = 1 (global 8 / (micro 4 × ranks 2)), fp32"
    )
    assert "accumulation = 4 (global 8 / (micro 1 × ranks 2))" in read_stage(zero3)["processes"]
    assert read_stage(zero3)["parameters"] == read_stage(zero2)["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero0", "zero1"])
def test_the_other_levels_give_the_same_losses(recipe, single, tmp_path, name):
    from tests.distributed.conftest import Bothways, succeed

    arguments = [part.replace("zero2", name) for part in TWO["zero2"]]
    succeed(Bothways(recipe, tmp_path / "runs", "--stage", "base", *arguments))
    other = tmp_path / "runs/tiny/base"
    np.testing.assert_allclose(numbers(single, "loss"), numbers(other, "loss"), rtol=0, atol=CLOSE)
