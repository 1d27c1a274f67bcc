"""A CRF's transitions are trained, saved and handed on like every other weight, whoever holds them; with intents beside, too."""

import numpy as np
import pytest
import torch

from tests.distributed.conftest import Bothways, succeed
from tests.distributed.test_resume_check import check
from tests.recipes import (
    finetune_section,
    read_history,
    read_weights,
    run_here,
    train_section,
    write_commands,
    write_recipe,
    write_sentences,
)

TASKS = {"tagging": (write_sentences, "f1"), "intent_slots": (write_commands, "slot_f1")}


@pytest.fixture(scope="module", params=["tagging", pytest.param("intent_slots", marks=pytest.mark.slow)])
def case(request, tmp_path_factory):
    """(a recipe that learns tags with a CRF, from rows of which some need several windows; how they are judged)."""
    directory = tmp_path_factory.mktemp(request.param)
    write, metric = TASKS[request.param]
    write(directory / "rows.conll", 120)
    data = {"train": "rows.conll", "validation": "25%"}
    train = train_section(steps=12, learning_rate=3e-3, evaluate_every=6)
    section = finetune_section(task={"type": request.param, "crf": True}, data=data, max_length=24, train=train)
    return write_recipe(directory, {"teacher": {"finetune": section}}), metric


@pytest.fixture(scope="module")
def single(case, tmp_path_factory):
    return run_here(case[0], "teacher", tmp_path_factory.mktemp("single")).directory


LEVELS = ["zero3", *(pytest.param(level, marks=pytest.mark.slow) for level in ("zero0", "zero1", "zero2"))]


@pytest.mark.parametrize("level", LEVELS)
def test_two_ranks_train_the_crf_that_one_trains(case, single, tmp_path, level):
    recipe, metric = case
    settings = [f"teacher.parallel={level}", "teacher.processes=2", "teacher.train.micro_batch_size=2"]
    succeed(Bothways(recipe, tmp_path / "runs", "--stage", "teacher", *(word for part in settings for word in ("--set", part))))
    both = tmp_path / "runs/tiny/teacher"
    histories = [read_history(directory) for directory in (single, both)]
    np.testing.assert_allclose(
        *([record["loss"] for record in each if "loss" in record] for each in histories), rtol=0, atol=1e-4
    )
    figures = [[record["validation"][metric] for record in each if "validation" in record] for each in histories]
    np.testing.assert_allclose(*figures, rtol=0, atol=0.5)
    own, theirs = read_weights(single), read_weights(both)
    assert own["crf.weight"].shape == (7, 5) and own["crf.weight"].abs().max() > 1e-3
    assert own.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, own[name], rtol=0, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [(), ("--set", "teacher.parallel=zero3", "--set", "teacher.processes=2")])
def test_a_killed_training_goes_on_bit_by_bit(case, tmp_path, spread):
    done = check(case[0], tmp_path / "runs", *spread, "--steps", "40")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("verdict: resume is bit-exact\n")
