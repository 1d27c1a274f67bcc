"""A CRF's transitions are trained, saved and handed on like every other weight, whoever holds them."""

import numpy as np
import pytest
import torch

from tests.distributed.conftest import Bothways, succeed
from tests.recipes import finetune_section, read_history, read_weights, run_here, train_section, write_recipe, write_sentences


@pytest.fixture(scope="module")
def tagging(tmp_path_factory):
    """A recipe that learns entities with a CRF, from rows of which some need several windows."""
    directory = tmp_path_factory.mktemp("tagging")
    write_sentences(directory / "rows.conll", 120)
    data = {"train": "rows.conll", "validation": "25%"}
    train = train_section(steps=12, learning_rate=3e-3, evaluate_every=6)
    section = finetune_section(task={"type": "tagging", "crf": True}, data=data, max_length=24, train=train)
    return write_recipe(directory, {"teacher": {"finetune": section}})


@pytest.fixture(scope="module")
def single(tagging, tmp_path_factory):
    return run_here(tagging, "teacher", tmp_path_factory.mktemp("single")).directory


@pytest.mark.parametrize("level", ["zero3", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_ranks_train_the_crf_that_one_trains(tagging, single, tmp_path, level):
    settings = [f"teacher.parallel={level}", "teacher.processes=2", "teacher.train.micro_batch_size=2"]
    succeed(Bothways(tagging, tmp_path / "runs", "--stage", "teacher", *(word for part in settings for word in ("--set", part))))
    both = tmp_path / "runs/tiny/teacher"
    histories = [read_history(directory) for directory in (single, both)]
    np.testing.assert_allclose(
        *([record["loss"] for record in each if "loss" in record] for each in histories), rtol=0, atol=1e-4
    )
    figures = [[record["validation"]["f1"] for record in each if "validation" in record] for each in histories]
    np.testing.assert_allclose(*figures, rtol=0, atol=0.5)
    own, theirs = read_weights(single), read_weights(both)
    assert own["crf.weight"].shape == (7, 5) and own["crf.weight"].abs().max() > 1e-3
    assert own.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, own[name], rtol=0, atol=1e-3, msg=name)
