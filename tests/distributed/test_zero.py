"""ZeRO levels beyond plain sharding, on two gloo processes: offload, NVMe, hpZ, gradient checkpointing."""

import shutil

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.stages.stage import read_stage
from launch.operators import ASYNC_IO, CPU_ADAM, prepare
from tests.distributed.conftest import Bothways, succeed
from tests.distributed.test_losses import CLOSE, numbers
from tests.recipes import (
    pretrain_section,
    ragged_rows,
    read_weights,
    run_here,
    train_section,
    write_recipe,
    write_rows,
)

WIDE = {"layers": 2, "hidden": 256, "heads": 4, "positions": 64}
"""Wide enough that shards of a megabyte, the least that is swapped, exist."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wide")
    write_rows(directory / "rows.jsonl", ragged_rows(200))
    train = train_section(steps=10, evaluate_every=10)
    return write_recipe(directory, {"base": {"pretrain": pretrain_section(model=WIDE, train=train)}})


@pytest.fixture(scope="module")
def single(wide, tmp_path_factory):
    return run_here(wide, "base", tmp_path_factory.mktemp("single")).directory


def run(recipe, runs, parallel, *overrides):
    sets = [part for override in overrides for part in ("--set", override)]
    arguments = ["--set", f"base.parallel={parallel}", "--set", "base.processes=2", *sets]
    out = succeed(Bothways(recipe, runs, "--stage", "base", *arguments))
    return out, runs / "tiny" / "base"


def assert_same_training(single, other):
    np.testing.assert_allclose(numbers(single, "loss"), numbers(other, "loss"), rtol=0, atol=CLOSE)
    np.testing.assert_allclose(numbers(single, "grad_norm"), numbers(other, "grad_norm"), rtol=1e-3, atol=CLOSE)
    ours, theirs = read_weights(single), read_weights(other)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["zero2_offload", "zero3_offload"])
def test_offload_to_the_cpu_gives_the_same_training(wide, single, tmp_path, parallel):
    prepare([CPU_ADAM], print)
    _, directory = run(wide, tmp_path / "runs", parallel)
    assert_same_training(single, directory)
    assert parallel in read_stage(directory)["processes"]


@pytest.mark.slow
def test_hpz_gives_the_same_training_over_gloo(wide, single, tmp_path):
    _, directory = run(wide, tmp_path / "runs", "zero3_hpz")
    assert_same_training(single, directory)


@pytest.mark.slow
def test_nvme_gives_the_same_training_swaps_to_the_named_disk_and_leaves_nothing_there(wide, single, tmp_path, monkeypatch):
    try:
        prepare([CPU_ADAM, ASYNC_IO], print)
    except UserError as error:
        pytest.skip(str(error))
    disk = tmp_path / "disk"
    monkeypatch.setenv("BOTHWAYS_NVME_PATH", str(disk))
    process = Bothways(
        wide, tmp_path / "runs", "--stage", "base", "--set", "base.parallel=zero3_nvme", "--set", "base.processes=2"
    )
    swapped = disk / "tiny" / "base.partial" / "nvme" / "zero_stage_3"
    process.when(lambda: any(path.stat().st_size for path in swapped.rglob("*.swp")), "something is swapped out")
    succeed(process)
    assert_same_training(single, tmp_path / "runs/tiny/base")
    assert not swapped.exists()


def test_gradient_checkpointing_under_zero3_on_two_ranks_changes_nothing(recipe, zero3, tmp_path):
    from tests.distributed.conftest import TWO

    arguments = [*TWO["zero3"], "--set", "base.train.gradient_checkpointing=true"]
    succeed(Bothways(recipe, tmp_path / "runs", "--stage", "base", *arguments))
    again = tmp_path / "runs/tiny/base"
    for path in (("loss",), ("validation", "loss"), ("grad_norm",)):
        np.testing.assert_allclose(numbers(zero3, *path), numbers(again, *path), rtol=1e-5, atol=1e-6, err_msg=str(path))


@pytest.mark.slow
def test_gradient_checkpointing_under_zero3_draws_the_same_dropout(recipe, tmp_path):
    common = ["base.train.dropout=0.3", "base.train.steps=6"]
    _, plain = run(recipe, tmp_path / "plain", "zero3", *common)
    _, again = run(recipe, tmp_path / "again", "zero3", *common, "base.train.gradient_checkpointing=true")
    for path in (("loss",), ("grad_norm",)):
        np.testing.assert_allclose(numbers(plain, *path), numbers(again, *path), rtol=1e-5, atol=1e-6, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["zero2", "zero3"])
def test_an_eight_bit_optimizer_trains_as_the_full_one_does(recipe, tmp_path, parallel):
    pytest.importorskip("bitsandbytes")
    _, directory = run(recipe, tmp_path / "runs", parallel, "base.train.optimizer=adamw_8bit")
    _, plain = run(recipe, tmp_path / "plain", parallel)
    ours, theirs = numbers(directory, "loss"), numbers(plain, "loss")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02)
    assert not np.array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lamb", "muon", "stable_adamw"])
def test_an_optimizer_of_whole_tensors_on_two_ranks_trains_as_on_one(recipe, tmp_path, optimizer):
    chosen = f"base.train.optimizer={optimizer}"
    _, directory = run(recipe, tmp_path / "runs", "zero0", chosen)
    alone = run_here(recipe, "base", tmp_path / "alone", chosen).directory
    np.testing.assert_allclose(numbers(alone, "loss"), numbers(directory, "loss"), rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["zero0", "zero2", "zero3"])
def test_bf16_autocast_stays_close_to_fp32_at_every_level(recipe, tmp_path, parallel, single_base):
    _, directory = run(recipe, tmp_path / "runs", parallel, "base.train.precision=bf16")
    np.testing.assert_allclose(numbers(single_base, "loss"), numbers(directory, "loss"), rtol=0, atol=5e-3)


@pytest.fixture(scope="module")
def single_base(recipe, tmp_path_factory):
    directory = run_here(recipe, "base", tmp_path_factory.mktemp("single-base")).directory
    yield directory
    shutil.rmtree(directory, ignore_errors=True)
