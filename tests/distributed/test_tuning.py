"""Frozen layers and learning rates by layer, whoever holds the weights."""

import numpy as np
import pytest
import torch

from engine.models import load_model
from engine.training.tuning import depth_of
from tests.distributed.conftest import Bothways, succeed
from tests.recipes import read_history, read_weights, run_here

PART = ["teacher.train.layers=1", "teacher.train.layer_decay=0.5", "teacher.train.unfreeze=50%"]


@pytest.fixture(scope="module")
def single(recipe, tmp_path_factory):
    return run_here(recipe, "teacher", tmp_path_factory.mktemp("single"), *PART).directory


@pytest.mark.parametrize("level", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_ranks_train_the_same_part_of_the_model_as_one(recipe, single, tmp_path, level):
    settings = [*PART, f"teacher.parallel={level}", "teacher.processes=2"]
    succeed(Bothways(recipe, tmp_path / "runs", "--stage", "teacher", *(word for part in settings for word in ("--set", part))))
    both = tmp_path / "runs/tiny/teacher"
    losses = [[record["loss"] for record in read_history(directory) if "loss" in record] for directory in (single, both)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-4)
    depths = depth_of(load_model(both, "AutoModelForSequenceClassification"))
    before = read_weights(recipe.parent / "model")
    for name, tensor in read_weights(both).items():
        torch.testing.assert_close(tensor, read_weights(single)[name], rtol=0, atol=1e-3, msg=name)
        if depths[name] > 1:
            assert torch.equal(tensor, before[name]), name
        elif "classifier" not in name:
            assert not torch.equal(tensor, before[name]), name
